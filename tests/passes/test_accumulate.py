"""`accumulate` by itself: where it adds the branch into the base's output, and where the sum is somebody else's."""

from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.passes import pipeline
from lora_fx.passes.pipeline import rewrite_graph
from lora_fx.passes.printer import graph_text
from tests.passes.foreign import Form, HandWritten
from tests.passes.harness import Case, adapt, by_kernels, capture, compare, joint_graph, only, recorded
from tests.passes.modules import QKV, Mlp, Residual

ACCUMULATE = only("accumulate")
bf16 = torch.bfloat16
FOLDED = only("fold_scale", "accumulate")


def lora(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b)


def halves(form: Form, x: Tensor | None = None, dtype: torch.dtype = torch.float32) -> tuple[bool, bool]:
    """Whether the forward and the backward of the only site accumulate."""
    x = torch.randn(3, 8, 48, dtype=dtype, requires_grad=True) if x is None else x
    captured = capture(HandWritten(form, dtype), x, passes=ACCUMULATE)
    return "accumulate" in captured.count("forward"), "accumulate" in captured.count("backward")


class TestGraph(expecttest.TestCase):
    def test_training(self) -> None:
        x = torch.randn(2, 3, 48, requires_grad=True)
        self.assertExpectedInline(
            capture(HandWritten(lora), x, passes=ACCUMULATE).rewrite.after,
            """\
%0 = input                                 f32[40, 48]
%1 = input                                 f32[2, 3, 48]
%2 = input                                 f32[4, 48]
%3 = input                                 f32[40, 4]
| %4 = tangent                             f32[2, 3, 40]
%5 = permute(%0, [1, 0])                   f32[48, 40]
%6 = view(%1, [6, 48])                     f32[6, 48]
%7 = mm(%6, %5)                            f32[6, 40]
%8 = permute(%2, [1, 0])                   f32[48, 4]
%9 = view(%1, [6, 48])                     f32[6, 48]
%10 = mm(%9, %8)                           f32[6, 4]
%11 = view(%10, [2, 3, 4])                 f32[2, 3, 4]
%12 = permute(%3, [1, 0])                  f32[4, 40]
%13 = view(%11, [6, 4])                    f32[6, 4]
%14 = lora_fx.accumulate(%7, %13, %12)     f32[6, 40]
%15 = view(%14, [2, 3, 40])                f32[2, 3, 40]
| %16 = view(%4, [6, 40])                  f32[6, 40]
| %17 = permute(%16, [1, 0])               f32[40, 6]
| %18 = mm(%17, %13)                       f32[40, 4]
| %19 = permute(%18, [1, 0])               f32[4, 40]
| %20 = permute(%12, [1, 0])               f32[40, 4]
| %21 = mm(%16, %20)                       f32[6, 4]
| %22 = view(%21, [2, 3, 4])               f32[2, 3, 4]
| %23 = permute(%19, [1, 0])               f32[40, 4]
| %24 = view(%22, [6, 4])                  f32[6, 4]
| %25 = permute(%24, [1, 0])               f32[4, 6]
| %26 = mm(%25, %9)                        f32[4, 48]
| %27 = permute(%26, [1, 0])               f32[48, 4]
| %28 = permute(%8, [1, 0])                f32[4, 48]
| %29 = permute(%27, [1, 0])               f32[4, 48]
| %30 = view(%4, [6, 40])                  f32[6, 40]
| %31 = permute(%5, [1, 0])                f32[40, 48]
| %32 = mm(%30, %31)                       f32[6, 48]
| %33 = lora_fx.accumulate(%32, %24, %28)  f32[6, 48]
| %34 = view(%33, [2, 3, 48])              f32[2, 3, 48]
return %15, None, %34, %29, %23""",
        )

    def test_lowered(self) -> None:
        """Forward, as Inductor gets it: an operation that it performs in place, because nobody else reads the base."""
        captured = capture(HandWritten(lora), torch.randn(5, 48, requires_grad=True), passes=ACCUMULATE)
        self.assertExpectedInline(
            graph_text(captured.forward[0].graph),
            """\
%0 = input                                                                      f32[40, 48]
%1 = input                                                                      f32[5, 48]
%2 = input                                                                      f32[4, 48]
%3 = input                                                                      f32[40, 4]
%4 = permute(%0, [1, 0])                                                        f32[48, 40]
%5 = mm(%1, %4)                                                                 f32[5, 40]
%6 = permute(%2, [1, 0])                                                        f32[48, 4]
%7 = mm(%1, %6)                                                                 f32[5, 4]
%8 = permute(%3, [1, 0])                                                        f32[4, 40]
%9 = auto_functionalized(lora_fx.accumulate_, base=%5, a=%7, b=%8, scale=None)  (None, f32[5, 40])
%10 = getitem(%9, 1)                                                            f32[5, 40]
return %10, %0, %1, %2, %3, %7""",
        )


def test_a_written_output() -> None:
    assert halves(lora) == (True, True)
    assert halves(lambda m, x: F.linear(lora(m, x), m.w.t())) == (True, True)
    assert halves(lambda m, x: F.softmax(lora(m, x), -1)) == (True, True)


def test_an_output_that_a_pointwise_operation_reads() -> None:
    assert halves(lambda m, x: F.silu(lora(m, x))) == (False, True)
    assert halves(lambda m, x: lora(m, x).view(24, 40).unflatten(-1, (4, 10)).transpose(0, 1) * 2) == (False, True)


