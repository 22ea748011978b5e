"""`lora_fx.explain`: what it reports, that it changes nothing, and that its errors are real."""

import copy
import dataclasses
import json
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import lora_fx
from lora_fx.passes import pipeline
from lora_fx.passes.pipeline import LoRARewriteError
from lora_fx.passes.rewriter import Rewriter
from lora_fx.passes.site import Site
from tests.anew import compiled_anew

DIM = 48


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, 2 * DIM, bias=False)
        self.up = nn.Linear(DIM, 2 * DIM, bias=False)
        self.down = nn.Linear(2 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    """Residual MLPs, a head that is too small to rewrite for rank 8, and a linear that no call reaches."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): Mlp() for i in range(depth)})
        self.head = nn.Linear(DIM, 10, bias=False)
        self.unused = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = x + layer(x)
        return self.head(x)


def adapted(config: lora_fx.LoRAConfig | None = None, model: nn.Module | None = None) -> nn.Module:
    model = lora_fx.install(model or Model(), config or lora_fx.LoRAConfig(rank=8))
    for name, parameter in lora_fx.named_adapter_parameters(model):
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def inputs() -> Tensor:
    return torch.randn(2, 16, DIM, requires_grad=True)


def test_a_row_for_every_linear() -> None:
    report = lora_fx.explain(adapted(), inputs())
    rows = {site.path: site for site in report.sites}
    assert len(report.graphs) == 1
    assert len(rows) == len(report.sites) == 11
    assert report.rewritten == 9
    gate, down = rows["layers.1.gate"], rows["layers.1.down"]
    assert gate.forward == ("scale", "stack(2)")
    assert gate.backward == ("scale", "stack(2)", "pair")
    assert "accumulate" not in down.forward  # a residual sum reads it: no reason to write it
    assert (gate.rank, gate.in_features, gate.out_features) == (8, DIM, 2 * DIM)
    assert "more than half" in rows["head"].reason
    assert "did not run it" in rows["unused"].reason


def test_the_table_collapses_layers() -> None:
    text = str(lora_fx.explain(adapted(), inputs()))
    assert text.startswith("LoRA rewrite: 9 of 11 branches in 1 graph\n")
    (line,) = (line for line in text.splitlines() if line.startswith("layers.{0-2}.gate"))
    assert line.split() == [
        *("layers.{0-2}.gate", "48", "->", "96", "8"),
        *("scale,", "stack(2)", "scale,", "stack(2),", "pair"),
    ]
    assert "left as it was: head: rank 8 is more than half" in text
    assert "left as it was: unused: not in the traced graphs" in text
    assert "saved for backward: " in text


def test_graphs_are_text_of_every_stage() -> None:
    (graph,) = lora_fx.explain(adapted(), inputs()).graphs
    assert "lora_fx." not in graph.before
    for text in (graph.after, graph.forward, graph.backward):
        assert "lora_fx." in text
    assert "tangent" in graph.after and "tangent" not in graph.forward and "tangent" in graph.backward


@pytest.mark.slow
def test_saved_bytes_are_those_of_the_real_compilation() -> None:
    """The estimate from the graphs against what autograd holds after a compiled forward."""
    model, x = adapted(lora_fx.LoRAConfig(rank=8, dropout=0.1), Mlp()).bfloat16(), inputs().bfloat16()
    report = lora_fx.explain(model, x)
    assert report.saved_bytes is not None
    plain, rewritten = report.saved_bytes
    assert rewritten < 0.6 * plain
    assert _held(model, x, {}) == plain
    assert _held(model, x, pipeline.hooks()) == rewritten


def _held(model: nn.Module, x: Tensor, options: dict[str, Any]) -> int:
    """Bytes that autograd saves, without parameters, buffers and the input."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with compiled_anew():
        compiled = torch.compile(model, options=options)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = compiled(x)
    del output
    return sum(size for pointer, size in held.items() if pointer not in known)


def test_without_gradients() -> None:
    with torch.no_grad():
        report = lora_fx.explain(adapted(), inputs())
    assert report.rewritten == 9
    assert all(site.backward == () for site in report.sites)
    assert report.saved_bytes is None
    assert "saved for backward" not in str(report)


def test_strict_raises_with_every_reason() -> None:
    model = adapted()
    with pytest.raises(LoRARewriteError, match=r"(?s)head: rank 8 is more.*unused: not in the traced"):
        lora_fx.explain(model, inputs(), strict=True)
    kept = adapted(lora_fx.LoRAConfig(rank=8, exclude_modules=["head", "unused"]))
    assert lora_fx.explain(kept, inputs(), strict=True).rewritten == 9


def test_without_adapters() -> None:
    with pytest.raises(ValueError, match=r"lora_fx\.install"):
        lora_fx.explain(Model(), inputs())


def test_ranks_that_differ_are_reported() -> None:
    config = lora_fx.LoRAConfig(rank=8, rank_pattern={"layers.1": 4}, exclude_modules=["head", "unused"])
    config = dataclasses.replace(config, rank_pattern={"layers.1.gate": 4})
    report = lora_fx.explain(adapted(config), inputs())
    assert {site.path: site.rank for site in report.sites}["layers.1.gate"] == 4
    assert "ranks differ (4, 8)" in str(report)
    assert "layers.{0,2}.gate" in str(report)


@pytest.mark.slow
def test_verify_states_true_errors() -> None:
    model = adapted(lora_fx.LoRAConfig(rank=8, dropout=0.5)).bfloat16()
    report = lora_fx.explain(model, inputs().bfloat16(), verify=True)
    errors = report.verification
    assert errors is not None and errors.gradient_unfused is not None and errors.gradient_rewritten is not None
    assert 1e-4 < errors.output_unfused < 3e-2  # bfloat16, with dropout out of the way
    assert errors.output_rewritten <= 1.1 * errors.output_unfused
    assert errors.gradient_rewritten <= 1.1 * errors.gradient_unfused
    assert "error of gradients against float64" in str(report)


def test_verify_sees_a_wrong_rewrite() -> None:
    def wrong(group: list[Site], rewriter: Rewriter) -> None:
        (site,) = group
        rewriter.replace(site.scaled, rewriter.emit(torch.ops.aten.neg.default, site.scaled, like=site.scaled))
        site.scaled = next(iter(site.add.all_input_nodes))

    passes = (pipeline.Pass("wrong", lambda sites: ([site] for site in sites[:1]), wrong),)
    model, x = adapted(), inputs()
    with mock.patch("lora_fx.passes.trace.rewrite_graph", lambda graph: pipeline.rewrite_graph(graph, passes)):
        errors = lora_fx.explain(model, x, verify=True).verification
    assert errors is not None
    assert errors.output_unfused < 1e-5 < 1e-3 < errors.output_rewritten


def test_an_internal_failure_is_shown() -> None:
    def broken(group: list[Site], rewriter: Rewriter) -> None:
        raise RuntimeError("on purpose")

    passes = (*pipeline.PASSES[:1], pipeline.Pass("broken", lambda sites: ([s] for s in sites), broken))
    with mock.patch("lora_fx.passes.trace.rewrite_graph", lambda graph: pipeline.rewrite_graph(graph, passes)):
        report = lora_fx.explain(adapted(), inputs())
        with pytest.raises(LoRARewriteError, match="on purpose"):
            config = lora_fx.LoRAConfig(rank=8, exclude_modules=["head", "unused"])
            lora_fx.explain(adapted(config), inputs(), strict=True)
    assert "internal failure: broken failed at layers.0.gate: RuntimeError: on purpose" in str(report)
    assert "in part: layers.{0-2}.gate: broken failed: on purpose" in str(report)


@pytest.mark.slow
def test_nothing_is_changed() -> None:
    """Parameters, buffers, compiled code, Dynamo's entries and the random state are what they were."""
    model = adapted(lora_fx.LoRAConfig(rank=8, dropout=0.1), nn.Sequential(Mlp(), nn.BatchNorm1d(16)))
    state = copy.deepcopy(model.state_dict())
    x = inputs()
    lora_fx.compile(model)
    model(x)
    trained = copy.deepcopy(model.state_dict())
    before, random = counters["stats"]["unique_graphs"], torch.get_rng_state()
    for _ in range(10):  # more often than Dynamo would recompile
        assert lora_fx.explain(model, x).rewritten > 0
    assert torch.equal(torch.get_rng_state(), random)
    # The one training step above; the norm's statistics would show a second.
    state.update({name: value for name, value in trained.items() if name.startswith("1.")})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(p.grad is None for p in model.parameters())
    explained = counters["stats"]["unique_graphs"]
    model(x)
    assert counters["stats"]["unique_graphs"] == explained == before + 10


def test_blocks_that_are_compiled_by_themselves() -> None:
    model = adapted()
    assert isinstance(model, Model)
    for layer in model.layers.values():
        lora_fx.compile(layer)
    report = lora_fx.explain(model, inputs())
    assert len(report.graphs) == 1 and report.rewritten == 9
    part = lora_fx.explain(model.layers["1"], inputs())
    assert [site.path for site in part.sites] == ["gate", "up", "down"]


class Broken(nn.Module):
    """Two MLPs, and a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_a_graph_break_gives_two_graphs() -> None:
    report = lora_fx.explain(adapted(model=Broken()), inputs())
    assert len(report.graphs) == 2
    assert [site.path for site in report.sites] == [f"{p}.{n}" for p in ("first", "second") for n in Mlp()._modules]


def test_a_graph_break_below_the_model_leaves_full_paths() -> None:
    """Dynamo then captures the forward of a part as a graph of its own, with paths that begin at that part."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Broken()

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.part(x)

    model = adapted(model=Whole())
    with torch._dynamo.config.patch(recompile_limit=1):  # which must not keep the part's frame from being traced again
        for _ in range(2):
            report = lora_fx.explain(model, inputs())
            assert len(report.graphs) == 3 and report.problems() == []
    assert {site.path for site in report.sites} == {
        f"part.{p}.{n}" for p in ("first", "second") for n in Mlp()._modules
    }


def test_a_linear_by_itself() -> None:
    report = lora_fx.explain(adapted(model=nn.Linear(DIM, DIM)), inputs())
    assert "(root)" in str(report) and report.rewritten == 1


@pytest.mark.slow
def test_the_worst_gradient_is_named() -> None:
    errors = lora_fx.explain(adapted(), inputs(), verify=True).verification
    assert errors is not None and errors.worst_gradient is not None
    assert errors.worst_gradient == "input" or errors.worst_gradient.endswith(("lora_a", "lora_b"))
    assert errors.worst_unfused is not None and errors.worst_rewritten is not None
    assert errors.gradient_unfused is not None and errors.gradient_rewritten is not None
    assert errors.gradient_unfused <= errors.worst_unfused < 1e-5
    assert errors.gradient_rewritten <= errors.worst_rewritten < 1e-5
    assert errors.worst_apart is not None and 0 < errors.worst_apart < 1e-5


def test_as_dict_is_json() -> None:
    report = lora_fx.explain(adapted(), inputs(), verify=True)
    loaded = json.loads(json.dumps(report.as_dict()))
    assert loaded["rewritten"] == 9 and len(loaded["sites"]) == 11
    assert loaded["verification"]["output_rewritten"] > 0
    assert loaded["saved_bytes"] == list(report.saved_bytes or ())
