"""What the passes must leave alone: the graph stays as it was, to the letter, and the report says why.

A branch that was proved to be LoRA, or that one module computes, has a line in the report; two products in a row that
have nothing to do with LoRA have none.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.foreign import Form, HandWritten, Shapes
from tests.passes.harness import adapt, capture
from tests.passes.modules import Layers, Mlp

bf16 = torch.bfloat16


def lora(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.linear(x, m.a), m.b)


def base(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w)


def returns_h(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, m.a)
    return base(m, x) + F.linear(h, m.b) * 2.0, h


def returns_reshaped_h(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    h = F.linear(x, m.a)
    return base(m, x) + F.linear(h, m.b) * 2.0, h.flatten(0, 1)


def returns_the_product(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    u = lora(m, x)
    return base(m, x) + u, u


@dataclass
class Declined:
    """A form, the shapes of its parameters, and a part of the reason (none: not a line in the report)."""

    name: str
    form: Form
    reason: str | None
    shapes: Shapes | None = None
    shape: tuple[int, ...] = (3, 8, 48)
    trained: bool = False

    def __str__(self) -> str:
        return self.name


SCALE: Shapes = {"a": (4, 48), "b": (40, 4), "s": ()}
LARGE: Shapes = {"a": (21, 48), "b": (40, 21)}
SQUARE: Shapes = {"a": (4, 48), "b": (48, 4)}

DECLINED = [
    Declined("h is returned", returns_h, "rank-4 activations are returned to the caller"),
    Declined("h is returned in another shape", returns_reshaped_h, "rank-4 activations are returned to the caller"),
    Declined("the product is returned", returns_the_product, "its product has 2 readers"),
    # Ordinary sums of products.
    Declined("bottleneck and residual", lambda m, x: x + lora(m, x), "not a matrix product of the same input", SQUARE),
    Declined("bottleneck alone", lambda m, x: torch.tanh(lora(m, x)), "goes into aten.tanh.default"),
    Declined(
        "another activation's product",
        lambda m, x: base(m, torch.tanh(x)) + lora(m, x),
        "not a matrix product of the same input",
    ),
    Declined(
        "a normalised activation's product",
        lambda m, x: base(m, F.layer_norm(x, (48,))) + lora(m, x),
        "not a matrix product of the same input",
    ),
    Declined(
        "two branches and no base", lambda m, x: lora(m, x) + lora(m, x.sin()), "not a matrix product of the same input"
    ),
    Declined("an activation inside", lambda m, x: base(m, x) + F.linear(torch.tanh(F.linear(x, m.a)), m.b), None),
    Declined("masked factors", lambda m, x: base(m, x) + F.linear(F.linear(x, m.a * 2), m.b), None),
    Declined("a product of the base", lambda m, x: base(m, x) * lora(m, x), "goes into aten.mul.Tensor"),
    Declined("a difference", lambda m, x: base(m, x) - lora(m, x), "goes into aten.sub.Tensor"),
    Declined("a sum with a vector", lambda m, x: lora(m, x) + m.w[:, 0], "it is added to something of another shape"),
    Declined("one vector", lambda m, x: base(m, x) + lora(m, x), None, shape=(48,)),
    Declined("a base that is the branch's own", lambda m, x: lora(m, x) * 2 + lora(m, x), "same input"),
    # Training of more than the adapters.
    Declined("trained scale", lambda m, x: base(m, x) + lora(m, x) * m.s, "its scale is trained", SCALE),
    Declined("scale for each output", lambda m, x: base(m, x) + lora(m, x) * m.w[:, 0], "goes into aten.mul.Tensor"),
    Declined("trained base", lambda m, x: base(m, x) + lora(m, x) * 2.0, "its base weight is trained", trained=True),
    Declined(
        "trained base, first layer", lambda m, x: base(m, x) + lora(m, x), "its base weight is trained", trained=True
    ),
    # It cannot pay.
    Declined("large rank", lambda m, x: base(m, x) + lora(m, x), "rank 21 is more than half of min(48, 40)", LARGE),
    Declined(
        "mixed dtypes",
        lambda m, x: base(m, x) + F.linear(F.linear(x.double(), m.a.double()), m.b.double()),
        "the base is float32 and the branch float64",
    ),
]


@pytest.mark.parametrize("grad", [True, False], ids=["training", "no_grad"])
@pytest.mark.parametrize("case", DECLINED, ids=str)
def test_left_alone(case: Declined, grad: bool) -> None:
    if case.reason is not None and "trained" in case.reason and not grad:
        pytest.skip("nothing is trained")
    module = HandWritten(case.form, shapes=case.shapes, trained=case.trained)
    x = torch.randn(case.shape, requires_grad="first layer" not in case.name)
    with torch.set_grad_enabled(grad):
        captured = capture(module, x)
    rewrite = captured.rewrite
    assert rewrite.after == rewrite.before
    if case.reason is None:
        assert rewrite.report.sites == []
    else:
        assert rewrite.reasons
        assert all(case.reason in reason for reason in rewrite.reasons)
        assert not rewrite.report.complete
        assert len(rewrite.report.problems()) == len(rewrite.reasons)


def test_a_model_without_lora() -> None:
    rewrite = capture(Layers(), torch.randn(1, 8, 48, requires_grad=True)).rewrite
    assert rewrite.after == rewrite.before
    assert rewrite.report.sites == []
    assert rewrite.report.complete


def test_two_linears_in_a_row_are_not_reported() -> None:
    """A bottleneck of two modules is no LoRA branch, though it looks like the half of one."""
    module = nn.Sequential(nn.Linear(48, 4, bias=False), nn.Linear(4, 48, bias=False))
    rewrite = capture(lambda x: x + module(x), torch.randn(24, 48, requires_grad=True)).rewrite
    assert rewrite.after == rewrite.before
    assert rewrite.report.sites == []


def test_one_linear_twice_in_a_row_is_not_reported() -> None:
    """Its products are of one module, but no branch has one matrix for both factors."""
    linear = nn.Linear(48, 48, bias=False)
    rewrite = capture(lambda x: x + linear(linear(x)), torch.randn(24, 48, requires_grad=True)).rewrite
    assert rewrite.after == rewrite.before
    assert rewrite.report.sites == []


@pytest.mark.parametrize("x_grad", [True, False])
def test_gradients_of_the_input_are_no_site(x_grad: bool) -> None:
    """dX = dX_base + mm(mm(dy, B), A) has the form of a LoRA branch, and its factors are parameters."""
    module = adapt(Mlp())
    captured = capture(module, torch.randn(24, 48, requires_grad=x_grad))
    assert [site.path for site in captured.rewrite.report.sites] == ["gate", "up", "down"]
    # Where the forward branch is left alone nothing protects its dX but that.
    rewrite = capture(HandWritten(returns_h), torch.randn(24, 48, requires_grad=x_grad)).rewrite
    assert rewrite.after == rewrite.before


def test_a_site_beside_a_branch_that_is_left_alone() -> None:
    module = adapt(Mlp(), rank_pattern={"up": 30})
    report = capture(module, torch.randn(24, 48, requires_grad=True)).rewrite.report
    assert {site.path: bool(site.reason) for site in report.sites} == {"gate": False, "down": False, "up": True}
    assert {site.path: site.rewritten for site in report.sites} == {"gate": True, "down": True, "up": False}
    assert report.problems() == ["up: rank 30 is more than half of min(48, 96): merging costs less"]
