"""Modules that are trained whole, under tensor parallelism (all ranks in one process) and FSDP (one rank)."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy

import pytest
import torch
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lora_fx
from lora_fx import LoRAConfig
from tests.distributed.simulated import simulated, whole
from tests.distributed.test_placements import Mlp, run
from tests.test_sharding import check_sharded, one_rank  # noqa: F401  # a fixture
from tests.toy_models import TOKENS, Toy, shake

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:Full backward hook")]


def test_tensor_parallel():
    torch.manual_seed(0)
    config = LoRAConfig(rank=2, target_modules="up", modules_to_save=["down", "norm"])
    base = Mlp()
    adapted = lora_fx.install(copy.deepcopy(base), config)
    x, dy = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    with simulated(tp=4) as mesh:
        model = lora_fx.freeze(parallelize_module(copy.deepcopy(adapted), mesh, plan))
        with torch.no_grad():
            for one in (model, adapted):
                for _, parameter in lora_fx.named_adapter_parameters(one):
                    parameter.mul_(1.5).add_(0.1)
        expected, _, _ = run(adapted, x, dy)
        y, _, _ = run(model, x, dy)
        torch.testing.assert_close(whole(y), expected)
        lora_fx.distributed.reduce_gradients(model)
        named = dict(lora_fx.named_adapter_parameters(model))
        assert list(named) == ["norm.weight", "norm.bias", "up.lora_a", "up.lora_b", "down.weight"]
        for (name, p), q in zip(named.items(), lora_fx.adapter_parameters(adapted), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad, msg=lambda text, name=name: f"{name}: {text}")
        with lora_fx.disabled(model):
            torch.testing.assert_close(whole(model(x)), base(x))
        torch.testing.assert_close(whole(model(x)), expected)
        torch.testing.assert_close(whole(lora_fx.remove(model)(x)), base(x))
        assert torch.equal(whole(model.down.weight), base.down.weight)


@pytest.mark.filterwarnings("ignore")
def test_fully_shard(one_rank, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2, modules_to_save=["output", "layers.1.norm"])))
    plain = check_sharded(model, one_rank)
    named = dict(lora_fx.named_adapter_parameters(model))
    model.requires_grad_(False)
    lora_fx.freeze(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == named.keys()
    with (
        pytest.raises(ValueError, match=r"trained whole \(modules_to_save\) and sharded by .*fully_shard, which owns"),
        lora_fx.disabled(model),
    ):
        pass
    lora_fx.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    assert torch.equal(lora_fx.load_adapter(Toy(), tmp_path)(TOKENS), plain(TOKENS))
    with torch.no_grad():
        for parameter in lora_fx.adapter_parameters(model):
            parameter.zero_()
    lora_fx.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS))
