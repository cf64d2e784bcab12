"""The README's tables, in Markdown, from the JSON files that needle.py and the scripts here write.

    python needle.py --method dpe,lampe --len 4096,65536 --trials 4 --json results.json
    python -m extras.table results.json
    python -m extras.table results.json --reference dpe
    python -m extras.table results.json "by rule=results_by_rule.json" --reference dpe

The first table gives the share of numbers found or, for files from extras.loss and
extras.ablations, the mean loss. A cell such as "0.62 (0.31-0.86), 8; -3.10" holds the share, its
95% confidence interval (Wilson), the number of needles, and the mean log-likelihood of the right
answers in nats.

A method that was measured with two settings needs two names. In a file given as LABEL=FILE, each
method's name is followed by the label: "dpe, by rule".

With --reference, a second table compares the other methods with that one on the same questions or
the same stretches of text. A cell such as "+1.200 +- 0.800, 7 of 8" holds the mean difference,
positive where the method is better (a higher log-likelihood of the right answers, or a lower loss);
two standard errors of it; and how often the method is better. Each prompt or stretch that both
methods were run on counts as one measurement or, if there are fewer than 5 of them, each question
or block of 128 tokens does; fewer than 5 of these have no standard error either. Where there are
none, the cell says what differs. Needs pandas and scipy.
"""
import argparse
import json
from pathlib import Path

from needle import errors_in_one_sentence

FEWEST_ROWS = 5  # fewest measurements to compute standard errors over
PROMPT = ["length", "checkpoint", "haystack", "seed", "needles", "last", "position", "trial"]
KINDS = {  # what is measured, and what a row has besides
    "log_likelihood": ["method", "length", "depth", "trial", "score"],
    "block_losses": ["method", "length", "start", "trial"],
}


def read_results(files: list[str], kinds=KINDS):
    """A data frame with a row for every number measured in these files, FILE or LABEL=FILE.

    All files must be of the same one of these kinds. The columns are method, with the label; those
    of PROMPT, which identify a prompt or a stretch of text, where position is the depth or the
    start; question, or block; value, which is higher for a better method (losses are negated); and
    score, except for losses.
    Raises OSError, or ValueError if a file is not what --json writes, or if a method was measured
    twice on the same prompt or stretch of text.
    """
    import pandas as pd
    rows = None
    for name in files:
        file = name if Path(name).exists() else name.rpartition("=")[2]  # a name may contain =
        try:
            record = json.loads(Path(file).read_bytes())
            [kind] = kinds = [kind for kind in kinds if kind in record["results"][0]]
            new = pd.json_normalize(record["results"], kind, KINDS[kind]).rename(
                columns={0: "value", "depth": "position", "start": "position"})
            new = new.astype(dict.fromkeys(new.columns.drop("method"), float) | {"length": int})
            new.drop(columns="method").astype(int)  # raises ValueError if a number is not finite
            new["method"] += "" if file == name else f", {name.removesuffix('=' + file)}"
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            raise ValueError(f"{file} does not hold {' or '.join(kinds)} as --json writes them, "
                             f"with a finite number in every place") from None
        new["value"] *= -1 if kind == "block_losses" else 1
        # A checkpoint or a text is known by its name, without the directory that holds it.
        new = new.assign(**{key: Path(str(record.get(key))).name
                            for key in PROMPT if key not in new})
        new["question"] = new.groupby(["method", *PROMPT]).cumcount()
        rows = pd.concat([rows, new], ignore_index=True)
    if rows.duplicated(["method", *PROMPT, "question"]).any():
        raise ValueError("a method was measured twice on the same prompt or stretch of text; name "
                         "one of its files LABEL=FILE")
    return rows


def result(rows) -> str:
    """The result of one method at one length."""
    from scipy.stats import binomtest
    if "score" not in rows:
        return f"{-rows['value'].mean():.3f}"
    low, high = binomtest(round(rows["score"].sum()), len(rows)).proportion_ci(method="wilson")
    return (f"{rows['score'].mean():.2f} ({low:.2f}-{high:.2f}), {len(rows)}; "
            f"{rows['value'].mean():.2f}")


def difference(rows, reference) -> str:
    """The paired difference of one method at one length from the reference at that length."""
    pairs = rows.merge(reference, on=[*PROMPT, "question"]).set_index(PROMPT)
    if len(pairs) < 2:
        reasons = [f"the {key} differs" for key in PROMPT
                   if set(rows[key]).isdisjoint(reference[key])]
        return f"not paired: {[*reasons, 'only one question is the same'][0]}"
    differences = pairs["value_x"] - pairs["value_y"]
    # Values from the same prompt or stretch are correlated, so their mean counts as one.
    means = differences.groupby(PROMPT).mean()
    values = means if len(means) >= FEWEST_ROWS else differences
    error = f" +- {2 * values.sem():.3f}" if len(values) >= FEWEST_ROWS else ""
    return f"{values.mean():+.3f}{error}, {(values > 0).sum()} of {len(values)}"


def print_table(rows, cell) -> None:
    """Print a table of cell(rows), methods by lengths."""
    cells = {key: cell(group) for key, group in rows.groupby(["method", "length"])}
    lengths = sorted(rows["length"].unique())
    print("| |", " | ".join(f"{length:,}" for length in lengths), "|")
    print("|" + "---|" * (len(lengths) + 1))
    for method in rows["method"].unique():  # in the order of the files
        print("|", method, "|", " | ".join(cells.get((method, n), "") for n in lengths), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="FILE",
                        help="file written by --json, or LABEL=FILE")
    parser.add_argument("--reference", metavar="M", help="the method to compare the others with")
    args = parser.parse_args()
    with errors_in_one_sentence(parser):
        rows = read_results(args.results)
        reference = rows[rows["method"] == args.reference]
        if args.reference and reference.empty:
            raise ValueError(f"--reference {args.reference} is not in the results")
        print_table(rows, result)
        if args.reference:
            print(f"\nDifference from {args.reference}, paired; positive is better\n")
            print_table(rows.drop(reference.index), lambda at_length: difference(
                at_length, reference[reference["length"].isin(at_length["length"])]))


if __name__ == "__main__":
    main()
