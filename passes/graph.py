"""How the passes read an ATen graph: which nodes are views, which values are equal, what a matrix is.

Nothing here changes a graph. Two nodes that hold the same value under different names are common before common
subexpression elimination (every linear has its own ``view(x)``, and under autocast its own cast of ``x``), so operands
are compared by :meth:`Values.key`, not by identity.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import statically_known_true

aten = torch.ops.aten
prims = torch.ops.prims

MM = aten.mm.default
VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
GATHERS = (aten.index.Tensor, aten.index_select.default, aten.gather.default)
"""Elements of another value, by their places: Inductor computes them in the kernel that reads them."""

COPIES = frozenset({aten.clone.default, aten.alias.default, aten.detach.default})
CONVERT = prims.convert_element_type.default

Key: TypeAlias = Any
"""A hashable name for a value; equal keys mean equal values (up to how leading dimensions are grouped)."""


def is_call(node: object, *targets: Callable[..., Any]) -> bool:
    """Whether ``node`` calls one of ``targets``."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def val(node: Node) -> Any:
    """The fake value of a node: a tensor, a symbolic number, or a tuple of them."""
    return node.meta["val"]


def shape(node: Node) -> tuple[int | torch.SymInt, ...]:
    """The shape of a node that holds one tensor."""
    return tuple(val(node).shape)


