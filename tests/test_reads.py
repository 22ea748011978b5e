"""Which weights a forward reads instead of calling the linear: the cases are taken from models in wide use."""

# mypy: no-check-untyped-defs
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.reads import weights_read
from tests.toy_models import Toy, adapted, refused


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.down = nn.Linear(4, 4)
        self.inner = nn.Module()
        self.inner.head = nn.Linear(4, 4)


class Functional(Model):
    def forward(self, x):
        return F.linear(self.up(x), self.down.weight, self.down.bias)


class Keyword(Model):
    def forward(self, x):
        return F.linear(input=self.up(x), weight=self.down.weight)


class Matmul(Model):
    def forward(self, x):
        return self.up(x) @ self.down.weight


class Expression(Model):
    def forward(self, x):
        weight = self.down.weight.float().t()
        return self.up(x) @ weight


class SometimesOnly(Model):
    def forward(self, x):
        if x.is_cuda:
            return torch.mm(self.up(x), self.down.weight)
        return self.down(self.up(x))


class ThroughAMethod(Model):
    def forward(self, x):
        return self.project(self.up(x))

    def project(self, x):
        return F.linear(x, self.down.weight)


class Inherited(ThroughAMethod):
    pass


class Overridden(ThroughAMethod):
    def project(self, x):
        return self.down(x)


class Deeper(Model):
    def forward(self, x):
        return F.linear(self.up(x), self.inner.head.weight)


@pytest.mark.parametrize("cls", [Functional, Keyword, Matmul, Expression, SometimesOnly, ThroughAMethod, Inherited])
def test_reads_are_refused(cls):
    assert list(weights_read(cls)) == ["down"]
    refused(
        nn.ModuleList([cls()]),
        None,
        rf"0\.down would not run its adapter: {cls.__name__}\.\w+ \(line \d+ of .*\['down'\]",
    )
    assert adapted(lora_fx.install(cls(), LoRAConfig(exclude_modules="down"))) == ["inner.head", "up"]


def test_reads_of_a_grandchild():
    refused(Deeper(), None, r"inner\.head would not run its adapter: Deeper\.forward .*exclude_modules=\['head'\]")


def test_the_line_is_the_one_of_the_read():
    read = weights_read(ThroughAMethod)["down"]
    assert read.method == "ThroughAMethod.project" and read.file == inspect.getsourcefile(ThroughAMethod)
    with open(read.file) as file:
        assert file.read().splitlines()[read.line - 1].strip() == "return F.linear(x, self.down.weight)"


class Harmless(Model):
    def __init__(self):
        super().__init__()
        nn.init.trunc_normal_(self.up.weight, std=0.02)
        self.tie(self.up.weight, self.down.weight)

    def tie(self, a, b):
        self.up.weight = self.down.weight

    def forward(self, x):
        x = x.to(self.up.weight.dtype)
        if isinstance(self.up.weight, torch.Tensor) and self.up.weight.shape[0] > 1:
            self.up.weight.data.clamp_(-1, 1)
        self.penalty = self.up.weight.norm() + torch.norm(self.down.weight, p=2)
        return self.down(self.up(x)) + self.inner.head(x)


def test_harmless_mentions():
    assert weights_read(Harmless) == {}
    assert len(adapted(lora_fx.install(Harmless()))) == 3


def test_classes_without_source_or_forward():
    scope = {"nn": nn, "F": F}
    exec("class Made(nn.Module):\n def forward(self, x): return F.linear(x, self.down.weight)", scope)
    for cls in (scope["Made"], nn.ModuleList, nn.Linear, nn.Transformer, nn.MultiheadAttention):
        assert weights_read(cls) == {}
    traced = torch.fx.symbolic_trace(Overridden())
    assert weights_read(type(traced)) == {}
    assert adapted(lora_fx.install(traced)) == ["down", "up"]


def test_the_toy_model_is_clean():
    assert all(not weights_read(type(module)) for module in Toy().modules())
    assert weights_read(Overridden) == {}


def test_models_in_wide_use():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    mamba = transformers.MambaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, state_size=4)
    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=8, num_key_value_heads=2, **sizes))
        with pytest.raises(ValueError, match=r"exclude_modules=\['dt_proj', 'out_proj', 'x_proj'\]"):
            lora_fx.install(transformers.MambaForCausalLM(mamba))
    assert len(adapted(lora_fx.install(llama))) == 8
