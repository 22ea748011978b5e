"""GPT-2's linear, transformers' `Conv1D`, as an `nn.Linear`. Imports transformers: see `lora_fx.Conv1DConverter`.

Conv1D      y = x W + b       with W [K, N]; no subclass of nn.Linear, so that "all-linear" goes past it
"""

from torch import nn
from transformers.pytorch_utils import Conv1D


class LinearConv1D(Conv1D, nn.Linear):  # type: ignore[misc]  # both have a parameter `weight`
    """A `Conv1D` that is an `nn.Linear` as well: its parameters and its forward stay, W is [K, N]."""

    weight_is_transposed = True
    """`weight` is [K, N]; read where the adapter is added into it."""

    @property
    def in_features(self) -> int:  # type: ignore[override]  # an attribute there, which nothing assigns here
        """K."""
        return int(self.nx)

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """N."""
        return int(self.nf)


def convert_conv1d(model: nn.Module) -> int:
    """Make every `Conv1D` of `model` a `LinearConv1D`, in place; returns how many there were."""
    found = [module for module in model.modules() if type(module) is Conv1D]
    for module in found:
        module.__class__ = LinearConv1D
    return len(found)
