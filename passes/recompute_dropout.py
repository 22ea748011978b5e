"""Draw the dropout mask of a branch again in backward, instead of keeping the dropped input of every linear.

Before, autograd keeps for each of q, k and v::

    drop(x): f[M, K]  and  mask: b8[M, K]

After::

    x: f[M, K] once for all of them, and a seed each

Inductor's random numbers are a function of a seed, so the mask is drawn again bit for bit. The pass only tags the nodes
of the chain rand > p, * x, / (1 - p) for recomputation; the partitioner does the rest. It runs after Inductor replaced
``rand`` by its seeded form; with ``fallback_random`` there is no seed and the pass leaves the graph alone.

Only on a CPU: a GPU takes longer to draw Inductor's numbers (Philox, ten rounds an element) than to read a mask. A
Llama-3-8B block with dropout 0.1 on an H200 (M 8192): 1.301 of the frozen block's time and 1.39 of its activations with
this pass (and inputs computed again), 1.223 and 1.81 without, plain LoRA 1.242 and 2.15.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from lora_fx.passes._torch import CheckpointPolicy
from lora_fx.passes.graph import CONVERT, COPIES, MM, VIEWS, aten, is_call, is_row_view, prims, val
from lora_fx.passes.recompute_branch import REGION

MARK = "lora_fx_dropout"
"""Set by the first stage in the metadata of the down-projections that it proved to be of a LoRA site with dropout."""


def tag(graph: Graph) -> list[Node]:
    """Tag the dropout chains of every marked down-projection; returns the down-projections whose chain was tagged."""
    tagged = []
    for down in graph.find_nodes(op="call_function", target=MM):
        if not down.meta.get(MARK) or val(down).device.type != "cpu":
            continue
        if chain := _chain(down.args[0]):
            for node in chain:
                node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                node.meta["ac_graph_id"] = REGION
            tagged.append(down)
    return tagged


def _chain(x: Any) -> list[Node]:
    """The nodes from the random numbers to the dropped input; empty if they have another form or are checkpointed."""
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
    return [] if any(link.meta.get("recompute") is not None for link in chain) else chain


def _is_mask(node: Node) -> bool:
    while is_call(node, *VIEWS, *COPIES, CONVERT):
        node = node.args[0]  # type: ignore[assignment]  # the tensor that the view looks at
    return is_call(node, aten.gt.Scalar)
