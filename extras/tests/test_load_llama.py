"""Checkpoints: both layouts give the weights back, and what cannot be loaded is refused."""
import math
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from extras.tests.checkpoints import (
    ABSENT,
    META_SHAPE,
    TOKENS,
    damaged,
    edit_json,
    same_logits,
    write_hugging_face,
    write_meta,
)
from extras.tests.helpers import random_llama
from load_llama import CheckpointError, load_model, meta_config
from model import KVCache, RopeScaling

# -------------------------------------------------------------------------------------------------
# What loads

SCALED = dict(rope_scaling=RopeScaling())
LLAMA_31 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)
LAYOUTS = {  # changes to the model; how it is written; with which changes
    "one file": ({}, write_hugging_face, {}),
    "shards": ({}, write_hugging_face, dict(shards=3)),
    "tied": (dict(tied=True), write_hugging_face, {}),
    "Llama 1, with keys absent": (
        dict(n_kv_heads=4, head_dim=16, rope_theta=10000.0), write_hugging_face,
        dict(num_key_value_heads=ABSENT, head_dim=ABSENT, rope_theta=ABSENT)),
    "keys null": (
        dict(n_kv_heads=4), write_hugging_face, dict(num_key_value_heads=None, rope_scaling=None)),
    "rope_scaling": (
        SCALED, write_hugging_face, dict(rope_scaling={"rope_type": "llama3", **LLAMA_31})),
    "rope_scaling with type": (
        SCALED, write_hugging_face, dict(rope_scaling={"type": "llama3", **LLAMA_31})),
    "rope_parameters": (
        SCALED, write_hugging_face,
        dict(rope_theta=ABSENT,
             rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA_31})),
    "rope_parameters beside rope_theta": (
        {}, write_hugging_face, dict(rope_parameters={"rope_type": "default"})),
    "rope_parameters with another rope_theta": (
        {}, write_hugging_face,
        dict(rope_theta=7.0, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})),
    "Mistral": (
        {}, write_hugging_face,
        dict(family="Mistral", architectures=None, model_type="mistral")),
    "Mistral, shards": (
        dict(head_dim=16), write_hugging_face, dict(family="Mistral", shards=2, head_dim=None)),
    "Qwen2": (
        dict(qkv_bias=True, head_dim=16), write_hugging_face,
        dict(family="Qwen2", use_sliding_window=False, layer_types=["full_attention"] * 2,
             head_dim=ABSENT)),
    "Qwen2, shards, tied": (
        dict(qkv_bias=True, tied=True), write_hugging_face, dict(family="Qwen2", shards=4)),
    "Meta": (META_SHAPE, write_meta, dict(max_seq_len=64)),
    "Meta, two parts": (META_SHAPE, write_meta, dict(parts=2)),
    "Meta, ffn_dim_multiplier and scaled RoPE": (
        META_SHAPE | dict(ffn_dim=448) | SCALED, write_meta,
        dict(ffn_dim_multiplier=1.3, use_scaled_rope=True)),
    "Meta, factor 32": (
        META_SHAPE | dict(rope_scaling=RopeScaling(32.0)), write_meta,
        dict(use_scaled_rope=True, rope_scaling_factor=32)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_gives_the_logits_of_its_model(layout, tmp_path):
    changes, write, written = LAYOUTS[layout]
    model = random_llama(**changes)
    write(model, tmp_path, **written)
    loaded = load_model(tmp_path)
    same_logits(loaded, model)
    assert not loaded.training
    assert sum(p.numel() for p in loaded.parameters()) == sum(
        p.numel() for p in model.parameters())

    cache = KVCache(loaded.config, 1, 40)
    decoded = [loaded(part, cache=cache) for part in TOKENS.split([36, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(decoded, dim=1), model(TOKENS), atol=1e-4, rtol=1e-4)


def test_rotary_rows_are_apart_on_disk_and_together_here(tmp_path):
    model = random_llama(dim=8, n_heads=2, n_kv_heads=2, head_dim=4, ffn_dim=32, qkv_bias=True)
    write_hugging_face(model, tmp_path, "Qwen2")
    rows = torch.arange(8.0)  # of two heads; on disk, the pairs of the first are (0, 2) and (1, 3)
    edit_tensors(tmp_path / "model.safetensors", {
        "model.layers.0.self_attn.q_proj.weight": rows[:, None].repeat(1, 8),
        "model.layers.0.self_attn.k_proj.bias": rows.clone(),
        "model.layers.0.self_attn.v_proj.bias": rows.clone()})
    attention = load_model(tmp_path).layers[0].attention
    assert attention.wq.weight[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert attention.wk.bias.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert attention.wv.bias.tolist() == rows.tolist()


@pytest.mark.parametrize("write", [write_hugging_face, write_meta])
def test_all_weights_have_the_dtype_of_the_embedding(write, tmp_path):
    model = random_llama(**META_SHAPE).bfloat16()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    write(model, tmp_path)
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded(TOKENS).isfinite().all()


@pytest.mark.parametrize("write", [write_hugging_face, write_meta])
def test_all_weights_have_the_dtype_that_is_asked_for(write, tmp_path):
    model = random_llama(**META_SHAPE).bfloat16()
    write(model, tmp_path)
    same_logits(load_model(tmp_path, dtype=torch.float32), model.float())


def test_of_two_layouts_the_outer_one_is_loaded(tmp_path):
    write_hugging_face(random_llama(1), tmp_path)
    (tmp_path / "original").mkdir()
    write_meta(random_llama(2, **META_SHAPE), tmp_path / "original")
    same_logits(load_model(tmp_path), random_llama(1))


def test_what_other_programs_leave_in_a_file_is_ignored(tmp_path):
    model = random_llama(tied=True)
    write_hugging_face(model, tmp_path)
    edit_tensors(tmp_path / "model.safetensors", {
        "lm_head.weight": torch.zeros(48, 64),  # of a tied model
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)})
    same_logits(load_model(tmp_path), model)


def config_of(**params):
    shape = dict(dim=128, n_layers=2, n_heads=4, vocab_size=9)
    return meta_config("params.json", shape | params, 0)


@pytest.mark.parametrize("params, train_len", [
    ({}, 4096), ({"rope_theta": 500000.0}, 8192), ({"use_scaled_rope": True}, 131072),
    ({"max_seq_len": 77}, 77)])
def test_the_training_length_of_metas_releases(params, train_len):
    assert config_of(**params).train_len == train_len


@pytest.mark.parametrize("dim, factor", [(2048, 32), (3072, 32), (4096, 8), (8192, 8)])
def test_llama_32_scales_by_32_and_llama_31_by_8(dim, factor):
    assert config_of(dim=dim, use_scaled_rope=True).rope_scaling == RopeScaling(factor)
    assert config_of(dim=dim).rope_scaling is None


# -------------------------------------------------------------------------------------------------
# What is refused


class Code:
    """Pickled, it would run when it is read."""

    def __reduce__(self):
        return print, ("this must never run",)


def edit_tensors(file, changes, drop=None):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items() if name != drop}
    save_file(tensors | changes, file)


def remove(name):
    return lambda path: (path / name).unlink()


def empty(path):
    for file in path.iterdir():
        file.unlink()


def leave_configurations(path):
    (path / "model.safetensors").unlink()
    (path / "params.json").write_text("{}")


def write(name, text):
    return lambda path: (path / name).write_text(text)


def truncate(name):
    def edit(path):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-100])
    return edit


