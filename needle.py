"""Needle in a haystack: can the model still use a sentence that lies tens of thousands of tokens back?

    python needle.py --method dpe --len 65536

A needle, "The magic number for coral otter is 40713.", is put into a haystack of other sentences at a given depth: 0 is
the start, 1 the end. The prompt ends with the needle's own words up to the number, and the model goes on greedily. The
score of a trial is the fraction of its needles whose number is in the answer. Each method sees the same prompts.
"""
# T   an input's length in tokens (--len), room for the answers included     D   head dimension, D/2 frequencies
# s   a method's settings by name        c   the model's Config              row   what is written of one trial
import argparse
import dataclasses
import itertools
import json
import os
import random
import re
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from load_llama import CheckpointError, load_model, load_tokenizer, read_json
from model import Config, KVCache, Llama, generate, memory_free, memory_per_token, queries_and_keys
from rope_extrap import (PUBLISHED, Method, contribution, dpe, dpe_scales, key_dimensions, lampe, lampe_ramp, ntk,
                         rerope, rope, self_extend, yarn)

TINY = Path(__file__).resolve().parent / "tiny"
RANK, WORLD = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun's

# ---------------------------------------------------------------------------------------------------------------------
# Prompts: a haystack of sentences from a small grammar, and needles that no sentence of it could be

LISTS = [line.split(": ") for line in (TINY / "words.txt").read_text().splitlines() if line and line[0] != "#"]
TEMPLATES = [words.split() for kind, words in LISTS if kind == "template"]
WORDS = {kind: " ".join(words for k, words in LISTS if k == kind).split() for kind, _ in LISTS if kind != "template"}
KEYS = WORDS.pop("first"), WORDS.pop("second")
QUESTION, ANSWER = "The magic number for {key} is", " {value}."


def sentence(rng: random.Random) -> str:
    """One sentence of the grammar, of 5 to 20 words."""
    words = [rng.choice(WORDS[word]) if word in WORDS else word for word in rng.choice(TEMPLATES)]
    text = " ".join(words).replace("_", " ").replace(" .", ".").replace(" ,", ",")
    text = re.sub(r"\ba (?=[aeiou])", "an ", text, flags=re.IGNORECASE)
    return text[0].upper() + text[1:]


def draw_needles(rng: random.Random, count: int, text: str = "") -> list[tuple[str, str]]:
    """`count` keys, two words that neither the grammar nor `text` has side by side, with numbers of 5 to 7 digits."""
    keys, needles = [key for a in KEYS[0] for b in KEYS[1] if (key := f"{a} {b}") not in text], []
    if count > len(keys):
        raise ValueError(f"--needles {count} is too many: there are {len(keys)} keys for them")
    for key in rng.sample(keys, count):
        digits = rng.randint(5, 7)
        needles.append((key, str(rng.randrange(10 ** (digits - 1), 10 ** digits))))
    return needles


def continuation(tokenizer, text: str) -> list[int]:
    """The tokens of " " + text where it follows a full stop, whatever the tokenizer does at the start of its input."""
    return tokenizer.encode(". " + text)[len(tokenizer.encode(".")):]


