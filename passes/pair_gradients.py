"""Compute the two products that read the output's gradient as one operator, so that it can be read once.

Before::

    g: f[M, R] = scaled_mm(dy, B, s)
    dB: f[N, R] = scaled_mm(dy^T, h, s)

After::

    g, dB = lora_fx::gradient_pair(dy, B, h, s)

As plain ATen the operator is the two products; it is the seam where a kernel that reads dy once takes over.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch.fx import Node

from lora_fx.passes.kernels import operators
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.site import Site


def find(sites: list[Site]) -> Iterator[list[Site]]:
    """Every site whose two gradients were found, once its scale is folded."""
    return ([site] for site in sites if site.grad_h is not None and site.grad_b is not None and site.scale is None)


def rewrite(group: list[Site], rewriter: Rewriter) -> None:
    """Replace g and dB by the two results of one operator."""
    (site,) = group
    assert site.grad_h is not None and site.grad_b is not None
    # Either product is mm(a, b), or scaled_mm(a, b, scale) after folding.
    dy, b, *scale = site.grad_h.args
    pair = rewriter.emit(operators.gradient_pair, dy, b, site.up.args[0], *scale, like=site.grad_h)
    grad_h = rewriter.emit(operator.getitem, pair, 0, like=site.grad_h)
    grad_b: Node = rewriter.emit(operator.getitem, pair, 1, like=site.grad_b)
    if site.grad_b_transposed:
        grad_b = rewriter.transpose(grad_b, like=site.grad_b)
    rewriter.replace(site.grad_h, grad_h)
    rewriter.replace(site.grad_b, grad_b)
    site.grad_h, site.grad_b = grad_h, grad_b
    site.backward_rewrites.append("pair")
