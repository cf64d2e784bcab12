"""The README's tables, in Markdown, from the JSON files that needle.py and extras.loss write.

    python needle.py --method dpe,lampe --len 4096,65536 --trials 4 --json results.json
    python -m extras.table results.json
    python -m extras.table results.json --reference dpe
    python -m extras.table results.json "by rule=results_by_rule.json" --reference dpe

The first table gives the share of numbers found or, for files from extras.loss, the mean loss. A
cell such as "0.62 (0.31-0.86), 8; -3.10" holds the share, its 95% confidence interval (Wilson),
the number of needles, and the mean log-likelihood of the right answers in nats.

A method that was measured with two settings needs two names. In a file given as LABEL=FILE, each
method's name is followed by the label: "dpe, by rule".

With --reference, a second table compares the other methods with that one on the same questions or
the same stretches of text. A cell such as "+1.200 +- 0.800, 7 of 8" holds the mean difference,
positive where the method is better (a higher log-likelihood of the right answers, or a lower loss);
two standard errors of it; and how often the method is better. Each prompt or stretch that both
methods were run on counts as one measurement or, if there are fewer than 5 of them, each question
or block of 128 tokens does.
"""
import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

FEWEST_ROWS = 5  # fewest prompts or stretches to compute standard errors over


def wilson(found: float, n: int) -> tuple[float, float]:
    """Wilson's 95% confidence interval for a probability, after `found` successes in n trials."""
    z = 1.96  # standard deviations
    share = found / n
    middle = share + z ** 2 / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z ** 2 / n
    low = max((middle - half_width) / scale, 0.0)
    high = min((middle + half_width) / scale, 1.0)
    return low, high


def share_cell(rows: list[dict]) -> str:
    """The share of needles whose number was found, and the mean log-likelihood of the answers."""
    n = sum(len(row["expected"]) for row in rows)
    found = sum(row["score"] * len(row["expected"]) for row in rows)
    low, high = wilson(found, n)
    log_likelihood = statistics.mean(value for row in rows for value in row["log_likelihood"])
    return f"{found / n:.2f} ({low:.2f}-{high:.2f}), {n}; {log_likelihood:.2f}"


def loss_cell(rows: list[dict]) -> str:
    """The mean of all block losses of these rows."""
    losses = [loss for row in rows for loss in row["block_losses"]]
    return f"{statistics.mean(losses):.3f}"


def rows_of(rows: list[dict], method: str, length: int) -> list[dict]:
    """The rows of one method at one length."""
    return [row for row in rows if (row["method"], row["length"]) == (method, length)]


def cell(rows: list[dict], method: str, length: int) -> str:
    """The result of one method at one length."""
    of_method = rows_of(rows, method, length)
    if not of_method:
        return ""
    if is_loss_row(of_method[0]):
        return loss_cell(of_method)
    return share_cell(of_method)


