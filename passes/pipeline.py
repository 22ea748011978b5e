"""The passes in order, the hooks that run them inside Inductor, and the identity that goes into its cache keys."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.fx import Graph

from lora_fx.passes import (
    accumulate,
    accumulate_grouped,
    beside,
    fold_grouped_scale,
    fold_scale,
    fuse_tiles,
    gather_low_rank,
    keep_low_rank,
    orient_grouped,
    pair_gradients,
    pair_grouped,
    recompute_branch,
    recompute_dropout,
    recompute_grouped,
    recompute_input,
    row_order,
    scatter_low_rank,
    sibling_gradients,
    stack_siblings,
    unflatten_products,
    widen,
)
from lora_fx.passes._torch import custom_graph_pass, given_away, inductor_config, trace_structured
from lora_fx.passes.graph import module_path
from lora_fx.passes.grouped_site import GroupedSite, find_grouped_sites
from lora_fx.passes.kernels import lowering, operators
from lora_fx.passes.printer import graph_text, target_name
from lora_fx.passes.report import GraphReport, SiteReport
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.site import MARK, Site, find_sites

log = logging.getLogger("lora_fx.passes")


@dataclass(frozen=True)
class Pass:
    """One rewrite: ``find`` decides which groups of sites it is for, ``rewrite`` does one group."""

    name: str
    find: Callable[[list[Any]], Iterable[list[Any]]]
    rewrite: Callable[[list[Any], Rewriter], None]
    grouped: bool = False
    """Whether its sites are those of experts."""


PASSES = (
    # First: the others look at products, not at scaled products.
    Pass("fold_scale", fold_scale.find, fold_scale.rewrite),
    # While each site still has its own down-projection and its own term in dX.
    Pass("stack_siblings", stack_siblings.find, stack_siblings.rewrite),
    # After stacking, which collects the g of siblings wherever they come from.
    Pass("pair_gradients", pair_gradients.find, pair_gradients.rewrite),
    # After pairing, which takes h from the up-projection. After stacking, while the terms are still in their sums.
    Pass("scatter_h", scatter_low_rank.find_outputs, scatter_low_rank.rewrite_outputs),
    Pass("scatter_g", scatter_low_rank.find_gradients, scatter_low_rank.rewrite_gradients),
    # After what scatters h, of which dB is computed then.
    Pass("gather_h", gather_low_rank.find_inputs, gather_low_rank.rewrite_inputs),
    Pass("gather_g", gather_low_rank.find_gradients, gather_low_rank.rewrite_gradients),
    # After stacking, of whose h it takes parts.
    Pass("widen", widen.find, widen.rewrite),
    # It swallows the up-projection, its sum, and the (by now single) term in dX, where those are written to memory.
    Pass("accumulate", accumulate.find, accumulate.rewrite),
    # For the up-projections that are left.
    Pass("recompute_branch", recompute_branch.find, recompute_branch.rewrite),
    # After stacking, which looks at tags, and where it is known which h are scattered.
    Pass("keep_low_rank", keep_low_rank.find, keep_low_rank.rewrite),
    # Last: its chains lead through sums whose products are to be recomputed as well.
    Pass("recompute_input", recompute_input.find, recompute_input.rewrite),
    # Experts. While g is the product that dA reads.
    Pass("orient_grouped", orient_grouped.find, orient_grouped.rewrite, grouped=True),
    # Before the scale is gone from the forward half, of which the backward half has a copy.
    Pass("pair_grouped", pair_grouped.find, pair_grouped.rewrite, grouped=True),
    Pass("fold_grouped_scale", fold_grouped_scale.find, fold_grouped_scale.rewrite, grouped=True),
    # It swallows what the scale was folded into, where the sum is written.
    Pass("accumulate_grouped", accumulate_grouped.find, accumulate_grouped.rewrite, grouped=True),
    Pass("keep_grouped_low_rank", keep_low_rank.find, keep_low_rank.rewrite, grouped=True),
    # For the up-projections that are left.
    Pass("recompute_grouped", recompute_grouped.find, recompute_grouped.rewrite, grouped=True),
)


class LoRARewriteError(RuntimeError):
    """Raised in strict mode when a LoRA branch was left as it was."""


def rewrite_graph(graph: Graph, passes: tuple[Pass, ...] = PASSES) -> GraphReport:
    """Run ``passes`` over a joint (or inference) graph in place and say what became of every site.

    Never raises for a reason of its own: a rewrite that fails is undone and named in the report.
    """
    report = GraphReport()
    try:
        sites, declined = find_sites(graph)
        experts, declined_experts = find_grouped_sites(graph)
    except Exception as error:
        report.failures.append(_failure("find_sites", "", error))
        return report
    report.sites = [SiteReport.declined(d) for d in (*declined, *declined_experts)]
    every: list[Site | GroupedSite] = [*sites, *experts]
    if not every:
        return report
    for linear in sites:
        beside.show(linear)
    rewriter = Rewriter(graph)
    for step in passes:
        try:
            groups = list(step.find(experts if step.grouped else sites))
        except Exception as error:
            report.failures.append(_failure(step.name, "", error))
            continue
        for group in groups:
            _attempt(step, group, rewriter, report)
    try:
        rewriter.commit()
    except Exception as error:
        report.failures.append(_failure("commit", "", error))
        report.sites += [
            SiteReport(s.path, s.rank, s.in_features, s.out_features, reason="the rewritten graph was not valid")
            for s in every
        ]
        return report
    for site in every:
        if site.forward_rewrites or site.backward_rewrites:
            for product in site.products():
                product.meta[MARK] = True
        if site.dropout:
            site.down.meta[recompute_dropout.MARK] = True
    report.sites = [SiteReport.of(site) for site in every] + report.sites
    return report


def _attempt(step: Pass, group: list[Any], rewriter: Rewriter, report: GraphReport) -> None:
    """One rewrite of one group: all of it, or nothing and a line in the report."""
    before = [copy.copy(site.__dict__) for site in group]
    for state in before:
        state.update({name: list(value) for name, value in state.items() if isinstance(value, list)})
    try:
        with rewriter.transaction():
            step.rewrite(group, rewriter)
    except Exception as error:
        for site, state in zip(group, before, strict=True):
            site.__dict__.update(state)
            site.notes.append(f"{step.name} failed: {error}")
        report.failures.append(_failure(step.name, ", ".join(site.path or "(root)" for site in group), error))


def _failure(step: str, where: str, error: Exception) -> str:
    message = f"{step} failed{f' at {where}' if where else ''}: {type(error).__name__}: {error}"
    _warn_once(message)
    log.debug("%s", message, exc_info=error)
    return message


@functools.lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    log.warning("%s. The graph compiles as it was there; please report this.", message)


@functools.cache
def source_hash() -> str:
    """A hash of the source of every pass and kernel: compiled code of another version must not be reused."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cpp")):
        digest.update(str(file.relative_to(folder)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


class Stage:
    """One of the places in Inductor where we look at a graph. Holds settings only: equal ones are interchangeable.

    A `CustomGraphPass` of Inductor's, which it is said to be once there is one: importing that class takes a second.
    """

    def __init__(self, strict: bool = False) -> None:
        custom_graph_pass().register(type(self))
        self.strict = strict

    def uuid(self) -> Any:
        """The identity in Inductor's cache key: our source and what we were asked to do."""
        return (type(self).__qualname__, source_hash(), self.strict)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.strict == self.strict

    def __hash__(self) -> int:
        return hash((type(self), self.strict))

    def __deepcopy__(self, memo: dict[int, Any]) -> Stage:
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(strict={self.strict})"

    def __call__(self, graph: Graph) -> None:
        raise NotImplementedError


class RewriteStage(Stage):
    """Rewrites the joint graph (``joint_custom_pre_pass``)."""

    def __call__(self, graph: Graph) -> None:
        before = graph_text(graph) if log.isEnabledFor(logging.DEBUG) else ""
        report = rewrite_graph(graph)
        if report.sites or report.failures:
            _publish(report)
            if before:
                log.debug("graph before\n%s\ngraph after\n%s", before, graph_text(graph))
        if self.strict and not report.complete:
            raise LoRARewriteError("left as they were:\n  " + "\n  ".join(report.problems()))


class DropoutStage(Stage):
    """Tags dropout for recomputation (``joint_custom_post_pass``: its random numbers have seeds by then)."""

    def __call__(self, graph: Graph) -> None:
        try:
            tagged = recompute_dropout.tag(graph)
        except Exception as error:
            message = _failure("recompute_dropout", "", error)
            if self.strict:
                raise LoRARewriteError(message) from error
            return
        for down in tagged:
            log.debug("%s: dropout is drawn again in backward", module_path(down) or "(root)")


class LoweringStage(Stage):
    """Chooses implementations (``post_grad_custom_pre_pass``: forward and backward are apart by then)."""

    def uuid(self) -> Any:
        """Inductor's cache key does not say what backward may write over: a graph that is retained would be served code
        that writes over what was saved, ours and Inductor's own."""
        return (*super().uuid(), given_away())

    def __call__(self, graph: Graph) -> None:
        operators.teach_inductor()
        failures = [
            _failure(f"{step} {target_name(node.target)}", module_path(node) or "(root)", error)
            for step, lower in (
                # Before regions are cut, which take h with what they make of it.
                ("beside", beside.join),
                # While g has no program: theirs would write what this makes by the way.
                ("sibling_gradients", sibling_gradients.join),
                ("tile", fuse_tiles.cut),
                ("lowering", lowering.lower),
                ("unflatten", unflatten_products.unflatten),
            )
            for node, error in lower(graph)
        ]
        if self.strict and failures:
            raise LoRARewriteError("\n  ".join(failures))


class OrderStage(Stage):
    """Has programs take rows in the order that pipelined collectives need (``post_grad_custom_post_pass``)."""

    def __call__(self, graph: Graph) -> None:
        failures = [_failure("row_order", str(node), error) for node, error in row_order.settle(graph)]
        if self.strict and failures:
            raise LoRARewriteError("\n  ".join(failures))


def _publish(report: GraphReport) -> None:
    rewritten = sum(site.rewritten for site in report.sites)
    log.info("rewrote %d of %d LoRA branches", rewritten, len(report.sites))
    for site in report.sites:
        log.debug("%s", site)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "lora_fx_report", "encoding": "json"},
        payload_fn=lambda: json.dumps([site.as_dict() for site in report.sites], indent=1),
    )


