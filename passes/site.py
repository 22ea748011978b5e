"""Finding LoRA sites in a joint graph.

A site is one low-rank branch together with the linear that it adapts, forward and (where the graph has it) backward::

    forward    h = mm(x, A^T)          down     [M, R]
               u = mm(h, B^T)          up       [M, N]
               y = add(base, u * s)    add      [M, N]       base = mm | addmm | scaled_mm | anything that multiplies x
    backward   t = dy * s
               dB = mm(t^T, h)         grad_b   [N, R]
               g = mm(t, B)            grad_h   [M, R]
               dA = mm(g^T, x)         grad_a   [R, K]
               dX = mm(g, A)           grad_x   [M, K]

M tokens, K in, N out, R rank. The search is rooted at the low-rank side, so it does not care what the base is made of;
that the base is a product of the same ``x`` is then proved, because an ordinary pair of small matrix products that
happens to be added to something is not ours to touch.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes.branch import Branch, Declined, NotASite, Scale
from lora_fx.passes.graph import (
    MM,
    Values,
    aten,
    backward_nodes,
    before_choice,
    has_shape,
    is_call,
    is_row_view,
    is_sum,
    is_tensor,
    module_id,
    module_path,
    parameter_of,
    peel,
    root,
    same_shape,
    shape,
    source_of,
    transposed,
    uses,
    val,
)

MARK = "lora_fx_product"
"""In the metadata of the matrix products that were proved to be part of a LoRA branch."""


@dataclass
class Site(Branch):
    """The branch of one linear."""

    grad_a_transposed: bool = False
    piece: Node | None = None
    """What dA is computed from in place of ``x``: the part of its rows that this rank had before it was gathered."""
    gathered_x: Any = None
    """``x``, where h is computed from such a part: what the base multiplies."""
    scattered_h: Node | None = None
    """h of this rank's rows, summed over the ranks, where it is scattered with the output."""
    scattered: Any = None
    """How, a `lora_fx.passes.shared_rows.Shared`."""

    @property
    def x(self) -> Any:
        """The input matrix [M, K] as it stands in the graph now, also where siblings take slices of one product."""
        if self.gathered_x is not None:
            return self.gathered_x
        down: Any = self.down
        while is_call(down, aten.slice.Tensor):
            down = down.args[0]
        return down.args[0]

    @property
    def has_backward(self) -> bool:
        """Whether the gradients of both factors were found."""
        return self.grad_b is not None and self.grad_h is not None

    def products(self) -> Iterator[Node]:
        """The matrix products of the branch as they stand in the graph now, under the slices that siblings take."""
        for node in (self.down, self.up, self.grad_h, self.grad_b, self.grad_a, self.grad_x):
            while is_call(node, aten.slice.Tensor, aten.permute.default):
                node = node.args[0]  # type: ignore[assignment,union-attr]  # the tensor that is sliced
            if is_call(node, MM):
                assert isinstance(node, Node)
                yield node


def find_sites(graph: Graph) -> tuple[list[Site], list[Declined]]:
    """Every LoRA site of ``graph`` in graph order, and every low-rank branch that was left alone with the reason."""
    values, backward = Values(), backward_nodes(graph)
    sites: list[Site] = []
    declined: list[Declined] = []
    for up in graph.find_nodes(op="call_function", target=MM):
        if up in backward:
            continue
        chosen_from, chosen = before_choice(up.args[0])
        down = peel(chosen_from)
        if not (is_call(down, MM) and _is_parameter(down.args[1]) and _is_parameter(up.args[1])):
            continue
        if root(down.args[1]) is root(up.args[1]):
            continue  # a linear that is applied to its own output
        sizes = shape(down)[1], shape(down.args[0])[1], shape(up)[1]
        if not all(isinstance(size, int) for size in sizes):
            continue
        rank, in_features, out_features = (int(size) for size in sizes)
        try:
            if chosen and backward:
                raise NotASite("its rows use different adapters, which is rewritten for inference alone", proved=True)
            site = _complete(up, down, values, backward, rank, in_features, out_features)
            # Scales and choice act on h already, which is all that there is to do where the sum is the reader's.
            site.forward_rewrites += ["rows"] * chosen
            sites.append(site)
        except NotASite as error:
            # Two linears in a row are common in models without LoRA: only what one module computed, or what is added
            # to a product of the same input, is worth a line in the report.
            if error.proved or module_path(up) == module_path(down):
                where = _path(up, down)
                declined.append(Declined(where, rank, in_features, out_features, error.reason, module_id(up)))
    for site in sites:
        _match_backward(site, values, backward)
    return _drop_trained_bases(sites, declined, values, backward)


