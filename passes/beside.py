"""Have the base's product compute h as well, where A lies behind the weight in memory, and one product do siblings.

Before (gate and up of a SwiGLU; M tokens, K in, N out, R rank)::

    gate = mm(x, W_g^T);  up = mm(x, W_u^T)
    h = mm(x, cat(A_g, A_u)^T)                       reads x [M, K] once more, in a kernel of its own
    h_g = h[:, :R];  h_u = h[:, R:]

After::

    both = lora_fx::stacked_mm(x, [W_g, A_g, W_u, A_u])         [M, N + R + N + R]
    gate = both[:, :N];  h_g = both[:, N : N + R];              and so on

Done on a GPU once forward and backward are apart, where it takes less time
(:func:`lora_fx.passes.kernels.beside.pays_together`), or for each by itself, ``stacked_mm(x, [W, A])``, where R more
columns take less than h alone (:func:`lora_fx.passes.kernels.beside.pays`) and what reads y computes on. And where
autograd does not keep the base: that would be a part of ``both``, with gaps between its rows, which the user's hooks
may give back without them (``save_on_cpu``), so that backward would read what is not there. It is given a copy of h.
Not where Inductor is to tune large products or to pipeline them with collectives, which it does with those that it
knows.

Tried, and not kept: in training for gate and up as well, each with its gaps. Of 8192 tokens (Llama-3-8B, rank 16, an
H200) they take 13 us less each and no kernel makes h, for 27; of the step's 13,100 us.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import detect_fake_mode, inductor_config, stable_topological_sort
from lora_fx.passes.graph import (
    MM,
    aten,
    is_alias,
    is_beside_factor,
    is_call,
    is_sum,
    is_transpose,
    peel_views,
    readers,
    shape,
    val,
)
from lora_fx.passes.kernels import beside, operators
from lora_fx.passes.site import MARK, Site
from lora_fx.passes.snapshot import Snapshot
from lora_fx.passes.tile_nodes import can_compute, goes_out, is_half
from lora_fx.passes.tile_residuals import is_left_to_norm


def show(site: Site) -> None:
    """Transpose such a weight in a way of its own, in the joint graph: ``permute(W, [1, -2])``.

    Inductor's caches know a graph by its code, of which annotations are no part.
    """
    large = peel_views(site.base)
    if is_call(large, MM) and is_beside_factor(large) and is_call(turned := large.args[1], aten.permute.default):
        turned.args = (turned.args[0], [1, -2])


def are_left_to_inductor() -> bool:
    """Whether Inductor is to tune large products, or to pipeline them with collectives: those that it knows."""
    config = inductor_config()
    return bool(config.max_autotune or config.max_autotune_gemm or config._micro_pipeline_tp)


def is_beside_weight(turned: Any) -> bool:
    """Whether a node is a weight as :func:`show` has transposed it."""
    return is_call(turned, aten.permute.default) and list(turned.args[1]) == [1, -2]


@dataclass(frozen=True)
class Pair:
    """A branch's h, rows of a product of stacked factors or all of it, and the product that can compute it."""

    total: Node
    """The sum of both parts of y."""
    large: Node
    weight: Node
    down: Node
    """The product of x with A, or with the factors of siblings."""
    start: int
    """The column of it that h begins at."""
    a: Node

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, K and R."""
        n, k = shape(self.weight)
        return int(n), int(k), int(shape(self.a)[0])


def join(graph: Graph) -> Iterator[tuple[Node, Exception]]:
    """Rewrite every such h of ``graph``; where that fails, the graph is what it was, and gives where and why."""
    if are_left_to_inductor():
        return
    before, place = Snapshot(graph), next(iter(graph.find_nodes(op="output")))
    try:
        found: dict[Node, list[Pair]] = {}
        for node in graph.nodes:
            if (pair := _pair(node)) is not None:
                found.setdefault(pair.down, []).append(pair)
        for down, pairs in found.items():
            for group in _groups(down, sorted(pairs, key=lambda pair: pair.start)):
                place = down
                _rewrite(down, group)
        if place.op != "output":
            stable_topological_sort(graph)
            graph.eliminate_dead_code()
    except Exception as error:
        before.restore()
        yield place, error


def _pair(node: Node) -> Pair | None:
    """The h and the large product of the branch whose sum ``node`` is."""
    large: Any
    if is_call(node, operators.accumulate):
        large, up = peel_views(node.args[0]), node
        h = peel_views(node.args[1])
    else:
        ups = [u for a in node.args[:2] if is_call(u := peel_views(a), operators.scaled_mm)] if is_sum(node) else []
        if not ups:
            return None
        up = ups[0]
        large, h = next(peel_views(a) for a in node.args[:2] if peel_views(a) is not up), peel_views(up.args[0])
    found = h
    if is_call(h, aten.slice.Tensor) and h.args[1:2] == (1,):
        found = peel_views(h.args[0])
    if not (is_call(large, MM) and is_beside_factor(large) and is_call(found, MM) and found.meta.get(MARK)):
        return None
    if large.meta.get(MARK) or peel_views(large.args[0]) is not peel_views(found.args[0]):
        return None
    weight, factor = _untransposed(large.args[1]), _untransposed(found.args[1])
    if weight is None or weight.op != "placeholder" or factor is None:
        return None
    start = h.args[2] if found is not h else 0
    a = _factor_at(start, factor)
    return Pair(node, large, weight, found, start, a) if a is not None and _fits(large, weight, a) else None


def _factor_at(column: Any, factor: Node) -> Node | None:
    """A factor, or that of a stack of them which makes the columns of h from ``column`` on."""
    stack: Any = factor.args[0] if is_call(factor, aten.cat.default) else [factor]
    starts = itertools.accumulate([shape(a)[0] for a in stack], initial=0)
    return next((a for a, start in zip(stack, starts) if start == column), None)


def _untransposed(node: Any) -> Node | None:
    return node.args[0] if is_transpose(node) else None


def _fits(large: Node, weight: Node, a: Node) -> bool:
    """Whether a product of x with a weight and with a factor could be one."""
    if a.op != "placeholder" or not is_half(large) or val(large).device.type != "cuda":
        return False
    if val(weight).dtype != val(large).dtype or val(a).dtype != val(large).dtype:
        return False
    return all(isinstance(size, int) for size in (*shape(weight), *shape(a)))


def _groups(down: Node, pairs: list[Pair]) -> list[list[Pair]]:
    """What should be one product each: all siblings, every one by itself, or none."""
    places = {place for pair in pairs for place in _places(down, pair)}
    # Some are missing or read twice, or somebody else reads h.
    if sum(shape(pair.a)[0] for pair in pairs) != shape(down)[1]:
        return []
    if any(user not in places for user in down.users if down not in places) or any(goes_out(p.large) for p in pairs):
        return []
    rows = shape(down)[0]
    written = not all(map(_is_computed_on, pairs))
    alone = not written and all(beside.pays(rows, *pair.sizes) for pair in pairs)
    if len(pairs) > 1 and beside.pays_together(rows, max(pair.sizes[2] for pair in pairs), written, alone):
        return [pairs]
    return [[pair] for pair in pairs] if alone and not any(map(goes_out, places)) else []


def _is_computed_on(pair: Pair) -> bool:
    """Whether the sum of a base and its branch goes into other values before any is written.

    Where the sum is written, a large product adds itself to the branch's: that rounds once what this would round twice.
    """
    total, columns = pair.total, pair.sizes[0]
    alone = all(can_compute(r, columns) and not is_left_to_norm(r, peel_views(total)) for r in readers(total))
    return alone and is_sum(total)


def _places(down: Node, pair: Pair) -> list[Node]:
    """What has the value of a branch's h: columns of the product with stacked factors, or the product."""
    rank = shape(pair.a)[0]
    if rank == shape(down)[1]:
        return [down]
    return [
        user
        for user in down.users
        if is_call(user, aten.slice.Tensor) and user.args[1:3] == (1, pair.start) and shape(user)[1] == rank
    ]


