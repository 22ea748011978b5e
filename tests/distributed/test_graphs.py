"""The graph of one tensor-parallel rank, on a fake process group: where the branch meets the collectives."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

from collections import Counter
from typing import Any

import expecttest
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
from lora_fx.distributed import DeferredReduction
from lora_fx.passes.printer import target_name
from tests.distributed.simulated import fake_world
from tests.passes.harness import Captured, adapt, capture

pytestmark = [pytest.mark.distributed]


class Gated(nn.Module):
    """A gated MLP behind a norm: two column-wise linears that read one input, and a row-wise one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = Inner()

    def forward(self, x):
        return self.mlp(self.norm(x))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 32, bias=False)
        self.up = nn.Linear(16, 32, bias=False)
        self.down = nn.Linear(32, 16, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.gate(x)) * self.up(x))


def parallel(adapted: bool, sequence: bool) -> nn.Module:
    """`Gated` on a mesh of two, frozen or with adapters."""
    torch.manual_seed(0)
    model: nn.Module = adapt(Gated(), rank=2) if adapted else Gated()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    plan = {"mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    if sequence:
        plan["norm"] = SequenceParallel()
        plan["mlp"] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
        plan["mlp.down"] = RowwiseParallel(output_layouts=Shard(1))
    parallelize_module(model, mesh, plan)
    return lora_fx.freeze(model) if adapted else model.requires_grad_(False)


def share_tokens(model: nn.Module, mlps: dict[str, str]) -> nn.Module:
    """Sequence parallelism on a mesh of two for gated MLPs, each behind a norm: the path of that, by the MLP's."""
    plan: dict[str, Any] = {}
    for mlp, norm in mlps.items():
        plan[norm] = SequenceParallel()
        plan[mlp] = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
        plan |= {f"{mlp}.gate": ColwiseParallel(), f"{mlp}.up": ColwiseParallel()}
        plan[f"{mlp}.down"] = RowwiseParallel(output_layouts=Shard(1))
    parallelize_module(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), plan)
    return model


def captured(adapted: bool, sequence: bool, rewrite: bool = True) -> Captured:
    x = torch.randn(2, 4, 16, requires_grad=True)
    return capture(parallel(adapted, sequence), x, rewrite=rewrite, backward=True)


def collectives(graph: torch.fx.Graph) -> Counter[str]:
    """How many there are of each, by name; several tensors that go together are one."""
    names = [target_name(node.target) for node in graph.nodes if node.op == "call_function"]
    return Counter(name.removesuffix("_coalesced") for name in names if "c10d" in name and "wait" not in name)


@pytest.fixture(autouse=True)
def two_ranks():
    with fake_world(2):
        yield


@pytest.mark.parametrize("sequence", [False, True])
def test_the_adapted_graph_has_the_collectives_of_the_frozen_one(sequence):
    frozen, ours = captured(False, sequence), captured(True, sequence)
    for half in ("forward", "backward"):
        (before,), (after,) = getattr(frozen, half), getattr(ours, half)
        assert collectives(after.graph) == collectives(before.graph)
        # In backward without sequence parallelism gate and up reduce the gradient of their input one by one.
        assert collectives(after.graph).total() == (1 if half == "forward" and not sequence else 2)


def test_deferred_gradients_are_not_reduced_in_the_graph():
    """Each rank's term of a replicated factor's gradient comes out as it is, labelled as if it were the sum."""
    x, counts = torch.randn(2, 4, 16, requires_grad=True), {}
    for name in ("frozen", "deferred", "as they come"):
        model = parallel(name != "frozen", True)
        if name == "deferred":
            DeferredReduction(model, torch.optim.SGD(lora_fx.adapter_parameters(model), lr=0.1))
        result = capture(model, x, rewrite=name != "frozen", backward=True)
        assert result.reasons == []
        (module,) = result.backward
        counts[name] = collectives(module.graph)
        if name != "frozen":
            gradients = [p.grad.placements for _, p in lora_fx.named_adapter_parameters(model)]
            whole = [p.placements for _, p in lora_fx.named_adapter_parameters(model)]
            assert (gradients == whole) == (name == "deferred")
    assert counts["deferred"] == counts["as they come"] == counts["frozen"]


def test_every_branch_is_rewritten_and_enters_before_the_reduction():
    """Where outputs are summed on all ranks."""
    result = captured(True, sequence=False)
    separate = "stack: the siblings' input gradients do not end in one sum"  # each is reduced by itself
    assert result.sites == 3 and result.reasons == [separate] * 2
    assert result.count("forward") == {"scale": 3, "stack(2)": 2, "accumulate": 1}
    assert result.count("backward")["stack(2)"] == 2
    # Written once, then reduced: the branch is a part of what the collective reads.
    lines = [line for line in result.rewrite.after.splitlines() if not line.startswith("|")]
    (reduced,) = [n for n, line in enumerate(lines) if "all_reduce" in line]
    (accumulated,) = [n for n, line in enumerate(lines) if "accumulate(" in line]
    assert accumulated < reduced


def test_every_branch_is_rewritten_to_this_ranks_rows():
    """Where outputs are scattered: see tests/passes/test_sequence_parallel.py."""
    result = captured(True, sequence=True)
    assert result.sites == 3 and result.reasons == []
    assert result.count("forward") == {"scale": 3, "stack(2)": 2, "gather h": 2, "scatter h": 1, "accumulate": 1}
    assert result.count("backward") == {"scale": 3, "stack(2)": 2, "pair": 3, "scatter g": 2, "gather g": 1}


class TestRowWise(expecttest.TestCase):
    def test_after(self) -> None:
        torch.manual_seed(0)
        model: Any = adapt(nn.ModuleDict({"down": nn.Linear(16, 12)}), rank=2)
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"down": RowwiseParallel()})
        with torch.no_grad():
            result = capture(lambda x: model["down"](x), torch.randn(6, 8))
        self.assertExpectedInline(
            result.rewrite.after,
            """\
%0 = input                                          f32[6, 8]
%1 = input                                          f32[12, 8]
%2 = input                                          f32[12]
%3 = input                                          f32[]
%4 = input                                          f32[]
%5 = input                                          f32[2, 8]
%6 = input                                          f32[12, 2]
%7 = view(%0, [6, 8])                               f32[6, 8]
%8 = permute(%1, [1, 0])                            f32[8, 12]
%9 = div(%2, 2)                                     f32[12]
%10 = addmm(%9, %7, %8)                             f32[6, 12]
%11 = mul(%3, %4)                                   f32[]
%12 = permute(%5, [1, 0])                           f32[8, 2]
%13 = mm(%7, %12)                                   f32[6, 2]
%14 = permute(%6, [1, 0])                           f32[2, 12]
%15 = lora_fx.accumulate(%10, %13, %14, %11)        f32[6, 12]
%16 = _c10d_functional.all_reduce(%15, 'sum', '0')  f32[6, 12]
%17 = _c10d_functional.wait_tensor(%16)             f32[6, 12]
return %17""",
        )
