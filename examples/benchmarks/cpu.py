"""What LoRA costs on a CPU beyond the frozen model: as it is usually written, and through lora_fx.

    python examples/benchmarks/cpu.py            # or: make bench

Forward and backward of four cases (one linear, q/k/v, a SwiGLU feed-forward, a whole Llama block) in two dtypes, in
one process, in turns. Every time is divided by the time of the same case frozen, without LoRA, under `torch.compile`,
in the same round; the table has the median ratio and its quartiles. Columns:

- `ratio`: time over the frozen compiled form's.
- `overhead`: (ratio - 1) over plain compiled LoRA's (ratio - 1): what is left of LoRA's cost. Below 1 is better.
- `saved`: what one forward keeps for the backward, without parameters and the input.
- `error`: the worst gradient against float64, relative to the largest value of that gradient.
"""

import argparse
import copy
import dataclasses
import platform
import statistics
import sys
import time
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
    saved_bytes,
    write_json,
)

import lora_fx
from llama3 import FeedForward, LlamaConfig, TransformerBlock, rope_table

HEAD_DIM = 64
SEQUENCE = 256  # tokens a sequence; only attention notices
BASE, PLAIN, OURS = "frozen, compile", "plain LoRA, compile", "lora_fx"
TARGET = 0.65  # the bf16 overhead that lora_fx must not exceed, in units of plain compiled LoRA's
MORE_ROUNDS = {"linear": 5, "qkv": 2}  # short cases are as noisy as long ones, and measuring them more often is cheap
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Linear(nn.Module):
    """One linear: [..., D] -> [..., D]. Dynamo skips torch's own modules: a bare frozen `nn.Linear` stays eager."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Qkv(nn.Module):
    """Three projections of one input: [..., D] -> three times [..., D]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.wq(x), self.wk(x), self.wv(x)


class Block(nn.Module):
    """A Llama block that brings its rotary angles along: [B, S, D] -> [B, S, D]."""

    rope: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.block = TransformerBlock(0, config)
        self.register_buffer("rope", rope_table(config.head_dim, SEQUENCE, config.rope_theta))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, self.rope)


