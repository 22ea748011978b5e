"""Several ranks in one process: a fake process group, which sends nothing, or `LocalTensorMode`, which computes.

A fake group gives the graphs of a rank, collectives included. In `LocalTensorMode` every tensor holds a value for each
rank, and collectives between them are done on the spot.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed._local_tensor import LocalTensor, LocalTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import lora_fx


@contextlib.contextmanager
def fake_world(size: int) -> Iterator[None]:
    """This process as rank 0 of `size`; collectives return at once, with whatever their output held."""
    torch.distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def simulated(**dims: int) -> Iterator[DeviceMesh]:
    """All ranks of a mesh with these dimensions at once."""
    size = 1
    for length in dims.values():
        size *= length
    with fake_world(size), LocalTensorMode(size):
        yield init_device_mesh("cpu", tuple(dims.values()), mesh_dim_names=tuple(dims))


def whole(tensor: Tensor) -> Tensor:
    """The global value of a tensor, which must be the same on all ranks."""
    value: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    value = value.wait() if hasattr(value, "wait") else value
    return value.reconcile() if isinstance(value, LocalTensor) else value


def copy_adapters(source: nn.Module, target: nn.Module) -> None:
    """Give the adapters of `target`, which may be distributed, the values of those of `source`, which are not."""
    with torch.no_grad():
        for (name, ours), (_, theirs) in zip(
            lora_fx.named_adapter_parameters(target), lora_fx.named_adapter_parameters(source), strict=True
        ):
            full = theirs.detach()
            if isinstance(ours, DTensor):
                full = distribute_tensor(full, ours.device_mesh, ours.placements)
            assert ours.shape == full.shape, name
            ours.copy_(full)


@contextlib.contextmanager
def collectives() -> Iterator[dict[str, int]]:
    """Counts collectives by name, DTensor's and those called directly."""
    counts: dict[str, int] = {}
    with CommDebugMode() as mode:
        yield counts
    for operator, count in mode.get_comm_counts().items():
        name = str(operator).split(".")[-1].strip("')>").rstrip("_")
        counts[name] = counts.get(name, 0) + count
