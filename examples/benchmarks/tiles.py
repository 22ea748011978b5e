"""The kernels of one Llama block by themselves: how long each takes, what its bytes take, and whether other tiles win.

    python examples/benchmarks/tiles.py                              # a Llama-3-8B block, 8192 tokens, rank 16
    python examples/benchmarks/tiles.py --case dropout --tune 2      # a case of the suite, two rounds of other tiles
    python examples/benchmarks/tiles.py --columns 14336 --tune 2     # only kernels over so many columns
    python examples/benchmarks/tiles.py --json tiles.json

A kernel is timed by the profiler right after a large product, as in a step: clocks are lower than for a kernel by
itself, and other tiles win (of rank 64, by a third of the time). "Copy" is what moving its inputs and outputs once
takes at the rate of a copy of 1 GiB on the same device. A round of `--tune` tries every tile that differs from the best
one so far in one number; what the library chooses is `lora_fx/passes/kernels/tile_choice.py`.
"""

import argparse
import contextlib
import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.autograd import DeviceType
from torch.fx import Graph
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases import SUITE, Case
from benchmarks.common import format_table, write_json
from benchmarks.forms import Block, lora_config
from benchmarks.runner import inputs
from benchmarks.timing import Device, environment

import lora_fx
from lora_fx.passes.kernels import operators
from lora_fx.passes.kernels.tile_program import Program, Tile, split


@dataclass
class Kernel:
    """A program as a graph calls it, and what was measured.

    Attributes:
        program: with the tile that was chosen.
        inputs, outputs: tensors like those of the graph, on no device.
        calls: how often the two graphs of a step call it.
        copy: microseconds of its bytes at the rate of a copy.
        times: microseconds by tile.
    """

    program: Program
    inputs: list[Tensor]
    outputs: list[Tensor]
    calls: int = 1
    copy: float = 0.0
    times: dict[Tile, float] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> Tile:
        return min(self.times, key=lambda tile: self.times[tile])

    def as_dict(self) -> dict[str, Any]:
        tiles = [{**dataclasses.asdict(tile), "microseconds": time} for tile, time in self.times.items()]
        program = dataclasses.asdict(self.program)
        return {"program": program, "calls": self.calls, "copy_microseconds": self.copy, "tiles": tiles}


class Collect(CustomGraphPass):
    """Notes the tile programs of the graphs that it sees, in their order."""

    def __init__(self) -> None:
        self.kernels: dict[str, Kernel] = {}

    def uuid(self) -> None:
        """None: a graph out of a cache would not be seen."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.nodes:
            if node.op != "call_function" or node.args[:1] != (operators.tile_,):
                continue
            operands = (node.kwargs["inputs"], node.kwargs["outputs"])
            for program, *each in split(str(node.kwargs["program"]), *operands):  # several may share a launch
                text = program.dumps()
                if text in self.kernels:
                    self.kernels[text].calls += 1
                    continue
                given, written = (
                    [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
                    for tensors in ([n.meta["val"] for n in nodes] for nodes in each)
                )
                self.kernels[text] = Kernel(program, given, written)


def kernels_of(case: Case, device: Device) -> list[Kernel]:
    """The programs of a step of a case."""
    torch.manual_seed(0)
    collect = Collect()
    with torch.device(device.name):
        block = Block(case)
    lora_fx.install(block, lora_config(block, case.rank, case.dropout))
    lora_fx.compile(block, dynamic=False, options={"post_grad_custom_post_pass": collect})
    x, upstream = inputs(case, device, seed=1)
    with torch.set_grad_enabled(not case.no_grad):
        y = block(x)
        if upstream is not None:
            y.backward(upstream)
    return list(collect.kernels.values())


def materialised(kernel: Kernel, device: Device) -> tuple[list[Tensor], list[Tensor]]:
    """Random inputs, and outputs (of their own, where the graph writes into an input)."""

    def one(like: Tensor, kind: Sequence[Any] = ()) -> Tensor:
        if kind[:1] == ["ends"]:  # of rows that are sent to any expert
            counts = torch.randint(kind[1], (kernel.program.row_count(kernel.inputs),)).bincount(minlength=kind[1])
            return counts.cumsum(0).to(device.name, torch.int32)
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device.name)
        return tensor.normal_() if like.is_floating_point() else tensor.random_(0, 2)

    given = [one(t, kind) for t, kind in zip(kernel.inputs, kernel.program.inputs, strict=True)]
    return given, [one(t) for t in kernel.outputs]


def with_tile(kernel: Kernel, tile: Tile) -> tuple[str, list[Tensor]]:
    """The program's text with another tile, and outputs for it: their parts are of its size."""
    program = dataclasses.replace(kernel.program, tile=tile)
    rows = program.row_count(kernel.inputs)
    parts = program.row_parts(rows)
    shapes = [program.output_shape(statement, rows, parts) for statement in program.outputs]
    return program.dumps(), [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes]


