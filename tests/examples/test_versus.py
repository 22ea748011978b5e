"""Two versions of the library in turns, as far as a CPU can tell: they run, and what is no version is refused."""

import json
import shutil
from pathlib import Path

import pytest
from benchmarks import versus

ROOT = Path(__file__).parents[2]
SMOKE = ["--smoke", "--device", "cpu", "--rounds", "2", "--window", "0.01"]


@pytest.mark.slow
def test_each_has_its_own_library(tmp_path, capsys):
    """The frozen block, this checkout and a copy of its library: a row of a table, and the seconds as JSON."""
    other = tmp_path / "other"
    shutil.copytree(ROOT / "lora_fx", other / "lora_fx", ignore=shutil.ignore_patterns("__pycache__"))
    versus.main([str(other), "--case", "m512", *SMOKE, "--json", str(tmp_path / "found.json")])
    header, _, row = capsys.readouterr().out.strip().splitlines()[-3:]
    assert header.split()[:3] == ["case", "frozen", "ms"] and row.split()[0] == "m512" and len(row.split()) == 6
    (case,) = json.loads((tmp_path / "found.json").read_text())["cases"]
    assert case["case"] == "m512" and list(case["seconds"]) == ["frozen", versus.HERE, versus.THERE]
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in case["seconds"].values())


def test_what_is_no_checkout_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        versus.main([str(tmp_path), *SMOKE])
    assert "it has no lora_fx/__init__.py" in capsys.readouterr().err


def test_a_version_that_fails_is_named(tmp_path, capfd):
    """Its error is on the terminal, and ours says whose it is."""
    (tmp_path / "lora_fx").mkdir()
    (tmp_path / "lora_fx" / "__init__.py").write_text("raise ImportError('a broken version')")
    with pytest.raises(SystemExit, match=rf"lora_fx of m512 in {tmp_path} ended with code 1: its error is above"):
        versus.main([str(tmp_path), "--case", "m512", *SMOKE])
    assert "a broken version" in capfd.readouterr().err
