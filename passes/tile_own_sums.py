"""Let programs sum the parts that they leave, where the rest of the graph waits for the sum.

Before (M tokens, P parts, R rank), two launches for each link of the chain from one program to the next::

    parts_g, parts_dB = tile(outputs=[empty(P, M, R), ...], down, across, inputs=[dy, B, h])
    g: f[M, R] = sum_parts([parts_g], [s])

After, one, in which the program that ends last on its rows adds them up (:mod:`lora_fx.passes.kernels.tile_last`)::

    counters: i32[M / rows] = slice(lora_fx.counters(...))               zeros, one buffer for all kernels of the graph
    g, parts_dB = tile(outputs=[empty(M, R), ...], sum, across, inputs=[dy, B, h, s, counters])

A sum that is stacked beside others is written into its columns of their matrix, by one program after the other. For
the graph, counters are an input: they are as they were when the kernel has ended.

Which programs do it, their tile says (``Tile.last``); where that is one sum of a graph, nothing is gained. Sums over
rows stay with ``sum_parts``: only the optimizer reads them, and all of a graph are one launch at its end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, detect_fake_mode
from lora_fx.passes.graph import aten, val
from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.tile_program import OUTPUTS, Program, loads, row_parts

# Launches of sums that a graph must be spared: making the counters is one.
FEWEST = 2
# Counters of one kernel begin at multiples of this, 128 bytes: kernels that run side by side (on streams that a user
# forks) do not write to one line of the cache.
_APART = 32


@dataclass
class _Own:
    """One sum of a graph that its programs are to do."""

    node: Node
    """The call of ``sum_parts``."""
    makers: list[tuple[Node, int]]
    """The call of a program, and which of its outputs has the parts, for each of the sums side by side."""
    memory: Node | None = None
    """The matrix, as far as it has been written."""


@dataclass
class _Call:
    """A call of a program that is to sum some of what it leaves."""

    node: Node
    sums: dict[int, tuple[_Own, int]] = field(default_factory=dict)
    """By output: the sum, and which one of those side by side it is."""

    @property
    def program(self) -> Program:
        return loads(str(self.node.kwargs["program"]))

    @property
    def rows(self) -> int:
        """M."""
        return int(val(_results(self.node)[next(iter(self.sums))]).shape[1])


def own(graph: Graph) -> None:
    """Make the programs that are to add up their parts do so."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    found = [_found(node, order) for node in graph.find_nodes(op="call_function", target=operators.sum_parts)]
    sums = [each for each in found if each is not None]
    sums = [each for each in sums if _device(each) == _device(sums[0])]  # one buffer of counters is on one device
    if len(sums) < FEWEST:
        return
    calls: dict[Node, _Call] = {}
    for each in sums:
        for place, (maker, output) in enumerate(each.makers):
            calls.setdefault(maker, _Call(maker)).sums[output] = (each, place)
    inside = sorted(calls.values(), key=lambda call: order[call.node])
    sizes = [-(-row_parts(call.rows, call.program.tile.rows) // _APART) * _APART for call in inside]
    operands: Any = inside[0].node.kwargs["inputs"]
    like = next((node for node in operands if node.op == "placeholder"), operands[0])  # which nothing has to wait for
    zeros = _add(inside[0].node, operators.counters, like, sum(sizes))
    replacements: dict[Node, Node] = {}
    start = 0
    for call, size in zip(inside, sizes, strict=True):
        count = row_parts(call.rows, call.program.tile.rows)
        counters = _add(call.node, aten.slice.Tensor, zeros, 0, start, start + count)
        replacements.update(_rewritten(call, counters))
        start += size
    # Up to here there are only new nodes.
    for each in sums:
        (result,) = each.node.users
        assert each.memory is not None
        replacements[result] = each.memory
    for old, new in replacements.items():
        old.replace_all_uses_with(new)
    for each in sums:
        for node in (*each.node.users, each.node):
            graph.erase_node(node)
    for call in reversed(inside):
        given: Any = call.node.kwargs["outputs"]
        memory = [given[output] for output in call.sums]
        for node in (*_results(call.node).values(), *call.node.users, call.node, *memory):
            graph.erase_node(node)


def _device(each: _Own) -> torch.device:
    return torch.device(val(each.node)[0].device)


def _found(node: Node, order: dict[Node, int]) -> _Own | None:
    """What is to be done about a sum of parts, if its programs are to add up all of them."""
    parts, scales, _, stacked = (*node.args, False)[:4]
    if len(parts) > 1 and not stacked:  # type: ignore[arg-type]  # its schema: a list
        return None  # those that the graph only returns
    makers = []
    for part, scale in zip(parts, scales, strict=True):  # type: ignore[arg-type]  # its schema: lists
        maker = _maker(part)
        # Programs need the scale earlier than the sum did.
        if maker is None or (scale is not None and order[scale] > order[maker[0]]):
            return None
        makers.append(maker)
    return _Own(node, makers) if len({maker for maker, _ in makers}) == len(makers) and len(node.users) == 1 else None


def _maker(part: Any) -> tuple[Node, int] | None:
    """The call that leaves ``part`` for one reader, and which output that is, if its program may add it up."""
    if part.target is not operator.getitem or len(part.users) != 1 or not isinstance(val(part).shape[1], int):
        return None
    results, output = part.args
    if results.target is not operator.getitem or results.args[0].args[:1] != (operators.tile_,):
        return None
    call = results.args[0]
    program = loads(call.kwargs["program"])
    may = program.tile.last and program.outputs[output][0] == "down" and not program.is_whole(program.outputs[output])
    return (call, output) if may else None


def _results(call: Node) -> dict[int, Node]:
    """The outputs of a call that are read, by their place."""
    return {int(node.args[1]): node for results in call.users for node in results.users}  # type: ignore[arg-type]


def _rewritten(call: _Call, counters: Node) -> dict[Node, Node]:
    """The call with sums in place of parts, before the old one: for every old result the new one, but for the parts."""
    node, program = call.node, call.program
    inputs: list[Any] = list(node.kwargs["inputs"])  # type: ignore[arg-type]  # its schema: a list
    outputs: list[Any] = list(node.kwargs["outputs"])  # type: ignore[arg-type]  # its schema: a list
    kinds, body = list(program.inputs), list(program.body)

    def operand(given: Node, kind: list[Any]) -> int:
        """Its place among the inputs."""
        for place, known in enumerate(zip(inputs, kinds)):
            if known == (given, kind):
                return place
        inputs.append(given)
        kinds.append(kind)
        return len(inputs) - 1

    columns = []
    places = [place for place, statement in enumerate(body) if statement[0] in OUTPUTS]
    for output, (each, place) in sorted(call.sums.items()):
        parts: Any
        scales: Any
        parts, scales, dtype = each.node.args[:3]
        name = str(dtype).removeprefix("torch.")
        number = None if scales[place] is None else operand(scales[place], ["number"])
        body[places[output]] = ["sum", *body[places[output]][1:3], number, name]
        ranks = [int(val(part).shape[2]) for part in parts]
        columns.append(sum(ranks[:place]))
        if each.memory is None:
            sizes = [call.rows, sum(ranks)]
            each.memory = _add(node, aten.empty.memory_format, sizes, dtype=dtype, device=_device(each))
        outputs[output] = each.memory
    operand(counters, ["counters"])
    text = replace(program, inputs=kinds, body=body).dumps()
    with detect_fake_mode([val(each) for each in outputs]):
        # Values of their own, as in fuse_tiles.
        values = [torch.empty_like(val(each)) for each in outputs]
    operands = {"outputs": outputs, "program": text, "inputs": inputs, **({"columns": columns} if any(columns) else {})}
    ran = _call(node, auto_functionalized, (operators.tile_,), (None, values), operands)
    written = _call(node, operator.getitem, (ran, 1), values)
    old, found = _results(node), {}
    for output, value in enumerate(values):
        if output in old:
            new = _call(node, operator.getitem, (written, output), value)
            if output in call.sums:
                call.sums[output][0].memory = new
            else:
                found[old[output]] = new
    return found


def _add(like: Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A node before ``like`` with its fake value computed."""
    with detect_fake_mode([val(result) for result in _results(like).values()]):
        return _call(like, target, args, target(*torch.fx.node.map_arg(args, val), **kwargs), kwargs)


def _call(like: Node, target: Any, args: tuple[Any, ...], value: Any, kwargs: dict[str, Any] | None = None) -> Node:
    with like.graph.inserting_before(like):
        node = like.graph.call_function(target, args, kwargs or {})
    node.meta.update({name: item for name, item in like.meta.items() if name not in ("val", "tensor_meta")})
    node.meta["val"] = value
    return node
