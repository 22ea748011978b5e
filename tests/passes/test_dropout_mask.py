"""`dropout.keep`: its bits by hand, its statistics, and that every form of it gives the same ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from lora_fx.passes.kernels import dropout, lowering, operators
from tests.passes import mask_statistics
from tests.passes.mask_statistics import Statistic, standardised


def seed() -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, ())


def mixed(x: int) -> int:
    x = (x ^ x >> 16) * 0x21F0AAAD % 2**32
    x = (x ^ x >> 15) * 0x735A2D97 % 2**32
    return x ^ x >> 15


def by_hand(number: int, row: int, column: int, p: float) -> bool:
    low = mixed(number % 2**32)
    high = mixed((number >> 32) % 2**32 ^ low)
    bits = (mixed(row ^ low) ^ high ^ column // 2 * 0x5BD1E995 % 2**32) * 0x21F0AAAD % 2**32
    bits = (bits ^ bits >> 15) * 0x735A2D97 % 2**32
    bits ^= bits >> 15
    return (bits >> 16 if column % 2 else bits % 2**16) >= round(p * 2**16)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_the_bits(p: float) -> None:
    number = seed()
    found = dropout.keep_eager(number, (3, 5, 7), p).reshape(15, 7)
    expected = [[by_hand(int(number), row, column, p) for column in range(7)] for row in range(15)]
    assert found.tolist() == expected


# ---- statistics ------------------------------------------------------------------------------------------------------


M, N = 1024, 2048
Draw = Callable[[float], Tensor]


def hashed(p: float) -> Tensor:
    return dropout.keep_eager(seed(), (M, N), p)


def independent(p: float) -> Tensor:
    return torch.rand(M, N) >= dropout.threshold(p) / 2**16


@pytest.mark.parametrize("statistic", mask_statistics.ALL, ids=lambda statistic: statistic.__name__)
@pytest.mark.parametrize("draw", [hashed, independent])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_as_independent_draws(p: float, draw: Draw, statistic: Statistic) -> None:
    """Within five deviations, and so are random numbers of another kind."""
    torch.manual_seed(0)
    far = {name: z for name, z in statistic(standardised(draw(p), p)).items() if not abs(z) < 5}
    assert not far


def more_in_some_columns(dropped: Tensor) -> Tensor:
    some = torch.rand(M, N) < 0.1
    return dropped | some & (torch.arange(N) % 8 == 0)


def two_rows_alike(dropped: Tensor) -> Tensor:
    """One row in eight has a few of another one's bits."""
    dropped[::8] = torch.where(torch.rand(M // 8, N) < 0.2, dropped[4::8].roll(3, 0), dropped[::8])
    return dropped


def halves_alike(dropped: Tensor) -> Tensor:
    dropped[:, 1::2] = torch.where(torch.rand(M, N // 2) < 0.05, dropped[:, ::2], dropped[:, 1::2])
    return dropped


def more_on_some_diagonals(dropped: Tensor) -> Tensor:
    places = torch.arange(N) - torch.arange(M)[:, None]
    return dropped | (torch.rand(M, N) < 0.1) & (places % 8 == 0)


def some_as_a_neighbour(dropped: Tensor) -> Tensor:
    some = torch.rand(M, N) < 0.02
    return torch.where(some, dropped.roll((3, 1), (0, 1)), dropped)


def sums_of_row_and_column(dropped: Tensor) -> Tensor:
    some = torch.rand(M, N) < 0.4
    return torch.where(some, dropped[:, :1] ^ dropped[:1], dropped)


def even_eights(dropped: Tensor) -> Tensor:
    """The eighth is the parity of the seven before it, in one of twenty."""
    eights = dropped.view(M, -1, 8)
    parity = eights[..., :7].sum(-1) % 2 == 1
    eights[..., 7] = torch.where(torch.rand(parity.shape) < 0.05, parity, eights[..., 7])
    return dropped


DEFECTS = [
    more_in_some_columns,
    two_rows_alike,
    halves_alike,
    more_on_some_diagonals,
    some_as_a_neighbour,
    sums_of_row_and_column,
    even_eights,
]


@pytest.mark.parametrize(
    ("statistic", "defect"), list(zip(mask_statistics.ALL, DEFECTS, strict=True)), ids=lambda f: f.__name__
)
def test_statistics_see_what_they_are_for(statistic: Statistic, defect: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    dropped = defect(~independent(0.5))
    assert max(abs(z) for z in statistic(standardised(~dropped, 0.5)).values()) > 8


WEAKER = {
    "without the first product": ((15, 0x735A2D97), (15, None)),
    "without the second product": ((None, 0x21F0AAAD), (15, None)),
}


@pytest.mark.parametrize("steps", [dropout.LAST, dropout.MIX, *WEAKER.values()], ids=["last", "mix", *WEAKER])
def test_one_product_fewer_is_not_enough(steps: dropout.Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a cheaper hash gives away: correlations of rows, over four masks."""
    torch.manual_seed(0)
    monkeypatch.setattr(dropout, "LAST", steps)
    masks = [dropout.keep_eager(seed(), (1024, 4096), 0.5) for _ in range(4)]
    z = sum(mask_statistics.rows(standardised(mask, 0.5))["rows"] for mask in masks) / 2
    assert z > 8 if steps in WEAKER.values() else abs(z) < 4


@pytest.mark.parametrize("change", [1, 2, 1 << 31, 1 << 32, 1 << 40, -(2**63)])
def test_seeds_do_not_know_of_each_other(change: int) -> None:
    """Neither place by place nor in another order of the rows: similar seeds give unlike masks."""
    number = seed()
    first, second = (dropout.keep_eager(s, (512, 512), 0.5) for s in (number, number ^ change))
    agree = (first == second).double().mean()
    assert abs(float(agree) - 0.5) < 5 * 0.5 / 512
    assert not {tuple(row) for row in first.tolist()} & {tuple(row) for row in second.tolist()}


def test_one_element_in_65536_is_kept_at_least() -> None:
    assert dropout.threshold(1 - 1e-9) == 65535


@pytest.mark.parametrize("size", [(6, 10), (2, 3, 10)])
def test_lowered_to_operators_that_inductor_fuses(size: tuple[int, ...]) -> None:
    graph, number = Graph(), seed()
    place = graph.placeholder("seed")
    mode = torch._subclasses.FakeTensorMode()
    place.meta["val"] = mode.from_tensor(number)
    mask = graph.call_function(operators.keep, (place, list(size), 0.3))
    mask.meta["val"] = mode.from_tensor(torch.empty(size, dtype=torch.bool))
    graph.output(mask)
    assert list(lowering.lower(graph)) == []
    assert not graph.find_nodes(op="call_function", target=operators.keep)
    assert all("val" in node.meta for node in graph.nodes if node.op == "call_function")
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    assert torch.equal(module(number), dropout.keep_eager(number, size, 0.3))


def test_the_operator() -> None:
    number = seed()
    assert torch.equal(operators.keep(number, [4, 6], 0.25), dropout.keep_eager(number, (4, 6), 0.25))
    torch.library.opcheck(operators.keep, (number, [4, 6], 0.25))


def test_no_seed_is_refused() -> None:
    with torch._subclasses.FakeTensorMode(), pytest.raises(RuntimeError, match="no seed"):
        operators.keep(torch.zeros(3), [4, 6], 0.25)
