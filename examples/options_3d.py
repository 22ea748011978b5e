"""The options of `train_3d.py`: what they are, and which of them do not go together."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

import lora_fx
from llama3 import CONFIGS, LORA
from parallel import Degrees

SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}
# Measured on torch 2.13: with FSDP2 they train to other values than one process does, without any adapter too.
REFUSED = ("zero-bubble", "zbv")
FORMS = ("lora_fx", "plain", "frozen")


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run. Each field is the option of the same name, see `--help`."""

    degrees: Degrees = dataclasses.field(default_factory=Degrees)
    model: str = "debug"
    layers: int | None = None
    schedule: str = "1f1b"
    compile: str = "none"
    form: str = "lora_fx"
    async_tp: bool = False
    draw: str = "cpu"
    steps: int = 20
    batch: int = 8
    microbatches: int | None = None
    length: int = 128
    rank: int = 8
    exclude: tuple[str, ...] = ()
    adapt_experts: bool = False
    exchange: bool = False
    dropout: float = 0.0
    optimizer: str = "adamw"
    lr: float = 3e-3
    clip: float = 1.0
    seed: int = 0
    checkpoints: Path | None = None
    save_every: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.schedule in REFUSED:
            raise ValueError(f"--schedule {self.schedule} is wrong in torch when FSDP shards a stage: take 1f1b")
        dp, pp = self.degrees.dp, self.degrees.pp
        if self.parts < 1 or self.batch % dp or self.batch // dp % self.parts:
            raise ValueError(f"--batch {self.batch} is not {dp} equal parts of {self.parts} equal microbatches")
        if self.schedule == "interleaved" and (pp < 2 or self.parts % pp):
            raise ValueError(
                f"--schedule interleaved needs --pp 2 or more and --microbatches a multiple of it, not {pp}"
            )
        if self.form == "frozen" and self.save_every:
            raise ValueError("--form frozen trains nothing, so --save-every has nothing to save")
        if self.async_tp and (self.degrees.tp == 1 or self.compile == "none"):
            raise ValueError(
                "--async-tp is about compiled tensor parallelism: give --tp 2 or more, and --compile block"
            )
        pieces = max(self.degrees.tp, 1) * (2 * self.degrees.cp if self.degrees.cp > 1 else 1)
        if self.length % pieces:
            raise ValueError(f"--length {self.length} cannot be cut into {pieces} equal pieces")

    @property
    def parts(self) -> int:
        """Microbatches of a step on each data-parallel rank."""
        return self.microbatches if self.microbatches is not None else 2 if self.degrees.pp > 1 else 1

    @property
    def lora(self) -> lora_fx.LoRAConfig | None:
        if self.form == "frozen":
            return None
        return dataclasses.replace(
            LORA["debug"],
            rank=self.rank,
            alpha=2.0 * self.rank,
            dropout=self.dropout,
            target_parameters=("experts.w1", "experts.w2", "experts.w3") if self.adapt_experts else (),
            exclude_modules=(*self.exclude, *(["router"] if CONFIGS[self.model].n_experts else [])),
        )


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """The settings from the command line."""
    default = Settings()
    parser = argparse.ArgumentParser(
        description="Fine-tune a Llama 3 with adapters on many ranks. Start it with torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    for name, what in (("pp", "pipeline"), ("dp", "data (FSDP2)"), ("cp", "context"), ("tp", "tensor and sequence")):
        option(f"--{name}", type=int, default=1, help=f"ranks along the {what} dimension")
    option("--ep", type=int, default=1, help="data-parallel ranks that hold the experts of a mixture between them")
    option("--model", choices=CONFIGS, default=default.model, help="size of the model")
    option("--layers", type=int, help="number of layers, if not the model's own")
    option("--schedule", choices=[*SCHEDULES, *REFUSED], default=default.schedule, help="pipeline schedule")
    option("--compile", choices=("none", "block", "stage"), default=default.compile, help="what is compiled at a time")
    option("--form", choices=FORMS, default=default.form, help="plain is compiled as it stands, frozen has no adapters")
    option("--async-tp", action="store_true", help="Inductor pipelines tensor parallelism's collectives (on GPUs)")
    option(
        "--draw",
        choices=("cpu", "device"),
        default=default.draw,
        help="where initial values are drawn, one layer at a time",
    )
    option("--steps", type=int, default=default.steps, help="optimizer steps in all")
    option("--batch", type=int, default=default.batch, help="windows a step, over all ranks")
    option("--microbatches", type=int, help="parts of a batch, one after another (2 in a pipeline, otherwise 1)")
    option("--length", type=int, default=default.length, help="bytes a window")
    option("--rank", type=int, default=default.rank, help="LoRA rank; alpha is twice that")
    option("--exclude", nargs="+", default=(), help="modules that get no adapter, as in LoRAConfig.exclude_modules")
    option("--adapt-experts", action="store_true", help="routed experts get adapters, too")
    option("--exchange", action="store_true", help="--ep ranks send one another the tokens asked for, not all of them")
    option("--dropout", type=float, default=default.dropout, help="of the adapters' inputs")
    option("--optimizer", choices=("adamw", "sgd"), default=default.optimizer, help="AdamW with a schedule, or SGD")
    option("--lr", type=float, default=default.lr, help="(peak) learning rate")
    option("--clip", type=float, default=default.clip, help="largest norm of the gradient; 0 leaves it")
    option("--seed", type=int, default=default.seed, help="of initial values, batches and dropout")
    option("--checkpoints", type=Path, help="folder of checkpoints; the newest one in it is gone on from")
    option("--save-every", type=int, default=default.save_every, help="steps between checkpoints; 0 writes none")
    option("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters and activations")
    values = vars(parser.parse_args(arguments))
    try:
        degrees = Degrees(**{name: values.pop(name) for name in ("pp", "dp", "cp", "tp", "ep")})
        values.update(exclude=tuple(values["exclude"]), dtype=getattr(torch, values["dtype"]))
        settings = Settings(degrees=degrees, **values)
        if settings.save_every and settings.checkpoints is None:
            raise ValueError("--save-every needs --checkpoints")
    except ValueError as error:
        parser.error(str(error))
    return settings
