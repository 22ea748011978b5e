"""The round trip with PEFT, as the example prints it."""

import re

import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers")


def test_the_table_has_a_row_for_each_way_and_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    import peft_round_trip

    assert peft_round_trip.main(["--steps", "2"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 2 * len(peft_round_trip.ROWS) == 26
    for row in rows:
        moved, difference = re.split(r"\s+", row)[-2:]
        assert float(moved) > 1e-2 and float(difference) <= peft_round_trip.LIMIT
