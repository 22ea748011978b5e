"""Operators for the branches of experts. Each is functional and runs everywhere as plain ATen.

Legend: M rows sorted by expert, E experts, K in, N out, R rank. ``ends`` is int32 [E], the end of each expert's rows;
rows behind the last end are nobody's and get zeros, or keep what they were added to. ``scale`` is a 0-d tensor or None.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lora_fx.passes.kernels import operators

_library = torch.library.Library("lora_fx", "FRAGMENT")
for _schema in (
    "grouped_scaled_mm(Tensor a, Tensor b, Tensor ends, Tensor? scale=None) -> Tensor",
    "grouped_accumulate(Tensor base, Tensor a, Tensor b, Tensor ends, Tensor? scale=None) -> Tensor",
    "grouped_accumulate_(Tensor(a!) base, Tensor a, Tensor b, Tensor ends, Tensor? scale=None) -> ()",
    "grouped_gradient_pair(Tensor dy, Tensor b, Tensor h, Tensor ends, Tensor? scale=None) -> (Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def _scaled(factor: Tensor, scale: Tensor | None) -> Tensor:
    return factor if scale is None else factor * scale


def _grouped_scaled_mm(a: Tensor, b: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
    """``a_e @ b_e * scale``: a [M, R], b [E, R, N]; gives [M, N]."""
    return torch._grouped_mm(a, _scaled(b, scale), ends)


def _grouped_accumulate(base: Tensor, a: Tensor, b: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
    """``base + a_e @ b_e * scale``: base [M, N], a [M, R], b [E, R, N]."""
    return base + _grouped_scaled_mm(a, b, ends, scale)


def _grouped_accumulate_(base: Tensor, a: Tensor, b: Tensor, ends: Tensor, scale: Tensor | None = None) -> None:
    """``base += a_e @ b_e * scale``."""
    base.add_(_grouped_scaled_mm(a, b, ends, scale))


def _grouped_gradient_pair(
    dy: Tensor, b: Tensor, h: Tensor, ends: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(dy_e @ b_e * scale, dy_e.T @ h_e * scale)``: dy [M, N], b [E, N, R], h [M, R]; gives [M, R] and [E, N, R]."""
    grad_b = torch._grouped_mm(dy.t(), h, ends)
    return torch._grouped_mm(dy, _scaled(b, scale), ends), _scaled(grad_b, scale)


# On the CPU a number is free to read, and so are the ends: expert by expert, with the kernels of single products.


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which."""
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, slice(start, end)
            start = end


def _last(ends: Tensor) -> int:
    return int(ends[-1].item()) if len(ends) else 0


def _grouped_scaled_mm_cpu(a: Tensor, b: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
    if a.dtype == torch.float64:
        out = a.new_empty(a.shape[0], b.shape[2])
        for expert, rows in _groups(ends):
            out[rows] = operators.scaled_mm(a[rows], b[expert], scale)
    else:  # where torch has it: in bfloat16 it takes three quarters of the time (M 1024, N 1408, R 16, E 8)
        a, b = (_scaled(a, scale), b) if a.numel() < b.numel() else (a, _scaled(b, scale))
        out = torch._grouped_mm(a, b, ends).contiguous()  # of an odd width, rows have gaps between them
    out[_last(ends) :] = 0
    return out


def _grouped_accumulate_cpu(base: Tensor, a: Tensor, b: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
    out = base.clone(memory_format=torch.contiguous_format)
    _grouped_accumulate_cpu_(out, a, b, ends, scale)
    return out


def _grouped_accumulate_cpu_(base: Tensor, a: Tensor, b: Tensor, ends: Tensor, scale: Tensor | None = None) -> None:
    for expert, rows in _groups(ends):
        operators.accumulate_(base[rows], a[rows], b[expert], scale)


def _grouped_gradient_pair_cpu(
    dy: Tensor, b: Tensor, h: Tensor, ends: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    grad_h, grad_b = dy.new_empty(dy.shape[0], b.shape[2]), dy.new_zeros(b.shape)
    for expert, rows in _groups(ends):
        grad_h[rows], grad_b[expert] = operators.gradient_pair(dy[rows], b[expert], h[rows], scale)
    grad_h[_last(ends) :] = 0
    return grad_h, grad_b


for _name, _anywhere, _cpu in (
    ("grouped_scaled_mm", _grouped_scaled_mm, _grouped_scaled_mm_cpu),
    ("grouped_accumulate", _grouped_accumulate, _grouped_accumulate_cpu),
    ("grouped_accumulate_", _grouped_accumulate_, _grouped_accumulate_cpu_),
    ("grouped_gradient_pair", _grouped_gradient_pair, _grouped_gradient_pair_cpu),
):
    _library.impl(_name, _anywhere, "CompositeExplicitAutograd")
    _library.impl(_name, _cpu, "CPU")


def _check(a: Tensor, b: Tensor, ends: Tensor) -> None:
    torch._check(a.dim() == 2 and b.dim() == 3 and a.shape[1] == b.shape[1], lambda: f"{a.shape} @ {b.shape}")
    torch._check(a.dtype == b.dtype, lambda: f"{a.dtype} @ {b.dtype}")
    torch._check(ends.dim() == 1 and ends.shape[0] == b.shape[0], lambda: f"{ends.shape} ends for {b.shape}")


@torch.library.register_fake("lora_fx::grouped_scaled_mm", lib=_library)
def _grouped_scaled_mm_fake(a: Tensor, b: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
    _check(a, b, ends)
    return a.new_empty(a.shape[0], b.shape[2])


@torch.library.register_fake("lora_fx::grouped_accumulate", lib=_library)
def _grouped_accumulate_fake(base: Tensor, a: Tensor, b: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
    _check(a, b, ends)
    torch._check(base.dtype == a.dtype, lambda: f"{base.dtype} + {a.dtype} @ {b.dtype}")
    return base.new_empty(base.shape)


@torch.library.register_fake("lora_fx::grouped_accumulate_", lib=_library)
def _grouped_accumulate_fake_(base: Tensor, a: Tensor, b: Tensor, ends: Tensor, scale: Tensor | None = None) -> None:
    _check(a, b, ends)


@torch.library.register_fake("lora_fx::grouped_gradient_pair", lib=_library)
def _grouped_gradient_pair_fake(
    dy: Tensor, b: Tensor, h: Tensor, ends: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check(dy, b, ends)
    return dy.new_empty(dy.shape[0], b.shape[2]), dy.new_empty(b.shape)


grouped_scaled_mm = torch.ops.lora_fx.grouped_scaled_mm.default
grouped_accumulate = torch.ops.lora_fx.grouped_accumulate.default
grouped_accumulate_ = torch.ops.lora_fx.grouped_accumulate_.default
grouped_gradient_pair = torch.ops.lora_fx.grouped_gradient_pair.default
