"""What lora_fx does to models of transformers: model x dtype x base x gradient checkpointing, one row each.

    python examples/matrix.py                               # every model, and every base under a Llama
    python examples/matrix.py --models t5 vit --dtypes bfloat16
    python examples/matrix.py --full --json matrix.json     # every base under every model, too

A row traces a small model of random weights as it would be compiled for training, without compiling kernels
(`lora_fx.explain`): how many branches there are, how many were rewritten, and why the others were not. Then it runs the
graphs of plain `torch.compile` and those of lora_fx on one batch, and states how far the gradients of the adapters are
from float64 eager in both, and from one another, each at the worst of them. Bases that round their inputs (float8, fake
quantisation) err by that in any form, and there the last number says what the rewrite does. The program fails where a
row fails, or where lora_fx errs more. It needs transformers and torchao, which the extra `test` has.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import lora_fx
from hf_models import KINDS, checkpoint
from lora_fx import LoRAConfig
from quantised import BASES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The worst gradient of lora_fx may err this many times as much as plain torch.compile's, and this much more: on one
# batch, roundings that fall the other way make as much of a difference.
ALLOWED, FLOOR = 1.5, 2e-6
# In float32 the two may be this far apart, which a base that rounds to float8 makes of another last bit. (In bfloat16
# it makes as much of it as its own rounding is.)
APART = 0.02
RANK = 4


@dataclass(frozen=True)
class Case:
    """One row's question."""

    model: str
    dtype: str
    base: str
    checkpointing: bool


@dataclass(frozen=True)
class Row:
    """One row's answer. Errors are the largest ``norm(gradient - oracle) / norm(oracle)`` of one adapter's factor."""

    case: Case
    sites: int = 0
    rewritten: int = 0
    reasons: dict[str, str] = field(default_factory=dict)
    """Module path -> why its branch was left as it was, or not reached."""
    error_plain: float | None = None
    error_ours: float | None = None
    apart: float | None = None
    """The largest ``norm(ours - plain) / norm(plain)``."""
    worst: str = ""
    seconds: float = 0.0
    failure: str = ""

    @property
    def good(self) -> bool:
        """Whether the row ran, erred no more than plain `torch.compile`, and in float32 is close to it."""
        if self.failure or self.error_plain is None or self.error_ours is None or self.apart is None:
            return False
        close = self.apart <= APART or self.case.dtype != "float32"
        return close and self.error_ours <= ALLOWED * self.error_plain + FLOOR

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = dataclasses.asdict(self)
        return values.pop("case") | values | {"good": self.good}


