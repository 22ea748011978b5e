"""What the files of an adapter hold for each linear of a model, and how that gets into the model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lora_fx.adapted import Adapted
from lora_fx.branches import Branch, branches
from lora_fx.config import INITS
from lora_fx.dora import DoRAModule
from lora_fx.install import adapted_linears
from lora_fx.linear import LoRAModule
from lora_fx.peft_files import Factors
from lora_fx.placements import fill
from lora_fx.stored import StoredAdapter
from lora_fx.swap import new_adapter, store


@dataclass(frozen=True)
class Entry:
    """A linear of the model, or a parameter of experts, with what the files hold for it."""

    path: str
    module: nn.Module
    factors: Factors
    alpha: float
    scale: float
    parameter: str | None = None

    @property
    def branch(self) -> Branch:
        """What holds an adapter by now."""
        assert isinstance(self.module, Adapted)
        return Branch(self.path, self.module, self.parameter)


def held(module: LoRAModule, adapter_name: str | None) -> LoRAModule | StoredAdapter:
    """What has the tensors of an adapter that is known to be there."""
    holder = module.holder(adapter_name)
    assert holder is not None
    return holder


def fill_adapter(model: nn.Module, found: Sequence[Entry], values: Sequence[Factors], adapter_name: str | None) -> None:
    """Write into the adapter of that name, in place: `values`, the factors of `found`, and zero everywhere else."""
    loaded = {(entry.module, entry.parameter): (entry, factors) for entry, factors in zip(found, values)}
    for branch in branches(model):
        module = branch.module
        entry, factors = loaded.get((module, branch.parameter), (None, None))
        if not isinstance(module, LoRAModule):
            _fill(branch.factors, factors)
            if entry is not None:
                branch.set_scale(entry.scale)
            continue
        holder = held(module, adapter_name)
        _fill((holder.lora_a, holder.lora_b), factors)
        holder._lora_rank = 0 if factors is None else factors.rank
        if entry is not None:
            with torch.no_grad():
                holder.lora_scale.fill_(entry.scale)
            holder._lora_last_scale = entry.scale
        if isinstance(module, DoRAModule):
            if factors is None or factors.lora_magnitude is None:
                module.reset_magnitude()
            else:
                with torch.no_grad():
                    fill(module.lora_magnitude, factors.lora_magnitude.to(module.lora_magnitude.device))


def store_adapter(
    model: nn.Module, found: Sequence[Entry], values: Sequence[Factors], adapter_name: str, dropout: float
) -> None:
    """Put a new adapter of that name beside the others: `values`, the factors of `found`, and zero everywhere else."""
    loaded = {entry.module: (entry, factors) for entry, factors in zip(found, values)}
    adapters = []
    linears = adapted_linears(model, "which have one adapter: there is no room for another beside it")
    for _, module in linears:
        entry, factors = loaded.get(module, (None, None))
        adapter = new_adapter(
            module,
            rank=0,
            scale=1.0 if entry is None else entry.scale,
            dropout=dropout,
            init=INITS[0],
            dtype=module.lora_a.dtype,
            room=module.lora_a.shape[0],
        )
        _fill((adapter.lora_a, adapter.lora_b), factors)
        adapters.append(replace(adapter, rank=0 if factors is None else factors.rank))
    for (_, module), adapter in zip(linears, adapters):
        store(module, adapter, adapter_name)


def widen(branch: Branch, dtype: torch.dtype) -> None:
    """Make the factors of `branch` parameters of `dtype`."""
    for name in branch.keys.values():
        factor = branch.module._parameters[name]
        assert factor is not None
        if factor.dtype != dtype:
            branch.module.register_parameter(name, nn.Parameter(factor.detach().to(dtype)))


@torch.no_grad()
def _fill(into: tuple[Tensor, Tensor], factors: Factors | None) -> None:
    for target, own in zip(into, (None, None) if factors is None else (factors.lora_a, factors.lora_b)):
        full = torch.zeros(target.shape, dtype=target.dtype, device=target.device)
        if own is not None:
            full[tuple(slice(size) for size in own.shape)] = own
        fill(target, full)
