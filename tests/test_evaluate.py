"""Metrics against values worked out by hand; search, retrieval and MTEB by the real thing."""

import gzip
import json
import math
import re

import numpy as np
import pytest
from tiny import cases, tiny_model

import evaluate
from common.options import InputError
from evaluate import Options, Retrieval, fuse, mrr, ndcg, recall, summary, top_k
from model import NomicBert


@pytest.fixture
def directory(data_tokenizer, tmp_path):
    """A checkpoint of the tokenizer of `data`."""
    tiny_model(data_tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


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
    """Of 12 relevant documents, grades 12 to 1; and with the first k - 1 of them alone, less."""
    relevant = {i: 12 - i for i in range(12)}
    assert ndcg(list(range(12)), relevant, k) == pytest.approx(1)
    missed = [*range(k - 1), 99, *range(k - 1, 12)]
    best = [(12 - i) / math.log2(2 + i) for i in range(k)]
    assert ndcg(missed, relevant, k) == pytest.approx(1 - best[-1] / sum(best))


def test_the_standard_error_is_the_deviation_of_the_mean():
    assert summary([0, 1, 0, 1]) == {"mean": 0.5, "error": pytest.approx(math.sqrt(1 / 3) / 2)}


@pytest.mark.parametrize("block", [(4096, 8192), (7, 13), (1, 99)])
@pytest.mark.parametrize("k", [1, 5, 999])
def test_the_best_of_all_blocks_are_the_best_of_all(block, k):
    rng = np.random.default_rng(0)
    query, document = rng.normal(size=(37, 8)).astype("f"), rng.normal(size=(100, 8)).astype("f")
    scores, numbers = top_k(query, document, k, block)
    exact = query @ document.T
    assert np.array_equal(numbers, np.argsort(-exact, axis=1)[:, :k])
    np.testing.assert_allclose(scores, np.take_along_axis(exact, numbers, 1), rtol=1e-4)


# ------------------------------------------------------------------------------------------------
# Retrieval tasks in the BEIR layout

CORPUS = [{"_id": f"d{i}", "title": "", "text": f"document number {i} of many"} for i in range(30)]
CORPUS[7] |= {"title": "Seven", "text": "is a number"}
QUERIES = [{"_id": "q1", "text": "Seven is a number"}, {"_id": "q2", "text": "document number 13"}]
QRELS = ["query-id\tcorpus-id\tscore", "q1\td7\t2", "q1\td13\t0", "q2\td13\t1"]


def write_text(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_task(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, ending=""):
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_text(folder / f"{name}.jsonl{ending}", lines)
    write_text(folder / "qrels" / "test.tsv", "\n".join(qrels) + "\n")
    return folder


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_task_is_read_with_titles_and_prefixes_and_without_grade_0(tmp_path, ending):
    task = Retrieval(write_task(tmp_path / "task", ending=ending), "test")
    assert task.documents[7] == "Seven is a number" and len(task.documents) == 30
    assert task.relevant == [{7: 2}, {13: 1}]
    assert task.prefixes["query"] == "search_query: "


BAD_ROWS = [[], {"_id": "d7"}, {"text": "no id"}, {"_id": None, "text": "a"}]
BAD_ROWS += [{"_id": "d99", "text": text} for text in (None, 3, ["a"])]
BAD_ROWS += [{"_id": name, "text": "a"} for name in (1.5, True, ["a"])]
BAD_ROWS += [{"_id": "d99", "title": ["a"], "text": "a"}]
BAD_GRADES = ["1.5", "--5", "²", "high", "", "nan", "inf", "1e9"]


@cases(
    ("damage", "message"),
    [
        *[({"corpus": [*CORPUS, row]}, "corpus.jsonl, line 31: not ") for row in BAD_ROWS],
        ({"corpus": [*CORPUS, CORPUS[3]]}, "corpus.jsonl, line 31: the _id d3 is there twice"),
        ({"corpus": [{"_id": n, "text": "a"} for n in ("1", 1)]}, "line 2: the _id 1 is there tw"),
        ({"queries": [*QUERIES, []]}, "queries.jsonl, line 3: not "),
        ({"qrels": ["q1 d7 1"]}, "test.tsv, line 1: not query-id, corpus-id and score, separated"),
        *[({"qrels": [f"q1\td7\t{g}"]}, f"line 1: the grade {g} is no whole") for g in BAD_GRADES],
        ({"qrels": [*QRELS, "q2\td99\t1"]}, "test.tsv, line 5: d99 is not in corpus.jsonl"),
        ({"qrels": [*QRELS, "q9\td3\t1"]}, "test.tsv, line 5: q9 is not in queries.jsonl"),
        ({"qrels": QRELS[:1]}, "test.tsv judges no document relevant"),
    ],
)
def test_a_bad_task_is_an_error_that_names_file_and_line(tmp_path, damage, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Retrieval(write_task(tmp_path / "task", **damage), "test")


@cases(
    "qrels",
    [
        ["q1\td7\t2.0", "q2\td13\t1e0", "q1\td13\t-1"],
        ["", *QRELS, "", " "],
        ["\ufeffquery-id\tcorpus-id\tscore", *QRELS[1:]],
        [f"{line}\r" for line in QRELS],
    ],
)
def test_grades_in_any_notation_and_blank_lines_are_read(tmp_path, qrels):
    task = Retrieval(write_task(tmp_path / "task", qrels=qrels), "test")
    assert task.relevant == [{7: 2}, {13: 1}]


def test_bm25_does_not_find_documents_without_a_word_of_the_query(tmp_path):
    queries = [QUERIES[0], {"_id": "q2", "text": "xylophone"}]
    task = Retrieval(write_task(tmp_path / "task", queries=queries), "test")
    rankings = task.rank_bm25()
    assert rankings[0, 0] == 7 and (rankings[1] == -1).all()
    assert task.scores(rankings)["recall@100"] == [1.0, 0.0]
    assert evaluate.bm25(["many words"])(["a", ""]).tolist() == [[-1], [-1]]


def test_a_sampled_pool_keeps_every_relevant_document(tmp_path):
    whole = Retrieval(write_task(tmp_path / "task"), "test")
    sample = Retrieval(tmp_path / "task", "test", pool=5, queries=1)
    assert len(sample.queries) == 1 and len(sample.documents) == 5
    (right,) = sample.relevant[0]
    assert sample.documents[right] == whole.documents[7]


def test_fusion_adds_up_reciprocal_ranks():
    """5 is second in both: 2 / 62. 3 and 7 are first in one: 1 / 61; 9 is third: 1 / 63."""
    fused = fuse([np.array([[3, 5, 9]]), np.array([[7, 5, -1]])], k=5)
    assert fused.tolist() == [[5, 3, 7, 9, -1]]


def test_a_folder_is_scored_beside_bm25(directory, tmp_path, capsys):
    options = Options(model=str(directory), out=str(tmp_path))
    task = Retrieval(write_task(tmp_path / "task"), "test")
    assert task.rank_bm25(split_identifiers=True)[:, 0].tolist() == [7, 13]
    evaluate.retrieval(options, tmp_path / "task")
    lines = capsys.readouterr().out.splitlines()
    assert "recall@100" in lines[1] and lines[2].startswith("BM25") and len(lines) == 4
    bm25, model = (line[20:].split() for line in lines[2:])
    assert float(bm25[0]) > 0.9, "the queries' words are the documents'"
    assert float(model[6]) == 1.0, "recall@100 among 30 documents"
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2


# ------------------------------------------------------------------------------------------------
# MTEB


@pytest.mark.filterwarnings("ignore:Some prompts")
def test_each_type_of_mteb_task_has_the_prefix_of_the_paper(directory):
    mteb = pytest.importorskip("mteb")
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.types import PromptType
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformerEncoderWrapper(SentenceTransformer(str(directory), device="cpu"))
    expected = {
        "SciFact": ("search_query: ", "search_document: "),
        "QuoraRetrieval": ("search_query: ", "search_query: "),
        "TwentyNewsgroupsClustering.v2": ("clustering: ",) * 2,
    }
    others = ("Banking77Classification", "SprintDuplicateQuestions", "AskUbuntuDupQuestions")
    others += ("STSBenchmark", "SummEvalSummarization.v2")
    for name, prefixes in (expected | dict.fromkeys(others, ("classification: ",) * 2)).items():
        task = mteb.get_task(name).metadata
        found = (
            model.get_prompt_name(task, kind) for kind in (PromptType.query, PromptType.document)
        )
        assert tuple(model.model_prompts[key] for key in found) == prefixes, name


@pytest.mark.filterwarnings("ignore:Some prompts")
def test_mteb_scores_a_checkpoint_as_we_do(directory, tmp_path):
    """Its own library on its own: `mteb.evaluate(SentenceTransformer(directory), tasks)`."""
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from sentence_transformers import SentenceTransformer

    ours = Retrieval(write_task(tmp_path / "task"), "test")
    corpus = [{"id": f"d{i}", "text": text} for i, text in enumerate(ours.documents)]
    queries = [{"id": row["_id"], "text": row["text"]} for row in QUERIES]
    about = {"description": "made in a test", "dataset": {"path": "made/here", "revision": "1"}}
    about |= {"eval_splits": ["test"], "eval_langs": ["eng-Latn"], "main_score": "ndcg_at_10"}

    class Task(AbsTaskRetrieval):
        metadata = TaskMetadata(name="Made", type="Retrieval", **about)

        def load_data(self, *arguments, **kwargs):
            split = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries)}
            split |= {"relevant_docs": {"q1": {"d7": 2}, "q2": {"d13": 1}}, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": split}}, True

    theirs = mteb.evaluate(SentenceTransformer(str(directory), device="cpu"), Task(), cache=None)
    scores = ours.scores(ours.rank(NomicBert.from_pretrained(directory), 8192))["nDCG@10"]
    assert theirs.task_results[0].get_score() == pytest.approx(np.mean(scores), abs=1e-5)


# ------------------------------------------------------------------------------------------------
# Search


@pytest.fixture
def search(directory, tmp_path, capsys):
    """Searches CORPUS with the model alone. Returns what is printed on stdout and stderr."""
    lines = "".join(json.dumps(row) + "\n" for row in CORPUS)
    write_text(tmp_path / "search" / "corpus.jsonl", lines)

    def search(model_only=True):
        options = Options(model=str(directory), data=str(tmp_path), out=str(tmp_path))
        options.model_only = model_only
        evaluate.search(options, "document number 13")
        return capsys.readouterr()

    return search


def test_search_shows_the_ten_best_by_cosine(search, directory):
    shown = [line.split() for line in search().out.splitlines()[::2]]
    scores = [float(score) for score, _ in shown]
    model = NomicBert.from_pretrained(directory)
    documents = model.encode([f"search_document: {row['text']}" for row in CORPUS])
    (query,) = model.encode(["search_query: document number 13"])
    cosines = {row["_id"]: x @ query for row, x in zip(CORPUS, documents, strict=True)}
    assert len(scores) == 10 and scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(scores, sorted(cosines.values(), reverse=True)[:10], atol=2e-3)
    np.testing.assert_allclose(scores, [cosines[name] for _, name in shown], atol=2e-3)


def test_search_takes_bm25_along_and_says_so(search):
    shown, alone = search(model_only=False), search()
    assert "the model and BM25 together; --model-only" in shown.err
    assert "BM25" not in alone.err and shown.out != alone.out
    assert "d13" in shown.out.splitlines()[0], "the only one with all words of the query"


def test_embeddings_are_kept_until_the_checkpoint_changes_or_they_are_damaged(search, directory):
    assert "embedding" in search().err and "embedding" not in search().err
    other = NomicBert.from_pretrained(directory)
    other.emb_ln.weight.data.mul_(2)
    other.save_pretrained(directory)
    assert "embedding" in search().err and "embedding" not in search().err
    (directory / "nanoembed-search.safetensors").write_bytes(b"damaged")
    assert "embedding" in search().err


@cases(
    ("words", "message"),
    [
        (["search", " "], "the query is empty"),
        (["search", "x"], "nothing was trained in"),
        ([], "nothing was trained in .*: python mlm.py, make demo, or --model"),
        (["long"], "there is no checkpoint directory .*/mlm"),
        (["retrieval"], "retrieval: give search, long, plot, retrieval FOLDER, or nothing"),
        (["retrieval", "nowhere"], "has no qrels"),
        (["sing"], "sing: give search"),
    ],
)
def test_a_command_without_what_it_needs_says_so(words, message, data, tmp_path):
    with pytest.raises(InputError, match=message):
        evaluate.main([*words, f"--data={data}", f"--out={tmp_path}"])
