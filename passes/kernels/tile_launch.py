"""Compile the kernels of tile programs ahead of their first run, and run them."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import MockTensor

from lora_fx.passes.kernels.tile_program import Program, evaluate, loads, row_parts, written
from lora_fx.passes.kernels.tile_triton import kernel, name_of

log = logging.getLogger("lora_fx.passes")


class Compiler:
    """Compiles kernels in threads ahead of their first run.

    Processes of their own, each of which has to start Triton, took longer on an H200's machine with 16 cores: 10.7 s
    for a Llama-3-8B block (M 512) that takes 6.9 s with threads, and 36 s for the first block.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="lora_fx")
        self.started: dict[Hashable, Future[None]] = {}

    def start(
        self, key: Hashable, make: Callable[[], Any], arguments: list[Any], device: torch.device, **named: Any
    ) -> None:
        """Begin to compile what ``make`` gives for arguments like these, which may be fake; ``key`` names it."""
        mocks = [MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in arguments]

        def compile_one() -> None:
            with torch.cuda.device(device):
                compiled = make().warmup(*mocks, **named, grid=(1, 1))
                # What launches it is a C module of its own, which its first use builds in a third of a second.
                compiled[(1, 1, 1)]

        if key not in self.started:
            self.started[key] = self.pool.submit(compile_one)

    def wait(self, key: Hashable) -> None:
        """Let a compilation that has begun end; one that failed is tried again by whoever needs it."""
        if (future := self.started.pop(key, None)) is not None:
            future.exception()


@functools.cache
def compiler() -> Compiler:
    """The one of this process."""
    return Compiler()


def are_known(tensors: Iterable[Tensor]) -> bool:
    """Whether a kernel for tensors like these can be compiled now: there is a GPU, and no size is a symbol."""
    return torch.cuda.is_available() and all(isinstance(size, int) for t in tensors for size in t.shape)


def prepare(text: str, inputs: list[Tensor], outputs: list[Tensor], columns: list[int]) -> None:
    """Begin to compile the kernel of the program that ``text`` describes, for tensors like these, which may be fake."""
    if are_known((*inputs, *outputs)):
        arguments = _arguments(loads(text), inputs, written(loads(text), outputs, columns))
        make = functools.partial(kernel, text)
        compiler().start(text, make, arguments.positional, inputs[0].device, **arguments.named)


@dataclass(frozen=True)
class _Arguments:
    """Of a kernel: what it takes by place (tensors and numbers), and constants and options by name."""

    positional: list[Any]
    named: dict[str, Any]


def _arguments(program: Program, inputs: list[Tensor], outputs: list[Tensor]) -> _Arguments:
    tile, m = program.tile, int(program.row_count(inputs))
    tensors = [_prepared(kind, t, program) for kind, t in zip(program.inputs, inputs)]
    strides: list[int] = []
    named: dict[str, Any] = {}
    for index, (kind, t) in enumerate(zip(program.inputs, tensors)):
        if kind[0] == "full":
            named[f"stride{index}"] = t.stride(0)
        elif kind[0] in ("thin", "factor"):
            strides += t.stride() if kind[-1] != "RN" else reversed(t.stride())
    named.update(EVEN_ROWS=m % tile.rows == 0, num_warps=tile.warps, num_stages=tile.stages)
    sums: list[Any] = []
    for statement, output in zip(program.outputs, outputs):
        if statement[0] == "sum":
            # Gone when the kernel ends, so nobody else plans memory for it.
            parts = (program.column_parts, m, program.rank(statement[2]))
            sums += [output.new_empty(parts, dtype=torch.float32), output.stride(0)]
    return _Arguments([*tensors, *strides, *outputs, *sums, m], named)


def run(text: str, inputs: list[Tensor], outputs: list[Tensor], columns: list[int]) -> None:
    """Run the kernel of the program that ``text`` describes on ``inputs`` into ``outputs``.

    An output [M, N] may be the memory of an input: a tile is loaded before it is stored, and by nobody else. Kernels
    write contiguous memory, but for sums, which may be ``columns`` of a matrix (:func:`tile_program.written`); what is
    laid out in another way gets a copy.
    """
    program = loads(text)
    tile, m = program.tile, int(program.row_count(inputs))
    if not m:
        return
    compiler().wait(text)
    outputs = written(program, outputs, columns)
    targets = [
        t if t.is_contiguous() or (s[0] == "sum" and t.stride(1) == 1) else t.new_empty(t.shape)
        for s, t in zip(program.outputs, outputs)
    ]
    arguments = _arguments(program, inputs, targets)
    grid = (program.column_parts, row_parts(m, tile.rows))
    try:
        kernel(text)[grid](*arguments.positional, **arguments.named)
    except OutOfResources as error:
        _warn_once(f"{name_of(program)} does not fit this device ({error}): it runs as ATen, which is slower")
        targets = [value.view_as(t) for value, t in zip(evaluate(program, inputs), outputs)]
    for output, memory in zip(outputs, targets):
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
