"""The README's commands run."""

import json
import re
import shutil
import subprocess
import sys

from conftest import ROOT
from test_folder import write_notes
from test_jsonl import pairs

# what makes a command of the README small: a handful of steps, little data
SMALL = {
    "data/pydocs.py": "--core=numpy,tqdm --vocab-size=2048",
    "mlm.py": "--steps=3 --batch-size=8",  # the last of two values of an option counts
    "contrastive.py": "--steps=3 --batch-size=8 --eval-every=0",
    "finetune.py": "--steps=3 --batch-size=8 --eval-every=0",
    "bench/stages.py": "--steps=4 --batch-size=8",
    "bench/train.py": "--preset=laptop --texts=8 --tries=8 --rounds=1",
    "bench/attention.py": "--tokens=300 --heads=1 --rounds=1",
    "bench/parity.py": "--layers=1 --hidden-size=64 --longest=512",
    "bench/encode.py": "--layers=1 --hidden-size=64 --texts=8 --rounds=1",
    "bench/faults.py": "--kills=1 --steps=2 --stages=mlm",
    "bench/filtering.py": "--scale=0.01 --rows='with 30,planted: no'",
    "data/folder.py": "--vocab-size=2048",
    "data/filter.py": "--sources=halves",
    "data/jsonl.py": "--vocab-size=500",
    "bench/data.py": "--rows=500 --large=1000 --rounds=1",
    "bench/memory.py": "--batches=64 --source=name-code",
    "bench/ablations.py": "--seeds=1 --scale=0.001 --rows='without stage 3'",
}


def readme_commands():
    """Every line of a shell block that starts python or torchrun, without its comment."""
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.split("\n")]
    lines = [line for line in lines if re.match(r"(\.venv/bin/)?(python|torchrun) ", line)]
    return [line for line in lines if not re.search("DIR|FILE|-m ", line)]


def test_every_command_of_the_readme_runs(tmp_path):
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for folder in ("data", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    write_notes(tmp_path / "notes")
    for name in ("faq", "labelled"):
        lines = (json.dumps(row) + "\n" for row in pairs(100))
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    commands = readme_commands()
    assert len(commands) >= 8
    for command in commands:
        script = re.search(r"[\w/]+\.py", command)[0]
        words = re.sub(r"^(\.venv/bin/)?torchrun", "python -m torch.distributed.run", command)
        words = re.sub(r"^(\.venv/bin/)?python", sys.executable, words)
        result = subprocess.run(
            f"{words} {SMALL.get(script, '')}",
            shell=True,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, (
            f"{command}\n{result.stdout[-1000:]}\n{result.stderr[-2000:]}"
        )


def test_every_file_that_the_readme_names_exists():
    names = re.findall(r"`([\w/]+\.(?:py|txt|md|sh))`", (ROOT / "README.md").read_text())
    assert names and all((ROOT / name).is_file() for name in names), names
