# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy
import io
import pickle

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoRAConfig, LoRAModule
from lora_fx.linear import lora_class
from tests.toy_models import oracle, shake


class Doubling(nn.Linear):
    """A subclass with behaviour, a buffer and a repr of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("gain", torch.full((1,), 2.0))

    def forward(self, x):
        return super().forward(x) * self.gain

    def extra_repr(self):
        return super().extra_repr() + ", doubling"


def swapped(cls=nn.Linear, *, dtype=torch.float32, bias=True, rank=3, **config):
    torch.manual_seed(0)
    model = nn.Sequential(cls(10, 8, bias=bias, dtype=dtype))
    lora_fx.install(model, LoRAConfig(rank=rank, **config))
    shake(model)
    return model[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
def test_forward_and_gradients_against_float64(bias, leading):
    module = swapped(bias=bias, alpha=6.0)
    x = torch.randn(*leading, 10, requires_grad=True)
    y = module(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    exact = copy.deepcopy(module).double()
    exact.requires_grad_(True)
    x64 = x.detach().double().requires_grad_()
    expected = oracle(exact, x64, scale=2.0)
    grads = torch.autograd.grad(expected, [x64, exact.lora_a, exact.lora_b], dy.double())
    for ours, theirs in zip([y, x.grad, module.lora_a.grad, module.lora_b.grad], [expected, *grads]):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert module.weight.grad is None


def test_the_output_is_the_bases_until_training_starts():
    torch.manual_seed(0)
    base = nn.Linear(10, 8)
    x = torch.randn(5, 10)
    expected = base(x)
    lora_fx.install(base, LoRAConfig(rank=3))
    assert torch.equal(base(x), expected)


def test_rslora_scale():
    module = swapped(rank=4, alpha=6.0, use_rslora=True)
    assert module.lora_scale.item() == 3.0
    x = torch.randn(5, 10)
    torch.testing.assert_close(module(x).double(), oracle(module, x, 3.0), rtol=1e-5, atol=1e-5)


def test_classes():
    assert lora_class(nn.Linear) is lora_class(nn.Linear)
    assert lora_class(Doubling) is not lora_class(nn.Linear)
    for parent in (nn.Linear, Doubling):
        cls = lora_class(parent)
        assert cls.__name__ == cls.__qualname__ == f"LoRA{parent.__name__}"
        assert cls.__module__ == parent.__module__
        assert issubclass(cls, parent) and issubclass(cls, LoRAModule)
    with pytest.raises(TypeError, match="not swapped yet"):
        lora_class(lora_class(nn.Linear))
    with pytest.raises(TypeError, match="Conv1d"):
        lora_class(nn.Conv1d)
    assert type(swapped()) is type(swapped(alpha=3.0, rank=2))


def test_a_subclass_keeps_its_behaviour():
    module = swapped(Doubling, alpha=6.0)
    x = torch.randn(5, 10)
    adapter = oracle(module, x, 2.0) - oracle(module, x, 0.0)
    torch.testing.assert_close(module(x).double(), 2 * oracle(module, x, 0.0) + adapter, rtol=1e-5, atol=1e-5)
    assert isinstance(module, Doubling)
    assert "doubling, rank=3, scale=2, dropout=0" in repr(module)
    assert repr(module).startswith("LoRADoubling(in_features=10")


def test_names():
    module = swapped()
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias", "lora_a", "lora_b"]
    assert list(module.state_dict()) == ["weight", "bias", "lora_a", "lora_b", "lora_scale"]
    assert [name for name, _ in module.named_buffers()] == ["lora_scale", "lora_enabled"]


@pytest.mark.parametrize("keyword", [False, True])
def test_the_input_may_be_named(keyword):
    module = swapped()
    x = torch.randn(5, 10)
    assert torch.equal(module(input=x), module(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_adapters_follow_the_weight(dtype):
    module = swapped(dtype=dtype)
    assert module.lora_a.dtype == module.lora_b.dtype == dtype
    assert module.lora_scale.dtype == module.lora_enabled.dtype == torch.float32
    assert module(torch.randn(5, 10, dtype=dtype)).dtype == dtype


def test_wider_adapters_do_not_widen_activations():
    module = swapped(dtype=torch.bfloat16, alpha=6.0)
    module.lora_a.data, module.lora_b.data = module.lora_a.data.float(), module.lora_b.data.float()
    x = torch.randn(5, 10, dtype=torch.bfloat16)
    y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), oracle(module, x, 2.0), rtol=0.03, atol=0.06)
    y.sum().backward()
    assert module.lora_a.grad.dtype == torch.float32


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_autocast(weight_dtype):
    module = swapped(dtype=weight_dtype, alpha=6.0)
    x = torch.randn(5, 10)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), oracle(module, x, 2.0), rtol=0.03, atol=0.06)
    assert module.lora_a.grad.dtype == module.lora_b.grad.dtype == weight_dtype


class PackedLinear(nn.Linear):
    """A linear whose weight is packed, two inputs to a byte, in `dtype`."""

    def __init__(self, *args, storage=torch.uint8, **kwargs):
        super().__init__(*args, **kwargs)
        packed = torch.zeros(self.out_features, self.in_features // 2).to(storage)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


@pytest.mark.parametrize("storage", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_packed_weights_take_the_activation_dtype(storage):
    def install(bias, *others):
        packed = PackedLinear(10, 8, bias=bias, dtype=torch.float16, storage=storage)
        model = nn.ModuleList([packed, *others])
        lora_fx.install(model, LoRAConfig(rank=3, target_modules="0"))
        assert packed.lora_a.shape == (3, 10) and packed.lora_b.shape == (8, 3)
        return packed.lora_a.dtype

    big, small = nn.Linear(4, 4, dtype=torch.float64, bias=False), nn.LayerNorm(4, dtype=torch.bfloat16)
    assert install(True, big, small) == torch.float16
    assert install(False, big, small) == torch.bfloat16
    assert install(False) == torch.float32
    shaken = nn.ModuleList([PackedLinear(10, 8, bias=False, storage=storage)])
    shake(lora_fx.install(shaken, LoRAConfig(rank=3, alpha=6.0)))
    x, module = torch.randn(5, 10), shaken[0]
    torch.testing.assert_close(module(x), 2.0 * x @ module.lora_a.T @ module.lora_b.T)


def test_initialisation():
    module = nn.Linear(400, 300)
    lora_fx.install(module, LoRAConfig(rank=100))
    bound = (1 / 400) ** 0.5
    assert module.lora_a.abs().max() <= bound and module.lora_a.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert not module.lora_b.any()
    gaussian = lora_fx.install(nn.Linear(400, 300), LoRAConfig(rank=100, init="gaussian"))
    assert gaussian.lora_a.std().item() == pytest.approx(1 / 100, rel=0.03)
    assert not gaussian.lora_b.any()


def test_reset_parameters_starts_base_and_adapters_afresh():
    module = swapped()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.lora_scale.fill_(9.0)
    module.reset_parameters()
    assert not module.lora_b.any() and module.lora_a.any()
    assert module.lora_scale.item() == before["lora_scale"].item()
    assert not torch.equal(module.lora_a, before["lora_a"])
    assert not torch.equal(module.weight, before["weight"])


def test_dropout():
    module = swapped(dropout=0.5, alpha=6.0)
    x = torch.randn(5, 10)
    assert not torch.equal(module(x), module(x))
    torch.manual_seed(3)
    y = module(x)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(x, 0.5)
    base = oracle(module, x, 0.0)
    torch.testing.assert_close(
        y.double(), base + oracle(module, kept, 2.0) - oracle(module, kept, 0.0), rtol=1e-5, atol=1e-5
    )
    module.eval()
    torch.testing.assert_close(module(x).double(), oracle(module, x, 2.0), rtol=1e-5, atol=1e-5)


# The numbers through moves and conversions: 1/3 is exact in no dtype, and bfloat16 would show.
THIRD = torch.tensor(1.0 / 3.0).item()


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.to("meta").to_empty(device="cpu"),
        lambda m: m.to("meta").to(torch.bfloat16).to_empty(device="cpu"),
        lambda m: m.bfloat16().to("meta").to_empty(device="cpu").float(),
        lambda m: m.share_memory(),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.loads(pickle.dumps(m)),
    ],
)
@pytest.mark.parametrize("refilled", [False, True])
def test_the_scale_survives(move, refilled):
    module = swapped(alpha=1.0 if not refilled else 2.0)
    if refilled:
        module.lora_scale.fill_(1.0 / 3.0)
    moved = move(module)
    assert moved.lora_scale.item() == THIRD and moved.lora_enabled.item() == 1.0
    assert moved.lora_scale.dtype == moved.lora_enabled.dtype == torch.float32
    assert list(moved.state_dict()) == ["weight", "bias", "lora_a", "lora_b", "lora_scale"]


def test_disabled_survives_a_conversion():
    module = swapped()
    with lora_fx.disabled(module):
        module.double()
        x = torch.randn(5, 10, dtype=torch.float64)
        assert torch.equal(module(x), oracle(module, x, 0.0))


def test_a_fake_model():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        module = swapped(alpha=6.0)
        assert module(torch.empty(5, 10)).shape == (5, 8)
        module.reset_adapters()
    assert "scale=2" in repr(module)


@pytest.mark.parametrize("cls", [nn.Linear, Doubling])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(cls, protocol):
    module = swapped(cls, alpha=6.0)
    module.lora_scale.fill_(5.0)
    loaded = pickle.loads(pickle.dumps(module, protocol))
    assert type(loaded) is type(module)
    x = torch.randn(5, 10)
    assert torch.equal(loaded(x), module(x))
    with torch.no_grad():
        module.lora_a.zero_()
    assert loaded.lora_a.any()


def test_whole_module_checkpoints_and_deepcopy():
    module = swapped(Doubling)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    x = torch.randn(5, 10)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(module), copy.copy(module)):
        assert type(other) is type(module)
        assert torch.equal(other(x), module(x))


def test_a_parent_that_pickles_in_its_own_way_is_refused():
    class Peculiar(nn.Linear):
        def __reduce_ex__(self, protocol):
            return (nn.Linear, (10, 8))

    with pytest.raises(TypeError, match="Peculiar pickles in its own way"):
        pickle.dumps(swapped(Peculiar))
