"""The papers' procedures on a model: what is measured and chosen, and the file that they write."""
import argparse
import json
import math
import random
import re

import pytest
import torch

import rope_extrap as rx
from extras import calibrate
from extras.loss import block_means, last_losses, stretch_start
from extras.tests.helpers import TINY, command, refused
from load_llama import load_model, load_tokenizer
from tiny.grammar import sentence


@pytest.fixture(scope="module")
def bundled():
    """The bundled model and its tokenizer."""
    return load_model(TINY), load_tokenizer(TINY)


@pytest.fixture(scope="module")
def text():
    """A text of about 2,000 tokens."""
    rng = random.Random(0)
    return " ".join(sentence(rng) for _ in range(150))


def options(trials=2, needles=2, seed=3):
    return argparse.Namespace(trials=trials, needles=needles, seed=seed, chat=False)


# -------------------------------------------------------------------------------------------------
# Measuring


def test_every_question_is_asked_alone_after_its_prompt(bundled):
    model, tokenizer = bundled
    method = rx.dpe(5, 400)  # so coarse that some answers are wrong
    prompts = calibrate.draw_prompts(options(needles=3), tokenizer, 400, 3, None)
    found = calibrate.ask(model, method, prompts)

    # One forward pass for each question, without a cache.
    log_likelihood = []
    right = []
    n_tokens = []
    for prompt, questions in prompts:
        for question, answer in questions:
            tokens = torch.tensor([prompt + question + answer])
            logits = model(tokens, [method] * 2)[0, -len(answer) - 1:-1]
            log_p = logits.log_softmax(dim=-1)
            log_likelihood.append(sum(log_p[n, token].item() for n, token in enumerate(answer)))
            right.append(logits.argmax(dim=-1).tolist() == answer)
            n_tokens.append(len(answer))
    assert len(log_likelihood) == 6
    assert set(right) == {True, False}
    assert found.log_likelihood.tolist() == pytest.approx(log_likelihood, abs=5e-3)
    assert found.found.tolist() == right
    assert found.n_tokens.tolist() == n_tokens


def test_prompts_have_needles_at_different_depths(bundled):
    _, tokenizer = bundled
    prompts = calibrate.draw_prompts(options(trials=2), tokenizer, 1000, 2, None)
    depths = []
    for prompt, questions in prompts:
        words = tokenizer.decode(prompt)
        for question, _ in questions:
            depths.append(words.index(tokenizer.decode(question).strip()) / len(words))
    assert sorted(depths) == pytest.approx([0, 0.25, 0.5, 0.75], abs=0.05)


def lampe_losses(bundled, text, length, mapping_lens):
    model, tokenizer = bundled
    settings = dict(mapping_len=1, s1=30, s2=8, logit_scale=1.1)
    measured = calibrate.measure_lampe(options(), model, tokenizer, text, [length], mapping_lens,
                                       settings)
    assert list(measured) == [length]
    return measured[length]


def test_lampe_reads_the_ends_of_stretches_of_a_text(bundled, text):
    model, tokenizer = bundled
    tokens = tokenizer.encode(text)
    losses = lampe_losses(bundled, text, 600, [60, 100])
    for row, mapping_len in zip(losses, [60, 100], strict=True):
        expected = []
        for trial in range(2):
            start = stretch_start(len(tokens), 600, 3, trial)
            method = rx.lampe(600, mapping_len, 30, 8, 1.1)
            stretch = tokens[start:start + 600]
            expected.append(block_means(last_losses(model, [method] * 2, stretch, 300)))
        assert torch.equal(row, torch.cat(expected))


def test_lampe_reads_answers_in_nats_per_token(bundled):
    model, tokenizer = bundled
    losses = lampe_losses(bundled, None, 600, [60, 100])
    prompts = calibrate.draw_prompts(options(), tokenizer, 600, 2, None)
    answers = calibrate.ask(model, rx.lampe(600, 100, 30, 8, 1.1), prompts)
    assert torch.equal(losses[1], -answers.log_likelihood / answers.n_tokens)


@pytest.mark.parametrize("needles, length, questions", [
    (32, 512, 4), (32, 200, 2), (3, 512, 3), (1, 300, 1)])
