"""A model with its adapters merged in, as a model of its original classes: it loads where nothing was ever adapted."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs
import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from tests.test_adapters import alone, together
from tests.toy_models import TOKENS, Toy, assert_same, snapshot


def exported(model):
    """The recipe of the README."""
    return lora_fx.remove(lora_fx.merge(copy.deepcopy(model), keep=False))


@pytest.mark.parametrize(
    ("dtype", "compiled"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)]
)
def test_the_export_loads_into_an_untouched_model(tmp_path, dtype, compiled):
    model = together(("en", "fr")).to(dtype).eval()
    lora_fx.set_adapter(model, "fr")
    if compiled:
        model.compile(backend="eager")
    expected, before = model(TOKENS), snapshot(model)
    export = exported(model)
    assert_same(before, snapshot(model))
    untouched = Toy().to(dtype).eval()
    assert [type(m) for m in export.modules()] == [type(m) for m in untouched.modules()]
    assert all(p.requires_grad for p in export.parameters())
    save_file(export.state_dict(), tmp_path / "model.safetensors")
    untouched.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    exact = alone("fr").double().eval()(TOKENS)
    allowed = 2 * (expected.double() - exact).norm() + 1e-6 * exact.norm()
    assert (untouched(TOKENS).double() - exact).norm() <= allowed
    assert torch.equal(untouched(TOKENS), export(TOKENS))
    assert torch.equal(model(TOKENS), expected), "the model itself goes on with its adapters"


def test_an_export_takes_no_second_copy_where_the_model_is_given_up():
    model = together(("en", "fr")).eval()
    expected, weights = model(TOKENS), [p for n, p in model.named_parameters() if "lora" not in n]
    lora_fx.remove(lora_fx.merge(model, keep=False))
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    assert type(model.output) is nn.Linear
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_saves_and_loads_it(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    lora_fx.install(model, lora_fx.LoRAConfig(rank=4, exclude_modules="lm_head"), adapter_name="en")
    lora_fx.add_adapter(model, "fr", lora_fx.LoRAConfig(rank=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*lora_fx.adapter_parameters(model, "en"), *lora_fx.adapter_parameters(model, "fr")):
            parameter[:2, :2] = torch.randn(2, 2, generator=generator)
    tokens = torch.randint(0, 64, (3, 7))
    outputs = {}
    for name in ("en", "fr"):
        outputs[name] = lora_fx.set_adapter(model, name)(tokens).logits
        exported(model).save_pretrained(tmp_path / name)
        keys = load_file(tmp_path / name / "model.safetensors").keys()
        assert not any("lora" in key for key in keys) and ("lm_head.weight" in keys) is not tied
        other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(other) is transformers.LlamaForCausalLM and not lora_fx.is_installed(other)
        torch.testing.assert_close(other(tokens).logits, outputs[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs["en"], outputs["fr"], atol=1e-2)
    # Prompts of different lengths, each with its own adapter, through transformers' own generation.
    pad = {"pad_token_id": 0, "do_sample": False, "max_new_tokens": 5}
    rows, lengths = ["en", "fr", None], [7, 4, 6]
    mask = torch.tensor([[0] * (7 - length) + [1] * length for length in lengths])
    with lora_fx.adapters_per_row(model, rows):
        found = model.generate(tokens * mask, attention_mask=mask, **pad)
    for i, (name, length) in enumerate(zip(rows, lengths)):
        lora_fx.set_adapter(model, name or "en")
        prompt = tokens[i : i + 1, 7 - length :]
        with torch.no_grad() if name else lora_fx.disabled(model):
            theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), **pad)
        assert torch.equal(found[i, 7:], theirs[0, length:])
    with lora_fx.adapters_per_row(model, ["en", "en", "fr", "fr"]):  # each row once for each of its beams
        model.generate(tokens[:2], num_beams=2, attention_mask=torch.ones_like(tokens[:2]), **pad)
