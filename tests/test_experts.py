"""Adapted experts: what the swap of a module with stacks of matrices does, against formulas in float64."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx
from llama3 import CONFIGS, Experts, Llama
from lora_fx import LoRAConfig
from lora_fx.adapted import _swapped_class
from tests.toy_models import assert_same, shake, snapshot

TINY = CONFIGS["tiny-moe"]
ALL = ["experts.w1", "experts.w2", "experts.w3"]
CONFIG = LoRAConfig(rank=4, alpha=6.0, target_modules=(), target_parameters=ALL)
CONFIG_OF_ONE = LoRAConfig(rank=4, alpha=6.0, target_modules=(), target_parameters=["w1", "w2", "w3"])
TOKENS = torch.arange(16).reshape(2, 8)
ENDS = torch.tensor([3, 3, 7, 12], dtype=torch.int32)  # the second expert gets nothing


class Stack(nn.Module):
    """One stack of matrices, multiplied as `how` says."""

    def __init__(self, how, shape=(4, 24, 16)):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.weight = nn.Parameter(torch.randn(shape) / 4)

    @property
    def count(self):
        return len(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        return self.how(self.weight, x)


def rows(weight, x):
    return torch.cat([part @ w.T for part, w in zip(x.split([3, 0, 4, 5]), weight)])


# Each multiplies rows [12, 16], sorted by expert, by [4, 24, 16] or (as its name says) by its transpose.
WAYS = {
    "linear, iterated": lambda w, x: torch.cat([F.linear(p, e) for p, e in zip(x.split([3, 0, 4, 5]), w)]),
    "matmul, indexed": lambda w, x: torch.cat([x[:3] @ w[0].T, x[3:7] @ w[2].mT, torch.mm(x[7:], w[3].t())]),
    "grouped": lambda w, x: F.grouped_mm(x, w.transpose(-2, -1), offs=ENDS),
    "grouped, cast": lambda w, x: torch._grouped_mm(x.float(), w.to(torch.float32).mT.contiguous(), ENDS),
    "gathered": lambda w, x: torch.bmm(w[torch.tensor([0, 0, 0, 2, 2, 2, 2, 3, 3, 3, 3, 3])], x.unsqueeze(-1)).squeeze(
        -1
    ),
    "cut": lambda w, x: torch.cat(
        [F.grouped_mm(x, half.mT, offs=ENDS) for half in (*w.chunk(2, 1)[:1], w.split([12, 12], dim=-2)[1])], -1
    ),
    "unbound": lambda w, x: torch.cat(
        [torch.matmul(p, e.transpose(0, 1)) for p, e in zip(x.split([3, 0, 4, 5]), w.unbind(0))]
    ),
}


def formula(module, name, transposed=False):
    """W + s B A of an adapted parameter, in float64."""
    a, b = (factor.double() for factor in module.factors(name))
    scale = module.lora_scale[module.adapted_parameters.index(name)].double()
    delta = torch.stack([scale * (y @ x) for x, y in zip(a, b)])
    return module._parameters[name].double() + (delta.mT if transposed else delta)


def check_gradients(module, x, expected, names, exact_x):
    """Output and gradients of `module(x)` are those of `expected`, which was computed from doubles."""
    y = module(x)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    parameters = [module.get_parameter(name) for name in names]
    ours = torch.autograd.grad(y, [x, *parameters], dy)
    theirs = torch.autograd.grad(expected, [exact_x, *parameters], dy.double())
    for name, a, b in zip(("x", *names), ours, theirs, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=1e-5, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_every_way_to_multiply_gives_the_formula(how):
    module = Stack(how)
    lora_fx.install(module, LoRAConfig(rank=4, target_modules=(), target_parameters="weight"))
    assert type(module).__name__ == "LoRAStack" and isinstance(module, (Stack, lora_fx.LoRAExpertsModule))
    shake(module)
    x = torch.randn(12, 16, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    expected = rows(formula(module, "weight"), exact_x)
    check_gradients(module, x, expected, ("weight_lora_a", "weight_lora_b"), exact_x)


def test_weights_that_are_stored_the_other_way_round():
    module = Stack(lambda w, x: torch.cat([p @ e for p, e in zip(x.split([3, 0, 4, 5]), w)]), shape=(4, 16, 24))
    module.is_transposed = True
    lora_fx.install(module, LoRAConfig(rank=3, target_modules=(), target_parameters="weight"))
    assert [list(p.shape) for p in module.factors("weight")] == [[4, 3, 16], [4, 24, 3]]
    shake(module)
    x = torch.randn(12, 16, requires_grad=True)
    exact_x = x.detach().double().requires_grad_()
    expected = rows(formula(module, "weight", transposed=True).mT, exact_x)
    check_gradients(module, x, expected, ("weight_lora_a", "weight_lora_b"), exact_x)


REFUSED = {
    "a sum": lambda w, x: x @ w.sum(0).T,
    "an einsum": lambda w, x: torch.einsum("mk,enk->mn", x, w),
    "elementwise": lambda w, x: F.linear(x, torch.mul(w, 2)[0]),
    "other dimensions": lambda w, x: x @ w.transpose(0, 1)[0].T,
    "an entry": lambda w, x: x @ w[0, :].T,
    "a list": lambda w, x: x @ torch.cat([w[0], w[1]]).T,
    "by name": lambda w, x: F.linear(input=x, weight=w[0]),
}


@pytest.mark.parametrize("how", REFUSED.values(), ids=REFUSED)
def test_what_would_need_the_sum_is_refused(how):
    module = Stack(how)
    lora_fx.install(module, LoRAConfig(rank=2, target_modules=(), target_parameters="weight"))
    with pytest.raises(TypeError, match=r"weight has an adapter, and its module's forward asks for .*Leave it out"):
        module(torch.randn(12, 16))


def llama(dtype=None) -> Llama:
    torch.manual_seed(0)
    model = Llama(TINY, dtype)
    model.init_weights()
    return model


def adapted(config=CONFIG, dtype=None):
    return shake(lora_fx.install(llama(dtype), config), std=0.1)


def test_the_example_computes_the_formula():
    model = adapted().double()
    experts = model.layers["1"].feed_forward.experts
    assert isinstance(experts, Experts)
    plain = Experts(TINY).double()
    with torch.no_grad():
        for name in ("w1", "w2", "w3"):
            getattr(plain, name).copy_(formula(experts, name))
    x = torch.randn(12, TINY.dim, dtype=torch.float64)
    torch.testing.assert_close(experts(x, ENDS), plain(x, ENDS))


def test_what_is_trained_and_what_is_not():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    first = model(TOKENS)
    lora_fx.install(model, LoRAConfig(rank=4, exclude_modules="router", target_parameters=ALL))
    assert torch.equal(model(TOKENS), first)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == [name for name, _ in lora_fx.named_adapter_parameters(model)]
    assert "layers.0.feed_forward.experts.w2_lora_b" in names and len(names) == 2 * (2 * (4 + 3 + 3)) + 2
    optimizer = torch.optim.AdamW(lora_fx.adapter_parameters(model), lr=0.01)
    start = {name: p.detach().clone() for name, p in lora_fx.named_adapter_parameters(model)}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in lora_fx.named_adapter_parameters(model))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with lora_fx.disabled(model):
        assert torch.equal(model(TOKENS), first)
    assert not torch.equal(model(TOKENS), first)


def test_remove_is_exact():
    model = llama()
    before = snapshot(model)
    lora_fx.install(model, CONFIG)
    shake(model)
    lora_fx.remove(model)
    assert_same(before, snapshot(model))


def test_copies_pickles_and_state_dicts_compute_the_same():
    model = adapted()
    model.layers["0"].feed_forward.experts.lora_scale[1] = 0.3
    y = model(TOKENS)
    assert torch.equal(copy.deepcopy(model)(TOKENS), y)
    pickled = pickle.dumps(model)
    _swapped_class.cache_clear()  # as in another process
    assert torch.equal(pickle.loads(pickled)(TOKENS), y)
    other = lora_fx.install(llama(), LoRAConfig(rank=4, alpha=1.0, target_modules=(), target_parameters=ALL))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(TOKENS), y)


def test_scales_survive_moves_and_initialisation():
    with torch.device("meta"):
        config = LoRAConfig(rank=4, target_modules=(), target_parameters=ALL, alpha_pattern={"w2": 2.0})
        model = lora_fx.install(Llama(TINY), config)
    model.to_empty(device="cpu")
    model.init_weights()
    experts = model.layers["0"].feed_forward.experts
    assert experts.lora_scale.tolist() == [4.0, 0.5, 4.0] and experts.adapted_parameters == ("w1", "w2", "w3")
    assert experts.lora_enabled.tolist() == [1.0] * 3
    bound = TINY.dim**-0.5  # kaiming's for each expert, as for a linear of its own
    assert 0.9 * bound < experts.w1_lora_a.abs().max() <= bound
    assert not experts.w1_lora_b.any()
    y = model(TOKENS)
    lora_fx.remove(model)
    assert torch.equal(model(TOKENS), y)
    half = adapted(config).bfloat16()
    assert half.layers["0"].feed_forward.experts.lora_scale.dtype == torch.float32


def test_ranks_and_exclusions_by_pattern():
    config = LoRAConfig(
        rank=4,
        target_modules=["wq"],
        target_parameters=["w1", "re:.*experts.w2"],
        exclude_modules="layers.1.feed_forward",
        rank_pattern={"experts.w2": 2},
    )
    model = lora_fx.install(llama(), config)
    assert LoRAConfig.from_dict(config.as_dict()) == config
    modules = {path: m for path, m in model.named_modules() if isinstance(m, lora_fx.LoRAExpertsModule)}
    ((path, experts),) = modules.items()
    assert path == "layers.0.feed_forward.experts" and experts.adapted_parameters == ("w1", "w2")
    assert experts.w1_lora_a.shape[1] == 4 and experts.w2_lora_a.shape[1] == 2
    assert "w1: rank=4, scale=4, w2: rank=2, scale=8" in repr(experts)


WRONG = {
    "nothing": ({"target_parameters": "experts.w9"}, r"'experts.w9' matches no parameter.*experts\.w1"),
    "a linear's": ({"target_parameters": "wq.weight"}, r"wq.weight \[64, 64\], which is no stack of matrices"),
    "a vector": ({"target_parameters": "ffn_norm.weight"}, r"ffn_norm.weight \[64\], which is no stack"),
    "excluded": ({"target_parameters": "w1", "exclude_modules": "experts"}, "leaves no linear to adapt"),
    "rank": ({"target_parameters": "w1", "rank_pattern": {"w2": 2}}, "rank_pattern: 'w2' matches"),
    "none": ({"target_parameters": ()}, "target_modules is empty"),
}


@pytest.mark.parametrize(("values", "match"), WRONG.values(), ids=WRONG)
def test_wrong_targets_are_refused_by_name(values, match):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        lora_fx.install(model, LoRAConfig(target_modules=(), **values))
    assert_same(before, snapshot(model))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Stack(None)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.experts.weight[0].T)


def test_experts_that_are_read_instead_of_called_are_refused():
    with pytest.raises(
        ValueError, match=r"experts.weight would not run its adapter: Reader.forward .* reads its weight"
    ):
        lora_fx.install(Reader(), LoRAConfig(target_modules=(), target_parameters="experts.weight"))


def test_packed_experts_and_own_forwards_are_refused():
    module = Stack(WAYS["grouped"])
    module.weight = nn.Parameter(torch.zeros(2, 4, 4, dtype=torch.int8), requires_grad=False)
    config = LoRAConfig(target_modules=(), target_parameters="weight")
    with pytest.raises(ValueError, match=r"weight .* is torch.int8, a packed form"):
        lora_fx.install(module, config)
    module = Stack(WAYS["grouped"])
    module.forward = lambda x: x
    with pytest.raises(ValueError, match="a `forward` of its own"):
        lora_fx.install(module, config)


def test_what_the_forward_sets_is_set_on_the_module():
    class Counting(Stack):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.count
            return super().forward(x)

    module = Counting(WAYS["grouped"])
    lora_fx.install(module, LoRAConfig(target_modules=(), target_parameters="weight"))
    module(torch.randn(12, 16))
    assert module.seen == 4


def test_dropout_drops_in_the_branch_alone_and_in_training_alone():
    module = Stack(lambda w, x: F.linear(x, w[0]))
    config = LoRAConfig(rank=4, dropout=0.5, target_modules=(), target_parameters="weight")
    shake(lora_fx.install(module, config))
    x = torch.randn(16).expand(40000, 16)
    with torch.no_grad():
        exact = module.eval()(x[:1])
        dropped = module.train()(x)
        base = F.linear(x[:1], module.weight[0])
    assert not torch.equal(dropped[0], dropped[1])
    # The mean over masks is the branch itself.
    largest = float((exact - base).abs().max())
    torch.testing.assert_close(dropped.mean(0, keepdim=True) - base, exact - base, rtol=0.0, atol=0.05 * largest)


def test_float32_adapters_on_bfloat16_experts():
    module = Stack(WAYS["grouped"]).bfloat16()
    lora_fx.install(module, LoRAConfig(rank=4, target_modules=(), target_parameters="weight"))
    for name in module.lora_parameters:
        module._parameters[name] = nn.Parameter(module._parameters[name].float())
    shake(module)
    x = torch.randn(12, 16).bfloat16()
    y = module(x)
    assert y.dtype == torch.bfloat16
    expected = rows(formula(module, "weight"), x.double())
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_one_graph_and_reads_new_scales(dtype):
    module = lora_fx.install(Experts(TINY, dtype), CONFIG_OF_ONE)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = torch.randn(12, TINY.dim, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, ENDS), module(x, ENDS))
    with torch.compiler.set_stance("fail_on_recompile"):
        module.lora_scale.fill_(0.25)
        torch.testing.assert_close(compiled(x, ENDS), module(x, ENDS))
        with lora_fx.disabled(module):
            torch.testing.assert_close(compiled(x, ENDS), module(x, ENDS))
    torch._dynamo.reset()
