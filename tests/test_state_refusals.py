"""Adapter files that do not fit: each is refused by name, and leaves the model, or the files, as they were."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.peft_files import CONFIG, PREFIX, TENSORS
from tests.test_state import base, toy
from tests.toy_models import Toy, assert_same, snapshot

A, B = f"{PREFIX}layers.0.w1.lora_A.weight", f"{PREFIX}layers.0.w1.lora_B.weight"


def renamed(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def dropped(*keys):
    return lambda tensors: [tensors.pop(key) for key in keys]


BAD_TENSORS = {
    "half missing": (dropped(A), rf"{A} is missing"),
    "module missing": (dropped(A, B), rf"lacks {A} and lora_B\.weight, and target_modules in .* names that module"),
    "nothing there": (lambda tensors: tensors.clear(), r"holds no tensors"),
    "extra key": (
        lambda t: t.update({f"{PREFIX}head.weight": torch.ones(2)}),
        r"head\.weight' is no factor of a linear",
    ),
    "extra module": (
        lambda t: t.update({k.replace("layers.0", "layers.9"): v.clone() for k, v in t.items() if "layers.0" in k}),
        r"the model has no module layers\.9\.\S+ \(the nearest: layers\.",
    ),
    "no prefix": (renamed(A, A.removeprefix(PREFIX)), r"'layers\.0\.w1.*' does not start with 'base_model\.model\.'"),
    "wrong prefix": (renamed(A, "base_model." + A.removeprefix(PREFIX)), r"does not start with"),
    "adapter name": (renamed(A, A.replace(".weight", ".default.weight")), r"adapter's name in it: drop '\.default'"),
    "a model around it": (
        lambda t: [t.update({k.replace(PREFIX, PREFIX + "model."): t.pop(k)}) for k in list(t)],
        r"no module model\.\S+ \(the nearest: .*not into a part of it",
    ),
    "a norm": (
        lambda t: [t.update({k.replace("layers.0.w1", "layers.0.norm"): t.pop(k)}) for k in (A, B)],
        r"layers\.0\.norm is a LayerNorm and no nn\.Linear",
    ),
    "in features": (lambda t: t.update({A: torch.ones(4, 15)}), r"layers\.0\.w1 is \[32, 16\] in .*\[4, 15\]"),
    "out features": (
        lambda t: t.update({B: torch.ones(31, 4)}),
        r"layers\.0\.w1 is \[32, 16\] in the model.*\[31, 4\]",
    ),
    "ranks differ": (lambda t: t.update({B: torch.ones(32, 3)}), r"layers\.0\.w1 has .* whose ranks are not equal"),
    "rank not config's": (
        lambda t: t.update({A: torch.ones(2, 16), B: torch.ones(32, 2)}),
        r"gives layers\.0\.w1 rank 4, and its tensors .* have rank 2",
    ),
    "vector": (lambda t: t.update({A: torch.ones(16)}), r"must be a matrix"),
    "integers": (lambda t: t.update({A: torch.ones(4, 16, dtype=torch.int8)}), r"torch\.int8 .* floating point"),
    "nan": (lambda t: t[A].fill_(torch.nan), rf"{A} holds NaN"),
    "dora": (
        lambda t: t.update({f"{PREFIX}output.lora_magnitude_vector": torch.ones(12)}),
        r"has magnitudes of DoRA \(output\), and use_dora in \S+ is not set",
    ),
    "experts": (
        lambda t: t.update({f"{PREFIX}experts.base_layer.lora_A.weight": torch.ones(8, 4)}),
        r"experts\.base_layer\.lora_B\.weight is missing",
    ),
    "embedding": (
        lambda t: t.update({f"{PREFIX}tokens.lora_embedding_A": torch.ones(4, 12)}),
        r"adapter of an embedding",
    ),
    "twice": (
        lambda t: t.update({A.replace("layers", "_orig_mod.layers"): t[A].clone()}),
        r"layers\.0\.w1 has lora_A\.weight twice",
    ),
}

BAD_CONFIGS = {
    "foreign": ({"peft_type": "IA3"}, r"peft_type is 'IA3', and only 'LORA'"),
    "no type": ({"peft_type": None}, r"peft_type is None"),
    "dora": ({"use_dora": True}, r"layers\.0\.attention\.\w+\.lora_magnitude_vector is missing"),
    "experts": ({"target_parameters": ["experts.w1"]}, r"names experts\.w1, and the model has no such stack"),
    "experts as text": ({"target_parameters": "experts.w1"}, r"target_parameters must be a list of strings"),
    "head": ({"modules_to_save": ["output"]}, r"lacks base_model\.model\.output\.weight, and modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, r"'pissa', which changed the base weights: .*path_initial_model"),
    "bias": ({"bias": "all"}, r"bias is 'all'"),
    "rank": ({"r": 8}, r"rank 8, and its tensors .* have rank 4"),
    "a rank": ({"rank_pattern": {"w2": 2}}, r"layers\.0\.w2 rank 2, and its tensors .* have rank 4"),
    "fewer targets": (
        {"target_modules": ["wq", "wk"]},
        r"has tensors for \S+, which target_modules in .* does not name",
    ),
    "excluded": ({"exclude_modules": ["wo"]}, r"has tensors for layers\.0\.attention\.wo, which"),
    "expression": ({"target_modules": "re("}, r"unterminated subpattern"),
    "no targets": ({"target_modules": None}, r"target_modules is empty"),
    "targets": ({"target_modules": 3}, r"target_modules must be a string or a list"),
    "negative rank": ({"r": -1}, r"r must be a positive integer, got -1"),
    "alpha": ({"lora_alpha": "16"}, r"lora_alpha must be a finite number \(in float32\), got '16'"),
    "huge alpha": ({"lora_alpha": 1e39}, r"lora_alpha must be a finite number \(in float32\), got 1e\+39"),
    "dropout": ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
    "broken pattern": ({"alpha_pattern": {"w(": 3}}, r"unterminated subpattern"),
    "pattern": ({"rank_pattern": [3]}, r"rank_pattern must be an object"),
}


def refused(folder, match):
    """Nothing is changed in a model without adapters, nor in one that has the right ones."""
    for model in (base(), toy(seed=4)):
        before = snapshot(model)
        with pytest.raises(ValueError, match=match) as raised:
            lora_fx.load_adapter(model, folder)
        assert str(folder) in str(raised.value)
        assert_same(before, snapshot(model))


@pytest.mark.parametrize(("change", "match"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, match):
    lora_fx.save_adapter(toy(), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    change(tensors)
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
    refused(tmp_path, match)


@pytest.mark.parametrize(("values", "match"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_configurations_that_do_not_fit_are_refused(tmp_path, values, match):
    lora_fx.save_adapter(toy(), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **values}))
    refused(tmp_path, match)


def test_damaged_and_missing_files_are_refused(tmp_path):
    lora_fx.save_adapter(toy(), tmp_path / "whole")
    for name in (CONFIG, TENSORS):
        whole = (tmp_path / "whole" / name).read_bytes()
        for length in (0, 5, len(whole) // 2, len(whole) - 1):
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "cut")
            (tmp_path / "cut" / name).write_bytes(whole[:length])
            if name == CONFIG and length == len(whole) - 1:  # the last newline
                continue
            refused(tmp_path / "cut", f"{name} .*was cut short")
        (tmp_path / "cut" / name).unlink()
        refused(tmp_path / "cut", f"{name} is not there: ")
    (tmp_path / "cut" / TENSORS).with_suffix(".bin").write_bytes(b"pickle")
    (tmp_path / "cut" / CONFIG).write_bytes((tmp_path / "whole" / CONFIG).read_bytes())
    refused(tmp_path / "cut", r"safe_serialization=True \(pickles are not read\)")
    refused(tmp_path, rf"not called 'default' in a folder below; pass {tmp_path / 'cut'} or {tmp_path / 'whole'}")
    refused(tmp_path / "nowhere", "is not there: pass the folder")


def test_adapters_must_be_those_of_the_files(tmp_path):
    lora_fx.save_adapter(toy(), tmp_path)
    fix = r"call lora_fx\.remove\(model\) first"
    for config, match in (
        (
            LoRAConfig(rank=4, exclude_modules="output"),
            rf"an adapter for output, and the model has none there: {fix}",
        ),
        (
            LoRAConfig(rank=4, rank_pattern={"layers.1.w2": 2}),
            r"layers\.1\.w2 has room for rank 2 .* and rank 4 in .*max_rank",
        ),
    ):
        model = toy(config)
        before = snapshot(model)
        with pytest.raises(ValueError, match=match):
            lora_fx.load_adapter(model, tmp_path)
        assert_same(before, snapshot(model))


def test_models_that_cannot_be_saved_or_loaded(tmp_path):
    with pytest.raises(ValueError, match="Toy holds no adapters to save"):
        lora_fx.save_adapter(Toy(), tmp_path / "a")
    with pytest.raises(TypeError, match="must be an nn"):
        lora_fx.load_adapter("model", tmp_path / "a")
    with pytest.raises(ValueError, match="the model is itself the adapted module"):
        lora_fx.save_adapter(lora_fx.install(nn.Linear(4, 4)), tmp_path / "a")
    with pytest.raises(ValueError, match="is on the meta device: there are no values"):
        lora_fx.save_adapter(toy().to("meta"), tmp_path / "a")
    model = toy()
    model.layers["1"].w2.lora_a = nn.Parameter(torch.ones(5))
    with pytest.raises(ValueError, match=r"layers\.1\.w2 has factors of shapes \[5\] .*summon_full_params"):
        lora_fx.save_adapter(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())
    lora_fx.save_adapter(toy(), tmp_path / "a")
    good = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    model = toy()
    with torch.no_grad():
        model.output.lora_b[0, 0] = torch.inf
    with pytest.raises(ValueError, match="output holds NaN or infinity: nothing was written"):
        lora_fx.save_adapter(model, tmp_path / "a")
    assert good == {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for model in (Toy().to("meta"), toy().to("meta")):
        before = snapshot(model)
        with pytest.raises(ValueError, match="on the meta device"):
            lora_fx.load_adapter(model, tmp_path / "a")
        assert_same(before, snapshot(model))
    with pytest.raises(ValueError, match="compiled already"):
        lora_fx.load_adapter(torch.compile(base(), backend="eager"), tmp_path / "a")
