"""LoRA as others write it: one module whose forward is a function of its parameters."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Form = Callable[[Any, Tensor], Any]
Shapes = dict[str, tuple[int, ...]]
ONE: Shapes = {"a": (4, 48), "b": (40, 4)}


class HandWritten(nn.Module):
    """A `w` [N, K], frozen unless it is `trained`, and trainable parameters of the given names and shapes.

    Parameters start with deviation 0.1, so that a branch has a tenth of the base's size.
    """

    w: nn.Parameter
    a: nn.Parameter
    b: nn.Parameter

    def __init__(
        self, form: Form, dtype: torch.dtype = torch.float32, shapes: Shapes | None = None, trained: bool = False
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.form = form
        for name, shape in {"w": (40, 48), **(shapes or ONE)}.items():
            value = (torch.randn(shape, generator=generator) * 0.1).to(dtype)
            self.register_parameter(name, nn.Parameter(value, requires_grad=trained or name != "w"))

    def forward(self, x: Tensor) -> Any:
        return self.form(self, x)
