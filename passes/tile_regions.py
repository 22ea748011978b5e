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

It runs on the forward and the backward graph of a GPU, once they are apart; on the CPU nothing is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes.graph import (
    CONVERT,
    COPIES,
    MM,
    aten,
    has_shape,
    is_call,
    is_pointwise,
    is_sum,
    is_tensor,
    is_transpose,
    peel_views,
    readers,
    shape,
    val,
)
from lora_fx.passes.kernels import operators
from lora_fx.passes.site import MARK

POINTWISE = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.pow.Tensor_Scalar: "pow",
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.reciprocal.default: "reciprocal",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.erf.default: "erf",
    aten.relu.default: "relu",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    aten.gt.Scalar: "gt",
    aten.ge.Scalar: "ge",
    aten.lt.Scalar: "lt",
    aten.le.Scalar: "le",
    aten.gt.Tensor: "gt",
    aten.le.Tensor: "le",
    aten.where.self: "where",
    CONVERT: "identity",
    **dict.fromkeys(COPIES, "identity"),
}
"""Pointwise operators that a kernel can compute, and their names in programs."""

HALF = (torch.bfloat16, torch.float16)


@dataclass
class Region:
    """Nodes that become one program: all compute, or read, values of ``columns`` columns."""

    columns: int
    nodes: set[Node] = field(default_factory=set)
    copies: set[Node] = field(default_factory=set)
    """Members that stay in the graph for their other readers: cheaper to compute again than to write and read."""


# ---- what a node is to a region --------------------------------------------------------------------------------------


def columns_of(node: Node) -> int | None:
    """N of the [M, N] value that one of LoRA's small products makes or reads; None for any other node."""
    if node.op != "call_function" or not _is_half(node):
        return None
    if makes(node):
        return _static(shape(node)[1])
    value = reads(node)
    return None if value is None else _static(shape(value)[-1])


def _is_half(node: Node) -> bool:
    value = node.meta.get("val")  # Inductor's own rewrites leave nodes without
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, torch.Tensor) and value.dtype in HALF


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def makes(node: Node) -> bool:
    """Whether ``node`` is a product of rank R that makes an [M, N] value."""
    if node.target in (operators.scaled_mm, operators.accumulate):
        operands = node.args if node.target is operators.accumulate else (None, *node.args)
        _, thin, _, scale = (*operands, None)[:4]
        bias = len(node.args) > 3 and node.args[3] is not None and node.target is operators.scaled_mm
        plain = not bias and (scale is None or same_device(scale, node))
        return plain and _is_thin(thin, 1) and _static(shape(node)[1]) is not None
    return _is_marked(node) and _is_thin(node.args[0], 1) and not _is_thin(node, 1)


def reads(node: Node) -> Node | None:
    """The [M, N] value that ``node`` multiplies down to rank R (or across, to [R, N]); None if it does not."""
    if node.target is operators.gradient_pair:
        value, factor = node.args[:2]
        return value if is_tensor(factor) and _is_thin(factor, 1) else None  # type: ignore[return-value]
    if not _is_marked(node) or makes(node):
        return None
    left, right = node.args[:2]
    if _is_thin(right, 1) and is_tensor(left):
        return left  # type: ignore[return-value]  # [M, N] @ [N, R]
    if _is_thin(left, 0) and is_transpose(left) and is_tensor(right):
        return right  # type: ignore[return-value]  # [R, M] @ [M, N]
    return None


def _is_marked(node: Node) -> bool:
    return is_call(node, MM) and bool(node.meta.get(MARK))


# Time to the frozen block's on an H200 (Llama-3-8B, M 8192, examples/benchmarks/block.py): at rank 64 1.110 with tiles,
# stacks of ranks by cuBLAS (plain LoRA 1.151); at rank 128 1.323 with tiles, 1.159 without (plain LoRA 1.170). There
# cuBLAS has enough to do.
MAX_RANK = 64


def _is_thin(node: Any, dim: int) -> bool:
    if not is_tensor(node) or len(shape(node)) != 2:
        return False
    size = _static(shape(node)[dim])
    return size is not None and size <= MAX_RANK


def _is_value(node: Any, columns: int) -> bool:
    """Whether ``node`` is an [..., N] value of a pass, contiguous."""
    if not is_tensor(node) or len(shape(node)) < 2 or not has_shape(node, *[None] * (len(shape(node)) - 1), columns):
        return False
    value = val(node)
    return value.dtype.is_floating_point and value.dtype.itemsize <= 4 and bool(value.is_contiguous())


