"""Where regions end: what may not be taken into a program, and what happens when it cannot be written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.utils.checkpoint import checkpoint

from lora_fx.passes import fuse_tiles, pipeline
from lora_fx.passes.kernels import lowering
from lora_fx.passes.kernels.tile_choice import choose
from lora_fx.passes.kernels.tile_program import Tile
from lora_fx.passes.printer import graph_text
from lora_fx.passes.tile_nodes import MAX_PRODUCT, MAX_RANK
from tests.passes import harness, on_gpu
from tests.passes.harness import adapt
from tests.passes.modules import Mlp
from tests.passes.on_gpu import capture, lower, one_tile, programs
from tests.passes.regions import K, N, after, bf16, compared, forward_operations, of, operations


def x(dtype: torch.dtype = bf16, tokens: int = 160, width: int = K) -> Tensor:
    return torch.randn(tokens, width, dtype=dtype, requires_grad=True)


def mlp(dtype: torch.dtype = bf16, **config: Any) -> nn.Module:
    return adapt(Mlp(K, N).to(dtype), **config)


def test_a_value_that_leaves_and_comes_back() -> None:
    """y goes through a large product, and the result meets y again: one program cannot hold both ends."""
    captured = compared(lambda: after(lambda y, other: torch.sigmoid(y) * other(y) + y), 1)
    (forward,) = captured.forward
    (program,) = of(forward.graph, "store", "product")
    # y alone is stored: of what follows, the gate could have joined, but nothing that needs the large product.
    assert set(operations(program)) <= {"add", "neg", "exp", "sigmoid", "reciprocal", "identity"}
    assert "mm(" in graph_text(forward.graph).split("tile_")[-1], "the large product comes after the program"


def test_nothing_wider_than_the_model_is_written() -> None:
    """A sum over rows of y^2 is float32's: the squares stay in Inductor's kernel, y itself is what is written."""

    def normalised(y: Tensor, other: nn.Module) -> Tensor:
        wide = y.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(y.dtype)

    captured = compared(lambda: after(normalised), 1)
    for half in (captured.forward, captured.backward):
        for program in programs(half[0].graph):
            assert all(s[2] == "bfloat16" for s in program.outputs if s[0] == "store")
    assert "mean" in graph_text(captured.forward[0].graph)


@pytest.mark.parametrize("rank", [MAX_RANK, MAX_RANK + 8, MAX_PRODUCT, MAX_PRODUCT + 8])
def test_the_largest_ranks(rank: int) -> None:
    """Above the first, products that read a value are large ones, whose place is in the matrix library; above the
    second, so are those that make one."""
    module = adapt(nn.Linear(320, 304, bias=False, dtype=bf16), rank=rank)
    captured = capture(module, x(tokens=256, width=320))
    found = [*programs(captured.forward[0].graph), *programs(captured.backward[0].graph)]
    statements = {s[0] for p in found for s in p.body}
    assert ("product" in statements) == (rank <= MAX_PRODUCT)
    assert statements >= {"down", "across"} if rank <= MAX_RANK else not statements & {"down", "across"}


def test_few_rows_of_a_high_rank_take_no_other_product_along() -> None:
    """Of 128 tokens no kernel makes a value of rank 100; h of the linear that reads it has its own."""
    module = adapt(Mlp(512, 1024).to(bf16), rank=100, rank_pattern={"down": 16})
    captured = capture(module, x(tokens=128, width=512), step=pipeline.LoweringStage(strict=True))
    statements = [
        {s[0] for p in programs(half[0].graph) for s in p.body} for half in (captured.forward, captured.backward)
    ]
    assert "down" in statements[0] and {"down", "across"} <= statements[1]


class Gated(nn.Module):
    """A linear's output, gated or shifted, with another's in a tanh."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.lin, self.other = nn.Linear(136, 264, bias=False), nn.Linear(264, 264, bias=False)
        self.function = function

    def forward(self, x: Tensor, q: Tensor, gate: Tensor) -> Tensor:
        return self.function(self, x, q, gate)


