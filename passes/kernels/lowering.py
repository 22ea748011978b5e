"""Which implementation each of our operators gets, chosen per node once forward and backward are separate graphs.

The functional form of an operator is always correct, so a lowering may leave a node as it is. ``LOWERINGS`` is the seam
for kernels: an operator, and a function that decides by shape and device and rewrites the node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized
from lora_fx.passes.graph import aten, val
from lora_fx.passes.kernels import operators

Lowering = Callable[[Node], None]


def accumulate_in_place(node: Node) -> None:
    """Let Inductor add into the base's buffer when this is its last reader (it copies the base otherwise).

    The wrapper is how Inductor represents a mutation that it may or may not perform in place; the decision, with
    everything that it must know about later readers and views, stays Inductor's.
    """
    base, a, b, *scale = node.args
    operands = {"base": base, "a": a, "b": b, "scale": scale[0] if scale else None}
    wrapper = _emit(node, auto_functionalized, (operators.accumulate_,), operands, value=(None, val(node)))
    result = _emit(node, operator.getitem, (wrapper, 1), value=val(node))
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def scaled_mm_as_aten(node: Node) -> None:
    """On an accelerator: the product, and a scale that Inductor fuses into whoever reads it."""
    if val(node).device.type == "cpu":
        return
    a, b, scale, bias = (*node.args, None, None)[:4]
    result = _emit(node, aten.mm.default, (a, b), value=val(node))
    if scale is not None:
        result = _emit(node, aten.mul.Tensor, (result, scale), value=val(node))
    if bias is not None:
        result = _emit(node, aten.add.Tensor, (result, bias), value=val(node))
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def gradient_pair_as_aten(node: Node) -> None:
    """On an accelerator: the two products, each with its scale on the small result."""
    if val(node)[0].device.type == "cpu":
        return
    dy, b, h, scale = (*node.args, None)[:4]
    graph = node.graph
    dy_t = _emit(node, aten.permute.default, (dy, [1, 0]), value=val(cast(Node, dy)).t())
    results = []
    for operands, value in (((dy, b), val(node)[0]), ((dy_t, h), val(node)[1])):
        result = _emit(node, aten.mm.default, operands, value=value)
        if scale is not None:
            result = _emit(node, aten.mul.Tensor, (result, scale), value=value)
        results.append(result)
    for user in list(node.users):
        user.replace_all_uses_with(results[cast(int, user.args[1])])
        graph.erase_node(user)
    graph.erase_node(node)


def _emit(like: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, value: Any) -> Node:
    """A node before ``like`` with its metadata and a known fake value."""
    with like.graph.inserting_before(like):
        node = like.graph.call_function(target, args, kwargs or {})
    node.meta.update(like.meta)
    node.meta["val"] = value
    return node


LOWERINGS: dict[Callable[..., Any], Lowering] = {
    operators.accumulate: accumulate_in_place,
    operators.scaled_mm: scaled_mm_as_aten,
    operators.gradient_pair: gradient_pair_as_aten,
}


def lower(graph: Graph) -> None:
    """Lower every node that has a lowering."""
    for target, lowering in LOWERINGS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            lowering(node)
