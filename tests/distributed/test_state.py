"""Adapter files of models that are spread over ranks: what one process would write, readable on any mesh."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.peft_files import CONFIG, TENSORS
from tests.distributed.processes import run_ranks
from tests.distributed.simulated import whole
from tests.distributed.test_placements import Mlp, plan
from tests.toy_models import shake

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Mlp(bias=True) for _ in range(2))
        self.head = nn.Linear(16, 6)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def net(seed=None, alpha=5.0):
    torch.manual_seed(0)
    model = Net()
    if seed is not None:
        shake(lora_fx.install(model, LoRAConfig(rank=3, alpha=alpha, rank_pattern={"up": 2})), seed=seed)
    return model


def parallel(model, mesh):
    return parallelize_module(model, mesh, {f"blocks.*.{name}": style for name, style in plan().items()})


def sharded(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def files(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (CONFIG, TENSORS)]


def raised(function: Any, *arguments: Any) -> str:
    try:
        function(*arguments)
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def values(model: nn.Module) -> list[list[float]]:
    return [whole(p.detach()).flatten().tolist() for p in lora_fx.adapter_parameters(model)]


def exchange(rank: int, folder: Path) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(9))
    seen: dict[str, Any] = {}
    ours, other = folder / "ours", folder / "other"
    for target, model in ((ours, net(seed=1)), (other, net(seed=2, alpha=7.0))):
        if rank == 0:
            lora_fx.save_adapter(model, target)
    torch.distributed.barrier()
    expected = net(seed=2, alpha=7.0)(x)

    # On disk for every rank when the call returns, and equal to the bit to what one process writes.
    model = sharded(parallel(net(seed=1), mesh["tp"]), mesh["dp"])
    seen["distributed"] = all(isinstance(p, DTensor) for p in lora_fx.adapter_parameters(model))
    lora_fx.save_adapter(model, folder / "sharded")
    seen["saved"] = files(folder / "sharded") == files(ours)

    # A forward pass without a backward leaves the root's parameters whole: those must not be what is written into.
    with torch.no_grad():
        model(x)
        seen["whole after forward"] = not isinstance(model.head.lora_a, DTensor)
        lora_fx.load_adapter(model, other)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    lora_fx.save_adapter(model, folder / "sharded")  # over files with other numbers
    seen["loaded"] = files(folder / "sharded") == files(other)

    # Without adapters: before FSDP, and beside weights that are distributed already.
    fresh = lora_fx.load_adapter(parallel(net(), mesh["tp"]), other)
    up, down = fresh.blocks[0].up, fresh.blocks[0].down
    seen["placements"] = [str(tuple(p.placements)) for p in (up.lora_a, up.lora_b, down.lora_a, down.lora_b)]
    torch.testing.assert_close(fresh(x), expected, rtol=1e-5, atol=1e-5)
    again = sharded(fresh, mesh["dp"])
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)
    lora_fx.save_adapter(again, folder / "again")
    seen["again"] = files(folder / "again") == files(other)

    # One rank alone reads damaged files, or cannot write: all raise, nothing is changed, and nobody hangs.
    before = values(again)
    if rank == 3:
        (folder / "cut").mkdir()
        (folder / "cut" / CONFIG).write_text(files(ours)[0].decode()[:50])
    seen["load fails"] = raised(lora_fx.load_adapter, again, folder / "cut" if rank == 3 else ours)
    seen["unchanged"] = values(again) == before
    (folder / "file").touch()
    seen["save fails"] = raised(lora_fx.save_adapter, again, folder / "file" / "adapter" if rank == 0 else other)
    bare = parallel(net(), mesh["tp"])
    seen["install fails"] = raised(lora_fx.load_adapter, bare, folder / "cut" if rank == 3 else ours)
    seen["bare"] = lora_fx.is_installed(bare) == (rank < 2)  # whose mesh, without FSDP, is only theirs

    # Wrappers: DDP's prefix, and FSDP1, whose parameters are flat outside its own context.
    if rank == 0:
        lora_fx.save_adapter(DistributedDataParallel(net(seed=1), process_group=mesh["dp"].get_group()), folder / "ddp")
    else:
        DistributedDataParallel(net(seed=1), process_group=mesh["dp"].get_group())
    torch.distributed.barrier()
    seen["ddp"] = files(folder / "ddp") == files(ours)
    fsdp = FullyShardedDataParallel(net(seed=1), use_orig_params=True, device_id=torch.device("cpu"))
    seen["flat"] = raised(lora_fx.save_adapter, fsdp, folder / "flat")
    seen["flat load"] = raised(lora_fx.load_adapter, fsdp, ours)
    with FullyShardedDataParallel.summon_full_params(fsdp):
        lora_fx.load_adapter(fsdp, other)
    torch.testing.assert_close(fsdp(x), expected, rtol=1e-5, atol=1e-5)
    with FullyShardedDataParallel.summon_full_params(fsdp):
        if rank == 0:
            lora_fx.save_adapter(fsdp, folder / "fsdp")
    torch.distributed.barrier()
    seen["fsdp"] = files(folder / "fsdp") == files(other)
    return seen


def test_files_of_four_ranks(tmp_path):
    results = run_ranks(exchange, 4, tmp_path)
    for rank, seen in enumerate(results):
        flags = {key: value for key, value in seen.items() if isinstance(value, bool)}
        assert all(flags.values()), f"{rank}: {[key for key, value in flags.items() if not value]}"
        assert seen["placements"] == ["(Replicate(),)", "(Shard(dim=0),)", "(Shard(dim=1),)", "(Replicate(),)"]
        elsewhere = "RuntimeError: another rank failed"
        cut = "ValueError: " + str(tmp_path / "cut" / CONFIG)
        assert seen["load fails"].startswith(cut if rank == 3 else elsewhere), seen["load fails"]
        if rank < 2:
            assert seen["install fails"] == ""
        else:
            assert seen["install fails"].startswith(cut if rank == 3 else elsewhere), seen["install fails"]
        assert seen["save fails"].startswith("FileExistsError" if rank == 0 else elsewhere), seen["save fails"]
        for key in ("flat", "flat load"):
            assert "summon_full_params" in seen[key], seen[key]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
    assert json.loads((tmp_path / "sharded" / CONFIG).read_text())["lora_alpha"] == 7
