"""Tile programs run on fresh inputs and held against the float64 of their cases, by any form of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.tile_program import Program, Statement
from tests.passes.tile_cases import EPS, TILES, Case, largest


def operands(program: Program, rows: int, device: str = "cpu", batch: int = 1) -> list[Tensor]:
    """Fresh inputs: thin matrices are columns of a stack, as siblings have them; values have rows further apart than
    their length, or `batch` sequences."""
    dtype, n = getattr(torch, program.dtype), program.columns

    def one(kind: list[Any]) -> Tensor:
        if kind[0] == "number":
            return torch.rand((), device=device) + 0.5
        if kind[0] == "seed":
            return torch.randint(-(2**63), 2**63 - 1, (), device=device)
        if kind[0] == "full":
            if batch > 1:
                return torch.randn(batch, rows // batch, n, device=device)
            return torch.randn(rows, n + 16, device=device)[:, 8 : n + 8]
        if kind[0] == "row":
            return torch.rand((batch, rows // batch, 1) if batch > 1 else (rows, 1), device=device) + 0.5
        if kind[0] == "column":
            return torch.randn(n, device=device)
        if kind[0] == "parts":
            return torch.randn(kind[2], rows, kind[4], device=device) * kind[2] ** -0.5
        if kind[0] == "ends":
            return torch.randint(0, rows + 1, (kind[1],), device=device, dtype=torch.int32).sort().values
        if kind[0] == "thin":
            return torch.randn(rows, 3 * kind[1], device=device)[:, kind[1] : 2 * kind[1]]
        return torch.randn(*kind[3:], *((n, kind[1]) if kind[2] == "NR" else (kind[1], n)), device=device)

    def typed(kind: list[Any], tensor: Tensor) -> Tensor:
        if kind[0] in ("number", "seed", "parts", "ends"):
            return tensor
        # Factors have the size that keeps products near 1.
        scale = kind[1] ** -0.5 if kind[0] == "factor" else 1.0
        whole = tensor._base if tensor._base is not None else tensor
        whole = (whole * scale).to(dtype)
        # Of many random numbers one is 0, which has no logarithm.
        whole = whole.masked_fill(whole == 0, 1.0)
        return (
            whole if tensor._base is None else whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        )

    return [typed(kind, one(kind)) for kind in program.inputs]


Runner = Callable[[Program, list[Tensor], list[Tensor]], None]


def outputs(program: Program, inputs: list[Tensor], rows: int) -> list[Tensor]:
    """Memory for the outputs that holds NaN: all of it must be written."""
    parts = program.row_parts(rows)
    found = [program.output_shape(statement, rows, parts) for statement in program.outputs]
    return [inputs[0].new_full(sizes, float("nan"), dtype=dtype) for sizes, dtype in found]


def totals(program: Program, inputs: list[Tensor], results: list[Tensor]) -> list[Tensor]:
    """The outputs with their parts summed, those of each expert where there are some, or the largest of all; and
    without rows of nobody, where the program leaves what was there before."""
    ends = next((t for kind, t in zip(program.inputs, inputs) if kind[0] == "ends"), None)

    def total(statement: Statement, parts: Tensor) -> Tensor:
        if statement[0] == "largest":
            return parts.amax() if parts.numel() else parts.sum()
        if statement[0] == "store" and ends is not None and program.leaves_nobodys_rows:
            return parts[: int(ends[-1])]
        if statement[0] == "across" and ends is not None:
            return operators.sum_expert_parts(parts, ends, program.tile.rows, None, parts.dtype)
        return parts if program.is_whole(statement) else parts.sum(0)

    return [total(s, t) for s, t in zip(program.outputs, results, strict=True)]


def exactly(case: Case, program: Program, inputs: list[Tensor]) -> list[Tensor]:
    """What the case says about inputs, transposed where the program's order says so."""
    flat = [t.reshape(-1, t.shape[-1]) if k[0] in ("full", "row") else t for k, t in zip(program.inputs, inputs)]
    exact = case.exact(*(t if k[0] in ("seed", "ends") else t.double() for k, t in zip(program.inputs, flat)))
    return [
        t.mT if s[0] == "across" and s[3] == "RN" and t.shape[-2] != program.rank(s[2]) else t
        for s, t in zip(program.outputs, exact, strict=True)
    ]


