"""extras/ablations.py: each variant changes what its name says, and nothing else."""
import argparse
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import needle
from extras import ablations
from extras.tests.helpers import command, random_llama, refused, write_sentences
from rope_extrap import dpe, lampe, relative_positions
from tiny.grammar import TINY


def lampe_released(*departures):
    return ablations.lampe_released(200, 60, 20, 12, departures)


@given(st.integers(1, 200), st.integers(1, 250), st.integers(0, 60), st.integers(0, 60))
def test_without_departures_the_released_lampe_is_the_formula(length, mapping_len, s1, s2):
    method = ablations.lampe_released(length, mapping_len, s1, s2, [])
    formula = lampe(length, mapping_len, s1, s2)
    rel = relative_positions(method, length)
    assert torch.equal(rel, relative_positions(formula, length))
    assert method.logit_scale == formula.logit_scale


@pytest.mark.parametrize("departure, expected", [
    ([], [20, 20, 67, 70, 70, 81]),  # p(x) = x * 60 // 200, and rel is d - 118 in the far region
    (["lower"], [20, 19, 66, 69, 70, 81]),
    (["steeper"], [20, 20, 68, 70, 70, 81]),  # 199 * 60 // 199 is 60, and p(199) is 59
    (["tail"], [20, 20, 67, 70, 71, 82])])  # p is 3 from 10 to 13, so the far region starts at 187
def test_released_departures_change_positions(departure, expected):
    rel = relative_positions(lampe_released(*departure), 200)
    queries = [20, 21, 199, 187, 188, 199]
    keys = [0, 0, 20, 0, 0, 0]
    assert rel[queries, keys].tolist() == expected


def test_released_borders_are_attended_to_twice():
    distances = [(band.near, band.far) for band in lampe_released("twice").bands]
    assert distances == [(0, 21), (20, 189), (188, None)]


def test_a_tail_that_leaves_no_middle_is_refused():
    with pytest.raises(ValueError, match="leaves no middle in 100 tokens"):
        ablations.lampe_released(100, 1, 40, 20, ["tail"])


def test_dpe_is_compared_with_reversed_and_equal_scales():
    variants = ablations.dpe_variants(4, 5, "16-4-2-2").values()
    found = [relative_positions(variant, 40) for variant in variants]
    assert torch.equal(found[0], relative_positions(dpe(5, [2, 2, 4, 16]), 40))
    assert torch.equal(found[1], relative_positions(dpe(5, 4), 40))


@pytest.mark.parametrize("method, by_hand, n_variants", [
    ("dpe", "window=64,scales=4-2", 6), ("lampe", "mapping_len=200,s1=40,s2=20", 7)])
def test_every_variant_is_measured_beside_the_method(method, by_hand, n_variants, monkeypatch,
                                                     tmp_path):
    out = tmp_path / "out.json"
    run = ["--ckpt", TINY, "--haystack", write_sentences(tmp_path / "text.txt"), "--method", method,
           "--set", by_hand, "--len", "500,600", "--last", 256, "--json", out]
    assert command(monkeypatch, *run, main=ablations.main) == 0
    rows = json.loads(out.read_text())["results"]
    names = [row["method"] for row in rows if row["length"] == 600]
    assert (names[0], len(names), len(set(names))) == (method, n_variants + 1, n_variants + 1)
    assert [row["method"] for row in rows if row["length"] == 500] == names


@pytest.mark.parametrize("name, by_hand", [
    ("dpe", [("topk", 5), ("scales", "4-2"), ("logit_scale", 1.5)]),
    ("lampe", [("logit_scale", 1.5)])])
def test_variants_keep_the_settings_of_the_method(name, by_hand):
    args = argparse.Namespace(method=name, set=by_hand, lengths=[600], ckpt="nowhere")
    config = random_llama().config
    chosen = needle.choose_all(args, config)
    ablations.add_variants(args, config, chosen)
    for variant, (settings, _, method) in chosen[600].items():
        topk = int(variant.split()[0]) if variant[0].isdigit() else 5
        logit_scales = {"logits not scaled": 1.0, "logits scaled as by LaMPE": 1.1434}
        assert method.logit_scale == pytest.approx(logit_scales.get(variant, 1.5), abs=1e-4)
        assert name == "lampe" or settings["topk"] == topk


@pytest.mark.parametrize("name, mapping_len, s2", [
    ("no tail", 60, 0), ("mapping length of 32,768 tokens", 90, 12)])
def test_lampe_is_compared_without_its_parts(name, mapping_len, s2):
    variant = ablations.lampe_variants(200, 90, 60, 20, 12)[name]
    expected = relative_positions(lampe(200, mapping_len, 20, s2), 200)
    assert torch.equal(relative_positions(variant, 200), expected)


def test_other_methods_have_no_variants(monkeypatch, capsys):
    assert command(monkeypatch, "--method", "dpe,lampe", main=ablations.main) == 2
    assert "dpe or lampe" in refused(capsys)
