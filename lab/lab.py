"""The lab: you write the functions that are Nomic Embed, and the project's own tests judge them.

    python lab/lab.py start               # lab/work/ gets a file for each exercise
    python lab/lab.py check rotate        # the tests, with your function in place of the real one
    python lab/lab.py hint rotate         # the idea, then the shapes, then all but one line
    python lab/lab.py show rotate         # a picture: what it should do, and what yours does
    python lab/lab.py answer rotate       # the real function
    python lab/lab.py status              # what is done; --json for a script
    python lab/lab.py run                 # trains with your functions, and searches
    python lab/lab.py experiment few-pairs --predict=0.1     # predict a difference, then measure it

An exercise may be named by its number, and check without a name checks all. The real files are the
solutions: a function is found by its name, cut out, and replaced in a copy of the project; your
files in lab/work/ are never overwritten. A teacher's guide is in lab/INSTRUCTOR.md.
"""

import inspect
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.files import fingerprint, read_json, write_json, write_text
from common.options import InputError, cli, read_options, split_words
from lab.cutting import ROOT, copy_project, cut, stub, written
from lab.exercises import EXERCISES

SECONDS = 60  # that the tests of an exercise may take; more is a loop without end


@dataclass
class Options:
    work: str = "lab/work"  # where the student's files are
    out: str = "out"  # the checkpoints of the demo, for experiments
    data: str = "out/pydocs"  # the data folder of run and of experiments
    predict: str = ""  # of experiment: the difference that you expect, such as 0.05 or -0.1
    seed: int = 0  # of experiment [0, 1e9]
    json: bool = False  # of status


# ------------------------------------------------------------------------------------------------
# Judging


def judge(exercise, function):
    """Runs the tests with a function in place of the real one. Returns None if they pass, else what
    went wrong, in lines for a student."""
    with tempfile.TemporaryDirectory() as folder:
        copy_project(f"{folder}/copy", {exercise: function})
        code = f"from lab import lab; lab.grade({EXERCISES.index(exercise)}, {function!r})"
        environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-c", code]
        try:
            settings = {"cwd": f"{folder}/copy", "env": environment, "timeout": SECONDS}
            result = subprocess.run(arguments, capture_output=True, text=True, **settings)
        except subprocess.TimeoutExpired:
            return f"no answer after {SECONDS} seconds: a loop without end?"
    *_, last = result.stdout.splitlines() or [""]
    if not last.startswith("verdict "):
        return f"the tests did not run: {result.stderr.strip()[-300:]}"
    return json.loads(last.removeprefix("verdict "))


class Observer:
    """Counts the tests that pytest runs and keeps the first failure."""

    passed, failure = 0, None

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed
        self.note(report)

    def pytest_collectreport(self, report):
        self.note(report)

    def note(self, report):
        if report.failed and not self.failure:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else str(report.longrepr)
            lines = [line for line in text.splitlines() if line.strip()][:12]
            where = f"{Path(crash.path).name}, line {crash.lineno}: " if crash else ""
            name = report.nodeid.split("::")[-1].split("[")[0].replace("_", " ")
            self.failure = "\n".join([name, where + lines[0], *lines[1:]])


def grade(number, function):
    """Within the copy: runs the tests of an exercise and prints the verdict. It is a failure, too,
    if no test ran, or if the function that was tested is not the student's."""
    import pytest

    exercise, observer = EXERCISES[number], Observer()
    paths = [f"tests/{test}" for test in exercise.tests]
    pytest.main(["-x", "-q", "-p", "no:cacheprovider", *paths], plugins=[observer])
    verdict, tested = observer.failure, sys.modules.get(exercise.file.removesuffix(".py"))
    for part in exercise.function.split("."):
        tested = getattr(tested, part, None)
    if not verdict and observer.passed < len(exercise.tests):
        verdict = f"{observer.passed} of {len(exercise.tests)} tests ran"
    used = tested and textwrap.dedent(inspect.getsource(tested)).strip()
    if not verdict and used != function.strip():
        verdict = "the tests did not use your function"
    print(f"\nverdict {json.dumps(verdict)}")


# ------------------------------------------------------------------------------------------------
# The commands


def progress(work, name=None, **news):
    """What is known of each exercise: name -> {"hints": given so far, "passed": the fingerprint of
    the function that passed}. With a name, also remembers the news."""
    path = Path(work, "progress.json")
    known = read_json(path) if path.is_file() else {}
    if name:
        known[name] = {**known.get(name, {}), **news}
        write_json(path, known)
    return known


def start(options):
    for exercise in EXERCISES:
        path = Path(options.work, f"{exercise.name}.py")
        if not path.exists():
            write_text(path, stub(exercise))
    print(f"{options.work} has {len(EXERCISES)} files: begin with mask_tokens.py")