def test_lampe_asks_a_question_for_every_128_tokens(needles, length, questions, bundled):
    model, tokenizer = bundled
    settings = dict(mapping_len=1, s1=30, s2=8, logit_scale=1.1)
    losses = calibrate.measure_lampe(options(needles=needles), model, tokenizer, None, [length],
                                     [64], settings)
    assert losses[length].shape == (1, 2 * questions)  # in two trials


def test_errors_are_two_standard_errors_of_paired_differences():
    difficulty = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = 1 + difficulty
    other = 3 + difficulty + 0.5 * torch.tensor([1.0, -1.0] * 25)
    expected = 2 * 0.5 * math.sqrt(50 / 49) / math.sqrt(50)
    pairs = calibrate.with_errors([best, other], best)
    mean = difficulty.mean().item()
    assert pairs == [pytest.approx([1 + mean, 0.0], abs=1e-6),
                     pytest.approx([3 + mean, expected], abs=1e-6)]


# -------------------------------------------------------------------------------------------------
# DPE


@pytest.mark.parametrize("length, train_len, candidates, background", [
    (70, 256, [1, 2], 1),  # shorter than the training length
    (300, 256, [1, 2, 4, 8], 2),
    (1024, 256, [1, 2, 4, 8, 16, 32], 8),
    (20, 256, [1], 1),
    (1024, 4, [2 ** n for n in range(11)], 512),
    (131072, 8192, [1, 2, 4, 8, 16, 32, 64, 128], 32)])  # the paper's
def test_scales_to_try_fit_any_length(length, train_len, candidates, background):
    assert calibrate.scales_to_try(length, train_len) == (candidates, background)


@pytest.mark.parametrize("tolerated, together", [(24, 1), (23, 2), (9, 4), (7, 8)])
def test_scales_that_fail_together_are_doubled_until_they_work(tolerated, together):
    def score(scales):
        # Each of 8 groups may have a scale of 1, which is 3 doublings below the background.
        # All groups together may have only so many doublings less than the background.
        doublings = sum(math.log2(8 / min(scale, 8)) for scale in scales)
        return torch.full((10,), -float(doublings > tolerated))

    found = calibrate.detect(score, 8, [1, 2, 4, 8, 16, 32], background=8)
    assert found.alone == [1] * 8
    assert found.together == [together] * 8


def test_large_scales_are_not_doubled():
    def score(scales):
        # Group 0 is best at a scale of 32. Of the others only one may be below the background.
        below = [scale for scale in scales[1:] if scale < 8]
        log_likelihood = 0.1 * math.log2(scales[0] / 32) - max(len(below) - 1, 0)
        return torch.full((10,), log_likelihood)

    found = calibrate.detect(score, 4, [1, 2, 4, 8, 16, 32], background=8)
    assert found.alone == [32, 1, 1, 1]
    assert found.together == [32, 8, 8, 8]


def test_the_sections_effective_lengths_are_those_together(capsys):
    means = torch.tensor([[-3.0, -1.0, -2.0], [-0.5, -0.6, -0.7]]).double()
    noise = 0.1 * torch.tensor([1.0, -1.0] * 8).double()
    table = [[means[group, n] + n * noise for n in range(3)] for group in range(2)]
    detection = calibrate.Detection(table, alone=[2, 1], together=[4, 2])
    settings = dict(window=7, topk=9)
    section = calibrate.detection_section(detection, settings, 1001, [1, 2, 4], background=4)
    assert section["effective_lengths"] == [251, 501]
    assert section["alone"] == [501, 1001]
    assert (section["window"], section["topk"], section["length"]) == (7, 9, 1001)

    # Errors are those of differences from the best candidate of the group, 2 and 1.
    step = 2 * 0.1 * math.sqrt(16 / 15) / math.sqrt(16)
    errors = [[error for _, error in row] for row in section["scores"]]
    assert errors[0] == pytest.approx([step, 0, step], abs=1e-6)
    assert errors[1] == pytest.approx([0, step, 2 * step], abs=1e-6)
    for row, expected in zip(section["scores"], means, strict=True):
        assert [mean for mean, _ in row] == pytest.approx(expected.tolist(), abs=1e-6)
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert rows[0].endswith("alone 501, together 251")
    assert rows[1].endswith("alone 1001, together 501")


