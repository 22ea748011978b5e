"""Let large products accumulate into the product of rank R that is added to them, where that is left to cuBLAS.

Before, in the backward graph of siblings whose ranks together are above what tiles take (q, k and v of rank 64)::

    dX = mm(dq, W_q) + mm(dk, W_k) + mm(dv, W_v) + mm(g, A)         a sum of four matrices, in whatever reads it

After::

    u  = accumulate_(empty, g, A, beta=0, alpha=1/8)
    dX = accumulate_(accumulate_(accumulate_(u, dq, W_q, alpha=1/4), dk, W_k, alpha=1/2), dv, W_v)

where each accumulates into twice what it is given, in bfloat16 (:func:`lora_fx.passes.kernels.operators.beta_for`).

A norm's backward that reads four terms costs more than a term: Inductor writes their sum in float32 between its two
passes. On an H100 (M 8192, N 4096) it took 233 us, and 163 with three terms. For cuBLAS to accumulate costs 3 us of 393
(K 4096), 20 of 102 (K 1024) or 50 of 1200 (K 14336). A Llama-3-8B block took 1.098 of the frozen block's time with one
product that accumulates and 1.094 with all at rank 64, 1.171 and 1.164 at rank 128 (rounds in turn). Each rounds the
growing sum once more, so this is for these sums alone: gradients err by 1.18e-2 instead of 1.17e-2.

Where weights and factors lie together, q, k and v have one product for all terms (:mod:`sibling_gradients`), and this
is for what is left. Not built: the same for gate and up in training. It takes gate and up in the columns of what
autograd keeps, for backward to write over them, and of rank 64 the kernels between lose what the products gain
(:mod:`lora_fx.passes.kernels.beside`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, detect_fake_mode, inductor_config, stable_topological_sort
from lora_fx.passes.graph import (
    MM,
    aten,
    is_call,
    is_row_view,
    is_sum,
    is_transpose,
    peel_views,
    same_shape,
    shape,
    val,
)
from lora_fx.passes.kernels import operators
from lora_fx.passes.site import MARK
from lora_fx.passes.tile_nodes import is_left_to_cublas


def accumulate(graph: Graph) -> None:
    """Rewrite every such sum of ``graph``, on a GPU."""
    # Where Inductor overlaps products with collectives, it has to find them as they are.
    if inductor_config()._micro_pipeline_tp:
        return
    changed = False
    for node in graph.find_nodes(op="call_function", target=operators.accumulate):
        if _is_small(node) and _is_large(peel_views(node.args[0]), node):
            _expand(node)
    for product in [node for node in graph.find_nodes(op="call_function", target=MM) if _is_small(node)]:
        larges, beta = large_terms(product), operators.beta_for(val(product).dtype)
        if larges and beta != 1.0:
            product = _share(product, beta ** -len(larges))
        for place, large in enumerate(larges, 1):
            product = _rewrite(product, large, beta, beta ** (place - len(larges)))
            changed = True
    if changed:
        stable_topological_sort(graph)


def _is_small(node: Node) -> bool:
    """Whether a product of a branch makes a matrix [M, N] out of a rank that no kernel of ours takes."""
    if node.target is operators.accumulate:
        return is_left_to_cublas(node)
    return bool(node.meta.get(MARK)) and not is_transpose(node.args[0]) and is_left_to_cublas(node)


def _expand(node: Node) -> None:
    """A product, of scaled h where it is scaled, and a sum of it and its base."""
    base, a, b, scale = (*node.args, None)[:4]
    with node.graph.inserting_before(node):
        if scale is not None:
            a, like = node.graph.call_function(aten.mul.Tensor, (a, scale)), a
            a.meta.update(like.meta)
        product = node.graph.call_function(MM, (a, b))
        total = node.graph.call_function(aten.add.Tensor, (base, product))
    for new in (product, total):
        new.meta.update(node.meta)
    product.meta[MARK] = True
    node.replace_all_uses_with(total)
    node.graph.erase_node(node)


def large_terms(product: Node) -> list[Node]:
    """The large products that are added to ``product``, and read by nobody else; that with most work first."""
    total, top = None, product
    while len(top.users) == 1 and (is_row_view(user := next(iter(top.users))) or _adds_alike(user)):
        top = user
        total = top if is_sum(top) else total
    if total is None:
        return []
    terms: list[Node] = []
    pending: list[Any] = [total]
    while pending:
        node = peel_views(pending.pop())
        if _adds_alike(node) and (node is total or len(node.users) == 1):
            pending += node.args[:2]
        elif _is_large(node, product):
            terms.append(node)
    return sorted(terms, key=_work, reverse=True)


def _adds_alike(node: Node) -> bool:
    """Whether ``node`` is a sum of two matrices of its own shape and dtype, each of which could stand for it."""
    terms = node.args[:2]
    return is_sum(node) and all(same_shape(a, node) and val(a).dtype == val(node).dtype for a in terms)  # type: ignore[arg-type]  # is_sum saw nodes


def _is_large(node: Any, product: Node) -> bool:
    """Whether ``node`` is a product of the base's weight, read once, and makes a matrix like that of ``product``."""
    if not is_call(node, MM) or node.meta.get(MARK) or not _is_read_once(node):
        return False
    return val(node).dtype == val(product).dtype and shape(node) == shape(product)


