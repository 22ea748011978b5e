"""The GPU benchmarks as far as a CPU can tell: cases, forms that agree, float8, verdicts, tables, and that they run."""

import copy
import dataclasses
import json

import pytest
import torch
from benchmarks import block, chart, forms, model, runner, suite, timing
from benchmarks.cases import SUITE, Bar, Case
from benchmarks.common import Ratio
from benchmarks.forms import EAGER, FROZEN, OURS, PEFT, PLAIN

TOY = Case(dim=64, ffn=96, heads=4, kv_heads=2, tokens=48, length=16, rank=3)
CPU = timing.Device("cpu")


def values(form: forms.LoRAForm, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x, dy = runner.inputs(case, CPU, seed=3)
    upstream = None if dy is None else dy.to(dtype)
    return form.values(x.detach().to(dtype).requires_grad_(not case.no_grad), upstream)


def result(form: str, ratio: float, activation: float = 1.0, error: float = 0.01, compiled: float = 10.0):
    return runner.Result(form, 10 * ratio, Ratio(ratio, ratio, ratio), 100, activation, error, "y", compiled)


# ---- cases and command lines


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ([], (4, 2048, 4096)),
        (["--tokens", "16384"], (8, 2048, 4096)),
        (["--tokens", "512"], (1, 512, 4096)),
        (["--no-grad"], (4, 2048, 4096)),
        (["--tokens", "1", "--no-grad"], (1, 1, 4096)),
        (["--tokens", "64", "--no-grad", "--cuda-graphs"], (64, 1, 4096)),
        (["--tokens", "64", "--no-grad", "--length", "64"], (1, 64, 4096)),
    ],
)
def test_shapes(arguments, shape):
    assert block.parse(arguments).case.shape == shape


def test_options_reach_the_case():
    line = "--dim 64 --ffn 96 --heads 4 --kv-heads 2 --bias qkv --tokens 32 --length 16 --rank 3 --dropout 0.1 --fp8"
    case = Case(
        dim=64, ffn=96, heads=4, kv_heads=2, bias="qkv", tokens=32, length=16, rank=3, dropout=0.1, fp8=True,
        checkpoint=True, mode="reduce-overhead",
    )  # fmt: skip
    assert block.parse([*line.split(), "--checkpoint", "--mode", "reduce-overhead"]).case == case
    assert block.parse(["--bias"]).case.bias == "all"


def test_the_forms_that_run():
    assert block.parse([]).forms == {FROZEN, EAGER, PLAIN, PEFT, OURS}
    assert block.parse(["--max-autotune"]).forms == set(forms.LABELS)
    assert block.parse(["--forms", OURS]).forms == {FROZEN, OURS}
    assert block.parse(["--suite"]).forms == {FROZEN, PLAIN, OURS}
    assert forms.available({OURS, FROZEN, EAGER}) == ([FROZEN, EAGER, OURS], [])


def test_the_suite_is_chosen_by_name():
    everything = block.parse(["--suite"])
    assert everything.case is None and everything.cases == {name: case for name, (case, _) in SUITE.items()}
    some = block.parse(["--case", "decode-1", "fp8"])
    assert (
        some.case is None and list(some.cases) == ["fp8", "decode-1"] and some.cases["decode-1"].shape == (1, 1, 4096)
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--tokens", "3000"], "tokens 3000 must be a multiple of length 2048"),
        (["--rank", "0"], "rank must be positive"),
        (["--heads", "24"], "must be 24 heads"),
        (["--kv-heads", "3"], "3 key/value heads must divide"),
        (["--dropout", "1"], "dropout must be in"),
        (["--fp8", "--ffn", "1000"], "multiples of 16"),
        (["--experts", "1"], "at least 2"),
        (["--experts", "4", "--fp8"], "not in float8"),
        (["--cuda-graphs", "--mode", "reduce-overhead"], "choose one"),
        (["--no-grad", "--checkpoint"], "without a backward"),
        (["--case", "none"], "invalid choice"),
        (["--rounds", "0"], "must be positive"),
        (["--compiles", "0"], "must be positive"),
    ],
)
def test_refused_command_lines(arguments, text, capsys):
    with pytest.raises(SystemExit):
        block.parse(arguments)
    assert text in capsys.readouterr().err


