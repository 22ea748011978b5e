"""LoRA fine-tuning at the cost of the frozen model: a class swap, and graph rewrites under `torch.compile`."""

from lora_fx import distributed
from lora_fx.compile import compile
from lora_fx.config import LoRAConfig
from lora_fx.converter import Converters, LoRAConverter, ModelConverter, convert
from lora_fx.dora import DoRAModule
from lora_fx.explain import Report, explain
from lora_fx.install import (
    adapter_parameters,
    disabled,
    freeze,
    install,
    is_installed,
    named_adapter_parameters,
    remove,
)
from lora_fx.linear import LoRAModule
from lora_fx.merge import merge, unmerge
from lora_fx.optimizer import parameter_groups
from lora_fx.state import load_adapter, save_adapter

__all__ = [
    "Converters",
    "DoRAModule",
    "LoRAConfig",
    "LoRAConverter",
    "LoRAModule",
    "ModelConverter",
    "Report",
    "adapter_parameters",
    "compile",
    "convert",
    "disabled",
    "distributed",
    "explain",
    "freeze",
    "install",
    "is_installed",
    "load_adapter",
    "merge",
    "named_adapter_parameters",
    "parameter_groups",
    "remove",
    "save_adapter",
    "unmerge",
]