def _rewrite(down: Node, pairs: list[Pair]) -> None:
    """One product for all ``pairs``, of which there is one or those of all siblings."""
    first = pairs[0].large
    with detect_fake_mode([val(down)]):
        rows = [part for pair in pairs for part in (pair.weight, pair.a)]
        both = emit(first, operators.stacked_mm, first.args[0], rows)
        start, hs = 0, []
        for pair in pairs:
            n, _, rank = pair.sizes
            base = emit(first, aten.slice.Tensor, both, 1, start, start + n)
            hs.append(emit(first, aten.slice.Tensor, both, 1, start + n, start + n + rank))
            start += n + rank
            pair.large.replace_all_uses_with(base)
        kept = [place for pair in pairs for place in _places(down, pair) if goes_out(place)]
        # Of slices that nobody else reads, or Inductor copies each by itself.
        stack = emit(first, aten.cat.default, [emit(first, h.target, *h.args) for h in hs], 1) if kept else None
        for pair, h in zip(pairs, hs):
            for place in _places(down, pair):
                if stack is not None and place in kept:
                    copy = emit(first, aten.slice.Tensor, stack, 1, pair.start, pair.start + pair.sizes[2])
                    place.replace_all_uses_with(copy, delete_user_cb=_leads_out)
                place.replace_all_uses_with(h)
    for pair in pairs:
        pair.large.graph.erase_node(pair.large)


def _leads_out(user: Node) -> bool:
    return user.op == "output" or (is_alias(user) and goes_out(user))


def emit(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A node before ``like``, with its value computed."""
    with like.graph.inserting_before(like):
        node = like.graph.call_function(target, args, kwargs)
    node.meta.update({name: item for name, item in like.meta.items() if name not in ("val", "tensor_meta", MARK)})
    node.meta["val"] = target(*torch.fx.node.map_arg(args, val), **kwargs)
    return node
