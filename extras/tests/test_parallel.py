"""Several ranks, which are processes on the CPU here: one model on all of them, copies, or both."""
import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import start_processes

import extras.parallel  # here, so that it is imported once and not in each process
import needle
import rope_extrap as rx
from extras.loss import float32_logits
from extras.random_weights import SHAPES, random_model
from extras.tests.checkpoints import TOKENS, write_hugging_face, write_meta
from extras.tests.helpers import TINY, command, random_llama
from load_llama import load_model
from model import KVCache

pytestmark = pytest.mark.skipif(not extras.parallel.dist.is_gloo_available(),
                                reason="ranks on a CPU communicate by gloo")

# A process that has used CUDA, as other tests may, cannot be forked.
START = "spawn" if torch.cuda.is_available() else "fork"

# -------------------------------------------------------------------------------------------------
# Four ranks that hold one model together

WIDE = dict(n_heads=8, n_kv_heads=4, head_dim=16, ffn_dim=352)
CHECKPOINTS = {  # changes to the model; how it is written, and with which changes
    "Llama, three files": (WIDE | dict(vocab_size=50), write_hugging_face, dict(shards=3)),
    "Qwen2, tied": (WIDE | dict(qkv_bias=True, tied=True), write_hugging_face,
                    dict(family="Qwen2")),
    "Meta, two parts": (WIDE | dict(dim=128), write_meta, dict(parts=2)),
}
DPE = rx.dpe(9, [4, 4, 2, 8, 8, 2, 2, 1])
OTHERS = [rx.rope(), rx.lampe(40, 20, 6, 4), rx.yarn(rx.rope_frequencies(16, 500000.0), 4.0, 16)]
KEY_DIMS = torch.arange(64).view(8, 8) % 5 < 3  # (heads, D/2)


def join_ranks(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / 'ranks'}", rank=rank, world_size=4)


def check_slices(model, whole, mesh):
    """A rank holds its slice of each large parameter, and keeps nothing else in memory."""
    for parameter, (name, of_all) in zip(model.parameters(), whole.named_parameters(),
                                         strict=True):
        is_whole = "norm" in name or (whole.config.tied and name.startswith("tok_embeddings"))
        if is_whole:
            assert parameter.equal(of_all)
            continue
        own = parameter.to_local()
        size = of_all.shape[parameter.placements[0].dim]
        of_largest = math.ceil(size / mesh.size()) / size  # its share of the parameter
        assert own.numel() <= of_largest * of_all.numel() + 1e-6
        assert own.untyped_storage().nbytes() == own.numel() * 4


def prefill_and_decode(model, methods):
    """The logits of one forward pass, and of a prefill with three decoded tokens; the cache."""
    cache = KVCache(model.config, 1, 40)
    parts = TOKENS.split([37, 1, 1, 1], dim=1)
    decoded = [model(part, methods, cache) for part in parts]
    return torch.cat([model(TOKENS, methods), *decoded], dim=1), cache


def check_logits(model, whole, mesh, method):
    own_method = method
    if method.key_dims is not None:  # those of the rank's heads
        own_key_dims = method.key_dims.chunk(mesh.size())[mesh.get_local_rank()]
        own_method = dataclasses.replace(method, key_dims=own_key_dims)
    expected, _ = prefill_and_decode(whole, [method] * 2)
    found, cache = prefill_and_decode(model, [own_method] * 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert cache.k.shape[2] == 4 // mesh.size()  # the rank's KV heads


def load_on_ranks(rank, path):
    join_ranks(rank, path)
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "tensor"))
    four = init_device_mesh("cpu", (4,))
    for name in CHECKPOINTS:
        whole = load_model(path / name)
        for mesh in (pairs["tensor"], four):
            model = load_model(path / name, mesh=mesh)
            check_slices(model, whole, mesh)
            check_logits(model, whole, mesh, dataclasses.replace(DPE, key_dims=KEY_DIMS))
    for method in (DPE, *OTHERS):
        check_logits(model, whole, mesh, method)
    dist.destroy_process_group()


def test_ranks_hold_slices_and_give_the_whole_models_logits(tmp_path):
    for name, (changes, write, written) in CHECKPOINTS.items():
        (tmp_path / name).mkdir()
        model = random_llama(**changes)
        for layer in model.layers:  # flatter attention, which grows rounding errors less
            layer.attention.wq.weight *= 0.3
        write(model, tmp_path / name, **written)
    start_processes(load_on_ranks, (tmp_path,), nprocs=4, start_method=START)


def gather(logits):
    everyones = [torch.empty_like(logits) for _ in range(4)]
    dist.all_gather(everyones, logits.contiguous())
    return everyones


