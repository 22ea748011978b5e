"""Models with a branch and what reads it, and the operations of the programs that are cut out around it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from lora_fx.passes.kernels.operators import beta_for
from lora_fx.passes.kernels.tile_program import Program
from tests.passes import on_gpu
from tests.passes.harness import Captured, Case, adapt, compare
from tests.passes.on_gpu import programs

bf16 = torch.bfloat16
K, N = 136, 264


def of(graph: Graph, *names: str) -> list[Program]:
    """The programs with all of these statements or operations."""
    return [p for p in programs(graph) if set(names) <= {s[0] for s in p.body} | {s[1] for s in p.body if s[0] == "op"}]


class After(nn.Module):
    """A linear and what reads its output."""

    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor], width: int = N) -> None:
        super().__init__()
        self.linear = nn.Linear(K, width, bias=False)
        self.other = nn.Linear(width, width, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x), self.other)


def after(function: Callable[[Tensor, nn.Module], Tensor], dtype: torch.dtype = bf16) -> nn.Module:
    return adapt(After(function).to(dtype), target_modules=["linear"])


def operations(program: Program) -> list[str]:
    """The pointwise operations of a program, but for the share that it stores of what a large product adds to."""
    share = [1.0 / beta_for(bf16)]
    stored = {s[1] for s in program.body if s[0] == "store"}
    return [
        s[1]
        for place, s in enumerate(program.body)
        if s[0] == "op" and not (place in stored and s[1] == "mul" and s[2][1] == share)
    ]


def forward_operations(captured: Captured) -> list[list[str]]:
    """Those of the forward graph's programs with a product."""
    (forward,) = captured.forward
    return [operations(program) for program in of(forward.graph, "product")]


def compared(build: Callable[[], nn.Module], sites: int, **more: Any) -> Captured:
    """The graphs as on a GPU of a model that is as accurate with its programs as plain torch.compile is."""
    case = Case("", build, sites, {}, **{"dtype": bf16, "shape": (160, K), "seeds": 4, **more})
    result = compare(case, on_gpu.by_graphs)
    result.assert_as_accurate()
    assert result.captured.reasons == []
    return result.captured
