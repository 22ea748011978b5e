"""What the benchmarks measure with: forms that agree, saved bytes, errors, and the verdict."""

import dataclasses
import json

import pytest
import torch
from benchmarks import common, cpu
from torch import nn

import lora_fx


def plain(model: nn.Module, dropout: float = 0.0) -> common.Form:
    common.install_plain_lora(model, rank=2, alpha=4.0, dropout=dropout)
    common.randomise_adapters(model, torch.Generator().manual_seed(0))
    return common.Form("plain", model, compiled=False)


def batch(*shape: int, outputs: int = 1, dtype: torch.dtype = torch.float32) -> common.Batch:
    generator = torch.Generator().manual_seed(1)
    x, *upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(1 + outputs))
    return common.Batch(x.requires_grad_(), tuple(upstream))


def test_plain_lora_is_what_lora_fx_computes():
    ours = nn.Linear(8, 8)
    yardstick = nn.Linear(8, 8)
    yardstick.load_state_dict(ours.state_dict())
    form = plain(yardstick)
    lora_fx.install(ours, lora_fx.LoRAConfig(rank=2, alpha=4.0))
    with torch.no_grad():
        for name, adapter in yardstick.named_parameters():
            ours.get_parameter(name).copy_(adapter)
    theirs = common.Form("ours", ours, compiled=False)
    inputs = batch(4, 8)
    torch.testing.assert_close(theirs.forward(inputs.x), form.forward(inputs.x))
    assert common.gradient_error(common.gradients(theirs, inputs), common.gradients(form, inputs)) < 1e-6
    assert yardstick.get_parameter("lora_b").abs().min() > 0


def test_gradients_leave_nothing_behind():
    form, inputs = plain(nn.Linear(8, 8)), batch(4, 8)
    found = common.gradients(form, inputs)
    assert found.keys() == {"lora_a", "lora_b", "x"}
    assert inputs.x.grad is None and all(p.grad is None for p in form.model.parameters())


def test_the_error_is_of_the_worst_tensor():
    exact = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([10.0])}
    found = {"a": torch.tensor([1.0, -2.1]), "b": torch.tensor([10.1])}
    assert common.gradient_error(found, exact) == pytest.approx(0.05)
    with pytest.raises(ValueError, match=r"\['b'\] are in one of the two only"):
        common.gradient_error({"a": exact["a"]}, exact)


def test_saved_bytes_count_each_storage_once_and_no_parameters_or_input():
    inputs = batch(64, 8)
    assert common.saved_bytes(plain(nn.Linear(8, 8)), inputs.x) == 64 * 2 * 4  # h [M, R]
    assert common.saved_bytes(plain(nn.Linear(8, 8), dropout=0.5), inputs.x) >= (64 * 2 + 64 * 8) * 4  # and dropped x
    relu = common.Form("twice", nn.Sequential(nn.ReLU(), nn.Linear(8, 8)), compiled=False)
    assert common.saved_bytes(relu, inputs.x) == 64 * 8 * 4  # relu and the linear save one tensor


def test_every_form_is_timed_every_round_with_the_same_inputs():
    forms = [dataclasses.replace(plain(nn.Linear(8, 8)), name=name) for name in "abc"]
    drawn: list[int] = []

    def draw(number: int) -> common.Batch:
        drawn.append(number)
        return batch(4, 8)

    seconds = common.measure(forms, draw, 4, cpu.clock)
    assert drawn == [0, 1, 2, 3] and {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys("abc", 4)


def test_ratios_are_taken_within_rounds():
    ratio = common.Ratio.of([2.0, 20.0, 30.0], [1.0, 10.0, 10.0])
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 2.0, 3.0)
    assert common.Ratio.of([3.0], [2.0]) == common.Ratio(1.5, 1.5, 1.5)


def test_the_table_is_aligned():
    text = common.format_table([("case", "form", "ms"), ("a", "long name", "1.0"), ("bb", "x", "10.0")])
    assert text.splitlines() == [
        "case  form         ms",
        "---------------------",
        "a     long name   1.0",
        "bb    x          10.0",
    ]


def row(dtype: str, overhead: float) -> cpu.Row:
    return cpu.Row("mlp", dtype, cpu.OURS, 1.0, common.Ratio(1.1, 1.0, 1.2), overhead, 0, None)


def test_the_verdict():
    assert cpu.verdict([row("bf16", 0.65), row("fp32", 0.99)])[0]
    passed, text = cpu.verdict([row("bf16", 0.66), row("fp32", 1.01)])
    assert not passed and "mlp bf16: 0.66" in text and "mlp fp32: 1.01" in text


def test_results_are_json(tmp_path):
    path = tmp_path / "result.json"
    common.write_json(path, {"rows": [dataclasses.asdict(row("bf16", float("nan")))]})
    assert json.loads(path.read_text())["rows"][0]["overhead"] is None


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qkv", "block"])
def test_a_case_runs(case):
    rows = cpu.run_case(case, "fp32", cpu.Settings(tokens=256, dim=64, rank=4, rounds=2))
    assert [row.form for row in rows][-1] == cpu.OURS and rows[-1].overhead is not None
    assert all(row.error is None or row.error < 1e-5 for row in rows)
    by_form = {row.form: row for row in rows}
    # Each scale is a tensor of 4 bytes there, and a number in the plain form.
    assert by_form[cpu.OURS].saved_bytes <= by_form[cpu.PLAIN].saved_bytes + 64
