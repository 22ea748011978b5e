"""What the passes do to a model, shown without compiling it."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lora_fx._torch import own_frame, unlimited_recompiles
from lora_fx.adapted import Adapted
from lora_fx.branches import Branch, branches
from lora_fx.exact import exact
from lora_fx.experts import LoRAExpertsModule
from lora_fx.passes.pipeline import LoRARewriteError
from lora_fx.passes.report import SiteReport
from lora_fx.passes.trace import GraphTrace, tracing_backend
from lora_fx.record import check_kept

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Verification:
    """Errors of both forms against the model in float64, on the inputs that were explained.

    Each is ``norm(form - oracle) / norm(oracle)`` over all outputs, or over all gradients (adapters, and inputs that
    require them). Dropout modules are off while verifying. See `lora_fx.exact` for what float64 means for a quantised
    base: where the base rounds its inputs as well (float8, fake quantisation), both forms err by that.
    """

    output_unfused: float
    output_rewritten: float
    gradient_unfused: float | None
    gradient_rewritten: float | None
    worst_gradient: str | None = None
    """The parameter (or ``input``) whose gradient in the rewritten form errs most, relative to its own norm."""
    worst_unfused: float | None = None
    """The largest error of one gradient in the unfused form; it may be another gradient than `worst_gradient`."""
    worst_rewritten: float | None = None
    """The error of `worst_gradient`."""
    worst_apart: float | None = None
    """The largest ``norm(rewritten - unfused) / norm(unfused)`` of one gradient: where the base rounds its inputs, the
    errors of both forms are that rounding, and this says what the rewrite adds."""


@dataclass
class Report:
    """What became of every LoRA branch of a model. ``print(report)`` is a table."""

    sites: list[SiteReport]
    """One entry a branch and graph, in graph order; adapters that no graph reached come last, with the reason."""
    graphs: list[GraphTrace]
    """The text of each graph that Dynamo captured, before and after, and of the partitioned forward and backward."""
    failures: list[str] = field(default_factory=list)
    """Internal failures; the graph was left as it was there."""
    verification: Verification | None = None
    """The errors of both forms, where `explain` was asked for them."""

    @property
    def rewritten(self) -> int:
        """How many branches were rewritten."""
        return sum(site.rewritten for site in self.sites)

    @property
    def saved_bytes(self) -> tuple[int, int] | None:
        """Bytes kept for backward before and after the passes; None without gradients."""
        kept = [g for g in self.graphs if g.saved_bytes_before is not None]
        if not kept:
            return None
        return sum(g.saved_bytes_before or 0 for g in kept), sum(g.saved_bytes_after or 0 for g in kept)

    def problems(self) -> list[str]:
        """A line for each branch that was left alone and each failure."""
        return [f"{site.name}: {site.reason}" for site in self.sites if not site.rewritten] + self.failures

    def as_dict(self) -> dict[str, Any]:
        """For JSON: sites, totals, failures and verification; not the graphs' texts."""
        return {
            "sites": [site.as_dict() for site in self.sites],
            "rewritten": self.rewritten,
            "graphs": len(self.graphs),
            "saved_bytes": self.saved_bytes,
            "failures": self.failures,
            "verification": None if self.verification is None else asdict(self.verification),
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(model: nn.Module, *inputs: Any, strict: bool = False, verify: bool = False, **kwargs: Any) -> Report:
    """Trace ``model(*inputs, **kwargs)`` and report what the passes do to each LoRA branch, without compiling kernels.

    The graphs run once, as plain ATen, so that the graphs behind a graph break are seen too. The model may be compiled
    already or not; its compiled code, parameters and random state are left as they are.

    Args:
        model: A model with adapters, or a part of one.
        *inputs: As the model is called in training. Whether gradients are enabled, autocast and ``model.training``
            decide which graph is explained, as they do in training.
        strict: Raise when a branch was left as it was.
        verify: Also run copies of the model with and without the rewrite, and in float64, and state the errors. The
            copies need five times the model's memory in bfloat16.
        **kwargs: Keyword inputs of the model.

    Raises:
        ValueError: The model has no adapters, or lost some since `lora_fx.install`.
        LoRARewriteError: ``strict``, and a branch was left as it was; the text says which and why.
    """
    check_kept(model)
    adapters = branches(model)
    if not adapters:
        raise ValueError("the model has no adapters: call lora_fx.install(model, config) before lora_fx.explain")
    traces: list[GraphTrace] = []
    rewritten: _Results | None = None
    with _untouched(model, inputs, kwargs):
        if verify and not any(_dropouts(model)):
            rewritten = _results(model, tracing_backend(traces), inputs, kwargs)
        else:
            _run(model, tracing_backend(traces), inputs, kwargs)
    paths = {id(module): (name, module) for name, module in model.named_modules() if isinstance(module, Adapted)}
    report = Report(
        sites=[_named(site, paths) for trace in traces for site in trace.report.sites],
        graphs=traces,
        failures=[failure for trace in traces for failure in trace.report.failures],
    )
    seen = {site.path for site in report.sites}
    report.sites += [_unreached(branch) for branch in adapters if branch.path not in seen]
    if verify:
        report.verification = _verify(model, inputs, kwargs, rewritten)
    if strict and report.problems():
        raise LoRARewriteError("left as they were:\n  " + "\n  ".join(report.problems()))
    return report


def _named(site: SiteReport, modules: dict[int, tuple[str, Adapted]]) -> SiteReport:
    """The site with its path in the model, where the graph is of a part of it."""
    path, module = modules.get(site.module_id or 0, (site.path, None))
    parameter = site.path.rsplit(".", 1)[-1]
    if isinstance(module, LoRAExpertsModule) and parameter in module.adapted_parameters:
        path = f"{path}.{parameter}".removeprefix(".")
    return replace(site, path=path)


def _unreached(branch: Branch) -> SiteReport:
    lora_a, lora_b = branch.factors
    rank, in_features = lora_a.shape[-2:]
    reason = (
        "not in the traced graphs: this call did not run it, or Dynamo left it uncompiled (TORCH_LOGS=graph_breaks)"
    )
    return SiteReport(branch.path, rank, in_features, lora_b.shape[-2], reason=reason)


@contextmanager
def _untouched(model: nn.Module, inputs: Any, kwargs: Any) -> Iterator[None]:
    """Put aside compiled code (its graphs would hide from the trace), and restore it and the random state."""
    compiled = [(m, m._compiled_call_impl) for m in model.modules() if m._compiled_call_impl is not None]
    tensors = [t for t in pytree.tree_leaves((inputs, kwargs)) if isinstance(t, Tensor)]
    devices = {t.device for t in [*tensors, *model.parameters()] if t.device.type not in ("cpu", "meta")}
    buffers = [(b, b.clone()) for b in model.buffers() if b.numel() and not b.is_meta]
    kind = next(iter(devices)).type if devices else "cuda"
    try:
        for module, _ in compiled:
            module._compiled_call_impl = None
        with torch.random.fork_rng([d.index or 0 for d in devices], device_type=kind):
            yield
    finally:
        for module, implementation in compiled:
            module._compiled_call_impl = implementation
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _run(model: nn.Module, backend: Callable[..., Any], inputs: Any, kwargs: Any) -> Any:
    """``model(*inputs, **kwargs)`` under ``backend``, without a trace in what Dynamo keeps for the model.

    Frames behind a graph break share their count of compilations with all others of their code, which must not end it.
    """
    with unlimited_recompiles():
        return torch.compile(own_frame(model), backend=backend)(*inputs, **kwargs)


@dataclass(frozen=True)
class _Results:
    """What a form computed, in float64; gradients by the name of their parameter."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def _verify(model: nn.Module, inputs: Any, kwargs: Any, rewritten: _Results | None) -> Verification:
    """Both forms, executed as ATen, against float64 eager; the rewritten one is run where it was not yet."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module._compiled_call_impl = None
    for module, name in _dropouts(model):
        setattr(module, name, 0.0)
    oracle = _results(exact(model), None, _cast(inputs), _cast(kwargs))
    unfused = _results(model, tracing_backend(None, rewrite=False), inputs, kwargs)
    rewritten = rewritten or _results(model, tracing_backend(None), inputs, kwargs)
    names = list(oracle.gradients)

    def gradient_error(form: _Results, names: list[str]) -> float | None:
        return _error([form.gradients[n] for n in names], [oracle.gradients[n] for n in names]) if names else None

    each = [{name: gradient_error(form, [name]) or 0.0 for name in names} for form in (unfused, rewritten)]
    return Verification(
        output_unfused=_error(unfused.outputs, oracle.outputs),
        output_rewritten=_error(rewritten.outputs, oracle.outputs),
        gradient_unfused=gradient_error(unfused, names),
        gradient_rewritten=gradient_error(rewritten, names),
        worst_gradient=max(names, key=lambda name: each[1][name], default=None),
        worst_unfused=max(each[0].values(), default=None),
        worst_rewritten=max(each[1].values(), default=None),
        worst_apart=max((_error([rewritten.gradients[n]], [unfused.gradients[n]]) for n in names), default=None),
    )


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules that drop something, with the name of the attribute that says how much."""
    for module in model.modules():
        if isinstance(module, Adapted) and module.lora_dropout:
            yield module, "lora_dropout"
        elif isinstance(module, _DROPOUTS) and module.p:
            yield module, "p"


def _cast(tree: Any) -> Any:
    def double(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.detach().double().requires_grad_(leaf.requires_grad)
        return leaf

    return pytree.tree_map(double, tree)


def _results(model: nn.Module, backend: Any, inputs: Any, kwargs: Any) -> _Results:
    """Outputs, and gradients of a fixed weighted sum of them."""
    out = model(*inputs, **kwargs) if backend is None else _run(model, backend, inputs, kwargs)
    outputs = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
    leaves: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    given = [t for t in pytree.tree_leaves((inputs, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    leaves |= {f"input {i}" if len(given) > 1 else "input": t for i, t in enumerate(given)}
    differentiable = [t for t in outputs if t.requires_grad]
    gradients: dict[str, Tensor] = {}
    if differentiable and torch.is_grad_enabled():
        # Different for every element, so that no error cancels, and the same in every form.
        weights = [torch.cos(torch.arange(t.numel(), device=t.device)).view_as(t) for t in differentiable]
        found = torch.autograd.grad(
            differentiable,
            list(leaves.values()),
            [w.to(t.dtype) for w, t in zip(weights, differentiable)],
            allow_unused=True,
        )
        gradients = {
            name: (torch.zeros_like(leaf) if g is None else g).double()
            for (name, leaf), g in zip(leaves.items(), found)
        }
    return _Results([t.detach().double() for t in outputs], gradients)


def _error(form: list[Tensor], oracle: list[Tensor]) -> float:
    difference = sum(float((a - b).norm() ** 2) for a, b in zip(form, oracle))
    return (difference / max(sum(float(b.norm() ** 2) for b in oracle), 1e-300)) ** 0.5


def _lines(report: Report) -> Iterator[str]:
    graphs = f"{len(report.graphs)} graph{'s' * (len(report.graphs) != 1)}"
    yield f"LoRA rewrite: {report.rewritten} of {len(report.sites)} branches in {graphs}"
    header = ("module", "in -> out", "rank", "forward", "backward")
    rows = [
        (name, f"{s.in_features} -> {s.out_features}", str(s.rank), _words(s.forward), _words(s.backward))
        for name, s in _collapsed([site for site in report.sites if site.rewritten])
    ]
    if rows:
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        yield ""
        for row in (header, tuple("-" * width for width in widths), *rows):
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
    noted = _collapsed([site for site in report.sites if site.reason])
    if noted:
        yield ""
        for name, site in noted:
            yield f"{'in part' if site.rewritten else 'left as it was'}: {name}: {site.reason}"
    for failure in report.failures:
        yield f"internal failure: {failure}"
    ranks = sorted({site.rank for site in report.sites})
    if len(ranks) > 1:
        yield f"ranks differ ({', '.join(map(str, ranks))}): blocks compiled by themselves get a graph for each"
    if (saved := report.saved_bytes) is not None:
        before, after = saved
        change = f" ({100 * (after - before) / before:+.0f}%)" if before else ""
        yield ""
        yield f"saved for backward: {_mib(before)} -> {_mib(after)}{change}"
    if (v := report.verification) is not None:
        yield f"error of outputs against float64: unfused {v.output_unfused:.2e}, rewritten {v.output_rewritten:.2e}"
        if v.gradient_unfused is not None:
            unfused, rewritten = v.gradient_unfused, v.gradient_rewritten
            yield f"error of gradients against float64: unfused {unfused:.2e}, rewritten {rewritten:.2e}"
        if v.worst_gradient is not None:
            unfused, rewritten = v.worst_unfused or 0.0, v.worst_rewritten or 0.0
            yield f"error of the worst gradient: unfused {unfused:.2e}, rewritten {rewritten:.2e} ({v.worst_gradient})"
            yield f"apart in the gradient where they are furthest apart: {v.worst_apart or 0.0:.2e}"


def _words(rewrites: tuple[str, ...]) -> str:
    return ", ".join(rewrites) or "-"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _collapsed(sites: list[SiteReport]) -> list[tuple[str, SiteReport]]:
    """Rows that differ in one layer number are one row: ``layers.{0-5}.attention.wq``."""
    groups: dict[Any, list[SiteReport]] = {}
    for site in sites:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", site.path, count=1)
        facts = (site.rank, site.in_features, site.out_features, site.forward, site.backward, site.reason)
        groups.setdefault((pattern, facts), []).append(site)
    return [(_name([site.path for site in group]), group[0]) for group in groups.values()]


def _name(paths: list[str]) -> str:
    if len(set(paths)) == 1:
        return (paths[0] or "(root)") + (f" (x{len(paths)})" if len(paths) > 1 else "")
    found = [re.search(r"(?<![^.])\d+(?![^.])", path) for path in paths]
    if not all(found):
        return f"{paths[0] or '(root)'} (x{len(paths)})"
    numbers = sorted({int(match.group()) for match in found if match})
    match = found[0]
    assert match is not None
    return f"{paths[0][: match.start()]}{{{_ranges(numbers)}}}{paths[0][match.end() :]}"


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2,5``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
