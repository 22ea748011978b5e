# Submodules are reached by attribute, which torch types as `Tensor | Module`.
# mypy: no-check-untyped-defs

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torchao.float8 import convert_to_float8_training
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import lora_fx
from lora_fx import LoRAConfig
from tests.toy_models import TOKENS, Mlp, Toy, shake


def adapted(dtype: torch.dtype = torch.float32, **config) -> nn.Module:
    torch.manual_seed(0)
    return shake(lora_fx.install(Toy(dim=32).to(dtype), LoRAConfig(rank=2, alpha=3.0, **config)))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_there_and_back(dtype):
    model = adapted(dtype, dropout=0.5).eval()
    before, expected = weights(model), model(TOKENS)
    base = copy.deepcopy(model.output.weight)
    assert lora_fx.merge(model) is model
    room = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(model(TOKENS), expected, rtol=room, atol=room)
    layer = model.output
    a, b, scale = layer.lora_a.double(), layer.lora_b.double(), layer._lora_merged.scale.double()
    exact, size = base.double() + scale * (b @ a), base.double().abs() + scale * (b.abs() @ a.abs())
    assert not torch.equal(layer.weight, base)
    rounding = torch.finfo(dtype).eps / 2 * exact.abs() + 2.0**-22 * size  # of the sum, and in it
    assert ((layer.weight.double() - exact).abs() <= rounding).all()
    assert torch.equal(model(TOKENS), model.train()(TOKENS))  # no branch, no dropout
    assert not lora_fx.adapter_parameters(model)[0].requires_grad
    assert lora_fx.unmerge(model) is model
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert torch.equal(model.eval()(TOKENS), expected)
    assert all(p.requires_grad == name.endswith(("lora_a", "lora_b")) for name, p in model.named_parameters())


def test_a_model_to_export():
    model = adapted()
    expected, types = model(TOKENS), [type(module) for module in Toy(dim=32).modules()]
    lora_fx.remove(lora_fx.merge(model, keep=False))
    assert [type(module) for module in model.modules()] == types
    assert not any("lora" in name for name in model.state_dict())
    torch.testing.assert_close(model(TOKENS), expected)


def test_a_checkpoint_of_a_merged_model_is_its_function():
    model = adapted()
    expected = model(TOKENS)
    state = lora_fx.merge(model).state_dict()
    other = lora_fx.install(Toy(dim=32), LoRAConfig(rank=2, alpha=7.0))
    other.load_state_dict(state, strict=True)
    torch.testing.assert_close(other(TOKENS), expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(TOKENS), expected)
        assert torch.equal(lora_fx.unmerge(twin)(TOKENS), expected)


def test_compiled_code_goes_on():
    torch.manual_seed(0)
    model = shake(lora_fx.install(Mlp(32), LoRAConfig(rank=2)))
    lora_fx.compile(model)
    x = torch.randn(4, 32)
    expected = model(x)
    expected.sum().backward()
    with torch.no_grad():
        for round in range(3):
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(lora_fx.merge(model)(x), expected)
            lora_fx.unmerge(model)
            if round == 0:
                counters.clear()  # both states have their graph
    assert counters["stats"]["unique_graphs"] == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_a_backward_across_a_merge_fails_instead_of_being_wrong(compiled):
    """Its weights are not those of its forward any more: autograd sees that, also after `unmerge`."""
    torch.manual_seed(0)
    model = shake(lora_fx.install(Mlp(32), LoRAConfig(rank=2)))
    if compiled:
        lora_fx.compile(model)
    x, scale = torch.randn(4, 32), model.down.lora_scale
    loss = model(x).square().sum()
    lora_fx.merge(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=True)
    lora_fx.unmerge(model)
    assert model.down.lora_scale is scale
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_would_mix_is_refused(tmp_path):
    model = adapted()
    state = copy.deepcopy(model.state_dict())
    lora_fx.merge(model)
    merged = weights(model)
    for wrong in (
        lambda: lora_fx.merge(model),
        lambda: lora_fx.freeze(model),
        lambda: lora_fx.save_adapter(model, tmp_path / "a"),
        lambda: lora_fx.disabled(model).__enter__(),
        lambda: model.output.load_state_dict({k.removeprefix("output."): v for k, v in state.items() if "output" in k}),
        model.output.reset_adapters,
    ):
        with pytest.raises(ValueError, match="merged"):
            wrong()
        assert all(torch.equal(merged[name], p) for name, p in model.named_parameters())
    lora_fx.save_adapter(lora_fx.unmerge(model), tmp_path / "a")
    lora_fx.merge(model)
    with pytest.raises(ValueError, match="merged"):
        lora_fx.load_adapter(model, tmp_path / "a")
    assert all(torch.equal(merged[name], p) for name, p in model.named_parameters())


