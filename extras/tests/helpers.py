"""What several test files share."""
import math
import random

import tokenizers
import torch

import needle
from model import Config, Llama
from tiny.grammar import sentence

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()

RELEASED_SCALES = {  # for 131,072 tokens, fastest group first
    "Llama-3-8B-Instruct": [4, 4, 2, 16, 32, 32, 16, 128],
    "Llama-3.1-8B-Instruct": [2, 32, 32, 2, 2, 2, 2, 1],
    "Mistral-7B-Instruct-v0.2": [4, 16, 2, 16, 32, 16, 16, 2],
    "Qwen2.5-7B-Instruct": [2, 16, 8, 8, 32, 8, 2, 4],
}


def random_llama(seed=0, **changes):
    """Two layers with grouped-query attention, and weights that make attention far from uniform."""
    shape = dict(vocab_size=48, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32,
                 ffn_dim=96, train_len=64, rope_theta=500000.0)
    model = Llama(Config(**shape | changes)).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(1.0, 0.1, generator=generator)
            continue
        gain = 3.0 if "wq" in name or "wk" in name else 1.0
        parameter.normal_(0.0, gain / math.sqrt(parameter.shape[-1]), generator=generator)
    return model


def command(monkeypatch, *arguments, main=needle.main):
    """Run a script's main() with arguments, as from a shell. Returns its exit code.

    Its default device is the CPU, even where there is a GPU.
    """
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["needle.py", *map(str, arguments)])
        if "--device" not in arguments:
            patch.setattr("torch.cuda.is_available", lambda: False)
        try:
            main()
        except SystemExit as leaving:
            return leaving.code or 0
    return 0


def write_sentences(file, count=150):
    """A text of generated sentences, by default of 1,024 to 4,096 tokens. Returns the file."""
    rng = random.Random(0)
    file.write_text(" ".join(sentence(rng) for _ in range(count)))
    return file


def refused(capsys):
    """The sentence of a refusal, the last line of stderr.

    At most a header, lines that begin with #, and argparse's usage were printed before it.
    """
    out, err = capsys.readouterr()
    assert all(line.startswith("#") for line in out.splitlines())
    *usage, sentence = err.splitlines()
    assert not usage or usage[0].startswith("usage: ")
    return sentence


def write_byte_level_tokenizer(path, special=(), bos=None):
    """Write a tokenizer.json with a token for every byte, and these special tokens.

    bos: the special token that the file's post-processor puts first.
    """
    vocabulary = {}
    for byte, symbol in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())):
        vocabulary[symbol] = byte
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if bos is not None:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    tokenizer.save(str(path / "tokenizer.json"))
