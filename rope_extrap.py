"""Run a Llama past the context it was trained on, without training: DPE and LaMPE, and the methods they build on.

DPE is Dimension-Wise Positional Embeddings Manipulation (arXiv 2504.18857), LaMPE Length-aware Multi-grained Positional
Encoding (arXiv 2508.02308).

RoPE turns each query by an angle that grows with its index i, each key by one that grows with its index j, so their
score sees only i - j. Past the training length that is a relative position which the model never met. So most methods
give far pairs smaller ones, and all say it as a list of distance bands:

    for keys at distance near <= i - j < far, rotate the query as if it stood at q_pos(i), the key as if at k_pos(j).

    i, j     index of query and key             rel      the relative position that RoPE sees
    d        their distance, i - j              B        batch
    T, S     number of queries, of keys         D        head dimension
    f        index of a rotary frequency        w, s     DPE's window and scales
    l        LaMPE's input length               s1, s2   LaMPE's head and tail: its exact regions at both ends
"""
import math
from functools import lru_cache
from typing import Callable, NamedTuple

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# RoPE


def rope_frequencies(head_dim: int, theta: float) -> Tensor:
    """RoPE's frequencies theta^(-2f/D), radians per position: (D/2,) float64, the fastest first."""
    return theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


def cis(positions: Tensor, frequencies: Tensor) -> Tensor:
    """cos + sqrt(-1) sin of the angle position * frequency: positions (.., T, 1 or D/2) -> complex64 (.., T, D/2)."""
    angle = positions * frequencies  # float64, so that position 10^6 is as exact as position 1
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """RoPE: neighbouring coordinates (2f, 2f + 1) of x are a complex number, which is multiplied by that of its angle.

    x (B, heads, T, D); turn, from cis, (T, D/2) or (heads, T, D/2). Computed in float32; returns x's shape and dtype.
    """
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, heads, T, D/2)
    return torch.view_as_real(z * turn).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Methods


class Band(NamedTuple):
    """Keys at distance near <= i - j < far, and the positions to which their query and they are rotated.

    q_pos and k_pos map indices (T, 1) to positions (T, 1) or (T, D/2): integers, on the CPU. What they return is cached
    by function (cis_table), so a function must always give an index the same position.
    """
    near: int
    far: int | None  # None: no end
    q_pos: Callable[[Tensor], Tensor]
    k_pos: Callable[[Tensor], Tensor]


class Method(NamedTuple):
    """Bands that partition the distances 0, 1, 2, ... in order: each key is attended to exactly once."""
    bands: list[Band]
    temperature: float = 1.0  # multiplies every logit
    frequencies: Tensor | None = None  # (D/2,), instead of the model's own
    key_dims: Tensor | None = None  # bool (heads, D/2): where False, that head's frequency keeps plain RoPE's positions


def index(i: Tensor) -> Tensor:
    """Plain RoPE's position of index i: i itself."""
    return i


def rope() -> Method:
    """Plain RoPE: rel = d."""
    return Method([Band(0, None, index, index)])


