# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy
import pickle

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import Toy, shake, snapshot

TOKENS = torch.arange(10).reshape(2, 5)


def assert_fresh(model, scale=2.0):
    for module in model.modules():
        if isinstance(module, lora_fx.LoRAModule):
            bound = module.in_features**-0.5
            assert 0 < module.lora_a.abs().max() <= bound and not module.lora_b.any()
            assert module.lora_scale.item() == scale and module.lora_enabled.item() == 1.0


def garbage(model):
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(float("nan"))


@pytest.mark.parametrize("config", [LoRAConfig(rank=8), LoRAConfig(rank=4, alpha=4, use_rslora=True)])
def test_meta_to_empty_init_weights(config):
    with torch.device("meta"):
        model = Toy()
    lora_fx.install(model, config)
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    garbage(model)
    assert model.init_weights(0.05, seed=3) == "initialised with 0.05"
    assert_fresh(model)
    base = Toy()
    base.init_weights(0.05, seed=3)
    assert torch.equal(model(TOKENS), base(TOKENS))


def test_init_weights_of_a_real_model_starts_afresh():
    model = shake(lora_fx.install(Toy()))
    model.init_weights()
    assert_fresh(model)


def test_a_model_without_init_weights():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 4))
    lora_fx.install(model, LoRAConfig(rank=2, alpha=6.0))
    assert not hasattr(model, "init_weights")
    model.to_empty(device="cpu")
    assert model[0].lora_scale.item() == 3.0 and model[0].lora_enabled.item() == 1.0
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert_fresh(model, 3.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_initialises_itself(copied):
    model = shake(lora_fx.install(Toy()))
    kept = model.output.lora_b.clone()
    other = copied(model)
    other.init_weights()
    assert_fresh(other)
    assert torch.equal(model.output.lora_b, kept)


class OtherPatch:
    """Another converter that patches `init_weights` on the instance, as careless ones do: with a closure."""

    def __init__(self):
        self.calls = 0

    def convert(self, model):
        previous = model.init_weights

        def init_weights(*args, **kwargs):
            result = previous(*args, **kwargs)
            self.calls += 1
            return result

        model.init_weights = init_weights


@pytest.mark.parametrize("lora_at", [0, 1, 2])
def test_several_converters_chain(lora_at):
    converters = [OtherPatch(), OtherPatch()]
    model = Toy()
    lora_fx.convert(model, [*converters[:lora_at], lora_fx.LoRAConverter(), *converters[lora_at:]])
    shake(model)
    assert model.init_weights(seed=5) == "initialised with 0.02"
    assert_fresh(model)
    assert [converter.calls for converter in converters] == [1, 1]
    base = Toy()
    base.init_weights(seed=5)
    assert torch.equal(model.tokens.weight, base.tokens.weight)

    # Taking the adapters out leaves the other patches in place, and what lies under them of ours does nothing.
    lora_fx.remove(model)
    assert model.init_weights(0.5) == "initialised with 0.5"
    assert [converter.calls for converter in converters] == [2, 2]


def test_remove_puts_back_what_was_there():
    for patch in (False, True):
        model = Toy()
        if patch:
            OtherPatch().convert(model)
        before = snapshot(model)["init_weights"]
        lora_fx.install(model)
        assert model.__dict__["init_weights"] is not before
        lora_fx.remove(model)
        assert model.__dict__.get("init_weights") is before
        assert ("init_weights" in model.__dict__) is patch


def test_installed_twice_over_another_patch():
    model = Toy()
    lora_fx.install(model)
    OtherPatch().convert(model)
    lora_fx.remove(model)
    lora_fx.install(model, LoRAConfig(rank=2, alpha=10.0))
    shake(model)
    model.init_weights()
    assert_fresh(model, 5.0)


def test_static_and_class_methods():
    class Static(nn.Sequential):
        @staticmethod
        def init_weights(value):
            return value

    class Class(nn.Sequential):
        @classmethod
        def init_weights(cls, value):
            return cls, value

    assert lora_fx.install(Static(nn.Linear(4, 4))).init_weights(3) == 3
    assert lora_fx.install(Class(nn.Linear(4, 4))).init_weights(3) == (Class, 3)


def test_an_attribute_that_is_no_method_is_left_alone():
    model = nn.Sequential(nn.Linear(4, 4))
    model.init_weights = None
    lora_fx.install(model)
    assert model.init_weights is None
