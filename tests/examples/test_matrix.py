"""The matrix of models, dtypes, bases and checkpointing: one real row, and what is printed of any."""

import json
import re
from unittest import mock

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torchao")

import matrix
from matrix import Case, Row, cases, table


def only(model: str, base: str, dtype: str, checkpointing: str) -> list[str]:
    """The options that leave one row."""
    return ["--models", model, "--bases", base, "--dtypes", dtype, "--checkpointing", checkpointing]


def test_a_row_of_a_checkpointed_model(tmp_path, capsys):
    """The fast tier's only model that is traced: the others are in tests/test_transformers.py."""
    out = tmp_path / "rows.json"
    assert matrix.main([*only("llama", "plain", "float32", "on"), "--layers", "1", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text())
    assert (row["model"], row["base"], row["checkpointing"], row["sites"], row["rewritten"]) == (
        *("llama", "plain", True),
        *(8, 8),
    )
    assert row["good"] and not row["reasons"] and row["worst"].endswith(("lora_a", "lora_b"))
    assert 1e-8 < row["error_plain"] < 5e-6 and 1e-8 < row["error_ours"] < 5e-6
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("llama"))
    assert re.fullmatch(r"llama +plain +float32 +on +8 +8( +\d\.\de-0[67]){3}", line)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["nf4", "float8"])  # whose linears have a `config` of their own
def test_a_row_of_a_quantised_base(base):
    """The others are in tests/passes/test_quantised.py, under a smaller model."""
    row = matrix.row(Case("llama", "bfloat16", base, checkpointing=True), layers=1)
    assert row.good and row.rewritten == row.sites == 8, row


PLAIN = Case("vit", "float32", "plain", checkpointing=False)
GOOD = Row(PLAIN, 7, 6, {"head": "too small"}, error_plain=2e-7, error_ours=1e-7, apart=3e-7, worst="x")


def test_what_counts_as_good():
    assert GOOD.good and Row(PLAIN, error_plain=1e-2, error_ours=1.4e-2, apart=0.0).good
    assert not Row(PLAIN, error_plain=1e-2, error_ours=2e-2, apart=0.0).good
    assert not Row(PLAIN, error_plain=0.5, error_ours=0.5, apart=0.1).good
    assert Row(Case("vit", "bfloat16", "qat", checkpointing=False), error_plain=0.5, error_ours=0.5, apart=0.1).good
    assert not Row(PLAIN, failure="TypeError: no").good
    assert not Row(PLAIN).good


def test_the_table_says_why():
    worse = Row(Case("t5", "bfloat16", "int8", checkpointing=True), 3, 3, error_plain=0.1, error_ours=0.2, apart=0.2)
    failed = Row(Case("t5", "float32", "nf4", checkpointing=True), failure="TypeError: no")
    text = table([GOOD, GOOD, worse, failed])
    lines = text.splitlines()
    assert lines[4].split() == ["vit", "plain", "float32", "off", "7", "6", "2.0e-07", "1.0e-07", "3.0e-07"]
    assert lines[6].split() == ["t5", "int8", "bfloat16", "on", "3", "3", "1.0e-01", "2.0e-01", "2.0e-01", "worse"]
    assert lines[7].split() == ["t5", "nf4", "float32", "on", "failed"]
    assert "left as it was: vit: head: too small" in text
    assert "failed: t5 nf4 float32 checkpointing: TypeError: no" in text


def test_a_row_that_fails_is_a_row_and_the_program_fails(capsys):
    with mock.patch.object(matrix, "explained", side_effect=TypeError("no")):
        assert matrix.main(only("bert", "plain", "float32", "off")) == 1
    assert "failed: bert plain float32: TypeError: no" in capsys.readouterr().out


def test_which_rows():
    both = ["off", "on"]
    chosen = list(cases(["llama", "bert", "gpt2"], ["float32"], ["plain", "int8"], [True], full=False))
    assert [(c.model, c.base) for c in chosen] == [
        ("llama", "plain"),
        ("llama", "int8"),
        ("bert", "plain"),
        ("gpt2", "plain"),
    ]
    full = list(cases(["llama", "bert", "gpt2"], ["float32"], ["plain", "int8"], [True], full=True))
    assert [c for c in full if c not in chosen] == [Case("bert", "float32", "int8", True)]  # no Conv1D is quantised
    assert matrix.parse([]).checkpointing == both
    assert matrix.main(["--models", "bert", "--bases", "int8"]) == 1


def test_the_names_are_listed(capsys):
    assert matrix.main(["--list"]) == 0
    assert re.search(r"models: llama qwen2 .*\nbases:  plain int8", capsys.readouterr().out)
