"""Sequence parallelism: branches of this rank's tokens, with no collective more, and what must be left alone."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import all_gather_tensor, reduce_scatter_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import lora_fx
from lora_fx.distributed import reduce_gradients
from lora_fx.passes import gather_low_rank, pipeline, scatter_low_rank, stack_siblings
from lora_fx.passes._torch import group_ranks
from lora_fx.passes.printer import target_name
from tests.distributed.processes import run_ranks
from tests.distributed.simulated import fake_world, whole
from tests.distributed.test_graphs import Gated, captured, collectives, parallel
from tests.passes.harness import adapt, capture
from tests.passes.test_async_tensor_parallel import Alone, alone

pytestmark = [pytest.mark.distributed]


class Narrow(nn.Module):
    """As `Alone`, with sizes that no two of its values share."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24, bias=False)
        self.down = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture(autouse=True)
def fresh() -> None:
    """What Dynamo has seen of the same code in other tests, with other sizes, would make sizes symbols here."""
    torch._dynamo.reset()


def saved(result: Any) -> list[tuple[int, ...]]:
    """The shapes of what forward leaves for backward."""
    (module,) = result.backward
    placeholders = module.graph.find_nodes(op="placeholder")
    return [tuple(node.meta["val"].shape) for node in placeholders if "tangent" not in node.name]


def is_low_rank(node: Any) -> bool:
    """Whether a node is one of LoRA's products."""
    ours = ("scaled_mm", "gradient_pair", "accumulate", "auto_functionalized")
    name = target_name(node.target) if node.op == "call_function" else ""
    return (
        name.startswith(tuple(f"lora_fx.{each}" for each in ours))
        or name == ours[-1]
        or (name == "mm" and 3 in (*node.meta["val"].shape, *node.args[0].meta["val"].shape))
    )


