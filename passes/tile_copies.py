"""Compute a value once more for a branch that something else which needs the value waits for.

Before, in the backward graph of a checkpointed SwiGLU, where z is computed again and h is needed for dB and therefore
before its gradient g, while z's operands are needed after it::

    z: f[M, N] = silu(base_gate + u_gate) * (base_up + u_up)
    h: f[M, R] = mm(z, A^T)
    g, dB      = gradient_pair(dy, B, h)
    dgate, dup = f(base_gate + u_gate, base_up + u_up, mm(dy, W) + mm(g, A))
    dA         = mm(g^T, z)

No kernel can make h and dgate in one pass, so each operand of z would be written for the second. After, h has operands
of its own, and both passes compute them in registers from the two bases::

    h: f[M, R] = mm(silu(base_gate + u_gate') * (base_up + u_up'), A^T)

A Llama-3-8B block with checkpointing on an H200 (M 8192, R 16) then cost two kernels there instead of five. Of ranks
up to K / 64 h is kept by now (:mod:`lora_fx.passes.keep_low_rank`). A dropped x is copied likewise: the mask is drawn
once more, and nothing is written.
"""

from __future__ import annotations

from torch.fx import Node

from lora_fx.passes.graph import is_row_view, peel_views, readers
from lora_fx.passes.kernels import operators
from lora_fx.passes.tile_nodes import columns_of, makes, reads
from lora_fx.passes.tile_regions import Region, producers


def separate(down: Node) -> None:
    """Give a product that reads a value with products or a mask in it its own copy, if the value is also needed after
    it."""
    columns, value = columns_of(down), reads(down)
    if columns is None or value is None:
        return
    chain = producers(peel_views(value), Region(columns, {down})) or set()
    if any(makes(node) or node.target is operators.keep for node in chain) and _is_torn(chain, down):
        _copy(chain, down, value)


def _is_torn(chain: set[Node], down: Node) -> bool:
    """Whether a reader of the chain cannot run before ``down`` has."""
    after = descendants(down)
    return any(reader in after for node in chain for reader in readers(node))


def descendants(node: Node) -> set[Node]:
    """Everything that depends on ``node``."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found


def _copy(chain: set[Node], down: Node, value: Node) -> None:
    """Copies of the chain's nodes, and of the views between them, before ``down``, for it alone."""
    copies: dict[Node, Node] = {}
    graph = down.graph
    with graph.inserting_before(down):
        for node in list(graph.nodes):
            if node is down:
                break
            if node in chain or (is_row_view(node) and node.args[0] in copies):
                copies[node] = graph.node_copy(node, lambda operand: copies.get(operand, operand))
    down.replace_input_with(value, copies[value])
    for copy in reversed(list(copies.values())):
        if not copy.users:
            graph.erase_node(copy)
