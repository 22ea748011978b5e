"""LoRA fine-tuning at the cost of the frozen model: a class swap, and graph rewrites under `torch.compile`."""

from lora_fx import distributed
from lora_fx.adapters import active_adapter, adapter_names, add_adapter, delete_adapter, set_adapter
from lora_fx.compile import compile
from lora_fx.config import LoRAConfig
from lora_fx.converter import Conv1DConverter, Converters, LoRAConverter, ModelConverter, convert
from lora_fx.dora import DoRAModule
from lora_fx.experts import LoRAExpertsModule
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
from lora_fx.rows import adapters_per_row
from lora_fx.state import load_adapter, save_adapter

__all__ = [
    "Conv1DConverter",
    "Converters",
    "DoRAModule",
    "LoRAConfig",
    "LoRAConverter",
    "LoRAExpertsModule",
    "LoRAModule",
    "ModelConverter",
    "Report",
    "active_adapter",
    "adapter_names",
    "adapter_parameters",
    "adapters_per_row",
    "add_adapter",
    "compile",
    "convert",
    "delete_adapter",
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
    "set_adapter",
    "unmerge",
]
