"""Rewrites are undone exactly when they fail, and a failure never reaches the user's compile unless they ask for it."""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from lora_fx.passes import pipeline
from lora_fx.passes.graph import MM, aten, val
from lora_fx.passes.kernels import lowering
from lora_fx.passes.pipeline import LoRARewriteError, LoweringStage, Pass, RewriteStage, rewrite_graph
from lora_fx.passes.printer import graph_text
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.site import MARK, Site
from tests.passes.harness import adapt, capture, graphs, joint_graph, only, recorded
from tests.passes.modules import Mlp


def traced(function: Callable[..., Any], *inputs: Tensor) -> Graph:
    graph = make_fx(function, tracing_mode="fake")(*inputs).graph
    for number, node in enumerate(graph.nodes):
        node.meta |= {"partitioner_tag": "is_forward", "seq_nr": number}
    return graph


def product() -> tuple[Graph, Node, Node]:
    """tanh(a @ b), and its two operations."""
    graph = traced(lambda a, b: torch.tanh(a @ b), torch.randn(4, 6), torch.randn(6, 8))
    mm, tanh = (node for node in graph.nodes if node.op == "call_function")
    return graph, mm, tanh


def state(graph: Graph) -> list[Any]:
    """Everything that must be as it was. Products of branches are marked whatever happened to them."""
    return [
        (n, n.op, n.target, n.args, dict(n.kwargs), {name: value for name, value in n.meta.items() if name != MARK})
        for n in graph.nodes
    ]


class TestRewriter:
    def test_new_nodes_inherit_and_know_their_value(self) -> None:
        graph, mm, tanh = product()
        rewriter = Rewriter(graph)
        relu = rewriter.emit(aten.relu.default, mm, like=tanh)
        assert list(graph.nodes).index(relu) == list(graph.nodes).index(tanh) - 1
        assert val(relu).shape == (4, 8)
        assert relu.meta["tensor_meta"].shape == (4, 8)
        assert (relu.meta["partitioner_tag"], relu.meta["seq_nr"]) == ("is_forward", tanh.meta["seq_nr"])

    def test_replace(self) -> None:
        graph, mm, tanh = product()
        rewriter = Rewriter(graph)
        with rewriter.transaction():
            rewriter.replace(tanh, rewriter.emit(aten.relu.default, mm, like=tanh))
        rewriter.commit()
        assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == [
            "aten.mm.default",
            "aten.relu.default",
        ]

    def test_a_node_may_stand_behind_what_it_reads(self) -> None:
        """New nodes are put where it is handy; commit puts them in order."""
        graph, mm, tanh = product()
        rewriter = Rewriter(graph)
        with rewriter.transaction():
            late = rewriter.emit(aten.relu.default, tanh, like=mm)
            for node in graph.nodes:
                if node.op == "output":
                    rewriter.redirect(tanh, late, [node])
        rewriter.commit()
        graph.lint()
        assert "relu" in graph_text(graph)

    @pytest.mark.parametrize("make", [lambda mm: (aten.t.default, mm), lambda mm: (aten.to.dtype, mm, torch.float64)])
    def test_replace_refuses_another_type(self, make: Callable[[Node], tuple[Any, ...]]) -> None:
        graph, mm, tanh = product()
        before = state(graph)
        rewriter = Rewriter(graph)
        with pytest.raises(AssertionError, match=r"cannot stand for tanh \(float32\[4, 8\]\)"), rewriter.transaction():
            rewriter.replace(tanh, rewriter.emit(*make(mm), like=tanh))
        assert state(graph) == before

    def test_a_wrong_shape_fails_before_it_is_used(self) -> None:
        graph, mm, tanh = product()
        before = state(graph)
        rewriter = Rewriter(graph)
        with pytest.raises(RuntimeError), rewriter.transaction():
            rewriter.emit(MM, mm, mm, like=tanh)
        assert state(graph) == before

    def test_everything_is_undone(self) -> None:
        graph, mm, tanh = product()
        mm.meta["recompute"] = "as it was"
        before = state(graph)
        rewriter = Rewriter(graph)
        with pytest.raises(ZeroDivisionError), rewriter.transaction():
            rewriter.tag(mm, recompute="mine", ac_graph_id=7)
            rewriter.tag(mm, recompute="mine again")
            relu = rewriter.emit(aten.relu.default, mm, like=mm)
            rewriter.replace(tanh, relu)
            rewriter.replace(relu, rewriter.emit(aten.abs.default, relu, like=tanh))
            raise ZeroDivisionError
        assert state(graph) == before
        rewriter.commit()
        assert state(graph) == before

    def test_only_the_failed_transaction_is_undone(self) -> None:
        graph, mm, tanh = product()
        rewriter = Rewriter(graph)
        with rewriter.transaction():
            relu = rewriter.emit(aten.relu.default, mm, like=tanh)
            rewriter.replace(tanh, relu)
        with pytest.raises(ZeroDivisionError), rewriter.transaction():
            rewriter.replace(relu, rewriter.emit(aten.abs.default, relu, like=tanh))
            raise ZeroDivisionError
        rewriter.commit()
        assert "relu" in graph_text(graph)
        assert "abs" not in graph_text(graph)

    def test_a_cycle_is_undone_with_the_order(self) -> None:
        graph, mm, tanh = product()
        before = state(graph)
        rewriter = Rewriter(graph)
        with rewriter.transaction():
            # Readable only after tanh, which is to read it.
            late = rewriter.emit(aten.relu.default, tanh, like=mm)
            rewriter.redirect(mm, late, [tanh])
        with pytest.raises(AssertionError):
            rewriter.commit()
        assert state(graph) == before
        graph.lint()

    def test_transposes_cancel(self) -> None:
        graph, mm, tanh = product()
        rewriter = Rewriter(graph)
        once = rewriter.transpose(mm, like=tanh)
        assert val(once).shape == (8, 4)
        assert rewriter.transpose(once, like=tanh) is mm

    def test_rows(self) -> None:
        graph = traced(lambda a: torch.tanh(a.view(24, 8)).view(4, 6, 8).exp(), torch.randn(2, 12, 8))
        _, _, tanh, view, exp, _ = graph.nodes
        rewriter = Rewriter(graph)
        assert rewriter.flatten_rows(view, like=exp) is tanh
        flat = rewriter.flatten_rows(exp, like=exp)
        assert val(flat).shape == (24, 8)
        assert rewriter.view_like(flat, tanh) is flat
        assert val(rewriter.view_like(flat, view)).shape == (4, 6, 8)


