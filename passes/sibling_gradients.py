"""One product for the dX of siblings, whose weights and factors lie one behind the other in memory.

Before, in the backward graph of q, k and v (M tokens, N out of each, K in, R rank)::

    g  = cat([g_q, g_k, g_v])                                      of the pairs g_q, dB_q = gradient_pair(dq, ...)
    dX = mm(dq, W_q) + mm(dk, W_k) + mm(dv, W_v) + mm(g, cat([A_q, A_k, A_v]))

After (:func:`join`), before regions are cut, which would make a program of the last product::

    both = cat([dq, g[:, :R], dk, g[:, R:2R], dv, g[:, 2R:]])      [M, sum of N + R]
    dX   = lora_fx::joined_mm(both, [W_q, A_q, W_k, A_k, W_v, A_v])

and (:func:`settle`), when they are, with nothing of the size of dq copied that a kernel of Inductor's computes::

    room = lora_fx::side_by_side([dq, dk, dv], columns...)         written there by what computes them
    g    = ...                                                     the pairs read dq, dk and dv there
    both = lora_fx::put_(room, [g...], columns...)                 or ``sum_parts_beside_``, which adds up their parts
    dX   = lora_fx::joined_mm(both, [W_q, A_q, W_k, A_k, W_v, A_v])

Every other form makes a matrix [M, K] for each term and adds them up, or has one product add itself to what the one
before has written; and it rounds more often. Microseconds on an H200, of y and h, and of dX, by the script that has
become ``examples/benchmarks/products.py``::

    siblings   M      K      R     y: frozen   apart   one       dX: frozen   apart   one     one, with g copied there
    q, k, v    8192   4096   16       630       652     635          634       677     613     622
    gate, up   8192   4096   16      2884      2907    2842         2808      2891    2842    2881
    q, k, v    2048   4096   16       163       170     159          166       176     156     160
    gate, up   2048   4096   16       737       747     701          709       719     687     702
    q, k, v     512   4096   16        49        62      42           50        55      42      48
    gate, up    512   4096   16       204       215     198          190       195     193     196
    q, k, v    8192   4096   64       617       646     646          642       700     635     637
    gate, up   8192   4096   64      2889      2910    2858         2796      2862    2815    2803
    q, k, v    8192   3072   64       395       420     423          411       451     404     412
    gate, up   8192   3072   64      1287      1309    1277         1228      1260    1223    1225
    q, k, v    8192   2048   16       218       227     227          224       248     211     216
    gate, up   8192   2048   16       579       588     585          567       579     566     571

The rows are in the order of the stack, in which the linears were called. Where they lie in another one in memory, that
of their definition, it takes a product for each that follow one another.

A linear by itself is written so as well (:func:`_alone`) where its dX is written as it is, as that of attention's
output is, and dy is the gradient of a residual stream, which a norm's kernel computes and the stream goes on with::

    both = [dy, g];   dX = lora_fx::joined_mm(both, [W, A])        before: mm(dy, W) accumulates into mm(g, A)

In a step, ``g A`` takes 10 us, and to accumulate into it makes mm(dy, W) 14 longer than the frozen model's 99 (N and K
2048, R 16), or 19 and 12 of 229 (3072, R 64; M 8192, an H200, by the profiler). The joined product was timed in whole
steps alone.

Not where a kernel of ours computes what is multiplied, as with gate and up of a SwiGLU: it writes over what it reads.
Nor where more than a third of the columns would be copied. v's gradient is, which attention writes.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, detect_fake_mode, stable_topological_sort
from lora_fx.passes.beside import are_left_to_inductor, emit, is_beside_weight
from lora_fx.passes.graph import (
    MM,
    aten,
    is_alias,
    is_call,
    is_pointwise,
    is_row_view,
    is_tensor,
    is_transpose,
    peel_views,
    readers,
    shape,
    val,
)
from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.beside import ALIGNED
from lora_fx.passes.site import MARK
from lora_fx.passes.snapshot import Snapshot
from lora_fx.passes.tile_copies import descendants
from lora_fx.passes.tile_nodes import goes_out, is_half, is_joined, makes
from lora_fx.passes.tile_stacks import drop, large_terms

MOST_COPIED = 1 / 3
"""The part of the columns that may have to be copied."""


@dataclass(frozen=True)
class Sibling:
    """One linear's share of dX."""

    large: Node
    """dy times the weight."""
    dy: Node
    """[M, N]."""
    weight: Node
    factor: Node
    columns: int
    """N."""


