"""Where the rows of a value lie in memory, of those that kernels of tile programs read and write where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_fx.passes.kernels.tile_program import Program

Sizes = Sequence[Any]
"""Sizes or strides: numbers, or SymPy expressions where Inductor compiles for sizes that it does not know."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of a value lie: ``stride`` elements apart, or in blocks of ``along`` rows, themselves ``apart``.

    ``along`` is 0 where there is one block. Rows that lie in the order [T, B] and are walked over in the order [B, T],
    as with what Inductor pipelines with a gather along T, are blocks of T.
    """

    stride: int
    along: int = 0
    apart: int = 0


def rows_of(program: Program, sizes: Sizes, strides: Sizes) -> Rows | None:
    """Where the rows of a value [..., N] lie, or None where they do not lie in a way that the program's kernel takes.

    A step of its walk has rows of one block, at most 2^31 elements apart.
    """
    if sizes[-1] != 1 and strides[-1] != 1:
        return None
    # Of neighbouring dimensions those that lie in a row are one; the last comes first.
    groups: list[list[Any]] = []
    for size, stride in reversed(list(zip(sizes[:-1], strides[:-1]))):
        if size == 1:
            continue
        if groups and stride == groups[-1][0] * groups[-1][1]:
            groups[-1][0] *= size
        else:
            groups.append([size, stride])
    if not all(isinstance(stride, int) for _, stride in groups):
        return None
    if len(groups) < 2:
        return Rows(groups[0][1] if groups else sizes[-1]) if isinstance(sizes[-1], int) else None
    (along, stride), (_, apart) = groups[:2]
    step = program.tile.step if program.tile.walk == "rows" else program.tile.rows
    whole = isinstance(along, int) and along % step == 0 and not program.experts
    near = step * stride < 2**31  # places within a step are numbers of 32 bits
    return Rows(stride, along, apart) if whole and near and len(groups) == 2 else None
