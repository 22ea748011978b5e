"""How kernels are compiled in tests: together, and as Inductor compiles them elsewhere."""

import random

import pytest
import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile

from tests import together
from tests.anew import compiled_anew

THERE = AsyncCompile.cpp_pybinding is not together.ALONE


def three_kernels() -> None:
    """Two kernels of forward and one of backward that nobody has compiled, and what they compute."""
    a, b = random.uniform(1, 2), random.uniform(1, 2)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.cos(torch.sin(x * a) @ w * b)

    x, w = torch.randn(32, 48).double(), torch.randn(48, 40).double().requires_grad_()
    with compiled_anew():
        ours, exact = torch.compile(function)(x, w), function(x, w)
        torch.testing.assert_close(ours, exact)
        found, expected = (torch.autograd.grad(y.square().sum(), w) for y in (ours, exact))
        torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not THERE, reason="Inductor's bindings have changed")
def test_kernels_of_forward_and_backward_are_one_library() -> None:
    before = set(together.LOADED)
    three_kernels()
    kernels = [together.LOADED[key] for key in together.LOADED.keys() - before]
    assert len(kernels) == 3
    assert len({id(kernel.__self__) for kernel in kernels}) == 1  # type: ignore[attr-defined]  # of a C function


def test_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own way, which all other processes go."""
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", together.ALONE)
    before = set(together.LOADED)
    three_kernels()
    assert set(together.LOADED) == before
