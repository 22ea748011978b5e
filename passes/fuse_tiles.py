"""Write the programs of regions (:mod:`lora_fx.passes.tile_regions`) and put them in the regions' places."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes import sibling_gradients, tile_joint, tile_outputs, tile_pairs, tile_stacks, tile_sums
from lora_fx.passes._torch import auto_functionalized, detect_fake_mode, stable_topological_sort
from lora_fx.passes.graph import (
    CONVERT,
    VIEWS,
    aten,
    has_shape,
    is_call,
    is_row_view,
    is_tensor,
    shape,
    val,
)
from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.tile_choice import choose
from lora_fx.passes.kernels.tile_program import Program, Statement, Tile
from lora_fx.passes.shared_rows import reads_pipelined_gather
from lora_fx.passes.site import MARK
from lora_fx.passes.snapshot import Snapshot
from lora_fx.passes.tile_copies import separate
from lora_fx.passes.tile_largest import take
from lora_fx.passes.tile_nodes import (
    columns_of,
    goes_out,
    is_pair,
    is_part_of_stacked,
    largest_of,
    reads,
    scale_of_pair,
    value_of,
)
from lora_fx.passes.tile_regions import Region, grow
from lora_fx.passes.tile_siblings import join
from lora_fx.passes.tile_terms import is_read_last_in
from lora_fx.passes.tile_writer import Writer

Choose = Callable[[list[list[Any]], list[Statement], Any, int], Tile | None]


def cut(graph: Graph, choose: Choose = choose) -> Iterator[tuple[Node, Exception]]:
    """Replace every region of ``graph`` by a call of its program; gives each seed where that failed, which stays.

    Where a failure comes after something was replaced, all of it is undone: the graph is what it was, without programs.

    ``choose`` gives the tile for a program's input kinds, body, M and N, or None to leave the region alone.
    """
    before, output = Snapshot(graph), next(iter(graph.find_nodes(op="output")))
    failures: list[tuple[Node, Exception]] = []
    try:
        _cut(graph, output, choose, failures)
    except Exception as error:
        before.restore()
        failures.append((error.node, error.error) if isinstance(error, _TornError) else (output, error))
    yield from failures


def _cut(graph: Graph, output: Node, choose: Choose, failures: list[tuple[Node, Exception]]) -> None:
    for seed in _seeds(graph):
        with _undone(graph, seed, failures):
            separate(seed)
            tile_pairs.split(seed)
    taken: set[Node] = set()
    changed = False
    for seed in _seeds(graph):
        if seed in taken:
            continue
        with _undone(graph, seed, failures):
            region = take(join(grow(seed, graph), graph), graph)
            taken |= region.nodes
            changed |= _emit(region, graph, choose)
    with _undone(graph, output, failures):
        tile_stacks.accumulate(graph)
    if changed:
        with _undone(graph, output, failures):
            graph.eliminate_dead_code()
            tile_sums.stack(graph)
            tile_sums.gather(graph)
            tile_sums.join(graph)
            graph.eliminate_dead_code()
            tile_outputs.settle(graph)
            tile_joint.join(graph)
    with _undone(graph, output, failures):
        sibling_gradients.settle(graph)


class _TornError(Exception):
    """A step failed after it had replaced nodes."""

    def __init__(self, node: Node, error: Exception) -> None:
        super().__init__(str(error))
        self.node, self.error = node, error


@contextlib.contextmanager
def _undone(graph: Graph, node: Node, failures: list[tuple[Node, Exception]]) -> Iterator[None]:
    """Within, a failure takes back the nodes that were added, and is listed with ``node``.

    Raises:
        _TornError: others read what was added by then, or are gone.
    """
    before = set(graph.nodes)
    try:
        yield
    except Exception as error:
        added = [each for each in graph.nodes if each not in before]
        if len(graph.nodes) - len(added) < len(before) or any(user in before for each in added for user in each.users):
            raise _TornError(node, error) from error
        for each in added:
            each.args, each.kwargs = (), {}
        for each in added:
            graph.erase_node(each)
        failures.append((node, error))


def _seeds(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if columns_of(node) is not None and _has_kernels(node)]


def _has_kernels(node: Node) -> bool:
    value = val(node)
    value = value[0] if isinstance(value, (tuple, list)) else value
    return value.device.type == "cuda"


def _emit(region: Region, graph: Graph, choose: Choose) -> bool:
    """Put the region's program in its place; says whether it did."""
    members = [node for node in graph.nodes if node in region.nodes]
    rows = _rows(members[0])
    writer = Writer(region, members, rows)
    for member in members:
        writer.write(member)
    writer.finish()
    tile = choose(writer.kinds, writer.body, rows, region.columns)
    if tile is None:
        return False
    dtype = next(val(node).dtype for node, kind in zip(writer.inputs, writer.kinds) if kind[0] in ("thin", "factor"))
    program = Program(region.columns, str(dtype).removeprefix("torch."), writer.kinds, writer.body, tile)
    last = [member for member in members if member not in region.copies][-1]
    outputs = _outputs(program, writer, region, last)
    with detect_fake_mode([val(node) for node in outputs]):
        # Values of their own: by their storage Inductor would take them for views of what is mutated. With the gaps
        # that rows have there, or those who read them would get copies.
        values = [val(node).new_empty_strided(val(node).shape, val(node).stride()) for node in outputs]
    operands = {"outputs": outputs, "program": program.dumps(), "inputs": writer.inputs}
    # The wrapper is how Inductor represents a mutation that it may perform in place (accumulate has the same).
    ran = _call(last, auto_functionalized, (operators.tile_,), (None, values), operands)
    written = _call(last, operator.getitem, (ran, 1), values)
    replacements: dict[tuple[Node, int], Node] = {}
    for index, (key, statement) in enumerate(zip(writer.outputs, program.outputs)):
        out = _call(last, operator.getitem, (written, index), values[index])
        member, which = key
        for product in writer.accumulated[:1]:
            out = _accumulate(last, out, product)
        for product in writer.accumulated[1:]:
            # In the shape of their reader: a sum of matrices Inductor would take for a product that accumulates into a
            # copy of the rest, unless it is pointwise operations that read it.
            terms = [_in_shape(last, term, _sizes(member, region, last)) for term in (out, product)]
            out = _compute(last, aten.add.Tensor, *terms)
        replacements[key] = _finish(last, out, program, statement, member, which, region)
    for (member, which), node in replacements.items():
        if is_pair(member):
            for user in list(member.users):
                if user.args[1] == which:
                    user.replace_all_uses_with(node)
        else:
            member.replace_all_uses_with(node, delete_user_cb=lambda user: user not in region.nodes)
    for member in reversed(members):
        if member not in region.copies:
            _erase(member)
    stable_topological_sort(graph)
    return True


