"""Programs that sum their own parts: which do, what the graphs are, that they compute the same, and Inductor's code.

The passes decide as on a GPU (`tests/passes/on_gpu.py`); programs run as ATen. M = 160 tokens, K = 136, N = 264, R = 4.
"""

import dataclasses
import functools
import re
from typing import Any
from unittest import mock

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph

from lora_fx.passes import tile_own_sums
from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.tile_choice import LAST, choose
from lora_fx.passes.kernels.tile_program import Tile
from lora_fx.passes.printer import graph_text
from tests.passes import on_gpu
from tests.passes.harness import Case, compare
from tests.passes.on_gpu import capture, halves, one_tile, programs
from tests.passes.test_fuse_tiles import case, checkpointed, linear, mlp, normed, x
from tests.passes.test_part_sums import sums


def last_tile(kinds: Any, body: Any, rows: Any, columns: int) -> Tile:
    """The tile that is the same for all, with sums by the last program."""
    return dataclasses.replace(one_tile(kinds, body, rows, columns), last=True)


def lower(graph: Graph) -> None:
    """Also where it is one sum."""
    with mock.patch.object(tile_own_sums, "FEWEST", 1):
        on_gpu.lower(graph, last_tile)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_one_linear() -> None:
    """g of the pair is a sum, with its scale; dB and dA stay in parts that are summed at the end."""
    _, backward = halves(capture(linear(), x(), step=lower))
    assert_expected_inline(
        backward,
        """\
%0 = input bf16[264, 136]
%1 = input bf16[4, 136]
%2 = input bf16[264, 4]
%3 = input bf16[160, 136]
%4 = input f32[]
%5 = input bf16[160, 4]
| %6 = tangent bf16[2, 80, 264]
| %7 = empty([1, 264, 4], dtype=f32, device=cpu) f32[1, 264, 4]
| %8 = lora_fx.counters(%6, 32) i32[32]
| %9 = slice(%8, 0, 0, 1) i32[1]
| %10 = empty([160, 4], dtype=bf16, device=cpu) bf16[160, 4]
| %11 = tile(outputs=[%10, %7], program=#0, inputs=[%6, %2, %5, %4, %9]) (None, (bf16[160, 4], f32[1, 264, 4]))
| %12 = getitem(%11, 1) (bf16[160, 4], f32[1, 264, 4])
| %13 = getitem(%12, 0) bf16[160, 4]
| %14 = getitem(%12, 1) f32[1, 264, 4]
| %15 = empty([1, 4, 136], dtype=f32, device=cpu) f32[1, 4, 136]
| %16 = tile(outputs=[%15], program=#1, inputs=[%3, %13]) (None, (f32[1, 4, 136]))
| %17 = getitem(%16, 1) (f32[1, 4, 136])
| %18 = getitem(%17, 0) f32[1, 4, 136]
| %19 = view(%6, [160, 264]) bf16[160, 264]
%20 = permute(%0, [1, 0]) bf16[136, 264]
| %21 = permute(%20, [1, 0]) bf16[264, 136]
| %22 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
| %23 = tile(outputs=[%22], program=#2, inputs=[%13, %1]) (None, (bf16[160, 136]))
| %24 = getitem(%23, 1) (bf16[160, 136])
| %25 = getitem(%24, 0) bf16[160, 136]
| %26 = auto_functionalized(lora_fx.accumulate_, base=%25, a=%19, b=%21, scale=None) (None, bf16[160, 136])
| %27 = getitem(%26, 1) bf16[160, 136]
| %28 = view(%27, [2, 80, 136]) bf16[2, 80, 136]
| %29 = lora_fx.sum_parts([%14, %18], [%4, None], bf16) (bf16[264, 4], bf16[4, 136])
| %30 = getitem(%29, 0) bf16[264, 4]
| %31 = getitem(%29, 1) bf16[4, 136]
return None, %28, None, None, %31, %30
#0: bfloat16, 264 columns; in0 full, in1 factor 4 NR, in2 thin 4, in3 number, in4 counters
    0: load in0
    1: sum %0 in1 in3 bfloat16
    2: across %0 in2 NR
#1: bfloat16, 136 columns; in0 full, in1 thin 4
    0: load in0
    1: across %0 in1 RN
#2: bfloat16, 136 columns; in0 thin 4, in1 factor 4 RN
    0: product in0 in1
    1: store %0 bfloat16""",
    )


