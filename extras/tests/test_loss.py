"""The loss on a text: what is measured, that methods are paired, and what is refused."""
import json
import math
import re
import statistics
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    alone = run_loss(monkeypatch, text_file, "--method", "rope", "--trials", "3", "--last", "256")
    assert all(row in both["results"] for row in alone["results"])
    assert len(both["results"]) == 12


@given(n_tokens=st.integers(1, 400), length=st.integers(2, 100), trials=st.integers(1, 5),
       data=st.data())
def test_no_token_is_measured_twice(n_tokens, length, trials, data):
    last = data.draw(st.integers(1, length - 1))
    tokenizer = SimpleNamespace(bos_id=data.draw(st.sampled_from([None, -1])))
    tokens = list(range(n_tokens))
    try:
        stretches = common.draw_stretches(tokenizer, tokens, length, trials, last).values()
    except ValueError as error:
        assert "give a longer text" in str(error)
        assert n_tokens < length + (trials - 1) * last
        return
    assert len(stretches) == trials
    assert all(len(stretch) == length for stretch in stretches)
    assert all((stretch[0] == -1) == (tokenizer.bos_id is not None) for stretch in stretches)
    measured = [token for stretch in stretches for token in stretch[-last:]]
    assert len(set(measured)) == trials * last


def test_what_is_written_and_printed_is_what_was_measured(monkeypatch, text_file, capsys):
    measured = run_loss(monkeypatch, text_file, "--method", "rope,self-extend", "--last", "256",
                        "--trials", "3", "--set", "window=9,group=3")
    assert measured["settings"]["self-extend at 1000"]["window"] == 9
    assert measured.keys() == {"results", "checkpoint", "train_len", "haystack", "last", "seed",
                               "dtype", "settings"}

    # The losses are those of the text itself, after BOS.
    tokenizer = load_tokenizer(TINY)
    tokens = tokenizer.encode(text_file.read_text())
    model = load_model(TINY)
    methods = {"rope": rope(), "self-extend": dpe(9, 3)}
    losses = {"rope": [], "self-extend": []}
    for row in measured["results"]:
        stretch = [tokenizer.bos_id, *tokens[row["start"]:row["start"] + 999]]
        expected = common.block_losses(model, [methods[row["method"]]] * 2, stretch, 256)
        assert row["block_losses"] == pytest.approx(expected.tolist(), abs=2e-5)
        losses[row["method"]] += row["block_losses"]

    # The last two lines have their means, the mean differences, and two standard errors of these.
    last_lines = capsys.readouterr().out.splitlines()[-2:]
    for line, values in zip(last_lines, losses.values(), strict=True):
        differences = [a - b for a, b in zip(values, losses["rope"], strict=True)]
        error = 2 * statistics.stdev(differences) / math.sqrt(6)
        expected = [statistics.mean(values), statistics.mean(differences), error]
        printed = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line)]
        assert printed == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("arguments, named", [
    (["--len", "600"], "--haystack"),
    (["--haystack", "text.txt", "--len", "4096"], "too few for 1 stretches of --len 4096"),
    (["--haystack", "text.txt", "--len", "600", "--last", "599", "--trials", "9"], "--trials"),
    (["--haystack", "text.txt", "--last", "300", "--len", "300,400"], "--last"),
    (["--haystack", "text.txt", "--len", "600", "--last", "9", "--json", "no/x"], "no/x")])
def test_what_cannot_be_measured_is_refused(arguments, named, monkeypatch, text_file, capsys):
    monkeypatch.chdir(text_file.parent)
    assert command(monkeypatch, "--ckpt", TINY, *arguments, main=loss.main) == 2
    assert named in refused(capsys)
