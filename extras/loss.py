"""Loss on a text, by method and length: how well the end of a long stretch is predicted.

    python -m extras.loss --ckpt DIR --haystack FILE --method rope,dpe,lampe --len 8192,16384

All methods read the same stretches of the text, so they are compared by paired differences of
their losses. The stretches are evenly spaced, and each begins with BOS. Losses of neighboring
tokens are correlated. Standard errors are therefore computed over the means of stretches or, if
there are fewer than 5 stretches, of blocks of 128 tokens. --json keeps the means of blocks, so that
any two runs on the same stretches (the same text, --len, --trials and --last) can be compared in
the same way.
"""
import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import needle
from extras.common import (
    block_losses,
    draw_stretches,
    last_change,
    paired_differences,
    standard_error,
)
from extras.table import FEWEST_ROWS
from load_llama import load_model


def make_parser(description: str, method: str) -> argparse.ArgumentParser:
    """The options of this script and of ablations. method is the default of --method."""
    parser = needle.make_parser(description)
    add = parser.add_argument
    add("--method", default=method, metavar="M,M,...",
        help=f"{', '.join(needle.METHODS)}, or all; the others are compared with the first "
             f"(default: {method})")
    add("--last", type=int, default=1024, metavar="N",
        help="number of tokens at the end of each stretch whose loss is averaged (default: 1024)")
    add("--trials", type=int, default=1, metavar="N",
        help="stretches of each length (default: 1)")
    add("--json", metavar="FILE", help="write the results to FILE, after each stretch")
    return parser


def run(args: argparse.Namespace, load_model, add_variants: Callable | None = None) -> None:
    """Measure the loss of every method on every stretch, and compare them.

    add_variants(args, config, chosen) may add more to what needle.choose_all has chosen.
    """
    if args.haystack is None:
        raise ValueError("--haystack FILE is needed, a text whose loss is measured")
    if args.trials < 1 or not 2 <= args.last < min(args.lengths):
        raise ValueError("--trials must be at least 1, and --last at least 2 and less than --len")
    if args.json:
        seen = last_change(Path(args.json))
    model, tokenizer, text = needle.load(args, load_model)
    tokens = tokenizer.encode(text)
    stretches = {length: draw_stretches(tokenizer, tokens, length, args.trials, args.last)
                 for length in args.lengths}
    chosen = needle.choose_all(args, model.config)
    needle.print_header(args, model, chosen)
    record = dict(checkpoint=args.ckpt, train_len=model.config.train_len, haystack=args.haystack,
                  last=args.last, seed=args.seed,
                  dtype=str(model.tok_embeddings.weight.dtype).removeprefix("torch."),
                  settings=needle.record_of(chosen))
    if add_variants is not None:
        add_variants(args, model.config, chosen)
    layers = needle.methods_of_layers(chosen, model, tokenizer, text, args.seed)

    rows = []
    for length, of_length in layers.items():
        for trial, (start, stretch) in enumerate(stretches[length].items()):
            for name, methods in of_length.items():
                losses = block_losses(model, methods, stretch, args.last)
                print(f"{length:7} tokens  stretch {trial}  loss {losses.mean():.4f}  {name}",
                      flush=True)
                rows.append(dict(method=name, length=length, trial=trial, start=start,
                                 block_losses=[round(loss, 5) for loss in losses.tolist()]))
                if args.json:
                    text_of_file = json.dumps({"results": rows, **record}, indent=1) + "\n"
                    seen = needle.replace_whole(Path(args.json), text_of_file, seen)
    print_differences(rows)


def print_differences(rows: list[dict]) -> None:
    """Print mean losses, and their paired differences from the first method."""
    losses = {}  # of each length and method, a list for each stretch
    for row in rows:
        losses.setdefault((row["length"], row["method"]), []).append(row["block_losses"])
    first = rows[0]["method"]
    print(f"\nloss in nats per token, and its difference from {first} (negative is better) +- two "
          f"standard errors")
    for (length, method), of_method in losses.items():
        mean = statistics.mean(loss for stretch in of_method for loss in stretch)
        differences = paired_differences(of_method, losses[length, first])
        error = 2 * standard_error(differences) if len(differences) >= FEWEST_ROWS else math.nan
        print(f"{length:7} tokens {mean:9.4f} {differences.mean():+9.4f} +-{error:7.4f}  {method}")


def main(load_model=load_model) -> None:
    parser = make_parser(__doc__, method="rope,dpe,lampe")
    args = parser.parse_args()
    with needle.errors_in_one_sentence(parser):
        run(args, load_model)


if __name__ == "__main__":
    main()
