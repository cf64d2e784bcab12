"""transformers models under a method: logits, what is refused, and questions about a file."""
import dataclasses
import json

import pytest
import torch
import transformers

import rope_extrap as rx
from extras import hf
from extras.tests.helpers import command, write_byte_level_tokenizer
from load_llama import load_model, load_tokenizer
from model import generate, measure_contributions

SHAPE = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
             initializer_range=0.3, eos_token_id=None)
LLAMA_31 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_position_embeddings=64)
FAMILIES = {
    "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "Llama 3.1": (transformers.LlamaForCausalLM, transformers.LlamaConfig,
                  dict(rope_parameters=LLAMA_31)),
    "Mistral": (transformers.MistralForCausalLM, transformers.MistralConfig,
                dict(sliding_window=None)),
    "Qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {}),
}


def make(family="Llama", **changes):
    model_class, config_class, settings = FAMILIES[family]
    torch.manual_seed(0)
    return model_class(config_class(**SHAPE | settings | changes)).eval()


def draw_tokens(batch, length):
    return torch.randint(300, (batch, length), generator=torch.Generator().manual_seed(1))


def methods_for(frequencies):
    scaled = rx.dpe(20, [2, 3, 4, 5, 6, 7, 8, 9])
    key_dims = torch.rand(2, 4, 8, generator=torch.Generator().manual_seed(2)) < 0.7
    return {
        "rope": [rx.rope()] * 2,
        "dpe": [scaled] * 2,
        "dpe, key dimensions": [dataclasses.replace(scaled, key_dims=key) for key in key_dims],
        "lampe": [rx.lampe(200, 60, 16, 8)] * 2,
        "yarn": [rx.yarn(frequencies, 4.0, 64)] * 2,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_model_py(family, tmp_path):
    theirs = make(family)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = draw_tokens(2, 200)
    with torch.no_grad():
        plain = theirs(tokens).logits
        for name, methods in methods_for(ours.config.frequencies()).items():
            hf.extend(theirs, methods)
            expected = ours(tokens, methods)
            found = theirs(tokens).logits
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0, msg=name)
            decoded = theirs.generate(tokens, attention_mask=torch.ones_like(tokens),
                                      pad_token_id=0, max_new_tokens=10, do_sample=False,
                                      output_logits=True, return_dict_in_generate=True)
            expected = ours(decoded.sequences[:, :-1], methods, last=10)
            found = torch.stack(decoded.logits, dim=1)
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0, msg=name)
        hf.restore(theirs)
        assert torch.equal(theirs(tokens).logits, plain)


def test_contributions_are_those_of_model_py(tmp_path):
    theirs = make("Qwen2")
    theirs.save_pretrained(tmp_path)
    text = draw_tokens(1, 50)
    expected = measure_contributions(load_model(tmp_path), text.tolist())
    torch.testing.assert_close(torch.stack(hf.measure_contributions(theirs, text)), expected)


# -------------------------------------------------------------------------------------------------
# What would change the meaning is refused


TOKENS = draw_tokens(2, 10)
PADDED = torch.tensor([[0] * 3 + [1] * 7, [1] * 10])
CALLS = {
    "a padded batch": dict(attention_mask=PADDED),
    "a custom mask": dict(attention_mask=torch.ones(2, 1, 10, 10, dtype=torch.bool)),
    "packed sequences": dict(position_ids=torch.tensor([[0, 1, 2, 3, 4] * 2] * 2)),
    "shifted positions": dict(position_ids=torch.arange(5, 15)[None]),
    "reversed positions": dict(position_ids=torch.arange(9, -1, -1)[None], use_cache=True),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_change_the_positions_are_refused(call):
    model = hf.extend(make(), rx.rope())
    with torch.no_grad(), pytest.raises(ValueError, match="only causal|consecutive"):
        model(TOKENS, **CALLS[call])


def test_a_static_cache_is_refused():
    model = hf.extend(make(), rx.rope())
    with pytest.raises(ValueError, match="static caches"):
        model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=3,
                       pad_token_id=0, cache_implementation="static")


