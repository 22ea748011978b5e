"""g = dy B and dB = dy^T h in one read of dy, as a Triton kernel.

Both products read dy [M, N], which is large, and write something of rank R, which is small, so each is bound by that
one read: a kernel that does both at once halves the bytes. A program takes ``ROWS`` rows and ``COLUMNS`` columns of dy,
walks down its rows, and keeps its part of dB in registers. The parts are summed afterwards, in a fixed order, by
whatever Inductor makes of a sum: no atomics, so two runs are equal to the bit.

    g_parts  [ceil(N / COLUMNS), M, R] float32        dB_parts [ceil(M / ROWS), N, R] float32
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STEP = 64


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]  # Triton's arguments are pointers, numbers and constants
    dy_ptr,
    b_ptr,
    h_ptr,
    g_ptr,
    db_ptr,
    M,
    N,
    R,
    dy_row,
    dy_column,
    b_row,
    b_column,
    h_row,
    h_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    part_m, part_n = tl.program_id(0), tl.program_id(1)
    n = part_n * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, RANK)
    b = tl.load(b_ptr + n[:, None] * b_row + r[None, :] * b_column, mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)
    db = tl.zeros((COLUMNS, RANK), tl.float32)
    for start in range(0, ROWS, STEP):
        m = (part_m * ROWS + start + tl.arange(0, STEP)).to(tl.int64)
        dy = tl.load(
            dy_ptr + m[:, None] * dy_row + n[None, :] * dy_column, mask=(m[:, None] < M) & (n[None, :] < N), other=0.0
        )
        inside = (m[:, None] < M) & (r[None, :] < R)
        h = tl.load(h_ptr + m[:, None] * h_row + r[None, :] * h_column, mask=inside, other=0.0)
        g = tl.dot(dy, b, input_precision=PRECISION)
        tl.store(g_ptr + (part_n.to(tl.int64) * M + m[:, None]) * R + r[None, :], g, mask=inside)
        db = tl.dot(tl.trans(dy), h, db, input_precision=PRECISION)
    inside = (n[:, None] < N) & (r[None, :] < R)
    tl.store(db_ptr + (part_m.to(tl.int64) * N + n[:, None]) * R + r[None, :], db, mask=inside)


def gradient_parts(dy: Tensor, b: Tensor, h: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """dy [M, N], b [N, R], h [M, R] of one dtype, any strides; the parts of dy @ b and of dy.T @ h, float32.

    ``rows`` (a multiple of 64) and ``columns`` (a power of two) of dy go to one program.
    """
    (m, n), r = dy.shape, b.shape[1]
    g = torch.empty(-(-n // columns), m, r, device=dy.device, dtype=torch.float32)
    db = torch.empty(-(-m // rows), n, r, device=dy.device, dtype=torch.float32)
    _kernel[(db.shape[0], g.shape[0])](
        dy,
        b,
        h,
        g,
        db,
        m,
        n,
        r,
        *dy.stride(),
        *b.stride(),
        *h.stride(),
        ROWS=rows,
        COLUMNS=columns,
        STEP=STEP,
        RANK=max(16, triton.next_power_of_2(r)),
        # TF32 would lose what float32 users asked for.
        PRECISION="ieee" if dy.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=3,
    )
    return g, db
