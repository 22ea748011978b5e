"""Async tensor parallelism: which patterns Inductor finds in a frozen, an adapted and a rewritten model."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import expecttest
import pytest
import torch
from torch import nn
from torch._inductor.fx_passes.micro_pipeline_tp import micro_pipeline_tp_pass
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch.distributed import _symmetric_memory
from torch.distributed._symmetric_memory import _test_mode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lora_fx
from lora_fx.passes import fuse_tiles, pipeline
from tests.distributed.processes import run_ranks
from tests.distributed.simulated import fake_world, whole
from tests.distributed.test_graphs import Gated, Inner, collectives, parallel
from tests.passes import on_gpu
from tests.passes.harness import Captured, adapt, capture

pytestmark = [pytest.mark.distributed]


FUSED_GATHER = torch.ops.symm_mem.fused_all_gather_matmul.default


class Alone(nn.Module):
    """A column-wise linear that nothing else reads the input of, and a row-wise one."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


@pytest.fixture(autouse=True)
def fresh() -> None:
    """What Dynamo has seen of the same code in other tests, with other sizes, would make sizes symbols here."""
    torch._dynamo.reset()


@contextlib.contextmanager
def pipelining(groups: set[str] | None = None) -> Iterator[None]:
    """Inductor is to pipeline collectives, of all groups or of these, and believes that it can."""
    with (
        torch._inductor.config.patch(_micro_pipeline_tp=True),
        _test_mode(groups),
        mock.patch("torch.distributed.is_nccl_available", return_value=True),
    ):
        yield


def alone(adapted: bool, down: Any = None, width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = adapt(Alone(width), rank=2) if adapted else Alone(width)
    plan = {"up": ColwiseParallel(input_layouts=Shard(1)), "down": down or RowwiseParallel(output_layouts=Shard(1))}
    parallelize_module(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), plan)
    return lora_fx.freeze(model) if adapted else model.requires_grad_(False)


def captured(model: nn.Module, rewrite: bool = True) -> Captured:
    return capture(model, torch.randn(2, 4, 16, requires_grad=True), rewrite=rewrite, backward=True)


def fused(result: Captured, half: str) -> tuple[list[int], int]:
    """How many products each pipelined all-gather has, and how many reduce-scatters are pipelined."""
    (module,) = getattr(result, half)
    module = copy.deepcopy(module)
    view_to_reshape(module)
    micro_pipeline_tp_pass(module.graph)
    module.graph.lint()
    gathers, scatters = (
        module.graph.find_nodes(op="call_function", target=target.default)
        for target in (torch.ops.symm_mem.fused_all_gather_matmul, torch.ops.symm_mem.fused_matmul_reduce_scatter)
    )
    return [len(node.args[1]) for node in gathers], len(scatters)


SHARED = ("scatter_h", "scatter_g", "gather_h", "gather_g")


def test_inductor_finds_what_it_finds_in_the_frozen_model():
    """Without these passes, every all-gather and no reduce-scatter, adapted by whomever and compiled by whomever."""
    halves = ("forward", "backward")
    for build, expected in (
        # q, k, v or gate and up: their input gradients are summed before they are scattered.
        (lambda adapted: parallel(adapted, sequence=True), [([2], 1), ([1], 0)]),
        (alone, [([1], 1), ([1], 1)]),
    ):
        with fake_world(2):
            with pipelining(set()):
                frozen, plain = (captured(build(adapted), rewrite=False) for adapted in (False, True))
            with pipelining():
                ours = captured(build(True))
                passes = tuple(p for p in pipeline.PASSES if p.name not in SHARED)
                x = torch.randn(2, 4, 16, requires_grad=True)
                without = capture(build(True), x, passes=passes, backward=True)
                assert ours.reasons == []
                assert [fused(frozen, half) for half in halves] == expected
                assert [fused(ours, half) for half in halves] == expected
                for result in (plain, without):
                    assert [fused(result, half) for half in halves] == [(gathers, 0) for gathers, _ in expected]
        # One collective more for each that is pipelined: of R numbers a token.
        for half, (gathers, scatters) in zip(halves, expected):
            (before,), (after,) = getattr(frozen, half), getattr(ours, half)
            more = collectives(after.graph) - collectives(before.graph)
            expected_more = {"all_gather_into_tensor": len(gathers), "reduce_scatter_tensor": scatters}
            assert dict(more) == {f"_c10d_functional.{name}": n for name, n in expected_more.items() if n}
            assert collectives(getattr(without, half)[0].graph) == collectives(before.graph)


