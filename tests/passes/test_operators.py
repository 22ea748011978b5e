"""The operators of rewritten graphs: right, no less accurate than what they stand for, and honest to torch.library.

M tokens, K in, N out, R rank, as in the operators.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_fx.passes.kernels import operators

M, N, R = 37, 40, 4
ALLOWED, FLOOR = 1.1, 4 * 2.0**-24
SCALES = [None, 1.0, 2.0, 0.7, -3.0, 0.0]
Many = dict[str, Tensor]


def operands(dtype: torch.dtype, seed: int = 0, m: int = M) -> Many:
    """Named as in the operators' signatures, with a as h [M, R] and b as B^T [R, N]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"base": (m, N), "a": (m, R), "b": (R, N), "dy": (m, N), "h": (m, R), "bias": (N,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def number(scale: float | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
    return None if scale is None else torch.tensor(scale, dtype=dtype)


# What a pass replaces, operation by operation as the graph had it, and what it puts there.
Form = Callable[[Many, Any], tuple[Tensor, ...]]


def times(x: Tensor, scale: Any) -> Tensor:
    return x if scale is None else x * scale


BEFORE: dict[str, Form] = {
    "scaled_mm": lambda t, s: (times(t["a"] @ t["b"], s),),
    "scaled_mm with bias": lambda t, s: (times(t["a"] @ t["b"], s) + t["bias"],),
    "accumulate": lambda t, s: (t["base"] + times(t["a"] @ t["b"], s),),
    "accumulate_": lambda t, s: (t["base"] + times(t["a"] @ t["b"], s),),
    "gradient_pair": lambda t, s: (times(t["dy"], s) @ t["b"].t(), times(t["dy"], s).t() @ t["h"]),
}


def in_place(accumulate: Callable[..., None], t: Many, s: Any) -> tuple[Tensor, ...]:
    base = t["base"].clone()
    accumulate(base, t["a"], t["b"], s)
    return (base,)


CPU: dict[str, Form] = {
    "scaled_mm": lambda t, s: (operators.scaled_mm(t["a"], t["b"], s),),
    "scaled_mm with bias": lambda t, s: (operators.scaled_mm(t["a"], t["b"], s, t["bias"]),),
    "accumulate": lambda t, s: (operators.accumulate(t["base"], t["a"], t["b"], s),),
    "accumulate_": lambda t, s: in_place(operators.accumulate_, t, s),
    "gradient_pair": lambda t, s: operators.gradient_pair(t["dy"], t["b"].t(), t["h"], s),
}
# What runs on a device that has no implementation of its own.
ANYWHERE: dict[str, Form] = {
    "scaled_mm": lambda t, s: (operators._scaled_mm(t["a"], t["b"], s),),
    "scaled_mm with bias": lambda t, s: (operators._scaled_mm(t["a"], t["b"], s, t["bias"]),),
    "accumulate": lambda t, s: (operators._accumulate(t["base"], t["a"], t["b"], s),),
    "accumulate_": lambda t, s: in_place(operators._accumulate_, t, s),
    "gradient_pair": lambda t, s: operators._gradient_pair(t["dy"], t["b"].t(), t["h"], s),
}
FORMS = [(name, form) for forms in (CPU, ANYWHERE) for name, form in forms.items()]
IDS = [f"{name}, {where}" for where, forms in (("cpu", CPU), ("anywhere", ANYWHERE)) for name in forms]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "form"), FORMS, ids=IDS)
def test_as_accurate_as_what_it_replaces(name: str, form: Form, dtype: torch.dtype, scale: float | None) -> None:
    squares = torch.zeros(2, 2, dtype=torch.float64)
    for seed in range(12):
        inputs = operands(dtype, seed)
        exact = BEFORE[name]({key: t.double() for key, t in inputs.items()}, scale)
        s = number(scale, torch.float64 if dtype == torch.float64 else torch.float32)
        ours, before = form(inputs, s), BEFORE[name](inputs, s)
        for i, (o, b, e) in enumerate(zip(ours, before, exact, strict=True)):
            assert o.dtype == dtype
            assert o.shape == e.shape
            size = e.norm().clamp_min(1e-30)
            squares[i] += torch.stack([((o.double() - e).norm() / size) ** 2, ((b.double() - e).norm() / size) ** 2])
    floor = 1e-15 if dtype == torch.float64 else FLOOR
    for ours_, before_ in (squares / 12).sqrt().tolist():
        assert ours_ <= ALLOWED * before_ + floor


