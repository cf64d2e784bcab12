"""extras/table.py: intervals, and tables over several files."""
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extras import table
from extras.tests.helpers import command, refused


@given(found=st.integers(0, 99), missed=st.integers(0, 99))
def test_bounds_are_196_standard_deviations_from_the_share(found, missed):
    n = found + missed + 1
    share = found / n
    low, high = table.wilson(found, n)
    assert 0 <= low <= share <= high <= 1
    for bound in (low, high):  # the standard deviation if the bound were the probability
        deviation = math.sqrt(bound * (1 - bound) / n)
        assert abs(share - bound) == pytest.approx(1.96 * deviation, abs=1e-9)


@given(found=st.integers(0, 99), missed=st.integers(0, 99))
def test_intervals_of_found_and_missed_are_mirrored(found, missed):
    n = found + missed + 1
    low, high = table.wilson(found, n)
    assert table.wilson(n - found, n) == pytest.approx((1 - high, 1 - low))


def test_a_table_counts_needles_over_all_its_files(monkeypatch, capsys, tmp_path):
    for name, score in (("a.json", 1.0), ("b.json", 0.25)):
        four = dict(method="dpe", length=4096, depth=0.5, score=score, expected=["1"] * 4)
        one = dict(method=name, length=8192, depth=0.5, score=0.0, expected=["1"])
        (tmp_path / name).write_text(json.dumps({"results": [four, one]}))
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    assert command(monkeypatch, *files, main=table.main) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| | 4,096 | 8,192 |",
        "|---|---|---|",
        "| dpe | 0.62 (0.31-0.86), 8 |  |",
        "| a.json |  | 0.00 (0.00-0.79), 1 |",
        "| b.json |  | 0.00 (0.00-0.79), 1 |",
    ]


ROW = dict(method="dpe", length=9, depth=0, score=1, expected=["1"])


@pytest.mark.parametrize("results", [
    *([{key: value for key, value in ROW.items() if key != missing}] for missing in ROW),
    [ROW | {"length": "9"}], [ROW | {"expected": "1"}], [ROW, "row"], {"16384": {}}, None])
def test_rows_of_another_kind_are_refused(results, monkeypatch, capsys, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"results": results}))
    assert command(monkeypatch, tmp_path / "other.json", main=table.main) == 2
    message = f"table.py: {tmp_path}/other.json is not a file that needle.py --json has written"
    assert refused(capsys) == message


@pytest.mark.parametrize("content", ["", "[]", "7", '{"dpe": {}}', '{"results": [', b"\xff"])
def test_another_file_is_refused(content, monkeypatch, capsys, tmp_path):
    if isinstance(content, str):
        content = content.encode()
    (tmp_path / "other.json").write_bytes(content)
    assert command(monkeypatch, tmp_path / "other.json", main=table.main) == 2
    assert "other.json is not a file that needle.py --json has written" in refused(capsys)


def test_a_missing_file_is_refused_by_its_name(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, tmp_path / "absent.json", main=table.main) == 2
    assert "absent.json" in refused(capsys)
