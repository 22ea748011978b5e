"""Every private name of torch that the passes use, in one place.

Checked on torch 2.11, 2.13. When a release moves one of these names, importing this module or using the name fails
with a message that says which name and which version. What takes long to import (Inductor, Dynamo, SymPy) is imported
by what compiles, and not by ``import lora_fx``.
"""

from __future__ import annotations

import ast
import functools
import importlib
import math
import re
from collections.abc import Callable, Sequence
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


def force_stride_order() -> Any:
    """The operator by which Inductor asks for an order of strides: ``force_stride_order(tensor, strides)``."""
    return _private("torch._inductor.inductor_prims:force_stride_order")


def given_away() -> tuple[int, ...]:
    """Which inputs of the backward graph that is being compiled may be written over: what forward saved, and nobody
    retains. It is settled when forward is compiled, or by the first backward that retains its graph."""
    return tuple(_private("torch._inductor.utils:get_donated_idxs")() or ())


def read_from_memory(operators: list[Any]) -> None:
    """Have Inductor write values that these operators and others read, once, instead of computing them for each."""
    _private("torch._inductor.lowering:add_needs_realized_inputs")(operators)


def at_address(address: int, sizes: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A matrix without gaps in memory that others own."""
    size = sizes[0] * sizes[1] * dtype.itemsize
    storage = _private("torch._C:_construct_storage_from_data_pointer")(address, device, size)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, sizes, (sizes[1], 1))


def compile_cpp(source: str, flags: tuple[str, ...] = ()) -> Any:
    """A ``ctypes.CDLL`` of C++ source, built with Inductor's compiler and flags (and these) and kept in its cache."""
    return _private("torch._inductor.codecache:CppCodeCache").load(source, extra_flags=flags)


def inductor_config() -> Any:
    """``torch._inductor.config``, with the patches of the compilation that is running."""
    return importlib.import_module("torch._inductor.config")


def group_ranks(name: str) -> tuple[int, ...] | None:
    """The ranks of the process group that has this name in a graph; None where this process does not know it."""
    resolve = _private("torch.distributed.distributed_c10d:_resolve_process_group")
    try:
        return tuple(torch.distributed.get_process_group_ranks(resolve(name)))
    except (LookupError, RuntimeError, ValueError):  # by release, and by who made the group
        return None


def pipelines_collectives(group: Any) -> bool:
    """Whether Inductor will pipeline matrix products with the collectives of a process group (by its name)."""
    distributed = torch.distributed
    if not (inductor_config()._micro_pipeline_tp and distributed.is_available() and distributed.is_nccl_available()):
        return False
    return bool(_private("torch.distributed._symmetric_memory:is_symm_mem_enabled_for_group")(group))


def ceil_div(dividend: Any, divisor: int) -> Any:
    """``dividend / divisor``, rounded up; of a size that Inductor does not know, a SymPy expression, as well."""
    if isinstance(dividend, int):
        return -(-dividend // divisor)
    return _private("torch.utils._sympy.functions:CeilDiv")(dividend, divisor)


def lower_with(operator: Any, lower: Callable[..., Any]) -> None:
    """Have Inductor lower calls of ``operator`` with ``lower``.

    It gets the operands that are on a GPU as Inductor's boxes of tensors, and may return `NotImplemented`: then, and on
    any other device, the operator itself is called.
    """
    fallback = _private("torch._inductor.lowering:fallback_handler")(operator, add_to_fallback_set=False)
    box = _private("torch._inductor.ir:TensorBox")

    def choose(*args: Any, **kwargs: Any) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs), is_leaf=lambda leaf: isinstance(leaf, box))
        on_gpu = all(leaf.get_device().type == "cuda" for leaf in leaves if isinstance(leaf, box))
        result = lower(*args, **kwargs) if on_gpu else NotImplemented
        return fallback(*args, **kwargs) if result is NotImplemented else result

    _private("torch._inductor.lowering:register_lowering")(operator, type_promotion_kind=None)(choose)


def in_memory(box: Any) -> Any:
    """One of Inductor's tensors as one that is in memory: itself, a view of what is, or a copy."""
    ir = importlib.import_module("torch._inductor.ir")
    made = ir.ExternKernel.realize_input(box)
    return made if isinstance(made, ir.TensorBox) else ir.TensorBox(made)


