"""Whether the kernel of a tile program fits a GPU's shared memory, before anybody has compiled it.

Tiles are chosen for Hopper (:mod:`lora_fx.passes.kernels.tile_choice`). Where one does not fit, a shallower pipeline
does, or half as many rows with half as many warps: Inductor would fail with a kernel that no launch of it fits.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from lora_fx.passes.kernels.tile_arithmetic import padded
from lora_fx.passes.kernels.tile_program import Program, Tile, join, split


def bound(program: Program, itemsizes: tuple[int, ...], major: int) -> int:
    """Bytes that the kernel needs at most, on a GPU of NVIDIA's with this major compute capability.

    Found by compiling the programs of a Llama-3-8B block for 8.0, 8.6, 8.9, 9.0 and 10.0 with Triton 3.6, which
    ``tests/passes/test_tile_memory.py`` does again: what a step loads, once for each stage of the pipeline (one less
    before Hopper, and for products of fewer rows than Hopper's instruction for them takes), what is loaded once, and a
    copy of each value that is an operand or a result of a product. On Hopper, where a pair of sums is near the limit,
    fewer are copied: two, or one sum of a pair while it is written. There thin matrices that stay, for one or two
    products and a sum along columns, are in registers, and only pass through it.

    Args:
        program: it.
        itemsizes: bytes of an element of each input.
        major: 8 for Ampere and Ada, 9 for Hopper, 10 and more for Blackwell.
    """
    tile, names = program.tile, [statement[0] for statement in program.body]
    down = tile.walk == "rows"
    rows, columns = (tile.step, tile.columns // tile.strips) if down else (tile.rows, tile.step)
    step = fixed = 0
    for kind, itemsize in zip(program.inputs, itemsizes, strict=True):
        if kind[0] == "full":
            step += tile.strips * rows * columns * itemsize
        elif kind[0] in ("thin", "parts", "factor"):
            along_rows = kind[0] != "factor"
            size = (rows if along_rows else columns * tile.strips) * padded(kind[1]) * 2
            step, fixed = (step + size, fixed) if along_rows == down else (step, fixed + size)
    value = rows * columns * 2
    copies = tile.strips * sum(names.count(name) for name in ("product", "down", "across")) * value
    if major == 9:
        ranks = [program.rank(s[2]) for s in program.body if s[0] in ("down", "across")]
        copies = rows * padded(max(ranks)) * 4 if program.sums_both_ways else 2 * value
        if not down and names.count("product") in (1, 2) and names.count("down") == 1:
            thin = [rows * padded(kind[1]) * 2 for kind in program.inputs if kind[0] == "thin"]
            fixed, copies = fixed - sum(thin), max([copies, *(value + size for size in thin)])
    # What the pipeline loads, an instruction reads that nobody waits for: of 64 rows, or of sums over rows or columns.
    ahead = major >= 9 and (rows >= 64 or "down" in names or "across" in names)
    return step * (tile.stages if ahead else max(tile.stages - 1, 1)) + fixed + copies


def fitted(text: str, itemsizes: list[int], device: torch.device) -> str | None:
    """The programs of ``text`` with pipelines that fit ``device``; None where that is not known.

    ``itemsizes``: bytes of an element of each input.
    """
    if torch.version.hip:
        return None
    found: Any = torch.cuda.get_device_properties(device)  # torch 2.13 does not say that it has the last of these
    return _fitted(text, tuple(itemsizes), found.major, found.shared_memory_per_block_optin)


@functools.lru_cache(maxsize=1024)
def _fitted(text: str, itemsizes: tuple[int, ...], major: int, limit: int) -> str | None:
    texts = []
    for program, sizes in split(text, list(itemsizes)):
        forms = (dataclasses.replace(program, tile=tile) for tile in _smaller(program))
        fit = next((form for form in forms if bound(form, tuple(sizes), major) < limit), None)
        if fit is None:
            return None
        texts.append(fit.dumps())
    return join(texts)


def _smaller(program: Program) -> list[Tile]:
    """The tile with fewer and fewer stages; a high one of 8 warps is halved with its warps before one stage is left.

    Not where outputs have a part for each tile of rows: they are allocated by then.
    """
    tile = program.tile
    shallower = [dataclasses.replace(tile, stages=stages) for stages in range(tile.stages, 0, -1)]
    is_high = tile.walk == "columns" and tile.rows == 128 and tile.warps == 8
    if not is_high or any(statement[0] in ("across", "largest") for statement in program.body):
        return shallower
    halves = [dataclasses.replace(tile, rows=64, warps=4, stages=stages) for stages in range(tile.stages + 1, 0, -1)]
    return [*shallower[:-1], *halves]
