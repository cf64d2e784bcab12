"""A Llama forward pass from scratch, in plain PyTorch.

To be read from top to bottom: the configuration, the KV cache, the parts of a layer, the model,
and greedy decoding. Where other implementations apply RoPE and call scaled_dot_product_attention,
this one calls rope_extrap.attend, which rotates and attends as the layer's Method says. The cache
holds keys before rotation, because each distance band rotates them to other positions.

Shapes: B is the batch size, T the number of new tokens, S the number of all tokens, cached and
new. Example sizes in comments are those of Llama 3 8B with 131,072 tokens.
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rope_extrap import Method, attend, contribution, ntk_by_parts, rope, rope_frequencies

# -------------------------------------------------------------------------------------------------
# Configuration


class RopeScaling(NamedTuple):
    """Llama 3.1's scaling of its own frequencies: the arguments of rope_extrap.ntk_by_parts."""
    factor: float = 8.0
    original_len: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class Config:
    """The shape of a model. In brackets: Llama 3 8B."""
    vocab_size: int  # [128256]
    dim: int  # [4096]
    n_layers: int  # [32]
    n_heads: int  # [32]
    n_kv_heads: int  # [8]
    head_dim: int  # [128]
    ffn_dim: int  # [14336]
    train_len: int  # context length in training, in tokens [8192]
    rope_theta: float = 10000.0  # [500000]
    rope_scaling: RopeScaling | None = None  # Llama 3.1 and later
    norm_eps: float = 1e-5
    tied: bool = False  # whether the output matrix is the embedding
    qkv_bias: bool = False  # whether queries, keys and values have a bias, as in Qwen2

    def frequencies(self) -> Tensor:
        """The model's rotary frequencies in radians per position: float64 (head_dim/2,)."""
        frequencies = rope_frequencies(self.head_dim, self.rope_theta)
        if self.rope_scaling is not None:
            frequencies = ntk_by_parts(frequencies, *self.rope_scaling)
        return frequencies


# -------------------------------------------------------------------------------------------------
# KV cache


class KVCache:
    """Unrotated keys, and values, of the tokens seen so far.

    It has room for max_len tokens, of which `length` are filled.
    """

    def __init__(self, config: Config, batch: int, max_len: int, device=None, dtype=None):
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty_like(self.k)
        self.batch = batch
        self.max_len = max_len
        self.length = 0

    def append(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new k and v (B, kv_heads, T, head_dim) after the tokens already cached.

        Returns all keys and values of the layer, (B, kv_heads, S, head_dim). The caller adds T to
        `length` after the last layer.
        """
        end = self.length + k.shape[2]
        self.k[layer_idx, :, :, self.length:end] = k
        self.v[layer_idx, :, :, self.length:end] = v
        return self.k[layer_idx, :, :, :end], self.v[layer_idx, :, :, :end]


# -------------------------------------------------------------------------------------------------
# The parts of a layer


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # vector_norm sums in float32 without a float32 copy of x; the product below is one.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        mean_square = norm.square() / x.shape[-1]
        normalized = x * torch.rsqrt(mean_square + self.eps)  # in float32
        return normalized.to(self.weight.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention: n_heads query heads share n_kv_heads key and value heads."""

    def __init__(self, config: Config):
        super().__init__()
        c = config
        self.head_dim = c.head_dim
        self.n_kv_heads = c.n_kv_heads
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def split_heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * head_dim) -> (B, heads, T, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor, method: Method, frequencies: Tensor, cache: KVCache | None,
                layer_idx: int, last: int) -> Tensor:
        """Only the final `last` tokens are queries. x (B, T, dim), normalized -> (B, last, dim)."""
        q = self.split_heads(self.wq(x[:, -last:]))  # (1, 131072, 4096) -> (1, 32, 131072, 128)
        k = self.split_heads(self.wk(x))  # (1, 8, 131072, 128)
        v = self.split_heads(self.wv(x))  # (1, 8, 131072, 128)
        if cache is not None:
            k, v = cache.append(layer_idx, k, v)  # all S tokens
        out = attend(q, k, v, method, frequencies)  # (1, 32, 131072, 128)
        return self.wo(out.transpose(1, 2).flatten(2))  # (1, 131072, 4096)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: Config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Tokens do not interact here. Taking 4,096 at a time avoids (131072, 14336) hidden
        # activations.
        outs = []
        for tokens in x.split(4096, dim=1):
            hidden = F.silu(self.w1(tokens)) * self.w3(tokens)  # (1, 4096, 14336)
            outs.append(self.w2(hidden))  # (1, 4096, 4096)
        return torch.cat(outs, dim=1)


class Layer(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, method: Method, frequencies: Tensor, cache: KVCache | None,
                layer_idx: int, last: int) -> Tensor:
        """x (B, T, dim) -> (B, last, dim)."""
        # Intermediate results have no names, so their memory is freed before the next step.
        x = x[:, -last:] + self.attention(
            self.attention_norm(x), method, frequencies, cache, layer_idx, last)
        return x + self.feed_forward(self.ffn_norm(x))


