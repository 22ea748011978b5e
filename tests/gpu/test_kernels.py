"""Kernels by themselves on a CUDA device, against float64. `make test-gpu-memory` runs them under a memory checker."""

import pytest
import torch
from torch import Tensor

from lora_fx.passes.kernels.tile_choice import choose
from lora_fx.passes.kernels.tile_program import Program, Tile
from lora_fx.passes.tile_nodes import MAX_RANK
from tests.passes import expert_cases, few_rows_cases, pointwise_cases, test_part_sums, tile_checks
from tests.passes.high_rank_cases import HIGH_RANKS
from tests.passes.tile_cases import CASES, SIZES, TILES, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

f16, bf16 = torch.float16, torch.bfloat16


def run(program: Program, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    from lora_fx.passes.kernels import tile_launch  # needs Triton, which is there where there is a GPU

    tile_launch.run(program.dumps(), inputs, outputs)


@pytest.mark.parametrize("dtype", [f16, bf16])
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.walk} {t.rows}x{t.columns}")
@pytest.mark.parametrize("case", [*CASES, *expert_cases.CASES], ids=str)
def test_against_float64(case: Case, tile: Tile, dtype: torch.dtype) -> None:
    """The cases that the interpreter runs, every walk with every size; two runs are equal to the bit."""
    for rows, columns in SIZES:
        tile_checks.check(case, case.program(columns, dtype, tile), rows, run, "cuda")
    tile_checks.check(case, case.program(72, dtype, tile), 90, run, "cuda", batch=3)


@pytest.mark.parametrize("dtype", [f16, bf16])
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.walk} {t.rows}x{t.columns}")
@pytest.mark.parametrize("case", [c for c in CASES if any(kind[0] == "full" for kind in c.inputs)], ids=str)
def test_sequences_in_turns(case: Case, tile: Tile, dtype: torch.dtype) -> None:
    tile_checks.check_order(case, case.program(72, dtype, tile), run, "cuda")


@pytest.mark.parametrize("dtype", [f16, bf16])
def test_the_largest_of_what_is_not_finite(dtype: torch.dtype) -> None:
    tile_checks.check_not_finite(run, dtype, "cuda")


@pytest.mark.parametrize("dtype", [f16, bf16])
@pytest.mark.parametrize(("rows", "columns"), [(2048, 1024), (1027, 4096), (3001, 1016), (4096, 14336)])
@pytest.mark.parametrize(
    "case", [*(case for case in CASES if case.rank <= MAX_RANK), *HIGH_RANKS, *expert_cases.CASES], ids=str
)
def test_the_tiles_that_are_chosen(case: Case, rows: int, columns: int, dtype: torch.dtype) -> None:
    tile = choose(case.inputs, case.body, rows, columns)
    if tile is None:
        pytest.skip("a kernel would not pay here")
    tile_checks.check(case, case.program(columns, dtype, tile), rows, run, "cuda")


FEW = [case for case in (*CASES, *few_rows_cases.CASES, *expert_cases.CASES) if case.rank <= MAX_RANK]


@pytest.mark.parametrize("dtype", [f16, bf16])
@pytest.mark.parametrize("rows", [1, 9, 16, 64, 131, 255])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_few_rows(case: Case, rows: int, dtype: torch.dtype) -> None:
    for columns in (1000, 4096):
        tile = choose(case.inputs, case.body, rows, columns)
        if tile is not None:
            tile_checks.check(case, case.program(columns, dtype, tile), rows, run, "cuda")


@pytest.mark.parametrize("dtype", [f16, bf16])
def test_programs_that_share_a_launch(dtype: torch.dtype) -> None:
    from lora_fx.passes.kernels import tile_launch

    few_rows_cases.check_joint(tile_launch.run, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, bf16, f16])
def test_sums_of_parts(dtype: torch.dtype) -> None:
    from lora_fx.passes.kernels import operators

    test_part_sums.check(operators.sum_parts, dtype, "cuda")
    test_part_sums.check_stacked(operators.sum_parts, dtype, "cuda")
    test_part_sums.check_beside(operators.sum_parts_beside_, operators.sum_parts, dtype, "cuda")


def test_sums_of_experts_parts() -> None:
    from lora_fx.passes.kernels import operators

    expert_cases.check_sums(operators.sum_expert_parts, "cuda")


def test_the_masks_of_experts() -> None:
    expert_cases.check_masks(run, "cuda")


def test_anything_in_nobodys_rows() -> None:
    expert_cases.check_nobodys_rows(run, "cuda")
    expert_cases.check_left(run, "cuda")


@pytest.mark.parametrize("case", pointwise_cases.every(), ids=str)
def test_pointwise(case: Case) -> None:
    pointwise_cases.check(case, run, "cuda")


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_products_in_float32_of_16_bits(dtype: torch.dtype) -> None:
    """As g and dB have them: of rows, and of rows that are transposed."""
    from lora_fx.passes.kernels import operators

    dy, b, h = (torch.randn(*size, device="cuda", dtype=dtype) for size in ((1024, 1016), (1016, 104), (1024, 104)))
    for left, right in ((dy, b), (dy.t(), h)):
        found, exact = operators.float_mm(left, right), left.double() @ right.double()
        assert found.dtype == torch.float32
        assert (found.double() - exact).norm() < 1e-4 * exact.norm(), "half a rounding to float16 at most"


@pytest.mark.parametrize("dtype", [f16, bf16])
@pytest.mark.parametrize(("rows", "k"), [(1, 1032), (64, 520), (1027, 1032)])
def test_products_with_what_lies_together(rows: int, k: int, dtype: torch.dtype) -> None:
    """Of weights and factors, to the last row of their memory; in either direction, with gaps between the rows."""
    from lora_fx.passes.kernels import operators

    heights = [1000, 8, 264, 24]
    whole = torch.randn(sum(heights), k, device="cuda", dtype=dtype)
    together = list(whole.split(heights))

    def check(found: Tensor, exact: Tensor) -> None:
        assert (found.double() - exact).norm() < 2 * torch.finfo(dtype).eps * exact.norm()

    x = torch.randn(rows, k, device="cuda", dtype=dtype)
    for some in (together, [part.clone() for part in together]):
        check(operators.stacked_mm(x, some), x.double() @ whole.double().t())
    dys, gs = (
        [torch.randn(rows, n, device="cuda", dtype=dtype) for n in half] for half in (heights[::2], heights[1::2])
    )
    both = operators.side_by_side(dys, [0, 1008], 1344)
    operators.put_(both, gs, [1000, 1272])
    parts = torch.cat([dys[0], gs[0], dys[1], gs[1]], 1)
    assert torch.equal(both[:, :1296], parts)
    for some in (together, [part.clone() for part in together]):
        check(operators.joined_mm(both[:, :1296], some), parts.double() @ whole.double())
