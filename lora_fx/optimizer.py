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

    A learns with `lr`, B with ``lr * lr_ratio``: at a rate that suits A, B learns too slowly in wide models (section 4
    there). With what else may be trained it is as in PEFT's `create_loraplus_optimizer`: matrices that
    `modules_to_save` names learn with `lr`, vectors with the higher rate, and the biases and norms among them do not
    decay.

    Args:
        model: holds adapters; the groups are `lora_fx.adapter_parameters`, each parameter in one of them.
        lr: learning rate of A, above 0.
        lr_ratio: learning rate of B over that of A, above 0; the paper finds about 16 good. 1 is plain LoRA.
        weight_decay: of all groups but the one of biases and norms, at least 0.

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
    norms = {
        id(p)
        for m in model.modules()
        if isinstance(m, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)
        for p in m.parameters()
    }
    for path, parameter in named_adapter_parameters(model):
        name = path.rpartition(".")[2]
        if name != "lora_b" and parameter.ndim != 1:
            slow.append(parameter)
        elif id(parameter) in norms or "bias" in name:
            undecayed.append(parameter)
        else:
            fast.append(parameter)
    groups = ((slow, lr, weight_decay), (fast, lr * lr_ratio, weight_decay), (undecayed, lr * lr_ratio, 0.0))
    return [{"params": params, "lr": rate, "weight_decay": decay} for params, rate, decay in groups if params]
