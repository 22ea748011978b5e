"""What adapter files hold of the modules that are trained whole: their tensors, by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.adapted import BUFFERS
from lora_fx.linear import PARAMETERS, LoRAModule
from lora_fx.peft_files import PREFIX, AdapterFiles
from lora_fx.placements import fill, gathered
from lora_fx.targets import clean_path
from lora_fx.trained import original, trained_modules


@dataclass(frozen=True)
class TrainedEntry:
    """A tensor of a module that is trained whole, and what the files hold for it."""

    path: str
    module: nn.Module
    name: str
    value: Tensor

    @property
    def tensor(self) -> Tensor:
        """The tensor as the module has it now."""
        return _own_tensors(self.module)[self.name]


def gathered_trained(model: nn.Module) -> dict[str, Tensor]:
    """Global values, on the CPU and in memory of their own, of all that is trained whole; a collective call.

    By full name. What is on the meta device stays there.
    """
    found: dict[str, Tensor] = {}
    for path, module in trained_modules(model):
        for name, tensor in _own_tensors(module).items():
            full = gathered(tensor.detach())
            found[_joined(clean_path(path), name)] = full if full.is_meta else full.to("cpu", copy=True).contiguous()
    return found


def check_trained(model: nn.Module, values: Mapping[str, Tensor]) -> list[str]:
    """The paths of the modules to name in `modules_to_save`, after a look at what is to be written.

    Raises:
        ValueError: a value is on the meta device, a flat shard, or not finite.
    """
    paths: list[str] = []
    for raw, module in trained_modules(model):
        path = clean_path(raw)
        for name in _own_tensors(module):
            value, shape = values[_joined(path, name)], {**original(module).parameters, **original(module).buffers}
            if value.is_meta:
                raise ValueError(f"{path} is on the meta device: there are no values to save yet")
            if name in module._parameters and value.shape != shape[name].shape:
                raise ValueError(
                    f"{path}.{name} is {list(value.shape)} and not {list(shape[name].shape)}: inside "
                    f"FullyShardedDataParallel, save within FullyShardedDataParallel.summon_full_params(model)"
                )
            if not torch.isfinite(value).all():
                raise ValueError(f"{path}.{name} holds NaN or infinity: nothing was written, so the last files stay")
        if not any(path.startswith(known + ".") for known in paths):
            paths.append(path)
    return paths


def match_trained(model: nn.Module, files: AdapterFiles) -> list[TrainedEntry]:
    """The tensors of `model` that the files have values for, which must be all of the modules that they name.

    Raises:
        ValueError: the model lacks one, or has one of another shape; the files lack one.
    """
    modules = {clean_path(path): module for path, module in model.named_modules(remove_duplicate=False)}
    entries = []
    for key, value in files.trained.items():
        path, _, name = key.rpartition(".")
        tensor = _own_tensors(modules[path]).get(name) if path in modules else None
        if tensor is None:
            raise ValueError(
                f"{files.tensors}: the model has no {key}: load the adapter into the model it was trained on, and not "
                f"into a part of it or a module around it"
            )
        if tensor.shape != value.shape:
            raise ValueError(
                f"{key} is {list(tensor.shape)} in the model and {list(value.shape)} in {files.tensors}: load the "
                f"adapter into the model it was trained on"
            )
        converted = value.to(tensor.dtype)
        if not torch.isfinite(converted).all():
            raise ValueError(f"{key}: values of {files.tensors} are too large for {tensor.dtype}: use a wider dtype")
        entries.append(TrainedEntry(path, modules[path], name, converted))
    for key in _expected(modules, files, {entry.path for entry in entries}):
        if key not in files.trained:
            raise ValueError(
                f"{files.tensors} lacks {PREFIX}{key}, and modules_to_save in {files.config.file} names its module: "
                f"save the adapter again"
            )
    return entries


def check_same_trained(model: nn.Module, entries: list[TrainedEntry], files: AdapterFiles, fix: str) -> None:
    """Raise ValueError, with the `fix`, if `model` trains other modules whole than those of the files."""
    held = {module: clean_path(path) for path, module in trained_modules(model)}
    theirs = {entry.module: entry.path for entry in entries}
    for module, path in held.items():
        if module not in theirs:
            raise ValueError(f"{path} is trained whole, and {files.tensors} has no values for it: {fix}")
    for module, path in theirs.items():
        if module not in held:
            raise ValueError(f"{files.tensors} has values for {path}, which is not trained whole in the model: {fix}")


@torch.no_grad()
def fill_trained(entries: list[TrainedEntry]) -> None:
    """Write what the files hold."""
    for entry in entries:
        fill(entry.tensor, entry.value.to(entry.tensor.device))


def _expected(modules: Mapping[str, nn.Module], files: AdapterFiles, present: set[str]) -> Iterator[str]:
    """The names of all tensors of the modules that the configuration names, and of those that the files have some of.

    PEFT compares ends of paths. A name that is a whole path here is taken as that: it may be the end of others.
    """
    named = set(present)
    for name in files.config.modules_to_save:
        named |= {name} if name in modules else {path for path in modules if path.endswith(name)}
    for path, module in modules.items():
        segments = path.split(".")
        if any(".".join(segments[:end]) in named for end in range(1, len(segments) + 1)):
            yield from (_joined(path, name) for name in _own_tensors(module))


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What of a module's own a `state_dict` holds; without an adapter, which is refused in another place."""
    unsaved = set(module._non_persistent_buffers_set)
    if isinstance(module, LoRAModule):
        unsaved |= {*PARAMETERS, *BUFFERS}
    held = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in held.items() if tensor is not None and name not in unsaved}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}".removeprefix(".")