def test_gradients_are_refused():
    model = hf.extend(make(), rx.rope())
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        model(TOKENS)


@pytest.mark.parametrize("family, changes, named", [
    ("Mistral", dict(sliding_window=5), "sliding"),
    ("Llama", dict(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)),
     "dynamic"),
    ("Llama", dict(rope_parameters=dict(rope_type="yarn", factor=2.0, rope_theta=1e4)), "yarn")])
def test_models_that_it_does_not_fit_are_refused(family, changes, named):
    with pytest.raises(ValueError, match=named):
        hf.extend(make(family, **changes), rx.rope())


def test_other_families_and_a_wrong_number_of_methods_are_refused():
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported"):
        hf.extend(transformers.GPT2LMHeadModel(config), rx.rope())
    with pytest.raises(ValueError, match="2 layers need one Method each"):
        hf.extend(make(), [rx.rope()])


# -------------------------------------------------------------------------------------------------
# A question about a file


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint"
    make().save_pretrained(path)
    write_byte_level_tokenizer(path, special=["<user>", "<assistant>"])
    template = "{% for m in messages %}<user>{{ m.content }}{% endfor %}<assistant>"
    tokenizer_config = dict(tokenizer_class="PreTrainedTokenizerFast", chat_template=template)
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (tmp_path / "report.txt").write_text("The contract was signed by Ada. " * 9)
    return path


def ask(monkeypatch, checkpoint, *arguments):
    return command(monkeypatch, "--ckpt", checkpoint, "--file", checkpoint.parent / "report.txt",
                   "--question", "Who signed?", "--max-new", 8, *arguments, main=hf.main)


def test_the_answer_is_that_of_model_py(checkpoint, monkeypatch, capsys):
    assert ask(monkeypatch, checkpoint, "--plain", "--method", "dpe", "--set", "window=20") == 0
    out, err = capsys.readouterr()
    assert "# dpe at 300: window 20" in err
    assert "reading 300 tokens" in err
    tokenizer = load_tokenizer(checkpoint)
    document = (checkpoint.parent / "report.txt").read_text()
    tokens = torch.tensor([tokenizer.encode(f"{document} Who signed?")])
    model = load_model(checkpoint)
    method = rx.dpe(20, [10] * 3 + [4] * 5)
    new = generate(model, tokens, 8, [method] * 2)[0].tolist()
    assert out.rstrip("\n") == tokenizer.decode(new).rstrip("\n")


def test_the_chat_template_and_key_dimensions_of_the_prompt_are_used(checkpoint, monkeypatch,
                                                                      capsys):
    used = []
    monkeypatch.setattr(hf, "extend", lambda model, methods: used.extend(methods))
    assert ask(monkeypatch, checkpoint, "--method", "dpe", "--set", "topk=5") == 0
    assert "reading 303 tokens" in capsys.readouterr().err  # two more than without the template
    assert all((method.key_dims.sum(dim=1) == 5).all() for method in used)
    assert not torch.equal(used[0].key_dims, used[1].key_dims)


def test_an_empty_answer_is_said_to_be_one(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate",
                        lambda model, prompt, **_: prompt)
    assert ask(monkeypatch, checkpoint, "--plain") == 0
    assert "# the answer is empty" in capsys.readouterr().err


def test_bad_input_gets_one_sentence(checkpoint, monkeypatch, capsys):
    cases = {"No such file": ["--file", "missing.txt"], "not a directory": ["--ckpt", "nowhere"],
             "not a setting": ["--set", "speed=3"], "cannot be used": ["--device", "abacus"],
             "--train-len must be at least 1": ["--train-len", "0"],
             "--max-new must be at least 1": ["--max-new", "0"]}
    for named, arguments in cases.items():
        assert ask(monkeypatch, checkpoint, *arguments) == 2
        assert named in capsys.readouterr().err.splitlines()[-1]
