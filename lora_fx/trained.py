"""Modules that are trained whole beside the adapters (`LoRAConfig.modules_to_save`): a head, an embedding, a norm.

They are trained where they stand, so that names and structure stay. What they held at first is kept beside them, with
which `remove` and `disabled` compute what the model computed without adapters.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx import _torch
from lora_fx.dora import quantised
from lora_fx.packed import is_activation_dtype
from lora_fx.placements import distributed, fill, is_dtensor
from lora_fx.targets import clean_path

# Where a module that is trained whole keeps its `Original`.
ATTRIBUTE = "_lora_original"
# Wrappers that replace parameters behind the modules' back.
OWNERS = ("fully_shard", "a parent's fully_shard", "FullyShardedDataParallel")


@dataclass
class Original:
    """What a module's own tensors, by name, held at first; a tensor on the meta device where that is not known.

    What several modules share is one tensor here too.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]


def is_trained(module: nn.Module) -> bool:
    """Whether `module` itself, by its own parameters or buffers, is trained whole."""
    return ATTRIBUTE in module.__dict__


def trained_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Path and module of everything in `model` that is trained whole and has tensors of its own."""
    return [(path, module) for path, module in model.named_modules() if is_trained(module)]


def original(module: nn.Module) -> Original:
    """What `module`, which is trained whole, held at first."""
    kept = module.__dict__[ATTRIBUTE]
    assert isinstance(kept, Original)
    return kept


def check_trainable(model: nn.Module, modules: Mapping[nn.Module, str]) -> None:
    """Raise ValueError, naming the module and the fix, if one of `modules` cannot be trained whole.

    Args:
        model: where they are.
        modules: with their paths.
    """
    trained: dict[int, str] = {}
    for module, path in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            what = f"{path} ({type(module).__name__})"
            if isinstance(parameter, nn.UninitializedParameter):
                raise ValueError(f"{what} is lazy and has no shape yet: run the model once before install")
            if not is_activation_dtype(parameter.dtype) or quantised(parameter):
                raise ValueError(
                    f"{what} cannot be trained whole: its {name} is quantised ({type(parameter.data).__name__}, "
                    f"{parameter.dtype}). Leave it out of modules_to_save, or out of the quantisation"
                )
            trained[id(parameter)] = path
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if id(parameter) in trained and module not in modules:
                raise ValueError(
                    f"{trained[id(parameter)]} shares a parameter with {clean_path(path) or 'the model itself'}, which "
                    f"would be trained as well: name both in modules_to_save, or give it a parameter of its own"
                )


@torch.no_grad()
def keep_originals(modules: Iterable[nn.Module]) -> None:
    """Mark `modules` as trained whole, and keep what they hold now."""
    copies: dict[int, Tensor] = {}

    def kept(tensors: dict[str, Any]) -> dict[str, Tensor]:
        held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        return {name: copies.setdefault(id(tensor), tensor.detach().clone()) for name, tensor in held.items()}

    for module in modules:
        setattr(module, ATTRIBUTE, Original(kept(module._parameters), kept(module._buffers)))


def forget_originals(modules: Iterable[nn.Module]) -> None:
    """Take away what `keep_originals` put there."""
    for module in modules:
        delattr(module, ATTRIBUTE)


def check_originals(model: nn.Module, purpose: str) -> None:
    """Raise ValueError if some module's first values are not known, or not to be had, for `purpose`."""
    for path, module in trained_modules(model):
        where = clean_path(path) or "the model"
        if any(tensor.is_meta for tensor in original(module).parameters.values()):
            raise ValueError(
                f"{where} is trained whole and was on the meta device at install, so that {purpose} does not know what "
                f"it held before: install when the weights are there, or have the model's init_weights fill them. "
                f"(lora_fx.remove(lora_fx.merge(model)) keeps what was trained)"
            )
        wrapper = _torch.data_parallel_wrapper(module)
        if wrapper in OWNERS:
            raise ValueError(
                f"{where} is trained whole (modules_to_save) and sharded by {wrapper}, which owns its parameters: "
                f"{purpose} needs the first ones back. Use a model that is not sharded for that"
            )


@torch.no_grad()
def restore_originals(modules: Iterable[nn.Module]) -> None:
    """Write what `modules` held at first into their tensors, which stay the same ones."""
    for module in modules:
        kept = original(module)
        for held, first in ((module._parameters, kept.parameters), (module._buffers, kept.buffers)):
            for name, value in first.items():
                tensor: Any = held[name]
                value = value.to(tensor.device, tensor.dtype)
                if is_dtensor(value):
                    tensor.copy_(value)
                elif is_dtensor(tensor) or not torch.equal(tensor, value):
                    fill(tensor, value)


@contextlib.contextmanager
def with_originals(model: nn.Module) -> Iterator[None]:
    """Within this context the modules that are trained whole hold what they held at first.

    Others take their tensors' places, instead of their values being changed: a compiled forward may have saved the
    tensors for its backward. They require gradients where the trained ones do, so that nothing recompiles.
    """
    check_originals(model, "lora_fx.disabled")
    modules = [module for _, module in trained_modules(model)]
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]
    stand_ins: dict[int, nn.Parameter] = {}
    try:
        with torch.inference_mode(False):
            for module in modules:
                kept = original(module)
                for name, value in kept.parameters.items():
                    parameter = module._parameters[name]
                    assert parameter is not None
                    if id(value) not in stand_ins:
                        stand_ins[id(value)] = nn.Parameter(_like(parameter, value), parameter.requires_grad)
                    module._parameters[name] = stand_ins[id(value)]
                for name, value in kept.buffers.items():
                    buffer = module._buffers[name]
                    assert buffer is not None
                    module._buffers[name] = _like(buffer, value).clone()  # it may be written to: running statistics
        yield
    finally:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)


@torch.no_grad()
def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """`value` on the device and mesh and in the dtype of `tensor`."""
    value = value.to(tensor.device, tensor.dtype)
    if is_dtensor(tensor) and not is_dtensor(value):
        theirs: Any = tensor
        return distributed(value, theirs.device_mesh, theirs.placements)
    return value
