"""Every private name of torch that the passes use, in one place.

Checked on torch 2.11, 2.13. When a release moves one of these names, importing this module or using the name fails
with a message that says which name and which version. What takes long to import (Inductor, Dynamo, SymPy) is imported
by what compiles, and not by ``import lora_fx``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

import torch

CHECKED = "2.11 and 2.13"


@functools.cache
def _private(path: str) -> Any:
    """Import ``package.module:name`` or say that this release of torch is not supported."""
    module_name, name = path.split(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"lora_fx needs {module_name}.{name}, which torch {torch.__version__} does not have "
            f"(lora_fx was checked on torch {CHECKED}). Install one of those versions, or a newer lora_fx."
        ) from error


detect_fake_mode = _private("torch._guards:detect_fake_mode")
"""The fake tensor mode that the graph's ``meta["val"]`` belong to."""

extract_tensor_metadata = _private("torch.fx.passes.shape_prop:_extract_tensor_metadata")
"""Shape, stride and dtype in the form that ``meta["tensor_meta"]`` wants."""

auto_functionalized = _private("torch._higher_order_ops.auto_functionalize:auto_functionalized")
"""Higher-order operator that wraps a mutation; Inductor runs it in place where nothing else reads the operand."""

CheckpointPolicy = _private("torch.utils.checkpoint:CheckpointPolicy")
"""The values of ``meta["recompute"]`` that the partitioner reads."""

trace_structured = _private("torch._logging:trace_structured")
"""Writes an artifact into ``TORCH_TRACE`` for tlparse."""


def custom_graph_pass() -> Any:
    """The abstract base class of graph passes that take part in Inductor's cache key."""
    return _private("torch._inductor.custom_graph_pass:CustomGraphPass")


def statically_known_true(condition: Any) -> bool:
    """Whether a symbolic comparison holds without adding a guard."""
    if isinstance(condition, bool):
        return condition
    known: bool = _private("torch.fx.experimental.symbolic_shapes:statically_known_true")(condition)
    return known


