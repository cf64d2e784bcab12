"""A picture of DPE's step (b): the contribution of each frequency in every attention head.

    python -m extras.contributions --ckpt DIR --haystack FILE --topk 24 --out contributions.png

On the left, each frequency's share of its head's contributions; on the right, the topk key
dimensions of each head. Heads are ordered by layer. Needs matplotlib.
"""
from pathlib import Path

import torch
from torch import Tensor

import needle
from extras.figures import pyplot
from rope_extrap import key_dimensions


def draw(contributions: list[Tensor], topk: int, file: str | Path) -> None:
    """Draw the contributions of all layers, (heads, D/2) each."""
    plt = pyplot()
    all_heads = torch.cat(contributions)  # (layers * heads, D/2)
    shares = all_heads / all_heads.sum(dim=1, keepdim=True)
    is_key = key_dimensions(all_heads, topk)
    heads = len(contributions[0])

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 6), sharey=True, layout="constrained")
    image = left.imshow(shares.numpy(), aspect="auto", interpolation="nearest",
                        norm="log", cmap="viridis")
    figure.colorbar(image, ax=left, label="share of the head's contributions")
    right.imshow(is_key.numpy(), aspect="auto", interpolation="nearest", cmap="gray_r")
    left.set(title="contribution", ylabel="layer (one row for each head)")
    right.set(title=f"key dimensions, the {topk} largest (black)")
    layers = range(0, len(contributions), max(len(contributions) // 6, 1))
    left.set_yticks([layer * heads for layer in layers], [str(layer) for layer in layers])
    for axis in (left, right):
        axis.set_xlabel("frequency, 0 the fastest")
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    parser = needle.make_parser(__doc__)
    add = parser.add_argument
    add("--haystack", metavar="FILE",
        help="UTF-8 text to measure on (default: generated sentences)")
    add("--topk", type=needle.positive, required=True, metavar="N",
        help="number of key dimensions of each head")
    add("--seed", type=int, default=0, metavar="N", help="seed of the texts (default: 0)")
    add("--out", required=True, metavar="FILE", help="picture to write, .png or .svg")
    args = parser.parse_args()
    needle.check_picture("--out", args.out)
    if needle.WORLD_SIZE > 1:
        raise ValueError("this script needs one process; run it without torchrun")
    pyplot()  # so that a missing matplotlib is reported at once
    args.lengths = [1]  # the texts are short, so needle.load need not check their memory
    text = None
    if args.haystack is not None:
        text = needle.read_haystack(args.haystack)
    model, tokenizer, _, _ = needle.load(args)
    if args.topk > model.config.head_dim // 2:
        raise ValueError(f"--topk {args.topk} is more than the {model.config.head_dim // 2} "
                         f"frequencies of a head")
    draw(needle.mean_contributions(model, tokenizer, text, args.seed), args.topk, args.out)


if __name__ == "__main__":
    needle.run_command(main)