def neighbours(tile: Tile) -> Iterator[Tile]:
    """The tiles that differ in one number, as far as they divide into their steps and a kernel may have them."""
    for name, values in (
        ("rows", (tile.rows // 2, tile.rows * 2)),
        ("columns", (tile.columns // 2, tile.columns * 2)),
        ("step", (tile.step // 2, tile.step * 2)),
        ("strips", (tile.strips // 2, tile.strips * 2)),
        ("warps", (4, 8)),
        ("stages", (1, 2, 3, 4)),
    ):
        for value in values:
            changed: dict[str, Any] = {name: value}
            if tile.walk == "rows" and name == "rows":
                changed["step"] = min(value, tile.step)
            try:
                other = dataclasses.replace(tile, **changed)
            except (ValueError, ZeroDivisionError):
                continue
            wide = other.columns // other.strips if other.walk == "rows" else other.step
            tall = other.step if other.walk == "rows" else other.rows
            if other != tile and min(wide, tall) >= 16 and wide * tall <= 32768:
                yield other


def measure(kernel: Kernel, tiles: Sequence[Tile], device: Device) -> None:
    """Time ``kernel`` with each of ``tiles``; one that does not fit the device is left out."""
    from triton.runtime.errors import OutOfResources  # Triton is there where there is a GPU

    from lora_fx.passes.kernels.tile_launch import run_kernel

    given, written = materialised(kernel, device)
    kernel.copy = sum(t.numel() * t.element_size() for t in (*given, *written))

    def compiled(tile: Tile) -> Callable[[], None] | None:
        text, outputs = with_tile(kernel, tile)
        memory = [torch.empty_like(output, device=device.name) for output in outputs]
        run = functools.partial(run_kernel, text, given, memory)
        with contextlib.suppress(OutOfResources):
            run()
            return run
        return None

    with ThreadPoolExecutor() as pool:  # the compiler lets others run meanwhile
        runs = {tile: run for tile, run in zip(tiles, pool.map(compiled, tiles), strict=True) if run is not None}
    kernel.times.update(zip(runs, after_products(list(runs.values()), device), strict=True))


def after_products(runs: Sequence[Callable[[], None]], device: Device, rounds: int = 12) -> list[float]:
    """Microseconds of each of ``runs``, which launch one of our kernels each, right after a large product; in turns."""
    a, b, out = (torch.randn(8192, 8192, device=device.name, dtype=torch.bfloat16) for _ in range(3))
    for _ in range(30):  # until the clocks are those of products
        torch.mm(a, b, out=out)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            for run in runs:
                torch.mm(a, b, out=out)
                run()
        device.synchronise()
    ours = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and e.name.startswith("lora_fx_")]
    ours.sort(key=lambda event: event.time_range.start)
    assert len(ours) == rounds * len(runs), f"{len(ours)} kernels of {rounds * len(runs)} launches"
    return [statistics.median(event.device_time for event in ours[i :: len(runs)]) for i in range(len(runs))]


def copy_rate(device: Device) -> float:
    """Bytes a microsecond of a copy of 1 GiB, read and written."""
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e3 * float(do_bench(lambda: target.copy_(source), return_mode="median")))


def name_of(program: Program) -> str:
    """What a program does, in a few words."""
    counts: dict[str, int] = {}
    for statement in program.body:
        counts[statement[0]] = counts.get(statement[0], 0) + 1
    ranks = sorted({kind[1] for kind in program.inputs if kind[0] in ("thin", "factor")})
    done = ", ".join(f"{count} {name}" for name, count in counts.items() if name != "op")
    experts = f", {program.experts} experts" if program.experts else ""
    return f"N {program.columns}, R {'/'.join(map(str, ranks))}{experts}: {done}"


def shown(tile: Tile) -> str:
    what = f"{tile.walk} {tile.rows}x{tile.columns} by {tile.step}, {tile.warps} warps, {tile.stages} stages"
    return what if tile.strips == 1 else f"{what}, {tile.strips} strips"


def table(kernels: Sequence[Kernel]) -> str:
    """One row a kernel: what was chosen and, where others were tried, what is best."""
    tuned = any(len(kernel.times) > 1 for kernel in kernels)
    rows = [["kernel", "calls", "us", "copy", "tile", *(["best us", "best tile", "tried"] if tuned else [])]]
    for kernel in kernels:
        chosen, best = kernel.program.tile, kernel.best
        row = [name_of(kernel.program), str(kernel.calls), f"{kernel.times[chosen]:.1f}", f"{kernel.copy:.1f}"]
        row.append(shown(chosen))
        if tuned:
            better = best != chosen
            row += [f"{kernel.times[best]:.1f}", shown(best) if better else "", str(len(kernel.times))]
        rows.append(row)
    return format_table(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=SUITE, default="m8192", help="of block.py's suite (%(default)s)")
    parser.add_argument("--columns", type=int, nargs="+", help="only kernels over so many columns")
    parser.add_argument("--experts", action="store_true", help="only kernels of experts, of a case that has some")
    parser.add_argument("--tune", type=int, default=0, metavar="ROUNDS", help="rounds of other tiles (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here, too")
    options = parser.parse_args(arguments)
    try:
        device = Device("cuda")
    except ValueError:
        sys.exit("there is no CUDA device: the kernels of tile programs run nowhere else")
    found = environment(device)
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    rate = copy_rate(device)
    kernels = kernels_of(SUITE[options.case][0], device)
    kernels = [k for k in kernels if options.columns is None or k.program.columns in options.columns]
    kernels = [k for k in kernels if k.program.experts or not options.experts]
    for kernel in tqdm(kernels, unit="kernel"):
        measure(kernel, [kernel.program.tile], device)
        for _ in range(options.tune):
            measure(kernel, [tile for tile in neighbours(kernel.best) if tile not in kernel.times], device)
        kernel.copy /= rate
    print(f"\na copy moves {rate * 1e-6:.2f} TB/s\n\n{table(kernels)}")
    if options.json is not None:
        write_json(options.json, {**found, "case": options.case, "kernels": [k.as_dict() for k in kernels]})


if __name__ == "__main__":
    main()
