"""Kernels are compiled ahead of their first run, in Inductor's worker processes where there are any.

Without a GPU: a driver that says it is an H100 makes Triton compile for one, down to machine code, and what would load
and launch that does nothing.
"""

import contextlib
import functools
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lora_fx.passes import _torch
from lora_fx.passes.kernels import jit, part_sums, tile_launch, tile_triton
from lora_fx.passes.kernels.tile_program import Program, Tile

DEVICE = torch.device("cuda", 0)


class Driver:
    """What Triton asks of a GPU's driver."""

    def __init__(self) -> None:
        self.utils = self
        self.launched: list[str] = []

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def load_binary(self, name: str, *found: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: self.launched.append(source.name)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Driver]:
    """An H100 to compile for, and an empty cache."""
    found = Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)  # restored with the others, whatever sets it
    for functions in (tile_triton.kernel, part_sums.kernel):
        functions.cache_clear()
    yield found
    for functions in (tile_triton.kernel, part_sums.kernel):
        functions.cache_clear()


def program(columns: int = 32) -> str:
    """h, a sum over columns."""
    body: list[Any] = [["load", 0], ["down", 0, 1]]
    tile = Tile(rows=16, columns=32, step=32, walk="columns")
    return Program(columns, "bfloat16", [["full"], ["factor", 16, "NR"]], body, tile).dumps()


def prepare(columns: int = 32) -> None:
    """Begin to compile that, for 48 rows."""
    like = torch.empty
    inputs = [like(48, columns, dtype=torch.bfloat16), like(columns, 16, dtype=torch.bfloat16)]
    tile_launch.prepare(program(columns), inputs, [like(48, 16, dtype=torch.bfloat16)])


def prepare_many_sums() -> None:
    """Also of one part, which Triton makes a constant, and of sizes that are not multiples of 16."""
    parts = [torch.empty(1 + i % 3, 16 - i) for i in range(5)]
    part_sums.prepare(parts, [None, torch.empty(()), None, None, None], torch.bfloat16, False)
    side_by_side = [torch.empty(1, 48, 16), torch.empty(2, 48, 4), torch.empty(9, 48, 7)]
    part_sums.prepare(side_by_side, [torch.empty(()), None, None], torch.bfloat16, True)
    part_sums.prepare([torch.empty(1, 1)], [None], torch.bfloat16, False)


def prepare_sums() -> None:
    part_sums.prepare([torch.empty(4, 48, 16), torch.empty(3, 7)], [None, torch.empty(())], torch.bfloat16, False)


def finish(compiler: jit.Compiler, *, needed: bool = False) -> None:
    """Wait for all that was begun, which must succeed; as a launch does (`needed`), or until it is done by itself."""
    for key, (future, _) in list(compiler.started.items()):
        if needed:
            compiler.wait(key)
        assert future.exception() is None
        compiler.wait(key)


def cubins(folder: Path) -> dict[str, bytes]:
    """What was compiled, by the key in Triton's cache and the kernel's name."""
    return {f"{file.parent.name} {file.stem}": file.read_bytes() for file in folder.glob("*/*.cubin")}


