"""`recompute_dropout`: the mask is drawn again in backward, bit for bit, and what was kept for it is not kept."""

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph

import lora_fx
from lora_fx.passes import pipeline
from lora_fx.passes._torch import CheckpointPolicy
from lora_fx.passes.pipeline import DropoutStage
from lora_fx.passes.printer import graph_text
from lora_fx.passes.recompute_branch import REGION
from tests.passes.foreign import HandWritten
from tests.passes.harness import Case, adapt, capture, check_case, recorded
from tests.passes.modules import QKV, Layers, Mlp
from tests.passes.test_sites import checkpointed

aten, prims = torch.ops.aten, torch.ops.prims


def x(requires_grad: bool = True) -> Tensor:
    return torch.randn(2, 3, 8, requires_grad=requires_grad)


def linear(**config: Any) -> nn.Module:
    return adapt(nn.Linear(8, 6), rank=2, **config)


class TestDropout(expecttest.TestCase):
    def test_joint(self) -> None:
        self.assertExpectedInline(
            capture(linear(dropout=0.1), x()).rewrite.after,
            """\
%0 = input                                                      f32[6, 8]
%1 = input                                                      f32[6]
%2 = input                                                      f32[2, 3, 8]
%3 = input                                                      f32[]
%4 = input                                                      f32[]
%5 = input                                                      f32[2, 8]
%6 = input                                                      f32[6, 2]
| %7 = tangent                                                  f32[2, 3, 6]
%8 = view(%2, [6, 8])                                           f32[6, 8]
%9 = permute(%0, [1, 0])                                        f32[8, 6]
%10 = addmm(%1, %8, %9)                                         f32[6, 6]
%11 = mul(%3, %4)                                               f32[]
%12 = rand([2, 3, 8], dtype=f32, device=cpu, pin_memory=False)  f32[2, 3, 8]
%13 = gt(%12, 0.1)                                              b8[2, 3, 8]
%14 = mul(%13, %2)                                              f32[2, 3, 8]
%15 = mul(%14, 1.1111111111111112)                              f32[2, 3, 8]
%16 = permute(%5, [1, 0])                                       f32[8, 2]
%17 = view(%15, [6, 8])                                         f32[6, 8]
%18 = mm(%17, %16)                                              f32[6, 2]
%19 = view(%18, [2, 3, 2])                                      f32[2, 3, 2]
%20 = permute(%6, [1, 0])                                       f32[2, 6]
%21 = view(%19, [6, 2])                                         f32[6, 2]
%22 = lora_fx.accumulate(%10, %21, %20, %11)                    f32[6, 6]
%23 = view(%22, [2, 3, 6])                                      f32[2, 3, 6]
| %24 = permute(%20, [1, 0])                                    f32[6, 2]
| %25 = view(%7, [-1, 6])                                       f32[6, 6]
| %26 = lora_fx.gradient_pair(%25, %24, %21, %11)               (f32[6, 2], f32[6, 2])
| %27 = getitem(%26, 1)                                         f32[6, 2]
| %28 = permute(%27, [1, 0])                                    f32[2, 6]
| %29 = getitem(%26, 0)                                         f32[6, 2]
| %30 = view(%29, [2, 3, 2])                                    f32[2, 3, 2]
| %31 = permute(%28, [1, 0])                                    f32[6, 2]
| %32 = view(%30, [6, 2])                                       f32[6, 2]
| %33 = permute(%32, [1, 0])                                    f32[2, 6]
| %34 = mm(%33, %17)                                            f32[2, 8]
| %35 = permute(%34, [1, 0])                                    f32[8, 2]
| %36 = permute(%16, [1, 0])                                    f32[2, 8]
| %37 = mm(%32, %36)                                            f32[6, 8]
| %38 = view(%37, [2, 3, 8])                                    f32[2, 3, 8]
| %39 = permute(%35, [1, 0])                                    f32[2, 8]
| %40 = convert_element_type(%13, f32)                          f32[2, 3, 8]
| %41 = mul(%40, 1.1111111111111112)                            f32[2, 3, 8]
| %42 = mul(%38, %41)                                           f32[2, 3, 8]
| %43 = clone(%42, memory_format=contiguous_format)             f32[2, 3, 8]
| %44 = view(%7, [6, 6])                                        f32[6, 6]
| %45 = permute(%9, [1, 0])                                     f32[6, 8]
| %46 = mm(%44, %45)                                            f32[6, 8]
| %47 = view(%46, [2, 3, 8])                                    f32[2, 3, 8]
| %48 = add(%43, %47)                                           f32[2, 3, 8]
return %23, None, None, %48, None, None, %39, %31""",
        )

    def test_forward_and_backward_after_the_partition(self) -> None:
        """What is kept is the seed (the second to last value that forward returns), and no mask."""
        captured = capture(linear(dropout=0.1), x(), backward=True)
        self.assertExpectedInline(
            graph_text(captured.forward[0].graph),
            """\
%0 = input                                                                        f32[6, 8]
%1 = input                                                                        f32[6]
%2 = input                                                                        f32[2, 3, 8]
%3 = input                                                                        f32[]
%4 = input                                                                        f32[]
%5 = input                                                                        f32[2, 8]
%6 = input                                                                        f32[6, 2]
%7 = view(%2, [6, 8])                                                             f32[6, 8]
%8 = permute(%0, [1, 0])                                                          f32[8, 6]
%9 = addmm(%1, %7, %8)                                                            f32[6, 6]
%10 = mul(%3, %4)                                                                 f32[]
%11 = inductor_seeds(1, cpu)                                                      i64[1]
%12 = inductor_lookup_seed(%11, 0)                                                i64[]
%13 = inductor_random([2, 3, 8], %12, 'rand')                                     f32[2, 3, 8]
%14 = gt(%13, 0.1)                                                                b8[2, 3, 8]
%15 = mul(%14, %2)                                                                f32[2, 3, 8]
%16 = mul(%15, 1.1111111111111112)                                                f32[2, 3, 8]
%17 = permute(%5, [1, 0])                                                         f32[8, 2]
%18 = view(%16, [6, 8])                                                           f32[6, 8]
%19 = mm(%18, %17)                                                                f32[6, 2]
%20 = permute(%6, [1, 0])                                                         f32[2, 6]
%21 = auto_functionalized(lora_fx.accumulate_, base=%9, a=%19, b=%20, scale=%10)  (None, f32[6, 6])
%22 = getitem(%21, 1)                                                             f32[6, 6]
%23 = view(%22, [2, 3, 6])                                                        f32[2, 3, 6]
return %23, %0, %2, %5, %6, %10, %12, %19""",
        )
        self.assertExpectedInline(
            graph_text(captured.backward[0].graph),
            """\
%0 = input                                      f32[6, 8]
%1 = input                                      f32[2, 3, 8]
%2 = input                                      f32[2, 8]
%3 = input                                      f32[6, 2]
%4 = input                                      f32[]
%5 = input                                      i64[]
%6 = input                                      f32[6, 2]
| %7 = tangent                                  f32[2, 3, 6]
| %8 = view(%7, [-1, 6])                        f32[6, 6]
%9 = permute(%3, [1, 0])                        f32[2, 6]
| %10 = permute(%9, [1, 0])                     f32[6, 2]
| %11 = lora_fx.gradient_pair(%8, %10, %6, %4)  (f32[6, 2], f32[6, 2])
| %12 = getitem(%11, 1)                         f32[6, 2]
| %13 = getitem(%11, 0)                         f32[6, 2]
| %14 = permute(%13, [1, 0])                    f32[2, 6]
%15 = inductor_random([2, 3, 8], %5, 'rand')    f32[2, 3, 8]
%16 = gt(%15, 0.1)                              b8[2, 3, 8]
%17 = mul(%16, %1)                              f32[2, 3, 8]
%18 = mul(%17, 1.1111111111111112)              f32[2, 3, 8]
%19 = view(%18, [6, 8])                         f32[6, 8]
| %20 = mm(%14, %19)                            f32[2, 8]
%21 = permute(%2, [1, 0])                       f32[8, 2]
| %22 = permute(%21, [1, 0])                    f32[2, 8]
| %23 = mm(%13, %22)                            f32[6, 8]
| %24 = view(%23, [2, 3, 8])                    f32[2, 3, 8]
| %25 = convert_element_type(%16, f32)          f32[2, 3, 8]
| %26 = mul(%25, 1.1111111111111112)            f32[2, 3, 8]
| %27 = mul(%24, %26)                           f32[2, 3, 8]
| %28 = view(%7, [6, 6])                        f32[6, 6]
%29 = permute(%0, [1, 0])                       f32[8, 6]
| %30 = permute(%29, [1, 0])                    f32[6, 8]
| %31 = mm(%28, %30)                            f32[6, 8]
| %32 = view(%31, [2, 3, 8])                    f32[2, 3, 8]
| %33 = add(%27, %32)                           f32[2, 3, 8]
return None, None, %33, None, None, %20, %12""",
        )


