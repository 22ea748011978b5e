"""Adapters that go to PEFT and come from it: how far apart the logits are, for small models of transformers.

    python examples/peft_round_trip.py

A model is trained for a few steps by one side, saved, and read by the other; both compute the logits of the same tokens
in float32. The program fails where they differ by more than 1e-5. `moved` is how far the adapter took the logits from
those of the base, so that equality says something.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import lora_fx
from lora_fx import LoRAConfig

LIMIT = 1e-5
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = ("Llama", "Qwen2", "Gemma2")  # without biases; with biases; with a head that is its embedding

Values = dict[str, Any]
# The same adapters as each side is told of them.
VARIANTS: dict[str, tuple[Values, Values]] = {
    "rank 8": (
        {"rank": 8, "alpha": 16.0, "exclude_modules": "lm_head"},
        {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    ),
    "ranks and alphas by pattern": (
        {
            "rank": 4,
            "alpha": 10.0,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"layers.1.mlp.down_proj": 7.0},
        },
        {
            "r": 4,
            "lora_alpha": 10,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"layers.1.mlp.down_proj": 7},
        },
    ),
    "rsLoRA, dropout": (
        {"rank": 5, "alpha": 8.0, "use_rslora": True, "dropout": 0.1, "target_modules": ["q_proj", "up_proj"]},
        {"r": 5, "lora_alpha": 8, "use_rslora": True, "lora_dropout": 0.1, "target_modules": ["q_proj", "up_proj"]},
    ),
    "DoRA": (
        {"rank": 4, "alpha": 8.0, "use_dora": True, "target_modules": ["v_proj", "o_proj", "gate_proj"]},
        {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["v_proj", "o_proj", "gate_proj"]},
    ),
}
# The same of the experts of a mixture, which the other models have none of.
EXPERTS: tuple[Values, Values] = (
    {"rank": 4, "target_modules": "q_proj", "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
)
ROWS = [(kind, name, variant) for kind in MODELS for name, variant in VARIANTS.items()]
ROWS.append(("Mixtral", "experts", EXPERTS))


def base(kind: str) -> nn.Module:
    """A causal language model of this kind, the same one at each call."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model.eval()


def trained(model: nn.Module, tokens: Tensor, steps: int) -> nn.Module:
    """`model` after a few optimizer steps on whatever requires gradients."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """[batch, tokens, vocabulary]."""
    values: Tensor = model(input_ids=tokens).logits
    return values


def to_peft(kind: str, variant: tuple[Values, Values], tokens: Tensor, steps: int, folder: Path) -> list[nn.Module]:
    """A model that was trained here, and what PEFT reads from its files."""
    ours = trained(lora_fx.install(base(kind), LoRAConfig(**variant[0])), tokens, steps)
    lora_fx.save_adapter(ours, folder)
    return [ours, peft.PeftModel.from_pretrained(base(kind), folder).eval()]


def from_peft(kind: str, variant: tuple[Values, Values], tokens: Tensor, steps: int, folder: Path) -> list[nn.Module]:
    """A model that was trained in PEFT, and what is read from its files here."""
    theirs = trained(peft.get_peft_model(base(kind), peft.LoraConfig(**variant[1])), tokens, steps)
    theirs.save_pretrained(folder)  # type: ignore[operator]  # a method of PEFT's model
    return [theirs, lora_fx.load_adapter(base(kind), folder)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the number of rows that differ by more than the limit."""
    parser = argparse.ArgumentParser(description="adapters to PEFT and back: differences of logits")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps before saving (default: %(default)s)")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers' own names, which PEFT uses
    ways: dict[str, Callable[..., list[nn.Module]]] = {"to PEFT": to_peft, "from PEFT": from_peft}
    tokens = torch.randint(SIZES["vocab_size"], (4, 24), generator=torch.Generator().manual_seed(1))
    print(f"{'model':8}  {'adapters':28}  {'way':10}  {'moved':>9}  {'difference':>10}")
    far = 0
    for kind, name, variant in ROWS:
        before = logits(base(kind), tokens)
        for way, exchange in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                there, read = exchange(kind, variant, tokens, options.steps, Path(folder))
            expected = logits(there, tokens)
            moved = (expected - before).abs().max().item()
            difference = (logits(read, tokens) - expected).abs().max().item()
            far += not difference <= LIMIT
            print(f"{kind:8}  {name:28}  {way:10}  {moved:9.3f}  {difference:10.1e}")
    return far


if __name__ == "__main__":
    sys.exit(bool(main()))
