"""`dropout.keep`: its bits by hand, its statistics, and that every form of it gives the same ones."""

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from lora_fx.passes.kernels import dropout, lowering, operators


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


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_the_share_that_is_dropped(p: float) -> None:
    """Of all, of each row and of each column: within what independent draws give (five deviations of each)."""
    dropped = 1 - dropout.keep_eager(seed(), (1024, 1024), p).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(float(dropped.mean()) - p) < 5 * deviation / 1024 + 2**-17
    for dim in (0, 1):
        shares = dropped.mean(dim)
        assert float((shares - p).abs().max()) < 6 * deviation / 32
        assert float(shares.std()) == pytest.approx(deviation / 32, rel=0.15)


@pytest.mark.parametrize("offset", [(0, 1), (0, 2), (1, 0), (1, 1), (0, 512), (512, 0)])
def test_places_do_not_know_of_each_other(offset: tuple[int, int]) -> None:
    kept = dropout.keep_eager(seed(), (1024, 1024), 0.5).double() * 2 - 1
    rows, columns = offset
    product = kept[rows:, columns:] * kept[: 1024 - rows, : 1024 - columns]
    assert abs(float(product.mean())) < 5 / product.numel() ** 0.5


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
