"""The loss on a text: what is measured, that methods are paired, and what is refused."""
import json
import math
import re
import statistics

import pytest
import torch

from extras import common, loss
from extras.tests.helpers import command, random_llama, refused, write_sentences
from load_llama import load_model, load_tokenizer
from rope_extrap import dpe, rope
from tiny.grammar import TINY


@pytest.fixture
def text_file(tmp_path):
    return write_sentences(tmp_path / "text.txt")


def run_loss(monkeypatch, text_file, *arguments):
    """Run extras.loss on the bundled model, which must succeed. Returns what --json holds."""
    out = text_file.with_name("out.json")
    run = ["--haystack", text_file, "--json", out, "--len", "1000", *arguments]
    assert command(monkeypatch, *run, main=loss.main) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("method", [rope(), dpe(8, 4)])
@pytest.mark.parametrize("last, n_blocks", [(10, 2), (256, 2), (384, 3)])
def test_losses_are_means_over_blocks_of_the_last_tokens(method, last, n_blocks):
    model = random_llama()
    tokens = torch.randint(48, (400,), generator=torch.Generator().manual_seed(0))
    log_p = model(tokens[None], [method] * 2)[0].double().log_softmax(dim=-1)
    losses = [-log_p[n - 1, tokens[n]] for n in range(400 - last, 400)]
    expected = torch.stack(losses).view(n_blocks, -1).mean(dim=1)
    found = common.block_losses(model, [method] * 2, tokens.tolist(), last)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n_stretches, expected", [
    (1, [1, 2, 6]), (4, [1, 2, 6] * 4), (5, [3] * 5)])
def test_differences_are_those_of_stretches_or_of_blocks_of_few(n_stretches, expected):
    rows = torch.arange(3.0 * n_stretches).view(n_stretches, 3).square()
    reference = rows - torch.tensor([1.0, 2.0, 6.0])
    found = common.paired_differences(rows.tolist(), reference.tolist())
    assert found.tolist() == expected


def test_methods_read_the_same_stretches_in_any_run(monkeypatch, text_file):
    both = run_loss(monkeypatch, text_file, "--method", "lampe,rope", "--len", "600,1000",
                    "--trials", "3", "--last", "256")
    alone = run_loss(monkeypatch, text_file, "--method", "rope", "--trials", "2", "--last", "256")
    assert all(row in both["results"] for row in alone["results"])
    assert len(both["results"]) == 12
    assert len({row["start"] for row in both["results"]}) == 6


def test_what_is_written_and_printed_is_what_was_measured(monkeypatch, text_file, capsys):
    measured = run_loss(monkeypatch, text_file, "--method", "rope,self-extend", "--last", "300",
                        "--trials", "2", "--set", "window=9,group=3")
    assert measured["settings"]["self-extend at 1000"]["window"] == 9
    assert measured.keys() == {"results", "checkpoint", "train_len", "haystack", "last", "seed",
                               "dtype", "settings"}

    # The losses are those of the text itself.
    tokens = load_tokenizer(TINY).encode(text_file.read_text())
    model = load_model(TINY)
    methods = {"rope": rope(), "self-extend": dpe(9, 3)}
    losses = {"rope": [], "self-extend": []}
    for row in measured["results"]:
        stretch = tokens[row["start"]:row["start"] + 1000]
        expected = common.block_losses(model, [methods[row["method"]]] * 2, stretch, 300)
        assert row["block_losses"] == pytest.approx(expected.tolist(), abs=2e-5)
        losses[row["method"]] += row["block_losses"]

    # The last two lines have their means, the mean differences, and two standard errors of these.
    last_lines = capsys.readouterr().out.splitlines()[-2:]
    for line, values in zip(last_lines, losses.values(), strict=True):
        differences = [a - b for a, b in zip(values, losses["rope"], strict=True)]
        error = 2 * statistics.stdev(differences) / math.sqrt(4)
        expected = [statistics.mean(values), statistics.mean(differences), error]
        printed = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line)]
        assert printed == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("arguments, named", [
    (["--len", "600"], "--haystack"),
    (["--haystack", "text.txt", "--len", "4096"], "--len 4096 needs as many"),
    (["--haystack", "text.txt", "--last", "300", "--len", "300,400"], "--last"),
    (["--haystack", "text.txt", "--len", "600", "--last", "9", "--json", "no/x"], "no/x")])
def test_what_cannot_be_measured_is_refused(arguments, named, monkeypatch, text_file, capsys):
    monkeypatch.chdir(text_file.parent)
    assert command(monkeypatch, "--ckpt", TINY, *arguments, main=loss.main) == 2
    assert named in refused(capsys)
