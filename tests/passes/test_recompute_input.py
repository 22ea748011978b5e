"""`recompute_input` by itself, and `save sum` of `recompute_branch`: what autograd keeps, as on a GPU.

The joint graph's fake values are on "cuda" while the passes look at it (`tests/passes/on_gpu.py`).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from lora_fx.passes._torch import CheckpointPolicy
from lora_fx.passes.pipeline import rewrite_graph
from lora_fx.passes.printer import graph_text
from lora_fx.passes.recompute_branch import REGION
from tests.passes import on_gpu
from tests.passes.harness import Captured, adapt, joint_graph, only
from tests.passes.modules import Mlp
from tests.passes.test_sites import checkpointed

bf16 = torch.bfloat16
K, N = 136, 264
M = 160
RECOMPUTE = only("fold_scale", "recompute_branch", "recompute_input")


def mlp(**config: Any) -> nn.Module:
    return adapt(Mlp(K, N).to(bf16), **config)


def x() -> Tensor:
    return torch.randn(M, K, dtype=bf16, requires_grad=True)


class Normed(nn.Module):
    """A residual block: x + linear(norm(x)), twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(K, elementwise_affine=False) for _ in range(2))
        self.linears = nn.ModuleList(nn.Linear(K, K, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, linear in zip(self.norms, self.linears):
            x = x + linear(norm(x))
        return x


class NormedMlp(nn.Module):
    """x + mlp(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(K), Mlp(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def normed() -> nn.Module:
    return adapt(Normed().to(bf16))


def rewritten(module: Callable[..., Any], *inputs: Tensor, device: str = "cuda") -> tuple[Graph, Any]:
    """The joint graph after the passes, and their report."""
    graph = joint_graph(module, *inputs)
    with on_gpu.devices(graph, device):
        return graph, rewrite_graph(graph, RECOMPUTE)


def tags(graph: Graph, policy: Any = CheckpointPolicy.PREFER_RECOMPUTE) -> list[str]:
    nodes = (node for node in graph.nodes if node.meta.get("recompute") is policy)
    return sorted(str(node.target).split(".")[1] for node in nodes if node.meta.get("ac_graph_id", REGION) == REGION)


def kept(captured: Captured) -> list[tuple[int, ...]]:
    """The shapes of what forward hands to backward, without parameters, inputs and numbers."""
    nodes = captured.backward[0].graph.find_nodes(op="placeholder")
    names = [node for node in nodes if not str(node.target).startswith(("primals", "tangents"))]
    return sorted(tuple(node.meta["val"].shape) for node in names if node.meta["val"].dim() > 0)


def test_tags_what_makes_an_input() -> None:
    """silu(gate) * up, down to the sums of gate and up, which are recomputed too."""
    before, _ = rewritten(mlp(), x(), device="cpu")
    graph, report = rewritten(mlp(), x())
    assert graph_text(graph) == graph_text(before), "it adds and removes nothing"
    assert [site.forward for site in report.sites] == [
        ("scale", "recompute"),
        ("scale", "recompute"),
        ("scale", "recompute x"),
    ]
    assert set(tags(graph)) >= {"scaled_mm", "mul", "add", "exp"}


def test_nothing_on_the_cpu() -> None:
    graph, report = rewritten(mlp(), x(), device="cpu")
    assert not any("recompute x" in site.forward for site in report.sites)
    assert set(tags(graph)) == {"scaled_mm"}


def test_swiglu_keeps_what_the_frozen_model_keeps() -> None:
    """The outputs of the frozen gate and up, and h of each branch."""
    captured = on_gpu.capture(mlp(), x())
    frozen = on_gpu.capture(Mlp(K, N).to(bf16).requires_grad_(False), x())
    thin = [shape for shape in kept(captured) if shape[-1] <= 8]
    assert kept(frozen) == [(M, N)] * 2
    assert [shape for shape in kept(captured) if shape not in thin] == kept(frozen)
    assert len(thin) <= 3


def test_a_residual_stream_is_kept_and_what_follows_it_is_not() -> None:
    """The sum behind each linear ("save sum"), from which the norm is computed again: no base, no normalised value."""
    graph, report = rewritten(normed(), x())
    first, second = (site.forward for site in report.sites)
    assert first == ("scale", "save sum", "recompute x")
    assert second[0] == "scale" and second[-1] == "recompute x"
    saved = tags(graph, CheckpointPolicy.MUST_SAVE)
    assert saved and set(saved) == {"add"}
    wide = [shape for shape in kept(on_gpu.capture(normed(), x())) if shape[-1] == K]
    assert wide == [(M, K)], "the stream between the two blocks; the first one's input is the caller's"


def test_bytes_of_a_block() -> None:
    """Two layers of norm and SwiGLU keep the frozen layers' bytes and thin matrices."""
    module = nn.Sequential(*(NormedMlp() for _ in range(2))).to(bf16).requires_grad_(False)
    frozen = kept(on_gpu.capture(module, x()))
    ours = kept(on_gpu.capture(adapt(copy.deepcopy(module)), x()))
    thin = [shape for shape in ours if shape[-1] in (4, 8)]
    assert [shape for shape in ours if shape not in thin] == frozen
    assert sum(size for _, size in thin) <= 2 * 3 * 4


def test_checkpointing_is_the_users() -> None:
    graph, report = rewritten(checkpointed(mlp()), x())
    assert not any("recompute x" in site.forward for site in report.sites)
    assert all(node.meta.get("ac_graph_id") != REGION for node in graph.nodes)


def test_a_frozen_a_needs_no_input() -> None:
    module = mlp()
    module.down.lora_a.requires_grad_(False)  # type: ignore[union-attr]
    _, report = rewritten(module, x())
    assert not any("recompute x" in site.forward for site in report.sites)


def test_no_backward() -> None:
    with torch.no_grad():
        graph, report = rewritten(mlp(), x())
    assert tags(graph) == [] and all(site.forward == ("scale",) for site in report.sites)


def test_the_second_run_changes_nothing() -> None:
    graph, _ = rewritten(normed(), x())
    before = tags(graph), graph_text(graph)
    with on_gpu.devices(graph, "cuda"):
        assert not any(site.rewritten for site in rewrite_graph(graph, RECOMPUTE).sites)
    assert (tags(graph), graph_text(graph)) == before
