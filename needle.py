"""Needle in a haystack: does the model find a sentence that is tens of thousands of tokens back?

    python needle.py --method dpe --len 65536

A needle such as "The magic number for coral otter is 40713.", with the key "coral otter" and the
value 40713, is inserted into a haystack of other sentences at a given depth: 0 is the start, 1 the
end. The prompt is followed by a question, the needle's words up to the value, and the model
continues greedily. The score of a trial is the share of its needles whose value is in the answer.
All methods see the same prompts.
"""
import argparse
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from load_llama import CheckpointError, load_model, load_tokenizer, read_json
from model import Config, KVCache, Llama, generate, measure_contributions
from rope_extrap import (
    PUBLISHED,
    Method,
    dpe,
    dpe_scales,
    key_dimensions,
    lampe,
    mapping_length,
    ntk,
    relative_positions,
    rerope,
    rope,
    self_extend,
    yarn,
)
from tiny.grammar import ANSWER, QUESTION, TINY, draw_needles, free_keys, sentence

# -------------------------------------------------------------------------------------------------
# Prompts


# A haystack is cut into pieces. A piece ends after a sentence that white space follows, before a
# line break, or after a full stop of a script that puts no white space there. A stop after a digit,
# as in "3.", does not end a sentence. If none of these ends comes within 500 characters, the
# piece ends before white space. No piece ends inside a word or a number.
PIECE = re.compile(r"""
    .{1,500}? (?: (?<!\d) [.!?] ["'”’)\]]* (?=\s) | (?=\n) | [。！？।؟۔] )
    | .{1,500} (?= \s | \Z )
    | \s* \S+
    """, re.DOTALL | re.VERBOSE)


def encode_after(tokenizer, text: str) -> list[int]:
    """The tokens of a text that continues another one.

    It is encoded with a letter before it, since some tokenizers treat the start of a text
    differently.
    """
    before = tokenizer.encode("a")
    tokens = tokenizer.encode("a" + text)
    if tokens[:len(before)] != before:  # the letter and the text share a token
        return tokenizer.encode(text)
    return tokens[len(before):]


def start_of_text(tokenizer) -> list[int]:
    """What every text begins with: BOS, or nothing if the tokenizer has none."""
    if tokenizer.bos_id is None:
        return []
    return [tokenizer.bos_id]


def make_haystack(tokenizer, text: str) -> tuple[list[tuple[str, list[int]]], list[str]]:
    """The pieces of a text, each with its tokens, and the keys for needles that are not in it."""
    pieces = [(piece, encode_after(tokenizer, piece)) for piece in PIECE.findall(" " + text)]
    return pieces, free_keys(text)


def cut_haystack(tokenizer, pieces: list[tuple[str, list[int]]], size: int) -> list[list[int]]:
    """The tokens of the first pieces, exactly `size` in all. A short text is repeated.

    The last piece is whole. The first one is cut to fit, at a character, and padded with blanks.
    """
    chosen = []
    total = 0
    for piece in itertools.cycle(pieces):
        chosen.append(piece)
        total += len(piece[1])
        if total >= size:
            break
    while total - len(chosen[0][1]) >= size:
        total -= len(chosen.pop(0)[1])
    text, tokens = chosen[0]
    wanted = len(tokens) - (total - size)
    while len(tokens) > wanted:
        text = text[1:]
        tokens = encode_after(tokenizer, " " + text)
    blank = encode_after(tokenizer, " ")
    first = blank * (wanted - len(tokens)) + tokens
    return [first] + [tokens for _, tokens in chosen[1:]]


