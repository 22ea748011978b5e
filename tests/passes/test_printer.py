"""The text of a graph: short, numbered, and free of what differs between versions."""

import operator

import torch
from torch import Tensor, nn
from torch.fx import Graph, symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx

from lora_fx.passes.printer import graph_text, target_name, type_text
from tests.passes.harness import joint_graph

aten = torch.ops.aten


def traced(function: object, *inputs: Tensor, symbolic: bool = False) -> Graph:
    return make_fx(function, tracing_mode="symbolic" if symbolic else "fake")(*inputs).graph  # type: ignore[arg-type]


def test_values_are_numbered_and_typed() -> None:
    graph = traced(lambda a, b: (a @ b, torch.cat([a, a])), torch.randn(2, 3), torch.randn(3, 4))
    assert graph_text(graph).splitlines() == [
        "%0 = input          f32[2, 3]",
        "%1 = input          f32[3, 4]",
        "%2 = mm(%0, %1)     f32[2, 4]",
        "%3 = cat([%0, %0])  f32[4, 3]",
        "return %2, %3",
    ]


def test_the_backward_half_is_marked() -> None:
    graph = joint_graph(lambda x: x.sin(), torch.randn(3, requires_grad=True))
    assert graph_text(graph).splitlines() == [
        "%0 = input          f32[3]",
        "| %1 = tangent      f32[3]",
        "%2 = sin(%0)        f32[3]",
        "| %3 = cos(%0)      f32[3]",
        "| %4 = mul(%1, %3)  f32[3]",
        "return %2, %4",
    ]


def test_dead_inputs_are_left_out() -> None:
    assert "%1" not in graph_text(traced(lambda a, b: a, torch.randn(2), torch.randn(2)))


def test_symbols_are_numbered_by_appearance_and_dtypes_are_not_symbols() -> None:
    inputs = torch.ones(3, 5, dtype=torch.uint8), torch.ones(7, dtype=torch.int8)
    assert graph_text(traced(lambda a, b: (a.view(-1), b + 1), *inputs, symbolic=True)).splitlines() == [
        "%0 = input           u8[s0, s1]",
        "%1 = input           i8[s2]",
        "%2 = view(%0, [-1])  u8[s0*s1]",
        "%3 = add(%1, 1)      i8[s2]",
        "return %2, %3",
    ]


def test_operands() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    full = graph.call_function(
        aten.full.default,
        ([2], 1.5),
        {"dtype": torch.bfloat16, "device": torch.device("cpu"), "layout": None, "pin_memory": False},
    )
    clone = graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    wrapped = graph.call_function(operator.getitem, (clone, slice(None)), {"op": aten.mm.default})
    graph.output([full, wrapped])
    assert graph_text(graph) == (
        "%0 = input\n"
        "%1 = full([2], 1.5, dtype=bf16, device=cpu, layout=None, pin_memory=False)\n"
        "%2 = clone(%0, memory_format=contiguous_format)\n"
        "%3 = getitem(%2, slice(None, None, None), op=mm)\n"
        "return %1, %3"
    )


def test_attributes_and_methods() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).relu()

    text = graph_text(symbolic_trace(Module()).graph)
    assert text.splitlines()[1:] == ["%1 = attribute weight", "%2 = mul(%0, %1)", "%3 = relu(%2)", "return %3"]


def test_names() -> None:
    assert target_name(aten.mm.default) == "mm"
    assert target_name(torch.ops.prims.convert_element_type.default) == "convert_element_type"
    assert target_name(torch.ops.lora_fx.accumulate.default) == "lora_fx.accumulate"
    assert target_name(operator.add) == "add"
    assert target_name("relu") == "relu"


def test_types() -> None:
    assert type_text(torch.empty(2, 3, dtype=torch.bfloat16)) == "bf16[2, 3]"
    assert type_text(torch.empty((), dtype=torch.float8_e4m3fn)) == "f8e4m3[]"
    assert type_text(torch.empty(1, dtype=torch.complex64)) == "complex64[1]"
    assert type_text((torch.empty(2), None)) == "(f32[2], None)"
    assert type_text(None) == ""
    assert type_text(3) == "int"