def _accumulate(like: Node, base: Node, product: Node) -> Node:
    """``base``, times what `beta_for` says, with a large product added to it, in place if Inductor agrees."""
    with detect_fake_mode([val(base)]):
        value = torch.empty_like(val(base))
    a, b = product.args[-2:]  # behind a bias, which ``base`` has
    operands = {"base": base, "a": a, "b": b, "scale": None, "beta": operators.beta_for(value.dtype)}
    wrapper = _call(like, auto_functionalized, (operators.accumulate_,), (None, value), operands)
    return _call(like, operator.getitem, (wrapper, 1), value)


def _in_shape(like: Node, node: Node, sizes: list[Any]) -> Node:
    return node if len(sizes) == val(node).dim() else _compute(like, aten.reshape.default, node, sizes)


def _outputs(program: Program, writer: Writer, region: Region, like: Node) -> list[Node]:
    """Memory for the outputs: fresh, or that of an input which nobody reads but the region.

    That is a large product, or what forward saved: Inductor says whether backward may write over it. Not a product that
    Inductor pipelines with a gather, whose rows lie in another order than others want them in.
    """
    source, kind = next(
        (node, kind[0]) for node, kind in zip(writer.inputs, writer.kinds) if kind[0] in ("full", "thin", "parts")
    )
    rows, parts = _row_sizes(source, kind, program, like)
    full = [node for node, kind in zip(writer.inputs, writer.kinds) if kind[0] == "full"]
    spare = [node for node in full if is_read_last_in(node, region) and not reads_pipelined_gather(node)]
    spare.sort(key=lambda node: node.op == "placeholder")
    found = []
    for statement, (member, _) in zip(program.outputs, writer.outputs, strict=True):
        sizes, dtype = program.output_shape(statement, rows, parts)
        # What the caller gets has no gaps between its rows.
        fit = [n for n in spare if not (is_part_of_stacked(n) and goes_out(member))]
        reused = next((n for n in fit if statement[0] == "store" and val(n).dtype == dtype), None)
        if reused is None:
            found.append(_compute(like, aten.empty.memory_format, list(sizes), dtype=dtype, device=val(source).device))
            continue
        spare.remove(reused)
        if reused.op == "placeholder":
            reused = _compute(like, operators.donated, reused, list(sizes))
        found.append(reused)
    return found


