"""A failure of what cuts tiles, at any step and in the middle of it, leaves the graph as it was, with a reason."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, symbolic_trace
from torch.utils.checkpoint import checkpoint

from lora_fx.passes import fuse_tiles, pipeline, tile_copies, tile_joint, tile_pairs, tile_stacks, tile_sums
from lora_fx.passes.graph import is_tangent
from lora_fx.passes.kernels import lowering, operators
from lora_fx.passes.printer import graph_text
from lora_fx.passes.snapshot import Snapshot
from tests.passes import on_gpu
from tests.passes.harness import adapt
from tests.passes.modules import QKV, Mlp
from tests.passes.on_gpu import capture, programs
from tests.passes.test_high_ranks import tile

bf16 = torch.bfloat16
WIDTH, TOKENS, RANK = 296, 272, 48


class Both(nn.Module):
    """q, k and v, whose ranks together are too high for tiles, and a SwiGLU whose own are high enough to be split."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.mlp = QKV(WIDTH, WIDTH), Mlp(WIDTH, WIDTH + 24)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.qkv(x)
        return q, k, v + checkpoint(self.mlp, torch.tanh(v), use_reentrant=False)


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return adapt(Both().to(bf16), rank=RANK)


@pytest.fixture(scope="module")
def expected(module: nn.Module) -> list[Tensor]:
    """The gradients without any program."""
    return results(module, lower)


def results(module: nn.Module, step: Callable[[Graph], None]) -> list[Tensor]:
    """The gradients of the graphs that `step` makes."""
    module = copy.deepcopy(module)
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)).to(bf16).requires_grad_()
    capture(module, x, step=step)
    gradients = [x.grad, *(p.grad for p in module.parameters() if p.requires_grad)]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    return [gradient for gradient in gradients if gradient is not None]


def lower(graph: Graph) -> None:
    operators.teach_inductor()
    assert list(lowering.lower(graph)) == []


class Failing:
    """A function that does what it does and then raises, at its `nth` call in a graph."""

    def __init__(self, original: Callable[..., Any], nth: int) -> None:
        self.original, self.nth, self.calls = original, nth, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.original(*args, **kwargs)
        self.calls += 1
        if self.calls == self.nth:
            raise ArithmeticError("for a test")
        return result


WHOLE: list[tuple[Any, str, int]] = [
    (tile_copies, "_copy", 1),
    (tile_pairs, "split", 8),
    (fuse_tiles, "_seeds", 2),
    (fuse_tiles, "_emit", 1),
    (fuse_tiles, "_emit", 4),
    (fuse_tiles, "_erase", 1),
    (fuse_tiles, "_erase", 20),
    (fuse_tiles, "stable_topological_sort", 3),
    (tile_stacks, "_rewrite", 1),
    (tile_stacks, "_rewrite", 3),
    (tile_stacks, "accumulate", 1),
    (tile_sums, "stack", 1),
    (tile_sums, "_emit", 12),
    (tile_sums, "gather", 1),
    (tile_sums, "_join", 1),
    (tile_sums, "join", 1),
    (tile_joint, "_merge", 1),
    (tile_joint, "_merge", 2),
    (tile_joint, "join", 1),
]
"""What fails once it is done, and at which of its calls: something has been replaced by then."""


def is_backward(graph: Graph) -> bool:
    return any(map(is_tangent, graph.nodes))


