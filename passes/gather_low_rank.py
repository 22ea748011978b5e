"""Under sequence parallelism, compute h and g from this rank's rows, and gather them with what they are computed from.

Before, for column-wise linears on one of T ranks, whose input is gathered, and for a row-wise one, whose output's
gradient is::

    x: f[M, K] = wait(all_gather(x_mine))           x_mine: f[M / T, K]
    h: f[M, R] = mm(x, A^T)                         every rank computes the same
    dy: f[M, N] = wait(all_gather(dy_mine))         dy_mine: f[M / T, N]
    g, dB = gradient_pair(dy, B, h, s)              h and dB are this rank's terms of sums over the ranks

After, with both in one collective::

    x, h = wait(all_gather(x_mine, mm(x_mine, A^T)))
    g_mine, dB = gradient_pair(dy_mine, B, h_mine, s);      dy, g = wait(all_gather(dy_mine, g_mine))

where h_mine: f[M / T, R], the sum over the ranks, is what :mod:`lora_fx.passes.scatter_low_rank` left of h. The sum of
dB over the ranks is the same, dy^T sum(h) over all tokens. A T-th of the work is left of either, and what is read is a
T-th; there are as many collectives as before, and they carry R more numbers a token.

As there, A (or B) must be the same on all of these ranks. Where Inductor pipelines the gather with products (async
tensor parallelism), nothing is done.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from lora_fx.passes._torch import CheckpointPolicy, pipelines_collectives, statically_known_true
from lora_fx.passes.graph import MM, aten, is_call, replicated_over, shape, val
from lora_fx.passes.kernels import operators
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.shared_rows import GATHER_TOGETHER, Gathered, gathered, moved, together
from lora_fx.passes.site import MARK, Site

# ---- h ---------------------------------------------------------------------------------------------------------------


def find_inputs(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose input is gathered, those of one gather together."""
    groups: dict[Node, list[Site]] = {}
    for site in sites:
        if (x := _input(site)) is not None:
            groups.setdefault(x.collective, []).append(site)
    return iter(groups.values())


def _input(site: Site) -> Gathered | None:
    product = _down(site)
    x = gathered(product.args[0]) if is_call(product, MM) else None
    if x is None or x.shared.ranks not in replicated_over(site.up, "lora_a"):
        return None
    return x if _may_travel(x) and val(product).dtype == val(x.mine).dtype else None


def _down(site: Site) -> Any:
    """The product with x, of which siblings take slices."""
    node: Any = site.down
    while is_call(node, aten.slice.Tensor):
        node = node.args[0]
    return node


def rewrite_inputs(group: list[Site], rewriter: Rewriter) -> None:
    """Compute each h from the piece, and gather it."""
    x = _input(group[0])
    assert x is not None
    inputs = [site.x for site in group]
    products = list(dict.fromkeys(_down(site) for site in group))
    piece = rewriter.flatten_rows(x.mine, like=products[0])
    own = [rewriter.emit(MM, piece, product.args[1], like=product) for product in products]
    for product, h in zip(products, _gather(x, own, rewriter, like=products[0]), strict=True):
        rewriter.replace(product, h)
        for site in group:
            site.down = h if site.down is product else site.down
    for product in own:
        rewriter.tag(product, **{MARK: True})
    for site, whole in zip(group, inputs, strict=True):
        site.gathered_x = whole
        site.forward_rewrites.append("gather h")


# ---- g and dB --------------------------------------------------------------------------------------------------------


def find_gradients(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose output was scattered with h and whose output's gradient is gathered, once its readers are a pair."""
    return ([site] for site in sites if _gradient(site) is not None)


def _gradient(site: Site) -> Gathered | None:
    h, pair = site.scattered_h, _pair(site)
    if h is None or pair is None or (dy := gathered(pair.args[0])) is None:
        return None
    # The gradient of what was scattered, which is that of B's ranks.
    same = dy.shared == site.scattered and _same_rows(dy.mine, h, dy.shared.dim)
    insists = site.down.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE
    return dy if same and not insists and _may_travel(dy) and val(h).dtype == val(dy.mine).dtype else None


def _pair(site: Site) -> Node | None:
    node: Any = site.grad_h
    pair = node.args[0] if is_call(node, operator.getitem) else None
    return pair if is_call(pair, operators.gradient_pair) else None


def rewrite_gradients(group: list[Site], rewriter: Rewriter) -> None:
    """Compute both from the piece, and gather g."""
    (site,) = group
    dy, pair, h = _gradient(site), _pair(site), site.scattered_h
    assert dy is not None and pair is not None and h is not None
    _, b, _, *scale = pair.args
    piece, rows = (rewriter.flatten_rows(tensor, like=pair) for tensor in (dy.mine, h))
    own = rewriter.emit(operators.gradient_pair, piece, b, rows, *scale, like=pair)
    grad_h, grad_b = (rewriter.emit(operator.getitem, own, place, like=pair) for place in (0, 1))
    (grad_h,) = _gather(dy, [grad_h], rewriter, like=pair)
    for result in list(pair.users):
        rewriter.replace(result, grad_b if result.args[1] else grad_h)
    site.grad_h = grad_h
    site.grad_b = grad_b if not site.grad_b_transposed else site.grad_b
    if h.meta.get("recompute") is not None:
        # Or backward would scatter it again, and the base with it.
        rewriter.tag(h, recompute=CheckpointPolicy.MUST_SAVE)
    site.backward_rewrites.append("gather g")


# ---- either ----------------------------------------------------------------------------------------------------------


def _may_travel(tensor: Gathered) -> bool:
    """Whether other tensors may travel with one: Inductor does not pipeline its gather."""
    return not pipelines_collectives(tensor.collective.args[2])


def _gather(tensor: Gathered, own: list[Node], rewriter: Rewriter, like: Node) -> list[Node]:
    """Gather the matrices ``own`` of this rank's rows with ``tensor``: each as a matrix of all rows."""
    pieces = [tensor.mine, *(rewriter.rows_like(matrix, tensor.mine, like=like) for matrix in own)]
    whole, *others = together(GATHER_TOGETHER, pieces, list(tensor.collective.args[1:]), rewriter, like)
    rewriter.discard(tensor.collective, tensor.result)
    last = tensor.whole
    found = [moved(other, tensor.result, tensor.moves, last, rewriter, like) for other in others]
    rewriter.replace(tensor.result, whole)
    return [rewriter.flatten_rows(rows, like=like) for rows in found]


def _same_rows(a: Node, b: Node, dim: int) -> bool:
    """Whether the pieces of two tensors along ``dim`` have the same rows, in the same order."""
    if dim == 0:
        return bool(statically_known_true(val(a).numel() * shape(b)[-1] == val(b).numel() * shape(a)[-1]))
    left, right = shape(a)[:-1], shape(b)[:-1]
    return len(left) == len(right) and all(statically_known_true(m == n) for m, n in zip(left, right))
