"""Sharding and installing: one process is enough to see who comes first."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs

import copy

import pytest
import torch
import torch.nn.utils.parametrizations

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import TOKENS, Toy, refused, shake


@pytest.fixture
def one_rank():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def check_sharded(model, mesh):
    """Shard `model`; a copy that is not, which is returned, has the same outputs and gradients."""
    plain = copy.deepcopy(model)
    shard(model, mesh)
    torch.testing.assert_close(model(TOKENS), plain(TOKENS))
    for one in (model, plain):
        one(TOKENS).square().sum().backward()
    named = dict(lora_fx.named_adapter_parameters(model))
    assert named.keys() == dict(lora_fx.named_adapter_parameters(plain)).keys()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == named.keys()
    for p, q in zip(named.values(), lora_fx.adapter_parameters(plain), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)
    return plain


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_wrapping_before_install_is_refused(one_rank):
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    order = r"wrapped by {} already: install first, then wrap \(the order is: quantise, install, parallelise, shard"
    partly = Toy()
    fully_shard(partly.layers["1"], mesh=one_rank)
    refused(partly, None, r"layers\.1 is " + order.format("fully_shard"))
    refused(shard(Toy(), one_rank), None, order.format("fully_shard"))
    whole = fully_shard(Toy(), mesh=one_rank)
    refused(whole.layers["0"], None, "the model itself is " + order.format("a parent's fully_shard"))
    refused(DistributedDataParallel(Toy()), None, order.format("DistributedDataParallel"))
    refused(replicate(Toy()), None, order.format("replicate"))
    fsdp1 = FullyShardedDataParallel(Toy(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match=order.format("FullyShardedDataParallel")):
        lora_fx.install(fsdp1)
    assert not lora_fx.is_installed(fsdp1)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_sharding_after_install(one_rank):
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    plain = check_sharded(model, one_rank)
    with lora_fx.disabled(model):
        assert not torch.allclose(model(TOKENS), plain(TOKENS))
    with pytest.raises(ValueError, match="the model itself is wrapped by fully_shard: remove the adapters before"):
        lora_fx.remove(model)

    with torch.device("meta"):
        model = lora_fx.install(Toy(), LoRAConfig(rank=2, alpha=6.0))
    shard(model, one_rank).to_empty(device="cpu")
    model.init_weights()
    assert model.output.lora_scale.item() == 3.0 and model.output.lora_enabled.item() == 1.0
    assert model.output.lora_a.full_tensor().abs().max() > 0 and not model.output.lora_b.full_tensor().any()
