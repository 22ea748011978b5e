"""Keep h of a checkpointed region, [M, R], where computing it again means to read a value [M, K] once more.

Before, in backward of a checkpointed SwiGLU, of which autograd keeps the input alone::

    z: f[M, K] = silu(y_gate) * y_up            computed again
    h: f[M, R] = mm(z, A^T)                     computed again, for dB: z cannot be computed where dz is, but before it
    dA         = mm(g^T, z)

After, h is one of the values that autograd keeps, and z is computed where dA reads it. All h of a Llama-3-8B block at
rank 16 are 0.027 of the size of the input that its checkpoint keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from lora_fx.passes._torch import CheckpointPolicy
from lora_fx.passes.branch import Branch
from lora_fx.passes.graph import shape, under_slices
from lora_fx.passes.recompute_branch import REGION
from lora_fx.passes.rewriter import Rewriter

LEAST_RATIO = 64
"""Of K to R: the h of a block's seven linears are then at most a ninth of what its checkpoint keeps. (Where tensor
parallel ranks gather x, that times the number of ranks: h has the rows of all.)"""


def find(sites: list[Any]) -> Iterator[list[Any]]:
    """Sites whose B is trained, which needs h, in a region which the user would rather compute again (and does not
    insist to); together where siblings take slices of one product.

    Not where dB is computed from what is left of h after a scatter, which is kept already.
    """
    groups: dict[Node, list[Any]] = {}
    for site in sites:
        if site.grad_b is not None and "gather g" not in site.backward_rewrites:
            groups.setdefault(_product(site), []).append(site)
    return (group for product, group in groups.items() if _is_computed_again(product) and _is_small(product, group))


def _product(site: Branch) -> Node:
    """h, of which siblings take slices: the product with x, or what was gathered of it."""
    node: Node = under_slices(site.down)
    return node


def _is_computed_again(node: Node) -> bool:
    return node.meta.get("recompute") is CheckpointPolicy.PREFER_RECOMPUTE and node.meta.get("ac_graph_id") != REGION


def _is_small(product: Node, group: list[Any]) -> bool:
    """Whether it has few columns for so many branches; the ranks of experts come padded."""
    rank = shape(product)[-1]
    return isinstance(rank, int) and rank * LEAST_RATIO <= group[0].in_features * len(group)


def rewrite(group: list[Any], rewriter: Rewriter) -> None:
    """Tag the product; the partitioner does the rest."""
    rewriter.tag(_product(group[0]), recompute=CheckpointPolicy.MUST_SAVE)
    for site in group:
        site.forward_rewrites.append("save h")
