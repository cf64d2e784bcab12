"""Load checkpoints into model.Llama, and their tokenizers.

Checkpoints of Llama, Qwen2, and Mistral without a sliding window, in the two published layouts:

    Hugging Face      config.json, and model.safetensors or shards with their index
    Meta's release    params.json, and consolidated.00.pth and so on, the model-parallel parts

Tokenizers: tokenizer.model (SentencePiece's format or Llama 3's), and any tokenizer.json.

Weights are mapped into memory. On the CPU they are used as they lie on disk, except for Hugging
Face's q and k, whose rows are put in Meta's order.
"""
import base64
import json
import pickle
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import sentencepiece
import tiktoken
import tokenizers
import torch
from safetensors import safe_open
from torch import Tensor

from model import Config, Llama, RopeScaling


class CheckpointError(Exception):
    """A checkpoint is missing, damaged or unsupported. The message names the file and the key."""


@contextmanager
def refusing(file: Path, problem: str):
    """Turn any error inside the block into a CheckpointError: file, problem, the error's text."""
    try:
        yield
    except (CheckpointError, KeyboardInterrupt):
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{file} holds more than tensors, or is damaged; "
                              "nothing in it was run") from None
    except BaseException as error:  # a panic in a library's Rust code is not an Exception
        first_line = f"{type(error).__name__} {error}".splitlines()[0]
        raise CheckpointError(f"{file} {problem}: {first_line}") from None


# -------------------------------------------------------------------------------------------------
# The model


