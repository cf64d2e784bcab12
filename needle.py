"""Needle in a haystack: can the model still use a sentence that lies tens of thousands of tokens back?

    python needle.py --method dpe --len 65536

A needle, "The magic number for coral otter is 40713.", is put into a haystack of other sentences at a given depth: 0 is the
start, 1 the end. The prompt ends with the needle's own words up to the number, and the model goes on greedily. The score of a
trial is the fraction of its needles whose number is in the answer. Each method sees the same prompts.
"""
import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import re
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import torch

from load_llama import CheckpointError, load_model, load_tokenizer
from model import Config, KVCache, Llama, generate, queries_and_keys
from rope_extrap import (PUBLISHED, Method, detect_scales, dpe, fit_ramp, fitted_ramp, key_dimensions, lampe, lampe_ramp, ntk, rerope, rope,
                         self_extend, yarn)

# ---------------------------------------------------------------------------------------------------------------------
# The generated haystack: sentences from a small grammar, and needles that no sentence of it could be

WORDS = {name: words.split() for name, words in dict(
    Name="Alice Amir Anna Boris Carla Clara David Elena Emil Farid Grace Hanna Igor Ivan Jonas Julia Karim Laura Leon Lucia "
         "Marco Maria Nadia Nils Olga Oscar Paula Pedro Rosa Samir Simon Sofia Tomas Vera Walter Yusuf",
    Place="Athens Bergen Bilbao Cairo Dublin Geneva Genoa Ghent Hanoi Krakow Lagos Lima Lisbon Lyon Malta Milan Nairobi Oslo "
          "Porto Prague Quito Riga Seville Sofia Tallinn Tunis Turin Utrecht Vienna Zagreb",
    thing="apple barrel basket bell blanket boat book bottle bowl box bread bridge brush bucket button candle carpet cart chair "
          "cheese clock coat coin cup curtain desk door drum engine fence flag flute garden gate glass glove guitar hammer hat "
          "kettle key knife ladder lamp lantern letter lock map mirror mug needle notebook oven paint paper pencil piano picture "
          "pillow plate pot radio ribbon ring rope saddle scarf shelf shirt shoe sofa spoon stove table tent ticket towel toy "
          "umbrella vase violin wagon wallet watch wheel window",
    quality="beautiful bitter black blue bright broken brown calm cheap clean cold dark dry dusty early empty famous fine "
            "foreign fresh golden gray green heavy honest huge large late light little long loud modern narrow new old "
            "painted plain pretty proud quiet rare red rough round sharp short silver simple small soft square strange strong "
            "sweet tall thick thin tiny warm wet white wide wooden yellow young",
    person="actor baker banker barber captain carpenter clerk cook dancer doctor driver farmer fisher gardener guard guest "
           "hunter judge lawyer merchant miller neighbor nurse painter pilot poet porter priest sailor scholar singer soldier "
           "student tailor teacher traveler visitor waiter widow writer",
    did="admired borrowed bought broke brought carried chose cleaned copied covered drew dropped dragged fixed forgot found "
        "gave guarded hid kept lifted liked lost mended missed moved needed noticed offered opened painted praised pushed "
        "received repaired returned showed sold stole studied touched traded wanted washed",
    went="arrived danced laughed listened rested returned sang slept smiled stayed traveled waited walked wandered worked",
    how="again alone badly boldly calmly carefully eagerly gladly happily loudly often openly politely proudly quickly quietly "
        "rarely sadly slowly softly together twice",
    where="behind beside near under above outside inside",
    when="yesterday today tonight in_spring in_summer in_autumn in_winter at_dawn at_noon at_night before_lunch after_dinner "
         "last_week last_month last_year every_morning every_evening on_Monday on_Friday on_Sunday",
).items()}
TEMPLATES = [t.split() for t in (
    "Name did the quality thing .", "Name did a thing and a quality thing when .", "The person from Place did the thing how .",
    "In Place , the person did a quality thing .", "Name and Name went how in Place .", "The quality thing was where the thing .",
    "When Name went in Place , the person did the thing .", "The person did the thing , but Name did the quality thing .",
    "A quality person went where the quality thing .", "when , Name did every thing in the house .",
    "Nobody in Place did the thing that the quality person did when .", "The thing of Name was quality and quality .",
    "Name traveled to Place when .", "There was a quality thing where the thing of the person .",
    "The quality person and Name did the same thing how .", "Name said that the thing in Place was too quality .")]