def random_on_ranks(rank, path):
    join_ranks(rank, path)
    mesh = init_device_mesh("cpu", (4,))
    config = random_llama(**WIDE).config
    for tied in (False, True):
        SHAPES["tiny"] = dataclasses.replace(config, tied=tied)
        model = random_model("tiny", mesh=mesh)
        assert model.layers[1].attention.wq.weight.to_local().shape == (32, 64)
        logits = model(TOKENS)
        assert logits.isfinite().all()
        for others in gather(logits):  # or ranks would go on with different tokens
            assert others.equal(logits)
        assert logits.equal(logits.bfloat16().float())
        float32_logits(model)
        finer = model(TOKENS)
        torch.testing.assert_close(finer, logits, atol=2e-2, rtol=2e-2)
        assert not finer.equal(finer.bfloat16().float())

    for changes in (dict(n_heads=6, n_kv_heads=2), dict(n_kv_heads=2), dict(ffn_dim=90)):
        SHAPES["odd"] = dataclasses.replace(config, **changes)
        name, size = next(iter(changes.items()))
        with pytest.raises(ValueError, match=f"^{name} {size} cannot be divided among 4 ranks$"):
            random_model("odd", mesh=mesh)
    dist.destroy_process_group()


def test_ranks_share_random_weights_and_refuse_odd_shapes(tmp_path):
    start_processes(random_on_ranks, (tmp_path,), nprocs=4, start_method=START)


# -------------------------------------------------------------------------------------------------
# needle.py on several ranks

RUN = ["--method", "dpe", "--set", "topk=10", "--train-len", "100", "--depths", "1"]


def rows_of(file):
    """The rows that a run wrote, without what differs between runs."""
    if not file.exists():
        return []
    rows = json.loads(file.read_text())["results"]
    for row in rows:
        del row["prefill_seconds"]
        del row["decode_seconds"]
    return rows


def needle_on_ranks(rank, world_size, port, path, tp, lengths):
    """needle.py as torchrun starts it."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    needle.RANK = rank
    needle.WORLD_SIZE = world_size
    sys.argv = ["needle.py", *RUN, "--device", "cpu", "--len", lengths, "--tp", str(tp),
                "--json", str(path / "out.json")]
    with (path / "out").open("a") as sys.stdout:
        out = sys.stdout
        needle.run_command(needle.main)
        out.flush()


@pytest.mark.parametrize("world_size, tp, lengths", [(2, 1, "150,180,240"), (4, 2, "150,240")])
def test_ranks_give_the_rows_of_one_process(world_size, tp, lengths, monkeypatch, capsys,
                                            tmp_path):
    assert command(monkeypatch, *RUN, "--len", lengths, "--json", tmp_path / "one.json") == 0
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    arguments = (world_size, port, tmp_path, tp, lengths)
    start_processes(needle_on_ranks, arguments, nprocs=world_size, start_method=START)

    rows, expected = rows_of(tmp_path / "out.json"), rows_of(tmp_path / "one.json")
    for row, of_one in zip(rows, expected, strict=True):
        assert row.pop("log_likelihood") == pytest.approx(of_one.pop("log_likelihood"), abs=1e-3)
        assert row == of_one
    out = (tmp_path / "out").read_text().splitlines()
    assert len(out) == len(capsys.readouterr().out.splitlines())  # one rank prints
    printed = [int(line.split()[1]) for line in out if " score " in line]
    assert printed == sorted(printed, reverse=True)  # replicas take the longest first


def torchrun(ranks, *arguments):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    run += [TINY.parent / "needle.py", "--device", "cpu", *map(str, arguments)]
    return subprocess.Popen(run, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(not Path("/proc").exists(), reason="children are found as on Linux")
def test_a_killed_rank_ends_the_others_and_loses_no_row(tmp_path):
    file = tmp_path / "out.json"
    process = torchrun(2, "--len", 250, "--trials", 9999, "--json", file)
    deadline = time.time() + 240
    while not rows_of(file) and time.time() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ranks = children.read_text().split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=240)
    assert process.returncode != 0
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    written = len(rows_of(file))
    assert written >= 1
    assert out.count(" score ") - written in (0, 1)  # the last may be printed and not yet written


def test_ranks_that_cannot_run_say_so_once():
    out, err = torchrun(2, "--tp", 4).communicate(timeout=240)
    said = [line for line in err.splitlines() if line.startswith("needle.py: ")]
    assert out == ""
    assert said == ["needle.py: --tp 4 needs torchrun with 4 processes or a multiple of it, and "
                    "there are 2"]


def test_a_rank_says_why_it_failed_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # run_command replaces that of a rank above 0
    monkeypatch.setattr(needle, "RANK", 3)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert command(monkeypatch, "--ckpt", "nowhere") == 2
    assert "nowhere is not a directory" in capsys.readouterr().err
