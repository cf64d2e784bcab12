"""extras/bench.py: its table and file, what the floor is, and random weights."""
import json

import pytest
import torch

from extras import bench
from extras.tests.helpers import command, random_llama, refused
from model import Llama
from rope_extrap import attend_dense, rope
from tiny.grammar import TINY

# -------------------------------------------------------------------------------------------------
# Measurements


def test_the_table_has_the_recorded_figures_and_their_ratios(monkeypatch, capsys, tmp_path):
    file = tmp_path / "bench.json"
    arguments = ["--ckpt", TINY, "--len", "120,60", "--repeats", "2", "--json", file]
    assert command(monkeypatch, *arguments, main=bench.main) == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    results = json.loads(file.read_text())["results"]
    assert list(results) == ["60", "120"]
    for length, rows in results.items():
        for name, row in rows.items():
            expected = []
            for key, value in row.items():
                plain = rows["transformers" if name.startswith("transformers") else "rope"]
                expected += [value, value / plain[key], value / rows["floor"][key]]
            line = lines.pop(0)
            assert line.startswith(f"{length:>7}  {name} ")
            figures = [float(figure) for figure in line.split()[-len(expected):]]
            assert figures == pytest.approx(expected, abs=0.006)
    assert lines == []


def test_a_figure_is_a_median_of_the_repeats():
    assert bench.medians([dict(a=1, b=5), dict(a=9, b=4), dict(a=2, b=3)]) == dict(a=2, b=4)


@pytest.mark.parametrize("n_queries", [1, 20])
def test_the_floor_is_causal_attention_without_positions(n_queries):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, n_queries, 16, generator=generator)
    k, v = torch.randn(2, 1, 2, 20, 16, generator=generator)
    arguments = (q, k, v, rope(), torch.zeros(8))  # frequencies of 0: nothing is rotated
    torch.testing.assert_close(bench.plain_attention(*arguments), attend_dense(*arguments))


@pytest.mark.parametrize("ranks", [1, 2])
def test_key_dimensions_are_three_quarters_of_those_of_a_ranks_heads(ranks):
    model = random_llama()
    model.layers[0].attention.n_kv_heads //= ranks
    defaults = bench.make_parser("").parse_args([])
    methods = bench.make_methods("dpe, key dims", defaults, model, 200)
    masks = torch.stack([method.key_dims for method in methods])
    assert masks.shape == (2, 4 // ranks, 16)
    assert 0.55 < masks.float().mean() < 0.95


def test_the_llama_of_transformers_is_extended_only_where_the_row_says_so():
    model = random_llama()
    defaults = bench.make_parser("").parse_args([])
    tokens = torch.arange(200)[None] % 48
    for parameter in bench.transformers_llama(model).parameters():
        parameter.data *= 10  # so that attention is far from uniform
    logits = []
    for name in ("transformers", "transformers, dpe", "transformers"):
        methods = bench.make_methods(name, defaults, model, 200)
        forward = bench.transformers_forward(name, methods, model)
        parts = tokens.split([150, 50], dim=1)
        with torch.no_grad():
            logits.append(torch.cat([forward(part).logits for part in parts]))
    assert torch.equal(logits[0], logits[2])
    assert not torch.allclose(logits[0], logits[1])


# -------------------------------------------------------------------------------------------------
# Random weights


@pytest.mark.parametrize("shape, count", [
    ("1b", 1_235_814_400), ("3b", 3_212_749_824), ("8b", 8_030_261_248), ("70b", 70_553_706_496)])
def test_published_shapes_have_the_published_parameters(shape, count):
    with torch.device("meta"):
        model = Llama(bench.SHAPES[f"random:{shape}"])
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_random_weights_are_those_of_an_untrained_llama():
    for name, parameter in bench.load_model("random:small").named_parameters():
        in_float32 = name in ("norm.weight", "output.weight")  # as after loading a checkpoint
        assert (parameter.dtype == torch.float32) == in_float32
        if "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.mean().item() == pytest.approx(0, abs=1e-3)
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("arguments, named", [
    (["--ckpt", "random:9b"], "random:9b"), (["--len", "0"], "--len"),
    (["--len", "60", "--json", "no/such/directory.json"], "no/such")])
def test_bench_refuses_what_it_cannot_run(arguments, named, monkeypatch, capsys):
    assert command(monkeypatch, *arguments, main=bench.main) == 2
    assert named in refused(capsys)
