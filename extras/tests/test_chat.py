"""--chat: a prompt is what transformers' apply_chat_template gives for one user message."""
import random
import re

import pytest
import tokenizers

import needle
from extras.tests.helpers import TINY, command, refused, write_byte_level_tokenizer
from load_llama import LLAMA_3_SPECIAL, load_tokenizer
from tiny.grammar import draw_needles, sentence

QWEN2_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN25_SPECIAL = [*QWEN2_SPECIAL, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"]
SMOLLM2_SPECIAL = [*QWEN2_SPECIAL, "<repo_name>", "<reponame>", "<file_sep>"]
MISTRAL_V03_SPECIAL = ["<s>", "</s>", "[INST]", "[/INST]"]

# What apply_chat_template(..., add_generation_prompt=True) of each model's own template gives for
# the user message HELLO
LLAMA_3 = ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHELLO<|eot_id|>"
           "<|start_header_id|>assistant<|end_header_id|>\n\n")
LLAMA_31 = ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHELLO<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n")
DATES = re.compile(r"<\|start_header_id\|>system.*?<\|eot_id\|>", re.DOTALL)  # is left out
QWEN25 = ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
          "assistant.<|im_end|>\n<|im_start|>user\nHELLO<|im_end|>\n<|im_start|>assistant\n")
QWEN2 = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
         "<|im_start|>user\nHELLO<|im_end|>\n<|im_start|>assistant\n")
SMOLLM2 = ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
           "Face<|im_end|>\n<|im_start|>user\nHELLO<|im_end|>\n<|im_start|>assistant\n")

BYTE_LEVEL = {  # special tokens, the one that is put first, the format's name, the prompt
    "Llama 3": (LLAMA_3_SPECIAL, "<|begin_of_text|>", "Llama 3", LLAMA_3),
    "Llama 3.1": (LLAMA_3_SPECIAL, "<|begin_of_text|>", "Llama 3", DATES.sub("", LLAMA_31)),
    "Qwen2.5": (QWEN25_SPECIAL, None, "Qwen2.5", QWEN25),
    "Qwen2": (QWEN2_SPECIAL, None, "Qwen2", QWEN2),
    "SmolLM2": (SMOLLM2_SPECIAL, None, "SmolLM2", SMOLLM2),
    "Mistral v0.3": (MISTRAL_V03_SPECIAL, "<s>", "Llama 2 and Mistral", "<s>[INST]HELLO[/INST]"),
}


def prompt_with_needles(tokenizer, length=2000):
    """A prompt in the model's chat format. Returns its needles, tokens and questions."""
    rng = random.Random(0)
    needles = draw_needles(rng, 2)
    text = " ".join(sentence(rng) for _ in range(200))
    prompt, questions = needle.build_prompt(tokenizer, length, needles, [0.2, 0.7], text, chat=True)
    longest = max(len(question) + len(answer) for question, answer in questions)
    assert len(prompt) + longest == length
    return needles, prompt, questions


def check_message(message, needles):
    """The user's message is the haystack with the needles, and a request."""
    for key, value in needles:
        assert message.count(f"The magic number for {key} is {value}.") == 1
    keys = ", ".join(key for key, _ in needles)
    assert message.endswith(f" What are the magic numbers for {keys}?")
    assert not re.search(r"<\|?\w+\|?>|\[/?INST\]", message)


def check_questions(tokenizer, needles, questions):
    """The model's own answer begins with a question, so that it goes on with the number."""
    for (key, value), (question, answer) in zip(needles, questions, strict=True):
        assert tokenizer.decode(question).strip() == f"The magic number for {key} is"
        assert tokenizer.decode(answer).strip() == f"{value}."


@pytest.mark.parametrize("model", BYTE_LEVEL)
def test_prompts_are_those_of_apply_chat_template(model, tmp_path):
    special, bos, name, expected = BYTE_LEVEL[model]
    write_byte_level_tokenizer(tmp_path, special, bos)
    tokenizer = load_tokenizer(tmp_path)
    assert needle.chat_format(tokenizer).name == name
    needles, prompt, questions = prompt_with_needles(tokenizer)
    shown = tokenizer.decode(prompt)
    before, after = expected.split("HELLO")
    message = shown.removeprefix(before).removesuffix(after)
    assert before + message + after == shown
    check_message(message, needles)
    check_questions(tokenizer, needles, questions)

    # The names of special tokens have become those tokens, as the tokenizer's own library says.
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert prompt == library.encode(shown, add_special_tokens=False).ids


def test_llama_2_and_mistral_v02_write_inst_as_text():
    """The prompt is <s>[INST] HELLO [/INST]. SentencePiece does not show the BOS token."""
    tokenizer = load_tokenizer(TINY)
    tokenizer.vocab_size = 32000  # as theirs, by which they are known
    assert needle.chat_format(tokenizer).name == "Llama 2 and Mistral"
    needles, prompt, questions = prompt_with_needles(tokenizer)
    assert prompt[0] == tokenizer.bos_id
    assert tokenizer.bos_id not in prompt[1:]
    shown = tokenizer.decode(prompt)
    message = shown.removeprefix("[INST] ").removesuffix(" [/INST]")
    assert f"[INST] {message} [/INST]" == shown
    assert message == message.strip()
    check_message(message, needles)
    check_questions(tokenizer, needles, questions)


def test_a_haystack_cannot_imitate_special_tokens(tmp_path):
    write_byte_level_tokenizer(tmp_path, SMOLLM2_SPECIAL)
    tokenizer = load_tokenizer(tmp_path)
    text = "A bird said <|im_end|> and flew. "
    prompt, _ = needle.build_prompt(tokenizer, 1500, [("jade owl", "12345")], [0.5], text * 40,
                                    chat=True)
    assert "said <|im_end|> and" in tokenizer.decode(prompt)
    assert prompt.count(tokenizer.special["<|im_end|>"]) == 2  # of the system and of the user
    assert prompt.count(tokenizer.special["<|im_start|>"]) == 3


def test_without_chat_a_prompt_has_bos_alone(tmp_path):
    write_byte_level_tokenizer(tmp_path, LLAMA_3_SPECIAL, "<|begin_of_text|>")
    tokenizer = load_tokenizer(tmp_path)
    prompt, _ = needle.build_prompt(tokenizer, 900, [("jade owl", "12345")], [0.5], "A bird sang. ")
    special = set(tokenizer.special.values())
    assert prompt[0] == tokenizer.bos_id
    assert not special & set(prompt[1:])


def test_a_tokenizer_of_no_known_format_is_refused(monkeypatch, capsys):
    assert command(monkeypatch, "--ckpt", TINY, "--len", "300", "--chat") == 2
    sentence = refused(capsys)
    for name in ("Llama 3", "Qwen2.5", "SmolLM2", "Llama 2 and Mistral"):
        assert name in sentence


def test_the_header_names_the_format(monkeypatch, capsys, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(TINY / name)
    write_byte_level_tokenizer(tmp_path, SMOLLM2_SPECIAL)
    run = ["--ckpt", tmp_path, "--method", "rope", "--len", "900", "--depths", "1"]
    assert command(monkeypatch, *run, "--chat") == 0
    assert "# chat format: SmolLM2" in capsys.readouterr().out.splitlines()
    assert command(monkeypatch, *run) == 0
    assert "chat format" not in capsys.readouterr().out
