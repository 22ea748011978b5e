"""The low-rank branches of a model one by one: of a linear, or of one parameter of experts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.adapted import Adapted
from lora_fx.experts import A, B, LoRAExpertsModule
from lora_fx.linear import PARAMETERS
from lora_fx.placements import local
from lora_fx.targets import clean_path


@dataclass(frozen=True)
class Branch:
    """One branch; `path` is the linear's, or the parameter's, without what wrappers put into paths."""

    path: str
    module: Adapted
    parameter: str | None = None

    @property
    def names(self) -> tuple[str, str]:
        """What A and B are called in the module."""
        a, b = PARAMETERS if self.parameter is None else (self.parameter + A, self.parameter + B)
        return a, b

    @property
    def keys(self) -> dict[str, str]:
        """What the tensors of the adapter are called in files' `Factors` and in the module."""
        if self.parameter is None:
            return {name: name for name in self.module.lora_parameters}
        return dict(zip(PARAMETERS, self.names))

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [R, K] and B [N, R]; or A [E, R, K] and B [E, N, R]."""
        a, b = (self.module._parameters[name] for name in self.names)
        assert a is not None and b is not None
        return a, b

    @property
    def rank(self) -> int:
        """R."""
        return self.factors[1].shape[-1]

    def shapes(self, rank: int) -> list[list[int]]:
        """What A and B of this rank measure, by what they adapt."""
        stack, n, k = sizes(self.module, self.parameter)
        return [[*stack, rank, k], [*stack, n, rank]]

    def holder(self, adapter: str | None) -> Any:
        """What has the tensors and numbers of an adapter that is known to be there; of the active one if None."""
        holder = self.module.holder(adapter)
        assert holder is not None
        return holder

    @property
    def scale(self) -> Tensor:
        """0-d, this rank's, of the active adapter; writing into it changes the scale."""
        return self.scale_of(self.module)

    def scale_of(self, holder: Any) -> Tensor:
        """0-d, this rank's, of the adapter that `holder` has."""
        scale = local(holder.lora_scale)
        return scale if self.parameter is None else scale[self._index]

    @torch.no_grad()
    def set_scale(self, value: float) -> None:
        """Also for a later `reset_adapters`."""
        if self.parameter is None:
            self.module.lora_scale.fill_(value)
            self.module._lora_last_scale = value
        else:
            self.scale.fill_(value)
            self.module._lora_last_scale[self._index] = value

    @property
    def _index(self) -> int:
        assert isinstance(self.module, LoRAExpertsModule) and self.parameter is not None
        return self.module.adapted_parameters.index(self.parameter)


def sizes(module: nn.Module, parameter: str | None) -> tuple[tuple[int, ...], int, int]:
    """The stack (E,) or (), N and K of a linear, or of a parameter of experts."""
    if parameter is None:
        assert isinstance(module, nn.Linear)  # whose weight may be packed: its shape says nothing
        return (), module.out_features, module.in_features
    weight = module._parameters[parameter]
    assert weight is not None
    count, *rest = weight.shape
    n, k = reversed(rest) if getattr(module, "is_transposed", False) else rest
    return (count,), n, k


def branches(model: nn.Module) -> list[Branch]:
    """Every branch of `model`, in the order of ``model.named_modules()``."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, LoRAExpertsModule):
            names = module.adapted_parameters
            found += [Branch(clean_path(f"{path}.{name}".removeprefix(".")), module, name) for name in names]
        elif isinstance(module, Adapted):
            found.append(Branch(clean_path(path), module))
    return found