def join(graph: Graph) -> Iterator[tuple[Node, Exception]]:
    """Rewrite every such sum of ``graph``; where that fails, the graph is what it was, and gives where and why."""
    if are_left_to_inductor():
        return
    before, place = Snapshot(graph), next(iter(graph.find_nodes(op="output")))
    try:
        changed = False
        for product in graph.find_nodes(op="call_function", target=MM):
            if product.meta.get(MARK) and (siblings := _siblings(product)):
                place, changed = product, True
                _join(product, siblings)
        for total in graph.find_nodes(op="call_function", target=operators.accumulate):
            if (alone := _alone(total)) is not None:
                place, changed = total, True
                _join_alone(total, alone)
        if changed:
            stable_topological_sort(graph)
            graph.eliminate_dead_code()
    except Exception as error:
        before.restore()
        yield place, error


def _siblings(product: Node) -> list[Sibling]:
    """Whose dX the sum is that a product of g with a stack of factors is in; nobody's, where it must stay as it is."""
    stack: Any = product.args[0]
    factors: Any = product.args[1]
    if not (is_call(stack, aten.cat.default) and is_call(factors, aten.cat.default)):
        return []
    if val(product).device.type != "cuda" or not is_half(product) or len(stack.args[0]) != len(factors.args[0]):
        return []
    gs, each = stack.args[0], factors.args[0]
    larges = large_terms(product)
    found = [_sibling(g, factor, larges) for g, factor in zip(gs, each, strict=True)]
    siblings = [sibling for sibling in found if sibling is not None]
    if len(siblings) < len(found) or len({sibling.large for sibling in siblings}) < len(found):
        return []
    # What the caller gets has no gaps, and a gradient can be beside others once.
    if any(goes_out(peel_views(s.dy)) or is_joined(peel_views(s.dy)) for s in siblings):
        return []
    copied = sum(s.columns for s in siblings if not _is_pointwise(s.dy))
    if copied > MOST_COPIED * sum(s.columns for s in siblings):
        return []
    return [] if any(_is_from_a_product(s.dy) for s in siblings) else siblings


def _alone(total: Node) -> Sibling | None:
    """The linear whose dX ``total`` is, which is written, if Inductor computes dy."""
    operands: Any = total.args
    large, g, factor, *scale = operands
    if any(scale) or val(total).device.type != "cuda" or not is_half(total):
        return None
    if not is_call(large, MM) or len(large.users) > 1:
        return None
    if is_transpose(factor) and is_transpose(factor.args[0]):
        factor = factor.args[0].args[0]
    found = _sibling(g, factor, [large])
    dy = None if found is None else peel_views(found.dy)
    if dy is None or not is_pointwise(dy) or goes_out(dy) or is_joined(dy):
        return None
    # As a residual stream is: what others compute with no kernel of ours computes.
    return found if any(is_pointwise(reader) for reader in readers(dy)) or not _is_from_a_product(dy) else None