def table(rows: list[dict], cell: Callable[[list[dict], str, int], str]) -> str:
    """A table of methods by lengths. cell(rows, method, length) is the text of a cell."""
    lengths = sorted({row["length"] for row in rows})
    header = " | ".join(f"{length:,}" for length in lengths)
    lines = [f"| | {header} |", "|---" * (len(lengths) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):  # in the order of the file
        cells = [cell(rows, method, length) for length in lengths]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------
# Paired differences


def measurements(rows: list[dict], method: str, length: int) -> dict[tuple, list[float]]:
    """The numbers that are paired between methods, by prompt or stretch. Higher is better.

    They are the log-likelihoods of right answers, or the negated losses of blocks of a text.
    """
    values = {}
    for row in rows_of(rows, method, length):
        if is_loss_row(row):
            values[row["measured_on"]] = [-loss for loss in row["block_losses"]]
        else:
            values[row["measured_on"]] = row["log_likelihood"]
    return values


def difference_cell(rows: list[dict], method: str, length: int, reference: str) -> str:
    """The paired difference between a method and the reference at one length."""
    values = measurements(rows, method, length)
    reference_values = measurements(rows, reference, length)
    by_row = []  # the differences of each prompt or stretch
    for place in values:
        if place in reference_values:
            pairs = zip(values[place], reference_values[place], strict=True)
            by_row.append([value - other for value, other in pairs])

    # Values from the same prompt or stretch are correlated, so their mean counts as one.
    if len(by_row) >= FEWEST_ROWS:
        differences = [statistics.mean(row) for row in by_row]
    else:
        differences = [difference for row in by_row for difference in row]
    n = len(differences)
    if n < 2 or method == reference:
        return ""
    error = 2 * statistics.stdev(differences) / math.sqrt(n)
    better = sum(difference > 0 for difference in differences)
    return f"{statistics.mean(differences):+.3f} +- {error:.3f}, {better} of {n}"


# -------------------------------------------------------------------------------------------------
# Files


NEEDLE_ROW = {"method": str, "length": int, "depth": float | int, "trial": int,
              "score": float | int, "expected": list, "log_likelihood": list}
LOSS_ROW = {"method": str, "length": int, "start": int, "block_losses": list}


def is_loss_row(row: dict) -> bool:
    """Whether a row comes from extras.loss rather than needle.py."""
    return "block_losses" in row


def are_rows(rows, types: dict) -> bool:
    """Whether this is a list of --json rows with values of these types and no empty lists."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return False
    for row in rows:
        for key, kind in types.items():
            value = row.get(key)
            if not isinstance(value, kind) or value == []:
                return False
        for number in row.get("block_losses", []) + row.get("log_likelihood", []):
            if not isinstance(number, float | int):
                return False
    return True


def read_results(files: list[str], kinds: list[dict]) -> list[dict]:
    """The rows of all these files, FILE or LABEL=FILE, each with what it was measured on.

    The label is appended to the name of the method.

    All rows must be of one of these kinds, NEEDLE_ROW or LOSS_ROW. Raises ValueError if they are
    not, if there are none, if a file is not what --json writes, or if a method was measured twice
    on the same prompt or stretch of text; OSError if a file is missing.
    """
    rows = []
    for name in files:
        label = ""
        file = name
        if not Path(name).exists():  # a file's own name may contain =
            label, _, file = name.rpartition("=")
        try:
            record = json.loads(Path(file).read_text(encoding="utf-8"))
            results = record["results"]
            conditions = [str(record.get(key)) for key in (
                "checkpoint", "haystack", "seed", "needles", "chat", "last")]
        except (ValueError, LookupError, TypeError, AttributeError):
            results = None
        if not any(are_rows(results, kind) for kind in kinds):
            scripts = " or ".join("extras.loss" if kind is LOSS_ROW else "needle.py"
                                  for kind in kinds)
            raise ValueError(f"{file} is not a file that --json of {scripts} has written")
        for row in results:
            where = (row["start"],) if is_loss_row(row) else (row["depth"], row["trial"])
            method = f"{row['method']}, {label}" if label else row["method"]
            rows.append(row | {"method": method, "measured_on": (*conditions, *where)})

    if not rows:
        raise ValueError("the results are empty; wait for the first measurement")
    if len({is_loss_row(row) for row in rows}) > 1:
        raise ValueError("shares of needles and losses cannot be in one table; give the files of "
                         "needle.py or those of extras.loss")
    seen = set()
    for row in rows:
        measurement = (row["method"], row["length"], row["measured_on"])
        if measurement in seen:
            raise ValueError(f"{row['method']} was measured on the same {row['length']} tokens "
                             f"more than once; name one of its files LABEL=FILE")
        seen.add(measurement)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="FILE",
                        help="file written by --json, or LABEL=FILE")
    parser.add_argument("--reference", metavar="M", help="the method to compare the others with")
    args = parser.parse_args()
    try:
        rows = read_results(args.results, [NEEDLE_ROW, LOSS_ROW])
    except (ValueError, OSError) as error:
        parser.exit(2, f"table.py: {error}\n")
    methods = sorted({row["method"] for row in rows})
    if args.reference is not None and args.reference not in methods:
        parser.exit(2, f"table.py: --reference {args.reference} is not in the results, which have "
                       f"{', '.join(methods)}\n")
    print(table(rows, cell))
    if args.reference is not None:
        print(f"\nDifference from {args.reference}, paired; positive is better\n")
        print(table(rows, functools.partial(difference_cell, reference=args.reference)))


if __name__ == "__main__":
    main()
