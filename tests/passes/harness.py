"""Compiling small modules three ways: an oracle in float64, plain `torch.compile`, and with the passes.

`graphs` stops Inductor before it makes kernels and runs its graphs node by node. Everything up to there is Inductor's
own: decompositions, joint passes with our hooks among them, the partitioner, the lowering stage. That is fast, so every
case goes through it. `kernels` is `torch.compile` itself.
"""

import contextlib
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import Argument, Target

import lora_fx
from lora_fx.passes import pipeline
from lora_fx.passes.printer import graph_text
from lora_fx.passes.report import GraphReport
from tests.anew import compiled_anew

ALLOWED = 1.1
"""Our error may be this many times plain torch.compile's."""
FLOOR = 4 * 2.0**-24
"""And this much above it, which the order of summation alone does to float32. bfloat16 errs ten thousand times that."""

Backend = Callable[[GraphModule, Sequence[Tensor]], Callable[..., Any]]
Function = Callable[..., Any]


@dataclass
class Rewrite:
    """One run of the passes over one graph."""

    report: GraphReport
    before: str
    after: str

    @property
    def reasons(self) -> list[str]:
        return [site.reason for site in self.report.sites if site.reason]


@dataclass
class Captured:
    """What went through Inductor while it was recorded."""

    rewrites: list[Rewrite] = field(default_factory=list)
    forward: list[GraphModule] = field(default_factory=list)
    backward: list[GraphModule] = field(default_factory=list)

    @property
    def rewrite(self) -> Rewrite:
        """The only graph that the passes saw."""
        (only,) = self.rewrites
        return only

    @property
    def sites(self) -> int:
        return sum(len(rewrite.report.sites) for rewrite in self.rewrites)

    @property
    def reasons(self) -> list[str]:
        return [reason for rewrite in self.rewrites for reason in rewrite.reasons]

    def count(self, half: str) -> dict[str, int]:
        """How many sites had each rewrite in `half`, "forward" or "backward"."""
        sites = (site for rewrite in self.rewrites for site in rewrite.report.sites)
        return dict(Counter(name for site in sites for name in getattr(site, half)))


Passes = tuple[pipeline.Pass, ...]


@contextlib.contextmanager
def recorded(passes: Passes = pipeline.PASSES) -> Iterator[Captured]:
    """Record every run of the passes and check each."""
    captured, original = Captured(), pipeline.rewrite_graph

    def recording(graph: Graph) -> GraphReport:
        before, theirs = graph_text(graph), set(graph.nodes)
        report = original(graph, passes)
        after = graph_text(graph)
        captured.rewrites.append(Rewrite(report, before, after))
        assert report.failures == []
        if not any(site.rewritten for site in report.sites):
            assert after == before
        check(graph, theirs)
        # What comes out holds nothing more to rewrite.
        second = original(copy.deepcopy(graph), passes)
        assert not any(site.rewritten for site in second.sites)
        return report

    with mock.patch.object(pipeline, "rewrite_graph", recording), compiled_anew():
        yield captured