def joint_graph_passes(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Inductor's passes over a joint or inference graph, custom hooks included."""
    values = [node.meta.get("val") for node in graph.graph.nodes]
    with _private("torch._inductor.virtualized:V").set_fake_mode(detect_fake_mode(values)):
        return _private("torch._inductor.fx_passes.joint_graph:joint_graph_passes")(graph)


def partition(joint: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
    """Inductor's partitioner: a joint graph into forward and backward."""
    name = "torch._functorch.partitioners:min_cut_rematerialization_partition"
    return _private(name)(joint, inputs, **kwargs)


def aot_autograd(**kwargs: Any) -> Any:
    """A Dynamo backend out of graph compilers, with Inductor's decompositions."""
    decompositions = _private("torch._inductor.decomposition:select_decomp_table")()
    make = _private("torch._dynamo.backends.common:aot_autograd")
    return make(decompositions=decompositions, keep_inference_input_mutations=True, **kwargs)


def boxed(graph: torch.fx.GraphModule) -> Any:
    """The graph as a callable that takes its inputs in one list, as AOTAutograd calls compiled code."""
    return _private("functorch.compile:make_boxed_func")(graph.forward)


def stable_topological_sort(graph: torch.fx.Graph) -> None:
    """Sort the graph's nodes, moving as few as possible (Inductor's own sort)."""
    _private("torch._inductor.pattern_matcher:stable_topological_sort")(graph)


def lower_as_donated(operator: Any) -> None:
    """Have Inductor lower ``operator(saved, size)`` to the memory of ``saved`` as a view of ``size``.

    Only where AOTAutograd gives that memory away with the backward graph's inputs (never what the user sees, and
    nothing where the graph is retained); elsewhere to fresh memory.
    """
    lowering = {name: _private(f"torch._inductor.lowering:{name}") for name in ("register_lowering", "view", "empty")}
    donated = _private("torch._inductor.ir:DonatedBuffer")

    def lower(saved: Any, size: Any) -> Any:
        if isinstance(getattr(saved.data, "data", None), donated):
            return lowering["view"](saved, size)
        return lowering["empty"](size, dtype=saved.get_dtype(), device=saved.get_device())

    lowering["register_lowering"](operator, type_promotion_kind=None)(lower)


def gives_saved_away() -> bool:
    """Whether backward graphs that are compiled now may write over what forward saved (nobody retains them)."""
    return bool(importlib.import_module("torch._functorch.config").donated_buffer)


def read_from_memory(operators: list[Any]) -> None:
    """Have Inductor write values that these operators and others read, once, instead of computing them for each."""
    _private("torch._inductor.lowering:add_needs_realized_inputs")(operators)


def compile_cpp(source: str, flags: tuple[str, ...] = ()) -> Any:
    """A ``ctypes.CDLL`` of C++ source, built with Inductor's compiler and flags (and these) and kept in its cache."""
    return _private("torch._inductor.codecache:CppCodeCache").load(source, extra_flags=flags)


def inductor_config() -> Any:
    """``torch._inductor.config``, with the patches of the compilation that is running."""
    return importlib.import_module("torch._inductor.config")


def pipelines_collectives(group: Any) -> bool:
    """Whether Inductor will pipeline matrix products with the collectives of a process group (by its name)."""
    distributed = torch.distributed
    if not (inductor_config()._micro_pipeline_tp and distributed.is_available() and distributed.is_nccl_available()):
        return False
    return bool(_private("torch.distributed._symmetric_memory:is_symm_mem_enabled_for_group")(group))


@dataclass(frozen=True)
class Workers:
    """The processes in which Inductor compiles its Triton kernels."""

    pool: Any
    started: Future[Any]
    """Done when they take work, or never will."""

    def are_ready(self, needed: Future[None], patience: float) -> bool:
        """Wait for their start, but no longer than ``patience`` seconds, nor once ``needed`` is done: do they run?"""
        wait([self.started, needed], patience, FIRST_COMPLETED)
        return self.started.done() and not self.started.cancelled() and self.started.exception() is None

    def run(self, work: Callable[[], Any], patience: float) -> Any:
        """What ``work`` returns, or raises, in one of them. It is pickled, so they import what it is.

        Raises:
            TimeoutError: it took longer than ``patience`` seconds, or their own parent is dead, which nobody is told.
        """
        future: Future[Any] = self.pool.submit(work)
        end = time.monotonic() + patience
        while not future.done() and self.pool.process.poll() is None and time.monotonic() < end:
            wait([future], min(1.0, patience))
        return future.result(0)


def compile_workers() -> Workers | None:
    """Inductor's worker processes, which are started where they are not; None where Inductor uses none.

    As for Inductor's own kernels, what is configured for this compilation decides. Processes that are forked from this
    one are left alone. To be called by one thread at a time.
    """
    config, name = inductor_config(), "torch._inductor.async_compile:AsyncCompile"
    if config.worker_start_method != "subprocess" or config.triton.proton_profiling:
        return None
    inductor = _private(name)
    try:
        # Asking whether the pool is ready begins it.
        if not inductor.use_process_pool() and inductor._ready_future is None:
            return None
        return Workers(inductor.process_pool(), inductor._ready_future)
    except Exception:
        logging.getLogger("lora_fx.passes").debug("Inductor has no worker processes", exc_info=True)
        return None


def prepare_triton(device: int) -> None:
    """Set the two variables of Triton's that Inductor sets before a kernel of its own is compiled in this process.

    Its workers have set them in any case. They choose the cache on the disk and the assembler, which is a part of
    Triton's key: a kernel that was compiled before they were set, or in a process without them, is not found again.
    """
    _private("torch._inductor.runtime.compile_tasks:_set_triton_ptxas_path")()
    follow_assembler()
    folder = _private("torch._inductor.runtime.cache_dir_utils:triton_cache_dir")(device)
    os.environ.setdefault("TRITON_CACHE_DIR", folder)


def follow_assembler() -> None:
    """Have Triton's key name the assembler that Triton's variables choose now.

    Triton asks one for its version once in a process, and Inductor has it ask (for its own cache) before it sets the
    variable in this process, unlike in its workers: a kernel was assembled by torch's, under the key of Triton's own.
    """
    _ask_assembler(*(os.environ.get(name) for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")))


@functools.lru_cache(maxsize=1)
def _ask_assembler(*paths: str | None) -> None:
    """Have Triton ask again, where the paths have changed (Triton 3.6 to 3.9 keep the version in this function)."""
    nvidia = sys.modules.get("triton.backends.nvidia.compiler")
    if (version := getattr(nvidia, "get_ptxas_version", None)) is not None:
        version.cache_clear()
