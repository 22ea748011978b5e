"""One rank: what runs in the processes of `run_ranks`."""

import datetime
import faulthandler
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed


def main(
    body: Callable[..., Any],
    rank: int,
    world: int,
    folder: Path,
    timeout: float,
    backend: str,
    environment: dict[str, str],
    arguments: dict[str, Any],
) -> None:
    """Join the process group, call the function, and write down what it returns."""
    os.setsid()
    with log_file(folder, rank).open("wb") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    end_with_parent()
    faulthandler.enable()
    faulthandler.dump_traceback_later(timeout, exit=True)
    os.environ.clear()
    os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)})
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        backend,
        device_id=device,
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        # Above the other limit: whoever waits for a rank that hangs is to show its own stack.
        timeout=datetime.timedelta(seconds=2 * timeout),
    )
    try:
        result = body(rank, folder, **arguments)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        result_file(folder, rank).write_text(json.dumps(result))
    finally:
        kill_orphans()


def end_with_parent() -> None:
    """Kill this rank, and what it started, when the process that called `run_ranks` is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        kill_orphans()

    threading.Thread(target=watch, daemon=True).start()


def kill_orphans() -> None:
    """Kill this rank, and what it started, if the process that called `run_ranks` is gone.

    A rank that loses another one ends by itself, and with it the thread that would do this: what it started would stay.
    """
    parent = multiprocessing.parent_process()
    if parent is None or not parent.is_alive():
        os.killpg(os.getpid(), signal.SIGKILL)


def log_file(folder: Path, rank: int) -> Path:
    """What a rank printed."""
    return folder / f"rank-{rank}.log"


def result_file(folder: Path, rank: int) -> Path:
    """What a rank's body returned."""
    return folder / f"result-{rank}.json"
