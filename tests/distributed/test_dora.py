"""DoRA under tensor parallelism (all ranks in one process) and FSDP (one rank)."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import lora_fx
from lora_fx import LoRAConfig
from tests.distributed.simulated import simulated, whole
from tests.distributed.test_placements import S0, S1, Mlp, R, parallel, run
from tests.test_dora import shake
from tests.test_sharding import check_sharded, one_rank  # noqa: F401  # a fixture
from tests.toy_models import Toy

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:Full backward hook")]
CONFIG = LoRAConfig(rank=2, alpha=4.0, use_dora=True)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_tensor_parallel(order, bias):
    torch.manual_seed(0)
    base = Mlp(bias)
    x, dy = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    adapted = shake(lora_fx.install(copy.deepcopy(base), CONFIG))
    exact = copy.deepcopy(adapted).double()
    x_exact = x.double().requires_grad_()
    expected, _, _ = run(exact, x_exact, dy.double())
    with simulated(tp=4) as mesh:
        model = parallel(base, adapted, CONFIG, mesh, order)
        placements = [p.placements for p in lora_fx.adapter_parameters(model)]
        assert placements == [(R,), (S0,), (S0,), (S1,), (R,), (R,)]
        x_ours = x.clone().requires_grad_()
        y, forward, backward = run(model, x_ours, dy)
        torch.testing.assert_close(whole(y), expected.float())
        torch.testing.assert_close(whole(x_ours.grad), x_exact.grad.float())
        # One more each than plain LoRA, of N numbers: the norms of rows that are spread over the ranks, and the
        # gradient of the magnitudes there.
        assert (sum(forward.values()), sum(backward.values())) == (2, 2)
        lora_fx.distributed.reduce_gradients(model)
        named = dict(lora_fx.named_adapter_parameters(model))
        for (name, p), q in zip(named.items(), lora_fx.adapter_parameters(exact), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad.float(), msg=lambda text, name=name: f"{name}: {text}")
        with lora_fx.disabled(model):
            torch.testing.assert_close(whole(model(x)), base(x))


def test_at_the_start_and_afresh():
    torch.manual_seed(0)
    base = Mlp()
    x = torch.randn(3, 5, 16)
    with simulated(tp=4) as mesh:
        model = parallel(base, lora_fx.install(copy.deepcopy(base), CONFIG), CONFIG, mesh, "before")
        torch.testing.assert_close(whole(model(x)), base(x))
        for module in (model.up, model.down):
            with torch.no_grad():
                module.lora_magnitude.mul_(2.0)
            module.reset_adapters()
            torch.testing.assert_close(whole(module.lora_magnitude), whole(module.weight).norm(dim=1))


@pytest.mark.filterwarnings("ignore")
def test_fully_shard(one_rank, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    model = shake(lora_fx.install(Toy(), CONFIG))
    plain = check_sharded(model, one_rank)
    lora_fx.save_adapter(model, tmp_path)
    torch.manual_seed(0)
    loaded = lora_fx.load_adapter(Toy(), tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), plain.parameters(), strict=True))

    with torch.device("meta"):
        model = lora_fx.install(Toy(), CONFIG)
    fully_shard(model, mesh=one_rank).to_empty(device="cpu")
    model.init_weights()
    norms = model.output.weight.full_tensor().norm(dim=1)
    torch.testing.assert_close(model.output.lora_magnitude.full_tensor(), norms)