def config(**changes):
    return lambda path: edit_json(path / "config.json", **changes)


def tensors(changes=None, drop=None):
    def edit(path):
        for file in path.glob("*.safetensors"):
            edit_tensors(file, changes or {}, drop)
    return edit


def parts(change, pattern="*.pth"):
    def edit(path):
        for file in path.glob(pattern):
            torch.save(change(torch.load(file)), file)
    return edit


def without(name):
    return lambda part: {key: tensor for key, tensor in part.items() if key != name}


def code(path):
    torch.save({"output.weight": Code()}, path / "consolidated.00.pth")


DAMAGE = {  # the checkpoint, what is done to it, and what the refusal names
    "no directory": ("one", lambda path: path.rename(path.parent / "moved"),
                     ["is not a directory"]),
    "nothing in it": ("one", empty, ["config.json", "params.json"]),
    "weights without config": ("one", remove("config.json"), ["config.json is missing"]),
    "config without weights": ("one", remove("model.safetensors"),
                               ["model.safetensors is missing"]),
    "config and params without weights": ("one", leave_configurations,
                                          ["model.safetensors is missing"]),
    "absent shard": ("shards", remove("model-00002-of-00003.safetensors"),
                     ["model-00002-of-00003.safetensors is missing"]),
    "no weight_map": ("shards", write("model.safetensors.index.json", "{}"), ["weight_map"]),
    "no JSON": ("one", write("config.json", "{"), ["config.json cannot be read as JSON"]),
    "no object": ("one", write("config.json", "[]"), ["config.json holds no JSON object"]),
    "no number": ("one", config(hidden_size="64"), ["config.json", "hidden_size", "'64'"]),
    "no whole number": ("one", config(hidden_size=64.5), ["hidden_size", "64.5", "whole number"]),
    "zero": ("one", config(num_hidden_layers=0), ["num_hidden_layers", "0", "positive"]),
    "endless": ("one", config(hidden_size=math.inf), ["hidden_size", "inf"]),
    "too large": (
        "one", config(hidden_size=2 ** 30, vocab_size=2 ** 30, num_attention_heads=2 ** 30),
        ["invalid"]),
    "no key": ("one", config(hidden_size=ABSENT), ["config.json lacks hidden_size"]),
    "odd heads": ("one", config(num_key_value_heads=3), ["4 heads", "3 KV heads"]),
    "odd head_dim": ("one", config(head_dim=33), ["head_dim of 33"]),
    "architecture": ("one", config(architectures=["GPT2LMHeadModel"]),
                     ["config.json", "GPT2LMHeadModel", "Mistral"]),
    "rope type": ("one", config(rope_scaling={"rope_type": "yarn", "factor": 4}),
                  ["config.json", "'yarn'"]),
    "rope type of transformers 5": (
        "one", config(rope_parameters={"rope_type": "linear"}), ["'linear'"]),
    "rope no object": ("one", config(rope_scaling="linear"), ["config.json", "'linear'"]),
    "rope without its factor": ("one", config(rope_scaling={"rope_type": "llama3"}),
                                ["config.json lacks factor"]),
    "rope by layer type": (
        "one", config(rope_parameters={"full_attention": {"rope_theta": 5.0}}),
        ["rope_type None"]),
    "rope of some dimensions": (
        "one", config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        ["partial_rotary_factor"]),
    "activation": ("one", config(hidden_act="gelu"), ["hidden_act", "'gelu'"]),
    "bias": ("one", config(attention_bias=True), ["attention_bias"]),
    "bias of the feed-forward layer": ("one", config(mlp_bias=True), ["mlp_bias"]),
    "sliding Mistral": ("Mistral", config(sliding_window=4096),
                        ["config.json", "sliding_window 4096"]),
    "sliding by default": ("Mistral", config(sliding_window=ABSENT), ["sliding_window 4096"]),
    "sliding Qwen2": ("Qwen2", config(use_sliding_window=True), ["use_sliding_window"]),
    "a sliding layer": (
        "Qwen2", config(layer_types=["full_attention", "sliding_attention"]), ["layer_types"]),
    "KV heads not told": ("Qwen2", config(num_key_value_heads=ABSENT),
                          ["config.json lacks num_key_value_heads"]),
    "theta not told": ("Qwen2", config(rope_theta=ABSENT), ["config.json lacks rope_theta"]),
    "missing bias": ("Qwen2", tensors(drop="model.layers.1.self_attn.k_proj.bias"),
                     ["model.layers.1.self_attn.k_proj.bias is missing"]),
    "missing tensor": ("one", tensors(drop="model.norm.weight"),
                       ["model.safetensors", "model.norm.weight is missing"]),
    "missing from shards": ("shards", tensors(drop="model.norm.weight"),
                            ["model.norm.weight is missing"]),
    "extra tensor": ("one", tensors({"extra": torch.zeros(1)}),
                     ["model.safetensors", "tensor extra is unknown"]),
    "wrong shape": ("one", tensors({"lm_head.weight": torch.zeros(9, 64)}),
                    ["lm_head.weight", "(9, 64)", "(48, 64)"]),
    "integers": ("one", tensors({"lm_head.weight": torch.zeros(48, 64, dtype=torch.int8)}),
                 ["lm_head.weight", "int8"]),
    "truncated": ("one", truncate("model.safetensors"), ["model.safetensors is damaged"]),
    "Meta, truncated": ("meta", truncate("consolidated.01.pth"),
                        ["consolidated.01.pth is damaged"]),
    "Meta, no first part": ("meta", remove("consolidated.00.pth"),
                            ["consolidated.00.pth is missing"]),
    "Meta, no last part": ("meta", remove("consolidated.01.pth"), ["(48, 64)", "(48, 128)"]),
    "Meta, a shorter part": ("meta", parts(without("norm.weight"), "*.01.pth"),
                             ["norm.weight is not in every part"]),
    "Meta, a longer part": ("meta", parts(lambda part: part | {"b": torch.ones(9)}, "*.01.pth"),
                            ["tensor b is not in every part"]),
    "Meta, a part of another model": (
        "meta", parts(lambda part: part | {"norm.weight": torch.ones(9)}, "*.01.pth"),
        ["norm.weight is not in every part in the same shape"]),
    "Meta, no params": ("meta", remove("params.json"), ["params.json is missing"]),
    "Meta, code": ("meta", code, ["consolidated.00.pth holds more than tensors"]),
    "Meta, no tensors": ("meta", parts(lambda part: [1, 2]), ["is not a dictionary of tensors"]),
    "Meta, no names": ("meta", parts(lambda part: dict(enumerate(part.values()))),
                       ["is not a dictionary of tensors"]),
    "Meta, missing tensor": ("meta", parts(without("norm.weight")), ["norm.weight is missing"]),
    "Meta, missing output": ("meta", parts(without("output.weight")),
                             ["output.weight is missing"]),
}


