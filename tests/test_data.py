"""The data folder: what is held out stays out, and batches are a function of (seed, step)."""

import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from tiny import cases, read_jsonl, refused
from tokenizers import Tokenizer, pre_tokenizers

from common.files import write_json
from data import docstrings, prepare, pydocs
from data.batches import PairBatches
from data.duplicates import HeldOut, NearDuplicates, held_out_texts
from data.prepare import data_folder, split_of
from data.sequences import Sequences
from data.store import Source, open_sources
from data.tasks import read_task
from data.tokenizer import encode, train_tokenizer

PREFIXES = {"query": "", "document": ""}


@pytest.fixture
def sources(data, data_tokenizer):
    return open_sources(data / "stage2", data_tokenizer)


def test_a_batch_comes_from_one_source_and_an_epoch_has_every_row_once(sources):
    batches = PairBatches(sources, 16, seed=3)
    seen = {source.name: [] for source in sources}
    for source, rows in map(batches.at, range(len(batches.source_of))):
        assert len(rows) == 16
        seen[source.name] += rows.tolist()
    for source in sources:
        rows = seen[source.name]
        assert len(set(rows)) == len(rows) == len(source) // 16 * 16


def test_batches_are_a_function_of_seed_and_step_and_every_epoch_has_another_order(sources):
    one, same, other = (PairBatches(sources, 16, seed=seed) for seed in (3, 3, 4))
    rows = lambda batches, steps: [batches.at(step)[1].tolist() for step in steps]  # noqa: E731
    assert rows(one, (17, 3, 17)) == rows(same, (17, 3, 17))  # in any order, after any history
    epoch = len(one.source_of)
    assert rows(one, range(5)) not in (rows(other, range(5)), rows(one, range(epoch, epoch + 5)))


def test_sequences_are_full_and_an_epoch_has_each_once(data, data_tokenizer):
    sequences = Sequences(data / "stage1" / "train", data_tokenizer, 64)
    assert all(len(sequences[i]) == 64 for i in range(0, len(sequences), 50))
    steps = len(sequences) // 8 + 1
    rows = np.concatenate([sequences.rows(step, 8, seed=0) for step in range(steps)])
    assert sorted(rows[: len(sequences)]) == list(range(len(sequences)))
    joined = np.concatenate([sequences[i] for i in range(20)])
    assert np.array_equal(joined, sequences.tokens[: 20 * 64]), "a text continues in the next one"


def test_a_source_smaller_than_a_batch_gives_one_with_its_rows_repeated(sources):
    size = max(map(len, sources)) // 2
    batches = PairBatches(sources, size, seed=3)
    drawn = [batches.at(step) for step in range(len(batches.source_of))]
    assert {source.name for source, _ in drawn} == {source.name for source in sources}
    for source, rows in drawn:
        counts = Counter(rows.tolist()).values()
        assert len(rows) == size and len(counts) == min(len(source), size)
        assert max(counts) - min(counts) <= 1
    small = ", ".join(source.name for source in sources if len(source) < size)
    assert small and small in batches.about().popitem()[1]


