"""The harness of the distributed tests itself: failures are told, and no process outlives a test."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed

from tests.distributed import rank as entry
from tests.distributed.processes import ROOT, RankFailed, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def total(rank: int, folder: Path, start: int) -> dict[str, int]:
    value = torch.tensor([start + rank])
    torch.distributed.all_reduce(value)
    return {"rank": rank, "total": int(value), "pid": os.getpid()}


def fail(rank: int, folder: Path) -> None:
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if rank == 1:
        raise ValueError("rank one is unhappy")
    torch.distributed.barrier()


def crash(rank: int, folder: Path) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    torch.distributed.barrier()


def hang(rank: int, folder: Path) -> None:
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / f"pid-child-{rank}").write_text(str(child.pid))
    if rank == 0:
        wait_for_godot()
    torch.distributed.barrier()


def hang_unwatched(rank: int, folder: Path) -> None:
    """As `hang`, but the thread of rank 1 that waits for the parent comes too late."""
    in_time = entry.kill_orphans
    if rank == 1:
        entry.kill_orphans = lambda: in_time() if threading.current_thread() is threading.main_thread() else None
    hang(rank, folder)


def wait_for_godot() -> None:
    time.sleep(600)


def orphan(folder: Path, body: str) -> None:
    """Stands in for a pytest that is killed: starts ranks that hang, and never comes to its end."""
    run_ranks(globals()[body], 2, folder, timeout=300)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z" if os.path.isdir("/proc") else True


def gone(folder: Path, names: list[str], seconds: float = 20.0) -> None:
    """All processes whose ids are in these files end before long."""
    pids = [int((folder / name).read_text()) for name in names]
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, f"still running: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.1)


def test_results_come_back_by_rank(tmp_path):
    results = run_ranks(total, 2, tmp_path, start=5)
    assert [(r["rank"], r["total"]) for r in results] == [(0, 11), (1, 11)]
    assert not any(alive(r["pid"]) for r in results)


def test_an_exception_is_told_and_ends_the_others(tmp_path):
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"(?s)rank 1, exit status 1.*ValueError: rank one is unhappy"):
        run_ranks(fail, 2, tmp_path, timeout=200)
    assert time.monotonic() - start < 100
    gone(tmp_path, ["pid-0", "pid-1"])


def test_a_rank_that_crashes_shows_its_stack(tmp_path):
    with pytest.raises(RankFailed, match=r"(?s)rank 1, exit status -11.*Fatal Python error.*in crash"):
        run_ranks(crash, 2, tmp_path, timeout=200)


def test_a_rank_that_hangs_shows_its_stack(tmp_path):
    with pytest.raises(RankFailed, match=r"(?s)Timeout.*in wait_for_godot.*in hang"):
        run_ranks(hang, 2, tmp_path, timeout=8)
    gone(tmp_path, ["pid-0", "pid-1", "pid-child-0", "pid-child-1"])


@pytest.mark.parametrize("body", [hang, hang_unwatched])
def test_ranks_end_with_the_process_that_started_them(body, tmp_path):
    call = "orphan(pathlib.Path(sys.argv[1]), sys.argv[2])"
    code = f"import pathlib, sys; from tests.distributed.test_processes import orphan; {call}"
    command = [sys.executable, "-c", code, str(tmp_path), body.__name__]
    parent = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        names = ["pid-0", "pid-1", "pid-child-0", "pid-child-1"]
        deadline = time.monotonic() + 120
        while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in names):
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    gone(tmp_path, names)
