"""Run the papers' procedures on a model: DPE's effective lengths, or LaMPE's mapping-length fit.

    python -m extras.calibrate dpe --len 65536
    python -m extras.calibrate lampe --len 131072 --trials 5
    python -m extras.calibrate lampe --len 8192,16384,32768 --mapping-lens 1024,2048,3072,4096 \\
        --haystack FILE

Each writes its section of extrapolation.json in the checkpoint directory, where needle.py looks for
it, and keeps the other section.
"""
import argparse
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import needle
from extras.common import block_losses, draw_stretches, last_change, standard_error
from load_llama import load_model, read_json
from model import Llama
from rope_extrap import Method

# -------------------------------------------------------------------------------------------------
# Measuring


def draw_prompts(args: argparse.Namespace, tokenizer, length: int, needles: int,
                 text: str | None) -> list[tuple[list[int], list]]:
    """The prompt of each trial, with its questions and right answers.

    The needles are evenly spaced, and the first is at the start of the prompt.
    """
    haystack = text and needle.make_haystack(tokenizer, text)
    prompts = []
    for n in range(args.trials):
        seed = f"{args.seed} {length} calibration {n}"
        _, prompt, questions = needle.draw_trial(tokenizer, haystack, length, needles, 0.0, seed)
        prompts.append((prompt, questions))
    return prompts


def ask(model: Llama, methods: list[Method], prompts: list[tuple[list[int], list]]) -> Tensor:
    """Ask every question by itself, right after its prompt.

    Returns the log-likelihoods of the right answers, in nats: float64 (n,).
    """
    log_likelihoods = []
    for prompt, questions in prompts:
        room = max(len(question) + len(answer) for question, answer in questions)
        cache = needle.prefill(model, methods, prompt, room)
        for question, answer in questions:
            log_likelihoods.append(needle.score_answer(model, methods, cache, question, answer))
    return torch.tensor(log_likelihoods, dtype=torch.float64)


def not_worse(scores: Tensor, best: Tensor, errors: float = 2, at_most: float = 0.5) -> bool:
    """True unless scores (n,) are significantly lower than best (n,), paired over n.

    The mean of the paired differences must be at most so many standard errors, and at most so many
    nats: a lost needle raises the standard error as much as the mean. Up to 0.01 nats are
    negligible.
    """
    difference = best - scores
    noise = min(errors * standard_error(difference), at_most)
    return bool(difference.mean() <= max(noise, 0.01))


def never_worse(scores: Tensor, best: Tensor) -> bool:
    """Whether scores (depths, n) are significantly lower than best (depths, n) at no depth."""
    return all(map(not_worse, scores, best))


def with_errors(rows: list[Tensor] | Tensor, best: Tensor) -> list[list[float]]:
    """Each row's mean, and two standard errors of its difference from the best.

    The rows and best (n,) are paired. Returns [[mean, error], ...].
    """
    pairs = []
    for row in rows:
        error = 2 * standard_error(row - best)
        pairs.append([round(row.mean().item(), 6), round(error, 6)])
    return pairs


def none_is_worse(rows: list[Tensor] | Tensor) -> bool:
    """Whether no row of scores (n,) is lower than the best one by four standard errors.

    Two are often exceeded by chance, since the best of many rows is compared with the worst.
    """
    best = max(rows, key=Tensor.mean)
    return all(not_worse(scores, best, errors=4, at_most=math.inf) for scores in rows)


# -------------------------------------------------------------------------------------------------
# DPE, step (a)

DEPTHS = 4  # quarters of a prompt: a scale must work in each


