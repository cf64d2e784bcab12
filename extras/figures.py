"""The README's figures, from the JSON files that needle.py and the scripts here write.

    python needle.py --method rope,dpe,lampe --len 4096,16384,65536 --trials 4 --json results.json
    python -m extras.figures --results results.json --out figures
    python -m extras.figures --contributions DIR --haystack FILE

Writes idea.png, idea.gif and clocks.png (what the methods do to Llama 3 8B), heat_maps.png (scores
by depth and length, from --results), losses.png (losses by length, from --losses), detection.png
and mapping_lengths.png (DPE's effective lengths and LaMPE's fit, from --extrapolation), and
contributions.png (DPE's step (b), measured on the model --contributions). Needs matplotlib and
pandas.
"""
import argparse
import itertools
import math
from pathlib import Path

import numpy as np
import torch

from extras.table import read_results
from load_llama import load_model, read_json
from model import Config, measure_contributions
from needle import choose, draw_texts, errors_in_one_sentence, load, scales_of_groups
from rope_extrap import Method, dpe, mapping_length, relative_positions, rope

SMOLLM2 = Path(__file__).resolve().parent / "results" / "calibration.json"
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


def heat_maps(rows, train_len: int, file: Path) -> None:
    """Mean scores by depth and length, one map for each method. rows are read_results's.

    A dashed line marks the training length.
    """
    methods = rows["method"].unique()
    scores = rows.pivot_table("score", ["method", "position"], "length")  # sorted
    lengths = scores.columns
    depths = scores.index.unique("position")
    columns = min(len(methods), 3)
    n_rows = math.ceil(len(methods) / columns)
    figsize = (2 + 0.72 * len(lengths) * columns, (1.3 + 0.33 * len(depths)) * n_rows)
    figure, axes = subplots(n_rows, columns, figsize=figsize, sharex=True, sharey=True,
                            squeeze=False)
    for axis in axes.flat[len(methods):]:
        axis.set_visible(False)
    for axis, method in zip(axes.flat, methods, strict=False):
        shown = scores.loc[method].reindex(depths)
        cells = axis.pcolormesh(shown, cmap="cividis", vmin=0, vmax=1, edgecolors="white")
        for (y, x), score in np.ndenumerate(shown):
            if not math.isnan(score):
                color = "white" if score < 0.6 else "black"
                axis.text(x + 0.5, y + 0.5, f"{score:.2f}", ha="center", va="center", color=color)
        axis.axvline((lengths <= train_len).sum(), color="red", linestyle="dashed", linewidth=2)
        axis.set_title(method)
        axis.set(xticks=np.arange(len(lengths)) + 0.5, xticklabels=map(in_k, lengths))
    axes[0][0].set_yticks([y + 0.5 for y in range(len(depths))], [f"{d:.2f}" for d in depths])
    axes[0][0].invert_yaxis()  # depth 0 at the top; the maps share this axis
    figure.supylabel("depth of the needle: 0 is the start of the text")
    figure.supxlabel("length of the prompt, tokens (dashed: the end of the training length)")
    figure.colorbar(cells, ax=axes, fraction=0.03, label="needles found")
    figure.savefig(file)


def losses(rows, file: Path) -> None:
    """The loss above the lowest of each length, one line per method. rows are read_results's.

    It shows up to 0.15 nats, so that methods that fail drop out of view.
    """
    figure, axis = subplots(figsize=(7, 4))
    means = -rows.pivot_table("value", "length", "method", sort=False).sort_index()
    above_lowest = means.sub(means.min(axis=1), axis=0)
    shown = above_lowest[above_lowest < 0.15]
    ends = {method: shown[method].dropna() for method in shown if shown[method].notna().any()}
    lowest_label = -math.inf
    for (method, line), marker in zip(sorted(ends.items(), key=lambda pair: pair[1].iloc[-1]),
                                      itertools.cycle(MARKERS), strict=False):
        [drawn] = axis.plot(above_lowest[method].dropna(), marker=marker)
        lowest_label = max(line.iloc[-1], lowest_label + 0.008)  # labels must not overlap
        axis.annotate(method, (line.index[-1], line.iloc[-1]), color=drawn.get_color(),
                      xytext=(line.index[-1] * 1.06, lowest_label), va="center", fontsize=10)
    axis.set_xscale("log", base=2)
    axis.minorticks_off()
    axis.set(xlabel="length, tokens", xticks=means.index, xlim=(None, means.index[-1] * 1.5),
             xticklabels=map(in_k, means.index), ylim=(-0.005, 0.15),
             ylabel="loss above the lowest, nats per token")
    axis.grid(alpha=0.3)
    figure.savefig(file)