def test_loading_into_a_merged_model_loads_nothing():
    """Not even what comes before the first merged linear, whichever module is asked."""
    model = adapted()
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    lora_fx.merge(model)
    merged, wrapped = weights(model), nn.ModuleDict({"inner": model})
    block = {name.removeprefix("layers.0."): tensor for name, tensor in state.items() if name.startswith("layers.0.")}
    for module, values in (
        (model, state),
        (model.layers["0"], block),
        (wrapped, {f"inner.{name}": tensor for name, tensor in state.items()}),
    ):
        with pytest.raises(ValueError, match=r"layers\.0\.attention\.wq is merged|attention\.wq is merged"):
            module.load_state_dict(values)
        assert all(torch.equal(merged[name], p) for name, p in model.named_parameters())
    model.load_state_dict({"tokens.weight": state["tokens.weight"]}, strict=False)  # which is not merged
    assert torch.equal(model.tokens.weight, state["tokens.weight"])
    lora_fx.unmerge(model).load_state_dict(state)
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters())


def test_what_cannot_be_merged():
    def refused(model: nn.Module, text: str) -> None:
        before = weights(model)
        with pytest.raises(ValueError, match=text):
            lora_fx.merge(model)
        assert all(torch.equal(before[n], p) or p.isnan().any() for n, p in model.named_parameters() if not p.is_meta)
        assert all(m._lora_merged is None for m in model.modules() if isinstance(m, lora_fx.LoRAModule))

    with pytest.raises(ValueError, match="holds no adapters"):
        lora_fx.merge(Toy())
    with pytest.raises(ValueError, match="not merged"):
        lora_fx.unmerge(adapted())
    model = adapted()
    with torch.no_grad():
        model.output.lora_b[0, 0] = float("nan")
    refused(model, "output: weight and adapter add up to NaN")
    model = adapted()
    model.tokens.weight = nn.Parameter(model.output.weight.detach())
    model.output.weight = model.tokens.weight
    refused(model, "output shares its weight")
    refused(lora_fx.install(Toy().to("meta"), LoRAConfig(rank=2)), "meta device")
    model = adapted()
    with lora_fx.disabled(model):
        refused(model, "layers.0.attention.wq is disabled")
    model = lora_fx.merge(adapted(), keep=False)
    with pytest.raises(ValueError, match="keep=False"):
        lora_fx.unmerge(model)


def test_a_quantised_weight_is_refused():
    model = Mlp(32)
    quantize_(model, Int8WeightOnlyConfig())
    shake(lora_fx.install(model, LoRAConfig(rank=2)))
    expected = model(torch.ones(3, 32))
    with pytest.raises(ValueError, match=r"up has a weight of \w+ torch\.float32, which cannot hold the sum: load the"):
        lora_fx.merge(model)
    assert torch.equal(model(torch.ones(3, 32)), expected)


def test_float8_training_keeps_a_weight_that_can_be_merged():
    torch.manual_seed(0)
    model = convert_to_float8_training(Mlp(32))
    shake(lora_fx.install(model, LoRAConfig(rank=2)))
    before = weights(model)
    lora_fx.merge(model)
    assert not torch.equal(model.up.weight, before["up.weight"])
    lora_fx.unmerge(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
