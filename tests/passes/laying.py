"""Modules whose weights and factors lie together in memory, as `lora_fx.compile` lays them on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.beside import lay_beside
from tests.passes import on_gpu
from tests.passes.harness import Case


def laid(module: nn.Module) -> nn.Module:
    lay_beside(module, "cpu")
    return module


def checkpointed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)


def by_graphs(case: Case, module: nn.Module, **options: Any) -> Any:
    """`on_gpu.by_graphs` of a copy, which has memory of its own."""
    return on_gpu.by_graphs(case, laid(module), **options)
