"""Sequence parallelism: linears that share a gather or a scatter, or have parts; values of two ranks in many a form."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor, reduce_scatter_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import lora_fx
from lora_fx.distributed import reduce_gradients
from lora_fx.passes import gather_low_rank, scatter_low_rank, stack_siblings
from lora_fx.passes.low_rank import low_rank
from tests.distributed.processes import run_ranks
from tests.distributed.simulated import fake_world, whole
from tests.distributed.test_graphs import collectives, parallel
from tests.passes.harness import adapt, capture, graphs, recorded

pytestmark = [pytest.mark.distributed]

c10d = torch.ops._c10d_functional


@pytest.fixture(autouse=True)
def fresh() -> None:
    """What Dynamo has seen of the same code in other tests, with other sizes, would make sizes symbols here."""
    torch._dynamo.reset()


class Pair(nn.Module):
    """A linear that the plan below shards, and one that it does not name, of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.plain = nn.Linear(16, 32, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x), self.plain(x)


def mixed() -> nn.Module:
    """Siblings, of which one has an A that is noted as the same on all ranks."""
    torch.manual_seed(0)
    model: nn.Module = adapt(nn.Sequential(Pair()), rank=2)
    plan = {
        "0": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True),
        "0.gate": ColwiseParallel(),
    }
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    return lora_fx.freeze(model)


def test_a_sibling_whose_a_may_be_another_on_each_rank():
    """They are one product: it is left alone."""
    with fake_world(2), torch.no_grad():
        result = capture(mixed(), torch.randn(2, 4, 16))
    assert result.count("forward")["stack(2)"] == 2 and "gather h" not in result.count("forward")


def test_one_gather_in_two_orders():
    """Each product has its rows in the order of what it reads."""
    with fake_world(2), torch.no_grad():
        mesh = init_device_mesh("cpu", (2,))
        group = mesh.get_group().group_name
        torch.manual_seed(0)
        model: Any = adapt(nn.ModuleDict({name: nn.Linear(16, 12, bias=False) for name in "ab"}), rank=2)
        parallelize_module(model, mesh, {"a": ColwiseParallel(), "b": ColwiseParallel()})

        def function(x: Tensor) -> tuple[Tensor, Tensor]:
            rows = c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, group))
            return model["a"](rows), model["b"](torch.cat(torch.chunk(rows, 2, 0), 1))

        result = capture(function, torch.randn(2, 4, 16))
    assert result.count("forward")["gather h"] == 2
    graph = result.forward[0].graph
    assert collectives(graph).total() == 1
    joined = graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert sorted(node.meta["val"].shape[-1] for node in joined) == [2, 16]  # of b's h and of its x


def test_an_input_that_is_gathered_along_its_features():
    with fake_world(2):
        torch.manual_seed(0)
        model: nn.Module = adapt(nn.ModuleDict({"up": nn.Linear(16, 12, bias=False)}), rank=2)
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"up": ColwiseParallel(input_layouts=Shard(-1))})
        lora_fx.freeze(model)
        for size in ((2, 10, 8), (1, 1, 8)):
            result = capture(lambda x: model["up"](x), torch.randn(size, requires_grad=True), backward=True)
            assert result.reasons == [] and "gather h" not in result.count("forward")


class Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return all_gather_tensor(x, 0, group)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_tensor(dx, "sum", 0, ctx.group), None


def test_terms_that_meet_before_the_bases():
    """Two branches of one linear, whose terms in dX are summed first: both are taken out of the sum."""
    torch.manual_seed(0)
    w, s = torch.randn(12, 16), torch.tensor(0.5)
    a, b, c, d = (nn.Parameter(torch.randn(size)) for size in ((2, 16), (12, 2)) * 2)
    with fake_world(2):
        group = init_device_mesh("cpu", (2,)).get_group()

        def function(x: Tensor) -> Tensor:
            x = Shared.apply(x, group)
            return F.linear(x, w) + low_rank(x, a, b, s) + low_rank(x, c, d, s)

        noted = [
            mock.patch.object(module, "replicated_over", lambda node, factor: ((0, 1),))
            for module in (scatter_low_rank, gather_low_rank)
        ]
        alone = mock.patch.object(stack_siblings, "_is_written_out", lambda group: True)
        with noted[0], noted[1], alone:
            result = capture(function, torch.randn(6, 16, requires_grad=True), backward=True)
    assert result.count("backward")["scatter g"] == 2
    assert collectives(result.backward[0].graph).total() == 1


