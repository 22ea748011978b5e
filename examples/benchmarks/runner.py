"""Runs one case: builds its forms, holds them against float64, times them in turns."""

import dataclasses
import functools
import gc
import statistics
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.cases import Case
from benchmarks.common import Ratio, compiling, format_table, saved_bytes
from benchmarks.forms import (
    FROZEN,
    LABELS,
    PEFT,
    Block,
    LoRAForm,
    build_form,
    exact_values,
    random_adapters,
    worst_error,
)
from benchmarks.timing import Device, Kernel, Step, alternate, kernels
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: how often each form is timed.
        window: seconds of queued steps in one measurement (:func:`benchmarks.timing.alternate`).
        profiled: forms whose kernels are listed.
        strict: whether `lora_fx` fails where it leaves a branch as it was; otherwise it is measured as it is.
        compiles: how often a form, but the frozen one, is compiled from empty caches; its time is the median of these.
    """

    rounds: int = 8
    window: float = 0.4
    profiled: tuple[str, ...] = ()
    strict: bool = True
    compiles: int = 1


@dataclass(frozen=True)
class Result:
    """What was found of one form.

    Attributes:
        form: a key of `LABELS`.
        milliseconds: the median time of a step.
        ratio: that over the frozen form's, of the same rounds.
        activation_bytes: the peak of a step over what lives between steps. On a CPU: what a forward saves for the
            backward. None where there is no such number: Inductor's own CUDA graphs keep their memory between steps.
        activation_ratio: that over the frozen form's.
        error: the worst error of the output, the input's gradient and every adapter's, against float64, relative to
            that tensor's norm; None for the frozen form, and where forms do not compute the same (`Case.is_compared`).
        worst: the tensor that has it.
        compile_seconds: of the first step, for compiled forms (the median of several, `Settings.compiles`).
    """

    form: str
    milliseconds: float
    ratio: Ratio
    activation_bytes: int | None
    activation_ratio: float | None
    error: float | None
    worst: str | None
    compile_seconds: float | None


@dataclass
class Outcome:
    """A case that ran: its results, the forms that failed with their errors, and kernels where they were asked for."""

    case: Case
    results: dict[str, Result] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, list[Kernel]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "case": dataclasses.asdict(self.case),
            "forms": [dataclasses.asdict(result) for result in self.results.values()],
            "failed": self.failed,
            "kernels": {form: [dataclasses.asdict(kernel) for kernel in rows] for form, rows in self.kernels.items()},
        }


@dataclass
class _Running:
    """A form that has been compiled and checked, with its step."""

    form: LoRAForm
    step: Step
    activation: int | None
    error: tuple[str, float] | None
    compile_seconds: float | None


def inputs(case: Case, device: Device, seed: int) -> tuple[Tensor, Tensor | None]:
    """The input of a step and the upstream gradient of its output, or None where there is no backward."""
    generator = torch.Generator(device.name).manual_seed(seed)
    x, dy = (torch.randn(case.shape, generator=generator, device=device.name).bfloat16() for _ in range(2))
    return (x, None) if case.no_grad else (x.requires_grad_(), dy)


def run_case(
    case: Case, forms: Sequence[str], settings: Settings, device: Device, turn_to_cache: Callable[[str], None]
) -> Outcome:
    """Measure `forms` of one case.

    A form that fails is left out and its error kept, unless it is the frozen one, to which all else is compared.

    Args:
        case: what to run.
        forms: keys of `LABELS`, the frozen one among them.
        settings: how to measure.
        device: where.
        turn_to_cache: see `compile_caches`.
    """
    outcome = Outcome(case)
    with compiling():
        torch.manual_seed(0)
        with torch.device(device.name):
            base = Block(case)
        adapters = random_adapters(base, case.rank, seed=1)
        x, upstream = inputs(case, device, seed=2)
        exact = exact_values(base, adapters, x, upstream) if case.is_compared else None
        device.free()
        running: dict[str, _Running] = {}
        for name in forms:
            if name == PEFT and case.experts:
                outcome.failed[name] = "its adapters are on linears here, and not on experts: nothing to compare"
                continue
            build = functools.partial(
                build_form,
                name,
                base,
                rank=case.rank,
                dropout=case.dropout,
                adapters=adapters,
                fp8=case.fp8,
                mode=case.mode,
                strict=settings.strict,
            )
            # The frozen block is the same in several cases, and its time to compile is compared with nothing.
            cache = name if name == FROZEN else f"{name}-{zlib.crc32(repr(case).encode())}"
            times = []
            began = time.perf_counter()
            try:
                for again in range(1, 1 if name == FROZEN else settings.compiles):
                    turn_to_cache(f"{cache}-{again}")
                    times.append(_first_step(build(), x, upstream, device)[1])
                    device.free()
                turn_to_cache(cache)
                running[name] = _start(build(), case, x, upstream, None if name == FROZEN else exact, device, times)
            except Exception as failure:
                if name == FROZEN:
                    raise
                outcome.failed[name] = describe(failure)
            # With max-autotune it takes minutes until there is anything else to print.
            state = "failed" if name in outcome.failed else "ready"
            print(f"{LABELS[name]}: {state} after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
        del exact
        seconds = alternate(
            {name: each.step for name, each in running.items()}, settings.rounds, settings.window, device
        )
        for name, each in running.items():
            outcome.results[name] = _result(name, each, seconds[name], running[FROZEN], seconds[FROZEN])
            if name in settings.profiled:
                outcome.kernels[name] = kernels(each.step, device, settings.window)
    return outcome


def free(device: Device) -> None:
    """Let go of what a case, finished or failed, has left: compiled code, CUDA graphs, memory."""
    torch._dynamo.reset()
    gc.unfreeze()
    gc.collect()
    device.free()


def describe(failure: BaseException) -> str:
    """An error in a few lines: its type, its text, and where it was raised."""
    last = traceback.extract_tb(failure.__traceback__)[-1]
    return f"{type(failure).__name__}: {str(failure).strip()[:600]} ({last.name}, line {last.lineno})"


def _first_step(form: LoRAForm, x: Tensor, upstream: Tensor | None, device: Device) -> tuple[dict[str, Tensor], float]:
    """What a form computes, and the seconds of its first step, in which it is compiled."""
    gc.collect()
    gc.freeze()  # what other forms have left is not this one's to walk through while it compiles
    device.synchronise()
    began = time.perf_counter()
    found = form.values(x, upstream)
    device.synchronise()
    return found, time.perf_counter() - began


def _start(
    form: LoRAForm,
    case: Case,
    x: Tensor,
    upstream: Tensor | None,
    exact: dict[str, Tensor] | None,
    device: Device,
    before: Sequence[float],
) -> _Running:
    """Compile a form by its first step, check what it computes, and measure its memory.

    ``before``: seconds that its first step took when it was compiled before.
    """
    found, seconds = _first_step(form, x, upstream, device)
    compile_seconds = statistics.median([*before, seconds]) if form.compiled else None
    error = None if exact is None else worst_error(found, exact)
    del found
    step = form.stepper(x, upstream)
    for _ in range(2):  # the allocator's, and with Inductor's CUDA graphs the recording
        step()
    if case.mode in ("reduce-overhead", "max-autotune"):
        activation = None
    elif device.cuda:
        activation = device.peak_memory(step)
    else:
        activation = None if case.no_grad else saved_bytes(form, x)
    return _Running(form, device.captured(step) if case.cuda_graphs else step, activation, error, compile_seconds)


def _result(
    name: str, each: _Running, seconds: Sequence[float], base: _Running, base_seconds: Sequence[float]
) -> Result:
    worst, error = each.error or (None, None)
    return Result(
        form=name,
        milliseconds=1e3 * statistics.median(seconds),
        ratio=Ratio.of(seconds, base_seconds),
        activation_bytes=each.activation,
        activation_ratio=each.activation / base.activation if each.activation and base.activation else None,
        error=error,
        worst=worst,
        compile_seconds=each.compile_seconds,
    )


def case_table(outcome: Outcome, device: Device) -> str:
    """The forms of a case as aligned text, failures below."""
    memory = "activation MiB" if device.cuda else "saved MiB"
    rows = [("form", "worst error in", "ms", "ratio", "quartiles", memory, "ratio", "error", "compile s")]
    for result in outcome.results.values():
        rows.append(
            (
                LABELS[result.form],
                (result.worst or "").removeprefix("layer.").removeprefix("block."),
                f"{result.milliseconds:.3f}",
                f"{result.ratio.median:.3f}",
                f"{result.ratio.low:.3f}-{result.ratio.high:.3f}",
                "" if result.activation_bytes is None else f"{result.activation_bytes / 2**20:.1f}",
                "" if result.activation_ratio is None else f"{result.activation_ratio:.2f}",
                "" if result.error is None else f"{result.error:.2e}",
                "" if result.compile_seconds is None else f"{result.compile_seconds:.1f}",
            )
        )
    lines = [format_table(rows)]
    lines += [f"{LABELS[name]} failed: {error}" for name, error in outcome.failed.items()]
    return "\n".join(lines)


def kernel_table(rows: Sequence[Kernel], limit: int = 40) -> str:
    """The longest kernels as aligned text, under their sum."""
    cells = [("us a step", "calls", "kernel")]
    cells += [(f"{row.microseconds:9.1f}", f"{row.calls:5.1f}", row.name[:120]) for row in rows[:limit]]
    total = sum(row.microseconds for row in rows)
    widths = [max(len(row[i]) for row in cells) for i in range(2)]
    lines = [f"{a:>{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in cells]
    left = f", {len(rows) - limit} shorter ones left out" if len(rows) > limit else ""
    return "\n".join([*lines, f"{total:>{widths[0]}.1f}  in all{left}"])
