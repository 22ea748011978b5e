"""How a tile program walks, chosen by what it does and how large it is.

These tiles are the best, or within 3% of it, of 6 to 145 that a search tried on an H200 for the programs of a
Llama-3-8B block (M 8192, R 16, bfloat16), and on an H100 where the last column says so. Microseconds with a cold
cache, or right after a large product (*), when clocks are lower, and what moving the program's bytes takes at the rate
of a copy. ``examples/benchmarks/tiles.py`` prints the latter two for what is chosen, and with ``--tune`` for tiles near
it.

    ===========================================  ======  ====  ====================================================
    program                                          us  copy  others that were tried
    ===========================================  ======  ====  ====================================================
    h B^T, N 4096 *                                19.1    16  20.6 in 64 x 128
    h B^T, N 4096, R 64 *                          22.0    16  28.3 in 64 x 128
    y = base + h B^T, and a residual *             47.6    48  57.2 in 32 x 128 by 32, 47.2 in 64 x 128 by 32
    y = base + h B^T, and a residual, R 64 *       50.8    48  71.8 in 64 x 128
    y = base + h B^T, and a residual, R 128 *      57.3    48  76.9 in 64 x 128, 61.9 with 256 rows
    h = x A^T, N 4096, R 16 to 48, one part        26.2    17  as long in parts, which another kernel has to sum
    dA = g^T x, N 4096, R 16 to 32                 25.6    17  27.4 with steps of 64
    g, dB of dy, N 4096                            27.8    20  32.9 with 256 rows, which are more parts
    g, dB of dy, N 3584 *                          20.4    16  31.9 with 512 rows, of which not all run at once
    g, dB of dy, N 1024 *                           8.3     6  11.1 in 256 x 256
    g, dB of dy, N 14336                           74.0    62  85.5 with 512 rows and steps of 32
    g, dB of dy, N 11008 *                         58.8    48  63.7 in 512 columns
    g, dB of dy, N 5632 *                          31.0    25  38.0 in 256 columns, of which a third run last and
                                                               alone; 32.1 with 8 warps
    g, dB of dy, N 14336, M 2048 *                 20.5    16  35.9 in 256 x 512, 30.8 in 512 columns
    g, dB of dy, N 4096, R 64 *                    30.7    26  38.2 in 128 columns, 43.4 with 8 warps
    g, dB of dy, N 3072, R 64 *                    31.7    20  49.9 with 512 rows
    silu(gate) * up and h of its result *         185.1   167  192.3 in parts of 1024 columns, 202.7 in steps of 128
    SwiGLU backward and dA *                      310.9   279  318.7 with steps of 32, 333 with 1024 rows, 414 with
                                                               2 stages; M 512: 32.3 with steps of 32
    SwiGLU backward and dA, M 2048 *               86.3    70  94.5 with 512 rows, 83.9 with 1024
    SwiGLU backward and dA under a mask *         324.6   279  319.1 with steps of 32, 400 with 2 stages
    SwiGLU backward, dA and both dB, R 64 *       550.2   292  602.5 with 2048 rows, 595.7 with 4096, 585.4 with 512;
                                                               580 of 538.5 with products [N, R] x [R, M]
    the same of N 8192 *                          260.9        279.3 with 1024 rows, 266.4 with 4096
    silu(gate) * up and h of its result, R 64 *   270.1   168  304.0 in 64 x 7168 with 4 warps and 4 stages; in another
                                                               run 257.5, 264.1, and 303.8 in 64 x 14336 (two parts
                                                               take another kernel 5 to sum)
    the same of N 8192 *                          149.2        166.0 in 64 x 4096 with 4 warps and 4 stages
    h of q, k and v under a mask each              66.6    17  89.5 with steps of 128
    dX of q, k and v under a mask each             61.3    16  68.8 with 32 rows
    dA of q, k and v under a mask each             66.0    27  72.4 in one strip (H100)
    dA of gate and up under a mask each            49.3    25  56.2 in one strip (H100)
    g, dB of dy, N 14336, R 64                    118.4   118  144.5 in parts of 128 columns
    silu(gate) * up, R 64                         338.8   237  353 by columns (H100)
    silu(gate) * up, R 128                        300.0   175  341.8 in 64 x 64, 307.4 in 128 x 7168 by 32
    SwiGLU backward, R 128                        507.8   277  635.5 in 64 x 64, 593.8 with 256 rows, 624.5 by 16;
                                                               526.9 by columns (128 x 7168 by 32)
    SwiGLU backward, R 128 *                      597.0   277  733 in 64 x 64, 689 by columns (128 x 2048 by 32)
    SwiGLU backward, gate and up whole, R 128 *   321.6   277  371.5 in 1024 x 64 by 64, 336.0 with 256 rows
    silu(gate) * up, R 128 *                      365.5   175  410 in 64 x 64, 379 by 32, 423 in 1024 x 128 by 32
    dA = g^T x, N 4096, R 64                       37.4    22  39.1 with 512 rows and steps of 32 (H100)
    h = x A^T, N 4096, R 64 *                      21.1    16  24.2 with 3 stages, 20.9 in two parts
    ===========================================  ======  ====  ====================================================

SwiGLU backward of R 64 takes 451 us alone, at the clock rate that no large product has lowered, and 322 without its
three sums over rows, 405 with one. Nsight Compute finds shared memory 74% and the second-level cache 71% busy, and two
programs, of 252 registers, on a multiprocessor. Tried, of these 451: 4 stages 449, 2 stages 586, 5 stages 547; sums as
[R, N] 462; 128 columns and 8 warps 485, with sums as [R, N] 476; products as [N, R] x [R, M] 512; 2048 rows 493; steps
of 16 545, with 168 registers, so that there may be three programs, 549, with sums as [R, N] as well 518. Forward took
231 in one part. Other forms than tiles were variants of the source that are not kept. Right after a large product
backward takes 552, and 392 without its sums. With one of the three products left to cuBLAS, which takes 95 of R 128 to
write it: of R 128 588 instead of 597, of R 64 535. Of gate and up that are in memory whole (with room for B) it takes
687 with all three sums, for Triton computes them in three layouts; in two kernels, dA in its own, 609 in a step, where
clocks are lower still.

Tried with tensor descriptors, which the TMA unit moves, for what is loaded and stored (R 64, right after a large
product, in a run of its own, of a copy of the source without masks): backward 468.8 us in steps of 64 rows with 2
stages, next 502.1, of 481.1 without; forward 251.7 in 128 x 7168 with 8 warps and 3 stages, next 301.8 in 64 x 7168
with 4, and 505.4 with 8, of 270.1 without. Of N 8192: 275.5 of 287.7, and 138.6 of 149.2. Not kept, as launches would
have to make descriptors for a gain of 0.2% of a step.

Also tried of high ranks: values that are loaded straight into the registers of a product's result, rows and columns in
the order in which a warp group has them (64 x 64, wgmma, none of a value's bytes through shared memory). Right after a
large product silu(gate) * up takes 201 us of R 64 (229 without h of its result) and 310 of R 128 (363); backward 443
instead of 391 of R 64 and 597 to 640 instead of 600 of R 128, where it waits for its loads: the assembler puts those
for the next step at the end of a step, wherever they are written, and registers allow three programs. With h of its
result forward took 296 instead of 280, both in one part.

With few rows what counts is the chain of launches that a branch needs, pauses included, and that each of its readers
adds up h. Microseconds of a Llama-3-8B block without gradients on an H200 (R 16, CUDA graphs, rounds in turn; the
frozen block takes 162 to 171 for 64 tokens, 146 to 152 for one), by the rows and columns of a program that makes h of
x, and of one that makes silu(gate) * up and h of it::

    64 tokens   64 x 512, 16 x 512: 203.1;  16 x 256, 16 x 256: 203.1;  32 x 256, 32 x 256: 200.5
                64 x 512, 16 x 512: 195.5;  16 x 256, 16 x 512: 194.9;  16 x 256, 16 x 1024: 199.1     (another run)
                of these, with 8 warps for products: 190.4 of 194.6;  with 5 stages: 193.2             (another run)
    one token   16 x 512, 16 x 512: 179.4;  16 x 256, 16 x 256: 173.0;  as sums that Inductor fuses: 178.8
                16 x 256, 16 x 512: 167.0;  16 x 256, 16 x 256: 165.7;  as sums that Inductor fuses: 167.0  (another)

For 17 to 64 tokens the latter are two programs by now where a large product reads silu(gate) * up as well
(:func:`lora_fx.passes.tile_nodes.has_few_rows_of_tiles`). By the columns of a program that makes h of a value of 14336,
and of one of 4096 (64 tokens, each in a process of its own)::

    512 and 256: 198;  256 and 256: 199;  1024 and 256: 199;  512 and 512: 200;  1024 and 512: 200

A forward and backward of 128 tokens took 467.4 with 64 x 512 and 16 x 512, 465.4 with 16 x 256 and 16 x 512, 460.2 with
64 x 256 and 64 x 512. Products are fastest in 16 x 128 (of 16 to 64 x 64 to 256).

Programs of experts, which ask for each row whose it is, get the same tiles, but narrower ones up to rank 16 for a pair,
for several sums and for what is computed of three values; and none that walk down more rows than twice an expert's
share. On an H200, right after a large product (M 16384, R 16, 8 experts)::

    silu(gate) * up and h of it, N 5632           148.3  134  153.8 in parts of 256 columns
    SwiGLU backward and dA, N 5632                258.1  222  243.5 in 512 x 128
    g, dB of dy, N 5632                            62.0   51  88.1 in 256 columns, 63.9 with 512 rows
    y, g and dB of y, N 2048                       54.0   35  82.2 in 1024 x 256, 55.9 in 512 x 128 with 8 warps
    dA of gate and up, N 2048                      32.7   18  50.1 in 1024 x 128 by 32, 34.7 with 512 rows
    dX of gate and up, N 2048                      51.9   48  73.6 in 32 x 128, 53.3 in 128 x 128
    h of gate and up, N 2048                       22.9   16  21.5 by 64

A block of 512 tokens on an H100 (R 16, CUDA graphs, rounds in turn) took 993 us with as many programs as keep the GPU
busy, 975 with half as many, 994 with a quarter; one of 2048 tokens 3645 and, with half as many, 3651. Those of g and dB
were 256 columns wide then.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_fx.passes.kernels.tile_program import Statement, Tile

# More than a grid has rows of the smallest tiles.
MOST_ROWS = 65535 * 16
# Fewer do not keep a GPU busy without programs side by side, and a program that reads a sum of parts makes it itself.
FEW_ROWS = 256
# With more, a launch is short beside what kernels do: none is saved for the price of slower ones.
MOST_FOR_LAUNCHES = 2048
# Of a large GPU.
MULTIPROCESSORS = 132
# Up to so many rows, half of a GPU at work ends sooner than all of it and the sum of twice as many parts.
SHORT = 1024


def choose(kinds: list[list[Any]], body: list[Statement], rows: Any, columns: int) -> Tile | None:
    """The tile for a program, or None where a kernel would not pay.

    Ranks above 64 get none for few rows, nor for a product that is written and nothing else. Higher ranks get tiles of
    which what a step loads fits into shared memory, twice if it can. So do masks, whose bits are held in registers.
    """
    m = rows if isinstance(rows, int) else 1 << 13
    experts = next((kind[1] for kind in kinds if kind[0] == "ends"), 0)
    tile = _choose(kinds, body, m, columns, bool(experts))
    return tile if tile is None or not experts else _shared(tile, m / experts)


def _shared(tile: Tile, rows: float) -> Tile:
    """The tile for experts of so many rows: not so high that most of it would be empty."""
    height = tile.rows
    while tile.walk == "rows" and height > max(tile.step, 2 * rows):
        height //= 2
    return replace(tile, rows=height)


def _choose(kinds: list[list[Any]], body: list[Statement], m: int, columns: int, experts: bool) -> Tile | None:
    """The tile for a program of m rows, those of experts one behind the other."""
    if m > MOST_ROWS:
        return None
    names = [statement[0] for statement in body]
    rank = max((_rank(kinds, s[2]) for s in body if s[0] in ("product", "down", "across")), default=0)
    # One product that is written is cuBLAS's as well, for a large one to accumulate into (:mod:`tile_stacks`).
    if rank > 64 and (m < FEW_ROWS or (names.count("product") == 1 and "load" not in names)):
        return None
    if not any(s[0] == "load" and kinds[s[1]][0] == "full" for s in body):
        names = [name for name in names if name != "load"]  # a bias is nothing to wait for
    if m < FEW_ROWS and "across" not in names:
        return _few(kinds, names, rank, m, columns)
    if "across" in names:
        if experts and rank <= 16 and "product" not in names and "keep" not in names:
            if "down" in names:
                return _pair_of_experts([kind[0] for kind in kinds].count("full"), m, columns)
            if names.count("across") > 1:
                return Tile(rows=_capped(256, m), columns=128, step=64, walk="rows", stages=2)
        return _across(names, rank, m, columns, experts)
    if "down" in names:
        # What the bound of shared memory was found for (:func:`lora_fx.passes.kernels.tile_memory.bound`).
        few = (
            [kind[0] for kind in kinds].count("full") <= 2 and names.count("product") <= 2 and names.count("down") == 1
        )
        return _down(names, rank, m, columns, few and not experts and not {"keep", "largest"} & set(names))
    if rank > 32 and names.count("product") > 1 and "keep" not in names:
        if rank > 64 and names.count("product") > 2:  # wide: the factors, which stay, are read by fewer programs
            height = _shrunk(1024, 128, m, columns, 64, 2 * _enough(m))
            return Tile(rows=height, columns=128, step=32, walk="rows", stages=3)
        if rank > 64:
            # At most 2048 wide, less where there would be too few programs, and all about as wide.
            parts = max(-(-columns // 2048), min(-(-columns // 128), -(-2 * _enough(m) // -(-m // 64))))
            width = 64 * -(-columns // (64 * parts))
            return Tile(rows=64, columns=width, step=64, walk="columns", stages=3)
        height = _shrunk(1024, 64, m, columns, 64, 2 * _enough(m))
        return Tile(rows=height, columns=64, step=64, walk="rows")
    if "keep" in names or names.count("product") != 1:
        if experts and [kind[0] for kind in kinds].count("full") > 2 and rank <= 16 and "keep" not in names:
            return Tile(rows=_shrunk(256, 64, m, columns, 64, 512), columns=64, step=32, walk="rows", stages=3)
        if "load" in names and rank <= 16 and "keep" not in names:
            return Tile(rows=32, columns=128, step=32, walk="rows", stages=3)
        return Tile(rows=64, columns=128, step=32 if "keep" in names else 64, walk="rows")
    # The factor stays while a program walks down, and narrow programs have registers left for what is loaded.
    if names.count("load") > 2 and rank > 64:
        most, width, step = 512, 128, 32
    elif "load" in names:
        most, width, step = 256 if rank <= 64 else 512, 64, 64
    else:
        most, width, step = 256, 128, 64
    height = _shrunk(most, width, m, columns, 64, 256 * 128 // width)
    return Tile(rows=height, columns=width, step=step, walk="rows", stages=3)


def _rank(kinds: list[list[Any]], factor: int | list[int]) -> int:
    """R of a statement: of several factors together where it has them side by side."""
    return sum(int(kinds[index][1]) for index in (factor if isinstance(factor, list) else [factor]))


def _few(kinds: list[list[Any]], names: list[str], rank: int, m: int, columns: int) -> Tile:
    """For a few rows: parts, which every program that needs their sum can add up. The longest sums have wider ones."""
    if "down" not in names:
        return Tile(rows=16, columns=128, step=16, walk="rows", warps=8 if ["parts"] in [k[:1] for k in kinds] else 4)
    width = 512 if (m > 16 if "product" in names else columns > 8192) else 256
    narrow = rank > 32 or "keep" in names or "product" in names
    stages = 5 if "product" in names else 3
    return Tile(rows=16 if m <= 64 else 64, columns=width, step=64 if narrow else 128, walk="columns", stages=stages)


def _across(names: list[str], rank: int, m: int, columns: int, experts: bool) -> Tile:
    """For sums over rows, which are kept in registers while a program walks down."""
    if "product" in names:
        if rank <= 32:
            height = _height(512, 64, m, columns, 2)
        elif "keep" in names or experts:
            height = _shrunk(1024, 64, m, columns, 64, 2 * _enough(m))
        else:
            height = _shortest(2048, 64, m, columns, 2)
        # Half as many rows at a time take registers of which more programs share a multiprocessor.
        half = rank <= 32 if "keep" in names else rank <= 16 and m > SHORT
        return Tile(rows=height, columns=64, step=16 if half else 32, walk="rows", stages=3)
    if "down" in names:
        return _pair(rank, m, columns)
    if rank > 32 and "keep" not in names:
        height = _shrunk(1024, 64, m, columns, 64, 2 * _enough(m))
        return Tile(rows=height, columns=64, step=64, walk="rows", stages=3)
    width = 128 if rank <= 32 else 64
    masked = "keep" in names
    height = _shrunk(512 if masked else 1024, width, m, columns, 64, 2 * _enough(m))
    # Several sums of masked values would not fit into registers together: half of the columns after the other half.
    strips = 2 if masked and names.count("across") > 1 and width == 128 else 1
    return Tile(rows=height, columns=width, step=32, walk="rows", strips=strips, stages=3 if masked else 4)


def _pair(rank: int, m: int, columns: int) -> Tile:
    """For sums over rows and over columns of one value: as high and wide as keeps a GPU busy, so that parts are few."""
    if columns > 8192 and rank <= 16:
        if m <= SHORT:
            height = _shrunk(1024, 512, m, columns, 64, _enough(m))
            return Tile(rows=height, columns=512, step=64, walk="rows", strips=4, stages=3)
        # The last wave may leave most of a GPU idle. Of 14336 columns (8192 and 16384 tokens: 1 and 1.14 times as long,
        # by waves) and of 18944 (1.2) these are as fast as half as wide ones or a tenth faster, not of 11008 (1.33).
        if 5 * 2 * _waves(1024, 512, m, columns, 1) <= 6 * _waves(1024, 256, m, columns, 1):
            return Tile(rows=1024, columns=512, step=64, walk="rows", strips=4, stages=3)
    # Half as high they would still run all at once: better narrower, with the threads of two. (They share launches with
    # programs of as many threads alone, up to 2048 tokens.)
    if 2 * -(-m // 1024) * -(-columns // 256) <= MULTIPROCESSORS:
        height = _height(1024, 128, m, columns, 2 if rank <= 32 and m > SHORT else 1)
        return Tile(rows=height, columns=128, step=64, walk="rows", warps=8, stages=3)
    # Few programs behind the first wave: narrower ones share their memory between more multiprocessors.
    programs = -(-m // 1024) * -(-columns // 256)
    if rank <= 16 and MULTIPROCESSORS < programs < 3 * MULTIPROCESSORS // 2:
        return Tile(rows=_capped(1024, m), columns=128, step=64, walk="rows", stages=3)
    return Tile(rows=_capped(1024, m), columns=256, step=64, walk="rows", strips=2, stages=3)


def _pair_of_experts(values: int, m: int, columns: int) -> Tile:
    """The same of experts, whose ends take registers, and of what is computed of so many values: narrower."""
    if values > 1:
        return Tile(rows=_shrunk(256, 128, m, columns, 64, 128), columns=128, step=64, walk="rows", strips=2, stages=3)
    return Tile(rows=_shrunk(1024, 128, m, columns, 64, 256), columns=128, step=64, walk="rows", stages=3)


def _down(names: list[str], rank: int, m: int, columns: int, simple: bool) -> Tile:
    """For sums over columns, which are kept in registers while a program walks along.

    ``simple``: a program of one sum of at most two values and products, which may be high.
    """
    if "product" in names and rank > 32:
        if rank <= 64 and m > MOST_FOR_LAUNCHES and simple:
            # 128 rows read the factors of a step once, and leave a third stage room. One runs on a multiprocessor.
            widths = [max(128, 64 * -(-columns // (64 * parts))) for parts in range(1, 9)]
            width = min(widths, key=lambda width: width * _waves(128, width, m, columns, 1))
            return Tile(rows=128, columns=width, step=64, walk="columns", warps=8, stages=3)
        parts = -(-2 * _enough(m) // -(-m // 64))
        width = max(128, 64 * -(-columns // (64 * parts)))
        return Tile(rows=64, columns=width, step=64, walk="columns", stages=4)
    if "product" in names or "keep" in names:
        most = 512 if "product" in names and "keep" not in names else 1024
        width = _shrunk(most, 64, columns, m, 128, 2 * _enough(m))
        step = 64 if most == 512 or names.count("keep") > 1 else 128
        return Tile(rows=64, columns=width, step=step, walk="columns", stages=3)
    width = _shrunk(4096, 64, columns, m, 128, _enough(m))
    if width < columns:
        return Tile(rows=64, columns=width, step=128, walk="columns", stages=3)
    # All columns in one part need no other kernel, and a deeper pipeline, as there are no more programs.
    width = -(-columns // 128) * 128
    return Tile(rows=64, columns=width, step=128, walk="columns", stages=5 if rank <= 48 else 4)


def _enough(m: int) -> int:
    """How many programs a launch needs on a large GPU where a step loads much; else twice that.

    Nearly one on each, or half of that for a short input (512 rows were tried, and 2048, for which it is no gain).
    """
    return 64 if m <= SHORT else 128


def _height(most: int, width: int, m: int, columns: int, slots: int) -> int:
    """``most`` rows, halved while a launch ends a tenth sooner then: twice as many parts have to be summed."""

    def time(height: int) -> int:
        return height * _waves(height, width, m, columns, slots)

    height = _capped(most, m)
    while height > 64 and 10 * time(height // 2) <= 9 * time(height):
        height //= 2
    return height


def _shortest(most: int, width: int, m: int, columns: int, slots: int) -> int:
    """``most`` rows, or halved, with which a launch and the sums of its parts take least time, or 3% more.

    In steps of a row: to write and read a part of three sums of R 64 takes as long as 70 of N 14336.
    """
    heights = [_capped(most, m)]
    while heights[-1] > 64:
        heights.append(heights[-1] // 2)
    times = [height * _waves(height, width, m, columns, slots) + -(-m // height) * columns // 200 for height in heights]
    return next(height for height, time in zip(heights, times, strict=True) if 33 * time <= 34 * min(times))


def _waves(height: int, width: int, m: int, columns: int, slots: int) -> int:
    """How many programs run one after the other where a multiprocessor has ``slots`` of them at a time."""
    programs = -(-m // height) * -(-columns // width)
    return -(-programs // (slots * MULTIPROCESSORS))


def _shrunk(length: int, width: int, along: int, across: int, least: int, enough: int) -> int:
    """``length``, halved until there are enough programs of ``length`` x ``width`` in ``along`` x ``across``."""
    length = _capped(length, along, least)
    while length > least and -(-along // length) * -(-across // width) < enough:
        length //= 2
    return length


def _capped(length: int, along: int, least: int = 64) -> int:
    """``length``, halved while half of it holds all that there is."""
    while length > least and length >= 2 * along:
        length //= 2
    return length