def check(graph: Graph, theirs: set[Node]) -> None:
    """The graph is valid, and the nodes that the passes added have a value and a side of the partition."""
    graph.lint()
    joint = any("tangents" in str(node.target) for node in graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        if node not in theirs:
            assert "val" in node.meta, node.format_node()
            assert not joint or node.meta["partitioner_tag"] in ("is_forward", "is_backward"), node.format_node()


class Seeded(Interpreter):
    """Runs a graph node by node; random numbers are a function of their seed, as in Inductor's kernels."""

    def call_function(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.prims.inductor_random.default:
            size, seed, mode = args
            assert isinstance(seed, Tensor) and mode == "rand"
            return torch.rand(cast(Any, size), generator=torch.Generator().manual_seed(int(seed)))
        return super().call_function(target, args, kwargs)


def graphs(captured: Captured, *, rewrite: bool, options: dict[str, Any] | None = None) -> Backend:
    """A Dynamo backend: Inductor up to its graphs, which are kept in `captured` and run node by node."""

    def inner_compile(graph: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        lowering: Any = torch._inductor.config.post_grad_custom_pre_pass
        if lowering is not None:
            lowering(graph.graph)
            graph.graph.lint()
            graph.recompile()
        (captured.backward if kwargs.get("is_backward") else captured.forward).append(graph)

        def run(arguments: list[Any]) -> Any:
            values = list(arguments)
            arguments.clear()
            return Seeded(graph).run(*values)

        run._boxed_call = True  # type: ignore[attr-defined]  # how AOTAutograd knows the calling convention
        return run

    def backend(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        patches = pipeline.hooks(options) if rewrite else options or {}
        return cast(Any, compile_fx)(graph, inputs, inner_compile=inner_compile, config_patches=patches)

    return backend


@dataclass(frozen=True)
class Case:
    """A module, how it is called, and what the passes make of it."""

    name: str
    build: Callable[[], nn.Module]
    sites: int
    """LoRA branches, rewritten or declined, in all graphs."""
    forward: dict[str, int]
    """How many sites have each rewrite in forward."""
    backward: dict[str, int] = field(default_factory=dict)
    shape: tuple[int, ...] = (3, 8, 48)
    shapes: tuple[tuple[int, ...], ...] = ()
    """Several shapes, called one after the other, in place of `shape`."""
    dtype: torch.dtype = torch.float32
    x_grad: bool = True
    grad: Callable[[], contextlib.AbstractContextManager[Any]] = torch.enable_grad
    autocast: bool = False
    wrap: Callable[[nn.Module], Function] = lambda module: module
    """What is compiled, given the module."""
    dynamic: bool | None = False
    oracle: Callable[[nn.Module], nn.Module] = lambda module: copy.deepcopy(module).double()
    """The same module in float64."""
    random: bool = False
    """There is dropout: the oracle must draw Inductor's numbers, so it is compiled as well."""
    seeds: int = 8
    """How many inputs the errors are averaged over. Errors in bfloat16 that pass through several layers vary more."""

    def __str__(self) -> str:
        return self.name

    def all_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes or (self.shape,)


@dataclass
class Outcome:
    """Output, input gradient and adapter gradients of several seeds, and the bytes kept for backward by the first."""

    tensors: list[dict[str, Tensor]]
    saved: int


def run(case: Case, module: nn.Module, function: Function, dtype: torch.dtype) -> Outcome:
    """Call and differentiate `function`, which is `module` in some form, for every seed and shape."""
    tensors, saved = [], 0
    base = [p for p in module.parameters() if not p.requires_grad]
    for seed, shape in itertools.product(range(case.seeds), case.all_shapes()):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator).to(case.dtype).to(dtype)
        module.zero_grad()
        torch.manual_seed(seed)
        with case.grad():
            x.requires_grad_(case.x_grad and torch.is_grad_enabled())
            kept = Kept([x, *module.parameters(), *module.buffers()])
            with kept, torch.autocast("cpu", torch.bfloat16, enabled=case.autocast and dtype != torch.float64):
                outputs = function(x)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            saved = saved or kept.bytes
            result = {f"output {i}": y.detach().clone() for i, y in enumerate(outputs)}
            if torch.is_grad_enabled():
                dys = [torch.randn(y.shape, generator=generator).to(case.dtype).to(y.dtype) for y in outputs]
                torch.autograd.backward(outputs, dys)
                gradients = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters() if p.requires_grad}}
                result.update({f"gradient of {name}": g.clone() for name, g in gradients.items() if g is not None})
        assert all(p.grad is None for p in base)
        tensors.append(result)
    return Outcome(tensors, saved)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of the storages that autograd keeps, each once, without those that live anyway and scalars."""

    def __init__(self, others: Iterable[Tensor]) -> None:
        super().__init__(self._pack, lambda tensor: tensor)
        self._others = {storage for tensor in others for storage in storages(tensor)}
        self._sizes: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def _pack(self, tensor: Tensor) -> Tensor:
        self._alive.append(tensor)  # or its address is used again
        for address, size in storages(tensor).items():
            if address not in self._others and tensor.dim() > 0:
                self._sizes[address] = size
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())


def storages(tensor: Tensor) -> dict[int, int]:
    """Address and size of the memory behind a tensor, which may be a subclass that holds several."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return {k: v for name in names for k, v in storages(getattr(tensor, name)).items()}
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}


def by_graphs(
    case: Case, module: nn.Module, *, rewrite: bool, dtype: torch.dtype | None = None, passes: Passes = pipeline.PASSES
) -> tuple[Outcome, Captured]:
    """Run a case through Inductor's graphs."""
    with recorded(passes) as captured:
        function = torch.compile(
            case.wrap(module), backend=graphs(captured, rewrite=rewrite), dynamic=case.dynamic, fullgraph=True
        )
        return run(case, module, function, dtype or case.dtype), captured


def by_kernels(
    case: Case, module: nn.Module, *, rewrite: bool, dtype: torch.dtype | None = None
) -> tuple[Outcome, Captured]:
    """Run a case through `torch.compile`."""
    with recorded() as captured:
        options = pipeline.hooks() if rewrite else None
        function = torch.compile(case.wrap(module), options=options, dynamic=case.dynamic, fullgraph=True)
        return run(case, module, function, dtype or case.dtype), captured


