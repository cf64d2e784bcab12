"""Run a Llama past the context it was trained on, without training: DPE and LaMPE, and the methods they build on.

DPE    Dimension-Wise Positional Embeddings Manipulation, arXiv 2504.18857
LaMPE  Length-aware Multi-grained Positional Encoding, arXiv 2508.02308

RoPE turns each query by an angle that grows with its index i, each key by one that grows with its index j, so their score
sees only the relative position i - j. Past the training length it sees relative positions that the model never met. Every
method here gives the far pairs smaller ones, and all of them say it in the same form, a list of distance bands:

    for keys at distance near <= i - j < far, rotate the query as if it stood at q_pos(i), the key as if at k_pos(j).

A method is a few lines that fill in near, far, q_pos and k_pos. Attention then only has to honour the bands, which it
does twice: attend_dense, to be read, and attend, to be run. They agree to rounding.

    i, j    index of query and key         d = i - j   their distance         rel   the relative position RoPE sees
    T       sequence length                D           head dimension         f     one of the D/2 rotary frequencies
    w, s    DPE's window and scales        l           LaMPE's input length   s1, s2   LaMPE's head and tail
"""
import argparse
import math
from functools import lru_cache
from typing import Callable, NamedTuple

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# RoPE: frequencies, rotation


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """RoPE's frequencies theta^(-2f/D), radians per position: (D/2,) float64, the fastest first."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair of neighbouring coordinates (2f, 2f + 1) of x by its own angle: as a complex number, times e^(i angle).

    x (B, heads, T, D), pairs side by side in memory; turns, the e^(i angle), complex64 (T, D/2) or (heads, T, D/2). In float32;
    returns x's shape and dtype.
    """
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, heads, T, D/2)
    return torch.view_as_real(z * turns).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Methods


class Band(NamedTuple):
    """Keys at distance near <= i - j < far, and where their query and they stand when RoPE rotates them."""
    near: int
    far: int | None  # None: no end
    q_pos: Callable[[Tensor], Tensor]  # indices (T, 1) -> positions that broadcast to (heads, T, D/2), on the indices' device
    k_pos: Callable[[Tensor], Tensor]


class Method(NamedTuple):
    """Bands that partition the distances 0, 1, 2, ... in order: each key is attended exactly once."""
    bands: list[Band]
    temperature: float = 1.0  # multiplies every logit
    frequencies: Tensor | None = None  # (D/2,), instead of the model's own
    key_dims: Tensor | None = None  # bool (heads, D/2): where False, that head's frequency keeps plain RoPE's positions


def own_index(i: Tensor) -> Tensor:
    """The position that plain RoPE gives to index i: i itself."""
    return i


def rope() -> Method:
    """Plain RoPE: rel = d."""
    return Method([Band(0, None, own_index, own_index)])


