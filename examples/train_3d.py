"""Fine-tune a Llama 3 with adapters on many ranks: pipeline, data, context and tensor parallel, compiled and rewritten.

    torchrun --nproc-per-node 8 examples/train_3d.py --pp 2 --dp 2 --tp 2 --compile block
    torchrun --nproc-per-node 8 examples/train_3d.py --pp 2 --dp 2 --cp 2 --compile block --schedule interleaved

Without a GPU the ranks are processes that talk by gloo; with GPUs each has one, and they talk by NCCL. The batch and
the initial values do not depend on the mesh, so any two meshes train alike up to rounding.
"""

import contextlib
import dataclasses
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor.parallel import loss_parallel
from tqdm import tqdm

import adapter_checkpoint
import lora_fx
from corpus import library_sources
from llama3 import CONFIGS
from lora_fx.distributed import DeferredReduction, ShardedAdamW, average_gradients, clip_grad_norm, manual_seed
from lora_fx.placements import local
from options_3d import SCHEDULES, Settings, parse
from parallel import build_stage
from ring_attention import sequences_over
from trainer import learning_rate, random_windows


@dataclasses.dataclass
class Outcome:
    """What a rank saw.

    Attributes:
        losses: of each step that was done, the mean over all tokens; the same on every rank.
        norms: of each step's gradient before clipping, over all ranks; empty without clipping.
        sites: (rewritten, all) branches of every rank, by rank; empty when nothing was compiled.
        seconds: of each step.
        built: seconds until the first step.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)
    sites: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    built: float = 0.0


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of `targets` [B, S] under `logits` [B, S, V], in nats a token.

    Where tensor-parallel ranks have a part of the vocabulary each, within `loss_parallel`, as its backward pass.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def run(settings: Settings) -> Outcome:
    """Train on the ranks of the default process group; all of them call it."""
    start = time.perf_counter()
    degrees = settings.degrees
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    mesh = degrees.mesh(device)
    trainer = Trainer(settings, mesh, device)
    windows = random_windows(
        library_sources().train_tokens(), settings.steps, settings.batch, settings.length, settings.seed
    )
    outcome, first = Outcome(), trainer.resume()
    manual_seed(settings.seed + first, mesh)  # for dropout
    outcome.built = time.perf_counter() - start
    bar = tqdm(range(first, settings.steps), unit="step", disable=torch.distributed.get_rank() != 0, dynamic_ncols=True)
    with collecting_between_steps() as collect:
        for step in bar:
            began = time.perf_counter()
            loss, norm = trainer.step(step, windows[step])
            outcome.seconds.append(time.perf_counter() - began)
            outcome.losses.append(loss)
            outcome.norms += [] if norm is None else [norm]
            collect(step)
            bar.set_postfix_str(f"loss {loss:.4f}")
            if settings.save_every and (step + 1) % settings.save_every == 0:
                trainer.save(step + 1)
    if settings.compile != "none" and settings.form == "lora_fx":
        outcome.sites = trainer.sites()
    return outcome


@contextlib.contextmanager
def collecting_between_steps(every: int = 50) -> Iterator[Callable[[int], None]]:
    """Within it Python collects garbage only when the function that it gives is called after each step, and seldom.

    By itself it does so in the middle of steps, and goes through all that the compiler keeps: a tenth of a second in
    which a rank launches nothing, and all others wait for it.
    """

    def collect(step: int) -> None:
        if (step + 1) % every == 0:
            gc.collect(1)

    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield collect
    finally:
        if enabled:
            gc.enable()


class Trainer:
    """One rank's stages, their optimizer and their schedule."""

    def __init__(self, settings: Settings, mesh: DeviceMesh, device: torch.device) -> None:
        self.settings, self.mesh, self.device = settings, mesh, device
        degrees, rank = settings.degrees, mesh["pp"].get_local_rank()
        self.stages = degrees.pp * (2 if settings.schedule == "interleaved" else 1)
        self.held = list(range(rank, self.stages, degrees.pp))
        if settings.async_tp:
            # For the whole process, as torchtitan does: the passes of a backward run when it is compiled, later.
            torch._inductor.config._micro_pipeline_tp = True
            enable_symmetric_memory(mesh["tp"])
        config = dataclasses.replace(CONFIGS[settings.model], max_seq_len=settings.length)
        if settings.layers is not None:
            config = dataclasses.replace(config, n_layers=settings.layers)
        self.models = [
            build_stage(
                config,
                settings.lora,
                mesh,
                stage,
                self.stages,
                length=settings.length,
                device=device,
                dtype=settings.dtype,
                compiled=settings.compile,
                rewrite=settings.form == "lora_fx",
                seed=settings.seed,
                draw_on="cpu" if settings.draw == "cpu" else device,
                exchange=settings.exchange,
            )
            for stage in self.held
        ]
        adapted = [model for model in self.models if lora_fx.is_installed(model)]
        self.adapters = {name: p for model in adapted for name, p in lora_fx.named_adapter_parameters(model)}
        parameters = list(self.adapters.values())
        # FSDP leaves adapters alone: what their gradients are sums over, and what has to be reduced yet. Those of
        # experts that ranks hold between them have the tokens of these ranks already.
        shared_out = {name for name in self.adapters if ".experts." in name} if degrees.ep > 1 else set()
        self.averages: list[tuple[list[torch.nn.Parameter], tuple[str, ...]]]
        self.averages = [([p for name, p in self.adapters.items() if name not in shared_out], ("dp_cp",))]
        if shared_out:
            self.averages.append(([p for name, p in self.adapters.items() if name in shared_out], ("dp_outer", "cp")))
        # One kernel for all parameters, where otherwise the CPU would lag behind the GPU.
        self.fused = device.type == "cuda"
        kinds: dict[str, Any] = {
            "adamw": functools.partial(ShardedAdamW, fused=self.fused),
            # One parameter at a time: no kernel of torch's takes shards of experts beside whole adapters.
            "sgd": functools.partial(torch.optim.SGD, foreach=False),
        }
        # A stage may be without adapters, and torch has no optimizer of nothing.
        self.optimizer: torch.optim.Optimizer | None = None
        self.reduction: DeferredReduction | None = None
        if parameters:
            self.optimizer = kinds[settings.optimizer](parameters, lr=settings.lr, weight_decay=0.0)
            if degrees.tp > 1:
                self.reduction = DeferredReduction(adapted, self.optimizer)
        self.schedule = self._schedule() if degrees.pp > 1 else None

    def _schedule(self) -> Any:
        group = self.mesh["pp"].get_group()
        stages = [
            PipelineStage(model, stage, self.stages, self.device, group=group)
            for model, stage in zip(self.models, self.held)
        ]
        kind = SCHEDULES[self.settings.schedule]
        what = stages if self.settings.schedule == "interleaved" else stages[0]
        return kind(what, n_microbatches=self.settings.parts, loss_fn=next_token_loss)

    @property
    def is_first(self) -> bool:
        return 0 in self.held

    @property
    def is_last(self) -> bool:
        return self.stages - 1 in self.held

    def step(self, step: int, windows: Tensor) -> tuple[float, float | None]:
        """One optimizer step on `windows` [B, S + 1]: its loss, and the norm of its gradient where that is clipped."""
        parameters = list(self.adapters.values())
        if self.optimizer is not None:
            self.optimizer.zero_grad()
            if self.settings.optimizer == "adamw":
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(step, self.settings.steps, self.settings.lr)
        with self._context() as shard:
            inputs, targets = shard(windows[:, :-1]), shard(windows[:, 1:])
            with loss_parallel() if self.settings.degrees.tp > 1 else contextlib.nullcontext():
                loss = self._forward_backward(inputs, targets)
        if self.reduction is not None:
            self.reduction.reduce()
        if (ranks := self.settings.degrees.dp * self.settings.degrees.cp) > 1:
            for parameters_of, names in self.averages:
                groups = [self.mesh[name].get_group() for name in names if self.mesh[name].size() > 1]
                average_gradients(parameters_of, groups, ranks)
        norm = None
        if self.settings.clip:
            groups = [self.mesh["pp"].get_group()] if self.settings.degrees.pp > 1 else []
            norm = clip_grad_norm(parameters, self.settings.clip, groups=groups, device=self.device)
        if self.optimizer is not None:
            self.optimizer.step()
        # Read when everything is queued: whoever reads a number waits for the GPU, which then waits for its next work.
        return self._mean(loss), None if norm is None else norm.item()

    @contextlib.contextmanager
    def _context(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Within it a step runs; gives a function that cuts this rank's part out of a batch [B, S]."""
        degrees, cp = self.settings.degrees, self.mesh["cp"]

        def mine(batch: Tensor) -> Tensor:
            return batch.chunk(degrees.dp)[self.mesh["dp"].get_local_rank()].to(self.device).contiguous()

        if degrees.cp == 1:
            yield mine
            return
        with sequences_over(cp, self.device, [model.rope for model in self.models]) as part:
            yield lambda batch: part(mine(batch))

    def _forward_backward(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        """The mean loss of this rank's tokens, on ranks of the last stage; gradients are in the parameters."""
        losses: list[Tensor] = []
        if self.schedule is None:
            parts = self.settings.parts
            for some, following in zip(inputs.chunk(parts), targets.chunk(parts)):
                loss = next_token_loss(self.models[0](some), following)
                (loss / parts).backward()
                losses.append(local(loss.detach()))
            return torch.stack(losses).mean()
        arguments = (inputs,) if self.is_first else ()
        if self.is_last:
            self.schedule.step(*arguments, target=targets, losses=losses)
            return torch.stack([local(loss.detach()) for loss in losses]).mean()
        self.schedule.step(*arguments)
        return None

    def _mean(self, loss: Tensor | None) -> float:
        """The mean over the ranks that have a loss, on all ranks."""
        total = torch.zeros(2, device=self.device)
        if loss is not None:
            total += torch.stack([loss.float(), torch.ones((), device=self.device)])
        torch.distributed.all_reduce(total)
        return float(total[0] / total[1])

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: adapters, their scales, and what the optimizer remembers, by global name."""
        tensors: dict[str, Tensor] = dict(self.adapters)
        for model in self.models:
            tensors |= {name: b for name, b in model.named_buffers() if name.endswith(".lora_scale")}
        if self.optimizer is not None and self.settings.optimizer == "adamw":
            for name, parameter in self.adapters.items():
                state = self.optimizer.state[parameter]
                if not state:  # before the first step: what AdamW starts with
                    # Fused AdamW counts on the device.
                    state["step"] = torch.zeros((), device=self.device if self.fused else "cpu")
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        return tensors

    def save(self, step: int) -> None:
        """Write a checkpoint after `step` steps."""
        assert self.settings.checkpoints is not None
        writes = all(self.mesh[name].get_local_rank() == 0 for name in ("dp", "cp", "tp"))
        stage = self.mesh["pp"].get_local_rank()
        extra = {"degrees": vars(self.settings.degrees), "model": self.settings.model}
        adapter_checkpoint.save(self.settings.checkpoints, step, self.state(), stage=stage, writes=writes, extra=extra)

    def resume(self) -> int:
        """Go on from the newest checkpoint, if there is one; returns how many steps it has done."""
        folder = self.settings.checkpoints
        checkpoint = adapter_checkpoint.newest(folder) if folder is not None else None
        if checkpoint is None:
            return 0
        step = adapter_checkpoint.load(checkpoint, self.state())["step"]
        assert isinstance(step, int)
        return step

    def sites(self, blocks: int | None = None) -> list[tuple[int, int]]:
        """For every rank, how many branches of its blocks, or the first `blocks`, are rewritten, and of how many.

        `explain` traces each block again: on a hit of Inductor's caches the passes do not run.
        """
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        local = self.settings.length // self.settings.degrees.cp // self.settings.degrees.tp
        size = (self.settings.batch // self.settings.degrees.dp // self.settings.parts, local)
        for model in self.models:
            for layer in list(model.layers.values())[:blocks]:
                if lora_fx.is_installed(layer):
                    x = torch.zeros(*size, model.config.dim, dtype=self.settings.dtype, device=self.device)
                    report = lora_fx.explain(layer, x.requires_grad_(), model.rope)
                    counts += torch.tensor([report.rewritten, len(report.sites)], device=self.device)
        everyone = [torch.empty_like(counts) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, counts)
        return [(int(rewritten), int(total)) for rewritten, total in everyone]


def summary(settings: Settings, outcome: Outcome) -> str:
    """The final report."""
    degrees = [f"{name} {degree}" for name, degree in vars(settings.degrees).items() if degree > 1]
    how = [*degrees, *([settings.schedule] if settings.degrees.pp > 1 else []), f"compile {settings.compile}"]
    lines = [", ".join(how)]
    if outcome.losses:
        tokens = settings.batch * settings.length
        steady = sorted(outcome.seconds[1:] or outcome.seconds)
        rate = tokens / steady[len(steady) // 2]
        lines.append(f"loss {outcome.losses[0]:.4f} -> {outcome.losses[-1]:.4f} in {len(outcome.losses)} steps")
        lines.append(
            f"{outcome.built:.1f} s to build, {outcome.seconds[0]:.1f} s for the first step, then {rate:,.0f} tokens/s"
        )
    for rank, (rewritten, total) in enumerate(outcome.sites):
        lines.append(f"rank {rank}: {rewritten} of {total} branches of its blocks rewritten")
    return "\n".join(lines)


def enable_symmetric_memory(mesh: DeviceMesh) -> None:
    """Let the ranks of `mesh` write to one another's memory, which pipelined collectives do.

    Checked on torch 2.11 and 2.13.
    """
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(mesh.get_group().group_name)


def join(local_rank: int) -> None:
    """Form the default process group by the variables that torchrun sets: over NCCL, with a GPU each, or over gloo."""
    if not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo")
        return
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl", device_id=device)


def main() -> None:
    """Run from the command line, under torchrun."""
    settings = parse()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != settings.degrees.world:
        needed = settings.degrees.world
        sys.exit(f"{needed} ranks are needed, not {world}: torchrun --nproc-per-node {needed} {sys.argv[0]} ...")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    join(int(os.environ.get("LOCAL_RANK", "0")))
    outcome = run(settings)
    if torch.distributed.get_rank() == 0:
        print(summary(settings, outcome))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
