"""The benches: estimates against the operations that torch counts, and tables of experiments."""

import itertools
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from tiny import STAGES, cases, random_texts, refused
from torch.utils.flop_counter import FlopCounterMode

import contrastive
from bench import estimate, experiments, record, speed
from common.device import training_flops
from common.options import read_options
from data.store import pack
from metrics import shown
from model import ModelConfig, NomicBert, NomicBertForMaskedLM


def test_the_operations_are_those_that_torch_counts_in_a_step():
    """In bf16, where a CPU computes attention in plain products. The head of stage 1: for 30%."""
    config, texts = contrastive.Config(hidden_size=64), random_texts(range(9, 25))
    shape = ModelConfig.from_options(config, 300, 128)
    model = NomicBert(shape)
    model.dtype = torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        contrastive.backward_batch(model, texts, torch.sum, config)
    operations = training_flops(shape, [len(text) for text in texts])
    assert counter.get_total_flops() == pytest.approx(operations, rel=1e-6)

    model = NomicBertForMaskedLM(shape)
    model.bert.dtype = torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        model(*pack([np.arange(100)]), torch.arange(30)).float().sum().backward()
    operations = training_flops(shape, [100], masked_share=0.3)
    assert counter.get_total_flops() == pytest.approx(operations, rel=1e-6)


PAPER = {  # 839 billion tokens in stage 1; in stage 2, 16,384 documents of 768 float32 numbers
    "mlm": ["parameters | 137,323,008 |", "| tokens, 100,000 steps | 8.39e+11 |"],
    "contrastive": ["parameters | 136,731,648 |", "messages: embeddings, MiB | 48 |"],
    "finetune": ["parameters | 136,731,648 |", "tokens, 6,612 steps"],
}


@pytest.mark.parametrize("stage", PAPER)
def test_the_estimate_of_the_papers_run_has_its_numbers(stage, capsys):
    estimate.main([stage, "--preset=paper"])
    out = capsys.readouterr().out
    assert all(line in out for line in [*PAPER[stage], "H100", "two CPU cores"]), out


def test_a_killed_table_continues_and_runs_no_row_twice(data, tmp_path, capsys):
    small = "--hidden-size=64 --num-hidden-layers=1 --num-attention-heads=1 --batch-size=4"
    arguments = [f"--data={data}", f"--out={tmp_path}/out", "--rows=after stage 3"]
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
    assert len(rows) == 3, "two rows, and the one that they start from"
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
    for row in dict.fromkeys(itertools.chain(*experiments.TABLES.values())):
        assert row.name not in above and row.start in above
        assert row.against in {"", *experiments.ROWS}
        above.add(row.name)
        if row.stage:
            read_options(STAGES[row.stage].Config, row.options.split())


BAD = (
    (speed.main, [], "give one of stages, train, encode"),
    (speed.main, ["stages", "two"], "two: the stages are mlm, contrastive, finetune"),
    (record.main, ["--seeds=few"], "--seeds=few: give whole numbers from 0"),
    (estimate.main, ["mlm", "--gpus=0"], "--gpus=0: give a whole number"),
    (experiments.main, ["ladders"], "ladders: the tables are ladder, lesson, curve"),
    (experiments.main, ["--rows=BM25,before"], "--rows=before: the rows are BM25, "),
    (
        experiments.main,
        ["--data=nowhere"],
        "no retrieval tasks in nowhere: data/pydocs.py makes some; to train",
    ),
)


@cases("main, arguments, message", BAD)
def test_a_command_that_does_not_exist_is_answered_in_a_line(main, arguments, message):
    with refused(message):
        main(arguments)


def test_a_record_is_the_core_seconds_and_dev_scores_of_ones_own_commands(data, tmp_path, capsys):
    small = "--batch-size=4 --steps=1 --eval-every=0"
    commands = [f"contrastive.py --hidden-size=64 --num-attention-heads=1 {small}"]
    commands += [f"finetune.py --init=OUT/contrastive --negatives=0 {small}"]
    options = [f"--data={data}", f"--out={tmp_path}/out", "--seeds=0,1"]
    record.main([*commands, *options])
    head, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
    assert head == "| seed | core-seconds | summary-body | summary-code | mean |"
    seconds, first, second, mean = zip(*(map(float, r.split("|")[2:6]) for r in rows), strict=True)
    assert min(seconds) > 1 and len(rows) == 3
    for values in (first, second, mean):
        assert values[2] == pytest.approx((values[0] + values[1]) / 2, abs=1e-3)
    for command, out, message in (
        ("mlm.py", "out", "out/0 is there: remove it, or give another --out"),
        ("mlm.py --xyzzy", "new", "mlm.py --xyzzy: the reason is above"),
    ):
        with refused(message):
            record.main([command, f"--data={data}", f"--out={tmp_path}/{out}"])
