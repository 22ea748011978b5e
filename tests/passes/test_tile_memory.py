"""The shared memory that kernels need: bounds hold for what Triton compiles, and decide what is launched."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from lora_fx.passes.kernels import tile_memory, tile_triton
from lora_fx.passes.kernels.tile_choice import choose
from lora_fx.passes.kernels.tile_names import Names
from lora_fx.passes.kernels.tile_program import Program, Tile, join, loads, split
from lora_fx.passes.tile_writer import _inputs_of
from tests.passes import expert_cases, few_rows_cases
from tests.passes.high_rank_cases import HIGH_RANKS
from tests.passes.tile_cases import CASES, Case, swiglu_backward_written

LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
"""Bytes of shared memory that a program may have, by compute capability."""


def needed(program: Program, capability: int, *, whole: bool = False) -> int:
    """Bytes of shared memory, as compiled for values in bfloat16 and sizes that are multiples of 16.

    Triton lays it out before it makes code, which takes longest; `whole`, as it says when it has made LLVM's.
    """
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource, compile

    names, signature, constants, attributes = Names(program), {}, {}, {}
    kinds = dict(zip(names.inputs, (kind[0] for kind in program.inputs)))
    types = {"number": "*fp32", "parts": "*fp32", "seed": "*i64", "ends": "*i32"}
    stores = dict(zip(names.outputs, program.outputs))
    for place, name in enumerate(names.all):
        if name in kinds:
            signature[name] = types.get(kinds[name], "*bf16")
        elif name in stores:
            as_it_is = program.is_whole(stores[name]) and stores[name][-1] != "float32"
            signature[name] = "*bf16" if as_it_is else "*fp32"
        elif name in names.constants:
            values = {"stride": program.columns, "along": 0, "apart": 0, "ROWS": True}
            signature[name], constants[name] = "constexpr", values[name.rpartition("_")[2]]
        elif "inner" in name:
            wide = "RN" in program.inputs[int(name.removeprefix("inner"))]
            signature[name] = "i32" if wide else "constexpr"
            constants |= {} if wide else {name: 1}
        elif "outer" in name and "RN" in program.inputs[int(name.removeprefix("outer"))]:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        if signature[name] != "constexpr" and kinds.get(name) != "seed":
            attributes[(place,)] = [["tt.divisibility", 16]]
    kernel = tile_triton.kernel(program.dumps())
    options = {"num_warps": program.tile.warps, "num_stages": program.tile.stages}
    target = GPUTarget("cuda", capability, 32)
    source = ASTSource(kernel, signature, constants, attributes)
    with pytest.MonkeyPatch.context() as patch:
        if whole:
            for step in ("make_ptx", "make_cubin"):
                patch.setattr(CUDABackend, step, lambda self, code, metadata, *more: metadata.update(name="k") or b"")
            return int(compile(source, target=target, options=options).metadata.shared)
        patch.setattr(CUDABackend, "make_llir", allocate)
        with pytest.raises(Allocated) as found:
            compile(source, target=target, options=options)
    return found.value.size


def triton_version() -> tuple[int, ...]:
    """Its first two numbers."""
    from triton import __version__

    return tuple(map(int, __version__.split(".")[:2]))


class Allocated(Exception):
    """How much shared memory a kernel needs."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def allocate(self: Any, module: Any, metadata: dict[str, Any], options: Any, capability: int) -> None:
    """The beginning of Triton's `make_llir`: up to where shared memory is laid out (3.6 to 3.9)."""
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.nvidia.compiler import get_ptx_version_from_options

    manager = ir.pass_manager(module.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager, *([False] if triton_version() >= (3, 9) else []))
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    ptx = get_ptx_version_from_options(options, self.target.arch)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, capability, ptx)
    manager.run(module, "allocate")
    raise Allocated(module.get_int_attr("ttg.shared"))


MANY_ROWS, FEW_ROWS = (8192, 14336), (64, 4096)
PROGRAMS = [
    *((case, MANY_ROWS) for case in (*CASES, *HIGH_RANKS, *expert_cases.CASES)),
    *((case, FEW_ROWS) for case in few_rows_cases.CASES),
]


