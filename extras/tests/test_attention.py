"""Rotation, frequencies, fused kernels, and what attention promises in half precision."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rope_extrap as rx
from extras.tests.helpers import DEVICES, random_llama

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")

# -------------------------------------------------------------------------------------------------
# Rotation and frequencies


def test_rotation_is_by_position_times_frequency():
    x = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4)  # pairs (0, 1) and (2, 3)
    cis = rx.freqs_cis(torch.tensor([[3]]), torch.tensor([1.0, 0.1]))
    expected = torch.tensor([math.cos(3), math.sin(3), math.cos(0.3), math.sin(0.3)])
    torch.testing.assert_close(rx.rotate(x, cis).flatten(), expected)
    assert rx.rotate(x.bfloat16(), cis).dtype == torch.bfloat16


@given(st.integers(1, 64), st.floats(100, 1e6))
def test_frequencies_are_powers_of_theta(half, theta):
    expected = [theta ** (-2 * f / (2 * half)) for f in range(half)]
    np.testing.assert_allclose(rx.rope_frequencies(2 * half, theta), expected)


@given(st.integers(2, 64), st.floats(1, 100))
def test_ntk_is_rope_with_a_larger_theta(half, factor):
    D = 2 * half
    expected = rx.rope_frequencies(D, 10000.0 * factor ** (D / (D - 2)))
    found = rx.ntk(rx.rope_frequencies(D, 10000.0), factor).frequencies
    torch.testing.assert_close(found, expected)


@given(st.floats(1, 100))
def test_yarn_keeps_fast_frequencies_and_divides_slow_ones(factor):
    frequencies = rx.rope_frequencies(128, 10000.0)
    method = rx.yarn(frequencies, factor, 4096)
    rotations = 4096 * frequencies / (2 * math.pi)
    fast = rotations >= 32
    slow = rotations <= 1
    torch.testing.assert_close(method.frequencies[fast], frequencies[fast])
    torch.testing.assert_close(method.frequencies[slow], frequencies[slow] / factor)
    assert (method.frequencies <= frequencies * (1 + 1e-9)).all()
    assert (method.frequencies >= frequencies / factor * (1 - 1e-9)).all()
    assert method.logit_scale == (0.1 * math.log(factor) + 1) ** 2


# -------------------------------------------------------------------------------------------------
# Fast attention against the dense reference, in every precision


KEY_DIMS = torch.arange(32).view(2, 16) % 3 < 2
METHODS = {
    "rope": rx.rope(),
    "dpe": rx.dpe(128, 7),
    "dpe, key dimensions": rx.dpe(100, 5, KEY_DIMS),
    "lampe": rx.lampe(1000, 300, 128, 64),
    "lampe, key dimensions": dataclasses.replace(rx.lampe(1000, 300, 128, 64), key_dims=KEY_DIMS),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype, tolerance", [
    (torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("device", DEVICES)
def test_fast_attention_is_dense_in_every_precision(name, dtype, tolerance, device):
    method = METHODS[name]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 1013, 32, generator=generator).to(device, dtype)
    frequencies = rx.rope_frequencies(32, 10000.0)
    exact = rx.attend_dense(q.double(), k.double(), v.double(), method, frequencies)
    fast = rx.attend(q, k, v, method, frequencies)
    torch.testing.assert_close(fast.double(), exact, atol=tolerance, rtol=0)


def attention_beside_a_sink(sink, dtype, seed, T=400, D=64):
    """q, k, v of 4 heads and 2 KV heads. Every query gives the first key about `sink` logits.

    The value of the first key is 0, and the slowest pair of coordinates is kept for it.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 4, T, D, generator=generator)
    k = torch.randn(1, 2, T, D, generator=generator)
    v = torch.randn(1, 2, T, D, generator=generator)
    q[..., -2:] = torch.tensor([4.0, 0.0])
    k[..., -2:] = 0
    k[:, :, 0] = 0
    k[:, :, 0, -2] = sink * math.sqrt(D) / 4
    v[:, :, 0] = 0
    return q.to(dtype), k.to(dtype), v.to(dtype)


