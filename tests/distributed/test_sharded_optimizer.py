"""AdamW on shards, against torch's own on whole tensors: what one rank of four does, in a fake process group."""

# mypy: no-check-untyped-defs

import copy
import importlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import lora_fx
from lora_fx import _torch
from lora_fx.distributed import ShardedAdamW
from lora_fx.placements import local
from tests.distributed.simulated import collectives, fake_world

pytestmark = pytest.mark.distributed

HOW = [{"foreach": True}, {"fused": True}, {"foreach": False}, {"foreach": True, "amsgrad": True, "maximize": True}]
PLACEMENTS = [Shard(0), Shard(1), Replicate(), None]


@pytest.fixture
def mesh():
    with fake_world(4):
        yield init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))


def part(full, placement):
    """What the first of four ranks has of a tensor."""
    return full.chunk(4, placement.dim)[0].clone() if isinstance(placement, Shard) else full.clone()


def placed(full, placement, mesh):
    """The tensor as a DTensor of which this rank knows its part; a plain one without a placement."""
    mine = part(full, placement)
    return mine if placement is None else DTensor.from_local(mine, mesh, [placement], run_check=False)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_steps_are_those_on_whole_tensors(mesh, how):
    """Three of them, with a weight decay; parameters and state, which stay DTensors. Plain tensors are among them,
    as the router of a mixture is: torch's own fused AdamW refuses those beside DTensors."""
    torch.manual_seed(0)
    values = [torch.randn(8, 12) for _ in PLACEMENTS]
    theirs = [nn.Parameter(value.clone()) for value in values]
    ours = [nn.Parameter(placed(value, where, mesh)) for value, where in zip(values, PLACEMENTS)]
    sharded = ShardedAdamW(ours, lr=0.1, weight_decay=0.3, **how)
    whole = torch.optim.AdamW(theirs, lr=0.1, weight_decay=0.3, **how)
    for _ in range(3):
        for p, q, where in zip(ours, theirs, PLACEMENTS, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = placed(q.grad, where, mesh)
        whole.step()
        with collectives() as counts:
            sharded.step()
        assert counts == {}
    for p, q, value, where in zip(ours, theirs, values, PLACEMENTS, strict=True):
        assert isinstance(p, DTensor) == (where is not None)
        assert not torch.equal(q, value)
        assert torch.equal(local(p.detach()), part(q.detach(), where))
        assert sharded.state[p].keys() == whole.state[q].keys()
        for name, expected in whole.state[q].items():
            found = sharded.state[p][name]
            assert isinstance(found, DTensor) == (where is not None and found.dim() > 0)
            assert torch.equal(local(found), part(expected, where if found.dim() else None)), name


def test_what_is_computed_is_plain(mesh):
    """That is the point: the dispatcher sees no DTensor."""
    parameters = [nn.Parameter(placed(torch.randn(8, 12), where, mesh)) for where in PLACEMENTS]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = ShardedAdamW(parameters, lr=0.1)
    optimizer.step()  # makes the state
    with mock.patch.object(importlib.import_module("torch.optim.adam"), "adam") as adam:
        optimizer.step()
    lists = [argument for argument in adam.call_args.args if isinstance(argument, list)]
    assert [len(tensors) for tensors in lists] == [4, 4, 4, 4, 0, 4]
    assert not any(isinstance(tensor, DTensor) for tensors in lists for tensor in tensors)


def test_gradients_that_are_placed_in_another_way(mesh):
    """Terms of a sum would otherwise be taken for the sum."""
    p = nn.Parameter(placed(torch.randn(8, 4), Replicate(), mesh))
    p.grad = DTensor.from_local(torch.randn(8, 4), mesh, [Partial()])
    with collectives() as counts:
        ShardedAdamW([p], lr=0.1).step()
    assert counts == {"all_reduce": 1}


def test_on_plain_tensors_it_is_torchs_own():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(5, 3)) for _ in range(3)]
    theirs = copy.deepcopy(ours)
    optimizers = ShardedAdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for _ in range(2):
        for p, q in zip(ours[:2], theirs[:2], strict=True):  # the last has no gradient
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    again = ShardedAdamW(ours, lr=0.5)
    again.load_state_dict(optimizers[1].state_dict())
    assert again.param_groups[0]["lr"] == 0.1 and len(again.state) == 2


def test_a_torch_without_the_method_is_refused():
    assert issubclass(lora_fx.distributed.ShardedAdamW, torch.optim.AdamW)
    with pytest.raises(ImportError, match=r"Optimizer\._init_group, which torch .* does not have"):
        _torch.check_collects_by_group(torch.optim.Optimizer)
