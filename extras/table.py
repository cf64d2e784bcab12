"""The README's tables, in Markdown: the share of numbers found, by method and length.

    python needle.py --method dpe,lampe --len 4096,65536 --trials 4 --json results.json
    python -m extras.table results.json

A cell such as "0.62 (0.31-0.86), 8" holds the share, its 95 % confidence interval, and the number
of needles.
"""
import argparse
import json
import math
from pathlib import Path


def wilson(found: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a probability, after `found` successes in n trials."""
    z = 1.96  # standard deviations
    share = found / n
    middle = share + z ** 2 / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z ** 2 / n
    low = max((middle - half_width) / scale, 0.0)
    high = min((middle + half_width) / scale, 1.0)
    return low, high


def cell(rows: list[dict]) -> str:
    """The share of all needles of these rows whose number was found, with its interval."""
    n = sum(len(row["expected"]) for row in rows)
    if n == 0:
        return ""
    found = sum(row["score"] * len(row["expected"]) for row in rows)
    low, high = wilson(found, n)
    return f"{found / n:.2f} ({low:.2f}-{high:.2f}), {n}"


def table(rows: list[dict]) -> str:
    """The rows of needle.py --json as a table, methods by lengths."""
    lengths = sorted({row["length"] for row in rows})
    header = " | ".join(f"{length:,}" for length in lengths)
    lines = [f"| | {header} |", "|---" * (len(lengths) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):  # in the order of the file
        cells = []
        for length in lengths:
            wanted = (method, length)
            cells.append(cell([row for row in rows if (row["method"], row["length"]) == wanted]))
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def is_row(row) -> bool:
    """Whether this is a row of needle.py --json, as far as tables and pictures need it."""
    types = {"method": str, "length": int, "depth": float | int, "score": float | int,
             "expected": list}
    if not isinstance(row, dict):
        return False
    return all(isinstance(row.get(key), kind) for key, kind in types.items())


def read_results(files: list[Path]) -> list[dict]:
    """The rows of all these files.

    Raises ValueError if a file is not what needle.py --json writes, OSError if it is missing.
    """
    rows = []
    for file in files:
        try:
            results = json.loads(file.read_text(encoding="utf-8"))["results"]
        except (ValueError, LookupError, TypeError):
            results = None
        if not isinstance(results, list) or not all(is_row(row) for row in results):
            raise ValueError(f"{file} is not a file that needle.py --json has written")
        rows += results
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE",
                        help="results of needle.py --json")
    args = parser.parse_args()
    try:
        rows = read_results(args.results)
    except (ValueError, OSError) as error:
        parser.exit(2, f"table.py: {error}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