def test_a_weight_says_how_often_an_epoch_has_a_source(sources):
    first, second, third = (source.name for source in sources[:3])
    sources[0].weight, sources[1].weight, sources[2].weight = 2, 0.5, 0
    batches = PairBatches(sources, 4, seed=3)
    drawn = [batches.at(step) for step in range(len(batches.source_of))]
    counts = Counter(source.name for source, _ in drawn)
    whole = {source.name: len(source) // 4 for source in sources}
    assert counts[first] == 2 * whole[first] and counts[third] == 0
    assert abs(counts[second] - whole[second] / 2) <= 0.5
    groups = [tuple(rows) for source, rows in drawn if source.name == first]
    assert len(set(groups)) == len(groups), "the second time in another order"
    assert max(Counter(row for rows in groups for row in rows).values()) == 2


def test_so_many_pairs_are_the_same_share_of_each_source_drawn_by_the_seed(sources):
    used = {}  # seed -> (source, row) of all batches of three epochs
    for seed in (3, 4):
        batches = PairBatches(sources, 4, seed, pairs=sum(map(len, sources)) // 10)
        steps = range(3 * len(batches.source_of))
        used[seed] = {(s.name, row) for s, rows in map(batches.at, steps) for row in rows}
    counts = Counter(name for name, _ in used[3])
    for source in sources:
        assert 0.8 * round(len(source) / 10) - 4 <= counts[source.name] <= round(len(source) / 10)
    assert len(used[3] & used[4]) < len(used[3]) / 2


def test_stored_texts_are_the_tokens_of_prefix_and_text(data, sources, data_tokenizer):
    """Training reads ids from disk, evaluation tokenises strings: both must be the same."""
    for source in sources:
        pairs = read_jsonl(data / "stage2" / source.name / "pairs.jsonl")
        for column in ("query", "document"):
            texts = [source.meta["prefixes"][column] + pair[column] for pair in pairs[:20]]
            whole, short = (source.texts(column, range(20), length) for length in (10_000, 12))
            for ids, truncated, text in zip(whole, short, texts, strict=True):
                assert ids.tolist() == data_tokenizer.encode(text).ids
                assert truncated.tolist() == [*ids[:11], *ids[11:][-1:]]


UNITS = "a read Zé e\u0301 \u0301 ẞ İ 中 ไทย हिन्दी ∑ 😀 ’ 。 ##a [MASK] [CLS] [UNK]".split()
UNITS += [*"\x00\x0b\x1c\x85\xa0\u200d\u3000\ufffd\t  _('.,-=^`~", "\r\n", "two words", "x" * 101]


def test_texts_in_pieces_have_the_ids_that_the_library_gives_them_whole(data_tokenizer):
    """Another tokenizer, which reads beyond blanks and marks, gets whole texts."""
    rng = np.random.default_rng(0)
    texts = ["", *("".join(rng.choice(UNITS, rng.integers(1, 30))) for _ in range(1000))]
    others = [Tokenizer.from_str(data_tokenizer.to_str()) for _ in range(2)]
    others[0].add_tokens(["two words", "(read"])
    others[1].pre_tokenizer = pre_tokenizers.Metaspace()
    for tokenizer in (data_tokenizer, *others):
        tokenizer.encode_special_tokens = True
        for _ in range(2):  # the second time all pieces are known
            for text, ids in zip(texts, encode(tokenizer, texts), strict=True):
                assert ids.dtype == np.uint16 and ids.tolist() == tokenizer.encode(text).ids, text


def test_another_tokenizer_and_another_kind_of_folder_are_errors(data, tokenizer, tmp_path):
    with refused("another tokenizer"):
        Source(data / "stage1" / "train", tokenizer)
    with refused("no sources in "):
        open_sources(tmp_path, tokenizer)


TOKENS, OFFSETS = "query.tokens.bin", "query.offsets.bin"
WEIGHTS = b', "weight": -1', b', "weight": "much"', b', "weight": NaN', b', "weight": []'


@cases(
    "name, change",
    *((n, lambda d, size=size: d[:size]) for n in (TOKENS, OFFSETS) for size in (0, -8, -1)),
    (TOKENS, lambda data: data[::-1]),
    (TOKENS, lambda data: data[:2] + b"\xff\xff" + data[4:]),
    (OFFSETS, lambda data: data[:24] + (10**12).to_bytes(8, "little") + data[32:]),
    ("meta.json", lambda data: data[:-5]),
    ("meta.json", lambda data: data.replace(b'"rows": ', b'"rows": 1')),
    *(("meta.json", lambda data, w=w: data[:-1] + w + b"}") for w in WEIGHTS),
)
def test_a_damaged_source_is_an_error_that_names_it(data, data_tokenizer, tmp_path, name, change):
    """At opening what can be seen at once, and the rest where it is read: never a wrong text."""
    folder = shutil.copytree(data / "stage2/summary-code", tmp_path / "damaged")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with refused("/damaged"):
        source = Source(folder, data_tokenizer)
        source.texts("query", range(len(source)), 64)


@cases("change", lambda d: d[: len(d) // 2], lambda d: d[:-1], lambda d: d * 2)
def test_text_that_does_not_fit_the_tokens_is_not_copied(data, data_tokenizer, tmp_path, change):
    folder = shutil.copytree(data / "stage2/halves", tmp_path / "halves")
    path = folder / "pairs.jsonl"
    path.write_bytes(change(path.read_bytes()))
    with refused("halves/pairs.jsonl is damaged: not .* lines; prepare"):
        prepare.write_source(tmp_path / "new", (), PREFIXES, data_tokenizer, stored=[folder])


def test_splits_are_by_module_and_the_same_everywhere():
    counts = Counter(split_of(f"module{i}") for i in range(10_000))
    assert counts == pytest.approx({"train": 9000, "dev": 400, "test": 600}, abs=80)
    assert [split_of(name) for name in ("json.decoder", "numpy.linalg")] == ["train", "dev"]
    assert pydocs.family("numpy._core._add_newdocs") == pydocs.family("numpy.core.add_newdocs")


def test_near_duplicates_are_noticed_and_different_texts_are_not():
    text = "the quick brown fox jumps over the lazy dog and then it sleeps for a very long time"
    other = "a wholly different sentence about tensors, gradients and their optimizers"
    copies = [text.upper() + "!", text.replace("sleeps", "rests"), "Two words!"]
    new = NearDuplicates().add_new([text, other, "two words", *copies, "two"])
    assert new.tolist() == [True] * 3 + [False] * 3 + [True]


@pytest.fixture(scope="module")
def word_tokenizer():
    words = [a + b + c for a in "bdfg" for b in "aeio" for c in "klmn"]
    return train_tokenizer(words * 9, vocab_size=300), words


def test_near_duplicates_agree_with_runs_counted_by_hand(word_tokenizer):
    """Parts of held-out texts between other words. Some held-out texts share half with another."""
    (tokenizer, words), rng = word_tokenizer, np.random.default_rng(0)
    held = [rng.choice(words, 40).tolist() for _ in range(20)]
    held += [[*first[20:], *second[:20]] for first, second in zip(held, held[1:], strict=False)]
    texts = []
    for i in range(400):
        start = rng.integers(0, 25)
        part = held[i % len(held)][start : start + rng.integers(3, 40)]
        texts.append([*rng.choice(words, rng.integers(0, 15)), *part, *part[:4]])

    def runs(text):
        return {tuple(text[i : i + 8]) for i in range(max(1, len(text) - 7))}

    def near(text, other):
        return len(text & other) >= max(8, 0.5 * min(len(text), len(other)))

    repeats = HeldOut(map(" ".join, held), tokenizer).find(encode(tokenizer, map(" ".join, texts)))
    expected = [any(near(runs(text), runs(other)) for other in held) for text in texts]
    assert list(map(bool, repeats)) == expected and 20 < sum(expected) < 380


def test_held_out_text_is_found_and_quotes_and_unknown_scripts_are_not(word_tokenizer):
    (tokenizer, words), rng = word_tokenizer, np.random.default_rng(0)
    held, other = (" ".join(rng.choice(words, 40)) for _ in range(2))
    parts = held.split()
    texts = {held.upper() + "!!": 2, "A short, one.": 2, other: 0, "Ban": 2, "bak DOL": 2}
    texts |= {
        "a short": 0,  # a part
        "ban мороз": 0,  # what [UNK] stands for may be anything
        f"{other} {held} {other}": 1,  # it stands within another text
        " ".join(parts[:4]) + " " + other: 0,  # a few words of it
        "жили были дед и баба": 0,  # another text that is nothing but [UNK]
    }
    short = ["a short one", "Bak dol", "ban", "ban солнце"]
    index = HeldOut([held, *short, "мороз и солнце день чудесный"], tokenizer)
    assert index.find(encode(tokenizer, texts)) == list(texts.values())


def test_no_training_row_repeats_held_out_text_and_no_query_is_asked_twice(data, data_tokenizer):
    index = HeldOut(held_out_texts((data / "retrieval").iterdir()), data_tokenizer)
    assert len(index.sizes) > 100
    for path in (*data.glob("stage[23]/*"), data / "stage1/train"):
        for column in Source(path, data_tokenizer).columns.values():
            assert not any(index.find([column[i] for i in range(len(column))])), path
    for source in pydocs.EVALUATED:
        for split in ("dev", "test"):
            _, queries, judged, _ = read_task(data / "retrieval" / source, split)
            assert len({queries[query].lower() for query in judged}) == len(judged) > 0


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
    about, add, sub, comment = docstrings.read_file(("p", path, "p.m"))
    assert [entry.name for entry in (about, add, sub)] == ["p.m", "p.m.add", "module.sub"]
    assert add.code.startswith("def add(a, b):\n") and "Add two" not in add.code
    assert pydocs.summary_and_body(add.text)[0] == "Add two numbers."
    assert list(pydocs.sections(add.text)) == [("Args", "    a: the first number")]
    assert sub.text == "Subtracts. Not yet"
    assert comment.kind == "comment" and comment.text == "Check both before they are added up here"
    assert comment.code == "check(a, b)\nreturn a + b"
    assert pydocs.summary_and_body(about.text)[1] == "It does two things."


def test_compiled_functions_of_torch_and_numpy_are_there():
    jobs = [*docstrings.source_files("torch"), *docstrings.source_files("numpy")]
    names = ("_torch_docs.py", "_tensor_docs.py", "_add_newdocs.py")
    entries = [entry for j in jobs if j[1].name in names for entry in docstrings.read_file(j)]
    documented = {entry.name: entry.text for entry in entries}
    assert documented["torch.abs"].startswith("Computes the absolute value")
    assert "the input tensor" in documented["torch.sin"], "shared texts are inserted"
    assert "torch.Tensor.add_" in documented
    assert documented["numpy._core.multiarray.array"].startswith("Create an array")


def test_every_process_prepares_equal_files_and_the_same_command_does_nothing(tmp_path, capsys):
    small = ["--core=tqdm", "--vocab-size=1024"]
    pydocs.main([f"--out={tmp_path}/a", *small])
    script = [sys.executable, ROOT / "data/pydocs.py", f"--out={tmp_path}/b", *small]
    subprocess.run(script, check=True, capture_output=True)  # its hashes of strings are others
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 20
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    capsys.readouterr()
    pydocs.main([f"--out={tmp_path}/a", *small, "--show=3"])
    printed = capsys.readouterr().out
    assert "nothing to do" in printed and printed.count("\n---") == 3
    with refused(r"a was made from other inputs \(vocab_size\): remove"):
        pydocs.main([f"--out={tmp_path}/a", "--core=tqdm", "--vocab-size=512"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("package", ["no_such_package", "zlib"])
def test_a_package_without_source_is_one_line_and_leaves_nothing(tmp_path, package):
    with refused(f"{package} is not installed"):
        pydocs.main([f"--out={tmp_path}/a", f"--core={package}"])
    assert not list(tmp_path.iterdir())


@cases("name, text", ("a.txt", "dear"), ("meta.json", '{"made_by": "me"}'))
def test_a_folder_of_something_else_is_left_alone(tmp_path, name, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(text)
    with refused("out is there and is no data folder"):
        pydocs.main([f"--out={tmp_path}/out", "--core=numpy"])
    assert (tmp_path / "out" / name).read_text() == text
    assert list(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out" / name]


def test_a_data_folder_takes_its_name_only_when_it_is_whole(tmp_path):
    with pytest.raises(AssertionError), data_folder(tmp_path / "out") as folder:
        write_json(folder / "meta.json", {"made_by": "nanoembed"})
        raise AssertionError
    assert not list(tmp_path.iterdir())
