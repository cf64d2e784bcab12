"""Run the papers' procedures on a model: DPE's effective lengths, or LaMPE's mapping-length fit.

    python -m extras.calibrate dpe --len 65536
    python -m extras.calibrate lampe --len 131072 --trials 5
    python -m extras.calibrate lampe --len 8192,16384,32768 --mapping-lens 1024,2048,3072,4096 \\
        --haystack FILE
    torchrun --nproc-per-node 8 -m extras.calibrate dpe --ckpt DIR --len 131072 --tp 8

Each writes its section of extrapolation.json in the checkpoint directory, where needle.py looks for
it, and keeps the other section.
"""
import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import needle
from extras.loss import (
    block_means,
    check_processes,
    float32_logits,
    last_losses,
    standard_error,
    stretch_start,
)
from load_llama import read_json
from model import Llama
from rope_extrap import Method, detect_scales, fit_mapping_length, not_worse

# -------------------------------------------------------------------------------------------------
# Measuring and printing


class Answers(NamedTuple):
    """How a method answers the questions: tensors (n,), with an entry for each question."""
    log_likelihood: Tensor  # of the right answer, in nats
    found: Tensor  # whether each token of the right answer is the most likely one
    n_tokens: Tensor  # number of tokens in the right answer


def draw_prompts(args: argparse.Namespace, tokenizer, length: int, needles: int,
                 text: str | None) -> list[tuple[list[int], list]]:
    """The prompt of each trial, with its questions and right answers."""
    prompts = []
    for n in range(args.trials):
        depth = n / args.trials / needles  # each prompt has its needles at different depths
        _, prompt, questions = needle.draw_trial(args, tokenizer, length, needles, depth,
                                                 f"calibration {n}", text)
        prompts.append((prompt, questions))
    return prompts


def ask(model: Llama, method: Method, prompts: list[tuple[list[int], list]]) -> Answers:
    """Ask every question by itself, right after its prompt."""
    methods = [method] * model.config.n_layers
    log_likelihood = []
    found = []
    n_tokens = []
    for prompt, questions in prompts:
        room = max(len(question) + len(answer) for question, answer in questions)
        cache = needle.prefill(model, methods, prompt, room)
        for question, answer in questions:
            score, right = needle.score_answer(model, methods, cache, question, answer)
            log_likelihood.append(score)
            found.append(right)
            n_tokens.append(len(answer))
    return Answers(torch.tensor(log_likelihood, dtype=torch.float64), torch.tensor(found),
                   torch.tensor(n_tokens))


def read(model: Llama, method: Method, stretches: list[list[int]], last: int) -> Tensor:
    """The losses of the last tokens of all stretches, in nats per token: block means (n,)."""
    methods = [method] * model.config.n_layers
    means = []
    for stretch in stretches:
        means.append(block_means(last_losses(model, methods, stretch, last)))
    return torch.cat(means)


class Progress:
    """Prints each measurement as it is made, and the time that the rest will take.

    `tokens` is the number of tokens that all measurements together read.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self.done = 0
        self.start = time.time()

    def report(self, tokens: int, text: str) -> None:
        """Print a measurement that read `tokens` tokens."""
        self.done += tokens
        seconds_per_token = (time.time() - self.start) / self.done
        left = max(self.tokens - self.done, 0) * seconds_per_token
        print(f"{text}   {left:.0f} s left", flush=True)


def with_errors(rows: list[Tensor] | Tensor, best: Tensor) -> list[list[float]]:
    """Each row's mean, and two standard errors of its difference from the best.

    The rows and best (n,) are paired. Returns [[mean, error], ...].
    """
    pairs = []
    for row in rows:
        error = 2 * standard_error(row, best)
        pairs.append([round(row.mean().item(), 6), round(error, 6)])
    return pairs


def print_table(columns: list[int], rows: list[tuple[str, list, str]]) -> None:
    """Print rows (label, [[mean, error], ...], remark)."""
    print(" " * 8 + "".join(f"{column:20}" for column in columns))
    for label, pairs, remark in rows:
        line = f"{label:8}"
        for mean, error in pairs:
            line += f"{mean:10.4f} +-{error:7.4f}"
        print(f"{line}   {remark}")


# -------------------------------------------------------------------------------------------------
# DPE, step (a)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit, but always at least 1."""
    powers = [1]
    while 2 * powers[-1] <= limit:
        powers.append(2 * powers[-1])
    return powers