@pytest.mark.parametrize("targets", [["lin"], ["lin", "other"]])
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, q, gate: torch.tanh((m.lin(x) + q[:1]) * 0.5 + m.other(q)),
        lambda m, x, q, gate: torch.tanh(m.lin(x) * gate * 1.0 + m.other(q)),
    ],
    ids=["sum", "gate"],
)
def test_what_stays_in_the_graph_reads_nothing_that_leaves_it(
    function: Callable[..., Tensor], targets: list[str]
) -> None:
    module = adapt(Gated(function).to(bf16), target_modules=targets, rank=8)
    q, gate = (torch.randn(512, n, dtype=bf16, requires_grad=True) for n in (264, 1))
    captured = capture(module, torch.randn(512, 136, dtype=bf16), q, gate, step=lambda graph: lower(graph, choose))
    assert programs(captured.backward[0].graph)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(264, 264, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, use_reentrant=False)

    def body(self, x: Tensor) -> Tensor:
        value = torch.tanh(self.first(x))
        result: Tensor = self.second(value) * value.detach()
        return result


@pytest.mark.parametrize("frozen", ["second.lora_a", "second.lora_b", "nothing"])
@pytest.mark.parametrize("rank", [16, 40])
def test_no_program_needs_a_sum_of_its_own(rank: int, frozen: str) -> None:
    """In backward h is computed again, of the value whose gradient a pair reads with it."""
    module = adapt(Square().to(bf16), rank=rank)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name != frozen)
    inputs = torch.randn(512, 264, dtype=bf16, requires_grad=True)
    captured = capture(module, inputs, step=lambda graph: lower(graph, choose))
    assert programs(captured.backward[0].graph)


def test_float32_is_left_to_inductor() -> None:
    captured = compared(lambda: mlp(torch.float32), 3, dtype=torch.float32)
    for half in (captured.forward, captured.backward):
        assert "lora_fx" not in graph_text(half[0].graph)


def test_on_the_cpu_nothing_is_cut() -> None:
    graph: list[Graph] = []

    def step(found: Graph) -> None:
        graph.append(found)
        before = graph_text(found)
        with on_gpu.devices(found, "cpu"):
            assert list(fuse_tiles.cut(found, one_tile)) == []
        assert graph_text(found) == before

    capture(mlp(), x(), step=step)
    assert len(graph) == 2


@pytest.mark.parametrize(
    "function",
    [
        lambda y, other: y * other.weight[:1, :1],  # one number, as [1, 1]
        # One of the values, with nothing of its error: what is near 0 is wrong by any part of itself, in either form.
        lambda y, other: y * y[:1, :1].sign(),
        lambda y, other: y.view(2, 80, N) * torch.ones(80, N, dtype=y.dtype),  # one sequence for all
        lambda y, other: y + torch.arange(N),  # integers
        lambda y, other: torch.where(torch.ones(160, 1) > 0, y, 0.5),
        lambda y, other: y.masked_fill(torch.ones(160, N).tril() == 0, -float("inf")).softmax(-1),
        lambda y, other: y * 2.0**0.5 / (1.0 + y.abs()),
        lambda y, other: y.t() * other.weight[0, 0],
    ],
    ids=[
        "1 x 1",
        "1 x 1 of its own",
        "one for all sequences",
        "integers",
        "condition of rows",
        "infinite",
        "constants",
        "transposed",
    ],
)
def test_operands_of_all_kinds(function: Callable[[Tensor, nn.Module], Tensor]) -> None:
    compared(lambda: after(function), 1)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda y, other: y / (1 + torch.exp(-y)), ["sigmoid", "mul"]),
        (lambda y, other: y * (1 / (1 + torch.exp(-y))), ["sigmoid", "mul"]),  # as torch 2.11 does in backward
        (lambda y, other: 1.0 * torch.sigmoid(y), ["sigmoid"]),
        (lambda y, other: 1 / (1 + torch.exp(y)), ["exp", "add", "reciprocal", "mul"]),
        (lambda y, other: 2 * torch.sigmoid(y), ["sigmoid", "mul"]),
    ],
    ids=["silu", "a sigmoid", "times 1", "another sign", "times 2"],
)
def test_how_a_sigmoid_is_written(function: Callable[[Tensor, nn.Module], Tensor], names: list[str]) -> None:
    """Of the same operations in every release of torch."""
    captured = compared(lambda: after(function), 1, grad=torch.no_grad)
    assert forward_operations(captured) == [["add", *names]]


