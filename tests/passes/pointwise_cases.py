"""Every pointwise operation of tile programs by itself, with all kinds of numbers; as `tests/passes/tile_cases.py`."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from lora_fx.passes.kernels.tile_program import POINTWISE, Statement, Tile
from tests.passes.tile_cases import Case
from tests.passes.tile_checks import Runner, outputs


def every() -> list[Case]:
    """Every pointwise operation by itself, on float32 inputs; see `operands`."""
    cases = []
    for name, function in POINTWISE.items():
        for constants in itertools.product(*([[-2.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 2.5]] * (name == "pow"))):
            compares = name in ("gt", "ge", "lt", "le")
            if name == "where":
                steps, value = [["op", "gt", [0, 1]], ["op", "where", [2, 0, 1]]], 3
            elif name == "pow":
                steps, value = [["op", "pow", [0, [*constants]]]], 2
            else:
                count = 2 if compares or name in ("add", "sub", "mul", "div", "maximum", "minimum") else 1
                steps, value = [["op", name, [0, 1][:count]]], 2
            if compares:
                steps, value = [*steps, ["op", "where", [2, [1.0], [0.0]]]], 3

            def exact(a: Tensor, b: Tensor, f: Any = function, n: str = name, c: Any = constants) -> tuple[Tensor]:
                if n == "where":
                    return (torch.where(a > b, a, b),)
                if n == "pow":
                    return (torch.pow(a, c[0]),)
                binary = n in ("add", "sub", "mul", "div", "maximum", "minimum", "gt", "ge", "lt", "le")
                return ((f(a, b) if binary else f(a)).double(),)

            body: list[Statement] = [["load", 0], ["load", 1], *steps, ["store", value, "float32"]]
            cases.append(Case(" ".join([name, *map(str, constants)]), [["full"], ["full"]], body, exact))
    return cases


def operands(device: str = "cpu") -> list[Tensor]:
    """Two [37, 24] matrices: all magnitudes, equal elements, zeros, infinities and NaN."""
    a, b = (torch.randn(37, 24) * 10 ** (torch.rand(37, 24) * 7 - 6) for _ in range(2))
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), 0.1])
    a[0], a[1] = special.repeat(3), special.repeat_interleave(3)
    b[0], b[1] = special.repeat_interleave(3), 1.0
    b[2] = a[2]
    return [a.to(device), b.to(device)]


def check(case: Case, run: Runner, device: str = "cpu") -> None:
    """One pointwise operation against float64, special values included."""
    inputs = operands(device)
    if case.name in ("pow 2.5", "pow 0.5", "pow -0.5"):
        # By the letter of C's pow, minus infinity and minus zero have fractional powers; through roots and logarithms
        # they have none, as any negative number.
        inputs[0][(inputs[0] == -float("inf")) | (inputs[0] == 0.0) & inputs[0].signbit()] = 1.0
    program = case.program(inputs[0].shape[1], torch.float16, Tile(rows=32, columns=32, step=32, walk="rows"))
    results = outputs(program, inputs, inputs[0].shape[0])
    run(program, inputs, results)
    (exact,) = case.exact(*(t.double() for t in inputs))
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-5, atol=1e-37, equal_nan=True)
