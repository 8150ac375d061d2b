"""The lab: functions are cut out and put back byte for byte; only a right answer passes."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from tiny import cases, tiny_model

from common.options import InputError
from lab import cutting, experiments, lab
from lab.exercises import EXERCISES
from lab.pictures import PICTURES
from model import NomicBertForMaskedLM

NAMES = [exercise.name for exercise in EXERCISES]


def real(exercise):
    return lab.cut((ROOT / exercise.file).read_text(), exercise.function)


def by_name(name):
    return EXERCISES[NAMES.index(name)]


@pytest.fixture
def work(tmp_path, capsys):
    """A student's folder. Calling it runs a command there and returns what it prints."""

    def command(*arguments):
        capsys.readouterr()
        try:
            lab.main([*arguments, f"--work={tmp_path}/work"])
        except SystemExit:
            pass
        return capsys.readouterr().out

    command.path = tmp_path / "work"
    command("start")
    return command


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_a_function_is_cut_out_and_put_back_byte_for_byte(exercise):
    text = (ROOT / exercise.file).read_text()
    assert cutting.splice(text, exercise.function, real(exercise)) == text
    stub = lab.stub(exercise)
    assert "raise NotImplementedError" in stub and exercise.hidden not in stub
    assert sum(exercise.hidden in line for line in real(exercise).splitlines()) == 1
    assert len(exercise.wrong) >= 3


@pytest.mark.parametrize("name", ["ndcg", "gather_backward"])
def test_the_right_answer_passes_and_is_the_one_that_was_tested(name, work):
    (work.path / f"{name}.py").write_text("import math\n\n\n" + real(by_name(name)))
    assert f"{name}: right" in work("check", name)
    assert json.loads(work("status", "--json"))["exercises"][name]["state"] == "done"
    (work.path / f"{name}.py").write_text(real(by_name(name)) + "    # changed\n")
    assert f"{name}: right" not in work("status")


JUDGE = """
import importlib, sys
import pytest
from lab import lab

for exercise in lab.EXERCISES:
    module = importlib.import_module(exercise.file.removesuffix(".py"))
    function = lab.cut((lab.ROOT / exercise.file).read_text(), exercise.function)
    real = module
    for part in exercise.function.split("."):
        real = getattr(real, part)
    paths = [f"tests/{test}" for test in exercise.tests]
    for number, (old, new) in enumerate((("", ""), *exercise.wrong)):
        assert old in function, (exercise.name, old)
        edited = new.join(function.rsplit(old, 1)) if old else function  # not the docstring
        names = dict(vars(module))
        exec(edited.removeprefix("@staticmethod"), names)
        real.__code__ = names[exercise.function.split(".")[-1]].__code__
        observer = lab.Observer()
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", *paths], plugins=[observer])
        print(f"verdict {exercise.name} {observer.failure is None} {observer.passed} {number}")
    exec(function.removeprefix("@staticmethod"), names)
    real.__code__ = names[exercise.function.split(".")[-1]].__code__
"""


