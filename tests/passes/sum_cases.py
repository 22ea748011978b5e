"""Programs that sum their own parts: cases of `tests/passes/tile_cases.py` with sums in place of parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lora_fx.passes.kernels.tile_program import OUTPUTS
from tests.passes.tile_cases import Case, masked, pair, swiglu, swiglu_backward


def _summed(case: Case, scaled: bool = False) -> Case:
    """The same case with sums in place of their parts, all of them times a number or none."""
    inputs: list[list[Any]] = [*case.inputs, *([["number"]] if scaled else []), ["counters"]]
    number = len(case.inputs) if scaled else None
    body = [["sum", *s[1:3], number, "model"] if s[0] == "down" else s for s in case.body]
    sums = [s[0] == "sum" for s in body if s[0] in OUTPUTS]

    def exact(*given: Tensor) -> tuple[Tensor, ...]:
        own, rest = given[: len(case.inputs)], given[len(case.inputs) :]
        return tuple(t * rest[0] if scaled and is_sum else t for t, is_sum in zip(case.exact(*own), sums, strict=True))

    name = f"{case.name}, summed{' and scaled' if scaled else ''}"
    return Case(name, inputs, body, exact, case.exact_operands, case.mask)


CASES = [
    *(_summed(pair(r, order), r > 5) for r, order in ((1, "NR"), (5, "RN"), (16, "NR"), (33, "RN"), (64, "NR"))),
    _summed(swiglu(8, 24)),
    _summed(swiglu_backward(16), scaled=True),
    _summed(masked(16, 0.1)),
]
