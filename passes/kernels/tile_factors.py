"""Sums over rows of a matrix times rows and columns, as a sum of the matrix alone.

dA of a linear behind a norm, ``((x * rstd) * weight)^T g``, is ``(x^T (rstd * g)) * weight``: the tensor cores take
``x`` as it is in memory, nothing is computed for each of its elements, and Triton (3.6) keeps a pipeline of it in
shared memory. What it computes with first it keeps in registers, and moves along at every step, which waits for the
latest load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_fx.passes.kernels.tile_program import OUTPUTS, Program, Statement

DTYPES = ("bfloat16",)
"""Of the programs in which it is looked for: see :func:`factored`."""


@dataclass(frozen=True)
class Factored:
    """A value that is a matrix in memory times rows [M, 1] and columns [N]."""

    matrix: int
    """Its place in the program."""
    rows: list[int]
    """Inputs."""
    columns: list[int]
    """Inputs."""


def factored(program: Program, output: Statement) -> Factored | None:
    """The value that ``output`` sums over rows, in that form; None if it is no such sum, or of no such value.

    In bfloat16 alone: float16 has not the range for ``x`` or for ``rstd * g``, where their product fits, and a matrix
    in float32 would be rounded once more. And not where something else needs the value: it is computed anyway.
    """
    if output[0] != "across" or program.dtype not in DTYPES:
        return None
    if any(output[1] in _reads(statement) for statement in program.body if statement[0] != "across"):
        return None
    place, found = output[1], Factored(-1, [], [])
    while (statement := program.body[place])[:2] == ["op", "mul"]:
        kinds = {each: _kind(program, each) for each in statement[2] if isinstance(each, int)}
        side = next((each for each, kind in kinds.items() if kind in ("row", "column")), None)
        if side is None or len(kinds) < 2:
            return None
        (found.rows if kinds[side] == "row" else found.columns).append(program.body[side][1])
        (place,) = (each for each in kinds if each != side)
    is_there = _kind(program, place) == "full" and not _is_wide(program, place) and (found.rows or found.columns)
    return Factored(place, found.rows, found.columns) if is_there else None


def _reads(statement: Statement) -> list[Any]:
    """The values that a statement reads."""
    if statement[0] == "op":
        return list(statement[2])
    return [statement[1]] if statement[0] in OUTPUTS else []


def _kind(program: Program, place: int) -> str | None:
    """What kind of input a value is, or None where it is computed."""
    statement = program.body[place]
    return str(program.inputs[statement[1]][0]) if statement[0] == "load" else None


def _is_wide(program: Program, place: int) -> bool:
    return "wide" in program.inputs[program.body[place][1]]


def idle(program: Program) -> set[int]:
    """The places of what need not be computed, as all that reads it are sums of that form."""
    needed: set[int] = set()
    for place, statement in reversed(list(enumerate(program.body))):
        if statement[0] in OUTPUTS:
            form = factored(program, statement)
            needed.add(statement[1] if form is None else form.matrix)
        elif place in needed:
            needed |= {each for each in _reads(statement) if isinstance(each, int)}
    return {place for place, statement in enumerate(program.body) if statement[0] not in OUTPUTS} - needed