def relative_errors(q, k, v, method, frequencies):
    """Median and 99th percentile of each row's relative error, in a prefill and in decoding."""
    T = q.shape[2]
    exact = rx.attend_dense(q.double(), k.double(), v.double(), method, frequencies)
    prefill = rx.attend(q, k, v, method, frequencies)
    rows = []
    for n in range(T - 50, T):
        row = rx.attend(q[:, :, n:n + 1], k[:, :, :n + 1], v[:, :, :n + 1], method, frequencies)
        rows.append(row)
    found = []
    for fast in (prefill, torch.cat(rows, dim=2)):
        n = min(fast.shape[2], T - 1)  # the first row is 0
        error = (fast.double() - exact[:, :, -fast.shape[2]:])[:, :, -n:].norm(dim=-1)
        relative = error / exact[:, :, -n:].norm(dim=-1)
        found += relative.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return np.array(found)


@settings(max_examples=12)
@given(st.floats(0, 12), st.sampled_from([torch.bfloat16, torch.float16]), st.integers(0, 99),
       st.integers(8, 350), st.integers(2, 9))
def test_beside_an_attention_sink_bands_are_as_exact_as_rope(sink, dtype, seed, window, scale):
    """The first token may take 0.999 of a head's attention; merging must not lose the rest."""
    q, k, v = attention_beside_a_sink(sink, dtype, seed)
    T = q.shape[2]
    frequencies = rx.rope_frequencies(64, 500000.0)
    key_dims = torch.rand(4, 32, generator=torch.Generator().manual_seed(seed)) < 0.75
    bound = 1.5 * relative_errors(q, k, v, rx.rope(), frequencies)
    for method in (rx.dpe(window, scale), rx.dpe(window, scale, key_dims), rx.rerope(window),
                   rx.lampe(T, T // scale, min(window, T // 3), 50, logit_scale=1.0)):
        assert (relative_errors(q, k, v, method, frequencies) <= bound).all()


# -------------------------------------------------------------------------------------------------
# Kernels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, D", [
    (torch.float32, 64), (torch.float16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256),
    (torch.bfloat16, 320), (torch.float32, 12), (torch.bfloat16, 12)])
@pytest.mark.parametrize("T, S, is_causal", [
    (1, 77, False), (77, 77, True), (40, 77, False), (1, 1, True)])
