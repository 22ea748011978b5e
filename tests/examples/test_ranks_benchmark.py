"""`examples/benchmarks/ranks.py` without GPUs: its jobs, its tables, and that it runs."""

# mypy: no-check-untyped-defs

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import ranks
from benchmarks.meshes import MESHES, fits, job
from benchmarks.ranks import FORMS, Row, allowed, collective_table, difference, table

import options_3d


def row(form: str, milliseconds: float = 100.0, peak: int | None = 1000, **more: Any) -> Row:
    found: dict[str, Any] = {
        "low": 99.0, "high": 101.0, "adapter_bytes": 7, "built_seconds": 2.0, "first_seconds": 1.0,
        "losses": [3.0, 2.0], "norms": [], "collectives": {"all_reduce": 1}, "sites": [],
    }  # fmt: skip
    return Row(form=form, milliseconds=milliseconds, peak_bytes=peak, **(found | more))


@pytest.mark.parametrize(
    ("mesh", "model"),
    [(mesh, model) for mesh in MESHES for model in ("8B", "debug", "tiny", "mixtral") if fits(model, mesh)],
)
def test_jobs(mesh, model):
    """Each is one that `train_3d.py` takes, with as many tokens a rank on every mesh, which one GPU has one by one."""
    ours, alone = (options_3d.parse(job(mesh, model, 9, whole=whole)) for whole in (False, True))
    assert alone.degrees.world == 1 and (alone.batch, alone.length) == (ours.batch, ours.length)
    assert ours.lora is not None and ours.lora == alone.lora and "output" in ours.lora.exclude_modules
    assert ours.draw == alone.draw == "device" and ours.seed == alone.seed
    assert ours.batch * ours.length // ours.degrees.world == ours.batch * ours.length // alone.parts
    assert (ours.degrees.ep > 1) == ours.adapt_experts == alone.adapt_experts


def test_meshes_cover_what_is_needed():
    worlds = {mesh: options_3d.parse(job(mesh, "8B", 9)).degrees.world for mesh in MESHES}
    assert {"pp2-dp2-tp2", "pp2-dp2-cp2", "tp8", "dp8", "ep8"} <= {m for m, world in worlds.items() if world == 8}
    assert {"tp4", "dp4", "ep4", "dp2-tp2", "pp2-tp2", "dp2-cp2"} <= {m for m, world in worlds.items() if world == 4}
    assert {"tp2", "dp2", "cp2", "pp2", "ep2"} <= {m for m, world in worlds.items() if world == 2}


def test_tables():
    frozen, plain = row("frozen"), row("plain", 120.0, 1500)
    ours = row("lora_fx", 105.0, 1050, losses=[3.0, 1.75], sites=[(7, 7), (6, 7)], collectives={"all_reduce": 3})
    assert allowed(ours, frozen) == 1087 and allowed(ours, row("frozen", peak=None)) is None
    assert difference(ours, [row("lora_fx")]) == 0.25
    lines = table({"tp2": [frozen, plain, ours]}, {"tp2": [row("lora_fx")]}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["tp2"] * 3
    assert "1.200" in lines[3] and "1.050" in lines[4] and "13 of 14" in lines[4] and "2.5e-01" in lines[4]
    assert "2.5e-01" not in lines[2]
    (counts,) = collective_table({"tp2": [frozen, plain, ours]}).splitlines()[2:]
    assert counts.split() == ["tp2", "all_reduce", "1", "1", "3"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--steps", "4"], "--steps must be at least 5"),
        (["--mesh", "tp3"], "invalid choice: 'tp3'"),
        (["--mesh", "one"], "invalid choice: 'one'"),
        (["--model", "mixtral", "--mesh", "ep2", "tp2"], "--model mixtral is for ep2, ep4, ep2-tp2, ep8"),
    ],
)
def test_bad_arguments(arguments, text, capsys):
    with pytest.raises(SystemExit):
        ranks.parse(arguments)
    assert text in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_runs(tmp_path, capsys):
    file = tmp_path / "ranks.json"
    line = ["--model", "tiny", "--mesh", "tp2", "--device", "cpu", "--steps", "5", "--json", str(file)]
    with pytest.raises(SystemExit) as done:
        ranks.main(line)
    assert done.value.code == 0, capsys.readouterr().out
    document = json.loads(file.read_text())
    rows = {found["form"]: found for found in document["meshes"]["tp2"]}
    assert list(rows) == list(FORMS) and document["failed"] == {}
    assert rows["lora_fx"]["sites"] == [[7, 7]] * 2  # of a block of each rank
    assert rows["frozen"]["norms"] == [] and len(rows["lora_fx"]["norms"]) == 5
    theirs, alone = rows["lora_fx"]["losses"], document["one_gpu"]["tp2"]["losses"]
    assert theirs == pytest.approx(alone, abs=1e-5)
    assert theirs[0] != pytest.approx(rows["frozen"]["losses"][0], abs=1e-3)  # adapters add something from the start
    counts = {form: sum(found["collectives"].values()) for form, found in rows.items()}
    # What plain LoRA has more: the sum of gradients and that of their norm (the first block's input needs no gradient).
    # Over gloo every tensor of a reduce-scatter is one by itself: lora_fx sends h along with the two outputs of each of
    # two blocks, and g with three input gradients.
    assert 0 < counts["plain"] - counts["frozen"] <= 2 and counts["lora_fx"] - counts["plain"] == 4 + 3
    # Another run with the same jobs need not repeat the one on one GPU.
    ((whole, (row,)),) = ranks.earlier(file, "tiny").items()
    assert whole == " ".join(job("tp2", "tiny", 5, whole=True)) and row.losses == alone
    assert ranks.earlier(file, "debug") == {}


@pytest.mark.parametrize("text", ["", "{}", '{"one_gpu": {"tp2": {}}, "jobs": {}}'])
def test_a_reference_that_is_none(text, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"other[.]json is no result of this program"):
        ranks.main(["--model", "tiny", "--device", "cpu", "--reference", str(file)])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_mesh_that_takes_too_long(tmp_path, capsys):
    """It is said at once, the file says it, too, and no rank goes on."""
    file = tmp_path / "ranks.json"
    line = ["--model", "tiny", "--mesh", "dp2", "--device", "cpu", "--limit", "4", "--json", str(file)]
    before = ranks_alive()
    with pytest.raises(SystemExit) as done:
        ranks.main(line)
    assert done.value.code == "failed: dp2"
    assert "dp2 failed:\nnot done after 4 s" in capsys.readouterr().err
    document = json.loads(file.read_text())
    assert document["meshes"] == {} and list(document["failed"]) == ["dp2"]
    assert ranks_alive() <= before


def ranks_alive() -> set[int]:
    """The processes of the benchmark."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"benchmarks/ranks.py" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
    return found