def test_an_output_with_two_kinds_of_readers() -> None:
    """One of them writes it anyway."""

    def form(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = lora(m, x)
        return F.silu(y), y @ m.w

    assert halves(form) == (True, True)


def test_a_base_that_is_computed_pointwise() -> None:
    assert halves(lambda m, x: F.linear(x, m.w) * 3 + F.linear(F.linear(x, m.a), m.b))[0] is False
    assert halves(lambda m, x: F.linear(x.double(), m.w.double()).float() + F.linear(F.linear(x, m.a), m.b))[0] is False


def test_an_input_gradient_with_more_terms() -> None:
    """One kernel sums them all, reading each once."""
    assert halves(lambda m, x: (lora(m, x), torch.tanh(x)))[1] is False


def test_an_input_gradient_that_a_pointwise_operation_reads() -> None:
    assert halves(lambda m, x: lora(m, torch.tanh(x))) == (True, False)


def test_on_a_cpu_what_leaves_the_cache_is_accumulated() -> None:
    """A product of 2 MiB, in float32 and in bfloat16, whose readers are pointwise."""
    x = torch.randn(1, 13200, 48)
    assert halves(lambda m, x: F.silu(lora(m, torch.tanh(x))), x.requires_grad_()) == (True, True)
    half = x.detach().to(torch.bfloat16).repeat(1, 2, 1).requires_grad_()
    assert halves(lambda m, x: F.silu(lora(m, torch.tanh(x))), half, torch.bfloat16) == (False, True)


def test_a_long_sum_that_leaves_the_cache() -> None:
    """The gradient goes into a term that is a large product, where there is one."""
    x = torch.randn(1, 13200, 48, requires_grad=True)
    assert halves(lambda m, x: (lora(m, x), F.linear(x, m.w), torch.tanh(x)), x)[1] is True
    assert halves(lambda m, x: (F.linear(torch.tanh(x), m.w), lora(m, torch.exp(x)), torch.sin(x)), x)[1] is True

    def without(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x.detach(), m.w) + F.linear(F.linear(x, m.a), m.b), torch.sin(x), torch.tanh(x)

    assert halves(without, x)[1] is False


@pytest.mark.slow
def test_large_siblings_are_as_accurate() -> None:
    case = Case("", lambda: adapt(QKV(520, 520).to(bf16)), 3, {}, dtype=bf16, shapes=((1, 1100, 520),) * 2)
    result = compare(case, by_kernels)
    assert result.captured.count("backward")["accumulate"] == 1
    result.assert_as_accurate()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, bf16])
def test_a_large_mlp_is_as_accurate(dtype: torch.dtype) -> None:
    """In both dtypes the gradient [1100, 1040] is added into a large base, in float32 the outputs of that size too."""
    case = Case("", lambda: adapt(Mlp(hidden=1040).to(dtype)), 3, {}, dtype=dtype, shapes=((1, 1100, 48),) * 3)
    result = compare(case, by_kernels)
    assert result.captured.count("forward")["accumulate"] == (3 if dtype == torch.float32 else 1)
    assert result.captured.count("backward")["accumulate"] == 1
    result.assert_as_accurate()


def test_plain_matrices_in_16_bits_are_inductors() -> None:
    x = torch.randn(24, 48, dtype=torch.bfloat16, requires_grad=True)
    assert halves(lora, x, torch.bfloat16) == (False, False)
    assert halves(lora, x.detach().view(3, 8, 48).requires_grad_(), torch.bfloat16) == (True, True)
    assert halves(lora, x.detach().float().requires_grad_()) == (True, True)


def test_a_scale_that_is_not_folded_is_not_for_it() -> None:
    captured = capture(adapt(nn.Linear(48, 40)), torch.randn(5, 48, requires_grad=True), passes=ACCUMULATE)
    assert captured.rewrite.after == captured.rewrite.before


def test_a_base_that_backward_reads_is_not_overwritten() -> None:
    """Inductor decides what happens in place; a base that has another reader must survive."""

    def form(m: HandWritten, x: Tensor) -> tuple[Tensor, Tensor]:
        base = F.linear(x, m.w)
        return base + F.linear(F.linear(x, m.a), m.b), torch.exp(base)

    case = Case("", lambda: HandWritten(form), 1, {"accumulate": 1})
    result = compare(case, by_kernels)
    assert result.captured.count("forward") == {"accumulate": 1}
    result.assert_as_accurate()


def test_backward_twice() -> None:
    """Nothing that autograd keeps is written: the second backward is the first."""
    module = HandWritten(lora)
    x = torch.randn(3, 8, 48, requires_grad=True)
    with recorded() as captured, torch._functorch.config.patch(donated_buffer=False):
        y = torch.compile(module, options=pipeline.hooks(), fullgraph=True)(x)
        first, second = (torch.autograd.grad(y.sum(), [x, module.a, module.b], retain_graph=True) for _ in range(2))
    assert captured.count("forward") == {"accumulate": 1}
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_the_second_run_changes_nothing() -> None:
    graph = joint_graph(adapt(Residual()), torch.randn(24, 48, requires_grad=True))
    rewrite_graph(graph, FOLDED)
    text = graph_text(graph)
    assert not any(site.rewritten for site in rewrite_graph(graph, FOLDED).sites)
    assert graph_text(graph) == text
