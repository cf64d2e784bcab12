"""The papers' procedures: what is measured, what is chosen, and the file that is written."""
import argparse
import functools
import json
import math
import random
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import needle
import rope_extrap as rx
from extras import calibrate
from extras.common import block_losses, draw_stretches
from extras.tests.helpers import command, random_llama, refused, write_sentences
from load_llama import load_model, load_tokenizer
from tiny.grammar import TINY


@pytest.fixture(scope="module")
def bundled():
    """The bundled model and its tokenizer."""
    return load_model(TINY), load_tokenizer(TINY)


def options(trials=2, needles=2, seed=3):
    return argparse.Namespace(trials=trials, needles=needles, seed=seed)


def normal(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64)


# -------------------------------------------------------------------------------------------------
# Measuring


def lampe_losses(bundled, text):
    model, tokenizer = bundled
    by_length = calibrate.measure_lampe(options(), model, tokenizer, text, [600], [9, 15],
                                        dict(mapping_len=1, s1=3, s2=2))
    return by_length[600]


def test_every_question_is_asked_alone_after_its_prompt(bundled):
    model, tokenizer = bundled
    methods = [rx.lampe(600, 15, 3, 2)] * 2  # so coarse that the answers are wrong
    prompts = calibrate.draw_prompts(options(), tokenizer, 600, 2, None)
    losses = []
    for prompt, questions in prompts:
        for question, answer in questions:
            tokens = torch.tensor([prompt + question + answer])
            logits = model(tokens, methods)[0, -len(answer) - 1:-1]
            losses.append(F.cross_entropy(logits, torch.tensor(answer), reduction="none"))
    torch.testing.assert_close(calibrate.ask(model, methods, prompts).float(),
                               torch.stack([-loss.sum() for loss in losses]), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(lampe_losses(bundled, None)[1].float(),
                               torch.stack([loss.mean() for loss in losses]))


def test_prompts_have_needles_at_the_start_and_at_other_depths(bundled):
    _, tokenizer = bundled
    prompts = calibrate.draw_prompts(options(), tokenizer, 1000, 4, None)
    texts = [(tokenizer.decode(prompt), tokenizer.decode(question).strip())
             for prompt, questions in prompts for question, _ in questions]
    depths = [prompt.index(question) / len(prompt) for prompt, question in texts]
    assert sorted(depths) == pytest.approx([0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75], abs=0.05)


def test_lampe_reads_the_ends_of_stretches_of_a_text(bundled, tmp_path):
    model, tokenizer = bundled
    text = write_sentences(tmp_path / "text.txt").read_text()
    tokens = tokenizer.encode(text)
    methods = [rx.lampe(600, 15, 3, 2)] * 2
    stretches = draw_stretches(tokenizer, tokens, 600, 2, last=300)
    expected = [block_losses(model, methods, stretch, 300) for stretch in stretches.values()]
    assert torch.equal(lampe_losses(bundled, text)[1], torch.cat(expected))


@pytest.mark.parametrize("lower_by, expected", [
    ([0.02] * 50, False),  # every answer is less likely
    ([0.0, 0.04] * 25, False),  # 0.02 on average, and the standard error is 0.003
    ([0.12, -0.08] * 25, True),  # 0.02 on average, and the standard error is 0.014
    ([0.009] * 50, True),  # significant, and too small to matter
    ([0.0, 0.0, 0.0, 10.0], False),  # one of four needles is lost: 2.5 with a standard error of 2.5
    ([-1.0] * 50, True)])
def test_not_worse_is_within_two_standard_errors_and_half_a_nat(lower_by, expected):
    best = normal(len(lower_by))
    assert calibrate.not_worse(best - torch.tensor(lower_by), best) == expected


# -------------------------------------------------------------------------------------------------
# DPE, step (a)


@pytest.mark.parametrize("length, train_len, candidates, background", [
    (70, 256, [1, 2], 1),  # shorter than the training length
    (1024, 256, [1, 2, 4, 8, 16, 32], 8),
    (20, 256, [1], 1),
    (1024, 4, [2 ** n for n in range(11)], 512),
    (131072, 8192, [1, 2, 4, 8, 16, 32, 64, 128], 32)])  # the paper's
def test_scales_to_try_fit_any_length(length, train_len, candidates, background):
    assert calibrate.scales_to_try(length, train_len) == (candidates, background)


CANDIDATES = [1, 2, 4, 8, 16, 32, 64, 128]


@given(st.lists(st.sampled_from(CANDIDATES), min_size=1, max_size=10), st.sampled_from([4, 32]))
def test_detection_finds_planted_scales(planted, background):
    def score(scales):
        # Every group loses much below its planted scale, and a little above it.
        steps = [math.log2(scale / best) for scale, best in zip(scales, planted, strict=True)]
        lost = sum(max(-n, 0.1 * n) for n in steps)
        return 1e-3 * normal(40, seed=hash(tuple(scales)) % 1000).view(4, 10) - lost

    alone, _, table = calibrate.detect(score, len(planted), CANDIDATES, background)
    assert alone == planted
    assert [len(row) for row in table] == [8] * len(planted)


@pytest.mark.parametrize("means, noise, expected", [
    ([0.0, 0.0, 0.0], 1e-3, 1),
    ([-0.02, -0.02, 0.0, 0.0], 1e-3, 4),
    ([-0.005, -0.01], 0, 1),
    ([0.004, 0.011, 0.02], 0, 2),  # 0.016 less is worse, 0.009 is not
    ([0.0, -1.0, 0.0, 0.001], 0, 4)])  # the first scale that fails ends the search
def test_detection_takes_the_smallest_scale_within_noise(means, noise, expected):
    def score(scales):
        # The difficulty of a question is the same for all candidates.
        scores = normal(40) + means[CANDIDATES.index(scales[0])] + noise * normal(40, scales[0])
        return scores[None]

    alone, _, _ = calibrate.detect(score, 1, CANDIDATES[:len(means)], background=2)
    assert alone == [expected]


@pytest.mark.parametrize("lost, expected", [
    ([[0, 0, 0], [0, 0, 0]], 1),
    ([[1, 0, 0], [0, 0.005, 0]], 2),  # the scale 1 loses a depth
    ([[0, 9, 0.5], [0.6, 0, 0.5]], 4),  # 1 has the best mean, and 4 is within noise at each depth
    ([[9, 1, 0], [0, 3, 9]], 2)])  # each scale loses a depth: the least loss
def test_detection_takes_no_scale_that_loses_a_depth(lost, expected):
    """lost has a row for each depth, with the loss of each of the scales 1, 2 and 4."""
    def score(scales):
        noise = torch.tensor([3.0, -3.0] * 10) * (scales == [4])
        return noise - torch.tensor(lost, dtype=torch.float64)[:, CANDIDATES.index(scales[0]), None]

    alone, _, _ = calibrate.detect(score, 1, [1, 2, 4], background=2)
    assert alone == [expected]


def test_noise_is_told_from_an_effect():
    noise = [torch.stack([normal(32, 100 * seed + n) for n in range(8)]) for seed in range(40)]
    assert sum(calibrate.none_is_worse(rows) for rows in noise) >= 36
    assert not any(calibrate.none_is_worse(rows - 2 * torch.eye(8)[:, :1]) for rows in noise)


def test_scales_that_lose_a_depth_together_are_doubled():
    def score(scales):
        at_start = -9.0 if sum(scale < 8 for scale in scales) > 1 else 0.0
        return torch.stack([torch.full((10,), at_start), torch.full((10,), 5.0)])

    assert calibrate.detect(score, 3, [1, 2, 4, 8], background=8)[1] == [8, 8, 8]


def test_scales_above_the_background_that_fail_together_are_halved():
    def score(scales):
        halvings = sum(math.log2(max(scale, 4) / 4) for scale in scales)
        return torch.full((1, 10), 0.1 * halvings - 20 * (halvings > 4))

    alone, together, _ = calibrate.detect(score, 4, [1, 2, 4, 8, 16], background=4)
    assert alone == [16] * 4
    assert together == [8] * 4


@pytest.mark.parametrize("tolerated, first, others", [
    (21, 32, 1), (20, 16, 2), (13, 8, 4), (6, 8, 8)])
def test_scales_that_fail_together_move_to_the_background_until_they_work(tolerated, first, others):
    def score(scales):
        # Group 0 is best at a scale of 32. Each of 7 other groups may have a scale of 1, which is 3
        # doublings below the background. Together they may have only so many doublings less.
        doublings = sum(math.log2(8 / min(scale, 8)) for scale in scales[1:])
        return torch.full((1, 10), 0.1 * math.log2(scales[0]) - (doublings > tolerated))

    alone, together, _ = calibrate.detect(score, 8, CANDIDATES[:6], background=8)
    assert alone == [32] + [1] * 7
    assert together == [first] + [others] * 7


def test_detection_finds_planted_effective_lengths_in_attention():
    """One head of 16 frequencies 2^-f finds a needle among fillers by its content.

    At relative position rel, the logit of a needle is the sum of 12 cos(2^-f rel) over some f.
    """
    window = 16
    matching = [7, 9, 11, 13]  # a match in frequency f is one up to a quarter of its wavelength

    # A needle must have a larger logit than all fillers together, and has one as long as three
    # frequencies match at a scale of 64 and the fourth one matches at all.
    frequencies = 2.0 ** -torch.arange(16, dtype=torch.float64)
    others = (12 * torch.cos(frequencies[matching[1:]] * (window + 4096 / 64))).sum()
    q = torch.zeros(16, 1, 1, 32)  # one query at the end of each of 16 texts
    q[..., ::2] = math.sqrt(32)
    k = torch.zeros(16, 1, 4096, 32)
    k[..., 30] = others - math.log(4096)  # in the slowest frequency, which hardly rotates
    v = torch.zeros(16, 1, 4096, 32)
    for text, place in enumerate(range(0, 2048, 128)):
        k[text, 0, place, ::2] = torch.tensor([12.0 * (f in matching) for f in range(16)])
        v[text, 0, place, 0] = 1

    @functools.cache
    def log_likelihoods(*scales):
        method = rx.dpe(window, [scale for scale in scales for _ in range(2)])
        attention_to_needle = rx.attend(q, k, v, method, frequencies)[:, 0, 0, 0]
        return F.logsigmoid(38 * attention_to_needle - 2)

    def score(scales):
        return log_likelihoods(*scales).view(4, 4)

    alone, _, _ = calibrate.detect(score, 8, CANDIDATES, background=64)
    for f, scale in zip(range(1, 16, 2), alone, strict=True):
        quarter_wavelength = math.pi / 2 * 2 ** f if f in matching else math.inf
        assert scale == min(s for s in CANDIDATES if window + 4096 / s < quarter_wavelength)


# -------------------------------------------------------------------------------------------------
# LaMPE's fit


def sigmoid(l, a, b, L):
    return L / (1 + math.exp(-(a * l + b)))


@pytest.mark.parametrize("name", [name for name in rx.PUBLISHED if "lampe" in rx.PUBLISHED[name]])
def test_seven_points_recover_a_published_sigmoid(name):
    published = rx.PUBLISHED[name]["lampe"]["sigmoid"]
    curve = [published[key] for key in ("a", "b", "L")]
    lengths = [131072 * n // 7 for n in range(1, 8)]
    exact = [sigmoid(l, *curve) for l in lengths]
    for n in (1, 3):
        found = calibrate.fit(lengths[::n], exact[::n], [1.0] * len(exact[::n]), largest=1e5)
        assert found == pytest.approx(curve, rel=1e-4)


def test_a_sigmoid_does_not_rise_above_the_mapping_lengths_tried():
    lengths = [8192, 16384, 32768]
    a, b, L = calibrate.fit(lengths, [1511, 1934, 4848], [75.0] * 3, largest=8192)
    assert L == pytest.approx(8192)
    assert sigmoid(32768, a, b, L) == pytest.approx(4848, rel=0.1)


@settings(max_examples=20)
@given(seed=st.integers(0, 999))
def test_the_fit_tolerates_noise_and_weights_by_errors(seed):
    curve = (0.0001, -2.5, 6200.0)
    rng = random.Random(seed)
    lengths = [131072 * n // 28 for n in range(1, 29)]
    noisy = [sigmoid(l, *curve) * rng.uniform(0.95, 1.05) for l in lengths]
    errors = [100.0] * 28
    noisy[seed % 28] *= 3  # a point that is wrong, and has an error that says so
    errors[seed % 28] = 1e6
    found = calibrate.fit(lengths, noisy, errors, largest=20_000)
    assert found == pytest.approx(curve, rel=0.12)


@pytest.mark.parametrize("mapping_lens", [[5, 5, 5], [9, 1, 2], [6, 1, 2, 7, 3, 3]])
def test_mapping_lengths_that_do_not_grow_are_refused(mapping_lens):
    lengths = [1024 * 2 ** n for n in range(len(mapping_lens))]
    with pytest.raises(ValueError, match="grow with the input"):
        calibrate.fit(lengths, mapping_lens, [1.0] * len(lengths), largest=9)


PLANTED = (0.002, -2.0, 200.0)  # the a, b and L of a sigmoid
MAPPING_LENS = [16, 30, 45, 64, 91, 128, 150, 256]


def test_best_mapping_lengths_are_the_bottoms_of_curves():
    losses = {}  # whose best mapping lengths lie on the planted sigmoid
    for length in (256, 512, 1024, 2048):
        steps = torch.tensor(MAPPING_LENS).double().log2() - math.log2(sigmoid(length, *PLANTED))
        noise = 0.01 * normal(400 * len(steps), seed=length).view(-1, 400)
        losses[length] = steps[:, None] ** 2 + 0.1 * normal(400) + noise
    found, measured = calibrate.fit_losses(losses, MAPPING_LENS, seed=0)
    assert found["short_input"] == 256
    assert rx.mapping_length(255, **found) == pytest.approx(sigmoid(256, *PLANTED), rel=0.03)
    for length, rows in losses.items():
        expected = sigmoid(length, *PLANTED)
        assert rx.mapping_length(length, **found) == pytest.approx(expected, rel=0.05)
        least_error = 0.05 * math.log(2) * expected
        assert measured["best_mapping_lens"][length] == pytest.approx([expected, least_error],
                                                                      rel=0.02, abs=0.1)
        # Each mean has two standard errors of its paired difference from the lowest one.
        differences = rows - min(rows, key=torch.Tensor.mean)
        pairs = torch.stack([rows.mean(dim=1), 2 * differences.std(dim=1) / math.sqrt(400)], dim=1)
        curve = torch.tensor(list(measured["curves"][length].values())).double()
        torch.testing.assert_close(curve, pairs, rtol=0, atol=1e-6)


def test_the_error_of_a_bottom_is_its_spread_over_samples():
    samples = [torch.tensor([[0.3], [0.1], [0.3]]) + 0.2 * normal(300, seed).view(3, 100)
               for seed in range(40)]
    bottoms = [calibrate.find_bottom(losses, [16, 128, 1024], torch.Generator())
               for losses in samples]
    spread = torch.tensor([best for best, _ in bottoms]).log2().std().item()
    errors = [error / best / math.log(2) for best, error in bottoms]
    assert sum(errors) / 40 == pytest.approx(spread, rel=0.25)


# -------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture
def uncalibrated(tmp_path):
    """The bundled checkpoint without its extrapolation.json."""
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        (tmp_path / name).symlink_to(TINY / name)
    return tmp_path


def test_needle_uses_what_calibration_writes(monkeypatch, uncalibrated):
    run = ["--ckpt", uncalibrated, "--train-len", "256", "--len", "1024"]
    # With so small a window, DPE fails at most scales, and no two scores are equal.
    for method, by_hand in (("dpe", "window=2,topk=12"), ("lampe", "s1=1")):
        calibration = [method, *run, "--needles", "8", "--set", by_hand]
        assert command(monkeypatch, *calibration, main=calibrate.main) == 0
    sections = json.loads((uncalibrated / "extrapolation.json").read_text())
    made_with = dict(length=1024, needles=8, trials=1, seed=0, haystack=None)
    assert all(made_with.items() <= section["measured"].items() for section in sections.values())
    curves = sections["lampe"]["measured"]["curves"]
    assert {length: list(curve)[::4] for length, curve in curves.items()} == {
        "256": ["16", "64", "256"], "512": ["16", "64", "256"], "1024": ["16", "64", "256"]}

    # Scores are those of the questions, with key dimensions, which do not depend on the scales.
    model = load_model(uncalibrated)
    model.config = replace(model.config, train_len=256)
    by_hand = dict(window=2, topk=12, scales="8-8-16-8-8-8-8-8")
    chosen = {1024: {"dpe": needle.choose("dpe", model.config, 1024, {}, by_hand)}}
    tokenizer = load_tokenizer(uncalibrated)
    methods = needle.methods_of_layers(chosen, model, tokenizer, None, 0)[1024]["dpe"]
    assert (methods[1].key_dims.sum(dim=1) == 12).all()
    prompts = calibrate.draw_prompts(options(1, 8, 0), tokenizer, 1024, 8, None)
    score = calibrate.ask(model, methods, prompts).mean().item()
    assert sections["dpe"]["measured"]["scores"][2][4][0] == pytest.approx(score, rel=1e-3)

    out = uncalibrated / "needles.json"
    assert command(monkeypatch, *run, "--method", "dpe,lampe", "--json", out) == 0
    used = json.loads(out.read_text())["settings"]
    scales = [1024 // length for length in sections["dpe"]["settings"]["effective_lengths"]]
    assert used["dpe at 1024"] == {"window": 2, "topk": 12, "scales": "-".join(map(str, scales)),
                                  "from": "extrapolation.json"}
    mapping_len = rx.mapping_length(1024, **sections["lampe"]["settings"]["sigmoid"])
    assert used["lampe at 1024"]["mapping_len"] == mapping_len


def test_lampe_tries_lengths_and_mapping_lengths_given(monkeypatch, uncalibrated):
    out = uncalibrated / "out.json"
    dpe = {"settings": {"window": 5}, "measured": {}}
    out.write_text(json.dumps({"dpe": dpe}))
    run = ["lampe", "--ckpt", uncalibrated, "--haystack",
           write_sentences(uncalibrated / "text.txt"), "--out", out, "--set", "s1=4,s2=3",
           "--len", "900,300,600", "--mapping-lens", "64,128,32"]
    assert command(monkeypatch, *run, main=calibrate.main) == 0
    kept, lampe = json.loads(out.read_text()).values()
    assert kept == dpe
    assert lampe["settings"]["s2"] == 3
    assert [(length, *curve) for length, curve in lampe["measured"]["curves"].items()] == [
        ("300", "32", "64", "128"), ("600", "32", "64", "128"), ("900", "32", "64", "128")]


@pytest.mark.parametrize("arguments, weights, named", [
    (["dpe", "--len", "256"], "random", "less likely than a random number"),
    (["lampe", "--len", "256"], "random", "predicts almost nothing at any mapping length"),
    (["dpe", "--len", "1024"], "trained", "effective lengths cannot be told apart; try a longer"),
    (["lampe", "--len", "1024", "--mapping-lens", "256,512,1024"], "trained",
     "mapping lengths cannot be told apart at any")])
def test_scores_that_cannot_tell_are_refused(arguments, weights, named, bundled, monkeypatch,
                                             capsys, tmp_path):
    models = {"trained": bundled[0], "random": random_llama(vocab_size=949, train_len=256)}
    run = [*arguments, "--needles", "8", "--out", tmp_path / "out.json"]
    main = functools.partial(calibrate.main, load_model=lambda *_: models[weights])
    assert command(monkeypatch, *run, main=main) == 2
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, named", [
    (["dpe", "--out", "no/where.json"], "no/where.json cannot be written"),
    (["dpe", "--out", "."], ". cannot be written"),
    (["dpe", "--out", "other.json"], "other.json is not an extrapolation.json"),
    (["dpe", "--set", "scales=9"], "--set scales cannot be used"),
    (["dpe", "--len", "300,600,900"], "one --len"),
    (["dpe", "--needles", "6"], "a multiple of 4"),
    (["dpe", "--needles", "4"], "--trials at least 8"),
    (["lampe", "--needles", "1"], "no standard error"),
    (["lampe", "--len", "300,600"], "3 or more"),
    (["lampe", "--mapping-lens", "64,128,64"], "3 different lengths"),
    (["lampe", "--haystack", "short.txt"], "give a longer text"),
    (["lampe"], "pip install scipy")])
def test_a_calibration_that_cannot_work_is_refused_at_once(arguments, named, monkeypatch, capsys,
                                                           tmp_path):
    monkeypatch.chdir(tmp_path)
    if "scipy" in named:
        monkeypatch.setitem(sys.modules, "scipy", None)
    (tmp_path / "short.txt").write_text("One sentence.")
    (tmp_path / "other.json").write_text('{"seed": 3}')
    files = {file: file.read_text() for file in tmp_path.iterdir()}
    assert command(monkeypatch, "--ckpt", TINY, *arguments, main=calibrate.main) == 2
    assert named in refused(capsys)
    assert {file: file.read_text() for file in tmp_path.iterdir()} == files
