"""Launch programs over the same rows together, where none needs what another makes.

Before, in the backward half of siblings::

    dA parts = tile(x, g);   dX = tile(g, A)            two launches, which read g

After::

    dA parts, dX = tile(x, g, g, A)                     one: the tiles of the second follow those of the first

With few rows a kernel is shorter than the pause before it and the time that it takes to get going.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, stable_topological_sort
from lora_fx.passes.graph import is_call, val
from lora_fx.passes.kernels import operators, tile_choice
from lora_fx.passes.kernels.tile_program import join as join_texts
from lora_fx.passes.kernels.tile_program import split

MOST = 4
"""The most programs of a launch."""


@dataclass
class _Launch:
    """Programs that are one call, among all calls of a graph, each of which is a bit."""

    call: Node
    alike: Any
    """What calls must have in common to be joined; None for a call that stays alone."""
    programs: int
    own: int
    before: int
    """The calls that these wait for."""


def join(graph: Graph) -> None:
    """Make one call of those that can run at the same time."""
    launches = _launches(graph)
    done: list[_Launch] = []
    for place, launch in enumerate(launches):
        other = next((each for each in reversed(done) if _can_join(each, launch)), None)
        if other is not None:
            done.remove(other)
            launch.call = _merge(other.call, launch.call)
            launch.programs += other.programs
            launch.own |= other.own
            launch.before |= other.before
            for each in (*done, *launches[place + 1 :]):
                if each.before & launch.own:
                    each.before |= launch.own | launch.before
        done.append(launch)
    if len(done) < len(launches):
        stable_topological_sort(graph)


def _launches(graph: Graph) -> list[_Launch]:
    """The calls of a graph, in its order."""
    found: list[_Launch] = []
    behind: dict[Node, int] = {}
    for node in graph.nodes:
        before = functools.reduce(operator.or_, (behind[source] for source in node.all_input_nodes), 0)
        behind[node] = before
        if is_call(node, auto_functionalized) and node.args[0] is operators.tile_:
            own = 1 << len(found)
            behind[node] |= own
            programs = split(node.kwargs["program"], node.kwargs["inputs"])
            found.append(_Launch(node, _alike(programs), len(programs), own, before))
    return found


def _alike(programs: list[tuple[Any, ...]]) -> Any:
    """How many rows a call has, and warps, if its rows are few enough."""
    program, inputs = programs[0]
    rows = program.row_count([val(each) for each in inputs])
    few = isinstance(rows, int) and rows <= tile_choice.MOST_FOR_LAUNCHES and not program.experts
    return (rows, program.tile.warps) if few else None


def _can_join(one: _Launch, other: _Launch) -> bool:
    fit = one.alike is not None and one.alike == other.alike and one.programs + other.programs <= MOST
    return fit and not one.before & other.own and not other.before & one.own


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
