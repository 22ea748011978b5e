"""Lay A behind its weight in memory, so that one product of a compiled model computes both (`lora_fx.passes.beside`).

    [ weight, N x K ][ lora_a, R x K ]        two tensors, each with a storage of its own size

Nothing else changes: the parameters are the objects that they were, with the same values, shapes and strides, and what
is saved of one has nothing of the other in it. Several linears share an allocation, which lives as long as any of them:
memory comes in pieces of 2 MiB, of which an allocation for each linear would leave a part of one idle.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_fx.linear import LoRAModule
from lora_fx.passes.kernels.beside import are_beside

log = logging.getLogger("lora_fx")

_HALF = (torch.bfloat16, torch.float16)

# Bytes of an allocation, and what each linear's part of it begins at a multiple of.
CHUNK, ALIGNED = 512 << 20, 512


def lay_beside(model: nn.Module, device: str = "cuda") -> None:
    """Do it for every adapted linear of `model` that is on a device of this type. It takes 512 MiB more meanwhile, or
    what one linear takes that is larger.

    Not for one whose weight others see in memory (it is a view, or a part of what is flattened) or adapt as well, is no
    plain tensor (sharded, quantised), or is trained; nor where rows would not begin at multiples of 16 bytes, or there
    is a bias, which goes into a product of its own kind; nor for linears with several adapters, or room for others of a
    higher rank, of which only one could lie there.
    """
    adapted = [module for module in model.modules() if isinstance(module, LoRAModule)]
    chosen = [module for module in _alone(model, adapted, device) if _can_lie_beside(module)]
    moved = [module for module in chosen if not are_beside(module.weight, module.lora_a)]
    for modules in _chunks(moved):
        # DLPack is of the current device alone; and tensors that are made here must be fit for training.
        index = modules[0].weight.device.index
        with (
            torch.cuda.device(index) if device == "cuda" else nullcontext(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            try:
                _lay(modules)
            except torch.OutOfMemoryError:
                log.warning(
                    "there is no memory to lay all %d frozen weights together with their lora_a: inference is a little "
                    "slower for the rest. Compile before other memory is taken.",
                    len(moved),
                )
                break
            if device == "cuda":
                torch.cuda.empty_cache()  # what they were in before is too small for the next ones
    for module in adapted:
        module.note_beside(module in chosen and are_beside(module.weight, module.lora_a))


def _alone(model: nn.Module, adapted: list[LoRAModule], device: str) -> list[LoRAModule]:
    """Those whose weight is on the device, and is no other tensor's memory and no other linear's weight."""
    held: dict[int, set[int]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if _is_plain(tensor, device):
            held.setdefault(tensor.untyped_storage().data_ptr(), set()).add(id(tensor))
    owners = Counter(id(module._parameters.get(name)) for module in adapted for name in ("weight", "lora_a"))
    found = []
    for module in adapted:
        parts = [module._parameters.get(name) for name in ("weight", "lora_a")]
        plain = [part for part in parts if part is not None and _is_plain(part, device) and owners[id(part)] == 1]
        if len(plain) == 2 and all(len(held.get(p.untyped_storage().data_ptr(), ())) == 1 for p in plain):
            found.append(module)
    return found


def _is_plain(tensor: Tensor, device: str) -> bool:
    """Whether a tensor is a matrix in memory of its own on the device: initialised, dense, and of no subclass."""
    if is_lazy(tensor) or tensor.device.type != device or tensor.layout is not torch.strided:
        return False
    return type(tensor.detach()) is Tensor


def _can_lie_beside(module: LoRAModule) -> bool:
    weight, a = module.weight, module.lora_a
    if type(module).forward is not LoRAModule.forward or module.bias is not None or module.stored_adapters():
        return False
    if not all(type(p) is nn.Parameter and not p.is_inference() for p in (weight, a)):
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
        and a.shape[0] == module._lora_rank
        and all(part.untyped_storage().nbytes() == part.numel() * part.itemsize for part in (weight, a))
    )


def _chunks(modules: list[LoRAModule]) -> Iterator[list[LoRAModule]]:
    """Modules that share an allocation: neighbours of one device and dtype."""
    chunk: list[LoRAModule] = []
    for module in modules:
        alike = chunk and (module.weight.device, module.weight.dtype) == (chunk[0].weight.device, chunk[0].weight.dtype)
        if chunk and (not alike or sum(map(_size, chunk)) + _size(module) > CHUNK):
            yield chunk
            chunk = []
        chunk.append(module)
    if chunk:
        yield chunk


def _size(module: LoRAModule) -> int:
    """Bytes of both, up to where the next may begin."""
    size = (module.weight.numel() + module.lora_a.numel()) * module.weight.itemsize
    return -(-size // ALIGNED) * ALIGNED


def _lay(modules: list[LoRAModule]) -> None:
    like = modules[0].weight
    memory, start = like.new_empty(sum(map(_size, modules)) // like.itemsize), 0
    for module in modules:
        weight, a = cast(nn.Parameter, module.weight), module.lora_a
        n, k = weight.shape
        both = memory[start : start + (n + a.shape[0]) * k].view(-1, k)
        both[:n].copy_(weight)
        both[n:].copy_(a)
        # Through DLPack each gets a storage that has its own values alone.
        weight.data, a.data = torch.from_dlpack(both[:n]), torch.from_dlpack(both[n:])
        start += _size(module) // like.itemsize
