"""A float8 base for the benchmarks: linears whose products run in float8, scaled per tensor at each call.

The recipe of torchao's `convert_to_float8_training` with its defaults (dynamic scaling, one scale a tensor), written
out because torchao is not everywhere: input and weight are cast to e4m3 for `y`, upstream gradient to e5m2 and weight
to e4m3 for `dX`. The weight is frozen, so there is no third product. Like torchao's, the weight is kept in the
activations' dtype and cast at every use.
"""

from typing import Any, cast

import torch
from benchmarks.common import PlainLoRALinear
from torch import Tensor, nn

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def to_float8(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` as float8 that fills the range of `dtype`, and the float32 scale (0-d) that multiplies it back."""
    largest = torch.finfo(dtype).max
    scale = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


class _Float8Product(torch.autograd.Function):
    """x [M, K], weight [N, K] -> x weight^T [M, N], in the dtype of x. Only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        x8, x_scale = to_float8(x, E4M3)
        weight8, weight_scale = to_float8(weight, E4M3)
        return torch._scaled_mm(
            x8, weight8.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=x.dtype, use_fast_accum=True
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        dy8, dy_scale = to_float8(dy, E5M2)
        weight8, weight_scale = to_float8(weight, E4M3)
        columns = weight8.t().contiguous().t()  # cuBLAS takes the second factor of a float8 product by columns
        dx = torch._scaled_mm(dy8.contiguous(), columns, scale_a=dy_scale, scale_b=weight_scale, out_dtype=dy.dtype)
        return dx, None


class Float8Linear(nn.Linear):
    """A frozen linear whose products run in float8. Sizes are multiples of 16."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        y = cast(Tensor, _Float8Product.apply(input.reshape(-1, input.shape[-1]), self.weight))
        y = y.view(*input.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class PlainLoRAFloat8Linear(PlainLoRALinear, Float8Linear):
    """LoRA as it is usually written, over a float8 base."""


_FLOAT8: dict[type[nn.Module], type[nn.Linear]] = {
    nn.Linear: Float8Linear,
    PlainLoRALinear: PlainLoRAFloat8Linear,
}


def install_float8(model: nn.Module) -> None:
    """Make every linear of `model` compute in float8: its class changes, its parameters stay."""
    for module in model.modules():
        if type(module) in _FLOAT8:
            module.__class__ = _FLOAT8[type(module)]