class Inline:
    """A pool of workers: what is sent is pickled, and done at once in this process (or goes wrong)."""

    def __init__(self, then: Callable[[Any], Any] = lambda key: key) -> None:
        self.process = self
        self.keys: list[str] = []
        self.then = then

    def poll(self) -> None:
        """It lives."""

    def submit(self, work: Callable[[], str]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            self.keys.append(pickle.loads(pickle.dumps(work))())
            future.set_result(self.then(self.keys[-1]))
        except Exception as error:
            future.set_exception(error)
        return future


def done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


@pytest.fixture
def compiler(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> jit.Compiler:
    """A compiler of this test's own, which prepares what is to be launched."""
    found = jit.Compiler()
    for module in (tile_launch, part_sums):
        monkeypatch.setattr(module, "compiler", lambda: found)
    return found


def use(monkeypatch: pytest.MonkeyPatch, pool: Any, started: Future[Any] | None = None) -> None:
    workers = None if pool is None else _torch.Workers(pool, started or done())
    monkeypatch.setattr(jit, "compile_workers", lambda: workers)


def refuse_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: whatever is not in the cache is an error."""

    def make_ir(*arguments: Any) -> None:
        raise AssertionError("this kernel was not in the cache")

    monkeypatch.setattr(ASTSource, "make_ir", make_ir)


@pytest.mark.slow
def test_workers_of_inductor_fill_the_cache(
    compiler: jit.Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its real processes: what they compile is what Triton looks for here, so nothing is compiled here."""
    from torch._inductor.async_compile import shutdown_compile_workers

    with torch._inductor.config.patch(compile_threads=2):
        try:
            with monkeypatch.context() as patch:
                refuse_to_compile(patch)
                prepare()
                prepare_sums()
                finish(compiler)
        finally:
            shutdown_compile_workers()
    assert compiler.trusts_workers
    theirs = cubins(tmp_path)
    assert len(theirs) == 2
    # The same machine code as a thread gives.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "threads"))
    use(monkeypatch, None)
    tile_triton.kernel.cache_clear()
    part_sums.kernel.cache_clear()
    prepare()
    prepare_sums()
    finish(compiler)
    assert cubins(tmp_path / "threads") == theirs


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "all"])
def test_a_worker_that_dies(who: str, compiler: jit.Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The process that does the work, or the one that all of them were started by."""
    from torch._inductor.async_compile import shutdown_compile_workers

    with torch._inductor.config.patch(compile_threads=2):
        try:
            workers = _torch.compile_workers()
            assert workers is not None and workers.are_ready(Future(), 60.0)
            if who == "all":
                workers.pool.process.kill()
            monkeypatch.setattr(jit.Job, "run", functools.partial(os._exit, 1))
            began = time.monotonic()
            prepare()
            finish(compiler)
            assert time.monotonic() - began < 20.0
        finally:
            shutdown_compile_workers()
    assert len(cubins(tmp_path)) == 1


def test_a_job_is_what_triton_compiles(compiler: jit.Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its key is the one that Triton looks for, for sizes that are multiples of 16 and others."""
    pool = Inline()
    use(monkeypatch, pool)
    for columns in (32, 40):
        prepare(columns)
    prepare_sums()
    finish(compiler)
    assert compiler.trusts_workers and len(set(pool.keys)) == 3 == len(cubins(tmp_path))


@pytest.mark.parametrize("fails", [False, True])
def test_a_job_builds_what_launches_the_kernel(
    fails: bool, compiler: jit.Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In Triton 3.6, where that is a C module for each; a failure is not the job's."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    built = []

    def launcher(source: ASTSource, metadata: Any) -> None:
        built.append(source.name)
        if fails:
            raise AssertionError("libcuda.so cannot found!")

    monkeypatch.setattr(driver, "make_launcher", None, raising=False)
    monkeypatch.setattr(driver, "CudaLauncher", launcher)
    use(monkeypatch, Inline())
    with caplog.at_level("DEBUG", "lora_fx.passes"):
        prepare()
        finish(compiler)
    assert len(built) == 1 and compiler.trusts_workers
    said = [record.message for record in caplog.records]
    assert said == [f"no launcher for {built[0]} was built in a worker"] * fails


def test_a_job_leaves_the_environment_as_it_is(driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker serves Inductor next, whose variables may be others."""
    monkeypatch.setenv("TRITON_DEBUG", "1")
    before = dict(os.environ)
    with jit._environment({"TRITON_CACHE_DIR": str(tmp_path / "other"), "TRITON_ALLOW_NON_CONSTEXPR_GLOBALS": "0"}):
        assert os.environ["TRITON_CACHE_DIR"].endswith("other") and "TRITON_DEBUG" not in os.environ
    assert dict(os.environ) == before


def failing(job: jit.Job) -> str:
    raise RuntimeError("the worker ran out of memory")


@pytest.mark.parametrize("what", ["none", "fails", "is late", "closed", "did not start", "starts too late"])
def test_threads_do_what_workers_do_not(
    what: str, compiler: jit.Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel is compiled, whatever becomes of the workers; nothing is raised, and nobody waits for them."""
    pool, started = Inline(), done()
    monkeypatch.setattr(jit, "PATIENCE", 0.2)
    if what == "fails":
        monkeypatch.setattr(jit.Job, "run", failing)
    elif what == "is late":
        monkeypatch.setattr(pool, "submit", lambda work: Future())
    elif what == "closed":
        monkeypatch.setattr(pool, "submit", None)
    elif what == "did not start":
        started = Future()
        started.set_exception(RuntimeError("SubprocPool closed"))
    elif what == "starts too late":
        monkeypatch.setattr(jit, "PATIENCE", 600.0)
        started = Future()  # never; the kernel is needed before
    use(monkeypatch, None if what == "none" else pool, started)
    prepare()
    finish(compiler, needed=True)
    assert not pool.keys and len(cubins(tmp_path)) == 1
    assert compiler.trusts_workers == (what != "is late")  # the next kernel would wait for them as long


def test_another_key_ends_the_use_of_workers(compiler: jit.Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they compile would be thrown away, each time."""
    pool = Inline(then=lambda key: "another key")
    use(monkeypatch, pool)
    prepare(32)
    finish(compiler)
    assert not compiler.trusts_workers
    prepare(64)
    finish(compiler)
    assert len(pool.keys) == 1


@pytest.mark.parametrize(
    ("walk", "steps"), [("columns", "range(0, 32 + tl.minimum(M, 0))"), ("rows", "range(0, 64)")], ids=["along", "down"]
)
def test_the_assembler_cannot_write_out_a_walk_of_short_steps(walk: str, steps: str) -> None:
    """It would, h of N 4096 and R 16, and take seconds for it; a walk down the rows is longer, or has longer steps."""
    body: list[Any] = [["load", 0], ["down", 0, 1]]
    tile = Tile(rows=64, columns=4096, step=128, walk=walk) if walk == "columns" else Tile(8192, 64, 128, "rows")
    assert steps in tile_triton.source([Program(4096, "bfloat16", [["full"], ["factor", 16, "RN"]], body, tile)])


def test_sums_of_every_kind_compile(compiler: jit.Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, None)
    prepare_many_sums()
    finish(compiler)
    assert len(cubins(tmp_path)) == 3


def test_a_worker_with_another_key_compiles_nothing(
    compiler: jit.Compiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so at once, and it is said once; kernels that were begun before are not sent, either."""
    pool, began = Elsewhere(), Future[None]()
    use(monkeypatch, pool, began)
    compiler.threads = ThreadPoolExecutor(max_workers=1)
    with caplog.at_level("DEBUG", "lora_fx.passes"):
        for columns in (32, 40, 64):
            prepare(columns)
        began.set_result(None)
        finish(compiler)
    said = [record.message for record in caplog.records]
    assert len(said) == 1 and "has another key in a worker" in said[0]
    assert pool.keys == ["another key"] and len(cubins(tmp_path)) == 3


class Elsewhere(Inline):
    """Workers in which Triton's key is another one."""

    def submit(self, work: Callable[[], str]) -> Future[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jit, "_key", lambda *found: "another key")
            patch.setattr(triton, "compile", None)
            return super().submit(work)


def test_the_key_names_the_assembler_that_is_used(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton had been asked for the key before torch's assembler was chosen, as Inductor does for each plain kernel."""

    def assembler() -> str:
        return str(triton.compiler.make_backend(driver.get_current_target()).hash())

    _torch.follow_assembler()
    own = assembler()
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.9, V13.9.1\n")
    other.chmod(0o700)
    with monkeypatch.context() as patch:
        for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):  # which of them, hangs on the release
            patch.setenv(name, str(other))
        assert assembler() == own
        _torch.prepare_triton(0)
        assert "V13.9.1" in assembler()
        with jit._environment({}):  # a worker whose parent has chosen another
            assert assembler() == own
        assert "V13.9.1" in assembler()
    _torch.follow_assembler()
    assert assembler() == own


@pytest.mark.parametrize(
    "config", [{"compile_threads": 1}, {"worker_start_method": "fork"}, {"triton.proton_profiling": True}], ids=str
)
def test_where_inductor_has_no_workers(config: dict[str, Any]) -> None:
    with torch._inductor.config.patch(compile_threads=2), torch._inductor.config.patch(config):
        assert _torch.compile_workers() is None


def test_triton_is_prepared_as_by_inductor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that a later process, in which Inductor compiles first, finds the kernels."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    _torch.prepare_triton(3)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton" / "3")
    _torch.prepare_triton(4)
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "triton" / "3")
