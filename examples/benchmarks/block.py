"""LoRA's cost over the frozen model on a GPU: one Llama block, every form in one process and one run.

    python examples/benchmarks/block.py                          # a Llama-3-8B block, 8192 tokens, rank 16, bfloat16
    python examples/benchmarks/block.py --rank 64 --dropout 0.1 --json block.json --plot block.png
    python examples/benchmarks/block.py --profile --forms lora_fx
    python examples/benchmarks/block.py --tokens 1 --no-grad --cuda-graphs                    # decode
    python examples/benchmarks/block.py --dim 2048 --ffn 5632 --heads 16 --experts 8          # without PEFT
    python examples/benchmarks/block.py --suite --json suite.json --plot suite.png            # all cases, with bars
    python examples/benchmarks/block.py --case fp8 decode-1                                   # some of them
    python examples/benchmarks/block.py --device cpu --smoke --suite                          # does it run at all

Every time is the GPU's, of steps that are queued back to back, in turns, and every ratio is to the same block frozen,
under torch.compile, in the same round. "Activation" is the peak of a step over what lives between steps. "Error" is the
worst of the output and all gradients against float64, relative to that tensor's norm. "Compile" is the first step, from
empty compile caches (of the frozen block, which cases share, in the first of them alone).
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import BIASES, MODES, SUITE, Case
from benchmarks.common import write_json
from benchmarks.forms import FROZEN, LABELS, OURS, PLAIN, TUNED, available
from benchmarks.runner import Outcome, Settings, case_table, kernel_table, run_case
from benchmarks.suite import FORMS, Report, run_suite, suite_table
from benchmarks.timing import Device, compile_caches, environment

PROFILED = (FROZEN, PLAIN, OURS)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. `case` is then a `Case`, or None for the suite, whose cases are in `cases` by name."""
    default = Case()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = parser.add_argument_group("the case")
    option = shape.add_argument
    option("--dim", type=int, default=default.dim, help="width of the residual stream (%(default)s)")
    option("--ffn", type=int, default=default.ffn, help="width of the feed-forward (%(default)s)")
    option("--heads", type=int, default=default.heads, help="query heads (%(default)s)")
    option("--kv-heads", type=int, default=default.kv_heads, help="key/value heads (%(default)s)")
    option("--experts", type=int, default=0, help="routed experts, two for a token, as wide as --ffn (%(default)s)")
    option("--bias", nargs="?", choices=BIASES, const="all", default="none", help="biases on all linears, or on some")
    option("--tokens", type=int, default=default.tokens, help="tokens a step (%(default)s)")
    option(
        "--length",
        type=int,
        help="tokens a sequence (2048, or all tokens where there are fewer; with --no-grad and at most 64 tokens 1: "
        "decode, a token of each of so many sequences, whose attention to itself alone is trivial)",
    )
    option("--rank", type=int, default=default.rank, help="LoRA rank (%(default)s)")
    option("--dropout", type=float, default=0.0, help="dropout before the adapters; no errors are taken then")
    option("--checkpoint", action="store_true", help="full activation checkpointing of the block")
    option("--fp8", action="store_true", help="the frozen products in float8 (dynamic scaling, one scale a tensor)")
    option("--no-grad", action="store_true", help="the forward alone (prefill, decode)")
    option("--mode", choices=MODES, default="default", help="of torch.compile, for all forms (%(default)s)")
    option(
        "--cuda-graphs", action="store_true", help="capture each form's whole step in a CUDA graph, time its replays"
    )
    suite = parser.add_argument_group("several cases; the options above are not used then")
    suite.add_argument("--suite", action="store_true", help=f"all cases: {', '.join(SUITE)}")
    suite.add_argument("--case", nargs="+", choices=SUITE, metavar="NAME", help="these cases of the suite")
    suite.add_argument("--budget", type=float, default=720.0, help="seconds for all cases (%(default)s)")
    option = parser.add_argument_group("the measurement").add_argument
    option(
        "--forms",
        nargs="+",
        choices=LABELS,
        help=f"what to run beside {FROZEN} (all but {TUNED}; suite: plain, lora_fx)",
    )
    option("--max-autotune", action="store_true", help=f"run {TUNED} too, which is slow to compile")
    option("--rounds", type=int, help="how often each form is timed (8; suite: 6)")
    option(
        "--window",
        type=float,
        default=0.4,
        help="seconds of one measurement, after as many that are not measured (%(default)s)",
    )
    option("--compiles", type=int, default=1, help="compile a form so often; its time is the median (%(default)s)")
    option(
        "--profile", action="store_true", help=f"list the kernels of a step of {', '.join(PROFILED)}, where they run"
    )
    option(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: wall clock, to try the program (%(default)s)"
    )
    option(
        "--no-strict", dest="strict", action="store_false", help="measure lora_fx even where it leaves branches as is"
    )
    option("--smoke", action="store_true", help="shrink every case to a toy size: shows that it runs, gives no figures")
    option("--json", type=Path, metavar="FILE", help="write the result here, too")
    option("--plot", type=Path, metavar="FILE", help="draw a bar chart (PNG, SVG)")
    options = parser.parse_args(arguments)
    several = options.suite or options.case is not None
    if options.rounds is None:
        options.rounds = 6 if several else 8
    if min(options.rounds, options.compiles) < 1 or options.window <= 0:
        parser.error("--rounds, --compiles and --window must be positive")
    if options.forms is None:
        options.forms = list(FORMS) if several else [form for form in LABELS if form != TUNED]
    options.forms = {FROZEN, *options.forms, *([TUNED] if options.max_autotune else [])}
    options.cases = {name: SUITE[name][0] for name in SUITE if options.suite or name in (options.case or ())}
    try:
        options.case = None if several else _case(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _case(options: argparse.Namespace) -> Case:
    decode = options.no_grad and options.tokens <= 64
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(Case)}
    if options.length is None:
        values["length"] = 1 if decode else min(2048, options.tokens)
    return Case(**values)


