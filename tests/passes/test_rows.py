"""Branches whose rows use different adapters: found and rewritten in graphs for inference, left alone in others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fx.passes.low_rank import low_rank, low_rank_rows
from tests.passes import on_gpu
from tests.passes.harness import Case, capture, check_case, compare
from tests.passes.on_gpu import programs

ROWS = torch.tensor([2, -1, 0])
N, R = 3, 4


class RowLinear(nn.Linear):
    """A linear with N stacked adapters of rank R."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(N * R, in_features) * 0.1, requires_grad=False)
        self.b = nn.Parameter(torch.randn(out_features, N * R) * 0.1, requires_grad=False)
        self.scales = nn.Parameter(torch.tensor([0.5, 2.0, -0.7]), requires_grad=False)
        self.register_buffer("rows", ROWS.clone())

    def forward(self, input: Tensor) -> Tensor:
        assert isinstance(self.rows, Tensor)
        return super().forward(input) + low_rank_rows(input, self.rows, (self.a, self.b, self.scales))


class QKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = RowLinear(48, 48), RowLinear(48, 24), RowLinear(48, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.wq(x), self.wk(x), self.wv(x)


class Mlp(nn.Module):
    def __init__(self, dim: int = 48, hidden: int = 96) -> None:
        super().__init__()
        self.gate, self.up, self.down = RowLinear(dim, hidden), RowLinear(dim, hidden), RowLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


bf16 = torch.bfloat16
ONE = {"rows": 1, "accumulate": 1}
MLP = {"rows": 3, "stack(2)": 2, "accumulate": 1}


def case(name: str, build: Callable[[], nn.Module], sites: int, forward: dict[str, int], **how: Any) -> Case:
    return Case(name, build, sites, forward, grad=torch.no_grad, **how)


CASES = [
    case("3-D", lambda: RowLinear(48, 40), 1, ONE),
    case("bias 4-D", lambda: RowLinear(48, 40, bias=True), 1, ONE, shape=(3, 2, 4, 48)),
    case("2-D", lambda: RowLinear(48, 40), 1, ONE, shape=(24, 48)),
    case("one token bf16", lambda: RowLinear(48, 40).to(bf16), 1, ONE, shape=(3, 1, 48), dtype=bf16),
    case("siblings", QKV, 3, {"rows": 3, "stack(3)": 3, "accumulate": 3}),
    case("gate/up", Mlp, 3, MLP),
    case("gate/up bf16", lambda: Mlp().to(bf16), 3, MLP, dtype=bf16),
    case("autocast", Mlp, 3, MLP, autocast=True),
    case("dynamic", lambda: RowLinear(48, 40), 1, ONE, dynamic=True, shapes=((3, 8, 48), (3, 5, 48), (3, 11, 48))),
]


FAST = ("3-D", "siblings")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c.name in FAST else pytest.mark.slow, id=c.name) for c in CASES]
)
def test_graphs(case: Case) -> None:
    check_case(case)


@pytest.mark.slow
def test_as_on_a_gpu() -> None:
    """The kernels there take the product with B, and what reads the sum, as they do for one adapter."""
    wide = case("tiles", lambda: Mlp(136, 264).to(bf16), 3, {}, shape=(3, 80, 136), dtype=bf16, seeds=4)
    result = compare(wide, on_gpu.by_graphs)
    result.assert_as_accurate()
    assert (len(programs(result.captured.forward[0].graph)), result.captured.reasons) == (3, [])


def test_too_many_for_a_small_linear() -> None:
    with torch.no_grad():
        (site,) = capture(RowLinear(48, 20), torch.randn(3, 8, 48)).rewrite.report.sites
    assert site.reason == "rank 12 is more than half of min(48, 20) for all adapters of the rows together"


def test_gradients_are_left_alone() -> None:
    module, x = RowLinear(48, 40), torch.randn(3, 8, 48, requires_grad=True)
    (site,) = capture(module, x, backward=True).rewrite.report.sites
    assert (
        not site.rewritten and site.reason == "its rows use different adapters, which is rewritten for inference alone"
    )


@pytest.mark.parametrize("shape", [(3, 5, 10), (15, 10), (3, 10), (3, 2, 4, 10)])
def test_formula(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, a, b = torch.randn(shape), torch.randn(N, R, 10), torch.randn(N, 8, R)
    scales = torch.tensor([0.5, 2.0, -0.7])
    y = low_rank_rows(x, ROWS, (a.flatten(0, 1), b.movedim(0, 1).flatten(1), scales), torch.tensor(3.0))
    for own, part in zip(ROWS.tolist(), zip(x.view(3, -1, 10), y.view(3, -1, 8))):
        theirs, ours = part[0].double(), part[1].double()
        expected = 0 * ours if own < 0 else low_rank(theirs, a[own].double(), b[own].double(), 3 * scales[own].item())
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
