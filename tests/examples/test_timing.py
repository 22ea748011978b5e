"""How the benchmarks of a GPU measure: times in turns, kernels, and compile caches of their own."""

import os
import time

import torch
from benchmarks import runner, timing

CPU = timing.Device("cpu")


def test_steps_are_timed_in_turns():
    ran: list[str] = []

    def step(name: str, seconds: float):
        def run() -> None:
            ran.append(name)
            time.sleep(seconds)

        return run

    seconds = timing.alternate({"slow": step("slow", 0.004), "fast": step("fast", 0.001)}, 3, 0.008, CPU)
    assert all(len(taken) == 3 for taken in seconds.values())
    assert min(seconds["slow"]) >= 0.004 and min(seconds["fast"]) >= 0.001
    assert ran.count("fast") > ran.count("slow")
    assert len(CPU.each(step("each", 0.0), 5)) == 5


def test_a_gpu_runs_a_form_for_as_long_before_it_measures_it():
    measured: list[tuple[int, int]] = []

    class Gpu(timing.Device):
        def __init__(self) -> None:
            self.cuda = True

        def seconds(self, step: timing.Step, count: int, lead: int = 1) -> float:
            measured.append((count, lead))
            return 0.01

    timing.alternate({"one": lambda: None}, 2, 0.05, Gpu())
    assert measured[-2:] == [(5, 5)] * 2
    ran: list[int] = []
    CPU.seconds(lambda: ran.append(0), 2, lead=3)
    assert len(ran) == 5


def test_kernels_are_sorted_by_time():
    x = torch.randn(128, 128)
    rows = timing.kernels(lambda: (x @ x).relu(), CPU, 0.0, steps=4)
    assert {"aten::mm", "aten::relu"} <= {row.name for row in rows}
    assert next(row.calls for row in rows if row.name == "aten::mm") == 1
    assert [row.microseconds for row in rows] == sorted((row.microseconds for row in rows), reverse=True)
    text = runner.kernel_table(rows, limit=2)
    assert len(text.splitlines()) == 4 and f"{len(rows) - 2} shorter ones left out" in text


def test_compile_caches_are_those_of_a_form_and_end_with_the_run(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with timing.compile_caches() as turn_to:
        turn_to("a")
        a = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        turn_to("b")
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != a and "TRITON_CACHE_DIR" in os.environ
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before" and "TRITON_CACHE_DIR" not in os.environ
