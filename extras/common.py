"""What calibrate, loss and ablations share: losses on a text, paired differences, output files."""
import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import needle
from extras.table import FEWEST_ROWS
from model import Llama
from rope_extrap import Method


def draw_stretches(tokenizer, tokens: list[int], length: int, trials: int,
                   last: int) -> dict[int, list[int]]:
    """Stretches of a text, evenly spaced, each of `length` tokens, BOS included: {start: stretch}.

    Raises ValueError if the text is so short that their last tokens, which are measured, overlap.
    """
    bos = needle.start_of_text(tokenizer)
    size = length - len(bos)
    step = (len(tokens) - size) // max(trials - 1, 1)
    if len(tokens) < size + (trials - 1) * last:
        raise ValueError(f"--haystack has {len(tokens)} tokens, too few for {trials} stretches of "
                         f"--len {length}; give a longer text or a smaller --trials")
    starts = [n * step for n in range(trials)]
    return {start: bos + tokens[start:start + size] for start in starts}


@torch.inference_mode()
def block_losses(model: Llama, methods: list[Method], tokens: list[int], last: int) -> Tensor:
    """The losses of the last tokens, each given all tokens before it, as means of blocks.

    There are last // 128 blocks of about equal size, or two if last < 256. Returns float64
    (blocks,), in nats per token, on the CPU.
    """
    ids = torch.tensor([tokens], device=model.tok_embeddings.weight.device)
    logits = model(ids[:, :-1], methods, last=last)[0]  # (1024, 128256)
    losses = F.cross_entropy(logits, ids[0, -last:], reduction="none").double().cpu()
    blocks = losses.tensor_split(max(last // 128, 2))
    return torch.stack([block.mean() for block in blocks])


def paired_differences(rows: list[list[float]], reference: list[list[float]]) -> Tensor:
    """The differences over which standard errors are computed, as float64 (n,).

    Each row holds the losses of the blocks of one stretch, and the reference holds those of the
    same blocks. Neighboring blocks are correlated, so each stretch counts as one measurement or,
    if there are fewer than 5 stretches, each block does.
    """
    differences = [torch.tensor(row, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
                   for row, other in zip(rows, reference, strict=True)]
    if len(differences) < FEWEST_ROWS:
        return torch.cat(differences)
    return torch.stack([of_stretch.mean() for of_stretch in differences])


def standard_error(differences: Tensor) -> float:
    """The standard error of the mean of (n,) differences."""
    return differences.std().item() / math.sqrt(len(differences))


def last_change(file: Path) -> int:
    """When a file was last written, in nanoseconds, or 0 if there is none.

    Raises OSError or ValueError if it cannot be written, so that this is known before the results.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise ValueError(f"{file} cannot be written")
    tempfile.TemporaryFile(dir=file.parent).close()
    return needle.last_change(file)