def tagged(function: Callable[..., Any], *inputs: Tensor, **patches: Any) -> list[list[str]]:
    """For every dropout chain that was tagged: the operators, in graph order."""
    found: list[Graph] = []

    def stage(self: DropoutStage, graph: Graph) -> None:
        original(self, graph)
        found.append(graph)

    original = DropoutStage.__call__
    with pytest.MonkeyPatch.context() as monkeypatch, torch._inductor.config.patch(patches):
        monkeypatch.setattr(DropoutStage, "__call__", stage)
        capture(function, *inputs)
    (graph,) = found
    chains: list[list[str]] = []
    for node in graph.nodes:
        if node.meta.get("ac_graph_id") == REGION:
            assert node.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE
            if node.target is prims.inductor_random.default:
                chains.append([])
            chains[-1].append(str(node.target))
    return chains


CHAIN = ["prims.inductor_random.default", "aten.gt.Scalar", "aten.mul.Tensor", "aten.mul.Tensor", "aten.view.default"]


def test_the_chain_is_tagged() -> None:
    assert tagged(linear(dropout=0.1), x()) == [CHAIN]
    assert tagged(linear(dropout=0.1), x().detach().view(6, 8).requires_grad_()) == [CHAIN[:-1]]
    assert tagged(adapt(QKV(), dropout=0.1), torch.randn(2, 3, 48, requires_grad=True)) == [CHAIN] * 3


