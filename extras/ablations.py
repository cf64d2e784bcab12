"""Ablations: what the parts of DPE and LaMPE do, and what the released code's departures change.

    python -m extras.ablations --ckpt DIR --haystack FILE --method dpe --len 16384 --trials 2
    python -m extras.ablations --ckpt DIR --haystack FILE --method lampe --len 16384 --trials 2

A method, with the settings that needle.py would use, and its variants read the same stretches of
a text. The table shows the loss, and its paired difference from the method itself. The options
are those of extras.loss.
"""
import math

import torch

import needle
from extras.loss import parse_arguments, run
from model import Config
from rope_extrap import Band, Method, dpe, identity, lampe, mapping_length

# -------------------------------------------------------------------------------------------------
# DPE


def dpe_variants(n_frequencies: int, settings: dict) -> dict[str, Method]:
    """Does it matter which group has which scale? And does the offset of the released code?"""
    window = settings["window"]
    group_scales = settings["scales"]
    mean_log = sum(math.log(scale) for scale in group_scales) / len(group_scales)
    geometric_mean = round(math.exp(mean_log))
    scales = needle.scale_of_each_frequency(group_scales, n_frequencies)
    return {
        "scales reversed among groups": dpe(window, scales[::-1]),
        "geometric mean of all scales": dpe(window, geometric_mean),
        "released: offset w - w / s": dpe_released(window, scales),
    }


def dpe_released(window: int, scales: list[int]) -> Method:
    """The offset w - w / s of the released prefill, which is not rounded."""
    w = window
    s = torch.tensor(scales, dtype=torch.float64)
    return Method([Band(0, w, identity, identity),
                   Band(w, None, lambda i: i // s + w - w / s, lambda j: j // s)])


# -------------------------------------------------------------------------------------------------
# LaMPE


def lampe_variants(length: int, settings: dict, calibrated: dict) -> dict[str, Method]:
    """LaMPE without its parts, and with each departure of the released code from the formulas."""
    mapping_len = settings["mapping_len"]
    s1 = settings["s1"]
    s2 = settings["s2"]
    logit_scale = settings["logit_scale"]
    variants = {
        "no tail": lampe(length, mapping_len, s1, 0, logit_scale),
        "logits not scaled": lampe(length, mapping_len, s1, s2, logit_scale=1.0),
    }
    if "a" in calibrated:
        # A sigmoid was fitted. Here the mapping length does not depend on the input's length.
        fixed = mapping_length(32768, calibrated["a"], calibrated["b"], calibrated["L"])
        variants["mapping length of 32,768 tokens"] = lampe(length, fixed, s1, s2, logit_scale)
    departures = {
        "released: keys at s1 and l - s2 twice": ["twice"],
        "released: middle one position lower": ["lower"],
        "released: slope mapping_len / (l - 1)": ["steeper"],
        "released: tail": ["tail"],
        "released: all four": ["twice", "lower", "steeper", "tail"],
    }
    for name, which in departures.items():
        variants[name] = lampe_released(length, mapping_len, s1, s2, logit_scale, which)
    return variants


def lampe_released(length: int, mapping_len: int, s1: int, s2: int, logit_scale: float,
                   departures: list[str]) -> Method:
    """LaMPE with departures of the released code. Without any, it is rope_extrap.lampe.

    twice: the middle includes the distances s1 and l - s2, which the head and the tail have too.
    lower: the middle begins one position too low.
    steeper: p(x) = x * mapping_len // (l - 1).
    tail: s2 is extended to the end of the plateau of p in which it falls, and the tail continues
    from the position of the middle at distance l - 1 - s2.
    Raises ValueError if s2, so extended, leaves no distances for the middle.
    """
    l = length
    formula = lampe(l, mapping_len, s1, s2, logit_scale)
    if len(formula.bands) == 1:  # nothing is compressed
        return formula
    denominator = l - 1 if "steeper" in departures else l

    def p(x):
        return x * mapping_len // denominator

    offset = s1 - p(s1)
    if "lower" in departures:
        offset -= 1
    m = s1 + s2 + (l - s1 - s2) * mapping_len // denominator
    if "tail" in departures:
        while s2 < l and p(s2 + 1) == p(s2):
            s2 += 1
        m = s2 + 1 + p(l - 1 - s2) + offset
    if s1 + s2 + 1 >= l:
        raise ValueError(f"the released tail of {s2} tokens leaves no middle in {l} tokens; give "
                         f"a longer --len")
    near = s1 + 1
    far = l - s2
    if "twice" in departures:
        near = s1
        far = l - s2 + 1
    return Method([Band(0, s1 + 1, identity, identity),
                   Band(near, far, lambda i: p(i) + offset, p),
                   Band(l - s2, None, lambda i: i - (l - m), identity)], logit_scale)


# -------------------------------------------------------------------------------------------------
# Command line


def with_variants(args, config: Config, chosen: dict) -> dict:
    """chosen, {(length, name): Chosen}, and after it the variants of its one method."""
    (name,) = args.methods
    calibrated = needle.read_calibration(args.ckpt).get(name, {})
    n_frequencies = config.head_dim // 2
    variants = dict(chosen)
    for length in args.lengths:
        original = chosen[length, name]
        settings = original.settings
        if name == "dpe":
            methods = dpe_variants(n_frequencies, settings)
        else:
            methods = lampe_variants(length, settings, calibrated)
        for variant, method in methods.items():
            variants[length, variant] = original._replace(method=method)
        if name == "dpe":
            for quarters in (3, 2, 1):
                topk = n_frequencies * quarters // 4
                variant = f"{topk} of {n_frequencies} frequencies are key"
                variants[length, variant] = original._replace(settings=settings | dict(topk=topk))
    return variants


def main() -> None:
    args = parse_arguments(__doc__, "dpe")
    if args.methods not in (["dpe"], ["lampe"]):
        raise ValueError("--method must be dpe or lampe")
    run(args, with_variants)


if __name__ == "__main__":
    needle.run_command(main)
