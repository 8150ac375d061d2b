"""Masking, the loss, and what an untrained and a trained model make of them."""

import math

import numpy as np
import pytest
import torch
from tiny import LargestTensor, gradients, random_texts, tiny_model

from data.store import pack
from mlm import Masker, backward_in_chunks, held_out_scores, mask_tokens, mlm_loss
from model import NomicBertForMaskedLM

MASK, SPECIAL, VOCABULARY = 4, [0, 2, 3, 4], 1000


def masked(seed=0):
    tokens = np.random.default_rng(99).integers(0, VOCABULARY, 200_000)
    return tokens, *mask_tokens(tokens, 0.3, np.random.default_rng(seed), MASK, SPECIAL, VOCABULARY)


def test_30_percent_of_tokens_are_chosen_and_of_these_80_10_10():
    tokens, inputs, chosen = masked()
    assert chosen[~np.isin(tokens, SPECIAL)].mean() == pytest.approx(0.30, abs=0.01)
    hidden, same = inputs[chosen] == MASK, inputs[chosen] == tokens[chosen]
    assert hidden.mean() == pytest.approx(0.80, abs=0.01)
    assert same.mean() == pytest.approx(0.10, abs=0.01)
    random = inputs[chosen][~hidden & ~same]
    assert len(random) / chosen.sum() == pytest.approx(0.10, abs=0.01)
    assert len(np.unique(random)) > 0.99 * VOCABULARY, "of the whole vocabulary"
    moved = (inputs - tokens)[chosen][~hidden & ~same] % VOCABULARY
    assert len(np.unique(moved)) > 0.99 * VOCABULARY, "whatever the token was"


def test_special_tokens_are_never_chosen_and_only_chosen_tokens_change():
    tokens, inputs, chosen = masked()
    assert not chosen[np.isin(tokens, SPECIAL)].any()
    assert np.array_equal(inputs[~chosen], tokens[~chosen])


def test_the_mask_of_a_text_depends_on_its_seed_and_not_on_its_batch(tokenizer):
    assert np.array_equal(masked(seed=5)[1], masked(seed=5)[1])
    assert not np.array_equal(masked(seed=5)[1], masked(seed=6)[1])
    texts, masker = random_texts([30, 50, 40]), Masker(tokenizer)
    together, *_ = masker(texts, 0.3, [[0], [1], [2]])
    alone, other = (masker(texts[1:2], 0.3, [[seed]])[0] for seed in (1, 7))
    assert torch.equal(together[30:80], alone) and not torch.equal(other, alone)


def test_targets_are_the_original_tokens_at_the_chosen_positions(tokenizer):
    texts = random_texts([30, 50])
    inputs, _, positions, targets = Masker(tokenizer)(texts, 0.3, [[0], [1]])
    restored = inputs.index_copy(0, positions, targets)
    assert torch.equal(restored, pack(texts)[0]) and not torch.equal(restored, inputs)


def small_model(tokenizer):
    """With the weights that training begins with."""
    torch.manual_seed(0)
    model = NomicBertForMaskedLM(tiny_model().config)
    model.bert.tokenizer = tokenizer
    return model


def test_an_untrained_model_has_a_loss_of_about_ln_V(tokenizer):
    losses, hits, sequence = held_out_scores(small_model(tokenizer), random_texts([100] * 20))
    assert losses.mean().item() == pytest.approx(math.log(320), rel=0.05)
    assert hits.mean() < 0.05 and sequence.unique().tolist() == list(range(20))


def test_one_batch_can_be_memorised(tokenizer):
    model = small_model(tokenizer)
    batch = Masker(tokenizer)(random_texts([30] * 4), 0.3, [[i] for i in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        loss = backward_in_chunks(model, batch, len(batch[2]))
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("logits_in_memory", [1, 2000, 1 << 25])
def test_the_head_in_chunks_has_the_gradient_of_the_plain_loss(tokenizer, logits_in_memory):
    whole, chunks = (tiny_model(tokenizer, NomicBertForMaskedLM, vocab_size=320) for _ in range(2))
    batch = Masker(tokenizer)(random_texts([100, 70]), 0.3, [[0], [1]])
    tokens, cu_seqlens, positions, targets = batch
    expected = mlm_loss(whole(tokens, cu_seqlens, positions), targets) / len(positions)
    expected.backward()
    loss = backward_in_chunks(chunks, batch, len(positions), logits_in_memory)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradients(chunks), gradients(whole), rtol=1e-4, atol=1e-6)


def test_no_more_logits_are_in_memory_than_allowed(tokenizer):
    model = tiny_model(tokenizer, NomicBertForMaskedLM, vocab_size=2048, hidden_size=32)
    batch = Masker(tokenizer)(random_texts([100, 70]), 0.3, [[0], [1]])
    words = model.bert.embeddings.word_embeddings.weight.numel()
    for rows, largest_expected in ((10, words), (1000, len(batch[2]) * 2048)):
        with LargestTensor() as largest:
            backward_in_chunks(model, batch, 50, logits_in_memory=rows * 2048)
        assert largest.elements == largest_expected
    assert len(batch[2]) * 2048 > words > 10 * 2048


def test_pieces_have_the_same_masks_with_less_context(tokenizer):
    """What `evaluate.py long` relies on: the same tokens are asked for at every length."""
    model, texts = small_model(tokenizer), random_texts([64] * 3)
    losses, _, sequence = held_out_scores(model, texts, piece=16)
    tokens, _, positions, targets = Masker(tokenizer)(texts, 0.15, [[i] for i in range(3)])
    assert torch.equal(sequence, positions // 64)
    cu_seqlens = torch.arange(0, 193, 16, dtype=torch.int32)
    with torch.no_grad():
        logits = model(tokens, cu_seqlens, positions)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected)
