"""Launches that are remembered: what they are remembered by, and what they are given."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.compiler import CompiledKernel

from lora_fx.passes.kernels import relaunch
from lora_fx.passes.kernels.relaunch import Launches, described

FUNCTION = SimpleNamespace(arg_names=["x", "STRIDE", "out", "m"])


class Compiled(CompiledKernel):
    """A kernel that notes what it is launched on."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.launched.append((grid, *arguments))


def kept(launches: Launches, x: Tensor, out: Tensor, given: Tensor | None = None) -> Compiled:
    """What is kept after a launch on ``x`` (or ``given``, in its place) and ``out``."""
    compiled = Compiled()
    positional = [x if given is None else given, out, 7]
    launches.keep(described([x, out]), FUNCTION, compiled, (5, 6), positional, {"STRIDE": 4}, [x, out])
    return compiled


def test_a_launch_gets_its_own_tensors_and_the_numbers_of_the_first():
    launches, x, out = Launches(), torch.zeros(8, 4), torch.zeros(8, 4)
    compiled = kept(launches, x, out)
    other_x, other_out = torch.ones(8, 4), torch.ones(8, 4)
    launch = launches.find(described([other_x, other_out]))
    assert launch is not None
    launch([other_x, other_out])
    ((grid, first, stride, second, m),) = compiled.launched
    assert (grid, stride, m) == ((5, 6, 1), 4, 7)
    assert first is other_x and second is other_out


def test_an_output_that_was_an_input_once_is_not_taken_for_it():
    launches, x = Launches(), torch.zeros(8, 4)
    compiled = kept(launches, x, x)
    other = torch.ones(8, 4)
    launch = launches.find(described([x, other]))
    assert launch is not None
    launch([x, other])
    assert compiled.launched[0][1] is x and compiled.launched[0][3] is other


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(8, 4, dtype=torch.bfloat16),
        torch.zeros(4, 8).t(),
        torch.zeros(9, 4),
        torch.zeros(33)[1:].view(8, 4),  # not aligned to 16 bytes
    ],
    ids=["dtype", "strides", "shape", "alignment"],
)
def test_what_another_kernel_is_needed_for_is_not_found(other):
    launches, x, out = Launches(), torch.zeros(8, 4), torch.zeros(8, 4)
    kept(launches, x, out)
    assert launches.find(described([other, out])) is None
    assert launches.find(described([x, other])) is None


def test_every_device_has_its_own():
    launches, x, out = Launches(), torch.zeros(8, 4), torch.zeros(8, 4)
    kept(launches, x, out)
    assert launches.find(described([t.to("meta") for t in (x, out)])) is None


def test_what_is_not_kept():
    launches, x, out = Launches(), torch.zeros(8, 4), torch.zeros(8, 4)
    kept(launches, x, out, given=x.clone())  # prepared for one launch alone
    assert launches.known == {}
    launches.keep(described([x, out]), FUNCTION, None, (1,), [x, out], {}, [x, out])  # Triton's interpreter
    assert launches.known == {}


def test_there_is_an_end(monkeypatch):
    monkeypatch.setattr(relaunch, "_MOST", 3)
    launches, out = Launches(), torch.zeros(8, 4)
    for rows in range(1, 8):
        kept(launches, torch.zeros(rows, 4), out)
        assert 1 <= len(launches.known) <= 3
        assert launches.find(described([torch.zeros(rows, 4), out])) is not None
