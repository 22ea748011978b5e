"""Write dA of experts as ``g^T x``, whichever way autograd has it.

Before, where the matrices of A are read as they lie in memory (experts stored transposed, ranks padded for a kernel)::

    dA^T: f[E, K, R] = _grouped_mm(x^T, g, ends)

After::

    dA: f[E, R, K] = _grouped_mm(g^T, x, ends);   dA^T = permute(dA, [0, 2, 1])

Autograd then keeps x, which others read, and not a view of it; and what computes one form computes both.
"""

from __future__ import annotations

from collections.abc import Iterator

from lora_fx.passes.graph import aten, is_transpose, peel
from lora_fx.passes.grouped_site import GROUPED_MM, GroupedSite
from lora_fx.passes.rewriter import Rewriter


def find(sites: list[GroupedSite]) -> Iterator[list[GroupedSite]]:
    """Every site whose dA is the other way round."""
    return ([site] for site in sites if _is_turned(site))


def _is_turned(site: GroupedSite) -> bool:
    if site.grad_a is None:
        return False
    x_t, g = site.grad_a.args[:2]
    return is_transpose(x_t) and peel(g) is site.grad_h


def rewrite(group: list[GroupedSite], rewriter: Rewriter) -> None:
    """Turn it."""
    (site,) = group
    assert site.grad_a is not None
    x_t, g, ends = site.grad_a.args[:3]
    g_t = rewriter.emit(aten.permute.default, g, [1, 0], like=site.grad_a)
    grad_a = rewriter.emit(GROUPED_MM, g_t, x_t.args[0], ends, like=site.grad_a)  # type: ignore[union-attr]  # a transpose
    rewriter.replace(site.grad_a, rewriter.emit(aten.permute.default, grad_a, [0, 2, 1], like=site.grad_a))
    site.grad_a = grad_a
