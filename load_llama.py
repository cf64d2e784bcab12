"""Llama checkpoints and their tokenizers, from disk into model.Llama.

Two layouts are published, and both are read:

    Hugging Face      config.json, model.safetensors, or shards and model.safetensors.index.json
    Meta's release    params.json, consolidated.00.pth, one file for each model-parallel part

and three tokenizers: SentencePiece (Llama 2) and Llama 3's tokenizer.model, told apart by content, and byte-level tokenizer.json.
Files are mapped, not read: a tensor costs host memory while it moves, and on the CPU weights are used as they lie on disk, but for
Hugging Face's q and k, whose rows are put in Meta's order.
"""
import base64
import json
import math
import pickle
from functools import partial
from pathlib import Path

import sentencepiece
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import Config, Llama, RopeScaling

LLAMA_3 = dict(vocab_size=128256, n_kv_heads=8, rope_theta=500000.0)
LLAMA_32 = LLAMA_3 | dict(ffn_dim=8192, train_len=131072, rope_scaling=RopeScaling(factor=32.0), tied=True)
SHAPES = {  # as published, for random weights: Llama 3.2 1B and 3B, Llama 3 8B and 70B
    "1b": Config(dim=2048, n_layers=16, n_heads=32, head_dim=64, **LLAMA_32),
    "3b": Config(dim=3072, n_layers=28, n_heads=24, head_dim=128, **LLAMA_32),
    "8b": Config(dim=4096, n_layers=32, n_heads=32, head_dim=128, ffn_dim=14336, train_len=8192, **LLAMA_3),
    "70b": Config(dim=8192, n_layers=80, n_heads=64, head_dim=128, ffn_dim=28672, train_len=8192, **LLAMA_3)}


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or not a Llama: one sentence that names the file and the tensor or key."""


def load_model(path, device=None, dtype=None) -> Llama:
    """The Llama in directory `path`, in eval mode, on `device` (None: CPU) in `dtype` (None: each tensor's own).

    random:1b, 3b, 8b or 70b instead of a directory gives random weights of that published shape, bfloat16 where dtype is None.
    Errors: CheckpointError.
    """
    if str(path).startswith("random:"):
        return random_model(str(path)[7:], device, dtype)
    path = directory(path)
    config, tensors = read_hugging_face(path) if is_hugging_face(path) else read_meta(path)
    if config.n_heads % config.n_kv_heads or config.head_dim % 2:
        raise CheckpointError(f"{path}: {config.n_heads} heads of {config.head_dim} dimensions and {config.n_kv_heads} KV heads are no "
                              f"grouped-query attention with rotary pairs")
    with torch.device("meta"):
        model = Llama(config)
    expected, weights = model.state_dict(), {}
    for name, source, tensor in tensors(expected):
        if tensor.shape != expected[name].shape:
            raise CheckpointError(f"{source} has shape {tuple(tensor.shape)}, its configuration says {tuple(expected[name].shape)}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{source} holds {str(tensor.dtype)[6:]}, not floating-point weights")
        weights[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def random_model(shape: str, device=None, dtype=None) -> Llama:
    """Random weights of a published shape, made on the device: what a length costs, without a download."""
    if shape not in SHAPES:
        raise CheckpointError(f"random:{shape} is not a published shape: use random:{', random:'.join(SHAPES)}")
    with torch.device("meta"):
        model = Llama(SHAPES[shape]).to(dtype or torch.bfloat16)
    model = model.to_empty(device=device or "cpu").eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1) if "norm" in name else parameter.normal_(0, 0.02)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Configuration files


def directory(path) -> Path:
    if not Path(path).is_dir():
        raise CheckpointError(f"{path} is not a directory: give one that holds a Llama checkpoint, or random:8b")
    return Path(path)


def read_json(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return values


def number(file: Path, values: dict, key: str, kind: type, default=None):
    """values[key] as an int or float above 0; what is missing or something else is refused by name."""
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise CheckpointError(f"{file} lacks {key}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf or value != kind(value):
        raise CheckpointError(f"{file}: {key} is {value!r}, not a positive {'whole ' * (kind is int)}number")
    return kind(value)


def is_hugging_face(path: Path) -> bool:
    """Which layout a directory has. One with both, as on the hub with original/ inside, is Hugging Face's."""
    hugging_face = any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists()
    meta = any(path.glob("consolidated.*.pth"))
    if (path / "config.json").exists() and (hugging_face or not meta):
        return True
    if (path / "params.json").exists():
        return False
    if hugging_face or meta:
        raise CheckpointError(f"{path} holds weights, but {'config.json' if hugging_face else 'params.json'} is missing")
    raise CheckpointError(f"{path} holds neither config.json with model.safetensors nor params.json with consolidated.00.pth")


# ---------------------------------------------------------------------------------------------------------------------
# Hugging Face's layout

HUGGING_FACE_NAMES = {  # ours -> theirs
    "tok_embeddings": "model.embed_tokens", "output": "lm_head", "layers": "model.layers", "norm": "model.norm",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "feed_forward": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def hugging_face_config(file: Path) -> Config:
    values = read_json(file)
    architecture = values.get("architectures") or values.get("model_type")
    if architecture not in (["LlamaForCausalLM"], "llama"):
        raise CheckpointError(f"{file}: architecture {architecture} is not a Llama (LlamaForCausalLM)")
    for key, supported in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if values.get(key) not in (supported, None):
            raise CheckpointError(f"{file}: {key} {values[key]!r} is not supported, only {supported!r}")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}  # transformers 5 or 4
    rope = rope if isinstance(rope, dict) else {"rope_type": rope}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise CheckpointError(f"{file}: rope type {kind!r} is not supported, only default and llama3")
    get = partial(number, file, values | rope)
    dim, heads = get("hidden_size", int), get("num_attention_heads", int)
    return Config(
        vocab_size=get("vocab_size", int), dim=dim, n_layers=get("num_hidden_layers", int), n_heads=heads,
        n_kv_heads=get("num_key_value_heads", int, heads), head_dim=get("head_dim", int, dim // heads),
        ffn_dim=get("intermediate_size", int), train_len=get("max_position_embeddings", int),
        rope_theta=get("rope_theta", float, 10000.0), norm_eps=get("rms_norm_eps", float, 1e-6),
        rope_scaling=None if kind == "default" else RopeScaling(
            get("factor", float), get("low_freq_factor", float), get("high_freq_factor", float),
            get("original_max_position_embeddings", int)),
        tied=bool(values.get("tie_word_embeddings")))


def read_hugging_face(path: Path):
    """The configuration, and a generator over (our name, where from, tensor), one file at a time."""
    config = hugging_face_config(path / "config.json")
    index = path / "model.safetensors.index.json"
    sharded = index.exists()
    if sharded:
        where = read_json(index).get("weight_map")
        if not isinstance(where, dict):
            raise CheckpointError(f"{index} lacks weight_map")
        files = [path / name for name in sorted(set(where.values()))]
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing" + (f", but {index.name} lists it" if sharded else ""))

    def tensors(expected):
        theirs = {".".join(HUGGING_FACE_NAMES.get(part, part) for part in name.split(".")): name for name in expected}
        ignored = ("rotary_emb.inv_freq",) + ("lm_head.weight",) * config.tied
        for file in files:
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():
                        if name in theirs:
                            tensor, ours = opened.get_tensor(name), theirs.pop(name)
                            if ours.endswith(("wq.weight", "wk.weight")) and tensor.shape == expected[ours].shape:
                                # pairs that rotate together are D/2 rows apart here, neighbours in Meta's order and ours
                                tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
                            yield ours, f"{file}: tensor {name}", tensor
                        elif not name.endswith(ignored):
                            raise CheckpointError(f"{file}: tensor {name} does not belong to this Llama")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is damaged: {error}") from None
        for name in theirs:
            raise CheckpointError(f"{index if sharded else files[0]}: tensor {name} is missing")
    return config, tensors


# ---------------------------------------------------------------------------------------------------------------------
# Meta's release layout


def meta_config(file: Path, values: dict, output_rows: int) -> Config:
    get, scaled = partial(number, file, values), bool(values.get("use_scaled_rope"))
    dim, heads, theta, multiple = get("dim", int), get("n_heads", int), get("rope_theta", float, 10000.0), get("multiple_of", int, 256)
    ffn_dim = int(get("ffn_dim_multiplier", float, 1.0) * int(2 * 4 * dim / 3))  # 2/3 of 4 dim, as SwiGLU has three matrices
    factor = get("rope_scaling_factor", float, 32.0 if dim in (2048, 3072) else 8.0)  # Llama 3.2 1B and 3B, or 3.1
    return Config(
        vocab_size=output_rows if values.get("vocab_size") == -1 else get("vocab_size", int), dim=dim,
        n_layers=get("n_layers", int), n_heads=heads, n_kv_heads=get("n_kv_heads", int, heads), head_dim=dim // heads,
        ffn_dim=-(-ffn_dim // multiple) * multiple,
        train_len=get("max_seq_len", int, 131072 if scaled else 8192 if theta == 500000 else 4096),
        rope_theta=theta, norm_eps=get("norm_eps", float, 1e-5), rope_scaling=RopeScaling(factor) if scaled else None)


def read_meta(path: Path):
    """The configuration, and a generator over (our name, where from, tensor), each joined from its model-parallel parts."""
    files = sorted(path.glob("consolidated.*.pth"))
    parts = []
    for n in range(max(len(files), 1)):
        if path / f"consolidated.{n:02}.pth" not in files:
            raise CheckpointError(f"{path / f'consolidated.{n:02}.pth'} is missing")
    for file in files:
        try:
            part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:
            raise CheckpointError(f"{file} holds more than tensors, and nothing of it was run") from None
        except (RuntimeError, OSError, EOFError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged: {str(error).splitlines()[0]}") from None
        if not isinstance(part, dict) or not all(isinstance(tensor, Tensor) for tensor in part.values()):
            raise CheckpointError(f"{file} is not a dictionary of tensors")
        for name in sorted(part.keys() ^ (parts[0] if parts else part).keys()):
            raise CheckpointError(f"{file}: tensor {name} is not in every part")
        parts.append(part)
    if "output.weight" not in parts[0]:
        raise CheckpointError(f"{files[0]}: tensor output.weight is missing")
    params = path / "params.json"
    config = meta_config(params, read_json(params), sum(len(part["output.weight"]) for part in parts))

    def join(name, shape):
        """Parts of the whole shape are copies; others are cut along the dimension in which they fall short of it."""
        tensors = [part[name] for part in parts]
        cut = [d for d, size in enumerate(shape) if tensors[0].ndim == len(shape) and tensors[0].shape[d] != size]
        return torch.cat(tensors, dim=cut[0]) if len(parts) > 1 and len(cut) == 1 else tensors[0]

    def tensors(expected):
        for name in sorted((parts[0].keys() ^ expected.keys()) - {"rope.freqs"}):
            problem = "is missing" if name in expected else "does not belong to this Llama"
            raise CheckpointError(f"{files[0]}: tensor {name} {problem}")
        for name in expected:
            yield name, f"{files[0]}: tensor {name}", join(name, expected[name].shape)
    return config, tensors


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers. Each has .encode(text) -> ids without BOS, .decode(ids) -> text, .bos_id, .stop_ids, .vocab_size, .special.

LLAMA_3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(4)),
                   "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
                   *(f"<|reserved_special_token_{n}|>" for n in range(5, 251))]


class SentencePieceTokenizer:
    """Llama 2's tokenizer, and the bundled model's."""

    def __init__(self, content: bytes):
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.encode, self.decode, self.vocab_size = model.encode, model.decode, len(model)
        self.bos_id, self.stop_ids, self.special = model.bos_id() if model.bos_id() >= 0 else None, [model.eos_id()], {}


class BytePairTokenizer:
    """Llama 3's tokenizer: byte-level BPE. Text that looks like a special token is encoded as text."""

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int], split: str = LLAMA_3_SPLIT):
        self.encoding = tiktoken.Encoding("llama3", pat_str=split, mergeable_ranks=ranks, special_tokens=special)
        self.decode, self.vocab_size, self.special = self.encoding.decode, self.encoding.n_vocab, special
        self.bos_id = special.get("<|begin_of_text|>")
        self.stop_ids = [special[name] for name in ("<|end_of_text|>", "<|eot_id|>") if name in special]

    def encode(self, text: str) -> list[int]:
        parts = (text[start:start + 400_000] for start in range(0, len(text), 400_000))  # much longer blanks make tiktoken panic
        return [token for part in parts for token in self.encoding.encode_ordinary(part)]


