"""The recipe of the bundled checkpoint: a Llama of 1.3 M parameters that retrieves, trained on 4,096 tokens of context.

    python tiny/train.py [--out DIR]        about an hour on two CPU cores

First it learns to copy: in random tokens `gap | y | gap | y | gap` the second y can be predicted from the first, and nothing else can,
so an induction head forms within minutes. Then it learns to retrieve: documents of needle.py's sentences hold several needles, a
question about each and repeated spans, and grow from 128 tokens to 4,096. There every attention logit of a step is multiplied by one
random factor. Heads that are right when their logits are halved keep most of their weight on the right token when there are 16 times
as many others, whatever the positions are; without it the far tokens of a 65,536 token prompt drown even the heads that look one
token back. Nothing here knows of DPE or LaMPE: positions are plain RoPE's, below 4,096.

The loss is on what can be predicted from the context, and a little on all other text.
"""
import argparse
import io
import json
import math
import random
import re
import string
import sys
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load_llama import meta_config  # noqa: E402
from model import Llama  # noqa: E402
from needle import ANSWER, KEYS, QUESTION, draw_needles, sentence  # noqa: E402
from rope_extrap import rope  # noqa: E402

PARAMS = dict(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=128, ffn_dim_multiplier=0.37, vocab_size=1024, norm_eps=1e-5,
              rope_theta=10000.0, max_seq_len=4096)
TOKENS_PER_STEP = 8192
COPYING = [(64, 128, 400), (128, None, 300)]  # context, different tokens (None: all), steps
RETRIEVING = [(128, 2, 300), (512, 6, 300), (1024, 12, 300), (2048, 24, 300), (4096, 32, 2600)]  # context, needles, steps
FINISHING = (4096, 32, 400)  # the same, with needles told near the end too
COPYING_RATE, RETRIEVING_RATE, FINISHING_RATE = 4e-3, 2e-3, 4e-4  # over the stages of 4,096 tokens they fall to 0 along a cosine
SHARPENING = (0.45, 1.2)  # the range of the factor on attention logits


