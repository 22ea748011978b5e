"""How kernels are compiled in tests: by graph, and as Inductor compiles them elsewhere."""

import random

import pytest
import torch
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile

from tests import together
from tests.anew import compiled_anew

THERE = AsyncCompile.cpp_pybinding is not together.ALONE


def two_kernels() -> None:
    """Two kernels that nobody has compiled, around a product, and what they compute."""
    a, b = random.uniform(1, 2), random.uniform(1, 2)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return torch.cos(torch.sin(x * a) @ w * b)

    x, w = torch.randn(32, 48), torch.randn(48, 40)
    with compiled_anew():
        torch.testing.assert_close(torch.compile(function)(x, w), function(x, w))


@pytest.mark.skipif(not THERE, reason="Inductor's bindings have changed")
def test_kernels_of_a_graph_are_one_library() -> None:
    before = set(together.LOADED)
    two_kernels()
    kernels = [together.LOADED[key] for key in together.LOADED.keys() - before]
    assert len(kernels) == 2
    assert len({id(kernel.__self__) for kernel in kernels}) == 1  # type: ignore[attr-defined]  # of a C function


def test_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own way, which all other processes go."""
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", together.ALONE)
    before = set(together.LOADED)
    two_kernels()
    assert set(together.LOADED) == before
