"""Adapters under tensor parallelism: stock `parallelize_module`, before or after install. All ranks in one process."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import lora_fx
import lora_fx.distributed
from lora_fx import LoRAConfig
from lora_fx.distributed import adapter_placements
from tests.distributed.simulated import collectives, copy_adapters, fake_world, simulated, whole
from tests.toy_models import shake

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:Full backward hook")]
R, S0, S1 = Replicate(), Shard(0), Shard(1)


class Mlp(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 24, bias=bias)
        self.down = nn.Linear(24, 16, bias=bias)

    def forward(self, x):
        return self.down(torch.tanh(self.up(self.norm(x))))


def plan(sequence: bool = False):
    if not sequence:
        return {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }


def parallel(base: nn.Module, adapted: nn.Module, config: LoRAConfig, mesh, order: str, **how) -> nn.Module:
    """A parallel copy of `adapted`, which is `base` with adapters; these are installed before or after."""
    if order == "before":
        return lora_fx.freeze(parallelize_module(copy.deepcopy(adapted), mesh, plan(**how)))
    model = parallelize_module(copy.deepcopy(base), mesh, plan(**how))
    lora_fx.install(model, config)
    copy_adapters(adapted, model)
    return model


def run(model: nn.Module, x: torch.Tensor, dy: torch.Tensor):
    """Output, and the collectives of each half."""
    with collectives() as forward:
        y = model(x)
    with collectives() as backward:
        y.backward(dy)
    return y, forward, backward


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_outputs_gradients_and_collectives(order, bias, rank):
    """Plans that know nothing of adapters, and adapters that were there before them: elsewhere either fails.

    Others meet a plain factor beside a distributed weight, or one that the plan has no entry for, or cut rows from A.
    """
    torch.manual_seed(0)
    base, config = Mlp(bias), LoRAConfig(rank=rank, alpha=rank)  # 1 is less than the ranks that share it
    x, dy = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    adapted = shake(lora_fx.install(copy.deepcopy(base), config))
    exact = copy.deepcopy(adapted).double()
    x_exact = x.double().requires_grad_()
    expected, _, _ = run(exact, x_exact, dy.double())

    frozen = copy.deepcopy(base).requires_grad_(False)
    with simulated(tp=4) as mesh:
        model = parallel(base, adapted, config, mesh, order)
        adapters = dict(lora_fx.named_adapter_parameters(model))
        assert {name: p.placements for name, p in adapters.items()} == {
            "up.lora_a": (R,),
            "up.lora_b": (S0,),
            "down.lora_a": (S1,),
            "down.lora_b": (R,),
        }
        assert list(model.state_dict()) == list(adapted.state_dict())
        _, forward, backward = run(parallelize_module(frozen, mesh, plan()), x.clone().requires_grad_(), dy)
        x_ours = x.clone().requires_grad_()
        y, *ours = run(model, x_ours, dy)
        assert ours == [forward, backward] == [{"all_reduce": 1}, {"all_reduce": 1}]
        torch.testing.assert_close(whole(y), expected.float())
        torch.testing.assert_close(whole(x_ours.grad), x_exact.grad.float())

        # Each rank has a term of the replicated factors' gradients; one reduction sums all of them.
        placements = {name: p.grad.placements for name, p in adapters.items()}
        assert placements["up.lora_a"] == placements["down.lora_b"] == (Partial(),)
        for number in (1, 0):
            with collectives() as counts:
                assert lora_fx.distributed.reduce_gradients(model) == number
            assert counts == ({"allreduce": 1} if number else {})
        for (name, p), q in zip(adapters.items(), lora_fx.adapter_parameters(exact), strict=True):
            assert p.grad.placements == p.placements
            torch.testing.assert_close(whole(p.grad), q.grad.float(), msg=lambda text, name=name: f"{name}: {text}")
        assert all(p.grad is None for name, p in model.named_parameters() if name not in adapters)


@pytest.mark.parametrize("order", ["before", "after"])
def test_sequence_parallel(order):
    """Activations are sharded between the linears: still no collective more, and what it thaws is frozen again."""
    torch.manual_seed(0)
    base, config = Mlp(), LoRAConfig(rank=2)
    x, dy = torch.randn(3, 8, 16), torch.randn(3, 8, 16)
    exact = shake(lora_fx.install(copy.deepcopy(base), config))
    expected, _, _ = run(exact, x, dy)
    with simulated(tp=4) as mesh:
        frozen = parallelize_module(copy.deepcopy(base), mesh, plan(sequence=True)).requires_grad_(False)
        model = parallel(base, exact, config, mesh, order, sequence=True)
        both = []
        for module in (frozen, model):
            sharded = distribute_tensor(x, mesh, [Shard(1)])
            local = sharded.to_local().requires_grad_()
            y, *counts = run(module, local, distribute_tensor(dy, mesh, [Shard(1)]).to_local())
            both.append(counts)
        assert both[0] == both[1] == [{"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}] * 2
        gathered = DTensor.from_local(y, mesh, [Shard(1)])
        torch.testing.assert_close(whole(gathered), expected)
        lora_fx.distributed.reduce_gradients(model)
        for p, q in zip(lora_fx.adapter_parameters(model), lora_fx.adapter_parameters(exact), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad)


def test_sequence_parallel_thaws_and_we_say_so():
    with simulated(tp=4) as mesh:
        model = lora_fx.install(Mlp(), LoRAConfig(rank=2))
        parallelize_module(model, mesh, plan(sequence=True))
        assert lora_fx.distributed.thawed(model) == ["norm.weight", "norm.bias"]
        with pytest.warns(UserWarning, match=r"norm.weight and 1 more require .* call lora_fx.freeze\(model\)"):
            lora_fx.adapter_parameters(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            lora_fx.freeze(model)
            assert len(lora_fx.adapter_parameters(model)) == 4
        assert lora_fx.distributed.thawed(model) == []
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            name for name, _ in lora_fx.named_adapter_parameters(model)
        }


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    "weight, a, b",
    [
        ((S0, S0), (R, R), (S0, S0)),
        ((S1, S0), (S1, R), (R, S0)),
        ((R, S1), (R, S1), (R, R)),
        ((R, R), (R, R), (R, R)),
    ],
)
def test_meshes_of_two_dimensions(weight, a, b, order):
    assert adapter_placements(weight) == {"lora_a": a, "lora_b": b, "lora_magnitude": b}
    torch.manual_seed(0)
    base, config = nn.Linear(8, 12), LoRAConfig(rank=2, alpha=6.0)
    x = torch.randn(5, 8)
    expected = shake(lora_fx.install(copy.deepcopy(base), config))
    model = copy.deepcopy(expected if order == "before" else base)

    def partition(name, module, mesh):
        for key, p in list(module.named_parameters()):
            where = weight if p.dim() == 2 else [R, R]
            module.register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, where), p.requires_grad))

    with simulated(x=2, y=2) as mesh:
        distribute_module(model, mesh, partition)
        if order == "after":
            lora_fx.install(model, config)
            copy_adapters(expected, model)
        assert (model.lora_a.placements, model.lora_b.placements) == (a, b)
        y = model(distribute_tensor(x, mesh, [R, R]))
        torch.testing.assert_close(whole(y), expected(x))
        y.redistribute(placements=[R, R]).to_local().sum().backward()
        expected(x).sum().backward()
        lora_fx.distributed.reduce_gradients(model)
        torch.testing.assert_close(whole(model.lora_a.grad), expected.lora_a.grad)
        torch.testing.assert_close(whole(model.lora_b.grad), expected.lora_b.grad)
        expected.zero_grad()


def test_the_numbers_are_replicated_and_work():
    torch.manual_seed(0)
    base, x = Mlp(), torch.randn(3, 16)
    config = LoRAConfig(rank=2, alpha=6.0)
    adapted = shake(lora_fx.install(copy.deepcopy(base), config))
    for order in ("before", "after"):
        with simulated(tp=2) as mesh:
            model = parallel(base, adapted, config, mesh, order)
            assert all(isinstance(b, DTensor) and b.placements == (R,) for b in model.buffers())
            with lora_fx.disabled(model):
                torch.testing.assert_close(whole(model(x)), base(x))
            torch.testing.assert_close(whole(model(x)), adapted(x))
            for module in (model.up, model.down, adapted.up, adapted.down):
                module.lora_scale.fill_(0.5)
            torch.testing.assert_close(whole(model(x)), adapted(x))
            adapted.up.lora_scale.fill_(3.0)
            adapted.down.lora_scale.fill_(3.0)


def test_a_distributed_number_is_shown():
    with fake_world(2):
        model = lora_fx.install(Mlp(), LoRAConfig(rank=2, alpha=6.0))
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan())
        model.up.lora_scale.fill_(0.5)
        assert "scale=0.5" in repr(model.up) and "scale=3" in repr(model.down)


@pytest.mark.filterwarnings("ignore:DTensor random operators")
def test_meta_then_parallel_then_weights():
    """The flow of a large model: nothing exists before its shard does. Replicas start equal."""

    class Model(Mlp):
        def init_weights(self) -> None:
            for module in (self.norm, self.up, self.down):
                module.reset_parameters()

    with torch.device("meta"):
        model = lora_fx.install(Model(), LoRAConfig(rank=2, alpha=6.0))
    with simulated(tp=4) as mesh:
        parallelize_module(model, mesh, plan())
        model.to_empty(device="cpu")
        model.init_weights()
        assert model.up.lora_a.placements == (R,) and model.down.lora_a.placements == (S1,)
        assert whole(model.up.lora_a).abs().max() > 0  # and equal on all ranks, or there is no such value
        assert whole(model.down.lora_a).abs().min() > 0
        assert not whole(model.down.lora_b).any()
        assert whole(model.up.lora_scale).item() == 3.0


def test_partial_weights_are_refused():
    with pytest.raises(ValueError, match="is partial: reduce it before it gets an adapter"):
        adapter_placements((Partial(),))


def test_only_sums_are_reduced():
    with simulated(tp=2) as mesh:
        parameter = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [R]))
        parameter.grad = DTensor.from_local(torch.ones(4), mesh, [Partial("max")])
        with pytest.raises(ValueError, match="only sums can be reduced together"):
            lora_fx.distributed.reduce_gradients([parameter])
