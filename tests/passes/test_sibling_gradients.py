"""One product for dX of siblings whose weights and factors lie together in memory: the graphs, that they compute the
same, and where it must not be. The passes decide as on a GPU (`tests/passes/on_gpu.py`)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._inductor import config
from torch.fx import Graph, Node

from lora_fx.passes import sibling_gradients
from lora_fx.passes._torch import auto_functionalized
from lora_fx.passes.graph import aten, is_row_view, peel_views
from lora_fx.passes.kernels import operators
from tests.passes.harness import Case, adapt, compare
from tests.passes.laying import by_graphs, laid
from tests.passes.modules import QKV, Attention, Block, Mlp
from tests.passes.on_gpu import calls, capture, text

bf16, f16 = torch.bfloat16, torch.float16
K, R = 64, 8


class Curves(nn.Module):
    """Three linears of one input, each under an activation of its own."""

    def __init__(self, k: int = K) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(k, n, bias=False) for n in (k, k // 2, k // 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.tanh(self.a(x)), torch.sigmoid(self.b(x)), torch.relu(self.c(x))


class Chain(nn.Module):
    """The gradient of one linear's output is computed from that of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(K, K, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.a(x) + torch.relu(self.b(x)))


def adapted(module: nn.Module, dtype: torch.dtype = bf16, **options: Any) -> nn.Module:
    return laid(adapt(module.to(dtype).requires_grad_(False), **{"rank": R, **options}))


def x(k: int = K, dtype: torch.dtype = bf16) -> Tensor:
    return torch.randn(2, 80, k, dtype=dtype, requires_grad=True)


def backward(module: Callable[..., Any], **options: Any) -> Graph:
    return capture(module, options.pop("inputs", x()), **options).backward[0].graph


