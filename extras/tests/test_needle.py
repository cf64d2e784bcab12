"""The needle test: prompts, settings, trials, the command line, and what a run leaves behind."""
import argparse
import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import extras.memory
import needle
import rope_extrap as rx
from extras.random_weights import SHAPES
from extras.tests.helpers import (
    DEVICES,
    RELEASED_SCALES,
    TINY,
    command,
    random_llama,
    refused,
    write_byte_level_tokenizer,
)
from load_llama import load_model, load_tokenizer
from model import Config, contributions
from tiny.grammar import FIRST, SECOND, draw_needles, sentence

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")


@pytest.fixture(scope="module")
def bundled():
    """The bundled model and its tokenizer."""
    return load_model(TINY), load_tokenizer(TINY)


@pytest.fixture
def uncalibrated(tmp_path):
    """The bundled checkpoint without its extrapolation.json."""
    path = tmp_path / "uncalibrated"
    path.mkdir()
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        (path / name).symlink_to(TINY / name)
    return path


def sentences(rng, count):
    return " ".join(sentence(rng) for _ in range(count))


def run_json(monkeypatch, tmp_path, *arguments):
    """Run needle.py, which must succeed. Returns what it writes to --json."""
    file = tmp_path / "out.json"
    assert command(monkeypatch, *arguments, "--json", file) == 0
    return json.loads(file.read_text())


# -------------------------------------------------------------------------------------------------
# The grammar


def test_sentences_have_no_digits_and_no_word_of_a_key():
    text = sentences(random.Random(0), 5000)
    assert not set("0123456789") & set(text)
    words = set(re.findall(r"\w+", text.lower()))
    assert not words & {*FIRST, *SECOND}


@given(st.integers(0, 99), st.integers(1, 40))
def test_needles_differ_and_are_not_in_the_text(seed, count):
    taken = f"{FIRST[0]} {SECOND[0]}"
    needles = draw_needles(random.Random(seed), count, text=f"It has a {taken} in it.")
    keys = {key for key, _ in needles}
    assert len(keys) == count
    assert taken not in keys
    for key, value in needles:
        first, second = key.split()
        assert first in FIRST
        assert second in SECOND
        assert re.fullmatch(r"[1-9]\d{4,6}", value)


# -------------------------------------------------------------------------------------------------
# Prompts


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory):
    """SentencePiece's with a BOS token, and a byte-level one without."""
    path = tmp_path_factory.mktemp("byte-level")
    write_byte_level_tokenizer(path)
    return {"SentencePiece": load_tokenizer(TINY), "byte-level": load_tokenizer(path)}


@given(length=st.integers(150, 3000), count=st.integers(1, 4), depth=st.floats(0, 1),
       kind=st.sampled_from(["SentencePiece", "byte-level"]), seed=st.integers(0, 99))
def test_a_prompt_has_its_length_and_each_needle_once(two_tokenizers, length, count, depth, kind,
                                                      seed):
    tokenizer = two_tokenizers[kind]
    if kind == "byte-level":
        length += 300
    rng = random.Random(seed)
    needles = draw_needles(rng, count)
    text = sentences(rng, 30)  # so short that a long prompt repeats it
    prompt, questions = needle.build_prompt(tokenizer, length, needles, [depth] * count, text)
    longest = max(len(question) + len(answer) for question, answer in questions)
    assert len(prompt) + longest == length
    shown = tokenizer.decode(prompt)
    for (key, value), (question, answer) in zip(needles, questions, strict=True):
        assert tokenizer.decode(question).strip() == f"The magic number for {key} is"
        assert tokenizer.decode(answer).strip() == f"{value}."
        assert shown.count(f"The magic number for {key} is {value}.") == 1


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_depth_0_is_the_start_and_1_is_the_end(depth, bundled):
    _, tokenizer = bundled
    text = sentences(random.Random(0), 200)
    prompt, _ = needle.build_prompt(tokenizer, 1000, [("jade owl", "12345")], [depth], text)
    assert prompt[0] == tokenizer.bos_id
    shown = tokenizer.decode(prompt)
    before, after = shown.split("The magic number for jade owl is 12345.")
    assert len(tokenizer.encode(before)) == pytest.approx(depth * 970, abs=20)
    assert (before.strip() == "") == (depth == 0)
    assert (after.strip() == "") == (depth == 1)


def test_needles_stand_between_sentences(bundled):
    _, tokenizer = bundled
    text = sentences(random.Random(0), 200)
    for depth in np.linspace(0, 1, 30):
        prompt, _ = needle.build_prompt(tokenizer, 1000, [("jade owl", "12345")], [depth], text)
        shown = tokenizer.decode(prompt)
        before, after = shown.split("The magic number for jade owl is 12345.")
        assert before.strip() == "" or before.rstrip().endswith(".")
        assert after.strip() == "" or after.endswith(".")


@pytest.mark.parametrize("text", ["no full stop at all " * 99, "今天天气很好。" * 99])
def test_depths_are_kept_in_a_text_without_full_stops(text, bundled):
    _, tokenizer = bundled
    prompt, _ = needle.build_prompt(tokenizer, 1000, [("jade owl", "12345")], [0.5], text)
    start = needle.encode_continuation(tokenizer, "The magic number")
    windows = [prompt[n:n + len(start)] for n in range(len(prompt))]
    assert windows.index(start) == pytest.approx(len(prompt) / 2, rel=0.1)


