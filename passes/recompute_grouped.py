"""Keep no more of experts for backward than the frozen model does, beside h [M, R].

Before, for z = silu(y_1) * y_3 and y_2 = experts(z), autograd keeps base and u, or y, of each, and z for dA. After, it
keeps the bases, as the frozen model does, and h::

    y: f[M, N] = base + grouped_scaled_mm(h, B^T, ends, s)       with the product tagged for recomputation
    z = silu(y_1) * y_3                                          likewise

The product of rank R costs about as much again as reading u back. z is made of what backward reads anyway, and casts
and padding of the factors are made of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from lora_fx.passes._torch import CheckpointPolicy
from lora_fx.passes.graph import GATHERS, is_call, peel, same_count, stays_in_kernel
from lora_fx.passes.grouped_site import GroupedSite, made_of_stack
from lora_fx.passes.recompute_branch import REGION
from lora_fx.passes.recompute_input import pointwise_chain
from lora_fx.passes.rewriter import Rewriter


def find(sites: list[GroupedSite]) -> Iterator[list[GroupedSite]]:
    """All sites that have a backward, together: a sum that belongs to any of them is looked through."""
    group = [site for site in sites if site.grad_h is not None]
    return iter([group] if group else [])


def rewrite(group: list[GroupedSite], rewriter: Rewriter) -> None:
    """Tag the products, and what lies between each input and what it is made of."""
    sums = {site.add for site in group}
    for site in group:
        if stays_in_kernel(site.add) and site.up.meta.get("recompute") is None:
            rewriter.tag(site.up, recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=REGION)
            site.forward_rewrites.append("recompute")
        for factor in (site.down.args[1], site.up.args[1]):
            for node in made_of_stack(factor):
                rewriter.tag(node, recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=REGION)
    for site in group:
        if site.grad_a is None or site.dropout:
            continue
        x = peel(site.down.args[0])
        chain = pointwise_chain(x, sums)
        if any(_is_gathered(operand, x) for node in chain for operand in node.all_input_nodes):
            continue
        for node in chain:
            rewriter.tag(node, recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=REGION)
        if chain:
            site.forward_rewrites.append("recompute x")


def _is_gathered(operand: Node, x: Node) -> bool:
    """Whether x is made of rows of its size that were sorted by expert.

    Autograd would keep these in its place, as large, and forward would write both.
    """
    return is_call(peel(operand), *GATHERS) and same_count(operand, x)
