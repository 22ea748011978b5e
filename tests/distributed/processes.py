"""Real ranks: a function of a test, run in several processes. A rank that hangs says where, and none is left.

def body(rank: int, folder: Path, size: int) -> object: ...    # a function at the top of a module of tests

results = run_ranks(body, 2, tmp_path, size=3)                 # what each rank returned, by rank
"""

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.distributed.rank import log_file, main, result_file

ROOT = Path(__file__).resolve().parents[2]
GRACE = 10.0
"""Seconds that the other ranks get to say what they saw, after one failed."""

# Ranks are forked from a server that has imported torch, which takes longer than most of what they do. It starts with
# the first rank and ends with this process. Nothing of the package is imported there: the server has another sys.path.
# Where there is a GPU the server imports nothing: these modules look for it, and then no fork may use it.
CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "tests.distributed.warm",
]
CONTEXT.set_forkserver_preload([] if torch.cuda.is_available() else PRELOAD)
SERVER = {
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
}
"""Its environment beside this process's own: libraries read these when they are loaded."""


class RankFailed(AssertionError):
    """A rank raised, hung or died; the text holds the end of every rank's output."""


def run_ranks(
    body: Callable[..., Any],
    world: int,
    folder: Path,
    *,
    timeout: float = 240.0,
    backend: str = "gloo",
    **arguments: Any,
) -> list[Any]:
    """Run ``body(rank, folder, **arguments)`` in `world` processes that form the default process group.

    Args:
        body: a function at the top level of an importable module.
        world: number of processes.
        folder: for the rendezvous, the outputs, and whatever the ranks leave for one another.
        timeout: seconds after which a rank that still runs writes the stacks of its threads and dies.
        backend: "gloo", or "nccl", where each rank has a GPU of its own.
        **arguments: whatever can be pickled.

    Returns:
        What each rank returned, by rank, as JSON has it.

    Raises:
        RankFailed: a rank raised, hung or died.
    """
    with ranks(body, world, folder, timeout, arguments, backend) as processes:
        wait(processes, folder, timeout)
    return [json.loads(result_file(folder, rank).read_text()) for rank in range(world)]


@contextlib.contextmanager
def ranks(
    body: Callable[..., Any],
    world: int,
    folder: Path,
    timeout: float,
    arguments: dict[str, Any],
    backend: str = "gloo",
) -> Iterator[list[ForkServerProcess]]:
    """Start the ranks, each in a session of its own, with torchrun's variables; end all at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / "rendezvous", *folder.glob("result-*.json")]:
        stale.unlink(missing_ok=True)
    processes: list[ForkServerProcess] = []
    try:
        with mock.patch.dict(os.environ, SERVER):
            for rank in range(world):
                process = CONTEXT.Process(
                    target=main, args=(body, rank, world, folder, timeout, backend, dict(os.environ), arguments)
                )
                process.start()
                processes.append(process)
        yield processes
    finally:
        for process in processes:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with everything that it started
            process.kill()  # one that has no session yet
        for process in processes:
            process.join()


def wait(processes: list[ForkServerProcess], folder: Path, timeout: float) -> None:
    """Wait until all ranks have returned.

    Raises:
        RankFailed: one did not.
    """
    deadline = time.monotonic() + timeout + GRACE
    while any(process.exitcode is None for process in processes):
        failed = any(process.exitcode not in (None, 0) for process in processes)
        deadline = min(deadline, time.monotonic() + GRACE) if failed else deadline
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [process.exitcode for process in processes]
    if any(code != 0 for code in codes):
        logs = [f"---- rank {rank}, exit status {code}\n{tail(folder, rank)}" for rank, code in enumerate(codes)]
        raise RankFailed("\n".join(["not every rank came to its end", *logs]))


def tail(folder: Path, rank: int, lines: int = 60) -> str:
    """The end of what a rank printed."""
    file = log_file(folder, rank)
    return "\n".join(file.read_text(errors="replace").splitlines()[-lines:]) if file.exists() else "(nothing)"
