"""The needle test: prompts, settings, trials, the command line, and what a run leaves behind."""
import dataclasses
import json
import math
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import needle
import rope_extrap as rx
from extras.tests.helpers import (
    DEVICES,
    RELEASED_SCALES,
    command,
    random_llama,
    refused,
    write_byte_level_tokenizer,
)
from load_llama import load_model, load_tokenizer
from model import Config
from tiny.grammar import FIRST, SECOND, TINY, draw_needles, free_keys, sentence


@pytest.fixture(scope="module")
def bundled():
    """The bundled model and its tokenizer."""
    return load_model(TINY), load_tokenizer(TINY)


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory):
    """SentencePiece's with a BOS token, and a byte-level one without."""
    path = tmp_path_factory.mktemp("byte-level")
    write_byte_level_tokenizer(path)
    return [load_tokenizer(TINY), load_tokenizer(path)]


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
    file.unlink(missing_ok=True)
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
    keys = free_keys(f"It has a {taken} in it.")
    assert taken not in keys
    needles = draw_needles(random.Random(seed), count, keys)
    assert len({key for key, _ in needles}) == count
    for key, value in needles:
        assert key in keys
        assert re.fullmatch(r"[1-9]\d{4,6}", value)


# -------------------------------------------------------------------------------------------------
# Prompts

TEXTS = {
    "generated": sentences(random.Random(0), 60),
    "code": "def f(self):\n    self.x = 3.14159\n\n    return self.x.y if v1.2.3 else None\n" * 20,
    "numbers": "The value is 3.14159 e. g. in 3. Then self. x is 2. Is it? 'Yes.' It is. " * 20,
    "no full stop": "no full stop at all " * 120,
    "no space": "\u5929" * 700,
    "Hindi": "\u092f\u0939 \u090f\u0915 \u0935\u093e\u0915\u094d\u092f \u0939\u0948\u0964 " * 30,
    "Urdu": "\u06cc\u06c1 \u0627\u06cc\u06a9 \u062c\u0645\u0644\u06c1 \u06c1\u06d2\u06d4 " * 30,
    "Chinese": "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002\u4f60\u6765\u5417\uff1f" * 50,
    "emoji": "\U0001f600\U0001f603 hi \U0001f469\u200d\U0001f467 bye. \U0001f389 yes! " * 30,
}


@settings(max_examples=100)
@given(name=st.sampled_from(list(TEXTS)), length=st.integers(400, 3000), count=st.integers(1, 3),
       depth=st.floats(0, 1), which=st.sampled_from([0, 1]), seed=st.integers(0, 99))
def test_a_prompt_is_the_text_with_needles_as_sentences_of_their_own(
        two_tokenizers, name, length, count, depth, which, seed):
    tokenizer = two_tokenizers[which]
    text = TEXTS[name]
    haystack = needle.make_haystack(tokenizer, text)
    needles, prompt, questions = needle.draw_trial(tokenizer, haystack, length, count, depth, seed)
    longest = max(len(question) + len(answer) for question, answer in questions)
    assert len(prompt) + longest == length

    shown = tokenizer.decode(prompt)
    for (key, value), (question, answer) in zip(needles, questions, strict=True):
        assert tokenizer.decode(question).strip() == f"The magic number for {key} is"
        assert tokenizer.decode(answer).strip() == f"{value}."
        inserted = f"The magic number for {key} is {value}."
        before, after = shown.split(inserted)
        assert not before.strip() or before[-1].isspace()
        assert not after or after[0].isspace()
        # Taken out, with the space before it and, in Chinese, the one after it, it leaves the text
        # as it was. A short text is repeated.
        shown = before[:-1] + after[name == "Chinese":]
    assert shown.strip() in f" {text}" * 8


class Words:
    """A tokenizer whose tokens are whole words."""

    def encode(self, text):
        return re.findall(r"\w+|\W", text)


