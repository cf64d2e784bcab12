"""Checkpoints and their tokenizers, from disk into model.Llama: Llama, Mistral without sliding window, Qwen2.

Two layouts are published, and both are read:

    Hugging Face      config.json, model.safetensors, or shards and model.safetensors.index.json
    Meta's release    params.json, consolidated.00.pth, one file for each model-parallel part

and three tokenizers: tokenizer.model of SentencePiece (Llama 2, Mistral) or of Llama 3, and the byte-level
tokenizer.json of Llama 3 and Qwen2. Files are mapped, not read, and on the CPU weights are used as they lie on disk.
Only Hugging Face's q and k, whose rows are put in Meta's order, and a tensor-parallel rank's slices are copied.
"""
import base64
import json
import pickle
import re
import unicodedata
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import sentencepiece
import tiktoken
import torch
from safetensors import safe_open
from torch import Tensor

from model import Config, Llama, RopeScaling, memory_free

LLAMA_3 = dict(vocab_size=128256, n_kv_heads=8, rope_theta=500000.0)
LLAMA_32 = LLAMA_3 | dict(ffn_dim=8192, train_len=131072, rope_scaling=RopeScaling(factor=32.0), tied=True)
SHAPES = {  # as published, for random weights: Llama 3.2 1B and 3B, Llama 3 8B and 70B
    "1b": Config(dim=2048, n_layers=16, n_heads=32, head_dim=64, **LLAMA_32),
    "3b": Config(dim=3072, n_layers=28, n_heads=24, head_dim=128, **LLAMA_32),
    "8b": Config(dim=4096, n_layers=32, n_heads=32, head_dim=128, ffn_dim=14336, train_len=8192, **LLAMA_3),
    "70b": Config(dim=8192, n_layers=80, n_heads=64, head_dim=128, ffn_dim=28672, train_len=8192, **LLAMA_3)}


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or unsupported: one sentence that names the file and the tensor or key."""


@contextmanager
def refusing(file: Path, problem: str):
    """Whatever a reader of `file` raises inside is a CheckpointError: the file, its problem, the error's first line."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing") from None
    except pickle.UnpicklingError:
        raise CheckpointError(f"{file} holds more than tensors, or is damaged; nothing in it was run") from None
    except Exception as error:
        raise CheckpointError(f"{file} {problem}: {f'{type(error).__name__} {error}'.splitlines()[0]}") from None


def load_model(path, device=None, dtype=None, mesh=None) -> Llama:
    """The model in directory `path`, in eval mode.

    device: None for the CPU. dtype: that of every tensor, None for the one that the embedding has on disk. mesh: a 1-D
    DeviceMesh whose ranks hold one model together (tensor parallel), None for one process. random:1b, 3b, 8b or 70b as
    path gives random weights of that published shape, in bfloat16 where dtype is None.
    Errors: CheckpointError; ValueError for heads, KV heads or ffn_dim that the ranks do not divide.
    """
    if str(path).startswith("random:"):
        return random_model(str(path)[7:], device, dtype, mesh)
    path = Path(path)
    hugging_face = is_hugging_face(path)
    file, config, stored = read_hugging_face(path) if hugging_face else read_meta(path)
    if config.n_heads % config.n_kv_heads or config.head_dim % 2:
        raise CheckpointError(f"{path}: {config.n_heads} heads, {config.n_kv_heads} KV heads and a head_dim of "
                              f"{config.head_dim} do not fit together")
    with refusing(path, "has an invalid configuration"), torch.device("meta"):
        model = Llama(config)
    cut_over(mesh, model)
    parameters, weights = model.state_dict(), {}
    words = HUGGING_FACE_WORDS if hugging_face else {}
    names = {name: ".".join(words.get(word, word) for word in name.split(".")) for name in parameters}
    for name in sorted(stored.keys() ^ set(names.values())):
        raise CheckpointError(f"{file}: tensor {name} " + ("is unknown" if name in stored else "is missing"))
    for name, parameter in parameters.items():
        tensor = join(stored.pop(names[name]), parameter.shape)
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise CheckpointError(f"{file}: tensor {names[name]} has shape {tuple(tensor.shape)} of "
                                  f"{str(tensor.dtype)[6:]}, it should be {tuple(parameter.shape)} of floats")
        if hugging_face and name.split(".")[-2] in ("wq", "wk"):
            # pairs that rotate together: D/2 rows apart here, neighbours in Meta's order and ours
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        dtype = dtype or tensor.dtype  # the embedding's, which comes first
        weights[name] = own_slice(tensor, parameter, device, dtype)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def join(parts: list[Tensor], shape) -> Tensor:
    """One tensor from its parts: copies, if they have its shape, else cut along the dimension where they differ."""
    cut = [dim for dim, (part, whole) in enumerate(zip(parts[0].shape, shape)) if part != whole]
    return torch.cat(parts, dim=cut[0]) if cut and len(parts) > 1 else parts[0]


