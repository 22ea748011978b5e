"""The Llama 3 transformer: rotary positions, grouped-query attention, RMSNorm, SwiGLU, an output of its own.

Modules carry torchtitan's names (`tok_embeddings`, `layers.0.attention.wq`, `feed_forward.w1`, ...), so that plans
for tensor, pipeline and context parallelism written for torchtitan fit. Weights come from `init_weights` alone:

    with torch.device("meta"):
        model = Llama(CONFIGS["debug"])
    model.to_empty(device="cpu")
    model.init_weights()

Legend of shapes: B batch, S sequence, D width, H query heads, G key/value heads, E head size, F feed-forward size,
V vocabulary.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama3.config import LlamaConfig
from llama3.moe import MixtureOfExperts


def rope_table(head_dim: int, length: int, theta: float) -> Tensor:
    """Cosine and sine of the rotary angle of each position and pair of channels.

    Args:
        head_dim: size E of a head, even.
        length: number of positions.
        theta: base of the frequencies; pair i turns by `theta ** (-2 i / E)` radians a position
            (RoFormer, https://arxiv.org/abs/2104.09864, section 3.2.2).

    Returns:
        float32 tensor [length, E / 2, 2], on the current default device; the last axis is (cos, sin).
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of `x` by the angle of its position.

    Args:
        x: queries or keys [B, S, H, E].
        table: `rope_table` cut to these positions, [S, E / 2, 2].

    Returns:
        The rotated tensor, [B, S, H, E] in the dtype of `x`; the arithmetic is float32.
    """
    cos, sin = table.unsqueeze(1).unbind(-1)  # [S, 1, E / 2]: one angle for all heads
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query of `q` [B, H, S, E] attends to the keys and values [B, G, S, E] up to its position: [B, H, S, E]."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class Attention(nn.Module):
    """Causal grouped-query attention: H query heads share G key/value heads.

    `attend` is how; context parallelism puts another function of the same shapes there.
    """

    def __init__(self, config: LlamaConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention
        kv_dim = config.kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False, dtype=dtype)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False, dtype=dtype)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False, dtype=dtype)
        self.wo = nn.Linear(config.dim, config.dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Attend over `x` [B, S, D] with rotary angles `rope` [S or more, E / 2, 2]; returns [B, S, D]."""
        # -1 and not the configured head count: under tensor parallelism a rank holds some of the heads.
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.wq, self.wk, self.wv))
        # Here and not outside: under sequence parallelism a block sees a part of the sequence, attention all of it.
        rope = rope[: q.shape[1]]
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        y = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.wo(y.transpose(1, 2).flatten(-2))

    def init_weights(self, output_std: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.trunc_normal_(self.wo.weight, std=output_std)


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False, dtype=dtype)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False, dtype=dtype)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, S, D] to [B, S, D] through the F channels of the gate."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))

    def init_weights(self, output_std: float) -> None:
        nn.init.trunc_normal_(self.w1.weight, std=0.02)
        for linear in (self.w2, self.w3):
            nn.init.trunc_normal_(linear.weight, std=output_std)


class TransformerBlock(nn.Module):
    """Attention, then the feed-forward, each on a normalised input and added to the residual stream."""

    def __init__(self, layer_id: int, config: LlamaConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.attention = Attention(config, dtype)
        self.feed_forward: FeedForward | MixtureOfExperts = FeedForward(config, dtype)
        if config.n_experts:
            self.feed_forward = MixtureOfExperts(config, self.feed_forward, dtype)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps, dtype=dtype)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps, dtype=dtype)
        # Deeper blocks start smaller, so that the residual stream does not grow with depth.
        self.output_std = 0.02 / (2 * (layer_id + 1)) ** 0.5

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Map the residual stream [B, S, D] to [B, S, D]; `rope` is [S or more, E / 2, 2]."""
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.feed_forward(self.ffn_norm(x))

    def init_weights(self) -> None:
        self.attention_norm.reset_parameters()
        self.ffn_norm.reset_parameters()
        self.attention.init_weights(self.output_std)
        self.feed_forward.init_weights(self.output_std)


class Llama(nn.Module):
    """The whole model: token ids in, logits out.

    A pipeline stage sets the parts that it does not hold to None and deletes foreign layers; what is left still runs,
    with the residual stream in place of token ids or logits.

    Args:
        config: the size.
        dtype: dtype of all parameters (None: torch's default). Rotary angles stay float32.
    """

    rope: Tensor

    def __init__(self, config: LlamaConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings: nn.Embedding | None = nn.Embedding(config.vocab_size, config.dim, dtype=dtype)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(i, config, dtype) for i in range(config.n_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(config.dim, eps=config.norm_eps, dtype=dtype)
        self.output: nn.Linear | None = nn.Linear(config.dim, config.vocab_size, bias=False, dtype=dtype)
        self.register_buffer("rope", self._rope_table(), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids [B, S] to logits [B, S, V]."""
        x = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            x = layer(x, self.rope)
        x = self.norm(x) if self.norm is not None else x
        return self.output(x) if self.output is not None else x

    def init_weights(self) -> None:
        """Give every parameter its initial value, and rebuild the rotary angles that `to_empty` lost."""
        with torch.device(self.rope.device):
            self.rope = self._rope_table()
        if self.tok_embeddings is not None:
            nn.init.normal_(self.tok_embeddings.weight)
        for layer in self.layers.values():
            cast(TransformerBlock, layer).init_weights()
        if self.norm is not None:
            self.norm.reset_parameters()
        if self.output is not None:
            std = self.config.dim**-0.5
            nn.init.trunc_normal_(self.output.weight, std=std, a=-3 * std, b=3 * std)

    def _rope_table(self) -> Tensor:
        return rope_table(self.config.head_dim, self.config.max_seq_len, self.config.rope_theta)
