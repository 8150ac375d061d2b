"""Consistency filtering: shuffled pairs go, real ones stay, and nothing else changes."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from tiny import tiny_model, unit_rows

from common.files import fingerprint, load_tokenizer
from common.options import InputError
from data import filter as filtering
from data import prepare, store
from data.store import Source, distinct
from model import NomicBert

WORDS = [a + b + c for a in "rst" for b in "aeio" for c in "nlmr"]


def sentence(rng):
    return " ".join(rng.choice(WORDS, 6, replace=False))


@pytest.fixture(scope="module")
def judge(tmp_path_factory, tokenizer):
    """A model with random weights: texts of the same words are alike to it. Its tokenizer is not
    that of the data."""
    folder = tmp_path_factory.mktemp("judge") / "model"
    tiny_model(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A data folder of 100 real pairs and 40 shuffled ones in a source, and 30 pairs in another."""
    rng = np.random.default_rng(0)
    texts = [sentence(rng) for _ in range(140)]
    documents = [" ".join(reversed(text.split())) for text in texts]  # the same words
    documents[100:] = np.roll(documents[100:], 1).tolist()
    other = [(sentence(rng), sentence(rng)) for _ in range(30)]
    tokenizer = prepare.train_tokenizer(texts, vocab_size=200)
    data = tmp_path / "data"
    for name, pairs in (("mixed", list(zip(texts, documents, strict=True))), ("other", other)):
        write_pairs(data / "stage2" / name, pairs, tokenizer)
    prepare.write_source(data / "stage1" / "train", {"document": texts}, {}, tokenizer)
    prepare.save_tokenizer(data, tokenizer)
    rows = {"stage2/mixed": 140, "stage2/other": 30}
    (data / "meta.json").write_text(json.dumps({"made_by": "nanoembed", "rows": rows}))
    return data


def write_pairs(folder, pairs, tokenizer):
    columns = dict(zip(("query", "document"), zip(*pairs, strict=True), strict=True))
    prepare.write_source(folder, columns, {"query": "a: ", "document": "b: "}, tokenizer)


def lines(path):
    return path.read_text("utf-8").splitlines()


def run(folder, judge, *options):
    filtering.main([str(folder), f"--judge={judge}", *options])
    return folder.with_name(folder.name + "-filtered")


# ------------------------------------------------------------------------------------------------
# The rule


@pytest.mark.parametrize("top", [1, 2, 7])
def test_a_pair_stays_if_fewer_than_top_documents_are_nearer(top):
    query, document = unit_rows(300), unit_rows(200, seed=1)
    right = np.random.default_rng(0).integers(200, size=300)
    kept, nearest = filtering.is_consistent(query, document, right, top)
    scores = query @ document.T
    rank = (scores > scores[np.arange(300), right][:, None]).sum(1)
    assert np.array_equal(kept, rank < top)
    assert np.array_equal(nearest[:, 0], scores.argmax(1))


def test_shuffled_pairs_go_and_real_ones_stay(folder, judge, capsys):
    out = run(folder, judge, "--sources=mixed", "--show=4")
    kept = lines(out / "stage2" / "mixed" / "pairs.jsonl")
    before = lines(folder / "stage2" / "mixed" / "pairs.jsonl")
    real = sum(line in before[:100] for line in kept)
    assert real >= 95 and len(kept) - real <= 4
    shown = capsys.readouterr().out
    assert f"mixed: kept {len(kept)} of 140 pairs" in shown and shown.count("removed: ") == 4


def test_a_document_in_many_rows_does_not_push_itself_out(folder, judge):
    """Ten different queries share a document; all of them stay, though two are the limit."""
    text = " ".join(WORDS[:6])
    pairs = [(f"{text} {word}", text) for word in WORDS[6:16]]
    pairs += [(word * 3, word * 2) for word in WORDS[20:40]]
    write_pairs(folder / "stage2" / "shared", pairs, load_tokenizer(folder))
    out = run(folder, judge, "--sources=shared")
    kept = lines(out / "stage2" / "shared" / "pairs.jsonl")
    assert kept[:10] == lines(folder / "stage2" / "shared" / "pairs.jsonl")[:10]


