"""extras/ablations.py: each variant changes what its name says, and nothing else."""
import json

import pytest
import torch

from extras import ablations
from extras.tests.helpers import TINY, command, refused, write_sentences
from rope_extrap import dpe, lampe, relative_positions

L, MAPPING_LEN, S1, S2 = 200, 60, 20, 12
ARGUMENTS = (L, MAPPING_LEN, S1, S2)


def distances(length):
    i = torch.arange(length)
    return i[:, None] - i


def times_attended(method, length):
    """How often the key at each distance is attended to."""
    d = torch.arange(length)
    return sum(band.contains(d).int() for band in method.bands)


def test_without_departures_the_released_lampe_is_the_formula():
    released = ablations.lampe_released(*ARGUMENTS)
    formula = lampe(*ARGUMENTS)
    assert torch.equal(relative_positions(released, L), relative_positions(formula, L))
    assert released.logit_scale == formula.logit_scale
    assert (times_attended(released, L) == 1).all()


def test_released_borders_are_attended_to_twice():
    times = times_attended(ablations.lampe_released(*ARGUMENTS, twice=True), L)
    assert (times == 2).nonzero().flatten().tolist() == [S1, L - S2]
    assert (times == 1).sum() == L - 2


def test_the_released_middle_begins_one_position_lower():
    rel = relative_positions(ablations.lampe_released(*ARGUMENTS, lower=True), L)
    difference = relative_positions(lampe(*ARGUMENTS), L) - rel
    d = distances(L)
    is_middle = (d > S1) & (d < L - S2)
    assert (difference[is_middle] == 1).all()
    assert (difference[~is_middle] == 0).all()


def test_the_released_slope_divides_by_one_less():
    rel = relative_positions(ablations.lampe_released(*ARGUMENTS, steeper=True), L)
    i, j = 150, 100
    p = [x * MAPPING_LEN // (L - 1) for x in (i, j, S1)]
    assert rel[i, j] == p[0] - p[1] + S1 - p[2]


def test_the_released_tail_extends_to_the_end_of_a_plateau():
    # p(x) = x * 60 // 200 is 3 from x = 10 to 13.
    bands = ablations.lampe_released(*ARGUMENTS, longer_tail=True).bands
    assert bands[-1].near == L - 13
    assert (times_attended(ablations.lampe_released(*ARGUMENTS, longer_tail=True), L) == 1).all()


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
    assert "4" in list(variants)[1]  # the geometric mean
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
    run = ["--haystack", text_file, "--method", method, "--set", by_hand, "--len", 600,
           "--last", 256, "--json", out]
    assert command(monkeypatch, "--ckpt", TINY, *run, main=ablations.main) == 0
    rows = json.loads(out.read_text())["results"]
    names = [row["method"] for row in rows]
    assert names[0] == method
    assert len(names) == len(set(names)) == n_variants + 1
    losses = {tuple(row["block_losses"]) for row in rows}
    assert len(losses) > 3  # some departures change little, and the tail nothing for most queries


def test_the_sigmoid_can_be_fixed_at_the_value_of_32768():
    sigmoid = dict(a=1e-4, b=-2.0, L=300.0)
    settings = dict(mapping_len=60, s1=20, s2=12)
    assert len(ablations.lampe_variants(L, settings, {})) == 7
    variants = ablations.lampe_variants(L, settings, sigmoid)
    fixed = variants["mapping length of 32,768 tokens, 234"]  # 300 / (1 + exp(-1.2768))
    assert fixed.bands[0].far is None  # 234 >= 200, so nothing is compressed


@pytest.mark.parametrize("methods", ["rope", "dpe,lampe"])
def test_other_methods_have_no_variants(methods, monkeypatch, capsys, text_file):
    run = ["--haystack", text_file, "--method", methods, "--len", 600, "--last", 256]
    assert command(monkeypatch, *run, main=ablations.main) == 2
    assert refused(capsys) == "needle.py: --method must be dpe or lampe"
