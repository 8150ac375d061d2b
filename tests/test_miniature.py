"""The paper in miniature: the whole script, on sources made here in the form that it reads."""

import csv
import gzip
import json
import os
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT
from test_folder import write_notes
from test_jsonl import pairs, save, sentence

sys.path.insert(0, str(ROOT / "bench"))
import miniature
import miniature_data
import miniature_report


def task_document(i, words=20):
    return sentence(5 * 10**6 + i, words)


def write_task(folder, documents=30, words=20):
    corpus = [{"_id": f"d{i}", "text": task_document(i, words)} for i in range(documents)]
    queries = [
        {"_id": f"q{i}", "text": " ".join(c["text"].split()[:4])} for i, c in enumerate(corpus)
    ]
    (folder / "qrels").mkdir(parents=True)
    save(folder / "corpus.jsonl", corpus)
    save(folder / "queries.jsonl", queries)
    lines = [f"q{i}\td{i}\t1\n" for i in range(documents)]
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniature") / "sources"
    for name in ("text", "pairs", "folders", "sts"):
        (folder / name).mkdir(parents=True)
    articles = [
        {
            "title": sentence(7 * 10**6 + i, 2),
            "text": f"{sentence(8 * 10**6 + i, 10)}. {sentence(9 * 10**6 + i, 150)}",
        }
        for i in range(60)
    ]
    save(folder / "text" / "wikipedia.jsonl.gz", articles)
    for number, name in enumerate(("arxiv", "medquad", "stackexchange", "tldr", "questions_wiki")):
        rows = pairs(60, start=100 * number)
        rows = [{**row, "topic": str(i // 4)} for i, row in enumerate(rows)]
        if name == "arxiv":
            rows[7]["document"] = task_document(7)
        save(folder / "pairs" / f"{name}.jsonl.gz", rows)
    for name in ("peps", "swift-evolution"):
        write_notes(folder / name, files=12)
        with tarfile.open(folder / "folders" / f"{name}.tar.gz", "w:gz") as archive:
            archive.add(folder / name, name)
    for name in miniature_data.TASKS.values():
        write_task(folder / "retrieval" / name, words=700 if name.startswith("qmsum") else 20)
    with gzip.open(folder / miniature_data.STS, "wt", newline="") as file:
        rows = [(sentence(i, 5), sentence(i + i % 3, 5), i % 3) for i in range(30)]
        csv.writer(file).writerows(rows)
    return folder


def miniature_sh(*arguments):
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "miniature.sh"), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(sources):
    """A whole run at the smallest size, from text to table."""
    out = sources.parent / "out"
    options = [sources, "--size=tiny", f"--out={out}", f"--report={out / 'REPORT.md'}"]
    options += ["--vocab-size=500", "--seeds=2"]
    result = miniature_sh(*options)
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-3000:]
    return out, options


def test_every_row_of_the_report_is_there(finished):
    out, _ = finished
    text = (out / "REPORT.md").read_text()
    for row in (
        "BM25",
        *miniature.ROWS,
        *miniature_report.ADDS,
        "Dynamic NTK",
        "| 64 |",
        "contrastive |",
    ):
        assert row in text, row
    assert all(tokens in text for tokens in ("| 512 |", "2,048", "4,096", "8,192"))
    results = json.loads((out / "results.json").read_text())
    assert {row: len(runs) for row, runs in results["rows"].items()} == {
        "BM25": 1,
        **{row: 2 if row in miniature.MAIN else 1 for row in miniature.ROWS},
    }
    assert (out / "miniature-curves.png").stat().st_size > 10_000


def test_what_people_wrote_below_the_tables_stays_and_no_run_is_repeated(finished):
    out, options = finished
    report = out / "REPORT.md"
    report.write_text(report.read_text() + "\nStage 2 helps most.\n")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/model.safetensors")}
    result = miniature_sh(*options)
    assert result.returncode == 0, result.stderr[-3000:]
    assert report.read_text().endswith("\nStage 2 helps most.\n")
    assert before and before == {path: path.stat().st_mtime_ns for path in before}


def test_what_is_evaluated_is_never_trained_on(finished):
    """One document of SciFact's was put among the abstracts: it is gone, and counted."""
    out, _ = finished
    training_text = "".join(p.read_text() for p in (out / "data").glob("stage[23]/*/pairs.jsonl"))
    for name in miniature_data.TASKS.values():
        for row in map(json.loads, open(out.parent / "sources/retrieval" / name / "corpus.jsonl")):
            assert row["text"] not in training_text
    removed = json.loads((out / "pairs" / "meta.json").read_text())["contamination"]["sources"]
    assert sum(removed["stage2/arxiv"].values()) == 1


def test_results_of_two_sizes_do_not_mix(finished):
    _, options = finished
    result = miniature_sh(*options, "--scale=2")
    assert result.returncode and "give another --out" in result.stderr.strip().split("\n")[-1]


def test_stage_3_has_what_people_asked_and_no_headings(finished):
    out, _ = finished
    names = {path.parent.name for path in (out / "data").glob("stage3/*/meta.json")}
    assert names == {"medquad-topics", "questions_wiki"}
    negatives = [
        json.loads(line)["negatives"]
        for line in open(out / "data" / "stage3" / "medquad-topics" / "pairs.jsonl")
    ]
    assert any(negatives)


def test_negatives_of_the_same_topic_are_other_answers():
    rows = [{"query": f"q{i}", "document": f"d{i}", "topic": i // 3} for i in range(7)]
    found = {row["query"]: row["negatives"] for row in miniature_data.same_topic(rows)}
    assert found.keys() == {f"q{i}" for i in range(6)}  # the seventh is alone with its topic
    assert set(found["q0"]) == {"d1", "d2"} and set(found["q4"]) == {"d3", "d5"}


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    result = miniature_sh("--size=gpu", "--dry-run", f"--out={tmp_path / 'out'}")
    assert result.returncode == 0, result.stderr
    assert "one H100" in result.stdout and "finetune-unfiltered" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words, expected", [((), "give the folder"), (("x",), "x has no text/")])
def test_a_folder_without_the_sources_is_refused_with_what_it_lacks(words, expected):
    result = miniature_sh(*words, "--size=tiny")
    assert result.returncode and expected in result.stderr.strip().split("\n")[-1]


def test_rows_are_compared_over_the_seeds_that_both_have_and_bm25_with_all():
    one, two = {"x": {"values": [0.5, 0.7]}}, {"x": {"values": [0.7, 0.9]}}
    other = {"x": {"values": [0.2, 0.4]}}
    assert miniature_report.difference([one, two], [other], "x") == "+0.300 ±0.000"
    assert (
        miniature_report.difference([one, two], [{**other, "seedless": True}], "x")[:6] == "+0.400"
    )


def test_a_cut_document_has_the_tokens_that_the_model_reads(sources, tokenizer):
    task = miniature.Retrieval(sources / "retrieval" / "scifact-train", "dev")
    short = miniature.cut(task, tokenizer, 40)
    texts = [task.prefixes["document"] + text for text in short.documents]
    assert all(len(encoding) == 40 for encoding in tokenizer.encode_batch(texts))
    assert all(
        a.startswith(b) and a != b for a, b in zip(task.documents, short.documents, strict=True)
    )
