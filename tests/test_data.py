"""The data folder: what is held out stays out, and batches are a function of (seed, step)."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from data import docstrings, prepare, pydocs
from data.prepare import NearDuplicates, split_of
from data.store import PairBatches, Sequences, Source, open_sources, shuffled
from options import InputError


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


# ------------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("n", [1, 2, 3, 100, 1000, 4096, 4097])
def test_a_shuffle_is_a_permutation_that_depends_on_the_seed(n):
    order = shuffled(np.arange(n), n, [0, 1])
    assert sorted(order) == list(range(n))
    if n >= 100:
        assert np.array_equal(shuffled(np.arange(50), n, [0, 1]), order[:50]), "any part at a time"
        assert not np.array_equal(order, shuffled(np.arange(n), n, [0, 2]))
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.3


def test_a_shuffle_of_235_million_rows_needs_no_list_of_them():
    rows = shuffled(np.arange(16_384), 234_553_344, 0)
    assert len(np.unique(rows)) == 16_384 and rows.max() < 234_553_344


def test_a_batch_comes_from_one_source_and_an_epoch_has_every_row_once(data, data_tokenizer):
    sources = open_sources(data / "stage2", data_tokenizer)
    batches = PairBatches(sources, 16, seed=3)
    epoch = len(batches.source_of)
    seen = {source.name: [] for source in sources}
    for step in range(epoch):
        source, rows = batches.at(step)
        assert len(rows) == 16
        seen[source.name] += list(rows)
    for source in sources:
        assert len(seen[source.name]) == len(source) // 16 * 16
        assert len(set(seen[source.name])) == len(seen[source.name])
    again = [
        (source.name, rows.tolist()) for source, rows in map(batches.at, range(epoch, 2 * epoch))
    ]
    first = [(source.name, rows.tolist()) for source, rows in map(batches.at, range(epoch))]
    assert again != first, "the next epoch has another order"


def test_batches_are_a_function_of_seed_and_step(data, data_tokenizer):
    sources = open_sources(data / "stage2", data_tokenizer)
    one, other = PairBatches(sources, 16, seed=3), PairBatches(sources, 16, seed=3)
    for step in (17, 3, 17):  # in any order, after any history
        assert np.array_equal(one.at(step)[1], other.at(step)[1])
    assert any(
        not np.array_equal(one.at(s)[1], PairBatches(sources, 16, seed=4).at(s)[1])
        for s in range(5)
    )


def test_sequences_are_full_and_an_epoch_has_each_once(data, data_tokenizer):
    sequences = Sequences(data / "stage1" / "train", data_tokenizer, 64)
    assert all(len(sequences[i]) == 64 for i in range(0, len(sequences), 50))
    steps = len(sequences) // 8 + 1
    rows = np.concatenate([sequences.rows(step, 8, seed=0) for step in range(steps)])
    assert sorted(rows[: len(sequences)]) == list(range(len(sequences)))
    joined = np.concatenate([sequences[i] for i in range(20)])
    assert np.array_equal(joined, sequences.tokens[: 20 * 64]), "texts run on from one to the next"


def test_a_batch_larger_than_every_source_is_an_error(data, data_tokenizer):
    with pytest.raises(InputError, match="--batch-size=1000000: the largest source has"):
        PairBatches(open_sources(data / "stage2", data_tokenizer), 1_000_000, 0)


# ------------------------------------------------------------------------------------------------
# Texts on disk


def test_stored_texts_are_what_the_tokenizer_makes_of_prefix_and_text(data, data_tokenizer):
    """Training reads ids from disk, evaluation tokenizes strings: both must be the same."""
    for source in open_sources(data / "stage2", data_tokenizer):
        pairs = rows_of(data / "stage2" / source.name / "pairs.jsonl")
        for column in ("query", "document"):
            texts = [source.meta["prefixes"][column] + pair[column] for pair in pairs[:20]]
            for ids, text in zip(source.texts(column, range(20), 10_000), texts, strict=False):
                assert ids.tolist() == data_tokenizer.encode(text).ids


def test_a_text_that_is_cut_keeps_its_ends(data, data_tokenizer):
    source = open_sources(data / "stage2", data_tokenizer)[0]
    whole, cut = (source.texts("document", [0], length)[0] for length in (10_000, 12))
    assert len(cut) == 12
    assert np.array_equal(cut[:11], whole[:11]) and cut[11] == whole[-1]


def test_another_tokenizer_is_an_error_before_training(data, tokenizer):
    with pytest.raises(InputError, match="another tokenizer"):
        Source(data / "stage1" / "train", tokenizer)


def test_a_folder_of_something_else_is_an_error(tmp_path, tokenizer):
    with pytest.raises(InputError, match="not a source of texts"):
        Source(tmp_path, tokenizer)
    with pytest.raises(InputError, match="no sources in .* such as jsonl.py"):
        open_sources(tmp_path, tokenizer)


# ------------------------------------------------------------------------------------------------
# What is held out


def test_splits_are_by_module_and_the_same_everywhere():
    splits = [split_of(f"module{i}") for i in range(10_000)]
    assert splits.count("dev") == pytest.approx(400, abs=80)
    assert splits.count("test") == pytest.approx(600, abs=80)
    assert [split_of(name) for name in ("json.decoder", "numpy.linalg", "torch.nn")] == PINNED


PINNED = ["train", "dev", "train"]


def test_private_parts_belong_to_their_module():
    assert pydocs.family("numpy._core._add_newdocs") == pydocs.family("numpy.core.add_newdocs")


def test_near_duplicates_are_noticed_and_different_texts_are_not():
    text = "the quick brown fox jumps over the lazy dog and then it sleeps for a very long time"
    seen = NearDuplicates()
    assert seen.add(text)
    assert not seen.add(text.upper() + "!")
    assert not seen.add(text.replace("sleeps", "rests"))
    assert seen.add("a wholly different sentence about tensors, gradients and their optimizers")
    assert seen.add(""), "even a text without words"


def test_held_out_text_is_not_in_the_training_text(data):
    """Held-out documents of which half the 8-word runs stand in training text: one in a hundred at
    most, pieced together from phrases that many documents share."""
    training = set()
    for path in sorted(data.glob("stage*/*/pairs.jsonl")):
        for pair in rows_of(path):
            for text in pair.values():
                tokens = prepare.words(text)
                training.update(tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7))
    for task in pydocs.EVALUATED:
        corpus = {
            row["_id"]: row["text"] for row in rows_of(data / "retrieval" / task / "corpus.jsonl")
        }
        leaks, judged = [], 0
        for split in ("dev", "test"):
            lines = (
                (data / "retrieval" / task / "qrels" / f"{split}.tsv").read_text().split("\n")[1:-1]
            )
            for name in (line.split("\t")[1] for line in lines):
                tokens = prepare.words(corpus[name])
                runs = [tuple(tokens[i : i + 8]) for i in range(len(tokens) - 7)]
                judged += 1
                if sum(run in training for run in runs) > 0.5 * max(1, len(runs)):
                    leaks.append(name)
        assert judged > 20 and len(leaks) <= max(1, judged // 100), leaks


def test_every_query_has_its_document_in_the_pool_and_is_unique(data):
    for task in pydocs.EVALUATED:
        folder = data / "retrieval" / task
        names = {row["_id"] for row in rows_of(folder / "corpus.jsonl")}
        queries = rows_of(folder / "queries.jsonl")
        for split in ("dev", "test"):
            lines = (folder / "qrels" / f"{split}.tsv").read_text().split("\n")[1:-1]
            assert lines and all(line.split("\t")[1] in names for line in lines)
        assert len({row["text"].lower() for row in queries}) == len(queries)


# ------------------------------------------------------------------------------------------------
# Reading Python

SOURCE = '''"""About this module. It does two things."""

import nothing_that_exists

def add(a, b):
    """Add two numbers.

    The numbers may be large.

    Args:
        a: the first number
    """
    # Check both before they are added up here
    check(a, b)
    return a + b

add_docstr(module.sub, r"""sub(a, b) -> int

