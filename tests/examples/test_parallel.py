"""Llama-3-8B on the meshes of `examples/train_3d.py`: which rank holds what, and what its blocks become."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import dataclasses

import pytest
import torch

import lora_fx
from llama3 import CONFIGS, Llama
from lora_fx import LoRAConfig
from lora_fx.distributed import adapter_placements
from lora_fx.placements import is_dtensor, local
from parallel import Degrees, lay_out_stage
from tests.distributed.simulated import fake_world

pytestmark = [pytest.mark.distributed]
SIZE = CONFIGS["8B"]
RANK = 16
LORA = LoRAConfig(rank=RANK, alpha=32.0)
CPU = torch.device("cpu")
WIDTHS = {
    **{f"attention.{name}": (SIZE.dim, SIZE.kv_heads * SIZE.head_dim) for name in ("wk", "wv")},
    **{f"attention.{name}": (SIZE.dim, SIZE.dim) for name in ("wq", "wo")},
    **{f"feed_forward.{name}": (SIZE.dim, SIZE.ffn_dim) for name in ("w1", "w3")},
    "feed_forward.w2": (SIZE.ffn_dim, SIZE.dim),
}
"""K and N of each linear of a layer."""
A_LAYER = sum(RANK * sum(sizes) for sizes in WIDTHS.values())
HEAD = RANK * (SIZE.dim + SIZE.vocab_size)
MESHES = {
    "pp-dp-tp": Degrees(pp=2, dp=2, tp=2),
    "pp-dp-cp": Degrees(pp=2, dp=2, cp=2),
    "tp": Degrees(tp=8),
    "fsdp": Degrees(dp=8),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    """What Dynamo has seen of the same code in other tests, with other sizes, would make sizes symbols here."""
    torch._dynamo.reset()


def stages_of(degrees: Degrees) -> list[Llama]:
    """Every stage, as rank 0 of its ranks holds it."""
    mesh = degrees.mesh(CPU)
    return [
        lay_out_stage(SIZE, LORA, mesh, stage, degrees.pp, device=CPU, dtype=torch.bfloat16)
        for stage in range(degrees.pp)
    ]


@pytest.mark.parametrize("degrees", MESHES.values(), ids=MESHES)
def test_who_holds_what(degrees):
    with fake_world(degrees.world):
        stages = stages_of(degrees)
        with torch.device("meta"):
            whole = lora_fx.install(Llama(SIZE, torch.bfloat16), LORA)
        assert [n for stage in stages for n in stage.state_dict()] == list(whole.state_dict())
        for number, stage in enumerate(stages):
            adapters = lora_fx.adapter_parameters(stage)
            layers = SIZE.n_layers // degrees.pp
            assert len(stage.layers) == layers
            last = number == degrees.pp - 1
            assert len(adapters) == 2 * (layers * len(WIDTHS) + last)
            assert sum(p.numel() for p in adapters) == layers * A_LAYER + last * HEAD
            assert {id(p) for p in stage.parameters() if p.requires_grad} == {id(p) for p in adapters}
            held = 0
            for path, module in stage.named_modules():
                if not isinstance(module, lora_fx.LoRAModule):
                    continue
                factors = [module.lora_a, module.lora_b]
                weight = list(module.weight.placements)
                if "dp_cp" in module.weight.device_mesh.mesh_dim_names:  # FSDP shards rows of what is frozen
                    assert weight.pop(0).dim == 0, path
                assert [is_dtensor(factor) for factor in factors] == [degrees.tp > 1] * 2, path
                if degrees.tp > 1:
                    wanted = adapter_placements(weight)
                    a, b = (factor.placements for factor in factors)
                    assert (a, b) == (wanted["lora_a"], wanted["lora_b"]), path
                held += sum(local(factor).numel() for factor in factors)
            expected = layers * sum(map(held_of, WIDTHS, [degrees] * len(WIDTHS))) + last * held_of("output", degrees)
            assert held == expected


def held_of(name: str, degrees: Degrees) -> int:
    """How many numbers of a linear's adapter a rank holds: tensor parallelism shards one of the factors."""
    k, n = WIDTHS.get(name, (SIZE.dim, SIZE.vocab_size))
    row_wise = name in ("attention.wo", "feed_forward.w2")
    whole, sharded = (n, k) if row_wise else (k, n)
    return RANK * (whole + sharded // degrees.tp)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [*MESHES.values(), Degrees()], ids=[*MESHES, "alone"])
def test_every_branch_of_a_block_is_rewritten(degrees):
    """A block of the real sizes, whose values nobody sets: the fake process group would not send them."""
    with fake_world(degrees.world):
        size = dataclasses.replace(SIZE, n_layers=degrees.pp, vocab_size=256)
        model = lay_out_stage(size, LORA, degrees.mesh(CPU), 0, degrees.pp, device=CPU, dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        x = torch.zeros(1, 16 // degrees.tp, SIZE.dim, dtype=torch.bfloat16)
        report = lora_fx.explain(model.layers["0"], x.requires_grad_(), model.rope)
    assert report.problems() == []
    assert report.rewritten == len(report.sites) == len(WIDTHS)
    halves = {(site.path, *site.forward, *site.backward) for site in report.sites}
    assert all({"scale", "pair"} <= {*names} for _, *names in halves)
    shapes = {site.path: (site.in_features, site.out_features) for site in report.sites}
    assert shapes == {
        name: (k // degrees.tp, n) if name in ("attention.wo", "feed_forward.w2") else (k, n // degrees.tp)
        for name, (k, n) in WIDTHS.items()
    }
