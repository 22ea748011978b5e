"""`stack_siblings` by itself: who is a sibling, and what of the backward is merged."""

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fx.passes.graph import MM
from lora_fx.passes.pipeline import rewrite_graph
from lora_fx.passes.printer import graph_text
from tests.passes.foreign import HandWritten, Shapes
from tests.passes.harness import Case, adapt, by_graphs, capture, compare, joint_graph, only
from tests.passes.modules import QKV, Mlp

STACK = only("stack_siblings")
TWO: Shapes = {"a": (4, 48), "b": (40, 4), "c": (6, 48), "d": (40, 6)}


def first(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b)


def second(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.w) + F.linear(F.linear(x, m.c), m.d)


def stacked(form: Callable[..., Any], shapes: Shapes | None = None, **options: Any) -> dict[str, tuple[str, ...]]:
    """The rewrites of each half over all sites, of a form whose numbers are as good as plain torch.compile's."""
    case = Case("", lambda: HandWritten(form, shapes=shapes or TWO), 2, {}, **options)
    result = compare(case, lambda *args, **kwargs: by_graphs(*args, **kwargs, passes=STACK))
    result.assert_as_accurate()
    assert result.ours.saved <= result.plain.saved
    sites = result.captured.rewrite.report.sites
    return {
        "forward": tuple(name for site in sites for name in site.forward),
        "backward": tuple(name for site in sites for name in site.backward),
        "notes": tuple(site.reason for site in sites if site.reason),
    }


BOTH = {"forward": ("stack(2)", "stack(2)"), "backward": ("stack(2)", "stack(2)"), "notes": ()}
NEITHER: dict[str, tuple[str, ...]] = {"forward": (), "backward": (), "notes": ()}