def test_a_stack_is_written_by_one_program_after_the_other() -> None:
    _, backward = halves(capture(normed(), x(), step=lower))
    assert_expected_inline(
        backward,
        """\
%0 = input bf16[136]
%1 = input bf16[2, 80, 136]
%2 = input bf16[136, 136]
%3 = input bf16[4, 136]
%4 = input bf16[136, 4]
%5 = input bf16[136, 136]
%6 = input bf16[4, 136]
%7 = input bf16[136, 4]
%8 = input bf16[136, 136]
%9 = input bf16[4, 136]
%10 = input bf16[136, 4]
%11 = input f32[2, 80, 1]
%12 = input f32[]
%13 = input bf16[160, 4]
%14 = input f32[]
%15 = input bf16[160, 4]
%16 = input f32[]
%17 = input bf16[160, 4]
| %18 = tangent bf16[2, 80, 136]
| %19 = tangent bf16[2, 80, 136]
| %20 = tangent bf16[2, 80, 136]
| %21 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %22 = lora_fx.counters(%20, 96) i32[96]
| %23 = slice(%22, 0, 0, 1) i32[1]
| %24 = empty([160, 12], dtype=bf16, device=cpu) bf16[160, 12]
| %25 = tile(outputs=[%24, %21], program=#0, inputs=[%20, %10, %17, %16, %23], columns=[8]) (None, (bf16[160, 12],
        f32[1, 136, 4]))
| %26 = getitem(%25, 1) (bf16[160, 12], f32[1, 136, 4])
| %27 = getitem(%26, 0) bf16[160, 12]
| %28 = getitem(%26, 1) f32[1, 136, 4]
| %29 = view(%20, [160, 136]) bf16[160, 136]
%30 = permute(%8, [1, 0]) bf16[136, 136]
| %31 = permute(%30, [1, 0]) bf16[136, 136]
| %32 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %33 = slice(%22, 0, 32, 33) i32[1]
| %34 = tile(outputs=[%27, %32], program=#0, inputs=[%19, %7, %15, %14, %33], columns=[4]) (None, (bf16[160, 12],
        f32[1, 136, 4]))
| %35 = getitem(%34, 1) (bf16[160, 12], f32[1, 136, 4])
| %36 = getitem(%35, 0) bf16[160, 12]
| %37 = getitem(%35, 1) f32[1, 136, 4]
| %38 = view(%19, [160, 136]) bf16[160, 136]
%39 = permute(%5, [1, 0]) bf16[136, 136]
| %40 = permute(%39, [1, 0]) bf16[136, 136]
| %41 = mm(%38, %40) bf16[160, 136]
| %42 = empty([1, 136, 4], dtype=f32, device=cpu) f32[1, 136, 4]
| %43 = slice(%22, 0, 64, 65) i32[1]
| %44 = tile(outputs=[%36, %42], program=#0, inputs=[%18, %4, %13, %12, %43]) (None, (bf16[160, 12], f32[1, 136,
        4]))
| %45 = getitem(%44, 1) (bf16[160, 12], f32[1, 136, 4])
| %46 = getitem(%45, 0) bf16[160, 12]
| %47 = getitem(%45, 1) f32[1, 136, 4]
%48 = convert_element_type(%1, f32) f32[2, 80, 136]
| %49 = empty([1, 12, 136], dtype=f32, device=cpu) f32[1, 12, 136]
| %50 = tile(outputs=[%49], program=#1, inputs=[%1, %11, %0, %46]) (None, (f32[1, 12, 136]))
| %51 = getitem(%50, 1) (f32[1, 12, 136])
| %52 = getitem(%51, 0) f32[1, 12, 136]
%53 = cat([%3, %6, %9], 0) bf16[12, 136]
| %54 = view(%18, [160, 136]) bf16[160, 136]
%55 = permute(%2, [1, 0]) bf16[136, 136]
| %56 = permute(%55, [1, 0]) bf16[136, 136]
| %57 = mm(%54, %56) bf16[160, 136]
| %58 = empty([160, 136], dtype=bf16, device=cpu) bf16[160, 136]
| %59 = tile(outputs=[%58], program=#2, inputs=[%46, %53]) (None, (bf16[160, 136]))
| %60 = getitem(%59, 1) (bf16[160, 136])
| %61 = getitem(%60, 0) bf16[160, 136]
| %62 = auto_functionalized(lora_fx.accumulate_, base=%61, a=%29, b=%31, scale=None) (None, bf16[160, 136])
| %63 = getitem(%62, 1) bf16[160, 136]
| %64 = reshape(%63, [2, 80, 136]) bf16[2, 80, 136]
| %65 = reshape(%41, [2, 80, 136]) bf16[2, 80, 136]
| %66 = add(%64, %65) bf16[2, 80, 136]
| %67 = reshape(%57, [2, 80, 136]) bf16[2, 80, 136]
| %68 = add(%66, %67) bf16[2, 80, 136]
| %69 = convert_element_type(%68, f32) f32[2, 80, 136]
| %70 = mul(%69, %0) f32[2, 80, 136]
| %71 = mul(%70, %48) f32[2, 80, 136]
| %72 = mul(%70, %11) f32[2, 80, 136]
| %73 = sum(%71, [2], True) f32[2, 80, 1]
| %74 = pow(%11, 3) f32[2, 80, 1]
| %75 = mul(%73, -0.5) f32[2, 80, 1]
| %76 = mul(%75, %74) f32[2, 80, 1]
| %77 = expand(%76, [2, 80, 136]) f32[2, 80, 136]
| %78 = div(%77, 136) f32[2, 80, 136]
| %79 = pow(%48, 1.0) f32[2, 80, 136]
| %80 = mul(%79, 2.0) f32[2, 80, 136]
| %81 = mul(%78, %80) f32[2, 80, 136]
| %82 = add(%72, %81) f32[2, 80, 136]
| %83 = convert_element_type(%82, bf16) bf16[2, 80, 136]
| %84 = lora_fx.sum_parts([%28, %37, %47, %52], [%16, %14, %12, None], bf16) (bf16[136, 4], bf16[136, 4], bf16[136,
        4], bf16[12, 136])
| %85 = getitem(%84, 0) bf16[136, 4]
| %86 = getitem(%84, 1) bf16[136, 4]
| %87 = getitem(%84, 2) bf16[136, 4]
| %88 = getitem(%84, 3) bf16[12, 136]
| %89 = slice(%88, 0, 8, 12) bf16[4, 136]
| %90 = slice(%88, 0, 4, 8) bf16[4, 136]
| %91 = slice(%88, 0, 0, 4) bf16[4, 136]
return None, %83, None, None, None, %91, %87, None, None, None, %90, %86, None, None, None, %89, %85
#0: bfloat16, 136 columns; in0 full, in1 factor 4 NR, in2 thin 4, in3 number, in4 counters
    0: load in0
    1: sum %0 in1 in3 bfloat16
    2: across %0 in2 NR
#1: bfloat16, 136 columns; in0 full, in1 row, in2 column, in3 thin 12
    0: load in0
    1: load in1
    2: op mul %0 %1
    3: load in2
    4: op mul %2 %3
    5: across %4 in3 RN
#2: bfloat16, 136 columns; in0 thin 12, in1 factor 12 RN
    0: product in0 in1
    1: store %0 bfloat16""",
    )


