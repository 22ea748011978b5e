"""What saves launches where there are few rows: programs that share one, stacks that are nowhere in memory, sums of
parts that their readers make; and where each must not be."""

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from lora_fx.passes import tile_joint
from lora_fx.passes.graph import aten
from lora_fx.passes.kernels import operators, tile_choice
from lora_fx.passes.kernels.tile_program import Tile, split
from tests.passes import on_gpu
from tests.passes.harness import Case, adapt, compare
from tests.passes.on_gpu import calls, capture, programs
from tests.passes.test_fuse_tiles import K, linear, mlp, normed

bf16 = torch.bfloat16


def x(tokens: int = 160) -> Tensor:
    return torch.randn(tokens, K, dtype=bf16, requires_grad=True)


def in_parts(kinds: Any, body: Any, rows: Any, columns: int) -> Tile:
    """As `one_tile`, with h in parts."""
    return Tile(rows=16, columns=64, step=16, walk="rows")


def lower(choose: Any) -> Any:
    return functools.partial(on_gpu.lower, choose=choose)


def together(graph: Graph) -> list[int]:
    """How many programs each launch has."""
    return [len(_programs(node)) for node in calls(graph)]


def _programs(node: Node) -> list[Any]:
    return split(str(node.kwargs["program"]))


class Several(nn.Module):
    """Linears over inputs of their own, which wait for nothing."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(K, width, bias=False) for width in widths])

    def forward(self, *x: Tensor) -> tuple[Tensor, ...]:
        return tuple(linear(each) for linear, each in zip(self.linears, x))


def several(*widths: int) -> nn.Module:
    return adapt(Several(*widths).to(bf16))


# ---- launches --------------------------------------------------------------------------------------------------------


def test_gradients_of_a_linear_share_a_launch() -> None:
    """dA and dX both wait for g, and for nothing of each other."""
    (backward,) = capture(linear(), x()).backward
    assert together(backward.graph) == [1, 2]


def test_siblings_share_a_launch() -> None:
    """y of q, k and v, whose h is one program's."""
    (forward,) = capture(normed(), x()).forward
    assert together(forward.graph) == [1, 3]


def test_what_waits_for_another_does_not_share_its_launch() -> None:
    """h, silu(gate) * up, and the down projection."""
    (forward,) = capture(mlp(), x()).forward
    assert together(forward.graph) == [1, 1, 1]


def test_many_rows_have_launches_of_their_own() -> None:
    most = tile_choice.MOST_FOR_LAUNCHES
    for rows, expected in ((most, [1, 2]), (most + 1, [1, 1, 1])):
        (backward,) = capture(linear(), x(rows)).backward
        assert together(backward.graph) == expected


def test_any_number_of_rows_has_launches_of_its_own() -> None:
    (backward,) = capture(linear(), x(), dynamic=True).backward
    assert together(backward.graph) == [1, 1, 1]


def test_other_rows_do_not_share_a_launch() -> None:
    module = several(64, 72)
    for rows, expected in ((160, True), (150, False)):
        (forward,) = capture(module, x(), x(rows)).forward
        assert sum(together(forward.graph)) == 4 and (max(together(forward.graph)) > 1) is expected


def test_a_launch_has_four_programs_at_most() -> None:
    (forward,) = capture(several(64, 72, 80, 88, 96), *(x() for _ in range(5))).forward
    assert sum(together(forward.graph)) == 10 and max(together(forward.graph)) <= 4


def test_other_warps_do_not_share_a_launch() -> None:
    def choose(kinds: Any, body: Any, rows: Any, columns: int) -> Tile:
        return Tile(rows=64, columns=32, step=32, walk="rows", warps=8 if columns == 72 else 4)

    (forward,) = capture(several(64, 72), x(), x(), step=lower(choose)).forward
    for node in calls(forward.graph):
        assert len({program.tile.warps for (program,) in _programs(node)}) == 1


def test_a_launch_is_one_line_of_text() -> None:
    """Inductor writes nodes into comments of its code."""
    (backward,) = capture(linear(), x()).backward
    assert all("\n" not in str(node.format_node()) for node in backward.graph.nodes)


@pytest.mark.parametrize("rows", [16, 64, 128])
def test_a_sum_over_few_tokens_is_no_product_of_that_rank(rows: int) -> None:
    """dA = g^T x, whose g^T has as few columns as there are tokens."""
    (backward,) = capture(linear(), x(rows)).backward
    ends = [[s[0] for s in p.body if s[0] not in ("load", "op")] for p in programs(backward.graph)]
    assert ends == [["down", "across"], ["across"], ["product", "store"]]


# ---- stacks ----------------------------------------------------------------------------------------------------------


def test_a_stack_is_nowhere_in_memory() -> None:
    for half in (captured := capture(normed(), x())).forward, captured.backward:
        assert not [n for n in half[0].graph.find_nodes(op="call_function", target=aten.cat.default) if n.users]
        assert any(isinstance(s[2], list) for p in programs(half[0].graph) for s in p.body if s[0] != "op" and s[2:])


