"""With what the kernel of a tile program is launched, and the launch where nothing is compiled.

Inside compiled graphs :mod:`lora_fx.passes.kernels.inlined` makes these launches Inductor's own; :func:`run` is what an
operator does that is called by itself.

Tried and lost: programmatic dependent launches, which begin while the kernel before ends and wait for it with
``griddepcontrol.wait`` (a Llama-3-8B block on an H200, Triton 3.6, CUDA graphs, rounds in turn): 8192 tokens 1.000 of
the time, 2048 tokens 0.998, decode of 64 tokens 1.007; with the next kernel let go at once 0.996 and 1.003.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lora_fx.passes._torch import ceil_div
from lora_fx.passes.kernels.tile_names import Names, name_of_all
from lora_fx.passes.kernels.tile_program import Program, Statement, evaluate, split
from lora_fx.passes.kernels.tile_rows import Sizes, rows_of
from lora_fx.passes.kernels.tile_triton import kernel

log = logging.getLogger("lora_fx.passes")

Layout = tuple[Sizes, Sizes]
"""Sizes and strides of a tensor."""


_SMALL = ("thin", "factor")
"""Inputs whose two strides are arguments."""


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel on inputs, and into outputs, of certain sizes and strides."""

    strides: list[Sizes]
    """Those that the inputs must have."""
    written: list[Sizes]
    """Those that the outputs must have."""
    tensors: list[str]
    """What the kernel calls the inputs, and then the outputs."""
    numbers: dict[str, Any]
    """Every other argument."""
    grid: tuple[Any, ...]
    warps: int
    stages: int
    rows: Any
    """M."""


def launch(text: str, inputs: list[Layout], outputs: list[Layout]) -> Launch:
    """How to launch the programs of ``text`` on inputs, and into outputs, of these sizes and strides."""
    programs = split(text, inputs, outputs)
    joint = len(programs) > 1
    names = [Names(program, f"p{k}_" if joint else "") for k, (program, *_) in enumerate(programs)]
    strides: list[Sizes] = []
    written: list[Sizes] = []
    numbers: dict[str, Any] = {}
    for each, (program, given, made) in zip(names, programs):
        m = _rows(program, given)
        wanted = [_strides(program, i, *layout) for i, layout in enumerate(given)]
        strides += wanted
        kinds = list(zip(program.inputs, wanted, given))
        small = [found[:-3:-1] if "RN" in kind else found[-2:] for kind, found, _ in kinds if kind[0] in _SMALL]
        numbers.update(zip(each.strides, (stride for found in small for stride in found), strict=True))
        values = [(sizes, found) for kind, found, (sizes, _) in kinds if kind[0] == "full"]
        memory = [_written(program, statement, *layout) for statement, layout in zip(program.outputs, made)]
        written += memory
        stored = zip(program.outputs, memory, made)
        values += [(sizes, found) for statement, found, (sizes, _) in stored if statement[0] == "store"]
        rows: list[Any] = [rows_of(program, sizes, found) for sizes, found in values]
        even = isinstance(m, int) and m % program.tile.rows == 0 and not program.experts
        constants = [number for each_of in rows for number in (each_of.stride, each_of.along, each_of.apart)]
        numbers.update(zip(each.constants, (*constants, even), strict=True))
    numbers["M"] = m
    tensors = [name for each in names for name in each.inputs] + [name for each in names for name in each.outputs]
    tile = programs[-1][0].tile
    grid = _grid([program for program, *_ in programs], m)
    return Launch(strides, written, tensors, numbers, grid, tile.warps, tile.stages, m)


def _grid(programs: list[Program], m: Any) -> tuple[Any, ...]:
    """Columns and rows of tiles; where programs share a launch, the tiles of one behind those of the other."""
    sizes = [(ceil_div(p.columns, p.tile.columns), p.row_parts(m)) for p in programs]
    return sizes[0] if len(sizes) == 1 else (sum(wide * high for wide, high in sizes),)


def layouts(tensors: list[Tensor]) -> list[Layout]:
    """Those of tensors."""
    return [(tensor.shape, tensor.stride()) for tensor in tensors]


