"""What the program of a row of tiles does that is the last one to end: it adds up the parts of the row's sums.

A kernel's programs (in the GPU's sense) that share rows each leave a part of ``value @ factor``. They count themselves
in a counter of the row when they have. The one that finds all others counted adds the parts up and writes what they
come to, where else a kernel of its own would (:mod:`lora_fx.passes.kernels.part_sums`). Which program that is varies;
what it adds up, and in which order, does not, so that two runs, and both forms, are equal to the bit.

The counter is zero again when the kernel ends, and a kernel of the same stream that uses it next begins after that.
So one buffer of zeros serves a graph, a graph that is replayed, and a second backward over one forward. Each run of a
graph makes its own (:mod:`lora_fx.passes.tile_own_sums`): there is nothing for two streams to share, and nothing that a
launch which was aborted could leave behind.
"""

from __future__ import annotations

from triton import next_power_of_2

from lora_fx.passes.kernels.tile_program import Program

AT_ONCE, ADDED = 8, "((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))"
"""How parts are added up, whoever does it: so many at a time, and those in this order."""

# Elements that are added up at a time. With eight loads of 16 in each of 128 threads 64 KiB are on their way, which is
# what a multiprocessor has to ask for: 64 bytes a clock for the 0.6 us that the second-level cache takes to answer.
_BLOCK = 2048


def count(program: Program) -> list[str]:
    """How a program counts itself, behind the stores of its parts."""
    return [
        # Every thread of this program has stored its elements of the parts before one of them counts the program: the
        # barrier orders the stores of all before what that thread does next.
        "tl.debug_barrier()",
        # One thread counts. That releases to the whole GPU what it has stored and seen stored, that is, the parts that
        # all threads stored before the barrier; and it acquires what the programs counted before have released. Triton
        # hands the result to the other threads through shared memory and a barrier, so their loads below come after.
        f'arrived = tl.atomic_add({_counter(program)}, 1, sem="acq_rel", scope="gpu")',
    ]


def add(program: Program, scales: dict[int, str]) -> list[str]:
    """How the last program of a row adds up the parts of all.

    Args:
        program: with sums among its outputs, whose parts are at ``part<i>`` and rows ``pitch<i>`` apart in ``out<i>``.
        scales: the name of the number that sum ``i`` is multiplied by, where it is.
    """
    parts, inside = program.column_parts, []
    for out, statement in enumerate(program.outputs):
        if statement[0] == "sum":
            rank = program.rank(statement[2])
            inside += _sum(out, rank, parts, program.tile.rows, scales.get(out), statement[4])
    # All programs of the row have been counted: nobody reads it before the next kernel.
    inside.append(f"tl.store({_counter(program)}, 0)")
    return [f"if arrived == {parts - 1}:", *(f"    {line}" for line in inside)]


def _counter(program: Program) -> str:
    return f"in{program.inputs.index(['counters'])} + pm"


def _sum(out: int, rank: int, parts: int, rows: int, scale: str | None, dtype: str) -> list[str]:
    """Add up the parts of one sum, whose elements of these rows are next to one another in each part."""
    count = rows * rank
    block = min(_BLOCK, next_power_of_2(count))
    # From the second-level cache: that of the first level belongs to one multiprocessor, and may hold what was in this
    # memory before others stored to it.
    loads = [
        f"v{k} = tl.load(part{out} + (p + {k}) * size + (pm.to(tl.int64) * {count} + e), "
        f'mask=there{f" & (p + {k} + none < {parts})" if parts % AT_ONCE else ""}, other=0.0, cache_modifier=".cg")'
        for k in range(AT_ONCE)
    ]
    return [
        f"size = tl.full((), {rank}, tl.int64) * M",
        f"for block in range(0, {-(-count // block)}):",
        f"    e = block * {block} + tl.arange(0, {block})",
        f"    there = (e < {count}) & ((e < (M - pm * {rows}) * {rank}) | EVEN_ROWS)",
        f"    total = tl.zeros(({block},), tl.float32)",
        "    none = 0 * e",  # makes a tensor of a condition that is a number in the interpreter
        f"    for p in range(0, {parts}, {AT_ONCE}):",
        *(f"        {line}" for line in loads),
        f"        total += {ADDED}",
        f"    place = (pm.to(tl.int64) * {rows} + e // {rank}) * pitch{out} + e % {rank}",
        f"    tl.store(out{out} + place, ({f'total * {scale}' if scale else 'total'}).to(tl.{dtype}), mask=there)",
    ]