def _is_pointwise(node: Any, columns: int) -> bool:
    """Whether ``node`` computes a value of the pass element by element from what a kernel can load, or a mask of it."""
    if not isinstance(node, Node) or node.op != "call_function" or node.kwargs.keys() - {"dtype"}:
        return False
    if node.target is operators.keep:
        return _is_condition(node, columns) and same_device(node.args[0], node)
    if node.target not in POINTWISE:
        return False
    if not (_is_value(node, columns) or _is_condition(node, columns)):
        return False
    if node.target is aten.pow.Tensor_Scalar and not isinstance(node.args[1], (int, float)):
        return False
    return all(operand_kind(a, node, columns) is not None for a in operands_of(node))


def _is_condition(node: Node, columns: int) -> bool:
    return (
        is_tensor(node) and val(node).dtype == torch.bool and has_shape(node, *[None] * (len(shape(node)) - 1), columns)
    )


def operands_of(node: Node) -> list[Any]:
    """What a pointwise operation is applied to; nothing for a mask, which its seed is all of."""
    if node.target is operators.keep:
        return []
    return [node.args[0]] if node.target is CONVERT or node.target in COPIES else list(node.args)


def constant_of(operand: Any) -> float | None:
    """The number that an operand is, also where the graph makes a tensor of it."""
    if is_call(operand, aten.full.default, aten.scalar_tensor.default) and shape(operand) == ():
        operand = operand.args[-1]
    plain = isinstance(operand, (int, float)) and not isinstance(operand, bool)
    return float(operand) if plain else None


def same_device(operand: Any, node: Node) -> bool:
    """Whether a kernel on the device of ``node`` can load ``operand``; numbers may be in the memory of the CPU."""
    return bool(val(operand).device == val(node).device)


def operand_kind(operand: Any, node: Node, columns: int) -> str | None:
    """How a pointwise operand broadcasts against ``node``: full, row, column, number or constant; None if it cannot."""
    if constant_of(operand) is not None:
        return "constant"
    if not (is_tensor(operand) and same_device(operand, node)):
        return None
    sizes, whole = shape(operand), shape(node)
    if len(sizes) == len(whole) and has_shape(operand, *whole[:-1], columns):
        return "full"
    if len(sizes) == 0:
        return "number"
    if len(sizes) == len(whole) and has_shape(operand, *whole[:-1], 1):
        return "row"
    if has_shape(operand, *[1] * (len(sizes) - 1), columns):
        return "column"
    return None


# ---- growing ---------------------------------------------------------------------------------------------------------


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
            grown = Region(columns, region.nodes | new, set(region.copies))
            grown.copies |= {n for n in new if not makes(n) and _stays(n, grown)}
            if new and fits(new, grown, order):
                region = grown
                pending += sorted(new, key=order.__getitem__)
    _prune(region)
    return region if seed in region.nodes else Region(columns, {seed})


