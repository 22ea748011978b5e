"""The operators that passes put into graphs. Each is functional and runs everywhere as plain ATen.

Defined on a ``torch.library.Library``: a Python ``custom_op`` costs 11 to 17 microseconds a call, this 3.
Legend: M tokens, K in, N out, R rank. ``scale`` is a 0-d tensor or None for 1.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lora_fx.passes._torch import (
    lower_as_donated,
    lower_with,
    put_into,
    read_from_memory,
    side_by_side_in_memory,
)
from lora_fx.passes.kernels import beside, dropout, native, tile_program, wide

_library = torch.library.Library("lora_fx", "DEF")
for _schema in (
    "scaled_mm(Tensor a, Tensor b, Tensor? scale=None, Tensor? bias=None) -> Tensor",
    "accumulate(Tensor base, Tensor a, Tensor b, Tensor? scale=None) -> Tensor",
    "accumulate_(Tensor(a!) base, Tensor a, Tensor b, Tensor? scale=None, float beta=1.0, float alpha=1.0) -> ()",
    "gradient_pair(Tensor dy, Tensor b, Tensor h, Tensor? scale=None) -> (Tensor, Tensor)",
    "float_mm(Tensor a, Tensor b) -> Tensor",
    "keep(Tensor seed, SymInt[] size, float p) -> Tensor",
    "tile_(Tensor(a!)[] outputs, str program, Tensor[] inputs) -> ()",
    "sum_parts(Tensor[] parts, Tensor?[] scales, ScalarType dtype, bool stacked=False) -> Tensor[]",
    "sum_parts_beside_(Tensor(a!) room, Tensor[] parts, Tensor?[] scales, int[] starts) -> Tensor",
    "sum_expert_parts(Tensor parts, Tensor ends, int rows, Tensor? scale, ScalarType dtype) -> Tensor",
    "donated(Tensor saved, SymInt[] size) -> Tensor",
    "stacked_mm(Tensor x, Tensor[] rows) -> Tensor",
    "joined_mm(Tensor both, Tensor[] rows) -> Tensor",
    "side_by_side(Tensor[] parts, int[] starts, int columns) -> Tensor",
    "put_(Tensor(a!) target, Tensor[] parts, int[] starts) -> ()",
    "wide_mm(Tensor xh, Tensor weight, Tensor b, Tensor? scale, str side) -> Tensor",
):
    _tags = [torch.Tag.pt2_compliant_tag]
    if _schema.startswith(("tile_", "sum_")):
        # As for any operator that Inductor is not told how to lower: what it has laid out in another way than the graph
        # says is copied, and a copy that is written is copied back, for whoever reads it afterwards.
        _tags.append(torch.Tag.needs_exact_strides)
    _library.define(_schema, tags=_tags)


def _scaled_mm(a: Tensor, b: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """``a @ b * scale + bias``: a [M, R], b [R, N], bias [N]."""
    product = a @ b
    if scale is not None:
        product = product * scale
    return product if bias is None else product + bias


def _accumulate(base: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
    """``base + a @ b * scale``: base [M, N], a [M, R], b [R, N]."""
    return torch.addmm(base, a, b) if scale is None else base + (a @ b) * scale


def beta_for(dtype: torch.dtype) -> float:
    """What a large product on a GPU should multiply the matrix by that it is added to, which holds that much less.

    cuBLAS rounds a product before it adds it where it multiplies by 1 (13.0, on an H100): the sum then errs by 2.35e-3
    of its size in bfloat16, as if another kernel had added it, and else by 1.66e-3. A product by itself took 1% less to
    9% more of its time (again and again into one matrix, which then grows), a block's prefill as long as before. It
    rounds in float16 as well, but there a half of a small gradient may have lost a bit for good.
    """
    return 2.0 if dtype == torch.bfloat16 else 1.0


def _accumulate_(
    base: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> None:
    """``base = base * beta + a @ b * scale * alpha``, rounded once."""
    # The scale goes to the smaller operand: nothing of the size of base is made.
    if scale is not None:
        a, b = (a * scale, b) if a.numel() < b.numel() else (a, b * scale)
    base.addmm_(a, b, beta=beta, alpha=alpha)


def _gradient_pair(dy: Tensor, b: Tensor, h: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(dy @ b * scale, dy.T @ h * scale)``: dy [M, N], b [N, R], h [M, R]; gives [M, R] and [N, R]."""
    return _scaled_mm(dy, b, scale), _scaled_mm(dy.t(), h, scale)


