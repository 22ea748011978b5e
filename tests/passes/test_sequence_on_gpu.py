"""Sequence parallelism on a GPU: programs over this rank's rows, and what autograd keeps."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import lora_fx
from lora_fx.passes import fuse_tiles, pipeline
from tests.distributed.simulated import fake_world
from tests.distributed.test_graphs import collectives, parallel
from tests.passes import on_gpu
from tests.passes.harness import adapt, capture
from tests.passes.modules import Mlp
from tests.passes.test_sequence_parallel import saved

pytestmark = [pytest.mark.distributed]


@pytest.fixture(autouse=True)
def fresh() -> None:
    """What Dynamo has seen of the same code in other tests, with other sizes, would make sizes symbols here."""
    torch._dynamo.reset()


def test_on_a_gpu(monkeypatch):
    """Programs over this rank's rows, and products of A and B with the rest of it behind the collective."""
    monkeypatch.setattr(fuse_tiles.cut, "__defaults__", (on_gpu.one_tile,))
    x = torch.randn(2, 40, 16, dtype=torch.bfloat16, requires_grad=True)
    with fake_world(2):
        frozen = capture(parallel(False, True).bfloat16(), x, rewrite=False, backward=True)
        ours = on_gpu.capture(parallel(True, True).bfloat16(), x, step=pipeline.LoweringStage(strict=True))
    for half in ("forward", "backward"):
        (before,), (after,) = getattr(frozen, half), getattr(ours, half)
        assert on_gpu.calls(after.graph) and collectives(after.graph) == collectives(before.graph)


class Streams(nn.Module):
    """Two gated MLPs behind norms, each of which adds to a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.RMSNorm(64), "mlp": Mlp(64, 128)}) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["mlp"](layer["norm"](x))
        return x


def test_on_a_gpu_autograd_keeps_what_it_keeps_of_the_frozen_model(monkeypatch):
    """And what is as small as h: no norm's output, which h and dA are computed from."""
    monkeypatch.setattr(fuse_tiles.cut, "__defaults__", (on_gpu.one_tile,))
    x = torch.randn(4, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with fake_world(2):
        for adapted in (False, True):
            torch.manual_seed(0)
            torch._dynamo.reset()
            model: Any = adapt(Streams(), rank=4) if adapted else Streams()
            plan: dict[str, Any] = {}
            for name in ("layers.0", "layers.1"):
                plan[f"{name}.norm"] = SequenceParallel()
                plan[f"{name}.mlp"] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
                plan |= {f"{name}.mlp.gate": ColwiseParallel(), f"{name}.mlp.up": ColwiseParallel()}
                plan[f"{name}.mlp.down"] = RowwiseParallel(output_layouts=Shard(1))
            parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
            model = lora_fx.freeze(model) if adapted else model.requires_grad_(False)
            result = on_gpu.capture(model.bfloat16(), x, step=pipeline.LoweringStage(strict=True))
            kept.append(Counter(torch.Size(size).numel() for size in saved(result)))
            assert not adapted or all(
                "gather h" in s.forward for s in result.rewrite.report.sites if "down" not in s.path
            )
    frozen, ours = ({size: count for size, count in found.items() if size >= 128 * 64} for found in kept)
    assert ours == frozen != {}
