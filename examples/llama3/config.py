"""Sizes of Llama 3, and the LoRA configuration of the debug model.

`debug` is torchtitan's debug model (`llama3_debugmodel`): 256 wide, 6 layers, 16 heads, a vocabulary of 2048.
`8B` is Llama-3-8B. `mixtral` has the widths and the eight experts of Mixtral-8x7B and a quarter of its layers, `moe` is
half as wide; both have a shared expert, too. `tiny` is for tests: two layers and grouped key/value heads; `tiny-moe`
has experts as well.
"""

from dataclasses import dataclass

from lora_fx import LoRAConfig


@dataclass(frozen=True)
class LlamaConfig:
    """The size of a Llama 3.

    Attributes:
        dim: width of the residual stream.
        n_layers: number of transformer blocks.
        n_heads: number of query heads; the head size is `dim // n_heads`.
        n_kv_heads: number of key and value heads; None means `n_heads`.
        vocab_size: rows of the embedding and of the output projection, which are not tied.
        multiple_of: the feed-forward size is rounded up to a multiple of this.
        ffn_dim_multiplier: scales the feed-forward size before rounding.
        norm_eps: epsilon of every RMSNorm.
        rope_theta: base of the rotary frequencies.
        max_seq_len: length of the table of rotary angles, in tokens.
        n_experts: number of routed experts of each block; 0 is a plain feed-forward.
        experts_per_token: how many of them a token is sent to.
    """

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    n_kv_heads: int | None = None
    multiple_of: int = 256
    ffn_dim_multiplier: float = 1.0
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    max_seq_len: int = 8192
    n_experts: int = 0
    experts_per_token: int = 2

    def __post_init__(self) -> None:
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} must be {self.n_heads} heads of an even size")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"{self.n_heads} query heads cannot share {self.kv_heads} key/value heads evenly")
        if self.n_experts and not 1 <= self.experts_per_token <= self.n_experts:
            raise ValueError(f"a token cannot be sent to {self.experts_per_token} of {self.n_experts} experts")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def ffn_dim(self) -> int:
        """Llama's rule: two thirds of 4 * dim (SwiGLU has three matrices, not two), scaled, then rounded up."""
        size = int(self.ffn_dim_multiplier * int(2 * (4 * self.dim) / 3))
        return self.multiple_of * ((size + self.multiple_of - 1) // self.multiple_of)


CONFIGS: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=256, multiple_of=32, max_seq_len=256),
    "tiny-moe": LlamaConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=256, multiple_of=32, max_seq_len=256, n_experts=4
    ),
    "debug": LlamaConfig(dim=256, n_layers=6, n_heads=16, vocab_size=2048),
    "8B": LlamaConfig(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=128256,
        multiple_of=1024,
        ffn_dim_multiplier=1.3,
    ),
    "mixtral": LlamaConfig(
        dim=4096,
        n_layers=8,
        n_heads=32,
        n_kv_heads=8,
        vocab_size=32000,
        multiple_of=1024,
        ffn_dim_multiplier=1.3,
        n_experts=8,
    ),
    "moe": LlamaConfig(dim=2048, n_layers=16, n_heads=16, n_kv_heads=8, vocab_size=32000, n_experts=8),
}

# Every linear of the model, the output projection included. alpha = 2 * rank, so the scale is 2 at any rank.
LORA: dict[str, LoRAConfig] = {
    "debug": LoRAConfig(rank=8, alpha=16.0),
}
