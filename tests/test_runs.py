"""Whole runs of the three stages, small: determinism, resuming, processes, and bad input."""

import json
import os
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import contrastive
import evaluate
import finetune
import mlm
from data import filter as filtering
from data import pydocs
from model import NomicBert
from options import InputError, help_texts, read_options

STAGES = (mlm, contrastive, finetune)
SMALL = ["--hidden-size=64", "--num-hidden-layers=1", "--num-attention-heads=2"]
SMALL += ["--intermediate-size=64", "--steps=6", "--batch-size=8", "--log-every=1"]


def train(stage, data, out, *options):
    """Runs a stage in this process. Returns the losses of its log and the bytes of its weights."""
    stage.main([*SMALL, f"--data={data}", f"--out={out}", *options])
    losses = [json.loads(line)["loss"] for line in open(out / "log.jsonl")]
    return losses, (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_one_seed_gives_equal_bits_whatever_the_evaluation_interval(stage, data, tmp_path):
    losses, weights = train(stage, data, tmp_path / "a", "--eval-every=1000")
    assert (losses, weights) == train(
        stage, data, tmp_path / "b", "--eval-every=2", "--save-every=1"
    )
    assert weights != train(stage, data, tmp_path / "c", "--seed=1")[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_one_that_never_stopped(stage, data, tmp_path):
    losses, weights = train(stage, data, tmp_path / "a")
    train(stage, data, tmp_path / "b", "--stop-after=3")
    assert train(stage, data, tmp_path / "b", "--resume") == (losses, weights)


@pytest.mark.parametrize("stage", STAGES)
def test_what_came_after_the_last_checkpoint_is_done_again(stage, data, tmp_path):
    """As after a kill between two checkpoints: the log has lines that the checkpoint has not."""
    losses, weights = train(stage, data, tmp_path / "a", "--save-every=2")
    train(stage, data, tmp_path / "b", "--stop-after=4")
    with open(tmp_path / "b" / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 5, "loss": 99.0}) + "\n")
    assert train(stage, data, tmp_path / "b", "--resume") == (losses, weights)


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_change_nothing_but_rounding(stage, data, tmp_path):
    """In one piece, in small pieces, and through GradCache."""
    pieces = [["--precision=float32"], ["--precision=float32", "--micro-batch-tokens=200"]]
    if stage is not mlm:
        pieces.append([*pieces[1], "--tokens-in-memory=0"])
    runs = [train(stage, data, tmp_path / str(i), *p)[0] for i, p in enumerate(pieces)]
    for losses in runs[1:]:
        np.testing.assert_allclose(losses, runs[0], rtol=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_do_what_one_does(stage, data, tmp_path):
    options = ["--precision=float32", f"--data={data}", *SMALL]
    losses, _ = train(stage, data, tmp_path / "one", "--precision=float32")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={29_500 + STAGES.index(stage)}", ROOT / f"{stage.__name__}.py"]
    result = subprocess.run(
        [*command, *options, f"--out={tmp_path / 'two'}"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]
    two = [json.loads(line)["loss"] for line in open(tmp_path / "two" / "log.jsonl")]
    np.testing.assert_allclose(two, losses, rtol=1e-4)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=2e-4)


def test_one_batch_can_be_memorised_by_every_stage(data, tmp_path):
    for stage in STAGES:
        options = ("--overfit", "--steps=150", "--lr=1e-2")
        losses, _ = train(stage, data, tmp_path / stage.__name__, *options)
        assert losses[-1] < 0.1 * losses[0], stage.__name__


def test_each_stage_starts_from_the_one_before_and_inherits_its_shape(data, tmp_path, capsys):
    train(mlm, data, tmp_path / "mlm")
    options = [f"--data={data}", "--steps=2", "--batch-size=8"]
    for stage, before in ((contrastive, "mlm"), (finetune, "contrastive")):
        init, out = f"--init={tmp_path / before}", f"--out={tmp_path / stage.__name__}"
        stage.main([*options, init, out])
        shown = capsys.readouterr().out
        assert f"hidden_size          64                   from {tmp_path / before}" in shown
    assert NomicBert.from_pretrained(tmp_path / "finetune").config.hidden_size == 64


def test_an_earlier_run_is_kept(data, tmp_path):
    _, first = train(mlm, data, tmp_path / "run")
    train(mlm, data, tmp_path / "run", "--seed=1")
    assert (tmp_path / "run.previous" / "model.safetensors").read_bytes() == first


# ------------------------------------------------------------------------------------------------
# Options and bad input


@pytest.mark.parametrize(
    "config", [*(s.Config for s in STAGES), evaluate.Options, pydocs.Options, filtering.Options]
)
def test_every_option_has_its_help_text(config):
    assert set(help_texts(config)) == {field.name for field in fields(config)}


@pytest.mark.parametrize("stage", STAGES)
def test_presets_set_options_that_exist_to_values_of_their_type(stage):
    types = {field.name: field.type for field in fields(stage.Config)}
    for preset in stage.PRESETS.values():
        assert all(type(value) is types[key] for key, value in preset.items())
    config, origin = read_options(stage.Config, ["--preset=paper", "--lr=1"], stage.PRESETS)
    assert config.hidden_size == 768 and origin["hidden_size"] == "preset paper"
    assert config.lr == 1.0 and origin["lr"] == "option" and origin["seed"] == "default"


def test_both_spellings_and_powers_of_ten_are_understood():
    options = ["--batch-size=64", "--eval_every=1e3", "--resume"]
    config, _ = read_options(mlm.Config, options, mlm.PRESETS)
    assert (config.batch_size, config.eval_every, config.resume) == (64, 1000, True)


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (mlm, ["--batchsize=4"], "--batchsize is not an option: did you mean --batch-size?"),
        (mlm, ["--steps=many"], "--steps=many: not a whole number"),
        (mlm, ["--steps=1.5"], "--steps=1.5: not a whole number"),
        (mlm, ["--steps"], "--steps needs a value"),
        (mlm, ["--lr=fast"], "--lr=fast: not a number"),
        (mlm, ["--resume=perhaps"], "--resume=perhaps: give true or false"),
        (mlm, ["steps=4"], "options are written --key=value"),
        (mlm, ["--preset=huge"], "the presets are laptop, gpu, paper"),
        (mlm, ["--precision=int4"], "give auto, bf16, float32 or float64"),
        (mlm, ["--num-attention-heads=3"], "makes no 3 heads"),
        (mlm, ["--data=nowhere"], "no data in nowhere: python data/pydocs.py --out=nowhere"),
        (mlm, ["--batch-size=0"], "--batch-size=0: give 1 or more"),
        (finetune, ["--negatives=100000"], "the smallest source has"),
        (finetune, ["--negatives=-1"], "--negatives=-1: give 0 or more"),
        (finetune, ["--miner=google"], "--miner=google: give model or bm25"),
        (finetune, ["--margin=0"], "--margin=0.0: give more than 0"),
        (mlm, ["--seq-len=100000000"], "none of 100000000 in a row"),
        (contrastive, ["--init=nowhere"], "there is no checkpoint directory nowhere"),
        (contrastive, ["--batch-size=1000000"], "the largest source has"),
        (contrastive, ["--document-tokens=999"], "beyond the 128 tokens"),
        (contrastive, ["--keep=some"], "give embeddings or all"),
        (finetune, ["--resume"], "there is no"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(stage, options, message, data, tmp_path):
    with pytest.raises(InputError) as error:
        stage.main([f"--data={data}", f"--out={tmp_path / 'out'}", *options])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists(), "nothing is left behind"


def test_a_shape_that_contradicts_the_checkpoint_is_refused(data, tmp_path):
    train(mlm, data, tmp_path / "mlm")
    with pytest.raises(
        InputError, match="--hidden-size contradicts .* where it is 64: leave it out"
    ):
        train(contrastive, data, tmp_path / "c", f"--init={tmp_path / 'mlm'}", "--hidden-size=128")


def test_a_resumed_run_keeps_its_settings(data, tmp_path):
    train(mlm, data, tmp_path / "run", "--stop-after=3")
    with pytest.raises(InputError, match="--lr was 0.002, not 1.0"):
        train(mlm, data, tmp_path / "run", "--resume", "--lr=1")


def test_a_damaged_state_is_named(data, tmp_path):
    train(mlm, data, tmp_path / "run", "--stop-after=3")
    state = tmp_path / "run" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(InputError, match="state.pt is damaged"):
        train(mlm, data, tmp_path / "run", "--resume")


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_checkpoint(stage, data, tmp_path):
    with pytest.raises(InputError, match="the loss is nan at step"):
        train(stage, data, tmp_path / "run", "--lr=1e30", "--save-every=1", "--steps=20")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written_shows_before_training(data, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot write"):
        train(mlm, data, tmp_path / "locked" / "run")


def test_from_the_shell_it_is_exit_code_2_and_one_line(data):
    command = [sys.executable, ROOT / "contrastive.py", f"--data={data}", "--init=nowhere"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "contrastive.py: there is no checkpoint directory nowhere\n"


@pytest.mark.parametrize("stage", STAGES)
def test_the_doctor_finds_this_machine_in_order(stage, data):
    command = [sys.executable, ROOT / f"{stage.__name__}.py", f"--data={data}", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "[FAIL]" not in result.stdout and result.stdout.count("[OK]") >= 7
