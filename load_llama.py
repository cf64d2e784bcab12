"""Load checkpoints into model.Llama, and their tokenizers.

Checkpoints of Llama, Qwen2, and Mistral without a sliding window, in the two published layouts:

    Hugging Face      config.json, and model.safetensors or shards with their index
    Meta's release    params.json, and consolidated.00.pth and so on, the model-parallel parts

Tokenizers: any tokenizer.json, and tokenizer.model in SentencePiece's format or in Llama 3's.

Weights are memory-mapped, and used as they are on disk where possible. Exceptions on the CPU are
Hugging Face's q and k, whose rows are put in Meta's order, the final norm and the output matrix,
which become float32, parts that are joined, and what has another dtype than the one wanted.
"""
import base64
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from zipfile import is_zipfile

import sentencepiece
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
    except ImportError as error:
        raise CheckpointError(f"{file} needs a package: pip install {error.name}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror or error}") from None
    except BaseException as error:  # a panic in a library's Rust code is not an Exception
        reason = f"{type(error).__name__} {error}".splitlines()[0][:200]
        if isinstance(error, pickle.UnpicklingError):  # its text suggests unsafe loading
            reason = "it holds more than tensors, or is damaged; nothing in it was run"
        if file.is_file() and file.stat().st_size < 1024 and b"git-lfs" in file.read_bytes():
            reason = "it is a Git LFS pointer; git lfs pull fetches the file itself"
        raise CheckpointError(f"{file} {problem}: {reason}") from None


# -------------------------------------------------------------------------------------------------
# The model


def load_model(path, device=None, dtype=None) -> Llama:
    """Load the model in directory `path`, in eval mode.

    device: None is the CPU. dtype: None keeps the embedding's. The final norm and the output
    matrix are always float32, because bfloat16 would round a logit of 20 by up to 0.06, and the
    largest logits would often tie.
    Raises CheckpointError.
    """
    model, tensors = open_checkpoint(path, dtype)
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors}, assign=True)
    return model.eval().requires_grad_(False)


def open_checkpoint(path, dtype=None) -> tuple[Llama, Iterator[tuple[str, Tensor]]]:
    """The model in directory `path` without its weights, and its weights one after the other.

    The model is on the meta device, where parameters have a shape and take no memory. Weights come
    as (name, tensor), on the CPU and in the dtype that load_model gives them. Each may be freed
    before the next one is taken.
    Raises CheckpointError.
    """
    path = Path(path)
    hugging_face = is_hugging_face(path)
    read = read_hugging_face if hugging_face else read_meta
    file, config, stored = read(path)
    if config.n_heads % config.n_kv_heads != 0 or config.head_dim % 2 != 0:
        raise CheckpointError(f"{path}: {config.n_heads} heads, {config.n_kv_heads} KV heads and a "
                              f"head_dim of {config.head_dim} do not fit together")
    with refusing(path, "has an invalid configuration"), torch.device("meta"):
        model = Llama(config)

    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    stored_names = {name: hugging_face_name(name) if hugging_face else name for name in shapes}
    embedding = stored_names["tok_embeddings.weight"]
    if config.tied:
        stored_names["output.weight"] = embedding
    mismatched = sorted(stored.keys() ^ set(stored_names.values()))
    if mismatched:
        problem = "unknown" if mismatched[0] in stored else "missing"
        raise CheckpointError(f"{file}: tensor {mismatched[0]} is {problem}")

    def tensors():
        for name, shape in shapes.items():
            tensor = join(stored[stored_names[name]], shape)
            if tensor.shape != shape:
                raise CheckpointError(f"{file}: tensor {stored_names[name]} has shape "
                                      f"{tuple(tensor.shape)}, not {tuple(shape)}")
            if hugging_face and (".wq." in name or ".wk." in name):
                tensor = pairs_side_by_side(tensor, config.head_dim)
            if name in ("norm.weight", "output.weight"):
                yield name, tensor.float()
            else:
                yield name, tensor.to(dtype or stored[embedding][0].dtype)
    return model, tensors()


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
    with refusing(path, "cannot be read"):
        names = [file.name for file in path.iterdir()]
    for pattern in ("*.safetensors*", "consolidated.*.pth", "config.json", "params.json"):
        if any(fnmatch(name, pattern) for name in names):  # the first one found decides
            return pattern in ("*.safetensors*", "config.json")
    raise CheckpointError(f"{path} has neither config.json nor params.json")


def read_json(file: Path) -> dict:
    """The JSON object in a file. Raises CheckpointError."""
    with refusing(file, "cannot be read as JSON"):
        values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return values


LIMITS = {int: ("whole number below 2^31", 2 ** 31), float: ("number below 1e38", 1e38)}


def number(file: Path, values: dict, key: str, kind: type, default=None):
    """values[key], or the default if it is absent or null, as a positive int or float.

    Raises CheckpointError.
    """
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"{file} lacks {key}")
    expected, limit = LIMITS[kind]
    if type(value) not in (int, float) or not 0 < value < limit or value != kind(value):
        raise CheckpointError(f"{file}: {key} is {value!r:.80}, not a positive {expected}")
    return kind(value)


