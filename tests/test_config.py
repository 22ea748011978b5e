# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import json
import math
import pickle
import re

import pytest

from lora_fx import LoRAConfig
from lora_fx.config import matches


@pytest.mark.parametrize("alpha", [0, 0.0, -1, -0.5, math.nan, math.inf, -math.inf, 1e-60, 1e60])
def test_alpha_must_be_positive_and_finite(alpha):
    with pytest.raises(ValueError, match="alpha must be positive and finite"):
        LoRAConfig(alpha=alpha)
    with pytest.raises(ValueError, match=r"alpha_pattern\['wq'\] must be positive and finite"):
        LoRAConfig(alpha_pattern={"wq": alpha})


@pytest.mark.parametrize("rank", [0, -1])
def test_rank_must_be_positive(rank):
    with pytest.raises(ValueError, match="rank must be positive"):
        LoRAConfig(rank=rank)
    with pytest.raises(ValueError, match=r"rank_pattern\['wq'\] must be positive"):
        LoRAConfig(rank_pattern={"wq": rank})


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_dropout_must_be_a_probability_below_one(dropout):
    with pytest.raises(ValueError, match="dropout must be in"):
        LoRAConfig(dropout=dropout)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 8.0},
        {"rank": True},
        {"rank": "8"},
        {"rank": None},
        {"alpha": True},
        {"alpha": "16"},
        {"alpha": None},
        {"dropout": False},
        {"dropout": None},
        {"use_rslora": 1},
        {"use_rslora": "yes"},
        {"init": None},
        {"target_modules": None},
        {"target_modules": 3},
        {"target_modules": [3]},
        {"target_modules": b"wq"},
        {"target_modules": {"wq": 1}},
        {"target_modules": re.compile(b"wq")},
        {"exclude_modules": None},
        {"exclude_modules": [None]},
        {"rank_pattern": [("wq", 4)]},
        {"rank_pattern": {"wq": 4.0}},
        {"rank_pattern": {"wq": True}},
        {"rank_pattern": {3: 4}},
        {"alpha_pattern": {"wq": "4"}},
    ],
)
def test_wrong_types_are_type_errors(wrong):
    with pytest.raises(TypeError, match=next(iter(wrong))):
        LoRAConfig(**wrong)


@pytest.mark.parametrize("name", ["", ".wq", "wq.", "a..b", " wq", "wq ", "a. b", "all-linear"])
def test_a_name_must_be_a_dotted_path(name):
    for field in ("target_modules", "exclude_modules"):
        with pytest.raises(ValueError, match=field):
            LoRAConfig(**{field: ["wk", name]})
    with pytest.raises(ValueError, match="rank_pattern"):
        LoRAConfig(rank_pattern={name: 4})


def test_other_mistakes():
    with pytest.raises(ValueError, match="target_modules is empty"):
        LoRAConfig(target_modules=[])
    with pytest.raises(ValueError, match="is no regular expression"):
        LoRAConfig(target_modules="re:(")
    with pytest.raises(ValueError, match="'wq' twice"):
        LoRAConfig(target_modules=["wq", "wq"])
    with pytest.raises(ValueError, match="twice"):
        LoRAConfig(rank_pattern={"re:w.": 1, re.compile("w."): 2})
    with pytest.raises(ValueError, match=r"did you mean 'kaiming'\?"):
        LoRAConfig(init="kaimin")
    with pytest.raises(TypeError, match="ranks"):
        LoRAConfig(ranks=4)
    with pytest.raises(TypeError):
        LoRAConfig(8)
    with pytest.raises(AttributeError):
        LoRAConfig().rank = 4


def test_patterns_are_kept_in_one_form():
    config = LoRAConfig(target_modules=re.compile(r"layers\.\d+\.wq", re.IGNORECASE), exclude_modules="wk", alpha=4)
    assert config.target_modules == (r"re:(?i)layers\.\d+\.wq",)
    assert config.exclude_modules == ("wk",)
    assert isinstance(config.alpha, float)
    assert LoRAConfig(target_modules=re.compile("(?i)wq")).target_modules == ("re:(?i)wq",)
    assert LoRAConfig(target_modules=re.compile("w q", re.VERBOSE)).target_modules == ("re:(?x)w q",)
    both = LoRAConfig(target_modules=re.compile("(?i)w.q", re.DOTALL)).target_modules[0]
    assert matches(both, "W\nQ")
    with pytest.raises(ValueError, match="flags"):
        LoRAConfig(target_modules=re.compile("wq", re.DEBUG))


def test_the_callers_containers_are_copied():
    targets, ranks = ["wq"], {"wq": 4}
    config = LoRAConfig(target_modules=targets, rank_pattern=ranks)
    targets.append("wk")
    ranks["wq"] = 5
    assert config.target_modules == ("wq",) and config.rank_pattern == {"wq": 4}


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(),
        LoRAConfig(rank=4, alpha=8, dropout=0.1, target_modules=["wq", re.compile("w[kv]")], exclude_modules="output"),
        LoRAConfig(rank_pattern={re.compile("w."): 2}, alpha_pattern={"wq": 3}, use_rslora=True, init="gaussian"),
    ],
)
def test_round_trips(config):
    through_json = LoRAConfig.from_dict(json.loads(json.dumps(config.as_dict())))
    for copy in (through_json, pickle.loads(pickle.dumps(config))):
        assert copy == config
        assert hash(copy) == hash(config)
    assert config != LoRAConfig(rank=3)


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match=r"no field 'lora_alpha'"):
        LoRAConfig.from_dict({"lora_alpha": 16})
    with pytest.raises(TypeError, match=r"did you mean 'dropout'\?"):
        LoRAConfig.from_dict({"drop_out": 0.1})
    with pytest.raises(ValueError, match="alpha"):
        LoRAConfig.from_dict({"alpha": -1.0})


def test_scale():
    assert LoRAConfig().scale(8, 16.0) == 2.0
    assert LoRAConfig(use_rslora=True).scale(16, 8.0) == 2.0


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("wq", "wq", True),
        ("wq", "layers.0.attention.wq", True),
        ("attention.wq", "layers.0.attention.wq", True),
        ("layers.0.attention.wq", "layers.0.attention.wq", True),
        ("q", "layers.0.attention.wq", False),
        ("wq", "layers.0.attention.wq_norm", False),
        ("wq", "layers.0.wq.inner", False),
        ("attention", "layers.0.attention.wq", False),
        ("0.attention.wq", "layers.10.attention.wq", False),
        ("w.", "layers.0.wq", False),
        ("re:w.", "layers.0.wq", False),
        ("re:layers.0", "layers.0.wq", False),
        (r"re:.*\.w.", "layers.0.wq", True),
        ("re:", "", True),
        ("wq", "", False),
    ],
)
def test_matches_whole_segments(pattern, path, expected):
    assert matches(pattern, path) is expected
