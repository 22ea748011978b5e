"""Lay A behind its weight in memory, so that one product of a compiled model computes both (`lora_fx.passes.beside`).

    [ weight, N x K ][ lora_a, R x K ]        one allocation, two tensors, each with a storage of its own size

Nothing else changes: the parameters are the objects that they were, with the same values, shapes and strides, and what
is saved of one has nothing of the other in it. As long as either lives, so does the memory of both.
"""

from typing import cast

import torch
from torch import Tensor, nn

from lora_fx.linear import LoRAModule
from lora_fx.passes.kernels.beside import are_beside

_HALF = (torch.bfloat16, torch.float16)


def lay_beside(model: nn.Module, device: str = "cuda") -> None:
    """Do it for every adapted linear of `model` that is on a device of this type.

    Not for one whose weight others see in memory (it is a view, or a part of what is flattened), is no plain tensor
    (sharded, quantised), or is trained; nor where rows would not begin at multiples of 16 bytes, or there is a bias,
    which goes into a product of its own kind; nor for linears with several adapters, of which only one could lie there.
    """
    adapted = [module for module in model.modules() if isinstance(module, LoRAModule)]
    held: dict[int, set[int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor.detach()) is Tensor and tensor.device.type == device:
            held.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))
    for module in adapted:
        weight = module._parameters.get("weight")
        alone = weight is not None and len(held.get(_address(weight), ())) == 1
        module.note_beside(alone and _can_lie_beside(module) and _lay(module))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if type(tensor.detach()) is Tensor else 0


def _can_lie_beside(module: LoRAModule) -> bool:
    weight, a = module._parameters.get("weight"), module._parameters.get("lora_a")
    if type(module).forward is not LoRAModule.forward or module.bias is not None or module.stored_adapters():
        return False
    if weight is None or a is None:
        return False
    if not all(type(p) is nn.Parameter and type(p.detach()) is Tensor and not p.is_inference() for p in (weight, a)):
        return False
    sizes = (*weight.shape, a.shape[0])
    return (
        weight.device == a.device
        and weight.dtype == a.dtype
        and weight.dtype in _HALF
        and not weight.requires_grad
        and weight.is_contiguous()
        and a.is_contiguous()
        and all(size > 0 and size % 8 == 0 for size in sizes)
        and weight.untyped_storage().nbytes() == weight.numel() * weight.itemsize
    )


@torch.no_grad()
def _lay(module: LoRAModule) -> bool:
    weight, a = cast(nn.Parameter, module._parameters["weight"]), module.lora_a
    if not are_beside(weight, a):
        n = weight.shape[0]
        both = weight.new_empty(n + a.shape[0], weight.shape[1])
        both[:n].copy_(weight)
        both[n:].copy_(a)
        # Through DLPack each gets a storage that has its own values alone.
        weight.data, a.data = torch.from_dlpack(both[:n]), torch.from_dlpack(both[n:])
    return True
