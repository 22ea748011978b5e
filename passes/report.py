"""What the passes did to a graph, site by site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lora_fx.passes.branch import Declined
from lora_fx.passes.grouped_site import GroupedSite
from lora_fx.passes.site import Site


@dataclass(frozen=True)
class SiteReport:
    """One LoRA branch: where it is, and what each half became."""

    path: str
    """Module path of the linear, relative to what was compiled."""
    rank: int
    in_features: int
    out_features: int
    forward: tuple[str, ...] = ()
    """Names of the rewrites in the forward half, in order."""
    backward: tuple[str, ...] = ()
    """Names of the rewrites in the backward half; empty when the graph has none."""
    reason: str = ""
    """Why the site, or a part of it, was left alone; empty when there is nothing to say."""
    module_id: int | None = None
    """``id()`` of the linear in this process, where Dynamo noted it: it finds the linear where the path does not."""

    @property
    def rewritten(self) -> bool:
        """Whether anything was rewritten here."""
        return bool(self.forward or self.backward)

    @property
    def name(self) -> str:
        """The path, or a word for the compiled module itself."""
        return self.path or "(root)"

    @staticmethod
    def of(site: Site | GroupedSite) -> SiteReport:
        """The report of a site after the passes ran."""
        return SiteReport(
            path=site.path,
            rank=site.rank,
            in_features=site.in_features,
            out_features=site.out_features,
            forward=tuple(site.forward_rewrites),
            backward=tuple(site.backward_rewrites),
            reason="; ".join(site.notes),
            module_id=site.module_id,
        )

    @staticmethod
    def declined(declined: Declined) -> SiteReport:
        """The report of a branch that the search left alone."""
        return SiteReport(
            *(declined.path, declined.rank, declined.in_features, declined.out_features),
            reason=declined.reason,
            module_id=declined.module_id,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": self.path,
            "rank": self.rank,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "forward": list(self.forward),
            "backward": list(self.backward),
            "reason": self.reason,
        }


@dataclass
class GraphReport:
    """What happened to one graph."""

    sites: list[SiteReport] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Internal failures: the pass, the module and the exception. The graph was left as it was there."""

    @property
    def complete(self) -> bool:
        """Whether every branch was rewritten and nothing failed."""
        return not self.failures and all(site.rewritten for site in self.sites)

    def problems(self) -> list[str]:
        """A line for each branch that was left alone and each failure."""
        left = [f"{site.name}: {site.reason}" for site in self.sites if not site.rewritten]
        return left + self.failures