@pytest.fixture
def graph() -> Graph:
    return joint_graph(adapt(Mlp()), torch.randn(24, 48, requires_grad=True))


@pytest.fixture(autouse=True)
def warned_anew() -> Iterator[None]:
    pipeline._warn_once.cache_clear()
    yield
    pipeline._warn_once.cache_clear()


def each(sites: list[Site]) -> list[list[Site]]:
    return [[site] for site in sites]


def fail_half_way(group: list[Site], rewriter: Rewriter) -> None:
    """What a rewrite with a bug does: new nodes, new readers, tags, a record that is no longer true. Then it raises."""
    (site,) = group
    down = rewriter.emit(aten.neg.default, site.down, like=site.down)
    rewriter.tag(site.up, recompute=1)
    rewriter.redirect(site.down, down, [user for user in site.down.users if user is not down])
    site.down, site.scale = down, None
    site.forward_rewrites.append("half")
    if site.path == "up":
        raise ZeroDivisionError("for a test")


def make_a_cycle(group: list[Site], rewriter: Rewriter) -> None:
    """h depends on the sum that it goes into."""
    (site,) = group
    part = rewriter.emit(aten.slice.Tensor, site.add, 1, 0, site.rank, like=site.add)
    down = rewriter.emit(aten.add.Tensor, site.down, part, like=site.add)
    rewriter.redirect(site.down, down, [site.up])


