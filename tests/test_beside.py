"""A behind its weight in memory: what changes (addresses), what must not (everything else), and who is left out."""

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

import lora_fx
from lora_fx import LoRAConfig, beside
from lora_fx.beside import lay_beside
from lora_fx.linear import LoRAModule
from lora_fx.passes.kernels.beside import are_beside
from tests.adapted import installed, laid, linears

bf16 = torch.bfloat16


class Net(nn.Module):
    up: Any  # it has what the swap adds
    down: Any

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64, bias=bias), nn.Linear(64, 16, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def net(*, bias: bool = False, dtype: torch.dtype = bf16, **config: object) -> Net:
    return installed(Net(bias).to(dtype), **{"rank": 8, **config})


def noted(model: nn.Module) -> list[bool]:
    """What the modules note, which has to be so."""
    for module in linears(model):
        assert module._lora_beside == are_beside(module.weight, module.lora_a)
    return [module._lora_beside for module in linears(model)]


BOTH, NEITHER = [True, True], [False, False]


def test_addresses_change_and_nothing_else() -> None:
    model = net()
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    x = torch.randn(3, 16, dtype=bf16)
    expected = model(x)
    assert noted(laid(model)) == BOTH
    assert list(before) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        same, value = before[name]
        assert parameter is same and torch.equal(parameter, value) and parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.itemsize
        assert parameter.requires_grad == ("lora" in name)
    torch.testing.assert_close(model(x), expected)


def test_once_is_enough() -> None:
    model = laid(net())
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    laid(model)
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]


def test_what_is_saved_of_one_has_nothing_of_the_other(tmp_path: Path) -> None:
    model = laid(net())
    buffer = io.BytesIO()
    torch.save({"a": model.up.lora_a.detach()}, buffer)
    assert len(buffer.getvalue()) < 3000  # of 256 bytes; the weight has 2048 more
    whole = dict(model.state_dict())
    safetensors.torch.save_file(whole, tmp_path / "model.safetensors")
    for name, tensor in safetensors.torch.load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, whole[name])


def test_memory_outlives_either() -> None:
    model = laid(net())
    a, expected = model.up.lora_a, model.up.lora_a.detach().clone()
    weight, kept = model.down.weight, model.down.weight.detach().clone()
    del model
    junk = [torch.full((64, 16), 7.0, dtype=bf16) for _ in range(64)]
    assert torch.equal(a, expected) and torch.equal(weight, kept) and len(junk) == 64


def test_training_stays_in_place() -> None:
    """An optimizer updates what lies there, and the weight behind which it lies keeps its bits."""
    model = laid(net())
    weights = [module.weight.detach().clone() for module in linears(model)]
    before = [module.lora_a.detach().clone() for module in linears(model)]
    optimizer = torch.optim.AdamW(lora_fx.adapter_parameters(model), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 16, dtype=bf16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert noted(model) == BOTH
    for module, weight, a in zip(linears(model), weights, before):
        assert torch.equal(module.weight, weight) and not torch.equal(module.lora_a, a)


def shared_by_view() -> Net:
    model = net()
    joint = torch.randn(80, 16, dtype=bf16)
    model.up.weight.data = joint[:64]
    return model


def shared_with_another() -> Net:
    model = net()
    model.other = nn.Parameter(model.up.weight.detach(), requires_grad=False)
    return model


def flat_factors() -> Net:
    model = net()
    flat = torch.randn(256, dtype=bf16)
    model.up.lora_a.data = flat[:128].view(8, 16)
    return model


def room_for_others() -> Net:
    model = Net().to(bf16)
    lora_fx.install(model, LoRAConfig(rank=8), max_rank=16)
    return model


def trained_base() -> Net:
    model = net()
    model.up.weight.requires_grad_()
    return model


def several_adapters() -> Net:
    model = net(target_modules="up")
    lora_fx.add_adapter(model, "second", LoRAConfig(rank=8, target_modules="up"))
    return model


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: net(bias=True), NEITHER),
        (lambda: net(dtype=torch.float32), NEITHER),
        (lambda: net(rank=4), NEITHER),  # rows of h would begin at multiples of 8 bytes
        (lambda: net(use_dora=True), NEITHER),  # its forward is another
        (shared_by_view, [False, True]),
        (shared_with_another, [False, True]),
        (trained_base, [False, True]),
        (several_adapters, [False]),
        (flat_factors, [False, True]),
        (room_for_others, NEITHER),
        (lambda: net(dtype=torch.float16), BOTH),
    ],
    ids=[
        "bias",
        "float32",
        "rank 4",
        "DoRA",
        "a view",
        "shared",
        "trained",
        "several adapters",
        "flat",
        "room",
        "float16",
    ],
)
def test_who_is_left_out(build: Callable[[], Net], expected: list[bool]) -> None:
    model = build()
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert noted(laid(model)) == expected
    if not any(expected):
        assert addresses == [parameter.data_ptr() for parameter in model.parameters()]


def test_what_has_no_memory_is_no_matter() -> None:
    """Parts of a model that are not there yet, or sparse."""
    model = net()
    model.more = nn.LazyLinear(4)
    model.register_buffer("table", torch.eye(4).to_sparse())
    assert noted(laid(model)) == BOTH
    lora_fx.compile(model)