def by_eager(case: Case, module: nn.Module, *, dtype: torch.dtype) -> Outcome:
    # oneDNN multiplies float8 on CPUs with AMX, and has no results in float64.
    with torch.backends.mkldnn.flags(enabled=torch.backends.mkldnn.enabled and dtype != torch.float64):
        return run(case, module, case.wrap(module), dtype)


How = Callable[..., tuple[Outcome, Captured]]


@dataclass
class Comparison:
    plain: Outcome
    ours: Outcome
    theirs: Captured
    captured: Captured
    errors: dict[str, tuple[float, float]]
    """Of each tensor: plain torch.compile's error, and ours."""

    def assert_as_accurate(self) -> None:
        worse = {name: pair for name, pair in self.errors.items() if not pair[1] <= ALLOWED * pair[0] + FLOOR}
        assert not worse, f"less accurate than plain torch.compile: {worse}"


def compare(case: Case, how: How = by_graphs) -> Comparison:
    """Run a case in all three ways."""
    torch.manual_seed(0)
    module = case.build()
    exact = case.oracle(module)
    plain, theirs = how(case, module, rewrite=False)
    ours, captured = how(case, module, rewrite=True)
    if case.random:
        oracle, _ = how(case, exact, rewrite=False, dtype=torch.float64)
    else:
        oracle = by_eager(case, exact, dtype=torch.float64)
    assert [list(t) for t in plain.tensors] == [list(t) for t in ours.tensors] == [list(t) for t in oracle.tensors]
    errors = {
        name: (error(plain.tensors, oracle.tensors, name), error(ours.tensors, oracle.tensors, name))
        for name in plain.tensors[0]
    }
    return Comparison(plain, ours, theirs, captured, errors)


def check_case(case: Case, how: How = by_graphs) -> Comparison:
    """A case is rewritten as it says, is as accurate as plain torch.compile, and keeps no more for backward."""
    result = compare(case, how)
    captured = result.captured
    assert captured.reasons == []
    assert len(captured.forward) == len(result.theirs.forward), "the passes made it recompile"
    assert (captured.sites, captured.count("forward"), captured.count("backward")) == (
        case.sites,
        case.forward,
        case.backward,
    )
    result.assert_as_accurate()
    assert result.ours.saved <= result.plain.saved
    return result


def error(tensors: list[dict[str, Tensor]], oracle: list[dict[str, Tensor]], name: str) -> float:
    """Root mean square over the seeds of |t - oracle| / |oracle| in the Frobenius norm."""
    squares = [
        ((t[name].double() - o[name].double()).norm() / o[name].double().norm()).square()
        for t, o in zip(tensors, oracle)
    ]
    return float(torch.stack(squares).mean().sqrt())


def capture(
    function: Function,
    *inputs: Any,
    rewrite: bool = True,
    passes: Passes = pipeline.PASSES,
    dynamic: bool | None = False,
    backward: bool = False,
) -> Captured:
    """Compile and call `function`, up to the graphs. Its backward graph is made when `backward` runs it."""
    with recorded(passes) as captured:
        backend = graphs(captured, rewrite=rewrite)
        y = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
        if backward:
            y.sum().backward()
        return captured


def joint_graph(function: Function, *inputs: Any, dynamic: bool | None = False) -> Graph:
    """The graph that the passes get for `function`, by itself."""
    found: list[Graph] = []

    class Grab(CustomGraphPass):
        def uuid(self) -> None:
            return None

        def __call__(self, graph: Graph) -> None:
            found.append(copy.deepcopy(graph))

    with recorded() as captured:
        options = {"joint_custom_pre_pass": Grab()}
        backend = graphs(captured, rewrite=False, options=options)
        torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    (graph,) = found
    return graph


def only(*names: str) -> Passes:
    """The passes of these names, in the pipeline's order."""
    passes = tuple(step for step in pipeline.PASSES if step.name in names)
    assert len(passes) == len(names)
    return passes


def adapt(
    module: nn.Module, *, std: float = 0.05, adapter_dtype: torch.dtype | None = None, **config: Any
) -> nn.Module:
    """Install adapters and give them the size that training gives them: at their start they add nothing."""
    config.setdefault("rank", 4)
    lora_fx.install(module, lora_fx.LoRAConfig(**config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora_fx.named_adapter_parameters(module):
            if name.endswith("lora_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if adapter_dtype is not None:
                parameter.data = parameter.data.to(adapter_dtype)
    return module
