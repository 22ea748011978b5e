"""A product with a bias that adds itself to the branch: its bias goes there with the branch, as on a GPU.

before      base = addmm(bias, x, W);   y = base + h B      one kernel reads the base and writes y
after       u = bias + h B;             y = u + x W         the product reads u while it computes
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn

from tests.passes.harness import Captured, adapt
from tests.passes.on_gpu import halves
from tests.passes.regions import K, N, bf16, compared


def forward_of(captured: Captured) -> str:
    """A forward graph, without its inputs, and its programs."""
    return "\n".join(line for line in halves(captured)[0].splitlines() if " = input " not in line)


def counts(captured: Captured) -> tuple[int, int, int]:
    """Of products that add themselves, of biases that programs read, and of products that have their own."""
    text = forward_of(captured)
    return text.count("lora_fx.accumulate_"), len(re.findall(r"in\d+ column\b", text)), text.count("= addmm(")


class Biased(nn.Module):
    """A function of two linears with biases, and of themselves."""

    def __init__(self, function: Callable[[Tensor, nn.Module, nn.Module], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.one, self.other = nn.Linear(K, N), nn.Linear(K, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.one, self.other)


def biased(function: Callable[[Tensor, nn.Module, nn.Module], Tensor], *targets: str) -> nn.Module:
    return adapt(Biased(function).to(bf16), target_modules=[*targets] or ["one", "other"])


def test_it_goes_with_the_branch() -> None:
    text = forward_of(compared(lambda: adapt(nn.Linear(K, N, dtype=bf16)), 1))
    assert_expected_inline(
        text,
        """\
%7 = permute(%0, [1, 0]) bf16[136, 264]
%8 = mul(%3, %4) f32[]
%9 = empty([160, 4], dtype=bf16, device=cpu) bf16[160, 4]
%10 = tile(outputs=[%9], program=#0, inputs=[%2, %5]) (None, (bf16[160, 4]))
%11 = getitem(%10, 1) (bf16[160, 4])
%12 = getitem(%11, 0) bf16[160, 4]
%13 = empty([160, 264], dtype=bf16, device=cpu) bf16[160, 264]
%14 = tile(outputs=[%13], program=#1, inputs=[%1, %12, %6, %8]) (None, (bf16[160, 264]))
%15 = getitem(%14, 1) (bf16[160, 264])
%16 = getitem(%15, 0) bf16[160, 264]
%17 = auto_functionalized(lora_fx.accumulate_, base=%16, a=%2, b=%7, scale=None, beta=2.0) (None, bf16[160, 264])
%18 = getitem(%17, 1) bf16[160, 264]
return %18, %0, %2, %5, %6, %8, %12
#0: bfloat16, 136 columns; in0 full, in1 factor 4 RN
    0: load in0
    1: down %0 in1
#1: bfloat16, 264 columns; in0 column, in1 thin 4, in2 factor 4 NR, in3 number
    0: load in0
    1: product in1 in2 in3
    2: op add %0 %1
    3: op mul %2 0.5
    4: store %3 bfloat16""",
    )


def checkpointed(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("build", "more"),
    [
        (lambda: adapt(nn.Linear(K, N, dtype=torch.float16)), {"dtype": torch.float16}),
        (lambda: adapt(nn.Linear(K, N, dtype=bf16), rank=64), {}),
        (lambda: strided(adapt(nn.Linear(K, N, dtype=bf16))), {}),
        (lambda: adapt(nn.Linear(K, N)), {"dtype": torch.float32, "autocast": True}),
        (lambda: adapt(nn.Linear(K, N, dtype=bf16)), {"dynamic": True, "shapes": ((160, K), (93, K)), "seeds": 1}),
        (lambda: adapt(nn.Linear(K, N, dtype=bf16)), {"wrap": checkpointed}),
    ],
    ids=["float16", "rank 64", "strided", "autocast", "any number of tokens", "checkpointed"],
)
def test_of_all_kinds(build: Callable[[], nn.Module], more: dict[str, Any]) -> None:
    assert counts(compared(build, 1, **more)) == (1, 1, 0)


def strided(linear: nn.Module) -> nn.Module:
    """With a bias that is every second of some numbers."""
    linear.bias = nn.Parameter(torch.randn(2 * N).to(bf16)[::2], requires_grad=False)
    return linear


@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(160,), (2, 80)], ids=["matrix", "sequences"])
def test_one_row_for_all_is_no_term(sizes: tuple[int, ...], bias: bool, width: int) -> None:
    """As the embedding of a time step: no product adds one row to many by itself, be it the largest of the sum."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.step = nn.Linear(K, N, bias=bias), nn.Linear(width, N, bias=bias)
            self.register_buffer("row", torch.randn(*[1] * len(sizes), width))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.step(self.row)

    captured = compared(lambda: adapt(Model().to(bf16), target_modules=["linear"]), 1, shape=(*sizes, K))
    assert counts(captured)[0] == 0


def test_of_a_sum_the_other_product_keeps_its_own() -> None:
    """Which Inductor's kernel adds as it is, to the result of the one."""
    assert counts(compared(lambda: biased(lambda x, one, other: one(x) + other(x)), 2)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("function", "targets"),
    [
        (lambda x, one, other: torch.sigmoid(one(x)), ["one"]),  # the program computes on
        (lambda x, one, other: other(x) * 2 + one(x).abs(), ["one"]),
    ],
    ids=["computed on", "not the value that is added to"],
)
def test_where_no_product_adds_itself(
    function: Callable[[Tensor, nn.Module, nn.Module], Tensor], targets: list[str]
) -> None:
    added, biases, _ = counts(compared(lambda: biased(function, *targets), 1))
    assert (added, biases) == (0, 0)


def test_a_product_that_is_read_elsewhere_keeps_its_own() -> None:
    """Its value is needed without the branch, which is hand-written here."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(K, N)
            self.a, self.b = nn.Linear(K, 4, bias=False), nn.Linear(4, N, bias=False)
            self.linear.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            base = self.linear(x)
            return torch.cat([base + self.b(self.a(x)) * 0.5, base], 1)

    assert counts(compared(lambda: Model().to(bf16), 1)) == (0, 0, 1)


def test_a_stream_that_takes_it_up_is_left_to_the_norm() -> None:
    """As without a bias: the sum of stream and y is the norm's kernel's, and the product adds itself to the branch."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(K, K), nn.RMSNorm(K)

        def forward(self, x: Tensor) -> Tensor:
            stream = x + self.linear(x)
            return stream + self.norm(stream)

    assert counts(compared(lambda: adapt(Model().to(bf16), target_modules=["linear"]), 1)) == (1, 1, 0)


def test_a_stream_that_is_a_biased_product_is_left_to_the_norm_as_well() -> None:
    """Others read it, so it cannot add itself: what reads the sum is the norm's kernel, as with any other stream."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.linear, self.norm = nn.Linear(K, K), nn.Linear(K, K), nn.RMSNorm(K)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.before(x)
            return self.norm(stream + self.linear(stream.sin()))

    assert counts(compared(lambda: adapt(Model().to(bf16), target_modules=["linear"]), 1)) == (1, 1, 1)
