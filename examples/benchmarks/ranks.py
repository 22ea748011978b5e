"""LoRA's cost on many GPUs: the steps of `train_3d.py` on each mesh, with adapters and frozen, and their collectives.

    python examples/benchmarks/ranks.py --json ranks.json          # all meshes of Llama-3-8B that fit the GPUs
    python examples/benchmarks/ranks.py --mesh tp2 tp2-async --steps 20
    python examples/benchmarks/ranks.py --mesh tp2 --reference ranks.json        # one GPU's losses, as found before
    python examples/benchmarks/ranks.py --mesh ep2 --model mixtral # experts of 8B's widths, and not of half of them
    python examples/benchmarks/ranks.py --model debug              # in float32: losses equal to one GPU's
    python examples/benchmarks/ranks.py --model tiny --mesh tp2 pp2 --device cpu         # does it run at all

Every mesh is a run of its own, under torchrun. In it the frozen job runs first, then plain LoRA compiled as it stands,
then lora_fx. A step is all that `train_3d.py` does: forward, backward, and with adapters the reduction of their
gradients, clipping and AdamW, up to the loss on the host. The frozen job goes forward and backward, too (its embeddings
have a gradient). Adapters are on the seven linears of every block, and on routed experts where there are some. The
losses are compared with those of one GPU that has the same batch.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import compiling, format_table, write_json
from benchmarks.meshes import MESHES, fits, job
from benchmarks.runner import free
from benchmarks.timing import Device, environment
from torch.autograd import DeviceType
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

from corpus import library_sources
from lora_fx.distributed import manual_seed
from lora_fx.placements import fill, local
from options_3d import Settings
from options_3d import parse as parse_job
from parallel import part_seed
from train_3d import Trainer, collecting_between_steps, join
from trainer import random_windows

FORMS = ("frozen", "plain", "lora_fx")
LABELS = dict(zip(FORMS, ("frozen", "plain LoRA, compile", "lora_fx")))
WARM = 2  # steps after the first, before the clock starts


@dataclass(frozen=True)
class Row:
    """What was found of one form on one mesh.

    Attributes:
        form: a key of `LABELS`.
        milliseconds, low, high: of a step, median and quartiles of the slowest rank.
        peak_bytes: the most that a rank had in use during a step; None on a CPU.
        adapter_bytes: of the first rank's adapters and their optimizer's state.
        built_seconds: until the model is there.
        first_seconds: of the first step, which compiles.
        losses: of all steps.
        norms: of all steps' gradients before they are clipped; none of the frozen job.
        collectives: of one step of the first rank, by name.
        sites: (rewritten, all) branches of the first block of each rank, by rank.
    """

    form: str
    milliseconds: float
    low: float
    high: float
    peak_bytes: int | None
    adapter_bytes: int
    built_seconds: float
    first_seconds: float
    losses: list[float]
    norms: list[float]
    collectives: dict[str, int]
    sites: list[tuple[int, int]]


@torch.no_grad()
def shake(adapters: Mapping[str, torch.nn.Parameter]) -> None:
    """Put every B where training would, the same on any mesh.

    At zero, and after the first small steps, the branches are far below a unit in the last place of what they are added
    to in bfloat16. Whether such a thing has an effect is up to where a mesh rounds: one GPU adds it to two numbers of
    few digits at once, whose sum is often just between two others, so the least branch decides which one it becomes.
    """
    for name, parameter in adapters.items():
        if name.endswith("lora_b"):
            generator = torch.Generator(parameter.device).manual_seed(part_seed(0, name))
            values = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            fill(parameter, (0.1 * parameter.shape[-1] ** -0.5 * values).to(parameter.dtype))


# ---- one rank of one mesh


def measure(settings: Settings, form: str, mesh: DeviceMesh, place: torch.device, device: Device) -> Row:
    """Train one form for its steps; all ranks call it. The first, the second and the third step are not timed."""
    settings, start = dataclasses.replace(settings, form=form), time.perf_counter()
    trainer = Trainer(settings, mesh, place)
    shake(trainer.adapters)
    manual_seed(settings.seed, mesh)
    windows = random_windows(
        library_sources().train_tokens(), settings.steps, settings.batch, settings.length, settings.seed
    )
    device.synchronise()
    built = time.perf_counter() - start
    losses: list[float] = []
    norms: list[float] = []
    seconds: list[float] = []
    with collecting_between_steps() as collect:
        for step in range(settings.steps):
            if step == 1 + WARM and device.cuda:
                torch.cuda.reset_peak_memory_stats()
            device.synchronise()
            torch.distributed.barrier()
            began = time.perf_counter()
            loss, norm = trainer.step(step, windows[step])
            device.synchronise()
            seconds.append(time.perf_counter() - began)
            collect(step)
            losses.append(loss)
            norms += [norm] if norm is not None and trainer.adapters else []
            if not all(map(math.isfinite, (*losses[-1:], *norms[-1:]))):
                raise ArithmeticError(
                    f"{LABELS[form]} does not train, its times would mean nothing: losses {losses}, norms {norms}"
                )
    slowest = torch.tensor(seconds, dtype=torch.float64, device=place)
    torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
    peak = torch.tensor(torch.cuda.max_memory_allocated() if device.cuda else 0, device=place)
    torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
    states = trainer.optimizer.state.values() if trainer.optimizer is not None else ()
    held = [*trainer.adapters.values(), *(v for state in states for v in state.values())]
    low, middle, high = statistics.quantiles(slowest[1 + WARM :].tolist(), n=4)
    return Row(
        form=form,
        milliseconds=1e3 * middle,
        low=1e3 * low,
        high=1e3 * high,
        peak_bytes=int(peak) if device.cuda else None,
        adapter_bytes=sum(local(tensor).numel() * tensor.element_size() for tensor in held),
        built_seconds=built,
        first_seconds=float(slowest[0]),
        losses=losses,
        norms=norms,
        collectives=collectives(lambda: trainer.step(settings.steps - 1, windows[-1]), device),
        sites=trainer.sites(blocks=1) if form == "lora_fx" else [],
    )


def collectives(step: Any, device: Device) -> dict[str, int]:
    """How often this rank starts each collective in a step, under the profiler's names."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.cuda else [])]
    with profile(activities=activities) as profiler:
        step()
        device.synchronise()
    found: Counter[str] = Counter()
    for event in profiler.events():
        backend, _, name = event.name.partition(":")
        if backend in ("nccl", "gloo") and event.device_type == DeviceType.CPU:
            found[name.split(" ")[0]] += 1  # without the rank that a message goes to
    return dict(sorted(found.items()))


