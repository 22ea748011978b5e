"""What a trainer on several ranks needs besides the model: gradients that are reduced once, clipping, random numbers.

Placements need no call: factors follow their weight (see `lora_fx.placements`), so stock `parallelize_module` and
`fully_shard` do what they do for any model. The order is: quantise, install, parallelise, `freeze`, shard, compile.

A factor that is replicated over tensor-parallel ranks (A beside a column-wise weight, B beside a row-wise one) gets on
each rank one term of its gradient. Left alone, each such term is reduced by itself, in the backward pass (FSDP) or in
the optimizer (without FSDP). They are small, so that is mostly latency: `reduce_gradients` and `DeferredReduction`
reduce all of them in one collective a mesh dimension.
"""

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from lora_fx import _torch
from lora_fx.experts import LoRAExpertsModule
from lora_fx.install import adapter_parameters, thawed
from lora_fx.linear import PARAMETERS, LoRAModule
from lora_fx.placements import adapter_placements, deferred, is_dtensor, local, local_parts
from lora_fx.sharded_optimizer import ShardedAdamW
from lora_fx.stored import StoredAdapter

__all__ = [
    "DeferredReduction",
    "ShardedAdamW",
    "adapter_placements",
    "average_gradients",
    "clip_grad_norm",
    "manual_seed",
    "reduce_gradients",
    "thawed",
]

Group = Any
"""A `torch.distributed.ProcessGroup`, which is not there in builds without distributed support."""


def reduce_gradients(parameters: nn.Module | Iterable[nn.Parameter]) -> int:
    """Turn every partial gradient into the sum, with one all-reduce for each mesh dimension (and dtype).

    Call it after backward and before anything reads gradients. Calling it again does nothing, and leaving it out
    only costs collectives: an optimizer step on partial gradients reduces each of them, more than once.

    Args:
        parameters: what to look at; for a module, its adapters.

    Returns:
        How many all-reduces were done.

    Raises:
        ValueError: a gradient is partial in a way that is not a sum.
    """
    found = adapter_parameters(parameters) if isinstance(parameters, nn.Module) else list(parameters)
    return _sum_over_groups(_partial_terms(found))


# Without gradients `to_local` is an attribute; with them, a node for each of hundreds of factors.
@torch.no_grad()
def _partial_terms(parameters: Iterable[nn.Parameter]) -> list[tuple[Tensor, list[Group]]]:
    """This rank's terms of the gradients that are partial, which become sums in name, with the groups to sum over."""
    terms: list[tuple[Tensor, list[Group]]] = []
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is None or not is_dtensor(gradient):
            continue
        partial = [dim for dim, placement in enumerate(gradient.placements) if placement.is_partial()]
        if not partial:
            continue
        if any(gradient.placements[dim].reduce_op != "sum" for dim in partial):
            raise ValueError(f"a gradient is placed as {gradient.placements}: only sums can be reduced together")
        terms.append((local(gradient), [gradient.device_mesh.get_group(dim) for dim in partial]))
        parameter.grad = _as_sum(gradient)
    return terms


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], groups: Sequence[Group], divisor: float) -> int:
    """Sum this rank's part of each gradient over `groups` and divide it, in one all-reduce a group (and dtype).

    For parameters that data-parallel ranks hold and FSDP does not: adapters that it ignores, or experts that are shared
    out over a part of these ranks, whose gradients are sums over the tokens of that part.

    A parameter that got no gradient here (a branch of the model that this rank's batch did not take) counts as zero,
    and gets the average of the others'; one that got none on any rank keeps none, and no optimizer touches it. That is
    what DDP does with `find_unused_parameters=True`. It takes no collective more: who has a gradient goes with the
    gradients, and only a rank that misses some reads it, which waits for its GPU.

    Args:
        parameters: the same on all ranks, in the same order, and trainable on all or none; what is frozen is skipped.
            Gradients that are partial over a mesh go through `reduce_gradients` first.
        groups: of the ranks that hold other parts of the batch for the same parameters.
        divisor: how many ranks the gradient is an average over, those that hold other experts included.

    Returns:
        How many all-reduces were done.
    """
    trained = [p for p in parameters if p.requires_grad or p.grad is not None]
    gradients = [torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad for p in trained]
    terms = local_parts(gradients)
    # Float16 may hold the average where it does not hold the sum, nor the terms of a small one once they are divided.
    sums = [term.float() if term.dtype == torch.float16 else term for term in terms]
    kinds = [(term.dtype, term.device) for term in sums]
    here: dict[tuple[torch.dtype, torch.device], list[bool]] = {}
    for parameter, kind in zip(trained, kinds, strict=True):
        here.setdefault(kind, []).append(parameter.grad is not None)
    # How many ranks have each gradient. Where this one has all of them, no number comes from the CPU, nor goes there.
    ranks = {
        (dtype, device): torch.ones(len(flags), dtype=dtype, device=device)
        if all(flags)
        else torch.tensor(flags, dtype=dtype, device=device)
        for (dtype, device), flags in here.items()
    }
    count = _sum_over_groups([(tensor, list(groups)) for tensor in (*sums, *ranks.values())])
    _torch.divide_each(sums, divisor)
    wide = [(term, total) for term, total in zip(terms, sums) if total is not term]
    _torch.copy_each([term for term, _ in wide], [total for _, total in wide])
    for kind, flags in here.items():
        if not all(flags):
            its = [(p, gradient) for p, gradient, other in zip(trained, gradients, kinds) if other == kind]
            for (parameter, gradient), found in zip(its, ranks[kind].tolist(), strict=True):
                if parameter.grad is None and found:
                    parameter.grad = gradient
    return count


