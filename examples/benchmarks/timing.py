"""Times, memory and kernels of a step on a device.

On a GPU a time is the GPU's own: steps are queued one behind the other, while the GPU is still busy with others of the
same form before the clock starts, and two events enclose them. A step by itself would count the gaps in which the GPU
waits for its first kernels. On a CPU it is the wall clock's.

A GPU at its power limit takes some tenths of a second to find the clock rate that it can hold for a form: measured
sooner, a form runs at the rate of the one before it. So :func:`alternate` runs each for as long before it measures it.
"""

import importlib.metadata
import importlib.util
import itertools
import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]


def environment(device: "Device") -> dict[str, str | None]:
    """What a result depends on beside the settings."""
    found = importlib.util.find_spec("triton") is not None
    triton = importlib.metadata.version("triton") if found else None
    return {"torch": torch.__version__, "triton": triton, "device": str(device)}


class Device:
    """A CUDA device or the CPU, and how to measure on it.

    Args:
        name: "cuda" or "cpu".

    Raises:
        ValueError: another name, or no CUDA device is there.
    """

    def __init__(self, name: str) -> None:
        if name not in ("cuda", "cpu"):
            raise ValueError(f'device must be "cuda" or "cpu", got {name!r}')
        if name == "cuda" and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device; --device cpu with toy sizes tries the program without one")
        self.name = name
        self.cuda = name == "cuda"

    def __str__(self) -> str:
        return torch.cuda.get_device_name() if self.cuda else "CPU (wall clock: these are no GPU times)"

    def synchronise(self) -> None:
        """Wait for what is queued."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, step: Step, count: int, lead: int = 1) -> float:
        """Seconds of one of `count` steps that are queued back to back, behind `lead` that are not counted."""
        for _ in range(lead):
            step()
        if not self.cuda:
            began = time.perf_counter()
            for _ in range(count):
                step()
            return (time.perf_counter() - began) / count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / count

    def each(self, step: Step, count: int) -> list[float]:
        """Seconds of every one of `count` steps that are queued back to back, behind one that is not counted."""
        step()
        if not self.cuda:
            return [self.seconds(step, 1) for _ in range(count)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        events[-1].synchronize()
        return [float(a.elapsed_time(b)) * 1e-3 for a, b in itertools.pairwise(events)]

    def steps_in(self, step: Step, window: float) -> int:
        """How many steps take about `window` seconds."""
        self.seconds(step, 2)
        return max(1, round(window / self.seconds(step, 3)))

    def peak_memory(self, step: Step) -> int | None:
        """The most bytes that a step holds beyond what lives between steps; None on a CPU, which counts none."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def captured(self, step: Step) -> Step:
        """`step` as one CUDA graph, to be replayed; unchanged on a CPU."""
        if not self.cuda:
            return step
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay: Step = graph.replay
        return replay

    def free(self) -> None:
        """Give unused memory back, so that one case does not meet another's fragments."""
        if self.cuda:
            torch.cuda.empty_cache()


def alternate(steps: Mapping[str, Step], rounds: int, window: float, device: Device) -> dict[str, list[float]]:
    """Seconds of each step in each round; in a round the steps run in a random order.

    Each is measured for `window` seconds, on a GPU after as many in which it runs and is not measured.
    """
    order = random.Random(0)
    counts = {name: device.steps_in(step, window) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in order.sample(list(steps), len(steps)):
            lead = counts[name] if device.cuda else 1
            seconds[name].append(device.seconds(steps[name], counts[name], lead))
    return seconds


@dataclass(frozen=True)
class Kernel:
    """One kernel of a step (on a CPU: one operator): how often it ran, and the microseconds of all its runs."""

    name: str
    calls: float
    microseconds: float


def kernels(step: Step, device: Device, window: float, steps: int = 10) -> list[Kernel]:
    """The kernels of a step, the longest first, averaged over `steps` steps.

    On a GPU after `window` seconds of steps, until its clocks are what the step's power allows.
    """
    for _ in range(device.steps_in(step, window) if device.cuda else 3):
        step()
    device.synchronise()
    # Not both: where the CPU is watched it launches too slowly to keep a GPU busy, whose clocks then rise.
    activities = [ProfilerActivity.CUDA if device.cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
        device.synchronise()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if not device.cuda:
            found[event.name].append(event.self_cpu_time_total)
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            found[event.name].append(event.device_time)
    rows = [Kernel(name, len(times) / steps, sum(times) / steps) for name, times in found.items()]
    return sorted(rows, key=lambda kernel: -kernel.microseconds)


@contextmanager
def compile_caches() -> Iterator[Callable[[str], None]]:
    """Empty compile caches for this run, so that compile times can be compared.

    Yields a function that turns to the cache of a name. What is compiled under one name shares a cache over the run.
    """
    variables = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {variable: os.environ.get(variable) for variable in variables}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))

        def turn_to(name: str) -> None:
            for variable in variables:
                os.environ[variable] = str(folder / name / variable.lower())

        try:
            yield turn_to
        finally:
            for variable, value in before.items():
                if value is None:
                    os.environ.pop(variable, None)
                else:
                    os.environ[variable] = value
