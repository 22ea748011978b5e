"""How the source of a kernel computes pointwise operations, in float32, and how wide its products are."""

from __future__ import annotations

import math

import torch
import triton


def padded(rank: int) -> int:
    """The inner size that the tensor cores get for a rank: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(rank))


_OPS = {
    "identity": "{0}",
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "neg": "(-{0})",
    "abs": "tl.abs({0})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})",
    "reciprocal": "(1.0 / {0})",
    "sigmoid": "tl.sigmoid({0})",
    # The series where the difference of two numbers near 1 would lose the digits of x (its next term is below 2e-9 of
    # it there). libdevice is not in Triton's interpreter.
    "tanh": (
        "tl.where(tl.abs({0}) < 0.125, {0} * (1.0 + {0} * {0} * (-1.0 / 3.0 + {0} * {0} * (2.0 / 15.0 + {0} * {0} "
        "* (-17.0 / 315.0 + {0} * {0} * (62.0 / 2835.0))))), 2.0 * tl.sigmoid(2.0 * {0}) - 1.0)"
    ),
    "erf": "tl.erf({0})",
    # NaN goes on, as in ATen.
    "relu": "tl.where({0} < 0.0, 0.0, {0})",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "where": "tl.where({0} != 0, {1}, {2})",
}
# 1 / (1 + exp(-x)) in four instructions, where exp and / guard what cannot be here: 1 + exp(-x) is 1 at least, and
# an exponential that overflows makes the quotient 0. The error is 2e-7 of the value.
_PTX_SIGMOID = (
    "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; "
    "add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }"
)
_SIGMOID = f'tl.inline_asm_elementwise("{_PTX_SIGMOID}", "=f,f", [{{0}}], dtype=tl.float32, is_pure=True, pack=1)'


def _has_ptx() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU: not by Triton's interpreter, nor for another maker's."""
    return torch.version.cuda is not None and not triton.knobs.runtime.interpret


def constant(number: float) -> str:
    """A number in a kernel's source."""
    value = float(number)
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _power(base: str, exponent: float) -> str:
    """``base ** exponent``: by multiplication for small whole exponents, which a negative base may have."""
    if exponent == 0.0:
        return f"tl.where({base} == 0.0, 1.0, 1.0)"  # of any base, as a tile
    if exponent.is_integer() and abs(exponent) <= 8:
        product = "(" + " * ".join([base] * abs(int(exponent))) + ")"
        return product if exponent > 0 else f"(1.0 / {product})"
    if abs(exponent) == 0.5:
        return f"tl.sqrt({base})" if exponent > 0 else f"tl.rsqrt({base})"
    power = f"tl.exp({exponent} * tl.log({'tl.abs(' + base + ')' if exponent.is_integer() else base}))"
    return f"tl.where({base} < 0.0, -{power}, {power})" if exponent % 2 == 1 else power


def operation(name: str, operands: list[str]) -> str:
    """The expression of a pointwise operation (:data:`lora_fx.passes.kernels.tile_program.POINTWISE`)."""
    if name == "pow":
        return _power(operands[0], float(operands[1]))
    if name == "sigmoid" and _has_ptx():
        return _SIGMOID.replace("{0}", operands[0])
    return _OPS[name].format(*operands)
