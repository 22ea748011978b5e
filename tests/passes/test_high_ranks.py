"""Ranks above 32 on a GPU: what is left to the matrix library, and that all of it computes the same.

Programs are cut out where the pipeline's own choice has a tile for them. M = 272 tokens: fewer than 256 have none.
The graphs themselves are in `tests/passes/test_golden_high_ranks.py`.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from lora_fx.passes import tile_stacks
from lora_fx.passes._torch import inductor_config
from lora_fx.passes.graph import CONVERT, MM, is_call
from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.tile_choice import choose
from lora_fx.passes.kernels.tile_program import Tile
from lora_fx.passes.printer import graph_text
from lora_fx.passes.site import MARK
from tests.passes import on_gpu, tile_cases
from tests.passes.harness import Captured, Case, Outcome, adapt, compare
from tests.passes.modules import QKV, Mlp, Residual
from tests.passes.on_gpu import capture, one_tile, programs

bf16 = torch.bfloat16
M = 272


def tile(kinds: Any, body: Any, rows: Any, columns: int) -> Tile | None:
    """The pipeline's choice whether, but one tile for all, so that graphs do not hang on how tiles are chosen."""
    return None if choose(kinds, body, rows, columns) is None else one_tile(kinds, body, rows, columns)


def lower(graph: torch.fx.Graph) -> None:
    on_gpu.lower(graph, tile)


def by_graphs(case: Case, module: nn.Module, **more: Any) -> tuple[Outcome, Captured]:
    return on_gpu.by_graphs(case, module, step=lower, **more)


def x(width: int, rows: int = M) -> Tensor:
    return torch.randn(rows, width, dtype=bf16, requires_grad=True)


def qkv(width: int = 144, kv: int = 48, **config: Any) -> nn.Module:
    return adapt(QKV(width, kv).to(bf16), **config)


def mlp(width: int = 80, hidden: int = 160, **config: Any) -> nn.Module:
    return adapt(Mlp(width, hidden).to(bf16), **config)


def test_gradients_are_scaled_before_they_are_rounded() -> None:
    """g and dB of gate, up and down, where both are left to the matrix library."""
    (backward,) = capture(mlp(160, 320, rank=72, alpha=1.7 * 72), x(160), step=lower).backward
    products = backward.graph.find_nodes(op="call_function", target=operators.float_mm)
    assert len(products) == 6
    for product in products:
        (scaled,) = product.users
        (rounded,) = scaled.users
        assert product.meta["val"].dtype == scaled.meta["val"].dtype == torch.float32
        assert is_call(rounded, CONVERT) and rounded.meta["val"].dtype == bf16


def adds(node: Node) -> bool:
    """Whether a product accumulates into what another one made."""
    accumulates = node.op == "call_function" and node.args[:1] == (operators.accumulate_,)
    return accumulates and bool(node.kwargs["beta"])


def accumulated(captured: Captured) -> list[list[tuple[int, ...]]]:
    """Of both graphs, the shapes of the left factors of what accumulates."""
    return [
        [tuple(node.kwargs["a"].meta["val"].shape) for node in half[0].graph.nodes if adds(node)]
        for half in (captured.forward, captured.backward)
    ]


# ---- numerics --------------------------------------------------------------------------------------------------------


