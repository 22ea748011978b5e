"""One product for dX of a linear by itself, whose output goes into a residual stream: the graphs, that they compute the
same, and where it must not be. The passes decide as on a GPU (`tests/passes/on_gpu.py`)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fx.passes._torch import auto_functionalized
from lora_fx.passes.graph import aten, is_pointwise, is_row_view, peel_views
from lora_fx.passes.kernels import operators
from tests.passes.harness import Case, compare
from tests.passes.laying import by_graphs, checkpointed
from tests.passes.on_gpu import calls, programs
from tests.passes.test_sibling_gradients import K, adapted, backward, bf16, case, count, ends


class Stream(nn.Module):
    """A linear that adds to a residual stream, of which a norm follows, and of what it reads a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], k: int = K) -> None:
        super().__init__()
        self.function = function
        self.o, self.norm, self.last = nn.Linear(k, k, bias=False), nn.RMSNorm(k), nn.Linear(k, k, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = x + self.o(self.function(x))
        return u + self.last(self.norm(u))


def softmax(x: Tensor) -> Tensor:
    """An operation whose gradient is no pointwise function of dX."""
    return F.scaled_dot_product_attention(*[x.unflatten(-1, (4, -1)).transpose(1, 2)] * 3).transpose(1, 2).flatten(2)


def test_one_by_itself() -> None:
    """dX is one product; the stream goes on from where its gradient lies, and nothing of its size is copied."""
    graph = backward(adapted(Stream(softmax), target_modules=["o"]))
    (joined,) = graph.find_nodes(op="call_function", target=operators.joined_mm)
    assert len(joined.args[1]) == 2
    (room,) = graph.find_nodes(op="call_function", target=operators.side_by_side)
    (dy,) = room.all_input_nodes
    assert room.args[1:] == ([0], 128) and dy.meta["val"].shape == (160, K)
    assert not graph.find_nodes(op="call_function", target=aten.cat.default)
    given: list[Any] = [call.kwargs["inputs"] for call in calls(graph)]
    inputs = [peel_views(each[0]) for each in given]
    assert [each.args[:1] == (room,) for each in inputs].count(True) == 1  # the pair
    assert not any(statement[0] == "product" for program in programs(graph) for statement in program.body)  # g A
    assert all(user is room or is_row_view(user) for user in dy.users)
    (filled,) = [node for put in room.users for node in put.users if node.args[1:] == (1,)]
    assert any(is_pointwise(reader) for view in filled.users for reader in ends(view))  # the stream


class Computed(nn.Module):
    """A linear of whose output a function goes to another."""

    def __init__(self) -> None:
        super().__init__()
        self.o, self.last = (nn.Linear(K, K, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.o(softmax(x))))


class Pair(Stream):
    """Two linears that add to one stream: their gradients are one."""

    def __init__(self) -> None:
        super().__init__(softmax)
        self.other = nn.Linear(K, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u = x + self.o(softmax(x)) + self.other(softmax(x + 1))
        return u + self.last(self.norm(u))


class Shifted(Stream):
    """A stream to which a tensor is added whose gradient the caller gets."""

    def __init__(self) -> None:
        super().__init__(softmax)
        self.shift = nn.Parameter(torch.randn(2, 80, K, dtype=bf16))

    def forward(self, x: Tensor) -> Tensor:
        u = x + self.o(softmax(x)) + self.shift
        return u + self.last(self.norm(u))


class Sliced(nn.Module):
    """Two linears whose outputs lie side by side under a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.o, self.other = (nn.Linear(K, K, bias=False) for _ in range(2))
        self.norm = nn.RMSNorm(2 * K)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(torch.cat([self.o(softmax(x)), self.other(softmax(x + 1))], -1)))


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda: Stream(torch.tanh), {}),
        (lambda: Stream(softmax), {"dropout": 0.1}),
        (lambda: nn.Sequential(nn.RMSNorm(K), nn.Linear(K, K, bias=False)), {"target_modules": ["1"]}),
        (Computed, {"target_modules": ["o", "last"]}),
        (Sliced, {"target_modules": ["o", "other"]}),
    ],
    ids=["what reads dX computes on", "dropout", "a caller's gradient", "a kernel of ours computes dy", "columns"],
)
def test_not_of_one_by_itself(build: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    assert count(backward(adapted(build(), **{"target_modules": ["o"], **options}))) == 0


def test_not_of_what_the_caller_gets_too() -> None:
    module = adapted(Shifted(), target_modules=["o"])
    module.shift.requires_grad_()
    assert count(backward(module)) == 0


def test_a_gradient_is_beside_one_g() -> None:
    """Of two linears with one gradient the first gets it."""
    graph = backward(adapted(Pair(), target_modules=["o", "other"]))
    assert count(graph) == count(graph, operators.side_by_side) == 1


@pytest.mark.parametrize(
    "one",
    [
        case("one by itself", lambda: adapted(Stream(softmax), target_modules=["o"])),
        case("g is whole", lambda: adapted(Stream(softmax, 32), target_modules=["o"]), shape=(2, 80, 32)),
        case("one of two", lambda: adapted(Pair(), target_modules=["o", "other"])),
        pytest.param(
            case(
                "any number of tokens",
                lambda: adapted(Stream(softmax), target_modules=["o"]),
                shapes=((2, 80, K), (2, 33, K)),
                dynamic=True,
            ),
            marks=pytest.mark.slow,
        ),
        case(
            "checkpointed",
            lambda: adapted(Stream(softmax), target_modules=["o"]),
            wrap=checkpointed,
        ),
    ],
    ids=str,
)
def test_as_accurate_as_plain(one: Case) -> None:
    """Outputs and every gradient, against float64; g is summed, or copied, to where it belongs."""
    result = compare(one, by_graphs)
    graph = result.captured.backward[0].graph
    assert count(graph) == count(graph, operators.side_by_side) == 1
    targets = [node.args[0] for node in graph.find_nodes(op="call_function", target=auto_functionalized)]
    assert targets.count(operators.put_ if one.name == "g is whole" else operators.sum_parts_beside_) == 1
    result.assert_as_accurate()
    assert result.ours.saved <= result.plain.saved
