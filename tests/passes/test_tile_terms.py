"""What a branch's output is a term of: large products that add to it, and residual streams that norms read."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_fx.passes._torch import inductor_config
from lora_fx.passes.printer import graph_text
from tests.passes.harness import Captured, adapt
from tests.passes.regions import K, N, bf16, compared, forward_operations, of, operations


def added(captured: Captured) -> int:
    """How many large products add to what a program stores."""
    (forward,) = captured.forward
    return graph_text(forward.graph).count("accumulate_")


# ---- large products in sums ------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two linears with one input, the first with an adapter, and what reads both outputs."""

    def __init__(self, function: Callable[[Any, Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(K, N, bias=False)
        self.other = nn.Linear(K, N, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear, self.other, x)


@pytest.mark.parametrize(
    ("function", "adding"),
    [
        (lambda f, g, x: f(x) + g(x), 1),
        (lambda f, g, x: g(x) + f(x) + g(x + 1), 1),
        (lambda f, g, x: f(x) * 0.5 + g(x), 0),
        (lambda f, g, x: g(x) + (-f(x)), 0),
        (lambda f, g, x: g(x) - f(x), 0),
        (lambda f, g, x: f(x) * x[:, :1] + g(x), 0),
        (lambda f, g, x: (f(x) + g(x)) * 0.25 + g(x + 1), 0),
        (lambda f, g, x: f(x) + f(x), 0),
        (lambda f, g, x: torch.tanh(f(x)) + g(x), 0),
        (lambda f, g, x: f(x * 0.5) + g(x), 1),
        (lambda f, g, x: f(x + x).tanh(), 0),
    ],
    ids=[
        "two",
        "three",
        "scaled",
        "negated",
        "subtracted",
        "gated",
        "a scaled sum",
        "twice",
        "tanh",
        "of a scaled input",
        "of an input twice",
    ],
)
def test_a_large_product_is_added_as_it_is_and_once(
    function: Callable[[Any, Any, Tensor], Tensor], adding: int
) -> None:
    """Or it is left to the program, which loads it: gradients of the input are such sums as well."""
    captured = compared(lambda: adapt(Pair(function).to(bf16), target_modules=["linear"]), 1, grad=torch.enable_grad)
    assert added(captured) == adding


# ---- a residual stream -----------------------------------------------------------------------------------------------


class Gated(nn.Linear):
    """Its product cannot add itself to a branch."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.sigmoid(input)


class Stream(nn.Module):
    """A linear whose output is added to its input, and what reads the sum."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Any], bias: bool = False, kind: type[nn.Linear] = nn.Linear
    ) -> None:
        super().__init__()
        self.linear = kind(K, K, bias=bias)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.linear(x))


def stream(function: Callable[[Tensor, Tensor], Any], **more: Any) -> nn.Module:
    return adapt(Stream(function, **more).to(bf16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: (total := x + y, nn.functional.rms_norm(total, (K,))),
        lambda x, y: nn.functional.rms_norm(y + x, (K,)),
        lambda x, y: (total := x + y, nn.functional.layer_norm(total.float(), (K,)).to(bf16)),
        lambda x, y: (y, nn.functional.rms_norm(x + y, (K,))),
    ],
    ids=["rms", "rms of the sum alone", "layer", "and the branch is returned"],
)
def test_a_sum_that_a_norm_reads_is_the_norms(function: Callable[[Tensor, Tensor], Any], bias: bool) -> None:
    """The region ends with the branch, to which the large product adds: the norm's kernel adds the stream."""
    captured = compared(lambda: stream(function, bias=bias), 1)
    assert forward_operations(captured) == [["add"] * bias] and added(captured) == 1


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda x, y: x + y, nn.Linear),
        (lambda x, y: (total := x + y, total.float().pow(2).mean(0)), nn.Linear),
        (lambda x, y: (total := x + y, nn.functional.rms_norm(total, (K,))), Gated),
    ],
    ids=["no norm", "over tokens", "no large product that can add"],
)
def test_a_sum_that_is_the_regions(function: Callable[[Tensor, Tensor], Any], kind: type[nn.Linear]) -> None:
    captured = compared(lambda: stream(function, kind=kind), 1)
    (names,) = forward_operations(captured)
    assert names.count("add") == 2 and added(captured) == 0


def test_a_norm_where_products_overlap_with_collectives() -> None:
    """No large product may add to the branch, so the region takes the sum."""
    with inductor_config().patch(_micro_pipeline_tp=True):
        captured = compared(lambda: stream(lambda x, y: nn.functional.rms_norm(x + y, (K,))), 1)
    (names,) = forward_operations(captured)
    assert names.count("add") == 2 and added(captured) == 0


class Streams(nn.Module):
    """What the blocks of a transformer do to their residual stream."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(K, K, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.linears:
            x = x + linear(nn.functional.rms_norm(x, (K,)))
        return x


@pytest.mark.parametrize(("count", "read"), [(2, 3), (3, 2), (6, 2)])
def test_a_sum_that_a_norm_computes_is_computed_again_for_the_next(count: int, read: int) -> None:
    """Without gradients nobody else needs it: read as its two terms it is not rounded, and no kernel writes it. Not a
    sum of sums, which would be read as all its terms."""
    captured = compared(lambda: adapt(Streams(count).to(bf16)), count, grad=torch.no_grad)
    (forward,) = captured.forward
    last = of(forward.graph, "product")[-1]
    assert operations(last).count("add") == [kind[0] for kind in last.inputs].count("full") == read


def test_a_sum_that_backward_needs_is_read_as_it_is() -> None:
    captured = compared(lambda: adapt(Streams(2).to(bf16)), 2)
    (forward,) = captured.forward
    assert operations(of(forward.graph, "product")[-1]).count("add") == 2
