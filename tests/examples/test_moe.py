"""The mixture of experts of the examples, plain and with adapters."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy

import pytest
import torch
import torch.nn.functional as F

import llama3.moe
import lora_fx
from llama3 import CONFIGS, Llama, LlamaConfig, MixtureOfExperts
from llama3.moe import grouped_product
from lora_fx import LoRAConfig
from tests.passes.harness import capture
from tests.toy_models import shake

CONFIG = CONFIGS["tiny-moe"]


def build() -> Llama:
    torch.manual_seed(0)
    model = Llama(CONFIG)
    model.init_weights()
    return model


def moe() -> MixtureOfExperts:
    found = build().layers["0"].feed_forward
    assert isinstance(found, MixtureOfExperts)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.mul_(10)  # away from zero, where any routing would do
    return found


def one_by_one(module: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """Every token by itself, as the formula says."""
    rows = []
    for token in x.flatten(0, 1):
        scores = module.router.gate(token)
        best = scores.argsort(descending=True)[: CONFIG.experts_per_token]
        row = module.shared(token)
        for weight, e in zip(scores[best].softmax(-1), best, strict=True):
            w1, w2, w3 = (getattr(module.experts, name)[e] for name in ("w1", "w2", "w3"))
            row = row + weight * (w2 @ (F.silu(w1 @ token) * (w3 @ token)))
        rows.append(row)
    return torch.stack(rows).view_as(x)


def test_outputs_and_gradients_are_those_of_the_formula():
    module = moe().double()
    x = torch.randn(2, 5, CONFIG.dim, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    parameters = [x, *module.parameters()]
    ours, theirs = module(x), one_by_one(module, x)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(y, parameters, dy) for y in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_grouped_products_of_all_dtypes_agree():
    """An expert may get no row, and there may be rows of nobody."""
    x, weight = torch.randn(9, 16), torch.randn(4, 8, 16)
    ends = torch.tensor([3, 3, 7, 8], dtype=torch.int32)
    expected = torch.cat([x[0:3] @ weight[0].T, x[3:7] @ weight[2].T, x[7:8] @ weight[3].T])
    torch.testing.assert_close(grouped_product(x, weight, ends)[:8], expected)
    half = grouped_product(x.bfloat16(), weight.bfloat16(), ends)[:8]
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.1)


class OnAGpu(torch.autograd.Function):
    """What a GPU's grouped product does with the rows of nobody: it reads none of them, and leaves anything in them."""

    @staticmethod
    def forward(ctx, rows, nobody, output):
        ctx.save_for_backward(nobody)
        ctx.output = output
        return torch.where(nobody, torch.nan if output else 0.0, rows)

    @staticmethod
    def backward(ctx, gradient):
        (nobody,) = ctx.saved_tensors
        return torch.where(nobody, 0.0 if ctx.output else torch.nan, gradient), None, None


def test_rows_of_nobody_have_no_part_in_anything(monkeypatch):
    """As on a rank that holds the last two of four experts."""

    def product(x, weight, ends):
        nobody = (torch.arange(len(x)) >= ends[-1])[:, None]
        return OnAGpu.apply(grouped_product(OnAGpu.apply(x, nobody, False), weight, ends), nobody, True)

    module = moe().double()
    tokens = torch.randn(12, CONFIG.dim, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(12, CONFIG.experts_per_token, dtype=torch.float64, requires_grad=True)
    experts = torch.stack([torch.randperm(4)[: CONFIG.experts_per_token] for _ in range(12)])
    leaves = [tokens, weights, *module.experts.parameters()]
    found = []
    for _ in range(2):
        y = module._own(tokens, weights, experts, 2)
        found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
        monkeypatch.setattr(llama3.moe, "grouped_product", product)
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_token_cannot_be_sent_to_more_experts_than_there_are():
    with pytest.raises(ValueError, match="a token cannot be sent to 3 of 2 experts"):
        LlamaConfig(dim=16, n_layers=1, n_heads=2, vocab_size=8, n_experts=2, experts_per_token=3)


def test_dense_and_shared_linears_are_adapted_and_routed_experts_are_not():
    model = lora_fx.install(build(), LoRAConfig(rank=2, exclude_modules="router"))
    adapted = {path for path, module in model.named_modules() if isinstance(module, lora_fx.LoRAModule)}
    attention = {f"attention.{name}" for name in ("wq", "wk", "wv", "wo")}
    shared = {f"feed_forward.shared.{name}" for name in ("w1", "w2", "w3")}
    assert adapted == {f"layers.{i}.{name}" for i in range(2) for name in attention | shared} | {"output"}
    experts = model.layers["0"].feed_forward.experts
    assert not any(p.requires_grad for p in experts.parameters())
    before = copy.deepcopy(experts.state_dict())
    tokens = torch.randint(256, (2, 8))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in experts.state_dict().items())


@pytest.mark.slow
def test_the_branches_beside_the_experts_are_rewritten():
    model = shake(lora_fx.install(build(), LoRAConfig(rank=2, exclude_modules=["router", "output"])), std=0.05)
    block = model.layers["1"]
    x = torch.randn(2, 8, CONFIG.dim, requires_grad=True)
    captured = capture(lambda x: block(x, model.rope), x, backward=True)
    assert captured.sites == 7
    assert all(site.rewritten for rewrite in captured.rewrites for site in rewrite.report.sites)
    expected = block(x, model.rope)
    torch.testing.assert_close(torch.compile(block, backend="lora_fx")(x, model.rope), expected)
