"""Sum the parts that tile programs leave; gradients that nothing in the graph reads, all at its end.

Those that one stack reads side by side, where it reads them::

    g_q, g_k, g_v = sum(parts_q), ...;  g = cat([g_q, g_k, g_v])    ->    g = sum_parts([parts_q, ...], stacked)

Those that come from one program or are read by one, as siblings' with dropout, in one launch::

    g_q, g_k, g_v = sum(parts_q), ...;  tile([g_q, g_k, g_v])       ->    g_q, g_k, g_v = sum_parts([parts_q, ...])

Before, for every site of a backward graph, a kernel each::

    g: f[M, R]  = sum(parts_g) * s;   dB: f[N, R] = sum(parts_dB) * s;   dA: f[R, K] = sum(parts_dA)

After::

    g: f[M, R]  = sum_parts([parts_g], [s])                 when it is made
    dB_q, dA_q, dB_k, ... = sum_parts([...], [...])         once, before the graph returns
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, detect_fake_mode, stable_topological_sort
from lora_fx.passes.graph import VIEWS, aten, is_call, val
from lora_fx.passes.kernels import operators
from lora_fx.passes.tile_copies import descendants

_LAYOUT = VIEWS | {aten.slice.Tensor, aten.permute.default, aten.t.default, aten.transpose.int}


def emit(like: Node, parts: Node, scale: Node | None, dtype: torch.dtype) -> Node:
    """The sum of ``parts`` [P, ...] over its first dimension, before ``like`` and with its metadata."""
    return _emit(like, [parts], [scale], dtype)[0]


def join(graph: Graph) -> None:
    """Make one of all sums that only the graph's output reads, for each dtype and device."""
    groups: dict[Any, list[Node]] = {}
    for node in _single_sums(graph):
        if _is_returned(node):
            parts: Any = node.args[0]
            groups.setdefault((node.args[2], val(parts[0]).device), []).append(node)
    for sums in groups.values():
        if len(sums) > 1:
            _join(sums, graph.output_node())
    if groups:
        stable_topological_sort(graph)


def gather(graph: Graph) -> None:
    """Make one of the sums of what one program leaves, and of those that one program reads."""
    for neighbour in (_maker, _first_reader):
        groups: dict[Any, list[Node]] = {}
        for node in _single_sums(graph):
            if not _is_returned(node) and (program := neighbour(node)) is not None:
                groups.setdefault((program, node.args[2]), []).append(node)
        for sums in groups.values():
            # One that waits for another cannot be summed with it.
            waiting = [descendants(node) for node in sums]
            alone = not any(each in after for each in sums for after in waiting)
            if len(sums) > 1 and alone:
                _join(sums, sums[-1])
                stable_topological_sort(graph)


def _single_sums(graph: Graph) -> list[Node]:
    """The sums of one output's parts, each a launch."""
    nodes = graph.find_nodes(op="call_function", target=operators.sum_parts)
    return [node for node in nodes if len(node.args[0]) == 1 and len(node.args) < 4]


def _maker(node: Node) -> Node | None:
    """The program that leaves the parts."""
    source: Any = node.args[0][0]  # type: ignore[index]
    while source.target is operator.getitem:
        source = source.args[0]
    return source if is_call(source, auto_functionalized) else None


def _first_reader(node: Node) -> Node | None:
    """The first program, in the graph's order, that reads the sum."""
    users = {user for result in node.users for user in result.users if is_call(user, auto_functionalized)}
    return next((other for other in node.graph.nodes if other in users), None) if users else None


def _join(sums: list[Node], before: Node) -> None:
    """One sum, before ``before``, in the place of several of one output's parts each."""
    parts, scales = ([node.args[i][0] for node in sums] for i in (0, 1))  # type: ignore[index]
    joined = _emit(before, parts, scales, sums[0].args[2], meta=sums[-1].meta)  # type: ignore[arg-type]  # its schema
    for old, new in zip(sums, joined, strict=True):
        for result in list(old.users):
            result.replace_all_uses_with(new)
            old.graph.erase_node(result)
        old.graph.erase_node(old)


def stack(graph: Graph) -> None:
    """Sum into the place where a concatenation of sums, and nothing else, reads them."""
    for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
        results, dim = (*cat.args, 0)[:2]
        sums = [found for result in results if (found := _summed(result)) is not None]
        if dim not in (1, -1) or len(set(sums)) < len(results) or len({node.args[2] for node in sums}) > 1:
            continue
        parts, scales = ([node.args[i][0] for node in sums] for i in (0, 1))
        (stacked,) = _emit(cat, parts, scales, sums[0].args[2], stacked=True)
        cat.replace_all_uses_with(stacked)
        for node in (cat, *results, *sums):
            graph.erase_node(node)


def _summed(result: Node) -> Any:
    """The node that makes ``result``, a matrix with one reader, where that is the sum of one output's parts."""
    if result.target is not operator.getitem or len(result.users) != 1 or val(result).dim() != 2:
        return None
    source: Any = result.args[0]
    return source if source.target is operators.sum_parts and len(source.args[0]) == 1 else None


def _is_returned(node: Node) -> bool:
    """Whether what reads a sum, under views, is the graph's output and nothing else. What nobody reads is not made."""
    return bool(node.users) and all(
        user.op == "output" or (_is_view(user) and _is_returned(user)) for user in node.users
    )


def _is_view(node: Node) -> bool:
    return node.op == "call_function" and (node.target in _LAYOUT or node.target is operator.getitem)


def _emit(
    before: Node,
    parts: list[Any],
    scales: list[Any],
    dtype: torch.dtype,
    meta: dict[str, Any] | None = None,
    stacked: bool = False,
) -> list[Node]:
    given = [val(part) for part in parts]
    numbers = [None if scale is None else val(scale) for scale in scales]
    with detect_fake_mode(given):
        values = operators.sum_parts(given, numbers, dtype, stacked)
    kept = {name: item for name, item in (meta or before.meta).items() if name not in ("val", "tensor_meta")}
    with before.graph.inserting_before(before):
        node = before.graph.call_function(operators.sum_parts, (parts, scales, dtype, *([True] if stacked else [])))
        results = [before.graph.call_function(operator.getitem, (node, i)) for i in range(len(values))]
    for made, value in ((node, values), *zip(results, values, strict=True)):
        made.meta.update(kept, val=value)
    return results
