"""`pair_gradients` by itself: g and dB become the two results of one operator."""

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_fx.passes.kernels import operators
from lora_fx.passes.pipeline import rewrite_graph
from lora_fx.passes.printer import graph_text
from tests.passes.foreign import HandWritten, Shapes
from tests.passes.harness import adapt, capture, joint_graph, only
from tests.passes.modules import QKV

PAIR = only("pair_gradients")
FOLDED = only("fold_scale", "pair_gradients")


def unscaled(shapes: Shapes | None = None) -> HandWritten:
    return HandWritten(lambda m, x: F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b), shapes=shapes)


def x() -> torch.Tensor:
    return torch.randn(5, 48, requires_grad=True)


class TestGraph(expecttest.TestCase):
    def test_training(self) -> None:
        self.assertExpectedInline(
            capture(unscaled(), x(), passes=PAIR).rewrite.after,
            """\
%0 = input                                  f32[40, 48]
%1 = input                                  f32[5, 48]
%2 = input                                  f32[4, 48]
%3 = input                                  f32[40, 4]
| %4 = tangent                              f32[5, 40]
%5 = permute(%0, [1, 0])                    f32[48, 40]
%6 = mm(%1, %5)                             f32[5, 40]
%7 = permute(%2, [1, 0])                    f32[48, 4]
%8 = mm(%1, %7)                             f32[5, 4]
%9 = permute(%3, [1, 0])                    f32[4, 40]
%10 = mm(%8, %9)                            f32[5, 40]
%11 = add(%6, %10)                          f32[5, 40]
| %12 = permute(%9, [1, 0])                 f32[40, 4]
| %13 = lora_fx.gradient_pair(%4, %12, %8)  (f32[5, 4], f32[40, 4])
| %14 = getitem(%13, 1)                     f32[40, 4]
| %15 = permute(%14, [1, 0])                f32[4, 40]
| %16 = getitem(%13, 0)                     f32[5, 4]
| %17 = permute(%15, [1, 0])                f32[40, 4]
| %18 = permute(%16, [1, 0])                f32[4, 5]
| %19 = mm(%18, %1)                         f32[4, 48]
| %20 = permute(%19, [1, 0])                f32[48, 4]
| %21 = permute(%7, [1, 0])                 f32[4, 48]
| %22 = mm(%16, %21)                        f32[5, 48]
| %23 = permute(%20, [1, 0])                f32[4, 48]
| %24 = permute(%5, [1, 0])                 f32[40, 48]
| %25 = mm(%4, %24)                         f32[5, 48]
| %26 = add(%22, %25)                       f32[5, 48]
return %11, None, %26, %23, %17""",
        )


def test_after_folding() -> None:
    captured = capture(adapt(nn.Linear(48, 40)), x(), passes=FOLDED)
    assert captured.count("backward") == {"scale": 1, "pair": 1}
    (line,) = (line for line in captured.rewrite.after.splitlines() if "gradient_pair" in line)
    assert line.startswith("| ")
    assert len(line.split("gradient_pair(")[1].split(")")[0].split(", ")) == 4, "dy, B, h and the scale"


def test_a_scale_that_is_not_folded_is_not_for_it() -> None:
    """The pair reads dy itself; t = dy * s is another matrix."""
    captured = capture(adapt(nn.Linear(48, 40)), x(), passes=PAIR)
    assert captured.rewrite.after == captured.rewrite.before


def test_b_in_matmul_layout() -> None:
    """The operator gives dB as [N, R]; the model wants [R, N]."""
    module = HandWritten(lambda m, x: F.linear(x, m.w) + x @ m.a @ m.b, shapes={"a": (48, 4), "b": (4, 40)})
    inputs = x()
    captured = capture(lambda t: module(t).sum(), inputs, passes=PAIR, backward=True)
    assert captured.count("backward") == {"pair": 1}
    assert module.b.grad is not None
    torch.testing.assert_close(module.b.grad, (inputs @ module.a).sum(0)[:, None].expand(4, 40))


@pytest.mark.parametrize("name", ["a", "b"])
def test_half_a_pair_is_none(name: str) -> None:
    """A frozen B has no dB to pair with; a frozen A takes nothing away."""
    module = unscaled()
    module.get_parameter(name).requires_grad = False
    captured = capture(module, x(), passes=PAIR)
    assert captured.count("backward") == ({"pair": 1} if name == "a" else {})


def test_no_backward() -> None:
    with torch.no_grad():
        captured = capture(unscaled(), x(), passes=PAIR)
    assert captured.rewrite.after == captured.rewrite.before


def test_the_second_run_changes_nothing() -> None:
    graph = joint_graph(adapt(QKV()), x())
    rewrite_graph(graph, FOLDED)
    assert len(graph.find_nodes(op="call_function", target=operators.gradient_pair)) == 3
    text = graph_text(graph)
    assert not any(site.rewritten for site in rewrite_graph(graph, FOLDED).sites)
    assert graph_text(graph) == text
