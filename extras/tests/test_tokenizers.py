"""Tokenizers: ids, special tokens, BOS and stop ids of each format, and refusals."""
import base64
import json
import unicodedata

import pytest
import sentencepiece
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

from extras.tests.checkpoints import RANKS, byte_level_bpe, refusals_of_damage
from load_llama import LLAMA_3_SPECIAL, LLAMA_3_SPLIT, CheckpointError, load_tokenizer
from tiny.grammar import TINY

QWEN_SPLIT = LLAMA_3_SPLIT.replace("{1,3}", "")  # each digit alone
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SENTENCEPIECE = (TINY / "tokenizer.model").read_bytes()


def llama_3_model():
    """Meta's tokenizer.model of Llama 3."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in RANKS.items()]
    return "".join(lines).encode()


def tokenizer_json(split=None, special=(), bos=None):
    """Hugging Face's tokenizer. split: a pattern, or None for SmolLM2's digits and GPT-2's.

    bos: the special token that its post-processor puts first.
    """
    vocabulary, merges = byte_level_bpe()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    if split is not None:
        tokenizer.pre_tokenizer = Sequence([Split(Regex(split), "isolated"),
                                            ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def saved(tokenizer, path, **files):
    """Write a tokenizer and JSON files of these names, and load the directory.

    tokenizer: the content of tokenizer.model, or what belongs into tokenizer.json.
    """
    if isinstance(tokenizer, bytes):
        (path / "tokenizer.model").write_bytes(tokenizer)
    else:
        tokenizer.save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(path)


# -------------------------------------------------------------------------------------------------
# Ids


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """One vocabulary in Llama 3's two files, in Qwen2's and in SmolLM2's."""
    qwen = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)
    qwen.normalizer = normalizers.NFC()
    made = {"meta": llama_3_model(),
            "llama": tokenizer_json(LLAMA_3_SPLIT, LLAMA_3_SPECIAL, bos="<|begin_of_text|>"),
            "qwen": qwen,
            "smollm2": tokenizer_json(special=QWEN_SPECIAL)}
    return {kind: saved(tokenizer, tmp_path_factory.mktemp(kind))
            for kind, tokenizer in made.items()}


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


@pytest.mark.parametrize("kind, special", [
    ("meta", LLAMA_3_SPECIAL), ("llama", LLAMA_3_SPECIAL), ("qwen", QWEN_SPECIAL),
    ("smollm2", QWEN_SPECIAL)])
def test_text_that_looks_like_a_special_token_is_text(kind, special, loaded):
    for token_id, name in enumerate(special, start=len(RANKS)):
        ids = loaded[kind].encode(f"a{name}b")
        assert max(ids) < len(RANKS)
        assert loaded[kind].decode(ids) == f"a{name}b"
        assert loaded[kind].decode([token_id]) == name


def test_an_added_token_that_is_not_special_is_a_token(tmp_path):
    tokenizer = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    found = saved(tokenizer, tmp_path)
    assert found.encode("a<tool_call>") == [*found.encode("a"), len(RANKS) + 3]


def test_all_of_a_long_text_is_encoded(tmp_path):
    tokenizer = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    found = saved(tokenizer, tmp_path)
    assert found.decode(found.encode("a" * 100)) == "a" * 100
    assert len(found.encode("a")) == 1


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


@pytest.mark.parametrize("name", ["tokenizer.model", "original/tokenizer.model",
                                  "../tokenizer.model"])
def test_tokenizer_model_is_found_in_every_release(name, tmp_path):
    path = tmp_path / "model"
    (path / "original").mkdir(parents=True)
    (path / "params.json").write_text("{}")
    (path / name).write_bytes(llama_3_model())
    assert load_tokenizer(path).encode(" the") == [RANKS[b" the"]]


def test_tokenizer_json_comes_before_tokenizer_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(SENTENCEPIECE)
    tokenizer = saved(tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL), tmp_path)
    assert tokenizer.encode(" the") == [RANKS[b" the"]]
    assert tokenizer.decode([len(RANKS) + 2]) == "<|im_end|>"


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


