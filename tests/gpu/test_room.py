"""Weights with room for B on a CUDA device: compiled training, without gradients, in checkpoints and CUDA graphs."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_fx
from lora_fx.passes.kernels import wide
from tests.passes.harness import adapt
from tests.passes.modules import Mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

bf16 = torch.bfloat16
K, N, R = 512, 1408, 128


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The sides on which room was used, in the order of use; few rows are many here."""
    torch._dynamo.reset()
    used: list[str] = []
    find = wide._find

    def found(weight: Tensor) -> tuple[str, int]:
        used.append(find(weight)[0])
        return find(weight)

    monkeypatch.setattr(wide, "MIN_ROWS", 512)
    monkeypatch.setattr(wide, "_find", found)
    yield used
    torch._dynamo.reset()


def mlp(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return adapt(Mlp(K, N).to("cuda", bf16).requires_grad_(False), **{"rank": R, "alpha": 2 * R, **config})


def compiled(module: nn.Module, used: list[str], **options: Any) -> nn.Module:
    lora_fx.compile(module, strict=True, **options)
    used.clear()
    return module


def inputs() -> Tensor:
    return torch.randn(2, 512, K, device="cuda", dtype=bf16)


def step(function: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of the input and of every adapter."""
    x = x.detach().requires_grad_()
    y = function(x)
    dy = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(bf16).to(y.dtype)
    parameters = dict(lora_fx.named_adapter_parameters(function))
    gradients = torch.autograd.grad(y, [x, *parameters.values()], dy)
    return dict(zip(["y", "x", *parameters], [y.detach(), *gradients], strict=True))


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_training(counted: list[str]) -> None:
    """Against float64 eager, plain torch.compile as the yardstick, and B as it is after a step; to the bit again."""
    plain = mlp()
    exact, ours = copy.deepcopy(plain).double(), compiled(mlp(), counted)
    plain.compile()
    for _ in range(3):
        x = inputs()
        oracle, theirs, found = step(exact, x.double()), step(plain, x), step(ours, x)
        worse = {
            name: (error(theirs[name], value), error(found[name], value))
            for name, value in oracle.items()
            if not error(found[name], value) <= 1.1 * error(theirs[name], value)
        }
        assert not worse
        assert all(torch.equal(value, found[name]) for name, value in step(ours, x).items())
        with torch.no_grad():
            for parameters in zip(*map(lora_fx.adapter_parameters, (exact, plain, ours)), strict=True):
                change = 0.01 * torch.randn_like(parameters[1])
                for parameter in parameters:
                    parameter += change.to(parameter.dtype)
    assert counted == ["right", "left"] * 6


@pytest.mark.parametrize("rows", [512, 500])
def test_without_gradients(rows: int, counted: list[str]) -> None:
    """Of few rows the branch is added elsewhere, of weights whose rows lie apart."""
    module, x = mlp(), torch.randn(rows, K, device="cuda", dtype=bf16)
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        assert error(compiled(module, counted)(x), exact(x.double())) < 0.01
    assert counted == ["right", "left"] * (rows == 512)


def test_in_a_checkpoint(counted: list[str]) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = mlp()

        def forward(self, x: Tensor) -> Any:
            return torch.utils.checkpoint.checkpoint(self.mlp, x, use_reentrant=False)

    module, x = Checkpointed(), inputs()
    exact = copy.deepcopy(module).double()
    found = step(compiled(module, counted), x)
    assert all(error(found[name], value) < 0.02 for name, value in step(exact, x.double()).items())
    assert len(counted) == 4 and "" not in counted


def test_cuda_graphs(counted: list[str]) -> None:
    """A recording copies B as it is when it is played."""
    module, x = mlp(), inputs()
    exact = copy.deepcopy(module).double()
    compiled(module, counted, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        found = {name: value.clone() for name, value in step(module, x).items()}
        assert all(error(found[name], value) < 0.02 for name, value in step(exact, x.double()).items())
        with torch.no_grad():
            for ours, other in zip(*map(lora_fx.adapter_parameters, (module, exact)), strict=True):
                other.copy_(ours.normal_(std=0.05))
    assert counted


def test_a_weight_that_was_replaced(counted: list[str]) -> None:
    """Compiled again, without room."""
    module, x = mlp(), inputs()
    exact = copy.deepcopy(module).double()
    step(compiled(module, counted), x)
    gate: Any = module.gate
    gate.weight = nn.Parameter(gate.weight.detach().clone(), requires_grad=False)
    counted.clear()
    found = step(module, x)
    assert all(error(found[name], value) < 0.02 for name, value in step(exact, x.double()).items())
    assert counted == ["left"]
