"""What README.md and extras/README.md say is what the code does."""
import json
import re
import runpy
import shlex
import statistics

import pytest
import torch

import needle
import rope_extrap as rx
from extras import table
from extras.tests.helpers import TINY, command
from load_llama import load_model

ROOT = TINY.parent
RESULTS = ROOT / "extras" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def without_line_breaks(text):
    return re.sub(r"\s+", " ", text)


# -------------------------------------------------------------------------------------------------
# Code


def test_the_method_of_ones_own_runs(monkeypatch, capsys, tmp_path):
    """It is ReRoPE, in a file that adds it to needle.py's table."""
    (block,) = [block for block in BLOCKS if block.startswith("import needle")]
    (tmp_path / "mine.py").write_text(block)
    name = re.search(r'METHODS\["(\w+)"\]', block)[1]
    monkeypatch.setattr(needle, "METHODS", needle.METHODS.copy())

    def main():
        runpy.run_path(str(tmp_path / "mine.py"), run_name="__main__")
    run = ["--ckpt", TINY, "--method", f"rerope,{name}", "--train-len", "400", "--len", "500",
           "--depths", "0", "--set", "window=50", "--json", tmp_path / "out.json"]
    assert command(monkeypatch, *run, main=main) == 0
    shown = f"# {name} at 500: window 50 (the rule for this training length and --set)"
    assert shown in capsys.readouterr().out.splitlines()
    rerope, mine = json.loads((tmp_path / "out.json").read_text())["results"]
    assert mine["method"] == name
    assert mine["answer"] == rerope["answer"]
    assert mine["log_likelihood"] == pytest.approx(rerope["log_likelihood"], abs=1e-3)


def test_attend_in_ones_own_model_runs():
    (block,) = [block for block in BLOCKS if block.startswith("import torch")]
    names = {}
    exec(block, names)
    q, k, v, out = names["q"], names["k"], names["v"], names["out"]
    assert out.shape == q.shape
    assert len(names["method"].bands) == 2
    last_rows = rx.attend_dense(q[:, :, -3:], k, v, names["method"], names["frequencies"])
    torch.testing.assert_close(out[:, :, -3:], last_rows, atol=1e-4, rtol=1e-4)


def test_the_bands_are_lines_of_the_code():
    code = without_line_breaks((ROOT / "rope_extrap.py").read_text(encoding="utf-8"))
    bands = []
    for block in BLOCKS:
        if not block.startswith("import"):
            bands += re.findall(r"Band\((?:[^()]|\([^()]*\))*\)", without_line_breaks(block))
    assert len(bands) >= 5  # DPE's two and LaMPE's three
    for band in bands:
        assert band in code


# -------------------------------------------------------------------------------------------------
# Numbers


def rows_of_two_triangles():
    """The nine lines with two triangles of numbers, and the title above them."""
    lines = README.splitlines()
    for start in range(1, len(lines) - 8):
        rows = [line.split() for line in lines[start:start + 9]]
        sizes = [len(row) for row in rows]
        if sizes == [2 * n for n in range(1, 10)] and "".join(rows[8]).isdecimal():
            return lines[start - 1], rows
    raise AssertionError("README.md has no two triangles of nine rows")


def test_the_matrices_of_nine_tokens_are_the_codes():
    title, rows = rows_of_two_triangles()
    w, s, s1, s2 = [int(re.search(rf"\b{name} = (\d+)", title)[1])
                    for name in ("w", "s", "s1", "s2")]
    mapping_len = int(re.search(r"mapping length (?:= )?(\d+)", title)[1])
    dpe = rx.relative_positions(rx.dpe(w, s), 9)
    lampe = rx.relative_positions(rx.lampe(9, mapping_len, s1, s2), 9)
    for i, row in enumerate(rows):
        numbers = [int(number) for number in row]
        assert numbers[:i + 1] == dpe[i, :i + 1].tolist()
        assert numbers[i + 1:] == lampe[i, :i + 1].tolist()


def test_lists_of_scales_are_published_or_calibrated():
    rows = [row.dpe for row in rx.PUBLISHED.values() if row.dpe is not None]
    for file in (TINY / "extrapolation.json", ROOT / "extras" / "smollm2.json"):
        rows.append(json.loads(file.read_text())["dpe"])
    known = set()
    for row in rows:
        lists = [row["effective_lengths"]]
        for doublings in range(10):
            lists.append(rx.dpe_scales(row["effective_lengths"], 1024 * 2 ** doublings))
        known.update("-".join(map(str, numbers)) for numbers in lists)
    quoted = re.findall(r"\b\d+(?:-\d+){7}\b", README)
    assert quoted
    assert set(quoted) <= known


MEASURED = {  # the rows of the README's table: method, and the suffix of its files in results/
    "RoPE": ("rope", ""), "NTK": ("ntk", ""), "YaRN": ("yarn", ""), "ReRoPE": ("rerope", ""),
    "SelfExtend": ("self-extend", ""), "DPE, by rule": ("dpe", "_by_rule"),
    "DPE, calibrated": ("dpe", ""), "LaMPE, by rule": ("lampe", "_by_rule"),
    "LaMPE, calibrated": ("lampe", ""), "LaMPE, logits not scaled": ("lampe", "_lampe_unscaled")}