def rows_of(node: Any) -> int:
    """How many tokens it is computed from, or for."""
    operand = node.kwargs["base"] if "base" in node.kwargs else node.args[0]
    sizes = operand.meta["val"].shape
    return int(sizes[1] if sizes[0] == 3 else sizes[0])  # dA is g^T x


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [(2, 10, 16), (1, 10, 16), (10, 16)], ids=str)
def test_where_ranks_share_tokens(dim, size):
    """One linear, on each dimension that tokens have; the frozen model's collectives, and nothing gathered is kept."""
    if dim == len(size) - 1 or (dim, size[0]) == (0, 1):
        pytest.skip("no dimension of tokens, or one that two ranks cannot share")
    plan = {
        "up": ColwiseParallel(input_layouts=Shard(dim)),
        "down": RowwiseParallel(output_layouts=Shard(dim)),
    }
    with fake_world(2):
        mesh = init_device_mesh("cpu", (2,))
        results = []
        for adapted in (False, True):
            torch.manual_seed(0)
            model: nn.Module = adapt(Narrow(), rank=3) if adapted else Narrow()
            parallelize_module(model, mesh, plan)
            _ = lora_fx.freeze(model) if adapted else model.requires_grad_(False)
            x = torch.randn(*(n // 2 if d == dim else n for d, n in enumerate(size)), requires_grad=True)
            results.append(capture(model, x, rewrite=adapted, backward=True))
    frozen, ours = results
    forward, backward = ours.count("forward"), ours.count("backward")
    assert ours.reasons == [] and forward["gather h"] == forward["scatter h"] == 1
    assert backward["scatter g"] == backward["gather g"] == 1
    rows = torch.Size(size[:-1]).numel()
    for half in ("forward", "backward"):
        (before,), (after,) = getattr(frozen, half), getattr(ours, half)
        assert collectives(after.graph) == collectives(before.graph)
        # Of all rows are the base's products, and what has a rank's part of the features: up's y, g and dB, down's h,
        # dA and the term in dX. The rest has half of them.
        low_rank = Counter(rows_of(node) for node in after.graph.nodes if is_low_rank(node))
        assert low_rank == ({rows: 2, rows // 2: 2} if half == "forward" else {rows: 3, rows // 2: 3})
    gathered = {size, (rows, 16)}
    assert not gathered & {*saved(ours)}


def test_a_second_mesh_like_the_first():
    """DTensor takes the groups of one for those of the other: equal ranks, but other names."""
    plan = {"up": ColwiseParallel(input_layouts=Shard(0)), "down": RowwiseParallel(output_layouts=Shard(0))}
    with fake_world(4):
        for _ in range(2):
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
            model = adapt(Narrow(), rank=3)
            parallelize_module(model, mesh, plan)
            result = capture(lora_fx.freeze(model), torch.randn(10, 16, requires_grad=True), backward=True)
            assert result.count("backward")["scatter g"] == 1


def test_siblings_share_one_collective():
    with fake_world(2):
        frozen, ours = captured(False, True), captured(True, True)
        passes = tuple(p for p in pipeline.PASSES if p.name not in ("scatter_h", "scatter_g", "gather_h", "gather_g"))
        x = torch.randn(2, 4, 16, requires_grad=True)
        without = capture(parallel(True, True), x, passes=passes, backward=True)
    assert ours.count("backward")["scatter g"] == 2  # gate and up; down's input is this rank's own
    for result in (ours, without):
        (before,), (after,) = frozen.backward, result.backward
        assert collectives(after.graph) == collectives(before.graph)
    # The norm's output of both ranks, [2, 8, 16], as a matrix; tanh(gate) and up have that shape, too.
    assert saved(without).count((16, 16)) - saved(ours).count((16, 16)) == 1


@pytest.mark.parametrize("which", ["used twice", "one factor frozen", "not stacked"])
def test_several_products_with_one_input_share_one_collective(which):
    """Siblings that are no stack: each has a product of its own, and their g's go together."""
    x = torch.randn(2, 4, 16, requires_grad=True)
    with fake_world(2):
        frozen, model = captured(False, True), parallel(True, True)
        mlp: Any = model.mlp
        if which == "used twice":
            mlp.up = mlp.gate
        elif which == "one factor frozen":
            mlp.gate.lora_a.requires_grad_(False)
        unstacked = mock.patch.object(stack_siblings, "has_few_rows", lambda node: which == "not stacked")
        with unstacked:
            result = capture(model, x, backward=True)
    assert not [reason for reason in result.reasons if "scatter" in reason]
    assert result.count("backward")["scatter g"] == (1 if which == "one factor frozen" else 2)
    (before,), (after,) = frozen.backward, result.backward
    assert collectives(after.graph) == collectives(before.graph)


def test_without_gradients():
    with fake_world(2), torch.no_grad():
        frozen, ours = (
            capture(parallel(adapted, True), torch.randn(2, 4, 16), rewrite=adapted) for adapted in (False, True)
        )
    assert ours.count("forward") == {"scale": 3, "stack(2)": 2, "gather h": 2, "scatter h": 1, "accumulate": 1}
    (before,), (after,) = frozen.forward, ours.forward
    assert collectives(after.graph) == collectives(before.graph)


def test_a_slice_of_everything():
    """DTensor (torch 2.13) cuts more than 256 tokens to the number that they have."""
    with fake_world(2):
        x = torch.randn(2, 300, 16, requires_grad=True)
        result = capture(parallel(True, sequence=True), x, backward=True)
    forward, backward = result.count("forward"), result.count("backward")
    assert forward["gather h"] == backward["scatter g"] == 2
    assert forward["scatter h"] == backward["gather g"] == 1


def test_a_frozen_b_has_no_pair():
    """Its h is scattered all the same; g is computed from the whole gradient."""
    with fake_world(2):
        model: Any = parallel(True, True)
        model.mlp.down.lora_b.requires_grad_(False)
        result = capture(model, torch.randn(2, 4, 16, requires_grad=True), backward=True)
    assert result.count("forward")["scatter h"] == 1 and "gather g" not in result.count("backward")


def test_dropout_before_a_row_wise_linear():
    """What is dropped is this rank's features: h is a term as before."""
    with fake_world(2):
        torch.manual_seed(0)
        model = adapt(Alone(), rank=2, dropout=0.5)
        plan = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
        result = capture(lora_fx.freeze(model), torch.randn(2, 4, 16, requires_grad=True), backward=True)
    assert result.count("forward")["scatter h"] == result.count("backward")["gather g"] == 1
    assert "gather h" not in result.count("forward")  # each rank draws a mask of all rows


def test_a_b_that_ranks_may_have_each_their_own():
    """Not noted as the same: nothing is multiplied after the sum over the ranks."""
    with fake_world(2):
        noted = mock.patch.object(
            scatter_low_rank, "replicated_over", lambda node, factor: ((0, 1),) if factor == "lora_a" else ()
        )
        with noted:
            result = captured(True, sequence=True)
    assert "scatter h" not in result.count("forward") and "gather g" not in result.count("backward")
    assert result.count("backward")["scatter g"] == 2


def test_an_a_that_ranks_may_have_each_their_own():
    with fake_world(2), mock.patch.object(gather_low_rank, "replicated_over", lambda node, factor: ((0,),)):
        result = captured(True, sequence=True)
    assert "gather h" not in result.count("forward") and result.count("forward")["scatter h"] == 1


@pytest.mark.parametrize("why", ["placements unknown", "average", "whole inputs", "dropout"])
def test_what_is_left_alone(why):
    x = torch.randn(2, 4, 16, requires_grad=True)
    with fake_world(2):
        if why == "whole inputs":
            result = captured(True, sequence=False)
        elif why == "dropout":
            torch.manual_seed(0)
            model = adapt(Alone(), rank=2, dropout=0.5)
            plan = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": RowwiseParallel(output_layouts=Shard(1))}
            parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
            result = capture(lora_fx.freeze(model), x, backward=True)
        else:
            result = by_hand(x, average=why == "average")
    assert result.sites >= 1 and "scatter g" not in result.count("backward")
    assert "gather h" not in result.count("forward")


def by_hand(x: torch.Tensor, average: bool, scatters: Any = None) -> Any:
    """Gathered and scattered by functions, without DTensor: A could be another one on each rank."""
    torch.manual_seed(0)
    linear: Any = adapt(nn.ModuleDict({"up": nn.Linear(16, 12, bias=False)}), rank=2)
    group = init_device_mesh("cpu", (2,)).get_group()

    class Gathered(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return all_gather_tensor(x, 0, group)

        @staticmethod
        def backward(ctx: Any, dx: torch.Tensor) -> torch.Tensor:
            return reduce_scatter_tensor(dx, "avg" if average else "sum", 0, scatters or group)

    noted = mock.patch.object(scatter_low_rank, "replicated_over", lambda node, factor: ((0, 1),))
    if not average:
        return capture(lambda x: linear["up"](Gathered.apply(x)), x, backward=True)
    with noted:
        return capture(lambda x: linear["up"](Gathered.apply(x)), x, backward=True)


def test_by_hand_is_what_it_looks_like():
    """The one above is left alone for the reason that it names: with the placements noted it is rewritten."""
    x = torch.randn(2, 4, 16, requires_grad=True)
    with fake_world(2), mock.patch.object(scatter_low_rank, "replicated_over", lambda node, factor: ((0,), (0, 1))):
        result = by_hand(x, average=False)
    assert result.count("backward")["scatter g"] == 1


def test_two_groups_of_the_same_ranks():
    """They are as one."""
    x = torch.randn(2, 4, 16, requires_grad=True)
    with fake_world(2):
        names = dict(zip(("gather", "scatter"), (torch.distributed.group.WORLD, torch.distributed.new_group([0, 1]))))
        noted = mock.patch.object(scatter_low_rank, "replicated_over", lambda node, factor: ((0, 1),))
        with noted:
            result = by_hand(x, average=False, scatters=names["scatter"])
    assert names["gather"].group_name != names["scatter"].group_name
    assert result.count("backward")["scatter g"] == 1


def test_a_group_that_nobody_knows():
    with fake_world(2):
        assert group_ranks("0") == (0, 1) and group_ranks("no such group") is None


def test_groups_follow_the_placements():
    with fake_world(4):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        model: Any = adapt(nn.ModuleDict({"up": nn.Linear(16, 12), "down": nn.Linear(16, 12)}), rank=2)
        assert model["up"]._lora_replicated == () and "_lora_replicated" not in model["up"].__dict__
        parallelize_module(model, mesh["b"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        a_alone, b_alone = (((0, 1),), ()), ((), ((0, 1),))
        assert model["up"]._lora_replicated == a_alone and model["down"]._lora_replicated == b_alone
        weight = distribute_tensor(torch.randn(12, 16), mesh, [Replicate(), Shard(0)])
        model["up"].register_parameter("lora_a", nn.Parameter(distribute_tensor(torch.randn(2, 16), mesh)))
        assert model["up"]._lora_replicated == (((0, 2), (0, 1)), ())
        del weight
        lora_fx.remove(model)
        assert not hasattr(model["up"], "_lora_replicated")


def two_ranks(rank: int, folder: Path) -> dict[str, list[float]]:
    """The largest error of any value against one process in float64: rewritten, and compiled as it stands."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, single, build in (
            ("siblings", adapt(Gated(), rank=2), lambda: parallel(True, sequence=True)),
            ("alone", adapt(Alone(), rank=2), lambda: alone(True)),
        ):
            x, dy = (torch.randn(2, 80, 16, generator=generator).to(dtype) for _ in range(2))
            single.load_state_dict({k: v.full_tensor() for k, v in build().to(dtype).state_dict().items()})
            exact, exact_x = single.double(), x.double().requires_grad_()
            expected = exact(exact_x)
            expected.backward(dy.double())
            assert exact_x.grad is not None
            for rewritten in (True, False):
                torch._dynamo.reset()
                model: Any = build().to(dtype)
                compiled = lora_fx.compile(model, strict=True) if rewritten else torch.compile(model)
                ours_x, ours_dy = (distribute_tensor(t, mesh, [Shard(1)]).to_local() for t in (x, dy))
                y = compiled(ours_x.requires_grad_())
                y.backward(ours_dy)
                reduce_gradients(model)
                assert ours_x.grad is not None
                pairs = [
                    (y.detach(), expected.detach().chunk(2, dim=1)[rank]),
                    (ours_x.grad, exact_x.grad.chunk(2, dim=1)[rank]),
                ]
                for p, q in zip(lora_fx.adapter_parameters(model), lora_fx.adapter_parameters(exact), strict=True):
                    assert p.grad is not None and q.grad is not None
                    pairs.append((whole(p.grad), q.grad))
                worst = max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)
                found.setdefault(f"{name} {dtype}", []).append(worst)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_values_on_two_ranks(tmp_path):
    for found in run_ranks(two_ranks, 2, tmp_path, timeout=500):
        assert len(found) == 4
        for name, (ours, plain) in found.items():
            # In bfloat16 g is rounded once more, when the ranks' terms are added.
            assert ours < (1e-6 if "float32" in name else 1.2 * plain), found
