"""Run a Llama beyond its training context, without training: DPE, LaMPE and related methods.

DPE is Dimension-Wise Positional Embeddings Manipulation (arXiv 2504.18857). LaMPE is Length-aware
Multi-grained Positional Encoding (arXiv 2508.02308).

RoPE rotates the query at index i and the key at index j, each by an angle proportional to its
index, so their score depends only on the relative position i - j. Beyond the training length the
model meets relative positions that it has never seen. Most methods therefore map distant pairs to
smaller relative positions, and all of them can be written as a list of distance bands:

    for keys at distance near <= i - j < far,
    rotate the query as if it were at q_pos(i) and the key as if it were at k_pos(j).

Notation:

    i, j      index of the query and of the key
    d         distance, i - j
    rel       relative position that the model sees, q_pos(i) - k_pos(j)
    f         index of a rotary frequency, from 0, the highest ("fastest")
    D         head dimension, hence D/2 frequencies
    l         length of the input, in tokens
    w, s_f    DPE's window, and its scale for frequency f
    s1, s2    LaMPE: number of nearest distances, and of farthest, that are not compressed
    B, T, S   batch size, number of queries, number of keys
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

PositionOf = Callable[[Tensor], Tensor]  # indices (T, 1) -> positions (T, 1) or (T, D/2)

# -------------------------------------------------------------------------------------------------
# RoPE


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """RoPE's frequencies theta^(-2f/D), in radians per position: float64 (D/2,)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return theta ** -exponents


def freqs_cis(positions: Tensor, frequencies: Tensor) -> Tensor:
    """exp(1j * angle) with angle = position * frequency.

    positions (..., T, 1) or (..., T, D/2); frequencies (D/2,). Returns complex64 (..., T, D/2).
    """
    angles = positions * frequencies  # float64, accurate to 1e-10 at position 10^6
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def as_pairs(x: Tensor) -> Tensor:
    """The coordinates (2f, 2f + 1) of x, which rotate together, as complex numbers.

    (..., D) -> (..., D/2).
    """
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def rotate(x: Tensor, cis: Tensor) -> Tensor:
    """Apply RoPE: multiply the pair f of x by cis[f].

    x (B, heads, T, D); cis (T, D/2) or (heads, T, D/2), from freqs_cis. The rotation is computed in
    float32. Returns the shape and dtype of x.
    """
    rotated = as_pairs(x.float()) * cis  # (1, 32, 8192, 64)
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)  # (1, 32, 8192, 128)


# -------------------------------------------------------------------------------------------------
# Methods


@dataclass(frozen=True)
class Band:
    """Keys at distance near <= i - j < far, and the positions of these keys and their queries.

    The position functions run on the CPU and map indices (T, 1) to positions, (T, 1) or, if
    frequencies differ, (T, D/2). They must depend on nothing but the index: results are cached.
    """
    near: int
    far: int | None  # None: no upper limit
    q_pos: PositionOf
    k_pos: PositionOf


@dataclass(frozen=True)
class Method:
    """Bands, nearest first, that partition the distances 0, 1, 2, ...; each key is in one band.

    Raises ValueError if the first band does not begin at 0, if there is a gap, or if the last band
    has a limit. (If bands overlap, attend attends twice to the keys that are in two of them.)

    DPE calls the rotary frequencies that contribute most to a head's scores its key dimensions,
    where "key" means important. If key_dims is given, the bands' positions apply to key dimensions
    only, and the other frequencies keep rel = d.
    """
    bands: list[Band]
    logit_scale: float = 1.0  # multiplies every attention logit
    frequencies: Tensor | None = None  # (D/2,), in place of the model's own
    key_dims: Tensor | None = None  # bool (heads, D/2), True for key dimensions
    tables: dict = field(default_factory=dict, repr=False)  # see cis_table

    def __post_init__(self):
        whole = bool(self.bands) and self.bands[0].near == 0 and self.bands[-1].far is None
        for band, following in pairwise(self.bands):
            whole = whole and band.far is not None and band.near < following.near <= band.far
        if not whole:
            raise ValueError("bands must begin at distance 0, be in order and without a gap, and "
                             "end with far=None")


def identity(i: Tensor) -> Tensor:
    """RoPE's own position of index i, which is i itself."""
    return i