def test_of_each_exercise_the_right_answer_passes_and_every_wrong_one_fails():
    """In one process, by exchanging the code of the functions."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a test forks
    settings = {"cwd": ROOT, "capture_output": True, "text": True, "env": environment}
    result = subprocess.run([sys.executable, "-c", JUDGE], **settings)
    verdicts = re.findall(r"^verdict (\w+) (\w+) (\d+) (\d+)$", result.stdout, re.M)
    assert len(verdicts) == sum(1 + len(e.wrong) for e in EXERCISES), result.stderr[-2000:]
    for name, passed, tests, number in verdicts:
        edits = ("the right answer", *by_name(name).wrong)
        assert (passed == "True") == (number == "0"), (name, edits[int(number)])
        assert passed == "False" or int(tests) >= len(by_name(name).tests)


def test_a_verdict_shows_the_values_and_the_line(work):
    wrong = real(by_name("ndcg")).replace("2 + i", "3 + i")
    (work.path / "ndcg.py").write_text(wrong)
    shown = work("check", "ndcg")
    assert "ndcg: not yet" in shown and "one relevant document at each rank" in shown
    assert "test_evaluate.py, line" in shown and "assert 0.79" in shown
    assert len(shown.splitlines()) < 20


@pytest.mark.parametrize(
    ("tests", "verdict"),
    [
        (("test_rope.py::test_a_pair_is_turned_by_its_angle",), "did not use your function"),
        (("test_evaluate.py::test_no_such_thing",), "0 of 1 tests ran"),
        (("test_no_such_file.py",), "0 of 1 tests ran"),
    ],
)
def test_nothing_passes_that_was_not_tested(tests, verdict, work):
    """In a process of its own, as judge() does it."""
    exercise = dataclasses.replace(by_name("ndcg"), tests=tests)
    code = f"from lab import lab, exercises; lab.EXERCISES = (exercises.{exercise!r},); "
    code += f"lab.grade(0, {real(exercise)!r})"
    settings = {"cwd": ROOT, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", code], **settings)
    assert verdict in result.stdout.splitlines()[-1]
    assert "ndcg: not begun" in work("check", "ndcg"), "a stub"


def test_an_exercise_that_is_broken_leaves_the_others_alone(work):
    (work.path / "rotate.py").write_text("def rotate(x, cos, sin:\n    return x\n")
    (work.path / "ndcg.py").write_text(real(by_name("ndcg")))
    assert "ndcg: right" in work("check", "ndcg")
    with pytest.raises(InputError, match="rotate.py, line 1: "):
        work("check", "rotate")
    (work.path / "rotate.py").write_text("def turn(x, cos, sin):\n    return x\n")
    with pytest.raises(InputError, match="there is no rotate in it"):
        work("check", "rotate")


@cases(
    ("words", "message"),
    [
        (("check", "11"), "name an exercise: mask_tokens, rotate"),
        (("hint",), "hint: name an exercise"),
        (("show", "grad_cache"), "grad_cache has no picture; these have: mask_tokens"),
        (("solve", "rotate"), "solve: give start, status, run, check, hint, show, answer"),
        (("start", "rotate"), "start: give start, status"),
        (("experiment",), "give one of rope, few-pairs, stage-2, gather, hard-negatives"),
        (("experiment", "rope", "--predict=0.1", "--out=nowhere"), "nowhere/mlm is missing"),
        (("check", "mean_pool"), "mean_pool.py cannot be read: .*utf-8"),
        (("check", "info_nce"), "info_nce.py is missing: python lab/lab.py start"),
        (("status", "--colour"), "--colour is not an option"),
    ],
)
def test_a_wrong_command_is_one_line_that_says_what_to_do(words, message, work):
    (work.path / "mean_pool.py").write_bytes(b"def mean_pool(): \xff\n")
    (work.path / "info_nce.py").unlink()
    with pytest.raises(InputError, match=message):
        work(*words)


def test_starting_again_keeps_what_was_written(work):
    (work.path / "rotate.py").write_text("mine")
    (work.path / "ndcg.py").unlink()
    work("start")
    assert (work.path / "rotate.py").read_text() == "mine"
    assert (work.path / "ndcg.py").read_text() == lab.stub(by_name("ndcg"))


def test_hints_come_one_after_the_other(work):
    exercise = by_name("rotate")
    hints = [work("hint", "rotate") for _ in range(4)]
    assert hints[0].strip() == exercise.idea and hints[1].strip() == exercise.shapes
    assert hints[2] == hints[3] and "..." in hints[2] and exercise.hidden not in hints[2]
    assert work("answer", "2") == real(exercise)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_shows_what_is_there_be_it_right_wrong_or_nothing(name, work):
    exercise, sizes = by_name(name), set()
    for function in (lab.stub(exercise), real(exercise).replace(*exercise.wrong[0])):
        (work.path / f"{name}.py").write_text(function)
        assert "wrote" in work("show", name)
        sizes.add((work.path / f"{name}.png").stat().st_size)
    assert len(sizes) == 2


def test_a_prediction_is_compared_with_what_is_measured(data, data_tokenizer, tmp_path, work):
    """Dynamic NTK against plain RoPE in a model that learned nothing: it cannot be told."""
    model = tiny_model(data_tokenizer, NomicBertForMaskedLM, trained_length=16)
    for stage in ("mlm", "contrastive"):
        model.save_pretrained(tmp_path / "out" / stage)
    given = (f"--out={tmp_path}/out", f"--data={data}")
    shown = work("experiment", "rope", "--predict=0.5", *given)
    assert "you predicted +0.500: outside" in shown and "cannot be told" in shown
    record = json.loads(work("status", "--json"))["experiments"]["experiment rope"]
    assert record["predicted"] == 0.5 and abs(record["mean"]) < 0.05
    for words, message in (("rope",), "predict first"), (("ropes",), "give one of rope, few-pairs"):
        with pytest.raises(InputError, match=message):
            work("experiment", *words, *given)


@pytest.mark.parametrize(
    ("predicted", "mean", "verdict"),
    [(0.1, 0.12, "inside"), (-0.1, 0.12, "outside"), (0.02, 0.03, "inside .* cannot be told")],
)
def test_a_prediction_is_judged_at_two_standard_errors(predicted, mean, verdict):
    found = experiments.verdict_on(predicted, {"mean": mean, "error": 0.02})
    assert re.match(verdict, found)
    assert ("told" in found) == (abs(mean) < 0.04)
