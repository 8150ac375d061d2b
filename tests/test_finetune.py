"""Hard negatives are hard, and negative; first dimensions become embeddings."""

import numpy as np
import pytest
import torch
from tiny import tiny_model, unit_rows, write_pairs
from torch import multiprocessing

import finetune
from contrastive import info_nce
from data import prepare, store
from finetune import choose_negatives, matryoshka_loss, mine, mine_hard_negatives


@pytest.mark.parametrize("margin", [np.inf, 1.0, 0.95, 0.5])
def test_negatives_are_the_nearest_that_score_below_the_margin_and_never_the_right_one(margin):
    """Of cosines of both signs: below 0, too, a margin keeps documents above the right one out."""
    query, document = torch.from_numpy(unit_rows(50)), torch.from_numpy(unit_rows(50, seed=1))
    answers = [{i} for i in range(50)]
    mined = mine_hard_negatives(query, document, torch.arange(50), answers, 49, margin)
    for i, scores in enumerate((query @ document.T).numpy()):
        bound = np.inf if margin == np.inf else scores[i] - (1 - margin) * abs(scores[i])
        expected = [j for j in np.argsort(-scores) if j != i and scores[j] < bound]
        assert mined[i].tolist() == expected + [-1] * (49 - len(expected))
    assert (mined >= 0).all() == (margin == np.inf)


def test_the_nearest_below_the_answer_are_mined_however_low_it_ranks():
    """The released miner looks at the first documents alone, and finds none here."""
    query, document = torch.eye(4)[:1], torch.tensor([[0.9], [0.8], [0.7], [0.3], [0.2], [0.1]])
    document = torch.cat((document, torch.zeros(6, 3)), 1)
    negatives = mine_hard_negatives(query, document, torch.tensor([3]), [{3, 4}], 2)
    assert negatives.tolist() == [[5, -1]], "4 is marked as right, 0 to 2 score higher than 3"
    assert mine_hard_negatives(query, document, torch.tensor([2]), [{2}], 2).tolist() == [[3, 4]]


def test_a_score_equal_to_that_of_the_right_document_is_dropped():
    document = torch.from_numpy(unit_rows(3))[[0, 1, 0, 2]]  # 0 and 2 are equal
    mined = mine_hard_negatives(document[:1], document, torch.tensor([0]), [{0}], 3)
    assert mined[0].tolist()[2] == -1 and set(mined[0, :2].tolist()) == {1, 3}


# Mining a source. The last four of 30 rows: a copy of document 0; a document that equals document 1
# as far as it is read; and another answer to each of the queries 2 and 3
WORDS = [a + b + c for a in "rst" for b in "aei" for c in "nlm"]
PAIRS = [(f"query of {word} and {word[::-1]}", f"text {word * 2}") for word in WORDS[:26]]
PAIRS += [("nobody asks", PAIRS[0][1]), ("nobody knows", PAIRS[1][1] + " more" * 30)]
PAIRS += [(PAIRS[2][0], "another answer"), (PAIRS[3][0], "one more answer")]
PREFIXES = {"query": "q: ", "document": "d: "}


@pytest.fixture
def source(tokenizer, tmp_path):
    write_pairs(tmp_path / "source", PAIRS, tokenizer, PREFIXES)
    return store.Source(tmp_path / "source", tokenizer)


def settings(**values):
    return finetune.Config(**{"mined": 29, "margin": np.inf, **values})


def test_copies_and_answers_to_an_equal_query_are_no_negatives(source, tokenizer):
    """At margin inf, so that only the marks can tell."""
    length = len(source.texts("document", [1], 99)[0])
    mined = mine(tiny_model(tokenizer), [source], settings(document_tokens=length))["source"]
    negatives = [row[row >= 0].tolist() for row in mined]
    for answers in ({0, 26}, {1, 27}, {2, 28}):  # copies; equal as read; two answers
        assert not any(answers & set(negatives[row]) for row in answers)
    assert all(len(row) == len(set(row)) for row in negatives)
    assert [len(row) for row in negatives[:4]] == [27, 27, 26, 26], "all others are found"


