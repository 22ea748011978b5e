"""Weights with their adapters added in, for models that train no more: ``W + s B A`` in place of W, and back.

    lora_fx.merge(model)                   # computes what it computed, from the weights alone
    lora_fx.unmerge(model)                 # to the bit what it was
    lora_fx.remove(lora_fx.merge(model))   # a model of the original classes, to export

A merged linear's `lora_scale` is zero, and DoRA's magnitudes are the norms of its rows, so that its branch adds
nothing, compiled or not, and so that a `state_dict` of a merged model is the function that it computes.
"""

from collections import Counter
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_fx.dora import DoRAModule
from lora_fx.install import adapted, adapted_linears, check_not_in_rows
from lora_fx.linear import LoRAModule
from lora_fx.packed import is_activation_dtype
from lora_fx.placements import is_dtensor
from lora_fx.targets import clean_path
from lora_fx.trained import trained_modules

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Merged:
    """What a merged linear needs to be as before.

    Attributes:
        weight: the base weight [N, K] to the bit, or None if it was not to be kept.
        scale: the buffer `lora_scale`.
        trained: which of the adapter's parameters required gradients.
        magnitude: the values of `lora_magnitude` [N], where there is one.
    """

    weight: Tensor | None
    scale: Tensor
    trained: tuple[bool, ...]
    magnitude: Tensor | None


@torch.no_grad()
def merge(model: Model, *, keep: bool = True) -> Model:
    """Add every adapter of `model` into the weight that it adapts, in place.

    The sum is formed in float32 (float64 for such weights) and rounded once to the weight's dtype. No parameter changes
    its identity. Until `unmerge` the adapters, and what `modules_to_save` names, require no gradients, so that
    training fails instead of doing nothing (a compiled model has a graph for each of the two states, and compiles each
    once), and what would mix merged and unmerged numbers is refused: `disabled`, `freeze`, `save_adapter`,
    `load_adapter`, `load_state_dict`.

    Dropout is gone with the branch: in training mode, too, a merged model computes what it computes in evaluation.

    Args:
        model: holds adapters.
        keep: keep the weights that are overwritten, as much memory again, so that `unmerge` gives them back.

    Returns:
        `model`.

    Raises:
        ValueError: `model` holds no adapters, one is merged already or disabled, or one cannot be merged: its weight is
            quantised, sharded, on the meta device or shared with another module, or the sum is not finite. The text
            names the module, and `model` is as it was.
    """
    modules = adapted_linears(model, "which cannot be merged here: save the adapter, and merge it in PEFT")
    check_not_in_rows(model)
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for path, module in modules:  # all of them before the first change
        where = clean_path(path) or "the model"
        _check(where, module, holders)
        if not _sum(module).isfinite().all():
            raise ValueError(f"{where}: weight and adapter add up to NaN or infinity in {module.weight.dtype}")
    for _, module in modules:
        total, parameters = _sum(module), _parameters(module)
        module._lora_merged = Merged(
            weight=module.weight.detach().clone() if keep else None,
            scale=module.lora_scale,
            trained=tuple(parameter.requires_grad for parameter in parameters),
            magnitude=module.lora_magnitude.detach().clone() if isinstance(module, DoRAModule) else None,
        )
        module.weight.copy_(total)
        # Another tensor, not another value: a compiled forward may have saved this one for its backward.
        module.lora_scale = torch.zeros_like(module.lora_scale)
        if isinstance(module, DoRAModule):
            module.reset_magnitude()  # the rows have their lengths by now: the gain is 1
        for parameter in parameters:
            parameter.requires_grad_(False)
    for parameter in _trained_whole(model):
        parameter.requires_grad_(False)
    return model


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Undo `merge`: the weights are to the bit what they were, and the adapters run and train again.

    Returns:
        `model`.

    Raises:
        ValueError: `model` holds no merged adapter, or was merged with ``keep=False``. `model` is as it was.
    """
    merged = [(path, module, module._lora_merged) for path, module in adapted(model) if isinstance(module, LoRAModule)]
    merged = [(path, module, record) for path, module, record in merged if record is not None]
    if not merged:
        raise ValueError(f"{type(model).__name__} is not merged")
    for path, _, record in merged:
        if record.weight is None:
            raise ValueError(f"{clean_path(path) or 'the model'} was merged with keep=False: its weight is gone")
    for _, module, record in merged:
        assert record.weight is not None
        module.weight.copy_(record.weight)
        module.lora_scale = record.scale.to(module.lora_scale.device)  # the model may have been moved in between
        if isinstance(module, DoRAModule):
            module.lora_magnitude.copy_(record.magnitude)
        for parameter, trained in zip(_parameters(module), record.trained):
            parameter.requires_grad_(trained)
        module._lora_merged = None
    for parameter in _trained_whole(model):
        parameter.requires_grad_(True)
    return model


def _parameters(module: LoRAModule) -> list[nn.Parameter]:
    return [getattr(module, name) for name in module.lora_parameters]


def _trained_whole(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, module in trained_modules(model) for parameter in module.parameters(recurse=False)]


def _check(where: str, module: LoRAModule, holders: Counter[int]) -> None:
    weight = module.weight
    if module._lora_merged is not None:
        raise ValueError(f"{where} is merged already")
    if module.lora_enabled is module._lora_disabled or (module._lora_base is not None and module._lora_base.shown):
        raise ValueError(f"{where} is disabled: merge outside of lora_fx.disabled, where its adapter counts")
    if is_dtensor(weight) or is_dtensor(module.lora_a):
        raise ValueError(f"{where} is sharded: save the adapter, load it in one process, and merge there")
    if type(weight.data) is not Tensor or not is_activation_dtype(weight.dtype):
        raise ValueError(
            f"{where} has a weight of {type(weight.data).__name__} {weight.dtype}, which cannot hold the sum: "
            "load the adapter on the unquantised model, and merge there"
        )
    if weight.is_meta:
        raise ValueError(f"{where} is on the meta device: it has no numbers to merge yet")
    if holders[id(weight)] > 1:
        raise ValueError(f"{where} shares its weight with another module, which would change as well")


def _sum(module: LoRAModule) -> Tensor:
    """``W + s B A`` [N, K], DoRA's with its rows scaled, in the weight's dtype."""
    return module.effective_weight().to(module.weight.dtype)
