"""Tile programs with what they compute, in float64 and by hand; shared by the tests of every form of them.

What runs them and compares is in `tests/passes/tile_checks.py`. `tests/passes/test_tile_program.py` holds ATen against
these cases, `tests/passes/test_tile_kernels.py` the kernels in the interpreter, and `tests/gpu/test_kernels.py` the
kernels on a GPU. M tokens, N columns, R rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_fx.passes.kernels import dropout
from lora_fx.passes.kernels.tile_program import OUTPUTS, Program, Statement, Tile

EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half of the distance of two neighbours, in units of either: what a rounded value is wrong by, at the most."""
SUMMED = 4e-6
"""The relative error of a sum in float32 over exact operands, with room for another order."""


@dataclass(frozen=True)
class Case:
    """A program without its tile, and what it gives for inputs in float64 (which are as the program gets them)."""

    name: str
    inputs: list[list[Any]]
    body: list[Statement]
    exact: Callable[..., tuple[Tensor, ...]]
    exact_operands: bool = False
    """Whether nothing is rounded to 16 bits on the way."""
    mask: int | None = None
    """The input that is a condition, if one is."""

    def __str__(self) -> str:
        return self.name

    @property
    def rank(self) -> int:
        """The highest of one input: what kernels are chosen for is at most `MAX_RANK`."""
        return max((kind[1] for kind in self.inputs if kind[0] in ("thin", "factor", "parts")), default=0)

    def program(self, columns: int, dtype: torch.dtype, tile: Tile) -> Program:
        name = str(dtype).removeprefix("torch.")
        body = [[*s[:2], name] if s[0] == "store" and s[2] == "model" else s for s in self.body]
        return Program(columns, name, self.inputs, body, tile)

    def only(self, kinds: tuple[str, ...]) -> Case:
        """The case with outputs of these kinds alone."""
        kept = [s[0] in kinds for s in self.body if s[0] in OUTPUTS]
        body = [s for s in self.body if s[0] not in OUTPUTS or s[0] in kinds]
        name = self.name if all(kept) else f"{self.name}, {' and '.join(kinds)}"
        return replace(self, name=name, body=body, exact=lambda *t: tuple(itertools.compress(self.exact(*t), kept)))

    def bound(self, dtype: torch.dtype) -> float:
        return SUMMED if self.exact_operands else EPS[dtype]


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def dsilu(x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def branch(r: int, order: str, scaled: bool) -> Case:
    """y = base + s h B^T."""
    number: list[list[Any]] = [["number"]] if scaled else []
    return Case(
        f"branch, rank {r}, {order}{', scaled' if scaled else ''}",
        [["full"], ["thin", r], ["factor", r, order], *number],
        [["load", 0], ["product", 1, 2, 3 if scaled else None], ["op", "add", [0, 1]], ["store", 2, "model"]],
        lambda base, h, b, s=1.0: (base + s * (h @ (b.t() if order == "NR" else b)),),
    )


def biased(r: int) -> Case:
    """What a large product with a bias adds itself to: the bias, and s h B^T."""
    return Case(
        f"bias and branch, rank {r}",
        [["column"], ["thin", r], ["factor", r, "NR"], ["number"]],
        [["load", 0], ["product", 1, 2, 3], ["op", "add", [0, 1]], ["op", "mul", [2, [0.5]]], ["store", 3, "model"]],
        lambda bias, h, b, s: (0.5 * (bias + s * (h @ b.t())),),
    )


def pair(r: int, order: str) -> Case:
    """g = dy B and dB = dy^T h."""
    return Case(
        f"gradient pair, rank {r}, {order}",
        [["full"], ["factor", r, order], ["thin", r]],
        [["load", 0], ["down", 0, 1], ["across", 0, 2, "NR"]],
        lambda dy, b, h: (dy @ (b if order == "NR" else b.t()), dy.t() @ h),
        exact_operands=True,
    )


def swiglu(r: int, q: int, outputs: tuple[str, ...] = ("store", "down")) -> Case:
    """z = silu(gate) * up, with both products, and h of the next linear; or one of the two."""
    return Case(
        f"SwiGLU, ranks {r} and {q}",
        [*([["full"]] * 2), *([["thin", r]] * 2), *([["factor", r, "NR"]] * 2), ["number"], ["factor", q, "RN"]],
        [
            ["load", 0],
            ["product", 2, 4, 6],
            ["op", "add", [0, 1]],
            ["load", 1],
            ["product", 3, 5, None],
            ["op", "add", [3, 4]],
            ["op", "sigmoid", [2]],
            ["op", "mul", [2, 6]],
            ["op", "mul", [7, 5]],
            ["store", 8, "model"],
            ["down", 8, 7],
        ],
        lambda gate, up, hg, hu, bg, bu, s, a: (
            z := silu(gate + s * (hg @ bg.t())) * (up + hu @ bu.t()),
            z @ a.t(),
        ),
    ).only(outputs)


def swiglu_backward(r: int, outputs: tuple[str, ...] = ("store", "down", "across")) -> Case:
    """dgate and dup, which go to memory, both gradient pairs, and dA of the next linear from silu(gate) * up; or those
    that are of these kinds."""
    body: list[Statement] = [
        ["load", 0],
        ["product", 3, 5, 7],
        ["op", "add", [0, 1]],  # gate
        ["load", 1],
        ["product", 4, 6, 7],
        ["op", "add", [3, 4]],  # up
        ["load", 2],  # dz
        ["op", "sigmoid", [2]],
        ["op", "mul", [2, 7]],  # silu(gate)
        ["op", "mul", [6, 8]],  # dup
        ["op", "mul", [6, 5]],
        ["op", "sub", [[1.0], 7]],
        ["op", "mul", [2, 11]],
        ["op", "add", [12, [1.0]]],
        ["op", "mul", [7, 13]],
        ["op", "mul", [10, 14]],  # dgate
        ["op", "mul", [8, 5]],  # silu(gate) * up
        ["store", 15, "model"],
        ["store", 9, "model"],
        ["down", 15, 5],
        ["across", 15, 3, "NR"],
        ["down", 9, 6],
        ["across", 9, 4, "NR"],
        ["across", 16, 8, "RN"],
    ]

    def exact(*t: Tensor) -> tuple[Tensor, ...]:
        gate_base, up_base, dz, hg, hu, bg, bu, s, g = t
        gate, up = gate_base + s * (hg @ bg.t()), up_base + s * (hu @ bu.t())
        dgate, dup = dz * up * dsilu(gate), dz * silu(gate)
        z = silu(gate) * up
        return dgate, dup, dgate @ bg, dgate.t() @ hg, dup @ bu, dup.t() @ hu, g.t() @ z

    kinds: list[list[Any]] = [["full"]] * 3 + [["thin", r]] * 2 + [["factor", r, "NR"]] * 2 + [["number"], ["thin", r]]
    return Case(f"SwiGLU backward, rank {r}", kinds, body, exact).only(outputs)


def swiglu_backward_written(r: int) -> Case:
    """dgate and dup alone, where dz is a sum as well: three products, with what ranks above 64 have of a SwiGLU."""
    body: list[Statement] = [
        ["load", 0],
        ["product", 3, 6, 9],
        ["op", "add", [0, 1]],  # gate
        ["load", 1],
        ["product", 4, 7, 9],
        ["op", "add", [3, 4]],  # up
        ["load", 2],
        ["product", 5, 8, None],
        ["op", "add", [6, 7]],  # dz
        ["op", "sigmoid", [2]],
        ["op", "mul", [2, 9]],  # silu(gate)
        ["op", "mul", [8, 10]],  # dup
        ["op", "mul", [8, 5]],
        ["op", "sub", [[1.0], 9]],
        ["op", "mul", [2, 13]],
        ["op", "add", [14, [1.0]]],
        ["op", "mul", [9, 15]],
        ["op", "mul", [12, 16]],  # dgate
        ["store", 17, "model"],
        ["store", 11, "model"],
    ]

    def exact(*t: Tensor) -> tuple[Tensor, ...]:
        gate_base, up_base, dz_base, hg, hu, g, bg, bu, a, s = t
        gate, up = gate_base + s * (hg @ bg.t()), up_base + s * (hu @ bu.t())
        dz = dz_base + g @ a
        return dz * up * dsilu(gate), dz * silu(gate)

    factors = [["factor", r, "NR"]] * 2 + [["factor", r, "RN"]]
    kinds: list[list[Any]] = [["full"]] * 3 + [["thin", r]] * 3 + factors + [["number"]]
    return Case(f"SwiGLU backward of three products, rank {r}", kinds, body, exact)


def norm(r: int) -> Case:
    """dA = g^T x and x itself, for x = residual * rstd * weight, by rows and by columns."""
    return Case(
        f"norm, rank {r}",
        [["full"], ["row"], ["column"], ["thin", r]],
        [
            ["load", 0],
            ["load", 1],
            ["op", "mul", [0, 1]],
            ["load", 2],
            ["op", "mul", [2, 3]],
            ["across", 4, 3, "RN"],
            ["store", 4, "float32"],
        ],
        lambda x, rstd, weight, g: (g.t() @ (x * rstd * weight), x * rstd * weight),
    )


def infinite(r: int, outputs: tuple[str, ...] = ("down", "across", "store", "largest")) -> Case:
    """1 / sqrt(x) is infinite where a kernel loads zeros in place of what is not there, and log(x) - log(x) is NaN."""

    def exact(x: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        y = x.abs() ** -0.5
        largest = (y.abs().amax(),) if "largest" in outputs else (y,)
        return y @ b, y.t() @ h, h.t() @ y, y, *largest

    return Case(
        f"infinite outside of the matrix, rank {r}",
        [["full"], ["factor", r, "NR"], ["thin", r]],
        [
            ["load", 0],
            ["op", "abs", [0]],
            ["op", "add", [1, [0.0]]],
            ["op", "rsqrt", [2]],
            ["op", "log", [2]],
            ["op", "sub", [4, 4]],
            ["op", "add", [3, 5]],
            ["down", 6, 1],
            ["across", 6, 2, "NR"],
            ["across", 6, 2, "RN"],
            ["store", 6, "model"],
            ["largest", 6],
        ],
        exact,
    ).only(outputs)


def largest(r: int) -> Case:
    """A branch, its largest magnitude and that of its base, as a float8 base needs them."""
    return Case(
        f"largest, rank {r}",
        [["full"], ["thin", r], ["factor", r, "RN"]],
        [["load", 0], ["product", 1, 2, None], ["op", "add", [0, 1]], *(["largest", i] for i in (2, 0))],
        lambda base, h, b: ((base + h @ b).abs().amax(), base.abs().amax()),
    )


def _broadcast() -> Case:
    """A value that is made of rows, columns and numbers alone, beside one that is loaded."""
    return Case(
        "rows, columns and numbers",
        [["full"], ["row"], ["column"], ["number"]],
        [
            ["load", 1],
            ["load", 2],
            ["op", "mul", [0, 1]],
            ["load", 3],
            ["op", "mul", [2, 3]],
            ["store", 4, "model"],
            ["load", 0],
            ["op", "gt", [6, 0]],
            ["op", "where", [7, 6, [0.25]]],
            ["store", 8, "float32"],
            ["store", 1, "model"],
        ],
        lambda x, row, column, number: (
            row * column * number,
            torch.where(x > row, x, 0.25),
            column.expand(x.shape),
        ),
    )


def _mask(r: int) -> Case:
    """The backward of relu with the mask that forward kept, and the gradient pair that reads its result."""
    return Case(
        f"mask, rank {r}",
        [["full"], ["full"], ["factor", r, "NR"], ["thin", r]],
        [
            ["load", 0],
            ["load", 1],
            ["op", "where", [0, [0.0], 1]],
            ["down", 2, 2],
            ["across", 2, 3, "NR"],
            ["store", 2, "model"],
        ],
        lambda mask, dy, b, h: ((t := dy * (1 - mask)) @ b, t.t() @ h, t),
        exact_operands=True,
        mask=0,
    )


def dropped(r: int, p: float) -> Case:
    """Two siblings that share x under a mask each: h and dA of the one, h of the other, and a mask itself."""

    def exact(x: Tensor, s: Tensor, t: Tensor, a: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        first, second = (dropout.keep_eager(seed, x.shape, p).double() for seed in (s, t))
        return (x * first) @ a.t(), (x * second) @ b.t(), g.t() @ (x * first), second

    return Case(
        f"dropout {p}, rank {r}",
        [["full"], ["seed"], ["seed"], ["factor", r, "RN"], ["factor", r, "RN"], ["thin", r]],
        [
            ["load", 0],
            ["keep", 1, p],
            ["op", "mul", [0, 1]],
            ["down", 2, 3],
            ["keep", 2, p],
            ["op", "mul", [0, 4]],
            ["down", 5, 4],
            ["across", 2, 5, "RN"],
            ["store", 4, "model"],
        ],
        exact,
        exact_operands=True,
    )


CASES = [
    *(branch(r, order, scaled) for r, order, scaled in ((1, "NR", True), (16, "RN", False), (128, "NR", False))),
    biased(16),
    *(pair(r, order) for r, order in ((1, "NR"), (5, "RN"), (16, "NR"), (33, "RN"), (128, "NR"))),
    swiglu(8, 24),
    swiglu_backward(3),
    swiglu_backward(16),
    norm(16),
    norm(20),
    norm(16).only(("across",)),
    norm(20).only(("across",)),
    infinite(4),
    _mask(8),
    largest(4),
    _broadcast(),
    dropped(16, 0.1),
    dropped(5, 0.75),
]
SIZES = [(1, 8), (100, 120), (192, 128), (131, 136)]
"""M and N: M a multiple of no tile (or of all), N an odd multiple of 8 (or a multiple of a tile)."""
TILES = [
    Tile(rows=64, columns=64, step=64, walk="rows", warps=4),
    Tile(rows=128, columns=32, step=32, walk="rows", warps=4),
    Tile(rows=64, columns=128, step=32, walk="rows", strips=4, warps=4),
    Tile(rows=32, columns=128, step=32, walk="columns", warps=4),
]
