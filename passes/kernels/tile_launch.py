"""Have the kernels of tile programs compiled ahead of their first run, and run them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lora_fx.passes.kernels.jit import compiler
from lora_fx.passes.kernels.relaunch import Launches, described
from lora_fx.passes.kernels.tile_names import name_of_all
from lora_fx.passes.kernels.tile_program import Program, evaluate, split
from lora_fx.passes.kernels.tile_triton import kernel

log = logging.getLogger("lora_fx.passes")

_launches = Launches()


def are_known(tensors: Iterable[Tensor]) -> bool:
    """Whether a kernel for tensors like these can be compiled now: there is a GPU, and no size is a symbol."""
    return torch.cuda.is_available() and all(isinstance(size, int) for t in tensors for size in t.shape)


def prepare(text: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Begin to compile the kernel of the program that ``text`` describes, for tensors like these, which may be fake."""
    if are_known((*inputs, *outputs)):
        arguments = _all_arguments(split(text, inputs, outputs))
        make = functools.partial(kernel, text)
        compiler().start(text, make, arguments.positional, inputs[0].device, **arguments.named)


@dataclass(frozen=True)
class _Arguments:
    """Of a kernel: what it takes by place (tensors and numbers), and constants and options by name."""

    inputs: list[Tensor]
    strides: list[int]
    outputs: list[Tensor]
    rows: int
    named: dict[str, Any]

    @property
    def positional(self) -> list[Any]:
        return [*self.inputs, *self.strides, *self.outputs, self.rows]


def _all_arguments(programs: list[tuple[Any, ...]]) -> _Arguments:
    """Of programs with their inputs and outputs that share a launch, in the order of the kernel's names."""
    if len(programs) == 1:
        return _arguments(*programs[0])
    inputs, strides, outputs, named = [], [], [], {}
    for k, each in enumerate(programs):
        found = _arguments(*each)
        inputs += found.inputs
        strides += found.strides
        outputs += found.outputs
        options = ("num_warps", "num_stages")
        named.update({name if name in options else f"p{k}_{name}": value for name, value in found.named.items()})
    return _Arguments(inputs, strides, outputs, found.rows, named)


def _arguments(program: Program, inputs: list[Tensor], outputs: list[Tensor]) -> _Arguments:
    tile, m = program.tile, int(program.row_count(inputs))
    stacked = {i for s in program.body if s[0] in ("down", "product") and isinstance(s[2], list) for i in s[2]}
    tensors = [
        t.contiguous() if i in stacked else _prepared(kind, t, program)
        for i, (kind, t) in enumerate(zip(program.inputs, inputs))
    ]
    strides: list[int] = []
    named: dict[str, Any] = {}
    for index, (kind, t) in enumerate(zip(program.inputs, tensors)):
        if kind[0] == "full":
            named[f"stride{index}"] = t.stride(0)
        elif kind[0] in ("thin", "factor"):
            strides += t.stride() if kind[-1] != "RN" else reversed(t.stride())
    named.update(EVEN_ROWS=m % tile.rows == 0, num_warps=tile.warps, num_stages=tile.stages)
    return _Arguments(tensors, strides, outputs, m, named)


def _grid(programs: list[Program], m: int) -> tuple[int, ...]:
    """Columns and rows of tiles; where programs share a launch, the tiles of one behind those of the other."""
    sizes = [(-(-p.columns // p.tile.columns), -(-m // p.tile.rows)) for p in programs]
    return sizes[0] if len(sizes) == 1 else (sum(wide * high for wide, high in sizes),)


def run(text: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    """Run the kernel of the program that ``text`` describes on ``inputs`` into ``outputs``.

    An output [M, N] may be the memory of an input: a tile is loaded before it is stored, and by nobody else. Kernels
    write contiguous memory; what is laid out in another way gets a copy.
    """
    key = text, described([*inputs, *outputs])
    if (launch := _launches.find(key)) is not None:
        launch([*inputs, *outputs])
        return
    written = [t if t.is_contiguous() else t.new_empty(t.shape) for t in outputs]
    programs = split(text, inputs, written)
    arguments = _all_arguments(programs)
    if not arguments.rows:
        return
    compiler().wait(text)
    grid = _grid([program for program, *_ in programs], arguments.rows)
    function = kernel(text)
    try:
        compiled = function[grid](*arguments.positional, **arguments.named)
        _launches.keep(key, function, compiled, grid, arguments.positional, arguments.named, [*inputs, *outputs])
    except OutOfResources as error:
        name = name_of_all([program for program, *_ in programs])
        _warn_once(f"{name} does not fit this device ({error}): it runs as ATen, which is slower")
        values = [value for program, given, _ in programs for value in evaluate(program, given)]
        written = [value.view_as(t) for value, t in zip(values, outputs)]
    for output, memory in zip(outputs, written):
        if memory is not output:
            output.copy_(memory)


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    log.warning("%s. Please report this.", message)


def _prepared(kind: list[Any], tensor: Tensor, program: Program) -> Tensor:
    """The tensor as the kernel indexes it: a value as a matrix whose rows are contiguous, rows and columns as such.

    Where a value is summed over rows and over columns, the factor of the one and the thin matrix of the other must be
    laid out in the same order: Triton 3.6 gets the second sum wrong for other pairs (on Hopper, 64 x 64 tiles,
    four warps). Here the rank is what is contiguous in both, which it is in a gradient pair as models have it.
    """
    if kind[0] == "parts":
        return tensor.contiguous()
    if kind[0] == "full":
        matrix = tensor.reshape(-1, program.columns)
        return matrix if matrix.stride(1) == 1 else matrix.contiguous()
    if kind[0] in ("thin", "factor") and program.sums_both_ways:
        turned = kind[-1] == "RN"
        matrix = tensor.t().contiguous() if turned else tensor
        if kind[1] == 1:
            matrix = matrix.reshape(-1).contiguous().unsqueeze(1)  # strides of 1 and 1, whatever they were
        return matrix.t() if turned else matrix
    return tensor.contiguous() if kind[0] in ("row", "column") else tensor