Subtracts. {extra}""".format(extra="Not yet"))
'''


def test_docstrings_code_and_comments_are_read_without_importing(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(SOURCE)
    entries, comments = docstrings.read_file(("p", path, "p.m"))
    by_name = {entry.name: entry for entry in entries}
    assert list(by_name) == ["p.m", "p.m.add", "module.sub"]
    add = by_name["p.m.add"]
    assert add.code.startswith("def add(a, b):\n") and "Add two" not in add.code
    assert pydocs.summary_and_body(add.docstring)[0] == "Add two numbers."
    assert list(pydocs.sections(add.docstring)) == [("Args", "    a: the first number")]
    assert by_name["module.sub"].docstring == "Subtracts. Not yet"
    (comment,) = comments
    assert comment.text == "Check both before they are added up here"
    assert comment.code == "check(a, b)\nreturn a + b"
    assert pydocs.summary_and_body(by_name["p.m"].docstring) == (
        "About this module.",
        "It does two things.",
    )


def test_compiled_functions_of_torch_and_numpy_are_there():
    entries = []
    for package, path, module in docstrings.source_files("torch"):
        if path.name in ("_torch_docs.py", "_tensor_docs.py"):
            entries += docstrings.read_file((package, path, module))[0]
    for package, path, module in docstrings.source_files("numpy"):
        if path.name == "_add_newdocs.py":
            entries += docstrings.read_file((package, path, module))[0]
    documented = {entry.name: entry.docstring for entry in entries}
    assert documented["torch.abs"].startswith("Computes the absolute value")
    assert "the input tensor" in documented["torch.sin"], "shared texts are filled in"
    assert "torch.Tensor.add_" in documented
    assert documented["numpy._core.multiarray.array"].startswith("Create an array")


# ------------------------------------------------------------------------------------------------
# The script


def prepare_small(out, *options):
    command = [
        sys.executable,
        ROOT / "data/pydocs.py",
        f"--out={out}",
        "--core=tqdm",
        "--vocab-size=1024",
    ]
    return subprocess.run([*command, *options], capture_output=True, text=True, cwd=out.parent)


def test_preparing_twice_gives_equal_files_and_a_third_time_does_nothing(tmp_path):
    first, second = prepare_small(tmp_path / "a"), prepare_small(tmp_path / "b")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 20
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    again = prepare_small(tmp_path / "a", "--show=3")
    assert "nothing to do" in again.stdout and again.stdout.count("\n---") == 3


def test_a_package_that_is_not_there_is_an_error_and_leaves_nothing(tmp_path):
    result = prepare_small(tmp_path / "a", "--packages=no_such_package")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "no_such_package is not installed" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "letter.txt").write_text("dear")
    result = prepare_small(tmp_path / "a")
    assert result.returncode == 2 and "something else" in result.stderr
    assert (tmp_path / "a" / "letter.txt").read_text() == "dear"
