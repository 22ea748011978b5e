"""Which implementation each of our operators gets, chosen per node once forward and backward are separate graphs.

The functional form of an operator is always correct, so a lowering may leave a node as it is. ``LOWERINGS`` is the seam
for kernels: an operator, and a function that decides by shape and device and rewrites the node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, detect_fake_mode
from lora_fx.passes.graph import CONVERT, MM, aten, is_call, is_row_view, is_transpose, val
from lora_fx.passes.kernels import native, operators
from lora_fx.passes.site import Site

Lowering = Callable[[Node], None]

BRANCH = "lora_fx_branch"
"""In the metadata of a matrix product that was proved to be part of a LoRA branch."""


def mark(site: Site) -> None:
    """Mark the plain products of a branch as they stand in the joint graph now; a stack's are those of each sibling."""
    for node in (site.down, site.up, site.grad_a, site.grad_x):
        product: Any = node
        while is_call(product, aten.slice.Tensor) or is_transpose(product) or is_row_view(product):
            product = product.args[0]
        if is_call(product, MM):
            product.meta[BRANCH] = True


# What one program of the gradient kernel takes of dy: the best of five for a Llama-3-8B block on an H200 (M 8192, R 16,
# bfloat16, steps queued back to back). Time to the frozen block's: 1.105 with these, 1.112 to 1.114 with 2048 x 256,
# 1024 x 256, 512 x 256 and 1024 x 512, 1.131 with two products of cuBLAS.
ROWS, COLUMNS = 1024, 128


def accumulate(node: Node) -> None:
    """On the CPU, let Inductor add into the base's buffer when this is its last reader (it copies the base otherwise).

    The wrapper is how Inductor represents a mutation that it may or may not perform in place; the decision, with
    everything that it must know about later readers and views, stays Inductor's. On an accelerator it is a sum that
    Inductor fuses with what reads it.
    """
    base, a, b, scale = _operands(node, 4)
    if val(node).device.type == "cpu":
        operands = {"base": base, "a": a, "b": b, "scale": scale}
        wrapper = _emit(node, auto_functionalized, (operators.accumulate_,), operands, value=(None, val(node)))
        result = _emit(node, operator.getitem, (wrapper, 1), value=val(node))
    else:
        product = _emit(node, operators.scaled_mm, (a, b, scale), value=val(node))
        result = _emit(node, aten.add.Tensor, (base, product), value=val(node))
    _replace(node, result)


def scaled_mm(node: Node) -> None:
    """On an accelerator, the product, and a scale that Inductor fuses into the kernel that reads it."""
    a, b, scale, bias = _operands(node, 4)
    if val(node).device.type == "cpu":
        return
    result = _emit(node, aten.mm.default, (a, b), value=val(node))
    if scale is not None:
        result = _emit(node, aten.mul.Tensor, (result, scale), value=val(node))
    if bias is not None:
        result = _emit(node, aten.add.Tensor, (result, bias), value=val(node))
    _replace(node, result)


def thin_mm(node: Node) -> None:
    """On the CPU, our operator for what is left as a plain product of a branch: h, dA, and a dX that is in a sum.

    Not before the graphs are apart: until then it is better to be an ``mm``, which everybody knows.
    """
    if not (node.meta.get(BRANCH) and val(node).device.type == "cpu"):
        return
    a, b = _operands(node, 2)
    # A dynamic size is the number of tokens, usually many; the operator looks again.
    m, n, k = (s if isinstance(s, int) else native.MIN_WORK for s in (*val(node).shape, val(a).shape[1]))
    if native.is_thin(val(node).dtype, m, n, k):
        _replace(node, _emit(node, operators.scaled_mm, (a, b), value=val(node)))


def gradient_pair(node: Node) -> None:
    """On CUDA, a kernel that reads dy once; the sums of its parts, scales and casts are Inductor's to fuse."""
    dy, b, h, scale = _operands(node, 4)
    grad_h, grad_b = val(node)
    if grad_h.device.type == "cpu":
        return
    results = []
    if _has_kernel(val(dy), grad_h.shape[1]):
        with detect_fake_mode([grad_h]):
            values = operators.gradient_parts(val(dy), val(b), val(h), ROWS, COLUMNS)
        parts = _emit(node, operators.gradient_parts, (dy, b, h, ROWS, COLUMNS), value=values)
        for index, value in enumerate((grad_h, grad_b)):
            part = _emit(node, operator.getitem, (parts, index), value=values[index])
            with detect_fake_mode([grad_h]):
                total_value = values[index].sum(0)
            total = _emit(node, aten.sum.dim_IntList, (part, [0]), value=total_value)
            if scale is not None:
                total = _emit(node, aten.mul.Tensor, (total, scale), value=total_value)
            results.append(_emit(node, CONVERT, (total, value.dtype), value=value))
    else:
        dy_t = _emit(node, aten.permute.default, (dy, [1, 0]), value=val(dy).t())
        for operands, value in (((dy, b), grad_h), ((dy_t, h), grad_b)):
            result = _emit(node, aten.mm.default, operands, value=value)
            if scale is not None:
                result = _emit(node, aten.mul.Tensor, (result, scale), value=value)
            results.append(result)
    for user in list(node.users):
        _replace(user, results[cast(int, user.args[1])])
    node.graph.erase_node(node)


def _has_kernel(dy: torch.Tensor, rank: int | torch.SymInt) -> bool:
    """Whether the gradient kernel is for this: 16-bit, static, and large enough to fill the device."""
    m, n = dy.shape
    static = isinstance(m, int) and isinstance(n, int) and isinstance(rank, int)
    half = dy.dtype in (torch.bfloat16, torch.float16)
    return dy.device.type == "cuda" and half and static and rank <= 64 and m >= ROWS and n >= COLUMNS


def _operands(node: Node, count: int) -> tuple[Any, ...]:
    """The first ``count`` operands, None for those that are left out."""
    return (*node.args, *[None] * count)[:count]


def _replace(node: Node, result: Node) -> None:
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)


def _emit(like: Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, value: Any) -> Node:
    """A node before ``like`` with its metadata and a known fake value."""
    with like.graph.inserting_before(like):
        node = like.graph.call_function(target, args, kwargs or {})
    node.meta.update(like.meta)
    node.meta["val"] = value
    return node


LOWERINGS: dict[Callable[..., Any], Lowering] = {
    MM: thin_mm,
    operators.accumulate: accumulate,
    # After accumulate, which makes some.
    operators.scaled_mm: scaled_mm,
    operators.gradient_pair: gradient_pair,
}


def lower(graph: Graph) -> Iterator[tuple[Node, Exception]]:
    """Lower every node that has a lowering; gives each where that failed, which stays in its functional form."""
    for target, lowering in LOWERINGS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            try:
                lowering(node)
            except Exception as error:
                yield node, error
