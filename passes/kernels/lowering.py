"""Which implementation each of our operators gets, chosen per node once forward and backward are separate graphs.

The functional form of an operator is always correct, so a lowering may leave a node as it is. On a GPU, what
:mod:`lora_fx.passes.tile_regions` has left over comes here.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, detect_fake_mode
from lora_fx.passes.graph import CONVERT, MM, aten, is_call, is_pointwise, is_transpose, readers, shape, val
from lora_fx.passes.grouped_site import GROUPED_MM
from lora_fx.passes.kernels import dropout, grouped, native, operators
from lora_fx.passes.site import MARK

Lowering = Callable[[Node], None]


# Rows up to which a product of rank R is written out for Inductor on a GPU, and the largest R that it unrolls then.
FEW_ROWS, UNROLLED = 8, 32


def has_few_rows(node: Node) -> bool:
    """Whether a product on a GPU has so few tokens (they are decoded) that launching a kernel is what it costs.

    It is written out then, if no program of ours computes it: its rank is too high, or it is in float32.

    The rows of a product that sums over tokens, dA or dB, are none.
    """
    rows = shape(node)[0]
    few = isinstance(rows, int) and rows <= FEW_ROWS and val(node).device.type != "cpu"
    return few and not is_transpose(node.args[0])


def _written_out(node: Node, a: Node, b: Node, scale: Node | None = None, added: Node | None = None) -> Node:
    """``a @ b * scale + added`` as a sum of products, which Inductor puts into the kernel that reads it.

    It unrolls sums over fewer than eight: a sum over R = 16 is one over 4 of sums over 4. Down to rank R it is a
    reduction, whose siblings over the same x are one kernel. It is one as well where a norm reads the result: there is
    one program a token in the norm's kernel, which took 11 us for one token on an H200 (K 4096) with it unrolled.
    """
    emit = functools.partial(_computed, node)
    m, k, n = *shape(a), shape(b)[1]
    wide = [emit(CONVERT, t, torch.float32) for t in (a, emit(aten.permute.default, b, [1, 0]))]
    factors = _factors(k) if isinstance(k, int) and k <= UNROLLED and not _is_reduced(node) else [k]
    left = emit(aten.reshape.default, wide[0], [m, 1, *factors])
    right = emit(aten.reshape.default, wide[1], [1, n, *factors])
    result = emit(aten.mul.Tensor, left, right)
    for _ in factors:
        result = emit(aten.sum.dim_IntList, result, [-1])
    if scale is not None:
        result = emit(aten.mul.Tensor, result, scale)
    if added is not None:
        result = emit(aten.add.Tensor, result, emit(CONVERT, added, torch.float32))
    return emit(CONVERT, result, val(node).dtype)


def _is_reduced(node: Node) -> bool:
    """Whether pointwise operations lead from a value to a sum or a mean, and nothing on the way is written."""
    reductions = (aten.mean.dim, aten.sum.dim_IntList, aten.var_mean.correction, aten.amax.default)
    pending, seen = [node], {node}
    while pending:
        users = list(readers(pending.pop()))
        if not all(is_call(user, *reductions) or is_pointwise(user) for user in users):
            continue  # a large product reads it
        if any(is_call(user, *reductions) for user in users):
            return True
        pending += [user for user in users if user not in seen]
        seen.update(users)
    return False


def _factors(size: int) -> list[int]:
    """Numbers below eight whose product is ``size``; ``size`` itself where there are none."""
    found, rest = [], size
    for factor in (7, 6, 5, 4, 3, 2):
        while rest % factor == 0:
            found.append(factor)
            rest //= factor
    return found if rest == 1 and found else [size]


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
    elif has_few_rows(node):
        # In float32: a sum in the model's dtype Inductor would take for a large product that accumulates.
        with detect_fake_mode([val(node)]):
            result = _written_out(node, a, b, scale, base)
    else:
        product = _emit(node, operators.scaled_mm, (a, b, scale), value=val(node))
        result = _emit(node, aten.add.Tensor, (base, product), value=val(node))
    _replace(node, result)


def scaled_mm(node: Node) -> None:
    """On an accelerator, the product, and a scale that Inductor fuses into the kernel that reads it."""
    a, b, scale, bias = _operands(node, 4)
    if val(node).device.type == "cpu":
        return
    if has_few_rows(node):
        with detect_fake_mode([val(node)]):
            _replace(node, _written_out(node, a, b, scale, bias))
        return
    result = _emit(node, MM, (a, b), value=val(node))
    if scale is not None:
        result = _emit(node, aten.mul.Tensor, (result, scale), value=val(node))
    if bias is not None:
        result = _emit(node, aten.add.Tensor, (result, bias), value=val(node))
    _replace(node, result)


def thin_mm(node: Node) -> None:
    """On the CPU, our operator for what is left as a plain product of a branch: h, dA, and a dX that is in a sum.

    Not before the graphs are apart: until then it is better to be an ``mm``, which everybody knows. On a GPU, h of few
    rows is written out.
    """
    if not node.meta.get(MARK):
        return
    a, b = _operands(node, 2)
    if val(node).device.type != "cpu":
        if has_few_rows(node):
            with detect_fake_mode([val(node)]):
                _replace(node, _written_out(node, a, b))
        return
    # A dynamic size is the number of tokens, usually many; the operator looks again.
    m, n, k = (s if isinstance(s, int) else native.MIN_WORK for s in (*val(node).shape, val(a).shape[1]))
    if native.is_thin(val(node).dtype, m, n, k):
        _replace(node, _emit(node, operators.scaled_mm, (a, b), value=val(node)))


def gradient_pair(node: Node) -> None:
    """On an accelerator, the two products, and scales that Inductor fuses into the kernels that read them.

    Of 16 bits cuBLAS makes results in float32, which are scaled before they are rounded
    (:func:`lora_fx.passes.kernels.operators._float_mm`).
    """
    dy, b, h, scale = _operands(node, 4)
    grad_h, grad_b = val(node)
    if grad_h.device.type == "cpu":
        return
    dy_t = _emit(node, aten.permute.default, (dy, [1, 0]), value=val(dy).t())
    results = []
    for operands, value in (((dy, b), grad_h), ((dy_t, h), grad_b)):
        if scale is None:
            results.append(_emit(node, MM, operands, value=value))
            continue
        in_float = value.dtype.itemsize == 2 and value.device.type == "cuda" and not torch.version.hip
        target, wide = (operators.float_mm, torch.float32) if in_float else (MM, value.dtype)
        with detect_fake_mode([value]):
            exact = value.to(wide)
        product = _emit(node, target, operands, value=exact)
        scaled = _emit(node, aten.mul.Tensor, (product, scale), value=exact)
        results.append(scaled if wide == value.dtype else _emit(node, CONVERT, (scaled, value.dtype), value=value))
    for user in list(node.users):
        _replace(user, results[cast(int, user.args[1])])
    node.graph.erase_node(node)


def keep(node: Node) -> None:
    """The mask as operators that Inductor fuses with what reads it, where no kernel of ours draws it."""
    seed, size, p = node.args
    with detect_fake_mode([val(node)]):
        emit = functools.partial(_computed, node)
        _replace(node, dropout.keep(seed, size, p, val(node).device, emit))  # type: ignore[arg-type]  # its schema


def _computed(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A node before ``like``, with its value computed."""
    value = target(*torch.fx.node.map_arg(args, val), **torch.fx.node.map_arg(kwargs, val))
    return _emit(like, target, args, kwargs, value=value)


