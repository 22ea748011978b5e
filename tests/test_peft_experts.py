"""Adapters of experts that go to PEFT and come from it: equal logits both ways, with the real packages."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_fx
from llama3 import CONFIGS, Llama
from lora_fx import LoRAConfig
from lora_fx.peft_files import CONFIG, TENSORS
from tests.toy_models import assert_same, shake, snapshot

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
TOKENS = torch.arange(12).reshape(2, 6)


def llama():
    torch.manual_seed(0)
    model = Llama(CONFIGS["tiny-moe"])
    model.init_weights()
    return model.eval()


def hugging_face(kind):
    """A model of transformers with experts, and its logits."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(**sizes, num_local_experts=4)
        return transformers.MixtralForCausalLM(config).eval()
    if kind == "qwen3":
        config = transformers.Qwen3MoeConfig(**sizes, num_experts=4, moe_intermediate_size=24, head_dim=16)
        return transformers.Qwen3MoeForCausalLM(config).eval()
    config = transformers.GptOssConfig(
        **sizes,
        num_local_experts=4,
        head_dim=16,
        layer_types=["full_attention"],
        rope_parameters={"rope_type": "default"},
    )
    return transformers.GptOssForCausalLM(config).eval()


def logits(model):
    y = model(TOKENS)
    return y if isinstance(y, torch.Tensor) else y.logits


MODELS = {
    "example": (llama, ["experts.w1", "experts.w2", "experts.w3"], ["wq", "shared.w1"]),
    "mixtral": (lambda: hugging_face("mixtral"), ["experts.gate_up_proj", "experts.down_proj"], ["q_proj"]),
    "qwen3": (lambda: hugging_face("qwen3"), ["experts.down_proj", "experts.gate_up_proj"], []),
    # whose matrices are stored the other way round
    "gpt-oss": (lambda: hugging_face("gpt-oss"), ["experts.gate_up_proj", "experts.down_proj"], ["o_proj"]),
}


