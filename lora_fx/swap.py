"""Making adapters, and the swap of a linear's class that brings the first one in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from lora_fx.adapted import BUFFERS, parent_class
from lora_fx.config import CHANGES_BASE
from lora_fx.inits import ChangedBase, decomposed, put_back, put_residual, reset_factors
from lora_fx.linear import ATTRIBUTES, DEFAULT_NAME, LoRAModule, lora_class
from lora_fx.passes.kernels.wide import room_of
from lora_fx.placements import like_weight, replicated_like
from lora_fx.stored import ENABLED, SCALE, StoredAdapter


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
        kind: what the class of the swapped linear derives from beside its parent.
        others: the parameters that this kind has beside `lora_a` and `lora_b`, by name.
        base: what the weight is, where `init` puts a residual in its place.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    dropout: float
    init: str
    rank: int
    kind: type[LoRAModule]
    others: Mapping[str, nn.Parameter] = field(default_factory=dict)
    base: ChangedBase | None = None


def new_adapter(
    module: nn.Linear, *, rank: int, scale: float, dropout: float, init: str, dtype: torch.dtype, room: int
) -> Adapter:
    """An adapter for `module`, initialised, on its weight's device and mesh; `module` is not touched.

    The shapes follow `in_features` and `out_features`, because a packed weight has a shape of its own. `room` is the
    size R of the factors, at least `rank`.
    """
    weight = getattr(module, "weight", None)
    device = weight.device if isinstance(weight, Tensor) else next(iter(module.parameters())).device
    base = None
    if init in CHANGES_BASE:
        assert isinstance(weight, Tensor)
        base = decomposed(weight, init, rank, scale, dtype)
        # Copies: the first factors are kept, and training changes the others.
        factors = base.lora_a.clone(), base.lora_b.clone()
    else:
        a = torch.empty(room, module.in_features, dtype=dtype, device=device)
        b = torch.zeros(module.out_features, room, dtype=dtype, device=device)
        reset_factors(a, b, init, rank)
        factors = like_weight("lora_a", a, weight), like_weight("lora_b", b, weight)
    lora_a, lora_b = map(nn.Parameter, factors)
    return Adapter(lora_a, lora_b, scale, dropout, init, rank, LoRAModule, base=base)


def swap(module: nn.Linear, adapter: Adapter, name: str = DEFAULT_NAME) -> None:
    """Make `module` a `LoRA<Parent>` that holds `adapter` under a name. Undone by `unswap`."""
    module.__class__ = lora_class(type(module), adapter.kind)
    swapped = cast(LoRAModule, module)
    hold(swapped, adapter, getattr(module, "weight", None))
    for other, parameter in adapter.others.items():
        swapped.register_parameter(other, parameter)
    enabled = torch.ones((), dtype=torch.float32, device=adapter.lora_a.device)
    swapped.register_buffer(ENABLED, replicated_like(enabled, getattr(module, "weight", None)), persistent=False)
    module.__dict__["lora_adapters"] = nn.ModuleDict()  # past `nn.Module`, which would make a child of it
    swapped._lora_active = name
    swapped._lora_disabled = None
    swapped._lora_merged = None
    swapped._lora_rows = None
    swapped._lora_stack = None
    swapped._lora_base = adapter.base
    if adapter.base is not None:
        put_residual(swapped.weight, adapter.base)


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
    """Give `module` its parent's class back and take away all that `swap` added, or as much of it as is there.

    A base that `swap` changed is what it was; a merged one stays as it is.
    """
    base = module.__dict__.get("_lora_base")
    if base is not None and module.__dict__.get("_lora_merged") is None:
        put_back(module.weight, base)
    if room_of(module._parameters.get("weight")):
        module.weight.data = module.weight.data.contiguous()  # nobody needs the room any more
    for name in (*cast(LoRAModule, module).lora_parameters, *BUFFERS, *ATTRIBUTES):
        if name in module._parameters or name in module._buffers or name in module.__dict__:
            delattr(module, name)
    module.__class__ = cast(type[nn.Linear], parent_class(type(module)))