# -------------------------------------------------------------------------------------------------
# The model


class Llama(nn.Module):
    """A Llama with Meta's parameter names.

    As in Meta's checkpoints, coordinates 2f and 2f + 1 of q and k rotate together.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.plain = rope()  # kept, so that its table of angles is too
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, tokens: Tensor, methods: list[Method] | None = None,
                cache: KVCache | None = None, last: int | None = None) -> Tensor:
        """Logits of the next token, float32 (B, T, vocab_size), or (B, last, vocab_size).

        tokens (B, T) int64 follow those that the cache holds. methods has one Method per layer;
        None means plain RoPE. If `last` is given, only that many positions at the end get logits,
        and the final layer computes queries only for them. (This saves 3 % of a prefill of Llama 3
        8B, and half of the queries of a model with two layers.)
        Raises ValueError if there is not one method per layer, if a token is unknown, if the tokens
        do not fit the cache, or if logits are not finite, as when float16 overflows.
        """
        B, T = tokens.shape
        n_layers = self.config.n_layers
        last = min(last or T, T)
        methods = methods or [self.plain] * n_layers
        if tokens.max() >= self.config.vocab_size:
            raise ValueError(f"token {tokens.max()} is outside the model's vocabulary of "
                             f"{self.config.vocab_size}; the tokenizer belongs to another model")
        if len(methods) != n_layers:
            raise ValueError(f"the model has {n_layers} layers and needs one Method for each, "
                             f"not {len(methods)} methods")
        if cache is not None and (B != cache.batch or cache.length + T > cache.max_len):
            raise ValueError(f"{B} rows of {cache.length} + {T} tokens do not fit a cache of "
                             f"{cache.max_len} tokens, made for {cache.batch} rows")

        frequencies = self.config.frequencies()  # (64,)
        x = self.tok_embeddings(tokens)  # (1, 131072, 4096)
        for n, layer in enumerate(self.layers):
            n_queries = last if n == n_layers - 1 else T
            x = layer(x, methods[n], frequencies, cache, n, n_queries)
        if cache is not None:
            cache.length += T
        logits = self.output(self.norm(x)).float()  # (1, last, 128256)
        if not logits.isfinite().all():
            raise ValueError(f"logits are not finite in {x.dtype}; use --dtype bfloat16 or float32")
        return logits

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty KVCache for this model, on its device and in its dtype."""
        attention = self.layers[0].attention
        config = replace(self.config, n_kv_heads=attention.n_kv_heads)
        return KVCache(config, batch, max_len, attention.wk.weight.device,
                       attention.wk.weight.dtype)


# -------------------------------------------------------------------------------------------------
# Decoding, and DPE's contributions


@torch.no_grad()
def generate(model: Llama, tokens: Tensor, max_new: int, methods: list[Method] | None = None,
             stop_ids=(), cache: KVCache | None = None) -> Tensor:
    """Greedily decode up to max_new tokens after tokens (B, T), or until every row has stopped.

    Returns int64 (B, new). A row that has stopped repeats its stop token. If a cache is given,
    tokens follow those that it holds; the last token that is returned is not in the cache yet.
    """
    B, T = tokens.shape
    if cache is None:
        cache = model.new_cache(B, T + max_new)
    stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=tokens.device)
    stopped = torch.zeros(B, 1, dtype=torch.bool, device=tokens.device)
    generated = tokens[:, :0]
    for _ in range(max_new):
        logits = model(tokens, methods, cache, last=1)  # (B, 1, vocab_size)
        tokens = torch.where(stopped, tokens[:, -1:], logits.argmax(dim=-1))  # (B, 1)
        generated = torch.cat((generated, tokens), dim=1)
        stopped = torch.isin(tokens, stop_ids)  # stays true, since the token is repeated
        if stopped.all():
            break
    return generated


@torch.no_grad()
def measure_contributions(model: Llama, texts: list[list[int]]) -> Tensor:
    """DPE, step (b): each layer's contributions, the mean over texts, which are lists of token ids.

    The forward pass is plain RoPE's; a hook on each layer's attention sees its input. Returns
    float32 (n_layers, n_heads, head_dim/2).
    """
    found = []

    def record(attention, arguments):
        x = arguments[0]  # (1, T, dim), normalized
        q = attention.split_heads(attention.wq(x))[0].transpose(0, 1)  # (8192, 32, 128)
        k = attention.split_heads(attention.wk(x))[0].transpose(0, 1)  # (8192, 8, 128)
        found.append(contribution(q, k))  # (32, 64)

    hooks = [layer.attention.register_forward_pre_hook(record) for layer in model.layers]
    for text in texts:
        model(torch.tensor([text], device=model.tok_embeddings.weight.device), last=1)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).unflatten(0, (len(texts), -1)).mean(dim=0)
