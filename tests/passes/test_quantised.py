"""Bases that are no plain matrix product: float8, int8, NF4 and fake-quantised weights, all from torchao.

The oracle multiplies what the quantised weight stands for. Float8 and fake quantisation round the input as well, by far
more than anything else does; both compiled forms then err alike against the oracle.
"""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.linear import lora_class
from lora_fx.passes.graph import COPIES, VIEWS, is_call, is_pointwise, is_transpose
from quantised import INT4
from tests.passes import on_gpu
from tests.passes.harness import Captured, Case, adapt, by_kernels, capture, check_case
from tests.passes.modules import Mlp

pytest.importorskip("torchao")

bf16 = torch.bfloat16


def int8(module: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(module, Int8WeightOnlyConfig())
    return module


def int4(module: nn.Module) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(module, IntxWeightOnlyConfig(INT4, PerGroup(16)))
    return module


def float8(module: nn.Module, emulate: bool = False) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(module, config=Float8LinearConfig(emulate=emulate))


def float8_rowwise(module: nn.Module) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(module, config=Float8LinearConfig.from_recipe_name("rowwise"))


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
    Case(
        "float8 by rows",
        lambda: adapt(float8_rowwise(Mlp().to(bf16))),
        3,
        BF16,
        ALL_BACK,
        (2, 16, 48),
        dtype=bf16,
        oracle=dequantised,
    ),
    Case("int4", lambda: adapt(int4(Mlp())), 3, ALL, ALL_BACK, oracle=dequantised),
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


def slow_if(slow: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] * slow


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=slow_if(c.name not in ("int8", "fake quantisation")), id=c.name) for c in CASES]
)
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


def test_the_largest_of_float8_operands_needs_no_magnitudes() -> None:
    """On a GPU: no program writes |y|, of which the base needs the largest, beside y; it finds it, or Inductor does."""
    module = adapt(float8(Mlp().to(bf16)))
    captured = on_gpu.capture(module, torch.randn(160, 48, dtype=bf16, requires_grad=True))
    for half in (captured.forward, captured.backward):
        graph = half[0].graph
        found = on_gpu.programs(graph)
        assert found and not any(s[:2] == ["op", "abs"] for program in found for s in program.body)
        assert any(s[0] == "largest" for program in found for s in program.body)
        assert all(program.dtype == "bfloat16" for program in found)
        largest = [n for n in graph.nodes if is_call(n, torch.ops.aten.amax.default, torch.ops.aten.max.default)]
        sources = [node.all_input_nodes[0] for node in largest]
        assert sources and all(is_pointwise(node) or node.meta["val"].dtype == torch.float32 for node in sources)


BASES = {
    "int8": (int8, bf16),
    "int4": (int4, bf16),
    "NF4": (nf4, bf16),
    "float8": (float8, bf16),
    "float8 by rows": (float8_rowwise, bf16),
    "fake quantisation": (fake_quantised, torch.float32),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow_if(n != "NF4")) for n in BASES])
def test_the_base_is_unpacked_as_often_as_without_adapters(name: str) -> None:
    """What has the size of a weight is made of weights: casts, table look-ups, scales. Adapters add nothing to it."""
    quantise, dtype = BASES[name]
    frozen = quantise(Mlp(128, 256).to(dtype)).requires_grad_(False)
    module = adapt(copy.deepcopy(frozen))
    x = torch.randn(32, 128).to(dtype).requires_grad_()  # no activation has as many elements as a weight
    without = weight_sized(capture(frozen, x, rewrite=False, backward=True))
    assert weight_sized(capture(module, x, backward=True)) == without
    assert without.total() > 0


def weight_sized(captured: Captured) -> Counter[str]:
    """How often each operation makes a matrix of a weight's size, in forward and backward."""
    made: Counter[str] = Counter()
    for graph in (*captured.forward, *captured.backward):
        for node in graph.graph.nodes:
            value = node.meta.get("val")
            if node.op != "call_function" or not isinstance(value, Tensor) or value.numel() != 128 * 256:
                continue
            if node.target not in VIEWS | COPIES and not is_transpose(node):
                made[str(node.target)] += 1
    return made
