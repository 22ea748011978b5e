"""How the factors of an adapter start (`LoRAConfig.init`), and the base weights that some of these starts change.

PiSSA and OLoRA put a part of the weight into the factors, ``W = R + s B A``, and the residual R in the weight's place.
What the weight was is kept on the CPU, to the bit; the first factors are kept too, with which files and
`lora_fx.disabled` speak of W and not of R.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_fx.placements import fill, is_dtensor


@dataclass
class ChangedBase:
    """What a base weight was before an initialisation changed it.

    Attributes:
        weight: [N, K], on the CPU.
        lora_a: [R, K], the first factors, which with the residual make up the weight.
        lora_b: [N, R].
        scale: of their product.
        shown: whether the module has the first factors in place of its own, within `lora_fx.disabled`.
    """

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    shown: bool = False


@torch.no_grad()
def reset_factors(lora_a: Tensor, lora_b: Tensor, init: str, rank: int) -> None:
    """Start A [R, K] and B [N, R] as `init` says, which is none that changes the base; what is behind `rank` is zero.

    ``"kaiming"``: A uniform as `nn.Linear`'s weight, B zero. ``"gaussian"``: A normal with deviation 1 / `rank`, B
    zero. ``"orthogonal"``: normal numbers, mixed by rows of one orthogonal matrix for A and by the others for B, so
    that B A is zero, up to rounding, and neither of them is (PEFT's;
    https://datta0.github.io/posts/rethink-lora-init).

    A distributed factor is drawn whole on every rank and cut from the first one's: the draw is that of a single
    process, and replicas agree on devices where distributed random numbers do not.
    """
    a, b = (torch.empty(t.shape, dtype=t.dtype, device=t.device) if is_dtensor(t) else t for t in (lora_a, lora_b))
    a[rank:].zero_()
    b.zero_()
    own_a, own_b = a[:rank], b[:, :rank]
    if rank and init == "orthogonal" and not a.is_meta:
        wide = torch.promote_types(a.dtype, torch.float32)
        q, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=wide, device=a.device))
        left = torch.randn(a.shape[1], rank // 2, dtype=wide, device=a.device)
        right = torch.randn(b.shape[0], rank // 2, dtype=wide, device=a.device)
        own_a.copy_((left @ q[0::2]).t() / 10.0)
        own_b.copy_((right @ q[1::2]) / 10.0)
    elif rank and init == "kaiming":
        nn.init.kaiming_uniform_(own_a, a=math.sqrt(5))
    elif rank and init == "gaussian":
        nn.init.normal_(own_a, std=1.0 / rank)
    for factor, whole in ((lora_a, a), (lora_b, b)):
        if whole is not factor:
            fill(factor, whole)


@torch.no_grad()
def decomposed(weight: Tensor, init: str, rank: int, scale: float, dtype: torch.dtype) -> ChangedBase:
    """What `weight` [N, K] is, with the factors that take a part of it.

    ``"pissa"``: with the singular values S, ``A = sqrt(S / s) V^T`` and ``B = U sqrt(S / s)`` of the `rank` largest
    (arXiv:2404.02948). ``"olora"``: the first rows of R and columns of Q in ``W = Q R`` (arXiv:2406.01775).

    Args:
        weight: plain; unchanged.
        init: one that changes the base.
        rank: of the factors, at most min(N, K).
        scale: s.
        dtype: of the factors.
    """
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if init == "pissa":
        u, values, v = torch.linalg.svd(wide, full_matrices=False)
        root = (values[:rank] / scale).sqrt()
        a, b = root.unsqueeze(1) * v[:rank], u[:, :rank] * root
    else:
        q, r = torch.linalg.qr(wide)
        a, b = r[:rank], q[:, :rank]
    kept = weight.detach().to("cpu", copy=True)
    return ChangedBase(kept, a.to(dtype).contiguous(), b.to(dtype).contiguous(), scale)


@torch.no_grad()
def put_residual(weight: Tensor, base: ChangedBase) -> None:
    """Write ``W - s B A`` into `weight`, which holds W. The factors count as they were rounded."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(weight.to(wide) - base.scale * (base.lora_b.to(wide) @ base.lora_a.to(wide)))


@torch.no_grad()
def put_back(weight: Tensor, base: ChangedBase) -> None:
    """Write into `weight`, which may have been moved, converted or distributed, what it was."""
    fill(weight, base.weight.to(weight.device, weight.dtype))


def check_bases(targets: Mapping[str, tuple[nn.Linear, int]], init: str, model: nn.Module) -> None:
    """Raise ValueError, naming the module and the fix, if `init` cannot change the base of a target.

    Args:
        targets: linear and rank by path.
        init: one that changes the base.
        model: where they are; a weight must not be shared with another module of it.
    """
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    for path, (module, rank) in targets.items():
        where = f"{path or 'the model itself'} ({type(module).__name__})"
        fix = f"use init='kaiming', or leave it out with exclude_modules=[{path!r}]"
        weight = module._parameters.get("weight")
        if weight is None or type(weight.data) is not Tensor or not _has_factors(weight):
            kind = "no plain parameter" if weight is None else f"{type(weight.data).__name__} {weight.dtype}"
            reason = "it is sharded" if is_dtensor(weight) else f"its weight is {kind}"
            hint = "install before it is sharded, or " if is_dtensor(weight) else "install before quantisation, or "
            raise ValueError(f"{where}: init={init!r} changes the base weight, and {reason}: {hint}{fix}")
        if weight.is_meta:
            raise ValueError(
                f"{where}: init={init!r} takes the weight apart, and on the meta device there is none yet: give the "
                f"model storage and weights before install, or {fix}"
            )
        if holders[id(weight)] > 1:
            raise ValueError(f"{where} shares its weight with another module, which init={init!r} would change: {fix}")
        if rank > min(weight.shape):
            raise ValueError(
                f"{where}: init={init!r} needs a rank of at most min{tuple(weight.shape)}, got {rank}: lower it "
                f"(rank_pattern={{{path!r}: {min(weight.shape)}}}), or {fix}"
            )
        if not torch.isfinite(weight).all():
            raise ValueError(f"{where} holds NaN or infinity, which cannot be taken apart: load good weights first")


def _has_factors(weight: Tensor) -> bool:
    return weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and weight.ndim == 2


def plain_factors(base: ChangedBase, lora_a: Tensor, lora_b: Tensor, scale: float) -> tuple[Tensor, Tensor, float]:
    """Factors of twice the rank, and their scale, that add to the weight W what the present ones add to its residual.

    ``R + s B A = W + s [B, -(s0 / s) B0] [A; A0]``, as PEFT's `subtract_mutated_init` does it.

    Args:
        base: with A0, B0 and s0.
        lora_a: A [R, K], whole and on the CPU.
        lora_b: B [N, R], likewise.
        scale: s.
    """
    first_a, first_b = base.lora_a.to(lora_a), base.lora_b.to(lora_b)
    if scale == 0.0:
        return torch.cat((lora_a, first_a)), torch.cat((torch.zeros_like(lora_b), -first_b), dim=1), base.scale
    return torch.cat((lora_a, first_a)), torch.cat((lora_b, first_b * (-base.scale / scale)), dim=1), scale