class Scattered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return reduce_scatter_tensor(y, "sum", 0, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_gather_tensor(dy, 0, ctx.group), None


@pytest.mark.parametrize("size", [(4, 16), (2, 5, 16)], ids=str)
def test_collectives_by_hand(size):
    """What an autograd function makes in its backward belongs to no half of the graph; all of ours belongs to one."""
    torch.manual_seed(0)
    model: Any = adapt(
        nn.ModuleDict({"up": nn.Linear(16, 12, bias=False), "down": nn.Linear(12, 16, bias=False)}), rank=2
    )
    with fake_world(2):
        group = init_device_mesh("cpu", (2,)).get_group()

        def function(x: Tensor) -> Tensor:
            return Scattered.apply(model["down"](torch.tanh(model["up"](Shared.apply(x, group)))), group)

        noted = [
            mock.patch.object(module, "replicated_over", lambda node, factor: ((0, 1),))
            for module in (scatter_low_rank, gather_low_rank)
        ]
        with noted[0], noted[1]:
            result = capture(function, torch.randn(size, requires_grad=True), backward=True)
    assert {"gather h", "scatter h"} <= {*result.count("forward")}
    assert {"gather g", "scatter g"} <= {*result.count("backward")}
    assert all(collectives(half[0].graph).total() == 2 for half in (result.forward, result.backward))


# ---- values ----------------------------------------------------------------------------------------------------------


class Biased(nn.Module):
    """With biases, and a residual after the scatter; the linears run `times` times."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.up, self.down, self.times = nn.Linear(16, 32), nn.Linear(32, 16), times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = x + self.down(torch.tanh(self.up(x)))
        return x


def biased(dim: int, times: int = 1) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = adapt(Biased(times), rank=2)
    plan = {"up": ColwiseParallel(input_layouts=Shard(dim)), "down": RowwiseParallel(output_layouts=Shard(dim))}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    return lora_fx.freeze(model)


def own_a(rank: int) -> nn.Module:
    model: Any = mixed()
    with torch.no_grad():
        model[0].plain.lora_a.mul_(1 + rank)
    return model


def again(model: nn.Module) -> Callable[[Tensor], Any]:
    return lambda x: checkpoint(model, x, use_reentrant=False)


FORMS: dict[str, tuple[Callable[[int], nn.Module], Callable[[nn.Module], Any], tuple[int, ...]]] = {
    "checkpoint": (lambda rank: parallel(True, True), again, (2, 4, 16)),
    "tokens in a row, biases": (lambda rank: biased(0), lambda model: model, (8, 16)),
    "along a dimension, biases": (lambda rank: biased(1), lambda model: model, (3, 4, 16)),
    "one sequence": (lambda rank: biased(1), lambda model: model, (1, 6, 16)),
    "used twice": (lambda rank: biased(1, times=2), lambda model: model, (2, 4, 16)),
    "a sibling of its own": (own_a, lambda model: model, (2, 4, 16)),
}


def two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """Of each form, the largest error against eager, and its rewrites."""
    found: dict[str, Any] = {}
    for name, (build, wrap, size) in FORMS.items():
        values = []
        for rewritten in (False, True):
            torch._dynamo.reset()
            model = build(rank)
            generator = torch.Generator().manual_seed(10 + rank)
            x = torch.randn(size, generator=generator).requires_grad_()
            with recorded() as captured:
                function = wrap(model)
                if rewritten:
                    backend = graphs(captured, rewrite=True)
                    function = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
                y = function(x)
                outputs = [y] if isinstance(y, Tensor) else list(y)
                upstream = [torch.randn(o.shape, generator=generator) for o in outputs]
                torch.autograd.backward(outputs, upstream)
            reduce_gradients(model)
            gradients = [whole(p.grad) for p in lora_fx.adapter_parameters(model) if p.grad is not None]
            assert x.grad is not None
            values.append([*(o.detach() for o in outputs), x.grad, *gradients])
        errors = [float((b - a).norm() / a.norm()) for a, b in zip(*values, strict=True)]
        found[name] = max(errors), {**captured.count("forward"), **captured.count("backward")}
    return found


@pytest.mark.slow
def test_values_on_two_ranks(tmp_path):
    for found in run_ranks(two_ranks, 2, tmp_path, timeout=200):
        assert found.keys() == FORMS.keys()
        for name, (error, rewrites) in found.items():
            assert error < 1e-6, (name, error)
            expected = {"gather h", "scatter h", "scatter g", "gather g"}
            assert (expected <= rewrites.keys()) == (name != "a sibling of its own"), (name, rewrites)
