"""Converters: in-place modifications of a model, in an order that is checked where it is written down.

    lora_fx.convert(model, [Float8Converter(), LoRAConverter(LoRAConfig(rank=16))])

Quantisation has to come first. A quantising converter replaces every `nn.Linear` by a new module of its own class,
built from the weight and the bias: run on adapted linears it would drop the adapters without a word. The other way
round, the swap takes any subclass as it finds it, so that a Float8Linear becomes a LoRAFloat8Linear.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from lora_fx.adapted import Adapted
from lora_fx.config import LoRAConfig
from lora_fx.install import install

Model = TypeVar("Model", bound=nn.Module)

# torchtitan's base class of quantising converters, and its converter for quantisation-aware training, which has no such
# base. They are recognised by name, because torchtitan is no dependency.
_TORCHTITAN_QUANTIZERS = ("QuantizationConverter", "QATConverter")


@runtime_checkable
class ModelConverter(Protocol):
    """What modifies a model in place: anything with a `convert` method, torchtitan's converters included.

    Two things are read where a converter has them: a true attribute ``quantizes`` says that it replaces linears by
    quantised ones (torchtitan's quantising converters are known without it), and ``post_optimizer_hook(model)`` is
    what `Converters.post_optimizer_hook` calls.
    """

    def convert(self, model: nn.Module) -> Any:
        """Modify `model` in place. A module that is returned takes its place, anything else is ignored."""
        ...


class LoRAConverter:
    """`lora_fx.install` as a converter.

    torchtitan's trainer, up to 0.2, calls further methods, which its own protocol class supplies to whoever inherits
    them: ``class Converter(lora_fx.LoRAConverter, torchtitan.protocols.model_converter.ModelConverter)``. Converters of
    torchtitan 0.3 rewrite configurations; ``examples/torchtitan_lora.py`` has one that brings this one in.

    Args:
        config: `LoRAConfig()` when left out.
    """

    def __init__(self, config: LoRAConfig | None = None) -> None:
        config = LoRAConfig() if config is None else config
        if not isinstance(config, LoRAConfig):
            raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
        self.config = config

    def convert(self, model: Model) -> Model:
        """Install adapters on `model` and return it; raises what `lora_fx.install` raises."""
        return install(model, self.config)

    def __repr__(self) -> str:
        return f"LoRAConverter({self.config!r})"


class Conv1DConverter:
    """Makes linears of the `Conv1D`s of transformers (GPT-2, ImageGPT, ...), so that a `LoRAConverter` adapts them.

    A `Conv1D` is ``y = x W + b`` with W [K, N], and no `nn.Linear`. Each gets a class that is both; weights, their
    names and their layout stay, so that checkpoints of the model still load.

        lora_fx.convert(model, [lora_fx.Conv1DConverter(), lora_fx.LoRAConverter(config)])
    """

    def convert(self, model: Model) -> Model:
        """Convert `model` in place and return it.

        Raises:
            ValueError: `model` holds no `Conv1D`.
        """
        # Importing transformers takes seconds, and most models need none of it.
        from lora_fx.conv1d import convert_conv1d

        if not convert_conv1d(model):
            raise ValueError(f"{type(model).__name__} holds no Conv1D of transformers: leave out Conv1DConverter")
        return model

    def __repr__(self) -> str:
        return "Conv1DConverter()"


@dataclass(frozen=True)
class Converters:
    """Converters in the order in which they run; an order that cannot work is refused when this is constructed.

    Raises:
        TypeError: an item has no `convert` method.
        ValueError: a quantising converter comes after a `LoRAConverter`, or there is more than one `LoRAConverter`.
    """

    converters: tuple[ModelConverter, ...]

    def __init__(self, converters: Iterable[ModelConverter]) -> None:
        ordered = tuple(converters)
        _check_order(ordered)
        object.__setattr__(self, "converters", ordered)

    def convert(self, model: nn.Module) -> nn.Module:
        """Run the converters on `model` and return it.

        Raises:
            RuntimeError: a converter took out adapters that an earlier one had installed.
        """
        for converter in self.converters:
            adapted = [(path, module) for path, module in model.named_modules() if isinstance(module, Adapted)]
            result = converter.convert(model)
            model = result if isinstance(result, nn.Module) else model
            left = {id(module) for module in model.modules() if isinstance(module, Adapted)}
            lost = [path for path, module in adapted if id(module) not in left]
            if lost:
                raise RuntimeError(
                    f"{type(converter).__name__} replaced {lost[0] or 'the model itself'} ({len(lost)} in all) and "
                    f"dropped its adapter: put it before LoRAConverter, and set `quantizes = True` on it if it "
                    f"quantises"
                )
        return model

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Call the `post_optimizer_hook` of every converter that has one (fp8 scales are refreshed there)."""
        for converter in self.converters:
            hook = getattr(converter, "post_optimizer_hook", None)
            if hook is not None:
                hook(model)


def convert(model: nn.Module, converters: Iterable[ModelConverter]) -> nn.Module:
    """Run converters on a model, in order and in place.

    Args:
        model: what the first of them gets.
        converters: `LoRAConverter`, and others that have a method ``convert(model)``.

    Returns:
        What the last of them returned.

    Raises:
        TypeError, ValueError: as `Converters`, before anything runs; and whatever a converter raises.
    """
    return Converters(converters).convert(model)


def _check_order(converters: tuple[ModelConverter, ...]) -> None:
    lora: LoRAConverter | None = None
    for converter in converters:
        name = type(converter).__name__
        if isinstance(converter, type) or not isinstance(converter, ModelConverter):
            raise TypeError(f"{converter!r} is no converter: it needs a method convert(model)")
        if isinstance(converter, LoRAConverter):
            if lora is not None:
                raise ValueError("two LoRAConverters: a model holds one set of adapters; put both into one LoRAConfig")
            lora = converter
        elif lora is not None and _quantizes(converter):
            raise ValueError(
                f"{name} comes after LoRAConverter: quantisation replaces linears by new modules and would drop their "
                f"adapters. Put {name} before LoRAConverter, which adapts the quantised linears"
            )


def _quantizes(converter: ModelConverter) -> bool:
    declared = getattr(converter, "quantizes", None)
    if declared is not None:
        return bool(declared)
    return any(cls.__name__ in _TORCHTITAN_QUANTIZERS for cls in type(converter).__mro__)