def run(text: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Run the kernel of the program that ``text`` describes on ``inputs`` into ``outputs``.

    Where that does not fit the device, it runs as ATen, and the log says so.
    """
    try:
        run_kernel(text, inputs, outputs)
    except OutOfResources as error:
        programs = split(text, inputs)
        name = name_of_all([program for program, *_ in programs])
        _warn_once(f"{name} does not fit this device ({error}): it runs as ATen, which is slower")
        values = [value for program, given in programs for value in evaluate(program, given)]
        for output, value in zip(outputs, values, strict=True):
            output.copy_(value.view_as(output))


def run_kernel(text: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Run the kernel of the program that ``text`` describes on ``inputs`` into ``outputs``.

    An output [M, N] may be the memory of an input of its program: a tile is loaded before it is stored, and by nobody
    else (:mod:`lora_fx.passes.tile_outputs`). What is laid out in a way that kernels do not write gets a copy.

    Raises:
        OutOfResources: it does not fit the device.
    """
    found = launch(text, layouts(inputs), layouts(outputs))
    if not found.rows:
        return
    written = [t if lies_in(t, strides) else t.new_empty(t.shape) for t, strides in zip(outputs, found.written)]
    tensors = [*(laid_out(t, strides) for t, strides in zip(inputs, found.strides)), *written]
    arguments = {**dict(zip(found.tensors, tensors, strict=True)), **found.numbers}
    kernel(text)[found.grid](**arguments, num_warps=found.warps, num_stages=found.stages)
    for output, memory in zip(outputs, written):
        if memory is not output:
            output.copy_(memory)


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    log.warning("%s. Please report this.", message)


def lies_in(tensor: Tensor, strides: Sizes) -> bool:
    """Whether a tensor has these strides, where they matter."""
    return all(size == 1 or one == other for size, one, other in zip(tensor.shape, tensor.stride(), strides))


def laid_out(tensor: Tensor, strides: Sizes) -> Tensor:
    """The tensor, or a copy where its strides are others."""
    if lies_in(tensor, strides):
        return tensor
    return torch.empty_strided(tensor.shape, list(strides), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def contiguous(sizes: Sizes) -> list[Any]:
    """The strides of memory without gaps, in the order of the dimensions."""
    return [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]


def _rows(program: Program, layouts: list[Layout]) -> Any:
    """M, as the inputs have it."""
    for kind, (sizes, _) in zip(program.inputs, layouts):
        if kind[0] == "full":
            return math.prod(sizes[:-1])
        if kind[0] in ("thin", "parts"):
            return sizes[-2]
    raise AssertionError("a program reads something that has rows")


def _written(program: Program, statement: Statement, sizes: Sizes, strides: Sizes) -> Sizes:
    """The strides that an output is to have: its own, or without gaps."""
    takes = statement[0] == "store" and rows_of(program, sizes, strides) is not None
    return strides if takes else contiguous(sizes)


def _strides(program: Program, index: int, sizes: Sizes, strides: Sizes) -> Sizes:
    """Those that a kernel needs an input to have: values have contiguous rows, rows and columns are contiguous.

    Where a value is summed over rows and over columns, the factor of the one and the thin matrix of the other must be
    laid out in the same order: Triton 3.6 gets the second sum wrong for other pairs (on Hopper, 64 x 64 tiles,
    four warps). Here the rank is what is contiguous in both, which it is in a gradient pair as models have it.
    """
    kind, dense = program.inputs[index], contiguous(sizes)
    if kind[0] == "factor" and len(sizes) == 3:
        order_alike = program.sums_both_ways and kind[2] == "RN"
        return [math.prod(sizes[1:]), 1, sizes[1]] if order_alike else dense
    if kind[0] in ("number", "seed"):
        return strides
    if kind[0] == "full":
        return strides if rows_of(program, sizes, strides) is not None else dense
    if kind[0] not in _SMALL or index in _stacked(program):
        return dense
    if program.sums_both_ways:
        if kind[1] == 1:
            return [1, 1]
        if kind[-1] == "RN":
            return strides if strides[0] == 1 else [1, sizes[0]]
        return strides if strides[1] == 1 else dense
    return strides


def _stacked(program: Program) -> set[int]:
    """The inputs that are factors side by side."""
    return {i for s in program.body if s[0] in ("down", "product") and isinstance(s[2], list) for i in s[2]}
