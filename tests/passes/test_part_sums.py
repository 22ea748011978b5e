"""The sums of parts: the operator against float64, and which sums of a graph become one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from lora_fx.passes import tile_sums
from lora_fx.passes.kernels import operators
from tests.passes.on_gpu import capture
from tests.passes.test_fuse_tiles import mlp, normed, x

Runner = Any
SHAPES = [(1, 5, 3), (8, 160, 4), (13, 1030), (28, 7, 16), (0, 6, 4), (3, 0, 4)]
"""Of parts; without any, or without elements, where there are no tokens."""


def parts_and_scales(device: str = "cpu") -> tuple[list[Tensor], list[Tensor | None]]:
    """Of each shape, every other one with a scale."""
    parts = [torch.randn(shape, device=device) for shape in SHAPES]
    return parts, [torch.rand((), device=device) + 0.5 if i % 2 else None for i in range(len(parts))]


def check(run: Runner, dtype: torch.dtype, device: str = "cpu") -> None:
    """Every sum is as near to float64 as its dtype is, and a second run gives the same bits."""
    parts, scales = parts_and_scales(device)
    found, again = (run(parts, scales, dtype) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    for out, part, scale in zip(found, parts, scales, strict=True):
        exact = part.double().sum(0) * (1.0 if scale is None else scale.double())
        assert out.dtype == dtype and out.shape == exact.shape
        # Eight or more numbers that cancel keep float32's error of their largest partial sum.
        torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def check_stacked(run: Runner, dtype: torch.dtype, device: str = "cpu") -> None:
    """Side by side: the same sums, to the bit."""
    for rows in (160, 7, 0):
        parts = [torch.randn(count, rows, rank, device=device) for count, rank in ((4, 16), (9, 3), (1, 8))]
        scales = [None, torch.rand((), device=device) + 0.5, None]
        (found,) = run(parts, scales, dtype, True)
        assert torch.equal(found, torch.cat(run(parts, scales, dtype, False), dim=1))
        assert found.shape == (rows, 27) and (found.any() or not rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator(dtype: torch.dtype) -> None:
    check(operators.sum_parts, dtype)
    torch.library.opcheck(operators.sum_parts, (*parts_and_scales(), dtype))
    check_stacked(operators.sum_parts, dtype)
    stack = [torch.randn(4, 5, rank) for rank in (2, 3)]
    torch.library.opcheck(operators.sum_parts, (stack, [None, torch.rand(())], dtype, True))


def sums(graph: Graph) -> list[Node]:
    return graph.find_nodes(op="call_function", target=operators.sum_parts)


@pytest.mark.parametrize(("build", "immediate", "joined"), [(mlp, [1, 2], 5), (normed, [3], 4)])
def test_gradients_are_summed_at_the_end(build: Any, immediate: list[int], joined: int) -> None:
    """Every g when dX needs it, those of a stack side by side; every dB and dA in one."""
    (backward,) = capture(build(), x()).backward
    counts = [len(node.args[0]) for node in sums(backward.graph)]  # type: ignore[arg-type]  # its schema: a list
    assert counts == [*immediate, joined]


def returning(*, read: bool) -> Graph:
    """Two sums, of which one is read inside of the graph as well."""
    graph, results, mode = Graph(), [], torch._subclasses.FakeTensorMode()
    for i in range(2):
        parts = graph.placeholder(f"parts{i}")
        parts.meta["val"] = mode.from_tensor(torch.empty(4, 8, 8))
        graph.call_function(torch.ops.aten.neg.default, (parts,)).meta.update(parts.meta)
        results.append(tile_sums.emit(list(graph.nodes)[-1], parts, None, torch.bfloat16))
    graph.output((*results, graph.call_function(torch.ops.aten.neg.default, (results[0],)) if read else None))
    return graph


def test_what_nobody_reads_is_not_summed() -> None:
    """dB of a frozen B: its parts are left by a program that has others to make."""
    graph = returning(read=False)
    results: Any = graph.output_node().args[0]
    graph.output_node().args = ((results[0], None, None),)
    tile_sums.join(graph)
    assert [len(node.args[0]) for node in sums(graph)] == [1, 1]  # type: ignore[arg-type]  # its schema: a list
    graph.eliminate_dead_code()
    assert len(sums(graph)) == 1


def test_what_the_graph_reads_is_summed_where_it_is_read() -> None:
    graph = returning(read=True)
    tile_sums.join(graph)
    assert len(sums(graph)) == 2


def test_joining_once_is_enough() -> None:
    graph = returning(read=False)
    for _ in range(2):
        tile_sums.join(graph)
        graph.lint()
        assert [len(node.args[0]) for node in sums(graph)] == [2]  # type: ignore[arg-type]  # its schema: a list
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    first, second = torch.randn(2, 4, 8, 8)
    found = module(first, second)
    assert torch.equal(found[0], first.sum(0).bfloat16()) and torch.equal(found[1], second.sum(0).bfloat16())
