"""What swapped modules have in common: `LoRAModule` for linears, `LoRAExpertsModule` for stacks of experts.

    module.__class__ = swapped_class(LoRAModule, type(module))

There is one class per parent class and never one per module: Dynamo guards on classes. For the same reason the numbers
that differ between modules are buffers and not Python floats: they are inputs of a compiled graph, not guards, so
modules of equal shape share one graph, and changing a number takes effect without recompiling.
"""

import functools
import types
from collections.abc import Hashable
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from lora_fx.stored import ENABLED, SCALE

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
    lora_adapters: Any  # the adapters that are not active, by name
    _lora_last_scale: Any  # a float, or a list of them: what `lora_scale` was installed or loaded with
    _lora_active: str  # the name of the adapter that runs
    _lora_disabled: Tensor | None
    _lora_deferred: bool
    _lora_merged: Any  # a lora_fx.merge.Merged, or None
    _lora_rows: Any  # a lora_fx.rows.Rows, or None
    _lora_base: Any  # a lora_fx.inits.ChangedBase, or None
    lora_prefix: ClassVar[str] = "LoRA"
    lora_parameters: ClassVar[tuple[str, ...]]  # the names of what the swap added and trains, A before its B

    @property
    def adapted_parameters(self) -> tuple[str, ...]:
        """The names of the parameters that have adapters."""
        return ("weight",)

    def holder(self, adapter: str | None) -> Any:
        """What has the tensors and numbers of `adapter` now; of the active one if that is None, None if unknown."""
        raise NotImplementedError

    def reset_adapters(self) -> None:
        """Start all adapters afresh: A as `lora_init` says, B zero, the last scale that was installed or loaded.

        Raises:
            ValueError: the adapter is merged.
        """
        raise NotImplementedError

    def check_start(self) -> None:
        """Raise ValueError if `reset_adapters` would."""
        if self._lora_merged is not None:
            raise ValueError("an adapter that is merged cannot start afresh: call lora_fx.unmerge(model) first")

    def put_base_back(self) -> None:
        """Give the weight back what `lora_init` took out of it; nothing is done where that is nothing."""

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


def swapped_class(kind: type[Kind], parent: type[nn.Module]) -> type[Kind]:
    """The subclass ``LoRA<Parent>`` of `kind` and `parent`: always the same class for the same two."""
    return cast(type[Kind], _swapped_class(cast(Hashable, kind), cast(Hashable, parent)))


@functools.cache
def _swapped_class(kind: Any, parent: Any) -> type[Adapted]:
    name = f"{kind.lora_prefix}{parent.__name__}"
    namespace = {
        # The parent's: torch.fx traces through a module or calls it, depending on where its class is from.
        "__module__": parent.__module__,
        "__qualname__": name,
        "__doc__": f"`{parent.__module__}.{parent.__qualname__}` with adapters; see `lora_fx.{kind.__name__}`.",
        "_lora_parent": parent,
        "_lora_kind": kind,
    }
    return cast(type[Adapted], types.new_class(name, (kind, parent), exec_body=lambda ns: ns.update(namespace)))


def parent_class(cls: type) -> type[nn.Module]:
    """The class that a module had before its class became `cls`, a `swapped_class`."""
    return cast(type[nn.Module], cls.__dict__["_lora_parent"])
