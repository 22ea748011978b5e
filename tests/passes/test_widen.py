"""The branch in the base's product, where a weight's rows have room for B: the graphs, that they compute the same, and
where it must not be. The passes decide as on a GPU (`tests/passes/on_gpu.py`). K = 160, N = 192, R = 72."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch._inductor import config
from torch.fx import Graph

from lora_fx.passes import pipeline
from lora_fx.passes.kernels import operators, wide
from tests.passes.harness import Case, adapt, compare
from tests.passes.laying import WideBlock, by_graphs, checkpointed, laid
from tests.passes.modules import Mlp
from tests.passes.on_gpu import capture, text

bf16 = torch.bfloat16
K, N, R = 160, 192, 72


@pytest.fixture(autouse=True)
def many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few are many here."""
    monkeypatch.setattr(wide, "MIN_ROWS", 128)


def x(tokens: int = 160, **options: Any) -> Tensor:
    return torch.randn(tokens, K, **{"dtype": bf16, "requires_grad": True, **options})


def mlp(dtype: torch.dtype = bf16, **options: Any) -> nn.Module:
    return laid(adapt(Mlp(K, N).to(dtype), **{"rank": R, "alpha": 2 * R, **options}))


class Parallel(nn.Module):
    """Linears that read one x, all of whose results a pointwise operation reads."""

    def __init__(self, count: int, n: int = N, bias: bool = False) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(K, n, bias=bias) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        result = x.new_ones(())
        for linear in self.linears:
            result = result * torch.sigmoid(linear(x))
        return result


def parallel(count: int, n: int = N, bias: bool = False, **options: Any) -> nn.Module:
    return laid(adapt(Parallel(count, n, bias).to(bf16), **{"rank": R, "alpha": 2 * R, **options}))


def widened(graph: Graph) -> int:
    """How many products add their branch."""
    return len(graph.find_nodes(op="call_function", target=operators.wide_mm))


def forward(module: Callable[..., Any], *inputs: Tensor) -> Graph:
    return capture(module, *(inputs or (x(),))).forward[0].graph


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_gate_and_up() -> None:
    """x has one h on either side; the kernel that makes silu(gate) * up reads two matrices and no more."""
    captured = capture(mlp(), x())
    assert_expected_inline(
        text(captured.forward[0].graph),
        """\
%0 = input bf16[192, 160]
%1 = input bf16[160, 160]
%2 = input f32[]
%3 = input f32[]
%4 = input bf16[72, 160]
%5 = input bf16[192, 72]
%6 = input bf16[192, 160]
%7 = input f32[]
%8 = input f32[]
%9 = input bf16[72, 160]
%10 = input bf16[192, 72]
%11 = input bf16[160, 192]
%12 = input f32[]
%13 = input f32[]
%14 = input bf16[72, 192]
%15 = input bf16[160, 72]
%16 = _foreach_mul([%3, %7, %12], [%2, %8, %13]) (f32[], f32[], f32[])
%17 = getitem(%16, 0) f32[]
%18 = getitem(%16, 1) f32[]
%19 = getitem(%16, 2) f32[]
%20 = cat([%4, %9], 0) bf16[144, 160]
%21 = permute(%20, [1, 0]) bf16[160, 144]
%22 = mm(%1, %21) bf16[160, 144]
%23 = slice(%22, 1, 0, 72) bf16[160, 72]
%24 = slice(%22, 1, 72, 144) bf16[160, 72]
%25 = cat([%24, %1, %23], 1) bf16[160, 304]
%26 = slice(%25, 1, 72, 304) bf16[160, 232]
%27 = lora_fx.wide_mm(%26, %0, %5, %17, 'right') bf16[160, 192]
%28 = convert_element_type(%27, f32) f32[160, 192]
%29 = neg(%28) f32[160, 192]
%30 = exp(%29) f32[160, 192]
%31 = add(%30, 1) f32[160, 192]
%32 = div(%28, %31) f32[160, 192]
%33 = convert_element_type(%32, bf16) bf16[160, 192]
%34 = slice(%25, 1, 0, 232) bf16[160, 232]
%35 = lora_fx.wide_mm(%34, %6, %10, %18, 'left') bf16[160, 192]
%36 = mul(%33, %35) bf16[160, 192]
%37 = permute(%11, [1, -2]) bf16[192, 160]
%38 = mm(%36, %37) bf16[160, 160]
%39 = permute(%14, [1, 0]) bf16[192, 72]
%40 = mm(%36, %39) bf16[160, 72]
%41 = permute(%15, [1, 0]) bf16[72, 160]
%42 = mm(%40, %41) bf16[160, 160]
%43 = mul(%42, %19) bf16[160, 160]
%44 = add(%38, %43) bf16[160, 160]
return %44, %0, %1, %4, %5, %6, %9, %10, %11, %14, %15, %17, %23, %18, %24, %27, %35, %36, %19, %40""",
    )
    # Autograd keeps what it keeps of the frozen model, and three h.
    kept: Any = captured.forward[0].graph.output_node().args[0]
    made = [node for node in kept if node.op == "call_function" and node.meta["val"].dim()]
    assert sorted(tuple(node.meta["val"].shape) for node in made) == [(160, R)] * 3 + [(160, K)] + [(160, N)] * 3
    assert all(node.meta["val"].is_contiguous() or node.meta["val"].shape[1] == R for node in made)


