"""Whether a prefill fits in memory: how much is free, and how much each token takes."""
import os
from pathlib import Path

import torch

from model import Config


def memory_free(device: torch.device) -> int | None:
    """Bytes that are free on the device for this process, or None if the system does not report it.

    On a CPU, processes that torchrun started share the memory equally.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    _, available = meminfo.read_text().split("MemAvailable:")
    kilobytes = int(available.split()[0])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return kilobytes * 1024 // processes


def prefill_memory(config: Config, itemsize: int, ranks: int) -> tuple[int, int]:
    """Bytes that a prefill takes on one of `ranks` tensor-parallel ranks: fixed, and per token.

    itemsize is the number of bytes of a weight or activation. Weights are not counted. The KV
    cache, the residual stream x and the tables of angles are there throughout; the rest is what the
    most demanding part of a layer needs.
    """
    q = config.n_heads * config.head_dim // ranks  # elements in the queries of a token
    k = config.n_kv_heads * config.head_dim // ranks  # elements in its keys
    dim = config.dim  # x and its norm are replicated on every rank
    cache = 2 * config.n_layers * k * itemsize
    residual = dim * itemsize
    # LaMPE's three bands have 4 tables, complex64. Computing one takes as much again, in float64.
    tables = 4 * 2 * (config.head_dim // 2) * 8

    norm = 4 * dim + 2 * dim * itemsize  # a float32 product, its cast, and the scaled result
    attention = dim  # the normalized x
    attention += 2 * q  # the queries before and after rotation
    attention += 2 * q  # the merged output, and the output of a band
    attention += k  # the rotated keys
    # Either k and v with a copy for every query head, for kernels that need it, or, with key
    # dimensions, the keys as RoPE rotates them, and the mix of both.
    attention += 2 * q
    feed_forward = 3 * dim  # the normalized x, the results of slices, and their concatenation
    largest = max(norm, attention * itemsize, feed_forward * itemsize)
    per_token = cache + residual + tables + largest

    # Rotation works on slices of 8,192 tokens, in float32 before and after.
    fixed = 8192 * q * (4 + 4)
    return fixed, per_token
