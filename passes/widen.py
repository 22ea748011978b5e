"""Have the base's product add the branch, where the rows of its weight have room for B.

Before (gate and up of a SwiGLU; M tokens, K in, N out, R rank)::

    gate = mm(x, W_g^T) + scaled_mm(h_g, B_g^T, s);  up = mm(x, W_u^T) + scaled_mm(h_u, B_u^T, s)

After::

    hxh = cat(h_u, x, h_g)                                              [M, R + K + R]
    gate = lora_fx::wide_mm(hxh[:, R:], W_g, B_g, s, "right")
    up = lora_fx::wide_mm(hxh[:, :R + K], W_u, B_u, s, "left")

For ranks of which the kernels that read gate and up would take as long for the sums as for everything else, and compute
them again in backward (:mod:`lora_fx.passes.kernels.wide`). Autograd keeps gate and up, as it does of the frozen model,
and nothing of ``hxh``. Not where Inductor is to tune large products or to pipeline them with collectives, which it does
with those that it knows.

Tried, and not kept: dX of down, which SwiGLU backward reads, as one product ``[dy, g] [W; A]`` of a weight behind which
its A lies. Of 8192 tokens (Llama-3-8B, rank 128, an H200) a step is no faster that way, and its activations become 1.12
of the frozen model's instead of 0.93: the kernel that adds the terms writes over what it reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_fx.passes._torch import inductor_config
from lora_fx.passes.graph import MM, aten, is_call, is_transpose, peel_views, room_side, shape, val
from lora_fx.passes.kernels import operators, wide
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.site import Site
from lora_fx.passes.tile_nodes import is_half


def find(sites: list[Site]) -> Iterator[list[Site]]:
    """Sites whose bases read one x, at most one for each side of it; their h may be of x under masks."""
    config = inductor_config()
    if config.max_autotune or config.max_autotune_gemm or config._micro_pipeline_tp:
        return
    groups: dict[Any, dict[str, Site]] = {}
    for site in sites:
        if _can_widen(site):
            large: Any = peel_views(site.base)
            region = large.meta.get("recompute"), large.meta.get("ac_graph_id")
            groups.setdefault((peel_views(large.args[0]), region), {}).setdefault(room_side(large), site)
    for group in groups.values():
        yield list(group.values())


def _can_widen(site: Site) -> bool:
    large: Any = peel_views(site.base)
    if site.scale is not None or not (is_call(large, MM) and room_side(large)):
        return False
    if not is_call(site.up, operators.scaled_mm, MM):
        return False
    weight = large.args[1].args[0] if is_transpose(large.args[1]) else None
    if weight is not None and val(weight).stride() != (shape(weight)[1] + site.rank, 1):
        return False
    rows, alike = shape(large)[0], {val(n).dtype for n in (large, site.up, site.add)}
    if weight is None or weight.op != "placeholder" or len(alike) > 1 or not is_half(large):
        return False
    return isinstance(rows, int) and rows >= wide.MIN_ROWS and len(site.up.args) < 4  # no bias of the branch's


def rewrite(group: list[Site], rewriter: Rewriter) -> None:
    """One matrix of x and both h for all of the group."""
    by_side = {room_side(peel_views(site.base)): site for site in group}
    first: Any = peel_views(group[0].base)
    x = first.args[0]
    parts = [by_side[wide.LEFT].up.args[0]] if wide.LEFT in by_side else []
    parts += [x, *([by_side[wide.RIGHT].up.args[0]] if wide.RIGHT in by_side else [])]
    hxh = rewriter.emit(aten.cat.default, parts, 1, like=group[0].up)
    for side, site in by_side.items():
        columns, whole = shape(x)[1] + site.rank, shape(hxh)[1]
        xh = hxh
        if columns != whole:
            start, end = (0, columns) if side == wide.LEFT else (whole - columns, whole)
            xh = rewriter.emit(aten.slice.Tensor, hxh, 1, start, end, like=site.up)
        large: Any = peel_views(site.base)
        _, b_t, scale = (*site.up.args, None)[:3]
        b = rewriter.transpose(b_t, like=site.up)
        y = rewriter.emit(operators.wide_mm, xh, large.args[1].args[0], b, scale, side, like=site.up)
        rewriter.replace(site.add, rewriter.view_like(y, site.add))
        site.forward_rewrites.append("widen")
