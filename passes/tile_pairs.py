"""Let the kernel that makes a value sum it over rows for dB, where the sum over columns for g is better left to cuBLAS.

Before, in the backward half of a SwiGLU of rank 64, where one kernel makes dgate and another reads it::

    dgate      = ...dz, gate, up...
    g, dB      = gradient_pair(dgate, B, h, s)

After, dB is summed where dgate is made, of operands that are there anyway, and g is a product::

    dB, dgate  = tile(...)
    g          = scaled_mm(dgate, B, s)

A kernel that sums both ways leaves g in parts of 256 columns: of 14336 columns and rank 64 they are 117 MB, which are
written and read once more, where cuBLAS reads dgate at the rate of a copy. On an H100 (M 8192, R 64)
the pairs of dgate and dup and the sums of their parts take 385 us, the two products 176, and both dB another 35 in the
kernel that makes the values.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch.fx import Node

from lora_fx.passes.graph import peel_views, shape, val
from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.tile_choice import FEW_ROWS
from lora_fx.passes.tile_nodes import can_compute, columns_of, gradients_of, makes, reads, sources
from lora_fx.passes.tile_regions import Region, grow, is_written, producers

LEAST_RANK = 33
"""Below it the parts of g are small."""


def split(pair: Node) -> None:
    """Make g a product of its own, if the rank is high and a kernel makes the value, of small products among others."""
    if pair.target is not operators.gradient_pair or gradients_of(pair) != {0, 1}:
        return
    value, columns = reads(pair), columns_of(pair)
    dy, b, _, *scale = pair.args
    rows, rank = shape(dy)[0], shape(b)[1]  # type: ignore[arg-type]  # its schema
    if value is None or columns is None or rank < LEAST_RANK or (isinstance(rows, int) and rows < FEW_ROWS):
        return
    if not _is_made_of_products(peel_views(value), pair, columns):
        return
    with pair.graph.inserting_before(pair):
        g = pair.graph.call_function(operators.scaled_mm, (dy, b, *scale))
    g.meta.update({**pair.meta, "val": val(pair)[0]})
    for result in [user for user in pair.users if user.target is operator.getitem and user.args[1] == 0]:
        result.replace_all_uses_with(g)
        pair.graph.erase_node(result)


def _is_made_of_products(value: Node, pair: Node, columns: int) -> bool:
    """Whether a kernel of ours makes ``value``.

    Either ``pair`` would take along what makes it, or a product that is computed before takes it along. That is so of a
    value which others read element by element as well, and of one with an operand that no kernel of ours computes, such
    as softplus that is computed again after a checkpoint.
    """
    chain = producers(value, Region(columns, {pair})) or set()
    if any(makes(node) for node in chain):
        return True
    products = set(_products_behind(value, columns))
    taken: set[Node] = set()
    # In the order in which regions are cut: what one of them has taken, no other can.
    for product in [node for node in pair.graph.nodes if node in products]:
        if product not in taken:
            region = grow(product, pair.graph)
            if value in region.nodes - region.copies - taken:
                return True
            taken |= region.nodes
    return False


def _products_behind(value: Node, columns: int) -> Iterator[Node]:
    """The small products that ``value`` is computed of, element by element, with nothing written between."""
    pending, seen = [value], {value}
    while pending:
        node = pending.pop(0)
        if makes(node) and columns_of(node) == columns:
            yield node
        elif can_compute(node, columns) and (node is value or not is_written(node)):
            new = [source for source in sources(node, columns) if source not in seen]
            seen.update(new)
            pending += new
