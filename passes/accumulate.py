"""Add the small product into the base's output where that is written to memory anyway.

Before::

    u: f[M, N] = scaled_mm(h, B^T, s)              d: f[M, K] = mm(g, A)
    y: f[M, N] = base + u                          dX: f[M, K] = dX_base + d

After::

    y = lora_fx::accumulate(base, h, B^T, s)       dX = lora_fx::accumulate(dX_base, g, A)

For a y that is read by a matrix product, by attention or by the caller: u never exists, and base and branch are
rounded once together. The operator is functional; lowering runs it in place where nobody else reads the base.

A y that only pointwise operations read is better left as a sum, which becomes part of their kernel: see
``recompute_branch``. So is a base that a pointwise operation computes (a product times a quantisation scale, the sum
with another branch): the sum becomes part of its kernel, where the base is not rounded first. Except on a CPU, for a
product that leaves the cache: fresh memory for it costs more than to read and write a base again (SwiGLU, M 2048,
K 1024, N 2816, bfloat16: half of plain torch.compile's overhead becomes a third). In 16 bits this is done for input
gradients only; outputs that are rounded before a SwiGLU make the gradients after it err 1.18 times as much. It was also
tried on a GPU for ranks above 64, and saved 0.008 of the frozen block's time (Llama-3-8B, rank 128, an H200): beside a
branch of 1.7 times its size, y then errs 1.13 times as much as with plain torch.compile.

Nor is anything done where Inductor makes the large product accumulate into the small one, which rounds the small one
instead of the large one and so halves the squared error: for plain matrices (no view between product and sum) in 16
bits on the CPU. That costs 4% of the large product more than our way, for which 32 bits have no use.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from lora_fx.passes.graph import (
    MM,
    is_call,
    is_pointwise,
    is_row_view,
    is_sum,
    is_tensor,
    leaves_cache,
    peel_views,
    same_shape,
    stays_in_kernel,
    val,
)
from lora_fx.passes.kernels import operators
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.site import Site


def find(sites: list[Site]) -> Iterator[list[Site]]:
    """Every site whose scale is folded and whose output, or input gradient, is written to memory."""
    return (
        [site] for site in sites if site.scale is None and (_is_written(site) or _written_sum(site.grad_x) is not None)
    )


def rewrite(group: list[Site], rewriter: Rewriter) -> None:
    """Accumulate in the half, or both halves, where the sum is written."""
    (site,) = group
    if _is_written(site):
        base = rewriter.flatten_rows(site.base, like=site.up)
        y = rewriter.emit(operators.accumulate, base, *site.up.args, like=site.up)
        rewriter.replace(site.add, rewriter.view_like(y, site.add))
        site.forward_rewrites.append("accumulate")
    found = _written_sum(site.grad_x)
    if found is not None:
        assert site.grad_x is not None
        total, rest, term = found
        base = rewriter.flatten_rows(term, like=site.grad_x)
        grad_x = rewriter.emit(operators.accumulate, base, *site.grad_x.args, like=site.grad_x)
        if term is rest:
            rewriter.replace(total, rewriter.view_like(grad_x, total))
        else:
            (reader,) = term.users
            rewriter.redirect(term, rewriter.view_like(grad_x, term), [reader])
            rewriter.replace(total, rest)
        site.backward_rewrites.append("accumulate")


def _is_written(site: Site) -> bool:
    """Whether both the base and its sum with the branch are written to memory, by anybody yet."""
    if not site.add.users:
        return False
    written = not stays_in_kernel(site.add) or (leaves_cache(val(site.up)) and val(site.up).dtype.itemsize >= 4)
    return not is_pointwise(peel_views(site.base)) and written and not _becomes_addmm(site.add, site.base, site.scaled)


def _becomes_addmm(total: Node, large: Node, small: Node) -> bool:
    """Whether Inductor turns mm + small into addmm(small, ...)."""
    plain = is_call(large, MM) and large in total.args and small in total.args
    return plain and val(total).device.type == "cpu" and val(total).dtype.itemsize < 4


def _written_sum(grad_x: Node | None) -> tuple[Node, Node, Node] | None:
    """The sum that the branch's input gradient goes into, if that sum or another is written to memory.

    With its other operand, and the term of that which the gradient can be added to: usually the operand itself. A
    longer sum (siblings, other readers of x) is one kernel that reads every term once. It stays as it is, unless the
    branch's product leaves the cache and one of the terms is a large product, which is written.
    """
    node = grad_x
    while node is not None and len(node.users) == 1:
        (user,) = node.users
        if is_sum(user):
            other = user.args[1] if user.args[0] is node else user.args[0]
            assert isinstance(other, Node)
            large = leaves_cache(val(node))
            if not (is_tensor(other) and same_shape(other, node) and val(other).dtype == val(node).dtype):
                return None
            if stays_in_kernel(user) and not large:
                return None
            term = _written_term(other, node) if large and is_sum(peel_views(other)) else other
            if term is None or is_pointwise(peel_views(term)) or _becomes_addmm(user, term, node):
                return None
            return user, other, term
        if not is_row_view(user):
            return None
        node = user
    return None


def _written_term(total: Node, like: Node) -> Node | None:
    """A large product that is a term of a sum, and of nothing else: [..., K] like ``like``."""
    pending = [total]
    while pending:
        node = pending.pop()
        if len(node.users) != 1 or val(node).dtype != val(like).dtype:
            continue
        if is_sum(peel_views(node)):
            pending += [a for a in peel_views(node).args[:2] if isinstance(a, Node)]
        elif is_call(peel_views(node), MM) and same_shape(node, like):
            return node
    return None
