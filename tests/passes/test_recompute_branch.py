"""`recompute_branch` by itself: which products it tags, and what autograd keeps then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx import Graph

from lora_fx.passes._torch import CheckpointPolicy
from lora_fx.passes.pipeline import rewrite_graph
from lora_fx.passes.printer import graph_text
from lora_fx.passes.recompute_branch import REGION
from tests.passes.harness import Passes, adapt, capture, joint_graph, only
from tests.passes.modules import Mlp
from tests.passes.test_sites import checkpointed, selectively_checkpointed

RECOMPUTE = only("fold_scale", "recompute_branch")
bf16 = torch.bfloat16


def mlp(dtype: torch.dtype = bf16) -> nn.Module:
    return adapt(Mlp().to(dtype))


def x(dtype: torch.dtype = bf16) -> torch.Tensor:
    return torch.randn(24, 48, dtype=dtype, requires_grad=True)


def tags(graph: Graph) -> list[str]:
    """The operators of the nodes that are tagged for recomputation in our region."""
    return [
        str(node.target)
        for node in graph.nodes
        if node.meta.get("recompute") is CheckpointPolicy.PREFER_RECOMPUTE and node.meta["ac_graph_id"] == REGION
    ]


def test_tags_the_product_and_nothing_else() -> None:
    graph = joint_graph(mlp(), x())
    rewrite_graph(graph, only("fold_scale"))
    text = graph_text(graph)
    graph = joint_graph(mlp(), x())
    report = rewrite_graph(graph, RECOMPUTE)
    assert graph_text(graph) == text, "it adds and removes nothing"
    assert tags(graph) == ["lora_fx.scaled_mm.default"] * 2
    assert [site.forward for site in report.sites] == [("scale", "recompute"), ("scale", "recompute"), ("scale",)]


def kept(function: Callable[..., Any], passes: Passes) -> list[tuple[int, ...]]:
    """The shapes of what forward hands to backward, without parameters, inputs and numbers."""
    captured = capture(function, x(), passes=passes, backward=True)
    nodes = captured.backward[0].graph.find_nodes(op="placeholder")
    names = [node for node in nodes if not str(node.target).startswith(("primals", "tangents"))]
    return sorted(tuple(node.meta["val"].shape) for node in names if node.meta["val"].dim() > 0)


def test_what_is_kept() -> None:
    """h of each branch, the base of gate and of up, and the product of the two that the last linear reads."""
    assert kept(mlp(), RECOMPUTE) == [(24, 4)] * 3 + [(24, 96)] * 3
    assert len(kept(mlp(), only("fold_scale"))) >= 6


def test_the_products_are_made_again() -> None:
    captured = capture(mlp(), x(), passes=RECOMPUTE, backward=True)
    forward, backward = (graph_text(half[0].graph) for half in (captured.forward, captured.backward))
    assert forward.count("scaled_mm") == 3
    # Of the backward's own there are g and dB of each branch, on its side of the bar.
    own = [line for line in backward.splitlines() if "scaled_mm" in line and not line.startswith("| ")]
    assert len(own) == 2


@pytest.mark.parametrize("wrap", [checkpointed, selectively_checkpointed])
def test_under_checkpointing(wrap: Callable[[nn.Module], Callable[..., Any]]) -> None:
    """What is recomputed anyway is left to the user's region; what selective checkpointing would keep is not."""
    captured = capture(wrap(mlp()), x(), passes=RECOMPUTE)
    expected = {"scale": 3, "recompute": 2} if wrap is selectively_checkpointed else {"scale": 3}
    assert captured.count("forward") == expected


def test_where_it_costs_more_than_it_saves() -> None:
    assert capture(mlp(torch.float32), x(torch.float32), passes=RECOMPUTE).count("forward") == {"scale": 3}


def test_an_output_that_is_written_is_not_for_it() -> None:
    linear = adapt(nn.Linear(48, 40, dtype=bf16))
    assert capture(linear, x(), passes=RECOMPUTE).count("forward") == {"scale": 1}


def test_no_backward() -> None:
    with torch.no_grad():
        assert capture(mlp(), x(), passes=RECOMPUTE).count("forward") == {"scale": 3}


def test_the_second_run_changes_nothing() -> None:
    graph = joint_graph(mlp(), x())
    rewrite_graph(graph, RECOMPUTE)
    before = tags(graph), graph_text(graph)
    assert rewrite_graph(graph, RECOMPUTE).sites == []
    assert (tags(graph), graph_text(graph)) == before
