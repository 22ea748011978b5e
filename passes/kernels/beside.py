"""h in the same product as y, where A lies behind its weight in memory.

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


def pays(m: Any, n: int, k: int, rank: int) -> bool:
    """Whether a product [m, k] x [k, n] should compute h as well, instead of a kernel that reads x once more.

    By the table; of 2048 rows it is neither a loss nor a gain.
    """
    few = isinstance(m, int) and m <= FEW_ROWS
    if 2 * n >= 5 * k:
        return few or (isinstance(m, int) and m <= MANY_ROWS) or rank <= HIGH_RANK
    return few and m >= 16


def are_beside(weight: Tensor, a: Tensor) -> bool:
    """Whether ``a``, [R, K], begins where ``weight``, [N, K], ends."""
    alike = weight.dtype == a.dtype and weight.device == a.device and weight.shape[1] == a.shape[1]
    whole = weight.is_contiguous() and a.is_contiguous()
    return alike and whole and a.data_ptr() == weight.data_ptr() + weight.numel() * weight.itemsize


def stacked_mm(x: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    """``[x weight^T, x a^T]``: x [M, K], weight [N, K], a [R, K]; gives [M, N + R], with gaps between its rows.

    Where the two do not lie together any more, as after a move of one of them, it is two products, and the log says so.
    """
    n, rank = weight.shape[0], a.shape[0]
    out = _memory(x, n + rank)
    if are_beside(weight, a):
        both = _both(weight.data_ptr(), n + rank, weight.shape[1], weight.dtype, weight.device)
        torch.mm(x, both.t(), out=out)
    else:
        _say_once()
        torch.mm(x, weight.t(), out=out[:, :n])
        torch.mm(x, a.t(), out=out[:, n:])
    return out


def stacked_mm_fake(x: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    """The result without values."""
    torch._check(x.dim() == weight.dim() == a.dim() == 2, lambda: f"{x.shape}, {weight.shape} and {a.shape}")
    torch._check(x.shape[1] == weight.shape[1] == a.shape[1], lambda: f"{x.shape}, {weight.shape} and {a.shape}")
    return _memory(x, weight.shape[0] + a.shape[0])


def _memory(x: Tensor, columns: int) -> Tensor:
    width = -(-columns // ALIGNED) * ALIGNED
    return x.new_empty_strided((x.shape[0], columns), (width, 1))


# It owns nothing: whoever gets it has tensors that do, at the same address.
@functools.lru_cache(maxsize=8192)
def _both(address: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return at_address(address, (rows, columns), dtype, device)


@functools.cache
def _say_once() -> None:
    log.warning(
        "weights or adapters were replaced after lora_fx.compile had laid them together in memory: there the product "
        "of the input with lora_a is computed by itself, which is slower and as right. Shard, move and load models "
        "before lora_fx.compile."
    )
