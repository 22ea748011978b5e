"""Add the grouped up-projection of experts into their base's output where that is written to memory anyway.

Before::

    u: f[M, N] = grouped_scaled_mm(h, B^T, ends, s)       d: f[M, K] = _grouped_mm(g, A, ends)
    y: f[M, N] = base + u                                 dX: f[M, K] = dX_base + d

After::

    y = lora_fx::grouped_accumulate(base, h, B^T, ends, s)     dX = lora_fx::grouped_accumulate(dX_base, g, A, ends)

On a CPU alone, where a product has an accumulating form for each expert's rows. torch's grouped kernels of GPUs have
none (no ``beta``): there a kernel of ours reads the base and writes the sum (:mod:`lora_fx.passes.fuse_tiles`), up to
the ranks that it takes. Above them the small product is written and Inductor adds it in the kernel that reads the sum,
and the report says so. As for linears, a sum that only pointwise operations read stays a sum.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from lora_fx.passes.graph import is_call, is_sum, stays_in_kernel, val
from lora_fx.passes.grouped_site import GROUPED_MM, GroupedSite
from lora_fx.passes.kernels import grouped
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.tile_nodes import HALF, MAX_RANK


def find(sites: list[GroupedSite]) -> Iterator[list[GroupedSite]]:
    """Every site whose scale is folded and whose output, or input gradient, is written to memory."""
    return (
        [site] for site in sites if site.scale is None and (_is_written(site) or _written_sum(site.grad_x) is not None)
    )


def rewrite(group: list[GroupedSite], rewriter: Rewriter) -> None:
    """Accumulate in the half, or both halves, where the sum is written."""
    (site,) = group
    if val(site.add).device.type != "cpu":
        if site.rank > MAX_RANK or val(site.add).dtype not in HALF:
            site.notes.append(
                "a GPU's grouped product cannot accumulate: the small product is written, and added by a reader"
            )
        return
    if _is_written(site):
        y = rewriter.emit(grouped.grouped_accumulate, site.base, *site.up.args, like=site.up)
        rewriter.replace(site.add, y)
        site.forward_rewrites.append("accumulate")
    found = _written_sum(site.grad_x)
    if found is not None:
        assert site.grad_x is not None
        total, base = found
        grad_x = rewriter.emit(grouped.grouped_accumulate, base, *site.grad_x.args[:3], like=site.grad_x)
        rewriter.replace(total, grad_x)
        site.backward_rewrites.append("accumulate")


def _is_written(site: GroupedSite) -> bool:
    return _is_plain(site.base) and not stays_in_kernel(site.add)


def _is_plain(product: Node) -> bool:
    """Whether ``product`` is a grouped one that lies in memory without gaps, as the operator returns its sum."""
    return is_call(product, GROUPED_MM) and bool(val(product).is_contiguous())


def _written_sum(grad_x: Node | None) -> tuple[Node, Node] | None:
    """The sum that the branch's input gradient goes into, and its other operand, where that is a product."""
    if grad_x is None or len(grad_x.users) != 1:
        return None
    (total,) = grad_x.users
    if not is_sum(total) or stays_in_kernel(total) or val(total).dtype != val(grad_x).dtype:
        return None
    other = total.args[1] if total.args[0] is grad_x else total.args[0]
    return (total, other) if isinstance(other, Node) and _is_plain(other) else None
