"""AdamW whose step over sharded adapters takes the CPU as long as one over plain tensors."""

from typing import Any

import torch

from lora_fx import _torch
from lora_fx.placements import is_dtensor, local_parts


class ShardedAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` that updates this rank's shards as the plain tensors that they are.

    AdamW works element by element, so shards need no word of one another. Torch's own asks for every DTensor, in every
    step, where the result of each operation is to be; a Llama has hundreds of factors, and a GPU that has done its
    backward pass waits for the CPU. Parameters, gradients and state stay DTensors for everybody else (checkpoints,
    clipping), the numbers are the same, and ``fused=True`` takes DTensors beside plain tensors, which torch's own does
    not.

    It takes what `torch.optim.AdamW` takes, but for ``differentiable=True``. Gradients that are placed in another way
    than their parameter are redistributed first, as torch's own does; `DeferredReduction` and `clip_grad_norm` leave
    none.

    Raises:
        ImportError: this release of torch has no `Adam._init_group`, by which the parameters of a group are collected
            (checked on torch 2.11 and 2.13).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _torch.check_collects_by_group(torch.optim.AdamW)
        super().__init__(*args, **kwargs)

    def _init_group(self, group: dict[str, Any], parameters: list[Any], gradients: list[Any], *others: Any) -> bool:
        has_complex: bool = super()._init_group(group, parameters, gradients, *others)
        gradients[:] = [_placed_as(parameter, g) for parameter, g in zip(parameters, gradients, strict=True)]
        for tensors in (parameters, gradients, *others):
            tensors[:] = _local_parts(tensors)
        return has_complex


def _placed_as(parameter: Any, gradient: Any) -> Any:
    """The gradient on the placements of its parameter."""
    if not is_dtensor(gradient) or gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(placements=parameter.placements)


# Without gradients `to_local` is an attribute; with them, a node for each tensor.
_local_parts = torch.no_grad()(local_parts)
