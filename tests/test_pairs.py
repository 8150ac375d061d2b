"""Pairs from files: what goes in comes out, and faults are counted by reason."""

import gzip
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from common.files import load_tokenizer
from common.options import InputError
from data import pairs as script
from data.store import Source, open_sources
from data.tasks import read_task, read_texts

WORDS = (
    "amber birch cedar delta ember fjord grove heron inlet jetty knoll larch maple north ocean "
    "pearl quail river stone tidal umber violet willow xenon yacht zephyr"
).split()


def sentence(seed, n=14):
    return " ".join(np.random.default_rng(seed).choice(WORDS, n)) + f" {seed}"


def pairs(n, negatives=0, start=0):
    rows = []
    for i in range(start, start + n):
        row = {"query": f"what about {sentence(i, 4)}?", "document": sentence(10**6 + i)}
        if negatives:
            own = range(i % (negatives + 1))
            row["negatives"] = [sentence(2 * 10**6 + 10 * i + j) for j in own]
        rows.append(row)
    return rows


def save(path, rows):
    """Writes rows in the form that the file's name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.write(lines)
    return str(path)


def prepare(*arguments):
    out = next(a for a in map(str, arguments) if a.startswith("--out="))
    small = [] if "--processes" in str(arguments) else ["--processes=1"]
    script.main([*map(str, arguments), *small, "--vocab-size=400"])
    with open(f"{out[6:]}/meta.json") as file:
        return json.load(file)


def stored(folder):
    """Every row of a source, decoded: (query, document, negatives)."""
    tokenizer = load_tokenizer(folder.parents[1])
    source = Source(folder, tokenizer)
    text = {name: [tokenizer.decode(list(column[i])) for i in range(len(column))]
            for name, column in source.columns.items()}  # fmt: skip
    negatives = [[text["negative"][j] for j in source.negatives(i)] for i in range(len(source))]
    return list(zip(text["query"], text["document"], negatives, strict=True))


# ------------------------------------------------------------------------------------------------
# What goes in comes out


@pytest.mark.parametrize("name", ["faq.jsonl.gz", "faq.jsonl", "faq.parquet"])
def test_rows_and_their_negatives_come_back_from_disk(name, tmp_path):
    rows = pairs(300, negatives=3)
    file, out = save(tmp_path / name, rows), tmp_path / "out"
    prepare(file, f"--out={out}", "--stage=3", "--queries=10")
    held = set(read_texts(out / "retrieval/faq/queries.jsonl").values())
    expected = [row for row in rows if row["query"] not in held]
    assert len(held) == 10 and len(expected) == 290
    tokenizer = load_tokenizer(out)

    def as_read(text):
        return tokenizer.decode(tokenizer.encode(text).ids)

    assert stored(out / "stage3/faq") == [
        (as_read(row["query"]), as_read(row["document"]), list(map(as_read, row["negatives"])))
        for row in expected
    ]
    source = Source(out / "stage3/faq", tokenizer)
    assert source.prefixes["negative"] == source.prefixes["document"]
    lines = [json.loads(line) for line in open(out / "stage3/faq/pairs.jsonl")]
    assert [line["document"] for line in lines] == [row["document"] for row in expected]


def test_two_processes_write_the_bytes_of_one(tmp_path):
    rows = pairs(3500, negatives=2) + pairs(50)  # the last are copies
    for n in (1, 2):  # of different files: else the second run would find the first one's cache
        file = save(tmp_path / f"of-{n}" / "a.jsonl", rows)
        meta = prepare(file, f"--out={tmp_path}/{n}", f"--processes={n}")
    assert meta["left out"]["stage2/a"]["copy of another row"] > 30
    names = [path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.bin")]
    assert len(names) > 8
    for name in [*names, "stage2/a/pairs.jsonl"]:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_columns_prefixes_and_other_forms_of_rows(tmp_path):
    out = f"--out={tmp_path}/out"
    table = "".join(f'"{sentence(i, 4)}\nline two, {i}",{i:09}\n' for i in range(40))
    (tmp_path / "news.csv").write_text("\ufefftitle,body\n" + table)
    prepare(f"{tmp_path}/news.csv:clustering", out, "--columns=title,body")
    lists = [[sentence(i, 5), sentence(2000 + i), sentence(3000 + i)] for i in range(40)]
    prepare(save(tmp_path / "lists.jsonl", lists) + ":search_query:none", out)
    sets = [{"set": [sentence(4000 + i, 5), sentence(5000 + i, 5), "x"]} for i in range(40)]
    prepare(save(tmp_path / "sets.jsonl", sets), out)
    several = [
        {"query": row["query"], "document": [row["document"], sentence(i)]}
        for i, row in enumerate(pairs(40, start=8000))
    ]
    meta = prepare(save(tmp_path / "several.jsonl", several), out)
    assert meta["rows"] | {"stage1/train": 0} == {
        "stage2/news": 36, "stage2/lists": 36, "stage2/sets": 36, "stage2/several": 72,
        "stage1/train": 0,
    }  # fmt: skip
    assert not any(meta["left out"].values())
    tokenizer = load_tokenizer(tmp_path / "out")
    sources = {s.name: s for s in open_sources(tmp_path / "out/stage2", tokenizer)}
    assert sources["news"].meta["prefixes"] == dict.fromkeys(("query", "document"), "clustering: ")
    assert set(sources["lists"].meta["prefixes"].values()) == {"search_query: ", ""}
    assert sources["sets"].meta["prefixes"]["query"] == "search_query: "
    assert not list((tmp_path / "out/stage2/sets").glob("negative*")), "no negatives, no column"
    row = json.loads(open(tmp_path / "out/stage2/news/pairs.jsonl").readline())
    number = int(row["query"].rpartition(" ")[2])
    assert row["query"].endswith(f"\nline two, {number}"), "a line break within quotes"
    assert row["document"] == f"{number:09}", "text is not read as a number"


def test_a_drive_letter_is_no_prefix_and_a_file_that_exists_is_never_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a:b.jsonl", "C:faq.jsonl"):
        (tmp_path / name).write_text("{}")
    source = script.source_of("a:b.jsonl", script.Options())
    assert source.places == ["a:b.jsonl"] and source.prefixes["query"] == "search_query: "
    source = script.source_of("C:faq.jsonl:clustering", script.Options())
    assert source.places == ["C:faq.jsonl"] and source.prefixes["query"] == "clustering: "


def test_stage_1_reads_the_documents_once_each_or_the_text_that_is_given(tmp_path):
    rows = pairs(60)
    rows += [{"query": f"again, {sentence(77 + i, 4)}?", "document": row["document"]}
             for i, row in enumerate(rows[:30])]  # fmt: skip
    file = save(tmp_path / "a.jsonl", rows)
    prepare(file, f"--out={tmp_path}/one")
    train = Source(tmp_path / "one/stage1/train", load_tokenizer(tmp_path / "one"))
    texts = [bytes(train.columns["document"][i]) for i in range(len(train))]
    assert len(set(texts)) == len(texts) and 40 <= len(texts) <= 60
    (tmp_path / "notes.txt").write_text("\n\n".join(sentence(i, 40) for i in range(9000, 9200)))
    more = save(tmp_path / "more.jsonl", [{"text": sentence(i, 40)} for i in range(9200, 9300)])
    with open(more, "a") as rows:
        rows.write('{"text": "cut off\n{"text": 3}\n')
    meta = prepare(file, f"--text={tmp_path}/notes.txt,{more}", f"--out={tmp_path}/two")
    assert meta["left out"]["stage1/train"] == {"not a JSON object": 1, "not text": 1}
    tokenizer = load_tokenizer(tmp_path / "two")
    train, dev, test = (
        Source(tmp_path / f"two/stage1/{s}", tokenizer) for s in ("train", "dev", "test")
    )
    assert 285 <= len(train) < 300 and len(dev) and len(test)


def test_limit_takes_the_first_rows_and_show_prints_some(tmp_path, capsys):
    meta = prepare(
        save(tmp_path / "a.jsonl", pairs(100)), f"--out={tmp_path}/o", "--limit=50", "--show=3"
    )
    assert meta["rows"]["stage2/a"] == 45 and capsys.readouterr().out.count("\n---") == 3


# ------------------------------------------------------------------------------------------------
# Held-out text, and sources that are added


def test_rows_that_repeat_held_out_text_are_removed_and_counted(tmp_path):
    prepare(save(tmp_path / "a.jsonl", pairs(200)), f"--out={tmp_path}/first")
    task = tmp_path / "first/retrieval/a"
    documents, _, judged, _ = read_task(task, "test")
    leaked = [documents[name] for answers in judged.values() for name in answers][:3]
    rows = [{"query": f"new {sentence(i, 6)}", "document": f"{text} and more"}
            for i, text in enumerate(leaked)]  # fmt: skip
    file = save(tmp_path / "b.jsonl", pairs(50, start=900) + rows)
    meta = prepare(file, f"--out={tmp_path}/second", f"--held-out={task}")
    assert meta["contamination"]["removed"] == 3
    assert meta["contamination"]["sources"] == {"stage2/b": {"near held-out text": 3}}
    assert meta["rows"]["stage2/b"] == 50 + 3 - 3 - 5, "5 queries are held out"


def test_what_a_later_source_holds_out_is_taken_from_earlier_ones(tmp_path):
    rows, out = pairs(200), tmp_path / "out"
    before = prepare(save(tmp_path / "a.jsonl", rows), f"--out={out}")["rows"]
    late = save(tmp_path / "b.jsonl", [{**row, "query": f"again {row['query']}"} for row in rows])
    meta = prepare(late, f"--out={out}", "--stage=3")
    documents, _, judged, _ = read_task(out / "retrieval/b", "test")
    held = {documents[name] for answers in judged.values() for name in answers}
    for source in ("stage2/a", "stage3/b"):
        lines = [json.loads(line) for line in open(out / source / "pairs.jsonl")]
        assert len(lines) == meta["rows"][source] > 100
        assert not any(line["document"] in held for line in lines)
    removed = before["stage2/a"] - meta["rows"]["stage2/a"]
    assert meta["rows"]["stage1/train"] == before["stage1/train"] - removed
    tokenizer = load_tokenizer(out)
    assert [s.name for n in (2, 3) for s in open_sources(out / f"stage{n}", tokenizer)] == [
        "a",
        "b",
    ]
    again = (out / "meta.json").read_bytes()
    prepare(late, f"--out={out}", "--stage=3")  # the same command: nothing to do
    assert (out / "meta.json").read_bytes() == again


# ------------------------------------------------------------------------------------------------
# Faults


def test_faulty_rows_are_counted_by_reason_and_the_first_is_shown(tmp_path, capsys):
    lines = ['{"query": "cut off', '"a string"', "[" * 100_000, '{"query": "no document"}',
             '{"query": 3, "document": "a number"}', '{"query": " ", "document": "nothing asked"}',
             r'{"query": "half a \ud800", "document": "pair"}',
             '{"query": "a", "document": "b", "negatives": [null, "x"]}',
             json.dumps({"query": "a long one", "document": "word " * 9000}),
             json.dumps({"query": "a separator", "document": "before\u2028after"})]  # fmt: skip
    file = tmp_path / "a.jsonl"
    save(file, pairs(50))
    with open(file, "a", encoding="utf-8") as rows:
        rows.write("\n".join(lines) + "\n")
    meta = prepare(file, f"--out={tmp_path}/out", "--queries=0")
    assert meta["left out"]["stage2/a"] == {
        "not a JSON object": 3, "no document": 1, "not text": 2, "empty query": 1,
        "not valid Unicode": 1, "cut to 20,000 characters": 1,
    }  # fmt: skip
    assert meta["rows"]["stage2/a"] == 52
    assert f"{file}, row 51: not a JSON object" in capsys.readouterr().out


LINES = "".join(json.dumps(row) + "\n" for row in pairs(3000)).encode()
COMMANDS = [
    (["cut.jsonl.gz"], r"cut\.jsonl\.gz cannot be read"),
    (["latin.jsonl"], r"latin\.jsonl cannot be read.*utf-8"),
    (["damaged.parquet"], r"damaged\.parquet cannot be read"),
    (["other.jsonl"], "other: no query in {'question'.*--columns= names columns"),
    (["empty"], "empty: no .jsonl, .csv, .tsv or .parquet file"),
    (["missing.jsonl"], r"missing\.jsonl: no .jsonl"),
    (["good.jsonl", "old/good.jsonl"], "two sources are stage2/good"),
    (["good.jsonl", "--stage=4"], "--stage=4: give 2, weak pairs, or 3"),
    (["good.jsonl", "--columns=a"], "--columns=a: give two names"),
    (["good.jsonl", "--processes=257"], "--processes=257: give a whole number from 0 to 256"),
    (["good.jsonl", "--held-out=nowhere"], "nowhere/corpus.jsonl cannot be read"),
    ([], "no sources"),
    (["good.jsonl", "--paper"], "good.jsonl and --paper: give files, or --paper"),
    (["--paper", "--sources=squat"], "squat is not in the table"),
    (["--paper", "--stage=4"], "no sources"),
    (["--paper", "--local=nowhere"], "nowhere: there is no such folder"),
    (["--paper", "--local=empty"], "no sources"),
    (["--paper", "--sources=s2orc-abstract-body"], "no sources"),
]


@pytest.mark.parametrize("arguments, reason", COMMANDS)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINES)[:-2000])
    (tmp_path / "latin.jsonl").write_bytes(LINES + b'{"query": "caf\xe9"}\n')
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and then nothing")
    save(tmp_path / "other.jsonl", [{"question": "a", "answer": "b"}] * 30)
    save(tmp_path / "good.jsonl", pairs(30))
    save(tmp_path / "old/good.jsonl", pairs(30))
    (tmp_path / "empty").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=reason):
        prepare(*arguments, "--out=out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_cannot_be_added_to_leaves_the_folder_as_it_was(data, tmp_path):
    good, out = save(tmp_path / "good.jsonl", pairs(30)), tmp_path / "out"
    prepare(good, f"--out={out}")
    before = (out / "meta.json").read_bytes()
    for arguments, reason in {
        (good, "--limit=20"): "out has stage2/good already",
        (
            save(tmp_path / "x.jsonl", pairs(30, start=50)),
            f"--text={good}",
        ): "out has stage1/train already",
    }.items():
        with pytest.raises(InputError, match=reason):
            prepare(*arguments, f"--out={out}")
    assert (out / "meta.json").read_bytes() == before
    with pytest.raises(InputError, match="made by another script"):
        prepare(good, f"--out={data}")


# ------------------------------------------------------------------------------------------------
# The paper's data


def test_the_table_is_that_of_the_paper(capsys):
    table = script.paper_table()
    counts = {n: [int(r["pairs"]) for r in table if r["stage"] == str(n)] for n in (1, 2, 3)}
    assert len(counts[2]) == 29 and sum(counts[2]) == 234_553_344
    assert len(counts[3]) == 10 and sum(counts[3]) == 1_692_672
    assert all(count % 16_384 == 0 for count in counts[2]), "rounded to whole batches"
    assert all(count % 256 == 0 for count in counts[3])
    assert len({row["name"] for row in table}) == 41
    tasks = [row["prefix"] for row in table if row["stage"] == "2"]
    assert [tasks.count(t) for t in ("clustering", "classification", "search")] == [9, 12, 8]
    script.main(["--paper", "--list"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 41 and printed.count("no public copy") == 6


def test_shards_parquet_and_text_become_one_data_folder(tmp_path):
    local, out = tmp_path / "local", tmp_path / "out"
    for i in range(3):  # the published form: a folder of shards
        save(local / f"squad_full/shard-0000{i}.jsonl.gz", pairs(40, 2, start=40 * i))
    columns = ("title", "text")
    wiki = [
        dict(zip(columns, (sentence(i, 3), sentence(9000 + i, 30)), strict=True)) for i in range(80)
    ]
    save(local / "wikipedia.parquet", wiki)
    triples = [(sentence(i, 5), [sentence(20_000 + i)], [sentence(30_000 + i)]) for i in range(60)]
    triples = [dict(zip(("query", "pos", "neg"), row, strict=True)) for row in triples]
    save(local / "msmarco.jsonl.gz", triples)
    text = [{"title": "t", "text": sentence(50_000 + i, 50)} for i in range(400)]
    save(local / "wikipedia-text/a.parquet", text)
    rows = prepare("--paper", f"--local={local}", f"--out={out}")["rows"]
    text = rows.pop("stage1/train")
    assert rows == {"stage2/squad": 108, "stage2/wikipedia": 72, "stage3/msmarco": 54}
    tokenizer = load_tokenizer(out)
    squad, wikipedia = (Source(out / "stage2" / name, tokenizer) for name in ("squad", "wikipedia"))
    assert squad.meta["prefixes"]["query"] == "search_query: " and "negative" in squad.columns
    assert wikipedia.meta["prefixes"]["document"] == "classification: "
    assert all(len(own) == 1 for _, _, own in stored(out / "stage3/msmarco"))
    assert 380 <= text < 400 and len(Source(out / "stage1/dev", tokenizer)) > 0
    prepare("--paper", f"--local={local}", "--sources=squad", "--stage=2", f"--out={tmp_path}/one")
    assert [path.name for path in (tmp_path / "one/stage2").iterdir()] == ["squad"]
