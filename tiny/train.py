"""The recipe of the bundled checkpoint: a Llama of 1.1 million parameters that retrieves.

    python -m tiny.train [--out DIR]        takes about 45 minutes on two CPU cores

The model is trained on 4,096 tokens of context, in two stages.

First it learns to copy. In random tokens `gap | y | gap | y | gap` the second y can be predicted
from the first, and nothing else can be predicted, so an induction head forms within minutes.

Then it learns to retrieve. Documents hold several needles, a question about each, and repeated
spans, and grow from 128 tokens to 4,096. Half of their text consists of the haystack's sentences,
the other half includes text of other kinds, so that any file can be the haystack. The loss is on
what can be predicted from the context, with a small weight on all other text.

In the second stage, every attention logit of a step is multiplied by one random factor. Heads that
still answer correctly when their logits are halved keep most of their weight on the right token
when there are 16 times as many others, whatever the positions are. Without this, the distant
tokens of a prompt of 65,536 tokens swamp even the heads that look one token back.

Nothing here knows of DPE or LaMPE: positions are those of plain RoPE, below 4,096.
"""
import argparse
import io
import json
import math
import random
import re
import string
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from load_llama import hugging_face_name, pairs_apart
from model import Config, Llama
from rope_extrap import rope
from tiny.grammar import (
    ANSWER,
    FIRST,
    QUESTION,
    SECOND,
    TINY,
    draw_needles,
    free_keys,
    sentence,
)

# rope_theta is Llama 3's. With 10,000, too few frequencies are slow enough to match words that are
# 4,096 tokens apart.
SHAPE = dict(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=256,
             rope_theta=5e5, train_len=4096)
TOKENS_PER_STEP = 8192
KEYS = free_keys()


class Copying(NamedTuple):
    """Steps of the first stage, in which the model learns to copy."""
    context: int
    n_tokens: int | None  # how many different tokens there are; None: all
    steps: int


class Retrieving(NamedTuple):
    """Steps of the second stage, in which the model learns to retrieve."""
    context: int
    needles: int  # in each document
    steps: int


COPYING = [Copying(64, 128, 350), Copying(128, None, 250)]
COPYING_RATE = 4e-3
RETRIEVING = [Retrieving(128, 2, 200), Retrieving(512, 6, 300), Retrieving(1024, 12, 150),
              Retrieving(2048, 24, 150), Retrieving(4096, 32, 1200)]
RETRIEVING_RATE = 2e-3  # with 4,096 tokens, it falls to 0 along a cosine
LOGIT_SCALES = (0.45, 1.2)  # the range of the factor on attention logits


class Sequence(NamedTuple):
    """context + 1 tokens, and the weight in the loss of each token but the first."""
    tokens: list[int]
    weights: list[float]


class Step(NamedTuple):
    """What one optimizer step trains on."""
    context: int
    learning_rate: float
    logit_scale: float
    batch: list[Sequence]


# -------------------------------------------------------------------------------------------------
# The tokenizer


def train_tokenizer(file: Path, seed: int) -> sentencepiece.SentencePieceProcessor:
    """Train a SentencePiece tokenizer and write it to a file.

    The words of the sentences are tokens; so are single digits, other ASCII characters, and bytes,
    which spell everything else.
    """
    rng = random.Random(seed)
    text = [sentence(rng) for _ in range(20000)]
    for first in FIRST:
        for second in SECOND:
            text.append(QUESTION.format(key=f"{first} {second}"))
    words = set()
    for line in text:
        words.update(re.findall(r"\w+", line))
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text + list(string.printable)), model_writer=trained,
        model_type="bpe", vocab_size=1024, hard_vocab_limit=False,
        user_defined_symbols=["\u2581" + word for word in sorted(words)],  # with its space
        split_digits=True, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        num_threads=1, minloglevel=2)
    file.write_bytes(trained.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())


# -------------------------------------------------------------------------------------------------
# Copying


