"""Initialisations that look at the base weight (PiSSA, OLoRA) or start both factors (orthogonal)."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.peft_files import CONFIG
from tests.test_linear import PackedLinear
from tests.test_peft_exchange import TOLERANCE, in_peft
from tests.toy_models import TOKENS, Mlp, Toy, assert_same, oracle, refused, shake, snapshot, train

CHANGING = ["pissa", "olora"]
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def toy(init=None, *, dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = Toy(bias=True).to(dtype)
    if init is not None:
        torch.manual_seed(1)
        lora_fx.install(model, LoRAConfig(**{"rank": 4, "alpha": 6.0, **config}, init=init))
    return model


def product(module):
    return module.lora_scale * (module.lora_b @ module.lora_a)


# ---- what they are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", CHANGING)
def test_the_factors_are_pefts(init):
    """Up to the signs of singular vectors."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["w1", "w2"], init_lora_weights=init)
    theirs = peft.get_peft_model(toy(), config).base_model.model
    ours = toy(init, target_modules=["w1", "w2"])
    for path in ("layers.0.w1", "layers.1.w2"):
        mine, other = ours.get_submodule(path), theirs.get_submodule(path)
        torch.testing.assert_close(mine.weight, other.base_layer.weight, **ROUNDING)
        torch.testing.assert_close(product(mine), other.get_delta_weight("default"), **ROUNDING)
        torch.testing.assert_close(mine.lora_a.abs(), other.lora_A["default"].weight.abs(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.lora_b.abs(), other.lora_B["default"].weight.abs(), rtol=1e-4, atol=1e-5)


def test_pissa_takes_the_principal_part():
    module = nn.Linear(40, 30)
    before = module.weight.detach().clone()
    lora_fx.install(module, LoRAConfig(rank=5, alpha=3.0, init="pissa"))
    values = torch.linalg.svdvals(before)
    torch.testing.assert_close(torch.linalg.svdvals(product(module))[:5], values[:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(module.weight)[:25], values[5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_orthogonal(dtype):
    torch.manual_seed(0)
    base = nn.Linear(40, 30, dtype=dtype)
    module = lora_fx.install(copy.deepcopy(base), LoRAConfig(rank=6, init="orthogonal"))
    a, b = module.lora_a.double(), module.lora_b.double()
    room = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert a.std().item() == pytest.approx(0.1 * 0.5**0.5, rel=0.3)
    assert b.std().item() == pytest.approx(0.1 * 0.5**0.5, rel=0.3)
    assert (b @ a).abs().max() < room and (b.abs() @ a.abs()).mean() > 0.01
    assert torch.equal(module.weight, base.weight)
    with pytest.raises(ValueError, match="init='orthogonal' needs even ranks, got 3"):
        LoRAConfig(rank_pattern={"w1": 3}, init="orthogonal")
    first = module.lora_a.clone()
    module.reset_adapters()
    assert not torch.equal(module.lora_a, first)


@pytest.mark.parametrize("init", [*CHANGING, "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_what_they_were(init, dtype):
    room = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(toy(init, dtype=dtype)(TOKENS), toy(dtype=dtype)(TOKENS), **room)


def test_gradients_against_float64():
    module = toy("pissa").layers["0"].w1
    x = torch.randn(5, 16, requires_grad=True)
    y = module(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = copy.deepcopy(module).double()
    x64 = x.detach().double().requires_grad_()
    expected = oracle(exact, x64, exact.lora_scale.item())
    grads = torch.autograd.grad(expected, [x64, exact.lora_a, exact.lora_b], dy.double())
    for ours, theirs in zip([y, x.grad, module.lora_a.grad, module.lora_b.grad], [expected, *grads], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


# ---- the base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", CHANGING)
@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_remove_gives_the_base_back(init, copied):
    model = toy()
    expected, before = model(TOKENS), snapshot(model)
    lora_fx.install(model, LoRAConfig(rank=4, init=init))
    residual = {name: p.detach().clone() for name, p in model.named_parameters() if "lora" not in name}
    assert not torch.equal(residual["output.weight"], before["values"]["output.weight"])
    losses = train(model)
    assert losses[-1] < losses[0]
    for name, value in residual.items():  # what the base is now does not change
        assert torch.equal(dict(model.named_parameters())[name], value), name
    model.zero_grad()
    model = copied(model) if copied else model
    after = snapshot(lora_fx.remove(model))
    before["tensors"] = after["tensors"] = None  # the weights were written to
    assert_same(before, after)
    assert torch.equal(model(TOKENS), expected)


@pytest.mark.parametrize("init", CHANGING)
def test_disabled_is_the_base_without_recompiling(init):
    torch._dynamo.reset()
    torch.manual_seed(0)
    base = Mlp(12)
    model = shake(lora_fx.install(copy.deepcopy(base), LoRAConfig(rank=3, init=init)))
    model.up.lora_scale.fill_(0.3)
    x = torch.randn(5, 12)
    trained = model(x)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    y = model(x)
    torch.testing.assert_close(y, trained)
    with lora_fx.disabled(model):
        torch.testing.assert_close(model(x), base(x))
        with lora_fx.disabled(model):
            torch.testing.assert_close(model(x), base(x))
        for call in (lambda: lora_fx.save_adapter(model, "nowhere"), lambda: lora_fx.merge(model)):
            with pytest.raises(ValueError, match="up is disabled"):
                call()
    y.sum().backward()
    torch.testing.assert_close(model(x), trained)
    assert model.up.lora_scale.item() == pytest.approx(0.3) and counter.frame_count == 1
    torch._dynamo.reset()


def test_disabled_does_not_drop_the_base():
    model = toy("pissa", dropout=0.5).train()
    with lora_fx.disabled(model):
        torch.testing.assert_close(model(TOKENS), toy()(TOKENS), **ROUNDING)
    assert model.output.lora_dropout == 0.5


def test_merge_and_unmerge():
    model = shake(toy("pissa"))
    before, expected = {n: p.clone() for n, p in model.named_parameters()}, model(TOKENS)
    torch.testing.assert_close(lora_fx.merge(model)(TOKENS), expected, rtol=1e-4, atol=1e-5)
    lora_fx.unmerge(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    lora_fx.remove(lora_fx.merge(model))
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_starting_afresh():
    model = toy("pissa")
    start = copy.deepcopy(model.state_dict())
    shake(model)
    for module in (model.output, model.layers["0"].w1):
        module.reset_adapters()
    for name in ("output.weight", "output.lora_a", "output.lora_b", "layers.0.w1.lora_a"):
        torch.testing.assert_close(model.state_dict()[name], start[name])
    model.init_weights(seed=4)
    plain = toy()
    plain.init_weights(seed=4)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS), **ROUNDING)
    assert all(torch.equal(p, q) for p, q in zip(lora_fx.remove(model).parameters(), plain.parameters(), strict=True))
    module = toy("olora").layers["0"].w1
    module.reset_parameters()
    torch.testing.assert_close(torch.linalg.qr(module._lora_base.weight)[0][:, :4], module.lora_b, **ROUNDING)


def test_checkpoints_hold_the_residual():
    model = shake(toy("pissa"))
    state = model.state_dict()
    other = toy("pissa")
    other.load_state_dict(state)
    assert torch.equal(other(TOKENS), model(TOKENS))
    with pytest.raises(ValueError, match=r"holds the residual that init='pissa' left .* load the base before"):
        other.load_state_dict(toy().state_dict(), strict=False)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_bases_that_cannot_change():
    config = LoRAConfig(rank=4, init="pissa")
    fix = r"use init='kaiming', or leave it out with exclude_modules=\['0'\]"
    with torch.device("meta"):
        refused(nn.ModuleList([nn.Linear(8, 8)]), config, rf"0 \(Linear\): init='pissa' .* on the meta device .*{fix}")
    refused(nn.ModuleList([PackedLinear(10, 8)]), config, rf"its weight is Tensor torch.uint8: .*{fix}")
    refused(nn.ModuleList([nn.Linear(3, 8)]), config, r"needs a rank of at most min\(8, 3\), got 4: lower it \(rank_p")
    shared = Toy(vocabulary=16)
    shared.output.weight = shared.tokens.weight
    refused(shared, config, r"output \(Linear\) shares its weight with another module")
    broken = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    with torch.no_grad():
        broken[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"1 \(Linear\) holds NaN or infinity"):
        lora_fx.install(broken, config)
    assert not lora_fx.is_installed(broken)
    quantization = pytest.importorskip("torchao.quantization")
    model = Toy(dim=32)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(
        ValueError, match=r"changes the base weight, and its weight is \w+ torch.float32: install before"
    ):
        lora_fx.install(model, config)
    with pytest.raises(ValueError, match="use_dora with init='pissa' is not supported"):
        LoRAConfig(use_dora=True, init="pissa")


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", CHANGING)
@pytest.mark.parametrize("scale", [None, -0.7, 0.0])
def test_files_are_for_the_untouched_base(tmp_path, init, scale):
    model = toy(init, rank_pattern={"wq": 3}, alpha_pattern={"w1": 2.0}, use_rslora=True)
    train(model)
    if scale is not None:
        model.output.lora_scale.fill_(scale)
    lora_fx.save_adapter(model, tmp_path)
    room = {"rtol": 1e-4, "atol": 1e-5}
    other = lora_fx.load_adapter(toy(), tmp_path)
    torch.testing.assert_close(other(TOKENS), model(TOKENS), **room)
    assert other.output.lora_a.shape[0] == 8 and other.layers["0"].attention.wq.lora_a.shape[0] == 6
    torch.testing.assert_close(in_peft(toy(), tmp_path)(TOKENS), model(TOKENS), **room)
    assert json.loads((tmp_path / CONFIG).read_text())["init_lora_weights"] is True
    for rank in (4, 8):  # also where the ranks are equal: the file is for another weight
        holder = toy(init, rank=rank, rank_pattern={"wq": rank - 2})
        before = snapshot(holder)
        with pytest.raises(
            ValueError, match=rf"holds the residual that init='{init}' left .* for the weight as it was"
        ):
            lora_fx.load_adapter(holder, tmp_path)
        assert_same(before, snapshot(holder))


def test_converted_as_peft_converts(tmp_path):
    """The same training in both packages gives files of the same function."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["w1", "w2"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(toy(), config)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.25)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = toy("pissa", target_modules=["w1", "w2"])
    with torch.no_grad():
        for parameter in lora_fx.adapter_parameters(ours):
            parameter.mul_(1.25)
    read = lora_fx.load_adapter(toy(), tmp_path / "theirs")
    torch.testing.assert_close(read(TOKENS), ours(TOKENS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "kaiming"])
def test_names_of_initialisations_both_ways(tmp_path, init):
    peft = pytest.importorskip("peft")
    model = shake(toy(init))
    lora_fx.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())["init_lora_weights"]
    assert written == (True if init == "kaiming" else init)
    assert peft.LoraConfig.from_pretrained(tmp_path).init_lora_weights == written
    torch.testing.assert_close(in_peft(toy(), tmp_path)(TOKENS), model(TOKENS), **TOLERANCE)
    assert lora_fx.load_adapter(toy(), tmp_path).output.lora_init == init