def random_model(shape: str, device=None, dtype=None, mesh=None) -> Llama:
    """Random weights of a published shape, made on the device (with a mesh, a rank's slices only) from seed 0."""
    if shape not in SHAPES:
        raise CheckpointError(f"random:{shape} is not a published shape: use random:{', random:'.join(SHAPES)}")
    with torch.device("meta"):
        model = Llama(SHAPES[shape]).to(dtype or torch.bfloat16)
    cut_over(mesh, model)
    needed = sum(p.nbytes for p in model.parameters()) / (mesh.size() if mesh else 1)
    if (free := memory_free(torch.device(device or "cpu"))) is not None and needed > free:
        raise CheckpointError(f"random:{shape} has {needed / 1e9:.1f} GB of weights, and {free / 1e9:.1f} GB are free")
    model = model.to_empty(device=device or "cpu").eval().requires_grad_(False)
    generator = torch.Generator(device or "cpu").manual_seed(0)  # tied embeddings are then the same on every rank
    for name, parameter in model.named_parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        own.fill_(1) if "norm" in name else own.normal_(0, 0.02, generator=generator)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Tensor parallelism: the ranks of a mesh hold one model together


def cut_over(mesh, model: Llama):
    """Make the large matrices of a model on the meta device DTensors: each rank of mesh, unless that is None, gets
    its own heads, ffn_dim and vocabulary; a tied embedding stays whole. Errors: ValueError, as load_model."""
    if mesh is None:
        return
    for name in ("n_heads", "n_kv_heads", "ffn_dim"):
        if getattr(model.config, name) % mesh.size():
            raise ValueError(f"{name} {getattr(model.config, name)} cannot be divided among {mesh.size()} ranks")
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    plan = {"layers.*.attention.w[qkv]": ColwiseParallel(), "layers.*.attention.wo": RowwiseParallel(),
            "layers.*.feed_forward.w[13]": ColwiseParallel(), "layers.*.feed_forward.w2": RowwiseParallel()}
    if not model.config.tied:
        plan |= {"tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
                 "output": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model, mesh, plan, src_data_rank=None)


def own_slice(tensor: Tensor, parameter: Tensor, device, dtype) -> Tensor:
    """What this rank keeps of a whole tensor, on the device: all of one that is not cut, else a copy of its slice."""
    if not hasattr(parameter, "placements"):
        return tensor.to(device=device, dtype=dtype)
    from torch.distributed.tensor import DTensor
    mesh, placements = parameter.device_mesh, parameter.placements
    own = tensor.chunk(mesh.size(), placements[0].dim)[mesh.get_local_rank()].to(device=device, dtype=dtype, copy=True)
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=tensor.shape, stride=parameter.stride())


# ---------------------------------------------------------------------------------------------------------------------
# The two layouts: a configuration and the tensors of each


def read_json(file: Path) -> dict:
    with refusing(file, "cannot be read as JSON"):
        values = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return values


def number(file: Path, values: dict, key: str, kind: type, default=None):
    """values[key] as an int or float above 0; what is missing or something else is refused by name."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise CheckpointError(f"{file} lacks {key}")
    if type(value) not in (int, float) or not 0 < value < 2 ** 31 or value != kind(value):
        raise CheckpointError(f"{file}: {key} is {value!r}, not a positive {'whole ' * (kind is int)}number below 2^31")
    return kind(value)


def is_hugging_face(path: Path) -> bool:
    """Which layout a directory has. One with both, as on the hub with original/ inside, is Hugging Face's."""
    for pattern in ("*.safetensors*", "consolidated.*.pth", "config.json", "params.json"):  # the first found decides
        if any(path.glob(pattern)):
            return pattern in ("*.safetensors*", "config.json")
    raise CheckpointError(f"{path} is not a directory with config.json or params.json: use one or random:8b")


