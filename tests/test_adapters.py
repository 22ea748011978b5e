"""Several adapters on one model: which runs, which trains, and what moves, copies and saves them."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.functional import cross_entropy

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import TOKENS, Mlp, Toy, adapted, assert_same, shake, snapshot

CONFIGS = {
    "en": LoRAConfig(rank=2, alpha=4.0),
    "fr": LoRAConfig(rank=3, alpha=2.0, target_modules=["wq", "w1"], rank_pattern={"layers.1.w1": 4}),
    "de": LoRAConfig(rank=4, alpha=1.0, init="gaussian", exclude_modules="output"),
}


def alone(name, seed=None):
    """A model with one of the adapters, without room for more."""
    torch.manual_seed(0)
    model = lora_fx.install(Toy(), CONFIGS[name])
    return shake(model, seed=len(CONFIGS[name].as_dict()["exclude_modules"]) + ord(name[0]) if seed is None else seed)


def together(names=("en", "fr", "de")):
    """A model with all of them, the first one being active; their values are those of `alone`."""
    torch.manual_seed(0)
    first, *others = names
    model = lora_fx.install(Toy(), CONFIGS[first], adapter_name=first, max_rank=4)
    for name in others:
        lora_fx.add_adapter(model, name, CONFIGS[name])
    for name in names:
        copy_into(model, name, alone(name))
    return model


def copy_into(model, name, source):
    values = dict(lora_fx.named_adapter_parameters(source))
    with torch.no_grad():
        for path, parameter in lora_fx.named_adapter_parameters(model, name):
            if path in values:
                own = values[path]
                parameter[: own.shape[0], : own.shape[1]] = own


def losses(model):
    return cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())


def assert_own(model, name, source, attribute=None):
    """The adapter `name` of `model` is that of `source`, or its gradients are; what is behind its rank is zero."""
    expected = dict(lora_fx.named_adapter_parameters(source))
    for path, parameter in lora_fx.named_adapter_parameters(model, name):
        value = parameter.detach().clone() if attribute is None else parameter.grad.clone()
        if path in expected:
            own = expected[path].detach() if attribute is None else expected[path].grad
            part = value[: own.shape[0], : own.shape[1]]
            torch.testing.assert_close(part.double(), own.double(), rtol=1e-3, atol=1e-5)
            part.zero_()
        assert not value.any(), path


@pytest.mark.parametrize("compiled", [False, True])
def test_each_adapter_computes_what_it_computes_alone(compiled):
    """Outputs and gradients against a model in float64 that has this adapter alone, of its own rank."""
    model = together()
    counter = CompileCounterWithBackend("eager")
    if compiled:
        model.compile(backend=counter, fullgraph=True)
    for name in ("en", "fr", "de", "fr", "en"):
        assert lora_fx.set_adapter(model, name) is model and lora_fx.active_adapter(model) == name
        exact = alone(name).double()
        losses(exact).backward()
        model.zero_grad()
        losses(model).backward()
        torch.testing.assert_close(model(TOKENS).double(), exact(TOKENS), rtol=1e-4, atol=1e-4)
        assert_own(model, name, exact, "grad")
        with lora_fx.disabled(model):
            base = model(TOKENS)
        torch.testing.assert_close(base, lora_fx.remove(alone(name))(TOKENS), rtol=1e-5, atol=1e-6)
        for module in model.modules():
            if isinstance(module, lora_fx.LoRAModule):
                module.lora_scale.mul_(-0.5)
        for module in exact.modules():
            if isinstance(module, lora_fx.LoRAModule):
                module.lora_scale.mul_(-0.5)
        torch.testing.assert_close(model(TOKENS).double(), exact(TOKENS), rtol=1e-4, atol=1e-4)
        for module in model.modules():
            if isinstance(module, lora_fx.LoRAModule):
                module.lora_scale.mul_(-2.0)
    assert counter.frame_count == compiled


@pytest.mark.parametrize("compiled", [False, True])
def test_an_optimizer_trains_the_adapter_that_it_was_given(compiled):
    """In turns, with momentum and weight decay: each adapter becomes what it becomes alone."""
    model = together(("en", "fr"))
    singles = {name: alone(name) for name in ("en", "fr")}
    counter = CompileCounterWithBackend("eager")
    if compiled:
        model.compile(backend=counter, fullgraph=True)

    def optimizer(parameters):
        return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)

    optimizers = {name: optimizer(lora_fx.adapter_parameters(model, name)) for name in singles}
    theirs = {name: optimizer(lora_fx.adapter_parameters(single)) for name, single in singles.items()}
    for name in ("en", "fr", "fr", "en", "fr", "en"):
        lora_fx.set_adapter(model, name)
        for module, chosen in ((model, optimizers[name]), (singles[name], theirs[name])):
            chosen.zero_grad()
            losses(module).backward()
            chosen.step()
    for name, single in singles.items():
        assert_own(model, name, single)
    assert counter.frame_count == compiled


def test_a_backward_reaches_the_adapter_of_its_forward():
    model = together(("en", "fr")).double()
    en, fr = (alone(name).double() for name in ("en", "fr"))
    loss = model(TOKENS).square().mean()
    lora_fx.set_adapter(model, "fr")
    (loss - model(TOKENS).square().mean()).backward()
    (en(TOKENS).square().mean() - fr(TOKENS).square().mean()).backward()
    for name, single in (("en", en), ("fr", fr)):
        for path, parameter in lora_fx.named_adapter_parameters(single):
            ours = dict(lora_fx.named_adapter_parameters(model, name))[path].grad
            torch.testing.assert_close(ours[: parameter.shape[0], : parameter.shape[1]], parameter.grad)


def test_the_active_adapter_is_the_one_of_the_model():
    model = together(("en", "fr"))
    en, fr = (lora_fx.adapter_parameters(model, name) for name in ("en", "fr"))
    assert lora_fx.adapter_names(model) == ["en", "fr"]
    names = [name for name, _ in model.named_parameters()]
    for active, other in ((en, fr), (fr, en)):
        assert all(a is b for a, b in zip(lora_fx.adapter_parameters(model), active, strict=True))
        assert {id(p) for p in active} < {id(p) for p in model.parameters()}
        assert not {id(p) for p in other} & {id(p) for p in model.parameters()}
        assert [name for name, _ in model.named_parameters()] == names
        lora_fx.set_adapter(lora_fx.freeze(model), "fr")
    assert all(p.requires_grad for p in en + fr)
    assert repr(model.output).endswith("rank=0, scale=2, dropout=0, adapter='fr' of 2)")
    assert lora_fx.delete_adapter(model, "en") is model
    assert lora_fx.adapter_names(model) == ["fr"] and "of 2" not in repr(model.output)


def test_parts_may_run_different_adapters():
    model = together(("en", "fr"))
    lora_fx.set_adapter(model.layers["1"], "fr")
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.wq runs 'en' and layers\.1\.attention\.wq runs 'fr'"):
        lora_fx.active_adapter(model)
    with pytest.raises(ValueError, match=r"'fr' is active in layers\.1\.attention\.wq: .*set_adapter"):
        lora_fx.delete_adapter(model, "fr")
    assert lora_fx.active_adapter(lora_fx.set_adapter(model, "en")) == "en"


def test_remove_takes_all_of_them_out():
    model = Toy()
    before = snapshot(model)
    lora_fx.add_adapter(lora_fx.install(model, CONFIGS["en"], max_rank=4), "fr", CONFIGS["fr"])
    assert_same(before, snapshot(lora_fx.remove(lora_fx.set_adapter(model, "fr"))))


def outputs(model):
    result = {}
    for name in ("fr", "en"):
        result[name] = lora_fx.set_adapter(model, name)(TOKENS).detach()
    return result


def test_all_adapters_move_and_copy_with_the_model():
    model = together(("en", "fr"))
    expected = outputs(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert lora_fx.adapter_names(twin) == ["en", "fr"]
        for name, value in outputs(twin).items():
            assert torch.equal(value, expected[name])
        assert not {id(p) for p in lora_fx.adapter_parameters(model, "fr")} & {
            id(p) for p in lora_fx.adapter_parameters(twin, "fr")
        }
    model.output.lora_adapters["fr"].lora_scale.fill_(0.3)  # not a number of bfloat16
    kept = lora_fx.adapter_parameters(model, "fr")
    model.double()
    assert all(a is b for a, b in zip(kept, lora_fx.adapter_parameters(model, "fr"))), "optimizers hold them"
    assert {p.dtype for p in kept} == {torch.float64}
    model.to(torch.bfloat16)
    assert {p.dtype for p in kept} == {torch.bfloat16}
    assert model.output.lora_adapters["fr"].lora_scale == torch.tensor(0.3)
    for name, value in outputs(model).items():
        torch.testing.assert_close(value.float(), expected[name], rtol=0.2, atol=0.2 * expected[name].abs().max())


def test_a_checkpoint_holds_all_of_them():
    model = together(("en", "fr"))
    expected, state = outputs(model), copy.deepcopy(model.state_dict())
    assert {"output.lora_a", "output.lora_adapters.fr.lora_b", "output.lora_adapters.fr.lora_scale"} < state.keys()
    with torch.device("meta"):
        other = Toy()
    lora_fx.install(other, CONFIGS["en"], adapter_name="en", max_rank=4)
    lora_fx.add_adapter(other, "fr", LoRAConfig(rank=4, alpha=100.0))
    other.to_empty(device="cpu").load_state_dict(state)
    for name, value in outputs(other).items():
        assert torch.equal(value, expected[name])
    with torch.device("meta"):
        third = lora_fx.add_adapter(
            lora_fx.install(Toy(), CONFIGS["en"], adapter_name="en", max_rank=4), "fr", CONFIGS["fr"]
        )
    for name, value in outputs(third).items() if third.load_state_dict(state, assign=True) is None else ():
        assert torch.equal(value, expected[name])
    fourth = together(("en", "fr"))
    for module in fourth.modules():
        if isinstance(module, lora_fx.LoRAModule):
            module.reset_adapters()
    set_model_state_dict(fourth, get_model_state_dict(model))  # distributed checkpoints look names up
    for name, value in outputs(fourth).items():
        assert torch.equal(value, expected[name])
    # What is active is part of the names: values of one adapter never land in another.
    with pytest.raises(RuntimeError, match=r"lora_adapters\.en\.lora_a"):
        lora_fx.set_adapter(together(("en", "fr")), "fr").load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_adapters\.fr\.lora_a"):
        together(("en",)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_adapters\.de\.lora_a"):
        together().load_state_dict(state)


def test_all_of_them_start_afresh():
    with torch.device("meta"):
        model = lora_fx.install(Toy(), CONFIGS["en"], adapter_name="en", max_rank=4)
        lora_fx.add_adapter(model, "fr", CONFIGS["fr"])
        lora_fx.add_adapter(model, "de", CONFIGS["de"])
    model.to_empty(device="cpu")
    assert model.layers["1"].w1.lora_adapters["fr"].lora_scale == 0.5  # alpha 2, rank 4
    model.init_weights()
    for name, ranks in (("en", {2}), ("fr", {0, 3, 4}), ("de", {0, 4})):
        for path, parameter in lora_fx.named_adapter_parameters(model, name):
            rank = int(parameter.any(1).sum())
            assert parameter.shape[path.endswith("b")] == 4 and rank in (ranks if path.endswith("a") else {0})
    wide = model.layers["1"].w2.lora_adapters["de"].lora_a
    assert 0.1 < wide.std() < 0.5, "gaussian, 1 / rank"


def test_merge_means_the_active_one():
    model = together(("en", "fr"))
    expected, en = lora_fx.set_adapter(model, "fr")(TOKENS), together(("en", "fr"))(TOKENS)
    lora_fx.merge(model)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-4)
    for wrong in (
        lambda: lora_fx.set_adapter(model, "en"),
        lambda: lora_fx.add_adapter(model, "de", CONFIGS["de"]),
        lambda: lora_fx.delete_adapter(model, "en"),
    ):
        with pytest.raises(ValueError, match=r"is merged: call lora_fx\.unmerge"):
            wrong()
    assert torch.equal(lora_fx.set_adapter(lora_fx.unmerge(model), "en")(TOKENS), en)


def test_another_dropout_is_another_graph_in_training_alone():
    model = Mlp(16)
    lora_fx.add_adapter(lora_fx.install(model, LoRAConfig(rank=2)), "fr", LoRAConfig(rank=2, dropout=0.5))
    model.eval().compile(backend="eager", fullgraph=True)
    x = torch.randn(3, 16)

    def graphs(*names):
        counters.clear()
        for name in names:
            lora_fx.set_adapter(model, name)(x)
        return counters["stats"]["unique_graphs"]

    assert graphs("default", "fr", "default") == 1
    model.train()
    assert graphs("default", "fr") == 2
    assert graphs("default", "fr", "default") == 0


def refused(model, match, change):
    before = snapshot(model)
    names = lora_fx.adapter_names(model) if lora_fx.is_installed(model) else None
    with pytest.raises((ValueError, TypeError), match=match):
        change(model)
    assert_same(before, snapshot(model))
    assert names is None or names == lora_fx.adapter_names(model)


NOTHING: Any = None
REFUSED = {
    "unknown": ("has no adapter called 'x': it has 'en', 'fr'", lambda m: lora_fx.set_adapter(m, "x")),
    "unknown to delete": ("has no adapter called 'x'", lambda m: lora_fx.delete_adapter(m, "x")),
    "unknown parameters": ("has no adapter called 'x'", lambda m: lora_fx.adapter_parameters(m, "x")),
    "active": ("'en' is active in layers.0", lambda m: lora_fx.delete_adapter(m, "en")),
    "known": ("has an adapter called 'fr' already", lambda m: lora_fx.add_adapter(m, "fr", CONFIGS["fr"])),
    "empty name": ("cannot be called ''", lambda m: lora_fx.add_adapter(m, "", CONFIGS["fr"])),
    "dot": (r"cannot be called 'a\.b'", lambda m: lora_fx.add_adapter(m, "a.b", CONFIGS["fr"])),
    "attribute": ("cannot be called 'keys'", lambda m: lora_fx.add_adapter(m, "keys", CONFIGS["fr"])),
    "no name": ("name of an adapter is a str, got None", lambda m: lora_fx.add_adapter(m, NOTHING, CONFIGS["fr"])),
    "no config": ("must be a LoRAConfig, got NoneType", lambda m: lora_fx.add_adapter(m, "x", NOTHING)),
    "too wide": (
        r"layers\.0\.attention\.wq has room for rank 4, not 5: .*max_rank=5",
        lambda m: lora_fx.add_adapter(m, "x", LoRAConfig(rank=5)),
    ),
    "no such module": ("matches no module", lambda m: lora_fx.add_adapter(m, "x", LoRAConfig(target_modules="q"))),
}


@pytest.mark.parametrize(("match", "change"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(match, change):
    refused(together(("en", "fr")), match, change)


def test_what_install_leaves_no_room_for_is_refused():
    config = LoRAConfig(rank=2, target_modules=["wq", "w1"])
    some = lora_fx.install(Toy(), config)
    both = LoRAConfig(rank=2, target_modules=["wq", "wv"])
    refused(some, r"layers\.0\.attention\.wv holds no adapter to put", lambda m: lora_fx.add_adapter(m, "x", both))
    lora_fx.add_adapter(some, "x", LoRAConfig(rank=1))  # all linears that there are
    assert len(adapted(some)) == 4
    refused(Toy(), "holds no adapters", lambda m: lora_fx.set_adapter(m, "x"))
    refused(Toy(), "gets rank 2, which is above max_rank=1", lambda m: lora_fx.install(m, config, max_rank=1))
    refused(Toy(), "max_rank must be an int", lambda m: lora_fx.install(m, config, max_rank=1.5))
    refused(Toy(), r"cannot be called 'a\.b'", lambda m: lora_fx.install(m, config, adapter_name="a.b"))
    refused(
        together(("en", "fr")),
        "wrapped by DataParallel, which keeps the parameters that it found",
        lambda m: lora_fx.set_adapter(nn.DataParallel(m), "fr"),
    )
