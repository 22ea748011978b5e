"""Where an adapter lives while another one is active, and how the numbers of adapters survive moves and checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_fx.placements import is_dtensor, like_weight, local, replicated_like

# The 0-d float32 buffers of a swapped module. Each adapter has a scale of its own.
SCALE, ENABLED = "lora_scale", "lora_enabled"
# What an adapter has beside its tensors.
OWN_ATTRIBUTES = ("lora_dropout", "lora_init", "_lora_last_scale", "_lora_rank", "_lora_deferred")


class StoredAdapter(nn.Module):
    """An adapter of a linear that is not the active one: what it needs to take the active one's place.

    It is kept in ``linear.lora_adapters``, a `nn.ModuleDict` that is no child of the linear. So it is not among the
    parameters of the model, and neither FSDP nor a tensor-parallel plan nor an optimizer over ``model.parameters()``
    sees it; but the linear moves, converts, copies and saves it with everything else.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: Tensor
    lora_dropout: float
    lora_init: str
    _lora_last_scale: float
    _lora_rank: int
    _lora_deferred: bool

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StoredAdapter":
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        keep_numbers(self, before)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        note_loaded_scale(self)

    def follow(self, weight: object) -> None:
        """Distribute what is still plain as the DTensor `weight`, which the linear has got, implies."""
        for name, factor in self._parameters.items():
            if factor is not None and not is_dtensor(factor):
                whole = like_weight(name, factor.detach(), weight)
                self._parameters[name] = nn.Parameter(whole, requires_grad=factor.requires_grad)
        if not is_dtensor(self.lora_scale):
            self.lora_scale = replicated_like(self.lora_scale, weight)


def exchange(linear: nn.Module, stored: StoredAdapter) -> None:
    """Let the adapter that `linear` runs and `stored` change places; every tensor stays the object that it is.

    Nothing is copied: optimizers hold parameters by identity, a forward pass may have saved these tensors for its
    backward, and compiled code takes parameters as inputs, so that it has no guard on which ones they are.
    """
    for kind in ("_parameters", "_buffers"):
        ours, theirs = getattr(linear, kind), getattr(stored, kind)
        for name in theirs:
            ours[name], theirs[name] = theirs[name], ours[name]
    for name in OWN_ATTRIBUTES:
        mine, other = getattr(linear, name), getattr(stored, name)
        setattr(linear, name, other)
        setattr(stored, name, mine)


def keep_numbers(module: nn.Module, before: Mapping[str, Tensor | None]) -> None:
    """After a move or a conversion of `module`: its numbers stay float32 and never become garbage.

    ``.to(torch.bfloat16)`` would round the scale, and ``.to_empty()`` would leave it uninitialised, which a model that
    loads a checkpoint without an adapter in it would never notice.

    Args:
        module: has been moved.
        before: its numbers before that.
    """
    for name, old in before.items():
        new = module._buffers[name]
        if old is not None and new is not None and new is not old:
            module._buffers[name] = _moved(module, name, old, new)


@torch.no_grad()
def _moved(module: Any, name: str, old: Tensor, new: Tensor) -> Tensor:
    moved = new if new.dtype == torch.float32 else torch.empty_like(new, dtype=torch.float32)
    if new.is_meta:
        value = number(old)
        if name == SCALE and value is not None:
            module._lora_last_scale = value
    elif old.is_meta:
        fill_numbers(moved, module._lora_last_scale if name == SCALE else 1.0)
    elif type(new) is type(old) or moved is not new:
        # A change of tensor type (a fake tensor, a DTensor) at equal dtype already holds the number.
        moved.copy_(old)
    return moved


def note_loaded_scale(module: Any) -> None:
    """After ``load_state_dict``: the scale is float32, and the one to start afresh with."""
    if module.lora_scale.dtype != torch.float32:  # load_state_dict(assign=True) of a checkpoint that was cast
        module.lora_scale = module.lora_scale.float()
    value = number(module.lora_scale)
    if value is not None:
        module._lora_last_scale = value


def fill_numbers(buffer: Tensor, last: Any) -> None:
    """Give a buffer of numbers `last`: one for all, or a list with one for each."""
    if isinstance(last, list):
        buffer.copy_(torch.tensor(last, dtype=buffer.dtype, device=buffer.device))
    else:
        buffer.fill_(last)


def number(buffer: Tensor) -> Any:
    """The value of a 0-d buffer, a list of several; None where there is nothing to read (meta, fake)."""
    buffer = local(buffer)  # the same on every rank
    return None if type(buffer) is not Tensor or buffer.is_meta else buffer.tolist()