# -------------------------------------------------------------------------------------------------
# DPE's effective lengths and key dimensions, and LaMPE's mapping lengths


def detection(settings: dict, measured: dict, file: Path) -> None:
    """DPE, step (a): how much worse the answers are at each scale of each group.

    The arguments are DPE's part of extrapolation.json. Each cell is the difference of the
    log-likelihood of an answer from the best of its row, and frames mark each group's choice, with
    the others at the background scale.
    """
    from matplotlib.colors import SymLogNorm
    from matplotlib.patches import Rectangle
    candidates = measured["candidates"]
    means = np.array(measured["scores"])[..., 0]  # (groups, candidates)
    below_best = means - means.max(axis=1, keepdims=True)
    figure, axis = subplots(figsize=(0.9 * len(candidates) + 4.5, 0.42 * len(means) + 1.6))
    cells = axis.pcolormesh(below_best, cmap="cividis", edgecolors="white",
                            norm=SymLogNorm(linthresh=0.5, vmax=0))
    for (group, x), difference in np.ndenumerate(below_best):
        color = "white" if difference < -1 else "black"
        axis.text(x + 0.5, group + 0.5, f"{difference:.2f}", color=color, ha="center",
                  va="center", fontsize=9)
    for group, effective_length in enumerate(measured["alone"]):
        x = [math.ceil(measured["length"] / scale) for scale in candidates].index(effective_length)
        axis.add_patch(Rectangle((x + 0.03, group + 0.04), 0.94, 0.92, fill=False,
                                 edgecolor="red", linewidth=2))
    labels = [f"group {group}: a turn takes up to {wavelength:,} tokens"
              for group, wavelength in enumerate(measured["wavelengths"])]
    axis.invert_yaxis()  # the fastest group at the top
    axis.set(xlabel="scale of the group (red: chosen)",
             xticks=np.arange(len(candidates)) + 0.5, xticklabels=candidates,
             yticks=np.arange(len(means)) + 0.5, yticklabels=labels,
             title=f"input of {measured['length']:,} tokens, other groups at scale "
                   f"{measured['background']}")
    figure.colorbar(cells, ax=axis, label="log-likelihood below the best")
    figure.savefig(file)


