"""`fold_scale` by itself: before and after in its docstring, with the numbers of a small linear."""

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.passes.pipeline import rewrite_graph
from lora_fx.passes.printer import graph_text
from tests.passes.foreign import HandWritten
from tests.passes.harness import Case, adapt, by_graphs, capture, compare, joint_graph, only

FOLD = only("fold_scale")


def linear() -> nn.Module:
    return adapt(nn.Linear(8, 6, bias=False), rank=2)


class TestGraph(expecttest.TestCase):
    def test_training(self) -> None:
        x = torch.randn(5, 8, requires_grad=True)
        self.assertExpectedInline(
            capture(linear(), x, passes=FOLD).rewrite.after,
            """\
%0 = input                               f32[6, 8]
%1 = input                               f32[5, 8]
%2 = input                               f32[]
%3 = input                               f32[]
%4 = input                               f32[2, 8]
%5 = input                               f32[6, 2]
| %6 = tangent                           f32[5, 6]
%7 = permute(%0, [1, 0])                 f32[8, 6]
%8 = mm(%1, %7)                          f32[5, 6]
%9 = mul(%2, %3)                         f32[]
%10 = permute(%4, [1, 0])                f32[8, 2]
%11 = mm(%1, %10)                        f32[5, 2]
%12 = permute(%5, [1, 0])                f32[2, 6]
%13 = lora_fx.scaled_mm(%11, %12, %9)    f32[5, 6]
%14 = add(%8, %13)                       f32[5, 6]
| %15 = permute(%6, [1, 0])              f32[6, 5]
| %16 = lora_fx.scaled_mm(%15, %11, %9)  f32[6, 2]
| %17 = permute(%16, [1, 0])             f32[2, 6]
| %18 = permute(%12, [1, 0])             f32[6, 2]
| %19 = lora_fx.scaled_mm(%6, %18, %9)   f32[5, 2]
| %20 = permute(%17, [1, 0])             f32[6, 2]
| %21 = permute(%19, [1, 0])             f32[2, 5]
| %22 = mm(%21, %1)                      f32[2, 8]
| %23 = permute(%22, [1, 0])             f32[8, 2]
| %24 = permute(%10, [1, 0])             f32[2, 8]
| %25 = mm(%19, %24)                     f32[5, 8]
| %26 = permute(%23, [1, 0])             f32[2, 8]
| %27 = permute(%7, [1, 0])              f32[6, 8]
| %28 = mm(%6, %27)                      f32[5, 8]
| %29 = add(%25, %28)                    f32[5, 8]
return %14, None, %29, None, None, %26, %20""",
        )

    def test_a_literal_is_made_a_tensor(self) -> None:
        module = HandWritten(lambda m, x: F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b) * 0.5)
        with torch.no_grad():
            self.assertExpectedInline(
                capture(module, torch.randn(5, 48), passes=FOLD).rewrite.after,
                """\
%0 = input                                 f32[40, 48]
%1 = input                                 f32[5, 48]
%2 = input                                 f32[4, 48]
%3 = input                                 f32[40, 4]
%4 = permute(%0, [1, 0])                   f32[48, 40]
%5 = mm(%1, %4)                            f32[5, 40]
%6 = permute(%2, [1, 0])                   f32[48, 4]
%7 = full([], 0.5, dtype=f32, device=cpu)  f32[]
%8 = mm(%1, %6)                            f32[5, 4]
%9 = permute(%3, [1, 0])                   f32[4, 40]
%10 = lora_fx.scaled_mm(%8, %9, %7)        f32[5, 40]
%11 = add(%5, %10)                         f32[5, 40]
return %11""",
            )


def literal(scale: float) -> HandWritten:
    return HandWritten(lambda m, x: F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b) * scale, torch.float64)


@pytest.mark.parametrize("scale", [2, 0.1, -1e-8, 1e30, 0.0])
def test_a_literal_keeps_its_precision(scale: float) -> None:
    """In float64 a literal that went through float32 would lose half its digits."""
    case = Case("", lambda: literal(scale), 1, {"scale": 1}, {"scale": 1}, dtype=torch.float64)
    result = compare(case, lambda *args, **kwargs: by_graphs(*args, **kwargs, passes=FOLD))
    assert result.captured.count("forward") == {"scale": 1}
    for ours, plain in zip(result.ours.tensors, result.plain.tensors, strict=True):
        for name in ours:
            assert (ours[name] - plain[name]).norm() <= 1e-14 * plain[name].norm()


def test_nothing_of_the_outputs_size_is_multiplied() -> None:
    graph = joint_graph(linear(), torch.randn(5, 8, requires_grad=True))

    def multiplications() -> int:
        nodes = graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)
        return sum(node.meta["val"].dim() == 2 for node in nodes)

    assert multiplications() == 2
    rewrite_graph(graph, FOLD)
    assert multiplications() == 0


def test_a_site_without_a_scale_is_not_for_it() -> None:
    module = HandWritten(lambda m, x: F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b))
    rewrite = capture(module, torch.randn(5, 48, requires_grad=True), passes=FOLD).rewrite
    assert rewrite.after == rewrite.before
    assert [site.forward for site in rewrite.report.sites] == [()]


def test_h_stays_what_it_was() -> None:
    """Whoever else reads h sees no scale in it."""

    def form(m: HandWritten, x: Tensor) -> tuple[Tensor, Tensor]:
        h = F.linear(x, m.a)
        return F.linear(x, m.w) + F.linear(h, m.b) * 0.5, h.exp()

    case = Case("", lambda: HandWritten(form), 1, {"scale": 1})
    result = compare(case, lambda *args, **kwargs: by_graphs(*args, **kwargs, passes=FOLD))
    assert result.captured.count("forward") == {"scale": 1}
    result.assert_as_accurate()


def test_the_second_run_changes_nothing() -> None:
    graph = joint_graph(linear(), torch.randn(5, 8, requires_grad=True))
    rewrite_graph(graph, FOLD)
    text = graph_text(graph)
    assert rewrite_graph(graph, FOLD).sites == []
    assert graph_text(graph) == text
