"""Checkpoints of adapters alone, which any mesh can write and any other mesh, or a single process, can read.

    checkpoints/step-000020/stage-0.safetensors    whole tensors by global name, one file for each pipeline stage
    checkpoints/step-000020/training.json          step, stages, and what the caller adds

A folder gets its name when everything in it is on disk, so whoever looks for the newest checkpoint finds a whole one or
none, whenever a writer was killed. Adapters are small enough to be gathered: that is what makes files independent of
the mesh. Tensors are safetensors, the rest is JSON; nothing is pickled.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_fx.files import flush
from lora_fx.placements import fill, gathered

PREFIX = "step-"
TRAINING = "training.json"


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    *,
    stage: int = 0,
    writes: bool = True,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """Write the tensors of this rank's stage; all ranks call it together.

    Args:
        folder: of all checkpoints, shared by the ranks.
        step: steps done.
        tensors: by global name; DTensors are gathered over their meshes.
        stage: which pipeline rank this is.
        writes: whether this rank is the one of its stage that writes.
        extra: goes into the JSON file; rank 0's counts.
        keep: how many checkpoints stay.

    Returns:
        The folder of the checkpoint.
    """
    final = folder / f"{PREFIX}{step:06d}"
    partial = folder / f".{final.name}.partial"
    first = rank() == 0
    if first:
        for left in folder.glob(f".{PREFIX}*"):  # by runs that were killed while they wrote
            shutil.rmtree(left)
        partial.mkdir(parents=True)
    barrier()
    whole = {name: gathered(tensor.detach()).cpu() for name, tensor in tensors.items()}
    if writes:
        path = partial / f"stage-{stage}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in whole.items()}, path, {"format": "pt"})
        flush(path)
    barrier()
    if first:
        training = partial / TRAINING
        training.write_text(json.dumps({"step": step, **(extra or {})}, indent=1))
        flush(training)
        flush(partial)
        if final.exists():
            _discard(final)
        partial.rename(final)
        flush(folder)
        for old in found(folder)[:-keep]:
            _discard(old)
    barrier()
    return final


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint. It loses its name first: what a kill leaves of it is no checkpoint."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden)


def load(checkpoint: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fill `tensors`, plain or distributed, from a checkpoint, whatever mesh wrote it; returns the JSON file.

    Raises:
        ValueError: the checkpoint lacks one of the names, or has it in another shape. Nothing is filled then.
    """
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(path, "pt", device="cpu"))
            for path in sorted(checkpoint.glob("*.safetensors"))
        ]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # not a mapping
        for name, tensor in tensors.items():
            if name not in where:
                raise ValueError(f"{checkpoint} has no {name}: it was written for other adapters")
            shape = where[name].get_slice(name).get_shape()
            if shape != list(tensor.shape):
                raise ValueError(
                    f"{name} is {list(tensor.shape)} here and {shape} in {checkpoint}: is the rank another?"
                )
        for name, tensor in tensors.items():
            with torch.no_grad():
                fill(tensor, where[name].get_tensor(name).to(tensor.device))
    training: dict[str, Any] = json.loads((checkpoint / TRAINING).read_text())
    return training


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint in `folder`, if there is one."""
    return next(reversed(found(folder)), None)


def found(folder: Path) -> list[Path]:
    """All whole checkpoints in `folder`, oldest first."""
    return sorted(folder.glob(f"{PREFIX}*"), key=lambda path: int(path.name.removeprefix(PREFIX)))


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def barrier() -> None:
    """Wait for all ranks, if there are others."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
