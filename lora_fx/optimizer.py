"""What an optimizer gets: LoRA+ gives B a higher learning rate than A."""

import math
from typing import Any

from torch import nn

from lora_fx.install import adapter_parameters, named_adapter_parameters


def parameter_groups(
    model: nn.Module, *, lr: float, lr_ratio: float = 16.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The adapters of `model` in an optimizer's parameter groups, with LoRA+'s learning rates (arXiv:2402.12354).

        torch.optim.AdamW(lora_fx.parameter_groups(model, lr=2e-4))

    A learns with `lr`, B and DoRA's magnitudes with ``lr * lr_ratio``: at a rate that suits A, B learns too slowly in
    wide models (section 4 there). What `modules_to_save` names is grouped as by PEFT's `create_loraplus_optimizer`:
    matrices learn with `lr`, vectors (biases, norms) with the higher rate and without decay.

    Args:
        model: holds adapters; the groups are `lora_fx.adapter_parameters`, each parameter in one of them.
        lr: learning rate of A, above 0.
        lr_ratio: learning rate of B over that of A, above 0; the paper finds about 16 good. 1 is plain LoRA.
        weight_decay: of all groups but that of vectors, at least 0.

    Returns:
        Dictionaries with ``params``, ``lr`` and ``weight_decay``, empty groups left out.

    Raises:
        ValueError: `model` holds no adapters, or a number is out of range.
    """
    for name, value in (("lr", lr), ("lr_ratio", lr_ratio)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"weight_decay must be finite and at least 0, got {weight_decay!r}")
    adapter_parameters(model)  # which warns of what is trained beside them
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for path, parameter in named_adapter_parameters(model):
        name = path.rpartition(".")[2]
        if name.endswith(("lora_b", "lora_magnitude")):  # of experts there is one for each parameter
            fast.append(parameter)
        elif parameter.ndim == 1:
            undecayed.append(parameter)
        else:
            slow.append(parameter)
    groups = ((slow, lr, weight_decay), (fast, lr * lr_ratio, weight_decay), (undecayed, lr * lr_ratio, 0.0))
    return [{"params": params, "lr": rate, "weight_decay": decay} for params, rate, decay in groups if params]
