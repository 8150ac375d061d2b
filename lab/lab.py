"""The lab: you write the functions that are Nomic Embed, and the project's own tests judge them.

    python lab/lab.py start               # lab/work/ gets a file for each exercise
    python lab/lab.py check rotate        # the tests, with your function in place of the real one
    python lab/lab.py check               # of all exercises; --verbose: all that pytest prints
    python lab/lab.py hint rotate         # the idea; again: the shapes; again: all but one line
    python lab/lab.py answer rotate       # the real function
    python lab/lab.py status              # what the last checks said; --json for a script
    python lab/lab.py run                 # trains with your functions, and searches
    python lab/lab.py experiment rope --predict=0.1     # predict a difference, then measure it
    python lab/lab.py grade DIR > marks.csv     # DIR has a copy of lab/work for each student

The real files are the solutions: a function is found by its name, cut out, and replaced in a copy
of the project. Your files in lab/work/ are never overwritten. A teacher's guide is in
lab/INSTRUCTOR.md.
"""

import csv
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.files import fingerprint, read_json, write_json, write_text
from common.options import InputError, cli, read_options, split_words
from lab.cutting import copy_project, real, written
from lab.exercises import EXERCISES, stub

SECONDS = 60  # that the tests of an exercise may take; more is a loop without end
STATES = {"right": "done", "not begun": "open"}  # by what is said of a function; others: tried


@dataclass
class Options:
    work: str = "lab/work"  # where the student's files are
    out: str = "out"  # the checkpoints of the demo, for experiments
    data: str = "out/pydocs"  # the data folder of run and of experiments
    predict: float = None  # of experiment: the difference that you expect [-1, 1]
    seed: int = 0  # of experiment [0, 1e9]
    verbose: bool = False  # of check: all that pytest prints
    json: bool = False  # of status


def progress(work, name=None, **news):
    """What is remembered: exercise -> {"hints": how many were given, "checked": fingerprint of the
    function that was checked last, "result": what was said of it}; experiment -> the prediction and
    what was measured. With a name, adds the news to it. Raises InputError for a damaged file."""
    path = Path(work, "progress.json")
    try:
        record = read_json(path) if path.is_file() else {}
        damaged = {row.get("hints", 0) for row in record.values()} - {0, 1, 2, 3}
    except (InputError, AttributeError, TypeError, RecursionError):
        damaged = True
    if damaged:
        raise InputError(f"{path} is damaged: delete it and check again; your functions stay")
    if name:
        record[name] = record.get(name, {}) | news
        write_json(path, record)
    return record


def judge(exercise, function):
    """Runs the tests in a copy of the project with this function in it. Returns "right" if every
    one of them ran and passed, else what the student should read; and all that pytest printed."""
    if find_spec("pytest") is None:
        raise InputError("checks need pytest: make lab installs it, or pip install pytest")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short", "--junitxml=report.xml"]
    command += [f"tests/test_{exercise.file}::{test}" for test in exercise.tests]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "timeout": SECONDS}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy_project(folder, {exercise: function})
        try:
            output = subprocess.run(command, cwd=folder, **settings).stdout.decode(errors="replace")
            cases = ElementTree.parse(Path(folder, "report.xml")).findall(".//testcase")
        except subprocess.TimeoutExpired:
            return f"no answer after {SECONDS} seconds: a loop without end?", ""
        except (OSError, ElementTree.ParseError):  # pytest did not come to its end
            cases = []
    for case in cases:
        for problem in case:  # a failure, an error, or the reason why it was skipped
            return feedback(exercise, case.get("name"), problem.text or ""), output
    if len(cases) < sum(exercise.tests.values()):
        return "not all tests were run: does your function end the program?", output
    return "right", output


def feedback(exercise, test, traceback):
    """What failed, in two lines: the claim; the line of the student's function, or the numbers."""
    function = exercise.function.split(".")[-1]
    lines = re.findall(rf"^{exercise.file}:\d+: in {function}\n +(.*)", traceback, re.M)
    where = f"in your line `{lines[-1]}`: " if lines else ""
    reasons = [line for line in re.findall("^E +(.*)", traceback, re.M) if line[:2] != "+ "]
    reason = " ".join(reasons) or "the test was skipped"
    reason = reason[-250:] if "Traceback" in reason else reason[:250]  # of another process: its end
    claim = f"{exercise.file} with your function can be imported"
    if test.startswith("test_"):
        claim = test.removeprefix("test_").replace("_", " ")
    return f"not yet: {claim}\n    {where}{reason}"


def start(options):
    for exercise in EXERCISES:
        path = Path(options.work, f"{exercise.name}.py")
        if not path.exists():
            write_text(path, stub(exercise))
    print(f"{options.work} has {len(EXERCISES)} files: begin with mask_tokens.py")


