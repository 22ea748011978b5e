"""DoRA's inner sum is what plain LoRA computes, and is rewritten like it; so is the form with dropout.

There the base of the branch is a second product of the weight, with the dropped input.
"""

from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from tests.passes.harness import Case, check_case
from tests.passes.modules import QKV, Mlp


def adapt(module: nn.Module, **config: Any) -> nn.Module:
    """Adapters of a trained size, and magnitudes that are not the norms of their rows."""
    lora_fx.install(module, lora_fx.LoRAConfig(rank=4, use_dora=True, **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora_fx.named_adapter_parameters(module):
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if name.endswith("lora_b"):
                parameter.copy_(noise * 0.05)
            elif name.endswith("lora_magnitude"):
                parameter.mul_(1.0 + noise.clamp(-2.0, 2.0) / 8.0)
    return module


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(48, 40, bias=bias)


bf16 = torch.bfloat16
SCALE = {"scale": 1}
ONE = {"scale": 1, "pair": 1, "accumulate": 1}
KEPT = {"scale": 1, "recompute": 1}  # the sum is recomputed from the base, of which autograd keeps a bfloat16
QKV_SITES = {"scale": 3, "stack(3)": 3}
MLP_SITES = {"scale": 3, "stack(2)": 2}
CASES = [
    Case("linear", lambda: adapt(linear(bias=False)), 1, SCALE, ONE),
    Case("bias", lambda: adapt(linear()), 1, SCALE, ONE),
    Case("bias, bfloat16", lambda: adapt(linear().to(bf16)), 1, KEPT, ONE, dtype=bf16),
    Case("autocast", lambda: adapt(linear()), 1, KEPT, {"scale": 1, "pair": 1}, autocast=True),
    Case("two dimensions", lambda: adapt(linear()), 1, SCALE, ONE, shape=(24, 48)),
    Case("first layer", lambda: adapt(linear()), 1, SCALE, {"scale": 1, "pair": 1}, x_grad=False),
    Case("no gradients", lambda: adapt(linear()), 1, SCALE, grad=torch.no_grad),
    Case(
        "dynamic batch",
        lambda: adapt(linear(bias=False)),
        1,
        {"scale": 1, "accumulate": 1},
        ONE,
        shapes=((3, 8, 48), (5, 8, 48)),
        dynamic=True,
    ),
    Case("q, k, v", lambda: adapt(QKV()), 3, QKV_SITES, {**QKV_SITES, "pair": 3}),
    Case("SwiGLU", lambda: adapt(Mlp()), 3, MLP_SITES, {**MLP_SITES, "pair": 3}),
    Case("dropout", lambda: adapt(linear(), dropout=0.2), 1, SCALE, {"scale": 1, "pair": 1}, random=True),
]


FAST = ("bias, bfloat16", "q, k, v", "dropout")


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * (c.name not in FAST)) for c in CASES]
)
def test_case(case: Case) -> None:
    check_case(case)