def _is_read_once(node: Node) -> bool:
    while len(node.users) == 1:
        (user,) = node.users
        if not is_row_view(user):
            return True
        node = user
    return False


def _work(product: Node) -> int:
    inner = shape(product.args[0])[1]  # type: ignore[arg-type]  # its schema
    return inner if isinstance(inner, int) else 0


def _share(product: Node, alpha: float) -> Node:
    """``alpha`` times a product of a branch, in its place."""
    graph, (a, b), value = product.graph, product.args[:2], val(product)
    with detect_fake_mode([value]), graph.inserting_before(product):
        rows: Any = shape(product)[0]
        if not isinstance(rows, int):
            size = graph.call_function(aten.sym_size.int, (a, 0))
            size.meta["val"], rows = rows, size
        options = {"dtype": value.dtype, "device": value.device}
        empty = graph.call_function(aten.empty.memory_format, ([rows, shape(product)[1]],), options)
        empty.meta["val"] = torch.empty_like(value)
        result = _accumulate(empty, a, b, beta=0.0, alpha=alpha, like=product)
    product.replace_all_uses_with(result)
    graph.erase_node(product)
    return result


def _accumulate(base: Node, a: Any, b: Any, *, beta: float, alpha: float, like: Node) -> Node:
    """``beta * base + alpha * a @ b``, in place if Inductor agrees."""
    with detect_fake_mode([val(like)]):
        value = torch.empty_like(val(like))
    operands = {"base": base, "a": a, "b": b, "scale": None, "beta": beta, "alpha": alpha}
    wrapper = like.graph.call_function(auto_functionalized, (operators.accumulate_,), operands)
    result = like.graph.call_function(operator.getitem, (wrapper, 1))
    for node, its in ((wrapper, (None, value)), (result, value)):
        node.meta.update({name: item for name, item in like.meta.items() if name not in ("val", "tensor_meta", MARK)})
        node.meta["val"] = its
    return result


def _rewrite(product: Node, large: Node, beta: float, alpha: float) -> Node:
    """``alpha * large`` accumulates into ``beta * product``, whose place in the sum falls away; gives the result."""
    graph = product.graph
    a, b = large.args[:2]
    drop(product, stays=True)
    with graph.inserting_before(large):
        result = _accumulate(product, a, b, beta=beta, alpha=alpha, like=large)
    large.replace_all_uses_with(result)
    graph.erase_node(large)
    return result


def drop(term: Node, stays: bool = False) -> None:
    """Take a term, which nobody else reads, out of the sum that it is in, and out of the graph unless it ``stays``."""
    graph, leaf = term.graph, term
    while is_row_view(user := next(iter(leaf.users))):
        leaf = user
    (total,) = leaf.users
    rest = total.args[1] if total.args[0] is leaf else total.args[0]
    assert isinstance(rest, Node)
    total.replace_all_uses_with(rest)
    graph.erase_node(total)
    while leaf is not term:
        leaf, gone = leaf.args[0], leaf  # type: ignore[assignment]  # a view of a node
        graph.erase_node(gone)
    if not stays:
        graph.erase_node(term)
