"""Keep a branch's sum for the kernel that reads it, and compute its product again in backward instead of saving it.

Before, for z = silu(y_gate) * y_up, autograd saves base and u of both: four matrices [M, N]. After, it saves the two
bases, as the frozen model does, and h [M, R]::

    y: f[M, N] = base + scaled_mm(h, B^T, s)       with scaled_mm tagged for recomputation

The sum is exact in the consumer's registers, where a written y would be rounded. The product costs as much again in
backward as reading it back would.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import Node

from lora_fx.passes._torch import CheckpointPolicy
from lora_fx.passes.graph import is_sum, leaves_cache, readers, same_shape, stays_in_kernel, val
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.site import Site

# Regions of the user's checkpointing count from 0; a value between two different regions is saved, so ours is one.
REGION = 1 << 20

# Selective checkpointing that saves matrix products means the large ones.
_SAVED = (None, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


def find(sites: list[Site]) -> Iterator[list[Site]]:
    """Every site with a backward whose output is read by pointwise operations alone, and is not recomputed anyway."""
    return (
        [site]
        for site in sites
        if site.grad_h is not None
        and stays_in_kernel(site.add)
        and site.up.meta.get("recompute") in _SAVED
        and _is_cheap(val(site.up))
    )


def _is_cheap(product: torch.Tensor) -> bool:
    """Whether computing the product again costs about as much as reading it.

    On a CPU not in float32, nor where it leaves the cache: fresh memory for it costs as much as the product. A SwiGLU
    MLP (M 2048, K 1024, N 2816, R 16; ``examples/benchmarks/cpu.py``) then has 1.1 of plain torch.compile's overhead in
    bfloat16 and 0.9 in float32, and without this 0.6 and 0.3. Autograd keeps as much either way there. Measured
    on a machine with other work.
    """
    if product.device.type != "cpu":
        return True
    return product.dtype.itemsize < 4 and not leaves_cache(product)


def rewrite(group: list[Site], rewriter: Rewriter) -> None:
    """Tag the product (or the residual stream that it goes into); the partitioner does the rest."""
    (site,) = group
    residual = _residual(site)
    if residual is not None:
        rewriter.tag(residual, recompute=CheckpointPolicy.MUST_SAVE)
        site.forward_rewrites.append("save sum")
        return
    region = site.up.meta.get("ac_graph_id", REGION)
    rewriter.tag(site.up, recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=region)
    site.forward_rewrites.append("recompute")


def _residual(site: Site) -> Node | None:
    """The sum of y with a residual stream that is y's only reader, on a device whose kernels write that sum.

    It is what a later norm needs, and as large as the base's output, which would be kept to compute it again.
    """
    if val(site.add).device.type == "cpu":
        return None
    (reader, *others) = readers(site.add)
    plain = is_sum(reader) and same_shape(reader, site.add) and val(reader).dtype == val(site.add).dtype
    return reader if plain and not others and reader.meta.get("recompute") is None else None