def test_several_needles_are_spread_from_the_depth_on(bundled):
    _, tokenizer = bundled
    args = argparse.Namespace(seed=0, chat=False)
    needles, prompt, _ = needle.draw_trial(args, tokenizer, 2000, 4, 0.5, 0, None)
    shown = tokenizer.decode(prompt)
    found = [shown.index(key) / len(shown) for key, _ in needles]
    assert found == pytest.approx([0.5, 0.75, 0, 0.25], abs=0.06)


# -------------------------------------------------------------------------------------------------
# Settings: the rule, then what is published, then what is calibrated, then --set


def config_of(shape):
    """A Config of a published shape, in which nothing else matters."""
    return Config(vocab_size=shape.vocab_size, dim=shape.dim, n_layers=shape.n_layers,
                  n_heads=shape.n_heads, n_kv_heads=shape.n_kv_heads,
                  head_dim=shape.dim // shape.n_heads, ffn_dim=1, train_len=shape.train_len)


@pytest.mark.parametrize("name", RELEASED_SCALES)
def test_published_settings_give_the_released_scales(name):
    config = config_of(rx.PUBLISHED[name].shape)
    chosen = needle.choose_settings("dpe", config, 131072, {}, {})
    assert chosen.source == f"published for {name}"
    assert chosen.settings["scales"] == RELEASED_SCALES[name]
    assert chosen.settings["window"] == 1024
    assert chosen.settings["topk"] == 48


@pytest.mark.parametrize("name", RELEASED_SCALES)
def test_within_every_effective_length_dpe_is_rope(name):
    config = config_of(rx.PUBLISHED[name].shape)
    shortest = min(rx.PUBLISHED[name].dpe["effective_lengths"])
    chosen = needle.choose_settings("dpe", config, shortest, {}, {})
    assert chosen.settings["scales"] == [1] * 8
    i = torch.arange(5000)[:, None]
    for band in chosen.method.bands:
        assert (band.q_pos(i) == i).all()
        assert (band.k_pos(i) == i).all()
    longer = needle.choose_settings("dpe", config, shortest + 1, {}, {})
    assert set(longer.settings["scales"]) == {1, 2}


def test_the_released_model_has_its_published_shape():
    shape = rx.PUBLISHED["Llama-3-8B-Instruct"].shape
    config = SHAPES["8b"]
    found = {field: getattr(config, field) for field in shape._fields}
    assert found == shape._asdict()


LLAMA_3 = config_of(rx.PUBLISHED["Llama-3-8B-Instruct"].shape)
UNPUBLISHED = dataclasses.replace(LLAMA_3, train_len=16384)


def choose(name, config, length, calibrated, by_hand):
    chosen = needle.choose_settings(name, config, length, calibrated, by_hand)
    return chosen.settings, chosen.source


def test_published_settings_precede_the_rule():
    published = dict(mapping_len=4501, s1=512, s2=200, logit_scale=rx.LAMPE_LOGIT_SCALE)
    source = "published for Llama-3-8B-Instruct"
    assert choose("lampe", LLAMA_3, 32768, {}, {}) == (published, source)
    ruled, source = choose("lampe", UNPUBLISHED, 32768, {}, {})
    assert ruled == dict(mapping_len=10240, s1=2048, s2=512, logit_scale=rx.LAMPE_LOGIT_SCALE)
    assert source == "the rule for this training length"


def test_below_8192_tokens_lampes_published_mapping_is_short():
    found, _ = choose("lampe", LLAMA_3, 8191, {}, {})
    assert found["mapping_len"] == 1536


def test_below_its_shortest_length_a_fitted_sigmoid_is_not_used():
    fitted = {"a": 3e-3, "b": -25.0, "L": 5000.0, "short": 1800, "short_below": 8300, "s1": 20,
              "s2": 10}
    for length, expected in ((4096, 1800), (8299, 1800), (8300, 2375)):
        found, _ = choose("lampe", UNPUBLISHED, length, {"lampe": fitted}, {})
        assert found["mapping_len"] == expected


CALIBRATED = {"dpe": {"window": 9, "effective_lengths": [4096, 8192], "topk": 4, "scores": []},
              "lampe": {"a": 1e-4, "b": -2.5, "L": 6200.0, "s1": 20, "s2": 10},
              "made_with": {}}


@pytest.mark.parametrize("config", [LLAMA_3, UNPUBLISHED])
def test_calibrated_settings_precede_published_ones(config):
    expected = dict(window=9, effective_lengths=[4096, 8192], topk=4, scales=[4, 2])
    assert choose("dpe", config, 16384, CALIBRATED, {}) == (expected, "extrapolation.json")
    within, _ = choose("dpe", config, 4097, CALIBRATED, {})
    assert within["scales"] == [2, 1]  # also within the training length
    mapped, _ = choose("lampe", config, 16384, CALIBRATED, {})
    assert mapped == dict(mapping_len=rx.mapping_length(16384, 1e-4, -2.5, 6200.0), s1=20, s2=10,
                          logit_scale=rx.LAMPE_LOGIT_SCALE)
    _, source = choose("rerope", config, 16384, CALIBRATED, {})
    assert source == "the rule for this training length"


def test_settings_by_hand_precede_all_others():
    published = dict(mapping_len=4501, s1=512, s2=200, logit_scale=rx.LAMPE_LOGIT_SCALE)
    found, source = choose("lampe", LLAMA_3, 32768, {}, {"s1": 7, "window": 3})
    assert found == published | dict(s1=7)  # LaMPE has no window
    assert source == "published for Llama-3-8B-Instruct and --set"
    found, _ = choose("lampe", LLAMA_3, 8000, {}, {"mapping_len": 9, "logit_scale": 1})
    assert found["mapping_len"] == 9
    chosen = needle.choose_settings("lampe", LLAMA_3, 8000, {}, {"logit_scale": 1})
    assert chosen.method.logit_scale == 1
    by_hand = {"effective_lengths": [1000], "group": 7}
    found, source = choose("dpe", UNPUBLISHED, 65536, CALIBRATED, by_hand)
    assert found == dict(window=9, effective_lengths=[1000], topk=4, scales=[66])
    assert source == "extrapolation.json and --set"
    found, _ = choose("dpe", UNPUBLISHED, 65536, CALIBRATED, {"scales": [3, 5]})
    assert found["scales"] == [3, 5]
    assert found["effective_lengths"] is None  # they have no effect, so the header omits them


@given(train_len=st.integers(64, 9000), length=st.integers(1, 40000))
def test_the_rules_scale_beyond_three_quarters_of_the_training_length(train_len, length):
    n = 4 * train_len
    config = dataclasses.replace(SHAPES["1b"], train_len=n)
    dpe, _ = choose("dpe", config, length, {}, {})
    self_extend, _ = choose("self-extend", config, length, {}, {})
    assert dpe["window"] == self_extend["window"] == n // 8
    fine = -(-length // (3 * train_len))
    assert self_extend["group"] == fine
    if length <= 3 * train_len:
        assert set(dpe["scales"]) == {1}
    else:
        assert set(dpe["scales"]) <= {fine, -(-length // train_len)}
    for name in ("ntk", "yarn"):
        stretched, _ = choose(name, config, length, {}, {})
        assert stretched["factor"] == max(length / n, 1)


def test_the_rule_of_dpe_is_coarse_for_groups_that_complete_a_rotation():
    # SmolLM2's frequencies: wavelengths of 2 pi 10^(5 f / 32) tokens. The slowest of groups 4 and
    # 5 are f = 19 and 23, with 5,849 and 24,665 tokens.
    config = dataclasses.replace(SHAPES["1b"], head_dim=64, rope_theta=1e5, rope_scaling=None,
                                 train_len=8192)
    found, _ = choose("dpe", config, 16384, {}, {})
    assert found["scales"] == [8] * 5 + [3] * 3
    # With 3 frequencies, each is a group. Their wavelengths are 6, 63 and 628 tokens.
    config = dataclasses.replace(config, head_dim=6, rope_theta=1000.0, train_len=100)
    found, _ = choose("dpe", config, 300, {}, {})
    assert found["effective_lengths"] == [25, 25, 75]


# -------------------------------------------------------------------------------------------------
# Methods that coincide under the settings in force

SMALL = dataclasses.replace(random_llama().config, head_dim=8)  # 4 frequencies


@given(st.sampled_from(list(needle.METHODS)), st.integers(1, 60), st.integers(1, 60),
       st.sampled_from([[1], [3], [3, 3], [1, 1], [1, 2]]), st.sampled_from([None, 4, 2]),
       st.integers(1, 3))
def test_a_method_that_is_called_another_is_that_other(name, length, window, scales, topk, group):
    by_hand = dict(window=window, scales=scales, topk=topk, group=group)
    chosen = needle.choose_settings(name, SMALL, length, {}, by_hand)
    said = needle.coincidence(name, chosen.settings, SMALL, length)
    if said is None:
        return
    other = rx.rope()
    if said.endswith("SelfExtend"):
        other = rx.self_extend(window, scales[0])
        assert topk != 2
    found = rx.relative_positions(chosen.method, length)
    expected = rx.relative_positions(other, length)
    if found.ndim == 3:
        expected = expected[..., None].expand_as(found)
    assert torch.equal(found, expected)
    if "positions" not in said:
        assert chosen.method.logit_scale == 1
    if chosen.method.frequencies is not None:
        assert torch.equal(chosen.method.frequencies, SMALL.frequencies())


@pytest.mark.parametrize("method, length, by_hand, said", [
    ("dpe", 400, "scales=5-5", "all scales are 5, so this is SelfExtend"),
    ("dpe", 400, "scales=1-1", "all scales are 1, so this is RoPE"),
    ("dpe", 400, "window=400,scales=1-2", "no distance is beyond the window, so this is RoPE"),
    ("dpe", 400, "effective_lengths=25,topk=16", "all scales are 16, so this is SelfExtend"),
    ("dpe", 70, "window=3", "all scales are 1, so this is RoPE"),
    ("self-extend", 70, "window=3", "the group size is 1, so this is RoPE"),
    ("rerope", 90, "window=90", "no distance is beyond the window, so this is RoPE"),
    ("yarn", 90, "factor=1", "the factor is 1, so this is RoPE"),
    ("lampe", 70, "s1=9", "nothing is compressed, so the positions are those of RoPE"),
    ("lampe", 90, "s1=46", "nothing is compressed, so the positions are those of RoPE"),
    ("ntk", 90, "factor=1.0", "the factor is 1, so this is RoPE")])
def test_the_header_says_which_methods_coincide(method, length, by_hand, said, monkeypatch, capsys,
                                                uncalibrated):
    run = ["--ckpt", uncalibrated, "--train-len", 100, "--depths", 1, "--method", method]
    assert command(monkeypatch, *run, "--len", length, "--set", by_hand) == 0
    assert f"# {method} at {length}: {said}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("method, by_hand", [
    ("rope", None), ("dpe", "scales=1-2"), ("dpe", "scales=3-3,topk=4"), ("lampe", "s1=9"),
    ("yarn", "factor=2"), ("rerope", "window=9"), ("self-extend", "group=2")])
def test_the_header_calls_no_other_method_the_same(method, by_hand, monkeypatch, capsys,
                                                   uncalibrated):
    run = ["--ckpt", uncalibrated, "--train-len", 100, "--depths", 1, "--len", 300]
    if by_hand is not None:
        run += ["--set", by_hand]
    assert command(monkeypatch, *run, "--method", method) == 0
    assert "so this is" not in capsys.readouterr().out


def test_the_header_names_the_published_model(monkeypatch, capsys, uncalibrated, bundled):
    config = bundled[0].config
    shape = rx.ModelShape(config.dim, config.n_layers, config.n_heads, config.n_kv_heads,
                          config.vocab_size, config.train_len)
    row = dict(window=7, effective_lengths=[100, 300], topk=None)
    published = rx.PublishedSettings(shape, dpe=row, lampe=None)
    monkeypatch.setitem(rx.PUBLISHED, "Small-Instruct", published)
    run = ["--ckpt", uncalibrated, "--method", "dpe,lampe", "--len", "300", "--depths", "1"]
    assert command(monkeypatch, *run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == ("# dpe at 300: window 7, effective_lengths 100-300, scales 3-1 "
                        "(published for Small-Instruct)")
    assert lines[2].endswith("(the rule for this training length)")


# -------------------------------------------------------------------------------------------------
# DPE's key dimensions


def test_groups_reach_frequencies_and_key_dimensions_heads(bundled):
    model, tokenizer = bundled
    model.config = dataclasses.replace(model.config, train_len=99)
    by_hand = dict(effective_lengths=[20, 10, 5], topk=10, window=4)
    chosen = {}
    for length, name in ((30, "dpe"), (40, "rope")):
        chosen[length, name] = needle.choose_settings(name, model.config, length, {}, by_hand)
    args = argparse.Namespace(seed=0)
    layers = needle.methods_of_layers(args, model, tokenizer, None, chosen)

    of_dpe = layers[30, "dpe"]
    assert len(of_dpe) == 2
    assert not torch.equal(of_dpe[0].key_dims, of_dpe[1].key_dims)
    scales = [2] * 6 + [3] * 5 + [6] * 5  # three groups of 16 frequencies, fastest first
    scaled = rx.relative_positions(rx.dpe(4, scales), 30)
    plain = rx.relative_positions(rx.rope(), 30)[..., None]
    for method in of_dpe:
        assert method.key_dims.shape == (4, 16)
        assert (method.key_dims.sum(dim=1) == 10).all()
        is_key = method.key_dims[:, None, None]
        expected = torch.where(is_key, scaled, plain)
        assert torch.equal(rx.relative_positions(method, 30), expected)
    assert layers[40, "rope"][0].key_dims is None


@pytest.mark.parametrize("train_len, sizes", [
    (131072, [2048, 4096, 8192]), (5000, [2048, 4096]), (100, [100])])
def test_contributions_are_means_over_ten_texts_of_each_length(train_len, sizes, bundled):
    _, tokenizer = bundled
    model = random_llama(vocab_size=tokenizer.vocab_size, n_layers=1, train_len=train_len,
                         dim=16, head_dim=16)
    texts = []
    hook = model.register_forward_pre_hook(lambda model, arguments: texts.append(arguments[0]))
    found = needle.mean_contributions(model, tokenizer, None, 0)
    hook.remove()
    assert [text.shape[1] for text in texts] == [size for size in sizes for _ in range(10)]
    assert len({tuple(text[0, :50].tolist()) for text in texts}) == len(texts)

    total = sum(contributions(model, text)[0] for text in texts)
    torch.testing.assert_close(found[0], total / len(texts))


def test_contributions_come_from_the_haystack_if_given(bundled):
    _, tokenizer = bundled
    model = random_llama(vocab_size=tokenizer.vocab_size, n_layers=1, train_len=50)
    seen = []
    model.register_forward_pre_hook(lambda model, arguments: seen.append(arguments[0]))
    text = sentences(random.Random(0), 40)
    needle.mean_contributions(model, tokenizer, text, 0)
    for tokens in seen:
        assert tokenizer.decode(tokens[0].tolist()) in text


# -------------------------------------------------------------------------------------------------
# Trials


@pytest.mark.parametrize("answer, score", [
    (" 40713.", 1), ("40713", 1), (" 4071", 0), (" 40714.", 0), ("140713", 0), ("407130", 0),
    ("", 0), (" four", 0), (" a40713.", 1)])
def test_a_number_counts_only_if_every_digit_is_right(answer, score, monkeypatch, bundled):
    given_answers = iter([answer, " 55555."])

    def draw(*arguments):
        return [("coral otter", "40713"), ("jade owl", "55555")]

    def give(*arguments):
        return next(given_answers)
    monkeypatch.setattr(needle, "draw_needles", draw)
    monkeypatch.setattr(needle, "greedy_answer", give)
    args = argparse.Namespace(seed=0, chat=False, needles=2)
    trial = needle.Trial(300, "rope", 0.0, 0)
    row = needle.run_trial(args, *bundled, None, [rx.rope()] * 2, trial)
    assert row["score"] == (score + 1) / 2
    assert row["answer"] == [answer, " 55555."]


def test_the_log_likelihood_is_that_of_the_whole_text(bundled):
    model, tokenizer = bundled
    rng = random.Random(0)
    needles = draw_needles(rng, 3)
    text = sentences(rng, 60)
    methods = [rx.dpe(20, 3)] * 2
    prompt, questions = needle.build_prompt(tokenizer, 400, needles, [0.1, 0.5, 0.9], text)
    cache = needle.prefill(model, methods, prompt, 40)
    questions.append((questions[0][0], questions[1][1]))  # and a wrong answer
    for n, (question, answer) in enumerate(questions):
        found, all_likely = needle.score_answer(model, methods, cache, question, answer)
        whole = torch.tensor([prompt + question + answer])
        logits = model(whole, methods)[0, -len(answer) - 1:-1]
        targets = whole[0, -len(answer):]
        log_p = logits.log_softmax(-1)[range(len(answer)), targets]
        assert found == pytest.approx(log_p.sum().item(), abs=1e-3)
        assert all_likely == (n < 3)
        assert cache.length == len(prompt)


class WordTokenizer:
    """Tokens are their own text."""
    vocab_size = 40

    def __init__(self, stop_ids):
        self.stop_ids = stop_ids

    def decode(self, ids):
        return ids


def test_an_answer_has_no_stop_token_and_no_unknown_one():
    model = random_llama()  # 48 tokens, 8 more than the tokenizer has
    methods = [rx.rope()] * 2
    cache = needle.prefill(model, methods, list(range(20)), 30)
    every = needle.generate(model, torch.tensor([[1, 2]]), 20, cache=cache)[0].tolist()
    cache.length = 20
    assert max(every) >= 40
    stop = every[10]
    known = [token for token in every[:every.index(stop)] if token < 40]
    found = needle.greedy_answer(model, WordTokenizer([stop]), methods, cache, [1, 2], 20)
    assert found == known
    assert cache.length == 20


# -------------------------------------------------------------------------------------------------
# The command line


def test_the_command_line_writes_what_it_prints(monkeypatch, capsys, tmp_path):
    text = "A bird sang. Rain fell on the town, and nobody minded! " * 30
    (tmp_path / "hay.txt").write_text(text, encoding="utf-8")
    record = run_json(monkeypatch, tmp_path, "--ckpt", TINY, "--method", "rope,lampe",
                      "--len", "400,500", "--depths", "0,1", "--trials", "2", "--needles", "2",
                      "--haystack", tmp_path / "hay.txt", "--seed", "5")
    out = capsys.readouterr().out
    rows = record["results"]
    expected = []
    for length in (400, 500):
        for method in ("rope", "lampe"):
            for depth in (0.0, 1.0):
                expected += [(method, length, depth, 0), (method, length, depth, 1)]
    found = [(row["method"], row["length"], row["depth"], row["trial"]) for row in rows]
    assert found == expected

    lines = [line for line in out.splitlines() if " score " in line]
    for row, line in zip(rows, lines, strict=True):
        assert list(row) == ["method", "length", "depth", "trial", "score", "expected", "answer",
                             "log_likelihood", "prefill_seconds", "decode_seconds"]
        assert row["prefill_seconds"] > 0
        assert len(row["answer"]) == len(row["log_likelihood"]) == 2
        assert line.split()[:2] == [row["method"], str(row["length"])]
        assert f"score {row['score']:4.2f}  expected {' '.join(row['expected'])}" in line
    for name, value in dict(seed=5, needles=2, checkpoint=str(TINY), dtype="float32",
                            device="cpu", chat=False, train_len=4096).items():
        assert record[name] == value
    assert record["settings"]["rope at 400"] == {"from": "the rule for this training length"}
    assert "s1" in record["settings"]["lampe at 500"]

    # The table of means.
    for method in ("rope", "lampe"):
        table = out[out.index(f"\n{method:12}     400     500"):]
        means = table.split("mean")[1].split()[:2]
        for length, mean in zip((400, 500), means, strict=True):
            scores = [row["score"] for row in rows
                      if (row["method"], row["length"]) == (method, length)]
            assert float(mean) == pytest.approx(np.mean(scores), abs=0.006)
    assert not list(tmp_path.glob("*.unfinished"))


def test_prompts_depend_on_seed_and_trial_not_on_method(monkeypatch, tmp_path):
    run = ["--ckpt", TINY, "--method", "rope,rerope", "--len", "300", "--depths", "1"]
    rows = run_json(monkeypatch, tmp_path, *run, "--trials", "2")["results"]
    first, second = rows[0]["expected"], rows[1]["expected"]
    assert first != second
    assert [row["expected"] for row in rows] == [first, second, first, second]
    assert rows[0]["log_likelihood"] != rows[1]["log_likelihood"]
    again = run_json(monkeypatch, tmp_path, *run, "--trials", "2")["results"]
    assert [row["expected"] for row in again] == [row["expected"] for row in rows]
    other = run_json(monkeypatch, tmp_path, *run, "--seed", "1")["results"]
    assert other[0]["expected"] != first


@pytest.mark.parametrize("given_depths, depths", [
    ("1", [0.5]), ("3", [0.0, 0.5, 1.0]), ("0", [0.0]), ("0.2", [0.2]), ("0,1", [0.0, 1.0])])
def test_depths_are_numbers_or_how_many_to_spread(given_depths, depths, monkeypatch, tmp_path):
    run = ["--ckpt", TINY, "--method", "rope", "--len", "100", "--depths", given_depths]
    rows = run_json(monkeypatch, tmp_path, *run)["results"]
    assert [row["depth"] for row in rows] == depths


def test_settings_are_printed_with_their_source(monkeypatch, capsys, uncalibrated):
    record = {"dpe": dict(window=33, effective_lengths=[256, 128], topk=5)}
    (uncalibrated / "extrapolation.json").write_text(json.dumps(record))
    run = ["--ckpt", uncalibrated, "--train-len", "256", "--len", "512", "--depths", "1"]
    assert command(monkeypatch, *run, "--method", "dpe,rerope,rope") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "trained on 256 tokens; cpu float32, seed 0" in lines[0]
    assert lines[1:4] == [
        "# dpe at 512: window 33, effective_lengths 256-128, topk 5, scales 2-4 "
        "(extrapolation.json)",
        "# rerope at 512: window 64 (the rule for this training length)",
        "# rope at 512: no settings (the rule for this training length)"]
    assert command(monkeypatch, *run, "--set", "window=9,topk=16") == 0
    out = capsys.readouterr().out
    assert "window 9, effective_lengths 256-128, topk 16" in out
    assert "(extrapolation.json and --set)" in out


def test_all_is_every_method(monkeypatch, tmp_path):
    run = ["--ckpt", TINY, "--method", "all", "--len", "100", "--depths", "1"]
    rows = run_json(monkeypatch, tmp_path, *run)["results"]
    assert [row["method"] for row in rows] == [
        "rope", "ntk", "yarn", "self-extend", "rerope", "dpe", "lampe"]


def test_help_lists_methods_and_settings(monkeypatch, capsys):
    assert command(monkeypatch, "--help") == 0
    out = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "rope, ntk, yarn, self-extend, rerope, dpe, lampe, or all" in out
    for name in ("window", "effective_lengths", "topk", "scales", "mapping_len", "s1", "s2",
                 "group", "factor"):
        assert name in out


def make_mine(config, length, settings):
    return rx.rerope(settings["window"])


def mine_rule(config, l):
    return dict(window=config.train_len // 4)


def test_a_method_of_ones_own_is_an_entry_in_a_table(monkeypatch, capsys, tmp_path):
    entry = needle.Entry(("window",), mine_rule, make_mine)
    monkeypatch.setitem(needle.METHODS, "mine", entry)
    run = ["--ckpt", TINY, "--train-len", "400", "--len", "500", "--depths", "0"]
    record = run_json(monkeypatch, tmp_path, *run, "--method", "rerope,mine", "--set", "window=50")
    theirs, ours = record["results"]
    assert ours["log_likelihood"] == theirs["log_likelihood"]
    shown = "# mine at 500: window 50 (the rule for this training length and --set)"
    assert shown in capsys.readouterr().out
    assert command(monkeypatch, "--help") == 0
    assert "lampe, mine, or all" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_picture_is_drawn_where_plot_says(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("map.png", "map.svg"):
        run = ["--ckpt", TINY, "--method", "rope", "--len", "100", "--depths", "1"]
        assert command(monkeypatch, *run, "--plot", tmp_path / name) == 0
        assert (tmp_path / name).stat().st_size > 1000


# -------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("arguments, named", [
    ("--method foo", "rope, ntk, yarn, self-extend, rerope, dpe, lampe"),
    ("--len 20", "--len 20 is too short"),
    ("--len 512,x", "argument --len: 'x' is not a whole number"),
    ("--len 0", "'0'"),
    ("--len 512 --needles 60", "--len 512 is too short"),
    ("--len 1000000000000", "--len 1000000000000 needs about"),
    ("--depths 1.5", "argument --depths: '1.5' has depths that are not between 0 and 1"),
    ("--depths nan", "nan"),
    ("--depths x", "argument --depths: 'x' is not a list of numbers"),
    ("--trials 0", "argument --trials: '0'"),
    ("--needles -1", "argument --needles: '-1'"),
    ("--needles 5000", "--needles 5000 is too many"),
    ("--ckpt nowhere", "nowhere is not a directory"),
    ("--ckpt random:9b", "random:8b"),
    ("--haystack missing.txt", "--haystack missing.txt cannot be read: No such file"),
    ("--haystack empty.txt", "empty.txt is empty"),
    ("--haystack latin1.txt", "latin1.txt is not UTF-8"),
    ("--device cuda:99", "--device cuda:99 cannot be used"),
    ("--device abacus", "--device abacus cannot be used"),
    ("--device meta", "--device meta cannot be used"),
    ("--dtype int3", "argument --dtype: invalid choice: 'int3'"),
    ("--bogus", "--bogus"),
    ("--tp 2", "--tp 2 needs torchrun"),
    ("--chat", "this checkpoint's tokenizer has the tokens of none of them"),
    ("--plot map.txt", "--plot map.txt must end in .png or .svg"),
    ("--plot missing/map.png", "--plot missing/map.png is in a directory that does not exist"),
    ("--set window=x", "argument --set: 'window=x'"),
    ("--set window", "argument --set: 'window'"),
    ("--set scales=3-x", "argument --set: 'x'"),
    ("--set s1=3-4 --method lampe", "argument --set: 's1=3-4'"),
    ("--set speed=3", "--set speed is not a setting of dpe"),
    ("--set mapping_len=9", "--set mapping_len is not a setting of dpe"),
    ("--set window=3 --method rope", "--set window is not a setting of rope"),
    ("--set s1=0.5 --method lampe", "s1 must be a whole number"),
    ("--set logit_scale=0 --method lampe", "logit_scale must be greater than 0"),
    ("--set window=0", "window"),
    ("--set effective_lengths=" + "-".join("2" * 99), "99 scales do not fit"),
    ("--set topk=99", "topk 99 does not fit"),
    ("--set window=9 --set topk=99", "topk 99 does not fit"),
    ("--set topk=99 --set window=9", "topk 99 does not fit"),
    ("--set scales=4-2,effective_lengths=9", "either scales or effective_lengths, not both"),
    ("--set topk=0", "topk 0 does not fit"),
    ("--set factor=0 --method yarn", "factor must be at least 1")])
def test_bad_input_gets_one_sentence_and_exit_code_2(arguments, named, monkeypatch, capsys,
                                                     tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    files = set(tmp_path.iterdir())
    assert command(monkeypatch, "--ckpt", TINY, "--json", "out.json", *arguments.split()) == 2
    sentence = refused(capsys)
    assert sentence.startswith("needle.py: ")
    assert named in sentence
    assert set(tmp_path.iterdir()) == files


@pytest.mark.parametrize("file, named", [
    ("no/where.json", "no/where.json"), ("/dev/null", "/dev/null is not a file"), (".", ".")])
def test_results_that_cannot_be_written_are_refused_first(file, named, monkeypatch, capsys,
                                                          tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "--ckpt", TINY, "--len", "300", "--json", file) == 2
    out, err = capsys.readouterr()
    assert " score " not in out
    assert named in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_plot_that_cannot_be_written_is_refused_first(monkeypatch, capsys, tmp_path):
    (tmp_path / "map.png").mkdir()
    assert command(monkeypatch, "--len", "300", "--plot", tmp_path / "map.png") == 2
    assert "map.png is not a file that can be replaced" in refused(capsys)


def test_earlier_results_stay_until_there_are_new_ones(monkeypatch, tmp_path):
    (tmp_path / "out.json").write_text("earlier")
    run = ["--len", "300", "--depths", "1", "--json", tmp_path / "out.json"]
    monkeypatch.setattr(needle, "run_trial", interrupt)
    assert command(monkeypatch, *run) == 130
    assert (tmp_path / "out.json").read_text() == "earlier"


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize("method, content", [
    ("dpe", '{"dpe": 3}'), ("dpe", '{"dpe": {"window": 4}}'),
    ("dpe", '{"dpe": {"window": 4, "scales": [1, 2], "topk": 3}}'),
    ("dpe", '{"dpe": {"window": 0, "effective_lengths": [1], "topk": 3}}'),
    ("dpe", '{"dpe": {"window": 4, "effective_lengths": 7, "topk": 3}}'),
    ("dpe", '{"dpe": {"window": 4, "effective_lengths": [0], "topk": 3}}'),
    ("dpe", '{"dpe": {"window": 4.5, "effective_lengths": [9], "topk": 3}}'),
    ("dpe", '{"dpe": {"window": 4, "effective_lengths": [9], "topk": "x"}}'),
    ("lampe", '{"lampe": {"a": 1, "b": 1, "s1": 1, "s2": 1}}'),
    ("lampe", '{"lampe": {"a": "x", "b": 1, "L": 2, "s1": 1, "s2": 1}}'),
    ("lampe", '{"lampe": {"a": 1, "b": 1, "L": 2, "s1": 1}}'),
    ("lampe", '{"lampe": {"a": -9, "b": 1, "L": 200, "s1": 1, "s2": 1}}'),
    ("rerope", '{"rerope": {"window": "x"}}'), ("yarn", '{"yarn": {"factor": "x"}}')])
def test_unusable_calibrated_settings_are_refused(method, content, monkeypatch, capsys,
                                                  uncalibrated):
    (uncalibrated / "extrapolation.json").write_text(content)
    run = ["--ckpt", uncalibrated, "--len", "300", "--method", method]
    assert command(monkeypatch, *run) == 2
    sentence = refused(capsys)
    assert f"{method} does not work with the settings from extrapolation.json" in sentence
    assert "correct them" in sentence


@pytest.mark.parametrize("content", ["{", "[1]", ""])
def test_an_extrapolation_json_that_is_none_is_refused(content, monkeypatch, capsys, uncalibrated):
    (uncalibrated / "extrapolation.json").write_text(content)
    assert command(monkeypatch, "--ckpt", uncalibrated, "--len", "300") == 2
    assert "extrapolation.json" in refused(capsys)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(monkeypatch, capsys, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, tmp_path)
    write_byte_level_tokenizer(tmp_path, special=[f"<{n}>" for n in range(744)])
    assert command(monkeypatch, "--ckpt", tmp_path) == 2
    assert "tokenizer has 1000 tokens, and the embedding only" in refused(capsys)


def test_the_length_that_is_said_to_fit_fits(monkeypatch, capsys):
    monkeypatch.setattr(extras.memory, "memory_free", lambda device: 10 ** 7)
    run = ["--ckpt", TINY, "--method", "rope", "--depths", "1"]
    assert command(monkeypatch, *run, "--len", "300,100000") == 2
    sentence = refused(capsys)
    assert "and 0.0 GB are free" in sentence
    fits = int(re.search(r"--len (\d+) fits", sentence)[1])
    assert command(monkeypatch, *run, "--len", fits) == 0
    capsys.readouterr()
    assert command(monkeypatch, *run, "--len", fits + 1) == 2


# -------------------------------------------------------------------------------------------------
# Runs that end early


@pytest.mark.parametrize("raised, code, said", [
    (KeyboardInterrupt(), 130, "needle.py: interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GB."), 2, "allocate 9 GB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
     2, "try a shorter --len")])
def test_what_ends_a_run_leaves_the_rows_so_far(raised, code, said, monkeypatch, capsys, tmp_path):
    real = needle.greedy_answer
    answers = []

    def failing(*arguments):
        if len(answers) == 2:
            raise raised
        answers.append(real(*arguments))
        return answers[-1]
    monkeypatch.setattr(needle, "greedy_answer", failing)
    file = tmp_path / "out.json"
    assert command(monkeypatch, "--ckpt", TINY, "--len", "300", "--json", file) == code
    assert [row["answer"] for row in json.loads(file.read_text())["results"]] == [
        [answer] for answer in answers]
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_an_illegal_memory_access_is_not_out_of_memory(monkeypatch):
    def broken(args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(needle, "load", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        command(monkeypatch, "--ckpt", TINY)


def rows_of(file):
    if not file.exists():
        return []
    return json.loads(file.read_text())["results"]


def heed_interrupts():
    """Undo what a shell does to a command in the background, which then ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.skipif(not Path("/proc").exists(), reason="signals as on Linux")
@pytest.mark.parametrize("kill, code, said", [
    (signal.SIGINT, 130, "needle.py: interrupted\n"), (signal.SIGKILL, -signal.SIGKILL, "")])
def test_killed_in_mid_run_it_leaves_whole_rows(kill, code, said, tmp_path):
    file = tmp_path / "out.json"
    run = [sys.executable, TINY.parent / "needle.py", "--device", "cpu", "--len", "300"]
    run += ["--trials", "9999", "--json", file]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=heed_interrupts)
    deadline = time.time() + 240
    while not rows_of(file) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(kill)
    try:
        assert process.wait(60) == code
    finally:
        process.kill()
    assert process.stderr.read() == said
    assert len(rows_of(file)) >= 1


# -------------------------------------------------------------------------------------------------
# The bundled model


def scores(monkeypatch, tmp_path, *arguments):
    """The mean score of each method."""
    found = {}
    for row in run_json(monkeypatch, tmp_path, "--ckpt", TINY, *arguments)["results"]:
        found.setdefault(row["method"], []).append(row["score"])
    return {method: np.mean(values) for method, values in found.items()}


def test_the_bundled_model_answers_at_its_training_length(monkeypatch, tmp_path):
    found = scores(monkeypatch, tmp_path, "--method", "rope,lampe", "--len", "4096",
                   "--depths", "0,0.2", "--needles", "4")
    assert found["rope"] >= 0.8
    assert found["lampe"] >= 0.8


@pytest.mark.parametrize("device", DEVICES)
def test_at_four_times_that_dpe_and_lampe_answer_alone(device, monkeypatch, tmp_path):
    found = scores(monkeypatch, tmp_path, "--method", "rope,dpe,lampe", "--len", "16384",
                   "--depths", "0.1", "--needles", "4", "--device", device)
    assert found == {"rope": 0, "dpe": 1, "lampe": 1}
