"""Compute the input of a branch again in backward, where the frozen model does not keep it.

dA = g^T x needs x, which the frozen linear does not. Before, for the down-projection of a SwiGLU and for whatever reads
a normalised value, autograd keeps a matrix [M, K] for dA alone. After, it keeps what the frozen model keeps (the two
products under silu(gate) * up; the residual stream and one number a row), and x is computed again::

    x: f[M, K] = silu(gate) * up            tagged for recomputation, down to what it is made of

Behind it stands a kernel that computes x tile by tile and never writes it (:mod:`lora_fx.passes.tile_regions`), so this
is for devices that have one, and for ranks that it takes: for a stack above them cuBLAS reads x, and backward of a
Llama-3-8B block of rank 64 (M 8192, an H100) takes 0.02 of the frozen block's time more if it has to write it first.
The tags stop at sums: a residual stream is kept, not computed again from the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from lora_fx.passes._torch import CheckpointPolicy
from lora_fx.passes.graph import (
    aten,
    is_call,
    is_pointwise,
    is_sum,
    is_tensor,
    is_transpose,
    peel,
    same_count,
    shape,
    val,
)
from lora_fx.passes.recompute_branch import REGION
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.site import Site, before_dropout
from lora_fx.passes.tile_nodes import MAX_RANK


def find(sites: list[Site]) -> Iterator[list[Site]]:
    """All sites whose A is trained, together: a sum that belongs to any of them is looked through."""
    group = [site for site in sites if site.grad_a is not None and _has_kernel(site)]
    return iter([group] if group else [])


def _has_kernel(site: Site) -> bool:
    """Whether dA will be computed tile by tile, for a stack of siblings as for one."""
    grad_a: Any = site.grad_a
    while is_transpose(grad_a):
        grad_a = grad_a.args[0]
    rank = shape(grad_a.args[0])[0] if is_call(grad_a, aten.slice.Tensor) else site.rank
    return val(site.down).device.type != "cpu" and rank <= MAX_RANK


def rewrite(group: list[Site], rewriter: Rewriter) -> None:
    """Tag what lies between each input and what it is made of."""
    sums = {site.add for site in group}
    for site in group:
        chain = pointwise_chain(peel(before_dropout(site.x if site.piece is None else site.piece)[0]), sums)
        for node in chain:
            rewriter.tag(node, recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=REGION)
        if chain:
            site.forward_rewrites.append("recompute x")


def pointwise_chain(x: Any, sums: set[Node]) -> list[Node]:
    """The pointwise operations that make ``x``, as far as they are of its size and nobody else has tagged them."""
    found: list[Node] = []
    pending = [x]
    while pending:
        node = peel(pending.pop())
        if node in found or not (isinstance(node, Node) and is_pointwise(node) and same_count(node, x)):
            continue
        if is_sum(node) and node not in sums and val(node).dtype == val(x).dtype:
            continue
        if node.meta.get("recompute") is not None and node.meta.get("ac_graph_id") != REGION:
            return []
        found.append(node)
        pending += [operand for operand in node.all_input_nodes if is_tensor(operand)]
    return found
