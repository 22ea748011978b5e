"""Batches whose rows use different adapters: equal to each adapter alone, and one graph for all assignments."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import lora_fx
from lora_fx import LoRAConfig, adapters_per_row
from tests.test_adapters import CONFIGS, alone, refused, together
from tests.toy_models import TOKENS, Mlp, Toy, assert_same, shake, snapshot

NAMES = ("en", "fr", "de")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    """How many graphs Dynamo has captured. A backend may see one twice: `dynamic=True` tries floats as inputs."""
    return counters["stats"]["unique_graphs"]


def exact(name):
    """The model in float64 that has this adapter alone, or none."""
    if name is None:
        return lora_fx.remove(alone("en")).double().eval()
    return alone(name).double().eval()


EXACT = {name: exact(name) for name in (None, *NAMES)}


def tokens(batch, length=5, seed=0):
    return torch.randint(0, 12, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_rows(model, rows, x):
    y = model(x)
    for i, name in enumerate(rows):
        with torch.no_grad():
            expected = EXACT[name](x[i : i + 1])[0]
        error = (y[i].double() - expected).abs().max() / expected.abs().max()
        assert error < 3e-6, (rows, i, error)


@pytest.mark.parametrize("compiled", [False, True])
def test_each_row_is_what_its_adapter_computes_alone(compiled):
    model = together(NAMES).eval()
    if compiled:
        model.compile(backend="eager", fullgraph=True, dynamic=True)
    for seed, rows in enumerate(
        (["en", "fr", None, "de"], [None] * 4, ["fr", "en"], ["de", "de", "fr", "fr", "en", None, "de"])
    ):
        with adapters_per_row(model, rows):
            assert_rows(model, rows, tokens(len(rows), 5 + seed, seed))
    assert graphs() == compiled
    lora_fx.set_adapter(model, "de")  # which plays no role
    with adapters_per_row(model, ["fr", None, "en"]):
        assert_rows(model, ["fr", None, "en"], tokens(3))
    assert graphs() == compiled


def test_batches_of_one_row_and_changed_values_are_the_same_graph():
    model = together(NAMES).eval()
    model.compile(backend="eager", fullgraph=True)
    x = tokens(2)
    with torch.no_grad():
        plain = model(x)
    for rows in (["en", "fr"], ["fr", None], ["de", "de"]):
        with adapters_per_row(model, rows):
            assert_rows(model, rows, x)
            with lora_fx.disabled(model):
                assert_rows(model, [None, None], x)
            with adapters_per_row(model, rows[::-1]):
                assert_rows(model, rows[::-1], x)
            assert_rows(model, rows, x)
    assert graphs() == 2, "one for the active adapter, one for rows"
    changed = copy.deepcopy(model)  # not compiled
    for m in (model, changed):
        shake(lora_fx.set_adapter(m, "fr"), seed=9)
        for module in m.modules():
            if isinstance(module, lora_fx.LoRAModule):
                module.lora_scale.fill_(0.3)
    with adapters_per_row(model, ["fr", "en"]):
        y = model(x)
    with torch.no_grad():
        torch.testing.assert_close(y[0], changed(x)[0])
        lora_fx.set_adapter(model, "en")
        torch.testing.assert_close(model(x), plain)
    assert graphs() == 2


class Decoder(nn.Module):
    """Greedy generation with a cache of keys and values, of prompts that are padded on the left."""

    def __init__(self, dim=16, vocabulary=12):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, tokens, mask, cache=None):
        x = self.tokens(tokens)
        q, k, v = self.qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, -1)
        if cache is not None:
            k, v = torch.cat((cache[0], k), 1), torch.cat((cache[1], v), 1)
        causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        seen = causal & mask[:, None, :]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).nan_to_num())
        return self.head(F.layer_norm(x, x.shape[-1:])), (k, v)


def generate(model, prompts, steps=5):
    """Tokens, and the logits of each step, for prompts of different lengths."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[False] * (longest - len(prompt)) + [True] * len(prompt) for prompt in prompts])
    cache, step, logits = None, tokens, []
    for _ in range(steps):
        y, cache = model(step, mask, cache)
        logits.append(y[:, -1])
        step = y[:, -1:].argmax(-1)
        tokens = torch.cat((tokens, step), 1)
        mask = torch.cat((mask, torch.ones_like(step, dtype=torch.bool)), 1)
    return tokens[:, longest:], torch.stack(logits, 1)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generation_from_prompts_of_different_lengths(compiled):
    torch.manual_seed(0)
    model = shake(lora_fx.install(Decoder(), LoRAConfig(rank=3), adapter_name="en")).eval()
    lora_fx.add_adapter(model, "fr", LoRAConfig(rank=2))
    shake(lora_fx.set_adapter(model, "fr"), seed=5)
    prompts, rows = [[1, 2, 3, 4], [5, 6], [7], [8, 9, 10]], ["en", "fr", None, "en"]
    expected = []
    with torch.no_grad():
        for name, prompt in zip(rows, prompts):
            single = lora_fx.set_adapter(copy.deepcopy(model), name or "en").double()
            if name is None:
                lora_fx.remove(single)
            expected.append(generate(single, [prompt]))
    if compiled:
        model.compile(backend="eager", fullgraph=True, dynamic=True)
    with adapters_per_row(model, rows):
        found, logits = generate(model, prompts)
    before = graphs()  # without a cache, with one as long as the batch is large (to Dynamo one size), and longer
    for i, (theirs, exact_logits) in enumerate(expected):
        assert torch.equal(found[i], theirs[0])
        torch.testing.assert_close(logits[i].double(), exact_logits[0], rtol=1e-4, atol=1e-5)
    with adapters_per_row(model, rows[::-1]):
        reverse, _ = generate(model, prompts[::-1])
    assert torch.equal(reverse, found.flip(0))
    assert graphs() == before <= 3


