"""What the module half reads of torch beyond its public interface, in one place. Checked on torch 2.11 to 2.13.

Nothing here imports a subsystem: a model can only be an instance of a class whose module is loaded already.
"""

import sys

from torch import nn


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
    replicate = sys.modules.get("torch.distributed._composable.replicate")
    if replicate is not None and isinstance(module, getattr(replicate, "DDP", ())):
        return "replicate"
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return type(module).__name__
    return None


def has_instance_forward(module: nn.Module) -> bool:
    """Whether `forward` was assigned on the instance, so that no class's `forward` runs."""
    return "forward" in module.__dict__
