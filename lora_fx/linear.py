"""The swapped linear: what a LoRA module is, and the cached subclass that makes one out of any `nn.Linear` subclass.

    module.__class__ = lora_class(type(module))      # Float8Linear -> LoRAFloat8Linear, and isinstance still holds
    module.forward(x) = Parent.forward(x) + scale * enabled * (dropout(x) A^T) B^T

There is one class per parent class and never one per module: Dynamo guards on classes. For the same reason the numbers
that differ between modules are 0-d buffers and not Python floats: they are inputs of a compiled graph, not guards, so
modules of equal shape share one graph, and changing a number takes effect without recompiling.
"""

import functools
import math
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_fx.passes.low_rank import low_rank, low_rank_rows
from lora_fx.placements import deferred, fill, is_dtensor, like_weight, placed, replicated_like
from lora_fx.stored import (
    ENABLED,
    OWN_ATTRIBUTES,
    SCALE,
    StoredAdapter,
    exchange,
    keep_numbers,
    note_loaded_scale,
    number,
)

# Everything that the swap adds to a module, in the order in which it is added.
PARAMETERS = ("lora_a", "lora_b")
BUFFERS = (SCALE, ENABLED)
ATTRIBUTES = (
    *OWN_ATTRIBUTES,
    "lora_adapters",
    "_lora_active",
    "_lora_disabled",
    "_lora_merged",
    "_lora_rows",
    "_lora_stack",
)
DEFAULT_NAME = "default"


