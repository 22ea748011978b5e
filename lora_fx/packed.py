"""Which weights are packed: stored in less than what their products are computed in."""

import torch
from torch import Tensor, nn


def is_activation_dtype(dtype: torch.dtype) -> bool:
    """Whether matrix products on activations are done in `dtype`: floating point of 16 bits or more."""
    return dtype.is_floating_point and dtype.itemsize >= 2


def is_packed(weight: Tensor) -> bool:
    """Whether `weight` is stored in a dtype that no product on activations is done in: quantised, as itself or inside.

    A tensor subclass may say that it is bfloat16, and hold int8 and scales. Among its parts it may name what is no
    tensor, as a distributed tensor does its mesh.
    """
    if not is_activation_dtype(weight.dtype):
        return True
    if not hasattr(weight, "__tensor_flatten__"):
        return False
    parts = (getattr(weight, name) for name in weight.__tensor_flatten__()[0])
    return any(isinstance(part, Tensor) and is_packed(part) for part in parts)


def check_not_quantised(module: nn.Module, old: Tensor, new: Tensor) -> None:
    """Raise ValueError if the weight `new` of an adapted module is packed, and `old`, which has values, is not."""
    if not is_packed(new) or old.is_meta or is_packed(old):
        return
    size = f" ({module.in_features} -> {module.out_features})" if isinstance(module, nn.Linear) else ""
    raise ValueError(
        f"this {type(module).__name__}{size} holds an adapter, and its "
        f"weight is being quantised ({type(new).__name__}): quantise first, then install. For a base that is to change "
        f"below an adapter that was trained: save_adapter, remove, quantise, load_adapter"
    )
