"""Metrics against values worked out by hand; retrieval tasks in the BEIR layout."""

import gzip
import json
import math
import re

import numpy as np
import pytest
from tiny import cases, refused, tiny_model

from data.tasks import splits_of
from metrics import Retrieval, bm25, mrr, ndcg, recall, summary, top_k


def test_one_relevant_document_at_each_rank():
    for rank in range(1, 11):
        ranking = [0] * (rank - 1) + [7] + [0] * (10 - rank)
        assert recall(ranking, {7: 1}) == 1 and mrr(ranking, {7: 1}) == 1 / rank
        assert ndcg(ranking, {7: 1}) == pytest.approx(1 / math.log2(1 + rank))
    assert [metric([0] * 10 + [7], {7: 1}) for metric in (recall, mrr, ndcg)] == [0, 0, 0]


def test_several_relevant_documents_of_different_grades():
    """Grades 3, 0, 2 found, and one of grade 1 missed: dcg = 3 + 2/2, best = 3 + 2/1.585 + 1/2."""
    relevant = {5: 3, 6: 2, 7: 1}
    assert ndcg([5, 9, 6], relevant) == pytest.approx((3 + 2 / 2) / (3 + 2 / math.log2(3) + 1 / 2))
    assert recall([5, 9, 6], relevant) == pytest.approx(2 / 3)
    assert mrr([9, 6, 5], relevant) == 1 / 2


@pytest.mark.parametrize("k", [1, 3, 10, 12])
def test_the_best_ranking_scores_1_at_every_k_and_what_comes_later_counts_nothing(k):
    """Of 12 relevant documents, grades 12 to 1; the one at rank k is missed, and less is scored."""
    relevant = {i: 12 - i for i in range(12)}
    assert ndcg(list(range(12)), relevant, k) == pytest.approx(1)
    missed = [*range(k - 1), 99, *range(k - 1, 12)]
    best = [(12 - i) / math.log2(2 + i) for i in range(k)]
    assert ndcg(missed, relevant, k) == pytest.approx(1 - best[-1] / sum(best))


def test_the_standard_error_is_that_of_the_mean_over_the_units_that_were_drawn():
    """Of six hits in three texts, deviations sum to 1, -1, 0: sqrt(3 / 2 * (1 + 1 + 0)) / 6."""
    assert summary([0, 1, 0, 1]) == {"mean": 0.5, "error": pytest.approx(math.sqrt(1 / 3) / 2)}
    assert summary([3]) == summary([3, 3], unit=[7, 7]) == {"mean": 3, "error": None}
    hits, texts = [1, 1, 0, 0, 1, 0], [4, 4, 8, 8, 5, 5]
    assert summary(hits, texts) == {"mean": 0.5, "error": pytest.approx(math.sqrt(3) / 6)}
    assert summary(hits, range(6)) == summary(hits)


@pytest.mark.parametrize("block", [1 << 26, 700, 1])
@pytest.mark.parametrize("k", [1, 5, 999])
def test_the_best_of_all_blocks_are_the_best_of_all(block, k):
    rng = np.random.default_rng(0)
    query, document = rng.normal(size=(37, 8)).astype("f"), rng.normal(size=(100, 8)).astype("f")
    scores, numbers = top_k(query, document, k, block)
    exact = query @ document.T
    assert np.array_equal(numbers, np.argsort(-exact, axis=1)[:, :k])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, numbers, 1), rtol=1e-4)


# A retrieval task in the BEIR layout
CORPUS = [{"_id": f"d{i}", "title": "", "text": f"document number {i} of many"} for i in range(30)]
CORPUS[7] |= {"title": "Seven", "text": "is a number"}
QUERIES = [{"_id": "q1", "text": "Seven is a number"}, {"_id": "q2", "text": "document number 13"}]
QRELS = ["query-id\tcorpus-id\tscore", "q1\td7\t2", "q1\td13\t0", "q2\td13\t1"]


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_task(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, ending="", prefixes=None):
    for name, rows in (("corpus", corpus), ("queries", queries)):
        write_text(folder / f"{name}.jsonl{ending}", json_lines(rows))
    write_text(folder / "qrels" / "test.tsv", "\n".join(qrels) + "\n")
    if prefixes is not None:
        write_text(folder / "meta.json", json.dumps({"prefixes": prefixes}))
    return folder


