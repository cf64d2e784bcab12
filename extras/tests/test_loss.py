"""The loss on a text: what is measured, that methods are paired, and what is refused."""
import json
import math
import re
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extras import loss
from extras.tests.helpers import TINY, command, random_llama, refused, write_sentences
from load_llama import load_model, load_tokenizer
from rope_extrap import dpe, rope

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")


@pytest.fixture
def text_file(tmp_path):
    return write_sentences(tmp_path / "text.txt")


def run_loss(monkeypatch, text_file, *arguments):
    """Run extras.loss on the bundled model, which must succeed. Returns what --json holds."""
    out = text_file.with_name("out.json")
    run = ["--ckpt", TINY, "--haystack", text_file, "--json", out, *arguments]
    assert command(monkeypatch, *run, main=loss.main) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("method", [rope(), dpe(8, 4)])
def test_losses_are_those_of_the_last_tokens(method):
    model = random_llama()
    tokens = torch.randint(48, (60,), generator=torch.Generator().manual_seed(0))
    logits = model(tokens[None], [method] * 2)[0].double()
    log_p = logits.log_softmax(dim=-1)
    expected = [-log_p[n - 1, tokens[n]].item() for n in range(50, 60)]
    found = loss.last_losses(model, [method] * 2, tokens.tolist(), last=10)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_logits_in_half_precision_are_computed_in_float32():
    model = random_llama().bfloat16()
    tokens = torch.arange(40)[None]
    rounded = model(tokens)
    loss.float32_logits(model)
    exact = model(tokens)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(exact, exact.bfloat16().float())
    torch.testing.assert_close(exact, rounded, atol=0.02, rtol=0.02)


@given(st.integers(2, 3000))
def test_blocks_have_128_tokens_or_a_few_more(n):
    losses = torch.arange(n, dtype=torch.float64)
    means = loss.block_means(losses)
    assert len(means) == max(n // 128, 2)
    assert (means.diff() > 0).all()  # in the text's order
    assert means.mean().item() == pytest.approx(losses.mean().item(), rel=0.02, abs=0.5)
    if n % 128 == 0 and n >= 256:
        assert torch.equal(means, losses.view(-1, 128).mean(dim=1))


def test_standard_errors_are_those_of_paired_differences():
    values = [3.0, 5.0, 9.0, 4.0]
    reference = [1.0, 4.0, 6.0, 4.0]
    found = loss.standard_error(torch.tensor(values), torch.tensor(reference))
    assert found == pytest.approx(statistics.stdev([2, 1, 3, 0]) / math.sqrt(4))


@pytest.mark.parametrize("stretches, numbers", [(1, 3), (4, 12), (5, 5), (9, 9)])
def test_errors_are_over_stretches_or_over_blocks_of_few_stretches(stretches, numbers):
    block_means = list(torch.arange(3.0 * stretches).view(stretches, 3))
    found = loss.paired_values(block_means)
    assert len(found) == numbers
    assert found.mean() == torch.cat(block_means).mean()


@given(st.integers(1, 300), st.integers(0, 500), st.integers(0, 9), st.integers(0, 9))
def test_stretches_lie_within_the_text(length, more, seed, trial):
    start = loss.stretch_start(length + more, length, seed, trial)
    assert 0 <= start <= more


def test_stretches_differ_by_seed_length_and_trial():
    starts = set()
    for seed in (0, 1):
        for length in (100, 101):
            for trial in (0, 1):
                starts.add(loss.stretch_start(10 ** 9, length, seed, trial))
    assert len(starts) == 8


def test_methods_read_the_same_stretches_in_any_run(monkeypatch, text_file):
    both = run_loss(monkeypatch, text_file, "--method", "lampe,rope", "--len", "600,1000",
                    "--trials", "3", "--last", "256")
    alone = run_loss(monkeypatch, text_file, "--method", "rope", "--len", "1000",
                     "--trials", "2", "--last", "256")
    starts = {}
    losses = {}
    for row in both["results"]:
        assert len(row["block_losses"]) == 2
        place = (row["length"], row["trial"])
        starts.setdefault(place, set()).add(row["start"])
        losses[row["method"], *place] = row
    assert len(losses) == len(both["results"]) == 12
    assert all(len(of_methods) == 1 for of_methods in starts.values())
    assert len(alone["results"]) == 2
    for row in alone["results"]:
        assert row == losses["rope", 1000, row["trial"]]


def test_the_json_and_the_table_hold_what_was_measured(monkeypatch, text_file, capsys):
    measured = run_loss(monkeypatch, text_file, "--method", "rope,self-extend", "--len", "1000",
                        "--last", "300", "--trials", "2", "--set", "window=9,group=3")
    assert measured["settings"]["self-extend at 1000"]["window"] == 9
    assert measured["last"] == 300

    # The JSON holds the losses of the text itself.
    tokens = load_tokenizer(TINY).encode(text_file.read_text())
    model = load_model(TINY)
    means = {}
    for row in measured["results"]:
        method = rope() if row["method"] == "rope" else dpe(9, 3)
        stretch = tokens[row["start"]:row["start"] + 1000]
        expected = loss.block_means(loss.last_losses(model, [method] * 2, stretch, 300))
        assert row["block_losses"] == pytest.approx(expected.tolist(), abs=2e-5)
        means.setdefault(row["method"], []).extend(row["block_losses"])

    # The table holds their means, the mean difference, and two of its standard errors.
    rows = capsys.readouterr().out.splitlines()[-2:]
    _, first_mean, difference, error = re.findall(r"[-+]?\d+\.\d+|rope", rows[0])
    assert float(first_mean) == pytest.approx(statistics.mean(means["rope"]), abs=1e-4)
    assert float(difference) == float(error) == 0
    mean, difference, error = map(float, re.findall(r"[-+]?\d+\.\d+", rows[1]))
    differences = [a - b for a, b in zip(means["self-extend"], means["rope"], strict=True)]
    assert mean == pytest.approx(statistics.mean(means["self-extend"]), abs=1e-4)
    assert difference == pytest.approx(statistics.mean(differences), abs=1e-4)
    assert error == pytest.approx(2 * statistics.stdev(differences) / math.sqrt(4), abs=1e-4)
    assert abs(difference) > 1e-3


@pytest.mark.parametrize("arguments, named", [
    (["--len", "4096"], "--len 4096 needs as many"),
    (["--haystack", "nowhere.txt"], "nowhere.txt"),
    (["--method", "rope,best"], "--method best is not one of rope,"),
    (["--method", "rope", "--set", "window=3"], "window is not a setting of rope"),
    (["--last", "300", "--len", "300,400"], "--last 300 must be"),
    (["--last", "1"], "--last 1 must be"),
    (["--len", "600", "--json", "no/where.json"], "no/where.json")])
def test_what_cannot_be_measured_is_refused(arguments, named, monkeypatch, text_file, capsys):
    monkeypatch.chdir(text_file.parent)
    run = ["--ckpt", TINY, "--haystack", text_file, "--last", "256", *arguments]
    assert command(monkeypatch, *run, main=loss.main) == 2
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_text_is_required(monkeypatch, capsys):
    assert command(monkeypatch, "--len", "600", main=loss.main) == 2
    assert "--haystack" in refused(capsys)
