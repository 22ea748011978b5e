# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import copy
import pickle

import pytest
import torch
import torch.nn.utils.parametrizations
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize, weight_norm

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.linear import lora_class
from tests.toy_models import TOY_LINEARS, Attention, Toy, adapted, assert_same, oracle, shake, snapshot

TOKENS = torch.arange(10).reshape(2, 5)


def train(model, steps=5, inputs=TOKENS):
    """A few optimizer steps on whatever requires gradients, as a careless trainer would take them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), inputs.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_freeze_and_train():
    torch.manual_seed(0)
    model = Toy(bias=True)
    base = {name: value.clone() for name, value in model.state_dict().items()}
    lora_fx.install(model, LoRAConfig(rank=2))
    start = {name: p.detach().clone() for name, p in lora_fx.named_adapter_parameters(model)}
    losses = train(model)
    assert losses[-1] < losses[0]
    for name, value in base.items():
        assert torch.equal(model.state_dict()[name], value), name
    for name, parameter in lora_fx.named_adapter_parameters(model):
        assert not torch.equal(parameter, start[name]), name
    assert {name for name, p in model.named_parameters() if p.grad is not None} == start.keys()


def test_what_requires_gradients():
    model = lora_fx.install(Toy(), LoRAConfig(target_modules="wq"))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        f"layers.{i}.attention.wq.lora_{letter}" for i in range(2) for letter in "ab"
    ]
    named = lora_fx.named_adapter_parameters(model)
    assert [name for name, _ in named] == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(dict(model.named_parameters())[name] is p for name, p in named)
    assert [id(p) for _, p in named] == [id(p) for p in lora_fx.adapter_parameters(model)]
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    for _ in range(2):
        lora_fx.freeze(model)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {name for name, _ in named}


def test_install_returns_the_model_and_keeps_base_names():
    model = Toy()
    names = [name for name, _ in model.named_modules()]
    keys = list(model.state_dict())
    assert lora_fx.install(model) is model
    assert [name for name, _ in model.named_modules()] == names
    assert [key for key in model.state_dict() if not key.split(".")[-1].startswith("lora_")] == keys
    assert lora_fx.is_installed(model) and not lora_fx.is_installed(Toy())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_remove_restores_everything(trained, copied):
    torch.manual_seed(0)
    model = Toy(bias=True)
    model.tokens.requires_grad_(False)
    model.layers["0"].w1.bias.requires_grad_(False)
    expected = model(TOKENS).detach()
    before = snapshot(model)
    lora_fx.install(model, LoRAConfig(rank=2, dropout=0.1))
    if trained:
        train(model)
        model.zero_grad()
    if copied:
        model = copied(model)
    assert lora_fx.remove(model) is model
    after = snapshot(model)
    if copied:
        before["tensors"] = after["tensors"] = None  # a copy has tensors of its own
    assert_same(before, after)
    assert not lora_fx.is_installed(model)
    assert torch.equal(model(TOKENS), expected)
    lora_fx.install(model, LoRAConfig(rank=3))
    assert model.output.lora_a.shape[0] == 3


def test_a_bare_linear():
    model = nn.Linear(6, 4)
    before = snapshot(model)
    lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0))
    assert type(model) is lora_class(nn.Linear)
    assert [name for name, _ in lora_fx.named_adapter_parameters(model)] == ["lora_a", "lora_b"]
    shake(model)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x).double(), oracle(model, x, 2.0), rtol=1e-5, atol=1e-5)
    with lora_fx.disabled(model):
        assert torch.allclose(model(x).double(), oracle(model, x, 0.0))
    assert_same(before, snapshot(lora_fx.remove(model)))


def test_copies_are_independent():
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    other = copy.deepcopy(model)
    expected = model(TOKENS)
    with lora_fx.disabled(other):
        assert torch.equal(model(TOKENS), expected)
        assert not torch.equal(other(TOKENS), expected)
    lora_fx.remove(other)
    assert adapted(model) == sorted(TOY_LINEARS)
    assert torch.equal(model(TOKENS), expected)


# -- disabled and scales ----------------------------------------------------------------------------------------------


def test_disabled():
    torch.manual_seed(0)
    model = Toy()
    base = model(TOKENS).detach()
    shake(lora_fx.install(model, LoRAConfig(rank=2)))
    with_adapters = model(TOKENS).detach()
    assert not torch.allclose(base, with_adapters)
    with lora_fx.disabled(model):
        assert torch.equal(model(TOKENS), base)
        with lora_fx.disabled(model.layers["0"]):
            assert torch.equal(model(TOKENS), base)
        assert torch.equal(model(TOKENS), base)
    assert torch.equal(model(TOKENS), with_adapters)
    with pytest.raises(KeyError), lora_fx.disabled(model):
        raise KeyError
    assert torch.equal(model(TOKENS), with_adapters)
    with lora_fx.disabled(model.layers["0"]):
        partly = model(TOKENS)
    assert not torch.equal(partly, base) and not torch.equal(partly, with_adapters)


def test_moved_or_initialised_while_disabled():
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    with lora_fx.disabled(model):
        model.init_weights()
        shake(model)
        base = model(TOKENS)
        model.double()
        torch.testing.assert_close(model(TOKENS), base.double())
    assert model.output.lora_enabled.item() == 1.0
    assert not torch.allclose(model(TOKENS), base.double(), atol=1e-3)
    with lora_fx.disabled(model):
        torch.testing.assert_close(model(TOKENS), base.double())
        model.to("meta")
    assert model.output.lora_enabled.is_meta


def test_inference_mode_leaves_no_trace():
    model = Toy()
    with torch.inference_mode():
        shake(lora_fx.install(model, LoRAConfig(rank=2)))
        with lora_fx.disabled(model):
            model(TOKENS)
    model.output.lora_scale.fill_(0.5)
    with lora_fx.disabled(model):
        y = model(TOKENS)
    (y.sum() + model(TOKENS).sum()).backward()
    assert all(p.grad.any() for p in lora_fx.adapter_parameters(model))


def test_symbolic_tracing_calls_the_linear_as_before():
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    traced = torch.fx.symbolic_trace(model.layers["0"])
    assert "self.attention.wq(" in traced.code
    model.layers["0"].w1.lora_scale.fill_(0.3)
    x = torch.randn(2, 5, 16)
    assert torch.equal(traced(x), model.layers["0"](x))


def test_disabled_between_forward_and_backward():
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2))).double()
    model(TOKENS).sum().backward()
    expected = [p.grad.clone() for p in lora_fx.adapter_parameters(model)]
    model.zero_grad()
    y = model(TOKENS)
    with torch.no_grad(), lora_fx.disabled(model):
        model(TOKENS)
    y.sum().backward()
    for parameter, grad in zip(lora_fx.adapter_parameters(model), expected):
        torch.testing.assert_close(parameter.grad, grad)


def test_disabled_adapters_get_no_gradient():
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    with lora_fx.disabled(model):
        y = model(TOKENS)
    y.sum().backward()
    assert all(not p.grad.any() for p in lora_fx.adapter_parameters(model))


def test_changing_a_scale():
    model = lora_fx.install(nn.Linear(6, 4), LoRAConfig(rank=2))
    shake(model)
    model.lora_scale.fill_(0.25)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x).double(), oracle(model, x, 0.25), rtol=1e-5, atol=1e-5)


# -- odd models -------------------------------------------------------------------------------------------------------


def test_a_linear_used_twice_and_under_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.again = self.first

        def forward(self, x):
            return self.again(self.first(x))

    model = Twice()
    before = snapshot(model)
    shake(lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0)))
    assert model.first is model.again and len(lora_fx.adapter_parameters(model)) == 2
    x = torch.randn(3, 4)
    once = oracle(model.first, x, 2.0)
    torch.testing.assert_close(model(x).double(), oracle(model.first, once, 2.0), rtol=1e-5, atol=1e-5)
    model(x).sum().backward()
    assert model.first.lora_a.grad.abs().sum() > 0
    model.zero_grad()
    assert_same(before, snapshot(lora_fx.remove(model)))


def test_tied_weights():
    model = Toy()
    model.output.weight = model.tokens.weight
    before = snapshot(model)
    lora_fx.install(model, LoRAConfig(rank=2))
    assert model.output.weight is model.tokens.weight and not model.tokens.weight.requires_grad
    assert_same(before, snapshot(lora_fx.remove(model)))

    two = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    two[1].weight = two[0].weight
    lora_fx.install(two, LoRAConfig(rank=2))
    assert two[0].weight is two[1].weight and two[0].lora_a is not two[1].lora_a


def test_containers():
    model = nn.ModuleDict({"a.b".replace(".", "_"): nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4))})
    lora_fx.install(model, LoRAConfig(target_modules="a_b.0.0"))
    assert adapted(model) == ["a_b.0.0"]


def test_parametrized_linears():
    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    parametrize.register_parametrization(model[0], "weight", Halved())
    torch.nn.utils.parametrizations.weight_norm(model[1])
    before = snapshot(model)
    shake(lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0)))
    assert type(model[0]).__name__ == "LoRAParametrizedLinear"
    x = torch.randn(3, 6)
    expected = oracle(model[1], oracle(model[0], x, 2.0), 2.0)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in lora_fx.named_adapter_parameters(model)
    }
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert_same(before, snapshot(lora_fx.remove(model)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weight_norm_by_hook():
    model = nn.Sequential(weight_norm(nn.Linear(6, 4)))
    shake(lora_fx.install(model, LoRAConfig(rank=2, alpha=4.0)))
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x).double(), oracle(model[0], x, 2.0), rtol=1e-5, atol=1e-5)
    assert not model[0].weight_g.requires_grad


def test_hooks_of_the_linear_still_run():
    model = nn.Sequential(nn.Linear(6, 4))
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    y = shake(lora_fx.install(model, LoRAConfig(rank=2)))(torch.randn(3, 6))
    assert torch.equal(seen[0], y)


# -- refusals: each leaves the model exactly as it was ----------------------------------------------------------------


def refused(model, config, match, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        lora_fx.install(model, config)
    assert_same(before, snapshot(model))
    assert not hasattr(model, "_lora_fx")


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        lora_fx.install([nn.Linear(2, 2)])
    refused(Toy(), {"rank": 8}, "config must be a LoRAConfig, got dict", TypeError)


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(target_modules=["wq", "wz"]),
        LoRAConfig(target_modules="attention"),
        LoRAConfig(exclude_modules="wz"),
        LoRAConfig(rank_pattern={"wz": 3}),
        LoRAConfig(alpha_pattern={"wq": 3, "0.attention.wq": 4}),
    ],
)
def test_a_refused_configuration_changes_nothing(config):
    refused(Toy(), config, "'wz' matches no module|matches only modules|make the patterns exclude")


def test_second_install():
    for model, part in [(Toy(), lambda m: m), (Toy(), lambda m: m.layers["0"])]:
        lora_fx.install(part(model), LoRAConfig(rank=2))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"holds adapters already: call lora_fx.remove\(model\)"):
            lora_fx.install(model, LoRAConfig(rank=4))
        assert_same(before, snapshot(model))


@pytest.mark.parametrize("part", [lambda m: m, lambda m: m.layers["1"]])
def test_compiled_models(part):
    model = Toy()
    part(model).compile(backend="eager")
    refused(model, None, "compiled already: install on the model as it was before torch.compile")


def test_wrapped_by_torch_compile():
    model = torch.compile(Toy(), backend="eager")
    with pytest.raises(ValueError, match="the model itself is compiled already"):
        lora_fx.install(model)
    whole = Toy()
    whole.layers["1"] = torch.compile(whole.layers["1"], backend="eager")
    with pytest.raises(ValueError, match=r"layers.1 is compiled already"):
        lora_fx.install(whole)


def test_data_parallel_models():
    refused(nn.DataParallel(Toy()), None, "the model itself is wrapped by DataParallel already: install first")


def test_lazy_linears():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0 \(LazyLinear\) is lazy .* exclude_modules=\['0'\]"):
        lora_fx.install(model)
    assert [type(module) for module in model] == [nn.LazyLinear, nn.Linear]
    lora_fx.install(model, LoRAConfig(exclude_modules=["0"]))
    lora_fx.remove(model)
    model(torch.randn(2, 6))
    assert adapted(lora_fx.install(model, LoRAConfig(rank=2))) == ["0", "1"]


class Hungry(nn.Linear):
    def forward(self, x, gain=1.0):
        return super().forward(x) * gain


class Variadic(nn.Linear):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_linears_on_which_an_adapter_would_not_work():
    refused(
        nn.Sequential(Hungry(4, 4)), None, r"0 \(Hungry\) takes more than its input .*\(gain\).*exclude_modules=\['0'\]"
    )
    assert adapted(lora_fx.install(nn.Sequential(Variadic(4, 4)))) == ["0"]

    patched = Attention(4)
    patched.wq.forward = lambda x: x
    refused(patched, None, r"wq \(Linear\) has a `forward` of its own on the instance")

    named = Attention(4)
    named.wk.lora_a = nn.Linear(4, 2)
    refused(named, LoRAConfig(target_modules="wk"), r"wk \(Linear\) has an attribute called lora_a already")

    refused(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), None, "complex weight")


def test_quantised_linears_of_torch_are_no_linears():
    from torch.ao.nn.intrinsic.qat import LinearReLU
    from torch.ao.quantization import default_qat_qconfig

    with pytest.raises(ValueError, match=r"holds no nn\.Linear"):
        lora_fx.install(nn.Sequential(torch.ao.nn.quantized.dynamic.Linear(4, 4)))
    refused(nn.Sequential(LinearReLU(4, 4, qconfig=default_qat_qconfig)), None, "applies more than a linear map")


def test_a_failure_half_way_is_undone(monkeypatch):
    model = Toy()
    before = snapshot(model)
    original = nn.Module.register_parameter

    def failing(self, name, param):
        if name == "lora_b" and self is model.layers["1"].w1:
            raise RuntimeError("out of memory")
        original(self, name, param)

    monkeypatch.setattr(nn.Module, "register_parameter", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        lora_fx.install(model)
    monkeypatch.undo()
    assert_same(before, snapshot(model))


def test_calls_on_a_model_without_adapters():
    for call in (lora_fx.freeze, lora_fx.adapter_parameters, lambda m: lora_fx.disabled(m).__enter__()):
        model = Toy()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"Toy holds no adapters: call lora_fx\.install"):
            call(model)
        assert_same(before, snapshot(model))


def test_remove_wants_the_model_of_install():
    with pytest.raises(ValueError, match=r"not the one that lora_fx\.install was called on"):
        lora_fx.remove(Toy())
    model = Toy()
    lora_fx.install(model.layers["0"])
    with pytest.raises(ValueError, match=r"installed on layers.0, not on the module given"):
        lora_fx.remove(model)
    lora_fx.remove(model.layers["0"])


def test_remove_refuses_what_changed_after_install():
    model = lora_fx.install(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(rank=2))
    parametrize.register_parametrization(model[0], "lora_a", nn.Identity())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"0 became a ParametrizedLoRALinear after install: undo that first"):
        lora_fx.remove(model)
    assert_same(before, snapshot(model))
    parametrize.remove_parametrizations(model[0], "lora_a")
    lora_fx.remove(model)
    assert type(model[0]) is nn.Linear


def test_remove_after_activation_checkpointing():
    model = Toy()
    model.layers["0"].w1.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    lora_fx.install(model, LoRAConfig(rank=2))
    for name, block in list(model.layers.items()):
        model.layers[name] = checkpoint_wrapper(block)
    lora_fx.remove(model)
    assert {
        name.replace("_checkpoint_wrapped_module.", ""): p.requires_grad for name, p in model.named_parameters()
    } == before


def test_a_wrapper_that_forwards_attributes():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    model = Wrapper(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    with pytest.raises(ValueError, match="installed on inner, not on the module given"):
        lora_fx.remove(model)
    lora_fx.remove(model.inner)
    before = snapshot(model)
    lora_fx.install(model, LoRAConfig(rank=2))
    shake(model).init_weights()
    assert not model.inner.output.lora_b.any()
    assert_same({**before, "tensors": 0, "values": {}}, {**snapshot(lora_fx.remove(model)), "tensors": 0, "values": {}})


def test_remove_after_layers_were_dropped():
    """As a pipeline stage does with the layers of other stages."""
    model = lora_fx.install(Toy(), LoRAConfig(rank=2))
    stage = copy.deepcopy(model)
    del stage.layers["0"]
    stage.tokens = None
    assert adapted(stage) == [path for path in sorted(TOY_LINEARS) if not path.startswith("layers.0")]
    lora_fx.remove(stage)
    assert not adapted(stage) and all(p.requires_grad for p in stage.parameters())


# -- sharding: one process is enough to see who comes first ------------------------------------------------------------


@pytest.fixture
def one_rank():
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def shard(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_wrapping_before_install_is_refused(one_rank):
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    order = r"wrapped by {} already: install first, then wrap \(the order is: quantise, install, parallelise, shard"
    partly = Toy()
    fully_shard(partly.layers["1"], mesh=one_rank)
    refused(partly, None, r"layers\.1 is " + order.format("fully_shard"))
    refused(shard(Toy(), one_rank), None, order.format("fully_shard"))
    refused(DistributedDataParallel(Toy()), None, order.format("DistributedDataParallel"))
    refused(replicate(Toy()), None, order.format("replicate"))
    fsdp1 = FullyShardedDataParallel(Toy(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match=order.format("FullyShardedDataParallel")):
        lora_fx.install(fsdp1)
    assert not lora_fx.is_installed(fsdp1)


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")
def test_sharding_after_install(one_rank):
    model = shake(lora_fx.install(Toy(), LoRAConfig(rank=2)))
    expected = model(TOKENS)
    named = {name for name, _ in lora_fx.named_adapter_parameters(model)}
    shard(model, one_rank)
    torch.testing.assert_close(model(TOKENS), expected)
    with lora_fx.disabled(model):
        assert not torch.allclose(model(TOKENS), expected)
    model(TOKENS).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == named
    with pytest.raises(ValueError, match="the model itself is wrapped by fully_shard: remove the adapters before"):
        lora_fx.remove(model)

    with torch.device("meta"):
        model = lora_fx.install(Toy(), LoRAConfig(rank=2, alpha=6.0))
    shard(model, one_rank).to_empty(device="cpu")
    model.init_weights()
    assert model.output.lora_scale.item() == 3.0 and model.output.lora_enabled.item() == 1.0
    assert model.output.lora_a.full_tensor().abs().max() > 0 and not model.output.lora_b.full_tensor().any()
