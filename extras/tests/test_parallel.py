"""extras/parallel.py: ranks, which are processes on the CPU here, give what one process gives."""
import json
import os
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.multiprocessing import ProcessExitedException, start_processes

import load_llama
import rope_extrap as rx
from extras import bench, parallel
from extras.tests.checkpoints import TOKENS, write_hugging_face, write_meta
from extras.tests.helpers import command, random_llama
from model import generate, measure_contributions
from tiny.grammar import TINY

# A process that has used CUDA, as other tests may, cannot be forked.
START = "spawn" if torch.cuda.is_available() else "fork"

# -------------------------------------------------------------------------------------------------
# What a rank holds and computes

SHAPE = dict(n_heads=8, n_kv_heads=4, head_dim=16, ffn_dim=352)
CHECKPOINTS = {  # changes to the shape; how the checkpoint is written, and with which arguments
    # 49 tokens cannot be divided equally.
    "Qwen2, tied": (dict(qkv_bias=True, tied=True, vocab_size=49), write_hugging_face,
                    dict(family="Qwen2")),
    "Meta, two parts": (dict(dim=128), write_meta, dict(parts=2)),
}


def one_at_a_time(path, dtype):
    """load_llama.open_checkpoint, which fails if a copy is still held when the next is made."""
    model, tensors = load_llama.open_checkpoint(path, dtype)

    def watched():
        copies = weakref.WeakSet()
        for name, tensor in tensors:
            assert not copies
            if tensor.ndim == 2 and tensor.dtype == torch.float64:  # others are mapped from files
                copies.add(tensor)
            yield name, tensor
            del tensor
    return model, watched()


def check_shares(model, whole, rank):
    """Norms are whole, everything else is cut, and no rank keeps more in memory than its share."""
    for name, of_all in whole.named_parameters():
        parameter = model.get_parameter(name)
        if "norm" in name:
            assert parameter.equal(of_all)
        else:
            own = parameter.to_local()
            assert own.equal(of_all.chunk(2, parameter.placements[0].dim)[rank])
            assert own.untyped_storage().nbytes() == own.nbytes


def key_dims_of_layers(model):
    contributions = measure_contributions(model, TOKENS.tolist())  # (layers, heads, D/2)
    return torch.stack([rx.key_dimensions(of_layer, topk=5) for of_layer in contributions])


def check_results(model, whole, rank):
    """Key dimensions, logits and generated tokens are those of the whole model."""
    own = key_dims_of_layers(model)
    of_all_heads = key_dims_of_layers(whole)
    assert own.equal(of_all_heads.chunk(2, dim=1)[rank])
    methods = [rx.dpe(9, 4, key_dims) for key_dims in own]
    whole_methods = [rx.dpe(9, 4, key_dims) for key_dims in of_all_heads]
    logits = model(TOKENS, methods)
    torch.testing.assert_close(logits, whole(TOKENS, whole_methods), atol=1e-4, rtol=1e-4)
    everyones = [torch.empty_like(logits), torch.empty_like(logits)]
    dist.all_gather(everyones, logits)
    assert everyones[0].equal(everyones[1])  # or the ranks would go on with different tokens
    assert generate(model, TOKENS, 8, methods).equal(generate(whole, TOKENS, 8, whole_methods))


def load_and_check(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path / 'ranks'}", rank=rank, world_size=2)
    bench.open_checkpoint = one_at_a_time
    for name in CHECKPOINTS:
        for dtype in (torch.float64, torch.float32):
            model = parallel.load_model(path / name, dtype=dtype)
            whole = load_llama.load_model(path / name, dtype=dtype)
            check_shares(model, whole, rank)
        check_results(model, whole, rank)
    check_shares(parallel.load_model("random:small"), bench.load_model("random:small"), rank)
    dist.destroy_process_group()


def test_a_rank_holds_its_share_and_gives_the_whole_models_results(tmp_path):
    for name, (changes, write, arguments) in CHECKPOINTS.items():
        (tmp_path / name).mkdir()
        write(random_llama(**SHAPE | changes), tmp_path / name, **arguments)
    start_processes(load_and_check, (tmp_path,), nprocs=2, start_method=START)


# -------------------------------------------------------------------------------------------------
# Commands

# Settings as if published for the bundled model
PLANTED = dict(shape=(256, 2, 949, 100), dpe=dict(window=12, effective_lengths=[50, 100], topk=10))
RUN = ["--method", "dpe,lampe", "--train-len", "100", "--len", "150,240", "--depths", "0.5",
       "--device", "cpu"]


def test_ranks_give_the_rows_and_the_header_of_one_process(monkeypatch, capfd, tmp_path):
    checkpoint = shutil.copytree(TINY, tmp_path / "tiny",
                                 ignore=lambda *_: ["extrapolation.json"])
    arguments = [*RUN, "--ckpt", checkpoint, "--json"]
    monkeypatch.setitem(rx.PUBLISHED, "planted", PLANTED)
    assert command(monkeypatch, *arguments, tmp_path / "one.json") == 0
    printed_by_one = capfd.readouterr().out.splitlines()

    script = tmp_path / "script.py"
    script.write_text(f"import rope_extrap\n"
                      f"rope_extrap.PUBLISHED['planted'] = {PLANTED}\n"
                      f"from extras.parallel import main\n"
                      f"main()\n")
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "2", script, "needle.py", *arguments,
                    tmp_path / "two.json"], check=True,
                   env=os.environ | dict(PYTHONPATH=str(TINY.parent), OMP_NUM_THREADS="1"))
    printed = capfd.readouterr().out.splitlines()

    header = [line for line in printed if line.startswith("#")]
    assert header == [line for line in printed_by_one if line.startswith("#")]
    assert any("published for planted" in line for line in header)
    assert len(printed) == len(printed_by_one)  # so only one rank prints
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for row, expected in zip(two["results"], one["results"], strict=True):
        expected["prefill_seconds"] = row["prefill_seconds"]
        expected["log_likelihood"] = pytest.approx(expected["log_likelihood"], abs=1e-3)
    assert two == one


def needle_on_four_ranks(rank, path, port):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    sys.argv = ["parallel.py", "needle.py", *RUN]
    sys.stderr = (path / f"{rank}").open("w")
    parallel.main()


def test_a_model_that_the_ranks_do_not_divide_is_refused_once(tmp_path):
    with pytest.raises(ProcessExitedException) as failure:
        start_processes(needle_on_four_ranks, (tmp_path, get_free_port()), nprocs=4,
                        start_method=START)
    assert failure.value.exit_code == 2
    said = [(tmp_path / f"{rank}").read_text() for rank in range(4)]
    assert [text.count("4 ranks cannot equally share") for text in said] == [1, 0, 0, 0]


def test_a_rank_that_fails_alone_says_why(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert command(monkeypatch, "nothing.py", main=parallel.main) == 2
    assert "nothing.py" in capsys.readouterr().err
