"""h in the same product as y, where A lies behind its weight in memory, and siblings in one product.

    weight: [N, K]   A: [R, K]   at weight's end            [y, h] = x [weight; A]^T      [M, N + R]

``lora_fx.compile`` lays them so on a GPU (:mod:`lora_fx.beside`). cuBLAS then computes h by the way, in tiles for which
there is room anyway. Microseconds that R more columns take on an H200 (bfloat16; torch 2.11), and what reading x once
more for h would::

    M        N x K           alone    R 8     16     32     48     64    128     h = x A^T, R 16 to 48
    64       4096 x 4096      11.7   +0.1    0.0   +0.3    0.0                    2.9
    64       14336 x 4096     34.1   +0.2    0.0    0.0   -0.1                    2.9
    64       4096 x 14336     36.4   -0.1   +0.1   +0.1   -0.5                    3.1
    512      4096 x 4096      28.3   +0.3    0.0    0.0   +0.1                    3.5
    512      1024 x 4096      10.2   +0.6   +0.3   +1.1   +1.0                    3.5
    512      14336 x 4096    104.8  -11.1  -12.3  -12.8  -12.4                    3.5
    512      4096 x 14336     94.6    0.0   -0.1   -0.2   -0.3
    2048     4096 x 4096     102.0          +0.2   +0.1   +0.2   +0.2   +0.6     6.1
    2048     1024 x 4096      27.2          +2.6   +2.6   +2.6   +2.5   +2.7     6.1
    2048     14336 x 4096    363.9          +6.7   +0.7   +8.8   +0.7   +1.2     6.1
    2048     4096 x 14336    345.2          +1.9    0.0   +0.5   +0.7   +0.5
    8192     4096 x 4096     414.9         +21.4   +5.6  +21.5   +5.7   +2.9    26
    8192     1024 x 4096     102.5          +5.6   +3.2   +6.3  +12.2  +13.0    26
    8192     14336 x 4096   1438.0         -21.3  -22.3  -21.8   -7.4  +10.0    26
    8192     4096 x 14336   1401.3         +50.6  +20.3  +50.4  +15.0  +19.7
    1        4096 x 14336     32.1   +2.7   +2.0   +2.5   +2.3

Negative numbers are cuBLAS's choice of another kernel. Rows were no further apart than they are long; with room between
them, N 14336 takes 13 us less for R 16 or 32 and as long for R 64, whatever the room (M 8192, rounds in turn).

Above rank 32 and 2048 rows silu(gate) * up loses what that gains: in a step of rank 64 it took 350 us of rows with gaps
and 297 of rows without, where by itself it takes 295 of either.
"""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any

import torch
from torch import Tensor

from lora_fx.passes._torch import at_address

log = logging.getLogger("lora_fx.passes")

ALIGNED = 64
"""Elements that a row's distance from the next is a multiple of."""

FEW_ROWS = 64
"""Rows up to which h takes a kernel of its own even of what a kernel of ours makes, as silu(gate) * up is."""

MANY_ROWS, HIGH_RANK = 2048, 32
"""Rows above which it is no gain for a rank above this."""

EACH_ROWS = range(256, 1025)
"""Rows of which cuBLAS is faster at gate and up one by one, each with its h, up to that rank."""


def pays(m: Any, n: int, k: int, rank: int) -> bool:
    """Whether a product [m, k] x [k, n] should compute h as well, instead of a kernel that reads x once more.

    By the table; of 2048 rows it is neither a loss nor a gain.
    """
    few = isinstance(m, int) and m <= FEW_ROWS
    if 2 * n >= 5 * k:
        return few or (isinstance(m, int) and m <= MANY_ROWS) or rank <= HIGH_RANK
    return few and m >= 16


def pays_together(m: Any, rank: int, written: bool, alone: bool) -> bool:
    """Whether one product should make y and h of siblings, instead of one for each y and one for all h.

    Or of one for each y and its h, where that would pay: ``alone``.

    Where the sum of y and its branch is ``written``, as of q, k and v, that rounds twice what a product that adds
    itself to the branch's rounds once: with many tokens it saves less than it is worth, a thousandth of the step.

    By the table of :mod:`lora_fx.passes.sibling_gradients`, and with few tokens by this one: microseconds on an H200
    (K 4096, R 16, CUDA graphs, weights not in the cache) of the products of the weights alone, of those and one of h,
    of ``stacked_mm`` for each, and for all. A script made it that is not kept; ``examples/benchmarks/products.py``
    times the same::

        siblings   M      frozen   and h   each    together
        q, k, v    1        28.3    36.0    28.9       16.1
        q, k, v    16       29.3    37.3    29.8       16.3
        q, k, v    64       28.5    36.1    30.2       16.6
        q, k, v    512      51.6    60.9    51.2       38.3
        q, k, v    2048    163.5   169.5   162.4      155.7
        gate, up   1        60.4    66.8    61.5       56.2
        gate, up   16       64.6    71.3    60.5       60.7
        gate, up   64       65.9    72.7    66.1       60.6
        gate, up   512     212.7   207.9   174.6      198.3
        gate, up   2048    727.9   737.5   739.7      706.9

    (gate and up of 512 tokens and rank 64: 217.5, 208.3, 196.0 and 173.6.)
    """
    if written or rank > HIGH_RANK:
        return isinstance(m, int) and m <= MANY_ROWS
    return not (alone and isinstance(m, int) and m in EACH_ROWS)


