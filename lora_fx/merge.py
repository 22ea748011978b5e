"""Weights with their adapters added in, for models that train no more: ``W + s B A`` in place of W, and back.

    lora_fx.merge(model)                   # computes what it computed, from the weights alone
    lora_fx.unmerge(model)                 # to the bit what it was
    lora_fx.remove(lora_fx.merge(model))   # a model of the original classes, to export

The `lora_scale` of what is merged is zero, and DoRA's magnitudes are the norms of the rows, so that branches add
nothing, compiled or not, and so that a `state_dict` of a merged model is the function that it computes.

Of distributed weights each rank merges its part. A rank that cannot tells the others, and none merges anything.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_fx import _torch
from lora_fx.adapted import Adapted
from lora_fx.distributed import largest_mesh, together
from lora_fx.dora import DoRAModule
from lora_fx.effective import effective, set_magnitude
from lora_fx.install import adapted, check_not_in_rows
from lora_fx.merge_guard import guard, unguard
from lora_fx.packed import is_activation_dtype
from lora_fx.placements import fill, is_dtensor, local
from lora_fx.targets import clean_path
from lora_fx.trained import trained_modules

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class Merged:
    """What a merged linear, or merged experts, need to be as before.

    Attributes:
        weights: the base weights to the bit, by name; None if they were not to be kept.
        scale: the buffer `lora_scale`.
        trained: which of the adapter's parameters required gradients.
        magnitude: the values of `lora_magnitude` [N], where there is one.
    """

    weights: dict[str, Tensor] | None
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

    On several ranks, where weights are distributed (tensor parallelism, `fully_shard`), all ranks of their mesh call
    this together, and each merges its part. `remove` is for models that `fully_shard` did not wrap; to export one that
    it did, take what does not say ``lora_`` of the merged model's full `state_dict`.

    Args:
        model: holds adapters.
        keep: keep the weights that are overwritten, as much memory again, so that `unmerge` gives them back.

    Returns:
        `model`.

    Raises:
        ValueError: `model` holds no adapters, one is merged already or disabled, or one cannot be merged: its weight is
            quantised, a flat shard of FSDP1, on the meta device or shared with another module, or the sum is not
            finite. The text names the module, and `model` is as it was.
        RuntimeError: another rank raised; `model` is as it was on all of them.
    """
    modules = adapted(model)
    check_not_in_rows(model)
    _torch.reshard(model)
    mesh = largest_mesh(model)
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    with together(mesh):  # all of them before the first change
        for path, module in modules:
            for name in module.adapted_parameters:
                _check(_where(path, name), module, name, holders)
    weights = [
        (path, module, [effective(module, name) for name in module.adapted_parameters]) for path, module in modules
    ]
    with together(mesh):
        for path, module, parts in weights:
            for name, part in zip(module.adapted_parameters, parts):
                if not all(total.isfinite().all() for _, total in part.sums()):
                    raise ValueError(
                        f"{_where(path, name)}: weight and adapter add up to NaN or infinity in {part.weight.dtype}"
                    )
    records = [_record(module, keep) for _, module, _ in weights]  # which may want more memory than there is
    for (_, module, parts), record in zip(weights, records):
        module._lora_merged = record
        for part in parts:
            for weight, total in part.sums():
                weight.copy_(total)
        # Another tensor, not another value: a compiled forward may have saved this one for its backward.
        module.lora_scale = torch.zeros_like(module.lora_scale)
        if isinstance(module, DoRAModule):
            set_magnitude(module)  # the rows have their lengths by now: the gain is 1
        for name in module.lora_parameters:
            _parameter(module, name).requires_grad_(False)
    for parameter in _trained_whole(model):
        parameter.requires_grad_(False)
    guard(model)
    return model


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Undo `merge`: the weights are to the bit what they were, and the adapters run and train again.

    On several ranks all call it together, as for `merge`.

    Returns:
        `model`.

    Raises:
        ValueError: `model` holds no merged adapter, or was merged with ``keep=False``. `model` is as it was.
    """
    merged = [(path, module, module._lora_merged) for path, module in adapted(model) if module._lora_merged is not None]
    if not merged:
        raise ValueError(f"{type(model).__name__} is not merged")
    for path, _, record in merged:
        if record.weights is None:
            raise ValueError(f"{clean_path(path) or 'the model'} was merged with keep=False: its weight is gone")
    _torch.reshard(model)
    for _, module, record in merged:
        for name, weight in record.weights.items():
            _put_back(_parameter(module, name), weight)
        module.lora_scale = record.scale.to(module.lora_scale.device)  # the model may have been moved in between
        if isinstance(module, DoRAModule):
            _put_back(module.lora_magnitude, record.magnitude)
        for name, trained in zip(module.lora_parameters, record.trained):
            _parameter(module, name).requires_grad_(trained)
        module._lora_merged = None
    for parameter in _trained_whole(model):
        parameter.requires_grad_(True)
    unguard(model)
    return model


def _record(module: Adapted, keep: bool) -> Merged:
    return Merged(
        weights={n: _parameter(module, n).detach().clone() for n in module.adapted_parameters} if keep else None,
        scale=module.lora_scale,
        trained=tuple(_parameter(module, name).requires_grad for name in module.lora_parameters),
        magnitude=module.lora_magnitude.detach().clone() if isinstance(module, DoRAModule) else None,
    )


def _where(path: str, name: str) -> str:
    """A linear by its path; a parameter of experts by its own."""
    return clean_path(path if name == "weight" else f"{path}.{name}".removeprefix(".")) or "the model"


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    parameter = module._parameters[name]
    assert parameter is not None
    return parameter


def _put_back(parameter: nn.Parameter, kept: Any) -> None:
    """Write what was kept of `parameter`, which may have been moved, converted or distributed since."""
    if is_dtensor(kept):
        local(parameter.detach()).copy_(local(kept))
    else:
        fill(parameter, kept.to(parameter.device))


def _trained_whole(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for _, module in trained_modules(model) for parameter in module.parameters(recurse=False)]


def _check(where: str, module: Adapted, name: str, holders: Counter[int]) -> None:
    weight: Any = _parameter(module, name)
    if module._lora_merged is not None:
        raise ValueError(f"{where} is merged already")
    if module.lora_enabled is module._lora_disabled or (module._lora_base is not None and module._lora_base.shown):
        raise ValueError(f"{where} is disabled: merge outside of lora_fx.disabled, where its adapter counts")
    mesh = getattr(weight, "device_mesh", None)
    for factor in (_parameter(module, key) for key in module.lora_parameters):
        if is_dtensor(weight) != is_dtensor(factor) or mesh != getattr(factor, "device_mesh", None):
            raise ValueError(
                f"{where} and its adapter are not distributed over one mesh, so that no rank has all that its part of "
                f"the sum takes: save the adapter, load it in one process, and merge there"
            )
    own = local(weight.detach())
    # A class of torch.distributed's has the numbers of several ranks, in tests that simulate them.
    plain = type(own) is Tensor or type(own).__module__.startswith("torch.distributed.")
    if not plain or not is_activation_dtype(own.dtype):
        raise ValueError(
            f"{where} has a weight of {type(own).__name__} {own.dtype}, which cannot hold the sum: "
            "load the adapter on the unquantised model, and merge there"
        )
    if own.is_meta:
        raise ValueError(f"{where} is on the meta device: it has no numbers to merge yet")
    if holders[id(weight)] > 1:
        raise ValueError(f"{where} shares its weight with another module, which would change as well")
    if weight.ndim != (2 if isinstance(module, nn.Linear) else 3):
        raise ValueError(
            f"{where} is a flat shard of FullyShardedDataParallel: merge within "
            f"FullyShardedDataParallel.summon_full_params(model)"
        )
