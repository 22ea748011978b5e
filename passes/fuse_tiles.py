"""Write the programs of regions (:mod:`lora_fx.passes.tile_regions`) and put them in the regions' places."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import auto_functionalized, detect_fake_mode, inductor_config, stable_topological_sort
from lora_fx.passes.graph import (
    CONVERT,
    MM,
    aten,
    has_shape,
    is_call,
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
from lora_fx.passes.kernels.tile_program import OUTPUTS, Program, Statement, Tile
from lora_fx.passes.site import MARK
from lora_fx.passes.tile_regions import (
    POINTWISE,
    Region,
    columns_of,
    constant_of,
    grow,
    makes,
    operand_kind,
    operands_of,
    reads,
    value_of,
)

Choose = Callable[[list[list[Any]], list[Statement], Any, int], Tile | None]


def cut(graph: Graph, choose: Choose = choose) -> Iterator[tuple[Node, Exception]]:
    """Replace every region of ``graph`` by a call of its program; gives each seed where that failed, which stays.

    ``choose`` gives the tile for a program's input kinds, body, M and N, or None to leave the region alone.
    """
    taken: set[Node] = set()
    changed = False
    for seed in [node for node in graph.nodes if columns_of(node) is not None]:
        if seed in taken or not _has_kernels(seed):
            continue
        before = set(graph.nodes)
        try:
            region = grow(seed, graph)
            taken |= region.nodes
            changed |= _emit(region, graph, choose)
        except Exception as error:
            # Up to the point where it takes the region's place, a program is only new nodes.
            for node in reversed(graph.nodes):
                if node not in before:
                    graph.erase_node(node)
            yield seed, error
    if changed:
        graph.eliminate_dead_code()


def _has_kernels(node: Node) -> bool:
    value = val(node)
    value = value[0] if isinstance(value, (tuple, list)) else value
    return value.device.type == "cuda"


class _Writer:
    """Writes the program of a region and collects its inputs."""

    def __init__(self, region: Region, members: list[Node]) -> None:
        self.region = region
        self.accumulated = _accumulated(region, members)
        """Large products that are added to the result afterwards, where their own kernels can do that."""
        self.absent = set(self.accumulated)
        """What the program therefore does not compute: these products, and sums of nothing else."""
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
            self.places[member] = (
                product
                if peel_views(base) in self.absent
                else self._append(["op", "add", [self._operand(base, member), product]])
            )
        elif member.target is operators.gradient_pair:
            value, factor, thin = member.args[:3]
            place = self._operand(value, member)
            self._append(["down", place, self._factor(factor)])
            self._append(["across", place, self._thin(thin), "NR"])
            self.outputs += [(member, 0), (member, 1)]
        elif (value := reads(member)) is not None:
            left, right = member.args[:2]
            place = self._operand(value, member)
            if value is left:
                self._append(["down", place, self._factor(right)])
            else:
                # reads() saw that it is a transpose.
                self._append(["across", place, self._thin(left.args[0]), "RN"])  # type: ignore[union-attr]
            self.outputs.append((member, 0))
        elif makes(member):
            self.places[member] = self._product(*member.args[:2])
        elif all(is_tensor(a) and peel_views(a) in self.absent for a in operands_of(member)):
            self.absent.add(member)
        else:
            self.places[member] = self._pointwise(member)
        if (
            member in self.places
            and member not in self.region.copies
            and any(reader not in self.region.nodes for reader in readers(member))
        ):
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

    def _thin(self, node: Any) -> int:
        """A matrix [M, R]."""
        return self._input(node, ["thin", shape(node)[1]])

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
        return self._append(
            [
                "product",
                self._thin(thin),
                self._input(factor, ["factor", shape(thin)[1], order]),
                None if scale is None else self._input(scale, ["number"]),
            ]
        )

    def _operand(self, operand: Any, member: Node) -> Any:
        """The place of an operand's value, loaded when it comes from outside, or a constant."""
        if (constant := constant_of(operand)) is not None:
            return [constant]
        whole = (
            member if is_tensor(member) and member in self.region.nodes and value_of(member) is not None else operand
        )
        kind = "full" if whole is operand else operand_kind(operand, whole, self.region.columns)
        assert kind is not None
        source = peel_views(operand) if kind in ("full", "row") else operand
        if source not in self.places:
            self.places[source] = self._append(["load", self._input(source, [kind])])
        return self.places[source]

    def _pointwise(self, member: Node) -> int:
        if POINTWISE[member.target] == "identity":  # type: ignore[index]
            return self._whole(member.args[0], member)
        name = POINTWISE[member.target]  # type: ignore[index]  # _is_pointwise saw that it is there
        rest = [a for a in operands_of(member) if not (is_tensor(a) and peel_views(a) in self.absent)]
        if len(rest) == 1 and name == "add":
            return self._whole(rest[0], member)
        operands = [self._operand(a, member) for a in operands_of(member)]
        if name == "div" and (x := self._sigmoid_of(operands[1])) is not None and x == operands[0]:
            # silu, as it is decomposed: x / (1 + exp(-x)). Its backward has sigmoid(x) by name.
            name, operands = "mul", [x, self._append(["op", "sigmoid", [x]])]
        return self._append(["op", name, operands])

    def _whole(self, value: Any, member: Node) -> int:
        """The place of an operand that is all of a member's value."""
        place = self._operand(value, member)
        return place if isinstance(place, int) else self._append(["op", "identity", [place]])

    def _sigmoid_of(self, denominator: Any) -> Any:
        """The x of ``1 + exp(-x)``."""
        found = denominator
        for name in ("add", "exp", "neg"):
            statement = ["op", ""] if isinstance(found, list) else self.body[found]
            if statement[:2] != ["op", name] or (name == "add" and statement[2][1] != [1.0]):
                return None
            found = statement[2][0]
        return found