def check(case: Case, program: Program, rows: int, run: Runner, device: str = "cpu", batch: int = 1) -> None:
    """One case: every output within its bound of float64, nothing of the inputs written, a second run equal."""
    inputs = operands(program, rows, device, batch)
    if case.mask is not None:
        inputs[case.mask] = inputs[case.mask] > 0
    before = [t.clone() for t in inputs]
    results = outputs(program, inputs, rows)
    # The second time into the first columns of wider memory.
    again = [t.new_empty(*t.shape[:-1], t.shape[-1] + 8)[..., : t.shape[-1]] for t in results]
    run(program, inputs, results)
    run(program, inputs, again)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before))
    assert _equal(program, inputs, results, again), "two runs differ"
    for statement, found, exact in zip(
        program.outputs, totals(program, inputs, results), exactly(case, program, inputs), strict=True
    ):
        if statement[0] == "store" and program.leaves_nobodys_rows:
            exact = exact[: len(found)]
        assert found.shape == exact.shape, statement
        assert found.isfinite().all(), statement
        if not exact.any():  # dropout leaves nothing of a very small matrix
            assert not found.any(), statement
            continue
        error = float((found.double() - exact).norm() / exact.norm())
        # A sum over few elements may cancel.
        room = 1 if min(rows, program.columns) > 16 else 8
        dtype = getattr(torch, program.dtype)
        # A sum that is stored is rounded once more, after the values that it is of.
        rounded = statement[0] == "down" and program.is_whole(statement)
        assert error <= room * (case.bound(dtype) + EPS[dtype] * rounded), (statement, error)
    _check_in_place(program, inputs, results, rows, run)


def check_order(case: Case, program: Program, run: Runner, device: str = "cpu") -> None:
    """The same results, to the bit, where the rows of sequences lie in turns, as in what is gathered along them."""
    step = program.tile.step if program.tile.walk == "rows" else program.tile.rows
    for length in {step, 2 * program.tile.rows}:  # a tile has rows of several blocks, or a block some tiles
        _check_order(case, program, run, device, length)


def _check_order(case: Case, program: Program, run: Runner, device: str, length: int) -> None:
    from lora_fx.passes.kernels import tile_launch

    batch = 3
    rows = batch * length
    inputs = operands(program, rows, device, batch)
    if case.mask is not None:
        inputs[case.mask] = inputs[case.mask] > 0
    results = outputs(program, inputs, rows)
    run(program, inputs, results)

    def in_turns(tensor: Tensor) -> Tensor:
        return tensor.view(batch, length, -1).transpose(0, 1).contiguous().transpose(0, 1)

    mine = [in_turns(t) if kind[0] == "full" else t for kind, t in zip(program.inputs, inputs)]
    made = [torch.full_like(t, float("nan")) for t in results]
    made = [in_turns(t) if s[0] == "store" else t for s, t in zip(program.outputs, made)]
    blocks = tile_launch.launch(program.dumps(), tile_launch.layouts(mine), tile_launch.layouts(made)).numbers
    assert {blocks[name] for name in blocks if name.endswith("_along")} == {length}
    run(program, mine, made)
    assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(made, results, strict=True))


def _equal(program: Program, inputs: list[Tensor], left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two runs have the same results, to the bit; of experts' sums the parts that count."""
    if program.experts:
        left, right = (totals(program, inputs, [t.contiguous() for t in each]) for each in (left, right))
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def check_not_finite(run: Runner, dtype: torch.dtype, device: str = "cpu") -> None:
    """The largest of what holds infinity is infinity, of what holds NaN NaN, as in ATen; each wherever it is."""
    case, rows, columns = largest(4), 100, 72
    for tile in TILES:
        program = case.program(columns, dtype, tile)
        for number in (float("inf"), -float("inf"), float("nan"), -65504.0):
            inputs = operands(program, rows, device)
            inputs[0][int(torch.randint(rows, ())), int(torch.randint(columns, ()))] = number
            results = outputs(program, inputs, rows)
            run(program, inputs, results)
            expected = torch.tensor(number, dtype=dtype).abs().float()
            for total in totals(program, inputs, results):
                torch.testing.assert_close(total.cpu(), expected, rtol=0.001, atol=0, equal_nan=True)


def _check_in_place(program: Program, inputs: list[Tensor], expected: list[Tensor], rows: int, run: Runner) -> None:
    """The same results when a stored value takes the memory of an input that it is computed from."""
    stores = [i for i, s in enumerate(program.outputs) if s == ["store", s[1], program.dtype]]
    full = [i for i, kind in enumerate(program.inputs) if kind[0] == "full" and inputs[i].dtype.itemsize == 2]
    if not stores or not full:
        return
    results, mine = outputs(program, inputs, rows), list(inputs)
    for out, i in zip(stores, full):
        mine[i] = inputs[i].reshape(-1, program.columns).clone(memory_format=torch.contiguous_format)
        results[out] = mine[i]
    run(program, mine, results)
    assert _equal(program, inputs, results, expected), "writing over an input changes the result"