def test_pairs_are_compared_within_blocks_of_equal_size(folder, judge):
    """30 pairs in blocks of at most 12: three of 10. What is judged in one is judged as if the
    source had no other rows."""
    model, path = NomicBert.from_pretrained(judge), folder / "stage2" / "other" / "pairs.jsonl"
    options = filtering.Options(block=12, max_tokens=128)
    prefixes = {"query": "a: ", "document": "b: "}
    done = folder / "blocks"

    def encode(texts):
        return model.encode(texts, 128)

    kept, nearest = filtering.judge_source(encode, path, 30, prefixes, options, done, "cpu")
    assert sorted(p.name for p in done.iterdir()) == [
        "other-0-10.npz",
        "other-10-20.npz",
        "other-20-30.npz",
    ]
    pairs = [json.loads(line) for line in lines(path)]
    for begin, end in ((0, 10), (10, 20), (20, 30)):
        query, document = (
            model.encode([prefixes[side] + pair[side] for pair in pairs[begin:end]], 128)
            for side in ("query", "document")
        )
        first, right = distinct(pair["document"].encode() for pair in pairs[begin:end])
        expected, _ = filtering.is_consistent(query, document[first], right)
        assert np.array_equal(kept[begin:end], expected)
        assert nearest[begin:end].min() >= begin and nearest[begin:end].max() < end


# ------------------------------------------------------------------------------------------------
# The folder


def test_rows_that_stay_keep_their_tokens_and_sources_that_stay_whole_are_linked(folder, judge):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    out = run(folder, judge, "--sources=mixed")
    assert all(path.read_bytes() == content for path, content in before.items())
    tokenizer = load_tokenizer(out)
    old, new = (Source(d / "stage2" / "mixed", tokenizer) for d in (folder, out))
    rows = {line: i for i, line in enumerate(lines(folder / "stage2" / "mixed" / "pairs.jsonl"))}
    kept = [rows[line] for line in lines(out / "stage2" / "mixed" / "pairs.jsonl")]
    assert len(new) == len(kept) < len(old)
    for side, column in new.columns.items():
        assert all(np.array_equal(column[i], old.columns[side][row]) for i, row in enumerate(kept))
        assert new.meta["tokens"][side] == len(column.tokens)
    for name in ("stage1/train/document.tokens.bin", "stage2/other/pairs.jsonl", "tokenizer.json"):
        assert (folder / name).read_bytes() == (out / name).read_bytes()
        assert os.path.samefile(folder / name, out / name) == ("stage" in name)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["filtered"] == {"mixed": {"rows": 140, "kept": len(kept)}}
    assert meta["rows"]["stage2/mixed"] == new.meta["rows"] == len(kept)
    how = meta["inputs"]["filtered"]
    assert (how["judge"], how["top"], how["block"]) == (str(judge), 2, 1_000_000)
    assert how["weights"] == fingerprint(judge / "model.safetensors")