def is_tensor(node: object) -> bool:
    """Whether ``node`` is a graph node that holds one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def same_shape(a: Node, b: Node) -> bool:
    """Whether two nodes have the same shape, without adding a guard on a symbolic one."""
    left, right = shape(a), shape(b)
    return len(left) == len(right) and all(statically_known_true(m == n) for m, n in zip(left, right, strict=True))


def same_count(a: Node, b: Node) -> bool:
    """Whether two nodes have as many elements, without adding a guard on a symbolic size."""
    return bool(statically_known_true(val(a).numel() == val(b).numel()))


def has_shape(node: Node, *sizes: int | torch.SymInt | None) -> bool:
    """Whether a node has these sizes (None for any), without adding a guard on a symbolic one."""
    return len(shape(node)) == len(sizes) and all(
        theirs is None or statically_known_true(ours == theirs) for ours, theirs in zip(shape(node), sizes, strict=True)
    )


def is_row_view(node: object) -> bool:
    """Whether ``node`` only regroups leading dimensions, ``[B, T, K] <-> [B * T, K]``, or is a slice of everything.

    DTensor (torch 2.13) cuts what it has gathered to the size that it has, where that is a number above 256: it asks
    whether the two are one object.
    """
    if not (is_call(node, *VIEWS, aten.slice.Tensor) and isinstance(node, Node)):
        return False
    source = node.args[0]
    if not (is_tensor(source) and isinstance(source, Node)):
        return False
    if node.target is aten.slice.Tensor:
        return same_shape(node, source)
    ours, theirs = shape(node), shape(source)
    return len(ours) >= 2 and len(theirs) >= 2 and bool(statically_known_true(ours[-1] == theirs[-1]))


def is_sum(node: object) -> bool:
    """Whether ``node`` adds two different nodes, unscaled."""
    if not (isinstance(node, Node) and is_call(node, aten.add.Tensor)):
        return False
    left, right = node.args[:2]
    unscaled = bool(node.kwargs.get("alpha", 1) == 1)
    return unscaled and isinstance(left, Node) and isinstance(right, Node) and left is not right


def is_transpose(node: object) -> bool:
    """Whether ``node`` swaps the two dimensions of a matrix."""
    if not (isinstance(node, Node) and node.op == "call_function" and is_tensor(node) and len(shape(node)) == 2):
        return False
    if node.target is aten.permute.default:
        return [int(d) % 2 for d in node.args[1]] == [1, 0]  # type: ignore[union-attr,arg-type]  # a list of two ints
    return node.target in (aten.t.default, aten.transpose.int)


def peel(node: Any) -> Any:
    """The value under row views and copies."""
    while is_row_view(node) or is_call(node, *COPIES):
        node = node.args[0]
    return node


def peel_views(node: Any) -> Any:
    """The value under row views alone."""
    while is_row_view(node):
        node = node.args[0]
    return node


def under_slices(node: Any) -> Any:
    """The value that a node is some rows or columns of, under row views: of a stack, what siblings take slices of."""
    node = peel_views(node)
    while is_call(node, aten.slice.Tensor):
        node = peel_views(node.args[0])
    return node


def source_of(node: Any) -> Any:
    """The value under views, copies and transposes: the same numbers, in another arrangement."""
    while is_row_view(node) or is_transpose(node) or is_call(node, *COPIES):
        node = node.args[0]
    return node


def root(node: Any) -> Any:
    """The value under views, copies, transposes and casts."""
    while is_row_view(node) or is_transpose(node) or is_call(node, *COPIES, CONVERT):
        node = node.args[0]
    return node


def before_choice(h: Any) -> tuple[Any, bool]:
    """What ``where(rows == i, h * scales, 0)`` chose from, where rows use different adapters (``low_rank_rows``).

    The last dimension is taken apart for it, [..., n R] -> [..., n, R], and put together afterwards. Returns ``h`` and
    False where nothing was chosen.
    """
    node = _under_reshapes(h)
    if not is_call(node, aten.where.self):
        return h, False
    mask, node, _ = node.args
    while is_call(mask, *VIEWS, aten.unsqueeze.default):
        mask = mask.args[0]
    if not is_call(mask, aten.eq.Tensor):
        return h, False
    node = _under_reshapes(node)
    return (_under_reshapes(node.args[0]) if is_call(node, aten.mul.Tensor) else node), True


def _under_reshapes(node: Any) -> Any:
    while is_call(node, *VIEWS, *COPIES, CONVERT):
        node = node.args[0]
    return node


def transposed(key: Key) -> Key:
    """The key of the transpose of the matrix that ``key`` names."""
    return key[1] if isinstance(key, tuple) and key[0] == "T" else ("T", key)


def readers(node: Node) -> Iterator[Node]:
    """Every user of a value, looking through row views."""
    for user in node.users:
        if is_row_view(user):
            yield from readers(user)
        else:
            yield user


def uses(node: Node) -> Iterator[Node]:
    """Every user of a value, looking through row views, copies and transposes."""
    for user in node.users:
        if is_row_view(user) or is_transpose(user) or is_call(user, *COPIES):
            yield from uses(user)
        else:
            yield user


_LAYOUT = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.t.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        operator.getitem,
    }
)


def is_alias(node: Node) -> bool:
    """Whether a value may be the memory of its operand, seen in another way."""
    return node.target in VIEWS or node.target in _LAYOUT


def stays_in_kernel(node: Node) -> bool:
    """Whether every forward (or every backward) reader of a value is pointwise, so that the value need not be written.

    A reader in the other half of a joint graph does not count: the partitioner decides what crosses.
    """
    half = node.meta.get("partitioner_tag")
    readers = [user for user in node.users if half is None or user.meta.get("partitioner_tag", half) == half]
    return bool(readers) and all(stays_in_kernel(user) if is_alias(user) else is_pointwise(user) for user in readers)


def is_pointwise(node: Node) -> bool:
    """Whether ``node`` computes each element from the same element of its operands."""
    if node.op != "call_function":
        return False
    if node.target is CONVERT:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


_CACHE = 1 << 20
"""Bytes that the cache of a CPU's core holds: large enough for the layers of small models."""


def leaves_cache(value: torch.Tensor) -> bool:
    """Whether a matrix is on a CPU and too large (or of a size not known) for a core's cache.

    Fresh memory for it then costs more than to read and write memory that is there.
    """
    return value.device.type == "cpu" and not statically_known_true(value.numel() * value.dtype.itemsize <= _CACHE)


