"""Sums of two programs side by side in one matrix, on any device that runs kernels, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_fx.passes.kernels import part_sums, tile_launch
from lora_fx.passes.kernels.tile_program import Program, Statement, Tile
from tests.passes.tile_cases import EPS, operands, outputs


def check(tile: Tile, rows: int, columns: int, dtype: torch.dtype, device: str = "cpu", runs: int = 2) -> None:
    """Sums of two programs side by side in one matrix: to the bit what `sum_parts` makes of the parts of both, in every
    run, with counters that are zero again."""
    name = str(dtype).removeprefix("torch.")
    ranks = (16, 5)
    scales: list[Tensor | None] = []
    parts, calls = [], []
    for rank in ranks:
        kinds: list[list[Any]] = [["full"], ["factor", rank, "NR"], ["thin", rank], ["number"], ["counters"]]
        across: Statement = ["across", 0, 2, "NR"]
        apart = Program(columns, name, kinds[:3], [["load", 0], ["down", 0, 1], across], tile)
        inside = Program(columns, name, kinds, [["load", 0], ["sum", 0, 1, 3, name], across], tile)
        inputs = operands(inside, rows, device)
        left = outputs(apart, inputs[:3], rows)
        tile_launch.run(apart.dumps(), inputs[:3], left, [])
        if apart.is_whole(apart.outputs[0]):
            left[0] = left[0].float()[None]  # a part, rounded
        parts.append(left[0])
        scales.append(inputs[3])
        calls.append((inside, inputs, left[1]))
    (expected,) = part_sums.run(parts, scales, dtype, True)
    whole = any(len(part) == 1 for part in parts)
    for _ in range(runs):
        found = torch.full_like(expected, float("nan"))
        for (program, inputs, rest), first in zip(calls, (0, ranks[0]), strict=True):
            results = [found, torch.full_like(rest, float("nan"))]
            tile_launch.run(program.dumps(), inputs, results, [first])
            assert torch.equal(results[1], rest) and not inputs[4].any()
        if whole:
            torch.testing.assert_close(found, expected, rtol=4 * EPS[dtype], atol=1e-2)
        else:
            assert torch.equal(found, expected)
