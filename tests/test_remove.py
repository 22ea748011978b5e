# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy
import pickle

import pytest
import torch
import torch.nn.utils.parametrizations
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import (
    TOKENS,
    TOY_LINEARS,
    Toy,
    adapted,
    assert_same,
    shake,
    snapshot,
    train,
)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_remove_restores_everything(trained, copied):
    torch.manual_seed(0)
    model = Toy(bias=True)
    model.tokens.requires_grad_(False)
    model.layers["0"].w1.bias.requires_grad_(False)
    expected = model(TOKENS).detach()
    before = snapshot(model)
    lora_fx.install(model, LoRAConfig(rank=2, dropout=0.1))
    if trained:
        train(model)
        model.zero_grad()
    if copied:
        model = copied(model)
    assert lora_fx.remove(model) is model
    after = snapshot(model)
    if copied:
        before["tensors"] = after["tensors"] = None  # a copy has tensors of its own
    assert_same(before, after)
    assert not lora_fx.is_installed(model)
    assert torch.equal(model(TOKENS), expected)
    lora_fx.install(model, LoRAConfig(rank=3))
    assert model.output.lora_a.shape[0] == 3


def test_remove_wants_the_model_of_install():
    with pytest.raises(ValueError, match=r"not the one that lora_fx\.install was called on"):
        lora_fx.remove(Toy())
    model = Toy()
    lora_fx.install(model.layers["0"])
    with pytest.raises(ValueError, match=r"installed on layers.0, not on the module given"):
        lora_fx.remove(model)
    lora_fx.remove(model.layers["0"])


def test_remove_refuses_what_changed_after_install():
    model = lora_fx.install(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(rank=2))
    parametrize.register_parametrization(model[0], "lora_a", nn.Identity())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0 became a ParametrizedLoRALinear after install: undo that first"):
        lora_fx.remove(model)
    assert_same(before, snapshot(model))
    parametrize.remove_parametrizations(model[0], "lora_a")
    lora_fx.remove(model)
    assert type(model[0]) is nn.Linear


def test_remove_after_activation_checkpointing():
    model = Toy()
    model.layers["0"].w1.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    lora_fx.install(model, LoRAConfig(rank=2))
    for name, block in list(model.layers.items()):
        model.layers[name] = checkpoint_wrapper(block)
    lora_fx.remove(model)
    assert {
        name.replace("_checkpoint_wrapped_module.", ""): p.requires_grad for name, p in model.named_parameters()
    } == before


def test_a_wrapper_that_forwards_attributes():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    model = Wrapper(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    with pytest.raises(ValueError, match="installed on inner, not on the module given"):
        lora_fx.remove(model)
    lora_fx.remove(model.inner)
    before = snapshot(model)
    lora_fx.install(model, LoRAConfig(rank=2))
    shake(model).init_weights()
    assert not model.inner.output.lora_b.any()
    assert_same({**before, "tensors": 0, "values": {}}, {**snapshot(lora_fx.remove(model)), "tensors": 0, "values": {}})


def test_remove_after_layers_were_dropped():
    """As a pipeline stage does with the layers of other stages."""
    model = lora_fx.install(Toy(), LoRAConfig(rank=2))
    stage = copy.deepcopy(model)
    del stage.layers["0"]
    stage.tokens = None
    assert adapted(stage) == [path for path in sorted(TOY_LINEARS) if not path.startswith("layers.0")]
    lora_fx.remove(stage)
    assert not adapted(stage) and all(p.requires_grad for p in stage.parameters())