def layout(box: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    """Sizes and strides of one of Inductor's tensors that is in memory: numbers or SymPy expressions."""
    sizes, strides = ([int(n) if _is_number(n) else n for n in each] for each in (box.get_size(), box.get_stride()))
    return sizes, strides


def _is_number(size: Any) -> bool:
    return isinstance(size, int) or bool(size.is_number)


def laid_out(box: Any, strides: Sequence[Any]) -> Any:
    """One of Inductor's tensors, or a copy if it cannot have these strides where it is."""
    return _private("torch._inductor.ir:ExternKernel").require_exact_strides(box, strides)


def memory(sizes: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A new one of Inductor's tensors, contiguous, for a kernel to write."""
    return _private("torch._inductor.lowering:empty")(sizes, dtype=dtype, device=device)


def copy_into(target: Any, source: Any) -> None:
    """Write one of Inductor's tensors over another one."""
    _private("torch._inductor.lowering:lowerings")[torch.ops.aten.copy_.default](target, source)


def side_by_side_in_memory(parts: list[Any], starts: list[int], columns: int) -> Any:
    """Inductor's tensors [M, N_i] as columns of a new one: what computes them writes them there, the rest is copied.

    Its own concatenation leaves no columns free, and may compute all that is concatenated in one kernel.
    """
    ir, graph = importlib.import_module("torch._inductor.ir"), _private("torch._inductor.virtualized:V").graph
    concatenation = _private("torch._inductor.ir:ConcatKernel")
    device, dtype, (rows, _) = parts[0].get_device(), parts[0].get_dtype(), parts[0].get_size()
    made = concatenation(name=None, layout=ir.FixedLayout(device, dtype, [rows, columns], [columns, 1]), inputs=[])
    memory = ir.StorageBox(made)
    for part, start in zip(parts, starts, strict=True):
        source, strides = _in_own_shape(ir, part, columns)
        layout = ir.FixedLayout(device, dtype, source.get_size(), strides, start)
        made.inputs.append(concatenation.realize_into(source, ir.ReinterpretView(data=memory, layout=layout)))
    made.name = graph.register_buffer(made)
    made.inputs = concatenation.unwrap_storage(made.inputs)
    graph.register_operation(made)
    return ir.TensorBox(memory)


def _in_own_shape(ir: Any, part: Any, columns: int) -> tuple[Any, list[Any]]:
    """A tensor [M, N] as what it is a reshaped view of, and the strides that this has in rows ``columns`` apart.

    A kernel that computes heads [B, T, H, D] would not be one with what writes rows [M, N] of it: both would be run.
    """
    source = part.data
    while type(source) is ir.View:
        source = source.data
    sizes = [*source.get_size()] if isinstance(source, ir.StorageBox) else []
    for first in range(1, len(sizes)):
        row = math.prod(sizes[first:])
        if row == part.get_size()[1]:
            inner = [math.prod(sizes[place + 1 :]) for place in range(first, len(sizes))]
            outer = [columns * math.prod(sizes[place + 1 : first]) for place in range(first)]
            return source, [*outer, *inner]
    return part, [columns, 1]


def put_into(target: Any, parts: list[Any], starts: list[int]) -> None:
    """Write some of Inductor's tensors [M, N_i] over the columns of another one that begin at ``starts``."""
    lowerings = _private("torch._inductor.lowering:lowerings")
    for part, start in zip(parts, starts, strict=True):
        end = start + part.get_size()[1]
        copy_into(lowerings[torch.ops.aten.slice.Tensor](target, 1, start, end), part)


def launch(
    function: Any, arguments: dict[str, Any], written: Sequence[str], grid: Sequence[Any], warps: int, stages: int
) -> None:
    """Have Inductor launch a Triton function as it does its own.

    ``arguments`` are all of them by name: tensors of Inductor's, numbers and SymPy expressions. ``written`` names the
    tensors that the kernel writes, which it may read as well; they must be in memory, and no copies.
    """
    _launch()(function, arguments, written, [*grid, 1, 1][:3], warps, stages)


@functools.cache
def _launch() -> Any:
    """What Inductor makes of a user's Triton kernel, for one of which it need not be found out what it writes.

    Inductor makes Triton's intermediate code of a user's kernel for that, in this process. And it launches such kernels
    through Triton's launcher, a C module for each that this process would have to build, unless they are of the kind
    that its templates are: one configuration, and nothing to tune.
    """
    base: Any = _private("torch._inductor.ir:UserDefinedTritonKernel")
    ir = importlib.import_module("torch._inductor.ir")
    graph = _private("torch._inductor.virtualized:V")

    class Launch(base):
        def __init__(
            self, function: Any, arguments: dict[str, Any], written: Sequence[str], grid: list[Any], *options: int
        ) -> None:
            self.function, self.warps, self.stages = function, *options
            given = {name: arguments[name] for name in function.arg_names}
            operands = {
                name: self.unwrap_storage_for_input(self.realize_input(value))
                for name, value in given.items()
                if isinstance(value, ir.TensorBox)
            }
            numbers = {name: value for name, value in given.items() if name not in operands}
            self.device = next(iter(operands.values())).get_device()
            ir.ExternKernel.__init__(
                self,
                None,
                ir.NoneLayout(device=self.device),
                list(operands.values()),
                tuple(numbers.values()),
                {name: operands.get(name, value) for name, value in given.items()},
            )
            self.grid = [grid]
            self.ordered_kwargs_for_cpp_kernel = list(given)
            self.mutable_args = [given[name] for name in written]
            assert all(operands[name].get_name() == given[name].get_name() for name in written), "a copy was written"
            self.mutation_outputs = [
                ir.MutationOutput(ir.NoneLayout(device=self.device), target, self) for target in self.mutable_args
            ]
            graph.graph.register_operation(self)

        def get_kernel_and_metadata(self) -> tuple[Any, list[Any], list[str], list[str]]:
            return self.function, [], [], []

        def can_fuse_epilogue(self) -> bool:
            return False

        def codegen(self, wrapper: Any) -> None:
            define = wrapper.define_kernel

            def define_template(name: str, body: str, *more: Any, **named: Any) -> None:
                text = self._as_template(body)
                _begin_to_compile(text)
                define(name, text, *more, **named)

            wrapper.define_kernel = define_template
            try:
                super().codegen(wrapper)
            finally:
                del wrapper.define_kernel

        def _as_template(self, body: str) -> str:
            head, found, rest = body.partition("@triton_heuristics.user_autotune(")
            rest, count = re.subn(r"configs=\[\],", f"num_stages={self.stages}, num_warps={self.warps},", rest, count=1)
            assert found and count, body
            return f"{head}@triton_heuristics.template({rest.replace('custom_kernel=True,', '', 1)}"

    return Launch


def _begin_to_compile(definition: str) -> None:
    """Have Inductor's processes compile a kernel while Inductor goes on, as it does for its own."""
    compiler = _private("torch._inductor.async_compile:AsyncCompile")()
    if compiler.use_process_pool():
        call: Any = ast.parse(definition.strip(), mode="eval").body
        compiler.triton(*(ast.literal_eval(argument) for argument in call.args))