def dpe(window: int, scales, key_dims: Tensor | None = None) -> Method:
    """DPE's step (c), scale the position indices of each dimension by its own integer:

        d <  w    rel = d
        d >= w    rel = i // s_f - j // s_f + w - w // s_f

    window: w, tokens. scales: s_f >= 1 as integers (D/2,), the same in every head, or (heads, D/2), where a frequency that is
    no key dimension of the head has s_f = 1, which is RoPE. Errors: ValueError for a window or a scale below 1.
    """
    s = torch.as_tensor(scales)
    if window < 1 or s.is_floating_point() or (s < 1).any():
        raise ValueError(f"DPE needs a window and integer scales of at least 1, not window {window} and scales from {s.min()} on")
    return Method([Band(0, window, own_index, own_index),
                   Band(window, None, scaled(s, window - window // s), scaled(s, torch.zeros_like(s)))], key_dims=key_dims)


def dpe_scales(effective: list[int], length: int) -> list[int]:
    """The scale of each group of frequencies for an input of `length` tokens: s = max(1, ceil(length / effective))."""
    return [max(1, -(-length // tokens)) for tokens in effective]


def per_frequency(groups: list, n_frequencies: int) -> list:
    """One value per group -> one per frequency, split evenly. Errors: ValueError for more groups than frequencies, or none."""
    if not 1 <= len(groups) <= n_frequencies:
        raise ValueError(f"{len(groups)} groups do not fit a head of {n_frequencies} frequencies")
    return [groups[f * len(groups) // n_frequencies] for f in range(n_frequencies)]


def self_extend(window: int, group: int) -> Method:
    """SelfExtend (Jin et al. 2024), DPE with one scale for every dimension: rel = i // s - j // s + w - w // s from w on."""
    return dpe(window, group)


def rerope(window: int) -> Method:
    """ReRoPE (Su 2023), the limit of infinite scales: rel = min(d, w)."""
    if window < 1:
        raise ValueError(f"ReRoPE needs a window of at least 1, not {window}")
    return Method([Band(0, window, own_index, own_index),
                   Band(window, None, lambda i: torch.full_like(i, window), torch.zeros_like)])


def ntk(frequencies: Tensor, factor: float) -> Method:
    """NTK-aware scaling (bloc97 2023) of a model's frequencies (D/2,): theta' = theta * s^(D/(D-2)), positions as they are."""
    D = 2 * len(frequencies)
    return rope()._replace(frequencies=frequencies * factor ** (-torch.arange(0, D, 2, dtype=torch.float64) / (D - 2)))


def yarn(frequencies: Tensor, factor: float, train_len: int, beta_fast: float = 32.0, beta_slow: float = 1.0) -> Method:
    """YaRN (Peng et al. 2023): frequencies that turn often within train_len are kept, slow ones divided by s, a blend between.

    frequencies (D/2,) are the model's own. Every logit is multiplied by (0.1 ln s + 1)^2.
    """
    turns = train_len * frequencies / (2 * math.pi)
    keep = ((turns - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)
    blend = keep * frequencies + (1 - keep) * frequencies / factor
    return rope()._replace(frequencies=blend, temperature=(0.1 * math.log(factor) + 1) ** 2)


LAMPE_TEMPERATURE = (0.1 * math.log(2) + 1) ** 2  # the released code's constant factor on every logit, 1.1434


def lampe_ramp(length: int, a: float, b: float, L: float) -> int:
    """LaMPE's mapping length, the scaled sigmoid L / (1 + exp(-(a l + b))) of the input's length l, truncated: tokens."""
    return int(L / (1 + math.exp(-(a * length + b))))


def fitted_ramp(fit: dict, length: int) -> int:
    """lampe_ramp by a fit's a, b and L, or, below 8,192 tokens, its `short` where it has one: a ramp that was set by hand."""
    return fit["short"] if "short" in fit and length < 8192 else lampe_ramp(length, fit["a"], fit["b"], fit["L"])


def lampe(length: int, ramp: int, head: int, tail: int, temperature: float = LAMPE_TEMPERATURE) -> Method:
    """LaMPE's three regions for an input of l = length tokens, with s1 = head, s2 = tail and p(x) = x * ramp // l:

        head      d <= s1               rel = d
        middle    s1 < d < l - s2       rel = p(i) - p(j) + s1 - p(s1)
        tail      d >= l - s2           rel = d - (l - m),  m = s1 + s2 + (l - s1 - s2) * ramp // l

    ramp: the mapping length, lampe_ramp(length, ..). temperature multiplies every logit. Where there is nothing to compress
    (ramp >= l, l < 2 s1, or s1 + s2 >= l) rel = d, under the same temperature. The length is the prompt's and stays fixed
    while decoding. Errors: ValueError for length or ramp below 1, head or tail below 0.
    """
    l, s1, s2 = length, head, tail
    if l < 1 or ramp < 1 or s1 < 0 or s2 < 0:
        raise ValueError(f"LaMPE needs length and ramp of at least 1, head and tail of at least 0, "
                         f"not length {l}, ramp {ramp}, head {s1}, tail {s2}")
    if ramp >= l or l < 2 * s1 or s1 + s2 >= l:
        return rope()._replace(temperature=temperature)
    m = s1 + s2 + (l - s1 - s2) * ramp // l

    def p(x):
        return x * ramp // l

    bands = [Band(0, s1 + 1, own_index, own_index),
             Band(s1 + 1, l - s2, lambda i: p(i) + s1 - p(s1), p),
             Band(l - s2, None, lambda i: i - (l - m), own_index)]
    return Method([band for band in bands if band.near != band.far], temperature)  # s1 + s2 = l - 1 has no middle


def relative_positions(method: Method, length: int) -> Tensor:
    """The matrix a paper draws: rel of every query (row) and key (column), 0 above the diagonal, where no key is seen.

    Returns int64, (T, T), or (T, T, D/2) or (heads, T, T, D/2) where the method tells dimensions or heads apart.
    """
    method = by_heads(method)
    i = torch.arange(length)[:, None]
    d = (i - i.T)[..., None]  # (T, T, 1)
    rel = torch.zeros_like(d)
    for near, far, q_pos, k_pos in method.bands:
        inside = (d >= near) & (d < (far or length))
        rel = torch.where(inside, q_pos(i).unsqueeze(-2) - k_pos(i).unsqueeze(-3), rel)  # (..., T, T, 1 or D/2)
    return rel[..., 0] if rel.shape[-1] == 1 else rel


# ---------------------------------------------------------------------------------------------------------------------
# Positions that differ between frequencies, and between heads


class Scaled(NamedTuple):
    """DPE's position i // s_f + o_f. Equal ones share their table of angles, whatever layer they are for."""
    scale: tuple[int, ...]
    offset: tuple[int, ...]

    def __call__(self, i: Tensor) -> Tensor:  # (T, 1) -> (T, D/2)
        return i // torch.tensor(self.scale, device=i.device) + torch.tensor(self.offset, device=i.device)


class PerHead:
    """Positions that differ between heads: in every head and frequency they are one of a few functions' of the index.

    choices: [(position: indices (T, 1) -> (T, D/2), where: bool (heads, D/2)), ..]; each place is true in one of them.
    """

    def __init__(self, choices):
        self.choices = choices

    def __call__(self, i: Tensor) -> Tensor:  # (heads, T, D/2)
        return sum(position(i) * where[:, None].to(i.device) for position, where in self.choices)


def by_heads(method: Method) -> Method:
    """A method with key dimensions as positions that differ between heads."""
    if method.key_dims is None:
        return method
    mask = method.key_dims

    def apart(position):
        return position if position is own_index else PerHead([(position, mask), (own_index, ~mask)])
    bands = [Band(near, far, apart(q_pos), apart(k_pos)) for near, far, q_pos, k_pos in method.bands]
    return method._replace(bands=bands, key_dims=None)


def choices_of(position: Callable[[Tensor], Tensor]) -> list:
    """A PerHead's choices; another position is the only one, everywhere: where is None."""
    return position.choices if isinstance(position, PerHead) else [(position, None)]


def scaled(scale: Tensor, offset: Tensor) -> Callable[[Tensor], Tensor]:
    """The position i // scale + offset, for scales and offsets (D/2,), or (heads, D/2), of which equal scales have equal offsets."""
    def one(s, o):  # (D/2,) each
        return own_index if s.max() == 1 and not o.any() else Scaled(tuple(s.tolist()), tuple(o.tolist()))

    if scale.ndim < 2 or len(scale) == 1:
        return one(scale.flatten(), offset.flatten())
    choices, left = [], torch.ones_like(scale, dtype=torch.bool)
    while left.any():  # what occurs in each frequency, the largest first: the scale of key dimensions, then 1
        s = torch.where(left, scale, 1).amax(dim=0)  # (D/2,)
        where = left & (scale == s)
        choices.append((one(s, torch.where(where, offset, 0).amax(dim=0)), where))
        left &= ~where
    return PerHead(choices)


@lru_cache(maxsize=256)
def tells_heads_apart(position: Callable[[Tensor], Tensor], heads: int, D: int) -> bool:
    """Whether position differs between heads. Errors: ValueError for positions that are not (T, 1), (T, D/2) or (heads, T, D/2)."""
    shape = position(torch.zeros(1, 1, dtype=torch.int64)).shape
    if shape[-1] not in (1, D // 2) or shape[:-2] not in ((), (1,), (heads,)):
        raise ValueError(f"a method with positions (.., T, frequencies) of shape {tuple(shape)} does not fit {heads} heads of "
                         f"{D // 2} frequencies")
    return len(shape) == 3 and shape[0] > 1


@lru_cache(maxsize=256)  # the same function each time, so that its table is found again
def of_heads(position: Callable[[Tensor], Tensor], g: int, group: int) -> Callable[[Tensor], Tensor]:
    """The positions, which tell heads apart, of heads g, g + group, g + 2 group, .. alone: one of each group that shares a key."""
    if isinstance(position, PerHead):
        return PerHead([(choice, where[g::group]) for choice, where in position.choices])
    return lambda i: position(i)[g::group]


# ---------------------------------------------------------------------------------------------------------------------
# Finding a model's settings


def detect_scales(score: Callable[[list[int]], float], n_groups: int, candidates: list[int], background: int):
    """DPE's step (a): the scale at which each group of frequencies works best while all the others stand at `background`.

    score(scales), one scale per group, fastest first: larger is better; anything that compares will do. Of equals the smaller
    scale is taken, the longer effective length. Returns the best scale of each group and the scores, [group][candidate].
    """
    @lru_cache(maxsize=None)  # every group meets `background` among its candidates: that setting is scored once
    def scored(*scales):
        return score(list(scales))

    others = [background] * (n_groups - 1)
    table = [[scored(*others[:g], s, *others[g:]) for s in candidates] for g in range(n_groups)]
    return [-max(zip(row, (-s for s in candidates)))[1] for row in table], table


def contribution(q: Tensor, k: Tensor) -> Tensor:
    """DPE's step (b) for one layer: the mean of |q_f| |k_f| over the tokens, (heads, D/2), k of the head that q's head reads.

    q (tokens, heads, D), k (tokens, kv_heads, D), before rotation.
    """
    def norms(x):  # of the pairs that rotate together
        return x.float().unflatten(-1, (-1, 2)).norm(dim=-1)  # (tokens, heads or kv_heads, D/2)

    k_norms = norms(k).repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (tokens, heads, D/2)
    return (norms(q) * k_norms).mean(dim=0)  # (heads, D/2)


def key_dimensions(contribution: Tensor, count: int) -> Tensor:
    """The `count` frequencies of each head that contribute most: bool (heads, D/2); of equals the faster is taken."""
    largest = contribution.argsort(dim=-1, descending=True, stable=True)[:, :max(count, 0)]
    return torch.zeros_like(contribution, dtype=torch.bool).scatter_(1, largest, True)


def fit_ramp(lengths: list[float], ramps: list[float]) -> tuple[float, float, float]:
    """LaMPE's fit: (a, b, L) of the sigmoid L / (1 + exp(-(a l + b))) nearest to the points (l, best ramp), by least squares.

    Errors: ValueError for fewer than three lengths, or ramps that do not grow with them.
    """
    points = sorted(zip(lengths, ramps))
    if len(set(lengths)) < 3:
        raise ValueError(f"a ramp's sigmoid has three parameters, and {len(set(lengths))} lengths cannot tell them: give 3 or more")
    x, y = torch.tensor(points, dtype=torch.float64).T
    if ((x - x.mean()) * y).sum() <= 0:  # the slope of the line through them
        raise ValueError(f"the best ramps do not grow with the length, so no sigmoid fits them: {points}")
    unit = x.max(), y.max()
    x, y = x / unit[0], y / unit[1]

    def error(p):
        return ((p[2] * torch.sigmoid(p[0] * x + p[1]) - y) ** 2).sum()

    starts = []  # for a given L the sigmoid is a line, a l + b = log(y / (L - y))
    for L in 1 + torch.logspace(-3, 1, 60, dtype=torch.float64):
        line = torch.linalg.lstsq(torch.stack((x, torch.ones_like(x)), 1), torch.log(y / (L - y))[:, None]).solution[:, 0]
        starts.append(torch.cat((line, L[None])))
    p = min(starts, key=error).requires_grad_()
    optimizer = torch.optim.LBFGS([p], max_iter=1000, tolerance_grad=1e-15, tolerance_change=1e-18, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = error(p)
        loss.backward()
        return loss

    optimizer.step(closure)
    return (p[0] / unit[0]).item(), p[1].item(), (p[2] * unit[1]).item()


# What the authors released, for models told by their (dim, n_layers, n_heads, n_kv_heads, vocab_size, train_len). DPE: the scales of
# 8 groups, fastest first, from the repository's README and the names of its shipped predictions for Llama 3, else from its config
# file; key_dims as in those names. LaMPE: a, b and L of the fit, and `short`, the ramp that is set below 8,192 tokens.
PUBLISHED = {
    "Llama-2-7B-Chat": dict(
        model=(4096, 32, 32, 32, 32000, 4096),
        lampe=dict(a=8.673006440952035e-05, b=-0.648012322406978, L=2489.1055552214357, head=512, tail=200, short=1536)),
    "Llama-3-8B-Instruct": dict(
        model=(4096, 32, 32, 8, 128256, 8192),
        dpe=dict(window=1024, effective=[131072 // s for s in (4, 4, 2, 16, 32, 32, 16, 128)], key_dims=48),
        lampe=dict(a=0.00010493097327094324, b=-2.466638011138158, L=6204.409324666837, head=512, tail=200, short=1536)),
    "Llama-3.1-8B-Instruct": dict(
        model=(4096, 32, 32, 8, 128256, 131072),
        dpe=dict(window=1024, effective=[131072 // s for s in (2, 32, 32, 2, 2, 2, 2, 1)], key_dims=48),
        lampe=dict(a=4.505261149632588e-05, b=-2.788576860718702, L=82358.52413056031, head=512, tail=200)),
    "Mistral-7B-Instruct-v0.2": dict(
        model=(4096, 32, 32, 8, 32000, 32768), dpe=dict(window=1024, effective=[131072 // s for s in (4, 16, 2, 16, 32, 16, 16, 2)], key_dims=48)),
    "Qwen2.5-7B-Instruct": dict(
        model=(3584, 28, 28, 4, 152064, 32768), dpe=dict(window=1024, effective=[131072 // s for s in (2, 16, 8, 8, 32, 8, 2, 4)], key_dims=48)),
}

# ---------------------------------------------------------------------------------------------------------------------
# Rotation to positions


def rotate_to(position: Callable[[Tensor], Tensor], x: Tensor, first: int, frequencies: Tensor) -> Tensor:
    """Rotate x (B, heads, T, D), the tokens of indices first, first + 1, .., as if each stood at position(index)."""
    T, out = x.shape[2], torch.empty_like(x)
    choices = choices_of(position)
    tables = [turns_of(choice, first, T, frequencies, x.device) for choice, _ in choices]
    for at in slices(T, 2048):  # few enough to stay in a CPU's cache
        turns, *others = (table[..., at, :] for table in tables)
        for other, (_, where) in zip(others, choices[1:]):
            turns = torch.where(where[:, None].to(x.device), other, turns)  # (heads, T, D/2)
        out[:, :, at] = rotate(x[:, :, at], turns)
    return out


def slices(length: int, size: int) -> list[slice]:
    """0 ... length - 1 in slices of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def turns_of(position: Callable[[Tensor], Tensor], first: int, T: int, frequencies: Tensor, device) -> Tensor:
    """e^(i angle), angle = position(index) * frequency, of the indices first ... first + T - 1: complex64 (.., T, D/2)."""
    return cis_table(position, tuple(frequencies.tolist()), 1 << (first + T - 1).bit_length(), device)[..., first:first + T, :]


@lru_cache(maxsize=16)  # for the next token, and for the next layer where layers share a Method
def cis_table(position, frequencies: tuple[float, ...], length: int, device) -> Tensor:
    """Angles are formed in float64, so that position 10^6 is as exact as position 1."""
    with torch.inference_mode(False):  # usable in training too, whoever asks first
        f = torch.tensor(frequencies, dtype=torch.float64, device=device)
        angle = position(torch.arange(length, device=device)[:, None]) * f  # (length, D/2)
        return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


# ---------------------------------------------------------------------------------------------------------------------
# Attention over bands. Queries are the last T of the S positions that have keys: T = S in a prefill, 1 in decoding.


def attend_dense(q: Tensor, k: Tensor, v: Tensor, method: Method, frequencies: Tensor) -> Tensor:
    """What is meant: every score with its own relative position, one softmax. Memory grows with T * S.

    q (B, heads, T, D), k and v (B, kv_heads, S, D) before rotation, frequencies (D/2,). Returns (B, heads, T, D).
    """
    method = by_heads(method)
    heads, T, S, D = *q.shape[1:3], *k.shape[2:]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))  # (B, heads, S, D)
    j = torch.arange(S, device=q.device)[:, None]  # (S, 1)
    i = j[S - T:]  # (T, 1)
    frequencies = frequencies if method.frequencies is None else method.frequencies
    scores = torch.full((*q.shape[:3], S), -torch.inf, dtype=q.dtype, device=q.device)  # (B, heads, T, S)
    for near, far, q_pos, k_pos in method.bands:
        if near >= S:
            break
        inside = (i - j.T >= near) & (i - j.T < (far or S))  # (T, S)
        band = rotate_to(q_pos, q, S - T, frequencies) @ rotate_to(k_pos, k, 0, frequencies).mT
        scores = torch.where(inside, band * (method.temperature / math.sqrt(D)), scores)
    return scores.softmax(dim=-1) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, method: Method, frequencies: Tensor) -> Tensor:
    """attend_dense to rounding, in the time and memory of plain causal attention: each pair is scored once.

    Each band is an attention of its own, (out, lse), and attentions over disjoint keys merge exactly by their log-sum-exp.
    For inference: a method of one band can be trained through where T = S, but merging works in place.
    """
    method = by_heads(method)
    T, S, D = q.shape[2], *k.shape[2:]
    # heads that turn a key differently cannot share it, but for one_query, which knows the few choices of a PerHead
    apart = [tells_heads_apart(position, q.shape[1], D) and not (T == 1 and isinstance(position, PerHead))
             for band in method.bands for position in (band.q_pos, band.k_pos)]
    if any(apart) and q.shape[1] > k.shape[1]:
        return attend_head_by_head(q, k, v, method, frequencies)
    frequencies = frequencies if method.frequencies is None else method.frequencies
    scale, done = method.temperature / math.sqrt(D), None
    for near, far, q_pos, k_pos in method.bands:
        first = max(near, S - T)  # the first query with a key this far away
        if first >= S:
            break
        row = first - (S - T)
        into = done and (done[0][:, :, row:], done[1][:, :, row:])  # (B, heads, n, D), (B, heads, n)
        lo, hi = max(first - (far or S) + 1, 0), S - near  # the keys lo <= j < hi that these queries see
        q_turned = rotate_to(q_pos, q[:, :, row:], first, frequencies)
        if T == 1:
            band = merge(into, one_query(q_turned, k[:, :, lo:hi], v[:, :, lo:hi], k_pos, lo, frequencies, scale))
        else:
            k_turned = rotate_to(k_pos, k[:, :, lo:hi], lo, frequencies)
            band = band_attention(q_turned, k_turned, v[:, :, lo:hi], (far or S) - near, scale, into)
        done, q_turned, k_turned = done or band, None, None  # room for the next band's
    return done[0]


def attend_head_by_head(q: Tensor, k: Tensor, v: Tensor, method: Method, frequencies: Tensor) -> Tensor:
    """attend where heads that share a key rotate it differently: one head of each group at a time, so that no key is copied."""
    heads, D, group, parts = q.shape[1], q.shape[3], q.shape[1] // k.shape[1], []

    def alone(position, g):
        return of_heads(position, g, group) if tells_heads_apart(position, heads, D) else position

    for g in range(group):
        bands = [Band(near, far, alone(q_pos, g), alone(k_pos, g)) for near, far, q_pos, k_pos in method.bands]
        parts.append(attend(q[:, g::group], k, v, method._replace(bands=bands), frequencies))  # (B, kv_heads, T, D)
    return torch.stack(parts, dim=2).flatten(1, 2)  # (B, heads, T, D)


def one_query(q: Tensor, k: Tensor, v: Tensor, k_pos: Callable[[Tensor], Tensor], first: int, frequencies: Tensor,
              scale: float) -> tuple[Tensor, Tensor]:
    """One query to all keys of a band, whose rotated copies last for a slice of them only. first: the index of k's first token.

    q (B, heads, 1, D) rotated, k (B, kv_heads, S, D) not. Where heads see keys rotated differently, each choice rotates them once,
    and meets the part of the query where it holds. Returns out (B, heads, 1, D) and lse (B, heads, 1).
    """
    parts = []  # of the query (B, kv_heads, group, D), with the turns of their keys (S, D/2)
    for choice, where in choices_of(k_pos):
        part = q if where is None else q * where.repeat_interleave(2, dim=1)[:, None].to(q.device)
        part = scale * part.view(len(q), k.shape[1], -1, q.shape[3]).float()
        parts.append((part, turns_of(choice, first, k.shape[2], frequencies, q.device)))
    cuts = slices(k.shape[2], 16384)  # so that no copy of all the keys is made
    scores = torch.cat([sum(part @ rotate(k[:, :, at], turns[..., at, :]).float().mT for part, turns in parts) for at in cuts], dim=-1)
    lse = scores.logsumexp(dim=-1)  # (B, kv_heads, group)
    weights = (scores - lse[..., None]).exp()  # (B, kv_heads, group, S)
    out = sum(weights[..., at] @ v[:, :, at].float() for at in cuts)
    return out.view(q.shape).to(q.dtype), lse.view(q.shape[:3])


def band_attention(q: Tensor, k: Tensor, v: Tensor, width: int, scale: float, into=None) -> tuple[Tensor, Tensor]:
    """Causal attention to the last `width` keys of each query, without scoring a pair that is not wanted.

    q (B, heads, n, D) rotated; k, v (B, kv_heads, c + n, D): row r sees columns c + r - width < column <= c + r, c < width.
    Returns out (B, heads, n, D) and the log-sum-exp of its scores, lse (B, heads, n), merged into those given, if any.

    Columns are cut into chunks of `width`. A row sees its own chunk up to itself, and the previous chunk after itself:

        width 3       own    previous          the first chunk has no previous one, and its first c columns have no
        row a         x..      .xx             rows; the others differ only in where they lie, and ride in the batch
        row b         xx.      ..x             dimension; the last may be cut short
        row c         xxx      ...
    """
    n, c, w = q.shape[2], k.shape[2] - q.shape[2], width
    if n <= w - c:
        return merge(into, causal(q, k, v, scale))
    out, lse = into or (torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32))  # of no keys
    row = w - c
    merge((out[:, :, :row], lse[:, :, :row]), causal(q[:, :, :row], k[:, :, :w], v[:, :, :w], scale))
    while row < n:  # groups of whole chunks, of about 8192 rows so that they need little memory, then the rest
        chunks = min(max(8192 // w, 1), (n - row) // w) or 1
        size = min(w, n - row)  # rows of a chunk

        def batched(x, start, size):  # (B, heads, chunks * size, ..) -> (B, chunks, heads, size, ..), a view
            return x[:, :, start:start + chunks * size].unflatten(2, (chunks, size)).transpose(1, 2)

        own, previous = row + c, row + c - w
        cuts = (q, row, size), (k, own, size), (v, own, size), (k, previous, w), (v, previous, w)
        part = two_chunks(*(batched(*cut).flatten(0, 1) for cut in cuts), scale)
        merge((batched(out, row, size), batched(lse, row, size)), tuple(x.unflatten(0, (-1, chunks)) for x in part))
        row += chunks * size
    return out, lse


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Row r sees the columns up to c + r, where c = columns - rows: a rectangle of c columns, then a square."""
    n, c = q.shape[2], k.shape[2] - q.shape[2]
    if n == 1:
        return fused_attention(q, k, v, scale)
    out, lse = fused_attention(q, k[:, :, c:], v[:, :, c:], scale, is_causal=True)
    if c:
        merge((out, lse), fused_attention(q, k[:, :, :c], v[:, :, :c], scale))
    return out, lse


def two_chunks(q: Tensor, k: Tensor, v: Tensor, k_prev: Tensor, v_prev: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Chunks of n <= width rows: row r sees columns 0 ... r of its own chunk and r + 1 ... width - 1 of the previous one.

    q (B, heads, n, D); k, v (B, kv_heads, n, D); k_prev, v_prev (B, kv_heads, width, D).
    """
    n, w = q.shape[2], k_prev.shape[2]
    out, lse = fused_attention(q, k, v, scale, is_causal=True)
    if n < w:  # columns that every row sees
        merge((out, lse), fused_attention(q, k_prev[:, :, n:], v_prev[:, :, n:], scale))
    if n > 1:  # a strict upper triangle; with both orders flipped it is causal, one row and one column shorter
        q, k, v = (x.flip(2) for x in (q[:, :, :n - 1], k_prev[:, :, 1:n], v_prev[:, :, 1:n]))
        triangle = tuple(x.flip(2) for x in fused_attention(q, k, v, scale, is_causal=True))
        merge((out[:, :, :n - 1], lse[:, :, :n - 1]), triangle)
    return out, lse


def merge(into: tuple[Tensor, Tensor] | None, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over other keys, part (out, lse), into (out, lse), in place: each weighs as much as its exponentials' sum."""
    if into is None:
        return part
    (out, lse), (other_out, other_lse) = into, part
    out.lerp_(other_out, torch.sigmoid(other_lse - lse)[..., None].to(out.dtype))
    torch.logaddexp(lse, other_lse, out=lse)
    return into


def fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool = False) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T) v and its log-sum-exp, square causal or over every key, from the kernel that fits.

    q (B, heads, T, D) and k rotated; k, v (B, kv_heads, S, D). Returns out (B, heads, T, D) and lse
    (B, heads, T) float32. PyTorch's public scaled_dot_product_attention runs these kernels too, and drops the second result.
    """
    aten, T, dtype = torch.ops.aten, q.shape[2], q.dtype
    cuda = q.device.type == "cuda" and q.shape[3] % 8 == 0
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    if cuda and dtype in (torch.float16, torch.bfloat16) and torch.cuda.get_device_capability(q.device) >= (8, 0):
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if cuda and dtype in (torch.float16, torch.float32):
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)[:2]
        return out, lse[:, :, :T]  # padded to a multiple of 32
    return blockwise_attention(q, k, v, scale, is_causal)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """fused_attention where no kernel fits, 256 rows at a time; k and v have all heads."""
    blocks = []
    for start in range(0, q.shape[2], 256):
        scores = q[:, :, start:start + 256].float() @ k.float().mT * scale  # (B, heads, rows, S)
        if is_causal:
            scores.masked_fill_(scores.new_ones(scores.shape[2:], dtype=torch.bool).triu(start + 1), -torch.inf)
        lse = scores.logsumexp(dim=-1)
        blocks.append((((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse))
    return tuple(torch.cat(parts, dim=2) for parts in zip(*blocks))


# ---------------------------------------------------------------------------------------------------------------------
# python rope_extrap.py: the matrices that the papers draw


def main() -> None:
    argparse.ArgumentParser(description="Print the relative positions of DPE and LaMPE for a few tokens, and LaMPE's published ramps.").parse_args()
    i = torch.arange(9)[:, None]
    d, w = i - i.T, 3
    print(f"DPE, Figure 1(c): relative positions of 9 tokens, window {w}. Left, as drawn: (d - w) // s + w from\n"
          "d = w on. Right, as two rotations give it: i // s - j // s + w - w // s, * where it differs.")
    for s in (3, 2):
        drawn, given = torch.where(d >= w, (d - w) // s + w, d), relative_positions(dpe(w, s), 9)
        print(f"\nscale {s}")
        for row in range(9):
            left = "".join(f"{rel:3}" for rel in drawn[row, :row + 1].tolist())
            right = "".join(f"{rel:3}{' *'[rel != was]}" for was, rel in zip(drawn[row].tolist(), given[row, :row + 1].tolist()))
            print(f"{left:32}{right}".rstrip())

    l, ramp, s1, s2 = 16, 6, 3, 4
    print(f"\nLaMPE's three regions: {l} tokens, ramp {ramp}, head {s1}, tail {s2}; head, (middle), [tail]\n")
    rel, regions = relative_positions(lampe(l, ramp, s1, s2), l), [" {} ", "({})", "[{}]"]
    for row in range(l):
        cells = [regions[(row - j > s1) + (row - j >= l - s2)].format(rel[row, j]) for j in range(row + 1)]
        print("".join(f"{cell:>5}" for cell in cells).rstrip())

    lengths = [4096, 8192, 16384, 32768, 65536, 131072]
    print(f"\nLaMPE's published ramps, L / (1 + exp(-(a l + b))); * set by hand, below 8192 tokens\n\n"
          f"{'input length l':24}" + "".join(f"{length:9}" for length in lengths))
    for name, row in PUBLISHED.items():
        if "lampe" in row:
            ramps = [fitted_ramp(row["lampe"], length) for length in lengths]
            print((f"{name:25}" + "".join(f"{ramp:8}{' *'[ramp == row['lampe'].get('short')]}" for ramp in ramps)).rstrip())


if __name__ == "__main__":
    main()