def test_a_linear_by_itself_has_one_h_beside_x() -> None:
    graph = forward(parallel(1))
    assert widened(graph) == 1
    (cat,) = (n for n in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default) if n.args[1:] == (1,))
    parts: Any = cat.args[0]
    assert [tuple(part.meta["val"].shape) for part in parts] == [(160, K), (160, R)]


def test_of_three_the_last_stays() -> None:
    captured = capture(parallel(3), x())
    graph = captured.forward[0].graph
    assert widened(graph) == 2
    (rewrite,) = captured.rewrites
    assert [("widen" in site.forward, "accumulate" in site.forward) for site in rewrite.report.sites] == [
        (True, False),
        (True, False),
        (False, False),
    ]
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)) == 1


def test_each_x_has_its_own_matrix() -> None:
    """Of two blocks, and of two checkpoints of one x, whose h are computed again at different times."""
    first, second = mlp(), mlp()
    assert widened(forward(lambda x: second(torch.sin(first(x))))) == 4
    torch._dynamo.reset()
    one, other = parallel(1), parallel(1)

    def both(x: Tensor) -> Tensor:
        return checkpointed(one)(x) + checkpointed(other)(x)

    graph = forward(both)
    assert widened(graph) == 2
    cats = [n for n in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default) if n.args[1:] == (1,)]
    assert [tuple(cat.meta["val"].shape) for cat in cats] == [(160, K + R)] * 2


def test_under_dropout() -> None:
    """Each h is of x under a mask; the base reads x itself."""
    assert widened(forward(mlp(dropout=0.1))) == 2


def test_a_checkpoint_computes_them_again() -> None:
    module = mlp()
    captured = capture(checkpointed(module), x())
    assert [widened(half.graph) for half in (captured.forward[0], captured.backward[0])] == [2, 2]


# ---- numerics --------------------------------------------------------------------------------------------------------


def case(name: str, build: Callable[[], nn.Module], **more: Any) -> Case:
    return Case(name, build, 0, {}, **{"dtype": bf16, "shape": (2, 80, K), "seeds": 4, **more})


