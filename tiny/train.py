"""The recipe of the bundled checkpoint: a Llama of 0.7 M parameters that retrieves, trained on 4,096 tokens of context.

    python tiny/train.py [--out tiny]        about 45 minutes on two CPU cores

It learns in two steps. First to copy: in random tokens `y | gap | y | gap` the second y can be predicted from the first, and
nothing else can, so an induction head forms within minutes. Then to retrieve: documents of needle.py's sentences hold several
needles, several questions about them and repeated spans, and grow from 128 tokens to 4,096. Nothing in it knows of DPE or
LaMPE: it is plain RoPE and next-token prediction, with the loss on what can be predicted from the context, plus a little of it
on all other text.
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

PARAMS = dict(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=128, vocab_size=1024, norm_eps=1e-5, rope_theta=10000.0,
              max_seq_len=4096)
TOKENS_PER_STEP = 8192
COPYING = [(64, 128, 400, 4e-3), (128, None, 300, 4e-3)]  # context, different tokens (None: all), steps, learning rate
RETRIEVING = [(128, 2, 3, 300, 2e-3), (512, 6, 8, 300, 2e-3), (1024, 12, 12, 400, 2e-3), (2048, 16, 14, 400, 1.5e-3),
              (4096, 16, 16, 2200, 1.5e-3)]  # context, needles, questions, steps, learning rate
FINAL_RATE = 3e-5  # where a cosine over the last stage ends


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


def document(rng: random.Random, tokenizer, context: int, needles: int, questions: int) -> tuple[list[int], list[float]]:
    """context + 1 tokens of sentences with needles, questions after them and repeated spans, and the weight of each target.

    Answers weigh 1 and repeats, but for their first tokens, 0.5. Needle numbers, which nothing predicts, weigh 0, other text 0.02.
    """
    drawn = draw_needles(rng, needles)
    asked = [rng.randrange(needles) for _ in range(questions)]
    heads = tokenizer.encode([QUESTION.format(key=key) for key, _ in drawn])
    answers = tokenizer.encode([ANSWER.format(value=value).strip() for _, value in drawn])
    spans = [rng.randint(8, min(40, context // 12)) for _ in range(max(context // 512, 1))]
    room = context - sum(spans) - sum(len(heads[n]) + len(answers[n]) for n in [*range(needles), *asked])
    filler = tokenizer.encode([sentence(rng) for _ in range(context // 8 + 4)])
    flat = [token for tokens in filler for token in tokens][:room]

    # A document is pieces (place, tokens, weights) in the order of their places, which run from 0 to 1.
    pieces, used = [], 0
    for tokens in filler:
        pieces.append((used / room, flat[used:used + len(tokens)], [0.02] * len(flat[used:used + len(tokens)])))
        used += len(tokens)
    places = [0.05 * rng.random() ** 2 if rng.random() < 0.25 else 0.97 * rng.random() for _ in drawn]  # more at the start
    for n, place in enumerate(places):
        pieces.append((place, heads[n] + answers[n], [0.02] * len(heads[n]) + [0.0] * len(answers[n])))
    for n in asked:
        place = rng.choice((rng.uniform(places[n], 1),  # anywhere after its needle, near the end, or soon after the needle
                            max(places[n] + 1e-6, 1 - 0.1 * rng.random() ** 2), places[n] + (1 - places[n]) * rng.random() ** 4))
        pieces.append((place, heads[n] + answers[n], [0.02] * len(heads[n]) + [1.0] * len(answers[n])))
    for length in spans:
        start = rng.randrange(room - length)
        pieces.append((rng.uniform((start + length) / room, 1), flat[start:start + length], [0.02] * 4 + [0.5] * (length - 4)))
    pieces.sort(key=lambda piece: piece[0])
    return [1] + [token for piece in pieces for token in piece[1]], [weight for piece in pieces for weight in piece[2]]


def curriculum(rng: random.Random, tokenizer):
    """For every step its context, its learning rate, and a function that draws a sequence."""
    for context, size, steps, rate in COPYING:
        vocabulary = range(300, 300 + size) if size else range(3, len(tokenizer))
        for step in range(steps):
            yield context, rate, lambda: copying(rng, context, vocabulary)
    for context, needles, questions, steps, rate in RETRIEVING:
        for step in range(steps):
            if context == PARAMS["max_seq_len"]:
                yield context, FINAL_RATE + (rate - FINAL_RATE) * (1 + math.cos(math.pi * step / steps)) / 2, lambda: document(
                    rng, tokenizer, context, needles, questions)
            else:
                yield context, rate, lambda: document(rng, tokenizer, context, needles, questions)


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
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    model = Llama(meta_config(args.out / "params.json", PARAMS, 0))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    began = time.time()
    for step, (context, rate, sample) in enumerate(curriculum(rng, tokenizer), start=1):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 100)
        batch = [sample() for _ in range(TOKENS_PER_STEP // context)]
        tokens, weights = torch.tensor([t for t, _ in batch]), torch.tensor([w for _, w in batch])
        logits = model(tokens[:, :-1])  # (B, context, vocab)
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view_as(weights)
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            answers = weights == 1
            right = (logits.argmax(dim=-1) == tokens[:, 1:])[answers].float().mean()
            print(f"step {step:4}  context {context:4}  loss {loss:.4f}  answers {losses[answers].mean():.4f}, {right:.1%} right  "
                  f"{time.time() - began:.0f} s", flush=True)
    save(model, args.out)


if __name__ == "__main__":
    main()
