"""The largest magnitude of a value, found where the value is made: for bases that cast to float8."""

from collections.abc import Callable

import pytest
import torch
from benchmarks.float8 import install_float8
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.fx import Graph

from lora_fx.passes.graph import aten, is_call, shape
from tests.passes import on_gpu
from tests.passes.harness import adapt
from tests.passes.modules import Mlp
from tests.passes.on_gpu import programs
from tests.passes.regions import after, compared

bf16 = torch.bfloat16


def float8_mlp() -> nn.Module:
    module = Mlp(128, 256).to(bf16)
    install_float8(module)
    return adapt(module)


def torchao_mlp() -> nn.Module:
    float8 = pytest.importorskip("torchao.float8")
    return adapt(float8.convert_to_float8_training(Mlp(128, 256).to(bf16)))


def wanted(graph: Graph) -> list[int]:
    """How many magnitudes every program finds the largest of, where it finds any."""
    counts = [[s[0] for s in p.body].count("largest") for p in programs(graph)]
    return [count for count in counts if count]


@pytest.mark.slow
@pytest.mark.parametrize("build", [float8_mlp, torchao_mlp])
@pytest.mark.usefixtures("without_onednn")
def test_swiglu_over_float8(build: Callable[[], nn.Module]) -> None:
    """z in forward, both gradients in backward: what is as wide as the hidden layer is read by its casts alone."""
    captured = compared(build, 3, shape=(160, 128))
    forward, backward = captured.forward[0].graph, captured.backward[0].graph
    assert wanted(forward) == [1] and wanted(backward) == [2]
    for graph in (forward, backward):
        # The weights' remain, and in backward dX's, which is another kernel's.
        wide = [n for n in graph.nodes if is_call(n, aten.abs.default) and tuple(shape(n)) == (160, 256)]
        assert wide == []


def test_as_a_graph() -> None:
    with torch.no_grad():
        module = after(lambda y, other: other(y) * y.abs().amax())
        captured = on_gpu.capture(module, torch.randn(160, 136, dtype=bf16))
    assert_expected_inline(
        on_gpu.text(captured.forward[0].graph),
        """\
%0 = input bf16[264, 136]
%1 = input bf16[160, 136]
%2 = input f32[]
%3 = input f32[]
%4 = input bf16[4, 136]
%5 = input bf16[264, 4]
%6 = input bf16[264, 264]
%7 = permute(%0, [1, 0]) bf16[136, 264]
%8 = mm(%1, %7) bf16[160, 264]
%9 = empty([160, 4], dtype=bf16, device=cpu) bf16[160, 4]
%10 = tile(outputs=[%9], program=#0, inputs=[%1, %4]) (None, (bf16[160, 4]))
%11 = getitem(%10, 1) (bf16[160, 4])
%12 = getitem(%11, 0) bf16[160, 4]
%13 = permute(%6, [1, 0]) bf16[264, 264]
%14 = empty([1, 9], dtype=f32, device=cpu) f32[1, 9]
%15 = tile(outputs=[%8, %14], program=#1, inputs=[%12, %5, %2, %3, %8]) (None, (bf16[160, 264], f32[1, 9]))
%16 = getitem(%15, 1) (bf16[160, 264], f32[1, 9])
%17 = getitem(%16, 0) bf16[160, 264]
%18 = mm(%17, %13) bf16[160, 264]
%19 = getitem(%16, 1) f32[1, 9]
%20 = amax(%19, []) f32[]
%21 = convert_element_type(%20, bf16) bf16[]
%22 = mul(%18, %21) bf16[160, 264]
return %22
#0: bfloat16, 136 columns; in0 full, in1 factor 4 RN
    0: load in0
    1: down %0 in1
#1: bfloat16, 264 columns; in0 thin 4, in1 factor 4 NR, in2 number, in3 number, in4 full
    0: product in0 in1 in2|in3
    1: load in4
    2: op add %1 %0
    3: store %2 bfloat16
    4: largest %2""",
    )


def test_all_ways_to_ask() -> None:
    """Over views, by another name, of two values of one program, and twice of one."""

    def function(y: Tensor, other: nn.Module) -> Tensor:
        z = torch.sigmoid(y)
        a, b = y.abs().max(), y.view(2, 80, -1).abs().amax((0, 1, 2))
        c = z.abs().amax([-1, 0])
        return (y + z) * (a + b).float().reciprocal().to(y.dtype) + c

    (graph,) = (half.graph for half in compared(lambda: after(function), 1, grad=torch.no_grad).forward)
    assert sum(wanted(graph)) >= 2


@pytest.mark.parametrize(
    "function",
    [
        lambda y, other: y / y.abs().amax(-1, keepdim=True),  # of each row
        lambda y, other: y / y.abs().amax(0),  # of each column
        lambda y, other: y / y.amax(),  # not of the magnitudes
        lambda y, other: (magnitudes := y.abs()) / magnitudes.amax(),  # which others read
        lambda y, other: y / y.float().abs().amax(),  # in float32
        lambda y, other: y / y.abs().amax((0, 1), keepdim=True),
        lambda y, other: y / y.t().abs().amax(),
    ],
    ids=["rows", "columns", "signed", "needed", "wide", "kept dimensions", "transposed"],
)
def test_what_is_left_to_inductor(function: Callable[[Tensor, nn.Module], Tensor]) -> None:
    captured = compared(lambda: after(function), 1, grad=torch.no_grad)
    assert wanted(captured.forward[0].graph) == []


def test_a_program_does_not_wait_for_its_own() -> None:
    """The next linear reads a value that was divided by the largest of what this program makes."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(136, 264, bias=False), nn.Linear(264, 136, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            result: Tensor = self.second(y / y.abs().amax())
            return result

    captured = compared(lambda: adapt(Chain().to(bf16)), 2, shape=(160, 136))
    assert programs(captured.forward[0].graph)
