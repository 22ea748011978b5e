"""Models of transformers: adapters on every linear, training, generation, GPT-2's Conv1D, rewritten and right."""

# mypy: no-check-untyped-defs
import copy
import pickle

import pytest
import torch

import lora_fx
from lora_fx import Conv1DConverter, LoRAConfig
from tests.toy_models import adapted, assert_same, shake, snapshot

transformers = pytest.importorskip("transformers")

from hf_models import KINDS, Kind  # noqa: E402  # it imports transformers
from matrix import Case, explained  # noqa: E402

WRITERS = [name for name, kind in KINDS.items() if kind.inputs in ("causal", "pair")]


def one_layer(name: str) -> torch.nn.Module:
    return KINDS[name].sized(1).build()


@pytest.mark.parametrize("name", KINDS)
def test_every_model_trains_and_is_given_back(name):
    model, batch = one_layer(name), KINDS[name].batch()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    untouched = model(**batch).logits.detach()
    lora_fx.install(model, LoRAConfig(rank=4))
    linears = [path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert adapted(model) == sorted(linears)
    # To the bit, but for T5: the bias of its attention trains no more, and then torch takes another kernel.
    torch.testing.assert_close(model(**batch).logits.detach(), untouched, rtol=0, atol=1e-5 if name == "t5" else 0)
    optimizer = torch.optim.AdamW(lora_fx.adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = [path for path, p in lora_fx.named_adapter_parameters(model) if p.grad is None or not p.grad.any()]
    assert still == []
    lora_fx.remove(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert torch.equal(model(**batch).logits, untouched)


def greedy(model, tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Generation as it is defined: the likeliest token after all the others, without a cache."""
    for _ in range(length):
        logits = model(input_ids=tokens, use_cache=False).logits
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    return tokens


def greedy_pair(model, source: torch.Tensor, length: int) -> torch.Tensor:
    """The same of a model that reads a source and writes a target."""
    tokens = torch.full((len(source), 1), model.config.decoder_start_token_id)
    for _ in range(length):
        logits = model(input_ids=source, decoder_input_ids=tokens, use_cache=False).logits
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    return tokens


@torch.no_grad()
def generated(model, tokens: torch.Tensor, length: int) -> torch.Tensor:
    mask = torch.ones_like(tokens)
    return model.generate(tokens, attention_mask=mask, max_new_tokens=length, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("name", WRITERS)
def test_generation_runs_the_adapters(name):
    model, tokens = one_layer(name).eval(), KINDS[name].batch()["input_ids"][:, :8]
    without = generated(model, tokens, 6)
    shake(lora_fx.install(model, LoRAConfig(rank=4)), std=0.5)
    with torch.no_grad():
        expected = (greedy_pair if KINDS[name].inputs == "pair" else greedy)(model, tokens, 6)
    assert not torch.equal(expected, without)
    assert torch.equal(generated(model, tokens, 6), expected)


@pytest.mark.slow
def test_generation_with_a_compiled_model():
    """One graph for the prompt, one for a token behind it."""
    model, tokens = one_layer("llama").eval(), KINDS["llama"].batch()["input_ids"][:, :8]
    shake(lora_fx.install(model, LoRAConfig(rank=4)), std=0.5)
    expected = generated(model, tokens, 2)
    assert torch.equal(generated(lora_fx.compile(model), tokens, 2), expected)


# A Llama runs in the fast tier, in tests/examples/test_matrix.py; three others have the same linears, and biases are
# here too. `python examples/matrix.py` runs them all.
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("llama", "qwen2", "qwen3", "mistral")])
def test_every_linear_is_rewritten_and_its_gradient_is_right(name):
    # T5 makes its attention's bias require gradients where it is checkpointed, which breaks the graph.
    case = Case(name, "float32", "plain", checkpointing=name != "t5")
    report = explained(case, layers=1)
    assert len(report.graphs) == 1
    assert report.problems() == [] and report.rewritten == len(report.sites) > 0
    assert {site.path for site in report.sites} == {
        path for path, module in one_layer(name).named_modules() if isinstance(module, torch.nn.Linear)
    }
    errors = report.verification
    assert errors is not None and errors.worst_rewritten is not None and errors.worst_unfused is not None
    assert errors.worst_rewritten <= 1.5 * errors.worst_unfused + 2e-6 < 1e-5
    assert errors.output_rewritten < 2e-6


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------

GPT2 = Kind("GPT2LMHeadModel", "GPT2Config", KINDS["gpt2"].values).sized(1)  # with its Conv1Ds
TOKENS = GPT2.batch()["input_ids"]


def test_linears_that_are_a_conv1d_are_named():
    hint = r"\(4 here: (transformer\.)?h\.0\.attn\.c_attn, \.\.\.\).*Conv1DConverter\(\), lora_fx.LoRAConverter"
    with pytest.warns(UserWarning, match=rf"all-linear adapts 1 nn.Linear of GPT2LMHeadModel.*{hint}"):
        assert adapted(lora_fx.install(GPT2.build())) == ["lm_head"]
    with pytest.raises(ValueError, match=r"'c_attn' matches only modules that are no nn.Linear.*Conv1DConverter"):
        lora_fx.install(GPT2.build(), LoRAConfig(target_modules="c_attn"))
    with pytest.raises(
        ValueError, match=rf"GPT2Model holds no nn.Linear: there is nothing to adapt\. A Conv1D.*{hint}"
    ):
        lora_fx.install(transformers.GPT2Model(GPT2.build().config))
    model = KINDS["llama"].build()
    before = snapshot(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM holds no Conv1D"):
        lora_fx.convert(model, [Conv1DConverter()])
    assert_same(before, snapshot(model))


def test_a_converted_conv1d_keeps_its_weights_and_its_forward():
    model, plain = GPT2.build().eval(), GPT2.build().eval()
    lora_fx.convert(model, [Conv1DConverter(), lora_fx.LoRAConverter(LoRAConfig(rank=4))])
    attention, theirs = model.transformer.h[0].attn.c_attn, plain.transformer.h[0].attn.c_attn
    assert isinstance(attention, type(theirs)) and isinstance(attention, (torch.nn.Linear, lora_fx.LoRAModule))
    assert (attention.in_features, attention.out_features) == (128, 384)
    assert attention.lora_a.shape == (4, 128) and attention.lora_b.shape == (384, 4)
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)
    loaded = model.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys and all(".lora_" in key for key in loaded.missing_keys)

    shake(model)
    x = torch.randn(5, 128)
    exact = x.double() @ attention.weight.double() + attention.bias.double()
    exact = exact + 4.0 * (x.double() @ attention.lora_a.double().t()) @ attention.lora_b.double().t()
    torch.testing.assert_close(attention(x).double(), exact, rtol=1e-5, atol=1e-5)
    expected = model(TOKENS).logits.detach()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(TOKENS).logits, expected)
    lora_fx.merge(model.transformer)
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)
    lora_fx.unmerge(model.transformer)
    assert torch.equal(lora_fx.remove(model)(TOKENS).logits, plain(TOKENS).logits)


def test_adapters_of_a_conv1d_go_to_peft_and_come_back(tmp_path):
    peft = pytest.importorskip("peft")
    config = LoRAConfig(rank=4, target_modules=["c_attn", "mlp.c_proj"])
    model = lora_fx.convert(GPT2.build().eval(), [Conv1DConverter(), lora_fx.LoRAConverter(config)])
    shake(model)
    lora_fx.save_adapter(model, tmp_path / "ours")
    expected = model(TOKENS).logits.detach()
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False"):  # and sets it
        theirs = peft.PeftModel.from_pretrained(GPT2.build().eval(), tmp_path / "ours")
    torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"c_attn is a Conv1D and no nn.Linear.*Conv1DConverter"):
        lora_fx.load_adapter(GPT2.build(), tmp_path / "theirs")
    back = lora_fx.load_adapter(lora_fx.convert(GPT2.build().eval(), [Conv1DConverter()]), tmp_path / "theirs")
    assert torch.equal(back(TOKENS).logits, expected)


@pytest.mark.parametrize("values", [{"use_dora": True}, {"init": "pissa"}])
def test_what_reads_the_rows_of_a_weight_is_refused_on_a_conv1d(values):
    model = lora_fx.convert(GPT2.build(), [Conv1DConverter()])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"c_attn \(LinearConv1D\) keeps its weight \[K, N\]"):
        lora_fx.install(model, LoRAConfig(rank=4, **values))
    assert_same(before, snapshot(model))
