"""Loss on a text: the mean over the last tokens of long stretches, by method and length.

    python -m extras.loss --ckpt DIR --haystack FILE --method rope,dpe,lampe --len 8192,16384

All methods read the same stretches of the text, so they are compared by paired differences of
their losses. Losses of neighboring tokens are correlated. Standard errors are therefore computed
over the means of stretches or, if there are fewer than 5 stretches, of blocks of 128 tokens.
--json keeps the means of blocks, so that any two runs on the same stretches (the same text, --len,
--trials, --last and --seed) can be compared in the same way.
"""
import argparse
import itertools
import json
import math
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import needle
from extras.table import FEWEST_ROWS
from model import Llama
from rope_extrap import Method

# -------------------------------------------------------------------------------------------------
# Losses and their statistics; also used by calibrate


def float32_logits(model: Llama) -> None:
    """Make a half-precision model compute its logits in float32.

    bfloat16 would round a logit of 20 by up to 0.06.
    """
    model.norm.float()  # its output is then float32 too
    if model.output is not None:
        model.output.float()


@torch.inference_mode()
def last_losses(model: Llama, methods: list[Method], tokens: list[int], last: int) -> Tensor:
    """The loss of each of the last tokens, given all tokens before it, in nats.

    Returns float64 (last,), on the CPU.
    """
    ids = torch.tensor([tokens], device=model.tok_embeddings.weight.device)
    logits = model(ids[:, :-1], methods, last=last)[0]  # (1024, 128256)
    return F.cross_entropy(logits, ids[0, -last:], reduction="none").double().cpu()


def stretch_start(n_tokens: int, length: int, seed: int, trial: int) -> int:
    """Where a stretch of `length` tokens begins in a text of n_tokens tokens.

    Raises ValueError if the text is too short.
    """
    if n_tokens < length:
        raise ValueError(f"--haystack has {n_tokens} tokens, and --len {length} needs as many; "
                         f"give a longer text")
    rng = random.Random(f"{seed} {length} {trial}")
    return rng.randrange(n_tokens - length + 1)


