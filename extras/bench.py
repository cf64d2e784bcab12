"""What the methods cost compared with plain RoPE: prefill time and memory, and decoding time.

    python -m extras.bench                                      the bundled model
    python -m extras.bench --ckpt random:small --len 16384      two layers, head dimension 128
    python -m extras.bench --ckpt random:8b --len 8192,32768    on a GPU
    torchrun --nproc-per-node 8 -m extras.parallel extras.bench --ckpt random:70b       on eight

random:8b has the shape of Llama 3 8B, and random weights. Settings are those that needle.py would
choose; the key dimensions are a random three quarters of the frequencies. Methods take turns within
each repeat, and every figure is a median over the repeats, followed by its ratios to RoPE's and to
the floor's. The floor is the same forward pass without positions: plain causal attention by
PyTorch's scaled_dot_product_attention in place of bands and rotation. With transformers installed,
two more rows have its own Llama of the same shape, plain and extended with DPE by extras.hf. Their
first ratio is to the plain one.
"""
import argparse
import ctypes
import functools
import importlib.util
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from extras.common import last_change
from load_llama import open_checkpoint
from model import Config, Llama, RopeScaling
from needle import choose_all, errors_in_one_sentence, load, make_parser, replace_whole
from rope_extrap import Method, attend
from tiny.grammar import TINY

MEASURED = {  # as the table calls them, and as needle.py does
    "rope": "rope", "dpe": "dpe", "dpe, key dims": "dpe", "lampe": "lampe", "floor": "rope"}
BY_TRANSFORMERS = {"transformers": "rope", "transformers, dpe": "dpe"}
DECODED = 16  # tokens that are decoded after each prefill

# -------------------------------------------------------------------------------------------------
# Random weights

LLAMA_3 = dict(vocab_size=128256, n_kv_heads=8, rope_theta=500000.0)
LLAMA_32 = dict(ffn_dim=8192, train_len=131072, rope_scaling=RopeScaling(factor=32.0), tied=True)
SHAPES = {
    # Llama 3.2 1B and 3B
    "random:1b": Config(dim=2048, n_layers=16, n_heads=32, head_dim=64, **LLAMA_3, **LLAMA_32),
    "random:3b": Config(dim=3072, n_layers=28, n_heads=24, head_dim=128, **LLAMA_3, **LLAMA_32),
    # Llama 3 8B and 70B
    "random:8b": Config(dim=4096, n_layers=32, n_heads=32, head_dim=128, ffn_dim=14336,
                        train_len=8192, **LLAMA_3),
    "random:70b": Config(dim=8192, n_layers=80, n_heads=64, head_dim=128, ffn_dim=28672,
                         train_len=8192, **LLAMA_3),
    # Two layers with heads of 128, for a CPU
    "random:small": Config(vocab_size=4096, dim=512, n_layers=2, n_heads=4, n_kv_heads=2,
                           head_dim=128, ffn_dim=1024, train_len=4096),
}


def open_model(path, device=None, dtype=None) -> tuple[Llama, Iterator[tuple[str, Tensor]]]:
    """load_llama.open_checkpoint, also for random:8b and the like: weights drawn on the device.

    Raises CheckpointError, or ValueError if there is no such shape.
    """
    if not str(path).startswith("random:"):
        return open_checkpoint(path, dtype)
    if path not in SHAPES:
        raise ValueError(f"--ckpt {path} is not one of {', '.join(SHAPES)}")
    with torch.device("meta"):
        model = Llama(SHAPES[path])
    sizes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    generator = torch.Generator(device or "cpu").manual_seed(0)

    def tensors():
        for name, size in sizes.items():
            tensor = torch.ones(size, device=device)
            if "norm" not in name:
                tensor.normal_(0, 0.02, generator=generator)
            if name not in ("norm.weight", "output.weight"):  # which are float32
                tensor = tensor.to(dtype or torch.bfloat16)
            yield name, tensor
    return model, tensors()


def load_model(path, device=None, dtype=None) -> Llama:
    """load_llama.load_model, also for random:8b and the like."""
    model, tensors = open_model(path, device, dtype)
    model.load_state_dict({name: tensor.to(device) for name, tensor in tensors}, assign=True)
    return model.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------------
# Clock and memory


def seconds(function, *args, **kwargs) -> float:
    """How long function(*args, **kwargs) takes, including its work on a GPU."""
    start = time.perf_counter()
    function(*args, **kwargs)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def reset_peak() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # give back what earlier measurements have freed
        Path("/proc/self/clear_refs").write_text("5")


