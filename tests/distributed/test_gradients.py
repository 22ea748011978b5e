"""Reducing and clipping gradients on a tensor-parallel mesh; all ranks in one process."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import parallelize_module

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.distributed import DeferredReduction, clip_grad_norm
from tests.distributed.simulated import collectives, simulated, whole
from tests.distributed.test_placements import Mlp, plan, run
from tests.toy_models import shake

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:Full backward hook")]


@pytest.fixture
def adapted() -> nn.Module:
    torch.manual_seed(0)
    return shake(lora_fx.install(Mlp(), LoRAConfig(rank=2, alpha=2.0)))


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_clipping(adapted, max_norm):
    x, dy = torch.randn(5, 16), torch.randn(5, 16)
    run(adapted, x, dy)
    model = copy.deepcopy(adapted)
    model.zero_grad()
    norm = nn.utils.clip_grad_norm_(lora_fx.adapter_parameters(adapted), max_norm)
    with simulated(tp=4) as mesh:
        parallelize_module(model, mesh, plan())
        run(model, x, dy)
        parameters = lora_fx.adapter_parameters(model)
        with collectives() as counts:
            ours = clip_grad_norm(parameters, max_norm)
        assert counts == {"allreduce": 2}  # the terms of the gradients, and the squares
        torch.testing.assert_close(whole(ours), norm)
        for p, q in zip(parameters, lora_fx.adapter_parameters(adapted), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad)


def test_clipping_plain_parameters_is_what_torch_does(adapted):
    run(adapted, torch.randn(5, 16), torch.randn(5, 16))
    other = copy.deepcopy(adapted)
    ours, theirs = lora_fx.adapter_parameters(adapted), lora_fx.adapter_parameters(other)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    torch.testing.assert_close(clip_grad_norm(ours, 0.5), nn.utils.clip_grad_norm_(theirs, 0.5))
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    # A pipeline stage may have nothing to clip.
    assert clip_grad_norm([], 1.0).item() == 0.0


def test_clipping_parameters_of_several_dtypes():
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)
    parameters = [nn.Parameter(torch.zeros(3, 5 + i, dtype=dtype)) for i, dtype in enumerate(dtypes)]
    for p in parameters:
        p.grad = torch.randn_like(p).t().contiguous().t()
    before = [p.grad.double() for p in parameters]
    norm = torch.stack([g.square().sum() for g in before]).sum().sqrt()
    torch.testing.assert_close(clip_grad_norm(parameters, 0.7).double(), norm, rtol=1e-6, atol=0)
    for p, g in zip(parameters, before, strict=True):
        torch.testing.assert_close(p.grad, (g * (0.7 / norm)).to(p.dtype), rtol=torch.finfo(p.dtype).eps + 1e-6, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_norm_that_makes_no_sense(max_norm):
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        clip_grad_norm([], max_norm)


def test_deferred_gradients_are_summed_once_a_step(adapted):
    x, dy = torch.randn(5, 16), torch.randn(5, 16)
    expected = copy.deepcopy(adapted)
    run(expected, x, dy)
    run(expected, 2 * x, dy)  # accumulated
    with simulated(tp=4) as mesh:
        model = parallelize_module(copy.deepcopy(adapted), mesh, plan())
        optimizer = torch.optim.SGD(lora_fx.adapter_parameters(model), lr=0.1)
        reduction = DeferredReduction(model, optimizer)
        run(model, x, dy)
        run(model, 2 * x, dy)
        # Labelled as whole, and not reduced: the hook of the optimizer does it.
        assert all(p.grad.placements == p.placements for p in lora_fx.adapter_parameters(model))
        with collectives() as counts:
            optimizer.step()
        assert counts == {"allreduce": 1}
        for p, q in zip(lora_fx.adapter_parameters(model), lora_fx.adapter_parameters(expected), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad)

        # By hand before the step: then the hook has nothing left to do.
        optimizer.zero_grad()
        run(model, x, dy)
        assert (reduction.reduce(), reduction.reduce()) == (1, 0)
        with collectives() as counts:
            optimizer.step()
        assert counts == {}

        # A step that is left out does not hide the gradients of the next one.
        for _ in range(2):
            optimizer.zero_grad()
            run(model, x, dy)
            assert reduction.reduce() == 1

        reduction.remove()
        optimizer.zero_grad()
        run(model, x, dy)
        assert lora_fx.distributed.reduce_gradients(model) == 1


def test_deferring_needs_adapters_and_leaves_plain_ones_alone(adapted):
    parameters = [nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=r"no model holds adapters: call lora_fx\.install"):
        DeferredReduction(Mlp(), torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(ValueError, match="the optimizer holds no adapter of these models"):
        DeferredReduction(adapted, torch.optim.SGD(parameters, lr=0.1))
    reduction = DeferredReduction(adapted, torch.optim.SGD(lora_fx.adapter_parameters(adapted), lr=0.1))
    y = adapted(torch.randn(5, 16))
    y.sum().backward()
    assert reduction.reduce() == 0


def test_each_optimizer_reduces_its_own_adapter(adapted):
    """Also when another adapter is active by the time of the step, and also beside an optimizer that defers nothing."""
    x, dy = torch.randn(5, 16), torch.randn(5, 16)
    single = lora_fx.add_adapter(copy.deepcopy(adapted), "fr", LoRAConfig(rank=1))
    shake(lora_fx.set_adapter(single, "fr"), seed=3)
    with simulated(tp=4) as mesh:
        model = parallelize_module(copy.deepcopy(single), mesh, plan())
        optimizers = {
            name: torch.optim.SGD(lora_fx.adapter_parameters(model, name), lr=0.1) for name in ("default", "fr")
        }
        reduction = DeferredReduction(model, optimizers["fr"])
        for module in (single, model):
            for name in ("fr", "default"):
                run(lora_fx.set_adapter(module, name), x, dy)
        with collectives() as counts:
            optimizers["fr"].step()
        assert counts == {"allreduce": 1}
        for name in ("default", "fr"):
            for p, q in zip(lora_fx.adapter_parameters(model, name), lora_fx.adapter_parameters(single, name)):
                torch.testing.assert_close(whole(p.grad), q.grad)
        reduction.remove()
        assert not any(module._lora_deferred for linear in (model.up, model.down) for module in linear.holders())
