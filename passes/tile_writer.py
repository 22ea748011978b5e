"""Write the program of a region, statement by statement, and collect what it reads."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from lora_fx.passes.graph import (
    aten,
    is_call,
    is_tensor,
    is_transpose,
    peel_views,
    readers,
    shape,
    val,
)
from lora_fx.passes.grouped_site import GROUPED_MM, is_swap
from lora_fx.passes.kernels import grouped, operators, tile_choice
from lora_fx.passes.kernels.operators import beta_for
from lora_fx.passes.kernels.tile_program import OUTPUTS, Statement
from lora_fx.passes.tile_nodes import (
    POINTWISE,
    bias_of,
    constant_of,
    ends_of,
    gradients_of,
    is_pair,
    largest_of,
    makes,
    operand_kind,
    operands_of,
    reads,
    value_of,
)
from lora_fx.passes.tile_regions import Region
from lora_fx.passes.tile_terms import accumulated


class Writer:
    """Writes the program of a region and collects its inputs."""

    def __init__(self, region: Region, members: list[Node], rows: Any) -> None:
        self.region = region
        self.few_launches = isinstance(rows, int) and rows <= tile_choice.MOST_FOR_LAUNCHES
        self.accumulated = accumulated(region, members)
        """Large products that are added to the result afterwards, where their own kernels can do that."""
        self.absent = set(self.accumulated)
        """What the program therefore does not compute: these products, and sums of nothing else."""
        self.inputs: list[Node] = []
        self.kinds: list[list[Any]] = []
        self.body: list[Statement] = []
        self.places: dict[Node, int] = {}
        self.outputs: list[tuple[Node, int]] = []
        """What each output is for: a member, and for a gradient pair which of its two results."""
        for product in self.accumulated[:1]:
            # A kernel that adds itself to a matrix adds no bias: all that is here of such a product is its bias.
            if (bias := bias_of(product)) is not None:
                self.absent.remove(product)
                self.places[product] = self._append(["load", self._input(bias, ["column"])])

    def write(self, member: Node) -> None:
        """Append the statements of one member, whose operands have been written."""
        if (ends := ends_of(member)) is not None:
            self._input(ends, ["ends", shape(ends)[0]])
        if member.target is operators.scaled_mm:
            self.places[member] = self._product(*member.args[:3])
        elif member.target is grouped.grouped_scaled_mm:
            self.places[member] = self._product(*member.args[:2], *member.args[3:])
        elif member.target is operators.accumulate:
            base, thin, factor, scale = (*member.args, None)[:4]
            product = self._product(thin, factor, scale)
            self.places[member] = (
                product
                if peel_views(base) in self.absent
                else self._append(["op", "add", [self._operand(base, member), product]])
            )
        elif is_pair(member):
            value, factor, thin = member.args[:3]
            place, read = self._operand(value, member), gradients_of(member)
            if 0 in read:
                self._append(["down", place, self._factor(factor)])
            if 1 in read:
                self._append(["across", place, self._thin(thin), "NR"])
            self.outputs += [(member, which) for which in sorted(read)]
        elif (value := reads(member)) is not None:
            left, right = member.args[:2]
            place = self._operand(value, member)
            if value is left:
                self._append(["down", place, self._factor(right)])
            else:
                # reads() saw that it is a transpose.
                self._append(["across", place, self._thin(left.args[0]), "RN"])  # type: ignore[union-attr]
            self.outputs.append((member, 0))
        elif (value := largest_of(member)) is not None:
            self._append(["largest", self._operand(peel_views(value).args[0], peel_views(value))])
            self.outputs.append((member, 0))
        elif makes(member):
            self.places[member] = self._product(*member.args[:2])
        elif member.target is operators.keep:
            seed, _, p = member.args
            self.places[member] = self._append(["keep", self._input(seed, ["seed"]), p])
        elif all(is_tensor(a) and peel_views(a) in self.absent for a in operands_of(member)):
            self.absent.add(member)
        else:
            self.places[member] = self._pointwise(member)
        if (
            member in self.places
            and member not in self.region.copies
            and any(reader not in self.region.nodes for reader in readers(member))
        ):
            place = self.places[member]
            if self.accumulated and (beta := beta_for(val(member).dtype)) != 1.0:
                place = self._append(["op", "mul", [place, [1.0 / beta]]])
            dtype = str(val(member).dtype).removeprefix("torch.")
            self._append(["store", place, dtype])
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

    def _factor(self, node: Any, order: str = "NR") -> int | list[int]:
        """A factor, which is used as [N, R] here if it is in the order "NR", or those of which it is a stack."""
        while is_transpose(node) or is_swap(node):
            node, order = node.args[0], "RN" if order == "NR" else "NR"
        if order == "RN" and self.few_launches and _is_stack(node):
            return [self._input(each, ["factor", shape(each)[0], order]) for each in node.args[0]]
        experts, rank = shape(node)[:-2], shape(node)[-1 if order == "NR" else -2]
        return self._input(node, ["factor", rank, order, *experts])

    def _product(self, thin: Any, factor: Any, scale: Any = None) -> int:
        parts = _parts_of(thin)
        left = self._thin(thin) if parts is None else self._input(*parts)
        return self._append(["product", left, self._factor(factor, "RN"), self._scale(scale)])

    def _scale(self, scale: Any) -> int | list[int] | None:
        """A number, or two whose product nobody else needs: to multiply them is a launch."""
        if scale is None:
            return None
        if is_call(scale, aten.mul.Tensor) and all(makes(user) for user in scale.users):
            factors = [a for a in scale.args if is_tensor(a) and shape(a) == () and val(a).device == val(scale).device]
            if len(factors) == 2:
                return [self._input(each, ["number"]) for each in factors]
        return self._input(scale, ["number"])

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
            wide = kind == "full" and val(source).dtype.itemsize > 2
            # With the same ends, as what is computed of rows of nobody is looked at as one.
            ends = source.args[2:3] if kind == "full" and is_call(source, GROUPED_MM) else ()
            of_experts = ends == (self.region.ends,) and self.region.ends is not None
            what = [kind, *["wide"] * wide, *["grouped"] * of_experts]
            self.places[source] = self._append(["load", self._input(source, what)])
        return self.places[source]

    def _pointwise(self, member: Node) -> int:
        if POINTWISE[member.target] == "identity":  # type: ignore[index]
            return self._whole(member.args[0], member)
        name = POINTWISE[member.target]  # type: ignore[index]  # can_compute saw that it is there
        rest = [a for a in operands_of(member) if not (is_tensor(a) and peel_views(a) in self.absent)]
        if len(rest) == 1 and name == "add":
            return self._whole(rest[0], member)
        operands = [self._operand(a, member) for a in operands_of(member)]
        if name == "div" and (x := self._sigmoid_of(operands[1])) is not None and x == operands[0]:
            # silu, as it is decomposed: x / (1 + exp(-x)). Its backward has sigmoid(x) by name, in torch 2.13.
            name, operands = "mul", [x, self._append(["op", "sigmoid", [x]])]
        if name == "reciprocal" and (x := self._sigmoid_of(operands[0])) is not None:
            # Its backward, as torch 2.11 decomposes it: 1.0 / (1 + exp(-x)), and that is reciprocal(1 + exp(-x)) * 1.0.
            name, operands = "sigmoid", [x]
        if name == "mul":
            if (
                operands[1] == [1.0]
                and isinstance(operands[0], int)
                and self.body[operands[0]][:2] == ["op", "sigmoid"]
            ):
                return operands[0]
            operands = self._scaled_mask(operands)
        return self._append(["op", name, operands])

    def _scaled_mask(self, operands: list[Any]) -> list[Any]:
        """``(mask * x) * c`` as ``x * (mask * c)``: the same number for one multiplication, as a mask is 0 or 1."""
        found, constant = operands
        if isinstance(found, int) and isinstance(constant, list) and self.body[found][:2] == ["op", "mul"]:
            mask, x = self.body[found][2]
            if isinstance(mask, int) and self.body[mask][0] == "keep" and isinstance(x, int):
                return [x, self._append(["op", "mul", [mask, constant]])]
        return operands

    def finish(self) -> None:
        """Take out the statements and the inputs that nothing reads, when all members are written."""
        needed: set[int] = set()
        for place, (kind, *rest) in reversed(list(enumerate(self.body))):
            if kind in OUTPUTS:
                needed |= {place, rest[0]}
            elif kind == "op" and place in needed:
                needed |= {operand for operand in rest[1] if isinstance(operand, int)}
        places = {old: i for i, old in enumerate(sorted(needed))}
        kept = [self.body[old] for old in places]
        ends = {i for i, kind in enumerate(self.kinds) if kind[0] == "ends"}
        read = sorted({index for statement in kept for index in _inputs_of(statement)} | ends)
        inputs = {old: i for i, old in enumerate(read)}
        self.inputs, self.kinds = [self.inputs[old] for old in inputs], [self.kinds[old] for old in inputs]
        self.body = [_renumbered(statement, places, inputs) for statement in kept]

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


def _inputs_of(statement: Statement) -> list[int]:
    """The inputs that a statement reads, each as often as it does."""
    kind, *rest = statement
    named = {"load": rest[:1], "keep": rest[:1], "product": rest, "down": rest[1:2], "across": rest[1:2]}.get(kind, [])
    return [index for each in named for index in (each if isinstance(each, list) else [] if each is None else [each])]


def _renumbered(statement: Statement, places: dict[int, int], inputs: dict[int, int]) -> Statement:
    def of(index: int | list[int] | None) -> int | list[int] | None:
        return [inputs[each] for each in index] if isinstance(index, list) else None if index is None else inputs[index]

    kind, *rest = statement
    if kind == "op":
        return [kind, rest[0], [operand if isinstance(operand, list) else places[operand] for operand in rest[1]]]
    if kind in ("down", "across"):
        return [kind, places[rest[0]], of(rest[1]), *rest[2:]]
    if kind in OUTPUTS:
        return [kind, places[rest[0]], *rest[1:]]
    if kind == "product":
        return [kind, *map(of, rest)]
    return [kind, of(rest[0]), *rest[1:]]


def _is_stack(node: Any) -> bool:
    """Whether a factor [R, N] is the factors of siblings below one another, each of them in memory as it is."""
    if (
        not is_call(node, aten.cat.default)
        or len(shape(node)) != 2
        or (*node.args, 0)[1] != 0
        or len(set(node.args[0])) < 2
    ):
        return False
    return all(val(each).is_contiguous() and val(each).dtype == val(node).dtype for each in node.args[0])


MOST_PARTS = 64
"""The most parts that a program which reads their sum adds up itself."""


def _parts_of(thin: Any) -> tuple[Node, list[Any]] | None:
    """The parts that a matrix [M, R] is the sum of, or is columns of the sum of, and what kind of input they are.

    If nothing but products reads the sum, and there are few rows: each program adds up what it needs, which is little
    for one and takes no launch.
    """
    node, start = thin, 0
    if is_call(node, aten.slice.Tensor) and node.args[1] == 1 and len(node.args) < 5:
        node, start = node.args[0], node.args[2]
    source: Any = node.args[0] if is_call(node, operator.getitem) else None
    if not is_call(source, operators.sum_parts) or source.args[1] != [None]:
        return None
    parts = source.args[0][0]
    sizes = shape(parts)
    if len(sizes) != 3 or not all(isinstance(size, int) for size in sizes):
        return None
    count, rows, whole = sizes
    if rows >= tile_choice.FEW_ROWS or count > MOST_PARTS:
        return None
    users = [user for each in node.users for user in (each.users if is_call(each, aten.slice.Tensor) else [each])]
    if not all(makes(user) for user in users):
        return None
    return parts, ["parts", shape(thin)[1], count, start, whole]