# -------------------------------------------------------------------------------------------------
# LaMPE


def test_lengths_to_try_are_halves_down_to_the_training_length():
    assert calibrate.lengths_to_try(131072, 32768) == [32768, 65536, 131072]
    assert calibrate.lengths_to_try(65536, 8192) == [8192, 16384, 32768, 65536]
    assert calibrate.lengths_to_try(8192, 8192) == [2048, 4096, 8192]


def test_mapping_lens_to_try_end_at_the_training_length():
    assert calibrate.mapping_lens_to_try(8192)[::2] == [512, 1024, 2048, 4096, 8192]
    assert calibrate.mapping_lens_to_try(8192)[1] == 724
    assert calibrate.mapping_lens_to_try(4)[0] == 1


@pytest.mark.parametrize("mapping_lens", [[64, 128, 256, 512, 1024], [50, 100, 300, 400, 1000]])
def test_the_vertex_is_a_planted_parabolas(mapping_lens):
    planted = torch.tensor([60.0, 100.0, 180.0, 350.0, 990.0, 5.0, 9999.0]).double()
    x = torch.tensor(mapping_lens).double().log2()
    losses = 3 + 0.1 * (x - planted.log2()[:, None]) ** 2
    expected = planted.clamp(mapping_lens[0], mapping_lens[-1])
    torch.testing.assert_close(2 ** calibrate.vertex(losses, mapping_lens), expected)


PLANTED = (0.002, -2.0, 200.0)  # the a, b and L of a sigmoid
MAPPING_LENS = [16, 30, 45, 64, 91, 128, 150, 256]


def best_of(length):
    a, b, L = PLANTED
    return L / (1 + math.exp(-(a * length + b)))


def planted_losses(depth):
    """Losses whose best mapping lengths lie on the planted sigmoid, for 4 lengths."""
    generator = torch.Generator().manual_seed(0)
    losses = {}
    for length in (256, 512, 1024, 2048):
        best = best_of(length)
        difficulty = 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)
        rows = []
        for mapping_len in MAPPING_LENS:
            noise = 0.01 * torch.randn(400, generator=generator, dtype=torch.float64)
            rows.append(depth * math.log2(mapping_len / best) ** 2 + difficulty + noise)
        losses[length] = torch.stack(rows)
    return losses


def section_of(losses):
    settings = dict(mapping_len=77, s1=16, s2=8, logit_scale=1.1)
    return calibrate.fit_section(losses, MAPPING_LENS, settings, seed=0)


def test_best_mapping_lengths_are_the_bottoms_of_curves(capsys):
    losses = planted_losses(depth=1.0)
    section = section_of(losses)
    printed = capsys.readouterr().out
    curve = (section["a"], section["b"], section["L"])
    assert "mapping_len" not in section
    assert section["short"] == pytest.approx(best_of(256), rel=0.03)
    assert section["short_below"] == 256
    for length, (mapping_len, error) in section["best_mapping_lens"].items():
        assert mapping_len == pytest.approx(best_of(length), rel=0.02)
        assert error == pytest.approx(0.05 * math.log(2) * mapping_len, abs=0.1)
        assert rx.mapping_length(length, *curve) == pytest.approx(best_of(length), rel=0.05)
        assert f"best {mapping_len:.0f}, standard error {error:.0f}" in printed
    assert list(section["best_mapping_lens"]) == list(losses)

    # The curves have the mean losses, and errors of paired differences from the lowest one.
    curve = section["curves"][512]
    means = losses[512].mean(dim=1)
    assert list(curve) == MAPPING_LENS
    assert [mean for mean, _ in curve.values()] == pytest.approx(means.tolist(), abs=1e-6)
    errors = [error for _, error in curve.values()]
    assert errors[means.argmin()] == 0
    assert max(errors) < 3 * 0.01 * math.sqrt(2 / 400)