@cases(
    "ending, qrels",
    (".gz", QRELS),
    ("", ["q1\td7\t2.000e+00", "q2\td13\t+1.", "q1\td13\t-1"]),
    ("", ["\ufeffquery-id\tcorpus-id\tscore", *QRELS[1:], "", " "]),
    ("", [f"{line}\r" for line in QRELS]),
)
def test_a_task_is_read_with_titles_and_prefixes_and_without_grade_0(tmp_path, ending, qrels):
    """Grades are in any notation; there may be blank lines."""
    task = Retrieval(write_task(tmp_path / "task", ending=ending, qrels=qrels), "test")
    assert task.documents[7] == "Seven is a number" and len(task.documents) == 30
    assert task.relevant == [{7: 2}, {13: 1}]
    assert task.prefixes["query"] == "search_query: "


BAD_ROWS = [{"_id": "d7"}, {"text": "no id"}, {"_id": "d99", "text": 3}, {"_id": 1.5, "text": "a"}]
BAD_ROWS += [{"_id": "d99", "title": ["a"], "text": "a"}]


@cases(
    "damage, message",
    *[({"corpus": [*CORPUS, row]}, "corpus.jsonl, line 31: not ") for row in BAD_ROWS],
    ({"corpus": []}, "corpus.jsonl is empty: a text is a line"),
    ({"corpus": [{"_id": n, "text": "a"} for n in ("1", 1)]}, "line 2: the _id 1 is there twice"),
    ({"queries": [*QUERIES, []]}, "queries.jsonl, line 3 holds a list, not an object"),
    ({"qrels": ["q1 d7 1"]}, "test.tsv, line 1: not query-id, corpus-id and score, separated"),
    *[({"qrels": [f"q1\td7\t{g}"]}, f"grade {g} is no whole") for g in ("1.5", "1000", "nan")],
    ({"qrels": [*QRELS, "q2\td99\t1"]}, "test.tsv, line 5: d99 is not in corpus.jsonl"),
    ({"qrels": [*QRELS, "q9\td3\t1"]}, "test.tsv, line 5: q9 is not in queries.jsonl"),
    *[({"prefixes": text}, "meta.json: prefixes are not {") for text in (3, {"query": 3})],
    ({"qrels": QRELS[:1]}, "test.tsv judges no document relevant"),
)
def test_a_bad_task_is_an_error_that_names_file_and_line(tmp_path, damage, message):
    with refused(re.escape(message)):
        Retrieval(write_task(tmp_path / "task", **damage), "test")


def test_the_splits_are_the_tsv_files(tmp_path):
    for name in ("test.tsv", "test.tsv.bak", "test.tsv~", "my.dev.tsv.gz", "._test.tsv", "a.txt"):
        write_text(tmp_path / "qrels" / name, "")
    assert splits_of(tmp_path) == ["my.dev", "test"]


def test_a_query_that_is_a_document_under_the_same_id_is_left_out(tmp_path, data_tokenizer):
    """As in ArguAna; not where its judgements name it. beir and mteb leave it out, too."""
    queries = [CORPUS[13], CORPUS[5], {"_id": "q", "text": CORPUS[13]["text"]}]
    qrels = ["d13\td7\t1", "d5\td5\t1", "q\td7\t1"]
    task = Retrieval(write_task(tmp_path / "task", queries=queries, qrels=qrels), "test")
    model = tiny_model(data_tokenizer)
    for rankings in (task.rank(model, 99), task.rank_bm25(), task.rank(model, 99, k=3)):
        assert 13 not in rankings[0] and 5 in rankings[1] and rankings[2, 0] == 13
    assert sorted(task.rank(model, 99)[0]) == [-1, *(i for i in range(30) if i != 13)]


def test_bm25_does_not_find_documents_without_a_word_of_the_query(tmp_path):
    queries = [QUERIES[0], {"_id": "q2", "text": "xylophone"}]
    task = Retrieval(write_task(tmp_path / "task", queries=queries), "test")
    rankings = task.rank_bm25()
    assert rankings[0, 0] == 7 and (rankings[1] == -1).all()
    assert task.scores(rankings)["recall@100"] == [1.0, 0.0]
    assert bm25(["many words"])(["a", ""]).tolist() == [[-1], [-1]]
    assert bm25(["the of", "! ?"])(["the words"]).tolist() == [[-1, -1]], "nothing to index"


def test_a_sampled_pool_keeps_every_relevant_document(tmp_path):
    whole = Retrieval(write_task(tmp_path / "task"), "test")
    sample = Retrieval(tmp_path / "task", "test", pool=5, queries=1)
    assert len(sample.queries) == 1 and len(sample.documents) == 5
    (right,) = sample.relevant[0]
    assert sample.documents[right] == whole.documents[7]