class Shaped(nn.Module):
    """A module of [M, K] within [batch, tokens, K], with a residual."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(sum(self.inner(x.view(2, -1, x.shape[-1]))).view(x.shape))


@pytest.mark.parametrize("rank", [48, pytest.param(64, marks=pytest.mark.slow), 100, 128])
@pytest.mark.parametrize("name", ["SwiGLU", "q, k, v"])
def test_as_accurate_as_plain_compile(name: str, rank: int) -> None:
    width = 2 * rank + 8

    def build() -> nn.Module:
        if name == "SwiGLU":
            return mlp(width, width + 24, rank=rank)
        return adapt(Shaped(QKV(width, width)).to(bf16), rank=rank)

    result = compare(Case(name, build, 3, {}, dtype=bf16, shape=(M, width), seeds=4), by_graphs)
    result.assert_as_accurate()
    captured = result.captured
    assert captured.reasons == [] and captured.sites == 3
    assert result.ours.saved <= result.plain.saved
    found = [{s[0] for p in programs(half[0].graph) for s in p.body} for half in (captured.forward, captured.backward)]
    assert "product" in found[0] | found[1]
    if rank > 64:
        assert not (found[0] | found[1]) & {"down", "across"}


def checkpointed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.utils.checkpoint.checkpoint(module, t, use_reentrant=False)


def gated(activation: Callable[[Tensor], Tensor]) -> nn.Module:
    return adapt(Mlp(144, 168, activation).to(bf16), rank=40)


SPLIT: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "softplus, checkpointed": (lambda: gated(F.softplus), True),  # no kernel of ours computes it, nor is it saved
    "hardswish, checkpointed": (lambda: gated(F.hardswish), True),
    "mish": (lambda: gated(F.mish), False),
    "mish, checkpointed": (lambda: gated(F.mish), True),
    "read element by element as well": (lambda: adapt(Residual(144).to(bf16), rank=40), False),
    "read so, checkpointed": (lambda: adapt(Residual(144).to(bf16), rank=40), True),
}


@pytest.mark.parametrize("name", SPLIT)
def test_pairs_of_all_that_a_kernel_makes_are_split(name: str) -> None:
    """However it is reached: only the gradient from outside is summed both ways, and dB of each other where it is
    made."""
    build, again = SPLIT[name]
    wrap = checkpointed if again else Case.wrap
    result = compare(Case(name, build, 3, {}, dtype=bf16, shape=(M, 144), seeds=4, wrap=wrap), by_graphs)
    result.assert_as_accurate()
    bodies = [[s[0] for s in p.body] for p in programs(result.captured.backward[0].graph)]
    assert [body for body in bodies if {"down", "across"} <= set(body)] == [["load", "down", "across"]]
    sums = sum(body.count("across") for body in bodies if {"product", "store"} <= set(body))
    assert sums >= (1 if "softplus" in name or "hardswish" in name else 2)


# ---- what must not be touched ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 32])
def test_pairs_of_low_ranks_stay(rank: int) -> None:
    captured = capture(mlp(rank=rank), x(80), step=lower)
    bodies = [[s[0] for s in p.body] for p in programs(captured.backward[0].graph)]
    assert sum(body.count("down") == 1 and body.count("across") == 1 for body in bodies) == 3


def test_a_pair_of_a_value_in_memory_stays() -> None:
    """dy comes from a caller: a kernel that sums both ways reads it once."""
    captured = capture(adapt(nn.Linear(80, 160, bias=False, dtype=bf16), rank=40), x(80), step=lower)
    assert ["load", "down", "across"] in [[s[0] for s in p.body] for p in programs(captured.backward[0].graph)]


def test_a_pair_whose_value_another_kernel_makes_stays() -> None:
    """The products behind it are in a kernel that makes dz, and softplus is Inductor's."""
    captured = capture(gated(F.softplus), x(144), step=lower)
    bodies = [[s[0] for s in p.body] for p in programs(captured.backward[0].graph)]
    assert bodies.count(["load", "down", "across"]) == 2


@pytest.mark.parametrize("bias", [False, True])
def test_an_output_that_a_kernel_would_have_read_as_a_sum(bias: bool) -> None:
    """It is none that a large product accumulates into: a rounded y errs more than a sum of rounded terms."""

    def build() -> nn.Module:
        module = Mlp(160, 176)
        if bias:
            module.gate, module.up = (nn.Linear(160, 176) for _ in range(2))
        return adapt(module.to(bf16), rank=72, alpha=1.7 * 72)

    result = compare(Case("", build, 3, {}, dtype=bf16, shape=(M, 160), seeds=4), by_graphs)
    result.assert_as_accurate()
    assert result.ours.saved <= result.plain.saved
    assert accumulated(result.captured)[0] == [(M, 176)]
    assert result.captured.count("forward")["recompute"] == 2


