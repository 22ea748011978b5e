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

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, detect_fake_mode, stable_topological_sort
from lora_fx.passes.graph import (
    CONVERT,
    COPIES,
    MM,
    aten,
    has_shape,
    is_call,
    is_pointwise,
    is_row_view,
    is_tensor,
    is_transpose,
    peel_views,
    readers,
    shape,
    val,
)
from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.tile_choice import choose
from lora_fx.passes.kernels.tile_program import OUTPUTS, Program, Statement

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
    **{copy: "identity" for copy in COPIES},
}
"""Pointwise operators that a kernel can compute, and their names in programs."""

HALF = (torch.bfloat16, torch.float16)
MARK = "lora_fx_product"
"""Set in the metadata of the matrix products that belong to a LoRA branch."""


@dataclass
class Region:
    """Nodes that become one program: all compute, or read, values of ``columns`` columns."""

    columns: int
    nodes: set[Node] = field(default_factory=set)
    copies: set[Node] = field(default_factory=set)
    """Members that stay in the graph for their other readers: cheaper to compute again than to write and read."""


def cut(graph: Graph) -> Iterator[tuple[Node, Exception]]:
    """Replace every region of ``graph`` by a call of its program; gives each seed where that failed, which stays."""
    taken: set[Node] = set()
    changed = False
    for seed in [node for node in graph.nodes if _columns(node) is not None]:
        if seed in taken or not _has_kernels(seed):
            continue
        try:
            region = _grow(seed, graph)
            taken |= region.nodes
            changed |= _emit(region, graph)
        except Exception as error:
            yield seed, error
    if changed:
        graph.eliminate_dead_code()


def _has_kernels(node: Node) -> bool:
    value = val(node)
    value = value[0] if isinstance(value, (tuple, list)) else value
    return value.device.type == "cuda"


# ---- what a node is to a region --------------------------------------------------------------------------------------


def _columns(node: Node) -> int | None:
    """N of the [M, N] value that one of LoRA's small products makes or reads; None for any other node."""
    if node.op != "call_function" or not _is_half(node):
        return None
    if _makes(node):
        return _static(shape(node)[1])
    value = _reads(node)
    return None if value is None else _static(shape(value)[-1])


def _is_half(node: Node) -> bool:
    value = val(node)
    value = value[0] if isinstance(value, (tuple, list)) and value else value
    return isinstance(value, torch.Tensor) and value.dtype in HALF


