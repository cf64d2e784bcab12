"""The README's pictures, from the JSON files that needle.py writes.

    python needle.py --method rope,dpe,lampe --len 4096,16384,32768,65536 --trials 4 --json results.json
    python extras/figures.py --results results.json --out figures

draws heat_maps.png (depth by length, from --results), detection.png and ramps.png (DPE's effective lengths and LaMPE's
fit, from the checkpoint's extrapolation.json) and positions.png (the matrices of relative positions). Needs matplotlib.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import torch

try:
    import matplotlib
except ImportError:
    if __name__ != "__main__":
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    print("figures.py: matplotlib is missing: pip install matplotlib", file=sys.stderr)
    sys.exit(2)
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from extras.table import read_results  # noqa: E402
from needle import in_sentences  # noqa: E402
from rope_extrap import dpe, lampe, lampe_ramp, relative_positions, rope, self_extend  # noqa: E402

plt.rcParams.update({"font.size": 11, "savefig.dpi": 110, "figure.facecolor": "white"})  # opaque: also on a dark page


def finish(figure, file) -> None:
    figure.savefig(file, bbox_inches="tight", metadata={"Software": None} if str(file).endswith(".png") else None)
    plt.close(figure)


def heat_maps(results: list[dict], file) -> None:
    """Mean score by depth and length, one map for each method, as needle.py prints it."""
    methods = list(dict.fromkeys(row["method"] for row in results))
    lengths, depths = (sorted({row[key] for row in results}) for key in ("length", "depth"))
    size = (1.6 + 0.85 * len(lengths) * len(methods), 1.5 + 0.4 * len(depths))
    figure, axes = plt.subplots(1, len(methods), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, method in zip(axes[0], methods):
        for y, depth in enumerate(depths):
            for x, length in enumerate(lengths):
                place = method, depth, length
                scores = [r["score"] for r in results if (r["method"], r["depth"], r["length"]) == place]
                if scores:
                    score = sum(scores) / len(scores)
                    axis.text(x, y, f"{score:.2f}", ha="center", va="center", color="white" if score < 0.6 else "black")
                    square = (x - 0.5, y - 0.5), 1, 1
                    axis.add_patch(plt.Rectangle(*square, facecolor=plt.cm.cividis(score), edgecolor="white"))
        axis.set(title=method, xlabel="length, tokens", xlim=(-0.5, len(lengths) - 0.5), ylim=(len(depths) - 0.5, -0.5))
        axis.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n % 1024 == 0 else n for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:.2f}" for depth in depths])
    axes[0][0].set_ylabel("depth of the needle")
    bar = figure.colorbar(plt.cm.ScalarMappable(cmap="cividis"), ax=axes[0], fraction=0.03)
    bar.set_label("numbers found")
    finish(figure, file)


def detection(found: dict, file) -> None:
    """DPE's step (a): log-likelihood of an answer at each effective length, one line for each group of frequencies."""
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    lengths = [-(-found["length"] // scale) for scale in found["candidates"]]
    for g, (row, chosen) in enumerate(zip(found["scores"], found["effective"])):
        colour, (means, noise) = plt.cm.viridis(g / len(found["effective"])), zip(*row)
        axis.errorbar(lengths, means, noise, color=colour, marker="osD^v<>*"[g % 8], markersize=5, capsize=3,
                      label=f"group {g}: {chosen:,}")
        axis.plot(chosen, means[lengths.index(chosen)], "o", markersize=13, fillstyle="none", color=colour)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.set_yscale("symlog", linthresh=0.1)
    axis.set_ylim(top=0.2)
    axis.set(xlabel=f"effective length = {found['length']:,} / scale, tokens",
             ylabel="log-likelihood of an answer, nats")
    axis.legend(title="effective length,\nfastest group first", loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(alpha=0.3)
    finish(figure, file)


def ramps(found: dict, file) -> None:
    """LaMPE's fit: loss against ramp at each length, and the sigmoid through the best ramps, or the rule's ramp."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths = sorted(map(int, found["curves"]))
    for n, T in enumerate(lengths):
        colour, curve = plt.cm.viridis(n / len(lengths)), found["curves"][str(T)]
        tried, (means, noise) = list(map(int, curve)), zip(*curve.values())
        left.errorbar(tried, means, noise, color=colour, marker="osD^v<>*"[n % 8], markersize=5, capsize=3,
                      label=f"{T:,} tokens")
        best, error = found["best_ramps"][str(T)]
        right.errorbar(T, best, error, color=colour, marker="o", markersize=7, capsize=4)
    left.set_xscale("log", base=2)
    left.set_xticks(tried[::2], [f"{ramp:,}" for ramp in tried[::2]])
    left.set_yscale("log")
    left.set(xlabel="ramp, tokens", ylabel="loss, nats per token")
    figure.legend(fontsize=9, loc="outside lower center", ncols=6)
    x = [lengths[-1] * n / 200 for n in range(201)]
    curve = [lampe_ramp(T, found["a"], found["b"], found["L"]) if "a" in found else found["ramp"] for T in x]
    right.plot(x, curve, color="black", linewidth=1)
    right.set_xticks(lengths[2:], [f"{T // 1024}K" for T in lengths[2:]])
    right.set(xlabel="input length, tokens", ylim=(0, None), ylabel="best ramp, tokens",
              title="the fitted sigmoid" if "a" in found else "ramps cannot be told apart: the rule's ramp is kept")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    finish(figure, file)


def positions(file) -> None:
    """Relative positions of 320 tokens: what a model trained on 64 of them would see."""
    T = 320
    shown = {"RoPE": rope(), "SelfExtend\nwindow 32, group 8": self_extend(32, 8),
             "DPE, fast group\nwindow 32, scale 2": dpe(32, 2), "DPE, slow group\nwindow 32, scale 16": dpe(32, 16),
             "LaMPE, ramp 48\nhead 24, tail 48": lampe(T, 48, 24, 48)}
    figure, axes = plt.subplots(1, len(shown), figsize=(12, 3.2), sharey=True, layout="constrained")
    above = torch.ones(T, T, dtype=torch.bool).triu(1)
    for axis, (name, method) in zip(axes, shown.items()):
        rel = relative_positions(method, T).reshape(T, T).double().masked_fill(above, math.nan)
        image = axis.imshow(rel, cmap="viridis", norm=matplotlib.colors.PowerNorm(0.5, 0, T))
        axis.contour(torch.nan_to_num(rel, nan=0.0), levels=[32, 64, 128, 256], colors="white", linewidths=0.7)
        axis.set(title=name, xlabel="key j, tokens")
    axes[0].set_ylabel("query i, tokens")
    bar = figure.colorbar(image, ax=axes, fraction=0.02, ticks=[0, 32, 64, 128, 256])
    bar.set_label("relative position; lines at these")
    finish(figure, file)


@in_sentences()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--results", type=Path, metavar="FILE", nargs="+", default=[],
                        help="needle.py's --json (default: no heat maps)")
    parser.add_argument("--extrapolation", type=Path, default=root / "tiny" / "extrapolation.json", metavar="FILE",
                        help="default: the bundled checkpoint's")
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR", help="default: figures")
    args = parser.parse_args()
    results = read_results(args.results)
    found = json.loads(args.extrapolation.read_text()) if args.extrapolation.exists() else {}
    args.out.mkdir(parents=True, exist_ok=True)
    if results:
        heat_maps(results, args.out / "heat_maps.png")
    if "dpe" in found:
        detection(found["dpe"], args.out / "detection.png")
    if "lampe" in found:
        ramps(found["lampe"], args.out / "ramps.png")
    positions(args.out / "positions.png")


if __name__ == "__main__":
    main()