def train_tokenizer(path: Path, seed: int) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model: the words of the sentences whole, single digits, other ASCII characters, bytes for all the rest."""
    rng = random.Random(seed)
    text = [sentence(rng) for _ in range(20000)] + [QUESTION.format(key=f"{a} {b}") for a in KEYS[0] for b in KEYS[1]]
    words = sorted({word for line in text for word in re.findall(r"\w+", line)})
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text + list(string.printable)), model_writer=trained, model_type="bpe",
        user_defined_symbols=["\u2581" + word for word in words], vocab_size=PARAMS["vocab_size"], hard_vocab_limit=False,
        split_digits=True, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        character_coverage=1.0, num_threads=1, minloglevel=2)
    path.write_bytes(trained.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())


def copying(rng: random.Random, context: int, vocabulary: range) -> tuple[list[int], list[float]]:
    """gap | y | gap | y | gap of random tokens, with a target weight of 1 on all of the second y but its first two."""
    tokens = rng.choices(vocabulary, k=context + 1)
    length = rng.randint(16, context // 2)
    first = rng.randint(0, context - 2 * length)
    second = rng.randint(first + length, context - length)
    tokens[second:second + length] = tokens[first:first + length]
    return tokens, [float(second + 2 <= n < second + length) for n in range(1, context + 1)]


def document(rng: random.Random, tokenizer, context: int, needles: int, late: float = 0.0) -> tuple[list[int], list[float]]:
    """context + 1 tokens of sentences with needles, a question about each after it and repeated spans, and the weight of each target.

    A third of the needles is told at the very start, `late` of them at the very end, and the others in between. Answers weigh 1 and
    repeats, but for their first tokens, 0.5. Needle numbers, which nothing predicts, weigh 0, all else 0.01.
    """
    drawn = draw_needles(rng, needles)
    heads = tokenizer.encode([QUESTION.format(key=key) for key, _ in drawn])
    answers = tokenizer.encode([ANSWER.format(value=value).strip() for _, value in drawn])
    spans = [rng.randint(8, min(40, context // 12)) for _ in range(max(context // 512, 1))]
    room = context - sum(spans) - 2 * sum(map(len, heads + answers))
    filler = tokenizer.encode([sentence(rng) for _ in range(context // 8 + 4)])
    flat = [token for tokens in filler for token in tokens][:room]

    # A document is pieces (place, tokens, weights) in the order of their places, 0 the first sentence and 1 the end.
    pieces, used = [], 0
    for tokens in filler:
        part = flat[used:used + len(tokens)]  # cut short where the room ends
        pieces.append((used / room, part, [0.01] * len(part)))
        used += len(tokens)
    for head, answer in zip(heads, answers):
        edge, kind = 0.02 * rng.random() ** 2, rng.random()
        told = edge - 0.001 if kind < 0.33 else 1 - edge if kind > 1 - late else 0.97 * rng.random()
        asked = rng.choice((rng.uniform(told, 1),  # anywhere after it, at the very end, or soon after it
                            max(told + 1e-6, 1 - 0.02 * rng.random() ** 2), told + (1 - told) * rng.random() ** 4))
        pieces.append((told, head + answer, [0.01] * len(head) + [0.0] * len(answer)))
        pieces.append((asked, head + answer, [0.01] * len(head) + [1.0] * len(answer)))
    for length in spans:
        start = rng.randrange(room - length)
        pieces.append((rng.uniform((start + length) / room, 1), flat[start:start + length], [0.01] * 4 + [0.5] * (length - 4)))
    pieces.sort(key=lambda piece: piece[0])
    return [1] + [token for piece in pieces for token in piece[1]], [weight for piece in pieces for weight in piece[2]]


def cosine(rate: float, part: float) -> float:
    return rate * (math.cos(math.pi * part) + 1) / 2


def learning(rng: random.Random, tokenizer):
    """For every step: the context, the learning rate, the factor on attention logits and a function that draws a sequence."""
    for context, size, steps in COPYING:
        vocabulary = range(300, 300 + size) if size else range(3, len(tokenizer))
        for _ in range(steps):
            yield context, COPYING_RATE, 1.0, lambda: copying(rng, context, vocabulary)
    for context, needles, steps in RETRIEVING:
        for step in range(steps):
            rate = cosine(RETRIEVING_RATE, step / steps) if context == PARAMS["max_seq_len"] else RETRIEVING_RATE
            yield context, rate, rng.uniform(*SHARPENING), lambda: document(rng, tokenizer, context, needles)


def finishing(rng: random.Random, tokenizer):
    """Learning never asks, at the end of 4,096 tokens, for a number told just before; without these steps the model relies on that."""
    context, needles, steps = FINISHING
    for step in range(steps):
        yield context, cosine(FINISHING_RATE, step / steps), rng.uniform(*SHARPENING), lambda: document(
            rng, tokenizer, context, needles, late=0.15)


def train(model: Llama, curriculum) -> None:
    """Muon for the matrices inside the layers, AdamW for embedding, output and norms."""
    inside = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]
    outside = [parameter for parameter in model.parameters() if all(parameter is not other for other in inside)]
    optimizers = (torch.optim.Muon(inside, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(outside, betas=(0.9, 0.95), weight_decay=0.01))
    began, log = time.time(), []
    for step, (context, rate, temperature, sample) in enumerate(curriculum, start=1):
        batch = [sample() for _ in range(TOKENS_PER_STEP // context)]
        tokens, weights = torch.tensor([t for t, _ in batch]), torch.tensor([w for _, w in batch])
        logits = model(tokens[:, :-1], [rope()._replace(temperature=temperature)] * model.config.n_layers)  # (B, context, vocab)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(weights)
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 100)
            optimizer.step()
            optimizer.zero_grad()
        answers = weights == 1
        log.append((losses[answers].mean().item(), (logits.argmax(dim=-1) == tokens[:, 1:])[answers].float().mean().item()))
        if step % 50 == 0:
            loss, right = (sum(column) / len(log) for column in zip(*log))
            print(f"step {step:4}  context {context:4}  answers' loss {loss:.4f}, {right:.2%} right  {time.time() - began:.0f} s", flush=True)
            log.clear()


def save(model: Llama, out: Path) -> None:
    """Meta's release layout."""
    torch.save(model.state_dict(), out / "consolidated.00.pth")
    (out / "params.json").write_text(json.dumps(PARAMS, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where the checkpoint goes (default: here, over the bundled one)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.out / "tokenizer.model", args.seed)
    PARAMS["vocab_size"] = len(tokenizer)
    torch.manual_seed(args.seed)
    model = Llama(meta_config(args.out / "params.json", PARAMS, 0))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    train(model, learning(random.Random(args.seed), tokenizer))
    train(model, finishing(random.Random(args.seed + 1), tokenizer))
    save(model, args.out)


if __name__ == "__main__":
    main()
