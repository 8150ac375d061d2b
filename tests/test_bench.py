"""The benches: estimates against the operations that torch counts, and the tables of experiments.
What bench/parity.py and gradients.py measure is tested elsewhere."""

import gzip
import json
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import contrastive
import mlm
from bench import curve, domains, estimate, experiments, judges, miner
from common.files import load_tokenizer, read_json, write_json
from common.options import InputError
from data.prepare import write_source
from data.store import Source, open_sources, pack
from data.tasks import write_task
from model import Block, ModelConfig, NomicBert, NomicBertForMaskedLM, find_segments


def sentence(*seed, words=12):
    parts = ("ba", "ko", "mi", "tu", "re", "sol", "ven", "dar")
    rng = np.random.default_rng([*seed, 1])  # without it, (5, 0) would be the same as (5,)
    return " ".join("".join(rng.choice(parts, 4)) for _ in range(words))


def test_the_operations_of_stage_2_are_those_that_torch_counts_in_a_step(tokenizer, tmp_path):
    columns = {"query": [sentence(i) for i in range(8)]}
    columns["document"] = [sentence(i, words=9 * i + 1) for i in range(8)]
    write_source(tmp_path / "stage2" / "pairs", columns, dict.fromkeys(columns, ""), tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "meta.json", {})
    config = contrastive.Config(data=str(tmp_path), batch_size=8, hidden_size=64)
    shape, _, tokens, operations = estimate.step_of("contrastive", config)
    source = Source(tmp_path / "stage2" / "pairs", tokenizer)
    texts = source.texts("query", range(8), config.query_tokens)
    texts += source.texts("document", range(8), config.document_tokens)
    model = NomicBert(shape)
    model.dtype = torch.bfloat16  # there a CPU computes attention in plain products
    with FlopCounterMode(display=False) as counter:
        contrastive.backward_batch(model, texts, torch.sum, config)
    assert counter.get_total_flops() == pytest.approx(operations, rel=1e-6)
    assert tokens == sum(map(len, texts))


def test_the_operations_of_stage_1_count_the_head_for_masked_tokens_only(tmp_path):
    config = mlm.Config(data=str(tmp_path), batch_size=1, seq_len=100, hidden_size=64)
    shape, _, _, operations = estimate.step_of("mlm", config)
    model = NomicBertForMaskedLM(shape)
    model.bert.dtype = torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        model(*pack([np.arange(100)]), torch.arange(30)).float().sum().backward()
    assert counter.get_total_flops() == pytest.approx(operations, rel=1e-6)


def test_what_a_block_keeps_for_the_backward_pass_is_what_autograd_saves(N=128):
    shape, kept = ModelConfig(hidden_size=128, intermediate_size=320, num_attention_heads=2), {}
    block, x = Block(shape), torch.randn(N, 128, requires_grad=True)
    angles = torch.ones(N, shape.head_size // 2)
    segments = find_segments(torch.tensor([0, N], dtype=torch.int32), None, x.device)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, angles, angles, segments)
    for tensor in (*block.parameters(), angles):  # which other tokens and blocks share
        kept.pop(tensor.data_ptr(), None)
    in_half_precision = sum(kept.values()) / 2
    assert in_half_precision == N * estimate.saved_bytes_per_token(shape)


PAPER = {  # 839 billion tokens in stage 1; in stage 2, 16,384 documents of 768 float32 numbers
    "mlm": ["parameters | 137,323,008 |", "| tokens, 100,000 steps | 8.39e+11 |"],
    "contrastive": ["parameters | 136,731,648 |", "embeddings, MiB | 0 | 48 |"],
    "finetune": ["parameters | 136,731,648 |", "tokens, 6,612 steps"],
    "filter": ["470,000,000 pairs", "compare them in blocks of 1,000,000 | 7.22e+17 |"],
}


