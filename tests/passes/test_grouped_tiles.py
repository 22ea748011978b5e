"""The programs of a GPU that experts' branches become, and that what is left beside them is the frozen model's."""

# mypy: no-check-untyped-defs

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from tests.passes import on_gpu
from tests.passes.harness import adapt, by_graphs, compare
from tests.passes.test_grouped import CASES, ENDS, Stack, SwiGLU, adapted, case

bf16 = torch.bfloat16

ON_A_GPU = [
    *(one for one in CASES if one.name != "one by one"),
    case("dropout", lambda: adapted(SwiGLU(), "w", "w2", "w3", dropout=on_gpu.P), 3, forward={}),
]


def frozen_products(one) -> list[int]:
    """How many grouped products the forward and the backward graph of the frozen model have.

    In backward none where nothing has a gradient.
    """
    module = one.build()
    lora_fx.remove(module).requires_grad_(False)
    _, captured = by_graphs(dataclasses.replace(one, seeds=1, x_grad=True), module, rewrite=False)
    backward = [grouped_products(graph) if one.x_grad else 0 for graph in captured.backward]
    return [*map(grouped_products, captured.forward), *backward]


def grouped_products(graph) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten._grouped_mm.default))


@pytest.mark.parametrize(
    "one", [pytest.param(o, marks=[] if o.name == "swiglu" else pytest.mark.slow) for o in ON_A_GPU], ids=str
)
def test_on_a_gpu_the_frozen_models_grouped_products_are_left(one):
    result = compare(dataclasses.replace(one, seeds=8), on_gpu.by_graphs)
    result.assert_as_accurate()
    assert result.ours.saved <= result.plain.saved
    assert result.captured.reasons == []
    graphs = (*result.captured.forward, *result.captured.backward)
    assert [grouped_products(graph) for graph in graphs] == frozen_products(one)
    assert all(program.experts == len(ENDS) for graph in graphs for program in on_gpu.programs(graph.graph))


def test_on_a_gpu_a_high_rank_is_left_to_torchs_grouped_products():
    one = case("rank 72", lambda: adapted(Stack(n=160, k=144), rank=72), forward={}, shape=(64, 144), seeds=1)
    _, captured = on_gpu.by_graphs(one, one.build(), rewrite=True)
    assert captured.reasons and all("cannot accumulate" in reason for reason in captured.reasons)
    assert captured.count("backward") == {"scale": 1, "pair": 1}
    assert not any(on_gpu.programs(graph.graph) for graph in (*captured.forward, *captured.backward))


class Beside(nn.Module):
    """A linear, and products with a batch of frozen matrices, which have no ends."""

    w: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 128, bias=False, dtype=bf16)
        self.register_buffer("w", torch.randn(4, 128, 32).to(bf16))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.linear(x).view(4, 16, 128)
        return F.grouped_mm(rows, self.w) if x.dtype == bf16 else rows @ self.w


def test_on_a_gpu_a_batch_of_products_is_nobodys_branch():
    one = case("beside", lambda: adapt(Beside(), std=0.2, rank=8), 1, forward={}, seeds=4)
    result = compare(one, on_gpu.by_graphs)
    result.assert_as_accurate()
    assert all(on_gpu.programs(graph.graph) for graph in (*result.captured.forward, *result.captured.backward))


def test_on_a_gpu_the_largest_of_a_value_is_that_of_nobodys_rows_as_well():
    """Which may be anything by the time that somebody asks."""

    stack, x = adapted(Stack(ends=(7, 7, 20, 40))), torch.randn(64, 32, dtype=bf16)

    def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
        mine = (torch.arange(len(x)) < 40)[:, None]
        y = torch.where(mine, stack(x), 0.0) + 10 * F.pad(x, (0, 16))
        return y, y.abs().amax()

    with torch.no_grad():
        (graph,) = on_gpu.capture(scaled, x).forward
    programs = on_gpu.programs(graph.graph)
    assert any(program.experts for program in programs)
    assert not any(statement[0] == "largest" for program in programs for statement in program.body)
    assert graph.graph.find_nodes(op="call_function", target=torch.ops.aten.amax.default)