def _is_parameter(node: Any) -> bool:
    """A factor must be an input of the graph (through casts and transposes) or the result of a collective on one.

    Or one matrix of a stack that is: experts that are multiplied one by one.
    """
    source = root(node)
    if is_call(source, aten.select.int):
        source = root(source.args[0])
    elif is_call(source, operator.getitem) and is_call(source.args[0], aten.unbind.int):
        source = root(source.args[0].args[0])
    while isinstance(source, Node) and "wait_tensor" in str(source.target):
        source = root(root(source.args[0]).args[0])
    return isinstance(source, Node) and source.op in ("placeholder", "get_attr")


def _path(up: Node, down: Node) -> str:
    """The module of a branch: of both products, or what is common to the modules that hold one factor each."""
    pairs = zip(module_path(up).split("."), module_path(down).split("."), strict=False)
    common = ".".join(left for left, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return ".".join(filter(None, (common, parameter_of(up))))


def _complete(
    up: Node, down: Node, values: Values, backward: set[Node], rank: int, in_features: int, out_features: int
) -> Site:
    """Walk from the up-projection to the add, and prove that what it is added to is a product of the same input."""
    if any(user.op == "output" for user in uses(down)):
        raise NotASite(f"its rank-{rank} activations are returned to the caller")
    add, scaled, scale = walk_to_add(up, backward)
    left, right = add.args[:2]
    base = right if left is scaled else left
    if not (isinstance(base, Node) and is_tensor(base) and same_shape(base, add)):
        raise NotASite("it is added to something of another shape")
    source, dropout = before_dropout(down.args[0])
    if not _is_product_of(base, root(source)):
        raise NotASite("what it is added to is not a matrix product of the same input")
    if not val(base).dtype == val(scaled).dtype == val(add).dtype == val(up).dtype:
        names = [str(val(n).dtype).removeprefix("torch.") for n in (base, up)]
        reason = f"the base is {names[0]} and the branch {names[1]}: give the adapters the dtype of the base's output"
        raise NotASite(reason, proved=True)
    if 2 * rank > min(in_features, out_features):
        _, chosen = before_choice(up.args[0])
        size = f"rank {rank} is more than half of min({in_features}, {out_features})"
        reason = f"{size} for all adapters of the rows together" if chosen else f"{size}: merging costs less"
        raise NotASite(reason, proved=True)
    x_key = values.key(down.args[0])
    return Site(
        *(_path(up, down), down, up, add, rank, in_features, out_features, x_key, scale, scaled, dropout),
        module_id=module_id(up),
    )


def walk_to_add(up: Node, backward: set[Node]) -> tuple[Node, Node, Scale | None]:
    """From ``up`` through views and one scale to the add: returns the add, its operand, and the scale."""
    node, scale = up, None
    while True:
        users = [user for user in node.users if user not in backward]
        if len(users) != 1:
            raise NotASite(f"its product has {len(users)} readers, where the sum with the base should be the only one")
        (user,) = users
        found = _scale_of(user, node) if scale is None and is_call(user, aten.mul.Tensor) else None
        if not (is_row_view(user) or is_sum(user) or found is not None):
            raise NotASite(f"its product goes into {_name(user)}, not into a sum with the base")
        if len(node.users) > 1:
            raise NotASite("the backward pass reads its product" if found is None else "its scale is trained")
        if is_sum(user):
            return user, node, scale
        node = user
        scale = scale if found is None else found


def _scale_of(mul: Node, product: Node) -> Scale | None:
    """The other factor of ``mul`` when it is a number or a 0-d tensor."""
    left, right = mul.args[:2]
    other = right if left is product else left
    if isinstance(other, (int, float)) and not isinstance(other, bool):
        return other
    if isinstance(other, Node) and is_tensor(other) and shape(other) == ():
        return other
    return None


def before_dropout(x: Any) -> tuple[Any, bool]:
    """The value that dropout was applied to, and whether there was dropout: ``mul(mul(gt(rand), x), 1 / (1 - p))``.

    Under autocast the result is cast afterwards.
    """
    node = root(x)
    if is_call(node, aten.mul.Tensor) and is_call(inner := root(node.args[0]), aten.mul.Tensor):
        for mask, value in (inner.args[:2], inner.args[1::-1]):
            if is_call(root(mask), aten.gt.Scalar) and is_tensor(value):
                return value, True
    if is_call(node, operator.getitem) and is_call(node.args[0], aten.native_dropout.default):
        return node.args[0].args[0], True
    return x, False


_PRODUCT_WORDS = ("mm", "matmul", "linear")
# Between an input and the product of its quantised form stand only casts, clamps, roundings and multiplications by
# scales. One of these on the way means that the product reads another activation, not a form of the same one.
_NONLINEAR = frozenset(
    {
        "sigmoid",
        "tanh",
        "erf",
        "exp",
        "relu",
        "gelu",
        "silu",
        "rsqrt",
        "sin",
        "cos",
        "native_layer_norm",
        "_fused_rms_norm",
    }
)
_SEARCH_LIMIT = 128


def _is_product_of(base: Node, source: Node) -> bool:
    """Whether ``base`` is a (scaled, biased, cast, accumulated) matrix product of the value with root ``source``."""
    pending, seen = [base], {base}
    while pending and len(seen) < _SEARCH_LIMIT:
        node = pending.pop()
        operands = [operand for operand in node.all_input_nodes if is_tensor(operand) and operand not in seen]
        if _is_matmul(node):
            if any(_reads(operand, source) for operand in node.all_input_nodes):
                return True
        elif node.op == "call_function":
            seen.update(operands)
            pending.extend(operands)
    return False


def _reads(operand: Node, source: Node) -> bool:
    """Whether ``operand`` is the value whose root is ``source``, or a quantised or fake-quantised form of it."""
    pending, seen, found = [operand], {operand}, False
    while pending:
        node = pending.pop()
        if root(node) is source:
            found = True
        elif node.op == "call_function" and not _is_matmul(node):
            if _op_name(node) in _NONLINEAR or len(seen) > _SEARCH_LIMIT:
                return False
            operands = [operand for operand in node.all_input_nodes if operand not in seen]
            seen.update(operands)
            pending.extend(operands)
    return found


def _op_name(node: Node) -> str:
    target = node.target
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else _name(node)


def _is_matmul(node: Node) -> bool:
    return node.op == "call_function" and any(word in _op_name(node) for word in _PRODUCT_WORDS)


def _name(node: Node) -> str:
    if node.op != "call_function":
        return "the caller" if node.op == "output" else node.op
    return str(node.target)


def _match_backward(site: Site, values: Values, backward: set[Node]) -> None:
    """Find dB, g, dA and dX of a site; leaves what is not there as None."""
    candidates = [found for user in uses(site.down) if (found := _as_grad_b(user, site, backward)) is not None]
    if len(candidates) > 1:
        site.notes.append("backward: its rank-R activations have several gradients")
        return
    if candidates:
        site.grad_b, scaled_dy, site.grad_b_transposed = candidates[0]
        readers: Iterable[Node] = uses(scaled_dy)
    else:
        # B is frozen, or this graph has no backward.
        readers = (user for user in uses(source_of(site.up.args[1])) if user in backward)
    b_key = transposed(values.key(site.up.args[1]))
    grad_h = {n for n in readers if is_call(n, MM) and n in backward and values.key(n.args[1]) == b_key}
    if len(grad_h) != 1:
        site.grad_b = None
        return
    (site.grad_h,) = grad_h
    t = peel(site.grad_h.args[0])
    if site.scale is not None and not (is_call(t, aten.mul.Tensor) and same_scale(scale_operand(t), site.scale)):
        site.grad_b = site.grad_h = None
        site.notes.append("backward: its gradient is not scaled like its output")
        return
    a_key, x_key = transposed(values.key(site.down.args[1])), values.key(site.x)
    for user in uses(site.grad_h):
        if not is_call(user, MM):
            continue
        left, right = values.key(user.args[0]), values.key(user.args[1])
        if peel(user.args[0]) is site.grad_h and right == a_key:
            site.grad_x = user
        elif right == x_key and source_of(user.args[0]) is site.grad_h:
            site.grad_a = user
        elif left == transposed(x_key) and source_of(user.args[1]) is site.grad_h:
            site.grad_a, site.grad_a_transposed = user, True


def _as_grad_b(user: Node, site: Site, backward: set[Node]) -> tuple[Node, Node, bool] | None:
    """``user`` as dB = mm(t^T, h) or its transpose mm(h^T, t): returns it, t, and whether it is transposed."""
    if not (is_call(user, MM) and user in backward):
        return None
    left, right = user.args[:2]
    if source_of(right) is site.down and has_shape(user, site.out_features, None):
        return user, source_of(left), False
    if source_of(left) is site.down and has_shape(user, None, site.out_features):
        return user, source_of(right), True
    return None


def scale_operand(mul: Node) -> Any:
    """The operand of a multiplication that is a number or a 0-d tensor, or None."""
    return next((a for a in reversed(mul.args[:2]) if not is_tensor(a) or shape(a) == ()), None)  # type: ignore[arg-type]


def same_scale(a: Any, b: Any) -> bool:
    if isinstance(a, Node) and isinstance(b, Node):
        return root(a) is root(b)
    return not isinstance(a, Node) and not isinstance(b, Node) and bool(a == b)


def _drop_trained_bases(
    sites: list[Site], declined: list[Declined], values: Values, backward: set[Node]
) -> tuple[list[Site], list[Declined]]:
    """Leave alone the sites whose base weight gets a gradient: full fine-tuning with a branch, not LoRA."""
    kept = []
    for site in sites:
        if any(_is_weight_grad(user, site, values, backward) for user in uses(_output_gradient(site))):
            declined.append(
                Declined(
                    *(site.path, site.rank, site.in_features, site.out_features),
                    reason="its base weight is trained as well",
                    module_id=site.module_id,
                )
            )
        else:
            kept.append(site)
    return kept, declined


def _output_gradient(site: Site) -> Node:
    """The gradient of y under its views (any node without readers when the graph has no backward)."""
    if site.grad_h is None:
        return site.up
    t = peel(site.grad_h.args[0])
    if site.scale is not None:
        t = peel(t.args[0] if scale_operand(t) is t.args[1] else t.args[1])
    assert isinstance(t, Node)
    return t


def _is_weight_grad(user: Node, site: Site, values: Values, backward: set[Node]) -> bool:
    """Whether ``user`` is mm(dy^T, x) [N, K] or its transpose."""
    if not (is_call(user, MM) and user in backward):
        return False
    source, _ = before_dropout(site.x)
    x_key, n, k = values.key(source), site.out_features, site.in_features
    left, right = values.key(user.args[0]), values.key(user.args[1])
    return (right == x_key and has_shape(user, n, k)) or (left == transposed(x_key) and has_shape(user, k, n))