def test_many_rows_have_their_stack_in_memory() -> None:
    (forward,) = capture(normed(), x(tile_choice.MOST_FOR_LAUNCHES + 1)).forward
    assert forward.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert not any(isinstance(s[2], list) for p in programs(forward.graph) for s in p.body if s[0] == "down")


# ---- parts -----------------------------------------------------------------------------------------------------------


def parts(graph: Graph) -> list[list[Any]]:
    """The inputs of programs that are parts."""
    return [kind for program in programs(graph) for kind in program.inputs if kind[0] == "parts"]


@pytest.mark.parametrize(("build", "sites"), [(linear, 1), (mlp, 3), (normed, 3)], ids=["linear", "SwiGLU", "qkv"])
def test_readers_add_up_parts(build: Any, sites: int) -> None:
    """As accurate as plain compile: a sum is rounded as it would be in memory."""
    case = Case("", build, sites, {}, dtype=bf16, shape=(160, K), seeds=4, grad=torch.no_grad)
    result = compare(case, functools.partial(on_gpu.by_graphs, step=lower(in_parts)))
    result.assert_as_accurate()
    (forward,) = result.captured.forward
    assert len(parts(forward.graph)) == sites
    assert not forward.graph.find_nodes(op="call_function", target=operators.sum_parts)


@pytest.mark.parametrize(("rows", "apart"), [(1, False), (16, False), (17, True), (64, True), (65, False)])
def test_what_makes_a_value_of_few_rows_does_not_sum_it(rows: int, apart: bool) -> None:
    """h of silu(gate) * up."""
    with torch.no_grad():
        (forward,) = capture(mlp(), x(rows)).forward
    bodies = [{statement[0] for statement in program.body} for program in programs(forward.graph)]
    assert any({"product", "down"} <= body for body in bodies) != apart
    assert sum("down" in body for body in bodies) == 2


def test_readers_of_many_rows_do_not() -> None:
    with torch.no_grad():
        for rows, expected in ((tile_choice.FEW_ROWS - 1, 1), (tile_choice.FEW_ROWS, 0)):
            (forward,) = capture(linear(), x(rows), step=lower(in_parts)).forward
            assert len(parts(forward.graph)) == expected


def test_what_is_in_memory_is_not_added_up_again() -> None:
    """h is kept for backward."""
    (forward,) = capture(linear(), x(), step=lower(in_parts)).forward
    assert not parts(forward.graph)
    assert len(forward.graph.find_nodes(op="call_function", target=operators.sum_parts)) == 1


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_choices_for_few_rows() -> None:
    """Measured on an H200 (what `tile_choice` says)."""
    full, thin, factor = ["full"], ["thin", 16], ["factor", 16, "RN"]
    down: list[Any] = [["load", 0], ["down", 0, 1]]
    product: list[Any] = [["product", 0, 1, None], ["store", 0, "bfloat16"]]
    both: list[Any] = [["product", 1, 2, None], ["store", 0, "bfloat16"], ["down", 0, 3]]

    def found(kinds: list[Any], body: list[Any], rows: int, columns: int = 14336) -> tuple[int, int, int]:
        tile = tile_choice.choose(kinds, body, rows, columns)
        assert tile is not None
        return tile.rows, tile.columns, tile.step

    for rows in (1, 64, 255):
        assert found([thin, factor], product, rows) == (16, 128, 16)
        for left, warps in ((thin, 4), (["parts", 16, 8, 0, 16], 8)):
            tile = tile_choice.choose([left, factor], product, rows, 14336)
            assert tile is not None and tile.warps == warps
    for columns, width in ((4096, 256), (14336, 512)):
        tiles = [found([full, factor], down, m, columns) for m in (1, 64, 255)]
        assert tiles == [(16, width, 128), (16, width, 128), (64, width, 128)]
    for rows, expected in ((1, (16, 256, 64)), (64, (16, 512, 64)), (128, (64, 512, 64))):
        assert found([full, thin, factor, factor], both, rows) == expected


def test_the_rank_of_a_stack_is_that_of_its_factors_together() -> None:
    factors = [["factor", 16, "RN"]] * 3
    stack: list[Any] = [["load", 0], ["down", 0, [1, 2, 3]]]
    whole: list[Any] = [["load", 0], ["down", 0, 1]]
    for rows in (64, 512, 2048):
        chosen = tile_choice.choose([["full"], *factors], stack, rows, 4096)
        assert chosen == tile_choice.choose([["full"], ["factor", 48, "RN"]], whole, rows, 4096)


@pytest.mark.slow
def test_launches_of_several_programs_compile_with_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own code around them, forward and backward."""
    merge = mock.Mock(wraps=tile_joint._merge)
    monkeypatch.setattr(tile_joint, "_merge", merge)
    case = Case("", normed, 3, {}, dtype=bf16, shape=(160, K), seeds=2)
    result = compare(case, on_gpu.by_kernels)
    result.assert_as_accurate()
    assert merge.called