def count(graph: Graph, target: Any = operators.joined_mm) -> int:
    return len(graph.find_nodes(op="call_function", target=target))


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_three_siblings() -> None:
    """The gradients are written side by side; the pairs read them there; g comes last."""
    assert_expected_inline(
        text(backward(adapted(Curves()))),
        """\
%0 = input bf16[64, 64]
%1 = input bf16[8, 64]
%2 = input bf16[64, 8]
%3 = input bf16[32, 64]
%4 = input bf16[8, 64]
%5 = input bf16[32, 8]
%6 = input bf16[16, 64]
%7 = input bf16[8, 64]
%8 = input bf16[16, 8]
%9 = input bf16[160, 64]
%10 = input f32[]
%11 = input bf16[160, 8]
%12 = input bf16[2, 80, 64]
%13 = input f32[]
%14 = input bf16[160, 8]
%15 = input bf16[2, 80, 32]
%16 = input f32[]
%17 = input bf16[160, 8]
| %18 = input b8[2, 80, 16]
| %19 = tangent bf16[2, 80, 64]
| %20 = tangent bf16[2, 80, 32]
| %21 = tangent bf16[2, 80, 16]
| %22 = full([], 0.0, dtype=bf16, layout=torch.strided, device=cpu, pin_memory=False) bf16[]
| %23 = where(%18, %22, %21) bf16[2, 80, 16]
| %24 = empty([160, 8], dtype=bf16, device=cpu) bf16[160, 8]
| %25 = empty([1, 16, 8], dtype=f32, device=cpu) f32[1, 16, 8]
| %26 = view(%23, [160, 16]) bf16[160, 16]
| %27 = convert_element_type(%20, f32) f32[2, 80, 32]
| %28 = convert_element_type(%15, f32) f32[2, 80, 32]
| %29 = sub(1, %28) f32[2, 80, 32]
| %30 = mul(%28, %29) f32[2, 80, 32]
| %31 = mul(%27, %30) f32[2, 80, 32]
| %32 = convert_element_type(%31, bf16) bf16[2, 80, 32]
| %33 = empty([160, 8], dtype=bf16, device=cpu) bf16[160, 8]
| %34 = empty([1, 32, 8], dtype=f32, device=cpu) f32[1, 32, 8]
| %35 = view(%32, [160, 32]) bf16[160, 32]
| %36 = convert_element_type(%19, f32) f32[2, 80, 64]
| %37 = convert_element_type(%12, f32) f32[2, 80, 64]
| %38 = mul(%37, %37) f32[2, 80, 64]
| %39 = sub(1, %38) f32[2, 80, 64]
| %40 = mul(%36, %39) f32[2, 80, 64]
| %41 = convert_element_type(%40, bf16) bf16[2, 80, 64]
| %42 = empty([2, 160, 8], dtype=f32, device=cpu) f32[2, 160, 8]
| %43 = empty([1, 64, 8], dtype=f32, device=cpu) f32[1, 64, 8]
| %44 = empty([24, 64], dtype=bf16, device=cpu) bf16[24, 64]
| %45 = view(%41, [160, 64]) bf16[160, 64]
| %46 = lora_fx.side_by_side([%45, %35, %26], [0, 72, 112], 192) bf16[160, 192]
| %47 = slice(%46, 1, 0, 64) bf16[160, 64]
| %48 = reshape(%47, [2, 80, 64]) bf16[2, 80, 64]
| %49 = slice(%46, 1, 72, 104) bf16[160, 32]
| %50 = reshape(%49, [2, 80, 32]) bf16[2, 80, 32]
| %51 = slice(%46, 1, 112, 128) bf16[160, 16]
| %52 = reshape(%51, [2, 80, 16]) bf16[2, 80, 16]
| %53 = tile(outputs=[%24, %25, %33, %34, %42, %43], inputs=[%52, %8, %17, %50, %5, %14, %48, %2, %11],
        program=#0+#1+#2) (None, (bf16[160, 8], f32[1, 16, 8], bf16[160, 8], f32[1, 32, 8], f32[2, 160, 8], f32[1,
        64, 8]))
| %54 = getitem(%53, 1) (bf16[160, 8], f32[1, 16, 8], bf16[160, 8], f32[1, 32, 8], f32[2, 160, 8], f32[1, 64, 8])
| %55 = getitem(%54, 0) bf16[160, 8]
| %56 = mul(%55, %16) bf16[160, 8]
| %57 = getitem(%54, 1) f32[1, 16, 8]
| %58 = getitem(%54, 2) bf16[160, 8]
| %59 = mul(%58, %13) bf16[160, 8]
| %60 = getitem(%54, 3) f32[1, 32, 8]
| %61 = getitem(%54, 4) f32[2, 160, 8]
| %62 = lora_fx.sum_parts([%61], [%10], bf16) (bf16[160, 8])
| %63 = getitem(%62, 0) bf16[160, 8]
| %64 = cat([%63, %59, %56], 1) bf16[160, 24]
| %65 = permute(%64, [1, 0]) bf16[24, 160]
| %66 = tile(outputs=[%44], program=#3, inputs=[%65, %9]) (None, (bf16[24, 64]))
| %67 = getitem(%66, 1) (bf16[24, 64])
| %68 = getitem(%67, 0) bf16[24, 64]
| %69 = slice(%68, 0, 16, 24) bf16[8, 64]
| %70 = slice(%68, 0, 8, 16) bf16[8, 64]
| %71 = slice(%68, 0, 0, 8) bf16[8, 64]
| %72 = slice(%64, 1, 0, 8) bf16[160, 8]
| %73 = slice(%64, 1, 8, 16) bf16[160, 8]
| %74 = slice(%64, 1, 16, 24) bf16[160, 8]
| %75 = auto_functionalized(lora_fx.put_, target=%46, parts=[%72, %73, %74], starts=[64, 104, 128]) (None, bf16[160,
        192])
| %76 = getitem(%75, 1) bf16[160, 192]
| %77 = getitem(%54, 5) f32[1, 64, 8]
| %78 = slice(%76, 1, 0, 136) bf16[160, 136]
| %79 = lora_fx.joined_mm(%78, [%0, %1, %3, %4, %6, %7]) bf16[160, 64]
| %80 = view(%79, [2, 80, 64]) bf16[2, 80, 64]
| %81 = lora_fx.sum_parts([%57, %60, %77], [%16, %13, %10], bf16) (bf16[16, 8], bf16[32, 8], bf16[64, 8])
| %82 = getitem(%81, 0) bf16[16, 8]
| %83 = getitem(%81, 1) bf16[32, 8]
| %84 = getitem(%81, 2) bf16[64, 8]
return None, %80, None, None, %71, %84, None, None, None, %70, %83, None, None, None, %69, %82
#0: bfloat16, 16 columns; in0 full, in1 factor 8 NR, in2 thin 8
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#1: bfloat16, 32 columns; in0 full, in1 factor 8 NR, in2 thin 8
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#2: bfloat16, 64 columns; in0 full, in1 factor 8 NR, in2 thin 8
    0: load in0
    1: down %0 in1
    2: across %0 in2 NR
#3: bfloat16, 160 columns; in0 full, in1 factor 64 NR
    0: load in0
    1: down %0 in1""",
    )


