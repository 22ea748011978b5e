"""LoRA's cost over the frozen model on a GPU: one Llama block, forward and backward, every form in one run.

    python examples/benchmarks/block.py                # a Llama-3-8B block, 8192 tokens, rank 16, bfloat16
    python examples/benchmarks/block.py --rank 64 --tokens 16384

Every ratio is to the same block frozen, under torch.compile. A step is timed by itself, so what the CPU takes to launch
it counts. "Activation" is the peak of a step over what lives between steps. The error is the worst gradient's, against
float64.
"""

import argparse
import copy
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import (
    Batch,
    Form,
    Ratio,
    compiling,
    format_table,
    gradient_error,
    gradients,
    install_plain_lora,
    measure,
    randomise_adapters,
    write_json,
)

import lora_fx
from llama3 import CONFIGS, TransformerBlock, rope_table

FROZEN, PLAIN, OURS = "frozen, compile", "plain LoRA, compile", "lora_fx"


class Block(nn.Module):
    """A Llama-3-8B block that brings its rotary angles along: [B, S, D] -> [B, S, D]."""

    rope: Tensor

    def __init__(self, length: int) -> None:
        super().__init__()
        config = dataclasses.replace(CONFIGS["8B"], n_layers=1)
        self.block = TransformerBlock(0, config)
        self.register_buffer("rope", rope_table(config.head_dim, length, config.rope_theta))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.rope)


def build(length: int, rank: int) -> tuple[list[Form], Form]:
    """The forms with equal weights on the GPU, and the float64 oracle on the CPU."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        frozen = Block(length).bfloat16().requires_grad_(False)
    with torch.no_grad():
        for parameter in frozen.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.02)
    alpha = 2.0 * rank
    plain = copy.deepcopy(frozen)
    install_plain_lora(plain, rank, alpha)
    cpu = plain.cpu()
    randomise_adapters(cpu, torch.Generator().manual_seed(1))
    plain = cpu.cuda()
    ours = lora_fx.compile(copy.deepcopy(frozen), lora_fx.LoRAConfig(rank=rank, alpha=alpha), strict=True)
    with torch.no_grad():
        for name, adapter in plain.named_parameters():
            ours.get_parameter(name).copy_(adapter)
    forms = [
        Form(FROZEN, frozen, compiled=True),
        Form("plain LoRA, eager", copy.deepcopy(plain), compiled=False),
        Form(PLAIN, copy.deepcopy(plain), compiled=True),
        Form(OURS, ours, compiled=True),
    ]
    for form in forms:
        if form.compiled and form.name != OURS:
            form.model.compile()
    return forms, Form("oracle", plain.double(), compiled=False)


def clock(step: Callable[[], None]) -> float:
    """Seconds that the device needs for `step`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def peak_activation(form: Form, batch: Batch) -> int:
    """The most bytes that a step holds beside parameters and inputs."""
    form.clear(batch.x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    form.step(batch.x, batch.upstream)
    torch.cuda.synchronize()
    form.clear(batch.x)
    return torch.cuda.max_memory_allocated() - before


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--tokens", type=int, default=8192, help="tokens a step, a multiple of the length (default: %(default)s)")
    option("--length", type=int, default=2048, help="tokens a sequence (default: %(default)s)")
    option("--rank", type=int, default=16, help="LoRA rank (default: %(default)s)")
    option("--rounds", type=int, default=40, help="how often each form is timed (default: %(default)s)")
    option("--json", type=Path, help="write the result here, too")
    options = parser.parse_args(arguments)
    if options.tokens % options.length or options.tokens < 1:
        parser.error("--tokens must be a multiple of --length")
    return options


def main() -> None:
    """Run the benchmark from the command line."""
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; examples/benchmarks/cpu.py measures on a CPU")
    shape = (options.tokens // options.length, options.length, CONFIGS["8B"].dim)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, tokens {options.tokens}, rank {options.rank}")
    with compiling():
        forms, oracle = build(options.length, options.rank)

        def batch(seed: int) -> Batch:
            generator = torch.Generator("cuda").manual_seed(seed % 4)
            x, dy = (torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(2))
            return Batch(x.requires_grad_(), (dy,))

        small = Batch(batch(0).x[:1].detach().clone().requires_grad_(), (batch(0).upstream[0][:1],))
        exact = Batch(small.x.detach().double().requires_grad_(), (small.upstream[0].double(),))
        truth = gradients(oracle, exact)
        oracle.model.cpu()
        errors = {form.name: gradient_error(gradients(form, small), truth) for form in forms if form.name != FROZEN}
        truth.clear()
        measure(forms, batch, 2, clock)  # compiles for the full shape
        seconds = measure(forms, batch, options.rounds, clock)
        peaks = {form.name: peak_activation(form, batch(0)) for form in forms}
    rows = [("form", "ms", "ratio", "quartiles", "activation MiB", "ratio", "error")]
    results = []
    for form in forms:
        ratio = Ratio.of(seconds[form.name], seconds[FROZEN])
        milliseconds, memory = 1e3 * statistics.median(seconds[form.name]), peaks[form.name]
        error = errors.get(form.name)
        rows.append(
            (
                form.name,
                f"{milliseconds:.2f}",
                f"{ratio.median:.3f}",
                f"{ratio.low:.3f}-{ratio.high:.3f}",
                f"{memory / 2**20:.0f}",
                f"{memory / peaks[FROZEN]:.2f}",
                "" if error is None else f"{error:.1e}",
            )
        )
        results.append(
            {
                "form": form.name,
                "milliseconds": milliseconds,
                "ratio": dataclasses.asdict(ratio),
                "activation_bytes": memory,
                "error": error,
            }
        )
    print(f"\n{format_table(rows)}")
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        device = torch.cuda.get_device_name()
        write_json(options.json, {"torch": torch.__version__, "device": device, "settings": settings, "forms": results})


if __name__ == "__main__":
    main()
