"""LoRA that this package did not install: the passes read graphs, not modules."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.foreign import Form, HandWritten, Shapes
from tests.passes.harness import Case, by_kernels, check_case, compare
from tests.passes.modules import Mlp

bf16 = torch.bfloat16
ONE = {"scale": 1, "accumulate": 1}
ONE_BACK = {"scale": 1, "pair": 1, "accumulate": 1}
PLAIN = {"accumulate": 1}
PLAIN_BACK = {"pair": 1, "accumulate": 1}


def lora(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.a), m.b)


def literal_scale(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + lora(m, x) * 2.0


def integer_scale(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + lora(m, x) * 3


def fractional_scale(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + lora(m, x) * 0.7


def scale_and_branch_first(m: Any, x: Tensor) -> Tensor:
    return 2.0 * lora(m, x) + F.linear(x, m.w)


def no_scale(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + lora(m, x)


def in_place(m: Any, x: Tensor) -> Tensor:
    y = F.linear(x, m.w)
    y += 0.5 * lora(m, x)
    return y


def matmul_layout(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + (x @ m.a @ m.b) * 2.0


def cast_to_float(m: Any, x: Tensor) -> Tensor:
    return (F.linear(x, m.w).float() + F.linear(F.linear(x.float(), m.a.float()), m.b.float()) * 2.0).to(x.dtype)


def dropout(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + lora(m, F.dropout(x, 0.1)) * 2.0


def two_adapters(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + lora(m, x) * 2.0 + F.linear(F.linear(x, m.c), m.d) * 0.5


def shared_down(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """One A for two linears (as in VeRA), and a third that is a sibling of both."""
    h = F.linear(x, m.a)
    third = F.linear(x, m.w) + F.linear(F.linear(x, m.c), m.d)
    return F.linear(x, m.w) + F.linear(h, m.b) * 2.0, F.linear(x, m.w) + F.linear(h, m.d) * 0.5 + third


def residual_between(m: Any, x: Tensor) -> Tensor:
    """The base's sum with something else comes before the branch."""
    return (F.linear(x, m.w) + torch.tanh(x[..., :40])) + lora(m, x) * 2.0


def make(form: Form, dtype: torch.dtype = torch.float32, shapes: Shapes | None = None) -> Callable[[], nn.Module]:
    return functools.partial(HandWritten, form, dtype, shapes)


TWO: Shapes = {"a": (4, 48), "b": (40, 4), "c": (6, 48), "d": (40, 6)}
TRANSPOSED: Shapes = {"a": (48, 4), "b": (4, 40)}
SHARED: Shapes = {"a": (4, 48), "b": (40, 4), "c": (4, 48), "d": (40, 4)}

