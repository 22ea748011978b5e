"""LoRA+'s parameter groups, against PEFT's."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import TOKENS, Toy, shake

SAVED = ["output", "layers.0.norm", "layers.1.w2", "tokens"]


def toy(**config):
    torch.manual_seed(0)
    return shake(lora_fx.install(Toy(bias=True), LoRAConfig(rank=2, **config)))


def by_name(groups, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("saved", [[], SAVED], ids=["adapters", "with modules_to_save"])
def test_the_groups_are_pefts(saved):
    peft = pytest.importorskip("peft")
    optimizers = pytest.importorskip("peft.optimizers")
    model = toy(target_modules=["wq", "w1"], modules_to_save=saved)
    theirs = peft.get_peft_model(
        Toy(bias=True), peft.LoraConfig(r=2, target_modules=["wq", "w1"], modules_to_save=saved)
    )
    optimizer = optimizers.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, loraplus_weight_decay=0.1
    )
    wanted = {
        name.removeprefix("base_model.model.")
        .replace("lora_A.default.weight", "lora_a")
        .replace("lora_B.default.weight", "lora_b")
        .replace("modules_to_save.default.", ""): numbers
        for name, numbers in by_name(optimizer.param_groups, theirs).items()
    }
    groups = lora_fx.parameter_groups(model, lr=1e-3, lr_ratio=8.0, weight_decay=0.1)
    assert by_name(groups, model) == wanted
    assert len(groups) == (3 if saved else 2) and all(group["params"] for group in groups)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, lora_fx.adapter_parameters(model)))


def test_a_step_moves_b_further():
    """Adam's first step has the size of the learning rate, whatever the gradient."""
    model = toy()
    before = {name: p.detach().clone() for name, p in lora_fx.named_adapter_parameters(model)}
    optimizer = torch.optim.Adam(lora_fx.parameter_groups(model, lr=1e-3))
    F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    optimizer.step()
    for name, parameter in lora_fx.named_adapter_parameters(model):
        step = (parameter - before[name]).abs().max().item()
        assert step == pytest.approx(1.6e-2 if name.endswith("lora_b") else 1e-3, rel=0.01), name


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"lr": 1e-3, "lr_ratio": -1.0}, "lr_ratio must be positive"),
        ({"lr": 1e-3, "lr_ratio": float("inf")}, "lr_ratio must be positive and finite"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay must be finite and at least 0"),
    ],
)
def test_numbers_that_make_no_sense(numbers, match):
    with pytest.raises(ValueError, match=match):
        lora_fx.parameter_groups(toy(), **numbers)


def test_a_model_without_adapters():
    with pytest.raises(ValueError, match="holds no adapters"):
        lora_fx.parameter_groups(nn.Linear(4, 4), lr=1e-3)
