"""What is for a model with one adapter: another one is refused, and nothing changes."""

# mypy: no-check-untyped-defs
import pytest
import torch

import lora_fx
from lora_fx import LoRAConfig
from tests.test_dora import DORA, shake, toy
from tests.toy_models import TOKENS, assert_same, snapshot

VARIANTS = {
    "use_dora is for a model with one adapter": DORA,
    "init='pissa' changes the base, which suits one adapter": LoRAConfig(rank=3, init="pissa"),
    "modules_to_save is for a model with one adapter": LoRAConfig(rank=3, modules_to_save="output"),
}


@pytest.mark.parametrize(("reason", "config"), VARIANTS.items(), ids=["dora", "pissa", "modules_to_save"])
def test_another_adapter_is_refused(tmp_path, reason, config):
    plain = LoRAConfig(rank=2, exclude_modules="output")
    lora_fx.save_adapter(toy(plain), tmp_path)
    model, other = toy(config).eval(), toy(plain).eval()
    calls = {
        model: [
            lambda: lora_fx.add_adapter(model, "more", plain),
            lambda: lora_fx.load_adapter(model, tmp_path, adapter_name="more"),
            lambda: lora_fx.adapters_per_row(model, ["default", None]).__enter__(),
        ],
        other: [lambda: lora_fx.add_adapter(other, "more", config)],
    }
    for held, refused in calls.items():
        before = snapshot(held)
        for call in refused:
            with pytest.raises(ValueError, match=reason):
                call()
        assert_same(before, snapshot(held))
    base = toy()
    before = snapshot(base)
    with pytest.raises(ValueError, match=f"max_rank leaves room for other adapters, and {reason}"):
        lora_fx.install(base, config, max_rank=8)
    assert_same(before, snapshot(base))
    lora_fx.set_adapter(model, "default")  # the one that there is
    assert lora_fx.adapter_names(model) == ["default"]


def test_a_file_of_fewer_linears_of_dora(tmp_path):
    """The others are what they are without an adapter."""
    few = toy(LoRAConfig(rank=2, target_modules="wq", use_dora=True))
    lora_fx.save_adapter(few, tmp_path)
    model = shake(lora_fx.install(toy(), DORA), seed=5)
    lora_fx.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(TOKENS), few(TOKENS))
    lora_fx.save_adapter(model, tmp_path / "again")
    assert torch.equal(lora_fx.load_adapter(toy(), tmp_path / "again")(TOKENS), few(TOKENS))


def test_room_behind_an_orthogonal_start():
    torch.manual_seed(0)
    model = lora_fx.install(toy(), LoRAConfig(rank=4, init="orthogonal"), max_rank=6)
    module = model.output
    assert module.lora_a.shape[0] == 6 and not module.lora_a[4:].any() and not module.lora_b[:, 4:].any()
    assert module.lora_a[:4].all() and (module.lora_b @ module.lora_a).abs().max() < 1e-6
