"""Imports point one way, and what is imported is no more than what is needed.

python tests/test_imports.py prints how many files and lines of the project each stage loads."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

LOADED = {"mlm": 2120, "contrastive": 2500, "finetune": 2850}  # lines, at most
FOLDERS = ("common", "data", "bench", "lab")
ORDER = ("common", "data", "rope", "model", "metrics", "mlm", "evaluate", "data.filter")
ORDER += ("contrastive", "finetune", "bench", "lab")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for pattern in ("*.py", *(f"{folder}/*.py" for folder in FOLDERS))
    for path in sorted(ROOT.glob(pattern))
}


def place(name):
    """The index of a file in ORDER: of its own name, else of its folder."""
    return ORDER.index(name if name in ORDER else name.split(".")[0])


def imports_of(name):
    """The project's files that a file imports, at the top and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {part if part in FILES else node.module for part in parts}
    beside = {f"{name.split('.')[0]}.{module}" for module in found}  # as scripts see their folder
    return (found | beside) & set(FILES) - {name}


def test_a_file_imports_only_what_comes_before_it_and_there_are_no_circles():
    imports = {name: imports_of(name) for name in FILES}
    assert len(FILES) > 25 and all(imports[name] for name in ("model", "mlm", "finetune"))
    for name in FILES:
        for other in imports[name]:
            same_folder = name.split(".")[0] == other.split(".")[0] and place(name) == place(other)
            assert place(other) < place(name) or same_folder, (name, other)
    tuple(TopologicalSorter(imports).static_order())  # raises CycleError


def loaded_by(module):
    """The files of modules that `import module` loads."""
    code = (
        f"import sys, {module}; print(*(getattr(m, '__file__', 0) for m in sys.modules.values()))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {Path(path) for path in result.stdout.split()}


def count(stage):
    """How many files of the project a stage loads, and how many lines they have."""
    files = loaded_by(stage) & set(FILES.values())
    return len(files), sum(len(path.read_text().splitlines()) for path in files)


@pytest.mark.parametrize("stage", LOADED)
def test_what_a_reader_of_a_stage_has_to_load_does_not_grow(stage):
    files, lines = count(stage)
    assert 10 < files < 20 and 1000 < lines <= LOADED[stage]


def test_importing_the_model_imports_nothing_of_a_run_and_no_large_library():
    loaded = {part for path in loaded_by("model") for part in path.parts}
    unwanted = {"datasets", "matplotlib", "mteb", "bm25s", "transformers", "run.py"}
    assert "model.py" in loaded and not loaded & unwanted


def test_no_file_executes_what_it_reads():
    calls = [
        (name, ast.unparse(node))
        for name, path in FILES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]
    loads = [(name, call) for name, call in calls if call.startswith("torch.load(")]
    assert loads and all("weights_only=True" in call for _, call in loads)
    for name, call in calls:
        assert "trust_remote_code=True" not in call and "allow_pickle=True" not in call, name
        assert not call.startswith("pickle.load") or name == "data.pairs", "a file of its own"


if __name__ == "__main__":
    for stage in LOADED:
        print("import {}: {} files, {:,} lines".format(stage, *count(stage)))