def adapted(case: Case, layers: int = 2) -> nn.Module:
    """The model of a case: quantised, then installed on, with adapters that add something."""
    base = BASES[case.base](KINDS[case.model].sized(layers).build(DTYPES[case.dtype]))
    model = lora_fx.install(base, LoRAConfig(rank=RANK, alpha=2 * RANK))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora_fx.named_adapter_parameters(model):
            if name.endswith("lora_b"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    if case.checkpointing:
        checkpoint(model)
    return model


def explained(case: Case, layers: int = 2) -> lora_fx.Report:
    """The report of a case, with errors."""
    batch: dict[str, Any] = KINDS[case.model].batch(dtype=DTYPES[case.dtype])
    return lora_fx.explain(adapted(case, layers), **batch, verify=True)


def row(case: Case, layers: int = 2) -> Row:
    """Run a case. What it raises is the row's `failure`."""
    start = time.perf_counter()
    try:
        torch._dynamo.reset()  # what other rows left behind
        report = explained(case, layers)
    except Exception as error:  # one row that fails leaves the others
        return Row(case, failure=f"{type(error).__name__}: {error}", seconds=time.perf_counter() - start)
    errors = report.verification
    assert errors is not None
    return Row(
        case,
        sites=len(report.sites),
        rewritten=report.rewritten,
        reasons={site.name: site.reason for site in report.sites if not site.rewritten},
        error_plain=errors.worst_unfused,
        error_ours=errors.worst_rewritten,
        apart=errors.worst_apart,
        worst=errors.worst_gradient or "",
        seconds=time.perf_counter() - start,
        failure="; ".join(report.failures),
    )


def cases(
    models: Iterable[str], dtypes: Iterable[str], bases: Iterable[str], checkpointing: Iterable[bool], full: bool
) -> Iterator[Case]:
    """The rows that were asked for; unless `full`, bases other than the plain one under a Llama alone."""
    for model, base, dtype, checkpointed in itertools.product(models, bases, dtypes, checkpointing):
        # torchao quantises the weights of linears, [N, K], and not those of a Conv1D, [K, N].
        if base == "plain" or model == "llama" or (full and not KINDS[model].conv1d):
            yield Case(model, dtype, base, checkpointed)


HEADER = ("model", "base", "dtype", "checkpointing", "branches", "rewritten", "torch.compile", "lora_fx", "apart", "")


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, and below them the reasons, each once."""
    cells: list[tuple[str, ...]] = [HEADER]
    for r in rows:
        numbers = (str(r.sites), str(r.rewritten), *map(_error, (r.error_plain, r.error_ours, r.apart)))
        numbers = ("",) * len(numbers) if r.failure else numbers
        said = "failed" if r.failure else "" if r.good else "worse"
        cells.append((r.case.model, r.case.base, r.case.dtype, "on" if r.case.checkpointing else "off", *numbers, said))
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, tuple("-" * width for width in widths))
    numeric = range(HEADER.index("branches"), len(HEADER) - 1)
    lines = ["errors of the gradient of the worst adapter against float64, in plain torch.compile and in lora_fx", ""]
    for line in cells:
        aligned = (c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths)))
        lines.append("  ".join(aligned).rstrip())
    left: dict[tuple[str, str], set[str]] = {}
    for r in rows:
        for path, reason in r.reasons.items():
            left.setdefault((r.case.model, reason), set()).add(path)
    lines += [""] * bool(left)
    lines += [f"left as it was: {model}: {_listed(paths)}: {reason}" for (model, reason), paths in left.items()]
    lines += [f"failed: {' '.join(_words(r.case))}: {r.failure}" for r in rows if r.failure]
    return "\n".join(lines)


def _listed(paths: set[str]) -> str:
    first, *others = sorted(paths)
    return f"{first} and {len(others)} more" if others else first


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _words(case: Case) -> tuple[str, ...]:
    return (case.model, case.base, case.dtype, *(("checkpointing",) if case.checkpointing else ()))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description="Branches found and rewritten, and errors of gradients, for models of transformers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--models", nargs="+", choices=KINDS, default=list(KINDS), help="which models", metavar="MODEL")
    option("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="of weights and activations")
    option("--bases", nargs="+", choices=BASES, default=list(BASES), help="what the linears are", metavar="BASE")
    option("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"], help="by the model's own switch")
    option("--full", action="store_true", help="every base under every model, not under a Llama alone")
    option("--layers", type=int, default=2, help="of each model (and of each half, where it has two)")
    option("--json", type=Path, default=None, help="write the rows there, too")
    option("--list", action="store_true", help="print the names that the options take, and stop")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a row failed or errs more than plain `torch.compile`."""
    options = parse(arguments)
    if options.list:
        print(f"models: {' '.join(KINDS)}\nbases:  {' '.join(BASES)}\ndtypes: {' '.join(DTYPES)}")
        return 0
    warnings.filterwarnings("ignore", module=r"transformers|torchao|torch\.jit")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    checkpointing = [word == "on" for word in options.checkpointing]
    wanted = list(cases(options.models, options.dtypes, options.bases, checkpointing, options.full))
    if not wanted:
        print("no rows: bases other than 'plain' run under a Llama; add --full for the others", file=sys.stderr)
        return 1
    rows = []
    with tqdm(wanted, unit="row", dynamic_ncols=True, disable=None) as bar:
        for case in bar:
            bar.set_description(" ".join(_words(case)))
            rows.append(row(case, options.layers))
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps([r.as_dict() for r in rows], indent=1) + "\n", encoding="utf-8")
    return int(not all(r.good for r in rows))


if __name__ == "__main__":
    sys.exit(main())
