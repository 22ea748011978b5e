"""LoRA's cost in a training step of a whole model: Llama-3-8B with random weights in bfloat16, on one GPU.

    python examples/benchmarks/model.py --json model.json              # 32 layers, one sequence of 4096 tokens, rank 16
    python examples/benchmarks/model.py --checkpoint --batch 4
    python examples/benchmarks/model.py --device cpu --config tiny --length 32                # does it run at all

A step is the loss of the next token, its backward, and for the LoRA forms AdamW over the adapters, which the ratio to
the frozen model therefore includes. The frozen model runs forward and backward as well: in all forms the embeddings are
given a gradient, as if something before the first block were trained, so that every block does the same work and one
compiled graph serves all of them. Adapters are on the seven linears of every block. Blocks are compiled one by one, in
every form; so is the output with its loss, which has no adapter. The forms run one after another, since two do not fit
in memory: the frozen model runs first and, unless `--once` is given, again at the end, so that its two rows show how
far the GPU drifted.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import compiling, format_table, write_json
from benchmarks.forms import FROZEN, LABELS, OURS, PEFT, PLAIN, Checkpointed, available, build_form, random_adapters
from benchmarks.runner import describe, free
from benchmarks.timing import Device, compile_caches, environment
from torch import Tensor, nn

from llama3 import CONFIGS, Llama, LlamaConfig, TransformerBlock

FORMS = (FROZEN, PLAIN, PEFT, OURS)


class Head(nn.Module):
    """The end of the model: normalisation, output projection, loss."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        assert model.norm is not None and model.output is not None
        self.norm, self.output = model.norm, model.output

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        """Residual stream [B, S, D] and token ids [B, S] -> the mean negative log-likelihood of a token, 0-d."""
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class Trained(nn.Module):
    """The model with its loss, its blocks where forms find them: `blocks` holds all linears that get adapters."""

    rope: Tensor

    def __init__(self, model: Llama, length: int, checkpointed: bool) -> None:
        super().__init__()
        assert model.tok_embeddings is not None
        self.embeddings = model.tok_embeddings
        blocks = [cast(TransformerBlock, block) for block in model.layers.values()]
        self.blocks = nn.ModuleList([Checkpointed(block) for block in blocks] if checkpointed else blocks)
        self.head = Head(model)
        self.register_buffer("rope", model.rope[:length].clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, S + 1] -> the loss of predicting each from those before it."""
        x = self.embeddings(tokens[:, :-1]).detach().requires_grad_()
        for block in self.blocks:
            x = block(x, self.rope)
        return self.head(x, tokens[:, 1:])


@dataclass(frozen=True)
class Row:
    """What was found of one form.

    Attributes:
        form: a key of `LABELS`.
        milliseconds, low, high: of a step, median and quartiles.
        tokens_per_second: at the median.
        peak_bytes: the most memory in use during the timed steps; None on a CPU.
        weight_bytes: the part of it that was in use before the first step: weights and adapters.
        compile_seconds: the first step.
        loss: of the first step; all LoRA forms start from one set of adapters.
        trained: parameters that the optimizer updates.
    """

    form: str
    milliseconds: float
    low: float
    high: float
    tokens_per_second: float
    peak_bytes: int | None
    weight_bytes: int | None
    compile_seconds: float
    loss: float
    trained: int


def build(options: argparse.Namespace) -> Trained:
    """The frozen model in bfloat16, made on the device at once: as float32 it would take twice the memory."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Llama(configuration(options), dtype=torch.bfloat16)
        model.init_weights()
    return Trained(model, options.length, options.checkpoint).requires_grad_(False)


def configuration(options: argparse.Namespace) -> LlamaConfig:
    """The model that the options ask for."""
    config = CONFIGS[options.config]
    return config if options.layers is None else dataclasses.replace(config, n_layers=options.layers)


def run_form(name: str, options: argparse.Namespace, device: Device) -> Row:
    """Train one form for some steps. All that it made is gone afterwards, except from the compile caches."""
    model = build(options)
    adapters = random_adapters(model.blocks, options.rank, seed=1)
    form = build_form(
        name,
        model.blocks,
        rank=options.rank,
        dropout=options.dropout,
        adapters=adapters,
        parts=lambda blocks: list(blocks.children()),
        in_place=True,
    )
    del adapters
    model.head.compile(dynamic=False)
    generator = torch.Generator(device.name).manual_seed(2)
    vocabulary = configuration(options).vocab_size
    shape = (options.batch, options.length + 1)
    tokens = torch.randint(vocabulary, shape, generator=generator, device=device.name)
    trained = list(form.adapters.values())
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.cuda) if trained else None

    def step() -> Tensor:
        loss: Tensor = model(tokens)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    device.synchronise()
    weights = torch.cuda.memory_allocated() if device.cuda else None
    began = time.perf_counter()
    loss = step().item()
    compile_seconds = time.perf_counter() - began
    step()
    if device.cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = device.each(step, options.steps)
    low, middle, high = statistics.quantiles(seconds, n=4)
    return Row(
        form=name,
        milliseconds=1e3 * middle,
        low=1e3 * low,
        high=1e3 * high,
        tokens_per_second=options.batch * options.length / middle,
        peak_bytes=torch.cuda.max_memory_allocated() if device.cuda else None,
        weight_bytes=weights,
        compile_seconds=compile_seconds,
        loss=loss,
        trained=sum(parameter.numel() for parameter in trained),
    )


