"""Sequence parallelism within checkpoints: what a policy says of a collective, it says of what takes its place."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import lora_fx
from lora_fx.passes import pipeline
from tests.distributed.simulated import fake_world
from tests.distributed.test_graphs import Gated, Inner, collectives, share_tokens
from tests.passes.harness import Captured, adapt, capture
from tests.passes.test_async_tensor_parallel import Alone, alone, fused, pipelining

pytestmark = [pytest.mark.distributed]

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
BEFORE = tuple(p for p in pipeline.PASSES if p.name not in ("scatter_h", "gather_h", "gather_g"))


@pytest.fixture(autouse=True)
def fresh() -> None:
    """What Dynamo has seen of the same code in other tests, with other sizes, would make sizes symbols here."""
    torch._dynamo.reset()


class Streams(nn.Module):
    """Two gated MLPs that add to a stream: the second needs the output of the first again."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Gated(), Gated()

    def forward(self, x):
        x = x + self.one(x)
        return x + self.two(x)


def streams(adapted: bool) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = adapt(Streams(), rank=2) if adapted else Streams()
    share_tokens(model, {"one.mlp": "one.norm", "two.mlp": "two.norm"})
    return lora_fx.freeze(model) if adapted else model.requires_grad_(False)


class Partly(nn.Module):
    """A checkpoint of the linears alone: one of their collectives is outside."""

    def __init__(self, outside: str) -> None:
        super().__init__()
        self.norm, self.mlp, self.head, self.outside = nn.LayerNorm(16), Inner(), nn.LayerNorm(16), outside

    def forward(self, x):
        h = self.norm(x)
        if self.outside == "gather":
            y = checkpoint(self.mlp.__call__, h.redistribute(placements=[Replicate()]), use_reentrant=False)
        else:
            y = checkpoint(self.mlp.__call__, h, use_reentrant=False).redistribute(placements=[Shard(1)])
        return self.head(y)


def partly(outside: str, adapted: bool) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = adapt(Partly(outside), rank=2) if adapted else Partly(outside)
    local = outside == "gather"
    plan: dict[str, Any] = {
        "norm": SequenceParallel(use_local_output=False),
        "head": SequenceParallel(use_local_output=True),
        "mlp.gate": ColwiseParallel(use_local_output=False),
        "mlp.up": ColwiseParallel(use_local_output=False),
        "mlp.down": RowwiseParallel(output_layouts=Shard(1) if local else Partial(), use_local_output=False),
    }
    if not local:
        plan["mlp"] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    return lora_fx.freeze(model) if adapted else model.requires_grad_(False)


