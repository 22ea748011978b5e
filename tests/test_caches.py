"""Inductor's and AOTAutograd's caches hold across processes, and their keys follow what the passes do."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_cache

import lora_fx
from lora_fx.passes import pipeline

PROGRAM = """
    import json, sys, torch
    from torch._dynamo.utils import counters
    import lora_fx
    from lora_fx.passes import pipeline

    runs, original = [], pipeline.rewrite_graph

    def recording(graph):
        report = original(graph)
        runs.append(sum(site.rewritten for site in report.sites))
        return report

    pipeline.rewrite_graph = recording
    torch.manual_seed(0)
    linears = [torch.nn.Linear(*sizes, bias="unbiased" not in sys.argv) for sizes in ((32, 64), (64, 32))]
    model = torch.nn.Sequential(linears[0], torch.nn.SiLU(), linears[1])
    lora_fx.install(model, lora_fx.LoRAConfig(rank=4, dropout=0.1))
    for name, parameter in lora_fx.named_adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    side = next((side for side in ("left", "right") if side in sys.argv), "")
    for module in model.modules() if "beside" in sys.argv or side else ():
        getattr(module, "note_memory", lambda *noted: None)(not side, side)
    if "backend" in sys.argv:
        function = torch.compile(model, backend="lora_fx")
    else:
        function = lora_fx.compile(model, strict="strict" in sys.argv)
    torch.manual_seed(1)
    y = function(torch.randn(8, 32))
    y.sum().backward()
    hits = {f"{name}_{what}": counters[group][f"{name}_cache_{what}"]
            for name, group in (("fxgraph", "inductor"), ("autograd", "aot_autograd"))
            for what in ("hit", "miss", "bypass")}
    gradient = sum(p.grad.double().abs().sum().item() for p in model.parameters() if p.grad is not None)
    print(json.dumps({"runs": runs, "y": y.double().sum().item(), "gradient": gradient, **hits}))
