"""Have the base's product compute h as well, where A lies behind the weight in memory.

Before (gate and up of a SwiGLU; M tokens, K in, N out, R rank)::

    gate = mm(x, W_g^T);  up = mm(x, W_u^T)
    h = mm(x, cat(A_g, A_u)^T)                       reads x [M, K] once more, in a kernel of its own
    h_g = h[:, :R];  h_u = h[:, R:]

After::

    both_g = lora_fx::stacked_mm(x, W_g, A_g)        [M, N + R]
    gate = both_g[:, :N];  h_g = both_g[:, N:];      and so on

What autograd keeps of h is a copy, unless it keeps the base as well: a part of ``both`` keeps all of it. Done on a GPU
once forward and backward are apart, where the product takes less time than h by itself
(:func:`lora_fx.passes.kernels.beside.pays`), and not where Inductor is to tune large products or to pipeline them with
collectives, which it does with those that it knows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import detect_fake_mode, inductor_config, saved_by_hooks, stable_topological_sort
from lora_fx.passes.graph import (
    MM,
    aten,
    is_beside_factor,
    is_call,
    is_row_view,
    is_sum,
    is_tensor,
    is_transpose,
    peel_views,
    readers,
    shape,
    val,
)
from lora_fx.passes.kernels import beside, operators
from lora_fx.passes.site import MARK, Site
from lora_fx.passes.snapshot import Snapshot
from lora_fx.passes.tile_nodes import can_compute, is_half
from lora_fx.passes.tile_residuals import is_left_to_norm


def show(site: Site) -> None:
    """Transpose such a weight in a way of its own, in the joint graph: ``permute(W, [1, -2])``.

    Inductor's caches know a graph by its code, of which annotations are no part.
    """
    large = peel_views(site.base)
    if is_call(large, MM) and is_beside_factor(large) and is_call(turned := large.args[1], aten.permute.default):
        turned.args = (turned.args[0], [1, -2])


@dataclass(frozen=True)
class Pair:
    """A branch's h, rows of a product of stacked factors or all of it, and the product that can compute it."""

    large: Node
    down: Node
    """The product of x with A, or with the factors of siblings."""
    start: int
    """The column of it that h begins at."""
    a: Node


def join(graph: Graph) -> Iterator[tuple[Node, Exception]]:
    """Rewrite every such h of ``graph``; where that fails, the graph is what it was, and gives the product and why."""
    config = inductor_config()
    if config.max_autotune or config.max_autotune_gemm or config._micro_pipeline_tp:
        return
    groups: dict[Node, list[Pair]] = {}
    for node in graph.nodes:
        if (pair := _pair(node)) is not None:
            groups.setdefault(pair.down, []).append(pair)
    groups = {down: pairs for down, pairs in groups.items() if _covers(down, pairs)}
    if not groups:
        return
    before = Snapshot(graph)
    for down, pairs in groups.items():
        try:
            _rewrite(down, sorted(pairs, key=lambda pair: pair.start))
        except Exception as error:
            before.restore()
            yield down, error
            return
    stable_topological_sort(graph)
    graph.eliminate_dead_code()


def _pair(node: Node) -> Pair | None:
    """The h and the large product of the branch whose sum ``node`` is, if all that reads it computes from it.

    A sum that is written to memory a large product adds to the branch's, which rounds it once, and not twice.
    """
    up = (
        next((u for a in node.args[:2] if is_call(u := peel_views(a), operators.scaled_mm)), None)
        if is_sum(node)
        else None
    )
    if up is None:
        return None
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
    if a is None or not _fits(large, weight, a) or not _is_computed_on(node):
        return None
    return Pair(large, found, start, a)


def _factor_at(column: Any, factor: Node) -> Node | None:
    """A factor, or that of a stack of them which makes the columns of h from ``column`` on."""
    stack: Any = factor.args[0] if is_call(factor, aten.cat.default) else [factor]
    starts = itertools.accumulate([shape(a)[0] for a in stack], initial=0)
    return next((a for a, start in zip(stack, starts) if start == column), None)


def _untransposed(node: Any) -> Node | None:
    return node.args[0] if is_transpose(node) else None


def _fits(large: Node, weight: Node, a: Node) -> bool:
    """Whether the product of x with a weight and with a factor is one that is worth it."""
    sizes = (*shape(weight), *shape(a))
    if a.op != "placeholder" or not is_half(large) or val(large).device.type != "cuda":
        return False
    if val(weight).dtype != val(large).dtype or val(a).dtype != val(large).dtype:
        return False
    return all(isinstance(size, int) for size in sizes) and beside.pays(shape(large)[0], *map(int, sizes[:3]))


def _is_computed_on(total: Node) -> bool:
    """Whether the sum of a base and its branch goes into other values before any is written."""
    columns = int(shape(total)[-1])  # N of a weight
    return all(can_compute(r, columns) and not is_left_to_norm(r, peel_views(total)) for r in readers(total))


def _covers(down: Node, pairs: list[Pair]) -> bool:
    """Whether large products compute all of a product with factors, each a part, and that saves a launch.

    Autograd gets a copy of h, a launch each. Hooks of the user's (``save_on_cpu``) may give a base back without its
    gaps: then it gets none.
    """
    apart = len({pair.large for pair in pairs}) == len({pair.start for pair in pairs}) == len(pairs)
    if not apart or sum(shape(pair.a)[0] for pair in pairs) != shape(down)[1]:
        return False
    if saved_by_hooks() and any(_is_saved(pair.large) for pair in pairs):
        return False
    places = [_places(down, pair) for pair in pairs]
    if any(user not in (place for found in places for place in found) for user in down.users if len(pairs) > 1):
        return False
    copies = [pair for pair, found in zip(pairs, places) if not _is_saved(pair.large) and any(map(_is_output, found))]
    return len(copies) < 2


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


def _is_no_output(user: Node) -> bool:
    return user.op != "output"


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _is_saved(large: Node) -> bool:
    """Whether autograd keeps a product."""
    return _is_output(large) or any(_is_output(user) for user in large.users if is_row_view(user))


def _rewrite(down: Node, pairs: list[Pair]) -> None:
    with detect_fake_mode([val(down)]):
        for pair in pairs:
            large, (n, rank) = pair.large, (shape(pair.large)[1], shape(pair.a)[0])
            both = _emit(large, operators.stacked_mm, large.args[0], _untransposed(large.args[1]), pair.a)
            base = _emit(large, aten.slice.Tensor, both, 1, 0, n)
            h = _emit(large, aten.slice.Tensor, both, 1, n, n + rank)
            places, is_saved = _places(down, pair), _is_saved(large)
            large.replace_all_uses_with(base)
            large.graph.erase_node(large)
            for place in places:
                place.replace_all_uses_with(h, delete_user_cb=_is_no_output if not is_saved else lambda user: True)
                if place.users:
                    copy = _emit(place, aten.clone.default, h, memory_format=torch.contiguous_format)
                    place.replace_all_uses_with(copy)


def _emit(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A node before ``like``, with its value computed."""
    with like.graph.inserting_before(like):
        node = like.graph.call_function(target, args, kwargs)
    node.meta.update({name: item for name, item in like.meta.items() if name not in ("val", "tensor_meta", MARK)})
    node.meta["val"] = target(*torch.fx.node.map_arg(args, lambda n: val(n) if is_tensor(n) else n), **kwargs)
    return node