def unquantized(file: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor. Raises CheckpointError if its numbers are not those of ordinary weights."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(f"{file}: tensor {name} is {tensor.dtype}; only float32, bfloat16 "
                              "and float16 are supported, and no quantized weights")
    return tensor


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
    listing = path / "model.safetensors"
    index = path / "model.safetensors.index.json"
    files = {listing}
    if index.exists() and not listing.exists():  # if both exist, the index is a leftover
        listing = index
        with refusing(index, "has no weight_map from tensors to files"):
            files = {path / name for name in read_json(index)["weight_map"].values()}
    stored = {}
    for file in sorted(files):
        with refusing(file, "cannot be read"):
            file.open("rb").close()  # safetensors reports an unreadable file as missing
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if not name.endswith("rotary_emb.inv_freq"):
                        stored[name] = [unquantized(file, name, tensors.get_tensor(name))]
    output = stored.get("lm_head.weight")
    if config.tied and output is not None:  # the only matrix, an equal one, or not tied after all
        embedding = stored.setdefault("model.embed_tokens.weight", output)
        if torch.equal(output[0], embedding[0]):
            del stored["lm_head.weight"]
        else:
            config = replace(config, tied=False)
    return listing, config, stored


# The families, and the training length that transformers assumes if config.json gives none.
TRAIN_LENS = {"Llama": 2048, "Mistral": 131072, "Qwen2": 32768}


def hugging_face_config(file: Path) -> Config:
    """The Config of a config.json.

    Raises CheckpointError if a key changes the forward pass in an unsupported way, or if a required
    key is missing. The training length is not required, nor is a key whose absence means the same
    in every release of the family.
    """
    values = read_json(file)
    given = values.get("architectures") or values.get("model_type")
    family = next((name for name in TRAIN_LENS
                   if given in ([f"{name}ForCausalLM"], name.lower())), None)
    if family is None:
        raise CheckpointError(f"{file}: architecture {given!s:.80} is not supported, only "
                              f"{', '.join(TRAIN_LENS)}")
    values |= hugging_face_rope(values)
    get = partial(number, file, values)
    dim = get("hidden_size", int)
    n_heads = get("num_attention_heads", int)
    n_layers = get("num_hidden_layers", int)
    supported = {
        "rope_type": ["default", "llama3"], "partial_rotary_factor": [1, None],
        "hidden_act": ["silu", None], "attention_bias": [False, None], "mlp_bias": [False, None],
        "use_sliding_window": [False, None], "layer_types": [["full_attention"] * n_layers, None],
        "quantization_config": [None]}
    if family == "Mistral":
        values.setdefault("sliding_window", 4096)  # as transformers does
        supported["sliding_window"] = [None]
    for key, accepted in supported.items():
        if values.get(key) not in accepted:
            raise CheckpointError(f"{file}: {key} {values[key]!r:.80} is not supported")

    rope_scaling = None
    if values["rope_type"] == "llama3":
        rope_scaling = RopeScaling(
            get("factor", float), get("original_max_position_embeddings", int),
            get("low_freq_factor", float), get("high_freq_factor", float))
    is_llama = family == "Llama"  # whose first release has neither KV heads nor theta
    return Config(
        vocab_size=get("vocab_size", int), dim=dim, n_layers=n_layers, n_heads=n_heads,
        n_kv_heads=get("num_key_value_heads", int, n_heads if is_llama else None),
        head_dim=get("head_dim", int, dim // n_heads), ffn_dim=get("intermediate_size", int),
        train_len=get("max_position_embeddings", int, TRAIN_LENS[family]),
        rope_theta=get("rope_theta", float, 10000.0 if is_llama else None),
        rope_scaling=rope_scaling,
        norm_eps=get("rms_norm_eps", float, 1e-6), tied=bool(values.get("tie_word_embeddings")),
        qkv_bias=family == "Qwen2")


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
        with refusing(file, "cannot be read"):
            tensors = torch.load(file, map_location="cpu", weights_only=True,
                                 mmap=is_zipfile(file))  # the older format cannot be mapped
        with refusing(file, "is not a dictionary of tensors"):
            for name, tensor in tensors.items():
                if not name.endswith("rope.freqs"):
                    tensor = unquantized(file, name, tensor.detach())
                    stored.setdefault(name, []).append(tensor)
    for name, parts in stored.items():
        if len(parts) != n_parts or len({part.shape for part in parts}) != 1:
            raise CheckpointError(f"{path}: tensor {name} is not in every part in the same shape")
    vocab_size = sum(part.shape[:1].numel()  # if there is no output, that is noticed later
                     for part in stored.get("output.weight", [torch.ones(1)]))
    params = path / "params.json"
    return files[0], meta_config(params, read_json(params), vocab_size), stored


def meta_config(file: Path, values: dict, vocab_size: int) -> Config:
    """The Config of a params.json, whose own vocab_size is often absent, or -1."""
    get = partial(number, file, values)
    dim = get("dim", int)
    n_heads = get("n_heads", int)
    # 2/3 of 4 dim, since SwiGLU has three matrices instead of two; then rounded up.
    ffn_dim = int(get("ffn_dim_multiplier", float, 1.0) * int(8 * dim / 3))
    multiple = get("multiple_of", int, 256)
    ffn_dim = -(-ffn_dim // multiple) * multiple
    rope_theta = get("rope_theta", float, 10000.0)
    train_len = {500000.0: 8192, 1000000.0: 16384}.get(rope_theta, 4096)  # Llama 3, Code Llama, 2
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
#     bos_id, or None; stop_ids, which end an answer; vocab_size, the largest id + 1

STOP_TOKENS = ("<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|im_end|>", "</s>")
LLAMA_3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251))]


