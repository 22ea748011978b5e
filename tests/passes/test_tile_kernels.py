"""The kernels of tile programs, in Triton's interpreter.

The interpreter is chosen by an environment variable when Triton is imported, and other tests import it (through
Inductor) without: so the tests here run pytest on this very file in a process of their own. There it holds the cases of
`tests/passes/tile_cases.py`, in float16: the interpreter has no products in bfloat16. To see one of them alone::

    TRITON_INTERPRET=1 python -m pytest tests/passes/test_tile_kernels.py -k "norm and columns"
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fx.passes.kernels import tile_factors
from lora_fx.passes.kernels.tile_choice import choose
from lora_fx.passes.kernels.tile_program import Program, Tile, join
from tests.passes import expert_cases, few_rows_cases, pointwise_cases, test_part_sums, tile_checks
from tests.passes.high_rank_cases import HIGH_RANKS
from tests.passes.interpreter import INTERPRETED, run_interpreted
from tests.passes.tile_cases import CASES, SIZES, TILES, Case, norm, swiglu_backward

tile_launch = pytest.importorskip("lora_fx.passes.kernels.tile_launch", reason="needs Triton", exc_type=ImportError)
tile_triton = pytest.importorskip("lora_fx.passes.kernels.tile_triton", reason="needs Triton", exc_type=ImportError)
tile_experts = pytest.importorskip("lora_fx.passes.kernels.tile_experts", reason="needs Triton", exc_type=ImportError)
part_sums = pytest.importorskip("lora_fx.passes.kernels.part_sums", reason="needs Triton", exc_type=ImportError)


ORDERED = [case for case in CASES if any(kind[0] == "full" for kind in case.inputs)][::2]
"""Those of which every walk is tried with values that lie in another order."""


def run(program: Program, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    tile_launch.run(program.dumps(), inputs, outputs)


def compiled(programs: list[Program], mask: int | None, full: str, laid_out: bool = False, along: int = 0) -> Any:
    """The kernel of a program, or of several in one launch, compiled for M that is a multiple of nothing.

    `laid_out`: as for what models have, memory that begins at multiples of 16 bytes, contiguous ranks, whole tiles.
    `along`: of values whose rows lie in blocks of so many, in turns.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, constants = {}, {}
    kernel = tile_triton.kernel(join([program.dumps() for program in programs]))
    for name in kernel.arg_names:
        found = re.fullmatch(r"(?:p(\d+)_)?([A-Za-z_]+)(\d*)(?:_(stride|along|apart))?", name)
        assert found is not None
        number, what, place, rows = found.groups()
        program = programs[int(number or 0)]
        if rows:
            apart = program.columns if along else 0
            values = {"stride": program.columns * (4 if along else 1), "along": along, "apart": apart}
            signature[name], constants[name] = "constexpr", values[rows]
        elif what == "in":
            kind = program.inputs[int(place)][0]
            types = {"number": "fp32", "parts": "fp32", "seed": "i64", "ends": "i32"}
            signature[name] = "*i1" if int(place) == mask else f"*{types.get(kind, full)}"
        elif what == "out":
            store = program.outputs[int(place)][-1] == "bfloat16"
            signature[name] = "*bf16" if store else "*fp32"
        elif laid_out and what in ("outer", "inner"):
            kind = program.inputs[int(place)]
            wide = "RN" in kind  # [R, N]
            step = {"outer": 1 if wide else int(kind[1]), "inner": program.columns if wide else 1}
            signature[name], constants[name] = "constexpr", step[what]
        elif what == "EVEN_ROWS":
            signature[name], constants[name] = "constexpr", laid_out
        else:
            signature[name] = "i32"
    options = {"num_warps": programs[0].tile.warps, "num_stages": programs[0].tile.stages}
    pointers = [(i,) for i, name in enumerate(kernel.arg_names) if laid_out and signature[name].startswith("*")]
    hints = {place: [["tt.divisibility", 16]] for place in pointers}
    return compile(ASTSource(kernel, signature, constants, hints), target=GPUTarget("cuda", 90, 32), options=options)


def without_gradient_pairs(case: Case) -> Case:
    """The case without sums over rows of what it stores: dz, which nothing else reads, leads to no product then."""
    stored = {s[1] for s in case.body if s[0] == "store"}
    body = [s for s in case.body if not (s[0] == "across" and s[1] in stored)]
    assert any(s[0] == "across" for s in body)
    return dataclasses.replace(case, name=f"{case.name} of another value", body=body)


