"""Whole runs of the three stages, small: they end with the same bits however they were interrupted,
and never touch what they did not write."""

import fcntl
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import stat
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import SMALL, STAGES, cases, log_lines, losses_of, refused, train, wait_for_lines

import contrastive
import evaluate
import finetune
import mlm
from common.files import read_json, write_json
from common.run import learning_rate
from model import NomicBert

each_stage = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """stage -> (losses, weights) of an undisturbed run; its folder is finished["folder"] / name."""
    folder = tmp_path_factory.mktemp("finished")
    runs = {stage: train(stage, data, folder / name) for name, stage in STAGES.items()}
    return {"folder": folder, **runs}


def contents(folder):
    """path -> bytes and time of each file of a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@each_stage
def test_one_seed_gives_equal_bits_whatever_the_intervals(stage, data, tmp_path, finished):
    options = ("--eval-every=4", "--save-every=1")
    assert train(stage, data, tmp_path / "a", *options) == finished[stage]
    assert train(stage, data, tmp_path / "b", "--seed=1")[1] != finished[stage][1]


@each_stage
@pytest.mark.parametrize(("every", "stop"), [(3, 3), (2, 5), (100, 2)])
def test_a_continued_run_equals_an_undisturbed_one(stage, every, stop, data, tmp_path, finished):
    """Stopped right after a checkpoint; one step later, so that a step is done again; before there
    was any but the first checkpoint. Each time with a line of the log cut off."""
    option = f"--save-every={every}"
    train(stage, data, tmp_path, option, stop_after=stop)
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 6, "lo')
    assert train(stage, data, tmp_path, option, "--resume") == finished[stage]


def test_a_finished_run_says_so_and_changes_no_byte(data, finished, capsys):
    before = contents(finished["folder"])
    for name, stage in STAGES.items():
        train(stage, data, finished["folder"] / name)
    assert capsys.readouterr().out.count("is finished") == 3
    assert contents(finished["folder"]) == before


@each_stage
def test_training_lowers_the_loss(stage, data, tmp_path):
    losses, _ = train(stage, data, tmp_path, "--steps=60", "--batch-size=16", "--lr=3e-3")
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


def test_compiled_blocks_give_the_losses_of_plain_ones(data, tmp_path):
    """Batches of many shapes. A compiler may round differently."""
    options = ("--precision=float32", "--micro-batch-tokens=300")
    plain, _ = train(contrastive, data, tmp_path / "plain", *options)
    compiled, _ = train(contrastive, data, tmp_path / "compiled", *options, "--compile")
    np.testing.assert_allclose(compiled, plain, rtol=1e-3)


def start(stage, data, out, *options):
    """Runs a stage in a forked process, which need not import everything again. What it prints goes
    to OUT.txt."""

    def train_there():
        sys.stdout = sys.stderr = open(f"{out}.txt", "w")
        stage.main([*SMALL, *options, f"--data={data}", f"--out={out}"])

    process = multiprocessing.get_context("fork").Process(target=train_there)
    process.start()
    return process


def is_killed(stage, data, out, delay, writing=False):
    """Runs a stage and kills it after `delay` seconds, or the next time after that when it writes a
    file."""
    for left_over in out.rglob("*.tmp"):
        left_over.unlink()
    process = start(stage, data, out, "--steps=8", "--save-every=1")
    process.join(delay)
    while writing and process.is_alive() and not any(out.rglob("*.tmp")):
        pass
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@each_stage
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_one_that_was_not(stage, data, tmp_path):
    """Four kills, every other one while a file is written."""
    rng, undisturbed, began = random.Random(0), tmp_path / "undisturbed", time.monotonic()
    assert not is_killed(stage, data, undisturbed, delay=None)
    seconds, kills, runs = time.monotonic() - began, 0, 0
    while kills < 4:
        runs += 1
        out = tmp_path / str(runs)
        while kills < 4 and is_killed(stage, data, out, rng.uniform(0, seconds), kills % 2 == 1):
            kills += 1
        is_killed(stage, data, out, delay=None)
        assert losses_of(out) == losses_of(undisturbed)
        for name in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (out / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_run_that_is_asked_to_stop_saves_first_and_says_so(data, tmp_path):
    options = ["--steps=160", "--save-every=1000"]
    expected, out = train(mlm, data, tmp_path / "undisturbed", *options), tmp_path / "stopped"
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup would have it ignored
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        before, process = log_lines(out), start(mlm, data, out, *options)
        wait_for_lines(out, before + 3, process.is_alive)
        os.kill(process.pid, number)
        process.join(60)
        done, shown = log_lines(out), Path(f"{out}.txt").read_text()
        assert process.exitcode == 128 + number and before + 3 <= done < 160
        assert f"stopped by {number.name}" in shown and f"saved at step {done}" in shown
    assert train(mlm, data, out, *options) == expected


@pytest.mark.parametrize(
    ("save_every", "message"),
    [(1, "weights are not finite at step"), (1000, "the loss is (nan|inf) at step")],
)
def test_a_run_that_diverges_stops_and_spares_the_checkpoint(save_every, message, data, tmp_path):
    """At lr * weight_decay = 1,000 weights grow a thousandfold in each step. Not in bf16, where the
    loss overflows before the weights do."""
    options = ("--lr=1000", "--weight-decay=1", "--warmup=0", "--steps=30", "--precision=float32")
    with refused(message):
        train(contrastive, data, tmp_path, *options, f"--save-every={save_every}")
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_a_full_disk_is_an_error_and_the_checkpoint_before_stays(data, tmp_path, finished):
    """No file may grow beyond 1 MB: the weights fit, state.pt does not."""
    train(mlm, data, tmp_path, "--save-every=2", stop_after=3)
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with refused("cannot write .*state.pt"):
            train(mlm, data, tmp_path, "--save-every=2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    state, after = tmp_path / "state.pt", contents(tmp_path)
    assert after[state] == before[state] and after.keys() == before.keys(), "nothing is left over"


OTHERS = [("--lr=1", "lr .0.003, not 1.0"), ("--data=OTHER", "data"), ("--init=MLM", "init")]


@pytest.mark.parametrize(("option", "message"), OTHERS)
def test_a_run_with_other_settings_is_refused(option, message, data, tmp_path, finished):
    out, other = finished["folder"] / "contrastive", shutil.copytree(data, tmp_path / "other")
    write_json(other / "meta.json", read_json(data / "meta.json") | {"changed": True})
    option = option.replace("OTHER", str(other)).replace("MLM", f"{finished['folder']}/mlm")
    before = contents(out)
    with refused(f"holds a run with another --{message}"):
        train(contrastive, data, out, option)
    assert contents(out) == before


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(data, tmp_path, finished):
    for name in ("letter.txt", "config.json", "state.pt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
    folders = [*tmp_path.iterdir(), data, finished["folder"] / "contrastive"]
    before = [contents(folder) for folder in folders]
    for folder in folders:
        with refused("holds something other than a run of mlm.py"):
            train(mlm, data, folder)
    assert [contents(folder) for folder in folders] == before


def test_a_second_run_is_refused_while_the_first_one_is_running(data, tmp_path, finished):
    refusals = []

    def start_another():
        with refused("another run is writing there"):
            train(mlm, data, tmp_path)
        refusals.append(1)

    assert train(mlm, data, tmp_path, stop_after=3, call=start_another) == finished[mlm]
    assert refusals


@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_whose_folder_was_removed_says_so(replaced, data, tmp_path, finished):
    out, other = tmp_path / "run", finished["folder"] / "mlm"

    def remove():
        shutil.rmtree(out)
        if replaced:
            shutil.copytree(other, out)

    with refused("run was removed or replaced while this run was writing"):
        train(mlm, data, out, stop_after=3, call=remove)
    kept = [[content for content, _ in contents(folder).values()] for folder in (out, other)]
    assert kept[0] == (kept[1] if replaced else [])


def test_a_file_system_without_locks_is_trained_on(data, tmp_path, finished, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: os.open(tmp_path / "none", os.O_RDONLY))
    assert train(mlm, data, tmp_path / "run") == finished[mlm]


def test_files_have_the_mode_that_the_umask_gives(finished):
    os.umask(umask := os.umask(0))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in contents(finished["folder"])}
    assert modes == {0o666 & ~umask}


def change(**entries):
    """Replaces entries of state.pt by a function of what is there."""

    def write(path):
        state = torch.load(path, weights_only=True)
        torch.save(state | {key: value(state[key]) for key, value in entries.items()}, path)

    return write


def append(line):
    return lambda path: path.write_bytes(path.read_bytes() + line + b"\n")


def shorten(tensors):
    return {name: value[:-1] if value.dim() else value for name, value in tensors.items()}


def shorten_moments(optimizer):
    return optimizer | {"state": {i: shorten(of_one) for i, of_one in optimizer["state"].items()}}


@pytest.fixture(scope="module")
def interrupted(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interrupted")
    train(mlm, data, folder / "run", "--save-every=3", stop_after=3)
    return folder / "run"


@cases(
    "name, damage, message",
    ("state.pt", lambda p: p.write_bytes(p.read_bytes()[:1000]), "state.pt is damaged"),
    ("state.pt", change(step=lambda _: 999), "state.pt is damaged"),
    ("state.pt", change(settings=lambda _: [1]), "state.pt is damaged"),
    ("state.pt", change(model=shorten), "state.pt is damaged"),
    ("state.pt", change(optimizer=shorten_moments), "state.pt is damaged"),
    ("state.pt", lambda p: p.unlink(), "has a log and no state.pt to continue from"),
    ("run.json", lambda p: p.write_text("{"), "run.json is not JSON"),
    ("run.json", lambda p: p.unlink(), "holds something other than a run of mlm.py"),
    ("log.jsonl", append(b"{}"), "log.jsonl is damaged"),
    ("log.jsonl", append(b'{"step": 9}\n{"step": 3}'), "log.jsonl is damaged"),
)
def test_a_damaged_file_of_a_run_is_named(interrupted, data, tmp_path, name, damage, message):
    out = shutil.copytree(interrupted, tmp_path / "run")
    damage(out / name)
    before = contents(out)
    with refused(message):
        train(mlm, data, out, "--save-every=3")
    assert contents(out) == before


@pytest.mark.parametrize("text", [None, "damaged"])
def test_a_run_continues_from_state_pt_alone(interrupted, data, tmp_path, finished, text):
    out = shutil.copytree(interrupted, tmp_path / "run")
    for name in ("model.safetensors", "config.json"):
        (out / name).unlink()
        if text:
            (out / name).write_text(text)
    assert train(mlm, data, out, "--save-every=3") == finished[mlm]


def test_each_stage_starts_from_the_one_before_in_the_same_shape(data, tmp_path, finished, capsys):
    init, options = finished["folder"] / "mlm", [f"--data={data}", "--steps=2", "--batch-size=8"]
    for stage in (contrastive, finetune):
        out = tmp_path / stage.__name__
        stage.main([*options, f"--init={init}", f"--out={out}", "--eval-every=0"])
        assert f"hidden_size=64 (from {init})" in capsys.readouterr().out
        init = out
    assert NomicBert.from_pretrained(out).config.hidden_size == 64
    with refused("--hidden-size contradicts .*finetune, where it is 64: leave it out"):
        train(contrastive, data, tmp_path / "other", f"--init={init}", "--hidden-size=128")


def test_a_ladder_and_its_pictures_have_every_row(data, tmp_path, finished, capsys):
    """Damaged results are one line and no picture."""
    out = shutil.copytree(finished["folder"], tmp_path / "out")
    train(contrastive, data, out / "words", "--num-hidden-layers=0")
    options = [f"--data={data}", f"--out={out}"]
    capsys.readouterr()
    evaluate.main(options)
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"summary-body, test: \d+ queries, [\d,]+ documents", lines[0])
    assert [line[:28].strip() for line in lines[2:10]] == [
        "BM25", "BM25, identifiers split", "word vectors alone", "after stage 2", "after stage 3",
        "after stage 3 + BM25", "minus BM25 split, paired", ""
    ]  # fmt: skip
    assert lines[10].startswith("summary-code, test: ")
    evaluate.main(["plot", f"--out={out}"])
    assert {path.name for path in out.glob("*.png")} == {"curves.png", "ladder.png"}
    for path in out.glob("*.png"):
        path.unlink()
    for name in ("mlm/log.jsonl", "results.json"):
        (out / name).write_text("[]\n")
        with refused(re.escape(str(out))):
            evaluate.main(["plot", f"--out={out}"])
    assert not list(out.glob("*.png"))


def test_long_texts_are_scored_for_a_checkpoint_with_a_head(data, tmp_path, finished, capsys):
    command = ["long", f"--model={finished['folder']}/mlm", f"--data={data}", f"--out={tmp_path}"]
    capsys.readouterr()
    evaluate.main([*command, "--max-tokens=256"])
    *_, last = capsys.readouterr().out.splitlines()
    assert re.match(r"Dynamic NTK +256 .*\d ±", last)
    evaluate.main(["plot", f"--out={tmp_path}"])
    assert [path.name for path in tmp_path.glob("*.png")] == ["length.png"]
    with refused("--max-tokens=100: give 128, as trained, or more"):
        evaluate.main([*command, "--max-tokens=100"])


@pytest.mark.parametrize(("decay", "last"), [("linear", 1 / 940), ("sqrt", (60 / 1000) ** 0.5)])
def test_the_learning_rate_rises_to_its_peak_and_falls(decay, last):
    config = SimpleNamespace(lr=2.0, warmup=60, steps=1000, decay=decay)
    rates = [learning_rate(step, config) / 2 for step in range(1000)]
    assert (rates[0], rates[59], rates[-1]) == pytest.approx((1 / 60, 1, last))
    assert all(np.diff(rates[:60]) > 0) and all(np.diff(rates[60:]) < 0)
