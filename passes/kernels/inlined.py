"""Launches of tile programs, and of sums of their parts, as Inductor's own.

Inductor writes the kernels into its code, compiles them in its processes with all others, launches them as it does its
own, plans the memory of what they write and keeps all of it in its caches. What there is to find out about a launch is
found out here, once, and not by an operator at every call: where kernels are short the GPU waits for the CPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lora_fx.passes import _torch
from lora_fx.passes.kernels import part_sums, tile_experts, tile_launch, tile_memory, tile_triton

MOST_ARGUMENTS = 100
"""Of a launch: what Inductor launches its kernels with takes 120 (torch 2.11), some of which are its own."""

_FOR_A_SUM = 5


def tile(outputs: list[Any], program: str, inputs: list[Any]) -> Any:
    """Lower ``tile_``: a launch that writes the memory of ``outputs``, where Inductor has it.

    Not where a kernel may not fit the GPU, which Inductor would find out too late: the operator finds out in time.
    """
    if len(outputs) + 3 * len(inputs) > MOST_ARGUMENTS:  # an input and its two strides
        return NotImplemented
    itemsizes = [each.get_dtype().itemsize for each in inputs]
    if (fitted := tile_memory.fitted(program, itemsizes, inputs[0].get_device())) is None:
        return NotImplemented
    given = [_torch.in_memory(each) for each in inputs]
    made = [_torch.in_memory(each) for each in outputs]
    found = tile_launch.launch(fitted, [_torch.layout(each) for each in given], [_torch.layout(each) for each in made])
    if found.rows == 0:
        return None
    read = [_torch.laid_out(each, strides) for each, strides in zip(given, found.strides, strict=True)]
    # A copy where Inductor has laid it out in another way, which is copied back.
    written = [_torch.laid_out(each, strides) for each, strides in zip(made, found.written, strict=True)]
    arguments = {**dict(zip(found.tensors, [*read, *written], strict=True)), **found.numbers}
    targets = found.tensors[len(inputs) :]
    _torch.launch(tile_triton.kernel(fitted), arguments, targets, found.grid, found.warps, found.stages)
    for output, memory in zip(outputs, written):
        if memory.get_name() != output.get_name():
            _torch.copy_into(output, memory)
    return None


def sum_parts(parts: list[Any], scales: list[Any], dtype: torch.dtype, stacked: bool = False) -> Any:
    """Lower ``sum_parts``: a launch that writes fresh memory; several of them where there are many sums."""
    most = MOST_ARGUMENTS // _FOR_A_SUM
    if len(parts) > most:
        if stacked:
            return NotImplemented
        chunks = [slice(first, first + most) for first in range(0, len(parts), most)]
        return [total for chunk in chunks for total in sum_parts(parts[chunk], scales[chunk], dtype)]
    return _sums(parts, scales, dtype, stacked)


def sum_parts_beside(room: Any, parts: list[Any], scales: list[Any], starts: list[int]) -> Any:
    """Lower ``sum_parts_beside_``: a launch that writes fresh memory and columns of ``room``."""
    if len(parts) > MOST_ARGUMENTS // _FOR_A_SUM:
        return NotImplemented
    target = _torch.in_memory(room)
    _, (pitch, step) = _torch.layout(target)
    if step != 1 or not isinstance(pitch, int):
        return NotImplemented
    (stack,) = _sums(parts, scales, room.get_dtype(), True, {"room": target}, tuple(starts), pitch)
    return stack


def _sums(
    parts: list[Any],
    scales: list[Any],
    dtype: torch.dtype,
    stacked: bool,
    beside: dict[str, Any] | None = None,
    starts: tuple[int, ...] = (),
    pitch: int = 0,
) -> list[Any]:
    given = [_torch.in_memory(part) for part in parts]
    sizes = [_torch.layout(part)[0] for part in given]
    found = part_sums.launch(sizes, tuple(scale is not None for scale in scales), stacked)
    outputs = [_torch.memory(size, dtype, parts[0].get_device()) for size in found.outputs]
    if found.blocks == 0:
        return outputs
    whole = [_torch.laid_out(part, tile_launch.contiguous(size)) for part, size in zip(given, sizes)]
    written = [*(f"out{i}" for i in range(len(outputs))), *(beside or {})]
    arguments = {**found.arguments(outputs, whole, scales), **(beside or {})}
    function = part_sums.kernel(found.scaled, found.ranks, starts, pitch)
    _torch.launch(function, arguments, written, (found.blocks,), warps=4, stages=3)
    return outputs


def sum_expert_parts(parts: Any, ends: Any, rows: int, scale: Any, dtype: torch.dtype) -> Any:
    """Lower ``sum_expert_parts``: a launch that writes fresh memory."""
    given = [_torch.in_memory(each) for each in (parts, ends)]
    (_, *sizes), (experts,) = (_torch.layout(each)[0] for each in given)
    if not isinstance(experts, int):
        return NotImplemented
    size = math.prod(sizes)
    out = _torch.memory([experts, *sizes], dtype, parts.get_device())
    whole = [_torch.laid_out(each, tile_launch.contiguous(_torch.layout(each)[0])) for each in given]
    numbers = {} if scale is None else {"scale": scale}
    arguments = {"out": out, **dict(zip(("parts", "ends"), whole)), **numbers, "SIZE": size}
    function = tile_experts.kernel(experts, rows, scale is not None)
    _torch.launch(function, arguments, ["out"], tile_experts.grid(size, experts), warps=4, stages=3)
    return out
