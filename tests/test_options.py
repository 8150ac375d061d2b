"""The command line of every script: help texts, presets, and bad values refused in one line."""

import importlib
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT
from tiny import cases

import contrastive
import evaluate
import finetune
import mlm
from common.options import InputError, parse, range_of, read_options
from data import filter, folder, pairs, pydocs

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


def test_both_spellings_and_powers_of_ten_are_understood():
    options = ["--batch-size=64", "--eval_every=1e3", "--lr=1e-3", "--compile"]
    config, _ = read_options(mlm.Config, options, mlm.PRESETS)
    assert (config.batch_size, config.eval_every, config.lr) == (64, 1000, 0.001)
    assert config.compile is True


WHOLE, NUMBER = ": not a whole number", ": not a number"
BAD = [  # script, options, what the message has
    (mlm, "--batchsize=4", "--batchsize is not an option: did you mean --batch-size?"),
    (mlm, "--xyzzy=4", "--xyzzy is not an option: --help lists all"),
    (mlm, "steps=4", "options are written --key=value"),
    (mlm, "--steps", "--steps needs a value"),
    (mlm, "--steps=many --steps=1.5 --steps= --seed=nan", WHOLE),
    (mlm, "--lr=fast --lr=nan --warmup=nan", NUMBER),
    (mlm, "--compile=perhaps", "--compile=perhaps: give true or false"),
    (mlm, "--preset=huge", "the presets are laptop, gpu, paper"),
    (mlm, "--precision=int4", "give auto, bf16 or float32"),
    (mlm, f"--steps=0 --save-every=-1 --log-every=0 --steps=1{'0' * 400}", "from 1 to 1e+09"),
    (mlm, "--lr=-1 --lr=1e30 --lr=inf", "a number from 0 to 1,000"),
    (mlm, "--beta2=1", "a number from 0 to 0.99999"),
    (mlm, "--warmup=2 --warmup=-3 --weight-decay=-1", "a number from 0 to 1"),
    (mlm, "--seed=1e23 --seed=-1", "a whole number from 0 to 1e+18"),
    (mlm, "--hidden-size=1e8 --hidden-size=0", "a whole number from 2 to 65,536"),
    (mlm, "--num-hidden-layers=0 --num-attention-heads=1e4", "a whole number from 1 to 1,000"),
    (mlm, "--batch-size=1e12 --batch-size=0", "a whole number from 1 to 1e+06"),
    (mlm, "--mask-probability=2 --mask-probability=0", "a number from 0.01 to 0.99"),
    (mlm, "--eval-every=-1", "a whole number from 0 to 1e+09"),
    (mlm, "--num-attention-heads=3", "--hidden-size=256 does not make 3 heads"),
    (mlm, "--seq-len=1e6", "fewer than --seq-len=1000000"),
    (mlm, "--data=nowhere", "not a data folder: python data/pydocs.py --out=nowhere"),
    (mlm, "--resume", "--resume: there is no"),
    (contrastive, "--temperature=0", "a number from 0.001 to 100"),
    (contrastive, "--clip=-1", "a number from 0 to 1e+09"),
    (contrastive, "--query-tokens=2", "a whole number from 3 to 1e+06"),
    (contrastive, "--document-tokens=999", "--document-tokens is beyond the 128 tokens"),
    (contrastive, "--init=nowhere", "there is no checkpoint directory nowhere"),
    (contrastive, "--decay=cosine", "give sqrt or linear"),
    (finetune, "--negatives=-1", "a whole number from 0 to 1,000"),
    (finetune, "--mined=0", "a whole number from 1 to 10,000"),
    (finetune, "--margin=0 --margin=-1", "a number from 0.01 to inf"),
    (finetune, "--margin=nan", NUMBER),
    (evaluate, "--max-tokens=-1 --dims=-1", "a whole number from 0 to 1e+06"),
    (evaluate, "--dims=1.5", WHOLE),
    (evaluate, "--rope-factor=nan", NUMBER),
    (evaluate, "--rope-factor=-1", "a number from 0 to 1,000"),
    (pydocs, "--vocab-size=0 --vocab-size=1e9", "a whole number from 300 to 1e+06"),
    (folder, "--vocab-size=0 --vocab-size=1e9", "a whole number from 300 to 1e+06"),
    (pairs, "--limit=-1", "a whole number from 0 to 1e+12"),
    (filter, "--top=0", "a whole number from 1 to 1e+09"),
]
CASES = [(script, option, message) for script, line, message in BAD for option in line.split()]


@cases(("script", "option", "message"), CASES)
def test_a_bad_option_is_one_line_that_says_what_to_give(
    script, option, message, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = [str(tmp_path)] if script in (folder, pairs, filter) else []
    given += [f"--data={data}"] if script in (*STAGES, evaluate) else []
    with pytest.raises(InputError) as error:
        script.main([*given, option])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize("text", ["1e3", "1000", "1000.0", "+1000", "10e2"])
def test_a_whole_number_may_be_written_in_any_notation(text):
    assert parse("steps", text, int, "optimizer steps") == 1000


# ------------------------------------------------------------------------------------------------
# From the shell


def run(command, **more):
    return subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, **more)


@cases(
    "command",
    [
        "RANK=0 {python} mlm.py",
        "{python} mlm.py --data={data} --out={out}/file/run",
        "{python} evaluate.py --out='{out}/two\nlines'",
        "{python} data/folder.py '{out}/two\nlines'",
        "{python} data/pairs.py '{out}/two\nlines.jsonl'",
        "{python} bench/estimate.py --preset=none",
    ],
)
def test_from_the_shell_too_bad_input_is_one_line_and_exit_code_2(command, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = run(command.format(python=sys.executable, data=data, out=tmp_path))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr


def test_bad_input_and_a_full_disk_are_one_line_and_a_closed_pipe_is_none(data, tmp_path):
    options = f"--data={data} --init=nowhere --out={tmp_path}/run"
    result = run(f"{sys.executable} contrastive.py {options}")
    assert result.returncode == 2
    assert result.stderr == "contrastive.py: there is no checkpoint directory nowhere\n"
    result = run(f"{sys.executable} -u finetune.py -h | head -1")
    assert result.stdout == finetune.__doc__.splitlines()[0] + "\n" and not result.stderr
    result = run(f"{sys.executable} finetune.py -h > /dev/full")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in result.stderr
