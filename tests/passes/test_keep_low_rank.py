"""`keep_low_rank` by itself: of which checkpointed regions h is kept, and what backward computes again then."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lora_fx.passes.pipeline import PASSES
from tests.passes import harness, on_gpu
from tests.passes.harness import Case, Passes, adapt, by_kernels, capture, compare
from tests.passes.modules import QKV, Mlp
from tests.passes.test_grouped import Stack, adapted
from tests.passes.test_sites import checkpointed, selectively_checkpointed

aten = torch.ops.aten
bf16 = torch.bfloat16
K, N, M = 256, 384, 40
WITHOUT = tuple(step for step in PASSES if "low_rank" not in step.name)


def insisted(module: nn.Module) -> Callable[..., Any]:
    """All is to be computed again."""
    context_fn = functools.partial(
        create_selective_checkpoint_contexts, lambda *arguments, **named: CheckpointPolicy.MUST_RECOMPUTE
    )
    return lambda x: checkpoint(module, x, use_reentrant=False, context_fn=context_fn)


def mlp(rank: int = 4, **config: Any) -> nn.Module:
    return adapt(Mlp(K, N).to(bf16), rank=rank, **config)


def labels(function: Callable[..., Any], passes: Passes = PASSES) -> dict[str, int]:
    return capture(function, torch.randn(M, K, dtype=bf16, requires_grad=True), passes=passes).count("forward")


def kept(function: Callable[..., Any], passes: Passes) -> list[tuple[int, ...]]:
    """The shapes of what forward hands to backward, without parameters, inputs and numbers."""
    x = torch.randn(M, K, dtype=bf16, requires_grad=True)
    nodes = capture(function, x, passes=passes, backward=True).backward[0].graph.find_nodes(op="placeholder")
    made = [node for node in nodes if not str(node.target).startswith(("primals", "tangents"))]
    return sorted(tuple(node.meta["val"].shape) for node in made if node.meta["val"].dim() > 0)


def test_h_is_all_that_is_kept() -> None:
    """Of gate and up together, and of the linear that reads their product."""
    assert kept(checkpointed(mlp()), WITHOUT) == []
    assert kept(checkpointed(mlp()), PASSES) == [(M, 4), (M, 8)]
    assert labels(checkpointed(mlp()))["save h"] == 3


def test_no_product_with_x_is_computed_again() -> None:
    def of_backward(passes: Passes) -> int:
        x = torch.randn(M, K, dtype=bf16, requires_grad=True)
        graph = capture(checkpointed(mlp()), x, passes=passes, backward=True).backward[0].graph
        products = graph.find_nodes(op="call_function", target=aten.mm.default)
        return sum(tuple(node.meta["val"].shape) in ((M, 4), (M, 8)) for node in products)

    assert (of_backward(WITHOUT), of_backward(PASSES)) == (2, 0)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda: mlp(), id="no checkpointing"),
        pytest.param(lambda: insisted(mlp()), id="the user insists"),
        pytest.param(lambda: selectively_checkpointed(mlp()), id="products are saved anyway"),
        pytest.param(lambda: checkpointed(mlp(rank=8)), id="a rank at which h is large"),
        pytest.param(
            lambda: checkpointed(adapt(QKV(K, K).to(bf16), rank=64, rank_pattern={"wq": 4})),
            id="siblings of high ranks",
        ),
    ],
)
def test_where_it_is_left_alone(function: Callable[[], Callable[..., Any]]) -> None:
    assert "save h" not in labels(function())
    assert "scale" in labels(function())


@pytest.mark.parametrize(("frozen", "expected"), [("lora_a", 3), ("lora_b", 0)])
def test_where_one_factor_is_trained(frozen: str, expected: int) -> None:
    """dB needs h, and nothing else does."""
    module = mlp()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("lora" in name and frozen not in name)
    assert labels(checkpointed(module)).get("save h", 0) == expected
    assert len(kept(checkpointed(module), PASSES)) == (2 if expected else 0)


def test_no_backward() -> None:
    with torch.no_grad():
        assert "save h" not in labels(checkpointed(mlp()))


def case(name: str, build: Callable[[], nn.Module], sites: int, **more: Any) -> Case:
    values = {"forward": {}, "dtype": bf16, "shape": (2, 96, K), "wrap": checkpointed, **more}
    return Case(name, build, sites, **values)


CASES = [
    case("SwiGLU", mlp, 3),
    case("q, k, v", lambda: adapt(QKV(K, 128).to(bf16)), 3),
    case("dropout", lambda: mlp(dropout=on_gpu.P), 3, random=True),
    case("any number of tokens", mlp, 3, shapes=((2, 96, K), (3, 70, K)), dynamic=True, seeds=2),
]


@pytest.mark.slow
@pytest.mark.parametrize("how", [harness.by_graphs, on_gpu.by_graphs], ids=["cpu", "gpu"])
@pytest.mark.parametrize("one", CASES, ids=str)
def test_as_accurate_as_plain_compile(one: Case, how: harness.How, monkeypatch: pytest.MonkeyPatch) -> None:
    if how is on_gpu.by_graphs:
        monkeypatch.setattr(harness, "Seeded", on_gpu.Masked)
    result = compare(one, how)
    result.assert_as_accurate()
    assert result.captured.count("forward")["save h"] == one.sites
    assert result.ours.saved == result.plain.saved + one.sites * 2 * 96 * 4 * 2


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    forward = {"scale": 3, "stack(2)": 2, "save h": 3, "accumulate": 1}
    result = compare(case("SwiGLU", mlp, 3), by_kernels)
    result.assert_as_accurate()
    assert result.captured.count("forward") == forward and result.captured.reasons == []


@pytest.mark.slow
def test_experts() -> None:
    one = Case("experts", lambda: adapted(Stack(n=48, k=512)), 1, {}, shape=(64, 512), dtype=bf16, wrap=checkpointed)
    result = compare(one)
    result.assert_as_accurate()
    assert result.captured.count("forward")["save h"] == 1
    assert result.ours.saved == result.plain.saved + 64 * 8 * 2