def _sibling(g: Any, factor: Any, larges: list[Node]) -> Sibling | None:
    """By the first product of dy: of several with one dy the caller takes none, as it cannot tell them apart."""
    pair: Any = g.args[0] if is_call(g, operator.getitem) and g.args[1] == 0 else None
    if not is_call(pair, operators.gradient_pair) or factor.op != "placeholder":
        return None
    large = next((each for each in larges if peel_views(each.args[0]) is peel_views(pair.args[0])), None)
    weight = None if large is None else _weight(large.args[1])
    if large is None or weight is None or val(factor).dtype != val(weight).dtype:
        return None
    sizes = (n, k, rank, inner) = (*shape(weight), *shape(factor))
    if not all(isinstance(size, int) and size % 8 == 0 for size in sizes):
        return None
    dy: Any = large.args[0]
    fits = k == inner == shape(large)[1] and n == shape(dy)[1] and rank == shape(g)[1]
    return Sibling(large, dy, weight, factor, int(n)) if fits else None


def _weight(turned: Any) -> Node | None:
    """The weight that dy is multiplied by, of which a product of the forward graph has the transpose."""
    if not is_transpose(turned) or not is_beside_weight(turned.args[0]):
        return None
    weight: Node = turned.args[0].args[0]
    return weight if weight.op == "placeholder" else None


def _is_pointwise(node: Any) -> bool:
    """Whether a kernel of Inductor's computes a value, which it can write anywhere."""
    node = peel_views(node)
    while is_tensor(node) and is_alias(node):
        node = node.args[0]
    return is_tensor(node) and (is_pointwise(node) or is_call(node, aten.cat.default))


def _is_from_a_product(node: Any) -> bool:
    """Whether pointwise operations lead to a value from a product, of which a kernel of ours may make one region."""
    pending, seen = [node], {node}
    while pending:
        each = pending.pop()
        if is_call(each, MM, operators.accumulate) or makes(each):
            return True
        if is_pointwise(each) or is_alias(each) or is_call(each, aten.cat.default):
            new = [source for source in each.all_input_nodes if source not in seen and is_tensor(source)]
            seen.update(new)
            pending += new
    return False


def _join(product: Node, siblings: list[Sibling]) -> None:
    term = siblings[0].large  # the one that stays in the sum, as dX
    stack: Any = product.args[0]
    parts: list[Node] = []
    with detect_fake_mode([val(product)]):
        rows, start = [], 0
        for sibling in siblings:
            rank = int(shape(sibling.factor)[0])
            g = emit(product, aten.slice.Tensor, stack, 1, start, start + rank)
            parts, start = [*parts, sibling.dy, g], start + rank
            rows += [sibling.weight, sibling.factor]
        both = emit(product, aten.cat.default, parts, 1)
        joined = emit(product, operators.joined_mm, both, rows)
    for other in (*(sibling.large for sibling in siblings[1:]), product):
        drop(other)
    term.replace_all_uses_with(joined)
    joined.graph.erase_node(term)


def _join_alone(total: Node, linear: Sibling) -> None:
    g = total.args[1]
    with detect_fake_mode([val(total)]):
        both = emit(total, aten.cat.default, [linear.dy, g], 1)
        joined = emit(total, operators.joined_mm, both, [linear.weight, linear.factor])
    total.replace_all_uses_with(joined)
    for node in (total, linear.large):
        node.graph.erase_node(node)


def settle(graph: Graph) -> None:
    """Have what computes the gradients write them side by side, and what reads them read them there."""
    changed = False
    for joined in graph.find_nodes(op="call_function", target=operators.joined_mm):
        both: Any = joined.args[0]
        if is_call(both, aten.cat.default) and len(both.users) == 1:
            changed |= _settle(joined, both)
    if changed:
        stable_topological_sort(graph)
        graph.eliminate_dead_code()


