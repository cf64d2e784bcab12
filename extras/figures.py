"""The README's figures, from the JSON files that needle.py and the scripts here write.

    python needle.py --method rope,dpe,lampe --len 4096,16384,65536 --trials 4 --json results.json
    python -m extras.figures --results results.json --out figures

Writes heat_maps.png (scores by depth and length, from --results), losses.png (losses by length,
from --losses), detection.png and mapping_lengths.png (DPE's effective lengths and LaMPE's fit,
from --extrapolation) and positions.png (matrices of relative positions). Needs matplotlib.
"""
import argparse
import json
import math
import statistics
from pathlib import Path

import torch

from extras.table import LOSS_ROW, NEEDLE_ROW, read_results
from rope_extrap import dpe, lampe, mapping_length_of, relative_positions, rope, self_extend

SMOLLM2 = Path(__file__).resolve().parent / "smollm2.json"
MARKERS = "osD^v<>*"  # so that lines can be told apart without colors


def pyplot():
    """matplotlib.pyplot, prepared for writing files. Raises ValueError if it is missing."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    plt.switch_backend("agg")  # needs no display
    plt.rcParams.update({"font.size": 11, "savefig.dpi": 110, "savefig.bbox": "tight"})
    return plt


# -------------------------------------------------------------------------------------------------
# Scores by depth and length


def heat_maps(rows: list[dict], file: str | Path) -> None:
    """Mean scores by depth and length, one map for each method.

    rows are those of needle.py --json. Raises ValueError if matplotlib is missing.
    """
    plt = pyplot()
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    columns = min(len(methods), 4)
    n_rows = math.ceil(len(methods) / columns)
    width = 1.6 + max(0.75 * len(lengths), 2) * columns
    height = (1.5 + 0.4 * len(depths)) * n_rows
    figure, axes = plt.subplots(n_rows, columns, figsize=(width, height), sharey=True,
                                squeeze=False, layout="constrained")
    for axis in axes.flat[len(methods):]:
        axis.set_visible(False)
    for axis, method in zip(axes.flat, methods, strict=False):
        scores = mean_scores([row for row in rows if row["method"] == method], depths, lengths)
        cells = axis.pcolormesh(scores, cmap="cividis", vmin=0, vmax=1, edgecolors="white")
        for y in range(len(depths)):
            for x in range(len(lengths)):
                score = scores[y][x]
                if not math.isnan(score):
                    color = "white" if score < 0.6 else "black"
                    axis.text(x + 0.5, y + 0.5, f"{score:.2f}", ha="center", va="center",
                              color=color)
        axis.set(title=method, xlabel="length, tokens")
        axis.set_xticks([x + 0.5 for x in range(len(lengths))], [in_k(n) for n in lengths])
    axes[0][0].set_yticks([y + 0.5 for y in range(len(depths))], [f"{d:.2f}" for d in depths])
    axes[0][0].invert_yaxis()  # depth 0 at the top; the maps share this axis
    for axis in axes[:, 0]:
        axis.set_ylabel("depth of the needle")
    figure.colorbar(cells, ax=axes, fraction=0.03, label="needles found")
    figure.savefig(file)
    plt.close(figure)


def mean_scores(rows: list[dict], depths: list[float], lengths: list[int]) -> list[list[float]]:
    """The mean score at each depth (row) and length (column); NaN where there is none."""
    means = []
    for depth in depths:
        means_at_depth = []
        for length in lengths:
            wanted = (depth, length)
            scores = [row["score"] for row in rows if (row["depth"], row["length"]) == wanted]
            means_at_depth.append(sum(scores) / len(scores) if scores else math.nan)
        means.append(means_at_depth)
    return means


def in_k(length: int) -> str:
    """4096 -> 4K."""
    if length % 1024 != 0:
        return str(length)
    return f"{length // 1024}K"


# -------------------------------------------------------------------------------------------------
# DPE's effective lengths, and LaMPE's mapping lengths


def detection(section: dict, file: str | Path) -> None:
    """DPE, step (a): how much worse the answers are at each effective length of each group.

    section is DPE's part of extrapolation.json. Each cell is the difference of the log-likelihood
    of an answer from the best of its row, with two standard errors. Dashed frames mark each
    group's effective length with the others at the background scale, solid frames the effective
    lengths that work together.
    """
    plt = pyplot()
    tried = [math.ceil(section["length"] / scale) for scale in section["candidates"]]
    together = section["effective_lengths"]
    alone = section.get("alone", together)
    differences = []
    for row in section["scores"]:
        best = max(mean for mean, _ in row)
        differences.append([mean - best for mean, _ in row])

    figure, axis = plt.subplots(figsize=(1.15 * len(tried) + 3, 0.5 * len(together) + 1.5),
                                layout="constrained")
    from matplotlib.colors import SymLogNorm
    cells = axis.pcolormesh(differences, cmap="cividis", edgecolors="white",
                            norm=SymLogNorm(linthresh=0.5, vmax=0))
    for group, row in enumerate(section["scores"]):
        for x, (difference, (_, error)) in enumerate(zip(differences[group], row, strict=True)):
            color = "white" if difference < -1 else "black"
            axis.text(x + 0.5, group + 0.5, f"{difference:.2f}\n\u00b1{error:.2f}", color=color,
                      ha="center", va="center", fontsize=8)
        frame(axis, tried.index(alone[group]), group, "dashed")
        frame(axis, tried.index(together[group]), group, "solid")
    axis.set_xticks([x + 0.5 for x in range(len(tried))], [f"{length:,}" for length in tried])
    axis.set_yticks([group + 0.5 for group in range(len(together))], range(len(together)))
    axis.invert_yaxis()  # the fastest group at the top
    axis.set(xlabel=f"effective length = {section['length']:,} / scale, tokens",
             ylabel="group, 0 the fastest", title="frames: dashed alone, solid together")
    figure.colorbar(cells, ax=axis, label="log-likelihood below the best, nats")
    figure.savefig(file)
    plt.close(figure)


def frame(axis, x: int, y: int, style: str) -> None:
    """Draw a red frame around a cell."""
    from matplotlib.patches import Rectangle
    inset = 0.03 if style == "solid" else 0.1
    axis.add_patch(Rectangle((x + inset, y + inset), 1 - 2 * inset, 1 - 2 * inset, fill=False,
                             edgecolor="red", linewidth=2, linestyle=style))


def mapping_lengths(section: dict, file: str | Path) -> None:
    """LaMPE's fit: the loss by mapping length, and the sigmoid through the best mapping lengths.

    Bars are two standard errors. On the left, dotted lines mark the best mapping lengths. section
    is LaMPE's part of extrapolation.json.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths = sorted(int(length) for length in section["curves"])
    for n, length in enumerate(lengths):
        color = plt.cm.viridis(n / len(lengths))
        curve = section["curves"][str(length)]
        tried = [int(mapping_len) for mapping_len in curve]
        lowest = min(loss for loss, _ in curve.values())
        above_lowest = [loss - lowest for loss, _ in curve.values()]
        errors = [error for _, error in curve.values()]
        left.errorbar(tried, above_lowest, errors, color=color, marker=MARKERS[n % 8], markersize=5,
                      capsize=3, label=f"{length:,} tokens")
        best, error = section["best_mapping_lens"][str(length)]
        left.axvline(best, color=color, linestyle="dotted")
        right.errorbar(length, best, 2 * error, color=color, marker="o", markersize=7, capsize=4)
    left.set_xscale("log", base=2)
    left.set_xticks(tried[::2], [f"{mapping_len:,}" for mapping_len in tried[::2]])
    left.minorticks_off()
    left.set(xlabel="mapping length, tokens", ylabel="loss above the lowest, nats per token")
    figure.legend(fontsize=9, loc="outside lower center", ncols=6)

    x = [lengths[-1] * n / 200 for n in range(201)]
    y = [mapping_length_of(section, length) for length in x]
    right.plot(x, y, color="black", linewidth=1)
    ticks = [length for length in lengths if length >= lengths[-1] / 8]  # leaves room for labels
    right.set_xticks(ticks, [in_k(length) for length in ticks])
    right.set(xlabel="input length, tokens", ylabel="best mapping length, tokens",
              ylim=(0, None), title="the fitted sigmoid")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(file)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------
