"""Real ranks: a function of a test, run in several processes over gloo. A rank that hangs says where, and none is left.

def body(rank: int, folder: Path, size: int) -> object: ...    # a function at the top of a module of tests

results = run_ranks(body, 2, tmp_path, size=3)                 # what each rank returned, by rank
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GRACE = 10.0
"""Seconds that the other ranks get to say what they saw, after one failed."""


class RankFailed(AssertionError):
    """A rank raised, hung or died; the text holds the end of every rank's output."""


def run_ranks(
    body: Callable[..., Any],
    world: int,
    folder: Path,
    *,
    timeout: float = 240.0,
    environment: dict[str, str] | None = None,
    **arguments: Any,
) -> list[Any]:
    """Run ``body(rank, folder, **arguments)`` in `world` processes that form the default process group.

    Args:
        body: a function at the top level of an importable module.
        world: number of processes.
        folder: for the rendezvous, the outputs, and whatever the ranks leave for one another.
        timeout: seconds after which a rank that still runs writes the stacks of its threads and dies.
        environment: variables of the ranks beside those of this process.
        **arguments: as JSON has them.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankFailed: a rank raised, hung or died.
    """
    target = f"{body.__module__}:{body.__qualname__}"
    command = [sys.executable, "-m", "tests.distributed.rank", target, json.dumps(arguments)]
    with ranks(command, world, folder, timeout=timeout, environment=environment) as processes:
        wait(processes, folder, timeout)
    return [json.loads(result_file(folder, rank).read_text()) for rank in range(world)]


@contextlib.contextmanager
def ranks(
    command: list[str],
    world: int,
    folder: Path,
    *,
    timeout: float,
    environment: dict[str, str] | None = None,
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start `command` once for each rank, in a session of its own, with torchrun's variables; end all at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in [folder / "rendezvous", *folder.glob("result-*.json")]:
        stale.unlink(missing_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(world):
            env = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")]),
                "PYTHONUNBUFFERED": "1",
                "OMP_NUM_THREADS": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LORA_FX_TEST_FOLDER": str(folder),
                "LORA_FX_TEST_TIMEOUT": str(timeout),
                **(environment or {}),
            }
            with log_file(folder, rank).open("wb") as log:
                # The pipe is never written: a rank whose parent died reads its end, and goes too.
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=env,
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with everything that it started
        for process in processes:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()


def wait(processes: list[subprocess.Popen[bytes]], folder: Path, timeout: float) -> None:
    """Wait until all ranks have returned.

    Raises:
        RankFailed: one did not.
    """
    deadline = time.monotonic() + timeout + GRACE
    while any(process.poll() is None for process in processes):
        failed = any(process.returncode not in (None, 0) for process in processes)
        deadline = min(deadline, time.monotonic() + GRACE) if failed else deadline
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = [process.poll() for process in processes]
    if any(code != 0 for code in codes):
        logs = [f"---- rank {rank}, exit status {code}\n{tail(folder, rank)}" for rank, code in enumerate(codes)]
        raise RankFailed("\n".join(["not every rank came to its end", *logs]))


def log_file(folder: Path, rank: int) -> Path:
    """What a rank printed."""
    return folder / f"rank-{rank}.log"


def result_file(folder: Path, rank: int) -> Path:
    """What a rank's body returned."""
    return folder / f"result-{rank}.json"


def tail(folder: Path, rank: int, lines: int = 60) -> str:
    """The end of what a rank printed."""
    return "\n".join(log_file(folder, rank).read_text(errors="replace").splitlines()[-lines:])
