"""Room for B in the rows of a weight: what changes (how far rows lie apart), what must not (everything else), and what
takes it away again."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.beside import lay_beside
from lora_fx.passes.kernels.wide import room_of
from tests.adapted import installed, laid, linears

bf16 = torch.bfloat16
K, N, R = 160, 192, 72
APART = (K + R, 1)


class Net(nn.Module):
    """A SwiGLU."""

    gate: Any  # it has what the swap adds
    up: Any
    down: Any

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*size, bias=False) for size in ((K, N), (K, N), (N, K)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def net(**config: object) -> Net:
    return installed(Net().to(bf16), **{"rank": R, "alpha": 2 * R, **config})


def noted(model: nn.Module) -> list[str]:
    """What the modules note, which has to be so."""
    for module in linears(model):
        assert module._lora_room == room_of(module.weight)
    return [module._lora_room for module in linears(model)]


ROOM, NONE = ["right", "left", ""], ["", "", ""]


def test_rows_lie_apart_and_nothing_else_changes() -> None:
    """gate on one side and up on the other; down, whose result is narrower than its input, has its A behind it."""
    model = net()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    x = torch.randn(3, K, dtype=bf16)
    expected = model(x)
    assert noted(laid(model)) == ROOM
    assert [module._lora_beside for module in linears(model)] == [False, False, True]
    for name, parameter in model.named_parameters():
        same, value = before[name]
        assert parameter is same and torch.equal(parameter, value)
        assert parameter.stride() == (APART if name in ("gate.weight", "up.weight") else value.stride())
        assert parameter.requires_grad == ("lora" in name)
    assert model.gate.weight.untyped_storage().nbytes() == 2 * ((N - 1) * (K + R) + K)  # the last row's has no room
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    "config",
    [{"rank": 64, "alpha": 64}, {"target_modules": "down"}, {"alpha": 3 * R}],
    ids=["rank", "width", "scale"],
)
def test_behind_the_weight_instead(config: dict[str, object]) -> None:
    model = laid(net(**config))
    assert all(room == "" for room in noted(model)) and all(module._lora_beside for module in linears(model))


def evaluated() -> Net:
    return net().eval()


def frozen() -> Net:
    model = net()
    for parameter in lora_fx.adapter_parameters(model):
        parameter.requires_grad_(False)
    return model


def tied() -> Net:
    model = net()
    model.embedding = nn.Embedding(N, K, dtype=bf16)
    model.other = nn.Embedding(N, K, dtype=bf16)
    model.embedding.weight, model.other.weight = model.gate.weight, model.up.weight
    return model


@pytest.mark.parametrize("build", [evaluated, frozen, tied])
def test_no_room_for(build: Callable[[], Net]) -> None:
    """Inference, for which A behind its weight is worth more; a weight that is somebody else's as well."""
    assert noted(laid(build())) == NONE


def test_no_room_with_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP, applied afterwards, refuses weights with gaps."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert noted(laid(net())) == NONE


def test_once_is_enough() -> None:
    model = laid(net())
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert noted(laid(model)) == ROOM
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]


def test_what_is_saved_has_no_gaps(tmp_path: Path) -> None:
    model, other = laid(net()), net()
    state = model.state_dict()
    assert all(tensor.is_contiguous() for tensor in state.values())
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    other.load_state_dict(loaded)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    for name, tensor in torch.load(buffer).items():
        assert torch.equal(tensor, model.state_dict()[name]) and torch.equal(loaded[name], tensor)
    x = torch.randn(3, K, dtype=bf16)
    torch.testing.assert_close(other(x), model(x))
    # Whoever asks for the parameters themselves gets them.
    assert model.state_dict(keep_vars=True)["gate.weight"] is model.gate.weight