def copying_sequence(rng: random.Random, context: int, vocabulary: range) -> Sequence:
    """gap | y | gap | y | gap of random tokens.

    The second y has weight 1, except for its first two tokens, which nothing predicts.
    """
    tokens = rng.choices(vocabulary, k=context + 1)
    length = rng.randint(16, context // 2)
    first = rng.randint(0, context - 2 * length)
    second = rng.randint(first + length, context - length)
    tokens[second:second + length] = tokens[first:first + length]
    weights = [0.0] * context
    for n in range(second + 2, second + length):
        weights[n - 1] = 1.0  # weights[0] is that of tokens[1]
    return Sequence(tokens, weights)


# -------------------------------------------------------------------------------------------------
# The text of a document, without needles

# Latin to Hindi, punctuation and mathematical signs, Japanese, Chinese, Korean, emoji
UNICODE_RANGES = [
    (0xC0, 0x180), (0x391, 0x3CA), (0x410, 0x450), (0x5D0, 0x5EB), (0x621, 0x64B), (0x905, 0x93A),
    (0x2010, 0x2300), (0x3041, 0x30FF), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0x1F300, 0x1F650)]
ALPHABETS = [string.ascii_lowercase] * 5  # five times as often
ALPHABETS += [string.ascii_letters, string.digits, string.digits, string.printable]
ALPHABETS += ["".join(map(chr, range(first, end))) for first, end in UNICODE_RANGES]

GAPS = ["", "\n", "\n\n", "\n    ", "    ", "\t", "\r\n"]  # between words
GAPS += [", ", ". ", ": ", "; ", "! ", "? ", " - ", " (", ") ", " = ", '"', "'", "_", "/"]
GAPS += ["\u3002", "\u060c "]  # a Chinese full stop, an Arabic comma


