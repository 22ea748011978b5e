"""The sums of the parts in which tile programs leave their outputs, several in one launch.

A program that sums over rows or columns leaves ``[P, E...]`` float32 parts. What they come to is read by the next
program, or it is a gradient that only the optimizer reads: all of those are one launch at the end of a graph. Sums that
a stack of siblings reads side by side are one launch, too, and one matrix. Parts are added in a fixed order, eight at a
time, so two runs are equal to the bit.

Tried and lost: sums by the last program of a kernel, which a counter for each tile tells. On an H100 (a Llama-3-8B
block of 512 tokens, rank 16, CUDA graphs) it was 61 kernels instead of 67 and 933 us in kernels instead of 951, but
1,027 us from end to end instead of 1,025.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_fx.passes._torch import ceil_div
from lora_fx.passes.kernels.define import define

_BLOCK = 256
"""Elements of a sum that a program takes. In a Llama-3-8B block of 512 tokens on an H100 (R 16, CUDA graphs), of 998 us
with 1024: 985; of 2048 tokens, 3559 of 3645."""
_AT_ONCE = 8


def source(scaled: tuple[bool, ...], ranks: tuple[int, ...], starts: tuple[int, ...] = (), pitch: int = 0) -> str:
    """The kernel for as many sums as ``scaled`` has entries; those that are true are multiplied by a number.

    With ``starts``, sums side by side are written once more, to the columns that begin there of a matrix whose rows are
    ``pitch`` elements apart.

    Each program of the launch sums one block of one sum: they lie one behind the other, each in an output of its own,
    or, where ``ranks`` says how many columns they have, side by side in one. It finds out which first, and all share
    what adds up: the compiler takes eight times as long for a loop in each of eleven branches.
    """
    names, choices = [], []
    for i, has_scale in enumerate(scaled):
        names += [f"out{i}", f"parts{i}", *([f"scale{i}"] if has_scale else []), f"P{i}", f"E{i}"]
        scale = f"tl.load(scale{i}).to(tl.float32)" if has_scale else "tl.full((), 1.0, tl.float32)"
        chosen = {
            "out": f"out{i}",
            "parts": f"parts{i}",
            "P": f"P{i} + no_part",
            "E": f"E{i} + no_size",
            "scale": scale,
        }
        if ranks:
            chosen |= {"rank": f"{ranks[i]} + no_part", "column": f"{sum(ranks[:i])} + no_part"}
        if starts:
            chosen["start"] = f"{starts[i]} + no_part"
        lines = [f"{name} = {value}" for name, value in chosen.items()]
        choices += lines if i == 0 else ["if pid >= last:", "    first = last", *(f"    {line}" for line in lines)]
        choices.append(f"{'    ' if i else ''}last = first + (E + {_BLOCK - 1}) // {_BLOCK}")
    loads = [
        f"v{k} = tl.load(parts + (p + {k}) * size + e, mask=there & (p + {k} + none < P), other=0.0)"
        for k in range(_AT_ONCE)
    ]
    rank = str(ranks[0]) if len(set(ranks)) == 1 else "rank"
    place = f"(e // {rank}) * {sum(ranks)} + column + e % {rank}" if ranks else "e"
    body = [
        "pid = tl.program_id(0)",
        # Zeros that make values of one type of numbers, some of which may be constants or have 64 bits.
        f"no_part = 0 * (pid + {' + '.join(f'P{i}' for i in range(len(scaled)))})",
        f"no_size = 0 * (pid + {' + '.join(f'E{i}' for i in range(len(scaled)))})",
        "first = no_size",
        *choices,
        f"e = (pid - first) * {_BLOCK} + tl.arange(0, {_BLOCK})",
        "there = e < E",
        f"total = tl.zeros(({_BLOCK},), tl.float32)",
        "size = E.to(tl.int64)",
        "none = 0 * e",  # makes a tensor of a condition that is a number in the interpreter
        f"for p in range(0, P, {_AT_ONCE}):",
        *(f"    {line}" for line in loads),
        "    total += ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))",
        f"tl.store(out + {place}, total * scale, mask=there)",
    ]
    if starts:
        names.append("room")
        again = f"room + (e // {rank}).to(tl.int64) * {pitch} + start + e % {rank}"
        body.append(f"tl.store({again}, total * scale, mask=there)")
    lines = ["@triton.jit", f"def {_name(scaled)}({', '.join(names)}):", *(f"    {line}" for line in body)]
    return "\n".join(lines) + "\n"


def _name(scaled: tuple[bool, ...]) -> str:
    return f"lora_fx_sum_{len(scaled)}_of_parts"


@functools.lru_cache(maxsize=256)
def kernel(scaled: tuple[bool, ...], ranks: tuple[int, ...] = (), starts: tuple[int, ...] = (), pitch: int = 0) -> Any:
    """The kernel of :func:`source`."""
    return define(source(scaled, ranks, starts, pitch), _name(scaled), "sums")


@dataclass(frozen=True)
class Launch:
    """A launch of the kernel on parts of certain sizes, all contiguous."""

    scaled: tuple[bool, ...]
    ranks: tuple[int, ...]
    outputs: list[list[Any]]
    """Their sizes."""
    numbers: dict[str, Any]
    """What the kernel takes beside tensors."""
    blocks: Any

    def arguments(self, outputs: list[Any], parts: list[Any], scales: list[Any]) -> dict[str, Any]:
        """All that the kernel takes, by name; one output, for sums side by side, is that of each."""
        found = dict(self.numbers)
        for i, (part, scale) in enumerate(zip(parts, scales, strict=True)):
            found |= {f"out{i}": outputs[i if len(outputs) > 1 else 0], f"parts{i}": part}
            found |= {} if scale is None else {f"scale{i}": scale}
        return found


def launch(sizes: Sequence[Sequence[Any]], scaled: tuple[bool, ...], stacked: bool) -> Launch:
    """How to launch the kernel for parts of these sizes [P, E...]; ``stacked``: [P, M, R].

    Sizes are numbers, or SymPy expressions where Inductor compiles for sizes that it does not know.
    """
    ranks = tuple(int(size[2]) for size in sizes) if stacked else ()
    outputs = [[sizes[0][1], sum(ranks)]] if stacked else [list(size[1:]) for size in sizes]
    numbers: dict[str, Any] = {}
    for i, size in enumerate(sizes):
        numbers |= {f"P{i}": size[0], f"E{i}": math.prod(size[1:])}
    blocks = sum(ceil_div(numbers[f"E{i}"], _BLOCK) for i in range(len(sizes)))
    return Launch(scaled, ranks, outputs, numbers, blocks)


def run(
    parts: list[Tensor],
    scales: list[Tensor | None],
    dtype: torch.dtype,
    stacked: bool = False,
    room: Tensor | None = None,
    starts: Sequence[int] = (),
) -> list[Tensor]:
    """``parts[i].sum(0) * scales[i]`` in ``dtype``, for parts [P, E...]; zeros where there are none, for no tokens.

    ``stacked``: for parts [P, M, R], the sums side by side in one matrix [M, sum of R], and in ``room`` as well, in the
    columns that begin at ``starts``.
    """
    found = launch([part.shape for part in parts], tuple(s is not None for s in scales), stacked)
    outputs = [parts[0].new_empty(size, dtype=dtype) for size in found.outputs]
    if found.blocks:
        arguments = found.arguments(outputs, [part.contiguous() for part in parts], scales)
        if room is not None:
            assert room.stride(1) == 1, "its columns lie apart"
            arguments["room"] = room
        pitch = 0 if room is None else room.stride(0)
        kernel(found.scaled, found.ranks, tuple(starts), pitch)[(found.blocks,)](**arguments)
    return outputs
