"""Llama checkpoints and their tokenizers, from disk into model.Llama.

Meta's release layout: params.json, consolidated.00.pth, tokenizer.model.
"""
import json
import pickle
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor

from model import Config, Llama


class CheckpointError(Exception):
    """Something in a checkpoint directory is missing, damaged or not a Llama; the message says which file and what."""


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def load_model(path, device=None, dtype=None) -> Llama:
    """The Llama in directory `path`, in eval mode, on `device` (None: CPU) in `dtype` (None: as on disk).

    Errors: CheckpointError, in one sentence that names the file.
    """
    path = Path(path)
    config, weights = read_meta(path)
    with torch.device("meta"):
        model = Llama(config)
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ weights.keys()):
        raise CheckpointError(f"{path}: tensor {name} is {'missing' if name in expected else 'not one of a Llama'}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
                                  f"the configuration says {tuple(expected[name].shape)}")
        weights[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def read_json(file: Path) -> dict:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}") from None


def read_meta(path: Path) -> tuple[Config, dict[str, Tensor]]:
    """Configuration and weights, by model.Llama's names, of Meta's release layout."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    p, file = read_json(path / "params.json"), path / "consolidated.00.pth"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{file} does not hold weights: {str(error).splitlines()[0]}") from None
    head_dim = p["dim"] // p["n_heads"]
    config = Config(len(weights["tok_embeddings.weight"]), p["dim"], p["n_layers"], p["n_heads"],
                    p.get("n_kv_heads", p["n_heads"]), head_dim, p["ffn_dim"], p["max_seq_len"], p["rope_theta"],
                    None, p["norm_eps"])
    for name in weights:
        if name.endswith(("wq.weight", "wk.weight")):  # rotary pairs: rows (head, f, 2) -> (head, 2, f)
            weights[name] = weights[name].unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return config, weights


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


class SentencePiece:
    """Llama 2's kind of tokenizer.model, and the bundled one's."""

    def __init__(self, file: Path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{file} is not a SentencePiece model: {error}") from None
        self.bos_id, self.stop_ids = self.model.bos_id(), [self.model.eos_id()]

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


def load_tokenizer(path) -> SentencePiece:
    """The tokenizer in directory `path`: .encode(text) -> ids without BOS, .decode(ids), .bos_id, .stop_ids."""
    file = Path(path) / "tokenizer.model"
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    return SentencePiece(file)
