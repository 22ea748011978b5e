"""One graph for many modules, and numbers that change without recompiling."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import Block, Mlp, oracle, shake


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counting():
    return CompileCounterWithBackend("aot_eager")


@pytest.mark.parametrize("how", [{}, {"dropout": 0.1}, {"dropout": 0.1, "use_dora": True}], ids=str)
def test_equal_blocks_with_different_alpha_share_one_graph(how):
    alphas = {f"{i}.{name}": 1.0 + i + j / 8 for i in range(12) for j, name in enumerate(("attention.wq", "w1", "w2"))}
    blocks = nn.ModuleList(Block(16, bias="use_dora" in how) for _ in range(12))
    lora_fx.install(blocks, LoRAConfig(rank=2, alpha_pattern=alphas, **how))
    shake(blocks)
    assert len({block.w1.lora_scale.item() for block in blocks}) == 12
    backend = counting()
    for block in blocks:
        compiled = torch.compile(block, backend=backend, fullgraph=True)
        x = torch.randn(2, 5, 16)
        torch.manual_seed(0)
        y = compiled(x)
        torch.manual_seed(0)
        torch.testing.assert_close(y, block(x), rtol=1e-4, atol=1e-5)
    assert backend.frame_count == 1


def test_ranks_are_shapes_and_make_graphs():
    blocks = nn.ModuleList(Block(16) for _ in range(4))
    lora_fx.install(blocks, LoRAConfig(rank=2, rank_pattern={"re:[23].*": 4}))
    backend = counting()
    for block in blocks:
        torch.compile(block, backend=backend, fullgraph=True, dynamic=False)(torch.randn(2, 5, 16))
    assert backend.frame_count == 2


def test_numbers_change_without_recompiling():
    model = Mlp(10)
    shake(lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0, target_modules="up")))
    module = model.up
    backend = counting()
    model.compile(backend=backend, fullgraph=True)

    def check(scale):
        x = torch.randn(5, 10)
        expected = oracle(model.down, F.silu(oracle(module, x, scale)))
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)

    check(2.0)
    for scale in (0.5, 3.0, 0.0, -1.25, 2.0):
        module.lora_scale.fill_(scale)
        check(scale)
    with lora_fx.disabled(model):
        check(0.0)
        with lora_fx.disabled(model):
            check(0.0)
        check(0.0)
    check(2.0)
    module.load_state_dict({**module.state_dict(), "lora_scale": torch.tensor(7.0)})
    check(7.0)
    assert backend.frame_count == 1


def test_disabled_takes_effect_in_a_model_compiled_inside_it():
    model = shake(lora_fx.install(nn.Linear(10, 8), LoRAConfig(rank=2, alpha=4.0)))
    backend = counting()
    model.compile(backend=backend, fullgraph=True)
    x = torch.randn(5, 10)
    with lora_fx.disabled(model):
        torch.testing.assert_close(model(x).double(), oracle(model, x, 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x).double(), oracle(model, x, 2.0), rtol=1e-5, atol=1e-5)
    assert backend.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_reference_forward_between_forward_and_backward(backend):
    """As preference losses do: the policy's graph must not notice that adapters were off in between."""
    model = Mlp(16).double()
    shake(lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0)))

    def gradients(x):
        model.zero_grad()
        y = model(x)
        with torch.no_grad(), lora_fx.disabled(model):
            reference = model(x)
        (y - reference).square().sum().backward()
        return [parameter.grad.clone() for parameter in lora_fx.adapter_parameters(model)]

    inputs = [torch.randn(6, 16, dtype=torch.float64) for _ in range(3)]
    expected = [gradients(x) for x in inputs]
    counter = CompileCounterWithBackend(backend)
    model.compile(backend=counter, fullgraph=True)
    for x, grads in zip(inputs, expected):
        for ours, theirs in zip(gradients(x), grads):
            torch.testing.assert_close(ours, theirs)
    assert counter.frame_count == 2, "one graph with gradients, one without"


def test_training_and_evaluation_are_two_graphs():
    model = shake(lora_fx.install(nn.Linear(10, 8), LoRAConfig(rank=2, alpha=4.0, dropout=0.5)))
    backend = counting()
    model.compile(backend=backend, fullgraph=True)
    x = torch.randn(5, 10)
    for _ in range(2):
        assert not torch.equal(model.train()(x), model(x))
        torch.testing.assert_close(model.eval()(x).double(), oracle(model, x, 2.0), rtol=1e-5, atol=1e-5)
    assert backend.frame_count == 2


def test_removing_from_a_compiled_model_takes_effect():
    model = Mlp(16)
    x = torch.randn(5, 16)
    base = model(x)
    shake(lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0)))
    backend = counting()
    model.compile(backend=backend, fullgraph=True)
    assert not torch.allclose(model(x), base)
    lora_fx.remove(model)
    torch.testing.assert_close(model(x), base)
    assert backend.frame_count == 2


def test_subclasses_compile_too():
    torchao_float8 = pytest.importorskip("torchao.float8")
    model = Block(16)
    torchao_float8.convert_to_float8_training(model, config=torchao_float8.Float8LinearConfig(emulate=True))
    shake(lora_fx.install(model, LoRAConfig(rank=2, alpha_pattern={"wq": 4.0, "w1": 5.0})))
    x = torch.randn(1, 16, 16)
    expected = model(x)
    expected.sum().backward()
    grads = [parameter.grad.clone() for parameter in lora_fx.adapter_parameters(model)]
    model.zero_grad()
    model.compile(backend="aot_eager", fullgraph=True)
    y = model(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    for parameter, grad in zip(lora_fx.adapter_parameters(model), grads):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-3)