HUGGING_FACE_WORDS = {  # in a tensor's name, ours -> theirs
    "tok_embeddings": "model.embed_tokens", "output": "lm_head", "layers": "model.layers", "norm": "model.norm",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn", "wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj",
    "feed_forward": "mlp", "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def hugging_face_config(file: Path) -> Config:
    """The Config of a config.json. What changes the forward pass in an unsupported way is refused by its key, and so is
    a key that is missing, unless every release means the same by that."""
    values = read_json(file)
    given, families = values.get("architectures") or values.get("model_type"), ("Llama", "Mistral", "Qwen2")
    family = next((name for name in families if given in ([f"{name}ForCausalLM"], name.lower())), None)
    if family is None:
        raise CheckpointError(f"{file}: architecture {given} is not supported, only those of {', '.join(families)}")
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {"type": "default"}  # transformers 4 or 5
    rope = rope if isinstance(rope, dict) else {"type": rope}
    values |= {"rope_type": rope.get("type")} | rope  # its rope_theta, if any, before the one outside
    get = partial(number, file, values)
    dim, heads, layers = get("hidden_size", int), get("num_attention_heads", int), get("num_hidden_layers", int)
    supported = dict(
        rope_type=["default", "llama3"], partial_rotary_factor=[1, None], hidden_act=["silu", None],
        attention_bias=[False, None], mlp_bias=[False, None], use_sliding_window=[False, None],
        layer_types=[["full_attention"] * layers, None])
    if family == "Mistral":
        values.setdefault("sliding_window", 4096)  # as transformers does
        supported["sliding_window"] = [None]
    for key, accepted in supported.items():
        if values.get(key) not in accepted:
            raise CheckpointError(f"{file}: {key} {values[key]!r} is not supported")
    llama = family == "Llama"  # whose first releases had neither num_key_value_heads nor rope_theta
    return Config(
        vocab_size=get("vocab_size", int), dim=dim, n_layers=layers, n_heads=heads,
        n_kv_heads=get("num_key_value_heads", int, heads if llama else None),
        head_dim=get("head_dim", int, dim // heads), ffn_dim=get("intermediate_size", int),
        train_len=get("max_position_embeddings", int), norm_eps=get("rms_norm_eps", float, 1e-6),
        rope_theta=get("rope_theta", float, 10000.0 if llama else None),
        rope_scaling=None if values["rope_type"] == "default" else RopeScaling(
            get("factor", float), get("low_freq_factor", float), get("high_freq_factor", float),
            get("original_max_position_embeddings", int)),
        tied=bool(values.get("tie_word_embeddings")), qkv_bias=family == "Qwen2")


def read_hugging_face(path: Path) -> tuple[Path, Config, dict[str, list[Tensor]]]:
    """The file that lists the tensors, the configuration, and the tensors, mapped, by Hugging Face's names."""
    config = hugging_face_config(path / "config.json")
    ignored = ("rotary_emb.inv_freq",) + ("lm_head.weight",) * config.tied
    index, single, stored = path / "model.safetensors.index.json", path / "model.safetensors", {}
    listing = index if index.exists() else single
    with refusing(index, "has no weight_map from tensors to files"):
        files = {path / name for name in read_json(index)["weight_map"].values()} if listing == index else {single}
    for file in sorted(files):
        with refusing(file, "is damaged"), safe_open(file, framework="pt") as opened:
            stored |= {name: [opened.get_tensor(name)] for name in opened.keys() if not name.endswith(ignored)}
    return listing, config, stored


def meta_config(file: Path, values: dict, output_rows: int) -> Config:
    """The Config of a params.json; output_rows is the vocabulary where that says -1, as Llama 2's does."""
    get, scaled = partial(number, file, values), bool(values.get("use_scaled_rope"))
    dim, heads, theta = get("dim", int), get("n_heads", int), get("rope_theta", float, 10000.0)
    ffn_dim = int(get("ffn_dim_multiplier", float, 1.0) * int(8 * dim / 3))  # 2/3 of 4 dim: SwiGLU has three matrices
    multiple = get("multiple_of", int, 256)
    factor = get("rope_scaling_factor", float, 32.0 if dim in (2048, 3072) else 8.0)  # Llama 3.2 1B and 3B, or 3.1
    return Config(
        vocab_size=output_rows if values.get("vocab_size") == -1 else get("vocab_size", int), dim=dim,
        n_layers=get("n_layers", int), n_heads=heads, n_kv_heads=get("n_kv_heads", int, heads), head_dim=dim // heads,
        ffn_dim=-(-ffn_dim // multiple) * multiple,
        train_len=get("max_seq_len", int, 131072 if scaled else 8192 if theta == 500000 else 4096),
        rope_theta=theta, norm_eps=get("norm_eps", float, 1e-5), rope_scaling=RopeScaling(factor) if scaled else None)


def read_meta(path: Path) -> tuple[Path, Config, dict[str, list[Tensor]]]:
    """The first file of tensors, the configuration, and each tensor's model-parallel parts, mapped, by its name."""
    files = [path / f"consolidated.{n:02}.pth" for n in range(len([*path.glob("consolidated.*.pth")]) or 1)]
    parts, shapes = [], []
    for file in files:
        with refusing(file, "is damaged"):
            parts.append(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        with refusing(file, "is not a dictionary of tensors"):
            shapes.append({name: part.shape for name, part in parts[-1].items() if not name.endswith("rope.freqs")})
    for name in sorted(set().union(*shapes)):
        if any(of_part.get(name) != shapes[0].get(name) for of_part in shapes):
            raise CheckpointError(f"{path}: tensor {name} is not in every part in the same shape")
    stored = {name: [part[name] for part in parts] for name in shapes[0]}
    params, output_rows = path / "params.json", sum(part.shape[:1].numel() for part in stored.get("output.weight", []))
    return files[0], meta_config(params, read_json(params), output_rows), stored


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: .encode(text) -> ids without BOS, .decode(ids) -> text, .bos_id, .stop_ids, .vocab_size, .special

LLAMA_3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA_3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(4)),
                   "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
                   *(f"<|reserved_special_token_{n}|>" for n in range(5, 251))]
STOP = ["<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>"]  # Llama 3's, Qwen2's


class SentencePieceTokenizer:
    """The tokenizer of Llama 2, of Mistral and of the bundled model."""

    def __init__(self, content: bytes):
        model = sentencepiece.SentencePieceProcessor()
        model.LoadFromSerializedProto(content)
        self.encode, self.decode, self.vocab_size = model.encode, model.decode, len(model)
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self.stop_ids, self.special = [model.eos_id()], {}


class BytePairTokenizer:
    """Byte-level BPE, Llama 3's and Qwen2's. Text that looks like a special token is encoded as text.

    ranks: a token's bytes -> its id, lower ones merge first; split: a regex; normal_form: Unicode's, or None.
    """

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int], split=LLAMA_3_SPLIT, normal_form=None):
        self.stop_ids = [special[name] for name in STOP if name in special]
        ids = [*ranks.values(), *special.values()]
        if len(set(ids)) < len(ids) or not self.stop_ids or not all(bytes([byte]) in ranks for byte in range(256)):
            raise ValueError(f"an id stands twice, a single byte has none, or there is none of {' '.join(STOP)}")
        self.encoding = tiktoken.Encoding("own", pat_str=split, mergeable_ranks=ranks, special_tokens=special)
        self.decode, self.vocab_size, self.special = self.encoding.decode, self.encoding.n_vocab, special
        self.bos_id, self.normal_form = special.get("<|begin_of_text|>"), normal_form

    def encode(self, text: str) -> list[int]:
        text = unicodedata.normalize(self.normal_form, text) if self.normal_form else text
        pieces = (text[n:n + 400_000] for n in range(0, len(text), 400_000))  # much longer blanks make tiktoken panic
        return [token for piece in pieces for token in self.encoding.encode_ordinary(piece)]


