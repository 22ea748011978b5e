"""Tile programs of few rows: stacks of factors that are nowhere in memory, sums of parts that programs read, products
by two numbers; and several of them in one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_fx.passes.kernels.tile_program import Program, Tile, join
from tests.passes import tile_checks
from tests.passes.tile_cases import Case, pair, silu

TILES = [
    Tile(rows=16, columns=128, step=16, walk="rows", warps=4),
    Tile(rows=16, columns=64, step=64, walk="columns", stages=3, warps=4),
    Tile(rows=64, columns=512, step=128, walk="columns", stages=3, warps=4),
]


def _stack(*ranks: int) -> Case:
    """h = x [A_1; A_2; ...]^T."""
    factors = [["factor", r, "RN"] for r in ranks]
    return Case(
        f"h of a stack of ranks {ranks}",
        [["full"], *factors],
        [["load", 0], ["down", 0, [i + 1 for i in range(len(ranks))]]],
        lambda x, *a: (x @ torch.cat(a).t(),),
        exact_operands=True,
    )


def _product_of_a_stack(*ranks: int) -> Case:
    """dX = dx + s t g [A_1; A_2; ...]."""
    factors = [["factor", r, "RN"] for r in ranks]
    places = [i + 2 for i in range(len(ranks))]
    scales = [len(ranks) + 2, len(ranks) + 3]
    return Case(
        f"product of a stack of ranks {ranks}, two scales",
        [["full"], ["thin", sum(ranks)], *factors, ["number"], ["number"]],
        [["load", 0], ["product", 1, places, scales], ["op", "add", [0, 1]], ["store", 2, "model"]],
        lambda x, g, *rest: (x + rest[-1] * rest[-2] * (g @ torch.cat(rest[:-2])),),
    )


def parts(r: int, count: int, start: int, whole: int) -> Case:
    """y = base + h B^T, of columns of h that come in parts."""
    return Case(
        f"product of {count} parts, rank {r} from {start} of {whole}",
        [["full"], ["parts", r, count, start, whole], ["factor", r, "NR"]],
        [["load", 0], ["product", 1, 2, None], ["op", "add", [0, 1]], ["store", 2, "model"]],
        lambda base, h, b: (base + h.sum(0)[:, start : start + r] @ b.t(),),
    )


def _parts_of_a_stack(*ranks: int) -> Case:
    """The sum of parts times a stack, without anything that is loaded."""
    kinds: list[list[Any]] = [["parts", sum(ranks), 3, 0, sum(ranks)], *[["factor", r, "RN"] for r in ranks]]
    return Case(
        f"product of parts and a stack of ranks {ranks}",
        kinds,
        [["product", 0, [i + 1 for i in range(len(ranks))], None], ["store", 0, "model"]],
        lambda g, *a: (g.sum(0) @ torch.cat(a),),
    )


def _swiglu_of_parts(r: int, q: int) -> Case:
    """silu(gate) * up and h of it, of h of gate and up in the same parts."""
    return Case(
        f"SwiGLU of parts, ranks {r} and {q}",
        [
            *([["full"]] * 2),
            ["parts", r, 8, 0, 2 * r],
            ["parts", r, 8, r, 2 * r],
            *([["factor", r, "NR"]] * 2),
            ["number"],
            ["number"],
            ["factor", q, "RN"],
        ],
        [
            ["load", 0],
            ["product", 2, 4, [6, 7]],
            ["op", "add", [0, 1]],
            ["load", 1],
            ["product", 3, 5, 6],
            ["op", "add", [3, 4]],
            ["op", "sigmoid", [2]],
            ["op", "mul", [2, 6]],
            ["op", "mul", [7, 5]],
            ["store", 8, "model"],
            ["down", 8, 8],
        ],
        lambda gate, up, hg, hu, bg, bu, s, t, a: (
            z := silu(gate + s * t * (hg.sum(0)[:, :r] @ bg.t())) * (up + s * (hu.sum(0)[:, r:] @ bu.t())),
            z @ a.t(),
        ),
    )


CASES = [
    _stack(16, 16, 16),
    _stack(4, 16),
    _product_of_a_stack(16, 16),
    _product_of_a_stack(3, 5, 16),
    parts(16, 8, 16, 48),
    parts(5, 11, 3, 8),
    parts(1, 1, 0, 1),
    _parts_of_a_stack(4, 12),
    _swiglu_of_parts(16, 8),
    _swiglu_of_parts(3, 16),
]

SIZES = [(9, 136), (64, 128), (131, 1000)]
"""M and N."""


def joint(dtype: torch.dtype) -> list[Program]:
    """Programs of different tiles and N; the last sums over rows and over columns."""
    return [
        parts(16, 8, 16, 48).program(136, dtype, TILES[0]),
        _stack(16, 4).program(1000, dtype, TILES[1]),
        pair(16, "NR").program(72, dtype, Tile(rows=32, columns=64, step=32, walk="rows", warps=4)),
    ]


def check_joint(
    run: Callable[[str, list[Tensor], list[Tensor]], None], dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Three programs of different tiles and N in one launch: each writes what it writes alone, and nothing else.

    All memory lies between NaN: what is read outside of it shows in a result, and what is written there as a number.
    """
    made = joint(dtype)
    for rows in (9, 64, 131):
        inputs = [[_guarded(t)[0] for t in tile_checks.operands(program, rows, device)] for program in made]
        alone = [tile_checks.outputs(program, given, rows) for program, given in zip(made, inputs)]
        for program, given, results in zip(made, inputs, alone):
            run(program.dumps(), given, results)
        memory = [[_guarded(t) for t in results] for results in alone]
        flat = [view.fill_(float("nan")) for results in memory for view, _ in results]
        run(join([program.dumps() for program in made]), [t for given in inputs for t in given], flat)
        for found, exact in zip(flat, [t for results in alone for t in results], strict=True):
            assert exact.isfinite().all() and torch.equal(found, exact)
        guards = [guard for results in memory for _, whole in results for guard in (whole[:64], whole[-64:])]
        assert all(guard.isnan().all() for guard in guards), "written outside of an output"
        assert made[2].row_parts(rows) == alone[2][1].shape[0]


def _guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A contiguous copy of a tensor between 64 NaN on either side, and all of that memory."""
    whole = tensor.new_full((tensor.numel() + 128,), float("nan"))
    view = whole[64:-64].view(tensor.shape)
    return view.copy_(tensor), whole
