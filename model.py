"""A Llama forward pass, from scratch, in plain PyTorch.

Reads top to bottom: Config, KVCache, the parts of a Layer, Llama, greedy decoding. What stands where RoPE usually does
is rope_extrap.attend, which rotates and attends as the layer's Method says. Keys are cached before they are rotated,
since every distance band rotates them its own way.

    B   batch       T   tokens       S   tokens with keys, the cached and the new       c   a Config
"""
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope_extrap import Method, attend, rope, rope_frequencies


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's change of its own frequencies: slow ones are divided by factor, fast ones kept, blended between."""
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_len: int = 8192


@dataclass(frozen=True)
class Config:  # in brackets, Llama 3 8B
    vocab_size: int  # [128256]
    dim: int  # [4096]
    n_layers: int  # [32]
    n_heads: int  # [32]
    n_kv_heads: int  # [8]
    head_dim: int  # [128]
    ffn_dim: int  # [14336]
    train_len: int  # the context it was trained on, tokens [8192]
    rope_theta: float = 10000.0  # [500000]
    rope_scaling: RopeScaling | None = None  # Llama 3.1 and later
    norm_eps: float = 1e-5
    tied: bool = False  # the output matrix is the embedding
    qkv_bias: bool = False  # Qwen2 adds one to queries, keys and values

    def frequencies(self) -> Tensor:
        """The model's rotary frequencies, radians per position: (head_dim/2,) float64."""
        f, r = rope_frequencies(self.head_dim, self.rope_theta), self.rope_scaling
        if r is None:
            return f
        rotations = r.original_len * f / (2 * math.pi)  # in the original context
        keep = ((rotations - r.low_freq_factor) / (r.high_freq_factor - r.low_freq_factor)).clamp(0, 1)
        return keep * f + (1 - keep) * f / r.factor