def mapping_lengths(settings: dict, measured: dict, file: Path) -> None:
    """LaMPE's fit: the loss by mapping length, and the sigmoid through the best mapping lengths.

    Bars are two standard errors. The arguments are LaMPE's part of extrapolation.json.
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
                      markersize=5, capsize=3, label=f"input of {length:,} tokens")
        best, error = measured["best_mapping_lens"][str(length)]
        left.axvline(best, color=color, linestyle="dotted")
        right.errorbar(length, best, 2 * error, color=color, marker="o", markersize=7, capsize=4)
    left.set_xscale("log", base=2)
    left.minorticks_off()
    left.set(xlabel="mapping length tried, tokens (dotted: the best)",
             ylabel="loss above the lowest, nats per token",
             xticks=tried[::2], xticklabels=[f"{mapping_len:,}" for mapping_len in tried[::2]])
    left.legend(fontsize=9, loc="upper left")

    x = [lengths[-1] * n / 200 for n in range(201)]
    y = [mapping_length(length, **settings["sigmoid"]) for length in x]
    right.plot(x, y, color="black", linewidth=1)
    ticks = [length for length in lengths if length >= lengths[-1] / 8]  # leaves room for labels
    right.set(xlabel="input length, tokens", ylabel="best mapping length, tokens",
              ylim=(0, None), xticks=ticks, xticklabels=map(in_k, ticks),
              title=f"{len(lengths)} points, and the sigmoid, which has 3 parameters")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(file)


def contributions(of_layers: torch.Tensor, file: Path) -> None:
    """DPE, step (b): each frequency's share of its head's contributions, with DPE's groups.

    of_layers (layers, heads, D/2) is what measure_contributions returns.
    """
    n_layers, n_heads, n_frequencies = of_layers.shape
    all_heads = of_layers.flatten(0, 1)  # (layers * heads, D/2)
    shares = all_heads / all_heads.sum(dim=1, keepdim=True)
    figure, axis = subplots(figsize=(7, 5.5))
    image = axis.imshow(shares.numpy(), aspect="auto", interpolation="nearest", norm="log")
    figure.colorbar(image, ax=axis, label="share of the head's contributions")
    layers = range(0, n_layers, max(n_layers // 6, 1))
    n_groups = min(8, n_frequencies)
    for group in range(1, n_groups):
        axis.axvline(group * n_frequencies / n_groups - 0.5, color="white", linewidth=0.7)
    axis.set(xlabel="frequency, 0 the fastest (lines: DPE's groups)",
             ylabel="layer (one row for each head)",
             yticks=[layer * n_heads for layer in layers], yticklabels=layers)
    figure.savefig(file)


# -------------------------------------------------------------------------------------------------
# The idea: what the methods do to Llama 3 8B, with the published settings

LLAMA_3 = Config(vocab_size=128256, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
                 ffn_dim=14336, train_len=8192, rope_theta=500000.0)
FAMILIAR = "#d9ead3"  # positions and angles that were met in training
NEW = "#f4cccc"
LINE = "#38761d"


def seen(method: Method, l: int) -> np.ndarray:
    """The relative position that the last of l tokens sees at each distance 0, 1, ..., l - 1.

    Returns int64 (l, D/2), or (l, 1) if all frequencies have the same positions.
    """
    return relative_positions(method, l, first=l - 1).view(l, -1).flip(0).numpy()


def published_dpe(l: int) -> tuple[list[int], np.ndarray]:
    """The scales of DPE's 8 groups for l tokens, and what seen() returns, (l, 8)."""
    settings, _, _ = choose("dpe", LLAMA_3, l, calibrated={}, by_hand={})
    scales = scales_of_groups(settings["scales"])
    return scales, seen(dpe(settings["window"], scales), l)  # one frequency for each group


