"""The tiles that are chosen: those that measurements found, and for any shape some that a kernel can have."""

import random
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

pytest.importorskip("triton", reason="needs Triton")

from lora_fx.passes.kernels.tile_choice import choose
from lora_fx.passes.kernels.tile_memory import bound
from lora_fx.passes.kernels.tile_program import Program, Tile
from tests.passes.expert_cases import of_experts
from tests.passes.high_rank_cases import HIGH_RANKS
from tests.passes.tile_cases import CASES, Case, branch, pair, swiglu, swiglu_backward, swiglu_backward_written

HOPPER = 232448
"""Bytes of shared memory that a program may have."""
FIRST = Tile(rows=64, columns=64, step=64, walk="rows")


def product(rank: int) -> Case:
    """h B^T by itself."""
    inputs, body = [["thin", rank], ["factor", rank, "NR"]], [["product", 0, 1], ["store", 0, "bfloat16"]]
    return Case(f"product, rank {rank}", inputs, body, lambda h, b: (h @ b.t(),))


def sums(rank: int) -> Case:
    """dA of two branches that read one x."""
    inputs: list[list[Any]] = [["full"], ["full"], ["thin", rank], ["thin", rank]]
    body: list[Any] = [["load", 0], ["load", 1], ["across", 0, 2, "RN"], ["across", 1, 3, "RN"]]
    return Case(f"two sums, rank {rank}", inputs, body, lambda x, z, g, k: (g.t() @ x, k.t() @ z))


def terms(rank: int) -> Case:
    """dX of two branches, beside three other terms."""
    factors: list[list[Any]] = [["thin", rank], ["factor", rank, "RN"]] * 2
    body: list[Any] = [["product", 3, 4], ["product", 5, 6], *(["load", i] for i in range(3))]
    body += [["op", "add", i, 4 + i + (i > 0)] for i in range(4)] + [["store", 8, "bfloat16"]]
    inputs = [["full"], ["full"], ["full"], *factors]
    return Case(f"five terms, rank {rank}", inputs, body, lambda x, y, z, g, a, k, c: (x + y + z + g @ a + k @ c,))


def chosen(case: Case, rows: int, columns: int) -> Program | None:
    program = case.program(columns, torch.bfloat16, FIRST)
    tile = choose(program.inputs, program.body, rows, columns)
    return None if tile is None else case.program(columns, torch.bfloat16, tile)


def shown(program: Program | None) -> str:
    if program is None:
        return "cuBLAS"
    tile = program.tile
    along = "down" if tile.walk == "rows" else "along"
    text = f"{tile.rows} x {tile.columns} {along} by {tile.step}, {tile.warps} warps, {tile.stages} stages"
    return text if tile.strips == 1 else f"{text}, {tile.strips} strips"