def _static(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _makes(node: Node) -> bool:
    """Whether ``node`` is a product of rank R that makes an [M, N] value."""
    if node.target in (operators.scaled_mm, operators.accumulate):
        thin = node.args[0] if node.target is operators.scaled_mm else node.args[1]
        extra = len(node.args) > 3 and node.args[3] is not None and node.target is operators.scaled_mm
        return not extra and _is_thin(thin, 1) and _static(shape(node)[1]) is not None
    return _is_marked(node) and _is_thin(node.args[0], 1) and not _is_thin(node, 1)


def _reads(node: Node) -> Node | None:
    """The [M, N] value that ``node`` multiplies down to rank R (or across, to [R, N]); None if it does not."""
    if node.target is operators.gradient_pair:
        value, factor = node.args[:2]
        return value if is_tensor(factor) and _is_thin(factor, 1) else None  # type: ignore[return-value]
    if not _is_marked(node) or _makes(node):
        return None
    left, right = node.args[:2]
    if _is_thin(right, 1) and is_tensor(left):
        return left  # type: ignore[return-value]  # [M, N] @ [N, R]
    if _is_thin(left, 0) and is_transpose(left) and is_tensor(right):
        return right  # type: ignore[return-value]  # [R, M] @ [M, N]
    return None


def _is_marked(node: Node) -> bool:
    return is_call(node, MM) and bool(node.meta.get(MARK))


MAX_RANK = 128


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
    """Whether ``node`` computes a value of the pass element by element from what a kernel can load."""
    if not isinstance(node, Node) or node.op != "call_function" or node.target not in POINTWISE or node.kwargs.keys() - {"dtype"}:
        return False
    if not (_is_value(node, columns) or _is_condition(node, columns)):
        return False
    if node.target is aten.pow.Tensor_Scalar and not isinstance(node.args[1], (int, float)):
        return False
    return all(_operand_kind(a, node, columns) is not None for a in _operands(node))


def _is_condition(node: Node, columns: int) -> bool:
    return is_tensor(node) and val(node).dtype == torch.bool and has_shape(node, *[None] * (len(shape(node)) - 1), columns)


def _operands(node: Node) -> list[Any]:
    return [node.args[0]] if node.target is CONVERT or node.target in COPIES else list(node.args)


def _operand_kind(operand: Any, node: Node, columns: int) -> str | None:
    """How a pointwise operand broadcasts against ``node``: full, row, column, number or constant; None if it cannot."""
    if isinstance(operand, (int, float)) and not isinstance(operand, bool):
        return "constant"
    if not is_tensor(operand):
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


def _grow(seed: Node, graph: Graph) -> Region:
    """The region around ``seed``: what it makes and reads, and the pointwise operations between."""
    columns = _columns(seed)
    assert columns is not None
    region, order = Region(columns, {seed}), {node: i for i, node in enumerate(graph.nodes)}
    pending = [seed]
    while pending:
        node = pending.pop(0)
        for neighbours in _neighbours(node, region):
            new = neighbours - region.nodes
            if new and _fits(new, region, order):
                region.nodes |= new
                region.copies |= {n for n in new if not _makes(n) and _stays(n, region)}
                pending += new
    _prune(region)
    return region if seed in region.nodes else Region(columns, {seed})


def _neighbours(node: Node, region: Region) -> Iterator[set[Node]]:
    """What could join the region next to ``node``, in sets that make sense together."""
    value = _value_of(node)
    if value is not None and node not in region.copies:
        for user in readers(value):
            # A gradient pair reads what a large product reads as well, so it is in memory, and with sums over rows and
            # over columns a kernel holds too much at once. SwiGLU backward on an H200 (M 8192, N 14336, R 16): 687 us
            # with both pairs in it, 549 in three kernels, sums of parts included.
            if _is_pointwise(user, region.columns) or (
                _columns(user) == region.columns and user.target is not operators.gradient_pair
            ):
                yield {user}
    for source in _sources(node, region.columns):
        if source not in region.nodes and (chain := _producers(source, region)) is not None:
            yield chain


def _producers(source: Node, region: Region) -> set[Node] | None:
    """The nodes that compute a value which the region reads, if the region should compute it itself; or else None.

    Products always: that is what a region is for. Pointwise operations down to what is in memory anyway; but not when
    they need a sum over rows that this graph computes (whose kernel has the operands at hand), nor when the value is
    written to memory for others and has pointwise readers besides.
    """
    found: set[Node] = set()
    pending = [source]
    while pending:
        node = pending.pop()
        if node in found or node in region.nodes:
            continue
        if _makes(node) and _columns(node) == region.columns:
            found.add(node)
        elif _is_pointwise(node, region.columns) and not any(
            _depends_on_sum(a, node, region.columns) for a in _operands(node)
        ):
            if _is_written(node) and any(is_pointwise(r) and r not in region.nodes for r in readers(node)):
                if node is source:
                    return None
                continue
            found.add(node)
            pending += _sources(node, region.columns)
        elif node is source or not _is_written(node):
            return None
    return found


def _is_written(node: Node) -> bool:
    """Whether a value is in memory whatever the region does."""
    return not is_pointwise(node) or any(
        not (is_pointwise(r) or _is_reduction(r) or _columns(r) is not None) for r in readers(node)
    )


def _stays(node: Node, region: Region) -> bool:
    """Whether other kernels go on computing a new member for themselves: nobody has it in memory."""
    others = [r for r in readers(node) if r not in region.nodes]
    return not _is_written(node) and any(is_pointwise(r) or _is_reduction(r) for r in others) and _is_upstream(node, region)


def _is_upstream(node: Node, region: Region) -> bool:
    """Whether nothing that ``node`` is computed from is computed by the region for others as well."""
    pending, seen = [node], {node}
    while pending:
        for source in _sources(pending.pop(), region.columns):
            if source in region.nodes and source not in region.copies:
                return False
            if source not in seen and _is_pointwise(source, region.columns):
                seen.add(source)
                pending.append(source)
    return True


def _is_reduction(node: Node) -> bool:
    return is_call(node, aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.var_mean.correction)


def _value_of(node: Node) -> Node | None:
    """The value that a member of a region has for others: itself, unless it only reads."""
    return node if node.target is not operators.gradient_pair and _reads(node) is None else None


def _sources(node: Node, columns: int) -> list[Node]:
    """The [M, N] values that a member reads, under row views."""
    if node.target is operators.accumulate:
        candidates = [node.args[0]]
    elif (value := _reads(node)) is not None:
        candidates = [value]
    elif _makes(node):
        candidates = []
    else:
        candidates = [a for a in _operands(node) if is_tensor(a) and _operand_kind(a, node, columns) == "full"]
    return [peel_views(c) for c in candidates]


def _depends_on_sum(operand: Any, node: Node, columns: int) -> bool:
    """Whether a row operand is computed in this graph."""
    if _operand_kind(operand, node, columns) != "row":
        return False
    return peel_views(operand).op != "placeholder"


def _fits(new: set[Node], region: Region, order: dict[Node, int]) -> bool:
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


# ---- writing the program ---------------------------------------------------------------------------------------------


class _Writer:
    """Writes the program of a region and collects its inputs."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.inputs: list[Node] = []
        self.kinds: list[list[Any]] = []
        self.body: list[Statement] = []
        self.places: dict[Node, int] = {}
        self.outputs: list[tuple[Node, int]] = []
        """What each output is for: a member, and for a gradient pair which of its two results."""

    def write(self, member: Node) -> None:
        """Append the statements of one member, whose operands have been written."""
        if member.target is operators.scaled_mm:
            self.places[member] = self._product(*member.args[:3])
        elif member.target is operators.accumulate:
            base, thin, factor, scale = (*member.args, None)[:4]
            product = self._product(thin, factor, scale)
            self.places[member] = self._append(["op", "add", [self._operand(base, member), product]])
        elif member.target is operators.gradient_pair:
            value, factor, thin = member.args[:3]
            place = self._operand(value, member)
            self._append(["down", place, self._factor(factor)])
            self._append(["across", place, self._input(thin, ["thin", shape(thin)[1]]), "NR"])
            self.outputs += [(member, 0), (member, 1)]
        elif (value := _reads(member)) is not None:
            left, right = member.args[:2]
            place = self._operand(value, member)
            if value is left:
                self._append(["down", place, self._factor(right)])
            else:
                thin = left.args[0]  # type: ignore[union-attr]  # _reads saw that it is a transpose
                self._append(["across", place, self._input(thin, ["thin", shape(thin)[1]]), "RN"])  # type: ignore[arg-type]
            self.outputs.append((member, 0))
        elif _makes(member):
            self.places[member] = self._product(*member.args[:2], None)
        else:
            self.places[member] = self._pointwise(member)
        if member in self.places and member not in self.region.copies and any(reader not in self.region.nodes for reader in readers(member)):
            dtype = str(val(member).dtype).removeprefix("torch.")
            self._append(["store", self.places[member], dtype])
            self.outputs.append((member, 0))

    def _append(self, statement: Statement) -> int:
        """The place of a statement, which is the old one's where the same value has been computed already."""
        if statement[0] not in OUTPUTS and statement in self.body:
            return self.body.index(statement)
        self.body.append(statement)
        return len(self.body) - 1

    def _input(self, node: Any, kind: list[Any]) -> int:
        for index, (known, its_kind) in enumerate(zip(self.inputs, self.kinds)):
            if known is node and its_kind == kind:
                return index
        self.inputs.append(node)
        self.kinds.append(kind)
        return len(self.inputs) - 1

    def _factor(self, node: Any) -> int:
        """A factor that is used as [N, R] here."""
        order = "NR"
        while is_transpose(node):
            node, order = node.args[0], "RN" if order == "NR" else "NR"
        rank = shape(node)[1 if order == "NR" else 0]
        return self._input(node, ["factor", rank, order])

    def _product(self, thin: Any, factor: Any, scale: Any = None) -> int:
        order = "RN"
        while is_transpose(factor):
            factor, order = factor.args[0], "RN" if order == "NR" else "NR"
        rank = shape(thin)[1]
        return self._append(
            [
                "product",
                self._input(thin, ["thin", rank]),
                self._input(factor, ["factor", rank, order]),
                None if scale is None else self._input(scale, ["number"]),
            ]
        )

    def _operand(self, operand: Any, member: Node) -> Any:
        """The place of an operand's value, loaded when it comes from outside, or a constant."""
        if not isinstance(operand, Node):
            return [float(operand)]
        whole = member if is_tensor(member) and member in self.region.nodes and _value_of(member) is not None else operand
        kind = "full" if whole is operand else _operand_kind(operand, whole, self.region.columns)
        assert kind is not None
        source = peel_views(operand) if kind in ("full", "row") else operand
        if source not in self.places:
            self.places[source] = self._append(["load", self._input(source, [kind])])
        return self.places[source]

    def _pointwise(self, member: Node) -> int:
        if POINTWISE[member.target] == "identity":  # type: ignore[index]
            operand = self._operand(member.args[0], member)
            return operand if isinstance(operand, int) else self._append(["op", "identity", [operand]])
        name = POINTWISE[member.target]  # type: ignore[index]  # _is_pointwise saw that it is there
        operands = [self._operand(a, member) for a in _operands(member)]
        if name == "div" and (x := self._sigmoid_of(operands[1])) is not None and x == operands[0]:
            # silu, as it is decomposed: x / (1 + exp(-x)). Its backward has sigmoid(x) by name.
            name, operands = "mul", [x, self._append(["op", "sigmoid", [x]])]
        return self._append(["op", name, operands])

    def _sigmoid_of(self, denominator: Any) -> Any:
        """The x of ``1 + exp(-x)``."""
        found = denominator
        for name in ("add", "exp", "neg"):
            statement = ["op", ""] if isinstance(found, list) else self.body[found]
            if statement[:2] != ["op", name] or (name == "add" and statement[2][1] != [1.0]):
                return None
            found = statement[2][0]
        return found


def _emit(region: Region, graph: Graph) -> bool:
    """Put the region's program in its place; says whether it did."""
    members = [node for node in graph.nodes if node in region.nodes]
    writer = _Writer(region)
    for member in members:
        writer.write(member)
    rows = _rows(members[0])
    tile = choose(writer.kinds, writer.body, rows, region.columns)
    if tile is None:
        return False
    dtype = next(str(val(n).dtype) for n in writer.inputs if is_tensor(n) and val(n).dtype in HALF).removeprefix("torch.")
    program = Program(region.columns, dtype, writer.kinds, writer.body, tile)
    last = [member for member in members if member not in region.copies][-1]
    outputs = _outputs(program, writer, region, last)
    values = [val(node) for node in outputs]
    operands = {"outputs": outputs, "program": program.dumps(), "inputs": writer.inputs}
    # The wrapper is how Inductor represents a mutation that it may perform in place (accumulate has the same).
    ran = _call(last, auto_functionalized, (operators.tile_,), (None, values), operands)
    written = _call(last, operator.getitem, (ran, 1), values)
    replacements: dict[tuple[Node, int], Node] = {}
    for index, (key, statement) in enumerate(zip(writer.outputs, program.outputs)):
        out = _call(last, operator.getitem, (written, index), values[index])
        member, which = key
        replacements[key] = _finish(last, out, statement, member, which)
    for (member, which), node in replacements.items():
        if member.target is operators.gradient_pair:
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


def _outputs(program: Program, writer: _Writer, region: Region, like: Node) -> list[Node]:
    """Memory for the outputs: fresh, or that of a large product which nobody reads but the region."""
    source = next(node for node, kind in zip(writer.inputs, writer.kinds) if kind[0] in ("full", "thin"))
    rows = _rows_of(source, program.columns)
    if not isinstance(rows, int):
        rows = _row_node(source, like)
    fresh = _compute(like, operators.tile_outputs, program.dumps(), source, rows)
    spare = [n for n, kind in zip(writer.inputs, writer.kinds) if kind == ["full"] and _dies_in(n, region)]
    found = []
    for index, (statement, value) in enumerate(zip(program.outputs, val(fresh))):
        reused = next((n for n in spare if statement[0] == "store" and val(n).dtype == value.dtype), None)
        if reused is not None:
            spare.remove(reused)
        found.append(_call(like, operator.getitem, (fresh, index), value) if reused is None else reused)
    return found


def _dies_in(node: Node, region: Region) -> bool:
    """Whether a matrix was made by this graph for the region alone, so that the region may overwrite it."""
    return (
        is_call(node, MM, aten.addmm.default)
        and len(shape(node)) == 2
        and all(reader in region.nodes - region.copies for reader in readers(node))
    )


def _rows_of(source: Node, columns: int) -> Any:
    value = val(source)
    return value.shape[0] if value.dim() == 2 else value.numel() // columns


def _row_node(source: Node, like: Node) -> Node:
    """The node of M, which is a symbol."""
    matrix = source if len(shape(source)) == 2 else _compute(like, aten.reshape.default, source, [-1, shape(source)[-1]])
    return _compute(like, aten.sym_size.int, matrix, 0)


def _rows(member: Node) -> Any:
    """M, a number or a symbol."""
    value = _reads(member)
    sizes = shape(member if value is None else value)[:-1]
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _finish(like: Node, out: Node, statement: Statement, member: Node, which: int) -> Node:
    """An output in the form that the member's users expect: parts summed, scaled, and in the member's dtype and shape."""
    value = val(member)
    value = value[which] if isinstance(value, (tuple, list)) else value
    if statement[0] == "store":
        if val(out).dim() == value.dim():
            return out
        return _compute(like, aten.reshape.default, out, list(value.shape), sizes_of=member)
    total = _compute(like, aten.sum.dim_IntList, out, [0])
    scale = member.args[3] if member.target is operators.gradient_pair and len(member.args) > 3 else None
    if scale is not None:
        total = _compute(like, aten.mul.Tensor, total, scale)
    return _compute(like, CONVERT, total, value.dtype)


def _compute(like: Node, target: Any, *args: Any, sizes_of: Node | None = None) -> Node:
    """A node with its fake value computed; ``sizes_of`` names the node whose view had the sizes in ``args[1]``."""
    if sizes_of is not None and not all(isinstance(size, int) for size in args[1]):
        args = (args[0], _symbolic_sizes(sizes_of))
    values = torch.fx.node.map_arg(args, val)
    with detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)]):
        return _call(like, target, args, target(*values))


def _symbolic_sizes(node: Node) -> list[Any]:
    """The sizes of ``node`` with symbols as the nodes that hold them."""
    for source in (node, *node.all_input_nodes):
        if is_row_view(source) and has_shape(source, *shape(node)):
            return list(source.args[1])  # type: ignore[arg-type]  # the sizes that the view was made with
    raise ValueError(f"no node holds the sizes of {node}")


def _call(
    like: Node, target: Any, args: tuple[Any, ...], value: Any, kwargs: dict[str, Any] | None = None
) -> Node:
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
