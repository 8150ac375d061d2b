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
from data.tasks import splits_of
from evaluate import Retrieval, fuse, mrr, ndcg, recall, summary, top_k
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
    assert summary([3]) == summary([3, 3], unit=[7, 7]) == {"mean": 3, "error": None}


def test_values_of_one_unit_count_as_one_draw():
    """Deviations sum to 1, -1, 0 in the three texts: sqrt(3 / 2 * (1 + 1 + 0)) / 6."""
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


# ------------------------------------------------------------------------------------------------
# Retrieval tasks in the BEIR layout

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
        write_text(folder / "meta.json", json.dumps({"prefixes": json.loads(prefixes)}))
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
BAD_GRADES = ["1.5", "--5", "²", "high", "", "nan", "inf", "1e9", "1000"]
BAD_PREFIXES = ["3", "null", '["search_query: "]', '"q"', '{"query": 3}', '{"query": null}']


@cases(
    ("damage", "message"),
    [
        *[({"corpus": [*CORPUS, row]}, "corpus.jsonl, line 31: not ") for row in BAD_ROWS],
        ({"corpus": [*CORPUS, CORPUS[3]]}, "corpus.jsonl, line 31: the _id d3 is there twice"),
        ({"corpus": []}, "corpus.jsonl is empty: a text is a line"),
        ({"corpus": [{"_id": n, "text": "a"} for n in ("1", 1)]}, "line 2: the _id 1 is there tw"),
        ({"queries": [*QUERIES, []]}, "queries.jsonl, line 3: not "),
        ({"qrels": ["q1 d7 1"]}, "test.tsv, line 1: not query-id, corpus-id and score, separated"),
        *[({"qrels": [f"q1\td7\t{g}"]}, f"line 1: the grade {g} is no whole") for g in BAD_GRADES],
        ({"qrels": [*QRELS, "q2\td99\t1"]}, "test.tsv, line 5: d99 is not in corpus.jsonl"),
        ({"qrels": [*QRELS, "q9\td3\t1"]}, "test.tsv, line 5: q9 is not in queries.jsonl"),
        *[({"prefixes": prefixes}, "meta.json: prefixes are not {") for prefixes in BAD_PREFIXES],
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
        ["q1\td7\t2.000e+00", "q2\td13\t+1."],
        ["", *QRELS, "", " "],
        ["\ufeffquery-id\tcorpus-id\tscore", *QRELS[1:]],
        [f"{line}\r" for line in QRELS],
    ],
)
def test_grades_in_any_notation_and_blank_lines_are_read(tmp_path, qrels):
    task = Retrieval(write_task(tmp_path / "task", qrels=qrels), "test")
    assert task.relevant == [{7: 2}, {13: 1}]


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
    assert evaluate.bm25(["many words"])(["a", ""]).tolist() == [[-1], [-1]]
    for documents in (["the of", "and"], ["! ?", "..."], ["x", "y z"], ["", " "], ["a_b", "_"]):
        assert evaluate.bm25(documents, True)(["the words"]).tolist() == [[-1, -1]]


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


def test_a_folder_is_scored_beside_bm25_and_other_settings_are_other_results(
    directory, tmp_path, capsys
):
    write_task(tmp_path / "task")
    command = ["retrieval", str(tmp_path / "task"), f"--model={directory}", f"--out={tmp_path}"]
    evaluate.main(command)
    title, head, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert title == "task, test: 2 queries, 30 documents" and "recall@100" in head
    bm25, model, both, minus = ([float(x) for x in re.findall(r"(\S+) ±", row)] for row in rows)
    assert bm25[0] > 0.9, "the queries' words are the documents'"
    assert model[3] == 1.0, "recall@100 among 30 documents"
    np.testing.assert_allclose(minus, np.subtract(both, bm25), atol=2e-3)
    for option in ("--dims=8", "--dims=16", "--max-tokens=5", "--rope-factor=3"):
        evaluate.main([*command, option])
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5


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
        kinds = (PromptType.query, PromptType.document)
        keys = [model.get_prompt_name(task, kind) for kind in kinds]
        assert tuple(model.model_prompts[key] for key in keys) == prefixes, name


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

    def search(*arguments, corpus=CORPUS):
        write_text(tmp_path / "search" / "corpus.jsonl", json_lines(corpus))
        options = [f"--model={directory}", f"--data={tmp_path}", f"--out={tmp_path}"]
        evaluate.main(["search", "document number 13", *options, *arguments])
        return capsys.readouterr()

    return search


