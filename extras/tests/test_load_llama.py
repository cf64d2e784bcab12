"""Checkpoints: both layouts give the weights back, and what cannot be loaded is refused."""
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from extras.tests.checkpoints import (
    ABSENT,
    META_SHAPE,
    TOKENS,
    edit_json,
    refusals_of_damage,
    same_logits,
    write_hugging_face,
    write_meta,
)
from extras.tests.helpers import random_llama
from load_llama import CheckpointError, load_model, meta_config
from model import RopeScaling

# -------------------------------------------------------------------------------------------------
# What loads


def edit_tensors(file, changes, drop=None):
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items() if name != drop}
    save_file(tensors | changes, file)


def write_beside_an_older_model(model, path):
    """As save_pretrained leaves it, when a model is saved again in one file."""
    write_hugging_face(random_llama(9), path, shards=3)
    write_hugging_face(model, path)


def write_with_output(model, path, drop=None):
    """What other programs store of a tied model, and in every layer."""
    write_hugging_face(model, path)
    edit_tensors(path / "model.safetensors", drop=drop, changes={
        "lm_head.weight": model.tok_embeddings.weight.clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)})


SCALED = dict(rope_scaling=RopeScaling())
LLAMA_31 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)
LAYOUTS = {  # changes to the model; how it is written; with which changes
    "one file": ({}, write_hugging_face, {}),
    "shards": ({}, write_hugging_face, dict(shards=3)),
    "one file beside older shards": ({}, write_beside_an_older_model, {}),
    "tied": (dict(tied=True), write_hugging_face, {}),
    "tied, stored twice": (dict(tied=True), write_with_output, {}),
    "tied, stored as output": (
        dict(tied=True), write_with_output, dict(drop="model.embed_tokens.weight")),
    "two matrices, though config.json says tied, as transformers 5 takes it": (
        {}, write_hugging_face, dict(tie_word_embeddings=True)),
    "Llama 1, with keys absent": (
        dict(n_kv_heads=4, head_dim=16, rope_theta=10000.0), write_hugging_face,
        dict(num_key_value_heads=ABSENT, head_dim=ABSENT, rope_theta=ABSENT)),
    "keys null": (
        dict(n_kv_heads=4), write_hugging_face, dict(num_key_value_heads=None, rope_scaling=None)),
    "large theta": (dict(rope_theta=4.5e10), write_hugging_face, {}),
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
    "Meta": (META_SHAPE, write_meta, {}),
    "Meta, two parts": (META_SHAPE, write_meta, dict(parts=2)),
    "Meta, in PyTorch's older format": (META_SHAPE, write_meta, dict(parts=2, zipped=False)),
    "Meta, vocab_size absent": (META_SHAPE, write_meta, dict(parts=2, vocab_size=ABSENT)),
    "Meta, ffn_dim_multiplier and scaled RoPE": (
        META_SHAPE | dict(ffn_dim=448) | SCALED, write_meta,
        dict(ffn_dim_multiplier=1.3, use_scaled_rope=True)),
    "Meta, factor 32": (
        META_SHAPE | dict(rope_scaling=RopeScaling(32.0)), write_meta,
        dict(use_scaled_rope=True, rope_scaling_factor=32)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_gives_its_model(layout, tmp_path):
    changes, write, written = LAYOUTS[layout]
    model = random_llama(**changes)
    write(model, tmp_path, **written)
    loaded = load_model(tmp_path)
    same_logits(loaded, model)
    assert replace(loaded.config, train_len=64) == model.config


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
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_weights_have_the_dtype_that_is_asked_for_or_the_embeddings(dtype, write, tmp_path):
    model = random_llama(**META_SHAPE).bfloat16()
    model.layers[0].ffn_norm.float()
    write(model, tmp_path)
    loaded = load_model(tmp_path, dtype=dtype)
    for name, parameter in loaded.named_parameters():
        if name in ("norm.weight", "output.weight"):
            assert parameter.dtype == torch.float32
        else:
            assert parameter.dtype == (dtype or torch.bfloat16)
    assert loaded(TOKENS).isfinite().all()


def test_of_two_layouts_the_outer_one_is_loaded(tmp_path):
    write_hugging_face(random_llama(1), tmp_path)
    (tmp_path / "original").mkdir()
    write_meta(random_llama(2, **META_SHAPE), tmp_path / "original")
    same_logits(load_model(tmp_path), random_llama(1))


@pytest.mark.parametrize("family, train_len", [
    ("Llama", 2048), ("Mistral", 131072), ("Qwen2", 32768)])
def test_a_training_length_that_is_not_told_is_that_of_transformers(family, train_len, tmp_path):
    model = random_llama(qkv_bias=family == "Qwen2")
    write_hugging_face(model, tmp_path, family, max_position_embeddings=ABSENT)
    assert load_model(tmp_path).config.train_len == train_len


@pytest.mark.parametrize("params, train_len, factor", [
    ({}, 4096, None), ({"rope_theta": 5e5}, 8192, None), ({"rope_theta": 1e6}, 16384, None),
    ({"max_seq_len": 77}, 77, None), ({"use_scaled_rope": True}, 131072, 8),
    ({"use_scaled_rope": True, "dim": 2048}, 131072, 32),
    ({"use_scaled_rope": True, "dim": 3072}, 131072, 32),
    ({"use_scaled_rope": True, "dim": 8192}, 131072, 8)])
def test_what_metas_files_do_not_tell_is_that_of_the_release(params, train_len, factor):
    shape = dict(dim=4096, n_layers=2, n_heads=32)
    config = meta_config("params.json", shape | params, 9)
    assert config.train_len == train_len
    assert config.rope_scaling == (factor and RopeScaling(factor))


# -------------------------------------------------------------------------------------------------
# What is refused


class Code:
    """Pickled, it would run when it is read."""

    def __reduce__(self):
        return print, ("this must never run",)


def write(name, content):
    """The edit that replaces a file. content: bytes, or None for a missing file."""
    def edit(path):
        (path / name).unlink()
        if content is not None:
            (path / name).write_bytes(content)
    return edit


def link_to_itself(path):
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to("model.safetensors")


def config(**changes):
    return lambda path: edit_json(path / "config.json", **changes)


def tensors(changes, drop=None):
    return lambda path: edit_tensors(path / "model.safetensors", changes, drop)


def parts(change, pattern="*.pth"):
    def edit(path):
        for file in path.glob(pattern):
            torch.save(change(torch.load(file)), file)
    return edit


def output(dtype):
    """The change of a checkpoint's output matrix to another type."""
    return {"lm_head.weight": torch.zeros(48, 64).to(dtype)}


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"
DAMAGE = {  # the checkpoint, what is done to it, and what the refusal names
    "no directory": ("one", lambda path: path.rename(path.parent / "moved"), ["No such file"]),
    "nothing in it": ("one", lambda path: [file.unlink() for file in path.iterdir()],
                      ["config.json", "params.json"]),
    "weights without config": ("one", write("config.json", None),
                               ["config.json: No such file"]),
    "config without weights": ("one", write("model.safetensors", None),
                               ["model.safetensors: No such file"]),
    "a file that cannot be read": ("one", link_to_itself, ["model.safetensors: Too many levels"]),
    "absent shard": ("shards", write("model-00002-of-00003.safetensors", None),
                     ["model-00002-of-00003.safetensors: No such file"]),
    "no weight_map": ("shards", write("model.safetensors.index.json", b"{}"), ["weight_map"]),
    "truncated": ("one", write("model.safetensors", b"\x10\x27\0\0\0\0\0\0{"),
                  ["model.safetensors cannot be read"]),
    "Meta, no first part": ("meta", write("consolidated.00.pth", None),
                            ["consolidated.00.pth: No such file"]),
    "Meta, no last part": ("meta", write("consolidated.01.pth", None), ["(48, 64)", "(24, 128)"]),
    "Meta, truncated": ("meta", write("consolidated.01.pth", b"PK\x03\x04"),
                        ["consolidated.01.pth cannot be read"]),
    "pointer": ("one", write("model.safetensors", POINTER), ["model.safetensors", "git lfs pull"]),
    "pointer, config": ("one", write("config.json", POINTER), ["config.json", "git lfs pull"]),
    "pointer, Meta": ("meta", write("consolidated.00.pth", POINTER), [".00.pth", "git lfs pull"]),

    "no JSON": ("one", write("config.json", b"{"), ["config.json cannot be read as JSON"]),
    "no object": ("one", write("config.json", b"[]"), ["config.json holds no JSON object"]),
    "no number": ("one", config(hidden_size="64"), ["config.json", "hidden_size", "'64'"]),
    "no whole number": ("one", config(hidden_size=64.5), ["hidden_size", "64.5", "whole number"]),
    "zero": ("one", config(num_hidden_layers=0), ["num_hidden_layers", "0", "positive"]),
    "endless": ("one", config(rope_theta=math.inf), ["rope_theta", "inf"]),
    "more than a float": ("one", config(rope_theta=10 ** 400), ["rope_theta"]),
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
    "quantized": ("one", config(quantization_config={"quant_method": "fp8", "ignore": ["x"] * 99}),
                  ["config.json", "quantization_config", "fp8"]),
    "float8": ("one", tensors(output(torch.float8_e4m3fn)), ["lm_head.weight", "float8"]),
    "integers": ("one", tensors(output(torch.int8)), ["lm_head.weight", "int8"]),

    "missing bias": ("Qwen2", tensors({}, drop="model.layers.1.self_attn.k_proj.bias"),
                     ["model.layers.1.self_attn.k_proj.bias is missing"]),
    "missing tensor": ("one", tensors({}, drop="model.norm.weight"),
                       ["model.safetensors", "model.norm.weight is missing"]),
    "extra tensor": ("one", tensors({"extra": torch.zeros(1)}),
                     ["model.safetensors", "tensor extra is unknown"]),
    "wrong shape": ("one", tensors({"lm_head.weight": torch.zeros(9, 64)}),
                    ["lm_head.weight", "(9, 64)", "(48, 64)"]),
    "Meta, a longer part": ("meta", parts(lambda part: part | {"b": torch.ones(9)}, "*.01.pth"),
                            ["tensor b is not in every part"]),
    "Meta, a part of another model": (
        "meta", parts(lambda part: part | {"norm.weight": torch.ones(9)}, "*.01.pth"),
        ["norm.weight is not in every part in the same shape"]),
    "Meta, code": ("meta", parts(lambda part: {"output.weight": Code()}),
                   ["consolidated.00.pth", "holds more than tensors"]),
    "Meta, no tensors": ("meta", parts(lambda part: [1, 2]), ["is not a dictionary of tensors"]),
    "Meta, no output": ("meta", parts(lambda part: {"norm.weight": part["norm.weight"]}),
                        ["is missing"]),
}


def write_checkpoint(kind, path):
    path.mkdir()
    if kind in ("meta", "older meta"):
        write_meta(random_llama(**META_SHAPE), path, parts=2, zipped=kind == "meta")
    elif kind in ("Mistral", "Qwen2"):
        write_hugging_face(random_llama(qkv_bias=kind == "Qwen2"), path, kind)
    else:
        shards = {"one": 1, "shards": 3}[kind]
        write_hugging_face(random_llama(), path, shards=shards)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(damage, tmp_path, capfd):
    kind, edit, named = DAMAGE[damage]
    path = tmp_path / "checkpoint"
    write_checkpoint(kind, path)
    load_model(path)
    edit(path)
    with pytest.raises(CheckpointError) as refusal:
        load_model(path, dtype=torch.float32)
    message = str(refusal.value)
    assert "\n" not in message and len(message) < 400
    for words in named:
        assert words in message
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("kind", ["one", "shards", "meta", "older meta"])
def test_random_damage_is_loaded_or_refused(kind, tmp_path):
    path = tmp_path / "checkpoint"
    write_checkpoint(kind, path)
    refused = refusals_of_damage(path, lambda: load_model(path), 100)
    assert 30 < refused < 100
