"""The float8 base of the GPU benchmarks, against float64 on a CPU."""

import pytest
import torch
from benchmarks import forms
from benchmarks.common import install_plain_lora
from benchmarks.float8 import E4M3, E5M2, Float8Linear, PlainLoRAFloat8Linear, install_float8, to_float8
from benchmarks.forms import EAGER, FROZEN, OURS, PEFT
from torch import nn


@pytest.mark.parametrize(("dtype", "bits"), [(E4M3, 3), (E5M2, 2)])
def test_float8_fills_the_range_and_rounds_to_its_mantissa(dtype, bits):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 37
    x8, scale = to_float8(x, dtype)
    assert x8.dtype == dtype and scale.dtype == torch.float32 and scale.dim() == 0
    assert x8.float().abs().max() == torch.finfo(dtype).max
    normal = (x / scale).abs() >= torch.finfo(dtype).smallest_normal
    relative = ((x8.float() * scale - x) / x).abs()[normal]
    assert relative.max() <= 2.0 ** -(bits + 1) * 1.001
    zero, scale = to_float8(torch.zeros(4), dtype)
    assert zero.float().abs().max() == 0 and scale > 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(32, 64), (2, 16, 64), (1, 64)])
def test_the_float8_linear_against_float64(shape, bias):
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).bfloat16().requires_grad_(False)
    install_float8(linear)
    assert type(linear) is Float8Linear
    x, dy = (torch.randn(*shape[:-1], n, generator=generator).bfloat16() for n in (64, 48))
    x.requires_grad_()
    y = linear(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert y.shape == dy.shape and y.dtype == dx.dtype == torch.bfloat16

    def rounded(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        t8, scale = to_float8(t.detach(), dtype)
        return t8.double() * scale.double()

    exact_y = rounded(x, E4M3) @ rounded(linear.weight, E4M3).t() + (linear.bias.double() if bias else 0)
    exact_dx = rounded(dy, E5M2) @ rounded(linear.weight, E4M3)
    assert (y.double() - exact_y).norm() / exact_y.norm() < 0.005  # what rounding to bfloat16 leaves
    assert (dx.double() - exact_dx).norm() / exact_dx.norm() < 0.005
    true_y = torch.nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double() if bias else None)
    assert 0.005 < (y.double() - true_y).norm() / true_y.norm() < 0.08  # and float8


def test_lora_over_a_float8_base_computes_its_branch_in_bfloat16():
    torch.manual_seed(0)
    frozen = nn.Sequential(nn.Linear(32, 32)).bfloat16().requires_grad_(False)
    adapters = forms.random_adapters(frozen, 4, seed=1)
    x = torch.randn(16, 32).bfloat16()
    base = forms.build_form(FROZEN, frozen, rank=4, fp8=True, compiled=False).model
    assert type(base.get_submodule("0")) is Float8Linear
    a, b = adapters["0.lora_a"].double(), adapters["0.lora_b"].double()
    expected = base(x).double() + 2 * (x.double() @ a.t()) @ b.t()
    for name in (EAGER, OURS, *forms.available([PEFT])[0]):
        form = forms.build_form(name, frozen, rank=4, adapters=adapters, fp8=True, compiled=False)
        with torch.no_grad():
            found = form.model(x).double()
        assert (found - expected).norm() / expected.norm() < 0.01, name
    plain = nn.Sequential(nn.Linear(32, 32))
    install_plain_lora(plain, 4, 8.0)
    install_float8(plain)
    assert type(plain[0]) is PlainLoRAFloat8Linear
