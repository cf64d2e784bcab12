"""What the methods cost compared with plain RoPE: prefill time and memory, and decoding time.

    python -m extras.bench                                      the bundled model
    python -m extras.bench --ckpt random:small --len 16384      two layers, head dimension 128
    python -m extras.bench --ckpt random:8b --len 8192,32768,131072                 on a GPU
    torchrun --nproc-per-node 8 -m extras.bench --ckpt random:70b --tp 8            on eight

Methods take turns within each repeat, and every number is a median over the repeats, measured on
one rank if there are several. The floor is what no method can avoid: plain causal attention, with
PyTorch's scaled_dot_product_attention on tensors of the same shape, and the matrix products. In the
last layer of a prefill only the last token has a query, so only the products that produce keys and
values count there.
"""
import argparse
import ctypes
import json
import math
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import Config, KVCache, Llama
from needle import (
    RANK,
    check_output,
    choose_settings,
    load,
    make_parser,
    positive,
    positives,
    run_command,
    write_whole,
)
from rope_extrap import Method, attend, cis_table, rope

DECODED = 16  # tokens that are decoded after each prefill

# -------------------------------------------------------------------------------------------------
# Clock and memory


def seconds(device: torch.device, function, *args, **kwargs) -> float:
    """How long function(*args, **kwargs) takes, including its work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function(*args, **kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier runs have freed
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb(device: torch.device) -> float:
    """The most memory in use since reset_peak, in gigabytes; NaN if the system does not report it.

    On a CPU it is the peak of the whole process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    kilobytes = re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]
    return int(kilobytes) / 1e6


# -------------------------------------------------------------------------------------------------
# Methods


def methods_of_layers(config: Config, length: int, ranks: int,
                      device: torch.device) -> dict[str, list[Method]]:
    """The methods to measure, with the settings of needle.py's rule, as lists with one per layer.

    The key dimensions are a random three quarters of the frequencies, for the heads of one rank.
    """
    by_rule = {}
    for name in ("rope", "dpe", "lampe"):
        by_rule[name] = choose_settings(name, config, length, calibrated={}, by_hand={}).method
    n_layers = config.n_layers
    shape = (n_layers, config.n_heads // ranks, config.head_dim // 2)
    key_dims = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.75
    key_dims = key_dims.to(device)
    return {
        "rope": [by_rule["rope"]] * n_layers,
        "dpe": [by_rule["dpe"]] * n_layers,
        "dpe, key dims": [replace(by_rule["dpe"], key_dims=of_layer) for of_layer in key_dims],
        "lampe": [by_rule["lampe"]] * n_layers,
    }


def measure_method(model: Llama, methods: list[Method], length: int,
                   device: torch.device) -> dict:
    """A prefill of `length` tokens, its peak memory, and the decoding of some tokens after it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, length + DECODED), generator=generator)
    tokens = tokens.to(device)
    cache = KVCache(model.config, 1, length + DECODED)
    cis_table.cache_clear()  # so that every prefill computes its own tables of angles
    reset_peak(device)
    prefill = seconds(device, model, tokens[:, :length], methods, cache, last=1)
    peak = peak_gb(device)
    steps = []
    for token in tokens[:, length:].split(1, dim=1):
        steps.append(seconds(device, model, token, methods, cache))
    return dict(prefill_seconds=prefill, peak_gb=peak, decode_ms=1000 * statistics.median(steps))


# -------------------------------------------------------------------------------------------------
# The floor


def measure_floor(model: Llama, length: int, device: torch.device, ranks: int) -> dict:
    """Plain causal attention and the matrix products of a prefill, on one of the ranks.

    Where FlashAttention runs, attention with it is measured as well, since PyTorch prefers another
    kernel on some GPUs (cuDNN's on Hopper).
    """
    c = model.config
    dtype = model.tok_embeddings.weight.dtype
    q = torch.randn(1, c.n_heads // ranks, length, c.head_dim, device=device, dtype=dtype)
    k = torch.randn(1, c.n_kv_heads // ranks, length, c.head_dim, device=device, dtype=dtype)
    v = torch.randn_like(k)
    row = dict(rope_attention_seconds=seconds(device, attend, q, k, v, rope(), c.frequencies()))

    flash = flash_attention_runs(q, k, v)
    if q.is_cuda and not flash:
        # With fewer KV heads than query heads, only the kernel with quadratic memory would be left.
        k = k.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1)
        v = v.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1)
    row["plain_attention_seconds"] = seconds(device, plain_attention, q, k, v)
    if flash:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            row["flash_attention_seconds"] = seconds(device, plain_attention, q, k, v)
    row["attention_tflop"] = 2 * length ** 2 * c.head_dim * q.shape[1] * (c.n_layers - 1) / 1e12

    row["products_seconds"], row["products_tflop"] = measure_products(model, length, device)
    attention = row["plain_attention_seconds"] * (c.n_layers - 1)
    row["floor_seconds"] = attention + row["products_seconds"]
    return row


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flash_attention_runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether plain_attention can run with FlashAttention on a GPU."""
    if not q.is_cuda:
        return False
    call = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, True)
    return torch.backends.cuda.can_use_flash_attention(call)


def measure_products(model: Llama, length: int, device: torch.device) -> tuple[float, float]:
    """Seconds and TFLOP of all matrix products with weights in a prefill, on this rank."""
    n_layers = model.config.n_layers
    rows = min(length, 8192)  # the time is linear in the rows, so it is scaled to all of them
    total_seconds = 0.0
    total_flop = 0
    for name, module in model.layers[0].named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight
        if hasattr(weight, "to_local"):
            weight = weight.to_local()  # the rank's slice
        x = torch.randn(rows, weight.shape[1], device=device, dtype=weight.dtype)
        layers = n_layers
        if name not in ("attention.wk", "attention.wv"):
            layers -= 1  # the last layer has one query
        total_seconds += layers * seconds(device, F.linear, x, weight) * length / rows
        total_flop += layers * 2 * length * weight.numel()
    return total_seconds, total_flop / 1e12


# -------------------------------------------------------------------------------------------------
# Output


def medians(rows: list[dict]) -> dict:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def print_header() -> None:
    print(f"{'tokens':>7}  {'method':14}{'prefill s':>10}{'tokens/s':>10}{'ratio':>7}"
          f"{'peak GB':>9}{'ratio':>7}{'decode ms':>11}{'ratio':>7}{'growth':>8}")


def prefill_columns(length: int, name: str, prefill: float, base: float) -> str:
    return (f"{length:7}  {name:14}{prefill:10.2f}{length / prefill:10,.0f}"
            f"{prefill / base:7.2f}")


def print_method(length: int, name: str, row: dict, base: dict, growth: str) -> None:
    """One method's figures, each followed by its ratio to RoPE's (base)."""
    columns = prefill_columns(length, name, row["prefill_seconds"], base["prefill_seconds"])
    print(f"{columns}{row['peak_gb']:9.2f}{row['peak_gb'] / base['peak_gb']:7.2f}"
          f"{row['decode_ms']:11.2f}{row['decode_ms'] / base['decode_ms']:7.2f}{growth:>8}")


def growth_exponent(before: float, after: float, length_ratio: float) -> str:
    """The exponent with which the time of a prefill grows between two lengths."""
    return f"{math.log(after / before) / math.log(length_ratio):.2f}"


def print_floor(length: int, floor: dict, base: dict, n_layers: int) -> None:
    columns = prefill_columns(length, "floor", floor["floor_seconds"], base["prefill_seconds"])
    ratio = floor["rope_attention_seconds"] / floor["plain_attention_seconds"]
    print(f"{columns}   {floor['attention_tflop']:.2f} TFLOP of attention, "
          f"{floor['products_tflop']:.2f} of products; attention with RoPE {ratio:.2f} x plain",
          flush=True)
    if "flash_attention_seconds" in floor:
        flash = floor["flash_attention_seconds"]
        by_flash = flash * (n_layers - 1) + floor["products_seconds"]
        columns = prefill_columns(length, "floor, flash", by_flash, base["prefill_seconds"])
        ratio = floor["rope_attention_seconds"] / flash
        print(f"{columns}   plain attention by FlashAttention; attention with RoPE {ratio:.2f} x",
              flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--len", type=positives, default=[16384, 65536], metavar="N,N,...",
                        dest="lengths",
                        help="lengths of the input, in tokens (default: 16384,65536)")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N",
                        help="number of measurements to take the median of (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the measurements to FILE")
    args = parser.parse_args()
    if args.json:
        check_output("--json", args.json)
    return args


