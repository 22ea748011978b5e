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
from lora_fx.passes.graph import val
from lora_fx.passes.kernels import operators

Lowering = Callable[[Node], None]


def accumulate_in_place(node: Node) -> None:
    """Let Inductor add into the base's buffer when this is its last reader (it copies the base otherwise).

    The wrapper is how Inductor represents a mutation that it may or may not perform in place; the decision, with
    everything that it must know about later readers and views, stays Inductor's.
    """
    base, a, b, *scale = node.args
    graph = node.graph
    with graph.inserting_before(node):
        wrapper = graph.call_function(
            auto_functionalized,
            (operators.accumulate_,),
            {"base": base, "a": a, "b": b, "scale": scale[0] if scale else None},
        )
        result = graph.call_function(operator.getitem, (wrapper, 1))
    wrapper.meta["val"] = (None, val(node))
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


LOWERINGS: dict[Callable[..., Any], Lowering] = {
    operators.accumulate: accumulate_in_place,
}


def lower(graph: Graph) -> int:
    """Lower every node that has a lowering; returns how many there were."""
    nodes = [node for target in LOWERINGS for node in graph.find_nodes(op="call_function", target=target)]
    for node in nodes:
        LOWERINGS[cast(Callable[..., Any], node.target)](node)
    return len(nodes)
