"""extras/figures.py: what the pictures show, and what happens without matplotlib."""
import json
import re
import sys

import pytest
import torch

import needle
from extras import contributions, figures
from extras.tests.helpers import TINY, command, refused


@pytest.fixture
def plt(monkeypatch):
    """pyplot, which writes the text in an .svg as text."""
    plt = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setitem(plt.rcParams, "svg.fonttype", "none")
    return plt


def texts(file):
    """All text in an .svg."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text(encoding="utf-8"))


def row(method, length, depth, score):
    return dict(method=method, length=length, depth=depth, score=score, expected=["1"], trial=0,
                log_likelihood=[-1.0])


def loss_row(method, length, block_losses):
    return dict(method=method, length=length, start=0, block_losses=block_losses)


def test_heat_maps_show_the_mean_of_each_depth_and_length(plt, tmp_path):
    rows = [row("rope", 4096, 0.0, 1.0), row("rope", 4096, 0.0, 0.5), row("rope", 4096, 1.0, 0.25),
            row("dpe", 4096, 0.0, 0.125), row("dpe", 5000, 0.0, 0.375)]
    figures.heat_maps(rows, tmp_path / "maps.svg")
    shown = texts(tmp_path / "maps.svg")
    assert "rope" in shown and "dpe" in shown
    assert shown.count("4K") == shown.count("5000") == 2
    means = [text for text in shown if text in ("0.75", "0.25", "0.12", "0.38")]
    assert means == ["0.75", "0.25", "0.12", "0.38"]  # nothing where nothing was measured


def test_mean_scores_are_nan_where_nothing_was_measured():
    rows = [row("rope", 10, 0.0, 1.0), row("rope", 10, 0.0, 0.0), row("rope", 20, 1.0, 0.25)]
    (first, second), (third, fourth) = figures.mean_scores(rows, [0.0, 1.0], [10, 20])
    assert (first, fourth) == (0.5, 0.25)
    assert second != second and third != third


def detection_section(**changes):
    scores = [[[-0.1, 0.0], [-0.2, 0.1], [-9.0, 0.5]]] * 2
    return dict(length=400, candidates=[4, 2, 1], effective_lengths=[100, 200],
                scores=scores) | changes


def test_detection_shows_differences_from_the_best_of_each_group(plt, tmp_path):
    scores = [[[-0.5, 0.1], [-0.25, 0.0], [-9.0, 0.5]], [[-3.0, 0.0], [-4.0, 0.25], [-5.0, 1.0]]]
    for changes in ({}, {"alone": [200, 400]}):
        section = detection_section(scores=scores, **changes)
        figures.detection(section, tmp_path / "detection.svg")
        shown = texts(tmp_path / "detection.svg")
        for difference in ("-0.25", "-8.75", "-1.00", "-2.00"):
            assert difference in shown
        assert shown.count("0.00") == 2  # the best of each group
        assert "frames: dashed alone, solid together" in shown
        assert {"100", "200", "400"} <= set(shown)


def test_mapping_lengths_show_the_sigmoid_or_the_rule(plt, tmp_path):
    curve = {"64": [0.2, 0.01], "128": [0.1, 0.01], "256": [0.3, 0.01]}
    found = dict(curves={"256": curve, "512": curve, "1024": curve},
                 best_mapping_lens={"256": [120, 9], "512": [130, 9], "1024": [140, 9]})
    for settings, title in ((dict(a=0.01, b=-1.0, L=150.0), "the fitted sigmoid"),
                            (dict(a=0.01, b=-1.0, L=150.0, short=90, short_below=256),
                             "the fitted sigmoid")):
        figures.mapping_lengths(settings | found, tmp_path / "fit.svg")
        shown = texts(tmp_path / "fit.svg")
        assert any(text.startswith(title) for text in shown)
        assert "1,024 tokens" in shown and "1K" in shown


def test_losses_have_a_line_for_each_method(plt, tmp_path):
    rows = [loss_row("rope", 4096, [2.0, 3.0]), loss_row("rope", 16384, [7.0]),
            loss_row("dpe", 16384, [2.5])]
    figures.losses(rows, tmp_path / "losses.svg")
    shown = texts(tmp_path / "losses.svg")
    assert {"rope", "dpe", "4K", "16K"} <= set(shown)


def test_contributions_name_layers_and_key_dimensions(plt, tmp_path):
    of_layers = [torch.rand(3, 8) for _ in range(4)]
    contributions.draw(of_layers, 5, tmp_path / "contributions.svg")
    shown = texts(tmp_path / "contributions.svg")
    assert "key dimensions, the 5 largest (black)" in shown
    assert {"0", "1", "2", "3"} <= set(shown)


def test_the_script_draws_contributions_of_the_bundled_model(plt, monkeypatch, tmp_path):
    monkeypatch.setattr(needle, "mean_contributions",
                        lambda model, *_: [torch.rand(4, 16)] * model.config.n_layers)
    out = tmp_path / "contributions.png"
    assert command(monkeypatch, "--topk", 12, "--out", out, main=contributions.main) == 0
    assert out.read_bytes().startswith(b"\x89PNG")


def test_more_key_dimensions_than_frequencies_are_refused(monkeypatch, capsys):
    run = ["--topk", 17, "--out", "contributions.png"]
    assert command(monkeypatch, *run, main=contributions.main) == 2
    assert "--topk 17 is more than the 16 frequencies of a head" in refused(capsys)


def test_the_script_draws_all_five_pictures(plt, monkeypatch, tmp_path):
    measured = dict(seed=0, haystack=None)
    (tmp_path / "results.json").write_text(
        json.dumps({"results": [row("dpe", 4096, 0.5, 1.0)], **measured}))
    (tmp_path / "losses.json").write_text(
        json.dumps({"results": [loss_row("dpe", 4096, [1.0])], **measured}))
    run = ["--results", tmp_path / "results.json", "--losses", tmp_path / "losses.json",
           "--out", tmp_path / "new" / "pictures"]
    assert command(monkeypatch, *run, main=figures.main) == 0
    pictures = list((tmp_path / "new" / "pictures").iterdir())
    assert sorted(picture.name for picture in pictures) == [
        "detection.png", "heat_maps.png", "losses.png", "mapping_lengths.png", "positions.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_settings_without_measurements_have_no_picture(plt, monkeypatch, tmp_path):
    settings = {"dpe": {"window": 9, "effective_lengths": [64]}, "lampe": {"mapping_len": 64}}
    (tmp_path / "extrapolation.json").write_text(json.dumps(settings))
    run = ["--extrapolation", tmp_path / "extrapolation.json", "--out", tmp_path / "out"]
    assert command(monkeypatch, *run, main=figures.main) == 0
    assert [picture.name for picture in (tmp_path / "out").iterdir()] == ["positions.png"]


# -------------------------------------------------------------------------------------------------
# Refusals


def test_plot_without_matplotlib_is_refused_at_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    run = ["--ckpt", TINY, "--method", "rope", "--len", "100", "--depths", "1"]
    assert command(monkeypatch, *run, "--plot", tmp_path / "map.png") == 2
    assert refused(capsys) == "needle.py: pictures need matplotlib: pip install matplotlib"


def test_the_script_without_matplotlib_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert command(monkeypatch, "--out", tmp_path, main=figures.main) == 2
    assert refused(capsys) == "figures.py: pictures need matplotlib: pip install matplotlib"


def test_results_of_another_kind_are_refused(monkeypatch, capsys, tmp_path):
    (tmp_path / "other.json").write_text('{"results": 7}')
    run = ["--results", tmp_path / "other.json", "--out", tmp_path]
    assert command(monkeypatch, *run, main=figures.main) == 2
    assert "other.json is not a file that --json of needle.py" in refused(capsys)
