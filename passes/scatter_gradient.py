"""Under sequence parallelism, compute dA from this rank's tokens: no rank then keeps the input of all of them.

Before, for column-wise linears on one of T ranks, whose input x is gathered and whose input gradient is scattered::

    x: f[M, K] = wait(all_gather(x_mine))          x_mine: f[M / T, K]
    dA: f[R, K] = mm(g^T, x)                        g and dA are this rank's terms of sums over the ranks
    dX: f[M / T, K] = wait(reduce_scatter(... + mm(g, A)))

After, with both in one collective::

    dX, g_mine: f[M / T, R] = wait(reduce_scatter(... + mm(g, A), g))
    dA = mm(g_mine^T, x_mine)

The sum over the ranks is the same: sum(g)^T x, over all tokens. The frozen model does not keep x, which is T times the
size of x_mine, and would have to gather it again; now dA, too, is left with x_mine, or what that is made of
(:mod:`lora_fx.passes.recompute_input`), and with a T-th of the work. There are as many collectives as before, and they
carry R more numbers a token.

A must be the same on all these ranks, which a graph does not show: whoever knows the placements notes the ranks
(:data:`lora_fx.passes.graph.REPLICATED`). By DTensor's placements dA is then a term of a sum, as dX is, and whoever has
it adds up the ranks' terms. g is summed in the dtype of dX, which it travels with. Left alone where the dimension that
ranks share is a symbol: then nothing shows that pieces are put together as they are cut. What Inductor pipelines with a
product (async tensor parallelism) is no sum: :mod:`lora_fx.passes.scatter_branch` has it by then, and siblings'
gradients, which are one, are not pipelined in the frozen model either.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lora_fx.passes._torch import group_ranks, statically_known_true
from lora_fx.passes.graph import (
    CONVERT,
    MM,
    aten,
    is_call,
    is_row_view,
    is_sum,
    is_transpose,
    peel_views,
    replicated_over,
    same_count,
    same_shape,
    shape,
    val,
)
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.scatter_branch import WAIT, chain_to_scatter
from lora_fx.passes.site import Site

_GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
_TOGETHER = torch.ops._c10d_functional.reduce_scatter_tensor_coalesced.default


@dataclass(frozen=True)
class _Shared:
    """How ranks share a tensor: each has its piece along ``dim``, which is 0 where they lie in a row.

    Ranks tell groups apart, and names do not: of two equal meshes each has its own groups, and DTensor may take one for
    a gather and the other for the scatter of its gradient.
    """

    dim: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class _Found:
    """One dA that can be computed from this rank's rows."""

    product: Node
    mine: Node
    """The piece of x that this rank had."""
    total: Node
    """The sum that is the gradient of x."""
    chain: list[Node]
    """From the readers of that to its piece."""
    ranks: tuple[int, ...]
    """Those that share x."""