def test_numbers_that_the_graph_makes() -> None:
    """They become constants of the program, and no kernel fills memory with them."""
    captured = compared(lambda: after(lambda y, other: torch.where(y > 0.1, y, 0.5)), 1, grad=torch.no_grad)
    (program,) = of(captured.forward[0].graph, "where")
    assert [0.5] in next(s for s in program.body if s[0] == "op" and s[1] == "where")[2]
    assert "full(" not in graph_text(captured.forward[0].graph)


def test_numbers_in_the_memory_of_the_cpu() -> None:
    """As a float attribute under `dynamic=True` is: no kernel on a GPU can load one."""
    counts = []

    def step(graph: Graph) -> None:
        for node in graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, Tensor) and value.dim() == 0:
                value.fake_device = torch.device("cpu")  # type: ignore[attr-defined]  # a FakeTensor
        on_gpu.lower(graph)
        assert not any(["number"] in p.inputs for p in programs(graph))
        counts.append(len(programs(graph)))

    capture(mlp(), x(), step=step)
    assert all(counts), "products without a scale, and gradients, are cut out all the same"


def test_masks_from_forward() -> None:
    """relu keeps a mask for backward: a condition that a program loads."""
    captured = compared(lambda: after(lambda y, other: torch.relu(y) * torch.where(y > 0.1, y, 0.0)), 1)
    assert programs(captured.backward[0].graph)


def test_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Seeded", on_gpu.Masked)
    captured = compared(lambda: mlp(dropout=on_gpu.P), 3, random=True)
    for half in (captured.forward, captured.backward):
        assert programs(half[0].graph)


@pytest.mark.parametrize(
    "function",
    [lambda y, other: (y, y.tanh().amax()), lambda y, other: (y, y.tanh().max()), lambda y, other: (y, y.exp().sum(1))],
    ids=["amax", "max", "sum"],
)
def test_what_others_compute_from_a_value_that_is_written(function: Callable[[Tensor, nn.Module], Any]) -> None:
    """As a float8 product needs the largest of |y|: f(y) is not written beside y."""
    captured = compared(lambda: after(function), 1)
    assert not any(set(names) - {"add"} for names in forward_operations(captured))


@pytest.mark.parametrize(
    "function",
    [
        lambda y, other: other(y.tanh()),  # y itself is not written
        lambda y, other: (y, other(y.tanh())),  # a large product reads f(y) from memory
        lambda y, other: (y, -y.tanh() * 2),  # it is returned
        lambda y, other: (y, y.tanh(), y.sigmoid(), other(y.tanh() * y.sigmoid())),  # the region has a use for both
    ],
    ids=["alone", "for a product", "returned", "within"],
)
def test_what_a_region_computes_all_the_same(function: Callable[[Tensor, nn.Module], Any]) -> None:
    captured = compared(lambda: after(function), 1)
    assert any("tanh" in names for names in forward_operations(captured))


# ---- when it fails ---------------------------------------------------------------------------------------------------


def test_what_raises_leaves_the_graph_as_it_was() -> None:
    """The seed is given with its error, and every other region is cut all the same."""
    seen: dict[str, Any] = {}

    def refuse(kinds: Any, body: list[Any], rows: Any, columns: int) -> Tile:
        if any(s[0] == "across" for s in body):
            raise ArithmeticError("no tile for this one")
        return one_tile(kinds, body, rows, columns)

    def step(graph: Graph) -> None:
        failures = list(fuse_tiles.cut(graph, refuse))
        graph.lint()
        seen.setdefault("failures", []).append([(node.format_node(), str(error)) for node, error in failures])
        list(lowering.lower(graph))

    captured = capture(mlp(), x(), step=step)
    forward, backward = seen["failures"]
    assert forward == []
    assert backward and all(error == "no tile for this one" for _, error in backward)
    assert programs(captured.forward[0].graph) and not of(captured.backward[0].graph, "across")


