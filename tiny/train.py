"""The recipe of the bundled checkpoint: a Llama of 1.1 M parameters that retrieves, trained on 4,096 tokens of context.

    python tiny/train.py [--out DIR]        about three quarters of an hour on two CPU cores

First it learns to copy: in random tokens `gap | y | gap | y | gap` the second y can be predicted from the first, and
nothing else can, so an induction head forms within minutes. Then it learns to retrieve: documents hold several needles,
a question about each and repeated spans, and grow from 128 tokens to 4,096. Half of them are needle.py's sentences, the
others also text of other kinds, so that any file can be the haystack. Every attention logit of a step is multiplied by
one random factor: heads that are right when their logits are halved keep most of their weight on the right token when
there are 16 times as many others, whatever the positions are. Without it the far tokens of a 65,536 token prompt drown
even the heads that look one token back. The loss is on what can be predicted from the context, and a little on all
other text. Nothing here knows of DPE or LaMPE: positions are plain RoPE's, below 4,096.
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
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from load_llama import HUGGING_FACE_WORDS  # noqa: E402
from model import Config, Llama  # noqa: E402
from needle import ANSWER, KEYS, QUESTION, draw_needles, sentence  # noqa: E402
from rope_extrap import rope  # noqa: E402

# rope_theta is Llama 3's: with 10,000 too few frequencies turn slowly enough to match words 4,096 tokens back.
SHAPE = dict(dim=256, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=256, rope_theta=5e5, train_len=4096)
TOKENS_PER_STEP = 8192
COPYING = [(64, 128, 350), (128, None, 250)]  # context, different tokens (None: all), steps
RETRIEVING = [(128, 2, 200), (512, 6, 300), (1024, 12, 150), (2048, 24, 150), (4096, 32, 1200)]  # .., needles, steps
COPYING_RATE, RETRIEVING_RATE = 4e-3, 2e-3  # over the steps of 4,096 tokens it falls to 0 along a cosine
SHARPENING = (0.45, 1.2)  # the range of the factor on attention logits

ALPHABETS = [string.ascii_lowercase] * 5 + [string.ascii_letters, string.digits, string.digits, string.printable]
ALPHABETS += ["".join(map(chr, range(first, end))) for first, end in (
    (0xC0, 0x180), (0x391, 0x3CA), (0x410, 0x450), (0x5D0, 0x5EB), (0x621, 0x64B), (0x905, 0x93A),  # Latin to Hindi
    (0x2010, 0x2300), (0x3041, 0x30FF), (0x4E00, 0x9FA6), (0xAC00, 0xD7A4), (0x1F300, 0x1F650))]  # signs to emoji
GAPS = ["", "\n", "\n\n", "\n    ", "    ", "\t", "\r\n"]
GAPS += """, |. |: |; |! |? | - | (|) | = |"|'|_|/|\u3002|\u060c """.split("|")


def train_tokenizer(path: Path, seed: int) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece: the sentences' words whole, single digits, other ASCII characters, bytes for all the rest."""
    rng = random.Random(seed)
    text = [sentence(rng) for _ in range(20000)] + [QUESTION.format(key=f"{a} {b}") for a in KEYS[0] for b in KEYS[1]]
    words = sorted({word for line in text for word in re.findall(r"\w+", line)})
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text + list(string.printable)), model_writer=trained, model_type="bpe",
        user_defined_symbols=["\u2581" + word for word in words], vocab_size=1024, hard_vocab_limit=False,
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


