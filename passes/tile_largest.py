"""Find the largest element of a value where the value is made.

A base in float8 (one scale a tensor, computed at each call) needs the largest magnitude of what it casts. Where that is
a value that a region writes, as z and its gradients are in a SwiGLU, Inductor would read all of it again.

Before::

    z = tile(...);   m = amax(abs(z))                      M x N read once more

After::

    z, parts = tile(...);   m = amax(parts)                one number for each tile

The numbers are the same to the bit, in any order.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from lora_fx.passes.graph import aten, is_call, readers
from lora_fx.passes.tile_nodes import can_compute, is_half, largest_of, value_of
from lora_fx.passes.tile_regions import Region, fits, order_of


def take(region: Region, graph: Graph) -> Region:
    """The region with the largest magnitudes that others want to know of what it makes.

    Not of experts: others' magnitudes may be of rows that are nobody's as well, which no sum of a program contains.
    """
    if region.ends is not None:
        return region
    order = order_of(graph)
    for value in sorted(region.nodes - region.copies, key=order.__getitem__):
        for found in _wanted(value, region) if value_of(value) is not None and is_half(value) else ():
            if not found <= region.nodes and fits(found - region.nodes, region, order):
                region.nodes |= found
    return region


def _wanted(value: Node, region: Region) -> Iterator[set[Node]]:
    """Magnitudes of a value with their largest, if nobody else reads them."""
    for magnitudes in readers(value):
        if not is_call(magnitudes, aten.abs.default) or not can_compute(magnitudes, region.columns):
            continue
        largest = list(readers(magnitudes))
        if all(largest_of(node) is not None for node in largest):
            yield {magnitudes, *largest}