def test_a_piece_has_only_its_own_tokens():
    pieces, _ = needle.make_haystack(Words(), "\u5929\u3002bc d. e")
    assert pieces == [(" \u5929\u3002", [" ", "\u5929", "\u3002"]),
                      ("bc d.", ["bc", " ", "d", "."]), (" e", [" ", "e"])]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_depth_0_is_the_start_and_1_is_the_end(depth, bundled):
    _, tokenizer = bundled
    needles, prompt, _ = needle.draw_trial(tokenizer, None, 1000, 1, depth, 0)
    assert prompt[0] == tokenizer.bos_id
    before, after = tokenizer.decode(prompt).split(f"for {needles[0][0]} is {needles[0][1]}.")
    assert len(tokenizer.encode(before)) == pytest.approx(depth * 970, abs=25)
    assert (before == "The magic number ") == (depth == 0)
    assert (after == "") == (depth == 1)


def test_several_needles_are_spread_from_the_depth_on(bundled):
    _, tokenizer = bundled
    needles, prompt, _ = needle.draw_trial(tokenizer, None, 2000, 4, 0.5, 0)
    shown = tokenizer.decode(prompt)
    found = [shown.index(key) / len(shown) for key, _ in needles]
    assert found == pytest.approx([0.5, 0.75, 0, 0.25], abs=0.06)


# -------------------------------------------------------------------------------------------------
# Settings: the rule, then what is published, then what is calibrated, then --set


def config_of(shape):
    """A Config of a published shape, in which little else matters."""
    dim, n_layers, vocab_size, train_len = shape
    return Config(vocab_size=vocab_size, dim=dim, n_layers=n_layers, n_heads=32, n_kv_heads=8,
                  head_dim=128, ffn_dim=1, train_len=train_len, rope_theta=5e5)


LLAMA_3 = config_of(rx.PUBLISHED["Llama-3-8B-Instruct"]["shape"])
UNPUBLISHED = dataclasses.replace(LLAMA_3, train_len=16384, vocab_size=7)
RULE = "the rule for this training length"


@pytest.mark.parametrize("name", RELEASED_SCALES)
def test_published_settings_give_the_released_scales(name):
    published = rx.PUBLISHED[name]
    config = config_of(published["shape"])
    chosen, source, _ = needle.choose("dpe", config, 131072, {}, {})
    assert source == f"published for {name}"
    released = "-".join(str(scale) for scale in RELEASED_SCALES[name])
    assert chosen == dict(window=1024, topk=48, scales=released)

    # Within every effective length, DPE is RoPE.
    shortest = min(published["dpe"]["effective_lengths"])
    chosen, _, method = needle.choose("dpe", config, shortest, {}, {})
    assert chosen["scales"] == "1-1-1-1-1-1-1-1"
    assert needle.coincidence("dpe", chosen, method, config, shortest) is not None
    chosen, _, _ = needle.choose("dpe", config, shortest + 1, {}, {})
    assert set(chosen["scales"]) == set("1-2")


def test_published_models_have_the_shapes_of_their_configurations():
    """(dim, layers, vocabulary, context), as in the config.json of each model."""
    assert {name: published["shape"] for name, published in rx.PUBLISHED.items()} == {
        "Llama-2-7B-Chat": (4096, 32, 32000, 4096),
        "Llama-3-8B-Instruct": (4096, 32, 128256, 8192),
        "Llama-3.1-8B-Instruct": (4096, 32, 128256, 131072),
        "Mistral-7B-Instruct-v0.2": (4096, 32, 32000, 32768),
        "Mistral-7B-Instruct-v0.3": (4096, 32, 32768, 32768),
        "Qwen2.5-7B-Instruct": (3584, 28, 152064, 32768)}