def draw_idea(figure, axes, l: int, longest: int) -> None:
    """Three panels for an input of l tokens: relative positions by distance."""
    from matplotlib import colormaps
    n = LLAMA_3.train_len
    highest = 1.6 * n
    for axis in axes:
        axis.clear()
        axis.axhspan(0, n, color=FAMILIAR)
        axis.axhspan(n, highest, color=NEW)
        axis.set(xlabel="distance between two tokens", xlim=(0, longest), ylim=(0, highest),
                 xticks=[0, longest // 2, longest],
                 xticklabels=["0", in_k(longest // 2), in_k(longest)],
                 yticks=[0, n // 2, n], yticklabels=["0", in_k(n // 2), in_k(n)])
    rope_axis, dpe_axis, lampe_axis = axes
    figure.suptitle(f"Llama 3 8B, trained on {n:,} tokens, reads {l:,}")
    rope_axis.set(title="RoPE", ylabel="relative position that the model sees")
    rope_axis.plot(seen(rope(), l)[:, 0], color="black", linewidth=2)
    rope_axis.text(0.97 * longest, 1.05 * n, "never met in training", ha="right", color="#990000")
    rope_axis.text(0.97 * longest, 0.93 * n, "met in training", ha="right", color=LINE)

    dpe_axis.set_title("DPE: each group of frequencies\ndivided by its own scale", fontsize=11)
    dpe_axis.text(0.4 * longest, 1.3 * n, "fast groups may go here:\nthey have met every angle",
                  fontsize=9)
    scales, positions = published_dpe(l)
    for group, (scale, line) in enumerate(zip(scales, positions.T, strict=True)):
        dpe_axis.plot(line, color=colormaps["plasma"](group / 9), linewidth=2)
        if line[-1] < min(highest, l - 1):  # it ends within the panel, and is not RoPE's
            dpe_axis.text(l, line[-1], f" \u00f7 {scale}", va="center", fontsize=9)

    lampe_axis.set_title("LaMPE: only the middle compressed,\nby the input's length", fontsize=11)
    _, _, method = choose("lampe", LLAMA_3, l, calibrated={}, by_hand={})
    lampe_axis.plot(seen(method, l)[:, 0], color="black", linewidth=2)


def idea(file: Path) -> None:
    """What RoPE, DPE and LaMPE make of a distance, in a picture and, as the input grows, a film."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    figure, axes = subplots(1, 3, figsize=(11, 3.9), sharey=True)
    draw_idea(figure, axes, 32768, longest=32768)
    figure.savefig(file)
    figure.set_layout_engine("none")  # so that the panels stay where they are
    lengths = [round(4096 * 2 ** (n / 4)) for n in range(21)]  # up to 131,072
    animation = FuncAnimation(figure, lambda l: draw_idea(figure, axes, l, longest=131072),
                              lengths + lengths[-1:] * 6)
    animation.save(file.with_suffix(".gif"), PillowWriter(fps=4), dpi=72)


def clocks(file: Path) -> None:
    """A frequency is a clock hand. The arc it meets in training, and at four times that length."""
    from matplotlib.patches import Wedge
    n = LLAMA_3.train_len
    l = 4 * n
    wavelengths = 2 * math.pi / LLAMA_3.frequencies().numpy()[4::8]  # one of each group
    scales, positions = published_dpe(l)
    farthest = positions.max(axis=0)
    figure, axes = subplots(2, 8, figsize=(12, 3.9))
    figure.suptitle(f"Clock hands of Llama 3 8B. Green: met in the {in_k(n)} tokens of training. "
                    f"Red: new at {in_k(l)}.")
    for group, wavelength in enumerate(wavelengths):
        for axis, position in zip(axes[:, group], (l, farthest[group]), strict=True):
            met = 90 - 360 * min(n / wavelength, 1)  # degrees, clockwise from 12 o'clock
            now = 90 - 360 * min(position / wavelength, 1)
            axis.add_patch(Wedge((0, 0), 1, 0, 360, facecolor="white", edgecolor="gray"))
            axis.add_patch(Wedge((0, 0), 1, met, 90, facecolor=FAMILIAR, edgecolor=LINE))
            if now < met:
                axis.add_patch(Wedge((0, 0), 1, now, met, facecolor=NEW, edgecolor="#990000"))
            axis.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), aspect="equal")
            axis.axis("off")
        axes[0, group].set_title(f"a turn in\n{wavelength:,.0f} tokens", fontsize=9)
        axes[1, group].text(0, -0.4, f"\u00f7 {scales[group]}", ha="center", va="center",
                            fontsize=13)
    for axis, name in zip(axes[:, 0], ("RoPE", "DPE"), strict=True):
        axis.text(-1.25, 0, name, ha="right", va="center", fontsize=13)
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
        rows = read_results(args.results, ["log_likelihood"])
        train_len = read_json(Path(args.results[0].rpartition("=")[2]))["train_len"]
        heat_maps(rows, train_len, args.out / "heat_maps.png")
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
    clocks(args.out / "clocks.png")
    idea(args.out / "idea.png")


if __name__ == "__main__":
    main()
