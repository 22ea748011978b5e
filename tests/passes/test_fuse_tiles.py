"""Models whose regions have been cut out: how many, and that they compute the same.

The passes decide as on a GPU (`tests/passes/on_gpu.py`); programs run as ATen. M = 160 tokens. The graphs themselves
are in `tests/passes/test_golden_tiles.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes import harness, on_gpu
from tests.passes.harness import Case, adapt, compare
from tests.passes.modules import QKV, Block, Mlp
from tests.passes.on_gpu import programs

bf16 = torch.bfloat16
K, N = 136, 264
SHAPE = (2, 80, K)


def x(dtype: torch.dtype = bf16, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def linear(bias: bool = False, dtype: torch.dtype = bf16, **config: Any) -> nn.Module:
    return adapt(nn.Linear(K, N, bias=bias, dtype=dtype), **config)


def mlp(dtype: torch.dtype = bf16, **config: Any) -> nn.Module:
    return adapt(Mlp(K, N).to(dtype), **config)


class NormedQKV(nn.Module):
    """q, k and v of a normalised residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.qkv = QKV(K, K)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(self.norm(x))


def normed(dtype: torch.dtype = bf16, **config: Any) -> nn.Module:
    return adapt(NormedQKV().to(dtype).requires_grad_(False), **config)


# ---- numerics --------------------------------------------------------------------------------------------------------


def case(name: str, build: Callable[[], nn.Module], sites: int, **more: Any) -> Case:
    return Case(name, build, sites, {}, **{"dtype": bf16, "shape": SHAPE, "seeds": 4, **more})


def checkpointed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.utils.checkpoint.checkpoint(module, t, use_reentrant=False)


class Gated(nn.Module):
    """Two linears, a gate of several pointwise operations, a mask, and a residual.

    Nothing jumps, gradients neither: where one did, few elements on the other side of it would be all of the error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(K, K, bias=True), nn.Linear(K, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return x + torch.where(x > 0, a, b) * torch.tanh(b) + F.relu(a) * a / (1 + b.abs() * b.abs())


CASES = [
    (case("linear", linear, 1), (2, 3)),
    (case("linear in float16", lambda: linear(dtype=torch.float16), 1, dtype=torch.float16), (2, 3)),
    (case("bias", lambda: linear(bias=True), 1), (2, 3)),
    (case("matrix", linear, 1, shape=(160, K)), (2, 3)),
    (case("x without a gradient", linear, 1, x_grad=False), (2, 2)),
    (case("rank 1", lambda: linear(rank=1), 1), (2, 3)),
    (case("smaller than a rank may be", lambda: adapt(nn.Linear(48, 40, dtype=bf16)), 1, shape=(160, 48)), (2, 3)),
    (case("SwiGLU", mlp, 3), (3, 6)),
    (case("gelu", lambda: adapt(Mlp(K, N, F.gelu).to(bf16)), 3), (3, 6)),
    (case("q, k, v of a norm", normed, 3), (4, 5)),
    (case("gated", lambda: adapt(Gated().to(bf16)), 2), (3, 5)),
    (case("no gradient", mlp, 3, grad=torch.no_grad), (3, 0)),
    (case("checkpointed", mlp, 3, wrap=checkpointed), (3, 7)),
    (
        case("any number of tokens", mlp, 3, shapes=((2, 80, K), (3, 70, K), (5, 31, K)), dynamic=True, seeds=1),
        (3, 6),
    ),
    (case("autocast", lambda: mlp(torch.float32), 3, dtype=torch.float32, autocast=True), (3, 6)),
    (case("dropout", lambda: mlp(dropout=on_gpu.P), 3, random=True), (3, 6)),
]


FAST = ("linear", "SwiGLU", "q, k, v of a norm", "gated")
"""The others are run with the slow tests: each compiles its module twice."""


@pytest.mark.parametrize(
    ("case", "count"),
    [pytest.param(*pair, marks=() if pair[0].name in FAST else pytest.mark.slow, id=str(pair[0])) for pair in CASES],
)
def test_as_accurate_as_plain_compile(case: Case, count: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Seeded", on_gpu.Masked)
    result = compare(case, on_gpu.by_graphs)
    result.assert_as_accurate()
    captured = result.captured
    assert captured.reasons == [] and captured.sites == case.sites
    assert len(captured.forward) == len(result.theirs.forward), "it recompiles"
    halves = (captured.forward, captured.backward)
    found = tuple(len(programs(half[0].graph)) if half else 0 for half in halves)
    assert found == count
    if case.name == "checkpointed":  # h of the last linear is kept, whose inputs are wide enough for that
        assert result.ours.saved == result.plain.saved + 160 * 4 * 2
    else:
        assert result.ours.saved <= result.plain.saved


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        case("SwiGLU", mlp, 3, seeds=2),
        case("checkpointed", mlp, 3, wrap=checkpointed, seeds=2),
        case("block", lambda: adapt(Block(K).to(bf16).requires_grad_(False)), 7, seeds=2),
        case("any number of tokens", mlp, 3, shapes=((2, 80, K), (3, 70, K)), dynamic=True, seeds=1),
    ],
    ids=str,
)
def test_among_kernels(case: Case) -> None:
    """Inductor's own code around programs; outputs may take the memory of products that die."""
    result = compare(case, on_gpu.by_kernels)
    result.assert_as_accurate()
    assert result.captured.sites == case.sites
