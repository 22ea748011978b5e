"""A merged model refuses `load_state_dict` as a whole, before a part of it is loaded."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lora_fx.adapted import Adapted
from lora_fx.targets import clean_path


def guard(model: nn.Module) -> None:
    """Have every module of `model` that holds merged ones look before it loads: each can be asked to load by itself."""
    for module in model.modules():
        if any(isinstance(part, Adapted) for part in module.modules()):
            module.register_load_state_dict_pre_hook(check_loading)


def unguard(model: nn.Module) -> None:
    """Undo `guard`. By what the hooks are, because a copy of a model has the hooks, but no handles of its own."""
    for module in model.modules():
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is check_loading]:
            del hooks[key]


def check_loading(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Raise ValueError if `state_dict` has something for a merged linear, or merged experts, of `module`."""
    keys = [clean_path(key) for key in state_dict]
    for path, part in module.named_modules(prefix=prefix.rstrip(".")):
        if isinstance(part, Adapted) and part._lora_merged is not None:
            below = clean_path(path)
            if any(key.startswith(f"{below}.".removeprefix(".")) for key in keys):
                raise ValueError(f"{below or 'the model'} is merged: call lora_fx.unmerge(model) first")
