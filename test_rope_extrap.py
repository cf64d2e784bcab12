"""What the methods promise about positions, as properties over windows, scales, lengths and shapes.

    pytest

The oracle is at the top: a Llama in float64 numpy that scores every pair by the relative position that the papers' formulas give
it, one pair of coordinates at a time. It rotates nothing and knows no bands.
"""
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import needle
import rope_extrap as rx
from load_llama import load_model, load_tokenizer
from model import Config, KVCache, Llama, RopeScaling, generate

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")

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


def formula_matrix(formula, length):
    return np.array([[formula(i, j) if j <= i else 0 for j in range(length)] for i in range(length)])


def oracle_logits(weights, config, frequencies, tokens, rel, temperature=1.0):
    """Logits (T, vocab). rel: per layer, relative positions that broadcast to (heads, T, T, D/2)."""
    def norm(x, weight):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weight

    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    T, D, group = len(tokens), config.head_dim, config.n_heads // config.n_kv_heads
    x = w["tok_embeddings.weight"][tokens]
    for n in range(config.n_layers):
        p = f"layers.{n}."
        h = norm(x, w[p + "attention_norm.weight"])
        q, k, v = ((h @ w[p + f"attention.{name}.weight"].T).reshape(T, -1, D) for name in ("wq", "wk", "wv"))
        angle = np.broadcast_to(rel[n], (config.n_heads, T, T, D // 2)) * frequencies.numpy()
        out = np.zeros_like(q)
        for head in range(config.n_heads):
            q1, q2 = np.split(q[:, None, head], 2, -1)
            k1, k2 = np.split(k[None, :, head // group], 2, -1)
            cos, sin = np.cos(angle[head]), np.sin(angle[head])
            scores = ((q1 * k1 + q2 * k2) * cos + (q1 * k2 - q2 * k1) * sin).sum(-1) * temperature / math.sqrt(D)
            scores[distances(T) < 0] = -np.inf
            e = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = e / e.sum(-1, keepdims=True) @ v[:, head // group]
        x = x + out.reshape(T, -1) @ w[p + "attention.wo.weight"].T
        h = norm(x, w[p + "ffn_norm.weight"])
        gate = h @ w[p + "feed_forward.w1.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[p + "feed_forward.w3.weight"].T)) @ w[p + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def random_llama(seed=0, **changes):
    """Two layers, grouped-query attention, and weights large enough that attention is far from uniform."""
    c = Config(**(dict(vocab_size=48, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=96, train_len=64,
                       rope_theta=500000.0) | changes))
    model = Llama(c).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        std = 3.0 if "wq" in name or "wk" in name else 1.0
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else std / math.sqrt(parameter.shape[-1]), generator=generator)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Rotation


@given(st.integers(1, 16), st.integers(0, 2 ** 20), st.integers(0, 2 ** 20), st.integers(0, 2 ** 32))
def test_rotation_keeps_norms_and_scores_see_differences_only(half, a, b, seed):
    g = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 2 * half, generator=g)
    f = rx.rope_frequencies(2 * half, 10000.0)

    def at(x, position):
        return rx.rotate(x, torch.tensor([[position]]), f)
    torch.testing.assert_close(at(q, a).norm(), q.norm())
    torch.testing.assert_close(at(q, 0), q)
    torch.testing.assert_close((at(q, a + b) * at(k, b)).sum(), (at(q, a) * k).sum(), atol=1e-4, rtol=1e-4)


def test_rotation_turns_by_position_times_frequency():
    f = torch.tensor([1.0, 0.1])
    x = torch.tensor([1.0, 1.0, 0.0, 0.0]).view(1, 1, 1, 4)  # pairs (0, 2) and (1, 3)
    expected = [math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)]
    torch.testing.assert_close(rx.rotate(x, torch.tensor([[3]]), f).flatten(), torch.tensor(expected))
    assert rx.rotate(x.bfloat16(), torch.tensor([[3]]), f).dtype == torch.bfloat16


@given(st.integers(1, 64), st.floats(100, 1e6))
def test_frequencies_fall_from_one_to_nearly_one_over_theta(half, theta):
    f = rx.rope_frequencies(2 * half, theta)
    np.testing.assert_allclose(f, [theta ** (-2 * n / (2 * half)) for n in range(half)])


# ---------------------------------------------------------------------------------------------------------------------
# Every method

some_method = st.one_of(
    st.just(rx.rope()), st.builds(rx.rerope, windows), st.builds(rx.self_extend, windows, scales),
    st.builds(rx.dpe, windows, st.lists(scales, min_size=4, max_size=4)),
    st.builds(rx.dpe, windows, st.lists(st.lists(scales, min_size=4, max_size=4), min_size=4, max_size=4)),
    st.builds(rx.lampe, lengths, lengths, st.integers(0, 30), st.integers(0, 30)))


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
    np.testing.assert_array_equal(matrix(rx.dpe(w, s), length)[..., 0], formula_matrix(lambda i, j: dpe_formula(i, j, w, s), length))


@given(windows, st.lists(scales, min_size=1, max_size=6), lengths)
def test_dpe_is_exact_inside_the_window_and_scale_1_is_rope(w, s, length):
    d = distances(length)[..., None]
    rel = matrix(rx.dpe(w, s), length)
    np.testing.assert_array_equal(rel[(d[..., 0] >= 0) & (d[..., 0] < w)], np.broadcast_to(d, (length, length, len(s)))[(d[..., 0] >= 0) & (d[..., 0] < w)])
    np.testing.assert_array_equal(matrix(rx.dpe(w, 1), length), matrix(rx.rope(), length))


@given(windows, st.lists(scales, min_size=1, max_size=6), lengths)
def test_each_dimension_of_dpe_is_selfextend_with_its_own_scale(w, s, length):
    rel = matrix(rx.dpe(w, s), length)
    for f, scale in enumerate(s):
        np.testing.assert_array_equal(rel[..., f], matrix(rx.self_extend(w, scale), length)[..., 0])


@given(windows, lengths)
def test_dpe_with_scales_beyond_every_index_is_rerope(w, length):
    rel = matrix(rx.rerope(w), length)
    np.testing.assert_array_equal(rel, matrix(rx.dpe(w, 1000), length))
    np.testing.assert_array_equal(rel[..., 0], np.clip(distances(length), 0, w))


@given(windows, scales, lengths, st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=3, max_size=3))
def test_dpe_leaves_dimensions_that_are_not_key_at_their_distance(w, s, length, key):
    key = torch.tensor(key)
    rel = matrix(rx.dpe(w, torch.where(key, s, 1)), length)  # (heads, T, T, D/2)
    plain, scaled = matrix(rx.rope(), length)[..., 0], matrix(rx.dpe(w, s), length)[..., 0]
    for head in range(3):
        for f in range(5):
            np.testing.assert_array_equal(rel[head, :, :, f], scaled if key[head, f] else plain)


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
    d = distances(9)
    for s, last_row in ((3, [4, 4, 4, 3, 3, 3, 2, 1, 0]), (2, [5, 5, 4, 4, 3, 3, 2, 1, 0])):
        drawn = np.where(d < 3, d, (d - 3) // s + 3)
        assert drawn[-1].tolist() == last_row
        rel = matrix(rx.dpe(3, s), 9)[..., 0]
        assert np.isin((rel - drawn)[d >= 0], [0, 1] if s == 3 else [0, 1, 2]).all()
    assert matrix(rx.dpe(3, 3), 9)[8, :, 0].tolist() == [4, 4, 4, 3, 3, 3, 2, 1, 0]


@pytest.mark.parametrize("window, scale", [(0, 2), (3, 0), (3, [1, -1]), (3, [1.5])])
def test_dpe_refuses_windows_and_scales_that_are_none(window, scale):
    with pytest.raises(ValueError, match="at least 1"):
        rx.dpe(window, scale)


# ---------------------------------------------------------------------------------------------------------------------
# LaMPE

lampe_settings = st.tuples(lengths, lengths, st.integers(0, 30), st.integers(0, 30))  # l, ramp, s1, s2


@given(lampe_settings)
def test_lampe_is_its_formula(values):
    np.testing.assert_array_equal(matrix(rx.lampe(*values), values[0])[..., 0], formula_matrix(lambda i, j: lampe_formula(i, j, *values), values[0]))


@given(lampe_settings)
def test_lampes_head_and_tail_are_exact_and_nothing_passes_m(values):
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
    np.testing.assert_array_equal(matrix(rx.lampe(2 * s1 + 1, 1, s1 + 1, s2), 2 * s1 + 1), matrix(rx.rope(), 2 * s1 + 1))


LLAMA_3_8B = (0.00010493097327094324, -2.466638011138158, 6204.409324666837)


def test_lampes_ramp_for_llama_3_8b():
    assert rx.lampe_ramp(32768, *LLAMA_3_8B) == 4501
    assert rx.lampe_ramp(65536, *LLAMA_3_8B) == 6129  # 6129.9, truncated


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
# Attention


@given(st.data(), some_method, lengths, st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.integers(0, 2 ** 32))
def test_fast_attention_is_dense_attention(data, method, S, batch, kv_heads, seed):
    T = data.draw(st.integers(1, S))
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, n, 8, generator=g) for heads, n in ((4, T), (kv_heads, S), (kv_heads, S)))
    f = rx.rope_frequencies(8, 100.0)
    torch.testing.assert_close(rx.attend(q, k, v, method, f), rx.attend_dense(q, k, v, method, f), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [rx.rope(), rx.dpe(128, 7), rx.dpe(100, [[2, 5] * 8] * 2), rx.lampe(1000, 300, 128, 64)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fast_attention_is_dense_attention_at_a_thousand_tokens(method, dtype, tolerance):
    q, k, v = torch.randn(3, 1, 2, 1013, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    f = rx.rope_frequencies(32, 10000.0)
    exact = rx.attend_dense(*(x.double() for x in (q, k, v)), method, f)
    torch.testing.assert_close(rx.attend(q, k, v, method, f).double(), exact, atol=tolerance, rtol=0)


@given(st.integers(1, 600), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 2 ** 32))
def test_the_blockwise_softmax_is_the_kernel(T, kv_heads, is_causal, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, T, 4, generator=g) for heads in (2, kv_heads, kv_heads))
    out, lse = rx.blockwise_attention(q, k, v, 0.5, is_causal)
    kernel_out, kernel_lse = rx.fused_attention(q, k, v, 0.5, is_causal)
    torch.testing.assert_close(out, kernel_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, kernel_lse, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The model

KEY_DIMS = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(3)) < 0.75  # (layers, heads, D/2)
SCALES = torch.tensor([4, 4, 2, 16, 32, 32, 16, 1]).repeat_interleave(2)  # (D/2,)
LENGTH = 192
CASES = {  # methods per layer, the oracle's relative positions per layer, temperature, frequency scaling
    "rope": (None, [distances(LENGTH)[..., None]] * 2, 1.0, None),
    "llama 3.1": (None, [distances(LENGTH)[..., None]] * 2, 1.0, RopeScaling(original_len=64)),
    "dpe": ([rx.dpe(32, SCALES)] * 2, None, 1.0, None),
    "dpe, key dimensions": ([rx.dpe(32, torch.where(key, SCALES, 1)) for key in KEY_DIMS], KEY_DIMS, 1.0, None),
    "lampe": ([rx.lampe(LENGTH, 60, 16, 8)] * 2, [formula_matrix(lambda i, j: lampe_formula(i, j, LENGTH, 60, 16, 8), LENGTH)[..., None]] * 2,
              (0.1 * math.log(2) + 1) ** 2, None)}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_oracles_in_one_forward_and_in_prefill_and_decode(case):
    methods, rel, temperature, scaling = CASES[case]
    if case.startswith("dpe"):
        scaled = np.stack([formula_matrix(lambda i, j: dpe_formula(i, j, 32, s), LENGTH) for s in SCALES.tolist()], -1)
        rel = [scaled] * 2 if rel is None else [np.where(key[:, None, None], scaled, distances(LENGTH)[..., None]) for key in KEY_DIMS.numpy()]
    model = random_llama(rope_scaling=scaling)
    tokens = torch.randint(48, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = oracle_logits(model.state_dict(), model.config, model.config.frequencies(), tokens[0], rel, temperature)
    np.testing.assert_allclose(model(tokens, methods)[0], expected, atol=1e-3)
    cache = KVCache(model.config, 1, LENGTH)
    pieces = [model(part, methods, cache)[0] for part in tokens.split([100, 40] + [1] * 52, dim=1)]
    np.testing.assert_allclose(torch.cat(pieces), expected, atol=1e-3)


def test_llama_31_keeps_fast_frequencies_and_divides_slow_ones():
    c = random_llama(head_dim=128, rope_scaling=RopeScaling()).config
    f, scaled = rx.rope_frequencies(128, 500000.0), c.frequencies()
    wavelength = 2 * math.pi / f
    torch.testing.assert_close(scaled[wavelength < 2048], f[wavelength < 2048])
    torch.testing.assert_close(scaled[wavelength > 8192], f[wavelength > 8192] / 8)
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.any() and ((scaled < f) & (scaled > f / 8))[between].all()


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


def test_tied_output_is_the_embedding():
    model = random_llama(tied=True)
    assert model.output.weight is model.tok_embeddings.weight
    assert sum(p.numel() for p in random_llama().parameters()) - sum(p.numel() for p in model.parameters()) == 48 * 64


def test_generate_is_greedy_and_each_row_stops_at_its_stop_token():
    model, prompt = random_llama(), torch.arange(10).view(2, 5)
    free = generate(model, prompt, 12)
    row = prompt[:1]
    for _ in range(12):
        row = torch.cat((row, model(row)[:, -1:].argmax(-1)), dim=1)
    assert free[0].tolist() == row[0, 5:].tolist()
    stop = free[0, 3].item()
    stopped = generate(model, prompt, 12, stop_ids=[stop])
    for full, cut in zip(free.tolist(), stopped.tolist()):
        end = full.index(stop) + 1 if stop in full else len(full)
        assert cut[:end] == full[:end][:len(cut)] and set(cut[end:]) <= {stop}
    assert generate(model, prompt[:1], 12, stop_ids=[stop])[0].tolist() == free[0, :free[0].tolist().index(stop) + 1].tolist()


def test_the_model_refuses_methods_and_caches_that_do_not_fit():
    model, tokens = random_llama(), torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 methods for 2 layers"):
        model(tokens, [rx.rope()] * 3)
    with pytest.raises(ValueError, match="cache of 4"):
        model(tokens, cache=KVCache(model.config, 1, 4))
