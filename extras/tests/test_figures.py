"""extras/figures.py: which pictures it draws, and what it refuses."""
import json
import sys

import pytest

from extras import figures
from extras.table import read_results
from extras.tests.helpers import command, refused, write_sentences
from tiny.grammar import TINY

NEEDLES = TINY.parent / "extras/results/needles.json"
LOSSES = TINY.parent / "extras/results/losses_code.json"


def test_all_pictures_are_drawn(monkeypatch, tmp_path):
    text = write_sentences(tmp_path / "text.txt")
    out = tmp_path / "new" / "pictures"
    run = ["--results", NEEDLES, f"again={NEEDLES}", "--losses", LOSSES,
           "--contributions", TINY, "--haystack", text, "--out", out]
    assert command(monkeypatch, *run, main=figures.main) == 0
    assert sorted(picture.name for picture in out.iterdir()) == [
        "clocks.png", "contributions.png", "detection.png", "heat_maps.png", "idea.gif",
        "idea.png", "losses.png", "mapping_lengths.png"]
    for picture in out.iterdir():
        assert picture.read_bytes().startswith((b"\x89PNG", b"GIF89a"))


def test_a_picture_shows_its_data(tmp_path):
    rows = read_results([str(NEEDLES)]).query("method == 'dpe'")
    pictures = []
    for shown in (rows, rows, rows.assign(score=0.0)):
        figures.heat_maps(shown, 8192, tmp_path / "heat_maps.png")
        pictures.append((tmp_path / "heat_maps.png").read_bytes())
    first, again, other = pictures
    assert first == again != other


# -------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("options", [("--results", LOSSES), ("--losses", NEEDLES),
                                     ("--extrapolation", LOSSES)])
def test_files_of_another_kind_are_refused(options, monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, *options, "--out", tmp_path, main=figures.main) == 2
    assert str(options[1]) in refused(capsys)


def test_settings_that_were_not_measured_are_refused(monkeypatch, capsys, tmp_path):
    file = tmp_path / "extrapolation.json"
    file.write_text(json.dumps({"dpe": {"settings": {"window": 9, "effective_lengths": [64]}}}))
    run = ["--extrapolation", file, "--out", tmp_path]
    assert command(monkeypatch, *run, main=figures.main) == 2
    assert str(file) in refused(capsys)


def test_a_missing_package_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert command(monkeypatch, "--out", tmp_path, main=figures.main) == 2
    assert "pip install matplotlib" in refused(capsys)
