"""The README's figures, from the JSON files that needle.py and the scripts here write.

    python needle.py --method rope,dpe,lampe --len 4096,16384,65536 --trials 4 --json results.json
    python -m extras.figures --results results.json --out figures
    python -m extras.figures --contributions DIR --haystack FILE

Writes heat_maps.png (scores by depth and length, from --results), losses.png (losses by length,
from --losses), detection.png and mapping_lengths.png (DPE's effective lengths and LaMPE's fit,
from --extrapolation), contributions.png (DPE's step (b), measured on the model --contributions) and
positions.png (matrices of relative positions). Needs matplotlib and pandas.
"""
import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import torch

from extras.table import read_results
from load_llama import load_model, read_json
from model import measure_contributions
from needle import draw_texts, errors_in_one_sentence, load
from rope_extrap import (
    dpe,
    key_dimensions,
    lampe,
    mapping_length,
    relative_positions,
    rope,
    self_extend,
)

SMOLLM2 = Path(__file__).resolve().parent / "smollm2.json"
MARKERS = "osD^v<>*"  # so that lines can be told apart without colors


def subplots(*shape, figsize: tuple[float, float], **options):
    """A figure, which needs no display, and its axes."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure
    rcParams.update({"font.size": 11, "savefig.dpi": 110, "savefig.bbox": "tight"})
    figure = Figure(figsize, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def in_k(length: int) -> str:
    """4096 -> 4K."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


# -------------------------------------------------------------------------------------------------
# Scores by depth and length, and losses by length


def heat_maps(rows, file: Path) -> None:
    """Mean scores by depth and length, one map for each method. rows are read_results's."""
    methods = rows["method"].unique()
    scores = rows.pivot_table("score", ["method", "position"], "length")  # sorted
    lengths = scores.columns
    depths = scores.index.unique("position")
    columns = min(len(methods), 4)
    n_rows = math.ceil(len(methods) / columns)
    figsize = (1.6 + max(0.75 * len(lengths), 2) * columns, (1.5 + 0.4 * len(depths)) * n_rows)
    figure, axes = subplots(n_rows, columns, figsize=figsize, sharey=True, squeeze=False)
    for axis in axes.flat[len(methods):]:
        axis.set_visible(False)
    for axis, method in zip(axes.flat, methods, strict=False):
        shown = scores.loc[method].reindex(depths).to_numpy()
        cells = axis.pcolormesh(shown, cmap="cividis", vmin=0, vmax=1, edgecolors="white")
        for (y, x), score in np.ndenumerate(shown):
            if not math.isnan(score):
                color = "white" if score < 0.6 else "black"
                axis.text(x + 0.5, y + 0.5, f"{score:.2f}", ha="center", va="center", color=color)
        axis.set(title=method, xlabel="length, tokens", xticks=np.arange(len(lengths)) + 0.5,
                 xticklabels=[in_k(length) for length in lengths])
    axes[0][0].set_yticks([y + 0.5 for y in range(len(depths))], [f"{d:.2f}" for d in depths])
    axes[0][0].invert_yaxis()  # depth 0 at the top; the maps share this axis
    for axis in axes[:, 0]:
        axis.set_ylabel("depth of the needle")
    figure.colorbar(cells, ax=axes, fraction=0.03, label="needles found")
    figure.savefig(file)


def losses(rows, file: Path) -> None:
    """The mean loss by length, one line per method. rows are read_results's.

    The right panel shows the loss above the lowest of each length, up to 0.15 nats, so that methods
    that fail drop out of view.
    """
    figure, (left, right) = subplots(1, 2, figsize=(10, 4))
    means = -rows.pivot_table("value", "length", "method", sort=False).sort_index()
    above_lowest = means.sub(means.min(axis=1), axis=0)
    for method, marker in zip(means, itertools.cycle(MARKERS), strict=False):
        left.plot(means[method].dropna(), marker=marker, label=method)
        right.plot(above_lowest[method].dropna(), marker=marker)
    left.set(ylabel="loss, nats per token")
    right.set(ylabel="loss above the lowest of this length", ylim=(-0.005, 0.15))
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="length, tokens", xticks=means.index,
                 xticklabels=[in_k(length) for length in means.index])
        axis.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=7)
    figure.savefig(file)


# -------------------------------------------------------------------------------------------------
# DPE's effective lengths and key dimensions, and LaMPE's mapping lengths