def _float_mm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, of factors in 16 bits: what is scaled afterwards is rounded once.

    Plain torch.compile scales dy before its products with B and h, in the kernel that computes dy, of which the branch
    then sees no rounding. With g and dB rounded before they are scaled, dA and dB of values erred by 1.12 and 1.07
    times as much (two blocks of 512, rank 100, an H200).
    """
    return a.float() @ b.float()


def _float_mm_cuda(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


# On the CPU reading a number is free, and as alpha it multiplies before the result is rounded. Thin products, which is
# what passes make, have kernels; whatever those do not take is ATen's.


def _scaled_mm_cpu(a: Tensor, b: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    alpha = 1.0 if scale is None else scale.item()
    if bias is not None:
        return torch.addmm(bias, a, b, alpha=alpha)
    found = native.scaled_mm(a, b, alpha)
    if found is not None:
        return found
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)


def _accumulate_cpu(base: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
    out = base.clone(memory_format=torch.contiguous_format)
    _accumulate_cpu_(out, a, b, scale)
    return out


def _accumulate_cpu_(
    base: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> None:
    alpha = alpha if scale is None else alpha * scale.item()
    if not (beta == 1.0 and native.accumulate(base, a, b, alpha)):
        base.addmm_(a, b, beta=beta, alpha=alpha)


def _gradient_pair_cpu(dy: Tensor, b: Tensor, h: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    found = native.gradient_pair(dy, b, h, 1.0 if scale is None else scale.item())
    if found is not None:
        return found
    grad_h = _scaled_mm_cpu(dy, b, scale)
    if dy.dtype == torch.float32:
        # h.T @ dy takes half the time of dy.T @ h in fp32 (not in bf16), and the copy is small.
        return grad_h, _scaled_mm_cpu(h.t(), dy, scale).t().contiguous()
    return grad_h, _scaled_mm_cpu(dy.t(), h, scale)


def _tile_(outputs: list[Tensor], program: str, inputs: list[Tensor]) -> None:
    """Run a tile program (:mod:`lora_fx.passes.kernels.tile_program`) as ATen.

    An output [M, N] may be an input's memory: every element is read before it is written.
    """
    for each, given, written in tile_program.split(program, inputs, outputs):
        for output, value in zip(written, tile_program.evaluate(each, given)):
            output.copy_(value.view_as(output))


def _tile_cuda_(outputs: list[Tensor], program: str, inputs: list[Tensor]) -> None:
    """Run a tile program as a kernel; needs Triton, which is imported with its first use."""
    from lora_fx.passes.kernels.tile_launch import run

    run(program, inputs, outputs)


def _sum_parts(
    parts: list[Tensor], scales: list[Tensor | None], dtype: torch.dtype, stacked: bool = False
) -> list[Tensor]:
    """``parts[i].sum(0) * scales[i]`` in ``dtype``: parts [P, E...] in float32, scales 0-d or None for 1.

    ``stacked``: for parts [P, M, R], the sums side by side as the one matrix of the result.
    """
    totals = [part.sum(0) for part in parts]
    sums = [(t if s is None else t * s).to(dtype) for t, s in zip(totals, scales, strict=True)]
    return [torch.cat(sums, dim=1)] if stacked else sums


def _sum_parts_cuda(
    parts: list[Tensor], scales: list[Tensor | None], dtype: torch.dtype, stacked: bool = False
) -> list[Tensor]:
    """The same in one launch."""
    from lora_fx.passes.kernels.part_sums import run

    return run(parts, scales, dtype, stacked)


def _sum_parts_beside_(room: Tensor, parts: list[Tensor], scales: list[Tensor | None], starts: list[int]) -> Tensor:
    """``sum_parts`` side by side, which is the result, also in columns of ``room`` [M, N] from ``starts`` on."""
    (stack,) = _sum_parts(parts, scales, room.dtype, True)
    beside.put_(room, list(stack.split([part.shape[2] for part in parts], 1)), starts)
    return stack


def _sum_parts_beside_cuda_(
    room: Tensor, parts: list[Tensor], scales: list[Tensor | None], starts: list[int]
) -> Tensor:
    """The same in one launch."""
    from lora_fx.passes.kernels.part_sums import run

    (stack,) = run(parts, scales, room.dtype, True, room, starts)
    return stack


def _sum_expert_parts(parts: Tensor, ends: Tensor, rows: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sums of each expert's parts, times scale, in ``dtype``: parts [P, a, b] in float32 gives [E, a, b].

    A part is of a tile of ``rows`` rows, which are those of one expert (:mod:`lora_fx.passes.kernels.tile_experts`);
    ``ends``, int32 [E], is where each expert's rows end.
    """
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    last = ((ends - starts + rows - 1) // rows).cumsum(0)
    expert = torch.searchsorted(last, torch.arange(len(parts), device=ends.device), right=True)
    total = parts.new_zeros((len(ends) + 1, *parts.shape[1:])).index_add_(0, expert, parts)[:-1]
    return (total if scale is None else total * scale).to(dtype)


def _sum_expert_parts_cuda(parts: Tensor, ends: Tensor, rows: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same as a kernel."""
    from lora_fx.passes.kernels.tile_experts import run

    return run(parts, ends, rows, scale, dtype)


@functools.cache
def teach_inductor() -> None:
    """Tell Inductor about these operators, once: importing it takes seconds, and it is there where graphs are lowered.

    Their operands are in memory. It finds that out by itself at the first call of each, which is too late for what was
    lowered before: a norm that three of them read was written three times.
    """
    lower_as_donated(donated)
    lower_with(tile_, _lower_tile)
    lower_with(sum_parts, _lower_sum_parts)
    lower_with(sum_parts_beside_, _lower_sum_parts_beside)
    lower_with(sum_expert_parts, _lower_sum_expert_parts)
    lower_with(side_by_side, side_by_side_in_memory)
    lower_with(put_, put_into)
    products = [stacked_mm, joined_mm, wide_mm, accumulate_, scaled_mm, gradient_pair, float_mm]
    read_from_memory([*products, tile_, sum_parts, sum_parts_beside_, sum_expert_parts])


def _lower_tile(*operands: Any, **named: Any) -> Any:
    """On a GPU, Inductor's own launch."""
    from lora_fx.passes.kernels.inlined import tile

    return tile(*operands, **named)


def _lower_sum_parts(*operands: Any, **named: Any) -> Any:
    """Likewise."""
    from lora_fx.passes.kernels.inlined import sum_parts

    return sum_parts(*operands, **named)


def _lower_sum_parts_beside(*operands: Any, **named: Any) -> Any:
    """Likewise."""
    from lora_fx.passes.kernels.inlined import sum_parts_beside

    return sum_parts_beside(*operands, **named)


def _lower_sum_expert_parts(*operands: Any, **named: Any) -> Any:
    """Likewise."""
    from lora_fx.passes.kernels.inlined import sum_expert_parts

    return sum_expert_parts(*operands, **named)


def _donated(saved: Tensor, size: list[int | torch.SymInt]) -> Tensor:
    """Memory for a matrix that may be that of ``saved``, which backward reads for the last time where this is written.

    Inductor knows whether it may (:func:`lora_fx.passes._torch.lower_as_donated`); anywhere else it is fresh.
    """
    return saved.new_empty(size)


_library.impl("stacked_mm", beside.stacked_mm, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fx::stacked_mm", beside.stacked_mm_fake, lib=_library)
_library.impl("joined_mm", beside.joined_mm, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fx::joined_mm", beside.joined_mm_fake, lib=_library)
_library.impl("side_by_side", beside.side_by_side, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fx::side_by_side", beside.side_by_side_fake, lib=_library)
_library.impl("put_", beside.put_, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fx::put_", lambda target, parts, starts: None, lib=_library)
_library.impl("wide_mm", wide.wide_mm, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fx::wide_mm", wide.wide_mm_fake, lib=_library)
_library.impl("keep", dropout.keep_eager, "CompositeExplicitAutograd")
_library.impl("tile_", _tile_, "CPU")
_library.impl("tile_", _tile_cuda_, "CUDA")
_library.impl("sum_parts", _sum_parts, "CPU")
_library.impl("sum_parts", _sum_parts_cuda, "CUDA")
_library.impl("sum_parts_beside_", _sum_parts_beside_, "CPU")
_library.impl("sum_parts_beside_", _sum_parts_beside_cuda_, "CUDA")
_library.impl("sum_expert_parts", _sum_expert_parts, "CPU")
_library.impl("sum_expert_parts", _sum_expert_parts_cuda, "CUDA")
_library.impl("donated", _donated, "CompositeExplicitAutograd")
_library.impl("float_mm", _float_mm, "CompositeExplicitAutograd")
_library.impl("float_mm", _float_mm_cuda, "CUDA")


@torch.library.register_fake("lora_fx::sum_parts", lib=_library)
def _sum_parts_fake(
    parts: list[Tensor], scales: list[Tensor | None], dtype: torch.dtype, stacked: bool = False
) -> list[Tensor]:
    torch._check(len(parts) == len(scales), lambda: f"{len(parts)} sums and {len(scales)} scales")
    if stacked:
        return [parts[0].new_empty((parts[0].shape[1], sum(part.shape[2] for part in parts)), dtype=dtype)]
    return [part.new_empty(part.shape[1:], dtype=dtype) for part in parts]


@torch.library.register_fake("lora_fx::sum_parts_beside_", lib=_library)
def _sum_parts_beside_fake_(
    room: Tensor, parts: list[Tensor], scales: list[Tensor | None], starts: list[int]
) -> Tensor:
    torch._check(len(parts) == len(scales) == len(starts), lambda: f"{len(parts)} sums in {len(starts)} places")
    return parts[0].new_empty((parts[0].shape[1], sum(part.shape[2] for part in parts)), dtype=room.dtype)


@torch.library.register_fake("lora_fx::sum_expert_parts", lib=_library)
def _sum_expert_parts_fake(parts: Tensor, ends: Tensor, rows: int, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return parts.new_empty((ends.shape[0], *parts.shape[1:]), dtype=dtype)


@torch.library.register_fake("lora_fx::tile_", lib=_library)
def _tile_fake_(outputs: list[Tensor], program: str, inputs: list[Tensor]) -> None:
    plans = [plan for (plan,) in tile_program.split(program)]
    counts = sum(len(plan.inputs) for plan in plans), sum(len(plan.outputs) for plan in plans)
    torch._check((len(inputs), len(outputs)) == counts, lambda: "operands are missing")


@torch.library.register_fake("lora_fx::keep", lib=_library)
def _keep_fake(seed: Tensor, size: list[int | torch.SymInt], p: float) -> Tensor:
    torch._check(seed.dim() == 0 and seed.dtype == torch.int64, lambda: f"no seed: {seed.dtype} {seed.shape}")
    return seed.new_empty(size, dtype=torch.bool)


for _name, _anywhere, _cpu in (
    ("scaled_mm", _scaled_mm, _scaled_mm_cpu),
    ("accumulate", _accumulate, _accumulate_cpu),
    ("accumulate_", _accumulate_, _accumulate_cpu_),
    ("gradient_pair", _gradient_pair, _gradient_pair_cpu),
):
    _library.impl(_name, _anywhere, "CompositeExplicitAutograd")
    _library.impl(_name, _cpu, "CPU")


def _check_product(a: Tensor, b: Tensor) -> None:
    torch._check(a.dim() == 2 and b.dim() == 2 and a.shape[1] == b.shape[0], lambda: f"{a.shape} @ {b.shape}")
    torch._check(a.dtype == b.dtype, lambda: f"{a.dtype} @ {b.dtype}")


@torch.library.register_fake("lora_fx::scaled_mm", lib=_library)
def _scaled_mm_fake(a: Tensor, b: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    _check_product(a, b)
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.register_fake("lora_fx::float_mm", lib=_library)
def _float_mm_fake(a: Tensor, b: Tensor) -> Tensor:
    _check_product(a, b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


@torch.library.register_fake("lora_fx::accumulate", lib=_library)
def _accumulate_fake(base: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
    _check_product(a, b)
    torch._check(base.dtype == a.dtype, lambda: f"{base.dtype} + {a.dtype} @ {b.dtype}")
    return base.new_empty(base.shape)


@torch.library.register_fake("lora_fx::accumulate_", lib=_library)
def _accumulate_fake_(
    base: Tensor, a: Tensor, b: Tensor, scale: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> None:
    _check_product(a, b)


@torch.library.register_fake("lora_fx::gradient_pair", lib=_library)
def _gradient_pair_fake(dy: Tensor, b: Tensor, h: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_product(dy, b)
    _check_product(dy.t(), h)
    return dy.new_empty(dy.shape[0], b.shape[1]), dy.new_empty(dy.shape[1], h.shape[1])


scaled_mm = torch.ops.lora_fx.scaled_mm.default
accumulate = torch.ops.lora_fx.accumulate.default
accumulate_ = torch.ops.lora_fx.accumulate_.default
gradient_pair = torch.ops.lora_fx.gradient_pair.default
float_mm = torch.ops.lora_fx.float_mm.default
keep = torch.ops.lora_fx.keep.default
tile_ = torch.ops.lora_fx.tile_.default
sum_parts = torch.ops.lora_fx.sum_parts.default
sum_parts_beside_ = torch.ops.lora_fx.sum_parts_beside_.default
sum_expert_parts = torch.ops.lora_fx.sum_expert_parts.default
donated = torch.ops.lora_fx.donated.default
stacked_mm = torch.ops.lora_fx.stacked_mm.default
joined_mm = torch.ops.lora_fx.joined_mm.default
side_by_side = torch.ops.lora_fx.side_by_side.default
put_ = torch.ops.lora_fx.put_.default
wide_mm = torch.ops.lora_fx.wide_mm.default
