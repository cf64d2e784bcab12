"""Needle in a haystack: does the model find a sentence that is tens of thousands of tokens back?

    python needle.py --method dpe --len 65536

A needle such as "The magic number for coral otter is 40713." is inserted into a haystack of other
sentences at a given depth: 0 is the start, 1 the end. The prompt ends with the words of the
needle up to the number, and the model continues greedily. The score of a trial is the share of
its needles whose number is in the answer. All methods see the same prompts.
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from load_llama import CheckpointError, load_model, load_tokenizer, read_json
from model import Config, KVCache, Llama, contributions, generate
from rope_extrap import (
    LAMPE_LOGIT_SCALE,
    PUBLISHED,
    Method,
    ModelShape,
    dpe,
    dpe_scales,
    key_dimensions,
    lampe,
    mapping_length_of,
    ntk,
    rerope,
    rope,
    self_extend,
    yarn,
)
from tiny.grammar import ANSWER, QUESTION, draw_needles, sentence

TINY = Path(__file__).resolve().parent / "tiny"
RANK = int(os.environ.get("RANK", 0))  # set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))

# -------------------------------------------------------------------------------------------------
# Prompts


class ChatFormat(NamedTuple):
    """What a chat template puts before and after the user's message."""
    name: str
    marker: str  # a special token that only tokenizers of this format have
    before: str
    after: str


def chatml(name: str, marker: str, system_message: str) -> ChatFormat:
    """ChatML, with the system message that the model's own template uses by default."""
    before = f"<|im_start|>system\n{system_message}<|im_end|>\n<|im_start|>user\n"
    after = "<|im_end|>\n<|im_start|>assistant\n"
    return ChatFormat(name, marker, before, after)