def load_model(path, device=None, dtype=None, mesh=None) -> Llama:
    """Load the model in directory `path`, in eval mode.

    device: None is the CPU. dtype: for all weights; None keeps the embedding's.
    mesh: a 1-D DeviceMesh whose ranks hold one model together; None is one process.
    Raises CheckpointError; ValueError if the ranks do not divide heads, KV heads or ffn_dim.
    """
    path = Path(path)
    hugging_face = is_hugging_face(path)
    read = read_hugging_face if hugging_face else read_meta
    file, config, stored = read(path)
    if config.n_heads % config.n_kv_heads != 0 or config.head_dim % 2 != 0:
        raise CheckpointError(f"{path}: {config.n_heads} heads, {config.n_kv_heads} KV heads and a "
                              f"head_dim of {config.head_dim} do not fit together")
    with refusing(path, "has an invalid configuration"), torch.device("meta"):
        model = Llama(config)  # on the meta device, parameters have a shape and take no memory
    if mesh is not None:
        from extras.parallel import local_slice, shard
        shard(model, mesh)

    parameters = model.state_dict()
    stored_names = {name: name for name in parameters}
    if hugging_face:
        stored_names = {name: hugging_face_name(name) for name in parameters}
    missing = set(stored_names.values()) - stored.keys()
    unknown = stored.keys() - set(stored_names.values())
    if missing:
        raise CheckpointError(f"{file}: tensor {min(missing)} is missing")
    if unknown:
        raise CheckpointError(f"{file}: tensor {min(unknown)} is unknown")

    weights = {}
    for name, parameter in parameters.items():
        tensor = join(stored.pop(stored_names[name]), parameter.shape)
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{file}: tensor {stored_names[name]} has shape {tuple(tensor.shape)} and "
                f"{tensor.dtype}, not shape {tuple(parameter.shape)} and a floating-point type")
        if hugging_face and (".wq." in name or ".wk." in name):
            tensor = pairs_side_by_side(tensor, config.head_dim)
        if dtype is None:
            dtype = tensor.dtype  # the first parameter is the embedding
        if mesh is None:
            weights[name] = tensor.to(device=device, dtype=dtype)
        else:
            weights[name] = local_slice(tensor, parameter, device, dtype)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def join(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Join the model-parallel parts of a tensor of this shape, which are slices of it or copies."""
    for dim, (part_size, size) in enumerate(zip(parts[0].shape, shape, strict=False)):
        if part_size != size and len(parts) > 1:
            return torch.cat(parts, dim)  # slices
    return parts[0]  # copies, or the only part


def pairs_side_by_side(tensor: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of a q or k matrix, or of its bias, from Hugging Face's order to Meta's.

    RoPE rotates the rows of a head in pairs. Hugging Face stores the two rows of a pair D/2 apart,
    Meta side by side. With head_dim 8, where the first pair is a0 and b0:

        Hugging Face   a0 a1 a2 a3 b0 b1 b2 b3
        Meta           a0 b0 a1 b1 a2 b2 a3 b3
    """
    apart = tensor.unflatten(0, (-1, 2, head_dim // 2))  # (4096, 4096) -> (32, 2, 64, 4096)
    return apart.transpose(1, 2).flatten(0, 2)  # (32, 64, 2, 4096) -> (4096, 4096)


def pairs_apart(tensor: Tensor, head_dim: int) -> Tensor:
    """Undo pairs_side_by_side, to write a checkpoint in Hugging Face's layout."""
    side_by_side = tensor.unflatten(0, (-1, head_dim // 2, 2))  # (4096, 4096) -> (32, 64, 2, 4096)
    return side_by_side.transpose(1, 2).flatten(0, 2)  # (32, 2, 64, 4096) -> (4096, 4096)


# -------------------------------------------------------------------------------------------------
# The two layouts. Both read_hugging_face and read_meta return the file that lists the tensors, the
# configuration, and for each tensor's name a list of its model-parallel parts.


def is_hugging_face(path: Path) -> bool:
    """Whether a directory has Hugging Face's layout rather than Meta's. Raises CheckpointError."""
    for pattern in ("*.safetensors*", "consolidated.*.pth", "config.json", "params.json"):
        if any(path.glob(pattern)):  # the first one found decides
            return pattern in ("*.safetensors*", "config.json")
    raise CheckpointError(f"{path} is not a directory with config.json or params.json")


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises CheckpointError."""
    with refusing(file, "cannot be read as JSON"):
        values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return values


def number(file: Path, values: dict, key: str, kind: type, default=None):
    """values[key], or the default if it is absent or null, as a positive int or float.

    Raises CheckpointError.
    """
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise CheckpointError(f"{file} lacks {key}")
    if type(value) not in (int, float) or not 0 < value < 2 ** 31 or value != kind(value):
        expected = "whole number" if kind is int else "number"
        raise CheckpointError(f"{file}: {key} is {value!r}, not a positive {expected} below 2^31")
    return kind(value)


HUGGING_FACE_WORDS = {  # in the name of a tensor, ours -> theirs
    "tok_embeddings": "model.embed_tokens", "output": "lm_head",
    "layers": "model.layers", "norm": "model.norm",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "feed_forward": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def hugging_face_name(name: str) -> str:
    return ".".join(HUGGING_FACE_WORDS.get(word, word) for word in name.split("."))


def read_hugging_face(path: Path) -> tuple[Path, Config, dict[str, list[Tensor]]]:
    config = hugging_face_config(path / "config.json")
    listing = path / "model.safetensors.index.json"
    if listing.exists():
        with refusing(listing, "has no weight_map from tensors to files"):
            files = {path / name for name in read_json(listing)["weight_map"].values()}
    else:
        listing = path / "model.safetensors"
        files = {listing}
    stored = {}
    for file in sorted(files):
        with refusing(file, "is damaged"), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if not name.endswith("rotary_emb.inv_freq"):
                    stored[name] = [tensors.get_tensor(name)]
    if config.tied:
        stored.pop("lm_head.weight", None)
    return listing, config, stored


def hugging_face_config(file: Path) -> Config:
    """The Config of a config.json.

    Raises CheckpointError for a key that changes the forward pass in a way that is not supported,
    and for a missing key, unless its absence means the same in every release of the family.
    """
    values = read_json(file)
    family = hugging_face_family(file, values)
    values |= hugging_face_rope(values)
    get = partial(number, file, values)
    dim = get("hidden_size", int)
    n_heads = get("num_attention_heads", int)
    n_layers = get("num_hidden_layers", int)
    supported = {
        "rope_type": ["default", "llama3"], "partial_rotary_factor": [1, None],
        "hidden_act": ["silu", None], "attention_bias": [False, None], "mlp_bias": [False, None],
        "use_sliding_window": [False, None], "layer_types": [["full_attention"] * n_layers, None]}
    if family == "Mistral":
        values.setdefault("sliding_window", 4096)  # as transformers does
        supported["sliding_window"] = [None]
    for key, accepted in supported.items():
        if values.get(key) not in accepted:
            raise CheckpointError(f"{file}: {key} {values[key]!r} is not supported")

    rope_scaling = None
    if values["rope_type"] == "llama3":
        rope_scaling = RopeScaling(
            get("factor", float), get("low_freq_factor", float), get("high_freq_factor", float),
            get("original_max_position_embeddings", int))
    kv_heads_if_absent, theta_if_absent = None, None
    if family == "Llama":  # whose first release has neither
        kv_heads_if_absent = n_heads
        theta_if_absent = 10000.0
    return Config(
        vocab_size=get("vocab_size", int), dim=dim, n_layers=n_layers, n_heads=n_heads,
        n_kv_heads=get("num_key_value_heads", int, kv_heads_if_absent),
        head_dim=get("head_dim", int, dim // n_heads), ffn_dim=get("intermediate_size", int),
        train_len=get("max_position_embeddings", int),
        rope_theta=get("rope_theta", float, theta_if_absent), rope_scaling=rope_scaling,
        norm_eps=get("rms_norm_eps", float, 1e-6), tied=bool(values.get("tie_word_embeddings")),
        qkv_bias=family == "Qwen2")


def hugging_face_family(file: Path, values: dict) -> str:
    """Llama, Mistral or Qwen2. Raises CheckpointError."""
    given = values.get("architectures") or values.get("model_type")
    for family in ("Llama", "Mistral", "Qwen2"):
        if given in ([f"{family}ForCausalLM"], family.lower()):
            return family
    raise CheckpointError(f"{file}: architecture {given} is not supported, only Llama, Mistral "
                          "and Qwen2")


def hugging_face_rope(values: dict) -> dict:
    """rope_type and its parameters, which include rope_theta in files that transformers 5 wrote."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {"type": "default"}
    if not isinstance(rope, dict):
        rope = {"type": rope}
    return {"rope_type": rope.get("type")} | rope  # older files say type instead of rope_type


def read_meta(path: Path) -> tuple[Path, Config, dict[str, list[Tensor]]]:
    n_parts = len(list(path.glob("consolidated.*.pth"))) or 1
    files = [path / f"consolidated.{n:02}.pth" for n in range(n_parts)]
    stored = {}
    for file in files:
        with refusing(file, "is damaged"):
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        with refusing(file, "is not a dictionary of tensors"):
            for name, tensor in tensors.items():
                if not name.endswith("rope.freqs"):
                    stored.setdefault(name, []).append(tensor.detach())
    for name, parts in stored.items():
        if len(parts) != n_parts or len({part.shape for part in parts}) != 1:
            raise CheckpointError(f"{path}: tensor {name} is not in every part in the same shape")
    output_rows = sum(len(part) for part in stored.get("output.weight", []))
    params = path / "params.json"
    return files[0], meta_config(params, read_json(params), output_rows), stored


def meta_config(file: Path, values: dict, output_rows: int) -> Config:
    """The Config of a params.json. output_rows is the vocabulary if that is -1, as in Llama 2."""
    get = partial(number, file, values)
    dim = get("dim", int)
    n_heads = get("n_heads", int)
    vocab_size = output_rows
    if values.get("vocab_size") != -1:
        vocab_size = get("vocab_size", int)
    # 2/3 of 4 dim, since SwiGLU has three matrices instead of two; then rounded up.
    ffn_dim = int(get("ffn_dim_multiplier", float, 1.0) * int(8 * dim / 3))
    multiple = get("multiple_of", int, 256)
    ffn_dim = -(-ffn_dim // multiple) * multiple
    rope_theta = get("rope_theta", float, 10000.0)
    train_len = 8192 if rope_theta == 500000.0 else 4096  # Llama 3, or 2
    rope_scaling = None
    if values.get("use_scaled_rope"):
        train_len = 131072
        factor = 32.0 if dim in (2048, 3072) else 8.0  # Llama 3.2 1B and 3B, or 3.1
        rope_scaling = RopeScaling(get("rope_scaling_factor", float, factor))
    return Config(
        vocab_size=vocab_size, dim=dim, n_layers=get("n_layers", int), n_heads=n_heads,
        n_kv_heads=get("n_kv_heads", int, n_heads), head_dim=dim // n_heads, ffn_dim=ffn_dim,
        train_len=get("max_seq_len", int, train_len), rope_theta=rope_theta,
        rope_scaling=rope_scaling, norm_eps=get("norm_eps", float, 1e-5))


# -------------------------------------------------------------------------------------------------
# Tokenizers
#
#     encode(text) -> ids, without BOS. Text that looks like a special token is encoded as text.
#     decode(ids) -> text
#     bos_id, or None; stop_ids, which end an answer; special, a dict of the special tokens' ids;
#     vocab_size, the largest id + 1

STOP_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|im_end|>", "</s>")
LLAMA_3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251))]


def load_tokenizer(path):
    """Load the tokenizer in directory `path`. Raises CheckpointError."""
    for name in ("tokenizer.model", "tokenizer.json", "original/tokenizer.model"):
        file = Path(path) / name
        if file.is_file():
            break
    else:
        raise CheckpointError(f"{path} is not a directory with tokenizer.model or tokenizer.json")
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file)
    with refusing(file, "is neither SentencePiece's nor Llama 3's, or is damaged"):
        content = file.read_bytes()
        if re.match(rb"\S+ \d+\s", content):
            return Llama3Tokenizer(content)
        return SentencePieceTokenizer(content)


class SentencePieceTokenizer:
    """The tokenizer.model of Llama 2, of Mistral and of the bundled model."""

    def __init__(self, content: bytes):
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(content)
        self.encode = model.encode
        self.decode = model.decode
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self.stop_ids = [model.eos_id()]
        self.special = {}
        self.vocab_size = len(model)


class Llama3Tokenizer:
    """The tokenizer.model of Llama 3: each line holds a base64 token and its rank, its id."""

    def __init__(self, content: bytes):
        pairs = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        self.special = {name: len(ranks) + n for n, name in enumerate(LLAMA_3_SPECIAL)}
        ids = {*ranks.values(), *self.special.values()}
        if len(ids) < len(ranks) + 256 or any(bytes([n]) not in ranks for n in range(256)):
            raise ValueError("two tokens have the same id, or a byte has no token")
        self.model = tiktoken.Encoding("llama3", pat_str=LLAMA_3_SPLIT, mergeable_ranks=ranks,
                                       special_tokens=self.special)
        self.decode = self.model.decode
        self.bos_id = self.special["<|begin_of_text|>"]
        self.stop_ids = [self.special["<|end_of_text|>"], self.special["<|eot_id|>"]]
        self.vocab_size = self.model.n_vocab

    def encode(self, text: str) -> list[int]:
        ids = []
        for start in range(0, len(text), 400_000):  # tiktoken panics on longer runs of blanks
            ids += self.model.encode_ordinary(text[start:start + 400_000])
        return ids


class HuggingFaceTokenizer:
    """Any tokenizer.json, read by the library that defines the format."""

    def __init__(self, file: Path):
        with refusing(file, "is not a tokenizer, or is damaged"):
            self.model = tokenizers.Tokenizer.from_file(str(file))
            self.model.no_truncation()
            self.model.no_padding()
            self.model.encode_special_tokens = True  # as text
            vocabulary = self.model.get_vocab()
            self.vocab_size = max(vocabulary.values()) + 1
            probe = self.model.encode("a")
        # If the model expects BOS, the post-processor in the file puts it first.
        self.bos_id = probe.ids[0] if probe.special_tokens_mask[:1] == [1] else None
        added = self.model.get_added_tokens_decoder()
        self.special = {token.content: n for n, token in added.items() if token.special}
        known_stops = [self.special[name] for name in STOP_TOKENS if name in self.special]
        self.stop_ids = sorted({*eos_ids(file.parent, vocabulary), *known_stops})

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


def eos_ids(path: Path, vocabulary: dict[str, int]) -> list[int]:
    """eos_token_id, a number or a list, of generation_config.json or else config.json."""
    for file in (path / "generation_config.json", path / "config.json"):
        found = read_json(file).get("eos_token_id") if file.exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if any(token_id not in vocabulary.values() for token_id in ids):
                raise CheckpointError(f"{file}: eos_token_id {found!r} is not in the vocabulary")
            return ids
    return []