def test_what_measurements_found() -> None:
    """Another tile here is another row of the table in `tile_choice`. All fit Hopper as they are."""
    programs = [
        (product(16), 8192, 4096),
        (product(64), 8192, 4096),
        (product(16), 512, 4096),
        (branch(16, "NR", True), 8192, 4096),
        (branch(64, "NR", True), 8192, 4096),
        (branch(128, "NR", True), 8192, 4096),
        (branch(16, "NR", True), 512, 4096),
        (pair(16, "NR"), 8192, 4096),
        (pair(16, "NR"), 8192, 3584),
        (pair(16, "NR"), 8192, 1024),
        (pair(16, "NR"), 8192, 5632),
        (pair(16, "NR"), 8192, 11008),
        (pair(16, "NR"), 8192, 14336),
        (pair(16, "NR"), 16384, 14336),
        (pair(16, "NR"), 8192, 18944),
        (pair(16, "NR"), 2048, 14336),
        (pair(16, "NR"), 512, 4096),
        (pair(16, "NR"), 512, 14336),
        (pair(16, "NR"), 16384, 3072),
        (pair(64, "NR"), 8192, 14336),
        (pair(64, "NR"), 8192, 4096),
        (pair(64, "NR"), 8192, 3072),
        (pair(64, "NR"), 8192, 1024),
        (swiglu(16, 16), 8192, 14336),
        (swiglu(64, 64), 8192, 14336),
        (swiglu(64, 64), 16384, 14336),
        (swiglu(64, 64), 5000, 14336),
        (swiglu(64, 64), 2048, 14336),
        (swiglu(64, 64), 8192, 8192),
        (swiglu_backward(16, ("store", "across")), 8192, 14336),
        (swiglu_backward(16, ("store", "across")), 2048, 14336),
        (swiglu_backward(16, ("store", "across")), 512, 14336),
        (swiglu_backward(64, ("store", "across")), 8192, 14336),
        (swiglu_backward_written(128), 8192, 14336),
        (of_experts(pair(16, "NR"), 8), 16384, 5632),
        (of_experts(sums(16), 8), 16384, 2048),
        (of_experts(terms(16), 8), 16384, 2048),
        (of_experts(pair(64, "NR"), 8), 16384, 5632),
        (of_experts(swiglu(16, 16), 8), 16384, 5632),
        (of_experts(swiglu(64, 64), 8), 16384, 5632),
    ]
    for program in (chosen(*found) for found in programs):
        assert program is not None and bound(program, (2,) * len(program.inputs), 9) < HOPPER, "fewer stages would run"
    lines = [f"{case}; M {rows}, N {columns}: {shown(chosen(case, rows, columns))}" for case, rows, columns in programs]
    assert_expected_inline(
        "\n".join(lines),
        """\
product, rank 16; M 8192, N 4096: 256 x 128 down by 64, 4 warps, 3 stages
product, rank 64; M 8192, N 4096: 256 x 128 down by 64, 4 warps, 3 stages
product, rank 16; M 512, N 4096: 64 x 128 down by 64, 4 warps, 3 stages
branch, rank 16, NR, scaled; M 8192, N 4096: 256 x 64 down by 64, 4 warps, 3 stages
branch, rank 64, NR, scaled; M 8192, N 4096: 256 x 64 down by 64, 4 warps, 3 stages
branch, rank 128, NR, scaled; M 8192, N 4096: 512 x 64 down by 64, 4 warps, 3 stages
branch, rank 16, NR, scaled; M 512, N 4096: 64 x 64 down by 64, 4 warps, 3 stages
gradient pair, rank 16, NR; M 8192, N 4096: 1024 x 256 down by 64, 4 warps, 3 stages, 2 strips
gradient pair, rank 16, NR; M 8192, N 3584: 1024 x 256 down by 64, 4 warps, 3 stages, 2 strips
gradient pair, rank 16, NR; M 8192, N 1024: 256 x 128 down by 64, 8 warps, 3 stages
gradient pair, rank 16, NR; M 8192, N 5632: 1024 x 128 down by 64, 4 warps, 3 stages
gradient pair, rank 16, NR; M 8192, N 11008: 1024 x 256 down by 64, 4 warps, 3 stages, 2 strips
gradient pair, rank 16, NR; M 8192, N 14336: 1024 x 512 down by 64, 4 warps, 3 stages, 4 strips
gradient pair, rank 16, NR; M 16384, N 14336: 1024 x 512 down by 64, 4 warps, 3 stages, 4 strips
gradient pair, rank 16, NR; M 8192, N 18944: 1024 x 512 down by 64, 4 warps, 3 stages, 4 strips
gradient pair, rank 16, NR; M 2048, N 14336: 1024 x 256 down by 64, 4 warps, 3 stages, 2 strips
gradient pair, rank 16, NR; M 512, N 4096: 128 x 128 down by 64, 8 warps, 3 stages
gradient pair, rank 16, NR; M 512, N 14336: 128 x 512 down by 64, 4 warps, 3 stages, 4 strips
gradient pair, rank 16, NR; M 16384, N 3072: 1024 x 128 down by 64, 4 warps, 3 stages
gradient pair, rank 64, NR; M 8192, N 14336: 1024 x 256 down by 64, 4 warps, 3 stages, 2 strips
gradient pair, rank 64, NR; M 8192, N 4096: 1024 x 256 down by 64, 4 warps, 3 stages, 2 strips
gradient pair, rank 64, NR; M 8192, N 3072: 1024 x 256 down by 64, 4 warps, 3 stages, 2 strips
gradient pair, rank 64, NR; M 8192, N 1024: 512 x 128 down by 64, 8 warps, 3 stages
SwiGLU, ranks 16 and 16; M 8192, N 14336: 64 x 512 along by 64, 4 warps, 3 stages
SwiGLU, ranks 64 and 64; M 8192, N 14336: 128 x 7168 along by 64, 8 warps, 3 stages
SwiGLU, ranks 64 and 64; M 16384, N 14336: 128 x 14336 along by 64, 8 warps, 3 stages
SwiGLU, ranks 64 and 64; M 5000, N 14336: 128 x 4800 along by 64, 8 warps, 3 stages
SwiGLU, ranks 64 and 64; M 2048, N 14336: 64 x 1792 along by 64, 4 warps, 4 stages
SwiGLU, ranks 64 and 64; M 8192, N 8192: 128 x 4096 along by 64, 8 warps, 3 stages
SwiGLU backward, rank 16, store and across; M 8192, N 14336: 512 x 64 down by 16, 4 warps, 3 stages
SwiGLU backward, rank 16, store and across; M 2048, N 14336: 256 x 64 down by 16, 4 warps, 3 stages
SwiGLU backward, rank 16, store and across; M 512, N 14336: 512 x 64 down by 32, 4 warps, 3 stages
SwiGLU backward, rank 64, store and across; M 8192, N 14336: 1024 x 64 down by 32, 4 warps, 3 stages
SwiGLU backward of three products, rank 128; M 8192, N 14336: 1024 x 128 down by 32, 4 warps, 3 stages
gradient pair, rank 16, NR, of 8 experts; M 16384, N 5632: 1024 x 128 down by 64, 4 warps, 3 stages
two sums, rank 16, of 8 experts; M 16384, N 2048: 256 x 128 down by 64, 4 warps, 2 stages
five terms, rank 16, of 8 experts; M 16384, N 2048: 256 x 64 down by 32, 4 warps, 3 stages
gradient pair, rank 64, NR, of 8 experts; M 16384, N 5632: 1024 x 256 down by 64, 4 warps, 3 stages, 2 strips
SwiGLU, ranks 16 and 16, of 8 experts; M 16384, N 5632: 64 x 512 along by 64, 4 warps, 3 stages
SwiGLU, ranks 64 and 64, of 8 experts; M 16384, N 5632: 64 x 5632 along by 64, 4 warps, 4 stages""",
    )