def test_every_kernel_is_softmax_attention_with_its_lse(device, dtype, D, T, S, is_causal):
    """On CUDA these shapes reach flash attention, efficient attention, and blockwise attention."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, T, D, generator=generator).to(device, dtype)
    k = torch.randn(2, 2, S, D, generator=generator).to(device, dtype)
    v = torch.randn(2, 2, S, D, generator=generator).to(device, dtype)
    out, lse = rx.fused_attention(q, k, v, 0.1, is_causal)
    logits = q.double() @ k.double().repeat_interleave(2, dim=1).mT * 0.1
    if is_causal:
        later = torch.ones(T, S, dtype=torch.bool, device=device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    expected = logits.softmax(-1) @ v.double().repeat_interleave(2, dim=1)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=tolerance, rtol=0)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32


@given(st.integers(1, 600), st.integers(1, 600), st.booleans(), st.integers(0, 2 ** 32))
def test_blockwise_attention_is_the_fused_kernel(T, S, is_causal, seed):
    if is_causal:
        S = T
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2, T, 4, generator=generator)
    k, v = torch.randn(2, 2, 2, S, 4, generator=generator)
    out, lse = rx.blockwise_attention(q, k, v, 0.5, is_causal)
    kernel_out, kernel_lse = rx.fused_attention(q, k, v, 0.5, is_causal)
    torch.testing.assert_close(out, kernel_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, kernel_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("capability, dtype, head_dim, kernel", [
    ((9, 0), torch.bfloat16, 128, "flash"), ((8, 0), torch.float16, 256, "flash"),
    ((8, 0), torch.float32, 128, "efficient"), ((8, 0), torch.bfloat16, 264, "efficient"),
    ((7, 5), torch.float16, 128, "efficient"), ((7, 5), torch.float32, 64, "efficient"),
    ((7, 5), torch.bfloat16, 128, "blockwise"), ((9, 0), torch.bfloat16, 12, "blockwise"),
    ((9, 0), torch.float64, 128, "blockwise")])
def test_each_cuda_card_gets_a_kernel_it_can_run(capability, dtype, head_dim, kernel):
    assert rx.choose_kernel("cuda", capability, True, dtype, head_dim) == kernel
    assert rx.choose_kernel("cuda", capability, False, dtype, head_dim) != "flash"
    assert rx.choose_kernel("cpu", (0, 0), False, dtype, head_dim) == "cpu"
    assert rx.choose_kernel("mps", (0, 0), False, dtype, head_dim) == "blockwise"


# -------------------------------------------------------------------------------------------------
# Refusals, and what python rope_extrap.py prints


@pytest.mark.parametrize("method", [
    rx.dpe(2, [4, 4, 2, 16, 32, 32, 16, 128]), rx.dpe(2, 3, torch.ones(3, 16, dtype=torch.bool)),
    rx.dpe(2, [2] * 4, torch.ones(4, 4, dtype=torch.bool)),
    rx.ntk(rx.rope_frequencies(8, 1e4), 2.0)])
def test_a_method_for_other_heads_is_refused(method):
    with pytest.raises(ValueError, match="not fit"):
        random_llama()(torch.zeros(1, 5, dtype=torch.int64), [method] * 2)


def rows_of_numbers(text, first_line, count):
    lines = text.splitlines()
    start = lines.index(first_line) + 1
    return [line.split() for line in lines[start:start + count]]


def test_dpes_printed_matrices_are_the_papers_and_ours(capsys):
    rx.print_dpe_matrices()
    out = capsys.readouterr().out
    for scale, drawn in ((3, "4 4 4 3 3 3 2 1 0"), (2, "5 5 4 4 3 3 2 1 0")):
        rel = rx.relative_positions(rx.dpe(3, scale), 9)
        rows = rows_of_numbers(out, f"scale {scale}", 9)
        assert rows[8][:9] == drawn.split()
        for i, row in enumerate(rows):
            left = [int(cell) for cell in row[:i + 1]]
            right = [int(cell.rstrip("*")) for cell in row[i + 1:]]
            marked = [cell.endswith("*") for cell in row[i + 1:]]
            assert right == rel[i, :i + 1].tolist()
            assert marked == [a != b for a, b in zip(left, right, strict=True)]


def test_lampes_printed_matrix_marks_the_regions(capsys):
    rx.print_lampe_matrix()
    row = capsys.readouterr().out.splitlines()[-1].split()  # 16 tokens, s1 = 3, s2 = 4
    assert [cell[0] for cell in row[:4]] == ["["] * 4
    assert [cell[0] for cell in row[4:12]] == ["("] * 8
    rel = rx.relative_positions(rx.lampe(16, 6, 3, 4), 16)[15].tolist()
    assert [int(cell.strip("()[]")) for cell in row] == rel


def test_the_printed_settings_are_the_published_ones(capsys):
    rx.print_published_settings()
    out = capsys.readouterr().out
    llama_3 = rows_of_numbers(out, "Llama-3-8B-Instruct", 7)
    assert llama_3[0] == ["4,096", "1-1-1-1-1-1-1-4", "1536"]
    assert llama_3[3] == ["32,768", "1-1-1-4-8-8-4-32", "4501"]
    assert llama_3[5] == ["131,072", "4-4-2-16-32-32-16-128", "6204"]
    llama_31 = rows_of_numbers(out, "Llama-3.1-8B-Instruct", 7)
    assert llama_31[5][:2] == ["131,072", "2-32-32-2-2-2-2-1"]
