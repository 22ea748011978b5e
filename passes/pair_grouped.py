"""Compute the two grouped products that read the output's gradient of experts as one operator, scale included.

Before::

    t: f[M, N] = dy * s
    g: f[M, R] = _grouped_mm(t, B, ends)
    dB: f[E, N, R] = _grouped_mm(t^T, h, ends)

After::

    g, dB = lora_fx::grouped_gradient_pair(dy, B, h, ends, s)

t, as large as the output, is gone, and dy can be read once: on a CPU each expert's rows stay in the cache between the
two. On an accelerator it goes into a program (:mod:`lora_fx.passes.fuse_tiles`) or, above the ranks that those take,
becomes the two products again, the scale being multiplied into B [E, N, R] and dB, which rounds as often as t did.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch.fx import Node

from lora_fx.passes.graph import aten
from lora_fx.passes.grouped_site import GroupedSite, output_gradient
from lora_fx.passes.kernels import grouped
from lora_fx.passes.rewriter import Rewriter, scale_node


def find(sites: list[GroupedSite]) -> Iterator[list[GroupedSite]]:
    """Every site whose two gradients were found."""
    return ([site] for site in sites if site.grad_h is not None and site.grad_b is not None)


def rewrite(group: list[GroupedSite], rewriter: Rewriter) -> None:
    """Replace g and dB by the two results of one operator."""
    (site,) = group
    assert site.grad_h is not None and site.grad_b is not None
    scale = scale_node(site.scale, rewriter, like=site.down)
    operands = output_gradient(site), site.grad_h.args[1], site.down, site.ends, scale
    pair = rewriter.emit(grouped.grouped_gradient_pair, *operands, like=site.grad_h)
    grad_h = rewriter.emit(operator.getitem, pair, 0, like=site.grad_h)
    grad_b: Node = rewriter.emit(operator.getitem, pair, 1, like=site.grad_b)
    if site.grad_b_transposed:
        grad_b = rewriter.emit(aten.permute.default, grad_b, [0, 2, 1], like=site.grad_b)
    rewriter.replace(site.grad_h, grad_h)
    rewriter.replace(site.grad_b, grad_b)
    site.grad_h, site.grad_b = grad_h, grad_b
    site.backward_rewrites += ["scale", "pair"] if scale is not None else ["pair"]