"""


def run(folder: Path, *arguments: str, source: Path | None = None, **environment: str) -> dict[str, Any]:
    """Run the program in a process with a cache folder, and with another copy of the package if given."""
    root = source or Path(__file__).parents[1]
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *arguments],
        env={
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(folder),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            # An empty cache has no record of the instructions that the compiler knows, and trying them out takes longer
            # than all else here. Kernels without vector instructions do.
            "TORCHINDUCTOR_VEC_ISA_OK": "0",
            "PYTHONPATH": str(root),
            **environment,
        },
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    result["log"] = finished.stderr
    return result


@pytest.mark.slow
def test_memory_that_is_laid_out_has_entries_of_its_own(tmp_path: Path) -> None:
    """The same graph, of a model whose weights and factors lie together, or have room on a side, is compiled anew.

    How a module says so is in the code that the caches go by.
    """
    for arguments in ((), ("beside",), ("right",), ("left",)):
        found = run(tmp_path / "cache", "backend", "unbiased", *arguments)
        assert found["autograd_hit"] == 0, arguments
        if arguments == ("beside",):  # weights that are only said to have room make the same graph
            assert found["fxgraph_miss"] > 0


@pytest.mark.slow
def test_a_second_process_hits_both_caches(tmp_path: Path) -> None:
    first, second = run(tmp_path / "cache"), run(tmp_path / "cache")
    assert first["runs"] == [2]
    assert first["autograd_miss"] == 1 and first["autograd_hit"] == first["autograd_bypass"] == 0
    assert second["runs"] == []  # on a hit no pass runs, which is why explain does not look here
    assert second["autograd_hit"] == 1 and second["autograd_miss"] == 0
    assert second["fxgraph_hit"] == 2 and second["fxgraph_miss"] == second["fxgraph_bypass"] == 0
    assert second["y"] == first["y"] and second["gradient"] == first["gradient"]


@pytest.mark.slow
def test_the_identity_follows_the_settings_and_the_source(tmp_path: Path) -> None:
    """Another strictness, the backend by name, or a pass of another text: each compiles anew."""
    cache = tmp_path / "cache"
    assert run(cache)["runs"] == [2]
    assert run(cache, "strict")["runs"] == [2]
    changed = tmp_path / "changed"
    root = Path(__file__).parents[1]
    shutil.copytree(root / "lora_fx", changed / "lora_fx", ignore=shutil.ignore_patterns("__pycache__"))
    assert run(cache, source=changed)["runs"] == []  # an equal copy in another place is the same
    with (changed / "lora_fx" / "passes" / "fold_scale.py").open("a") as file:
        file.write("\n# another text\n")
    assert run(cache, source=changed)["runs"] == [2]


def test_the_hash_covers_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "passes"
    shutil.copytree(Path(pipeline.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(pipeline, "__file__", str(folder / "pipeline.py"))
    compute = pipeline.source_hash.__wrapped__
    seen = {compute()}
    assert seen == {pipeline.source_hash()}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert {file.suffix for file in files} == {".py", ".cpp"}, "what else is compiled?"
    for file in files:
        file.write_bytes(file.read_bytes() + b"\n")
        seen.add(compute())
    (folder / "kernels" / "new.py").write_text("")
    seen.add(compute())
    assert len(seen) == 2 + len(files)


def test_stages_are_equal_by_what_they_do() -> None:
    first, second, strict = pipeline.hooks(), pipeline.hooks(), pipeline.hooks(strict=True)
    for name in pipeline.HOOKS:
        assert first[name] == second[name] and hash(first[name]) == hash(second[name])
        assert first[name].uuid() == second[name].uuid() != strict[name].uuid()
        assert first[name] != strict[name]
    assert len({first[name].uuid() for name in pipeline.HOOKS}) == len(pipeline.HOOKS)


@pytest.mark.parametrize("how", [pytest.param("told when compiled", marks=pytest.mark.slow), "found out"])
def test_code_that_writes_over_saved_values_is_kept_apart(how: str) -> None:
    """A graph that is retained is not served code for one that is not: Inductor's key has no word of it."""
    torch.manual_seed(0)
    module = lora_fx.install(torch.nn.Sequential(torch.nn.Linear(64, 64)), lora_fx.LoRAConfig(rank=8, alpha=8))
    for parameter in lora_fx.adapter_parameters(module):
        torch.nn.init.normal_(parameter)
    function = torch.compile(lambda x: module(x.sin()).sigmoid() * x.exp(), options=pipeline.hooks())
    x = torch.randn(64, 64, requires_grad=True)

    def gradients(retain: bool) -> list[torch.Tensor]:
        torch._dynamo.reset()
        with torch._functorch.config.patch(donated_buffer=not (retain and how == "told when compiled")):
            y = function(x)
        dy, leaves = torch.ones_like(y), [x, *lora_fx.adapter_parameters(module)]
        times = 2 if retain else 1
        return [g.clone() for _ in range(times) for g in torch.autograd.grad(y, leaves, dy, retain_graph=retain)]

    # What torch caches of a whole step, whose key has the setting, refuses to be retained where that is not set.
    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=how == "told when compiled"):
        once = gradients(retain=False)
        found = gradients(retain=True)
    assert all(torch.equal(a, b) for a, b in zip(once * 2, found, strict=True))


@pytest.mark.slow
def test_the_log_and_the_trace(tmp_path: Path) -> None:
    """``TORCH_LOGS="+lora_fx"`` shows every site; ``TORCH_TRACE`` gets the report for tlparse."""
    trace = tmp_path / "trace"
    log = run(tmp_path / "cache", TORCH_LOGS="+lora_fx", TORCH_TRACE=str(trace))["log"]
    assert "rewrote 2 of 2 LoRA branches" in log
    assert "lora_fx.scaled_mm" in log and "graph before" in log and "graph after" in log
    assert '"name": "lora_fx_report"' in "".join(file.read_text() for file in trace.iterdir())
    quiet = run(tmp_path / "other")["log"]
    assert "LoRA branches" not in quiet
