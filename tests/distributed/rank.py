"""The program of one rank: ``python -m tests.distributed.rank module:function arguments``, started by `run_ranks`."""

import datetime
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed

from tests.distributed.processes import result_file


def end_with_parent() -> None:
    """Kill this rank, and what it started, when the process that started it is gone."""

    def watch() -> None:
        os.read(0, 1)  # not by sys.stdin, whose lock the interpreter needs at its end
        os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Join the process group, call the function, and write down what it returns."""
    end_with_parent()
    timeout = float(os.environ["LORA_FX_TEST_TIMEOUT"])
    faulthandler.dump_traceback_later(timeout, exit=True)
    target, arguments = sys.argv[1], json.loads(sys.argv[2])
    module, name = target.split(":")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(os.environ["LORA_FX_TEST_FOLDER"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        # Above the other limit: whoever waits for a rank that hangs is to show its own stack.
        timeout=datetime.timedelta(seconds=2 * timeout),
    )
    result = getattr(importlib.import_module(module), name)(rank, folder, **arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    result_file(folder, rank).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