def test_negatives_stay_with_their_rows(folder):
    tokenizer, where = load_tokenizer(folder), folder / "stage2" / "own"
    counts = np.arange(len(WORDS)) % 3
    texts = {"query": [w * 2 for w in WORDS], "document": WORDS}
    texts["negative"] = [word for count in counts for word in WORDS[:count]]
    columns = {name: store.encode(tokenizer, found) for name, found in texts.items()}
    writer = prepare.SourceWriter(where, {"query": "a: ", "document": "b: "}, tokenizer)
    writer.append(columns, [f"{word}\n" for word in WORDS], counts)
    writer.finish()
    kept = np.zeros(len(WORDS), bool)
    kept[[1, 4, 5, 6]] = True
    fewer, prefixes = folder / "stage2" / "fewer", {"query": "a: ", "document": "b: "}
    prepare.write_source(fewer, {}, prefixes, tokenizer, stored=[where], keep=kept)
    old, new = (Source(folder / "stage2" / name, tokenizer) for name in ("own", "fewer"))
    assert lines(folder / "stage2/fewer/pairs.jsonl") == [WORDS[row] for row in (1, 4, 5, 6)]
    for i, row in enumerate([1, 4, 5, 6]):
        expected = old.texts("negative", old.negatives(row), 99)
        found = new.texts("negative", new.negatives(i), 99)
        assert len(found) == row % 3
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sources=mixed,nothing"], "--sources=nothing: .*has the sources mixed, other"),
        (["--top=0"], "--top=0: give a whole number from 1"),
        (["--block=2"], "--top=2: in blocks of 2 pairs, all would stay"),
        (["--judge=nowhere"], "nowhere"),
        (["--max-tokens=-1"], "--max-tokens=-1: give a whole number from 0"),
        (["--show=few"], "--show=few: not a whole number"),
        (["more"], "give one data folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(options, message, folder, judge):
    with pytest.raises(InputError, match=message) as error:
        run(folder, judge, *options)
    assert "\n" not in str(error.value)
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_a_folder_that_is_there_is_not_overwritten(folder, judge, tmp_path, capsys, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.md").write_text("mine")
    with pytest.raises(InputError, match="mine is there and is no data folder"):
        run(folder, judge, f"--out={tmp_path / 'mine'}")
    out = run(folder, judge)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(folder, judge)
    assert "made from the same inputs: nothing to do" in capsys.readouterr().out
    monkeypatch.chdir(folder)
    filtering.main([".", f"--judge={judge}"])
    assert "made from the same inputs: nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}
    with pytest.raises(InputError, match="was made from other inputs .filtered."):
        run(folder, judge, "--top=1")
    with pytest.raises(InputError, match="mine is neither a data folder nor a checkpoint"):
        run(tmp_path / "mine", judge)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: ['{"query": 1}', *rows[1:]], 'pairs.jsonl, line 1: not {"query"'),
        (lambda rows: [*rows, rows[0]], "has 141 lines, but its source has 140 rows"),
        (lambda rows: rows[:-1], "has 139 lines, but its source has 140 rows"),
    ],
)
def test_text_that_does_not_fit_the_tokens_is_named(change, message, folder, judge):
    path = folder / "stage2" / "mixed" / "pairs.jsonl"
    path.write_text("\n".join(change(lines(path))) + "\n")
    with pytest.raises(InputError, match=message):
        run(folder, judge)
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_a_full_disk_is_named_and_leaves_nothing(folder, judge):
    """No file may grow beyond 1,000 bytes, which the filtered tokens do."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(InputError, match="cannot write .*: File too large"):
            run(folder, judge)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = [p for p in folder.parent.rglob("*") if p.is_file() and folder not in p.parents]
    assert left == []


# ------------------------------------------------------------------------------------------------
# Interruptions, processes, other judges


def test_an_interrupted_filter_goes_on_behind_the_last_judged_block(folder, judge, monkeypatch):
    expected = lines(run(folder, judge, "--block=50") / "stage2/mixed/pairs.jsonl")
    blocks, judge_block = [], filtering.judge_block

    def judge_twice(encode, pairs, *rest):
        blocks.append(len(pairs))
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return judge_block(encode, pairs, *rest)

    monkeypatch.setattr(filtering, "judge_block", judge_twice)
    out = folder.parent / "again"
    with pytest.raises(KeyboardInterrupt):
        run(folder, judge, "--block=50", f"--out={out}")
    run(folder, judge, "--block=50", f"--out={out}")
    assert lines(out / "stage2/mixed/pairs.jsonl") == expected
    assert blocks == [46, 47, 47, 47, 30], "140 and 30 rows; the third block was interrupted"
    assert not list(folder.parent.glob("*-blocks"))


def test_several_processes_keep_the_same_pairs(folder, judge):
    alone, script = run(folder, judge), ROOT / "data" / "filter.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    out = folder.parent / "two"
    command = [*launch, script, folder, f"--judge={judge}", f"--out={out}"]
    subprocess.run(
        command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    kept, expected = (
        {path.parent.name: lines(path) for path in data.glob("stage2/*/pairs.jsonl")}
        for data in (out, alone)
    )
    assert kept == expected and len(kept["mixed"]) >= 95


def test_any_model_of_sentence_transformers_may_judge(folder, judge):
    """Ours opens there; with prefixes of its own it is another judge, so the data has none."""
    pairs = [json.loads(line) for line in lines(folder / "stage2/mixed/pairs.jsonl")]
    pairs = [(pair["query"], pair["document"]) for pair in pairs]
    columns = dict(zip(("query", "document"), zip(*pairs, strict=True), strict=True))
    tokenizer, name = load_tokenizer(folder), folder / "stage2" / "plain"
    prepare.write_source(name, columns, dict.fromkeys(columns, ""), tokenizer)
    found = [
        lines(run(folder, f"{kind}{judge}", "--sources=plain", f"--out={folder}-{i}")
              .with_name(f"data-{i}") / "stage2/plain/pairs.jsonl")
        for i, kind in enumerate(("", "st:"))
    ]  # fmt: skip
    assert found[0] == found[1] and len(found[0]) >= 95
    with pytest.raises(InputError, match="--judge=st:nowhere/at-all does not open"):
        run(folder, "st:nowhere/at-all", f"--out={folder}-2")