def check(options, exercise):
    """Judges one exercise and remembers if it passed. Returns whether it did."""
    if not (function := written(exercise, options.work)):
        print(f"{exercise.name}: not begun; write {options.work}/{exercise.name}.py")
        return False
    problem = judge(exercise, function)
    passed = None if problem else fingerprint(function.encode())
    progress(options.work, exercise.name, passed=passed)
    print(f"{exercise.name}: " + (f"not yet\n{problem}" if problem else "right"), flush=True)
    return not problem


def checked(options, exercise):
    """check, where a file that cannot be read is a failure and the others are judged."""
    try:
        return check(options, exercise)
    except InputError as error:
        print(f"{exercise.name}: {error}")
        return False


def hint(options, exercise):
    real = cut((ROOT / exercise.file).read_text(), exercise.function)
    body = [f"{line[: len(line) - len(line.lstrip())]}..." if exercise.hidden in line else line
            for line in real.splitlines()]  # fmt: skip
    hints = (exercise.idea, exercise.shapes, "\n".join(body))
    given = progress(options.work).get(exercise.name, {}).get("hints", 0)
    print(hints[min(given, 2)])
    progress(options.work, exercise.name, hints=min(given + 1, 3))


def answer(options, exercise):
    print(cut((ROOT / exercise.file).read_text(), exercise.function), end="")


def show(options, exercise):
    from lab.pictures import PICTURES, draw

    if exercise.function not in PICTURES:
        raise InputError(f"{exercise.name} has no picture; these have: {', '.join(PICTURES)}")
    path = Path(options.work, f"{exercise.name}.png")
    draw(exercise, written(exercise, options.work), path)
    print(f"wrote {path}")


def state_of(exercise, work):
    """One of: open, tried, not Python; done, if the function as it is now has passed."""
    try:
        function = written(exercise, work)
    except InputError:
        return "not Python" if Path(work, f"{exercise.name}.py").is_file() else "open"
    passed = progress(work).get(exercise.name, {}).get("passed")
    tried = "tried" if function else "open"
    return "done" if function and passed == fingerprint(function.encode()) else tried


def status(options):
    known = progress(options.work)
    rows = {
        exercise.name: {
            "state": state_of(exercise, options.work),
            "hints": known.get(exercise.name, {}).get("hints", 0),
            "minutes": exercise.minutes,
            "take-home": exercise.home,
        }
        for exercise in EXERCISES
    }
    if options.json:
        experiments = {name: row for name, row in known.items() if "predicted" in row}
        print(json.dumps({"exercises": rows, "experiments": experiments}))
        return
    for number, (name, row) in enumerate(rows.items(), start=1):
        where = "take-home" if row["take-home"] else "in class"
        print(f"{number:3} {name:22}{row['state']:12}{row['minutes']:3} minutes, {where}")


def run(options):
    """Trains stages 1 and 2 for a few steps with all of the student's functions that pass, and
    searches. Each run has a folder of its own."""
    theirs = {e: written(e, options.work) for e in EXERCISES if state_of(e, options.work) == "done"}
    for exercise in EXERCISES:
        whose = "yours" if exercise in theirs else "the real one"
        print(f"{exercise.file} {exercise.function}: {whose}")
    found = [path.name.removeprefix("run-") for path in Path(options.work).glob("run-*")]
    number = 1 + max([int(name) for name in found if name.isdecimal()], default=0)
    folder, data = Path(options.work, f"run-{number}").resolve(), Path(options.data).resolve()
    copy_project(folder, theirs)
    commands = (  # 60 steps of stage 1 show that its loss falls; they are too few to start from
        ["mlm.py", "--steps=60", "--eval-every=0"],
        ["contrastive.py", "--steps=60", "--batch-size=256", "--lr=3e-3", "--eval-every=0"],
        ["evaluate.py", "search", "how do I read a csv file"],
    )
    for command in commands:
        print(f"\npython {' '.join(command)}", flush=True)
        if subprocess.run([sys.executable, *command, f"--data={data}"], cwd=folder).returncode:
            raise InputError(f"{command[0]} stopped, in {folder}: the reason is above")
    print(f"\nall of it is in {folder}; search there again with another question")


def main(arguments):
    words, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    command, *words = words or ["status"]
    if command == "experiment":
        from lab import experiments

        if found := experiments.run(options, words):
            progress(options.work, f"experiment {words[0]}", **found)
        return
    alone = {"start": start, "status": status, "run": run}
    if command in alone and not words:
        alone[command](options)
        return
    names = {str(i): e for i, e in enumerate(EXERCISES, 1)} | {e.name: e for e in EXERCISES}
    commands = {"check": check, "hint": hint, "show": show, "answer": answer}
    if command not in commands or len(words) > 1:
        raise InputError(f"{command}: give {', '.join([*alone, *commands, 'experiment'])}")
    if not words and command == "check":
        begun = [e for e in EXERCISES if state_of(e, options.work) != "open"]
        if not all([checked(options, exercise) for exercise in begun]):
            sys.exit(1)
    elif not words or words[0] not in names:
        raise InputError(f"{command}: name an exercise: {', '.join(e.name for e in EXERCISES)}")
    elif commands[command](options, names[words[0]]) is False:
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
