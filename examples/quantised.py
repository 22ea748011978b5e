"""Bases to put under adapters, made by torchao: each function quantises the linears of a model in place and returns it.

Quantise first, then `lora_fx.install`. Heads stay as they are, as is usual: many are one weight with an embedding.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # torch's types lack it
HEADS = ("lm_head", "decoder", "classifier", "output")


def quantised_linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and module of each linear that is not a head."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name not in HEADS:
                yield parent, name, child


def plain(model: nn.Module) -> nn.Module:
    """As it is."""
    return model


def int8(model: nn.Module) -> nn.Module:
    """Weights alone, in int8 with a scale a row: products with the integers are scaled, nothing is dequantised."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=_not_a_head)
    return model


def int4(model: nn.Module) -> nn.Module:
    """Weights alone, in groups of 32 integers of 4 bits, dequantised for each product.

    torchao's packed int4 kernels (``Int4WeightOnlyConfig``) have no backward, so they cannot lie below a trained layer.
    """
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_

    quantize_(model, IntxWeightOnlyConfig(INT4, PerGroup(32)), filter_fn=_not_a_head)
    return model


class NF4Linear(nn.Linear):
    """A linear over torchao's NF4 tensor, as QLoRA has it; backward dequantises again instead of saving."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

        y: Tensor = linear_nf4(input, self.weight)
        return y if self.bias is None else y + self.bias


def nf4(model: nn.Module) -> nn.Module:
    """QLoRA's base: 4-bit normal floats in blocks of 64, whose scales are quantised in turn in blocks of 256.

    Other sizes of blocks would be lost: in torchao 0.18 a clone of the tensor has these.
    """
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    for _, _, linear in quantised_linears(model):
        weight = to_nf4(linear.weight.detach())
        linear.__class__ = NF4Linear
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return model


def float8(model: nn.Module) -> nn.Module:
    """Training in float8: inputs, weights and gradients are rounded for each product, with one scale a tensor."""
    return _float8(model, "tensorwise")


def float8_rowwise(model: nn.Module) -> nn.Module:
    """The same with a scale for each row."""
    return _float8(model, "rowwise")


def _float8(model: nn.Module, recipe: str) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    converted: nn.Module = convert_to_float8_training(model, config=config, module_filter_fn=_not_a_head)
    return converted


def qat(model: nn.Module) -> nn.Module:
    """Quantisation-aware training: inputs are rounded to int8 and weights to int4, both kept in the model's dtype."""
    from torchao.quantization.qat import FakeQuantizedLinear, IntxFakeQuantizeConfig

    inputs = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(INT4, group_size=32)
    for parent, name, linear in quantised_linears(model):
        setattr(parent, name, FakeQuantizedLinear.from_linear(linear, inputs, weights))
    return model


def _not_a_head(module: nn.Module, path: str) -> bool:
    return isinstance(module, nn.Linear) and path.rsplit(".", 1)[-1] not in HEADS


BASES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": plain,
    "int8": int8,
    "int4": int4,
    "nf4": nf4,
    "float8": float8,
    "float8-rowwise": float8_rowwise,
    "qat": qat,
}