def rope() -> Method:
    """Plain RoPE: rel = d."""
    return Method([Band(0, None, identity, identity)])


def dpe(window: int, scales, key_dims: Tensor | None = None) -> Method:
    """DPE, step (c): beyond the window, divide each frequency's position indices by its scale.

    Steps (a) and (b), further below, find the scales and the key dimensions.

    The paper's figure shows rel = (d - w) // s_f + w beyond the window. But a query's rotation
    depends only on i, and a key's only on j, so the two indices are divided and rounded down
    separately, and rel is 0 to 2 larger:

        d <  w                              rel = d
        d >= w, f is a key dimension        rel = i // s_f - j // s_f + w - w // s_f
        d >= w, f is not a key dimension    rel = d

    window is w, in tokens. scales holds s_f: one integer, or D/2 of them. key_dims is bool
    (heads, D/2), or None if every frequency is a key dimension of every head.
    Raises ValueError if the window or a scale is not a whole number of at least 1.
    """
    w = window
    s = torch.as_tensor(scales)
    if w < 1 or w % 1 != 0 or s.is_floating_point() or s.min() < 1:
        raise ValueError(f"the window and the scales must be whole numbers of at least 1, not "
                         f"{window} and {scales}")
    # s has one scale for each frequency, so i // s is a matrix (T, D/2): each frequency has a
    # column of positions of its own. This is what makes the method dimension-wise.
    near = Band(0, w, identity, identity)
    far = Band(w, None, lambda i: i // s + w - w // s, lambda j: j // s)
    return Method([near, far], key_dims=key_dims)


def self_extend(window: int, group: int) -> Method:
    """SelfExtend (Jin et al. 2024) is DPE with one scale for all frequencies, the group size."""
    return dpe(window, group)


def rerope(window: int) -> Method:
    """ReRoPE (Su 2023) is DPE with a scale larger than any index: i // s, j // s and w // s are 0.

    So rel = min(d, w).
    """
    return dpe(window, 2 ** 62)


# The released code of LaMPE multiplies the cosines and sines of q and of k by 0.1 ln 2 + 1, and
# hence every attention logit by the square of that, at every length.
LAMPE_LOGIT_SCALE = (0.1 * math.log(2) + 1) ** 2  # 1.1434


def lampe(length: int, mapping_len: int, s1: int, s2: int) -> Method:
    """LaMPE's three regions for an input of l = length tokens. With p(x) = x * mapping_len // l:

        near      d <= s1              rel = d
        middle    s1 < d < l - s2      rel = p(i) - p(j) + s1 - p(s1)
        far       d >= l - s2          rel = d - (l - span)

    The paper calls near and far head and tail. span is the number of positions that the whole
    input takes, s1 + p(l - s1 - s2) + s2. In the middle, the slope is mapping_len / l, and rel
    rises from s1 to span - s2, which it reaches at d = l - s2. From there the slope is 1 again, and
    d = l would be at span. (Because of rounding, rel may fall by up to 2 where the far region
    begins.)

    length, mapping_len, s1 and s2 are in tokens. `length` is fixed for a run and does not grow
    while decoding. mapping_len comes from mapping_length(). If the input already fits (mapping_len
    >= l), or is too short for three regions (l < 2 * s1 or s1 + s2 + 1 >= l), then rel = d, with
    the same logit scale.
    Raises ValueError if mapping_len is below 1, or if s1 or s2 is negative.
    """
    l = length
    if mapping_len < 1 or s1 < 0 or s2 < 0:
        raise ValueError(f"mapping_len must be at least 1, and s1 and s2 at least 0, not "
                         f"{mapping_len}, {s1} and {s2}")
    if mapping_len >= l or l < 2 * s1 or s1 + s2 + 1 >= l:
        return replace(rope(), logit_scale=LAMPE_LOGIT_SCALE)

    def p(x):
        return x * mapping_len // l

    span = s1 + p(l - s1 - s2) + s2  # positions of the whole input
    near = Band(0, s1 + 1, identity, identity)
    middle = Band(s1 + 1, l - s2, lambda i: p(i) + s1 - p(s1), p)
    far = Band(l - s2, None, lambda i: i - (l - span), identity)
    return Method([near, middle, far], LAMPE_LOGIT_SCALE)


def mapping_length(length: int, a: float, b: float, L: float, short_mapping_len: int | None = None,
                   short_input: int = 8192) -> int:
    """LaMPE's mapping length for l = length tokens: L / (1 + exp(-(a l + b))), truncated.

    Inputs of fewer than short_input tokens get short_mapping_len instead, if it is given. Three of
    the published models have it.
    """
    if short_mapping_len is not None and length < short_input:
        return short_mapping_len
    return int(L / (1 + math.exp(-(a * length + b))))


def ntk(frequencies: Tensor, factor: float) -> Method:
    """NTK-aware scaling (bloc97 2023): theta' = theta * factor^(D/(D-2)), and rel = d.

    frequencies (D/2,) are the model's own.
    """
    D = 2 * len(frequencies)
    exponents = torch.arange(0, D, 2, dtype=torch.float64) / (D - 2)
    return replace(rope(), frequencies=frequencies * factor ** -exponents)


def ntk_by_parts(frequencies: Tensor, factor: float, train_len: int, min_rotations: float,
                 max_rotations: float) -> Tensor:
    """Divide low frequencies by factor: those with few rotations within train_len tokens.

    Frequencies with at most min_rotations are divided, those with at least max_rotations are kept,
    and those in between are interpolated. This is Llama 3.1's scaling of its own frequencies, with
    1 and 4 rotations. frequencies (D/2,) -> (D/2,).
    """
    rotations = train_len * frequencies / (2 * math.pi)
    keep = ((rotations - min_rotations) / (max_rotations - min_rotations)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / factor


def yarn(frequencies: Tensor, factor: float, train_len: int) -> Method:
    """YaRN (Peng et al. 2023), as implemented in its released code and in transformers.

    Slow frequencies are divided by factor, fast ones are kept, and those in between are
    interpolated linearly over their index f: from the f that completes 32 rotations within
    train_len tokens, rounded down, to the f that completes 1, rounded up. (The paper interpolates
    over the number of rotations, as ntk_by_parts does.) Every logit is multiplied by
    (0.1 ln factor + 1)^2.

    frequencies (D/2,) are the model's own.
    """
    D = 2 * len(frequencies)
    theta = frequencies[1].item() ** (-D / 2)

    def index_with(rotations):
        return D / 2 * math.log(train_len / (2 * math.pi * rotations), theta)

    first = max(math.floor(index_with(32)), 0)
    last = min(math.ceil(index_with(1)), D - 1)
    f = torch.arange(D // 2, dtype=torch.float64)
    divided = ((f - first) / max(last - first, 0.001)).clamp(0, 1)
    scaled = divided * frequencies / factor + (1 - divided) * frequencies
    return replace(rope(), frequencies=scaled, logit_scale=(0.1 * math.log(factor) + 1) ** 2)


# -------------------------------------------------------------------------------------------------
# Reference: the matrix that a paper draws, and attention computed from this matrix


def relative_positions(method: Method, length: int, first: int = 0) -> Tensor:
    """The matrix that a paper draws: rel of each query (row) and key (column).

    The queries are those at indices first, ..., length - 1. Entries above the diagonal, which are
    masked, are 0.
    Returns int64 (T, S), or (T, S, D/2) if frequencies differ, or (heads, T, S, D/2) if heads do.
    """
    i = torch.arange(first, length)[:, None]  # (T, 1)
    j = torch.arange(length)[:, None]  # (S, 1)
    d = (i - j.T)[..., None]  # (T, S, 1)
    rel = torch.zeros_like(d)
    for band in method.bands:  # each band overwrites the one before it, from d = near on
        rel_in_band = band.q_pos(i)[:, None] - band.k_pos(j)  # (T, S, 1 or D/2)
        rel = torch.where(d >= band.near, rel_in_band, rel)
    if method.key_dims is not None:
        is_key = method.key_dims.cpu()[:, None, None]  # (heads, 1, 1, D/2)
        rel = torch.where(is_key, rel, d.clamp(min=0))  # (heads, T, S, D/2)
    if rel.shape[-1] == 1:
        rel = rel.squeeze(-1)
    return rel


def attend_dense(q: Tensor, k: Tensor, v: Tensor, method: Method, frequencies: Tensor) -> Tensor:
    """Reference attention: each score from its relative position, then one softmax over all.

    The score of a pair is the real part of the sum over f of q[f] conj(k[f]) exp(1j rel[f]
    frequency[f]), where q[f] and k[f] are as_pairs of q and k.

    q (B, heads, T, D), k and v (B, kv_heads, S, D), all before rotation. The queries are the last
    T of the S tokens. frequencies (D/2,) are the model's own. Computes in float64. Memory grows
    with T * S, times D/2 if frequencies have positions of their own, times the heads if these have
    key dimensions. Returns (B, heads, T, D) in the dtype of q.
    """
    _, n_heads, T, D = q.shape
    S = k.shape[2]
    n_rep = n_heads // k.shape[1]  # query heads that share one KV head
    dtype = q.dtype
    if method.frequencies is not None:
        frequencies = method.frequencies
    rel = relative_positions(method, S, first=S - T).to(q.device)
    if rel.ndim == 2:
        rel = rel[..., None]
    rel = rel.expand(*rel.shape[:-1], D // 2)  # (T, S, D/2) or (heads, T, S, D/2)

    q = as_pairs(q.double())  # (B, heads, T, D/2)
    k = as_pairs(k.double()).repeat_interleave(n_rep, dim=1)  # (B, heads, S, D/2)
    v = v.double().repeat_interleave(n_rep, dim=1)  # (B, heads, S, D)
    scores = 0
    for f, frequency in enumerate(frequencies.tolist()):
        turn = torch.exp(1j * rel[..., f] * frequency)  # (T, S) or (heads, T, S)
        products = q[..., :, None, f] * k[..., None, :, f].conj()  # (B, heads, T, S)
        scores = scores + (products * turn).real
    logits = scores * (method.logit_scale / math.sqrt(D))
    is_later = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
    weights = logits.masked_fill(is_later, -torch.inf).softmax(dim=-1)
    return (weights @ v).to(dtype)


# -------------------------------------------------------------------------------------------------
# DPE's steps (a) and (b), as far as they are formulas. extras/calibrate.py runs step (a).


def dpe_scales(effective_lengths: list[int], length: int) -> list[int]:
    """DPE, step (a): the scales that compress l = length tokens to each group's effective length.

    A group is a range of neighboring frequencies that share a scale. Its effective length is the
    largest distance that it can use, in tokens. Its scale is ceil(l / effective length).
    """
    return [math.ceil(length / effective) for effective in effective_lengths]


def contribution(q: Tensor, k: Tensor) -> Tensor:
    """DPE, step (b): each frequency's contribution, the mean over tokens of |q_t[f]| * |k_t[f]|.

    q (T, heads, D) and k (T, kv_heads, D) of one layer, before rotation. The norms are those of
    the pairs of coordinates that rotate together, and each query head is paired with the KV head
    that it reads. Returns float32 (heads, D/2), on the CPU.
    """
    n_rep = q.shape[1] // k.shape[1]
    q_norms = as_pairs(q.float()).abs()  # (8192, 32, 128) -> (8192, 32, 64)
    k_norms = as_pairs(k.float()).abs()  # (8192, 8, 128) -> (8192, 8, 64)
    k_norms = k_norms.repeat_interleave(n_rep, dim=1)  # (8192, 32, 64)
    return (q_norms * k_norms).mean(dim=0).cpu()


def key_dimensions(contributions: Tensor, topk: int) -> Tensor:
    """DPE, step (b): mark the topk frequencies with the largest contributions in each head.

    contributions (heads, D/2). Ties go to the faster frequency. Returns bool (heads, D/2).
    """
    order = contributions.argsort(dim=-1, descending=True, stable=True)
    is_key = torch.zeros_like(contributions, dtype=torch.bool)
    return is_key.scatter(1, order[:, :topk], True)


# -------------------------------------------------------------------------------------------------
# Published settings, for any input length. A model is known by its shape, which a base model shares
# with its Instruct version: (dim, n_layers, vocab_size, train_len).
#
# DPE: https://github.com/LuLuLuyi/DPE at commit 46b85de; for Llama 3, from the README and the file
# names of its predictions, and for the other models from its configuration file.
# LaMPE: https://github.com/scar-on/LaMPE at commit 4e3c91f.


def published_dpe(scales_at_128k: str) -> dict:
    """DPE's settings, with effective lengths computed from the scales for 131,072 tokens."""
    scales = [int(scale) for scale in scales_at_128k.split("-")]
    effective_lengths = [131072 // scale for scale in scales]
    return dict(window=1024, effective_lengths=effective_lengths, topk=48)


def published_lampe(a: float, b: float, L: float, short_mapping_len: int | None) -> dict:
    return dict(sigmoid=dict(a=a, b=b, L=L, short_mapping_len=short_mapping_len), s1=512, s2=200)


PUBLISHED = {
    "Llama-2-7B-Chat": dict(
        shape=(4096, 32, 32000, 4096),
        lampe=published_lampe(8.673006440952035e-05, -0.648012322406978, 2489.1055552214357, 1536)),
    "Llama-3-8B-Instruct": dict(
        shape=(4096, 32, 128256, 8192),
        dpe=published_dpe("4-4-2-16-32-32-16-128"),
        lampe=published_lampe(0.00010493097327094324, -2.466638011138158, 6204.409324666837, 1536)),
    "Llama-3.1-8B-Instruct": dict(
        shape=(4096, 32, 128256, 131072),
        dpe=published_dpe("2-32-32-2-2-2-2-1"),
        lampe=published_lampe(4.505261149632588e-05, -2.788576860718702, 82358.52413056031, None)),
    "Mistral-7B-Instruct-v0.2": dict(
        shape=(4096, 32, 32000, 32768),
        dpe=published_dpe("4-16-2-16-32-16-16-2")),
    "Mistral-7B-Instruct-v0.3": dict(
        shape=(4096, 32, 32768, 32768),
        lampe=published_lampe(0.00010493097327094324, -2.466638011138158, 24576, 1536)),
    "Qwen2.5-7B-Instruct": dict(
        shape=(3584, 28, 152064, 32768),
        dpe=published_dpe("2-16-8-8-32-8-2-4")),
}


# =================================================================================================
# STOP. If you are here only for the methods, you can stop reading here.
#
# What follows computes the same result as attend_dense, at about the cost of plain causal
# attention. It consists of rotation with cached tables of angles, attention in one band with fused
# kernels, and the merging of bands. Only two masks are needed, "none" and "square causal", and
# every fused kernel of PyTorch supports both.


def attend(q: Tensor, k: Tensor, v: Tensor, method: Method, frequencies: Tensor) -> Tensor:
    """Equal to attend_dense up to rounding, at about the cost of plain causal attention.

    Takes and returns what attend_dense does. The bands are merged in place, so gradients are
    available only if the method has one band and T = S.
    Raises ValueError if the numbers of heads, KV heads, frequencies, positions and key dimensions
    do not fit together.
    """
    _, n_heads, T, D = q.shape
    S = k.shape[2]
    if method.frequencies is not None:
        frequencies = method.frequencies
    if method.key_dims is not None and method.key_dims.shape != (n_heads, D // 2):
        raise ValueError(f"the method's key dimensions have shape {tuple(method.key_dims.shape)}, "
                         f"which do not fit {n_heads} heads of {D // 2} frequencies")
    if n_heads % k.shape[1] != 0 or 2 * len(frequencies) != D:
        raise ValueError(f"{n_heads} heads of {D} coordinates do not fit {k.shape[1]} KV heads and "
                         f"{len(frequencies)} frequencies")

    for band in method.bands:
        first = max(S - T, band.near)  # a query before index `near` has no key this far away
        if first >= S:
            break
        row = first - (S - T)
        part = attend_band(q[:, :, row:], k, v, method, band, first, frequencies)
        if band.near == 0:  # every query has a key in this band: itself
            out, lse = part
        else:
            merge_(out[:, :, row:], lse[:, :, row:], *part)
    return out


def attend_band(q, k, v, method: Method, band: Band, first: int, frequencies):
    """Attend to the keys of one band.

    q (B, heads, n, D) holds the queries at indices first, first + 1, ..., S - 1. Returns out
    (B, heads, n, D) and the log-sum-exp of each query's logits, lse (B, heads, n) in float32.

    Shifting the keys by `near` makes the band a sliding window: the query in row r sees the last
    far - near keys up to its own column. Here the band is 2 <= d < 5, and x marks its pairs:

        keys       0 1 2 3 4 5 6                 shifted by 2     2 3 4 5 6 7 8
        query 4    x x x . .                     row 0            x x x
        query 5    . x x x . .            ->     row 1            . x x x
        query 6    . . x x x . .                 row 2            . . x x x
    """
    S, D = k.shape[2:]
    far = S if band.far is None else band.far
    low = max(first - far + 1, 0)  # the farthest key of the first query
    high = S - band.near  # one more than the nearest key of the last query
    k = k[:, :, low:high]
    v = v[:, :, low:high]
    window = dict(width=far - band.near, softmax_scale=method.logit_scale / math.sqrt(D))
    keeps_positions = band.q_pos is identity and band.k_pos is identity
    if method.key_dims is None or keeps_positions:
        q = rotate_to(q, method, band.q_pos, first, frequencies)  # (1, 32, 8192, 128)
        k = rotate_to(k, method, band.k_pos, low, frequencies)  # (1, 8, 8192, 128)
        return sliding_window_attention(q, k, v, **window)

    # Heads that share a KV head may have different key dimensions, and so need different keys.
    # Process one query head per KV head at a time.
    is_key = method.key_dims[:, None].to(q.device)  # (32, 1, 64)
    n_rep = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    for n in range(n_rep):
        heads = slice(n, None, n_rep)  # 8 of the 32
        queries = rotate_to(q[:, heads], method, band.q_pos, first, frequencies, is_key[heads])
        keys = rotate_to(k, method, band.k_pos, low, frequencies, is_key[heads])
        out[:, heads], lse[:, heads] = sliding_window_attention(queries, keys, v, **window)
    return out, lse


# -------------------------------------------------------------------------------------------------
# Rotation


def cis_table(method: Method, position: PositionOf, frequencies, length: int, device):
    """freqs_cis of the positions of indices 0, 1, ..., at least length - 1: complex64 (>= length,
    D/2), on the device.

    The table is kept in the method, so that all layers share it and it dies with the method.
    (Copies by dataclasses.replace share it too.)
    """
    key = (position, tuple(frequencies.tolist()), device)
    if key in method.tables and len(method.tables[key]) >= length:
        return method.tables[key]
    length = 1024 * (length // 1024 + 1)  # has room for the next tokens too
    positions = position(torch.arange(length)[:, None])
    if positions.shape[-1] not in (1, len(frequencies)):
        raise ValueError(f"the method has positions for {positions.shape[-1]} frequencies, which "
                         f"do not fit heads of {len(frequencies)} frequencies")
    # Angles are float64, which CUDA devices support and some others do not.
    angle_device = device if device.type == "cuda" else torch.device("cpu")
    with torch.inference_mode(False):  # so that the table also serves training
        radians = frequencies.to(angle_device, torch.float64)
        method.tables[key] = freqs_cis(positions.to(angle_device), radians).to(device)
    return method.tables[key]


SLICE = 4096  # tokens that are processed at a time, so that float32 copies stay small


def rotate_to(x, method: Method, position: PositionOf, first: int, frequencies, is_key=None):
    """Rotate x (B, heads, T, D), the tokens at indices first, first + 1, ..., to position(index).

    Where is_key (heads, 1, D/2) is False, frequencies keep RoPE's positions. Returns the shape and
    dtype of x.
    """
    own = slice(first, first + x.shape[2])
    cis = cis_table(method, position, frequencies, own.stop, x.device)[own]  # (T, D/2)
    if is_key is not None:
        plain = cis_table(method, identity, frequencies, own.stop, x.device)[own]
        cis = torch.where(is_key, cis, plain)  # (heads, T, D/2)
    if x.dtype == torch.float32:
        return rotate(x, cis)

    # Half precision is rotated in a float32 copy. Slices keep it small.
    out = torch.empty_like(x)
    for start in range(0, x.shape[2], SLICE):
        tokens = slice(start, start + SLICE)
        out[:, :, tokens] = rotate(x[:, :, tokens], cis[..., tokens, :])
    return out


# -------------------------------------------------------------------------------------------------
# Attention in a sliding window, with the masks "none" and "square causal" only


def sliding_window_attention(q, k, v, width: int, softmax_scale: float):
    r"""Causal attention in which each query sees the last `width` keys up to its own.

    q (B, heads, n, D) and k are rotated; k and v (B, kv_heads, c + n, D) with c < width. Row r
    sees columns c + r - width + 1 to c + r. Returns out (B, heads, n, D) and lse (B, heads, n).

    FlashAttention takes the window as it is. Other kernels know only square causal masks: the rows
    are cut into the first width - c, which see all older columns, and then blocks of at most width
    (and 1,024, to save memory). A block sees its own columns, square causal (\), the columns that
    all of its rows see (o), and the left edge, where its row r sees columns r, r + 1, ... (/),
    which is square causal with both orders reversed. With width 4, c = 1 and n = 9:

        columns     0 1 2 3 4 5 6 7 8 9
        row 0       o \
        row 1       o \ \
        row 2       o \ \ \
        row 3         / / / \
        row 4           / / \ \
        row 5             / \ \ \
        row 6               \ \ \ \
        row 7                 / o o \
        row 8                   o o \ \
    """
    if choose_kernel(q) == "flash":
        return flash_attention(q, k, v, width, softmax_scale)
    n = q.shape[2]
    c = k.shape[2] - n
    if n == 1 or (c == 0 and n <= width):  # one row sees all keys, or all rows are in one block
        return fused_attention(q, k, v, softmax_scale, is_causal=n > 1)

    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    block = min(width, 1024)
    for start, stop in pairwise([0, *range(min(width - c, n), n, block), n]):
        rows = q[:, :, start:stop]
        own = slice(c + start, c + stop)
        k_own = k[:, :, own]
        v_own = v[:, :, own]
        part, part_lse = fused_attention(rows, k_own, v_own, softmax_scale, is_causal=True)

        first = max(own.stop - width, 0)  # the first column that all rows see
        if first < own.start:
            shared = slice(first, own.start)
            k_shared = k[:, :, shared]
            v_shared = v[:, :, shared]
            merge_(part, part_lse, *fused_attention(rows, k_shared, v_shared, softmax_scale))

        edge = slice(max(own.start - width + 1, 0), first)
        if edge.start < edge.stop:
            but_last = slice(0, -1)  # the last row of the block sees none of these columns
            q_reversed = rows[:, :, but_last].flip(2)
            k_reversed = k[:, :, edge].flip(2)
            v_reversed = v[:, :, edge].flip(2)
            other, other_lse = fused_attention(q_reversed, k_reversed, v_reversed, softmax_scale,
                                               is_causal=True)
            merge_(part[:, :, but_last], part_lse[:, :, but_last],
                   other.flip(2), other_lse.flip(2))
        out[:, :, start:stop] = part
        lse[:, :, start:stop] = part_lse
    return out, lse


def merge_(out, lse, other, other_lse) -> None:
    """Merge attention over other keys into (out, lse), in place.

    out and other (B, heads, n, D), lse and other_lse (B, heads, n). With a and b the
    log-sum-exps,

        lse = log(e^a + e^b)        out = sigmoid(a - b) * out_a + sigmoid(b - a) * out_b

    Both weights are computed in float32: the smaller one would be lost as 1 minus the larger if an
    attention sink held all but 1e-7 of the attention.
    """
    weight = torch.sigmoid(lse - other_lse)[..., None]  # (1, 32, 8192, 1)
    other_weight = torch.sigmoid(other_lse - lse)[..., None]
    for start in range(0, out.shape[2], SLICE):
        rows = slice(start, start + SLICE)
        merged = out[:, :, rows] * weight[:, :, rows]  # float32
        merged += other[:, :, rows] * other_weight[:, :, rows]
        out[:, :, rows] = merged
    torch.logaddexp(lse, other_lse, out=lse)


# -------------------------------------------------------------------------------------------------
# Fused kernels


def choose_kernel(x: Tensor) -> str:
    """The kernel for queries like x: cpu, flash or efficient; blockwise if no fused kernel fits."""
    if x.device.type == "cpu":
        return "cpu"
    if not x.is_cuda or x.shape[-1] % 8 != 0 or x.dtype == torch.float64:
        return "blockwise"
    ampere = torch.cuda.get_device_capability(x.device) >= (8, 0)  # runs bfloat16 and flash
    flash = ampere and torch.backends.cuda.is_flash_attention_available()
    if flash and x.shape[-1] <= 256 and x.dtype != torch.float32:
        return "flash"
    if ampere or x.dtype != torch.bfloat16:
        return "efficient"
    return "blockwise"


# The operators below are private to PyTorch and were checked with 2.11 to 2.14. The public function
# scaled_dot_product_attention does not return the log-sum-exp.


def flash_attention(q, k, v, width: int, softmax_scale: float):
    """sliding_window_attention in one call of FlashAttention on CUDA.

    Its window is width - 1 keys before the query's own and none after it; the last query is aligned
    with the last key. One row is passed without a window, since it sees all keys.
    """
    before, after = (width - 1, 0) if q.shape[2] > 1 else (-1, -1)  # -1: no limit
    q = q.transpose(1, 2)  # (1, 32, 8192, 128) -> (1, 8192, 32, 128)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    # After q, k and v: no offsets of packed sequences, the lengths, dropout, is_causal, debug mask.
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False, scale=softmax_scale,
        window_size_left=before, window_size_right=after)
    return out.transpose(1, 2), lse


def fused_attention(q, k, v, softmax_scale: float, is_causal: bool = False):
    """softmax(softmax_scale * q k^T) v and the log-sum-exp of each row's logits.

    q (B, heads, T, D) and k are rotated; k and v (B, kv_heads, S, D). Every query sees every key
    or, if is_causal, which requires T = S, only the keys up to its own index. Returns out (B,
    heads, T, D) and lse (B, heads, T) in float32.
    """
    aten = torch.ops.aten
    options = dict(dropout_p=0.0, is_causal=is_causal, scale=softmax_scale)
    if choose_kernel(q) == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)

    # The other kernels need as many KV heads as query heads.
    n_rep = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(n_rep, dim=1)
    v = v.repeat_interleave(n_rep, dim=1)
    if choose_kernel(q) == "efficient":
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_bias=None, compute_log_sumexp=True, **options)
        return out, lse[:, :, :q.shape[2]]  # lse is padded to a multiple of 32 rows
    return blockwise_attention(q, k, v, softmax_scale, is_causal)


def blockwise_attention(q, k, v, softmax_scale: float, is_causal: bool):
    """fused_attention in plain PyTorch, 256 rows at a time; k and v have as many heads as q."""
    k = k.float()
    v = v.float()
    outs = []
    lses = []
    for start in range(0, q.shape[2], 256):
        rows = q[:, :, start:start + 256].float()
        logits = rows @ k.mT * softmax_scale  # (1, 32, 256, 8192)
        if is_causal:
            ones = torch.ones(logits.shape[2:], dtype=torch.bool, device=q.device)
            later = ones.triu(start + 1)  # columns after the row's own
            logits = logits.masked_fill(later, -torch.inf)
        lses.append(logits.logsumexp(dim=-1))  # (1, 32, 256)
        outs.append((logits.softmax(dim=-1) @ v).to(q.dtype))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


# -------------------------------------------------------------------------------------------------
# python rope_extrap.py prints the papers' matrices


def print_matrices(*matrices: Tensor) -> None:
    """Print square matrices side by side, each row up to the diagonal."""
    for i in range(len(matrices[0])):
        line = ""
        for matrix in matrices:
            cells = [f"{rel:3}" for rel in matrix[i, :i + 1].tolist()]
            line += "".join(cells).ljust(32)
        print(line.rstrip())


def main() -> None:
    w = 3
    d = relative_positions(rope(), 9)
    print("DPE, Figure 1(c): 9 tokens, window 3. Left: as drawn. Right: as two rotations give it.")
    for s in (3, 2):
        drawn = torch.where(d < w, d, (d - w) // s + w)
        print(f"\nscale {s}")
        print_matrices(drawn, relative_positions(dpe(w, s), 9))
    print("\nLaMPE: 16 tokens, mapping length 6, s1 = 3, s2 = 4\n")
    print_matrices(relative_positions(lampe(16, 6, s1=3, s2=4), 16))


if __name__ == "__main__":
    main()
