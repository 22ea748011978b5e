"""Read a value once for all products of rank R that need it under different masks.

Without dropout, siblings that share x are stacked (:mod:`lora_fx.passes.stack_siblings`). With it, each has a mask of
its own, and what stays is three products that read x::

    h_q, h_k, h_v = mm(x * mask_q, A_q^T), mm(x * mask_k, A_k^T), mm(x * mask_v, A_v^T)

Their regions share nothing but what they load. Here they become one, which loads it once; so do the three dA.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from lora_fx.passes.graph import is_pointwise, readers
from lora_fx.passes.tile_nodes import MAX_RANK, is_pair, makes, rank_of, reads, sources, value_of
from lora_fx.passes.tile_regions import Region, fits, grow, order_of


def join(region: Region, graph: Graph) -> Region:
    """``region`` with the regions that are like it and load the same, while their ranks together are not too high."""
    kind, loads = _kind(region), _loads(region)
    if kind is None:
        return region
    for other in [product for value in loads for product in _products_of(value, region)]:
        if other in region.nodes:
            continue
        sibling = grow(other, graph)
        joined = Region(region.columns, region.nodes | sibling.nodes, region.copies | sibling.copies)
        alike = _kind(joined) == kind and _loads(joined) == loads and _rank(joined) <= MAX_RANK
        if alike and fits(sibling.nodes - region.nodes, region, order_of(graph)):
            region = joined
    return region


def _kind(region: Region) -> str | None:
    """What a region consists of, if that is products which read, all of one kind, and nothing else leaves it."""
    kinds = set()
    for node in region.nodes:
        value = reads(node)
        if makes(node) or is_pair(node):
            return None
        if value is not None:
            kinds.add("down" if value is node.args[0] else "across")
        elif node not in region.copies and any(reader not in region.nodes for reader in readers(node)):
            return None
    return kinds.pop() if len(kinds) == 1 else None


def _loads(region: Region) -> set[Node]:
    return {s for node in region.nodes for s in sources(node, region.columns)} - region.nodes


def _rank(region: Region) -> int:
    """R of all products together."""
    return sum(rank_of(node) for node in region.nodes if reads(node) is not None)


def _products_of(value: Node, region: Region) -> Iterator[Node]:
    """The products of rank R that read ``value``, or what is made of it for them alone (or that ``region`` makes of it,
    too), in the graph's order."""
    for reader in readers(value):
        if region.is_of(reader) and reads(reader) is not None:
            yield reader
        elif (
            is_pointwise(reader)
            and value_of(reader) is not None
            and (reader in region.copies or len(list(readers(reader))) == 1)
        ):
            yield from _products_of(reader, region)
