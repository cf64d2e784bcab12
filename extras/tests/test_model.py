"""The model against the oracle; batches, devices and decoding; refusals; DPE's contributions."""
import dataclasses

import numpy as np
import pytest
import torch

import rope_extrap as rx
from extras.tests.helpers import DEVICES, random_llama
from extras.tests.oracle import (
    oracle_dpe,
    oracle_frequencies,
    oracle_lampe,
    oracle_logits,
    oracle_positions,
)
from model import KVCache, RopeScaling, generate, measure_contributions


def draw_tokens(batch, length):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(48, (batch, length), generator=generator)


# -------------------------------------------------------------------------------------------------
# Logits

LENGTH = 192
SCALES = [s for s in (4, 4, 2, 16, 32, 32, 16, 1) for _ in range(2)]  # (D/2,)
KEY_DIMS = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(3)) < 0.75  # by layer
PLAIN = oracle_positions(LENGTH)
SCALED = oracle_dpe(LENGTH, 32, SCALES)
MAPPED = oracle_lampe(LENGTH, 60, 16, 8)

CASES = {  # changes to the configuration, a method per layer, relative positions per layer
    "rope": ({}, [rx.rope()] * 2, [PLAIN] * 2),
    "llama 3.1": (dict(rope_scaling=RopeScaling(original_len=64)), [rx.rope()] * 2, [PLAIN] * 2),
    "biases": (dict(qkv_bias=True), [rx.rope()] * 2, [PLAIN] * 2),
    "tied": (dict(tied=True), [rx.rope()] * 2, [PLAIN] * 2),
    "dpe": ({}, [rx.dpe(32, SCALES)] * 2, [SCALED] * 2),
    "dpe, key dimensions": ({}, [rx.dpe(32, SCALES, key) for key in KEY_DIMS],
                            [np.where(key[:, None, None], SCALED, PLAIN) for key in KEY_DIMS]),
    "lampe": ({}, [rx.lampe(LENGTH, 60, 16, 8)] * 2, [MAPPED] * 2),
    "lampe, then dpe": (  # with the same logit scale
        {}, [dataclasses.replace(rx.lampe(LENGTH, 60, 16, 8), logit_scale=1.0),
             rx.dpe(32, SCALES)], [MAPPED, SCALED]),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_oracles(name):
    changes, methods, rel = CASES[name]
    model = random_llama(**changes)
    tokens = draw_tokens(1, LENGTH)
    expected = oracle_logits(model.state_dict(), model.config, tokens[0], rel,
                             methods[0].logit_scale)
    np.testing.assert_allclose(model(tokens, methods)[0], expected, atol=1e-3)

    cache = KVCache(model.config, 1, LENGTH)  # and in two prefills and then one by one
    parts = tokens.split([100, 40] + [1] * 52, dim=1)
    decoded = torch.cat([model(part, methods, cache)[0] for part in parts])
    np.testing.assert_allclose(decoded, expected, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [
    rx.rope(), rx.dpe(40, [2, 3, 5, 7] * 4), rx.lampe(300, 90, 40, 20),
    rx.dpe(40, 3, torch.arange(64).view(4, 16) % 3 < 2)])
def test_a_batch_on_any_device_is_its_rows_on_the_cpu(device, method):
    model = random_llama()
    methods = [method] * 2
    tokens = draw_tokens(2, 300)
    rows = [model(row[None], methods) for row in tokens]
    model.to(device)
    cache = model.new_cache(2, 300)
    parts = tokens.to(device).split([297, 1, 1, 1], dim=1)
    found = torch.cat([model(part, methods, cache) for part in parts], dim=1)
    torch.testing.assert_close(found.cpu(), torch.cat(rows), atol=1e-3, rtol=0)


def test_a_model_in_half_precision_has_a_cache_and_logits_near_those_in_float32():
    model = random_llama().bfloat16()
    tokens = draw_tokens(1, 80)
    cache = model.new_cache(1, 80)
    logits = torch.cat([model(part, cache=cache) for part in tokens.split(40, dim=1)], dim=1)
    assert (logits - model.float()(tokens)).abs().mean() < 0.05


@pytest.mark.parametrize("scaling", [
    None, RopeScaling(), RopeScaling(32.0), RopeScaling(4.0, 2048, 0.5, 8.0)])
def test_llama_31s_frequencies_are_those_of_its_release(scaling):
    config = dataclasses.replace(random_llama().config, head_dim=128, rope_scaling=scaling)
    np.testing.assert_allclose(config.frequencies(), oracle_frequencies(config), rtol=1e-12)


@pytest.mark.parametrize("reason, arguments", [
    ("2 layers .* not 3 methods", dict(methods=[rx.rope()] * 3)),
    ("do not fit a cache of 4 tokens", dict(cache=KVCache(random_llama().config, 1, 4))),
    ("made for 3 rows", dict(cache=KVCache(random_llama().config, 3, 9))),
    ("do not fit heads", dict(methods=[rx.dpe(2, [4, 4, 2, 16, 32, 32, 16, 128])] * 2)),
    ("do not fit 4 heads", dict(methods=[rx.dpe(2, 3, KEY_DIMS[0, :3])] * 2))])
def test_the_model_refuses_what_does_not_fit(reason, arguments):
    with pytest.raises(ValueError, match=reason):
        random_llama()(draw_tokens(1, 5), **arguments)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_an_error(value):
    model = random_llama()
    model.output.weight[-1, :] = value
    with pytest.raises(ValueError, match="not finite in torch.float32"):
        model(draw_tokens(1, 5))


# -------------------------------------------------------------------------------------------------
# Decoding


def test_generate_is_greedy_and_each_row_stops_by_itself():
    model = random_llama()
    prompt = torch.arange(10).view(2, 5)
    rows = prompt
    for _ in range(12):
        rows = torch.cat((rows, model(rows)[:, -1:].argmax(-1)), dim=1)
    free = rows[:, 5:].tolist()
    assert generate(model, prompt, 12).tolist() == free

    for stop in (free[0][3], free[1][2]):  # a row goes on to its own stop token, and repeats it
        ends = [row.index(stop) + 1 if stop in row else 12 for row in free]
        padded = []
        for row, end in zip(free, ends, strict=True):
            whole = row[:end] + [stop] * 12
            padded.append(whole[:max(ends)])
        assert generate(model, prompt, 12, stop_ids=[stop]).tolist() == padded


def test_generate_goes_on_after_what_a_cache_holds():
    model = random_llama()
    tokens = draw_tokens(2, 20)
    methods = [rx.dpe(4, 3)] * 2
    cache = KVCache(model.config, 2, 30)
    with torch.inference_mode():
        model(tokens[:, :15], methods, cache)
    found = generate(model, tokens[:, 15:], 8, methods, cache=cache)
    assert torch.equal(found, generate(model, tokens, 8, methods))
    assert cache.length == 27  # the last new token is not in the cache yet


# -------------------------------------------------------------------------------------------------
# DPE, step (b)


def test_heads_are_paired_with_the_kv_head_that_they_read():
    """The contribution is the mean product of the norms of pairs that rotate together."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(7, 4, 8, generator=generator)
    k = torch.randn(7, 2, 8, generator=generator)
    q_norms = torch.hypot(q[..., ::2], q[..., 1::2])
    k_norms = torch.hypot(k[..., ::2], k[..., 1::2])
    found = rx.contribution(q, k)
    for head in range(4):
        expected = (q_norms[:, head] * k_norms[:, head // 2]).mean(dim=0)
        torch.testing.assert_close(found[head], expected)


def test_among_equals_the_faster_frequency_is_key():
    assert rx.key_dimensions(torch.ones(1, 4), 2).tolist() == [[True, True, False, False]]


def contributions_of(model, tokens):
    """Each layer's contributions in a forward pass, layer by layer."""
    x = model.tok_embeddings(tokens)
    found = []
    for n, layer in enumerate(model.layers):
        normalized = layer.attention_norm(x)[0]
        q = layer.attention.wq(normalized).unflatten(1, (4, 32))
        k = layer.attention.wk(normalized).unflatten(1, (2, 32))
        found.append(rx.contribution(q, k))
        x = layer(x, rx.rope(), model.config.frequencies(), None, n, tokens.shape[1])
    return torch.stack(found)


def test_contributions_are_means_over_texts_and_leave_the_model_as_it_was():
    model = random_llama(qkv_bias=True)
    long, short = draw_tokens(1, 40), draw_tokens(1, 25)
    before = model(long)
    found = measure_contributions(model, [long[0].tolist(), short[0].tolist()])
    expected = (contributions_of(model, long) + contributions_of(model, short)) / 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(long), before)
