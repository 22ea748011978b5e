"""Training and measuring a language model on windows of a stream of tokens: what `finetune.py` does four times.

Legend of shapes: N steps, B windows a step, S tokens a window.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from json import loads
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

WARMUP_STEPS = 10
FINAL_LR = 0.1  # of the peak learning rate, where the cosine ends
GRADIENT_CLIP = 1.0


@dataclass
class Curve:
    """What one training run left behind.

    Attributes:
        name: the form that was trained.
        trained: number of parameters that the optimizer held.
        train: loss of each step's batch, in nats a token.
        held_out: (steps done, held-out loss), from before the first step to after the last.
        tokens_per_second: of a median step; the first, which compiles, is left out.
        peak_bytes: `resident_bytes` and `growth_bytes` of one step, together.
    """

    name: str
    trained: int
    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    tokens_per_second: float = math.nan
    peak_bytes: int = 0

    @property
    def final(self) -> float:
        """Held-out loss at the end."""
        return self.held_out[-1][1]


def random_windows(tokens: Tensor, steps: int, batch: int, length: int, seed: int) -> Tensor:
    """Windows at random places of a stream [tokens], the same for one seed: [N, B, S + 1]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(tokens.numel() - length, (steps, batch, 1), generator=generator)
    return tokens[starts + torch.arange(length + 1)]


def even_windows(tokens: Tensor, steps: int, batch: int, length: int) -> Tensor:
    """Windows spread evenly over a stream [tokens]: [N, B, S + 1]."""
    starts = torch.linspace(0, tokens.numel() - length - 1, steps * batch).long().view(steps, batch, 1)
    return tokens[starts + torch.arange(length + 1)]


def next_token_loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each next token of `windows` [B, S + 1]."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def held_out_loss(model: nn.Module, windows: Tensor) -> float:
    """Mean loss over `windows` [N, B, S + 1].

    Gradients are left on, and none is taken: this way it is the compiled training forward that runs, and no second
    graph has to be compiled for evaluation.
    """
    return sum(next_token_loss(model, batch).item() for batch in windows) / len(windows)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine from `peak` to `FINAL_LR * peak`."""
    warmup = min(WARMUP_STEPS, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    name: str,
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    windows: Tensor,
    held_out: Tensor,
    *,
    lr: float,
    evaluations: int = 8,
) -> Curve:
    """Train `parameters` of `model` with AdamW on each of `windows` [N, B, S + 1] once, under a progress bar.

    Args:
        name: the form, for the bar and the curve.
        lr: peak learning rate, see `learning_rate`.
        held_out: windows for the held-out loss, [n, B, S + 1].
        evaluations: how often the held-out loss is taken after the start, evenly spread.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    curve = Curve(name, sum(p.numel() for p in trained))
    steps, tokens = len(windows), windows[0, :, 1:].numel()
    evaluate_at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    seconds: list[float] = []

    def step(batch: Tensor) -> float:
        loss = next_token_loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, GRADIENT_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    with tqdm(
        windows, desc=f"{name:<16}", unit="step", postfix="compiling", dynamic_ncols=True, mininterval=0.5
    ) as bar:
        curve.held_out.append((0, held_out_loss(model, held_out)))
        for done, batch in enumerate(bar, start=1):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(done - 1, steps, lr)
            curve.train.append(step(batch))
            seconds.append(time.perf_counter() - start)
            if done in evaluate_at:
                curve.held_out.append((done, held_out_loss(model, held_out)))
            curve.tokens_per_second = tokens / median(seconds[1:] or seconds)
            bar.set_postfix_str(
                f"loss {curve.train[-1]:.3f}, held-out {curve.final:.3f}, {_rate(tokens, seconds)}", refresh=False
            )
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # one more step, to be measured: it must leave the weights as they are
    curve.peak_bytes = resident_bytes(model, optimizer) + growth_bytes(lambda: step(windows[0]), windows.device)
    return curve


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of parameters, buffers and optimizer state: what is held between steps."""
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor)]
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *state))


def growth_bytes(step: Callable[[], object], device: torch.device) -> int:
    """The most that `step` held at one time beyond what was held before it: activations, gradients and temporaries.

    Every allocation is counted by the allocator, compiled code's too: by CUDA's statistics, or on a CPU in the
    memory events of torch's profiler. (The resident set of the process would show the compiler's memory instead.)
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = loads(path.read_text())["traceEvents"]
    changes = [event["args"] for event in events if event["name"] == "[memory]"]
    # The allocator's count goes on from one profile to the next: only the growth means something.
    before = changes[0]["Total Allocated"] - changes[0]["Bytes"]
    return max(change["Total Allocated"] for change in changes) - before


def _rate(tokens: int, seconds: Sequence[float]) -> str:
    return f"{tokens / seconds[-1]:,.0f} tok/s"