if not INTERPRETED:

    @pytest.mark.parametrize(("rank", "order"), [(1, "NR"), (1, "RN"), (5, "RN")])
    def test_the_rank_is_contiguous_where_a_value_is_summed_both_ways(rank: int, order: str) -> None:
        """What Triton gets wrong otherwise only a GPU shows: this is the layout that is right there."""
        body: list[Any] = [["load", 0], ["down", 0, 1], ["across", 0, 2, "NR"]]
        inputs: list[Any] = [["full"], ["factor", rank, order], ["thin", rank]]
        program = Program(24, "bfloat16", inputs, body, Tile(rows=64, columns=64, step=64, walk="rows"))
        factor = torch.randn((24, rank) if order == "NR" else (rank, 24))
        tensors = [torch.randn(40, 24), factor, torch.randn(40, 3 * rank)[:, rank : 2 * rank]]
        made = [((1, 40, rank), (40 * rank, rank, 1)), ((1, 24, rank), (24 * rank, rank, 1))]
        found = tile_launch.launch(program.dumps(), [(t.shape, t.stride()) for t in tensors], made)
        outer = 1 if rank == 1 else 3 * rank
        assert [found.numbers[name] for name in ("outer1", "inner1", "outer2", "inner2")] == [rank, 1, outer, 1]
        for tensor, strides in zip(tensors, found.strides):
            assert torch.equal(tile_launch.laid_out(tensor, strides), tensor)

    @pytest.mark.parametrize("tile", [*TILES, *few_rows_cases.TILES], ids=str)
    def test_every_load_of_a_walk_is_pipelined(tile: Tile) -> None:
        """Without a number of stages Triton pipelines loads that lead to products, and waits for each of the others."""
        for case in CASES:
            walk = re.findall(r"for step in (.*):", tile_triton.source([case.program(136, torch.bfloat16, tile)]))
            assert len(walk) == 1 and walk[0].endswith(f", num_stages={tile.stages})")

    @pytest.mark.parametrize(
        ("count", "early"), [(28, True), (64, False)], ids=["all fit into registers", "one after the other"]
    )
    def test_parts_are_loaded_before_they_are_added_up(count: int, early: bool) -> None:
        case = few_rows_cases.parts(16, count, 0, 16)
        tile = Tile(rows=16, columns=128, step=16, walk="rows")
        lines = tile_triton.source([case.program(128, torch.bfloat16, tile)]).splitlines()
        loads = [i for i, line in enumerate(lines) if "= tl.load(block" in line]
        sums = [i for i, line in enumerate(lines) if "tl.sum(block" in line]
        assert len(loads) == len(sums) == count // 8 + bool(count % 8)
        assert (max(loads) < min(sums)) == early
        if early:
            assert all(i < min(sums) for i, line in enumerate(lines) if "tl.load(" in line)

    @pytest.mark.parametrize(
        ("tile", "outputs", "steps"),
        [
            (Tile(rows=64, columns=4096, step=128, walk="columns"), ["down"], "32 + tl.minimum(M, 0)"),
            (Tile(rows=256, columns=64, step=64, walk="rows"), ["down", "across"], "4 + tl.minimum(M, 0)"),
            (Tile(rows=512, columns=64, step=64, walk="rows"), ["down", "across"], "8 + tl.minimum(M, 0)"),
            (Tile(rows=128, columns=64, step=64, walk="rows"), ["down", "across"], "2"),
            (Tile(rows=1024, columns=64, step=64, walk="rows"), ["down", "across"], "16"),
            (Tile(rows=256, columns=64, step=64, walk="rows"), ["across"], "4"),
            (Tile(rows=256, columns=64, step=64, walk="rows"), ["store", "down", "across"], "4"),
        ],
        ids=["along", "down", "down, 8 steps", "two steps", "a loop", "one sum", "more in a step"],
    )
    def test_the_assembler_cannot_write_out_a_walk_of_short_steps(tile: Tile, outputs: list[str], steps: str) -> None:
        """It would, h of N 4096 and R 16, and take seconds for it."""
        each: dict[str, list[Any]] = {
            "store": ["store", 0, "bfloat16"],
            "down": ["down", 0, 1],
            "across": ["across", 0, 2, "NR"],
        }
        inputs: list[Any] = [["full"], ["factor", 16, "NR"], ["thin", 16]]
        body: list[Any] = [["load", 0], *(each[name] for name in outputs)]
        assert f"range(0, {steps}," in tile_triton.source([Program(4096, "bfloat16", inputs, body, tile)])

    @pytest.mark.parametrize(
        ("sizes", "strides", "rows"),
        [
            ((3, 64, 8), (512, 8, 1), (8, 0, 0)),
            ((3, 64, 8), (768, 12, 1), (12, 0, 0)),  # columns of something wider
            ((3, 1, 8), (16, 999, 1), (16, 0, 0)),  # what a dimension of one element strides by is nothing
            ((1, 8), (999, 1), (8, 0, 0)),
            ((3, 64, 8), (8, 24, 1), (24, 64, 8)),  # transposed
            ((3, 2, 32, 8), (8, 768, 24, 1), (24, 64, 8)),
            ((3, 64, 8), (8192, 8, 1), (8, 64, 8192)),  # rows of something longer
            ((3, 40, 8), (8, 24, 1), None),  # a step of 32 rows has some of two blocks
            ((3, 2, 64, 8), (8, 24, 48, 1), None),
            ((5, 8), (1, 5), None),
        ],
    )
    def test_rows_that_are_read_and_written_where_they_are(sizes: Any, strides: Any, rows: Any) -> None:
        tile = Tile(rows=64, columns=32, step=32, walk="rows")
        body: list[Any] = [["load", 0], ["store", 0, "bfloat16"]]
        layout = (sizes, strides)
        found = tile_launch.launch(Program(8, "bfloat16", [["full"]], body, tile).dumps(), [layout], [layout])
        for value, taken in (("in0", found.strides), ("out0", found.written)):
            numbers = tuple(found.numbers[f"{value}_{name}"] for name in ("stride", "along", "apart"))
            assert numbers == (rows or (8, 0, 0))
            assert tuple(taken[0]) == (strides if rows else tuple(tile_launch.contiguous(sizes)))

    @pytest.mark.slow
    @pytest.mark.timeout(900)  # a machine that is three times as slow as usual, and busy, still passes
    @pytest.mark.parametrize("part", ["walks", "(program or sums) and not walks", "pointwise"])
    def test_in_the_interpreter(part: str) -> None:
        run_interpreted(__file__, "-k", part)

    @pytest.mark.slow
    @pytest.mark.parametrize("case", [*CASES, *expert_cases.CASES, *pointwise_cases.every()], ids=str)
    def test_compiles_for_a_gpu(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """To the machine code of an H100, which needs no GPU: the interpreter takes more than the compiler does."""
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        full = "fp32" if len(case.inputs) == 2 else "bf16"
        for tile in TILES[2:] if full == "bf16" else TILES[:1]:
            assert compiled([case.program(136, torch.bfloat16, tile)], case.mask, full).asm["cubin"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "case",
        [
            *(swiglu_backward(r, ("store", "across")) for r in (16, 64)),
            without_gradient_pairs(swiglu_backward(16, ("store", "across"))),
            norm(16).only(("across",)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("along", [0, 512])
    def test_no_step_waits_for_a_load(case: Case, along: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In what Triton makes of a walk, every matrix is on its way to shared memory some steps ahead."""
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        tile = choose(case.inputs, case.body, 8192, 4096)
        assert tile is not None and tile.rows > tile.step
        program = case.program(4096, torch.bfloat16, tile)
        ir = compiled([program], None, "bf16", laid_out=True, along=along).asm["ttgir"]
        (loop,) = re.findall(r"scf\.for .*?\n(.*?)scf\.yield", ir, re.DOTALL)
        assert "async_copy_global_to_local" in loop
        assert not re.findall(r"tt\.load .*tensor<\d+x\d+x", loop)

    @pytest.mark.slow
    def test_parts_are_brought_into_a_layout_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And not each of the 28."""
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        case = few_rows_cases.parts(16, 28, 0, 16)
        tile = choose(case.inputs, case.body, 64, 4096)
        assert tile is not None
        code = compiled([case.program(4096, torch.bfloat16, tile)], None, "bf16", laid_out=True).asm["ptx"]
        assert code.count("bar.sync") < 28

    @pytest.mark.slow
    @pytest.mark.parametrize("case", few_rows_cases.CASES, ids=str)
    def test_few_rows_compile_for_a_gpu(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        for rows in (64, 255):
            tile = choose(case.inputs, case.body, rows, 4096)
            assert tile is not None
            assert compiled([case.program(4096, torch.bfloat16, tile)], None, "bf16").asm["cubin"]

    @pytest.mark.slow
    def test_a_launch_of_several_compiles_for_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        assert compiled(few_rows_cases.joint(torch.bfloat16), None, "bf16").asm["cubin"]

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("scaled", "ranks", "starts"),
        [
            ((True,), (), ()),
            ((False, True, False), (), ()),
            ((True, True), (16, 4), ()),
            ((True, True), (8, 8), (24, 72)),
        ],
    )
    def test_sums_compile_for_a_gpu(
        scaled: tuple[bool, ...],
        ranks: tuple[int, ...],
        starts: tuple[int, ...],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        kernel = part_sums.kernel(scaled, ranks, starts, 128)
        types = {"out": "*bf16", "room": "*bf16", "parts": "*fp32", "scale": "*fp32", "P": "i32", "E": "i32"}
        signature = {name: types[name.rstrip("0123456789")] for name in kernel.arg_names}
        assert compile(ASTSource(kernel, signature, {}), target=GPUTarget("cuda", 90, 32)).asm["cubin"]


else:

    @pytest.mark.parametrize(
        ("case", "tile", "size"),
        # Every case with every walk; every walk with every size, over all cases.
        [
            *(
                (case, tile, SIZES[(i + j) % len(SIZES)])
                for i, case in enumerate(CASES)
                for j, tile in enumerate(TILES)
            ),
            *(
                (case, TILES[j], SIZES[1 + (i + j) % 3])
                for i, case in enumerate(expert_cases.CASES)
                for j in (i % 3, 3)
            ),
        ],
        ids=lambda value: f"{value.walk} {value.rows}x{value.columns}" if isinstance(value, Tile) else str(value),
    )
    def test_walks(case: Case, tile: Tile, size: tuple[int, int]) -> None:
        rows, columns = size
        tile_checks.check(case, case.program(columns, torch.float16, tile), rows, run)

    @pytest.mark.parametrize("tile", TILES, ids=str)
    @pytest.mark.parametrize("rank", [5, 16])
    def test_program_of_a_matrix_times_rows_and_columns(rank: int, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
        """Which bfloat16 alone has, and the interpreter has not."""
        monkeypatch.setattr(tile_factors, "DTYPES", ("float16",))
        tile_triton.kernel.cache_clear()
        case = norm(rank).only(("across",))
        program = case.program(136, torch.float16, tile)
        assert "v4" not in tile_triton.source([program])
        tile_checks.check(case, program, 131, run)
        tile_triton.kernel.cache_clear()

    def test_sums_of_experts_parts() -> None:
        expert_cases.check_sums(tile_experts.run)

    def test_programs_with_the_masks_of_experts() -> None:
        expert_cases.check_masks(run)

    def test_programs_with_anything_in_nobodys_rows() -> None:
        expert_cases.check_nobodys_rows(run)
        expert_cases.check_left(run)

    @pytest.mark.parametrize("case", HIGH_RANKS, ids=str)
    def test_program_of_a_high_rank(case: Case) -> None:
        """In the tile that is chosen for many rows."""
        rows, columns = SIZES[-1]
        tile = choose(case.inputs, case.body, 8192, columns)
        assert tile is not None
        tile_checks.check(case, case.program(columns, torch.float16, tile), rows, run)

    @pytest.mark.parametrize("case", CASES[::3], ids=str)
    def test_program_with_a_batch(case: Case) -> None:
        tile_checks.check(case, case.program(72, torch.float16, TILES[0]), 90, run, batch=3)

    @pytest.mark.parametrize(("case", "tile"), [(c, TILES[i % len(TILES)]) for i, c in enumerate(ORDERED)], ids=str)
    def test_program_with_sequences_in_turns(case: Case, tile: Tile) -> None:
        tile_checks.check_order(case, case.program(72, torch.float16, tile), run)

    @pytest.mark.parametrize(
        ("case", "tile", "size"),
        [
            (case, tile, few_rows_cases.SIZES[(i + j) % 3])
            for i, case in enumerate(few_rows_cases.CASES)
            for j, tile in enumerate(few_rows_cases.TILES)
        ],
        ids=str,
    )
    def test_program_of_few_rows(case: Case, tile: Tile, size: tuple[int, int]) -> None:
        rows, columns = size
        tile_checks.check(case, case.program(columns, torch.float16, tile), rows, run)

    def test_program_with_the_largest_of_what_is_not_finite() -> None:
        tile_checks.check_not_finite(run, torch.float16)

    def test_programs_that_share_a_launch() -> None:
        few_rows_cases.check_joint(tile_launch.run, torch.float16)

    def test_sums_of_parts() -> None:
        test_part_sums.check(part_sums.run, torch.float32)
        test_part_sums.check_stacked(part_sums.run, torch.float32)
        test_part_sums.check_beside(
            lambda room, parts, scales, starts: part_sums.run(parts, scales, room.dtype, True, room, starts)[0],
            part_sums.run,
            torch.float32,
        )

    @pytest.mark.parametrize("case", pointwise_cases.every(), ids=str)
    def test_pointwise(case: Case) -> None:
        pointwise_cases.check(case, run)