CASES = [
    Case("literal scale", make(literal_scale), 1, ONE, ONE_BACK),
    Case("literal scale bf16", make(literal_scale, bf16), 1, ONE, ONE_BACK, dtype=bf16),
    Case("literal scale fp64", make(fractional_scale, torch.float64), 1, ONE, ONE_BACK, dtype=torch.float64),
    Case("integer scale", make(integer_scale), 1, ONE, ONE_BACK),
    Case("fractional scale bf16", make(fractional_scale, bf16), 1, ONE, ONE_BACK, dtype=bf16),
    Case("scale and branch first", make(scale_and_branch_first), 1, ONE, ONE_BACK),
    Case("no scale", make(no_scale), 1, PLAIN, PLAIN_BACK),
    Case("no scale bf16", make(no_scale, bf16), 1, PLAIN, PLAIN_BACK, dtype=bf16),
    Case("no scale no_grad", make(no_scale), 1, PLAIN, grad=torch.no_grad),
    Case("in place", make(in_place), 1, ONE, ONE_BACK),
    Case("matmul layout", make(matmul_layout, shapes=TRANSPOSED), 1, ONE, ONE_BACK),
    Case(
        "matmul layout 2-D bf16",
        make(matmul_layout, bf16, shapes=TRANSPOSED),
        1,
        {"scale": 1},
        {"scale": 1, "pair": 1},
        dtype=bf16,
        shape=(24, 48),
    ),
    Case(
        "matmul layout first layer",
        make(matmul_layout, shapes=TRANSPOSED),
        1,
        ONE,
        {"scale": 1, "pair": 1},
        x_grad=False,
    ),
    Case("everything in float32", make(cast_to_float, bf16), 1, {"scale": 1}, {"scale": 1, "pair": 1}, dtype=bf16),
    Case("dropout", make(dropout), 1, ONE, {"scale": 1, "pair": 1}, random=True),
    Case(
        "two adapters",
        make(two_adapters, shapes=TWO),
        2,
        {"scale": 2, "stack(2)": 2},
        {"scale": 2, "stack(2)": 2, "pair": 2},
    ),
    Case(
        "two adapters bf16",
        make(two_adapters, bf16, shapes=TWO),
        2,
        {"scale": 2, "stack(2)": 2, "recompute": 1},
        {"scale": 2, "stack(2)": 2, "pair": 2},
        dtype=bf16,
    ),
    Case("residual between", make(residual_between), 1, {"scale": 1}, {"scale": 1, "pair": 1}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_graphs(case: Case) -> None:
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case) -> None:
    check_case(case, by_kernels)


def test_shared_down_projection() -> None:
    """Two branches read one h, so h has two gradients: the backward is left alone, and the report says why."""
    result = compare(Case("", make(shared_down, shapes=SHARED), 3, {}, {}))
    assert result.captured.sites == 3
    assert result.captured.count("forward") == {"scale": 2, "stack(2)": 3, "accumulate": 1}
    assert result.captured.count("backward") == {"pair": 1}
    assert result.captured.reasons == ["backward: its rank-R activations have several gradients"] * 2
    result.assert_as_accurate()
    assert result.ours.saved <= result.plain.saved


def with_peft(dtype: torch.dtype = torch.float32, adapter_dtype: torch.dtype | None = None, **config: Any) -> nn.Module:
    """An MLP with PEFT's own adapters, away from zero."""
    peft = pytest.importorskip("peft")
    module = Mlp().to(dtype)
    names = ["gate", "up", "down"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, **config), module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad = "lora_" in name
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
        if "lora_" in name and adapter_dtype is not None:
            parameter.data = parameter.data.to(adapter_dtype)
    return module


MLP = {"scale": 3, "stack(2)": 2, "accumulate": 1}
MLP_BACK = {"scale": 3, "stack(2)": 2, "pair": 3}
PEFT = [
    Case("peft", with_peft, 3, MLP, MLP_BACK),
    Case("peft bf16", lambda: with_peft(bf16, bf16), 3, MLP | {"recompute": 2}, MLP_BACK, dtype=bf16),
    Case(
        "peft dropout",
        lambda: with_peft(lora_dropout=0.1),
        3,
        {"scale": 3, "accumulate": 1},
        {"scale": 3, "pair": 3},
        random=True,
    ),
    Case("peft no_grad", with_peft, 3, MLP, grad=torch.no_grad),
]


@pytest.mark.parametrize("case", PEFT, ids=str)
def test_peft(case: Case) -> None:
    check_case(case)


def test_peft_with_float32_adapters_on_bfloat16() -> None:
    """PEFT's default: the base is bfloat16, the branch float32, and their sum is neither's. Left alone, and said so."""
    case = Case("", lambda: with_peft(bf16, torch.float32), 3, {}, {}, dtype=bf16)
    result = compare(case)
    assert result.captured.sites == 3
    assert result.captured.count("forward") == result.captured.count("backward") == {}
    assert all("the base is bfloat16 and the branch float32" in reason for reason in result.captured.reasons)
    assert len(result.captured.reasons) == 3
    result.assert_as_accurate()