def test_a_lowering_that_fails_leaves_the_functional_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator runs as it is, so a kernel that does not come about costs speed and nothing else."""

    def fail(node: Node) -> None:
        node.graph.call_function(aten.neg.default, (node,))
        raise ZeroDivisionError("for a test")

    module, x = adapt(Mlp()), torch.randn(24, 48, requires_grad=True)
    expected = module(x)
    monkeypatch.setattr(lowering, "LOWERINGS", dict.fromkeys(lowering.LOWERINGS, fail))
    captured = capture(module, x)
    assert "lora_fx.accumulate(" in graph_text(captured.forward[0].graph)
    with recorded():
        y = torch.compile(module, backend=graphs(captured, rewrite=True))(x)
    torch.testing.assert_close(y, expected)
    with pytest.raises(LoRARewriteError, match=r"lowering lora_fx\.accumulate failed at down: ZeroDivisionError"):
        LoweringStage(strict=True)(captured.forward[0].graph)


class TestFailures:
    def test_the_graph_is_as_it_was(self, graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
        before, text = state(graph), graph_text(graph)

        def fail(group: list[Site], rewriter: Rewriter) -> None:
            fail_half_way(group, rewriter)
            raise ZeroDivisionError("for a test")

        with caplog.at_level(logging.WARNING, "lora_fx"):
            report = rewrite_graph(graph, (Pass("broken", each, fail),))
        assert state(graph) == before
        assert graph_text(graph) == text
        assert [site.path for site in report.sites] == ["gate", "up", "down"]
        assert [site.reason for site in report.sites] == ["broken failed: for a test"] * 3
        assert not any(site.rewritten for site in report.sites)
        assert report.failures == [
            f"broken failed at {path}: ZeroDivisionError: for a test" for path in ("gate", "up", "down")
        ]
        assert report.problems() == [f"{site.path}: {site.reason}" for site in report.sites] + report.failures

    def test_logged_once(self, graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "lora_fx"):
            for _ in range(3):
                rewrite_graph(copy.deepcopy(graph), (Pass("broken", each, fail_half_way),))
        (record,) = (record for record in caplog.records if record.name.startswith("lora_fx"))
        assert "broken failed at up: ZeroDivisionError: for a test" in record.getMessage()

    def test_the_other_sites_and_passes_go_on(self, graph: Graph) -> None:
        def fail(group: list[Site], rewriter: Rewriter) -> None:
            (site,) = group
            if site.path == "up":
                fail_half_way(group, rewriter)

        expected = copy.deepcopy(graph)
        rewrite_graph(expected)
        report = rewrite_graph(graph, (Pass("broken", each, fail), *pipeline.PASSES))
        assert graph_text(graph) == graph_text(expected)
        assert [site.reason for site in report.sites] == ["", "broken failed: for a test", ""]
        assert all(site.rewritten for site in report.sites)

    def test_a_decision_that_fails(self, graph: Graph) -> None:
        def find(sites: list[Site]) -> Iterator[list[Site]]:
            yield sites[:1]
            raise ZeroDivisionError("for a test")

        text = graph_text(graph)
        report = rewrite_graph(graph, (Pass("broken", find, fail_half_way),))
        assert graph_text(graph) == text
        assert report.failures == ["broken failed: ZeroDivisionError: for a test"]

    def test_a_search_that_fails(self, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
        def find_sites(graph: Graph) -> Any:
            raise ZeroDivisionError("for a test")

        monkeypatch.setattr(pipeline, "find_sites", find_sites)
        text = graph_text(graph)
        report = rewrite_graph(graph)
        assert graph_text(graph) == text
        assert report.failures == ["find_sites failed: ZeroDivisionError: for a test"]
        assert not report.complete

    def test_an_invalid_graph(self, graph: Graph) -> None:
        before, text = state(graph), graph_text(graph)
        report = rewrite_graph(graph, (*only("fold_scale"), Pass("cyclic", each, make_a_cycle)))
        assert graph_text(graph) == text
        assert state(graph) == before
        assert [site.reason for site in report.sites] == ["the rewritten graph was not valid"] * 3
        assert not any(site.rewritten for site in report.sites)
        (failure,) = report.failures
        assert failure.startswith("commit failed: ")

    def test_strict_raises(self, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pipeline, "PASSES", (Pass("broken", each, fail_half_way),))
        monkeypatch.setattr(rewrite_graph, "__defaults__", (pipeline.PASSES,))
        RewriteStage()(copy.deepcopy(graph))
        with pytest.raises(LoRARewriteError, match="broken failed at up: ZeroDivisionError"):
            RewriteStage(strict=True)(graph)
