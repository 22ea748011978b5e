"""Two versions of the library, in turns on one GPU: which is faster, and by how much.

    git worktree add ../before HEAD~1
    python examples/benchmarks/versus.py ../before --case r128 experts

Ratios of `block.py` move by a hundredth or two between cards and runs, which is more than most changes are worth. Here
each version, and the frozen block, is a process of its own that has compiled its step; they run in turns, one at a
time, on the same card at the same temperature. The benchmark's own code is this checkout's for all of them.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import SUITE
from benchmarks.common import Ratio, compiling, format_table, write_json
from benchmarks.forms import FROZEN, OURS, Block, build_form, random_adapters
from benchmarks.runner import inputs
from benchmarks.timing import Device, environment

import lora_fx

EXAMPLES = Path(__file__).resolve().parents[1]
HERE, THERE = "this checkout", "the other"


def serve(name: str, form: str, device: Device, window: float, smoke: bool, answers: IO[str]) -> None:
    """Compile the step of a form, then time it for each line that comes; gives the library's folder, then seconds.

    The others are made after this one's first answer: nobody else is on the device while it is compiled and counted.
    """
    case = SUITE[name][0]
    case = case.shrunk if smoke else case
    torch.manual_seed(0)
    with torch.device(device.name):
        base = Block(case)
    adapters = random_adapters(base, case.rank, seed=1)
    x, upstream = inputs(case, device, seed=2)
    built = build_form(
        form, base, rank=case.rank, dropout=case.dropout, adapters=adapters, fp8=case.fp8, mode=case.mode, strict=False
    )
    with compiling():
        step: Callable[[], object] = built.stepper(x, upstream)
        for _ in range(3):
            step()
    step = device.captured(step) if case.cuda_graphs else step
    count = device.steps_in(step, window)
    print(json.dumps(str(Path(lora_fx.__file__).parents[1])), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(device.seconds(step, count, count if device.cuda else 1)), file=answers, flush=True)


class Worker:
    """A process that has one form of a case, with the library of a checkout. It answers in a pipe of its own, and
    prints whatever else it has to say where errors go."""

    def __init__(self, checkout: Path, case: str, form: str, options: argparse.Namespace) -> None:
        self.what = f"{form} of {case} in {checkout}"
        command = [sys.executable, __file__, str(checkout), "--case", case, "--serve", form]
        command += ["--device", options.device, "--window", str(options.window)]
        command += ["--smoke"] if options.smoke else []
        paths = [str(checkout), str(EXAMPLES), os.environ.get("PYTHONPATH", "")]
        ours, theirs = os.pipe()
        try:
            self.answers = os.fdopen(ours)
            self.process = subprocess.Popen(
                [*command, "--answers", str(theirs)],
                stdin=subprocess.PIPE,
                stdout=2,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
                pass_fds=[theirs],
            )
        finally:
            os.close(theirs)

    def answer(self) -> Any:
        """What it says next.

        Raises:
            RuntimeError: it has ended.
        """
        if not (line := self.answers.readline()):
            raise RuntimeError(f"{self.what} ended with code {self.process.wait()}: its error is above")
        return json.loads(line)

    def seconds(self) -> float:
        """Seconds of a step, now."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, as the answer will say
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return float(self.answer())

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.answers.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()


@contextlib.contextmanager
def workers(case: str, other: Path, options: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """The three of a case, each compiled before the next is started; the one that is most likely to fail first."""
    here = EXAMPLES.parent
    made: dict[str, Worker] = {}
    with contextlib.ExitStack() as stack:
        for name, checkout, form in ((THERE, other, OURS), (HERE, here, OURS), (FROZEN, here, FROZEN)):
            made[name] = worker = Worker(checkout, case, form, options)
            stack.callback(worker.close)
            if (library := Path(worker.answer())) != checkout:
                raise RuntimeError(f"{worker.what} uses the library of {library}: is it a checkout of this project?")
        yield made


def compare(case: str, other: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of a step of each, by round; in a round they run in a random order."""
    order = random.Random(0)
    found: dict[str, list[float]] = {FROZEN: [], HERE: [], THERE: []}
    with workers(case, other, options) as running:
        for _ in range(options.rounds):
            for name in order.sample(list(running), len(running)):
                found[name].append(running[name].seconds())
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of the version to compare this one with")
    parser.add_argument("--case", nargs="+", choices=SUITE, metavar="NAME", default=["m8192"], help="of the suite")
    parser.add_argument("--rounds", type=int, default=9, help="how often each is timed (%(default)s)")
    parser.add_argument("--window", type=float, default=0.4, help="seconds of one measurement, after as many before it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the program")
    parser.add_argument("--smoke", action="store_true", help="shrink every case to a toy size: gives no figures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here, too")
    parser.add_argument("--serve", choices=(FROZEN, OURS), help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.window <= 0:
        parser.error("--rounds and --window must be positive")
    try:
        device = Device(options.device)
    except ValueError as error:
        sys.exit(str(error))
    if options.serve is not None:
        with os.fdopen(options.answers, "w") as answers:
            serve(options.case[0], options.serve, device, options.window, options.smoke, answers)
        return
    other = options.other.resolve()
    if not (other / "lora_fx" / "__init__.py").is_file():
        parser.error(f"{options.other} is no checkout of this project: it has no lora_fx/__init__.py")
    found = environment(device)
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    rows = [("case", "frozen ms", HERE, THERE, "this / other", "quartiles")]
    document: list[dict[str, Any]] = []
    for case in options.case:
        try:
            seconds = compare(case, other, options)
        except RuntimeError as error:
            sys.exit(str(error))
        ours, theirs = (Ratio.of(seconds[name], seconds[FROZEN]).median for name in (HERE, THERE))
        ratio = Ratio.of(seconds[HERE], seconds[THERE])
        frozen = f"{1e3 * statistics.median(seconds[FROZEN]):.3f}"
        quartiles = f"{ratio.low:.4f}-{ratio.high:.4f}"
        rows.append((case, frozen, f"{ours:.3f}", f"{theirs:.3f}", f"{ratio.median:.4f}", quartiles))
        document.append({"case": case, "seconds": seconds})
    print(f"\n{format_table(rows)}")
    if options.json is not None:
        write_json(options.json, {**found, "other": str(other), "cases": document})


if __name__ == "__main__":
    main()
