# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy

import pytest
import torch
import torch.nn.utils.parametrizations
from torch import nn
from torch.nn.utils import parametrize, weight_norm

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.linear import lora_class
from tests.toy_models import TOKENS, TOY_LINEARS, Toy, adapted, assert_same, oracle, shake, snapshot, train


def test_freeze_and_train():
    torch.manual_seed(0)
    model = Toy(bias=True)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    lora_fx.install(model, LoRAConfig(rank=2))
    start = {name: p.detach().clone() for name, p in lora_fx.named_adapter_parameters(model)}
    losses = train(model)
    assert losses[-1] < losses[0]
    for name, value in base.items():
        assert torch.equal(model.state_dict()[name], value), name
    for name, parameter in lora_fx.named_adapter_parameters(model):
        assert not torch.equal(parameter, start[name]), name
    assert {name for name, p in model.named_parameters() if p.grad is not None} == start.keys()


def test_what_requires_gradients():
    model = lora_fx.install(Toy(), LoRAConfig(target_modules="wq"))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"layers.{i}.attention.wq.lora_{letter}" for i in range(2) for letter in "ab"
    ]
    named = lora_fx.named_adapter_parameters(model)
    assert [name for name, _ in named] == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(dict(model.named_parameters())[name] is p for name, p in named)
    assert [id(p) for _, p in named] == [id(p) for p in lora_fx.adapter_parameters(model)]
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    for _ in range(2):
        lora_fx.freeze(model)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {name for name, _ in named}


def test_install_returns_the_model_and_keeps_base_names():
    model = Toy()
    names = [name for name, _ in model.named_modules()]
    keys = list(model.state_dict())
    assert lora_fx.install(model) is model
    assert [name for name, _ in model.named_modules()] == names
    assert [key for key in model.state_dict() if not key.split(".")[-1].startswith("lora_")] == keys
    assert lora_fx.is_installed(model) and not lora_fx.is_installed(Toy())


def test_a_bare_linear():
    model = nn.Linear(6, 4)
    before = snapshot(model)
    lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0))
    assert type(model) is lora_class(nn.Linear)
    assert [name for name, _ in lora_fx.named_adapter_parameters(model)] == ["lora_a", "lora_b"]
    shake(model)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x).double(), oracle(model, x, 2.0), rtol=1e-5, atol=1e-5)
    with lora_fx.disabled(model):
        assert torch.allclose(model(x).double(), oracle(model, x, 0.0))
    assert_same(before, snapshot(lora_fx.remove(model)))


def test_copies_are_independent():
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    other = copy.deepcopy(model)
    expected = model(TOKENS)
    with lora_fx.disabled(other):
        assert torch.equal(model(TOKENS), expected)
        assert not torch.equal(other(TOKENS), expected)
    lora_fx.remove(other)
    assert adapted(model) == sorted(TOY_LINEARS)
    assert torch.equal(model(TOKENS), expected)


def test_a_linear_used_twice_and_under_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = self.first

        def forward(self, x):
            return self.again(self.first(x))

    model = Twice()
    before = snapshot(model)
    shake(lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0)))
    assert model.first is model.again and len(lora_fx.adapter_parameters(model)) == 2
    x = torch.randn(3, 4)
    once = oracle(model.first, x, 2.0)
    torch.testing.assert_close(model(x).double(), oracle(model.first, once, 2.0), rtol=1e-5, atol=1e-5)
    model(x).sum().backward()
    assert model.first.lora_a.grad.abs().sum() > 0
    model.zero_grad()
    assert_same(before, snapshot(lora_fx.remove(model)))


def test_tied_weights():
    model = Toy()
    model.output.weight = model.tokens.weight
    before = snapshot(model)
    lora_fx.install(model, LoRAConfig(rank=2))
    assert model.output.weight is model.tokens.weight and not model.tokens.weight.requires_grad
    assert_same(before, snapshot(lora_fx.remove(model)))

    two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    two[1].weight = two[0].weight
    lora_fx.install(two, LoRAConfig(rank=2))
    assert two[0].weight is two[1].weight and two[0].lora_a is not two[1].lora_a


def test_containers():
    model = nn.ModuleDict({"a.b".replace(".", "_"): nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4))})
    lora_fx.install(model, LoRAConfig(target_modules="a_b.0.0"))
    assert adapted(model) == ["a_b.0.0"]


def test_parametrized_linears():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Halved())
    torch.nn.utils.parametrizations.weight_norm(model[1])
    before = snapshot(model)
    shake(lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0)))
    assert type(model[0]).__name__ == "LoRAParametrizedLinear"
    x = torch.randn(3, 6)
    expected = oracle(model[1], oracle(model[0], x, 2.0), 2.0)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in lora_fx.named_adapter_parameters(model)
    }
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert_same(before, snapshot(lora_fx.remove(model)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_norm_by_hook():
    model = nn.Sequential(weight_norm(nn.Linear(6, 4)))
    shake(lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0)))
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x).double(), oracle(model[0], x, 2.0), rtol=1e-5, atol=1e-5)
    assert not model[0].weight_g.requires_grad


def test_hooks_of_the_linear_still_run():
    model = nn.Sequential(nn.Linear(6, 4))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    y = shake(lora_fx.install(model, LoRAConfig(rank=2)))(torch.randn(3, 6))
    assert torch.equal(seen[0], y)