def other_words(rng: random.Random) -> list[str]:
    """The words of a text of another kind: the sentences' in any order, those of needles, or of random characters."""
    kind, count = rng.random(), round(2 ** rng.uniform(1, 9))
    if kind < 0.25:
        return " ".join(sentence(rng) for _ in range(count // 10 + 1)).split()
    if kind < 0.3:
        return [*KEYS[0], *KEYS[1], *QUESTION.split(), *QUESTION.split()]
    alphabet = rng.choice(ALPHABETS)
    return ["".join(rng.choices(alphabet, k=1 + int(rng.expovariate(0.25)))) for _ in range(count)]


def filler(rng: random.Random, tokenizer, size: int) -> list[list[int]]:
    """The text of a document, lines of `size` tokens or more in all: sentences, other text, or some of both."""
    lines, sentences = [], rng.choice((1.0, 1.0, 0.0, rng.random()))  # what part of the lines are sentences
    kinds = [(other_words(rng), rng.choice((" ", " ", " ", *GAPS[:2]))) for _ in range(rng.randint(1, 4))]
    while size > 0:
        text, (words, gap) = "", rng.choice(kinds)
        for _ in range(rng.randint(1, 20)):  # as in all writing, some words are frequent and most gaps alike
            text += words[int(len(words) * rng.random() ** 2)] + (gap if rng.random() < 0.8 else rng.choice(GAPS))
        lines.append(tokenizer.encode(sentence(rng) if rng.random() < sentences else text))
        size -= len(lines[-1])
    return lines


def document(rng: random.Random, tokenizer, context: int, needles: int) -> tuple[list[int], list[float]]:
    """context + 1 tokens of text with needles, a question about each after it and repeats, and each target's weight.

    A third of the needles is told at the very start, a tenth at the very end, the others in between. Answers weigh 1,
    repeats, but for their first tokens, 0.5, needle numbers, which nothing predicts, 0, and all else 0.01.
    """
    drawn = dict(draw_needles(rng, needles))
    for key in drawn:  # other numbers too, some of few different digits, so that the last ones do not tell the next
        if rng.random() < 0.25:
            digits = rng.sample(string.digits, rng.choice((3, 10, 10, 10)))
            drawn[key] = "".join(rng.choices(digits, k=rng.randint(3, 12)))
    heads = tokenizer.encode([QUESTION.format(key=key) for key in drawn])
    answers = tokenizer.encode([ANSWER.format(value=value).strip() for value in drawn.values()])
    spans = [rng.randint(8, min(40, context // 12)) for _ in range(max(context // 512, 1))]
    room = context - sum(spans) - 2 * sum(map(len, heads + answers))
    lines, asked_last = filler(rng, tokenizer, room), rng.random() < 0.25  # all questions in a row, at the end
    flat = [token for tokens in lines for token in tokens][:room]
    # A document is pieces (place, tokens, weights) in the order of their places, 0 the first line and 1 the end.
    pieces, used = [], 0
    for tokens in lines:
        pieces.append((used / room, tokens[:room - used], [0.01] * len(tokens[:room - used])))  # to where the room ends
        used += len(tokens)
    for head, answer in zip(heads, answers):
        edge, kind = 0.02 * rng.random() ** 2, rng.random()
        # Were none told late, the model would rely on that, and at the end not look at what was just before.
        told = edge - 0.001 if kind < 0.33 else 1 - edge if kind > 0.9 else 0.97 * rng.random()
        asked = rng.choice((rng.uniform(told, 1),  # anywhere after it, at the very end, or soon after it
                            max(told + 1e-6, 1 - 0.02 * rng.random() ** 2), told + (1 - told) * rng.random() ** 4))
        pieces.append((told, head + answer, [0.01] * len(head) + [0.0] * len(answer)))
        pieces.append((asked + asked_last, head + answer, [0.01] * len(head) + [1.0] * len(answer)))
    for length in spans:
        start = rng.randrange(room - length)
        place = rng.uniform((start + length) / room, 1)
        pieces.append((place, flat[start:start + length], [0.01] * 4 + [0.5] * (length - 4)))
    pieces.sort(key=lambda piece: piece[0])
    return [1] + [token for piece in pieces for token in piece[1]], [weight for piece in pieces for weight in piece[2]]


def curriculum(rng: random.Random, tokenizer):
    """For every step: context, learning rate, the factor on attention logits, a function that draws a sequence."""
    for context, size, steps in COPYING:
        vocabulary = range(300, 300 + size) if size else range(3, len(tokenizer))
        for _ in range(steps):
            yield context, COPYING_RATE, 1.0, lambda: copying(rng, context, vocabulary)
    for context, needles, steps in RETRIEVING:
        for step in range(steps):
            part = step / steps if context == SHAPE["train_len"] else 0
            rate = RETRIEVING_RATE * ((math.cos(math.pi * part) + 1) / 2)
            yield context, rate, rng.uniform(*SHARPENING), lambda: document(rng, tokenizer, context, needles)


def train(model: Llama, steps) -> None:
    """Muon for the matrices inside the layers, AdamW for embedding, output and norms."""
    inside = [parameter for parameter in model.layers.parameters() if parameter.ndim == 2]
    outside = [parameter for parameter in model.parameters() if all(parameter is not other for other in inside)]
    optimizers = (torch.optim.Muon(inside, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(outside, betas=(0.9, 0.95), weight_decay=0.01))
    began, log = time.time(), []
    for step, (context, rate, temperature, sample) in enumerate(steps, start=1):
        batch = [sample() for _ in range(TOKENS_PER_STEP // context)]
        tokens, weights = torch.tensor([t for t, _ in batch]), torch.tensor([w for _, w in batch])
        methods = [rope()._replace(temperature=temperature)] * model.config.n_layers
        logits, targets = model(tokens[:, :-1], methods), tokens[:, 1:]  # (B, context, vocab), (B, context)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(weights)
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 100)
            optimizer.step()
            optimizer.zero_grad()
        right = (logits.argmax(dim=-1) == targets).float()
        log.append([x[weights == 1].mean().item() for x in (losses, right)])
        if step % 50 == 0:
            loss, right = torch.tensor(log[-50:]).mean(dim=0)
            print(f"step {step:4}  context {context:4}  answers' loss {loss:.4f}, {right:.2%} right  "
                  f"{time.time() - began:.0f} s", flush=True)


def save(model: Llama, out: Path) -> None:
    """Hugging Face's layout, since in Meta's head_dim is always dim / n_heads."""
    c, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("wq.weight", "wk.weight")):  # pairs rotating together: neighbours here, D/2 rows apart there
            tensor = tensor.unflatten(0, (-1, c.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
        tensors[".".join(HUGGING_FACE_WORDS.get(word, word) for word in name.split("."))] = tensor.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", vocab_size=c.vocab_size,
        hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, max_position_embeddings=c.train_len,
        rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied, bos_token_id=1, eos_token_id=2,
        torch_dtype="float32"), indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="default: the bundled one's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.out / "tokenizer.model", args.seed)
    torch.manual_seed(args.seed)
    model = Llama(Config(vocab_size=len(tokenizer), **SHAPE))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters", flush=True)
    train(model, curriculum(random.Random(args.seed), tokenizer))
    save(model, args.out)


if __name__ == "__main__":
    main()
