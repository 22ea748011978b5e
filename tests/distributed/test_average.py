"""Averaging gradients of parameters that data-parallel ranks hold: real ranks, some of which miss some gradients."""

# Submodules are reached by name, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lora_fx
from lora_fx.distributed import DeferredReduction, ShardedAdamW, average_gradients, clip_grad_norm
from lora_fx.placements import gathered
from tests.distributed.processes import run_ranks
from tests.distributed.simulated import fake_world
from tests.toy_models import shake

pytestmark = pytest.mark.distributed


class Branches(nn.Module):
    """Of four linears all ranks use `both`, each rank the one with its number, and nobody uses `none`."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        names = ("none", "rank0", "both", "rank1")
        self.linears = nn.ModuleDict({name: nn.Linear(3, 3, bias=False, dtype=dtype) for name in names})
        self.frozen = nn.Linear(3, 3, bias=False, dtype=dtype).requires_grad_(False)

    def forward(self, x: Tensor, rank: int) -> Tensor:
        return self.frozen(self.linears["both"](x)) + self.linears[f"rank{rank}"](x)


def gradients(module: nn.Module) -> dict[str, list[list[float]] | None]:
    return {name: None if p.grad is None else p.grad.tolist() for name, p in module.named_parameters()}


def as_ddp_does(rank: int, folder: Path) -> object:
    """Both, for three steps: what they leave, and how many all-reduces ours took."""
    torch.manual_seed(0)
    ours, theirs = Branches(), Branches()
    theirs.load_state_dict(ours.state_dict())
    parallel = DistributedDataParallel(theirs, find_unused_parameters=True)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.5) for m in (ours, theirs)]
    unused = ours.get_parameter("linears.none.weight")
    before = unused.detach().clone()
    found = []
    for step in range(3):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(10 * step + rank))
        for module, optimizer in zip((ours, parallel), optimizers, strict=True):
            optimizer.zero_grad()
            module(x, rank).square().sum().backward()
        count = average_gradients(ours.parameters(), [torch.distributed.group.WORLD], 2)
        found.append({"count": count, "ours": gradients(ours), "theirs": gradients(theirs)})
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert torch.equal(before, unused), "weight decay of what has no gradient"
    return found


@pytest.mark.slow
def test_a_gradient_that_one_rank_misses(tmp_path: Path) -> None:
    """It is zero there, and comes from the others; what nobody has stays None. DDP does so with unused parameters."""
    results = run_ranks(as_ddp_does, 2, tmp_path)
    assert results[0] == results[1], "ranks differ"
    for step in results[0]:
        assert step["count"] == 1
        missing = {name for name, gradient in step["ours"].items() if gradient is None}
        assert missing == {"linears.none.weight", "frozen.weight"}
        assert {name for name, gradient in step["theirs"].items() if gradient is None} == missing
        for name in step["ours"].keys() - missing:
            torch.testing.assert_close(torch.tensor(step["ours"][name]), torch.tensor(step["theirs"][name]))


def two_groups(rank: int, folder: Path) -> object:
    """Parameters of several dtypes, whole and in shards, that some of four ranks have a gradient of."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    groups = [mesh["rows"].get_group(), mesh["columns"].get_group()]
    holders = {"all": range(4), "last": [3], "first": [0], "some": [1, 2], "none": []}
    parameters: dict[str, nn.Parameter] = {}
    expected: dict[str, float | None] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, ranks in holders.items():
            p = nn.Parameter(torch.zeros(2, 5, dtype=dtype).t())
            if rank in ranks:
                p.grad = torch.full_like(p, 4.0 * (rank + 1))
            parameters[f"{name} {dtype}"] = p
            expected[f"{name} {dtype}"] = float(sum(r + 1 for r in ranks)) if ranks else None
    count = average_gradients(parameters.values(), groups, 4)
    for name, p in parameters.items():
        value = expected[name]
        assert (p.grad is None) == (value is None), name
        if p.grad is not None and value is not None:
            assert torch.equal(p.grad, torch.full_like(p, value)), name
    # A DTensor's shards are what the ranks of one column hold.
    whole = distribute_tensor(torch.zeros(4, 3), mesh["columns"], [Shard(0)])
    shard = nn.Parameter(whole)
    if mesh["rows"].get_local_rank() == 1:
        shard.grad = distribute_tensor(torch.arange(12.0).view(4, 3), mesh["columns"], [Shard(0)])
    average_gradients([shard], groups[:1], 2)
    assert isinstance(shard.grad, DTensor) and shard.grad.placements == (Shard(0),)
    full = shard.grad.redistribute(placements=[Replicate()]).to_local()
    assert torch.equal(full, torch.arange(12.0).view(4, 3) / 2)
    return count


