"""Launches that Inductor makes: they are those of the operators, and what they compute is right.

The second half runs Inductor's code with all of its kernels in Triton's interpreter, in a process of its own, for the
reasons that `tests/passes/test_tile_kernels.py` gives.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("triton.backends.nvidia", reason="needs Triton's compiler for NVIDIA's GPUs")

import lora_fx
from benchmarks.cases import SUITE
from benchmarks.forms import Block as LlamaBlock
from lora_fx.passes import _torch
from lora_fx.passes.kernels import inlined, operators, part_sums, tile_launch, tile_triton
from tests.passes import fake_gpu, harness, modules
from tests.passes.fake_gpu import Called, Recorded

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def block(name: str, *, dynamic: bool = False, lowered: bool = True) -> Recorded:
    """A block of the suite, as Inductor launches it; or not `lowered`, so that it calls operators."""
    case = SUITE[name][0]
    with pytest.MonkeyPatch.context() as patch, fake_gpu.recorded() as (found, backend):
        if not lowered:
            for each in ("tile", "sum_parts"):
                patch.setattr(inlined, each, lambda *arguments: NotImplemented)
        model = LlamaBlock(case)
        lora_fx.install(model, lora_fx.LoRAConfig(rank=case.rank, alpha=2 * case.rank, dropout=case.dropout))
        x = torch.empty(case.shape, dtype=torch.bfloat16, requires_grad=not case.no_grad)
        with torch.set_grad_enabled(not case.no_grad):
            fake_gpu.train(model, backend, x, dynamic=dynamic)
    return found


def launched(arguments: tuple[Any, ...]) -> tuple[str, dict[str, Any], tuple[int, ...], str]:
    """What an operator launches: the kernel's name, its arguments, its grid, its source."""
    if isinstance(arguments[1], str):
        outputs, program, inputs = arguments
        found = tile_launch.launch(program, [(t.shape, t.stride()) for t in inputs])
        tensors = [*(tile_launch.laid_out(t, strides) for t, strides in zip(inputs, found.strides)), *outputs]
        function = tile_triton.kernel(program)
        given = {**dict(zip(found.tensors, tensors, strict=True)), **found.numbers}
        return function.__name__, given, (*found.grid, 1, 1)[:3], function.src
    parts, scales, dtype, stacked = (*arguments, False)[:4]
    sums = part_sums.launch([part.shape for part in parts], tuple(s is not None for s in scales), stacked)
    outputs = [parts[0].new_empty(size, dtype=dtype) for size in sums.outputs]
    function = part_sums.kernel(sums.scaled, sums.ranks)
    return function.__name__, sums.arguments(outputs, parts, scales), (sums.blocks, 1, 1), function.src


def described(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments, with what a kernel sees of a tensor, and which of them share memory."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    shared = [
        (a, b)
        for a in tensors
        for b in tensors
        if a < b and tensors[a].untyped_storage()._cdata == tensors[b].untyped_storage()._cdata
    ]
    seen = {
        name: (tuple(t.stride()) if "parts" in name else t.numel(), t.dtype, t.storage_offset()) for name, t in tensors.items()
    }
    return {**arguments, **seen, "shared": shared}


def check_attributes(call: Called) -> None:
    """Inductor tells Triton that an argument is a multiple of 16 where it is one, and of numbers, wherever they are."""
    names = list(call.meta["signature"])
    (marked,) = call.meta["configs"]
    told = {names[place] for (place,) in marked}
    for name, value in call.arguments.items():
        if isinstance(value, Tensor):
            assert name not in told or value.storage_offset() * value.element_size() % 16 == 0, (call.name, name)
        elif value != 1:
            assert (name in told) == (value % 16 == 0), (call.name, name, value)


def check_same(ours: list[Called], theirs: list[tuple[Any, ...]]) -> None:
    assert len(ours) == len(theirs) > 0
    wanted = [launched(arguments) for arguments in theirs]
    for call in ours:
        check_attributes(call)
        given = {**call.arguments, **{k: v for k, v in call.meta["constants"].items() if k not in call.arguments}}
        found = next(
            (
                i
                for i, (name, arguments, grid, _) in enumerate(wanted)
                if (name, grid, described(arguments)) == (call.name, call.grid, described(given))
            ),
            None,
        )
        assert found is not None, (call.name, described(given), [w for w in wanted if w[0] == call.name])
        *_, source = wanted.pop(found)
        assert source in call.source.replace("\\n", "\n")


if not INTERPRETED:

    @pytest.mark.parametrize(
        "name",
        [
            "m512",
            *(pytest.param(n, marks=pytest.mark.slow) for n in ("m8192", "dropout", "r64", "fp8", "checkpoint", "prefill")),
            "decode-64",
        ],
    )
    def test_launches_are_those_of_the_operators(name: str) -> None:
        ours, theirs = block(name), block(name, lowered=False)
        assert not ours.operators and not theirs.ours
        check_same(ours.ours, theirs.operators)