def test_inference_mode_leaves_parameters_that_train() -> None:
    model = net()
    with torch.inference_mode():
        laid(model)
    assert noted(model) == BOTH and not any(parameter.is_inference() for parameter in model.parameters())
    model(torch.randn(3, 16, dtype=bf16)).sum().backward()
    assert model.up.lora_a.grad is not None


def test_without_memory_the_rest_stays(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, lay, calls = net(), beside._lay, []

    def full(modules: list[LoRAModule], sides: dict[LoRAModule, str]) -> None:
        calls.append(modules)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("no more")
        lay(modules, sides)

    monkeypatch.setattr(beside, "CHUNK", 1)
    monkeypatch.setattr(beside, "_lay", full)
    assert noted(laid(model)) == [True, False]
    assert "there is no memory to lay all 2" in caplog.text


def test_not_on_other_devices() -> None:
    """`lora_fx.compile` does it on a GPU."""
    model = net()
    lay_beside(model)
    assert noted(model) == NEITHER


def two_adapters_of_one_weight() -> Net:
    model = Net().to(bf16)
    more = model.more = nn.Linear(16, 64, bias=False, dtype=bf16)
    more.weight = model.up.weight
    lora_fx.install(model, LoRAConfig(rank=8))
    return model


def test_a_weight_with_two_adapters_stays_where_it_is() -> None:
    model = two_adapters_of_one_weight()
    assert noted(laid(model)) == [False, True, False]
    assert model.get_parameter("more.weight") is model.up.weight


def test_linears_share_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a size, each where one ends; one that is larger has its own. Siblings that fit into one are not parted."""
    model = nn.Sequential(*(nn.Linear(16, 64, bias=False, dtype=bf16) for _ in range(5)))
    lora_fx.install(model, LoRAConfig(rank=8))
    monkeypatch.setattr(beside, "CHUNK", 5120)  # 2304 bytes for each
    values = [parameter.detach().clone() for parameter in model.parameters()]
    lay_beside(model, "cpu")
    assert noted(model) == [True] * 5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), values, strict=True))
    first = [module.weight.data_ptr() for module in linears(model)]
    assert [b - a for a, b in zip(first[::2], first[1::2])] == [2304, 2304]
    monkeypatch.setattr(beside, "CHUNK", 1)
    assert noted(laid(net())) == BOTH


def test_what_may_read_one_input_follows_one_another() -> None:
    """Gate and up, of Llama's w1, w2 and w3; not what has another parent."""

    class Swiglu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = (
                nn.Linear(k, n, bias=False, dtype=bf16) for k, n in ((64, 128), (128, 64), (64, 128))
            )

    model = nn.Sequential(Swiglu(), Swiglu())
    lora_fx.install(model, LoRAConfig(rank=8))
    assert noted(laid(model)) == [True] * 6
    w1, w2, w3, *others = linears(model)
    assert are_beside(w1.lora_a, w3.weight) and not are_beside(w1.lora_a, w2.weight)
    assert are_beside(others[0].lora_a, others[2].weight)


def test_a_weight_of_two_modules_stays_one() -> None:
    model = Net().to(bf16)
    more = model.more = nn.Linear(16, 64, bias=False, dtype=bf16)
    more.weight = model.up.weight
    lora_fx.install(model, LoRAConfig(rank=8, target_modules="up"))
    assert noted(laid(model)) == [True]
    assert model.more.weight is model.up.weight


# ---- afterwards ------------------------------------------------------------------------------------------------------


def replace_a(model: Net) -> None:
    model.up.lora_a = nn.Parameter(model.up.lora_a.detach().clone())


def replace_weight(model: Net) -> None:
    model.up.weight = nn.Parameter(model.up.weight.detach().clone(), requires_grad=False)


def assign(model: Net) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def another_adapter(model: Net) -> None:
    lora_fx.add_adapter(model, "second", LoRAConfig(rank=8))
    lora_fx.set_adapter(model, "second")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (replace_a, [False, True]),
        (replace_weight, [False, True]),
        (assign, NEITHER),
        (another_adapter, NEITHER),
        (lambda model: model.to(torch.float16), NEITHER),
        (lambda model: model.to("meta"), NEITHER),
        (lambda model: model.to(bf16).train(), BOTH),
        (lambda model: model.load_state_dict(model.state_dict()), BOTH),
        (lambda model: lora_fx.unmerge(lora_fx.merge(model)), BOTH),
    ],
    ids=["A", "weight", "assign", "adapter", "dtype", "meta", "nothing moves", "load", "merge"],
)
def test_a_change_is_noted(change: Callable[[Net], object], expected: list[bool]) -> None:
    model = laid(net())
    change(model)
    assert [module._lora_beside for module in linears(model)] == expected
    if not any(parameter.is_meta for parameter in model.parameters()):
        noted(model)


def test_back_to_the_first_adapter() -> None:
    """What was given up stays so: switching to and fro compiles twice, and not each time."""
    model = laid(net())
    another_adapter(model)
    lora_fx.set_adapter(model, "default")
    assert [module._lora_beside for module in linears(model)] == NEITHER


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_memory_of_its_own(copied: Callable[[Net], Net]) -> None:
    model = laid(net())
    other = copied(model)
    assert noted(other) == NEITHER and noted(model) == BOTH
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_removing_adapters_leaves_nothing() -> None:
    model = laid(net())
    weight = model.up.weight.detach().clone()
    lora_fx.remove(model)
    assert torch.equal(model.up.weight, weight) and "_lora_beside" not in model.up.__dict__
