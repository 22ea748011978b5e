"""Adapters merged into weights that are spread over ranks: each rank's part, as one process merges the whole."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import lora_fx
from llama3 import CONFIGS, Experts
from lora_fx import LoRAConfig
from tests.distributed.processes import run_ranks
from tests.distributed.simulated import simulated, whole
from tests.distributed.test_experts import CHANNELS, ENDS, shard
from tests.distributed.test_placements import Mlp, parallel, plan
from tests.toy_models import shake

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:Full backward hook")]


def shaken(model: nn.Module) -> nn.Module:
    """`model` with magnitudes, too, that are no norms of anything."""
    with torch.no_grad():
        for name, parameter in lora_fx.named_adapter_parameters(shake(model)):
            if name.endswith("magnitude"):
                parameter.mul_(torch.linspace(0.5, 1.5, len(parameter)))
    return model


def bases(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters() if "lora" not in name}


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("order", ["before", "after"])
def test_tensor_parallel(order, use_dora):
    torch.manual_seed(0)
    base, config = Mlp(bias=True), LoRAConfig(rank=3, alpha=4.0, use_dora=use_dora)
    adapted = shaken(lora_fx.install(copy.deepcopy(base), config))
    x = torch.randn(3, 5, 16)
    expected, merged = adapted(x), bases(lora_fx.merge(copy.deepcopy(adapted)))
    with simulated(tp=4) as mesh:
        model = parallel(base, adapted, config, mesh, order)
        held = {name: (p, whole(p.detach()).clone()) for name, p in model.named_parameters()}
        lora_fx.merge(model)
        for name, weight in bases(model).items():
            torch.testing.assert_close(weight, merged[name], msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(whole(model(x)), expected)
        lora_fx.unmerge(model)
        for name, p in model.named_parameters():
            assert held[name][0] is p and torch.equal(held[name][1], whole(p.detach())), name
            assert p.requires_grad == ("lora" in name)
        torch.testing.assert_close(whole(model(x)), expected)
        lora_fx.remove(lora_fx.merge(model, keep=False))
        assert [name for name, _ in model.named_parameters()] == [name for name, _ in base.named_parameters()]
        torch.testing.assert_close(whole(model(x)), expected)


def test_a_weight_without_its_adapter_is_refused():
    """Put there by hand, past the module, which would have taken its factors along."""
    adapted = shake(lora_fx.install(Mlp(), LoRAConfig(rank=3)))
    with simulated(tp=2) as mesh:
        weight = distribute_tensor(adapted.up.weight.detach(), mesh, [Shard(0)])
        adapted.up._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        before = {name: whole(p.detach()).clone() for name, p in adapted.named_parameters()}
        with pytest.raises(ValueError, match=r"^up and its adapter are not distributed over one mesh.*in one process"):
            lora_fx.merge(adapted)
        assert all(torch.equal(before[name], whole(p.detach())) for name, p in adapted.named_parameters())


def test_channels_of_each_expert():
    config = LoRAConfig(rank=3, alpha=4.0, target_modules=(), target_parameters=["w1", "w2", "w3"])
    torch.manual_seed(0)
    adapted = Experts(CONFIGS["tiny-moe"])
    for parameter in adapted.parameters():
        nn.init.normal_(parameter, std=0.1)
    shake(lora_fx.install(adapted, config))
    merged = bases(lora_fx.merge(copy.deepcopy(adapted)))
    with simulated(tp=4) as mesh:
        module = shard(copy.deepcopy(adapted), mesh, CHANNELS)
        before = bases(module)
        lora_fx.merge(module)
        for name, weight in bases(module).items():
            torch.testing.assert_close(weight, merged[name], msg=lambda m, n=name: f"{n}: {m}")
        lora_fx.unmerge(module)
        assert all(torch.equal(before[name], weight) for name, weight in bases(module).items())
    assert not torch.equal(merged["w2"], before["w2"])


# ---- real ranks ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Linears that 2 ranks divide unevenly, and a stack of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(bias=True)
        self.experts = Experts(CONFIGS["tiny-moe"])
        self.widen = nn.Linear(16, self.experts.w1.shape[-1])
        self.head = nn.Linear(self.experts.w1.shape[-1], 5)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.1)

    def forward(self, x):
        return self.head(self.experts(self.widen(self.mlp(x)), ENDS))


def net(**config: Any) -> Any:
    torch.manual_seed(0)
    values: dict[str, Any] = {"rank": 3, "alpha": 5.0, **config}
    return shaken(lora_fx.install(Net(), LoRAConfig(**values)))


def sharded(rank: int, folder: Path, dims: dict[str, int], config: dict[str, Any]) -> dict[str, bool | str]:
    """What was merged, unmerged and refused, beside what one process merges."""
    mesh = init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(1))
    single = net(**config)
    expected, merged = single(x), bases(lora_fx.merge(copy.deepcopy(single)))
    model = net(**config)
    if "tp" in dims:
        lora_fx.freeze(parallelize_module(model.mlp, mesh["tp"], plan()))
        lora_fx.freeze(model)
    for part in (model.mlp, model.experts, model):
        fully_shard(part, mesh=mesh["dp"])
    seen: dict[str, bool | str] = {}
    model(x).sum().backward()  # FSDP has made its whole parameters by then, and the root's are still in place
    model.zero_grad()
    held = {name: whole(p.detach()).clone() for name, p in net_shards(model).items()}
    lora_fx.merge(model)
    seen["weights"] = all(torch.allclose(w, merged[name], rtol=1e-5, atol=1e-6) for name, w in bases(model).items())
    seen["outputs"] = torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    seen["nothing trains"] = not model(x).requires_grad
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        plain = Net()
        plain.load_state_dict({name: value for name, value in full.items() if "lora_" not in name})
        seen["exported"] = torch.allclose(plain(x), expected, rtol=1e-4, atol=1e-5)
    lora_fx.unmerge(model)
    seen["exact"] = all(torch.equal(held[name], whole(p.detach())) for name, p in net_shards(model).items())
    model(x).square().sum().backward()
    single(x).square().sum().backward()
    gradients: dict[str, Any] = dict(lora_fx.named_adapter_parameters(single))
    lora_fx.distributed.reduce_gradients(model)
    seen["gradients"] = all(
        p.grad is not None and torch.allclose(whole(p.grad), gradients[name].grad, rtol=1e-3, atol=1e-4)
        for name, p in lora_fx.named_adapter_parameters(model)
    )
    # A number that only one rank holds: the last rows of the head are those of the last ranks of FSDP.
    with torch.no_grad():
        own = model.head.lora_b.to_local()
        if mesh["dp"].get_local_rank() == dims["dp"] - 1:
            own[-1, 0] = float("nan")
    before = {name: p.to_local().clone() for name, p in net_shards(model).items() if "lora_b" not in name}
    try:
        lora_fx.merge(model)
    except (ValueError, RuntimeError) as error:
        seen["refused"] = f"{type(error).__name__}: {error}"
    seen["unchanged"] = all(torch.equal(old, net_shards(model)[name].to_local()) for name, old in before.items())
    seen["unmerged"] = not any(getattr(m, "_lora_merged", None) for m in model.modules())
    return seen


def net_shards(model: nn.Module) -> dict[str, Any]:
    """Its parameters, none of which FSDP shows as a whole one."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    found = dict(model.named_parameters())
    assert all(isinstance(p, DTensor) for p in found.values())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "config"),
    [
        ({"dp": 2}, {"target_parameters": ["w1", "w2", "w3"]}),
        ({"dp": 2}, {"use_dora": True}),
        ({"dp": 2, "tp": 2}, {"use_dora": True}),
        ({"dp": 2, "tp": 2}, {"target_parameters": ["w1", "w2", "w3"]}),
    ],
    ids=["fsdp", "fsdp, dora", "fsdp and tensor parallel, dora", "fsdp and tensor parallel"],
)
def test_sharded(tmp_path, dims, config):
    results = run_ranks(sharded, 2 * dims.get("tp", 1), tmp_path, dims=dims, config=config)
    for rank, seen in enumerate(results):
        flags = {key: value for key, value in seen.items() if isinstance(value, bool)}
        assert all(flags.values()), f"{rank}: {[key for key, value in flags.items() if not value]}"
        last = rank // dims.get("tp", 1) == dims["dp"] - 1
        wanted = "ValueError: head: weight and adapter add up to NaN" if last else "RuntimeError: another rank failed"
        assert seen["refused"].startswith(wanted), seen["refused"]
