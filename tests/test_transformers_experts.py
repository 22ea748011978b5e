"""Adapted experts of models in wide use, whichever way transformers multiplies them, against weights with deltas."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy

import pytest
import torch

import lora_fx
from lora_fx import LoRAConfig
from tests.passes import on_gpu
from tests.passes.harness import Case, compare
from tests.test_peft_experts import hugging_face
from tests.toy_models import shake

pytest.importorskip("transformers")

PARAMETERS = ("gate_up_proj", "down_proj")
CONFIG = LoRAConfig(rank=4, target_modules=(), target_parameters=[f"experts.{name}" for name in PARAMETERS])


def adapted(kind, implementation):
    """The experts of a model with adapters, and an oracle: in float64, one by one, with the deltas in their weights."""
    model = shake(lora_fx.install(hugging_face(kind), CONFIG))
    (experts,) = (m for m in model.modules() if isinstance(m, lora_fx.LoRAExpertsModule))
    merged = lora_fx.remove(copy.deepcopy(model)).get_submodule("model.layers.0.mlp.experts").double()
    experts.config._experts_implementation, merged.config._experts_implementation = implementation, "eager"
    with torch.no_grad():
        for name, scale in zip(experts.adapted_parameters, experts.lora_scale, strict=True):
            a, b = (factor.double() for factor in experts.factors(name))
            delta = scale.double() * torch.bmm(b, a)
            getattr(merged, name).add_(delta.mT if experts.is_transposed else delta)
    return experts, merged


def inputs(dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(6, 32, dtype=dtype), torch.randint(4, (6, 2)), torch.rand(6, 2, dtype=dtype)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", [pytest.param("mixtral", marks=pytest.mark.slow), "qwen3", "gpt-oss"])
def test_outputs_and_gradients(kind, implementation):
    experts, merged = adapted(kind, implementation)
    assert experts.config._experts_implementation == implementation
    x, chosen, weights = inputs()
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    parameters = [getattr(merged, name).requires_grad_() for name in experts.adapted_parameters]
    y, expected = experts(x, chosen, weights), merged(exact, chosen, weights.double())
    dy = torch.randn_like(y)
    y.backward(dy)
    x_grad, *gradients = torch.autograd.grad(expected, [exact, *parameters], dy.double())
    found, wanted = [y, x.grad], [expected, x_grad]
    for name, scale, grad in zip(experts.adapted_parameters, experts.lora_scale.double(), gradients, strict=True):
        grad = grad.mT if experts.is_transposed else grad  # of W + s B A
        a, b = experts.factors(name)
        found += [a.grad, b.grad]
        wanted += [scale * b.detach().double().mT @ grad, scale * grad @ a.detach().double().mT]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_compiled_without_a_graph_break(kind, implementation):
    experts, _ = adapted(kind, implementation)
    for dtype in (torch.float32, torch.bfloat16):
        module = copy.deepcopy(experts).to(dtype)
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs(dtype)), module(*inputs(dtype)))
    if implementation == "grouped_mm":
        report = lora_fx.explain(module, inputs(dtype)[0].requires_grad_(), *inputs(dtype)[1:])
        assert [site.path for site in report.sites] == list(PARAMETERS)
        assert report.rewritten == 2, str(report)
    torch._dynamo.reset()


class Routed(torch.nn.Module):
    """A model's experts with 64 tokens on their way to two of four each."""

    def __init__(self, kind) -> None:
        super().__init__()
        config = LoRAConfig(rank=8, target_modules=(), target_parameters=CONFIG.target_parameters)
        model = shake(lora_fx.install(hugging_face(kind), config), std=0.2).to(torch.bfloat16)
        (self.experts,) = (m for m in model.modules() if isinstance(m, lora_fx.LoRAExpertsModule))
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("chosen", torch.rand(64, 4, generator=generator).argsort(-1)[:, :2])
        self.register_buffer("weights", torch.rand(64, 2, generator=generator))

    def forward(self, x):
        # torch has no grouped product in float64, in which the oracle is.
        exact = x.dtype == torch.float64
        self.experts.config._experts_implementation = "eager" if exact else "grouped_mm"
        return self.experts(x, self.chosen, self.weights.to(x.dtype))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt-oss"])
def test_on_a_gpu_the_bases_grouped_products_are_left(kind):
    """Two forward and two backward; all of LoRA's are in programs, as accurate as plain torch.compile."""
    case = Case(kind, lambda: Routed(kind), 2, {}, dtype=torch.bfloat16, shape=(64, 32), seeds=8)
    result = compare(case, on_gpu.by_graphs)
    result.assert_as_accurate()
    assert result.captured.reasons == []
    assert result.ours.saved < result.plain.saved
    for graph in (*result.captured.forward, *result.captured.backward):
        products = graph.graph.find_nodes(op="call_function", target=torch.ops.aten._grouped_mm.default)
        assert len(products) == 2
        assert {program.experts for program in on_gpu.programs(graph.graph)} == {4}
