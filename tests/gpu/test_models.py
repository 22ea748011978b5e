"""Compiled models on a CUDA device: values, launches, CUDA graphs."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import lora_fx
from tests.passes.harness import adapt
from tests.passes.modules import Block, Mlp
from tests.passes.test_grouped import SwiGLU

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

bf16 = torch.bfloat16


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


class TwoLayers(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Mixture(nn.Module):
    """A SwiGLU of four experts, one of which gets nothing, over rows some of which are nobody's."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.experts = SwiGLU(bf16, (300, 300, 647, 1001), width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        ends = self.experts.ends_for(rows)
        mine = (torch.arange(len(rows), device=x.device) < ends[-1])[:, None]
        # Both ways: what a grouped product leaves in the rows of nobody is unspecified.
        return torch.where(mine, self.experts(torch.where(mine, rows, 0.0)), 0.0).view_as(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear and silu": lambda: nn.Sequential(nn.Linear(512, 1024, bias=False), nn.SiLU()),
    "linear with bias": lambda: nn.Linear(512, 1016),
    "SwiGLU": lambda: Mlp(512, 1408),
    "two blocks": lambda: TwoLayers(512),
    "experts": lambda: Mixture(512, 1408),
}


def model(name: str, dtype: torch.dtype = bf16, **config: Any) -> tuple[nn.Module, Tensor]:
    module = MODELS[name]().to("cuda", dtype).requires_grad_(False)
    if name == "experts":
        config |= {"target_modules": (), "target_parameters": ["experts.w", "experts.w2", "experts.w3"]}
    return adapt(module, **config), torch.randn(2, 512, 512, device="cuda", dtype=dtype)


def step(function: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and the gradients of the input and of every adapter."""
    x = x.detach().requires_grad_()
    y = function(x)
    generator = torch.Generator(x.device).manual_seed(1)
    dy = torch.randn(y.shape, device=y.device, generator=generator).to(x.dtype if x.dtype != torch.float64 else bf16)
    leaves = [x, *lora_fx.adapter_parameters(function)]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def attention_in_order() -> Iterator[None]:
    """cuDNN's attention adds up the gradient of q in any order: two steps would differ, with or without adapters."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.mark.usefixtures("attention_in_order")
@pytest.mark.parametrize("rank", [8, 16, 64, 100])
@pytest.mark.parametrize("name", MODELS)
def test_in_a_compiled_model(name: str, rank: int) -> None:
    """Against float64 eager with plain torch.compile as the yardstick; the step repeats to the bit."""
    torch.manual_seed(0)
    module, _ = model(name, rank=rank, alpha=1.7 * rank)
    # Many: what reaches the values of attention comes from its first few tokens, so that few roundings decide an error.
    inputs = [torch.randn(2, 512, 512, device="cuda", dtype=bf16) for _ in range(32)]
    exact = copy.deepcopy(module).double()
    oracle = [step(exact, x.double()) for x in inputs]

    def errors(function: nn.Module) -> list[float]:
        """Of the output and of every gradient, over all inputs."""
        found = [[error(a, b) ** 2 for a, b in zip(step(function, x), o, strict=True)] for x, o in zip(inputs, oracle)]
        return [float(torch.tensor(squares).mean().sqrt()) for squares in zip(*found, strict=True)]

    plain = copy.deepcopy(module)
    plain.compile()
    theirs = errors(plain)
    torch._dynamo.reset()
    lora_fx.compile(module, strict=True)
    ours = errors(module)
    names = ["y", "x", *(name for name, _ in lora_fx.named_adapter_parameters(module))]
    pairs = dict(zip(names, zip(theirs, ours, strict=True), strict=True))
    first, second = step(module, inputs[0]), step(module, inputs[0])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    worse = {name: pair for name, pair in pairs.items() if not pair[1] <= 1.1 * pair[0] + 4 * 2.0**-24}
    assert not worse, f"less accurate than plain torch.compile: {worse}"


@pytest.mark.parametrize("name", ["two blocks", "experts"])
def test_launches_are_inductors_own(name: str) -> None:
    """No operator is called for what is a launch."""
    from torch._inductor.utils import run_and_get_code

    module, x = model(name, rank=16)
    _, codes = run_and_get_code(step, lora_fx.compile(module), x)
    lines = [line for code in codes for line in code.splitlines() if not line.lstrip().startswith("#")]
    assert any("lora_fx_" in line and ".run(" in line for line in lines)
    assert not any("lora_fx.tile_" in line or "lora_fx.sum_" in line for line in lines)
    for operator in ("stacked_mm", "joined_mm"):  # of q, k and v, in either direction
        assert any(f"lora_fx.{operator}." in line for line in lines) == (name == "two blocks")


def test_any_number_of_tokens() -> None:
    module, x = model("SwiGLU", rank=16)
    exact = copy.deepcopy(module).double()
    lora_fx.compile(module, strict=True, dynamic=True)
    for tokens in (512, 384, 301):
        found, oracle = step(module, x[:, :tokens]), step(exact, x[:, :tokens].double())
        assert all(error(a, b) < 0.02 for a, b in zip(found, oracle, strict=True))


@pytest.mark.parametrize("name", ["SwiGLU", "experts"])
def test_retain_graph(name: str) -> None:
    """A second backward over one forward: no kernel wrote over what was kept."""
    torch.manual_seed(0)
    module, x = model(name, rank=16)
    lora_fx.compile(module, strict=True)
    x.requires_grad_()
    # A backward that may free what was kept refuses a second run, in any compiled model.
    with torch._functorch.config.patch(donated_buffer=False):
        y = module(x)
    dy, leaves = torch.randn_like(y), {"x": x, **dict(lora_fx.named_adapter_parameters(module))}
    first = torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)
    kept = y.detach().clone()
    second = torch.autograd.grad(y, list(leaves.values()), dy)
    differ = {
        name: f"{int((a != b).sum())} of {a.numel()}, by {error(a, b.double()):.1e}"
        for name, a, b in zip(leaves, first, second, strict=True)
        if not torch.equal(a, b)
    }
    assert not differ
    assert torch.equal(y, kept)


