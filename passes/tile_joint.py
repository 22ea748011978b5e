"""Launch programs over the same rows together, where none needs what another makes.

Before, in the backward half of siblings::

    dA parts = tile(x, g);   dX = tile(g, A)            two launches, which read g

After::

    dA parts, dX = tile(x, g, g, A)                     one: the tiles of the second follow those of the first

With few rows a kernel is shorter than the pause before it and the time that it takes to get going.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, stable_topological_sort
from lora_fx.passes.graph import is_call, val
from lora_fx.passes.kernels import operators, tile_choice
from lora_fx.passes.kernels.tile_program import join as join_texts
from lora_fx.passes.kernels.tile_program import split
from lora_fx.passes.tile_copies import descendants

MOST = 4
"""The most programs of a launch."""


def join(graph: Graph) -> None:
    """Make one call of those that can run at the same time."""
    found: list[Node] = []
    for call in [n for n in graph.nodes if is_call(n, auto_functionalized) and n.args[0] is operators.tile_]:
        other = next((o for o in reversed(found) if _are_alike(o, call) and call not in descendants(o)), None)
        if other is not None:
            found.remove(other)
            call = _merge(other, call)
            stable_topological_sort(graph)
        found.append(call)


def _programs(call: Node) -> list[tuple[Any, ...]]:
    return split(call.kwargs["program"], call.kwargs["inputs"])  # type: ignore[arg-type]  # its schema


def _are_alike(one: Node, other: Node) -> bool:
    """Whether two calls are for equally many rows, and few enough."""
    programs = [*_programs(one), *_programs(other)]
    rows = [program.row_count([val(each) for each in inputs]) for program, inputs in programs]
    few = all(isinstance(count, int) and count <= tile_choice.MOST_FOR_LAUNCHES for count in rows)
    warps = {program.tile.warps for program, _ in programs}
    return few and len(set(rows)) == 1 and len(warps) == 1 and len(programs) <= MOST


def _merge(first: Node, second: Node) -> Node:
    """One call in the place of the second."""
    graph, calls = second.graph, (first, second)
    operands: dict[str, Any] = {name: [n for c in calls for n in c.kwargs[name]] for name in ("outputs", "inputs")}  # type: ignore[union-attr]
    operands["program"] = join_texts([str(call.kwargs["program"]) for call in calls])
    values = [value for call in calls for value in call.meta["val"][1]]
    with graph.inserting_before(second):
        ran = graph.call_function(auto_functionalized, (operators.tile_,), operands)
        written = graph.call_function(operator.getitem, (ran, 1))
    for node, value in ((ran, (None, values)), (written, values)):
        node.meta.update({**second.meta, "val": value})
    start = 0
    for call in calls:
        for whole in list(call.users):
            for result in list(whole.users):
                result.args = (written, start + result.args[1])  # type: ignore[operator]  # getitem's index
            graph.erase_node(whole)
        start += len(call.meta["val"][1])
        graph.erase_node(call)
    return ran
