"""What the module half reads of torch beyond its public interface, in one place. Checked on torch 2.11, 2.13 and 2.15.

Nothing here imports a subsystem: a model can only be an instance of a class whose module is loaded already.
"""

import contextlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.fx.traceback import annotate

__all__ = [
    "annotate",  # a context that notes something on the nodes of the graph that is being captured
    "check_collects_by_group",
    "compile_in_place",
    "copy_each",
    "data_parallel_wrapper",
    "dispatch_grouped_mm",
    "divide_each",
    "flat",
    "has_instance_forward",
    "is_compiled",
    "keep_address",
    "multiply_each",
    "norms",
    "own_frame",
    "put_back",
    "reshard",
    "sizes_of_attributes_may_vary",
]


def compile_in_place(module: nn.Module, **options: Any) -> None:
    """``module.compile(**options)``, for modules whose `forward` is torch's own as well.

    Dynamo does not capture frames of torch's own code, so `nn.Module.compile` compiles no graph of an `nn.Sequential`
    but one for each of its children. Reached from a frame of ours, it is captured as one.
    """
    from torch._dynamo import trace_rules

    if trace_rules.check(module.forward):
        module._compiled_call_impl = torch.compile(own_frame(module._call_impl), **options)
    else:
        module.compile(**options)


def own_frame(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` behind a frame that nothing else shares.

    Dynamo keeps what it compiled on the code object of the frame that it captured, and stops compiling when there are
    too many entries: a copy of the code gives each caller a count of its own.
    """

    def call(*inputs: Any, **kwargs: Any) -> Any:
        return function(*inputs, **kwargs)

    return types.FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)


@contextlib.contextmanager
def unlimited_recompiles() -> Iterator[None]:
    """Within this context Dynamo compiles a frame however often it did so before, and does not run it uncompiled."""
    from torch._dynamo import config

    with config.patch(recompile_limit=sys.maxsize, accumulated_recompile_limit=sys.maxsize):
        yield


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is what ``torch.compile(module)`` returns, or had ``module.compile()`` called on it."""
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    if eval_frame is not None and isinstance(module, eval_frame.OptimizedModule):
        return True
    return getattr(module, "_compiled_call_impl", None) is not None


def data_parallel_wrapper(module: nn.Module) -> str | None:
    """Which data-parallel wrapper `module` is (``"fully_shard"``, ``"FullyShardedDataParallel"``, ...), or None.

    `fully_shard` and the composable `replicate` change the class of the module that they were given; the others wrap.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        if isinstance(module, fsdp.FSDPModule):
            return "fully_shard"
        if isinstance(module, fsdp.FullyShardedDataParallel):
            return "FullyShardedDataParallel"
    if getattr(module, "_is_fsdp_managed_module", False):  # both leave it, for Dynamo, on all modules that they shard
        return "a parent's fully_shard"
    replicate = sys.modules.get("torch.distributed._composable.replicate")
    if replicate is not None and isinstance(module, getattr(replicate, "DDP", ())):
        return "replicate"
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return type(module).__name__
    return None


def reshard(model: nn.Module) -> None:
    """Give every module that `fully_shard` sharded its shards back, where a forward pass left whole parameters.

    Those are copies: what is written into them is lost. The next forward or backward pass gathers them again.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def has_instance_forward(module: nn.Module) -> bool:
    """Whether `forward` was assigned on the instance, so that no class's `forward` runs."""
    return "forward" in module.__dict__


def dispatch_grouped_mm() -> None:
    """Have Dynamo ask operands of ``torch._grouped_mm`` for their ``__torch_function__``, as eager torch does.

    Dynamo's list of functions that can be overridden leaves out those with an underscore, and `F.grouped_mm` is nothing
    but a call of this one. Nothing changes for operands that are plain tensors. It can go when Dynamo's list has it.
    """
    from torch._dynamo.variables import torch as functions

    functions.get_overridable_functions().add(torch._grouped_mm)


def keep_address(tensor: torch.Tensor) -> None:
    """Tell CUDA graphs that `tensor` stays where it is, as parameters do, so that they need no copy of it.

    Checked on torch 2.13.
    """
    torch._dynamo.mark_static_address(tensor, guard=False)


def sizes_of_attributes_may_vary() -> AbstractContextManager[Any]:
    """While this lasts, what Dynamo captures has no constants for the sizes of tensors that are attributes of linears.

    Dynamo takes such sizes for constants in modules whose class says that it is torch's, as a swapped one does. Sizes
    of parameters and buffers stay constants. Checked on torch 2.13.
    """
    import torch._dynamo.config

    return torch._dynamo.config.patch(force_nn_module_property_static_shapes=False)


def check_collects_by_group(optimizer: type[torch.optim.Optimizer]) -> None:
    """Raise ImportError if torch's `optimizer` does not collect a group's tensors in a method that can be extended.

    ``_init_group(group, parameters, gradients, *state)`` fills the lists that its step is computed of. Checked on torch
    2.11 and 2.13.
    """
    if not hasattr(optimizer, "_init_group"):
        raise ImportError(
            f"lora_fx needs {optimizer.__name__}._init_group, which torch {torch.__version__} does not have (it was "
            f"checked on torch 2.11 and 2.13). Take torch.optim.{optimizer.__name__} itself, or one of those versions."
        )


# A loop over a model's adapters is a launch for each, and there are hundreds; these are a few on a GPU, which has done
# its backward pass by then and waits.


def norms(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The 2-norm of each of `tensors`, 0-d and float32."""
    return list(torch._foreach_norm(list(tensors), 2, torch.float32)) if tensors else []


def multiply_each(tensors: Sequence[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply each of `tensors` in place by `factor`, 0-d.

    Those of another dtype than the factor's in one piece: `torch._foreach_mul_` would be a launch for each.
    """
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for dtype, alike in kinds.items():
        if dtype == factor.dtype:
            torch._foreach_mul_(alike, factor)
            continue
        put_back(flat(alike).mul_(factor), alike)


def divide_each(tensors: Sequence[torch.Tensor], divisor: float) -> None:
    """Divide each of `tensors` in place by a number."""
    if tensors:
        torch._foreach_div_(list(tensors), divisor)


def copy_each(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copy each of `values` into its one of `tensors`."""
    if tensors:
        torch._foreach_copy_(list(tensors), list(values))


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """All elements of `tensors`, which are of one dtype and device, one after another: the memory of a single one, or a
    copy."""
    return torch._utils._flatten_dense_tensors(list(tensors))


def put_back(values: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Copy what `flat` gave into `tensors`."""
    copy_each(tensors, torch._utils._unflatten_dense_tensors(values, list(tensors)))
