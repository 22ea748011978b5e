"""Compile Triton kernels in the background, while Inductor compiles its own, ahead of their first run.

A thread a kernel: it has a process of its own compile into Triton's cache
(:mod:`lora_fx.passes.kernels.compile_worker`), and then loads what it finds there. In threads alone, compilers and
Inductor, which is Python, take turns: eleven kernels of a Llama block took 7 s on 16 cores.
"""

from __future__ import annotations

import contextlib
import functools
import json
import linecache
import logging
import os
import queue
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import MockTensor

log = logging.getLogger("lora_fx.passes")

_MOST = 16
"""Kernels at a time."""


class Compiler:
    """Compiles kernels ahead of their first run; :func:`compiler` gives the one of this process."""

    def __init__(self) -> None:
        cores = os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(max_workers=min(_MOST, cores), thread_name_prefix="lora_fx")
        # Where there are few cores, starting processes costs more than they save.
        self.workers = Workers() if cores >= 4 else None
        self.started: dict[Hashable, Future[None]] = {}

    def start(
        self, key: Hashable, make: Callable[[], Any], arguments: list[Any], device: torch.device, **named: Any
    ) -> None:
        """Begin to compile what ``make`` gives for arguments like these, which may be fake; ``key`` names it."""
        if key not in self.started:
            mocks = [MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in arguments]
            self.started[key] = self.pool.submit(self._compile, make, mocks, device, named)

    def _compile(self, make: Callable[[], Any], arguments: list[Any], device: torch.device, named: Any) -> None:
        with torch.cuda.device(device):
            function = make()
            if self.workers is not None:
                self.workers.compile(function, arguments, named)
            compiled = function.warmup(*arguments, **named, grid=(1, 1))
            # What launches it is a C module of its own, which its first use builds in a third of a second.
            compiled[(1, 1, 1)]

    def wait(self, key: Hashable) -> None:
        """Let a compilation that has begun end; one that failed is tried again by whoever needs it."""
        if (future := self.started.pop(key, None)) is not None:
            future.exception()
            if not self.started and self.workers is not None:
                self.workers.close()


@functools.cache
def compiler() -> Compiler:
    """The one of this process."""
    return Compiler()


def are_known(tensors: Iterable[Tensor]) -> bool:
    """Whether a kernel for tensors like these can be compiled now: there is a GPU, and no size is a symbol."""
    return torch.cuda.is_available() and all(isinstance(size, int) for t in tensors for size in t.shape)


class Workers:
    """Processes that compile kernels, as many as there are kernels at a time, until they are closed."""

    def __init__(self) -> None:
        self.idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self.usable = True
        """False once a process could not be started, or ended by itself."""

    def compile(self, function: Any, arguments: list[Any], named: dict[str, Any]) -> None:
        """Compile a kernel into Triton's cache. What fails here is left to whoever then finds nothing there."""
        folder = None
        # Inductor chooses the folder while it compiles: what went into another one would not be found.
        while self.usable and folder != triton.knobs.cache.dir:
            folder = triton.knobs.cache.dir
            if error := self._ask(_job(function, arguments, named, folder)):
                log.debug("a kernel is compiled in this process: %s", error)
                return

    def _ask(self, job: dict[str, Any]) -> str:
        """What a worker answers; empty where it did its job."""
        try:
            worker = self._free()
            requests, answers = cast(tuple[IO[str], IO[str]], (worker.stdin, worker.stdout))
            requests.write(json.dumps(job) + "\n")
            requests.flush()
            answer = str(json.loads(answers.readline()))
        except (OSError, ValueError) as error:
            self.usable = False
            return f"{type(error).__name__}: {error}"
        self.idle.put(worker)
        return answer

    def _free(self) -> subprocess.Popen[str]:
        """A process that has nothing to do."""
        try:
            return self.idle.get_nowait()
        except queue.Empty:
            return _worker()

    def close(self) -> None:
        """End the processes that have nothing to do."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.idle.get_nowait().communicate()


def _worker() -> subprocess.Popen[str]:
    """A new one, which finds the modules that this process finds."""
    script = Path(__file__).with_name("compile_worker.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _job(function: Any, arguments: list[Any], named: dict[str, Any], folder: str) -> dict[str, Any]:
    """What a worker needs to know of a launch of ``function``, whose source is in the cache of ``linecache``."""
    target = driver.active.get_current_target()
    file = function.fn.__code__.co_filename
    return {
        "code": "".join(linecache.getlines(file)),
        "file": file,
        "name": function.fn.__name__,
        "module": function.fn.__module__,
        "arguments": [["tensor", str(a.dtype)] if isinstance(a, MockTensor) else a for a in arguments],
        "named": named,
        "target": [target.backend, target.arch, target.warp_size],
        "cache": folder,
    }
