"""Adapters that come and go in a model that runs: files under names, hot-loading, and no recompilation in any of it."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import functools
import json

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.peft_files import CONFIG, TENSORS
from tests.test_adapters import CONFIGS, alone, copy_into, refused, together
from tests.toy_models import TOKENS, Mlp, Toy, assert_same, shake, snapshot


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def close(model, exact):
    expected = exact.double().eval()(TOKENS)
    torch.testing.assert_close(model(TOKENS).double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("active", ["en", "fr"])
def test_each_name_is_saved_as_it_would_be_alone(tmp_path, active):
    model = lora_fx.set_adapter(together(("en", "fr")), active)
    for name in ("en", "fr"):
        lora_fx.save_adapter(model, tmp_path / name, adapter_name=name)
        lora_fx.save_adapter(alone(name), tmp_path / "alone")
        ours, theirs = (load_file(tmp_path / folder / TENSORS) for folder in (name, "alone"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        ours, theirs = (json.loads((tmp_path / folder / CONFIG).read_text()) for folder in (name, "alone"))
        assert ours == theirs
    lora_fx.save_adapter(model, tmp_path / "active")
    assert (tmp_path / "active" / TENSORS).read_bytes() == (tmp_path / active / TENSORS).read_bytes()
    with pytest.raises(ValueError, match="has no adapter called 'x'"):
        lora_fx.save_adapter(model, tmp_path / "x", adapter_name="x")
    assert not (tmp_path / "x").exists()


def test_what_was_written_behind_the_rank_is_saved_too(tmp_path):
    model = together(("en", "fr"))
    a, b = model.output.lora_a, model.output.lora_b
    with torch.no_grad():
        a[3], b[:, 3] = 1.0, 1.0
    lora_fx.save_adapter(model, tmp_path)
    other = lora_fx.load_adapter(Toy(), tmp_path)
    assert other.output.lora_a.shape[0] == 4 and other.layers["0"].w1.lora_a.shape[0] == 2
    assert torch.equal(other.output.lora_a, a) and other.output.lora_scale == model.output.lora_scale


def test_files_come_in_under_names(tmp_path):
    for name in CONFIGS:
        lora_fx.save_adapter(alone(name), tmp_path / name)
    torch.manual_seed(0)
    model = Toy().eval()
    lora_fx.load_adapter(model, tmp_path / "en", adapter_name="en", max_rank=4)
    for name in ("fr", "de"):
        assert lora_fx.load_adapter(model, tmp_path / name, adapter_name=name) is model
        assert lora_fx.active_adapter(model) == "en"
    model.compile(backend="eager", fullgraph=True)
    for name in ("en", "fr", "de"):
        close(lora_fx.set_adapter(model, name), alone(name))
        assert model.output.lora_dropout == CONFIGS[name].dropout
        lora_fx.save_adapter(model, tmp_path / "again")
        again, first = (load_file(tmp_path / folder / TENSORS) for folder in ("again", name))
        assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in again)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_running_model_takes_files_of_smaller_ranks_and_fewer_linears(tmp_path):
    for name in CONFIGS:
        lora_fx.save_adapter(alone(name), tmp_path / name)
    torch.manual_seed(0)
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=4)), seed=9).eval()
    lora_fx.add_adapter(model, "other", LoRAConfig(rank=1))
    model.compile(backend="eager", fullgraph=True)
    model(TOKENS)
    kept = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    for name in ("fr", "de", "en", "fr"):
        close(lora_fx.load_adapter(model, tmp_path / name), alone(name))
    assert kept == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    lora_fx.load_adapter(model, tmp_path / "de", adapter_name="other")
    close(model, alone("fr"))
    close(lora_fx.set_adapter(model, "other"), alone("de"))
    assert counters["stats"]["unique_graphs"] == 1
    # It trains on, as an adapter of the file's rank.
    lora_fx.load_adapter(model, tmp_path / "fr")
    model(TOKENS).square().mean().backward()
    assert model.layers["1"].w1.lora_b.grad.any() and not model.layers["0"].w1.lora_b.grad[:, 3:].any()
    assert not model.layers["0"].w2.lora_b.grad.any()


def test_files_that_find_no_room_are_refused(tmp_path):
    for name in ("en", "de"):
        lora_fx.save_adapter(alone(name), tmp_path / name)
    for wrong in (
        lambda m: lora_fx.load_adapter(m, tmp_path / "de"),
        lambda m: lora_fx.load_adapter(m, tmp_path / "de", adapter_name="de"),
    ):
        refused(alone("en"), r"has room for rank 2 in the model and rank 4 in .*max_rank", wrong)
    some = lora_fx.install(Toy(), LoRAConfig(rank=4, target_modules="wq"))
    match = r"has an adapter for \S+, and the model has none there: .*linears of all adapters"
    refused(some, match, lambda m: lora_fx.load_adapter(m, tmp_path / "en", adapter_name="en"))
    refused(alone("de"), "max_rank is for a model without", lambda m: lora_fx.load_adapter(m, tmp_path, max_rank=4))
    for name in ("a.b", "keys"):
        load = functools.partial(lora_fx.load_adapter, folder=tmp_path / "en", adapter_name=name)
        refused(alone("de"), "cannot be called", load)
        before = snapshot(model := Toy())
        with pytest.raises(ValueError, match="cannot be called"):
            load(model)
        assert_same(before, snapshot(model))


@pytest.mark.slow
def test_kernels_go_on_through_all_of_it(tmp_path):
    """With Inductor and the passes, in training and inference: switching, scaling, loading, rows compile nothing."""
    torch.manual_seed(0)
    model = lora_fx.install(Mlp(64), LoRAConfig(rank=4), adapter_name="en", max_rank=8)
    lora_fx.add_adapter(model, "fr", LoRAConfig(rank=8, target_modules="up"))
    shake(model)
    lora_fx.save_adapter(shake(lora_fx.install(Mlp(64), LoRAConfig(rank=2, alpha=5.0)), seed=7), tmp_path)
    lora_fx.compile(model, fullgraph=True, dynamic=True, strict=True)
    generator = torch.Generator().manual_seed(0)

    def expected(x, name):
        module = lora_fx.set_adapter(twin, name)
        return module(x.double())

    def check():
        for batch in (3, 6):
            x = torch.randn(batch, 5, 64, generator=generator)
            for name in lora_fx.adapter_names(model):
                lora_fx.set_adapter(model, name)
                if name == "new":
                    continue
                exact = expected(x, name)
                y = model.train()(x)
                torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
                grads = torch.autograd.grad(y.square().sum(), lora_fx.adapter_parameters(model))
                theirs = torch.autograd.grad(exact.square().sum(), lora_fx.adapter_parameters(twin))
                for ours, exact_grad in zip(grads, theirs):
                    scale = exact_grad.abs().max().item()
                    torch.testing.assert_close(ours.double(), exact_grad, rtol=1e-3, atol=1e-4 * scale + 1e-9)
            rows = [("en", "fr", None)[i % 3] for i in range(batch)]
            model.eval()
            with lora_fx.adapters_per_row(model, rows):
                y = model(x)
            for i, name in enumerate(rows):
                with lora_fx.disabled(twin) if name is None else torch.no_grad():
                    exact = expected(x[i], name or "en")
                torch.testing.assert_close(y[i].double(), exact, rtol=1e-4, atol=1e-4)

    twin = lora_fx.install(Mlp(64).double(), LoRAConfig(rank=4), adapter_name="en", max_rank=8)
    lora_fx.add_adapter(twin, "fr", LoRAConfig(rank=8, target_modules="up"))

    def follow():
        for ours, theirs in zip(twin.parameters(), model.parameters()):
            ours.data = theirs.detach().double()
        for name in ("fr", "en"):
            lora_fx.set_adapter(model, name), lora_fx.set_adapter(twin, name)
            copy_into(twin, name, model)
            for ours, theirs in zip(twin.modules(), model.modules()):
                if isinstance(ours, lora_fx.LoRAModule):
                    ours.lora_scale.copy_(theirs.lora_scale)

    follow()
    check()
    counters.clear()
    lora_fx.load_adapter(model, tmp_path, adapter_name="en")
    model.down.lora_scale.fill_(0.3)
    follow()
    check()
    shake(lora_fx.set_adapter(model, "fr"), seed=8)
    follow()
    check()
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["inductor"]["fxgraph_cache_miss"] and not counters["inductor"]["fxgraph_cache_hit"]
