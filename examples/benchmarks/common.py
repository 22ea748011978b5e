"""What the benchmarks share: forms that compute one thing, measured in turns, against one oracle.

A *form* is one way to run a module: frozen, plain LoRA, lora_fx, each eager or compiled. All forms of a case hold the
same weights and adapters and see the same inputs.
"""

import functools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLoRALinear(nn.Linear):
    """LoRA as it is usually written, the yardstick: `base(x) + scale * (dropout(x) A^T) B^T`, scale a float."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scale: float
    dropout: float

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        x = F.dropout(input, self.dropout, self.training) if self.dropout else input
        return super().forward(input) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def install_plain_lora(model: nn.Module, rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Make every linear of `model` a `PlainLoRALinear`; all other parameters are frozen. Adapters are uninitialised."""
    model.requires_grad_(False)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PlainLoRALinear
            assert isinstance(module, PlainLoRALinear)
            module.scale, module.dropout = alpha / rank, dropout
            module.lora_a = nn.Parameter(module.weight.new_empty(rank, module.in_features))
            module.lora_b = nn.Parameter(module.weight.new_empty(module.out_features, rank))


def randomise_adapters(model: nn.Module, generator: torch.Generator) -> None:
    """Give each `lora_a` and `lora_b` random values, B away from zero, in the order of their names."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith(("lora_a", "lora_b")):
                std = parameter.shape[1] ** -0.5
                values = torch.randn(parameter.shape, generator=generator) * (
                    std if name.endswith("lora_a") else 0.1 * std
                )
                parameter.copy_(values)


@dataclass
class Form:
    """One way to run a case.

    Attributes:
        name: what the table calls it.
        model: maps one tensor to a tensor or a tuple of tensors.
        compiled: whether it is under `torch.compile`.
    """

    name: str
    model: nn.Module
    compiled: bool

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs, always a tuple."""
        outputs = self.model(x)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def step(self, x: Tensor, upstream: Sequence[Tensor]) -> None:
        """Forward, then backward from the `upstream` gradients of the outputs."""
        outputs = self.forward(x)
        if outputs[0].requires_grad:
            torch.autograd.backward(outputs, upstream)

    def clear(self, x: Tensor) -> None:
        """Drop the gradients that `step` left."""
        self.model.zero_grad(set_to_none=True)
        x.grad = None


class Batch(NamedTuple):
    """Fresh inputs for one round: `x` and one upstream gradient per output."""

    x: Tensor
    upstream: tuple[Tensor, ...]


def measure(
    forms: Sequence[Form],
    batch: Callable[[int], Batch],
    rounds: int,
    clock: Callable[[Callable[[], None]], float],
) -> dict[str, list[float]]:
    """Time each form once a round, so that a slow spell of the machine meets all of them.

    In a round the forms run in a random order, each once untimed and then once timed: what a form finds in the caches
    and in the allocator's free lists is then its own leftover, and not that of whichever form always goes before it.
    (In turns of a fixed order, two equal forms differed by up to a fifth of LoRA's overhead.)

    Args:
        forms: what to time.
        batch: makes the inputs of a round; every form of a round gets the same.
        rounds: how many.
        clock: runs a function and returns its seconds.

    Returns:
        name -> seconds of each round.
    """
    order = random.Random(0)
    seconds: dict[str, list[float]] = {form.name: [] for form in forms}
    for number in range(rounds):
        x, upstream = batch(number)
        for form in order.sample(forms, len(forms)):
            step = functools.partial(form.step, x, upstream)
            step()
            form.clear(x)
            seconds[form.name].append(clock(step))
            form.clear(x)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the ratios of paired measurements."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(seconds: Sequence[float], base: Sequence[float]) -> "Ratio":
        """Ratios of measurements to those of the same round."""
        ratios = [a / b for a, b in zip(seconds, base)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return Ratio(middle, low, high)


def saved_bytes(form: Form, x: Tensor) -> int:
    """Bytes that one forward keeps for the backward, without parameters, buffers and the input.

    The storages of all tensors that autograd saves, each counted once.
    """
    own = {t.untyped_storage().data_ptr() for t in (*form.model.parameters(), *form.model.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = form.forward(x)
    del outputs  # not before: a freed storage could lend its address to a second one
    return sum(kept.values())


def gradients(form: Form, batch: Batch) -> dict[str, Tensor]:
    """Gradients of every trained parameter, and of the input as `x` when it has one."""
    form.clear(batch.x)
    form.step(batch.x, batch.upstream)
    found = {name: p.grad.clone() for name, p in form.model.named_parameters() if p.grad is not None}
    if batch.x.grad is not None:
        found["x"] = batch.x.grad.clone()
    form.clear(batch.x)
    return found


def gradient_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The worst tensor's largest error, relative to that tensor's largest exact gradient."""
    if found.keys() != exact.keys():
        raise ValueError(f"gradients of {sorted(found.keys() ^ exact.keys())} are in one of the two only")
    return max(((found[name].double() - g).abs().max() / g.abs().max()).item() for name, g in exact.items())


@contextmanager
def compiling() -> Iterator[None]:
    """One case's compilations: nothing of another case counts towards Dynamo's limit, and hitting it is an error."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first one the heading, aligned: the first two columns left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in (lines[0], "-" * len(lines[0]), *lines[1:]))


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write a result, into a new folder if need be; numbers that JSON has no word for (NaN) become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_jsonable(document), indent=2) + "\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
