"""A float64 copy of a model, to measure others by.

A quantised base is taken for what its stored weight stands for: linears of torchao's and bitsandbytes' classes become
plain ones, and packed weights are dequantised. So int8, int4 and NF4 bases have an exact oracle. Float8 training and
fake quantisation round both operands at each product. The oracle does not: against it every form errs by that rounding.
"""

import copy
import sys
from typing import Any

from torch import Tensor, nn

from lora_fx.adapted import parent_class
from lora_fx.linear import LoRAModule, lora_class

# Packages whose linears compute a rounded `F.linear` of their weight.
_QUANTISERS = ("torchao", "bitsandbytes")
# How tensor subclasses of torchao give back the matrix that they stand for.
_METHODS = ("get_original_weight", "dequantize")


def exact(model: nn.Module) -> nn.Module:
    """A copy of `model` in float64, with quantised linears replaced by plain ones over the weights they stand for.

    Packed weights of classes that are not known here stay as they are, and so does what those classes compute.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = dequantised(module)
        swapped = isinstance(module, LoRAModule)
        parent = parent_class(type(module)) if swapped else type(module)
        if parent.__module__.split(".")[0] in _QUANTISERS:
            module.__class__ = lora_class(nn.Linear) if swapped else nn.Linear
        if weight is not module.weight:
            module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return model.double()


def dequantised(module: nn.Linear) -> Tensor:
    """The matrix [N, K] that the packed weight of `module` stands for; the weight itself where it is not packed."""
    weight: Any = module.weight
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes' Params4bit
        values: Tensor = sys.modules["bitsandbytes.functional"].dequantize_4bit(weight.data, weight.quant_state)
        return values
    if hasattr(weight, "SCB"):  # bitsandbytes' Int8Params, whose scales move to the module at its first forward
        state: Any = module.state
        scales: Tensor = weight.SCB if weight.SCB is not None else state.SCB
        return weight.data.to(scales.dtype) * scales[:, None] / 127
    for name in _METHODS:
        method = getattr(type(weight.data), name, None)
        if method is not None and method is not getattr(Tensor, name, None):
            found: Tensor = method(weight.data)
            return found
    return module.weight
