"""The lab: functions are cut out and put back byte for byte; only a right answer passes."""

import csv
import importlib
import inspect
import json
import operator
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tiny import cases, refused, tiny_model

from common import plots
from lab import cutting, experiments, lab
from lab.exercises import EXERCISES, stub
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
    command.write = lambda name, text: (command.path / f"{name}.py").write_text(text)
    command.row = lambda name: json.loads(command("status", "--json"))["exercises"][name]
    command("start")
    return command


@pytest.mark.parametrize("exercise", EXERCISES, ids=BY_NAME)
def test_a_function_is_cut_out_and_put_back_byte_for_byte(exercise):
    text, real = (ROOT / exercise.file).read_text(encoding="utf-8"), cutting.real(exercise)
    assert cutting.splice(text, exercise.function, real) == text
    begun = stub(exercise)
    assert "raise NotImplementedError" in begun and exercise.hidden not in begun
    assert sum(exercise.hidden in line for line in real.splitlines()) == 1
    assert all(f"\n# {name}(" in begun for name in re.findall(r"(\S+) in ", exercise.helpers))


RIGHT = {  # right answers, written otherwise than the real functions
    "mask_tokens": """
    inputs, chosen = tokens.copy(), np.zeros(len(tokens), bool)
    for i, token in enumerate(tokens):
        if token not in special_ids and rng.random() < probability:
            chosen[i], kind = True, rng.random()
            if kind >= 0.1:
                inputs[i] = mask_id if kind >= 0.2 else rng.integers(vocab_size)
    return inputs, chosen""",
    "rotate": """
    shape = (len(x), *[1] * (x.dim() - 2), -1)
    turned = torch.complex(*x.chunk(2, -1)) * torch.complex(cos.view(shape), sin.view(shape))
    return torch.cat((turned.real, turned.imag), -1)""",
    "mean_pool": """
    texts = hidden.double().split(cu_seqlens.diff().tolist())
    means = torch.stack([text.mean(0) for text in texts])
    return means.to(torch.promote_types(hidden.dtype, torch.float32))""",
    "info_nce": """
    loss = 0.0
    for i, right in enumerate(range(first, first + len(query))):
        scores = torch.einsum("e,me->m", query[i], document) / temperature
        counted = torch.arange(len(document)) == right
        counted |= torch.tensor(True) if keys is None else keys != keys[right]
        loss = loss + scores[counted].logsumexp(0) - scores[right]
    return loss""",
    "ndcg": """
    def dcg(grades):
        return sum(grade / math.log2(rank) for rank, grade in enumerate(grades[:k], start=2))

    grades = [relevant.get(document, 0) for document in ranking]
    return dcg(grades) / dcg(sorted(relevant.values())[::-1])""",
    "dynamic_ntk_base": """
    factor = s * (length / trained_length - 1) + 1
    longer = base * factor ** (head_size / (head_size - 2))
    return torch.where(length > trained_length, longer, base)""",
    "matryoshka_loss": """
    loss = 0.0
    for n in sizes[::-1]:
        q, d = (x[:, :n] / x[:, :n].norm(dim=1, keepdim=True) for x in (query, document))
        loss += info_nce_in_blocks(q, d, temperature, first, keys)
    return loss""",
    "mine_hard_negatives": """
    negatives = torch.full((len(query), count), -1)
    for i in range(len(query)):
        scores = document @ query[i]
        bound = scores[right[i]] - (1 - margin) * abs(scores[right[i]])
        ranking = scores.argsort(descending=True).tolist()
        kept = [j for j in ranking if scores[j] < bound and j not in answers[i]][:count]
        negatives[i, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return negatives""",
    "gather_backward": """
    parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, gradient.contiguous())
    return sum(parts).chunk(len(parts))[dist.get_rank()]""",
    "grad_cache": """
    with torch.no_grad():
        cached = embed(model, texts, micro_batch_tokens)
    cached.requires_grad_()
    (gradient,) = torch.autograd.grad(loss := loss_of(cached), cached)
    for group in reversed(store.split_by_tokens(list(map(len, texts)), micro_batch_tokens)):
        again = embed(model, [texts[i] for i in group], micro_batch_tokens)
        (again * gradient[group]).sum().backward()
    return loss.detach()""",
}


class Passed:
    """A plugin of pytest that counts the tests that pass."""

    count = 0

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "call" and report.passed


