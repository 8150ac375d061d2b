"""Metrics against values worked out by hand, and search by the real thing."""

import json
import math

import numpy as np
import pytest
from tiny import tiny_model

import evaluate
from evaluate import Options
from options import InputError
from retrieval import Retrieval, bm25_rank, mrr, ndcg, recall, summary, top_k
from search import Index


def test_one_right_document_at_each_rank():
    for rank in range(1, 11):
        ranking = [0] * (rank - 1) + [7] + [0] * (10 - rank)
        assert recall(ranking, {7: 1}) == 1
        assert mrr(ranking, {7: 1}) == 1 / rank
        assert ndcg(ranking, {7: 1}) == pytest.approx(1 / math.log2(1 + rank))
    beyond = [0] * 10 + [7]
    assert recall(beyond, {7: 1}) == mrr(beyond, {7: 1}) == ndcg(beyond, {7: 1}) == 0


def test_several_right_documents_of_different_grades():
    """Grades 3, 0, 2 found, and one of grade 1 missed: dcg = 3 + 2/2, best = 3 + 2/1.585 + 1/2."""
    relevant = {5: 3, 6: 2, 7: 1}
    assert ndcg([5, 9, 6], relevant) == pytest.approx((3 + 2 / 2) / (3 + 2 / math.log2(3) + 1 / 2))
    assert recall([5, 9, 6], relevant) == pytest.approx(2 / 3)
    assert mrr([9, 6, 5], relevant) == 1 / 2


def test_standard_error_is_the_deviation_of_the_mean():
    assert summary([0, 1, 0, 1])["mean"] == 0.5
    assert summary([0, 1, 0, 1])["error"] == pytest.approx(math.sqrt(1 / 3) / 2)


def test_top_k_in_blocks_is_exact():
    rng = np.random.default_rng(0)
    query, document = rng.normal(size=(37, 8)).astype("f"), rng.normal(size=(100, 8)).astype("f")
    scores, numbers = top_k(query, document, 5, block=(10, 30))
    exact = query @ document.T
    assert np.array_equal(numbers, np.argsort(-exact, axis=1)[:, :5])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, numbers, 1), rtol=1e-5)


def test_a_sampled_pool_keeps_every_right_document(data):
    folder = data / "retrieval" / "summary-body"
    whole, sample = Retrieval(folder, "test"), Retrieval(folder, "test", pool=60, queries=10)
    assert len(sample.queries) == 10 and len(sample.documents) == 60
    for number, relevant in enumerate(sample.relevant):
        (right,), (right_in_whole,) = relevant, whole.relevant[number]
        assert sample.documents[right] == whole.documents[right_in_whole]


def test_bm25_finds_a_document_by_its_words(data):
    task = Retrieval(data / "retrieval" / "summary-body", "test")
    task.queries = task.documents[:5]
    task.relevant = [{i: 1} for i in range(5)]
    rankings = bm25_rank(task, split_identifiers=True)
    assert np.mean(task.scores(rankings)["recall@10"]) == 1


def test_a_folder_that_is_no_task_is_an_error(tmp_path):
    with pytest.raises(InputError, match="corpus.jsonl cannot be read: No such file"):
        Retrieval(tmp_path, "test")


# ------------------------------------------------------------------------------------------------
# Search


@pytest.fixture
def model_directory(data_tokenizer, tmp_path):
    directory = tmp_path / "model"
    tiny_model(data_tokenizer).save_pretrained(directory)
    return directory


def test_search_ranks_by_cosine_and_a_text_finds_itself(model_directory, data):
    index = Index(model_directory, data, max_tokens=128)
    row = json.loads((data / "search" / "corpus.jsonl").read_text().split("\n")[7])
    index.embeddings = index.model.encode([row["text"]])[[0] * len(index.embeddings)]
    assert len(list(index.search("anything"))) == 10
    index = Index(model_directory, data, max_tokens=128)
    found = list(index.search("the sum of two arrays"))
    assert [score for score, _, _ in found] == sorted((s for s, _, _ in found), reverse=True)


def test_embeddings_are_kept_and_made_anew_when_the_checkpoint_changes(
    model_directory, data, capsys
):
    Index(model_directory, data, max_tokens=128)
    assert "embedding" in capsys.readouterr().err
    Index(model_directory, data, max_tokens=128)
    assert "embedding" not in capsys.readouterr().err
    other = tiny_model(vocab_size=2048)
    other.tokenizer = Index(model_directory, data, 128).model.tokenizer
    other.emb_ln.weight.data.mul_(2)
    other.save_pretrained(model_directory)
    Index(model_directory, data, max_tokens=128)
    assert "embedding" in capsys.readouterr().err


def test_an_empty_query_is_an_error(model_directory, data):
    with pytest.raises(InputError, match="query is empty"):
        list(Index(model_directory, data, 128).search("  "))


def test_nothing_trained_is_an_error_that_says_what_to_do(tmp_path, data):
    for command in (evaluate.ladder, lambda options: evaluate.search(options, "x")):
        with pytest.raises(InputError, match="nothing was trained in .* make demo"):
            command(Options(data=str(data), out=str(tmp_path)))
