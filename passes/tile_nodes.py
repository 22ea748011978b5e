"""What a node of a GPU's forward or backward graph is to a region: whether it makes, reads or computes an [M, N] value.

The words of :mod:`lora_fx.passes.tile_regions`: a small product *makes* an [M, N] value of rank R factors, or *reads*
one (down to [M, R], across to [R, N], or both as a gradient pair); pointwise operations *compute* one from others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from lora_fx.passes.graph import (
    CONVERT,
    COPIES,
    MM,
    aten,
    has_shape,
    is_alias,
    is_call,
    is_tensor,
    is_transpose,
    peel_views,
    readers,
    shape,
    val,
)
from lora_fx.passes.grouped_site import GROUPED_MM
from lora_fx.passes.kernels import grouped, operators
from lora_fx.passes.kernels.tile_choice import FEW_ROWS
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


def columns_of(node: Node) -> int | None:
    """N of the [M, N] value that one of LoRA's small products makes or reads; None for any other node."""
    if node.op != "call_function" or not is_half(node):
        return None
    if makes(node):
        return _static(shape(node)[1])
    value = reads(node)
    return None if value is None else _static(shape(value)[-1])


def is_half(node: Node) -> bool:
    value = node.meta.get("val")  # Inductor's own rewrites leave nodes without
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, torch.Tensor) and value.dtype in HALF


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) else None


_ENDS = {grouped.grouped_scaled_mm: 2, grouped.grouped_gradient_pair: 3, GROUPED_MM: 2}
"""Which operand of a grouped product says how its rows are shared out."""


def ends_of(node: Node) -> Node | None:
    """Where the rows of each expert end, of a product with their matrices; None for any other node."""
    place = _ENDS.get(node.target) if node.op == "call_function" else None  # type: ignore[call-overload]  # any target
    ends = node.args[place] if place is not None and len(node.args) > place else None
    return ends if isinstance(ends, Node) else None


def is_pair(node: Node) -> bool:
    """Whether ``node`` is g and dB, of a linear or of experts."""
    return is_call(node, operators.gradient_pair, grouped.grouped_gradient_pair)


def scale_of_pair(pair: Node) -> Any:
    """The number that both are multiplied by, or None."""
    place = 4 if pair.target is grouped.grouped_gradient_pair else 3
    return pair.args[place] if len(pair.args) > place else None


def makes(node: Node) -> bool:
    """Whether ``node`` is a product of rank R that makes an [M, N] value."""
    if node.target is grouped.grouped_scaled_mm:
        thin, _, _, scale = (*node.args, None)[:4]
        plain = scale is None or same_device(scale, node)
        return plain and _has_experts(node) and _is_thin(thin, -1) and _static(shape(node)[1]) is not None
    if node.target in (operators.scaled_mm, operators.accumulate):
        operands = node.args if node.target is operators.accumulate else (None, *node.args)
        _, thin, _, scale = (*operands, None)[:4]
        bias = len(node.args) > 3 and node.args[3] is not None and node.target is operators.scaled_mm
        plain = not bias and (scale is None or same_device(scale, node))
        return plain and _is_thin(thin, -1, _highest(node)) and _static(shape(node)[1]) is not None
    # What sums over a few tokens looks like a product of as low a rank.
    if not _is_marked(node) or is_transpose(node.args[0]) or not _is_thin(node.args[0], -1, _highest(node)):
        return False
    if len(shape(node)) != 2:
        return False
    # What has as few columns is h, of few inputs.
    rank, columns = shape(node.args[0])[1], _static(shape(node)[1])  # type: ignore[arg-type]  # _is_thin saw a tensor
    return columns is not None and columns > max(rank, MAX_RANK)


def reads(node: Node) -> Node | None:
    """The [M, N] value that ``node`` multiplies down to rank R (or across, to [R, N]); None if it does not."""
    if is_pair(node):
        value, factor = node.args[:2]
        there = node.target is operators.gradient_pair or _has_experts(node)
        return value if there and is_tensor(factor) and _is_thin(factor, -1) else None  # type: ignore[return-value]
    if not _is_marked(node) or makes(node):
        return None
    left, right = node.args[:2]
    across = _is_thin(left, -2) and is_transpose(left) and is_tensor(right)
    if _is_thin(right, -1) and is_tensor(left) and len(shape(node)) == 2:
        return left  # type: ignore[return-value]  # [M, N] @ [N, R]
    return right if across else None  # type: ignore[return-value]  # [R, M] @ [M, N]


def rank_of(product: Node) -> int:
    """R of a product that reads a value, and is no pair."""
    left, right = product.args[:2]
    return int(shape(left)[-2] if reads(product) is right else shape(right)[-1])  # type: ignore[arg-type]  # their schemas


def has_few_rows_of_tiles(node: Node) -> bool:
    """Whether a product reads a value [M, N] down to [M, R] of so few rows that a kernel which writes the value should
    not compute it as well: in tiles that are wide enough for that there are few programs, which take many steps.

    A Llama-3-8B block of 64 tokens without gradients takes 0.995 of the time with two kernels for silu(gate) * up and
    h of it (an H200, CUDA graphs, twice, rounds in turn), one of 128 tokens with gradients as long. One token, of which
    there is one row of tiles, takes longer.
    """
    rows = shape(node)[0] if is_call(node, MM) and reads(node) is node.args[0] else None
    return isinstance(rows, int) and 16 < rows <= 64