@pytest.mark.usefixtures("attention_in_order")
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("tokens", [1, 7, 64, 512])
def test_siblings_without_gradients(tokens: int, rank: int) -> None:
    """One product for all that read one x, of any number of tokens."""
    torch.manual_seed(0)
    module, x = model("two blocks", rank=rank)
    exact, plain = copy.deepcopy(module).double(), copy.deepcopy(module)
    plain.compile(dynamic=False)
    lora_fx.compile(module, strict=True, dynamic=False)
    squares = []
    with torch.no_grad():
        for _ in range(8):
            x = torch.randn(2, tokens, 512, device="cuda", dtype=bf16)
            oracle = exact(x.double())
            squares.append([error(function(x), oracle) ** 2 for function in (plain, module)])
    theirs, ours = torch.tensor(squares).mean(0).sqrt().tolist()
    assert ours <= 1.1 * theirs


@pytest.mark.usefixtures("attention_in_order")
@pytest.mark.parametrize("name", ["SwiGLU", "linear and silu", "experts", "two blocks"])
def test_in_a_cuda_graph(name: str) -> None:
    """A captured step, replayed with other inputs, gives what the step gives."""
    module, x = model(name, rank=16)
    lora_fx.compile(module, strict=True)
    x.requires_grad_()
    leaves = [x, *lora_fx.adapter_parameters(module)]
    dy = torch.randn_like(module(x))

    def whole() -> list[Tensor]:
        y = module(x)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            whole()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole()
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            dy.copy_(torch.randn_like(dy))
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, whole(), strict=True))


def test_cuda_graph_trees() -> None:
    """Inductor's own CUDA graphs, by mode."""
    module, x = model("SwiGLU", rank=16)
    expected = step(copy.deepcopy(module).double(), x.double())
    lora_fx.compile(module, strict=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = [t.clone() for t in step(module, x)]
        assert all(error(a, b) < 0.02 for a, b in zip(found, expected, strict=True))
