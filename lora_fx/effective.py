"""What adapters make of the weights that they adapt, ``W + s B A``, as numbers: this rank's part, matrix by matrix."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lora_fx.adapted import Adapted
from lora_fx.dora import MAGNITUDE, DoRAModule, gain, row_squares
from lora_fx.experts import LoRAExpertsModule
from lora_fx.linear import PARAMETERS, LoRAModule
from lora_fx.placements import adapter_placements, expert_placements, fill, is_dtensor, local


@dataclass(frozen=True)
class Effective:
    """One adapted weight, and what goes with this rank's part of it.

    Attributes:
        weight: this rank's part, in its own memory: [N, K], or [E, N, K] of experts; K before N where `transposed`.
        lora_a: [R, K] or [E, R, K].
        lora_b: [N, R] or [E, N, R].
        scale: 0-d.
        gain: [N], what DoRA multiplies rows by; None without DoRA.
        transposed: whether the module keeps the weight [K, N].
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: Tensor
    gain: Tensor | None
    transposed: bool

    def sums(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each matrix of the weight, to be written into, and ``g (W + s B A)``, in the weight's dtype.

        The sum is formed in float32 (float64 for such weights), for one expert at a time, and rounded once.
        """
        stacks = (self.weight, self.lora_a, self.lora_b)
        for weight, a, b in zip(*stacks) if self.weight.ndim == 3 else [stacks]:
            wide = torch.promote_types(weight.dtype, torch.float32)
            update = b.to(wide) @ a.to(wide)
            total = torch.add(weight.to(wide), (update.t() if self.transposed else update) * self.scale.to(wide))
            if self.gain is not None:
                total = self.gain.to(wide).unsqueeze(1) * total
            yield weight, total.to(weight.dtype)


@torch.no_grad()
def effective(module: Adapted, name: str) -> Effective:
    """The weight `name` of `module` with its active adapter. A collective call where the weight is distributed."""
    weight = module._parameters[name]
    assert weight is not None
    if isinstance(module, LoRAExpertsModule):
        scale = local(module.lora_scale)[module.adapted_parameters.index(name)]
        factors, transposed = module.factors(name), module._lora_transposed
    else:
        assert isinstance(module, LoRAModule)
        scale, factors = local(module.lora_scale), (module.lora_a, module.lora_b)
        transposed = bool(getattr(module, "weight_is_transposed", False))
    part = local(weight.detach())
    a, b = (_beside(factor, key, weight, transposed) for factor, key in zip(factors, PARAMETERS))
    gained = None
    if isinstance(module, DoRAModule):
        magnitude = _beside(module.lora_magnitude, MAGNITUDE, weight, transposed)
        gained = gain(magnitude, _norms(row_squares(part, a, b, scale), weight))
    return Effective(part, a, b, scale, gained, transposed)


@torch.no_grad()
def set_magnitude(module: DoRAModule) -> None:
    """Write the norms of the weight's rows, without an adapter, into the magnitudes. Collective likewise."""
    weight: Any = module.weight
    part = local(weight.detach())
    norms = _norms(part.to(torch.promote_types(part.dtype, torch.float32)).square().sum(dim=1), weight)
    if is_dtensor(weight):
        from torch.distributed.tensor import DTensor

        placements = adapter_placements(weight.placements)[MAGNITUDE]
        size = torch.Size([module.out_features])
        whole: Any = DTensor.from_local(norms, weight.device_mesh, placements, run_check=False, shape=size, stride=(1,))
        norms = whole.full_tensor()
    fill(module.lora_magnitude, norms)


def _norms(squares: Tensor, weight: Any) -> Tensor:
    """[N], the square roots of what the ranks that hold other columns of the distributed `weight` have together."""
    if is_dtensor(weight):
        for dim, placement in enumerate(weight.placements):
            if getattr(placement, "dim", None) == 1:
                torch.distributed.all_reduce(squares, group=weight.device_mesh.get_group(dim))
    return squares.clamp_min(0.0).sqrt()


def _beside(tensor: Tensor, key: str, weight: Any, transposed: bool) -> Tensor:
    """This rank's part of what stands beside `weight`: the part that its part of the weight needs.

    FSDP shards both over their first dimension, and so A over the ranks R, of which every row of the weight needs all.
    """
    theirs: Any = tensor.detach()
    if not is_dtensor(weight):
        return theirs
    wanted = _placements(weight, transposed)[key]
    return local(theirs if theirs.placements == wanted else theirs.redistribute(placements=wanted))


def _placements(weight: Any, transposed: bool) -> dict[str, tuple[Any, ...]]:
    from torch.distributed.tensor import Shard

    if weight.ndim == 3:
        return expert_placements(weight.placements, transposed=transposed)
    placements = weight.placements
    if transposed:
        placements = [placement if placement.is_replicate() else Shard(1 - placement.dim) for placement in placements]
    return adapter_placements(placements)
