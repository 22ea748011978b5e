"""Async tensor parallelism on a GPU: values that programs read and write lie in the order that collectives need."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import operator
import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_fx.passes import row_order
from lora_fx.passes._torch import auto_functionalized, force_stride_order
from lora_fx.passes.graph import aten
from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.tile_program import Program, Tile
from tests.distributed.simulated import fake_world
from tests.passes import fake_gpu
from tests.passes.test_async_tensor_parallel import pipelining
from tests.passes.test_sequence_on_gpu import streams

pytestmark = [pytest.mark.distributed]

TOKENS, WIDTH, HIDDEN = (4, 512), 512, 2048


def codes(adapted: bool, length: int = TOKENS[1]) -> list[str]:
    """What Inductor writes for the two halves."""
    torch._dynamo.reset()
    x = torch.randn(TOKENS[0], length, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with fake_world(2), pipelining(), fake_gpu.recorded() as (found, backend):
        fake_gpu.train(streams(adapted, WIDTH, HIDDEN, rank=16), backend, x)
    assert len(found.codes) == 2
    return found.codes


def copies(code: str) -> Counter[int]:
    """Elements of the large values that Inductor's pointwise kernels write by themselves."""
    found = re.findall(r"triton_poi_fused\w*\.run\(.*?, (\d+), stream=", code)
    return Counter(size for size in map(int, found) if size >= TOKENS[0] * TOKENS[1] * WIDTH // 2)


@pytest.mark.slow
def test_no_value_is_copied_that_is_not_in_the_frozen_model():
    """Neither is what is gathered, nor what is scattered, nor a gradient between a product and a program."""
    frozen, ours = codes(False), codes(True)
    for theirs, mine in zip(frozen, ours, strict=True):
        for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
            call = f"torch.ops.symm_mem.{name}.default("
            assert mine.count(call) == theirs.count(call)
    forward, backward = ours
    assert "return_A=True" not in forward + backward
    own, every = TOKENS[0] * TOKENS[1] * WIDTH, 2 * TOKENS[0] * TOKENS[1] * HIDDEN // 2
    # What autograd keeps of gate and up; upstream's gradient, and what both input gradients are summed into. In the
    # frozen model SwiGLU is pointwise, too.
    assert copies(forward) == {every: 4} and copies(frozen[0])[every] == 6
    assert copies(backward) == {own: 1, 2 * own: 2} and copies(frozen[1])[own] == 1
    # The output of SwiGLU, of this rank's features, as what multiplies and scatters it wants it.
    sequences, length, columns = TOKENS[0], 2 * TOKENS[1], HIDDEN // 2
    written = f"({sequences}, {length}, {columns}), ({columns}, {sequences * columns}, 1), 0)"
    launches = [line for line in forward.splitlines() if "lora_fx_2load_2product_1store" in line and ".run(" in line]
    assert len(launches) == 2 and all(written in line for line in launches)
    # What a norm makes is written once: h is computed from what is gathered.
    gathered = re.findall(r"fused_all_gather_matmul\.default\((\w+),", forward)
    read = re.findall(r"lora_fx_1load_1down_n\w+\.run\((\w+),", forward)
    assert gathered == read and len(gathered) == 2


def test_what_a_kernel_cannot_write_is_copied_once():
    """A step of its walk would have rows of two sequences: 500 tokens are no multiple of it."""
    every = 2 * 4 * 500 * HIDDEN // 2
    forward, _ = codes(True, length=500)
    assert copies(forward) == {every: 4 + 2}


@pytest.mark.slow
def test_any_number_of_sequences():
    """Which is a symbol then: values are as they were, and copied."""
    torch._dynamo.reset()
    with fake_world(2), pipelining(), fake_gpu.recorded() as (found, backend):
        model = streams(True, WIDTH, HIDDEN, rank=16)
        for sequences in (4, 3):
            x = torch.randn(sequences, TOKENS[1], WIDTH, dtype=torch.bfloat16, requires_grad=True)
            fake_gpu.train(model, backend, x, dynamic=None)
    assert len(found.codes) == 4
    # The graphs of the first number of sequences, and those of any.
    assert [re.search(r"\bs\d+ = primals", code) is not None for code in found.codes] == [False, False, True, True]


def test_nothing_is_done_where_no_order_is_asked_for():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.neg.default, (x,)))
    before = [*graph.nodes]
    assert [*row_order.settle(graph)] == [] and [*graph.nodes] == before


@pytest.mark.parametrize(
    ("strides", "kept", "is_written"),
    [
        ([8, 16, 1], False, True),
        ([512, 8, 1], False, True),
        ([16, 32, 1], False, False),
        ([1, 2, 128], False, False),
        ([8, 16, 1], True, False),
    ],
    ids=["in turns", "as it was", "with gaps", "columns apart", "kept for backward"],
)
def test_which_orders_a_program_writes(strides, kept, is_written):
    tile = Tile(rows=64, columns=32, step=32, walk="rows")
    program = Program(8, "bfloat16", [["full"]], [["load", 0], ["store", 0, "bfloat16"]], tile)
    graph = torch.fx.Graph()
    with FakeTensorMode():
        value = torch.empty(128, 8, dtype=torch.bfloat16)

        def call(target: Any, args: Any, result: Any, **kwargs: Any) -> Any:
            node = graph.call_function(target, args, kwargs)
            node.meta["val"] = result
            return node

        x = graph.placeholder("x")
        x.meta["val"] = value.clone()
        memory = call(aten.empty.memory_format, ([128, 8],), value, dtype=torch.bfloat16, device=torch.device("cpu"))
        results = (None, [value.clone()])
        operands = {"outputs": [memory], "program": program.dumps(), "inputs": [x]}
        ran = call(auto_functionalized, (operators.tile_,), results, **operands)
        written = call(operator.getitem, (ran, 1), results[1])
        out = call(operator.getitem, (written, 0), results[1][0])
        wide = call(aten.reshape.default, (out, [2, 64, 8]), value.view(2, 64, 8))
        order = graph.call_function(force_stride_order(), (wide, strides))
        again = call(aten.reshape.default if kept else aten.neg.default, (out, [128, 8])[: 1 + kept], value.clone())
        graph.output((again, order))
        assert [*row_order.settle(graph)] == []
    graph.lint()
    (negative, last) = graph.output_node().args[0]
    if not is_written:
        assert last is order and ran.kwargs["outputs"] == [memory]
        return
    assert last is out and list(out.meta["val"].stride()) == strides
    (made,) = ran.kwargs["outputs"]
    assert list(made.meta["val"].stride()) == strides and made.meta["val"].shape == (2, 64, 8)
    # Whoever reads it as the matrix that it was does so through a view.
    assert negative.args[0].target is aten.reshape.default and negative.args[0].args == (out, [128, 8])