def find(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose dA is a product with an input that ranks share before and after: those of one collective together."""
    found = _by_product(sites)
    groups: dict[Node, list[Site]] = {}
    for site in sites:
        product = _product(site)
        if product in found:
            groups.setdefault(found[product].chain[-1], []).append(site)
    return (group for group in groups.values() if all(_is_replicated(site, found) for site in group))


def rewrite(group: list[Site], rewriter: Rewriter) -> None:
    """Scatter each g with the input gradient, and multiply it with the piece that was gathered."""
    found = _by_product(group)
    products = [(site, _product(site)) for site in group]
    total, chain = next((f.total, f.chain) for f in found.values())
    *moves, scatter, result = chain
    theirs, *how = scatter.args
    assert isinstance(theirs, Node)
    # New nodes are like dA, which is backward's for certain: what a user's autograd function made may be of no half.
    like = next(iter(found))
    tensors = [theirs]
    for product in found:
        g = rewriter.transpose(product.args[0], like=like)
        tensors.append(_moved(rewriter.rows_like(g, total, like=like), total, moves, theirs, rewriter, like))
    together = rewriter.emit(_TOGETHER, tensors, *how, like=like)
    own, *rows = [
        rewriter.emit(WAIT, rewriter.emit(operator.getitem, together, place, like=like), like=like)
        for place in range(len(tensors))
    ]
    rewriter.replace(result, own)
    rewriter.discard(scatter, result)
    for (product, shared), row in zip(found.items(), rows, strict=True):
        g_t = rewriter.transpose(rewriter.flatten_rows(row, like=product), like=product)
        x = rewriter.flatten_rows(shared.mine, like=product)
        rewriter.replace(product, rewriter.emit(MM, g_t, x, like=product))
        for site, own_product in products:
            if own_product is product:
                site.piece = shared.mine
                site.backward_rewrites.append("scatter g")


def _moved(rows: Node, total: Node, moves: list[Node], last: Node, rewriter: Rewriter, like: Node) -> Node:
    """``rows`` in the order in which ``moves`` put those of ``total``: what is to ``rows`` as ``last`` is to that."""
    made = {total: rows}
    for node in moves:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
        target: Any = node.target
        made[node] = rewriter.emit(target, *args, like=like, **kwargs)
    return made[last]


def _is_replicated(site: Site, found: dict[Node, _Found]) -> bool:
    """Whether A is the same on all ranks that share the input."""
    product = _product(site)
    assert product is not None  # it was found
    return found[product].ranks in replicated_over(site.down)


def _by_product(sites: list[Site]) -> dict[Node, _Found]:
    """What was found for each product; of siblings whose gradients of x are one term, one has that term."""
    return {f.product: f for site in sites if (f := _found(site)) is not None}


def _product(site: Site) -> Node | None:
    """``mm(g^T, x)``, of which a site's dA may be some rows."""
    node: Any = site.grad_a
    while is_call(node, aten.slice.Tensor, aten.permute.default):
        node = node.args[0]
    return node if is_call(node, MM) and is_transpose(node.args[0]) else None


def _found(site: Site) -> _Found | None:
    product = _product(site)
    if product is None or (gathered := _gathered(product.args[1])) is None:
        return None
    mine, whole, shared = gathered
    node = site.grad_x
    while node is not None:
        chain = chain_to_scatter(node)
        after = None if chain is None else _scattered(node, chain)
        if chain is not None and after is not None and after == shared and _same_rows(node, whole, shared.dim):
            found = _Found(product, mine, node, chain, shared.ranks)
            return found if val(node).dtype == val(product).dtype else None
        users = list(node.users)
        follows = len(users) == 1 and (is_sum(users[0]) or is_row_view(users[0]) or is_call(users[0], CONVERT))
        node = users[0] if follows else None
    return None


def _gathered(x: Any) -> tuple[Node, Node, _Shared] | None:
    """The piece that this rank had of ``x``, and x in the shape in which its pieces lie one after another."""
    whole = source = peel_views(x)
    dim = 0
    if is_call(source, aten.cat.default):
        pieces, *dims = source.args
        dim = dims[0] if dims else source.kwargs.get("dim", 0)
        source = _cut(pieces, 0)
    if not (is_call(source, WAIT) and is_call(source.args[0], _GATHER)):
        return None
    mine, _, group = source.args[0].args[:3]
    ranks = group_ranks(group)
    if ranks is None or (whole is not source and len(whole.args[0]) != len(ranks)):
        return None
    return mine, whole, _Shared(_along(whole, dim), ranks)


def _along(node: Node, dim: int) -> int:
    """``dim``, or 0 where all dimensions before it have one element."""
    return 0 if all(statically_known_true(size == 1) for size in shape(node)[:dim]) else dim


def _same_rows(a: Node, b: Node, dim: int) -> bool:
    """Whether two tensors have the same pieces along ``dim``: any rows in a row, otherwise the same dimensions."""
    return same_shape(a, b) if dim else same_count(a, b) and bool(statically_known_true(shape(a)[-1] == shape(b)[-1]))


def _scattered(total: Node, chain: list[Node]) -> _Shared | None:
    """How ``total`` is shared after its chain, if that sums the ranks' terms and puts pieces in the ranks' order."""
    *moves, scatter, _ = chain
    theirs, reduction, _, name = scatter.args[:4]
    ranks = group_ranks(str(name))
    if ranks is None or reduction != "sum":
        return None
    if not moves:
        return _Shared(0, ranks) if theirs is total else None
    if not is_call(theirs, aten.cat.default):
        return None
    pieces, *dims = theirs.args  # type: ignore[union-attr]  # a node, as is_call saw
    first: Any = pieces[0] if pieces else None  # type: ignore[index]  # a list of nodes
    if (dims and dims[0] != 0) or not is_call(first, operator.getitem) or len(pieces) != len(ranks):  # type: ignore[arg-type]
        return None
    cut = first.args[0]
    dim = cut.args[2] if len(cut.args) > 2 else cut.kwargs.get("dim", 0)
    if _cut(pieces, dim) is not total:
        return None
    return _Shared(_along(total, dim), ranks)


def _cut(pieces: Any, dim: int) -> Any:
    """What ``pieces`` are, in their order, when it is cut along ``dim``; None if they are something else."""
    first = pieces[0]
    if not (is_call(first, operator.getitem) and is_call(first.args[0], aten.split.Tensor)):
        return None
    cut = first.args[0]
    along = cut.args[2] if len(cut.args) > 2 else cut.kwargs.get("dim", 0)
    if along != dim or len(val(cut)) != len(pieces):
        return None
    in_order = all(is_call(p, operator.getitem) and p.args == (cut, i) for i, p in enumerate(pieces))
    return cut.args[0] if in_order else None