def test_training_stays_in_place() -> None:
    model = laid(net())
    weights = [module.weight.detach().clone() for module in linears(model)]
    optimizer = torch.optim.AdamW(lora_fx.adapter_parameters(model), lr=0.1)
    before = [module.lora_b.detach().clone() for module in linears(model)]
    for _ in range(3):
        model(torch.randn(5, K, dtype=bf16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert noted(model) == ROOM
    for module, weight, b in zip(linears(model), weights, before):
        assert torch.equal(module.weight, weight) and not torch.equal(module.lora_b, b)


def replace_weight(model: Net) -> None:
    model.gate.weight = nn.Parameter(model.gate.weight.detach().clone(), requires_grad=False)


def wrap_again(model: Net) -> None:
    model.gate.weight = nn.Parameter(model.gate.weight.data, requires_grad=False)


def another_adapter(model: Net, alpha: float = R) -> None:
    lora_fx.add_adapter(model, "second", LoRAConfig(rank=R, alpha=alpha))
    lora_fx.set_adapter(model, "second")


def swap(model: Net) -> None:
    """As torch will convert one day."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (replace_weight, ["", "left", ""]),
        (wrap_again, ROOM),
        (another_adapter, ROOM),  # B is copied there on every use, whosever it is
        (lambda model: another_adapter(model, alpha=1.7 * R), NONE),
        (swap, NONE),
        (lambda model: model.load_state_dict(model.state_dict(), assign=True), NONE),
        (lambda model: model.to(torch.float16), NONE),
        (lambda model: model.to(bf16).train(), ROOM),
        (lambda model: model.load_state_dict(model.state_dict()), ROOM),
        (lambda model: lora_fx.unmerge(lora_fx.merge(model)), ROOM),
    ],
    ids=["weight", "wrap", "adapter", "scale", "swap", "assign", "dtype", "nothing moves", "load", "merge"],
)
def test_a_change_is_noted(change: Callable[[Net], object], expected: list[str]) -> None:
    model = laid(net())
    change(model)
    assert [module._lora_room for module in linears(model)] == expected
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    x = torch.randn(3, K, dtype=model.down.weight.dtype)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_memory_of_its_own(copied: Callable[[Net], Net]) -> None:
    model = laid(net())
    other = copied(model)
    assert noted(other) == NONE and noted(model) == ROOM
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)) and parameter.is_contiguous()
    assert noted(laid(other)) == ROOM


def pruned(model: Net) -> None:
    prune.l1_unstructured(model.gate, "weight", 0.5)


def normed(model: Net) -> None:
    nn.utils.weight_norm(model.gate, "weight")


def parametrized(model: Net) -> None:
    torch.nn.utils.parametrize.register_parametrization(model.gate, "weight", nn.Tanh())


@pytest.mark.parametrize("change", [pruned, normed, parametrized])
def test_a_weight_that_is_computed(change: Callable[[Net], None]) -> None:
    """It is no parameter any more: states and results are those of a model without room."""
    model = net()
    other = copy.deepcopy(model)
    for each in (laid(model), other):
        change(each)
    state = other.state_dict()
    assert list(model.state_dict()) == list(state) and "gate.weight" not in state
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    x = torch.randn(3, K, dtype=bf16)
    torch.testing.assert_close(model(x), other(x))


def test_another_name_of_the_memory_takes_no_room_away() -> None:
    model = laid(net())
    model.register_buffer("alias", model.gate.weight.detach())
    assert noted(laid(model)) == ROOM
    assert model.state_dict()["gate.weight"].is_contiguous()


@pytest.mark.parametrize("first", [lambda model: None, lora_fx.merge, lambda model: another_adapter(model, 1.7 * R)])
def test_removing_adapters_takes_the_room_back(first: Callable[[Net], object]) -> None:
    model = laid(net())
    first(model)
    before = model.gate.weight.detach().clone()
    lora_fx.remove(model)
    assert torch.equal(model.gate.weight, before) and model.gate.weight.is_contiguous()
    assert "_lora_room" not in model.gate.__dict__
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())


def test_neighbours_are_those_of_one_parent() -> None:
    """Gate and up of every layer get both sides, whatever else has room."""
    model = nn.ModuleList([Net(), Net(), nn.Linear(K, N, bias=False)]).to(bf16)
    lora_fx.install(model, LoRAConfig(rank=R, alpha=R))
    lay_beside(model, "cpu")
    assert noted(model) == [*ROOM, *ROOM, "right"]