def _emit(region: Region, graph: Graph, choose: Choose) -> bool:
    """Put the region's program in its place; says whether it did."""
    members = [node for node in graph.nodes if node in region.nodes]
    writer = _Writer(region, members)
    for member in members:
        writer.write(member)
    rows = _rows(members[0])
    tile = choose(writer.kinds, writer.body, rows, region.columns)
    if tile is None:
        return False
    dtype = next(val(node).dtype for node, kind in zip(writer.inputs, writer.kinds) if kind[0] in ("thin", "factor"))
    program = Program(region.columns, str(dtype).removeprefix("torch."), writer.kinds, writer.body, tile)
    last = [member for member in members if member not in region.copies][-1]
    outputs = _outputs(program, writer, region, last)
    with detect_fake_mode([val(node) for node in outputs]):
        # Values of their own: by their storage Inductor would take them for views of what is mutated.
        values = [torch.empty_like(val(node)) for node in outputs]
    operands = {"outputs": outputs, "program": program.dumps(), "inputs": writer.inputs}
    if val(writer.inputs[0]).device.type == "cuda":
        operators.prepare_tile(program.dumps(), [val(node) for node in writer.inputs], values)
    # The wrapper is how Inductor represents a mutation that it may perform in place (accumulate has the same).
    ran = _call(last, auto_functionalized, (operators.tile_,), (None, values), operands)
    written = _call(last, operator.getitem, (ran, 1), values)
    replacements: dict[tuple[Node, int], Node] = {}
    for index, (key, statement) in enumerate(zip(writer.outputs, program.outputs)):
        out = _call(last, operator.getitem, (written, index), values[index])
        for product in writer.accumulated[:1]:
            out = _accumulate(last, out, product)
        for product in writer.accumulated[1:]:
            out = _compute(last, aten.add.Tensor, out, product)
        member, which = key
        replacements[key] = _finish(last, out, statement, member, which, region)
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