def write_checkpoint(kind, path):
    path.mkdir()
    if kind == "meta":
        write_meta(random_llama(**META_SHAPE), path, parts=2, vocab_size=48)
    elif kind in ("Mistral", "Qwen2"):
        write_hugging_face(random_llama(qkv_bias=kind == "Qwen2"), path, kind)
    elif kind == "shards":
        write_hugging_face(random_llama(), path, shards=3)
    else:
        write_hugging_face(random_llama(), path)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(damage, tmp_path, capfd):
    kind, edit, named = DAMAGE[damage]
    path = tmp_path / "checkpoint"
    write_checkpoint(kind, path)
    load_model(path)
    edit(path)
    with pytest.raises(CheckpointError) as refusal:
        load_model(path)
    message = str(refusal.value)
    assert "\n" not in message
    for words in named:
        assert words in message
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("kind", ["shards", "meta"])
def test_random_damage_is_loaded_or_refused(kind, tmp_path):
    path = tmp_path / "checkpoint"
    write_checkpoint(kind, path)
    files = sorted(path.iterdir())
    rng = random.Random(0)
    refused = 0
    for n in range(150):
        file = files[n % len(files)]
        whole = file.read_bytes()
        file.unlink()  # rather than overwritten, since it is mapped into memory
        file.write_bytes(damaged(whole, rng))
        try:
            load_model(path)
        except CheckpointError:
            refused += 1
        file.unlink()
        file.write_bytes(whole)
    assert 50 < refused < 150
