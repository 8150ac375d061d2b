"""JSON lines: what goes in comes out, faults are counted or refused, and kills lose nothing."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

import finetune
from data import jsonl
from data.contamination import HeldOut
from data.parallel import Encoder
from data.store import Source, load_tokenizer, open_sources
from options import InputError
from retrieval import Retrieval

WORDS = (
    "amber birch cedar delta ember fjord grove heron inlet jetty knoll larch maple north ocean "
    "pearl quail river stone tidal umber violet willow xenon yacht zephyr"
).split()


def sentence(seed, n=14):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, n)) + f" {seed}"


def pairs(n, negatives=0, start=0):
    rows = []
    for i in range(start, start + n):
        row = {"query": f"what about {sentence(i, 4)}?", "document": sentence(10**6 + i)}
        if negatives:
            row["negatives"] = [
                sentence(2 * 10**6 + 10 * i + j) for j in range(i % (negatives + 1))
            ]
        rows.append(row)
    return rows


def save(path, rows):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return str(path)


def prepare(*arguments):
    jsonl.main([*map(str, arguments), "--processes=1", "--vocab-size=400"])


def stored(folder, tokenizer):
    """Every row of a source, decoded: (query, document, negatives)."""
    source = Source(folder, tokenizer)
    text = {
        name: [tokenizer.decode(list(c[i])) for i in range(len(c))]
        for name, c in source.columns.items()
    }
    rows = []
    for i in range(len(source)):
        own = [text["negative"][j] for j in source.negatives(i)]
        rows.append((text["query"][i], text["document"][i], own))
    return rows


# ------------------------------------------------------------------------------------------------
# What goes in comes out


def test_rows_and_their_negatives_come_back_from_disk(tmp_path):
    rows = pairs(300, negatives=3)
    file = save(tmp_path / "faq.jsonl.gz", rows)
    prepare(file, f"--out={tmp_path}/out", "--stage=3", "--queries=10")
    tokenizer = load_tokenizer(tmp_path / "out")
    held = {r["text"] for r in map(json.loads, open(tmp_path / "out/retrieval/faq/queries.jsonl"))}
    expected = [row for row in rows if row["query"] not in held]
    assert len(held) == 10 and len(expected) == 290

    def as_read(text):
        return tokenizer.decode(tokenizer.encode(text).ids)

    for row, (query, document, negatives) in zip(
        expected, stored(tmp_path / "out/stage3/faq", tokenizer), strict=True
    ):
        assert (query, document) == (as_read(row["query"]), as_read(row["document"]))
        assert negatives == list(map(as_read, row["negatives"]))
    source = Source(tmp_path / "out/stage3/faq", tokenizer)
    assert source.prefixes["negative"] == source.prefixes["document"]
    lines = [json.loads(line) for line in open(tmp_path / "out/stage3/faq/pairs.jsonl")]
    assert [line["document"] for line in lines] == [row["document"] for row in expected]


def test_a_source_without_negatives_has_no_such_column(tmp_path):
    prepare(save(tmp_path / "a.jsonl", pairs(60)), f"--out={tmp_path}/out")
    source = Source(tmp_path / "out/stage2/a", load_tokenizer(tmp_path / "out"))
    assert list(source.columns) == ["query", "document"] and len(source.negatives(0)) == 0
    assert not list((tmp_path / "out/stage2/a").glob("negative*"))


def test_columns_prefixes_and_other_forms_of_rows(tmp_path):
    rows = [{"title": sentence(i, 4), "body": sentence(1000 + i)} for i in range(40)]
    prepare(
        save(tmp_path / "news.jsonl", rows) + ":clustering",
        f"--out={tmp_path}/out",
        "--columns=title,body",
    )
    lists = [[sentence(i, 5), sentence(2000 + i), sentence(3000 + i)] for i in range(40)]
    prepare(save(tmp_path / "lists.jsonl", lists) + ":search_query:none", f"--out={tmp_path}/out")
    sets = [{"set": [sentence(4000 + i, 5), sentence(5000 + i, 5), "x"]} for i in range(40)]
    prepare(save(tmp_path / "sets.jsonl", sets), f"--out={tmp_path}/out")
    prefixes = {
        source.name: source.meta["prefixes"]
        for source in open_sources(tmp_path / "out/stage2", load_tokenizer(tmp_path / "out"))
    }
    assert prefixes["news"] == {"query": "clustering: ", "document": "clustering: "}
    assert prefixes["lists"]["document"] == "" and prefixes["lists"]["negative"] == ""
    assert prefixes["sets"] == {"query": "search_query: ", "document": "search_document: "}


def test_a_line_separator_within_a_text_is_no_end_of_line(tmp_path):
    rows = pairs(40)
    rows[7]["document"] += " before\u2028after"
    prepare(save(tmp_path / "a.jsonl", rows), f"--out={tmp_path}/out")
    assert json.loads((tmp_path / "out/meta.json").read_text())["left out"]["stage2/a"] == {}


def test_two_processes_write_the_bytes_of_one(tmp_path):
    rows = pairs(3500, negatives=2) + pairs(50)  # the last 50 are copies
    file = save(tmp_path / "a.jsonl", rows)
    for n in (1, 2):
        jsonl.main([file, f"--out={tmp_path}/{n}", f"--processes={n}", "--vocab-size=400"])
    names = [path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.bin")]
    assert len(names) > 8
    for name in [*names, "stage2/a/pairs.jsonl"]:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_stage_1_reads_the_documents_once_each_or_the_text_that_is_given(tmp_path):
    rows = pairs(60)
    rows += [
        {"query": f"again, {sentence(77 + i, 4)}?", "document": row["document"]}
        for i, row in enumerate(rows[:30])
    ]
    prepare(save(tmp_path / "a.jsonl", rows), f"--out={tmp_path}/one")
    column = Source(tmp_path / "one/stage1/train", load_tokenizer(tmp_path / "one")).columns[
        "document"
    ]
    texts = [bytes(column[i]) for i in range(len(column))]
    assert len(set(texts)) == len(texts) and 40 <= len(texts) <= 60
    (tmp_path / "notes.txt").write_text("\n\n".join(sentence(i, 40) for i in range(9000, 9300)))
    prepare(tmp_path / "a.jsonl", f"--text={tmp_path}/notes.txt", f"--out={tmp_path}/two")
    splits = {
        s: Source(tmp_path / f"two/stage1/{s}", load_tokenizer(tmp_path / "two"))
        for s in ("train", "dev", "test")
    }
    assert 285 <= len(splits["train"]) < 300 and len(splits["dev"]) and len(splits["test"])


def test_every_stage_can_open_what_was_prepared(tmp_path):
    prepare(save(tmp_path / "a.jsonl", pairs(400)), f"--out={tmp_path}/out")
    prepare(
        save(tmp_path / "b.jsonl", pairs(200, 2, start=5000)), f"--out={tmp_path}/out", "--stage=3"
    )
    tokenizer = load_tokenizer(tmp_path / "out")
    for split in ("dev", "test"):
        assert {task.name for task in Retrieval.open_all(tmp_path / "out", split)} == {"a", "b"}
    assert [s.name for s in open_sources(tmp_path / "out/stage2", tokenizer)] == ["a"]
    assert [s.name for s in open_sources(tmp_path / "out/stage3", tokenizer)] == ["b"]
    out = tmp_path / "run"
    small = [
        "--hidden-size=32",
        "--num-attention-heads=2",
        "--intermediate-size=32",
        "--negatives=2",
    ]
    finetune.main(
        [f"--data={tmp_path}/out", f"--out={out}", "--batch-size=16", "--steps=1", *small]
    )
    assert (out / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------------
# Contamination


def test_held_out_text_in_training_rows_is_found_and_quotes_are_not(tokenizer):
    held, other = sentence(1, 40), sentence(2, 40)
    index = HeldOut([held, "a short one"], tokenizer)
    encoder = Encoder(tokenizer, index)
    words = held.split()
    texts = {
        held.upper() + "!!": 2,
        "A short, one.": 2,
        "a short": 0,  # too short to say anything
        other: 0,
        f"{other} {held} {other}": 1,  # it stands within another text
        " ".join(words[:20]) + " " + other: 1,  # half of it
        " ".join(words[:4]) + " " + other: 0,  # a few words of it
        " ".join(reversed(words)): 0,
    }
    assert index.leaks(*encoder.encode(list(texts))).tolist() == list(texts.values())


def test_near_copies_agree_with_sets_of_runs_counted_by_hand(tokenizer):
    """The arithmetic on arrays, against Python sets of tuples."""
    rng = np.random.default_rng(0)
    held = [sentence(i, 30) for i in range(20)]
    texts = []
    for i in range(200):  # pieces of held-out texts between words of others
        words = held[i % 20].split()
        start, length = rng.integers(0, 15), rng.integers(3, 25)
        texts.append(
            " ".join([sentence(1000 + i, 12), *words[start : start + length], sentence(i + 99, 9)])
        )
    index = HeldOut(held, tokenizer)

    def runs(text):
        ids = [i for i in tokenizer.encode(text).ids if index.is_word[i]]
        return {tuple(ids[i : i + 8]) for i in range(len(ids) - 7)}

    expected = []
    for text in texts:
        own = runs(text)
        shared = [(len(own & r), min(len(own), len(r))) for r in map(runs, held)]
        expected.append(any(count >= max(8, 0.5 * least) for count, least in shared))
    found = index.leaks(*Encoder(tokenizer, None).encode(texts)) > 0
    assert found.tolist() == expected and 20 < sum(expected) < 180


def test_rows_that_repeat_held_out_text_are_removed_and_counted(tmp_path):
    rows = pairs(200)
    file = save(tmp_path / "a.jsonl", rows)
    prepare(file, f"--out={tmp_path}/first")
    corpus = {
        r["_id"]: r["text"]
        for r in map(json.loads, open(tmp_path / "first/retrieval/a/corpus.jsonl"))
    }
    lines = (tmp_path / "first/retrieval/a/qrels/test.tsv").read_text().split("\n")[1:-1]
    leaked = [corpus[line.split("\t")[1]] for line in lines][:3]
    other = [
        {"query": f"new {sentence(i, 6)}", "document": d + " and more"}
        for i, d in enumerate(leaked)
    ]
    held_out = tmp_path / "first/retrieval/a"
    second = save(tmp_path / "b.jsonl", pairs(50, start=900) + other)
    prepare(second, f"--out={tmp_path}/second", f"--held-out={held_out}")
    meta = json.loads((tmp_path / "second/meta.json").read_text())
    assert meta["contamination"]["removed"] == 3
    assert meta["contamination"]["sources"] == {"stage2/b": {"near held-out text": 3}}
    assert meta["rows"]["stage2/b"] == 50 + 3 - 3 - 5  # 5 queries are held out


def test_what_a_later_source_holds_out_is_taken_from_earlier_ones(tmp_path):
    rows = pairs(200)
    prepare(save(tmp_path / "a.jsonl", rows), f"--out={tmp_path}/out")
    before = json.loads((tmp_path / "out/meta.json").read_text())["rows"]
    late = save(tmp_path / "b.jsonl", [{**row, "query": f"again {row['query']}"} for row in rows])
    prepare(late, f"--out={tmp_path}/out", "--stage=3")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    held = Retrieval(tmp_path / "out/retrieval/b", "test")
    held = {held.documents[i] for relevant in held.relevant for i in relevant}
    for source in ("stage2/a", "stage3/b"):
        lines = [json.loads(line) for line in open(tmp_path / "out" / source / "pairs.jsonl")]
        assert len(lines) == meta["rows"][source] > 100
        assert not any(line["document"] in held for line in lines)
    assert meta["rows"]["stage1/train"] == before["stage1/train"] - (
        before["stage2/a"] - meta["rows"]["stage2/a"]
    )


# ------------------------------------------------------------------------------------------------
# Faults


def test_faulty_rows_are_counted_by_reason_and_shown(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    save(file, pairs(50))
    with open(file, "a") as lines:
        lines.write('{"query": "cut off\n')
        lines.write('"a string"\n')
        lines.write('{"query": "no document"}\n')
        lines.write('{"query": 3, "document": "a number"}\n')
        lines.write('{"query": " ", "document": "nothing asked"}\n')
        lines.write(
            json.dumps(pairs(1)[0])
            .upper()
            .replace("QUERY", "query", 1)
            .replace("DOCUMENT", "document", 1)
            + "\n"
        )
        lines.write(json.dumps({"query": "a long one", "document": "word " * 300}) + "\n")
    prepare(file, f"--out={tmp_path}/out", "--longest=1000")
    counts = json.loads((tmp_path / "out/meta.json").read_text())["left out"]["stage2/a"]
    copy = counts.pop("duplicate", 0) + counts.pop("equal to held-out text", 0)
    assert copy == 1 and counts == {
        "not a JSON object": 2,
        "column missing": 1,
        "not text": 1,
        "empty": 1,
        "over length, cut": 1,
    }
    assert f"{file}, line 51: not a JSON object" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"query": "cut off', "line 51: not a JSON object"),
        ('{"query": "no document"}', "line 51: column missing: document"),
        ('{"query": "", "document": "x"}', "line 51: empty: query"),
        (json.dumps({"query": "q", "document": "w " * 20_000}), "line 51: over length"),
    ],
)
def test_strict_makes_the_first_fault_an_error_and_leaves_nothing(tmp_path, line, reason):
    file = tmp_path / "a.jsonl"
    save(file, pairs(50))
    with open(file, "a") as lines:
        lines.write(line + "\n")
    with pytest.raises(InputError, match=reason):
        prepare(file, f"--out={tmp_path}/out", "--strict")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_files_that_cannot_be_read_name_file_and_line_and_leave_nothing(tmp_path):
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in pairs(3000)).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    latin = (
        "".join(json.dumps(row) + "\n" for row in pairs(30)).encode() + b'{"query": "caf\xe9"}\n'
    )
    (tmp_path / "latin.jsonl").write_bytes(latin)
    save(tmp_path / "other.jsonl", [{"question": "a", "answer": "b"}] * 30)
    (tmp_path / "empty").mkdir()
    files = sorted(path.name for path in tmp_path.iterdir())
    for name, reason in {
        "cut.jsonl.gz": r"cut\.jsonl\.gz cannot be read beyond line \d+",
        "latin.jsonl": r"latin\.jsonl cannot be read.*utf-8",
        "other.jsonl": "other: no row has query, document: its rows have question, answer",
        "empty": "has no file of JSON lines",
        "missing.jsonl": "there is no such file or folder",
    }.items():
        with pytest.raises(InputError, match=reason):
            prepare(tmp_path / name, f"--out={tmp_path}/out")
        assert sorted(path.name for path in tmp_path.iterdir()) == files, name


def test_two_sources_of_one_name_are_an_error(tmp_path):
    (tmp_path / "old").mkdir()
    one, other = (
        save(tmp_path / "faq.jsonl", pairs(50)),
        save(tmp_path / "old/faq.jsonl.gz", pairs(50)),
    )
    with pytest.raises(InputError, match="two sources have the name faq"):
        prepare(one, other, f"--out={tmp_path}/out")
    prepare(one, f"--out={tmp_path}/out")
    with pytest.raises(InputError, match="stage2 has a source faq"):
        prepare(other, f"--out={tmp_path}/out")
    before = (tmp_path / "out/meta.json").read_bytes()
    prepare(one, f"--out={tmp_path}/out")  # the same command: nothing to do
    assert (tmp_path / "out/meta.json").read_bytes() == before


def test_an_output_folder_of_something_else_is_left_alone(tmp_path):
    file = save(tmp_path / "a.jsonl", pairs(50))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="holds something else than data"):
        prepare(file, f"--out={tmp_path}/out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


# ------------------------------------------------------------------------------------------------
# Kills


def test_a_killed_preparation_goes_on_and_ends_in_the_same_bytes(tmp_path):
    """SIGKILL at a moment when some blocks are on disk; what is left is no data folder, and the
    same command makes it one."""
    rows = pairs(12_000, negatives=1) + pairs(500)
    file = save(tmp_path / "a.jsonl", rows)
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from data import jsonl, write\n"
        "import time\n"
        "write.Files.save.__defaults__ = (0.0,)\n"  # records every block
        "append = write.append_block\n"
        "write.append_block = lambda *a: (append(*a), time.sleep(0.15))\n"
        "jsonl.main(sys.argv[1:])\n"
    )
    common = ["--vocab-size=400", "--processes=1"]
    command = [sys.executable, "-c", script, str(ROOT), file, f"--out={tmp_path}/out", *common]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    progress = tmp_path / "out.partial/stage2/a/progress.json"
    while process.poll() is None and not (
        progress.is_file() and '"blocks": 3' in progress.read_text()
    ):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists() and progress.is_file()
    (tmp_path / "out.partial/stage2/a/query.tokens.bin").open("ab").write(b"half a block")
    for out in ("out", "undisturbed"):
        jsonl.main([file, f"--out={tmp_path}/{out}", *common])
    assert not (tmp_path / "out.partial").exists()
    names = [p.relative_to(tmp_path / "out") for p in (tmp_path / "out/stage2").rglob("*")]
    for name in (name for name in names if name.suffix == ".bin"):
        assert (tmp_path / "out" / name).read_bytes() == (
            tmp_path / "undisturbed" / name
        ).read_bytes()
    left_out = [
        json.loads((tmp_path / out / "meta.json").read_text())["left out"]
        for out in ("out", "undisturbed")
    ]
    assert left_out[0] == left_out[1] and left_out[0]["stage2/a"]["duplicate"] > 300
