"""Adapter files: they restore the function, and wrappers do not get into them."""

# Submodules are reached by attribute, which torch types as `Tensor | Module`, and wrong arguments are the point.
# mypy: no-check-untyped-defs
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import lora_fx
from lora_fx import LoRAConfig
from lora_fx.peft_files import CONFIG, PREFIX, TENSORS
from tests.toy_models import TOKENS, TOY_LINEARS, Block, Mlp, Toy, adapted, assert_same, shake, snapshot, train

CONFIGS = {
    "plain": LoRAConfig(rank=4, alpha=8.0),
    "patterns": LoRAConfig(
        rank=4,
        alpha=10.0,
        rank_pattern={"wq": 3, "layers.1.w1": 7},
        alpha_pattern={"layers.1.attention.wq": 0.3, "w2": 5.0},
        dropout=0.25,
    ),
    "rslora": LoRAConfig(rank=3, alpha=5.0, use_rslora=True, rank_pattern={"wk": 5}, alpha_pattern={"wv": 0.7}),
    "some": LoRAConfig(rank=2, target_modules=["layers.0.w1", "wq", "output"]),
}


def toy(config=CONFIGS["plain"], seed=0, **kwargs):
    torch.manual_seed(0)
    return shake(lora_fx.install(Toy(**kwargs), config), seed=seed).eval()


def base(**kwargs):
    torch.manual_seed(0)
    return Toy(**kwargs).eval()


def scales(model):
    return {name: buffer.item() for name, buffer in model.named_buffers() if name.endswith("lora_scale")}


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_without_adapters_gets_those_of_the_file(tmp_path, config, bias):
    model = toy(config, bias=bias)
    model.layers["0"].w1.lora_scale.fill_(-0.37)  # what counts is what the model computes, not how it was installed
    assert lora_fx.save_adapter(model, tmp_path / "adapter") == tmp_path / "adapter"
    other = lora_fx.load_adapter(base(bias=bias), tmp_path / "adapter")
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert adapted(other) == adapted(model) and scales(other) == scales(model)
    assert other.output.lora_dropout == config.dropout
    # It can be trained, started afresh, and removed like any other.
    assert all(p.requires_grad == (".lora_" in name) for name, p in other.named_parameters())
    losses = train(other)
    assert losses[-1] < losses[0]
    other.init_weights()
    assert other.layers["0"].w1.lora_scale.item() == pytest.approx(-0.37)
    assert type(lora_fx.remove(other).output) is nn.Linear


