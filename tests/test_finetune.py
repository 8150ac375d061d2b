"""Hard negatives: hard, negative, and all of them used."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from contrastive import info_nce
from finetune import Config, choose_negatives, learning_rate, matryoshka_sizes, mine_hard_negatives


def unit_rows(n, E=8, seed=0):
    rows = np.random.default_rng(seed).normal(size=(n, E)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_mined_negatives_are_never_the_positive():
    """The released script means to remove it, and compares a dictionary with a string."""
    query = unit_rows(200)
    mined, _ = mine_hard_negatives(query, unit_rows(200, seed=1), nearest=20)
    assert not (mined == np.arange(200)[:, None]).any()


def test_mined_negatives_are_the_nearest_that_score_below_the_positive():
    query, document = unit_rows(50), unit_rows(50, seed=1)
    mined, dropped = mine_hard_negatives(query, document, nearest=50)
    count = 0
    for i, scores in enumerate(query @ document.T):
        wrong = [j for j in np.argsort(-scores) if j != i]
        expected = [j for j in wrong if scores[j] < scores[i]]
        count += len(wrong) - len(expected)
        assert mined[i][mined[i] >= 0].tolist() == expected
    assert dropped == count


def test_a_copy_of_the_positive_is_dropped_as_a_likely_answer():
    query = unit_rows(4)
    document = query[[0, 1, 2, 0]].copy()  # document 3 says what document 0 says
    mined, dropped = mine_hard_negatives(query, document, nearest=3)
    assert 3 not in mined[0] and dropped >= 1


def test_a_smaller_margin_drops_more():
    query, document = unit_rows(100), unit_rows(100, seed=1)
    own = F.normalize(torch.from_numpy(query + document), dim=1).numpy()  # positives score high
    counts = [mine_hard_negatives(query, own, 20, margin)[1] for margin in (1.0, 0.8, 0.5)]
    assert counts[0] < counts[1] < counts[2]


def test_too_few_mined_negatives_are_filled_up_with_other_documents():
    mined = np.array([[3, -1, -1], [2, 3, -1], [-1, -1, -1], [0, 1, 2]])
    for seed in range(20):
        chosen = choose_negatives(mined, 0, 2, np.random.default_rng(seed))
        assert 3 in chosen and 0 not in chosen and len(set(chosen)) == 2
    assert sorted(choose_negatives(mined, 3, 3, np.random.default_rng(0))) == [0, 1, 2]


def test_every_negative_counts_in_the_loss():
    """A released GradCache cut the documents at the number of queries: 3 of 4 were never seen."""
    query, document, negative = (torch.from_numpy(unit_rows(n, seed=n)) for n in (4, 4, 12))
    query = document = torch.from_numpy(unit_rows(4))
    full = info_nce(query, torch.cat((document, negative)), 0.5)
    for i in range(12):
        without = torch.cat((document, negative[:i], negative[i + 1 :]))
        assert info_nce(query, without, 0.5) < full


def test_matryoshka_sizes_are_those_of_v1_5():
    assert matryoshka_sizes(768) == [64, 128, 256, 512, 768]
    assert matryoshka_sizes(256) == [64, 128, 256]
    assert matryoshka_sizes(32) == [32]


def test_the_learning_rate_rises_and_falls_to_nothing():
    config = Config(lr=2e-5, warmup=400, steps=6612)
    assert learning_rate(399, config) == pytest.approx(2e-5)
    assert learning_rate(6611, config) < 1e-8