def _settle(joined: Node, both: Node) -> bool:
    parts: Any = both.args[0]
    widths = [int(shape(part)[1]) for part in parts]
    starts = [*itertools.accumulate(widths, initial=0)]
    first, later = parts[::2], parts[1::2]  # gradients, and what is computed of them
    reading = [[*_readers(part, both)] for part in first]
    waiting = {node for found in reading for reader, _ in found for node in (reader, *descendants(reader))}
    if any(part in waiting for part in first) or any(goes_out(peel_views(part)) for part in first):
        return False
    columns = -(-starts[-1] // ALIGNED) * ALIGNED
    with detect_fake_mode([val(joined)]):
        room = emit(both, operators.side_by_side, list(first), starts[:-1:2], columns)
        filled = _fill(both, room, list(later), starts[1:-1:2])
        for found, start, width in zip(reading, starts[::2], widths[::2]):
            # What g does not wait for reads the same after it was put there, or Inductor would put it into a copy.
            for source, when in ((room, True), (filled, False)):
                here = [(reader, seen) for reader, seen in found if (both in descendants(reader)) == when]
                if not here:
                    continue
                there = emit(both, aten.slice.Tensor, source, 1, start, start + width)
                for reader, seen in here:
                    matrix = len(shape(seen)) == 2
                    view = there if matrix else emit(both, aten.reshape.default, there, _sizes(seen, both))
                    reader.replace_input_with(seen, view)
        joined.update_arg(0, emit(both, aten.slice.Tensor, filled, 1, 0, starts[-1]))
    both.graph.erase_node(both)
    return True


def _fill(like: Node, room: Node, parts: list[Node], starts: list[int]) -> Node:
    """``room`` with ``parts`` in the columns that begin at ``starts``: by what adds them up, or a copy of each."""
    value, sums = torch.empty_like(val(room)), _sums(parts)
    operands: dict[str, Any]
    if sums is None:
        target, operands = operators.put_, {"target": room, "parts": parts, "starts": starts}
    else:
        added: Any = sums.args[0]
        target = operators.sum_parts_beside_
        operands = {"room": room, "parts": added.args[0], "scales": added.args[1], "starts": starts}
    results = (None if sums is None else val(sums), value)
    with like.graph.inserting_before(like):
        wrapper = like.graph.call_function(auto_functionalized, (target,), operands)
        stack, filled = (like.graph.call_function(operator.getitem, (wrapper, place)) for place in (0, 1))
    for node, its in ((wrapper, results), (stack, results[0]), (filled, value)):
        node.meta.update(room.meta, val=its)
    if sums is None:
        like.graph.erase_node(stack)
    else:
        sums.replace_all_uses_with(stack)
    return filled


def _sums(parts: list[Node]) -> Node | None:
    """The sums side by side that ``parts`` are, all of them, if nobody has written them yet; or the one that is all."""
    stack: Any = parts[0].args[0] if is_call(parts[0], aten.slice.Tensor) else parts[0]
    added: Any = stack.args[0] if is_call(stack, operator.getitem) else None
    if not is_call(added, operators.sum_parts):
        return None
    if stack is parts[0]:
        return stack if len(parts) == len(added.args[0]) == 1 else None
    if added.args[3:] != (True,):
        return None
    ends = [*itertools.accumulate((int(shape(part)[1]) for part in parts), initial=0)]
    whole = all(
        is_call(part, aten.slice.Tensor) and part.args == (stack, 1, start, end)
        for part, start, end in zip(parts, ends, ends[1:])
    )
    return stack if whole and ends[-1] == shape(stack)[1] and len(parts) == len(added.args[0]) else None


def _readers(part: Node, both: Node) -> Iterator[tuple[Node, Node]]:
    """What reads a gradient from memory, but for ``both``, and the view of it that it reads.

    A kernel of Inductor's computes gradients of siblings, and what else it computes of them reads none from memory. A
    gradient by itself is a residual stream's, which goes on from there.
    """
    pending = [peel_views(part)]
    while pending:
        node = pending.pop()
        for user in node.users:
            if is_row_view(user):
                pending.append(user)
            elif user is not both and not (is_pointwise(user) and len(both.args[0]) > 2):  # type: ignore[arg-type]  # cat
                yield user, node


def _sizes(node: Node, like: Node) -> list[Any]:
    return [
        size if isinstance(size, int) else emit(like, aten.sym_size.int, node, dim)
        for dim, size in enumerate(shape(node))
    ]