def peak_gb() -> float:
    """The most memory in use since reset_peak, in gigabytes; NaN if the system does not report it.

    Without a GPU it is the peak of the whole process.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform != "linux":
        return math.nan
    kilobytes = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return int(kilobytes) / 1e6


# -------------------------------------------------------------------------------------------------
# Measurements


def make_methods(name: str, args: argparse.Namespace, model: Llama, length: int) -> list[Method]:
    """One Method per layer, without tables of angles, so that every prefill computes its own."""
    c = model.config
    args = argparse.Namespace(**vars(args) | dict(lengths=[length], method="rope,dpe,lampe"))
    _, _, method = choose_all(args, c)[length][(MEASURED | BY_TRANSFORMERS)[name]]
    if name != "dpe, key dims":
        return [method] * c.n_layers
    n_heads = c.n_heads * model.layers[0].attention.n_kv_heads // c.n_kv_heads  # of this rank
    is_key = torch.rand(c.n_layers, n_heads, c.head_dim // 2) < 0.75
    return [replace(method, key_dims=of_layer) for of_layer in is_key]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, method: Method,
                    frequencies: Tensor) -> Tensor:
    """Causal attention without positions, in place of rope_extrap.attend.

    q (B, heads, T, D), k and v (B, kv_heads, S, D), with T = S or T = 1.
    """
    is_prefill = q.shape[2] > 1
    if is_prefill and q.is_cuda:  # where not every kernel groups heads
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_prefill, enable_gqa=True)


@functools.cache
def transformers_llama(model: Llama):
    """A transformers Llama with the shape of this model, on its device, and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = model.config
    weight = model.tok_embeddings.weight
    config = LlamaConfig(vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim,
                         num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
                         num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim)
    with weight.device:
        return LlamaForCausalLM(config).to(weight.dtype).eval()


def transformers_forward(name: str, methods: list[Method], model: Llama) -> Callable:
    """A function from the next tokens (1, T) to the last logits, with a cache of its own."""
    from transformers import DynamicCache

    from extras.hf import extend, restore
    llama = restore(transformers_llama(model))
    if name != "transformers":
        extend(llama, methods)
    return functools.partial(llama, cache=DynamicCache(), logits_to_keep=1)


@torch.no_grad()
def measure(name: str, args: argparse.Namespace, model: Llama, length: int) -> dict:
    """A prefill of `length` tokens, its peak memory, and the decoding of some tokens after it."""
    methods = make_methods(name, args, model, length)
    device = model.tok_embeddings.weight.device
    tokens = torch.arange(length + DECODED, device=device)[None] % model.config.vocab_size
    if name in BY_TRANSFORMERS:
        forward = transformers_forward(name, methods, model)
    else:
        cache = model.new_cache(1, length + DECODED)
        forward = functools.partial(model, methods=methods, cache=cache, last=1)
    attention = plain_attention if name == "floor" else attend
    with mock.patch("model.attend", attention):
        reset_peak()
        prefill = seconds(forward, tokens[:, :length])
        peak = peak_gb()
        steps = [seconds(forward, token) for token in tokens[:, length:].split(1, dim=1)]
    return dict(prefill_seconds=prefill, peak_gb=peak, decode_ms=1000 * statistics.median(steps))


def print_rows(length: int, rows: dict[str, dict]) -> None:
    """Print each method's figures, and their ratios to RoPE's and to the floor's."""
    for name, row in rows.items():
        line = f"{length:7}  {name:18}"
        plain = rows["transformers" if name in BY_TRANSFORMERS else "rope"]
        for key, value in row.items():
            to_rope = value / plain[key]
            to_floor = value / rows["floor"][key]
            line += f"{value:10.2f}{to_rope:7.2f}{to_floor:8.2f}"
        print(line, flush=True)


# -------------------------------------------------------------------------------------------------
# Command line


def main(load_model=load_model) -> None:
    """load_model(path, device, dtype) loads the model; extras/parallel.py passes another."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3, metavar="N",
                        help="measurements to take the median of (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the measurements to FILE")
    args = parser.parse_args()
    with errors_in_one_sentence(parser):
        run(args, load_model)


def run(args: argparse.Namespace, load_model) -> None:
    if min(args.repeats, *args.lengths) < 1:
        raise ValueError("--len and --repeats must be at least 1")
    if args.json:
        seen = last_change(Path(args.json))
    # load() wants a tokenizer, which is not used and random weights do not have.
    of_tiny = argparse.Namespace(**vars(args) | dict(ckpt=TINY))
    model, _, _ = load(of_tiny, lambda _, device, dtype: load_model(args.ckpt, device, dtype))
    names = list(MEASURED)
    if importlib.util.find_spec("transformers") and not torch.distributed.is_initialized():
        names += BY_TRANSFORMERS
    for name in names:  # starts threads and kernels, so that this is not measured
        measure(name, args, model, 256)

    weight = model.tok_embeddings.weight
    print(f"# {args.ckpt}, {weight.device} {weight.dtype}, median of {args.repeats}")
    ratios = " / rope / floor"
    print(f"{'tokens':>7}  {'method':18}{'prefill s':>10}{ratios}{'peak GB':>10}{ratios}"
          f"{'decode ms':>10}{ratios}")
    results = {}
    for length in sorted(args.lengths):
        rows = {name: [] for name in names}
        for _ in range(args.repeats):
            for name in names:
                rows[name].append(measure(name, args, model, length))
        results[length] = {name: medians(of_name) for name, of_name in rows.items()}
        print_rows(length, results[length])
    if args.json:
        record = dict(checkpoint=args.ckpt, device=str(weight.device), dtype=str(weight.dtype),
                      repeats=args.repeats, results=results)
        replace_whole(Path(args.json), json.dumps(record, indent=1) + "\n", seen)


def medians(rows: list[dict]) -> dict:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


if __name__ == "__main__":
    main()