def test_published_mapping_lengths_are_those_of_the_released_constants():
    """Computed by hand for 10,000 tokens; for Llama 3 also the released code's, at two lengths."""
    expected = {"Llama-2-7B-Chat": 1380, "Llama-3-8B-Instruct": 1210,
                "Llama-3.1-8B-Instruct": 7249, "Mistral-7B-Instruct-v0.3": 4794}
    found = {}
    for name, published in rx.PUBLISHED.items():
        if "lampe" in published:
            found[name] = rx.mapping_length(10_000, **published["lampe"]["sigmoid"])
    assert found == expected
    llama_3 = rx.PUBLISHED["Llama-3-8B-Instruct"]["lampe"]["sigmoid"]
    assert rx.mapping_length(32768, **llama_3) == 4501
    assert rx.mapping_length(65536, **llama_3) == 6129  # 6129.9, truncated


CALIBRATED = {
    "dpe": {"settings": {"window": 9, "effective_lengths": [4096, 8192], "topk": 4}},
    "lampe": {"settings": {"s1": 20, "s2": 10,
                           "sigmoid": dict(a=3e-3, b=-25.0, L=5000.0, short_mapping_len=1800,
                                           short_input=8300)}}}


@pytest.mark.parametrize("name, config, l, calibrated, by_hand, expected, source", [
    ("lampe", LLAMA_3, 32768, {}, {}, dict(mapping_len=4501, s1=512, s2=200),
     "published for Llama-3-8B-Instruct"),
    ("lampe", LLAMA_3, 8191, {}, {}, dict(mapping_len=1536, s1=512, s2=200),
     "published for Llama-3-8B-Instruct"),
    ("lampe", UNPUBLISHED, 32768, {}, {}, dict(mapping_len=10240, s1=2048, s2=512), RULE),
    ("lampe", LLAMA_3, 8299, CALIBRATED, {}, dict(mapping_len=1800, s1=20, s2=10),
     "extrapolation.json"),
    ("lampe", LLAMA_3, 8300, CALIBRATED, {}, dict(mapping_len=2375, s1=20, s2=10),
     "extrapolation.json"),
    ("dpe", LLAMA_3, 16384, CALIBRATED, {}, dict(window=9, topk=4, scales="4-2"),
     "extrapolation.json"),
    ("dpe", LLAMA_3, 16384, CALIBRATED, dict(scales="3-5", group=7),
     dict(window=9, topk=4, scales="3-5"), "extrapolation.json and --set"),
    ("rerope", LLAMA_3, 16384, CALIBRATED, {}, dict(window=2048), RULE)])
def test_settings_come_from_the_source_that_has_precedence(name, config, l, calibrated, by_hand,
                                                           expected, source):
    found = needle.choose(name, config, l, calibrated, by_hand)
    assert found[:2] == (expected, source)


