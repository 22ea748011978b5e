"""Where the factors of an adapter live when the weight that they adapt is a DTensor.

    column-wise base    W [N, K] Shard(0)     A [R, K] Replicate    B [N, R] Shard(0)     m [N] Shard(0)
    row-wise base       W [N, K] Shard(1)     A [R, K] Shard(1)     B [N, R] Replicate    m [N] Replicate
    replicated base     W [N, K] Replicate    A [R, K] Replicate    B [N, R] Replicate    m [N] Replicate

With these the branch needs no collective of its own. Column-wise, every rank has all of ``h = x A^T`` and computes its
columns of ``h B^T``. Row-wise, every rank has a partial ``h``, the branch is as partial as the base, and one reduction
serves their sum. (DoRA has two more there, of N numbers each: the norms of rows that are spread over the ranks, and the
gradient of the magnitudes.) A rule for each mesh dimension, so it holds for meshes of any number of dimensions.

Nothing here is imported from `torch.distributed` before a model is distributed: a tensor can only be a DTensor when
the class is loaded.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_dtensor(tensor: object) -> bool:
    """Whether `tensor` is a `torch.distributed.tensor.DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def adapter_placements(weight: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
    """The placements of ``lora_a``, ``lora_b`` and ``lora_magnitude`` that those of the weight [N, K] imply.

    Args:
        weight: one placement for each dimension of the mesh.

    Raises:
        ValueError: the weight is partial on some dimension: it is the term of a sum, not a weight.
    """
    from torch.distributed.tensor import Replicate

    a: list[Any] = []
    b: list[Any] = []
    for placement in weight:
        if placement.is_partial():
            raise ValueError(f"a weight placed as {tuple(weight)} is partial: reduce it before it gets an adapter")
        # Shard and _StridedShard, which are no subclasses of one another, have a `dim`; Replicate has none.
        dim = getattr(placement, "dim", None)
        a.append(placement if dim == 1 else Replicate())
        b.append(placement if dim == 0 else Replicate())
    return {"lora_a": tuple(a), "lora_b": tuple(b), "lora_magnitude": tuple(b)}


@torch.no_grad()
def placed(name: str, parameter: nn.Parameter, weight: object) -> nn.Parameter:
    """`parameter`, which is about to become the factor `name`, on the placements that `weight` implies.

    `parallelize_module` hands every parameter of a linear over with the weight's placement (column-wise), or
    replicated (row-wise). What is not a DTensor yet, or lives on another mesh, is returned as it is.
    """
    if not (is_dtensor(parameter) and is_dtensor(weight)):
        return parameter
    tensor: Any = parameter
    base: Any = weight
    wanted = adapter_placements(base.placements)[name]
    if tensor.placements == wanted or tensor.device_mesh != base.device_mesh:
        return parameter
    moved = tensor.detach().redistribute(placements=wanted)
    return nn.Parameter(moved, requires_grad=parameter.requires_grad)


def replica_ranks(tensor: object) -> tuple[tuple[int, ...], ...]:
    """The ranks of each process group that all have the same values in `tensor`; none for a plain one.

    Not the groups' names: equal meshes have groups of their own, and DTensor takes either mesh for the other.
    """
    if not is_dtensor(tensor):
        return ()
    theirs: Any = tensor
    mesh = theirs.device_mesh
    groups = (mesh.get_group(dim) for dim, p in enumerate(theirs.placements) if p.is_replicate())
    return tuple(tuple(torch.distributed.get_process_group_ranks(group)) for group in groups)


def expert_placements(weight: Sequence[Any], *, transposed: bool = False) -> dict[str, tuple[Any, ...]]:
    """The placements of A [E, R, K] and B [E, N, R], as "lora_a" and "lora_b", that those of the weight imply.

        experts          W [E, N, K] Shard(0)     A Shard(0)     B Shard(0)
        columns of each  W [E, N, K] Shard(1)     A Replicate    B Shard(1)
        rows of each     W [E, N, K] Shard(2)     A Shard(2)     B Replicate

    Args:
        weight: one placement for each dimension of the mesh.
        transposed: the weight is [E, K, N].

    Raises:
        ValueError: the weight is partial on some dimension.
    """
    from torch.distributed.tensor import Replicate, Shard

    def shard(placement: Any, dim: int) -> Any:
        return placement if placement.dim == dim else Shard(dim)

    outputs, inputs = (2, 1) if transposed else (1, 2)
    a: list[Any] = []
    b: list[Any] = []
    for placement in weight:
        if placement.is_partial():
            raise ValueError(f"a weight placed as {tuple(weight)} is partial: reduce it before it gets an adapter")
        dim = getattr(placement, "dim", None)
        a.append(placement if dim == 0 else shard(placement, 2) if dim == inputs else Replicate())
        b.append(placement if dim == 0 else shard(placement, 1) if dim == outputs else Replicate())
    return {"lora_a": tuple(a), "lora_b": tuple(b)}


@torch.no_grad()
def placed_experts(name: str, parameter: nn.Parameter, weight: object, transposed: bool) -> nn.Parameter:
    """`parameter`, the factor `name` of a stack of experts, on the placements that `weight` implies.

    Also if it is plain: whoever shards the weights of experts by hand knows nothing of factors. All ranks then get the
    values of the mesh's first one. What lives on another mesh is returned as it is.
    """
    if not is_dtensor(weight):
        return parameter
    base: Any = weight
    wanted = expert_placements(base.placements, transposed=transposed)[name]
    tensor: Any = parameter
    if not is_dtensor(parameter):
        moved = distributed(tensor.detach(), base.device_mesh, wanted)
    elif tensor.placements == wanted or tensor.device_mesh != base.device_mesh:
        return parameter
    else:
        moved = tensor.detach().redistribute(placements=wanted)
    return nn.Parameter(moved, requires_grad=parameter.requires_grad)


def local_expert_factor(factor: Tensor, weight: Tensor) -> Tensor:
    """This rank's part of a factor, for products with this rank's part of the weight; a plain factor itself.

    Where ranks hold parts of each expert, a factor that is replicated over them gets a term of its gradient on each.
    """
    if not is_dtensor(factor):
        return factor
    from torch.distributed.tensor import Partial

    theirs: Any = factor
    base: Any = weight
    gradient = [
        Partial() if mine.is_replicate() and not whole.is_replicate() else mine
        for mine, whole in zip(theirs.placements, base.placements)
    ]
    part: Tensor = theirs.to_local(grad_placements=gradient)
    return part


@torch.no_grad()
def like_weight(name: str, full: Tensor, weight: object) -> Tensor:
    """The factor `name` with the values `full`, distributed as the DTensor `weight` implies; plain if that is plain.

    Every rank gets the values of the mesh's first rank, whatever its own random numbers were.
    """
    if not is_dtensor(weight):
        return full
    base: Any = weight
    return distributed(full, base.device_mesh, adapter_placements(base.placements)[name])


@torch.no_grad()
def fill(tensor: Tensor, full: Tensor) -> None:
    """Write the values `full` [the global shape] into `tensor`, plain or DTensor; ranks agree as in `like_weight`."""
    if is_dtensor(tensor):
        theirs: Any = tensor
        full = distributed(full, theirs.device_mesh, theirs.placements)
    tensor.copy_(full)


def distributed(full: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """A DTensor of the values that the mesh's first rank has in `full`."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    # First everywhere, then cut: `distribute_tensor` does not know every placement that FSDP makes.
    return distribute_tensor(full, mesh, [Replicate()] * mesh.ndim).redistribute(placements=placements)


def replicated_like(number: Tensor, weight: object) -> Tensor:
    """A 0-d tensor as the neighbours of the DTensor `weight` need it: replicated on its mesh; plain if that is plain.

    Every rank has the same number, so nothing is sent.
    """
    if not is_dtensor(weight):
        return number
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]  # a DTensor has one
    return DTensor.from_local(number, mesh, [Replicate()] * mesh.ndim, run_check=False)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor itself."""
    theirs: Any = tensor
    part: Tensor = theirs.to_local() if is_dtensor(tensor) else tensor
    return part


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """`local` of each of hundreds of tensors, without two calls for each: a GPU may be waiting."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return list(tensors)
    kind: Any = module.DTensor
    return [tensor.to_local() if isinstance(tensor, kind) else tensor for tensor in tensors]


def gathered(tensor: Tensor) -> Tensor:
    """The global values of a DTensor, a collective call; a plain tensor itself."""
    theirs: Any = tensor
    whole: Tensor = theirs.full_tensor() if is_dtensor(tensor) else tensor
    return whole


def deferred(factor: Tensor) -> Tensor:
    """`factor` in a form whose gradient is not reduced over the mesh dimensions on which it is replicated.

    Its gradient is the term of this rank, labelled as if it were the sum: FSDP then reduces over its own dimensions
    alone, and `lora_fx.distributed.DeferredReduction` does the rest for all adapters at once. Sums over different
    dimensions may be taken in any order. A plain tensor is returned as it is.

    Dynamo is to put it into graphs as one call, see `torch.compiler.allow_in_graph`: AOTAutograd then looks into it.
    """
    relabelled: Tensor = _TermOfGradient.apply(factor) if is_dtensor(factor) else factor
    return relabelled


class _TermOfGradient(torch.autograd.Function):
    """A DTensor as it is; its gradient stays this rank's term where the DTensor is replicated.

    `DTensor.from_local` has `grad_placements` for this in torch 2.13, and not in 2.11.
    """

    @staticmethod
    def forward(ctx: Any, factor: Any) -> Any:
        ctx.placements = factor.placements
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        terms = [Partial() if placement.is_replicate() else placement for placement in ctx.placements]
        term = grad.redistribute(placements=terms).to_local()
        return DTensor.from_local(
            term, grad.device_mesh, ctx.placements, run_check=False, shape=grad.shape, stride=grad.stride()
        )