def block_means(losses: Tensor) -> Tensor:
    """The means of n // 128 blocks of about equal size, or of two blocks if n < 256.

    (n,) -> (blocks,).
    """
    n_blocks = max(len(losses) // 128, 2)
    means = [block.mean() for block in losses.tensor_split(n_blocks)]
    return torch.stack(means)


def paired_values(stretches: list[Tensor]) -> Tensor:
    """The numbers over which standard errors are computed, from each stretch's block means.

    They are the means of the stretches or, if there are fewer than 5, those of all blocks: (n,).
    """
    if len(stretches) < FEWEST_ROWS:
        return torch.cat(stretches)
    return torch.stack([blocks.mean() for blocks in stretches])


def standard_error(values: Tensor, reference: Tensor) -> float:
    """The standard error of the mean of values - reference, paired tensors (n,)."""
    difference = values - reference
    return difference.std().item() / math.sqrt(len(difference))


# -------------------------------------------------------------------------------------------------
# Command line


def check_processes(args: argparse.Namespace) -> None:
    """Raises ValueError if torchrun started more processes than the model is split across."""
    if needle.WORLD_SIZE > args.tp:
        raise ValueError(f"one model is measured, so torchrun's {needle.WORLD_SIZE} processes "
                         f"need --tp {needle.WORLD_SIZE}")


def parse_arguments(description: str, method: str = "rope,dpe,lampe") -> argparse.Namespace:
    """The options of this script and of ablations. method is the default of --method."""
    parser = needle.make_parser(description)
    parser.set_defaults(chat=False)  # needle.print_header reads it
    add = parser.add_argument
    add("--haystack", required=True, metavar="FILE", help="UTF-8 text")
    add("--method", default=method, metavar="M,M,...",
        help=f"{', '.join(needle.METHODS)}, or all; the others are compared with the first "
             f"(default: {method})")
    add("--len", type=needle.positives, default=[65536], metavar="N,N,...", dest="lengths",
        help="lengths of the stretches, in tokens (default: 65536)")
    add("--last", type=needle.positive, default=1024, metavar="N",
        help="number of tokens at the end of each stretch whose loss is averaged (default: 1024)")
    add("--trials", type=needle.positive, default=1, metavar="N",
        help="stretches of each length (default: 1)")
    add("--set", type=needle.settings_by_hand, action=needle.Update, default={},
        metavar="NAME=VALUE,...", dest="by_hand", help="settings to override, as in needle.py")
    add("--seed", type=int, default=0, metavar="N", help="seed of the stretches (default: 0)")
    add("--json", metavar="FILE", help="write the results to FILE, after each stretch")
    args = parser.parse_args()

    args.methods = needle.chosen_methods(args)
    if not 2 <= args.last < min(args.lengths):
        raise ValueError(f"--last {args.last} must be at least 2, and less than every --len")
    if args.json:
        needle.check_output("--json", args.json)
    check_processes(args)
    return args


def print_table(losses: dict, methods: list[str], lengths: list[int]) -> None:
    """Print mean losses, methods by lengths, and paired differences from the first method.

    losses: {(length, method): [block means (n,) of a stretch, ...]}.
    """
    first = methods[0]
    print(f"\nloss in nats per token, and its difference from {first} (negative is better) "
          f"+- two standard errors")
    width = max(len(method) for method in methods) + 2
    print(" " * width + "".join(f"{length:29}" for length in lengths))
    for method in methods:
        line = f"{method:{width}}"
        for length in lengths:
            values = paired_values(losses[length, method])
            reference = paired_values(losses[length, first])
            difference = (values - reference).mean()
            noise = 2 * standard_error(values, reference)
            line += f"{values.mean():9.4f}{difference:+9.4f} +-{noise:7.4f} "
        print(line)


def run(args: argparse.Namespace, with_variants: Callable | None = None) -> None:
    """Load the model, measure the loss of every method on every stretch, and compare them.

    with_variants(args, config, chosen), if given, returns `chosen`, {(length, name): Chosen}, with
    more methods to measure. These must have the same names at all lengths.
    """
    text = needle.read_haystack(args.haystack)
    model, tokenizer, device, _ = needle.load(args)
    float32_logits(model)
    tokens = tokenizer.encode(text)
    starts = {}
    for length, trial in itertools.product(args.lengths, range(args.trials)):
        starts[length, trial] = stretch_start(len(tokens), length, args.seed, trial)

    chosen = needle.choose_all_settings(args, model.config)
    needle.print_header(args, model, tokenizer, device, chosen)
    record = dict(checkpoint=args.ckpt, train_len=model.config.train_len, haystack=args.haystack,
                  last=args.last, seed=args.seed, dtype=args.dtype,
                  settings=needle.record_of_settings(chosen))

    def write_results():
        if args.json and needle.RANK == 0:
            text_of_file = json.dumps({"results": rows, **record}, indent=1)
            needle.write_whole(args.json, text_of_file + "\n")

    rows = []
    if with_variants is not None:
        chosen = with_variants(args, model.config, chosen)
    layers = needle.methods_of_layers(args, model, tokenizer, text, chosen)

    losses = {key: [] for key in layers}
    names = list(dict.fromkeys(name for _, name in layers))
    width = max(len(name) for name in names)
    for (length, trial), start in starts.items():
        stretch = tokens[start:start + length]
        for name in names:
            means = block_means(last_losses(model, layers[length, name], stretch, args.last))
            print(f"{name:{width}} {length:7} tokens  stretch {trial}  loss {means.mean():.4f}",
                  flush=True)
            losses[length, name].append(means)
            rows.append(dict(method=name, length=length, trial=trial, start=start,
                             block_losses=[round(loss, 5) for loss in means.tolist()]))
            write_results()
    print_table(losses, names, args.lengths)


def main() -> None:
    run(parse_arguments(__doc__))


if __name__ == "__main__":
    needle.run_command(main)
