"""The command line of every script: help texts, presets, and bad values refused in one line."""

import importlib
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import ROOT
from tiny import cases

import contrastive
import evaluate
import finetune
import mlm
from common.options import InputError, range_of, read_options
from data import folder

PATHS = [path for pattern in ("*.py", "data/*.py", "bench/*.py") for path in ROOT.glob(pattern)]
SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(PATHS)
    if "read_options(" in path.read_text()
]
STAGES = (mlm, contrastive, finetune)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_option_with_a_text_and_a_default_in_its_range(name, capsys):
    module = importlib.import_module(name)
    options = getattr(module, "Options", None) or module.Config
    with pytest.raises(SystemExit) as left:
        module.main(["-h"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and shown.startswith(module.__doc__.strip().splitlines()[0])
    for field in fields(options):
        (text,) = re.findall(rf"^  --{spelt(field.name)}=\w+  (.*)\n      default ", shown, re.M)
        if field.type in (int, float):
            low, high = range_of(field.type, text)
            assert low <= field.default <= high, field.name


def spelt(name):
    return name.replace("_", "-")


@pytest.mark.parametrize("stage", STAGES)
def test_presets_are_accepted_as_options_would_be(stage):
    for name, preset in stage.PRESETS.items():
        config, origin = read_options(stage.Config, [f"--preset={name}"], stage.PRESETS)
        values = {k: str(v).lower() if isinstance(v, bool) else v for k, v in preset.items()}
        given = [f"--{spelt(key)}={value}" for key, value in values.items()]
        same, _ = read_options(stage.Config, [f"--preset={name}", *given], stage.PRESETS)
        assert same == config and all(origin[key] == f"preset {name}" for key in preset)
    config, origin = read_options(stage.Config, ["--preset=paper", "--lr=1"], stage.PRESETS)
    assert (config.lr, config.hidden_size, config.seed) == (1.0, 768, 0)
    found = [origin[key] for key in ("lr", "hidden_size", "seed")]
    assert found == ["option", "preset paper", "default"]


def test_both_spellings_and_any_notation_of_a_number_are_understood():
    options = ["--batch-size=64", "--eval_every=1e3", "--lr=1e-3", "--steps=10e2", "--compile"]
    config, _ = read_options(mlm.Config, options, mlm.PRESETS)
    assert (config.batch_size, config.eval_every, config.lr) == (64, 1000, 0.001)
    assert (config.steps, config.compile) == (1000, True)


BAD = [  # script, options, what the message has
    (mlm, "--batchsize=4", "--batchsize is not an option: did you mean --batch-size?"),
    (mlm, "--xyzzy=4", "--xyzzy is not an option: --help lists all"),
    (mlm, "steps=4", "options are written --key=value"),
    (mlm, "--steps", "--steps needs a value"),
    (mlm, "--steps=many --steps=1.5 --steps= --steps=0 --steps=nan", "from 1 to 1e+09"),
    (mlm, f"--save-every=-1 --log-every=0 --steps=1{'0' * 400}", "a whole number from 1 to 1e+09"),
    (mlm, "--lr=fast --lr=nan --lr=-1 --lr=1e30 --lr=inf", "a number from 0 to 1,000"),
    (mlm, "--warmup=2 --warmup=-3 --weight-decay=-1", "a number from 0 to 1"),
    (mlm, "--compile=perhaps", "--compile=perhaps: give true or false"),
    (mlm, "--preset=huge", "the presets are laptop, gpu, paper"),
    (mlm, "--precision=int4", "give auto, bf16 or float32"),
    (mlm, "--num-attention-heads=3", "--hidden-size=256 does not make 3 heads"),
    (mlm, "--seq-len=1e6", "fewer than --seq-len=1000000"),
    (mlm, "--data=nowhere", "not a data folder: python data/pydocs.py --out=nowhere"),
    (mlm, "--resume", "--resume: there is no"),
    (contrastive, "--temperature=0", "a number from 0.001 to 100"),
    (contrastive, "--document-tokens=999", "the model is trained for 128 tokens, give no more"),
    (contrastive, "--init=nowhere", "there is no checkpoint directory nowhere"),
    (contrastive, "--decay=cosine", "give sqrt or linear"),
    (finetune, "--margin=0 --margin=nan", "a number from 0.01 to inf"),
    (evaluate, "--max-tokens=-1 --dims=-1 --dims=1.5", "a whole number from 0 to 1e+06"),
    (folder, "--vocab-size=0 --vocab-size=1e9", "a whole number from 300 to 1e+06"),
]
CASES = [(script, option, message) for script, line, message in BAD for option in line.split()]


@cases(("script", "option", "message"), CASES)
def test_a_bad_option_is_one_line_that_says_what_to_give(
    script, option, message, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = [str(tmp_path)] if script is folder else [f"--data={data}"]
    with pytest.raises(InputError) as error:
        script.main([*given, option])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


# ------------------------------------------------------------------------------------------------
# From the shell


def run(command):
    return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)


@cases(
    ("command", "message"),
    [
        ("mlm.py --data={data} --out={out}/file/run", "Not a directory"),
        ("data/folder.py '{out}/two\nlines'", "two lines"),
        (
            "contrastive.py --data={data} --out={out}/run --init=nowhere",
            "no checkpoint directory nowhere",
        ),
        ("finetune.py -h > /dev/full", "No space left on device"),
    ],
)
def test_from_the_shell_what_is_wrong_is_one_line_and_exit_code_2(command, message, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = run(f"{sys.executable} {command.format(data=data, out=tmp_path)}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith(Path(command.split()[0]).name) and message in result.stderr


def test_a_closed_pipe_is_no_error():
    result = run(f"{sys.executable} -u finetune.py -h | head -1")
    assert result.stdout == finetune.__doc__.splitlines()[0] + "\n" and not result.stderr
