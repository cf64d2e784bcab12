"""Run a Llama beyond its training context, without training: DPE, LaMPE and related methods.

DPE is Dimension-Wise Positional Embeddings Manipulation (arXiv 2504.18857). LaMPE is Length-aware
Multi-grained Positional Encoding (arXiv 2508.02308).

RoPE rotates the query at index i and the key at index j, each by an angle proportional to its
index, so their score depends only on the relative position i - j. Beyond the training length the
model meets relative positions that it has never seen. Most methods therefore map distant pairs to
smaller relative positions, and all of them can be written as a list of distance bands:

    for keys at distance near <= i - j < far,
    rotate the query as if it were at q_pos(i) and the key as if it were at k_pos(j).

Notation, as in the papers:

    i, j      index of the query and of the key
    d         distance, i - j
    rel       relative position, q_pos(i) - k_pos(j)
    f         index of a rotary frequency, from 0, the highest ("fastest")
    D         head dimension, hence D/2 frequencies
    l         length of the input, in tokens
    w, s_f    DPE's window, and its scale for frequency f
    s1, s2    LaMPE: number of exact near distances, and of far distances with slope 1
    B, T, S   batch size, number of queries, number of keys
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

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


def rotate(x: Tensor, cis: Tensor) -> Tensor:
    """Apply RoPE: multiply coordinates (2f, 2f + 1) of x, as a complex number, by cis[f].

    x (B, heads, T, D); cis (T, D/2) or (heads, T, D/2), from freqs_cis. The rotation is computed
    in float32. Returns the shape and dtype of x.
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (1, 32, 8192, 128) -> (1, 32, 8192, 64, 2)
    rotated = torch.view_as_complex(pairs) * cis  # (1, 32, 8192, 64)
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)  # (1, 32, 8192, 128)


# -------------------------------------------------------------------------------------------------
# Methods


@dataclass(frozen=True)
class Band:
    """Keys at distance near <= i - j < far, and the positions of these keys and their queries.

    The position functions run on the CPU and map indices (T, 1) to positions, (T, 1) or, if
    frequencies differ, (T, D/2). They must be pure, because tables of angles are cached by
    function.
    """
    near: int
    far: int | None  # None: no upper limit
    q_pos: Callable[[Tensor], Tensor]
    k_pos: Callable[[Tensor], Tensor]

    def contains(self, d: Tensor) -> Tensor:
        """Which of the distances d are in this band."""
        inside = d >= self.near
        if self.far is not None:
            inside = inside & (d < self.far)
        return inside


@dataclass(frozen=True)
class Method:
    """Bands that partition the distances 0, 1, 2, ...: each key is attended to exactly once."""
    bands: list[Band]
    logit_scale: float = 1.0  # multiplies every attention logit
    frequencies: Tensor | None = None  # (D/2,), in place of the model's own
    key_dims: Tensor | None = None  # bool (heads, D/2); where False, rel = d


def identity(i: Tensor) -> Tensor:
    """RoPE's own position of index i, which is i itself."""
    return i


def rope() -> Method:
    """Plain RoPE: rel = d."""
    return Method([Band(0, None, identity, identity)])


