"""The lab: you write the functions that are Nomic Embed, and the project's own tests judge them.

    python lab/lab.py start               # lab/work/ gets a file for each exercise
    python lab/lab.py check rotate        # the tests, with your function in place of the real one
    python lab/lab.py check               # of all exercises
    python lab/lab.py hint rotate         # the idea; again: the shapes; again: all but one line
    python lab/lab.py answer rotate       # the real function
    python lab/lab.py status              # what is done; --json for a script
    python lab/lab.py run                 # trains with your functions, and searches
    python lab/lab.py experiment rope --predict=0.1     # predict a difference, then measure it

The real files are the solutions: a function is found by its name, cut out, and replaced in a copy
of the project. Your files in lab/work/ are never overwritten. A teacher's guide is in
lab/INSTRUCTOR.md.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.files import read_json, write_json, write_text
from common.options import InputError, cli, read_options, split_words
from lab.cutting import copy_project, real, stub, written
from lab.exercises import EXERCISES

SECONDS = 60  # that the tests of an exercise may take; more is a loop without end


@dataclass
class Options:
    work: str = "lab/work"  # where the student's files are
    out: str = "out"  # the checkpoints of the demo, for experiments
    data: str = "out/pydocs"  # the data folder of run and of experiments
    predict: float = None  # of experiment: the difference that you expect [-1, 1]
    seed: int = 0  # of experiment [0, 1e9]
    json: bool = False  # of status


def progress(work, name=None, **news):
    """What is known: exercise -> {"hints": how many were given, "passed": the function that passed
    last}; experiment -> the prediction and what was measured. With a name, adds the news to it."""
    path = Path(work, "progress.json")
    known = read_json(path) if path.is_file() else {}
    if name:
        known[name] = known.get(name, {}) | news
        write_json(path, known)
    return known


def judge(exercise, function):
    """Runs the tests in a copy of the project with this function in it. Returns "" if they pass,
    else the end of what pytest prints."""
    tests = [f"tests/test_{exercise.file}::{test}" for test in exercise.tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", *tests]
    with tempfile.TemporaryDirectory() as folder:
        copy_project(folder, {exercise: function})
        settings = {"cwd": folder, "capture_output": True, "text": True}
        try:
            result = subprocess.run(command, timeout=SECONDS, **settings)
        except subprocess.TimeoutExpired:
            return f"no answer after {SECONDS} seconds: a loop without end?"
    if result.returncode == 0:
        return ""
    lines = (result.stdout + result.stderr).splitlines()
    return "\n".join(["not yet", *lines[-20:]])


def start(options):
    for exercise in EXERCISES:
        path = Path(options.work, f"{exercise.name}.py")
        if not path.exists():
            write_text(path, stub(exercise))
    print(f"{options.work} has {len(EXERCISES)} files: begin with mask_tokens.py")


def check(options, exercise):
    """Judges the student's function and remembers it if it passed. Returns whether it did."""
    try:
        function = written(exercise, options.work)
        problem = judge(exercise, function) if function else "not begun"
    except InputError as error:  # the file cannot be read: the other exercises are still checked
        problem = str(error)
    if not problem:
        progress(options.work, exercise.name, passed=function)
    print(f"{exercise.name}: {problem or 'right'}", flush=True)
    return not problem


def hint(options, exercise):
    but_one = [
        f"{line[: len(line) - len(line.lstrip())]}..." if exercise.hidden in line else line
        for line in real(exercise).splitlines()
    ]
    given = progress(options.work).get(exercise.name, {}).get("hints", 0)
    print((exercise.idea, exercise.shapes, "\n".join(but_one))[min(given, 2)])
    progress(options.work, exercise.name, hints=min(given + 1, 3))


def state_of(options, exercise):
    """open, tried, or done: the function as it is now has passed."""
    try:
        function = written(exercise, options.work)
    except InputError:
        return "tried"
    passed = progress(options.work).get(exercise.name, {}).get("passed")
    return "open" if not function else "done" if function == passed else "tried"


def status(options):
    known = progress(options.work)
    rows = {
        e.name: {"state": state_of(options, e), "hints": known.get(e.name, {}).get("hints", 0)}
        for e in EXERCISES
    }
    if options.json:
        experiments = {name: row for name, row in known.items() if "predicted" in row}
        print(json.dumps({"exercises": rows, "experiments": experiments}))
    else:
        for name, row in rows.items():
            print(f"{name:22}{row['state']:7}{row['hints']} hints")


def run(options):
    """Trains stages 1 and 2 for a few steps with all of the student's functions that pass, and
    searches. Each run has a folder of its own."""
    theirs = {e: written(e, options.work) for e in EXERCISES if state_of(options, e) == "done"}
    print("yours:", ", ".join(exercise.name for exercise in theirs) or "none yet")
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=options.work)).resolve()
    copy_project(folder, theirs)
    for command in (  # 60 steps of stage 1 show that its loss falls; they are too few to start from
        ["mlm.py", "--steps=60", "--eval-every=0"],
        ["contrastive.py", "--steps=60", "--batch-size=256", "--lr=3e-3", "--eval-every=0"],
        ["evaluate.py", "search", "how do I read a csv file"],
    ):
        print(f"\npython {' '.join(command)}", flush=True)
        command = [sys.executable, *command, f"--data={Path(options.data).resolve()}"]
        if subprocess.run(command, cwd=folder).returncode:
            raise InputError(f"{command[1]} stopped, in {folder}: the reason is above")
    print(f"\nall of it is in {folder}; search there again with another question")


def named(name):
    for exercise in EXERCISES:
        if exercise.name == name:
            return exercise
    raise InputError(f"{name}: the exercises are {', '.join(e.name for e in EXERCISES)}")


def main(arguments):
    words, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    match words:
        case ["start"]:
            start(options)
        case ["check", *names]:
            exercises = [named(name) for name in names] or EXERCISES
            if not all([check(options, exercise) for exercise in exercises]):
                sys.exit(1)
        case ["hint", name]:
            hint(options, named(name))
        case ["answer", name]:
            print(real(named(name)), end="")
        case ["status"] | []:
            status(options)
        case ["run"]:
            run(options)
        case ["experiment", name]:
            from lab import experiments  # here: PyTorch takes seconds to import

            progress(options.work, name, **experiments.predict_and_measure(options, name))
        case _:
            raise InputError(
                "give start, check [NAME], hint NAME, answer NAME, status, run or experiment NAME"
            )


if __name__ == "__main__":
    cli(main)
