"""The only way in which a pass changes a graph: new nodes and re-pointed operands, undone when something goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node

from lora_fx.passes._torch import detect_fake_mode, extract_tensor_metadata, stable_topological_sort
from lora_fx.passes.graph import (
    VIEWS,
    aten,
    is_call,
    is_row_view,
    is_tensor,
    is_transpose,
    peel_views,
    same_shape,
    shape,
    val,
)

# Where a node came from in the user's model.
PLACE = (
    "stack_trace",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "source_fn_stack",
    "fwd_source_fn_stack",
    "seq_nr",
    "from_node",
    "custom",
)
# What a rewritten node inherits from the node that it stands for: that, the side of the partition, checkpointing tags.
_INHERITED = ("partitioner_tag", "recompute", "ac_graph_id", *PLACE)

_ABSENT = object()


class Rewriter:
    """Adds nodes to a graph and re-points users of old nodes to new ones.

    Old nodes are never erased here: what a rewrite leaves without users goes when :meth:`commit` removes dead code.
    So a rewrite that raises half-way is undone exactly, and the user's graph compiles as it came.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._made: list[Node] = []
        self._redirected: list[tuple[Node, tuple[Any, ...], dict[str, Any]]] = []
        self._tagged: list[tuple[Node, dict[str, Any]]] = []
        self._discarded: list[Node] = []
        self._order = list(graph.nodes)
        self.changed = False

    def emit(self, target: Callable[..., Any], *args: Any, like: Node, **kwargs: Any) -> Node:
        """Add ``target(*args, **kwargs)`` before ``like``, with its fake value computed and ``like``'s metadata.

        Raises whatever the operator raises on fake tensors: a rewrite with wrong shapes fails here, before it is used.
        """
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args, kwargs)
        self._made.append(node)
        for name in _INHERITED:
            if name in like.meta:
                node.meta[name] = like.meta[name]
        with detect_fake_mode([val(like), *[val(a) for a in node.all_input_nodes]]):
            fake_args, fake_kwargs = torch.fx.node.map_arg((args, kwargs), val)
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        if isinstance(node.meta["val"], torch.Tensor):
            node.meta["tensor_meta"] = extract_tensor_metadata(node.meta["val"])
        return node

    def emit_in_place(self, target: Callable[..., Any], *args: Any, of: Node, half: Node, **kwargs: Any) -> Node:
        """As `emit`, like a node ``of`` whose place the new one takes, which may be of no half of the graph."""
        node = self.emit(target, *args, like=of, **kwargs)
        if "partitioner_tag" in half.meta:
            node.meta.setdefault("partitioner_tag", half.meta["partitioner_tag"])
        return node

    def raised(self, node: Any, *, of: Node, half: Node) -> Any:
        """``node``, or where that comes after ``of``, another one like it that comes before.

        For what is made of parameters in a few steps, such as the stacked factors of siblings. What has effects, as a
        collective has, stays where it is, and :meth:`commit` moves what reads it.
        """
        if not isinstance(node, Node) or node < of or node.op != "call_function" or node.is_impure():
            return node
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self.raised(n, of=of, half=half))
        target: Any = node.target
        made = self.emit_in_place(target, *args, of=of, half=half, **kwargs)
        # A user's checkpoint says of it what it said of the other, and not what it says of a collective.
        for name in ("recompute", "ac_graph_id"):
            made.meta.pop(name, None)
        made.meta.update({name: node.meta[name] for name in ("recompute", "ac_graph_id") if name in node.meta})
        return made

    def transpose(self, matrix: Any, *, like: Node) -> Node:
        """The transpose of a matrix; undoes a transpose rather than stacking a second one."""
        if is_transpose(matrix):
            source = matrix.args[0]
            assert isinstance(source, Node)
            return source
        return self.emit(aten.permute.default, matrix, [1, 0], like=like)

    def flatten_rows(self, node: Any, *, like: Node) -> Node:
        """``[..., N] -> [M, N]``, looking through row views to a matrix that is there already."""
        matrix = peel_views(node)
        if len(shape(matrix)) == 2:
            return matrix
        # What autograd keeps is chosen as if a view were nothing, and a reshape something.
        flatten = aten.view.default if val(matrix).is_contiguous() else aten.reshape.default
        return self.emit(flatten, matrix, [-1, shape(matrix)[-1]], like=like)

    def view_like(self, matrix: Node, like: Node) -> Node:
        """``[M, N]`` in the shape of ``like``."""
        if len(shape(matrix)) == len(shape(like)):
            return matrix
        return self.emit(aten.view.default, matrix, self._sizes(like), like=like)

    def rows_like(self, matrix: Node, rows: Node, *, like: Node) -> Node:
        """``[M, R]`` with the leading dimensions of ``rows``."""
        if len(shape(rows)) == 2:
            return matrix
        return self.emit(aten.view.default, matrix, [*self._sizes(rows)[:-1], shape(matrix)[-1]], like=like)

    def _sizes(self, node: Node) -> list[Any]:
        """The shape of ``node`` as operands: numbers, or the nodes that hold symbolic sizes."""
        if all(isinstance(size, int) for size in shape(node)):
            return list(shape(node))
        if is_row_view(node) and is_call(node, *VIEWS):
            return list(node.args[1])  # type: ignore[arg-type]  # the sizes that the view was made with
        for operand in node.all_input_nodes:
            # Not a size of node itself: that would keep what is being replaced alive.
            if node.op == "call_function" and is_tensor(operand) and same_shape(operand, node):
                return self._sizes(operand)
        return [
            size if isinstance(size, int) else self.emit(aten.sym_size.int, node, dim, like=node)
            for dim, size in enumerate(shape(node))
        ]

    def replace(self, old: Node, new: Node) -> None:
        """Give every user of ``old`` the value ``new``, which must have the same shape and dtype."""
        if is_tensor(old) and (not same_shape(old, new) or val(old).dtype != val(new).dtype):
            raise AssertionError(f"{new} ({describe(new)}) cannot stand for {old} ({describe(old)})")
        self.redirect(old, new, list(old.users))

    def redirect(self, old: Node, new: Node, users: list[Node]) -> None:
        """Give the named users of ``old`` the value ``new``."""
        for user in users:
            if user is not new:
                self._redirected.append((user, user.args, user.kwargs))
                user.replace_input_with(old, new)

    def tag(self, node: Node, **meta: Any) -> None:
        """Set metadata of a node."""
        self._tagged.append((node, {name: node.meta.get(name, _ABSENT) for name in meta}))
        node.meta.update(meta)

    def discard(self, *nodes: Node) -> None:
        """Say of nodes that have effects in torch's eyes, such as collectives, that they go with their last user."""
        self._discarded += nodes

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Undo everything done inside when it raises; the exception goes on."""
        start = len(self._made), len(self._redirected), len(self._tagged), len(self._discarded)
        try:
            yield
        except Exception:
            self._undo(*start)
            raise
        self.changed |= len(self._made) > start[0]

    def commit(self) -> None:
        """Put the nodes in order, check the graph and drop the dead ones; if it is invalid, undo all and raise."""
        if not self.changed:
            return
        try:
            stable_topological_sort(self.graph)
            self.graph.lint()
        except Exception:
            self._undo(0, 0, 0, 0)
            *others, output = self._order
            for node in others:
                output.prepend(node)
            raise
        for node in reversed([node for node in self.graph.nodes if node in self._discarded]):
            if not node.users:
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code()

    def _undo(self, made: int, redirected: int, tagged: int, discarded: int) -> None:
        """Take back everything after the given numbers of new nodes, re-pointed users, tagged and discarded nodes."""
        for node, meta in reversed(self._tagged[tagged:]):
            for name, value in meta.items():
                if value is _ABSENT:
                    del node.meta[name]
                else:
                    node.meta[name] = value
        for user, args, kwargs in reversed(self._redirected[redirected:]):
            user.args, user.kwargs = args, kwargs
        for node in reversed(self._made[made:]):
            self.graph.erase_node(node)
        del self._made[made:], self._redirected[redirected:], self._tagged[tagged:], self._discarded[discarded:]


def scale_node(scale: float | int | Node | None, rewriter: Rewriter, *, like: Node) -> Node | None:
    """A scale as a 0-d tensor, on the device of the product ``like``, before which it is made if it is a number."""
    if scale is None or isinstance(scale, Node):
        return scale
    product = val(like)
    # Not less precise than the literal was; a 0-d tensor promotes nothing.
    dtype = torch.float64 if product.dtype == torch.float64 else torch.float32
    return rewriter.emit(aten.full.default, [], scale, dtype=dtype, device=product.device, like=like)


def describe(node: Node) -> str:
    """``float32[4, 8]``: the type of a node, for messages."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
