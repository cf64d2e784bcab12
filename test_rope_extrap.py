"""Position invariants: what each method promises about relative positions.

Most tests draw random settings and check a property of the whole matrix of relative positions.
The last sections check what follows from positions: that fast attention is dense attention, that
decoding continues the prefill, that no token depends on later ones, and that attention heads with
a planted pattern keep it beyond the training length. Nothing here needs extras/.

Matrices that the papers draw, and properties, are independent of the code. A formula that the code
has too is not: its test says so, and only keeps the code from changing unnoticed.
"""
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from torch.testing import assert_close

from model import Config, KVCache, Llama
from rope_extrap import (
    attend,
    attend_dense,
    dpe,
    dpe_scales,
    freqs_cis,
    key_dimensions,
    lampe,
    mapping_length,
    ntk,
    relative_positions,
    rerope,
    rope,
    rope_frequencies,
    rotate,
    self_extend,
    yarn,
)

settings.register_profile("invariants", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("invariants")

FREQUENCIES = rope_frequencies(8, theta=100.0)
assert_near = partial(assert_close, atol=1e-4, rtol=1e-4)  # up to float32's rounding
seeds = st.integers(0, 2 ** 32)

# -------------------------------------------------------------------------------------------------
# Random settings, and matrices as numpy arrays


@st.composite
def dpe_settings(draw):
    """(window, scale, length) with some distances that are compressed."""
    window = draw(st.integers(1, 40))
    scale = draw(st.integers(2, 40))
    compressed = draw(st.integers(1, 41))
    return window, scale, window + scale + compressed


@st.composite
def lampe_settings(draw):
    """(length, mapping_len, s1, s2) with a distance in the middle, and a slope below 1."""
    s1 = draw(st.integers(0, 15))
    s2 = draw(st.integers(0, 15))
    shortest = max(2 * s1, s1 + s2 + 2)
    length = shortest + draw(st.integers(0, 50))
    mapping_len = draw(st.integers(1, length - 1))
    return length, mapping_len, s1, s2


def scales_of(n_frequencies):
    return st.lists(st.integers(1, 40), min_size=n_frequencies, max_size=n_frequencies)


def key_dims_of(heads, n_frequencies):
    of_one_head = st.lists(st.booleans(), min_size=n_frequencies, max_size=n_frequencies)
    of_heads = st.lists(of_one_head, min_size=heads, max_size=heads)
    return of_heads.map(torch.tensor)


@st.composite
def methods_with_lengths(draw):
    """(method, length) for 4 heads of 4 frequencies: any method, with settings that compress."""
    window, scale, length = draw(dpe_settings())
    scales = draw(scales_of(4))
    kind = draw(st.sampled_from(["rope", "yarn", "rerope", "dpe", "key dimensions", "lampe"]))
    if kind == "rope":
        return rope(), length
    if kind == "yarn":
        return yarn(FREQUENCIES, scale, window), length
    if kind == "rerope":
        return rerope(window), length
    if kind == "dpe":
        return dpe(window, scales), length
    if kind == "key dimensions":
        return dpe(window, scales, draw(key_dims_of(4, 4))), length
    values = draw(lampe_settings())
    return lampe(*values), values[0]


def matrix(method, length):
    return relative_positions(method, length).numpy()


def distances(length):
    i, j = np.indices((length, length))
    return i - j


def check_steps(rel, lowest, highest):
    """For each query, as keys get farther: rel at d + 1 minus rel at d, with bounds for each d."""
    for i, row in enumerate(rel):
        steps = np.diff(row[i::-1])
        assert (steps >= lowest[:i]).all()
        assert (steps <= highest[:i]).all()


# -------------------------------------------------------------------------------------------------
# RoPE, NTK and YaRN


def rotate_to(x, position):
    cis = freqs_cis(torch.as_tensor(position), FREQUENCIES)
    return rotate(x, cis)


@given(st.integers(0, 2 ** 17), st.integers(0, 2 ** 17), seeds)
def test_rope_scores_depend_on_the_difference_of_positions(a, b, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator)
    assert_near(rotate_to(q, 0), q)
    assert_near(rotate_to(q, a).norm(), q.norm())
    score = (rotate_to(q, a) * k).sum()
    shifted = (rotate_to(q, a + b) * rotate_to(k, b)).sum()
    assert_near(shifted, score)


@given(st.floats(1, 100))
def test_ntk_keeps_the_fastest_frequency_and_divides_the_slowest(factor):
    """Independent: this is what the formula is for."""
    own = rope_frequencies(128, 10000.0)
    scaled = ntk(own, factor).frequencies
    assert_close(scaled[0], own[0])
    assert_close(scaled[-1], own[-1] / factor)
    assert_close(ntk(own, 1.0).frequencies, own)


@given(st.floats(1, 100))
def test_yarn_keeps_fast_frequencies_and_divides_slow_ones(factor):
    """Independent, except for the logit scale, a formula that the code has too."""
    own = rope_frequencies(128, 10000.0)
    rotations = 4096 * own / (2 * math.pi)
    fast = rotations >= 32
    slow = rotations <= 1
    method = yarn(own, factor, 4096)
    scaled = method.frequencies
    assert_close(scaled[fast], own[fast])
    assert_close(scaled[slow], own[slow] / factor)
    assert ((own / scaled).diff() > -1e-5).all()  # the slower, the more
    assert_close(yarn(own, 1.0, 4096).frequencies, own)
    assert method.logit_scale == (0.1 * math.log(factor) + 1) ** 2


# -------------------------------------------------------------------------------------------------
# Every method


@given(methods_with_lengths())
def test_bands_partition_the_distances(case):
    method, _ = case
    bands = method.bands
    assert bands[0].near == 0
    assert bands[-1].far is None
    for band, following in pairwise(bands):
        assert band.near < band.far
        assert band.far == following.near


@given(methods_with_lengths())
def test_the_diagonal_is_0_and_so_is_what_is_above(case):
    method, length = case
    rel = np.atleast_3d(matrix(method, length))  # (T, T, D/2), or by head
    not_earlier = distances(length) <= 0
    assert (rel >= 0).all()
    assert (rel[..., not_earlier, :] == 0).all()


# -------------------------------------------------------------------------------------------------
# DPE


def dpe_as_drawn(length, w, s):
    d = distances(length)
    return np.where(d < w, d, (d - w) // s + w)


@given(dpe_settings())
def test_dpe_is_its_formula(values):
    """Not independent: the code has the same formula."""
    w, s, length = values
    i, j = np.indices((length, length))
    beyond = i // s - j // s + w - w // s
    formula = np.where(i - j < w, i - j, beyond)
    rel = matrix(dpe(w, s), length)
    assert_array_equal(rel, np.tril(formula))
    assert rel.max() < length - 1  # something was compressed


@given(dpe_settings())
def test_dpe_is_0_to_2_above_the_papers_matrix(values):
    """Independent: the paper draws one function of the distance."""
    w, s, length = values
    drawn = dpe_as_drawn(length, w, s)
    above = matrix(dpe(w, s), length) - np.tril(drawn)
    assert above.min() >= 0
    assert above.max() <= 2
    if w % s == 0:
        assert above.max() <= 1


def test_the_matrices_of_dpes_figure_1c():
    """Independent: the last row in the paper, for 9 tokens and a window of 3."""
    assert str(dpe_as_drawn(9, 3, s=3)[8]) == "[4 4 4 3 3 3 2 1 0]"
    assert str(dpe_as_drawn(9, 3, s=2)[8]) == "[5 5 4 4 3 3 2 1 0]"
    assert str(matrix(dpe(3, 3), 9)[8]) == "[4 4 4 3 3 3 2 1 0]"  # 3 divides 9 and the window


@given(dpe_settings())
def test_dpe_grows_with_distance_by_1_in_the_window_and_then_by_0_to_2(values):
    w, s, length = values
    lowest = np.zeros(length)
    lowest[:w - 1] = 1
    highest = np.full(length, 2)
    highest[:w - 1] = 1
    check_steps(matrix(dpe(w, s), length), lowest, highest)


@given(dpe_settings(), scales_of(5))
def test_each_frequency_of_dpe_is_self_extend(values, scales):
    w, _, length = values
    rel = matrix(dpe(w, scales), length)
    for f, scale in enumerate(scales):
        assert_array_equal(rel[..., f], matrix(self_extend(w, scale), length))


@given(dpe_settings())
def test_limits_of_dpe_are_rerope_and_rope(values):
    w, s, length = values
    d = np.tril(distances(length))
    assert_array_equal(matrix(dpe(w, 1000), length), d.clip(max=w))
    assert_array_equal(matrix(rerope(w), length), d.clip(max=w))
    assert_array_equal(matrix(dpe(w, 1), length), d)
    assert_array_equal(matrix(dpe(length, s), length), d)
    assert_array_equal(matrix(rope(), length), d)


@given(dpe_settings(), key_dims_of(3, 5))
def test_dimensions_that_are_not_key_keep_their_distance(values, key_dims):
    w, s, length = values
    rel = matrix(dpe(w, s, key_dims), length)  # (3, T, T, 5)
    by_frequency = np.moveaxis(rel, 3, 1)  # (3, 5, T, T)
    assert (by_frequency[key_dims] == matrix(dpe(w, s), length)).all()
    assert (by_frequency[~key_dims] == matrix(rope(), length)).all()


lengths = st.integers(1, 10 ** 5)


@given(st.lists(lengths, max_size=8), lengths)
def test_scales_are_the_smallest_within_effective_lengths(effective_lengths, length):
    """Independent: what step (a) is for, and not its formula."""
    scales = dpe_scales(effective_lengths, length)
    for effective_length, scale in zip(effective_lengths, scales, strict=True):
        assert length / scale <= effective_length
        assert scale == 1 or length / (scale - 1) > effective_length


@given(st.integers(1, 9), st.integers(0, 9), seeds)
def test_each_head_has_topk_key_dimensions_which_contribute_most(n_frequencies, topk, seed):
    generator = torch.Generator().manual_seed(seed)
    contributions = torch.rand(3, n_frequencies, generator=generator)
    is_key = key_dimensions(contributions, topk)
    assert (is_key.sum(dim=1) == min(topk, n_frequencies)).all()
    least = contributions.masked_fill(~is_key, 1.0).amin(dim=1)
    most_of_others = contributions.masked_fill(is_key, 0.0).amax(dim=1)
    assert (least >= most_of_others).all()


# -------------------------------------------------------------------------------------------------
# LaMPE


@given(lampe_settings())
def test_lampe_is_its_formula(values):
    """Not independent: the code has the same formula."""
    l, mapping_len, s1, s2 = values
    i, j = np.indices((l, l))
    d = i - j
    middle = i * mapping_len // l - j * mapping_len // l + s1 - s1 * mapping_len // l
    span = s1 + (l - s1 - s2) * mapping_len // l + s2
    far = d - (l - span)
    formula = np.select([d <= s1, d < l - s2], [d, middle], far)
    rel = matrix(lampe(*values), l)
    assert_array_equal(rel, np.tril(formula))
    assert rel.max() <= span < l


@given(lampe_settings())
def test_lampe_is_0_to_2_above_the_papers_matrix(values):
    """Independent: in the paper the middle is floor(c (d - s1) + s1), with c = mapping_len / l."""
    l, mapping_len, s1, s2 = values
    d = distances(l)
    drawn = mapping_len * (d - s1) // l + s1
    above = matrix(lampe(*values), l) - drawn
    middle = (s1 < d) & (d < l - s2)
    assert above[middle].min() >= 0
    assert above[middle].max() <= 2


@given(lampe_settings())
def test_lampe_grows_with_distance_except_at_the_tail(values):
    """By 1 in the near and in the far region, else by 0 or 1, but by up to 2 where the middle
    begins; where the far region begins, by -2 to 1."""
    l, _, s1, s2 = values
    lowest = np.zeros(l)
    lowest[:s1] = 1
    lowest[l - s2 - 1:] = 1
    lowest[l - s2 - 1] = -2
    highest = np.ones(l)
    highest[s1] = 2
    check_steps(matrix(lampe(*values), l), lowest, highest)


@given(st.integers(1, 60), st.integers(0, 30), st.integers(0, 30), st.integers(0, 60))
def test_lampe_without_compression_is_rope(l, s1, s2, more):
    it_fits = lampe(l, l + more, s1, s2)
    too_short_for_s1 = lampe(l, 1, l // 2 + 1, s2)
    no_middle = lampe(l, 1, s1, max(l - s1 - 1, 0))
    for method in (it_fits, too_short_for_s1, no_middle):
        assert_array_equal(matrix(method, l), matrix(rope(), l))


def test_lampes_logit_scale_is_the_same_at_every_length():
    for length in (10, 100, 10000):  # shorter than, equal to and longer than the mapping length
        method = lampe(length, 100, 8, 8)
        assert method.logit_scale == pytest.approx(1.1434, abs=1e-4)


@given(lengths, lengths, st.floats(5e-5, 1.5e-4), st.floats(-3, 0), st.floats(500, 90000))
def test_mapping_lengths_grow_with_length_and_stay_below_L(length, more, a, b, L):
    shorter = mapping_length(length, a, b, L)
    longer = mapping_length(length + more, a, b, L)
    assert 0 < shorter <= longer < L


# -------------------------------------------------------------------------------------------------
# Attention


def draw_qkv(seed, heads, kv_heads, T, S, D):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, heads, T, D, generator=generator)
    k, v = torch.randn(2, 2, kv_heads, S, D, generator=generator)
    return q, k, v


@given(scales_of(4), st.integers(1, 50), seeds)
def test_dense_attention_is_two_rotations_and_one_choice(scales, w, seed):
    """Independent: DPE's scores within the window and beyond it, each from rotated vectors."""
    q, k, v = draw_qkv(seed, 2, 2, 60, 60, 8)
    i = torch.arange(60)[:, None]
    d = i - i.T
    s = torch.tensor(scales)
    near = rotate_to(q, i) @ rotate_to(k, i).mT
    far = rotate_to(q, i // s + w - w // s) @ rotate_to(k, i // s).mT
    logits = torch.where(d < w, near, far) / math.sqrt(8)
    weights = logits.masked_fill(d < 0, -torch.inf).softmax(dim=-1)
    dense = attend_dense(q, k, v, dpe(w, scales), FREQUENCIES)
    assert_near(dense, weights @ v)


@given(st.data(), methods_with_lengths(), st.sampled_from([1, 2, 4]), seeds)
def test_fast_attention_is_dense_attention(data, case, kv_heads, seed):
    method, S = case
    T = data.draw(st.integers(1, S))  # the last T of S tokens, as in decoding
    q, k, v = draw_qkv(seed, 4, kv_heads, T, S, 8)
    fast = attend(q, k, v, method, FREQUENCIES)
    dense = attend_dense(q, k, v, method, FREQUENCIES)
    assert_close(fast, dense, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------
# The model


def small_llama():
    """Two layers with grouped heads, and with attention that is far from uniform."""
    torch.manual_seed(0)
    model = Llama(Config(vocab_size=48, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8,
                         ffn_dim=24, train_len=64))
    model.requires_grad_(False)
    for layer in model.layers:
        layer.attention.wq.weight *= 5
        layer.attention.wk.weight *= 5
    return model


def draw_tokens(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randint(48, (1, length), generator=generator)


@settings(max_examples=15)
@given(st.data(), methods_with_lengths())
def test_decoding_continues_the_prefill(data, case):
    method, length = case
    methods = [method] * 2
    model = small_llama()
    tokens = draw_tokens(length)
    whole = model(tokens, methods)
    new = data.draw(st.integers(1, min(length - 1, 12)))
    cache = KVCache(model.config, 1, length)
    parts = tokens.split([length - new] + [1] * new, dim=1)
    logits = [model(part, methods, cache) for part in parts]
    assert_near(torch.cat(logits, dim=1), whole)
    last = data.draw(st.integers(1, length))
    assert_near(model(tokens, methods, last=last), whole[:, -last:])


@settings(max_examples=15)
@given(st.data(), methods_with_lengths())
def test_later_tokens_do_not_change_earlier_logits(data, case):
    method, length = case
    methods = [method] * 2
    model = small_llama()
    tokens = draw_tokens(length)
    n = data.draw(st.integers(1, length - 1))
    changed = tokens.clone()
    changed[:, n:] = (tokens[:, n:] + 1) % 48
    logits = model(tokens, methods)
    others = model(changed, methods)
    assert_close(others[:, :n], logits[:, :n])
    assert not torch.allclose(others[:, n:], logits[:, n:])


# -------------------------------------------------------------------------------------------------
# Attention heads with a known pattern, set by hand: within a training length of 128 tokens RoPE
# attends to the pattern, and beyond it only the methods do.

WAVELENGTHS = torch.tensor([8.0, 32.0, 128.0, 1024.0])  # the slowest turns by pi/4 in 128 tokens
PATTERNS = {  # amplitude of each frequency, distance with the highest score, wanted distances
    "local": ([40, 40, 40, 40], 1, lambda d, T: d == 1),
    "periodic": ([40, 0, 0, 40], 0, lambda d, T: (d % 8 == 0) & (d < 128)),
    "far": ([0, 0, 0, 40], 0, lambda d, T: d == T - 20),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_planted_patterns_are_kept(pattern):
    amplitudes, peak, is_wanted = PATTERNS[pattern]
    frequencies = 2 * math.pi / WAVELENGTHS
    turn = torch.polar(torch.ones(4), -peak * frequencies)
    q = torch.view_as_real(turn).view(1, 1, 1, 8)

    def attention_to_wanted(method, T):
        d = torch.arange(T).flip(0)  # distances from the last query
        wanted = is_wanted(d, T)[:, None]
        k = torch.zeros(1, 1, T, 8)
        k[..., ::2] = torch.tensor(amplitudes) * math.sqrt(8)
        if pattern == "far":  # a match of content, which no other key has
            k = k * wanted
        v = wanted.expand(1, 1, T, 8).float()
        return attend(q, k, v, method, frequencies).amax()

    assert attention_to_wanted(rope(), 128) > 0.95
    for T in (1536, 3584):
        assert attention_to_wanted(rope(), T) < 0.7
        assert attention_to_wanted(dpe(100, T // 24), T) > 0.95
        assert attention_to_wanted(lampe(T, 24, 100, 4), T) > 0.95