def test_the_suite_has_the_bars_of_every_kind_of_case():
    kinds = [case for case, _ in SUITE.values()]
    assert {c.tokens for c in kinds} >= {1, 64, 512, 2048, 8192, 16384} and {c.rank for c in kinds} >= {16, 64, 128}
    assert any(c.checkpoint and c.dropout for c in kinds) and any(c.fp8 for c in kinds)
    assert any(c.bias == "qkv" for c in kinds) and any(c.bias == "all" for c in kinds)
    for name, (case, bar) in SUITE.items():
        assert 1 < bar.aim < bar.must and (bar.today is None or bar.must < bar.today), name
        toy = case.shrunk
        assert (toy.experts > 0) == (case.experts > 0), name
        same = ("bias", "dropout", "checkpoint", "fp8", "no_grad")
        assert all(getattr(toy, f) == getattr(case, f) for f in same) and toy.tokens <= 64 and not toy.cuda_graphs, name


def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match='"cuda" or "cpu"'):
        timing.Device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="there is no CUDA device"):
            block.main([])


# ---- forms


@pytest.mark.parametrize(
    "case",
    [
        TOY,
        dataclasses.replace(TOY, bias="all"),
        dataclasses.replace(TOY, bias="qkv", kv_heads=4, checkpoint=True),
        dataclasses.replace(TOY, no_grad=True, length=1, dropout=0.1),
    ],
    ids=["plain", "bias", "checkpoint", "decode"],
)
def test_all_forms_compute_the_same(case):
    torch.manual_seed(0)
    base = forms.Block(case)
    biases = {"none": 0, "qkv": 3, "all": 7}[case.bias]
    assert sum(name.endswith("bias") for name, _ in base.named_parameters()) == biases
    adapters = forms.random_adapters(base, case.rank, seed=1)
    x, dy = runner.inputs(case, CPU, seed=3)
    exact = forms.exact_values(base, adapters, x, dy)
    assert exact.keys() == ({"y"} if case.no_grad else {"y", "x", *adapters}) and len(adapters) == 14
    for name in (EAGER, OURS, *forms.available([PEFT])[0]):
        for dtype, limit in ((torch.bfloat16, 0.05), (torch.float64, 1e-6)):
            form = forms.build_form(
                name,
                copy.deepcopy(base).to(dtype),
                rank=case.rank,
                dropout=case.dropout,
                adapters=adapters,
                compiled=False,
            )
            assert forms.worst_error(values(form, case, dtype), exact)[1] < limit, (name, dtype)
            assert {p for p in form.model.parameters() if p.requires_grad} == set(form.adapters.values()), name


def test_all_forms_of_experts_compute_the_same():
    """In float64; all send the same tokens to the same experts, whatever their adapters are."""
    case = dataclasses.replace(TOY, experts=4)
    assert case.is_compared
    torch.manual_seed(0)
    base = forms.Block(case)
    adapters = forms.random_adapters(base, case.rank, seed=1)
    assert len(adapters) == 2 * (7 + 3) and not any("router" in name for name in adapters)
    found = {}
    for name in (PLAIN, OURS):
        exact_base = copy.deepcopy(base).double()
        form = forms.build_form(name, exact_base, rank=case.rank, adapters=adapters, compiled=False)
        found[name] = values(form, case, torch.float64)
        assert {p for p in form.model.parameters() if p.requires_grad} == set(form.adapters.values()), name
    exact = forms.exact_values(base, adapters, *runner.inputs(case, CPU, seed=3))
    assert all(forms.worst_error(each, exact)[1] < 1e-6 for each in found.values())


def test_the_exact_gradients_are_sums_over_chunks_of_sequences():
    case = dataclasses.replace(TOY, dim=16, ffn=16, heads=1, kv_heads=1, tokens=3 * 1024, length=1024)
    base = forms.Block(case)
    adapters = forms.random_adapters(base, case.rank, seed=1)
    x, dy = runner.inputs(case, CPU, seed=3)
    chunked = forms.exact_values(base, adapters, x, dy)  # two sequences, then one
    oracle = forms.build_form(EAGER, base, rank=case.rank, adapters=adapters)
    oracle.model.double()
    assert forms.worst_error(values(oracle, case, torch.float64), chunked)[1] < 1e-6


def test_a_form_copies_the_base_and_its_code():
    base = forms.Block(TOY)
    adapters = forms.random_adapters(base, TOY.rank, seed=1)
    assert adapters.keys() == forms.random_adapters(base, TOY.rank, seed=2).keys()
    first, second = (forms.build_form(EAGER, base, rank=TOY.rank, adapters=adapters) for _ in range(2))
    assert not forms.adapters_of(base) and type(base) is forms.Block
    models = (base, first.model, second.model)
    assert len({id(type(module).forward.__code__) for module in models}) == 3  # equal, and not the same
    with pytest.raises(ValueError, match=r"lora_a.* are in one of the two only"):
        forms.copy_adapters({}, first.adapters)


