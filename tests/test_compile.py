"""`lora_fx.compile` and the backend: in place, scoped, with everything that `torch.compile` takes."""

import copy
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import lora_fx
from lora_fx.passes import pipeline
from lora_fx.passes.pipeline import LoRARewriteError
from lora_fx.passes.report import GraphReport
from tests.anew import compiled_anew

DIM = 32


class Mlp(nn.Module):
    """Two linears with an activation between."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 2 * DIM)
        self.down = nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """The passes run in every test."""
    with compiled_anew():
        yield


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[GraphReport]:
    """The report of every graph that the passes saw."""
    found: list[GraphReport] = []
    original = pipeline.rewrite_graph

    def recording(graph: Graph, *args: Any) -> GraphReport:
        report = original(graph, *args)
        found.append(report)
        return report

    monkeypatch.setattr(pipeline, "rewrite_graph", recording)
    return found


def warm(model: nn.Module) -> nn.Module:
    """Adapters that do something."""
    for name, parameter in lora_fx.named_adapter_parameters(model):
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, std=0.1)
    return model


def rewritten(reports: list[GraphReport]) -> int:
    return sum(site.rewritten for report in reports for site in report.sites)


def step(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = model(x)
    y.square().sum().backward()
    return y.detach()


def test_in_place_and_installs_if_needed(reports: list[GraphReport]) -> None:
    model = Mlp()
    names = set(dict(model.named_parameters()))
    assert lora_fx.compile(model, lora_fx.LoRAConfig(rank=4), fullgraph=True) is model
    warm(model)
    assert set(dict(model.named_parameters())) - names == {f"{n}.lora_{f}" for n in ("up", "down") for f in "ab"}
    assert not any("_orig_mod" in name for name in model.state_dict())
    x = torch.randn(4, 8, DIM)
    expected = copy.deepcopy(model).double()(x.double())
    assert torch.allclose(step(model, x).double(), expected, atol=1e-5)
    assert rewritten(reports) == 2
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_a_part_of_an_installed_model(reports: list[GraphReport]) -> None:
    """Blocks that are compiled by themselves, equal in shape and different in alpha, are one graph."""
    model = nn.Sequential(*(Mlp() for _ in range(4)))
    lora_fx.install(model, lora_fx.LoRAConfig(rank=4, alpha_pattern={f"{i}.up": 2.0 + i for i in range(4)}))
    warm(model)
    for block in model:
        lora_fx.compile(block)
    counters.clear()
    x = torch.randn(4, DIM, requires_grad=True)  # the first block's graph would have no input gradient otherwise
    assert torch.allclose(model(x).double(), copy.deepcopy(model).double()(x.double()), atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert len(reports) == 1 and rewritten(reports) == 2


@pytest.mark.parametrize("root", [nn.Sequential(Mlp(), nn.Linear(DIM, DIM)), nn.Linear(DIM, DIM)])
def test_a_root_of_torchs_own_class_is_one_graph(root: nn.Module, reports: list[GraphReport]) -> None:
    model = lora_fx.compile(copy.deepcopy(root), lora_fx.LoRAConfig(rank=4))
    step(model, torch.randn(4, DIM))
    assert len(reports) == 1 and rewritten(reports) == len(lora_fx.adapter_parameters(model)) // 2
    if isinstance(root, nn.Sequential):
        assert [site.path for site in reports[0].sites] == ["0.up", "0.down", "1"]


def test_twenty_sequentials_are_all_compiled(reports: list[GraphReport]) -> None:
    """More models than Dynamo recompiles one frame: none may fall back to eager."""
    for _ in range(20):
        model = lora_fx.compile(nn.Sequential(nn.Linear(DIM, DIM)), lora_fx.LoRAConfig(rank=4), fullgraph=True)
        with torch.no_grad():
            model(torch.randn(4, DIM))
    assert rewritten(reports) == 20


MODES = [
    None,
    "default",
    "reduce-overhead",
    pytest.param("max-autotune-no-cudagraphs", marks=pytest.mark.slow),
    pytest.param("max-autotune", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mode", MODES)
def test_modes_with_options(mode: str | None, reports: list[GraphReport]) -> None:
    model = lora_fx.compile(
        Mlp(), lora_fx.LoRAConfig(rank=4), mode=mode, options={"epilogue-fusion": True, "shape_padding": False}
    )
    warm(model)
    x = torch.randn(4, DIM)
    assert torch.allclose(step(model, x).double(), copy.deepcopy(model).double()(x.double()), atol=1e-4)
    assert rewritten(reports) == 2


def test_an_unknown_option_or_mode_is_refused() -> None:
    cases: list[dict[str, Any]] = [{"options": {"no_such_option": 1}}, {"mode": "fastest"}]
    for arguments in cases:
        model = Mlp()
        with pytest.raises(RuntimeError, match=r"no_such_option|Unrecognized mode=fastest"):
            lora_fx.compile(model, lora_fx.LoRAConfig(rank=4), **arguments)
        assert not lora_fx.is_installed(model) and model._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, None])
def test_dynamic(dynamic: bool | None, reports: list[GraphReport]) -> None:
    model = warm(lora_fx.compile(Mlp(), lora_fx.LoRAConfig(rank=4), dynamic=dynamic, fullgraph=True))
    counters.clear()
    for tokens in (5, 6, 7, 9):
        x = torch.randn(2, tokens, DIM)
        assert torch.allclose(step(model, x).double(), copy.deepcopy(model).double()(x.double()), atol=1e-4)
    assert counters["stats"]["unique_graphs"] == (1 if dynamic else 2)
    assert all(rewritten([report]) == 2 for report in reports)


def test_every_kind_of_call(reports: list[GraphReport]) -> None:
    """Training, no_grad and inference_mode of one model: three graphs, each rewritten."""
    model = warm(lora_fx.compile(Mlp(), lora_fx.LoRAConfig(rank=4)))
    x = torch.randn(4, DIM)
    expected = step(model, x)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-5)
    with torch.inference_mode():
        assert torch.allclose(model(x), expected, atol=1e-5)
    assert [rewritten([report]) for report in reports] == [2] * len(reports)
    assert len(reports) >= 2


class Theirs(CustomGraphPass):
    """A user's pass that notes whether ours ran before it."""

    def __init__(self, identity: str | None = "theirs") -> None:
        self.identity = identity
        self.ours_first: list[bool] = []

    def __call__(self, graph: Graph) -> None:
        self.ours_first.append(any("lora_fx" in str(node.target) for node in graph.nodes))

    def uuid(self) -> Any:
        return self.identity