def load_tokenizer(path):
    """The tokenizer in directory `path`, by its content; for random:8b the bundled one. Errors: CheckpointError."""
    path = Path(__file__).resolve().parent / "tiny" if str(path).startswith("random:") else Path(path)
    candidates = [path / "tokenizer.model", path / "tokenizer.json", path / "original" / "tokenizer.model"]
    file = next(filter(Path.is_file, candidates), None)
    if file is None:
        raise CheckpointError(f"{path} is not a directory with tokenizer.model or tokenizer.json: use one or random:8b")
    with refusing(file, "is neither SentencePiece nor byte-level BPE, or is damaged"):
        if file.suffix == ".json":
            return byte_level_json(file)
        content = file.read_bytes()
        if not re.match(rb"\S+ \d+\s", content):  # Llama 3's: in each line a token in base64 and its rank
            return SentencePieceTokenizer(content)
        pairs = (line.split() for line in content.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        return BytePairTokenizer(ranks, {name: len(ranks) + n for n, name in enumerate(LLAMA_3_SPECIAL)})


def byte_level_json(file: Path) -> BytePairTokenizer:
    """The tokenizer.json of Llama 3 or Qwen2, where ids are ranks and each character of a token stands for a byte. What
    would change ids is refused: other steps and options, merges in another order than the ids that they make."""
    values = read_json(file)
    model = values["model"]
    options = [model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")]
    match model["type"], any(options), (values.get("normalizer") or {}).get("type"), values["pre_tokenizer"]:
        case "BPE", False, None | "NFC" as normal_form, {"pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}:
            pass
        case _:
            raise CheckpointError(f"{file} is not supported, only byte-level BPE with a pre_tokenizer of Split by an "
                                  "isolated regex and ByteLevel, and with no normalizer or NFC")
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    made = [model["vocab"][first + second] for first, second in merges]
    if made != sorted(made):
        raise CheckpointError(f"{file}: its merges are not in the order of the ids that they make")
    special = {token["content"]: token["id"] for token in values["added_tokens"]}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # for themselves; the others, in order, from 256
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in model["vocab"].items() if token not in special}
    return BytePairTokenizer(ranks, special, split, normal_form)