def in_peft(model, folder):
    """What PEFT makes of a folder; it only warns of keys that it does not find."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(adapter keys|adapter_config|Found missing).*")
        return peft.PeftModel.from_pretrained(model, folder).eval()


FAST = ("example", "qwen3")


@pytest.mark.parametrize(
    ("build", "parameters", "linears"),
    [pytest.param(*model, id=name, marks=[] if name in FAST else pytest.mark.slow) for name, model in MODELS.items()],
)
def test_there_and_back(tmp_path, build, parameters, linears):
    config = LoRAConfig(
        rank=3,
        alpha=4.0,
        target_modules=linears,
        target_parameters=parameters,
        rank_pattern={parameters[0]: 5},
        alpha_pattern={parameters[-1]: 7.0},
    )
    model = shake(lora_fx.install(build(), config))
    lora_fx.save_adapter(model, tmp_path / "ours")
    theirs = in_peft(build(), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(model), **TOLERANCE)
    assert (logits(theirs) - logits(build())).abs().max() > 0.01
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    fresh = lora_fx.load_adapter(build(), tmp_path / "theirs")
    torch.testing.assert_close(logits(fresh), logits(theirs), **TOLERANCE)
    tensors = {name: id(p) for name, p in model.named_parameters()}
    lora_fx.load_adapter(model, tmp_path / "theirs")
    assert tensors == {name: id(p) for name, p in model.named_parameters()}
    torch.testing.assert_close(logits(model), logits(theirs), **TOLERANCE)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_the_format_is_packed_as_it_is_documented(tmp_path):
    model = shake(lora_fx.install(llama(), LoRAConfig(rank=3, target_modules=(), target_parameters=["w1", "w2"])))
    lora_fx.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    experts = model.layers["0"].feed_forward.experts
    prefix = "base_model.model.layers.0.feed_forward.experts"
    a, b = experts.factors("w1")
    for e in range(4):
        assert torch.equal(tensors[f"{prefix}.base_layer.lora_A.weight"][3 * e : 3 * (e + 1)], a[e])
        assert torch.equal(tensors[f"{prefix}.base_layer.lora_B.weight"].reshape(192, 3, 4)[:, :, e], b[e])
    assert tensors[f"{prefix}.lora_A.weight"].shape == (12, 192)
    assert len(tensors) == 8
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == [f"layers.{i}.feed_forward.experts.{w}" for i in (0, 1) for w in ("w1", "w2")]


def test_dropout_is_not_written_beside_experts(tmp_path):
    """PEFT refuses to load it, and it has no part in what a model computes when it is not trained."""
    model = lora_fx.install(llama(), LoRAConfig(rank=3, dropout=0.1, target_modules=(), target_parameters="w1"))
    with pytest.warns(UserWarning, match="wrote lora_dropout 0 instead of 0.1"):
        lora_fx.save_adapter(shake(model), tmp_path)
    torch.testing.assert_close(in_peft(llama(), tmp_path)(TOKENS), model(TOKENS), **TOLERANCE)


def edited(folder, change_tensors=None, **values):
    tensors = load_file(folder / TENSORS)
    if change_tensors is not None:
        change_tensors(tensors)
    save_file(tensors, folder / TENSORS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


KEY = "base_model.model.layers.0.feed_forward.experts.lora_A.weight"
BAD = {
    "not there": (lambda t: (t.pop(KEY), t.pop(KEY.replace("_A", "_B"))), {}, r"lacks \S*experts.lora_A.*w2's"),
    "shape": (lambda t: t.update({KEY: torch.ones(12, 7)}), {}, r"w2 is 4 matrices \[64, 192\] in the model"),
    "rank": (None, {"r": 4}, r"gives \S*experts\.w1 rank 4, and its tensors .* have rank 3"),
    "fewer": (None, {"target_parameters": ["experts.w2"]}, r"no module \S*experts\.base_layer"),
    "unknown": (None, {"target_parameters": ["w1", "w2", "w9"]}, "names w9, and the model has no such stack"),
}


@pytest.mark.parametrize(("change", "values", "match"), BAD.values(), ids=BAD)
def test_damaged_files_are_refused_and_change_nothing(tmp_path, change, values, match):
    model = shake(lora_fx.install(llama(), LoRAConfig(rank=3, target_modules=(), target_parameters=["w1", "w2"])))
    lora_fx.save_adapter(model, tmp_path)
    edited(tmp_path, change, **values)
    for other in (llama(), model):
        before = snapshot(other)
        with pytest.raises(ValueError, match=match):
            lora_fx.load_adapter(other, tmp_path)
        assert_same(before, snapshot(other))


def test_other_adapters_than_the_files_are_refused(tmp_path):
    model = shake(lora_fx.install(llama(), LoRAConfig(rank=3, target_modules=(), target_parameters=["w1", "w2"])))
    lora_fx.save_adapter(model, tmp_path)
    for rank, parameters, match in (
        (3, ["w1"], r"has an adapter for \S*experts.w2, and the model has none"),
        (4, ["w1", "w2"], r"experts.w1 has rank 4 in the model and rank 3 in"),
    ):
        other = lora_fx.install(llama(), LoRAConfig(rank=rank, target_modules=(), target_parameters=parameters))
        with pytest.raises(ValueError, match=match):
            lora_fx.load_adapter(other, tmp_path)


def test_adapters_that_the_files_do_not_name_add_nothing(tmp_path):
    config = LoRAConfig(rank=3, target_modules=(), target_parameters=["w1", "w2"])
    model = shake(lora_fx.install(llama(), config))
    lora_fx.save_adapter(model, tmp_path)
    wider = LoRAConfig(rank=3, target_modules="wq", target_parameters=["w1", "w2", "w3"])
    other = shake(lora_fx.install(llama(), wider), seed=7)
    torch.testing.assert_close(lora_fx.load_adapter(other, tmp_path)(TOKENS), model(TOKENS))


def test_there_and_back_with_a_head_that_is_trained_whole(tmp_path):
    config = LoRAConfig(rank=4, target_modules="wq", target_parameters=MODELS["example"][1], modules_to_save="output")
    model = shake(lora_fx.install(llama(), config), std=0.1)
    lora_fx.save_adapter(model, tmp_path / "ours")
    theirs = in_peft(llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), logits(model), **TOLERANCE)
    assert (logits(model) - logits(llama())).abs().max() > 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    again = lora_fx.load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(logits(again), logits(model), **TOLERANCE)
    assert not torch.equal(again.output.weight, llama().output.weight)
