"""Bases that are no plain matrix product: float8, int8, NF4 and fake-quantised weights, all from torchao.

The oracle multiplies what the quantised weight stands for. Float8 and fake quantisation round the input as well, by far
more than anything else does; both compiled forms then err alike against the oracle.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.linear import lora_class
from tests.passes.harness import Case, adapt, by_kernels, capture, check_case
from tests.passes.modules import Mlp

pytest.importorskip("torchao")

bf16 = torch.bfloat16


def int8(module: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())
    return module


def float8(module: nn.Module, emulate: bool = False) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(module, config=Float8LinearConfig(emulate=emulate))


def fake_quantised(module: nn.Module) -> nn.Module:
    from torchao.quantization import TorchAODType
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    for name, child in list(module.named_children()):
        assert isinstance(child, nn.Linear)
        activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weights = IntxFakeQuantizeConfig(TorchAODType.INT4, group_size=16)
        setattr(module, name, FakeQuantizedLinear.from_linear(child, activations, weights))
    return module


class NF4Linear(nn.Linear):
    """A linear over torchao's NF4 tensor, as QLoRA has it."""

    def forward(self, input: Tensor) -> Tensor:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

        return linear_nf4(input, self.weight)


def nf4(module: nn.Module) -> nn.Module:
    nf4_tensor = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    for child in module.children():
        assert isinstance(child, nn.Linear)
        child.__class__ = NF4Linear
        child.weight = nn.Parameter(nf4_tensor.to_nf4(child.weight.detach()), requires_grad=False)
    return module


def dequantised(module: nn.Module) -> nn.Module:
    """A copy in float64, of plain linears."""
    module = copy.deepcopy(module)
    for child in module.modules():
        if isinstance(child, lora_fx.LoRAModule):
            weight: Any = child.weight
            for method in ("get_original_weight", "dequantize"):
                if type(weight.data) is not Tensor and hasattr(weight, method):
                    weight = getattr(weight, method)()
            child.__class__ = lora_class(nn.Linear)
            child.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return module.double()


ALL = {"scale": 3, "stack(2)": 2, "accumulate": 1}
ALL_BACK = {"scale": 3, "stack(2)": 2, "pair": 3}
BF16 = ALL | {"recompute": 2}
# The product is multiplied by the weight's scales, and the branch is added in the same kernel.
SCALED = {"scale": 3, "stack(2)": 2}

CASES = [
    Case("int8", lambda: adapt(int8(Mlp())), 3, SCALED, ALL_BACK, oracle=dequantised),
    Case(
        "int8 bf16",
        lambda: adapt(int8(Mlp().to(bf16))),
        3,
        SCALED | {"recompute": 2},
        ALL_BACK,
        dtype=bf16,
        oracle=dequantised,
    ),
    Case(
        "float8", lambda: adapt(float8(Mlp().to(bf16))), 3, BF16, ALL_BACK, (2, 16, 48), dtype=bf16, oracle=dequantised
    ),
    Case("emulated float8", lambda: adapt(float8(Mlp(), emulate=True)), 3, ALL, ALL_BACK, oracle=dequantised),
    Case("fake quantisation", lambda: adapt(fake_quantised(Mlp())), 3, ALL, ALL_BACK, oracle=dequantised),
    Case(
        "fake quantisation bf16",
        lambda: adapt(fake_quantised(Mlp().to(bf16))),
        3,
        BF16,
        ALL_BACK,
        dtype=bf16,
        oracle=dequantised,
    ),
    # Sizes that its blocks of blocks divide.
    Case(
        "NF4",
        lambda: adapt(nf4(Mlp(128, 256).to(bf16))),
        3,
        BF16,
        ALL_BACK,
        (3, 8, 128),
        dtype=bf16,
        oracle=dequantised,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs(case: Case) -> None:
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case) -> None:
    check_case(case, by_kernels)


def test_float8_is_a_scaled_product() -> None:
    """The case above is what it says: the base is not emulated."""
    module = adapt(float8(Mlp().to(bf16)))
    captured = capture(module, torch.randn(32, 48, dtype=bf16, requires_grad=True))
    assert "_scaled_mm" in captured.rewrite.after
    assert captured.sites == 3
