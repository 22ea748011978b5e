"""DoRA (arXiv:2402.09353): the length of every row of the adapted weight is a parameter of its own.

    module.__class__ = lora_class(type(module), DoRAModule)      # Float8Linear -> DoRAFloat8Linear
    module.forward(x) = g * (W x + s B A x) + bias,  g = m / ||W + s B A||, a number a row, its norm held constant

The sum in brackets is what plain LoRA computes, and the passes rewrite it as they do there. The class is a second one
beside `LoRA<Parent>`, and like that it is one per parent class: which of the two a module is, is a guard on its class.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.linear import PARAMETERS, LoRAModule
from lora_fx.passes.low_rank import low_rank
from lora_fx.placements import fill, gathered, like_weight
from lora_fx.swap import Adapter

MAGNITUDE = "lora_magnitude"


class DoRAModule(LoRAModule):
    """A `LoRAModule` with magnitudes: every ``DoRA<Parent>`` derives from this and from Parent.

    Parameters:
        lora_magnitude: [N], trainable, at first the norms of the weight's rows, so that outputs stay what they were.
    """

    lora_magnitude: nn.Parameter
    lora_parameters = (*PARAMETERS, MAGNITUDE)
    lora_prefix = "DoRA"

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the dtype of the parent's output.

        With dropout, in training, what is scaled is the weight's product with the dropped input, as in PEFT; that is a
        second product with the weight.
        """
        base = super(LoRAModule, self).forward(input)
        scale = self.lora_scale * self.lora_enabled
        excess = (self._lora_gain() - 1.0) * self.lora_enabled
        if self.training and self.lora_dropout > 0.0:
            dropped = F.dropout(input, self.lora_dropout)
            product = F.linear(dropped, self.weight.to(dropped.dtype))
            total = product + low_rank(dropped, *self._lora_factors(), scale).to(product.dtype)
            # Products of a vector in float32 are float32, and nothing that wide is saved for backward.
            return (base + (total * (1.0 + excess) - product)).to(base.dtype)
        total = base + low_rank(input, *self._lora_factors(), scale).to(base.dtype)
        scaled = total * (1.0 + excess)
        if self.bias is not None:  # which is not scaled
            scaled = scaled - excess * self.bias
        return scaled.to(base.dtype)

    def _lora_gain(self) -> Tensor:
        """`gain` of this module. The norm gets no gradient (section 4.3 of the paper)."""
        exact = row_norms(self.weight, self.lora_a, self.lora_b, self.lora_scale)
        return gain(self.lora_magnitude, exact)

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Start the magnitudes afresh, as the norms of ``W + s B A``.

        `load_state_dict` does it when it loads a weight without magnitudes. Call it after a base was written in another
        way: in place, by `torch.distributed.checkpoint` for instance.
        """
        fill(self.lora_magnitude, gathered(row_norms(self.weight, self.lora_a, self.lora_b, self.lora_scale)))

    def reset_adapters(self) -> None:
        """As `LoRAModule.reset_adapters`; the magnitudes are the norms of the weight's rows."""
        super().reset_adapters()
        self.reset_magnitude()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}weight" in state_dict and f"{prefix}{MAGNITUDE}" not in state_dict:
            self.reset_magnitude()


def gain(magnitude: Tensor, exact: Tensor) -> Tensor:
    """``m / ||W + s B A||`` [N] in the dtype of the norms, 1 for rows that are zero.

    The norm is rounded to the dtype of the magnitudes: those started as a norm, and where neither has changed the
    quotient is exactly 1.

    Args:
        magnitude: [N].
        exact: the norms [N], as `row_norms` computes them.
    """
    norm = exact.to(magnitude.dtype).to(exact.dtype)
    zero = norm == 0
    return torch.where(zero, 1.0, magnitude.to(exact.dtype) / torch.where(zero, 1.0, norm))


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    """``||W + s B A||`` of every row [N], in float32 (float64 for such weights), without gradients."""
    return row_squares(weight, lora_a, lora_b, scale).clamp_min(0.0).sqrt()


def row_squares(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: Tensor) -> Tensor:
    """The squares of `row_norms`, where rounding leaves a little less than zero at worst.

    Of some columns of the weight and of A they are terms of the sum that the squares of all columns are.

    Nothing of the weight's size is formed: ``||w + s b A||^2 = ||w||^2 + 2 s (w A^T) b + s^2 b (A A^T) b`` for a row w
    of W and b of B.

    Args:
        weight: [N, K].
        lora_a: [R, K].
        lora_b: [N, R].
        scale: 0-d.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    w, a, b, s = (tensor.detach().to(wide) for tensor in (weight, lora_a, lora_b, scale))
    # Which has no autocast for tensors without values.
    with torch.autocast("cpu" if w.is_meta else w.device.type, enabled=False):
        mixed = ((w @ a.t()) * b).sum(dim=1)
        return w.square().sum(dim=1) + s * (2.0 * mixed + s * ((b @ (a @ a.t())) * b).sum(dim=1))


@torch.no_grad()
def with_magnitude(module: nn.Linear, adapter: Adapter) -> Adapter:
    """`adapter`, which is meant for `module`, with the magnitudes that leave its outputs as they are."""
    # By the function that the forward calls, so that their quotient is 1 and not nearly so.
    scale = torch.full((), adapter.scale, device=module.weight.device)
    norms = gathered(row_norms(module.weight, adapter.lora_a, adapter.lora_b, scale)).to(adapter.lora_a.dtype)
    magnitude = nn.Parameter(like_weight(MAGNITUDE, norms, module.weight))
    return replace(adapter, kind=DoRAModule, others={MAGNITUDE: magnitude})


def check_dora(where: str, module: nn.Linear, fix: str) -> None:
    """Raise ValueError, with the `fix`, if the weight of `module` has no rows to take norms of."""
    weight = getattr(module, "weight", None)
    if not (
        isinstance(weight, Tensor)
        and weight.dtype.is_floating_point
        and weight.dtype.itemsize >= 2
        and tuple(weight.shape) == (module.out_features, module.in_features)
        and not quantised(weight)
    ):
        shown = f"{type(getattr(weight, 'data', weight)).__name__} {getattr(weight, 'dtype', '')}"
        raise ValueError(
            f"{where} is quantised ({shown}), and use_dora takes the norms of the weight's rows in every step: train "
            f"without use_dora, or {fix}"
        )


def quantised(tensor: Tensor) -> bool:
    """Whether the class of a tensor says how to dequantise it."""
    classes = type(tensor.data).__mro__
    return any("dequantize" in vars(cls) for cls in classes[: classes.index(Tensor)])
