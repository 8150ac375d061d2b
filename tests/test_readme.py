"""Every command of the README runs, with small settings (those of docs/: test_docs.py); every file
that README and docs name exists."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
SHAPE = "--hidden-size=64 --num-attention-heads=2 --intermediate-size=64"
SMALL = {  # script, or script and command -> options that make it small; the last value counts
    "data/pydocs.py": "--core=numpy,tqdm --vocab-size=2048",
    "data/folder.py": "--vocab-size=2048",
    "data/pairs.py": "--vocab-size=500",
    "data/filter.py": "--sources=halves",
    "mlm.py": f"--steps=3 --batch-size=8 --eval-every=0 {SHAPE}",
    "contrastive.py": "--steps=3 --batch-size=8 --eval-every=0",
    "finetune.py": "--steps=3 --batch-size=8 --eval-every=0",
    "bench/speed.py": "--preset=laptop --texts=8 --tries=8 --rounds=1",
    "bench/speed.py stages": f"--steps=3 --batch-size=2 --compile=false {SHAPE}",
    "bench/record.py": f"--seeds=0 'contrastive.py --steps=3 --batch-size=8 {SHAPE}'",
    "bench/experiments.py": f"--rows=BM25 --seeds=0 --options='{SHAPE}'",
    "bench/experiments.py lesson": f"--rows='stage 2 w' --seeds=0 --options='{SHAPE} --steps=2'",
    "bench/experiments.py curve": f"--rows='500 pairs' --options='{SHAPE} --steps=2'",
}
STAGES = ["mlm.py", "contrastive.py", "finetune.py --init=out/contrastive --negatives=0"]
PREPARED = ["python data/pydocs.py", *(f"python {stage}" for stage in STAGES)]


def commands_of(page):
    """The lines of a page's shell blocks that start python or torchrun, without their comments.

    Those with DIR, FILE, HOST or SOURCES in them need what a reader has to bring."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.split("\n")]
    lines = [line for line in lines if re.match(r"(python|torchrun) ", line)]
    return [
        line for line in lines if not re.search("DIR|FILE|HOST|SOURCES|-m venv|out/tuned", line)
    ]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project with notes and pairs in it, and a small run of every stage."""
    folder = tmp_path_factory.mktemp("checkout") / "project"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "out", "tests"))
    (folder / "notes").mkdir()
    for i in range(40):
        words = " ".join(f"word{(i * 7 + j * j) % 90}" for j in range(80))
        text = f"# Note {i}\n\n## Part one of {i}\n\n{words}.\n\n## Part two of {i}\n\nNo {words}\n"
        (folder / "notes" / f"{i}.md").write_text(text)
    for name in ("faq", "labelled"):
        with open(folder / f"{name}.jsonl", "w") as file:
            for i in range(100):
                query, document = f"What is the {name} thing {i}?", f"It is {name} {i * i}."
                print(json.dumps({"query": query, "document": document}), file=file)
    for command in PREPARED:
        run(command, folder)
    return folder


def run(command, folder):
    script, word = re.search(r"([\w/]+\.py) ?([a-z]*)", command).groups()
    small = SMALL.get(f"{script} {word}", SMALL.get(script, ""))
    command = re.sub("^torchrun", "python -m torch.distributed.run --standalone", command)
    command = re.sub("^python", sys.executable, command)
    settings = {"shell": True, "cwd": folder, "stdin": subprocess.DEVNULL, "text": True}
    result = subprocess.run(f"{command} {small}", **settings, capture_output=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-1000:]}\n{result.stderr[-2000:]}"


@pytest.mark.parametrize("command", [c for c in commands_of("README.md") if c not in PREPARED])
def test_every_command_of_the_readme_runs(command, checkout):
    run(command, checkout)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_commands_and_every_file_and_heading_that_it_names_exists(page):
    text = (ROOT / page).read_text()
    names = re.findall(r"`([\w/]+\.(?:py|txt|md|sh|tsv))`", text)
    names += [f"{os.path.dirname(page)}/{n}" for n in re.findall(r"\]\(([\w/.]+)\)", text)]
    missing = [n for n in names if not (ROOT / n.lstrip("/")).exists()]
    assert names and commands_of(page) and not missing, missing
    for file, anchor in re.findall(r"\]\(([\w/.]*)#([\w-]+)\)", text):
        target = (ROOT / page).parent / file if file else ROOT / page
        headings = re.findall(r"^#+ (.*)$", target.read_text().lower(), re.M)
        assert anchor in [re.sub(r"[^\w -]", "", x).replace(" ", "-") for x in headings]
