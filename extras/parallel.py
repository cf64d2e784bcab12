"""One model on several GPUs: needle.py, or one of the other scripts, under torchrun.

    torchrun --nproc-per-node 8 -m extras.parallel needle.py --ckpt Meta-Llama-3-70B --len 131072

The script is needle.py, extras.calibrate, extras.loss or extras.bench, and its own arguments
follow. torchrun starts one process, called a rank, for each GPU. All ranks run the script on the
same prompts. Each holds some of the attention heads and a part of the feed-forward layers and of
the vocabulary (tensor parallelism); norms and activations are whole on every rank. The forward
pass knows nothing of this: PyTorch's parallelize_module cuts the matrices and installs hooks that
sum or join what the ranks have computed. Only the first rank prints and writes files.
"""
import argparse
import importlib
import io
import os
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from extras.bench import open_model
from model import Llama


def shard(model: Llama, mesh: dist.DeviceMesh) -> None:
    """Cut the matrices of a model on the meta device among the ranks of a 1-D mesh.

    The model's config stays whole, since published settings are found by it.
    Raises ValueError if the ranks cannot equally share heads, KV heads and ffn_dim.
    """
    c = model.config
    if c.n_kv_heads % mesh.size() != 0 or c.ffn_dim % mesh.size() != 0:
        raise ValueError(f"{mesh.size()} ranks cannot equally share {c.n_heads} heads, "
                         f"{c.n_kv_heads} KV heads and an ffn_dim of {c.ffn_dim}")

    # A column-parallel matrix leaves its outputs on their ranks. The row-parallel matrix that
    # follows takes them as they are, and sums over the ranks.
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.attention.wq": ColwiseParallel(),
        "layers.*.attention.wk": ColwiseParallel(),
        "layers.*.attention.wv": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(),
        "layers.*.feed_forward.w1": ColwiseParallel(),
        "layers.*.feed_forward.w3": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan, src_data_rank=None)
    for layer in model.layers:
        layer.attention.n_kv_heads //= mesh.size()  # so that the KV cache has this rank's heads


def load_model(path, device="cpu", dtype=None) -> Llama:
    """load_llama.load_model, but of this rank's share of the model.

    Each tensor is cut before the next one is read, so that a rank holds its share and one tensor.
    Raises CheckpointError, or ValueError if the ranks cannot share the model equally.
    """
    mesh = dist.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    model, tensors = open_model(path, mesh.device_type, dtype)
    shard(model, mesh)
    shares = {}
    for name, tensor in tensors:
        parameter = model.get_parameter(name)
        if isinstance(parameter, DTensor):
            shares[name] = distribute_tensor(tensor, mesh, parameter.placements,
                                             src_data_rank=None)
        else:
            shares[name] = tensor.to(mesh.device_type)
        del tensor  # before the next one is read
    model.load_state_dict(shares, assign=True)
    # In inference mode, DTensor takes 0.1 s for each matrix and each new length; otherwise little.
    model.forward = torch.inference_mode(False)(model.forward)
    return model.eval().requires_grad_(False)


def run(is_first: bool, directory: str | None = None) -> None:
    """Run the script that the command line names.

    If this is not the first rank, it gets no option that names an output file, and what it writes
    nevertheless is written to the directory.
    """
    parser = argparse.ArgumentParser(
        prog="extras.parallel", add_help=False,
        usage="torchrun --nproc-per-node N -m extras.parallel SCRIPT ARGUMENTS")
    parser.add_argument("script", choices=["needle.py", "extras.calibrate", "extras.loss",
                                           "extras.bench"])
    for output in ("--json", "--plot", "--out"):
        parser.add_argument(output)
    args, without_outputs = parser.parse_known_args()
    if not dist.is_torchelastic_launched():
        parser.error("start it with torchrun")
    sys.argv = sys.argv[1:] if is_first else [args.script, *without_outputs]
    if args.script == "extras.calibrate" and not is_first:  # its default is in the checkpoint
        sys.argv += ["--out", f"{directory}/extrapolation.json"]
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(timeout=timedelta(hours=1))  # for ranks that take long to load
    importlib.import_module(args.script.removesuffix(".py")).main(load_model=load_model)
    dist.destroy_process_group()


def main() -> None:
    if os.environ.get("RANK", "0") == "0":
        run(is_first=True)
    else:
        try:
            with (tempfile.TemporaryDirectory() as directory, open(os.devnull, "w") as nowhere,
                  redirect_stdout(nowhere), redirect_stderr(io.StringIO()) as said):
                run(is_first=False, directory=directory)
        except BaseException:
            # If the first rank fails too, it says why, and torchrun ends this one meanwhile.
            time.sleep(10)
            sys.stderr.write(said.getvalue())
            raise


if __name__ == "__main__":
    main()