def test_nobody_keeps_what_is_gathered_and_all_of_a_ranks_own_begins_before():
    """The products of the frozen model alone read it; h and g of own rows are gathered beside the operator."""
    with fake_world(2), pipelining():
        result = captured(parallel(True, sequence=True))
        assert result.count("forward")["gather h"] == result.count("backward")["scatter g"] == 2
        assert result.count("backward")["gather g"] == result.count("forward")["scatter h"] == 1
        for half in ("forward", "backward"):
            (module,) = getattr(result, half)
            view_to_reshape(module)
            micro_pipeline_tp_pass(module.graph)
            (gather,) = module.graph.find_nodes(op="call_function", target=FUSED_GATHER)
            assert gather.kwargs["return_A"] is False
            own = torch.ops._c10d_functional.all_gather_into_tensor_coalesced.default
            (begins,) = module.graph.find_nodes(op="call_function", target=own)
            (ends,) = (user for part in begins.users for user in part.users)
            assert begins < gather < ends


@pytest.mark.parametrize("build", [lambda adapted: parallel(adapted, sequence=True), alone], ids=["siblings", "alone"])
def test_what_a_gpu_gets(build, monkeypatch):
    """Around kernels of ours, too: what reads a product is a region, and not the next view."""
    monkeypatch.setattr(fuse_tiles.cut, "__defaults__", (on_gpu.one_tile,))
    x = torch.randn(2, 40, 16, dtype=torch.bfloat16, requires_grad=True)
    with fake_world(2), pipelining():
        frozen = capture(build(False).bfloat16(), x, rewrite=False, backward=True)
        ours = on_gpu.capture(build(True).bfloat16(), x, step=pipeline.LoweringStage(strict=True))
        for half in ("forward", "backward"):
            assert on_gpu.calls(getattr(ours, half)[0].graph)
            assert fused(ours, half) == fused(frozen, half) != ([], 0)


class TestRowWise(expecttest.TestCase):
    def test_after(self) -> None:
        torch.manual_seed(0)
        with fake_world(2), pipelining(), torch.no_grad():
            model: Any = adapt(nn.ModuleDict({"down": nn.Linear(16, 12, bias=False)}), rank=2)
            plan = RowwiseParallel(output_layouts=Shard(0))
            parallelize_module(model["down"], init_device_mesh("cpu", (2,)), plan)
            result = capture(lambda x: model["down"](x), torch.randn(6, 8))
        self.assertExpectedInline(
            result.rewrite.after,
            """\
%0 = input                                                                    f32[6, 8]
%1 = input                                                                    f32[12, 8]
%2 = input                                                                    f32[]
%3 = input                                                                    f32[]
%4 = input                                                                    f32[2, 8]
%5 = input                                                                    f32[12, 2]
%6 = view(%0, [6, 8])                                                         f32[6, 8]
%7 = permute(%1, [1, 0])                                                      f32[8, 12]
%8 = mm(%6, %7)                                                               f32[6, 12]
%9 = mul(%2, %3)                                                              f32[]
%10 = permute(%4, [1, 0])                                                     f32[8, 2]
%11 = mm(%6, %10)                                                             f32[6, 2]
%12 = permute(%5, [1, 0])                                                     f32[2, 12]
%13 = _c10d_functional.reduce_scatter_tensor_coalesced([%11], 'sum', 2, '0')  (f32[3, 2])
%14 = getitem(%13, 0)                                                         f32[3, 2]
%15 = _c10d_functional.reduce_scatter_tensor(%8, 'sum', 2, '0')               f32[3, 12]
%16 = _c10d_functional.wait_tensor(%15)                                       f32[3, 12]
%17 = _c10d_functional.wait_tensor(%14)                                       f32[3, 2]
%18 = lora_fx.accumulate(%16, %17, %12, %9)                                   f32[3, 12]
return %18""",
        )


