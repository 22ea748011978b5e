"""Fine-tune a model of transformers with its own `Trainer`, save the adapter as PEFT does, and load it again.

    python examples/hf_finetune.py
    python examples/hf_finetune.py --model qwen3 --steps 200 --checkpointing --out adapter

The model is small and starts from random weights, because nothing is downloaded; it reads the documentation topics of
this Python, a byte a token. The program fails if the adapter did not bring the held-out loss down, or if the model that
loads it computes other logits than the one that was trained. It needs transformers and accelerate, which the extra
`test` brings.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import lora_fx
from corpus import documentation
from finetune import positive
from hf_models import KINDS, checkpoint
from lora_fx import LoRAConfig
from trainer import even_windows, random_windows

CAUSAL = [name for name, kind in KINDS.items() if kind.inputs == "causal"]
LIMIT = 1e-4  # between logits of compiled code and of eager, in float32
PROMPT = b"The following "

Windows = list[dict[str, Tensor]]


def windows(tokens: Tensor) -> Windows:
    """Windows [N, B, S] as the `Trainer` takes them; the model shifts the labels itself."""
    return [{"input_ids": window, "labels": window} for window in tokens.flatten(0, 1)]


def fine_tuned(options: argparse.Namespace, folder: Path) -> tuple[nn.Module, float, float]:
    """A compiled model after training its adapters, and its held-out loss before and after."""
    text = documentation()
    print(text)
    model = KINDS[options.model].sized(options.layers).build()
    if options.checkpointing:
        checkpoint(model)
    lora_fx.compile(model, LoRAConfig(rank=options.rank, alpha=2 * options.rank, dropout=0.0))
    sizes = options.batch, options.length
    training = windows(random_windows(text.train_tokens(), options.steps, *sizes, seed=0))
    held_out = windows(even_windows(text.held_out_tokens(), 4, *sizes))
    first: Any = torch.utils.data.default_collate(training[: options.batch])
    print(lora_fx.explain(model, **first))

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        per_device_eval_batch_size=options.batch,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        logging_steps=max(1, options.steps // 4),
        save_strategy="no",
        report_to=[],
        use_cpu=options.device == "cpu",
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=training, eval_dataset=held_out)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return model, before, trainer.evaluate()["eval_loss"]


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """[B, S, vocabulary]."""
    values: Tensor = model.eval()(input_ids=tokens).logits
    return values


def continued(model: Any, prompt: bytes, length: int) -> str:
    """What the model writes after `prompt`, the likeliest byte each time."""
    tokens = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    written = model.eval().generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length, do_sample=False
    )
    return bytes(written[0].tolist()).decode("utf-8", "replace")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a small model of transformers, save its adapter and load it again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--model", choices=CAUSAL, default="llama", help="which kind of language model")
    option("--layers", type=positive, default=2, help="layers of the model")
    option("--steps", type=positive, default=120, help="optimizer steps")
    option("--batch", type=positive, default=8, help="windows a step")
    option("--length", type=positive, default=64, help="bytes a window")
    option("--rank", type=positive, default=8, help="rank of the adapters; alpha is twice that")
    option("--lr", type=float, default=1e-2, help="peak learning rate")
    option("--checkpointing", action="store_true", help="gradient checkpointing, by the model's own switch")
    option("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="where")
    option("--out", type=Path, default=None, help="folder for the adapter; a temporary one otherwise")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save, load, compare; 1 if the loss did not fall or the logits differ."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    with tempfile.TemporaryDirectory() as scratch:
        model, before, after = fine_tuned(options, Path(scratch))
        folder = lora_fx.save_adapter(model, options.out or Path(scratch) / "adapter")
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        print(f"held-out loss {before:.3f} -> {after:.3f}; adapter of {size / 1024:.0f} KiB in {folder}")

        loaded = lora_fx.load_adapter(KINDS[options.model].sized(options.layers).build(), folder)
        loaded = loaded.to(options.device)
    tokens = torch.stack([w["input_ids"] for w in windows(even_windows(documentation().held_out_tokens(), 1, 4, 32))])
    tokens = tokens.to(options.device)
    trained = logits(model, tokens)
    with lora_fx.disabled(loaded):
        moved = (logits(loaded, tokens) - trained).abs().max().item()
    difference = (logits(loaded, tokens) - trained).abs().max().item()
    print(f"logits of the loaded model differ by {difference:.1e} (without the adapter by {moved:.1e})")
    print(f"it writes: {continued(loaded, PROMPT, 48)!r}")
    return int(not (after < before and difference <= LIMIT))


if __name__ == "__main__":
    sys.exit(main())
