"""Modules whose weights and factors lie together in memory, as `lora_fx.compile` lays them on a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.beside import lay_beside
from tests.passes import on_gpu
from tests.passes.harness import Case
from tests.passes.modules import Block, Mlp


def laid(module: nn.Module) -> nn.Module:
    lay_beside(module, "cpu")
    return module


def checkpointed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)


def by_graphs(case: Case, module: nn.Module, **options: Any) -> Any:
    """`on_gpu.by_graphs` of a copy, which has memory of its own."""
    return on_gpu.by_graphs(case, laid(module), **options)


class WideBlock(nn.Module):
    """A block whose mlp is as wide as one is."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__()
        self.block = Block(k)
        self.block.mlp = Mlp(k, n)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)