@pytest.mark.slow
@pytest.mark.timeout(900)  # a machine that is three times as slow as usual, and busy, still passes
@pytest.mark.parametrize(
    ("case", "size", "capability", "stages"),
    [
        *((*program, 90, None) for program in PROGRAMS),
        *((*program, 90, 1) for program in PROGRAMS),
        *((*program, 80, None) for program in PROGRAMS[::2]),
        *((*program, 100, None) for program in PROGRAMS[1::2]),
    ],
    ids=str,
)
def test_kernels_need_no_more(
    case: Case,
    size: tuple[int, int],
    capability: int,
    stages: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With as many stages as are chosen, and on Hopper with one."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if (tile := choose(case.inputs, case.body, *size)) is None:
        pytest.skip("no kernel is chosen")
    tile = dataclasses.replace(tile, stages=stages or tile.stages)
    program = _without_unread(case.program(size[1], torch.bfloat16, tile))
    try:
        bytes_needed = needed(program, capability)
    except RuntimeError:
        if capability == 100 and triton_version() < (3, 9):
            pytest.skip(
                "this Triton does not compile every program for Blackwell: 3.6 fails in its passes, 3.9 does not"
            )
        raise
    assert bytes_needed <= tile_memory.bound(program, (2,) * len(program.inputs), capability // 10)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_what_is_laid_out_is_what_triton_says(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And chosen programs become code on every generation."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for case, size in PROGRAMS[::9]:
        if (tile := choose(case.inputs, case.body, *size)) is not None:
            program = _without_unread(case.program(size[1], torch.bfloat16, tile))
            assert needed(program, capability) == needed(program, capability, whole=True), case


def _without_unread(program: Program) -> Program:
    """Inputs that no statement names, which programs of graphs do not have, become numbers: they need no memory."""
    read = {index for statement in program.body for index in _inputs_of(statement)}
    kept = [kind if i in read or kind[0] == "ends" else ["number"] for i, kind in enumerate(program.inputs)]
    return dataclasses.replace(program, inputs=kept)


def pair(stages: int = 3) -> Program:
    """g and dB of dy with N 14336: what comes nearest to the limit of an H100."""
    body: list[Any] = [["load", 0], ["down", 0, 1], ["across", 0, 2, "NR"]]
    tile = Tile(rows=1024, columns=512, step=64, walk="rows", strips=4, stages=stages)
    return Program(14336, "bfloat16", [["full"], ["factor", 16, "NR"], ["thin", 16]], body, tile)


@pytest.mark.parametrize(
    ("capability", "limit", "stages"),
    [((9, 0), LIMITS[90], 3), ((10, 0), LIMITS[100], 1), ((8, 6), LIMITS[86], None)],
    ids=["fits", "fits with a shallower pipeline", "may not fit"],
)
def test_what_is_launched(capability: Any, limit: int, stages: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(major=capability[0], minor=capability[1], shared_memory_per_block_optin=limit)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    text = tile_memory.fitted(pair().dumps(), [2, 2, 2], torch.device("cuda", 0))
    assert (None if text is None else loads(text).tile.stages) == stages
    both = tile_memory.fitted(join([pair().dumps()] * 2), [2] * 6, torch.device("cuda", 0))
    assert (None if both is None else [p.tile.stages for (p,) in split(both)]) == (stages and [stages] * 2)


def test_products_of_a_high_rank_keep_their_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """SwiGLU backward of rank 128 takes 597 us of an H200 with 3 stages, and 799 with 2."""
    found = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=LIMITS[90])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    case = swiglu_backward_written(128)
    tile = choose(case.inputs, case.body, *MANY_ROWS)
    assert tile is not None
    program = case.program(MANY_ROWS[1], torch.bfloat16, tile)
    text = tile_memory.fitted(program.dumps(), [2] * len(program.inputs), torch.device("cuda", 0))
    assert text is not None
    assert loads(text).tile.stages == tile.stages == 3


def fitted_high(capability: int, *more: list[Any], monkeypatch: pytest.MonkeyPatch) -> Program | None:
    """silu(gate) * up of rank 64, h of it and `more`, as it is launched of many rows, if it is."""
    limit = LIMITS[capability]
    found = SimpleNamespace(major=capability // 10, minor=capability % 10, shared_memory_per_block_optin=limit)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    case = next(case for case in HIGH_RANKS if str(case) == "SwiGLU, ranks 64 and 64")
    case = dataclasses.replace(case, body=[*case.body, *more])
    chosen = choose(case.inputs, case.body, *MANY_ROWS)
    assert chosen is not None
    program = _without_unread(case.program(MANY_ROWS[1], torch.bfloat16, chosen))
    text = tile_memory.fitted(program.dumps(), [2] * len(program.inputs), torch.device("cuda", 0))
    return None if text is None else loads(text)


HIGH_TILES = {90: (128, 8, 3), 80: (128, 8, 2), 86: (64, 4, 2), 89: (64, 4, 2)}
"""Rows, warps and stages, by compute capability."""


@pytest.mark.parametrize("capability", HIGH_TILES)
def test_high_tiles_are_halved_before_their_pipeline_ends(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With their warps: in 64 rows of 8 warps it takes 505 us where 4 take 302, and 128 rows 252 (`tile_choice`)."""
    program = fitted_high(capability, monkeypatch=monkeypatch)
    assert program is not None
    assert (program.tile.rows, program.tile.warps, program.tile.stages) == HIGH_TILES[capability]


@pytest.mark.slow
@pytest.mark.parametrize("capability", HIGH_TILES)
def test_halved_tiles_fit(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    program = fitted_high(capability, monkeypatch=monkeypatch)
    assert program is not None
    bound = tile_memory.bound(program, (2,) * len(program.inputs), capability // 10)
    assert needed(program, capability) <= bound < LIMITS[capability]


@pytest.mark.parametrize("capability", HIGH_TILES)
@pytest.mark.parametrize("is_high", [False, True], ids=["chosen", "128 rows"])
def test_a_part_for_each_tile_of_rows_keeps_their_height(
    capability: int, is_high: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph has allocated the parts by then: 64 rows are chosen at once, and 128 would not be launched as 64."""
    if is_high:
        high = Tile(rows=128, columns=7168, step=64, walk="columns", warps=8, stages=3)
        monkeypatch.setattr("tests.passes.test_tile_memory.choose", lambda *given: high)
    stored = next(case for case in HIGH_RANKS if str(case) == "SwiGLU, ranks 64 and 64").body
    value = next(statement[1] for statement in stored if statement[0] == "store")
    fit = fitted_high(capability, ["largest", value], monkeypatch=monkeypatch)
    rows = None if fit is None else fit.tile.rows
    assert rows == ((128 if capability in (80, 90) else None) if is_high else 64)


def test_larger_numbers_need_more() -> None:
    assert tile_memory.bound(pair(), (4, 2, 2), 9) > LIMITS[90] > tile_memory.bound(pair(), (2, 2, 2), 9)


def test_elsewhere_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert tile_memory.fitted(pair().dumps(), [2, 2, 2], torch.device("cuda", 0)) is None