@given(train_len=st.integers(64, 9000), length=st.integers(1, 40000))
def test_the_rules_scale_beyond_three_quarters_of_the_training_length(train_len, length):
    n = 4 * train_len
    config = dataclasses.replace(UNPUBLISHED, train_len=n)
    dpe, _, _ = needle.choose("dpe", config, length, {}, {})
    self_extend, _, _ = needle.choose("self-extend", config, length, {}, {})
    fine = -(-length // (3 * train_len))
    coarse = -(-length // train_len)
    assert dpe["window"] == self_extend["window"] == n // 8
    assert self_extend["group"] == fine
    scales = {int(scale) for scale in dpe["scales"].split("-")}
    assert scales <= ({1} if length <= 3 * train_len else {fine, coarse})


def test_the_rule_of_dpe_is_coarse_for_groups_that_complete_a_rotation():
    # SmolLM2's frequencies: wavelengths of 2 pi 10^(5 f / 32) tokens. The slowest of groups 4 and
    # 5 are f = 19 and 23, with 5,849 and 24,665 tokens.
    config = dataclasses.replace(UNPUBLISHED, head_dim=64, rope_theta=1e5, train_len=8192)
    found, _, _ = needle.choose("dpe", config, 16384, {}, {})
    assert found["scales"] == "8-8-8-8-8-3-3-3"


# -------------------------------------------------------------------------------------------------
# Methods that coincide under the settings in force

SMALL = dataclasses.replace(random_llama().config, head_dim=8)  # 4 frequencies


@given(st.sampled_from(list(needle.METHODS)), st.integers(1, 60), st.integers(1, 60),
       st.sampled_from(["1", "3", "3-3", "1-1", "1-2"]), st.sampled_from([4, 2]),
       st.integers(1, 3), st.sampled_from([1.0, 2.0]), st.sampled_from([1.0, 1.5]))
def test_a_method_that_is_called_another_is_that_other(name, length, window, scales, topk, group,
                                                       factor, logit_scale):
    by_hand = dict(window=window, scales=scales, topk=topk, group=group, factor=factor,
                   logit_scale=logit_scale)
    chosen, _, method = needle.choose(name, SMALL, length, {}, by_hand)
    said = needle.coincidence(name, chosen, method, SMALL, length)
    found = rx.relative_positions(method, length)
    plain = rx.relative_positions(rx.rope(), length)
    if found.ndim == 3:
        plain = plain[..., None].expand_as(found)
    same_frequencies = method.frequencies is None or factor == 1
    is_rope = torch.equal(found, plain) and same_frequencies
    scaled = ", with logits multiplied by 1.5" if logit_scale == 1.5 else ""
    assert method.logit_scale == logit_scale
    assert (said == "this is RoPE" + scaled) == is_rope
    if said is not None and not is_rope:
        assert topk == 4
        assert said == "all scales are equal, so this is SelfExtend" + scaled
        other = rx.relative_positions(rx.self_extend(window, int(scales[0])), length)
        assert torch.equal(found, other[..., None].expand_as(found))


@pytest.mark.parametrize("theta, factor", [(1e4, 2.0), (5e5, 16.0), (1e6, 1.0)])
def test_yarn_is_that_of_transformers(theta, factor):
    """The formula of its released code, retyped: a ramp over the index of the frequency."""
    D, n = 128, 8192
    frequencies = rx.rope_frequencies(D, theta)
    first, last = (D * math.log(n / (rotations * 2 * math.pi)) / (2 * math.log(theta))
                   for rotations in (32, 1))
    first, last = max(math.floor(first), 0), min(math.ceil(last), D - 1)
    expected = []
    for f, frequency in enumerate(frequencies.tolist()):
        ramp = min(max((f - first) / (last - first), 0), 1)
        expected.append(frequency / factor * ramp + frequency * (1 - ramp))
    method = rx.yarn(frequencies, factor, n)
    torch.testing.assert_close(method.frequencies, torch.tensor(expected).double())
    assert method.logit_scale == pytest.approx((0.1 * math.log(factor) + 1) ** 2)


# -------------------------------------------------------------------------------------------------
# DPE's key dimensions


def test_key_dimensions_are_each_heads_largest_contributions(bundled):
    model, tokenizer = bundled
    texts = needle.draw_texts(tokenizer, None, model.config.train_len, 0)
    assert [len(text) for text in texts] == [2048, 4096] * 10
    chosen = {}
    for length in (300, 400):
        chosen[length] = {name: needle.choose(name, model.config, length, {}, dict(topk=10))
                          for name in ("dpe", "rope")}
    layers = needle.methods_of_layers(chosen, model, tokenizer, None, 0)
    for length in (300, 400):
        first, second = layers[length]["dpe"]
        assert not torch.equal(first.key_dims, second.key_dims)
        assert (first.key_dims.sum(dim=1) == 10).all()
        assert torch.equal(first.key_dims, layers[300]["dpe"][0].key_dims)
        assert layers[length]["rope"][0].key_dims is None


def test_texts_for_contributions_come_from_the_haystack(bundled):
    _, tokenizer = bundled
    text = sentences(random.Random(0), 40)
    for tokens in needle.draw_texts(tokenizer, text, 50, 0):
        assert len(tokens) == 50
        assert tokenizer.decode(tokens) in text


# -------------------------------------------------------------------------------------------------
# Trials


def test_the_log_likelihood_is_that_of_the_whole_text(bundled):
    model, tokenizer = bundled
    methods = [rx.dpe(20, 3)] * 2
    _, prompt, questions = needle.draw_trial(tokenizer, None, 400, 3, 0.1, 0)
    cache = needle.prefill(model, methods, prompt, 40)
    for question, answer in [*questions, (questions[0][0], questions[1][1])]:
        found = needle.score_answer(model, methods, cache, question, answer)
        whole = torch.tensor([prompt + question + answer])
        logits = model(whole, methods)[0, -len(answer) - 1:-1]
        log_p = logits.log_softmax(-1)[range(len(answer)), whole[0, -len(answer):]]
        assert found == pytest.approx(log_p.sum().item(), abs=1e-3)
        assert cache.length == len(prompt)


def test_the_command_line_writes_what_it_prints(monkeypatch, capsys, tmp_path):
    (tmp_path / "hay.txt").write_text("A bird sang. Rain fell, and nobody minded! " * 30)
    record = run_json(monkeypatch, tmp_path, "--ckpt", TINY, "--method", "rope,lampe",
                      "--len", "400,500,400", "--depths", "0,1,0.0", "--trials", 2,
                      "--needles", 2, "--haystack", tmp_path / "hay.txt", "--seed", 5)
    out = capsys.readouterr().out
    rows = record["results"]
    found = {(row["method"], row["length"], row["depth"], row["trial"]) for row in rows}
    assert len(found) == len(rows) == 16  # equal lengths and depths count once
    lines = [line for line in out.splitlines() if " score " in line]
    for row, line in zip(rows, lines, strict=True):
        assert len(row["answer"]) == len(row["log_likelihood"]) == 2
        right = [value in re.findall(r"\d+", answer)
                 for value, answer in zip(row["expected"], row["answer"], strict=True)]
        assert row["score"] == sum(right) / 2
        assert line.split()[:2] == [row["method"], str(row["length"])]
        assert f"score {row['score']:4.2f}  expected {' '.join(row['expected'])}" in line
    for name, value in dict(seed=5, needles=2, checkpoint=str(TINY), train_len=4096).items():
        assert record[name] == value
    assert record["settings"]["rope at 400"] == {"from": RULE}
    assert [file.name for file in tmp_path.iterdir()].count("out.json") == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_prompts_depend_on_seed_and_trial_not_on_method(monkeypatch, tmp_path):
    run = ["--ckpt", TINY, "--method", "rope,rerope", "--len", "300", "--depths", "1"]
    rows = run_json(monkeypatch, tmp_path, *run, "--trials", 2)["results"]
    expected = [row["expected"] for row in rows]
    assert expected[0] == expected[1] != expected[2] == expected[3]
    again = run_json(monkeypatch, tmp_path, *run, "--trials", 2)["results"]
    assert [row["expected"] for row in again] == expected
    other = run_json(monkeypatch, tmp_path, *run, "--seed", 1)["results"]
    assert other[0]["expected"] != expected[0]


def test_the_header_has_settings_sources_and_simpler_methods(monkeypatch, capsys, uncalibrated):
    (uncalibrated / "extrapolation.json").write_text(json.dumps(CALIBRATED))
    run = ["--ckpt", uncalibrated, "--train-len", 256, "--len", "512", "--depths", "1"]
    assert command(monkeypatch, *run, "--method", "all", "--set", "topk=16,window=9") == 0
    out = capsys.readouterr().out
    assert "trained on 256 tokens" in out
    assert "# dpe at 512: window 9, topk 16, scales 1-1 (extrapolation.json and --set)" in out
    assert "# dpe at 512: this is RoPE" in out
    assert f"# yarn at 512: factor 2.0 ({RULE})" in out
    for name in needle.METHODS:
        assert f"\n{name} " in out


def test_a_method_of_ones_own_is_an_entry_in_a_table(monkeypatch, tmp_path):
    mine = (lambda config, l: dict(window=config.train_len // 4),
            lambda config, l, window: rx.rerope(window))
    monkeypatch.setitem(needle.METHODS, "mine", mine)
    run = ["--ckpt", TINY, "--train-len", "400", "--len", "500", "--depths", "0"]
    record = run_json(monkeypatch, tmp_path, *run, "--method", "rerope,mine", "--set", "window=50")
    theirs, ours = record["results"]
    assert ours["log_likelihood"] == theirs["log_likelihood"]


def test_a_picture_is_drawn_where_plot_says(monkeypatch, tmp_path):
    run = ["--ckpt", TINY, "--method", "rope,dpe", "--len", "100,200", "--depths", "0,1"]
    assert command(monkeypatch, *run, "--plot", tmp_path / "map.png") == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("arguments, named", [
    ("--method foo", "rope, ntk, yarn, self-extend, rerope, dpe, lampe"),
    ("--len 65536,9", "--len 9 is too short"),
    ("--len 512,x", "argument --len"),
    ("--depths 1.5", "--depths from 0 to 1"),
    ("--trials 0", "at least 1"), ("--len 0", "at least 1"), ("--train-len -7", "at least 1"),
    ("--needles 5000", "--needles 5000 is too many"),
    ("--ckpt nowhere", "nowhere is not a directory"),
    ("--haystack missing.txt", "missing.txt"),
    ("--haystack empty.txt", "empty.txt is empty"),
    ("--haystack latin1.txt", "latin1.txt is not UTF-8"),
    ("--device cuda:99", "--device cuda:99 cannot be used"),
    ("--device abacus", "--device abacus cannot be used"),
    ("--plot missing/map.png", "missing"), ("--plot map.xyz", "must end with .png or .svg"),
    ("--set logit_scale=0", "must be a positive number"),
    ("--set window=x", "argument --set"),
    ("--set window=9.5", "argument --set"),
    ("--set speed=3", "--set speed is not a setting of dpe"),
    ("--set window=0", "dpe does not work with"),
    ("--set scales=4.5", "dpe does not work with"),
    ("--set topk=17", "heads have 16 frequencies"),
    ("--set s1=-1 --method lampe", "lampe does not work with")])
def test_bad_input_gets_one_sentence_and_exit_code_2(arguments, named, monkeypatch, capsys,
                                                     tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    files = set(tmp_path.iterdir())
    assert command(monkeypatch, "--ckpt", TINY, "--json", "out.json", *arguments.split()) == 2
    sentence = refused(capsys)
    assert sentence.startswith("needle.py: ")
    assert named in sentence
    assert set(tmp_path.iterdir()) == files


def test_results_that_cannot_be_written_are_refused_first(monkeypatch, capsys, tmp_path):
    file = tmp_path / "no" / "where.json"
    assert command(monkeypatch, "--ckpt", TINY, "--len", "300", "--json", file) == 2
    assert "where.json cannot be written" in refused(capsys)


@pytest.mark.parametrize("content, named", [
    ("{", "cannot be read as JSON"), ('{"dpe": {"window": 4, "topk": 3}}', "earlier version"),
    ('{"dpe": {"settings": {"window": 4}}}', "dpe does not work with"),
    ('{"dpe": {"settings": {"window": 4, "effective_lengths": [0]}}}', "dpe does not work with"),
    ('{"dpe": {"settings": {"window": 4, "scales": "1-0"}}}', "dpe does not work with"),
    ('{"dpe": {"settings": {"window": 4, "scales": "1", "speed": 1}}}', "dpe does not work with")])
def test_unusable_calibrated_settings_are_refused(content, named, monkeypatch, capsys,
                                                  uncalibrated):
    (uncalibrated / "extrapolation.json").write_text(content)
    assert command(monkeypatch, "--ckpt", uncalibrated, "--len", "300") == 2
    assert named in refused(capsys)


def overflowing(path, load_model=load_model):
    """The bundled model with a feed-forward layer that overflows in float16, and only there."""
    model = load_model(path).half()
    model.layers[0].feed_forward.w1.weight.mul_(3e4)
    model.layers[0].feed_forward.w2.weight.div_(3e4)
    return model


def test_logits_that_are_not_finite_are_no_score(monkeypatch, capsys, tmp_path):
    run = ["--ckpt", TINY, "--len", "300", "--json", tmp_path / "out.json"]

    def main():
        needle.main(load_model=lambda path, device, dtype: overflowing(path))
    assert command(monkeypatch, *run, main=main) == 2
    assert "not finite in torch.float16; use --dtype" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_tokenizer_of_another_model_is_refused(monkeypatch, capsys, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(TINY / name)
    write_byte_level_tokenizer(tmp_path, special=[f"<{n}>" for n in range(744)], bos="<743>")
    assert command(monkeypatch, "--ckpt", tmp_path, "--len", "400") == 2
    assert "the tokenizer belongs to another model" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------
# Runs that end early, and runs at the same time


def rows_of(file):
    if not file.exists():
        return []
    return json.loads(file.read_text())["results"]


def start(file, trials, **environment):
    run = [sys.executable, TINY.parent / "needle.py", "--device", "cpu", "--len", "300"]
    run += ["--depths", "0,1", "--trials", str(trials), "--json", file]
    return subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={"PYTHONIOENCODING": "ascii", **environment},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.parametrize("kill, code, said", [
    (signal.SIGINT, 130, "needle.py: interrupted\n"), (signal.SIGKILL, -signal.SIGKILL, "")])
def test_killed_in_mid_run_it_leaves_whole_rows(kill, code, said, tmp_path):
    file = tmp_path / "out.json"
    process = start(file, 9999)
    deadline = time.time() + 240
    while not rows_of(file) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(kill)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, said)
    assert rows_of(file)
    process = start(file, 1)  # what a killed run leaves blocks nobody
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(rows_of(file)) == 2


def test_no_run_loses_the_rows_of_another(tmp_path):
    file = tmp_path / "out.json"
    runs = [start(file, 10), start(file, 10)]
    errors = [process.communicate(timeout=240)[1] for process in runs]
    assert sorted(process.returncode for process in runs) == [0, 2]
    assert "another process has written" in "".join(errors)
    kept = [rows_of(found) for found in tmp_path.glob("out.json*")]
    assert sorted(len(rows) for rows in kept)[-1] == 20
    assert all(kept)


def test_what_is_no_lack_of_memory_is_not_called_one(monkeypatch, capsys):
    def fail(path, device, dtype):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.")

    def crash(path, device, dtype):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    assert command(monkeypatch, "--ckpt", TINY, main=lambda: needle.main(fail)) == 2
    assert "out of memory; try a shorter --len" in refused(capsys)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        command(monkeypatch, "--ckpt", TINY, main=lambda: needle.main(crash))


# -------------------------------------------------------------------------------------------------
# The bundled model


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length, expected", [
    (4096, {"rope": 1, "dpe": 1, "lampe": 1}), (16384, {"rope": 0, "dpe": 1, "lampe": 1})])
def test_past_its_training_length_dpe_and_lampe_answer_alone(device, length, expected, monkeypatch,
                                                             tmp_path):
    record = run_json(monkeypatch, tmp_path, "--ckpt", TINY, "--method", "rope,dpe,lampe",
                      "--len", length, "--depths", "0.1", "--needles", 4, "--device", device)
    assert {row["method"]: row["score"] for row in record["results"]} == expected