@torch.inference_mode()
def main() -> None:
    args = parse_arguments()
    model, _, device, _ = load(args)
    dtype = str(model.tok_embeddings.weight.dtype).removeprefix("torch.")
    results = {}
    floors = {}
    record = dict(checkpoint=args.ckpt, device=str(device), dtype=dtype, repeats=args.repeats,
                  results=results, floors=floors)

    def write_record():
        if args.json and RANK == 0:
            write_whole(args.json, json.dumps(record, indent=1) + "\n")

    # A short run first, so that kernel and thread startup is not measured.
    for methods in methods_of_layers(model.config, 256, args.tp, device).values():
        measure_method(model, methods, 256, device)
    measure_floor(model, 256, device, args.tp)

    print(f"# {args.ckpt}, {device} {dtype}, median of {args.repeats}")
    print_header()
    previous = None
    for length in sorted(set(args.lengths)):
        layers = methods_of_layers(model.config, length, args.tp, device)
        rows = {name: [] for name in layers}
        floor_rows = []
        for _ in range(args.repeats):
            for name, methods in layers.items():
                rows[name].append(measure_method(model, methods, length, device))
            floor_rows.append(measure_floor(model, length, device, args.tp))
        results[length] = {name: medians(rows[name]) for name in layers}
        floors[length] = medians(floor_rows)
        write_record()

        base = results[length]["rope"]
        for name, row in results[length].items():
            growth = ""
            if previous is not None:
                before = results[previous][name]["prefill_seconds"]
                growth = growth_exponent(before, row["prefill_seconds"], length / previous)
            print_method(length, name, row, base, growth)
        print_floor(length, floors[length], base, model.config.n_layers)
        previous = length


if __name__ == "__main__":
    run_command(main)
