"""The ladder, search, retrieval and MTEB by the real thing."""

import json
import re

import numpy as np
import pytest
from test_metrics import CORPUS, QUERIES, json_lines, write_task, write_text
from tiny import cases, refused, tiny_model

import evaluate
from evaluate import fuse
from metrics import Retrieval
from model import NomicBert


@pytest.fixture
def directory(data_tokenizer, tmp_path):
    """A checkpoint of the tokenizer of `data`."""
    tiny_model(data_tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_fusion_adds_up_reciprocal_ranks():
    """5 is second in both: 2 / 62. 3 and 7 are first in one: 1 / 61; 9 is third: 1 / 63."""
    fused = fuse([np.array([[3, 5, 9]]), np.array([[7, 5, -1]])], k=5)
    assert fused.tolist() == [[5, 3, 7, 9, -1]]


def test_a_folder_is_scored_beside_bm25_for_each_setting(directory, tmp_path, capsys):
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
    others = "Banking77Classification SprintDuplicateQuestions AskUbuntuDupQuestions STSBenchmark"
    expected |= dict.fromkeys(others.split(), ("classification: ",) * 2)
    for name, prefixes in expected.items():
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
    of_names = cosines[[int(name[1:]) for name in names]]
    for values in (np.array(scores, float), of_names):
        np.testing.assert_allclose(values, np.sort(-cosines)[:10] * -1, atol=2e-3)


def test_search_says_where_the_model_and_bm25_rank_what_it_finds(search):
    head, *shown = [line.split() for line in search().out.splitlines()]
    assert head == ["model", "BM25", "cosine"]
    ranks = [[int(rank) for rank in row[:2]] for row in shown[::2]]
    assert shown[0][1] == "1" and shown[0][3] == "d13", "the only one with all words of the query"
    fused = [sum(1 / (60 + rank) for rank in pair) for pair in ranks]
    assert len(fused) == 10 and fused == sorted(fused, reverse=True)
    alone = search(corpus=[{"_id": 1, "text": "the of"}, {"_id": "a", "text": "! ?"}]).out
    assert [line.split()[:2] for line in alone.splitlines()[1::2]] == [["1", "-"], ["2", "-"]]


def test_embeddings_are_kept_until_documents_or_checkpoint_change(search, directory):
    """Or until the file that keeps them is damaged."""

    def change_weights():
        model = NomicBert.from_pretrained(directory)
        model.emb_ln.weight.data.mul_(2)
        model.save_pretrained(directory)

    cache = directory / "nanoembed-search.safetensors"
    for change in (lambda: None, change_weights, lambda: cache.write_bytes(b"damaged")):
        change()
        first, again = search("--documents=4"), search("--documents=4")
        assert "embedding 4 documents" in first.err and len(first.out.splitlines()) == 1 + 2 * 4
        assert "embedding" not in again.err and first.out == again.out
        assert "embedding 30 documents" in search().err


@cases(
    "words, message",
    (["search", " "], "the query is empty"),
    (["search", "x"], "nothing was trained in .*: run make demo, or give another --out"),
    (["retrieval"], "retrieval: give search, long, plot, retrieval FOLDER, or nothing"),
    (["retrieval", "nowhere"], "has no qrels"),
    (["sing"], "sing: give search"),
    (["plot"], "has nothing to draw: train first, or give another --out"),
    (["--model=x"], "^--model: ladder does not use it; its options are --data"),
    (["plot", "--dims=8"], "^--dims: plot does not use it; its options are --out"),
)
def test_a_command_says_what_it_needs_and_what_it_does_not_use(words, message, tmp_path):
    with refused(message):
        evaluate.main([*words, f"--out={tmp_path}"])