class TestGraph(expecttest.TestCase):
    def test_training(self) -> None:
        module = HandWritten(lambda m, x: (first(m, x), second(m, x)), shapes=TWO)
        x = torch.randn(5, 48, requires_grad=True)
        self.assertExpectedInline(
            capture(module, x, passes=STACK).rewrite.after,
            """\
%0 = input                    f32[40, 48]
%1 = input                    f32[5, 48]
%2 = input                    f32[4, 48]
%3 = input                    f32[40, 4]
%4 = input                    f32[6, 48]
%5 = input                    f32[40, 6]
| %6 = tangent                f32[5, 40]
| %7 = tangent                f32[5, 40]
%8 = permute(%0, [1, 0])      f32[48, 40]
%9 = mm(%1, %8)               f32[5, 40]
%10 = cat([%2, %4], 0)        f32[10, 48]
%11 = permute(%10, [1, 0])    f32[48, 10]
%12 = mm(%1, %11)             f32[5, 10]
%13 = slice(%12, 1, 0, 4)     f32[5, 4]
%14 = permute(%3, [1, 0])     f32[4, 40]
%15 = mm(%13, %14)            f32[5, 40]
%16 = add(%9, %15)            f32[5, 40]
%17 = permute(%0, [1, 0])     f32[48, 40]
%18 = mm(%1, %17)             f32[5, 40]
%19 = slice(%12, 1, 4, 10)    f32[5, 6]
%20 = permute(%5, [1, 0])     f32[6, 40]
%21 = mm(%19, %20)            f32[5, 40]
%22 = add(%18, %21)           f32[5, 40]
| %23 = permute(%7, [1, 0])   f32[40, 5]
| %24 = mm(%23, %19)          f32[40, 6]
| %25 = permute(%24, [1, 0])  f32[6, 40]
| %26 = permute(%20, [1, 0])  f32[40, 6]
| %27 = mm(%7, %26)           f32[5, 6]
| %28 = permute(%25, [1, 0])  f32[40, 6]
| %29 = permute(%17, [1, 0])  f32[40, 48]
| %30 = mm(%7, %29)           f32[5, 48]
| %31 = permute(%6, [1, 0])   f32[40, 5]
| %32 = mm(%31, %13)          f32[40, 4]
| %33 = permute(%32, [1, 0])  f32[4, 40]
| %34 = permute(%14, [1, 0])  f32[40, 4]
| %35 = mm(%6, %34)           f32[5, 4]
| %36 = cat([%35, %27], 1)    f32[5, 10]
| %37 = permute(%36, [1, 0])  f32[10, 5]
| %38 = mm(%37, %1)           f32[10, 48]
| %39 = slice(%38, 0, 4, 10)  f32[6, 48]
| %40 = permute(%39, [1, 0])  f32[48, 6]
| %41 = permute(%40, [1, 0])  f32[6, 48]
| %42 = permute(%33, [1, 0])  f32[40, 4]
| %43 = slice(%38, 0, 0, 4)   f32[4, 48]
| %44 = permute(%43, [1, 0])  f32[48, 4]
| %45 = mm(%36, %10)          f32[5, 48]
| %46 = add(%30, %45)         f32[5, 48]
| %47 = permute(%44, [1, 0])  f32[4, 48]
| %48 = permute(%8, [1, 0])   f32[40, 48]
| %49 = mm(%6, %48)           f32[5, 48]
| %50 = add(%46, %49)         f32[5, 48]
return %16, %22, None, %50, %47, %42, %41, %28""",
        )

    def test_inference(self) -> None:
        module = HandWritten(lambda m, x: (first(m, x), second(m, x)), shapes=TWO)
        with torch.no_grad():
            self.assertExpectedInline(
                capture(module, torch.randn(5, 48), passes=STACK).rewrite.after,
                """\
%0 = input                  f32[40, 48]
%1 = input                  f32[5, 48]
%2 = input                  f32[4, 48]
%3 = input                  f32[40, 4]
%4 = input                  f32[6, 48]
%5 = input                  f32[40, 6]
%6 = permute(%0, [1, 0])    f32[48, 40]
%7 = mm(%1, %6)             f32[5, 40]
%8 = cat([%2, %4], 0)       f32[10, 48]
%9 = permute(%8, [1, 0])    f32[48, 10]
%10 = mm(%1, %9)            f32[5, 10]
%11 = slice(%10, 1, 0, 4)   f32[5, 4]
%12 = permute(%3, [1, 0])   f32[4, 40]
%13 = mm(%11, %12)          f32[5, 40]
%14 = add(%7, %13)          f32[5, 40]
%15 = permute(%0, [1, 0])   f32[48, 40]
%16 = mm(%1, %15)           f32[5, 40]
%17 = slice(%10, 1, 4, 10)  f32[5, 6]
%18 = permute(%5, [1, 0])   f32[6, 40]
%19 = mm(%17, %18)          f32[5, 40]
%20 = add(%16, %19)         f32[5, 40]
return %14, %20""",
            )


def test_siblings_of_different_rank() -> None:
    assert stacked(lambda m, x: (first(m, x), second(m, x))) == BOTH


def test_inputs_that_are_equal_under_other_names() -> None:
    """Each linear has its own view of x, and here its own grouping of the tokens."""
    assert stacked(lambda m, x: (first(m, x), second(m, x.flatten(0, 1)))) == BOTH
    assert stacked(lambda m, x: (first(m, x.clone()), second(m, x.contiguous().view(8, 3, 48)))) == BOTH


def test_no_input_gradient() -> None:
    assert stacked(lambda m, x: (first(m, x), second(m, x)), x_grad=False) == BOTH


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_other_readers_of_x(order: tuple[int, ...]) -> None:
    """Their gradients stand in the same chain of sums, before, between and after the siblings'."""
    readers = (first, second, lambda m, x: torch.tanh(x))
    assert stacked(lambda m, x: tuple(readers[i](m, x) for i in order)) == BOTH
    assert stacked(lambda m, x: sum(readers[i](m, x).sum(-1) for i in order)) == BOTH


