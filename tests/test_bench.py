"""The benches: estimates against the operations that torch counts, and tables of experiments."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import STAGES, cases, refused
from torch.utils.flop_counter import FlopCounterMode

import contrastive
import mlm
from bench import estimate, experiments, speed
from common.files import write_json
from common.options import read_options
from data.prepare import write_source
from data.store import open_sources, pack
from metrics import shown
from model import NomicBert, NomicBertForMaskedLM


def test_the_operations_are_those_that_torch_counts_in_a_step(tokenizer, tmp_path):
    """In bf16, where a CPU computes attention in plain products. The head of stage 1: for 30%."""
    rows = [{"query": f"number {i}", "document": "two words " * (9 * i + 1)} for i in range(8)]
    write_source(tmp_path / "stage2" / "pairs", rows, dict.fromkeys(rows[0], ""), tokenizer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "meta.json", {})
    config = contrastive.Config(data=str(tmp_path), batch_size=8, hidden_size=64)
    shape, _, tokens, operations = estimate.step_of("contrastive", config)
    (source,) = open_sources(tmp_path / "stage2", tokenizer)
    texts = source.texts("query", range(8), config.query_tokens)
    texts += source.texts("document", range(8), config.document_tokens)
    model = NomicBert(shape)
    model.dtype = torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        contrastive.backward_batch(model, texts, torch.sum, config)
    assert counter.get_total_flops() == pytest.approx(operations, rel=1e-6)
    assert tokens == sum(map(len, texts))

    config = mlm.Config(data=str(tmp_path), batch_size=1, seq_len=100, hidden_size=64)
    shape, _, _, operations = estimate.step_of("mlm", config)
    model = NomicBertForMaskedLM(shape)
    model.bert.dtype = torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        model(*pack([np.arange(100)]), torch.arange(30)).float().sum().backward()
    assert counter.get_total_flops() == pytest.approx(operations, rel=1e-6)


PAPER = {  # 839 billion tokens in stage 1; in stage 2, 16,384 documents of 768 float32 numbers
    "mlm": ["parameters | 137,323,008 |", "| tokens, 100,000 steps | 8.39e+11 |"],
    "contrastive": ["parameters | 136,731,648 |", "messages: embeddings, MiB | 48 |"],
    "finetune": ["parameters | 136,731,648 |", "tokens, 6,612 steps"],
}


@pytest.mark.parametrize("stage", PAPER)
def test_the_estimate_of_the_papers_run_has_its_numbers(stage, tmp_path, capsys):
    estimate.main([stage, "--preset=paper", f"--data={tmp_path}"])
    out = capsys.readouterr().out
    assert all(line in out for line in [*PAPER[stage], "H100", "two CPU cores"]), out


def test_a_killed_table_continues_and_runs_no_row_twice(data, tmp_path, capsys):
    small = "--hidden-size=64 --num-hidden-layers=1 --num-attention-heads=1 --batch-size=4"
    arguments = [f"--data={data}", f"--out={tmp_path}/out", "--rows=stage 3 with"]
    arguments += [f"--options={small} --steps=2"]
    command = [sys.executable, ROOT / "bench" / "experiments.py", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    while len(scores := list(tmp_path.glob("out/scores/*.json"))) < 2:
        assert process.poll() is None, process.communicate()[1][-2000:].decode()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = [path.stat().st_mtime_ns for path in scores]
    experiments.main(arguments)
    assert before == [path.stat().st_mtime_ns for path in scores]
    rows = [line for line in capsys.readouterr().out.splitlines() if "±" in line]
    assert len(rows) == 3, "two rows, and the one that one of them starts from"
    models = [*tmp_path.glob("out/0/*/model.safetensors")]
    before = [path.stat().st_mtime_ns for path in models]
    experiments.main([*arguments, "--split=dev"])
    assert before == [path.stat().st_mtime_ns for path in models], "dev scores the same models"
    with refused("another --steps"):
        experiments.main([*arguments, f"--options={small} --steps=3"])


def test_differences_are_those_of_each_query_over_the_seeds_that_both_rows_have():
    """.1, .2, .6 more in seed 0, with error sqrt(.07 / 3) = .153; in seed 1 .1, .2, .3 more."""
    runs = {0: {"scores": {"x": [0.5, 0.7, 0.9]}}, 1: {"scores": {"x": [0.7, 0.9, 1.0]}}}
    others = {0: {"scores": {"x": [0.4, 0.5, 0.3]}}}
    assert experiments.difference(runs, others, "x") == "+0.300 ±0.153"
    assert shown(experiments.mean_score(runs, "x")) == "0.783 ±0.101"
    others[1] = {"scores": {"x": [0.6, 0.7, 0.7]}}
    assert experiments.difference(runs, others, "x") == "+0.250 ±0.104 (seeds ±0.071)"


def test_every_row_has_a_name_of_its_own_starts_from_one_above_and_has_options_of_its_stage():
    above = {""}
    for row in (row for table in experiments.TABLES.values() for row in table):
        assert row.name not in above and row.start in above
        assert row.against in {"", *experiments.ROWS}
        above.add(row.name)
        if row.stage:
            read_options(STAGES[row.stage].Config, row.options.split())


BAD = (
    (speed.main, [], "give one of stages, train, encode, memory"),
    (speed.main, ["stages", "two"], "two: the stages are mlm, contrastive, finetune"),
    (speed.main, ["memory", "--batches=few"], "few: give whole numbers from 1"),
    (estimate.main, ["mlm", "--gpus=0"], "--gpus=0: give a whole number"),
    (experiments.main, ["ladders"], "ladders: the tables are ladder, lesson, curve"),
    (experiments.main, ["--rows=before"], "--rows=before: the rows are BM25, "),
    (
        experiments.main,
        ["--data=nowhere"],
        "no retrieval tasks in nowhere: python data/pydocs.py makes some",
    ),
)


@cases("main, arguments, message", BAD)
def test_a_command_that_does_not_exist_is_answered_in_a_line(main, arguments, message):
    with refused(message):
        main(arguments)
