"""The swapped linear: what a LoRA module is, and the cached subclass that makes one out of any `nn.Linear` subclass.

    module.__class__ = lora_class(type(module))      # Float8Linear -> LoRAFloat8Linear, and isinstance still holds
    module.forward(x) = Parent.forward(x) + scale * enabled * (dropout(x) A^T) B^T

What it shares with swapped experts is in `lora_fx.adapted`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lora_fx._torch import annotate
from lora_fx.adapted import BUFFERS, Adapted, swapped_class
from lora_fx.config import CHANGES_BASE
from lora_fx.inits import ChangedBase, decomposed, put_back, put_residual, reset_factors
from lora_fx.packed import check_not_quantised, is_activation_dtype
from lora_fx.passes.graph import BESIDE, REPLICATED, ROOM
from lora_fx.passes.kernels.beside import are_beside
from lora_fx.passes.kernels.wide import LEFT, is_exact, note_room, room_of, take_room
from lora_fx.passes.low_rank import low_rank, low_rank_rows
from lora_fx.placements import deferred, is_dtensor, placed, replica_ranks
from lora_fx.stored import (
    OWN_ATTRIBUTES,
    StoredAdapter,
    exchange,
    keep_numbers,
    note_loaded_scale,
    number,
)

# Everything that the swap adds to a module, in the order in which it is added.
PARAMETERS = ("lora_a", "lora_b")
ATTRIBUTES = (
    *OWN_ATTRIBUTES,
    "lora_adapters",
    "_lora_active",
    "_lora_disabled",
    "_lora_merged",
    "_lora_base",
    "_lora_rows",
    "_lora_stack",
    "_lora_replicated",
    "_lora_beside",
    "_lora_room",
)
DEFAULT_NAME = "default"


class LoRAModule(Adapted, nn.Linear):
    """The half of a swapped linear that is not its parent: every ``LoRA<Parent>`` derives from this and from Parent.

    The buffers are 0-d, and float32 whatever dtype the module is moved to.

    Attributes:
        lora_a: [R, K], trainable.
        lora_b: [N, R], trainable, zero at first.
        lora_scale: saved in `state_dict`, so that loading a checkpoint restores the function that was saved even where
            this module was installed with another alpha. Change it with ``module.lora_scale.fill_(value)``.
        lora_enabled: 1, or 0 inside `lora_fx.disabled`; not saved.

    All of this belongs to the active adapter. Others wait in ``lora_adapters``, by name; see `lora_fx.set_adapter`.
    """

    lora_parameters: ClassVar[tuple[str, ...]] = PARAMETERS
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_adapters: nn.ModuleDict
    _lora_rank: int
    _lora_base: ChangedBase | None
    _lora_stack: Any  # a lora_fx.rows.Stack, or None
    # The ranks of each process group on which lora_a is the same, and lora_b; nothing where both are plain.
    _lora_replicated: tuple[tuple[tuple[int, ...], ...], ...] = ()
    # Whether lora_a lies behind the weight in memory, as far as this module knows: see lora_fx.beside.
    _lora_beside: bool = False
    # On which side the weight's rows have room for those of lora_b, likewise: "left", "right" or nothing.
    _lora_room: str = ""

    # The parameter is called `input` because `nn.Linear.forward`'s is, and callers may name it.
    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the dtype of the parent's output."""
        if self._lora_beside:
            with annotate({BESIDE: True}):
                base = super().forward(input)
            # Spelt in another way: AOTAutograd's cache knows a graph by its code, of which annotations are no part.
            scale = torch.mul(self.lora_scale, self.lora_enabled)
        elif self._lora_room:
            with annotate({ROOM: self._lora_room}):
                base = super().forward(input)
            left = self._lora_room == LEFT
            scale = torch.mul(*(self.lora_enabled, self.lora_scale)[:: 1 if left else -1])
        else:
            base = super().forward(input)
            scale = self.lora_scale * self.lora_enabled
        if self._lora_rows is not None:
            rows, *stack = self._lora_rows
            return base + low_rank_rows(input, rows, stack, self.lora_enabled).to(base.dtype)
        if self._lora_replicated:
            with annotate({REPLICATED: self._lora_replicated}):
                return base + self._lora_update(input, scale).to(base.dtype)
        return base + self._lora_update(input, scale).to(base.dtype)

    def _lora_update(self, input: Tensor, scale: Tensor) -> Tensor:
        return low_rank(input, *self._lora_factors(), scale, self.lora_dropout, self.training)

    def _lora_factors(self) -> tuple[Tensor, Tensor]:
        """A and B as the forward reads them."""
        if self._lora_deferred:
            return deferred(self.lora_a), deferred(self.lora_b)
        return self.lora_a, self.lora_b

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module's, except that distributed factors go where the distributed weight wants them.

        `parallelize_module` registers every parameter of a linear anew, with placements that are meant for the weight.

        Raises:
            ValueError: a packed weight is to take the place of one that is not: the base is being quantised below an
                adapter. (A weight without values yet, on the meta device, may be filled with a packed one.)
        """
        weight = self._parameters.get("weight")
        if name == "weight" and weight is not None and param is not None:
            check_not_quantised(self, weight, param)
        if param is not None and name in self.lora_parameters:
            param = placed(name, param, weight)
        super().register_parameter(name, param)
        if name == "weight":  # after the factors, where a parent registers it last
            for factor in self.lora_parameters:
                if (held := self._parameters.get(factor)) is not None:
                    self._parameters[factor] = placed(factor, held, param)
            if is_dtensor(param):
                for stored in self.stored_adapters().values():
                    stored.follow(param)
        if name in ("weight", *PARAMETERS):
            ranks = tuple(replica_ranks(self._parameters.get(factor)) for factor in PARAMETERS)
            now = ranks if any(ranks) else ()
            if self._lora_replicated != now:
                self._lora_replicated = now
            self._look_beside()

    def note_memory(self, beside: bool, room: str) -> None:
        """Note whether the active adapter's A lies behind the weight in memory, and where that has room for B."""
        if (self._lora_beside, self._lora_room) != (beside, room):
            self._lora_beside, self._lora_room = beside, room

    def _look_beside(self) -> None:
        """After one of them was replaced: whether they still lie as noted."""
        if self._lora_beside or self._lora_room:
            weight, a = (cast(Tensor, self._parameters.get(name)) for name in ("weight", "lora_a"))
            plain = all(p is not None and type(p.detach()) is Tensor and not p.is_meta for p in (weight, a))
            side, columns = take_room(weight) if plain and self._lora_room else ("", 0)
            if side:
                note_room(weight, side, columns)  # whoever had the memory before
            beside = self._lora_beside and plain and are_beside(weight, a)
            self.note_memory(beside, side if is_exact(self._lora_last_scale) else "")

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        """While tensors may be exchanged, which torch refuses for one that others have weak references to."""
        weight = self._parameters.get("weight")
        side, columns = take_room(weight)
        address = weight.data_ptr() if weight is not None and side else None
        del weight
        try:
            yield
        finally:
            weight = self._parameters.get("weight")
            # A module that was converted has another weight, or the same with other memory.
            plain = weight is not None and type(weight.detach()) is Tensor and not weight.is_meta
            if side and plain and cast(Tensor, weight).data_ptr() == address:
                note_room(cast(Tensor, weight), side, columns)
            self._look_beside()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy has memory of its own."""
        super().__setstate__(state)
        had_room = self._lora_room
        self._look_beside()
        if had_room and not self._lora_room and (weight := self._parameters.get("weight")) is not None:
            weight.data = weight.data.contiguous()

    def stored_adapters(self) -> dict[str, StoredAdapter]:
        """The adapters that are not active, by name."""
        # Absent while the swap is under way.
        return cast(dict[str, StoredAdapter], dict(self.__dict__.get("lora_adapters", {}).items()))

    def holders(self) -> "list[LoRAModule | StoredAdapter]":
        """What has the tensors and numbers of each adapter now; the active one's are the module's own."""
        return [self, *self.stored_adapters().values()]

    def holder(self, adapter: str | None) -> "LoRAModule | StoredAdapter | None":
        """What has the tensors and numbers of `adapter` now; of the active one if that is None, None if unknown."""
        return self if adapter in (None, self._lora_active) else self.stored_adapters().get(adapter or "")

    def activate(self, adapter: str) -> None:
        """Let `adapter`, which must be there, take the active one's place."""
        if adapter == self._lora_active:
            return
        stored = cast(StoredAdapter, self.lora_adapters.pop(adapter))
        exchange(self, stored)
        self._look_beside()
        self.lora_adapters[self._lora_active] = stored
        self._lora_active = adapter

    @torch.no_grad()
    def reset_adapters(self) -> None:
        """Start all adapters afresh, as `lora_init` says, with the last scale that was installed or loaded.

        Raises:
            ValueError: the adapter is merged; or `lora_init` takes the weight apart, which is sharded by now.
        """
        self.check_start()
        if self.lora_init in CHANGES_BASE:  # there is one adapter then
            self.put_base_back()
            scale, rank = self._lora_last_scale, self.lora_a.shape[0]
            self._lora_base = decomposed(self.weight, self.lora_init, rank, scale, self.lora_a.dtype)
            self.lora_a.copy_(self._lora_base.lora_a)
            self.lora_b.copy_(self._lora_base.lora_b)
            self.lora_scale.fill_(scale)
            put_residual(self.weight, self._lora_base)
        else:
            for held in self.holders():
                reset_factors(held.lora_a, held.lora_b, held.lora_init, held._lora_rank)
                held.lora_scale.fill_(held._lora_last_scale)
        if self.lora_enabled is not self._lora_disabled:
            self.lora_enabled.fill_(1.0)

    def check_start(self) -> None:
        """Raise ValueError if `reset_adapters` would."""
        super().check_start()
        if self.lora_init in CHANGES_BASE and is_dtensor(self.weight):
            raise ValueError(f"init={self.lora_init!r} takes the weight apart, which is sharded: start before that")

    def put_base_back(self) -> None:
        """Give the weight back, to the bit, what `lora_init` took out of it; nothing is done where that is nothing."""
        if self._lora_base is not None:
            put_back(self.weight, self._lora_base)
            self._lora_base = None

    def reset_parameters(self) -> None:
        """The parent's `reset_parameters`, then `reset_adapters`."""
        self.put_base_back()
        super().reset_parameters()
        self.reset_adapters()

    def extra_repr(self) -> str:
        scale = number(self.lora_scale)
        shown = self._lora_last_scale if scale is None else scale
        ours = f"rank={self._lora_rank}, scale={shown:g}, dropout={self.lora_dropout:g}"
        if len(self.lora_adapters):
            ours += f", adapter={self._lora_active!r} of {len(self.lora_adapters) + 1}"
        return ", ".join(filter(None, (super().extra_repr(), ours)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRAModule":
        """Move or convert as any module, the other adapters too, except that the numbers stay what they are."""
        before = {name: self._buffers[name] for name in BUFFERS}
        with self._exchanging():
            super()._apply(fn, recurse)
        keep_numbers(self, before)
        self.lora_adapters._apply(fn)
        self._lora_stack = None
        if self._lora_rows is not None:
            self._lora_rows = self._lora_rows.moved(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars and room_of(self._parameters.get("weight")):
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].contiguous()  # safetensors takes no gaps
        for name, stored in self.stored_adapters().items():
            stored._save_to_state_dict(destination, f"{prefix}lora_adapters.{name}.", keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        if self._lora_base is not None and f"{prefix}weight" in state_dict and f"{prefix}lora_a" not in state_dict:
            raise ValueError(
                f"{prefix.rstrip('.') or 'the model'} holds the residual that init={self.lora_init!r} left of its "
                f"weight, and a weight without adapters is no residual: load the base before lora_fx.install"
            )
        with self._exchanging():
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
            note_loaded_scale(self)
        if self.lora_enabled.is_meta and not self.lora_scale.is_meta:  # assign=True onto meta; this one is not saved
            self.lora_enabled = torch.ones_like(self.lora_scale)
        for name, stored in self.stored_adapters().items():
            below = f"{prefix}lora_adapters.{name}."
            stored._load_from_state_dict(state_dict, below, local_metadata, strict, missing, unexpected, errors)
            # To `nn.Module`, what is no child's is nobody's.
            ours = {below + key for key in (*stored._parameters, *stored._buffers)}
            unexpected[:] = [key for key in unexpected if key not in ours]


def lora_class(parent: type[nn.Linear], kind: type[LoRAModule] = LoRAModule) -> type[LoRAModule]:
    """The subclass ``LoRA<Parent>`` of `parent`: always the same class for the same parent and kind.

    Raises:
        TypeError: `parent` is no subclass of `nn.Linear`, or is a swapped class already.
    """
    if not issubclass(parent, nn.Linear) or issubclass(parent, LoRAModule):
        raise TypeError(f"{parent.__name__} must be nn.Linear or a subclass that is not swapped yet")
    return swapped_class(kind, parent)


def adapter_dtype(module: nn.Linear, activation_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the adapters of `module`: its weight's, or the activations' where the weight is packed.

    A weight is packed when its dtype is no floating point type of 16 bits or more (int8, packed int4, float8). Tensor
    subclasses that present themselves as bfloat16 or float32 are taken at their word. The activation dtype of a packed
    linear is its bias's, if that is floating point, or else `activation_dtype`.
    """
    for tensor in (getattr(module, "weight", None), module.bias):
        if isinstance(tensor, Tensor) and is_activation_dtype(tensor.dtype):
            return tensor.dtype
    return activation_dtype