def detection(settings: dict, measured: dict, file: Path) -> None:
    """DPE, step (a): how much worse the answers are at each effective length of each group.

    The arguments are DPE's part of extrapolation.json. Each cell is the difference of the
    log-likelihood of an answer from the best of its row, with two standard errors. Dashed frames
    mark each group's effective length with the others at the background scale, solid frames the
    effective lengths that work together.
    """
    from matplotlib.colors import SymLogNorm
    from matplotlib.patches import Rectangle
    tried = [math.ceil(measured["length"] / scale) for scale in measured["candidates"]]
    scores = np.array(measured["scores"])  # (groups, candidates, 2), mean and error
    below_best = scores[..., 0] - scores[..., 0].max(axis=1, keepdims=True)
    figure, axis = subplots(figsize=(1.15 * len(tried) + 3, 0.5 * len(scores) + 1.5))
    cells = axis.pcolormesh(below_best, cmap="cividis", edgecolors="white",
                            norm=SymLogNorm(linthresh=0.5, vmax=0))
    for (group, x), difference in np.ndenumerate(below_best):
        color = "white" if difference < -1 else "black"
        axis.text(x + 0.5, group + 0.5, f"{difference:.2f}\n\u00b1{scores[group, x, 1]:.2f}",
                  color=color, ha="center", va="center", fontsize=8)
    for effective_lengths, inset, style in ((measured["alone"], 0.1, "dashed"),
                                            (settings["effective_lengths"], 0.03, "solid")):
        for group, effective_length in enumerate(effective_lengths):
            corner = (tried.index(effective_length) + inset, group + inset)
            axis.add_patch(Rectangle(corner, 1 - 2 * inset, 1 - 2 * inset, fill=False,
                                     edgecolor="red", linewidth=2, linestyle=style))
    axis.invert_yaxis()  # the fastest group at the top
    axis.set(xlabel=f"effective length = {measured['length']:,} / scale, tokens",
             ylabel="group, 0 the fastest", title="frames: dashed alone, solid together",
             xticks=np.arange(len(tried)) + 0.5, xticklabels=[f"{length:,}" for length in tried],
             yticks=np.arange(len(scores)) + 0.5, yticklabels=range(len(scores)))
    figure.colorbar(cells, ax=axis, label="log-likelihood below the best, nats")
    figure.savefig(file)


def mapping_lengths(settings: dict, measured: dict, file: Path) -> None:
    """LaMPE's fit: the loss by mapping length, and the sigmoid through the best mapping lengths.

    Bars are two standard errors. On the left, dotted lines mark the best mapping lengths. The
    arguments are LaMPE's part of extrapolation.json.
    """
    from matplotlib import colormaps
    figure, (left, right) = subplots(1, 2, figsize=(10, 4))
    lengths = sorted(int(length) for length in measured["curves"])
    for n, length in enumerate(lengths):
        color = colormaps["viridis"](n / len(lengths))
        curve = measured["curves"][str(length)]
        tried = [int(mapping_len) for mapping_len in curve]
        means, errors = np.array(list(curve.values())).T
        left.errorbar(tried, means - means.min(), errors, color=color, marker=MARKERS[n % 8],
                      markersize=5, capsize=3, label=f"{length:,} tokens")
        best, error = measured["best_mapping_lens"][str(length)]
        left.axvline(best, color=color, linestyle="dotted")
        right.errorbar(length, best, 2 * error, color=color, marker="o", markersize=7, capsize=4)
    left.set_xscale("log", base=2)
    left.minorticks_off()
    left.set(xlabel="mapping length, tokens", ylabel="loss above the lowest, nats per token",
             xticks=tried[::2], xticklabels=[f"{mapping_len:,}" for mapping_len in tried[::2]])
    figure.legend(fontsize=9, loc="outside lower center", ncols=6)

    x = [lengths[-1] * n / 200 for n in range(201)]
    y = [mapping_length(length, **settings["sigmoid"]) for length in x]
    right.plot(x, y, color="black", linewidth=1)
    ticks = [length for length in lengths if length >= lengths[-1] / 8]  # leaves room for labels
    right.set(xlabel="input length, tokens", ylabel="best mapping length, tokens",
              ylim=(0, None), title="the fitted sigmoid", xticks=ticks,
              xticklabels=[in_k(length) for length in ticks])
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(file)