@pytest.mark.parametrize(
    "down",
    [
        RowwiseParallel(),  # summed on all ranks
        RowwiseParallel(output_layouts=Shard(2)),  # scattered along the features: h has none of them
        RowwiseParallel(use_local_output=False),
    ],
    ids=["all-reduce", "features", "not reduced"],
)
def test_what_is_left_alone(down):
    with fake_world(2), pipelining():
        model = alone(True, down)
        distributed = not down.use_local_output
        result = capture(lambda x: model(x).to_local() if distributed else model(x), torch.randn(2, 4, 16))
    assert "scatter h" not in result.count("forward") and result.reasons == []


def test_a_product_that_is_read_elsewhere_too_is_left_alone():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            y = self.inner.down(x)
            return y.redistribute(placements=[Shard(1)]).to_local(), y.to_local()

    with fake_world(2), pipelining():
        torch.manual_seed(0)
        model = adapt(Both(), rank=2, target_modules="inner.down")
        plan = RowwiseParallel(output_layouts=Partial(), use_local_output=False)
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"inner.down": plan})
        result = capture(lambda x: model(x), torch.randn(2, 4, 16))
    assert result.sites == 1 and "scatter h" not in result.count("forward")


def two_ranks(rank: int, folder: Path) -> dict[str, Any]:
    """The largest error of any value against one process in float64, and which operators pipelined what."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    called: list[Any] = []

    def gather(*args: Any, **kwargs: Any) -> Any:
        called.append(len(args[1]))
        return _symmetric_memory._fused_all_gather_matmul(*args, **kwargs)

    def scatter(*args: Any) -> Any:
        called.append("scatter")
        return _symmetric_memory._fused_matmul_reduce_scatter(*args)

    library = torch.library.Library("symm_mem", "IMPL")  # which has kernels for CUDA alone
    library.impl("fused_all_gather_matmul", gather, "CPU")
    library.impl("fused_matmul_reduce_scatter", scatter, "CPU")
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for name, single, build, dtype in (
        ("siblings", adapt(Gated(), rank=2), lambda: parallel(True, sequence=True), torch.float32),
        ("alone", adapt(Alone(), rank=2), lambda: alone(True), torch.float32),
        ("as on a GPU", adapt(Alone(), rank=2), lambda: alone(True), torch.bfloat16),
    ):
        x, dy = (torch.randn(2, 80, 16, generator=generator).to(dtype) for _ in range(2))
        model = build().to(dtype)
        single.load_state_dict({k: v.full_tensor() for k, v in model.state_dict().items()})
        exact, exact_x = single.double(), x.double().requires_grad_()
        expected = exact(exact_x)
        expected.backward(dy.double())
        ours_x, ours_dy = (distribute_tensor(t, mesh, [Shard(1)]).to_local() for t in (x, dy))
        called.clear()
        with pipelining():
            if dtype == torch.bfloat16:
                with mock.patch.object(fuse_tiles.cut, "__defaults__", (on_gpu.one_tile,)):
                    stages = on_gpu.options(pipeline.LoweringStage(strict=True))
                    y = torch.compile(model, options=stages)(ours_x.requires_grad_())
                    y.backward(ours_dy)
            else:
                y = lora_fx.compile(model, strict=True)(ours_x.requires_grad_())
                y.backward(ours_dy)
        lora_fx.distributed.reduce_gradients(model)
        assert ours_x.grad is not None and exact_x.grad is not None
        pairs = [(y.detach(), expected.detach().chunk(2, dim=1)[rank])]
        pairs.append((ours_x.grad, exact_x.grad.chunk(2, dim=1)[rank]))
        for p, q in zip(lora_fx.adapter_parameters(model), lora_fx.adapter_parameters(exact), strict=True):
            assert p.grad is not None and q.grad is not None
            pairs.append((whole(p.grad), q.grad))
        found[name] = {"error": max(float((a.double() - b).norm() / b.norm()) for a, b in pairs), "called": [*called]}
    return found


@pytest.mark.slow
def test_values_on_two_ranks(tmp_path):
    for found in run_ranks(two_ranks, 2, tmp_path):
        called = {name: seen["called"] for name, seen in found.items()}
        one = [1, "scatter", 1, "scatter"]
        assert called == {"siblings": [2, "scatter", 1], "alone": one, "as on a GPU": one}
        errors = {name: seen["error"] for name, seen in found.items()}
        assert errors["siblings"] < 1e-6 and errors["alone"] < 1e-6 and errors["as on a GPU"] < 0.02, errors
