"""The low-rank branch of LoRA, written once: modules run it and tests compare with it.

Legend, as everywhere in this package: M tokens (all leading dimensions), K inputs, N outputs, R rank.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def low_rank(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor | float,
    dropout: float = 0.0,
    training: bool = False,
    product: Callable[[Tensor, Tensor], Tensor] = F.linear,
) -> Tensor:
    """What LoRA adds to a linear's output: ``scale * (dropout(x) A^T) B^T`` (arXiv:2106.09685, section 4.1).

    The scale multiplies the [M, N] product, which is the formula as it is written; the passes move it where it costs
    nothing. The adapters are cast to the dtype of what they meet, never ``x`` to theirs: float32 adapters on a
    bfloat16 model keep the activations bfloat16. Equal dtypes add no cast, and autocast decides as it does for
    ``F.linear``.

    Args:
        x: [..., K] activations.
        lora_a: [R, K].
        lora_b: [N, R].
        scale: a number, or a 0-d tensor (which does not promote the dtype of the product).
        dropout: the probability that an element of ``x`` is dropped in this branch; the base sees ``x`` itself.
        training: dropout acts in training only.
        product: how the base multiplies its input by its weight. Other than ``F.linear`` for a stack of experts, say,
            where the factors are stacks as well; they are laid out as the weight is.

    Returns:
        [..., N], in the dtype of ``product(x, lora_a)``.
    """
    if training and dropout > 0.0:
        x = F.dropout(x, dropout)
    h = product(x, lora_a.to(x.dtype))
    return torch.mul(product(h, lora_b.to(h.dtype)), scale)


def low_rank_rows(x: Tensor, rows: Tensor, stack: Sequence[Tensor], enabled: Tensor | float = 1.0) -> Tensor:
    """`low_rank` where each row of a batch has an adapter of its own, or none: two products for all n adapters.

    A row runs through all of them, and what belongs to others is set to zero between the two products (set, and not
    multiplied by zero: what overflows in one row's adapter stays out of the others). That is the arithmetic of one
    adapter of rank n R, and the same graph whichever adapters the rows use.

    Args:
        x: [batch, ..., K] activations, or [batch * tokens, K] with a row's tokens side by side.
        rows: [batch], the index of each row's adapter; -1 for none.
        stack: of all adapters together A [n R, K], B [N, n R] and the scales [n].
        enabled: multiplies all scales.

    Returns:
        [..., N], in the dtype of ``F.linear(x, lora_a)``.

    Raises:
        ValueError: the batch of `x` is not that of `rows`.
    """
    lora_a, lora_b, scales = stack
    batch, n = rows.shape[0], scales.shape[0]
    if x.dim() < 2 or (x.shape[0] % batch if x.dim() == 2 else x.shape[0] != batch):
        raise ValueError(f"adapters were assigned to {batch} rows, and a linear got an input of {list(x.shape)}")
    h = F.linear(x, lora_a.to(x.dtype))
    mine = rows[:, None] == torch.arange(n, device=rows.device)
    apart = h.reshape(batch, -1, n, h.shape[-1] // n) * (scales * enabled)[:, None]
    chosen = torch.where(mine[:, None, :, None], apart, 0.0).to(h.dtype).reshape(h.shape)
    return F.linear(chosen, lora_b.to(h.dtype))
