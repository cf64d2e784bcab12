"""extras/table.py: what its cells say, what it pairs, and what it refuses."""
import json
import math

import pytest

from extras import table
from extras.tests.helpers import command, refused

ROW = dict(method="dpe", length=9, depth=0, trial=0, score=1, log_likelihood=[-0.5])
LOSS_ROW = dict(method="dpe", length=9, trial=0, start=0, block_losses=[2.0, 3.0])


def write_results(file, *rows, **conditions):
    """A file as needle.py or extras.loss writes it."""
    run = dict(checkpoint="tiny", haystack=None, seed=0)
    file.write_text(json.dumps({"results": rows, **run, **conditions}))
    return file


def printed_table(monkeypatch, capsys, *arguments):
    assert command(monkeypatch, *arguments, main=table.main) == 0
    return capsys.readouterr().out.splitlines()


def test_a_table_counts_needles_over_all_its_files(monkeypatch, capsys, tmp_path):
    files = []
    for name, score in (("a", 1.0), ("b", 0.25)):
        four = ROW | dict(length=4096, score=score, log_likelihood=[-1, -2] * 2)
        one = ROW | dict(method=name, length=8192, score=0.0, log_likelihood=[-9.0])
        files.append(write_results(tmp_path / name, four, one, seed=name))
    assert printed_table(monkeypatch, capsys, *files) == [
        "| | 4,096 | 8,192 |",
        "|---|---|---|",
        "| dpe | 0.62 (0.31-0.86), 8; -1.50 |  |",  # Wilson's interval
        "| a |  | 0.00 (0.00-0.79), 1; -9.00 |",
        "| b |  | 0.00 (0.00-0.79), 1; -9.00 |",
    ]


def test_differences_are_paired_by_prompt(monkeypatch, capsys, tmp_path):
    rows = []
    for trial, (first, second) in enumerate([(-1.0, -2.0), (-5.0, -5.5), (-9.0, -8.0)]):
        rows.append(ROW | dict(method="a", trial=trial, log_likelihood=[first]))
        rows.insert(0, ROW | dict(method="b", trial=trial, log_likelihood=[second]))
    rows.append(ROW | dict(method="a", trial=3, log_likelihood=[-99.0]))  # b was not asked this
    file = write_results(tmp_path / "results.json", *rows)
    out = printed_table(monkeypatch, capsys, file, "--reference", "a")
    assert out[-1] == "| b | -0.167, 1 of 3 |"  # -1, -0.5 and 1


def test_losses_are_averaged_and_paired_by_block(monkeypatch, capsys, tmp_path):
    other = LOSS_ROW | dict(method="rope", block_losses=[2.5, 3.25])
    files = [write_results(tmp_path / "a.json", LOSS_ROW, other, haystack="a.txt"),
             write_results(tmp_path / "b.json", LOSS_ROW, haystack="b.txt")]
    out = printed_table(monkeypatch, capsys, *files, "--reference", "rope")
    assert out[2:4] == ["| dpe | 2.500 |", "| rope | 2.875 |"]
    assert out[-1] == "| dpe | +0.375, 2 of 2 |"  # a lower loss is better


@pytest.mark.parametrize("count, cell", [(4, "+3.000 +- 1.414, 7 of 8"),
                                         (5, "+3.000 +- 0.000, 5 of 5")])
def test_five_stretches_are_paired_as_a_whole(count, cell, monkeypatch, capsys, tmp_path):
    rows = []
    for n in range(count):
        rows.append(LOSS_ROW | dict(start=n, block_losses=[2.0, 3.0]))
        rows.append(LOSS_ROW | dict(method="rope", start=n, block_losses=[2.0 + n, 9.0 - n]))
    file = write_results(tmp_path / "results.json", *rows)
    out = printed_table(monkeypatch, capsys, file, "--reference", "rope")
    assert out[-1] == f"| dpe | {cell} |"


@pytest.mark.parametrize("condition", ["checkpoint", "haystack", "seed", "needles"])
def test_prompts_of_other_conditions_are_not_paired(condition, monkeypatch, capsys, tmp_path):
    files = [write_results(tmp_path / "a.json", ROW, ROW | dict(trial=1)),
             write_results(tmp_path / "b.json", ROW, ROW | dict(trial=1), **{condition: "other"})]
    out = printed_table(monkeypatch, capsys, files[0], f"b={files[1]}", "--reference", "dpe")
    assert condition in out[-1]
    assert "of 2" not in out[-1]


def test_one_model_and_text_in_two_directories_are_paired(monkeypatch, capsys, tmp_path):
    here = dict(checkpoint="tiny", haystack="a.txt")
    there = dict(checkpoint="/models/tiny/", haystack="../texts/a.txt")
    better = [ROW | dict(trial=trial, log_likelihood=[-0.25]) for trial in (0, 1)]
    files = [write_results(tmp_path / "a.json", ROW, ROW | dict(trial=1), **here),
             write_results(tmp_path / "b.json", *better, **there)]
    out = printed_table(monkeypatch, capsys, files[0], f"by rule={files[1]}", "--reference", "dpe")
    assert out[-1] == "| dpe, by rule | +0.250, 2 of 2 |"


def test_a_files_own_name_may_contain_an_equals_sign(monkeypatch, capsys, tmp_path):
    file = write_results(tmp_path / "seed=1.json", ROW)
    assert printed_table(monkeypatch, capsys, file)[-1].startswith("| dpe | 1.00 ")


# -------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("second, sentence", [(ROW, "measured twice"), (LOSS_ROW, "b.json")])
def test_files_that_do_not_fit_are_refused(second, sentence, monkeypatch, capsys, tmp_path):
    files = [write_results(tmp_path / "a.json", ROW), write_results(tmp_path / "b.json", second)]
    assert command(monkeypatch, *files, main=table.main) == 2
    assert sentence in refused(capsys)


def test_an_unknown_reference_is_refused(monkeypatch, capsys, tmp_path):
    file = write_results(tmp_path / "a.json", ROW)
    assert command(monkeypatch, file, "--reference", "best", main=table.main) == 2
    assert "--reference best" in refused(capsys)


@pytest.mark.parametrize("content", [
    "{", "7", '{"16384": {}}', '{"results": [{"length": 9, "log_likelihood": [-0.5]}]}',
    json.dumps({"results": [ROW | dict(log_likelihood=[math.nan])]}),
    json.dumps({"results": [ROW | dict(log_likelihood=["x"])]})])
def test_damaged_and_foreign_files_are_refused(content, monkeypatch, capsys, tmp_path):
    (tmp_path / "other.json").write_text(content)
    assert command(monkeypatch, tmp_path / "other.json", main=table.main) == 2
    assert "other.json does not hold" in refused(capsys)
