"""The Llama 3 of the examples: sizes, initialisation, positions, attention."""

import pytest
import torch
import torch.nn.functional as F

import lora_fx
from llama3 import CONFIGS, LORA, Attention, Llama, LlamaConfig, apply_rope, rope_table


def parameters(config: LlamaConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Llama(config).parameters())


def build(config: LlamaConfig = CONFIGS["tiny"], seed: int = 0, **kwargs) -> Llama:
    model = Llama(config, **kwargs)
    torch.manual_seed(seed)
    model.init_weights()
    return model


def test_sizes():
    assert parameters(CONFIGS["8B"]) == 8_030_261_248  # Meta-Llama-3-8B
    debug = CONFIGS["debug"]
    assert (debug.dim, debug.n_layers, debug.n_heads, debug.vocab_size, debug.ffn_dim) == (256, 6, 16, 2048, 768)
    assert parameters(debug) == 6_163_712


def test_names_are_torchtitan_s():
    names = set(dict(build().named_parameters()))
    block = {f"attention.{n}.weight" for n in ("wq", "wk", "wv", "wo")}
    block |= {f"feed_forward.{n}.weight" for n in ("w1", "w2", "w3")}
    block |= {"attention_norm.weight", "ffn_norm.weight"}
    assert names == {f"layers.{i}.{name}" for i in range(2) for name in block} | {
        "tok_embeddings.weight",
        "norm.weight",
        "output.weight",
    }


def test_refused_sizes():
    with pytest.raises(ValueError, match="16 must be 3 heads"):
        LlamaConfig(dim=16, n_layers=1, n_heads=3, vocab_size=8)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key/value heads"):
        LlamaConfig(dim=16, n_layers=1, n_heads=4, n_kv_heads=3, vocab_size=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_made_on_meta_are_those_made_at_once(dtype):
    with torch.device("meta"):
        model = Llama(CONFIGS["tiny"], dtype=dtype)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    expected = build(dtype=dtype)
    assert model.rope.dtype == torch.float32 and torch.equal(model.rope, expected.rope)
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters()):
        assert ours.dtype == dtype and torch.equal(ours, theirs), name


def test_adapters_installed_on_meta_are_initialised_too():
    with torch.device("meta"):
        model = lora_fx.install(Llama(CONFIGS["tiny"]), LORA["debug"])
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    model.init_weights()
    tokens = torch.arange(32).view(1, 32)
    assert torch.equal(model(tokens), build()(tokens))  # lora_b is zero
    assert all(p.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("lora_a"))


def test_the_debug_lora_adapts_every_linear():
    with torch.device("meta"):
        model = lora_fx.install(Llama(CONFIGS["debug"]), LORA["debug"])
    adapted = {name for name, m in model.named_modules() if isinstance(m, lora_fx.LoRAModule)}
    assert len(adapted) == 6 * 7 + 1 and "output" in adapted


def test_causal():
    model = build()
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 10] = (tokens[:, 10] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-6)
    assert ((before[:, 10:] - after[:, 10:]).abs().amax(-1) > 1e-4).all()


def test_grouped_heads_are_repeated_heads():
    config = CONFIGS["tiny"]
    attention = Attention(config)
    x = torch.randn(2, 12, config.dim, generator=torch.Generator().manual_seed(0))
    rope = rope_table(config.head_dim, 12, config.rope_theta)

    def heads(linear: torch.nn.Linear) -> torch.Tensor:
        return linear(x).view(2, 12, -1, config.head_dim)

    repeats = config.n_heads // config.kv_heads
    q, k = apply_rope(heads(attention.wq), rope), apply_rope(heads(attention.wk), rope)
    k, v = k.repeat_interleave(repeats, 2), heads(attention.wv).repeat_interleave(repeats, 2)
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / config.head_dim**0.5
    weights = F.softmax(scores.masked_fill(torch.ones(12, 12).triu(1).bool(), float("-inf")), -1)
    expected = attention.wo(torch.einsum("bhqk,bkhe->bqhe", weights, v).flatten(-2))
    torch.testing.assert_close(attention(x, rope), expected)


def test_rope_keeps_lengths_and_sees_distances_only():
    table = rope_table(16, 64, 500_000.0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    score = {
        (m, n): (apply_rope(q, table[m : m + 1]) * apply_rope(k, table[n : n + 1])).sum()
        for m, n in [(3, 1), (40, 38), (62, 60), (40, 30)]
    }
    torch.testing.assert_close(score[40, 38], score[3, 1])
    torch.testing.assert_close(score[62, 60], score[3, 1])
    assert (score[40, 30] - score[3, 1]).abs() > 1e-3
    torch.testing.assert_close(apply_rope(q, table[5:6]).norm(), q.norm())
    torch.testing.assert_close(apply_rope(q, table[:1]), q)


def test_a_pipeline_stage_runs_without_the_parts_of_others():
    whole, first, last = build(), build(), build()
    first.norm = first.output = None
    del first.layers["1"]
    last.tok_embeddings = None
    del last.layers["0"]
    tokens = torch.arange(20).view(2, 10)
    torch.testing.assert_close(last(first(tokens)), whole(tokens))
