"""Kernels that another process compiles, for a GPU that is not here."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.passes import tile_cases
from tests.passes.tile_cases import CASES, TILES

pytest.importorskip("triton", reason="needs Triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor

from lora_fx.passes.kernels import compile_ahead, compile_worker, part_sums, tile_launch, tile_triton

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
Kernel = tuple[Any, list[Any], dict[str, Any]]
"""The function, its arguments (tensors as mocks), and constants and options."""


@pytest.fixture
def hits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Of each kernel that this process asks for, whether it lay in the cache; with an H100 to compile for."""
    found: list[bool] = []
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(cache_hit), raising=False
    )
    driver.set_active(compile_worker.Device(GPUTarget("cuda", 90, 32)))
    yield found
    driver._active = None


def mocked(arguments: list[Any]) -> list[Any]:
    return [MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in arguments]


def of_sums() -> Kernel:
    parts = [torch.empty(4, 160, rank) for rank in (16, 4)]
    scales = [None, torch.empty(())]
    arguments = part_sums.arguments(part_sums.empty(parts, torch.bfloat16, True), parts, scales)
    return part_sums.kernel((False, True), (16, 4)), mocked(arguments), {}


def of_program(name: str) -> Kernel:
    case = next(case for case in CASES if case.name.startswith(name))
    program = case.program(136, torch.bfloat16, TILES[0])
    inputs = tile_cases.operands(program, 160)
    arguments = tile_launch._arguments(program, inputs, tile_cases.outputs(program, inputs, 160))
    return tile_triton.kernel(program.dumps()), mocked(arguments.positional), arguments.named


def check(kernel: Kernel, hits: list[bool]) -> None:
    function, arguments, named = kernel
    workers = compile_ahead.Workers()
    workers.compile(function, arguments, named)
    assert workers.usable and not hits
    function.warmup(*arguments, **named, grid=(1, 1))
    assert hits == [True]

    (process,) = (workers.idle.get_nowait(),)
    workers.idle.put(process)
    workers.close()
    assert process.returncode == 0


def test_a_process_finds_what_another_compiled(hits: list[bool]) -> None:
    """The same key in Triton's cache, to which source, types, alignment, options and target belong."""
    check(of_sums(), hits)


@pytest.mark.slow
@pytest.mark.parametrize("name", [CASES[0].name, "infinite", "dropout"])
def test_programs(name: str, hits: list[bool]) -> None:
    check(of_program(name), hits)


def test_what_does_not_compile_is_left_to_the_caller(hits: list[bool]) -> None:
    """The process says why, and goes on."""
    function, arguments, named = of_sums()
    workers = compile_ahead.Workers()
    folder = triton.knobs.cache.dir
    assert "missing" in workers._ask(compile_ahead._job(function, arguments[1:], named, folder))
    assert workers._ask(compile_ahead._job(function, arguments, named, folder)) == ""
    workers.close()


@pytest.mark.parametrize("executable", [shutil.which("false"), "/no/such/python"])
def test_no_processes(executable: str, hits: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none can be started, or it ends at once, nothing is asked of them again."""
    monkeypatch.setattr(sys, "executable", executable)
    workers = compile_ahead.Workers()
    workers.compile(*of_sums())
    assert not workers.usable and workers.idle.empty()
    workers.compile(*of_sums())
    assert not hits
