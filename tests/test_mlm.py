"""Masking, and what an untrained and a trained model make of it."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import LargestTensor, tiny_model

from data.store import pack
from mlm import Config, Masker, backpropagate, held_out_scores, learning_rate, mask_tokens
from model import NomicBertForMaskedLM

MASK, SPECIAL, VOCABULARY = 4, [0, 2, 3, 4], 1000


def masked(n=200_000, probability=0.3, seed=0):
    tokens = np.random.default_rng(99).integers(0, VOCABULARY, n)
    rng = np.random.default_rng(seed)
    return tokens, *mask_tokens(tokens, probability, rng, MASK, SPECIAL, VOCABULARY)


def test_a_third_of_tokens_is_chosen_and_of_these_80_10_10():
    tokens, inputs, chosen = masked()
    ordinary = ~np.isin(tokens, SPECIAL)
    assert chosen[ordinary].mean() == pytest.approx(0.30, abs=0.01)
    hidden, same = inputs[chosen] == MASK, inputs[chosen] == tokens[chosen]
    assert hidden.mean() == pytest.approx(0.80, abs=0.01)
    assert same.mean() == pytest.approx(0.10, abs=0.01)
    random = inputs[chosen][~hidden & ~same]
    assert len(random) / chosen.sum() == pytest.approx(0.10, abs=0.01)
    assert len(np.unique(random)) > 0.99 * VOCABULARY, (
        "random tokens come from all of the vocabulary"
    )


def test_special_tokens_are_never_chosen_and_others_never_touched_unless_chosen():
    tokens, inputs, chosen = masked()
    assert not chosen[np.isin(tokens, SPECIAL)].any()
    assert np.array_equal(inputs[~chosen], tokens[~chosen])


def test_masks_are_a_function_of_the_seed():
    assert np.array_equal(masked(seed=5)[1], masked(seed=5)[1])
    assert not np.array_equal(masked(seed=5)[1], masked(seed=6)[1])


def test_the_mask_of_a_text_does_not_depend_on_its_batch(tokenizer):
    masker = Masker(tokenizer)
    texts = [np.arange(5, 5 + length) for length in (30, 50, 40)]
    inputs, cu_seqlens, _, _ = masker(texts, 0.3, [[0], [1], [2]])
    alone, *_ = masker(texts[1:2], 0.3, [[1]])
    assert torch.equal(inputs[cu_seqlens[1] : cu_seqlens[2]], alone)


def test_places_and_answers_fit_together(tokenizer):
    texts = [np.arange(5, 5 + length) for length in (30, 50)]
    inputs, _, places, answers = Masker(tokenizer)(texts, 0.3, [[0], [1]])
    original = pack(texts)[0]
    assert torch.equal(original[places], answers)
    changed = torch.nonzero(inputs != original).flatten()
    assert set(changed.tolist()) <= set(places.tolist())


def small_model(tokenizer):
    torch.manual_seed(0)
    model = NomicBertForMaskedLM(tiny_model().config)
    model.bert.tokenizer = tokenizer
    return model


def test_an_untrained_model_has_a_loss_of_about_ln_V(tokenizer):
    texts = [np.random.default_rng(i).integers(5, 300, 100) for i in range(20)]
    loss, hit = held_out_scores(small_model(tokenizer), texts)
    assert loss.mean().item() == pytest.approx(math.log(320), rel=0.05)
    assert hit.mean() < 0.05


def test_one_batch_can_be_memorised(tokenizer):
    model, masker = small_model(tokenizer), Masker(tokenizer)
    texts = [np.random.default_rng(i).integers(5, 300, 30) for i in range(4)]
    tokens, cu_seqlens, places, answers = masker(texts, 0.3, [[i] for i in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = F.cross_entropy(model(tokens, cu_seqlens, places), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_pieces_show_the_same_masks_with_less_context(tokenizer):
    """What `evaluate.py long` relies on: the same tokens are asked for at every length."""
    model = small_model(tokenizer)
    texts = [np.random.default_rng(i).integers(5, 300, 64) for i in range(3)]
    whole, _ = held_out_scores(model, texts)
    pieces, _ = held_out_scores(model, texts, piece=16)
    assert len(whole) == len(pieces) and not torch.allclose(whole, pieces)
    separate = [text[i : i + 16] for text in texts for i in range(0, 64, 16)]
    tokens, cu_seqlens = pack(separate)
    assert torch.equal(cu_seqlens, torch.arange(0, 193, 16, dtype=torch.int32))


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing():
    config = Config(steps=1000, lr=1.0, warmup=0.06)
    rates = [learning_rate(step, config) for step in range(1000)]
    assert max(rates) == rates[59] == rates[60] == 1.0
    assert rates[0] == pytest.approx(1 / 60) and rates[-1] == pytest.approx(1 / 940)
    assert all(np.diff(rates[:60]) > 0) and all(np.diff(rates[60:]) < 0)


def micro_batch(tokenizer):
    texts = [np.arange(5, 105), np.arange(20, 90)]
    return Masker(tokenizer)(texts, 0.3, [[0], [1]])


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("scores", [1, 2000, 1 << 25])
def test_the_head_in_pieces_has_the_gradient_of_the_whole(tokenizer, scores):
    """Of the loss as one writes it down: the mean cross-entropy of all masked tokens."""
    whole, pieces = (tiny_model(tokenizer, NomicBertForMaskedLM) for _ in range(2))
    tokens, cu_seqlens, places, answers = micro_batch(tokenizer)
    expected = F.cross_entropy(whole(tokens, cu_seqlens, places), answers)
    expected.backward()
    batch = (tokens, cu_seqlens, places, answers, len(places))
    loss = backpropagate(pieces, *batch, scores=scores)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(pieces)[name], gradient, rtol=1e-4, atol=1e-6)


def test_scores_of_the_vocabulary_are_never_all_in_memory(tokenizer):
    model = tiny_model(tokenizer, NomicBertForMaskedLM, vocab_size=2048, hidden_size=32)
    batch = micro_batch(tokenizer)
    with LargestTensor() as largest:
        backpropagate(model, *batch, 50, scores=10 * 2048)
    words = model.bert.embeddings.word_embeddings.weight.numel()
    assert largest.elements == words, "the table of words is larger than ten rows of scores"
    with LargestTensor() as largest:
        backpropagate(model, *batch, 50)
    places = batch[2]
    assert largest.elements == len(places) * 2048 > words
