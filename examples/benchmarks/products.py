"""What the large products of siblings take one by one, and as one, where their weights and factors lie together.

    python examples/benchmarks/products.py

Of weights [N_1, K], [N_2, K], ..., a factor [R, K] for each and M tokens in bfloat16. Forward: h and each y apart, or
``[y_1, ..., h] = x [W_1; ...; A]^T`` with gaps between the rows. Backward: ``dX = g A``, to which each ``dy_i W_i``
adds itself, or ``[dy_1, ..., g] [W_1; ...; A]``, also with g copied there before. Microseconds of each by itself, again
and again, at the clock rate that this leaves; "frozen" has the products of the weights alone, whose sum somebody else
makes.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import format_table
from benchmarks.timing import Device, alternate, environment


@dataclass(frozen=True)
class Siblings:
    """Linears that read one x: M tokens, K in, N out of each, R of each."""

    name: str
    m: int
    k: int
    n: tuple[int, ...]
    rank: int


LLAMA = {"q, k, v": (4096, 1024, 1024), "gate, up": (14336, 14336)}
CASES = [
    *(Siblings(name, m, 4096, n, 16) for m in (8192, 2048, 512) for name, n in LLAMA.items()),
    *(Siblings(name, 8192, 4096, n, 64) for name, n in LLAMA.items()),
    Siblings("q, k, v", 8192, 3072, (3072, 1024, 1024), 64),
    Siblings("gate, up", 8192, 3072, (8192, 8192), 64),
    Siblings("q, k, v", 8192, 2048, (2048, 1024, 1024), 16),
    Siblings("gate, up", 8192, 2048, (5632, 5632), 16),
]
FORWARD, BACKWARD = ("frozen", "apart", "one"), ("frozen", "apart", "one", "one, g copied")


Form = Callable[[], Any]
"""Gives what it wrote."""


def forms(case: Siblings, device: Device) -> tuple[dict[str, Form], dict[str, Form]]:
    """Forward and backward, by name."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device.name, dtype=torch.bfloat16)

    total, rank = sum(case.n), case.rank * len(case.n)
    together = draw(total + rank, case.k)
    weights, factors = together[:total].split(case.n), together[total:]
    x, g, h = draw(case.m, case.k), draw(case.m, rank), draw(case.m, rank)
    both = draw(case.m, -(-(total + rank) // 64) * 64)[:, : total + rank]
    apart = [part.contiguous() for part in both[:, :total].split(case.n, 1)]
    dx, each, ys = draw(case.m, case.k), [draw(case.m, case.k) for _ in case.n], [draw(case.m, n) for n in case.n]

    def frozen_forward() -> None:
        for weight, y in zip(weights, ys, strict=True):
            torch.mm(x, weight.t(), out=y)

    def apart_forward() -> list[torch.Tensor]:
        torch.mm(x, factors.t(), out=h)
        frozen_forward()
        return [h, *ys]

    def frozen_backward() -> None:
        for dy, weight, out in zip(apart, weights, each, strict=True):
            torch.mm(dy, weight, out=out)

    def apart_backward() -> torch.Tensor:
        torch.mm(g, factors, out=dx)
        for dy, weight in zip(apart, weights, strict=True):
            torch.addmm(dx, dy, weight, out=dx)
        return dx

    def copied() -> torch.Tensor:
        both[:, total:].copy_(g)
        return torch.mm(both, together, out=dx)

    forward = (frozen_forward, apart_forward, lambda: torch.mm(x, together.t(), out=both))
    backward = (frozen_backward, apart_backward, lambda: torch.mm(both, together, out=dx), copied)
    return dict(zip(FORWARD, forward, strict=True)), dict(zip(BACKWARD, backward, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is timed (%(default)s)")
    parser.add_argument(
        "--window", type=float, default=0.06, help="seconds of one measurement, after as many before it"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the program")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: shows that it runs, gives no figures")
    options = parser.parse_args(arguments)
    try:
        device = Device(options.device)
    except ValueError as error:
        sys.exit(str(error))
    print(", ".join(f"{name} {value}" for name, value in environment(device).items()), flush=True)
    cases = [Siblings("toy", 16, 64, (32, 16), 8)] if options.smoke else CASES
    rows = [("siblings", "M", "K", "R", *(f"y: {name}" for name in FORWARD), *(f"dX: {name}" for name in BACKWARD))]
    for case in tqdm(cases, unit="case"):
        found = []
        for steps in forms(case, device):
            seconds = alternate(steps, options.rounds, options.window, device)
            found += [f"{1e6 * statistics.median(each):.1f}" for each in seconds.values()]
        rows.append((case.name, str(case.m), str(case.k), str(case.rank), *found))
    print(f"\n{format_table(rows)}")


if __name__ == "__main__":
    main()
