"""h in the base's product, where A lies behind its weight in memory: the graphs, that they compute the same, and where
it must not be. The passes decide as on a GPU (`tests/passes/on_gpu.py`). K = 48, N = 128, R = 8."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._inductor import config
from torch.fx import Graph

from lora_fx.passes import beside as beside_pass
from lora_fx.passes.kernels import beside, operators
from lora_fx.passes.tile_nodes import is_part_of_stacked
from tests.passes.harness import Case, adapt, compare
from tests.passes.laying import WideBlock, by_graphs, checkpointed, laid
from tests.passes.modules import QKV, Attention, Mlp
from tests.passes.on_gpu import calls, capture, programs, text

bf16 = torch.bfloat16
K, N, R = 48, 128, 8


def x(tokens: int = 160, k: int = K, **options: Any) -> Tensor:
    return torch.randn(tokens, k, **{"dtype": bf16, "requires_grad": True, **options})


def mlp(dtype: torch.dtype = bf16, **options: Any) -> nn.Module:
    return laid(adapt(Mlp(K, N).to(dtype), **{"rank": R, **options}))


class Residual(nn.Module):
    """A SwiGLU, and the stream that it adds to."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def residual(**options: Any) -> nn.Module:
    return laid(adapt(Residual().to(bf16), rank=R, **options))


def stacked(graph: Graph) -> int:
    """How many products have h as well."""
    return len(graph.find_nodes(op="call_function", target=operators.stacked_mm))


def inferred(module: Callable[..., Any], *inputs: Tensor, **options: Any) -> Graph:
    with torch.no_grad():
        (forward,) = capture(module, *inputs, **options).forward
    return forward.graph


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_few_tokens_without_gradients() -> None:
    """All three linears: h of silu(gate) * up is a kernel by itself where there are few rows."""
    assert_expected_inline(
        text(inferred(residual(), x(64))),
        """\
%0 = input bf16[128, 48]
%1 = input bf16[64, 48]
%2 = input f32[]
%3 = input f32[]
%4 = input bf16[8, 48]
%5 = input bf16[128, 8]
%6 = input bf16[128, 48]
%7 = input f32[]
%8 = input f32[]
%9 = input bf16[8, 48]
%10 = input bf16[128, 8]
%11 = input bf16[48, 128]
%12 = input f32[]
%13 = input f32[]
%14 = input bf16[8, 128]
%15 = input bf16[48, 8]
%16 = lora_fx.stacked_mm(%1, [%0, %4, %6, %9]) bf16[64, 272]
%17 = slice(%16, 1, 0, 128) bf16[64, 128]
%18 = slice(%16, 1, 128, 136) bf16[64, 8]
%19 = slice(%16, 1, 136, 264) bf16[64, 128]
%20 = slice(%16, 1, 264, 272) bf16[64, 8]
%21 = tile(outputs=[%17], program=#0, inputs=[%18, %5, %2, %3, %17, %20, %10, %7, %8, %19]) (None, (bf16[64, 128]))
%22 = getitem(%21, 1) (bf16[64, 128])
%23 = getitem(%22, 0) bf16[64, 128]
%24 = lora_fx.stacked_mm(%23, [%11, %14]) bf16[64, 56]
%25 = slice(%24, 1, 0, 48) bf16[64, 48]
%26 = slice(%24, 1, 48, 56) bf16[64, 8]
%27 = empty([64, 48], dtype=bf16, device=cpu) bf16[64, 48]
%28 = tile(outputs=[%27], program=#1, inputs=[%26, %15, %12, %13, %25, %1]) (None, (bf16[64, 48]))
%29 = getitem(%28, 1) (bf16[64, 48])
%30 = getitem(%29, 0) bf16[64, 48]
return %30
#0: bfloat16, 128 columns; in0 thin 8, in1 factor 8 NR, in2 number, in3 number, in4 full, in5 thin 8, in6 factor 8
        NR, in7 number, in8 number, in9 full
    0: product in0 in1 in2|in3
    1: load in4
    2: op add %1 %0
    3: op sigmoid %2
    4: op mul %2 %3
    5: product in5 in6 in7|in8
    6: load in9
    7: op add %6 %5
    8: op mul %4 %7
    9: store %8 bfloat16
#1: bfloat16, 48 columns; in0 thin 8, in1 factor 8 NR, in2 number, in3 number, in4 full, in5 full
    0: product in0 in1 in2|in3
    1: load in4
    2: op add %1 %0
    3: load in5
    4: op add %3 %2
    5: store %4 bfloat16""",
    )


def test_a_checkpoint_computes_both_again() -> None:
    """Backward reads h once more after the kernel that writes the gradients, which has other memory than the base's."""
    captured = capture(checkpointed(mlp()), x())
    for half in (captured.forward[0].graph, captured.backward[0].graph):
        assert stacked(half) == 1
        order = {node: place for place, node in enumerate(half.nodes)}
        for call in calls(half):
            outputs: Any = call.kwargs["outputs"]
            for out in filter(is_part_of_stacked, outputs):
                others = [part for part in out.args[0].users if part is not out]
                assert all(order[user] <= order[call] for part in others for user in part.users)


