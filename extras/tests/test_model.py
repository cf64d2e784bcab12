"""The model: batches, decoding, the cache, refusals, frequencies, and DPE's contributions.

That its logits are the formulas' is tested in test_rope_extrap.py.
"""
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rope_extrap as rx
from extras.tests.helpers import DEVICES, random_llama
from extras.tests.oracle import oracle_frequencies
from model import KVCache, RopeScaling, contributions, generate

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")

FOUR_FREQUENCIES = dict(dim=16, head_dim=8)


def draw_tokens(batch, length, seed=0):
    return torch.randint(48, (batch, length), generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------
# Forward passes


@settings(max_examples=15)
@given(st.sampled_from([rx.rope(), rx.rerope(3), rx.dpe(4, [2, 3, 5, 7]), rx.lampe(60, 9, 4, 3),
                        rx.dpe(4, 3, torch.arange(16).view(4, 4) % 3 < 2)]),
       st.integers(1, 60), st.integers(2, 4))
def test_a_batch_is_its_rows(method, length, batch):
    model = random_llama(**FOUR_FREQUENCIES)
    tokens = draw_tokens(batch, length, seed=length)
    rows = torch.cat([model(row[None], [method] * 2) for row in tokens])
    torch.testing.assert_close(model(tokens, [method] * 2), rows, atol=1e-4, rtol=1e-4)


def test_layers_may_have_methods_of_their_own():
    model = random_llama(**FOUR_FREQUENCIES)
    tokens = draw_tokens(1, 60)
    first, second = rx.dpe(4, 3), rx.rerope(9)
    cache = KVCache(model.config, 1, 60)
    parts = tokens.split([50] + [1] * 10, dim=1)
    decoded = torch.cat([model(part, [first, second], cache) for part in parts], dim=1)
    logits = model(tokens, [first, second])
    torch.testing.assert_close(decoded, logits, atol=1e-4, rtol=1e-4)
    for others in ([second, first], [first, first], [second, second]):
        assert not torch.allclose(model(tokens, others), logits, atol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [
    rx.rope(), rx.dpe(40, [2, 3, 5, 7] * 4), rx.lampe(300, 90, 40, 20),
    rx.dpe(40, 3, torch.arange(64).view(4, 16) % 3 < 2)])
def test_every_device_gives_the_logits_of_the_cpu(device, method):
    model = random_llama()
    tokens = draw_tokens(2, 300)
    expected = model(tokens, [method] * 2)
    model.to(device)
    cache = KVCache(model.config, 2, 300)
    parts = tokens.to(device).split([297, 1, 1, 1], dim=1)
    found = torch.cat([model(part, [method] * 2, cache) for part in parts], dim=1)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("reason, arguments", [
    ("at least one token", dict(tokens=torch.zeros(1, 0, dtype=torch.int64))),
    ("at least one token and one logit", dict(last=0)),
    ("2 layers .* not 3 methods", dict(methods=[rx.rope()] * 3)),
    ("do not fit a cache of 4 tokens", dict(cache=KVCache(random_llama().config, 1, 4))),
    ("made for 3 rows", dict(cache=KVCache(random_llama().config, 3, 9)))])
def test_the_model_refuses_what_does_not_fit(reason, arguments):
    defaults = dict(tokens=torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=reason):
        random_llama()(**defaults | arguments)


def test_a_cache_with_tokens_refuses_what_no_longer_fits():
    model = random_llama()
    cache = KVCache(model.config, 1, 9)
    model(draw_tokens(1, 5), cache=cache)
    with pytest.raises(ValueError, match=r"5 \+ 5 tokens do not fit a cache of 9"):
        model(draw_tokens(1, 5), cache=cache)


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

    for stop in {free[0][3], free[1][2]}:  # a row goes on to its own stop token, and repeats it
        ends = [row.index(stop) + 1 if stop in row else 12 for row in free]
        padded = []
        for row, end in zip(free, ends, strict=True):
            whole = row[:end] + [stop] * 12
            padded.append(whole[:max(ends)])
        assert generate(model, prompt, 12, stop_ids=[stop]).tolist() == padded
        for n in (0, 1):
            alone = generate(model, prompt[n:n + 1], 12, stop_ids=[stop])
            assert alone[0].tolist() == free[n][:ends[n]]


def test_generate_goes_on_after_what_a_cache_holds():
    model = random_llama()
    tokens = draw_tokens(2, 20)
    methods = [rx.dpe(4, 3)] * 2
    cache = KVCache(model.config, 2, 30)
    model(tokens[:, :15], methods, cache)
    found = generate(model, tokens[:, 15:], 8, methods, cache=cache)
    assert torch.equal(found, generate(model, tokens, 8, methods))
    assert cache.length == 27  # the last new token is not in the cache yet


def fill_by_generate(model, tokens, cache):
    generate(model, tokens, 1, cache=cache)


def fill_in_inference_mode(model, tokens, cache):
    with torch.inference_mode():
        model(tokens, cache=cache)


@pytest.mark.parametrize("fill", [fill_by_generate, fill_in_inference_mode])
def test_a_cache_may_leave_inference_mode(fill):
    model = random_llama()
    tokens = draw_tokens(1, 40)
    cache = KVCache(model.config, 1, 40)
    fill(model, tokens[:, :20], cache)
    rest = model(tokens[:, 20:], cache=cache)
    torch.testing.assert_close(rest, model(tokens)[:, 20:], atol=1e-4, rtol=1e-4)


def test_decoding_in_bfloat16_is_as_exact_as_one_forward():
    model = random_llama().bfloat16()
    exact = random_llama()
    exact.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    tokens = draw_tokens(1, 80, seed=4)
    methods = [rx.dpe(16, 3)] * 2
    cache = KVCache(model.config, 1, 80)
    parts = tokens.split([40] + [1] * 40, dim=1)
    decoded = torch.cat([model(part, methods, cache) for part in parts], dim=1)
    truth = exact(tokens, methods)
    error_in_one_forward = (model(tokens, methods) - truth).abs().mean()
    assert (decoded - truth).abs().mean() < 1.5 * error_in_one_forward


# -------------------------------------------------------------------------------------------------
# Frequencies and contributions


@pytest.mark.parametrize("scaling", [
    None, RopeScaling(), RopeScaling(32.0), RopeScaling(4.0, 0.5, 8.0, 2048)])
def test_llama_31s_frequencies_are_those_of_its_release(scaling):
    config = dataclasses.replace(random_llama().config, head_dim=128, rope_scaling=scaling)
    np.testing.assert_allclose(config.frequencies(), oracle_frequencies(config), rtol=1e-12)


def test_contributions_are_those_of_a_forward_pass():
    model = random_llama(qkv_bias=True, n_heads=4, n_kv_heads=2)
    tokens = draw_tokens(1, 40)
    seen = {"wq": [], "wk": []}
    for layer in model.layers:
        for name, found in seen.items():
            projection = getattr(layer.attention, name)
            projection.register_forward_hook(lambda module, x, out, found=found: found.append(out))
    model(tokens)
    expected = []
    for q, k in zip(seen["wq"], seen["wk"], strict=True):
        expected.append(rx.contribution(q.view(40, 4, 32), k.view(40, 2, 32)))

    found = contributions(model, tokens)
    assert [x.shape for x in found] == [(4, 16)] * 2
    assert not torch.allclose(found[0], found[1])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_contributions_leave_the_model_as_it_was():
    model = random_llama()
    tokens = draw_tokens(1, 40)
    before = model(tokens)
    found = contributions(model, tokens)
    model(tokens)
    assert len(found) == 2  # later forward passes are not recorded
    assert torch.equal(model(tokens), before)
