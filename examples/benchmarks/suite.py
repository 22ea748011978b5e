"""Many cases in one process, each held against its bar: one table and one JSON document."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.cases import SUITE, Bar, Case
from benchmarks.common import format_table
from benchmarks.forms import FROZEN, OURS, PLAIN
from benchmarks.runner import Outcome, Result, Settings, case_table, describe, free, kernel_table, run_case
from benchmarks.timing import Device

FORMS = (FROZEN, PLAIN, OURS)  # what a bar needs; others are run as well where they are asked for
COMPILE_BAR = 1.5  # lora_fx's compile time over plain LoRA's
# Two forms round differently even when neither is worse: an error may be this much above plain LoRA's.
ERROR_SLACK = 1.1


@dataclass(frozen=True)
class Verdict:
    """How a case stands to its bar.

    Attributes:
        time: "aim", "must", or "miss", whichever the time ratio reaches.
        misses: what was missed, with the numbers; empty when all of it passes.
    """

    time: str
    misses: tuple[str, ...]

    def __str__(self) -> str:
        return f"pass ({self.time})" if not self.misses else "MISS: " + "; ".join(self.misses)


def judge(bar: Bar, ours: Result, plain: Result | None) -> Verdict:
    """Hold `lora_fx` against the bar, and against plain LoRA under `torch.compile` where that ran."""
    ratio = ours.ratio.median
    reached = "aim" if ratio <= bar.aim else "must" if ratio <= bar.must else "miss"
    misses = [f"time {ratio:.3f} > {bar.must:.2f}"] if reached == "miss" else []
    if bar.activation_must and ours.activation_ratio and ours.activation_ratio > bar.activation_must:
        misses.append(f"activation {ours.activation_ratio:.2f} > {bar.activation_must:.2f}")
    if plain is not None:
        if ratio > plain.ratio.median:
            misses.append(f"slower than plain ({plain.ratio.median:.3f})")
        if ours.error is not None and plain.error is not None and ours.error > ERROR_SLACK * plain.error:
            misses.append(f"error {ours.error:.1e} > plain's {plain.error:.1e}")
        if ours.compile_seconds and plain.compile_seconds:
            factor = ours.compile_seconds / plain.compile_seconds
            if factor > COMPILE_BAR:
                misses.append(f"compile {factor:.2f}x plain's > {COMPILE_BAR}")
    return Verdict(reached, tuple(misses))


@dataclass
class Report:
    """What a run of the suite found: outcomes of the cases that ran, errors of those that failed, names of the rest."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def as_list(self) -> list[dict[str, Any]]:
        """For JSON: one entry a case."""
        entries: list[dict[str, Any]] = []
        for name, outcome in self.outcomes.items():
            verdict = _verdict(name, outcome)
            judged = None if verdict is None else dataclasses.asdict(verdict)
            entries.append(
                {"name": name, "bar": dataclasses.asdict(SUITE[name][1]), "verdict": judged, **outcome.as_dict()}
            )
        entries += [{"name": name, "error": error} for name, error in self.failed.items()]
        return entries + [{"name": name, "skipped": True} for name in self.skipped]


def run_suite(
    cases: Mapping[str, Case],
    forms: Sequence[str],
    settings: Settings,
    device: Device,
    turn_to_cache: Callable[[str], None],
    budget: float,
    save: Callable[[Report], None],
) -> Report:
    """Run the cases in turn; one that fails is reported, and the others go on.

    Args:
        cases: by their names in `SUITE`, with the sizes to run.
        forms: keys of `LABELS`; see `FORMS`.
        settings: how to measure.
        device: where.
        turn_to_cache: see `compile_caches`.
        budget: seconds. No case is started that would end later, were it as slow as the slowest so far.
        save: called after every case with all there is.
    """
    report = Report()
    began, slowest = time.perf_counter(), 0.0
    for name, case in cases.items():
        started = time.perf_counter()
        if report.outcomes and started - began + slowest > budget:
            report.skipped.append(name)
            continue
        try:
            outcome = report.outcomes[name] = run_case(case, forms, settings, device, turn_to_cache)
        except Exception as failure:
            report.failed[name] = describe(failure)
            print(f"\n{name} failed: {report.failed[name]}", flush=True)
        else:
            taken = time.perf_counter() - started
            print(f"\n{name} ({taken:.0f} s)\n{case_table(outcome, device)}", flush=True)
            for form, rows in outcome.kernels.items():
                print(f"\nkernels of {form}\n{kernel_table(rows)}", flush=True)
        free(device)
        slowest = max(slowest, time.perf_counter() - started)
        save(report)
    if report.skipped:
        print(f"left out by the time budget: --case {' '.join(report.skipped)}", file=sys.stderr)
    return report


def _verdict(name: str, outcome: Outcome) -> Verdict | None:
    ours = outcome.results.get(OURS)
    return None if ours is None else judge(SUITE[name][1], ours, outcome.results.get(PLAIN))


def suite_table(report: Report) -> str:
    """One line a case: what plain LoRA and `lora_fx` cost, the bar, and whether it is reached."""
    rows = [
        ("case", "result", "frozen ms", "plain", "lora_fx", "must", "aim", "act. plain", "act. lora_fx", "error/plain",
         "compile/plain"),
    ]  # fmt: skip
    for name, outcome in report.outcomes.items():
        bar, verdict = SUITE[name][1], _verdict(name, outcome)
        ours, plain, frozen = (outcome.results.get(form) for form in (OURS, PLAIN, FROZEN))
        rows.append(
            (
                name,
                f"lora_fx failed: {outcome.failed.get(OURS, 'not run')}"[:100] if verdict is None else str(verdict),
                f"{frozen.milliseconds:.3f}" if frozen else "",
                f"{plain.ratio.median:.3f}" if plain else "",
                f"{ours.ratio.median:.3f}" if ours else "",
                f"{bar.must:.2f}",
                f"{bar.aim:.2f}",
                _cell(plain.activation_ratio if plain else None),
                _cell(ours.activation_ratio if ours else None),
                _cell(ours.error / plain.error if ours and plain and ours.error and plain.error else None),
                _cell(
                    ours.compile_seconds / plain.compile_seconds
                    if ours and plain and ours.compile_seconds and plain.compile_seconds
                    else None
                ),
            )
        )
    empty = ("",) * 9
    rows += [(name, f"failed: {error}"[:100], *empty) for name, error in report.failed.items()]
    rows += [(name, "not run: time budget", *empty) for name in report.skipped]
    return format_table(rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
