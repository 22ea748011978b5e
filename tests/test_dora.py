"""DoRA: equal to PEFT's and to its formula in float64, one class a parent, one graph for many modules."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import lora_fx
from lora_fx import DoRAModule, LoRAConfig, LoRAModule
from lora_fx.dora import row_norms
from lora_fx.linear import lora_class
from lora_fx.peft_files import CONFIG, PREFIX
from tests.test_linear import Doubling, PackedLinear
from tests.test_peft_exchange import TOLERANCE, in_peft, shaken_peft
from tests.toy_models import TOKENS, TOY_LINEARS, Block, Mlp, Toy, adapted, assert_same, refused, snapshot, train

DORA = LoRAConfig(rank=3, alpha=6.0, use_dora=True)


def shake(model, std=0.2, seed=1):
    """Take adapters away from their start, and magnitudes by a third: their signs stay."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_fx.named_adapter_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if name.endswith("lora_magnitude"):
                parameter.mul_(1.0 + noise.clamp(-2.0, 2.0) / 6.0)
            else:
                parameter.copy_(noise * std)
    return model


def toy(config=None, **kwargs):
    torch.manual_seed(0)
    model = Toy(**kwargs)
    return model if config is None else shake(lora_fx.install(model, config))


def linear(cls=nn.Linear, *, dtype=torch.float32, bias=True, **config):
    torch.manual_seed(0)
    model = nn.Sequential(cls(10, 8, bias=bias, dtype=dtype))
    shake(lora_fx.install(model, LoRAConfig(**{"rank": 3, "alpha": 6.0, "use_dora": True, **config})))
    return model[0]


def formula(module, x, scale):
    """The paper's equation 5, its norm held constant, in float64; the whole weight is formed."""
    w, a, b, m = (t.double() for t in (module.weight, module.lora_a, module.lora_b, module.lora_magnitude))
    adapted = w + scale * (b @ a)
    y = x.double() @ (m / adapted.detach().norm(dim=1)).unsqueeze(1).mul(adapted).T
    return y if module.bias is None else y + module.bias.double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3)])
