"""Random weights in the shape of a published model, to see what a length costs before a download.

needle.py and bench.py take random:small, random:1b, random:3b, random:8b or random:70b as a
checkpoint. What such a model answers means nothing.
"""
import torch

from extras.memory import memory_free
from model import Config, Llama, RopeScaling

LLAMA_3 = dict(vocab_size=128256, n_kv_heads=8, rope_theta=500000.0)
LLAMA_32 = dict(ffn_dim=8192, train_len=131072, rope_scaling=RopeScaling(factor=32.0), tied=True)

SHAPES = {
    # Llama 3.2 1B and 3B
    "1b": Config(dim=2048, n_layers=16, n_heads=32, head_dim=64, **LLAMA_3, **LLAMA_32),
    "3b": Config(dim=3072, n_layers=28, n_heads=24, head_dim=128, **LLAMA_3, **LLAMA_32),
    # Llama 3 8B and 70B
    "8b": Config(dim=4096, n_layers=32, n_heads=32, head_dim=128, ffn_dim=14336, train_len=8192,
                 **LLAMA_3),
    "70b": Config(dim=8192, n_layers=80, n_heads=64, head_dim=128, ffn_dim=28672, train_len=8192,
                  **LLAMA_3),
    # Two layers with heads of 128, for a CPU
    "small": Config(vocab_size=4096, dim=512, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=128,
                    ffn_dim=1024, train_len=4096),
}


def random_model(shape: str, device=None, dtype=None, mesh=None) -> Llama:
    """A model of a published shape with random weights from seed 0, in eval mode.

    device: None for the CPU. dtype: None for bfloat16. mesh: a 1-D DeviceMesh whose ranks hold
    the model together, or None.
    Raises ValueError if the shape is unknown, or if the weights do not fit the free memory.
    """
    if shape not in SHAPES:
        names = ", ".join(f"random:{name}" for name in SHAPES)
        raise ValueError(f"random:{shape} is not a published shape; use one of {names}")
    device = torch.device(device or "cpu")
    with torch.device("meta"):
        model = Llama(SHAPES[shape]).to(dtype or torch.bfloat16)
    ranks = 1
    if mesh is not None:
        from extras.parallel import shard
        shard(model, mesh)
        ranks = mesh.size()
    needed = sum(parameter.nbytes for parameter in model.parameters()) / ranks
    free = memory_free(device)
    if free is not None and needed > free:
        raise ValueError(f"random:{shape} has {needed / 1e9:.1f} GB of weights, and only "
                         f"{free / 1e9:.1f} GB are free")

    model = model.to_empty(device=device).eval().requires_grad_(False)
    # Every rank draws from the same seed, so that parameters that are not divided are equal.
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        own = parameter
        if mesh is not None and hasattr(parameter, "to_local"):
            own = parameter.to_local()
        if "norm" in name:
            own.fill_(1)
        else:
            own.normal_(0, 0.02, generator=generator)
    return model
