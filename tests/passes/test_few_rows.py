"""Branches over a few tokens on a GPU: written out for Inductor instead of products of their own."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

from lora_fx.passes.graph import MM
from lora_fx.passes.kernels import lowering
from lora_fx.passes.pipeline import LoweringStage
from lora_fx.passes.site import MARK
from tests.passes import on_gpu
from tests.passes.harness import Case, adapt, compare
from tests.passes.modules import Block, Mlp
from tests.passes.test_fuse_tiles import normed

bf16 = torch.bfloat16
CHOSEN = LoweringStage(strict=True)
"""With the choice of tiles that is made for a GPU, which has none for few rows."""


def mlp(rank: int = 16) -> nn.Module:
    return adapt(Mlp(72, 96).to(bf16).requires_grad_(False), rank=rank)


def block() -> nn.Module:
    return adapt(Block(64).to(bf16).requires_grad_(False), rank=8)


def few(name: str, build: object, sites: int, **more: object) -> Case:
    return Case(name, build, sites, {}, **{"dtype": bf16, "seeds": 3, **more})  # type: ignore[arg-type]  # Case's own


CASES = [
    few("one token", mlp, 3, shape=(1, 1, 72), grad=torch.no_grad),
    few("eight tokens", mlp, 3, shape=(8, 1, 72), grad=torch.no_grad),
    few("a rank that is no product of small numbers", lambda: mlp(11), 3, shape=(4, 72), grad=torch.no_grad),
    few("a rank that is not unrolled", lambda: mlp(33), 3, shape=(4, 72), grad=torch.no_grad),
    few("q, k, v of a norm", normed, 3, shape=(1, 2, 136), grad=torch.no_grad),
    few("training", mlp, 3, shape=(2, 2, 72)),
    few("a block", block, 7, shape=(2, 3, 64), grad=torch.no_grad),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_accurate_as_plain_compile(case: Case) -> None:
    result = compare(case, functools.partial(on_gpu.by_graphs, step=CHOSEN))
    result.assert_as_accurate()
    assert result.captured.reasons == [] and result.captured.sites == case.sites


def marked(graph: Graph) -> int:
    """Products of rank R that are still calls of their own."""
    return sum(bool(node.meta.get(MARK)) for node in graph.find_nodes(op="call_function", target=MM))


def forward(module: nn.Module, *shape: int) -> Graph:
    with torch.no_grad():
        captured = on_gpu.capture(module, torch.randn(*shape, dtype=bf16), step=CHOSEN, backward=False)
    return captured.forward[0].graph


def test_nothing_of_the_branch_is_a_call() -> None:
    graph = forward(mlp(), 1, 72)
    assert marked(graph) == 0
    assert len(graph.find_nodes(op="call_function", target=MM)) == 3  # the frozen ones
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


def test_nine_tokens_are_not_few() -> None:
    assert not any(
        lowering.has_few_rows(node) for node in forward(mlp(), 9, 72).find_nodes(op="call_function", target=MM)
    )


def test_gradients_of_low_rank_are_not_few_tokens() -> None:
    """dA = g^T x has R rows, and sums over all tokens."""
    module = adapt(nn.Linear(72, 96, dtype=bf16), rank=4)
    x = torch.randn(512, 72, dtype=bf16, requires_grad=True)
    captured = on_gpu.capture(module, x, step=lambda graph: list(lowering.lower(graph)))
    assert marked(captured.backward[0].graph) == 1  # dA: the others are lowered from operators of ours


@pytest.mark.parametrize(
    ("size", "factors"), [(16, [4, 4]), (8, [4, 2]), (32, [4, 4, 2]), (12, [6, 2]), (11, [11]), (1, [1])]
)
def test_sums_that_are_unrolled(size: int, factors: list[int]) -> None:
    assert lowering._factors(size) == factors


class Normed(nn.Module):
    """A branch whose sum with a residual a norm reads, and one whose sum only pointwise operations read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(64, 64, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.a(x)
        return torch.tanh(self.b(y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-6)))


def test_before_a_norm_it_is_a_reduction() -> None:
    graph = forward(adapt(Normed().to(bf16).requires_grad_(False), rank=16), 1, 64)
    sums = graph.find_nodes(op="call_function", target=torch.ops.aten.sum.dim_IntList)
    shapes = [tuple(node.args[0].meta["val"].shape) for node in sums]
    assert shapes == [(1, 16, 64), (1, 64, 16), (1, 16, 64), (1, 64, 4, 4), (1, 64, 4)]
