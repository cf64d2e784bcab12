"""Attention: past every block, in half precision, beside sinks; kernels; published settings."""
import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rope_extrap as rx
from extras.tests.helpers import DEVICES, RELEASED_SCALES
from extras.tests.oracle import softmax_attention


def draw_qkv(shape, kv_shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(*shape, generator=generator)
    k, v = torch.randn(2, *kv_shape, generator=generator)
    return q, k, v


# -------------------------------------------------------------------------------------------------
# Fast attention against the dense reference


@pytest.mark.parametrize("attention", [rx.attend, rx.attend_dense])
def test_ntk_is_rope_with_a_larger_theta(attention):
    q, k, v = draw_qkv((1, 2, 40, 8), (1, 2, 40, 8))
    own = rx.rope_frequencies(8, 100.0)
    found = attention(q, k, v, rx.ntk(own, 6.0), own)
    expected = attention(q, k, v, rx.rope(), rx.rope_frequencies(8, 100.0 * 6 ** (8 / 6)))
    torch.testing.assert_close(found, expected)


KEY_DIMS = torch.arange(32).view(2, 16) % 3 < 2
METHODS = {
    "rope": rx.rope(),
    "dpe": rx.dpe(128, 7),
    "dpe, key dimensions": rx.dpe(100, 5, KEY_DIMS),
    "lampe": rx.lampe(500, 150, 90, 64),
    "lampe, key dimensions": dataclasses.replace(rx.lampe(500, 150, 90, 64), key_dims=KEY_DIMS),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("device", DEVICES)
def test_fast_attention_is_dense_in_every_precision(name, dtype, tolerance, device):
    q, k, v = (x.to(device, dtype) for x in draw_qkv((1, 2, 513, 32), (1, 2, 513, 32)))
    frequencies = rx.rope_frequencies(32, 10000.0)
    exact = rx.attend_dense(q.double(), k.double(), v.double(), METHODS[name], frequencies)
    fast = rx.attend(q, k, v, METHODS[name], frequencies)
    torch.testing.assert_close(fast.double(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("method", [
    rx.rope(), rx.rerope(1), rx.dpe(7, [3, 5]), rx.lampe(4201, 700, 1500, 9),
    rx.dpe(1300, [4, 5], torch.tensor([[True, False], [False, True]]))])
def test_fast_attention_is_dense_attention_past_every_block(method):
    """4,201 tokens are two of the largest blocks or slices, and a rest."""
    q, k, v = draw_qkv((1, 2, 4201, 4), (1, 1, 4201, 4))
    frequencies = rx.rope_frequencies(4, 10000.0)
    fast = rx.attend(q, k, v, method, frequencies)
    for stop in range(1, 4202, 600):
        rows = slice(max(stop - 300, 0), stop)  # as the last rows of a shorter text
        dense = rx.attend_dense(q[:, :, rows], k[:, :, :stop], v[:, :, :stop], method, frequencies)
        torch.testing.assert_close(fast[:, :, rows], dense, atol=2e-5, rtol=1e-4)
    half = rx.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), method, frequencies)
    assert (half - fast).abs().mean() < 0.002


def attention_beside_a_sink(sink, at, T=300, D=64):
    """q, k, v of 4 heads and 2 KV heads. Every query gives the key `at` about `sink` logits.

    The value of this key is 0, and the slowest pair of coordinates is kept for it.
    """
    q, k, v = draw_qkv((1, 4, T, D), (1, 2, T, D))
    q[..., -2:] = torch.tensor([4.0, 0.0])
    k[..., -2:] = 0
    k[:, :, at] = 0
    k[:, :, at, -2] = sink * math.sqrt(D) / 4
    v[:, :, at] = 0
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def relative_errors(q, k, v, method):
    """The 99th percentile of the rows' relative errors, in a prefill and in decoding."""
    T = q.shape[2]
    frequencies = rx.rope_frequencies(64, 500000.0)
    exact = rx.attend_dense(q.double(), k.double(), v.double(), method, frequencies)
    prefill = rx.attend(q, k, v, method, frequencies)
    decoded = [rx.attend(q[:, :, n - 1:n], k[:, :, :n], v[:, :, :n], method, frequencies)
               for n in range(T - 60, T + 1)]
    found = []
    for out in (prefill[:, :, 1:], torch.cat(decoded, dim=2)):  # the first row is 0
        wanted = exact[:, :, -out.shape[2]:]
        errors = (out - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        found.append(errors.quantile(0.99))
    return torch.stack(found)


@pytest.mark.parametrize("sink, at", [(0, 0), (4, 0), (8, 0), (12, 0), (20.8, 0), (20.8, 240)])
def test_beside_an_attention_sink_bands_are_as_exact_as_rope(sink, at):
    """The merging of bands must not lose what an attention sink leaves to the other tokens.

    A sink, often the first token, holds most of the attention and has a value near 0. One of 12
    logits leaves 0.1 %, and one of 20.8 leaves 3e-8 of LaMPE's attention.
    """
    q, k, v = attention_beside_a_sink(sink, at)
    key_dims = torch.arange(128).view(4, 32) % 5 < 3
    rope = relative_errors(q, k, v, rx.rope())
    for method in (rx.self_extend(9, 3), rx.dpe(50, [2, 4, 8, 16] * 8),
                   rx.dpe(50, 7, key_dims), rx.rerope(100), rx.lampe(300, 45, 50, 30)):
        assert (relative_errors(q, k, v, method) <= 2 * rope).all()


# -------------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, D", [
    (torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256),
    (torch.bfloat16, 320), (torch.float32, 12), (torch.bfloat16, 12)])
@pytest.mark.parametrize("T, S, is_causal", [
    (1, 77, False), (77, 77, True), (40, 77, False), (1, 1, True), (600, 600, True)])
def test_every_kernel_is_softmax_attention_with_its_lse(device, dtype, D, T, S, is_causal):
    """On CUDA these shapes reach flash attention, efficient attention, and blockwise attention."""
    q, k, v = (x.to(device, dtype) for x in draw_qkv((2, 4, T, D), (2, 2, S, D)))
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(0 if is_causal else S)
    expected, expected_lse = softmax_attention(q, k, v, 0.1, seen)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    k_heads = k.repeat_interleave(2, dim=1)
    v_heads = v.repeat_interleave(2, dim=1)
    for out, lse in (rx.fused_attention(q, k, v, 0.1, is_causal),
                     rx.blockwise_attention(q, k_heads, v_heads, 0.1, is_causal)):
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=0)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32


