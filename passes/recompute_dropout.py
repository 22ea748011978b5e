"""Draw the dropout mask of a branch again in backward, instead of keeping the dropped input of every linear.

Before, autograd keeps for each of q, k and v::

    drop(x): f[M, K]  and  mask: b8[M, K]

After::

    x: f[M, K] once for all of them, and a seed each

Inductor's random numbers are a function of a seed, so the mask is drawn again bit for bit. The pass only tags the nodes
of the chain rand > p, * x, / (1 - p) for recomputation; the partitioner does the rest. It runs after Inductor replaced
``rand`` by its seeded form; with ``fallback_random`` there is no seed and the pass leaves the graph alone.

A GPU takes longer to draw those numbers (Philox, ten rounds an element) than to read a mask: a Llama-3-8B block with
dropout 0.1 on an H200 (M 8192) took 1.301 of the frozen block's time with them drawn again, 1.223 without, plain LoRA
1.242. So there the mask becomes one that costs a few instructions (:mod:`lora_fx.passes.kernels.dropout`), of the same
seed, computed inside the kernels that need it (:mod:`lora_fx.passes.tile_regions`)::

    rand: f[M, K] = inductor_random([M, K], seed)
    mask: b8[M, K] = rand > p                         ->  mask: b8[M, K] = keep(seed, [M, K], p)
"""

from __future__ import annotations

from typing import Any, cast

from torch.fx import Graph, Node

from lora_fx.passes._torch import CheckpointPolicy, detect_fake_mode
from lora_fx.passes.graph import CONVERT, COPIES, MM, VIEWS, aten, is_call, is_row_view, prims, val
from lora_fx.passes.grouped_site import GROUPED_MM
from lora_fx.passes.kernels import operators
from lora_fx.passes.recompute_branch import REGION
from lora_fx.passes.tile_nodes import columns_of

MARK = "lora_fx_dropout"
"""Set by the first stage in the metadata of the down-projections that it proved to be of a LoRA site with dropout."""


def tag(graph: Graph) -> list[Node]:
    """Tag the dropout chains of every marked down-projection; returns the down-projections whose chain was tagged.

    What a user's checkpointing computes again anyway is left to it, whichever mask it has.
    """
    tagged = []
    products = [n for target in (MM, GROUPED_MM) for n in graph.find_nodes(op="call_function", target=target)]
    for down in products:
        if not down.meta.get(MARK) or not (chain := _chain(down.args[0])):
            continue
        if val(down).device.type != "cpu":
            if not has_kernels(down):
                continue
            chain = _with_cheap_mask(chain)
        if any(link.meta.get("recompute") is not None for link in chain):
            continue
        for node in chain:
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            node.meta["ac_graph_id"] = REGION
        tagged.append(down)
    return tagged


def has_kernels(down: Node) -> bool:
    """Whether the products with x of a branch will be kernels of ours, which can draw a mask themselves."""
    return val(down).device.type == "cuda" and columns_of(down) is not None


def _with_cheap_mask(chain: list[Node]) -> list[Node]:
    """The chain with `keep` in the place of random numbers and their comparison."""
    random = chain[-1]
    index, compared = next((i, node) for i, node in enumerate(chain) if is_call(node, aten.gt.Scalar))
    size, seed = cast(tuple[Any, Node], random.args[:2])
    with compared.graph.inserting_before(compared):
        if is_call(seed, prims.inductor_lookup_seed.default):
            seed = _looked_up(seed)
        mask = compared.graph.call_function(operators.keep, (seed, size, compared.args[1]))
    mask.meta.update(compared.meta)
    compared.replace_all_uses_with(mask)
    for node in [*chain[index:], *random.all_input_nodes]:
        if not node.users:
            node.graph.erase_node(node)
    return [*chain[:index], mask]


def _looked_up(seed: Node) -> Node:
    """A seed as a view of all of them: to look it up is a kernel of Inductor's in forward, and another in backward."""
    seeds, index = cast(tuple[Node, int], seed.args)
    view = seed.graph.call_function(aten.select.int, (seeds, 0, index))
    view.meta.update(seed.meta)
    with detect_fake_mode([val(seeds)]):
        view.meta["val"] = aten.select.int(val(seeds), 0, index)
    return view


def _chain(x: Any) -> list[Node]:
    """The nodes from the dropped input to the random numbers; empty if they have another form."""
    chain: list[Node] = []
    node = x
    for target in (aten.mul.Tensor, aten.mul.Tensor, aten.gt.Scalar, prims.inductor_random.default):
        while is_row_view(node) or is_call(node, *VIEWS, *COPIES, CONVERT):
            chain.append(node)
            node = node.args[0]
        if not is_call(node, target):
            return []
        chain.append(node)
        # The mask is the operand that comes from a comparison, on either side.
        node = next((a for a in node.args if isinstance(a, Node) and _is_mask(a)), node.args[0])
    return chain


def _is_mask(node: Node) -> bool:
    while is_call(node, *VIEWS, *COPIES, CONVERT):
        node = node.args[0]  # type: ignore[assignment]  # the tensor that the view looks at
    return is_call(node, aten.gt.Scalar)
