"""Small checkpoints in the published layouts, and damage to them."""
import json
import random

import torch
from safetensors.torch import save_file

from load_llama import CheckpointError

TOKENS = torch.randint(48, (1, 40), generator=torch.Generator().manual_seed(2))
META_SHAPE = dict(dim=128, head_dim=32, ffn_dim=352)  # 2/3 of 4 * 128, rounded up to 32s
ABSENT = object()  # the value of a key that is left out

HUGGING_FACE_TENSORS = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
}


def same_logits(model, other, tolerance=1e-4):
    torch.testing.assert_close(model(TOKENS), other(TOKENS), atol=tolerance, rtol=tolerance)


def hugging_face_tensors(model):
    """The weights by Hugging Face's names, each pair of rotary rows half a head apart."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "output.weight" and model.config.tied:
            continue
        if ".wq." in name or ".wk." in name:
            heads = []
            for head in tensor.split(model.config.head_dim):
                heads += [head[::2], head[1::2]]
            tensor = torch.cat(heads)
        module, kind = name.rsplit(".", 1)  # kind is weight or bias
        layer = ""
        if module.startswith("layers."):
            _, n, module = module.split(".", 2)
            layer = f"model.layers.{n}."
        tensors[f"{layer}{HUGGING_FACE_TENSORS[module]}.{kind}"] = tensor
    return tensors


def write_json(file, values):
    """Write an object, without the keys whose value is ABSENT."""
    kept = {key: value for key, value in values.items() if value is not ABSENT}
    file.write_text(json.dumps(kept))


def edit_json(file, **changes):
    write_json(file, json.loads(file.read_text()) | changes)


def write_hugging_face(model, path, family="Llama", shards=1, **changes):
    """changes are made to config.json."""
    c = model.config
    windows = {"Llama": ABSENT, "Mistral": None, "Qwen2": 32768}
    config = dict(
        architectures=[f"{family}ForCausalLM"], vocab_size=c.vocab_size, hidden_size=c.dim,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim, intermediate_size=c.ffn_dim,
        max_position_embeddings=c.train_len, rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tied, sliding_window=windows[family])
    write_json(path / "config.json", config | changes)

    tensors = hugging_face_tensors(model)
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return
    files = [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    weight_map = {name: files[n % shards] for n, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file},
                  path / file)
    index = {"metadata": {}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index)


def write_meta(model, path, parts=1, zipped=True, **changes):
    """changes are made to params.json. zipped: in the format that torch.save has today."""
    c = model.config
    params = dict(dim=c.dim, n_layers=c.n_layers, n_heads=c.n_heads, n_kv_heads=c.n_kv_heads,
                  multiple_of=32, vocab_size=-1, norm_eps=c.norm_eps, rope_theta=c.rope_theta)
    write_json(path / "params.json", params | changes)
    for part in range(parts):
        tensors = {"rope.freqs": torch.zeros(4)}
        for name, tensor in model.state_dict().items():
            if tensor.ndim == 2:
                by_columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
                tensor = tensor.chunk(parts, dim=int(by_columns))[part]
            tensors[name] = tensor.clone()
        torch.save(tensors, path / f"consolidated.{part:02}.pth",
                   _use_new_zipfile_serialization=zipped)


def damaged(content, rng):
    """Bytes of which some are flipped, cut out, doubled or drawn.

    Most often this is near an end, where the parts of a file are described.
    """
    near_start = rng.randrange(min(2000, len(content)))
    near_end = len(content) - 1 - rng.randrange(min(2000, len(content)))
    start = rng.choice([rng.randrange(len(content)), near_start, near_end])
    length = rng.choice([1, 1, 1, 4, 100])
    piece = content[start:start + length]
    flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in piece)
    other = rng.choice([flipped, b"", piece * 2, rng.randbytes(length)])
    return content[:start] + other + content[start + length:]


def refusals_of_damage(path, load, count):
    """Damage the files in a directory, each in turn. It loads, or is refused in one sentence.

    Returns how often it was refused.
    """
    files = sorted(path.iterdir())
    rng = random.Random(0)
    refusals = []
    for n in range(count):
        file = files[n % len(files)]
        whole = file.read_bytes()
        file.unlink()  # rather than overwritten, since it is mapped into memory
        file.write_bytes(damaged(whole, rng))
        try:
            load()
        except CheckpointError as refusal:
            refusals.append(str(refusal))
        file.unlink()
        file.write_bytes(whole)
    assert not any("\n" in refusal for refusal in refusals)
    return len(refusals)


# -------------------------------------------------------------------------------------------------
# A byte-level BPE vocabulary: the bytes, then tokens of which any two parts merge, in this order

RANKS = {bytes([byte]): byte for byte in range(256)}
for token in (b" t", b"he", b" the", b"in", b"er", b"12", b"123", b"\n\n", "é".encode(), b"<|",
              b"|>", b"  "):
    RANKS[token] = len(RANKS)


def byte_symbols():
    """The characters by which GPT-2's files show each byte."""
    symbols = {}
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        n_before = len([symbol for symbol in symbols.values() if ord(symbol) >= 256])
        symbols[byte] = chr(byte) if printable else chr(256 + n_before)
    return symbols


def byte_level_bpe():
    """RANKS as the files have it: the vocabulary (token -> id), and the merges (pairs)."""
    symbols = byte_symbols()
    vocabulary = {}
    for token, rank in RANKS.items():
        vocabulary["".join(symbols[byte] for byte in token)] = rank
    merges = []
    for token in vocabulary:
        for n in range(1, len(token)):
            first, second = token[:n], token[n:]
            if first in vocabulary and second in vocabulary:
                merges.append((first, second))
    return vocabulary, merges
