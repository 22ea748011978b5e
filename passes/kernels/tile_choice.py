"""How a tile program walks, chosen by what it does and how large it is.

The tiles are the best of up to eleven on an H200 for the programs of a Llama-3-8B block (M 8192, R 16, bfloat16).
Microseconds, and what moving the program's bytes takes at the rate of a copy:

    =====================================  ======  ====  ==========================================================
    program                                    us  copy  others that were tried
    =====================================  ======  ====  ==========================================================
    y = base + h B^T, N 4096                 39.4    31  42.6 to 54.6
    the same and a residual                  56.7    47  58.6 to 61.9
    dX = three products + g A, R 48          70.8    62  90 with 32 rows, where the rank is above 16
    h = x A^T, N 4096, R 16 to 48       25.9-27.2    16  26 to 43
    dA = g^T x, N 4096                       27.7    16  28 to 43
    g, dB of dy, N 4096                      28.0    16  30 to 49
    g, dB of dy, N 14336                     81.5    55  82 to 100
    silu(gate) * up and h of its result     186.4   164  189 to 320
    SwiGLU backward and dA                  371.1   273  378 to 914
    =====================================  ======  ====  ==========================================================
"""

from __future__ import annotations

from typing import Any

from lora_fx.passes.kernels.tile_program import Statement, Tile

# Below this a launch costs more than what it saves.
FEWEST_ROWS = 256
# Programs that keep every multiprocessor of a large GPU (132) busy twice over.
ENOUGH = 264


def choose(kinds: list[list[Any]], body: list[Statement], rows: Any, columns: int) -> Tile | None:
    """The tile for a program, or None where a kernel would not pay.

    Higher ranks get smaller tiles or fewer stages: what a step loads must fit into shared memory, twice if it can.
    """
    m = rows if isinstance(rows, int) else 1 << 13
    if m < FEWEST_ROWS:
        return None
    names = [statement[0] for statement in body]
    rank = max((kind[1] for kind in kinds if kind[0] in ("thin", "factor")), default=0)
    if "across" in names:
        if "product" in names:
            height = _shrunk(1024, 64, m, columns, 64)
            return Tile(rows=height, columns=64, step=64, walk="rows", stages=3 if rank <= 32 else 2)
        if "down" in names and rank <= 32 and columns > 8192:
            # Parts are fewer where they are longest: what it costs here (3 us) is less than what summing them did (9).
            return Tile(rows=_shrunk(512, 512, m, columns, 64), columns=512, step=32, walk="rows", strips=2, stages=3)
        if "down" in names and rank <= 32:
            height = _shrunk(512, 256, m, columns, 64)
            return Tile(rows=height, columns=256, step=64, walk="rows", strips=2, stages=3)
        width = 128 if rank <= 64 else 64
        height = _shrunk(1024, width, m, columns, 64)
        return Tile(rows=height, columns=width, step=64, walk="rows", stages=3 if rank <= 64 else 2)
    if "down" in names:
        width = _shrunk(2048, 64, columns, m, 128)
        heavy = "product" in names and rank > 32
        step, stages = (64 if heavy else 128), (2 if heavy and rank > 64 else 3)
        return Tile(rows=64, columns=width, step=step, walk="columns", stages=stages)
    height = 64 if rank > 16 else 32
    return Tile(rows=height, columns=128, step=height, walk="rows")


def _shrunk(length: int, width: int, along: int, across: int, least: int) -> int:
    """``length``, halved until there are enough programs of ``length`` x ``width`` in ``along`` x ``across``."""
    while length > least and -(-along // length) * -(-across // width) < ENOUGH:
        length //= 2
    return length
