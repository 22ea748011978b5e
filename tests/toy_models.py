"""Small models and an oracle that the tests of the class swap share."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_fx


class Attention(nn.Module):
    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.wq = nn.Linear(dim, dim, bias=bias)
        self.wk = nn.Linear(dim, dim, bias=bias)
        self.wv = nn.Linear(dim, dim, bias=bias)
        self.wo = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.scaled_dot_product_attention(self.wq(x), self.wk(x), self.wv(x)))


class Block(nn.Module):
    def __init__(self, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = Attention(dim, bias)
        self.w1 = nn.Linear(dim, 2 * dim, bias=bias)
        self.w2 = nn.Linear(2 * dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.w2(F.silu(self.w1(x)))


class Mlp(nn.Module):
    # Not an nn.Sequential: Dynamo does not compile the forward of torch's own containers as one frame.
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, dim)
        self.down = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x)))


class Toy(nn.Module):
    """Two blocks and a head, with an `init_weights` that takes and returns something."""

    def __init__(self, dim: int = 16, depth: int = 2, vocabulary: int = 12, bias: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleDict({str(i): Block(dim, bias) for i in range(depth)})
        self.output = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(x)

    def init_weights(self, std: float = 0.02, *, seed: int = 0) -> str:
        torch.manual_seed(seed)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        return f"initialised with {std}"


TOY_LINEARS = [
    *(f"layers.{i}.{name}" for i in range(2) for name in ("attention.wq", "attention.wk", "attention.wv")),
    *(f"layers.{i}.{name}" for i in range(2) for name in ("attention.wo", "w1", "w2")),
    "output",
]


TOKENS = torch.arange(10).reshape(2, 5)


def adapted(model: nn.Module) -> list[str]:
    return sorted(path for path, module in model.named_modules() if isinstance(module, lora_fx.LoRAModule))


def shake(model: nn.Module, std: float = 0.2, seed: int = 1) -> nn.Module:
    """Take every adapter away from its start, at which it adds nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in lora_fx.named_adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def oracle(module: nn.Linear, x: Tensor, scale: float = 0.0) -> Tensor:
    """A linear in float64, written out; with its adapter if a scale is given."""
    x = x.double()
    y = x @ module.weight.double().T
    if module.bias is not None:
        y = y + module.bias.double()
    if isinstance(module, lora_fx.LoRAModule):
        y = y + scale * ((x @ module.lora_a.double().T) @ module.lora_b.double().T)
    return y


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as it was after a refused install, or after `remove`."""
    return {
        "classes": {path: type(module) for path, module in model.named_modules()},
        "dicts": {path: list(module.__dict__) for path, module in model.named_modules()},
        "attributes": {
            path: {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str))}
            for path, module in model.named_modules()
        },
        "unsaved": {path: set(module._non_persistent_buffers_set) for path, module in model.named_modules()},
        "keys": list(model.state_dict()),
        "tensors": {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()},
        "values": {name: copy.deepcopy(t) for name, t in model.state_dict().items() if not t.is_meta},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)},
        "init_weights": model.__dict__.get("init_weights"),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key in before:
        if key == "values":
            assert before[key].keys() == after[key].keys()
            for name, tensor in before[key].items():
                assert torch.equal(tensor, after[key][name]), name
        else:
            assert before[key] == after[key], key


def refused(model: nn.Module, config: Any, match: str, error: type[Exception] = ValueError) -> None:
    """Assert that installing raises `error` with `match` in its text, and leaves the model exactly as it was."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        lora_fx.install(model, config)
    assert_same(before, snapshot(model))
    assert not hasattr(model, "_lora_fx")


def train(model: nn.Module, steps: int = 5) -> list[float]:
    """Losses of a few optimizer steps on whatever requires gradients, as a careless trainer would take them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