@pytest.mark.parametrize(("rank", "stacked"), [(16, True), (32, False)])
def test_siblings_of_few_rows_are_stacked_for_a_program(rank: int, stacked: bool) -> None:
    """Which takes 64 ranks together."""
    with torch.no_grad():
        captured = capture(qkv(kv=144, rank=rank), x(144, rows=4))
    assert ("stack(3)" in captured.count("forward")) == stacked
    assert "cat(" not in graph_text(captured.forward[0].graph)


@pytest.mark.parametrize("name", ["SwiGLU", "q, k, v"])
def test_few_rows_of_a_high_rank_are_written_out(name: str) -> None:
    """As sums of products that Inductor puts into the kernels that read them; siblings without a stack."""

    def build() -> nn.Module:
        return mlp(152, 176, rank=72) if name == "SwiGLU" else adapt(Shaped(QKV(152, 152)).to(bf16), rank=72)

    result = compare(Case(name, build, 3, {}, dtype=bf16, shape=(4, 152), seeds=4), by_graphs)
    result.assert_as_accurate()
    assert accumulated(result.captured) == [[], []]
    text = graph_text(result.captured.forward[0].graph)
    assert "sum(" in text and "cat(" not in text and not programs(result.captured.forward[0].graph)


def test_pairs_and_stacks_of_few_rows_stay() -> None:
    """The parts of g are small, and launches are what counts."""
    captured = capture(mlp(rank=40), x(80, rows=128), step=lower)
    bodies = [[s[0] for s in p.body] for p in programs(captured.backward[0].graph)]
    assert sum(body.count("down") == 1 and body.count("across") == 1 for body in bodies) == 3
    assert accumulated(capture(qkv(rank=24), x(144, rows=128), step=lower))[1] == []


def test_a_stack_that_tiles_take_accumulates_one_product() -> None:
    """The others are left to the reader of dX, which rounds their sum once."""
    assert [len(found) for found in accumulated(capture(qkv(rank=16), x(144), step=lower))] == [3, 1]
    assert [len(found) for found in accumulated(capture(qkv(rank=24), x(144), step=lower))] == [3, 3]


def test_a_stack_for_any_number_of_rows() -> None:
    """The first product is written into memory of a size that the graph asks for."""
    shapes = ((272, 144), (300, 144))
    case = Case("", lambda: qkv(rank=24), 3, {}, dtype=bf16, shape=shapes[0], shapes=shapes, dynamic=True, seeds=2)
    result = compare(case, by_graphs)
    result.assert_as_accurate()
    assert len(accumulated(result.captured)[1]) == 3


def test_where_products_overlap_with_collectives() -> None:
    """Inductor has to find them as they are."""
    with inductor_config().patch(_micro_pipeline_tp=True):
        assert accumulated(capture(qkv(rank=24), x(144), step=lower)) == [[], []]


Step = Callable[..., Any]
STACKS: dict[str, tuple[Step, int]] = {
    "a sum": (lambda dq, wq, dk, wk, g, a, r: dq @ wq + g @ a, 1),
    "a sum, the other way": (lambda dq, wq, dk, wk, g, a, r: g @ a + dq @ wq, 1),
    "three terms": (lambda dq, wq, dk, wk, g, a, r: (dq @ wq + dk @ wk) + g @ a, 2),
    "within": (lambda dq, wq, dk, wk, g, a, r: (dq @ wq + g @ a) + dk @ wk, 2),
    "views": (lambda dq, wq, dk, wk, g, a, r: (dq @ wq).view(2, -1, 144) + (g @ a).view(2, -1, 144), 1),
    "a residual": (lambda dq, wq, dk, wk, g, a, r: r + (g @ a + dq @ wq), 1),
    "a residual alone": (lambda dq, wq, dk, wk, g, a, r: r + g @ a, 0),
    "no sum": (lambda dq, wq, dk, wk, g, a, r: (dq @ wq, g @ a), 0),
    "the product is read twice": (lambda dq, wq, dk, wk, g, a, r: (dq @ wq + (p := g @ a), p), 0),
    "the large one is read twice": (lambda dq, wq, dk, wk, g, a, r: ((p := dq @ wq) + g @ a, p), 0),
    "a sum of others is read twice": (lambda dq, wq, dk, wk, g, a, r: ((p := dq @ wq + dk @ wk) + g @ a, p), 0),
    "a scaled sum": (lambda dq, wq, dk, wk, g, a, r: torch.add(dq @ wq, g @ a, alpha=2), 0),
    "a pointwise reader": (lambda dq, wq, dk, wk, g, a, r: torch.tanh(g @ a) + dq @ wq, 0),
    "one row for all": (lambda dq, wq, dk, wk, g, a, r: dq[:1] @ wq + g @ a, 0),
    "one row of the others": (
        lambda dq, wq, dk, wk, g, a, r: (g @ a + r[0]).view(2, -1, 144) + (dq @ wq).view(2, -1, 144),
        0,
    ),
    "another dtype": (lambda dq, wq, dk, wk, g, a, r: (dq @ wq).float() + (g @ a).float(), 0),
}