def build_prompt(tokenizer, length: int, needles: list[tuple[str, str]], depths: list[float], text: str, chat=False):
    """A haystack cut from text, with needles (key, value) at depths, then one question for each needle.

    Returns the prompt's tokens up to the first question, and a list of (question's tokens, right answer's tokens). All
    together, BOS and the answers included, are exactly `length` tokens. Errors: ValueError when that is too short.
    """
    questions = [continuation(tokenizer, QUESTION.format(key=key)) for key, _ in needles]
    statements = [continuation(tokenizer, (QUESTION + ANSWER).format(key=key, value=value)) for key, value in needles]
    answers = [statement[len(question):] for statement, question in zip(statements, questions)]
    before, after = [tokenizer.bos_id] if tokenizer.bos_id is not None else [], []
    if chat:  # the haystack and what is asked are the user's message, the questions begin the assistant's answer
        if "<|eot_id|>" not in tokenizer.special:
            raise ValueError("--chat needs Llama 3's tokenizer, and this checkpoint has another")
        start, end, stop = (tokenizer.special[f"<|{name}_id|>"] for name in ("start_header", "end_header", "eot"))
        user, assistant = ([start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]
                           for role in ("user", "assistant"))
        asked = " What are the magic numbers for " + ", ".join(key for key, _ in needles) + "?"
        before, after = before + user, tokenizer.encode(asked) + [stop] + assistant
        questions[0] = tokenizer.encode(QUESTION.format(key=needles[0][0]))
    size = length - len(before) - len(after) - sum(map(len, statements + questions + answers))
    if size < 0:
        raise ValueError(f"--len {length} is too short: needles and questions alone take {length - size} tokens")
    hay = tokenizer.encode(text)
    hay *= -(-size // len(hay))  # a short text is repeated
    stops = {token for token in set(hay) if tokenizer.decode([token]).endswith((".", "!", "?", "\n", "\u3002"))}
    end = next((n for n in range(max(size, 1), len(hay) + 1) if hay[n - 1] in stops), size)
    hay = hay[end - size:end]  # cut at its start, so that the first question follows a whole sentence
    gaps = [0, *(n + 1 for n, token in enumerate(hay) if token in stops), size]
    tokens, done = before, 0
    for depth, statement in sorted(zip(depths, statements), key=lambda pair: pair[0]):
        gap = min(gaps, key=lambda gap: abs(gap - depth * size))
        if abs(gap - depth * size) > 0.05 * size:  # a text without sentences
            gap = round(depth * size)
        tokens, done = tokens + hay[done:gap] + statement, gap
    return tokens + hay[done:] + after, list(zip(questions, answers))


# ---------------------------------------------------------------------------------------------------------------------
# Methods and their settings


class Entry(NamedTuple):
    """A method on the command line, and its settings s, by name."""
    rule: Callable[[int, int], dict]  # (training length, T) -> s
    make: Callable[[Config, int, dict], Method]  # (config, T, s) -> the method
    derive: Callable[[dict, int], dict] = lambda s, T: s  # (s, T) -> s with what follows: DPE's scales, LaMPE's ramp


FIT = "a", "b", "L", "short"  # lampe_ramp's arguments, which a published or calibrated row has instead of a ramp

# The rules bring everything far within about a quarter of the training length and keep the near sixteenth (ReRoPE's
# quarter) exact. NTK and YaRN stretch by T / n, as their papers say. DPE with one effective length is SelfExtend.
METHODS = {
    "rope": Entry(lambda n, T: {}, lambda c, T, s: rope()),
    "ntk": Entry(lambda n, T: dict(factor=max(T / n, 1.0)), lambda c, T, s: ntk(c.frequencies(), **s)),
    "yarn": Entry(lambda n, T: dict(factor=max(T / n, 1.0)),
                  lambda c, T, s: yarn(c.frequencies(), s["factor"], c.train_len)),
    "self-extend": Entry(lambda n, T: dict(window=n // 16 or 1, group=-(-4 * T // n) if T > n else 1),
                         lambda c, T, s: self_extend(**s)),
    "rerope": Entry(lambda n, T: dict(window=n // 4 or 1), lambda c, T, s: rerope(**s)),
    "dpe": Entry(lambda n, T: dict(window=n // 16 or 1, effective=[max(n // 4 if T > n else n, 1)], topk=None),
                 lambda c, T, s: dpe(s["window"], [s["scales"][f * len(s["scales"]) // (c.head_dim // 2)]
                                                   for f in range(c.head_dim // 2)]),  # groups of equal size
                 lambda s, T: s | dict(scales=s.get("scales") or dpe_scales(s["effective"], T))),
    "lampe": Entry(lambda n, T: dict(ramp=n // 4 or 1, head=n // 16 or 1, tail=n // 32),
                   lambda c, T, s: lampe(T, **s),
                   lambda s, T: s if "ramp" in s else s | dict(ramp=lampe_ramp(T, *map(s.get, FIT)))),
}


def names_of(methods) -> list[str]:
    """What --set may set for these methods: names, which are the same at any length."""
    return sorted({name for entry in map(METHODS.get, methods) for name in entry.derive(entry.rule(1, 1), 1)})


def settings(method: str, c: Config, T: int, calibrated: dict, given: dict) -> tuple[dict, str, Method]:
    """s of a method for T tokens, where they are from, and the Method.

    They are those of the last of rule, published and calibrated (extrapolation.json) that has this method, and then
    given (--set). Errors: ValueError for what is missing or does not fit.
    """
    entry, model = METHODS[method], (c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.train_len)
    published = next((row for row in PUBLISHED.values() if row["model"] == model), {})
    s, source = entry.rule(c.train_len, T), "rule from the training length"
    names = entry.derive(s, T).keys()
    for rows, place in ((published, "published for this model"), (calibrated, "extrapolation.json")):
        if method in rows:
            s, source = rows[method], place
    if own := {name: value for name, value in given.items() if name in names}:
        s, source = s | own, source + " and --set"
    try:
        s = entry.derive(s, T)
        s = {name: s[name] for name in names}  # not a, b, L ..
        if fractions := [name for name, value in s.items() if isinstance(value, float) and name != "factor"]:
            raise ValueError(f"{fractions[0]} must be a whole number")
        if s.get("factor", 1) < 1:
            raise ValueError("factor must be at least 1")
        for name, count in (("scales", len(s.get("scales", [1]))), ("topk", s.get("topk"))):
            if count is not None and not 1 <= count <= c.head_dim // 2:
                raise ValueError(f"{name}: {count} do not fit heads of {c.head_dim // 2} frequencies")
        return s, source, entry.make(c, T, s)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{method} cannot run with its settings by {source} ({type(error).__name__}: {error}): "
                         "change them, or find others with extras/calibrate.py") from None


def contributions(model: Llama, tokenizer, text: str | None, seed: int) -> list[torch.Tensor]:
    """DPE's step (b): each layer's contributions (heads, D/2), summed over 10 texts at each of 2,048, 4,096 ... tokens.

    Up to the training length, at most 8,192 for the cost; below 2,048, the training length alone.
    """
    rng, longest, sums = random.Random(seed), min(model.config.train_len, 8192), [0.0] * model.config.n_layers
    hay = tokenizer.encode(text or "")
    for size in [size for size in (2048, 4096, 8192) if size <= longest] or [longest]:
        for _ in range(10):
            tokens = hay or tokenizer.encode(" ".join(sentence(rng) for _ in range(size // 4 + 1)))
            start = rng.randrange(max(len(tokens) - size, 0) + 1)
            ids = torch.tensor([tokens[start:start + size]], device=model.tok_embeddings.weight.device)
            sums = [total + contribution(q, k) for total, (q, k) in zip(sums, queries_and_keys(model, ids))]
    return sums


def choose_methods(args: argparse.Namespace, model: Llama, tokenizer, text: str | None) -> dict:
    """{(T, method): (s, where they are from, the Method of every layer)}. Errors: ValueError."""
    file, chosen, found = Path(args.ckpt) / "extrapolation.json", {}, None
    calibrated = read_json(file) if file.exists() else {}
    for T, method in itertools.product(args.lengths, args.method):
        s, source, made = settings(method, model.config, T, calibrated, args.set)
        layers = [made] * model.config.n_layers
        if s.get("topk") not in (None, model.config.head_dim // 2):
            found = found or contributions(model, tokenizer, text, args.seed)
            device = model.tok_embeddings.weight.device  # moved once, not by every attention
            layers = [made._replace(key_dims=key_dimensions(layer, s["topk"]).to(device)) for layer in found]
        chosen[T, method] = s, source, layers
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# A trial


def draw_trial(args: argparse.Namespace, tokenizer, length: int, count: int, depth: float, name, text: str | None):
    """`count` needles from the depth on, prompt and questions; drawn from the seed and the trial's name."""
    rng = random.Random(f"{args.seed} {length} {depth} {name}")
    needles = draw_needles(rng, count, text or "")
    hay = text or " ".join(sentence(rng) for _ in range(length // 6 + 8))
    depths = [depth] + [(depth + n / count) % 1 for n in range(1, count)]
    return needles, *build_prompt(tokenizer, length, needles, depths, hay, args.chat)


def answer_questions(model: Llama, tokenizer, methods: list[Method], prompt: list[int], questions):
    """Ask each question in turn after the prompt; the answers' texts, and the seconds of prefill and of decoding."""
    def go_on(tokens, count):
        ids = torch.tensor([tokens], device=model.tok_embeddings.weight.device)
        return generate(model, ids, count, methods, tokenizer.stop_ids, cache)[0].tolist()

    size = len(prompt) + sum(len(question) + len(answer) for question, answer in questions)
    cache, pending, answers, ticks = KVCache(model.config, 1, size), [], [], [time.perf_counter()]
    go_on(prompt, 1)
    ticks.append(time.perf_counter())
    for question, answer in questions:
        new = [token for token in go_on(pending + question, len(answer)) if token not in tokenizer.stop_ids]
        known = [token for token in new if token < tokenizer.vocab_size]  # random weights answer anything
        answers.append(tokenizer.decode(known))
        pending = new[-1:] if len(new) == len(answer) else []  # the last of a full answer is not in the cache yet
    return answers, ticks[1] - ticks[0], time.perf_counter() - ticks[1]


def run_trial(args: argparse.Namespace, model: Llama, tokenizer, text: str | None, chosen: dict, trial: tuple) -> dict:
    """The row of a trial (length, method, depth, number); chosen: from choose_methods."""
    length, method, depth, number = trial
    needles, prompt, questions = draw_trial(args, tokenizer, length, args.needles, depth, number, text)
    answers, prefill, decode = answer_questions(model, tokenizer, chosen[length, method][-1], prompt, questions)
    expected = [value for _, value in needles]
    score = sum(value in re.findall(r"\d+", answer) for value, answer in zip(expected, answers)) / len(expected)
    return dict(method=method, length=length, depth=depth, trial=number, score=score, expected=expected, answer=answers,
                prefill_seconds=prefill, decode_seconds=decode)


def memory_peak(device: torch.device) -> int:
    """The most bytes used so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def read_haystack(file: str) -> str:
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    if not text.strip() or "\ufffd" in text:
        raise ValueError(f"--haystack {file} is empty, or not UTF-8 text")
    return text


def check_writable(file) -> None:
    """Say before a long run, not after it, that a file cannot be written. Errors: ValueError."""
    if Path(file).exists() and not Path(file).is_file() or not os.access(Path(file).absolute().parent, os.W_OK):
        raise ValueError(f"{file} cannot be written: it must be a file, in a directory that lets you write")


def write_whole(file, text: str) -> None:
    """Write beside the file, then rename: whatever interrupts, there is no half of a file."""
    unfinished = Path(f"{file}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)


def report(rows: list[dict], peak: int) -> None:
    """Print each method's mean scores, depth by length, then speed and memory."""
    lengths, depths = (sorted({row[key] for row in rows}) for key in ("length", "depth"))
    for method in dict.fromkeys(row["method"] for row in rows):
        print(f"\n{method:12}" + "".join(f"{length:8}" for length in lengths))
        for name, these in [*((f"depth {depth:4.2f}", [depth]) for depth in depths), ("mean", depths)]:
            found = [[row["score"] for row in rows if (row["method"], row["length"]) == (method, length)
                      and row["depth"] in these] for length in lengths]
            print(f"  {name:10}" + "".join(f"{sum(scores) / len(scores):8.2f}" for scores in found))
    tokens, seconds = (sum(row[key] for row in rows) for key in ("length", "prefill_seconds"))
    print(f"\n{tokens / seconds:,.0f} prefill tokens/s, peak memory {peak / 1e9:.2f} GB")


@contextmanager
def in_sentences():
    """Decorates a command: what goes wrong is a sentence on stderr and exit code 2, or 130 for an interrupt."""
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        yield
        if WORLD > 1:
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        leave(130, "interrupted")
    except (ValueError, OSError, CheckpointError) as error:
        leave(2, error)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            leave(2, f"out of memory ({str(error).splitlines()[0]}): try a shorter --len")
        time.sleep(10 * (WORLD > 1))  # torchrun ends a rank that lost another one, which said why
        raise


def leave(code: int, reason) -> None:
    """Exit; of several ranks, the first that fails says why. Failures are counted in torchrun's own store."""
    if WORLD == 1 or torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])).add("failed ranks", 1) == 1:
        print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    sys.exit(code)


def fail(message: str) -> None:
    raise ValueError(message)


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positives(text: str, separator: str = ",") -> list[int]:
    return [positive(part) for part in text.split(separator)]


def settings_by_hand(text: str) -> dict:
    pairs, lists = [part.split("=") for part in text.split(",")], ("effective", "scales")
    return {name: positives(value, "-") if name in lists else json.loads(value) for name, value in pairs}


def depths(text: str) -> list[float]:
    """Depths, or how many to spread evenly."""
    if text.isdecimal() and int(text):
        return [n / (int(text) - 1) for n in range(int(text))] if int(text) > 1 else [0.5]
    values = [float(part) for part in text.split(",")]
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} has depths beyond 0, the start, and 1, the end")
    return values


def make_parser(description: str, needles: int = 0) -> argparse.ArgumentParser:
    """A parser that asks for the model and, where a default number of needles is given, for trials."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--ckpt", default=os.path.relpath(TINY), metavar="DIR",
        help="checkpoint directory, or random:1b, 3b, 8b, 70b for random weights of that shape (default: tiny)")
    add("--train-len", type=positive, metavar="N", help="the model's training context (default: the checkpoint says)")
    add("--device", help="cpu, cuda, cuda:1 .. (default: cuda where there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on cuda; on the CPU as on disk")
    add("--tp", type=positive, default=1, metavar="N", help="ranks of torchrun that hold one model (default: 1)")
    if needles:
        add("--trials", type=positive, default=1, metavar="N", help="prompts for each setting and depth (default: 1)")
        add("--needles", type=positive, default=needles, metavar="N", help=f"needles per trial (default: {needles})")
        add("--haystack", metavar="FILE", help="your own text, UTF-8, instead of generated sentences")
        add("--chat", action="store_true", help="Llama 3's chat format (no other), for an Instruct model")
        add("--set", type=settings_by_hand, default={}, metavar="K=V,..",
            help=f"settings: {', '.join(names_of(METHODS))} (effective=4096-8192, scales=16-8: a number per group)")
        add("--seed", type=int, default=0, metavar="N", help="of haystacks and needles (default: 0)")
    return parser


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, needles=1)
    add = parser.add_argument
    add("--method", default="dpe", metavar="M,M..", help=f"{', '.join(METHODS)}, or all (default: dpe)")
    add("--len", type=positives, default="65536", metavar="N,N..", dest="lengths", help="tokens (default: 65536)")
    add("--depths", type=depths, default="5", metavar="D,D..", help="such as 0.0,0.5,1.0, or how many (default: 5)")
    add("--json", metavar="FILE", help="write the results there, after each trial")
    add("--plot", metavar="FILE", help="draw the heat maps there, .png or .svg (needs matplotlib)")
    args = parser.parse_args()
    args.method = list(METHODS) if args.method == "all" else args.method.split(",")
    if unknown := set(args.method) - METHODS.keys():
        fail(f"--method {unknown.pop()} is not among {', '.join(METHODS)}, all")
    if unknown := args.set.keys() - names_of(args.method):
        fail(f"--set {unknown.pop()} is no setting of {', '.join(args.method)}: {', '.join(names_of(args.method))} are")
    return args


def load(args: argparse.Namespace):
    """Model, tokenizer, device, and several ranks' mesh (replicas, tensor). Errors: ValueError, CheckpointError."""
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and WORLD > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}")
    if WORLD % args.tp:
        fail(f"--tp {args.tp} needs torchrun with {args.tp} processes or a multiple, and there are {WORLD}")
    mesh = None if WORLD == 1 else torch.distributed.init_device_mesh(
        device.type, (WORLD // args.tp, args.tp), mesh_dim_names=("replicas", "tensor"))
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else None)
    tokenizer = load_tokenizer(args.ckpt)
    model = load_model(args.ckpt, device, dtype and getattr(torch, dtype), mesh["tensor"] if args.tp > 1 else None)
    if tokenizer.vocab_size > model.config.vocab_size:
        fail(f"{args.ckpt}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {model.config.vocab_size}")
    if args.train_len:
        model.config = dataclasses.replace(model.config, train_len=args.train_len)
    size, free, T = model.tok_embeddings.weight.element_size(), memory_free(device), max(args.lengths)
    each = memory_per_token(model.config, size, args.tp)
    if free is not None and T * each > free:
        fail(f"--len {T} needs about {T * each / 1e9:.1f} GB beside the weights, and {free / 1e9:.1f} GB are free: "
             f"--len {int(free / each)} would fit")
    return model, tokenizer, device, mesh


def run_trials(args, model: Llama, tokenizer, text: str | None, chosen: dict, trials: list[tuple], mesh):
    """Yields (trial, row) as they are measured: in order, or, where replicas share the trials, the longest first."""
    replicas, mine = (mesh.size(0), mesh.get_local_rank("replicas")) if mesh else (1, 0)
    trials = sorted(trials, key=lambda trial: -trial[0]) if replicas > 1 else trials
    for n in range(0, len(trials), replicas):
        turn = trials[n:n + replicas]
        rows = [run_trial(args, model, tokenizer, text, chosen, turn[mine]) if mine < len(turn) else None] * replicas
        if replicas > 1:  # the last turn may be too short for all of them
            torch.distributed.all_gather_object(rows, rows[mine], mesh.get_group("replicas"))
        yield from zip(turn, rows)


@in_sentences()
def main() -> None:
    args = parse_arguments()
    if RANK:
        args.json = args.plot = None
    for file in filter(None, (args.json, args.plot)):
        check_writable(file)
    if args.plot and not args.plot.endswith((".png", ".svg")):
        fail(f"--plot {args.plot} must end in .png or .svg")
    if args.plot:
        from extras.figures import heat_maps
    text = read_haystack(args.haystack) if args.haystack else None
    model, tokenizer, device, mesh = load(args)
    longest = [(key, "1234567") for key, _ in draw_needles(random.Random(0), args.needles)]
    build_prompt(tokenizer, min(args.lengths), longest, [0.0] * args.needles, ".", args.chat)  # too short for a trial?
    chosen = choose_methods(args, model, tokenizer, text)
    about = dict(checkpoint=args.ckpt, train_len=model.config.train_len, needles=args.needles, haystack=args.haystack,
                 seed=args.seed, device=str(device), dtype=str(model.tok_embeddings.weight.dtype)[6:],
                 settings={f"{method} at {T}": s | {"from": source} for (T, method), (s, source, _) in chosen.items()})
    print(f"# {args.ckpt}: {sum(p.numel() for p in model.parameters()):,} parameters, trained on {about['train_len']} "
          f"tokens; {device} {about['dtype']}, seed {args.seed}"
          + "; random weights, so scores mean nothing" * args.ckpt.startswith("random:"))
    for (T, method), (s, source, _) in chosen.items():
        parts = [(name, "-".join(map(str, x)) if isinstance(x, list) else x) for name, x in s.items() if x is not None]
        print(f"# {method} at {T}: {', '.join(f'{name} {x}' for name, x in parts) or 'no settings'} ({source})")
    trials = [(T, method, depth, n) for T, method in chosen for depth in args.depths for n in range(args.trials)]
    rows = {}
    for trial, row in run_trials(args, model, tokenizer, text, chosen, trials, mesh):
        rows[trial] = row
        print(f"{row['method']:11} {row['length']:7} tokens  depth {row['depth']:4.2f}  score {row['score']:4.2f}  "
              f"expected {' '.join(row['expected'])}  answer {' '.join(map(str.strip, row['answer']))!r}  "
              f"prefill {row['prefill_seconds']:.1f} s  decode {row['decode_seconds']:.1f} s", flush=True)
        if args.json:
            record = {"results": [rows[trial] for trial in trials if trial in rows]} | about
            write_whole(args.json, json.dumps(record | {"peak_memory_bytes": memory_peak(device)}, indent=1) + "\n")
    rows = [rows[trial] for trial in trials]
    report(rows, memory_peak(device))
    if args.plot:
        heat_maps(rows, args.plot)


if __name__ == "__main__":
    main()