def test_flat_curves_have_no_sigmoid(capsys):
    with pytest.raises(ValueError, match="mapping lengths cannot be told apart"):
        section_of(planted_losses(depth=0.0))
    assert capsys.readouterr().out.count("not distinguishable") == 4


def test_the_fit_weights_bottoms_by_their_errors():
    bottoms = {}
    for length in (256, 512, 1024, 1536, 2048):
        bottoms[length] = calibrate.Bottom(best_of(length), error=1.0, distinguishable=True)
    bottoms[1024] = calibrate.Bottom(3 * best_of(1024), error=1e4, distinguishable=False)
    assert calibrate.fit(bottoms) == pytest.approx(PLANTED, rel=0.01)


def test_the_error_of_a_bottom_is_its_spread_over_samples():
    samples = []
    errors = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(3, 100, generator=generator, dtype=torch.float64)
        curve = torch.tensor([[0.3], [0.1], [0.3]], dtype=torch.float64)
        bottom = calibrate.find_bottom(curve + 0.2 * noise, [16, 128, 1024], generator)
        samples.append(math.log2(bottom.mapping_len))
        errors.append(bottom.error / bottom.mapping_len / math.log(2))
    assert sum(errors) / 60 == pytest.approx(torch.tensor(samples).std().item(), rel=0.2)


# -------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture
def uncalibrated(tmp_path):
    """The bundled checkpoint without its extrapolation.json."""
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        (tmp_path / name).symlink_to(TINY / name)
    return tmp_path


