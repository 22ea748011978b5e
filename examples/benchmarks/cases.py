"""The cases that one Llama block is measured in, and what each has to reach."""

import dataclasses
from dataclasses import dataclass

BIASES = ("none", "qkv", "all")
MODES = ("default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A block, its adapters and a step. What is left out is a Llama-3-8B block that trains on 8192 tokens.

    Attributes:
        dim, ffn, heads, kv_heads: width of the residual stream and of the feed-forward, and the numbers of query and of
            key/value heads.
        experts: routed experts of a mixture in the place of the feed-forward, each as wide, two for a token, beside a
            shared one; 0 for none. They have adapters, too. Which two, a token's place says, in all forms alike.
        bias: which linears have a bias: "none", "qkv" (as Qwen 2.5) or "all".
        tokens, length: tokens a step, and tokens a sequence; the batch is `tokens // length` sequences.
        rank, dropout: of the adapters, on all seven linears; alpha is twice the rank.
        checkpoint: recompute the whole block in the backward.
        fp8: the frozen products in float8, see `benchmarks.float8`.
        no_grad: the forward alone, under `torch.no_grad` and in evaluation mode.
        mode: as for `torch.compile`, for all compiled forms.
        cuda_graphs: capture each form's step in one CUDA graph and time its replays.

    Raises:
        ValueError: the numbers do not fit one another.
    """

    dim: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv_heads: int = 8
    experts: int = 0
    bias: str = "none"
    tokens: int = 8192
    length: int = 2048
    rank: int = 16
    dropout: float = 0.0
    checkpoint: bool = False
    fp8: bool = False
    no_grad: bool = False
    mode: str = "default"
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "ffn", "heads", "kv_heads", "tokens", "length", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.dim % self.heads or self.dim // self.heads % 2 or self.heads % self.kv_heads:
            raise ValueError(
                f"dim {self.dim} must be {self.heads} heads of an even size, and {self.kv_heads} key/value heads must "
                "divide the heads"
            )
        if self.experts and (self.experts < 2 or self.fp8 or self.bias == "all"):
            raise ValueError(f"experts must be 0 or at least 2, without biases and not in float8; got {self.experts}")
        if self.tokens % self.length:
            raise ValueError(f"tokens {self.tokens} must be a multiple of length {self.length}")
        if self.bias not in BIASES or self.mode not in MODES:
            raise ValueError(f"bias must be one of {BIASES} and mode one of {MODES}; got {self.bias!r}, {self.mode!r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.cuda_graphs and self.mode in ("reduce-overhead", "max-autotune"):
            raise ValueError(f"cuda_graphs captures the step, which mode {self.mode!r} does by itself: choose one")
        if self.fp8 and any(size % 16 for size in (self.dim, self.ffn, self.kv_heads * self.dim // self.heads)):
            raise ValueError("fp8 products need widths that are multiples of 16")
        if self.no_grad and self.checkpoint:
            raise ValueError("checkpoint says what the backward recomputes: without a backward it means nothing")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the input: [sequences, length, dim]."""
        return self.tokens // self.length, self.length, self.dim

    @property
    def is_compared(self) -> bool:
        """Whether all forms compute the same, up to rounding.

        With dropout each draws masks of its own.
        """
        return not self.dropout or self.no_grad

    @property
    def shrunk(self) -> "Case":
        """The same case at a toy size, which a CPU runs in no time: for trying the program, never for its figures."""
        tokens = min(self.tokens, 64)
        return dataclasses.replace(
            self,
            dim=128,
            ffn=256,
            heads=4,
            kv_heads=min(self.kv_heads, 2),
            experts=min(self.experts, 4),
            tokens=tokens,
            length=min(self.length, max(tokens // 2, 1)),
            rank=max(self.rank // 8, 2),
            mode="default",
            cuda_graphs=False,
        )


@dataclass(frozen=True)
class Bar:
    """What `lora_fx` is to reach, as a ratio to the frozen block of the same run.

    Attributes:
        today: what plain LoRA under `torch.compile` was measured at before; None where it was not.
        must, aim: of the time.
        activation_must, activation_aim: of the peak activation, where there is a bar for it.
    """

    today: float | None
    must: float
    aim: float
    activation_must: float | None = None
    activation_aim: float | None = None


_QWEN = Case(dim=3584, ffn=18944, heads=28, kv_heads=4, bias="qkv")

# Most important first: what a time budget cuts off is at the end. Other models' shapes may be 0.02 above.
SUITE: dict[str, tuple[Case, Bar]] = {
    "m8192": (Case(), Bar(1.13, 1.06, 1.04, 1.10, 1.03)),
    "dropout": (Case(dropout=0.1), Bar(1.20, 1.07, 1.05, 1.10, 1.03)),
    "checkpoint": (Case(checkpoint=True), Bar(1.133, 1.06, 1.04)),
    "checkpoint-dropout": (Case(checkpoint=True, dropout=0.1), Bar(1.221, 1.07, 1.05)),
    "fp8": (Case(fp8=True), Bar(1.21, 1.09, 1.06)),
    "r64": (Case(rank=64), Bar(1.137, 1.07, 1.05)),
    "r128": (Case(rank=128), Bar(1.145, 1.09, 1.06)),
    "m2048": (Case(tokens=2048, cuda_graphs=True), Bar(1.183, 1.08, 1.05)),
    "m512": (Case(tokens=512, length=512, cuda_graphs=True), Bar(1.295, 1.15, 1.08)),
    "prefill": (Case(no_grad=True), Bar(1.097, 1.04, 1.02)),
    "decode-1": (Case(no_grad=True, tokens=1, length=1, cuda_graphs=True), Bar(1.40, 1.15, 1.08)),
    "decode-64": (Case(no_grad=True, tokens=64, length=1, cuda_graphs=True), Bar(1.386, 1.15, 1.08)),
    "m16384": (Case(tokens=16384), Bar(1.121, 1.06, 1.04)),
    "qwen2.5-7b": (_QWEN, Bar(None, 1.08, 1.06)),
    "llama2-7b": (Case(ffn=11008, kv_heads=32, bias="all"), Bar(None, 1.08, 1.06)),
    "experts": (Case(dim=2048, ffn=5632, heads=16, experts=8), Bar(None, 1.08, 1.06)),
    "llama3.2-3b-r64": (Case(dim=3072, ffn=8192, heads=24, rank=64), Bar(None, 1.09, 1.07)),
    "qwen2.5-7b-dropout": (dataclasses.replace(_QWEN, dropout=0.1), Bar(None, 1.09, 1.07)),
}