KEYS = ("amber azure cobalt copper coral crimson crystal ebony emerald frozen granite hidden hollow indigo iron ivory jade "
        "lunar magenta marble misty mystic olive orange pearl polar purple quartz royal ruby rusty sacred scarlet secret solar "
        "stellar turquoise velvet violet wild".split(),
        "badger beaver bison camel cheetah cobra condor cougar coyote crane dolphin dragon eagle falcon ferret gazelle gecko "
        "giraffe gopher gorilla hamster hawk heron hornet iguana jackal jaguar koala lemur leopard lizard llama lobster lynx "
        "magpie meerkat moose octopus osprey otter owl panda panther parrot pelican penguin puffin python raccoon raven "
        "salmon scorpion shark sparrow squid stork tiger toucan turtle viper walrus weasel wolf wombat zebra".split())
QUESTION, ANSWER = "The magic number for {key} is", " {value}."


def sentence(rng: random.Random) -> str:
    """One sentence of the grammar, of 5 to 20 words."""
    words = [rng.choice(WORDS[word]) if word in WORDS else word for word in rng.choice(TEMPLATES)]
    text = " ".join(words).replace("_", " ").replace(" .", ".").replace(" ,", ",")
    text = re.sub(r"\ba (?=[aeiou])", "an ", text, flags=re.IGNORECASE)
    return text[0].upper() + text[1:]


def draw_needles(rng: random.Random, count: int, text: str = "") -> list[tuple[str, str]]:
    """`count` different keys, two words that neither the grammar nor `text` has side by side, and numbers of 5 to 7 digits."""
    needles = []
    for key in rng.sample([key for a in KEYS[0] for b in KEYS[1] if (key := f"{a} {b}") not in text], count):
        digits = rng.randint(5, 7)
        needles.append((key, str(rng.randrange(10 ** (digits - 1), 10 ** digits))))
    return needles


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


def continuation(tokenizer, text: str) -> list[int]:
    """The tokens of " " + text where it follows a full stop, whatever the tokenizer does at the start of its input."""
    return tokenizer.encode(". " + text)[len(tokenizer.encode(".")):]


def chat_header(tokenizer, role: str) -> list[int]:
    start, end = (tokenizer.special[f"<|{name}_header_id|>"] for name in ("start", "end"))
    return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]


def build_prompt(tokenizer, length: int, needles: list[tuple[str, str]], depths: list[float], text: str, chat: bool = False):
    """A haystack cut from text, with needles (key, value) at depths, then one question for each needle.

    Returns the prompt's tokens up to the first question, and a list of (question's tokens, right answer's tokens). All
    together, BOS and the answers included, are exactly `length` tokens. Errors: ValueError when that is too short.
    """
    questions = [continuation(tokenizer, QUESTION.format(key=key)) for key, _ in needles]
    statements = [continuation(tokenizer, (QUESTION + ANSWER).format(key=key, value=value)) for key, value in needles]
    answers = [statement[len(question):] for statement, question in zip(statements, questions)]
    before, after = [tokenizer.bos_id] if tokenizer.bos_id is not None else [], []
    if chat:  # Llama 3's headers: the haystack and what is asked are the user's, the questions begin the assistant's answer
        asked = " What are the magic numbers for " + ", ".join(key for key, _ in needles) + "?"
        before += chat_header(tokenizer, "user")
        after = tokenizer.encode(asked) + [tokenizer.special["<|eot_id|>"]] + chat_header(tokenizer, "assistant")
        questions[0] = tokenizer.encode(QUESTION.format(key=needles[0][0]))
    size = length - len(before) - len(after) - sum(map(len, statements + questions + answers))
    if size < 0:
        raise ValueError(f"{length} is too short: needles and questions alone take {length - size} tokens")
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
# Method settings: --set, else extrapolation.json, else what was published for such a model, else one rule

METHODS = ["rope", "ntk", "yarn", "self-extend", "rerope", "dpe", "lampe"]
SETTABLE = {"window": ("self-extend", "rerope", "dpe"), "group": ("self-extend",), "scale": ("ntk", "yarn"), "scales": ("dpe",),
            "topk": ("dpe",), "ramp": ("lampe",), "head": ("lampe",), "tail": ("lampe",)}