@pytest.mark.parametrize("exercise", EXERCISES, ids=BY_NAME)
def test_right_answers_pass_and_every_wrong_one_fails(exercise, monkeypatch):
    """In this process, which is faster than a copy: the function gets the code of another one."""
    torch.set_num_threads(1)  # a test forks, and threads do not survive that
    module, real = importlib.import_module(exercise.file[:-3]), cutting.real(exercise)
    function = operator.attrgetter(exercise.function)(module)
    tests = [f"{ROOT}/tests/test_{exercise.file}::{test}" for test in exercise.tests]
    another = f"def {function.__name__}{inspect.signature(function)}:{RIGHT[exercise.name]}\n"
    wrong = [new.join(real.rsplit(old, 1)) for old, new in exercise.wrong]  # not in the docstring
    assert len({real, another, *wrong}) == 2 + len(wrong), "each edit changes the function"
    for text in (another, *wrong):  # the real one passes in the test's own file
        names, passed = dict(vars(module)), Passed()
        exec(text.removeprefix("@staticmethod"), names)
        with monkeypatch.context() as patch:
            patch.setattr(function, "__code__", names[function.__name__].__code__)
            result = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[passed])
        if text in wrong:
            assert result == pytest.ExitCode.TESTS_FAILED, text
        else:
            assert passed.count == sum(exercise.tests.values()), text
            assert result == pytest.ExitCode.OK, text


def test_only_the_function_that_passed_last_is_done(work):
    right = cutting.real(BY_NAME["ndcg"])
    assert work.row("ndcg")["state"] == "open"
    work.write("ndcg", f"import math\n\n\n{right}    raise NotImplementedError\n")
    assert work.row("ndcg")["result"] == "not checked as it is now"
    assert "ndcg: right" in work("check", "ndcg") and work.row("ndcg")["state"] == "done"
    work.write("ndcg", right.replace("2 + i", "3 + i"))
    assert work.row("ndcg")["state"] == "tried"
    shown = work("check", "ndcg", "--verbose")
    assert "FAILED tests/test_metrics.py" in shown
    claim, reason, *_ = shown.splitlines()
    assert claim == "ndcg: not yet: one relevant document at each rank"
    assert re.match(r" +assert 0\.79.* == 0\.63.*Obtained: 0\.79.* Expected: 0\.63", reason)
    assert work.row("ndcg")["result"] in shown and work.row("ndcg")["state"] == "tried"
    work.write("ndcg", right)
    assert work.row("ndcg")["state"] == "tried", "until it is checked again"


@cases(
    "body, message",
    ("print('3 passed'); import os; os._exit(0)", "not all tests were run"),
    ("import pytest; pytest.exit('3 passed', returncode=0)", "not all tests were run"),
    ("import pytest; pytest.skip('3 passed')", "was skipped"),
    ("return undefined", "`return undefined"),
    ("while True: pass", "no answer after 1 seconds"),
)
def test_a_function_that_stops_the_tests_is_not_right(work, monkeypatch, body, message):
    if "while" in body:
        monkeypatch.setattr(lab, "SECONDS", 1)
    work.write("ndcg", f"def ndcg(ranking, relevant, k=10):\n    {body}\n")
    assert message in work("check", "ndcg") and work.row("ndcg")["state"] == "tried"


def test_without_pytest_nothing_is_judged(work, monkeypatch):
    work.write("ndcg", cutting.real(BY_NAME["ndcg"]))
    monkeypatch.setattr(lab, "find_spec", lambda _: None)
    with refused("checks need pytest: make lab installs it, or pip install pytest"):
        work("check", "ndcg")
    assert work.row("ndcg")["result"] == "not checked as it is now"


def test_a_file_that_cannot_be_read_is_a_line_and_the_others_are_checked(work):
    contents = {
        b"def mask_tokens(x:\n    pass\n": "line 1",
        b"def turn(x):\n    pass\n": "no function rotate",
        b"def mean_pool(): \xff\n": "utf-8",
        b"#" * 200_000: "more than 20,000 bytes",
        b"x = " + b"(" * 9000: "nested",
    }
    for name, content in zip(BY_NAME, contents, strict=False):
        (work.path / f"{name}.py").write_bytes(content)
    lines = work("check").splitlines()
    for line, message in zip(lines, contents.values(), strict=False):
        assert f"{work.path}/" in line and message in line
    assert [line.split(": ")[1] for line in lines[5:]] == ["not begun"] * (len(EXERCISES) - 5)