@pytest.mark.parametrize(("build", "inside"), [(linear, (0, 1)), (mlp, (1, 3)), (normed, (0, 3))])
def test_what_waits_for_a_sum_waits_for_its_program(build: Any, inside: tuple[int, int]) -> None:
    """Sums over columns are all inside; those over rows are one launch, whose results only the graph returns."""
    captured = capture(build(), x(), step=lower)
    graphs = [captured.forward[0].graph, captured.backward[0].graph]
    kinds = [[s[0] for p in programs(graph) for s in p.outputs] for graph in graphs]
    assert tuple(names.count("sum") for names in kinds) == inside
    assert [len(sums(graph)) for graph in graphs] == [0, 1]
    counters = [graph.find_nodes(op="call_function", target=operators.counters) for graph in graphs]
    assert [len(nodes) for nodes in counters] == [int(count > 0) for count in inside]


# ---- what is left alone ----------------------------------------------------------------------------------------------


def untouched(step: Any, **more: Any) -> None:
    captured = capture(mlp(), x(), step=step, **more)
    for graph in (captured.forward[0].graph, captured.backward[0].graph):
        assert not any(s[0] == "sum" for p in programs(graph) for s in p.body)
        assert not graph.find_nodes(op="call_function", target=operators.counters)


def test_one_sum_is_as_well_left_to_a_kernel_of_its_own() -> None:
    """Whose launch is spared, but making counters is one; SwiGLU has one in forward, and two in backward."""
    captured = capture(mlp(), x(), step=lambda graph: on_gpu.lower(graph, last_tile))
    graphs = [captured.forward[0].graph, captured.backward[0].graph]
    assert [sum(s[0] == "sum" for p in programs(graph) for s in p.body) for graph in graphs] == [0, 3]


