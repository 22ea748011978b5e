"""torchtitan's own Llama-3 debug model, its code as installed, with our converter in its list."""

# mypy: no-check-untyped-defs

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import LoRAConfig

pytest.importorskip("torchtitan.protocols.model", reason="torchtitan 0.3 is not installed")
pytestmark = pytest.mark.slow
LINEARS = 6 * 5 + 1  # wqkv, wo, w1, w2, w3, and the head


def config_of(*converters):
    """The debug model's configuration. Flex attention has no backward on a CPU: the reference attention instead."""
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3 import model_registry

    config = model_registry("debugmodel", converters=list(converters)).model
    for layer in config.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return config


def built(config):
    """As torchtitan's trainer builds it."""
    with torch.device("meta"):
        model = config.build()
    model.verify_module_protocol()
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_states(buffer_device=None)
    return model.train()


def adapted(**kwargs):
    from torchtitan_lora import LoRAFxConverter

    return built(config_of(LoRAFxConverter.Config(lora=LoRAConfig(**{"rank": 8, **kwargs}))))


def test_the_debug_model_trains():
    """Compiled block by block, as torchtitan compiles: one graph for all."""
    model = adapted()
    swapped = {path: type(m).__name__ for path, m in model.named_modules() if isinstance(m, lora_fx.LoRAModule)}
    assert len(swapped) == LINEARS and set(swapped.values()) == {"LoRALinear"}
    plain = built(config_of())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    tokens = torch.randint(2048, (2, 33), generator=torch.Generator().manual_seed(1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        assert all(p.any() for n, p in model.named_parameters() if not n.endswith("lora_b"))
        assert not any(p.any() for n, p in model.named_parameters() if n.endswith("lora_b"))
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    report = lora_fx.explain(model, inputs)
    assert report.rewritten == len(report.sites) == LINEARS and report.problems() == []
    other = copy.deepcopy(model)  # as a pipeline does
    for block in model.layers.values():
        lora_fx.compile(block)
    optimizer = torch.optim.AdamW(lora_fx.adapter_parameters(model), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(inputs).float().flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        assert name not in base or torch.equal(parameter, base[name]), name
    with torch.no_grad():
        other.layers["0"].feed_forward.w1.lora_b.fill_(1.0)
        other.init_states(buffer_device=None)
        assert not other.layers["0"].feed_forward.w1.lora_b.any()
    assert other.init_states.model is other


def test_dora_starts_at_the_norms():
    model = adapted(use_dora=True)
    module = model.layers["0"].attention.wo
    assert type(module).__name__ == "DoRALinear"
    torch.testing.assert_close(module.lora_magnitude, module.weight.norm(dim=1))
    inputs = torch.randint(2048, (1, 16))
    torch.testing.assert_close(model(inputs), built(config_of())(inputs))


@pytest.fixture
def inductor_as_it_was():
    """torchtitan's float8 converter has Inductor round as eager does, for the whole process, and so fuse less."""
    with torch._inductor.config.patch(emulate_precision_casts=torch._inductor.config.emulate_precision_casts):
        yield


@pytest.mark.usefixtures("inductor_as_it_was")
def test_quantisation_comes_first():
    pytest.importorskip("torchao.float8")
    from torchtitan.components.quantization import Float8LinearConverter

    from torchtitan_lora import LoRAFxConverter

    float8, lora = Float8LinearConverter.Config(emulate=True), LoRAFxConverter.Config(lora=LoRAConfig(rank=8))
    model = built(config_of(float8, lora))
    assert isinstance(model.layers["0"].feed_forward.w1, lora_fx.LoRAModule)
    assert type(model.layers["0"].feed_forward.w1).__name__ == "LoRAFloat8Linear"
    model(torch.randint(2048, (1, 32))).float().square().mean().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in lora_fx.named_adapter_parameters(model)
    }
    with pytest.raises(ValueError, match="must be applied before LoRAConverter"):
        config_of(lora, float8)


def test_placements_are_declared():
    """What the trainer wants of every parameter and buffer, whatever the parallelism."""
    from torchtitan.models.llama3.sharding import set_llama3_sharding_config

    from torchtitan_lora import LoRAFxConverter

    config = config_of(LoRAFxConverter.Config(lora=LoRAConfig(rank=8, use_dora=True)))
    set_llama3_sharding_config(config, enable_sp=False)
    with torch.device("meta"):
        model = config.build()
    for path, module in model.named_modules():
        if isinstance(module, lora_fx.LoRAModule):
            declared = module._sharding_config.state_shardings
            held = [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
            assert set(held) <= set(declared), path
    block = model.layers["0"].feed_forward
    column, row = (block.get_submodule(name)._sharding_config.state_shardings for name in ("w1", "w2"))
    assert column["lora_b"] == column["weight"] == column["lora_magnitude"] and row["lora_a"] == row["weight"]
    assert column["lora_a"] == row["lora_b"] == row["lora_magnitude"] == row["lora_scale"]
    assert isinstance(model, nn.Module)
