"""How ranks share the rows of a tensor: gathers and reduce-scatters in a graph, and a rank's own rows of either.

Under sequence parallelism a matrix of all tokens is gathered from the ranks, or is a term of a sum that is scattered to
them. DTensor writes either as a collective on the first dimension, with pieces cut and put together around it where the
tokens lie along another one::

    whole = cat(split(wait(all_gather(mine))), dim)        mine = wait(reduce_scatter(cat(split(whole, dim))))

Whatever a pass lets travel with such a tensor, of R numbers a token, takes the same way.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from lora_fx.passes._torch import group_ranks, pipelines_collectives, statically_known_true
from lora_fx.passes.graph import MM, aten, is_call, peel_views, shape, val
from lora_fx.passes.rewriter import Rewriter

GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
GATHER_TOGETHER = torch.ops._c10d_functional.all_gather_into_tensor_coalesced.default
REDUCE = torch.ops._c10d_functional.reduce_scatter_tensor.default
REDUCE_TOGETHER = torch.ops._c10d_functional.reduce_scatter_tensor_coalesced.default
WAIT = torch.ops._c10d_functional.wait_tensor.default
# Before a reduce-scatter rows are put in the order of the ranks that get them.
_CUTS = (aten.split.Tensor, aten.split_with_sizes.default, aten.slice.Tensor)


@dataclass(frozen=True)
class Shared:
    """How ranks share a tensor: each has its piece along ``dim``, which is 0 where they lie in a row.

    Ranks tell groups apart, and names do not: of two equal meshes each has its own groups, and DTensor may take one for
    a gather and the other for the scatter of its gradient.
    """

    dim: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Gathered:
    """A tensor that was gathered."""

    mine: Node
    """The piece that this rank had."""
    result: Node
    """The ``wait_tensor`` that gives all pieces, in a row."""
    moves: list[Node]
    """From that to ``whole``."""
    whole: Node
    """The tensor, in the shape in which its pieces lie one after another."""
    shared: Shared

    @property
    def collective(self) -> Node:
        """The ``all_gather_into_tensor``."""
        return self.result.args[0]  # type: ignore[return-value]  # a node, as whoever made this saw


def gathered(tensor: Any) -> Gathered | None:
    """How the rows of ``tensor`` were gathered, under row views; None if they were not."""
    whole = source = peel_views(tensor)
    dim = 0
    moves: list[Node] = []
    if is_call(source, aten.cat.default):
        pieces, *dims = source.args
        last = len(shape(source)) - 1
        dim = (dims[0] if dims else source.kwargs.get("dim", 0)) % (last + 1)
        source = None if dim == last else _cut(pieces, 0)
        moves = [] if source is None else [pieces[0].args[0], *pieces, whole]
    if not (is_call(source, WAIT) and is_call(source.args[0], GATHER)):
        return None
    mine, _, group = source.args[0].args[:3]
    ranks = group_ranks(group)
    if ranks is None or (whole is not source and len(whole.args[0]) != len(ranks)):
        return None
    return Gathered(mine, source, moves, whole, Shared(_along(whole, dim), ranks))


def scattered(total: Node, chain: list[Node]) -> Shared | None:
    """How ``total`` is shared after its chain, if that sums the ranks' terms and puts pieces in the ranks' order."""
    *moves, scatter, _ = chain
    theirs, reduction, _, name = scatter.args[:4]
    ranks = group_ranks(str(name))
    if ranks is None or reduction != "sum":
        return None
    if not moves:
        return Shared(0, ranks) if theirs is total else None
    if not is_call(theirs, aten.cat.default):
        return None
    pieces, *dims = theirs.args  # type: ignore[union-attr]  # a node, as is_call saw
    first: Any = pieces[0] if pieces else None  # type: ignore[index]  # a list of nodes
    if (dims and dims[0] != 0) or not is_call(first, operator.getitem) or len(pieces) != len(ranks):  # type: ignore[arg-type]
        return None
    cut = first.args[0]
    dim = cut.args[2] if len(cut.args) > 2 else cut.kwargs.get("dim", 0)
    if _cut(pieces, dim) is not total:
        return None
    return Shared(_along(total, dim % len(shape(total))), ranks)


def chain_to_scatter(total: Node) -> list[Node] | None:
    """Everything from the readers of ``total`` to the end of its reduce-scatter, or None if it is read otherwise."""
    last, chain, pending = len(shape(total)) - 1, set[Node](), list(total.users)
    while pending:
        node = pending.pop()
        if not (is_call(node, REDUCE, WAIT, operator.getitem) or _moves_rows(node, last)):
            return None
        if node not in chain:
            chain.add(node)
            pending += [] if is_call(node, WAIT) else list(node.users)
    ends = [node for node in chain if is_call(node, REDUCE, WAIT)]
    alone = all(operand is total or operand in chain for node in chain for operand in node.all_input_nodes)
    ordered = sorted(chain)
    return ordered if alone and len(ends) == 2 and is_call(ordered[-1], WAIT) else None


def reads_pipelined_gather(node: Node) -> bool:
    """Whether ``node`` is a product with a gathered matrix that Inductor will make one operator of with the gather."""
    product = peel_views(node)
    x = gathered(product.args[0]) if is_call(product, MM, aten._scaled_mm.default) else None
    return x is not None and pipelines_collectives(x.collective.args[2])


def may_travel(thin: Any, tensor: Node) -> bool:
    """Whether a matrix of R columns is worth taking along with ``tensor``, whose dtype it must have.

    R is at most a quarter of its columns. (That is a guess: no rank near it was timed.)
    """
    rank, columns = shape(thin)[-1], shape(tensor)[-1]
    return val(thin).dtype == val(tensor).dtype and bool(statically_known_true(4 * rank <= columns))


def moved(rows: Node, start: Node, moves: list[Node], last: Node, rewriter: Rewriter, like: Node) -> Node:
    """``rows`` in the order in which ``moves`` put those of ``start``: what is to ``rows`` as ``last`` is to that."""
    made = {start: rows}
    for node in moves:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
        target: Any = node.target
        made[node] = rewriter.emit(target, *args, like=like, **kwargs)
    return made[last]


def together(
    target: Any,
    tensors: list[Node],
    collective: Node,
    result: Node,
    rewriter: Rewriter,
    like: Node,
    apart: bool = False,
) -> list[Node]:
    """The results of one collective that takes several tensors, in the place of one that takes the first of them.

    What a user's checkpoint says of the old one it says of the new one, and of what the first tensor becomes. New nodes
    belong to the half of the graph that ``like`` belongs to: those that a user's autograd function made may name none.

    ``apart``: Inductor makes one operator of the collective and a product, and would not of one that takes several. The
    others have one of their own then, in the form for several, which it does not take for what it could pipeline. It
    begins before the operator, and is waited for after it.
    """
    others = tensors[1:] if apart else tensors
    ran = rewriter.emit_in_place(target, others, *collective.args[1:], of=collective, half=like)
    results = [
        rewriter.emit_in_place(operator.getitem, ran, place, of=collective, half=like) for place in range(len(others))
    ]
    if apart:
        first: Any = collective.target
        ran = rewriter.emit_in_place(first, tensors[0], *collective.args[1:], of=collective, half=like)
        results.insert(0, ran)
    rewriter.discard(collective, result)
    return [rewriter.emit_in_place(WAIT, own, of=result, half=like) for own in results]


def _moves_rows(node: Node, last: int) -> bool:
    """Whether ``node`` takes values with dimensions up to ``last`` apart, or puts them together, along another one."""
    place = 2 if is_call(node, aten.split.Tensor, aten.split_with_sizes.default) else 1
    dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return is_call(node, *_CUTS, aten.cat.default) and dim not in (last, -1)


def _along(node: Node, dim: int) -> int:
    """``dim``, or 0 where all dimensions before it have one element."""
    return 0 if all(statically_known_true(size == 1) for size in shape(node)[:dim]) else dim


def _cut(pieces: Any, dim: int) -> Any:
    """What ``pieces`` are, in their order, when it is cut along ``dim``; None if they are something else."""
    first = pieces[0]
    if not (is_call(first, operator.getitem) and is_call(first.args[0], aten.split.Tensor)):
        return None
    cut = first.args[0]
    along = cut.args[2] if len(cut.args) > 2 else cut.kwargs.get("dim", 0)
    if along != dim or len(val(cut)) != len(pieces):
        return None
    in_order = all(is_call(p, operator.getitem) and p.args == (cut, i) for i, p in enumerate(pieces))
    return cut.args[0] if in_order else None
