"""The swapped linear: what a LoRA module is, and the cached subclass that makes one out of any `nn.Linear` subclass.

    module.__class__ = lora_class(type(module))      # Float8Linear -> LoRAFloat8Linear, and isinstance still holds
    module.forward(x) = Parent.forward(x) + scale * enabled * (dropout(x) A^T) B^T

There is one class per parent class and never one per module: Dynamo guards on classes. For the same reason the numbers
that differ between modules are 0-d buffers and not Python floats: they are inputs of a compiled graph, not guards, so
modules of equal shape share one graph, and changing a number takes effect without recompiling.
"""

import functools
import types
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lora_fx.config import CHANGES_BASE
from lora_fx.inits import ChangedBase, decomposed, put_back, put_residual, reset_factors
from lora_fx.passes.low_rank import low_rank
from lora_fx.placements import deferred, is_dtensor, like_weight, local, placed, replicated_like

# The 0-d float32 buffers of a swapped module.
SCALE, ENABLED = "lora_scale", "lora_enabled"
# Everything that the swap adds to a module, in the order in which it is added.
PARAMETERS = ("lora_a", "lora_b")
BUFFERS = (SCALE, ENABLED)
ATTRIBUTES = (
    "lora_dropout",
    "lora_init",
    "_lora_last_scale",
    "_lora_disabled",
    "_lora_deferred",
    "_lora_merged",
    "_lora_base",
)


