"""What the large products of siblings take one by one, and as one, where their weights and factors lie together.

    python examples/benchmarks/products.py

Of weights [N_1, K], [N_2, K], ..., a factor [R, K] behind each and M tokens in bfloat16. Forward: the products of the
weights alone ("frozen"), those and one of all factors ("apart"), ``x [W_i; A_i]^T`` for each, or
``x [W_1; A_1; W_2; ...]^T`` with gaps between its rows ("one"). Backward: the products of the weights alone, whose sum
somebody else makes; ``dX = g A``, to which each ``dy_i W_i`` adds itself; or
``[dy_1, g_1, dy_2, ...] [W_1; A_1; W_2; ...]``, also with g copied there before. Microseconds of each, again and again,
at the clock rate that this leaves; up to 2048 tokens as a CUDA graph, of several models whose weights do not stay in
the cache.
"""

import argparse
import functools
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
    *(Siblings(name, m, 4096, n, 16) for m in (8192, 2048, 512, 64, 16, 1) for name, n in LLAMA.items()),
    *(Siblings(name, 8192, 4096, n, 64) for name, n in LLAMA.items()),
    Siblings("q, k, v", 8192, 3072, (3072, 1024, 1024), 64),
    Siblings("gate, up", 8192, 3072, (8192, 8192), 64),
    Siblings("q, k, v", 8192, 2048, (2048, 1024, 1024), 16),
    Siblings("gate, up", 8192, 2048, (5632, 5632), 16),
]
FORWARD, BACKWARD = ("frozen", "apart", "each", "one"), ("frozen", "apart", "one", "one, g copied")
FEW, MODELS, LAUNCHES = 2048, 4, 2
"""The most tokens of which several models are one CUDA graph, how many models, and how often it has each."""

Form = Callable[[], Any]
"""Gives what it wrote."""


def forms(case: Siblings, device: Device) -> tuple[dict[str, Form], dict[str, Form]]:
    """Forward and backward, by name."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device.name, dtype=torch.bfloat16)

    def wide(columns: int) -> torch.Tensor:
        return draw(case.m, -(-columns // 64) * 64)[:, :columns]

    rank, total = case.rank, sum(case.n) + case.rank * len(case.n)
    sizes = [size for n in case.n for size in (n, rank)]
    together = draw(total, case.k)
    weights, pairs = together.split(sizes)[::2], together.split([n + rank for n in case.n])
    factors = torch.cat(together.split(sizes)[1::2])
    x, g, h = draw(case.m, case.k), draw(case.m, rank * len(case.n)), draw(case.m, rank * len(case.n))
    both, ys, with_h = wide(total), [draw(case.m, n) for n in case.n], [wide(n + rank) for n in case.n]
    apart, places = [part.contiguous() for part in both.split(sizes, 1)[::2]], both.split(sizes, 1)[1::2]
    dx, each = draw(case.m, case.k), [draw(case.m, case.k) for _ in case.n]

    def frozen_forward() -> None:
        for weight, y in zip(weights, ys, strict=True):
            torch.mm(x, weight.t(), out=y)

    def apart_forward() -> list[torch.Tensor]:
        torch.mm(x, factors.t(), out=h)
        frozen_forward()
        return [h, *ys]

    def each_forward() -> list[torch.Tensor]:
        return [torch.mm(x, pair.t(), out=out) for pair, out in zip(pairs, with_h, strict=True)]

    def frozen_backward() -> None:
        for dy, weight, out in zip(apart, weights, each, strict=True):
            torch.mm(dy, weight, out=out)

    def apart_backward() -> torch.Tensor:
        torch.mm(g, factors, out=dx)
        for dy, weight in zip(apart, weights, strict=True):
            torch.addmm(dx, dy, weight, out=dx)
        return dx

    def copied() -> torch.Tensor:
        for place, part in zip(places, g.split(rank, 1), strict=True):
            place.copy_(part)
        return torch.mm(both, together, out=dx)

    forward = (frozen_forward, apart_forward, each_forward, lambda: torch.mm(x, together.t(), out=both))
    backward = (frozen_backward, apart_backward, lambda: torch.mm(both, together, out=dx), copied)
    return dict(zip(FORWARD, forward, strict=True)), dict(zip(BACKWARD, backward, strict=True))


def microseconds(case: Siblings, device: Device, rounds: int, window: float) -> list[float]:
    """Of every form, forward and backward."""
    models = [forms(case, device) for _ in range(MODELS if case.m <= FEW else 1)]
    found = []
    for steps in zip(*models, strict=True):
        named: dict[str, Form] = {name: functools.partial(_in_turn, [s[name] for s in steps]) for name in steps[0]}
        if case.m <= FEW:
            named = {name: device.captured(step) for name, step in named.items()}
        seconds = alternate(named, rounds, window, device)
        found += [1e6 * statistics.median(each) / (LAUNCHES * len(models)) for each in seconds.values()]
    return found


def _in_turn(steps: Sequence[Form]) -> None:
    for step in [*steps] * LAUNCHES:
        step()


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
        found = microseconds(case, device, options.rounds, options.window)
        rows.append((case.name, str(case.m), str(case.k), str(case.rank), *(f"{each:.1f}" for each in found)))
    print(f"\n{format_table(rows)}")


if __name__ == "__main__":
    main()
