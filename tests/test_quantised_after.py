"""Quantisation that comes after the adapters, by torchao itself and not by a converter that could be refused."""

# mypy: no-check-untyped-defs
import copy

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.packed import is_packed
from quantised import INT4
from tests.toy_models import TOKENS, TOY_LINEARS, Toy, adapted, assert_same, shake, snapshot

quantization = pytest.importorskip("torchao.quantization")
torchao_float8 = pytest.importorskip("torchao.float8")
torchao_qat = pytest.importorskip("torchao.quantization.qat")


def installed(**config) -> nn.Module:
    torch.manual_seed(0)
    return shake(lora_fx.install(Toy(32), LoRAConfig(rank=2, **config)))


WEIGHTS = {
    "int8": quantization.Int8WeightOnlyConfig(set_inductor_config=False),
    "int4": quantization.IntxWeightOnlyConfig(INT4, quantization.PerGroup(16)),
    "float8": quantization.Float8WeightOnlyConfig(set_inductor_config=False),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_weight_that_is_quantised_below_an_adapter_is_refused(kind):
    model = installed()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"this LoRALinear \(32 -> 32\) holds an adapter.*quantise first, then install"
    ):
        quantization.quantize_(model, WEIGHTS[kind])
    assert_same(before, snapshot(model))
    # The other order, and what the refusal says to do.
    quantised = Toy(32)
    quantization.quantize_(quantised, WEIGHTS[kind])
    assert adapted(lora_fx.install(quantised, LoRAConfig(rank=2))) == sorted(TOY_LINEARS)
    assert is_packed(quantised.output.weight) and not is_packed(model.output.weight)


def test_an_adapter_moves_onto_a_quantised_base(tmp_path):
    model = installed()
    expected = model(TOKENS)
    lora_fx.save_adapter(model, tmp_path)
    base = lora_fx.remove(model)
    quantization.quantize_(base, WEIGHTS["int8"])
    moved = lora_fx.load_adapter(base, tmp_path)(TOKENS)
    assert 0 < (moved - expected).norm() / expected.norm() < 0.05


def float8(model):
    return torchao_float8.convert_to_float8_training(model, config=torchao_float8.Float8LinearConfig(emulate=True))


def qat(model):
    weights = torchao_qat.IntxFakeQuantizeConfig(torch.int8, group_size=16)
    quantization.quantize_(model, torchao_qat.QATConfig(weight_config=weights, step="prepare"))


@pytest.mark.parametrize(("quantise", "name"), [(float8, "Float8Linear"), (qat, "FakeQuantizedLinear")])
def test_linears_that_quantisation_put_in_the_place_of_adapted_ones_are_missed(quantise, name, tmp_path):
    model = installed()
    quantise(model)
    assert type(model.output).__name__ == name and adapted(model) == []
    calls = [
        lora_fx.adapter_parameters,
        lora_fx.freeze,
        lora_fx.compile,
        lora_fx.merge,
        lambda model: lora_fx.explain(model, TOKENS),
        lambda model: lora_fx.save_adapter(model, tmp_path / "adapter"),
        lambda model: lora_fx.disabled(model).__enter__(),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=rf"layers.0.attention.wq became a {name} after install and lost its adapter"
        ):
            call(model)
    assert not (tmp_path / "adapter").exists()


def test_one_lost_adapter_is_enough_and_the_path_is_the_models():
    model = installed()
    outer = nn.Sequential(model)
    block = model.layers["1"]
    block.w1 = nn.Linear(32, 64, bias=False)
    with pytest.raises(
        ValueError, match=r"^0.layers.1.w1 became a Linear after install and lost its adapter \(1 in all\)"
    ):
        lora_fx.adapter_parameters(outer)
    lora_fx.remove(model)
    assert adapted(model) == []


def test_layers_that_a_pipeline_stage_drops_are_not_missed():
    model = installed()
    del model.layers["0"]
    model.output = None
    assert len(lora_fx.adapter_parameters(model)) == 2 * len([p for p in TOY_LINEARS if p.startswith("layers.1")])


def test_weights_that_come_later_may_be_packed():
    """Install on meta, and load a checkpoint of quantised weights by assignment."""
    quantised = Toy(32)
    quantization.quantize_(quantised, WEIGHTS["int8"])
    with torch.device("meta"):
        model = lora_fx.install(Toy(32), LoRAConfig(rank=2))
    model.load_state_dict(quantised.state_dict(), strict=False, assign=True)
    assert all(is_packed(model.get_submodule(path).weight) for path in TOY_LINEARS)
    # Onto values it is quantisation behind an adapter's back, as by `quantize_`.
    with pytest.raises(RuntimeError, match="quantise first, then install"):
        installed().load_state_dict(quantised.state_dict(), strict=False, assign=True)


def test_what_is_packed():
    weight = torch.randn(32, 32)
    linear = nn.Linear(32, 32, bias=False)
    for config in WEIGHTS.values():
        quantised = copy.deepcopy(linear)
        quantization.quantize_(quantised, config)
        assert is_packed(quantised.weight) and quantised.weight.dtype == torch.float32
    assert is_packed(weight.to(torch.int8)) and is_packed(weight.to(torch.float8_e4m3fn))
    assert not any(map(is_packed, (weight, weight.bfloat16(), nn.Parameter(weight), weight.to("meta"))))