@dataclass(frozen=True)
class Adapter:
    """What the swap of one linear adds to it.

    Args:
        lora_a: [R, K].
        lora_b: [N, R].
        scale: multiplies the low-rank product.
        dropout: probability of dropping an input element of the low-rank branch in training.
        init: how `lora_a` starts, a name that `LoRAConfig.init` knows.
        kind: what the class of the swapped linear derives from beside its parent.
        others: the parameters that this kind has beside `lora_a` and `lora_b`, by name.
        base: what the weight is, where `init` puts a residual in its place.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    dropout: float
    init: str
    kind: "type[LoRAModule]"
    others: Mapping[str, nn.Parameter] = field(default_factory=dict)
    base: ChangedBase | None = None


class LoRAModule(nn.Linear):
    """The half of a swapped linear that is not its parent: every `LoRA<Parent>` derives from this and from Parent.

    Parameters:
        lora_a: [R, K], trainable.
        lora_b: [N, R], trainable, zero at first.

    Buffers, 0-d float32 whatever dtype the module is moved to:
        lora_scale: saved in `state_dict`, so that loading a checkpoint restores the function that was saved even where
            this module was installed with another alpha. Change it with ``module.lora_scale.fill_(value)``.
        lora_enabled: 1, or 0 inside `lora_fx.disabled`; not saved.
    """

    lora_parameters: ClassVar[tuple[str, ...]] = PARAMETERS
    lora_prefix: ClassVar[str] = "LoRA"
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: Tensor
    lora_enabled: Tensor
    lora_dropout: float
    lora_init: str
    _lora_last_scale: float
    _lora_disabled: Tensor | None
    _lora_deferred: bool
    _lora_merged: Any  # a lora_fx.merge.Merged, or None
    _lora_base: ChangedBase | None

    # The parameter is called `input` because `nn.Linear.forward`'s is, and callers may name it.
    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the dtype of the parent's output."""
        base = super().forward(input)
        scale = self.lora_scale * self.lora_enabled
        update = low_rank(input, *self._lora_factors(), scale, self.lora_dropout, self.training)
        return base + update.to(base.dtype)

    def _lora_factors(self) -> tuple[Tensor, Tensor]:
        """A and B as the forward reads them."""
        if self._lora_deferred:
            return deferred(self.lora_a), deferred(self.lora_b)
        return self.lora_a, self.lora_b

    def effective_weight(self) -> Tensor:
        """``W + s B A`` [N, K] in float32 (float64 for such weights)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        update = self.lora_b.to(wide) @ self.lora_a.to(wide)
        return torch.add(self.weight.to(wide), update * self.lora_scale.to(wide))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As any module's, except that distributed factors go where the distributed weight wants them.

        `parallelize_module` registers every parameter of a linear anew, with placements that are meant for the weight.
        """
        weight = self._parameters.get("weight")
        if param is not None and name in self.lora_parameters:
            param = placed(name, param, weight)
        super().register_parameter(name, param)
        if name == "weight":  # after the factors, where a parent registers it last
            for factor in self.lora_parameters:
                if (held := self._parameters.get(factor)) is not None:
                    self._parameters[factor] = placed(factor, held, param)

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
        """Start the adapters afresh, as `lora_init` says, with the last scale that was installed or loaded.

        Raises:
            ValueError: the adapter is merged; or `lora_init` takes the weight apart, which is sharded by now.
        """
        self.check_start()
        if self.lora_init in CHANGES_BASE:
            self.put_base_back()
            scale, rank = self._lora_last_scale, self.lora_a.shape[0]
            self._lora_base = decomposed(self.weight, self.lora_init, rank, scale, self.lora_a.dtype)
            self.lora_a.copy_(self._lora_base.lora_a)
            self.lora_b.copy_(self._lora_base.lora_b)
            put_residual(self.weight, self._lora_base)
        else:
            reset_factors(self.lora_a, self.lora_b, self.lora_init)
        self.lora_scale.fill_(self._lora_last_scale)
        if self.lora_enabled is not self._lora_disabled:
            self.lora_enabled.fill_(1.0)

    def check_start(self) -> None:
        """Raise ValueError if `reset_adapters` would."""
        if self._lora_merged is not None:
            raise ValueError("an adapter that is merged cannot start afresh: call lora_fx.unmerge(model) first")
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
        scale = _value(self.lora_scale)
        shown = self._lora_last_scale if scale is None else scale
        ours = f"rank={self.lora_a.shape[0]}, scale={shown:g}, dropout={self.lora_dropout:g}"
        return ", ".join(filter(None, (super().extra_repr(), ours)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRAModule":
        """Move or convert as any module, except that the two numbers stay float32 and never become garbage.

        ``.to(torch.bfloat16)`` would round the scale, and ``.to_empty()`` would leave it uninitialised, which a model
        that loads a checkpoint without an adapter in it would never notice.
        """
        before = {name: self._buffers[name] for name in BUFFERS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new is not old:
                self._buffers[name] = self._moved(name, old, new)
        return self

    @torch.no_grad()
    def _moved(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        moved = new if new.dtype == torch.float32 else torch.empty_like(new, dtype=torch.float32)
        if new.is_meta:
            value = _value(old)
            if name == SCALE and value is not None:
                self._lora_last_scale = value
        elif old.is_meta:
            moved.fill_(self._lora_last_scale if name == SCALE else 1.0)
        elif type(new) is type(old) or moved is not new:
            # A change of tensor type (a fake tensor, a DTensor) at equal dtype already holds the number.
            moved.copy_(old)
        return moved

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self._lora_merged is not None and any(name.startswith(prefix) for name in state_dict):
            raise ValueError(f"{prefix.rstrip('.') or 'the model'} is merged: call lora_fx.unmerge(model) first")
        if self._lora_base is not None and f"{prefix}weight" in state_dict and f"{prefix}lora_a" not in state_dict:
            raise ValueError(
                f"{prefix.rstrip('.') or 'the model'} holds the residual that init={self.lora_init!r} left of its "
                f"weight, and a weight without adapters is no residual: load the base before lora_fx.install"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.lora_scale.dtype != torch.float32:  # load_state_dict(assign=True) of a checkpoint that was cast
            self.lora_scale = self.lora_scale.float()
        if self.lora_enabled.is_meta and not self.lora_scale.is_meta:  # assign=True onto meta; this one is not saved
            self.lora_enabled = torch.ones_like(self.lora_scale)
        value = _value(self.lora_scale)
        if value is not None:
            self._lora_last_scale = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the parent class, which can be imported; the swapped class is made again where it is loaded."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        cls = type(self)
        if "_lora_parent" not in cls.__dict__:  # a subclass of a swapped class looks after itself
            return reduced
        if not isinstance(reduced, tuple) or reduced[0].__name__ != "__newobj__" or reduced[1] != (cls,):
            raise TypeError(f"{cls.__name__} cannot be pickled: {parent_class(cls).__name__} pickles in its own way")
        return (_new, (parent_class(cls), cls.__dict__["_lora_kind"]), *reduced[2:])


def _new(parent: type[nn.Linear], kind: type[LoRAModule]) -> LoRAModule:
    cls = lora_class(parent, kind)
    return cls.__new__(cls)


def _value(number: Tensor) -> float | None:
    """The value of a 0-d buffer, or None where there is none to read (meta, fake)."""
    number = local(number)  # the same on every rank
    return None if type(number) is not Tensor or number.is_meta else number.item()


def lora_class(parent: type[nn.Linear], kind: type[LoRAModule] = LoRAModule) -> type[LoRAModule]:
    """The subclass ``LoRA<Parent>`` of `parent`: always the same class for the same parent and kind.

    Raises:
        TypeError: `parent` is no subclass of `nn.Linear`, or is a swapped class already.
    """
    if not issubclass(parent, nn.Linear) or issubclass(parent, LoRAModule):
        raise TypeError(f"{parent.__name__} must be nn.Linear or a subclass that is not swapped yet")
    return _lora_class(cast(Hashable, parent), cast(Hashable, kind))


@functools.cache
def _lora_class(parent: Any, kind: Any) -> type[LoRAModule]:
    name = f"{kind.lora_prefix}{parent.__name__}"
    namespace = {
        # The parent's: torch.fx traces through a module or calls it, depending on where its class is from.
        "__module__": parent.__module__,
        "__qualname__": name,
        "__doc__": f"`{parent.__module__}.{parent.__qualname__}` with an adapter; see `lora_fx.{kind.__name__}`.",
        "_lora_parent": parent,
        "_lora_kind": kind,
    }
    return cast(type[LoRAModule], types.new_class(name, (kind, parent), exec_body=lambda ns: ns.update(namespace)))


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
    module: nn.Linear, *, rank: int, scale: float, dropout: float, init: str, activation_dtype: torch.dtype
) -> Adapter:
    """The adapter for `module`, initialised, on its weight's device and mesh; `module` is not touched.

    The shapes follow `in_features` and `out_features`, because a packed weight has a shape of its own.
    """
    weight = getattr(module, "weight", None)
    device = weight.device if isinstance(weight, Tensor) else next(iter(module.parameters())).device
    dtype = adapter_dtype(module, activation_dtype)
    base = None
    if init in CHANGES_BASE:
        assert isinstance(weight, Tensor)
        base = decomposed(weight, init, rank, scale, dtype)
        # Copies: the first factors are kept, and training changes the others.
        factors = base.lora_a.clone(), base.lora_b.clone()
    else:
        a = torch.empty(rank, module.in_features, dtype=dtype, device=device)
        b = torch.zeros(module.out_features, rank, dtype=dtype, device=device)
        reset_factors(a, b, init)
        factors = like_weight("lora_a", a, weight), like_weight("lora_b", b, weight)
    lora_a, lora_b = map(nn.Parameter, factors)
    return Adapter(lora_a, lora_b, scale, dropout, init, LoRAModule, base=base)


def swap(module: nn.Linear, adapter: Adapter) -> None:
    """Make `module` a `LoRA<Parent>` that holds `adapter`. Undone by `unswap`."""
    module.__class__ = lora_class(type(module), adapter.kind)
    swapped = cast(LoRAModule, module)
    device, weight = adapter.lora_a.device, getattr(module, "weight", None)
    swapped.register_parameter("lora_a", adapter.lora_a)
    swapped.register_parameter("lora_b", adapter.lora_b)
    for name, parameter in adapter.others.items():
        swapped.register_parameter(name, parameter)
    scale = torch.full((), adapter.scale, dtype=torch.float32, device=device)
    enabled = torch.ones((), dtype=torch.float32, device=device)
    swapped.register_buffer(SCALE, replicated_like(scale, weight))
    swapped.register_buffer(ENABLED, replicated_like(enabled, weight), persistent=False)
    swapped.lora_dropout = adapter.dropout
    swapped.lora_init = adapter.init
    swapped._lora_last_scale = adapter.scale
    swapped._lora_disabled = None
    swapped._lora_deferred = False
    swapped._lora_merged = None
    swapped._lora_base = adapter.base
    if adapter.base is not None:
        put_residual(swapped.weight, adapter.base)


def unswap(module: nn.Linear) -> None:
    """Give `module` its parent's class back and take away all that `swap` added, or as much of it as is there.

    A base that `swap` changed is what it was; a merged one stays as it is.
    """
    base = module.__dict__.get("_lora_base")
    if base is not None and module.__dict__.get("_lora_merged") is None:
        put_back(module.weight, base)
    for name in (*cast(LoRAModule, module).lora_parameters, *BUFFERS, *ATTRIBUTES):
        if name in module._parameters or name in module._buffers or name in module.__dict__:
            delattr(module, name)
    module.__class__ = parent_class(type(module))
