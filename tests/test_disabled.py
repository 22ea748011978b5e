# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs

import pytest
import torch
import torch.nn.utils.parametrizations
from torch import nn

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import TOKENS, Toy, oracle, shake


def test_disabled():
    torch.manual_seed(0)
    model = Toy()
    base = model(TOKENS).detach()
    shake(lora_fx.install(model, LoRAConfig(rank=2)))
    with_adapters = model(TOKENS).detach()
    assert not torch.allclose(base, with_adapters)
    with lora_fx.disabled(model):
        assert torch.equal(model(TOKENS), base)
        with lora_fx.disabled(model.layers["0"]):
            assert torch.equal(model(TOKENS), base)
        assert torch.equal(model(TOKENS), base)
    assert torch.equal(model(TOKENS), with_adapters)
    with pytest.raises(KeyError), lora_fx.disabled(model):
        raise KeyError
    assert torch.equal(model(TOKENS), with_adapters)
    with lora_fx.disabled(model.layers["0"]):
        partly = model(TOKENS)
    assert not torch.equal(partly, base) and not torch.equal(partly, with_adapters)


def test_moved_or_initialised_while_disabled():
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    with lora_fx.disabled(model):
        model.init_weights()
        shake(model)
        base = model(TOKENS)
        model.double()
        torch.testing.assert_close(model(TOKENS), base.double())
    assert model.output.lora_enabled.item() == 1.0
    assert not torch.allclose(model(TOKENS), base.double(), atol=1e-3)
    with lora_fx.disabled(model):
        torch.testing.assert_close(model(TOKENS), base.double())
        model.to("meta")
    assert model.output.lora_enabled.is_meta


def test_inference_mode_leaves_no_trace():
    model = Toy()
    with torch.inference_mode():
        shake(lora_fx.install(model, LoRAConfig(rank=2)))
        with lora_fx.disabled(model):
            model(TOKENS)
    model.output.lora_scale.fill_(0.5)
    with lora_fx.disabled(model):
        y = model(TOKENS)
    (y.sum() + model(TOKENS).sum()).backward()
    assert all(p.grad.any() for p in lora_fx.adapter_parameters(model))


def test_symbolic_tracing_calls_the_linear_as_before():
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    traced = torch.fx.symbolic_trace(model.layers["0"])
    assert "self.attention.wq(" in traced.code
    model.layers["0"].w1.lora_scale.fill_(0.3)
    x = torch.randn(2, 5, 16)
    assert torch.equal(traced(x), model.layers["0"](x))


def test_disabled_between_forward_and_backward():
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2))).double()
    model(TOKENS).sum().backward()
    expected = [p.grad.clone() for p in lora_fx.adapter_parameters(model)]
    model.zero_grad()
    y = model(TOKENS)
    with torch.no_grad(), lora_fx.disabled(model):
        model(TOKENS)
    y.sum().backward()
    for parameter, grad in zip(lora_fx.adapter_parameters(model), expected):
        torch.testing.assert_close(parameter.grad, grad)


def test_disabled_adapters_get_no_gradient():
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    with lora_fx.disabled(model):
        y = model(TOKENS)
    y.sum().backward()
    assert all(not p.grad.any() for p in lora_fx.adapter_parameters(model))


def test_changing_a_scale():
    model = lora_fx.install(nn.Linear(6, 4), LoRAConfig(rank=2))
    shake(model)
    model.lora_scale.fill_(0.25)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x).double(), oracle(model, x, 0.25), rtol=1e-5, atol=1e-5)
