"""Adapters that go to PEFT and come from it: equal logits both ways, with the real package."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import json
import warnings

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.peft_files import CONFIG
from tests.toy_models import TOKENS, TOY_LINEARS, Toy, adapted, assert_same, shake, snapshot, train

peft = pytest.importorskip("peft")

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def toy(bias=False):
    torch.manual_seed(0)
    return Toy(bias=bias).eval()


def shaken_peft(model, config, name="default", seed=1):
    """`model` with PEFT's adapters, away from their start."""
    model = peft.get_peft_model(model, config, adapter_name=name).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def in_peft(model, folder, **kwargs):
    """What PEFT makes of a folder, every warning of which is an error: it only warns of keys that it does not find."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # of transformers' own names, which PEFT uses
        return peft.PeftModel.from_pretrained(model, folder, **kwargs).eval()


# ---- to PEFT ---------------------------------------------------------------------------------------------------------

CONFIGS = {
    "plain": LoRAConfig(rank=4, alpha=8.0),
    "dropout": LoRAConfig(rank=4, alpha=8.0, dropout=0.3),
    "patterns": LoRAConfig(
        rank=4,
        alpha=10.0,
        rank_pattern={"wq": 3, "layers.1.w1": 7},
        alpha_pattern={"layers.1.attention.wq": 0.3, "w2": 5.0},
    ),
    "rslora": LoRAConfig(rank=3, alpha=5.0, use_rslora=True, rank_pattern={"wk": 5}, alpha_pattern={"wv": 0.7}),
    "some": LoRAConfig(rank=2, target_modules=["layers.0.w1", "wq", "output"]),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_trained_here_read_by_peft(tmp_path, config, bias):
    model = shake(lora_fx.install(toy(bias), config))
    train(model.train(), steps=2)
    model.eval().layers["0"].attention.wq.lora_scale.fill_(-0.37)
    lora_fx.save_adapter(model, tmp_path)
    theirs = in_peft(toy(bias), tmp_path)
    torch.testing.assert_close(theirs(TOKENS), model(TOKENS), **TOLERANCE)
    assert (theirs(TOKENS) - toy(bias)(TOKENS)).abs().max() > 0.1
    layers = {path: module for path, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert sorted(layers) == adapted(model)
    for path, layer in layers.items():
        ours = model.get_submodule(path)
        assert torch.tensor(layer.scaling["default"]) == ours.lora_scale, path
        assert layer.r["default"] == ours.lora_a.shape[0]
        assert getattr(layer.lora_dropout["default"], "p", 0.0) == config.dropout


def test_paths_that_end_alike_are_told_apart_by_peft_too(tmp_path):
    def nested():
        torch.manual_seed(0)
        inner = nn.Sequential()
        inner.add_module("w1", nn.Linear(8, 8))
        outer = nn.Sequential()
        outer.add_module("w1", nn.Linear(8, 8))
        outer.add_module("block", inner)
        return outer

    model = shake(lora_fx.install(nested(), LoRAConfig(rank=2, target_modules="re:w1", rank_pattern={"re:w1": 3})))
    lora_fx.save_adapter(model, tmp_path)
    x = torch.randn(4, 8)
    torch.testing.assert_close(in_peft(nested(), tmp_path)(x), model(x), **TOLERANCE)


def test_bfloat16_adapters_in_peft(tmp_path):
    model = shake(lora_fx.install(toy().bfloat16(), LoRAConfig(rank=4)))
    lora_fx.save_adapter(model, tmp_path)
    plain = toy().bfloat16().float()
    theirs = in_peft(plain, tmp_path)
    torch.testing.assert_close(theirs(TOKENS), model.float()(TOKENS), **TOLERANCE)


def test_a_name_of_their_own_and_training_on(tmp_path):
    model = shake(lora_fx.install(toy(), LoRAConfig(rank=4)))
    lora_fx.save_adapter(model, tmp_path)
    theirs = in_peft(toy(), tmp_path, adapter_name="ours", is_trainable=True)
    assert all(p.requires_grad == ("lora_" in name) for name, p in theirs.named_parameters())
    train(theirs.train())
    theirs.eval().save_pretrained(tmp_path)
    lora_fx.load_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(model.eval()(TOKENS), theirs(TOKENS), **TOLERANCE)


# ---- from PEFT -------------------------------------------------------------------------------------------------------

PEFT_CONFIGS = {
    "suffixes": {"target_modules": ["wq", "w1"], "r": 4, "lora_alpha": 6},
    "full paths": {"target_modules": ["layers.0.w1", "layers.1.attention.wo", "output"], "r": 3},
    "expression": {"target_modules": r".*\.attention\.w[qk]", "r": 4},
    "all linears": {"target_modules": "all-linear", "r": 4, "lora_dropout": 0.2},
    "all but some": {"target_modules": ["wq", "wk", "w2"], "exclude_modules": ["layers.0.w2"], "r": 4},
    "a layer": {
        "target_modules": ["wq", "w2"],
        "layers_to_transform": 0,
        "layers_pattern": "layers",
        "r": 4,
    },
    "patterns": {
        "target_modules": ["wq", "w1", "w2"],
        "r": 4,
        "lora_alpha": 7,
        "rank_pattern": {"w1": 2, r"^layers\.0\.w2": 5, r"1\.attention.*": 3},
        "alpha_pattern": {"layers.1.w1": 3, "wq": 11},
    },
    "rslora": {"target_modules": ["wq", "w1"], "r": 5, "use_rslora": True, "rank_pattern": {"w1": 3}},
    "gaussian": {"target_modules": ["wq"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("values", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_made_by_peft_read_here(tmp_path, values, bias):
    theirs = shaken_peft(toy(bias), peft.LoraConfig(**values))
    theirs.save_pretrained(tmp_path)
    model = lora_fx.load_adapter(toy(bias), tmp_path)
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS), **TOLERANCE)
    assert (model(TOKENS) - toy(bias)(TOKENS)).abs().max() > 0.02
    layers = [path for path, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")]
    assert adapted(model) == sorted(layers)
    assert model.get_submodule(layers[0]).lora_dropout == values.get("lora_dropout", 0.0)
    # And into adapters that are there, on the way back to PEFT.
    again = lora_fx.load_adapter(shake(lora_fx.load_adapter(toy(bias), tmp_path), seed=8), tmp_path)
    lora_fx.save_adapter(again, tmp_path / "back")
    torch.testing.assert_close(in_peft(toy(bias), tmp_path / "back")(TOKENS), theirs(TOKENS), **TOLERANCE)


def test_adapters_of_other_names(tmp_path):
    theirs = shaken_peft(toy(), peft.LoraConfig(target_modules=["wq"], r=2), "first")
    theirs.add_adapter("second", peft.LoraConfig(target_modules=["w1"], r=3))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"pass {tmp_path / 'first'} or {tmp_path / 'second'}"):
        lora_fx.load_adapter(toy(), tmp_path)
    model = lora_fx.load_adapter(toy(), tmp_path / "first")
    assert adapted(model) == [path for path in sorted(TOY_LINEARS) if path.endswith("wq")]
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS), **TOLERANCE)


def test_bfloat16_adapters_of_peft(tmp_path):
    theirs = shaken_peft(toy(), peft.LoraConfig(target_modules=["wq", "w1"], r=4))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    theirs.save_pretrained(tmp_path)
    expected = in_peft(toy(), tmp_path)(TOKENS)  # which reads them as float32
    torch.testing.assert_close(lora_fx.load_adapter(toy(), tmp_path)(TOKENS), expected, **TOLERANCE)


def test_a_compiled_model_that_got_its_adapters_in_peft(tmp_path):
    """Its paths start with `_orig_mod.`; of those PEFT finds none in a plain model, warns, and changes nothing."""
    theirs = shaken_peft(torch.compile(toy(), backend="eager"), peft.LoraConfig(target_modules=["wq", "w1"], r=4))
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(lora_fx.load_adapter(toy(), tmp_path)(TOKENS), theirs(TOKENS), **TOLERANCE)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        read = peft.PeftModel.from_pretrained(toy(), tmp_path).eval()
    assert torch.equal(read(TOKENS), toy()(TOKENS))


REFUSED = {
    "embedding": ({"target_modules": ["tokens", "wq"]}, "adapter of an embedding"),
    "biases": ({"target_modules": ["w1"], "lora_bias": True}, "lora_bias is True"),
    "pissa": ({"target_modules": ["w1"], "init_lora_weights": "pissa"}, "changed the base weights"),
    "experts": ({"target_modules": [], "target_parameters": ["layers.0.w1.weight"]}, "no such stack of matrices"),
}


@pytest.mark.parametrize(("values", "match"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused(tmp_path, values, match):
    peft.get_peft_model(toy(), peft.LoraConfig(r=2, **values)).save_pretrained(tmp_path)
    model = toy()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        lora_fx.load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def test_other_methods_are_refused(tmp_path):
    peft.get_peft_model(toy(), peft.IA3Config(target_modules=["wq"], feedforward_modules=[])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="peft_type is 'IA3'"):
        lora_fx.load_adapter(toy(), tmp_path)


# ---- transformers ----------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def transformer(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "GPT2":
        config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)
        return transformers.GPT2LMHeadModel(config).eval()
    config = getattr(transformers, f"{kind}Config")(**SMALL)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma2"])
def test_transformers_both_ways(tmp_path, kind):
    """More than twenty linears, which PEFT abbreviates; Qwen2's have biases, and Gemma2's head is its embedding."""
    ids = torch.randint(64, (2, 9))
    model = shake(
        lora_fx.install(
            transformer(kind),
            LoRAConfig(rank=4, alpha=5.0, exclude_modules="lm_head", rank_pattern={"k_proj": 3}),
        )
    )
    with torch.no_grad():
        lora_fx.save_adapter(model, tmp_path / "ours")
        theirs = in_peft(transformer(kind), tmp_path / "ours")
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, **TOLERANCE)
        assert (model(ids).logits - transformer(kind)(ids).logits).abs().max() > 1e-3
        # As somebody may write it by hand; both leave a head out.
        file = tmp_path / "ours" / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": "all-linear"}))
        again = lora_fx.load_adapter(transformer(kind), tmp_path / "ours")
        assert torch.equal(again(ids).logits, model(ids).logits)
        for values in (
            {"target_modules": ["q_proj", "v_proj", "down_proj"]},
            {"target_modules": "all-linear"},
            {"target_modules": r".*\.2\.mlp\.\w+_proj"},
            {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        ):
            config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", rank_pattern={"up_proj": 2}, **values)
            theirs = shaken_peft(transformer(kind), config)
            theirs.save_pretrained(tmp_path / "theirs")
            model = lora_fx.load_adapter(transformer(kind), tmp_path / "theirs")
            torch.testing.assert_close(model(ids).logits, theirs(ids).logits, **TOLERANCE)


def test_layers_that_are_no_linears_are_named(tmp_path):
    theirs = shaken_peft(transformer("GPT2"), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D and no nn\.Linear"):
        lora_fx.load_adapter(transformer("GPT2"), tmp_path)
