"""Cut what touches one [M, N] value around LoRA's products out of a graph, and give it to one kernel.

Before, in the backward half of a SwiGLU (M tokens, N hidden, R rank)::

    gate = gate_base + scaled_mm(h_g, B_g^T, s);   up = up_base + scaled_mm(h_u, B_u^T, s)
    dz   = mm(dy, W) + mm(g, A)
    dgate, dup = ...dz, gate, up...                                    a dozen pointwise operations
    g_g, dB_g = gradient_pair(dgate, B_g, h_g, s);   g_u, dB_u = ...   each reads M x N once more
    dA = mm(g^T, silu(gate) * up)                                      and so does this

After::

    dgate, dup, parts... = lora_fx::tile(program, [gate_base, up_base, mm(dy, W), h_g, B_g, ...])

A region is grown from the small products. A product that makes an [M, N] value brings along the pointwise operations
behind it, as far as every value that leaves the region is no wider than the model's dtype; a product that reads one
brings along the pointwise operations that made it. What would need a value from outside that itself depends on the
region is not taken. The large products stay where they are: cuBLAS has no equal at them.

Products of experts, whose rows are sorted, grow regions of their own: all in one share the rows in the same way.

It runs on the forward and the backward graph of a GPU, once they are apart; on the CPU nothing is cut.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, Node

from lora_fx.passes.graph import GATHERS, aten, is_call, is_pointwise, is_sum, peel_views, readers, same_shape
from lora_fx.passes.kernels import operators
from lora_fx.passes.tile_nodes import (
    can_compute,
    columns_of,
    ends_of,
    gradients_of,
    has_few_rows_of_tiles,
    is_half,
    is_joined,
    is_reduction,
    makes,
    operand_kind,
    operands_of,
    sources,
    value_of,
)
from lora_fx.passes.tile_residuals import is_left_to_norm, is_left_to_readers


@dataclass
class Region:
    """Nodes that become one program: all compute, or read, values of ``columns`` columns."""

    columns: int
    nodes: set[Node] = field(default_factory=set)
    copies: set[Node] = field(default_factory=set)
    """Members that stay in the graph for their other readers: cheaper to compute again than to write and read."""

    @property
    def ends(self) -> Node | None:
        """Where the rows of each expert end, if its products are of experts: then all are, and share rows alike."""
        return next((ends for node in self.nodes if (ends := ends_of(node)) is not None), None)

    def is_of(self, product: Node) -> bool:
        """Whether a small product could be a member."""
        return columns_of(product) == self.columns and ends_of(product) is self.ends


def grow(seed: Node, graph: Graph) -> Region:
    """The region around ``seed``: what it makes and reads, and the pointwise operations between."""
    columns = columns_of(seed)
    assert columns is not None
    region, order = Region(columns, {seed}), order_of(graph)
    pending = [seed]
    while pending:
        node = pending.pop(0)
        for neighbours in _neighbours(node, region):
            new = neighbours - region.nodes
            staying = _staying(new, region, order)
            # A copy stays in the graph, and would read what leaves it.
            if any(reader in region.copies for node in new - staying for reader in readers(node)):
                continue
            if new and (fits(new, region, order) or (_is_one_sum(new, region) and fits(new, region, order, staying))):
                region.nodes |= new
                region.copies |= staying
                pending += sorted(new, key=order.__getitem__)
    _prune(region)
    _leave_out(region)
    return region if seed in region.nodes else Region(columns, {seed})


def _neighbours(node: Node, region: Region) -> Iterator[set[Node]]:
    """What could join the region next to ``node``, in sets that make sense together."""
    value = value_of(node)
    if value is not None and node not in region.copies:
        for user in readers(value):
            # A gradient pair reads what a large product reads as well, so it is in memory, and with sums over rows and
            # over columns a kernel holds too much at once. SwiGLU backward on an H200 (M 8192, N 14336, R 16): 687 us
            # with both pairs in it, 549 in three kernels, sums of parts included. One that was split sums over rows.
            left = is_left_to_norm(user, node) or is_left_to_readers(user, region.columns)
            if (can_compute(user, region.columns) and not left and not is_joined(user)) or (
                region.is_of(user)
                and gradients_of(user) != {0, 1}
                and not (is_written(node) and has_few_rows_of_tiles(user) and any(map(makes, region.nodes)))
            ):
                yield {user}
    for source in sources(node, region.columns):
        if source not in region.nodes and (chain := producers(source, region)) is not None:
            yield chain


def producers(source: Node, region: Region) -> set[Node] | None:
    """The nodes that compute a value which the region reads, if the region should compute it itself; or else None.

    Products always: that is what a region is for. Pointwise operations down to what is in memory anyway; but not when
    they need a sum over rows that this graph computes (whose kernel has the operands at hand), nor when the value is
    written to memory for others and has pointwise readers besides. Where all that is missing is one value, it is
    written in the place of the source, which may be that value under one of several masks. And not where all that a
    source is made of, which is written in any case, is rows of something else: Inductor gathers and computes in one.
    """
    found: set[Node] = set()
    loaded: set[Node] = set()
    missing: set[Node] = set()
    pending = [source]
    while pending:
        node = pending.pop()
        if node in found or node in region.nodes:
            continue
        if is_joined(node):
            if node is source:
                return None
            loaded.add(node)
        elif makes(node) and region.is_of(node):
            found.add(node)
        elif can_compute(node, region.columns) and not any(
            _depends_on_sum(a, node, region.columns) for a in operands_of(node)
        ):
            if is_written(node) and any(is_pointwise(r) and r not in region.nodes for r in readers(node)):
                if node is source:
                    return None
                loaded.add(node)
                continue
            found.add(node)
            pending += sources(node, region.columns)
        elif node is source:
            return None
        else:
            (loaded if is_written(node) else missing).add(node)
    if missing and not (len(missing) == 1 and not loaded and all(is_half(node) for node in missing)):
        return None
    if is_written(source) and not any(map(makes, found)) and not missing and len(loaded) == 1:
        (value,) = loaded
        if _is_gathered(value) and all(is_pointwise(reader) or is_reduction(reader) for reader in readers(value)):
            return None
    return found


def is_written(node: Node) -> bool:
    """Whether a value is in memory whatever the region does."""
    return not (is_pointwise(node) or node.target is operators.keep) or any(
        not (is_pointwise(r) or is_reduction(r) or columns_of(r) is not None) for r in readers(node)
    )


def _is_gathered(node: Node) -> bool:
    """Whether a value is rows of another, as autograd of a gather has them: expanded to the size that they are of."""
    while is_call(node, aten.expand.default) and same_shape(node, node.args[0]):  # type: ignore[arg-type]  # a tensor
        node = node.args[0]  # type: ignore[assignment]  # a tensor
    return is_call(node, *GATHERS)


def _staying(new: set[Node], region: Region, order: dict[Node, int]) -> set[Node]:
    """Of new members, those that other kernels go on computing for themselves: nobody has them in memory.

    What such a node is computed from stays with it; where that is in memory, or a product, the region computes both.
    """
    found: set[Node] = set()
    members = region.nodes | new
    for node in sorted(new, key=order.__getitem__, reverse=True):
        if node in found or not any(is_pointwise(r) or is_reduction(r) for r in readers(node) if r not in members):
            continue
        pending, needed = [node], {node}
        while pending:
            for source in sources(pending.pop(), region.columns):
                if source in members and source not in region.copies and source not in needed:
                    needed.add(source)
                    pending.append(source)
        if not any(makes(each) or is_written(each) for each in needed):
            found |= needed
    return found


def _is_one_sum(new: set[Node], region: Region) -> bool:
    """Whether what is new is a sum of values that are in memory, of which one pass over another is no more to read.

    A sum of such sums (the stream of a model of many layers) would be read as all that it was ever added up from.
    """
    return len(new) == 1 and all(is_sum(node) and all(map(is_written, sources(node, region.columns))) for node in new)


def _depends_on_sum(operand: Any, node: Node, columns: int) -> bool:
    """Whether a row operand is computed in this graph."""
    if operand_kind(operand, node, columns) != "row":
        return False
    return peel_views(operand).op != "placeholder"


def order_of(graph: Graph) -> dict[Node, int]:
    """The place of every node in the graph."""
    return {node: i for i, node in enumerate(graph.nodes)}


def fits(new: set[Node], region: Region, order: dict[Node, int], copies: Collection[Node] = ()) -> bool:
    """Whether no path leaves the region with its new members and comes back, and no member needs a sum of another's.

    ``copies`` are the new ones that others compute for themselves, so that what these lead to may come back.
    """
    members = region.nodes | new
    if any(n in members and value_of(n) is None for member in members for n in member.all_input_nodes):
        return False
    last = max(order[member] for member in members)
    computed = members - region.copies - set(copies)
    pending = [r for member in computed for r in readers(member) if r not in members]
    seen = set(pending)
    while pending:
        for user in pending.pop().users:
            if user in members:
                return False
            if user not in seen and order[user] <= last:
                seen.add(user)
                pending.append(user)
    return True


def _leave_out(region: Region) -> None:
    """Take out what others compute from values that the region writes in any case, if they alone need it.

    ``abs(y)``, of which a float8 base needs the largest, is not worth a second output of y's size.
    """
    while True:
        left = {n for n in region.nodes - region.copies if any(r not in region.nodes for r in readers(n))}
        idle = {
            node
            for node in left
            if not (makes(node) or is_written(node) or any(reader in region.nodes for reader in readers(node)))
            and can_compute(node, region.columns)
            and left.issuperset(within := sources(node, region.columns))
            and within
        }
        if not idle:
            return
        region.nodes -= idle


def _prune(region: Region) -> None:
    """Take out what would leave the region as anything wider than the model's dtype, with all that depends on it."""
    while True:
        wide = [
            node
            for node in region.nodes - region.copies
            if not is_half(node) and any(r not in region.nodes for r in readers(node))
        ]
        if not wide:
            return
        while wide:
            node = wide.pop()
            if node in region.nodes:
                region.nodes.remove(node)
                wide += [reader for reader in readers(node) if reader in region.nodes]
        # What was only computed again for what has gone.
        while idle := {n for n in region.copies if not any(r in region.nodes for r in readers(n))}:
            region.nodes -= idle
            region.copies -= idle