def are_beside(weight: Tensor, a: Tensor) -> bool:
    """Whether ``a``, [R, K], begins where ``weight``, [N, K], ends."""
    alike = weight.dtype == a.dtype and weight.device == a.device and weight.shape[1] == a.shape[1]
    whole = weight.is_contiguous() and a.is_contiguous()
    return alike and whole and a.data_ptr() == weight.data_ptr() + weight.numel() * weight.itemsize


def stacked_mm(x: Tensor, rows: list[Tensor]) -> Tensor:
    """``x [rows_1; rows_2; ...]^T``: x [M, K], rows [N_i, K] each, weights and factors; gives [M, sum of N], with gaps.

    A product for all rows that lie one behind the other in memory. If a factor does not lie behind its weight any more,
    as after a move of one of them, the log says so.
    """
    out, start = _memory(x, sum(len(part) for part in rows)), 0
    for part in _together(rows):
        torch.mm(x, part.t(), out=out[:, start : start + len(part)])
        start += len(part)
    return out


def stacked_mm_fake(x: Tensor, rows: list[Tensor]) -> Tensor:
    """The result without values."""
    sizes = [part.shape for part in rows]
    torch._check(all(size[1] == x.shape[1] for size in sizes), lambda: f"{x.shape} and {sizes}")
    return _memory(x, sum(part.shape[0] for part in rows))


def joined_mm(both: Tensor, rows: list[Tensor]) -> Tensor:
    """``both [rows_1; rows_2; ...]``: both [M, sum of N], rows [N_i, K] each; gives [M, K].

    As :func:`stacked_mm`; where several products are needed, each adds itself to those before.
    """
    out, start = both.new_empty(both.shape[0], rows[0].shape[1]), 0
    for part in _together(rows):
        columns = both[:, start : start + len(part)]
        if start == 0:
            torch.mm(columns, part, out=out)
        else:
            out.addmm_(columns, part)
        start += len(part)
    return out


def joined_mm_fake(both: Tensor, rows: list[Tensor]) -> Tensor:
    """The result without values."""
    inner = sum(part.shape[0] for part in rows)
    torch._check(both.shape[1] == inner, lambda: f"{both.shape} and {inner} rows")
    return both.new_empty(both.shape[0], rows[0].shape[1])


def side_by_side(parts: list[Tensor], starts: list[int], columns: int) -> Tensor:
    """Matrices [M, N_i] as the columns of one [M, columns] that begin at ``starts``; others hold anything."""
    # Not anything, here: oneDNN (of torch 2.13, with AMX) multiplies what lies behind a row's end by zero.
    out = parts[0].new_zeros(parts[0].shape[0], columns)
    put_(out, parts, starts)
    return out


def side_by_side_fake(parts: list[Tensor], starts: list[int], columns: int) -> Tensor:
    """The result without values."""
    return parts[0].new_empty(parts[0].shape[0], columns)


def put_(target: Tensor, parts: list[Tensor], starts: list[int]) -> None:
    """Write matrices [M, N_i] over the columns of ``target`` that begin at ``starts``."""
    for part, start in zip(parts, starts, strict=True):
        target[:, start : start + part.shape[1]].copy_(part)


def _together(rows: list[Tensor]) -> list[Tensor]:
    """As few matrices as have those rows, each of those that lie one behind the other."""
    runs = [[rows[0]]]
    for part, after in itertools.pairwise(rows):
        if are_beside(part, after):
            runs[-1].append(after)
        else:
            runs.append([after])
    if not all(are_beside(weight, a) for weight, a in zip(rows[::2], rows[1::2])):
        _say_once()
    return [run[0] if len(run) == 1 else _both(run[0], sum(len(part) for part in run)) for run in runs]


def _memory(x: Tensor, columns: int) -> Tensor:
    width = -(-columns // ALIGNED) * ALIGNED
    return x.new_empty_strided((x.shape[0], columns), (width, 1))


def _both(first: Tensor, height: int) -> Tensor:
    return _seen(first.data_ptr(), height, first.shape[1], first.dtype, first.device)


# It owns nothing: whoever gets it has tensors that do, at the same address.
@functools.lru_cache(maxsize=8192)
def _seen(address: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return at_address(address, (rows, columns), dtype, device)


@functools.cache
def _say_once() -> None:
    log.warning(
        "weights or adapters were replaced after lora_fx.compile had laid them together in memory: there the product "
        "of the input with lora_a is computed by itself, which is slower and as right. Shard, move and load models "
        "before lora_fx.compile."
    )