def test_not_where_autograd_keeps_any_of_it() -> None:
    """It would keep what has gaps between its rows, which the user's hooks may give back without (``save_on_cpu``)."""
    forward, backward = capture(mlp(), x()).forward[0].graph, capture(mlp(), x()).backward[0].graph
    assert stacked(forward) == stacked(backward) == 0
    one = laid(adapt(nn.Linear(K, N, bias=False, dtype=bf16), rank=R))
    assert stacked(capture(lambda x: 2.0 * one(x) + 1.0, x()).forward[0].graph) == 0  # it keeps h
    assert stacked(inferred(lambda x: 2.0 * one(x) + 1.0, x())) == 1


@pytest.mark.parametrize(
    "seen",
    [lambda y: y, lambda y: y.view(2, 32, N).transpose(1, 2), lambda y: y.view(64, 8, 16), lambda y: y[:, :64]],
    ids=["whole", "transposed", "heads", "a part"],
)
def test_what_the_caller_gets_has_no_gaps(seen: Callable[[Tensor], Tensor]) -> None:
    module = mlp()

    def gated(x: Tensor) -> Tensor:
        return seen(nn.functional.silu(module.gate(x)) * module.up(x))  # type: ignore[operator]  # submodules

    graph = inferred(gated, x(64))
    assert stacked(graph) == 1
    (call,) = calls(graph)
    assert not any(map(is_part_of_stacked, call.kwargs["outputs"]))  # type: ignore[arg-type]


def test_not_for_a_linear_that_reads_one_input_twice() -> None:
    """Beside a sibling: two products could compute the same columns of their stack. Else both are one product."""
    one, other = (laid(adapt(nn.Linear(K, N, bias=False, dtype=bf16), rank=R)) for _ in range(2))
    assert stacked(inferred(lambda x: torch.relu(one(x)) * torch.sigmoid(one(x)) * other(x), x(64))) == 0
    torch._dynamo.reset()
    assert stacked(inferred(lambda x: torch.relu(one(x)) * other(x), x(64))) == 1


# ---- numerics --------------------------------------------------------------------------------------------------------


def case(name: str, build: Callable[[], nn.Module], **more: Any) -> Case:
    return Case(name, build, 0, {}, **{"dtype": bf16, "shape": (2, 80, K), "seeds": 4, **more})


CASES = [
    (case("checkpoint", mlp, wrap=checkpointed), 1),
    (case("few tokens", residual, shape=(2, 32, K), grad=torch.no_grad), 2),
    (case("any number of tokens", mlp, shapes=((2, 80, K), (2, 33, K)), dynamic=True, grad=torch.no_grad), 1),
    (case("float16", lambda: mlp(torch.float16), dtype=torch.float16, wrap=checkpointed), 1),
    (case("block", lambda: laid(adapt(WideBlock(K, N).to(bf16).requires_grad_(False), rank=R)), wrap=checkpointed), 2),
    (case("q, k, v", lambda: laid(adapt(QKV(K, 24).to(bf16), rank=R))), 1),
    (case("q, k, v, without gradients", lambda: laid(adapt(QKV(K, 24).to(bf16), rank=R)), grad=torch.no_grad), 1),
    (case("attention", lambda: laid(adapt(Attention(64).to(bf16), rank=R)), shape=(2, 80, 64)), 1),
]


@pytest.mark.parametrize(("case", "count"), CASES, ids=lambda value: value.name if isinstance(value, Case) else "")
def test_as_accurate_as_plain(case: Case, count: int) -> None:
    """Outputs and every gradient, against float64."""
    result = compare(case, by_graphs)
    assert stacked(result.captured.forward[0].graph) == count
    result.assert_as_accurate()
    assert result.ours.saved <= result.plain.saved


# ---- where it must not be --------------------------------------------------------------------------------------------


def test_not_where_nothing_lies_together() -> None:
    assert stacked(inferred(adapt(Mlp(K, N).to(bf16), rank=R), x(64))) == 0


def test_alone_not_where_a_sum_is_written() -> None:
    """It would be rounded after the base is: the base adds to the branch's product instead, to round once."""
    module = laid(adapt(nn.Linear(K, N, bias=False, dtype=bf16), rank=R))
    assert stacked(inferred(module, x(64))) == 0


@pytest.mark.parametrize(
    ("build", "rank", "expected"),
    [(Mlp, 32, 1), (Mlp, 40, 0), (QKV, 32, 0)],
    ids=["rank 32", "rank 40", "sums that are written"],
)
def test_siblings_of_many_rows(build: Any, rank: int, expected: int) -> None:
    """Up to some rows all are one product; with more, those of ranks that are not high whose sums no kernel writes."""
    module = laid(adapt(build(96, 96).to(bf16), rank=rank))
    inputs = [torch.randn(rows, 96, dtype=bf16) for rows in (beside.MANY_ROWS, beside.MANY_ROWS + 8)]
    assert stacked(inferred(module, inputs[0])) == 1
    torch._dynamo.reset()
    assert stacked(inferred(module, inputs[1])) == expected