def contributions(of_layers: torch.Tensor, file: Path) -> None:
    """DPE, step (b): each frequency's share of its head's contributions, and the key dimensions.

    of_layers (layers, heads, D/2) is what measure_contributions returns. As in the authors'
    settings, three quarters of the frequencies are key dimensions.
    """
    n_layers, n_heads, n_frequencies = of_layers.shape
    topk = n_frequencies * 3 // 4
    all_heads = of_layers.flatten(0, 1)  # (layers * heads, D/2)
    shares = all_heads / all_heads.sum(dim=1, keepdim=True)
    figure, (left, right) = subplots(1, 2, figsize=(10, 6), sharey=True)
    image = left.imshow(shares.numpy(), aspect="auto", interpolation="nearest", norm="log")
    figure.colorbar(image, ax=left, label="share of the head's contributions")
    right.imshow(key_dimensions(all_heads, topk).numpy(), aspect="auto", interpolation="nearest",
                 cmap="gray_r")
    layers = range(0, n_layers, max(n_layers // 6, 1))
    left.set(title="contribution", ylabel="layer (one row for each head)",
             yticks=[layer * n_heads for layer in layers], yticklabels=layers)
    right.set(title=f"key dimensions, the {topk} largest (black)")
    for axis in (left, right):
        axis.set_xlabel("frequency, 0 the fastest")
    figure.savefig(file)


# -------------------------------------------------------------------------------------------------
# Relative positions


def positions(file: Path) -> None:
    """Matrices of relative positions of 320 tokens, for a model trained on 64."""
    from matplotlib.colors import PowerNorm
    T = 320
    shown = {
        "RoPE": rope(),
        "SelfExtend\nwindow 32, group size 8": self_extend(32, 8),
        "DPE, fast group\nwindow 32, scale 2": dpe(32, 2),
        "DPE, slow group\nwindow 32, scale 16": dpe(32, 16),
        "LaMPE, mapping length 48\ns1 = 24, s2 = 48": lampe(T, 48, 24, 48),
    }
    figure, axes = subplots(1, len(shown), figsize=(12, 3.2), sharey=True)
    above_diagonal = torch.ones(T, T, dtype=torch.bool).triu(1)
    for axis, (name, method) in zip(axes, shown.items(), strict=True):
        rel = relative_positions(method, T)
        shown_rel = rel.double().masked_fill(above_diagonal, math.nan).numpy()
        image = axis.imshow(shown_rel, cmap="viridis", norm=PowerNorm(0.5, vmin=0, vmax=T))
        axis.contour(rel.numpy(), levels=[32, 64, 128, 256], colors="white", linewidths=0.7)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("key j, tokens")
    axes[0].set_ylabel("query i, tokens")
    figure.colorbar(image, ax=axes, fraction=0.02, ticks=[0, 32, 64, 128, 256],
                    label="relative position; lines at these")
    figure.savefig(file)


# -------------------------------------------------------------------------------------------------
# Command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", nargs="+", metavar="FILE",
        help="results of needle.py --json, or LABEL=FILE (default: no heat maps)")
    add("--losses", nargs="+", metavar="FILE",
        help="results of extras.loss --json, or LABEL=FILE (default: no losses)")
    add("--extrapolation", type=Path, default=SMOLLM2, metavar="FILE",
        help="settings that calibrate.py wrote (default: SmolLM2's)")
    add("--contributions", metavar="DIR", dest="ckpt",
        help="checkpoint directory (default: no contributions)")
    add("--haystack", metavar="FILE",
        help="UTF-8 text to measure contributions on (default: generated sentences)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of the model")
    add("--out", type=Path, default=Path("figures"), metavar="DIR", help="default: figures")
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu", train_len=None)
    args = parser.parse_args()
    with errors_in_one_sentence(parser):
        draw_all(args)


def draw_all(args: argparse.Namespace) -> None:
    """Draw what the options ask for."""
    args.out.mkdir(parents=True, exist_ok=True)
    if args.results:
        heat_maps(read_results(args.results, ["log_likelihood"]), args.out / "heat_maps.png")
    if args.losses:
        losses(read_results(args.losses, ["block_losses"]), args.out / "losses.png")
    try:
        for name, section in read_json(args.extrapolation).items():
            draw = {"dpe": detection, "lampe": mapping_lengths}[name]
            draw(**section, file=args.out / f"{draw.__name__}.png")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{args.extrapolation} does not hold what extras.calibrate "
                         f"measures") from None
    if args.ckpt:
        model, tokenizer, text = load(args, load_model)
        texts = draw_texts(tokenizer, text, model.config.train_len, seed=0)
        contributions(measure_contributions(model, texts), args.out / "contributions.png")
    positions(args.out / "positions.png")


if __name__ == "__main__":
    main()