def test_nothing_is_left_of_what_raises() -> None:
    """Up to the last node: the failure comes after the program's own nodes have been made."""

    def step(graph: Graph) -> None:
        before = graph_text(graph)

        class Late(Tile):
            def __getattribute__(self, name: str) -> Any:
                if name == "rows":
                    raise ArithmeticError("too late")
                return super().__getattribute__(name)

        def late(kinds: Any, body: Any, rows: Any, columns: int) -> Tile:
            tile = object.__new__(Late)
            tile.__dict__.update(vars(one_tile(kinds, body, rows, columns)))
            return tile

        failures = list(fuse_tiles.cut(graph, late))
        assert {str(error) for _, error in failures} == {"too late"}
        assert graph_text(graph) == before
        list(lowering.lower(graph))

    captured = capture(adapt(nn.Linear(K, N, bias=False, dtype=bf16)), x(), step=step)
    assert programs(captured.backward[0].graph) == []


def test_the_report_names_what_failed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The stage of the pipeline: a line in the log with the module's path, or an error in strict mode."""

    def broken(region: Any, members: Any, rows: Any) -> Any:
        raise ArithmeticError("a broken writer")

    monkeypatch.setattr(fuse_tiles, "Writer", broken)
    pipeline._warn_once.cache_clear()
    captured = capture(mlp(), x(), step=pipeline.LoweringStage(strict=False))
    assert programs(captured.forward[0].graph) == []
    assert "a broken writer" in caplog.text and "tile lora_fx.scaled_mm failed at gate" in caplog.text
    with pytest.raises(Exception, match="a broken writer"):
        capture(mlp(), x(), step=pipeline.LoweringStage(strict=True))


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_few_rows_of_a_high_rank_are_left_to_inductor() -> None:
    """By the pipeline's own choice of tiles."""
    module = adapt(nn.Linear(320, 304, bias=False, dtype=bf16), rank=MAX_RANK + 8)
    captured = capture(module, x(tokens=8, width=320), step=pipeline.LoweringStage(strict=True))
    for half in (captured.forward, captured.backward):
        assert "lora_fx" not in graph_text(half[0].graph).replace("lora_fx.float_mm", "mm")


@pytest.mark.parametrize("width", [8, 136, 4096, 14336])
def test_choices_are_tiles(width: int) -> None:
    """Whatever is chosen for a program is a walk that a kernel can make."""
    from tests.passes.high_rank_cases import HIGH_RANKS
    from tests.passes.tile_cases import CASES

    for case in (*CASES, *HIGH_RANKS):
        tile = choose(case.inputs, case.body, 8192, width)
        if tile is not None:
            # In the direction of its walk a program may be of any number of steps.
            across = tile.columns // tile.strips if tile.walk == "rows" else tile.rows
            assert all(size & (size - 1) == 0 for size in (tile.step, tile.strips, across))
            assert min(tile.step, across) >= 16


@pytest.mark.parametrize(("masks", "rank", "strips"), [(1, 16, 1), (2, 16, 2), (3, 16, 2), (3, 64, 1), (0, 16, 1)])
def test_several_sums_of_masked_values_are_made_in_strips(masks: int, rank: int, strips: int) -> None:
    """dA of siblings under a mask each; a higher rank has narrower tiles already."""
    kinds: list[list[Any]] = [["full"]]
    body: list[list[Any]] = [["load", 0]]
    for i in range(max(masks, 1)):
        kinds += [["seed"], ["thin", rank]]
        if masks:
            body += [["keep", 2 * i + 1, 0.1], ["op", "mul", [0, len(body)]]]
        body.append(["across", len(body) - 1, 2 * i + 2, "RN"])
    tile = choose(kinds, body, 8192, 4096)
    assert tile is not None and tile.strips == strips