@pytest.mark.parametrize("where", ["options", "config", "list"])
def test_a_users_pass_runs_before_ours(where: str, reports: list[GraphReport]) -> None:
    theirs = Theirs()
    value: Any = [theirs] if where == "list" else theirs
    with torch._inductor.config.patch(joint_custom_pre_pass=value if where != "options" else None):
        options = {"joint_custom_pre_pass": theirs} if where == "options" else None
        model = lora_fx.compile(Mlp(), lora_fx.LoRAConfig(rank=4), options=options)
        step(model, torch.randn(4, DIM))
    assert theirs.ours_first == [False]
    assert rewritten(reports) == 2


def test_a_users_identity_is_part_of_ours() -> None:
    def identity(theirs: Any) -> Any:
        return pipeline.hooks({"joint_custom_pre_pass": theirs})["joint_custom_pre_pass"].uuid()

    assert identity(Theirs("a")) == identity(Theirs("a")) != identity(Theirs("b"))
    assert identity(Theirs(None)) is None  # theirs must not be cached, so neither is the whole
    assert identity(lambda graph: None) is None


def test_nothing_global_is_touched(reports: list[GraphReport]) -> None:
    """Two models with different settings in one process, and one of torch's own beside them."""
    before = torch._inductor.config.get_config_copy()
    strict = lora_fx.compile(Mlp(), lora_fx.LoRAConfig(rank=4), strict=True)
    loose = lora_fx.compile(Mlp(), lora_fx.LoRAConfig(rank=20, exclude_modules=["down"]), mode="reduce-overhead")
    x = torch.randn(4, DIM)
    step(strict, x)
    step(loose, x)
    seen = len(reports)
    assert rewritten(reports) == 2
    plain = lora_fx.install(Mlp(), lora_fx.LoRAConfig(rank=4))
    plain.compile()
    step(plain, x)
    assert len(reports) == seen
    assert torch._inductor.config.get_config_copy() == before


