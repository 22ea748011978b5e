"""`examples/train_3d.py` on eight ranks, compiled and rewritten, against a loop over a plain model in one process."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import adapter_checkpoint
import lora_fx
import options_3d
import train_3d
from corpus import library_sources
from llama3 import CONFIGS, Llama
from lora_fx.placements import local
from parallel import Degrees, initialise, layers_of_stage
from tests.distributed.processes import run_ranks
from tests.toy_models import shake
from trainer import random_windows

pytestmark = [pytest.mark.distributed]
STEPS = 5
SMALL = ["--model", "tiny", "--layers", "4", "--batch", "8", "--length", "32", "--rank", "4"]
SGD = [*SMALL, "--steps", str(STEPS), "--optimizer", "sgd", "--lr", "0.2", "--save-every", str(STEPS)]
ADAPTERS_OF_A_LAYER = 7


def training(rank: int, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """One rank of a run."""
    return dataclasses.asdict(train_3d.run(options_3d.parse(arguments)))


def plain(settings: options_3d.Settings) -> nn.Module:
    """The model of a run, whole and in this process, with adapters away from zero."""
    layers = settings.layers or CONFIGS[settings.model].n_layers
    config = dataclasses.replace(CONFIGS[settings.model], max_seq_len=settings.length, n_layers=layers)
    model = lora_fx.install(Llama(config), settings.lora)
    initialise(model, settings.seed)
    return shake(model, std=0.05)


def alone(settings: options_3d.Settings, model: nn.Module) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the run's steps on `model`, written as anyone would."""
    windows = random_windows(
        library_sources().train_tokens(), settings.steps, settings.batch, settings.length, settings.seed
    )
    parameters = lora_fx.adapter_parameters(model)
    optimizer = torch.optim.SGD(parameters, lr=settings.lr)
    losses, norms = [], []
    for batch in windows:
        optimizer.zero_grad()
        loss = train_3d.next_token_loss(model(batch[:, :-1]), batch[:, 1:])
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(parameters, settings.clip).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def adapters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a plain model."""
    numbers = {name: b for name, b in model.named_buffers() if name.endswith(".lora_scale")}
    return {**dict(lora_fx.named_adapter_parameters(model)), **numbers}


def against_one(
    arguments: list[str], folder: Path, timeout: float, backend: str, *more: str
) -> tuple[list[dict[str, Any]], list[float], list[float], nn.Module]:
    """Run on as many ranks as the arguments ask for (with `more` of them), and in one process, on the CPU.

    What was found on each rank; losses, norms and the model of the one process.
    """
    arguments = [*SGD, "--checkpoints", str(folder / "checkpoints"), *arguments]
    settings = options_3d.parse(arguments)
    model = plain(settings)
    adapter_checkpoint.save(folder / "checkpoints", 0, adapters_of(model))  # where the ranks start from
    losses, norms = alone(settings, model)
    found = run_ranks(
        training,
        settings.degrees.world,
        folder / "ranks",
        timeout=timeout,
        backend=backend,
        arguments=[*arguments, *more],
    )
    return found, losses, norms, model


def check(
    arguments: list[str], folder: Path, timeout: float, *, backend: str = "gloo", looser: float = 1.0
) -> list[dict[str, Any]]:
    """Run on as many ranks as the arguments ask for, and compare with one process, on the CPU."""
    found, losses, norms, model = against_one(arguments, folder, timeout, backend)
    for seen in found:
        torch.testing.assert_close(seen["losses"], losses, rtol=0, atol=1e-5 * looser)
        torch.testing.assert_close(seen["norms"], norms, rtol=1e-4 * looser, atol=0)
    whole: dict[str, torch.Tensor] = {}
    for file in (folder / "checkpoints" / f"step-{STEPS:06d}").glob("*.safetensors"):
        whole |= load_file(file)
    expected = adapters_of(model)
    assert whole.keys() == expected.keys()
    assert max((whole[name] - expected[name]).abs().max().item() for name in expected) < 1e-6 * looser
    print(f"losses {losses}; seconds to build {found[0]['built']:.1f}, of the steps {found[0]['seconds']}")
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--pp", "2", "--dp", "2", "--tp", "2", "--schedule", "1f1b", "--layers", "2"],
        ["--pp", "2", "--dp", "2", "--cp", "2", "--schedule", "gpipe", "--layers", "2"],
    ],
    ids=["pp-dp-tp", "pp-dp-cp"],
)
def test_eight_ranks_compiled_and_rewritten(arguments, tmp_path):
    for seen in check([*arguments, "--compile", "block"], tmp_path, timeout=1500):
        assert seen["sites"] == [[ADAPTERS_OF_A_LAYER] * 2] * 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_several_stages_of_a_rank_compiled_and_rewritten(tmp_path):
    arguments = ["--pp", "2", "--tp", "2", "--schedule", "interleaved", "--layers", "4", "--compile", "block"]
    for seen in check(arguments, tmp_path, timeout=1500):
        assert seen["sites"] == [[2 * ADAPTERS_OF_A_LAYER] * 2] * 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_without_adapters(tmp_path):
    check(["--pp", "2", "--exclude", "layers.0", "layers.1"], tmp_path, timeout=300)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "degrees",
    [
        ["--dp", "4", "--ep", "2"],  # two at a time hold the experts of a mixture between them
        # Two hold the experts, two the channels of each; tokens are sent by all-to-all.
        ["--dp", "2", "--ep", "2", "--tp", "2", "--exchange"],
        ["--dp", "2", "--tp", "2"],  # all hold all experts
    ],
    ids=["ep", "ep-tp", "tp"],
)
def test_adapted_experts_on_several_ranks(degrees, tmp_path):
    check(["--model", "tiny-moe", "--layers", "1", "--adapt-experts", *degrees], tmp_path, timeout=600)


def check_in_bfloat16(arguments: list[str], folder: Path, timeout: float, *, backend: str = "gloo") -> None:
    """Of experts on ranks, compiled, with grouped products: losses about those of one process in float32."""
    arguments = ["--model", "tiny-moe", "--layers", "2", "--adapt-experts", "--compile", "block", *arguments]
    found, losses, norms, _ = against_one(arguments, folder, timeout, backend, "--dtype", "bfloat16")
    for seen in found:
        torch.testing.assert_close(seen["losses"], losses, rtol=0.01, atol=0)
        torch.testing.assert_close(seen["norms"], norms, rtol=0.1, atol=0)
        assert all(rewritten == branches == 2 * 10 for rewritten, branches in seen["sites"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_experts_in_bfloat16(tmp_path):
    check_in_bfloat16(["--dp", "2", "--ep", "2"], tmp_path, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("degrees", [["--pp", "2", "--dp", "2"], ["--tp", "2"]], ids=["pp-dp", "tp"])
def test_stages_compiled_in_one(degrees, tmp_path):
    """Stages of a pipeline, where graphs break when FSDP gathers; and a whole tensor-parallel model."""
    found = check([*degrees, "--compile", "stage", "--layers", str(len(degrees) // 2)], tmp_path, timeout=600)
    for seen in found:
        assert seen["sites"] == [[ADAPTERS_OF_A_LAYER] * 2] * len(found)


# ---- small things, in one process ------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_parts_of_a_batch_add_up(tmp_path):
    """Without a pipeline too: one backward pass after another, and the step of the whole batch."""
    check(["--microbatches", "4", "--layers", "1"], tmp_path, timeout=240)


def test_the_frozen_job_trains_nothing(tmp_path):
    """It goes forward and backward, and the model is what it was."""
    arguments = [*SMALL, "--layers", "1", "--steps", "2", "--form", "frozen", "--tp", "2", "--seed", "3"]
    for seen in run_ranks(frozen_job, 2, tmp_path, timeout=240, arguments=arguments):
        assert seen == {"trained": 0, "same": True, "backward": True, "losses": 2}


def frozen_job(rank: int, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """One rank of it."""
    settings = options_3d.parse(arguments)
    trainer = train_3d.Trainer(settings, settings.degrees.mesh(torch.device("cpu")), torch.device("cpu"))
    (model,) = trainer.models
    before = {name: local(p).clone() for name, p in model.named_parameters()}
    flowed: list[bool] = []
    model.layers["0"].register_full_backward_hook(lambda *_: flowed.append(True))
    windows = random_windows(library_sources().train_tokens(), 2, settings.batch, settings.length, settings.seed)
    losses = [trainer.step(step, windows[step])[0] for step in range(2)]
    same = all(torch.equal(local(p), before[name]) for name, p in model.named_parameters())
    return {"trained": len(trainer.adapters), "same": same, "backward": len(flowed) == 2, "losses": len(losses)}


def test_garbage_is_collected_between_steps():
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected.append(info["generation"])

    gc.callbacks.append(note)
    try:
        with pytest.raises(KeyError), train_3d.collecting_between_steps(every=3) as collect:
            assert collected == [2] and not gc.isenabled()
            for step in range(7):
                cycles: list[Any] = [[] for _ in range(2000)]
                for cycle in cycles:
                    cycle.append(cycle)
                collect(step)
            assert collected == [2, 1, 1]
            raise KeyError
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()


def test_stages_hold_every_layer_once():
    for layers in (4, 6, 7, 32):
        for stages in range(1, 5):
            held = [layer for stage in range(stages) for layer in layers_of_stage(layers, stage, stages)]
            assert held == list(range(layers))
    with pytest.raises(ValueError, match="2 layers cannot be cut into 4 pipeline stages"):
        layers_of_stage(2, 0, 4)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--tp", "0"], "--tp 0 is not positive"),
        (["--dp", "3"], "--batch 8 is not 3 equal parts"),
        (["--schedule", "zbv"], "--schedule zbv is wrong in torch when FSDP shards a stage: take 1f1b"),
        (["--schedule", "interleaved"], "--schedule interleaved needs --pp 2 or more"),
        (["--length", "30", "--cp", "2"], "--length 30 cannot be cut into 4 equal pieces"),
        (["--dp", "4", "--ep", "3"], "--ep 3 must divide --dp 4"),
        (["--save-every", "2"], "--save-every needs --checkpoints"),
        (["--microbatches", "3"], "--batch 8 is not 1 equal parts of 3 equal microbatches"),
        (["--form", "frozen", "--save-every", "2", "--checkpoints", "x"], "--form frozen trains nothing"),
        (["--async-tp", "--tp", "2"], "--async-tp is about compiled tensor parallelism"),
        (["--async-tp", "--compile", "block"], "--async-tp is about compiled tensor parallelism"),
    ],
)
def test_wrong_options_are_told(arguments, text, capsys):
    with pytest.raises(SystemExit):
        options_3d.parse(arguments)
    assert text in capsys.readouterr().err


def test_degrees_and_summary():
    assert Degrees(pp=2, dp=3, tp=4).world == 24
    settings = options_3d.parse(["--pp", "2", "--compile", "block", "--batch", "4", "--length", "10"])
    outcome = train_3d.Outcome([3.0, 2.0, 1.5], [], [(7, 7), (6, 7)], [9.0, 0.5, 0.5], 2.0)
    assert train_3d.summary(settings, outcome).splitlines() == [
        "pp 2, 1f1b, compile block",
        "loss 3.0000 -> 1.5000 in 3 steps",
        "2.0 s to build, 9.0 s for the first step, then 80 tokens/s",
        "rank 0: 7 of 7 branches of its blocks rewritten",
        "rank 1: 6 of 7 branches of its blocks rewritten",
    ]