def rows_measured(name, method, length):
    """The rows of one method and length in a file of extras/results, which may be missing."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return []
    results = json.loads(file.read_text())["results"]
    return [row for row in results if (row["method"], row["length"]) == (method, length)]


def needles_cell(suffix, method, length):
    rows = rows_measured(f"needles{suffix}", method, length)
    if not rows:
        return ""
    usual = {4096: 25, 8192: 60, 16384: 60, 32768: 25}[length]
    fewer = {("self-extend", "", 8192): 30, ("dpe", "_by_rule", 8192): 30,
             ("lampe", "_by_rule", 16384): 30}
    assert len(rows) == fewer.get((method, suffix, length), usual)  # as the README says
    share = statistics.mean(row["score"] for row in rows)
    log_likelihood = statistics.mean(row["log_likelihood"][0] for row in rows)
    return f"{share:.2f} ({log_likelihood:.1f})"


def loss_cell(suffix, method, length):
    losses = []
    for text in ("code", "prose"):
        rows = rows_measured(f"losses_{text}{suffix}", method, length)
        blocks = [loss for row in rows for loss in row["block_losses"]]
        if blocks:
            losses.append(f"{statistics.mean(blocks):.3f}")
    return "; ".join(losses)


def cells_of(name):
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


@pytest.mark.parametrize("name", MEASURED)
def test_the_results_table_is_what_was_measured(name):
    method, suffix = MEASURED[name]
    expected = [needles_cell(suffix, method, length) for length in (4096, 8192, 16384, 32768)]
    expected += [loss_cell(suffix, method, length) for length in (8192, 16384, 32768)]
    assert cells_of(name) == expected


COMPARED = {  # the rows of the README's table of differences: the method's names, the reference
    "DPE by rule vs. YaRN": ("dpe, by rule", "dpe, by rule", "yarn"),
    "DPE calibrated vs. YaRN": ("dpe", "dpe", "yarn"),
    "DPE by rule vs. SelfExtend": ("dpe, by rule", "dpe, by rule", "self-extend"),
    "DPE calibrated vs. SelfExtend": ("dpe", "dpe", "self-extend"),
    "LaMPE calibrated vs. SelfExtend": ("lampe", "lampe", "self-extend"),
    "LaMPE, logits not scaled, vs. SelfExtend": (
        "lampe, unscaled", "logits not scaled, ablation", "self-extend")}


def numbers_of(text):
    """The difference and the error in a cell such as "+1.2 +- 0.3", as text."""
    return re.findall(r"[+-]?[\d.]+", text)[:2]


@pytest.mark.parametrize("name", COMPARED)
def test_the_differences_are_what_was_measured(name):
    in_needles, in_losses, reference = COMPARED[name]
    needles = table.read_results(
        [f"{RESULTS}/needles.json", f"by rule={RESULTS}/needles_by_rule.json",
         f"unscaled={RESULTS}/needles_lampe_unscaled.json"], [table.NEEDLE_ROW])
    losses = table.read_results(
        [f"{RESULTS}/losses_code.json", f"by rule={RESULTS}/losses_code_by_rule.json",
         f"ablation={RESULTS}/ablations_lampe.json"], [table.LOSS_ROW])
    measured = []
    for length in (16384, 32768):
        measured.append(table.difference_cell(needles, in_needles, length, reference))
        measured.append(table.difference_cell(losses, in_losses, length, reference))
    for shown, cell in zip(cells_of(name), measured, strict=True):
        assert (shown == "") == (cell == "")
        for number, exact in zip(numbers_of(shown), numbers_of(cell), strict=True):
            decimals = len(number.partition(".")[2])
            assert float(number) == pytest.approx(float(exact), abs=0.51 * 10 ** -decimals)


def test_no_number_is_missing():
    assert "@@" not in README + (ROOT / "extras" / "README.md").read_text(encoding="utf-8")


def test_the_bundled_models_size_is_as_stated():
    count = sum(parameter.numel() for parameter in load_model(TINY).parameters())
    assert f"{count:,} parameters" in README


# -------------------------------------------------------------------------------------------------
# Commands, links and tests


def commands_of(file):
    """The needle.py commands in a README, without what comes before needle.py's arguments."""
    found = []
    text = (ROOT / file).read_text(encoding="utf-8")
    for line in text.replace("\\\n", " ").splitlines():
        match = re.match(r"\s*(?:pip|python|torchrun)\b.*\bneedle\.py(.*)", line)
        if match:
            found.append(match[1])
    return found


@pytest.mark.parametrize("file", ["README.md", "extras/README.md"])
def test_the_commands_have_options_that_exist(file, monkeypatch):
    commands = commands_of(file)
    assert commands
    for arguments in commands:
        monkeypatch.setattr("sys.argv", ["needle.py", *shlex.split(arguments)])
        args = needle.parse_arguments()
        assert args.methods


@pytest.mark.parametrize("file", ["README.md", "extras/README.md"])
def test_links_and_modules_lead_to_files(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith("http"):
            assert (ROOT / file).parent.joinpath(target).exists(), target
    for module in re.findall(r"-m (?:extras|tiny)\.\w+", text):
        path = module.removeprefix("-m ").replace(".", "/")
        assert (ROOT / f"{path}.py").exists(), module


def test_the_tests_that_are_named_exist():
    names = set()
    for file in (ROOT / "test_rope_extrap.py", *(ROOT / "extras/tests").glob("test_*.py")):
        names.update(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named
    assert named <= names
