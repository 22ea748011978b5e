"""Ranks over NCCL, with a GPU each: one mesh dimension with two GPUs, three with eight; torch's `context_parallel`.

Ranks that share a GPU are not tested: NCCL refuses them, and gloo reads GPU memory as if it were the CPU's.
"""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental._context_parallel import _attention as ring
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

import lora_fx
from llama3 import CONFIGS, Llama
from lora_fx import LoRAConfig
from lora_fx.distributed import DeferredReduction
from lora_fx.placements import local
from parallel import tensor_parallel_plan
from ring_attention import attention_over, sequences_over
from tests.distributed.processes import ROOT, run_ranks
from tests.distributed.test_train_3d import ADAPTERS_OF_A_LAYER, check, check_in_bfloat16
from tests.toy_models import shake
from train_3d import next_token_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.distributed,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZE = CONFIGS["tiny"]
GPUS = torch.cuda.device_count()
# A GPU adds in another order than the CPU that it is compared with.
LOOSER = 10.0
# The ring's operators for float32 align what they return to 32 positions.
LONG = ["--length", "128"]


MIXTURE = ["--model", "tiny-moe", "--ep", "2", "--adapt-experts"]
DIMENSIONS = {
    "data": ["--dp", "2"],
    "tensor": ["--tp", "2"],
    "context": ["--cp", "2"],
    "pipeline": ["--pp", "2"],
    "interleaved": ["--pp", "2", "--schedule", "interleaved", "--layers", "4"],
    "whole experts": ["--tp", "2", "--model", "tiny-moe", "--adapt-experts"],
    "experts": ["--dp", "2", *MIXTURE],
    "experts, exchanged": ["--dp", "2", *MIXTURE, "--exchange"],
}


def test_one_rank_over_nccl(tmp_path):
    (seen,) = check([*LONG, "--compile", "block"], tmp_path, 600, backend="nccl", looser=LOOSER)
    assert seen["sites"] == [[4 * ADAPTERS_OF_A_LAYER] * 2]


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("compiled", ["none", "block"])
@pytest.mark.parametrize("arguments", DIMENSIONS.values(), ids=DIMENSIONS)
def test_two_ranks_over_nccl(arguments, compiled, tmp_path):
    arguments = ["--layers", "2", *arguments, *LONG, "--compile", compiled]
    for seen in check(arguments, tmp_path, 600, backend="nccl", looser=LOOSER):
        assert len(seen["sites"]) == (2 if compiled == "block" else 0)
        assert all(rewritten == branches > 0 for rewritten, branches in seen["sites"])


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
def test_experts_in_bfloat16_over_nccl(tmp_path):
    """Grouped products, which leave anything in the rows of nobody on a GPU."""
    check_in_bfloat16(["--dp", "2", "--ep", "2", *LONG], tmp_path, 600, backend="nccl")


@pytest.mark.skipif(GPUS < 8, reason="needs eight CUDA devices")
@pytest.mark.parametrize("name", ["tp", "cp"])
def test_three_dimensions_over_nccl(name, tmp_path):
    arguments = ["--pp", "2", "--dp", "2", f"--{name}", "2", *LONG, "--compile", "block"]
    check(arguments, tmp_path, 600, backend="nccl", looser=LOOSER)


def meshes_of_one(rank: int, folder: Path, device: str) -> dict[str, dict[str, float]]:
    """Everything at once on meshes of one rank: errors of the loss and of the worst gradient against float64."""
    mesh = init_device_mesh(device, (1, 1, 1), mesh_dim_names=("dp", "cp", "tp"))
    place = torch.device(device)
    tokens = torch.randint(SIZE.vocab_size, (4, 129), generator=torch.Generator().manual_seed(0)).to(place)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for compiled in (False, True):
            torch.manual_seed(0)
            model: Any = Llama(SIZE, dtype)
            model.init_weights()
            shake(lora_fx.install(model, LoRAConfig(rank=8)), std=0.05).to(place)
            exact = copy.deepcopy(model).double()
            loss = next_token_loss(exact(tokens[:, :-1]), tokens[:, 1:])
            loss.backward()

            parallelize_module(model, mesh["tp"], tensor_parallel_plan(model))
            lora_fx.freeze(model)
            for layer in model.layers.values():
                layer.attention.attend = attention_over(mesh["cp"], place)
                if compiled:
                    lora_fx.compile(layer, strict=True)
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
            optimizer = torch.optim.SGD(lora_fx.adapter_parameters(model), lr=0.1)
            reduction = DeferredReduction(model, optimizer)
            with (
                loss_parallel(),
                mock.patch.object(ring, "_templated_ring_attention", wraps=ring._templated_ring_attention) as went,
                sequences_over(mesh["cp"], place, [model.rope]) as part,
            ):
                inputs, targets = (part(t.clone()) for t in (tokens[:, :-1], tokens[:, 1:]))
                ours = next_token_loss(model(inputs), targets)
                ours.backward()
            reduction.reduce()
            errors = []
            pairs = zip(lora_fx.adapter_parameters(model), lora_fx.adapter_parameters(exact), strict=True)
            for p, q in pairs:
                assert isinstance(p.grad, DTensor) and q.grad is not None
                errors.append(float((p.grad.full_tensor().double() - q.grad).norm() / q.grad.norm()))
            found[f"{str(dtype).removeprefix('torch.')} {'compiled' if compiled else 'eager'}"] = {
                "loss": abs(float(local(ours.detach()).double() - loss)),
                "gradient": max(errors),
                "rings": went.call_count,
            }
            assert model.rope.shape[0] == SIZE.max_seq_len  # and not what was cut out of it
            torch._dynamo.reset()
    return found


def test_meshes_of_one(tmp_path):
    (found,) = run_ranks(meshes_of_one, 1, tmp_path, timeout=600, backend="nccl", device="cuda")
    for name, seen in found.items():
        loss, gradient = (1e-5, 1e-4) if name.startswith("float32") else (0.05, 0.1)
        assert seen["loss"] < loss and seen["gradient"] < gradient, found
        assert seen["rings"] >= SIZE.n_layers, found  # in compiled code, once where it is traced


def test_the_command_line(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(min(GPUS, 2))]
    arguments = ["--model", "tiny", "--dp", str(min(GPUS, 2)), "--steps", "3", "--dtype", "bfloat16"]
    arguments += ["--length", "256", "--compile", "block", "--checkpoints", str(tmp_path), "--save-every", "2"]
    done = subprocess.run(
        [*command, "examples/train_3d.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "loss " in done.stdout and "14 of 14 branches of its blocks rewritten" in done.stdout
