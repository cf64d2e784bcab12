"""Tokenizers: ids, special tokens, BOS and stop ids of each format, and refusals."""
import base64
import json
import random
import unicodedata

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from extras.tests.checkpoints import RANKS, byte_level_bpe, damaged
from extras.tests.helpers import TINY
from load_llama import LLAMA_3_SPECIAL, LLAMA_3_SPLIT, CheckpointError, load_tokenizer

settings.register_profile("here", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("here")

QWEN_SPLIT = LLAMA_3_SPLIT.replace("{1,3}", "")  # each digit alone
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def llama_3_model():
    """Meta's tokenizer.model of Llama 3."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items()]
    return "".join(lines).encode()


def tokenizer_json(split=None, special=()):
    """Hugging Face's tokenizer. split: a pattern, or None for SmolLM2's digits and GPT-2's."""
    vocabulary, merges = byte_level_bpe()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    if split is not None:
        tokenizer.pre_tokenizer = Sequence([Split(Regex(split), "isolated"),
                                            ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def put_first(tokenizer, name):
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, tokenizer.token_to_id(name))])


def saved(tokenizer, path, **files):
    """Write tokenizer.json and other files of that name, and load the directory."""
    tokenizer.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(path)


# -------------------------------------------------------------------------------------------------
# Ids


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """One vocabulary in Llama 3's two files, in Qwen2's and in SmolLM2's."""
    llama = tokenizer_json(LLAMA_3_SPLIT, LLAMA_3_SPECIAL)
    put_first(llama, "<|begin_of_text|>")
    qwen = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)
    qwen.normalizer = normalizers.NFC()
    smollm2 = tokenizer_json(special=QWEN_SPECIAL)
    meta_path = tmp_path_factory.mktemp("meta")
    (meta_path / "tokenizer.model").write_bytes(llama_3_model())
    return {"meta": load_tokenizer(meta_path),
            "llama": saved(llama, tmp_path_factory.mktemp("llama")),
            "qwen": saved(qwen, tmp_path_factory.mktemp("qwen")),
            "smollm2": saved(smollm2, tmp_path_factory.mktemp("smollm2"))}


GPT_2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {"meta": LLAMA_3_SPLIT, "llama": LLAMA_3_SPLIT, "qwen": QWEN_SPLIT}
TEXTS = st.one_of(
    st.text(), st.text(alphabet=" the12\n\t<|>é'S\u0301"),
    st.sampled_from(["<|eot_id|>", "x<|begin_of_text|>", "<|im_end|>", "</s>",
                     "e\u0301", "\u212b"]))  # the last two are not in normal form C


def tiktoken_ids(split, text):
    encoding = tiktoken.Encoding("test", pat_str=split, mergeable_ranks=RANKS, special_tokens={})
    return encoding.encode_ordinary(text)


@pytest.mark.parametrize("kind", SPLITS)
@given(text=TEXTS)
def test_byte_level_ids_are_tiktokens_and_lose_nothing(kind, loaded, text):
    expected = text
    if kind == "qwen":
        expected = unicodedata.normalize("NFC", text)
    ids = loaded[kind].encode(text)
    assert ids == tiktoken_ids(SPLITS[kind], expected)
    assert loaded[kind].decode(ids) == expected


@given(text=TEXTS)
def test_smollm2_splits_digits_and_then_as_gpt_2(loaded, text):
    expected = []
    piece = ""
    for character in text:
        if unicodedata.category(character).startswith("N"):
            expected += tiktoken_ids(GPT_2_SPLIT, piece) + tiktoken_ids(GPT_2_SPLIT, character)
            piece = ""
        else:
            piece += character
    expected += tiktoken_ids(GPT_2_SPLIT, piece)
    assert loaded["smollm2"].encode(text) == expected


@pytest.mark.parametrize("kind", ["meta", "llama", "qwen", "smollm2"])
def test_text_that_looks_like_a_special_token_is_text(kind, loaded):
    tokenizer = loaded[kind]
    for name, token_id in tokenizer.special.items():
        ids = tokenizer.encode(f"a{name}b")
        assert max(ids) < len(RANKS)
        assert tokenizer.decode(ids) == f"a{name}b"
        assert tokenizer.decode([token_id]) == name


def test_an_added_token_that_is_not_special_is_a_token(tmp_path):
    tokenizer = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    found = saved(tokenizer, tmp_path)
    assert found.encode("a<tool_call>") == [*found.encode("a"), len(RANKS) + 3]
    assert "<tool_call>" not in found.special


def test_all_of_a_long_text_is_encoded(tmp_path):
    tokenizer = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    found = saved(tokenizer, tmp_path)
    assert found.decode(found.encode("a" * 100)) == "a" * 100
    assert len(found.encode("a")) == 1


