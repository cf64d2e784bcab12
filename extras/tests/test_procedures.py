"""The papers' procedures: DPE's detection and key dimensions, LaMPE's fit, published settings."""
import functools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rope_extrap as rx
from extras.tests.helpers import RELEASED_SCALES
from model import Config, Llama

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")

# -------------------------------------------------------------------------------------------------
# DPE, step (a)


@given(st.lists(st.integers(1, 10 ** 6), min_size=1, max_size=8), st.integers(1, 10 ** 6))
def test_scales_are_the_smallest_within_effective_lengths(effective_lengths, length):
    scales = rx.dpe_scales(effective_lengths, length)
    for effective_length, scale in zip(effective_lengths, scales, strict=True):
        assert length <= scale * effective_length
        assert scale == 1 or length > (scale - 1) * effective_length


@pytest.mark.parametrize("name", RELEASED_SCALES)
def test_published_effective_lengths_give_released_scales(name):
    published = rx.PUBLISHED[name].dpe
    assert rx.dpe_scales(published["effective_lengths"], 131072) == RELEASED_SCALES[name]
    assert published["window"] == 1024
    assert published["topk"] == 48


@pytest.mark.parametrize("lower_by, expected", [
    ([0.02] * 50, False),  # every answer is less likely
    ([0.0, 0.04] * 25, False),  # 0.02 on average, and the standard error is 0.003
    ([1.0, -0.96] * 25, True),  # 0.02 on average, and the standard error is 0.14
    ([0.009] * 50, True),  # significant, and too small to matter
    ([-1.0] * 50, True)])
def test_not_worse_is_within_two_standard_errors(lower_by, expected):
    best = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert rx.not_worse(best - torch.tensor(lower_by), best) == expected


def noisy(rng, mean, noise=1e-3):
    """Log-likelihoods of 40 answers."""
    return torch.tensor([mean + rng.gauss(0, noise) for _ in range(40)])


@given(st.lists(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), min_size=1, max_size=10),
       st.sampled_from([4, 32]))
def test_detection_finds_planted_scales(planted, background):
    rng = random.Random(0)

    def score(scales):
        # Every group loses much below its planted scale, and a little above it.
        assert sum(scale != background for scale in scales) <= 1
        lost = 0.0
        for scale, best in zip(scales, planted, strict=True):
            steps = math.log2(scale / best)
            lost += max(-steps, 0.1 * steps)
        return noisy(rng, -lost)

    candidates = [1, 2, 4, 8, 16, 32, 64]
    found, table = rx.detect_scales(score, len(planted), candidates, background)
    assert found == planted
    assert [len(row) for row in table] == [len(candidates)] * len(planted)


def detect_one(means, noise):
    """What is found for one group whose candidates 1, 2, 4, ... have these means."""
    rng = random.Random(1)
    # The difficulty of each question, which is the same for all candidates.
    difficulty = torch.randn(40, generator=torch.Generator().manual_seed(0))
    candidates = [2 ** n for n in range(len(means))]

    def score(scales):
        mean = means[candidates.index(scales[0])]
        return difficulty + noisy(rng, mean, noise)

    found, _ = rx.detect_scales(score, 1, candidates, background=2)
    return found[0]


def test_detection_takes_the_smallest_scale_within_noise():
    assert detect_one([0.0, 0.0, 0.0], noise=1e-3) == 1
    assert detect_one([-0.02, -0.02, 0.0, 0.0], noise=1e-3) == 4
    assert detect_one([-0.005, -0.01], noise=0) == 1
    assert detect_one([0.004, 0.011, 0.02], noise=0) == 2  # 0.016 less is worse, 0.009 is not


def test_detection_stops_at_the_first_scale_that_fails():
    assert detect_one([0.0, -1.0, 0.0, 0.001], noise=0) == 4


# A model that finds needles by their content, so that effective lengths can be planted


