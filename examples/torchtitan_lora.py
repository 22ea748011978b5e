"""LoRA in torchtitan 0.3: a converter for the list that its `model_registry` takes.

    from torchtitan.models.llama3 import model_registry
    from torchtitan_lora import LoRAFxConverter

    config = llama3_debugmodel()  # a function in your own config registry
    config.model_spec = model_registry(
        "debugmodel",
        converters=[
            Float8LinearConverter.Config(),  # quantisation first
            LoRAFxConverter.Config(lora=lora_fx.LoRAConfig(rank=8, alpha=16.0)),
        ],
    )
    config.compile = CompileConfig(enable=True, backend="lora_fx")  # Inductor with the passes

Converters of torchtitan 0.3 rewrite the configuration of a model before it is built. This one leaves the configuration
as it is, and has what is built from it adapted by `lora_fx.LoRAConverter`: on the meta device, before anything is
parallelised. Then it tells torchtitan what it wants to know of every parameter: how it starts (`init_states` starts
adapters after the base) and where it is placed (factors follow their weight).

With FlexAttention, its default, torchtitan 0.3 takes no backend but Inductor's own: the adapters train there, without
the rewrite. Use ``model_registry(..., attn_backend="varlen")`` with the backend ``lora_fx``.

What was run: torchtitan 0.3.0's `Trainer` on CPUs (torch 2.13, reference attention, its device queries stubbed), eager
and compiled, and with a tensor parallel degree of 2 and ``spmd_backend="partial_dtensor"``. The default, "spmd_types",
does not start there on two ranks, adapters or not.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import spmd_types as spmd
from torch import nn
from torchtitan.components.lora import LoRAConverter
from torchtitan.models.common.decoder_sharding import dense_param_placement
from torchtitan.models.common.param_init import skip_param_init

import lora_fx
from lora_fx.adapted import BUFFERS
from lora_fx.init_weights import InitWeights
from lora_fx.linear import LoRAModule


class LoRAFxConverter(LoRAConverter):
    """`lora_fx.LoRAConverter` among torchtitan's converters.

    A subclass of torchtitan's own, so that its check of the order (quantisation comes first) holds for this one too.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(LoRAConverter.Config):
        """What to adapt; see `lora_fx.LoRAConfig`. The fields that torchtitan's own converter has are not read."""

        lora: lora_fx.LoRAConfig = field(default_factory=lora_fx.LoRAConfig)

    def __init__(self, config: Config) -> None:
        self.converter = lora_fx.LoRAConverter(config.lora)

    def convert(self, model_config: Any) -> Any:
        """A configuration that equals `model_config` and builds an adapted model."""
        parent, converter = type(model_config), self.converter

        class AdaptedConfig(parent):  # type: ignore[valid-type, misc]  # the class is known when this runs
            def build(self, **kwargs: Any) -> Any:
                return adapted(parent.build(self, **kwargs), converter)

        AdaptedConfig.__name__, AdaptedConfig.__qualname__ = f"Adapted{parent.__name__}", parent.__qualname__
        values = {f.name: getattr(model_config, f.name) for f in dataclasses.fields(model_config) if f.init}
        return AdaptedConfig(**values)


def adapted(model: nn.Module, converter: lora_fx.LoRAConverter) -> nn.Module:
    """`model`, a torchtitan model on the meta device, with adapters that torchtitan can start and place."""
    converter.convert(model)
    model.init_states = InitStates(model)  # type: ignore[assignment]  # an instance attribute instead of a method
    for module in model.modules():
        if isinstance(module, LoRAModule):
            ours: Any = module
            if ours._param_init is not None:
                ours._param_init = {**ours._param_init, **dict.fromkeys(module.lora_parameters, skip_param_init)}
            if ours._sharding_config is not None:
                ours._sharding_config = _placed(ours._sharding_config, module)
    return model


class InitStates(InitWeights):
    """Stands in for ``model.init_states``, as `lora_fx.install` does for ``model.init_weights``; and freezes again.

    Parameters that torchtitan distributes are made anew, and trainable.
    """

    name = "init_states"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        lora_fx.freeze(self.model)
        return result


def _placed(sharding: Any, module: LoRAModule) -> Any:
    """torchtitan's placements with those of an adapter: as `lora_fx.distributed.adapter_placements` has them."""
    weight = sharding.state_shardings.get("weight")
    if weight is None:
        return sharding
    whole = dense_param_placement(tp=spmd.R)
    row = weight == dense_param_placement(tp=spmd.S(1))
    ours = {"lora_a": weight if row else whole, "lora_b": whole if row else weight}
    ours["lora_magnitude"] = ours["lora_b"]
    states = {name: ours[name] for name in module.lora_parameters} | dict.fromkeys(BUFFERS, whole)
    return dataclasses.replace(sharding, state_shardings={**sharding.state_shardings, **states})