def _join_scales(graph: Graph) -> None:
    """One kernel for all products of two numbers in memory (a module's scale and its switch): each was a launch.

    Where a branch is written out, they go into its kernel by themselves.
    """
    if any(node.meta.get(MARK) and has_few_rows(node) for node in graph.find_nodes(op="call_function", target=MM)):
        return
    found = [
        node
        for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor)
        if all(_is_number_input(a) for a in node.args) and val(node).device.type != "cpu"
    ]
    if len(found) < 2:
        return
    factors = [[node.args[side] for node in found] for side in (0, 1)]
    joined = _emit(found[0], aten._foreach_mul.List, (*factors,), value=[val(node) for node in found])
    results = [_emit(found[0], operator.getitem, (joined, i), value=val(node)) for i, node in enumerate(found)]
    for node, result in zip(found, results):
        _replace(node, result)


def _is_number_input(node: Any) -> bool:
    is_input = isinstance(node, Node) and node.op == "placeholder"
    return is_input and isinstance(val(node), torch.Tensor) and shape(node) == ()


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


def grouped_accumulate(node: Node) -> None:
    """On the CPU, let Inductor add into the base's buffer, as `accumulate`. No pass makes it elsewhere."""
    base, a, b, ends, scale = _operands(node, 5)
    operands = {"base": base, "a": a, "b": b, "ends": ends, "scale": scale}
    wrapper = _emit(node, auto_functionalized, (grouped.grouped_accumulate_,), operands, value=(None, val(node)))
    _replace(node, _emit(node, operator.getitem, (wrapper, 1), value=val(node)))


def grouped_scaled_mm(node: Node) -> None:
    """On an accelerator, torch's grouped product; the scale goes into the smaller operand, the factor."""
    a, b, ends, scale = _operands(node, 4)
    if val(node).device.type != "cpu":
        _replace(node, _emit(node, GROUPED_MM, (a, _scaled(node, b, scale), ends), value=val(node)))


def grouped_gradient_pair(node: Node) -> None:
    """On an accelerator, torch's two grouped products, and scales on what is as small as the factor."""
    dy, b, h, ends, scale = _operands(node, 5)
    grad_h, grad_b = val(node)
    if grad_h.device.type == "cpu":
        return
    first = _emit(node, GROUPED_MM, (dy, _scaled(node, b, scale), ends), value=grad_h)
    dy_t = _emit(node, aten.permute.default, (dy, [1, 0]), value=val(dy).t())
    second = _scaled(node, _emit(node, GROUPED_MM, (dy_t, h, ends), value=grad_b), scale)
    for user in list(node.users):
        _replace(user, (first, second)[cast(int, user.args[1])])
    node.graph.erase_node(node)


def _scaled(like: Node, factor: Node, scale: Node | None) -> Node:
    return factor if scale is None else _emit(like, aten.mul.Tensor, (factor, scale), value=val(factor))


LOWERINGS: dict[Callable[..., Any], Lowering] = {
    MM: thin_mm,
    operators.accumulate: accumulate,
    # After accumulate, which makes some.
    operators.scaled_mm: scaled_mm,
    operators.gradient_pair: gradient_pair,
    operators.keep: keep,
    grouped.grouped_accumulate: grouped_accumulate,
    grouped.grouped_scaled_mm: grouped_scaled_mm,
    grouped.grouped_gradient_pair: grouped_gradient_pair,
}


def lower(graph: Graph) -> Iterator[tuple[Node, Exception]]:
    """Lower every node that has a lowering; gives each where that failed, which stays in its functional form."""
    _join_scales(graph)
    for target, lowering in LOWERINGS.items():
        for node in graph.find_nodes(op="call_function", target=target):
            try:
                lowering(node)
            except Exception as error:
                yield node, error
