"""The low-rank branch of LoRA, written once: modules run it and tests compare with it.

Legend, as everywhere in this package: M tokens (all leading dimensions), K inputs, N outputs, R rank.
"""

from collections.abc import Callable

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