def work(arguments: Sequence[str], forms: Sequence[str], file: Path) -> None:
    """One rank: all forms of one mesh, one after another; the first rank writes what it found."""
    settings = parse_job(arguments)
    join(int(os.environ["LOCAL_RANK"]))
    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.device(device.name, torch.cuda.current_device()) if device.cuda else torch.device("cpu")
    mesh = settings.degrees.mesh(place)
    rows = []
    for form in forms:
        with compiling():
            rows.append(measure(settings, form, mesh, place, device))
        free(device)
        if torch.distributed.get_rank() == 0:
            print(f"{LABELS[form]}: {rows[-1].milliseconds:.1f} ms", file=sys.stderr, flush=True)
            write_json(file, {"rows": [dataclasses.asdict(row) for row in rows]})
    torch.distributed.destroy_process_group()


# ---- the run of all meshes


def launch(arguments: Sequence[str], world: int, forms: Sequence[str], limit: float, cpu: bool) -> list[Row] | str:
    """Run one job under torchrun: its rows, or the end of what it printed if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command += [__file__, "--worker", str(file), "--forms", *forms, "--", *arguments]
        variables = {"OMP_NUM_THREADS": "1", **os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})}
        process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            printed, why = process.communicate(timeout=limit)[0], f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun then ends its ranks, which would go on if it were killed
            printed, why = process.communicate()[0], f"not done after {limit:.0f} s"
        if process.returncode:
            return f"{why}\n{printed.decode(errors='replace')[-4000:]}"
        return [Row(**row) for row in json.loads(file.read_text())["rows"]]


def earlier(file: Path, model: str) -> dict[str, list[Row]]:
    """What one GPU did, by the job, of results that ``--json`` wrote, as far as their jobs are those of today."""
    document, found = json.loads(file.read_text()), {}
    for mesh, row in document["one_gpu"].items():
        line = document["jobs"][mesh]
        steps = parse_job(line.split()).steps
        if mesh in MESHES and line == " ".join(job(mesh, model, steps)):
            found[" ".join(job(mesh, model, steps, whole=True))] = [Row(**row)]
    return found


def difference(row: Row, reference: Sequence[Row]) -> float:
    """The largest difference of a loss from that of lora_fx on one GPU."""
    (alone,) = reference
    return max(abs(a - b) for a, b in zip(row.losses, alone.losses, strict=True))


def allowed(row: Row, frozen: Row) -> int | None:
    """The bar for a rank's memory: 1.08 times the frozen job's, and adapters with their optimizer's state."""
    return None if frozen.peak_bytes is None else int(1.08 * frozen.peak_bytes) + row.adapter_bytes


def table(found: dict[str, list[Row]], references: dict[str, list[Row]]) -> str:
    """All meshes as aligned text."""
    cells = [("mesh", "form", "ms a step", "quartiles", "ratio", "peak GiB", "allowed", "built s", "first s",
              "loss off by", "rewritten")]  # fmt: skip
    for mesh, rows in found.items():
        (frozen,) = (row for row in rows if row.form == "frozen")
        for row in rows:
            bar, ours = allowed(row, frozen), row.form == "lora_fx"
            done, total = (sum(column) for column in zip(*row.sites)) if row.sites else (0, 0)
            cells.append(
                (
                    mesh,
                    LABELS[row.form],
                    f"{row.milliseconds:.1f}",
                    f"{row.low:.1f}-{row.high:.1f}",
                    f"{row.milliseconds / frozen.milliseconds:.3f}",
                    "" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}",
                    f"{bar / 2**30:.2f}" if bar is not None and ours else "",
                    f"{row.built_seconds:.1f}",
                    f"{row.first_seconds:.1f}",
                    f"{difference(row, references[mesh]):.1e}" if mesh in references and row is not frozen else "",
                    f"{done} of {total}" if ours else "",
                )
            )
    return format_table(cells)


