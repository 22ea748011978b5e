"""What a checkpoint carries: the function that was saved, whatever the loading model was installed with."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import io

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import Toy, shake

TOKENS = torch.arange(10).reshape(2, 5)


def saved(config):
    torch.manual_seed(0)
    model = shake(lora_fx.install(Toy(), config))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return model, torch.load(file, weights_only=True)


OTHER_SCALES = [
    LoRAConfig(rank=8, alpha=16),
    LoRAConfig(rank=8, alpha=32, use_rslora=True),
    LoRAConfig(rank=8, alpha=32, alpha_pattern={"wq": 1.0}),
    LoRAConfig(rank=8, alpha=32, dropout=0.5),
]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("config", OTHER_SCALES)
def test_a_strict_load_restores_the_function(config, assign):
    model, state = saved(LoRAConfig(rank=8, alpha=32))
    other = lora_fx.install(Toy(), config)
    other.load_state_dict(state, strict=True, assign=assign)
    assert torch.equal(other.eval()(TOKENS), model.eval()(TOKENS))
    # It is what the model was loaded with that survives from here on.
    other.init_weights()
    assert other.output.lora_scale.item() == 4.0
    other.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert other.output.lora_scale.item() == 4.0
    assert "scale=4" in repr(other.output)


def test_a_scale_that_was_changed_is_saved():
    model, _ = saved(LoRAConfig(rank=8, alpha=32))
    model.layers["0"].w1.lora_scale.fill_(0.125)
    other = lora_fx.install(Toy(), LoRAConfig(rank=8))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_onto_meta_without_init_weights(assign):
    model, state = saved(LoRAConfig(rank=8, alpha=32))
    with torch.device("meta"):
        other = lora_fx.install(Toy(), LoRAConfig(rank=8))
    if not assign:
        other.to_empty(device="cpu")
    other.load_state_dict(state, strict=True, assign=assign)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_a_base_checkpoint_misses_exactly_the_adapters():
    torch.manual_seed(0)
    base = Toy()
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=8, alpha=32)))
    result = model.load_state_dict(base.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == {key for key in model.state_dict() if ".lora_" in key}
    with lora_fx.disabled(model):
        assert torch.equal(model(TOKENS), base(TOKENS))
    assert model.output.lora_scale.item() == 4.0


def test_a_different_rank_is_refused_by_torch():
    _, state = saved(LoRAConfig(rank=8, alpha=32))
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lora_a"):
        lora_fx.install(Toy(), LoRAConfig(rank=4)).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*lora_scale"):
        Toy().load_state_dict(state)


def test_a_state_without_scales_is_refused():
    """Such a state does not say what function it belongs to."""
    _, state = saved(LoRAConfig(rank=8, alpha=32))
    state = {key: value for key, value in state.items() if not key.endswith("lora_scale")}
    with pytest.raises(RuntimeError, match=r"Missing key.*lora_scale"):
        lora_fx.install(Toy(), LoRAConfig(rank=8)).load_state_dict(state)


def test_a_checkpoint_that_was_cast():
    model, state = saved(LoRAConfig(rank=8, alpha=32))
    state = {key: value.bfloat16() for key, value in state.items()}
    other = lora_fx.install(Toy(), LoRAConfig(rank=8))
    other.load_state_dict(state, assign=True)
    assert other.output.lora_scale.dtype == torch.float32 and other.output.lora_scale.item() == 4.0
    assert other.output.lora_a.dtype == torch.bfloat16
    model.to(torch.bfloat16)
    assert torch.equal(other(TOKENS), model(TOKENS))


def test_disabled_is_not_saved():
    model = lora_fx.install(nn.Linear(4, 4), LoRAConfig(rank=2))
    with lora_fx.disabled(model):
        state = model.state_dict()
    assert list(state) == ["weight", "bias", "lora_a", "lora_b", "lora_scale"]
    assert state["lora_scale"].item() == 8.0
