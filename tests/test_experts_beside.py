"""Adapted experts beside several adapters, variants, modules that are trained whole, and quantised bases."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs

import copy

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx import LoRAConfig
from tests.test_experts import ALL, CONFIG, TOKENS, adapted, llama
from tests.toy_models import assert_same, shake, snapshot


def test_several_adapters_are_for_linears():
    model = adapted(LoRAConfig(rank=4, exclude_modules="router", target_parameters=ALL)).eval()
    assert lora_fx.active_adapter(model) == "default" and lora_fx.adapter_names(model) == ["default"]
    before = snapshot(model)
    match = r"layers.0.feed_forward.experts holds adapted experts, which have one adapter"
    with pytest.raises(ValueError, match=match):
        lora_fx.add_adapter(model, "other", LoRAConfig(rank=2))
    with pytest.raises(ValueError, match=match), lora_fx.adapters_per_row(model, ["default", None]):
        pass
    with pytest.raises(ValueError, match=r"adapters of experts have no room for others"):
        lora_fx.install(llama(), CONFIG, max_rank=8)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"use_dora": True}, "use_dora is for linears: train without it"),
        ({"init": "pissa"}, "init='pissa' changes the base weight of linears: use another"),
        ({"init": "olora"}, "init='olora' changes the base weight of linears: use another"),
    ],
    ids=["dora", "pissa", "olora"],
)
def test_variants_are_for_linears(values, reason):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"experts\.w1 .*{reason}, or leave it out of target_parameters"):
        lora_fx.install(model, LoRAConfig(target_modules="wq", target_parameters="experts.w1", **values))
    assert_same(before, snapshot(model))


def test_another_adapter_for_experts_beside_those_of_linears_is_refused():
    model = lora_fx.install(llama(), LoRAConfig(rank=4, target_modules="wq"), max_rank=4)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"experts\.w1 holds no adapter .* leave target_parameters out"):
        lora_fx.add_adapter(model, "more", LoRAConfig(rank=2, target_parameters="experts.w1"))
    assert_same(before, snapshot(model))
    assert lora_fx.adapter_names(model) == ["default"]


def test_an_orthogonal_start_leaves_every_expert_as_it_was():
    config = LoRAConfig(rank=4, target_modules=(), target_parameters=ALL, init="orthogonal")
    base = llama()
    module = lora_fx.install(copy.deepcopy(base), config).layers["0"].feed_forward.experts
    for name in module.adapted_parameters:
        a, b = (factor.detach() for factor in module.factors(name))
        assert a.abs().amax(dim=(1, 2)).all() and b.abs().amax(dim=(1, 2)).all()
        assert (b @ a).abs().max() < 1e-6
    assert not torch.equal(a[0], a[1])  # each has its own


def test_modules_that_are_trained_whole_beside_experts(tmp_path):
    config = LoRAConfig(rank=4, target_modules="wq", target_parameters=ALL, modules_to_save="output")
    base = llama().eval()
    model = lora_fx.install(copy.deepcopy(base), config)
    names = dict(lora_fx.named_adapter_parameters(model))
    assert "output.weight" in names and "layers.0.feed_forward.experts.w1_lora_b" in names
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names.keys()
    shake(model)
    with torch.no_grad():
        model.output.weight += 0.1 * torch.randn_like(model.output.weight)
    trained = model(TOKENS)
    with lora_fx.disabled(model):
        torch.testing.assert_close(model(TOKENS), base(TOKENS), rtol=0, atol=0)
    lora_fx.save_adapter(model, tmp_path)
    again = copy.deepcopy(base)
    before = snapshot(again)
    lora_fx.load_adapter(again, tmp_path)
    torch.testing.assert_close(again(TOKENS), trained)
    torch.testing.assert_close(lora_fx.load_adapter(shake(model), tmp_path)(TOKENS), trained)
    after = snapshot(lora_fx.remove(again))
    del before["tensors"], after["tensors"]  # the head was written to, and was given back what it held
    assert_same(before, after)


def test_experts_that_are_trained_whole_get_no_adapter():
    model = llama()
    before = snapshot(model)
    config = LoRAConfig(target_modules="wq", target_parameters=ALL, modules_to_save="feed_forward.experts")
    with pytest.raises(
        ValueError, match=r"target_parameters: 'experts\.w1' names only what modules_to_save trains whole \(layers\.0\."
    ):
        lora_fx.install(model, config)
    assert_same(before, snapshot(model))
    # Of one layer it means the others.
    config = LoRAConfig(target_modules="wq", target_parameters=ALL, modules_to_save="layers.0.feed_forward")
    lora_fx.install(model, config)
    assert not isinstance(model.layers["0"].feed_forward.experts, lora_fx.LoRAExpertsModule)
    assert isinstance(model.layers["1"].feed_forward.experts, lora_fx.LoRAExpertsModule)


def test_b_of_experts_learns_faster():
    model = adapted(CONFIG)
    slow, fast = lora_fx.parameter_groups(model, lr=1e-3, lr_ratio=4.0)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    assert slow["lr"] == 1e-3 and {named[id(p)][-6:] for p in slow["params"]} == {"lora_a"}
    assert fast["lr"] == 4e-3 and {named[id(p)][-6:] for p in fast["params"]} == {"lora_b"}


class Packed(Tensor):
    """Says that it is float32, and holds int8."""

    @staticmethod
    def __new__(cls, values):
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values):
        self.values = values

    def __tensor_flatten__(self):
        return ["values"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].values)
        raise NotImplementedError(func)


def packed(weight):
    return nn.Parameter(Packed(torch.zeros(weight.shape, dtype=torch.int8)), requires_grad=False)


def test_experts_are_quantised_neither_before_nor_after():
    model = llama()
    weight = model.layers["0"].feed_forward.experts.w1
    lora_fx.install(model, CONFIG)
    experts = model.layers["0"].feed_forward.experts
    with pytest.raises(ValueError, match=r"LoRAExperts holds an adapter, .* quantise first, then install"):
        experts.w1 = packed(weight)
    assert experts.w1 is weight
    lora_fx.remove(model)
    experts.w1 = packed(weight)
    with pytest.raises(ValueError, match=r"experts\.w1 .* is Packed torch.float32, a packed form"):
        lora_fx.install(model, CONFIG)


def test_experts_that_were_replaced_are_missed():
    model = adapted(CONFIG)
    plain = llama().layers["1"].feed_forward.experts
    model.layers["1"].feed_forward.experts = plain
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.experts became a Experts after install"):
        lora_fx.adapter_parameters(model)


@pytest.mark.slow
def test_experts_beside_quantised_linears():
    quantization = pytest.importorskip("torchao.quantization")
    model = llama().bfloat16()

    def attention(module, path):
        return isinstance(module, nn.Linear) and "attention" in path

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=attention)
    lora_fx.install(model, LoRAConfig(rank=4, target_modules=["wq", "wo"], target_parameters=["experts.w1"]))
    report = lora_fx.explain(shake(model), TOKENS, strict=True, verify=True)
    assert report.rewritten == len(report.sites) == 6
    errors = report.verification
    assert errors.output_rewritten < 1.2 * errors.output_unfused < 0.02
    assert errors.gradient_rewritten < 1.2 * errors.gradient_unfused < 0.02
