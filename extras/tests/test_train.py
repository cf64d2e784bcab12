"""tiny/train.py: what the bundled model is trained on, and the checkpoint that is written."""
import random

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from extras.tests.helpers import random_llama
from load_llama import load_model
from tiny import train
from tiny.grammar import TINY


@pytest.fixture(scope="module")
def tokenizer():
    return sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))


def runs_of(weights, weight):
    """Where a sequence has this weight: ranges of indices into its tokens."""
    inside = [False, *(found == weight for found in weights), False]  # weights begin with tokens[1]
    edges = [n for n in range(1, len(inside)) if inside[n] != inside[n - 1]]
    return [range(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def has_occurred(part, tokens):
    """Whether the tokens in a range have occurred before it begins."""
    return any(tokens[n:n + len(part)] == tokens[part.start:part.stop]
               for n in range(part.start - len(part) + 1))


# -------------------------------------------------------------------------------------------------
# Sequences


@given(seed=st.integers(0, 10 ** 6), context=st.integers(64, 200))
def test_what_copying_asks_for_has_occurred_before(seed, context):
    tokens, weights = train.copying_sequence(random.Random(seed), context, range(300, 10 ** 6))
    assert len(tokens) == context + 1 and len(weights) == context
    (asked,) = runs_of(weights, 1.0)
    assert weights.count(0.0) == context - len(asked)
    assert len(asked) >= 14
    # The first two tokens of the repetition cannot be predicted.
    assert has_occurred(range(asked.start - 2, asked.stop), tokens)


@pytest.mark.parametrize("context, n_needles", [(128, 2), (512, 6), (1024, 12)])
def test_every_answer_has_been_stated_before(context, n_needles, tokenizer):
    for seed in range(30):
        tokens, weights = train.document(random.Random(seed), tokenizer, context, n_needles)
        assert len(tokens) == context + 1 and len(weights) == context
        assert set(weights) == {0.0, 0.01, 0.5, 1.0}
        answers = runs_of(weights, 1.0)
        assert len(answers) == n_needles
        for answer in answers:
            before = tokenizer.decode(tokens[:answer.start])
            question = before[before.rindex("The magic number for "):]
            assert question.endswith(" is")
            number = tokenizer.decode(tokens[answer.start:answer.stop])
            assert f"{question} {number}" in before
        numbers = [run for run in runs_of(weights, 0.0) if len(run) >= 3]
        assert len(numbers) >= n_needles  # as they are stated, since nothing predicts them


def test_repeated_spans_have_occurred_before(tokenizer):
    for seed in range(60):  # without needles, which may be between the lines of a span
        tokens, weights = train.document(random.Random(seed), tokenizer, 512, n_needles=0)
        (span,) = runs_of(weights, 0.5)
        # Its first four tokens tell which span it is.
        assert has_occurred(range(span.start - 4, span.stop), tokens)


# -------------------------------------------------------------------------------------------------
# Training and its result


def test_the_curriculum_goes_from_copying_to_long_documents(tokenizer, monkeypatch):
    monkeypatch.setattr(train, "COPYING", [c._replace(steps=1) for c in train.COPYING])
    monkeypatch.setattr(train, "RETRIEVING", [r._replace(steps=2) for r in train.RETRIEVING])
    steps = list(train.curriculum(random.Random(0), tokenizer))
    contexts = [step.context for step in steps]
    assert contexts == [64, 128, 128, 128, 512, 512, 1024, 1024, 2048, 2048, 4096, 4096]
    for step in steps:
        tokens = torch.tensor([sequence.tokens for sequence in step.batch])
        assert tokens.shape == (8192 // step.context, step.context + 1)
    assert [step.learning_rate for step in steps[-3:]] == pytest.approx([2e-3, 2e-3, 1e-3])
    assert all(0.45 <= step.logit_scale <= 1.2 for step in steps[2:])


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


def test_the_factor_of_a_step_multiplies_attention_logits():
    model = random_llama().requires_grad_(True)
    scaled, _ = train.train_step(model, [], short_step(logit_scale=0.5), warmup=1.0)
    for layer in model.layers:
        layer.attention.wq.weight.data *= 0.5
    expected, _ = train.train_step(model, [], short_step(), warmup=1.0)
    assert scaled == pytest.approx(expected, rel=1e-5)


def test_the_bundled_checkpoint_has_the_shape_of_the_recipe_and_is_what_save_writes(tmp_path):
    model = load_model(TINY)
    train.save(model, tmp_path)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()
    assert train.make_model(949, seed=0).config == model.config