def test_only_where_the_tile_says_so() -> None:
    untouched(on_gpu.lower)


def test_any_number_of_tokens_has_no_number_of_counters() -> None:
    untouched(lower, dynamic=True)


def test_a_stack_needs_all_of_its_programs() -> None:
    """One of the two programs of a stack does not say so: the other one leaves parts as well."""
    seen: list[int] = []

    def some(kinds: Any, body: Any, rows: Any, columns: int) -> Tile:
        pair = [s[0] for s in body] == ["load", "down", "across"] and columns > 200
        seen.extend([1] if pair else [])
        return dataclasses.replace(one_tile(kinds, body, rows, columns), last=pair and len(seen) == 2)

    captured = capture(mlp(), x(), step=lambda graph: on_gpu.lower(graph, some))
    assert len(seen) == 2
    assert not any(s[0] == "sum" for p in programs(captured.backward[0].graph) for s in p.body)


@pytest.mark.parametrize("what", ["another reader of the parts", "a scale that comes later", "no reader of the sum"])
def test_what_reads_parts_keeps_them(what: str) -> None:
    captured = capture(linear(), x(), step=on_gpu.lower)
    graph = captured.backward[0].graph
    for node in on_gpu.calls(graph):
        node.update_kwarg("program", node.kwargs["program"].replace('"last":false', '"last":true'))  # type: ignore[union-attr]
    node = next(node for node in sums(graph) if len(node.args[0]) == 1)  # type: ignore[arg-type]  # its schema: a list
    operands: Any = node.args
    (part,), (scale,) = operands[:2]
    with graph.inserting_before(node):
        if what == "another reader of the parts":
            graph.call_function(torch.ops.aten.neg.default, (part,)).meta.update(part.meta)
        elif what == "a scale that comes later":
            later = graph.call_function(torch.ops.aten.neg.default, (scale,))
            later.meta.update(scale.meta)
            node.update_arg(1, [later])
        else:
            (result,) = node.users
            zero = graph.call_function(torch.ops.aten.zeros_like.default, (result,))
            zero.meta.update(result.meta)
            node.append(zero)
            result.replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)
            zero.update_arg(0, part)
            graph.erase_node(result)
    before = graph_text(graph)
    tile_own_sums.own(graph)
    assert graph_text(graph) == before


def test_a_second_run_changes_nothing() -> None:
    captured = capture(mlp(), x(), step=lower)
    for graph in (captured.forward[0].graph, captured.backward[0].graph):
        before = graph_text(graph)
        tile_own_sums.own(graph)
        graph.lint()
        assert graph_text(graph) == before


# ---- values ----------------------------------------------------------------------------------------------------------