def test_the_error_is_that_of_the_worst_tensor():
    exact = {"y": torch.tensor([3.0, 4.0]), "x": torch.tensor([1.0, 0.0])}
    found = {"y": torch.tensor([3.0, 4.5]), "x": torch.tensor([1.0, 0.2])}
    worst, error = forms.worst_error(found, exact)
    assert worst == "x" and error == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"\['x'\] are in one of the two only"):
        forms.worst_error({"y": exact["y"]}, exact)


# ---- verdicts and tables


def test_verdicts():
    bar = Bar(1.13, 1.06, 1.04, activation_must=1.10, activation_aim=1.03)
    plain = result(PLAIN, 1.13, activation=1.9)
    assert suite.judge(bar, result(OURS, 1.04), plain) == suite.Verdict("aim", ())
    assert suite.judge(bar, result(OURS, 1.05), plain) == suite.Verdict("must", ())
    assert str(suite.judge(bar, result(OURS, 1.05), None)) == "pass (must)"
    assert suite.judge(bar, result(OURS, 1.07), plain).misses == ("time 1.070 > 1.06",)
    worst = suite.judge(bar, result(OURS, 1.2, activation=1.2, error=0.02, compiled=16), plain)
    assert len(worst.misses) == 5 and worst.time == "miss"
    assert "activation 1.20 > 1.10" in worst.misses and "slower than plain (1.130)" in worst.misses
    assert "compile 1.60x plain's > 1.5" in worst.misses and "error 2.0e-02 > plain's 1.0e-02" in worst.misses


def test_the_tables():
    found = [result(FROZEN, 1.0), result(PLAIN, 1.13, activation=1.9), result(OURS, 1.05, activation=1.05)]
    outcome = runner.Outcome(Case(), {r.form: r for r in found}, {PEFT: "RuntimeError: no"})
    lines = runner.case_table(outcome, CPU).splitlines()
    assert lines[0].split()[:2] == ["form", "worst"] and lines[-1] == f"{forms.LABELS[PEFT]} failed: RuntimeError: no"
    assert "1.050" in lines[4] and "saved MiB" in lines[0]
    report = suite.Report({"m8192": outcome}, {"fp8": "ValueError: x"}, ["r64"])
    rows = suite.suite_table(report).splitlines()[2:]
    assert rows[0].split()[:6] == ["m8192", "pass", "(must)", "10.000", "1.130", "1.050"]
    assert rows[1].split("  ")[0] == "fp8" and "failed: ValueError: x" in rows[1] and "time budget" in rows[2]
    entries = json.loads(json.dumps(report.as_list()))
    assert [e["name"] for e in entries] == ["m8192", "fp8", "r64"] and entries[0]["verdict"]["time"] == "must"
    assert entries[0]["case"] == dataclasses.asdict(Case()) and entries[1]["error"] == "ValueError: x"


def test_a_case_that_fails_does_not_end_the_suite(capsys):
    def no_cache(name: str) -> None:
        raise OSError(f"no room for {name}")

    saved: list[int] = []
    chosen = {name: SUITE[name][0].shrunk for name in ("m8192", "prefill")}
    settings = runner.Settings(rounds=1, window=0.001)
    report = suite.run_suite(chosen, suite.FORMS, settings, CPU, no_cache, 60.0, lambda r: saved.append(len(r.failed)))
    assert list(report.failed) == ["m8192", "prefill"] and saved == [1, 2] and not report.outcomes
    assert "no room for frozen" in capsys.readouterr().out


def test_a_form_is_compiled_from_empty_caches_every_time(monkeypatch):
    caches: list[str] = []
    seconds = iter([9.0, 3.0, 1.0, 2.0])

    def first_step(form, x, upstream, device):
        return form.values(x, upstream), next(seconds)

    monkeypatch.setattr(runner, "_first_step", first_step)
    settings = runner.Settings(rounds=1, window=0.001, compiles=3)
    with torch._dynamo.config.patch(disable=True):
        outcome = runner.run_case(TOY, [FROZEN, PLAIN], settings, CPU, caches.append)
    name = caches[-1]
    assert caches == [FROZEN, f"{name}-1", f"{name}-2", name] and name.startswith(f"{PLAIN}-")
    assert [outcome.results[form].compile_seconds for form in (FROZEN, PLAIN)] == [9.0, 2.0]


def test_the_charts(tmp_path):
    pytest.importorskip("matplotlib")
    one, many = tmp_path / "new" / "one.png", tmp_path / "many.svg"
    chart.draw_forms(one, "title", {"time": {"plain": 1.1, "lora_fx": 1.05}, "activation": {"plain": 1.9}})
    chart.draw_cases(many, "title", ["a", "b"], {"plain": [1.1, None], "lora_fx": [1.05, 0.99]})
    assert one.read_bytes().startswith(b"\x89PNG") and b"<svg" in many.read_bytes()


