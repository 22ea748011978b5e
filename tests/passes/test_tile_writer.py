"""What `Writer.finish` leaves of a program: what its outputs need, with the statements and the inputs numbered anew.

What is written for the members of a region is in `tests/passes/test_golden_tiles.py` and `test_tile_regions.py`.
"""

from typing import Any

import pytest
import torch
from torch.fx import Graph

from lora_fx.passes.kernels.tile_program import OUTPUTS, Program, Statement, Tile, evaluate
from lora_fx.passes.tile_regions import Region
from lora_fx.passes.tile_writer import Writer
from tests.passes.few_rows_cases import CASES as FEW_ROWS
from tests.passes.tile_cases import CASES, Case
from tests.passes.tile_checks import operands

TILE = Tile(rows=64, columns=64, step=64, walk="rows")
COLUMNS, ROWS = 40, 19


def finished(kinds: list[list[Any]], body: list[Statement]) -> Writer:
    """What is left of a program whose inputs are the nodes x0, x1, ..."""
    graph = Graph()
    writer = Writer(Region(COLUMNS), [], ROWS)
    writer.kinds, writer.body = kinds, body
    writer.inputs = [graph.placeholder(f"x{i}") for i in range(len(kinds))]
    writer.finish()
    return writer


def moved(statement: Statement, place: int, start: int) -> Statement:
    """A statement, when a statement comes before `place` and an input before `start`."""

    def of(index: Any) -> Any:
        return (
            [of(each) for each in index]
            if isinstance(index, list)
            else index
            if index is None
            else index + (index >= start)
        )

    def at(operand: Any) -> Any:
        return operand if isinstance(operand, list) else operand + (operand >= place)

    kind, *rest = statement
    if kind == "op":
        return [kind, rest[0], [at(operand) for operand in rest[1]]]
    if kind in OUTPUTS:
        more = [of(rest[1]), *rest[2:]] if kind in ("down", "across") else rest[1:]
        return [kind, at(rest[0]), *more]
    return [kind, *map(of, rest)] if kind == "product" else [kind, of(rest[0]), *rest[1:]]


@pytest.mark.parametrize("case", [*CASES, *FEW_ROWS], ids=str)
def test_what_is_not_read_goes(case: Case) -> None:
    """A value that nothing reads, wherever it was loaded and whichever input it was, is not missed."""
    for place in range(len(case.body) + 1):
        for start in range(len(case.inputs) + 1):
            body = [moved(statement, place, start) for statement in case.body]
            body.insert(place, ["load", start])
            kinds = [*case.inputs[:start], ["full"], *case.inputs[start:]]
            found = finished(kinds, body)
            assert (found.kinds, found.body) == (case.inputs, case.body)
            assert [node.name for node in found.inputs] == [f"x{i}" for i in range(len(kinds)) if i != start]


@pytest.mark.parametrize("kind", OUTPUTS)
def test_the_outputs_of_one_kind(kind: str) -> None:
    """Of a program that does much else they are what they were, and nothing is loaded that they do not need."""
    case = next(case for case in CASES if case.name == "SwiGLU backward, rank 16")
    program = case.program(COLUMNS, torch.bfloat16, TILE)
    program.body.extend([["largest", s[1]] for s in program.outputs if s[0] == "store"])
    body = [statement for statement in program.body if statement[0] not in OUTPUTS or statement[0] == kind]
    found = finished(program.inputs, body)
    fewer = Program(COLUMNS, "bfloat16", found.kinds, found.body, TILE)
    inputs = operands(program, ROWS)
    given = [inputs[int(node.name[1:])] for node in found.inputs]
    expected = [t for t, s in zip(evaluate(program, inputs), program.outputs, strict=True) if s[0] == kind]
    assert expected and len(fewer.inputs) == {"store": 8, "down": 8, "across": 9, "largest": 8}[kind]
    assert all(torch.equal(a, b) for a, b in zip(evaluate(fewer, given), expected, strict=True))


def test_a_result_alone() -> None:
    """silu(gate) * up of a program that also has a term that nobody reads, of inputs of its own."""
    kinds: list[list[Any]] = [["full"], ["thin", 8], ["factor", 8, "NR"], ["number"], ["seed"], ["full"]]
    body: list[Statement] = [
        ["load", 0],
        ["product", 1, 2, [3, 3]],
        ["op", "add", [0, 1]],
        ["keep", 4, 0.5],
        ["load", 5],
        ["op", "mul", [3, 4]],
        ["store", 5, "bfloat16"],
    ]
    found = finished(kinds, body)
    assert found.kinds == [["seed"], ["full"]]
    assert found.body == [["keep", 0, 0.5], ["load", 1], ["op", "mul", [0, 1]], ["store", 2, "bfloat16"]]
    assert [node.name for node in found.inputs] == ["x4", "x5"]
