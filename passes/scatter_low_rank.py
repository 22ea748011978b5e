"""Under sequence parallelism, let h and g travel in the place of what they are multiplied into.

Before, for a row-wise linear on one of T ranks, whose output is scattered, and for column-wise ones, whose input x is
gathered and whose input gradient is scattered::

    y: f[M / T, N] = wait(reduce_scatter(base + scaled_mm(h, B^T, s)))
    dX: f[M / T, K] = wait(reduce_scatter(... + mm(g, A)))
    dA: f[R, K] = mm(g^T, x)                        h, g and dA are this rank's terms of sums over the ranks

After, with both in one collective::

    y_base, h_mine: f[M / T, R] = wait(reduce_scatter(base, h));    y = y_base + scaled_mm(h_mine, B^T, s)
    dX_base, g_mine: f[M / T, R] = wait(reduce_scatter(..., g));    dX = dX_base + mm(g_mine, A)
    dA = mm(g_mine^T, x_mine)                       x_mine: f[M / T, K], what x was gathered from

The sums over the ranks are the same, as B (or A) is the same on all of them: sum(h) B^T, sum(g) A, and sum(g)^T x over
all tokens. Products that add to all tokens' rows become a T-th, behind the collective, where a residual stream is there
to be added to. The frozen model does not keep x, which is T times the size of x_mine; now dA, too, is left with x_mine,
or what that is made of (:mod:`lora_fx.passes.recompute_input`). There are as many collectives as before (over NCCL:
gloo scatters one tensor after the other), and they carry R more numbers a token.

That a factor is the same on all these ranks a graph does not show: whoever knows the placements notes the ranks
(:data:`lora_fx.passes.graph.REPLICATED`). By DTensor's placements dA is then a term of a sum, as dX is, and whoever has
it adds up the ranks' terms. h and g are summed in the dtype that they have. Where tokens do not lie in a row
and their number is a symbol, nothing shows that pieces are put together as they are cut, and nothing is done.

Where Inductor pipelines a product with its collective (async tensor parallelism), it does so again, as nothing is added
to the product any more; h, or g, has a collective of its own. Siblings' gradients, which are a sum, are not pipelined
in the frozen model either.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from lora_fx.passes._torch import pipelines_collectives, statically_known_true
from lora_fx.passes.graph import (
    CONVERT,
    MM,
    aten,
    is_call,
    is_row_view,
    is_sum,
    is_tensor,
    is_transpose,
    peel_views,
    replicated_over,
    same_count,
    same_shape,
    shape,
    source_of,
    val,
)
from lora_fx.passes.rewriter import PLACE, Rewriter
from lora_fx.passes.shared_rows import (
    REDUCE_TOGETHER,
    Gathered,
    Shared,
    chain_to_scatter,
    gathered,
    may_travel,
    moved,
    scattered,
    together,
)
from lora_fx.passes.site import MARK, Site

_PRODUCTS = (MM, aten._scaled_mm.default)
"""What Inductor pipelines with a collective."""


@dataclass(frozen=True)
class _Total:
    """A sum that is scattered."""

    node: Node
    chain: list[Node]
    """From its readers to this rank's rows."""
    shared: Shared


@dataclass(frozen=True)
class _Gradient:
    """One dA that can be computed from this rank's rows."""

    product: Node
    x: Gathered
    total: _Total
    """The gradient of x."""


# ---- y = base + u ----------------------------------------------------------------------------------------------------