def test_search_shows_the_ten_best_by_cosine(search, directory):
    head, *shown = [line.split() for line in search("--model-only").out.splitlines()]
    ranks, scores, names = zip(*shown[::2], strict=True)
    assert head == ["model", "cosine"] and ranks == tuple("1 2 3 4 5 6 7 8 9 10".split())
    model = NomicBert.from_pretrained(directory)
    documents = [f"search_document: {row['title']} {row['text']}" for row in CORPUS]
    cosines = model.encode(documents) @ model.encode(["search_query: document number 13"])[0]
    best = np.argsort(-cosines)[:10]
    np.testing.assert_allclose(np.array(scores, float), cosines[best], atol=2e-3)
    np.testing.assert_allclose(cosines[[int(name[1:]) for name in names]], cosines[best], atol=2e-3)


def test_search_says_where_the_model_and_bm25_rank_what_it_finds(search):
    head, *shown = [line.split() for line in search().out.splitlines()]
    assert head == ["model", "BM25", "cosine"]
    ranks = [[int(rank) for rank in row[:2]] for row in shown[::2]]
    assert shown[0][1] == "1" and shown[0][3] == "d13", "the only one with all words of the query"
    fused = [sum(1 / (60 + rank) for rank in pair) for pair in ranks]
    assert len(fused) == 10 and fused == sorted(fused, reverse=True)
    alone = search(corpus=[{"_id": 1, "text": "the of"}, {"_id": "a", "text": "! ?"}]).out
    assert [line.split()[:2] for line in alone.splitlines()[1::2]] == [["1", "-"], ["2", "-"]]


def test_a_search_in_some_documents_draws_them_at_random(search):
    first, again = search("--documents=4"), search("--documents=4")
    assert "embedding 4 documents" in first.err and len(first.out.splitlines()) == 1 + 2 * 4
    assert "embedding" not in again.err and first.out == again.out
    assert "embedding 30 documents" in search().err


@cases("rows", [[], [{"_id": "a"}], [{"text": "a"}], [{"_id": "a", "text": None}], [3]])
def test_a_damaged_corpus_is_an_error_that_names_it(search, rows):
    with pytest.raises(InputError, match=r"search.corpus.jsonl(, line 1| is empty)"):
        search(corpus=rows)


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
        (["search", " ", "--data="], "the query is empty"),
        (["search", "x", "--data="], "nothing was trained in"),
        (["--data=DATA"], "nothing was trained in .*: run make demo, or give another --out"),
        (["long", "--data="], "there is no checkpoint directory .*/mlm"),
        (["retrieval"], "retrieval: give search, long, plot, retrieval FOLDER, or nothing"),
        (["retrieval", "nowhere"], "has no qrels"),
        (["sing"], "sing: give search"),
        (["plot"], "has nothing to draw: train first, or give another --out"),
        *[(["--data=", option], f"^{option[:6]}.*: ladder does not use it; its options are --data")
          for option in ("--model=x", "--dims=8", "--model-only", "--rope-factor=2")],
        (["search", "x", "--split=dev"], "^--split: search does not use it"),
        (["plot", "--dims=8"], "^--dims: plot does not use it; its options are --out"),
    ],
)  # fmt: skip
def test_a_command_without_what_it_needs_or_with_what_it_does_not_use_says_so(
    words, message, data, tmp_path
):
    with pytest.raises(InputError, match=message):
        words = [word.replace("DATA", str(data)) for word in words]
        evaluate.main([*words, f"--out={tmp_path}"])