def test_a_sum_that_kernels_compute_on_is_left_to_them() -> None:
    """q and k under their rotary embedding, which would be rounded before, and v where heads are repeated; not what the
    caller gets."""
    alone, added = ["product", "store"], ["product", "load", "op", "store"]
    for module, k, expected in ((Attention(64), 64, [alone] * 3), (QKV(K, 24), K, [added] * 3)):
        torch._dynamo.reset()
        graph = capture(laid(adapt(module.to(bf16), rank=R)), x(k=k).unflatten(0, (2, -1))).forward[0].graph
        assert stacked(graph) == 1
        bodies = [[statement[0] for statement in program.body] for program in programs(graph)]
        assert [body for body in bodies if body in (alone, added)] == expected


def test_autograd_keeps_a_copy_of_h() -> None:
    """Three in one matrix without gaps, as without this; not what else the product has made."""
    module = laid(adapt(QKV(K, 24).to(bf16), rank=R))
    graph = capture(module, x()).forward[0].graph
    assert stacked(graph) == 1
    kept = [value for node in graph.output_node().all_input_nodes if (value := node.meta["val"]).shape == (160, R)]
    assert [value.stride() for value in kept] == [(3 * R, 1)] * 3
    sizes = {value.untyped_storage()._cdata: value.untyped_storage().nbytes() for value in kept}
    assert list(sizes.values()) == [160 * 3 * R * 2]


def test_not_where_a_norm_computes_the_sum() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(K, N, bias=False), nn.RMSNorm(N)

        def forward(self, x: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
            total = stream + self.linear(x)
            return self.norm(total), total

    module = laid(adapt(Normed().to(bf16).requires_grad_(False), rank=R, target_modules="linear"))
    assert stacked(inferred(module, x(64), torch.randn(64, N, dtype=bf16))) == 0


def test_not_under_dropout() -> None:
    """h is of another x then; without gradients there is none to drop."""
    module = mlp(dropout=0.1)
    assert stacked(inferred(module, x())) == 0
    torch._dynamo.reset()
    assert stacked(inferred(module.eval(), x())) == 1


@pytest.mark.parametrize("name", ["max_autotune", "max_autotune_gemm", "_micro_pipeline_tp"])
def test_not_where_inductor_looks_for_products(name: str) -> None:
    with config.patch({name: True}):
        assert stacked(inferred(mlp(), x(64))) == 0
    torch._dynamo.reset()
    assert stacked(inferred(mlp(), x(64))) == 1


@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "expected"),
    [
        (1, 14336, 4096, 16, True),
        (64, 14336, 4096, 128, True),
        (64, 4096, 14336, 16, True),
        (1, 4096, 14336, 16, False),
        (512, 4096, 14336, 16, False),
        (512, 14336, 4096, 128, True),
        (8192, 14336, 4096, 32, True),
        (8192, 14336, 4096, 64, False),
        (8192, 4096, 4096, 16, False),
        ("any", 14336, 4096, 16, True),
        ("any", 14336, 4096, 64, False),
        ("any", 4096, 14336, 16, False),
    ],
)
def test_where_it_pays(m: Any, n: int, k: int, rank: int, expected: bool) -> None:
    """By the table in the module."""
    assert beside.pays(m, n, k, rank) == expected


@pytest.mark.parametrize(
    ("m", "rank", "written", "alone", "expected"),
    [
        (1, 16, True, False, True),
        (64, 128, False, True, True),
        (512, 16, True, False, True),
        (512, 16, False, True, False),
        (512, 16, False, False, True),
        (512, 64, False, True, True),
        (2048, 64, True, False, True),
        (4096, 16, True, False, False),
        (4096, 64, False, False, False),
        (8192, 16, False, True, True),
        ("any", 16, False, True, True),
        ("any", 16, True, False, False),
        ("any", 64, False, False, False),
    ],
)
def test_where_siblings_pay_together(m: Any, rank: int, written: bool, alone: bool, expected: bool) -> None:
    """By the tables that the function names."""
    assert beside.pays_together(m, rank, written, alone) == expected


def test_a_failure_leaves_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, str]] = []

    def fail(down: Any, group: Any) -> None:
        rewrite(down, group)
        raise ArithmeticError("no")

    def step(graph: Graph) -> None:
        before = text(graph)
        failures = list(beside_pass.join(graph))
        assert [str(error) for _, error in failures] == ["no"]
        found.append((before, text(graph)))

    rewrite = beside_pass._rewrite
    monkeypatch.setattr(beside_pass, "_rewrite", fail)
    inferred(mlp(), x(64), step=step)
    ((before, after),) = found
    assert before == after