HOOKS: dict[str, type[Stage]] = {
    "joint_custom_pre_pass": RewriteStage,
    "joint_custom_post_pass": DropoutStage,
    "post_grad_custom_pre_pass": LoweringStage,
    "post_grad_custom_post_pass": OrderStage,
}
"""Inductor's configuration names and what we run there."""


def hooks(options: dict[str, Any] | None = None, *, strict: bool = False) -> dict[str, Any]:
    """Inductor options that run the passes, together with the caller's ``options``.

    A pass that the caller put on one of our hooks (in ``options`` or in ``torch._inductor.config``) runs before ours.
    """
    merged = dict(options or {})
    config = inductor_config()
    for name, stage in HOOKS.items():
        theirs = merged.get(name, getattr(config, name))
        ours = stage(strict)
        merged[name] = ours if theirs is None else Sequence(theirs, ours)
    return merged


class Sequence:
    """The caller's passes, then ours, on one hook; a `CustomGraphPass` as `Stage` is."""

    def __init__(self, theirs: Any, ours: Stage) -> None:
        custom_graph_pass().register(type(self))
        self.steps: tuple[Any, ...] = (*(theirs if isinstance(theirs, (list, tuple)) else (theirs,)), ours)

    def uuid(self) -> Any:
        """Everybody's identity; None (do not cache) when a caller's pass has none."""
        identities = [step.uuid() if isinstance(step, custom_graph_pass()) else None for step in self.steps]
        return None if None in identities else tuple(identities)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.steps == other.steps

    def __hash__(self) -> int:
        return hash(self.steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sequence:
        return self

    def __call__(self, graph: Graph) -> None:
        for step in self.steps:
            step(graph)
