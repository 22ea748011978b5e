"""Finding the low-rank branches of stacks of experts: chains of grouped products, where a linear's are matrix products.

::

    forward    h = _grouped_mm(x, A^T, ends)       down     [M, R]
               u = _grouped_mm(h, B^T, ends)       up       [M, N]
               y = add(base, u * s)                add      [M, N]       base = _grouped_mm(x, W^T, ends)
    backward   t = dy * s
               dB = _grouped_mm(t^T, h, ends)      grad_b   [E, N, R]    or its matrices transposed
               g = _grouped_mm(t, B, ends)         grad_h   [M, R]
               dA = _grouped_mm(g^T, x, ends)      grad_a   [E, R, K]
               dX = _grouped_mm(g, A, ends)        grad_x   [M, K]

M rows, sorted by expert, ``ends`` [E] being the end of each expert's rows; K in, N out, R rank. A rank that the kernels
cannot take comes padded with zeros. Where experts are multiplied one by one, their branches are those of linears, and
``site`` finds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from lora_fx.passes.branch import Branch, Declined, NotASite
from lora_fx.passes.graph import (
    CONVERT,
    COPIES,
    VIEWS,
    Values,
    aten,
    backward_nodes,
    is_call,
    is_tensor,
    module_id,
    module_path,
    parameter_of,
    peel,
    same_shape,
    shape,
    source_of,
    uses,
    val,
)
from lora_fx.passes.site import before_dropout, same_scale, scale_operand, walk_to_add

GROUPED_MM = aten._grouped_mm.default


@dataclass(kw_only=True)
class GroupedSite(Branch):
    """The branch of one stack of experts."""

    ends: Node

    def products(self) -> Iterator[Node]:
        """The grouped products of the branch as they stand in the graph now."""
        for node in (self.down, self.up, self.grad_h, self.grad_b, self.grad_a, self.grad_x):
            if is_call(node, GROUPED_MM):
                assert isinstance(node, Node)
                yield node


def find_grouped_sites(graph: Graph) -> tuple[list[GroupedSite], list[Declined]]:
    """Every branch of experts in graph order, and every one that was left alone with the reason."""
    products = graph.find_nodes(op="call_function", target=GROUPED_MM)
    if not products:
        return [], []
    values, backward = Values(), backward_nodes(graph)
    sites: list[GroupedSite] = []
    declined: list[Declined] = []
    for up in products:
        down = peel(up.args[0])
        if up in backward or not (_is_product(up) and _is_product(down)) or up.args[2] is not down.args[2]:
            continue
        factors = [stack_of(node.args[1]) for node in (down, up)]
        if None in factors:
            if parameter_of(up):  # whoever noted that knows it for a branch
                declined += _computed(up, down)
            continue
        rank = min(shape(factor)[dim] for factor in factors for dim in (1, 2))  # type: ignore[arg-type]  # not None
        sizes = rank, shape(down.args[0])[1], shape(up)[1]
        if not all(isinstance(size, int) for size in sizes):
            continue
        r, k, n = (int(size) for size in sizes)
        try:
            site = _complete(up, down, values, backward, r, k, n)
            _match_backward(site, values, backward)
            if _trains_base(site, values, backward):
                raise NotASite("its base weight is trained as well")
            sites.append(site)
        except NotASite as error:
            declined.append(Declined(_path(up), r, k, n, error.reason, module_id(up)))
    return sites, declined


def _computed(up: Node, down: Node) -> list[Declined]:
    """A branch whose factors are computed by the graph, if its sizes are known."""
    sizes = shape(down)[1], shape(down.args[0])[1], shape(up)[1]  # type: ignore[arg-type]  # products of nodes
    if not all(isinstance(size, int) for size in sizes):
        return []
    r, k, n = map(int, sizes)
    return [Declined(_path(up), r, k, n, "its factors are no inputs of the graph", module_id(up))]


def _path(up: Node) -> str:
    return ".".join(filter(None, (module_path(up), parameter_of(up))))


def _is_product(node: Any) -> bool:
    """Whether ``node`` is a grouped product of rows with matrices, and nothing more."""
    if not is_call(node, GROUPED_MM) or len(shape(node)) != 2:
        return False
    extras = [*node.args[3:], *node.kwargs.values()]
    return len(node.args) >= 3 and isinstance(node.args[2], Node) and all(extra is None for extra in extras)


def stack_of(node: Any) -> Node | None:
    """The input of the graph that a stack of factors is, under transposes, casts and padding; None if it is none."""
    while is_swap(node) or _is_whole_view(node) or is_call(node, *COPIES, CONVERT, aten.constant_pad_nd.default):
        node = node.args[0]
    return node if isinstance(node, Node) and node.op in ("placeholder", "get_attr") and len(shape(node)) == 3 else None


def made_of_stack(node: Any) -> list[Node]:
    """What stands between a stack of factors and the input of the graph that it is, and is not a view."""
    found = []
    while is_swap(node) or _is_whole_view(node) or is_call(node, *COPIES, CONVERT, aten.constant_pad_nd.default):
        found += [node] if is_call(node, CONVERT, aten.constant_pad_nd.default) else []
        node = node.args[0]
    return found


def is_swap(node: Any) -> bool:
    """Whether ``node`` transposes every matrix of a stack."""
    return is_call(node, aten.permute.default) and [d % 3 for d in node.args[1]] == [0, 2, 1] and len(shape(node)) == 3


def _is_whole_view(node: Any) -> bool:
    """Whether ``node`` is a tensor once more, as DTensor's ``to_local`` leaves this rank's experts in a graph."""
    return is_call(node, *VIEWS) and same_shape(node, node.args[0])


def matrices(node: Any) -> tuple[Any, bool]:
    """The stack under transposes and copies, and whether its matrices are transposed."""
    swapped = False
    while is_swap(node) or _is_whole_view(node) or is_call(node, *COPIES):
        swapped ^= is_swap(node)
        node = node.args[0]
    return node, swapped


def _complete(
    up: Node, down: Node, values: Values, backward: set[Node], rank: int, in_features: int, out_features: int
) -> GroupedSite:
    if any(user.op == "output" for user in uses(down)):
        raise NotASite(f"its rank-{rank} activations are returned to the caller")
    add, scaled, scale = walk_to_add(up, backward)
    left, right = add.args[:2]
    base = right if left is scaled else left
    if not (isinstance(base, Node) and is_tensor(base) and same_shape(base, add)):
        raise NotASite("it is added to something of another shape")
    source, dropout = before_dropout(down.args[0])
    product = peel(base)
    if not (_is_product(product) and values.key(product.args[0]) == values.key(source)):
        raise NotASite("what it is added to is not a grouped product of the same input")
    if product.args[2] is not down.args[2]:
        raise NotASite("what it is added to groups its rows in another way")
    if stack_of(product.args[1]) is None:
        raise NotASite("what it is added to is not a product with a parameter")
    if not val(base).dtype == val(scaled).dtype == val(add).dtype == val(up).dtype:
        raise NotASite("the base and the branch are of different types")
    if 2 * rank > min(in_features, out_features):
        raise NotASite(f"rank {rank} is more than half of min({in_features}, {out_features}): merging costs less")
    ends: Any = down.args[2]
    x_key = values.key(down.args[0])
    return GroupedSite(
        *(_path(up), down, up, add, rank, in_features, out_features, x_key, scale, scaled, dropout),
        ends=ends,
        module_id=module_id(up),
    )


def _match_backward(site: GroupedSite, values: Values, backward: set[Node]) -> None:
    """Find dB, g, dA and dX of a site; leaves what is not there as None."""
    gradients = [found for user in uses(site.down) if (found := _as_grad_b(user, site, backward)) is not None]
    if len(gradients) > 1:
        site.notes.append("backward: its rank-R activations have several gradients")
        return
    readers: Iterable[Node] = backward  # B is frozen, or this graph has no backward
    if gradients:
        site.grad_b, scaled_dy, site.grad_b_transposed = gradients[0]
        readers = uses(scaled_dy)
    b, b_swapped = matrices(site.up.args[1])
    candidates = [
        n for n in dict.fromkeys(readers) if _reads(n, site, backward) and matrices(n.args[1]) == (b, not b_swapped)
    ]
    if len(candidates) != 1:
        site.grad_b = None
        return
    (site.grad_h,) = candidates
    if site.scale is not None:
        t = peel(site.grad_h.args[0])
        if not (is_call(t, aten.mul.Tensor) and same_scale(scale_operand(t), site.scale)):
            site.grad_b = site.grad_h = None
            site.notes.append("backward: its gradient is not scaled like its output")
            return
    a, a_swapped = matrices(site.down.args[1])
    for user in uses(site.grad_h):
        if not is_call(user, GROUPED_MM):
            continue
        if peel(user.args[0]) is site.grad_h and matrices(user.args[1]) == (a, not a_swapped):
            site.grad_x = user
        elif len(shape(user)) == 3:
            site.grad_a = user


def _reads(node: Node, site: GroupedSite, backward: set[Node]) -> bool:
    return node in backward and _is_product(node) and node.args[2] is site.ends


def _as_grad_b(user: Node, site: GroupedSite, backward: set[Node]) -> tuple[Node, Node, bool] | None:
    """``user`` as dB = _grouped_mm(t^T, h) or its transpose: returns it, t, and whether it is transposed."""
    if not (is_call(user, GROUPED_MM) and user in backward and len(shape(user)) == 3):
        return None
    left, right = user.args[:2]
    if source_of(right) is site.down:
        return user, source_of(left), False
    return (user, source_of(right), True) if source_of(left) is site.down else None


def output_gradient(site: GroupedSite) -> Node:
    """The gradient of y, [M, N], of a site whose backward half was found."""
    assert site.grad_h is not None
    t = peel(site.grad_h.args[0])
    if site.scale is not None:
        t = peel(t.args[0] if scale_operand(t) is t.args[1] else t.args[1])
    assert isinstance(t, Node)
    return t


def _trains_base(site: GroupedSite, values: Values, backward: set[Node]) -> bool:
    """Whether the base weight gets a gradient: full fine-tuning with a branch, not LoRA."""
    if site.grad_h is None:
        return False
    source, _ = before_dropout(site.down.args[0])
    x = source_of(source)
    return any(
        is_call(user, GROUPED_MM)
        and user in backward
        and len(shape(user)) == 3
        and any(source_of(operand) is x for operand in user.args[:2])
        for user in uses(output_gradient(site))
    )
