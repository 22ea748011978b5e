"""Compiling as a new process would, with what Inductor keeps of kernels, and without what Dynamo measures."""

import contextlib
import gc
from collections.abc import Iterator

import torch
from torch._dynamo import guards


@contextlib.contextmanager
def compiled_anew() -> Iterator[None]:
    """Within, every graph is traced and goes through the passes: none comes from a cache, or from an earlier test.

    Kernels do come from Inductor's cache of C++, whose keys are their text and the compiler's flags: without it
    (`force_disable_caches`) the tests compile most kernels many times, and that is most of their time. Backward is
    lowered with forward, as it is with torch's caches: so its kernels are there when the first one is compiled.
    """
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        torch._functorch.config.patch(
            enable_autograd_cache=False, enable_remote_autograd_cache=False, force_non_lazy_backward_lowering=True
        ),
        torch._dynamo.config.patch(automatic_dynamic_local_pgo=False, automatic_dynamic_remote_pgo=False),
    ):
        yield
    torch._dynamo.reset()


def leave_out_latency_of_guards() -> None:
    """For its log, Dynamo times the guards of every frame behind a flush of the CPU's caches, which takes 20 ms."""
    guards.profile_guard_manager = lambda *_: 0.0


def collect_garbage_seldom() -> None:
    """Python goes through everything that was imported, and all graphs, whenever a quarter more objects live than did.

    What lives by now stays, and is looked at no more; the rest, of which tests leave little, after 50,000 new objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)
