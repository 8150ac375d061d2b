"""The lab: functions are cut out and put back byte for byte; only a right answer passes."""

import importlib
import json
import operator
import re

import pytest
import torch
from conftest import ROOT
from tiny import cases, tiny_model

from common.options import InputError
from lab import cutting, experiments, lab
from lab.exercises import EXERCISES
from model import NomicBertForMaskedLM

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}


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


@pytest.mark.parametrize("exercise", EXERCISES, ids=BY_NAME)
def test_a_function_is_cut_out_and_put_back_byte_for_byte(exercise):
    text, real = (ROOT / exercise.file).read_text(), cutting.real(exercise)
    assert cutting.splice(text, exercise.function, real) == text
    stub = cutting.stub(exercise)
    assert "raise NotImplementedError" in stub and exercise.hidden not in stub
    assert sum(exercise.hidden in line for line in real.splitlines()) == 1


@pytest.mark.parametrize("exercise", EXERCISES, ids=BY_NAME)
def test_the_right_answer_passes_and_every_wrong_one_fails(exercise, monkeypatch):
    """In this process, which is faster than a copy: the function gets the code of another one."""
    torch.set_num_threads(1)  # a test forks, and threads do not survive that
    module, text = importlib.import_module(exercise.file[:-3]), cutting.real(exercise)
    function = operator.attrgetter(exercise.function)(module)
    tests = [f"{ROOT}/tests/test_{exercise.file}::{test}" for test in exercise.tests]
    for old, new in (("", ""), *exercise.wrong):
        edited = new.join(text.rsplit(old, 1)) if old else text  # the code, not the docstring
        assert old in text
        names = dict(vars(module))
        exec(edited.removeprefix("@staticmethod"), names)
        with monkeypatch.context() as patch:
            patch.setattr(function, "__code__", names[function.__name__].__code__)
            result = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        assert result == (pytest.ExitCode.TESTS_FAILED if old else pytest.ExitCode.OK), (old, new)


def test_only_the_function_that_passed_is_done(work):
    path, right = work.path / "ndcg.py", cutting.real(BY_NAME["ndcg"])
    (work.path / "rotate.py").write_text("def rotate(x, cos, sin:\n    return x\n")  # broken

    def state():
        return json.loads(work("status", "--json"))["exercises"]["ndcg"]["state"]

    assert state() == "open"
    path.write_text("import math\n\n\n" + right)
    assert state() == "tried"
    assert "ndcg: right" in work("check", "ndcg") and state() == "done"
    path.write_text(right.replace("2 + i", "3 + i"))
    shown = work("check", "ndcg")
    assert "ndcg: not yet" in shown and "test_one_relevant_document_at_each_rank" in shown
    assert "tests/test_evaluate.py:" in shown and re.search(r"assert 0\.79\d* ==", shown)
    assert state() == "tried"


def test_a_loop_without_end_is_stopped(work, monkeypatch):
    monkeypatch.setattr(lab, "SECONDS", 1)
    (work.path / "ndcg.py").write_text("def ndcg(ranking, relevant, k=10):\n    while True: pass\n")
    assert "no answer after 1 seconds" in work("check", "ndcg")


def test_a_file_that_cannot_be_read_is_a_line_and_the_others_are_checked(work):
    for name, content in {
        "mask_tokens": b"def mask_tokens(x:\n    pass\n",
        "rotate": b"def turn(x):\n    pass\n",
        "mean_pool": b"def mean_pool(): \xff\n",
    }.items():
        (work.path / f"{name}.py").write_bytes(content)
    lines = work("check").splitlines()
    assert len(lines) == len(EXERCISES)
    for line, expected in zip(lines, ("line 1", "no function rotate", "utf-8"), strict=False):
        assert f"{work.path}/" in line and expected in line
    assert all(line.endswith(": not begun") for line in lines[3:])


@cases(
    ("words", "message"),
    [
        (("check", "11"), "the exercises are mask_tokens, rotate"),
        (("hint",), "give start, check"),
        (("solve", "rotate"), "give start, check"),
        (("start", "rotate"), "give start, check"),
        (("experiment", "ropes"), "the experiments are rope, few-pairs, stage-2, hard-negatives"),
        (("experiment", "rope"), "predict first"),
        (("experiment", "rope", "--predict=0.1", "--out=nowhere"), "nowhere/mlm"),
        (("status", "--colour"), "--colour is not an option"),
    ],
)
def test_a_wrong_command_is_one_line_that_says_what_to_do(words, message, work):
    with pytest.raises(InputError, match=message):
        work(*words)


def test_starting_again_keeps_what_was_written(work):
    (work.path / "rotate.py").write_text("mine")
    (work.path / "ndcg.py").unlink()
    work("start")
    assert (work.path / "rotate.py").read_text() == "mine"
    assert (work.path / "ndcg.py").read_text() == cutting.stub(BY_NAME["ndcg"])


def test_hints_come_one_after_the_other(work):
    exercise = BY_NAME["rotate"]
    hints = [work("hint", "rotate") for _ in range(4)]
    assert hints[0].strip() == exercise.idea and hints[1].strip() == exercise.shapes
    assert hints[2] == hints[3] and "..." in hints[2] and exercise.hidden not in hints[2]
    assert work("answer", "rotate") == cutting.real(exercise)


def test_a_prediction_is_compared_with_what_is_measured(data, data_tokenizer, tmp_path, work):
    """Dynamic NTK against plain RoPE in a model that learned nothing: it cannot be told."""
    model = tiny_model(data_tokenizer, NomicBertForMaskedLM, trained_length=16)
    model.save_pretrained(tmp_path / "out" / "mlm")
    given = (f"--out={tmp_path}/out", f"--data={data}", "--predict=0.5")
    shown = work("experiment", "rope", *given)
    assert "you predicted +0.500: outside" in shown and "cannot be told" in shown
    record = json.loads(work("status", "--json"))["experiments"]["rope"]
    assert record["predicted"] == 0.5 and abs(record["mean"]) < 0.05


@pytest.mark.parametrize(
    ("predicted", "mean", "verdict"),
    [(0.1, 0.12, "inside"), (-0.1, 0.12, "outside"), (0.02, 0.03, "inside .* cannot be told")],
)
def test_a_prediction_is_judged_at_two_standard_errors(predicted, mean, verdict):
    found = experiments.verdict_on(predicted, {"mean": mean, "error": 0.02})
    assert re.match(verdict, found)
    assert ("told" in found) == (abs(mean) < 0.04)