def test_the_files_hold_what_peft_expects(tmp_path):
    lora_fx.save_adapter(toy(CONFIGS["patterns"]), tmp_path)
    with safe_open(tmp_path / TENSORS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118  # not a mapping
    assert set(shapes) == {f"{PREFIX}{path}.lora_{f}.weight" for path in TOY_LINEARS for f in "AB"}
    assert shapes[f"{PREFIX}layers.1.w1.lora_A.weight"] == [7, 16]
    assert shapes[f"{PREFIX}layers.1.w1.lora_B.weight"] == [32, 7]
    values = json.loads((tmp_path / CONFIG).read_text())
    assert (values["peft_type"], values["r"], values["lora_alpha"], values["lora_dropout"]) == ("LORA", 4, 10, 0.25)
    assert sorted(values["target_modules"]) == sorted(TOY_LINEARS)
    assert values["rank_pattern"] == {
        r"^layers\.0\.attention\.wq": 3,
        r"^layers\.1\.attention\.wq": 3,
        r"^layers\.1\.w1": 7,
    }
    assert values["alpha_pattern"] == {r"^layers\.1\.attention\.wq": 0.3, r"^layers\.0\.w2": 5, r"^layers\.1\.w2": 5}


def test_paths_that_end_alike_are_told_apart(tmp_path):
    model = nn.ModuleDict({"w1": nn.Linear(4, 4), "block": nn.ModuleDict({"w1": nn.Linear(4, 4)})})
    shake(lora_fx.install(model, LoRAConfig(rank=2, target_modules="re:w1")))
    lora_fx.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "w1"
    other = nn.ModuleDict({"w1": nn.Linear(4, 4), "block": nn.ModuleDict({"w1": nn.Linear(4, 4)})})
    assert adapted(lora_fx.load_adapter(other, tmp_path)) == ["w1"]


def test_loading_into_installed_adapters_keeps_tensors_and_compiled_code(tmp_path):
    torch._dynamo.reset()
    model = shake(lora_fx.install(Mlp(16), LoRAConfig(rank=2, alpha=4.0)))
    source = shake(lora_fx.install(Mlp(16), LoRAConfig(rank=2, alpha=3.0, dropout=0.5)), seed=3)
    source.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k}, strict=False)
    lora_fx.save_adapter(source, tmp_path)
    backend = CompileCounterWithBackend("aot_eager")
    model.compile(backend=backend, fullgraph=True)
    x = torch.randn(5, 16)
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        assert not torch.allclose(model(x), source.eval()(x))
        lora_fx.load_adapter(model, tmp_path)
        torch.testing.assert_close(model(x), source(x))
    assert backend.frame_count == 1
    assert before == {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert model.up.lora_scale.item() == 1.5 and model.up.lora_dropout == 0.0


@pytest.mark.slow
def test_a_model_in_training_goes_on_with_a_loaded_adapter(tmp_path):
    """Through the rewrites and Inductor, forward and backward, with the optimizer that it had."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    source, plain, model = toy(seed=3, config=LoRAConfig(rank=4, alpha=3.0)), toy(), toy()
    lora_fx.save_adapter(source, tmp_path)
    lora_fx.compile(model, strict=True)
    optimizers = [torch.optim.AdamW(lora_fx.adapter_parameters(m), lr=1e-2) for m in (plain, model)]

    def step(m, optimizer):
        optimizer.zero_grad()
        loss = m(TOKENS).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    for m, optimizer in zip((plain, model), optimizers):
        step(m, optimizer)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 1
    for m in (plain, model):
        lora_fx.load_adapter(m, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS), source(TOKENS))
    for _ in range(2):
        losses = [step(m, optimizer) for m, optimizer in zip((plain, model), optimizers)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(lora_fx.adapter_parameters(model), lora_fx.adapter_parameters(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("file", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_dtypes(tmp_path, file, weights):
    model = toy()
    lora_fx.save_adapter(model.to(file), tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / TENSORS).values()} == {file}
    # Nothing is rounded where adapters are installed: they take the wider dtype.
    other = lora_fx.load_adapter(base().to(weights), tmp_path)
    assert other.output.lora_a.dtype == torch.promote_types(file, weights)
    assert torch.equal(other.output.lora_a, model.output.lora_a.to(other.output.lora_a.dtype))
    # Those that are there keep theirs.
    there = toy(seed=7).to(weights)
    lora_fx.load_adapter(there, tmp_path)
    assert there.output.lora_a.dtype == weights
    assert torch.equal(there.output.lora_a, model.output.lora_a.to(weights))


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    model = toy()
    with torch.no_grad():
        model.output.lora_b.fill_(1e6)
    lora_fx.save_adapter(model, tmp_path)
    other = toy(seed=5).half()
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"output: values of .* are too large for torch\.float16"):
        lora_fx.load_adapter(other, tmp_path)
    assert_same(before, snapshot(other))


@pytest.mark.parametrize("alpha", [0.0, -3.0, 1e-40])
def test_scales_that_no_configuration_here_gives(tmp_path, alpha):
    lora_fx.save_adapter(toy(), tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**values, "lora_alpha": alpha}))
    model = lora_fx.load_adapter(base(), tmp_path)
    assert model.output.lora_scale == torch.tensor(alpha / 4)
    lora_fx.save_adapter(model, tmp_path / "again")
    assert scales(lora_fx.load_adapter(base(), tmp_path / "again")) == scales(model)


def test_a_part_of_a_model_and_inference_mode(tmp_path):
    model = toy()
    lora_fx.save_adapter(model.layers["0"], tmp_path)
    assert f"{PREFIX}attention.wq.lora_A.weight" in load_file(tmp_path / TENSORS)
    block = Block(16)
    block.load_state_dict({k: v for k, v in model.layers["0"].state_dict().items() if "lora_" not in k})
    with torch.inference_mode():
        lora_fx.load_adapter(block, tmp_path)
    x = torch.randn(2, 3, 16)
    assert torch.equal(block(x), model.layers["0"](x))
    block(x).sum().backward()
    assert block.w1.lora_b.grad is not None


def test_several_dropouts_are_said_to_become_one(tmp_path):
    model = toy()
    model.output.lora_dropout = 0.5
    with pytest.warns(UserWarning, match=r"one dropout for all modules: wrote 0, the most frequent of 0, 0\.5"):
        lora_fx.save_adapter(model, tmp_path)


# ---- wrappers --------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """FSDP's name for what it wraps, without a process group."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args):
        return self._fsdp_wrapped_module(*args)


def wrapped(model, kind):
    if kind == "compiled":
        return torch.compile(model, backend="eager")
    if kind == "compiled blocks":
        for name, block in model.layers.items():
            model.layers[name] = torch.compile(block, backend="eager")
    elif kind == "checkpointed":
        apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, Block) or hasattr(m, "lora_a"))
    elif kind == "fsdp":
        for name, block in model.layers.items():
            model.layers[name] = Wrapper(block)
        return Wrapper(model)
    elif kind == "data parallel":
        return nn.DataParallel(model)
    return model


@pytest.mark.parametrize("kind", ["compiled", "compiled blocks", "checkpointed", "fsdp", "data parallel"])
def test_wrappers_do_not_get_into_paths(tmp_path, kind):
    expected, outer = toy(), wrapped(toy(), kind)
    lora_fx.save_adapter(expected, tmp_path / "plain")
    lora_fx.save_adapter(outer, tmp_path / "wrapped")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    other = wrapped(toy(seed=9), kind)
    assert lora_fx.load_adapter(other, tmp_path / "plain") is other
    assert torch.equal(other(TOKENS), expected(TOKENS))


@pytest.mark.parametrize("segment", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_files_with_wrappers_in_their_paths_are_read(tmp_path, segment):
    """As PEFT writes them for a model that was wrapped before it got its adapters."""
    model = toy(CONFIGS["patterns"])
    lora_fx.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors = {
        key.replace(PREFIX, f"{PREFIX}{segment}.").replace("attention.", f"attention.{segment}."): tensor
        for key, tensor in tensors.items()
    }
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
    values = json.loads((tmp_path / CONFIG).read_text())
    values["target_modules"] = [f"{segment}.{name}" for name in values["target_modules"]]
    values["alpha_pattern"] = {key.replace("^", rf"^{segment}\."): a for key, a in values["alpha_pattern"].items()}
    (tmp_path / CONFIG).write_text(json.dumps(values))
    assert torch.equal(lora_fx.load_adapter(base(), tmp_path)(TOKENS), model(TOKENS))
