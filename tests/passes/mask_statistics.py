"""How far a mask is from independent draws, as numbers that are standard normal, nearly, where there is no difference.

Every statistic takes a matrix [M, N] of elements that are dropped with a probability of `p`, as numbers of mean 0 and
variance 1. What it sums over the matrix is a number of its own, and what it sums over rows, columns or diagonals is one
for all of them together: their mean square, which is 1 where they are normal.
"""

import itertools
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Statistic = Callable[[Tensor], dict[str, float]]


def standardised(kept: Tensor, p: float) -> Tensor:
    """A mask as float32 of mean 0 and variance 1; `p` as what can be drawn, of 65536."""
    p = round(p * 2**16) / 2**16
    return ((~kept).float() - p) / math.sqrt(p * (1 - p))


def _spread(z: Tensor, x: Tensor, terms: int, factors: int = 1) -> float:
    """Of many sums that should be standard normal and do not know of each other: how far their mean square is from 1.

    In deviations of it, which rare events make larger: a sum of `terms` products of so many elements of `x` is a little
    less normal than a sum of coins.
    """
    fourth = float(x.double().pow(4).mean()) ** factors
    deviation = math.sqrt((2 + (fourth - 3) / terms) / z.numel())
    return float(z.double().square().mean() - 1) / deviation


def shares(x: Tensor) -> dict[str, float]:
    """Of all elements, of each row and of each column."""
    m, n = x.shape
    return {
        "of all": float(x.double().sum() / math.sqrt(m * n)),
        "of rows": _spread(x.sum(1) / math.sqrt(n), x, n),
        "of columns": _spread(x.sum(0) / math.sqrt(m), x, m),
    }


def rows(x: Tensor) -> dict[str, float]:
    """Every row with every other: rectangles of all sizes, so to say."""
    return {"rows": _spread(_pairs(x), x, x.shape[1], 2)}


def columns(x: Tensor) -> dict[str, float]:
    """Every column with every other; and apart from them the two that are halves of one number."""
    halves = (x[:, ::2] * x[:, 1::2]).sum(0) / math.sqrt(x.shape[0])
    return {
        "columns": _spread(_pairs(x.T), x, x.shape[0], 2),
        "halves": _spread(halves, x, x.shape[0], 2),
        "halves together": _sum(halves),
    }


def _pairs(x: Tensor) -> Tensor:
    x = x - x.mean(1, keepdim=True)
    x = x / x.norm(dim=1, keepdim=True)  # correlations: how much is dropped is another statistic's affair
    products = x @ x.T * math.sqrt(x.shape[1] - 1)
    above = torch.ones_like(products, dtype=torch.bool).triu(1)
    return products[above]


def _sum(z: Tensor) -> float:
    return float(z.double().sum() / math.sqrt(z.numel()))


def diagonals(x: Tensor) -> dict[str, float]:
    """Sums along the diagonals of both directions, around the edges."""
    m, n = x.shape
    places = torch.arange(m)[:, None]
    return {
        name: _spread(x.gather(1, (torch.arange(n)[None, :] + step * places) % n).sum(0) / math.sqrt(m), x, m)
        for name, step in (("down", 1), ("up", -1), ("two columns a row", 2), ("down by halves", n // 2 + 1))
    }


SIDES = (1, 2, 3, 4, 8, 16, 64, 256)


def neighbours(x: Tensor) -> dict[str, float]:
    """Products of two places, some rows and columns apart."""
    offsets = itertools.product((0, *SIDES), (0, *SIDES))
    return {
        f"{down} down, {across} across": _products(x, ((0, 0), (down, across)))
        for down, across in offsets
        if down or across
    }


def rectangles(x: Tensor) -> dict[str, float]:
    """Products of four corners: these are seen where elements are sums (modulo 2) of what rows and columns have."""
    corners = itertools.product(SIDES, SIDES)
    return {f"{a} x {b}": _products(x, ((0, 0), (0, b), (a, 0), (a, b))) for a, b in corners}


def _products(x: Tensor, places: Iterable[tuple[int, int]]) -> float:
    """The sum of the products of elements at these places of every window."""
    places = list(places)
    m, n = (size - max(place[i] for place in places) for i, size in enumerate(x.shape))
    product = torch.ones(())
    for down, across in places:
        product = product * x[down : down + m, across : across + n]
    return float(product.double().sum() / math.sqrt(m * n))


def patterns(x: Tensor) -> dict[str, float]:
    """How often eight neighbours, in windows that do not overlap, are each of their 256 patterns."""
    windows = {"1 x 8": (1, 8), "8 x 1": (8, 1), "2 x 4": (2, 4), "4 x 2": (4, 2), "around one": (3, 3)}
    return {name: _chi_squared(x, *window) for name, window in windows.items()}


def _chi_squared(x: Tensor, height: int, width: int) -> float:
    dropped = x > 0
    p = 1 / (1 + float(x.max()) ** 2)
    m, n = x.shape[0] // height, x.shape[1] // width
    blocks = dropped[: m * height, : n * width].reshape(m, height, n, width).transpose(1, 2).reshape(m * n, -1)
    if blocks.shape[1] == 9:
        blocks = blocks[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    found = torch.bincount((blocks.long() << torch.arange(8)).sum(1), minlength=256).double()
    ones = torch.tensor([float(bin(i).count("1")) for i in range(256)]).double()
    expected = m * n * p**ones * (1 - p) ** (8 - ones)
    # Rare patterns are one, so that the sum is chi-squared.
    often = expected >= 8
    if not often.all():
        found = torch.cat((found[often], found[~often].sum()[None]))
        expected = torch.cat((expected[often], expected[~often].sum()[None]))
    freedom = len(found) - 1
    return float((((found - expected).square() / expected).sum() - freedom) / math.sqrt(2 * freedom))


ALL: tuple[Statistic, ...] = (shares, rows, columns, diagonals, neighbours, rectangles, patterns)
