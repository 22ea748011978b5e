"""What the passes do to a graph on a GPU, on a machine without one.

A pass knows the device of a node from its fake value. Here the fake values of Inductor's graphs say "cuda" while a
pass looks at them and "cpu" again afterwards: the passes are the real ones, in Inductor's own stages, and what comes
out runs on the CPU, where a tile program is evaluated as ATen.
"""

import contextlib
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.node import Argument, Target

from lora_fx.passes import beside, fuse_tiles, pipeline, sibling_gradients
from lora_fx.passes.kernels import dropout, lowering, operators
from lora_fx.passes.kernels.tile_program import Program, Tile, split
from lora_fx.passes.printer import graph_text
from tests.passes import harness
from tests.passes.harness import Captured, Case, Function, Outcome, recorded

P = 0.25
"""The probability of dropping where plain LoRA draws our masks."""


class Masked(harness.Seeded):
    """Gives plain LoRA, and the oracle, the masks that the kernels draw: numbers on the right side of `P`."""

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.prims.inductor_random.default:
            size, seed, _ = args
            kept = dropout.keep_eager(seed, size, P)  # type: ignore[arg-type]  # tensors and numbers by now
            return torch.where(kept, 0.9, 0.1)
        return super().call_function(target, args, kwargs)


def one_tile(kinds: Any, body: Any, rows: Any, columns: int) -> Tile:
    """A tile for every program, so that what is cut out does not hang on what is worth a kernel.

    As with the tiles that are chosen for large matrices, h comes whole, and what a kernel sums beside other work in
    parts.
    """
    alone = {statement[0] for statement in body} <= {"load", "op", "keep", "down"}
    return Tile(rows=1024, columns=1024 if alone else 32, step=64 if alone else 32, walk="rows")


@contextlib.contextmanager
def devices(graph: Graph, device: str) -> Iterator[None]:
    """Within, the fake values of `graph` are on `device`; afterwards those and new ones are on the CPU."""
    _move(graph, torch.device(device, 0))
    try:
        yield
    finally:
        _move(graph, torch.device("cpu"))


def _move(graph: Graph, device: torch.device) -> None:
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", device)
        if any(isinstance(argument, torch.device) for argument in node.args):  # seeds
            node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor):
                value.fake_device = device


class OnGpu(CustomGraphPass):
    """A stage of the pipeline that sees its graph on a GPU."""

    def __init__(self, step: Any) -> None:
        self.step = step

    def uuid(self) -> None:
        return None

    def __call__(self, graph: Graph) -> None:
        with devices(graph, "cuda"):
            self.step(graph)
            graph.lint()


def lower(graph: Graph, choose: fuse_tiles.Choose = one_tile) -> None:
    """As `LoweringStage`, with one tile for all."""
    operators.teach_inductor()
    joined = (*beside.join(graph), *sibling_gradients.join(graph))
    for node, error in (*joined, *fuse_tiles.cut(graph, choose), *lowering.lower(graph)):
        raise AssertionError(f"{node.format_node()} was left as it was") from error


def options(step: Any = lower) -> dict[str, Any]:
    """The pipeline's hooks; `step` is what runs on the forward and on the backward graph."""
    stages = {name: stage(strict=True) for name, stage in pipeline.HOOKS.items()}
    return {name: OnGpu(stage) for name, stage in {**stages, "post_grad_custom_pre_pass": step}.items()}


def capture(
    function: Function, *inputs: Any, step: Any = lower, backward: bool = True, dynamic: bool = False
) -> Captured:
    """Compile and call `function` up to the graphs, as on a GPU."""
    with recorded() as captured:
        backend = harness.graphs(captured, rewrite=False, options=options(step))
        outputs = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if torch.is_grad_enabled():
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        return captured


def by_graphs(
    case: Case, module: nn.Module, *, rewrite: bool, dtype: torch.dtype | None = None, step: Any = lower
) -> tuple[Outcome, Captured]:
    """`harness.by_graphs`, as on a GPU."""
    if not rewrite:
        return harness.by_graphs(case, module, rewrite=False, dtype=dtype)
    with recorded() as captured:
        backend = harness.graphs(captured, rewrite=False, options=options(step))
        function = torch.compile(case.wrap(module), backend=backend, dynamic=case.dynamic, fullgraph=True)
        return harness.run(case, module, function, dtype or case.dtype), captured


def by_kernels(
    case: Case, module: nn.Module, *, rewrite: bool, dtype: torch.dtype | None = None
) -> tuple[Outcome, Captured]:
    """`harness.by_kernels`, as on a GPU: programs run as ATen among Inductor's kernels."""
    if not rewrite:
        return harness.by_kernels(case, module, rewrite=False, dtype=dtype)
    with recorded() as captured:
        function = torch.compile(case.wrap(module), options=options(), dynamic=case.dynamic, fullgraph=True)
        return harness.run(case, module, function, dtype or case.dtype), captured


def calls(graph: Graph) -> list[Node]:
    """The calls of tile programs."""
    return [n for n in graph.nodes if n.op == "call_function" and n.args[:1] == (operators.tile_,)]


def programs(graph: Graph) -> list[Program]:
    return [program for node in calls(graph) for (program,) in split(str(node.kwargs["program"]))]


def text(graph: Graph) -> str:
    """`graph_text` with the programs listed below the graph, statement by statement and without their tiles."""
    printed, listings = graph_text(graph), []
    for node in calls(graph):
        whole = str(node.kwargs["program"])
        found = [_listing(program) for (program,) in split(whole)]
        listings += [listing for listing in dict.fromkeys(found) if listing not in listings]
        printed = printed.replace(repr(whole), "+".join(f"#{listings.index(listing)}" for listing in found))
    printed = printed.replace("auto_functionalized(lora_fx.tile_, ", "tile(")
    # Types were aligned behind the longest line, which held a program.
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    lines += [line for i, listing in enumerate(listings) for line in f"#{i}: {listing}".splitlines()]
    return "\n".join("\n".join(textwrap.wrap(line, 116, subsequent_indent=" " * 8)) for line in lines)


def halves(captured: Captured) -> tuple[str, str]:
    """The forward and the backward graph as text."""
    return text(captured.forward[0].graph), text(captured.backward[0].graph)


def _named(index: Any) -> str:
    return "|".join(f"in{i}" for i in index) if isinstance(index, list) else f"in{index}"


def _listing(program: Program) -> str:
    inputs = ", ".join(f"in{i} {' '.join(map(str, kind))}" for i, kind in enumerate(program.inputs))
    lines = [f"{program.dtype}, {program.columns} columns; {inputs}"]
    for place, (kind, *rest) in enumerate(program.body):
        if kind == "op":
            name, operands = rest
            rest = [name, *(f"%{o}" if isinstance(o, int) else o[0] for o in operands)]
        elif kind == "keep":
            rest = [f"in{rest[0]}", rest[1]]
        elif kind in ("load", "product"):
            rest = [_named(i) for i in rest if i is not None]
        else:
            rest = [f"%{rest[0]}", *(o if isinstance(o, str) else _named(o) for o in rest[1:])]
        lines.append(f"    {place}: {kind} {' '.join(map(str, rest))}")
    return "\n".join(lines)