# ---- the whole model


def test_the_model_s_command_line(capsys):
    assert model.parse([]).forms == {FROZEN, PLAIN, PEFT, OURS} and model.parse(["--forms", OURS]).forms == {
        FROZEN,
        OURS,
    }
    assert model.configuration(model.parse([])).n_layers == 32
    assert model.configuration(model.parse(["--layers", "2"])).n_layers == 2
    for wrong in (["--batch", "0"], ["--steps", "1"], ["--length", "9000"], ["--dropout", "1"]):
        with pytest.raises(SystemExit):
            model.parse(wrong)
        assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_model_s_forms_compute_one_loss_and_one_gradient(checkpointed):
    line = "--device cpu --config tiny --length 16 --layers 3 --rank 2"
    options = model.parse([*line.split(), *(["--checkpoint"] if checkpointed else [])])
    tokens = torch.randint(256, (2, 17), generator=torch.Generator().manual_seed(0))
    found = {}
    for name in (EAGER, OURS, *forms.available([PEFT])[0]):
        trained = model.build(options).double()
        adapters = forms.random_adapters(trained.blocks, 2, seed=1)
        form = forms.build_form(
            name, trained.blocks, rank=2, adapters=adapters, compiled=False, parts=lambda m: list(m.children()),
            in_place=True,
        )  # fmt: skip
        assert len(form.adapters) == 2 * 7 * 3
        loss = trained(tokens)
        found[name] = {"loss": loss.detach()} | dict(
            zip(form.adapters, torch.autograd.grad(loss, list(form.adapters.values())))
        )
    exact = found.pop(EAGER)
    assert all(forms.worst_error(values, exact)[1] < 1e-5 for values in found.values())


# ---- compiled


@pytest.mark.slow
@pytest.mark.timeout(900)  # several compilations from empty caches
@pytest.mark.parametrize("arguments", ["--fp8", "--checkpoint --bias", "--no-grad --tokens 4", "--experts 4"])
def test_a_case_runs_compiled(arguments, tmp_path, capsys, request):
    """Through the command line, on a CPU: every number is there, and lora_fx is as exact as plain LoRA."""
    if "--fp8" in arguments:
        request.getfixturevalue("without_onednn")
    path = tmp_path / "case.json"
    line = f"--device cpu --smoke --rounds 2 --window 0.005 --forms plain lora_fx {arguments} --json {path}"
    block.main(line.split())
    document = json.loads(path.read_text())
    found = {entry["form"]: entry for entry in document["forms"]}
    assert list(found) == [FROZEN, PLAIN, OURS] and not document["failed"]
    assert found[FROZEN]["error"] is None and found[FROZEN]["ratio"]["median"] == 1
    assert 0 < found[OURS]["error"] < 1.25 * found[PLAIN]["error"]
    assert all(entry["compile_seconds"] > 0 and entry["milliseconds"] > 0 for entry in found.values())
    assert "no GPU times" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)  # several compilations from empty caches
def test_the_suite_keeps_to_its_budget(tmp_path, capsys):
    path = tmp_path / "suite.json"
    line = f"--device cpu --smoke --rounds 2 --window 0.005 --case prefill decode-64 --budget 0 --json {path}"
    block.main(line.split())
    first, second = json.loads(path.read_text())["cases"]
    assert first["name"] == "prefill" and first["verdict"]["time"] in ("aim", "must", "miss")
    assert second == {"name": "decode-64", "skipped": True}
    text = capsys.readouterr()
    assert "not run: time budget" in text.out and "--case decode-64" in text.err


@pytest.mark.slow
@pytest.mark.timeout(900)  # several compilations from empty caches
def test_the_blocks_of_the_model_share_one_graph(tmp_path):
    """More blocks than Dynamo's limit of graphs for one piece of code, which is an error in a benchmark."""
    path = tmp_path / "model.json"
    line = "--device cpu --config tiny --layers 10 --length 16 --rank 2 --steps 2 --forms plain lora_fx --once"
    model.main([*line.split(), "--json", str(path)])
    document = json.loads(path.read_text())
    assert not document["failed"] and [row["form"] for row in document["forms"]] == [FROZEN, PLAIN, OURS]
    losses = [row["loss"] for row in document["forms"]]
    assert losses[1] == pytest.approx(losses[2], abs=0.02)
    assert [row["trained"] > 0 for row in document["forms"]] == [False, True, True]