def _neighbours(node: Node, region: Region) -> Iterator[set[Node]]:
    """What could join the region next to ``node``, in sets that make sense together."""
    value = value_of(node)
    if value is not None and node not in region.copies:
        for user in readers(value):
            # A gradient pair reads what a large product reads as well, so it is in memory, and with sums over rows and
            # over columns a kernel holds too much at once. SwiGLU backward on an H200 (M 8192, N 14336, R 16): 687 us
            # with both pairs in it, 549 in three kernels, sums of parts included.
            if (_is_pointwise(user, region.columns) and not is_left_to_norm(user, node)) or (
                columns_of(user) == region.columns and user.target is not operators.gradient_pair
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
    written in the place of the source, which may be that value under one of several masks.
    """
    found: set[Node] = set()
    loaded: set[Node] = set()
    missing: set[Node] = set()
    pending = [source]
    while pending:
        node = pending.pop()
        if node in found or node in region.nodes:
            continue
        if makes(node) and columns_of(node) == region.columns:
            found.add(node)
        elif _is_pointwise(node, region.columns) and not any(
            _depends_on_sum(a, node, region.columns) for a in operands_of(node)
        ):
            if _is_written(node) and any(is_pointwise(r) and r not in region.nodes for r in readers(node)):
                if node is source:
                    return None
                loaded.add(node)
                continue
            found.add(node)
            pending += sources(node, region.columns)
        elif node is source:
            return None
        else:
            (loaded if _is_written(node) else missing).add(node)
    if missing and not (len(missing) == 1 and not loaded and all(_is_half(node) for node in missing)):
        return None
    return found


def _is_written(node: Node) -> bool:
    """Whether a value is in memory whatever the region does."""
    return not (is_pointwise(node) or node.target is operators.keep) or any(
        not (is_pointwise(r) or _is_reduction(r) or columns_of(r) is not None) for r in readers(node)
    )


def _stays(node: Node, region: Region) -> bool:
    """Whether other kernels go on computing a new member for themselves: nobody has it in memory."""
    others = [r for r in readers(node) if r not in region.nodes]
    return (
        not _is_written(node)
        and any(is_pointwise(r) or _is_reduction(r) for r in others)
        and _is_upstream(node, region)
    )


def is_left_to_norm(total: Node, value: Node) -> bool:
    """Whether a branch's output ``value`` ends its region, and the residual sum that it goes into is not a member.

    It is one where Inductor computes the sum in the kernel of a norm that reads it, from a stream and from what a large
    product makes and can accumulate into ``value``. Written by the region, the sum would be rounded before the norm; and
    the norm has to read the stream's size anyway. On an H100 (M 8192, N 4096): 23 us for the branch, some 8 of the large
    product's and 61 of the norm with the sum, where the region and a norm by itself take 62 and 48.
    """
    if not (is_sum(total) and _terms(value)):
        return False
    other = next(peel_views(a) for a in total.args[:2] if peel_views(a) is not value)
    return not _is_product(other) and not _terms(other) and _is_normed(total)


def _terms(value: Node) -> list[Node]:
    """The products that ``value`` is the sum of, at least a large one among them; none if it is anything else."""
    found, pending = [], [value]
    while pending:
        node = peel_views(pending.pop())
        if _is_product(node):
            found.append(node)
        elif is_sum(node):
            pending += node.args[:2]
        else:
            return []
    return found if any(not makes(node) for node in found) else []


def _is_product(node: Any) -> bool:
    return is_call(node, MM, operators.scaled_mm)


def _is_normed(value: Node) -> bool:
    """Whether pointwise operations lead from ``value`` to a sum over its rows' elements."""
    pending, seen = [value], {value}
    while pending:
        for reader in readers(pending.pop()):
            if _is_reduction(reader) and _reduces_rows(reader):
                return True
            if reader not in seen and is_pointwise(reader):
                seen.add(reader)
                pending.append(reader)
    return False


def _reduces_rows(node: Node) -> bool:
    source = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else ()
    last = len(shape(source)) - 1  # type: ignore[arg-type]  # its schema
    return isinstance(dims, (list, tuple)) and [int(d) % (last + 1) for d in dims] == [last]  # type: ignore[arg-type]


def _is_upstream(node: Node, region: Region) -> bool:
    """Whether nothing that ``node`` is computed from is computed by the region for others as well."""
    pending, seen = [node], {node}
    while pending:
        for source in sources(pending.pop(), region.columns):
            if source in region.nodes and source not in region.copies:
                return False
            if source not in seen and _is_pointwise(source, region.columns):
                seen.add(source)
                pending.append(source)
    return True


def _is_reduction(node: Node) -> bool:
    return is_call(node, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.var_mean.correction)


def value_of(node: Node) -> Node | None:
    """The value that a member of a region has for others: itself, unless it only reads."""
    return node if node.target is not operators.gradient_pair and reads(node) is None else None


def sources(node: Node, columns: int) -> list[Node]:
    """The [M, N] values that a member reads, under row views."""
    if node.target is operators.accumulate:
        candidates = [node.args[0]]
    elif (value := reads(node)) is not None:
        candidates = [value]
    elif makes(node):
        candidates = []
    else:
        candidates = [a for a in operands_of(node) if is_tensor(a) and operand_kind(a, node, columns) == "full"]
    return [peel_views(c) for c in candidates]


def _depends_on_sum(operand: Any, node: Node, columns: int) -> bool:
    """Whether a row operand is computed in this graph."""
    if operand_kind(operand, node, columns) != "row":
        return False
    return peel_views(operand).op != "placeholder"


def order_of(graph: Graph) -> dict[Node, int]:
    """The place of every node in the graph."""
    return {node: i for i, node in enumerate(graph.nodes)}


def fits(new: set[Node], region: Region, order: dict[Node, int]) -> bool:
    """Whether no path leaves the region with its new members and comes back."""
    members = region.nodes | new
    last = max(order[member] for member in members)
    pending = [r for member in members - region.copies for r in readers(member) if r not in members]
    seen = set(pending)
    while pending:
        for user in pending.pop().users:
            if user in members:
                return False
            if user not in seen and order[user] <= last:
                seen.add(user)
                pending.append(user)
    return True


def _prune(region: Region) -> None:
    """Take out what would leave the region as anything wider than the model's dtype, with all that depends on it."""
    while True:
        wide = [
            node
            for node in region.nodes - region.copies
            if not _is_half(node) and any(r not in region.nodes for r in readers(node))
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