def collective_table(found: dict[str, list[Row]]) -> str:
    """Collectives a step of the frozen job and of the others, where a mesh has some."""
    cells = [("mesh", "collective", *LABELS.values())]
    for mesh, rows in found.items():
        forms = {row.form: row.collectives for row in rows}
        for name in sorted({name for counts in forms.values() for name in counts}):
            cells.append((mesh, name, *(str(forms.get(form, {}).get(name, 0)) for form in LABELS)))
    return format_table(cells)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    models = ("8B", "mixtral", "debug", "tiny")
    option("--model", choices=models, default="8B", help="the model; mixtral: for meshes with experts (%(default)s)")
    option("--mesh", nargs="+", choices=MESHES, help="meshes (all of as many ranks as GPUs)")
    option("--steps", type=int, default=12, help=f"steps of each form, the first {1 + WARM} untimed (%(default)s)")
    option("--limit", type=float, default=900, help="seconds that one mesh may take (%(default)s)")
    option("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: wall clock, to try the program")
    option("--no-reference", action="store_true", help="do not compare losses with one GPU's")
    option("--reference", nargs="+", type=Path, default=[], metavar="FILE", help="one GPU's losses of earlier results")
    option("--json", type=Path, metavar="FILE", help="write the result here, too")
    option("--worker", type=Path, help=argparse.SUPPRESS)
    option("--forms", nargs="+", choices=LABELS, default=list(FORMS), help=argparse.SUPPRESS)
    option("job", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 3 + WARM:
        parser.error(f"--steps must be at least {3 + WARM}")
    if not all(fits(options.model, mesh) for mesh in options.mesh or ()):
        meshes = ", ".join(mesh for mesh in MESHES if fits(options.model, mesh))
        parser.error(f"--model {options.model} is for {meshes}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line, or as one of the ranks that it starts."""
    options = parse(arguments)
    if options.worker is not None:
        work(options.job, options.forms, options.worker)
        return
    cpu = options.device == "cpu"
    try:
        device = Device(options.device)
    except ValueError as error:
        sys.exit(str(error))
    jobs = {mesh: job(mesh, options.model, options.steps) for mesh in MESHES if fits(options.model, mesh)}
    worlds = {mesh: parse_job(line).degrees.world for mesh, line in jobs.items()}
    gpus = torch.cuda.device_count() if device.cuda else max(worlds.values())
    meshes = options.mesh or [mesh for mesh, world in worlds.items() if world == gpus > 1]
    if not meshes or max(worlds[mesh] for mesh in meshes) > gpus:
        sys.exit(f"{gpus} GPU(s): too few for {', '.join(meshes) or 'any mesh'}")
    where = environment(device) | {"gpus": str(gpus)}
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
    found: dict[str, list[Row]] = {}
    references: dict[str, list[Row]] = {}
    failed: dict[str, str] = {}
    alone: dict[str, list[Row] | None] = {}  # by the job: meshes of one batch share theirs
    for file in options.reference:
        try:
            alone |= earlier(file, options.model)
        except (OSError, ValueError, LookupError, TypeError) as error:
            sys.exit(f"{file} is no result of this program: {type(error).__name__}: {error}")

    def save() -> None:
        if options.json is not None:
            rows_of = {name: [dataclasses.asdict(row) for row in rows] for name, rows in found.items()}
            one_gpu = {name: dataclasses.asdict(rows[0]) for name, rows in references.items()}
            settings = {mesh: " ".join(jobs[mesh]) for mesh in found}
            document = {**where, "jobs": settings, "meshes": rows_of, "one_gpu": one_gpu, "failed": failed}
            write_json(options.json, document)

    def run(name: str, arguments: list[str], world: int, forms: list[str]) -> list[Row] | None:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows = launch(arguments, world, forms, options.limit, cpu)
        if isinstance(rows, str):
            print(f"{name} failed:\n{rows}", file=sys.stderr, flush=True)
            failed[name] = rows
            return None
        return rows

    for mesh in meshes:
        rows = run(mesh, jobs[mesh], worlds[mesh], options.forms)
        if rows is not None:
            found[mesh] = rows
            save()  # whatever comes of the rest
            if not options.no_reference:
                whole = job(mesh, options.model, options.steps, whole=True)
                key = " ".join(whole)
                if key not in alone:
                    alone[key] = run(f"{mesh} on one GPU", whole, 1, ["lora_fx"])
                if (reference := alone[key]) is not None:
                    references[mesh] = reference
        save()
    print(f"\n{table(found, references)}\n\n{collective_table(found)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
    sys.exit(0)


if __name__ == "__main__":
    main()
