"""Dropout on a GPU, from the joint graph to the programs: equal masks in forward and backward, and none in memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fx.passes.kernels import operators
from tests.passes import harness, on_gpu
from tests.passes.harness import Case, adapt, compare
from tests.passes.modules import QKV, Block, FusedNorm
from tests.passes.on_gpu import P
from tests.passes.test_fuse_tiles import K, checkpointed, linear, mlp, normed

bf16 = torch.bfloat16


def fused(dim: int = K) -> nn.Module:
    """q, k and v of a norm as it is on a GPU."""
    return adapt(nn.Sequential(FusedNorm(dim), QKV(dim, dim)).to(bf16).requires_grad_(False), dropout=P)


def block() -> nn.Module:
    """A block with such norms."""
    module = Block(K)
    module.attention_norm, module.mlp_norm = FusedNorm(K), FusedNorm(K)
    return adapt(module.to(bf16).requires_grad_(False), dropout=P)


def case(name: str, build: Callable[[], nn.Module], sites: int, **more: Any) -> Case:
    return Case(name, build, sites, {}, **{"dtype": bf16, "shape": (2, 160, K), "seeds": 3, "random": True, **more})


CASES = [
    case("linear", lambda: linear(dropout=P), 1),
    case("rank 1", lambda: linear(rank=1, dropout=P), 1),
    case("SwiGLU", lambda: mlp(dropout=P), 3),
    case("q, k, v of a norm", lambda: normed(dropout=P), 3),
    case("q, k, v of a GPU's norm", fused, 3),
    case("checkpointed", lambda: mlp(dropout=P), 3, wrap=checkpointed),
    case("x without a gradient", lambda: linear(dropout=P), 1, x_grad=False),
    case("any number of tokens", lambda: mlp(dropout=P), 3, shapes=((2, 160, K), (3, 150, K)), dynamic=True, seeds=1),
    # Many: what reaches the values of attention comes from few tokens, so that few roundings decide an error.
    case("block", lambda: adapt(Block(K).to(bf16).requires_grad_(False), dropout=P), 7, seeds=10),
    case("block with a GPU's norms", block, 7, seeds=10),
]
FAST = ("linear", "q, k, v of a norm", "q, k, v of a GPU's norm")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c.name in FAST else pytest.mark.slow, id=str(c)) for c in CASES]
)
def test_as_accurate_as_plain_compile(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Seeded", on_gpu.Masked)
    result = compare(case, on_gpu.by_graphs)
    result.assert_as_accurate()
    captured = result.captured
    assert captured.reasons == [] and captured.sites == case.sites
    graphs = [half[0].graph for half in (captured.forward, captured.backward)]
    for graph in graphs:
        drawn = [s for program in on_gpu.programs(graph) for s in program.body if s[0] == "keep"]
        # Twice in backward, for dA and for dX.
        assert len(drawn) >= case.sites
        assert not graph.find_nodes(op="call_function", target=operators.keep)
        assert not graph.find_nodes(op="call_function", target=torch.ops.prims.inductor_random.default)
        results = [n.meta["val"] for n in graph.output_node().all_input_nodes]
        assert not any(isinstance(t, Tensor) and t.dtype == torch.bool for t in results), "a mask is written"
    if case.name == "checkpointed":  # of which nothing is kept but h of the last linear
        assert result.ours.saved == result.plain.saved + 320 * 4 * 2
    else:
        assert result.ours.saved <= 0.8 * result.plain.saved


def test_no_dropped_value_is_written_for_another_kernel() -> None:
    """Where h is computed again, before its gradient: dA draws its mask for itself."""
    x = torch.randn(2, 160, K, dtype=bf16, requires_grad=True)
    captured = on_gpu.capture(checkpointed(mlp(dropout=P)), x)
    bodies = [[s[0] for s in program.body] for program in on_gpu.programs(captured.backward[0].graph)]
    masked = [body for body in bodies if "keep" in body and "product" not in body]
    assert [(body.count("down"), body.count("across")) for body in masked] == [(2, 0), (0, 2)]  # of gate and up
    assert not any("store" in body for body in masked)


def test_siblings_read_x_once() -> None:
    """q, k and v have a mask each: one pass for their h, one for their dA."""
    captured = on_gpu.capture(normed(dropout=P), torch.randn(2, 160, K, dtype=bf16, requires_grad=True))
    for half, kind in ((captured.forward, "down"), (captured.backward, "across")):
        bodies = [[s[0] for s in program.body] for program in on_gpu.programs(half[0].graph)]
        masked = [body for body in bodies if "keep" in body and kind in body and "product" not in body]
        assert [(body.count("keep"), body.count(kind)) for body in masked] == [(3, 3)]


def test_a_norm_is_computed_again_with_its_masks() -> None:
    """In a whole block: dA of q, k and v is one kernel, dA of gate and up is one, and nothing else draws their masks
    but dX; what is left to the norms' own kernels does not know of masks."""
    captured = on_gpu.capture(block(), torch.randn(2, 160, K, dtype=bf16, requires_grad=True))
    graph = captured.backward[0].graph
    bodies = [[s[0] for s in program.body] for program in on_gpu.programs(graph)]
    masked = [(body.count("keep"), body.count("across"), body.count("product")) for body in bodies if "keep" in body]
    across, products = ([each for each in masked if each[i]] for i in (1, 2))
    assert sorted(each[:2] for each in across if each[0] > 1) == [(2, 2), (3, 3)]
    assert sum(each[0] for each in across) == sum(each[0] for each in products) == 7
    hashes = graph.find_nodes(op="call_function", target=torch.ops.aten.bitwise_xor.Tensor)
    assert not hashes, "Inductor's kernels draw masks"


def test_a_mask_that_no_kernel_draws_is_fused_by_inductor() -> None:
    """Where the choice of tiles leaves a program alone after the mask has been chosen."""
    captured = on_gpu.capture(
        linear(dropout=P),
        torch.randn(2, 160, K, dtype=bf16, requires_grad=True),
        step=lambda graph: on_gpu.lower(graph, lambda kinds, body, rows, columns: None),
    )
    for half in (captured.forward, captured.backward):
        assert not on_gpu.programs(half[0].graph)
        assert not half[0].graph.find_nodes(op="call_function", target=operators.keep)
        assert half[0].graph.find_nodes(op="call_function", target=torch.ops.aten.bitwise_xor.Tensor)


def test_what_no_kernel_computes_keeps_inductors_masks() -> None:
    """A rank that is the matrix library's."""
    module = adapt(nn.Linear(320, 304, bias=False, dtype=bf16), rank=72, dropout=P)
    captured = on_gpu.capture(module, torch.randn(2, 160, 320, dtype=bf16, requires_grad=True))
    graph = captured.forward[0].graph
    assert graph.find_nodes(op="call_function", target=torch.ops.prims.inductor_random.default)