class Values:
    """Value numbers of one graph, computed on demand.

    Keys are remembered, so an instance is only good while the graph does not change: make one for each search.
    """

    def __init__(self) -> None:
        self._keys: dict[Node, Key] = {}

    def key(self, node: Any) -> Key:
        """The key of a node's value; constants are their own keys."""
        if not isinstance(node, Node):
            return ("const", repr(node))
        chain: list[Node] = []
        current: Any = node
        # Iterative on the way down: chains of views are long in deep models.
        while isinstance(current, Node) and current not in self._keys and self._is_transparent(current):
            chain.append(current)
            current = current.args[0]
        result = self._keys.get(current, current)
        for link in reversed(chain):
            if is_transpose(link):
                result = transposed(result)
            elif is_call(link, CONVERT):
                result = ("cast", str(link.args[1]), result)
            self._keys[link] = result
        return result

    @staticmethod
    def _is_transparent(node: Node) -> bool:
        return is_row_view(node) or is_transpose(node) or is_call(node, *COPIES, CONVERT)


def is_tangent(node: Node) -> bool:
    """Whether ``node`` is the gradient of an output: an input of a joint or a backward graph."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def backward_nodes(graph: Graph) -> set[Node]:
    """Every node that depends on a gradient of an output (a ``tangents`` input): the backward half of a joint graph."""
    pending = [node for node in graph.find_nodes(op="placeholder") if is_tangent(node)]
    found: set[Node] = set(pending)
    while pending:
        for user in pending.pop().users:
            if user not in found and user.op != "output":
                found.add(user)
                pending.append(user)
    return found


PARAMETER = "lora_fx_parameter"
"""In the ``custom`` metadata of a branch's nodes: which parameter of its module it adapts, where there are several."""

REPLICATED = "lora_fx_replicated"
"""In the ``custom`` metadata of a branch's nodes: the ranks of each process group on which A is the same, and B."""
FACTORS = ("lora_a", "lora_b")

BESIDE = "lora_fx_beside"
"""In the ``custom`` metadata of a base's nodes: its weight and the branch's A lie together in memory."""

_STACKS = ("nn_module_stack", "fwd_nn_module_stack")


def module_path(node: Node) -> str:
    """The dotted path of the module that created ``node``; empty for the compiled module itself."""
    for name in _STACKS:
        stack = node.meta.get(name)
        if stack:
            path = str(list(stack.values())[-1][0])
            return _dotted(path)
    return ""


def parameter_of(node: Node) -> str:
    """The name of the parameter that a branch adapts, where its module notes it, or nothing."""
    return str((node.meta.get("custom") or {}).get(PARAMETER, ""))


def replicated_over(node: Node, factor: str) -> tuple[tuple[int, ...], ...]:
    """The ranks of each group on which a factor of the branch is the same that ``node`` belongs to, as far as noted."""
    noted = (node.meta.get("custom") or {}).get(REPLICATED)
    return tuple(noted[FACTORS.index(factor)]) if noted else ()


ROOM = "lora_fx_room"
"""In the ``custom`` metadata of a base's nodes: on which side the rows of its weight have room for those of B."""


def room_side(node: Node) -> str:
    """On which side the rows of a base's weight have room for B, "left" or "right", or nothing."""
    return str((node.meta.get("custom") or {}).get(ROOM, ""))


def is_beside_factor(node: Node) -> bool:
    """Whether a base's product is one whose weight lies together with the A of its branch in memory."""
    return bool((node.meta.get("custom") or {}).get(BESIDE))


def module_id(node: Node) -> int | None:
    """The ``id()`` of the module that created ``node``, where Dynamo noted it.

    Its path begins at whatever Dynamo captured, which behind a graph break may be a part of the compiled module.
    """
    for name in _STACKS:
        stack = node.meta.get(name)
        if stack:
            key = str(list(stack)[-1]).split("@")[0]  # a second call of one module is "<id>@1"
            return int(key) if key.isdigit() else None
    return None


def _dotted(path: str) -> str:
    """``L['self'].layers._modules['0'].wq`` -> ``layers.0.wq``."""
    for noise, plain in (("._modules[", "["), ("['", "."), ("']", ""), ('["', "."), ('"]', ""), ("[", "."), ("]", "")):
        path = path.replace(noise, plain)
    parts = [part for part in path.split(".") if part and part != "__self__"]
    if parts and parts[0] in ("L", "G"):
        parts = parts[2:]
    return ".".join(parts)
