"""What a search for low-rank branches finds: branches, and those that are left alone."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from lora_fx.passes.graph import Key

Scale = float | int | Node


@dataclass
class Branch:
    """One low-rank branch. Node fields are re-pointed by passes as they replace what they name."""

    path: str
    """Path of the linear, or of the parameter of experts, relative to what was compiled; empty for that itself."""
    down: Node
    up: Node
    add: Node
    rank: int
    in_features: int
    out_features: int
    x_key: Key
    """Equal for two branches that read the same input."""
    scale: Scale | None
    """Multiplies the product: a number, a 0-d tensor node, or None when there is nothing (left) to multiply."""
    scaled: Node
    """What is added to the base: ``up`` after its scale and views."""
    dropout: bool
    module_id: int | None = None
    """``id()`` of the module that made the product, where it is known."""
    grad_b: Node | None = None
    grad_b_transposed: bool = False
    """``grad_b`` is computed as its transpose (a model that stores B transposed)."""
    grad_h: Node | None = None
    grad_a: Node | None = None
    grad_x: Node | None = None
    forward_rewrites: list[str] = field(default_factory=list)
    backward_rewrites: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Reasons why a pass left this branch, or half of it, alone."""

    @property
    def base(self) -> Node:
        """What the branch is added to, as it stands in the graph now."""
        left, right = self.add.args[:2]
        assert left is self.scaled or right is self.scaled
        other = right if left is self.scaled else left
        assert isinstance(other, Node)
        return other


@dataclass(frozen=True)
class Declined:
    """A low-rank branch that is left alone, and why."""

    path: str
    rank: int
    in_features: int
    out_features: int
    reason: str
    module_id: int | None = None


class NotASite(Exception):
    """Why two products in a row are not rewritten; ``proved`` when they are a LoRA branch all the same."""

    def __init__(self, reason: str, proved: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.proved = reason, proved
