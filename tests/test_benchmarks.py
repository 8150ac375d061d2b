"""STS, tasks in the BEIR layout, and MTEB: metrics against other libraries, files as they come."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from tiny import tiny_model

import card
import evaluate
from evaluate import Options
from model import NomicBert
from options import InputError
from retrieval import Retrieval
from similarity import pearson, ranks, read_pairs, spearman, sts

SHARED = ROOT.parent / "shared" / "data"  # real data, where there is any
PAIRS = [
    ("A man, in a hat, dances.", "A man dances.", 4.5),
    ("A child rides a horse.", "A mouse is fed to a snake.", 0.0),
    ('They say "no".', "They say no.", 5.0),
    ("Reads a file.", "Returns the words of a file.", 2.5),
]


@pytest.fixture
def directory(data_tokenizer, tmp_path):
    tiny_model(data_tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------------
# STS


def test_spearman_looks_at_the_order_alone_and_pearson_at_the_line():
    x = np.arange(1.0, 9.0)
    assert spearman(x, x**3) == pytest.approx(1) and pearson(x, x**3) < 0.95
    assert spearman(x, -x) == pytest.approx(-1) and pearson(x, 2 * x + 1) == pytest.approx(1)


def test_equal_values_share_the_mean_of_their_places():
    assert ranks([10, 20, 10, 30]).tolist() == [1.5, 3, 1.5, 4]


def test_correlations_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=200), rng.integers(0, 6, 200)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def write_pairs(path, pairs=PAIRS, header=False):
    separator = "\t" if ".tsv" in path.name else ","
    quote = (lambda text: text) if separator == "\t" else quoted
    lines = [separator.join([quote(a), quote(b), str(score)]) for a, b, score in pairs]
    lines = ["sentence1" + separator + "sentence2" + separator + "score"] * header + lines
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    return path


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.tsv.gz"])
@pytest.mark.parametrize("header", [False, True])
def test_pairs_are_read_from_csv_and_tsv(tmp_path, name, header):
    first, second, scores = read_pairs(write_pairs(tmp_path / name, header=header))
    assert list(zip(first, second, scores, strict=True)) == PAIRS


def test_sts_is_the_correlation_of_cosines_under_the_prefix_of_classification(directory, tmp_path):
    model = NomicBert.from_pretrained(directory)
    found = sts(model, write_pairs(tmp_path / "a.csv"), 128)
    x, y = (model.encode([f"classification: {pair[i]}" for pair in PAIRS]) for i in (0, 1))
    cosines, scores = (x * y).sum(1), [pair[2] for pair in PAIRS]
    assert found["Spearman"] == pytest.approx(spearman(cosines, scores))
    assert found["Pearson"] == pytest.approx(pearson(cosines, scores))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,1\nc,d\n", "a.csv, line 2: not two sentences and a score, but 2 fields"),
        ("a,b,1\nc,d,high\n", "a.csv, line 2: not two sentences and a score"),
        ("a,b,1\nc,d,1\n", "a.csv: 2 scores, of which none differ"),
        ("", "a.csv: 0 scores"),
    ],
)
def test_bad_pairs_are_an_error_that_names_the_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_pairs(tmp_path / "a.csv")


def test_a_truncated_or_missing_file_is_an_error(tmp_path):
    path = write_pairs(tmp_path / "a.csv.gz", PAIRS * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="a.csv.gz cannot be read beyond line"):
        read_pairs(path)
    with pytest.raises(InputError, match="b.csv cannot be read: No such file"):
        read_pairs(tmp_path / "b.csv")


# ------------------------------------------------------------------------------------------------
# The BEIR layout

CORPUS = [{"_id": f"d{i}", "title": "", "text": f"document number {i} of many"} for i in range(30)]
CORPUS[7] |= {"title": "Seven", "text": "is a number"}
QUERIES = [{"_id": "q1", "text": "Seven is a number"}, {"_id": "q2", "text": "document number 13"}]
QRELS = ["query-id\tcorpus-id\tscore", "q1\td7\t2", "q1\td13\t0", "q2\td13\t1"]


def write_task(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, pack=False):
    (folder / "qrels").mkdir(parents=True)
    opened = gzip.open if pack else open
    for name, rows in (("corpus", corpus), ("queries", queries)):
        with opened(folder / (f"{name}.jsonl" + ".gz" * pack), "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "qrels" / "test.tsv").write_text("\n".join(qrels) + "\n")
    return folder


@pytest.mark.parametrize("pack", [False, True])
def test_a_task_is_read_with_titles_and_prefixes_and_without_documents_of_grade_0(tmp_path, pack):
    task = Retrieval(write_task(tmp_path / "task", pack=pack), "test")
    assert task.documents[7] == "Seven is a number" and len(task.documents) == 30
    assert task.relevant == [{7: 2}, {13: 1}]
    assert task.prefixes["query"] == "search_query: "


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"corpus": [{"_id": "d7"}]}, "corpus.jsonl, line 1: not {"),
        ({"queries": [*QUERIES, []]}, "queries.jsonl, line 3: not {"),
        ({"qrels": ["q1 d7 1"]}, "test.tsv, line 1: not query-id, corpus-id, score with tabs"),
        ({"qrels": [*QRELS, "q2\td99\t1"]}, "test.tsv, line 5: d99 is not in corpus.jsonl"),
        ({"qrels": [*QRELS, "q9\td3\t1"]}, "test.tsv, line 5: q9 is not in queries.jsonl"),
        ({"qrels": QRELS[:1]}, "test.tsv judges no document relevant"),
    ],
)
def test_a_bad_task_is_an_error_that_names_file_and_line(tmp_path, damage, message):
    with pytest.raises(InputError, match=message):
        Retrieval(write_task(tmp_path / "task", **damage), "test")


def test_a_folder_is_scored_beside_bm25(directory, tmp_path, capsys):
    options = Options(model=str(directory), out=str(tmp_path))
    evaluate.retrieval_of_folder(options, write_task(tmp_path / "task"))
    lines = capsys.readouterr().out.splitlines()
    assert "recall@100" in lines[1] and lines[2].startswith("BM25") and len(lines) == 4
    bm25, model = (line[20:].split() for line in lines[2:])
    assert float(bm25[0]) > 0.9, "its words are the document's"
    assert float(model[6]) == 1.0, "recall@100 among 30 documents"
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 2


# ------------------------------------------------------------------------------------------------
# MTEB


def test_mteb_scores_local_tasks_as_we_do_and_takes_the_prefix_of_each_kind(directory, tmp_path):
    run_mteb = pytest.importorskip("mteb_run").run_mteb
    pairs, task = write_pairs(tmp_path / "sts-pairs.csv"), write_task(tmp_path / "my-task")
    model = NomicBert.from_pretrained(directory)
    asked, encode = [], model.encode
    model.encode = lambda texts, *rest: asked.extend(texts) or encode(texts, *rest)
    scores = run_mteb(model, "tiny", [str(pairs), str(task)], tmp_path, max_tokens=128)

    ours = sts(model, pairs, 128)
    assert scores["StsPairs"]["test"][0]["cosine_spearman"] == pytest.approx(ours["Spearman"])
    ranked = Retrieval(task, "test")
    expected = ranked.scores(ranked.rank(model, 128)[0])
    found = scores["MyTask"]["test"][0]
    assert found["ndcg_at_10"] == pytest.approx(np.mean(expected["nDCG@10"]), abs=1e-5)
    assert found["recall_at_10"] == pytest.approx(np.mean(expected["recall@10"]), abs=1e-5)
    prefixes = {re.match(r"\w+: ", text)[0] for text in asked}
    assert prefixes == {"classification: ", "search_query: ", "search_document: "}
    written = list(Path(tmp_path, "mteb", "results").rglob("*.json"))
    assert {"StsPairs.json", "MyTask.json", "model_meta.json"} <= {path.name for path in written}


def test_each_kind_of_mteb_task_has_the_prefix_of_the_paper():
    mteb = pytest.importorskip("mteb")
    from mteb.types import PromptType

    from mteb_run import prefix

    expected = {
        "SciFact": ("search_query: ", "search_document: "),
        "QuoraRetrieval": ("search_query: ", "search_query: "),
        "TwentyNewsgroupsClustering.v2": ("clustering: ",) * 2,
        "Banking77Classification": ("classification: ",) * 2,
        "SprintDuplicateQuestions": ("classification: ",) * 2,
        "AskUbuntuDupQuestions": ("classification: ",) * 2,
        "STSBenchmark": ("classification: ",) * 2,
        "SummEvalSummarization.v2": ("classification: ",) * 2,
    }
    for name, prefixes in expected.items():
        task = mteb.get_task(name).metadata
        sides = (PromptType.query, PromptType.document)
        assert tuple(prefix(task, side) for side in sides) == prefixes, name


def test_an_mteb_task_that_is_not_there_is_an_error(directory, tmp_path):
    pytest.importorskip("mteb")
    options = Options(model=str(directory), out=str(tmp_path), tasks="NoSuchTask")
    with pytest.raises(InputError, match="NoSuchTask is no file, no folder, and no task of mteb"):
        evaluate.benchmark(options)


@pytest.mark.parametrize("words", [["sts"], ["retrieval"], ["sts", "a", "b"], ["mteb"], ["sing"]])
def test_a_command_without_what_it_needs_is_an_error_that_says_so(words):
    with pytest.raises(InputError, match="give "):
        evaluate.main(words)


def test_a_folder_without_judgements_is_an_error(tmp_path):
    with pytest.raises(InputError, match="has no qrels"):
        evaluate.main(["retrieval", str(tmp_path)])


# ------------------------------------------------------------------------------------------------
# The model card


def test_the_model_card_is_filled_from_the_files_of_the_run(data, tmp_path):
    import contrastive

    out = tmp_path / "run"
    arguments = [f"--data={data}", f"--out={out}", "--steps=2", "--batch-size=8"]
    contrastive.main([*arguments, "--hidden-size=64", "--num-attention-heads=2"])
    text = (out / "README.md").read_text()
    assert "2 of 2 steps" in text and "| batch_size | 8 | option |" in text
    assert "stage 2, contrastive" in text and "summary-code" in text and "data/pydocs.py" in text
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert f"| loss | {log[-1]['loss']:.4g} |" in text

    pairs = write_pairs(tmp_path / "pairs.csv")
    evaluate.similarity_of_pairs(Options(model=str(out), out=str(tmp_path)), pairs)
    spearman = json.loads((out / "results.json").read_text())[
        "similarity of the pairs in pairs.csv"
    ]["Spearman"]
    assert f"| Spearman | {card.shown(spearman)} |" in (out / "README.md").read_text()


def test_results_leave_the_model_card_when_training_goes_on(data, tmp_path):
    import mlm

    out = tmp_path / "run"
    arguments = [f"--data={data}", f"--out={out}", "--steps=4", "--batch-size=8"]
    mlm.main([*arguments, "--hidden-size=64", "--num-attention-heads=2", "--stop-after=2"])
    evaluate.record(out, "a task", {"score": 0.5})
    assert "| a task | score | 0.5 |" in (out / "README.md").read_text()
    mlm.main([*arguments, "--hidden-size=64", "--num-attention-heads=2", "--resume"])
    assert "a task" not in (out / "README.md").read_text()


# ------------------------------------------------------------------------------------------------
# Real data, where it lies beside the project


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real data beside the project")
def test_real_files_open():
    first, _, scores = read_pairs(SHARED / "sts" / "stsb-en-dev.csv.gz")
    assert len(first) == 1500 and min(scores) == 0 and max(scores) == 5
    task = Retrieval(SHARED / "retrieval" / "scifact-train", "dev")
    assert len(task.documents) == 5183 and len(task.queries) == 809