# Losses by length


def losses(rows: list[dict], file: str | Path) -> None:
    """The mean loss by length, one line per method. rows are those of extras.loss --json.

    The right panel shows the loss above the lowest of each length, up to 0.15 nats, so that methods
    that fail drop out of view.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths = sorted({row["length"] for row in rows})
    block_losses = {}
    for row in rows:
        block_losses.setdefault((row["method"], row["length"]), []).extend(row["block_losses"])
    means = {}
    lowest = dict.fromkeys(lengths, math.inf)
    for (method, length), values in block_losses.items():
        means[method, length] = statistics.mean(values)
        lowest[length] = min(lowest[length], means[method, length])

    for n, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        x = [length for length in lengths if (method, length) in means]
        y = [means[method, length] for length in x]
        left.plot(x, y, marker=MARKERS[n % 8], label=method)
        above_best = [means[method, length] - lowest[length] for length in x]
        right.plot(x, above_best, marker=MARKERS[n % 8])
    left.set(ylabel="loss, nats per token")
    right.set(ylabel="loss above the lowest of this length", ylim=(-0.005, 0.15))
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [in_k(length) for length in lengths])
        axis.set(xlabel="length, tokens")
        axis.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside lower center", ncols=7)
    figure.savefig(file)
    plt.close(figure)


# -------------------------------------------------------------------------------------------------
# Relative positions


def positions(file: str | Path) -> None:
    """Matrices of relative positions of 320 tokens, for a model trained on 64."""
    plt = pyplot()
    from matplotlib.colors import PowerNorm
    T = 320
    shown = {
        "RoPE": rope(),
        "SelfExtend\nwindow 32, group size 8": self_extend(32, 8),
        "DPE, fast group\nwindow 32, scale 2": dpe(32, 2),
        "DPE, slow group\nwindow 32, scale 16": dpe(32, 16),
        "LaMPE, mapping length 48\ns1 = 24, s2 = 48": lampe(T, 48, 24, 48),
    }
    figure, axes = plt.subplots(1, len(shown), figsize=(12, 3.2), sharey=True,
                                layout="constrained")
    above_diagonal = torch.ones(T, T, dtype=torch.bool).triu(1)
    for axis, (name, method) in zip(axes, shown.items(), strict=True):
        rel = relative_positions(method, T).reshape(T, T)
        shown_rel = rel.double().masked_fill(above_diagonal, math.nan).numpy()
        image = axis.imshow(shown_rel, cmap="viridis", norm=PowerNorm(0.5, vmin=0, vmax=T))
        axis.contour(rel.numpy(), levels=[32, 64, 128, 256], colors="white", linewidths=0.7)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("key j, tokens")
    axes[0].set_ylabel("query i, tokens")
    figure.colorbar(image, ax=axes, fraction=0.02, ticks=[0, 32, 64, 128, 256],
                    label="relative position; lines at these")
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="+", default=[], metavar="FILE",
                        help="results of needle.py --json, or LABEL=FILE (default: no heat maps)")
    parser.add_argument("--losses", nargs="+", default=[], metavar="FILE",
                        help="results of extras.loss --json, or LABEL=FILE (default: no losses)")
    parser.add_argument("--extrapolation", type=Path, default=SMOLLM2, metavar="FILE",
                        help="settings that calibrate.py wrote (default: SmolLM2's)")
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR",
                        help="default: figures")
    args = parser.parse_args()
    try:
        draw_all(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"figures.py: {error}\n")


def draw_all(args: argparse.Namespace) -> None:
    results = []
    losses_of_methods = []
    if args.results:
        results = read_results(args.results, [NEEDLE_ROW])
    if args.losses:
        losses_of_methods = read_results(args.losses, [LOSS_ROW])
    try:
        calibrated = json.loads(args.extrapolation.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{args.extrapolation} is not an extrapolation.json") from None
    args.out.mkdir(parents=True, exist_ok=True)
    if results:
        heat_maps(results, args.out / "heat_maps.png")
    if losses_of_methods:
        losses(losses_of_methods, args.out / "losses.png")
    if "scores" in calibrated.get("dpe", {}):  # settings written by hand have none
        detection(calibrated["dpe"], args.out / "detection.png")
    if "curves" in calibrated.get("lampe", {}):
        mapping_lengths(calibrated["lampe"], args.out / "mapping_lengths.png")
    positions(args.out / "positions.png")


if __name__ == "__main__":
    main()
