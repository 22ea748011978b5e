"""Triton functions out of texts, and their compilation ahead of the first run.

A kernel is compiled in a thread, so that Inductor goes on meanwhile. What takes long is done in one of the processes
that Inductor keeps for its own Triton kernels, where there are any: Triton's compiler holds Python's lock (3.6 all of
the time), so threads that compile wait for one another, and Inductor for them. The process leaves its result in
Triton's cache on the disk, under the key that Triton asks for in the thread right after it, which then finds it there.

Without those processes (``compile_threads`` is 1, they do not start, one dies, or Triton's key is another one there)
the thread compiles by itself: the same kernel, later.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import linecache
import logging
import os
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.compiler import ASTSource, get_cache_key, make_backend
from triton.runtime.jit import JITFunction, MockTensor

from lora_fx.passes._torch import compile_workers, follow_assembler, prepare_triton

log = logging.getLogger("lora_fx.passes")

PATIENCE = 60.0
"""Seconds that a thread waits for the processes to start, and then for one to compile, before it compiles by itself."""


@dataclass(frozen=True)
class Source:
    """A Triton function as text. All three are in Triton's key, or in what it compiles (the line information)."""

    text: str
    name: str
    file: str

    def define(self) -> Any:
        """The function. Triton reads its source through linecache, so that is where it is put on record."""
        lines = self.text.splitlines(keepends=True)
        linecache.cache[self.file] = (len(self.text), None, lines, self.file)
        space: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": __name__}
        exec(compile(self.text, self.file, "exec"), space)
        return space[self.name]

    @staticmethod
    def of(function: Any) -> Source:
        """What a function was defined from."""
        file = function.fn.__code__.co_filename
        return Source("".join(linecache.getlines(file)), function.__name__, file)


def define(text: str, name: str, file: str) -> Any:
    """The Triton function ``name`` of a text, in this process."""
    if torch.cuda.is_available():
        prepare_triton(torch.cuda.current_device())
    return Source(text, name, file).define()


@dataclass(frozen=True)
class Job:
    """What Triton is asked to compile, for another process."""

    source: Source
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    target: Any
    options: dict[str, Any]
    environment: dict[str, str]
    """Every variable of Triton's: a worker has been changed by other jobs, and was started before the last changes."""
    key: str
    """What Triton will look for."""

    def run(self) -> str:
        """Compile into Triton's cache, if the key is the same here; gives the key.

        It runs in a worker, which must not touch a GPU.
        """
        with _environment(self.environment):
            source = ASTSource(self.source.define(), self.signature, self.constants, self.attributes)
            if (key := _key(source, self.target, self.options)) != self.key:
                return key  # nobody would find it
            compiled = triton.compile(source, target=self.target, options=self.options)
            _build_launcher(source, compiled.metadata)
            return str(compiled.hash)


def _key(source: ASTSource, target: Any, options: dict[str, Any]) -> str:
    """Under which ``triton.compile`` keeps what it makes of this (checked on 3.6 and 3.9)."""
    backend = make_backend(target)
    parsed = backend.parse_options({**options, **source.parse_options()})
    key = get_cache_key(source, backend, parsed, env_vars=get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()


def _environment_now() -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}
    return variables | {"TRITON_CACHE_DIR": str(triton.knobs.cache.dir)}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Within, Triton's variables are these and no others."""
    before = {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}
    try:
        for name in before:
            del os.environ[name]
        os.environ.update(variables)
        follow_assembler()
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)
        follow_assembler()


def _build_launcher(source: ASTSource, metadata: Any) -> None:
    """Put the C module that launches a kernel into Triton's cache as well, in releases that build one for each (3.6).

    The compiler takes a third of a second for it. Where that fails here, it is built where the kernel is launched.
    """
    if metadata.target.backend != "cuda":
        return
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        try:
            driver.CudaLauncher(source, metadata)
        except Exception:
            log.debug("no launcher for %s was built in a worker", source.name, exc_info=True)


class Compiler:
    """Compiles kernels ahead of their first run."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1), thread_name_prefix="lora_fx")
        self.started: dict[Hashable, tuple[Future[None], Future[None]]] = {}
        self.trusts_workers = True

    def start(
        self, key: Hashable, make: Callable[[], Any], arguments: list[Any], device: torch.device, **named: Any
    ) -> None:
        """Begin to compile what ``make`` gives for arguments like these, which may be fake; ``key`` names it."""
        if key in self.started:
            return
        mocks = [MockTensor(a.dtype) if isinstance(a, Tensor) else a for a in arguments]
        # Not by the threads: they would start workers twice, and Inductor may ask what they were about to change.
        prepare_triton(torch.cuda.current_device() if device.index is None else device.index)
        workers = compile_workers() if self.trusts_workers else None
        needed: Future[None] = Future()

        def compile_one() -> None:
            with torch.cuda.device(device):
                function = make()
                if workers is not None and workers.are_ready(needed, PATIENCE) and self.trusts_workers:
                    self.delegate(function, workers)
                compiled = function.warmup(*mocks, **named, grid=(1, 1))
                # Loads it, and what launches it, which in Triton 3.6 is a C module of its own.
                compiled[(1, 1, 1)]

        self.started[key] = self.threads.submit(compile_one), needed

    def wait(self, key: Hashable) -> None:
        """Let a compilation that has begun end; one that failed is tried again by whoever needs it."""
        if (found := self.started.pop(key, None)) is not None:
            future, needed = found
            needed.set_result(None)
            future.exception()

    def delegate(self, function: Any, workers: Any) -> None:
        """Have what ``function`` compiles from now on compiled by ``workers`` before Triton looks for it in its cache.

        Triton's function asks its attribute ``compile`` (checked on 3.6 and 3.9), which it sets when it meets a device.
        """
        if isinstance(function, JITFunction) and hasattr(function, "device_caches"):
            function.device_caches[triton.runtime.driver.active.get_current_device()]
            function.compile = functools.partial(self._compile, workers)

    def _compile(self, workers: Any, source: ASTSource, target: Any, options: dict[str, Any], **more: Any) -> Any:
        """``triton.compile``, after a worker has done the work."""
        key = theirs = None
        try:
            fn = Source.of(source.fn)
            key = _key(source, target, options)
            found = (source.signature, source.constants, source.attrs, target, dict(options), _environment_now())
            if self.trusts_workers:
                theirs = workers.run(Job(fn, *found, key).run, PATIENCE)
        except Exception as error:
            log.debug("%s is compiled in a thread", source.name, exc_info=True)
            # Whoever does not answer is not asked again: every kernel would wait as long.
            self.trusts_workers &= not isinstance(error, TimeoutError)
        # Before this thread compiles it, so that others do not ask in vain.
        self._compare(source.name, key, theirs)
        compiled = triton.compile(source, target=target, options=options, **more)
        self._compare(source.name, compiled.hash, theirs)
        return compiled

    def _compare(self, name: str, ours: str | None, theirs: str | None) -> None:
        """Do without workers from now on if a key of theirs is another one here."""
        if theirs is not None and theirs != ours and self.trusts_workers:
            log.debug("%s has another key in a worker: kernels are compiled in threads from now on", name)
            self.trusts_workers = False


@functools.cache
def compiler() -> Compiler:
    """The one of this process."""
    return Compiler()
