"""What the methods promise about positions, as properties over windows, scales, lengths and shapes.

    pytest

The oracle is at the top: a Llama in float64 numpy that scores every pair by the relative position that the papers'
formulas give it, one pair of coordinates at a time. It rotates nothing, knows no bands and forms its own frequencies.
"""
import base64
import dataclasses
import functools
import importlib
import itertools
import json
import math
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

import load_llama
import needle
import rope_extrap as rx
from load_llama import load_model, load_tokenizer
from model import Config, KVCache, Llama, RopeScaling, generate, queries_and_keys

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")

TINY = Path(__file__).resolve().parent / "tiny"
windows, scales, lengths = st.integers(1, 40), st.integers(1, 40), st.integers(1, 60)


def matrix(method, length):
    """relative_positions with a last dimension of frequencies, as int64 numpy."""
    rel = rx.relative_positions(method, length)
    return (rel[..., None] if rel.ndim == 2 else rel).numpy()


def distances(length):
    return np.subtract.outer(np.arange(length), np.arange(length))


# ---------------------------------------------------------------------------------------------------------------------
# The papers' formulas, pair by pair


def dpe_formula(i, j, w, s):
    return i - j if i - j < w else i // s - j // s + w - w // s


def lampe_formula(i, j, l, ramp, s1, s2):
    d, m = i - j, s1 + s2 + (l - s1 - s2) * ramp // l
    if ramp >= l or l < 2 * s1 or s1 + s2 >= l or d <= s1:
        return d
    return i * ramp // l - j * ramp // l + s1 - s1 * ramp // l if d < l - s2 else d - (l - m)


def formula_matrix(formula, length, *values):
    return np.array([[formula(i, j, *values) if j <= i else 0 for j in range(length)] for i in range(length)])


def formula_frequencies(config):
    """RoPE's frequencies by the formula, and Llama 3.1's change of them by wavelength, as its release states it."""
    frequencies, r = [], config.rope_scaling
    for f in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * f / config.head_dim)
        if r is not None:
            wavelength = 2 * math.pi / frequency
            if wavelength > r.original_len / r.low_freq_factor:
                frequency /= r.factor
            elif wavelength > r.original_len / r.high_freq_factor:
                smooth = (r.original_len / wavelength - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor)
                frequency *= (1 - smooth) / r.factor + smooth
        frequencies.append(frequency)
    return np.array(frequencies)


def oracle_logits(weights, config, tokens, rel, temperature=1.0):
    """Logits (T, vocab). rel: per layer, relative positions that broadcast to (heads, T, T, D/2)."""
    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weight

    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    T, D, n_rep = len(tokens), config.head_dim, config.n_heads // config.n_kv_heads
    frequencies = formula_frequencies(config)
    x = w["tok_embeddings.weight"][tokens]
    for n in range(config.n_layers):
        p = f"layers.{n}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = ((h @ w[p + f"attention.{name}.weight"].T + w.get(p + f"attention.{name}.bias", 0)).reshape(T, -1, D)
                   for name in ("wq", "wk", "wv"))
        angle = np.broadcast_to(rel[n], (config.n_heads, T, T, D // 2)) * frequencies
        out = np.zeros_like(q)
        for head in range(config.n_heads):
            q1, q2 = q[:, None, head, ::2], q[:, None, head, 1::2]
            k1, k2 = k[None, :, head // n_rep, ::2], k[None, :, head // n_rep, 1::2]
            cos, sin = np.cos(angle[head]), np.sin(angle[head])
            scores = ((q1 * k1 + q2 * k2) * cos + (q1 * k2 - q2 * k1) * sin).sum(-1) * temperature / math.sqrt(D)
            scores[distances(T) < 0] = -np.inf
            e = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = e / e.sum(-1, keepdims=True) @ v[:, head // n_rep]
        x = x + out.reshape(T, -1) @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        gate = h @ w[p + "feed_forward.w1.weight"].T
        up = gate / (1 + np.exp(-gate)) * (h @ w[p + "feed_forward.w3.weight"].T)
        x = x + up @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w.get("output.weight", w["tok_embeddings.weight"]).T


def random_llama(seed=0, **changes):
    """Two layers, grouped-query attention, and weights large enough that attention is far from uniform."""
    shape = dict(vocab_size=48, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=96, train_len=64)
    c = Config(**shape | dict(rope_theta=500000.0) | changes)
    model = Llama(c).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 3.0 if "wq" in name or "wk" in name else 1.0
        mean, std = (1.0, 0.1) if "norm" in name else (0.0, std / math.sqrt(parameter.shape[-1]))
        parameter.normal_(mean, std, generator=generator)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# RoPE


@given(st.integers(1, 16), st.integers(0, 2 ** 17), st.integers(0, 2 ** 17), st.integers(0, 2 ** 32))
def test_rotation_keeps_norms_and_scores_see_differences_only(half, a, b, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 2 * half, generator=g)
    f = rx.rope_frequencies(2 * half, 10000.0)

    def at(x, position):
        return rx.rotate(x, rx.cis(torch.tensor([[position]]), f))
    torch.testing.assert_close(at(q, a).norm(), q.norm())
    torch.testing.assert_close(at(q, 0), q)
    torch.testing.assert_close((at(q, a + b) * at(k, b)).sum(), (at(q, a) * k).sum(), atol=1e-4, rtol=1e-4)


def test_rotation_turns_each_pair_by_position_times_frequency():
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4)  # pairs (0, 1) and (2, 3)
    turn = rx.cis(torch.tensor([[3]]), torch.tensor([1.0, 0.1]))
    expected = [math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)]
    torch.testing.assert_close(rx.rotate(x, turn).flatten(), torch.tensor(expected))
    assert rx.rotate(x.bfloat16(), turn).dtype == torch.bfloat16


@given(st.integers(1, 64), st.floats(100, 1e6))
def test_frequencies_fall_from_one_to_nearly_one_over_theta(half, theta):
    f = rx.rope_frequencies(2 * half, theta)
    np.testing.assert_allclose(f, [theta ** (-2 * n / (2 * half)) for n in range(half)])


# ---------------------------------------------------------------------------------------------------------------------
# Every method

masks = st.none() | st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=4, max_size=4).map(torch.tensor)
some_method = st.one_of(
    st.just(rx.rope()), st.builds(rx.rerope, windows), st.builds(rx.self_extend, windows, scales),
    st.builds(rx.dpe, windows, scales | st.lists(scales, min_size=4, max_size=4), masks),
    st.builds(rx.lampe, lengths, lengths, st.integers(0, 30), st.integers(0, 30)),
    st.builds(rx.yarn, st.just(rx.rope_frequencies(8, 100.0)), st.floats(1, 8), lengths))


@given(some_method)
def test_bands_partition_the_distances(method):
    assert method.bands[0].near == 0 and method.bands[-1].far is None
    for band, following in zip(method.bands, method.bands[1:]):
        assert band.near < band.far == following.near


@given(some_method, lengths)
def test_a_token_sees_itself_at_zero_and_nothing_later(method, length):
    rel = matrix(method, length)
    assert (rel >= 0).all()
    assert (rel[..., distances(length) <= 0, :] == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# DPE


@given(windows, scales, lengths)
def test_dpe_is_its_formula(w, s, length):
    np.testing.assert_array_equal(matrix(rx.dpe(w, s), length)[..., 0], formula_matrix(dpe_formula, length, w, s))


@given(windows, st.lists(scales, min_size=1, max_size=6), lengths)
def test_each_dimension_of_dpe_is_selfextend_with_its_own_scale(w, s, length):
    rel = matrix(rx.dpe(w, s), length)
    for f, scale in enumerate(s):
        np.testing.assert_array_equal(rel[..., f], matrix(rx.self_extend(w, scale), length)[..., 0])


@given(windows, lengths)
def test_dpe_between_its_limits_scale_1_is_rope_and_without_end_rerope(w, length):
    rel = matrix(rx.rerope(w), length)
    np.testing.assert_array_equal(matrix(rx.dpe(w, 1), length), matrix(rx.rope(), length))
    np.testing.assert_array_equal(rel, matrix(rx.dpe(w, 1000), length))
    np.testing.assert_array_equal(rel[..., 0], np.clip(distances(length), 0, w))


@given(windows, scales, lengths, st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=3, max_size=3))
def test_dpe_leaves_dimensions_that_are_not_key_at_their_distance(w, s, length, key):
    rel = matrix(rx.dpe(w, s, torch.tensor(key)), length)  # (heads, T, T, D/2)
    plain, scaled = (matrix(method, length)[..., 0] for method in (rx.rope(), rx.dpe(w, s)))
    for head in range(3):
        for f in range(5):
            np.testing.assert_array_equal(rel[head, :, :, f], scaled if key[head][f] else plain)


@given(windows, scales, lengths)
def test_dpe_lies_0_to_2_above_the_papers_matrix_and_never_falls(w, s, length):
    d, rel = distances(length), matrix(rx.dpe(w, s), length)[..., 0]
    paper = np.where(d < w, d, (d - w) // s + w)
    above = (rel - paper)[d >= 0]
    assert above.min() >= 0 and above.max() <= (1 if w % s == 0 else 2)
    for i, row in enumerate(rel):  # a fixed query, keys further and further away
        steps = np.diff(row[:i + 1][::-1])
        assert (steps >= 0).all() and (steps <= 2).all()


def test_the_matrices_of_dpes_figure_1c():
    for s, drawn in ((3, [4, 4, 4, 3, 3, 3, 2, 1, 0]), (2, [5, 5, 4, 4, 3, 3, 2, 1, 0])):  # the last rows, 9 tokens
        row = matrix(rx.dpe(3, s), 9)[8, :, 0]
        assert np.isin(row - drawn, [0, 1] if s == 3 else [0, 1, 2]).all() and row[-3:].tolist() == [2, 1, 0]
    assert matrix(rx.dpe(3, 3), 9)[8, :, 0].tolist() == [4, 4, 4, 3, 3, 3, 2, 1, 0]  # 3 divides the window, and 9


@pytest.mark.parametrize("window, scale", [(0, 2), (3, 0), (3, [1, -1]), (3, [1.5]), (3, []), (3, [[2, 2]])])
def test_dpe_refuses_windows_and_scales_that_are_none(window, scale):
    with pytest.raises(ValueError, match="at least 1"):
        rx.dpe(window, scale)


@given(st.lists(st.integers(1, 10 ** 6), min_size=1, max_size=8), st.integers(1, 10 ** 6))
def test_scales_bring_a_length_within_each_effective_length_and_no_further(effective, length):
    for s, tokens in zip(rx.dpe_scales(effective, length), effective, strict=True):
        assert s >= 1 and length <= s * tokens and (s == 1 or length > (s - 1) * tokens)


def test_the_released_scales_are_those_of_131072_tokens():
    rows = {name: row["dpe"] for name, row in rx.PUBLISHED.items() if "dpe" in row}
    assert {name: rx.dpe_scales(row["effective"], 131072) for name, row in rows.items()} == {
        "Llama-3-8B-Instruct": [4, 4, 2, 16, 32, 32, 16, 128], "Llama-3.1-8B-Instruct": [2, 32, 32, 2, 2, 2, 2, 1],
        "Mistral-7B-Instruct-v0.2": [4, 16, 2, 16, 32, 16, 16, 2], "Qwen2.5-7B-Instruct": [2, 16, 8, 8, 32, 8, 2, 4]}


# ---------------------------------------------------------------------------------------------------------------------
# LaMPE

lampe_settings = st.tuples(lengths, lengths, st.integers(0, 30), st.integers(0, 30))  # l, ramp, s1, s2


@given(lampe_settings)
def test_lampe_is_its_formula(values):
    expected = formula_matrix(lampe_formula, values[0], *values)
    np.testing.assert_array_equal(matrix(rx.lampe(*values), values[0])[..., 0], expected)


@given(lampe_settings)
def test_lampes_ends_are_exact_and_nothing_passes_m(values):
    l, ramp, s1, s2 = values
    d, rel = distances(l), matrix(rx.lampe(*values), l)[..., 0]
    compresses = ramp < l and l >= 2 * s1 and s1 + s2 < l
    m = s1 + s2 + (l - s1 - s2) * ramp // l if compresses else l
    head, tail = (d >= 0) & (d <= s1), d >= (l - s2 if compresses else 0)
    np.testing.assert_array_equal(rel[head], d[head])
    np.testing.assert_array_equal(rel[tail], (d - (l - m))[tail])
    assert rel.max() <= m


@given(lampe_settings)
def test_lampe_never_falls_with_distance_but_by_2_where_the_tail_begins(values):
    l, _, _, s2 = values
    for i, row in enumerate(matrix(rx.lampe(*values), l)[..., 0]):
        steps = np.diff(row[:i + 1][::-1])  # steps[d] leads from distance d to d + 1
        assert (steps >= [-2 if d + 1 == l - s2 else 0 for d in range(i)]).all()


@given(lampe_settings)
def test_lampe_lies_0_to_2_above_the_papers_matrix(values):
    l, ramp, s1, s2 = values
    d, rel = distances(l), matrix(rx.lampe(*values), l)[..., 0]
    middle = (d > s1) & (d < l - s2)
    if ramp < l and l >= 2 * s1 and middle.any():
        above = (rel - np.floor(ramp / l * (d - s1) + s1 + 1e-9))[middle]
        assert above.min() >= 0 and above.max() <= 2


@given(lengths, st.integers(0, 30), st.integers(0, 30))
def test_lampe_without_compression_is_rope(l, s1, s2):
    np.testing.assert_array_equal(matrix(rx.lampe(l, l, s1, s2), l), matrix(rx.rope(), l))
    short = 2 * s1 + 1
    np.testing.assert_array_equal(matrix(rx.lampe(short, 1, s1 + 1, s2), short), matrix(rx.rope(), short))


LLAMA_3_8B = (0.00010493097327094324, -2.466638011138158, 6204.409324666837)


def test_lampes_ramp_for_llama_3_8b():
    assert rx.lampe_ramp(32768, *LLAMA_3_8B) == 4501
    assert rx.lampe_ramp(65536, *LLAMA_3_8B) == 6129  # 6129.9, truncated
    assert [rx.lampe_ramp(length, *LLAMA_3_8B, 1536) for length in (8191, 8192)] == [1536, 1036]


@given(st.integers(1, 10 ** 6), st.integers(1, 10 ** 5))
def test_lampes_ramp_grows_with_length_and_stays_below_L(length, more):
    ramp = rx.lampe_ramp(length, *LLAMA_3_8B)
    assert 0 < ramp <= rx.lampe_ramp(length + more, *LLAMA_3_8B) < LLAMA_3_8B[2]


def test_lampes_temperature_is_constant():
    for length in (10, 10000):
        assert rx.lampe(length, 100, 8, 8).temperature == pytest.approx(1.1434, abs=1e-4)


@pytest.mark.parametrize("values", [(0, 1, 0, 0), (9, 0, 0, 0), (9, 3, -1, 0), (9, 3, 0, -1)])
def test_lampe_refuses_lengths_that_are_none(values):
    with pytest.raises(ValueError, match="at least"):
        rx.lampe(*values)


# ---------------------------------------------------------------------------------------------------------------------
# The frequency baselines


@given(st.integers(2, 64), st.floats(1, 100))
def test_ntk_is_rope_with_a_larger_theta(half, s):
    D = 2 * half
    expected = rx.rope_frequencies(D, 10000.0 * s ** (D / (D - 2)))
    torch.testing.assert_close(rx.ntk(rx.rope_frequencies(D, 10000.0), s).frequencies, expected)


@given(st.floats(1, 100))
def test_yarn_keeps_fast_frequencies_and_divides_slow_ones(s):
    f = rx.rope_frequencies(128, 10000.0)
    method, rotations = rx.yarn(f, s, 4096), 4096 * f / (2 * math.pi)
    torch.testing.assert_close(method.frequencies[rotations >= 32], f[rotations >= 32])
    torch.testing.assert_close(method.frequencies[rotations <= 1], f[rotations <= 1] / s)
    assert ((method.frequencies <= f * (1 + 1e-9)) & (method.frequencies >= f / s * (1 - 1e-9))).all()
    assert method.temperature == (0.1 * math.log(s) + 1) ** 2


# ---------------------------------------------------------------------------------------------------------------------
# The papers' procedures


def answers(rng, mean, n=40, noise=1e-3):
    return torch.tensor([mean + rng.gauss(0, noise) for _ in range(n)])


@given(st.lists(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=1, max_size=10), st.sampled_from([4, 32]))
def test_detection_finds_the_longest_effective_length_of_each_group(planted, background):
    rng, candidates = random.Random(0), [1, 2, 4, 8, 16, 32, 64]

    def score(scales):  # every group gets worse below its scale, and a little beyond the noise above it
        assert sum(s != background for s in scales) <= 1
        steps = [math.log2(s / best) for s, best in zip(scales, planted)]
        return answers(rng, -sum(max(-step, 0.1 * step) for step in steps))
    found, table = rx.detect_scales(score, len(planted), candidates, background)
    assert found == planted and [len(row) for row in table] == [7] * len(planted)


def test_what_noise_cannot_tell_apart_works_at_every_length():
    rng = random.Random(1)
    difficulty = torch.randn(40, generator=torch.Generator().manual_seed(0))  # of the questions: cancels in pairs
    found, _ = rx.detect_scales(lambda scales: difficulty + answers(rng, 0.0), 4, [1, 2, 4], 2)
    assert found == [1, 1, 1, 1]
    found, _ = rx.detect_scales(lambda scales: difficulty + answers(rng, -0.02 * (scales[0] < 4)), 1, [1, 2, 4, 8], 2)
    assert found == [4]
    assert rx.detect_scales(lambda scales: answers(rng, -0.005 * scales[0], noise=0), 1, [1, 2], 1)[0] == [1]
    assert rx.detect_scales(lambda scales: answers(rng, 0.005 * scales[0], noise=0), 1, [1, 2, 4], 1)[0] == [2]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 9), st.integers(0, 99))