def test_needle_uses_what_calibration_writes(monkeypatch, capsys, uncalibrated):
    run = ["--ckpt", uncalibrated, "--train-len", "256", "--len", "512"]
    # With a window of 1, DPE fails at most scales, and no two scores are equal.
    for method, setting in (("dpe", "window=1"), ("lampe", "s1=1")):
        calibration = [method, *run, "--needles", "4", "--set", setting]
        assert command(monkeypatch, *calibration, main=calibrate.main) == 0
    printed = capsys.readouterr().out
    file = uncalibrated / "extrapolation.json"
    record = json.loads(file.read_text())

    # Both sections are there, and say how they were made.
    dpe = record["dpe"]
    scales = [512 // effective_length for effective_length in dpe["effective_lengths"]]
    assert (dpe["candidates"], dpe["background"]) == ([1, 2, 4, 8, 16], 4)
    assert (dpe["window"], dpe["topk"], dpe["length"]) == (1, 16, 512)
    assert len(scales) == len(dpe["scores"]) == 8
    assert all(len(row) == 5 for row in dpe["scores"])
    assert set(scales) <= {1, 2, 4, 8, 16}
    lampe = record["lampe"]
    assert set(lampe) == {*rx.SIGMOID, "s1", "s2", "best_mapping_lens", "curves"}
    assert list(lampe["curves"]) == list(lampe["best_mapping_lens"]) == ["128", "256", "512"]
    assert list(lampe["curves"]["512"])[::4] == ["16", "64", "256"]
    assert record["made_with"] == {method: dict(length=512, needles=4, trials=1, seed=0,
                                                haystack=None) for method in ("dpe", "lampe")}

    # The scores are those of the questions, and the table that is printed is the file's.
    model = load_model(uncalibrated)
    tokenizer = load_tokenizer(uncalibrated)
    prompts = calibrate.draw_prompts(options(trials=1, needles=4, seed=0), tokenizer, 512, 4, None)
    group_2_is_16 = [4] * 4 + [16] * 2 + [4] * 10
    answers = calibrate.ask(model, rx.dpe(1, group_2_is_16), prompts)
    assert dpe["scores"][2][4][0] == pytest.approx(answers.log_likelihood.mean().item(), rel=1e-3)
    table = re.search(r"^group 3 (.*)   alone", printed, flags=re.MULTILINE)
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", table[1])]
    means = [mean for mean, _ in dpe["scores"][3]]
    assert numbers[::2] == pytest.approx(means, abs=1e-4)

    # needle.py takes its settings from the file.
    record["lampe"] = {"a": 1e-3, "b": 0.5, "L": 200.0, "s1": 20, "s2": 10}
    file.write_text(json.dumps(record))
    assert command(monkeypatch, *run, "--method", "dpe,lampe", "--depths", "1") == 0
    printed = capsys.readouterr().out
    shown = "-".join(str(scale) for scale in scales)
    assert f"scales {shown} (extrapolation.json)" in printed
    mapping_len = rx.mapping_length(512, 1e-3, 0.5, 200.0)
    shown = f"mapping_len {mapping_len}, s1 20, s2 10, logit_scale 1.1434 (extrapolation.json)"
    assert shown in printed


def test_lampe_tries_lengths_and_mapping_lengths_given(monkeypatch, uncalibrated, text):
    file = uncalibrated / "text.txt"
    file.write_text(text)
    out = uncalibrated / "out.json"
    out.write_text('{"dpe": {"window": 5}}')
    run = ["lampe", "--ckpt", uncalibrated, "--haystack", file, "--out", out, "--set", "s1=4,s2=3",
           "--needles", "1"]  # a text has none
    tried = ["--len", "900,300,600", "--mapping-lens", "64,128,32"]
    assert command(monkeypatch, *run, *tried, main=calibrate.main) == 0
    record = json.loads(out.read_text())
    assert list(record["lampe"]["curves"]) == ["300", "600", "900"]
    assert list(record["lampe"]["curves"]["300"]) == ["32", "64", "128"]
    assert record["lampe"]["s2"] == 3
    assert record["dpe"] == {"window": 5}
    assert record["made_with"]["lampe"]["length"] == 900
    assert not (uncalibrated / "extrapolation.json").exists()


@pytest.mark.parametrize("method, reason", [
    ("dpe", "no answer is right at any setting"),
    ("lampe", "predicts almost nothing at any mapping length")])
def test_a_model_that_predicts_nothing_is_refused(method, reason, monkeypatch, capsys, tmp_path):
    run = ["--ckpt", "random:small", "--train-len", "256", "--len", "256", "--dtype", "float32"]
    out = tmp_path / "out.json"
    asked = ["--out", out, "--needles", "2", "--mapping-lens", "16,32,64"]
    if method == "dpe":
        asked = asked[:-2]
    assert command(monkeypatch, method, *run, *asked, main=calibrate.main) == 2
    assert reason in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_scales_that_do_not_matter_are_not_written(monkeypatch, capsys, tmp_path):
    """Within its training length, the bundled model answers at any scale."""
    run = ["--len", "1024", "--needles", "4", "--out", tmp_path / "out.json"]
    assert command(monkeypatch, "dpe", *run, main=calibrate.main) == 2
    assert "try a longer --len" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments, named", [
    (["rope"], "'rope'"),
    ([], "method"),
    (["dpe", "--out", "no/where.json"], "no/where.json"),
    (["dpe", "--out", "bad.json"], "bad.json cannot be read as JSON"),
    (["dpe", "--out", "odd.json"], "odd.json is damaged"),
    (["dpe", "--ckpt", "nowhere"], "nowhere is not a directory"),
    (["dpe", "--set", "mapping_len=3"], "--set mapping_len cannot be used here"),
    (["dpe", "--set", "effective_lengths=9"], "--set effective_lengths cannot be used here"),
    (["dpe", "--len", "300,600"], "dpe is calibrated at one --len"),
    (["dpe", "--mapping-lens", "1,2,3"], "without --mapping-lens"),
    (["dpe", "--needles", "1"], "one question has no standard error"),
    (["dpe", "--len", "60"], "--len 60 is too short"),
    (["lampe", "--needles", "1"], "one question has no standard error"),
    (["lampe", "--mapping-lens", "64,128,64"], "3 different lengths or more"),
    (["lampe", "--haystack", "short.txt"], "--len 65536 needs as many")])
def test_a_calibration_that_cannot_work_is_refused(arguments, named, monkeypatch, capsys,
                                                   tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("One sentence.")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"made_with": 3}')
    files = set(tmp_path.iterdir())
    assert command(monkeypatch, "--ckpt", TINY, *arguments, main=calibrate.main) == 2
    assert named in refused(capsys)
    assert set(tmp_path.iterdir()) == files