def _accumulated(region: Region, members: list[Node]) -> list[Node]:
    """The large products that enter a region's only result as terms of a sum, the one with most work first.

    The kernel of the first adds it to the result for little: cuBLAS reads what it adds to while it computes. On an H200
    (M 8192, N 4096, K 4096) that is 0 to 4% of 371 us, where reading the product again to add the branch takes 15 us
    and writing the sum as much. And the small term is rounded on the way, instead of the large one. The others are
    left to whatever reads the sum, as they are without LoRA: to accumulate them too rounds the growing sum each time.
    Where Inductor overlaps products with collectives, it has to find them as they are.
    """
    if inductor_config()._micro_pipeline_tp:
        return []
    sums = [node for node in members if not makes(node)]
    results = [n for n in members if any(r not in region.nodes for r in readers(n))]
    plain = not region.copies and len(results) == 1 and all(is_call(n, aten.add.Tensor) for n in sums)
    if not plain or any(len(list(readers(n))) > 1 for n in region.nodes - set(results)):
        return []
    found = [peel_views(a) for n in sums for a in operands_of(n) if is_tensor(a)]
    found += [peel_views(n.args[0]) for n in members if n.target is operators.accumulate]
    terms = [n for n in found if n not in region.nodes]
    dtype = val(results[0]).dtype
    # All of them or none: a sum of the branch with a residual stream would be rounded twice at its full size.
    if all(is_call(n, MM) and _dies_in(n, region) and val(n).dtype == dtype for n in terms):
        return sorted(terms, key=_inner, reverse=True)
    return []


def _inner(product: Node) -> int:
    """The size that a product sums over; 0 where it is not known."""
    size = shape(product.all_input_nodes[0])[1]
    return size if isinstance(size, int) else 0


def _accumulate(like: Node, base: Node, product: Node) -> Node:
    """``base`` with a large product added to it, in place if Inductor agrees."""
    with detect_fake_mode([val(base)]):
        value = torch.empty_like(val(base))
    a, b = product.args[:2]
    operands = {"base": base, "a": a, "b": b, "scale": None}
    wrapper = _call(like, auto_functionalized, (operators.accumulate_,), (None, value), operands)
    return _call(like, operator.getitem, (wrapper, 1), value)


def _outputs(program: Program, writer: _Writer, region: Region, like: Node) -> list[Node]:
    """Memory for the outputs: fresh, or that of a large product which nobody reads but the region."""
    source = next(node for node, kind in zip(writer.inputs, writer.kinds) if kind[0] in ("full", "thin"))
    rows = val(source).numel() // shape(source)[-1]
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
        and node not in region.nodes
    )


def _row_node(source: Node, like: Node) -> Node:
    """The node of M, which is a symbol."""
    matrix = (
        source if len(shape(source)) == 2 else _compute(like, aten.reshape.default, source, [-1, shape(source)[-1]])
    )
    return _compute(like, aten.sym_size.int, matrix, 0)


def _rows(member: Node) -> Any:
    """M, a number or a symbol."""
    value = reads(member)
    sizes = shape(member if value is None else value)[:-1]
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _finish(like: Node, out: Node, statement: Statement, member: Node, which: int, region: Region) -> Node:
    """An output as the member's users expect it: parts summed, scaled, in the member's dtype and shape."""
    value = val(member)
    value = value[which] if isinstance(value, (tuple, list)) else value
    if statement[0] == "store":
        if val(out).dim() == value.dim():
            return out
        return _compute(like, aten.reshape.default, out, _sizes(member, region, like))
    total = _compute(like, aten.sum.dim_IntList, out, [0])
    scale = member.args[3] if member.target is operators.gradient_pair and len(member.args) > 3 else None
    if scale is not None:
        total = _compute(like, aten.mul.Tensor, total, scale)
    return _compute(like, CONVERT, total, value.dtype)


def _compute(like: Node, target: Any, *args: Any) -> Node:
    """A node with its fake value computed."""
    values = torch.fx.node.map_arg(args, val)
    with detect_fake_mode([v for v in values if isinstance(v, torch.Tensor)]):
        return _call(like, target, args, target(*values))


def _sizes(node: Node, region: Region, like: Node) -> list[Any]:
    """The sizes of ``node``, a member, with symbols as nodes that hold them and that are not members themselves."""
    if all(isinstance(size, int) for size in shape(node)):
        return list(shape(node))
    pending, seen = [node], {node}
    while pending:
        source = pending.pop()
        if is_row_view(source):
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