def scales_to_try(length: int, train_len: int) -> tuple[list[int], int]:
    """The candidates for a group's scale, and the scale of all other groups, the background.

    The candidates are powers of two, down to an effective length of 1,024 tokens, or of an eighth
    of the training length if that is less. The background is the largest power of two up to
    2 * length / train_len. Both have at least the scale 1.
    """
    shortest = min(1024, max(train_len // 8, 1))
    largest = max(length // shortest, 1)
    candidates = [2 ** n for n in range(largest.bit_length())]
    background = 2 ** (max(2 * length // train_len, 1).bit_length() - 1)
    return candidates, background


def pick(row: list[Tensor]) -> int:
    """Choose the scale of a group: the index of a candidate that works at every depth.

    row has the scores (depths, n) of each candidate. A candidate is usable if, at every depth, it
    is not significantly worse than the best one at that depth. Starting from the usable candidate
    with the best mean, the choice moves to the next smaller one as long as that is usable too. If
    no candidate is usable, the choice is the one that loses least at its worst depth.
    """
    means = torch.stack(row).mean(dim=2)  # (candidates, depths)
    best_at_depth = torch.stack([row[candidate][depth]
                                 for depth, candidate in enumerate(means.argmax(dim=0))])
    usable = [n for n, scores in enumerate(row) if never_worse(scores, best_at_depth)]
    if not usable:
        worst = (means - means.max(dim=0).values).min(dim=1).values
        usable = [worst.argmax().item()]
    choice = max(usable, key=lambda n: means[n].mean())
    while choice - 1 in usable:
        choice -= 1
    return choice


def detect(score: Callable[[list[int]], Tensor], n_groups: int, candidates: list[int],
           background: int) -> tuple[list[int], list[int], list[list[Tensor]]]:
    """DPE, step (a): try each scale for each group of frequencies, then all groups together.

    score(scales) takes one scale per group, fastest group first, and returns the log-likelihoods
    (depths, n) of the answers to the same questions about needles at several depths. candidates are
    the scales to try, in increasing order.

    Each group is tried while all others are at the background. The paper then takes the scale with
    the best mean score. Such a scale may still lose every needle at the start of the prompt, so
    here the group gets the scale that pick() finds usable at every depth.

    Scales found in this way may fail when they are used together, which the paper does not try.
    Here all of them move toward the background, by a factor of 2 at a time, until the answers are
    at no depth significantly worse than with all groups at the background.

    Returns the scale of each group, found with all others at the background, then its scale for
    use with the others, and the scores as table[group][candidate].
    """
    alone = []
    table = []
    for group in range(n_groups):
        row = []
        for scale in candidates:
            scales = [background] * n_groups
            scales[group] = scale
            row.append(score(scales))
        table.append(row)
        alone.append(candidates[pick(row)])

    at_background = score([background] * n_groups)
    together = alone
    while not never_worse(score(together), at_background):
        together = [min(2 * scale, background) if scale < background
                    else max(scale // 2, background) for scale in together]
    return alone, together, table


def calibrate_dpe(args: argparse.Namespace, model: Llama, tokenizer,
                  text: str | None) -> tuple[dict, dict]:
    """DPE, step (a), for 8 groups of frequencies. Returns settings, and what was measured.

    Raises ValueError if no answer is likely at any setting, or if no scale matters.
    """
    config = model.config
    length = args.lengths[0]
    n_groups = min(8, config.head_dim // 2)
    candidates, background = scales_to_try(length, config.train_len)
    prompts = draw_prompts(args, tokenizer, length, args.needles, text)

    # Key dimensions do not depend on the scales.
    chosen = needle.choose("dpe", config, length, {}, dict(args.set))
    settings, _, _ = chosen
    layers = needle.methods_of_layers({length: {"dpe": chosen}}, model, tokenizer, text, args.seed)
    key_dims = [method.key_dims for method in layers[length]["dpe"]]

    measured = {}

    def score(scales):
        name = "-".join(str(scale) for scale in scales)
        if name not in measured:  # the background is among the candidates of every group
            method = needle.make_method("dpe", config, length, **settings | dict(scales=name))
            methods = [replace(method, key_dims=is_key) for is_key in key_dims]
            scores = ask(model, methods, prompts)
            # All prompts have their needles at the same depths.
            measured[name] = scores.view(args.trials, DEPTHS, -1).transpose(0, 1).flatten(1)
            print(f"scales {name:24}  found {(scores > math.log(0.5)).double().mean():.2f}  "
                  f"log-likelihood {scores.mean():9.4f}  measurement {len(measured)} of about "
                  f"{n_groups * (len(candidates) - 1) + 2}", flush=True)
        return measured[name]

    alone, together, table = detect(score, n_groups, candidates, background)
    if max(scores.mean() for scores in measured.values()) <= math.log(1e-5):
        raise ValueError("at all settings the right answers are less likely than a random number, "
                         "so effective lengths cannot be told apart; try a shorter --len")
    rows = [[scores.flatten() for scores in row] for row in table]
    if all(none_is_worse(row) for row in rows):
        raise ValueError("no scale of any group is significantly worse than its best, so effective "
                         "lengths cannot be told apart; try a longer --len or more questions")
    best = [torch.stack(row).mean(dim=1).argmax().item() for row in rows]  # the paper's choice
    del settings["scales"]
    periods = (2 * math.pi / config.frequencies()).tolist()  # in tokens
    slowest = [periods[(n + 1) * len(periods) // n_groups - 1] for n in range(n_groups)]
    settings.update(effective_lengths=[math.ceil(length / scale) for scale in together],
                    topk=settings.get("topk") or config.head_dim // 2)
    return settings, dict(alone=[math.ceil(length / scale) for scale in alone],
                          best_mean=[math.ceil(length / candidates[n]) for n in best],
                          wavelengths=list(map(round, slowest)),
                          candidates=candidates, background=background,
                          scores=[with_errors(row, row[n])
                                  for row, n in zip(rows, best, strict=True)],
                          scores_by_depth=[torch.stack(row).mean(dim=2).round(decimals=3).tolist()
                                           for row in table])


# -------------------------------------------------------------------------------------------------
# LaMPE's fit


def draw_samples(args: argparse.Namespace, model: Llama, tokenizer, text: str | None,
                 length: int) -> Callable[[list[Method]], Tensor]:
    """Draw texts of one length, and return a function from methods to losses on these texts.

    With --haystack, the losses are those of the last 2,048 tokens (or half the length, if that is
    less). With generated sentences, they are those of the answers to questions about needles,
    since nothing else there depends on distant tokens. They are in nats per token, (n,).
    """
    if text is None:
        needles = min(args.needles, max(length // 128, 2))
        prompts = draw_prompts(args, tokenizer, length, needles, None)
        n_tokens = [len(answer) for _, questions in prompts for _, answer in questions]
        return lambda methods: -ask(model, methods, prompts) / torch.tensor(n_tokens)

    tokens = tokenizer.encode(text)
    last = min(length // 2, 2048)
    stretches = draw_stretches(tokenizer, tokens, length, args.trials, last)
    return lambda methods: torch.cat([block_losses(model, methods, stretch, last)
                                      for stretch in stretches.values()])


def measure_lampe(args: argparse.Namespace, model: Llama, tokenizer, text: str | None,
                  lengths: list[int], mapping_lens: list[int],
                  settings: dict) -> dict[int, Tensor]:
    """Losses in nats per token, paired over n: {length: (mapping_lens, n)}."""
    samples = {length: draw_samples(args, model, tokenizer, text, length) for length in lengths}
    losses = {}
    for length, losses_of in samples.items():
        rows = []
        for mapping_len in mapping_lens:
            method = needle.make_method("lampe", model.config, length,
                                        **settings | dict(mapping_len=mapping_len))
            rows.append(losses_of([method] * model.config.n_layers))
            print(f"length {length:6}  mapping length {mapping_len:6}  loss {rows[-1].mean():.5f}",
                  flush=True)
        losses[length] = torch.stack(rows)
    return losses


def vertex(losses: np.ndarray, x: np.ndarray) -> float:
    """The x at which a parabola through the lowest loss and its two neighbors has its minimum.

    losses (n,) are at x (n,). The result is clamped to lie between the two neighbors.
    """
    n = min(max(losses.argmin(), 1), len(x) - 2)
    three = slice(n - 1, n + 2)
    curvature, slope, _ = np.polyfit(x[three] - x[n], losses[three], 2)
    # If the parabola is not convex, the minimum is at an end.
    lowest = x[n] - slope / max(2 * curvature, 1e-12)
    return float(min(max(lowest, x[n - 1]), x[n + 1]))


def find_bottom(losses: Tensor, mapping_lens: list[int],
                generator: torch.Generator) -> tuple[float, float]:
    """The mapping length of the lowest loss, and its standard error.

    losses (mapping_lens, n) are paired over n. The vertex is that of a parabola in log2 of the
    mapping length. The standard error comes from 500 bootstrap resamples of the n values. It is at
    least 0.05 in log2, which is 3.5%, so that no point outweighs all others in the fit.
    """
    x = np.log2(mapping_lens)
    n = losses.shape[1]
    draws = torch.randint(n, (500, n), generator=generator)
    resampled = losses[:, draws].mean(dim=2).T.numpy()  # (500, mapping_lens)
    error_of_log2 = float(np.std([vertex(means, x) for means in resampled], ddof=1))
    mapping_len = 2 ** vertex(losses.mean(dim=1).numpy(), x)
    return mapping_len, mapping_len * math.log(2) * max(error_of_log2, 0.05)


def fit(lengths: list[int], mapping_lens: list[float],
        errors: list[float], largest: float) -> tuple[float, float, float]:
    """LaMPE's sigmoid L / (1 + exp(-(a l + b))) through the best mapping lengths.

    lengths are input lengths l, at least 3 of them; mapping_lens and errors are the best mapping
    length of each and its standard error. The fit minimizes the sum of squared residuals, each
    divided by its error. L is at most `largest`, the largest mapping length that was tried: beyond
    the lengths, the sigmoid would otherwise rise without limit. Returns (a, b, L).
    Raises ValueError if the mapping lengths do not grow with the lengths.
    """
    from scipy.optimize import curve_fit
    from scipy.special import expit

    def curve(x, slope, b, log_limit):
        return np.exp(log_limit) * expit(slope * x + b)

    # In units of the longest length and the largest mapping length, the fit starts from a sigmoid
    # that rises over these lengths.
    x = np.array(lengths) / max(lengths)
    y = np.array(mapping_lens) / max(mapping_lens)
    sigma = np.array(errors) / min(errors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # curve_fit may warn about its covariance, unused here
        bounds = (-np.inf, (np.inf, np.inf, math.log(largest / max(mapping_lens)) + 1e-9))
        (slope, b, log_limit), _ = curve_fit(curve, x, y, p0=(8.0, -2.0, 0.0), sigma=sigma,
                                             absolute_sigma=True, bounds=bounds, maxfev=10_000)
    covariance = ((x - x.mean()) * y).sum()  # positive if mapping lengths grow
    if covariance <= 0 or slope <= 0:
        points = [(l, round(best)) for l, best in zip(lengths, mapping_lens, strict=True)]
        raise ValueError(f"a sigmoid needs mapping lengths that grow with the input, and those of "
                         f"the lowest losses are {points}")
    return float(slope / max(lengths)), float(b), float(np.exp(log_limit) * max(mapping_lens))


def fit_losses(losses: dict[int, Tensor], mapping_lens: list[int],
               seed: int) -> tuple[dict, dict]:
    """Fit the sigmoid to the bottoms of all curves. Returns its arguments, and what was measured.

    losses: {length: (mapping_lens, n)}, in increasing order. Raises ValueError if no mapping length
    is significantly worse than the best at any length, or if no sigmoid can be fitted.
    """
    if all(none_is_worse(-rows) for rows in losses.values()):
        raise ValueError("mapping lengths cannot be told apart at any of these input lengths; try "
                         "a longer --len or more questions")
    generator = torch.Generator().manual_seed(seed)
    bottoms = {}
    curves = {}
    for length, rows in losses.items():
        best, error = find_bottom(rows, mapping_lens, generator)
        print(f"length {length:6}  best mapping length {best:.0f}, standard error {error:.0f}")
        bottoms[length] = (best, error)
        pairs = with_errors(rows, min(rows, key=Tensor.mean))
        curves[length] = dict(zip(mapping_lens, pairs, strict=True))
    a, b, L = fit(list(bottoms), *zip(*bottoms.values(), strict=True), max(mapping_lens))
    # Below the shortest of the lengths, the sigmoid would extrapolate.
    shortest = min(bottoms)
    sigmoid = dict(a=a, b=b, L=L, short_mapping_len=int(bottoms[shortest][0]),
                   short_input=shortest)
    best_mapping_lens = {length: [round(best, 1), round(error, 1)]
                         for length, (best, error) in bottoms.items()}
    return sigmoid, dict(best_mapping_lens=best_mapping_lens, curves=curves)


def calibrate_lampe(args: argparse.Namespace, model: Llama, tokenizer,
                    text: str | None) -> tuple[dict, dict]:
    """LaMPE's fit. Returns settings, and what was measured.

    Raises ValueError if even the lowest loss is more than half that of a uniform guess, or if no
    sigmoid can be fitted.
    """
    import scipy.optimize  # noqa: F401, since a missing package is named now, not in an hour
    config = model.config
    lengths = sorted(args.lengths)
    if len(lengths) == 1:  # also 1/2, 1/4, ... down to the training length, at least 3 in all
        count = max((lengths[0] // config.train_len).bit_length(), 3)
        lengths = [lengths[0] // 2 ** n for n in reversed(range(count))]
    # Each is sqrt(2) times the one before it, up to the training length.
    defaults = {max(round(config.train_len / 2 ** (n / 2)), 1) for n in range(9)}
    mapping_lens = sorted(args.mapping_lens or defaults)
    settings, _, _ = needle.choose("lampe", config, lengths[-1], {}, dict(args.set))
    losses = measure_lampe(args, model, tokenizer, text, lengths, mapping_lens, settings)
    lowest = min(rows.mean(dim=1).min() for rows in losses.values())
    if lowest > math.log(config.vocab_size) / 2:
        raise ValueError("the model predicts almost nothing at any mapping length, so mapping "
                         "lengths cannot be told apart; try a shorter --len")
    sigmoid, measured = fit_losses(losses, mapping_lens, args.seed)
    del settings["mapping_len"]
    return settings | dict(sigmoid=sigmoid), measured


# -------------------------------------------------------------------------------------------------
# Command line


def check(args: argparse.Namespace) -> None:
    """Raises ValueError if a calibration with these options cannot work."""
    settings = {"dpe": ("window", "topk", "logit_scale"), "lampe": ("s1", "s2", "logit_scale")}
    for name, _ in args.set:
        if name not in settings[args.method]:
            raise ValueError(f"--set {name} cannot be used here; for {args.method}, --set "
                             f"takes {', '.join(settings[args.method])}")
    if args.method == "dpe" and (len(args.lengths) > 1 or args.mapping_lens):
        raise ValueError("dpe is calibrated at one --len, and without --mapping-lens")
    if len(args.lengths) == 2 or min(args.lengths) < 32:
        raise ValueError("give one --len, or 3 or more for lampe, of at least 32 tokens each")
    if args.mapping_lens and len(args.mapping_lens) < 3:
        raise ValueError("--mapping-lens needs 3 different lengths or more")
    if min(args.trials, args.needles) < 1:
        raise ValueError("--trials and --needles must be at least 1")
    if args.method == "dpe" and (args.needles % DEPTHS or args.trials * args.needles < 2 * DEPTHS):
        raise ValueError(f"for dpe, --needles must be a multiple of {DEPTHS}, and --needles times "
                         f"--trials at least {2 * DEPTHS}")
    if args.haystack is None and args.trials * args.needles < 2:
        raise ValueError("one question has no standard error; raise --needles or --trials")


def read_sections(file: Path) -> dict:
    """The sections of an extrapolation.json, or {} if there is none.

    Raises CheckpointError, or ValueError if the file is anything else.
    """
    sections = read_json(file) if file.exists() else {}
    for section in sections.values():
        if not isinstance(section, dict) or "settings" not in section:
            raise ValueError(f"{file} is not an extrapolation.json of this version; remove it, or "
                             f"give another --out")
    return sections


def formatted(value, depth: int = 1) -> str:
    """JSON with a line for each setting and each measurement."""
    if not isinstance(value, dict) or depth > 3:
        return json.dumps(value)
    indent = " " * depth
    lines = [f'{indent}"{key}": {formatted(item, depth + 1)}' for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + "\n" + indent[1:] + "}"


def run(args: argparse.Namespace, load_model) -> None:
    """Calibrate the method, and write its section."""
    check(args)
    out = Path(args.out or Path(args.ckpt) / "extrapolation.json")
    last_change(out)  # a file that cannot be written or read is refused now, not in an hour
    read_sections(out)
    model, tokenizer, text = needle.load(args, load_model)
    calibrate = {"dpe": calibrate_dpe, "lampe": calibrate_lampe}[args.method]
    settings, found = calibrate(args, model, tokenizer, text)
    measured = dict(length=max(args.lengths), needles=args.needles, trials=args.trials,
                    seed=args.seed, haystack=args.haystack)
    seen = last_change(out)
    sections = read_sections(out)  # again: the other section may have changed since
    sections[args.method] = dict(settings=settings, measured=measured | found)
    needle.replace_whole(out, formatted(sections) + "\n", seen)
    print(f"\nwrote {out}")


def main(load_model=load_model) -> None:
    parser = needle.make_parser(__doc__)
    add = parser.add_argument
    add("method", choices=["dpe", "lampe"], help="the method to calibrate")
    add("--mapping-lens", type=needle.numbers, metavar="N,N,N,...",
        help="mapping lengths for lampe to try (default: 9 from a sixteenth of the training "
             "length to all of it)")
    add("--trials", type=int, default=1, metavar="N",
        help="prompts or stretches of each length (default: 1)")
    add("--needles", type=int, default=32, metavar="N",
        help="needles in each prompt (default: 32)")
    add("--out", metavar="FILE", help="default: extrapolation.json in the checkpoint directory")
    args = parser.parse_args()
    with needle.errors_in_one_sentence(parser):
        run(args, load_model)


if __name__ == "__main__":
    main()
