# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import re

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.targets import find_targets
from tests.toy_models import TOY_LINEARS, Block, Toy, adapted


def found(model, **config):
    return sorted(target.path for target in find_targets(model, LoRAConfig(**config)))


ATTENTION = sorted(path for path in TOY_LINEARS if ".attention." in path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, TOY_LINEARS),
        ({"target_modules": "wq"}, ["layers.0.attention.wq", "layers.1.attention.wq"]),
        ({"target_modules": ["1.attention.wq", "output"]}, ["layers.1.attention.wq", "output"]),
        ({"target_modules": "layers.0.w1"}, ["layers.0.w1"]),
        (
            {"target_modules": r"re:layers\.\d+\.attention\.w[qk]", "exclude_modules": "wk"},
            ATTENTION[2:3] + ATTENTION[6:7],
        ),
        ({"target_modules": re.compile(r".*\.W1", re.I)}, ["layers.0.w1", "layers.1.w1"]),
        ({"exclude_modules": ["attention", "output"]}, [p for p in TOY_LINEARS if ".w1" in p or ".w2" in p]),
        ({"exclude_modules": "layers.0"}, [p for p in TOY_LINEARS if not p.startswith("layers.0.")]),
        ({"exclude_modules": "layers"}, ["output"]),
        ({"exclude_modules": re.compile(r"layers\.1")}, [p for p in TOY_LINEARS if not p.startswith("layers.1.")]),
    ],
)
def test_what_is_adapted(config, expected):
    assert found(Toy(), **config) == sorted(expected)
    # install asks find_targets and nothing else: there is one filter.
    assert adapted(lora_fx.install(Toy(), LoRAConfig(**config))) == sorted(expected)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("q", "Near misses: wq"),
        ("wp", "Near misses: w"),
        ("atention.wq", "Near misses: attention.wq"),
        ("w*", "'re:...' the full path"),
        ("re:wq", "matches no module"),
        ("wq.weight", "matches no module"),
        ("lora_a", "matches no module"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error(field, pattern, hint):
    with pytest.raises(ValueError, match=field) as error:
        found(Toy(), **{field: [pattern]})
    assert repr(pattern) in str(error.value) and hint in str(error.value)


def test_a_target_that_is_no_linear_is_an_error():
    with pytest.raises(ValueError, match=r"'attention' matches only modules that are no nn.Linear .*Attention.*wq"):
        found(Toy(), target_modules=["wq", "attention"])
    with pytest.raises(ValueError, match=r"'norm' matches only modules that are no nn.Linear .*LayerNorm"):
        found(Toy(), target_modules="norm")
    with pytest.raises(ValueError, match=r"'norm' matches only modules that are no nn.Linear"):
        found(Toy(), exclude_modules="norm")


def test_nothing_to_adapt_is_an_error():
    with pytest.raises(ValueError, match=r"LayerNorm holds no nn\.Linear"):
        found(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="exclude_modules leaves no linear"):
        found(Toy(), exclude_modules=["layers", "output"])
    with pytest.raises(ValueError, match="exclude_modules leaves no linear"):
        found(Toy(), target_modules="wq", exclude_modules="attention")


def test_rank_and_alpha_patterns():
    config = LoRAConfig(rank=8, rank_pattern={"wq": 2, "re:output": 3}, alpha_pattern={"layers.1.attention.wq": 5})
    numbers = {target.path: (target.rank, target.alpha) for target in find_targets(Toy(), config)}
    assert numbers["layers.0.attention.wq"] == (2, 16.0)
    assert numbers["layers.1.attention.wq"] == (2, 5.0)
    assert numbers["output"] == (3, 16.0)
    assert numbers["layers.0.attention.wk"] == (8, 16.0)
    model = lora_fx.install(Toy(), config)
    assert model.layers["1"].attention.wq.lora_a.shape == (2, 16)
    assert model.layers["1"].attention.wq.lora_scale.item() == 2.5


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_numbers_that_do_not_fit(field):
    with pytest.raises(ValueError, match=rf"{field}: 'wz' matches no module"):
        found(Toy(), **{field: {"wz": 4}})
    with pytest.raises(ValueError, match=rf"{field}: 'attention' matches only modules that are no"):
        found(Toy(), **{field: {"attention": 4}})
    with pytest.raises(ValueError, match=rf"{field}: 'wq' matches only linears that are not adapted"):
        found(Toy(), target_modules="wk", **{field: {"wq": 4}})
    with pytest.raises(
        ValueError, match=rf"{field}: 'wq' gives layers.0.attention.wq 4 and 'layers.0.att.*' gives it 5"
    ):
        found(Toy(), **{field: {"wq": 4, "layers.0.attention.wq": 5}})
    assert len(found(Toy(), **{field: {"wq": 4, "layers.0.attention.wq": 4}})) == len(TOY_LINEARS)


class Tied(nn.Module):
    """One linear under two names, and a third linear."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.third = nn.Linear(4, 4)


def test_one_module_under_two_names():
    assert found(Tied()) == ["first", "third"]
    assert found(Tied(), target_modules="second") == ["first"]
    assert found(Tied(), exclude_modules=["first", "second"]) == ["third"]
    with pytest.raises(ValueError, match=r"second and first are the same module.*exclude both"):
        found(Tied(), exclude_modules="first")
    with pytest.raises(ValueError, match=r"first and second are the same module"):
        found(Tied(), target_modules=["first", "third"], exclude_modules="second")
    with pytest.raises(ValueError, match=r"rank_pattern: 'first' gives first \(also known as second\) 2 and 'second'"):
        found(Tied(), rank_pattern={"first": 2, "second": 4})
    assert found(Tied(), rank_pattern={"second": 2}) == ["first", "third"]


def test_checkpoint_wrappers_do_not_get_into_names():
    model = Toy()
    for name, block in list(model.layers.items()):
        model.layers[name] = checkpoint_wrapper(block)
    assert found(model, target_modules="layers.0.attention.wq") == ["layers.0.attention.wq"]
    assert found(model, exclude_modules=["layers.0", "layers.1"]) == ["output"]


def test_a_model_that_is_a_linear_itself():
    assert found(nn.Linear(4, 4)) == [""]
    assert found(nn.Linear(4, 4), target_modules="re:") == [""]
    with pytest.raises(ValueError, match="the model itself is one"):
        found(nn.Linear(4, 4), target_modules="linear")


def test_a_long_list_is_cut():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(40))
    with pytest.raises(ValueError, match=r"\(40 in all\)"):
        found(model, target_modules="wq")


def test_routed_experts_are_left_alone():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(4, 8, 8))
            self.shared = Block(8)

    assert all(path.startswith("shared.") for path in found(Experts()))
