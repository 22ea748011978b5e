"""Sums over rows of a matrix times rows and columns: in what programs they are seen, and what is not computed then.

The numbers are held against float64 with all other programs (`norm` in `tests/passes/tile_cases.py`)."""

from typing import Any

import pytest
import torch

from lora_fx.passes.kernels.tile_factors import factored, idle
from lora_fx.passes.kernels.tile_program import Program
from tests.passes.tile_cases import CASES, TILES, Case, norm, swiglu_backward

bf16 = torch.bfloat16


def program(case: Case, dtype: torch.dtype = bf16) -> Program:
    return case.program(136, dtype, TILES[0])


def of(body: list[Any]) -> Program:
    kinds: list[Any] = [["full"], ["row"], ["column"], ["thin", 16], ["full"], ["seed"], ["number"], ["full", "wide"]]
    return Program(136, "bfloat16", kinds, body, TILES[0])


def test_a_norm() -> None:
    """Neither the product with the row nor that with the column is computed, nor are the two loaded as values."""
    found = program(norm(16).only(("across",)))
    form = factored(found, found.outputs[0])
    assert form is not None and (form.matrix, form.rows, form.columns) == (0, [1], [2])
    assert idle(found) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    "body",
    [
        [["load", 0], ["across", 0, 3, "RN"]],  # the matrix alone
        [["load", 0], ["load", 4], ["op", "mul", [0, 1]], ["across", 2, 3, "RN"]],  # of two matrices
        [["load", 0], ["op", "mul", [0, [2.0]]], ["across", 1, 3, "RN"]],
        [["load", 0], ["load", 6], ["op", "mul", [0, 1]], ["across", 2, 3, "RN"]],
        [["load", 0], ["load", 1], ["op", "add", [0, 1]], ["across", 2, 3, "RN"]],
        [["load", 0], ["load", 1], ["op", "mul", [0, 1]], ["op", "sigmoid", [2]], ["across", 3, 3, "RN"]],
        [["load", 0], ["keep", 5, 0.1], ["op", "mul", [0, 1]], ["across", 2, 3, "RN"]],
        [["load", 1], ["load", 2], ["op", "mul", [0, 1]], ["across", 2, 3, "RN"]],  # no matrix at all
        [["load", 1], ["op", "mul", [0, 0]], ["across", 1, 3, "RN"]],
        [["load", 7], ["load", 1], ["op", "mul", [0, 1]], ["across", 2, 3, "RN"]],  # in float32
    ],
    ids=str,
)
def test_other_values(body: list[Any]) -> None:
    assert factored(of(body), body[-1]) is None and idle(of(body)) == set()


def test_a_value_that_others_need() -> None:
    """To memory, or in a sum over columns: it is computed anyway."""
    found = program(norm(16))
    assert factored(found, found.outputs[0]) is None and idle(found) == set()


def test_two_sums_of_one_value() -> None:
    body: list[Any] = [["load", 0], ["load", 1], ["op", "mul", [0, 1]]]
    body += [["across", 2, 3, "RN"], ["across", 2, 3, "NR"]]
    assert all(factored(of(body), output) is not None for output in body[3:])
    assert idle(of(body)) == {1, 2}


def test_other_sums_and_dtypes() -> None:
    body: list[Any] = [["load", 0], ["load", 1], ["op", "mul", [0, 1]], ["down", 2, 3]]
    assert factored(of(body), body[-1]) is None
    found = program(norm(16).only(("across",)), torch.float16)
    assert factored(found, found.outputs[0]) is None and idle(found) == set()


def test_everything_else_is_computed() -> None:
    for case in (*CASES, swiglu_backward(16)):
        if "norm" not in case.name:
            assert idle(program(case)) == set()
