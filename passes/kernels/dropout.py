"""Which elements dropout keeps, as a function of a seed and of the element's place.

The same bits come out wherever a mask is computed: in a tile of a kernel, in Inductor's code, in eager ATen; and so a
mask is computed again in backward, and in every kernel that needs it, instead of being written anywhere. One hash of 32
bits serves two neighbours of a row, 16 bits each, so p is rounded to a multiple of 1/65536 (which is closer than the
comparison in bfloat16 that dropout under ``torch.compile`` may make). Philox, which Inductor's random numbers
come from, takes ten rounds of two wide multiplications an element.

    low, high = mix(low half of the seed), mix(high half of the seed ^ low)
    row key = mix(row ^ low) ^ high
    bits    = last(row key ^ pair * odd),  pair = column // 2
    kept    = (column odd ? bits >> 16 : bits & 0xFFFF) >= round(p * 65536)

``mix`` is the bijection of 32 bits with the constants [16 21f0aaad 15 735a2d97 15] that Hash Function Prospector found
(https://github.com/skeeto/hash-prospector/issues/19, bias 0.107): each bit of its input changes each bit of its result
with a probability of one half, nearly. ``last`` is ``mix`` without its first step, for the row keys are mixed already,
and the pairs of a row, times an odd number, differ in low bits, which a product carries up. Shares, correlations of
rows and of columns, diagonals, products of neighbours and of rectangles' corners and patterns of eight are those of
independent draws. With either multiplication left out correlations of rows are not (``tests/passes/mask_statistics``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Steps = tuple[tuple[int | None, int | None], ...]

MIX: Steps = ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, None))
"""Steps of ``x ^= x >> shift; x *= factor``."""
LAST: Steps = ((None, 0x21F0AAAD), (15, 0x735A2D97), (15, None))
"""Likewise, for each pair of elements."""
ODD = 0x5BD1E995
"""Spreads the pairs of a row over all 32 bits: rows whose keys are close must not share bits in other places."""

_BITS = 0xFFFFFFFF
_aten, _prims = torch.ops.aten, torch.ops.prims


def threshold(p: float) -> int:
    """The smallest 16 bits that are kept at a probability ``p`` of dropping; one in 65536 is kept at least."""
    return min(round(p * 65536), 65535)


def _call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def keep(seed: Any, size: Sequence[Any], p: float, device: torch.device, call: Callable[..., Any] = _call) -> Any:
    """A bool tensor of ``size`` [..., N] that is true for what is kept, as ATen operators on 64-bit numbers.

    Products of 32-bit numbers with factors below 2^31 fit, so nothing depends on what an overflow does.

    Args:
        seed: a 0-d int64 tensor, or what ``call`` takes for one.
        size: numbers of elements, likewise.
        p: the probability of dropping an element, in [0, 1).
        device: where the mask is made.
        call: calls an operator; to put the operators into a graph, what adds a node.
    """
    rows = None
    for count in size[:-1]:
        rows = count if rows is None else call(operator.mul, rows, count)
    m, n = (
        call(_prims.iota.default, count, start=0, step=1, dtype=torch.int64, device=device, requires_grad=False)
        for count in (rows, size[-1])
    )
    low = _mixed(call(_aten.bitwise_and.Scalar, seed, _BITS), call)
    high = call(_aten.bitwise_and.Scalar, call(_aten.bitwise_right_shift.Tensor_Scalar, seed, 32), _BITS)
    high = _mixed(call(_aten.bitwise_xor.Tensor, high, low), call)
    key = call(_aten.bitwise_xor.Tensor, _mixed(call(_aten.bitwise_xor.Tensor, m, low), call), high)
    pair = call(_aten.bitwise_right_shift.Tensor_Scalar, n, 1)
    pair = call(_aten.bitwise_and.Scalar, call(_aten.mul.Tensor, pair, ODD), _BITS)
    bits = _mixed(call(_aten.bitwise_xor.Tensor, call(_aten.unsqueeze.default, key, 1), pair), call, LAST)
    shift = call(_aten.mul.Tensor, call(_aten.bitwise_and.Scalar, n, 1), 16)
    half = call(_aten.bitwise_and.Scalar, call(_aten.bitwise_right_shift.Tensor, bits, shift), 0xFFFF)
    return call(_aten.view.default, call(_aten.ge.Scalar, half, threshold(p)), list(size))


def _mixed(x: Any, call: Callable[..., Any], steps: Steps = MIX) -> Any:
    for shift, factor in steps:
        if shift is not None:
            x = call(_aten.bitwise_xor.Tensor, x, call(_aten.bitwise_right_shift.Tensor_Scalar, x, shift))
        if factor is not None:
            x = call(_aten.bitwise_and.Scalar, call(_aten.mul.Tensor, x, factor), _BITS)
    return x


def keep_eager(seed: Tensor, size: Sequence[Any], p: float) -> Tensor:
    """``keep`` on the device of its seed."""
    kept: Tensor = keep(seed, size, p, seed.device)
    return kept
