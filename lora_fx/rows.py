"""Batches whose rows use different adapters.

    with lora_fx.adapters_per_row(model, ["en", "fr", None, "en"]):
        model.generate(...)

All adapters of a linear are stacked, A [n R, K] and B [N, n R], and run together; see
`lora_fx.passes.low_rank.low_rank_rows`. The assignment is a tensor of indices: another one is the same graph.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fx import _torch
from lora_fx.adapters import adapter_names, check_known
from lora_fx.entries import held
from lora_fx.install import adapted_linears, check_not_merged, configs
from lora_fx.linear import LoRAModule
from lora_fx.placements import is_dtensor
from lora_fx.refusals import only_one
from lora_fx.targets import clean_path


class Stack(NamedTuple):
    """All adapters of one linear, in the order of their names.

    Parameters that train nothing, because shapes of parameters are constants to Dynamo, also with ``dynamic=True``.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scales: nn.Parameter


class Rows(NamedTuple):
    """What `low_rank_rows` needs beside the input: the index of each row's adapter, and the adapters."""

    rows: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scales: Tensor

    def moved(self, fn: Callable[[Tensor], Tensor]) -> "Rows":
        """After ``module._apply(fn)``: the factors converted, the numbers only moved."""
        lora_a, lora_b = fn(self.lora_a), fn(self.lora_b)
        return Rows(self.rows.to(lora_a.device), lora_a, lora_b, self.scales.to(lora_a.device))


@contextlib.contextmanager
def adapters_per_row(model: nn.Module, rows: Sequence[str | None]) -> Iterator[None]:
    """Within this context each row of a batch runs through the adapter that is named for it. For inference.

    Compiled or not; a compiled model has a graph for this, which is compiled once. Another assignment, another size of
    batch (where it is dynamic), new values and `disabled` are the same graph; another number of adapters is another.
    Each linear runs all adapters of the model at once, at the cost of one of rank n R: `delete_adapter` those that are
    not in use. The active adapter plays no role, and there is no dropout.

    The adapters are copied together on entry (and the memory is kept for the next time): enter once for a batch, and
    not for every token. Values that change inside count from the next entry on. Gradients are off. Contexts nest.

    Args:
        model: holds the adapters.
        rows: for each row of the batch, the name of its adapter, or None for the base alone. The first dimension of
            every adapted linear's input has this size: with beam search name each row once for each of its beams.
            Tokens of a batch may be flattened, [batch * tokens, K].

    Raises:
        ValueError: a name is unknown, or known to parts of the model alone; there are no rows; the model holds no
            adapters, is in training mode, merged, sharded or on the meta device. Inside, by the linear: the batch has
            another size than `rows`.
    """
    check_not_merged(model)
    for config in configs(model):
        if reason := only_one(config):
            raise ValueError(f"{reason}: rows of several adapters run in models of plain LoRA")
    names = adapter_names(model)
    modules = adapted_linears(model, "which have one adapter for all rows: use a model whose linears alone are adapted")
    wanted = list(rows)
    if isinstance(rows, str) or not wanted:
        raise ValueError(f"rows must be a list with a name or None for each row of the batch, got {rows!r}")
    for name in wanted:
        if name is not None and name not in names:
            raise ValueError(f"the model has no adapter called {name!r}: it has {', '.join(names)}")
    for name in names:
        check_known(model, name)
    for path, module in modules:
        _check(clean_path(path) or "the model", module)
    index = torch.tensor([-1 if name is None else names.index(name) for name in wanted])
    on_device: dict[torch.device, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode could not be used outside of it
        stacks = [_stacked(module, names) for _, module in modules]
        for stack in stacks:
            device = stack.lora_a.device
            if device not in on_device:
                on_device[device] = index.to(device)
    before = [module._lora_rows for _, module in modules]
    try:
        for (_, module), stack in zip(modules, stacks):
            module._lora_rows = Rows(on_device[stack.lora_a.device], *stack)
        with _torch.sizes_of_attributes_may_vary(), torch.no_grad():
            yield
    finally:
        for (_, module), previous in zip(modules, before):
            module._lora_rows = previous


def _check(where: str, module: LoRAModule) -> None:
    if module.training:
        raise ValueError(f"{where} is in training mode, and rows of several adapters are for inference: model.eval()")
    if is_dtensor(module.lora_a) or _torch.data_parallel_wrapper(module):
        raise ValueError(f"{where} is sharded: rows of several adapters run in a model that one process holds")
    if module.lora_a.is_meta:
        raise ValueError(f"{where} is on the meta device: it has no numbers yet")


def _stacked(module: LoRAModule, names: Sequence[str]) -> Stack:
    """The adapters of `module`, as they are now, in the memory of the last stack where that has the right size."""
    every = [held(module, name) for name in names]
    rank, device, dtype = module.lora_a.shape[0] * len(every), module.lora_a.device, module.lora_a.dtype
    stack = module._lora_stack
    if stack is None or stack.lora_a.shape[0] != rank or stack.lora_a.device != device or stack.lora_a.dtype != dtype:
        stack = module._lora_stack = Stack(
            _constant(torch.empty(rank, module.in_features, dtype=dtype, device=device)),
            _constant(torch.empty(module.out_features, rank, dtype=dtype, device=device)),
            _constant(torch.empty(len(every), device=device)),
        )
    torch.cat([holder.lora_a.detach() for holder in every], 0, out=stack.lora_a)
    torch.cat([holder.lora_b.detach() for holder in every], 1, out=stack.lora_b)
    torch.stack([holder.lora_scale for holder in every], out=stack.scales)
    return stack


def _constant(tensor: Tensor) -> nn.Parameter:
    constant = nn.Parameter(tensor, requires_grad=False)
    _torch.keep_address(constant)
    return constant
