"""`separate`: a branch that is computed again before something that needs its input's operands gets its own."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from lora_fx.passes.kernels import operators
from lora_fx.passes.site import MARK
from lora_fx.passes.tile_copies import separate
from tests.passes.harness import adapt
from tests.passes.modules import Mlp
from tests.passes.on_gpu import capture, programs

M, K, N, R = 256, 64, 96, 16


def mlp() -> nn.Module:
    return adapt(Mlp(K, N).to(torch.bfloat16).requires_grad_(False))


def checkpointed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.utils.checkpoint.checkpoint(module, t, use_reentrant=False)


def bodies(function: Callable[[Tensor], Tensor], rows: int) -> list[list[str]]:
    """What each program of the backward graph does over the N columns of a SwiGLU, in order."""
    captured = capture(function, torch.randn(rows, K, dtype=torch.bfloat16, requires_grad=True))
    return [
        [s[0] for s in program.body if s[0] != "op"]
        for program in programs(captured.backward[0].graph)
        if program.columns == N
    ]


@pytest.mark.parametrize("rows", [M, 64])
def test_checkpointed_swiglu_writes_no_operand(rows: int) -> None:
    """h of the down-projection is computed from the two bases, and so is all that comes after its gradient."""
    again, *backward = bodies(checkpointed(mlp()), rows)
    assert again == ["product", "load", "product", "load", "down"]
    assert backward == bodies(mlp(), rows)


def torn(graph: Graph, *, product: bool = True, waits: bool = True) -> tuple[Node, Node]:
    """h of y = base + u (or base + other), and a sum that reads y, after h or beside it; gives y and h."""

    def add(target: object, *args: object, shape: tuple[int, int], mark: bool = False) -> Node:
        node = graph.call_function(target, args)  # type: ignore[arg-type]  # an operator
        node.meta["val"] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        if mark:
            node.meta[MARK] = True
        return node

    shapes = {"base": (M, N), "other": (M, N), "thin": (M, R), "b": (R, N), "a": (N, R)}
    made = {}
    for name, shape in shapes.items():
        made[name] = graph.placeholder(name)
        made[name].meta["val"] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    aten = torch.ops.aten
    up = add(operators.scaled_mm, made["thin"], made["b"], None, shape=(M, N)) if product else made["other"]
    y = add(aten.add.Tensor, made["base"], up, shape=(M, N))
    h = add(aten.mm.default, y, made["a"], shape=(M, R), mark=True)
    second = add(operators.scaled_mm, h if waits else made["thin"], made["b"], None, shape=(M, N))
    graph.output((add(aten.mul.Tensor, y, second, shape=(M, N)), h))
    return y, h


def separated(**how: bool) -> tuple[int, bool]:
    """How many nodes `separate` adds to the graph of `torn`, and whether h then has an operand of its own."""
    graph = Graph()
    y, h = torn(graph, **how)
    before = len(graph.nodes)
    separate(h)
    graph.lint()
    return len(graph.nodes) - before, h.args[0] is not y


def test_what_waits_for_the_branch_keeps_the_value() -> None:
    assert separated() == (2, True)


def test_a_value_that_one_pass_can_share_is_not_copied() -> None:
    assert separated(waits=False) == (0, False)


def test_a_value_without_products_is_not_copied() -> None:
    assert separated(product=False) == (0, False)


def test_a_second_run_changes_nothing() -> None:
    graph = Graph()
    _, h = torn(graph)
    separate(h)
    before = [node.format_node() for node in graph.nodes]
    separate(h)
    assert [node.format_node() for node in graph.nodes] == before
