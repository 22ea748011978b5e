"""FSDP2 over real processes: alone, with tensor parallelism, on an HSDP mesh; float32 adapters on a bfloat16 base."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy
import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from llama3 import CONFIGS, Llama
from lora_fx import LoRAConfig
from lora_fx.distributed import DeferredReduction, clip_grad_norm, manual_seed
from tests.distributed.processes import run_ranks
from tests.distributed.simulated import copy_adapters, fake_world
from tests.toy_models import shake

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
CONFIG = LoRAConfig(rank=2, alpha=4.0)
NARROW = LoRAConfig(rank=1, alpha=2.0)  # a rank less than the ranks that shard it
STEPS = 3
SIZE = CONFIGS["tiny"]
TABLE = [
    ("forward", "allgather_base"),
    ("backward", "allgather_base"),
    ("forward", "all_reduce"),
    ("backward", "all_reduce"),
    ("backward", "reduce_scatter_base"),
]


def base(dtype: torch.dtype = torch.float32) -> Llama:
    """A small Llama, the same on every rank. Its embedding is trained, so that backward goes through all of it."""
    torch.manual_seed(0)
    module = Llama(SIZE, dtype)
    module.init_weights()
    return module


def model(dtype: torch.dtype = torch.float32, config: LoRAConfig = CONFIG) -> Any:
    """`base` with adapters away from zero."""
    return shake(lora_fx.install(base(dtype), config))


def tokens(step: int, rank: int = 0, world: int = 1) -> torch.Tensor:
    """This rank's part of the batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(SIZE.vocab_size, (4, 16), generator=generator).chunk(world)[rank]


def loss_of(module: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(module(batch).float().flatten(0, 1), batch.flatten())


def alone(max_norm: float = 0.0, config: LoRAConfig = CONFIG) -> tuple[nn.Module, list[float]]:
    """The model after training in one process, and the norm of each step's gradients."""
    module = model(config=config)
    parameters = lora_fx.adapter_parameters(module)
    optimizer, norms = torch.optim.SGD(parameters, lr=0.5), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(module, tokens(step)).backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, max_norm or float("inf")).item())
        optimizer.step()
    return module, norms


class Traffic(TorchDispatchMode):
    """Counts collectives and the elements that go into reduce-scatters."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.reduced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = func._schema.name
        if "c10d" in name and "wait" not in name:
            name = name.split("::")[1].strip("_")
            self.counts[name] = self.counts.get(name, 0) + 1
            if "reduce_scatter" in name:
                self.reduced += args[1].numel() if isinstance(args[1], torch.Tensor) else args[0].numel()
        return func(*args, **(kwargs or {}))


def difference(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest difference of any adapter."""
    pairs = zip(lora_fx.adapter_parameters(ours), lora_fx.adapter_parameters(theirs), strict=True)
    return max(((a.full_tensor() if isinstance(a, DTensor) else a) - b).abs().max().item() for a, b in pairs)


def train(module: nn.Module, data_rank: int, data_world: int, reduction=None, max_norm: float = 0.0):
    """Train a parallel model as `alone` trains a plain one; returns norms and the traffic of the last step."""
    parameters = lora_fx.adapter_parameters(module)
    optimizer, norms = torch.optim.SGD(parameters, lr=0.5), []
    deferred = DeferredReduction(module, optimizer) if reduction == "deferred" else None
    for step in range(STEPS):
        optimizer.zero_grad()
        with Traffic() as traffic:
            loss_of(module, tokens(step, data_rank, data_world)).backward()
        if max_norm:
            if deferred is not None:
                deferred.reduce()
            norms.append(clip_grad_norm(parameters, max_norm).item())
        with Traffic() as at_step:
            optimizer.step()
    return norms, traffic, at_step


