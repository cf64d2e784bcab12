"""The papers' procedures, which find a checkpoint's settings: DPE's effective lengths, or the fit of LaMPE's ramp.

    python extras/calibrate.py dpe --len 65536 --trials 2
    python extras/calibrate.py lampe --len 65536 --trials 5
    torchrun --nproc-per-node 8 extras/calibrate.py dpe --ckpt Meta-Llama-3.1-70B --len 131072 --tp 8

Each writes its section of extrapolation.json beside the checkpoint, where needle.py looks; the other section is kept.

    T   an input's length in tokens (--len)        s   a method's settings by name
"""
import argparse
import itertools
import json
import math
import random
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import needle  # noqa: E402
from load_llama import read_json  # noqa: E402
from model import Llama  # noqa: E402
from rope_extrap import Method, detect_scales, fit_ramp  # noqa: E402


@torch.inference_mode()
def tail_scores(model: Llama, tokens: list[int], last: int, method: Method) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each of the `last` tokens after all before, and whether it is the likeliest: (last,) each."""
    ids = torch.tensor([tokens], device=model.tok_embeddings.weight.device)
    logits, target = model(ids[:, :-1], [method] * model.config.n_layers, last=last)[0], ids[0, -last:]
    return logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0].cpu(), (logits.argmax(dim=-1) == target).cpu()


def countdown(steps: int):
    """Returns say(text), which prints a step's line with its number and the time that is left."""
    began, numbers = time.time(), itertools.count(1)

    def say(text):
        n = next(numbers)
        print(f"{n:4}/{steps}  {text}   {(time.time() - began) / n * (steps - n):.0f} s left", flush=True)
    return say