CASES = [
    case("linear", linear, 1),
    case("SwiGLU", mlp, 3),
    case("q, k, v of a norm", normed, 3),
    case("rank 1", lambda: linear(rank=1), 1),
    case("checkpointed", mlp, 3, wrap=checkpointed),
    case("dropout", lambda: mlp(dropout=0.25), 3, random=True),
]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if i < 3 else pytest.mark.slow, id=c.name) for i, c in enumerate(CASES)]
)
def test_as_accurate_as_plain_compile(case: Case) -> None:
    compare(case, functools.partial(on_gpu.by_graphs, step=lower)).assert_as_accurate()


@pytest.mark.slow
@pytest.mark.parametrize("case", [dataclasses.replace(c, seeds=2) for c in CASES[:3]], ids=str)
def test_among_kernels(case: Case) -> None:
    """To the bit what the same kernels give with sums of parts (which eight parts or less do not tell apart)."""
    found = [on_gpu.by_kernels(case, _built(case), rewrite=True, step=step)[0] for step in (lower, on_gpu.lower)]
    for ours, theirs in zip(found[0].tensors, found[1].tensors, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _built(case: Case) -> torch.nn.Module:
    torch.manual_seed(0)
    return case.build()


def test_the_operator_writes_its_columns_alone() -> None:
    """Of the memory of a stack, also under `opcheck`."""
    from lora_fx.passes.kernels.tile_program import Program

    tile = Tile(rows=64, columns=32, step=32, walk="rows", last=True)
    kinds: list[list[Any]] = [["full"], ["factor", 3, "NR"], ["number"], ["counters"]]
    text = Program(40, "float32", kinds, [["load", 0], ["sum", 0, 1, 2, "float32"]], tile).dumps()
    value, factor, scale = torch.randn(7, 40), torch.randn(40, 3), torch.tensor(1.5)
    inputs, out = [value, factor, scale, torch.zeros(1, dtype=torch.int32)], torch.full((7, 8), 2.0)
    operators.tile_([out], text, inputs, [4])
    torch.testing.assert_close(out[:, 4:7], value @ factor * 1.5)
    assert (out[:, :4] == 2).all() and (out[:, 7:] == 2).all()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.tile_, ([out], text, inputs, [4]), test_utils=tests)


# ---- Inductor's code -------------------------------------------------------------------------------------------------


def test_inductor_makes_one_buffer_of_counters_and_copies_nothing() -> None:
    """Each graph has its own, made anew by each run; a stack's programs write to one matrix."""
    module, value = mlp(), x()
    function = torch.compile(module, options=on_gpu.options(lower), fullgraph=True)
    _, codes = run_and_get_code(lambda: function(value).sum().backward())
    for code, count in zip(codes, (1, 3), strict=True):
        body = code.split("def call")[1].split("return (")[0]
        assert body.count("torch.ops.lora_fx.counters.default(") == 1 and "torch.int32" not in body
        calls = [line for line in body.splitlines() if "tile_.default(" in line and '"sum"' in line]
        assert len(calls) == count
        assert "clone" not in body and ".copy_" not in body
        written = re.findall(r"empty_strided_cpu\(\(160, 8\), \(8, 1\), torch\.bfloat16\)", body)
        assert len(written) == 1, "the stacked h of gate and up; the stacked g"


def test_a_retained_graph_runs_again() -> None:
    """The second backward finds zeros in its counters, and gives the first one's bits."""
    module, value = mlp(), x()
    function = torch.compile(module, options=on_gpu.options(lower), fullgraph=True)
    leaves: list[Tensor] = [value, *(p for p in module.parameters() if p.requires_grad)]
    y = function(value)
    first = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    second = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, second, strict=True))


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize(("rows", "expected"), [(512, True), (2048, None), (8192, False)])
def test_the_last_program_has_little_to_add(rows: int, expected: bool | None, rank: int) -> None:
    """Of a gradient pair, N 4096."""
    kinds: list[list[Any]] = [["full"], ["factor", rank, "NR"], ["thin", rank]]
    tile = choose(kinds, [["load", 0], ["down", 0, 1], ["across", 0, 2, "NR"]], rows, 4096)
    assert tile is not None
    parts = -(-4096 // tile.columns)
    assert tile.last == (parts * tile.rows * rank * 4 <= LAST)
    if rank == 16 and expected is not None:
        assert tile.last == expected
