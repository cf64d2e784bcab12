"""extras/bench.py: its table, its file, and what its floor counts."""
import json

import pytest
import torch

from extras import bench
from extras.tests.helpers import TINY, command, random_llama, refused

NAMES = ["rope", "dpe", "dpe, key dims", "lampe"]
CPU = torch.device("cpu")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The lines that bench prints for two lengths, and its record."""
    arguments = ["--ckpt", TINY, "--len", "120,60", "--repeats", "1", "--json", tmp_path / "b.json"]
    assert command(monkeypatch, *arguments, main=bench.main) == 0
    return capsys.readouterr().out.splitlines(), json.loads((tmp_path / "b.json").read_text())


def test_bench_prints_and_records_every_method_and_a_floor(run):
    (model, header, *lines), record = run
    assert model.endswith("tiny, cpu float32, median of 1")
    assert len(lines) == 2 * (len(NAMES) + 1)
    results = record["results"]
    assert list(results) == list(record["floors"]) == ["60", "120"]
    for length in ("60", "120"):
        assert list(results[length]) == NAMES
        base = results[length]["rope"]["prefill_seconds"]
        for name in NAMES:
            row = results[length][name]
            seconds, tokens_per_second, ratio, *others = figures_of(lines.pop(0), length, name)
            assert float(seconds) == pytest.approx(row["prefill_seconds"], abs=0.006)
            assert float(ratio) == pytest.approx(row["prefill_seconds"] / base, abs=0.006)
            has_growth = length == "120"
            assert len(others) == 4 + has_growth
            assert row["peak_gb"] > 0 and row["decode_ms"] > 0
        assert figures_of(lines.pop(0), length, "floor")


def figures_of(line, length, name):
    """The columns of a line after its length and name."""
    start = f"{length:>7}  {name:14}"
    assert line.startswith(start)
    return line[len(start):].split()


def test_a_figure_is_a_median_of_the_repeats():
    rows = [dict(a=1.0, b=5.0), dict(a=9.0, b=4.0), dict(a=2.0, b=3.0)]
    assert bench.medians(rows) == dict(a=2.0, b=4.0)


def test_growth_is_the_exponent_of_time_in_length():
    assert bench.growth_exponent(before=2.0, after=16.0, length_ratio=2) == "3.00"


def test_the_floor_counts_the_products_that_a_prefill_needs():
    model = random_llama(n_layers=3)
    T = 50
    floor = bench.measure_floor(model, T, CPU, ranks=1)
    c = model.config
    # A multiplication and an addition for each weight and token; half of the pairs are masked.
    kv = 2 * c.dim * c.n_kv_heads * c.head_dim
    layer = 2 * c.dim * c.n_heads * c.head_dim + 3 * c.dim * c.ffn_dim + kv
    assert floor["products_tflop"] == pytest.approx(2 * T * (2 * layer + kv) / 1e12)
    attention = 2 * (4 * T ** 2 / 2) * c.n_heads * c.head_dim
    assert floor["attention_tflop"] == pytest.approx(attention / 1e12)
    times = floor["products_seconds"] + 2 * floor["plain_attention_seconds"]
    assert floor["floor_seconds"] == pytest.approx(times)


def test_a_floor_by_flash_attention_is_named_where_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(bench, "flash_attention_runs", lambda q, k, v: True)
    floor = bench.measure_floor(random_llama(), 50, CPU, ranks=1)
    assert floor["flash_attention_seconds"] > 0
    bench.print_floor(50, floor, base=dict(prefill_seconds=1.0), n_layers=2)
    plain, flash = capsys.readouterr().out.splitlines()
    assert figures_of(plain, 50, "floor")
    assert figures_of(flash, 50, "floor, flash")


def test_key_dimensions_fit_the_heads_of_a_rank():
    config = random_llama().config
    layers = bench.methods_of_layers(config, 200, 2, CPU)
    assert list(layers) == NAMES
    masks = [method.key_dims for method in layers["dpe, key dims"]]
    assert [mask.shape for mask in masks] == [(config.n_heads // 2, config.head_dim // 2)] * 2
    assert 0.5 < torch.stack(masks).float().mean() < 0.95


@pytest.mark.parametrize("arguments, named", [
    (["--len", "0"], "0"), (["--repeats", "none"], "none"), (["--ckpt", "random:9b"], "random:9b"),
    (["--len", "60", "--json", "no/such/directory.json"], "no/such/directory.json")])
def test_bench_refuses_what_it_cannot_run(arguments, named, monkeypatch, capsys):
    assert command(monkeypatch, *arguments, main=bench.main) == 2
    assert named in refused(capsys)
