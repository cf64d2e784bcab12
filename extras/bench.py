"""What the methods cost beside plain RoPE: prefill, decoding and memory, in one run.

    python extras/bench.py                                     the bundled model at 16,384 and 65,536 tokens
    python extras/bench.py --ckpt random:small --len 16384     two layers with heads of 128, on a CPU
    python extras/bench.py --ckpt random:8b --len 8192,32768,65536,131072      on a GPU
    torchrun --nproc-per-node 8 extras/bench.py --ckpt random:70b --len 131072 --tp 8      seconds and memory of a rank

Methods take turns within each repeat, and every figure is a median over the repeats. The floor is what no method can
avoid: plain causal scaled_dot_product_attention on tensors of the same shape, and the matrix products. The last layer
of a prefill has one query only, so in it nothing counts but the products of keys and values.
"""
import ctypes
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import load_llama  # noqa: E402
import needle  # noqa: E402
from model import Config, KVCache  # noqa: E402
from rope_extrap import attend, cis_table, rope  # noqa: E402

load_llama.SHAPES["small"] = Config(
    vocab_size=4096, dim=512, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=128, ffn_dim=1024, train_len=4096)
DECODED = 16  # tokens


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(function, device: torch.device) -> float:
    begin = clock(device)
    function()
    return clock(device) - begin


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed is not this one's
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> float:
    """Gigabytes at the most since reset_peak; on the CPU of the whole process, nan where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 1e6 if status.exists() else math.nan


def methods_for(config: Config, length: int, ranks: int) -> dict:
    """By needle.py's rule; the key dimensions are three random quarters of each head's, for a rank's heads."""
    plain, dpe, lampe = (needle.settings(name, config, length, {}, {})[-1] for name in ("rope", "dpe", "lampe"))
    shape = config.n_layers, config.n_heads // ranks, config.head_dim // 2
    key_dims = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.75
    return {"rope": [plain] * config.n_layers, "dpe": [dpe] * config.n_layers,
            "dpe, key dims": [dpe._replace(key_dims=mask) for mask in key_dims], "lampe": [lampe] * config.n_layers}


def measure(model, methods, length: int, device) -> dict:
    """One prefill of `length` tokens, its peak memory, and the decoding of a few tokens after it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, length + DECODED), generator=generator).to(device)
    cache = KVCache(model.config, 1, length + DECODED)
    cis_table.cache_clear()  # each prefill pays for its own
    reset_peak(device)
    prefill = seconds(lambda: model(tokens[:, :length], methods, cache, last=1), device)
    row = {"prefill_seconds": prefill, "peak_gb": peak(device)}
    steps = [seconds(lambda: model(token, methods, cache), device) for token in tokens[:, length:].split(1, dim=1)]
    return row | {"decode_ms": 1000 * statistics.median(steps)}


def own(weight: torch.Tensor) -> torch.Tensor:
    """The part of a weight that this rank holds: all of it, if it is not cut."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


def measure_floor(model, length: int, device, ranks: int) -> dict:
    """Plain causal attention and the matrix products of a rank's prefill, and attend with RoPE on the same tensors."""
    c, layer, dtype = model.config, model.layers[0], model.tok_embeddings.weight.dtype
    heads, kv_heads = c.n_heads // ranks, c.n_kv_heads // ranks
    q, k, v = (torch.randn(1, n, length, c.head_dim, device=device, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    plain = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), device)
    ours = seconds(lambda: attend(q, k, v, rope(), c.frequencies()), device)
    products = tflop = 0.0
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            weight = own(module.weight)
            x = torch.randn(min(length, 8192), weight.shape[1], device=device, dtype=dtype)
            layers = c.n_layers - (name not in ("attention.wk", "attention.wv"))  # the last has one query
            products += layers * seconds(lambda: F.linear(x, weight), device) * max(length / 8192, 1)
            tflop += layers * 2 * length * weight.numel() / 1e12
    return {"plain_attention_seconds": plain, "rope_attention_seconds": ours, "products_seconds": products,
            "floor_seconds": plain * (c.n_layers - 1) + products, "products_tflop": tflop,
            "attention_tflop": 2 * length ** 2 * c.head_dim * heads * (c.n_layers - 1) / 1e12}


def medians(rows: list[dict]) -> dict:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


@needle.in_sentences()
@torch.inference_mode()
def main() -> None:
    parser = needle.make_parser(__doc__)
    parser.add_argument("--len", type=needle.positives, default="16384,65536", metavar="N,N..", dest="lengths",
                        help="tokens (default: 16384,65536)")
    parser.add_argument("--repeats", type=needle.positive, default=3, metavar="N", help="default: 3")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if args.json:
        needle.check_writable(args.json)
    model, _, device, _ = needle.load(args)
    for methods in methods_for(model.config, 256, args.tp).values():  # kernels and threads start outside the figures
        measure(model, methods, 256, device)
    measure_floor(model, 256, device, args.tp)

    results, floors = {}, {}
    print(f"# {args.ckpt}, {device} {str(model.tok_embeddings.weight.dtype)[6:]}, median of {args.repeats}")
    print(f"{'tokens':>7}  {'method':14}{'prefill s':>10}{'tokens/s':>10}{'ratio':>7}{'peak GB':>9}{'ratio':>7}"
          f"{'decode ms':>11}{'ratio':>7}{'growth':>8}")
    for before, length in zip([None, *args.lengths], args.lengths):
        methods, rows, floor_rows = methods_for(model.config, length, args.tp), {}, []
        for _ in range(args.repeats):
            for name in methods:
                rows.setdefault(name, []).append(measure(model, methods[name], length, device))
            floor_rows.append(measure_floor(model, length, device, args.tp))
        results[length], floors[length] = {name: medians(rows[name]) for name in methods}, medians(floor_rows)
        base = results[length]["rope"]
        for name, row in results[length].items():
            growth = ""
            if before and before != length:
                ratio = row["prefill_seconds"] / results[before][name]["prefill_seconds"]
                growth = f"{math.log(ratio) / math.log(length / before):.2f}"
            print(f"{length:7}  {name:14}{row['prefill_seconds']:10.2f}{length / row['prefill_seconds']:10,.0f}"
                  f"{row['prefill_seconds'] / base['prefill_seconds']:7.2f}"
                  f"{row['peak_gb']:9.2f}{row['peak_gb'] / base['peak_gb']:7.2f}"
                  f"{row['decode_ms']:11.2f}{row['decode_ms'] / base['decode_ms']:7.2f}{growth:>8}")
        f = floors[length]
        print(f"{length:7}  {'floor':14}{f['floor_seconds']:10.2f}{length / f['floor_seconds']:10,.0f}"
              f"{f['floor_seconds'] / base['prefill_seconds']:7.2f}   {f['attention_tflop']:.2f} TFLOP of attention, "
              f"{f['products_tflop']:.2f} of products; attention with RoPE "
              f"{f['rope_attention_seconds'] / f['plain_attention_seconds']:.2f} x plain", flush=True)
    if args.json and not needle.RANK:
        record = {"checkpoint": args.ckpt, "device": str(device), "dtype": str(model.tok_embeddings.weight.dtype)[6:],
                  "repeats": args.repeats, "results": results, "floors": floors}
        needle.write_whole(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