def load_tokenizer(path):
    """Load the tokenizer in directory `path`. Raises CheckpointError.

    tokenizer.json comes first, since tokenizer.model lacks the tokens that were added to a model.
    """
    path = Path(path)
    names = ["tokenizer.json", "tokenizer.model", "original/tokenizer.model"]
    with refusing(path, "cannot be read"):
        if (path / "params.json").exists():
            names.append("../tokenizer.model")  # where Llama 2's download script puts it
        files = [path / name for name in names if (path / name).exists()]
    if not files:
        raise CheckpointError(f"{path} is not a directory with tokenizer.json or tokenizer.model")
    with refusing(files[0], "cannot be read as a tokenizer"):
        content = files[0].read_bytes()
        if files[0].suffix == ".json":
            tokenizer = HuggingFaceTokenizer(content)
        elif re.match(rb"\S+ \d+\s", content):
            tokenizer = Llama3Tokenizer(content)
        else:
            tokenizer = SentencePieceTokenizer(content, json_if_any(path / "tokenizer_config.json"))
    tokenizer.stop_ids = sorted({*tokenizer.stop_ids, *eos_ids(path)})
    return tokenizer


def json_if_any(file: Path) -> dict:
    """The JSON object in a file, or an empty one if there is no file. Raises CheckpointError."""
    return read_json(file) if file.exists() else {}


def eos_ids(path: Path) -> list[int]:
    """eos_token_id, a number or a list, of generation_config.json or else config.json."""
    for file in (path / "generation_config.json", path / "config.json"):
        found = json_if_any(file).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            with refusing(file, "has an eos_token_id that is not a number"):
                return [int(token_id) for token_id in ids if 0 <= token_id < 2 ** 31]
    return []


class SentencePieceTokenizer:
    """The tokenizer.model of Llama 2, of Mistral and of the bundled model.

    settings is the content of tokenizer_config.json. Its add_bos_token and bos_token determine BOS.
    Where there is a tokenizer.json, they are ignored, both here and in transformers 5.
    """

    def __init__(self, content: bytes, settings: dict):
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(content)
        self.encode = model.encode
        self.decode = model.decode
        self.vocab_size = len(model)
        self.stop_ids = [model.eos_id()]
        pieces = {model.id_to_piece(token_id): token_id for token_id in range(len(model))}
        bos = settings.get("bos_token")
        name = bos["content"] if isinstance(bos, dict) else bos
        self.bos_id = pieces.get(name, model.bos_id())
        if self.bos_id < 0 or not settings.get("add_bos_token", True):
            self.bos_id = None


class Llama3Tokenizer:
    """The tokenizer.model of Llama 3: a line holds a base64 token and its rank, which is its id."""

    def __init__(self, content: bytes):
        import tiktoken
        pairs = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        special = {name: len(ranks) + n for n, name in enumerate(LLAMA_3_SPECIAL)}
        ids = {*ranks.values(), *special.values()}
        if len(ids) < len(ranks) + 256 or any(bytes([n]) not in ranks for n in range(256)):
            raise ValueError("two tokens have the same id, or a byte has no token")
        self.model = tiktoken.Encoding("llama3", pat_str=LLAMA_3_SPLIT, mergeable_ranks=ranks,
                                       special_tokens=special)
        self.decode = self.model.decode
        self.bos_id = special["<|begin_of_text|>"]
        self.stop_ids = [special["<|end_of_text|>"], special["<|eot_id|>"]]
        self.vocab_size = self.model.n_vocab

    def encode(self, text: str) -> list[int]:
        # In pieces, since tiktoken panics on runs of a million blanks.
        pieces = [text[start:start + 400_000] for start in range(0, len(text), 400_000)]
        return sum(self.model.encode_ordinary_batch(pieces), [])


class HuggingFaceTokenizer:
    """Any tokenizer.json, read by the library that defines the format."""

    def __init__(self, content: bytes):
        import tokenizers
        self.model = tokenizers.Tokenizer.from_buffer(content)
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True  # as text
        self.vocab_size = max(self.model.get_vocab().values()) + 1
        added = self.model.get_added_tokens_decoder()
        self.stop_ids = [n for n, token in added.items() if token.content in STOP_TOKENS]
        # If the model expects BOS, the post-processor in the file puts it first.
        probe = self.model.encode("a")
        self.bos_id = None
        if probe.special_tokens_mask[:1] == [1]:
            self.bos_id = probe.ids[0]

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)