CHAT_FORMATS = [  # the first one whose marker is a special token is used
    ChatFormat("Llama 3", "<|eot_id|>", "<|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    chatml("Qwen2.5", "<|object_ref_start|>",
           "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    chatml("SmolLM2", "<repo_name>",
           "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    chatml("Qwen2", "<|im_start|>", "You are a helpful assistant."),
    ChatFormat("Llama 2 and Mistral", "[INST]", "[INST]", "[/INST]"),
]


def chat_format(tokenizer) -> ChatFormat:
    """The chat format of the model to which a tokenizer belongs.

    Raises ValueError if it is none of CHAT_FORMATS.
    """
    for known in CHAT_FORMATS:
        if known.marker in tokenizer.special:
            return known
    if tokenizer.vocab_size == 32000:  # Llama 2 and Mistral v0.2, where [INST] is ordinary text
        return CHAT_FORMATS[-1]
    names = ", ".join(known.name for known in CHAT_FORMATS)
    raise ValueError(f"--chat knows the formats of {names}, and this checkpoint's tokenizer has "
                     f"the tokens of none of them; leave out --chat")


def encode_with_special(tokenizer, text: str) -> list[int]:
    """The tokens of a text that contains the names of special tokens."""
    tokens = []
    for part in re.split(r"(<\|\w+\|>|\[/?INST\])", text):
        if part in tokenizer.special:
            tokens.append(tokenizer.special[part])
        elif part:
            tokens += tokenizer.encode(part)
    return tokens


def encode_continuation(tokenizer, text: str) -> list[int]:
    """The tokens of " " + text after a full stop.

    The full stop is encoded as well, since some tokenizers treat the start of a text differently.
    """
    return tokenizer.encode(". " + text)[len(tokenizer.encode(".")):]


def sentence_ends(tokenizer, tokens: list[int]) -> set[int]:
    """The tokens among these that end a sentence."""
    ends = set()
    for token in set(tokens):
        if tokenizer.decode([token]).endswith((".", "!", "?", "\n", "\u3002")):
            ends.add(token)
    return ends


def cut_haystack(tokenizer, text: str, size: int) -> tuple[list[int], list[int]]:
    """Exactly `size` tokens of the text, and the indices of the gaps between its sentences.

    A short text is repeated. The tokens end where a sentence ends, if the text has sentences; the
    first sentence may be cut.
    """
    hay = tokenizer.encode(text)
    repeats = -(-size // len(hay))
    hay = hay * repeats
    ends = sentence_ends(tokenizer, hay)
    stop = size  # the first end of a sentence from `size` on
    for n in range(max(size, 1), len(hay) + 1):
        if hay[n - 1] in ends:
            stop = n
            break
    hay = hay[stop - size:stop]

    gaps = [0]
    for n, token in enumerate(hay):
        if token in ends:
            gaps.append(n + 1)
    gaps.append(size)
    return hay, gaps


def gap_at(depth: float, gaps: list[int], size: int) -> int:
    """The gap between sentences closest to a depth, or the depth itself if none is near."""
    wanted = depth * size
    gap = min(gaps, key=lambda gap: abs(gap - wanted))
    if abs(gap - wanted) > 0.05 * size:  # the text has no sentences there
        gap = round(wanted)
    return gap


def build_prompt(tokenizer, length: int, needles: list[tuple[str, str]], depths: list[float],
                 text: str, chat: bool = False) -> tuple[list[int], list[tuple[list, list]]]:
    """A haystack cut from text, with the needles (key, value) inserted at their depths.

    Returns the prompt's tokens, and for each needle the tokens of its question and of the right
    answer. The prompt, with BOS, and the longest question with its answer total `length` tokens.
    Raises ValueError if that is too short.
    """
    # Encode everything but the haystack.
    questions = []
    statements = []
    answers = []
    for key, value in needles:
        text_of_question = QUESTION.format(key=key)
        question = encode_continuation(tokenizer, text_of_question)
        statement = encode_continuation(tokenizer, text_of_question + ANSWER.format(value=value))
        questions.append(question)
        statements.append(statement)
        answers.append(statement[len(question):])
    before = []
    after = []
    if tokenizer.bos_id is not None:
        before.append(tokenizer.bos_id)
    if chat:
        # The user's message is the haystack and a request. The assistant's answer begins with a
        # question.
        template = chat_format(tokenizer)
        before += encode_with_special(tokenizer, template.before)
        keys = ", ".join(key for key, _ in needles)
        after += tokenizer.encode(f" What are the magic numbers for {keys}?")
        after += encode_with_special(tokenizer, template.after)
        questions = [tokenizer.encode(QUESTION.format(key=key)) for key, _ in needles]

    # The haystack takes the rest.
    asked = list(zip(questions, answers, strict=True))
    size = length - len(before) - len(after)
    size -= sum(len(statement) for statement in statements)
    size -= max(len(question) + len(answer) for question, answer in asked)
    if size < 0:
        raise ValueError(f"--len {length} is too short; the needles and the longest question alone "
                         f"take {length - size} tokens")
    hay, gaps = cut_haystack(tokenizer, text, size)

    prompt = before
    done = 0
    by_depth = sorted(zip(depths, statements, strict=True), key=lambda pair: pair[0])
    for depth, statement in by_depth:
        gap = gap_at(depth, gaps, size)
        prompt = prompt + hay[done:gap] + statement
        done = gap
    prompt = prompt + hay[done:] + after
    return prompt, asked


# -------------------------------------------------------------------------------------------------
# Methods and their settings
#
# A rule maps a model's Config and the input's length l to settings. SelfExtend, DPE's slow groups
# and LaMPE compress an input longer than three quarters of the training length n to about 3n/4
# positions, since few training texts are longer: SmolLM2, trained on 8,192 tokens, loses the
# needles at the start of a prompt of 8,192. The nearest n/8 tokens stay exact. DPE's fast groups
# use n/4 instead of 3n/4, and ReRoPE clips at n/4. NTK and YaRN stretch by l/n, as their papers
# say.


class Entry(NamedTuple):
    """A method on the command line."""
    settings: tuple[str, ...]  # their names, for --set
    rule: Callable[[Config, int], dict]  # (config, l) -> settings
    make: Callable[[Config, int, dict], Method]  # (config, l, settings) -> the method


def no_settings(config: Config, l: int) -> dict:
    return {}


def stretch_rule(config: Config, l: int) -> dict:
    return dict(factor=max(l / config.train_len, 1.0))


def usable_length(config: Config) -> int:
    """Three quarters of the training length, in tokens."""
    return max(3 * config.train_len // 4, 1)


def self_extend_rule(config: Config, l: int) -> dict:
    n = config.train_len
    return dict(window=max(n // 8, 1), group=math.ceil(l / usable_length(config)))


def rerope_rule(config: Config, l: int) -> dict:
    return dict(window=max(config.train_len // 4, 1))


def dpe_rule(config: Config, l: int) -> dict:
    """Coarse positions for fast frequencies, finer ones for slow frequencies.

    A group whose slowest frequency completes a rotation within the training length has seen
    every angle in training. It serves mainly to tell near tokens apart, so it gets the coarser
    positions.
    """
    n = config.train_len
    usable = usable_length(config)
    wavelengths = (2 * math.pi / config.frequencies()).tolist()  # in tokens
    n_groups = min(8, len(wavelengths))
    effective_lengths = []
    for group in range(n_groups):
        slowest = math.ceil((group + 1) * len(wavelengths) / n_groups) - 1
        has_seen_every_angle = wavelengths[slowest] <= n
        if has_seen_every_angle and l > usable:
            effective_lengths.append(max(n // 4, 1))
        else:
            effective_lengths.append(usable)
    return dict(window=max(n // 8, 1), effective_lengths=effective_lengths, topk=None)


def lampe_rule(config: Config, l: int) -> dict:
    n = config.train_len
    mapping_len = usable_length(config)
    if l > mapping_len:
        mapping_len = max(5 * n // 8, 1)  # s1 and s2 add at most 5n/32 positions
    return dict(mapping_len=mapping_len, s1=max(n // 8, 1), s2=n // 32)


def make_rope(config: Config, l: int, settings: dict) -> Method:
    return rope()


def make_ntk(config: Config, l: int, settings: dict) -> Method:
    return ntk(config.frequencies(), settings["factor"])


def make_yarn(config: Config, l: int, settings: dict) -> Method:
    return yarn(config.frequencies(), settings["factor"], config.train_len)


def make_self_extend(config: Config, l: int, settings: dict) -> Method:
    return self_extend(settings["window"], settings["group"])


def make_rerope(config: Config, l: int, settings: dict) -> Method:
    return rerope(settings["window"])


def make_dpe(config: Config, l: int, settings: dict) -> Method:
    scales = scale_of_each_frequency(settings["scales"], config.head_dim // 2)
    return dpe(settings["window"], scales)


def make_lampe(config: Config, l: int, settings: dict) -> Method:
    return lampe(l, settings["mapping_len"], settings["s1"], settings["s2"],
                 settings["logit_scale"])


def scale_of_each_frequency(group_scales: list[int], n_frequencies: int) -> list[int]:
    """Expand the scales of groups of equal size, fastest first, to one scale per frequency."""
    n_groups = len(group_scales)
    return [group_scales[f * n_groups // n_frequencies] for f in range(n_frequencies)]


METHODS = {
    "rope": Entry((), no_settings, make_rope),
    "ntk": Entry(("factor",), stretch_rule, make_ntk),
    "yarn": Entry(("factor",), stretch_rule, make_yarn),
    "self-extend": Entry(("window", "group"), self_extend_rule, make_self_extend),
    "rerope": Entry(("window",), rerope_rule, make_rerope),
    "dpe": Entry(("window", "effective_lengths", "topk", "scales"), dpe_rule, make_dpe),
    "lampe": Entry(("mapping_len", "s1", "s2", "logit_scale"), lampe_rule, make_lampe),
}


class Chosen(NamedTuple):
    """A method with the settings in effect."""
    settings: dict
    source: str  # where the settings come from
    method: Method


def setting_names(methods) -> list[str]:
    """The settings that --set accepts for these methods."""
    names = set()
    for name in methods:
        names.update(METHODS[name].settings)
    return sorted(names)


def choose_settings(name: str, config: Config, length: int, calibrated: dict,
                    by_hand: dict) -> Chosen:
    """The settings of a method for an input of `length` tokens, and the Method.

    The settings are, in order of precedence: single ones in by_hand (--set); the method's section
    in calibrated (an extrapolation.json); those published for this model; those of the rule.
    Raises ValueError if a setting is missing or does not fit.
    """
    entry = METHODS[name]
    settings = entry.rule(config, length)
    source = "the rule for this training length"
    shape = ModelShape(config.dim, config.n_layers, config.n_heads, config.n_kv_heads,
                       config.vocab_size, config.train_len)
    for model_name, published in PUBLISHED.items():
        row = {"dpe": published.dpe, "lampe": published.lampe}.get(name)
        if published.shape == shape and row is not None:
            settings = row
            source = f"published for {model_name}"
    if name in calibrated:
        settings = calibrated[name]
        source = "extrapolation.json"
    by_hand = {key: value for key, value in by_hand.items() if key in entry.settings}
    if by_hand:
        source += " and --set"
    try:
        settings = complete_settings(name, settings | by_hand, length)
        check_settings(settings, config)
        return Chosen(settings, source, entry.make(config, length, settings))
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{name} does not work with the settings from {source}; correct them "
                         f"({type(error).__name__}: {error})") from None


def choose_all_settings(args: argparse.Namespace,
                        config: Config) -> dict[tuple[int, str], Chosen]:
    """The settings of every method at every length: {(length, name): Chosen}.

    Raises ValueError, and CheckpointError if the checkpoint's extrapolation.json cannot be read.
    """
    calibrated = read_calibration(args.ckpt)
    chosen = {}
    for length, name in itertools.product(args.lengths, args.methods):
        chosen[length, name] = choose_settings(name, config, length, calibrated, args.by_hand)
    return chosen


def read_calibration(ckpt: str) -> dict:
    """The checkpoint's extrapolation.json, or {} if it has none.

    Raises CheckpointError if it cannot be read.
    """
    file = Path(ckpt) / "extrapolation.json"
    if not file.exists():
        return {}
    return read_json(file)


def record_of_settings(chosen: dict[tuple[int, str], Chosen]) -> dict:
    """The settings, as --json records them."""
    record = {}
    for (length, name), (settings, source, _) in chosen.items():
        record[f"{name} at {length}"] = settings | {"from": source}
    return record


def complete_settings(name: str, settings: dict, length: int) -> dict:
    """Add settings that are derived from others, and LaMPE's logit scale.

    Returns only the method's own settings, in the order of METHODS.
    """
    settings = dict(settings)
    if name == "dpe":
        effective_lengths = settings["effective_lengths"]
        if "scales" in settings:
            settings["effective_lengths"] = None  # --set scales replaces them
        else:
            settings["scales"] = dpe_scales(effective_lengths, length)
    if name == "lampe":
        settings.setdefault("logit_scale", LAMPE_LOGIT_SCALE)
        if "mapping_len" not in settings:
            settings["mapping_len"] = mapping_length_of(settings, length)
    return {key: settings[key] for key in METHODS[name].settings}


def check_settings(settings: dict, config: Config) -> None:
    """Raises ValueError for settings that the methods would accept but should not."""
    n_frequencies = config.head_dim // 2
    for key, value in settings.items():
        if key == "factor" and value < 1:
            raise ValueError("factor must be at least 1")
        if key == "logit_scale" and value <= 0:
            raise ValueError("logit_scale must be greater than 0")
        if key not in ("factor", "logit_scale") and isinstance(value, float):
            raise ValueError(f"{key} must be a whole number")
        if key == "scales" and not 1 <= len(value) <= n_frequencies:
            raise ValueError(f"{len(value)} scales do not fit heads of {n_frequencies} "
                             f"frequencies")
        if key == "topk" and value is not None and not 1 <= value <= n_frequencies:
            raise ValueError(f"topk {value} does not fit heads of {n_frequencies} frequencies")


def coincidence(name: str, settings: dict, config: Config, length: int) -> str | None:
    """A sentence naming the simpler method that these settings reduce this one to, or None."""
    if name == "dpe" and set(settings["scales"]) == {1}:
        return "all scales are 1, so this is RoPE"
    if name == "dpe" and len(set(settings["scales"])) == 1 and all_are_key(settings, config):
        return f"all scales are {settings['scales'][0]}, so this is SelfExtend"
    if name == "lampe" and len(make_lampe(config, length, settings).bands) == 1:
        return "nothing is compressed, so the positions are those of RoPE"
    if name == "self-extend" and settings["group"] == 1:
        return "the group size is 1, so this is RoPE"
    if name in ("ntk", "yarn") and settings["factor"] == 1:
        return "the factor is 1, so this is RoPE"
    if name in ("dpe", "self-extend", "rerope") and settings["window"] >= length:
        return "no distance is beyond the window, so this is RoPE"
    return None


def all_are_key(settings: dict, config: Config) -> bool:
    """Whether all dimensions are key dimensions, so that nothing has to be measured."""
    return settings.get("topk") in (None, config.head_dim // 2)


def mean_contributions(model: Llama, tokenizer, text: str | None,
                       seed: int) -> list[torch.Tensor]:
    """DPE, step (b): the contributions of each layer's frequencies, (heads, D/2).

    They are averaged over 10 texts of each length: 2,048, 4,096, ... up to the training length, but
    at most 8,192. If the training length is below 2,048, only that length is used. The texts
    are cut from `text`, or generated.
    """
    rng = random.Random(seed)
    longest = min(model.config.train_len, 8192)
    sizes = [size for size in (2048, 4096, 8192) if size <= longest] or [longest]
    device = model.tok_embeddings.weight.device
    n_texts = 10
    totals = [0.0] * model.config.n_layers
    if text is not None:
        hay = tokenizer.encode(text)
    for size in sizes:
        for _ in range(n_texts):
            if text is None:
                sentences = [sentence(rng) for _ in range(size // 4 + 1)]
                hay = tokenizer.encode(" ".join(sentences))
            start = rng.randrange(max(len(hay) - size, 0) + 1)
            tokens = torch.tensor([hay[start:start + size]], device=device)
            for n, contribution in enumerate(contributions(model, tokens)):
                totals[n] = totals[n] + contribution
    return [total / (n_texts * len(sizes)) for total in totals]


def methods_of_layers(args: argparse.Namespace, model: Llama, tokenizer, text: str | None,
                      chosen: dict) -> dict:
    """The Method of every layer: {(length, name): [Method, ...]}.

    chosen: {(length, name): Chosen}. Layers can differ only in their key dimensions.
    """
    device = model.tok_embeddings.weight.device
    of_layers = None  # contributions, measured once, if they are needed
    layers = {}
    for key, (settings, _, method) in chosen.items():
        if all_are_key(settings, model.config):
            layers[key] = [method] * model.config.n_layers
            continue
        if of_layers is None:
            of_layers = mean_contributions(model, tokenizer, text, args.seed)
        layers[key] = []
        for contribution in of_layers:
            key_dims = key_dimensions(contribution, settings["topk"]).to(device)
            layers[key].append(dataclasses.replace(method, key_dims=key_dims))
    return layers


# -------------------------------------------------------------------------------------------------
# Trials


class Trial(NamedTuple):
    length: int
    method: str
    depth: float
    number: int


def draw_trial(args: argparse.Namespace, tokenizer, length: int, count: int, depth: float, name,
               text: str | None):
    """Draw `count` needles: the first at depth, the rest evenly spaced after it, wrapping around.

    name identifies the trial. The draw depends on it, the seed, the length and the depth, but not
    on the method.
    Returns the needles, the prompt and the questions.
    """
    rng = random.Random(f"{args.seed} {length} {depth} {name}")
    needles = draw_needles(rng, count, text or "")
    hay = text
    if hay is None:
        hay = " ".join(sentence(rng) for _ in range(length // 6 + 8))
    depths = [depth]
    for n in range(1, count):
        depths.append((depth + n / count) % 1)
    prompt, questions = build_prompt(tokenizer, length, needles, depths, hay, args.chat)
    return needles, prompt, questions


def prefill(model: Llama, methods: list[Method], prompt: list[int], room: int) -> KVCache:
    """A cache that holds the prompt and has room for `room` more tokens."""
    cache = KVCache(model.config, 1, len(prompt) + room)
    tokens = torch.tensor([prompt], device=model.tok_embeddings.weight.device)
    with torch.inference_mode():
        logits = model(tokens, methods, cache, last=1)
    logits.argmax().item()  # waits for the device, so that the timing is right
    return cache


def score_answer(model: Llama, methods: list[Method], cache: KVCache, question: list[int],
                 answer: list[int]) -> tuple[float, bool]:
    """The log-likelihood of an answer, in nats, and whether each of its tokens is the most likely.

    The question follows what the cache holds. The cache is left unchanged.
    """
    start = cache.length
    tokens = torch.tensor([question + answer], device=model.tok_embeddings.weight.device)
    with torch.inference_mode():
        logits = model(tokens[:, :-1], methods, cache, last=len(answer))[0]  # (n, vocab_size)
    cache.length = start
    targets = tokens[0, -len(answer):]  # (n,)
    log_p = logits.log_softmax(dim=-1).gather(1, targets[:, None])  # (n, 1)
    all_likely = (logits.argmax(dim=-1) == targets).all()
    return log_p.sum().item(), bool(all_likely)


def greedy_answer(model: Llama, tokenizer, methods: list[Method], cache: KVCache,
                  question: list[int], max_new: int) -> str:
    """The model's greedy answer to a question that follows what the cache holds.

    The cache is left unchanged.
    """
    start = cache.length
    tokens = torch.tensor([question], device=model.tok_embeddings.weight.device)
    new = generate(model, tokens, max_new, methods, tokenizer.stop_ids, cache)[0].tolist()
    cache.length = start
    kept = []
    for token in new:
        # The embedding may have more rows than the tokenizer has tokens.
        if token not in tokenizer.stop_ids and token < tokenizer.vocab_size:
            kept.append(token)
    return tokenizer.decode(kept)


def run_trial(args: argparse.Namespace, model: Llama, tokenizer, text: str | None,
              methods: list[Method], trial: Trial) -> dict:
    """Run a trial with one Method per layer. Returns its row of --json.

    Every question is asked by itself, right after the prompt, so that a wrong answer does not
    affect the next.
    """
    needles, prompt, questions = draw_trial(args, tokenizer, trial.length, args.needles,
                                            trial.depth, trial.number, text)
    start = time.perf_counter()
    room = max(len(question) + len(answer) for question, answer in questions)
    cache = prefill(model, methods, prompt, room)
    prefill_seconds = time.perf_counter() - start

    answers = []
    log_likelihoods = []
    found = 0
    decode_seconds = 0.0
    for (_, value), (question, answer) in zip(needles, questions, strict=True):
        log_likelihood, _ = score_answer(model, methods, cache, question, answer)
        start = time.perf_counter()
        text_of_answer = greedy_answer(model, tokenizer, methods, cache, question, len(answer))
        decode_seconds += time.perf_counter() - start
        log_likelihoods.append(round(log_likelihood, 4))
        answers.append(text_of_answer)
        if value in re.findall(r"\d+", text_of_answer):
            found += 1
    return dict(method=trial.method, length=trial.length, depth=trial.depth, trial=trial.number,
                score=found / len(needles), expected=[value for _, value in needles],
                answer=answers, log_likelihood=log_likelihoods,
                prefill_seconds=prefill_seconds, decode_seconds=decode_seconds)


def memory_peak(device: torch.device) -> int:
    """The largest number of bytes used so far, on the device or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Linux and macOS only
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# -------------------------------------------------------------------------------------------------
# Command line


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positives(text: str, separator: str = ",") -> list[int]:
    return [positive(part) for part in text.split(separator)]


def settings_by_hand(text: str) -> dict:
    """--set window=512,effective_lengths=4096-8192 as a dictionary."""
    settings = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name in ("effective_lengths", "scales"):
            settings[name] = positives(value, separator="-")
            continue
        try:
            settings[name] = float(value) if "." in value else int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not a setting such as window=512 or scales=8-8-4-2") from None
    return settings


class Update(argparse.Action):
    """Lets --set be given several times, merging the settings."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, getattr(namespace, self.dest) | values)


def depths(text: str) -> list[float]:
    """--depths: the depths themselves, or how many to spread evenly."""
    if text.isdecimal() and int(text) > 0:
        count = int(text)
        if count == 1:
            return [0.5]
        return [n / (count - 1) for n in range(count)]
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from None
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} has depths that are not between 0 and 1")
    return values


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that choose the model, shared with the scripts in extras."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", default=os.path.relpath(TINY), metavar="DIR",
        help="checkpoint directory, or random:8b (or small, 1b, 3b, 70b) for random weights "
             "in that shape (default: the bundled model)")
    add("--train-len", type=positive, metavar="N",
        help="training length in tokens (default: the checkpoint's)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if available)")
    add("--dtype", choices=["float32", "bfloat16", "float16"],
        help="default: bfloat16 on CUDA (float16 before Ampere), the checkpoint's dtype on a CPU")
    add("--tp", type=positive, default=1, metavar="N",
        help="number of torchrun processes that each model is split across (default: 1)")
    return parser


def add_trial_options(parser: argparse.ArgumentParser, needles: int) -> None:
    """The options that describe prompts; for needle and calibrate."""
    add = parser.add_argument
    add("--trials", type=positive, default=1, metavar="N",
        help="prompts for each length and depth (default: 1)")
    add("--needles", type=positive, default=needles, metavar="N",
        help=f"needles in each prompt (default: {needles})")
    add("--haystack", metavar="FILE",
        help="UTF-8 text to use as the haystack (default: generated sentences)")
    add("--chat", action="store_true",
        help="use the chat format of the model, for an Instruct model")
    add("--set", type=settings_by_hand, action=Update, default={}, metavar="NAME=VALUE,...",
        dest="by_hand",
        help=f"settings to override: {', '.join(setting_names(METHODS))}; join per-group values "
             f"with hyphens, as in scales=8-8-4-2")
    add("--seed", type=int, default=0, metavar="N",
        help="seed of the haystacks and needles (default: 0)")


def chosen_methods(args: argparse.Namespace) -> list[str]:
    """The names in --method. Raises ValueError if one is unknown, or if --set does not fit them."""
    names = args.method.split(",")
    if args.method == "all":
        names = list(METHODS)
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--method {name} is not one of {', '.join(METHODS)}, all")
    if "scales" in args.by_hand and "effective_lengths" in args.by_hand:
        raise ValueError("--set takes either scales or effective_lengths, not both")
    settings = setting_names(names)
    for setting in args.by_hand:
        if setting not in settings:
            raise ValueError(f"--set {setting} is not a setting of {', '.join(names)}, which have "
                             f"{', '.join(settings) or 'none'}")
    return names


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--method", default="dpe", metavar="M,M,...",
        help=f"{', '.join(METHODS)}, or all (default: dpe)")
    add("--len", type=positives, default=[65536], metavar="N,N,...", dest="lengths",
        help="lengths of the input, in tokens (default: 65536)")
    add("--depths", type=depths, default=depths("5"), metavar="D,D,...",
        help="depths from 0.0 to 1.0, separated by commas, or the number of evenly spaced depths "
             "(1 means depth 0.5; default: 5)")
    add("--json", metavar="FILE", help="write the results to FILE, after each trial")
    add("--plot", metavar="FILE", help="draw heat maps to FILE, .png or .svg (needs matplotlib)")
    add_trial_options(parser, needles=1)
    args = parser.parse_args()
    args.methods = chosen_methods(args)
    if args.json:
        check_output("--json", args.json)
    if args.plot:
        check_picture("--plot", args.plot)
    return args


def check_picture(option: str, file: str) -> None:
    """Raises ValueError if an option names a file to which no figure can be written."""
    if not file.endswith((".png", ".svg")):
        raise ValueError(f"{option} {file} must end in .png or .svg")
    check_output(option, file)


def check_output(option: str, file: str | Path) -> None:
    """Raises ValueError if an option names a file that cannot be written.

    It is called before anything is measured. The file itself is not touched.
    """
    if not Path(file).parent.is_dir():
        raise ValueError(f"{option} {file} is in a directory that does not exist; create it")
    if Path(file).exists() and not Path(file).is_file():
        raise ValueError(f"{option} {file} is not a file that can be replaced")
    unfinished = Path(f"{file}.unfinished")
    try:
        unfinished.touch()
        unfinished.unlink(missing_ok=True)  # another rank may have removed it
    except OSError as error:
        raise ValueError(f"{option} {file} cannot be written: {error.strerror}") from None


def read_haystack(file: str) -> str:
    """The text of --haystack. Raises ValueError if it cannot be read, or is empty or not UTF-8."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--haystack {file} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"--haystack {file} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"--haystack {file} is empty")
    return text


def write_whole(file: str, text: str) -> None:
    """Write to another file first, so that an interruption leaves no half-written file."""
    unfinished = Path(f"{file}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def choose_device(name: str | None) -> torch.device:
    """The device for --device. Raises ValueError if it cannot be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used: {reason}") from None
    return device


def load(args: argparse.Namespace):
    """Model, tokenizer, device, and mesh (replicas, tensor), which is None without torchrun.

    Raises CheckpointError, or ValueError if the options do not fit the model or the machine.
    """
    device = choose_device(args.device)
    mesh = None
    tensor_mesh = None
    if WORLD_SIZE > 1:
        from extras.parallel import start
        device, mesh = start(device.type, args.tp)
        if args.tp > 1:
            tensor_mesh = mesh["tensor"]
    elif args.tp > 1:
        raise ValueError(f"--tp {args.tp} needs torchrun with {args.tp} processes or a multiple of "
                         f"it, and only 1 is running")

    dtype = None
    if args.dtype is not None:
        dtype = getattr(torch, args.dtype)
    elif device.type == "cuda":
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = torch.bfloat16 if ampere else torch.float16
    if args.ckpt.startswith("random:"):
        from extras.random_weights import random_model
        model = random_model(args.ckpt.removeprefix("random:"), device, dtype, tensor_mesh)
        tokenizer = load_tokenizer(TINY)
    else:
        tokenizer = load_tokenizer(args.ckpt)
        model = load_model(args.ckpt, device, dtype, tensor_mesh)
    if mesh is not None:
        torch.distributed.barrier()  # a rank may take a long time to load its weights
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{args.ckpt}: the tokenizer has {tokenizer.vocab_size} tokens, and the "
                         f"embedding only {model.config.vocab_size}")
    if args.train_len is not None:
        model.config = dataclasses.replace(model.config, train_len=args.train_len)
    check_memory(args, model, device)
    return model, tokenizer, device, mesh


def check_memory(args: argparse.Namespace, model: Llama, device: torch.device) -> None:
    """Raises ValueError if the longest input does not fit in the free memory."""
    from extras.memory import memory_free, prefill_memory
    itemsize = model.tok_embeddings.weight.element_size()
    fixed, per_token = prefill_memory(model.config, itemsize, args.tp)
    free = memory_free(device)
    longest = max(args.lengths)
    needed = fixed + longest * per_token
    if free is not None and needed > free:
        fitting = max((free - fixed) // per_token, 0)
        raise ValueError(f"--len {longest} needs about {needed / 1e9:.1f} GB besides the weights, "
                         f"and {free / 1e9:.1f} GB are free; --len {fitting} fits")


def check_length(args: argparse.Namespace, tokenizer) -> None:
    """Raises ValueError if the shortest input has no room for the needles, or for --chat."""
    needles = []
    for key, _ in draw_needles(random.Random(0), args.needles):
        needles.append((key, "1234567"))
    build_prompt(tokenizer, min(args.lengths), needles, [0.0] * args.needles, ".", args.chat)


def print_header(args: argparse.Namespace, model: Llama, tokenizer, device, chosen: dict) -> None:
    """Print the model, and each method's settings and where they come from."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.tok_embeddings.weight.dtype).removeprefix("torch.")
    print(f"# {args.ckpt}: {parameters:,} parameters, trained on {model.config.train_len} tokens; "
          f"{device} {dtype}, seed {args.seed}")
    if args.ckpt.startswith("random:"):
        print("# the weights are random, so the scores mean nothing")
    if args.chat:
        print(f"# chat format: {chat_format(tokenizer).name}")
    for (length, name), (settings, source, _) in chosen.items():
        shown = []
        for key, value in settings.items():
            if isinstance(value, list):
                value = "-".join(str(number) for number in value)
            if isinstance(value, float):
                value = round(value, 4)
            if value is not None:
                shown.append(f"{key} {value}")
        print(f"# {name} at {length}: {', '.join(shown) or 'no settings'} ({source})")
        same = coincidence(name, settings, model.config, length)
        if same is not None:
            print(f"# {name} at {length}: {same}")


def print_row(row: dict) -> None:
    expected = " ".join(row["expected"])
    answer = " ".join(text.strip() for text in row["answer"])
    print(f"{row['method']:11} {row['length']:7} tokens  depth {row['depth']:4.2f}  "
          f"score {row['score']:4.2f}  expected {expected}  answer {answer!r}  "
          f"prefill {row['prefill_seconds']:.1f} s  decode {row['decode_seconds']:.1f} s",
          flush=True)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def print_summary(rows: list[dict], peak: int) -> None:
    """Print the mean scores of each method, depths by lengths, then speed and memory."""
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    for method in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == method]
        print(f"\n{method:12}" + "".join(f"{length:8}" for length in lengths))
        for depth in depths:
            line = f"  depth {depth:4.2f}"
            for length in lengths:
                scores = [row["score"] for row in of_method
                          if row["length"] == length and row["depth"] == depth]
                line += f"{mean(scores):8.2f}"
            print(line)
        line = "  mean      "
        for length in lengths:
            line += f"{mean(row['score'] for row in of_method if row['length'] == length):8.2f}"
        print(line)
    tokens = sum(row["length"] for row in rows)
    seconds = sum(row["prefill_seconds"] for row in rows)
    print(f"\n{tokens / seconds:,.0f} prefill tokens/s, peak memory {peak / 1e9:.2f} GB")


def main() -> None:
    args = parse_arguments()
    if args.plot:
        from extras.figures import heat_maps, pyplot
        pyplot()  # so that a missing matplotlib is reported at once
    text = None
    if args.haystack:
        text = read_haystack(args.haystack)
    model, tokenizer, device, mesh = load(args)
    check_length(args, tokenizer)

    chosen = choose_all_settings(args, model.config)
    print_header(args, model, tokenizer, device, chosen)
    layers = methods_of_layers(args, model, tokenizer, text, chosen)

    # Run the trials. `record` says how the rows were measured.
    rows = {}
    record = dict(checkpoint=args.ckpt, train_len=model.config.train_len, needles=args.needles,
                  haystack=args.haystack, chat=args.chat, seed=args.seed, device=str(device),
                  dtype=str(model.tok_embeddings.weight.dtype).removeprefix("torch."),
                  settings=record_of_settings(chosen))
    trials = []
    numbers = range(args.trials)
    for (length, name), depth, number in itertools.product(chosen, args.depths, numbers):
        trials.append(Trial(length, name, depth, number))

    def run(trial):
        return run_trial(args, model, tokenizer, text, layers[trial.length, trial.method], trial)

    def write_results():
        if args.json and RANK == 0:
            results = [rows[trial] for trial in trials if trial in rows]
            measured = {"results": results, **record, "peak_memory_bytes": memory_peak(device)}
            write_whole(args.json, json.dumps(measured, indent=1) + "\n")

    for trial, row in measure(trials, run, mesh):
        rows[trial] = row
        print_row(row)
        write_results()
    print_summary([rows[trial] for trial in trials], memory_peak(device))
    if args.plot and RANK == 0:
        heat_maps(list(rows.values()), args.plot)


def measure(trials: list[Trial], run: Callable[[Trial], dict], mesh):
    """Yield (trial, row). Several replicas share the trials, and take the longest first."""
    if mesh is None or mesh.size(0) == 1:
        for trial in trials:
            yield trial, run(trial)
    else:
        from extras.parallel import share_trials
        longest_first = sorted(trials, key=lambda trial: -trial.length)
        yield from share_trials(longest_first, mesh, run)


def run_command(main: Callable[[], None]) -> None:
    """Run a command; an expected error becomes one sentence on stderr and exit code 2.

    The exit code is 130 after an interrupt. Under torchrun only rank 0 prints, except for an error
    that occurs only on another rank.
    """
    if RANK > 0:
        sys.stdout = None  # print then does nothing
    try:
        main()
        if WORLD_SIZE > 1:
            torch.distributed.destroy_process_group()
        return
    except KeyboardInterrupt:
        code = 130
        reason = "interrupted"
    except (ValueError, OSError, CheckpointError) as error:
        code = 2
        reason = str(error)
    except RuntimeError as error:
        first_line = str(error).splitlines()[0]
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if not out_of_memory and "can't allocate memory" not in first_line:
            raise
        code = 2
        reason = f"out of memory ({first_line}); try a shorter --len"
    if RANK > 0:
        # Most errors occur on every rank. Rank 0 then reports the error, and torchrun ends this
        # rank during the sleep. Otherwise the error is this rank's own.
        time.sleep(5)
    print(f"{Path(sys.argv[0]).name}: {reason}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)
