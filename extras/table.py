"""The README's tables, in Markdown: the numbers found by method and length, each share with its 95 % interval.

    python needle.py --method dpe,lampe --len 4096,65536 --trials 4 --json results.json
    python extras/table.py results.json
"""
import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from needle import fail, in_sentences  # noqa: E402


def wilson(found: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a probability, after `found` of n."""
    share = found / n
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(middle - half, 0.0) / (1 + z * z / n), min((middle + half) / (1 + z * z / n), 1.0)


def table(rows: list[dict]) -> str:
    """The rows of needle.py's --json as one table; n is the number of needles behind a share."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| | " + " | ".join(f"{length:,}" for length in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for length in lengths:
            counts = [(row["score"] * len(row["expected"]), len(row["expected"])) for row in rows
                      if (row["method"], row["length"]) == (method, length)]
            found, n = (sum(part) for part in zip(*counts)) if counts else (0, 0)
            cells.append("{:.2f} ({:.2f}-{:.2f}), {}".format(found / n, *wilson(found, n), n) if n else "")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_results(files: list[Path]) -> list[dict]:
    """The rows of all these files. Errors: ValueError, OSError."""
    rows = []
    for file in files:
        try:
            results = json.loads(file.read_text())["results"]
            for row in results:  # what is missing, or no number, raises
                row["method"], len(row["expected"]), row["length"] + row["depth"] + row["score"]
            rows += results
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{file} is not what needle.py --json wrote") from None
    return rows


@in_sentences()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE", help="what needle.py --json wrote")
    parser.error = fail
    print(table(read_results(parser.parse_args().results)))


if __name__ == "__main__":
    main()