def _row_sizes(source: Node, kind: str, program: Program, like: Node) -> tuple[Any, Any]:
    """M and the number of tiles along it, as numbers or, where M is a symbol, as nodes."""
    rows = shape(source)[1] if kind == "parts" else val(source).numel() // shape(source)[-1]
    if isinstance(rows, int):
        return rows, program.row_parts(rows)
    matrix = (
        source if len(shape(source)) == 2 else _compute(like, aten.reshape.default, source, [-1, shape(source)[-1]])
    )
    node = _compute(like, aten.sym_size.int, matrix, 0)
    above = _compute(like, operator.add, node, program.tile.rows - 1)
    parts = _compute(like, operator.floordiv, above, program.tile.rows)
    return node, _compute(like, operator.add, parts, program.experts) if program.experts else parts


def _rows(member: Node) -> Any:
    """M, a number or a symbol."""
    value = reads(member)
    sizes = shape(member if value is None else value)[:-1]
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _finish(
    like: Node, out: Node, program: Program, statement: Statement, member: Node, which: int, region: Region
) -> Node:
    """An output as the member's users expect it: parts summed, scaled, in the member's dtype and shape."""
    whole = program.is_whole(statement)
    value = val(member)
    value = value[which] if isinstance(value, (tuple, list)) else value
    if value_of(member) is not None:
        return _in_shape(like, out, _sizes(member, region, like))
    if largest_of(member) is not None:
        largest = _compute(like, aten.amax.default, out, [])
        return _compute(like, CONVERT, largest, value.dtype)
    scale = scale_of_pair(member) if is_pair(member) else None
    beside = scale is None or val(scale).device == val(out).device
    of_experts = statement[0] == "across" and region.ends is not None
    if not whole and not of_experts and beside:
        return tile_sums.emit(like, out, scale, value.dtype)
    if of_experts:
        dtype, factor = (value.dtype, scale) if beside else (torch.float32, None)
        total = _compute(like, operators.sum_expert_parts, out, region.ends, program.tile.rows, factor, dtype)
        scale = None if beside else scale
    else:
        total = out if whole else _compute(like, aten.sum.dim_IntList, out, [0])
    if scale is not None:
        total = _compute(like, aten.mul.Tensor, total, scale)
    return total if val(total).dtype == value.dtype else _compute(like, CONVERT, total, value.dtype)


def _compute(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A node with its fake value computed."""
    values = torch.fx.node.map_arg(args, val)
    tensors = [v for v in torch.utils._pytree.tree_leaves(values) if isinstance(v, torch.Tensor)]
    with detect_fake_mode(tensors or [val(like)]):
        return _call(like, target, args, target(*values, **kwargs), kwargs)


def _sizes(node: Node, region: Region, like: Node) -> list[Any]:
    """The sizes of ``node``, a member, with symbols as nodes that hold them and that are not members themselves."""
    if all(isinstance(size, int) for size in shape(node)):
        return list(shape(node))
    pending, seen = [node], {node}
    while pending:
        source = pending.pop()
        if is_row_view(source) and is_call(source, *VIEWS):
            return list(source.args[1])  # type: ignore[arg-type]  # the sizes that the view was made with
        if source not in region.nodes:
            return [
                size if isinstance(size, int) else _call(like, aten.sym_size.int, (source, dim), size)
                for dim, size in enumerate(shape(source))
            ]
        for operand in source.all_input_nodes:
            if operand not in seen and is_tensor(operand) and has_shape(operand, *shape(node)):
                seen.add(operand)
                pending.append(operand)
    raise ValueError(f"no node holds the sizes of {node}")


def _call(like: Node, target: Any, args: tuple[Any, ...], value: Any, kwargs: dict[str, Any] | None = None) -> Node:
    with like.graph.inserting_before(like):
        node = like.graph.call_function(target, args, kwargs or {})
    node.meta.update({name: item for name, item in like.meta.items() if name not in ("val", "tensor_meta", MARK)})
    node.meta["val"] = value
    return node


def _erase(node: Node) -> None:
    """Erase a member and the views and results of it that nobody reads any more."""
    for user in list(node.users):
        if not user.users:
            _erase(user)
    node.graph.erase_node(node)