def dpe(window: int, scales, key_dims: Tensor | None = None) -> Method:
    """DPE, step (c): beyond the window, scale the position indices of each frequency.

        d <  w                              rel = d
        d >= w, f is a key dimension        rel = i // s_f - j // s_f + w - w // s_f
        d >= w, f is not a key dimension    rel = d

    window is w, in tokens. scales holds s_f: one integer, or D/2 of them. key_dims is a bool
    tensor (heads, D/2), or None if every frequency is a key dimension.
    Raises ValueError if the window or a scale is below 1.
    """
    w = window
    s = torch.as_tensor(scales)
    valid_scales = s.ndim <= 1 and s.numel() > 0 and not s.is_floating_point()
    if w < 1 or not valid_scales or s.min() < 1:
        raise ValueError(f"DPE needs a window and integer scales of at least 1, "
                         f"not window {window} and scales {scales}")
    bands = [Band(0, w, identity, identity),
             Band(w, None, lambda i: i // s + w - w // s, lambda j: j // s)]
    return Method(bands, key_dims=key_dims)


def self_extend(window: int, group: int) -> Method:
    """SelfExtend (Jin et al. 2024) is DPE with one scale for all frequencies, the group size."""
    return dpe(window, group)


def rerope(window: int) -> Method:
    """ReRoPE (Su 2023) is DPE with scales larger than any index, so that rel = min(d, w)."""
    return dpe(window, 2 ** 62)


# The released code of LaMPE multiplies the cosines and sines of q and of k by 0.1 ln 2 + 1, and
# hence every attention logit by the square of that, at every length.
LAMPE_LOGIT_SCALE = (0.1 * math.log(2) + 1) ** 2  # 1.1434


def lampe(length: int, mapping_len: int, s1: int, s2: int,
          logit_scale: float = LAMPE_LOGIT_SCALE) -> Method:
    """LaMPE's three regions for an input of l = length tokens. With p(x) = x * mapping_len // l:

        head      d <= s1              rel = d
        middle    s1 < d < l - s2      rel = p(i) - p(j) + s1 - p(s1)
        tail      d >= l - s2          rel = d - (l - m)

    where m = s1 + s2 + (l - s1 - s2) * mapping_len // l, so that the tail continues the middle, up
    to rounding (rel may fall by up to 2). All four lengths are in tokens. `length` is fixed for a
    run and does not grow while decoding; mapping_len comes from mapping_length(). If the input
    already fits (mapping_len >= l), or is too short for three regions (l < 2 * s1 or
    s1 + s2 >= l), then rel = d, with the same logit scale.
    Raises ValueError if length or mapping_len is below 1, or if s1 or s2 is negative.
    """
    l = length
    if l < 1 or mapping_len < 1 or s1 < 0 or s2 < 0:
        raise ValueError(f"LaMPE needs a length and a mapping length of at least 1, and s1 and s2 "
                         f"of at least 0, not {length}, {mapping_len}, {s1} and {s2}")
    if mapping_len >= l or l < 2 * s1 or s1 + s2 >= l:
        return replace(rope(), logit_scale=logit_scale)

    m = s1 + s2 + (l - s1 - s2) * mapping_len // l
    head = Band(0, s1 + 1, identity, identity)
    middle = Band(s1 + 1, l - s2,
                  lambda i: i * mapping_len // l + s1 - s1 * mapping_len // l,
                  lambda j: j * mapping_len // l)
    tail = Band(l - s2, None, lambda i: i - (l - m), identity)
    if middle.near == middle.far:  # s1 + s2 = l - 1 leaves no distances for the middle
        return Method([head, tail], logit_scale)
    return Method([head, middle, tail], logit_scale)


def mapping_length(length: int, a: float, b: float, L: float, short: int | None = None,
                   short_below: int = 8192) -> int:
    """LaMPE's mapping length for l = length tokens: L / (1 + exp(-(a l + b))), truncated.

    short, if given, is the mapping length for inputs below short_below tokens. Two of the
    published models set it.
    """
    if short is not None and length < short_below:
        return short
    return int(L / (1 + math.exp(-(a * length + b))))


SIGMOID = ("a", "b", "L", "short", "short_below")  # mapping_length's arguments


def mapping_length_of(settings: dict, length: int) -> int:
    """mapping_length with the arguments that LaMPE's settings hold, among others."""
    return mapping_length(length, **{key: settings[key] for key in SIGMOID if key in settings})


def ntk(frequencies: Tensor, factor: float) -> Method:
    """NTK-aware scaling (bloc97 2023): theta' = theta * factor^(D/(D-2)), and rel = d.

    frequencies (D/2,) are the model's own.
    """
    D = 2 * len(frequencies)
    exponents = torch.arange(0, D, 2, dtype=torch.float64) / (D - 2)
    return replace(rope(), frequencies=frequencies * factor ** -exponents)


def ntk_by_parts(frequencies: Tensor, factor: float, train_len: int,
                 slow: float, fast: float) -> Tensor:
    """Divide by factor the frequencies that complete few rotations within train_len tokens.

    Frequencies with at most `slow` rotations are divided, those with at least `fast` rotations
    are kept, and those in between are interpolated. frequencies (D/2,) -> (D/2,).
    """
    rotations = train_len * frequencies / (2 * math.pi)
    keep = ((rotations - slow) / (fast - slow)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / factor


def yarn(frequencies: Tensor, factor: float, train_len: int) -> Method:
    """YaRN (Peng et al. 2023): ntk_by_parts between 1 and 32 rotations, and a logit scale.

    frequencies (D/2,) are the model's own. Every logit is multiplied by (0.1 ln factor + 1)^2.
    Llama 3.1 scales its own frequencies in the same way, between 1 and 4 rotations.
    """
    scaled = ntk_by_parts(frequencies, factor, train_len, slow=1, fast=32)
    return replace(rope(), frequencies=scaled, logit_scale=(0.1 * math.log(factor) + 1) ** 2)


# -------------------------------------------------------------------------------------------------
# Reference semantics: the matrix shown in the papers, and attention with one softmax over all
# scores


def relative_positions(method: Method, length: int) -> Tensor:
    """The matrix shown in the papers: rel of each query (row) and key (column).

    Entries above the diagonal, which are masked, are 0.
    Returns int64 (T, T), or (T, T, D/2) if frequencies differ, or (heads, T, T, D/2) if heads do.
    """
    i = torch.arange(length)[:, None]  # (T, 1)
    d = (i - i.T)[..., None]  # (T, T, 1)
    rel = torch.zeros_like(d)
    for band in method.bands:
        rel_in_band = band.q_pos(i)[:, None] - band.k_pos(i)[None]  # (T, T, 1 or D/2)
        rel = torch.where(band.contains(d), rel_in_band, rel)
    if method.key_dims is not None:
        is_key = method.key_dims.cpu()[:, None, None]  # (heads, 1, 1, D/2)
        rel = torch.where(is_key, rel, d.clamp(min=0))  # (heads, T, T, D/2)
    if rel.shape[-1] == 1:
        rel = rel.squeeze(-1)
    return rel


def attend_dense(q: Tensor, k: Tensor, v: Tensor, method: Method, frequencies: Tensor) -> Tensor:
    """Reference attention: each score from its own relative position, then one softmax over all.

    q (B, heads, T, D), k and v (B, kv_heads, S, D), all before rotation. The queries are the last
    T of the S tokens. frequencies (D/2,) are the model's own. Scores and softmax are computed in
    float32, or in float64 for float64 inputs, and the rotation in float32. Takes O(T * S) memory.
    Returns (B, heads, T, D) in the dtype of q.
    """
    B, n_heads, T, D = q.shape
    S = k.shape[2]
    n_rep = n_heads // k.shape[1]  # query heads that share one KV head
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.to(dtype).repeat_interleave(n_rep, dim=1)  # (B, heads, S, D)
    v = v.to(dtype).repeat_interleave(n_rep, dim=1)
    if method.frequencies is not None:
        frequencies = method.frequencies

    i = torch.arange(S - T, S)[:, None]  # indices of the queries (T, 1)
    j = torch.arange(S)[:, None]  # indices of the keys (S, 1)
    d = i - j.T  # (T, S)

    def rotate_dense(x, position, indices):
        positions = position(indices)
        if method.key_dims is not None:
            is_key = method.key_dims.cpu()[:, None]  # (heads, 1, D/2)
            positions = torch.where(is_key, positions, indices)  # (heads, T or S, D/2)
        return rotate(x, freqs_cis(positions, frequencies).to(x.device))

    scores = torch.full((B, n_heads, T, S), -torch.inf, dtype=dtype, device=q.device)
    for band in method.bands:
        in_band = band.contains(d)  # (T, S)
        q_rotated = rotate_dense(q.to(dtype), band.q_pos, i)
        k_rotated = rotate_dense(k, band.k_pos, j)
        band_scores = q_rotated @ k_rotated.mT * (method.logit_scale / math.sqrt(D))
        scores = torch.where(in_band.to(q.device), band_scores, scores)
    return (scores.softmax(dim=-1) @ v).to(q.dtype)


# -------------------------------------------------------------------------------------------------
# The papers' procedures, which find the settings for a model. extras/calibrate.py runs them.


def dpe_scales(effective_lengths: list[int], length: int) -> list[int]:
    """DPE's scales for an input of l = length tokens: s = max(1, ceil(l / effective length))."""
    scales = []
    for effective_length in effective_lengths:
        scales.append(max(1, math.ceil(length / effective_length)))
    return scales


def not_worse(scores: Tensor, best: Tensor) -> bool:
    """True unless scores (n,) are significantly lower than best (n,), paired over n.

    The mean of the paired differences must be at most two standard errors, or at most 0.01 nats,
    which is negligible.
    """
    difference = best - scores
    standard_error = difference.std() / math.sqrt(len(difference))
    return bool(difference.mean() <= max(2 * standard_error, 0.01))


def detect_scales(score: Callable[[list[int]], Tensor], n_groups: int, candidates: list[int],
                  background: int) -> tuple[list[int], list[list[Tensor]]]:
    """DPE, step (a): try each scale for each group of frequencies, other groups at background.

    score(scales) takes one scale per group, fastest group first, and returns the log-likelihoods
    (n,) of the answers to the same n questions. candidates are the scales to try, in increasing
    order.

    The paper takes the scale with the best score. Here each group gets the smallest scale such
    that neither it nor any candidate between it and the best one is significantly worse than the
    best. Returns the scale of each group, and the scores as table[group][candidate].
    """
    table = []
    for group in range(n_groups):
        row = []
        for scale in candidates:
            scales = [background] * n_groups
            scales[group] = scale
            row.append(score(scales))
        table.append(row)

    chosen = []
    for row in table:
        means = [scores.mean() for scores in row]
        best = means.index(max(means))
        choice = best
        while choice > 0 and not_worse(row[choice - 1], row[best]):
            choice -= 1
        chosen.append(candidates[choice])
    return chosen, table


def contribution(q: Tensor, k: Tensor) -> Tensor:
    """DPE, step (b): each frequency's contribution, the mean over tokens of |q_t[f]| * |k_t[f]|.

    q (T, heads, D) and k (T, kv_heads, D) of one layer, before rotation. The norms are those of
    the pairs of coordinates that rotate together, and each query head is paired with the KV head
    that it reads. Returns float32 (heads, D/2), on the CPU.
    """
    n_rep = q.shape[1] // k.shape[1]
    q_norms = q.float().unflatten(-1, (-1, 2)).norm(dim=-1)  # (8192, 32, 128) -> (8192, 32, 64)
    k_norms = k.float().unflatten(-1, (-1, 2)).norm(dim=-1)  # (8192, 8, 128) -> (8192, 8, 64)
    k_norms = k_norms.repeat_interleave(n_rep, dim=1)  # (8192, 32, 64)
    return (q_norms * k_norms).mean(dim=0).cpu()


def key_dimensions(contributions: Tensor, topk: int) -> Tensor:
    """DPE, step (b): mark the topk frequencies with the largest contributions in each head.

    contributions (heads, D/2). Ties go to the faster frequency. Returns bool (heads, D/2).
    """
    order = contributions.argsort(dim=-1, descending=True, stable=True)
    is_key = torch.zeros_like(contributions, dtype=torch.bool)
    return is_key.scatter(1, order[:, :topk], True)


def fit_mapping_length(lengths: list[int], mapping_lens: list[float],
                       errors: list[float] | None = None) -> tuple[float, float, float]:
    """LaMPE's fit: the sigmoid L / (1 + exp(-(a l + b))) through the best mapping lengths.

    lengths are input lengths l, and mapping_lens the best mapping length of each. The fit
    minimizes the sum of squared residuals, each residual divided by its standard error if errors
    are given. Returns (a, b, L).
    Raises ValueError if there are fewer than 3 different lengths, or if the mapping lengths do not
    grow with them.
    """
    l = torch.tensor(lengths, dtype=torch.float64)
    best = torch.tensor(mapping_lens, dtype=torch.float64)
    sigma = torch.ones_like(best)
    if errors is not None:
        sigma = torch.tensor(errors, dtype=torch.float64)
    covariance = ((l - l.mean()) * best).sum()  # positive if mapping lengths grow
    if len(set(lengths)) < 3 or covariance <= 0:
        points = list(zip(lengths, mapping_lens, strict=True))
        raise ValueError(f"a sigmoid needs 3 lengths or more, and mapping lengths that grow with "
                         f"them, not {points}")

    # The three parameters are fitted in units of the longest length and the largest mapping
    # length, starting from a sigmoid that rises over these lengths.
    longest = l.max()
    largest = best.max()
    slope = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)  # a * longest
    offset = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)  # b
    log_limit = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)  # log(L / largest)
    optimizer = torch.optim.LBFGS([slope, offset, log_limit], max_iter=2000, tolerance_grad=0,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def squared_error():
        optimizer.zero_grad()
        curve = log_limit.exp() * torch.sigmoid(slope * l / longest + offset)
        residuals = (curve - best / largest) * (sigma.min() / sigma)
        loss = residuals.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(squared_error)
    a = slope / longest
    L = log_limit.exp() * largest
    return a.item(), offset.item(), L.item()


# -------------------------------------------------------------------------------------------------
# Published settings
#
# DPE: https://github.com/LuLuLuyi/DPE at commit 46b85de; for Llama 3, from the README and the file
# names of its predictions, and for the other models from its configuration file.
# LaMPE: https://github.com/scar-on/LaMPE at commit 4e3c91f.


class ModelShape(NamedTuple):
    """What identifies a published model. A base model has the shape of its Instruct version."""
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    train_len: int


class PublishedSettings(NamedTuple):
    shape: ModelShape
    dpe: dict | None  # window, effective_lengths (fastest group first), topk
    lampe: dict | None  # arguments of mapping_length, and s1 and s2


def published_dpe(scales_at_128k: list[int]) -> dict:
    """The effective lengths behind the released scales, which are those for 131,072 tokens."""
    effective_lengths = [131072 // scale for scale in scales_at_128k]
    return dict(window=1024, effective_lengths=effective_lengths, topk=48)


PUBLISHED = {
    "Llama-2-7B-Chat": PublishedSettings(
        shape=ModelShape(4096, 32, 32, 32, vocab_size=32000, train_len=4096),
        dpe=None,
        lampe=dict(a=8.673006440952035e-05, b=-0.648012322406978, L=2489.1055552214357,
                   short=1536, s1=512, s2=200)),
    "Llama-3-8B-Instruct": PublishedSettings(
        shape=ModelShape(4096, 32, 32, 8, vocab_size=128256, train_len=8192),
        dpe=published_dpe([4, 4, 2, 16, 32, 32, 16, 128]),
        lampe=dict(a=0.00010493097327094324, b=-2.466638011138158, L=6204.409324666837,
                   short=1536, s1=512, s2=200)),
    "Llama-3.1-8B-Instruct": PublishedSettings(
        shape=ModelShape(4096, 32, 32, 8, vocab_size=128256, train_len=131072),
        dpe=published_dpe([2, 32, 32, 2, 2, 2, 2, 1]),
        lampe=dict(a=4.505261149632588e-05, b=-2.788576860718702, L=82358.52413056031,
                   s1=512, s2=200)),
    "Mistral-7B-Instruct-v0.2": PublishedSettings(
        shape=ModelShape(4096, 32, 32, 8, vocab_size=32000, train_len=32768),
        dpe=published_dpe([4, 16, 2, 16, 32, 16, 16, 2]),
        lampe=None),
    "Qwen2.5-7B-Instruct": PublishedSettings(
        shape=ModelShape(3584, 28, 28, 4, vocab_size=152064, train_len=32768),
        dpe=published_dpe([2, 16, 8, 8, 32, 8, 2, 4]),
        lampe=None),
}


# =================================================================================================
# STOP. If you are here for the methods only, you can stop reading here.
#
# What follows computes the same result as attend_dense, at about the cost of plain causal
# attention. It consists of rotation with cached tables of angles, attention in one band with fused
# kernels, and the merging of bands. Only two masks are needed, "none" and "square causal", and
# every fused kernel of PyTorch supports both.


def attend(q: Tensor, k: Tensor, v: Tensor, method: Method, frequencies: Tensor) -> Tensor:
    """Equal to attend_dense up to rounding, at about the cost of plain causal attention.

    Takes and returns what attend_dense does. The bands are merged in place, so gradients are
    available only if the method has one band and T = S.
    Raises ValueError if the method's frequencies or key dimensions do not fit the heads.
    """
    _, n_heads, T, D = q.shape
    if method.frequencies is not None:
        frequencies = method.frequencies
    if len(frequencies) != D // 2:
        raise ValueError(f"the method has {len(frequencies)} frequencies, which do not fit heads "
                         f"of {D // 2} frequencies")
    key_dims = method.key_dims
    if key_dims is not None:
        if key_dims.shape != (n_heads, D // 2):
            raise ValueError(f"the method's key dimensions have shape {tuple(key_dims.shape)}, "
                             f"which do not fit {n_heads} heads of {D // 2} frequencies")
        key_dims = key_dims.to(q.device)
    settings = dict(softmax_scale=method.logit_scale / math.sqrt(D),
                    frequencies=tuple(frequencies.tolist()), key_dims=key_dims)

    # The first band has near = 0, so every query has at least one key in it: itself.
    S = k.shape[2]
    first_query = S - T
    out, lse = attend_band(q, k, v, method.bands[0], first_query, **settings)
    for band in method.bands[1:]:
        # A query before index `near` has no key this far away.
        first = max(first_query, band.near)
        if first >= S:
            break
        row = first - first_query
        part = attend_band(q[:, :, row:], k, v, band, first, **settings)
        merge(out[:, :, row:], lse[:, :, row:], *part)
    return out


def attend_band(q: Tensor, k: Tensor, v: Tensor, band: Band, first: int, softmax_scale: float,
                frequencies: tuple[float, ...], key_dims: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attend to the keys of one band.

    q (B, heads, n, D) holds the queries at indices first, first + 1, ..., S - 1. Returns out
    (B, heads, n, D) and the log-sum-exp of each query's logits, lse (B, heads, n) in float32.

    Shifting the keys by `near` makes the band a sliding window: the query in row r sees the last
    far - near keys up to its own column.
    """
    S = k.shape[2]
    far = S if band.far is None else band.far
    width = far - band.near
    low = max(first - far + 1, 0)  # the farthest key of the first query
    high = S - band.near  # one more than the nearest key of the last query
    k = k[:, :, low:high]
    v = v[:, :, low:high]
    q_rotated = rotate_to(q, band.q_pos, first, frequencies)  # (1, 32, 8192, 128)
    k_rotated = rotate_to(k, band.k_pos, low, frequencies)  # (1, 8, 8192, 128)
    keeps_positions = band.q_pos is identity and band.k_pos is identity
    if key_dims is None or keeps_positions:
        return band_attention(q_rotated, k_rotated, v, width, softmax_scale)

    # Dimensions that are not key keep RoPE's positions.
    is_key = key_dims.repeat_interleave(2, dim=1)[:, None]  # (32, 64) -> (32, 1, 128)
    q_plain = rotate_to(q, identity, first, frequencies)
    k_plain = rotate_to(k, identity, low, frequencies)
    queries = torch.where(is_key, q_rotated, q_plain)  # (1, 32, 8192, 128)

    # Heads that share a KV head may have different key dimensions, and so need different keys.
    # Process one query head per KV head at a time.
    n_rep = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    for n in range(n_rep):
        heads = slice(n, None, n_rep)  # 8 of the 32
        keys = torch.where(is_key[heads], k_rotated, k_plain)  # (1, 8, 8192, 128)
        out[:, heads], lse[:, heads] = band_attention(queries[:, heads], keys, v, width,
                                                      softmax_scale)
    return out, lse


# -------------------------------------------------------------------------------------------------
# Rotation


# One table per position function and length. All layers must share the functions of one Method:
# new functions in every layer would never be found in the cache.
@lru_cache(maxsize=8)
def cis_table(position: Callable[[Tensor], Tensor], frequencies: tuple[float, ...], length: int,
              device: torch.device) -> Tensor:
    """freqs_cis of the positions of indices 0, 1, ..., length - 1: complex64 (length, D/2)."""
    positions = position(torch.arange(length)[:, None])
    if positions.shape[-1] not in (1, len(frequencies)):
        raise ValueError(f"the method has positions for {positions.shape[-1]} frequencies, which "
                         f"do not fit heads of {len(frequencies)} frequencies")
    # Angles are float64, which CUDA devices support and some others do not.
    angle_device = device if device.type == "cuda" else torch.device("cpu")
    with torch.inference_mode(False):  # so that a cached table also serves training
        radians = torch.tensor(frequencies, dtype=torch.float64, device=angle_device)
        return freqs_cis(positions.to(angle_device), radians).to(device)


def rows_per_slice(device: torch.device) -> int:
    """The number of tokens to process at a time.

    On a CPU it is small, so that a slice fits the cache. On a GPU it is larger, so that fewer
    kernels are launched: in Llama 3 8B, 8,192 tokens take 134 MB in float32.
    """
    if device.type == "cpu":
        return 2048
    return 8192


def rotate_to(x: Tensor, position: Callable[[Tensor], Tensor], first: int,
              frequencies: tuple[float, ...]) -> Tensor:
    """Rotate x (B, heads, T, D), the tokens at indices first, first + 1, ..., to position(index).

    Returns the shape and dtype of x.
    """
    T = x.shape[2]
    end = first + T
    table_length = 1024 * (end // 1024 + 1)  # has room for the next tokens too
    cis = cis_table(position, frequencies, table_length, x.device)[first:end]
    if x.dtype == torch.float32:
        return rotate(x, cis)  # makes no temporary copies, so it needs no slices

    # Half precision needs a float32 copy. Slices keep it small.
    size = rows_per_slice(x.device)
    out = torch.empty_like(x)
    for start in range(0, T, size):
        tokens = slice(start, start + size)
        rotated = rotate(x[:, :, tokens].float(), cis[tokens])  # float32
        out[:, :, tokens] = rotated  # rounds to the dtype of x
    return out


# -------------------------------------------------------------------------------------------------
# Attention within one band, with the masks "none" and "square causal" only


def band_attention(q: Tensor, k: Tensor, v: Tensor, width: int,
                   softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention in which each query sees the last `width` keys up to its own.

    q (B, heads, n, D) and k are rotated; k and v (B, kv_heads, c + n, D) with c < width. Row r
    sees columns c + r - width + 1 to c + r. Returns out (B, heads, n, D) and lse (B, heads, n).

    Rows and columns are cut into chunks of `width`, so that a row sees columns of its own chunk
    and of the chunk before it. With width 3, c = 1 and n = 7:

        columns    0 | 1 2 | 3 4 5 | 6 7
        row 0      x | x . | . . . | . .     Phase 1: the first width - c rows.
        row 1      x | x x | . . . | . .     They see all c older columns.
        row 2      . | x x | x . . | . .     Phase 2: whole chunks of width rows.
        row 3      . | . x | x x . | . .     They see their own chunk up to the diagonal,
        row 4      . | . . | x x x | . .     and the chunk before it above the diagonal.
        row 5      . | . . | . x x | x .     Phase 3: the rows that remain.
        row 6      . | . . | . . x | x x
    """
    B, _, n, _ = q.shape
    c = k.shape[2] - n
    if n == 1:  # one new token, which sees all c + 1 <= width keys
        return fused_attention(q, k, v, softmax_scale)

    # Phase 1: the first rows see their own columns causally, and all older columns.
    n_first = min(width - c, n)
    own = slice(c, c + n_first)
    part = fused_attention(q[:, :, :n_first], k[:, :, own], v[:, :, own], softmax_scale,
                           is_causal=True)
    if c > 0:
        older = fused_attention(q[:, :, :n_first], k[:, :, :c], v[:, :, :c], softmax_scale)
        merge(*part, *older)
    if n_first == n:
        return part
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    out[:, :, :n_first], lse[:, :, :n_first] = part

    # Phase 2: whole chunks. They have the same shape, so they are folded into the batch, in
    # groups of about 8,192 rows to bound the memory of the intermediate results.
    n_chunks = (n - n_first) // width
    chunks_per_group = max(8192 // (B * width), 1)
    for start in range(0, n_chunks, chunks_per_group):
        chunks = min(chunks_per_group, n_chunks - start)
        row = n_first + start * width
        rows = slice(row, row + chunks * width)
        own = slice(c + rows.start, c + rows.stop)
        previous = slice(own.start - width, own.stop - width)

        q_chunks = fold(q[:, :, rows], chunks)  # (1, 32, 8192, 128) -> (8, 32, 1024, 128)
        part = fused_attention(q_chunks, fold(k[:, :, own], chunks), fold(v[:, :, own], chunks),
                               softmax_scale, is_causal=True)
        merge_upper_triangle(*part, q_chunks, fold(k[:, :, previous], chunks),
                             fold(v[:, :, previous], chunks), softmax_scale)
        unfold_into(out[:, :, rows], part[0], chunks)  # (8, 32, 1024, 128) -> (1, 32, 8192, 128)
        unfold_into(lse[:, :, rows], part[1], chunks)

    # Phase 3: the rest, fewer rows than a chunk. Of the previous chunk, they see a triangle in
    # its first `rest` columns, and all of its other columns.
    row = n_first + n_chunks * width
    rest = n - row
    if rest > 0:
        q_rest = q[:, :, row:]
        k_own, v_own = k[:, :, c + row:], v[:, :, c + row:]
        k_previous = k[:, :, c + row - width:c + row]
        v_previous = v[:, :, c + row - width:c + row]
        part = fused_attention(q_rest, k_own, v_own, softmax_scale, is_causal=True)
        rectangle = fused_attention(q_rest, k_previous[:, :, rest:], v_previous[:, :, rest:],
                                    softmax_scale)
        merge(*part, *rectangle)
        merge_upper_triangle(*part, q_rest, k_previous[:, :, :rest], v_previous[:, :, :rest],
                             softmax_scale)
        out[:, :, row:], lse[:, :, row:] = part
    return out, lse


def fold(x: Tensor, chunks: int) -> Tensor:
    """Fold chunks into the batch: (B, heads, chunks * size, D) -> (B * chunks, heads, size, D)."""
    return x.unflatten(2, (chunks, -1)).transpose(1, 2).flatten(0, 1)


def unfold_into(out: Tensor, folded: Tensor, chunks: int) -> None:
    """Undo fold: write (B * chunks, heads, size, ...) into out (B, heads, chunks * size, ...)."""
    unfolded = folded.unflatten(0, (-1, chunks)).transpose(1, 2)  # (B, heads, chunks, size, ...)
    out.unflatten(2, (chunks, -1)).copy_(unfolded)


def merge_upper_triangle(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
                         softmax_scale: float) -> None:
    """Attend from row r to columns r + 1, ..., n - 1, and merge the result into (out, lse).

    The last row sees no column, and no row sees the first column. Without these two, and with the
    order of rows and of columns reversed, the mask is square causal:

        . x x x                                             (row 2)   x . .
        . . x x     drop row 3 and column 0,                (row 1)   x x .
        . . . x     then reverse both orders      ->        (row 0)   x x x
        . . . .                                      columns (3, 2, 1)
    """
    n = q.shape[2]
    if n == 1:
        return
    q_reversed = q[:, :, :n - 1].flip(2)
    k_reversed = k[:, :, 1:].flip(2)
    v_reversed = v[:, :, 1:].flip(2)
    triangle, triangle_lse = fused_attention(q_reversed, k_reversed, v_reversed, softmax_scale,
                                             is_causal=True)
    merge(out[:, :, :n - 1], lse[:, :, :n - 1], triangle.flip(2), triangle_lse.flip(2))


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Merge attention over other keys into (out, lse), in place.

    out and other (B, heads, n, D), lse and other_lse (B, heads, n). With a and b the
    log-sum-exps,

        lse = log(e^a + e^b)        out = out_a + sigmoid(b - a) * (out_b - out_a)

    The weights are float32. Rounded to bfloat16, a log-sum-exp of 20 would be off by up to 0.06,
    and every weight by up to 6%.
    """
    weights = torch.sigmoid(other_lse - lse)[..., None]  # of other: (1, 32, 8192, 1)
    size = rows_per_slice(out.device)
    for start in range(0, out.shape[2], size):  # slices, so that temporary results stay small
        rows = slice(start, start + size)
        if out.dtype == weights.dtype:
            out[:, :, rows].lerp_(other[:, :, rows], weights[:, :, rows])
        else:
            mixed = torch.lerp(out[:, :, rows].float(), other[:, :, rows].float(),
                               weights[:, :, rows])
            out[:, :, rows] = mixed
    torch.logaddexp(lse, other_lse, out=lse)


# -------------------------------------------------------------------------------------------------
# Fused kernels


def choose_kernel(device_type: str, capability: tuple[int, int], flash_available: bool,
                  dtype: torch.dtype, head_dim: int) -> str:
    """The kernel for a device: cpu, flash or efficient; blockwise if no fused kernel fits.

    capability is the compute capability of a CUDA device, and flash_available whether PyTorch was
    built with flash attention for CUDA. Other devices ignore both.
    """
    if device_type == "cpu":
        return "cpu"
    if device_type != "cuda" or head_dim % 8 != 0 or dtype == torch.float64:
        return "blockwise"
    ampere = capability >= (8, 0)  # has bfloat16, and runs flash attention
    if ampere and flash_available and head_dim <= 256 and dtype != torch.float32:
        return "flash"
    if ampere or dtype != torch.bfloat16:
        return "efficient"
    return "blockwise"


def fused_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float,
                    is_causal: bool = False) -> tuple[Tensor, Tensor]:
    """softmax(softmax_scale * q k^T) v and the log-sum-exp of each row's logits.

    q (B, heads, T, D) and k are rotated; k and v (B, kv_heads, S, D). Every query sees every key
    or, if is_causal, which requires T = S, only the keys up to its own index. Returns out (B,
    heads, T, D) and lse (B, heads, T) in float32.

    These operators are private to PyTorch and were checked with 2.11 to 2.14. The public function
    scaled_dot_product_attention does not return the log-sum-exp.
    """
    T, D = q.shape[2:]
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (0, 0)
    flash_available = torch.backends.cuda.is_flash_attention_available()
    kernel = choose_kernel(q.device.type, capability, flash_available, q.dtype, D)
    aten = torch.ops.aten
    if kernel == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p=0.0, is_causal=is_causal, scale=softmax_scale)
    if kernel == "flash":
        out, lse, *_ = aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p=0.0, is_causal=is_causal, scale=softmax_scale)
        return out, lse

    # The other two kernels need as many KV heads as query heads.
    n_rep = q.shape[1] // k.shape[1]
    if n_rep > 1:
        k = k.repeat_interleave(n_rep, dim=1)
        v = v.repeat_interleave(n_rep, dim=1)
    if kernel == "efficient":
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q, k, v, attn_bias=None, compute_log_sumexp=True, dropout_p=0.0, is_causal=is_causal,
            scale=softmax_scale)
        return out, lse[:, :, :T]  # lse is padded to a multiple of 32 rows
    return blockwise_attention(q, k, v, softmax_scale, is_causal)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float,
                        is_causal: bool) -> tuple[Tensor, Tensor]:
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
        lse = logits.logsumexp(dim=-1)  # (1, 32, 256)
        weights = (logits - lse[..., None]).exp()
        outs.append((weights @ v).to(q.dtype))
        lses.append(lse)
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


# -------------------------------------------------------------------------------------------------
# python rope_extrap.py prints the papers' matrices, and the published settings


def print_dpe_matrices() -> None:
    """DPE's Figure 1(c): for each scale, the matrix as drawn and as two rotations produce it."""
    w = 3
    i = torch.arange(9)[:, None]
    d = i - i.T
    print("DPE, Figure 1(c), 9 tokens, window 3. Left: as drawn. Right: as two rotations give it,")
    print("with * where it differs from the drawing.")
    for s in (3, 2):
        print(f"\nscale {s}")
        drawn = torch.where(d < w, d, (d - w) // s + w)
        rel = relative_positions(dpe(w, s), 9)
        for row in range(9):
            left = ""
            right = ""
            for column in range(row + 1):
                differs = rel[row, column] != drawn[row, column]
                left += f"{drawn[row, column]:3}"
                right += f"{rel[row, column]:3}"
                if differs:
                    right += "*"
                else:
                    right += " "
            print(f"{left:32}{right.rstrip()}")


def print_lampe_matrix() -> None:
    """LaMPE's matrix of 16 tokens, with the region of each cell."""
    l, mapping_len, s1, s2 = 16, 6, 3, 4
    rel = relative_positions(lampe(l, mapping_len, s1, s2), l)
    print(f"\nLaMPE, {l} tokens, mapping length {mapping_len}, s1 = {s1}, s2 = {s2}: "
          f"head, (middle), [tail]\n")
    for i in range(l):
        line = ""
        for j in range(i + 1):
            if i - j <= s1:
                cell = f"{rel[i, j]} "
            elif i - j < l - s2:
                cell = f"({rel[i, j]})"
            else:
                cell = f"[{rel[i, j]}]"
            line += f"{cell:>5}"
        print(line.rstrip())


def print_published_settings() -> None:
    """DPE's scales, fastest group first, and LaMPE's mapping length for each published model."""
    print("\nPublished settings by input length: DPE's scales, fastest group first, and LaMPE's")
    print("mapping length")
    for name, published in PUBLISHED.items():
        print(f"\n{name}")
        for length in (4096, 8192, 16384, 32768, 65536, 131072, 262144):
            scales = ""
            if published.dpe is not None:
                numbers = dpe_scales(published.dpe["effective_lengths"], length)
                scales = "-".join(str(number) for number in numbers)
            mapped = ""
            if published.lampe is not None:
                mapped = mapping_length_of(published.lampe, length)
            print(f"{length:9,}   {scales:26}{mapped:>6}".rstrip())


if __name__ == "__main__":
    print_dpe_matrices()
    print_lampe_matrix()
    print_published_settings()