def planted_llama(amplitudes, filler, n_answers=4):
    """One head of 16 frequencies 2^-f that finds a needle by its content.

    At relative position rel, the logit of a needle is the sum of amplitudes[f] cos(2^-f rel), and
    that of a filler token is `filler`. Tokens: 0 is the question, 1 the filler, then the needles,
    then each needle's answer.
    """
    n = 2 + 2 * n_answers  # tokens, each with a coordinate of its own
    config = Config(vocab_size=n, dim=n, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32,
                    ffn_dim=1, train_len=512, rope_theta=2.0 ** 16)
    model = Llama(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(0)
    model.norm.weight.fill_(1)
    model.layers[0].attention_norm.weight.fill_(1)
    model.tok_embeddings.weight.copy_(torch.eye(n))

    attention = model.layers[0].attention
    one = math.sqrt(n)  # a token's own coordinate after the norm
    needles = range(2, 2 + n_answers)
    attention.wq.weight[::2, 0] = math.sqrt(32) / one
    for token in needles:
        answer = token + n_answers
        attention.wk.weight[::2, token] = torch.tensor(amplitudes) / one
        attention.wv.weight[token, token] = 1 / one
        attention.wo.weight[answer, token] = 1
        model.output.weight[answer, answer] = 38 / one  # half the attention suffices
    attention.wk.weight[30, 1] = filler / one  # in the slowest frequency, which hardly rotates
    return model


def test_detection_finds_planted_effective_lengths_in_a_model():
    length = 4096
    window = 16
    background = 64
    matching = (7, 9, 11, 13)  # a match in frequency f is one up to a quarter of its wavelength
    candidates = [1, 2, 4, 8, 16, 32, 64, 128]

    # A needle must have a larger logit than all filler tokens together, and has one as long as
    # three frequencies match at the background and the fourth one matches at all.
    amplitudes = [12.0 * (f in matching) for f in range(16)]
    farthest = window + length / background
    others = sum(12 * math.cos(2.0 ** -f * farthest) for f in matching[1:])
    model = planted_llama(amplitudes, others - math.log(length))

    rng = random.Random(0)
    answers = torch.tensor([rng.randrange(4) for _ in range(16)])
    tokens = torch.ones(16, length, dtype=torch.int64)
    tokens[:, -1] = 0
    for row, answer in zip(tokens, answers, strict=True):
        row[rng.randrange(length // 2)] = 2 + answer

    @functools.cache
    def log_likelihoods(*scales):
        of_frequencies = [scale for scale in scales for _ in range(2)]
        method = rx.dpe(window, of_frequencies)
        logits = [model(part, [method], last=1)[:, 0] for part in tokens.split(8)]
        return torch.cat(logits).log_softmax(dim=-1)[range(16), 6 + answers]

    found, _ = rx.detect_scales(lambda scales: log_likelihoods(*scales), 8, candidates, background)
    for group, scale in enumerate(found):
        f = 2 * group + 1
        quarter_wavelength = math.pi / 2 * 2 ** f if f in matching else math.inf
        expected = [s for s in candidates if window + length / s < quarter_wavelength]
        assert scale == expected[0]


# -------------------------------------------------------------------------------------------------
# DPE, step (b)


def test_contribution_is_the_mean_product_of_pair_norms():
    q = torch.zeros(2, 2, 4)  # 2 tokens, 2 heads, 2 frequencies
    k = torch.zeros(2, 1, 4)
    q[0, 0] = torch.tensor([3.0, 4.0, 1.0, 0.0])  # norms 5 and 1
    k[0, 0] = torch.tensor([0.0, 2.0, 6.0, 8.0])  # norms 2 and 10
    q[1, 1] = torch.tensor([1.0, 0.0, 0.0, 2.0])  # norms 1 and 2
    k[1, 0] = torch.tensor([1.0, 0.0, 0.0, 1.0])  # norms 1 and 1
    expected = [[5 * 2 / 2, 1 * 10 / 2], [1 * 1 / 2, 2 * 1 / 2]]
    assert rx.contribution(q, k).tolist() == expected


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 9),
       st.integers(0, 99))
def test_key_dimensions_are_planted_pairs(n_rep, kv_heads, n_frequencies, count, seed):
    generator = torch.Generator().manual_seed(seed)
    heads = n_rep * kv_heads
    q = torch.rand(7, heads, 2 * n_frequencies, generator=generator) + 1
    k = torch.rand(7, kv_heads, 2 * n_frequencies, generator=generator) + 1
    planted = torch.rand(heads, n_frequencies, generator=generator).argsort(dim=-1) < count
    both_coordinates = planted.repeat_interleave(2, dim=1)
    q = torch.where(both_coordinates, 10 * q, q)
    assert torch.equal(rx.key_dimensions(rx.contribution(q, k), count), planted)


def test_heads_are_paired_with_the_kv_head_that_they_read():
    q = torch.ones(5, 4, 8)
    k = torch.ones(5, 2, 8)
    k[:, 0, 2:4] = 3  # frequency 1 of the KV head of heads 0 and 1
    k[:, 1, 4:6] = 3  # frequency 2 of the KV head of heads 2 and 3
    is_key = rx.key_dimensions(rx.contribution(q, k), 1)
    assert is_key.nonzero().tolist() == [[0, 1], [1, 1], [2, 2], [3, 2]]


def test_among_equals_the_faster_frequency_is_key():
    assert rx.key_dimensions(torch.ones(1, 4), 2).tolist() == [[True, True, False, False]]


# -------------------------------------------------------------------------------------------------
# LaMPE's mapping length


def sigmoid(l, a, b, L):
    return L / (1 + math.exp(-(a * l + b)))


PUBLISHED_LAMPE = [name for name, settings in rx.PUBLISHED.items() if settings.lampe]


def published_curve(name):
    settings = rx.PUBLISHED[name].lampe
    return settings["a"], settings["b"], settings["L"]


def test_mapping_lengths_of_llama_3_8b_are_the_released_codes():
    a, b, L = published_curve("Llama-3-8B-Instruct")
    assert rx.mapping_length(32768, a, b, L, short=1536) == 4501
    assert rx.mapping_length(65536, a, b, L, short=1536) == 6129  # 6129.9, truncated
    assert rx.mapping_length(8191, a, b, L, short=1536) == 1536
    assert rx.mapping_length(8192, a, b, L, short=1536) == 1036
    assert rx.mapping_length(8191, a, b, L) == 1036


@given(st.sampled_from(PUBLISHED_LAMPE), st.integers(8192, 10 ** 6), st.integers(1, 10 ** 5))
def test_mapping_lengths_grow_with_length_and_stay_below_L(name, length, more):
    a, b, L = published_curve(name)
    shorter = rx.mapping_length(length, a, b, L)
    longer = rx.mapping_length(length + more, a, b, L)
    assert 0 < shorter <= longer <= L


@settings(max_examples=20)
@given(a=st.floats(5e-5, 1.5e-4), b=st.floats(-3, 0), L=st.floats(500, 90000),
       count=st.integers(4, 10))
def test_the_fit_recovers_a_planted_sigmoid(a, b, L, count):
    lengths = [131072 * (n + 1) // count for n in range(count)]
    found = rx.fit_mapping_length(lengths, [sigmoid(l, a, b, L) for l in lengths])
    assert found == pytest.approx((a, b, L), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", PUBLISHED_LAMPE)
def test_seven_points_recover_a_published_sigmoid(name):
    curve = published_curve(name)
    lengths = [131072 * n // 7 for n in range(1, 8)]
    exact = [sigmoid(l, *curve) for l in lengths]
    truncated = [rx.mapping_length(l, *curve) for l in lengths]
    assert rx.fit_mapping_length(lengths, exact) == pytest.approx(curve, rel=1e-6)
    assert rx.fit_mapping_length(lengths, truncated) == pytest.approx(curve, rel=0.01)


@settings(max_examples=20)
@given(seed=st.integers(0, 999))
def test_the_fit_tolerates_noise_and_weights_by_errors(seed):
    curve = (0.0001, -2.5, 6200.0)
    rng = random.Random(seed)
    lengths = [131072 * n // 28 for n in range(1, 29)]
    noisy_lens = [sigmoid(l, *curve) * rng.uniform(0.95, 1.05) for l in lengths]
    assert rx.fit_mapping_length(lengths, noisy_lens) == pytest.approx(curve, rel=0.1)

    # A point that is wrong, and has an error that says so.
    wrong = seed % 28
    noisy_lens[wrong] *= 3
    errors = [100.0] * 28
    errors[wrong] = 1e6
    assert rx.fit_mapping_length(lengths, noisy_lens, errors) == pytest.approx(curve, rel=0.12)


@pytest.mark.parametrize("lengths, mapping_lens", [
    ([4096, 8192], [100, 200]),
    ([4096, 4096, 8192], [1, 1, 2]),
    ([1, 2, 3], [5, 5, 5]),
    ([3, 1, 2], [1, 3, 2])])
def test_points_that_determine_no_sigmoid_are_refused(lengths, mapping_lens):
    with pytest.raises(ValueError, match="3 lengths or more, and mapping lengths that grow"):
        rx.fit_mapping_length(lengths, mapping_lens)