def test_flattened_tokens_and_other_shapes():
    torch.manual_seed(0)
    model = shake(lora_fx.install(nn.Linear(8, 6), LoRAConfig(rank=2), adapter_name="en")).eval()
    shake(lora_fx.set_adapter(lora_fx.add_adapter(model, "fr", LoRAConfig(rank=2)), "fr"), seed=2)
    x = torch.randn(3, 4, 8)
    expected = {name: lora_fx.set_adapter(model, name)(x) for name in ("en", "fr")}
    with lora_fx.disabled(model):
        expected[None] = model(x)
    rows = ["fr", None, "en"]
    picked = torch.stack([expected[name][i] for i, name in enumerate(rows)])
    with adapters_per_row(model, rows):
        for shape in ((3, 4, 8), (12, 8), (3, 2, 2, 8)):
            torch.testing.assert_close(model(x.view(shape)).view(picked.shape), picked)
        torch.testing.assert_close(model(x[:, 0]), picked[:, 0])
        for wrong in (x[:2], x[:1], x[0, 0], x.view(6, 2, 8), x.view(12, 8)[:10]):
            with pytest.raises(ValueError, match=r"assigned to 3 rows, and a linear got an input of \["):
                model(wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_rounds_as_one_adapter_does(dtype):
    model = together(NAMES).eval().to(dtype)
    model.layers["0"].w1.lora_scale.fill_(0.3)  # no number of these types
    layer, x = model.layers["0"].w1, torch.randn(3, 5, 16).to(dtype)
    wide = copy.deepcopy(layer).double()
    with adapters_per_row(model, ["fr", "en", None]):
        y = layer(x)
        assert y.dtype == dtype
        exact = wide(x.double()) if wide._lora_rows is not None else None
    assert exact is None, "the copy was made before"
    for i, name in enumerate(("fr", "en")):
        expected = lora_fx.set_adapter(wide, name)(x[i].double())
        single = lora_fx.set_adapter(layer, name)(x[i])
        allowed = 1.5 * (single.double() - expected).norm() + 1e-6
        assert (y[i].double() - expected).norm() <= allowed


def test_what_overflows_in_one_adapter_stays_out_of_the_others():
    torch.manual_seed(0)
    layer = shake(lora_fx.install(nn.Linear(8, 6), LoRAConfig(rank=2), adapter_name="en")).eval().half()
    shake(lora_fx.set_adapter(lora_fx.add_adapter(layer, "fr", LoRAConfig(rank=2)), "fr"), seed=2)
    x = torch.ones(2, 3, 8, dtype=torch.float16)
    en = lora_fx.set_adapter(layer, "en")(x)
    with torch.no_grad():
        lora_fx.adapter_parameters(layer, "fr")[0].fill_(6e4)
    with adapters_per_row(layer, ["en", "fr"]):
        y = layer(x)
    torch.testing.assert_close(y[0], en[0])
    assert not y[1].isfinite().all()


def test_it_is_for_inference_and_leaves_nothing_behind():
    model = together(NAMES).eval()
    expected, before = model(TOKENS), snapshot(model)
    with adapters_per_row(model, ["en", "fr"]):
        assert not torch.is_grad_enabled() and not model(TOKENS).requires_grad
        twin = copy.deepcopy(model)
        y = model(TOKENS)
        torch.testing.assert_close(twin.double()(TOKENS).float(), y, rtol=1e-4, atol=1e-4)
        for wrong in (
            lambda m: lora_fx.set_adapter(m, "fr"),
            lambda m: lora_fx.add_adapter(m, "x", CONFIGS["fr"]),
            lambda m: lora_fx.delete_adapter(m, "fr"),
            lambda m: lora_fx.load_adapter(m, "nowhere"),
            lora_fx.merge,
            lora_fx.remove,
        ):
            refused(model, r"assigned to rows: leave lora_fx\.adapters_per_row first", wrong)
    with pytest.raises(KeyError), adapters_per_row(model, ["en", "fr"]):
        raise KeyError
    assert torch.is_grad_enabled() and torch.equal(model(TOKENS), expected)
    assert_same(before, snapshot(model))
    with torch.inference_mode(), adapters_per_row(model, ["fr", "en"]):
        model(TOKENS)
    with adapters_per_row(model, ["en", "fr"]):
        assert torch.equal(model(TOKENS), y)
    model(TOKENS).sum().backward()


def partly(model):
    lora_fx.add_adapter(model.layers["1"], "part", CONFIGS["en"])
    return model


def test_the_report():
    model = lora_fx.install(Mlp(64), LoRAConfig(rank=2), adapter_name="en").eval()
    shake(lora_fx.set_adapter(lora_fx.add_adapter(model, "fr", LoRAConfig(rank=2)), "fr"))
    with adapters_per_row(model, ["fr", "en", None]):
        report = lora_fx.explain(model, torch.randn(3, 5, 64), strict=True, verify=True)
    assert {site.path: site.forward for site in report.sites} == {"up": ("rows",), "down": ("rows", "accumulate")}
    errors = report.verification
    assert errors.output_rewritten <= 1.1 * errors.output_unfused


REFUSED = {
    "known to a part": (r"layers\.0\.attention\.wq has no adapter called 'part'", ["en"], partly),
    "unknown": ("no adapter called 'x': it has de, en, fr", ["en", "x"], lambda m: m),
    "none": ("must be a list with a name", [], lambda m: m),
    "a name": ("must be a list with a name", "en", lambda m: m),
    "training": (r"layers\.0\.attention\.wq is in training mode", ["en"], lambda m: m.train()),
    "merged": ("is merged: call", ["en"], lora_fx.merge),
    "meta": ("is on the meta device", ["en"], lambda m: m.to("meta")),
    "no adapters": ("holds no adapters", ["en"], lambda m: Toy()),
}


@pytest.mark.parametrize(("match", "rows", "change"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(match, rows, change):
    model = change(together(NAMES).eval())
    before = snapshot(model)
    with pytest.raises(ValueError, match=match), adapters_per_row(model, rows):
        raise AssertionError("entered")
    assert_same(before, snapshot(model))
