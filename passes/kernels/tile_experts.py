"""How the kernel of a program of experts finds its rows, and sums that are taken apart by expert again.

Rows are sorted by expert, and where each expert's rows end is known on the GPU alone. A launch has tiles enough for any
way to share out the rows; each of its programs finds out whose tile it has::

    ends    3, 3, 9 of 12 rows, tiles of 4 rows
    tiles   0: rows 0 to 2 of expert 0;   1, 2: rows 3 to 8 of expert 2;   3: rows 9 to 11, nobody's;   4, 5: no rows

So the parts of a sum over an expert's rows lie one behind the other, and are added in that order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from lora_fx.passes._torch import ceil_div
from lora_fx.passes.kernels.define import define
from lora_fx.passes.kernels.tile_arithmetic import padded
from lora_fx.passes.kernels.tile_program import Program

BLOCK = 512
"""Elements of an expert's sum that a program takes."""
_AT_ONCE = 8


def _shares(ends: str, experts: int, rows: int, last: str) -> list[str]:
    """Lines that set, for each expert and then for nobody, ``starts``, ``stops`` and ``tiles`` of ``rows`` rows, and
    ``before``, how many tiles there are before."""
    return [
        f"each = tl.arange(0, {triton.next_power_of_2(experts + 1)})",
        f"starts = tl.load({ends} + each - 1, mask=(each > 0) & (each <= {experts}), other=0)",
        f"stops = tl.load({ends} + each, mask=each < {experts}, other={last})",
        f"tiles = tl.where(each <= {experts}, (stops - starts + {rows - 1}) // {rows}, 0)",
        "before = tl.cumsum(tiles, 0) - tiles",
    ]


def owner(program: Program) -> list[str]:
    """Lines that set, for tile ``pm``, ``first`` and ``stop``, the first of its rows and the end of the rows that it
    may have; ``owned``, the end of those that are an expert's; and ``whose``, the expert."""
    experts, rows = program.experts, program.tile.rows
    if not experts:
        return []
    ends = next(f"in{i}" for i, kind in enumerate(program.inputs) if kind[0] == "ends")
    return [
        *_shares(ends, experts, rows, "M"),
        "mine = (before <= pm) & (pm < before + tiles)",  # of nothing where there are no rows
        f"first = tl.sum(tl.where(mine, starts + (pm - before) * {rows}, 0), 0)",
        "stop = tl.sum(tl.where(mine, stops, 0), 0)",
        f"owned = tl.sum(tl.where(mine & (each < {experts}), stops, 0), 0)",
        f"whose = tl.sum(tl.where(mine & (each < {experts}), each, 0), 0)",
    ]


def count(program: Program) -> str:
    """How many rows the program walks over from the first of its tile on, where it begins: none of nobody's, if nothing
    is to be stored there."""
    return "(tl.maximum(owned, first) - first)" if program.leaves_nobodys_rows else "(stop - first)"


def zeros(program: Program) -> list[str]:
    """Lines that write zeros for sums over columns in rows of nobody, where a program that walks down its rows does not
    walk. Other sums begin with them."""
    tile = program.tile
    sums = [(out, s) for out, s in enumerate(program.outputs) if s[0] == "down"]
    if not (sums and tile.walk == "rows" and program.leaves_nobodys_rows):
        return []
    lines = [
        "begin = tl.maximum(owned, first)",
        f"left = tl.maximum(tl.minimum(stop, first + {tile.rows}) - begin, 0)",
        f"for step in tl.range(0, tl.cdiv(left, {tile.step})):",
        f"    row = begin + step * {tile.step}",
    ]
    for out, statement in sums:
        rank, k = program.rank(statement[2]), f"z{out}"
        wide = padded(rank)
        pointer = f"out{out} + (pn.to(tl.int64) * M + row) * {rank} + (i[:, None] * {rank} + {k}[None, :])"
        mask = "(row + i < stop)[:, None]" + (f" & ({k}[None, :] < {rank})" if wide != rank else "")
        lines.append(f"    {k} = tl.arange(0, {wide})")
        lines.append(f"    tl.store({pointer}, tl.zeros(({tile.step}, {wide}), tl.float32), mask={mask})")
    return lines


def summed(program: Program, idle: set[int]) -> set[int]:
    """The inputs that are summed as they are in memory and read by nothing else: loaded as zeros in nobody's rows. So
    are grouped products, which have any values there.

    What a kernel computes with it keeps in registers, where it waits for the latest load. A block of the example's
    mixture on an H100 took 1.177 of the frozen block's time where zeros were chosen after the load, 1.158 so.

    ``idle``: the places of statements that are not written.
    """
    places = {place: s[1] for place, s in enumerate(program.body) if s[0] == "load"}
    others = {
        each
        for place, s in enumerate(program.body)
        if place not in idle
        for each in (s[2] if s[0] == "op" else [s[1]] if s[0] == "store" else [])
        if isinstance(each, int)
    }
    read = {places[place] for place in others if place in places}
    grouped = {place for place, kind in enumerate(program.inputs) if "grouped" in kind}
    return (set(places.values()) - read) | grouped if program.experts else set()


def source(experts: int, rows: int, scaled: bool) -> str:
    """The kernel that adds up the parts of each expert, from tiles of ``rows`` rows; a program takes a block of one."""
    loads = [
        f"v{k} = tl.load(parts + (start + p + {k}) * size + e, mask=there & (p + {k} + none < count), other=0.0)"
        for k in range(_AT_ONCE)
    ]
    body = [
        "expert = tl.program_id(1)",
        *_shares("ends", experts, rows, "0"),
        "start = tl.sum(tl.where(each == expert, before, 0), 0).to(tl.int64)",
        "count = tl.sum(tl.where(each == expert, tiles, 0), 0)",
        f"e = tl.program_id(0) * {BLOCK} + tl.arange(0, {BLOCK})",
        "there = e < SIZE",
        f"total = tl.zeros(({BLOCK},), tl.float32)",
        "size = SIZE.to(tl.int64)",
        "none = 0 * e",  # makes a tensor of a condition that is a number in the interpreter
        f"for p in range(0, count, {_AT_ONCE}):",
        *(f"    {line}" for line in loads),
        "    total += ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))",
        f"total = total{' * tl.load(scale).to(tl.float32)' if scaled else ''}",
        "tl.store(out + expert * size + e, total, mask=there)",
    ]
    names = ["out", "parts", "ends", *(["scale"] if scaled else []), "SIZE"]
    lines = ["@triton.jit", f"def {NAME}({', '.join(names)}):", *(f"    {line}" for line in body)]
    return "\n".join(lines) + "\n"


NAME = "lora_fx_sum_of_experts_parts"


@functools.lru_cache(maxsize=256)
def kernel(experts: int, rows: int, scaled: bool) -> Any:
    """The kernel of :func:`source`."""
    return define(source(experts, rows, scaled), NAME, "sums of experts")


def grid(size: Any, experts: int) -> tuple[Any, ...]:
    """Of the launch for sums of ``size`` elements each."""
    return ceil_div(size, BLOCK), experts


def run(parts: Tensor, ends: Tensor, rows: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the operator ``sum_expert_parts`` computes, on a GPU."""
    out = parts.new_empty((len(ends), *parts.shape[1:]), dtype=dtype)
    size = out[0].numel()
    numbers = {} if scale is None else {"scale": scale}
    arguments = {"out": out, "parts": parts.contiguous(), "ends": ends.contiguous(), **numbers, "SIZE": size}
    kernel(len(ends), rows, scale is not None)[grid(size, len(ends))](**arguments)
    return out
