"""Position invariants: what the methods promise about relative positions.

    python -m pytest test_rope_extrap.py

    RoPE's scores depend on i - j alone             test_rope_scores_depend_on_the_difference_...
    the bands of a method partition the distances   test_bands_partition_the_distances
    a token is at distance 0 from itself            test_the_diagonal_is_0_and_so_is_what_is_above
    DPE and LaMPE are the papers' formulas          test_dpe_is_its_formula, test_lampe_is_...
    both are 0 to 2 above the papers' matrices      test_dpe_is_0_to_2_..., test_lampe_is_0_to_2_...
    relative positions grow with distance           test_dpe_grows_..., test_lampe_grows_...
    the largest relative position                   test_dpes_largest_..., test_lampe_never_...
    near distances are exact                        test_dpe_keeps_..., test_lampes_head_is_...
    limits: SelfExtend, ReRoPE, RoPE                test_each_frequency_of_dpe_is_self_extend,
                                                    test_dpe_with_..., test_lampe_without_...
    dimensions that are not key keep d              test_dimensions_that_are_not_key_...
    shifts by the scale change nothing              test_dpe_is_invariant_to_shifts_by_the_scale
    fast attention is dense attention               test_fast_attention_is_dense_attention, ...
    attention sees relative positions alone         test_dense_attention_sees_only_...
    the model's logits are the oracle's             test_logits_are_the_oracles
    decoding continues the prefill                  test_decoding_continues_the_prefill
    causality                                       test_later_tokens_do_not_change_earlier_logits
    patterns that RoPE loses past training          test_planted_patterns_are_kept

The strategies draw only settings that compress positions. Settings that compress nothing have
tests of their own.
"""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rope_extrap as rx
from extras.tests.helpers import random_llama
from extras.tests.oracle import oracle_logits
from model import KVCache, RopeScaling

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")

# -------------------------------------------------------------------------------------------------
# Strategies, and matrices as numpy arrays


@st.composite
def dpe_settings(draw):
    """(window, scale, length): a scale of at least 2, and tokens far enough beyond the window."""
    window = draw(st.integers(1, 40))
    scale = draw(st.integers(2, 40))
    length = window + scale + 1 + draw(st.integers(0, 40))
    return window, scale, length


@st.composite
def lampe_settings(draw):
    """(length, mapping_len, s1, s2) with at least one distance in the middle, and a slope below
    1."""
    s1 = draw(st.integers(0, 15))
    s2 = draw(st.integers(0, 15))
    length = max(2 * s1, s1 + s2 + 2, 2) + draw(st.integers(0, 50))
    mapping_len = draw(st.integers(1, length - 1))
    return length, mapping_len, s1, s2


def draw_key_dims(draw, heads, frequencies):
    row = st.lists(st.booleans(), min_size=frequencies, max_size=frequencies)
    return torch.tensor(draw(st.lists(row, min_size=heads, max_size=heads)))


@st.composite
def methods_with_lengths(draw):
    """(method, length) for 4 heads of 4 frequencies: any method, under settings that compress."""
    kind = draw(st.sampled_from(["rope", "yarn", "rerope", "self-extend", "dpe", "key", "lampe"]))
    if kind == "lampe":
        values = draw(lampe_settings())
        return rx.lampe(*values), values[0]
    window, scale, length = draw(dpe_settings())
    scales = draw(st.lists(st.integers(1, 40), min_size=4, max_size=4))
    if kind == "rope":
        return rx.rope(), length
    if kind == "yarn":
        return rx.yarn(rx.rope_frequencies(8, 100.0), float(scale), window), length
    if kind == "rerope":
        return rx.rerope(window), length
    if kind == "self-extend":
        return rx.self_extend(window, scale), length
    if kind == "dpe":
        return rx.dpe(window, scales), length
    return rx.dpe(window, scales, draw_key_dims(draw, 4, 4)), length


def stretched(factors):
    """A method of one's own: distances from 3 on are stretched, by a factor per frequency."""
    factors = torch.tensor(factors)
    return rx.Method([rx.Band(0, 3, rx.identity, rx.identity),
                      rx.Band(3, None, lambda i: i * factors, lambda j: j * factors)])