class DeferredReduction:
    """Keeps FSDP from reducing the terms of replicated factors one by one; they are reduced together before the step.

        reduction = DeferredReduction(stages, optimizer)  # after parallelize_module and fully_shard
        loss.backward()
        optimizer.step()                                  # reduces first, if `reduction.reduce()` was not called

    It is about the adapters that the optimizer holds: of several on one model (`lora_fx.set_adapter`), each optimizer
    needs one of its own. Until the step the gradients of these factors hold this rank's term. Whatever reads gradients
    between backward and the step (clipping, logging) needs a call of `reduce` before it. Before that, gradients may be
    accumulated over any number of backward passes.

    Args:
        models: a model, or the stages that this rank holds.
        optimizer: of the adapters; a hook reduces before its step.

    Raises:
        ValueError: no model holds adapters, or the optimizer holds none of theirs.
    """

    def __init__(self, models: nn.Module | Sequence[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self.models = [models] if isinstance(models, nn.Module) else list(models)
        self.modules = [module for model in self.models for module in model.modules() if isinstance(module, LoRAModule)]
        # The gradients of these show that they are partial: there is nothing to keep from being reduced.
        self.experts = [m for model in self.models for m in model.modules() if isinstance(m, LoRAExpertsModule)]
        if not self.modules and not self.experts:
            raise ValueError("no model holds adapters: call lora_fx.install before deferring the reduction")
        self._owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        # Each factor with its linear's scale. The numbers of a swapped module are replicated on the tensor-parallel
        # mesh, and FSDP leaves them there.
        self._factors: list[tuple[Any, Any]] = [
            (holder._parameters[name], holder.lora_scale) for holder in self._holders() for name in PARAMETERS
        ]
        if not self._factors and not self.experts:
            raise ValueError("the optimizer holds no adapter of these models: make it of lora_fx.adapter_parameters")
        # By identity and not by a flag: a step may be left out (GradScaler does so), and then no hook is called.
        self._reduced: list[weakref.ref[Tensor]] = []
        # Factors that had no gradient then; `average_gradients` may give them one, which is a sum already.
        self._missing: set[int] = set()
        # Before anything with deferred factors is compiled.
        torch.compiler.allow_in_graph(deferred)
        for holder in self._holders():
            holder._lora_deferred = True
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            optimizer.register_step_post_hook(lambda *_: self._forget()),
        ]

    @torch.no_grad()
    def reduce(self) -> int:
        """Reduce what is deferred and was not reduced since the last step; returns how many all-reduces it took."""
        done = {id(gradient) for ref in self._reduced if (gradient := ref()) is not None}
        terms = _partial_terms(module.get_parameter(n) for module in self.experts for n in module.lora_parameters)
        # Of these gradients, or of those of a step that was left out?
        current = not done or any(id(factor.grad) in done for factor, _ in self._factors)
        averaged = self._missing if current else set()
        self._missing = {id(factor) for factor, _ in self._factors if factor.grad is None} | averaged
        known: dict[Any, list[Group]] = {}  # by meshes and placements, of which there are few
        for factor, scale in self._factors:
            if not is_dtensor(scale) or (gradient := factor.grad) is None:
                continue
            if id(gradient) in done or id(factor) in averaged:
                continue
            key = id(factor.device_mesh), id(scale.device_mesh), factor.placements
            if key not in known:
                known[key] = _replica_groups(factor.device_mesh, scale.device_mesh, factor.placements)
            if groups := known[key]:
                terms.append((local(gradient), groups))
                self._reduced.append(weakref.ref(gradient))
        return _sum_over_groups(terms)

    def remove(self) -> None:
        """Go back to gradients that are reduced as they come."""
        for hook in self._hooks:
            hook.remove()
        for holder in self._holders():
            holder._lora_deferred = False

    def _holders(self) -> list[LoRAModule | StoredAdapter]:
        """What has the adapters of the optimizer now."""
        for model in self.models:
            _torch.reshard(model)  # optimizers hold shards
        return [h for module in self.modules for h in module.holders() if id(h.lora_a) in self._owned]

    def _before_step(self) -> None:
        self.reduce()

    def _forget(self) -> None:
        self._reduced.clear()
        self._missing.clear()


@torch.no_grad()
def clip_grad_norm(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    *,
    groups: Sequence[Group] = (),
    device: torch.device | str | None = None,
) -> Tensor:
    """Scale gradients so that their norm over all ranks is at most `max_norm`.

    Shards count once each and replicas once together, on meshes that may differ from parameter to parameter. One small
    all-reduce a mesh dimension, and one for each of `groups`. Partial gradients are reduced first; deferred ones do not
    show that they are partial, so call `DeferredReduction.reduce` before this.

    Args:
        parameters: this rank's trainable parameters; there may be none.
        max_norm: 2-norm, above 0.
        groups: process groups whose ranks hold different parameters without a mesh that says so: pipeline stages.
        device: of the norm on ranks without gradients (default: the CPU).

    Returns:
        The norm before clipping, a 0-d float32 tensor that is equal on all ranks.

    Raises:
        ValueError: `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    reduce_gradients(parameters)
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    parts = local_parts(gradients)
    norms: dict[tuple[Group, ...], list[Tensor]] = {}
    known: dict[Any, tuple[Group, ...]] = {None: ()}  # by mesh and placements, of which there are few
    for gradient, norm in zip(gradients, _torch.norms(parts), strict=True):
        key = (id(gradient.device_mesh), gradient.placements) if is_dtensor(gradient) else None
        if key not in known:
            known[key] = _shard_groups(gradient.device_mesh, gradient.placements)
        norms.setdefault(known[key], []).append(norm)
    sums = {key: torch.stack(values).square().sum() for key, values in norms.items()}
    # A gradient that is sharded over two dimensions is summed over one and then over the other.
    _sum_over_groups([(total, list(key)) for key, total in sums.items()])
    place = gradients[0].device if gradients else torch.device(device or "cpu")
    total = torch.stack(list(sums.values())).sum() if sums else torch.zeros((), device=place)
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    _torch.multiply_each(parts, factor)
    return norm


def manual_seed(seed: int, mesh: Any, shared: Sequence[str] = ("tp",)) -> int:
    """Seed torch's generators so that ranks which share activations draw the same dropout masks, and others do not.

    An input that is replicated over tensor-parallel ranks must be dropped alike on all of them, or the ranks compute
    the branch of different inputs. On CUDA, eager DTensor arranges that by itself; on a CPU, and in compiled code, it
    is a matter of equal seeds. An input that is sharded over them has the same pattern in each shard then.

    Args:
        seed: of the run.
        mesh: the `DeviceMesh` of all ranks, with named dimensions.
        shared: the dimensions along which activations are replicated. Names that the mesh lacks are ignored.

    Returns:
        The seed of this rank.
    """
    index = 0
    for name, size, coordinate in zip(mesh.mesh_dim_names, mesh.shape, mesh.get_coordinate()):
        if name not in shared:
            index = index * size + coordinate
    torch.manual_seed(seed + index)
    return seed + index


def largest_mesh(model: nn.Module) -> Any:
    """The `DeviceMesh` with the most ranks among those of the parameters of `model`; None if all are plain."""
    parameters: list[Any] = [parameter for parameter in model.parameters() if is_dtensor(parameter)]
    meshes = [parameter.device_mesh for parameter in parameters]
    return max(meshes, key=lambda mesh: mesh.size(), default=None)


def writes(mesh: Any) -> bool:
    """Whether this rank is the one of its mesh that writes files. Without a mesh, everybody is."""
    return mesh is None or not any(mesh.get_coordinate())


@contextlib.contextmanager
def together(mesh: Any) -> Iterator[None]:
    """All ranks of `mesh` come to the end of this block, or all raise: none waits for one that has failed.

    Raises:
        RuntimeError: another rank failed.
    """
    failed = True
    try:
        yield
        failed = False
    finally:
        elsewhere = mesh is not None and _anywhere(failed, mesh)
    if elsewhere:
        raise RuntimeError("another rank failed, and its error says why: nothing was changed on this one")


def _anywhere(flag: bool, mesh: Any) -> bool:
    """Whether `flag` is set on any rank of `mesh`."""
    number = torch.tensor(int(flag), device=mesh.device_type)
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX, group=mesh.get_group(dim))
    return bool(number.item())


def _as_sum(gradient: Any) -> Any:
    """The partial DTensor `gradient` as a view that is replicated where it was partial."""
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate() if placement.is_partial() else placement for placement in gradient.placements]
    return DTensor.from_local(
        gradient.to_local(),
        gradient.device_mesh,
        placements,
        run_check=False,
        shape=gradient.shape,
        stride=gradient.stride(),
    )


def _replica_groups(mesh: Any, parallel: Any, placements: Sequence[Any]) -> list[Group]:
    """The groups of the tensor-parallel mesh `parallel` over whose ranks a factor is replicated.

    A factor that FSDP sharded lives on a larger `mesh`, which holds that one's dimensions by name.
    """
    dims = list(range(parallel.ndim))
    if mesh != parallel:
        dims = [mesh.mesh_dim_names.index(name) for name in parallel.mesh_dim_names]
    return [mesh.get_group(dim) for dim in dims if placements[dim].is_replicate()]


def _shard_groups(mesh: Any, placements: Sequence[Any]) -> tuple[Group, ...]:
    """The groups over whose ranks a gradient with these placements is sharded."""
    return tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


@torch.no_grad()
def _sum_over_groups(terms: list[tuple[Tensor, list[Group]]]) -> int:
    """Sum each tensor in place over its groups: one all-reduce for each group, dtype and device."""
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for tensor, groups in terms:
        for group in groups:
            buckets.setdefault((group, tensor.dtype, tensor.device), []).append(tensor)
    for (group, *_), tensors in buckets.items():
        flat = _torch.flat(tensors)
        torch.distributed.all_reduce(flat, group=group)
        _torch.put_back(flat, tensors)
    return len(buckets)
