"""Fine-tuning a model of transformers, as the example does it, at small size."""

import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hf_finetune
import lora_fx
from hf_models import KINDS


@pytest.mark.slow
def test_it_learns_saves_and_loads(tmp_path, capsys):
    """Compiled by Inductor, under the `Trainer`, with the model's own gradient checkpointing."""
    arguments = ["--steps", "6", "--layers", "1", "--batch", "4", "--length", "32", "--checkpointing", "--lr", "0.03"]
    assert hf_finetune.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "LoRA rewrite: 8 of 8 branches in 1 graph" in printed
    found = re.search(r"held-out loss (\S+) -> (\S+); adapter of \d+ KiB in ", printed)
    assert found and float(found[2]) < float(found[1]) - 0.5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    loaded = lora_fx.load_adapter(KINDS["llama"].sized(1).build(), tmp_path)
    assert len(lora_fx.adapter_parameters(loaded)) == 16


def test_windows_are_what_the_trainer_takes():
    tokens = torch.arange(24).view(2, 3, 4)
    windows = hf_finetune.windows(tokens)
    assert len(windows) == 6 and torch.equal(windows[4]["input_ids"], torch.tensor([16, 17, 18, 19]))
    assert torch.equal(windows[4]["labels"], windows[4]["input_ids"])


def test_only_models_that_write_text():
    assert "t5" not in hf_finetune.CAUSAL and "gpt2" in hf_finetune.CAUSAL
    with pytest.raises(SystemExit):
        hf_finetune.parse(["--model", "vit"])
