"""What `install` refuses, before it changes anything."""

import inspect
from typing import Any, cast

from torch import Tensor, nn

from lora_fx import _torch
from lora_fx.adapted import BUFFERS, Adapted
from lora_fx.config import CHANGES_BASE, LoRAConfig
from lora_fx.dora import MAGNITUDE, DoRAModule, check_dora
from lora_fx.experts import EXPERT_ATTRIBUTES, A, B, experts_class
from lora_fx.linear import ATTRIBUTES, PARAMETERS, LoRAModule, lora_class
from lora_fx.packed import is_activation_dtype
from lora_fx.targets import Target


def shown(path: str) -> str:
    """The path of a module, or a word for the model."""
    return path or "the model itself"


def check_model(model: nn.Module, record: str) -> None:
    """Refuse models in a state in which adapters would be missed, whatever the configuration says.

    Args:
        model: to install on.
        record: the attribute in which an installation is recorded.

    Raises:
        ValueError: naming the module, and the fix.
    """
    for path, module in model.named_modules():
        if isinstance(module, Adapted) or record in module.__dict__:
            raise ValueError(f"{shown(path)} holds adapters already: call lora_fx.remove(model) before a new install")
        if _torch.is_compiled(module):
            raise ValueError(
                f"{shown(path)} is compiled already: install on the model as it was before torch.compile, and compile "
                f"after; lora_fx.compile(model, config) does both"
            )
        wrapper = _torch.data_parallel_wrapper(module)
        if wrapper is not None:
            raise ValueError(
                f"{shown(path)} is wrapped by {wrapper} already: install first, then wrap "
                f"(the order is: quantise, install, parallelise, shard, compile)"
            )


def check_experts(target: Target, config: LoRAConfig) -> None:
    """Refuse a parameter on which adapters could not work."""
    module, name = target.module, cast(str, target.parameter)
    what = f"{target.path} (of {type(module).__name__})"
    fix = "leave it out of target_parameters"
    if config.use_dora or config.init in CHANGES_BASE:
        raise ValueError(
            f"{what}: experts have plain adapters: leave use_dora out, and take an init that leaves weights alone"
        )
    weight: Any = module._parameters[name]
    if not is_activation_dtype(weight.dtype):
        raise ValueError(f"{what} is {weight.dtype}, a packed form whose products are not known here: {fix}")
    if _torch.has_instance_forward(module):
        raise ValueError(f"{what} has a `forward` of its own on the instance, which would hide the adapters': {fix}")
    taken = [n for n in (name + A, name + B, *BUFFERS, *EXPERT_ATTRIBUTES) if hasattr(module, n)]
    if taken:
        raise ValueError(f"{what}: its module has an attribute called {taken[0]} already: {fix}")
    try:
        experts_class(type(module))
    except Exception as error:
        raise ValueError(f"{what}: its module has a class that refuses to be subclassed ({error}): {fix}") from error


def check_linear(path: str, module: nn.Linear, config: LoRAConfig) -> None:
    """Raise ValueError, naming the fix, for a linear on which an adapter could not work, or would never run."""
    what = f"{shown(path)} ({type(module).__name__})"
    fix = f"leave it out with exclude_modules=[{path!r}]"
    if any(isinstance(parameter, nn.UninitializedParameter) for parameter in module.parameters()):
        raise ValueError(f"{what} is lazy and has no shape yet: run the model once before install, or {fix}")
    if _torch.has_instance_forward(module):
        raise ValueError(f"{what} has a `forward` of its own on the instance, which would hide the adapter's: {fix}")
    if getattr(module, "weight_is_transposed", False) and (config.use_dora or config.init in CHANGES_BASE):
        raise ValueError(f"{what} keeps its weight [K, N], which use_dora and init={CHANGES_BASE} do not read: {fix}")
    extra = _extra_arguments(type(module))
    if extra:
        raise ValueError(f"{what} takes more than its input in `forward` ({', '.join(extra)}): {fix}")
    if type(module).__module__.startswith("torch.ao.nn.intrinsic"):
        raise ValueError(f"{what} applies more than a linear map; an adapter would be added after that: {fix}")
    if config.use_dora:
        check_dora(what, module, fix)
    taken = [name for name in (*PARAMETERS, MAGNITUDE, *BUFFERS, *ATTRIBUTES) if hasattr(module, name)]
    if taken:
        raise ValueError(f"{what} has an attribute called {taken[0]} already: {fix}")
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype.is_complex:
        raise ValueError(f"{what} has a complex weight, for which adapters are not defined here: {fix}")
    try:
        lora_class(type(module), DoRAModule if config.use_dora else LoRAModule)
    except Exception as error:
        raise ValueError(f"{what} has a class that refuses to be subclassed ({error}): {fix}") from error


def _extra_arguments(cls: type[nn.Linear]) -> list[str]:
    """The names of the parameters of ``cls.forward`` beside self and the input."""
    try:
        signature = inspect.signature(cls.forward)
    except ValueError:  # compiled code does not say
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, parameter in signature.parameters.items() if parameter.kind not in variadic]
    return named[2:]


def only_one(config: LoRAConfig) -> str:
    """Why a model with this configuration holds no other adapter; empty if it may."""
    if config.use_dora:
        return "use_dora is for a model with one adapter"
    if config.init in CHANGES_BASE:
        return f"init={config.init!r} changes the base, which suits one adapter"
    return "modules_to_save is for a model with one adapter" if config.modules_to_save else ""


def check_name(name: str) -> None:
    """Raise if an adapter cannot have this name, which becomes part of keys and an attribute of a `nn.ModuleDict`."""
    if not isinstance(name, str):
        raise TypeError(f"the name of an adapter is a str, got {name!r}")
    if not name or "." in name:
        raise ValueError(f"an adapter cannot be called {name!r}: the name is part of dotted paths")
    if hasattr(nn.ModuleDict(), name):
        raise ValueError(f"an adapter cannot be called {name!r}: nn.ModuleDict has an attribute of that name")