def test_mining_equals_its_plain_twin(source, tokenizer):
    """All scores, sorted. Of rows 0 and 26, whose documents are equal, 0 is the one that counts."""
    model, config = tiny_model(tokenizer), settings(mined=5, margin=1.0)
    mined = mine(model, [source], config)["source"]
    query = model.encode([f"q: {query}" for query, _ in PAIRS], config.query_tokens)
    document = model.encode([f"d: {text}" for _, text in PAIRS], config.document_tokens)
    scores = query @ document.T
    for i in range(26):
        wrong = [j for j in range(30) if PAIRS[j][0] != PAIRS[i][0] and j != 26]
        expected = [j for j in np.argsort(-scores[i]) if j in wrong and scores[i, j] < scores[i, i]]
        assert mined[i][mined[i] >= 0].tolist() == expected[:5], i


def mine_on(rank, world, source, model, folder):
    if world > 1:
        file = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", file, rank=rank, world_size=world)
    mined = finetune.mine_source(model, source, settings(mined=5, margin=1.0), 4 * len(source))
    np.save(folder / f"{world}-{rank}.npy", mined)


def test_two_processes_mine_what_one_does(source, tokenizer, tmp_path):
    """A chunk of rows is the same whichever process computes it, and so are its negatives."""
    for world in (1, 2):
        arguments = (world, source, tiny_model(tokenizer), tmp_path)
        multiprocessing.start_processes(mine_on, arguments, world, start_method="fork")
    one, first, second = (np.load(tmp_path / f"{name}.npy") for name in ("1-0", "2-0", "2-1"))
    assert np.array_equal(one, first) and np.array_equal(one, second)


def chosen(source, mined, row, count, seed=0):
    rng = np.random.default_rng(seed)
    return set(map(tuple, choose_negatives(source, mined, row, count, 64, rng)))


def test_queries_without_negatives_are_counted_and_get_random_ones(tokenizer, tmp_path, capsys):
    pairs = [("the same query", f"text {word}") for word in WORDS[:5]]
    write_pairs(tmp_path / "source", pairs, tokenizer, PREFIXES)
    source = store.Source(tmp_path / "source", tokenizer)
    mined = mine(tiny_model(tokenizer), [source], settings())
    assert (mined["source"] == -1).all(), "each document answers every query"
    assert "for 100% of them fewer than 1, and random documents" in capsys.readouterr().out
    documents = set(map(tuple, source.texts("document", range(5), 64)))
    negatives = chosen(source, mined, 0, 2)
    assert len(negatives) == 2 and negatives <= documents


def test_negatives_are_drawn_from_those_that_were_mined(source):
    mined = {"source": np.array([[3, 5, 7, -1]])}
    expected = set(map(tuple, source.texts("document", [3, 5, 7], 64)))
    drawn = [chosen(source, mined, 0, 2, seed) for seed in range(20)]
    assert all(len(negatives) == 2 for negatives in drawn) and set().union(*drawn) == expected


def test_a_source_keeps_the_negatives_that_it_brings(tokenizer, tmp_path):
    """Two each, except row 0, which has none, and gets other rows' documents."""
    rows = [
        {"query": word, "document": f"text {word}", "negatives": [word * 2, word * 3]}
        for word in WORDS
    ]
    rows[0]["negatives"] = []
    prepare.write_source(tmp_path / "own", rows, PREFIXES, tokenizer)
    source = store.Source(tmp_path / "own", tokenizer)
    mined = mine(tiny_model(tokenizer), [source], settings())
    assert mined == {} and source.negatives(5) == range(8, 10)

    own = set(map(tuple, source.texts("negative", [8, 9], 64)))
    documents = set(map(tuple, source.texts("document", range(len(WORDS)), 64)))
    assert chosen(source, mined, 5, 2) == own
    assert chosen(source, mined, 0, 3) <= documents
    assert len(chosen(source, mined, 5, 3) & documents) == 1


def test_matryoshka_adds_the_loss_of_the_first_dimensions_in_the_sizes_of_v1_5():
    sizes = [finetune.matryoshka_sizes(hidden_size) for hidden_size in (768, 256, 32)]
    assert sizes == [[64, 128, 256, 512, 768], [64, 128, 256], [32]]
    query, document = (torch.from_numpy(unit_rows(n, seed=n)) for n in (4, 9))
    q, d = (x[:, :4] / x[:, :4].norm(dim=1, keepdim=True) for x in (query, document))
    for first, keys in ((0, None), (3, None), (3, torch.arange(9) % 5)):
        more = (0.1, first, keys)
        expected = (info_nce(query, document, *more) + info_nce(q, d, *more)).item()
        loss = matryoshka_loss(query, document, 0.1, first, [4, 8], keys).item()
        assert loss == pytest.approx(expected), f"first={first}, keys={keys}"
