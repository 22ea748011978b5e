"""Checkpoints of adapters: whole or not there, readable on any mesh, and enough to go on as if nothing had happened."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import json
import os
import signal
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
from lora_fx import LoRAConfig
from tests.distributed.processes import RankFailed, run_ranks
from tests.distributed.test_train_3d import SMALL, adapters_of, plain, training
from tests.toy_models import Toy, shake

pytestmark = [pytest.mark.distributed]


def toy(rank: int = 2) -> nn.Module:
    return shake(lora_fx.install(Toy(), LoRAConfig(rank=rank)))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(lora_fx.named_adapter_parameters(model))


def test_a_checkpoint_restores_and_holds_tensors_and_json_alone(tmp_path):
    model = toy()
    folder = adapter_checkpoint.save(tmp_path, 7, tensors(model), extra={"note": "x"})
    assert folder == adapter_checkpoint.newest(tmp_path) == tmp_path / "step-000007"
    assert sorted(path.name for path in folder.iterdir()) == ["stage-0.safetensors", "training.json"]
    assert json.loads((folder / "training.json").read_text()) == {"step": 7, "note": "x"}
    assert load_file(folder / "stage-0.safetensors").keys() == tensors(model).keys()
    other = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)), seed=5)
    assert adapter_checkpoint.load(folder, tensors(other))["step"] == 7
    assert all(torch.equal(p, q) for p, q in zip(tensors(model).values(), tensors(other).values(), strict=True))


def test_what_does_not_fit_is_refused_and_nothing_is_filled(tmp_path):
    folder = adapter_checkpoint.save(tmp_path, 1, tensors(toy()))
    other = toy(rank=3)
    before = {name: p.clone() for name, p in tensors(other).items()}
    with pytest.raises(ValueError, match=r"lora_a is \[3, 16\] here and \[2, 16\] in .*: is the rank another\?"):
        adapter_checkpoint.load(folder, tensors(other))
    # The first names are there, the last one is not.
    more = {**tensors(shake(toy(), seed=9)), "layers.9.w1.lora_a": torch.zeros(2, 16)}
    first = next(iter(more.values())).clone()
    with pytest.raises(ValueError, match=r"has no layers\.9\.w1\.lora_a: it was written for other adapters"):
        adapter_checkpoint.load(folder, more)
    assert torch.equal(next(iter(more.values())), first)
    assert all(torch.equal(p, before[name]) for name, p in tensors(other).items())


def test_old_ones_go_and_a_step_can_be_written_again(tmp_path):
    for step in (1, 2, 3, 3):
        adapter_checkpoint.save(tmp_path, step, {"x": torch.full((2,), float(step))}, keep=2)
    assert [path.name for path in adapter_checkpoint.found(tmp_path)] == ["step-000002", "step-000003"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000002", "step-000003"]


def test_a_half_written_checkpoint_is_never_seen(tmp_path, monkeypatch):
    adapter_checkpoint.save(tmp_path, 1, {"x": torch.ones(2)})
    for name in ("save_file", "flush"):

        def broken(*arguments: Any) -> None:
            raise OSError("the disk is full")

        monkeypatch.setattr(adapter_checkpoint, name, broken)
        with pytest.raises(OSError, match="full"):
            adapter_checkpoint.save(tmp_path, 2, {"x": torch.zeros(2)})
        monkeypatch.undo()
        newest = adapter_checkpoint.newest(tmp_path)
        assert newest is not None and newest.name == "step-000001"
    # What is left of it is in nobody's way.
    assert adapter_checkpoint.newest(adapter_checkpoint.save(tmp_path, 2, {"x": torch.zeros(2)}).parent) is not None
    assert [path.name for path in adapter_checkpoint.found(tmp_path)] == ["step-000001", "step-000002"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("step", [2, 3])
def test_what_is_replaced_or_old_disappears_at_once(step, tmp_path, monkeypatch):
    """A kill while it is deleted leaves whole checkpoints alone: here it is deleted in part, and then not."""
    for earlier in (1, 2):
        adapter_checkpoint.save(tmp_path, earlier, {"x": torch.full((2,), float(earlier))})

    def in_part(path: Path) -> None:
        (path / "stage-0.safetensors").unlink()
        raise OSError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(adapter_checkpoint.shutil, "rmtree", in_part)
        with pytest.raises(OSError, match="killed"):
            adapter_checkpoint.save(tmp_path, step, {"x": torch.full((2,), float(step))})
    for path in adapter_checkpoint.found(tmp_path):
        found = torch.zeros(2)
        assert adapter_checkpoint.load(path, {"x": found})["step"] == found[0]
    adapter_checkpoint.save(tmp_path, step, {"x": torch.full((2,), float(step))})
    assert not list(tmp_path.glob(".*"))


def test_steps_are_numbers(tmp_path):
    for step in (999_999, 1_000_000):
        newest = adapter_checkpoint.save(tmp_path, step, {"x": torch.ones(1)})
    assert adapter_checkpoint.newest(tmp_path) == newest


# ---- killed and started again ----------------------------------------------------------------------------------------


def killed(rank: int, folder: Path, arguments: list[str], where: str, at: int) -> dict[str, Any]:
    """A run in which rank 1 is killed: in step `at`, or while checkpoint `at` is written."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Doomed(train_3d.Trainer):
        def step(self, step, windows):
            if (where, at, rank) == ("step", step, 1):
                die()
            return super().step(step, windows)

        def save(self, step):
            if (where, at, rank) == ("save", step, 1):
                adapter_checkpoint.flush = lambda path: die()
            super().save(step)

    train_3d.Trainer = Doomed  # type: ignore[misc]  # in this process, which is about to end
    return training(rank, folder, arguments)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_runs_go_on_as_if_nothing_had_happened(tmp_path):
    """Every start is on another mesh: tensor parallel, then a pipeline, then data parallel."""
    common = [*SMALL, "--steps", "8", "--save-every", "2", "--lr", "1e-3", "--dropout", "0.0"]
    unbroken = [*common, "--checkpoints", str(tmp_path / "unbroken")]
    (expected,) = run_ranks(training, 1, tmp_path / "a", timeout=300, arguments=unbroken)
    assert len(expected["losses"]) == 8

    folder = tmp_path / "checkpoints"
    common += ["--checkpoints", str(folder)]
    with pytest.raises(RankFailed, match="rank 1, exit status -9"):
        run_ranks(killed, 2, tmp_path / "b", timeout=300, arguments=[*common, "--tp", "2"], where="step", at=3)
    assert [path.name for path in adapter_checkpoint.found(folder)] == ["step-000002"]
    with pytest.raises(RankFailed, match="rank 1, exit status -9"):
        run_ranks(killed, 2, tmp_path / "c", timeout=300, arguments=[*common, "--pp", "2"], where="save", at=6)
    # The sixth was being written, and is not there; what was written of it stays out of sight.
    assert [path.name for path in adapter_checkpoint.found(folder)] == ["step-000002", "step-000004"]
    assert [path.name for path in folder.glob(".*")] == [".step-000006.partial"]
    for seen in run_ranks(training, 2, tmp_path / "d", timeout=300, arguments=[*common, "--dp", "2"]):
        torch.testing.assert_close(seen["losses"], expected["losses"][4:], rtol=0, atol=1e-4)
    assert not list(folder.glob(".*"))

    # One process reads what data-parallel ranks wrote, and finds what one process would have.
    models = [plain(options_3d.parse(common)) for _ in range(2)]
    start = adapters_of(models[0])["output.lora_b"].clone()
    for model, where in zip(models, (folder, tmp_path / "unbroken")):
        assert adapter_checkpoint.load(where / "step-000008", adapters_of(model))["step"] == 8
    ours, theirs = (lora_fx.adapter_parameters(model) for model in models)
    assert max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)) < 1e-4
    assert (adapters_of(models[0])["output.lora_b"] - start).abs().max() > 1e-2
