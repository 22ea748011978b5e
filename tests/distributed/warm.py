"""What the first compilation of a process does once, done in the server that ranks are forked from.

It registers patterns, asks g++ what the CPU has, and reads the header that is precompiled: more than a second of Python
and more than one of g++ for each rank, many of which do little else. Kernels of this tree are not made here.
"""

import contextlib

import torch
import tqdm

from tests.anew import collect_garbage_seldom, leave_out_latency_of_guards
from tests.together import compile_kernels_of_a_graph_together

# Inductor shows its progress; what watches the bar is a thread, and a process with threads should not be forked.
tqdm.tqdm.monitor_interval = 0


def compile_once() -> None:
    """Forward only: a process whose autograd engine has run should not be forked either."""
    try:
        with torch.no_grad():
            torch.compile(lambda x: x * 2 + 1)(torch.zeros(64))
    finally:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


leave_out_latency_of_guards()
compile_kernels_of_a_graph_together()
with contextlib.suppress(Exception):  # without a compiler each rank is to say so
    compile_once()
collect_garbage_seldom()  # freezing also keeps a collection from copying the server's pages into every rank
