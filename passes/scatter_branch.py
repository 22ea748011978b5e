"""Let Inductor pipeline a product with its reduce-scatter (async tensor parallelism) although a branch is added to it.

Before, for a row-wise linear under sequence parallelism, on one of T ranks::

    y: f[M, N] = mm(x, W^T) + scaled_mm(h, B^T, s)
    z: f[M / T, N] = wait(reduce_scatter(y))

After::

    z = wait(reduce_scatter(mm(x, W^T))) + scaled_mm(wait(reduce_scatter(h * s)), B^T)

B is the same on all ranks, so scattering h [M, R] and multiplying then is multiplying and scattering then. What
Inductor looks for, a product that nothing but a reduce-scatter reads, is there again. In backward likewise for the
input gradient of a column-wise linear that is alone on its input, with g and A in the places of h and B; siblings'
gradients are a sum, which is not pipelined in the frozen model either.

It costs a collective of R numbers a token, so it is done only where Inductor will pipeline (``_micro_pipeline_tp``,
and symmetric memory for the group). Values of 16 bits are scaled and summed in 32. Scaling before the collective also
keeps Inductor from pipelining the small product with it, which would read x once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lora_fx.passes._torch import pipelines_collectives
from lora_fx.passes.graph import CONVERT, MM, aten, is_call, is_row_view, is_sum, peel_views, same_shape, val
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.shared_rows import chain_to_scatter
from lora_fx.passes.site import Site

_PRODUCTS = (MM, aten._scaled_mm.default)


@dataclass(frozen=True)
class _Scatter:
    """A sum of a large product and a small one that nothing but a reduce-scatter reads."""

    total: Node
    large: Node
    small: Node
    chain: list[Node]
    """From the sum's readers to the ``wait_tensor`` that gives the result."""


def find(sites: list[Site]) -> Iterator[list[Site]]:
    """Every site with a half that is scattered, once its scale is folded."""
    return ([site] for site in sites if site.scale is None and (_forward(site) or _backward(site)))


def rewrite(group: list[Site], rewriter: Rewriter) -> None:
    """Scatter the two parts of the sum one by one, in either half or both."""
    (site,) = group
    if (found := _forward(site)) is not None:
        site.add, site.scaled, site.up = _scatter(found, site.up, rewriter)
        site.forward_rewrites.append("scatter")
    if (found := _backward(site)) is not None:
        assert site.grad_x is not None
        _, _, site.grad_x = _scatter(found, site.grad_x, rewriter)
        site.backward_rewrites.append("scatter")


def _scatter(found: _Scatter, product: Any, rewriter: Rewriter) -> tuple[Node, Node, Node]:
    """The new sum, its small operand, and the product under that one's view."""
    first, *_, result = found.chain
    matrix, right, *scale = product.args
    dtype = val(matrix).dtype
    if dtype.itemsize < 4:
        matrix = rewriter.emit(CONVERT, matrix, torch.float32, like=first)
    if scale:
        matrix = rewriter.emit(aten.mul.Tensor, matrix, *scale, like=first)
    made = {found.total: rewriter.rows_like(matrix, found.total, like=first)}
    for node in found.chain:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
        target: Any = node.target
        made[node] = rewriter.emit(target, *args, like=node, **kwargs)
    rewriter.redirect(found.total, found.large, list(found.total.users))
    rows = rewriter.flatten_rows(made[result], like=result)
    if dtype.itemsize < 4:
        rows = rewriter.emit(CONVERT, rows, dtype, like=result)
    after = rewriter.emit(product.target, rows, right, like=result)
    small = rewriter.view_like(after, result)
    total = rewriter.emit(aten.add.Tensor, result, small, like=result)
    rewriter.replace(result, total)
    return total, small, after


def _forward(site: Site) -> _Scatter | None:
    return _found(site.add, site.scaled)


def _backward(site: Site) -> _Scatter | None:
    node = site.grad_x
    while node is not None and len(node.users) == 1:
        (user,) = node.users
        if is_sum(user):
            return _found(user, node)
        if not is_row_view(user):
            return None
        node = user
    return None


def _found(total: Node, small: Node) -> _Scatter | None:
    """The reduce-scatter of ``total``, if that is the sum of ``small`` and a product and Inductor would pipeline it."""
    large: Any = total.args[1] if total.args[0] is small else total.args[0]
    if not (is_call(peel_views(large), *_PRODUCTS) and len(large.users) == 1 and same_shape(large, total)):
        return None
    chain = chain_to_scatter(total)
    if chain is None:
        return None
    reduction, _, group = chain[-2].args[1:4]
    linear = reduction in ("sum", "avg")
    return _Scatter(total, large, small, chain) if linear and pipelines_collectives(group) else None
