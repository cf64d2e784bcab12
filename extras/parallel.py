"""Several GPUs under torchrun: one model on several of them, copies of it, or both.

torchrun starts one process, a rank, for each GPU. The ranks form a mesh of (replicas, tensor):
those in a row hold one model together (tensor parallelism), and each row is a replica, which
takes its share of the trials. The forward pass knows nothing of this: parameters are DTensors,
and the hooks that parallelize_module installs communicate between ranks.
"""
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from model import Llama


def start(device_type: str, tp: int) -> tuple[torch.device, DeviceMesh]:
    """Connect the ranks that torchrun started.

    tp is the number of ranks that hold one model together. Returns this rank's device, and the
    mesh (replicas, tensor).
    Raises ValueError if tp does not divide the number of ranks.
    """
    # The timeout is long because a rank may take long to load its weights.
    dist.init_process_group(timeout=timedelta(hours=6))
    world_size = dist.get_world_size()
    if world_size % tp != 0:
        raise ValueError(f"--tp {tp} needs torchrun with {tp} processes or a multiple of it, and "
                         f"there are {world_size}")
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    shape = (world_size // tp, tp)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicas", "tensor"))
    return device, mesh


def shard(model: Llama, mesh: DeviceMesh) -> None:
    """Divide the large matrices of a model on the meta device among the ranks of a 1-D mesh.

    Each rank gets its own attention heads, its part of the feed-forward layer, and its part of
    the vocabulary. Norms, and an embedding that is tied to the output, stay whole on every rank.
    Raises ValueError if the ranks do not divide heads, KV heads or ffn_dim.
    """
    ranks = mesh.size()
    for name in ("n_heads", "n_kv_heads", "ffn_dim"):
        size = getattr(model.config, name)
        if size % ranks != 0:
            raise ValueError(f"{name} {size} cannot be divided among {ranks} ranks")

    # A column-parallel matrix keeps its outputs on their ranks; the row-parallel matrix that
    # follows takes them as they are and sums over ranks.
    plan = {
        "layers.*.attention.wq": ColwiseParallel(),
        "layers.*.attention.wk": ColwiseParallel(),
        "layers.*.attention.wv": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(),
        "layers.*.feed_forward.w1": ColwiseParallel(),
        "layers.*.feed_forward.w3": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(),
    }
    if not model.config.tied:
        plan["tok_embeddings"] = RowwiseParallel(input_layouts=Replicate())
        plan["output"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(model, mesh, plan, src_data_rank=None)


def local_slice(tensor: Tensor, parameter: Tensor, device, dtype) -> Tensor:
    """What this rank keeps of a whole tensor, on the device.

    parameter is the model's, after shard. If it is divided, this is a DTensor with a copy of the
    rank's slice, so that the whole tensor can be freed; otherwise it is all of the tensor.
    """
    if not isinstance(parameter, DTensor):
        return tensor.to(device=device, dtype=dtype)
    mesh = parameter.device_mesh
    placement = parameter.placements[0]
    slices = tensor.chunk(mesh.size(), dim=placement.dim)
    own = slices[mesh.get_local_rank()].to(device=device, dtype=dtype, copy=True)
    return DTensor.from_local(own, mesh, parameter.placements, run_check=False,
                              shape=tensor.shape, stride=parameter.stride())


def share_trials(trials: list, mesh: DeviceMesh, run_trial):
    """Yield (trial, run_trial(trial)) for every trial, on every rank.

    Each turn gives one trial to each replica and ends when the slowest is done, so the trials of a
    turn should take about equally long.
    """
    replicas = mesh.size(0)
    own = mesh.get_local_rank("replicas")
    for start_of_turn in range(0, len(trials), replicas):
        turn = trials[start_of_turn:start_of_turn + replicas]
        result = None  # the last turn may have fewer trials than there are replicas
        if own < len(turn):
            result = run_trial(turn[own])
        results = [None] * replicas
        dist.all_gather_object(results, result, group=mesh.get_group("replicas"))
        yield from zip(turn, results, strict=False)