def saving(*operators: Any, every: int = 1) -> Callable[[], Callable[..., CheckpointPolicy]]:
    """A policy that saves what these operators give, of products each `every`-th."""

    def policy() -> Callable[..., CheckpointPolicy]:
        seen = 0

        def decide(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            nonlocal seen
            seen += operator is aten.mm.default and not context.is_recompute
            saved = operator in operators and not (operator is aten.mm.default and seen % every)
            return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

        return decide

    return policy


POLICIES = {
    "nothing": None,
    "reduce-scatters": saving(c10d.reduce_scatter_tensor.default),
    "all-gathers": saving(c10d.all_gather_into_tensor.default),
    "every second product and reduce-scatters": saving(aten.mm.default, c10d.reduce_scatter_tensor.default, every=2),
}


def checkpointed(model: nn.Module, policy: Any) -> Callable[..., Any]:
    if policy is None:
        return lambda x: checkpoint(model, x, use_reentrant=False)
    context_fn = functools.partial(create_selective_checkpoint_contexts, policy())
    return lambda x: checkpoint(model, x, use_reentrant=False, context_fn=context_fn)


def kept(result: Captured) -> int:
    """How many numbers that forward computes are left for backward."""
    inputs = result.backward[0].graph.find_nodes(op="placeholder")
    made = [node.meta["val"] for node in inputs if not str(node.target).startswith(("primals", "tangents"))]
    return sum(value.numel() for value in made if isinstance(value, torch.Tensor))


def check(build: Callable[[bool], Any], h: int) -> None:
    """As many collectives as the frozen model in either half, and not more saved than without what we do, but h."""
    results = []
    x = torch.randn(2, 4, 16, requires_grad=True)
    with fake_world(2):
        for adapted, passes in ((False, ()), (True, BEFORE), (True, pipeline.PASSES)):
            torch._dynamo.reset()
            results.append(capture(build(adapted), x, rewrite=adapted, passes=passes, backward=True))
    frozen, before, ours = results
    assert ours.reasons == []
    assert {"gather h", "scatter h"} <= {*ours.count("forward")} and "gather g" in ours.count("backward")
    for half in ("forward", "backward"):
        (theirs,), (after,) = getattr(frozen, half), getattr(ours, half)
        assert collectives(after.graph) == collectives(theirs.graph)
    assert kept(ours) <= kept(before) + h


@pytest.mark.slow
@pytest.mark.parametrize("saved", POLICIES)
def test_what_a_policy_saves(saved):
    # h of this rank's rows of two outputs; of all rows, of four products with inputs.
    check(lambda adapted: checkpointed(streams(adapted), POLICIES[saved]), h=2 * 8 * 2 + 4 * 16 * 2)


@pytest.mark.parametrize("outside", ["gather", "scatter"])
def test_a_collective_outside(outside):
    check(lambda adapted: partly(outside, adapted), h=8 * 2 + 2 * 16 * 2)


@pytest.mark.parametrize("gathers", [True, False])
def test_where_the_gradient_is_not_gathered_with_g_the_whole_h_is_kept(gathers):
    """Here of tokens in a row, whose number is a symbol."""
    x = torch.randn(6, 256, requires_grad=True)
    torch._dynamo.mark_dynamic(x, 0)
    passes = tuple(p for p in pipeline.PASSES if gathers or p.name != "gather_g")
    with fake_world(2):
        torch.manual_seed(0)
        model: nn.Module = adapt(Alone(256), rank=2)
        plan = {"up": ColwiseParallel(input_layouts=Shard(0)), "down": RowwiseParallel(output_layouts=Shard(0))}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
        result = capture(checkpointed(lora_fx.freeze(model), None), x, passes=passes, backward=True, dynamic=None)
    (down,) = (site for site in result.rewrite.report.sites if site.path == "down")
    assert "scatter h" in down.forward and ("save h" in down.forward) == (not gathers)
    assert ("gather g" in down.backward) == gathers


def test_a_checkpointed_h_that_is_gathered_is_kept():
    x = torch.randn(2, 4, 256, requires_grad=True)
    with fake_world(2):
        result = capture(checkpointed(alone(True, width=256), None), x, backward=True)
    up, down = result.rewrite.report.sites
    assert up.forward == ("scale", "gather h", "save h") and "scatter h" in down.forward
    inputs = result.backward[0].graph.find_nodes(op="placeholder")
    made = [node for node in inputs if not str(node.target).startswith(("primals", "tangents"))]
    rows = [node.meta["val"].numel() // 2 for node in made if node.meta["val"].shape[-1:] == (2,)]
    assert sorted(rows) == [8, 16]  # down's of this rank's rows, up's of all


@pytest.mark.slow
@pytest.mark.parametrize("saved", POLICIES)
def test_with_pipelined_collectives(saved):
    """As much is kept as where h and g travel with others; Inductor pipelines what it does in the frozen model."""
    x = torch.randn(2, 4, 16, requires_grad=True)
    results = []
    for adapted, pipelined in ((False, True), (True, True), (True, False)):
        torch._dynamo.reset()
        with fake_world(2), pipelining() if pipelined else contextlib.nullcontext():
            function = checkpointed(streams(adapted), POLICIES[saved])
            passes = pipeline.PASSES if adapted else ()
            result = capture(function, x, rewrite=adapted, passes=passes, backward=True)
            results.append((result, [fused(result, half) for half in ("forward", "backward")] if pipelined else []))
    (_, theirs), (ours, mine), (together, _) = results
    assert ours.reasons == [] and mine == theirs
    assert kept(ours) == kept(together)
