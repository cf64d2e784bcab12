"""The branches that run on CUDA, tested without a GPU.

The two CUDA kernels get CPU implementations for the duration of a test, written as their sources
say. Full sizes are checked on the meta device, whose tensors have a shape and no memory.
"""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rope_extrap as rx

FLASH = "_scaled_dot_product_flash_attention"
EFFICIENT = "_scaled_dot_product_efficient_attention"


def check_arguments(q, k, v, is_causal):
    """What both kernels require of their arguments."""
    for x in (q, k, v):
        assert x.dtype == q.dtype
        assert x.shape[0] == q.shape[0] <= 65535  # the batch is a dimension of the grid
        assert x.shape[3] == q.shape[3]
        assert x.stride(3) == 1
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
            assert size == 1 or stride * x.element_size() % 16 == 0
    assert k.shape == v.shape
    if is_causal:
        assert q.shape[2] == k.shape[2]


def softmax_attention(q, k, v, is_causal, scale):
    """Attention and its log-sum-exp in float32."""
    logits = q.float() @ k.float().mT * scale
    if is_causal:
        later = torch.ones(logits.shape[2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    lse = logits.logsumexp(dim=-1)
    return (logits.softmax(dim=-1) @ v.float()).to(q.dtype), lse


def flash_on_cpu(q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    check_arguments(q, k, v, is_causal)
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert q.shape[1] % k.shape[1] == 0  # grouped heads are supported
    n_rep = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(n_rep, dim=1)
    v = v.repeat_interleave(n_rep, dim=1)
    out, lse = softmax_attention(q, k, v, is_causal, scale)
    empty = torch.empty(0)
    return out, lse, empty, empty, q.shape[2], k.shape[2], empty, empty, empty


def efficient_on_cpu(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *,
                     scale=None):
    check_arguments(q, k, v, is_causal)
    assert q.shape[1] == k.shape[1]  # grouped heads are not supported
    assert compute_log_sumexp
    out, lse = softmax_attention(q, k, v, is_causal, scale)
    padding = -lse.shape[2] % 32
    lse = torch.nn.functional.pad(lse, (0, padding), value=torch.inf)
    empty = torch.empty(0)
    return out, lse, empty, empty


@pytest.fixture
def cuda_kernels():
    """CPU implementations of both kernels."""
    library = torch.library.Library("aten", "IMPL")
    library.impl(FLASH, flash_on_cpu, "CPU")
    library.impl(EFFICIENT, efficient_on_cpu, "CPU")
    yield
    library._destroy()


def use_kernel_of(monkeypatch, capability, flash_available=True):
    """Choose kernels as on a CUDA card of this compute capability."""
    choose = rx.choose_kernel

    def on_the_card(device_type, _capability, _available, dtype, head_dim):
        return choose("cuda", capability, flash_available, dtype, head_dim)
    monkeypatch.setattr(rx, "choose_kernel", on_the_card)


SHAPES = {  # query heads, KV heads, head dimension: Llama 3 8B's ratio, and heads of 256
    "grouped": (8, 2, 32),
    "wide": (2, 2, 256),
}
CARDS = {
    "hopper": ((9, 0), True),
    "without flash attention": ((8, 0), False),
    "turing": ((7, 5), True),
}


def methods_for(n_heads, head_dim, T):
    scales = [1 + f % 5 for f in range(head_dim // 2)]
    generator = torch.Generator().manual_seed(1)
    key_dims = torch.rand(n_heads, head_dim // 2, generator=generator) < 0.7
    return {
        "rope": rx.rope(),
        "yarn": rx.yarn(rx.rope_frequencies(head_dim, 10000.0), 4.0, 64),
        "self-extend": rx.self_extend(24, 4),
        "rerope": rx.rerope(1),
        "dpe": rx.dpe(40, scales),
        "dpe, key dimensions": rx.dpe(40, scales, key_dims),
        "lampe": rx.lampe(T, T // 4, 24, 16),
    }


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_method_on_every_card_is_dense_attention(card, shape, batch, dtype, monkeypatch,
                                                       cuda_kernels):
    use_kernel_of(monkeypatch, *CARDS[card])
    n_heads, kv_heads, D = SHAPES[shape]
    T = 150
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, n_heads, T, D, generator=generator).to(dtype)
    k = torch.randn(batch, kv_heads, T, D, generator=generator).to(dtype)
    v = torch.randn(batch, kv_heads, T, D, generator=generator).to(dtype)
    frequencies = rx.rope_frequencies(D, 10000.0)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for name, method in methods_for(n_heads, D, T).items():
        exact = rx.attend_dense(q.double(), k.double(), v.double(), method, frequencies)
        prefill = rx.attend(q, k, v, method, frequencies)
        decoded = rx.attend(q[:, :, -1:], k, v, method, frequencies)
        assert (prefill.double() - exact).abs().max() < tolerance, name
        assert (decoded.double() - exact[:, :, -1:]).abs().max() < tolerance, name


class Recorder(TorchDispatchMode):
    """Checks the kernels' arguments, and records the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.kernels = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name in (f"aten::{FLASH}", f"aten::{EFFICIENT}"):
            check_arguments(*args[:3], (kwargs or {}).get("is_causal", False))
            self.kernels += 1
        results = result if isinstance(result, tuple) else (result,)
        for tensor in results:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", methods_for(32, 128, 131072))
def test_llama_3_8b_at_131072_tokens_fits_the_kernels(name, monkeypatch):
    use_kernel_of(monkeypatch, (9, 0))
    T = 131072
    method = methods_for(32, 128, T)[name]
    q = torch.empty(1, T, 32, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    k = torch.empty(1, 8, T, 128, dtype=torch.bfloat16, device="meta")
    v = torch.empty(1, 8, T, 128, dtype=torch.bfloat16, device="meta")
    with Recorder() as recorder:
        out = rx.attend(q, k, v, method, rx.rope_frequencies(128, 500000.0))
        one = rx.attend(q[:, :, -1:], k, v, method, rx.rope_frequencies(128, 500000.0))
    assert out.shape == q.shape
    assert one.shape == (1, 32, 1, 128)
    assert recorder.kernels >= 2
    assert recorder.largest <= 1.1e9