@pytest.mark.parametrize(("where", "name", "nth"), WHOLE, ids=[f"{m.__name__[15:]}.{n} {i}" for m, n, i in WHOLE])
def test_all_is_undone(
    module: nn.Module, expected: list[Tensor], where: Any, name: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(getattr(where, name), nth)

    def step(graph: Graph) -> None:
        if is_backward(graph):
            before, metadata = graph_text(graph), [dict(node.meta) for node in graph.nodes]
            with monkeypatch.context() as patch:
                patch.setattr(where, name, failing)
                failures = list(fuse_tiles.cut(graph, tile))
            assert failing.calls == nth
            assert [str(error) for _, error in failures] == ["for a test"]
            assert graph_text(graph) == before and programs(graph) == []
            for node, old in zip(graph.nodes, metadata, strict=True):
                assert node.meta.keys() == old.keys() and all(node.meta[key] is old[key] for key in old)
        lower(graph)

    assert all(torch.equal(a, b) for a, b in zip(results(module, step), expected, strict=True))


@pytest.mark.parametrize(("where", "name", "nth"), [(fuse_tiles, "_emit", 4), (tile_joint, "join", 1)])
def test_what_was_undone_can_be_cut(module: nn.Module, where: Any, name: str, nth: int) -> None:
    """A graph that was restored is as good as new: the same programs come out of it."""
    texts: list[str] = []

    def step(graph: Graph) -> None:
        if is_backward(graph) and not texts:
            failing = Failing(getattr(where, name), nth)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(where, name, failing)
                assert len(list(fuse_tiles.cut(graph, tile))) == 1
        on_gpu.lower(graph, tile)
        if is_backward(graph):
            texts.append(on_gpu.text(graph))

    for _ in range(2):
        results(module, step)
    assert texts[0] == texts[1] and "tile(" in texts[0]


@pytest.mark.parametrize(
    ("name", "nth"), [("separate", 1), ("grow", 1), ("join", 2), ("take", 2), ("_finish", 1), ("_finish", 12)]
)
def test_one_region_that_fails_before_anything_of_it_is_replaced(
    module: nn.Module, name: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It alone stays as it was."""

    def step(graph: Graph) -> None:
        if is_backward(graph):
            with monkeypatch.context() as patch:
                patch.setattr(fuse_tiles, name, Failing(getattr(fuse_tiles, name), nth))
                failures = list(fuse_tiles.cut(graph, tile))
            assert [str(error) for _, error in failures] == ["for a test"]
            assert programs(graph)
        lower(graph)

    results(module, step)


def test_the_log_and_strict_mode_tell(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The stage of the pipeline, whose own choice of tiles has replaced regions when their sums fail."""
    original = tile_sums.gather
    monkeypatch.setattr(tile_sums, "gather", Failing(original, 1))
    pipeline._warn_once.cache_clear()
    results(module, pipeline.LoweringStage(strict=False))
    assert "tile output failed at (root): ArithmeticError: for a test" in caplog.text
    monkeypatch.setattr(tile_sums, "gather", Failing(original, 1))
    with pytest.raises(Exception, match="ArithmeticError: for a test"):
        results(module, pipeline.LoweringStage(strict=True))


# ---- a graph by itself -----------------------------------------------------------------------------------------------


def test_what_was_erased_moved_and_replaced_comes_back() -> None:
    module = symbolic_trace(lambda x, y: (torch.sin(x) + y, torch.cos(y) * x))
    graph = module.graph
    for i, node in enumerate(graph.nodes):
        node.meta = {"number": i}
    before, numbers = str(graph), [node.meta["number"] for node in graph.nodes]
    x, y, sin, add, cos, mul, output = graph.nodes
    snapshot = Snapshot(graph)
    with graph.inserting_before(add):
        tan = graph.call_function(torch.tan, (x,))
        neg = graph.call_function(torch.neg, (tan,))
    sin.replace_all_uses_with(neg)
    graph.erase_node(sin)
    mul.args = (neg, tan)
    add.prepend(cos)
    cos.meta["number"] = "another"
    output.args = ([mul],)
    graph.erase_node(add)
    snapshot.restore()
    graph.lint()
    assert str(graph).replace("sin_1", "sin").replace("add_1", "add") == before
    assert [node.meta["number"] for node in graph.nodes] == numbers
    assert [node for node in graph.nodes if node in (x, y, cos, mul, output)] == [x, y, cos, mul, output]
    assert len(graph.find_nodes(op="call_function", target=torch.sin)) == 1
    assert graph.find_nodes(op="call_function", target=torch.tan) == []
    module.recompile()
    a, b = torch.randn(3), torch.randn(3)
    assert all(torch.equal(*pair) for pair in zip(module(a, b), (torch.sin(a) + b, torch.cos(b) * a), strict=True))


def test_nothing_changes_where_nothing_was_changed() -> None:
    """Also of a node behind the output, which others' passes may leave."""
    graph = symbolic_trace(lambda x: torch.sin(x) + 1).graph
    graph.call_function(torch.neg, (next(iter(graph.nodes)),))
    nodes, before = list(graph.nodes), str(graph)
    Snapshot(graph).restore()
    assert list(graph.nodes) == nodes and str(graph) == before
