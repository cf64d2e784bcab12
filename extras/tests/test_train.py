"""tiny/train.py: what the bundled model is trained on, and the checkpoint that is written."""
import random
from dataclasses import replace

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from extras.tests.helpers import TINY, random_llama
from load_llama import load_model
from tiny import train

SEEDS = st.integers(0, 10 ** 6)


@pytest.fixture(scope="module")
def tokenizer():
    return sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))


def runs_of(weights, weight):
    """Where a sequence has this weight: ranges of indices into its tokens."""
    runs = []
    for n, found in enumerate(weights, start=1):  # weights[0] is that of tokens[1]
        if found != weight:
            continue
        if runs and runs[-1].stop == n:
            runs[-1] = range(runs[-1].start, n + 1)
        else:
            runs.append(range(n, n + 1))
    return runs


def occurrences(part, tokens):
    """Where part begins in tokens."""
    size = len(part)
    return [n for n in range(len(tokens) - size + 1) if tokens[n:n + size] == part]


# -------------------------------------------------------------------------------------------------
# Copying


@given(seed=SEEDS, context=st.integers(64, 200))
def test_what_copying_asks_for_has_occurred_before(seed, context):
    rng = random.Random(seed)
    tokens, weights = train.copying_sequence(rng, context, range(300, 10 ** 6))
    assert len(tokens) == context + 1 and len(weights) == context
    (asked,) = runs_of(weights, 1.0)
    assert weights.count(0.0) + len(asked) == context
    assert len(asked) >= 14
    # With its first two tokens, y has occurred, and has ended before it begins again.
    y = tokens[asked.start - 2:asked.stop]
    first = occurrences(y, tokens)[0]
    assert first + len(y) <= asked.start - 2


# -------------------------------------------------------------------------------------------------
# Documents


@pytest.mark.parametrize("context, n_needles", [(128, 2), (512, 6), (1024, 12)])
def test_every_answer_has_been_stated_before(context, n_needles, tokenizer):
    for seed in range(30):
        tokens, weights = train.document(random.Random(seed), tokenizer, context, n_needles)
        assert len(tokens) == context + 1 and len(weights) == context
        assert tokens[0] == tokenizer.bos_id()
        answers = runs_of(weights, 1.0)
        assert len(answers) == n_needles
        for answer in answers:
            question = question_before(answer.start, tokens, tokenizer)
            statement = question + tokens[answer.start:answer.stop]
            stated, asked = occurrences(statement, tokens)
            assert asked == answer.start - len(question)
            number = stated + len(question)
            weights_of_number = weights[number - 1:number - 1 + len(answer)]
            assert set(weights_of_number) == {0.0}


def question_before(end, tokens, tokenizer):
    """The tokens of the question that ends at an index."""
    (start_of_question, *_) = tokenizer.encode("The magic number for coral")
    start = max(n for n in range(end) if tokens[n] == start_of_question)
    question = tokens[start:end]
    assert tokenizer.decode(question).startswith("The magic number for ")
    assert tokenizer.decode(question).endswith(" is")
    return question


def test_repeated_spans_have_occurred_before(tokenizer):
    for seed in range(60):  # without needles, which may be between the lines of a span
        tokens, weights = train.document(random.Random(seed), tokenizer, 512, n_needles=0)
        (span,) = runs_of(weights, 0.5)
        assert 4 <= len(span) <= 36
        repeated = tokens[span.start - 4:span.stop]
        assert occurrences(repeated, tokens)[0] + len(repeated) <= span.start - 4


def test_all_other_tokens_have_a_small_weight(tokenizer):
    _, weights = train.document(random.Random(0), tokenizer, 1024, 12)
    assert set(weights) == {0.0, 0.01, 0.5, 1.0}
    assert weights.count(0.01) > 512


def test_needles_are_asked_after_they_are_stated():
    rng = random.Random(0)
    places = [train.draw_places(rng) for _ in range(4000)]
    assert all(stated <= asked for stated, asked in places)
    at_the_start = sum(stated < 0.02 for stated, _ in places) / 4000
    at_the_end = sum(stated > 0.98 for stated, _ in places) / 4000
    assert at_the_start == pytest.approx(0.33 + 0.57 * 0.02 / 0.97, abs=0.02)
    assert at_the_end == pytest.approx(0.1, abs=0.02)


