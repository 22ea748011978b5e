"""Give linears that read the same input one down-projection: x is read once for all of them.

Before (q, k, v)::

    h_q = mm(x, A_q^T);  h_k = mm(x, A_k^T);  h_v = mm(x, A_v^T)            each reads x [M, K]
    dA_q = mm(g_q^T, x); ...                                                each reads x again
    dX = ... + mm(g_q, A_q) + ... + mm(g_k, A_k) + ... + mm(g_v, A_v)       each adds to [M, K]

After, with A = cat(A_q, A_k, A_v) [3R, K]::

    h: f[M, 3R] = mm(x, A^T);   h_q = h[:, :R]; ...
    g: f[M, 3R] = cat(g_q, g_k, g_v)
    dA: f[3R, K] = mm(g^T, x);  dA_q = dA[:R]; ...
    dX = ... + mm(g, A)

Siblings with dropout draw independent masks, so they read different inputs and are not siblings here. A linear that is
used twice on one input has one down-projection already: it enters the stack once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from lora_fx.passes._torch import CheckpointPolicy
from lora_fx.passes.graph import CONVERT, COPIES, MM, aten, is_call, is_row_view, is_sum, is_transpose, root, shape, val
from lora_fx.passes.kernels.lowering import has_few_rows
from lora_fx.passes.recompute_branch import REGION
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.site import Site
from lora_fx.passes.tile_nodes import MAX_RANK, is_half


def find(sites: list[Site]) -> Iterator[list[Site]]:
    """Groups of sites with the same input value, dtype and checkpointing region, and at least two different factors.

    Not where products are written out for Inductor (:mod:`lora_fx.passes.kernels.lowering`), which then reads x once
    for all of them without a stack that it would have to make first.
    """
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        meta = site.down.meta
        region = (meta.get("recompute"), meta.get("ac_graph_id"))
        groups.setdefault((site.x_key, val(site.down).dtype, region), []).append(site)
    return (group for group in groups.values() if len(_first_of_each_factor(group)) > 1 and not _is_written_out(group))


def _is_written_out(group: list[Site]) -> bool:
    """Whether the products of few tokens with x are written out: together they have a rank that no program takes."""
    down, rank = group[0].down, sum(shape(site.down)[1] for site in _first_of_each_factor(group).values())
    return has_few_rows(down) and not (is_half(down) and rank <= MAX_RANK)


def rewrite(group: list[Site], rewriter: Rewriter) -> None:
    """Stack forward; stack backward too when every sibling has its gradients."""
    first, firsts = group[0], _first_of_each_factor(group)
    twins = [(site, twin) for site in group if (twin := firsts[root(site.down.args[1])]) is not site]
    group = list(firsts.values())
    x, label = first.x, f"stack({len(group)})"
    a = rewriter.emit(aten.cat.default, [_factor(site, rewriter) for site in group], 0, like=first.down)
    # The factors are parameters, which live anyway: joining them again in backward costs less than keeping a copy.
    region = first.down.meta.get("ac_graph_id", REGION)
    rewriter.tag(a, recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=region)
    h = rewriter.emit(MM, x, rewriter.transpose(a, like=first.down), like=first.down)
    if all(site.grad_h is not None and site.grad_a is not None for site in group):
        _stack_backward(group, a, x, rewriter)
        for site in group:
            site.backward_rewrites.append(label)
    start = 0
    for site in group:
        rows = rewriter.emit(aten.slice.Tensor, h, 1, start, start + site.rank, like=site.down)
        rewriter.replace(site.down, rows)
        site.down, start = rows, start + site.rank
        site.forward_rewrites.append(label)
    for site, twin in twins:
        rewriter.replace(site.down, twin.down)
        site.down = twin.down
        site.forward_rewrites.append(label)


def _first_of_each_factor(group: list[Site]) -> dict[Any, Site]:
    """The first site of each A; a linear that is used twice has two sites."""
    firsts: dict[Any, Site] = {}
    for site in group:
        firsts.setdefault(root(site.down.args[1]), site)
    return firsts


def _factor(site: Site, rewriter: Rewriter) -> Any:
    """A as [R, K]."""
    a_t = site.down.args[1]
    assert isinstance(a_t, Node)
    return a_t.args[0] if is_transpose(a_t) else rewriter.transpose(a_t, like=site.down)


def _stack_backward(group: list[Site], a: Node, x: Any, rewriter: Rewriter) -> None:
    last = group[-1].grad_a
    assert last is not None
    g = rewriter.emit(aten.cat.default, [site.grad_h for site in group], 1, like=last)
    grad_a = rewriter.emit(MM, rewriter.transpose(g, like=last), x, like=last)
    start = 0
    for site in group:
        assert site.grad_a is not None
        rows = rewriter.emit(aten.slice.Tensor, grad_a, 0, start, start + site.rank, like=site.grad_a)
        if site.grad_a_transposed:
            rows = rewriter.transpose(rows, like=site.grad_a)
        rewriter.replace(site.grad_a, rows)
        site.grad_a, start = rows, start + site.rank
    if all(site.grad_x is not None for site in group):
        _merge_grad_x(group, g, a, rewriter)


def _merge_grad_x(group: list[Site], g: Node, a: Node, rewriter: Rewriter) -> None:
    """One mm(g, A) in place of every sibling's term in the sum that is x's gradient."""
    sums = [_sums(site.grad_x) for site in group]
    if not set.intersection(*map(set, sums)):
        for site in group:
            site.notes.append("stack: the siblings' input gradients do not end in one sum")
        return
    # In a chain of sums the last one, where every g is there already; in a tree any.
    keeper = next((k for k, (own, *_) in zip(group, sums, strict=True) if all(own in s for s in sums)), group[0])
    for site in group:
        if site is not keeper:
            # Terms may be summed with each other first, so operands are read anew after each removal.
            term, total = _term(site.grad_x)
            left, right = total.args[:2]
            rewriter.replace(total, right if left is term else left)
            site.grad_x = None
    assert keeper.grad_x is not None
    grad_x = rewriter.emit(MM, g, a, like=keeper.grad_x)
    rewriter.replace(keeper.grad_x, grad_x)
    keeper.grad_x = grad_x


def _term(grad_x: Any) -> tuple[Node, Any]:
    """What a gradient becomes after views, copies and casts, and its only reader."""
    node = grad_x
    while True:
        (user,) = node.users
        if not (is_row_view(user) or is_call(user, *COPIES, CONVERT)):
            return node, user
        node = user


def _sums(grad_x: Any) -> list[Node]:
    """The sums that a gradient flows through, as long as each is the only reader of the one before."""
    found: list[Node] = []
    node = grad_x
    while len(node.users) == 1:
        (user,) = node.users
        if is_sum(user):
            found.append(user)
        elif not (is_row_view(user) or is_call(user, *COPIES, CONVERT)):
            break
        node = user
    return found
