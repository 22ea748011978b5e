# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy
from typing import Protocol

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Converters, LoRAConfig, LoRAConverter, LoRAModule, ModelConverter
from tests.toy_models import TOY_LINEARS, Toy, adapted, shake, snapshot, train

torchao_float8 = pytest.importorskip("torchao.float8")
torchao_qat = pytest.importorskip("torchao.quantization.qat")


class Float8Converter:
    quantizes = True

    def convert(self, model):
        config = torchao_float8.Float8LinearConfig(emulate=True)
        return torchao_float8.convert_to_float8_training(model, config=config)


class QATConverter:
    """As torchtitan's of the same name: no common base, replaces children, returns nothing."""

    def convert(self, model):
        config = torchao_qat.IntxFakeQuantizeConfig(dtype=torch.int8, group_size=8, is_symmetric=True)
        for name, child in list(model.named_children()):
            if isinstance(child, nn.Linear):
                from torchao.quantization.qat.linear import FakeQuantizedLinear

                setattr(model, name, FakeQuantizedLinear.from_linear(child, weight_config=config))
            else:
                self.convert(child)

    def post_optimizer_hook(self, model):
        pass


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class TripledConverter:
    quantizes = True

    def convert(self, model):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Tripled


@pytest.mark.parametrize(
    ("converter", "name"),
    [(Float8Converter, "Float8Linear"), (QATConverter, "FakeQuantizedLinear"), (TripledConverter, "Tripled")],
)
def test_quantise_then_adapt(converter, name):
    torch.manual_seed(0)
    base = converter().convert(model := Toy(bias=True)) or model
    kept = {key: value.clone() for key, value in base.state_dict().items()}
    tokens = torch.arange(10).reshape(2, 5)
    expected = base(tokens).detach()
    parent = type(base.output)
    assert parent.__name__ == name

    model = lora_fx.convert(copy.deepcopy(base), [LoRAConverter(LoRAConfig(rank=2))])
    assert adapted(model) == sorted(TOY_LINEARS)
    for path in TOY_LINEARS:
        module = model.get_submodule(path)
        assert type(module).__name__ == f"LoRA{name}" and isinstance(module, (parent, nn.Linear))
        assert isinstance(module, parent) and isinstance(module, LoRAModule)
    assert [key for key in model.state_dict() if ".lora_" not in key] == list(kept)
    assert torch.equal(model(tokens), expected), "B starts at zero"

    losses = train(model)
    assert losses[-1] < losses[0]
    for key, value in kept.items():
        assert torch.equal(model.state_dict()[key], value), key
    assert all(parameter.any() for _, parameter in lora_fx.named_adapter_parameters(model))

    # The adapter sees the plain input and adds to whatever the parent makes of it.
    with torch.no_grad():
        module, x = model.layers["0"].attention.wq, torch.randn(5, 16)
        update = 8.0 * x.double() @ module.lora_a.double().T @ module.lora_b.double().T
        exact = base.layers["0"].attention.wq(x).double() + update
    torch.testing.assert_close(module(x).double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(lora_fx.remove(model)(tokens), expected)


@pytest.mark.parametrize("converter", [Float8Converter, QATConverter, TripledConverter])
def test_quantisation_after_lora_is_refused_when_it_is_written_down(converter):
    for build in (Converters, lambda order: lora_fx.convert(Toy(), order)):
        with pytest.raises(ValueError, match=rf"{converter.__name__} comes after LoRAConverter.*drop their adapters"):
            build([LoRAConverter(), converter()])
    assert Converters([converter(), LoRAConverter()]).converters[0].__class__ is converter
    assert Converters([converter(), converter()]).converters


def test_a_refused_order_leaves_the_model_alone():
    model = Toy()
    before = snapshot(model)
    with pytest.raises(ValueError):
        lora_fx.convert(model, [LoRAConverter(), Float8Converter()])
    assert snapshot(model)["classes"] == before["classes"]


class QuantizationConverter:
    """The name of torchtitan's base class."""


class TitanProtocol(Protocol):
    """The shape of torchtitan's protocol class, whose methods a converter may inherit."""

    def convert(self, model): ...

    def post_optimizer_hook(self, model): ...

    def key_filter(self):
        return None


class TitanMX(QuantizationConverter, TitanProtocol):
    def convert(self, model):
        model.converted_by = "TitanMX"

    def post_optimizer_hook(self, model):
        model.hooked = True


def test_torchtitans_shape():
    converters = Converters([TitanMX(), LoRAConverter(LoRAConfig(rank=2))])
    assert isinstance(TitanMX(), ModelConverter) and isinstance(LoRAConverter(), ModelConverter)
    model = Toy()
    assert converters.convert(model) is model and model.converted_by == "TitanMX" and adapted(model)
    converters.post_optimizer_hook(model)
    assert model.hooked
    with pytest.raises(ValueError, match="TitanMX comes after LoRAConverter"):
        Converters([LoRAConverter(), TitanMX()])

    class Ours(LoRAConverter, TitanProtocol):
        pass

    ours = Ours(LoRAConfig(rank=2))
    assert adapted(ours.convert(Toy())) and ours.key_filter() is None and ours.post_optimizer_hook(model) is None


def test_what_is_no_converter():
    for wrong in (LoRAConfig(), LoRAConverter, "lora", nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="is no converter"):
            Converters([wrong])
    with pytest.raises(TypeError, match="config must be a LoRAConfig"):
        LoRAConverter({"rank": 4})
    with pytest.raises(ValueError, match="two LoRAConverters"):
        Converters([LoRAConverter(), LoRAConverter()])


def test_an_undeclared_quantiser_is_caught_when_it_drops_adapters():
    class Undeclared(Float8Converter):
        quantizes = False

    with pytest.raises(RuntimeError, match=r"Undeclared replaced layers.0.attention.wq \(13 in all\)"):
        lora_fx.convert(Toy(), [LoRAConverter(), Undeclared()])


def test_other_converters_may_come_after():
    class Wrapping:
        def convert(self, model):
            shake(model)
            return nn.Sequential(model)

    model = lora_fx.convert(Toy(), [LoRAConverter(LoRAConfig(rank=2)), Wrapping()])
    assert isinstance(model, nn.Sequential) and len(adapted(model)) == len(TOY_LINEARS)


def test_weights_quantised_for_inference():
    """torchao's other kind: the weight becomes a tensor subclass that says it is bfloat16, the class stays."""
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32)).bfloat16(), torch.randn(4, 16).bfloat16()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = model(x)
    lora_fx.install(model, LoRAConfig(rank=2))
    assert model[0].lora_a.dtype == torch.bfloat16 and torch.equal(model(x), expected)
    shake(model)
    model(x).sum().backward()
    assert all(parameter.grad.any() for parameter in lora_fx.adapter_parameters(model))
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(lora_fx.remove(model)(x), expected)
