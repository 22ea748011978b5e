"""Several adapters where parameters are distributed: they follow their weight, or are refused. One process."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.distributed import adapter_placements
from tests.distributed.simulated import copy_adapters, fake_world, simulated, whole
from tests.distributed.test_placements import Mlp, plan
from tests.toy_models import shake

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:Full backward hook")]


def model():
    torch.manual_seed(0)
    module = lora_fx.install(Mlp(bias=True), LoRAConfig(rank=2), adapter_name="en", max_rank=4)
    lora_fx.add_adapter(module, "fr", LoRAConfig(rank=3, target_modules="up"))
    for seed, name in enumerate(("fr", "en")):
        shake(lora_fx.set_adapter(module, name), seed=seed)
    return module


@pytest.mark.parametrize("order", ["before", "after"])
def test_tensor_parallel(order):
    """Installed before or after `parallelize_module`: outputs and gradients of each are those of one process."""
    single = model()
    x, dy = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    with simulated(tp=2) as mesh:
        if order == "before":
            parallel = lora_fx.freeze(parallelize_module(copy.deepcopy(single), mesh, plan()))
        else:
            torch.manual_seed(0)
            parallel = parallelize_module(Mlp(bias=True), mesh, plan())
            lora_fx.install(parallel, LoRAConfig(rank=2), adapter_name="en", max_rank=4)
            lora_fx.add_adapter(parallel, "fr", LoRAConfig(rank=3, target_modules="up"))
            for name in ("fr", "en"):
                copy_adapters(lora_fx.set_adapter(single, name), lora_fx.set_adapter(parallel, name))
        for name in ("fr", "en", "fr"):
            lora_fx.set_adapter(single, name), lora_fx.set_adapter(parallel, name)
            for linear in (parallel.up, parallel.down):
                wanted = adapter_placements(linear.weight.placements)
                assert linear.lora_a.placements == wanted["lora_a"]
                assert linear.lora_b.placements == wanted["lora_b"]
                assert isinstance(linear.lora_scale, DTensor)
            single.zero_grad(), parallel.zero_grad()
            y, expected = parallel(x), single(x)
            torch.testing.assert_close(whole(y), expected)
            y.backward(dy), expected.backward(dy)
            for ours, theirs in zip(lora_fx.adapter_parameters(parallel), lora_fx.adapter_parameters(single)):
                torch.testing.assert_close(whole(ours.grad), theirs.grad, rtol=1e-4, atol=1e-5)
        with (
            pytest.raises(ValueError, match="up is sharded: rows of several adapters"),
            lora_fx.adapters_per_row(parallel.eval(), ["en"]),
        ):
            raise AssertionError("entered")


def test_sharded_parameters_stay_where_they_are():
    with fake_world(2):
        module = model()
        fully_shard(module.up, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        before = lora_fx.adapter_parameters(module)
        for change in (
            lambda: lora_fx.set_adapter(module, "fr"),
            lambda: lora_fx.set_adapter(module.up, "fr"),
            lambda: lora_fx.add_adapter(module, "x", LoRAConfig(rank=1)),
            lambda: lora_fx.delete_adapter(module, "fr"),
        ):
            with pytest.raises(ValueError, match=r"is wrapped by .*fully_shard, which keeps the parameters that it"):
                change()
        assert all(a is b for a, b in zip(before, lora_fx.adapter_parameters(module), strict=True))
        assert lora_fx.adapter_names(module) == ["en", "fr"] and lora_fx.active_adapter(module) == "en"