@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 39), st.integers(0, 2 ** 32))
def test_window_attention_is_softmax_attention_in_the_window(n, width, c, seed):
    c = min(c, width - 1)  # columns before the first row's own
    q, k, v = draw_qkv((2, 4, n, 4), (2, 2, c + n, 4), seed)
    own = torch.arange(c, c + n)[:, None]
    column = torch.arange(c + n)
    seen = (column <= own) & (column > own - width)
    expected, expected_lse = softmax_attention(q, k, v, 0.5, seen)
    out, lse = rx.sliding_window_attention(q, k, v, width, 0.5)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------------------------------------
# Settings: what is refused, what is published, and what python rope_extrap.py prints


@pytest.mark.parametrize("method, settings", [
    (rx.dpe, (0, 2)), (rx.dpe, (3, [1, -1])), (rx.dpe, (3, [1.5])),
    (rx.lampe, (9, 0, 0, 0)), (rx.lampe, (9, 3, -1, 0)), (rx.lampe, (9, 3, 0, -1))])
def test_settings_out_of_range_are_refused(method, settings):
    with pytest.raises(ValueError, match="at least"):
        method(*settings)


@pytest.mark.parametrize("bands", [
    [], [(1, None)], [(0, 9)], [(0, 5), (6, None)], [(0, None), (5, None)], [(5, None), (0, 5)]])
def test_bands_that_leave_a_distance_out_are_refused(bands):
    with pytest.raises(ValueError, match="without a gap"):
        rx.Method([rx.Band(near, far, rx.identity, rx.identity) for near, far in bands])


@pytest.mark.parametrize("heads, kv_heads, n_frequencies", [(3, 2, 8), (4, 2, 4)])
def test_heads_that_do_not_fit_are_refused(heads, kv_heads, n_frequencies):
    q = torch.ones(1, heads, 5, 16)
    k = torch.ones(1, kv_heads, 5, 16)
    with pytest.raises(ValueError, match="do not fit"):
        rx.attend(q, k, k, rx.rope(), torch.ones(n_frequencies))


@pytest.mark.parametrize("name", RELEASED_SCALES)
def test_published_effective_lengths_give_released_scales(name):
    published = rx.PUBLISHED[name]["dpe"]
    assert rx.dpe_scales(published["effective_lengths"], 131072) == RELEASED_SCALES[name]
    assert (published["window"], published["topk"]) == (1024, 48)


@pytest.mark.parametrize("name, length, expected", [
    ("Llama-3-8B-Instruct", 8191, 1536), ("Llama-3-8B-Instruct", 8192, 1036),
    ("Llama-3-8B-Instruct", 32768, 4501), ("Llama-3-8B-Instruct", 65536, 6129),  # of 6129.9
    ("Llama-3.1-8B-Instruct", 4096, 5672), ("Mistral-7B-Instruct-v0.3", 4096, 1536)])
def test_published_mapping_lengths_are_the_released_codes(name, length, expected):
    assert rx.mapping_length(length, **rx.PUBLISHED[name]["lampe"]["sigmoid"]) == expected


def test_the_printed_matrices_are_the_papers_and_ours(capsys):
    rx.main()
    printed = " ".join(capsys.readouterr().out.split())
    for scale, drawn in ((3, "4 4 4 3 3 3 2 1 0"), (2, "5 5 4 4 3 3 2 1 0")):
        ours = rx.relative_positions(rx.dpe(3, scale), 9)[8].tolist()
        assert f"{drawn} {' '.join(map(str, ours))}" in printed
    lampe = rx.relative_positions(rx.lampe(16, 6, 3, 4), 16)[15].tolist()
    assert printed.endswith(" ".join(map(str, lampe)))
