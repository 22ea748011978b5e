"""Under async tensor parallelism, let programs read and write rows in the order in which Inductor has them in memory.

What it pipelines with a collective along the sequence, [B, T, K], it wants with T outermost, where a rank's piece is
one block; and so it gives what comes out. Before, where every ``a`` and every ``reshape`` is a copy::

    y: f[B, T, N] of strides [N, B N, 1] = gathered and multiplied;    z = tile(reshape(y, [B T, N]), ...)
    z: f[B T, K] = tile(...);    a = force_stride_order(reshape(z, [B, T, K]), [K, B K, 1]);    multiplied and scattered
    x: f[B, T, K] = ...;    h = tile(x, ...);    a = force_stride_order(x, [K, B K, 1]);    gathered and multiplied

After, as kernels take their rows in either order (:class:`lora_fx.passes.kernels.tile_rows.Rows`)::

    z = tile(y, ...)
    z: f[B, T, K] of strides [K, B K, 1] = tile(...);    multiplied and scattered
    x: f[B, T, K] = ...;    a = force_stride_order(x, [K, B K, 1]);    h = tile(a, ...)

where the kernel that computes x writes it as a.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, detect_fake_mode, force_stride_order
from lora_fx.passes.graph import VIEWS, aten, is_call, peel_views, shape, val
from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.tile_program import Program, Statement, split
from lora_fx.passes.kernels.tile_rows import rows_of


def settle(graph: Graph) -> Iterator[tuple[Node, Exception]]:
    """Do so where an order is asked for; gives each node where that failed."""
    orders = list(graph.find_nodes(op="call_function", target=force_stride_order()))
    calls = list(graph.find_nodes(op="call_function", target=auto_functionalized)) if orders else []
    asked: dict[Node, Node] = {}
    for order in orders:
        try:
            if not _written(order):
                asked[order.args[0]] = order
        except Exception as error:
            yield order, error
    for call in calls:
        try:
            if call.args[0] is operators.tile_:
                _read(call, asked)
        except Exception as error:
            yield call, error


def _read(call: Node, asked: dict[Node, Node]) -> None:
    """Have a program read values as they are in memory, or are asked for in another order."""
    inputs: Any = call.kwargs["inputs"]
    outputs: Any = call.kwargs["outputs"]
    programs = [program for (program,) in split(str(call.kwargs["program"]))]
    kinds = [(program, kind[0]) for program in programs for kind in program.inputs]
    found = []
    for (program, kind), node in zip(kinds, inputs, strict=True):
        value = _in_memory(node)
        if kind != "full" or node in outputs or value in outputs or _is_kept(value):  # written over, or copied anyway
            value = node
        elif (order := asked.get(value)) is not None and _takes(program, value, order):
            value.append(order)
            order.meta.setdefault("val", _laid_out(value, order))
            value = order
        found.append(value)
    call.update_kwarg("inputs", found)


def _written(order: Node) -> bool:
    """Have a program write its output in the order that is asked for; says whether one made it."""
    source: Any = order.args[0]
    out = peel_views(source)
    if not (is_call(out, operator.getitem) and is_call(out.args[0], operator.getitem)):
        return False
    results, place = out.args
    call, which = results.args
    if not (is_call(call, auto_functionalized) and call.args[0] is operators.tile_ and which == 1):
        return False
    memory = call.kwargs["outputs"][place]
    program, statement = _statement(call, place)
    sizes, strides = list(shape(source)), list(order.args[1])  # type: ignore[arg-type]  # a list of numbers
    takes = statement[0] == "store" and is_call(memory, aten.empty.memory_format) and not _is_kept(out)
    # What a kernel cannot write where it is wanted is copied once, and not twice.
    if not (takes and all(isinstance(n, int) for n in sizes + strides) and rows_of(program, sizes, strides)):
        return False
    dims = sorted(range(len(sizes)), key=lambda dim: -strides[dim])
    value = _laid_out(source, order)
    outputs, values = [*call.kwargs["outputs"]], [*results.meta["val"]]
    with order.graph.inserting_before(memory):
        fresh = order.graph.call_function(aten.empty.memory_format, ([sizes[dim] for dim in dims],), memory.kwargs)
        made = order.graph.call_function(aten.permute.default, (fresh, [dims.index(dim) for dim in range(len(dims))]))
    with detect_fake_mode([val(source)]):
        fresh.meta["val"] = aten.empty.memory_format(*fresh.args, **fresh.kwargs)
        made.meta["val"] = aten.permute.default(fresh.meta["val"], made.args[1])
    if list(made.meta["val"].stride()) != strides:
        order.graph.erase_node(made)
        order.graph.erase_node(fresh)
        return False
    # As matrices, and in other shapes, it is read through a view of what it was.
    with order.graph.inserting_after(out):
        matrix = order.graph.call_function(aten.reshape.default, (out, list(shape(out))))
    matrix.meta["val"] = val(out)
    out.replace_all_uses_with(matrix, delete_user_cb=lambda user: user is not matrix)
    outputs[place], values[place] = made, value
    call.update_kwarg("outputs", outputs)
    call.meta["val"], results.meta["val"], out.meta["val"] = (None, values), values, value
    order.replace_all_uses_with(out)
    while order is not matrix and not order.users:
        above: Any = order.args[0]
        order.graph.erase_node(order)
        order = above
    if not matrix.users:
        order.graph.erase_node(matrix)
    return True


def _is_kept(value: Node) -> bool:
    """Whether forward returns a value, or a view of it: autograd keeps it as the matrix that it was.

    What lies in another order is copied for that sooner or later: if nothing reads the copy, at the end of forward,
    until when both would take memory.
    """
    return any(user.op == "output" or (is_call(user, *VIEWS) and _is_kept(user)) for user in value.users)


def _takes(program: Program, value: Node, order: Node) -> bool:
    """Whether a program reads what is in this order where it is; an input of the graph is copied for it anyway."""
    if "val" not in value.meta:
        return False
    numbers = [*shape(value), *order.args[1]]  # type: ignore[misc]  # a list of numbers
    is_known = value.op != "placeholder" and all(isinstance(n, int) for n in numbers)
    return is_known and rows_of(program, shape(value), order.args[1]) is not None  # type: ignore[arg-type]  # likewise


def _in_memory(node: Node) -> Any:
    """The value under views of rows. What Inductor makes of a product and a gather it gives no fake value, and reshapes
    it to what the product was."""
    value = peel_views(node)
    source: Any = value.args[0] if is_call(value, aten.reshape.default) else None
    return source if is_call(source, operator.getitem) and "val" not in source.meta else value


def _statement(call: Node, place: int) -> tuple[Program, Statement]:
    """The statement that makes an output of a call, and its program."""
    programs = [program for (program,) in split(str(call.kwargs["program"]))]
    return [(program, statement) for program in programs for statement in program.outputs][place]


def _laid_out(source: Node, order: Node) -> torch.Tensor:
    """A fake value as ``source`` has it, in an order."""
    like = val(source)
    with detect_fake_mode([like]):
        return torch.empty_strided(like.shape, order.args[1], dtype=like.dtype, device=like.device)  # type: ignore[arg-type]