@cases(
    "words, message",
    (("check", "11"), "the exercises are mask_tokens, rotate"),
    (("hint",), "give start, check"),
    (("experiment", "ropes"), "the experiments are rope, few-pairs, stage-2, hard-negatives"),
    (("experiment", "rope"), "predict first"),
    (("experiment", "rope", "--predict=0.1", "--out=nowhere"), "nowhere/mlm"),
    (("grade", "nowhere"), "nowhere has no folders: put a copy of lab/work there"),
)
def test_a_wrong_command_is_one_line_that_says_what_to_do(words, message, work):
    with refused(message):
        work(*words)


@cases("record", "[]", '{"a": 1}', '{"a": {"hints": [2]}}', '{"a":' * 9999, None)
def test_a_damaged_record_or_a_missing_folder_is_one_line(record, work):
    if record is None:
        shutil.rmtree(work.path)
    else:
        (work.path / "progress.json").write_text(record)
    for words in (("status",), ("hint", "rotate"), ("run",)):
        with refused("json is damaged: delete it|missing: .*lab.py start"):
            work(*words)


def test_a_class_is_graded_by_its_functions_alone(work, tmp_path, monkeypatch):
    monkeypatch.setattr(lab, "judge", lambda _, text: ("right" if "2 + i" in text else "no", ""))
    prediction = {"predicted": 0.1}
    of_ann = {"ndcg": {"hints": 2}, "rope": prediction, "=1+1": prediction}
    for student, record, function in (
        ("ann", of_ann, cutting.real(BY_NAME["ndcg"])),
        ("bob", {"ndcg": {"result": "right"}}, "def ndcg(*_): return 1\n"),
        ("eve", "damaged", stub(BY_NAME["ndcg"])),
    ):
        folder = shutil.copytree(work.path, tmp_path / "class" / student)
        (folder / "progress.json").write_text(json.dumps(record))
        (folder / "ndcg.py").write_text(function)
    (tmp_path / "class" / "zip" / "work").mkdir(parents=True)
    rows = list(csv.DictReader(work("grade", f"{tmp_path}/class").splitlines()))
    assert [row["student"] for row in rows[:: len(EXERCISES)]] == ["ann", "bob", "eve", "zip"]
    graded = [(r["state"], r["hints"]) for r in rows if r["exercise"] == "ndcg"]
    assert graded == [("done", "2"), ("tried", "0"), ("open", "0"), ("open", "0")]
    assert rows[0]["predictions"] == "rope=+0.100" and float(rows[0]["seconds"]) >= 0


def test_there_is_a_slide_for_each_part_and_what_slides_name_exists():
    text, guide = ((ROOT / f"lab/{n}.md").read_text("utf-8") for n in ("slides", "INSTRUCTOR"))
    assert len(text.split("\n---\n")) == len(re.findall(r"^\| \d+-\d+ \|", guide, re.M))
    assert set(list(BY_NAME)[:5]) <= set(re.findall(r"^# .*`(\w+)`$", text, re.M))
    code = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    assert all(f"def {name}(" in code for name in re.findall(r"`(\w+)`", text))
    for path in map(Path, re.findall(r"[\w./]+\.(?:py|png)", text)):
        made = path.stem in BY_NAME or hasattr(plots, f"draw_{path.stem}")
        assert made or (ROOT / path).is_file() or (ROOT / "lab" / path).is_file(), path


def test_starting_again_keeps_what_was_written(work):
    work.write("rotate", "mine")
    (work.path / "ndcg.py").unlink()
    work("start")
    texts = [(work.path / f"{name}.py").read_text() for name in ("rotate", "ndcg")]
    assert texts == ["mine", stub(BY_NAME["ndcg"])]


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
    options = (f"--out={tmp_path}/out", f"--data={data}", "--predict=0.5")
    shown = work("experiment", "rope", *options)
    assert "rope reads each long held-out text" in shown.splitlines()[1]
    assert "you predicted +0.500: outside" in shown and "cannot be told" in shown
    record = json.loads(work("status", "--json"))["experiments"]["rope"]
    assert record["predicted"] == 0.5 and abs(record["mean"]) < 0.05
    for predicted, mean, verdict in ((0.1, 0.12, "in"), (-0.1, 0.12, "out"), (0.02, 0.03, "in")):
        shown = experiments.verdict_on(predicted, {"mean": mean, "error": 0.02})
        assert shown.startswith(f"{verdict}side") and ("cannot be told" in shown) == (mean < 0.04)