def scales_to_try(length: int, train_len: int) -> tuple[list[int], int]:
    """The candidates for a group's scale, and the scale of all other groups, the background.

    The candidates are powers of two, down to an effective length of 1,024 tokens, or of an eighth
    of the training length if that is less. The background is the largest power of two up to
    2 * length / train_len.
    """
    shortest = min(1024, max(train_len // 8, 1))
    candidates = powers_of_two(length // shortest)
    background = powers_of_two(2 * length // train_len)[-1]
    return candidates, background


class Detection(NamedTuple):
    table: list[list[Tensor]]  # log-likelihoods (n,) of the answers, by group and candidate
    alone: list[int]  # each group's scale, found while the others are at the background
    together: list[int]  # each group's scale, for use with the others


def detect(score: Callable[[list[int]], Tensor], n_groups: int, candidates: list[int],
           background: int) -> Detection:
    """Find the scale of each group alone, and then the scales of all groups together.

    score(scales) takes one scale per group, and returns the log-likelihoods (n,) of the answers
    to the same n questions.

    The paper finds the scale of each group while all others are at the background. Scales found
    in this way may fail when they are used together. Here all of them are therefore tried
    together, and those below the background are doubled until the answers are not significantly
    worse than with all groups at the background.
    """
    alone, table = detect_scales(score, n_groups, candidates, background)
    at_background = score([background] * n_groups)
    together = alone
    while min(together) < background:
        if not_worse(score(together), at_background):
            break
        together = [max(scale, min(2 * scale, background)) for scale in together]
    return Detection(table, alone, together)


def matters(row: list[Tensor]) -> bool:
    """Whether any of a group's scales is significantly worse than its best."""
    best = max(row, key=Tensor.mean)
    return not all(not_worse(scores, best) for scores in row)


def print_detection(section: dict) -> None:
    """Print the table of a section of extrapolation.json."""
    print(f"\nlog-likelihood of an answer in nats, +- two standard errors of its difference from "
          f"the best of the row,\nby the group's scale (columns), with all others at "
          f"{section['background']}; then the effective length, alone and together")
    rows = []
    for group, pairs in enumerate(section["scores"]):
        alone = section["alone"][group]
        together = section["effective_lengths"][group]
        rows.append((f"group {group}", pairs, f"alone {alone}, together {together}"))
    print_table(section["candidates"], rows)


def detection_section(detection: Detection, settings: dict, length: int, candidates: list[int],
                      background: int) -> dict:
    """Print what was detected. Returns the section of extrapolation.json."""
    scores = []
    for row in detection.table:
        best = max(row, key=Tensor.mean)
        scores.append(with_errors(row, best))
    section = dict(
        window=settings["window"],
        effective_lengths=[math.ceil(length / scale) for scale in detection.together],
        alone=[math.ceil(length / scale) for scale in detection.alone],
        topk=settings["topk"], length=length, candidates=candidates, background=background,
        scores=scores)
    print_detection(section)
    return section


def calibrate_dpe(args: argparse.Namespace, model: Llama, tokenizer, text: str | None,
                  settings: dict) -> dict:
    """DPE, step (a), for 8 groups of frequencies. Returns the section of extrapolation.json.

    Raises ValueError if no answer is right at any setting, or if no scale matters.
    """
    config = model.config
    length = args.lengths[0]
    n_groups = min(8, config.head_dim // 2)
    candidates, background = scales_to_try(length, config.train_len)
    prompts = draw_prompts(args, tokenizer, length, args.needles, text)
    steps = n_groups * (len(candidates) - 1) + 2  # one at the background, one for all together
    progress = Progress(steps * length)
    measured = {}

    def score(scales):
        key = tuple(scales)
        if key not in measured:  # the background is among the candidates of every group
            method = needle.METHODS["dpe"].make(config, length, settings | dict(scales=scales))
            answers = ask(model, method, prompts)
            measured[key] = answers
            name = "-".join(str(scale) for scale in scales)
            progress.report(length, f"scales {name:24}  found {answers.found.double().mean():.2f}  "
                                    f"log-likelihood {answers.log_likelihood.mean():9.4f}")
        return measured[key].log_likelihood

    detection = detect(score, n_groups, candidates, background)
    if not any(answers.found.any() for answers in measured.values()):
        raise ValueError("no answer is right at any setting, so effective lengths cannot be told "
                         "apart; try a shorter --len")
    if not any(matters(row) for row in detection.table):
        raise ValueError("no scale of any group is significantly worse than its best, so effective "
                         "lengths cannot be told apart; try a longer --len or more questions")

    topk = settings["topk"] or config.head_dim // 2
    return detection_section(detection, settings | dict(topk=topk), length, candidates, background)


# -------------------------------------------------------------------------------------------------
# LaMPE's fit


def lengths_to_try(longest: int, train_len: int) -> list[int]:
    """The longest, 1/2 of it, 1/4 of it, ... down to the training length, but at least 3 lengths.

    They are in increasing order.
    """
    count = max((longest // train_len).bit_length(), 3)
    return [longest // 2 ** n for n in reversed(range(count))]


def mapping_lens_to_try(train_len: int) -> list[int]:
    """9 mapping lengths, from a sixteenth of the training length to all of it.

    Each is sqrt(2) times the one before it.
    """
    return [max(round(train_len / 16 * 2 ** (n / 2)), 1) for n in range(9)]


def measure_lampe(args: argparse.Namespace, model: Llama, tokenizer, text: str | None,
                  lengths: list[int], mapping_lens: list[int],
                  settings: dict) -> dict[int, Tensor]:
    """Losses in nats per token, paired over n: {length: (mapping_lens, n)}.

    With --haystack, they are the losses of the last 2,048 tokens (or half the length, if that is
    less). With generated sentences, they are those of the answers to questions about needles,
    since nothing else there depends on distant tokens.
    """
    # Draw the texts, which are the same for all mapping lengths.
    samples = {}
    if text is None:
        for length in lengths:
            needles = min(args.needles, max(length // 128, 2))
            samples[length] = draw_prompts(args, tokenizer, length, needles, None)
    else:
        tokens = tokenizer.encode(text)
        for length in reversed(lengths):  # a text too short for the longest fails at once
            starts = [stretch_start(len(tokens), length, args.seed, n) for n in range(args.trials)]
            samples[length] = [tokens[start:start + length] for start in starts]

    # Measure.
    progress = Progress(sum(lengths) * len(mapping_lens))
    losses = {}
    for length in lengths:
        rows = []
        for mapping_len in mapping_lens:
            method = needle.METHODS["lampe"].make(model.config, length,
                                                  settings | dict(mapping_len=mapping_len))
            if text is None:
                answers = ask(model, method, samples[length])
                rows.append(-answers.log_likelihood / answers.n_tokens)
            else:
                rows.append(read(model, method, samples[length], last=min(length // 2, 2048)))
            progress.report(length, f"length {length:6}  mapping length {mapping_len:6}  "
                                    f"loss {rows[-1].mean():.5f}")
        losses[length] = torch.stack(rows)
    return losses


class Bottom(NamedTuple):
    """Where the loss at one input length is lowest."""
    mapping_len: float
    error: float  # standard error of mapping_len
    distinguishable: bool  # whether any mapping length is significantly worse than the best


def vertex(losses: Tensor, mapping_lens: list[int]) -> Tensor:
    """The lowest point of a parabola in log2(mapping length), through the lowest loss and its
    neighbors.

    losses (n, mapping_lens) -> log2 of mapping lengths (n,), within the neighbors' range.
    """
    x = torch.tensor(mapping_lens, dtype=torch.float64).log2()
    middle = losses.argmin(dim=1).clamp(1, len(mapping_lens) - 2)
    left = middle - 1
    right = middle + 1
    row = torch.arange(len(losses))
    width_left = x[middle] - x[left]
    width_right = x[right] - x[middle]
    slope_left = (losses[row, middle] - losses[row, left]) / width_left
    slope_right = (losses[row, right] - losses[row, middle]) / width_right
    # The parabola's derivatives at the middle. If it is not convex, the minimum is at an end.
    slope = (slope_left * width_right + slope_right * width_left) / (width_left + width_right)
    curvature = 2 * (slope_right - slope_left) / (width_left + width_right)
    lowest = x[middle] - slope / curvature.clamp(min=1e-12)
    return lowest.clamp(x[left], x[right])


def find_bottom(losses: Tensor, mapping_lens: list[int], generator: torch.Generator) -> Bottom:
    """The mapping length of the lowest loss. losses (mapping_lens, n), paired over n.

    The standard error comes from 500 bootstrap resamples of the n values. It is at least 0.05
    in log2, which is 3.5%, so that no point outweighs all others in the fit.
    """
    means = losses.mean(dim=1)
    best = losses[means.argmin()]
    n = losses.shape[1]
    draws = torch.randint(n, (500, n), generator=generator)
    resampled = losses[:, draws].mean(dim=2).T  # (500, mapping_lens)

    mapping_len = 2 ** vertex(means[None], mapping_lens).item()
    error_of_log2 = max(vertex(resampled, mapping_lens).std().item(), 0.05)
    all_equal = all(not_worse(-row, -best) for row in losses)
    return Bottom(mapping_len, mapping_len * math.log(2) * error_of_log2, not all_equal)


def fit(bottoms: dict[int, Bottom]) -> tuple[float, float, float]:
    """LaMPE's sigmoid (a, b, L) through the best mapping lengths, {length: Bottom}.

    Raises ValueError if no mapping length is significantly worse than the best at any length, or
    if fit_mapping_length does.
    """
    if not any(bottom.distinguishable for bottom in bottoms.values()):
        raise ValueError("mapping lengths cannot be told apart at any of these input lengths; try "
                         "a longer --len or more questions")
    mapping_lens = [bottom.mapping_len for bottom in bottoms.values()]
    errors = [bottom.error for bottom in bottoms.values()]
    return fit_mapping_length(list(bottoms), mapping_lens, errors)


def print_curves(curves: dict[int, dict], bottoms: dict[int, Bottom]) -> None:
    """curves: {length: {mapping_len: [mean, error]}}."""
    print("\nloss in nats per token, +- two standard errors of its difference from the best of the "
          "row,\nby input length (rows) and mapping length (columns)")
    rows = []
    for length, curve in curves.items():
        bottom = bottoms[length]
        remark = f"best {bottom.mapping_len:.0f}, standard error {bottom.error:.0f}"
        if not bottom.distinguishable:
            remark = "not distinguishable"
        rows.append((str(length), list(curve.values()), remark))
    print_table(list(curve), rows)


def fit_section(losses: dict[int, Tensor], mapping_lens: list[int], settings: dict,
                seed: int) -> dict:
    """Print the losses and fit the sigmoid. Returns the section of extrapolation.json.

    losses: {length: (mapping_lens, n)}. Raises ValueError if no sigmoid can be fitted.
    """
    generator = torch.Generator().manual_seed(seed)
    bottoms = {}
    curves = {}
    best_mapping_lens = {}
    for length, rows in losses.items():
        bottom = find_bottom(rows, mapping_lens, generator)
        best = rows[rows.mean(dim=1).argmin()]
        bottoms[length] = bottom
        curves[length] = dict(zip(mapping_lens, with_errors(rows, best), strict=True))
        best_mapping_lens[length] = [round(bottom.mapping_len, 1), round(bottom.error, 1)]
    print_curves(curves, bottoms)
    a, b, L = fit(bottoms)
    # Below the shortest of the lengths, the sigmoid would extrapolate.
    shortest = min(bottoms)
    short = int(bottoms[shortest].mapping_len)
    return dict(a=a, b=b, L=L, short=short, short_below=shortest, s1=settings["s1"],
                s2=settings["s2"], best_mapping_lens=best_mapping_lens, curves=curves)


def calibrate_lampe(args: argparse.Namespace, model: Llama, tokenizer, text: str | None,
                    settings: dict) -> dict:
    """LaMPE's fit. Returns the section of extrapolation.json.

    Raises ValueError if even the lowest loss is more than half that of a uniform guess, or if no
    sigmoid can be fitted.
    """
    train_len = model.config.train_len
    lengths = args.lengths
    if len(lengths) == 1:
        lengths = lengths_to_try(lengths[0], train_len)
    mapping_lens = args.mapping_lens or mapping_lens_to_try(train_len)
    losses = measure_lampe(args, model, tokenizer, text, lengths, mapping_lens, settings)
    lowest = min(rows.mean(dim=1).min() for rows in losses.values())
    if lowest > math.log(model.config.vocab_size) / 2:
        raise ValueError("the model predicts almost nothing at any mapping length, so mapping "
                         "lengths cannot be told apart; try a shorter --len")
    return fit_section(losses, mapping_lens, settings, args.seed)


# -------------------------------------------------------------------------------------------------
# Command line


def parse_arguments() -> argparse.Namespace:
    parser = needle.make_parser(__doc__)
    add = parser.add_argument
    add("method", choices=["dpe", "lampe"], help="the method to calibrate")
    add("--len", type=needle.positives, default=[65536], metavar="N", dest="lengths",
        help="length of the input, in tokens; lampe also uses a half, a quarter, ... of it, or "
             "takes a list N,N,N,... (default: 65536)")
    add("--mapping-lens", type=needle.positives, metavar="N,N,N,...",
        help="mapping lengths for lampe to try (default: 9 from a sixteenth of the training "
             "length to all of it)")
    add("--out", metavar="FILE", help="default: extrapolation.json in the checkpoint directory")
    needle.add_trial_options(parser, needles=32)
    args = parser.parse_args()

    settings = {"dpe": ("window", "topk"), "lampe": ("s1", "s2")}[args.method]
    for name in args.by_hand:
        if name not in settings:
            raise ValueError(f"--set {name} cannot be used here; {args.method} is calibrated for "
                             f"given {' and '.join(settings)}")
    if args.method == "dpe" and (len(args.lengths) > 1 or args.mapping_lens):
        raise ValueError("dpe is calibrated at one --len, and without --mapping-lens")
    args.lengths = sorted(set(args.lengths))
    if args.mapping_lens:
        args.mapping_lens = sorted(set(args.mapping_lens))
        if len(args.mapping_lens) < 3:
            raise ValueError("--mapping-lens needs 3 different lengths or more")
    asks = args.method == "dpe" or args.haystack is None
    if asks and args.trials * args.needles < 2:
        raise ValueError("one question has no standard error; give --needles or --trials of at "
                         "least 2")
    if args.out is None and not Path(args.ckpt).is_dir():
        raise ValueError(f"{args.ckpt} is not a directory to write extrapolation.json to; give "
                         f"--out")
    args.out = Path(args.out or Path(args.ckpt) / "extrapolation.json")
    check_processes(args)
    return args


def read_sections(file: Path) -> dict:
    """An extrapolation.json, or {} if there is none."""
    if not file.exists():
        return {}
    record = read_json(file)
    if not all(isinstance(section, dict) for section in record.values()):
        raise ValueError(f"{file} is damaged; remove it, or give another --out")
    return record


def write_sections(file: Path, record: dict) -> None:
    """Write an extrapolation.json with a line for each entry of its sections."""
    sections = []
    for name, section in record.items():
        lines = [f'  "{key}": {json.dumps(value)}' for key, value in section.items()]
        sections.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
    needle.write_whole(file, "{\n" + ",\n".join(sections) + "\n}\n")


def main() -> None:
    args = parse_arguments()
    # A damaged or unwritable output file is rejected now, not in an hour.
    needle.check_output("--out", args.out)
    read_sections(args.out)

    text = None
    if args.haystack is not None:
        text = needle.read_haystack(args.haystack)
    model, tokenizer, _, _ = needle.load(args)
    float32_logits(model)
    longest = max(args.lengths)
    settings = needle.choose_settings(args.method, model.config, longest, {},
                                      args.by_hand).settings

    calibrate = {"dpe": calibrate_dpe, "lampe": calibrate_lampe}[args.method]
    section = calibrate(args, model, tokenizer, text, settings)
    made_with = dict(length=longest, needles=args.needles, trials=args.trials, seed=args.seed,
                     haystack=args.haystack)
    record = read_sections(args.out)  # again: the other section may have changed since
    record[args.method] = section
    record["made_with"] = record.get("made_with", {}) | {args.method: made_with}
    if needle.RANK == 0:
        write_sections(args.out, record)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    needle.run_command(main)