class KVCache:
    """Unrotated keys, and values, of the tokens seen so far: room for max_len tokens, `length` of them filled.

    Its heads, and where None its device and dtype, are those of the first keys: a tensor-parallel rank has fewer heads.
    """

    def __init__(self, config: Config, batch: int, max_len: int, device=None, dtype=None):
        self.n_layers, self.batch, self.max_len, self.length = config.n_layers, batch, max_len, 0
        self.device, self.dtype, self.k = device, dtype, None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's k, v (B, kv_heads, T, head_dim) after what is held; return all (B, kv_heads, S, head_dim)."""
        if self.k is None:
            shape = (self.n_layers, self.batch, k.shape[1], self.max_len, k.shape[3])
            with torch.inference_mode(False):  # filled under inference mode, it can be used outside it too
                self.k = torch.empty(shape, device=self.device or k.device, dtype=self.dtype or k.dtype)
                self.v = torch.empty_like(self.k)
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end], self.v[layer, :, :, self.length:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        return (x * torch.rsqrt(norm.square() / x.shape[-1] + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention: n_heads queries share n_kv_heads keys and values."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x: Tensor, method: Method, frequencies: Tensor, cache: KVCache | None, layer: int,
                last: int) -> Tensor:
        qkv = self.wq(x[:, -last:]), self.wk(x), self.wv(x)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in qkv)  # (B, heads, tokens, head_dim)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, n_kv_heads, S, head_dim)
        return self.wo(attend(q, k, v, method, frequencies).transpose(1, 2).flatten(2))  # (B, last, dim)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, c: Config):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w3 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w2 = nn.Linear(c.ffn_dim, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Token by token it is all the same, so a long prefill goes in slices and never holds (T, ffn_dim) whole.
        return torch.cat([self.w2(F.silu(self.w1(part)) * self.w3(part)) for part in x.split(4096, dim=1)], dim=1)


class Layer(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(c.dim, c.norm_eps), Attention(c)
        self.ffn_norm, self.feed_forward = RMSNorm(c.dim, c.norm_eps), FeedForward(c)

    def forward(self, x: Tensor, method, frequencies, cache, layer: int, last: int) -> Tensor:
        x = x[:, -last:] + self.attention(self.attention_norm(x), method, frequencies, cache, layer, last)
        return x + self.feed_forward(self.ffn_norm(x))  # (B, last, dim)


class Llama(nn.Module):
    """Meta's names of parameters, and its order in q and k: coordinates 2f and 2f + 1 rotate together."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = None if config.tied else nn.Linear(config.dim, config.vocab_size, bias=False)

    def forward(self, tokens: Tensor, methods: list[Method] | None = None, cache: KVCache | None = None,
                last: int | None = None) -> Tensor:
        """Logits of the next token, float32 (B, T, vocab), or (B, last, vocab) of the last positions only.

        tokens (B, T) int64, which follow what the cache holds; methods: one per layer, None for plain RoPE. The last
        layer computes queries only where logits are asked for. Errors: ValueError for no tokens, last below 1, methods
        that are not one per layer, or tokens that do not fit the cache.
        """
        c, (B, T) = self.config, tokens.shape
        if T < 1 or last is not None and last < 1:
            raise ValueError(f"{T} tokens and the last {last} logits: there must be one at least")
        methods = [rope()] * c.n_layers if methods is None else methods
        if len(methods) != c.n_layers:
            raise ValueError(f"{len(methods)} methods for {c.n_layers} layers: give one Method per layer")
        if cache is not None and (B != cache.batch or cache.length + T > cache.max_len):
            raise ValueError(f"{B} rows of {cache.length} + {T} tokens do not fit a cache of {cache.max_len}, made for "
                             f"{cache.batch} rows")
        frequencies = c.frequencies()
        last = T if last is None else min(last, T)
        x = self.tok_embeddings(tokens)  # (B, T, dim)
        for n, (layer, method) in enumerate(zip(self.layers, methods)):
            x = layer(x, method, frequencies, cache, n, last if n == c.n_layers - 1 else T)
        if cache is not None:
            cache.length += T
        x = self.norm(x)  # (B, last, dim)
        logits = F.linear(x, self.tok_embeddings.weight.to(x.dtype)) if self.output is None else self.output(x)
        return logits.float()  # (B, last, vocab)


@torch.no_grad()
def generate(model: Llama, tokens: Tensor, max_new: int, methods: list[Method] | None = None, stop_ids=(),
             cache: KVCache | None = None) -> Tensor:
    """Greedy decoding: up to max_new tokens after tokens (B, T), fewer when every row has met a stop token.

    Returns (B, new) int64; a row that stopped earlier repeats its stop token. tokens follow what a given cache holds.
    """
    cache = cache or KVCache(model.config, tokens.shape[0], tokens.shape[1] + max_new)
    stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=tokens.device)
    new = []
    for _ in range(max_new):
        chosen = model(new[-1] if new else tokens, methods, cache, last=1).argmax(dim=-1)  # (B, 1)
        new.append(torch.where(torch.isin(new[-1], stop_ids), new[-1], chosen) if new else chosen)
        if torch.isin(new[-1], stop_ids).all():
            break
    return torch.cat(new, dim=1) if new else tokens[:, :0]


@torch.no_grad()
def queries_and_keys(model: Llama, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For DPE's step (b), of each layer in turn: unrotated q (T, n_heads, head_dim) and k (T, n_kv_heads, head_dim), in
    plain RoPE's forward pass of tokens (1, T)."""
    x, T, frequencies = model.tok_embeddings(tokens), tokens.shape[1], model.config.frequencies()
    for layer in model.layers:
        h, attention = layer.attention_norm(x), layer.attention
        yield tuple(y[0].unflatten(-1, (-1, attention.head_dim)) for y in (attention.wq(h), attention.wk(h)))
        x = layer(x, rope(), frequencies, None, 0, T)


def memory_free(device: torch.device) -> int | None:
    """Bytes free on the device for this rank, None where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo, ranks = Path("/proc/meminfo"), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) * 1024 // ranks if meminfo.exists() else None


def memory_per_token(c: Config, size: int, ranks: int) -> int:
    """Bytes of a rank for each token of a prefill, at `size` bytes a number: the KV cache, and in one layer x and its
    norm; q, q rotated, output, a band's output, k and v for every head (some kernels copy them); k rotated."""
    q, k = (n * c.head_dim // ranks for n in (c.n_heads, c.n_kv_heads))
    return size * (2 * c.n_layers * k + 2 * c.dim + 6 * q + k)