CASES = [
    (case("mlp", mlp), 2),
    (case("scaled by a quarter", lambda: mlp(alpha=R / 4)), 2),
    (case("without gradients", mlp, grad=torch.no_grad), 2),
    (case("checkpoint", mlp, wrap=checkpointed), 2),
    (case("dropout", lambda: mlp(dropout=0.1), random=True), 2),
    (case("one", lambda: parallel(1)), 1),
    (case("three", lambda: parallel(3)), 2),
    (
        case(
            "block",
            lambda: laid(
                adapt(
                    WideBlock(K, N).to(bf16).requires_grad_(False),
                    rank=R,
                    alpha=R,
                    target_modules=["gate", "up", "down"],
                )
            ),
        ),
        2,
    ),
]


@pytest.mark.parametrize(("case", "count"), CASES, ids=lambda value: value.name if isinstance(value, Case) else "")
def test_as_accurate_as_plain(case: Case, count: int) -> None:
    """Outputs and every gradient, against float64."""
    result = compare(case, by_graphs)
    assert widened(result.captured.forward[0].graph) == count
    result.assert_as_accurate()
    assert result.ours.saved <= result.plain.saved


def test_b_is_read_on_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room holds what B was at the last use."""
    found: list[str] = []
    find = wide._find

    def noted(weight: Tensor) -> tuple[str, int]:
        found.append(find(weight)[0])
        return find(weight)

    monkeypatch.setattr(wide, "_find", noted)
    module: Any = mlp()
    compiled = torch.compile(module, fullgraph=True, options=pipeline.hooks(strict=True))
    given = x()
    for _ in range(3):
        with torch.no_grad():
            module.up.lora_b.normal_(std=0.1)
            module.gate.lora_b.normal_(std=0.1)
            module.gate.lora_scale.mul_(0.5)
        found.clear()
        result = compiled(given)
        assert found == ["right", "left"]
        torch.testing.assert_close(result, module(given), rtol=5e-2, atol=5e-2)


# ---- where it must not be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: mlp(rank=64, alpha=64),
        lambda: mlp(alpha=3 * R),
        lambda: mlp(torch.float16),
        lambda: parallel(2, n=K),
        lambda: parallel(2, bias=True),
        lambda: adapt(Mlp(K, N).to(bf16), rank=R),
    ],
    ids=["rank", "scale", "float16", "width", "bias", "not laid"],
)
def test_not_for(build: Callable[[], nn.Module]) -> None:
    module = build()
    assert widened(forward(module, x(dtype=next(module.parameters()).dtype))) == 0


def test_not_for_few_rows_or_any_number_of_them() -> None:
    assert widened(forward(mlp(), x(127))) == 0
    torch._dynamo.reset()
    given = x()
    torch._dynamo.mark_dynamic(given, 0)
    assert widened(forward(mlp(), given)) == 0


def test_not_for_another_rank_than_the_room_is_of() -> None:
    module: Any = mlp()
    for linear in (module.gate, module.up):
        linear.lora_a = nn.Parameter(torch.randn(80, K, dtype=bf16))
        linear.lora_b = nn.Parameter(torch.randn(N, 80, dtype=bf16))
    assert [linear._lora_room for linear in (module.gate, module.up)] == ["right", "left"]
    assert widened(forward(module)) == 0


@pytest.mark.parametrize("name", ["max_autotune", "max_autotune_gemm", "_micro_pipeline_tp"])
def test_not_where_inductor_looks_for_products(name: str) -> None:
    with config.patch({name: True}):
        assert widened(forward(mlp())) == 0


# ---- the operator ----------------------------------------------------------------------------------------------------


def roomy(side: str, dtype: torch.dtype = bf16) -> nn.Parameter:
    memory = torch.randn(N, K + R, dtype=dtype)
    rows = memory[:, R:] if side == wide.LEFT else memory[:, :K]
    weight = nn.Parameter(torch.from_dlpack(rows), requires_grad=False)
    wide.note_room(weight, side, R)
    return weight


def operands(side: str, dtype: torch.dtype = bf16) -> tuple[Tensor, Tensor, Tensor, Tensor, str]:
    return (
        torch.randn(20, K + R, dtype=dtype),
        roomy(side, dtype),
        torch.randn(N, R, dtype=dtype),
        torch.tensor(2.0),
        side,
    )


def expected(xh: Tensor, weight: Tensor, b: Tensor, scale: Tensor, side: str) -> Tensor:
    h, given = (xh[:, :R], xh[:, R:]) if side == wide.LEFT else (xh[:, K:], xh[:, :K])
    return given.double() @ weight.double().t() + scale * (h.double() @ b.double().t())


@pytest.mark.parametrize("side", [wide.LEFT, wide.RIGHT])
@pytest.mark.parametrize("dtype", [bf16, torch.float32])
def test_the_operator(dtype: torch.dtype, side: str, caplog: pytest.LogCaptureFixture) -> None:
    given = operands(side, dtype)
    before = given[1].clone()
    for scale in (given[3], None):
        found = operators.wide_mm(*given[:3], scale, side).double()
        exact = expected(*given[:3], torch.tensor(1.0) if scale is None else scale, side)
        assert (found - exact).norm() < (0.003 if dtype == bf16 else 1e-6) * exact.norm()
    assert torch.equal(given[1], before) and not caplog.messages
    torch.library.opcheck(operators.wide_mm, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("side", [wide.LEFT, wide.RIGHT])
@pytest.mark.parametrize("dtype", [bf16, torch.float32])
def test_the_operator_without_room(dtype: torch.dtype, side: str, caplog: pytest.LogCaptureFixture) -> None:
    """The same values, but that the branch is rounded by itself, and one line that says why it is slower."""
    given = operands(side, dtype)
    exact = expected(*given)
    wide._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lora_fx.passes"):
        for _ in range(2):
            moved = (given[0], given[1].clone(), *given[2:])
            found = operators.wide_mm(*moved).double()
            assert (found - exact).norm() < (0.005 if dtype == bf16 else 1e-6) * exact.norm()
    assert len(caplog.messages) == 1 and "before lora_fx.compile" in caplog.messages[0]


@pytest.mark.parametrize("change", ["rank", "view", "moved"])
def test_room_is_of_one_weight_and_rank(change: str) -> None:
    """Nothing is written where the operands are not those that the room was made for."""
    memory = torch.randn(N, K + R, dtype=bf16)
    owner = nn.Parameter(torch.from_dlpack(memory[:, :K]), requires_grad=False)
    wide.note_room(owner, wide.RIGHT, R)
    weight, rank = owner.detach(), R
    if change == "rank":
        rank = R - 8
    elif change == "view":
        weight = weight[: N // 2]
    else:
        owner.data = owner.data.clone()
    before = memory.clone()
    b = torch.randn(len(weight), rank, dtype=bf16)
    operators.wide_mm(torch.randn(20, K + rank, dtype=bf16), weight, b, None, wide.RIGHT)
    assert torch.equal(memory, before)


def test_memory_of_others_is_no_room() -> None:
    """A view with gaps of what somebody else has, at an address that a weight with room had before it died."""
    memory = torch.randn(N, K + R, dtype=bf16)
    weight = nn.Parameter(memory[:, :K], requires_grad=False)
    wide.note_room(weight, wide.RIGHT, R)
    assert wide.room_of(weight) == wide.RIGHT
    given = torch.randn(20, K + R, dtype=bf16), weight.detach(), torch.randn(N, R, dtype=bf16), None, wide.RIGHT
    operators.wide_mm(*given)
    assert torch.equal(memory[:, K:], given[2])  # it is the parameter's, by whatever tensor it comes
    del weight, given
    memory.normal_()
    before, view = memory.clone(), memory[:, :K]
    assert wide.room_of(view) == ""
    operators.wide_mm(torch.randn(20, K + R, dtype=bf16), view, torch.randn(N, R, dtype=bf16), None, wide.RIGHT)
    assert torch.equal(memory, before)