def draw_words(rng: random.Random) -> list[str]:
    """The words of a text of another kind: those of sentences in any order, those of needles, or
    words of random characters."""
    kind = rng.random()
    count = round(2 ** rng.uniform(1, 9))
    if kind < 0.25:
        sentences = [sentence(rng) for _ in range(count // 10 + 1)]
        return " ".join(sentences).split()
    if kind < 0.3:
        return FIRST + SECOND + QUESTION.split() * 2
    alphabet = rng.choice(ALPHABETS)
    words = []
    for _ in range(count):
        length = 1 + int(rng.expovariate(0.25))
        words.append("".join(rng.choices(alphabet, k=length)))
    return words


def draw_lines(rng: random.Random, tokenizer, size: int) -> list[list[int]]:
    """The lines of a document, as tokens, `size` or a few more in all.

    They are sentences, text of one to four other kinds, or a mixture.
    """
    sentence_share = rng.choice((1.0, 1.0, 0.0, rng.random()))
    kinds = []
    for _ in range(rng.randint(1, 4)):
        kinds.append((draw_words(rng), rng.choice((" ", " ", " ", "", "\n"))))
    lines = []
    while size > 0:
        # As in all writing, some words are frequent, and most gaps are the same.
        text = ""
        words, usual_gap = rng.choice(kinds)
        for _ in range(rng.randint(1, 20)):
            text += words[int(len(words) * rng.random() ** 2)]
            text += usual_gap if rng.random() < 0.8 else rng.choice(GAPS)
        if rng.random() < sentence_share:
            text = sentence(rng)
        lines.append(tokenizer.encode(text))
        size -= len(lines[-1])
    return lines


# -------------------------------------------------------------------------------------------------
# Documents


class Piece(NamedTuple):
    """Part of a document. Pieces are put together in the order of their places."""
    place: float  # 0 is the start of the text, 1 the end
    tokens: list[int]
    weights: list[float]


TEXT_WEIGHT = 0.01  # of what cannot be predicted from the context, except for numbers
REPEAT_WEIGHT = 0.5
ANSWER_WEIGHT = 1.0


def document(rng: random.Random, tokenizer, context: int, n_needles: int) -> Sequence:
    """A text with needles, a question about each of them, and repeated spans.

    The number of a needle has weight 0, since nothing predicts it, and the same number as an answer
    has weight 1.
    """
    needles = draw_numbers(rng, draw_needles(rng, n_needles, KEYS))
    questions = tokenizer.encode([QUESTION.format(key=key) for key in needles])
    answers = tokenizer.encode([ANSWER.format(value=value).strip() for value in needles.values()])
    span_lengths = []
    for _ in range(max(context // 512, 1)):
        span_lengths.append(rng.randint(8, min(40, context // 12)))
    # Each needle takes its tokens twice, once as a statement and once as question and answer.
    room = context - sum(span_lengths)
    room -= 2 * sum(len(tokens) for tokens in questions + answers)
    lines = draw_lines(rng, tokenizer, room)

    pieces = place_lines(lines, room)
    ask_last = rng.random() < 0.25  # all questions at the end, in a row
    for question, answer in zip(questions, answers, strict=True):
        stated, asked = draw_places(rng)
        if ask_last:
            asked += 1
        question_weights = [TEXT_WEIGHT] * len(question)
        unpredictable = [0.0] * len(answer)
        pieces.append(Piece(stated, question + answer, question_weights + unpredictable))
        predictable = [ANSWER_WEIGHT] * len(answer)
        pieces.append(Piece(asked, question + answer, question_weights + predictable))
    text = [token for line in lines for token in line]
    for length in span_lengths:
        start = rng.randrange(room - length)
        place = rng.uniform((start + length) / room, 1)  # anywhere after the span itself
        # The first four tokens tell which span it is.
        weights = [TEXT_WEIGHT] * 4 + [REPEAT_WEIGHT] * (length - 4)
        pieces.append(Piece(place, text[start:start + length], weights))

    pieces.sort(key=lambda piece: piece.place)
    tokens = [1]  # BOS
    weights = []
    for piece in pieces:
        tokens += piece.tokens
        weights += piece.weights
    return Sequence(tokens, weights)


def draw_numbers(rng: random.Random, needles: list[tuple[str, str]]) -> dict[str, str]:
    """Give a quarter of the needles another number, {key: number}.

    These numbers are longer or shorter, and some consist of only three different digits, so that
    the digits before do not tell the next one.
    """
    numbers = dict(needles)
    for key in numbers:
        if rng.random() < 0.25:
            digits = rng.sample(string.digits, rng.choice((3, 10, 10, 10)))
            numbers[key] = "".join(rng.choices(digits, k=rng.randint(3, 12)))
    return numbers


def place_lines(lines: list[list[int]], room: int) -> list[Piece]:
    """The lines as pieces, of `room` tokens in all; the last line is cut."""
    pieces = []
    used = 0
    for line in lines:
        kept = line[:room - used]
        pieces.append(Piece(used / room, kept, [TEXT_WEIGHT] * len(kept)))
        used += len(line)
    return pieces


def draw_places(rng: random.Random) -> tuple[float, float]:
    """Where a needle is stated, and where it is asked for.

    A third of the needles is stated at the very start, and a tenth at the very end. Without the
    latter, the model would learn that the end holds no needles, and would not look there.
    """
    edge = 0.02 * rng.random() ** 2
    kind = rng.random()
    if kind < 0.33:
        stated = edge - 0.001
    elif kind > 0.9:
        stated = 1 - edge
    else:
        stated = 0.97 * rng.random()
    anywhere = rng.uniform(stated, 1)
    at_the_end = max(stated + 1e-6, 1 - 0.02 * rng.random() ** 2)
    soon = stated + (1 - stated) * rng.random() ** 4
    return stated, rng.choice((anywhere, at_the_end, soon))


# -------------------------------------------------------------------------------------------------
# Training


def curriculum(rng: random.Random, tokenizer) -> Iterator[Step]:
    """The steps of both stages, in order."""
    for context, n_tokens, steps in COPYING:
        vocabulary = range(3, len(tokenizer))  # without <unk>, <s> and </s>
        if n_tokens is not None:
            vocabulary = range(300, 300 + n_tokens)
        for _ in range(steps):
            batch = []
            for _ in range(TOKENS_PER_STEP // context):
                batch.append(copying_sequence(rng, context, vocabulary))
            yield Step(context, COPYING_RATE, 1.0, batch)

    for context, n_needles, steps in RETRIEVING:
        for step in range(steps):
            rate = RETRIEVING_RATE
            if context == SHAPE["train_len"]:
                done = step / steps
                rate *= (math.cos(math.pi * done) + 1) / 2
            logit_scale = rng.uniform(*LOGIT_SCALES)
            batch = []
            for _ in range(TOKENS_PER_STEP // context):
                batch.append(document(rng, tokenizer, context, n_needles))
            yield Step(context, rate, logit_scale, batch)


def make_model(vocab_size: int, seed: int) -> Llama:
    """The model before training: norms of 1, matrices with a standard deviation of 1/sqrt(columns).
    """
    torch.manual_seed(seed)
    model = Llama(Config(vocab_size=vocab_size, **SHAPE))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def make_optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers; AdamW for the embedding, the output and the norms."""
    matrices = []
    others = []
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    return [torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.01)]


def train_step(model: Llama, optimizers: list[torch.optim.Optimizer], step: Step,
               warmup: float) -> tuple[float, float]:
    """One optimizer step, at `warmup` times its learning rate.

    Returns the mean loss of the tokens of answers, and the share of them that is right.
    """
    tokens = torch.tensor([sequence.tokens for sequence in step.batch])  # (B, context + 1)
    weights = torch.tensor([sequence.weights for sequence in step.batch])  # (B, context)
    method = replace(rope(), logit_scale=step.logit_scale)
    logits = model(tokens[:, :-1], [method] * model.config.n_layers)  # (B, context, vocab_size)
    targets = tokens[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    losses = losses.view_as(weights)  # (B * context,) -> (B, context)
    loss = (losses * weights).sum() / weights.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.param_groups[0]["lr"] = step.learning_rate * warmup
        optimizer.step()
        optimizer.zero_grad()
    is_answer = weights == ANSWER_WEIGHT
    right = logits.argmax(dim=-1) == targets
    return losses[is_answer].mean().item(), right[is_answer].float().mean().item()


def train(model: Llama, steps: Iterator[Step]) -> None:
    optimizers = make_optimizers(model)
    start = time.time()
    log = []
    for n, step in enumerate(steps, start=1):
        warmup = min(1.0, n / 100)  # over the first 100 steps
        log.append(train_step(model, optimizers, step, warmup))
        if n % 50 == 0:
            loss, right = torch.tensor(log[-50:]).mean(dim=0)
            print(f"step {n:4}  context {step.context:4}  loss of answers {loss:.4f}, "
                  f"{right:.2%} right  {time.time() - start:.0f} s", flush=True)


# -------------------------------------------------------------------------------------------------
# The checkpoint


def save(model: Llama, out: Path) -> None:
    """Write a checkpoint in Hugging Face's layout, since Meta's has no field for head_dim."""
    c = model.config
    tensors = {}
    for name, tensor in model.state_dict().items():
        if ".wq." in name or ".wk." in name:
            tensor = pairs_apart(tensor, c.head_dim)
        tensors[hugging_face_name(name)] = tensor.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
        max_position_embeddings=c.train_len, rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied, bos_token_id=1, eos_token_id=2, torch_dtype="float32")
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TINY, metavar="DIR",
                        help="where to write the checkpoint (default: over the bundled one)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.out / "tokenizer.model", args.seed)
    model = make_model(len(tokenizer), args.seed)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    train(model, curriculum(random.Random(args.seed), tokenizer))
    save(model, args.out)


if __name__ == "__main__":
    main()