@pytest.mark.parametrize("case", [c for c in [*CASES, *HIGH_RANKS] if "keep" not in [s[0] for s in c.body]], ids=str)
def test_any_shape_has_a_tile_that_a_kernel_can_have(case: Case) -> None:
    draw = random.Random(str(case))
    for _ in range(200):
        rows, columns = draw.randrange(1, 20000), 8 * draw.randrange(1, 4000)
        program = chosen(case, rows, columns)
        if program is None:
            continue
        tile = program.tile
        down = tile.walk == "rows"
        height, width = (tile.step, tile.columns // tile.strips) if down else (tile.rows, tile.step)
        for size in (height, width):
            assert size >= 16 and size & (size - 1) == 0, (tile, rows, columns)
        assert tile.rows <= max(64, 2 * rows), (tile, rows, columns)
        assert down or tile.columns < max(columns, 512) + tile.step, (tile, rows, columns)


@pytest.mark.parametrize(
    ("rows", "columns", "height"), [(8192, 14336, 1024), (8192, 8192, 2048), (2048, 14336, 2048), (512, 14336, 512)]
)
def test_high_ranks_sum_over_as_many_rows_as_waves_and_parts_make_fastest(rows: int, columns: int, height: int) -> None:
    program = chosen(swiglu_backward(64), rows, columns)
    assert program is not None and program.tile.rows == height