def test_a_tokenizer_in_the_folder_original_is_found(tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(llama_3_model())
    assert load_tokenizer(tmp_path).encode(" the") == [RANKS[b" the"]]


def test_a_million_blanks_are_encoded(loaded):
    blanks = " " * 1_000_000
    assert loaded["meta"].decode(loaded["meta"].encode(blanks)) == blanks


@given(text=TEXTS)
def test_the_bundled_tokenizer_is_sentencepiece(text):
    tokenizer = load_tokenizer(TINY)
    own = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    assert tokenizer.encode(text) == own.encode(text)
    if "\u2581" not in text:  # SentencePiece's own mark for a space
        assert tokenizer.decode(tokenizer.encode(text)) == text


# -------------------------------------------------------------------------------------------------
# Special tokens


def test_llama_3s_special_tokens_have_their_published_places():
    assert len(LLAMA_3_SPECIAL) == len(set(LLAMA_3_SPECIAL)) == 256
    published = {"begin_of_text": 0, "end_of_text": 1, "start_header_id": 6, "end_header_id": 7,
                 "eot_id": 9}
    for name, place in published.items():
        assert LLAMA_3_SPECIAL.index(f"<|{name}|>") == place


@pytest.mark.parametrize("kind, bos_id, stop_ids, vocab_size", [
    ("meta", 268, [269, 277], 524), ("llama", 268, [269, 277], 524),
    ("qwen", None, [268, 270], 271), ("smollm2", None, [268, 270], 271)])
def test_bos_stop_ids_and_vocab_size(kind, bos_id, stop_ids, vocab_size, loaded):
    assert loaded[kind].bos_id == bos_id
    assert loaded[kind].stop_ids == stop_ids
    assert loaded[kind].vocab_size == vocab_size
    assert loaded[kind].special.keys() >= {loaded[kind].decode([n]) for n in stop_ids}


def test_the_bundled_tokenizers_bos_and_stop_ids():
    tokenizer = load_tokenizer(TINY)
    own = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    assert tokenizer.bos_id == own.bos_id()
    assert tokenizer.stop_ids == [own.eos_id()]
    assert tokenizer.vocab_size == len(own)


def test_a_token_that_is_put_last_is_not_bos(tmp_path):
    tokenizer = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 268)])
    assert saved(tokenizer, tmp_path).bos_id is None


@pytest.mark.parametrize("files, stop_ids", [
    ({}, [300]),
    (dict(generation_config={"eos_token_id": 7}), [7, 300]),
    (dict(generation_config={"eos_token_id": [7, 0, 300]}), [0, 7, 300]),
    (dict(config={"eos_token_id": 8}), [8, 300]),
    (dict(generation_config={"eos_token_id": 7}, config={"eos_token_id": 8}), [7, 300]),
    (dict(generation_config={"eos_token_id": None}, config={"eos_token_id": 8}), [8, 300]),
    (dict(generation_config={}, config={}), [300])])
def test_stop_ids_are_the_models_eos_and_known_names(files, stop_ids, tmp_path):
    names = [f"<{n}>" for n in range(32)] + ["</s>"]  # the last one has id 300
    assert saved(tokenizer_json(QWEN_SPLIT, names), tmp_path, **files).stop_ids == stop_ids


# -------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("name, content", [
    ("tokenizer.model", b"\x00\x01 nothing"), ("tokenizer.model", b"!!! 0\n"),
    ("tokenizer.model", b""), ("tokenizer.model", b"AAAA 0\n"),
    ("tokenizer.model", llama_3_model() + b"eHl6 0\n"), ("tokenizer.json", b""),
    ("tokenizer.json", b"{}"), ("tokenizer.json", b"[" * 100_000), ("other", b"")])
def test_an_unknown_tokenizer_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="^[^\n]*tokenizer[^\n]*$"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_that_makes_a_panic_is_refused(tmp_path):
    tokenizer = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)
    put_first(tokenizer, "<|im_start|>")
    values = json.loads(tokenizer.to_str())
    values["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="tokenizer.json is not a tokenizer, or is damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("eos", [-1, 271, "</s>", [268, [270]], {}])
def test_an_eos_token_without_an_id_is_refused(eos, tmp_path):
    tokenizer = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id"):
        saved(tokenizer, tmp_path, generation_config={"eos_token_id": eos})


@pytest.mark.parametrize("name, content", [
    ("tokenizer.model", llama_3_model()),
    ("tokenizer.json", tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL).to_str().encode()),
    ("tokenizer.model", (TINY / "tokenizer.model").read_bytes())])
def test_random_damage_is_loaded_or_refused(name, content, tmp_path):
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        (tmp_path / name).write_bytes(damaged(content, rng))
        try:
            load_tokenizer(tmp_path)
        except CheckpointError as refusal:
            assert "\n" not in str(refusal)
            refused += 1
    assert 0 < refused < 60