def run_forms(
    forms: Sequence[str], options: argparse.Namespace, device: Device, turn_to_cache: Callable[[str], None]
) -> tuple[list[Row], dict[str, str]]:
    """Run the forms one after another; the rows of those that ran, and the errors of the others."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in forms:
        turn_to_cache(name)
        try:
            with compiling():
                rows.append(run_form(name, options, device))
        except Exception as failure:
            failed[name] = describe(failure)
        free(device)  # not before the error, whose frames hold the model, is gone
        found = f"{rows[-1].milliseconds:.1f} ms" if name not in failed else failed[name]
        print(f"{LABELS[name]}: {found}", file=sys.stderr, flush=True)
    return rows, failed


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; ratios are to the first row."""
    cells = [("form", "trained", "ms a step", "quartiles", "ratio", "tokens/s", "peak GiB", "over weights", "loss",
              "compile s")]  # fmt: skip
    for row in rows:
        peak, weights = row.peak_bytes, row.weight_bytes
        cells.append(
            (
                LABELS[row.form],
                f"{row.trained:,}",
                f"{row.milliseconds:.1f}",
                f"{row.low:.1f}-{row.high:.1f}",
                f"{row.milliseconds / rows[0].milliseconds:.3f}",
                f"{row.tokens_per_second:,.0f}",
                "" if peak is None else f"{peak / 2**30:.2f}",
                "" if peak is None or weights is None else f"{(peak - weights) / 2**30:.2f}",
                f"{row.loss:.4f}",
                f"{row.compile_seconds:.1f}",
            )
        )
    return format_table(cells)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--config", choices=CONFIGS, default="8B", help="the model (%(default)s)")
    option("--layers", type=int, help="blocks, if not all of the model's")
    option("--batch", type=int, default=1, help="sequences a step (%(default)s)")
    option("--length", type=int, default=4096, help="tokens a sequence (%(default)s)")
    option("--rank", type=int, default=16, help="LoRA rank; alpha is twice that (%(default)s)")
    option("--dropout", type=float, default=0.0, help="dropout before the adapters; losses then differ between forms")
    option("--checkpoint", action="store_true", help="full activation checkpointing of every block")
    option("--forms", nargs="+", choices=FORMS, default=list(FORMS), help=f"what to run beside {FROZEN} (all)")
    option("--once", action="store_true", help="do not run the frozen model a second time")
    option("--steps", type=int, default=20, help="timed steps (%(default)s)")
    option(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: wall clock, to try the program (%(default)s)"
    )
    option("--json", type=Path, metavar="FILE", help="write the result here, too")
    options = parser.parse_args(arguments)
    if min(options.batch, options.length, options.rank, options.layers or 1) < 1 or options.steps < 2:
        parser.error("--batch, --length, --rank and --layers must be positive, and --steps at least 2")
    longest = CONFIGS[options.config].max_seq_len
    if options.length > longest:
        parser.error(f"--length is at most {longest}, the positions of this model")
    if not 0 <= options.dropout < 1:
        parser.error("--dropout must be in [0, 1)")
    options.forms = {FROZEN, *options.forms}
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parse(arguments)
    try:
        device = Device(options.device)
    except ValueError as error:
        sys.exit(str(error))
    forms, missing = available(options.forms)
    found = environment(device)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "forms", "device")}
    print(", ".join(f"{name} {value}" for name, value in (found | settings).items()), *missing, sep="\n", flush=True)
    with compile_caches() as turn_to_cache:
        rows, failed = run_forms([*forms, *([] if options.once else [FROZEN])], options, device, turn_to_cache)
    print(f"\n{table(rows)}", *(f"{LABELS[name]} failed: {error}" for name, error in failed.items()), sep="\n")
    if options.json is not None:
        document = {**found, "settings": settings, "forms": [dataclasses.asdict(row) for row in rows], "failed": failed}
        write_json(options.json, document)


if __name__ == "__main__":
    main()
