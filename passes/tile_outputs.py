"""Give a program memory of its own where something else still reads what it would write over.

A region chooses the memory of its outputs when it is cut: that of an input which nobody reads after it. Regions that
are cut later may compute again what was computed from this input, and read it themselves::

    p = f(y);   y' = tile(outputs=[y], inputs=[y, ...]);   z = tile(inputs=[p, ...])      as the first region found it
    y' = tile(outputs=[y], inputs=[y, ...]);   z = tile(inputs=[y, ...])                  and what became of it

so when all are cut it is looked at once more. After::

    y' = tile(outputs=[empty], inputs=[y, ...]);   z = tile(inputs=[y, ...])

Inductor would find out by itself, and copy, but not behind ``donated``, nor where both programs are one launch.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized
from lora_fx.passes.graph import aten, is_alias, is_call, val
from lora_fx.passes.kernels import operators


def settle(graph: Graph) -> None:
    """Take every output's memory from elsewhere, where a reader of it is not done before the program runs."""
    for call in graph.find_nodes(op="call_function", target=auto_functionalized):
        if call.args[0] is operators.tile_:
            outputs: Any = call.kwargs["outputs"]
            call.update_kwarg("outputs", [out if _is_free(out, call) else _fresh(out, call) for out in outputs])


def _is_free(out: Node, call: Node) -> bool:
    """Whether all that reads an output's memory is the call, or what the call waits for."""
    if is_call(out, aten.empty.memory_format):
        return True
    source: Any = out.args[0] if is_call(out, operators.donated) else out
    pending = [user for user in source.users if user not in (call, out)]
    before = _ancestors(call) if pending else set()
    while pending:
        user = pending.pop()
        if user is call:
            continue
        if user not in before:
            return False
        if is_alias(user):
            pending += user.users
    return True


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    pending = [node]
    while pending:
        new = [source for source in pending.pop().all_input_nodes if source not in found]
        found.update(new)
        pending += new
    return found


def _fresh(out: Node, call: Node) -> Node:
    """Memory for the same matrix."""
    value = val(out)
    with call.graph.inserting_before(call):
        if is_call(out, operators.donated):
            options = {"dtype": value.dtype, "device": value.device}
            node = call.graph.call_function(aten.empty.memory_format, (out.args[1],), options)
        else:
            node = call.graph.call_function(aten.empty_like.default, (out,))
    node.meta.update({**out.meta, "val": value})
    return node