def plan() -> dict:
    names: dict = {f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    names |= {f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")}
    names |= {"attention.wo": RowwiseParallel(), "feed_forward.w2": RowwiseParallel()}
    return {f"layers.*.{name}": style for name, style in names.items()}


def shard(module: Any, mesh, where: str = "blocks", **how) -> nn.Module:
    if where == "linear":
        fully_shard(module.layers["0"].feed_forward.w1, mesh=mesh, **how)
    if where != "model":
        for block in module.layers.values():
            fully_shard(block, mesh=mesh, **how)
    return fully_shard(module, mesh=mesh, **how)


# ---- bodies of ranks -------------------------------------------------------------------------------------------------


def fsdp(rank: int, folder: Path) -> dict:
    """Everywhere that `fully_shard` may be put."""
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)), {}
    for where, config in (("blocks", CONFIG), ("model", CONFIG), ("linear", CONFIG), ("blocks", NARROW)):
        expected, norms = alone(max_norm=0.5, config=config)
        module = shard(model(config=config), mesh, where)
        ours, traffic, _ = train(module, rank, 2, max_norm=0.5)
        trained = sum(p.numel() for p in lora_fx.adapter_parameters(module))
        # Odd sizes are padded to the number of ranks.
        padded = sum(p.numel() // p.shape[0] * (-p.shape[0] % 2) for p in lora_fx.adapter_parameters(module))
        found[f"{where} {config.rank}"] = {
            "difference": difference(module, expected),
            "norms": max(abs(a - b) for a, b in zip(ours, norms, strict=True)),
            "reduced": traffic.reduced,
            "trained": trained + padded,
            "frozen have no gradient": all(p.grad is None for p in module.parameters() if not p.requires_grad),
        }
    return found


def mixed(rank: int, folder: Path) -> dict:
    """A bfloat16 base with float32 adapters, with and without a mixed precision policy."""
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)), {}
    policies = {"policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32), "none": MixedPrecisionPolicy()}
    for name, policy in policies.items():
        module = model(torch.bfloat16)
        for _, parameter in lora_fx.named_adapter_parameters(module):
            parameter.data = parameter.data.float()
        plain = copy.deepcopy(module)
        loss_of(plain, tokens(0)).backward()
        shard(module, mesh, mp_policy=policy)
        loss_of(module, tokens(0, rank, 2)).backward()
        pairs: list = [
            (p.grad, q.grad)
            for p, q in zip(lora_fx.adapter_parameters(module), lora_fx.adapter_parameters(plain), strict=True)
        ]
        found[name] = {
            "dtypes": sorted({str(p.dtype) for p, _ in pairs}),
            "difference": max(((p.full_tensor() - q).norm() / q.norm()).item() for p, q in pairs),
        }
    return found


def tensor_parallel(rank: int, folder: Path) -> dict:
    """FSDP and tensor parallelism, and an HSDP mesh, on four ranks; how gradients are reduced, and how often."""
    found = {}
    expected, norms = alone(max_norm=0.5)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for order in ("before", "after"):
        for reduction in ("eager", "deferred"):
            if order == "before":
                module = lora_fx.freeze(parallelize_module(model(), mesh["tp"], plan()))
            else:
                module = lora_fx.remove(model())
                parallelize_module(module, mesh["tp"], plan())
                copy_adapters(model(), lora_fx.install(module, CONFIG))
            shard(module, mesh["dp"])
            ours, traffic, at_step = train(module, mesh["dp"].get_local_rank(), 2, reduction, max_norm=0.5)
            found[f"{order} {reduction}"] = {
                "difference": difference(module, expected),
                "norms": max(abs(a - b) for a, b in zip(ours, norms, strict=True)),
                "counts": traffic.counts,
                "step": at_step.counts,
            }
    # Without clipping, the optimizer's hook is what reduces.
    module = shard(lora_fx.freeze(parallelize_module(model(), mesh["tp"], plan())), mesh["dp"])
    _, _, at_step = train(module, mesh["dp"].get_local_rank(), 2, "deferred")
    found["hook"] = {"difference": difference(module, alone()[0]), "step": at_step.counts}
    # The embedding is trained here: then backward goes through every layer of the frozen model too.
    models: dict[str, Any] = {"frozen": base().requires_grad_(False), "adapted": model(), "as they come": model()}
    for name, module in models.items():
        parallelize_module(module, mesh["tp"], plan())
        module.tok_embeddings.weight.requires_grad_(True)
        shard(module, mesh["dp"])
        if name == "adapted":
            DeferredReduction(module, torch.optim.SGD(module.parameters(), lr=0.5))
        with Traffic() as forward:
            loss = loss_of(module, tokens(0, mesh["dp"].get_local_rank(), 2))
        with Traffic() as backward:
            loss.backward()
        found[name] = {"forward": forward.counts, "backward": backward.counts}

    hsdp = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    module = shard(model(), hsdp)
    ours, _, _ = train(module, rank, 4, max_norm=0.5)
    found["hsdp"] = {
        "difference": difference(module, expected),
        "norms": max(abs(a - b) for a, b in zip(ours, norms, strict=True)),
    }
    return found


def dropout(rank: int, folder: Path) -> dict:
    """A column-wise linear whose ranks drop the same elements of the input that they share."""
    mesh, found = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), {}
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    for how in ("eager", "compiled"):
        torch.manual_seed(0)
        module = lora_fx.install(nn.ModuleDict({"up": nn.Linear(16, 8)}), LoRAConfig(rank=2, dropout=0.5))
        shake(module)
        parallel = copy.deepcopy(module)
        parallelize_module(parallel, mesh, {"up": ColwiseParallel(use_local_output=False)})
        outputs = []
        for form in (module, parallel):
            function = form["up"].forward if form is module else form["up"].__call__
            if how == "compiled":
                function = torch.compile(function, backend="lora_fx")
            function(x)  # compiles
            manual_seed(7, mesh)
            outputs.append(function(x))
        alone, together = outputs[0], outputs[1].full_tensor()
        manual_seed(8, mesh)
        found[how] = {
            "difference": (alone - together).abs().max().item(),
            "other mask": (function(x).full_tensor() - together).abs().max().item(),
        }
    return found


