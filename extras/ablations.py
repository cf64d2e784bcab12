"""Ablations: what the parts of DPE and LaMPE do, and what the released code's departures change.

    python -m extras.ablations --ckpt DIR --haystack FILE --method dpe --len 16384 --trials 2
    python -m extras.ablations --ckpt DIR --haystack FILE --method lampe --len 16384 --trials 2

A method, with the settings that needle.py would use, and its variants read the same stretches of
a text. The table shows the loss, and its paired difference from the method itself. The options
are those of extras.loss.
"""
import argparse
import math
from dataclasses import replace

import needle
from extras.loss import make_parser, run
from load_llama import load_model
from model import Config
from rope_extrap import LAMPE_LOGIT_SCALE, Band, Method, dpe, identity, lampe

# -------------------------------------------------------------------------------------------------
# DPE


def dpe_variants(n_frequencies: int, window: int, scales: str) -> dict[str, Method]:
    """Does it matter which group has which scale, or that scales differ at all?"""
    of_groups = needle.scales_of_groups(scales)
    mean_log = sum(math.log(scale) for scale in of_groups) / len(of_groups)
    s = needle.scale_of_each_frequency(of_groups, n_frequencies)
    return {
        "scales reversed among groups": dpe(window, s[::-1]),
        "geometric mean of all scales": dpe(window, round(math.exp(mean_log))),
    }


# -------------------------------------------------------------------------------------------------
# LaMPE


def lampe_variants(length: int, mapping_len_32k: int, mapping_len: int, s1: int,
                   s2: int) -> dict[str, Method]:
    """LaMPE without its parts, and with each departure of the released code from the formulas.

    mapping_len_32k is the mapping length of 32,768 tokens. If it differs from mapping_len, one
    variant has it at all lengths.
    """
    variants = {"no tail": lampe(length, mapping_len, s1, 0)}
    if mapping_len_32k != mapping_len:
        variants["mapping length of 32,768 tokens"] = lampe(length, mapping_len_32k, s1, s2)
    departures = {
        "released: keys at s1 and l - s2 twice": ["twice"],
        "released: middle one position lower": ["lower"],
        "released: slope mapping_len / (l - 1)": ["steeper"],
        "released: tail": ["tail"],
        "released: all four": ["twice", "lower", "steeper", "tail"],
    }
    for name, which in departures.items():
        variants[name] = lampe_released(length, mapping_len, s1, s2, which)
    return variants


def lampe_released(length: int, mapping_len: int, s1: int, s2: int,
                   departures: list[str]) -> Method:
    """LaMPE with departures of the released code. Without any, it is rope_extrap.lampe.

    twice: the middle includes the distances s1 and l - s2, which are also near and far.
    lower: the middle begins one position too low.
    steeper: p(x) = x * mapping_len // (l - 1).
    tail: s2 is extended to the end of the plateau of p in which it falls, and the far region
    continues from the position of the middle at distance l - 1 - s2.
    Raises ValueError if s2, so extended, leaves no distances for the middle.
    """
    l = length
    formula = lampe(l, mapping_len, s1, s2)
    if len(formula.bands) == 1:  # nothing is compressed
        return formula
    denominator = l - 1 if "steeper" in departures else l

    def p(x):
        return x * mapping_len // denominator

    offset = s1 - p(s1)
    if "lower" in departures:
        offset -= 1
    span = s1 + s2 + (l - s1 - s2) * mapping_len // denominator
    if "tail" in departures:
        while s2 < l and p(s2 + 1) == p(s2):
            s2 += 1
        span = s2 + 1 + p(l - 1 - s2) + offset
    if s1 + s2 + 1 >= l:
        raise ValueError(f"the released tail of {s2} tokens leaves no middle in {l} tokens; give "
                         f"a longer --len")
    overlap = 1 if "twice" in departures else 0
    return Method([Band(0, s1 + 1, identity, identity),
                   Band(s1 + 1 - overlap, l - s2 + overlap, lambda i: p(i) + offset, p),
                   Band(l - s2, None, lambda i: i - (l - span), identity)], LAMPE_LOGIT_SCALE)


# -------------------------------------------------------------------------------------------------
# Command line


def add_variants(args: argparse.Namespace, config: Config, chosen: dict) -> None:
    """Add the variants of --method to chosen, {length: {name: (settings, source, Method)}}."""
    n = config.head_dim // 2
    at_32k = argparse.Namespace(**vars(args) | dict(lengths=[32768]))
    settings_32k, _, _ = needle.choose_all(at_32k, config)[32768][args.method]
    for length, of_length in chosen.items():
        settings, source, original = of_length[args.method]
        own = {key: value for key, value in settings.items() if key not in ("topk", "logit_scale")}
        if args.method == "dpe":
            variants = dpe_variants(n, **own)
            topks = [n * 3 // 4, n // 2, n // 4]
            other = ("logits scaled as by LaMPE", LAMPE_LOGIT_SCALE)
        else:
            variants = lampe_variants(length, settings_32k["mapping_len"], **own)
            topks = []
            other = ("logits not scaled", 1.0)
        for name, method in variants.items():
            of_length[name] = (settings, source, replace(method, logit_scale=original.logit_scale))
        name, logit_scale = other
        of_length[name] = (settings, source, replace(original, logit_scale=logit_scale))
        for topk in topks:
            of_length[f"{topk} of {n} frequencies are key"] = (settings | dict(topk=topk), source,
                                                              original)


def main(load_model=load_model) -> None:
    parser = make_parser(__doc__, method="dpe")
    args = parser.parse_args()
    with needle.errors_in_one_sentence(parser):
        if args.method not in ("dpe", "lampe"):
            raise ValueError("--method must be dpe or lampe")
        run(args, load_model, add_variants)


if __name__ == "__main__":
    main()