@dataclass(frozen=True)
class Adapter:
    """An adapter of one linear.

    Args:
        lora_a: [R, K]. Rows behind the adapter's own rank are zero, and so are the columns of `lora_b` there. Then
            their gradients are zero as well, and they stay as they are.
        lora_b: [N, R].
        scale: multiplies the low-rank product.
        dropout: probability of dropping an input element of the low-rank branch in training.
        init: how `lora_a` starts, a name that `LoRAConfig.init` knows.
        rank: the adapter's own, at most R; 0 for an adapter that leaves this linear alone.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    dropout: float
    init: str
    rank: int


class LoRAModule(nn.Linear):
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

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: Tensor
    lora_enabled: Tensor
    lora_dropout: float
    lora_init: str
    lora_adapters: nn.ModuleDict
    _lora_last_scale: float
    _lora_rank: int
    _lora_active: str
    _lora_disabled: Tensor | None
    _lora_deferred: bool
    _lora_merged: Any  # a lora_fx.merge.Merged, or None
    _lora_rows: Any  # a lora_fx.rows.Rows, or None
    _lora_stack: Any  # a lora_fx.rows.Stack, or None

    # The parameter is called `input` because `nn.Linear.forward`'s is, and callers may name it.
    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the dtype of the parent's output."""
        base = super().forward(input)
        if self._lora_rows is not None:
            rows, *stack = self._lora_rows
            return base + low_rank_rows(input, rows, stack, self.lora_enabled).to(base.dtype)
        scale = self.lora_scale * self.lora_enabled
        factors: tuple[Tensor, Tensor] = self.lora_a, self.lora_b
        if self._lora_deferred:
            factors = deferred(self.lora_a), deferred(self.lora_b)
        update = low_rank(input, *factors, scale, self.lora_dropout, self.training)
        return base + update.to(base.dtype)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module's, except that distributed factors go where the distributed weight wants them.

        `parallelize_module` registers every parameter of a linear anew, with placements that are meant for the weight.
        """
        weight = self._parameters.get("weight")
        super().register_parameter(
            name, placed(name, param, weight) if name in PARAMETERS and param is not None else param
        )
        if name == "weight":  # after the factors, where a parent registers it last
            for factor in PARAMETERS:
                if (held := self._parameters.get(factor)) is not None:
                    self._parameters[factor] = placed(factor, held, param)
            if is_dtensor(param):
                for stored in self.stored_adapters().values():
                    stored.follow(param)

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
        self.lora_adapters[self._lora_active] = stored
        self._lora_active = adapter

    def disabled_buffer(self) -> Tensor:
        """The zero that stands in for `lora_enabled` inside `lora_fx.disabled`.

        It takes the other's place instead of being written into it, because a compiled forward may have saved
        `lora_enabled` for its backward: a loss that compares a model with itself without adapters (DPO, KL to the
        base) runs the second forward before the backward of the first. And it is always the same tensor, because CUDA
        graphs are recorded for addresses.
        """
        zero = self._lora_disabled
        if zero is None or zero.device != self.lora_enabled.device or type(zero) is not type(self.lora_enabled):
            with torch.inference_mode(False):  # it may be needed for training next
                zero = self._lora_disabled = torch.zeros_like(self.lora_enabled)
        return zero

    @torch.no_grad()
    def reset_adapters(self) -> None:
        """Start all adapters afresh: A as `lora_init` says, B zero, the last scale that was installed or loaded.

        Raises:
            ValueError: the adapter is merged.
        """
        if self._lora_merged is not None:
            raise ValueError("an adapter that is merged cannot start afresh: call lora_fx.unmerge(model) first")
        for held in self.holders():
            reset_a(held.lora_a, held.lora_init, held._lora_rank)
            held.lora_b.zero_()
            held.lora_scale.fill_(held._lora_last_scale)
        if self.lora_enabled is not self._lora_disabled:
            self.lora_enabled.fill_(1.0)

    def reset_parameters(self) -> None:
        """The parent's `reset_parameters`, then `reset_adapters`."""
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
        super()._apply(fn, recurse)
        keep_numbers(self, before)
        self.lora_adapters._apply(fn)
        self._lora_stack = None
        if self._lora_rows is not None:
            self._lora_rows = self._lora_rows.moved(fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
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
        if self._lora_merged is not None and any(name.startswith(prefix) for name in state_dict):
            raise ValueError(f"{prefix.rstrip('.') or 'the model'} is merged: call lora_fx.unmerge(model) first")
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

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the parent class, which can be imported; the swapped class is made again where it is loaded."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        cls = type(self)
        if "_lora_parent" not in cls.__dict__:  # a subclass of a swapped class looks after itself
            return reduced
        if not isinstance(reduced, tuple) or reduced[0].__name__ != "__newobj__" or reduced[1] != (cls,):
            raise TypeError(f"{cls.__name__} cannot be pickled: {parent_class(cls).__name__} pickles in its own way")
        return (_new, (parent_class(cls),), *reduced[2:])


def _new(parent: type[nn.Linear]) -> LoRAModule:
    cls = lora_class(parent)
    return cls.__new__(cls)


def lora_class(parent: type[nn.Linear]) -> type[LoRAModule]:
    """The subclass ``LoRA<Parent>`` of `parent`: always the same class for the same parent.

    Raises:
        TypeError: `parent` is no subclass of `nn.Linear`, or is a swapped class already.
    """
    if not issubclass(parent, nn.Linear) or issubclass(parent, LoRAModule):
        raise TypeError(f"{parent.__name__} must be nn.Linear or a subclass that is not swapped yet")
    return _lora_class(cast(Hashable, parent))


@functools.cache
def _lora_class(parent: Any) -> type[LoRAModule]:
    name = f"LoRA{parent.__name__}"
    namespace = {
        # The parent's: torch.fx traces through a module or calls it, depending on where its class is from.
        "__module__": parent.__module__,
        "__qualname__": name,
        "__doc__": f"`{parent.__module__}.{parent.__qualname__}` with a low-rank adapter; see `lora_fx.LoRAModule`.",
        "_lora_parent": parent,
    }
    return cast(
        type[LoRAModule], types.new_class(name, (LoRAModule, parent), exec_body=lambda ns: ns.update(namespace))
    )


def parent_class(cls: type) -> type[nn.Linear]:
    """The class that a module had before its class became `cls`, a `lora_class`."""
    return cast(type[nn.Linear], cls.__dict__["_lora_parent"])


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


def is_activation_dtype(dtype: torch.dtype) -> bool:
    """Whether matrix products on activations are done in `dtype`: floating point of 16 bits or more."""
    return dtype.is_floating_point and dtype.itemsize >= 2


def new_adapter(
    module: nn.Linear, *, rank: int, scale: float, dropout: float, init: str, dtype: torch.dtype, room: int
) -> Adapter:
    """An adapter for `module`, initialised, on its weight's device and mesh; `module` is not touched.

    The shapes follow `in_features` and `out_features`, because a packed weight has a shape of its own. `room` is the
    size R of the factors, at least `rank`.
    """
    weight = getattr(module, "weight", None)
    device = weight.device if isinstance(weight, Tensor) else next(iter(module.parameters())).device
    a = torch.empty(room, module.in_features, dtype=dtype, device=device)
    reset_a(a, init, rank)
    b = torch.zeros(module.out_features, room, dtype=dtype, device=device)
    a, b = like_weight("lora_a", a, weight), like_weight("lora_b", b, weight)
    return Adapter(nn.Parameter(a), nn.Parameter(b), scale, dropout, init, rank)


@torch.no_grad()
def reset_a(lora_a: Tensor, init: str, rank: int) -> None:
    """Start A [R, K] as `init` says: kaiming-uniform as `nn.Linear`'s weight, or normal with deviation 1 / `rank`.

    Rows behind the first `rank` become zero.

    A distributed A is drawn whole on every rank and cut from the first one's: the draw is that of a single process,
    and replicas agree on devices where distributed random numbers do not.
    """
    whole = lora_a
    if is_dtensor(lora_a):
        whole = torch.empty(lora_a.shape, dtype=lora_a.dtype, device=lora_a.device)
    whole[rank:].zero_()
    if rank and init == "kaiming":
        nn.init.kaiming_uniform_(whole[:rank], a=math.sqrt(5))
    elif rank:
        nn.init.normal_(whole[:rank], std=1.0 / rank)
    if whole is not lora_a:
        fill(lora_a, whole)


def swap(module: nn.Linear, adapter: Adapter, name: str = DEFAULT_NAME) -> None:
    """Make `module` a `LoRA<Parent>` that holds `adapter` under a name. Undone by `unswap`."""
    module.__class__ = lora_class(type(module))
    swapped = cast(LoRAModule, module)
    hold(swapped, adapter, getattr(module, "weight", None))
    enabled = torch.ones((), dtype=torch.float32, device=adapter.lora_a.device)
    swapped.register_buffer(ENABLED, replicated_like(enabled, getattr(module, "weight", None)), persistent=False)
    module.__dict__["lora_adapters"] = nn.ModuleDict()  # past `nn.Module`, which would make a child of it
    swapped._lora_active = name
    swapped._lora_disabled = None
    swapped._lora_merged = None
    swapped._lora_rows = None
    swapped._lora_stack = None


def hold(module: LoRAModule | StoredAdapter, adapter: Adapter, weight: object) -> None:
    """Register the tensors of `adapter`, which goes beside `weight`, on `module`, and note its numbers there."""
    module.register_parameter("lora_a", adapter.lora_a)
    module.register_parameter("lora_b", adapter.lora_b)
    scale = torch.full((), adapter.scale, dtype=torch.float32, device=adapter.lora_a.device)
    module.register_buffer(SCALE, replicated_like(scale, weight))
    module.lora_dropout = adapter.dropout
    module.lora_init = adapter.init
    module._lora_last_scale = adapter.scale
    module._lora_rank = adapter.rank
    module._lora_deferred = False


def store(module: LoRAModule, adapter: Adapter, name: str) -> None:
    """Put `adapter` beside the active one of `module`."""
    stored = StoredAdapter()
    hold(stored, adapter, getattr(module, "weight", None))
    module.lora_adapters[name] = stored


def unswap(module: nn.Linear) -> None:
    """Give `module` its parent's class back and take away all that `swap` added, or as much of it as is there."""
    for name in (*PARAMETERS, *BUFFERS, *ATTRIBUTES):
        if name in module._parameters or name in module._buffers or name in module.__dict__:
            delattr(module, name)
    module.__class__ = parent_class(type(module))
