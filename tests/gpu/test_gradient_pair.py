"""The kernel that computes g = dy B and dB = dy^T h in one read of dy, on a CUDA device."""

import copy

import pytest
import torch
from torch import Tensor

import lora_fx
from lora_fx.passes.kernels import lowering
from lora_fx.passes.kernels.operators import gradient_parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Relative errors that a product accumulated in float32 stays below; its operands are exact.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(
    ("m", "n", "r"), [(1, 8, 1), (1000, 264, 5), (1027, 4096, 16), (2048, 1016, 33), (3001, 136, 64), (64, 128, 128)]
)
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_against_float64(m: int, n: int, r: int, dtype: torch.dtype, layout: str) -> None:
    """Sizes that divide no tile; h as a slice of stacked activations; dy and B in either layout."""
    dy = torch.randn(m, n, device="cuda").to(dtype)
    b = torch.randn(n, r, device="cuda").to(dtype)
    if layout == "columns":
        dy, b = dy.t().contiguous().t(), b.t().contiguous().t()
    h = torch.randn(m, 3 * r, device="cuda").to(dtype)[:, r : 2 * r]
    g, db = gradient_parts(dy, b, h, lowering.ROWS, lowering.COLUMNS)
    assert error(g.sum(0), dy.double() @ b.double()) < BOUND[dtype]
    assert error(db.sum(0), dy.double().t() @ h.double()) < BOUND[dtype]
    again = gradient_parts(dy, b, h, lowering.ROWS, lowering.COLUMNS)
    assert torch.equal(g, again[0]) and torch.equal(db, again[1])  # no atomics: equal to the bit


@pytest.mark.parametrize("rank", [8, 16, 64, 100])
def test_in_a_compiled_model(rank: int) -> None:
    """Against float64 eager and plain torch.compile; the step is repeatable to the bit."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 1024, bias=False, device="cuda", dtype=torch.bfloat16)
    model = torch.nn.Sequential(linear, torch.nn.SiLU())
    lora_fx.install(model, lora_fx.LoRAConfig(rank=rank, alpha=1.7 * rank))
    for name, parameter in lora_fx.named_adapter_parameters(model):
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.05)
    x = torch.randn(2, 1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(2, 1024, 1024, device="cuda", dtype=torch.bfloat16)

    def gradients(function: torch.nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
        leaves = [x, *lora_fx.adapter_parameters(function)]
        return list(torch.autograd.grad(function(x), leaves, dy))

    exact = gradients(copy.deepcopy(model).double(), x.detach().double().requires_grad_(), dy.double())
    plain = copy.deepcopy(model)
    plain.compile()
    theirs = [error(a, b) for a, b in zip(gradients(plain, x, dy), exact)]
    lora_fx.compile(model, strict=True)
    found = gradients(model, x, dy)
    assert all(error(a, b) <= 1.1 * limit for a, b, limit in zip(found, exact, theirs))
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(model, x, dy)))