def dpe(window: int, scales, key_dims: Tensor | None = None) -> Method:
    """DPE's step (c), scale the position indices of each frequency by its own integer:

        d <  w                         rel = d
        d >= w, f is a key dimension   rel = i // s_f - j // s_f + w - w // s_f
        d >= w, f is not               rel = d

    window: w, tokens. scales: s_f, one integer or D/2 of them. key_dims: bool (heads, D/2); None: all are key.
    Errors: ValueError for a window or a scale below 1.
    """
    w, s = window, torch.as_tensor(scales)
    if w < 1 or s.ndim > 1 or s.is_floating_point() or s.numel() == 0 or s.min() < 1:
        raise ValueError(f"DPE needs a window and integer scales of at least 1, not window {w} and scales {scales}")
    return Method([Band(0, w, index, index),
                   Band(w, None, lambda i: i // s + w - w // s, lambda j: j // s)], key_dims=key_dims)


def self_extend(window: int, group: int) -> Method:
    """SelfExtend (Jin et al. 2024), DPE with every scale equal: rel = i // s - j // s + w - w // s from w on."""
    return dpe(window, group)


def rerope(window: int) -> Method:
    """ReRoPE (Su 2023), DPE with scales beyond every index: rel = min(d, w)."""
    return dpe(window, 2 ** 62)


def lampe(length: int, ramp: int, head: int, tail: int, temperature: float = (0.1 * math.log(2) + 1) ** 2) -> Method:
    """LaMPE's three regions for an input of l = length tokens, with s1 = head, s2 = tail and p(x) = x * ramp // l:

        head      d <= s1               rel = d
        middle    s1 < d < l - s2       rel = p(i) - p(j) + s1 - p(s1)
        tail      d >= l - s2           rel = d - (l - m),  m = s1 + s2 + (l - s1 - s2) * ramp // l

    ramp: the mapping length, lampe_ramp(length, ..). All in tokens; the length is the input's, fixed while decoding.
    temperature: on every logit, 1.1434 as released. Where nothing is to be compressed (ramp >= l, l < 2 s1, or
    s1 + s2 >= l) rel = d, under the same temperature. Errors: ValueError for length or ramp below 1, others below 0.
    """
    l, s1, s2 = length, head, tail
    if l < 1 or ramp < 1 or s1 < 0 or s2 < 0:
        raise ValueError(f"LaMPE needs length and ramp of at least 1, head and tail of 0, not {l}, {ramp}, {s1}, {s2}")
    if ramp >= l or l < 2 * s1 or s1 + s2 >= l:
        return rope()._replace(temperature=temperature)
    m = s1 + s2 + (l - s1 - s2) * ramp // l
    bands = [Band(0, s1 + 1, index, index),
             Band(s1 + 1, l - s2, lambda i: i * ramp // l + s1 - s1 * ramp // l, lambda j: j * ramp // l),
             Band(l - s2, None, lambda i: i - (l - m), index)]
    return Method([band for band in bands if band.near != band.far], temperature)  # s1 + s2 = l - 1 has no middle


def lampe_ramp(length: int, a: float, b: float, L: float, short: int | None = None) -> int:
    """LaMPE's mapping length for an input of l = length tokens: the sigmoid L / (1 + exp(-(a l + b))), truncated.

    short: the ramp below 8,192 tokens, which two of the released models have set by hand.
    """
    return short if short and length < 8192 else int(L / (1 + math.exp(-(a * length + b))))


def ntk(frequencies: Tensor, factor: float) -> Method:
    """NTK-aware scaling (bloc97 2023) of a model's frequencies (D/2,): theta' = theta * factor^(D/(D-2)); rel = d."""
    D = 2 * len(frequencies)
    return rope()._replace(frequencies=frequencies * factor ** (-torch.arange(0, D, 2, dtype=torch.float64) / (D - 2)))


def yarn(frequencies: Tensor, factor: float, train_len: int, beta_fast: float = 32.0, beta_slow: float = 1.0) -> Method:
    """YaRN (Peng et al. 2023): a model's frequencies (D/2,), those of few rotations within train_len divided by factor.

    Between beta_slow and beta_fast rotations they are blended. Every logit is multiplied by (0.1 ln factor + 1)^2.
    """
    rotations = train_len * frequencies / (2 * math.pi)
    keep = ((rotations - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)
    blend = keep * frequencies + (1 - keep) * frequencies / factor
    return rope()._replace(frequencies=blend, temperature=(0.1 * math.log(factor) + 1) ** 2)


# ---------------------------------------------------------------------------------------------------------------------
# What a method means: the matrix that a paper draws, and all scores under one softmax


def relative_positions(method: Method, length: int) -> Tensor:
    """The matrix a paper draws: rel of every query (row) and key (column), 0 above the diagonal, where no key is seen.

    Returns int64: (T, T), (T, T, D/2) where frequencies differ, or (heads, T, T, D/2) where heads do.
    """
    i = torch.arange(length)[:, None]
    d = (i - i.T)[..., None]  # (T, T, 1)
    rel = torch.zeros_like(d)
    for near, far, q_pos, k_pos in method.bands:
        inside = (d >= near) & (d < (far or length))
        rel = torch.where(inside, q_pos(i)[:, None] - k_pos(i)[None], rel)  # (T, T, 1 or D/2)
    if method.key_dims is not None:
        rel = torch.where(method.key_dims.cpu()[:, None, None], rel, d.clamp(min=0))  # (heads, T, T, D/2)
    return rel[..., 0] if rel.shape[-1] == 1 else rel


def attend_dense(q: Tensor, k: Tensor, v: Tensor, method: Method, frequencies: Tensor) -> Tensor:
    """What is meant: every score with its own relative position, one softmax. Memory grows with T * S.

    q (B, heads, T, D), k and v (B, kv_heads, S, D) before rotation, the queries being the last T of the S tokens;
    frequencies (D/2,), the model's. Computed in float32 at least. Returns (B, heads, T, D) in q's dtype.
    """
    (heads, T, D), S, dtype = q.shape[1:], k.shape[2], q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))  # (B, heads, S, D)
    frequencies = frequencies if method.frequencies is None else method.frequencies
    i, j = torch.arange(S - T, S)[:, None], torch.arange(S)[:, None]  # (T, 1), (S, 1)

    def at(x, position, indices):
        positions = position(indices)
        if method.key_dims is not None:
            positions = torch.where(method.key_dims.cpu()[:, None], positions, indices)  # (heads, T or S, D/2)
        return rotate(x, cis(positions, frequencies).to(x.device))

    scores = torch.full((*q.shape[:3], S), -torch.inf, dtype=q.dtype, device=q.device)  # (B, heads, T, S)
    for near, far, q_pos, k_pos in method.bands:
        inside = (i - j.T >= near) & (i - j.T < (far or S))  # (T, S)
        band = at(q, q_pos, i) @ at(k, k_pos, j).mT
        scores = torch.where(inside.to(q.device), band * (method.temperature / math.sqrt(D)), scores)
    return (scores.softmax(dim=-1) @ v).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The papers' procedures, which find a model's settings; extras/calibrate.py runs them


def dpe_scales(effective: list[int], length: int) -> list[int]:
    """The scales that bring `length` tokens to each group's effective length, s = max(1, ceil(length / effective))."""
    return [max(1, -(-length // tokens)) for tokens in effective]


def not_worse(scores: Tensor, best: Tensor) -> Tensor:
    """Whether scores (.., n) are below the best (n,) by no more than noise: two standard errors, at least 0.01."""
    worse = best - scores  # paired, of the same n questions; 0.01 nats change no answer
    return worse.mean(dim=-1) <= (2 * worse.std(dim=-1) / math.sqrt(len(best))).clamp(min=0.01)


def detect_scales(score: Callable[[list[int]], Tensor], n_groups: int, candidates: list[int], background: int):
    """DPE's step (a): each group of frequencies is tried at each scale, while all other groups stand at `background`.

    score(scales), one scale a group, fastest first: (n,) log-likelihoods of answers to the same n questions. From its
    best scale, the paper's choice, a group goes down while not_worse. Returns scales, and scores [group][candidate].
    """
    others, chosen = [background] * (n_groups - 1), []
    table = [[score([*others[:g], s, *others[g:]]) for s in candidates] for g in range(n_groups)]
    for row in map(torch.stack, table):  # (candidates, n)
        at = best = row.mean(dim=1).argmax().item()
        while at > 0 and not_worse(row[at - 1], row[best]):
            at -= 1
        chosen.append(candidates[at])
    return chosen, table


def contribution(q: Tensor, k: Tensor) -> Tensor:
    """DPE's step (b) on a text: q (T, heads, D), k (T, kv_heads, D), unrotated -> mean of |q_f| |k_f|, (heads, D/2)."""
    q_norms, k_norms = (x.float().unflatten(-1, (-1, 2)).norm(dim=-1) for x in (q, k))  # (T, heads or kv_heads, D/2)
    return (q_norms * k_norms.repeat_interleave(q.shape[1] // k.shape[1], dim=1)).mean(dim=0).cpu()


def key_dimensions(contributions: Tensor, topk: int) -> Tensor:
    """DPE's step (b): each head's topk frequencies of largest contribution, of equals the faster: bool (heads, D/2)."""
    largest = contributions.argsort(dim=-1, descending=True, stable=True)[:, :topk]
    return torch.zeros_like(contributions, dtype=torch.bool).scatter_(1, largest, True)


def fit_ramp(lengths: list[float], ramps: list[float], errors: list[float] | None = None) -> tuple[float, float, float]:
    """LaMPE's fit: (a, b, L) of the sigmoid L / (1 + exp(-(a l + b))) nearest to the points (l, best ramp).

    Least squares, by the ramps' standard errors where given. Errors: ValueError for too few lengths, or falling ramps.
    """
    x, y, e = torch.tensor([lengths, ramps, errors or [1.0] * len(ramps)], dtype=torch.float64)
    if len(set(lengths)) < 3 or ((x - x.mean()) * y).sum() <= 0:  # the slope of the line through the points
        raise ValueError(f"a sigmoid needs 3 lengths or more and ramps that grow, not {list(zip(lengths, ramps))}")
    longest, largest = x.max(), y.max()
    p = torch.tensor([8.0, -2.0, 0.0], dtype=torch.float64, requires_grad=True)  # a longest, b, log(L / largest)
    fit = torch.optim.LBFGS([p], max_iter=2000, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")

    def error():
        curve = p[2].exp() * torch.sigmoid(p[0] * x / longest + p[1])
        loss = (((curve - y / largest) * (e.min() / e)) ** 2).sum()
        p.grad, = torch.autograd.grad(loss, p)
        return loss

    fit.step(error)
    return (p[0] / longest).item(), p[1].item(), (p[2].exp() * largest).item()


def at_128k(*scales: int) -> dict:
    """DPE's released scales, fastest group first, as the effective lengths that they stand for at 131,072 tokens."""
    return dict(window=1024, effective=[131072 // s for s in scales], topk=48)


# For models with these (dim, n_layers, n_heads, n_kv_heads, vocab_size, train_len). DPE: for Llama 3, the README of
# the released code and the names of its shipped predictions, else its config file. LaMPE: lampe_ramp's arguments.
REGIONS = dict(head=512, tail=200)
PUBLISHED = {
    "Llama-2-7B-Chat": dict(
        model=(4096, 32, 32, 32, 32000, 4096),
        lampe=dict(a=8.673006440952035e-05, b=-0.648012322406978, L=2489.1055552214357, short=1536, **REGIONS)),
    "Llama-3-8B-Instruct": dict(
        model=(4096, 32, 32, 8, 128256, 8192), dpe=at_128k(4, 4, 2, 16, 32, 32, 16, 128),
        lampe=dict(a=0.00010493097327094324, b=-2.466638011138158, L=6204.409324666837, short=1536, **REGIONS)),
    "Llama-3.1-8B-Instruct": dict(
        model=(4096, 32, 32, 8, 128256, 131072), dpe=at_128k(2, 32, 32, 2, 2, 2, 2, 1),
        lampe=dict(a=4.505261149632588e-05, b=-2.788576860718702, L=82358.52413056031, **REGIONS)),
    "Mistral-7B-Instruct-v0.2": dict(model=(4096, 32, 32, 8, 32000, 32768), dpe=at_128k(4, 16, 2, 16, 32, 16, 16, 2)),
    "Qwen2.5-7B-Instruct": dict(model=(3584, 28, 28, 4, 152064, 32768), dpe=at_128k(2, 16, 8, 8, 32, 8, 2, 4)),
}


# =====================================================================================================================
# A reader of the papers may stop here. What follows is attend_dense in the time and memory of plain causal attention:
# rotation by cached tables, attention to each band by fused kernels, and how bands merge.


@lru_cache(maxsize=8)  # LaMPE needs 6 while it decodes; all layers must share one Method's functions
def cis_table(position: Callable[[Tensor], Tensor], frequencies: tuple[float, ...], length: int, device) -> Tensor:
    """cis of the positions of indices 0 ... length - 1: complex64 (length, D/2), on the device."""
    positions = position(torch.arange(length)[:, None])
    if positions.shape[-1] not in (1, len(frequencies)):
        raise ValueError(f"positions for {positions.shape[-1]} frequencies do not fit heads of {len(frequencies)}")
    with torch.inference_mode(False):  # usable in training, even if first asked for in inference mode
        return cis(positions, torch.tensor(frequencies, dtype=torch.float64)).to(device)


def rotate_to(position: Callable[[Tensor], Tensor], x: Tensor, first: int, frequencies: tuple[float, ...],
              key_dims: Tensor | None) -> Tensor:
    """Rotate x (B, heads, T, D), indices first, first + 1, .., to position(index), or to the index if not key_dims."""
    T, out = x.shape[2], torch.empty_like(x)
    length = 1 << (first + T - 1).bit_length()  # the next tokens find the same table
    table, plain = (cis_table(p, frequencies, length, x.device)[first:first + T] for p in (position, index))
    size = 2048 if x.device.type == "cpu" else 32768  # on a CPU, few enough tokens to stay in its cache
    for start in range(0, T, size):
        at = slice(start, start + size)
        turn = table[at]
        if key_dims is not None and position is not index:
            turn = torch.where(key_dims[:, None], turn, plain[at])  # key_dims (heads, D/2) -> (heads, T, D/2)
        out[:, :, at] = rotate(x[:, :, at], turn)
    return out


def attend(q: Tensor, k: Tensor, v: Tensor, method: Method, frequencies: Tensor) -> Tensor:
    """attend_dense to rounding, in the time and memory of plain causal attention: each pair is scored once.

    Each band is an attention of its own, (out, lse), and these merge exactly, in place: gradients need one band and
    T = S. Errors: ValueError for a method of other heads or frequencies.
    """
    (heads, T, D), (kv_heads, S) = q.shape[1:], k.shape[1:3]
    key_dims, frequencies = method.key_dims, frequencies if method.frequencies is None else method.frequencies
    if len(frequencies) != D // 2 or key_dims is not None and key_dims.shape != (heads, D // 2):
        raise ValueError(f"the method's frequencies or key dimensions do not fit {heads} heads of {D // 2} frequencies")
    if key_dims is not None:
        if heads > kv_heads:  # heads that share a key may rotate it differently: one head of each key at a time
            out, n_rep = torch.empty_like(q), heads // kv_heads
            for n in range(n_rep):
                alone = method._replace(key_dims=key_dims[n::n_rep])
                out[:, n::n_rep] = attend(q[:, n::n_rep], k, v, alone, frequencies)
            return out
        key_dims = key_dims.to(q.device)
    f, softmax_scale, done = tuple(frequencies.tolist()), method.temperature / math.sqrt(D), None
    for near, far, q_pos, k_pos in method.bands:
        first = max(near, S - T)  # the first query with a key this far away
        if first >= S:
            break
        row, low, high = first - (S - T), max(first - (far or S) + 1, 0), S - near  # these see keys low <= j < high
        q_band = rotate_to(q_pos, q[:, :, row:], first, f, key_dims)
        k_band = rotate_to(k_pos, k[:, :, low:high], low, f, key_dims)
        into = done and (done[0][:, :, row:], done[1][:, :, row:])  # (B, heads, n, D), (B, heads, n)
        band = band_attention(q_band, k_band, v[:, :, low:high], (far or S) - near, softmax_scale, into)
        done, q_band, k_band = done or band, None, None  # room for the next band's
    return done[0]


def band_attention(q: Tensor, k: Tensor, v: Tensor, width: int, softmax_scale: float, into=None):
    """Causal attention to the last `width` keys of each query, without scoring a pair that is not wanted.

    q (B, heads, n, D) rotated; k, v (B, kv_heads, c + n, D), c < width: row r sees columns c + r - width + 1 ... c + r.
    Returns out (B, heads, n, D) and the log-sum-exp of its logits, lse (B, heads, n), merged into those given, if any.

    Columns are cut into chunks of `width`. A row sees its own chunk up to itself, and the previous chunk after itself:

        width 3       previous   own        the first chunk has rows for its last columns only, and sees the others;
        row a         .xx        x..        the next differ only in where they lie, and ride in the batch dimension;
        row b         ..x        xx.        the last may be cut short
        row c         ...        xxx
    """
    n, c = q.shape[2], k.shape[2] - q.shape[2]
    if n == 1:
        return merge(into, fused_attention(q, k, v, softmax_scale))
    if c + n <= width:
        return merge(into, chunk_attention(q, k[:, :, c:], v[:, :, c:], k[:, :, :c], v[:, :, :c], 0, softmax_scale))
    out, lse = into or (torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32))  # no keys yet
    row = 0
    while row < n:  # the first chunk, then whole ones in groups of about 8192 rows, for memory, then the rest
        size = min(width if row else width - c, n - row)  # rows of a chunk
        chunks = max(min(8192 // (width * len(q)), (n - row) // width), 1) if row else 1
        own, prev = row + c, max(row + c - width, 0)  # columns

        def batched(x, start, size):  # (B, heads, chunks * size, ..) -> (B, chunks, heads, size, ..), a view
            return x[:, :, start:start + chunks * size].unflatten(2, (chunks, size)).transpose(1, 2)

        cuts = (q, row, size), (k, own, size), (v, own, size), (k, prev, own - prev), (v, prev, own - prev)
        part = chunk_attention(*(batched(*cut).flatten(0, 1) for cut in cuts), size if row else 0, softmax_scale)
        merge((batched(out, row, size), batched(lse, row, size)), tuple(x.unflatten(0, (-1, chunks)) for x in part))
        row += chunks * size
    return out, lse


def chunk_attention(q: Tensor, k: Tensor, v: Tensor, k_prev: Tensor, v_prev: Tensor, hidden: int, softmax_scale: float):
    """Row r sees columns 0 ... r of its own chunk, and of the previous one all, or, where hidden is n, those after r.

    q (B, heads, n, D); k, v (B, kv_heads, n, D); k_prev, v_prev (B, kv_heads, any, D). Returns out and lse, as above.
    """
    out, lse = fused_attention(q, k, v, softmax_scale, is_causal=True)
    if hidden < k_prev.shape[2]:  # columns that every row sees
        merge((out, lse), fused_attention(q, k_prev[:, :, hidden:], v_prev[:, :, hidden:], softmax_scale))
    if hidden > 1:  # a strict upper triangle: with both orders flipped it is causal, one row and one column shorter
        flipped = (x.flip(2) for x in (q[:, :, :hidden - 1], k_prev[:, :, 1:hidden], v_prev[:, :, 1:hidden]))
        triangle = tuple(x.flip(2) for x in fused_attention(*flipped, softmax_scale, is_causal=True))
        merge((out[:, :, :hidden - 1], lse[:, :, :hidden - 1]), triangle)
    return out, lse


def merge(into: tuple[Tensor, Tensor] | None, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over other keys, part (out, lse), into (out, lse), in place. With a and b the two log-sum-exps,

        lse = log(e^a + e^b)        out = sigmoid(a - b) out_a + sigmoid(b - a) out_b

    Both weights in float32: a Llama's first token may take 0.999 of a head's attention, which in bfloat16 is 1.
    """
    if into is None:
        return part
    (out, lse), (other, other_lse) = into, part
    for start in range(0, out.shape[-2], 2048):
        at = slice(start, start + 2048)
        a, b = lse[..., at, None], other_lse[..., at, None]
        out[..., at, :] = torch.sigmoid(a - b) * out[..., at, :] + torch.sigmoid(b - a) * other[..., at, :]
    torch.logaddexp(lse, other_lse, out=lse)
    return into


def fused_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, is_causal: bool = False):
    """softmax(softmax_scale q k^T) v and its log-sum-exp, over all keys or causal with T = S, by the kernel that fits.

    q (B, heads, T, D) and k rotated; k, v (B, kv_heads, S, D). Returns out (B, heads, T, D), lse (B, heads, T) float32.
    PyTorch's public scaled_dot_product_attention runs these kernels too, and drops the second result.
    """
    aten, (T, D), scale = torch.ops.aten, q.shape[2:], softmax_scale
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, scale=scale)
    cuda = q.device.type == "cuda" and D % 8 == 0 and q.dtype != torch.float64
    ampere = cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)  # has bfloat16, and runs flash attention
    if ampere and D <= 256 and q.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    if cuda and (ampere or q.dtype != torch.bfloat16):
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal, scale=scale)[:2]
        return out, lse[:, :, :T]  # padded to a multiple of 32
    return blockwise_attention(q, k, v, softmax_scale, is_causal)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, is_causal: bool):
    """fused_attention where no kernel fits, 256 rows at a time; k and v have all heads."""
    blocks, k, v = [], k.float(), v.float()
    for start in range(0, q.shape[2], 256):
        logits = q[:, :, start:start + 256].float() @ k.mT * softmax_scale  # (B, heads, rows, S)
        if is_causal:
            logits.masked_fill_(logits.new_ones(logits.shape[2:], dtype=torch.bool).triu(start + 1), -torch.inf)
        lse = logits.logsumexp(dim=-1)
        blocks.append((((logits - lse[..., None]).exp() @ v).to(q.dtype), lse))
    return tuple(torch.cat(parts, dim=2) for parts in zip(*blocks))


# ---------------------------------------------------------------------------------------------------------------------
# python rope_extrap.py: the matrices that the papers draw, and what was released for each model

if __name__ == "__main__":
    d, w = torch.arange(9)[:, None] - torch.arange(9), 3
    print("DPE, Figure 1(c), 9 tokens, window 3: as drawn, and as two rotations give it, * where it differs.")
    for s in (3, 2):
        print(f"\nscale {s}")
        for n, rows in enumerate(zip(torch.where(d >= w, (d - w) // s + w, d), relative_positions(dpe(w, s), 9))):
            pairs = [*zip(*(row[:n + 1].tolist() for row in rows))]
            print("".join(f"{drawn:3}" for drawn, _ in pairs).ljust(32)
                  + "".join(f"{rel:3}{' *'[rel != drawn]}" for drawn, rel in pairs).rstrip())

    l, ramp, s1, s2 = 16, 6, 3, 4
    print(f"\nLaMPE's three regions: {l} tokens, ramp {ramp}, head {s1}, tail {s2}; head, (middle), [tail]\n")
    for n, row in enumerate(relative_positions(lampe(l, ramp, s1, s2), l)):
        cells = ([" {} ", "({})", "[{}]"][(n - j > s1) + (n - j >= l - s2)].format(row[j]) for j in range(n + 1))
        print("".join(f"{cell:>5}" for cell in cells).rstrip())

    print("\nAs released, by the input's length: DPE's scales, fastest group first, and LaMPE's ramp")
    for name, row in PUBLISHED.items():
        print(f"\n{name}")
        for length in (4096, 8192, 16384, 32768, 65536, 131072, 262144):
            scales = "-".join(map(str, dpe_scales(row["dpe"]["effective"], length))) if "dpe" in row else ""
            ramp = lampe_ramp(length, *map(row["lampe"].get, ("a", "b", "L", "short"))) if "lampe" in row else ""
            print(f"{length:9,}   {scales:26}{ramp:>6}".rstrip())
