"""Adapters that come and go under CUDA graphs, which are recorded for addresses."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import lora_fx
from lora_fx import LoRAConfig
from tests.passes.modules import Mlp
from tests.toy_models import shake

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
K, N = 256, 512


def model() -> nn.Module:
    torch.manual_seed(0)
    module = lora_fx.install(Mlp(K, N).cuda().bfloat16(), LoRAConfig(rank=8), adapter_name="en", max_rank=16)
    lora_fx.add_adapter(module, "fr", LoRAConfig(rank=16))
    for seed, name in enumerate(("fr", "en")):
        shake(lora_fx.set_adapter(module, name).cpu(), seed=seed, std=0.05).cuda()
    return module.eval()


@pytest.fixture(autouse=True)
def compiled_alone():
    """Dynamo counts what it compiles by code, which is that of every other test of this model."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def close(ours, exact):
    assert (ours.double() - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inference(tmp_path, mode):
    module = model()
    twin = copy.deepcopy(module).double()
    lora_fx.save_adapter(module, tmp_path, adapter_name="fr")
    lora_fx.compile(module, mode=mode, fullgraph=True)
    x = torch.randn(4, 128, K, device="cuda", dtype=torch.bfloat16)

    def check():
        for name in ("en", "fr", "en", "fr"):
            for each in (module, twin):
                lora_fx.set_adapter(each, name)
            torch.compiler.cudagraph_mark_step_begin()
            close(module(x).clone(), twin(x.double()))
        for rows in (["en", "fr", None, "en"], [None, "fr", "fr", "en"]):
            torch.compiler.cudagraph_mark_step_begin()
            with lora_fx.adapters_per_row(module, rows):
                y = module(x).clone()
            with lora_fx.adapters_per_row(twin, rows):
                close(y, twin(x.double()))

    with torch.no_grad():
        for _ in range(3):  # a warm-up, a recording, a replay
            check()
        counters.clear()
        for each in (module, twin):
            lora_fx.load_adapter(each, tmp_path, adapter_name="en")
            lora_fx.set_adapter(each, "en").down.lora_scale.fill_(0.3)
        check()
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training(mode):
    """Each adapter with an optimizer of its own, in turns, as in float64."""
    module = model().train()
    twin = copy.deepcopy(module).double()
    optimizers = {
        (each, name): torch.optim.SGD(lora_fx.adapter_parameters(each, name), lr=0.01)
        for each in (module, twin)
        for name in ("en", "fr")
    }
    lora_fx.compile(module, mode=mode, fullgraph=True)
    for step in range(8):
        name = ("en", "fr")[step // 2 % 2]
        x = torch.randn(4, 128, K, device="cuda", dtype=torch.bfloat16)
        for each, input in ((module, x), (twin, x.double())):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer = optimizers[each, name]
            optimizer.zero_grad()
            lora_fx.set_adapter(each, name)(input).square().mean().backward()
            optimizer.step()
        if step == 3:
            counters.clear()
    assert counters["stats"]["unique_graphs"] == 0
    for name in ("en", "fr"):
        for ours, exact in zip(lora_fx.adapter_parameters(module, name), lora_fx.adapter_parameters(twin, name)):
            close(ours, exact)