def matrix(method, length):
    """relative_positions as numpy, always with a last dimension of frequencies."""
    rel = rx.relative_positions(method, length)
    if rel.ndim == 2:
        rel = rel[..., None]
    return rel.numpy()


def distances(length):
    return np.subtract.outer(np.arange(length), np.arange(length))


# -------------------------------------------------------------------------------------------------
# The papers' formulas, pair by pair, and the matrices that the papers draw


def dpe_formula(i, j, w, s):
    if i - j < w:
        return i - j
    return i // s - j // s + w - w // s


def lampe_formula(i, j, l, mapping_len, s1, s2):
    d = i - j
    if d <= s1:
        return d
    if d < l - s2:
        return i * mapping_len // l - j * mapping_len // l + s1 - s1 * mapping_len // l
    m = s1 + s2 + (l - s1 - s2) * mapping_len // l
    return d - (l - m)


def formula_matrix(formula, length, *values):
    rel = np.zeros((length, length), dtype=np.int64)
    for i in range(length):
        for j in range(i + 1):
            rel[i, j] = formula(i, j, *values)
    return rel


def dpe_as_drawn(length, w, s):
    d = distances(length)
    return np.where(d < w, d, (d - w) // s + w)


def lampe_as_drawn(length, mapping_len, s1):
    """The middle of the paper's matrix: floor(c (d - s1) + s1), with c = mapping_len / l."""
    d = distances(length)
    return (mapping_len * (d - s1)) // length + s1


# -------------------------------------------------------------------------------------------------
# RoPE

positions = st.integers(0, 2 ** 17)

@given(st.integers(1, 16), positions, positions, st.integers(0, 2 ** 32))
def test_rope_scores_depend_on_the_difference_of_positions(half, a, b, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 2 * half, generator=generator)
    frequencies = rx.rope_frequencies(2 * half, 10000.0)

    def at(x, position):
        return rx.rotate(x, rx.freqs_cis(torch.tensor([[position]]), frequencies))
    torch.testing.assert_close(at(q, a).norm(), q.norm())
    torch.testing.assert_close(at(q, 0), q)
    shifted = (at(q, a + b) * at(k, b)).sum()
    torch.testing.assert_close(shifted, (at(q, a) * k).sum(), atol=1e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------
# Every method


@given(methods_with_lengths())
def test_bands_partition_the_distances(case):
    method, _ = case
    bands = method.bands
    assert bands[0].near == 0
    assert bands[-1].far is None
    for band, following in zip(bands, bands[1:], strict=False):
        assert band.near < band.far == following.near


@given(methods_with_lengths())
def test_the_diagonal_is_0_and_so_is_what_is_above(case):
    method, length = case
    rel = matrix(method, length)
    assert (rel >= 0).all()
    assert (rel[..., distances(length) <= 0, :] == 0).all()


# -------------------------------------------------------------------------------------------------
# DPE


@given(dpe_settings())
def test_dpe_is_its_formula(values):
    w, s, length = values
    rel = matrix(rx.dpe(w, s), length)[..., 0]
    np.testing.assert_array_equal(rel, formula_matrix(dpe_formula, length, w, s))
    assert rel.max() < length - 1  # something was compressed


@given(dpe_settings())
def test_dpe_is_0_to_2_above_the_papers_matrix(values):
    w, s, length = values
    above = matrix(rx.dpe(w, s), length)[..., 0] - dpe_as_drawn(length, w, s)
    above = above[distances(length) >= 0]
    assert above.min() >= 0
    assert above.max() <= (1 if w % s == 0 else 2)


@pytest.mark.parametrize("s, drawn, exact", [(3, [4, 4, 4, 3, 3, 3, 2, 1, 0], True),
                                             (2, [5, 5, 4, 4, 3, 3, 2, 1, 0], False)])
def test_the_matrices_of_dpes_figure_1c(s, drawn, exact):
    """The last row, with window 3. Scale 3 divides the window and 9, so it is exact."""
    assert dpe_as_drawn(9, 3, s)[8].tolist() == drawn
    row = matrix(rx.dpe(3, s), 9)[8, :, 0]
    assert (row.tolist() == drawn) == exact


@given(dpe_settings())
def test_dpe_grows_with_distance_by_0_to_2(values):
    w, s, length = values
    for i, row in enumerate(matrix(rx.dpe(w, s), length)[..., 0]):
        by_distance = row[:i + 1][::-1]  # of a fixed query, keys further and further away
        steps = np.diff(by_distance)
        assert (steps >= 0).all()
        assert (steps <= 2).all()


@given(dpe_settings())
def test_dpes_largest_relative_position(values):
    w, s, length = values
    rel = matrix(rx.dpe(w, s), length)[..., 0]
    assert rel.max() == rel[-1, 0] == (length - 1) // s + w - w // s


def test_the_largest_position_exceeds_the_effective_length():
    """By about the window: 65,536 tokens, window 256 and scale 32, an effective length of
    2,048."""
    first_key, last_query = torch.tensor([[0]]), torch.tensor([[65535]])
    far = rx.dpe(256, 32).bands[1]
    assert (far.q_pos(last_query) - far.k_pos(first_key)).item() == 2295


@given(dpe_settings())
def test_dpe_keeps_distances_within_the_window(values):
    w, s, length = values
    d = distances(length)
    near = (0 <= d) & (d < w)
    np.testing.assert_array_equal(matrix(rx.dpe(w, s), length)[near][:, 0], d[near])
    np.testing.assert_array_equal(matrix(rx.dpe(length, s), length), matrix(rx.rope(), length))


@given(dpe_settings(), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_each_frequency_of_dpe_is_self_extend(values, scales):
    w, _, length = values
    rel = matrix(rx.dpe(w, scales), length)
    for f, scale in enumerate(scales):
        self_extend = matrix(rx.self_extend(w, scale), length)[..., 0]
        np.testing.assert_array_equal(rel[..., f], self_extend)


@given(dpe_settings())
def test_dpe_with_endless_scales_is_rerope_and_with_1_rope(values):
    w, _, length = values
    rerope = matrix(rx.rerope(w), length)
    np.testing.assert_array_equal(rerope[..., 0], np.clip(distances(length), 0, w))
    np.testing.assert_array_equal(rerope, matrix(rx.dpe(w, 1000), length))
    np.testing.assert_array_equal(matrix(rx.dpe(w, 1), length), matrix(rx.rope(), length))


@given(st.data(), dpe_settings())
def test_dimensions_that_are_not_key_keep_their_distance(data, values):
    w, s, length = values
    key_dims = draw_key_dims(data.draw, heads=3, frequencies=5)
    rel = matrix(rx.dpe(w, s, key_dims), length)  # (heads, T, T, D/2)
    plain = matrix(rx.rope(), length)[..., 0]
    scaled = matrix(rx.dpe(w, s), length)[..., 0]
    for head in range(3):
        for f in range(5):
            expected = scaled if key_dims[head, f] else plain
            np.testing.assert_array_equal(rel[head, :, :, f], expected)


@given(dpe_settings(), st.integers(1, 3))
def test_dpe_is_invariant_to_shifts_by_the_scale(values, times):
    """rel(i + n s, j + n s) = rel(i, j): within the window for any shift, beyond it for these."""
    w, s, length = values
    shift = times * s
    rel = matrix(rx.dpe(w, s), length + shift)[..., 0]
    np.testing.assert_array_equal(rel[shift:, shift:], rel[:length, :length])


@pytest.mark.parametrize("window, scales", [
    (0, 2), (3, 0), (3, [1, -1]), (3, [1.5]), (3, []), (3, [[2, 2]])])
def test_dpe_refuses_what_is_no_window_or_scale(window, scales):
    with pytest.raises(ValueError, match="at least 1"):
        rx.dpe(window, scales)


# -------------------------------------------------------------------------------------------------
# LaMPE


@given(lampe_settings())
def test_lampe_is_its_formula(values):
    l = values[0]
    rel = matrix(rx.lampe(*values), l)[..., 0]
    np.testing.assert_array_equal(rel, formula_matrix(lampe_formula, l, *values))


@given(lampe_settings())
def test_lampe_is_0_to_2_above_the_papers_matrix(values):
    l, mapping_len, s1, s2 = values
    d = distances(l)
    middle = (s1 < d) & (d < l - s2)
    assert middle.any()
    rel = matrix(rx.lampe(*values), l)[..., 0]
    above = (rel - lampe_as_drawn(l, mapping_len, s1))[middle]
    assert above.min() >= 0
    assert above.max() <= 2


@given(lampe_settings())
def test_lampes_head_is_exact_and_its_tail_shifted(values):
    l, mapping_len, s1, s2 = values
    d = distances(l)
    rel = matrix(rx.lampe(*values), l)[..., 0]
    head = (0 <= d) & (d <= s1)
    tail = d >= l - s2
    m = s1 + s2 + (l - s1 - s2) * mapping_len // l
    np.testing.assert_array_equal(rel[head], d[head])
    np.testing.assert_array_equal(rel[tail], d[tail] - (l - m))


@given(lampe_settings())
def test_lampe_never_exceeds_m(values):
    l, mapping_len, s1, s2 = values
    m = s1 + s2 + (l - s1 - s2) * mapping_len // l
    assert matrix(rx.lampe(*values), l).max() <= m < l


@given(lampe_settings())
def test_lampe_grows_with_distance_except_at_the_tail(values):
    """It falls by 2 at most where the tail begins, and nowhere else."""
    l, _, _, s2 = values
    for i, row in enumerate(matrix(rx.lampe(*values), l)[..., 0]):
        steps = np.diff(row[:i + 1][::-1])  # steps[d] leads from distance d to d + 1
        for d, step in enumerate(steps):
            lowest = -2 if d + 1 == l - s2 else 0
            assert step >= lowest


@given(st.integers(1, 60), st.integers(0, 30), st.integers(0, 30), st.integers(0, 60))
def test_lampe_without_compression_is_rope(l, s1, s2, more):
    plain = matrix(rx.rope(), l)
    np.testing.assert_array_equal(matrix(rx.lampe(l, l + more, s1, s2), l), plain)
    too_short_for_s1 = rx.lampe(l, 1, l // 2 + 1, s2)
    np.testing.assert_array_equal(matrix(too_short_for_s1, l), plain)
    without_middle = rx.lampe(l, 1, min(s1, l), l)
    np.testing.assert_array_equal(matrix(without_middle, l), plain)


def test_lampes_logit_scale_is_the_same_at_every_length():
    for length in (10, 100, 10000):  # shorter than, equal to and longer than the mapping length
        assert rx.lampe(length, 100, 8, 8).logit_scale == pytest.approx(1.1434, abs=1e-4)


@pytest.mark.parametrize("values", [(0, 1, 0, 0), (9, 0, 0, 0), (9, 3, -1, 0), (9, 3, 0, -1)])
def test_lampe_refuses_what_is_no_length(values):
    with pytest.raises(ValueError, match="at least"):
        rx.lampe(*values)


# -------------------------------------------------------------------------------------------------
# Attention


def draw_qkv(seed, batch, n_heads, kv_heads, T, S, D):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, n_heads, T, D, generator=generator)
    k = torch.randn(batch, kv_heads, S, D, generator=generator)
    v = torch.randn(batch, kv_heads, S, D, generator=generator)
    return q, k, v


factors = st.lists(st.integers(1, 40), min_size=4, max_size=4)
own_methods = st.tuples(st.builds(stretched, factors), st.integers(1, 60))


@given(st.data(), methods_with_lengths() | own_methods, st.sampled_from([1, 2]),
       st.sampled_from([1, 2, 4]), st.integers(0, 2 ** 32))
def test_fast_attention_is_dense_attention(data, case, batch, kv_heads, seed):
    method, S = case
    T = data.draw(st.integers(1, S))  # the last T of S tokens, as in decoding
    q, k, v = draw_qkv(seed, batch, 4, kv_heads, T, S, 8)
    frequencies = rx.rope_frequencies(8, 100.0)
    fast = rx.attend(q, k, v, method, frequencies)
    dense = rx.attend_dense(q, k, v, method, frequencies)
    torch.testing.assert_close(fast, dense, atol=1e-5, rtol=1e-5)


LONG = {
    "rope": rx.rope(),
    "chunks of 1": rx.rerope(1),
    "chunks of 7": rx.dpe(7, [3, 5]),
    "three bands": rx.lampe(9000, 700, 300, 9),
    "key dimensions": rx.dpe(3000, [4, 5], torch.tensor([[True, False], [False, True]])),
}


@pytest.mark.parametrize("name", LONG)
def test_fast_attention_is_dense_attention_past_every_slice(name):
    """17,001 tokens: more than any slice or group of chunks, and a rest."""
    method = LONG[name]
    q, k, v = draw_qkv(0, 1, 2, 1, 17001, 17001, 4)
    frequencies = rx.rope_frequencies(4, 10000.0)
    fast = rx.attend(q, k, v, method, frequencies)
    for start, stop in ((4000, 4100), (8100, 8300), (16300, 16500), (16901, 17001)):
        # These queries, as the last of a shorter text.
        dense = rx.attend_dense(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], method,
                                frequencies)
        torch.testing.assert_close(fast[:, :, start:stop], dense, atol=1e-5, rtol=1e-5)
    decoded = rx.attend(q[:, :, -1:], k, v, method, frequencies)
    torch.testing.assert_close(decoded, fast[:, :, -1:], atol=1e-5, rtol=1e-5)


@given(methods_with_lengths(), st.integers(0, 2 ** 32))
def test_dense_attention_sees_only_relative_positions(case, seed):
    method, T = case
    q, k, v = (x.double() for x in draw_qkv(seed, 1, 4, 4, T, T, 8))
    model_frequencies = rx.rope_frequencies(8, 100.0)
    frequencies = model_frequencies if method.frequencies is None else method.frequencies

    angle = torch.from_numpy(matrix(method, T)) * frequencies  # (T, T, 1 or D/2), or by head
    turn = torch.polar(torch.ones_like(angle), angle)
    q_pairs = torch.view_as_complex(q.unflatten(-1, (-1, 2)))
    k_pairs = torch.view_as_complex(k.unflatten(-1, (-1, 2)))
    scores = (q_pairs[:, :, :, None] * k_pairs.conj()[:, :, None] * turn).real.sum(-1)
    logits = scores * method.logit_scale / math.sqrt(8)
    logits = logits.masked_fill(torch.from_numpy(distances(T) < 0), -torch.inf)
    expected = logits.softmax(-1) @ v
    dense = rx.attend_dense(q, k, v, method, model_frequencies)
    torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------
# The model, against an oracle that is given the relative positions of the formulas above


LENGTH = 192
SCALES = [s for s in (4, 4, 2, 16, 32, 32, 16, 1) for _ in range(2)]  # (D/2,)
KEY_DIMS = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(3)) < 0.75  # by layer
PLAIN = np.maximum(distances(LENGTH), 0)[..., None]
SCALED = np.stack([formula_matrix(dpe_formula, LENGTH, 32, s) for s in SCALES], axis=-1)
MAPPED = formula_matrix(lampe_formula, LENGTH, LENGTH, 60, 16, 8)[..., None]

CASES = {  # changes to the configuration, a method per layer, relative positions per layer
    "rope": ({}, [rx.rope()] * 2, [PLAIN] * 2),
    "llama 3.1": (dict(rope_scaling=RopeScaling(original_len=64)), [rx.rope()] * 2, [PLAIN] * 2),
    "biases": (dict(qkv_bias=True), [rx.rope()] * 2, [PLAIN] * 2),
    "tied": (dict(tied=True), [rx.rope()] * 2, [PLAIN] * 2),
    "dpe": ({}, [rx.dpe(32, SCALES)] * 2, [SCALED] * 2),
    "dpe, key dimensions": ({}, [rx.dpe(32, SCALES, key) for key in KEY_DIMS],
                            [np.where(key[:, None, None], SCALED, PLAIN) for key in KEY_DIMS]),
    "lampe": ({}, [rx.lampe(LENGTH, 60, 16, 8)] * 2, [MAPPED] * 2),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_oracles(name):
    changes, methods, rel = CASES[name]
    model = random_llama(**changes)
    tokens = torch.randint(48, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = oracle_logits(model.state_dict(), model.config, tokens[0], rel,
                             methods[0].logit_scale)
    np.testing.assert_allclose(model(tokens, methods)[0], expected, atol=1e-3)

    cache = KVCache(model.config, 1, LENGTH)  # and in two prefills and then one by one
    parts = tokens.split([100, 40] + [1] * 52, dim=1)
    decoded = torch.cat([model(part, methods, cache)[0] for part in parts])
    np.testing.assert_allclose(decoded, expected, atol=1e-3)


@settings(max_examples=15)
@given(methods_with_lengths(), st.data())
def test_decoding_continues_the_prefill(case, data):
    method, length = case
    model = random_llama(dim=16, head_dim=8, n_heads=4)
    tokens = torch.randint(48, (1, length), generator=torch.Generator().manual_seed(length))
    whole = model(tokens, [method] * 2)
    new = data.draw(st.integers(1, min(length - 1, 12)))  # tokens that are decoded
    cache = KVCache(model.config, 1, length)
    parts = tokens.split([length - new] + [1] * new, dim=1)
    decoded = torch.cat([model(part, [method] * 2, cache) for part in parts], dim=1)
    torch.testing.assert_close(decoded, whole, atol=1e-4, rtol=1e-4)
    last = data.draw(st.integers(1, length))
    some = model(tokens, [method] * 2, last=last)
    torch.testing.assert_close(some, whole[:, -last:], atol=1e-4, rtol=1e-4)


@settings(max_examples=15)
@given(methods_with_lengths(), st.data())
def test_later_tokens_do_not_change_earlier_logits(case, data):
    method, length = case
    model = random_llama(dim=16, head_dim=8, n_heads=4)
    tokens = torch.randint(48, (1, length), generator=torch.Generator().manual_seed(length))
    changed_from = data.draw(st.integers(1, length - 1))
    changed = tokens.clone()
    changed[:, changed_from:] = (changed[:, changed_from:] + 1) % 48
    logits = model(tokens, [method] * 2)
    others = model(changed, [method] * 2)
    torch.testing.assert_close(others[:, :changed_from], logits[:, :changed_from])
    assert not torch.allclose(others[:, changed_from:], logits[:, changed_from:])


# -------------------------------------------------------------------------------------------------
# Attention heads with a known pattern, set by hand: within a training length of 128 tokens RoPE
# attends to the pattern, and past it only the methods do

WAVELENGTHS = torch.tensor([8.0, 32.0, 128.0, 1024.0])  # the slowest turns by pi/4 in 128 tokens


def is_previous(d, T):
    return d == 1


def is_multiple_of_8(d, T):
    return (d % 8 == 0) & (d < 128)


def is_far(d, T):
    return d == T - 20


PATTERNS = {  # amplitude of each frequency, distance with the highest score, wanted distances
    "local": ([40, 40, 40, 40], 1, is_previous),
    "periodic": ([40, 0, 0, 40], 0, is_multiple_of_8),
    "far": ([0, 0, 0, 40], 0, is_far),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_planted_patterns_are_kept(pattern):
    amplitudes, peak, is_wanted = PATTERNS[pattern]
    frequencies = 2 * math.pi / WAVELENGTHS

    def attention_to_wanted(method, T):
        d = torch.arange(T).flip(0)  # distances from the last query
        wanted = is_wanted(d, T)[:, None]
        q = torch.view_as_real(torch.polar(torch.ones(4), -peak * frequencies)).view(1, 1, 1, 8)
        k = torch.zeros(1, 1, T, 8)
        k[..., ::2] = torch.tensor(amplitudes) * math.sqrt(8)
        if pattern == "far":  # a match of content, which no other key has
            k = k * wanted
        v = wanted.expand(1, 1, T, 8).float()
        return rx.attend(q, k, v, method, frequencies)[0, 0, 0, 0]

    assert attention_to_wanted(rx.rope(), 128) > 0.95
    for T in (1536, 3584):
        assert attention_to_wanted(rx.rope(), T) < 0.7
        assert attention_to_wanted(rx.dpe(100, T // 24), T) > 0.95
        assert attention_to_wanted(rx.lampe(T, 24, 100, 4), T) > 0.95
