"""extras/ablations.py: each variant changes what its name says, and nothing else."""
import argparse
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import needle
from extras import ablations
from extras.tests.helpers import TINY, command, random_llama, refused, write_sentences
from rope_extrap import dpe, lampe, relative_positions

settings.register_profile("here", deadline=None, max_examples=60)
settings.load_profile("here")

L, MAPPING_LEN, S1, S2 = 200, 60, 20, 12
ARGUMENTS = (L, MAPPING_LEN, S1, S2)


def distances(length):
    i = torch.arange(length)
    return i[:, None] - i


def times_attended(method, length):
    """How often the key at each distance is attended to."""
    d = torch.arange(length)
    return sum(band.contains(d).int() for band in method.bands)


def released(*departures):
    return ablations.lampe_released(*ARGUMENTS, 1.1, list(departures))


def is_middle():
    d = distances(L)
    return (d > S1) & (d < L - S2)


@given(st.integers(1, 200), st.integers(1, 250), st.integers(0, 60), st.integers(0, 60))
def test_without_departures_the_released_lampe_is_the_formula(length, mapping_len, s1, s2):
    if s1 + s2 == length - 1:
        return  # no distances for the middle, which is refused
    method = ablations.lampe_released(length, mapping_len, s1, s2, 1.1, [])
    formula = lampe(length, mapping_len, s1, s2, 1.1)
    expected = relative_positions(formula, length)
    assert torch.equal(relative_positions(method, length), expected)
    assert method.logit_scale == formula.logit_scale
    assert (times_attended(method, length) == 1).all()


def test_released_borders_are_attended_to_twice():
    times = times_attended(released("twice"), L)
    assert (times == 2).nonzero().flatten().tolist() == [S1, L - S2]
    assert (times == 1).sum() == L - 2


def test_the_released_middle_begins_one_position_lower():
    rel = relative_positions(released("lower"), L)
    difference = relative_positions(lampe(*ARGUMENTS), L) - rel
    assert (difference[is_middle()] == 1).all()
    assert (difference[~is_middle()] == 0).all()


def test_the_released_slope_divides_by_one_less():
    i = torch.arange(L)
    p = i * MAPPING_LEN // (L - 1)
    expected = p[:, None] - p + S1 - p[S1]
    rel = relative_positions(released("steeper"), L)
    assert torch.equal(rel[is_middle()], expected[is_middle()])
    formula = relative_positions(lampe(*ARGUMENTS), L)
    assert not torch.equal(rel[is_middle()], formula[is_middle()])


def test_the_released_tail_continues_from_the_end_of_a_plateau():
    # p(x) = x * 60 // 200 is 3 from x = 10 to 13.
    method = released("tail")
    assert method.bands[-1].near == L - 13
    assert (times_attended(method, L) == 1).all()
    # The last position of the middle, for key 0, is p(186) + 20 - p(20) = 55 + 20 - 6.
    rel = relative_positions(method, L)
    assert rel[186, 0] == 69
    assert rel[187, 0] == 70
    assert rel[199, 0] == 82


def test_a_tail_that_leaves_no_middle_is_refused():
    with pytest.raises(ValueError, match="leaves no middle in 100 tokens"):
        ablations.lampe_released(100, 1, 40, 20, 1.1, ["tail"])


def test_the_released_offset_of_dpe_is_not_rounded():
    w = 10
    i = torch.arange(30)[:, None]
    for scale, fraction in ((2, 0.0), (4, 0.5)):
        released = ablations.dpe_released(w, [scale]).bands[1]
        formula = dpe(w, scale).bands[1]
        assert (formula.q_pos(i) - released.q_pos(i) == fraction).all()
        assert torch.equal(formula.k_pos(i), released.k_pos(i))


def test_dpe_is_compared_with_reversed_and_equal_scales():
    variants = ablations.dpe_variants(4, dict(window=5, scales=[16, 4, 2, 2]))
    reversed_scales, equal_scales, _ = variants.values()
    for variant, scales in ((reversed_scales, [2, 2, 4, 16]), (equal_scales, 4)):
        expected = relative_positions(dpe(5, scales), 40)
        assert torch.equal(relative_positions(variant, 40), expected)


@pytest.fixture
def text_file(tmp_path):
    return write_sentences(tmp_path / "text.txt")


@pytest.mark.parametrize("method, by_hand, n_variants", [
    ("dpe", "window=64,scales=4-2", 6), ("lampe", "mapping_len=200,s1=40,s2=20", 7)])
def test_every_variant_is_measured_beside_the_method(method, by_hand, n_variants, monkeypatch,
                                                     text_file):
    out = text_file.with_name("out.json")
    run = ["--haystack", text_file, "--method", method, "--set", by_hand, "--len", "500,600",
           "--last", 256, "--json", out]
    assert command(monkeypatch, "--ckpt", TINY, *run, main=ablations.main) == 0
    rows = json.loads(out.read_text())["results"]
    names = [row["method"] for row in rows if row["length"] == 600]
    assert names[0] == method
    assert len(names) == len(set(names)) == n_variants + 1
    assert [row["method"] for row in rows if row["length"] == 500] == names


def test_variants_keep_the_settings_of_the_method(monkeypatch):
    measured = []

    def mean_contributions(*_):
        measured.append(1)
        return [torch.rand(4, 16)] * 2
    monkeypatch.setattr(needle, "mean_contributions", mean_contributions)
    model = random_llama()
    for name, by_hand in (("dpe", dict(topk=5, scales=[4, 2])), ("lampe", dict(logit_scale=1.5))):
        args = argparse.Namespace(methods=[name], lengths=[600], ckpt="nowhere", seed=0)
        chosen = {(600, name): needle.choose_settings(name, model.config, 600, {}, by_hand)}
        chosen = ablations.with_variants(args, model.config, chosen)
        layers = needle.methods_of_layers(args, model, None, "", chosen)
        for (_, variant), methods in layers.items():
            assert len(methods) == 2
            if name == "lampe":
                scale = 1.0 if variant == "logits not scaled" else 1.5
                assert methods[0].logit_scale == scale
            else:
                topk = int(variant.split()[0]) if variant[0].isdigit() else 5
                assert (methods[0].key_dims.sum(dim=1) == topk).all()
    assert len(measured) == 1  # by methods_of_layers, for all variants of DPE together


def test_the_sigmoid_can_be_fixed_at_the_value_of_32768():
    sigmoid = dict(a=1e-4, b=-2.0, L=300.0)
    chosen = dict(mapping_len=60, s1=20, s2=12, logit_scale=1.1)
    assert len(ablations.lampe_variants(L, chosen, {})) == 7
    variants = ablations.lampe_variants(L, chosen, sigmoid)
    fixed = variants["mapping length of 32,768 tokens"]  # 300 / (1 + exp(-1.2768)) = 234
    assert fixed.bands[0].far is None  # 234 >= 200, so nothing is compressed


@pytest.mark.parametrize("methods", ["rope", "dpe,lampe"])
def test_other_methods_have_no_variants(methods, monkeypatch, capsys, text_file):
    run = ["--haystack", text_file, "--method", methods, "--len", 600, "--last", 256]
    assert command(monkeypatch, *run, main=ablations.main) == 2
    assert refused(capsys) == "needle.py: --method must be dpe or lampe"
