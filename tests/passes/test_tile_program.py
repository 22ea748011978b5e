"""Tile programs as data and as ATen: each statement against float64, text, and the shapes of outputs."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fx.passes.graph import aten
from lora_fx.passes.kernels import operators, tile_program
from lora_fx.passes.kernels.tile_program import POINTWISE, Program, Tile, evaluate, loads
from lora_fx.passes.tile_nodes import POINTWISE as NAMES
from tests.passes import expert_cases, few_rows_cases, pointwise_cases, tile_checks
from tests.passes.tile_cases import CASES, SIZES, TILES, Case

f16, bf16 = torch.float16, torch.bfloat16


def run(program: Program, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    operators.tile_(outputs, program.dumps(), inputs)


@pytest.mark.parametrize("dtype", [f16, bf16])
@pytest.mark.parametrize("case", [*CASES, *expert_cases.CASES], ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    for tile, (rows, columns) in zip(TILES, SIZES):
        tile_checks.check(case, case.program(columns, dtype, tile), rows, run)
    tile_checks.check(case, case.program(72, dtype, TILES[0]), 90, run, batch=3)


@pytest.mark.parametrize("dtype", [f16, bf16])
@pytest.mark.parametrize("case", few_rows_cases.CASES, ids=str)
def test_few_rows_against_float64(case: Case, dtype: torch.dtype) -> None:
    for tile, (rows, columns) in zip(few_rows_cases.TILES, few_rows_cases.SIZES, strict=True):
        tile_checks.check(case, case.program(columns, dtype, tile), rows, run)


def test_programs_that_share_a_launch() -> None:
    few_rows_cases.check_joint(lambda text, inputs, outputs: operators.tile_(outputs, text, inputs), bf16)


def test_programs_as_one_text() -> None:
    """On one line; joined texts can be joined again."""
    made = [case.program(136, bf16, TILES[0]) for case in CASES[:4]]
    texts = [program.dumps() for program in made]
    whole = tile_program.join([tile_program.join(texts[:2]), texts[2], tile_program.join(texts[3:])])
    assert whole == tile_program.join(texts) and "\n" not in whole
    operands = [object() for program in made for _ in program.inputs]
    found = tile_program.split(whole, operands)
    assert [program for program, _ in found] == made and [o for _, given in found for o in given] == operands


@pytest.mark.parametrize("case", pointwise_cases.every(), ids=str)
def test_pointwise(case: Case) -> None:
    pointwise_cases.check(case, run)


@pytest.mark.parametrize("dtype", [f16, bf16])
def test_the_largest_of_what_is_not_finite(dtype: torch.dtype) -> None:
    tile_checks.check_not_finite(run, dtype)


COMPARISONS = {"gt", "ge", "lt", "le"}


@pytest.mark.parametrize("target", [t for t in NAMES if NAMES[t] not in ("identity", "where", "pow")], ids=str)
def test_a_name_means_its_operator(target: torch._ops.OpOverload) -> None:
    """What is cut out under a name is what the name computes."""
    a, b = pointwise_cases.operands()
    second = 0.1 if str(target).endswith("Scalar") else b
    binary = len([x for x in target._schema.arguments if not x.kwarg_only]) == 2
    arguments = (a, second) if binary else (a,)
    expected, found = target(*arguments), POINTWISE[NAMES[target]](*arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_the_other_names() -> None:
    a, b = pointwise_cases.operands()
    assert torch.equal(POINTWISE["where"](a > b, a, b), aten.where.self(a > b, a, b)) or a.isnan().any()
    torch.testing.assert_close(POINTWISE["pow"](a, 3.0), aten.pow.Tensor_Scalar(a, 3.0), equal_nan=True)
    assert POINTWISE["identity"](a) is a
    assert set(NAMES.values()) == set(POINTWISE)


def test_text_says_everything() -> None:
    for case in CASES:
        program = case.program(136, bf16, TILES[2])
        text = program.dumps()
        assert loads(text) == program and loads(text).dumps() == text
        assert json.loads(text)["tile"]["strips"] == 4
    programs = [case.program(136, bf16, tile).dumps() for case in CASES for tile in TILES]
    assert len(set(programs)) == len(CASES) * len(TILES)


def test_output_shapes() -> None:
    """Parts along the columns for sums over columns, along the rows for sums over rows."""
    (case,) = (c for c in CASES if c.name.startswith("infinite"))
    program = case.program(136, bf16, Tile(rows=64, columns=32, step=32, walk="rows"))
    expected = [((5, 100, 4), torch.float32), ((2, 136, 4), torch.float32), ((2, 4, 136), torch.float32)]
    found = [program.output_shape(s, 100, program.row_parts(100)) for s in program.outputs]
    assert found == [*expected, ((100, 136), bf16), ((2, 5), torch.float32)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_rows(case: Case) -> None:
    program = case.program(72, bf16, TILES[0])
    inputs = [torch.empty(0, *t.shape[1:], dtype=t.dtype) if k[0] in ("full", "row", "thin") else t
              for k, t in zip(program.inputs, tile_checks.operands(program, 4))]  # fmt: skip
    results = evaluate(program, inputs)
    for statement, total in zip(program.outputs, tile_checks.totals(program, inputs, results), strict=True):
        if statement[0] == "largest":
            assert total == 0
        elif statement[0] == "across":
            assert total.shape == tuple(program.output_shape(statement, 0, 0)[0][1:]) and not total.any()
        else:
            assert total.shape[0] == 0


def test_tiles_that_do_not_divide() -> None:
    for wrong in (
        {"rows": 96, "columns": 64, "step": 64, "walk": "rows"},
        {"rows": 64, "columns": 96, "step": 64, "walk": "columns"},
        {"rows": 64, "columns": 64, "step": 64, "walk": "rows", "strips": 3},
        {"rows": 64, "columns": 64, "step": 64, "walk": "columns", "strips": 2},
        {"rows": 64, "columns": 64, "step": 64, "walk": "around"},
    ):
        with pytest.raises(ValueError, match="Tile"):
            Tile(**wrong)  # type: ignore[arg-type]


def test_opcheck() -> None:
    """The schema says what is written, and the fake implementation knows operands that are missing."""
    case = CASES[0]
    program = case.program(40, f16, TILES[0])
    inputs = tile_checks.operands(program, 20)
    results = tile_checks.outputs(program, inputs, 20)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.tile_, (results, program.dumps(), inputs), test_utils=tests)
    torch.library.opcheck(operators.donated, (inputs[0], [20, 7]), test_utils=("test_schema", "test_faketensor"))
    with pytest.raises(RuntimeError, match="missing"):
        operators.tile_([t.to("meta") for t in results], program.dumps(), [t.to("meta") for t in inputs[1:]])


def test_reading_a_program_twice_gives_one() -> None:
    text = CASES[0].program(40, f16, TILES[0]).dumps()
    assert tile_program.loads(text) is tile_program.loads(text)


@pytest.mark.parametrize(
    ("kind", "operation", "leaves"),
    [
        (["full", "grouped"], ["mul", [0, 1]], True),
        (["full", "grouped"], ["mul", [1, 0]], True),
        (["full"], ["mul", [0, 1]], False),
        (["full", "grouped"], ["where", [1, 0, [0.0]]], False),  # zeros in rows of nobody, say
    ],
    ids=["grouped", "of the other", "of anything", "chosen"],
)
def test_rows_of_nobody_are_left_where_all_that_is_stored_is_of_grouped_products(kind, operation, leaves):
    body: list[Any] = [["load", 0], ["load", 1], ["op", *operation], ["store", 2, "bfloat16"]]
    kinds: list[list[Any]] = [kind, ["full"], ["ends", 4], ["factor", 8, "RN", 4]]
    tile = Tile(rows=64, columns=64, step=64, walk="rows")
    assert Program(64, "bfloat16", kinds, body, tile).leaves_nobodys_rows == leaves
    assert Program(64, "bfloat16", kinds, [*body, ["down", 2, 3]], tile).leaves_nobodys_rows == leaves
    assert not Program(64, "bfloat16", kinds, [*body, ["store", 1, "bfloat16"]], tile).leaves_nobodys_rows
    assert not Program(64, "bfloat16", kinds[:2], body, tile).leaves_nobodys_rows  # of no experts
    assert Program(64, "bfloat16", kinds, [*body[:2], ["down", 1, 3]], tile).leaves_nobodys_rows  # stores nothing
