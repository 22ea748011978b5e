"""What swapped modules have in common: `LoRAModule` for linears, `LoRAExpertsModule` for stacks of experts.

    module.__class__ = swapped_class(LoRAModule, type(module))

There is one class per parent class and never one per module: Dynamo guards on classes. For the same reason the numbers
that differ between modules are buffers and not Python floats: they are inputs of a compiled graph, not guards, so
modules of equal shape share one graph, and changing a number takes effect without recompiling.
"""

import functools
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lora_fx.placements import local

# The float32 buffers of a swapped module.
SCALE, ENABLED = "lora_scale", "lora_enabled"
BUFFERS = (SCALE, ENABLED)

Kind = TypeVar("Kind", bound="Adapted")


class Adapted(nn.Module):
    """A swapped module: every `LoRA<Parent>` derives from a subclass of this and from Parent.

    Buffers, float32 whatever dtype the module is moved to:
        lora_scale: saved in `state_dict`, so that loading a checkpoint restores the function that was saved even where
            this module was installed with another alpha. Change it with ``module.lora_scale.fill_(value)``.
        lora_enabled: 1, or 0 inside `lora_fx.disabled`; not saved.
    """

    lora_scale: Tensor
    lora_enabled: Tensor
    lora_dropout: float
    lora_init: str
    _lora_last_scale: Any  # a float, or a list of them: what `lora_scale` was installed or loaded with
    _lora_disabled: Tensor | None
    _lora_deferred: bool
    _lora_merged: Any  # a lora_fx.merge.Merged, or None

    @property
    def factor_names(self) -> tuple[str, ...]:
        """The names of the trainable parameters that the swap added, A before its B."""
        raise NotImplementedError

    def reset_factors(self) -> None:
        """Start every A as `lora_init` says, and every B at zero."""
        raise NotImplementedError

    def disabled_buffer(self) -> Tensor:
        """The zero that stands in for `lora_enabled` inside `lora_fx.disabled`.

        It takes the other's place instead of being written into it, because a compiled forward may have saved
        `lora_enabled` for its backward: a loss that compares a model with itself without adapters (DPO, KL to the
        base) runs the second forward before the backward of the first. And it is always the same tensor, because CUDA
        graphs are recorded for addresses.
        """
        zero = self._lora_disabled
        if zero is None or zero.device != self.lora_enabled.device or type(zero) is not type(self.lora_enabled):
            with torch.inference_mode(False):  # it may be needed for training next
                zero = self._lora_disabled = torch.zeros_like(self.lora_enabled)
        return zero

    @torch.no_grad()
    def reset_adapters(self) -> None:
        """Start the adapters afresh: A as `lora_init` says, B zero, the last scale that was installed or loaded.

        Raises:
            ValueError: the adapter is merged.
        """
        if self._lora_merged is not None:
            raise ValueError("an adapter that is merged cannot start afresh: call lora_fx.unmerge(model) first")
        self.reset_factors()
        self._restore_scale(self.lora_scale)
        if self.lora_enabled is not self._lora_disabled:
            self.lora_enabled.fill_(1.0)

    def _restore_scale(self, scale: Tensor) -> None:
        last = torch.tensor(self._lora_last_scale, dtype=torch.float32, device=local(scale).device)
        local(scale).copy_(last)  # the same on every rank

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapted":
        """Move or convert as any module, except that the numbers stay float32 and never become garbage.

        ``.to(torch.bfloat16)`` would round the scale, and ``.to_empty()`` would leave it uninitialised, which a model
        that loads a checkpoint without an adapter in it would never notice.
        """
        before = {name: self._buffers[name] for name in BUFFERS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new is not old:
                self._buffers[name] = self._moved(name, old, new)
        return self

    @torch.no_grad()
    def _moved(self, name: str, old: Tensor, new: Tensor) -> Tensor:
        moved = new if new.dtype == torch.float32 else torch.empty_like(new, dtype=torch.float32)
        if new.is_meta:
            value = values(old)
            if name == SCALE and value is not None:
                self._lora_last_scale = value
        elif old.is_meta:
            if name == SCALE:
                self._restore_scale(moved)
            else:
                moved.fill_(1.0)
        elif type(new) is type(old) or moved is not new:
            # A change of tensor type (a fake tensor, a DTensor) at equal dtype already holds the number.
            moved.copy_(old)
        return moved

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self._lora_merged is not None and any(name.startswith(prefix) for name in state_dict):
            raise ValueError(f"{prefix.rstrip('.') or 'the model'} is merged: call lora_fx.unmerge(model) first")
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.lora_scale.dtype != torch.float32:  # load_state_dict(assign=True) of a checkpoint that was cast
            self.lora_scale = self.lora_scale.float()
        if self.lora_enabled.is_meta and not self.lora_scale.is_meta:  # assign=True onto meta; this one is not saved
            self.lora_enabled = torch.ones_like(self.lora_scale)
        value = values(self.lora_scale)
        if value is not None:
            self._lora_last_scale = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the parent class, which can be imported; the swapped class is made again where it is loaded."""
        reduced = super().__reduce_ex__(max(protocol, 2))
        cls = type(self)
        if "_lora_parent" not in cls.__dict__:  # a subclass of a swapped class looks after itself
            return reduced
        if not isinstance(reduced, tuple) or reduced[0].__name__ != "__newobj__" or reduced[1] != (cls,):
            raise TypeError(f"{cls.__name__} cannot be pickled: {parent_class(cls).__name__} pickles in its own way")
        return (_new, (cls.__bases__[0], parent_class(cls)), *reduced[2:])


def _new(kind: type[Adapted], parent: type[nn.Module]) -> Adapted:
    cls = swapped_class(kind, parent)
    return cls.__new__(cls)


def values(numbers: Tensor) -> Any:
    """What a buffer holds, as a float or a list of floats, or None where there is nothing to read (meta, fake)."""
    numbers = local(numbers)  # the same on every rank
    return None if type(numbers) is not Tensor or numbers.is_meta else numbers.tolist()


def swapped_class(kind: type[Kind], parent: type[nn.Module]) -> type[Kind]:
    """The subclass ``LoRA<Parent>`` of `kind` and `parent`: always the same class for the same two."""
    return cast(type[Kind], _swapped_class(cast(Hashable, kind), cast(Hashable, parent)))


@functools.cache
def _swapped_class(kind: Any, parent: Any) -> type[Adapted]:
    name = f"LoRA{parent.__name__}"
    namespace = {
        # The parent's: torch.fx traces through a module or calls it, depending on where its class is from.
        "__module__": parent.__module__,
        "__qualname__": name,
        "__doc__": f"`{parent.__module__}.{parent.__qualname__}` with adapters; see `lora_fx.{kind.__name__}`.",
        "_lora_parent": parent,
    }
    return cast(type[Adapted], types.new_class(name, (kind, parent), exec_body=lambda ns: ns.update(namespace)))


def parent_class(cls: type) -> type[nn.Module]:
    """The class that a module had before its class became `cls`, a `swapped_class`."""
    return cast(type[nn.Module], cls.__dict__["_lora_parent"])
