"""Adapted experts whose weights are sharded: over experts, and over the columns and rows of each."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lora_fx
import lora_fx.distributed
from llama3 import CONFIGS, Experts
from lora_fx import LoRAConfig
from lora_fx.peft_files import TENSORS
from lora_fx.placements import expert_placements
from tests.distributed.processes import run_ranks
from tests.distributed.simulated import collectives, copy_adapters, simulated, whole
from tests.toy_models import shake

pytestmark = [pytest.mark.distributed]
R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)
TINY = CONFIGS["tiny-moe"]
CONFIG = LoRAConfig(rank=3, alpha=4.0, target_modules=(), target_parameters=["w1", "w2", "w3"])
ENDS = torch.tensor([3, 3, 7, 12], dtype=torch.int32)
# Columns of the weights before the gate, rows of the one behind it.
CHANNELS = {"w1": S1, "w3": S1, "w2": S2}


def experts() -> nn.Module:
    torch.manual_seed(0)
    module = Experts(TINY)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    return module


def shard(module: nn.Module, mesh: Any, placements: dict[str, Any]) -> nn.Module:
    """As whoever shards experts does it: weight by weight, by name."""
    for name, placement in placements.items():
        weight = module.get_parameter(name)
        sharded = distribute_tensor(weight.detach(), mesh, [placement])
        setattr(module, name, nn.Parameter(sharded, requires_grad=weight.requires_grad))
    return module


def test_placements_follow_the_weight():
    for weight, a, b in ((S0, S0, S0), (S1, R, S1), (S2, S2, R), (R, R, R)):
        assert expert_placements([weight]) == {"lora_a": (a,), "lora_b": (b,)}
    for weight, a, b in ((S0, S0, S0), (S1, S2, R), (S2, R, S1)):
        assert expert_placements([weight], transposed=True) == {"lora_a": (a,), "lora_b": (b,)}
    assert expert_placements([S0, S1])["lora_a"] == (S0, R)
    with pytest.raises(ValueError, match="is partial"):
        expert_placements([Partial()])


@pytest.mark.parametrize("order", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_channels_of_each_expert_on_four_ranks(order):
    """A peer is silently wrong here: it takes each rank's term of a replicated factor's gradient for the whole."""
    adapted = shake(lora_fx.install(experts(), CONFIG))
    x, dy = torch.randn(12, TINY.dim), torch.randn(12, TINY.dim)
    exact = copy.deepcopy(adapted).double()
    exact_x = x.double().requires_grad_()
    expected = exact(exact_x, ENDS)
    expected.backward(dy.double())
    with simulated(tp=4) as mesh:
        if order == "before":
            module = shard(copy.deepcopy(adapted), mesh, CHANNELS)
        else:
            module = lora_fx.install(shard(experts(), mesh, CHANNELS), CONFIG)
            copy_adapters(adapted, module)
        adapters = dict(lora_fx.named_adapter_parameters(module))
        assert {name: p.placements for name, p in adapters.items()} == {
            f"{w}_lora_{f}": (p,)
            for w, a, b in (("w1", R, S1), ("w2", S2, R), ("w3", R, S1))
            for f, p in (("a", a), ("b", b))
        }
        ours_x = x.clone().requires_grad_()
        with collectives() as counts:
            y = module(ours_x, ENDS)
            total = DTensor.from_local(y, mesh, [Partial()], run_check=False)
            total.redistribute(placements=[R]).to_local().backward(dy)
        assert counts == {"all_reduce": 1}
        torch.testing.assert_close(whole(total), expected.float(), rtol=1e-5, atol=1e-5)
        terms = DTensor.from_local(ours_x.grad, mesh, [Partial()], run_check=False)
        torch.testing.assert_close(whole(terms), exact_x.grad.float(), rtol=1e-5, atol=1e-5)
        placements = {name: p.grad.placements for name, p in adapters.items()}
        assert placements["w1_lora_a"] == placements["w2_lora_b"] == placements["w3_lora_a"] == (Partial(),)
        with collectives() as counts:
            assert lora_fx.distributed.reduce_gradients(module) == 1
        assert counts == {"allreduce": 1}
        for name, p in adapters.items():
            assert p.grad.placements == p.placements
            theirs = exact.get_parameter(name).grad.float()
            torch.testing.assert_close(whole(p.grad), theirs, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_deferred_reduction_and_freshly_started_factors():
    reference = lora_fx.install(experts(), CONFIG)
    torch.manual_seed(3)
    reference.reset_adapters()
    with simulated(tp=2) as mesh:
        module = shard(lora_fx.install(experts(), CONFIG), mesh, CHANNELS)
        optimizer = torch.optim.SGD(lora_fx.adapter_parameters(module), lr=0.1)
        reduction = lora_fx.distributed.DeferredReduction(module, optimizer)
        torch.manual_seed(3)
        module.reset_adapters()
        for name, p in reference.named_parameters():
            if "lora" in name:
                torch.testing.assert_close(whole(module.get_parameter(name)), p.detach(), rtol=0, atol=0)
        module(torch.randn(12, TINY.dim), ENDS).sum().backward()
        assert reduction.reduce() == 1
        assert reduction.reduce() == 0


def files(rank: int, folder: Path, source: str) -> dict[str, float]:
    """Load an adapter into experts that are sharded, run them, and write it again."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = nn.ModuleDict({"experts": shard(experts(), mesh, CHANNELS)})
    lora_fx.load_adapter(model, source)
    y = model["experts"](torch.ones(12, TINY.dim), ENDS).detach()
    torch.distributed.all_reduce(y)
    plain = lora_fx.load_adapter(nn.ModuleDict({"experts": experts()}), source)
    expected = plain["experts"](torch.ones(12, TINY.dim), ENDS)
    lora_fx.save_adapter(model, folder / "again")
    lora_fx.load_adapter(model, source)  # into adapters that are there
    return {"error": float((y - expected).abs().max())}


@pytest.mark.slow
def test_files_of_sharded_experts(tmp_path):
    whole_model = shake(lora_fx.install(nn.ModuleDict({"experts": experts()}), CONFIG))
    lora_fx.save_adapter(whole_model, tmp_path / "first")
    for seen in run_ranks(files, 2, tmp_path / "ranks", source=str(tmp_path / "first")):
        assert seen["error"] < 1e-5
    first, again = (load_file(path / TENSORS) for path in (tmp_path / "first", tmp_path / "ranks" / "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
