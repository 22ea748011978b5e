"""Several adapters on one model, by name, of which one is active.

    lora_fx.install(model, config, adapter_name="en", max_rank=16)
    lora_fx.add_adapter(model, "fr", LoRAConfig(rank=4))
    lora_fx.set_adapter(model, "fr")

The active adapter is the linear's own `lora_a`, `lora_b` and `lora_scale`, as where there is only one. `set_adapter`
lets these tensors and those of another adapter change places. Nothing is copied, so an optimizer goes on to train the
parameters that it was given, a backward pass reaches the adapter that its forward pass ran, and compiled code, which
takes parameters as inputs, does not recompile: all adapters of a linear have factors of one shape.
"""

from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from lora_fx import _torch
from lora_fx.config import ALL_LINEAR, LoRAConfig
from lora_fx.install import adapted, adapted_linears, check_not_in_rows, check_not_merged, configs
from lora_fx.linear import LoRAModule
from lora_fx.refusals import check_name, only_one
from lora_fx.swap import new_adapter, store
from lora_fx.targets import Target, clean_path, find_targets

Model = TypeVar("Model", bound=nn.Module)


def add_adapter(model: Model, name: str, config: LoRAConfig) -> Model:
    """Put a fresh adapter beside those that `model` holds. It is not active before `set_adapter`.

    Its factors have the size that `install` gave: where its rank is smaller, the rest is zero. The gradients of that
    rest are zero as well, so it stays zero in training, and is not saved (unless something else writes into it). A
    linear that `config` does not target is left alone by this adapter: all of it is such a rest there.

    Args:
        model: holds adapters.
        name: neither empty nor with a dot, and none of the names of `nn.ModuleDict`'s own attributes.
        config: of the adapter. ``"all-linear"`` means all that hold adapters.

    Returns:
        `model`.

    Raises:
        ValueError: `model` holds no adapters or one of that name; `config` targets a linear without an adapter, or asks
            for more than `install` left room for; FSDP or DDP wrap the model; it is merged. The text says what to do,
            and `model` is as it was.
        TypeError: `config` is no `LoRAConfig`.
    """
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    modules = exchangeable(model)
    check_new_name(model, name)
    if reason := only_one(config):
        raise ValueError(f"{name!r} would be beside another adapter, and {reason}: lora_fx.install it by itself")
    targets = {target.module: target for target in _targets(model, config)}
    with torch.inference_mode(False):  # whose tensors would never train
        adapters = []
        for _, module in modules:
            target = targets.get(module)
            rank, alpha = (0, config.alpha) if target is None else (target.rank, target.alpha)
            adapters.append(
                new_adapter(
                    module,
                    rank=rank,
                    scale=config.scale(max(rank, 1), alpha),
                    dropout=config.dropout,
                    init=config.init,
                    dtype=module.lora_a.dtype,
                    room=module.lora_a.shape[0],
                )
            )
        for (_, module), adapter in zip(modules, adapters):
            store(module, adapter, name)
    return model


def set_adapter(model: Model, name: str) -> Model:
    """Make the adapter of that name the active one: it runs, it is what `adapter_parameters` and `merge` mean.

    Takes effect on compiled code without recompiling, except that an adapter with another dropout has a graph of its
    own in training, and one whose parameters were frozen or thawed has one where gradients are on.

    Parameters stay the objects that they are, with their gradients: an optimizer of one adapter does not see the
    switch. Those of adapters that are not active are no parameters of `model` meanwhile; `adapter_parameters` has them
    by name.

    Args:
        model: holds it.
        name: of the adapter.

    Returns:
        `model`.

    Raises:
        ValueError: there is no adapter of that name, FSDP or DDP wrap the model, or it is merged. `model` is as it was.
    """
    modules = exchangeable(model)
    check_known(model, name)
    for _, module in modules:
        module.activate(name)
    return model


def delete_adapter(model: Model, name: str) -> Model:
    """Take an adapter that is not active out of `model`.

    Args:
        model: holds it.
        name: of the adapter.

    Returns:
        `model`.

    Raises:
        ValueError: there is no adapter of that name, it is active somewhere, FSDP or DDP wrap the model, or it is
            merged. `model` is as it was.
    """
    modules = exchangeable(model)
    check_known(model, name)
    for path, module in modules:
        if module._lora_active == name:
            raise ValueError(
                f"{name!r} is active in {_shown(path)}: lora_fx.set_adapter to another first, or lora_fx.remove(model) "
                f"to take all adapters out"
            )
    for _, module in modules:
        del module.lora_adapters[name]
        module._lora_stack = None
    return model


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that `model` runs.

    Raises:
        ValueError: `model` holds no adapters, or parts of it run different ones.
    """
    (first, module), *others = adapted(model)
    for path, other in others:
        if other._lora_active != module._lora_active:
            raise ValueError(
                f"{_shown(first)} runs {module._lora_active!r} and {_shown(path)} runs {other._lora_active!r}: "
                f"lora_fx.set_adapter(model, name) on the whole model"
            )
    return module._lora_active


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters of `model`, sorted.

    Raises:
        ValueError: `model` holds no adapters.
    """
    return sorted({name for _, module in adapted(model) for name in (module._lora_active, *module.lora_adapters)})


def exchangeable(model: nn.Module) -> list[tuple[str, LoRAModule]]:
    """As `install.adapted`, where adapters may be put in, taken out and switched.

    Raises:
        ValueError: they may not.
    """
    check_not_merged(model)
    check_not_in_rows(model)
    for path, module in model.named_modules():
        wrapper = _torch.data_parallel_wrapper(module)
        if wrapper is not None:
            raise ValueError(
                f"{_shown(path)} is wrapped by {wrapper}, which keeps the parameters that it found: add and set "
                f"adapters before wrapping. lora_fx.load_adapter(model, folder) loads values into the active one"
            )
    return adapted_linears(model, "which have one adapter: there is no other to add or to switch to")


def check_known(model: nn.Module, name: str) -> None:
    """Raise ValueError if a linear of `model` has no adapter called `name`."""
    for path, module in adapted(model):
        if module.holder(name) is None:
            names = ", ".join(map(repr, sorted((module._lora_active, *module.lora_adapters))))
            raise ValueError(f"{_shown(path)} has no adapter called {name!r}: it has {names}")


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise if `model` has an adapter called `name`, or cannot have one."""
    check_name(name)
    for config in configs(model):
        if reason := only_one(config):
            raise ValueError(f"{reason}, and {name!r} would be another one: use a model for each")
    for path, module in adapted(model):
        if module.holder(name) is not None:
            raise ValueError(f"{_shown(path)} has an adapter called {name!r} already: lora_fx.delete_adapter it first")


def _targets(model: nn.Module, config: LoRAConfig) -> Iterator[Target]:
    for target in find_targets(model, config):
        if not isinstance(target.module, LoRAModule):
            if config.target_modules == ALL_LINEAR:
                continue
            raise ValueError(
                f"{_shown(target.path)} holds no adapter to put another one beside: lora_fx.install with a "
                f"configuration that targets the linears of all adapters"
            )
        room = target.module.lora_a.shape[0]
        if target.rank > room:
            raise ValueError(
                f"{_shown(target.path)} has room for rank {room}, not {target.rank}: "
                f"lora_fx.install(model, config, max_rank={target.rank})"
            )
        yield target


def _shown(path: str) -> str:
    return clean_path(path) or "the model itself"