def rule(name: str, train_len: int, length: int) -> dict:
    """A method's arguments for `length` tokens, from the training length alone.

    Everything far is brought within about a quarter of it, the near sixteenth stays exact: DPE's and SelfExtend's window and
    LaMPE's head are 1/16, LaMPE's ramp and ReRoPE's window 1/4, the tail 1/32, scales 4 * length / training length. Within the
    training length scales are 1. NTK and YaRN stretch by length / training length, as their papers say.
    """
    sixteenth, quarter = max(train_len // 16, 1), max(train_len // 4, 1)
    scale = math.ceil(4 * length / train_len) if length > train_len else 1
    stretch = dict(scale=max(length / train_len, 1.0))
    return {"rope": {}, "ntk": stretch, "yarn": stretch, "rerope": dict(window=quarter), "self-extend": dict(window=sixteenth, group=scale),
            "dpe": dict(window=sixteenth, scales=[scale]), "lampe": dict(ramp=quarter, head=sixteenth, tail=train_len // 32)}[name]


def settings(name: str, config: Config, length: int, found: dict, given: dict) -> tuple[dict, str]:
    """A method's arguments and where they are from. found: extrapolation.json; given: --set."""
    c, values, source = config, rule(name, config.train_len, length), "the rule from the training length"
    model = c.dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.train_len
    published = next((row for row in PUBLISHED.values() if row["model"] == model), {})
    for origin, place in ((published, "published for this model"), (found, "extrapolation.json")):
        o = origin.get(name)
        if o and name == "dpe" and length > c.train_len:  # within it there is nothing to scale
            values, source = dict(window=o["window"], scales=o["scales"], topk=o["key_dims"]), place
        if o and name == "lampe":
            values, source = dict(ramp=fitted_ramp(o, length), head=o["head"], tail=o["tail"]), place
    own = {key: value for key, value in given.items() if name in SETTABLE[key]}
    if own:
        source = "--set" if own.keys() >= values.keys() else source + " and --set"
    return values | own, source


def per_layer(name: str, values: dict, config: Config, length: int, key_dims=None) -> list[Method]:
    """The method of every layer; length is LaMPE's l, key_dims(count) each layer's key dimensions, bool (heads, D/2), for DPE."""
    c, half = config, config.head_dim // 2
    if name == "dpe":
        count = values.get("topk", half)
        if not 1 <= len(values["scales"]) <= half or not 1 <= count <= half:
            raise ValueError(f"a head has {half} frequencies: {len(values['scales'])} scales and {count} key dimensions (topk) do not fit")
        groups = torch.arange(half) * len(values["scales"]) // half  # (D/2,), frequencies split evenly
        scales = torch.tensor(values["scales"])[groups]
        if count < half:
            return [dpe(values["window"], torch.where(mask, scales, 1)) for mask in key_dims(count)]
        return [dpe(values["window"], scales)] * c.n_layers
    method = {"rope": rope, "self-extend": self_extend, "rerope": rerope, "lampe": partial(lampe, length),
              "ntk": partial(ntk, c.frequencies()), "yarn": partial(yarn, c.frequencies(), train_len=c.train_len)}[name](**values)
    return [method] * c.n_layers


# ---------------------------------------------------------------------------------------------------------------------
# A trial


def show_progress(model: Llama) -> None:
    """Say on a terminal's stderr which layer a long prefill has reached."""
    def say(n, tokens):
        if tokens > 1024:
            text = f"prefill: layer {n} of {len(model.layers)}" if n else ""
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    for n, layer in enumerate(model.layers, start=1):
        layer.register_forward_pre_hook(lambda _, inputs, n=n: say(n, inputs[0].shape[1]))
    model.register_forward_hook(lambda _, inputs, __: say(0, inputs[0].shape[1]))


def draw_trial(args: argparse.Namespace, tokenizer, length: int, count: int, depth: float, name: str, text: str | None):
    """`count` needles, prompt and questions of a trial, drawn from the seed and its name; other needles spread from the depth on."""
    rng = random.Random(f"{args.seed} {length} {depth} {name}")
    needles = draw_needles(rng, count, text or "")
    hay = text or " ".join(sentence(rng) for _ in range(length // 6 + 8))
    depths = [depth] + [(depth + n / count) % 1 for n in range(1, count)]
    return needles, *build_prompt(tokenizer, length, needles, depths, hay, args.chat)


def answer_questions(model: Llama, tokenizer, methods: list[Method], prompt: list[int], questions):
    """Ask each question in turn after the prompt; returns the answers' texts, the seconds of the prefill and of all decoding."""
    device = model.tok_embeddings.weight.device
    size = len(prompt) + sum(len(question) + len(answer) for question, answer in questions)
    cache = KVCache(model.config, 1, size, device, model.tok_embeddings.weight.dtype)
    pending, answers, ticks = prompt, [], [time.perf_counter()]
    for question, answer in questions:
        new = generate(model, torch.tensor([pending + question], device=device), 1, methods, cache=cache)[0].tolist()
        ticks.append(time.perf_counter())
        if len(answer) > 1 and new[0] not in tokenizer.stop_ids:
            new += generate(model, torch.tensor([new], device=device), len(answer) - 1, methods, tokenizer.stop_ids, cache)[0].tolist()
        new = [token for token in new if token not in tokenizer.stop_ids]
        known = [token for token in new if token < tokenizer.vocab_size]  # random weights answer anything
        answers.append(tokenizer.decode(known))
        pending = new[-1:] if len(new) == len(answer) else []  # the last of a full answer is not in the cache yet
    return answers, ticks[1] - ticks[0], time.perf_counter() - ticks[1]


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def memory_per_token(model: Llama) -> int:
    """About how many bytes a prefill takes for each token: the KV cache of every layer, the activations of one."""
    c, size = model.config, model.tok_embeddings.weight.element_size()
    return 2 * c.n_layers * c.n_kv_heads * c.head_dim * size + c.dim * (4 * size + 8) + c.n_heads * c.head_dim * (4 * size + 16)


def memory_free(device: torch.device) -> int | None:
    """Bytes to be had on the device, None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else None


def memory_peak(device: torch.device) -> int:
    """The most bytes used so far: of the device, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# Calibration: the papers' procedures, which find a checkpoint's settings


@torch.inference_mode()
def tail_scores(model: Llama, tokens: list[int], last: int, methods: list[Method]):
    """Log-probability of each of the `last` tokens after all before it, and whether it is the likeliest: two tensors (last,)."""
    ids = torch.tensor([tokens], device=model.tok_embeddings.weight.device)
    logits, target = model(ids[:, :-1], methods, last=last)[0], ids[0, -last:]
    return logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0].cpu(), (logits.argmax(dim=-1) == target).cpu()


def countdown(steps: int):
    """Returns say(text), which prints a step's line with its number and the time that is left."""
    began, numbers = time.time(), itertools.count(1)

    def say(text):
        n = next(numbers)
        print(f"{n:4}/{steps}  {text}   {(time.time() - began) / n * (steps - n):.0f} s left", flush=True)
    return say


def calibrate_dpe(args: argparse.Namespace, model: Llama, tokenizer, text: str | None) -> dict:
    """DPE's steps (a) and (b): a scale for each of 8 groups, by retrieval and, where that ties, the answers' log-likelihood.

    Scales are tried up to 8 * length / training length, the others at 2 * length / training length.
    """
    c, length = model.config, args.lengths[0]
    values = rule("dpe", c.train_len, length) | args.set
    candidates = [2 ** n for n in range((8 * length // c.train_len).bit_length())]
    background, groups = candidates[-3], min(8, c.head_dim // 2)
    trials = [draw_trial(args, tokenizer, length, args.needles, n / args.trials, f"calibration {n}", text) for n in range(args.trials)]
    say = countdown(groups * (len(candidates) - 1) + 1)

    def score(scales: list[int]) -> tuple[float, float]:
        methods, right, likelihood = per_layer("dpe", dict(window=values["window"], scales=scales), c, length), [], []
        for _, prompt, questions in trials:
            tail = [token for question, answer in questions for token in question + answer]
            log_p, hit = tail_scores(model, prompt + tail, len(tail), methods)
            end = 0
            for question, answer in questions:
                end += len(question) + len(answer)
                right.append(hit[end - len(answer):end].all().item())
                likelihood.append(log_p[end - len(answer):end].mean().item())
        found = round(sum(right) / len(right), 4), round(sum(likelihood) / len(likelihood), 6)
        say(f"scales {'-'.join(map(str, scales)):25} retrieval {found[0]:.2f}  log-likelihood {found[1]:8.4f}")
        return found

    scales, table = detect_scales(score, groups, candidates, background)
    print(f"\nlog-likelihood (retrieval) of each scale, the other groups at {background}\n       "
          + "".join(f"{s:16}" for s in candidates) + "   effective length")
    for g, (row, best) in enumerate(zip(table, scales)):
        print(f"group {g}" + "".join(f"{log_p:9.4f} ({r:.2f})" for r, log_p in row) + f"   {length} / {best} = {length // best}")
    return dict(window=values["window"], scales=scales, key_dims=values.get("topk", c.head_dim // 2), length=length, candidates=candidates,
                background=background, scores=table)


def calibrate_lampe(args: argparse.Namespace, model: Llama, tokenizer, text: str | None) -> dict:
    """LaMPE's fit: the ramp of lowest perplexity at each length, halved from the longest down, and the sigmoid through these points.

    The text is --haystack, its last 2,048 tokens counted; or generated sentences, of which only numbers that are told again at the end
    count, since nothing else in them depends on what is far.
    """
    c, longest = model.config, args.lengths[0]
    values = rule("lampe", c.train_len, longest) | args.set
    lengths = sorted(longest >> n for n in range(max(3, (longest // c.train_len).bit_length())))
    ramps = [round(c.train_len / 16 * 2 ** (n / 2)) for n in range(9)]
    say, perplexity, hay = countdown(len(lengths) * len(ramps)), {}, tokenizer.encode(text or "")
    for length in lengths:
        samples = []
        for n in range(args.trials):
            if text:
                start = random.Random(f"{args.seed} {length} {n}").randrange(len(hay) - length + 1)
                tokens, counted = hay[start:start + length], [True] * min(length // 2, 2048)
            else:
                count = min(32, length // 128)
                _, prompt, questions = draw_trial(args, tokenizer, length, count, n / args.trials / count, f"calibration {n}", None)
                tokens = prompt + [token for question, answer in questions for token in question + answer]
                counted = [right for question, answer in questions for right in [False] * len(question) + [True] * len(answer)]
            samples.append((tokens, torch.tensor(counted)))
        for ramp in ramps:
            methods = per_layer("lampe", values | dict(ramp=ramp), c, length)
            log_p = torch.cat([tail_scores(model, tokens, len(counted), methods)[0][counted] for tokens, counted in samples])
            perplexity.setdefault(length, {})[ramp] = round(math.exp(-log_p.mean().item()), 6)
            say(f"length {length:6}  ramp {ramp:5}  perplexity {perplexity[length][ramp]:.4f}")
    best = [min(ramps, key=perplexity[length].get) for length in lengths]
    print("\nperplexity, length (rows) by ramp\n       " + "".join(f"{ramp:9}" for ramp in ramps) + "   best")
    for length, ramp in zip(lengths, best):
        print(f"{length:7}" + "".join(f"{value:9.4f}" for value in perplexity[length].values()) + f"   {ramp}")
    try:
        a, b, L = fit_ramp(lengths, best)
    except ValueError as error:
        fail(f"nothing was written: {error}")
    return dict(a=a, b=b, L=L, head=values["head"], tail=values["tail"], best_ramps=dict(zip(lengths, best)), perplexity=perplexity)


def calibrate(args: argparse.Namespace, model: Llama, tokenizer, text: str | None) -> None:
    """Run one procedure and put its result into extrapolation.json, complete or not at all; the other's is kept."""
    record = read_extrapolation(args.out)
    result = {"dpe": calibrate_dpe, "lampe": calibrate_lampe}[args.calibrate](args, model, tokenizer, text)
    made_with = dict(length=args.lengths[0], needles=args.needles, trials=args.trials, seed=args.seed, haystack=args.haystack)
    record |= {args.calibrate: result, "made_with": record.get("made_with", {}) | {args.calibrate: made_with}}
    sections = (f' "{name}": {{\n  ' + ",\n  ".join(f'"{key}": {json.dumps(value)}' for key, value in section.items()) + "\n }"
                for name, section in record.items())
    unfinished = args.out.with_suffix(".unfinished")
    unfinished.write_text("{\n" + ",\n".join(sections) + "\n}\n")
    unfinished.replace(args.out)
    print(f"\nwrote {args.out}")


def read_extrapolation(file: Path) -> dict:
    """The calibrated settings of a checkpoint, {} where there are none; what cannot be used is refused."""
    if not file.exists():
        return {}
    try:
        record = dict(json.loads(file.read_text(encoding="utf-8")))
        if "dpe" in record:
            dpe(record["dpe"]["window"], record["dpe"]["scales"]), int(record["dpe"]["key_dims"])
        if "lampe" in record:
            lampe_ramp(1, *(record["lampe"][key] for key in ("a", "b", "L"))), lampe(1, 1, record["lampe"]["head"], record["lampe"]["tail"])
        return record
    except (OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        fail(f"{file} is damaged ({type(error).__name__}: {error}): remove it, and make it again with --calibrate")


# ---------------------------------------------------------------------------------------------------------------------
# The table at the end


def heat_map(results: list[dict], method: str, colour: bool) -> str:
    """Mean scores of one method, depth (rows) by length (columns); a cell's shade runs from red, 0, to green, 1."""
    lengths, depths = (sorted({row[key] for row in results}) for key in ("length", "depth"))

    def cell(rows):
        if not rows:
            return " " * 8
        score = sum(row["score"] for row in rows) / len(rows)
        text = f"{score:8.2f}"
        return f"\x1b[48;5;{[160, 166, 172, 142, 106, 34][round(score * 5)]}m\x1b[38;5;16m{text}\x1b[0m" if colour else text

    rows = [row for row in results if row["method"] == method]
    lines = [f"{method:12}" + "".join(f"{length:8}" for length in lengths)]
    for depth in depths:
        cells = [cell([r for r in rows if r["length"] == n and r["depth"] == depth]) for n in lengths]
        lines.append(f"  depth {depth:4.2f}" + "".join(cells))
    return "\n".join(lines + ["  mean      " + "".join(cell([r for r in rows if r["length"] == n]) for n in lengths)])


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def fail(message: str) -> None:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def lengths(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def method_names(text: str) -> list[str]:
    names = list(METHODS) if text == "all" else text.split(",")
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"no method {name!r}: choose from {', '.join(METHODS)}, or all")
    return names


def overrides(text: str) -> dict:
    """--set: whole numbers by name, and scales such as 4-4-2-16."""
    given = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        numbers = value.split("-")
        if key not in SETTABLE or not all(number.isdecimal() for number in numbers) or len(numbers) > 1 and key != "scales":
            raise argparse.ArgumentTypeError(f"{part!r} is not a setting such as window=512 or scales=4-4-2-16: there are {', '.join(SETTABLE)}")
        given[key] = [int(number) for number in numbers] if key == "scales" else int(value)
    return given


def depth_list(text: str) -> list[float]:
    if text.strip().isdecimal() and int(text):
        count = int(text)
        return [n / (count - 1) for n in range(count)] if count > 1 else [0.5]
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a count of depths nor depths from 0 to 1 such as 0,0.5,1")
    return values


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ckpt", default=os.path.relpath(Path(__file__).resolve().parent / "tiny"), metavar="DIR",
                        help="checkpoint directory, or random:1b, 3b, 8b, 70b for random weights of that shape (default: tiny)")
    parser.add_argument("--train-len", type=positive, metavar="N", help="its training context (default: the checkpoint says)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 .. (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="default: bfloat16 on cuda, on the CPU as the weights lie on disk")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="needle.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add_model_arguments(parser)
    add = parser.add_argument
    add("--method", type=method_names, default=["dpe"], metavar="M,M..", help=f"{', '.join(METHODS)}, or all (default: dpe)")
    add("--len", type=lengths, default=[65536], metavar="N,N..", dest="lengths",
        help="tokens, the answer's room included (default: 65536)")
    add("--depths", type=depth_list, default="5", metavar="D,D..",
        help="depths from 0, the start, to 1, the end, or how many (default: 5)")
    add("--trials", type=positive, default=1, metavar="N", help="trials per method, length and depth (default: 1)")
    add("--needles", type=positive, metavar="N",
        help="needles per trial, spread from the depth on, each asked for (default: 1, and 4 to calibrate)")
    add("--haystack", metavar="FILE", help="your own text, UTF-8, instead of generated sentences")
    add("--chat", action="store_true", help="wrap the prompt in Llama 3's chat format, for an Instruct model")
    add("--set", type=overrides, default={}, metavar="K=V,..", help=f"settings by hand: {', '.join(SETTABLE)} (scales=4-4-2-16, a scale per group)")
    add("--calibrate", choices=["dpe", "lampe"], help="find the method's settings for this checkpoint at --len, instead of testing")
    add("--out", type=Path, metavar="FILE", help="where --calibrate writes (default: extrapolation.json beside the checkpoint)")
    add("--seed", type=int, default=0, metavar="N", help="of haystacks and needles (default: 0)")
    add("--json", metavar="FILE", help="write the results there")
    add("--plot", metavar="FILE", help="draw the heat maps there, .png or .svg (needs matplotlib)")
    args = parser.parse_args()
    for key in args.set:
        if not any(name in SETTABLE[key] for name in ([args.calibrate] if args.calibrate else args.method)):
            fail(f"--set {key} is a setting of {' and '.join(SETTABLE[key])}, which is not among the methods asked for")
    args.needles = args.needles or (4 if args.calibrate else 1)
    if args.calibrate and (args.json or args.plot or len(args.lengths) > 1):
        fail("--calibrate takes one --len, and writes to --out, not to --json or --plot")
    if args.out and not args.calibrate:
        fail("--out is where --calibrate writes; a test writes to --json")
    args.out = args.out or Path(args.ckpt) / "extrapolation.json"
    return args


def read_haystack(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        fail(f"--haystack {file} is not UTF-8 text")
    except OSError as error:
        fail(f"--haystack {file} cannot be read: {error.strerror}")
    if not text.strip():
        fail(f"--haystack {file} is empty")
    return text


def check_writable(option: str, file) -> None:
    """Say before a long run, not after it, that its results could not be written."""
    if Path(file).is_dir() or not os.access(file if Path(file).exists() else Path(file).absolute().parent, os.W_OK):
        fail(f"{option} {file} cannot be written: its directory must exist and let you write")


def choose_device(args: argparse.Namespace) -> tuple[torch.device, torch.dtype | None]:
    """The device, and the dtype to load weights in: None, as they lie on disk, is the default on the CPU."""
    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        fail(f"--device {args.device} is not a device: use cpu or cuda")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        fail(f"--device {args.device} is not to be had: this machine has the CPU and {torch.cuda.device_count()} CUDA devices")
    default = "bfloat16" if device.type == "cuda" else None
    return device, getattr(torch, args.dtype or default) if args.dtype or default else None


def load(args: argparse.Namespace):
    """Model, tokenizer and device as the command line asks for them; what cannot work is refused before a trial."""
    device, dtype = choose_device(args)
    try:
        tokenizer, model = load_tokenizer(args.ckpt), load_model(args.ckpt, device, dtype)
    except CheckpointError as error:
        fail(str(error))
    if tokenizer.vocab_size > model.config.vocab_size:
        fail(f"{args.ckpt}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding only {model.config.vocab_size}")
    if args.train_len:
        model.config = dataclasses.replace(model.config, train_len=args.train_len)
    free, each = memory_free(device), memory_per_token(model)
    if free is not None and max(args.lengths) * each > free:
        fail(f"--len {max(args.lengths)} needs about {max(args.lengths) * each / 1e9:.1f} GB beside the weights and "
             f"{free / 1e9:.1f} GB are free: --len {int(free / each)} would fit")
    if sys.stderr.isatty():
        show_progress(model)
    return model, tokenizer, device


def check_prompts(args: argparse.Namespace, tokenizer, text: str | None, train_len: int) -> None:
    """Refuse, before the first trial, what no prompt can be built for."""
    longest = max(args.lengths)
    if args.calibrate and longest <= train_len:
        fail(f"--calibrate at --len {longest} has nothing to find: it must be longer than the {train_len} tokens of training")
    if args.calibrate == "lampe" and text and (size := len(tokenizer.encode(text))) < longest:
        fail(f"--haystack {args.haystack} has {size} tokens, and perplexity at {longest} needs as many: give a longer text")
    if args.chat and "<|start_header_id|>" not in tokenizer.special:
        fail(f"--chat needs Llama 3's tokenizer, and {args.ckpt} has another")
    if args.needles > 1000:
        fail(f"--needles {args.needles} is too many: 1000 at most have keys of their own")
    needles = [(key, "1234567") for key, _ in draw_needles(random.Random(0), args.needles)]
    try:
        for length in args.lengths:
            build_prompt(tokenizer, length, needles, [0.0] * args.needles, ".", args.chat)
    except ValueError as error:
        fail(f"--len {error}")


def choose_methods(args: argparse.Namespace, model: Llama, tokenizer, text: str | None):
    """Settings of every (length, method), what to print about them, and build(length, method, l), the methods of all layers."""
    c, found = model.config, read_extrapolation(Path(args.ckpt) / "extrapolation.json")
    chosen = {(length, name): settings(name, c, length, found, args.set) for length in args.lengths for name in args.method}

    @lru_cache(maxsize=1)  # not once for every trial
    def key_dims(count: int) -> list[torch.Tensor]:  # by ordinary text no longer than the training length
        rng, size = random.Random(args.seed), min(c.train_len, 4096)
        tokens = tokenizer.encode(text or " ".join(sentence(rng) for _ in range(size // 4)))[:size]
        ids = torch.tensor([tokens], device=model.tok_embeddings.weight.device)
        return [key_dimensions(q, k, count).cpu() for q, k in queries_and_keys(model, ids)]

    def build(length: int, name: str, l: int) -> list[Method]:
        return per_layer(name, chosen[length, name][0], c, l, key_dims)

    try:
        for length, name in chosen:
            build(length, name, length)
    except ValueError as error:
        fail(str(error))
    return chosen, build


def run_trials(args: argparse.Namespace, model: Llama, tokenizer, text: str | None, chosen: dict, build, results: list[dict]) -> None:
    """Every trial, a line each; rows are appended to results as they are measured."""
    for length, name in itertools.product(args.lengths, args.method):
        values, source = chosen[length, name]
        shown = ", ".join(f"{key} {'-'.join(map(str, value)) if key == 'scales' else value}" for key, value in values.items())
        print(f"# {name} at {length}: " + (f"{shown} (by {source})" if values else "no settings"))
        for depth, trial in itertools.product(args.depths, range(args.trials)):
            needles, prompt, questions = draw_trial(args, tokenizer, length, args.needles, depth, trial, text)  # the same for every method
            methods = build(length, name, len(prompt) + len(questions[0][0]))  # l: the prompt as the first answer begins
            answers, prefill, decode = answer_questions(model, tokenizer, methods, prompt, questions)
            expected = [value for _, value in needles]
            score = sum(value in re.findall(r"\d+", answer) for value, answer in zip(expected, answers)) / len(expected)
            results.append(dict(method=name, length=length, depth=depth, trial=trial, score=score, expected=expected,
                                answer=answers, prefill_seconds=prefill, decode_seconds=decode))
            print(f"{name:11} {length:7} tokens  depth {depth:4.2f}  score {score:4.2f}  expected {' '.join(expected)}  answer "
                  f"{' '.join(answer.strip() for answer in answers)!r}  prefill {prefill:.1f} s  decode {decode:.1f} s", flush=True)


def report(args: argparse.Namespace, results: list[dict], about: dict) -> None:
    """Heat maps, speed and memory on stdout, everything in --json."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    for name in args.method:
        print("\n" + heat_map(results, name, colour))
    tokens, seconds = sum(row["length"] for row in results), sum(row["prefill_seconds"] for row in results)
    print(f"\n{tokens / seconds:,.0f} prefill tokens/s, peak memory {about['peak_memory_bytes'] / 1e9:.2f} GB")
    if args.json:
        Path(args.json).write_text(json.dumps({"results": results} | about, indent=1) + "\n")


def main() -> None:
    args = parse_arguments()
    text = read_haystack(args.haystack) if args.haystack else None
    for option, file in (("--json", args.json), ("--plot", args.plot), ("--out", args.calibrate and args.out)):
        if file:
            check_writable(option, file)
    if args.plot:
        try:
            from extras.figures import heat_maps
        except ImportError:
            fail("--plot needs matplotlib: pip install matplotlib")
        if not args.plot.endswith((".png", ".svg")):
            fail(f"--plot {args.plot} must end in .png or .svg")
    results, status = [], 0
    try:
        model, tokenizer, device = load(args)
        check_prompts(args, tokenizer, text, model.config.train_len)
        chosen, build = choose_methods(args, model, tokenizer, text)
        about = dict(checkpoint=args.ckpt, train_len=model.config.train_len, needles=args.needles, haystack=args.haystack,
                     seed=args.seed, device=str(device), dtype=str(model.tok_embeddings.weight.dtype)[6:],
                     settings={f"{name} at {length}": values | {"from": source} for (length, name), (values, source) in chosen.items()})
        print(f"# {args.ckpt}: {sum(p.numel() for p in model.parameters()):,} parameters, trained on {about['train_len']} tokens; "
              f"{device} {about['dtype']}, seed {args.seed}" + "; random weights, so scores mean nothing" * args.ckpt.startswith("random:"))
        if args.calibrate:
            calibrate(args, model, tokenizer, text)
        else:
            run_trials(args, model, tokenizer, text, chosen, build, results)
    except KeyboardInterrupt:
        print(f"\nneedle.py: interrupted after {len(results)} trials" if results else "\nneedle.py: interrupted, nothing was written", file=sys.stderr)
        status = 130
    except RuntimeError as error:  # torch's kinds of out of memory are among these
        if "memory" not in str(error):
            raise
        first = str(error).splitlines()[0]
        print(f"needle.py: out of memory ({first}); try a shorter --len than {max(args.lengths)}", file=sys.stderr)
        status = 2
    if results:
        report(args, results, about | {"peak_memory_bytes": memory_peak(device)})
        if args.plot:
            heat_maps(results, args.plot)
    sys.exit(status)


if __name__ == "__main__":
    main()