def test_strict_raises_at_compilation() -> None:
    model = lora_fx.compile(Mlp(), lora_fx.LoRAConfig(rank=20), strict=True)
    with pytest.raises(Exception, match=r"(?s)left as they were.*up: rank 20 is more than half") as raised:
        model(torch.randn(4, DIM))
    chain = [
        raised.value,
        raised.value.__cause__,
        raised.value.__context__,
        getattr(raised.value, "inner_exception", 0),
    ]
    assert any(isinstance(error, LoRARewriteError) for error in chain)


def test_an_internal_failure_compiles_unfused(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("on purpose")

    passes = (pipeline.Pass("broken", lambda sites: ([site] for site in sites), broken),)
    original = pipeline.rewrite_graph
    model = warm(lora_fx.compile(Mlp(), lora_fx.LoRAConfig(rank=4)))
    x = torch.randn(4, DIM)
    with mock.patch.object(pipeline, "rewrite_graph", lambda graph: original(graph, passes)):
        found = step(model, x)
    assert torch.allclose(found.double(), copy.deepcopy(model).double()(x.double()), atol=1e-4)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("lora_fx")]
    assert sum("broken failed at up: RuntimeError: on purpose" in line for line in lines) == 1


def test_refusals_leave_the_model_as_it_was() -> None:
    class Frozen(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.requires_grad_(False)

    config = lora_fx.LoRAConfig(rank=4)
    refused: list[tuple[nn.Module, dict[str, Any], type[Exception], str]] = [
        (
            Mlp(),
            {"backend": "aot_eager"},
            ValueError,
            r"lora_fx\.install.*torch\.compile\(model, backend='aot_eager'\)",
        ),
        (lora_fx.install(Mlp(), config), {"config": config}, ValueError, "has adapters already"),
        (Frozen(), {}, ValueError, "frozen and has no adapters"),
        (torch.compile(Mlp()), {}, TypeError, "on the model itself"),  # type: ignore[list-item]  # it is a module
        (Mlp(), {"config": lora_fx.LoRAConfig(target_modules=["nothing"])}, ValueError, "nothing"),
    ]
    for model, arguments, kind, text in refused:
        state, classes = dict(model.__dict__), [type(m) for m in model.modules()]
        with pytest.raises(kind, match=text):
            lora_fx.compile(model, **arguments)
        assert model.__dict__ == state and [type(m) for m in model.modules()] == classes
    with pytest.raises(TypeError, match=r"takes an nn\.Module"):
        lora_fx.compile(F.silu)  # type: ignore[type-var]


def by_torch_compile(model: nn.Module, **arguments: Any) -> Callable[[Tensor], Tensor]:
    return torch.compile(model, backend="lora_fx", **arguments)


def by_module_compile(model: nn.Module, **arguments: Any) -> Callable[[Tensor], Tensor]:
    model.compile(backend="lora_fx", **arguments)
    return model


@pytest.mark.parametrize("how", [by_torch_compile, by_module_compile])
@pytest.mark.parametrize("arguments", [{}, {"mode": "reduce-overhead"}, {"options": {"epilogue_fusion": False}}])
def test_the_backend_by_name(
    how: Callable[..., Callable[[Tensor], Tensor]], arguments: dict[str, Any], reports: list[GraphReport]
) -> None:
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="lora_fx")
    assert entry.value == "lora_fx.compile:backend"
    model = warm(lora_fx.install(Mlp(), lora_fx.LoRAConfig(rank=4)))
    x = torch.randn(4, DIM)
    expected = copy.deepcopy(model).double()(x.double())
    assert torch.allclose(step(how(model, **arguments), x).double(), expected, atol=1e-4)
    assert rewritten(reports) == 2
