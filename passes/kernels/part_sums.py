"""The sums of the parts in which tile programs leave their outputs, several in one launch.

A program that sums over rows or columns leaves ``[P, E...]`` float32 parts. What they come to is read by the next
program, or it is a gradient that only the optimizer reads: all of those are one launch at the end of a graph. Parts are
added in a fixed order, eight at a time, so two runs are equal to the bit.
"""

from __future__ import annotations

import functools
import linecache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fx.passes.kernels.tile_launch import are_known, compiler

_BLOCK = 1024
_AT_ONCE = 8


def source(scaled: tuple[bool, ...]) -> str:
    """The kernel for as many outputs as ``scaled`` has entries; those that are true are multiplied by a number.

    Each program of the launch sums one block of one output: the outputs lie one behind the other.
    """
    names, body = [], ["pid = tl.program_id(0)", "first = 0"]
    for i, has_scale in enumerate(scaled):
        names += [f"out{i}", f"parts{i}", *([f"scale{i}"] if has_scale else []), f"P{i}", f"E{i}"]
        loads = [
            f"v{k} = tl.load(parts{i} + (p + {k}) * size + e, mask=there & (p + {k} + none < P{i}), other=0.0)"
            for k in range(_AT_ONCE)
        ]
        value = f"total * tl.load(scale{i})" if has_scale else "total"
        body += [
            f"last = first + (E{i} + {_BLOCK - 1}) // {_BLOCK}",
            "if (pid >= first) & (pid < last):",
            f"    e = (pid - first) * {_BLOCK} + tl.arange(0, {_BLOCK})",
            f"    there = e < E{i}",
            f"    total = tl.zeros(({_BLOCK},), tl.float32)",
            f"    size = tl.full((), E{i}, tl.int64)",
            "    none = 0 * e",  # makes a tensor of a condition that is a number in the interpreter
            f"    for p in range(0, P{i}, {_AT_ONCE}):",
            *(f"        {line}" for line in loads),
            "        total += ((v0 + v1) + (v2 + v3)) + ((v4 + v5) + (v6 + v7))",
            f"    tl.store(out{i} + e, {value}, mask=there)",
            "first = last",
        ]
    lines = ["@triton.jit", f"def {_name(scaled)}({', '.join(names)}):", *(f"    {line}" for line in body)]
    return "\n".join(lines) + "\n"


def _name(scaled: tuple[bool, ...]) -> str:
    return f"lora_fx_sum_{len(scaled)}_of_parts"


@functools.lru_cache(maxsize=256)
def kernel(scaled: tuple[bool, ...]) -> Any:
    """The kernel of :func:`source`."""
    text = source(scaled)
    file = f"<lora_fx sums {''.join('01'[s] for s in scaled)}>"
    # Triton reads a kernel's source through linecache.
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    space: dict[str, Any] = {"triton": triton, "tl": tl}
    exec(compile(text, file, "exec"), space)
    return space[_name(scaled)]


def arguments(outputs: list[Tensor], parts: list[Tensor], scales: list[Tensor | None]) -> list[Any]:
    """What :func:`kernel` takes."""
    found: list[Any] = []
    for out, part, scale in zip(outputs, parts, scales, strict=True):
        found += [out, part, *([] if scale is None else [scale]), part.shape[0], out.numel()]
    return found


def prepare(parts: list[Tensor], scales: list[Tensor | None], dtype: torch.dtype) -> None:
    """Begin to compile the kernel for parts like these, which may be fake."""
    if are_known(parts):
        outputs = [part.new_empty(part.shape[1:], dtype=dtype) for part in parts]
        scaled = tuple(s is not None for s in scales)
        make = functools.partial(kernel, scaled)
        compiler().start(_key(parts, scaled, dtype), make, arguments(outputs, parts, scales), parts[0].device)


def _key(parts: list[Tensor], scaled: tuple[bool, ...], dtype: torch.dtype) -> Any:
    """What Triton compiles anew for: types, and numbers that are 1 or multiples of 16."""
    numbers = [(part.shape[0], part.shape[1:].numel()) for part in parts]
    return (scaled, dtype, *((count == 1, count % 16 == 0, size == 1, size % 16 == 0) for count, size in numbers))


def run(parts: list[Tensor], scales: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """``parts[i].sum(0) * scales[i]`` in ``dtype``, for parts [P, E...]; zeros where there are none, for no tokens."""
    scaled = tuple(s is not None for s in scales)
    compiler().wait(_key(parts, scaled, dtype))
    outputs = [part.new_empty(part.shape[1:], dtype=dtype) for part in parts]
    blocks = sum(-(-out.numel() // _BLOCK) for out in outputs)
    if blocks:
        whole = [part.contiguous() for part in parts]
        kernel(scaled)[(blocks,)](*arguments(outputs, whole, scales))
    return outputs
