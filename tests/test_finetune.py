"""The loss of stage 3: every negative counts, and beginnings of embeddings become embeddings."""

import pytest
import torch
from tiny import unit_rows

from contrastive import info_nce
from finetune import Config, learning_rate, matryoshka_sizes


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
