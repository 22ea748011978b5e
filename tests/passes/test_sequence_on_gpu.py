"""Sequence parallelism on a GPU: programs over this rank's rows, what autograd keeps, and values of two ranks."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.distributed import reduce_gradients
from lora_fx.passes import fuse_tiles, pipeline
from lora_fx.passes.kernels.tile_program import split
from tests.distributed.processes import run_ranks
from tests.distributed.simulated import fake_world, whole
from tests.distributed.test_graphs import collectives, share_tokens
from tests.passes import on_gpu
from tests.passes.harness import adapt
from tests.passes.modules import Mlp
from tests.passes.test_sequence_parallel import saved

pytestmark = [pytest.mark.distributed]


@pytest.fixture(autouse=True)
def fresh() -> None:
    """What Dynamo has seen of the same code in other tests, with other sizes, would make sizes symbols here."""
    torch._dynamo.reset()


class Streams(nn.Module):
    """Two gated MLPs behind norms, each of which adds to a residual stream."""

    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        blocks = ({"norm": nn.RMSNorm(width), "mlp": Mlp(width, hidden)} for _ in range(2))
        self.layers = nn.ModuleList(nn.ModuleDict(block) for block in blocks)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["mlp"](layer["norm"](x))
        return x


def streams(adapted: bool, *sizes: int, rank: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = adapt(Streams(*sizes), rank=rank) if adapted else Streams(*sizes)
    share_tokens(model, {f"layers.{i}.mlp": f"layers.{i}.norm" for i in range(2)})
    return (lora_fx.freeze(model) if adapted else model.requires_grad_(False)).bfloat16()


def rows_of_sums(graph: torch.fx.Graph, *kinds: str) -> Counter[int]:
    """How many programs sum in these ways alone ("down" for h and g, "across" for dA and dB), by the rows they have."""
    found: Counter[int] = Counter()
    for call in on_gpu.calls(graph):
        operands: Any = call.kwargs["inputs"]
        for program, inputs in split(str(call.kwargs["program"]), operands):
            if {statement[0] for statement in program.body} & {"down", "across"} == {*kinds}:
                found[program.row_count([node.meta["val"] for node in inputs])] += 1
    return found


def test_programs_and_what_autograd_keeps(monkeypatch):
    """Of this rank's 128 rows is all that the frozen model gathers or scatters; and no norm's output is kept, which h
    and dA are computed from."""
    monkeypatch.setattr(fuse_tiles.cut, "__defaults__", (on_gpu.one_tile,))
    x = torch.randn(4, 32, 64, dtype=torch.bfloat16, requires_grad=True)
    results = []
    with fake_world(2):
        for adapted in (False, True):
            torch._dynamo.reset()
            results.append(on_gpu.capture(streams(adapted), x, step=pipeline.LoweringStage(strict=True)))
    frozen, ours = results
    for half in ("forward", "backward"):
        (before,), (after,) = getattr(frozen, half), getattr(ours, half)
        assert collectives(after.graph) == collectives(before.graph)
    forward, backward = ours.forward[0].graph, ours.backward[0].graph
    # Of each MLP: h of gate and up; h of down, whose input has a rank's part of the features of all 256 rows.
    assert rows_of_sums(forward, "down") == {128: 2, 256: 2}
    # g and dB of down; of gate and of up, whose outputs have a rank's part of the features.
    assert rows_of_sums(backward, "down", "across") == {128: 2, 256: 4}
    large = [
        {n: count for n, count in Counter(torch.Size(size).numel() for size in saved(result)).items() if n >= 128 * 64}
        for result in results
    ]
    assert large[0] == large[1] != {}


def two_ranks(rank: int, folder: Path) -> list[list[float]]:
    """Errors against float64, one process: of the programs as ATen, compiled among Inductor's kernels; of eager."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(4, 64, 64, generator=generator).bfloat16() for _ in range(2))
    model = streams(True)
    exact = adapt(Streams(), rank=4).double()
    exact.load_state_dict({name: whole(value).double() for name, value in model.state_dict().items()})
    exact_x = x.double().requires_grad_()
    expected = exact(exact_x)
    expected.backward(dy.double())
    assert exact_x.grad is not None
    found = []
    for compiled in (True, False):
        ours = copy.deepcopy(model)
        own_x, own_dy = (t.chunk(2, dim=1)[rank].contiguous() for t in (x, dy))
        own_x.requires_grad_()
        function: Any = ours
        with mock.patch.object(fuse_tiles.cut, "__defaults__", (on_gpu.one_tile,)):
            if compiled:
                function = torch.compile(ours, options=on_gpu.options(pipeline.LoweringStage(strict=True)))
            y = function(own_x)
            y.backward(own_dy)
        reduce_gradients(ours)
        assert own_x.grad is not None
        pairs = [(y.detach(), expected.detach().chunk(2, dim=1)[rank])]
        pairs.append((own_x.grad, exact_x.grad.chunk(2, dim=1)[rank]))
        theirs = dict(lora_fx.named_adapter_parameters(exact))
        for name, parameter in lora_fx.named_adapter_parameters(ours):
            gradient = theirs[name].grad
            assert parameter.grad is not None and gradient is not None
            pairs.append((whole(parameter.grad), gradient))
        found.append([float((a.double() - b).norm() / b.norm()) for a, b in pairs])
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_values_on_two_ranks(tmp_path):
    for ours, eager in run_ranks(two_ranks, 2, tmp_path, timeout=500):
        assert len(ours) == len(eager) == 2 + 2 * 3 * 2
        # A mean of squares: of so few tokens one tensor's roundings are luck.
        means = [sum(e * e for e in errors) ** 0.5 for errors in (ours, eager)]
        assert means[0] <= 1.1 * means[1] and max(ours) < 0.02, (ours, eager)
