"""Modules that are trained whole beside the adapters."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.peft_files import CONFIG, PREFIX, TENSORS
from tests.test_peft_exchange import TOLERANCE, in_peft
from tests.toy_models import TOKENS, TOY_LINEARS, Toy, adapted, assert_same, refused, shake, snapshot, train

HEAD = LoRAConfig(rank=2, alpha=4.0, modules_to_save="output")
MORE = LoRAConfig(rank=2, alpha=4.0, modules_to_save=["output", "tokens", "re:layers.0.norm", "layers.1.attention"])


def toy(config=None, **kwargs):
    torch.manual_seed(0)
    model = Toy(**kwargs)
    return model if config is None else shake(lora_fx.install(model, config))


def test_what_trains():
    model = toy()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lora_fx.install(model, MORE)
    below = [f"layers.1.attention.{name}" for name in ("wq", "wk", "wv", "wo")]
    assert adapted(model) == sorted(set(TOY_LINEARS) - {"output", *below})
    assert type(model.output) is nn.Linear
    whole = {"tokens.weight", "output.weight", "layers.0.norm.weight", "layers.0.norm.bias"}
    whole |= {f"{path}.weight" for path in below}
    named = dict(lora_fx.named_adapter_parameters(model))
    assert {name for name in named if "lora_" not in name} == whole
    for _ in range(2):
        assert {name for name, p in model.named_parameters() if p.requires_grad} == named.keys()
        model.requires_grad_(False)
        lora_fx.freeze(model)
    assert [name for name, _ in lora_fx.named_adapter_parameters(model.output)] == ["weight"]
    losses = train(model)
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name]) == (name not in whole), name


def test_gradients_against_float64():
    model = toy(LoRAConfig(rank=2, modules_to_save=["output", "layers.0.norm"], target_modules="w1"))
    exact = copy.deepcopy(model).double()
    for one in (model, exact):
        F.cross_entropy(one(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    pairs = zip(lora_fx.adapter_parameters(model), lora_fx.adapter_parameters(exact), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_remove_restores_everything(copied):
    model = toy(bias=True)
    model.output.weight.requires_grad_(False)
    expected, before = model(TOKENS), snapshot(model)
    lora_fx.install(model, MORE)
    train(model)
    model.zero_grad()
    model = copied(model) if copied else model
    after = snapshot(lora_fx.remove(model))
    before["tensors"] = after["tensors"] = None  # training wrote into some
    assert_same(before, after)
    assert torch.equal(model(TOKENS), expected)


def test_a_merged_model_keeps_what_was_trained():
    model = toy(MORE)
    train(model)
    expected = model(TOKENS)
    lora_fx.merge(model)
    assert not any(p.requires_grad for p in model.parameters())
    lora_fx.unmerge(model)
    assert all(p.requires_grad for p in lora_fx.adapter_parameters(model))
    lora_fx.remove(lora_fx.merge(model))
    torch.testing.assert_close(model(TOKENS), expected)
    assert not any("_lora_original" in module.__dict__ for module in model.modules())


def test_disabled_is_the_first_model_without_recompiling():
    torch._dynamo.reset()
    model = toy()
    expected = model(TOKENS)
    shake(lora_fx.install(model, MORE))
    trained = model(TOKENS)
    counter = CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter, fullgraph=True)
    y = model(TOKENS)
    torch.testing.assert_close(y, trained)
    with lora_fx.disabled(model):
        torch.testing.assert_close(model(TOKENS), expected)
        with lora_fx.disabled(model):
            torch.testing.assert_close(model(TOKENS), expected)
    y.sum().backward()  # what its forward saved was not written to
    torch.testing.assert_close(model(TOKENS), trained)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_running_statistics():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(6, 4)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(self.up(x))

    model = Normed()
    before = snapshot(model)
    lora_fx.install(model, LoRAConfig(rank=2, modules_to_save="norm"))
    model(torch.randn(8, 6))
    trained = copy.deepcopy(model.norm.running_mean)
    with lora_fx.disabled(model):
        model(torch.randn(8, 6))
    assert torch.equal(model.norm.running_mean, trained) and model.norm.num_batches_tracked == 1
    after = snapshot(lora_fx.remove(model))
    before["tensors"] = after["tensors"] = None
    assert_same(before, after)


def test_init_weights_makes_new_originals():
    with torch.device("meta"):
        model = lora_fx.install(Toy(), HEAD)
    for call in (lora_fx.remove, lambda m: lora_fx.disabled(m).__enter__()):
        with pytest.raises(ValueError, match="output is trained whole and was on the meta device at install"):
            call(model)
    model.to_empty(device="cpu").init_weights()
    first = model(TOKENS)
    train(model)
    assert not torch.equal(model(TOKENS), first)
    with lora_fx.disabled(model):
        assert torch.equal(model(TOKENS), first)
    assert torch.equal(lora_fx.remove(model)(TOKENS), first)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoRAConfig(modules_to_save="outptu"), r"modules_to_save: 'outptu' matches no module.*Near misses: output"),
        (LoRAConfig(modules_to_save="out"), r"matches no module"),
        (LoRAConfig(modules_to_save="re:.*"), r"modules_to_save leaves no linear"),
        (LoRAConfig(modules_to_save="output", target_modules=["wq", "output"]), r"'output' names only what modules_to"),
        (LoRAConfig(modules_to_save="layers", rank_pattern={"output": 2, "wq": 3}), "'wq' matches only linears that"),
    ],
)
def test_names_that_do_not_fit(config, match):
    refused(toy(), config, match)


def test_a_module_without_parameters():
    refused(
        nn.Sequential(nn.Linear(4, 4), nn.SiLU()), LoRAConfig(modules_to_save="1"), r"nothing with parameters \(1: SiLU"
    )


def test_shared_weights():
    model = toy()
    model.output.weight = model.tokens.weight
    refused(model, HEAD, "output shares a parameter with tokens, which would be trained as well: name both")
    expected = model(TOKENS)
    lora_fx.install(model, LoRAConfig(rank=2, modules_to_save=["output", "tokens"]))
    assert [name for name, _ in lora_fx.named_adapter_parameters(model) if "lora_" not in name] == ["tokens.weight"]
    train(model)
    with lora_fx.disabled(model):
        assert model.output.weight is model.tokens.weight
        assert torch.equal(model(TOKENS), expected)
    assert torch.equal(lora_fx.remove(model)(TOKENS), expected) and model.output.weight is model.tokens.weight


def test_quantised_modules():
    quantization = pytest.importorskip("torchao.quantization")
    model = toy(dim=32)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"output \(Linear\) cannot be trained whole: its weight is quantised"):
        lora_fx.install(model, HEAD)
    assert not lora_fx.is_installed(model)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [HEAD, MORE], ids=["head", "more"])
def test_files_both_ways(tmp_path, config):
    peft = pytest.importorskip("peft")
    model = toy(config)
    train(model)
    lora_fx.save_adapter(model, tmp_path / "ours")
    theirs = in_peft(toy(), tmp_path / "ours")
    torch.testing.assert_close(theirs(TOKENS), model(TOKENS), **TOLERANCE)
    again = lora_fx.load_adapter(toy(), tmp_path / "ours")
    assert torch.equal(again(TOKENS), model(TOKENS)) and adapted(again) == adapted(model)
    held = [name for name, _ in lora_fx.named_adapter_parameters(again)]
    assert held == [name for name, _ in lora_fx.named_adapter_parameters(model)]
    with lora_fx.disabled(again):
        assert torch.equal(again(TOKENS), toy()(TOKENS))
    # From PEFT, into a model without adapters and into one that has them.
    names = ["output"] if config is HEAD else ["output", "tokens", "attention", "0.norm"]
    trained = peft.get_peft_model(toy(), peft.LoraConfig(r=2, target_modules=["w1", "w2"], modules_to_save=names))
    train(trained)
    trained.save_pretrained(tmp_path / "theirs")
    read = lora_fx.load_adapter(toy(), tmp_path / "theirs")
    torch.testing.assert_close(read(TOKENS), trained(TOKENS), **TOLERANCE)
    into = lora_fx.load_adapter(shake(lora_fx.load_adapter(toy(), tmp_path / "theirs")), tmp_path / "theirs")
    assert torch.equal(into(TOKENS), read(TOKENS))


def test_files_that_do_not_fit(tmp_path):
    lora_fx.save_adapter(toy(HEAD), tmp_path)
    key = f"{PREFIX}output.weight"
    tensors, config = load_file(tmp_path / TENSORS), json.loads((tmp_path / CONFIG).read_text())
    assert config["modules_to_save"] == ["output"]

    def check(match, *models, values=None, **changes):
        save_file({**tensors, **(values or {})}, tmp_path / TENSORS, {"format": "pt"})
        (tmp_path / CONFIG).write_text(json.dumps({**config, **changes}))
        for model in models or (toy(), toy(HEAD)):
            before = snapshot(model)
            with pytest.raises(ValueError, match=match) as raised:
                lora_fx.load_adapter(model, tmp_path)
            assert str(tmp_path) in str(raised.value)
            assert_same(before, snapshot(model))

    check("'base_model.model.output.weight' is no factor", modules_to_save=None)
    check(r"output.weight is \[12, 16\] in the model and \[3, 16\]", values={key: torch.ones(3, 16)})
    check("output.weight holds NaN", values={key: torch.full((12, 16), torch.nan)})
    check("the model has no output.bias", values={f"{PREFIX}output.bias": torch.ones(12)})
    check("has values for output, which is not trained whole", toy(LoRAConfig(rank=2)))
    check("has values for output, which is not trained whole", toy(LoRAConfig(rank=2, exclude_modules="output")))
    check("lacks base_model.model.layers.0.norm.weight, and modules_to_save in", modules_to_save=["output", "0.norm"])
    tensors.pop(key)
    check("lacks base_model.model.output.weight, and modules_to_save in")
    check("output is trained whole, and .* has no values for it", toy(HEAD), modules_to_save=None)


def test_names_that_peft_finds_in_other_paths(tmp_path):
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Module()
            self.inner.wo = nn.Module()
            self.inner.wo.w1 = nn.Linear(4, 4)
            self.wo = nn.Linear(4, 4)

        def forward(self, x):
            return self.wo(self.inner.wo.w1(x))

    torch.manual_seed(0)
    plain = Nested()
    model = shake(lora_fx.install(copy.deepcopy(plain), LoRAConfig(rank=2, modules_to_save="re:wo")))
    with pytest.warns(
        UserWarning, match=r"\(wo\), and so the adapter of inner\.wo\.w1 \(1 in all\); load_adapter reads it"
    ):
        lora_fx.save_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    other = lora_fx.load_adapter(plain, tmp_path)
    assert torch.equal(other(x), model(x)) and adapted(other) == ["inner.wo.w1"]
    assert not other.inner.wo.w1.weight.requires_grad