def test_key_dimensions_are_the_planted_pairs_of_each_head(n_rep, kv_heads, half, count, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.rand(7, heads, 2 * half, generator=g) + 1 for heads in (n_rep * kv_heads, kv_heads))
    planted = torch.rand(n_rep * kv_heads, half, generator=g).argsort(dim=-1) < count
    q = torch.where(planted.repeat_interleave(2, dim=1), 10 * q, q)  # both coordinates of the pair (2f, 2f + 1)
    assert torch.equal(rx.key_dimensions(rx.contribution(q, k), count), planted)


def test_key_dimensions_weigh_queries_with_the_keys_they_read():
    q, k = torch.ones(5, 4, 8), torch.ones(5, 2, 8)
    k[:, 0, [2, 3]], k[:, 1, [4, 5]] = 3, 3  # KV head 0 serves heads 0 and 1
    assert rx.key_dimensions(rx.contribution(q, k), 1).nonzero().tolist() == [[0, 1], [1, 1], [2, 2], [3, 2]]
    assert rx.key_dimensions(torch.ones(1, 4), 2).tolist() == [[True, True, False, False]]  # of equals the faster


def sigmoid(l, a, b, L):
    return L / (1 + math.exp(-(a * l + b)))


@given(a=st.floats(5e-5, 1.5e-4), b=st.floats(-3, 0), L=st.floats(500, 90000), count=st.integers(4, 10))
def test_the_ramps_fit_gives_back_a_planted_sigmoid(a, b, L, count):
    lengths = [131072 * (n + 1) // count for n in range(count)]
    found = rx.fit_ramp(lengths, [sigmoid(l, a, b, L) for l in lengths])
    assert found == pytest.approx((a, b, L), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("key", [key for key in rx.PUBLISHED if "lampe" in rx.PUBLISHED[key]])
def test_seven_points_of_a_published_ramp_give_it_back(key):
    curve = [rx.PUBLISHED[key]["lampe"][name] for name in ("a", "b", "L")]
    lengths = [131072 * n // 7 for n in range(1, 8)]
    assert rx.fit_ramp(lengths, [sigmoid(l, *curve) for l in lengths]) == pytest.approx(curve, rel=1e-6)
    assert rx.fit_ramp(lengths, [rx.lampe_ramp(l, *curve) for l in lengths]) == pytest.approx(curve, rel=0.01)


@given(seed=st.integers(0, 999))
def test_the_ramps_fit_survives_noise_and_weighs_points_by_their_errors(seed):
    curve, rng = (0.0001, -2.5, 6200.0), random.Random(seed)
    lengths = [131072 * n // 28 for n in range(1, 29)]
    noisy = [sigmoid(l, *curve) * rng.uniform(0.95, 1.05) for l in lengths]
    assert rx.fit_ramp(lengths, noisy) == pytest.approx(curve, rel=0.1)
    wrong = [ramp * (3 if n == seed % 28 else 1) for n, ramp in enumerate(noisy)]
    errors = [1e6 if n == seed % 28 else 100.0 for n in range(28)]
    assert rx.fit_ramp(lengths, wrong, errors) == pytest.approx(curve, rel=0.12)


@pytest.mark.parametrize("lengths, ramps", [
    ([4096, 8192], [100, 200]), ([4096, 4096, 8192], [1, 1, 2]), ([1, 2, 3], [5, 5, 5]), ([3, 1, 2], [1, 3, 2])])
def test_a_ramp_that_nothing_tells_is_refused(lengths, ramps):
    with pytest.raises(ValueError, match="3 lengths or more and ramps that grow"):
        rx.fit_ramp(lengths, ramps)


# ---------------------------------------------------------------------------------------------------------------------
# Attention

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def stretched(factors):
    """A method of one's own."""
    return rx.Method([rx.Band(0, 3, rx.index, rx.index),
                      rx.Band(3, None, lambda i: i * torch.tensor(factors), lambda j: j * torch.tensor(factors))])


own_method = st.builds(stretched, st.lists(scales, min_size=4, max_size=4) | st.lists(scales, min_size=1, max_size=1))


@given(st.data(), some_method | own_method, lengths, st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]),
       st.integers(0, 2 ** 32))
def test_fast_attention_is_dense_attention(data, method, S, batch, kv_heads, seed):
    T = data.draw(st.integers(1, S))
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, n, 8, generator=g) for heads, n in ((4, T), (kv_heads, S), (kv_heads, S)))
    f = rx.rope_frequencies(8, 100.0)
    torch.testing.assert_close(rx.attend(q, k, v, method, f), rx.attend_dense(q, k, v, method, f), atol=1e-5, rtol=1e-5)


@given(some_method, st.integers(1, 30), st.integers(0, 2 ** 32))
def test_dense_attention_sees_relative_positions_and_nothing_else(method, T, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 4, T, 8, generator=g, dtype=torch.float64)
    f = rx.rope_frequencies(8, 100.0) if method.frequencies is None else method.frequencies
    angle = torch.from_numpy(matrix(method, T)) * f  # (T, T, 1 or D/2) or (heads, T, T, D/2)
    z, y = (torch.view_as_complex(x.unflatten(-1, (-1, 2))) for x in (q, k))
    logits = (z[:, :, :, None] * y.conj()[:, :, None] * torch.polar(torch.ones_like(angle), angle)).real.sum(-1)
    logits = (logits * method.temperature / math.sqrt(8)).masked_fill(torch.from_numpy(distances(T) < 0), -torch.inf)
    expected = logits.softmax(-1) @ v
    dense = rx.attend_dense(q, k, v, method, rx.rope_frequencies(8, 100.0))
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [rx.rope(), rx.dpe(128, 7), rx.dpe(100, 5, torch.arange(32).view(2, 16) % 3 < 2),
                                    rx.lampe(1000, 300, 128, 64)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("device", DEVICES)
def test_fast_attention_is_dense_attention_at_a_thousand_tokens(method, dtype, tolerance, device):
    q, k, v = torch.randn(3, 1, 2, 1013, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    f = rx.rope_frequencies(32, 10000.0)
    exact = rx.attend_dense(*(x.double() for x in (q, k, v)), method, f)
    torch.testing.assert_close(rx.attend(q, k, v, method, f).double(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("method", [rx.rope(), rx.rerope(1), rx.dpe(7, [3, 5]), rx.lampe(9000, 700, 300, 9),
                                    rx.dpe(3000, [4, 5], torch.tensor([[True, False], [False, True]]))])
def test_fast_attention_is_dense_attention_beyond_every_slice(method):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(1, 2, 17001, 4, generator=g), *torch.randn(2, 1, 1, 17001, 4, generator=g)
    f = rx.rope_frequencies(4, 10000.0)
    fast = rx.attend(q, k, v, method, f)
    for start, stop in ((4000, 4100), (8100, 8300), (16300, 16500), (16901, 17001)):  # as the last of a shorter text
        some = rx.attend_dense(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], method, f)
        torch.testing.assert_close(fast[:, :, start:stop], some, atol=1e-5, rtol=1e-5)
    decoded = rx.attend(q[:, :, -1:], k, v, method, f)
    torch.testing.assert_close(decoded, fast[:, :, -1:], atol=1e-5, rtol=1e-5)


def attention_beside_a_sink(sink, dtype, seed, T=400, D=64):
    """q, k, v of 4 heads and 2 KV heads. Every query gives the first key about `sink` logits; its value is 0."""
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, T, D, generator=g) for heads in (4, 2, 2))
    q[..., -2:], k[..., -2:] = torch.tensor([4.0, 0.0]), 0  # the slowest pair, kept for the sink
    k[:, :, 0], v[:, :, 0] = 0, 0
    k[:, :, 0, -2] = sink * math.sqrt(D) / 4
    return [x.to(dtype) for x in (q, k, v)]


@settings(max_examples=12)
@given(st.floats(0, 12), st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 99), st.integers(8, 350),
       st.integers(2, 9))