# ---- what they must have seen ----------------------------------------------------------------------------------------


def test_fully_shard_anywhere(tmp_path):
    for found in run_ranks(fsdp, 2, tmp_path):
        for where, seen in found.items():
            assert seen["difference"] < 1e-6 and seen["norms"] < 1e-5, where
            assert seen["frozen have no gradient"]
            # To the element: nothing frozen is reduced.
            assert seen["trained"] == seen["reduced"], where


def test_float32_adapters_on_a_bfloat16_base(tmp_path):
    for found in run_ranks(mixed, 2, tmp_path):
        for name, seen in found.items():
            assert seen["dtypes"] == ["torch.float32"], name
            assert seen["difference"] < 0.05, name


def test_tensor_parallelism_and_hsdp(tmp_path):
    for found in run_ranks(tensor_parallel, 4, tmp_path, timeout=280):
        for name in ("before eager", "before deferred", "after eager", "after deferred", "hook", "hsdp"):
            assert found[name]["difference"] < (5e-5 if name == "hook" else 1e-6), (
                name
            )  # steps are long without clipping
            assert found[name].get("norms", 0) < 1e-5, name

        # The table of README.md.
        frozen, adapted, eager = found["frozen"], found["adapted"], found["as they come"]
        assert adapted["forward"] == frozen["forward"]
        assert adapted["backward"]["all_reduce"] == frozen["backward"]["all_reduce"]
        # One reduce-scatter for each group that has something to train: the blocks, and the rest of the model.
        assert adapted["backward"]["reduce_scatter_base"] == SIZE.n_layers + 1
        # Deferred: one all-reduce a step. As they come: one for each replicated factor of each layer.
        assert found["hook"]["step"] == {"allreduce": 1}
        assert eager["backward"]["all_reduce"] - adapted["backward"]["all_reduce"] == SIZE.n_layers * len(plan())
        assert eager["forward"] == adapted["forward"]
        counts = [each[half][name] for each in (frozen, adapted, eager) for half, name in TABLE]
        assert counts == [3, 2, 4, 10, 1, 3, 2, 4, 10, 3, 3, 2, 4, 24, 3]
        assert found["before deferred"]["step"] == {}  # done by then


def test_ranks_that_share_an_input_drop_it_alike(tmp_path):
    for found in run_ranks(dropout, 2, tmp_path):
        for how, seen in found.items():
            assert seen["difference"] < 1e-6, how
            assert seen["other mask"] > 0.1, how


def test_seeds():
    with fake_world(8):
        mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
        seeds = {}
        for coordinate in itertools.product(range(2), repeat=3):
            with mock.patch.object(type(mesh), "get_coordinate", lambda self, c=coordinate: list(c)):
                seeds[coordinate] = manual_seed(100, mesh)
        assert torch.initial_seed() == seeds[1, 1, 1]
    assert all(seeds[a, b, 0] == seeds[a, b, 1] for a in range(2) for b in range(2))
    assert sorted({*seeds.values()}) == [100, 101, 102, 103]
