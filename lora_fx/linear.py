"""The swapped linear: what a LoRA module is, and the cached subclass that makes one out of any `nn.Linear` subclass.

    module.__class__ = lora_class(type(module))      # Float8Linear -> LoRAFloat8Linear, and isinstance still holds
    module.forward(x) = Parent.forward(x) + scale * enabled * (dropout(x) A^T) B^T

What it shares with swapped experts is in `lora_fx.adapted`.
"""

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lora_fx.adapted import BUFFERS, ENABLED, SCALE, Adapted, parent_class, swapped_class, values
from lora_fx.passes.low_rank import low_rank
from lora_fx.placements import deferred, fill, is_dtensor, like_weight, placed, replicated_like

# Everything that the swap adds to a module, in the order in which it is added.
PARAMETERS = ("lora_a", "lora_b")
ATTRIBUTES = ("lora_dropout", "lora_init", "_lora_last_scale", "_lora_disabled", "_lora_deferred", "_lora_merged")


@dataclass(frozen=True)
class Adapter:
    """What the swap of one linear adds to it.

    Args:
        lora_a: [R, K].
        lora_b: [N, R].
        scale: multiplies the low-rank product.
        dropout: probability of dropping an input element of the low-rank branch in training.
        init: how `lora_a` starts, a name that `LoRAConfig.init` knows.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    dropout: float
    init: str


class LoRAModule(Adapted, nn.Linear):
    """The half of a swapped linear that is not its parent: every `LoRA<Parent>` derives from this and from Parent.

    Parameters:
        lora_a: [R, K], trainable.
        lora_b: [N, R], trainable, zero at first.

    Buffers, 0-d: `lora_scale` and `lora_enabled`, see `Adapted`.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter

    # The parameter is called `input` because `nn.Linear.forward`'s is, and callers may name it.
    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the dtype of the parent's output."""
        base = super().forward(input)
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

    @property
    def factor_names(self) -> tuple[str, ...]:
        return PARAMETERS

    def reset_factors(self) -> None:
        reset_a(self.lora_a, self.lora_init)
        self.lora_b.zero_()

    def reset_parameters(self) -> None:
        """The parent's `reset_parameters`, then `reset_adapters`."""
        super().reset_parameters()
        self.reset_adapters()

    def extra_repr(self) -> str:
        scale = values(self.lora_scale)
        shown = self._lora_last_scale if scale is None else scale
        ours = f"rank={self.lora_a.shape[0]}, scale={shown:g}, dropout={self.lora_dropout:g}"
        return ", ".join(filter(None, (super().extra_repr(), ours)))


def lora_class(parent: type[nn.Linear]) -> type[LoRAModule]:
    """The subclass ``LoRA<Parent>`` of `parent`: always the same class for the same parent.

    Raises:
        TypeError: `parent` is no subclass of `nn.Linear`, or is a swapped class already.
    """
    if not issubclass(parent, nn.Linear) or issubclass(parent, LoRAModule):
        raise TypeError(f"{parent.__name__} must be nn.Linear or a subclass that is not swapped yet")
    return swapped_class(LoRAModule, parent)


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
    a = torch.empty(rank, module.in_features, dtype=dtype, device=device)
    reset_a(a, init)
    b = torch.zeros(module.out_features, rank, dtype=dtype, device=device)
    a, b = like_weight("lora_a", a, weight), like_weight("lora_b", b, weight)
    return Adapter(nn.Parameter(a), nn.Parameter(b), scale, dropout, init)


@torch.no_grad()
def reset_a(lora_a: Tensor, init: str) -> None:
    """Start A [..., R, K] as `init` says: kaiming-uniform as `nn.Linear`'s weight, or normal with deviation 1 / R.

    A distributed A is drawn whole on every rank and cut from the first one's: the draw is that of a single process,
    and replicas agree on devices where distributed random numbers do not.
    """
    whole = lora_a
    if is_dtensor(lora_a):
        whole = torch.empty(lora_a.shape, dtype=lora_a.dtype, device=lora_a.device)
    if init == "kaiming":
        nn.init.kaiming_uniform_(whole.flatten(0, -2), a=math.sqrt(5))
    else:
        nn.init.normal_(whole, std=1.0 / lora_a.shape[-2])
    if whole is not lora_a:
        fill(lora_a, whole)


def swap(module: nn.Linear, adapter: Adapter) -> None:
    """Make `module` a `LoRA<Parent>` that holds `adapter`. Undone by `unswap`."""
    module.__class__ = lora_class(type(module))
    swapped = cast(LoRAModule, module)
    device, weight = adapter.lora_a.device, getattr(module, "weight", None)
    swapped.register_parameter("lora_a", adapter.lora_a)
    swapped.register_parameter("lora_b", adapter.lora_b)
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


def unswap(module: nn.Linear) -> None:
    """Give `module` its parent's class back and take away all that `swap` added, or as much of it as is there."""
    for name in (*PARAMETERS, *BUFFERS, *ATTRIBUTES):
        if name in module._parameters or name in module._buffers or name in module.__dict__:
            delattr(module, name)
    module.__class__ = cast(type[nn.Linear], parent_class(type(module)))