def test_a_factor_in_matmul_layout() -> None:
    """[K, R] beside [R, K]; its gradient is transposed."""
    shapes = TWO | {"c": (48, 6), "d": (6, 40)}
    assert stacked(lambda m, x: (first(m, x), F.linear(x, m.w) + x @ m.c @ m.d), shapes) == BOTH


def test_half_of_the_siblings_is_frozen() -> None:
    """A frozen factor has no dA, so only the forward is stacked."""

    def form(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return first(m, x), F.linear(x, m.w) + F.linear(F.linear(x, m.c.detach()), m.d)

    assert stacked(form) == {"forward": ("stack(2)", "stack(2)"), "backward": (), "notes": ()}


def test_input_gradients_that_do_not_meet() -> None:
    """One sibling's dX is transposed on its way to the sum: dA is stacked, dX is not, and the report says so."""
    found = stacked(lambda m, x: (first(m, x), second(m, x.t().clone().t())), shape=(24, 48))
    note = "stack: the siblings' input gradients do not end in one sum"
    assert found == BOTH | {"notes": (note, note)}


def test_several_groups() -> None:
    """q, k, v of one layer and gate, up of the next."""

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.mlp = QKV(48, 48), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x)
            return self.mlp(torch.tanh(q + k + v))

    captured = capture(adapt(Both()), torch.randn(24, 48, requires_grad=True), passes=STACK)
    assert captured.count("forward") == captured.count("backward") == {"stack(3)": 3, "stack(2)": 2}


def test_no_siblings() -> None:
    """Another input, another dtype, an independent mask, another region of checkpointing."""
    assert stacked(lambda m, x: second(m, F.pad(first(m, x).sin(), (0, 8)))) == NEITHER
    assert stacked(lambda m, x: (first(m, x), second(m, x + 1))) == NEITHER
    assert stacked(lambda m, x: (first(m, x), second(m, x.transpose(0, 1).contiguous()))) == NEITHER

    def dropped(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return (
            F.linear(x, m.w) + F.linear(F.linear(F.dropout(x, 0.1), m.a), m.b),
            F.linear(x, m.w) + F.linear(F.linear(F.dropout(x, 0.1), m.c), m.d),
        )

    assert stacked(dropped, random=True) == NEITHER

    def mixed(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.bfloat16()
        low = F.linear(y, m.w.bfloat16()) + F.linear(F.linear(y, m.c.bfloat16()), m.d.bfloat16())
        return first(m, x), low

    assert stacked(mixed) == NEITHER


def test_x_is_read_once() -> None:
    graph = joint_graph(adapt(QKV()), torch.randn(24, 48, requires_grad=True))

    def small_products() -> int:
        sizes = [node.meta["val"].shape for node in graph.find_nodes(op="call_function", target=MM)]
        return sum(min(size) <= 12 for size in sizes)

    # Of each: h, dB, g, dA. Then one h and one dA, three g and three dB.
    assert small_products() == 12
    rewrite_graph(graph, STACK)
    assert small_products() == 8


def test_the_stacked_factor_is_made_again_in_backward() -> None:
    """It is a copy of parameters that are there."""
    captured = capture(
        lambda x: sum(y.sum() for y in adapted(x)), torch.randn(24, 48, requires_grad=True), passes=STACK, backward=True
    )
    assert "cat([" in graph_text(captured.forward[0].graph)
    assert graph_text(captured.backward[0].graph).count("cat([") == 2, "of A, and of g"


adapted = adapt(QKV())


def test_the_second_run_changes_nothing() -> None:
    graph = joint_graph(adapt(QKV()), torch.randn(24, 48, requires_grad=True))
    rewrite_graph(graph, STACK)
    text = graph_text(graph)
    assert not any(site.rewritten for site in rewrite_graph(graph, STACK).sites)
    assert graph_text(graph) == text