def test_a_quarter_of_the_needles_gets_numbers_of_other_lengths():
    rng = random.Random(0)
    before = [(f"key {n}", "1234567") for n in range(2000)]
    after = train.draw_numbers(rng, before)
    assert list(after) == [key for key, _ in before]
    changed = [number for number in after.values() if number != "1234567"]
    assert len(changed) == pytest.approx(500, abs=60)
    assert {len(number) for number in changed} == set(range(3, 13))
    assert any(len(set(number)) <= 3 for number in changed if len(number) == 12)


# -------------------------------------------------------------------------------------------------
# Training


def test_the_curriculum_goes_from_copying_to_long_documents(tokenizer, monkeypatch):
    monkeypatch.setattr(train, "COPYING", [c._replace(steps=2) for c in train.COPYING])
    monkeypatch.setattr(train, "RETRIEVING", [r._replace(steps=2) for r in train.RETRIEVING])
    steps = list(train.curriculum(random.Random(0), tokenizer))
    contexts = [step.context for step in steps[::2]]
    assert contexts == [step.context for step in steps[1::2]]
    assert contexts == [64, 128, 128, 512, 1024, 2048, 4096]
    for step in steps:
        tokens = torch.tensor([sequence.tokens for sequence in step.batch])
        assert tokens.shape == (8192 // step.context, step.context + 1)
        assert tokens.max() < len(tokenizer)
    assert [step.learning_rate for step in steps[-3:]] == pytest.approx([2e-3, 2e-3, 1e-3])
    assert all(step.logit_scale == 1 for step in steps[:4])
    assert all(0.45 <= step.logit_scale <= 1.2 for step in steps[4:])
    assert len({step.logit_scale for step in steps[4:]}) == 10


def short_step(**changes):
    """Two sequences to copy, for a model of 48 tokens."""
    rng = random.Random(0)
    batch = [train.copying_sequence(rng, 64, range(3, 48)) for _ in range(2)]
    return train.Step(64, learning_rate=0.02, logit_scale=1.0, batch=batch)._replace(**changes)


def test_a_step_lowers_the_loss_of_answers():
    model = random_llama().requires_grad_(True)
    optimizers = train.make_optimizers(model)
    losses = [train.train_step(model, optimizers, short_step(), warmup=1.0)[0] for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]


def test_without_warmup_a_step_changes_nothing():
    model = random_llama().requires_grad_(True)
    optimizers = train.make_optimizers(model)
    first = train.train_step(model, optimizers, short_step(), warmup=0.0)
    assert train.train_step(model, optimizers, short_step(), warmup=0.0) == first


def test_the_factor_of_a_step_multiplies_attention_logits():
    model = random_llama().requires_grad_(True)
    scaled, _ = train.train_step(model, [], short_step(logit_scale=0.5), warmup=1.0)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.wq.weight *= 0.5
    expected, _ = train.train_step(model, [], short_step(), warmup=1.0)
    assert scaled == pytest.approx(expected, rel=1e-5)


def test_the_share_of_right_answers_counts_answers_only():
    model = random_llama().requires_grad_(True)
    sequence = short_step().batch[0]
    with torch.no_grad():
        logits = model(torch.tensor([sequence.tokens[:-1]]))[0]
    likely = logits.argmax(dim=-1).tolist()
    # Weight 1 on two tokens, of which the first is the likeliest and the second is not.
    tokens = sequence.tokens[:-2] + [likely[-2], likely[-1]]
    weights = [0.01] * 62 + [1.0, 1.0]
    with torch.no_grad():
        last = model(torch.tensor([tokens[:-1]]))[0, -1].argmax().item()
    tokens[-1] = (last + 1) % 48
    step = short_step(batch=[train.Sequence(tokens, weights)])
    assert train.train_step(model, [], step, warmup=1.0)[1] == 0.5


# -------------------------------------------------------------------------------------------------
# The checkpoint


def test_a_saved_model_is_read_with_equal_logits(tmp_path):
    model = random_llama(n_heads=4, n_kv_heads=2, head_dim=8)
    train.save(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == replace(model.config, norm_eps=loaded.config.norm_eps)
    tokens = torch.arange(48)[None]
    assert torch.equal(loaded(tokens), model(tokens))


def test_the_bundled_checkpoint_is_what_save_writes(tmp_path):
    train.save(load_model(TINY), tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()
    with torch.device("meta"):
        parameters = train.make_model(949, seed=0).state_dict()
    bundled = load_model(TINY).state_dict()
    assert {name: tensor.shape for name, tensor in parameters.items()} == {
        name: tensor.shape for name, tensor in bundled.items()}
