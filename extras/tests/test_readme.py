"""README.md and extras/README.md: their code blocks and commands run, and their tables are true.

A command is a line that begins with four spaces. A table of results stands below a comment with the
command that makes it, in the form in which it is printed. Rows and columns may be left out.
"""
import argparse
import importlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from extras import table
from extras.tests.helpers import command
from tiny.grammar import TINY

ROOT = TINY.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXTRAS = (ROOT / "extras" / "README.md").read_text(encoding="utf-8")


def test_the_code_blocks_run(tmp_path):
    """Each by itself, in a file next to needle.py, in one process that imports PyTorch once."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "smollm2"))
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert blocks
    for number, block in enumerate(blocks):
        (copy / f"block{number}.py").write_text(block, encoding="utf-8")
    run_each = f"import runpy\nfor n in range({len(blocks)}): runpy.run_path(f'block{{n}}.py')"
    done = subprocess.run([sys.executable, "-c", run_each], cwd=copy, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr


class Parsed(Exception):
    """Raised in place of what follows parse_args."""


def commands(text):
    """Module and arguments of each command in a README."""
    start = r"^ {4}(?:pip .*&& )?(?:python|torchrun .*?)(?: -m extras\.parallel)?(?: -m)? "
    found = re.findall(start + r"(needle\.py|(?:extras|tiny)\.\w+)(?= |$)(.*)$",
                       text.replace("\\\n", " "), re.MULTILINE)
    return [(module.removesuffix(".py"), shlex.split(options)) for module, options in found]


def test_the_commands_have_options_that_exist(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_only(parser, *args):
        parse(parser, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    for module, options in commands(README) + commands(EXTRAS):
        with pytest.raises(Parsed):
            command(monkeypatch, *options, main=importlib.import_module(module).main)


def test_the_commands_of_the_needle_test_run(monkeypatch, tmp_path):
    """On the bundled model and on short prompts."""
    monkeypatch.chdir(tmp_path)  # for the files that they write
    shorter = ["--ckpt", TINY, "--train-len", 300, "--len", 500, "--trials", 1, "--depths", 1,
               "--haystack", ROOT / "README.md", "--device", "cpu"]
    of_needle = [options for module, options in commands(README) + commands(EXTRAS)
                 if module == "needle"]
    assert of_needle
    for options in of_needle:
        assert command(monkeypatch, *options, *shorter) == 0, options


def cells(lines):
    """{(row, column): cell} of a table in Markdown."""
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {(row[0], column): cell for row in rows
            for column, cell in zip(header[1:], row[1:], strict=True)}


def test_the_tables_are_what_was_measured(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    is_table = r"(?:^\|.*\n)+"
    all_printed = ""
    for text in (README, EXTRAS):
        marked = re.findall(rf"^<!-- python -m extras\.table ([^>]*) -->\n+({is_table})", text,
                            re.MULTILINE)
        assert len(marked) == text.count("<!-- python")
        for options, shown in marked:
            assert command(monkeypatch, *shlex.split(options), main=table.main) == 0
            printed = re.findall(is_table, capsys.readouterr().out, re.MULTILINE)
            made = [cells(lines.splitlines()).items() for lines in printed]
            assert any(cells(shown.splitlines()).items() <= items for items in made), shown
            all_printed += "".join(printed)
    assert marked  # in extras/README.md, at least
    for difference in re.findall(r"[+-]?\d+\.\d+ \+- \d+\.\d+", README + EXTRAS):
        assert difference in all_printed


@pytest.mark.parametrize("name", ["README.md", "extras/README.md"])
def test_links_and_names_of_tests_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / name).parent.joinpath(target).exists(), target
    tests = "".join(file.read_text(encoding="utf-8") for file in ROOT.rglob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in tests, test
