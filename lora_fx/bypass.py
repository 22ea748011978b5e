"""Linears that torch's own modules use without calling them, so that an adapter on them would never run.

Found by reading ``torch/nn`` of 2.11 to 2.13 for reads of a child's ``.weight`` outside initialisation:

- `nn.MultiheadAttention` hands ``out_proj.weight`` to a function, always: refused;
- `nn.LinearCrossEntropyLoss` (torch 2.13) does the same with ``linear.weight``: refused;
- `nn.TransformerEncoderLayer` does so with ``linear1`` and ``linear2`` in its inference fast path only, which it leaves
  when ``activation_relu_or_gelu`` is 0: handled, by setting that on the layers that hold an adapter;
- `nn.TransformerEncoder` feeds its layers nested tensors to suit that fast path, unless ``use_nested_tensor`` is false:
  handled likewise. (Padded positions of its output are then computed instead of zero, as they are in training.)
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn

from lora_fx.config import matches

# (class of the parent, name of the child that it reads and does not call)
_READ_BUT_NOT_CALLED: tuple[tuple[type[nn.Module], str], ...] = tuple(
    (getattr(nn, parent), child)
    for parent, child in (("MultiheadAttention", "out_proj"), ("LinearCrossEntropyLoss", "linear"))
    if hasattr(nn, parent)
)


@dataclass(frozen=True)
class Patch:
    """An attribute of the module at `path` to set to `value` while adapters are installed, and what it was."""

    path: str
    name: str
    value: Any
    previous: Any


def check_called(model: nn.Module, targets: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError, stating the `exclude_modules` that is needed, if a target would never be called.

    Args:
        model: the model to install on.
        targets: path and module of every linear that is to be adapted.
    """
    readers = {
        id(getattr(module, child, None)): parent
        for module in model.modules()
        for parent, child in _READ_BUT_NOT_CALLED
        if isinstance(module, parent)
    }
    inert = {path: readers[id(module)] for path, module in targets if id(module) in readers}
    if not inert:
        return
    path, parent = next(iter(inert.items()))
    every = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    raise ValueError(
        f"{path} would never run its adapter: {parent.__name__} reads its weight without calling it. "
        f"Leave it out: exclude_modules={_shortest(inert.keys(), every)!r}"
    )


def _shortest(hit: Set[str], every: Sequence[str]) -> list[str]:
    """The last segments of the paths in `hit` if they name nothing else among `every`, or the full paths."""
    ends = sorted({path.rsplit(".", 1)[-1] for path in hit})
    named = {path for path in every for end in ends if matches(end, path)}
    return ends if named == hit else [path for path in every if path in hit]


def fast_path_patches(model: nn.Module, targets: Iterable[nn.Module]) -> Iterator[Patch]:
    """The attributes to set so that no fast path of torch goes past the linears in `targets`."""
    adapted = {id(module) for module in targets}
    for path, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            name, off = "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
            name, off = "use_nested_tensor", False
        else:
            continue
        if any(id(below) in adapted for below in module.modules()):
            yield Patch(path, name, off, getattr(module, name))