def load_tokenizer(path):
    """The tokenizer in directory `path`, its kind told by its content; for random:8b the bundled one. Errors: CheckpointError."""
    path = directory(Path(__file__).resolve().parent / "tiny" if str(path).startswith("random:") else path)
    candidates = [path / "tokenizer.model", path / "tokenizer.json", path / "original" / "tokenizer.model"]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"{path} holds no tokenizer.model or tokenizer.json")
    try:
        if file.suffix == ".json":
            return byte_level_json(read_json(file))
        content = file.read_bytes()
        lines = content.split(b"\n")
        if len(lines[0].split()) == 2 and lines[0].split()[1].isdigit():  # base64 and rank
            pairs = (line.split() for line in lines if line)
            ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            return BytePairTokenizer(ranks, {name: len(ranks) + n for n, name in enumerate(LLAMA_3_SPECIAL)})
        if content:  # of none SentencePiece would make a tokenizer, too
            return SentencePieceTokenizer(content)
        raise ValueError("an empty file")
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is neither SentencePiece nor Llama 3's byte-pair encoding, or is damaged "
                              f"({type(error).__name__})") from None


def byte_level_json(values: dict) -> BytePairTokenizer:
    """A tokenizer.json of the byte-level BPE kind: its ids are the ranks, and each character of its tokens stands for a byte."""
    steps = values["pre_tokenizer"].get("pretokenizers", [values["pre_tokenizer"]])
    if values["model"]["type"] != "BPE" or "ByteLevel" not in [step["type"] for step in steps]:
        raise ValueError("not byte-level BPE")
    split = next((step["pattern"]["Regex"] for step in steps if step["type"] == "Split"), LLAMA_3_SPLIT)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # stand for themselves; the others, in order, from 256 on
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    special = {token["content"]: token["id"] for token in values["added_tokens"]}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in values["model"]["vocab"].items() if token not in special}
    return BytePairTokenizer(ranks, special, split)
