"""Adapters of routed experts merged into their weights, and taken out of them to the bit."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_fx
from llama3 import CONFIGS, Experts, Llama
from lora_fx import LoRAConfig
from tests.test_experts import ALL, CONFIG, CONFIG_OF_ONE, ENDS, TINY, TOKENS, Stack, adapted, formula
from tests.toy_models import assert_same, shake, snapshot

BOTH = LoRAConfig(rank=4, alpha=6.0, exclude_modules="router", target_parameters=ALL)
PATH = "layers.1.feed_forward.experts"


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_there_and_back(dtype):
    model = adapted(BOTH).to(dtype)
    experts = model.get_submodule(PATH)
    with torch.no_grad():
        experts.lora_scale.copy_(torch.tensor([0.5, 2.0, -1.0]))
    before, expected = weights(model), model(TOKENS)
    exact = {name: formula(experts, name) for name in experts.adapted_parameters}
    sizes = {
        name: p.double().abs() + 2 * torch.bmm(b.double().abs(), a.double().abs())
        for name, p in experts.named_parameters()
        if name in exact
        for a, b in [experts.factors(name)]
    }
    assert lora_fx.merge(model) is model
    for name, total in exact.items():
        weight = getattr(experts, name)
        assert not torch.equal(weight, before[f"{PATH}.{name}"])
        rounding = torch.finfo(dtype).eps / 2 * total.abs() + 2.0**-22 * sizes[name]  # of the sum, and in it
        assert ((weight.double() - total).abs() <= rounding).all(), name
    room = 0.05 if dtype == torch.bfloat16 else 1e-5
    if dtype != torch.bfloat16:  # where roundings choose other experts
        torch.testing.assert_close(model(TOKENS), expected, rtol=room, atol=room)
    assert not experts.lora_scale.any() and not any(p.requires_grad for p in model.parameters())
    assert lora_fx.unmerge(model) is model
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert experts.lora_scale.tolist() == [0.5, 2.0, -1.0]
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())
    assert torch.equal(model(TOKENS), expected)


def test_matrices_that_are_stored_the_other_way_round():
    module = Stack(lambda w, x: torch.cat([p @ e for p, e in zip(x.split([3, 0, 4, 5]), w)]), shape=(4, 16, 24))
    module.is_transposed = True
    shake(lora_fx.install(module, LoRAConfig(rank=3, target_modules=(), target_parameters="weight")))
    expected = formula(module, "weight", transposed=True)
    lora_fx.merge(module)
    torch.testing.assert_close(module.weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_model_to_export():
    model = adapted(BOTH)
    types = [type(module) for module in Llama(CONFIGS["tiny-moe"]).modules()]
    expected = model(TOKENS)
    lora_fx.remove(lora_fx.merge(model, keep=False))
    assert [type(module) for module in model.modules()] == types
    assert not any("lora" in name for name in model.state_dict())
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(TOKENS), expected)


def test_compiled_code_goes_on():
    module = lora_fx.install(Experts(TINY), CONFIG_OF_ONE)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(12, TINY.dim)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = module(x, ENDS)
        torch.testing.assert_close(compiled(x, ENDS), expected)
        lora_fx.merge(module)
        torch.testing.assert_close(compiled(x, ENDS), expected)
        with torch.compiler.set_stance("fail_on_recompile"):
            lora_fx.unmerge(module)
            torch.testing.assert_close(compiled(x, ENDS), expected)
    torch._dynamo.reset()


def test_copies():
    model = adapted()
    expected = model(TOKENS)
    for twin in (copy.deepcopy(lora_fx.merge(model)), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(TOKENS), expected)
        assert torch.equal(lora_fx.unmerge(twin)(TOKENS), expected)
        assert not any(module._load_state_dict_pre_hooks for module in twin.modules())


def test_what_is_refused_leaves_everything(tmp_path):
    def refused(call, text: str) -> None:
        before = snapshot(model)
        with pytest.raises(ValueError, match=text):
            call()
        assert_same(before, snapshot(model))

    model = adapted(BOTH)
    state = copy.deepcopy(model.state_dict())
    experts = model.get_submodule(PATH)
    lora_fx.merge(model)
    for wrong in (
        lambda: lora_fx.merge(model),
        lambda: lora_fx.freeze(model),
        lambda: lora_fx.save_adapter(model, tmp_path / "a"),
        lambda: lora_fx.disabled(model).__enter__(),
        lambda: model.load_state_dict(state),
        lambda: experts.load_state_dict({k.removeprefix(PATH + "."): v for k, v in state.items() if PATH in k}),
        experts.reset_adapters,
    ):
        refused(wrong, "merged")
    lora_fx.unmerge(model)
    with torch.no_grad():
        experts.w2_lora_b[3, 0, 0] = float("inf")
    before = weights(model)
    with pytest.raises(ValueError, match=rf"{PATH}\.w2: weight and adapter add up to NaN or infinity in torch.float32"):
        lora_fx.merge(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(m._lora_merged is None for m in model.modules() if hasattr(m, "lora_scale"))
    model = lora_fx.install(Llama(CONFIGS["tiny-moe"]).to("meta"), CONFIG)
    refused(lambda: lora_fx.merge(model), r"layers.0.feed_forward.experts.w1 is on the meta device")