def test_several_groups_and_dtypes(tmp_path: Path) -> None:
    assert run_ranks(two_groups, 4, tmp_path) == [4] * 4  # two groups, two dtypes: float16 is summed in float32


def large(rank: int, folder: Path) -> object:
    """Of float16 gradients whose sum is infinite, or whose halves are zero, and of others."""
    dtypes = (torch.float16, torch.float16, torch.bfloat16, torch.float32)
    parameters = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes]
    for p, value in zip(parameters, (60000.0, 2.0**-24, 1.0, 2.0**-149), strict=True):
        p.grad = torch.full_like(p, value)
    average_gradients(parameters, [torch.distributed.group.WORLD], 2)
    return [p.grad.tolist() for p in parameters if p.grad is not None]


def test_a_sum_that_float16_does_not_hold(tmp_path: Path) -> None:
    """Nor what is divided first: the smallest numbers of both types stay what they are."""
    for found in run_ranks(large, 2, tmp_path):
        assert found == [[60000.0] * 3, [2.0**-24] * 3, [1.0] * 3, [2.0**-149] * 3]


class Optional(nn.Module):
    """The second pair of linears is taken by some ranks only."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.back, self.some, self.home = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x: Tensor, taken: bool) -> Tensor:
        y = self.back(self.always(x))
        return y + self.home(self.some(x)) if taken else y


def deferred(rank: int, folder: Path) -> object:
    """Two data-parallel by two tensor-parallel ranks: the worst relative error of a gradient in three steps."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    single = shake(lora_fx.install(Optional(), lora_fx.LoRAConfig(rank=2)))
    model = copy.deepcopy(single)
    columns, rows = ColwiseParallel(), RowwiseParallel()
    parallelize_module(model, mesh["tp"], {"always": columns, "back": rows, "some": columns, "home": rows})
    parameters = lora_fx.adapter_parameters(lora_fx.freeze(model))
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    reduction = DeferredReduction(model, optimizer)
    place, errors = mesh["dp"].get_local_rank(), []
    for step in range(3):
        taken = (step != 1, False)  # in the second step nobody does
        x = [torch.randn(5, 8, generator=torch.Generator().manual_seed(10 * step + i)) for i in range(2)]
        optimizer.zero_grad()
        single.zero_grad()
        model(x[place], taken[place]).square().sum().backward()
        sum(single(x[i], taken[i]).square().sum() / 2 for i in range(2)).backward()
        reduction.reduce()
        average_gradients(parameters, [mesh["dp"].get_group()], 2)
        optimizer.step()  # its hook reduces what is not yet
        for p, q in zip(parameters, lora_fx.adapter_parameters(single), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if p.grad is not None and q.grad is not None:
                errors.append(float((gathered(p.grad) - q.grad).norm() / q.grad.norm()))
    return max(errors)


def test_after_a_deferred_reduction(tmp_path: Path) -> None:
    """What a rank gets from others is a sum already, which the hook of the step must leave alone."""
    assert max(run_ranks(deferred, 4, tmp_path)) < 1e-5


def test_nothing_to_average() -> None:
    assert average_gradients([nn.Parameter(torch.zeros(2), requires_grad=False)], [None], 2) == 0
    assert average_gradients([], [None], 2) == 0


def instructions(call: Callable[[], Any]) -> int:
    """How many instructions of Python a call takes in this package's modules."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = "lora_fx" in frame.f_code.co_filename
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("sharded", [False, True])
def test_what_happens_between_backward_and_the_next_step_is_little_for_each_parameter(sharded):
    """A GPU waits for it: four times as many parameters take four times as many instructions, and few of them."""
    calls: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "average": lambda parameters: average_gradients(parameters, [torch.distributed.group.WORLD], 2),
        "clip": lambda parameters: clip_grad_norm(parameters, 1.0),
        "step": lambda parameters: ShardedAdamW(parameters).step(),
    }
    found: dict[str, list[int]] = {name: [] for name in calls}
    with fake_world(2):
        mesh = init_device_mesh("cpu", (2,))
        for count in (50, 200):
            values = [torch.randn(4, 4) for _ in range(count)]
            if sharded:
                values = [distribute_tensor(value, mesh, [Shard(0)]) for value in values]
            parameters = [nn.Parameter(value) for value in values]
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            for name, call in calls.items():
                found[name].append(instructions(functools.partial(call, parameters)))
    for name, (few, many) in found.items():
        assert 0 < many < 4.2 * few, (name, few, many)
        assert many < 200 * 300, (name, many)