def config_of(dim: int) -> LlamaConfig:
    """A Llama of this width; its feed-forward is 8/3 times as wide, rounded up to 256 (2.75 times at 1024)."""
    return LlamaConfig(dim=dim, n_layers=1, n_heads=dim // HEAD_DIM, vocab_size=1)


CASES: dict[str, Callable[[int], nn.Module]] = {
    "linear": Linear,
    "qkv": Qkv,
    "mlp": lambda dim: FeedForward(config_of(dim)),
    "block": lambda dim: Block(config_of(dim)),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run. Each field is the option of the same name, see `--help`."""

    tokens: int = 2048
    dim: int = 1024
    rank: int = 16
    dropout: float = 0.0
    rounds: int = 25
    threads: int = 2
    input_grad: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    dtype: str
    form: str
    milliseconds: float
    ratio: Ratio
    overhead: float | None
    saved_bytes: int
    error: float | None


def build_forms(case: str, dtype: torch.dtype, settings: Settings) -> tuple[list[Form], Form]:
    """The forms of a case with equal weights, and the float64 oracle."""
    torch.manual_seed(0)
    frozen = CASES[case](settings.dim).to(dtype).requires_grad_(False)
    alpha = 2.0 * settings.rank
    plain = copy.deepcopy(frozen)
    install_plain_lora(plain, settings.rank, alpha, settings.dropout)
    randomise_adapters(plain, torch.Generator().manual_seed(1))
    ours = copy.deepcopy(frozen)
    lora_fx.compile(ours, lora_fx.LoRAConfig(rank=settings.rank, alpha=alpha, dropout=settings.dropout))
    with torch.no_grad():
        for name, adapter in plain.named_parameters():
            ours.get_parameter(name).copy_(adapter)
    forms = [
        Form("frozen, eager", copy.deepcopy(frozen), compiled=False),
        Form(BASE, frozen, compiled=True),
        Form("plain LoRA, eager", copy.deepcopy(plain), compiled=False),
        Form(PLAIN, copy.deepcopy(plain), compiled=True),
        Form(OURS, ours, compiled=True),
    ]
    for form in forms:
        if form.compiled and form.name != OURS:
            form.model.compile()
    return forms, Form("oracle", plain.double(), compiled=False)


def run_case(case: str, dtype_name: str, settings: Settings) -> list[Row]:
    """Measure all forms of one case in one dtype."""
    dtype = DTYPES[dtype_name]
    shape = (settings.tokens // SEQUENCE, SEQUENCE, settings.dim)
    with compiling():
        forms, oracle = build_forms(case, dtype, settings)
        outputs = len(forms[0].forward(torch.zeros(shape, dtype=dtype)))

        def batch(seed: int) -> Batch:
            generator = torch.Generator().manual_seed(seed)
            x, *upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(1 + outputs))
            return Batch(x.requires_grad_(settings.input_grad), tuple(upstream))

        probe = batch(-1)
        saved = {form.name: saved_bytes(form, probe.x) for form in forms}
        errors: dict[str, float] = {}
        if settings.dropout == 0.0:  # the masks of different forms differ
            exact = Batch(
                probe.x.detach().double().requires_grad_(settings.input_grad), tuple(g.double() for g in probe.upstream)
            )
            truth = gradients(oracle, exact)
            errors = {f.name: gradient_error(gradients(f, probe), truth) for f in forms if "frozen" not in f.name}
        measure(forms, batch, 1, clock)  # compiles
        seconds = measure(forms, batch, settings.rounds * MORE_ROUNDS.get(case, 1), clock)

    ratios = {name: Ratio.of(taken, seconds[BASE]) for name, taken in seconds.items()}
    return [
        Row(
            case=case,
            dtype=dtype_name,
            form=form.name,
            milliseconds=1e3 * statistics.median(seconds[form.name]),
            ratio=ratios[form.name],
            overhead=(ratios[OURS].median - 1) / (ratios[PLAIN].median - 1) if form.name == OURS else None,
            saved_bytes=saved[form.name],
            error=errors.get(form.name),
        )
        for form in forms
    ]


def clock(step: Callable[[], None]) -> float:
    """Seconds that `step` takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    cells = [("case", "form", "ms", "ratio", "quartiles", "overhead", "saved MiB", "error")]
    for row in rows:
        cells.append(
            (
                f"{row.case} {row.dtype}",
                row.form,
                f"{row.milliseconds:.1f}",
                f"{row.ratio.median:.3f}",
                f"{row.ratio.low:.3f}-{row.ratio.high:.3f}",
                "" if row.overhead is None else f"{row.overhead:.2f}",
                f"{row.saved_bytes / 2**20:.1f}",
                "" if row.error is None else f"{row.error:.1e}",
            )
        )
    return format_table(cells)


def verdict(rows: Sequence[Row]) -> tuple[bool, str]:
    """Whether bf16 overheads are 35% below plain compiled LoRA's and no overhead is above; and that in words."""
    misses = []
    for row in rows:
        limit = TARGET if row.dtype == "bf16" else 1.0
        if row.overhead is not None and row.overhead > limit:
            misses.append(f"  {row.case} {row.dtype}: {row.overhead:.2f} of plain LoRA's overhead, allowed {limit:.2f}")
    goal = f"overhead at most {TARGET:.2f} of plain compiled LoRA's in bf16, and at most 1 in every row"
    return not misses, "\n".join([f"{'FAIL' if misses else 'PASS'}: {goal}", *misses])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    default = Settings()
    parser = argparse.ArgumentParser(
        description="LoRA's cost over the frozen model on a CPU: plain and through lora_fx.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--case", choices=CASES, nargs="+", default=list(CASES), help="what to measure")
    option("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES), help="of weights, adapters and inputs")
    option("--tokens", type=int, default=default.tokens, help=f"tokens a step, a multiple of {SEQUENCE}")
    option("--dim", type=int, default=default.dim, help=f"width, a multiple of {HEAD_DIM}")
    option("--rank", type=int, default=default.rank, help="LoRA rank")
    option(
        "--dropout", type=float, default=default.dropout, help="dropout before the adapters; no errors are taken then"
    )
    option(
        "--rounds",
        type=int,
        default=default.rounds,
        help="how often each form is timed (one linear five times, q/k/v twice as often)",
    )
    option("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    option("--no-input-grad", action="store_true", help="as in a first layer: the frozen forms then run no backward")
    option("--json", type=Path, help="write the result here, too")
    values = parser.parse_args(arguments)
    if values.tokens % SEQUENCE or values.dim % HEAD_DIM or values.tokens < 1 or values.dim < 1:
        parser.error(f"--tokens must be a multiple of {SEQUENCE}, and --dim of {HEAD_DIM}")
    return values


def main() -> None:
    """Run the benchmark from the command line; the exit status is 1 when the criterion is missed."""
    options = parse()
    settings = Settings(
        options.tokens,
        options.dim,
        options.rank,
        options.dropout,
        options.rounds,
        options.threads,
        input_grad=not options.no_input_grad,
    )
    torch.set_num_threads(settings.threads)
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {settings.threads} threads"
    print(f"torch {torch.__version__}, {machine}")
    print(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(settings).items()))
    rows: list[Row] = []
    for case in options.case:
        for dtype in options.dtype:
            print(f"{case} {dtype} ...", end=" ", file=sys.stderr, flush=True)
            rows += run_case(case, dtype, settings)
            found = ", ".join(
                f"{row.form} {row.ratio.median:.3f}" for row in rows if row.case == case and row.dtype == dtype
            )
            print(found, file=sys.stderr, flush=True)
    passed, text = verdict(rows)
    print(f"\n{table(rows)}\n\n{text}")
    if options.json is not None:
        document = {
            "torch": torch.__version__,
            "machine": machine,
            "settings": dataclasses.asdict(settings),
            "rows": [dataclasses.asdict(row) for row in rows],
            "passed": passed,
        }
        write_json(options.json, document)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
