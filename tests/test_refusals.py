"""What `install` refuses, and that a refused install changes nothing."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs

import pytest
import torch
import torch.nn.utils.parametrizations
from torch import nn

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import Attention, Toy, adapted, assert_same, refused, snapshot


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        lora_fx.install([nn.Linear(2, 2)])
    refused(Toy(), {"rank": 8}, "config must be a LoRAConfig, got dict", TypeError)


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(target_modules=["wq", "wz"]),
        LoRAConfig(target_modules="attention"),
        LoRAConfig(exclude_modules="wz"),
        LoRAConfig(rank_pattern={"wz": 3}),
        LoRAConfig(alpha_pattern={"wq": 3, "0.attention.wq": 4}),
    ],
)
def test_a_refused_configuration_changes_nothing(config):
    refused(Toy(), config, "'wz' matches no module|matches only modules|make the patterns exclude")


def test_second_install():
    for model, part in [(Toy(), lambda m: m), (Toy(), lambda m: m.layers["0"])]:
        lora_fx.install(part(model), LoRAConfig(rank=2))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"holds adapters already: call lora_fx.remove\(model\)"):
            lora_fx.install(model, LoRAConfig(rank=4))
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.layers["1"]])
def test_compiled_models(part):
    model = Toy()
    part(model).compile(backend="eager")
    refused(model, None, "compiled already: install on the model as it was before torch.compile")


def test_wrapped_by_torch_compile():
    model = torch.compile(Toy(), backend="eager")
    with pytest.raises(ValueError, match="the model itself is compiled already"):
        lora_fx.install(model)
    whole = Toy()
    whole.layers["1"] = torch.compile(whole.layers["1"], backend="eager")
    with pytest.raises(ValueError, match=r"layers.1 is compiled already"):
        lora_fx.install(whole)


def test_data_parallel_models():
    refused(nn.DataParallel(Toy()), None, "the model itself is wrapped by DataParallel already: install first")


def test_lazy_linears():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0 \(LazyLinear\) is lazy .* exclude_modules=\['0'\]"):
        lora_fx.install(model)
    assert [type(module) for module in model] == [nn.LazyLinear, nn.Linear]
    lora_fx.install(model, LoRAConfig(exclude_modules=["0"]))
    lora_fx.remove(model)
    model(torch.randn(2, 6))
    assert adapted(lora_fx.install(model, LoRAConfig(rank=2))) == ["0", "1"]


class Hungry(nn.Linear):
    def forward(self, x, gain=1.0):
        return super().forward(x) * gain


class Variadic(nn.Linear):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_linears_on_which_an_adapter_would_not_work():
    refused(
        nn.Sequential(Hungry(4, 4)), None, r"0 \(Hungry\) takes more than its input .*\(gain\).*exclude_modules=\['0'\]"
    )
    assert adapted(lora_fx.install(nn.Sequential(Variadic(4, 4)))) == ["0"]

    patched = Attention(4)
    patched.wq.forward = lambda x: x
    refused(patched, None, r"wq \(Linear\) has a `forward` of its own on the instance")

    named = Attention(4)
    named.wk.lora_a = nn.Linear(4, 2)
    refused(named, LoRAConfig(target_modules="wk"), r"wk \(Linear\) has an attribute called lora_a already")

    refused(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), None, "complex weight")


def test_quantised_linears_of_torch_are_no_linears():
    from torch.ao.nn.intrinsic.qat import LinearReLU
    from torch.ao.quantization import default_qat_qconfig

    with pytest.raises(ValueError, match=r"holds no nn\.Linear"):
        lora_fx.install(nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(4, 4)))
    refused(nn.Sequential(LinearReLU(4, 4, qconfig=default_qat_qconfig)), None, "applies more than a linear map")


def test_a_failure_half_way_is_undone(monkeypatch):
    model = Toy()
    before = snapshot(model)
    original = nn.Module.register_parameter

    def failing(self, name, param):
        if name == "lora_b" and self is model.layers["1"].w1:
            raise RuntimeError("out of memory")
        original(self, name, param)

    monkeypatch.setattr(nn.Module, "register_parameter", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        lora_fx.install(model)
    monkeypatch.undo()
    assert_same(before, snapshot(model))


def test_calls_on_a_model_without_adapters():
    for call in (lora_fx.freeze, lora_fx.adapter_parameters, lambda m: lora_fx.disabled(m).__enter__()):
        model = Toy()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"Toy holds no adapters: call lora_fx\.install"):
            call(model)
        assert_same(before, snapshot(model))