def build_prompt(tokenizer, pieces: list[tuple[str, list[int]]], length: int,
                 needles: list[tuple[str, str]],
                 depths: list[float]) -> tuple[list[int], list[tuple[list, list]]]:
    """A haystack of pieces, with the needles (key, value) inserted between them, near their depths.

    Returns the prompt's tokens, and for each needle the tokens of its question and of the right
    answer. The prompt, with BOS, and the longest question with its answer total `length` tokens.
    Raises ValueError if `length` is too short for that.
    """
    end = []
    if not all(text[0].isspace() for text, _ in pieces):
        end = encode_after(tokenizer, " ")  # white space after the needle
    asked = []
    statements = []
    for key, value in needles:
        words = " " + QUESTION.format(key=key)
        question = encode_after(tokenizer, words)
        statement = encode_after(tokenizer, words + ANSWER.format(value=value))
        asked.append((question, statement[len(question):]))
        statements.append(statement + end)

    # The haystack takes the rest.
    start = start_of_text(tokenizer)
    lengths = [len(statement) for statement in statements]
    size = length - len(start) - sum(lengths) - max(lengths) + len(end)
    if size < 1:
        raise ValueError(f"--len {length} is too short: needles and question take "
                         f"{length - size} tokens (a comma separates lengths)")
    hay = cut_haystack(tokenizer, pieces, size)
    gaps = list(itertools.accumulate(map(len, hay), initial=0))  # tokens before each gap
    for depth, statement in zip(depths, statements, strict=True):
        nearest = min(range(len(gaps)), key=lambda n: abs(gaps[n] - depth * size))
        hay.insert(nearest, statement)
        gaps.insert(nearest, gaps[nearest])
    return start + list(itertools.chain.from_iterable(hay)), asked


