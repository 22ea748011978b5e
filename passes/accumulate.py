"""Let one product accumulate into the other, instead of writing both and summing two large matrices.

Before::

    u: f[M, N] = scaled_mm(h, B^T, s)              d: f[M, K] = mm(g, A)
    y: f[M, N] = mm(x, W^T) + u                    dX: f[M, K] = d + mm(dy_q, W_q) + mm(dy_k, W_k)

After::

    y = lora_fx::accumulate(u, x, W^T)           dX = accumulate(accumulate(mm(g, A), dy_q, W_q), dy_k, W_k)

The small product is written first and the large one accumulates into it: that read hides behind the arithmetic of the
large product, and the result is rounded once, as large as it is, where base and branch were rounded apart. Autograd
keeps one matrix of the output's size (y) where it kept two. A base that is no plain product (a scaled, dequantised or
otherwise finished one) is taken as it is, and the small product accumulates into it.

The operator is functional; lowering runs it in place where nobody else reads what it adds to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from lora_fx.passes.graph import MM, aten, is_call, is_row_view, is_sum, is_tensor, peel_views, same_shape, shape, val
from lora_fx.passes.kernels import operators
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.site import Site


def find(sites: list[Site]) -> Iterator[list[Site]]:
    """Every site whose scale is folded."""
    return ([site] for site in sites if site.scale is None)


def rewrite(group: list[Site], rewriter: Rewriter) -> None:
    """Accumulate forward, and backward where the branch's input gradient is added to something."""
    (site,) = group
    y = rewriter.view_like(_forward(site, rewriter), site.add)
    rewriter.replace(site.add, y)
    site.forward_rewrites.append("accumulate")
    if site.grad_x is not None and _accumulate_grad_x(site.grad_x, rewriter):
        site.backward_rewrites.append("accumulate")


def _forward(site: Site, rewriter: Rewriter) -> Node:
    base = peel_views(site.base)
    if _is_private_product(site.base, MM):
        return rewriter.emit(operators.accumulate, site.up, *base.args, like=base)
    if _is_private_product(site.base, aten.addmm.default) and len(base.args) == 3 and not base.kwargs:
        # The bias joins the small product, which is written anyway.
        bias, x, w_t = base.args
        h, b_t, *scale = site.up.args
        small = rewriter.emit(operators.scaled_mm, h, b_t, *(scale or [None]), bias, like=site.up)
        return rewriter.emit(operators.accumulate, small, x, w_t, like=base)
    matrix = rewriter.flatten_rows(site.base, like=site.up)
    return rewriter.emit(operators.accumulate, matrix, *site.up.args, like=site.up)


def _is_private_product(node: Any, target: Any) -> bool:
    """Whether ``node`` is views of a ``target`` product that nobody reads but the sum."""
    while is_row_view(node) and len(node.users) == 1:
        node = node.args[0]
    return is_call(node, target) and len(node.users) == 1


def _accumulate_grad_x(grad_x: Node, rewriter: Rewriter) -> bool:
    """Chain the products of the sum that ``grad_x`` is a term of; says whether there was such a sum."""
    total = _whole_sum(grad_x)
    if total is None:
        return False
    products, others = [], []
    for term in _terms(total):
        if peel_views(term) is not grad_x:
            (products if _is_private_product(term, MM) else others).append(term)
    chain = grad_x
    for term in products:
        product = peel_views(term)
        chain = rewriter.emit(operators.accumulate, chain, *product.args, like=product)
    if not products:
        matrix = rewriter.flatten_rows(others.pop(), like=total)
        chain = rewriter.emit(operators.accumulate, matrix, *grad_x.args, like=total)
    result = rewriter.view_like(chain, total)
    for term in others:
        result = rewriter.emit(aten.add.Tensor, result, term, like=total)
    rewriter.replace(total, result)
    return True


def _whole_sum(grad_x: Node) -> Node | None:
    """The largest sum, in the gradient's own dtype, that ``grad_x`` is a term of and nobody reads in between."""
    node, total = grad_x, None
    while len(node.users) == 1:
        (user,) = node.users
        if is_sum(user) and val(user).dtype == val(grad_x).dtype and all(
            is_tensor(operand) and same_shape(operand, user) and val(operand).dtype == val(user).dtype
            for operand in user.args[:2]
        ):
            total = user
        elif not is_row_view(user):
            break
        node = user
    return total


def _terms(total: Node) -> Iterator[Node]:
    """The terms of a tree of sums, leftmost first."""
    pending: list[Any] = [total]
    while pending:
        node = pending.pop()
        matrix = node
        while is_row_view(matrix) and len(matrix.users) == 1:
            matrix = matrix.args[0]
        if node is total or (is_sum(matrix) and len(matrix.users) == 1 and len(shape(matrix)) == len(shape(total))):
            pending.extend(reversed(matrix.args[:2]))
        else:
            yield node