def test_bfloat16_and_autocast() -> None:
    (chain,) = tagged(linear(dropout=0.1).bfloat16(), x().detach().bfloat16().requires_grad_())
    assert [name for name in chain if "convert_element_type" not in name] == CHAIN
    with torch.autocast("cpu", torch.bfloat16):
        (chain,) = tagged(linear(dropout=0.1), x())
    assert [name for name in chain if "convert_element_type" not in name] == CHAIN


def test_evaluation_has_nothing_to_tag() -> None:
    assert tagged(linear(dropout=0.1).eval(), x()) == []


def test_other_dropout_is_not_ours() -> None:
    """Such as what stands before a branch that was left alone. What base and branch share is redrawn for both."""
    module = linear()
    assert tagged(lambda t: module(F.dropout(t, 0.1)), x()) == [CHAIN]
    declined = HandWritten(lambda m, t: torch.tanh(F.linear(F.linear(F.dropout(t, 0.1), m.a), m.b)))
    assert tagged(declined, torch.randn(3, 48, requires_grad=True)) == []


def test_checkpointed_dropout_is_the_users() -> None:
    assert tagged(checkpointed(linear(dropout=0.1)), x()) == []


def test_without_seeds_nothing_is_tagged() -> None:
    """With `fallback_random` the numbers are eager's, drawn from a state that has moved on by the backward."""
    assert tagged(linear(dropout=0.1), x(), fallback_random=True) == []


# What the mission asks for, and the rest of what LoRA with dropout is used in.
SAVED = [
    Case(
        "MLP",
        lambda: adapt(Mlp(), dropout=0.1),
        3,
        {"scale": 3, "accumulate": 1},
        {"scale": 3, "pair": 3},
        random=True,
        seeds=4,
    ),
    Case(
        "MLP bf16",
        lambda: adapt(Mlp().bfloat16(), dropout=0.1),
        3,
        {"scale": 3, "accumulate": 1, "recompute": 2},
        {"scale": 3, "pair": 3},
        dtype=torch.bfloat16,
        random=True,
    ),
    Case(
        "q/k/v",
        lambda: adapt(QKV(), dropout=0.1),
        3,
        {"scale": 3, "accumulate": 3},
        {"scale": 3, "pair": 3},
        random=True,
    ),
    Case(
        "layers",
        lambda: adapt(Layers(1), dropout=0.1),
        7,
        {"scale": 7},
        {"scale": 7, "pair": 7},
        random=True,
        seeds=2,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("case", SAVED, ids=str)
def test_at_least_two_fifths_less_is_kept(case: Case) -> None:
    result = check_case(case)
    assert result.ours.saved <= 0.6 * result.plain.saved


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpointed"])
def test_the_mask_of_backward_is_the_mask_of_forward(checkpoint: bool) -> None:
    """Bit for bit, through Inductor's own random numbers: A's gradient says which elements of x were dropped.

    With B and dy of ones, dA is R N times the sum of the dropped rows, and so is the output's sum over dy.
    """
    torch.manual_seed(0)
    module = linear(dropout=0.5)
    assert isinstance(module, lora_fx.LoRAModule)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.0 if not parameter.requires_grad else 1.0)
        module.lora_scale.fill_(1.0)
    # Powers of two: every subset has its own sum, and sums are exact.
    inputs = (2.0 ** torch.arange(24.0).view(1, 3, 8)).requires_grad_()
    function = checkpointed(module) if checkpoint else module
    with recorded():
        y = torch.compile(function, options=pipeline.hooks(), fullgraph=True)(inputs)
    y.sum().backward()
    rows = y[..., 0].flatten()  # 2 ranks times the sum of what was kept of the row, times 1 / (1 - p)
    assert module.lora_a.grad is not None
    assert inputs.grad is not None
    assert module.lora_a.grad.sum() / (2 * 6) == rows.sum() / 2
    assert 0 < rows.sum() < 2 * 2 * inputs.sum()
    kept = inputs.grad != 0
    assert torch.equal((inputs * kept).sum(-1).flatten() * 2 * 2, rows)