def draw_trial(tokenizer, haystack: tuple | None, length: int, n_needles: int, depth: float,
               seed):
    """Draw needles, the first at this depth and the rest evenly spaced after it, wrapping around.

    haystack is what make_haystack returns; None generates sentences. The draw depends on the seed,
    the length, the depth and the haystack. Returns the needles, the prompt and the questions.
    """
    rng = random.Random(f"{seed} {length} {depth}")
    if haystack is None:
        text = " ".join(sentence(rng) for _ in range(length // 6 + 8))
        haystack = make_haystack(tokenizer, text)
    pieces, keys = haystack
    needles = draw_needles(rng, n_needles, keys)
    depths = [(depth + n / n_needles) % 1 if n else depth for n in range(n_needles)]
    return needles, *build_prompt(tokenizer, pieces, length, needles, depths)


# -------------------------------------------------------------------------------------------------
# Methods and their settings
#
# A rule maps a model's Config and the input's length l to settings. If the input is longer than
# three quarters of the training length n, SelfExtend, LaMPE and DPE's slow groups compress it to
# about 3n/4 positions (LaMPE: a mapping length of 5n/8, plus what s1 and s2 add). Few training
# texts are longer than that: SmolLM2, trained on 8,192 tokens, already loses the needles at the
# start of a prompt of 8,192. The nearest n/8 tokens stay exact. DPE's fast groups use n/4 instead
# of 3n/4, and ReRoPE clips at n/4. NTK and YaRN stretch by l/n, as their papers say.


def stretch_rule(config: Config, l: int) -> dict:
    return dict(factor=max(l / config.train_len, 1.0))


def self_extend_rule(config: Config, l: int) -> dict:
    return dict(window=config.train_len // 8, group=math.ceil(4 * l / (3 * config.train_len)))


def rerope_rule(config: Config, l: int) -> dict:
    return dict(window=config.train_len // 4)


def dpe_rule(config: Config, l: int) -> dict:
    """Coarse positions for fast frequencies, finer ones for slow frequencies.

    A group whose slowest frequency completes a rotation within the training length has seen
    every angle in training. It serves mainly to tell near tokens apart, so it gets the coarser
    positions.
    """
    n = config.train_len
    usable = 3 * n // 4
    wavelengths = (2 * math.pi / config.frequencies()).tolist()  # in tokens
    n_groups = min(8, len(wavelengths))
    effective_lengths = []
    for group in range(n_groups):
        slowest = math.ceil((group + 1) * len(wavelengths) / n_groups) - 1
        has_seen_every_angle = wavelengths[slowest] <= n
        effective_lengths.append(n // 4 if has_seen_every_angle and l > usable else usable)
    return dict(window=n // 8, effective_lengths=effective_lengths)


def lampe_rule(config: Config, l: int) -> dict:
    n = config.train_len
    mapping_len = 3 * n // 4
    if l > mapping_len:
        mapping_len = 5 * n // 8  # s1 and s2 add at most 5n/32 positions
    return dict(mapping_len=mapping_len, s1=n // 8, s2=n // 32)


def make_dpe(config: Config, l: int, window: int, scales: str, topk: int | None = None) -> Method:
    """scales has one scale per group of frequencies, fastest first, as in 8-8-4-2.

    The groups have equal sizes, or sizes that differ by one.

    topk, the number of each head's key dimensions, is only checked here: see methods_of_layers.
    """
    of_groups = scales_of_groups(scales)
    n_frequencies = config.head_dim // 2
    if len(of_groups) > n_frequencies or topk not in (None, *range(1, n_frequencies + 1)):
        raise ValueError(f"heads have {n_frequencies} frequencies, so at most as many scales, and "
                         f"topk from 1 to {n_frequencies}")
    return dpe(window, scale_of_each_frequency(of_groups, n_frequencies))


def scales_of_groups(scales: str) -> list[int]:
    """8-8-4-2 as a list."""
    return [int(scale) for scale in str(scales).split("-")]


def scale_of_each_frequency(of_groups: list[int], n_frequencies: int) -> list[int]:
    """The scale of each frequency: that of its group."""
    return [of_groups[f * len(of_groups) // n_frequencies] for f in range(n_frequencies)]


METHODS = {  # a rule, and a function that makes the method; its further arguments are the settings
    "rope": (lambda config, l: {},
             lambda config, l: rope()),
    "ntk": (stretch_rule,
            lambda config, l, factor: ntk(config.frequencies(), factor)),
    "yarn": (stretch_rule,
             lambda config, l, factor: yarn(config.frequencies(), factor, config.train_len)),
    "self-extend": (self_extend_rule,
                    lambda config, l, window, group: self_extend(window, group)),
    "rerope": (rerope_rule,
               lambda config, l, window: rerope(window)),
    "dpe": (dpe_rule, make_dpe),
    "lampe": (lampe_rule,
              lambda config, l, mapping_len, s1, s2: lampe(l, mapping_len, s1, s2)),
}


def setting_names(name: str) -> list[str]:
    """The settings of a method. Every method has logit_scale."""
    _, make = METHODS[name]
    return list(inspect.signature(make).parameters)[2:] + ["logit_scale"]


def make_method(name: str, config: Config, l: int, logit_scale: float | None = None,
                **settings) -> Method:
    """A method with these settings. logit_scale replaces the method's own.

    Raises TypeError or ValueError if a setting is missing, unknown or out of range.
    """
    _, make = METHODS[name]
    method = make(config, l, **settings)
    if logit_scale is None:
        return method
    if not 0 < logit_scale < math.inf:
        raise ValueError("logit_scale must be a positive number")
    return replace(method, logit_scale=logit_scale)


def choose(name: str, config: Config, l: int, calibrated: dict,
           by_hand: dict) -> tuple[dict, str, Method]:
    """The settings of a method for an input of l tokens, where they come from, and the method.

    calibrated is the content of extrapolation.json. It takes precedence over what is published for
    this model, which takes precedence over the rule. by_hand (--set) replaces single settings.
    Raises ValueError if a setting is missing, unknown or out of range.
    """
    if min(l, config.train_len) < 1:
        raise ValueError("--len and --train-len must be at least 1")
    rule, _ = METHODS[name]
    sources = {"the rule for this training length": rule(config, l)}
    shape = (config.dim, config.n_layers, config.vocab_size, config.train_len)
    for model_name, published in PUBLISHED.items():
        if published["shape"] == shape and name in published:
            sources[f"published for {model_name}"] = published[name]
    if name in calibrated:
        sources["extrapolation.json"] = calibrated[name]["settings"]
    source, settings = sources.popitem()  # the last one
    own = {key: value for key, value in by_hand.items() if key in setting_names(name)}
    if own:
        source += " and --set"
    try:
        settings = at_length(l, **settings) | own
        return settings, source, make_method(name, config, l, **settings)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{name} does not work with {settings}, from {source}: {error}") from None


def at_length(l: int, effective_lengths=None, sigmoid=None, **settings) -> dict:
    """The settings for l tokens: scales from effective lengths, and LaMPE's mapping length."""
    if effective_lengths is not None:
        settings["scales"] = "-".join(map(str, dpe_scales(effective_lengths, l)))
    if sigmoid is not None:
        settings["mapping_len"] = mapping_length(l, **sigmoid)
    return settings


def choose_all(args: argparse.Namespace, config: Config) -> dict:
    """{length: {method's name: what choose returns}} for all --len and --method."""
    names = list(METHODS) if args.method == "all" else args.method.split(",")
    by_hand = dict(args.set)
    for name in set(names) - METHODS.keys():
        raise ValueError(f"--method {name} is not one of {', '.join(METHODS)}, all")
    for setting in by_hand.keys() - {known for name in names for known in setting_names(name)}:
        raise ValueError(f"--set {setting} is not a setting of {', '.join(names)}")
    file = Path(args.ckpt) / "extrapolation.json"
    calibrated = read_json(file) if file.exists() else {}
    if not all("settings" in section for section in calibrated.values()):
        raise ValueError(f"{file} is in the form of an earlier version; remove it, and run "
                         f"extras.calibrate again")
    return {l: {name: choose(name, config, l, calibrated, by_hand) for name in names}
            for l in sorted(args.lengths)}


def record_of(chosen: dict) -> dict:
    """What choose_all returns, for --json."""
    record = {}
    for length, of_length in chosen.items():
        for name, (settings, source, _) in of_length.items():
            record[f"{name} at {length}"] = settings | {"from": source}
    return record


def coincidence(name: str, settings: dict, method: Method, config: Config, l: int) -> str | None:
    """A sentence naming the simpler method that these settings reduce this one to, or None."""
    row = relative_positions(method, l, first=l - 1).view(l, -1)  # what the last query sees
    is_rope = (row == torch.arange(l).flip(0)[:, None]).all()
    own = config.frequencies()
    scaled = ""
    if method.logit_scale != 1:
        scaled = f", with logits multiplied by {method.logit_scale:.4g}"
    if is_rope and (method.frequencies is None or torch.allclose(method.frequencies, own)):
        return f"this is RoPE{scaled}"
    if name == "dpe" and all_are_key(settings, config) and (row == row[:, :1]).all():
        return f"all scales are equal, so this is SelfExtend{scaled}"
    return None


def all_are_key(settings: dict, config: Config) -> bool:
    """Whether all dimensions are key dimensions, so that nothing has to be measured."""
    return settings.get("topk") in (None, config.head_dim // 2)


def methods_of_layers(chosen: dict, model: Llama, tokenizer, text: str | None, seed) -> dict:
    """{length: {name: (settings, source, Method)}} -> {length: {name: [Method of each layer]}}.

    Layers can differ only in their key dimensions. Contributions, which determine these, are
    measured once, and only if needed.
    """
    @functools.cache
    def contributions():
        texts = draw_texts(tokenizer, text, model.config.train_len, seed)
        return measure_contributions(model, texts)

    layers = {}
    for length, of_length in chosen.items():
        layers[length] = {}
        for name, (settings, _, method) in of_length.items():
            if all_are_key(settings, model.config):
                layers[length][name] = [method] * model.config.n_layers
            else:
                is_key = [key_dimensions(layer, settings["topk"]) for layer in contributions()]
                layers[length][name] = [replace(method, key_dims=x) for x in is_key]
    return layers


def draw_texts(tokenizer, text: str | None, train_len: int, seed) -> list[list[int]]:
    """DPE, step (b): 10 texts of each of the lengths 2,048, 4,096 and 8,192 tokens.

    Lengths beyond the training length are left out; if all are, the training length is used. Each
    text begins with BOS. They are cut from `text`, or from generated sentences; a short text gives
    shorter ones.
    """
    rng = random.Random(seed)
    tokens = tokenizer.encode(text or " ".join(sentence(rng) for _ in range(10_000)))
    sizes = [size for size in (2048, 4096, 8192) if size <= train_len] or [train_len]
    bos = start_of_text(tokenizer)
    texts = []
    for size in sizes * 10:
        from_text = size - len(bos)
        start = rng.randrange(max(len(tokens) - from_text, 0) + 1)
        texts.append(bos + tokens[start:start + from_text])
    return texts


# -------------------------------------------------------------------------------------------------
# A trial


def prefill(model: Llama, methods: list[Method], prompt: list[int], room: int) -> KVCache:
    """A cache that holds the prompt and has room for `room` more tokens."""
    cache = model.new_cache(1, len(prompt) + room)
    tokens = torch.tensor([prompt], device=cache.k.device)
    with torch.inference_mode():
        model(tokens, methods, cache, last=1)
    return cache


def score_answer(model: Llama, methods: list[Method], cache: KVCache, question: list[int],
                 answer: list[int]) -> float:
    """The log-likelihood of an answer, in nats.

    The question follows what the cache holds. The cache is left unchanged.
    """
    start = cache.length
    tokens = torch.tensor([question + answer], device=cache.k.device)
    with torch.inference_mode():
        logits = model(tokens[:, :-1], methods, cache, last=len(answer))[0]  # (n, vocab_size)
    cache.length = start
    targets = tokens[0, -len(answer):, None]  # (n, 1)
    return logits.log_softmax(dim=-1).gather(1, targets).sum().item()


def greedy_answer(model: Llama, tokenizer, methods: list[Method], cache: KVCache,
                  question: list[int], max_new: int) -> str:
    """The model's greedy answer to a question that follows what the cache holds.

    The cache is left unchanged.
    """
    start = cache.length
    tokens = torch.tensor([question], device=cache.k.device)
    new = generate(model, tokens, max_new, methods, tokenizer.stop_ids, cache)[0].tolist()
    cache.length = start
    # The embedding may have more rows than the tokenizer has tokens.
    return tokenizer.decode([token for token in new if token not in tokenizer.stop_ids
                             and token < tokenizer.vocab_size])


def run_trial(model: Llama, tokenizer, methods: list[Method], needles: list[tuple[str, str]],
              prompt: list[int], questions: list[tuple[list, list]]) -> dict:
    """Ask every question by itself, right after the prompt. Returns the results, for --json."""
    start = time.perf_counter()
    room = max(len(question) + len(answer) for question, answer in questions)
    cache = prefill(model, methods, prompt, room)
    prefill_seconds = time.perf_counter() - start
    answers = []
    log_likelihoods = []
    for question, answer in questions:
        log_likelihood = score_answer(model, methods, cache, question, answer)
        log_likelihoods.append(round(log_likelihood, 4))
        answers.append(greedy_answer(model, tokenizer, methods, cache, question, len(answer)))
    expected = [value for _, value in needles]
    found = [value in re.findall(r"\d+", answer)
             for value, answer in zip(expected, answers, strict=True)]
    return dict(score=statistics.mean(found), expected=expected, answer=answers,
                log_likelihood=log_likelihoods, prefill_seconds=prefill_seconds)


# -------------------------------------------------------------------------------------------------
# Output


def header_lines(chosen: dict, config: Config) -> Iterator[str]:
    """Each method's settings, where they come from, and what simpler method they amount to."""
    for length, of_length in chosen.items():
        for name, (settings, source, method) in of_length.items():
            shown = ", ".join(f"{key} {value}" for key, value in settings.items())
            yield f"# {name} at {length}: {shown or 'no settings'} ({source})"
            simpler = coincidence(name, settings, method, config, length)
            if simpler is not None:
                yield f"# {name} at {length}: {simpler}"


def print_header(args: argparse.Namespace, model: Llama, chosen: dict) -> None:
    """Print the model, and each method with its settings."""
    weight = model.tok_embeddings.weight
    parameters = sum(parameter.numel() for name, parameter in model.named_parameters()
                     if name != "output.weight" or not model.config.tied)
    print(f"# {args.ckpt}: {parameters:,} parameters, trained on {model.config.train_len} tokens; "
          f"{weight.device}, {weight.dtype}, seed {args.seed}")
    for line in header_lines(chosen, model.config):
        print(line)


def print_row(row: dict, seconds_left: float) -> None:
    expected = " ".join(row["expected"])
    answer = " ".join(text.strip() for text in row["answer"])
    print(f"{row['method']:11} {row['length']:7} tokens  depth {row['depth']:4.2f}  "
          f"score {row['score']:4.2f}  expected {expected}  answer {answer!r}  "
          f"prefill {row['prefill_seconds']:.1f} s  {seconds_left:.0f} s left", flush=True)


def mean_score(rows: list[dict], **where) -> float:
    """The mean score of the rows with these values."""
    return statistics.mean(row["score"] for row in rows if where.items() <= row.items())


def print_summary(rows: list[dict]) -> None:
    """Print the mean scores of each method, depths by lengths, and the speed."""
    lengths = sorted({row["length"] for row in rows})
    for method in sorted({row["method"] for row in rows}):
        print(f"\n{method:12}" + "".join(f"{length:8}" for length in lengths))
        for depth in sorted({row["depth"] for row in rows}):
            scores = [mean_score(rows, method=method, depth=depth, length=l) for l in lengths]
            print(f"  depth {depth:4.2f}" + "".join(f"{score:8.2f}" for score in scores))
        means = [mean_score(rows, method=method, length=l) for l in lengths]
        print("  mean      " + "".join(f"{score:8.2f}" for score in means))
    seconds = sum(row["prefill_seconds"] for row in rows)
    print(f"\n{sum(row['length'] for row in rows) / seconds:,.0f} prefill tokens/s")


def heat_maps(rows: list[dict], file: str) -> None:
    """Draw the mean scores of each method by depth and length."""
    import matplotlib.pyplot as plt
    methods = sorted({row["method"] for row in rows})
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    figure, axes = plt.subplots(1, len(methods), figsize=(2 + 3 * len(methods), 4), squeeze=False,
                                layout="constrained")
    for axis, method in zip(axes[0], methods, strict=True):
        scores = [[mean_score(rows, method=method, depth=depth, length=l) for l in lengths]
                  for depth in depths]
        image = axis.imshow(scores, aspect="auto", cmap="cividis", vmin=0, vmax=1)
        axis.set(title=method, xlabel="length, tokens", ylabel="depth of the needle",
                 xticks=range(len(lengths)), xticklabels=lengths,
                 yticks=range(len(depths)), yticklabels=depths)
    figure.colorbar(image, ax=axes, label="needles found")
    figure.savefig(file)


def last_change(file: Path) -> int:
    """When a file was last written, in nanoseconds, or 0 if there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


def replace_whole(file: Path, text: str, seen: int) -> int:
    """Write a file, unless another process has changed it since `seen`, a last_change().

    Returns the new last_change(). Raises ValueError if another process has changed the file.
    """
    unfinished = Path(f"{file}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    if last_change(file) != seen:
        raise ValueError(f"another process has written {file}; the results of this one are in "
                         f"{unfinished}")
    unfinished.replace(file)
    return last_change(file)


# -------------------------------------------------------------------------------------------------
# Command line


def numbers(text: str) -> list[int]:
    """4096,65536 as a list, in which equal numbers count once."""
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def depths(text: str) -> list[float]:
    return list(dict.fromkeys(float(part) for part in text.split(",")))


def settings(text: str) -> list[tuple]:
    """window=512,scales=8-8-4-2 as pairs (name, value)."""
    pairs = []
    for part in text.split(","):
        name, value = part.split("=")
        if name != "scales":
            value = float(value) if name in ("factor", "logit_scale") else int(value)
        pairs.append((name, value))
    return pairs


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that choose model, lengths and settings; for extras too."""
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", default=os.path.relpath(TINY), metavar="DIR",
        help="checkpoint directory (default: the bundled model)")
    add("--len", type=numbers, default="65536", metavar="N,N,...", dest="lengths",
        help="lengths of the input, in tokens (default: 65536)")
    add("--train-len", type=int, metavar="N",
        help="training length in tokens (default: the checkpoint's)")
    add("--set", type=settings, action="extend", default=[], metavar="NAME=VALUE,...",
        help="settings to override; scales takes one value per group, as in scales=8-8-4-2")
    add("--haystack", metavar="FILE", help="UTF-8 text (default: generated sentences)")
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="default: bfloat16 on CUDA, the checkpoint's dtype on a CPU")
    return parser


@contextmanager
def errors_in_one_sentence(parser: argparse.ArgumentParser):
    """Turn an expected error into a sentence on stderr, and exit code 2, or 130 if interrupted."""
    sys.stdout.reconfigure(errors="backslashreplace")  # answers may hold any character
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    except ImportError as error:
        hint = f"pip install {error.name}" if error.name else error
        parser.exit(2, f"{parser.prog}: a package is missing: {hint}\n")
    except (ValueError, OSError, CheckpointError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate" not in str(error):
            raise
        parser.exit(2, f"{parser.prog}: out of memory; try a shorter --len\n")


def load(args: argparse.Namespace, load_model) -> tuple:
    """Model, tokenizer, and the text of --haystack, or None.

    Raises CheckpointError, OSError, or ValueError if an option does not fit.
    """
    text = args.haystack and read_text(args.haystack)
    check_device(args.device)
    if args.dtype is None and args.device.startswith("cuda"):
        args.dtype = "bfloat16"
    dtype = args.dtype and getattr(torch, args.dtype)
    tokenizer = load_tokenizer(args.ckpt)
    model = load_model(args.ckpt, args.device, dtype)
    if args.train_len is not None:
        model.config = replace(model.config, train_len=args.train_len)
    return model, tokenizer, text


def check_device(name: str) -> None:
    """Raises ValueError if --device cannot be used."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None


def read_text(file: str) -> str:
    """The text of a UTF-8 file. Raises OSError, or ValueError if it is empty or not UTF-8."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def main(load_model=load_model) -> None:
    """load_model(path, device, dtype) loads the model; extras/parallel.py passes another."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--method", default="dpe", metavar="M,M,...",
        help=f"{', '.join(METHODS)}, or all (default: dpe)")
    add("--depths", type=depths, default="0,0.25,0.5,0.75,1", metavar="D,D,...",
        help="depths of the needle, from 0 to 1 (default: 0,0.25,0.5,0.75,1)")
    add("--trials", type=int, default=1, metavar="N",
        help="prompts for each length and depth (default: 1)")
    add("--needles", type=int, default=1, metavar="N",
        help="needles in each prompt (default: 1)")
    add("--json", metavar="FILE", help="write the results to FILE, replacing it, after each trial")
    add("--plot", metavar="FILE", help="draw heat maps to FILE, .png or .svg (needs matplotlib)")
    args = parser.parse_args()
    with errors_in_one_sentence(parser):
        run(args, load_model)


def run(args: argparse.Namespace, load_model) -> None:
    """Run all trials, and print and write their results."""
    if min(args.trials, args.needles) < 1 or not 0 <= min(args.depths) <= max(args.depths) <= 1:
        raise ValueError("--trials and --needles must be at least 1, and --depths from 0 to 1")
    for file in filter(None, (args.json, args.plot)):  # fails now, not after the first trial
        if not os.access(Path(file).parent, os.W_OK) or Path(file).is_dir():
            raise ValueError(f"{file} cannot be written; its directory must exist and be writable")
    if args.plot:
        import matplotlib  # noqa: F401
        if not args.plot.endswith((".png", ".svg")):
            raise ValueError(f"--plot {args.plot} must end with .png or .svg")
    model, tokenizer, text = load(args, load_model)
    chosen = choose_all(args, model.config)
    print_header(args, model, chosen)
    layers = methods_of_layers(chosen, model, tokenizer, text, args.seed)
    haystack = text and make_haystack(tokenizer, text)
    if min(layers) < 100 * (args.needles + 1):  # perhaps too short: draw all prompts, to find out
        for depth, number in itertools.product(args.depths, range(args.trials)):
            draw_trial(tokenizer, haystack, min(layers), args.needles, depth, (args.seed, number))

    record = dict(checkpoint=args.ckpt, train_len=model.config.train_len, needles=args.needles,
                  haystack=args.haystack, seed=args.seed, device=args.device,
                  dtype=str(model.tok_embeddings.weight.dtype), settings=record_of(chosen))
    seen = last_change(Path(args.json or ""))
    rows = []
    start = time.perf_counter()
    trials = list(itertools.product(layers, args.depths, range(args.trials)))
    tokens = sum(length * len(layers[length]) for length, _, _ in trials)
    for length, depth, number in trials:
        trial = draw_trial(tokenizer, haystack, length, args.needles, depth, (args.seed, number))
        for name, methods in layers[length].items():
            row = dict(method=name, length=length, depth=depth, trial=number)
            row |= run_trial(model, tokenizer, methods, *trial)
            rows.append(row)
            done = sum(row["length"] for row in rows)
            print_row(row, (time.perf_counter() - start) * (tokens / done - 1))
            if args.json:
                text_of_file = json.dumps({"results": rows, **record}, indent=1) + "\n"
                seen = replace_whole(Path(args.json), text_of_file, seen)
    print_summary(rows)
    if args.plot:
        heat_maps(rows, args.plot)


if __name__ == "__main__":
    main()
