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
T-th; there are as many collectives as before, and they carry R more numbers a token. (A first layer, whose x needs no
gradient, scatters none, so that dA still reads all of x.)

As there, A (or B) must be the same on all of these ranks: of siblings that are one product, that of each. Where
Inductor pipelines the gather with products (async tensor parallelism), h and g have a gather of their own. What reads
all of x or dy is then the products of the frozen model alone (and dA of a first layer), and nobody else keeps what was
gathered, nor puts it together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from lora_fx.passes._torch import CheckpointPolicy, pipelines_collectives, statically_known_true
from lora_fx.passes.graph import MM, is_call, replicated_over, shape, under_slices, val
from lora_fx.passes.kernels import operators
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.shared_rows import GATHER_TOGETHER, Gathered, gathered, may_travel, moved, together
from lora_fx.passes.site import MARK, Site

# ---- h ---------------------------------------------------------------------------------------------------------------


def find_inputs(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose input is gathered, those of one gather together: of every product, all sites that read it."""
    readers: dict[Node, list[Site]] = {}
    for site in sites:
        readers.setdefault(under_slices(site.down), []).append(site)
    groups: dict[Node, list[Site]] = {}
    for product, group in readers.items():
        x = _input(product)
        if x is not None and all(x.shared.ranks in replicated_over(site.up, "lora_a") for site in group):
            groups.setdefault(x.result, []).extend(group)
    return iter(groups.values())


def _input(product: Any) -> Gathered | None:
    x = gathered(product.args[0]) if is_call(product, MM) else None
    return x if x is not None and _takes(x, product) else None


def rewrite_inputs(group: list[Site], rewriter: Rewriter) -> None:
    """Compute each h from the piece, and gather it."""
    downs = [under_slices(site.down) for site in group]
    products = list(dict.fromkeys(downs))
    inputs: list[Any] = [_input(product) for product in products]
    x = inputs[0]
    piece = rewriter.flatten_rows(x.mine, like=_beside(x, products[0]))
    factors = [_in_time(product.args[1], x, product, rewriter) for product in products]
    own = [
        rewriter.emit_in_place(MM, piece, factor, of=x.collective, half=product)
        for product, factor in zip(products, factors, strict=True)
    ]
    for product, h in zip(products, _gather(inputs, own, products, rewriter), strict=True):
        rewriter.replace(product, h)
        for site, down in zip(group, downs, strict=True):
            if down is product:
                site.down = h if site.down is product else site.down
                site.gathered_x = product.args[0]
                site.forward_rewrites.append("gather h")
    for product in own:
        rewriter.tag(product, **{MARK: True})


# ---- g and dB --------------------------------------------------------------------------------------------------------


def find_gradients(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose output was scattered with h and whose output's gradient is gathered, once its readers are a pair;
    those of one gather together."""
    groups: dict[Node, list[Site]] = {}
    for site in sites:
        if (dy := _gradient(site)) is not None:
            groups.setdefault(dy.result, []).append(site)
    return iter(groups.values())


def _gradient(site: Site) -> Gathered | None:
    h, pair = site.scattered_h, _pair(site)
    if h is None or pair is None or (dy := gathered(pair.args[0])) is None:
        return None
    # The gradient of what was scattered, which is that of B's ranks.
    same = dy.shared == site.scattered and _same_tokens(dy.mine, h, dy.shared.dim)
    insists = site.down.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE
    return dy if same and not insists and _takes(dy, h) else None


def _pair(site: Site) -> Any:
    node: Any = site.grad_h
    pair = node.args[0] if is_call(node, operator.getitem) else None
    return pair if is_call(pair, operators.gradient_pair) else None


def rewrite_gradients(group: list[Site], rewriter: Rewriter) -> None:
    """Compute both from the piece, and gather g."""
    gradients: list[Any] = [_gradient(site) for site in group]
    pairs = [_pair(site) for site in group]
    thin, found = [], []
    for site, dy, pair in zip(group, gradients, pairs, strict=True):
        h: Any = site.scattered_h
        _, b, _, *scale = pair.args
        early = {"of": dy.collective if _gather_is_pipelined(dy) else pair, "half": pair}
        piece, rows = (rewriter.flatten_rows(tensor, like=early["of"]) for tensor in (dy.mine, h))
        b, *scale = (_in_time(operand, dy, pair, rewriter) for operand in (b, *scale))
        own = rewriter.emit_in_place(operators.gradient_pair, piece, b, rows, *scale, **early)
        grad_h, grad_b = (rewriter.emit_in_place(operator.getitem, own, place, **early) for place in (0, 1))
        thin.append(grad_h)
        found.append(grad_b)
        if h.meta.get("recompute") is not None:
            # Or backward would scatter it again, and the base with it.
            rewriter.tag(h, recompute=CheckpointPolicy.MUST_SAVE)
    gathered_g = _gather(gradients, thin, pairs, rewriter)
    for site, pair, grad_h, grad_b in zip(group, pairs, gathered_g, found, strict=True):
        for result in list(pair.users):
            rewriter.replace(result, grad_b if result.args[1] else grad_h)
        site.grad_h = grad_h
        site.grad_b = site.grad_b if site.grad_b_transposed else grad_b
        site.backward_rewrites.append("gather g")


# ---- either ----------------------------------------------------------------------------------------------------------


def _takes(tensor: Gathered, thin: Node) -> bool:
    """Whether a matrix may travel with a gathered tensor, or beside it: nobody else waits for its gather."""
    return len(tensor.collective.users) == 1 and (_gather_is_pipelined(tensor) or may_travel(thin, tensor.mine))


def _gather_is_pipelined(tensor: Gathered) -> bool:
    return pipelines_collectives(tensor.collective.args[2])


def _in_time(operand: Any, tensor: Gathered, half: Node, rewriter: Rewriter) -> Any:
    """What a product is computed from that has a gather of its own, before the one that is pipelined begins."""
    return rewriter.raised(operand, of=tensor.collective, half=half) if _gather_is_pipelined(tensor) else operand


def _gather(tensors: list[Gathered], own: list[Node], likes: list[Any], rewriter: Rewriter) -> list[Node]:
    """Gather matrices of this rank's rows, each in the order of a tensor, all of which are of one gather: of all rows.

    They are what the nodes in ``likes`` were, to a checkpoint as well.
    """
    first = tensors[0]
    pieces = [rewriter.rows_like(matrix, first.mine, like=_beside(first, likes[0])) for matrix in own]
    tensors_mine = [first.mine, *pieces]
    gather = (first.collective, first.result)
    whole, *others = together(GATHER_TOGETHER, tensors_mine, *gather, rewriter, likes[0], _gather_is_pipelined(first))
    found = []
    for tensor, other, like in zip(tensors, others, likes, strict=True):
        rewriter.tag(other, **{name: like.meta[name] for name in ("recompute", "ac_graph_id") if name in like.meta})
        rows = moved(other, tensor.result, tensor.moves, tensor.whole, rewriter, like)
        found.append(rewriter.flatten_rows(rows, like=like))
    rewriter.replace(first.result, whole)
    return found


def _beside(tensor: Gathered, half: Node) -> Node:
    """What a node that a gather reads is like: the gather, if that says in which half of the graph it is."""
    return tensor.collective if "partitioner_tag" in tensor.collective.meta else half


def _same_tokens(a: Node, b: Node, dim: int) -> bool:
    """Whether pieces of two tensors along ``dim`` are of the same tokens, in the same order."""
    if dim == 0:
        return bool(statically_known_true(val(a).numel() * shape(b)[-1] == val(b).numel() * shape(a)[-1]))
    left, right = shape(a)[:-1], shape(b)[:-1]
    alike = zip(left, right, strict=True) if len(left) == len(right) else ()
    return len(left) == len(right) and all(statically_known_true(m == n) for m, n in alike)
