"""A model's own `init_weights`, followed by a fresh start of the adapters.

`init_weights` is what trainers call after ``model.to_empty()``: it fills the base weights, and knows nothing of
adapters. The patch is an instance attribute that calls whatever was there before it, so it does not matter which of
several patchers came first, and taking it out does not take out theirs.
"""

import inspect
from typing import Any

from torch import nn

from lora_fx.adapted import Adapted
from lora_fx.trained import keep_originals, trained_modules


class InitWeights:
    """Stands in for ``model.init_weights``: same arguments, same result, adapters initialised after it.

    A class and not a closure, so that the model can be pickled and deep-copied: a copy refers to the copied model.

    Attributes:
        name: of the method that it stands in for.
    """

    name = "init_weights"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # A method of the class is looked up when it is called: a bound method would be pickled as "the attribute
        # init_weights of the model", which is this object.
        self.instance_attribute: tuple[Any, ...] = (model.__dict__[self.name],) if self.name in model.__dict__ else ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        modules = [module for module in self.model.modules() if isinstance(module, Adapted)]
        for module in modules:
            module.check_start()
        for module in modules:
            module.put_base_back()  # what is not initialised stays as it was, and what is, starts afresh
        result = self._previous()(*args, **kwargs)
        for module in modules:
            module.reset_adapters()
        keep_originals(module for _, module in trained_modules(self.model))
        return result

    def _previous(self) -> Any:
        if self.instance_attribute:
            return self.instance_attribute[0]
        attribute = inspect.getattr_static(type(self.model), self.name, None)
        if attribute is None:  # a wrapper that hands attributes on
            return self.model.__getattr__(self.name)
        return attribute.__get__(self.model, type(self.model)) if hasattr(attribute, "__get__") else attribute

    def undo(self) -> None:
        """Put back what was there. Under another patch this one stays, and does nothing once the adapters are gone."""
        if self.model.__dict__.get(self.name) is not self:
            return
        if self.instance_attribute:
            setattr(self.model, self.name, self.instance_attribute[0])
        else:
            delattr(self.model, self.name)


def patch_init_weights(model: nn.Module) -> InitWeights | None:
    """Replace ``model.init_weights`` by an `InitWeights`; nothing is done, and None returned, where there is none."""
    previous = getattr(model, InitWeights.name, None)
    if not callable(previous) or isinstance(previous, nn.Module):
        return None
    patch = InitWeights(model)
    setattr(model, InitWeights.name, patch)
    return patch