def test_forward_and_gradients_against_float64(bias, leading):
    module = linear(bias=bias)
    x = torch.randn(*leading, 10, requires_grad=True)
    y = module(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = copy.deepcopy(module).double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    expected = formula(exact, x64, 2.0)
    grads = torch.autograd.grad(expected, [x64, exact.lora_a, exact.lora_b, exact.lora_magnitude], dy.double())
    ours = [y, x.grad, module.lora_a.grad, module.lora_b.grad, module.lora_magnitude.grad]
    for mine, theirs in zip(ours, [expected, *grads], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    assert module.weight.grad is None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_equal_to_peft(dropout, bias):
    """Forward and every gradient, in training, with the masks that PEFT draws."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(10, 8, bias=bias))
    model = shake(lora_fx.install(copy.deepcopy(base), LoRAConfig(rank=3, alpha=6.0, dropout=dropout, use_dora=True)))
    config = peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=["0"], use_dora=True)
    theirs = peft.get_peft_model(base, config).train()
    layer = theirs.base_model.model[0]
    factors = [
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.lora_magnitude_vector["default"].weight,
    ]
    with torch.no_grad():
        for ours, other in zip(lora_fx.adapter_parameters(model), factors, strict=True):
            other.copy_(ours)
    x, dy = torch.randn(5, 10), torch.randn(5, 8)
    results = []
    for one, parameters in ((model, lora_fx.adapter_parameters(model)), (theirs, factors)):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = one(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *parameters], dy)])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_at_the_start_it_is_the_base(dtype):
    torch.manual_seed(0)
    model = Toy(bias=True).to(dtype)
    expected, before = model(TOKENS), snapshot(model)
    lora_fx.install(model, DORA)
    assert torch.equal(model(TOKENS), expected)
    assert type(model.output) is lora_class(nn.Linear, DoRAModule) and type(model.output).__name__ == "DoRALinear"
    assert model.output.lora_magnitude.shape == (12,) and model.output.lora_magnitude.dtype == dtype
    torch.testing.assert_close(model.output.lora_magnitude, model.output.weight.norm(dim=1))
    losses = train(model)
    assert losses[-1] < losses[0] and not torch.equal(model(TOKENS), expected)
    with lora_fx.disabled(model):
        assert torch.equal(model(TOKENS), expected)
    model.zero_grad()
    assert_same(before, snapshot(lora_fx.remove(model)))


def test_what_requires_gradients():
    model = lora_fx.install(Toy(), LoRAConfig(target_modules="w1", use_dora=True))
    names = [f"layers.{i}.w1.{name}" for i in range(2) for name in ("lora_a", "lora_b", "lora_magnitude")]
    assert [name for name, _ in lora_fx.named_adapter_parameters(model)] == names
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    fast = lora_fx.parameter_groups(model, lr=1.0)[1]
    assert fast["lr"] == 16.0 and len(fast["params"]) == 4


def test_classes():
    assert lora_class(nn.Linear, DoRAModule) is lora_class(nn.Linear, DoRAModule)
    assert lora_class(nn.Linear, DoRAModule) is not lora_class(nn.Linear)
    module = linear(Doubling)
    assert isinstance(module, Doubling) and isinstance(module, LoRAModule) and type(module).__name__ == "DoRADoubling"
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        x = torch.randn(4, 10)
        assert torch.equal(twin(x), module(x))


def test_bfloat16_and_autocast():
    x = torch.randn(64, 10)
    module = linear(dtype=torch.bfloat16)
    y = module(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), formula(module, x.bfloat16(), 2.0), rtol=0.03, atol=0.06)
    module = linear()
    expected = row_norms(module.weight, module.lora_a, module.lora_b, module.lora_scale)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        norms = row_norms(module.weight, module.lora_a, module.lora_b, module.lora_scale)
    assert y.dtype == torch.bfloat16 and torch.equal(norms, expected)
    torch.testing.assert_close(y.double(), formula(module, x, 2.0), rtol=0.03, atol=0.06)


def test_norms_against_float64():
    torch.manual_seed(0)
    w, a, b = torch.randn(40, 300), torch.randn(16, 300), torch.randn(40, 16)
    for scale in (0.0, 0.01, -0.5, 3.0):
        exact = (w.double() + scale * (b.double() @ a.double())).norm(dim=1)
        torch.testing.assert_close(row_norms(w, a, b, torch.tensor(scale)).double(), exact, rtol=2e-6, atol=0.0)


def test_rows_of_zeros():
    torch.manual_seed(0)
    model = nn.Linear(10, 8)
    with torch.no_grad():
        model.weight[2].zero_()
    x = torch.randn(4, 10)
    expected = model(x)
    lora_fx.install(model, DORA)
    y = model(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in lora_fx.adapter_parameters(model))


# ---- compiled --------------------------------------------------------------------------------------------------------


def test_numbers_change_without_recompiling():
    torch._dynamo.reset()
    model = shake(lora_fx.install(Mlp(10), LoRAConfig(rank=2, alpha=4.0, use_dora=True)))
    base = copy.deepcopy(model)
    lora_fx.remove(base)
    backend = CompileCounterWithBackend("aot_eager")
    model.compile(backend=backend, fullgraph=True)

    def check(scale):
        x = torch.randn(5, 10)
        expected = formula(model.down, F.silu(formula(model.up, x, scale)), scale)
        torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)

    check(2.0)
    for scale in (0.5, 0.0, -1.25):
        model.up.lora_scale.fill_(scale)
        model.down.lora_scale.fill_(scale)
        check(scale)
    with lora_fx.disabled(model):
        x = torch.randn(5, 10)
        torch.testing.assert_close(model(x), base(x))
    check(-1.25)
    assert backend.frame_count == 1
    torch._dynamo.reset()


def test_every_branch_is_rewritten():
    torch.manual_seed(0)
    model = shake(lora_fx.install(Block(16), DORA))
    report = lora_fx.explain(model, torch.randn(2, 5, 16))
    assert len(report.sites) == report.rewritten == 6 and report.problems() == []
    assert all("stack(3)" in site.forward for site in report.sites if site.path.endswith(("wq", "wk", "wv")))


# ---- weights that change ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    torch.manual_seed(0)
    model = shake(lora_fx.install(Toy(bias=True).to(dtype), LoRAConfig(rank=2, use_dora=True, dropout=0.5))).eval()
    with torch.no_grad():
        model.output.lora_magnitude[0] *= -1.0
    before, expected = {n: p.clone() for n, p in model.named_parameters()}, model(TOKENS)
    lora_fx.merge(model)
    room = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(model(TOKENS), expected, rtol=room, atol=room)
    assert torch.equal(model.train()(TOKENS), F.linear(*_through(model)))
    state = model.state_dict()
    other = lora_fx.install(Toy(bias=True).to(dtype), LoRAConfig(rank=2, use_dora=True, alpha=3.0))
    other.load_state_dict(state)
    assert torch.equal(other.eval()(TOKENS), model.eval()(TOKENS))
    lora_fx.unmerge(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(model.eval()(TOKENS), expected)
    assert all(p.requires_grad for p in lora_fx.adapter_parameters(model))


def _through(model):
    """Input, weight and bias of the last linear, with the input that it gets."""
    seen = []
    handle = model.output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(TOKENS)
    handle.remove()
    return seen[0], model.output.weight, model.output.bias


def test_a_base_that_is_loaded_later():
    other, model = toy(), toy()
    other.init_weights(seed=5)
    lora_fx.install(model, DORA)
    model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(model(TOKENS), other(TOKENS))
    state = shake(model).state_dict()
    again = toy(DORA)
    again.load_state_dict(state)
    assert torch.equal(again(TOKENS), model(TOKENS))
    with torch.no_grad():  # in place, as torch.distributed.checkpoint does it
        again.output.weight.mul_(2.0)
    again.output.reset_adapters()
    torch.testing.assert_close(again.output.lora_magnitude, again.output.weight.norm(dim=1))


def test_meta_device():
    with torch.device("meta"):
        model = lora_fx.install(Toy(), DORA)
    model.to_empty(device="cpu").init_weights()
    torch.testing.assert_close(model.output.lora_magnitude, model.output.weight.norm(dim=1))
    expected = copy.deepcopy(model)
    assert torch.equal(model(TOKENS), lora_fx.remove(expected)(TOKENS))


def test_quantised_weights_are_refused():
    fix = r"leave it out with exclude_modules=\['0'\]"
    refused(nn.ModuleList([PackedLinear(10, 8)]), DORA, rf"0 \(PackedLinear\) is quantised .*use_dora.*{fix}")
    quantization = pytest.importorskip("torchao.quantization")
    model = toy(dim=32)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(
        ValueError, match=r"\(Linear\) is quantised \(\w+ torch.float32\), and use_dora takes the norms"
    ):
        lora_fx.install(model, DORA)
    assert not lora_fx.is_installed(model)


def test_float8_training_linears():
    """Their weights are held in full precision; the product is in float8."""
    float8 = pytest.importorskip("torchao.float8")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16))
    float8.convert_to_float8_training(model, config=float8.Float8LinearConfig(emulate=True))
    x = torch.randn(16, 32)
    expected = model(x)
    lora_fx.install(model, DORA)
    assert type(model[0]).__name__ == "DoRAFloat8Linear" and torch.equal(model(x), expected)
    shake(model)
    torch.testing.assert_close(model(x).double(), formula(model[0], x, 2.0), rtol=0.1, atol=0.2)


def test_wrong_type():
    with pytest.raises(TypeError, match="use_dora must be a bool, got 1"):
        LoRAConfig(use_dora=1)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_files_both_ways(tmp_path, bias):
    peft = pytest.importorskip("peft")
    patterns = LoRAConfig(rank=3, alpha=5.0, use_dora=True, rank_pattern={"wq": 2}, alpha_pattern={"w1": 2.0})
    model = toy(patterns, bias=bias).eval()
    lora_fx.save_adapter(model, tmp_path / "ours")
    theirs = in_peft(toy(bias=bias), tmp_path / "ours")
    torch.testing.assert_close(theirs(TOKENS), model(TOKENS), **TOLERANCE)
    again = lora_fx.load_adapter(toy(bias=bias), tmp_path / "ours")
    assert torch.equal(again(TOKENS), model(TOKENS)) and adapted(again) == sorted(TOY_LINEARS)
    assert all(isinstance(m, DoRAModule) for m in again.modules() if isinstance(m, LoRAModule))
    values = peft.LoraConfig(r=4, target_modules=["wq", "w1"], use_dora=True, use_rslora=True)
    theirs = shaken_peft(toy(bias=bias), values)
    theirs.save_pretrained(tmp_path / "theirs")
    read = lora_fx.load_adapter(toy(bias=bias), tmp_path / "theirs")
    torch.testing.assert_close(read(TOKENS), theirs(TOKENS), **TOLERANCE)
    into = lora_fx.load_adapter(shake(lora_fx.load_adapter(toy(bias=bias), tmp_path / "theirs")), tmp_path / "theirs")
    assert torch.equal(into(TOKENS), read(TOKENS))


def test_files_that_do_not_fit(tmp_path):
    lora_fx.save_adapter(toy(DORA), tmp_path / "dora")
    lora_fx.save_adapter(toy(LoRAConfig(rank=3, alpha=6.0)), tmp_path / "lora")
    for model, folder, match in (
        (toy(DORA), "lora", r"is a DoRALinear, and use_dora in \S+ is False: call lora_fx.remove"),
        (toy(LoRAConfig(rank=3)), "dora", r"is a LoRALinear, and use_dora in \S+ is True: call lora_fx.remove"),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=match):
            lora_fx.load_adapter(model, tmp_path / folder)
        assert_same(before, snapshot(model))
    config = tmp_path / "lora" / CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match=rf"{PREFIX}\S+lora_magnitude_vector is missing"):
        lora_fx.load_adapter(toy(), tmp_path / "lora")
    model = toy()
    lora_fx.install(model.layers["0"], DORA)
    lora_fx.install(model.layers["1"], LoRAConfig(rank=3))
    with pytest.raises(ValueError, match=r"layers\.0\S+ has DoRA's magnitudes and layers\.1\S+ has none"):
        lora_fx.save_adapter(model, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()