def calibrate_dpe(args: argparse.Namespace, model: Llama, tokenizer, text: str | None, s: dict) -> dict:
    """DPE's step (a): an effective length for each of 8 groups, by retrieval and, where that ties, by log-likelihood.

    Scales are powers of two, down to an effective length of 1,024 tokens, or of an eighth of the training length where
    that is less; the other groups stand at 2 * T / training length.
    """
    c, T = model.config, args.lengths[0]
    candidates = [2 ** n for n in range(max(T // min(1024, max(c.train_len // 8, 1)), 1).bit_length())]
    background, groups = 1 << max(2 * T // c.train_len, 1).bit_length() - 1, min(8, c.head_dim // 2)
    trials = [needle.draw_trial(args, tokenizer, T, args.needles, n / args.trials, f"calibration {n}", text)
              for n in range(args.trials)]
    say = countdown(groups * (len(candidates) - 1) + 1)

    def score(scales: list[int]) -> tuple[float, float]:
        method, right, likelihood = needle.METHODS["dpe"].make(c, T, s | dict(scales=scales)), [], []
        for _, prompt, questions in trials:
            tail = [token for question, answer in questions for token in question + answer]
            log_p, hit = tail_scores(model, prompt + tail, len(tail), method)
            end = 0
            for question, answer in questions:
                end += len(question) + len(answer)
                right.append(hit[end - len(answer):end].all().item())
                likelihood.append(log_p[end - len(answer):end].mean().item())
        found = round(sum(right) / len(right), 4), round(sum(likelihood) / len(likelihood), 6)
        say(f"scales {'-'.join(map(str, scales)):25} retrieval {found[0]:.2f}  log-likelihood {found[1]:8.4f}")
        return found

    scales, table = detect_scales(score, groups, candidates, background)
    effective = [-(-T // scale) for scale in scales]
    print(f"\nlog-likelihood (retrieval) of each scale, the other groups at {background}\n       "
          + "".join(f"{scale:16}" for scale in candidates) + "   effective length")
    for g, (row, scale) in enumerate(zip(table, scales)):
        cells = "".join(f"{log_p:9.4f} ({right:.2f})" for right, log_p in row)
        print(f"group {g}{cells}   {T} / {scale} = {effective[g]}")
    return dict(window=s["window"], effective=effective, key_dims=s["key_dims"] or c.head_dim // 2, length=T,
                candidates=candidates, background=background, scores=table)


def lampe_samples(args: argparse.Namespace, tokenizer, T: int, text: str | None):
    """Texts of T tokens: yields (tokens, which of the last ones count, bool).

    Of --haystack the last 2,048 tokens count; of generated sentences only numbers that are told again at the end, since
    nothing else in them depends on what is far.
    """
    hay = tokenizer.encode(text or "")
    for n in range(args.trials):
        if text:
            start = random.Random(f"{args.seed} {T} {n}").randrange(len(hay) - T + 1)
            yield hay[start:start + T], torch.ones(min(T // 2, 2048), dtype=torch.bool)
        else:
            count = max(min(32, T // 128), 1)
            name = f"calibration {n}"
            _, prompt, questions = needle.draw_trial(args, tokenizer, T, count, n / args.trials / count, name, None)
            counted = []
            for question, answer in questions:
                prompt += question + answer
                counted += [False] * len(question) + [True] * len(answer)
            yield prompt, torch.tensor(counted)


def calibrate_lampe(args: argparse.Namespace, model: Llama, tokenizer, text: str | None, s: dict) -> dict:
    """LaMPE's fit: the ramp of lowest perplexity at each length, T, T / 2, .., and the sigmoid through these points."""
    c, longest = model.config, args.lengths[0]
    if text and (size := len(tokenizer.encode(text))) < longest:
        raise ValueError(f"--haystack has {size} tokens, and perplexity at {longest} needs as many: give a longer text")
    lengths = sorted(longest >> n for n in range(max(3, (longest // c.train_len).bit_length())))
    ramps = [max(round(c.train_len / 16 * 2 ** (n / 2)), 1) for n in range(9)]
    say, perplexity = countdown(len(lengths) * len(ramps)), {}
    for T in lengths:
        samples, perplexity[T] = list(lampe_samples(args, tokenizer, T, text)), {}
        for ramp in ramps:
            method = needle.METHODS["lampe"].make(c, T, s | dict(ramp=ramp))
            log_p = [tail_scores(model, tokens, len(counted), method)[0][counted] for tokens, counted in samples]
            perplexity[T][ramp] = round(math.exp(-torch.cat(log_p).mean().item()), 6)
            say(f"length {T:6}  ramp {ramp:5}  perplexity {perplexity[T][ramp]:.4f}")
    best = [min(ramps, key=perplexity[T].get) for T in lengths]
    print("\nperplexity, length (rows) by ramp\n       " + "".join(f"{ramp:9}" for ramp in ramps) + "   best")
    for T, ramp in zip(lengths, best):
        print(f"{T:7}" + "".join(f"{value:9.4f}" for value in perplexity[T].values()) + f"   {ramp}")
    a, b, L = fit_ramp(lengths, best)
    best_ramps = dict(zip(lengths, best))
    return dict(a=a, b=b, L=L, head=s["head"], tail=s["tail"], best_ramps=best_ramps, perplexity=perplexity)


def write_sections(file: Path, record: dict) -> None:
    """An extrapolation.json with a line for each entry of its sections."""
    sections = []
    for name, section in record.items():
        lines = (f'  "{key}": {json.dumps(value)}' for key, value in section.items())
        sections.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
    needle.write_whole(file, "{\n" + ",\n".join(sections) + "\n}\n")


@needle.in_sentences()
def main() -> None:
    parser = needle.make_parser(__doc__, needles=4)
    parser.add_argument("method", choices=["dpe", "lampe"], help="whose settings to find")
    parser.add_argument("--len", type=needle.positive, nargs=1, default=[65536], metavar="N", dest="lengths",
                        help="tokens of the test, the longest of LaMPE's (default: 65536)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: extrapolation.json beside the checkpoint")
    args = parser.parse_args()
    args.out = args.out or Path(args.ckpt) / "extrapolation.json"
    needle.check_writable(args.out)
    record = read_json(args.out) if args.out.exists() else {}
    text = needle.read_haystack(args.haystack) if args.haystack else None
    if unknown := args.set.keys() - needle.settings_of([args.method]):
        raise ValueError(f"--set {unknown.pop()} is no setting of {args.method}")
    if needle.WORLD > args.tp:
        raise ValueError(f"there is one model to calibrate: --tp {needle.WORLD}, or fewer processes")
    model, tokenizer, _, _ = needle.load(args)
    s, _, _ = needle.settings(args.method, model.config, args.lengths[0], {}, args.set)
    result = {"dpe": calibrate_dpe, "lampe": calibrate_lampe}[args.method](args, model, tokenizer, text, s)
    made_with = {name: getattr(args, name) for name in ("needles", "trials", "seed", "haystack")}
    made_with = record.get("made_with", {}) | {args.method: dict(length=args.lengths[0]) | made_with}
    if not needle.RANK:
        write_sections(args.out, record | {args.method: result, "made_with": made_with})
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