def plot_outcome(path: Path, outcome: Outcome, title: str) -> None:
    """Draw the bars of one case."""
    from benchmarks.chart import draw_forms

    others = [result for result in outcome.results.values() if result.form != FROZEN]
    panels = {"time": {LABELS[result.form]: result.ratio.median for result in others}}
    memory = {LABELS[r.form]: r.activation_ratio for r in others if r.activation_ratio is not None}
    draw_forms(path, title, panels | ({"activation memory": memory} if memory else {}))


def plot_suite(path: Path, report: Report, title: str) -> None:
    """Draw the bars of all cases that ran."""
    from benchmarks.chart import draw_cases

    forms = [form for form in LABELS if any(form in o.results for o in report.outcomes.values()) and form != FROZEN]
    series = {
        LABELS[form]: [o.results[form].ratio.median if form in o.results else None for o in report.outcomes.values()]
        for form in forms
    }
    draw_cases(path, title, list(report.outcomes), series)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    options = parse(arguments)
    try:
        device = Device(options.device)
    except ValueError as error:
        sys.exit(str(error))
    forms, missing = available(options.forms)
    profiled = PROFILED if options.profile else ()
    settings = Settings(options.rounds, options.window, profiled, options.strict, options.compiles)
    found = environment(device)
    print(", ".join(f"{name} {value}" for name, value in found.items()), *missing, sep="\n", flush=True)
    document = {**found, "settings": dataclasses.asdict(settings), "smoke": options.smoke}
    # Times are of no interest where nothing is measured.
    caches = contextlib.nullcontext(lambda name: None) if options.smoke else compile_caches()
    with caches as turn_to_cache:
        if options.case is not None:
            case = options.case.shrunk if options.smoke else options.case
            outcome = run_case(case, forms, settings, device, turn_to_cache)
            values = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(case).items())
            print(f"{values}\n\n{case_table(outcome, device)}")
            for form, rows in outcome.kernels.items():
                print(f"\nkernels of: {LABELS[form]}\n{kernel_table(rows)}")
            if options.json is not None:
                write_json(options.json, document | outcome.as_dict())
            if options.plot is not None:
                plot_outcome(options.plot, outcome, f"{case.tokens} tokens, rank {case.rank}: {found['device']}")
            return
        cases = {name: case.shrunk if options.smoke else case for name, case in options.cases.items()}

        def save(report: Report) -> None:
            if options.json is not None:
                write_json(options.json, document | {"cases": report.as_list()})

        report = run_suite(cases, forms, settings, device, turn_to_cache, options.budget, save)
    save(report)
    print(f"\n{suite_table(report)}")
    if options.plot is not None and report.outcomes:
        plot_suite(options.plot, report, f"LoRA's cost, one block: {found['device']}")


if __name__ == "__main__":
    main()
