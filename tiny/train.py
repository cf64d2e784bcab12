"""The recipe of the bundled checkpoint: a Llama of 0.6 M parameters that retrieves, trained on 4,096 tokens of context.

    python tiny/train.py [--out DIR]        under an hour on two CPU cores

It learns in three steps. To copy: in random tokens `y | gap | y | gap` the second y can be predicted from the first, and nothing
else can, so an induction head forms within minutes. To retrieve: documents of needle.py's sentences hold several needles, several
questions about them and repeated spans, and grow from 128 tokens to 4,096. To be sharp: the same documents, with every attention
logit multiplied by a random factor from 0.45 to 1.2. Heads that are right when their logits are halved keep most of their weight on
the right token when there are 16 times as many others, whatever the positions are; without this step the far tokens of a 65,536 token
prompt drown even the heads that look one token back. Nothing here knows of DPE or LaMPE: positions are plain RoPE's, below 4,096.

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

PARAMS = dict(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=128, vocab_size=1024, norm_eps=1e-5, rope_theta=10000.0,
              max_seq_len=4096)
TOKENS_PER_STEP = 8192
COPYING = [(64, 128, 400, 4e-3), (128, None, 300, 4e-3)]  # context, different tokens (None: all), steps, learning rate
RETRIEVING = [(128, 2, 3, 300, 2e-3), (512, 6, 8, 300, 2e-3), (1024, 12, 12, 400, 2e-3), (2048, 16, 14, 400, 1.5e-3),
              (4096, 16, 16, 2200, 1.5e-3)]  # context, needles, questions, steps, learning rate
SHARPENING = [(4096, 16, 16, 900, 1.5e-3, 0.45), (4096, 16, 48, 560, 8e-4, 0.7)]  # the same, and the least factor on logits
FINAL_RATE = 3e-5  # where the cosine over the last stage of retrieving, and over each of sharpening, ends


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


def document(rng: random.Random, tokenizer, context: int, needles: int, questions: int, text: float = 0.02,
             before: float = 0.0) -> tuple[list[int], list[float]]:
    """context + 1 tokens of sentences with needles, questions after them and repeated spans, and the weight of each target.

    Answers weigh 1 and repeats, but for their first tokens, 0.5. Needle numbers, which nothing predicts, weigh 0, all else `text`.
    Places run from 0, the first sentence, to 1; `before` moves the first needles before it.
    """
    drawn = draw_needles(rng, needles)
    asked = [rng.randrange(needles) for _ in range(questions)]
    heads = tokenizer.encode([QUESTION.format(key=key) for key, _ in drawn])
    answers = tokenizer.encode([ANSWER.format(value=value).strip() for _, value in drawn])
    spans = [rng.randint(8, min(40, context // 12)) for _ in range(max(context // 512, 1))]
    room = context - sum(spans) - sum(len(heads[n]) + len(answers[n]) for n in [*range(needles), *asked])
    filler = tokenizer.encode([sentence(rng) for _ in range(context // 8 + 4)])
    flat = [token for tokens in filler for token in tokens][:room]

    # A document is pieces (place, tokens, weights) in the order of their places.
    pieces, used = [], 0
    for tokens in filler:
        part = flat[used:used + len(tokens)]  # cut short where the room ends
        pieces.append((used / room, part, [text] * len(part)))
        used += len(tokens)
    places = [0.05 * rng.random() ** 2 - before if rng.random() < 0.25 else 0.97 * rng.random() for _ in drawn]  # more at the start
    for n, place in enumerate(places):
        pieces.append((place, heads[n] + answers[n], [text] * len(heads[n]) + [0.0] * len(answers[n])))
    for n in asked:
        place = rng.choice((rng.uniform(places[n], 1),  # anywhere after its needle, near the end, or soon after the needle
                            max(places[n] + 1e-6, 1 - 0.1 * rng.random() ** 2), places[n] + (1 - places[n]) * rng.random() ** 4))
        pieces.append((place, heads[n] + answers[n], [text] * len(heads[n]) + [1.0] * len(answers[n])))
    for length in spans:
        start = rng.randrange(room - length)
        pieces.append((rng.uniform((start + length) / room, 1), flat[start:start + length], [text] * 4 + [0.5] * (length - 4)))
    pieces.sort(key=lambda piece: piece[0])
    return [1] + [token for piece in pieces for token in piece[1]], [weight for piece in pieces for weight in piece[2]]


def cosine(rate: float, part: float) -> float:
    return FINAL_RATE + (rate - FINAL_RATE) * (1 + math.cos(math.pi * part)) / 2


def learning(rng: random.Random, tokenizer):
    """Copying and retrieving: for every step its context, its learning rate, the factor on logits and a function that draws a sequence."""
    for context, size, steps, rate in COPYING:
        vocabulary = range(300, 300 + size) if size else range(3, len(tokenizer))
        for _ in range(steps):
            yield context, rate, 1.0, lambda: copying(rng, context, vocabulary)
    for stage in RETRIEVING:
        context, needles, questions, steps, rate = stage
        for step in range(steps):
            now = cosine(rate, step / steps) if stage is RETRIEVING[-1] else rate
            yield context, now, 1.0, lambda: document(rng, tokenizer, context, needles, questions)


def sharpening(rng: random.Random, tokenizer, stage: tuple):
    context, needles, questions, steps, rate, least = stage
    for step in range(steps):
        yield context, cosine(rate, step / steps), rng.uniform(least, 1.2), lambda: document(
            rng, tokenizer, context, needles, questions, text=0.004, before=0.001)


def train(model: Llama, curriculum) -> None:
    optimizer, began = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01), time.time()
    for step, (context, rate, temperature, sample) in enumerate(curriculum, start=1):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 100)
        batch = [sample() for _ in range(TOKENS_PER_STEP // context)]
        tokens, weights = torch.tensor([t for t, _ in batch]), torch.tensor([w for _, w in batch])
        logits = model(tokens[:, :-1], [rope()._replace(temperature=temperature)] * model.config.n_layers)  # (B, context, vocab)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(weights)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            answers = weights == 1
            right = (logits.argmax(dim=-1) == tokens[:, 1:])[answers].float().mean()
            print(f"step {step:4}  context {context:4}  logits x {temperature:.2f}  loss {loss:.4f}  answers {losses[answers].mean():.4f}, "
                  f"{right:.1%} right  {time.time() - began:.0f} s", flush=True)


def save(model: Llama, out: Path) -> None:
    """Meta's release layout: wq and wk with rotary pairs side by side, rows (head, 2, f) -> (head, f, 2)."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in weights:
        if name.endswith(("wq.weight", "wk.weight")):
            rows = weights[name].unflatten(0, (-1, 2, model.config.head_dim // 2))
            weights[name] = rows.transpose(1, 2).flatten(0, 2).contiguous()
    torch.save(weights, out / "consolidated.00.pth")
    (out / "params.json").write_text(json.dumps(PARAMS, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="where the checkpoint goes (default: here)")
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
    for n, stage in enumerate(SHARPENING, start=1):
        train(model, sharpening(random.Random(args.seed + n), tokenizer, stage))
    save(model, args.out)


if __name__ == "__main__":
    main()
