"""Graphs before and after the passes, without compiling a kernel.

A Dynamo backend that does what Inductor does up to its partitioner, once with the passes and once without, notes what
it sees, and runs the partitioned graphs as they are. It does not depend on Inductor's caches: on a cache hit the passes
do not run inside a real compilation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from lora_fx.passes import _torch, recompute_dropout
from lora_fx.passes.graph import is_row_view, module_path, val
from lora_fx.passes.pipeline import rewrite_graph
from lora_fx.passes.printer import graph_text
from lora_fx.passes.report import GraphReport


@dataclass
class GraphTrace:
    """One graph that Dynamo captured, as :func:`lora_fx.passes.printer.graph_text` prints it."""

    report: GraphReport
    before: str
    """The joint graph (or, without gradients, the inference graph) before the passes."""
    after: str
    """The same after them."""
    forward: str = ""
    """The forward half after partitioning; empty for an inference graph."""
    backward: str = ""
    saved_bytes_before: int | None = None
    """What forward keeps for backward without the passes, parameters and inputs not counted; None for inference."""
    saved_bytes_after: int | None = None


def tracing_backend(traces: list[GraphTrace] | None, *, rewrite: bool = True) -> Callable[..., Any]:
    """A Dynamo backend that runs graphs with or without the rewrite, and appends what it rewrote to ``traces``."""

    def partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> Any:
        if not rewrite:
            return _torch.partition(_prepare(joint, None), inputs, **kwargs)
        plain = None if traces is None else _copied(joint)
        trace = _Noted()
        forward, backward = _torch.partition(_prepare(joint, trace), inputs, **kwargs)
        if traces is None or plain is None:
            return forward, backward
        plain, _ = _torch.partition(_prepare(plain, None), inputs, **kwargs)
        outputs = kwargs["num_fwd_outputs"]
        traces.append(
            GraphTrace(
                trace.report,
                trace.before,
                graph_text(joint.graph),
                graph_text(forward.graph),
                graph_text(backward.graph),
                saved_bytes(plain, outputs),
                saved_bytes(forward, outputs),
            )
        )
        return forward, backward

    def inference(graph: GraphModule, inputs: Any) -> Any:
        trace = _Noted() if rewrite else None
        graph = _prepare(graph, trace)
        if trace is not None and traces is not None:
            traces.append(GraphTrace(trace.report, trace.before, graph_text(graph.graph)))
        return _torch.boxed(graph)

    def compiler(graph: GraphModule, inputs: Any) -> Any:
        return _torch.boxed(graph)

    backend: Callable[..., Any] = _torch.aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, inference_compiler=inference, partition_fn=partition
    )
    return backend


class _Noted:
    """The rewrite as a hook that remembers what it saw."""

    def __init__(self) -> None:
        self.before = ""
        self.report = GraphReport()

    def rewrite(self, graph: Graph) -> None:
        """The first hook."""
        self.before = graph_text(graph)
        self.report = rewrite_graph(graph)

    def tag_dropout(self, graph: Graph) -> None:
        """The second hook; adds its word to the sites of the first."""
        tagged = {module_path(down) for down in recompute_dropout.tag(graph)}
        self.report.sites = [
            dataclasses.replace(site, forward=(*site.forward, "redraw")) if site.path in tagged else site
            for site in self.report.sites
        ]


def _copied(graph: GraphModule) -> GraphModule:
    """The graph over the same attributes: ``deepcopy`` would copy the caller's output specification as well."""
    copied = Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    return GraphModule(graph, copied)


def _prepare(graph: GraphModule, noted: _Noted | None) -> GraphModule:
    """Inductor's own passes over a graph that AOTAutograd made, with our hooks or with none."""
    hooks = {
        "joint_custom_pre_pass": None if noted is None else noted.rewrite,
        "joint_custom_post_pass": None if noted is None else noted.tag_dropout,
        "post_grad_custom_pre_pass": None,
        "post_grad_custom_post_pass": None,
    }
    with _torch.inductor_config().patch(hooks):
        return _torch.joint_graph_passes(graph)


def saved_bytes(forward: GraphModule, user_outputs: int) -> int:
    """Bytes that a partitioned forward graph returns for backward beyond its first ``user_outputs`` outputs.

    Inputs of the graph (parameters, the caller's tensors) are not counted, nor is a buffer twice.
    """
    (output,) = forward.graph.find_nodes(op="output")
    returned: Any = output.args[0]
    kept = {_buffer(node) for node in returned[user_outputs:] if isinstance(node, Node)}
    kept -= {_buffer(node) for node in returned[:user_outputs] if isinstance(node, Node)}
    return sum(_nbytes(val(node)) for node in kept if node.op != "placeholder")


def _buffer(node: Node) -> Node:
    while is_row_view(node) or node.target in (torch.ops.aten.permute.default, torch.ops.aten.slice.Tensor):
        node = node.args[0]  # type: ignore[assignment]  # the tensor that the view looks at
    return node


def _nbytes(value: Any) -> int:
    if not isinstance(value, torch.Tensor):
        return 0
    size = 1
    for length in value.shape:
        size *= length if isinstance(length, int) else length.node.hint
    return size * value.dtype.itemsize
