"""A Llama in float64 numpy that scores every pair of tokens by a given relative position.

It rotates nothing, knows no bands, and computes its own frequencies, so that it shares neither code
nor ideas with what it checks.
"""
import math

import numpy as np


def oracle_positions(length):
    """RoPE's relative positions, (T, T, 1): the distance i - j, and 0 for later keys."""
    i, j = np.indices((length, length))
    return np.tril(i - j)[..., None]


def oracle_dpe(length, w, scales):
    """DPE's relative positions by its formula, (T, T, D/2)."""
    i, j = np.indices((length, length))[..., None]
    s = np.array(scales)
    beyond = i // s - j // s + w - w // s
    return np.where(i - j < w, oracle_positions(length), beyond)


def oracle_lampe(length, mapping_len, s1, s2):
    """LaMPE's relative positions by its formula, (T, T, 1)."""
    i, j = np.indices((length, length))[..., None]
    d = oracle_positions(length)
    middle = i * mapping_len // length - j * mapping_len // length + s1 - s1 * mapping_len // length
    span = s1 + s2 + (length - s1 - s2) * mapping_len // length
    return np.select([d <= s1, d < length - s2], [d, middle], d - (length - span))


def oracle_frequencies(config):
    """theta^(-2f/D), and Llama 3.1's scaling by wavelength as Meta's release states it."""
    frequencies = []
    scaling = config.rope_scaling
    for f in range(config.head_dim // 2):
        frequency = config.rope_theta ** (-2 * f / config.head_dim)
        if scaling is not None:
            low = scaling.low_freq_factor
            high = scaling.high_freq_factor
            wavelength = 2 * math.pi / frequency
            if wavelength > scaling.original_len / low:
                frequency /= scaling.factor
            elif wavelength > scaling.original_len / high:
                smooth = (scaling.original_len / wavelength - low) / (high - low)
                frequency *= (1 - smooth) / scaling.factor + smooth
        frequencies.append(frequency)
    return np.array(frequencies)


def oracle_attention(q, k, v, angle, logit_scale):
    """One head: q, k, v (T, D) and angle (T, T, D/2), the angle between query i and key j."""
    T, D = q.shape
    q1, q2 = q[:, None, ::2], q[:, None, 1::2]
    k1, k2 = k[None, :, ::2], k[None, :, 1::2]
    pairs = (q1 * k1 + q2 * k2) * np.cos(angle) + (q1 * k2 - q2 * k1) * np.sin(angle)
    logits = pairs.sum(-1) * logit_scale / math.sqrt(D)
    logits[np.triu_indices(T, k=1)] = -np.inf  # later tokens
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def oracle_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def oracle_logits(weights, config, tokens, rel, logit_scale=1.0):
    """Logits (T, vocab). rel: per layer, relative positions that broadcast to (heads, T, T,
    D/2)."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    T = len(tokens)
    D = config.head_dim
    n_rep = config.n_heads // config.n_kv_heads
    x = w["tok_embeddings.weight"][tokens]
    for n in range(config.n_layers):
        layer = f"layers.{n}."

        def project(h, name, prefix=layer + "attention."):
            out = h @ w[prefix + name + ".weight"].T + w.get(prefix + name + ".bias", 0)
            return out.reshape(T, -1, D)

        h = oracle_norm(x, w[layer + "attention_norm.weight"], config.norm_eps)
        q = project(h, "wq")
        k = project(h, "wk")
        v = project(h, "wv")
        positions = np.broadcast_to(rel[n], (config.n_heads, T, T, D // 2))
        angle = positions * oracle_frequencies(config)
        out = np.zeros_like(q)
        for head in range(config.n_heads):
            kv_head = head // n_rep
            out[:, head] = oracle_attention(q[:, head], k[:, kv_head], v[:, kv_head], angle[head],
                                            logit_scale)
        x = x + out.reshape(T, -1) @ w[layer + "attention.wo.weight"].T

        h = oracle_norm(x, w[layer + "ffn_norm.weight"], config.norm_eps)
        gate = h @ w[layer + "feed_forward.w1.weight"].T
        silu = gate / (1 + np.exp(-gate))
        hidden = silu * (h @ w[layer + "feed_forward.w3.weight"].T)
        x = x + hidden @ w[layer + "feed_forward.w2.weight"].T
    output = w.get("output.weight", w["tok_embeddings.weight"])
    return oracle_norm(x, w["norm.weight"], config.norm_eps) @ output.T


def softmax_attention(q, k, v, softmax_scale, seen):
    """Attention and its log-sum-exp in float64, from tensors; seen (T, S) is True for what counts.

    q (B, heads, T, D), k and v (B, kv_heads, S, D).
    """
    n_rep = q.shape[1] // k.shape[1]
    k = k.double().repeat_interleave(n_rep, dim=1)
    v = v.double().repeat_interleave(n_rep, dim=1)
    logits = q.double() @ k.mT * softmax_scale
    logits = logits.masked_fill(~seen, -math.inf)
    return logits.softmax(dim=-1) @ v, logits.logsumexp(dim=-1)