def stack(
    step: Step, rows: int = M, rank: int = 72, dtype: torch.dtype = bf16, mark: bool = True, size: float = 1.0
) -> int:
    """How many products accumulate after the rewrite of a graph, which computes what it did; or the graph is as it was.

    dq [M, 144], W_q [144, 144], dk [M, 48], W_k [48, 144], g [M, R], A [R, 144], r [M, 144].
    """
    sizes = [(rows, 144), (144, 144), (rows, 48), (48, 144), (rows, rank), (rank, 144), (rows, 144)]
    inputs = [torch.randn(shape, dtype=dtype) for shape in sizes]
    inputs = [t * size if t.shape[0] == rows else t for t in inputs]  # gradients
    module = make_fx(step, tracing_mode="fake")(*inputs)
    exact = pytree.tree_leaves(step(*(t.double() for t in inputs)))
    for node in module.graph.nodes:
        if mark and is_call(node, MM) and node.args[0].meta["val"].shape[1] == rank:
            node.meta[MARK] = True
    before = graph_text(module.graph)
    with on_gpu.devices(module.graph, "cuda"):
        tile_stacks.accumulate(module.graph)
    module.graph.lint()
    module.recompile()
    count = sum(adds(node) for node in module.graph.nodes)
    assert count or graph_text(module.graph) == before
    for found, expected in zip(pytree.tree_leaves(module(*inputs)), exact, strict=True):
        assert (found.double() - expected).norm() <= 2**-8 * expected.norm()
    return count


@pytest.mark.parametrize("name", STACKS)
def test_sums_of_a_stack(name: str) -> None:
    step, count = STACKS[name]
    assert stack(step) == count


def test_half_precision_keeps_the_last_bits_of_small_gradients() -> None:
    """Where they are near the smallest number of float16, a half or an eighth of one would have lost some."""
    torch.manual_seed(0)
    assert stack(STACKS["three terms"][0], dtype=torch.float16, size=7e-7) == STACKS["three terms"][1]


@pytest.mark.parametrize(
    "given",
    [{"rows": 128}, {"rank": 64}, {"rank": 80}, {"dtype": torch.float32}, {"mark": False}],
    ids=["few rows", "a rank of tiles", "more than half of the columns", "float32", "not of a branch"],
)
def test_sums_that_stay(given: dict[str, Any]) -> None:
    assert stack(STACKS["three terms"][0], **given) == 0


@pytest.mark.parametrize(
    ("rows", "columns", "width"),
    [(8192, 14336, 2048), (2048, 14336, 1792), (272, 14336, 576), (8192, 11008, 1856), (8192, 136, 128)],
)
def test_a_product_of_a_high_rank_walks_along_its_columns(rows: int, columns: int, width: int) -> None:
    """Two of them, as in silu(gate) * up: the thin matrices stay, and tiles are about as wide as one another."""
    case = tile_cases.swiglu(128, 128, ("store",))
    found = choose(case.inputs, case.body, rows, columns)
    assert found == Tile(rows=64, columns=width, step=64, walk="columns", stages=3)
