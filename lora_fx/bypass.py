"""Linears whose weight is read by the module that holds them, so that an adapter on them would not run.

In torch itself, found by reading ``torch/nn`` of 2.11 to 2.13 (a test reads it anew, and 2.15 agrees):

- `nn.MultiheadAttention` hands ``out_proj.weight`` to a function, always: refused;
- `nn.LinearCrossEntropyLoss` (torch 2.13) does the same with ``linear.weight``: refused;
- `nn.TransformerEncoderLayer` does so with ``linear1`` and ``linear2`` in its inference fast path only, which it leaves
  when ``activation_relu_or_gelu`` is 0: handled, by setting that on the layers that hold an adapter;
- `nn.TransformerEncoder` feeds its layers nested tensors to suit that fast path, unless ``use_nested_tensor`` is false:
  handled likewise. (Padded positions of its output are then computed instead of zero, as they are in training.)

In anybody else's modules, `lora_fx.reads` finds the reads in the source: refused.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_fx.config import matches
from lora_fx.reads import weights_read
from lora_fx.targets import clean_path

# (class of the parent, child that it reads): torch's own, which are known even where the source is not installed.
_READ_BY_TORCH = (("MultiheadAttention", "out_proj"), ("LinearCrossEntropyLoss", "linear"))
# (class, attribute, the value with which it leaves its fast path)
_FAST_PATHS: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


@dataclass(frozen=True)
class Patch:
    """An attribute of the module at `path` to set to `value` while adapters are installed, and what it was."""

    path: str
    name: str
    value: Any
    previous: Any


def check_called(model: nn.Module, targets: Iterable[tuple[str, nn.Module, str]]) -> None:
    """Raise ValueError, stating the `exclude_modules` that is needed, if the forward of `model` goes past a target.

    Args:
        model: the model to install on.
        targets: path, module and the name of the weight of everything that is to be adapted.
    """
    targets = list(targets)
    readers = {
        (id(module), name): reader for name in {name for *_, name in targets} for module, reader in _read(model, name)
    }
    inert = {path: readers[id(module), name] for path, module, name in targets if (id(module), name) in readers}
    if not inert:
        return
    path, reader = next(iter(inert.items()))
    every = [clean_path(path) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    every += [path for path, module, _ in targets if not isinstance(module, nn.Linear)]
    raise ValueError(
        f"{path} would not run its adapter: {reader} reads its weight without calling it. "
        f"Leave it out: exclude_modules={_shortest(inert.keys(), every)!r}"
    )


def _read(model: nn.Module, weight: str) -> Iterator[tuple[nn.Module, str]]:
    """The modules whose parameter called `weight` is read, and who reads it."""
    for module in model.modules():
        for name, child in _READ_BY_TORCH:
            if isinstance(module, getattr(nn, name, ())) and weight == "weight":
                yield getattr(module, child), name
        for below, read in weights_read(type(module), weight).items():
            found: Any = module
            for name in below.split("."):
                found = getattr(found, name, None)
            if isinstance(found, nn.Module):
                yield found, f"{read.method} (line {read.line} of {read.file})"


def _shortest(hit: Set[str], every: Sequence[str]) -> list[str]:
    """The last segments of the paths in `hit` if they name nothing else among `every`, or the full paths."""
    ends = sorted({path.rsplit(".", 1)[-1] for path in hit})
    named = {path for path in every for end in ends if matches(end, path)}
    return ends if named == hit else [path for path in every if path in hit]


def fast_path_patches(model: nn.Module, targets: Iterable[nn.Module]) -> list[Patch]:
    """The attributes to set so that no fast path of torch goes past the linears in `targets`."""
    adapted = {id(module) for module in targets}
    patches = []
    for path, module in model.named_modules():
        for cls, name, off in _FAST_PATHS:
            if isinstance(module, cls) and hasattr(module, name) and any(id(m) in adapted for m in module.modules()):
                patches.append(Patch(clean_path(path), name, off, getattr(module, name)))
    return patches
