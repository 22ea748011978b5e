"""Show products of gathered activations in the shape in which Inductor pipelines them with the all-gather.

Before, where a kernel of ours reads the matrix that a product gives::

    p: f[M, N] = mm(reshape(x, [M, K]), W^T)                 tile(..., p)

After::

    q: f[B, S, N] = reshape(mm(reshape(x, [M, K]), W^T))     tile(..., reshape(q, [M, N]))

Async tensor parallelism looks for reshape, product, reshape around an x of more than two dimensions. Nothing is
computed or copied by a reshape. Done where Inductor pipelines products with collectives, once regions have been cut
out: those look through reshapes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Graph, Node

from lora_fx.passes._torch import detect_fake_mode, inductor_config
from lora_fx.passes.graph import MM, aten, is_row_view, shape, val
from lora_fx.passes.site import MARK


def unflatten(graph: Graph) -> Iterator[tuple[Node, Exception]]:
    """Give each such product its reshapes. Yields the nodes at which that failed, with the error: never any."""
    if inductor_config()._micro_pipeline_tp:
        for product in graph.find_nodes(op="call_function", target=MM):
            _unflatten(graph, product)
    yield from ()


def _unflatten(graph: Graph, product: Node) -> None:
    x = product.args[0]
    if product.meta.get(MARK):  # a branch's own: Inductor has not found it so far
        return
    if not isinstance(x, Node) or not is_row_view(x) or any(is_row_view(user) for user in product.users):
        return
    wide = shape(x.args[0])[:-1]  # type: ignore[arg-type]  # a row view has a tensor
    if len(wide) < 2 or not all(isinstance(size, int) for size in (*wide, *shape(product))):
        return
    flat = product
    with detect_fake_mode([val(product)]):
        for sizes in ([*wide, shape(product)[1]], list(shape(product))):
            with graph.inserting_after(flat):
                node = graph.call_function(aten.reshape.default, (flat, sizes))
            node.meta = {**product.meta, "val": val(flat).reshape(sizes)}
            flat = node
    first = flat.args[0]
    product.replace_all_uses_with(flat, delete_user_cb=lambda user: user is not first)
