"""bitsandbytes' 4-bit and 8-bit linears as bases, on a CUDA device if there is one, or else on the CPU."""

# mypy: no-check-untyped-defs
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.exact import dequantised, exact
from tests.toy_models import shake

bnb: Any = pytest.importorskip("bitsandbytes")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Model(nn.Module):
    """A norm and a SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(256)
        self.gate, self.up = (nn.Linear(256, 512, bias=False) for _ in range(2))
        self.down = nn.Linear(512, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def four_bits(linear: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    new.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
    return new


def eight_bits(linear: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(linear.weight.detach(), requires_grad=False, has_fp16_weights=False)
    return new


def quantised(replace) -> nn.Module:
    torch.manual_seed(0)
    model = Model().bfloat16()
    for name in ("gate", "up", "down"):
        setattr(model, name, replace(model.get_submodule(name)))
    return model.to(DEVICE)


@pytest.mark.parametrize(("replace", "name"), [(four_bits, "LoRALinear4bit"), (eight_bits, "LoRALinear8bitLt")])
def test_adapters_on_a_quantised_base(replace, name):
    model = shake(lora_fx.install(quantised(replace), LoRAConfig(rank=8)), std=0.05)
    assert type(model.down).__name__ == name
    assert model.down.lora_a.dtype == torch.bfloat16 and model.down.lora_a.shape == (8, 512)
    x = torch.randn(4, 64, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    before = model.down.weight.detach().clone()
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in lora_fx.adapter_parameters(model))
    assert torch.equal(model.down.weight, before)


@pytest.mark.slow
@pytest.mark.parametrize("replace", [four_bits, eight_bits])
def test_they_are_rewritten_and_right(replace):
    model = shake(lora_fx.install(quantised(replace), LoRAConfig(rank=8)), std=0.05)
    assert dequantised(model.down).shape == (256, 512)
    x = torch.randn(4, 64, 256, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    report = lora_fx.explain(model, x, verify=True)
    assert report.rewritten == 3 and report.problems() == []
    errors = report.verification
    assert errors is not None and errors.worst_rewritten is not None and errors.worst_unfused is not None
    assert errors.worst_rewritten <= 1.25 * errors.worst_unfused < 0.05
    compiled = lora_fx.compile(model)
    with torch.no_grad():
        exact_y = exact(model)(x.double())
        assert (compiled(x).double() - exact_y).norm() / exact_y.norm() < 0.02


def test_quantisation_after_the_adapters_is_missed():
    torch.manual_seed(0)
    model = lora_fx.install(Model().bfloat16(), LoRAConfig(rank=8))
    model.down = four_bits(model.down)  # as transformers does with a model that is quantised when it is loaded
    with pytest.raises(ValueError, match="down became a Linear4bit after install and lost its adapter"):
        lora_fx.adapter_parameters(model)
