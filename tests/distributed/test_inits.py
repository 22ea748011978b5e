"""Initialisations that change the base, under tensor parallelism (all ranks in one process) and FSDP (one rank)."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import lora_fx
from lora_fx import LoRAConfig
from tests.distributed.simulated import simulated, whole
from tests.distributed.test_placements import Mlp, plan, run
from tests.test_sharding import one_rank  # noqa: F401  # a fixture
from tests.toy_models import TOKENS, Toy, shake

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:Full backward hook")]
CONFIG = LoRAConfig(rank=2, alpha=3.0, init="pissa")


def test_tensor_parallel():
    torch.manual_seed(0)
    base = Mlp()
    adapted = shake(lora_fx.install(copy.deepcopy(base), CONFIG))
    x, dy = torch.randn(3, 5, 16), torch.randn(3, 5, 16)
    expected, _, _ = run(adapted, x, dy)
    with simulated(tp=4) as mesh:
        model = lora_fx.freeze(parallelize_module(copy.deepcopy(adapted), mesh, plan()))
        y, _, _ = run(model, x, dy)
        torch.testing.assert_close(whole(y), expected)
        lora_fx.distributed.reduce_gradients(model)
        for p, q in zip(lora_fx.adapter_parameters(model), lora_fx.adapter_parameters(adapted), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad)
        with lora_fx.disabled(model):
            torch.testing.assert_close(whole(model(x)), base(x))
        torch.testing.assert_close(whole(model(x)), expected)
        with pytest.raises(ValueError, match="takes the weight apart, which is sharded"):
            model.up.reset_adapters()
        lora_fx.remove(model)
        assert torch.equal(whole(model.up.weight), base.up.weight)
        assert torch.equal(whole(model.down.weight), base.down.weight)

        late = parallelize_module(copy.deepcopy(base), mesh, plan())
        with pytest.raises(
            ValueError, match=r"up \(Linear\): init='pissa' .* it is sharded: install before it is sharded"
        ):
            lora_fx.install(late, CONFIG)
        assert not lora_fx.is_installed(late)


@pytest.mark.filterwarnings("ignore")
def test_fully_shard(one_rank, tmp_path):  # noqa: F811
    torch.manual_seed(0)
    base = Toy()
    model = shake(lora_fx.install(copy.deepcopy(base), CONFIG))
    expected = model(TOKENS)
    fully_shard(model, mesh=one_rank)
    torch.testing.assert_close(model(TOKENS), expected)
    with (
        pytest.raises(ValueError, match=r"keeps a part of its base in its factors .* fully_shard"),
        lora_fx.disabled(model),
    ):
        pass
    lora_fx.save_adapter(model, tmp_path)
    torch.testing.assert_close(lora_fx.load_adapter(base, tmp_path)(TOKENS), expected, rtol=1e-4, atol=1e-5)