def test_nothing_else_makes_a_matrix_for_dx() -> None:
    """Neither a program nor another product: one of q, k and v computes dX, and nothing is added to it."""
    graph = backward(adapted(Attention(K)))
    (joined,) = graph.find_nodes(op="call_function", target=operators.joined_mm)
    (end,) = joined.users
    while end.op != "output":
        assert is_row_view(end)
        (end,) = end.users
    (room,) = graph.find_nodes(op="call_function", target=operators.side_by_side)
    assert [part.meta["val"].shape[1] for part in room.all_input_nodes] == [K, K // 2, K // 2]
    assert room.args[1:] == ([0, K + R, K + R + K // 2 + R], 192)
    inputs: list[Any] = [call.kwargs["inputs"] for call in calls(graph)]
    (pairs,) = [given for given in inputs if any(peel_views(each).args[:1] == (room,) for each in given)]
    assert len(pairs) == 9  # one launch for all three
    assert not any(aten.cat.default is node.target and joined in node.users for node in graph.nodes)


@pytest.mark.parametrize(("k", "parts"), [(K, False), (2 * K, True)])
def test_what_adds_up_g_writes_it_there(k: int, parts: bool) -> None:
    """Where all of it comes in parts; else it is copied."""
    graph = backward(adapted(Attention(k)), inputs=x(k))
    targets = [node.args[0] for node in graph.find_nodes(op="call_function", target=auto_functionalized)]
    assert targets.count(operators.sum_parts_beside_) == parts and targets.count(operators.put_) == (not parts)


def test_a_gradient_of_a_gradient() -> None:
    """Pointwise readers stay with what they read: one computes the other gradient."""
    graph = backward(adapted(Chain()))
    assert count(graph) == count(graph, operators.side_by_side) == 1


class Late(nn.Module):
    """The gradient of one linear's output is that of another's, which reads another x and comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(K, n, bias=False) for n in (K, K // 2, K))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, z = x.unbind()
        return torch.tanh(self.a(x) + self.c(z)), torch.sigmoid(self.b(x))


def test_what_reads_a_gradient_later_reads_it_where_g_is_by_then() -> None:
    """Inductor puts g into a copy of all if something reads the matrix as it was before."""
    graph = backward(adapted(Late(), target_modules=["a", "b"]))
    (room,) = graph.find_nodes(op="call_function", target=operators.side_by_side)
    (put,) = [user for user in room.users if user.target is auto_functionalized]
    order = {node: place for place, node in enumerate(graph.nodes)}
    views = [user for user in room.users if user is not put]
    assert views and all(order[reader] < order[put] for view in views for reader in ends(view))
    (filled,) = [node for node in put.users if node.args[1] == 1 and put.args[0] is operators.put_]
    assert len(filled.users) == 2  # all of it, and the gradient that the other linear has as well


def ends(view: Node) -> list[Node]:
    """What reads a value, seen in any shape."""
    found = []
    for user in view.users:
        found += ends(user) if is_row_view(user) or user.target is aten.reshape.default else [user]
    return found


# ---- numerics --------------------------------------------------------------------------------------------------------


def case(name: str, build: Callable[[], nn.Module], **more: Any) -> Case:
    return Case(name, build, 0, {}, **{"dtype": bf16, "shape": (2, 80, K), "seeds": 4, **more})


CASES = [
    case("attention", lambda: adapted(Attention(K))),
    case("in parts", lambda: adapted(Attention(2 * K)), shape=(2, 80, 2 * K), seeds=2),
    case("float16", lambda: adapted(Attention(K), f16), dtype=f16),
    case("any number of tokens", lambda: adapted(Curves()), shapes=((2, 80, K), (2, 33, K)), dynamic=True),
    case("rank 72", lambda: adapted(Attention(320), rank=72), shape=(2, 80, 320), seeds=2),
    case("curves", lambda: adapted(Curves())),
    case("a chain", lambda: adapted(Chain())),
    case("a late reader", lambda: adapted(Late(), target_modules=["a", "b"]), shape=(2, 80, K)),
    case("block", lambda: adapted(Block(K))),
]


SLOW = ("any number of tokens", "block")


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (case.name in SLOW), id=case.name) for case in CASES],
)
def test_as_accurate_as_plain(case: Case) -> None:
    """Outputs and every gradient, against float64."""
    result = compare(case, by_graphs)
    graph = result.captured.backward[0].graph
    expected = 2 if case.name == "block" else 1  # of q, k and v, and of o
    assert count(graph) == count(graph, operators.side_by_side) == expected
    result.assert_as_accurate()
    assert result.ours.saved <= result.plain.saved


# ---- where it must not be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: adapt(Attention(K).to(bf16).requires_grad_(False), rank=R), {}),
        (lambda: adapted(Attention(K), dropout=0.1), {}),
        (lambda: adapted(Attention(K), torch.float32), {"inputs": x(dtype=torch.float32)}),
        (lambda: adapted(Mlp(K, 128)), {}),
        (lambda: adapted(QKV(K, K // 2)), {}),
        (lambda: adapted(Attention(K), target_modules=["wq", "wo"]), {}),
    ],
    ids=["apart", "dropout", "float32", "what a program computes", "what a caller gives", "one alone"],
)
def test_not_of(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    """Gradients that a caller gives would be copied; those of gate and up are written over what their kernel reads."""
    graph = backward(build(), **options)
    assert count(graph) == count(graph, operators.side_by_side) == 0


def test_not_of_a_gradient_that_the_caller_gets() -> None:
    """It would have gaps between its rows."""
    module = adapted(Curves())

    def shifted(x: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        a, b, c = (getattr(module, name)(x) for name in "abc")
        return torch.tanh(a + shift), torch.sigmoid(b), torch.relu(c)

    shift = torch.randn(2, 80, K, dtype=bf16)
    assert count(capture(shifted, x(), shift).backward[0].graph) == 1
    torch._dynamo.reset()
    assert count(capture(shifted, x(), shift.requires_grad_()).backward[0].graph) == 0


@pytest.mark.parametrize("name", ["max_autotune", "max_autotune_gemm", "_micro_pipeline_tp"])
def test_not_where_inductor_looks_for_products(name: str) -> None:
    with config.patch({name: True}):
        assert count(backward(adapted(Curves()))) == 0
    torch._dynamo.reset()
    assert count(backward(adapted(Curves()))) == 1


def test_a_failure_leaves_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, str]] = []

    def fail(product: Any, siblings: Any) -> None:
        rewrite(product, siblings)
        raise ArithmeticError("no")

    def step(graph: Graph) -> None:
        before = text(graph)
        failures = list(sibling_gradients.join(graph))
        if failures:
            assert [str(error) for _, error in failures] == ["no"]
            found.append((before, text(graph)))

    rewrite = sibling_gradients._join
    monkeypatch.setattr(sibling_gradients, "_join", fail)
    backward(adapted(Curves()), step=step)
    ((before, after),) = found
    assert before == after
