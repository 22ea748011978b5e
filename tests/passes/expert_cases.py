"""Cases of `tests/passes/tile_cases.py` as those of experts: each has rows, and matrices, of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_fx.passes.kernels.tile_program import OUTPUTS, evaluate
from tests.passes import tile_checks
from tests.passes.tile_cases import TILES, Case, branch, dropped, infinite, norm, pair, swiglu, swiglu_backward

ROWS = {"full": 0, "row": 0, "thin": 0, "parts": 1}
"""The dimension of the rows, of inputs that have some."""


def of_experts(case: Case, experts: int) -> Case:
    """The case with a factor for each expert. Rows behind the last end are nobody's: products make zeros there."""
    inputs: list[list[Any]] = [[*kind, experts] if kind[0] == "factor" else kind for kind in case.inputs]
    kinds = [s[0] for s in case.body if s[0] in OUTPUTS]
    assert "largest" not in kinds  # of which there is none in a program of experts

    def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
        *given, ends = tensors
        m = next(t.shape[ROWS[k[0]]] for k, t in zip(inputs, given) if k[0] in ROWS)
        starts = [0, *map(int, ends)]
        found: list[list[Tensor]] = [[] for _ in kinds]
        for expert, (start, stop) in enumerate(zip(starts, [*starts[1:], m])):
            own = [
                t.narrow(ROWS[kind[0]], start, stop - start)
                if kind[0] in ROWS
                else (t[expert] if expert < experts else torch.zeros_like(t[0]))
                if kind[0] == "factor"
                else t
                for kind, t in zip(inputs, given)
            ]
            for kind, results, result in zip(kinds, found, case.exact(*own)):
                if expert < experts or kind in ("store", "down"):
                    results.append(result)
        joined = {"store": torch.cat, "down": torch.cat, "across": torch.stack}
        return tuple(joined[kind](each) for kind, each in zip(kinds, found))

    name = f"{case.name}, of {experts} experts"
    return replace(case, name=name, inputs=[*inputs, ["ends", experts]], exact=exact)


def grouped(case: Case) -> Case:
    """The case with values that are grouped products: what is stored of them has any values in rows of nobody."""
    inputs = [[*kind, "grouped"] if kind[0] == "full" else kind for kind in case.inputs]
    return replace(case, name=f"{case.name}, of grouped products", inputs=inputs)


CASES = [
    of_experts(branch(16, "NR", scaled=True), 3),
    of_experts(branch(5, "RN", scaled=False), 8),
    of_experts(pair(16, "NR"), 4),
    of_experts(pair(5, "RN"), 4),
    of_experts(pair(1, "RN"), 1),
    of_experts(swiglu(8, 24), 4),
    of_experts(swiglu_backward(16), 5),
    of_experts(norm(16).only(("across",)), 4),
    *(grouped(of_experts(case, 4)) for case in (branch(5, "RN", scaled=False), swiglu(8, 24), swiglu_backward(16))),
    of_experts(infinite(4, outputs=("down", "across", "store")), 4),
]


def check_nobodys_rows(run: tile_checks.Runner, device: str = "cpu") -> None:
    """Whatever is in them, NaN as well, no sum over rows contains it, nor what a row of somebody's gives."""
    cases = [of_experts(case, 4) for case in (pair(16, "NR"), swiglu(8, 24), norm(16))]
    for case in (*cases, grouped(cases[1])):
        for tile in (TILES[1], TILES[3]):
            program = case.program(72, torch.float16, tile)
            inputs = tile_checks.operands(program, 90, device)
            ends = next(t for kind, t in zip(program.inputs, inputs) if kind[0] == "ends")
            ends.clamp_(max=70)
            last = int(ends[-1])
            clean = tile_checks.outputs(program, inputs, 90)
            run(program, inputs, clean)
            for kind, tensor in zip(program.inputs, inputs):
                if kind[0] in ROWS:
                    tensor[last:] = float("nan")
            found = tile_checks.outputs(program, inputs, 90)
            run(program, inputs, found)
            pairs = zip(
                *(tile_checks.totals(program, inputs, [t.contiguous() for t in each]) for each in (clean, found))
            )
            for statement, (before, after) in zip(program.outputs, pairs):
                rows = slice(None) if statement[0] == "across" else slice(last)
                assert torch.equal(before[rows], after[rows]), (case, statement)


def check_left(run: tile_checks.Runner, device: str = "cpu") -> None:
    """A kernel does not write what is unspecified: rows of nobody, computed from grouped products, are as they were."""
    for case in (branch(5, "RN", scaled=False), swiglu(8, 24), swiglu_backward(16)):
        for tile in TILES:
            program = grouped(of_experts(case, 4)).program(72, torch.float16, tile)
            inputs = tile_checks.operands(program, 200, device)
            next(t for kind, t in zip(program.inputs, inputs) if kind[0] == "ends").clamp_(max=70)
            results = tile_checks.outputs(program, inputs, 200)
            run(program, inputs, results)
            stored = [result for s, result in zip(program.outputs, results) if s[0] == "store"]
            assert stored and all(bool(result[70:].isnan().all()) for result in stored), (case, tile)


def check_sums(sums: Callable[[Tensor, Tensor, int, Tensor | None, torch.dtype], Tensor], device: str = "cpu") -> None:
    """Of any share of rows, of some experts none; what is in the parts of nobody's rows, or of no rows, is not added.

    Twice, with the same result to the bit.
    """
    for experts, rows, tile, sizes in ((1, 9, 4, (3, 5)), (5, 100, 16, (48, 16)), (8, 300, 8, (700, 3))):
        ends = torch.randint(0, rows + 1, (experts,), dtype=torch.int32).sort().values
        ends[: experts // 2] = 0
        tiles = (ends.diff(prepend=ends.new_zeros(1)) + tile - 1) // tile
        parts = torch.full((-(-rows // tile) + experts, *sizes), float("nan"))
        parts[: int(tiles.sum())] = torch.randn(int(tiles.sum()), *sizes)
        scale = torch.rand(()) + 0.5
        exact = [each.double().sum(0) * scale for each in parts[: int(tiles.sum())].split(tiles.tolist())]
        parts, ends, scale = (t.to(device) for t in (parts, ends, scale))
        for found in (sums(parts, ends, tile, scale, torch.float32) for _ in range(2)):
            torch.testing.assert_close(found.cpu().double(), torch.stack(exact), rtol=1e-5, atol=1e-5)
        again = [sums(parts, ends, tile, None, torch.bfloat16) for _ in range(2)]
        assert torch.equal(*again)
        torch.testing.assert_close(again[0].cpu().double() * scale.cpu(), torch.stack(exact), rtol=0.01, atol=1e-3)


def check_masks(run: tile_checks.Runner, device: str = "cpu") -> None:
    """A mask belongs to an element of the value, whoever has the row; against the form that runs everywhere."""
    case = of_experts(dropped(16, 0.25), 3)
    for tile in TILES[1:]:
        program = case.program(72, torch.float16, tile)
        inputs = tile_checks.operands(program, 90, device)
        results, expected = tile_checks.outputs(program, inputs, 90), evaluate(program, inputs)
        run(program, inputs, results)
        for found, exact in zip(*(tile_checks.totals(program, inputs, each) for each in (results, expected))):
            torch.testing.assert_close(found, exact, rtol=0.002, atol=0.002)