@pytest.mark.parametrize("m", [0, 1])
@pytest.mark.parametrize(("name", "form"), FORMS, ids=IDS)
def test_no_and_one_token(name: str, form: Form, m: int) -> None:
    inputs = operands(torch.float32, m=m)
    for scale in (None, torch.tensor(0.5)):
        for ours, expected in zip(form(inputs, scale), BEFORE[name](inputs, scale), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("name", "form"), FORMS, ids=IDS)
def test_operands_in_any_layout(name: str, form: Form) -> None:
    """A and B arrive transposed, h as columns of a stack, and dy may be one number in every place."""
    inputs = operands(torch.float32)
    laid_out = {key: t.t().contiguous().t() if t.dim() == 2 else t for key, t in inputs.items()}
    laid_out["h"] = torch.cat([inputs["h"], inputs["h"] + 1], 1)[:, :R]
    laid_out["a"] = torch.cat([inputs["a"] + 1, inputs["a"]], 1)[:, R:]
    for ours, expected in zip(form(laid_out, torch.tensor(0.5)), form(inputs, torch.tensor(0.5)), strict=True):
        torch.testing.assert_close(ours, expected)
    inputs["dy"] = torch.ones(()).expand(M, N)
    for ours, expected in zip(form(inputs, None), BEFORE[name](inputs, None), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("name", "form"), FORMS, ids=IDS)
def test_nothing_is_written(name: str, form: Form) -> None:
    """Except by the one operator whose name ends in an underscore, which `in_place` gives a copy."""
    inputs = operands(torch.float32)
    before = {key: t.clone() for key, t in inputs.items()}
    scale = torch.tensor(0.5)
    form(inputs, scale)
    assert all(torch.equal(inputs[key], before[key]) for key in inputs)
    assert scale == 0.5


def test_scale_zero_is_exact() -> None:
    """A disabled adapter adds nothing at all: its model computes what the base computes."""
    inputs = operands(torch.bfloat16)
    zero = torch.tensor(0.0)
    base, a, b = inputs["base"], inputs["a"], inputs["b"]
    assert torch.equal(operators.accumulate(base, a, b, zero), base)
    assert not operators.scaled_mm(a, b, zero).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_in_float32_of_factors_in_16_bits(dtype: torch.dtype) -> None:
    inputs = operands(dtype)
    found = operators.float_mm(inputs["dy"].t(), inputs["h"])
    torch.testing.assert_close(found, inputs["dy"].float().t() @ inputs["h"].float())


def samples() -> list[tuple[Any, tuple[Any, ...]]]:
    t, scale = operands(torch.float32), torch.tensor(0.5)
    return [
        (operators.scaled_mm, (t["a"], t["b"])),
        (operators.scaled_mm, (t["a"], t["b"], scale)),
        (operators.scaled_mm, (t["a"], t["b"], scale, t["bias"])),
        (operators.scaled_mm, (t["dy"].t(), t["h"], scale)),
        (operators.accumulate, (t["base"], t["a"], t["b"])),
        (operators.accumulate, (t["base"], t["a"], t["b"], scale)),
        (operators.accumulate_, (t["base"], t["a"], t["b"])),
        (operators.accumulate_, (t["base"], t["a"], t["b"], scale)),
        (operators.gradient_pair, (t["dy"], t["b"].t(), t["h"])),
        (operators.gradient_pair, (t["dy"], t["b"].t(), t["h"], scale)),
        (operators.gradient_pair, (t["dy"].bfloat16(), t["b"].t().bfloat16(), t["h"].bfloat16(), scale)),
        (operators.float_mm, (t["dy"].bfloat16(), t["b"].t().bfloat16())),
    ]


@pytest.mark.parametrize(("operator", "arguments"), samples())
def test_opcheck(operator: Any, arguments: tuple[Any, ...]) -> None:
    """The schema, the fake implementation (with symbolic sizes, too) and the tracing of each."""
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("name", ["scaled_mm", "accumulate", "accumulate_", "gradient_pair", "float_mm"])
def test_wrong_operands_are_refused_while_tracing(name: str) -> None:
    t = {key: tensor.to("meta") for key, tensor in operands(torch.float32).items()}
    wrong: dict[str, list[tuple[Any, ...]]] = {
        "scaled_mm": [(t["a"], t["b"].t()), (t["a"], t["b"].double()), (t["a"][0], t["b"])],
        "accumulate": [(t["base"], t["a"], t["b"].t()), (t["base"].double(), t["a"], t["b"])],
        "accumulate_": [(t["base"], t["a"], t["b"].t())],
        "float_mm": [(t["a"], t["b"].t()), (t["a"], t["b"].double())],
        "gradient_pair": [(t["dy"], t["b"], t["h"]), (t["dy"], t["b"].t(), t["h"][1:])],
    }
    for arguments in wrong[name]:
        with pytest.raises(RuntimeError):
            getattr(operators, name)(*arguments)