def check(options, exercise):
    """Judges the student's function and remembers the result. Returns whether it is right."""
    function, result = written(exercise, options.work)
    output = ""
    if function:
        result, output = judge(exercise, function)
        checked = fingerprint(function.encode())
        progress(options.work, exercise.name, checked=checked, result=result)
    print(f"{exercise.name}: {result}", *([output] if options.verbose else []), flush=True)
    return result == "right"


def hint(options, exercise):
    but_one = [
        f"{line[: len(line) - len(line.lstrip())]}..." if exercise.hidden in line else line
        for line in real(exercise).splitlines()
    ]
    hints = int(progress(options.work).get(exercise.name, {}).get("hints", 0))
    print((exercise.idea, exercise.shapes, "\n".join(but_one))[min(hints, 2)])
    progress(options.work, exercise.name, hints=min(hints + 1, 3))


def state_of(options, exercise):
    """open, tried or done; and what the last check said of the function as it is now."""
    function, result = written(exercise, options.work)
    row = progress(options.work).get(exercise.name, {})
    if function:
        same = row.get("checked") == fingerprint(function.encode())
        result = str(row.get("result")) if same else "not checked as it is now"
    return STATES.get(result, "tried"), result


def status(options):
    record, rows = progress(options.work), {}
    for exercise in EXERCISES:
        state, result = state_of(options, exercise)
        hints = record.get(exercise.name, {}).get("hints", 0)
        rows[exercise.name] = {"state": state, "hints": hints, "result": result}
        if not options.json:
            first, _, _ = result.partition("\n")
            print(f"{exercise.name:22}{state:7}{hints} hints  {first}")
    if options.json:
        experiments = {name: row for name, row in record.items() if "predicted" in row}
        print(json.dumps({"exercises": rows, "experiments": experiments}))


def grade(folder):
    """Prints a table of all students, each with a copy of lab/work in `folder`. Nothing of that is
    used but the functions, each in a process of its own with a time limit; hints and predictions
    are what the student's progress.json says."""
    students = sorted(path for path in Path(folder).glob("*") if path.is_dir())
    if not students:
        raise InputError(f"{folder} has no folders: put a copy of lab/work there for each student")
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(("student", "exercise", "state", "hints", "seconds", "predictions"))
    for student in students:
        if not any(student.glob("*.py")):
            print(f"{student} has no files of lab/work: are they deeper down?", file=sys.stderr)
        try:
            record = progress(student)
        except InputError as error:
            record = {}
            print(error, file=sys.stderr)
        predictions = " ".join(
            f"{name}={row['predicted']:+.3f}"
            for name, row in record.items()
            if name.replace("-", "").isalnum() and isinstance(row.get("predicted"), float)
        )
        for exercise in EXERCISES:
            began = time.perf_counter()
            function, result = written(exercise, student)
            if function:
                result, _ = judge(exercise, function)
            seconds = f"{time.perf_counter() - began:.1f}"
            hints = record.get(exercise.name, {}).get("hints", 0)
            state = STATES.get(result, "tried")
            table.writerow((student.name, exercise.name, state, hints, seconds, predictions))
            sys.stdout.flush()


def run(options):
    """Trains stages 1 and 2 for a few steps with all of the student's functions that pass, and
    searches. Each run has a folder of its own."""
    passed = [e for e in EXERCISES if state_of(options, e)[0] == "done"]
    theirs = {exercise: written(exercise, options.work)[0] for exercise in passed}
    print("yours:", ", ".join(exercise.name for exercise in theirs) or "none yet")
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=options.work)).resolve()
    copy_project(folder, theirs)
    commands = (  # 60 steps of stage 1 show that its loss falls; they are too few to start from
        ["mlm.py", "--steps=60", "--warmup=6", "--eval-every=0"],
        ["contrastive.py", "--steps=40", "--num-hidden-layers=1", "--batch-size=256", "--lr=3e-3"],
        ["evaluate.py", "search", "how do I read a csv file", "--documents=3000"],
    )
    for number, command in enumerate(commands, start=1):
        print(f"\n{number} of {len(commands)}: python {shlex.join(command)}", flush=True)
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
    if words[:1] not in (["start"], ["answer"], ["grade"]) and not Path(options.work).is_dir():
        raise InputError(f"{options.work} is missing: python lab/lab.py start makes it")
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
        case ["grade", folder]:
            grade(folder)
        case ["experiment", name]:
            from lab import experiments  # here: PyTorch takes seconds to import

            progress(options.work, name, **experiments.predict_and_measure(options, name))
        case _:
            raise InputError(
                "give start, check [NAME], hint NAME, answer NAME, status, run, grade DIR or "
                "experiment NAME"
            )


if __name__ == "__main__":
    cli(main)
