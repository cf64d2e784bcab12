"""The papers' procedures, which find a checkpoint's settings: DPE's effective lengths, or the fit of LaMPE's ramp.

    python extras/calibrate.py dpe --len 65536
    python extras/calibrate.py lampe --len 131072 --trials 5
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
from rope_extrap import Method, detect_scales, fit_ramp, not_worse  # noqa: E402


def float32_logits(model: Llama) -> None:
    """Let a model of half precision compute its logits in float32: bfloat16 rounds a logit of 20 by up to 0.06."""
    model.norm.float()  # whose output then is, too
    if model.output is not None:
        model.output.float()


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
        left = max(steps - n, 0) * (time.time() - began) / n
        print(f"{n:4}/{max(steps, n)}  {text}   {left:.0f} s left", flush=True)
    return say


def calibrate_dpe(args: argparse.Namespace, model: Llama, tokenizer, text: str | None, s: dict) -> dict:
    """DPE's step (a): an effective length for each of 8 groups of frequencies, by the log-likelihood of right answers.

    Every setting answers the same questions. Scales are powers of two, down to an effective length of 1,024 tokens, or
    of an eighth of the training length where that is less; the other groups stand at 2 * T / training length. What a
    group bears while all others are safe, all may not bear together: so all chosen scales are tried at once, and as
    long as they are worse than the background every effective length is halved (the paper tries each group alone).
    """
    c, T = model.config, args.lengths[0]
    if args.trials * args.needles < 2:
        raise ValueError("one question has no error bar: give --needles or --trials of at least 2")
    candidates = [2 ** n for n in range(max(T // min(1024, max(c.train_len // 8, 1)), 1).bit_length())]
    background, groups = 1 << max(2 * T // c.train_len, 1).bit_length() - 1, min(8, c.head_dim // 2)
    trials = [needle.draw_trial(args, tokenizer, T, args.needles, n / args.trials, f"calibration {n}", text)
              for n in range(args.trials)]
    say, found = countdown(groups * (len(candidates) - 1) + 2), {}

    def score(scales: list[int]) -> torch.Tensor:
        name = "-".join(map(str, scales))
        if name not in found:  # every group meets the background among its candidates
            method, answers = needle.METHODS["dpe"].make(c, T, s | dict(scales=scales)), []
            for _, prompt, questions in trials:
                tail, end = [token for pair in questions for part in pair for token in part], 0
                log_p, hit = tail_scores(model, prompt + tail, len(tail), method)
                for question, answer in questions:
                    start, end = end + len(question), end + len(question) + len(answer)
                    answers.append((log_p[start:end].sum(), hit[start:end].all()))
            found[name] = torch.tensor(answers, dtype=torch.float64).T  # log-likelihood, found or not: (2, n)
            say(f"scales {name:25} log-likelihood {found[name][0].mean():8.4f}  retrieval {found[name][1].mean():.2f}")
        return found[name][0]

    alone, table = detect_scales(score, groups, candidates, background)
    if not any(right.any() for _, right in found.values()):
        raise ValueError("no answer was right at any setting, so nothing tells effective lengths: try a shorter --len")
    together = alone
    while not not_worse(score(together), score([background] * groups)) and min(together) < background:
        together = [max(scale, min(2 * scale, background)) for scale in together]
    effective, scores = [-(-T // scale) for scale in together], []
    print(f"\nlog-likelihood of an answer +- two standard errors of its difference from the best, others at scale "
          f"{background};\nthe longest effective length that it holds alone, and that all hold together\n       "
          + "".join(f"{scale:17}" for scale in candidates) + "   alone together")
    for g, (row, scale) in enumerate(zip(table, alone)):
        row = torch.stack(row)
        noise = 2 * (row - row[row.mean(dim=1).argmax()]).std(dim=1) / math.sqrt(row.shape[1])
        scores.append([[round(x, 5) for x in pair] for pair in zip(row.mean(dim=1).tolist(), noise.tolist())])
        print(f"group {g}" + "".join(f"{mean:9.3f} +-{error:6.3f}" for mean, error in scores[-1])
              + f"{-(-T // scale):8}{effective[g]:9}" + "   works alone at every length tried" * (scale == 1))
    return dict(window=s["window"], effective=effective, topk=s["topk"] or c.head_dim // 2, length=T,
                candidates=candidates, background=background, scores=scores)


def lampe_samples(args: argparse.Namespace, tokenizer, T: int, text: str | None):
    """Texts of T tokens: yields (tokens, which of the last tokens count, bool).

    Of --haystack the last 2,048 tokens count; of generated sentences only numbers that are repeated at the end, since
    nothing else in them depends on what is far.
    """
    hay = tokenizer.encode(text or "")
    for n in range(args.trials):
        if text:
            start = random.Random(f"{args.seed} {T} {n}").randrange(len(hay) - T + 1)
            yield hay[start:start + T], torch.ones(min(T // 2, 2048), dtype=torch.bool)
        else:
            count = max(min(args.needles, T // 128), 1)
            name = f"calibration {n}"
            _, prompt, questions = needle.draw_trial(args, tokenizer, T, count, n / args.trials / count, name, None)
            counted = []
            for question, answer in questions:
                prompt += question + answer
                counted += [False] * len(question) + [True] * len(answer)
            yield prompt, torch.tensor(counted)


def best_ramp(losses: torch.Tensor, ramps: list[int]) -> torch.Tensor:
    """The vertex of a parabola in log2 ramp through the lowest mean loss and its neighbours. losses (.., ramps)."""
    x = torch.tensor(ramps, dtype=torch.float64).log2()
    at = losses.argmin(dim=-1).clamp(1, len(ramps) - 2)
    low, mid, high = (losses.gather(-1, (at + n)[..., None])[..., 0] for n in (-1, 0, 1))
    bend = (low + high - 2 * mid).clamp(min=1e-12)
    return x[at] + ((low - high) / (2 * bend)).clamp(-1, 1) * (x[1] - x[0])  # the ramps' logs are evenly spaced


def calibrate_lampe(args: argparse.Namespace, model: Llama, tokenizer, text: str | None, s: dict) -> dict:
    """LaMPE's fit: the ramp of lowest perplexity at each length, T, T / 2, .., and the sigmoid through these points.

    All ramps read the same texts. A best ramp's error is its spread over 500 resamplings of the counted tokens. Where
    no length tells its ramps apart, or no sigmoid fits, the rule's ramp is kept.
    """
    c, longest, generator = model.config, args.lengths[0], torch.Generator().manual_seed(args.seed)
    if text and (size := len(tokenizer.encode(text))) < longest:
        raise ValueError(f"--haystack has {size} tokens, and perplexity at {longest} needs as many: give a longer text")
    lengths = sorted(longest >> n for n in range(max(3, (longest // c.train_len).bit_length())))
    ramps = [max(round(c.train_len / 16 * 2 ** (n / 2)), 1) for n in range(9)]
    say, curves, best = countdown(len(lengths) * len(ramps)), {}, {}
    for T in lengths:
        samples, losses = list(lampe_samples(args, tokenizer, T, text)), []
        for ramp in ramps:
            method = needle.METHODS["lampe"].make(c, T, s | dict(ramp=ramp))
            log_p = [tail_scores(model, tokens, len(counted), method)[0][counted] for tokens, counted in samples]
            losses.append(-torch.cat(log_p).double())
            say(f"length {T:6}  ramp {ramp:5}  perplexity {losses[-1].mean().exp():.4f}")
        losses = torch.stack(losses)  # (ramps, n)
        n = losses.shape[1]
        resampled = losses[:, torch.randint(n, (500, n), generator=generator)].mean(dim=2).T  # (500, ramps)
        means = losses.mean(dim=1)
        noise = 2 * (losses - losses[means.argmin()]).std(dim=1) / math.sqrt(n)
        told = not not_worse(-losses, -losses[means.argmin()]).all()
        best[T] = best_ramp(means, ramps).item(), best_ramp(resampled, ramps).std().item(), told
        rows = zip(ramps, means.tolist(), noise.tolist())
        curves[T] = {ramp: [round(mean, 6), round(error, 6)] for ramp, mean, error in rows}
    if min(loss for curve in curves.values() for loss, _ in curve.values()) > math.log(c.vocab_size) / 2:
        raise ValueError("the model predicts next to nothing at any ramp, so nothing tells ramps: try a shorter --len")
    print("\nloss, nats a token, +- two standard errors of its difference from the best, length (rows) by ramp\n       "
          + "".join(f"{ramp:17}" for ramp in ramps) + "   best ramp")
    for T in lengths:
        log, error, told = best[T]
        print(f"{T:7}" + "".join(f"{mean:9.4f} +-{noise:6.4f}" for mean, noise in curves[T].values())
              + (f"   {2 ** log:.0f}, times or divided by {2 ** error:.2f}" if told else "   not distinguishable"))
    points = {T: (2 ** log, math.log(2) * 2 ** log * max(error, 0.05)) for T, (log, error, _) in best.items()}
    best_ramps = {T: [round(x, 1) for x in point] for T, point in points.items()}
    found = dict(head=s["head"], tail=s["tail"], best_ramps=best_ramps, curves=curves)
    try:
        if not any(told for *_, told in best.values()):
            raise ValueError("ramps cannot be told apart at any of these lengths")
        a, b, L = fit_ramp(lengths, *([point[n] for point in points.values()] for n in (0, 1)))
        return dict(a=a, b=b, L=L) | found
    except ValueError as error:
        print(f"\nnot distinguishable ({error}): ramp {s['ramp']} is kept")
        return dict(ramp=s["ramp"]) | found


def write_sections(file: Path, record: dict) -> None:
    """An extrapolation.json with a line for each entry of its sections."""
    sections = []
    for name, section in record.items():
        lines = (f'  "{key}": {json.dumps(value)}' for key, value in section.items())
        sections.append(f' "{name}": {{\n' + ",\n".join(lines) + "\n }")
    needle.write_whole(file, "{\n" + ",\n".join(sections) + "\n}\n")


@needle.in_sentences()
def main() -> None:
    parser = needle.make_parser(__doc__, needles=32)
    parser.add_argument("method", choices=["dpe", "lampe"], help="whose settings to find")
    parser.add_argument("--len", type=needle.positive, nargs=1, default=[65536], metavar="N", dest="lengths",
                        help="tokens of the test, the longest of LaMPE's (default: 65536)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: extrapolation.json beside the checkpoint")
    args = parser.parse_args()
    if not (args.out or Path(args.ckpt).is_dir()):
        raise ValueError(f"{args.ckpt} is no directory to write extrapolation.json to: give a checkpoint's, or --out")
    args.out = args.out or Path(args.ckpt) / "extrapolation.json"
    needle.check_writable(args.out)
    record = read_json(args.out) if args.out.exists() else {}
    if not all(isinstance(section, dict) for section in record.values()):
        raise ValueError(f"{args.out} is damaged: remove it, or give another --out")
    text = needle.read_haystack(args.haystack) if args.haystack else None
    if unknown := args.set.keys() - {"dpe": {"window", "topk"}, "lampe": {"head", "tail"}}[args.method]:
        raise ValueError(f"--set {unknown.pop()} is no setting of {args.method}, or the one that is to be found")
    if needle.WORLD > args.tp:
        raise ValueError(f"there is one model to calibrate: --tp {needle.WORLD}, or fewer processes")
    model, tokenizer, _, _ = needle.load(args)
    float32_logits(model)
    s, _, _ = needle.settings(args.method, model.config, args.lengths[0], {}, args.set)
    result = {"dpe": calibrate_dpe, "lampe": calibrate_lampe}[args.method](args, model, tokenizer, text, s)
    made_with = {name: getattr(args, name) for name in ("needles", "trials", "seed", "haystack")}
    made_with = record.get("made_with", {}) | {args.method: dict(length=args.lengths[0]) | made_with}
    if not needle.RANK:
        write_sections(args.out, record | {args.method: result, "made_with": made_with})
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main()