def test_half_precision_beside_an_attention_sink_is_as_exact_as_ropes(sink, dtype, seed, window, scale):
    q, k, v = attention_beside_a_sink(sink, dtype, seed)
    T, f = q.shape[2], rx.rope_frequencies(64, 500000.0)
    key = torch.rand(4, 32, generator=torch.Generator().manual_seed(seed)) < 0.75

    def errors(method):  # relative, of each row: median and 99th percentile, in a prefill and in decoding
        exact = rx.attend_dense(*(x.double() for x in (q, k, v)), method, f)
        rows = [rx.attend(q[:, :, n:n + 1], k[:, :, :n + 1], v[:, :, :n + 1], method, f) for n in range(T - 50, T)]
        found = []
        for fast in (rx.attend(q, k, v, method, f), torch.cat(rows, dim=2)):
            error = (fast.double() - exact[:, :, -fast.shape[2]:]).norm(dim=-1)[:, :, 1 - T:]  # the first row is 0
            relative = error / exact[:, :, -error.shape[2]:].norm(dim=-1)
            found += relative.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
        return torch.tensor(found)
    bound = 1.5 * errors(rx.rope())
    for method in (rx.dpe(window, scale), rx.dpe(window, scale, key), rx.self_extend(window, scale), rx.rerope(window),
                   rx.lampe(T, T // scale, min(window, T // 3), 50, temperature=1.0)):
        assert (errors(method) <= bound).all(), (errors(method) / errors(rx.rope()))


@given(st.integers(1, 600), st.integers(1, 600), st.booleans(), st.integers(0, 2 ** 32))
def test_the_blockwise_softmax_is_the_kernel(T, S, is_causal, seed):
    g, S = torch.Generator().manual_seed(seed), T if is_causal else S
    q, k, v = (torch.randn(2, 2, n, 4, generator=g) for n in (T, S, S))
    out, lse = rx.blockwise_attention(q, k, v, 0.5, is_causal)
    kernel_out, kernel_lse = rx.fused_attention(q, k, v, 0.5, is_causal)
    torch.testing.assert_close(out, kernel_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, kernel_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, D", [
    (torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.bfloat16, 320),
    (torch.float32, 12), (torch.bfloat16, 12)])
@pytest.mark.parametrize("T, S, is_causal", [(1, 77, False), (77, 77, True), (40, 77, False), (1, 1, True)])
def test_every_kernel_is_softmax_attention_and_its_log_sum_exp(device, dtype, D, T, S, is_causal):
    """On CUDA: flash attention with fewer KV heads than heads, efficient attention, and blockwise where none fits."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, D, generator=g).to(device, dtype) for heads, n in ((4, T), (2, S), (2, S)))
    out, lse = rx.fused_attention(q, k, v, 0.1, is_causal)
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    logits = q.double() @ k.mT * 0.1
    if is_causal:
        logits = logits.masked_fill(torch.ones(T, S, dtype=torch.bool, device=device).triu(1), -torch.inf)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), logits.softmax(-1) @ v, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=tolerance, rtol=0)
    assert out.dtype == dtype and lse.dtype == torch.float32


@pytest.mark.parametrize("method", [
    rx.dpe(2, [4, 4, 2, 16, 32, 32, 16, 128]), rx.dpe(2, 3, torch.ones(3, 16, dtype=torch.bool)),
    rx.dpe(2, [2] * 4, torch.ones(4, 4, dtype=torch.bool)), rx.ntk(rx.rope_frequencies(8, 1e4), 2.0)])
def test_a_method_for_other_heads_is_refused_in_words(method):
    with pytest.raises(ValueError, match="do not fit"):
        random_llama()(torch.zeros(1, 5, dtype=torch.int64), [method] * 2)


def test_python_rope_extrap_prints_the_papers_matrices_and_what_was_released(capsys):
    runpy.run_path(rx.__file__, run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    for s, drawn in ((3, "4  4  4  3  3  3  2  1  0"), (2, "5  5  4  4  3  3  2  1  0")):
        rows = lines[lines.index(f"scale {s}") + 1:][:9]
        assert rows[-1].strip().startswith(drawn)
        above = [(i, j) for i in range(9) for j in range(i - 2) if dpe_formula(i, j, 3, s) != (i - j - 3) // s + 3]
        assert sum(row.count("*") for row in rows) == len(above) > 0
    start = next(n for n, line in enumerate(lines) if line.startswith("LaMPE's three regions")) + 2
    shown = [line.split() for line in lines[start:start + 16]]
    assert [cell.count("(") - cell.count("[") for cell in shown[15]] == [-1] * 4 + [1] * 8 + [0] * 4
    assert [int(cell.strip("()[]")) for cell in shown[15]] == [lampe_formula(15, j, 16, 6, 3, 4) for j in range(16)]
    start = lines.index("Llama-3-8B-Instruct")
    assert [line.split() for line in lines[start + 1:start + 7:5]] == [
        ["4,096", "1-1-1-1-1-1-1-4", "1536"], ["131,072", "4-4-2-16-32-32-16-128", "6204"]]
    said = (TINY.parent / "README.md").read_text(encoding="utf-8")
    for name, length, *quoted in (("Llama-3-8B-Instruct", "8,192", "1-1-1-1-2-2-1-8"),
                                  ("Llama-3-8B-Instruct", "32,768", "1-1-1-4-8-8-4-32", "4501"),
                                  ("Llama-3.1-8B-Instruct", "131,072", "2-32-32-2-2-2-2-1")):
        assert all(text in said for text in quoted)
        assert [length, *quoted] in [line.split()[:1 + len(quoted)] for line in lines[lines.index(name) + 1:][:7]]


# ---------------------------------------------------------------------------------------------------------------------
# The model

LENGTH = 192
KEY_DIMS = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(3)) < 0.75  # (layers, heads, D/2)
SCALES = [s for s in (4, 4, 2, 16, 32, 32, 16, 1) for _ in "12"]  # (D/2,)
PLAIN, LAMPE = distances(LENGTH)[..., None], formula_matrix(lampe_formula, LENGTH, LENGTH, 60, 16, 8)[..., None]
SCALED = np.stack([formula_matrix(dpe_formula, LENGTH, 32, s) for s in SCALES], -1)
CASES = {  # method per layer, the oracle's relative positions per layer, temperature, changes of the configuration
    "rope": (None, [PLAIN] * 2, 1.0, {}),
    "llama 3.1": (None, [PLAIN] * 2, 1.0, dict(rope_scaling=RopeScaling(original_len=64))),
    "biases": (None, [PLAIN] * 2, 1.0, dict(qkv_bias=True)),
    "tied": (None, [PLAIN] * 2, 1.0, dict(tied=True)),
    "dpe": ([rx.dpe(32, SCALES)] * 2, [SCALED] * 2, 1.0, {}),
    "dpe, key dimensions": ([rx.dpe(32, SCALES)._replace(key_dims=key) for key in KEY_DIMS],
                            [np.where(key[:, None, None], SCALED, PLAIN) for key in KEY_DIMS.numpy()], 1.0, {}),
    "lampe": ([rx.lampe(LENGTH, 60, 16, 8)] * 2, [LAMPE] * 2, (0.1 * math.log(2) + 1) ** 2, {})}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_oracles_in_one_forward_and_in_prefill_and_decode(case):
    methods, rel, temperature, changes = CASES[case]
    model = random_llama(**changes)
    tokens = torch.randint(48, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = oracle_logits(model.state_dict(), model.config, tokens[0], rel, temperature)
    np.testing.assert_allclose(model(tokens, methods)[0], expected, atol=1e-3)
    cache = KVCache(model.config, 1, LENGTH)
    pieces = [model(part, methods, cache)[0] for part in tokens.split([100, 40] + [1] * 52, dim=1)]
    np.testing.assert_allclose(torch.cat(pieces), expected, atol=1e-3)


@pytest.mark.parametrize("scaling", [RopeScaling(), RopeScaling(32.0), RopeScaling(4.0, 0.5, 8.0, 2048)])
def test_llama_31s_frequencies_are_its_releases(scaling):
    c = Config(**vars(random_llama().config) | dict(head_dim=128, rope_scaling=scaling))
    np.testing.assert_allclose(c.frequencies(), formula_frequencies(c), rtol=1e-12)


@settings(max_examples=15)
@given(some_method, st.integers(2, 50), st.data())
def test_decoding_after_prefill_is_one_forward(method, length, data):
    model = random_llama(dim=16, head_dim=8, n_heads=4)
    tokens = torch.randint(48, (1, length), generator=torch.Generator().manual_seed(length))
    cut = data.draw(st.integers(1, length - 1))
    cache = KVCache(model.config, 1, length)
    pieces = [model(part, [method] * 2, cache) for part in tokens.split([cut] + [1] * (length - cut), dim=1)]
    whole = model(tokens, [method] * 2)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=1e-4)
    last = data.draw(st.integers(1, length))
    torch.testing.assert_close(model(tokens, [method] * 2, last=last), whole[:, -last:], atol=1e-4, rtol=1e-4)


@settings(max_examples=15)
@given(some_method, lengths, st.integers(2, 4))
def test_a_batch_is_its_rows(method, length, batch):
    model = random_llama(dim=16, head_dim=8, n_heads=4)
    tokens = torch.randint(48, (batch, length), generator=torch.Generator().manual_seed(length))
    rows = torch.cat([model(row[None], [method] * 2) for row in tokens])
    torch.testing.assert_close(model(tokens, [method] * 2), rows, atol=1e-4, rtol=1e-4)


def test_generate_is_greedy_and_each_row_stops_at_its_stop_token():
    model, prompt = random_llama(), torch.arange(10).view(2, 5)
    rows = prompt
    for _ in range(12):
        rows = torch.cat((rows, model(rows)[:, -1:].argmax(-1)), dim=1)
    free = rows[:, 5:].tolist()
    assert generate(model, prompt, 12).tolist() == free
    for stop in {free[0][3], free[1][2]}:  # each row goes on to its own stop, and then repeats it
        ends = [row.index(stop) + 1 if stop in row else 12 for row in free]
        assert generate(model, prompt, 12, stop_ids=[stop]).tolist() == [
            (row[:end] + [stop] * 12)[:max(ends)] for row, end in zip(free, ends)]
        for n in (0, 1):
            assert generate(model, prompt[n:n + 1], 12, stop_ids=[stop])[0].tolist() == free[n][:ends[n]]


def test_many_layers_with_key_dimensions_of_their_own_share_their_tables():
    model = random_llama(n_layers=24, dim=16, head_dim=8, n_heads=4)
    key_dims = torch.rand(24, 4, 4, generator=torch.Generator().manual_seed(5)) < 0.75
    method = rx.dpe(16, [2, 3, 4, 5])
    methods = [method._replace(key_dims=key) for key in key_dims]
    cache, tokens = KVCache(model.config, 1, 60), torch.arange(60).view(1, 60) % 48
    rx.cis_table.cache_clear()
    model(tokens[:, :40], methods, cache)
    for n in range(40, 60):
        model(tokens[:, n:n + 1], methods, cache)
    assert rx.cis_table.cache_info().misses <= 6  # index, the query's position and the key's, each for 32 and 64 tokens


def test_a_cache_filled_under_inference_mode_goes_on_outside_it():
    model, tokens = random_llama(), torch.arange(40)[None]
    for fill in (lambda cache: generate(model, tokens[:, :20], 1, cache=cache),
                 lambda cache: torch.inference_mode()(model)(tokens[:, :20], cache=cache)):
        cache = KVCache(model.config, 1, 40)
        fill(cache)
        torch.testing.assert_close(model(tokens[:, 20:], cache=cache), model(tokens)[:, 20:], atol=1e-4, rtol=1e-4)


def test_decoding_in_bfloat16_is_as_exact_as_one_forward():
    model, tokens = random_llama().bfloat16(), torch.randint(48, (1, 80), generator=torch.Generator().manual_seed(4))
    exact = random_llama()
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    methods = [rx.dpe(16, 3)] * 2
    cache = KVCache(model.config, 1, 80)
    decoded = torch.cat([model(part, methods, cache) for part in tokens.split([40] + [1] * 40, dim=1)], dim=1)
    truth = exact(tokens, methods)
    assert (decoded - truth).abs().mean() < 1.5 * (model(tokens, methods) - truth).abs().mean()


@pytest.mark.parametrize("reason, arguments", [
    ("one at least", dict(tokens=torch.zeros(1, 0, dtype=torch.int64))), ("one at least", dict(last=0)),
    ("3 methods for 2 layers", dict(methods=[rx.rope()] * 3)),
    ("cache of 4", dict(cache=KVCache(random_llama().config, 1, 4))),
    ("made for 3", dict(cache=KVCache(random_llama().config, 3, 9)))])
def test_the_model_refuses_what_does_not_fit(reason, arguments):
    with pytest.raises(ValueError, match=reason):
        random_llama()(**dict(tokens=torch.zeros(1, 5, dtype=torch.int64)) | arguments)


def test_queries_and_keys_are_those_of_a_forward_pass():
    model, tokens, queries = random_llama(qkv_bias=True), torch.arange(40)[None], []
    cache = KVCache(model.config, 1, 40)
    for layer in model.layers:
        layer.attention.wq.register_forward_hook(lambda module, inputs, q: queries.append(q[0].view(40, 4, 32)))
    model(tokens, cache=cache)
    expected = queries.copy()
    for (q, k), same, keys in zip(queries_and_keys(model, tokens), expected, cache.k[:, 0], strict=True):
        torch.testing.assert_close((q, k), (same, keys.transpose(0, 1)), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Models with known positional properties, set by hand


def planted_llama(amplitudes, filler, n_answers=4):
    """One head of frequencies 2^-f that finds a needle by its content: a needle at relative position rel scores the sum
    of amplitudes[f] cos(2^-f rel), a filler `filler`. Tokens: the question, filler, the needles, each needle's answer.
    """
    n = 2 + 2 * n_answers  # tokens, and a coordinate for each
    shape = dict(vocab_size=n, dim=n, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32, ffn_dim=1, train_len=512)
    model = Llama(Config(**shape, rope_theta=2.0 ** 16)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(1 if parameter.ndim == 1 else 0)
    attention, h = model.layers[0].attention, math.sqrt(n)  # a normed token is h in its coordinate
    model.tok_embeddings.weight.copy_(torch.eye(n))
    attention.wq.weight[::2, 0] = math.sqrt(32) / h
    attention.wk.weight[::2, 2:2 + n_answers] = torch.tensor(amplitudes)[:, None] / h
    attention.wk.weight[30, 1] = filler / h  # in the slowest frequency, which hardly turns
    for m in range(n_answers):
        attention.wv.weight[m, 2 + m], attention.wo.weight[2 + n_answers + m, m] = 1 / h, 1
        model.output.weight[2 + n_answers + m, 2 + n_answers + m] = 38 / h  # half the attention is certainty in float32
    return model


def test_detection_finds_planted_effective_lengths_through_a_models_attention():
    T, window, matching = 4096, 16, (7, 9, 11, 13)  # of 16 frequencies; a match holds while 2^-f rel < pi / 2
    others = sum(12 * math.cos(2.0 ** -f * (window + T / 64)) for f in matching[1:])  # at the background
    model = planted_llama([12.0 * (f in matching) for f in range(16)], others - math.log(T))
    rng, tokens, answers = random.Random(0), torch.ones(32, T, dtype=torch.int64), torch.randint(4, (32,))
    tokens[:, -1] = 0
    for row, answer in zip(tokens, answers):
        row[rng.randrange(T // 2)] = 2 + answer

    @functools.cache
    def score(*scales):
        method = rx.dpe(window, [s for s in scales for _ in "12"])
        logits = torch.cat([model(part, [method], last=1)[:, 0] for part in tokens.split(8)])
        return logits.log_softmax(-1)[range(32), 6 + answers]
    candidates = [1, 2, 4, 8, 16, 32, 64, 128]
    found, _ = rx.detect_scales(lambda scales: score(*scales), 8, candidates, 64)
    for group, s in enumerate(found):
        reach = math.pi / 2 * 2 ** (2 * group + 1) if 2 * group + 1 in matching else math.inf
        assert s == next(s for s in candidates if window + T / s < reach)


WAVELENGTHS = torch.tensor([8.0, 32.0, 128.0, 1024.0])
PATTERNS = {  # amplitudes by frequency, the distance that scores highest, the distances that the head is for
    "local": ([40, 40, 40, 40], 1, lambda d, T: d == 1),
    "periodic": ([40, 0, 0, 40], 0, lambda d, T: (d % 8 == 0) & (d < 128)),
    "far": ([0, 0, 0, 40], 0, lambda d, T: d == T - 20)}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_rope_loses_past_its_training_length_are_kept_by_dpe_and_lampe(pattern):
    amplitudes, peak, wanted = PATTERNS[pattern]
    f = 2 * math.pi / WAVELENGTHS  # the slowest turns by pi / 4 within 128 tokens, and once in 1,024

    def mass(method, T):  # of the last query's attention on what the head is for
        d = torch.arange(T).flip(0)
        q = torch.view_as_real(torch.polar(torch.ones(4), -peak * f)).view(1, 1, 1, 8)
        k = torch.zeros(1, 1, T, 8)
        k[..., ::2] = torch.tensor(amplitudes) * math.sqrt(8)
        if pattern == "far":  # a match of content, no other key has any
            k *= wanted(d, T)[:, None]
        return rx.attend(q, k, wanted(d, T)[:, None].expand(1, 1, T, 8).float(), method, f)[0, 0, 0, 0]
    assert mass(rx.rope(), 128) > 0.95
    for T in (1536, 3584):
        assert mass(rx.rope(), T) < 0.7
        assert mass(rx.dpe(100, T // 24), T) > 0.95 and mass(rx.lampe(T, 24, 100, 4), T) > 0.95


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, written here in the published layouts


def hugging_face_name(name):
    words = {"tok_embeddings": "model.embed_tokens", "output": "lm_head", "layers": "model.layers",
             "norm": "model.norm", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
             "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
             "feed_forward": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    return ".".join(words.get(word, word) for word in name.split("."))


def write_hugging_face(model, path, family="Llama", shards=1, **changes):
    c = model.config
    config = dict(
        architectures=[f"{family}ForCausalLM"], vocab_size=c.vocab_size, hidden_size=c.dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim, intermediate_size=c.ffn_dim, max_position_embeddings=c.train_len,
        rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
        **dict(Llama={}, Mistral=dict(sliding_window=None), Qwen2=dict(sliding_window=32768))[family]) | changes
    tensors = {}
    for name, tensor in model.state_dict().items():
        if ".wq." in name or ".wk." in name:
            tensor = torch.cat([torch.cat((head[::2], head[1::2])) for head in tensor.split(c.head_dim)])
        tensors[hugging_face_name(name)] = tensor
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    if shards == 1:
        return save_file(tensors, path / "model.safetensors")
    where = {name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: tensor for name, tensor in tensors.items() if where[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def write_meta(model, path, parts=1, **changes):
    c = model.config
    params = dict(dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads, multiple_of=32,
                  vocab_size=-1, norm_eps=c.norm_eps, rope_theta=c.rope_theta)
    (path / "params.json").write_text(json.dumps(params | changes))
    for part in range(parts):
        tensors = {"rope.freqs": torch.zeros(4)}
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 2:
                along = 1 if name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight")) else 0
                tensor = tensor.chunk(parts, dim=along)[part]
            tensors[name] = tensor.clone()
        torch.save(tensors, path / f"consolidated.{part:02}.pth")


def same_logits(model, other, tolerance=1e-4):
    torch.testing.assert_close(model(TOKENS), other(TOKENS), atol=tolerance, rtol=tolerance)


TOKENS = torch.randint(48, (1, 40), generator=torch.Generator().manual_seed(2))
META = dict(dim=128, head_dim=32, ffn_dim=352)  # 2/3 of 4 * 128, rounded up to a multiple of 32
LLAMA_31 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
SCALED, FIRST = RopeScaling(), dict(n_kv_heads=4, head_dim=16, rope_theta=10000.0)
LAYOUTS = {  # changes to the model; how it is written, and with which changes
    "one file": ({}, write_hugging_face, {}),
    "shards": ({}, write_hugging_face, dict(shards=3)),
    "tied": (dict(tied=True), write_hugging_face, {}),
    "Llama 1, with keys absent": (FIRST, write_hugging_face, dict.fromkeys(
        ["num_key_value_heads", "head_dim", "rope_theta"], "absent")),
    "keys null": (dict(n_kv_heads=4), write_hugging_face, dict(num_key_value_heads=None, rope_scaling=None)),
    "rope_scaling": (dict(rope_scaling=SCALED), write_hugging_face, dict(
        rope_scaling={"rope_type": "llama3", **LLAMA_31})),
    "rope_scaling with type": (dict(rope_scaling=SCALED), write_hugging_face, dict(
        rope_scaling={"type": "llama3", **LLAMA_31})),
    "rope_parameters": (dict(rope_scaling=SCALED), write_hugging_face, dict(
        rope_theta="absent", rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA_31})),
    "rope_parameters beside rope_theta": ({}, write_hugging_face, dict(rope_parameters={"rope_type": "default"})),
    "Mistral": ({}, write_hugging_face, dict(family="Mistral", architectures=None, model_type="mistral")),
    "Mistral, shards": (dict(head_dim=16), write_hugging_face, dict(family="Mistral", shards=2, head_dim=None)),
    "Qwen2": (dict(qkv_bias=True, head_dim=16), write_hugging_face, dict(
        family="Qwen2", use_sliding_window=False, layer_types=["full_attention"] * 2, head_dim="absent")),
    "Qwen2, shards, tied": (dict(qkv_bias=True, tied=True), write_hugging_face, dict(family="Qwen2", shards=4)),
    "Meta": (META, write_meta, dict(max_seq_len=64)),
    "Meta, two parts": (META, write_meta, dict(parts=2)),
    "Meta, ffn_dim_multiplier and scaled RoPE": (META | dict(ffn_dim=448, rope_scaling=SCALED), write_meta, dict(
        ffn_dim_multiplier=1.3, use_scaled_rope=True)),
    "Meta, factor 32": (META | dict(rope_scaling=RopeScaling(32.0)), write_meta, dict(
        use_scaled_rope=True, rope_scaling_factor=32)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_in_any_layout_gives_the_logits_it_was_written_from(layout, tmp_path):
    changes, write, written = LAYOUTS[layout]
    model = random_llama(**changes)
    write(model, tmp_path, **written)
    loaded = load_model(tmp_path)
    same_logits(loaded, model)
    cache = KVCache(loaded.config, 1, 40)
    decoded = torch.cat([loaded(part, cache=cache) for part in TOKENS.split([36] + [1] * 4, dim=1)], dim=1)
    torch.testing.assert_close(decoded, model(TOKENS), atol=1e-4, rtol=1e-4)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    assert not loaded.training


def test_hugging_faces_rotary_rows_are_apart_and_ours_side_by_side(tmp_path):
    model = random_llama(dim=8, n_heads=2, n_kv_heads=2, head_dim=4, ffn_dim=32, qkv_bias=True)
    write_hugging_face(model, tmp_path, "Qwen2")
    rows = torch.arange(8.0)  # pairs (0, 2), (1, 3) of head 0 ...
    edit_tensors(tmp_path / "model.safetensors", **{
        "model.layers.0.self_attn.q_proj.weight": rows[:, None].expand(8, 8).clone(),
        "model.layers.0.self_attn.k_proj.bias": rows, "model.layers.0.self_attn.v_proj.bias": rows.clone()})
    attention = load_model(tmp_path).layers[0].attention
    assert attention.wq.weight[:, 0].tolist() == attention.wk.bias.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert attention.wv.bias.tolist() == rows.tolist()


@pytest.mark.parametrize("write", [write_hugging_face, write_meta])
def test_every_tensor_has_the_dtype_of_the_embedding_unless_told_otherwise(write, tmp_path):
    model = random_llama(**META).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    write(model, tmp_path)
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16} and loaded(TOKENS).isfinite().all()
    same_logits(load_model(tmp_path, dtype=torch.float32), model.float())


def test_a_hub_directory_with_both_layouts_loads_the_outer_one(tmp_path):
    write_hugging_face(random_llama(1), tmp_path)
    (tmp_path / "original").mkdir()
    write_meta(random_llama(2, **META), tmp_path / "original")
    same_logits(load_model(tmp_path), random_llama(1))


def meta_config(**params):
    return load_llama.meta_config("params.json", dict(dim=128, n_layers=2, n_heads=4, vocab_size=9) | params, 0)


@pytest.mark.parametrize("params, train_len", [
    ({}, 4096), ({"rope_theta": 500000.0}, 8192), ({"use_scaled_rope": True}, 131072), ({"max_seq_len": 77}, 77)])
def test_metas_training_length(params, train_len):
    assert meta_config(**params).train_len == train_len


@pytest.mark.parametrize("dim, factor", [(2048, 32), (3072, 32), (4096, 8), (8192, 8)])
def test_llama_32_scales_its_frequencies_by_32_and_llama_31_by_8(dim, factor):
    assert meta_config(dim=dim, use_scaled_rope=True).rope_scaling == RopeScaling(factor)
    assert meta_config(dim=dim).rope_scaling is None


@pytest.mark.parametrize("shape, count", [
    ("8b", 8_030_261_248), ("70b", 70_553_706_496), ("1b", 1_235_814_400), ("3b", 3_212_749_824)])
def test_published_shapes_have_the_published_parameters(shape, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(load_llama.SHAPES[shape]).parameters()) == count


class Code:
    def __reduce__(self):
        return print, ("this must never run",)


def edit_json(file, **changes):
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_tensors(file, drop=None, **changes):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items() if name != drop}
    save_file(tensors | changes, file)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def config(kind="one", **changes):
    return kind, lambda p: edit_json(p / "config.json", **changes)


def tensors(drop=None, kind="one", **changes):
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return kind, lambda p: [edit_tensors(file, drop, **changes) for file in p.glob("*.safetensors")]


def parts(edit, pattern="*.pth"):
    return "meta", lambda p: [torch.save(edit(torch.load(file)), file) for file in p.glob(pattern)]


def without(name):
    return lambda part: {key: tensor for key, tensor in part.items() if key != name}


DAMAGE = {  # the checkpoint, what is done to it, and what the refusal must name
    "no directory": ("one", lambda p: p.rename(p.parent / "moved"), ["is not a directory"]),
    "nothing in it": ("one", lambda p: [file.unlink() for file in p.iterdir()], ["config.json", "params.json"]),
    "weights without config": ("one", lambda p: (p / "config.json").unlink(), ["config.json is missing"]),
    "config without weights": ("one", lambda p: (p / "model.safetensors").unlink(), ["model.safetensors is missing"]),
    "absent shard": ("shards", lambda p: (p / "model-00002-of-00003.safetensors").unlink(),
                     ["model-00002-of-00003.safetensors is missing"]),
    "no weight_map": ("shards", lambda p: (p / "model.safetensors.index.json").write_text("{}"), ["weight_map"]),
    "no JSON": ("one", lambda p: (p / "config.json").write_text("{"), ["config.json cannot be read as JSON"]),
    "no object": ("one", lambda p: (p / "config.json").write_text("[]"), ["config.json holds no JSON object"]),
    "no number": (*config(hidden_size="64"), ["config.json", "hidden_size", "'64'"]),
    "endless": (*config(hidden_size=math.inf), ["hidden_size", "inf"]),
    "too large": (*config(hidden_size=2 ** 30, vocab_size=2 ** 30, num_attention_heads=2 ** 30), ["invalid"]),
    "no key": (*config(hidden_size=None), ["config.json lacks hidden_size"]),
    "odd heads": (*config(num_key_value_heads=3), ["4 heads", "3 KV heads"]),
    "architecture": (*config(architectures=["GPT2LMHeadModel"]), ["config.json", "GPT2LMHeadModel", "Mistral"]),
    "rope type": (*config(rope_scaling={"rope_type": "yarn", "factor": 4}), ["config.json", "'yarn'"]),
    "rope type of transformers 5": (*config(rope_parameters={"rope_type": "linear"}), ["'linear'"]),
    "rope no object": (*config(rope_scaling="linear"), ["config.json", "'linear'"]),
    "rope by layer type": (*config(rope_parameters={"full_attention": {"rope_theta": 5.0}}), ["rope_type None"]),
    "rope of some dimensions": (*config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
                                ["partial_rotary_factor"]),
    "activation": (*config(hidden_act="gelu"), ["hidden_act", "'gelu'"]),
    "bias": (*config(attention_bias=True), ["attention_bias"]),
    "sliding Mistral": (*config("Mistral", sliding_window=4096), ["config.json", "sliding_window 4096"]),
    "sliding by default": (*config("Mistral", sliding_window=None), ["sliding_window 4096"]),  # the key goes
    "sliding Qwen2": (*config("Qwen2", use_sliding_window=True), ["use_sliding_window"]),
    "a sliding layer": (*config("Qwen2", layer_types=["full_attention", "sliding_attention"]), ["layer_types"]),
    "KV heads not told": (*config("Qwen2", num_key_value_heads=None), ["config.json lacks num_key_value_heads"]),
    "theta not told": (*config("Qwen2", rope_theta=None), ["config.json lacks rope_theta"]),
    "missing bias": (*tensors("model.layers.1.self_attn.k_proj.bias", "Qwen2"),
                     ["model.layers.1.self_attn.k_proj.bias is missing"]),
    "missing tensor": (*tensors("model.norm.weight"), ["model.safetensors", "model.norm.weight is missing"]),
    "missing from shards": (*tensors("model.norm.weight", "shards"), ["model.norm.weight is missing"]),
    "extra tensor": (*tensors(extra=torch.zeros(1)), ["model.safetensors", "tensor extra is unknown"]),
    "wrong shape": (*tensors(lm_head__weight=torch.zeros(9, 64)), ["lm_head.weight", "(9, 64)", "(48, 64)"]),
    "integers": (*tensors(lm_head__weight=torch.zeros(48, 64, dtype=torch.int8)), ["lm_head.weight", "int8"]),
    "truncated": ("one", lambda p: truncate(p / "model.safetensors"), ["model.safetensors is damaged"]),
    "Meta, truncated": ("meta", lambda p: truncate(p / "consolidated.01.pth"), ["consolidated.01.pth is damaged"]),
    "Meta, no first part": ("meta", lambda p: (p / "consolidated.00.pth").unlink(), ["consolidated.00.pth is missing"]),
    "Meta, no last part": ("meta", lambda p: (p / "consolidated.01.pth").unlink(), ["(48, 64)", "(48, 128)"]),
    "Meta, a shorter part": (*parts(without("norm.weight"), "*.01.pth"), ["norm.weight is not in every part"]),
    "Meta, a part of another model": (*parts(lambda part: part | {"norm.weight": torch.ones(9)}, "*.01.pth"),
                                      ["norm.weight is not in every part in the same shape"]),
    "Meta, no params": ("meta", lambda p: (p / "params.json").unlink(), ["params.json is missing"]),
    "Meta, code": ("meta", lambda p: torch.save({"output.weight": Code()}, p / "consolidated.00.pth"),
                   ["consolidated.00.pth holds more than tensors"]),
    "Meta, no tensors": (*parts(lambda part: [1, 2]), ["is not a dictionary of tensors"]),
    "Meta, no names": (*parts(lambda part: dict(enumerate(part.values()))), ["is not a dictionary of tensors"]),
    "Meta, missing tensor": (*parts(without("norm.weight")), ["norm.weight is missing"]),
    "Meta, missing output": (*parts(without("output.weight")), ["output.weight is missing"]),
}


def write_checkpoint(kind, path):
    path.mkdir()
    if kind == "meta":
        write_meta(random_llama(**META), path, parts=2, vocab_size=48)
    elif kind in ("Mistral", "Qwen2"):
        write_hugging_face(random_llama(qkv_bias=kind == "Qwen2"), path, kind)
    else:
        write_hugging_face(random_llama(), path, shards=1 if kind == "one" else 3)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(damage, tmp_path, capfd):
    kind, do, named = DAMAGE[damage]
    path = tmp_path / "checkpoint"
    write_checkpoint(kind, path)
    load_model(path)
    do(path)
    with pytest.raises(load_llama.CheckpointError) as refusal:
        load_model(path)
    message = str(refusal.value)
    assert all(word in message for word in named) and "\n" not in message, message
    assert capfd.readouterr().out == ""


def damaged(content, rng):
    """Bytes with some flipped, cut, doubled or drawn, most often near an end, where what describes the rest stands."""
    start = rng.choice([rng.randrange(len(content)), rng.randrange(min(2000, len(content))), -rng.randrange(1, 2000)])
    start, length = start % len(content), rng.choice([1, 1, 1, 4, 100])
    piece = content[start:start + length]
    piece = rng.choice([bytes(byte ^ 1 << rng.randrange(8) for byte in piece), b"", piece * 2, rng.randbytes(length)])
    return content[:start] + piece + content[start + length:]


@pytest.mark.parametrize("kind", ["shards", "meta"])
def test_whatever_is_damaged_a_checkpoint_is_loaded_or_refused(kind, tmp_path):
    write_checkpoint(kind, tmp_path / "checkpoint")
    files, rng, refused = sorted((tmp_path / "checkpoint").iterdir()), random.Random(0), 0
    for n in range(150):
        file = files[n % len(files)]
        whole = file.read_bytes()
        file.unlink()  # a file that is mapped must not change
        file.write_bytes(damaged(whole, rng))
        try:
            load_model(tmp_path / "checkpoint")
        except load_llama.CheckpointError:
            refused += 1
        file.unlink()
        file.write_bytes(whole)
    assert 50 < refused < 150


# ---------------------------------------------------------------------------------------------------------------------
# Tensor parallelism: ranks are processes on the CPU

WIDE = dict(n_heads=8, n_kv_heads=4, head_dim=16, ffn_dim=352)
SPLIT = {  # what the ranks hold together
    "Llama, shards": (WIDE | dict(vocab_size=50), write_hugging_face, dict(shards=3)),  # 4 ranks do not divide 50
    "Qwen2, tied": (WIDE | dict(qkv_bias=True, tied=True), write_hugging_face, dict(family="Qwen2")),
    "Meta, two parts": (WIDE | dict(dim=128), write_meta, dict(parts=2))}
METHODS = [rx.rope(), rx.dpe(9, [4, 4, 2, 8, 8, 2, 2, 1]), rx.lampe(40, 20, 6, 4),
           rx.yarn(rx.rope_frequencies(16, 500000.0), 4.0, 16), rx.dpe(9, 4, torch.arange(64).view(8, 8) % 5 < 3)]


def of_a_rank(rank, path):
    """What each of four ranks checks, for meshes of two and of four of them."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path / 'ranks'}", rank=rank, world_size=4)
    pairs = torch.distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "tensor"))
    four = torch.distributed.device_mesh.init_device_mesh("cpu", (4,))
    for mesh, name in itertools.product([pairs["tensor"], four], SPLIT):
        ranks, whole = mesh.size(), load_model(path / name)
        model = load_model(path / name, mesh=mesh)
        for parameter, (key, of_all) in zip(model.parameters(), whole.named_parameters()):
            cut = "norm" not in key and not (whole.config.tied and key == "tok_embeddings.weight")
            own = parameter.to_local() if cut else parameter
            assert own.numel() <= math.ceil(of_all.numel() / ranks) + 64 * (50 % ranks) if cut else own.equal(of_all)
            assert own.untyped_storage().nbytes() == own.numel() * 4 or not cut, key  # nothing else is kept alive
        for method in METHODS:
            key_dims, logits = method.key_dims, []
            own = key_dims if key_dims is None else key_dims.chunk(ranks)[mesh.get_local_rank()]  # of the rank's heads
            for one, methods in ((whole, [method] * 2), (model, [method._replace(key_dims=own)] * 2)):
                cache = KVCache(one.config, 1, 40)
                decoded = [one(piece, methods, cache) for piece in TOKENS.split([37, 1, 1, 1], dim=1)]
                logits.append(torch.cat([one(TOKENS, methods), *decoded], dim=1))
            torch.testing.assert_close(*logits, atol=1e-5, rtol=0)
            assert cache.k.shape[2] == 4 // ranks
    for tied in (False, True):
        load_llama.SHAPES["small"] = dataclasses.replace(whole.config, tied=tied)
        model = load_model("random:small", mesh=four)
        assert model.layers[1].attention.wq.weight.to_local().shape == (32, 128) and model(TOKENS).isfinite().all()
        logits = [torch.empty_like(model(TOKENS)) for _ in range(4)]
        torch.distributed.all_gather(logits, model(TOKENS).contiguous())
        assert all(logits[0].equal(other) for other in logits)  # or ranks would go on with different tokens
        importlib.import_module("extras.calibrate").float32_logits(model)
        finer = model(TOKENS)
        torch.testing.assert_close(finer, logits[0], atol=2e-2, rtol=2e-2)
        assert not finer.equal(finer.bfloat16().float()) and logits[0].equal(logits[0].bfloat16().float())
    for changes in (dict(n_heads=6, n_kv_heads=2), dict(n_kv_heads=2), dict(ffn_dim=90)):
        load_llama.SHAPES["odd"] = dataclasses.replace(whole.config, **changes)
        with pytest.raises(ValueError, match=f"^{list(changes)[0]} {list(changes.values())[0]} .* 4 ranks$"):
            load_model("random:odd", mesh=four)
    torch.distributed.destroy_process_group()


