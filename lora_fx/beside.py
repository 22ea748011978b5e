"""Lay factors and weights together in memory, so that one product of a compiled model computes with both.

    [ weight, N x K ][ lora_a, R x K ]      two tensors, each with a storage of its own size (`lora_fx.passes.beside`)

    [ weight, row 0 | room for R ]          of ranks above 64, where N > K and the scale is a power of two: B is
    [ weight, row 1 | room for R ] ...      copied there on every use (`lora_fx.passes.widen`); or on the left

Nothing else changes: the parameters are the objects that they were, with the same values and shapes, and what is saved
of one has nothing of the other in it. Only the rows of a weight with room lie further apart than they are long. State
dicts have copies of those, without gaps; a tensor that is pickled with its gaps has what is in the room. Several
linears share an allocation, which lives as long as any of them: memory comes in pieces of 2 MiB, of which an allocation
for each linear would leave a part of one idle. In it the next linear begins where one ends, so that those that read one
x can be one product as well (`lora_fx.passes.sibling_gradients`).
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lora_fx.linear import LoRAModule
from lora_fx.passes.kernels.beside import are_beside
from lora_fx.passes.kernels.wide import LEFT, RIGHT, is_exact, is_wide, note_room, room_of

log = logging.getLogger("lora_fx")

_HALF = (torch.bfloat16, torch.float16)

# Bytes of an allocation. Each linear's part of it begins at a multiple of 128, as all sizes are multiples of 8.
CHUNK = 512 << 20


def lay_beside(model: nn.Module, device: str = "cuda") -> None:
    """Do it for every adapted linear of `model` that is on a device of this type. It takes 512 MiB more meanwhile, or
    what one linear takes that is larger.

    Not for one whose weight others see in memory (it is a view, or a part of what is flattened) or adapt as well, is no
    plain tensor (sharded, quantised), or is trained; nor where rows would not begin at multiples of 16 bytes, or there
    is a bias, which goes into a product of its own kind; nor for linears with several adapters, or room for others of a
    higher rank, of which only one could lie there.
    """
    adapted = [module for module in model.modules() if isinstance(module, LoRAModule)]
    alone = _alone(model, adapted, device)
    moved = [module for module in alone if not _lies(module) and _can_be_laid(module)]
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    sides = _sides(model, moved, parents)
    for modules in _chunks(moved, sides, parents):
        # DLPack is of the current device alone; and tensors that are made here must be fit for training.
        index = modules[0].weight.device.index
        with (
            torch.cuda.device(index) if device == "cuda" else nullcontext(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            try:
                _lay(modules, sides)
            except torch.OutOfMemoryError:
                log.warning(
                    "there is no memory to lay all %d frozen weights together with their factors: the rest stays where "
                    "it is, which is a little slower. Compile before other memory is taken.",
                    len(moved),
                )
                break
            if device == "cuda":
                torch.cuda.empty_cache()  # what they were in before is too small for the next ones
    for module in adapted:
        beside = module in alone and are_beside(module.weight, module.lora_a)
        module.note_memory(beside, _room(module))


def _lies(module: LoRAModule) -> bool:
    """Whether it was done before."""
    return are_beside(module.weight, module.lora_a) or bool(_room(module))


def _room(module: LoRAModule) -> str:
    """On which side the weight has room for B."""
    weight, b = module._parameters.get("weight"), module._parameters.get("lora_b")
    side = room_of(weight)
    return side if side and b is not None and module.weight.stride(0) == module.weight.shape[1] + b.shape[1] else ""


def _sides(model: nn.Module, modules: list[LoRAModule], parents: dict[nn.Module, nn.Module]) -> dict[LoRAModule, str]:
    """Where weights get room: neighbours that may read one x, as gate and up do, on one side and on the other.

    For training alone: with few tokens A behind its weight is worth more. Not for a weight that others have as well,
    whose state dicts would show gaps, nor with several ranks: FSDP takes no gaps.
    """
    ranks = torch.distributed
    if ranks.is_available() and ranks.is_initialized() and ranks.get_world_size() > 1:
        return {}
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    before: Counter[nn.Module | None] = Counter()
    found = {}
    for module in modules:
        trained = module.training and module.lora_b.requires_grad
        fits = is_wide(module.weight, module.lora_a.shape[0]) and is_exact(module._lora_last_scale)
        if fits and trained and holders[id(module.weight)] == 1:
            parent = parents.get(module)
            found[module] = LEFT if before[parent] % 2 else RIGHT
            before[parent] += 1
    return found


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


def _can_be_laid(module: LoRAModule) -> bool:
    weight, a, b = module.weight, module.lora_a, module.lora_b
    if type(module).forward is not LoRAModule.forward or module.bias is not None or module.stored_adapters():
        return False
    if not all(type(p) is nn.Parameter and not p.is_inference() for p in (weight, a, b)):
        return False
    sizes = (*weight.shape, a.shape[0])
    return (
        weight.device == a.device == b.device
        and weight.dtype == a.dtype == b.dtype
        and weight.dtype in _HALF
        and not weight.requires_grad
        and weight.is_contiguous()
        and a.is_contiguous()
        and all(size > 0 and size % 8 == 0 for size in sizes)
        and a.shape[0] == module._lora_rank
        and all(part.untyped_storage().nbytes() == part.numel() * part.itemsize for part in (weight, a))
    )


def _chunks(
    modules: list[LoRAModule], sides: dict[LoRAModule, str], parents: dict[nn.Module, nn.Module]
) -> Iterator[list[LoRAModule]]:
    """Modules that share an allocation, of one device and dtype.

    Those that may read one x, as q, k and v or gate and up do, follow one another, and share one if they fit into it.
    """

    def kind(module: LoRAModule) -> Any:
        return module.weight.device, module.weight.dtype

    def size(*some: LoRAModule) -> int:
        return sum(_size(module, sides) for module in some)

    families: dict[Any, list[LoRAModule]] = {}
    for module in modules:
        families.setdefault((kind(module), parents.get(module), module.weight.shape[1]), []).append(module)
    chunk: list[LoRAModule] = []
    for siblings in families.values():
        for some in [siblings] if size(*siblings) <= CHUNK else [[module] for module in siblings]:
            if chunk and (kind(chunk[0]) != kind(some[0]) or size(*chunk, *some) > CHUNK):
                yield chunk
                chunk = []
            chunk = [*chunk, *some]
    if chunk:
        yield chunk


def _size(module: LoRAModule, sides: dict[LoRAModule, str]) -> int:
    """Bytes of both."""
    n, k = module.weight.shape
    rank = module.lora_a.shape[0]
    return int((n * (k + rank) if module in sides else (n + rank) * k) * module.weight.itemsize)


def _lay(modules: list[LoRAModule], sides: dict[LoRAModule, str]) -> None:
    like = modules[0].weight
    memory, start = like.new_empty(sum(_size(each, sides) for each in modules) // like.itemsize), 0
    for module in modules:
        weight, a = cast(nn.Parameter, module.weight), module.lora_a
        (n, k), rank, side = weight.shape, a.shape[0], sides.get(module)
        # Through DLPack each gets a storage that has its own values alone.
        if side is not None:
            rows = memory[start : start + n * (k + rank)].zero_().view(n, k + rank)
            rows = rows[:, rank:] if side == LEFT else rows[:, :k]
            rows.copy_(weight)
            weight.data = torch.from_dlpack(rows)
            note_room(weight, side, rank)
        else:
            both = memory[start : start + (n + rank) * k].view(-1, k)
            both[:n].copy_(weight)
            both[n:].copy_(a)
            weight.data, a.data = torch.from_dlpack(both[:n]), torch.from_dlpack(both[n:])
        start += _size(module, sides) // like.itemsize
