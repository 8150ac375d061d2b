"""Pairs from files: what goes in comes out, and faults are counted by reason."""

import gzip
import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tiny import cases, read_jsonl, refused

from common.files import load_tokenizer, read_json
from data import pairs as script
from data.store import Source
from data.tasks import read_task, read_texts

WORDS = "amber birch cedar delta ember fjord grove heron inlet jetty knoll larch maple".split()


def sentence(seed, n=14):
    return " ".join(np.random.default_rng(seed).choice(WORDS, n)) + f" {seed}"


def pair(i, negatives):
    row = {"query": f"what about {sentence(i, 4)}?", "document": sentence(10**6 + i)}
    return {**row, "negatives": [sentence(2 * 10**6 + 10 * i + j) for j in range(negatives)]}


def pairs(n, negatives=0, start=0):
    return [pair(i, i % (negatives + 1)) for i in range(start, start + n)]


def save(path, rows):
    """Writes rows in the form that the file's name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return str(path)


def prepare(out, *arguments):
    script.main([*map(str, arguments), f"--out={out}", "--vocab-size=400"])
    return read_json(f"{out}/meta.json")


def stored(source):
    """(query, document, negatives) of every row, in text and as the tokens on disk say."""
    rows = read_jsonl(source / "pairs.jsonl")
    tokenizer = load_tokenizer(source.parents[1])
    on_disk = Source(source, tokenizer)
    assert len(on_disk) == len(rows)
    for i, row in enumerate(rows):
        ids = [on_disk.columns[name][i].tolist() for name in ("query", "document")]
        ids += [on_disk.columns["negative"][j].tolist() for j in on_disk.negatives(i)]
        texts = [row["query"], row["document"], *row["negatives"]]
        assert ids == [tokenizer.encode(text).ids for text in texts]
    return [tuple(row.values()) for row in rows]


@pytest.mark.parametrize("name", ["faq.jsonl.gz", "faq.parquet"])
def test_rows_and_their_negatives_come_back_from_disk(name, tmp_path):
    rows, out = pairs(300, negatives=3), tmp_path / "out"
    prepare(out, f"--stage3={save(tmp_path / name, rows)}", "--queries=10")
    held = set(read_texts(out / "retrieval/faq/queries.jsonl").values())
    expected = [tuple(row.values()) for row in rows if row["query"] not in held]
    assert len(held) == 10 and stored(out / "stage3/faq") == expected
    source = Source(out / "stage3/faq", load_tokenizer(out))
    assert source.prefixes["negative"] == source.prefixes["document"]


def test_copies_of_earlier_rows_are_left_out_and_counted(tmp_path):
    file = save(tmp_path / "a.jsonl", pairs(1500, negatives=2) + pairs(50))
    meta = prepare(tmp_path / "out", file, "--queries=20")
    held = 20 + meta["left out"]["stage2/a"]["copy of another row"]
    rows = stored(tmp_path / "out/stage2/a")
    assert len(set(map(str, rows))) == len(rows) == 1480 and 60 < held <= 70


FORMS = {  # file: row i, and the pairs that it gives
    "lines.CSV": lambda i: (f'"{i}\ntwo, {i}",{i:09}', [(f"{i}\ntwo, {i}", f"{i:09}", [])]),
    "lists.jsonl": lambda i: (f'["ask {i}", "{i}", "not"]', [(f"ask {i}", f"{i}", ["not"])]),
    "sets.jsonl": lambda i: (f'{{"set": ["1 {i}", "2 {i}", "3"]}}', [(f"1 {i}", f"2 {i}", [])]),
    "several.jsonl": lambda i: (
        f'{{"set": ["v"], "title": "{i}", "body": ["a {i}", "b {i}"], "no": ["c", null, ""]}}',
        [(f"{i}", f"a {i}", ["c"]), (f"{i}", f"b {i}", ["c"])],
    ),
    "string.jsonl": lambda i: (
        f'{{"title": "{i}", "body": "a\u2028{i}", "no": "c"}}\n',
        [(f"{i}", f"a\u2028{i}", ["c"])],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_other_forms_of_rows_are_read(name, tmp_path):
    rows, expected = zip(*map(FORMS[name], range(40)), strict=True)
    header = "\ufefftitle,body\n" if name == "lines.CSV" else "\ufeff"
    (tmp_path / name).write_text(header + "\n".join(rows), encoding="utf-8")
    columns = "set" if name == "sets.jsonl" else "title,body,no"
    meta = prepare(tmp_path / "out", tmp_path / name, f"--columns={columns}")
    source = name.split(".")[0]
    assert not meta["left out"][f"stage2/{source}"]
    held = set(read_texts(tmp_path / f"out/retrieval/{source}/queries.jsonl").values())
    expected = [pair for pairs in expected for pair in pairs if pair[0] not in held]
    assert len(held) == 4 and stored(tmp_path / "out/stage2" / source) == expected


@cases(
    "argument, place, prefixes",
    ("faq.jsonl", "faq.jsonl", ("search_query: ", "search_document: ")),
    ("faq.jsonl:search_query:none", "faq.jsonl", ("search_query: ", "")),
    (r"C:\notes\a.csv:clustering", r"C:\notes\a.csv", ("clustering: ", "clustering: ")),
    ("none:none.jsonl:none", "none:none.jsonl", ("", "")),
    ("owner/name part:clustering", "owner/name part", ("clustering: ", "clustering: ")),
)
def test_prefixes_stand_behind_the_last_colons(argument, place, prefixes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "owner" not in place:
        (tmp_path / place).write_text("{}")
    source = script.source_of(argument, 2, ["query", "document"])
    assert source.places == [place] and tuple(source.prefixes.values()) == prefixes


def test_stage_1_reads_the_documents_once_each_or_the_text_that_is_given(tmp_path):
    again = [{**row, "query": f"again, {sentence(77 + i, 4)}?"} for i, row in enumerate(pairs(30))]
    file = save(tmp_path / "a.jsonl", pairs(60) + again)
    prepare(tmp_path / "one", file, f"--stage3={save(tmp_path / 'b.jsonl', pairs(30))}")
    train = Source(tmp_path / "one/stage1/train", load_tokenizer(tmp_path / "one"))
    texts = [bytes(train.columns["document"][i]) for i in range(len(train))]
    assert len(set(texts)) == len(texts) and 40 <= len(texts) <= 60
    more = save(tmp_path / "more.jsonl", [{"text": sentence(i, 40)} for i in range(300)])
    prepare(tmp_path / "two", file, f"--text={more}")
    tokenizer = load_tokenizer(tmp_path / "two")
    sizes = [len(Source(tmp_path / f"two/stage1/{s}", tokenizer)) for s in ("train", "dev", "test")]
    assert sizes[0] == 270 and sizes[1] > 12 and sizes[2] > 18


def test_limit_takes_the_first_rows_and_the_same_command_does_nothing(tmp_path, capsys):
    command = (tmp_path / "out", save(tmp_path / "a.jsonl", pairs(100)), "--limit=50")
    assert prepare(*command)["rows"]["stage2/a"] == 45
    assert prepare(*command) and "nothing to do" in capsys.readouterr().out


def test_what_is_held_out_here_or_elsewhere_is_in_no_source(tmp_path):
    """Another source asks the same in other words, a third repeats the documents of a task."""

    def answers_of(task):
        documents, _, judged, _ = read_task(task, "test")
        return {documents[name] for answers in judged.values() for name in answers}

    prepare(tmp_path / "first", save(tmp_path / "old.jsonl", pairs(200, start=5000)))
    held = answers_of(task := tmp_path / "first/retrieval/old")
    leaked = [{"query": f"new {text[:9]}", "document": f"{text} and more"} for text in held][:3]
    leaked += [{**pair(940 + i, 0), "negatives": ["a", max(held)]} for i in range(2)]
    leaked += [{"query": "an answer of one word", "document": "Yes."}]
    with open(task / "corpus.jsonl", "a") as corpus, open(task / "qrels/test.tsv", "a") as qrels:
        corpus.write('{"_id": "short", "text": "yes"}\n')
        qrels.write("test-0\tshort\t1\n")
    again = [{**row, "query": f"again {row['query']}"} for row in pairs(200)]
    files = {"a": pairs(200), "b": again, "c": pairs(9, start=900) + leaked}
    a, b, c = (save(tmp_path / f"{name}.jsonl", rows) for name, rows in files.items())
    meta = prepare(tmp_path / "out", a, c, f"--stage3={b}", f"--held-out={task}")
    found = meta["contamination"]["sources"]
    assert found["stage2/c"] == {"near held-out text": 3, "equal to held-out text": 3}
    assert meta["rows"]["stage2/c"] == 9
    held |= answers_of(tmp_path / "out/retrieval/a") | answers_of(tmp_path / "out/retrieval/b")
    for source in ("stage2/a", "stage3/b"):
        rows = stored(tmp_path / "out" / source)
        assert len(rows) > 100 and held.isdisjoint(document for _, document, _ in rows)


FAULTS = {
    '{"query": "cut off': "not a JSON object",
    '"a string"': "not a JSON object",
    "[" * 100_000: "not a JSON object",
    '{"query": "no document"}': "no document",
    '{"query": "one of two", "document": ["a", null]}': "no document",
    '{"query": " ", "document": "nothing asked"}': "no query",
    '{"query": 3, "document": "a number"}': "not text",
    r'{"query": "half a \ud800", "document": "pair"}': "not valid Unicode",
}


def test_faulty_rows_are_counted_by_reason_and_the_first_is_shown(tmp_path, capsys):
    file = save(tmp_path / "a.jsonl", pairs(50))
    with open(file, "a") as rows:
        rows.writelines(f"{line}\n" for line in FAULTS)
    meta = prepare(tmp_path / "out", file, "--queries=0")
    reasons = list(FAULTS.values())
    assert meta["left out"]["stage2/a"] == {reason: reasons.count(reason) for reason in reasons}
    assert meta["rows"]["stage2/a"] == 50
    printed = capsys.readouterr().out
    assert "left out: 3 not a JSON object, the first in row 51: {" in printed
    assert "no held-out queries: 2 are needed; the most are --queries=0, and a" in printed


COMMANDS = [
    (["cut.jsonl.gz"], r"cut\.jsonl\.gz cannot be read"),
    (["damaged.parquet"], r"damaged\.parquet cannot be read"),
    (["other.jsonl"], "other: no query in row 1: .*; give query, document, neg"),
    (["commas.csv"], "commas: more fields than the header in row 1"),
    (["blank.jsonl"], "blank: no rows"),
    (["good.jsonl", "--stage3=good.jsonl"], "two sources have one name, rename a file: good"),
    (["good.jsonl", "--columns=a,b,c,d"], "--columns=a,b,c,d: give two names"),
    (["good.jsonl:querry"], "good.jsonl:querry: there is no such .*; prefixes are search_query, "),
    (["good.jsonl", "--text=other.jsonl"], "--text: no text in row 1"),
    ([], "no sources"),
    (["--sources=squat"], "squat is not in data/paper.tsv"),
]


@cases("arguments, reason", COMMANDS)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    lines = b'{"query": "a question", "document": "its answer"}\n' * 3000
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-200])
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and then nothing")
    save(tmp_path / "other.jsonl", [{"question": "a", "answer": "b"}] * 30)
    save(tmp_path / "good.jsonl", pairs(30))
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "commas.csv").write_text("query,document\na question,an answer, with a comma\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    with refused(reason):
        prepare("out", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_table_is_that_of_the_paper():
    table = script.paper_table()
    weak, supervised = ([int(r["pairs"]) for r in table if r["stage"] == n] for n in "23")
    assert (len(weak), sum(weak)) == (29, 234_553_344)
    assert (len(supervised), sum(supervised)) == (10, 1_692_672)
    assert all(count % 16_384 == 0 for count in weak), "rounded to whole batches"
    assert len({row["name"] for row in table}) == 41
    tasks = [row["prefix"].split("_")[0] for row in table if row["stage"] == "2"]
    assert [tasks.count(t) for t in ("clustering", "classification", "search")] == [9, 12, 8]


def test_the_sources_of_the_paper_have_its_prefixes_and_a_place_where_there_is_one(capsys):
    sources, text = script.paper_sources(["squad", "msmarco", "medi-wiki", "wikipedia-text"])
    assert text == ["wikimedia/wikipedia 20231101.en"] and "medi-wiki" in capsys.readouterr().out
    squad, msmarco = sources
    assert squad.places[0].endswith("/squad_pairs.jsonl.gz")
    assert (squad.stage, squad.columns) == (2, ["0", "1"])
    assert squad.prefixes["query"] == "search_query: "
    assert (msmarco.stage, msmarco.columns) == (3, ["query", "pos", "neg"])
    assert len(script.paper_sources([])[0]) == 33
