"""The branches that run on CUDA, tested without a GPU.

The two CUDA kernels get CPU implementations for the duration of a test. Full sizes are passed to
the real operators on the meta device, whose tensors have a shape and no memory.
"""
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rope_extrap as rx
from extras.tests.oracle import softmax_attention

FLASH = "_flash_attention_forward"
EFFICIENT = "_scaled_dot_product_efficient_attention"


def flash_on_cpu(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
                 return_debug_mask, *, scale, window_size_left, window_size_right):
    """FlashAttention's formula: row r sees keys r + c - left to r + c + right. -1: no limit."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    T, S = q.shape[1], k.shape[1]
    assert (max_q, max_k) == (T, S)
    assert T > 1 or window_size_left == window_size_right == -1  # for the kernel that decodes
    assert all(x.stride(3) == 1 for x in (q, k, v))
    own = torch.arange(S - T, S)[:, None]
    key = torch.arange(S)
    seen = torch.ones(T, S, dtype=torch.bool)
    if window_size_left >= 0:
        seen &= key >= own - window_size_left
    if window_size_right >= 0:
        seen &= key <= own + window_size_right
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = softmax_attention(q, k, v, scale, seen)
    empty = torch.empty(0)
    return out.to(q.dtype).transpose(1, 2), lse.float(), empty, empty, empty


def efficient_on_cpu(q, k, v, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *,
                     scale=None):
    T, S = q.shape[2], k.shape[2]
    assert q.shape[1] == k.shape[1]  # grouped heads are not supported
    assert T == S or not is_causal
    for x in (q, k, v):
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
            assert size == 1 or stride * x.element_size() % 16 == 0
    seen = torch.ones(T, S, dtype=torch.bool).tril(0 if is_causal else S)
    out, lse = softmax_attention(q, k, v, scale, seen)
    lse = torch.nn.functional.pad(lse.float(), (0, -T % 32), value=torch.inf)
    return out.to(q.dtype), lse, torch.empty(0), torch.empty(0)


@pytest.fixture
def cuda_kernels():
    """CPU implementations of both kernels."""
    library = torch.library.Library("aten", "IMPL")
    library.impl(FLASH, flash_on_cpu, "CPU")
    library.impl(EFFICIENT, efficient_on_cpu, "CPU")
    yield
    library._destroy()


def use_kernel_of(monkeypatch, capability):
    """Choose kernels as on a CUDA card of this compute capability."""
    choose = rx.choose_kernel

    def on_the_card(x):
        cuda = SimpleNamespace(device=torch.device("cuda"), is_cuda=True, shape=x.shape,
                               dtype=x.dtype)
        return choose(cuda)
    monkeypatch.setattr(rx, "choose_kernel", on_the_card)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("torch.backends.cuda.is_flash_attention_available", lambda: True)


@pytest.mark.parametrize("capability, dtype, head_dim, kernel", [
    ((9, 0), torch.bfloat16, 128, "flash"), ((8, 0), torch.float16, 256, "flash"),
    ((8, 0), torch.float32, 128, "efficient"), ((8, 0), torch.bfloat16, 264, "efficient"),
    ((7, 5), torch.float16, 128, "efficient"), ((7, 5), torch.bfloat16, 128, "blockwise"),
    ((9, 0), torch.bfloat16, 12, "blockwise"), ((9, 0), torch.float64, 128, "blockwise")])
def test_each_card_gets_a_kernel_it_can_run(capability, dtype, head_dim, kernel, monkeypatch):
    use_kernel_of(monkeypatch, capability)
    assert rx.choose_kernel(torch.empty(1, 1, 1, head_dim, dtype=dtype)) == kernel


def methods_for(n_heads, half, T, window):
    """For heads of `half` frequencies and T tokens."""
    return {
        "rope": rx.rope(),
        "rerope": rx.rerope(window),
        "dpe": rx.dpe(window, 3, torch.arange(n_heads * half).view(n_heads, half) % 3 < 2),
        "lampe": rx.lampe(T, T // 4, window, 16),
    }


SMALL = methods_for(8, 16, 150, 40)
LLAMA_3_8B = methods_for(32, 64, 131072, 1024)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("capability, dtype, tolerance", [
    ((9, 0), torch.bfloat16, 3e-2), ((9, 0), torch.float32, 1e-5), ((7, 5), torch.float16, 3e-2),
    ((7, 5), torch.bfloat16, 3e-2)])  # flash, efficient twice, and no kernel
def test_every_method_on_every_card_is_dense_attention(name, capability, dtype, tolerance,
                                                       monkeypatch, cuda_kernels):
    use_kernel_of(monkeypatch, capability)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 8, 150, 32, generator=generator).to(dtype)
    k, v = torch.randn(2, 2, 2, 150, 32, generator=generator).to(dtype)
    arguments = dict(method=SMALL[name], frequencies=rx.rope_frequencies(32, 10000.0))
    exact = rx.attend_dense(q.double(), k.double(), v.double(), **arguments)
    prefill = rx.attend(q, k, v, **arguments)
    second = rx.attend(q[:, :, 90:], k, v, **arguments)  # a prefill on a filled cache
    decoded = rx.attend(q[:, :, -1:], k, v, **arguments)
    torch.testing.assert_close(prefill.double(), exact, atol=tolerance, rtol=0)
    torch.testing.assert_close(second.double(), exact[:, :, 90:], atol=tolerance, rtol=0)
    torch.testing.assert_close(decoded.double(), exact[:, :, -1:], atol=tolerance, rtol=0)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple) else (result,)
        for tensor in results:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", LLAMA_3_8B)
def test_no_tensor_of_llama_3_8b_at_131072_tokens_is_larger_than_its_queries(name, monkeypatch):
    use_kernel_of(monkeypatch, (9, 0))
    T = 131072
    with LargestTensor() as largest:
        q = torch.empty(1, T, 32, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        k, v = torch.empty(2, 1, 8, T, 128, dtype=torch.bfloat16, device="meta")
        frequencies = rx.rope_frequencies(128, 500000.0)
        out = rx.attend(q, k, v, LLAMA_3_8B[name], frequencies)
        one = rx.attend(q[:, :, -1:], k, v, LLAMA_3_8B[name], frequencies)
    assert out.shape == q.shape
    assert one.shape == (1, 32, 1, 128)
    assert largest.bytes <= q.untyped_storage().nbytes()
