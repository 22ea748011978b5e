"""Inductor's code for a GPU, down to machine code, on a machine without one; and running it without one.

What Inductor and Triton ask of a GPU is answered as by an H100. The graphs are those of CPU tensors whose fake values
say "cuda" while Inductor compiles them. The code that it writes is real, as are the kernels in it; what calls them is
run on the CPU, or on tensors without memory.
"""

import contextlib
import functools
import inspect
import linecache
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import compile_fx, config
from torch.fx import GraphModule

from lora_fx.passes import pipeline
from lora_fx.passes.kernels import operators
from tests.anew import compiled_anew
from tests.passes import on_gpu

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    total_memory=80 << 30,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


class Driver:
    """What Triton asks of a GPU's driver. It loads nothing."""

    def __init__(self, capability: int = 90) -> None:
        self.utils, self.capability = self, capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": H100.shared_memory_per_block_optin}

    def load_binary(self, name: str, *found: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *arguments: None


@dataclass
class Called:
    """A launch of a kernel, as Inductor's code makes it."""

    name: str
    source: str
    arguments: dict[str, Any]
    """By the kernel's names for them."""
    grid: tuple[int, ...]
    meta: dict[str, Any]
    """What Inductor tells Triton of the arguments."""


@dataclass
class Recorded:
    """What was compiled while it was recorded."""

    codes: list[str] = field(default_factory=list)
    calls: list[Called] = field(default_factory=list)
    operators: list[tuple[Any, ...]] = field(default_factory=list)
    """Calls of an operator, in place of a launch: its arguments."""

    @property
    def ours(self) -> list[Called]:
        return [call for call in self.calls if call.name.startswith("lora_fx")]


class Kernel:
    """A kernel of Inductor's code."""

    def __init__(self, recorded: Recorded, source: str, interpret: bool) -> None:
        self.recorded, self.source, self.interpret = recorded, source, interpret
        heads: list[tuple[str, Any, dict[str, Any]]] = []

        class Heuristics:
            def __getattr__(self, kind: str) -> Any:
                def decorator(*sizes: Any, **found: Any) -> Any:
                    heads.append((kind, sizes, found))
                    return lambda function: function

                return decorator

        import triton.language as tl

        space: dict[str, Any] = {"stub": Heuristics(), "__name__": __name__, "__file__": "inductor.py"}
        text = source.replace("@triton_heuristics.", "@stub.")
        if interpret:
            text = text.replace("libdevice.", "_libdevice.")  # which the interpreter does not have
            space["_libdevice"] = SimpleNamespace(
                rsqrt=lambda x: tl.rsqrt(x), pow=lambda x, y: tl.exp(tl.log(x) * y), exp=lambda x: tl.exp(x)
            )
        name = re.findall(r"^def (\w+)\(", text, re.MULTILINE)[0]
        with pytest.MonkeyPatch.context() as patch:
            # Triton reads a kernel's source where it was defined.
            file = f"<inductor {hash(text)}>"
            patch.setattr(inspect, "getsourcefile", lambda what: file)
            linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
            exec(compile(text, file, "exec"), space)
        self.function = space[name]
        ((self.kind, self.sizes, self.head),) = heads

    def run(self, *arguments: Any, stream: Any) -> None:
        meta = self.head["triton_meta"]
        # A number that is 1 is a constant, and given all the same.
        given = [
            name
            for name, kind in meta["signature"].items()
            if kind != "constexpr" or _is_one(meta["constants"].get(name))
        ]
        if self.kind == "template":
            *arguments, x, y, z = arguments  # type: ignore[assignment]
            grid = (x, y, z)
        else:
            grid = (1, 1, 1)
        named = dict(zip(given, arguments, strict=True))
        self.recorded.calls.append(Called(self.function.__name__, self.source, named, grid, meta))
        if self.interpret:
            blocks = {name for name in self.function.arg_names if name.endswith("BLOCK")}
            self.launch(named, grid, blocks)

    def launch(self, named: dict[str, Any], grid: tuple[int, ...], blocks: set[str]) -> None:
        constants = {name: value for name, value in self.head["triton_meta"]["constants"].items() if name not in named}
        if self.kind == "foreach":
            sizes = self.head["inductor_meta"]["combo_grid_meta"]
            grid = sum(-(-sizes[name] // 1024) for name in sizes if name.startswith("xnumel")), 1, 1
        elif self.kind != "template":
            assert self.kind in ("pointwise", "reduction", "persistent_reduction"), self.kind
            outer = 1024 if self.kind == "pointwise" else 16  # each program costs the interpreter the same
            constants |= {name: outer if name == "XBLOCK" else 64 for name in blocks}
            grid = math.prod(-(-named[f"{x}numel"] // constants[f"{x.upper()}BLOCK"]) for x in "x"), 1, 1
        self.function[grid](**named, **constants)


class Async:
    """Stands in for what compiles the kernels of a graph."""

    def __init__(self, recorded: Recorded, interpret: bool) -> None:
        self.recorded, self.interpret = recorded, interpret

    def triton(self, name: str, source: str, device_str: str) -> Kernel:
        return Kernel(self.recorded, source, self.interpret)

    def wait(self, scope: dict[str, Any]) -> None:
        """They are ready."""


@contextlib.contextmanager
def recorded(device: str = "meta", *, interpret: bool = False) -> Iterator[tuple[Recorded, Callable[..., Any]]]:
    """Gives what is recorded, and a Dynamo backend that compiles for a GPU and runs the code on ``device``."""
    found = Recorded()
    with pytest.MonkeyPatch.context() as patch, compiled_anew(), config.patch(compile_threads=1):
        _pretend(patch)
        torch.utils._triton.has_triton.cache_clear()  # it asks what was just replaced
        if interpret:
            _compile_our_functions(patch)
        patch.setattr(torch._inductor.graph.GraphLowering, "save_output_code", staticmethod(found.codes.append))

        def inner(graph: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
            values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
            with pytest.MonkeyPatch.context() as now, on_gpu.devices(graph.graph, "cuda"):
                now.setattr(torch.cuda, "is_available", lambda: True)
                with torch._inductor.virtualized.V.set_fake_mode(torch._guards.detect_fake_mode(values)):
                    compile_fx.compile_fx_inner(graph, values, **kwargs)
            return _runner(found, found.codes[-1], device, interpret)

        def backend(graph: GraphModule, inputs: Sequence[Tensor]) -> Any:
            stages = {name: stage(strict=True) for name, stage in pipeline.HOOKS.items()}
            # Where forward and backward are apart, they are on a GPU already.
            options: dict[str, Any] = {
                name: stage if name.startswith("post_grad") else on_gpu.OnGpu(stage) for name, stage in stages.items()
            }
            compiler: Any = compile_fx.compile_fx
            return compiler(graph, inputs, inner_compile=inner, config_patches=options)

        try:
            yield found, backend
        finally:
            patch.undo()
            torch.utils._triton.has_triton.cache_clear()


def _runner(found: Recorded, code: str, device: str, interpret: bool) -> Callable[..., Any]:
    """Inductor's code as a function of the list of its arguments, on another device."""
    text = code.replace("device(type='cuda', index=0)", f"device('{device}')")
    text = text.replace("torch._C._dynamo.guards._empty_strided_cuda", "_empty")
    text = re.sub(r"^from torch._C import _cuda_getCurrentRawStream as get_raw_stream$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^async_compile = AsyncCompile\(\)$", "", text, flags=re.MULTILINE)
    text = text.replace("torch.cuda._DeviceGuard(0)", "_guard").replace("torch.cuda.set_device(0)", "pass")
    text = text.replace("torch.ops.higher_order.run_and_save_rng_state(", "_saving(")
    text = text.replace("torch.ops.higher_order.run_with_rng_state(", "_restoring(")
    text = text.replace("torch.ops.lora_fx.tile_.default(", "_tile(")
    text = text.replace("torch.ops.lora_fx.sum_parts.default(", "_sums(")
    text = text.replace("torch.ops.lora_fx.joined_mm.default(", "_joined(")

    def called(operator: Any) -> Any:
        def call(*arguments: Any) -> Any:
            found.operators.append(arguments)
            return None if device == "meta" and operator is operators.tile_ else operator(*arguments)

        return call

    space: dict[str, Any] = {
        "__name__": "inductors_code",
        "async_compile": Async(found, interpret),
        "get_raw_stream": lambda index: 0,
        "_empty": lambda size, stride, dtype: _filled(torch.empty_strided(size, stride, dtype=dtype, device=device)),
        "_saving": lambda operator, *operands, **named: (
            torch.zeros(16, dtype=torch.uint8),
            operator(*operands, **named),
        ),
        "_restoring": lambda state, operator, *operands, **named: operator(*operands, **named),
        "_guard": contextlib.nullcontext(),
        "_tile": called(operators.tile_),
        "_sums": called(operators.sum_parts),
        # oneDNN multiplies what lies behind the end of a row by zero, and it is not a number here.
        "_joined": lambda both, rows: operators.joined_mm(both.contiguous(), rows),
    }
    exec(compile(text, "<inductor>", "exec"), space)

    def run(arguments: list[Any]) -> Any:
        given = [_without_memory(a, device) if device == "meta" else a for a in arguments]
        arguments.clear()
        outputs = space["call"](given)
        if device == "meta":
            return [_without_memory(output, "cpu") for output in outputs]
        return outputs

    run._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd's convention
    return run


def _filled(tensor: Tensor) -> Tensor:
    """Memory that nobody wrote holds what is seen in every sum."""
    return tensor if tensor.device.type == "meta" or not tensor.dtype.is_floating_point else tensor.fill_(float("nan"))


def _without_memory(value: Any, device: str) -> Any:
    """A tensor that is laid out in the same way, and at the same place in its memory."""
    if not isinstance(value, Tensor):
        return value
    last = value.storage_offset() + sum((size - 1) * step for size, step in zip(value.shape, value.stride()))
    memory = torch.empty(max(last + 1, 0), dtype=value.dtype, device=device)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset())


def _compile_our_functions(patch: pytest.MonkeyPatch) -> None:
    """Inductor is given what it compiles, where Triton would make functions that are interpreted."""
    from triton.runtime.jit import JITFunction

    from lora_fx.passes.kernels import define, part_sums, tile_triton

    def jit(function: Any = None, **options: Any) -> Any:
        return JITFunction(function, **options) if function else functools.partial(jit, **options)

    patch.setattr(define, "triton", SimpleNamespace(jit=jit))
    patch.setattr(tile_triton, "kernel", functools.cache(tile_triton.kernel.__wrapped__))
    patch.setattr(part_sums, "kernel", functools.cache(part_sums.kernel.__wrapped__))


def _pretend(patch: pytest.MonkeyPatch) -> None:
    """Have torch and Triton take this machine for one with an H100."""
    import triton
    from torch._dynamo import device_interface
    from torch._inductor import inductor_prims
    from torch._inductor.runtime import triton_helpers
    from torch._prims import TensorMeta
    from torch._subclasses import fake_tensor
    from torch.distributed import _symmetric_memory

    cuda: Any = torch.cuda
    for name, value in {
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "set_device": None,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H100,
        "get_device_capability": (9, 0),
        "_lazy_init": None,
        "synchronize": None,
        "is_initialized": False,
        "current_stream": SimpleNamespace(cuda_stream=0, stream_id=0),
    }.items():
        patch.setattr(cuda, name, lambda *arguments, value=value: value)
    patch.setattr(cuda._DeviceGuard, "__enter__", lambda guard: None)
    interface = device_interface.CudaInterface
    patch.setitem(device_interface.caching_worker_device_properties, "cuda", [H100])
    patch.setattr(interface.Worker, "get_device_properties", staticmethod(lambda device=None: H100))
    answers: dict[str, Any] = {
        "is_available": True,
        "get_compute_capability": 90,
        "get_device_properties": H100,
        "synchronize": None,
        "current_device": 0,
    }
    for name, value in answers.items():
        patch.setattr(interface, name, staticmethod(lambda *arguments, value=value: value))
    patch.setattr(fake_tensor, "init_gpu_context", lambda *arguments: None)
    patch.setattr(triton.runtime.driver, "_active", Driver())
    patch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
    patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    patch.setattr(
        torch._inductor.async_compile.AsyncCompile, "triton", lambda self, name, source, device_str="cuda": None
    )
    # Both would copy a tensor to learn its strides.
    order = "make_contiguous_for_perm"
    real = getattr(_symmetric_memory, order, None)
    if real is not None:
        patch.setattr(_symmetric_memory, order, lambda t, dims: real(_without_memory(t, "meta"), dims))
    patch.setattr(
        inductor_prims.force_stride_order,
        "prim_meta_impl",
        lambda t, strides: TensorMeta(shape=t.shape, strides=tuple(strides), dtype=t.dtype, device=t.device),
    )


def train(function: nn.Module, backend: Any, *inputs: Tensor, dynamic: bool | None = False) -> Tensor:
    """Compile, run forward and backward."""
    y = torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    if y.requires_grad:
        y.backward(torch.ones_like(y))
    return y


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _is_one(constant: Any) -> bool:
    return constant == 1 and not isinstance(constant, bool)
