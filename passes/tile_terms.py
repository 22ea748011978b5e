"""Terms of the sums that regions make which large products add by themselves, and matrices that nobody else needs."""

from __future__ import annotations

import torch
from torch.fx import Node

from lora_fx.passes._torch import inductor_config
from lora_fx.passes.graph import MM, aten, is_call, is_tangent, is_tensor, peel_views, readers, same_count, shape, val
from lora_fx.passes.grouped_site import GROUPED_MM
from lora_fx.passes.kernels import operators
from lora_fx.passes.tile_copies import descendants
from lora_fx.passes.tile_nodes import bias_of, is_part_of_stacked, makes, operands_of, reads, sources
from lora_fx.passes.tile_regions import Region


def accumulated(region: Region, members: list[Node]) -> list[Node]:
    """The large products that enter a region's only result as terms of a sum, the one with most work first.

    The kernel of the first adds it to the result for little: cuBLAS reads what it adds to while it computes. On an H200
    (M 8192, N 4096, K 4096) that is 0 to 4% of 371 us, where reading the product again to add the branch takes 15 us
    and writing the sum as much. And the small term is rounded on the way, instead of the large one, with its bias if it
    has one (which errs more where a bias is much larger than the result, and the product cancels it). The others are
    left to whatever reads the sum, as they are without LoRA: to accumulate them too rounds the growing sum each time.
    Where Inductor overlaps products with collectives, it has to find them as they are.
    """
    if inductor_config()._micro_pipeline_tp:
        return []
    sums = [node for node in members if is_call(node, aten.add.Tensor)]
    # What masks a product is made of nothing that is in memory.
    inner = [node for node in members if node not in sums and not makes(node)]
    if any(reads(n) is not None or not region.nodes.issuperset(sources(n, region.columns)) for n in inner):
        return []
    results = [n for n in members if n not in region.copies and any(r not in region.nodes for r in readers(n))]
    if len(results) != 1 or results[0] in inner or any(node not in inner for node in region.copies):
        return []
    if any(len(list(readers(n))) > 1 for n in members if n not in inner and n is not results[0]):
        return []
    found = [peel_views(a) for n in sums for a in operands_of(n) if is_tensor(a)]
    found += [peel_views(n.args[0]) for n in members if n.target is operators.accumulate]
    terms = [n for n in found if n not in region.nodes]
    dtype = val(results[0]).dtype
    # All of them or none: a sum of the branch with a residual stream would be rounded twice at its full size.
    if not all(is_call(n, MM) or bias_of(n) is not None for n in terms):
        return []
    # What has one row for all of them is added to each, which no product does by itself.
    if not all(_dies_in(n, region) and val(n).dtype == dtype and same_count(n, results[0]) for n in terms):
        return []
    return sorted(terms, key=_inner, reverse=True) if _are_terms(terms, members, set(sums), region) else []


def _are_terms(products: list[Node], members: list[Node], sums: set[Node], region: Region) -> bool:
    """Whether each product is added to the result as it is and once: whatever holds one on the way is added alone."""
    holding = set(products)
    for node in members:
        read = sources(node, region.columns)
        if holding.isdisjoint(read):
            continue
        if not (node in sums or node.target is operators.accumulate) or len(set(read)) < len(read):
            return False  # scaled, gated, or counted twice
        holding.add(node)
    return True


def _inner(product: Node) -> int:
    """The size that a product sums over; 0 where it is not known."""
    size = shape(product.all_input_nodes[-1])[0]
    return size if isinstance(size, int) else 0


def _dies_in(node: Node, region: Region) -> bool:
    """Whether a matrix was made by this graph for the region alone."""
    return is_read_last_in(node, region) and all(reader in region.nodes for reader in readers(node))


def is_read_last_in(node: Node, region: Region) -> bool:
    """Whether a matrix was made by this graph, or saved by forward for it, and all that reads it is the region, or what
    the region waits for, so that the region may overwrite it."""
    computed = region.nodes - region.copies
    sharing = list(node.args[0].users) if is_part_of_stacked(node) else [node]  # type: ignore[union-attr]  # a slice's
    return (
        (_is_saved(node) or _is_product(node))
        and node not in region.nodes
        and all(
            reader in computed or not computed.isdisjoint(descendants(reader))
            for part in sharing
            for reader in readers(part)
        )
    )


def _is_product(node: Node) -> bool:
    """Whether a product made a matrix of its own, without gaps, or is the part of one whose other part is h."""
    if is_part_of_stacked(node):
        return node.args[2:3] == (0,)
    made = is_call(node, MM, aten.addmm.default, GROUPED_MM)
    return made and len(shape(node)) == 2 and bool(val(node).is_contiguous())


def _is_saved(node: Node) -> bool:
    """Whether a matrix is an input of a backward graph that is no gradient, and shares its memory with no other."""
    if node.op != "placeholder" or is_tangent(node) or not any(map(is_tangent, node.graph.nodes)):
        return False
    others = (n for n in node.graph.find_nodes(op="placeholder") if n is not node and is_tensor(n))
    memory = val(node).untyped_storage()._cdata
    return all(val(other).layout != torch.strided or val(other).untyped_storage()._cdata != memory for other in others)
