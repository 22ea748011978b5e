"""The README's Python runs, on small models, without kernels: Dynamo captures what `lora_fx.compile` would compile."""

# mypy: no-check-untyped-defs

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import lora_fx
from llama3 import CONFIGS, Llama
from lora_fx import LoRAConfig
from lora_fx.peft_files import TENSORS
from tests.distributed.simulated import fake_world
from tests.test_adapters import CONFIGS as NAMED
from tests.test_adapters import alone
from tests.toy_models import TOKENS, Toy, shake

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(autouse=True)
def fresh_dynamo(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def block(section: str) -> str:
    """The first Python of a section; of the text before all sections if it has no name."""
    text = README.split(f"## {section}\n")[1] if section else README
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


def run(code: str, **names: Any) -> dict[str, Any]:
    """The names that there are after `code`."""
    known = {"lora_fx": lora_fx, "torch": torch, "copy": copy, **names}
    exec(code, known)
    return known


def llama() -> nn.Module:
    torch.manual_seed(0)
    model = Llama(CONFIGS["tiny"])
    model.init_weights()
    return model


def test_first_lines(capsys):
    model: Any = Toy(dim=64)
    names = run(block(""), model=model, inputs=TOKENS)
    assert len(names["optimizer"].param_groups[0]["params"]) == 2 * 13
    assert "LoRA rewrite: " in capsys.readouterr().out


def test_use():
    code, compiled = block("Use"), 'lora_fx.compile(model, mode="max-autotune", dynamic=True)'
    assert compiled in code
    model: Any = llama()
    inputs = torch.randint(50, (2, 8))
    before, types = model(inputs), [type(module) for module in model.modules()]
    names = run(code.replace(compiled, "model.compile(backend='eager', dynamic=True)"), model=model, inputs=inputs)
    assert torch.equal(names["reference"], before)
    assert [type(module) for module in model.modules()] == types and not lora_fx.is_installed(model)


def test_routed_experts():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=4, **sizes)
    mixture = transformers.MixtralForCausalLM(config)
    run(block("Routed experts"), mixture=mixture)
    experts = mixture.model.layers[0].mlp.experts
    assert type(experts).__name__ == "LoRAMixtralExperts" and hasattr(experts, "gate_up_proj_lora_a")
    assert lora_fx.adapter_names(mixture) == ["default"]


def test_adapter_files():
    model, base = shake(lora_fx.install(llama())), llama()
    inputs = torch.randint(50, (2, 8))
    assert not torch.equal(model(inputs), base(inputs))
    run(block("Adapter files"), model=model, base=base)
    assert torch.equal(model(inputs), base(inputs))


def test_several_adapters():
    code = block("Several adapters")
    assert "lora_fx.compile(model)\n" in code
    model: Any = Toy()
    lora_fx.save_adapter(alone("de"), "adapter")
    code = code.replace("lora_fx.compile(model)", "model.compile(backend='eager')")
    names = run(code, model=model, config=NAMED["en"], inputs=TOKENS.repeat(2, 1))
    assert lora_fx.adapter_names(model) == ["en", "fr"] and (Path("english") / TENSORS).exists()
    assert not lora_fx.is_installed(names["export"])
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.distributed
def test_many_ranks():
    """As rank 0 of four; nothing is sent, so what comes out is not looked at."""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

    from parallel import Degrees, tensor_parallel_plan
    from train_3d import next_token_loss

    code = block("On many ranks")
    assert "lora_fx.compile(block)" in code
    code = code.replace("lora_fx.compile(block)", "block.compile(backend='eager')")
    with fake_world(4):
        mesh, model = Degrees(dp=2, tp=2).mesh(torch.device("cpu")), llama()
        given = {"parallelize_module": parallelize_module, "fully_shard": fully_shard, "mesh": mesh}
        names = run(code, model=model, config=LoRAConfig(rank=4), plan=tensor_parallel_plan(model), **given)
        assert all(isinstance(part, FSDPModule) for part in (model, *model.layers.values()))
        tokens = torch.randint(50, (2, 33))
        with loss_parallel():
            next_token_loss(model(tokens[:, :-1]), tokens[:, 1:]).backward()
        parameters = lora_fx.adapter_parameters(model)
        assert all(parameter.grad is not None for parameter in parameters)
        names["optimizer"].step()
        assert {id(p) for p in names["optimizer"].param_groups[0]["params"]} == {id(p) for p in parameters}


def test_variants():
    """Each is a configuration that can be installed; what it does is tested where it is written."""
    rows = re.findall(r"^\| `(LoRAConfig\(.*?\))`((?:, `\"\w+\"`)*) \|", README, re.MULTILINE)
    assert len(rows) == 5
    for first, others in rows:
        for other in ["", *re.findall(r'"\w+"', others)]:
            values = re.sub(r'init="\w+"', f"init={other}", first) if other else first
            config = eval(values, {"LoRAConfig": LoRAConfig})
            model: Any = lora_fx.install(Toy(dim=32), config)
            assert type(model.layers["0"].w1).__name__ == ("DoRALinear" if config.use_dora else "LoRALinear")
            assert model.layers["0"].w1.lora_init == config.init
