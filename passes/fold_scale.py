"""Carry the scale of a branch inside its small products, so that nothing of the output's size is multiplied by it.

Before::

    u: f[M, N] = mm(h, B^T)                        t: f[M, N] = dy * s
    y: f[M, N] = base + u * s                      g = mm(t, B);  dB = mm(t^T, h)

After::

    u = lora_fx::scaled_mm(h, B^T, s)              g = scaled_mm(dy, B, s)
    y: f[M, N] = base + u                          dB = scaled_mm(dy^T, h, s)

The scale may be a 0-d tensor (that is how it changes without a recompile), which ``addmm``'s ``alpha`` cannot take. In
the operator it multiplies what a product accumulated, before the result is rounded: u * s, t, and with them two
roundings of every gradient, are gone. h stays unscaled: whoever reads it sees what they saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from lora_fx.passes.graph import peel
from lora_fx.passes.kernels import operators
from lora_fx.passes.rewriter import Rewriter, scale_node
from lora_fx.passes.site import Site, scale_operand


def find(sites: list[Site]) -> Iterator[list[Site]]:
    """Every site that has a scale."""
    return ([site] for site in sites if site.scale is not None)


def rewrite(group: list[Site], rewriter: Rewriter) -> None:
    """Fold in both halves; each half is right without the other."""
    (site,) = group
    scale = scale_node(site.scale, rewriter, like=site.down)
    assert scale is not None
    up = rewriter.emit(operators.scaled_mm, *site.up.args, scale, like=site.up)
    scaled = rewriter.view_like(up, site.scaled)
    rewriter.replace(site.scaled, scaled)
    if site.grad_h is not None:
        _fold_backward(site, scale, rewriter)
        site.backward_rewrites.append("scale")
    site.up, site.scaled, site.scale = up, scaled, None
    site.forward_rewrites.append("scale")


def _fold_backward(site: Site, scale: Node, rewriter: Rewriter) -> None:
    assert site.grad_h is not None
    t = peel(site.grad_h.args[0])
    dy: Any = t.args[0] if scale_operand(t) is t.args[1] else t.args[1]
    dy = rewriter.flatten_rows(dy, like=site.grad_h)
    grad_h = rewriter.emit(operators.scaled_mm, dy, site.grad_h.args[1], scale, like=site.grad_h)
    rewriter.replace(site.grad_h, grad_h)
    if site.grad_b is not None:
        h = site.up.args[0]
        left, right = (h, dy) if site.grad_b_transposed else (dy, h)
        left = rewriter.transpose(left, like=site.grad_b)
        grad_b = rewriter.emit(operators.scaled_mm, left, right, scale, like=site.grad_b)
        rewriter.replace(site.grad_b, grad_b)
        site.grad_b = grad_b
    site.grad_h = grad_h