def gradients_of(node: Node) -> set[int]:
    """Which of g (0) and dB (1) are read of a gradient pair; none of any other node."""
    if not is_pair(node):
        return set()
    return {user.args[1] for user in node.users}  # type: ignore[misc]  # getitem's index


def _is_marked(node: Node) -> bool:
    if not node.meta.get(MARK):
        return False
    return is_call(node, MM) or (is_call(node, GROUPED_MM) and _has_experts(node))


def _has_experts(node: Node) -> bool:
    """Whether a number of experts that the graph knows share the rows of a product."""
    ends = ends_of(node)
    return ends is not None and val(ends).dtype == torch.int32 and _static(shape(ends)[0]) is not None


MAX_RANK, MAX_PRODUCT = 64, 128
"""The highest ranks of a product that reads a value, and of one that makes it. Above them cuBLAS has enough to do: it
reads a value at the rate of a copy. Time to the frozen block's on an H200 (Llama-3-8B, M 8192, rank 128, rounds in
turn): 1.138 with those that make a value in tiles, 1.146 with none (plain LoRA 1.170); of its activations 0.93 with
them. Of rank 64, 1.107 of the time with all and 1.125 with none.
"""


def _highest(product: Node) -> int:
    """The highest rank at which a kernel makes this value [M, N]."""
    rows = shape(product)[0]
    if ends_of(product) is not None:
        return MAX_RANK
    return MAX_RANK if isinstance(rows, int) and rows < FEW_ROWS else MAX_PRODUCT


def _is_thin(node: Any, dim: int, most: int = MAX_RANK) -> bool:
    """Whether a matrix, or each of a stack, has at most so many rows (-2) or columns (-1)."""
    if not is_tensor(node) or len(shape(node)) not in (2, 3):
        return False
    size = _static(shape(node)[dim])
    return size is not None and size <= most


def is_left_to_cublas(product: Node) -> bool:
    """Whether a branch's product (or sum with one) makes an [M, N] value out of a rank that no kernel of ours takes
    unless it computes more than that value."""
    left: Any = product.args[1 if product.target is operators.accumulate else 0]
    (rows, columns), rank = shape(product), shape(left)[1]
    if val(product).device.type != "cuda" or val(product).dtype not in HALF:
        return False
    many = not isinstance(rows, int) or rows >= FEW_ROWS
    return many and isinstance(rank, int) and isinstance(columns, int) and MAX_RANK < rank <= columns // 2


def goes_out(node: Node) -> bool:
    """Whether the caller, or autograd, gets a value or some view of it."""
    return any(user.op == "output" or (is_alias(user) and goes_out(user)) for user in node.users)


def is_part_of_stacked(node: Node) -> bool:
    """Whether ``node`` is the base's part, or h, of a product that has both (:mod:`lora_fx.passes.beside`)."""
    return is_call(node, aten.slice.Tensor) and is_call(node.args[0], operators.stacked_mm)


def is_joined(node: Node) -> bool:
    """Whether a kernel of Inductor's writes ``node`` beside others (:mod:`lora_fx.passes.sibling_gradients`)."""
    stacks = [reader for reader in readers(node) if is_call(reader, aten.cat.default)]
    return any(is_call(user, operators.joined_mm) for stack in stacks for user in stack.users)


def _is_value(node: Any, columns: int) -> bool:
    """Whether ``node`` is an [..., N] value of a pass, contiguous."""
    if not is_tensor(node) or len(shape(node)) < 2 or not has_shape(node, *[None] * (len(shape(node)) - 1), columns):
        return False
    value = val(node)
    return value.dtype.is_floating_point and value.dtype.itemsize <= 4 and bool(value.is_contiguous())


def can_compute(node: Any, columns: int) -> bool:
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


def bias_of(product: Any) -> Node | None:
    """What a product with a bias adds to each of its rows; None if ``product`` is none."""
    if not is_call(product, aten.addmm.default) or product.kwargs or len(shape(product.args[0])) != 1:
        return None
    bias: Node = product.args[0]
    return bias if has_shape(bias, shape(product)[1]) else None


def is_reduction(node: Node) -> bool:
    """Whether Inductor's kernel of ``node`` computes what it reduces as it goes."""
    return is_call(node, *_REDUCTIONS)


_REDUCTIONS = (
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.var_mean.correction,
    aten.amax.default,
    aten.amin.default,
    aten.max.default,
    aten.min.default,
)


def largest_of(node: Node) -> Node | None:
    """The magnitudes, as :mod:`lora_fx.passes.tile_largest` has them, of which ``node`` is the largest; else None."""
    if not is_call(node, aten.amax.default, aten.max.default) or node.kwargs:
        return None
    value, dims = (*node.args, [])[:2]
    whole = not dims or len(set(dims)) == len(shape(value))  # type: ignore[arg-type]  # their schemas
    return value if whole and len(node.args) < 3 and is_call(peel_views(value), aten.abs.default) else None  # type: ignore[return-value]


def value_of(node: Node) -> Node | None:
    """The value that a member of a region has for others: itself, unless it only reads."""
    only_reads = is_pair(node) or reads(node) is not None or largest_of(node) is not None
    return None if only_reads else node


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
