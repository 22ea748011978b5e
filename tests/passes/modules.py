"""Small modules for the tests of the passes: linear layers with little around them, from [..., dim]."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QKV(nn.Module):
    """Three linears that read one input; keys and values are narrower."""

    def __init__(self, dim: int = 48, kv: int = 24, bias: bool = False) -> None:
        super().__init__()
        self.wq = nn.Linear(dim, dim, bias=bias)
        self.wk = nn.Linear(dim, kv, bias=bias)
        self.wv = nn.Linear(dim, kv, bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.wq(x), self.wk(x), self.wv(x)


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary embeddings."""

    def __init__(self, dim: int = 48, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.size = dim // heads
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * self.size, bias=False)
        self.wv = nn.Linear(dim, kv_heads * self.size, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return self.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding of [batch, heads, tokens, size]."""
    half = x.shape[-1] // 2
    places, pairs = (torch.arange(n, device=x.device) for n in (x.shape[-2], half))
    angles = places[:, None] * 100.0 ** -(pairs / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        y, rstd = torch.ops.aten._fused_rms_norm(x, list(weight.shape), weight, None)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        return torch.ops.aten._fused_rms_norm_backward(dy, x, list(weight.shape), rstd, weight, [True, False])[0], None


class FusedNorm(nn.RMSNorm):
    """An RMSNorm over a frozen weight whose graphs on the CPU are those on a GPU.

    There autograd knows it as one operator, which Inductor decomposes afterwards: backward computes ``x * rstd`` again.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _FusedNorm.apply(x, self.weight)


class Mlp(nn.Module):
    """SwiGLU, or another gate."""

    def __init__(self, dim: int = 48, hidden: int = 96, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """A block of a Llama."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = Attention(dim)
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp = Mlp(dim, 2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Layers(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, depth: int = 2, dim: int = 48) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Residual(nn.Module):
    """Each linear's output is added to its input, and the sum is the next one's input."""

    def __init__(self, dim: int = 48, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Twice(nn.Module):
    """One linear, called twice in a row."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


class TwiceOnOneInput(nn.Module):
    """A linear that is called twice on one input, beside another."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.shared = nn.Linear(dim, dim, bias=False)
        self.other = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) * torch.sigmoid(self.shared(x)) * self.other(x)