class TwoGroupings(nn.Module):
    """One value that two groupings of its rows read, and a linear's branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Stack(), Stack(ends=(10, 20, 30, 64))
        self.linear = nn.Linear(32, 48, bias=False, dtype=bf16)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.first(x)) * self.second(x) + self.linear(x)


def test_on_a_gpu_no_program_has_two_groupings_of_its_rows():
    one = case(
        "two groupings",
        lambda: adapt(TwoGroupings(), std=0.2, rank=8, target_parameters=["first.w", "second.w"]),
        3,
        forward={},
        seeds=8,
    )
    result = compare(one, on_gpu.by_graphs)
    result.assert_as_accurate()
    assert result.captured.reasons == []
    found = [p for g in (*result.captured.forward, *result.captured.backward) for p in on_gpu.programs(g.graph)]
    assert {program.experts for program in found} == {0, 4}
    for program in found:
        assert [kind[0] for kind in program.inputs].count("ends") == (program.experts > 0)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_on_a_gpu_launches_are_inductors_own(dynamic):
    """Down to machine code; a number of rows that is not known is one that Inductor hands on."""
    pytest.importorskip("triton")
    fake_gpu = pytest.importorskip("tests.passes.fake_gpu")
    module = adapted(SwiGLU(ends=(60, 60, 200, 250), width=128, hidden=256), "w", "w2", "w3")
    with fake_gpu.recorded() as (found, backend):
        fake_gpu.train(module, backend, torch.randn(256, 128, dtype=bf16, requires_grad=True), dynamic=dynamic)
    names = [call.name for call in found.ours]
    assert found.operators == []
    assert names.count("lora_fx_sum_of_experts_parts") == 6  # dA and dB of each
    assert not any("grouped_mm" in name for name in names)


def test_on_a_gpu_programs_of_grouped_products_leave_nobodys_rows():
    """Those of SwiGLU, forward and backward: no time is spent there on what is unspecified."""
    one = next(one for one in ON_A_GPU if one.name == "swiglu")
    _, captured = on_gpu.by_graphs(dataclasses.replace(one, seeds=1), one.build(), rewrite=True)
    graphs = (*captured.forward, *captured.backward)
    programs = [program for graph in graphs for program in on_gpu.programs(graph.graph)]
    assert all(program.leaves_nobodys_rows for program in programs)
    assert [sum(s[0] == "store" for s in program.body) for program in programs if "store" in str(program.body)] == [
        1,
        1,
        2,
    ]


class Routed(nn.Module):
    """Experts, given rows that are gathered; what they make is weighted, and added up for each token."""

    sources: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.experts = SwiGLU()
        rows = self.experts.ends[-1]
        self.register_buffer("sources", torch.arange(64).repeat(2)[torch.randperm(128)][: int(rows) + 8])
        self.weight = nn.Parameter(torch.rand(len(self.sources), 1).to(bf16))

    def forward(self, x: Tensor) -> Tensor:
        mine = (torch.arange(len(self.sources)) < self.experts.ends[-1])[:, None]
        rows = torch.where(mine, x[self.sources], 0.0)
        y = torch.where(mine, self.experts(rows), 0.0) * self.weight
        return torch.zeros_like(x).index_add(0, self.sources, y)


def test_on_a_gpu_gathered_rows_are_written_once():
    """In forward those that experts read, and kept; in backward the gradient that they give, by what gathers it."""
    one = case("routed", lambda: adapted(Routed(), *(f"experts.{w}" for w in ("w", "w2", "w3"))), 3, forward={})
    result = compare(one, on_gpu.by_graphs)
    result.assert_as_accurate()
    (forward,), (backward,) = (
        [graph.graph for graph in graphs] for graphs in (result.captured.forward, result.captured.backward)
    )
    aten = torch.ops.aten
    (gathered,) = [
        n for n in forward.find_nodes(op="call_function", target=aten.index.Tensor) if n.args[0].op == "placeholder"
    ]
    (rows,) = gathered.users
    assert rows.target is aten.where.self and forward.output_node() in rows.users
    (pair,) = [p for p in on_gpu.programs(backward) if p.columns == 32 and {s[0] for s in p.body} >= {"down", "across"}]
    assert [s[0] for s in pair.body] == ["load", "down", "across"]


class Scaled(SwiGLU):
    """Hidden values under weights that are sorted as the rows are."""

    scores: Tensor
    order: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scores", torch.rand(64, 1).to(bf16))
        self.register_buffer("order", torch.randperm(64))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.product(x, self.w)) * self.product(x, self.w3)
        return self.product(hidden * self.scores[self.order], self.w2)


def test_on_a_gpu_hidden_values_under_gathered_weights_are_computed_again():
    one = case("weights", lambda: adapted(Scaled(), "w", "w2", "w3"), 3, forward={})
    result = compare(one, on_gpu.by_graphs)
    result.assert_as_accurate()
    assert result.captured.count("forward")["recompute x"] == 1
