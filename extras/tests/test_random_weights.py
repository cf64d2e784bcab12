"""Random weights in published shapes, and whether a prefill fits the memory."""
import dataclasses
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import extras.random_weights
import rope_extrap as rx
from extras.memory import memory_free, prefill_memory
from extras.random_weights import SHAPES, random_model
from extras.tests.helpers import command, random_llama, refused
from model import KVCache, Llama

# -------------------------------------------------------------------------------------------------
# Random weights


@pytest.mark.parametrize("shape, count", [
    ("1b", 1_235_814_400), ("3b", 3_212_749_824), ("8b", 8_030_261_248), ("70b", 70_553_706_496)])
def test_published_shapes_have_the_published_parameters(shape, count):
    with torch.device("meta"):
        model = Llama(SHAPES[shape])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def small_shape(shape):
    """A published shape, made small, with more tokens than the bundled tokenizer has."""
    return dataclasses.replace(SHAPES[shape], vocab_size=5000, dim=64, n_layers=1, n_heads=8,
                               head_dim=8, ffn_dim=32)


@pytest.mark.parametrize("shape", ["1b", "8b"])  # with a tied output, and with its own
def test_a_published_shape_runs(shape, monkeypatch, capsys):
    small = small_shape(shape)
    monkeypatch.setitem(SHAPES, shape, small)
    run = ["--ckpt", f"random:{shape}", "--method", "dpe", "--len", "300", "--depths", "1"]
    assert command(monkeypatch, *run, "--train-len", "100") == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    count = sum(parameter.numel() for parameter in Llama(small).parameters())
    assert first == (f"# random:{shape}: {count:,} parameters, trained on 100 tokens; "
                     f"cpu bfloat16, seed 0")
    assert "the scores mean nothing" in second


def test_random_weights_are_those_of_an_untrained_llama():
    model = random_model("small")
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.float().mean().item() == pytest.approx(0, abs=1e-3)
            assert parameter.float().std().item() == pytest.approx(0.02, rel=0.02)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    assert len({matrix[0, :8].float().sum().item() for matrix in matrices}) == len(matrices)


def test_random_weights_are_the_same_every_time():
    one, other = random_model("small"), random_model("small", dtype=torch.float32)
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert theirs.dtype == torch.float32
        torch.testing.assert_close(ours.float(), theirs, atol=1e-3, rtol=1e-2)


def test_weights_that_do_not_fit_are_refused_unmade(monkeypatch, capsys):
    monkeypatch.setattr(extras.random_weights, "memory_free", lambda device: 10 ** 9)
    run = ["--ckpt", "random:1b", "--len", "100", "--depths", "1"]
    assert command(monkeypatch, *run) == 2
    assert "random:1b has 2.5 GB of weights, and only 1.0 GB are free" in refused(capsys)


# -------------------------------------------------------------------------------------------------
# Memory


def peak_memory(model, methods, length):
    """The most bytes that a prefill on the CPU has allocated at a time, the cache included."""
    cache = KVCache(model.config, 1, length)
    tokens = torch.zeros(1, length, dtype=torch.int64)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU],
                                         profile_memory=True) as profiler:
        model(tokens, methods, cache, last=1)
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    live = 0
    peak = 0
    for event in events:
        live += event.nbytes()  # negative where memory is freed
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("method", [
    rx.rope(), rx.dpe(256, 4), rx.dpe(256, 4, torch.ones(2, 16) > 0),
    rx.lampe(8192, 1000, 256, 100)])
def test_a_prefill_takes_less_memory_than_estimated(method):
    """But not much less: some kernels copy keys and values for each query head, on a CPU none."""
    model = random_llama(n_heads=2, n_kv_heads=1, ffn_dim=64)
    fixed, per_token = prefill_memory(model.config, itemsize=4, ranks=1)
    estimate = fixed + 8192 * per_token
    assert 0.5 * estimate < peak_memory(model, [method] * 2, 8192) <= estimate


def test_a_ranks_memory_is_that_of_its_heads():
    config = SHAPES["70b"]
    heads = dataclasses.replace(config, n_heads=8, n_kv_heads=1)
    assert prefill_memory(config, 2, ranks=8) == prefill_memory(heads, 2, ranks=1)
    cache = 2 * 80 * 8 * 128 * 2  # bytes: k and v, layers, KV heads, head_dim, bfloat16
    _, per_token = prefill_memory(config, 2, ranks=1)
    _, without_cache = prefill_memory(dataclasses.replace(config, n_layers=0), 2, ranks=1)
    assert per_token - without_cache == cache


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="memory as on Linux")
def test_ranks_on_a_cpu_share_the_free_memory(monkeypatch):
    cpu = torch.device("cpu")
    whole = memory_free(cpu)
    assert 10 ** 7 < whole < 10 ** 14
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_free(cpu) == pytest.approx(whole / 4, rel=0.2)