def test_ranks_that_hold_a_model_together_give_its_logits_and_each_holds_its_slice(tmp_path):
    for name, (changes, write, written) in SPLIT.items():
        (tmp_path / name).mkdir()
        model = random_llama(**changes)
        for layer in model.layers:  # flatter attention: sums in another order are rounded differently, and this grows
            layer.attention.wq.weight *= 0.3
        write(model, tmp_path / name, **written)
    import torch.distributed.tensor.parallel  # noqa: F401  once, and not in each process
    torch.multiprocessing.start_processes(of_a_rank, (tmp_path,), nprocs=4, start_method="fork")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

QWEN_SPLIT = load_llama.LLAMA_3_SPLIT.replace("{1,3}", "")  # Qwen2 takes each digit alone
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def ranks():
    """A byte-level vocabulary: the bytes, then pairs that merge."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b" t", b"he", b" the", b"in", b"er", b"12", b"123", b"\n\n", "é".encode(), b"<|", b"|>", b"  "):
        ranks[token] = len(ranks)
    return ranks


def tokenizer_model(ranks):
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())


def tokenizer_json(ranks, special, split, normalizer=None):
    """What the published tokenizer.json files hold; of a merge's pair, all ways to cut its token into two others."""
    shown = {byte: chr(byte) for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    shown |= {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in shown)}
    vocab = {"".join(shown[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = [[token[:n], token[n:]] for token in vocab for n in range(1, len(token))
              if token[:n] in vocab and token[n:] in vocab]
    return {"added_tokens": [{"id": len(ranks) + n, "content": name} for n, name in enumerate(special)],
            "normalizer": normalizer,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
            "model": {"type": "BPE", "dropout": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                      "vocab": vocab, "merges": merges}}


@pytest.fixture(scope="module")
def tokenizers(ranks, tmp_path_factory):
    """One vocabulary in Llama 3's two files and in Qwen2's, and tiktoken's own encoding of each."""
    path = tmp_path_factory.mktemp("tokenizers")
    qwen = tokenizer_json(ranks, QWEN_SPECIAL, QWEN_SPLIT, {"type": "NFC"})
    qwen["model"]["merges"] = [" ".join(pair) for pair in qwen["model"]["merges"]]  # as older releases write them
    llama = tokenizer_json(ranks, load_llama.LLAMA_3_SPECIAL, load_llama.LLAMA_3_SPLIT)
    for kind, name, content in [("model", "tokenizer.model", tokenizer_model(ranks)),
                                ("json", "tokenizer.json", json.dumps(llama)),
                                ("qwen", "tokenizer.json", json.dumps(qwen))]:
        (path / kind).mkdir()
        (path / kind / name).write_text(content)
    splits = dict(model=load_llama.LLAMA_3_SPLIT, json=load_llama.LLAMA_3_SPLIT, qwen=QWEN_SPLIT)
    own = {kind: tiktoken.Encoding("own", pat_str=split, mergeable_ranks=ranks, special_tokens={})
           for kind, split in splits.items()}
    return {kind: load_tokenizer(path / kind) for kind in splits}, own


texts = st.one_of(st.text(), st.text(alphabet=" the12\n\t<|>é'S\u0301"), st.sampled_from([
    "<|eot_id|>", "x<|begin_of_text|>", "<|im_end|>", "</s>", "e\u0301", "\u212b"]))  # the last two are not NFC


@given(text=texts)
def test_byte_level_tokenizers_are_tiktoken_and_lose_nothing(text, tokenizers):
    for kind, tokenizer in tokenizers[0].items():
        expected = unicodedata.normalize("NFC", text) if kind == "qwen" else text
        ids = tokenizer.encode(text)
        assert ids == tokenizers[1][kind].encode_ordinary(expected)
        assert tokenizer.decode(ids) == expected
        assert all(token < 268 for token in ids)  # special tokens in a text are text


def test_special_tokens_have_their_published_places(tokenizers):
    names = load_llama.LLAMA_3_SPECIAL
    assert len(names) == len(set(names)) == 256
    published = {"begin_of_text": 0, "end_of_text": 1, "start_header_id": 6, "end_header_id": 7, "eot_id": 9}
    assert {name: names.index(f"<|{name}|>") for name in published} == published
    told = {kind: (t.bos_id, t.stop_ids, t.vocab_size) for kind, t in tokenizers[0].items()}
    assert told == {"model": (268, [269, 277], 524), "json": (268, [269, 277], 524), "qwen": (None, [270, 268], 271)}


@given(text=texts)
def test_the_bundled_tokenizer_is_sentencepiece_and_loses_nothing(text):
    tokenizer = load_tokenizer(TINY)
    own = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    assert tokenizer.encode(text) == own.encode(text)
    if "\u2581" not in text:  # SentencePiece's own mark for a space
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name, content", [
    ("tokenizer.model", b"\x00\x01 nothing"), ("tokenizer.model", b"!!! 0\n"), ("tokenizer.model", b""),
    ("tokenizer.model", b"AAAA 0\n"), ("tokenizer.json", b"{}"), ("tokenizer.json", b"[" * 100_000), ("other", b"")])
def test_an_unknown_tokenizer_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(load_llama.CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path)


OTHER_IDS = {  # what is changed in a tokenizer.json, by path
    "SentencePiece's steps": (["pre_tokenizer"], None),
    "split by GPT-2's regex": (["pre_tokenizer"], {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}),
    "GPT-2's regex too": (["pre_tokenizer", "pretokenizers", 1, "use_regex"], True),
    "a space before": (["pre_tokenizer", "pretokenizers", 1, "add_prefix_space"], True),
    "split by a string": (["pre_tokenizer", "pretokenizers", 0, "pattern"], {"String": " "}),
    "split without what splits": (["pre_tokenizer", "pretokenizers", 0, "behavior"], "Removed"),
    "split by what does not match": (["pre_tokenizer", "pretokenizers", 0, "invert"], True),
    "normalizer": (["normalizer"], {"type": "Lowercase"}),
    "several normalizers": (["normalizer"], {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}),
    "Unigram": (["model", "type"], "Unigram"),
    "dropout": (["model", "dropout"], 0.1),
    "suffix": (["model", "end_of_word_suffix"], "</w>"),
    "merges in another order": (["model", "merges"], [["h", "e"], ["Ġ", "t"]]),
    "a merge that makes no token": (["model", "merges"], [["x", "y"]]),
    "a byte without an id": (["model", "vocab"], {"a": 0}),
    "an id twice": (["added_tokens", 0, "id"], 0),
    "a negative id": (["added_tokens", 0, "id"], -1),
    "stop tokens of another family": (["added_tokens"], [{"id": 268, "content": "</s>"}])}


@pytest.mark.parametrize("change", OTHER_IDS)
def test_a_tokenizer_json_that_would_give_other_ids_is_refused(change, ranks, tmp_path):
    values = tokenizer_json(ranks, QWEN_SPECIAL, QWEN_SPLIT)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    load_tokenizer(tmp_path)
    keys, value = OTHER_IDS[change]
    functools.reduce(lambda inner, key: inner[key], keys[:-1], values)[keys[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(load_llama.CheckpointError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_whatever_is_damaged_a_tokenizer_is_loaded_or_refused(ranks, tmp_path):
    kinds = {"ranks/tokenizer.model": tokenizer_model(ranks).encode(),
             "json/tokenizer.json": json.dumps(tokenizer_json(ranks, QWEN_SPECIAL, QWEN_SPLIT)).encode(),
             "sentencepiece/tokenizer.model": (TINY / "tokenizer.model").read_bytes()}
    rng, refused = random.Random(0), 0
    for n, (name, content) in enumerate(list(kinds.items()) * 50):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(damaged(content, rng))
        try:
            load_tokenizer((tmp_path / name).parent)
        except load_llama.CheckpointError:
            refused += 1
    assert 30 < refused < 150


# ---------------------------------------------------------------------------------------------------------------------
# The needle test: prompts


@given(length=st.integers(150, 3000), count=st.integers(1, 4), depth=st.floats(0, 1), chat=st.booleans(),
       kind=st.sampled_from(["model", "json", "tiny"]),
       seed=st.integers(0, 99))
def test_a_prompt_has_its_length_and_every_needle_once(length, count, depth, kind, chat, seed, tokenizers):
    tokenizer = load_tokenizer(TINY) if kind == "tiny" else tokenizers[0][kind]
    rng = random.Random(seed)
    needles = needle.draw_needles(rng, count)
    text = " ".join(needle.sentence(rng) for _ in range(30))
    length, chat = length if kind == "tiny" else length + 900, chat and kind != "tiny"
    prompt, questions = needle.build_prompt(tokenizer, length, needles, [depth] * count, text, chat)
    assert len(prompt) + sum(len(question) + len(answer) for question, answer in questions) == length
    shown = tokenizer.decode(prompt)
    for (key, value), (question, answer) in zip(needles, questions):
        assert tokenizer.decode(answer).strip() == f"{value}."
        assert shown.count(f"The magic number for {key} is {value}.") == 1
        assert tokenizer.decode(question).strip() == f"The magic number for {key} is"
        assert key not in text


def test_depth_0_is_the_start_and_1_the_end_and_needles_stand_between_sentences():
    tokenizer, rng = load_tokenizer(TINY), random.Random(0)
    text = " ".join(needle.sentence(rng) for _ in range(200))
    for depth in (0.0, 0.3, 1.0):
        prompt, _ = needle.build_prompt(tokenizer, 1000, [("jade owl", "12345")], [depth], text)
        before, after = tokenizer.decode(prompt).split("The magic number for jade owl is 12345.")
        assert not before.strip() or before.rstrip().endswith(".")
        assert len(tokenizer.encode(before)) == pytest.approx(depth * 970, abs=20)
        assert prompt[0] == tokenizer.bos_id and (depth == 1) == (after == "")


@pytest.mark.parametrize("text", ["no full stop at all " * 99, "今天天气很好。" * 99])
def test_depths_are_kept_in_a_text_without_full_stops(text):
    tokenizer = load_tokenizer(TINY)
    prompt, _ = needle.build_prompt(tokenizer, 1000, [("jade owl", "12345")], [0.5], text)
    start = needle.continuation(tokenizer, "The magic number")
    where = [prompt[n:n + len(start)] for n in range(len(prompt))].index(start)
    assert where == pytest.approx(len(prompt) / 2, rel=0.1)


def test_sentences_have_no_digits_and_no_key():
    rng = random.Random(0)
    text = " ".join(needle.sentence(rng) for _ in range(5000))
    assert not set("0123456789") & set(text)
    assert not {word for words in needle.KEYS for word in words} & set(re.findall(r"\w+", text.lower()))


# ---------------------------------------------------------------------------------------------------------------------
# The needle test: settings, scores and the command line


def command(monkeypatch, *arguments, main=needle.main):
    """A command's main with arguments; returns its exit code."""
    monkeypatch.setattr("sys.argv", ["needle.py", *map(str, arguments)])
    try:
        main()
    except SystemExit as leaving:
        return leaving.code or 0
    return 0


def refused(capsys):
    """The one sentence that a refusal consists of."""
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("needle.py: ") and err.count("\n") == 1
    return err


@pytest.fixture
def uncalibrated(tmp_path):
    """The bundled checkpoint in tmp_path, without its extrapolation.json."""
    for file in ("config.json", "tokenizer.model", "model.safetensors"):
        (tmp_path / file).symlink_to(TINY / file)


def settings_of(method, config, length, calibrated={}, given={}):
    s, source, _ = needle.settings(method, config, length, calibrated, given)
    return s, source


PUBLISHED_SCALES = {"Llama-3-8B-Instruct": [4, 4, 2, 16, 32, 32, 16, 128],
                    "Llama-3.1-8B-Instruct": [2, 32, 32, 2, 2, 2, 2, 1]}


@pytest.mark.parametrize("name", PUBLISHED_SCALES)
def test_published_effective_lengths_give_the_published_scales_at_131072_and_rope_where_all_is_within_them(name):
    config = dataclasses.replace(load_llama.SHAPES["8b"], train_len=rx.PUBLISHED[name]["model"][-1])
    s, source, _ = needle.settings("dpe", config, 131072, {}, {})
    assert (s["scales"], source) == (PUBLISHED_SCALES[name], "published for this model")
    assert (s["window"], s["topk"]) == (1024, 48)
    shortest = min(s["effective"])
    s, _, method = needle.settings("dpe", config, shortest, {}, {})
    assert s["scales"] == [1] * 8 and all(band.q_pos(torch.tensor([[n]])).unique().tolist() == [n] and
                                          band.k_pos(torch.tensor([[n]])).unique().tolist() == [n]
                                          for band in method.bands for n in (0, 1023, 5000))
    longer = needle.settings("dpe", config, shortest + 1, {}, {})[0]["scales"]
    assert longer.count(2) == PUBLISHED_SCALES[name].count(131072 // shortest) and set(longer) == {1, 2}


def test_settings_are_the_last_of_rule_published_calibrated_and_then_set():
    llama_3 = load_llama.SHAPES["8b"]
    other = dataclasses.replace(llama_3, train_len=16384)  # nothing is published for it
    published = {"ramp": 4501, "head": 512, "tail": 200}
    assert settings_of("lampe", llama_3, 32768) == (published, "published for this model")
    own = settings_of("lampe", llama_3, 8000, {}, {"head": 7, "window": 3})
    assert own == (published | {"ramp": 1536, "head": 7}, "published for this model and --set")
    assert settings_of("lampe", llama_3, 8000, {}, {"ramp": 9})[0]["ramp"] == 9
    calibrated = {"dpe": {"window": 9, "effective": [4096, 8192], "topk": 4, "scores": []}, "made_with": {}}
    for config in (llama_3, other):
        assert settings_of("dpe", config, 16384, calibrated) == (
            {"window": 9, "effective": [4096, 8192], "topk": 4, "scales": [4, 2]}, "extrapolation.json")
    assert settings_of("dpe", other, 4097, calibrated)[0]["scales"] == [2, 1]  # within the training length as beyond it
    s, source = settings_of("dpe", other, 65536, calibrated, {"effective": [1000], "group": 7})
    assert (s["scales"], s["window"], source) == ([66], 9, "extrapolation.json and --set")
    assert settings_of("rerope", other, 65536, calibrated)[1] == "rule from the training length"


@given(train_len=st.integers(64, 9000), T=st.integers(1, 40000))
def test_the_rule_scales_beyond_the_training_length_and_not_within_it(train_len, T):
    config = dataclasses.replace(load_llama.SHAPES["1b"], train_len=4 * train_len)
    by_rule, self_extend = (settings_of(method, config, T)[0] for method in ("dpe", "self-extend"))
    scale = -(-T // train_len) if T > 4 * train_len else 1
    assert by_rule["scales"] == [scale] and self_extend["group"] == scale
    assert by_rule["window"] == self_extend["window"] == 4 * train_len // 16


def test_groups_reach_their_frequencies_and_key_dimensions_their_heads(monkeypatch):
    """As the command line makes them: the largest contributions over many texts, of each layer and head."""
    by_hand = ["--set", "effective=20-10-5,topk=10,window=4"]
    args = needle.make_parser("", needles=1).parse_args([*by_hand, "--train-len", "99"])
    args.method, args.lengths = ["dpe", "rope"], [30, 40]
    model, tokenizer, _, _ = needle.load(args)
    asked = []

    def seen(model, ids):
        asked.append(ids.shape)
        return queries_and_keys(model, ids)
    monkeypatch.setattr(needle, "queries_and_keys", seen)
    chosen = needle.choose_methods(args, model, tokenizer, None)
    assert asked == [(1, 99)] * 10  # once, though two lengths want them
    layers = chosen[30, "dpe"][-1]
    assert len(layers) == 2 and not torch.equal(layers[0].key_dims, layers[1].key_dims)
    half = layers[0].key_dims.shape[1]
    spread = [[2, 3, 6][f * 3 // half] for f in range(half)]
    plain, scaled = matrix(rx.rope(), 30), rx.relative_positions(rx.dpe(4, spread), 30)
    for method in layers:
        assert method.key_dims.shape == (4, half) and (method.key_dims.sum(dim=1) == 10).all()
        rel = rx.relative_positions(method, 30)  # (heads, T, T, D/2)
        expected = torch.where(method.key_dims[:, None, None], scaled, torch.from_numpy(plain))
        assert torch.equal(rel, expected)
    assert chosen[40, "rope"][-1][0].key_dims is None


def test_contributions_are_averaged_over_ten_texts_at_each_length(monkeypatch):
    model, sizes = random_llama(vocab_size=949), []

    def planted(model, ids):
        sizes.append(ids.shape[1])
        return iter([(torch.full((3, 4, 32), float(len(sizes))), torch.ones(3, 2, 32))] * 2)
    monkeypatch.setattr(needle, "queries_and_keys", planted)
    three = [2048, 4096, 8192]
    for train_len, expected in ((8192, three), (131072, three), (5000, [2048, 4096]), (100, [100])):
        sizes.clear()
        model.config = dataclasses.replace(model.config, train_len=train_len)
        sums = needle.contributions(model, load_tokenizer(TINY), None, 0)
        assert sizes == [size for size in expected for _ in range(10)]
        assert len(sums) == 2 and torch.allclose(sums[0], torch.full((4, 16), 2.0 * sum(range(1, len(sizes) + 1))))


def test_the_readmes_method_of_ones_own_is_a_function_and_an_entry(monkeypatch, capsys, tmp_path):
    text = (TINY.parent / "README.md").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(import needle\n.*?)```", text, re.DOTALL)[1])
    monkeypatch.setattr(needle, "METHODS", needle.METHODS.copy())
    run = ["--ckpt", TINY, "--method", "rerope,mine", "--train-len", "400", "--len", "500", "--depths", "0"]

    def main():
        runpy.run_path(str(tmp_path / "mine.py"), run_name="__main__")
    assert command(monkeypatch, *run, "--set", "window=50", "--json", tmp_path / "out.json", main=main) == 0
    assert "# mine at 500: window 50 (rule from the training length and --set)" in capsys.readouterr().out
    theirs, ours = json.loads((tmp_path / "out.json").read_text())["results"]
    assert ours["answer"] == theirs["answer"] and ours["method"] == "mine"
    assert command(monkeypatch, "--help") == 0
    assert "rerope, dpe, lampe, mine, or all" in capsys.readouterr().out.replace("\n", " ").replace("  ", "")


def test_the_readmes_matrices_and_their_lines_are_the_codes():
    text, code = ((TINY.parent / name).read_text(encoding="utf-8") for name in ("README.md", "rope_extrap.py"))
    title = r"\n    DPE, w = 3, s = 2 +LaMPE, ramp 5, s1 = 2, s2 = 2\n"
    rows = re.search(title + r"((?:    [0-9 ]+\n){9})\n", text)[1].splitlines()
    matrices = (rx.relative_positions(method, 9) for method in (rx.dpe(3, 2), rx.lampe(9, 5, 2, 2)))
    for n, (row, *rels) in enumerate(zip(rows, *matrices)):
        assert [[*map(int, half.split())] for half in (row[:35], row[35:])] == [rel[:n + 1].tolist() for rel in rels]
    bands = re.findall(r"Band\(.+\)(?=[,\]])", text.split("## Which settings")[0])
    assert len(bands) == 5 and all(band in code for band in bands)


@pytest.mark.parametrize("arguments, named", [
    (["--method", "foo"], "rope, ntk, yarn, self-extend, rerope, dpe, lampe"), (["--len", "20"], "20 is too short"),
    (["--len", "512,x"], "'x'"), (["--len", "512", "--needles", "30"], "512 is too short"),
    (["--depths", "1.5"], "1.5"), (["--depths", "nan"], "nan"), (["--trials", "0"], "'0'"),
    (["--needles", "-1"], "-1"), (["--needles", "5000"], "5000 is too many"),
    (["--ckpt", "nowhere"], "nowhere is not a directory"), (["--ckpt", "random:9b"], "random:8b"),
    (["--haystack", "missing.txt"], "missing.txt"), (["--haystack", "empty.txt"], "empty.txt is empty"),
    (["--haystack", "latin1.txt"], "latin1.txt is empty, or not UTF-8"), (["--device", "cuda:99"], "cuda:99"),
    (["--device", "abacus"], "abacus"), (["--device", "meta"], "meta"), (["--dtype", "int3"], "int3"),
    (["--bogus"], "--bogus"), (["--tp", "2"], "--tp 2 needs torchrun"),
    (["--json", "no/where.json"], "no/where.json cannot be written"),
    (["--plot", "no/where.png"], "no/where.png cannot be written"),
    (["--json", "/dev/null"], "/dev/null cannot be written"), (["--len", "1" + "0" * 12], "would fit"),
    (["--chat"], "--chat needs"), (["--plot", "map.txt"], "must end in .png or .svg"),
    (["--set", "window=x"], "'window=x'"), (["--set", "window"], "'window'"),
    (["--set", "speed=3"], "speed is no setting of dpe"), (["--set", "ramp=9"], "ramp is no setting of dpe"),
    (["--set", "head=3-4", "--method", "lampe"], "head=3-4"),
    (["--set", "head=0.5", "--method", "lampe"], "head must be a whole"), (["--set", "window=0"], "window"),
    (["--set", "effective=" + "-".join("2" * 99)], "99"), (["--set", "topk=99"], "topk: 99"),
    (["--set", "scales=3-x"], "'x'"), (["--set", "topk=0"], "topk: 0"),
    (["--set", "factor=0", "--method", "yarn"], "factor must be at least 1")])
def test_bad_input_gets_one_sentence_and_exit_code_2(arguments, named, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    files = set(tmp_path.iterdir())
    assert command(monkeypatch, "--ckpt", TINY, *arguments) == 2
    assert named in refused(capsys)
    assert set(tmp_path.iterdir()) == files


@pytest.mark.parametrize("method, content", [
    ("dpe", "{"), ("dpe", "[1]"), ("dpe", '{"dpe": 3}'), ("dpe", '{"dpe": {"window": 4}}'),
    ("dpe", '{"dpe": {"window": 4, "scales": [1, 2], "topk": 3}}'),
    ("dpe", '{"dpe": {"window": 0, "effective": [1], "topk": 3}}'),
    ("dpe", '{"dpe": {"window": 4, "effective": 7, "topk": 3}}'),
    ("dpe", '{"dpe": {"window": 4, "effective": [0], "topk": 3}}'),
    ("dpe", '{"dpe": {"window": 4.5, "effective": [9], "topk": 3}}'),
    ("dpe", '{"dpe": {"window": 4, "effective": [9], "topk": "x"}}'),
    ("lampe", '{"lampe": {"a": 1, "b": 1, "head": 1, "tail": 1}}'),
    ("lampe", '{"lampe": {"a": "x", "b": 1, "L": 2, "head": 1, "tail": 1}}'),
    ("lampe", '{"lampe": {"a": 1, "b": 1, "L": 2, "head": 1}}'),
    ("lampe", '{"lampe": {"a": -9, "b": 1, "L": 200, "head": 1, "tail": 1}}')])
def test_an_unusable_extrapolation_json_is_refused(method, content, monkeypatch, capsys, tmp_path, uncalibrated):
    (tmp_path / "extrapolation.json").write_text(content)
    assert command(monkeypatch, "--ckpt", tmp_path, "--len", "300", "--method", method) == 2
    err = refused(capsys)
    assert "extrapolation.json" in err and ("extras/calibrate.py" in err or content in ("{", "[1]"))


@pytest.mark.parametrize("answer, score", [
    (" 40713.", 1), ("40713", 1), (" 4071", 0), (" 40714.", 0), ("140713", 0), ("407130", 0), ("", 0), (" four", 0),
    (" a40713.", 1)])
def test_a_number_counts_only_if_every_digit_is_right(answer, score, monkeypatch):
    monkeypatch.setattr(needle, "draw_trial", lambda *_: ([("coral otter", "40713"), ("jade owl", "55555")], [], []))
    monkeypatch.setattr(needle, "answer_questions", lambda *_: ([answer, "55555"], 1.0, 1.0))
    args = needle.make_parser("", needles=2).parse_args([])
    row = needle.run_trial(args, None, None, None, {(9, "rope"): (None,)}, (9, "rope", 0.0, 0))
    assert row["score"] == (score + 1) / 2


def test_the_command_line_writes_what_it_prints(monkeypatch, capsys, tmp_path):
    (tmp_path / "hay.txt").write_text("A bird sang. Rain fell on the town, and nobody minded! " * 30, encoding="utf-8")
    assert command(monkeypatch, "--ckpt", TINY, "--method", "rope,lampe", "--len", "400,500", "--depths", "0,1",
                   "--trials", "2", "--needles", "2", "--haystack", tmp_path / "hay.txt", "--seed", "5",
                   "--json", tmp_path / "out.json") == 0
    out, record = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert [(row["method"], row["length"], row["depth"], row["trial"]) for row in record["results"]] == [
        (m, n, d, t) for n in (400, 500) for m in ("rope", "lampe") for d in (0.0, 1.0) for t in (0, 1)]
    assert list(record["results"][0]) == ["method", "length", "depth", "trial", "score", "expected", "answer",
                                          "prefill_seconds", "decode_seconds"]
    for row in record["results"]:
        assert row["prefill_seconds"] > 0 and all(value in out for value in row["expected"])
    assert record["seed"] == 5 and record["needles"] == 2
    assert record["settings"]["rope at 400"] == {"from": "rule from the training length"}
    expected = [row["expected"] for row in record["results"]]
    assert expected[:4] == expected[4:8]  # the same prompts
    for method in ("rope", "lampe"):
        rows = [row["score"] for row in record["results"] if row["method"] == method and row["length"] == 500]
        line = out[out.index(f"{method:12}     400     500"):].split("mean")[1].split()
        assert float(line[1]) == pytest.approx(np.mean(rows), abs=0.006)
    assert not list(tmp_path.glob("*.unfinished"))


@given(found=st.integers(0, 99), more=st.integers(0, 99))
def test_the_tables_intervals_are_wilsons(found, more):
    wilson, n = importlib.import_module("extras.table").wilson, found + more + 1
    low, high = wilson(found, n)
    assert 0 <= low <= found / n <= high <= 1 and wilson(n - found, n) == pytest.approx((1 - high, 1 - low))
    for bound in (low, high):  # at which what was seen lies 1.96 standard deviations away
        assert abs(found / n - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), abs=1e-9)


def test_a_table_counts_needles_over_all_its_files(monkeypatch, capsys, tmp_path):
    table = importlib.import_module("extras.table")
    for name, score in (("a.json", 1.0), ("b.json", 0.25)):
        rows = [dict(method="dpe", length=4096, depth=0.5, score=score, expected=["1"] * 4),
                dict(method=name, length=8192, depth=0.5, score=0.0, expected=["1"])]
        (tmp_path / name).write_text(json.dumps({"results": rows}))
    assert command(monkeypatch, tmp_path / "a.json", tmp_path / "b.json", main=table.main) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| | 4,096 | 8,192 |", "|---|---|---|", "| dpe | 0.62 (0.31-0.86), 8 |  |",
        "| a.json |  | 0.00 (0.00-0.79), 1 |", "| b.json |  | 0.00 (0.00-0.79), 1 |"]


@pytest.mark.parametrize("content", ["", "[]", '{"results": [{"a": 1}]}', '{"results": {"16384": {}}}', '{"dpe": {}}',
                                     '{"results": [{"method": "dpe", "length": 9, "depth": 0, "score": 1}]}'])
def test_a_table_of_another_file_is_refused(content, monkeypatch, capsys, tmp_path):
    (tmp_path / "other.json").write_text(content)
    assert command(monkeypatch, tmp_path / "other.json", main=importlib.import_module("extras.table").main) == 2
    assert "other.json is not what needle.py --json wrote" in refused(capsys)


def test_random_weights_that_do_not_fit_are_refused_before_they_are_made(monkeypatch, capsys):
    monkeypatch.setattr(load_llama, "memory_free", lambda device: 10 ** 9)
    assert command(monkeypatch, "--ckpt", "random:1b") == 2
    assert "random:1b has 2.5 GB of weights, and 1.0 GB are free" in refused(capsys)


def test_a_picture_is_asked_for_by_its_name(monkeypatch, capsys, tmp_path):
    code = command(monkeypatch, "--ckpt", TINY, "--len", "300", "--depths", "1", "--plot", tmp_path / "map.png")
    err = capsys.readouterr().err  # matplotlib is optional
    assert (tmp_path / "map.png").stat().st_size if code == 0 else "pip install matplotlib" in err


@pytest.mark.parametrize("raised, code, said", [
    (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GB."), 2, "allocate 9 GB"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), 2, "shorter --len")])
def test_what_ends_a_run_leaves_the_rows_already_measured(raised, code, said, monkeypatch, capsys, tmp_path):
    real, calls = needle.answer_questions, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise raised
        return real(*arguments)
    monkeypatch.setattr(needle, "answer_questions", failing)
    assert command(monkeypatch, "--ckpt", TINY, "--len", "300", "--json", tmp_path / "out.json") == code
    assert len(json.loads((tmp_path / "out.json").read_text())["results"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_an_illegal_memory_access_is_not_called_out_of_memory(monkeypatch):
    def broken(args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(needle, "load", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        command(monkeypatch, "--ckpt", TINY)


@pytest.mark.skipif(not Path("/proc").exists(), reason="signals as on Linux")
@pytest.mark.parametrize("kill, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_killed_in_mid_run_it_leaves_whole_rows(kill, code, tmp_path):
    file = tmp_path / "out.json"
    run = [sys.executable, TINY.parent / "needle.py", "--len", "300", "--trials", "9999", "--json", file]
    process = subprocess.Popen(run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not file.exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(kill)
    assert process.wait(20) == code
    assert process.stderr.read() == ("needle.py: interrupted\n" if code == 130 else "")
    assert len(json.loads(file.read_text())["results"]) >= 1


def test_calibration_writes_settings_that_needle_py_then_uses(monkeypatch, capsys, tmp_path, uncalibrated):
    calibrate = importlib.import_module("extras.calibrate")
    ckpt = ["--ckpt", tmp_path, "--train-len", "256", "--len", "512"]
    for method in ("dpe", "lampe"):
        assert command(monkeypatch, method, *ckpt, "--needles", "4", main=calibrate.main) == 0
    record, out = json.loads((tmp_path / "extrapolation.json").read_text()), capsys.readouterr().out
    assert record["lampe"].keys() >= ({"ramp"} if " is kept" in out else {"a", "b", "L"})
    dpe = record["dpe"]
    assert dpe["candidates"] == [1, 2, 4, 8, 16] and dpe["background"] == 4
    assert record["made_with"]["dpe"]["length"] == 512
    scales = [512 // tokens for tokens in dpe["effective"]]
    assert len(scales) == len(dpe["scores"]) == 8 and set(scales) <= {1, 2, 4, 8, 16}
    record["lampe"] = {"a": 1e-3, "b": 0.5, "L": 200.0, "head": 20, "tail": 10}
    (tmp_path / "extrapolation.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert command(monkeypatch, *ckpt, "--method", "dpe,lampe,rerope", "--depths", "1") == 0
    out = capsys.readouterr().out
    assert f"scales {'-'.join(map(str, scales))}" in out and "(extrapolation.json)" in out
    assert f"ramp {rx.lampe_ramp(512, 1e-3, 0.5, 200.0)}, head 20, tail 10 (extrapolation.json)" in out
    assert "rerope at 512: window 64 (rule" in out
    assert command(monkeypatch, *ckpt, "--set", "window=33,effective=256-128,topk=5", "--depths", "1") == 0
    shown = "window 33, effective 256-128, topk 5, scales 2-4 (extrapolation.json and --set)"
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("arguments, named", [
    (["rope"], "'rope'"), ([], "method"), (["dpe", "--out", "no/where.json"], "no/where.json cannot be written"),
    (["lampe", "--haystack", "short.txt"], "needs as many"), (["dpe", "--set", "ramp=3"], "ramp is no setting of dpe"),
    (["dpe", "--set", "effective=9"], "effective is no setting of dpe, or the one that is to be found"),
    (["dpe", "--ckpt", "nowhere"], "nowhere is no directory"), (["dpe", "--out", "odd.json"], "odd.json is damaged"),
    (["dpe", "--needles", "1"], "no error bar"),
    (["dpe", "--out", "bad.json"], "bad.json cannot be read as JSON")])
def test_a_calibration_that_cannot_work_is_refused(arguments, named, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("One sentence.")
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "odd.json").write_text('{"made_with": 3}')
    files = set(tmp_path.iterdir())
    assert command(monkeypatch, "--ckpt", TINY, *arguments, main=importlib.import_module("extras.calibrate").main) == 2
    assert named in refused(capsys) and set(tmp_path.iterdir()) == files


def calibrated_dpe(monkeypatch, length, log_p, right=True):
    """What calibrate_dpe finds, on 256 tokens of training, when answers' tokens have log_p(scales of the groups)."""
    calibrate = importlib.import_module("extras.calibrate")

    def answers(model, tokens, last, method):
        scales = (2 ** 40 // method.bands[1].k_pos(torch.tensor([[2 ** 40]]))[0])[::2]  # of 16 frequencies in 8 groups
        return torch.full((last,), log_p(scales.tolist())), torch.full((last,), right)
    monkeypatch.setattr(calibrate, "tail_scores", answers)
    args = needle.make_parser("", needles=2).parse_args(["--train-len", "256"])
    args.lengths = [length]
    model, tokenizer, _, _ = needle.load(args)
    return calibrate.calibrate_dpe(args, model, tokenizer, None, dict(window=4, topk=None))


@pytest.mark.parametrize("length, candidates, background", [
    (70, [1, 2], 1), (300, [1, 2, 4, 8], 2), (1024, [1, 2, 4, 8, 16, 32], 8)])
def test_dpe_is_calibrated_at_any_length(length, candidates, background, monkeypatch):
    found = calibrated_dpe(monkeypatch, length, lambda scales: 0.0)
    assert (found["candidates"], found["background"], found["effective"]) == (candidates, background, [length] * 8)


@pytest.mark.parametrize("borne, effective", [(24, 1024), (23, 512), (9, 256), (7, 128)])
def test_what_groups_bear_alone_and_not_together_is_halved_until_they_do(borne, effective, monkeypatch):
    def log_p(scales):  # each group may be stretched 8 times beyond the background, all by 2^borne
        return -float(sum(math.log2(8 / min(s, 8)) for s in scales) > borne)
    assert calibrated_dpe(monkeypatch, 1024, log_p)["effective"] == [effective] * 8


def calibrated_lampe(monkeypatch, losses):
    calibrate = importlib.import_module("extras.calibrate")
    monkeypatch.setattr(calibrate, "tail_scores", losses)
    args = needle.make_parser("", needles=2).parse_args(["--train-len", "256", "--trials", "2"])
    args.lengths = [2048]
    model, tokenizer, _, _ = needle.load(args)
    return calibrate.calibrate_lampe(args, model, tokenizer, None, dict(ramp=64, head=16, tail=8))


@pytest.mark.parametrize("depth", [1.0, 0.0])
def test_the_best_ramps_are_the_bottoms_of_their_curves_and_flat_curves_have_none(depth, monkeypatch, capsys):
    rng = torch.Generator().manual_seed(0)
    planted, noise = (0.002, -2.0, 200.0), 1e-3 * torch.randn(9999, generator=rng)

    def losses(model, tokens, last, method):
        T, bands = len(tokens), method.bands
        ramp = bands[1].k_pos(torch.tensor([[T]])).item() if len(bands) == 3 else T
        bottom = depth * math.log2(ramp / sigmoid(T, *planted)) ** 2
        return -bottom + 0.1 * torch.randn(last, generator=rng.manual_seed(T)) + noise[ramp:ramp + last], None
    found = calibrated_lampe(monkeypatch, losses)
    if depth:
        assert [*found["best_ramps"]] == [256, 512, 1024, 2048]
        for T, (ramp, _) in found["best_ramps"].items():
            assert ramp == pytest.approx(sigmoid(T, *planted), rel=0.02)
            assert rx.lampe_ramp(T, *map(found.get, "abL")) == pytest.approx(ramp, rel=0.05)
    else:
        assert found["ramp"] == 64 and "a" not in found and "not distinguishable" in capsys.readouterr().out


def test_a_model_that_answers_nothing_has_no_settings(monkeypatch):
    with pytest.raises(ValueError, match="no answer was right at any setting"):
        calibrated_dpe(monkeypatch, 300, lambda scales: 0.0, right=False)
    with pytest.raises(ValueError, match="predicts next to nothing at any ramp"):
        calibrated_lampe(monkeypatch, lambda model, tokens, last, method: (torch.full((last,), -math.log(949)), None))


# ---------------------------------------------------------------------------------------------------------------------
# The needle test on several ranks


SHORT = ["--method", "rope,dpe,lampe", "--set", "topk=10", "--train-len", "100", "--len", "180,240", "--needles", "4",
         "--depths", "1"]


def without_seconds(file):
    rows = json.loads(file.read_text())["results"]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def of_a_needle_test(rank, world, path, tp):
    """needle.py as torchrun starts it, with what torchrun tells it; path holds what it prints and writes."""
    torch.set_num_threads(1)
    names = dict(RANK=rank, WORLD_SIZE=world, LOCAL_RANK=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(path))
    os.environ |= {name: str(value) for name, value in names.items()}
    needle.RANK, needle.WORLD = rank, world
    sys.argv = ["needle.py", *SHORT, "--tp", str(tp), "--json", str(path / "out.json")]
    sys.stdout = open(path / "out", "a")
    needle.main()
    sys.stdout.flush()


@functools.lru_cache
def free_port(path):
    """The same in all ranks of a test, since they are forks of one process that has asked."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.mark.parametrize("world, tp", [(2, 1), (2, 2), (4, 2)])
def test_replicas_and_ranks_of_one_model_find_the_rows_of_one_process(world, tp, monkeypatch, capsys, tmp_path):
    assert command(monkeypatch, *SHORT, "--json", tmp_path / "one.json") == 0
    free_port(tmp_path)
    import torch.distributed.tensor.parallel  # noqa: F401  once, and not in each process
    torch.multiprocessing.start_processes(of_a_needle_test, (world, tmp_path, tp), nprocs=world, start_method="fork")
    assert without_seconds(tmp_path / "out.json") == without_seconds(tmp_path / "one.json")
    out = (tmp_path / "out").read_text()
    assert out.count("\n") == capsys.readouterr().out.count("\n")  # one rank prints
    lengths = [int(line.split()[1]) for line in out.splitlines() if "score" in line]
    assert lengths == sorted(lengths, reverse=world > tp)  # replicas take the longest first
    assert not list(tmp_path.glob("*.unfinished"))


def torchrun(ranks, *arguments):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), TINY.parent / "needle.py"]
    return subprocess.Popen([*run, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(not Path("/proc").exists(), reason="children are found as on Linux")
def test_a_rank_killed_in_mid_run_ends_the_others_and_loses_no_row(tmp_path):
    file = tmp_path / "out.json"
    process = torchrun(2, "--len", "250", "--trials", "9999", "--json", file)
    deadline = time.time() + 60
    while not file.exists() and time.time() < deadline:
        time.sleep(0.05)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    rows = without_seconds(file)
    assert 1 <= len(rows) and out.count("score") - len(rows) in (0, 1)  # printed, and perhaps not yet written


def test_ranks_that_cannot_run_say_so_once():
    out, err = torchrun(2, "--tp", "4").communicate(timeout=60)
    said = [line for line in err.splitlines() if line.startswith("needle.py: ")]
    assert out == "" and said == ["needle.py: --tp 4 needs torchrun with 4 processes or a multiple, and there are 2"]


@pytest.mark.parametrize("shape", ["1b", "8b"])
def test_random_weights_of_a_published_shape_run(shape, monkeypatch, capsys):
    size = dict(vocab_size=5000, dim=64, n_layers=1, n_heads=8, head_dim=8, ffn_dim=32)
    small = dataclasses.replace(load_llama.SHAPES[shape], **size)
    monkeypatch.setitem(load_llama.SHAPES, shape, small)
    run = ["--ckpt", f"random:{shape}", "--method", "dpe", "--len", "300", "--depths", "1", "--train-len", "100"]
    assert command(monkeypatch, *run) == 0
    out = capsys.readouterr().out
    assert "scores mean nothing" in out and "trained on 100 tokens" in out and "bfloat16" in out
    assert f"{sum(p.numel() for p in Llama(small).parameters()):,} parameters" in out


def scores(monkeypatch, tmp_path, *arguments):
    assert command(monkeypatch, "--ckpt", TINY, *arguments, "--json", tmp_path / "out.json") == 0
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    methods = {row["method"] for row in rows}
    return {method: np.mean([row["score"] for row in rows if row["method"] == method]) for method in methods}


def test_the_bundled_model_answers_at_its_training_length(monkeypatch, tmp_path):
    found = scores(monkeypatch, tmp_path, "--method", "rope,lampe", "--len", "4096", "--trials", "4")
    assert found["rope"] >= 0.95 and found["lampe"] >= 0.95


def test_at_four_times_its_training_length_the_methods_answer_and_rope_does_not(monkeypatch, tmp_path):
    found = scores(monkeypatch, tmp_path, "--method", "rope,dpe,lampe", "--len", "16384", "--depths", "3")
    assert found["rope"] == 0 and found["dpe"] == found["lampe"] == 1
