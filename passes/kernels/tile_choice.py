"""How a tile program walks, chosen by what it does and how large it is."""

from __future__ import annotations

from typing import Any

from lora_fx.passes.kernels.tile_program import Statement, Tile


def choose(kinds: list[list[Any]], body: list[Statement], rows: Any, columns: int) -> Tile | None:
    """The tile for a program, or None where a kernel would not pay."""
    if isinstance(rows, int) and rows < 256:
        return None
    across = sum(s[0] == "across" for s in body)
    down = sum(s[0] == "down" for s in body)
    heavy = sum(s[0] in ("product", "across", "down") for s in body) > 3
    if across and heavy:
        return Tile(rows=1024, columns=64, step=64, walk="rows", warps=4, stages=3)
    if across:
        return Tile(rows=1024, columns=128, step=64, walk="rows", warps=4, stages=3)
    if down:
        return Tile(rows=64, columns=2048, step=128, walk="columns", warps=4, stages=3)
    return Tile(rows=32, columns=128, step=32, walk="rows", warps=4, stages=2)