def test_a_token_that_is_put_last_is_not_bos(tmp_path):
    tokenizer = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 268)])
    assert saved(tokenizer, tmp_path).bos_id is None


QWEN = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL)


@pytest.mark.parametrize("tokenizer, settings, bos_id", [
    (SENTENCEPIECE, {}, 1), (SENTENCEPIECE, {"add_bos_token": True}, 1),
    (SENTENCEPIECE, {"add_bos_token": False}, None),
    (SENTENCEPIECE, {"add_bos_token": True, "bos_token": "</s>"}, 2),
    (SENTENCEPIECE, {"add_bos_token": True, "bos_token": {"content": "</s>"}}, 2),
    (SENTENCEPIECE, {"add_bos_token": True, "bos_token": "not a token"}, 1),
    (QWEN, {"add_bos_token": True, "bos_token": "<|endoftext|>"}, None)])
def test_only_beside_tokenizer_model_do_the_settings_decide_on_bos(tokenizer, settings, bos_id,
                                                                   tmp_path):
    # transformers 5 reads add_bos_token only where there is no tokenizer.json.
    assert saved(tokenizer, tmp_path, tokenizer_config=settings).bos_id == bos_id


@pytest.mark.parametrize("tokenizer, own", [
    (QWEN, [268, 270]), (llama_3_model(), [269, 277]), (SENTENCEPIECE, [2])])
@pytest.mark.parametrize("files, added", [
    ({}, []),
    (dict(generation_config={"eos_token_id": 7}), [7]),
    (dict(generation_config={"eos_token_id": [7, 0, 2]}), [0, 2, 7]),
    (dict(config={"eos_token_id": 8}), [8]),
    (dict(generation_config={"eos_token_id": 7}, config={"eos_token_id": 8}), [7]),
    (dict(generation_config={"eos_token_id": None}, config={"eos_token_id": 8}), [8]),
    (dict(generation_config={"eos_token_id": [-1, 7, 2 ** 70]}), [7])])
def test_stop_ids_are_the_models_eos_and_known_names(tokenizer, own, files, added, tmp_path):
    assert saved(tokenizer, tmp_path, **files).stop_ids == sorted({*own, *added})


# -------------------------------------------------------------------------------------------------
# Refusals

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567\n"


@pytest.mark.parametrize("name, content", [
    ("tokenizer.model", b"\x00\x01 nothing"), ("tokenizer.model", b"!!! 0\n"),
    ("tokenizer.model", b""), ("tokenizer.model", b"AAAA 0\n"),
    ("tokenizer.model", llama_3_model() + b"eHl6 0\n"), ("tokenizer.json", b""),
    ("tokenizer.json", b"{}"), ("tokenizer.json", b"[" * 100_000), ("other", b""),
    ("tokenizer.model", POINTER), ("tokenizer.json", POINTER)])
def test_an_unknown_tokenizer_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="^[^\n]*tokenizer[^\n]*$") as refusal:
        load_tokenizer(tmp_path)
    assert ("git lfs pull" in str(refusal.value)) == (content == POINTER)


def test_a_tokenizer_json_that_makes_a_panic_is_refused(tmp_path):
    tokenizer = tokenizer_json(QWEN_SPLIT, QWEN_SPECIAL, bos="<|im_start|>")
    values = json.loads(tokenizer.to_str())
    values["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("eos", ["</s>", [268, [270]], {}])
def test_an_eos_token_that_is_no_number_is_refused(eos, tmp_path):
    with pytest.raises(CheckpointError, match="generation_config.json has an eos_token_id"):
        saved(QWEN, tmp_path, generation_config={"eos_token_id": eos})


@pytest.mark.parametrize("tokenizer", [llama_3_model(), QWEN, SENTENCEPIECE])
def test_random_damage_is_loaded_or_refused(tokenizer, tmp_path):
    saved(tokenizer, tmp_path, generation_config={"eos_token_id": [7]},
          tokenizer_config={"add_bos_token": True, "bos_token": {"content": "<s>"}})
    assert 0 < refusals_of_damage(tmp_path, lambda: load_tokenizer(tmp_path), 100) < 100
