"""How a tile program walks, chosen by what it does and how large it is.

The tiles are the best of 26 to 145 that a search tried on an H200 for the programs of a Llama-3-8B block (M 8192, R 16,
bfloat16; of 11 for those with masks). Microseconds with a cold cache, and what moving the program's bytes takes at the
rate of a copy. ``examples/benchmarks/tiles.py`` prints both for what is chosen, and with ``--tune`` for tiles near it.

    ===========================================  ======  ====  ====================================================
    program                                          us  copy  others that were tried
    ===========================================  ======  ====  ====================================================
    h B^T, N 4096                                  20.3    16  23.9 with 32 rows
    y = base + h B^T, and a residual               56.8    47  57.0 to 58.2
    h = x A^T, N 4096, R 16 to 48, one part        26.2    17  as long in parts, which another kernel has to sum
    dA = g^T x, N 4096, R 16 to 32                 25.6    17  27.4 with steps of 64
    g, dB of dy, N 4096                            27.8    20  32.9 with 256 rows, which are more parts
    g, dB of dy, N 14336                           74.0    62  85.5 with 512 rows and steps of 32
    silu(gate) * up and h of its result           185.3   167  198 in one part
    SwiGLU backward and dA                        348.2   279  363 with 1024 rows
    h of q, k and v under a mask each              66.6    17  89.5 with steps of 128
    dX of q, k and v under a mask each             61.3    16  68.8 with 32 rows
    SwiGLU backward and dA, R 64                  503.7   292  643.6 with 512 rows and 2 stages
    silu(gate) * up and h of its result, R 64     252.4   175  295.2 in parts of 1024 columns
    g, dB of dy, N 14336, R 64                    118.4   118  144.5 in parts of 128 columns
    ===========================================  ======  ====  ====================================================
"""

from __future__ import annotations

from typing import Any

from lora_fx.passes.kernels.tile_program import Statement, Tile

# Fewer are written out for Inductor (:mod:`lora_fx.passes.kernels.lowering`).
FEWEST_ROWS = 9
# Fewer have tiles of 16 rows: more programs, and smaller sums for each that reads parts.
FEW_ROWS = 256
# Programs that keep a large GPU (132 multiprocessors) busy: one on each, nearly, where a step loads much, else two.
BUSY, BUSY_TWICE = 128, 256


def choose(kinds: list[list[Any]], body: list[Statement], rows: Any, columns: int) -> Tile | None:
    """The tile for a program, or None where a kernel would not pay.

    Higher ranks get smaller tiles or fewer stages: what a step loads must fit into shared memory, twice if it can.
    So do masks, whose bits are held in registers.
    """
    m = rows if isinstance(rows, int) else 1 << 13
    if m < FEWEST_ROWS:
        return None
    names = [statement[0] for statement in body]
    rank = max((kind[1] for kind in kinds if kind[0] in ("thin", "factor")), default=0)
    if m < FEW_ROWS and "across" not in names:
        return _few(names, rank, m, columns)
    if "across" in names:
        return _across(names, rank, m, columns)
    if "down" in names:
        return _down(names, rank, m, columns)
    if "load" in names and rank <= 16 and "keep" not in names:
        return Tile(rows=32, columns=128, step=32, walk="rows", stages=3)
    return Tile(rows=64, columns=128, step=32 if "keep" in names else 64, walk="rows")


def _few(names: list[str], rank: int, m: int, columns: int) -> Tile:
    """For a few rows, which are not enough to keep a GPU busy without programs side by side."""
    if "down" not in names:
        return Tile(rows=16, columns=128, step=16, walk="rows")
    width = _shrunk(1024, 16, columns, m, 256, BUSY)
    return Tile(rows=16, columns=width, step=64 if rank > 32 or "keep" in names else 128, walk="columns", stages=3)


def _across(names: list[str], rank: int, m: int, columns: int) -> Tile:
    """For sums over rows, which are kept in registers while a program walks down."""
    if "product" in names:
        height = _shrunk(512 if rank <= 32 else 1024, 64, m, columns, 64, BUSY_TWICE)
        return Tile(rows=height, columns=64, step=32, walk="rows", stages=3 if rank <= 64 else 2)
    if "down" in names and rank <= 64:
        # Parts are fewer where they are longest.
        width, strips = (512, 4) if columns > 8192 and rank <= 32 else (256, 2)
        height = _shrunk(1024, width, m, columns, 64, BUSY)
        return Tile(rows=height, columns=width, step=64, walk="rows", strips=strips, stages=3)
    if "down" in names:
        height = _shrunk(1024, 64, m, columns, 64, BUSY_TWICE)
        return Tile(rows=height, columns=64, step=64, walk="rows", stages=2)
    width = 128 if rank <= 32 else 64
    height = _shrunk(512 if "keep" in names or rank > 32 else 1024, width, m, columns, 64, BUSY_TWICE)
    return Tile(rows=height, columns=width, step=32, walk="rows", stages=3 if "keep" in names or rank > 32 else 4)


def _down(names: list[str], rank: int, m: int, columns: int) -> Tile:
    """For sums over columns, which are kept in registers while a program walks along."""
    heavy = "product" in names and rank > 32
    if heavy and rank <= 64 and m >= 64 * BUSY:
        return Tile(rows=64, columns=-(-columns // 64) * 64, step=64, walk="columns", stages=4)
    if "product" in names or "keep" in names:
        width = _shrunk(1024, 64, columns, m, 128, BUSY_TWICE)
        step = 64 if heavy or names.count("keep") > 1 else 128
        return Tile(rows=64, columns=width, step=step, walk="columns", stages=2 if heavy and rank > 64 else 3)
    width = _shrunk(4096, 64, columns, m, 128, BUSY)
    # All columns in one part need no other kernel, and a deeper pipeline, as there are no more programs.
    return Tile(rows=64, columns=width, step=128, walk="columns", stages=5 if width >= columns and rank <= 48 else 3)


def _shrunk(length: int, width: int, along: int, across: int, least: int, enough: int) -> int:
    """``length``, halved until there are enough programs of ``length`` x ``width`` in ``along`` x ``across``."""
    while length > least and -(-along // length) * -(-across // width) < enough:
        length //= 2
    return length
