"""extras/table.py: intervals, and tables over several files."""
import json
import math
import statistics

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


ROW = dict(method="dpe", length=9, depth=0, trial=0, score=1, expected=["1"],
           log_likelihood=[-0.5])
LOSS_ROW = dict(method="dpe", length=9, start=0, block_losses=[2.0, 3.0])


def write_results(file, *rows, **conditions):
    """A file as needle.py or extras.loss writes it."""
    file.write_text(json.dumps({"results": rows, "seed": 0, "haystack": None} | conditions))
    return file


def printed_table(monkeypatch, capsys, *arguments):
    assert command(monkeypatch, *arguments, main=table.main) == 0
    return capsys.readouterr().out.splitlines()


def test_a_table_counts_needles_over_all_its_files(monkeypatch, capsys, tmp_path):
    files = []
    for name, score in (("a.json", 1.0), ("b.json", 0.25)):
        four = ROW | dict(length=4096, score=score, expected=["1"] * 4, log_likelihood=[-1, -2] * 2)
        one = ROW | dict(method=name, length=8192, score=0.0, log_likelihood=[-9.0])
        files.append(write_results(tmp_path / name, four, one, seed=name))
    assert printed_table(monkeypatch, capsys, *files) == [
        "| | 4,096 | 8,192 |",
        "|---|---|---|",
        "| dpe | 0.62 (0.31-0.86), 8; -1.50 |  |",
        "| a.json |  | 0.00 (0.00-0.79), 1; -9.00 |",
        "| b.json |  | 0.00 (0.00-0.79), 1; -9.00 |",
    ]


def test_differences_are_paired_by_prompt(monkeypatch, capsys, tmp_path):
    rows = []
    for trial, (first, second) in enumerate([(-1.0, -2.0), (-5.0, -5.5), (-9.0, -8.0)]):
        rows.append(ROW | dict(method="a", trial=trial, log_likelihood=[first]))
        rows.insert(0, ROW | dict(method="b", trial=trial, log_likelihood=[second]))
    rows.append(ROW | dict(method="a", trial=3, log_likelihood=[-99.0]))  # b was not asked this
    file = write_results(tmp_path / "results.json", *rows)
    out = printed_table(monkeypatch, capsys, file, "--reference", "a")
    # The differences are -1, -0.5 and 1.
    error = 2 * statistics.stdev([-1, -0.5, 1]) / math.sqrt(3)
    assert f"| b | -0.167 +- {error:.3f}, 1 of 3 |" in out
    assert out[-1] == "| a |  |"


def test_losses_are_averaged_and_paired_by_block(monkeypatch, capsys, tmp_path):
    other = LOSS_ROW | dict(method="rope", block_losses=[2.5, 3.25])
    files = [write_results(tmp_path / "a.json", LOSS_ROW, other, haystack="a.txt"),
             write_results(tmp_path / "b.json", LOSS_ROW, haystack="b.txt")]
    out = printed_table(monkeypatch, capsys, *files, "--reference", "rope")
    assert out[2:4] == ["| dpe | 2.500 |", "| rope | 2.875 |"]
    assert "| dpe | +0.375 +- 0.250, 2 of 2 |" in out  # a lower loss is better


def test_many_stretches_are_paired_as_a_whole(monkeypatch, capsys, tmp_path):
    rows = []
    for n in range(8):
        rows.append(LOSS_ROW | dict(start=n, block_losses=[2.0, 3.0]))
        rows.append(LOSS_ROW | dict(method="rope", start=n, block_losses=[2.0 + n, 9.0 - n]))
    file = write_results(tmp_path / "results.json", *rows)
    out = printed_table(monkeypatch, capsys, file, "--reference", "rope")
    assert "| dpe | +3.000 +- 0.000, 8 of 8 |" in out