def find_outputs(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose output is scattered, once their scale is folded."""
    return ([site] for site in sites if site.scale is None and _output(site) is not None)


def _output(site: Site) -> _Total | None:
    chain = chain_to_scatter(site.add)
    shared = None if chain is None else scattered(site.add, chain)
    if chain is None or shared is None or shared.ranks not in replicated_over(site.up, "lora_b"):
        return None
    removable = _removable(site.up)
    if removable is None or removable[0] is not site.add:
        return None
    worth = _is_pipelined(removable[1], chain[-2]) or may_travel(site.up.args[0], site.add)
    return _Total(site.add, chain, shared) if worth else None


def rewrite_outputs(group: list[Site], rewriter: Rewriter) -> None:
    """Scatter h with the base, and multiply it afterwards."""
    (site,) = group
    total = _output(site)
    assert total is not None
    thin: Any = site.up.args[0]
    base, (rows,), own = _scatter(total, [thin], [site.up], rewriter, like=site.up)
    added = _added(site.up, base, rows, own, rewriter)
    rewriter.replace(own, added.total)
    site.add, site.scaled, site.up = added.total, added.term, added.product
    site.scattered_h, site.scattered = rows, total.shared
    site.forward_rewrites.append("scatter h")


# ---- dX = dX_base + g A, and dA --------------------------------------------------------------------------------------


def find_gradients(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose dA is a product with an input that ranks share before and after: those of one collective together."""
    found = _by_product(sites)
    groups: dict[Node, list[Site]] = {}
    for site in sites:
        product = _product(site)
        if product in found:
            groups.setdefault(found[product].total.chain[-1], []).append(site)
    return (group for group in groups.values() if all(_is_replicated(site, found) for site in group))


def rewrite_gradients(group: list[Site], rewriter: Rewriter) -> None:
    """Scatter each g with the input gradient, and multiply it with A, and with the piece of x that was gathered."""
    found = _by_product(group)
    products = [_product(site) for site in group]
    total = next(iter(found.values())).total
    # New nodes are like dA, which is backward's for certain: what a user's autograd function made may be of no half.
    like = next(iter(found))
    thin = [rewriter.transpose(product.args[0], like=like) for product in found]
    # A term that is not made of what travels stays in the sum.
    terms = [_term_of(group, g) for g in thin]
    removed = [term for term in terms if term is not None]
    result, all_rows, own = _scatter(total, thin, removed, rewriter, like=like)
    for term, rows in zip(terms, all_rows, strict=True):
        if term is not None:
            added = _added(term, result, rows, own, rewriter)
            result = added.total
            for site in group:
                if site.grad_x is term:
                    site.grad_x = added.product
    rewriter.replace(own, result)
    for (product, gradient), rows in zip(found.items(), all_rows, strict=True):
        g_t = rewriter.transpose(rewriter.flatten_rows(rows, like=product), like=product)
        grad_a = rewriter.emit(MM, g_t, rewriter.flatten_rows(gradient.x.mine, like=product), like=product)
        rewriter.tag(grad_a, **{MARK: True})
        rewriter.replace(product, grad_a)
        for site, own_product in zip(group, products, strict=True):
            if own_product is product:
                site.grad_a = grad_a if site.grad_a is product else site.grad_a
                site.piece = gradient.x.mine
                site.backward_rewrites.append("scatter g")


def _is_replicated(site: Site, found: dict[Node, _Gradient]) -> bool:
    """Whether A is the same on all ranks that share the input."""
    product = _product(site)
    assert product is not None  # it was found
    return found[product].x.shared.ranks in replicated_over(site.up, "lora_a")


def _by_product(sites: list[Site]) -> dict[Node, _Gradient]:
    """What was found for each product; of siblings whose gradients of x are one term, one has that term."""
    return {f.product: f for site in sites if (f := _gradient(site)) is not None}


def _product(site: Site) -> Node | None:
    """``mm(g^T, x)``, of which a site's dA may be some rows."""
    node: Any = site.grad_a
    while is_call(node, aten.slice.Tensor, aten.permute.default):
        node = node.args[0]
    return node if is_call(node, MM) and is_transpose(node.args[0]) else None


def _gradient(site: Site) -> _Gradient | None:
    product = _product(site)
    if product is None or (x := gathered(product.args[1])) is None:
        return None
    node = site.grad_x
    while node is not None:
        chain = chain_to_scatter(node)
        after = None if chain is None else scattered(node, chain)
        if chain is not None and after is not None and after == x.shared and _same_rows(node, x.whole, after.dim):
            return _Gradient(product, x, _Total(node, chain, after)) if _dtype(node) == _dtype(product) else None
        users = list(node.users)
        follows = len(users) == 1 and (is_sum(users[0]) or is_row_view(users[0]) or is_call(users[0], CONVERT))
        node = users[0] if follows else None
    return None


def _same_rows(a: Node, b: Node, dim: int) -> bool:
    """Whether two tensors have the same pieces along ``dim``: any rows in a row, otherwise the same dimensions."""
    return same_shape(a, b) if dim else same_count(a, b) and bool(statically_known_true(shape(a)[-1] == shape(b)[-1]))


def _term_of(group: list[Site], g: Node) -> Node | None:
    """The product of ``g`` and A that is in the gradient of x, if it can be taken out of that."""
    terms = (site.grad_x for site in group if site.grad_x is not None)
    found = next((term for term in terms if source_of(term.args[0]) is source_of(g)), None)
    return found if found is not None and _removable(found) is not None else None


# ---- either ----------------------------------------------------------------------------------------------------------


def _dtype(node: Any) -> Any:
    return val(node).dtype


def _removable(product: Node) -> tuple[Node, Node] | None:
    """The sum that a product is a term of, under row views, and the other term, which the sum is without it."""
    node = product
    # What another term was taken out of has no readers any more.
    while len(users := [user for user in node.users if user.users]) == 1:
        (user,) = users
        if is_sum(user):
            other: Any = user.args[1] if user.args[0] is node else user.args[0]
            alike = is_tensor(other) and same_shape(other, user) and _dtype(other) == _dtype(user) == _dtype(node)
            return (user, other) if alike else None
        if not is_row_view(user):
            return None
        node = user
    return None


def _is_pipelined(whole: Node, scatter: Node) -> bool:
    """Whether Inductor makes one operator of a product and its reduce-scatter."""
    return is_call(peel_views(whole), *_PRODUCTS) and pipelines_collectives(scatter.args[3])


def _scatter(
    total: _Total, thin: list[Node], terms: list[Node], rewriter: Rewriter, like: Node
) -> tuple[Node, list[Node], Node]:
    """Scatter the rows of ``thin`` with those of ``total``, without its ``terms``.

    Returns this rank's rows of the total, those of each of ``thin``, and the old result, which is still in its place.
    """
    whole = total.node
    for term in terms:
        removable = _removable(term)
        if removable is None:
            raise AssertionError(f"{term} cannot be taken out of {total.node}")
        node, other = removable
        whole = other if node is whole else whole
        rewriter.replace(node, other)
    *moves, scatter, own = total.chain
    theirs = scatter.args[0]
    assert isinstance(theirs, Node)
    last = total.node if not moves else theirs
    tensors = [theirs]
    for each in thin:
        rows = rewriter.rows_like(each, total.node, like=like)
        # The first move reads what is left of the total by now.
        tensors.append(moved(rows, whole if moves else total.node, moves, last, rewriter, like))
    apart = _is_pipelined(whole, scatter)
    base, *all_rows = together(REDUCE_TOGETHER, tensors, scatter, own, rewriter, like, apart)
    return base, all_rows, own


@dataclass(frozen=True)
class _Added:
    total: Node
    term: Node
    product: Node


def _added(product: Node, base: Node, rows: Node, result: Node, rewriter: Rewriter) -> _Added:
    """``base`` and ``product`` of this rank's rows, in the place of a collective's ``result``."""

    def emit(target: Any, *operands: Any) -> Node:
        return rewriter.emit_in_place(target, *operands, of=result, half=product)

    matrix = rewriter.flatten_rows(rows, like=rows)
    own = emit(product.target, matrix, *product.args[1:])
    if is_call(own, MM):
        rewriter.tag(own, **{MARK: True})
    # Whose module it is, for messages.
    rewriter.tag(own, **{name: product.meta[name] for name in PLACE if name in product.meta})
    term = rewriter.view_like(own, base)
    return _Added(emit(aten.add.Tensor, base, term), term, own)
