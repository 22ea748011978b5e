"""Linears that torch reads without calling: refused, or their fast path left."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import adapted, assert_same, refused, shake, snapshot


def encoder(layers=1, **kwargs):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, **kwargs)
    return nn.TransformerEncoder(layer, layers) if layers > 1 else layer


WITHOUT_OUT_PROJ = LoRAConfig(rank=2, exclude_modules="out_proj")


def test_attention_out_proj_is_refused_with_the_fix():
    match = r"out_proj would not run .* MultiheadAttention .* exclude_modules=\['out_proj'\]"
    refused(nn.MultiheadAttention(16, 4), LoRAConfig(target_modules="out_proj"), match)
    refused(encoder(2), None, match)
    assert adapted(lora_fx.install(encoder(2), WITHOUT_OUT_PROJ)) == [
        f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)
    ]


def test_the_fix_does_not_exclude_anything_else():
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 4), "own": nn.ModuleDict({"out_proj": nn.Linear(4, 4)})})
    with pytest.raises(ValueError, match=r"exclude_modules=\['mha.out_proj'\]"):
        lora_fx.install(model)
    assert adapted(lora_fx.install(model, LoRAConfig(exclude_modules=["mha.out_proj"]))) == ["own.out_proj"]


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="came with torch 2.13")
def test_linear_cross_entropy_is_refused():
    refused(nn.Sequential(nn.LinearCrossEntropyLoss(8, 4)), None, r"0.linear would not run .*LinearCrossEntropyLoss")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer_leaves_its_fast_path(grad, norm_first, activation):
    model = encoder(norm_first=norm_first, activation=activation).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        base = model(x)
    shake(lora_fx.install(model, WITHOUT_OUT_PROJ))
    exact = model.double()
    with torch.set_grad_enabled(grad):
        y = model(x.double())
        with lora_fx.disabled(model):
            without = model(x.double())
    # In training mode torch calls the linears; there is no dropout, so the results must agree.
    expected = exact.train()(x.double())
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(without.float(), base, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, without, atol=1e-2)


@pytest.mark.filterwarnings("ignore:.*prototype stage")
def test_encoder_with_padding_in_inference():
    model = encoder(2).eval()
    x = torch.randn(2, 5, 16)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        base = model(x, src_key_padding_mask=padding)
    shake(lora_fx.install(model, WITHOUT_OUT_PROJ))
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        with lora_fx.disabled(model):
            without = model(x, src_key_padding_mask=padding)
        expected = model.train()(x, src_key_padding_mask=padding)
    real = ~padding
    torch.testing.assert_close(y[real], expected[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without[real], base[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y[real], base[real], atol=1e-2)


def test_remove_gives_the_fast_path_back():
    model = nn.ModuleDict({"whole": encoder(2), "layer": encoder(activation="gelu"), "other": encoder()})
    before = snapshot(model)
    config = LoRAConfig(rank=2, exclude_modules=["out_proj", "other"])
    lora_fx.install(model, config)
    assert model["other"].activation_relu_or_gelu == 1, "a layer without an adapter keeps its fast path"
    assert model["layer"].activation_relu_or_gelu == 0 and model["whole"].use_nested_tensor is False
    assert_same(before, snapshot(lora_fx.remove(model)))


def test_decoders_call_their_linears():
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        base = model(x, x)
        shake(lora_fx.install(model, WITHOUT_OUT_PROJ))
        assert not torch.allclose(model(x, x), base, atol=1e-2)


def test_every_linear_of_torch_is_called_or_refused():
    """No module of torch.nn has learnt to read the weight of a linear that it holds and that is not listed here."""
    import inspect
    import re

    reads = re.compile(r"self\.(\w+)\.(weight|bias)\b")
    found = {}
    for name in dir(nn):
        cls = getattr(nn, name)
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and "forward" in cls.__dict__:
            children = {match[0] for match in reads.findall(inspect.getsource(cls.forward))}
            if children:
                found[name] = children
    known = {
        "LinearCrossEntropyLoss": {"linear"},
        "MultiheadAttention": {"out_proj"},
        "TransformerEncoderLayer": {"linear1", "linear2", "norm1", "norm2"},
    }
    assert {name: children for name, children in found.items() if not children <= known.get(name, set())} == {}
