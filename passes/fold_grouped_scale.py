"""Carry the scale of an experts' branch inside its grouped up-projection: nothing of the output's size is multiplied.

Before::

    u: f[M, N] = _grouped_mm(h, B^T, ends)
    y: f[M, N] = base + u * s

After::

    u = lora_fx::grouped_scaled_mm(h, B^T, ends, s)
    y: f[M, N] = base + u

The backward half has its scale from ``pair_grouped``; where B is not trained, g is scaled here.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_fx.passes.graph import is_call
from lora_fx.passes.grouped_site import GROUPED_MM, GroupedSite, output_gradient
from lora_fx.passes.kernels import grouped
from lora_fx.passes.rewriter import Rewriter, scale_node


def find(sites: list[GroupedSite]) -> Iterator[list[GroupedSite]]:
    """Every site that has a scale."""
    return ([site] for site in sites if site.scale is not None)


def rewrite(group: list[GroupedSite], rewriter: Rewriter) -> None:
    """Fold forward, and backward what is there to fold."""
    (site,) = group
    scale = scale_node(site.scale, rewriter, like=site.down)
    h, b, ends = site.up.args[:3]
    up = rewriter.emit(grouped.grouped_scaled_mm, h, b, ends, scale, like=site.up)
    rewriter.replace(site.scaled, up)
    if site.grad_h is not None and is_call(site.grad_h, GROUPED_MM):
        dy, factor = output_gradient(site), site.grad_h.args[1]
        grad_h = rewriter.emit(grouped.grouped_scaled_mm, dy, factor, ends, scale, like=site.grad_h)
        rewriter.replace(site.grad_h, grad_h)
        site.grad_h = grad_h
        site.backward_rewrites.append("scale")
    site.up, site.scaled, site.scale = up, up, None
    site.forward_rewrites.append("scale")