@pytest.mark.parametrize("condition", ["checkpoint", "haystack", "seed", "needles", "chat"])
def test_prompts_of_other_conditions_are_not_paired(condition, monkeypatch, capsys, tmp_path):
    rows = [ROW | dict(trial=n) for n in range(3)]
    others = [row | dict(method="rope") for row in rows]
    files = [write_results(tmp_path / "a.json", *rows),
             write_results(tmp_path / "b.json", *others, **{condition: "other"})]
    out = printed_table(monkeypatch, capsys, *files, "--reference", "rope")
    assert out[-2] == "| dpe |  |"


def test_a_label_names_a_method_under_other_settings(monkeypatch, capsys, tmp_path):
    rows = [ROW | dict(trial=n) for n in range(3)]
    others = [row | dict(log_likelihood=[-2.5]) for row in rows]
    first = write_results(tmp_path / "a.json", *rows)
    second = write_results(tmp_path / "b.json", *others)
    out = printed_table(monkeypatch, capsys, first, f"by rule={second}", "--reference", "dpe")
    assert out[-1] == "| dpe, by rule | -2.000 +- 0.000, 0 of 3 |"


def test_a_files_own_name_may_contain_an_equals_sign(monkeypatch, capsys, tmp_path):
    file = write_results(tmp_path / "seed=1.json", ROW)
    assert printed_table(monkeypatch, capsys, file)[-1].startswith("| dpe | 1.00 ")


def test_one_method_under_two_settings_is_refused(monkeypatch, capsys, tmp_path):
    files = [write_results(tmp_path / name, ROW) for name in ("a.json", "b.json")]
    assert command(monkeypatch, *files, main=table.main) == 2
    assert "dpe was measured on the same 9 tokens more than once" in refused(capsys)


def test_no_rows_are_refused(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, write_results(tmp_path / "a.json"), main=table.main) == 2
    assert "the results are empty" in refused(capsys)


def test_needles_and_losses_do_not_mix(monkeypatch, capsys, tmp_path):
    files = [write_results(tmp_path / "a.json", ROW), write_results(tmp_path / "b.json", LOSS_ROW)]
    assert command(monkeypatch, *files, main=table.main) == 2
    assert "cannot be in one table" in refused(capsys)


def test_an_unknown_reference_is_refused(monkeypatch, capsys, tmp_path):
    file = write_results(tmp_path / "a.json", ROW)
    assert command(monkeypatch, file, "--reference", "best", main=table.main) == 2
    assert "--reference best is not in the results, which have dpe" in refused(capsys)


@pytest.mark.parametrize("results", [
    *([{key: value for key, value in ROW.items() if key != missing}] for missing in ROW),
    *([{key: value for key, value in LOSS_ROW.items() if key != missing}] for missing in LOSS_ROW),
    [ROW | {"length": "9"}], [ROW | {"expected": "1"}], [ROW | {"expected": []}],
    [ROW | {"log_likelihood": ["x"]}], [LOSS_ROW | {"block_losses": []}],
    [LOSS_ROW | {"block_losses": ["x"]}], [ROW, "row"], {"16384": {}}, None])
def test_rows_of_another_kind_are_refused(results, monkeypatch, capsys, tmp_path):
    content = {"results": results, "seed": 0, "haystack": None}
    (tmp_path / "other.json").write_text(json.dumps(content))
    assert command(monkeypatch, tmp_path / "other.json", main=table.main) == 2
    assert "other.json is not a file that --json of needle.py" in refused(capsys)


@pytest.mark.parametrize("content", ["", "[]", "7", '{"dpe": {}}', '{"results": [', b"\xff"])
def test_another_file_is_refused(content, monkeypatch, capsys, tmp_path):
    if isinstance(content, str):
        content = content.encode()
    (tmp_path / "other.json").write_bytes(content)
    assert command(monkeypatch, tmp_path / "other.json", main=table.main) == 2
    assert "other.json is not a file that --json of needle.py" in refused(capsys)


def test_a_missing_file_is_refused_by_its_name(monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, tmp_path / "absent.json", main=table.main) == 2
    assert "absent.json" in refused(capsys)
