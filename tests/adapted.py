"""What tests of models with adapters do again and again."""

from typing import TypeVar

from torch import nn

import lora_fx
from lora_fx.beside import lay_beside
from lora_fx.linear import LoRAModule

Model = TypeVar("Model", bound=nn.Module)


def installed(model: Model, **config: object) -> Model:
    """With adapters whose B is not zero."""
    lora_fx.install(model, lora_fx.LoRAConfig(**config))  # type: ignore[arg-type]  # by name
    for name, parameter in lora_fx.named_adapter_parameters(model):
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def laid(model: Model) -> Model:
    """As `lora_fx.compile` lays it on a GPU."""
    lay_beside(model, "cpu")
    return model


def linears(model: nn.Module) -> list[LoRAModule]:
    return [module for module in model.modules() if isinstance(module, LoRAModule)]