@pytest.mark.parametrize("stage", PAPER)
def test_the_estimate_of_the_papers_run_has_its_numbers(stage, tmp_path, capsys):
    estimate.main([stage, "--preset=paper", f"--data={tmp_path}"])
    shown = capsys.readouterr().out
    assert all(line in shown for line in [*PAPER[stage], "H100", "RTX 4090"]), shown


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """`miniature` at the smallest size on sources made here, killed after six rows, and continued.
    One abstract of arXiv is a document of SciFact."""
    folder = tmp_path_factory.mktemp("experiments")
    articles = [(sentence(i), ". ".join(sentence(i, k) for k in range(9))) for i in range(60)]
    files = {"text/wikipedia": [{"title": title, "text": text} for title, text in articles]}
    for n, name in enumerate(("arxiv", "medquad", "stackexchange", "tldr", "questions_wiki")):
        texts = [sentence(n, i, words=30) for i in range(40)]
        files[f"pairs/{name}"] = [{"query": x[:40], "document": x, "topic": len(x)} for x in texts]
    files["pairs/arxiv"][7]["document"] = sentence(9, 7, words=30)
    lines = [f"{sentence(i)},{sentence(i + i % 3)},{i % 3}" for i in range(9)]
    texts = {"sts/stsb-en-dev.csv": lines}
    texts |= {f"{name}.jsonl": map(json.dumps, rows) for name, rows in files.items()}
    for name, lines in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "folders").mkdir()
    for n, name in enumerate(("peps", "swift-evolution")):
        with tarfile.open(folder / "folders" / f"{name}.tar.gz", "w:gz") as archive:
            for i in range(9):
                text = [f"## {sentence(n, i)}\n\n{sentence(n, i, k, words=90)}" for k in range(3)]
                (folder / "note.md").write_text("\n\n".join([f"# {sentence(n, i)}", *text]))
                archive.add(folder / "note.md", f"{name}/{i}.md")
    tasks = {"scifact-train": 30, "questions-amazon": 40, "policyqa": 30}
    for name, words in tasks.items():
        corpus = {f"d{i}": sentence(9, i, words=words) for i in range(20)}
        queries = [(text[:40], [name]) for name, text in corpus.items()]
        write_task(folder / "retrieval" / name, corpus, {"dev": queries}, ("", ""))
    out = folder / "out"
    arguments = ["miniature", str(folder), "--size=tiny", f"--out={out}"]
    command = [sys.executable, ROOT / "bench" / "experiments.py", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while len(scores := list(out.glob("scores/*.json"))) < 6:
        assert process.poll() is None, process.communicate()[1][-2000:].decode()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = {p: p.stat().st_mtime_ns for p in (*scores, *out.glob("0/*/state.pt"))}
    experiments.main(arguments)
    return out, arguments, before


def test_a_killed_table_continues_and_runs_no_row_twice(killed):
    out, arguments, before = killed
    rows, text = experiments.MINIATURE, (out / "report.md").read_text()
    names = [row.name for row in rows]
    assert all(f"| {word} |" in text for word in [*names, "SciFact", "Amazon", "STS"])
    assert len(list(out.glob("scores/*.json"))) == len(rows)
    again = [path for path in before if path.stat().st_mtime_ns != before[path]]
    assert len(before) >= 9 and len(again) <= 1, "one that was not at its end may have continued"
    with pytest.raises(InputError, match="has results of .* choose another --out"):
        experiments.main([*arguments, "--size=laptop"])


def test_what_is_evaluated_is_never_trained_on(killed):
    training = "".join(p.read_text() for p in killed[0].glob("data/stage[23]/*/pairs.jsonl"))
    assert sum(sentence(0, i, words=30) in training for i in range(40)) > 10
    assert not any(sentence(9, i, words=30) in training for i in range(20))


def test_the_curve_of_pairs_has_a_line_for_each_start_and_continues(data, tmp_path, capsys):
    options = [f"--data={data}", f"--out={tmp_path}/out", "--sizes=30", "--mlm-steps=8"]
    options += ["--rates=1e-3", "--seeds=0", "--layers=1", "--hidden-size=64"]
    curve.main(options)
    scores = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/scores").iterdir()}
    assert {p.name for p in scores} == {"random-weights-30-1e-3-0.json", "8-30-1e-3-0.json"}
    sources = open_sources(tmp_path / "out/pairs-30-0/stage2", load_tokenizer(data))
    assert abs(sum(map(len, sources)) - 30) <= 4 and (tmp_path / "out/curve.png").is_file()
    capsys.readouterr()
    curve.main(options)
    shown = capsys.readouterr().out
    assert "| 30 |" in shown and "summary-code" in shown
    assert scores == {p: p.stat().st_mtime_ns for p in scores}, "no point is computed twice"


def test_each_line_of_the_curve_has_the_rate_that_is_best_on_dev_in_the_first_seed():
    def scores(dev, test):
        return {"dev": {"x": [dev]}, "test": {"x": test}}

    runs = {
        ("8", 30, "1e-3", 0): scores(0.2, [0.9, 0.9]),
        ("8", 30, "3e-3", 0): scores(0.3, [0, 1]),
    }
    runs[("8", 30, "3e-3", 1)] = scores(0.0, [1, 1])
    rate, found = curve.points_of(runs, "8", 30)
    assert rate == "3e-3" and found["x"].tolist() == [0.5, 1.0]


def test_a_judge_that_loses_planted_and_good_pairs_is_counted_as_it_filtered(
    data, tmp_path, capsys
):
    options = [f"--data={data}", f"--out={tmp_path}", "--pairs=150"]
    small = "--steps=2 --batch-size=8 --hidden-size=64 --num-hidden-layers=0 --lr=3e-3"
    judges.main([*options, f"--options={small}"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert [row[2:4] for row in (rows[0], rows[-1])] == [["0.0%", "0.0%"], ["100.0%", "0.0%"]]
    counts = read_json(tmp_path / "kept-0/meta.json")["filtered"].values()
    assert int(rows[1][1]) == sum(n["kept"] for n in counts) < sum(n["rows"] for n in counts)
    drawn = judges.draw(judges.Options(data=str(data), pairs=150))
    planted = np.concatenate([planted for *_, planted in drawn.values()])
    kept = judges.kept_rows(tmp_path / "kept-0", drawn)
    assert rows[1][2] == f"{np.mean(~kept[planted]):.1%}" and 0.1 < planted.mean() < 0.3


def test_a_miner_that_is_the_model_itself_finds_the_negatives_that_stage_3_mines(
    data, tmp_path, capsys
):
    tokenizer = load_tokenizer(data)
    tiny_model(tokenizer, num_hidden_layers=0).save_pretrained(tmp_path / "model")
    options = [f"--{name}={tmp_path}/model" for name in ("init", "miner")]
    options += [f"--data={data}", f"--out={tmp_path}/out", "--seeds=0"]
    miner.main(
        [*options, "--options=--steps=2 --batch-size=4 --query-tokens=128 --document-tokens=128"]
    )
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert len(rows) == 3 and all("0.000 ±0.000" in cell for cell in rows[0][2::2])
    source = Source(tmp_path / "out/data/stage3/summary-body", tokenizer)
    mined = np.load(tmp_path / "out/itself-0/negatives.npz")["of summary-body"]
    overlaps = []
    for row, expected in enumerate(mined):
        own = {source.columns["negative"][i].tobytes() for i in source.negatives(row)}
        wanted = {source.columns["document"][i].tobytes() for i in expected[expected >= 0]}
        assert source.columns["document"][row].tobytes() not in own
        overlaps += [len(own & wanted) / len(own | wanted)] if own else []  # else random ones
    assert np.mean(overlaps) > 0.9 and len(overlaps) > 50, "equal but for rounding"


REFUSED = {
    "": "give ladder, or miniature SOURCES",
    "miniature nowhere": "wikipedia.jsonl.gz cannot be read",
    "ladder --rows=before": "--rows=before: the rows are BM25, random weights",
    "ladder --size=huge": "--size=huge: give laptop, gpu, tiny",
}


@pytest.mark.parametrize("command", REFUSED)
def test_a_command_that_cannot_work_is_refused_with_the_reason(command, tmp_path):
    with pytest.raises(InputError, match=REFUSED[command]):
        experiments.main([*command.split(), f"--out={tmp_path}"])


def test_differences_are_those_of_each_query_over_the_seeds_that_both_rows_have():
    """.1, .2 and .6 more in seed 0: the mean is .3, the standard error sqrt(.07 / 3) = .153."""
    runs = {"0": {"scores": {"x": [0.5, 0.7, 0.9]}}, "1": {"scores": {"x": [0.7, 0.9, 1.0]}}}
    others = {"0": {"scores": {"x": [0.4, 0.5, 0.3]}}}
    assert experiments.difference(runs, others, "x") == "+0.300 ±0.153"
    assert experiments.cell(others, "x") == "0.400 ±0.058"
    assert experiments.cell(runs, "x") == "0.783 ±0.101 (0.700, 0.867)"
    assert experiments.difference(runs, {}, "x") == ""


def test_domains_trains_on_the_text_of_each_and_runs_nothing_twice(killed, data, tmp_path, capsys):
    sources, out = tmp_path / "sources", tmp_path / "out"
    shutil.copytree(killed[0].parent / "pairs", sources / "pairs")
    corpus = {f"d{i}": ". ".join(sentence(3, i, k) for k in range(3)) + "." for i in range(20)}
    queries = [(text[:40], [name]) for name, text in corpus.items()]
    write_task(sources / "retrieval/policyqa", corpus, {"dev": queries}, ("", ""))
    tiny_model(load_tokenizer(data)).save_pretrained(tmp_path / "demo")
    given = [str(sources), f"--model={tmp_path}/demo", f"--data={data}", f"--out={out}"]
    given += ["--domains=legal,medical", "--seeds=0", f"--options={experiments.SMALL}"]
    domains.main(given)
    scores = {path: path.stat().st_mtime_ns for path in out.glob("scores/*.json")}
    assert len(scores) == 2 * 4, "BM25, random weights, the demo, and one's own"
    capsys.readouterr()
    domains.main(given)
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["| legal", "| medical"]
    assert all(float(row[2].split()[0]) > 0.5 for row in rows), "BM25 finds copies"
    assert scores == {path: path.stat().st_mtime_ns for path in scores}
    with pytest.raises(InputError, match="in --domains some of legal,science"):
        domains.main([str(sources), "--domains=law"])
