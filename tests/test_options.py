"""The command line of every script: help texts, presets, and bad values refused in one line."""

import importlib
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT
from tiny import STAGES, cases, refused

import contrastive
import finetune
import mlm
from common.options import read_options
from lab import lab

PATHS = [path for pattern in ("*.py", "data/*.py", "bench/*.py") for path in ROOT.glob(pattern)]
SCRIPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted(PATHS)
    if "read_options(" in path.read_text()
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_lists_every_option_and_each_default_is_accepted(name, capsys):
    module = importlib.import_module(name)
    options = getattr(module, "Options", None) or module.Config
    with pytest.raises(SystemExit) as left:
        module.main(["-h"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and shown.startswith(module.__doc__.strip().splitlines()[0])
    presets = getattr(module, "PRESETS", None)
    for field in fields(options):
        assert f"\n  --{spelt(field.name)}={field.type.__name__}  " in shown
        config, _ = read_options(options, [option(field.name, field.default)], presets)
        assert getattr(config, field.name) == field.default


def spelt(name):
    return name.replace("_", "-")


def option(name, value):
    return f"--{spelt(name)}={str(value).lower() if isinstance(value, bool) else value}"


@pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES)
def test_presets_are_accepted_as_options_would_be(stage):
    for name, preset in stage.PRESETS.items():
        config, origin = read_options(stage.Config, [f"--preset={name}"], stage.PRESETS)
        options = [f"--preset={name}", *(option(*item) for item in preset.items())]
        same, _ = read_options(stage.Config, options, stage.PRESETS)
        assert same == config and all(origin[key] == f"preset {name}" for key in preset)
    config, origin = read_options(stage.Config, ["--preset=paper", "--lr=1"], stage.PRESETS)
    chosen = [(getattr(config, key), origin[key]) for key in ("lr", "hidden_size", "seed")]
    assert chosen == [(1.0, "option"), (768, "preset paper"), (0, "default")]


def test_both_spellings_and_any_notation_of_a_number_are_understood():
    """A limit itself is in the range, though 0.01 has no exact float."""
    options = ["--batch-size=64", "--eval_every=1e3", "--lr=1e-3", "--steps=10e2", "--compile"]
    options += ["--mask-probability=0.01"]
    config, _ = read_options(mlm.Config, options, mlm.PRESETS)
    assert (config.batch_size, config.eval_every, config.lr) == (64, 1000, 0.001)
    assert (config.steps, config.compile, config.mask_probability) == (1000, True, 0.01)


BAD = [  # script, options, what the message has
    (mlm, "--batchsize=4", "--batchsize is not an option: did you mean --batch-size=...?"),
    (mlm, "--xyzzy=4", "--xyzzy is not an option: --help lists all"),
    (mlm, "steps=4 -steps=4", "steps is not an option: did you mean --steps=...?"),
    (mlm, "--steps", " needs a value: --"),
    (mlm, f"--steps=many --steps=1.5 --steps=0 --steps=1{'0' * 400}", "a whole number from 1 to"),
    (mlm, "--lr=fast --lr=nan --lr=-1 --lr=inf", "a number from 0 to 1,000"),
    (mlm, "--compile=perhaps", "--compile=perhaps: give true or false"),
    (mlm, "--preset=huge", "--preset=huge: give laptop, gpu or paper"),
    (mlm, "--num-attention-heads=3", "--hidden-size=256 does not make 3 heads"),
    (mlm, "--seq-len=1e6", "fewer than --seq-len=1000000"),
    (mlm, "--data=nowhere", "not a data folder: python data/pydocs.py --out=nowhere"),
    (mlm, "--resume", "--resume: there is no"),
    (contrastive, "--document-tokens=999", "the model is trained for 128 tokens, give no more"),
    (contrastive, "--init=nowhere", "there is no checkpoint directory nowhere"),
    (finetune, "--margin=0 --margin=nan", "a number from 0.01 to inf"),
]
CASES = [(script, option, message) for script, line, message in BAD for option in line.split()]


@cases("script, option, message", CASES)
def test_a_bad_option_is_one_line(script, option, message, data, tmp_path, monkeypatch):
    """It says what to give."""
    monkeypatch.chdir(tmp_path)
    with refused(re.escape(message)):
        script.main([f"--data={data}", option])
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def run(command):
    """From the shell."""
    settings = {"shell": True, "cwd": ROOT, "capture_output": True, "text": True}
    return subprocess.run(command, **settings, timeout=60)


@cases(
    "command, message",
    ("{python} mlm.py --data={data} --out={out}/file/run", "mlm.py: .*Not a directory"),
    ("{python} lab/lab.py grade '{out}/two\nlines'", "lab.py: .*two lines"),
    ("{python} lab/lab.py -h > /dev/full", "lab.py: .*No space left on device"),
    # nobody waits for processes that are not there
    ("RANK=1 {python} lab/lab.py --xyzzy=4", "lab.py: --xyzzy is not an option"),
)
def test_from_the_shell_what_is_wrong_is_one_line_and_exit_code_2(command, message, data, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = run(command.format(python=sys.executable, data=data, out=tmp_path))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert re.match(message, result.stderr)


def test_a_closed_pipe_is_no_error():
    result = run(f"{sys.executable} -u lab/lab.py -h | head -1")
    assert result.stdout == lab.__doc__.splitlines()[0] + "\n" and not result.stderr


PRINTS = """
from common.options import cli
from tqdm import tqdm
cli(lambda _: [print("\\u4e00 \\udc80 x"), tqdm.write("\\u4e00"), *tqdm([1], desc="\\u4e00")])
"""


@cases(
    "before, after",
    *[("PYTHONIOENCODING=cp1252", ""), ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", "")],
    *[("", "<&-"), ("", ">&-"), ("", "2>&-"), ("", "<&- >&- 2>&-")],
)
def test_any_text_can_be_printed_to_any_output(before, after):
    result = run(f"{before} {sys.executable} -c '{PRINTS}' {after}")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert ">&-" in after or "? x" in result.stdout
