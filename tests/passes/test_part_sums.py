"""The sums of parts: the operator against float64, and which sums of a graph become one."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node

from lora_fx.passes import tile_sums
from lora_fx.passes._torch import auto_functionalized
from lora_fx.passes.kernels import operators
from tests.passes.on_gpu import P, capture
from tests.passes.test_dropout_tiles import fused
from tests.passes.test_fuse_tiles import K, mlp, normed, x

Runner = Any
SHAPES = [(1, 5, 3), (8, 160, 4), (13, 1030), (28, 7, 16), (0, 6, 4), (3, 0, 4)]
"""Of parts; without any, or without elements, where there are no tokens."""


def parts_and_scales(device: str = "cpu") -> tuple[list[Tensor], list[Tensor | None]]:
    """Of each shape, every other one with a scale."""
    parts = [torch.randn(shape, device=device) for shape in SHAPES]
    return parts, [torch.rand((), device=device) + 0.5 if i % 2 else None for i in range(len(parts))]


def check(run: Runner, dtype: torch.dtype, device: str = "cpu") -> None:
    """Every sum is as near to float64 as its dtype is; a second run, and one of its own, give the same bits."""
    parts, scales = parts_and_scales(device)
    found, again = (run(parts, scales, dtype) for _ in range(2))
    alone = [run([part], [scale], dtype)[0] for part, scale in zip(parts, scales, strict=True)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(found, again, alone, strict=True))
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


def check_beside(run: Runner, plain: Runner, dtype: torch.dtype, device: str = "cpu") -> None:
    """The sums of ``plain`` side by side to the bit, and in columns of a wider matrix, of which the others stay."""
    for rows in (160, 7, 0):
        parts = [torch.randn(count, rows, rank, device=device) for count, rank in ((4, 16), (9, 3), (1, 8))]
        scales = [None, torch.rand((), device=device) + 0.5, None]
        room, before = (torch.full((rows, 72), 7.0, dtype=dtype, device=device)[:, :70] for _ in range(2))
        stack = run(room, parts, scales, [4, 30, 61])
        sums = [p.double().sum(0) * (1.0 if s is None else s.double()) for p, s in zip(parts, scales, strict=True)]
        exact = torch.cat(sums, 1)
        assert torch.equal(stack, plain(parts, scales, dtype, True)[0])
        torch.testing.assert_close(stack.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        for start, part in zip((4, 30, 61), stack.split([16, 3, 8], 1)):
            before[:, start : start + part.shape[1]] = part
        assert torch.equal(room, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator(dtype: torch.dtype) -> None:
    check(operators.sum_parts, dtype)
    torch.library.opcheck(operators.sum_parts, (*parts_and_scales(), dtype))
    check_stacked(operators.sum_parts, dtype)
    stack = [torch.randn(4, 5, rank) for rank in (2, 3)]
    torch.library.opcheck(operators.sum_parts, (stack, [None, torch.rand(())], dtype, True))
    check_beside(operators.sum_parts_beside_, operators.sum_parts, dtype)
    given = (torch.zeros(5, 8, dtype=dtype), stack, [None, torch.rand(())], [0, 5])
    torch.library.opcheck(operators.sum_parts_beside_, given, test_utils=("test_schema", "test_faketensor"))


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


# ---- sums that share a launch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "immediate", "joined"),
    # g of q, k and v are read by the kernel of their dA; of an MLP's, those of gate and up.
    [(fused, [3], 6), (lambda: normed(dropout=P), [3], 6), (lambda: mlp(dropout=P), [1, 2], 6)],
    ids=["norm on a GPU", "norm", "SwiGLU"],
)
def test_sums_that_siblings_read_share_a_launch(
    build: Callable[[], torch.nn.Module], immediate: list[int], joined: int
) -> None:
    (backward,) = capture(build(), x(shape=(2, 160, K))).backward
    assert [len(node.args[0]) for node in sums(backward.graph)] == [*immediate, joined]  # type: ignore[arg-type]


class Programs:
    """A graph of tile programs and sums of the parts that they leave, as `tile_sums` looks at it."""

    def __init__(self) -> None:
        self.graph, self.mode = Graph(), torch._subclasses.FakeTensorMode()

    def program(self, *inputs: Node, outputs: int = 1) -> list[Node]:
        """The parts that a program leaves."""
        values = [self.mode.from_tensor(torch.empty(4, 8, 8)) for _ in range(outputs)]
        arguments = {"outputs": [], "program": "", "inputs": list(inputs)}
        node = self.add(auto_functionalized, (operators.tile_,), (None, values), arguments)
        written = self.add(operator.getitem, (node, 1), values)
        return [self.add(operator.getitem, (written, i), value) for i, value in enumerate(values)]

    def add(self, target: Any, arguments: tuple[Any, ...], value: Any, named: Any = None) -> Node:
        node = self.graph.call_function(target, arguments, named)
        node.meta["val"] = value
        return node

    def sum(self, parts: Node, dtype: torch.dtype = torch.bfloat16, scale: Node | None = None) -> Node:
        # What is emitted goes before a node and has its metadata.
        last = self.add(torch.ops.aten.neg.default, (parts,), parts.meta["val"])
        result = tile_sums.emit(last, parts, scale, dtype)
        self.graph.erase_node(last)
        return result

    def gathered(self, *results: Node) -> list[int]:
        """How many sums each launch has, in a graph that returns `results`."""
        self.graph.output(results)
        for _ in range(2):
            tile_sums.gather(self.graph)
            self.graph.lint()
        return [len(node.args[0]) for node in sums(self.graph)]  # type: ignore[arg-type]  # its schema: a list


def test_sums_of_what_one_program_leaves() -> None:
    """Read by one program each; the first is before the second sum in the graph."""
    g = Programs()
    first, second = g.program(outputs=2)
    results = [g.program(g.sum(parts))[0] for parts in (first, second)]
    assert g.gathered(*results) == [2]


def test_sums_that_one_program_reads() -> None:
    g = Programs()
    sums = [g.sum(g.program()[0]) for _ in range(3)]
    assert g.gathered(*g.program(*sums)) == [3]


def test_no_sum_is_made_with_one_that_waits_for_it() -> None:
    """Though one program reads both, or left both: there the second one's scale is computed from the first."""
    g = Programs()
    first = g.sum(g.program()[0])
    second = g.sum(g.program(first)[0])
    assert g.gathered(*g.program(first, second)) == [1, 1]
    g = Programs()
    parts, others = g.program(outputs=2)
    (made,) = g.program(g.sum(parts))
    scale = g.add(torch.ops.aten.amax.default, (made,), g.mode.from_tensor(torch.empty(())))
    assert g.gathered(*g.program(g.sum(others, scale=scale))) == [1, 1]


def test_sums_of_two_dtypes_are_two() -> None:
    g = Programs()
    sums = [g.sum(g.program()[0], dtype) for dtype in (torch.bfloat16, torch.float32)]
    assert g.gathered(*g.program(*sums)) == [1, 1]


def test_sums_of_strangers_are_apart() -> None:
    """Neither of one program nor read by one."""
    g = Programs()
    assert g.gathered(*[g.program(g.sum(g.program()[0]))[0] for _ in range(2)]) == [1, 1]


def test_what_the_graph_returns_is_left_to_its_end() -> None:
    """One that only the output reads, of the same program as one that is needed now."""
    g = Programs()
    needed, returned = g.program(outputs=2)
    result = g.program(g.sum(needed))[0]
    assert g.gathered(result, g.sum(returned)) == [1, 1]
