"""The paper's data: the tables add up, and local copies of both forms go through, end to end."""

import gzip
import json

import pytest
from test_jsonl import pairs, sentence, stored

from data import hub
from data.store import Source, load_tokenizer, open_sources
from options import InputError


def shard(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def parquet(path, rows):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    pytest.importorskip("datasets")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def prepare(*arguments):
    hub.main([*map(str, arguments), "--processes=1", "--vocab-size=500"])


def test_the_tables_are_those_of_the_paper():
    assert len(hub.STAGE_2) == 29 and sum(row[2] for row in hub.STAGE_2) == 234_553_344
    assert len(hub.STAGE_3) == 10 and sum(row[2] for row in hub.STAGE_3) == 1_692_672
    assert all(row[2] % 16_384 == 0 for row in hub.STAGE_2), "rounded to whole batches"
    assert all(row[2] % 256 == 0 for row in hub.STAGE_3)
    names = [row[0] for table in hub.TABLES.values() for row in table]
    assert len(set(names)) == len(names)
    tasks = [row[1] for row in hub.STAGE_2]
    assert [tasks.count(t) for t in ("clustering", "classification", "search")] == [9, 12, 8]


def test_published_shards_parquet_and_text_become_one_data_folder(tmp_path):
    local = tmp_path / "local"
    for i in range(3):  # the bucket's form: a folder of shards
        shard(local / f"squad_full/shard-0000{i}.jsonl.gz", pairs(40, 2, start=40 * i))
    wiki = [
        {"id": str(i), "title": sentence(i, 3), "text": sentence(9000 + i, 30)} for i in range(80)
    ]
    parquet(local / "wikipedia.parquet", wiki)
    triples = [
        {"query": sentence(i, 5), "pos": [sentence(20_000 + i)], "neg": [sentence(30_000 + i)]}
        for i in range(60)
    ]
    shard(local / "msmarco.jsonl.gz", triples)
    parquet(
        local / "wikipedia-text/a.parquet",
        [{"title": "t", "text": sentence(50_000 + i, 50)} for i in range(400)],
    )
    prepare(f"--local={local}", f"--out={tmp_path}/out")
    tokenizer = load_tokenizer(tmp_path / "out")
    rows = {
        s.name: len(s) for k in (2, 3) for s in open_sources(tmp_path / f"out/stage{k}", tokenizer)
    }
    assert rows == {"squad": 108, "wikipedia": 72, "msmarco": 54}, "a tenth is held out"
    squad = Source(tmp_path / "out/stage2/squad", tokenizer)
    assert squad.meta["prefixes"]["query"] == "search_query: " and "negative" in squad.columns
    wikipedia = Source(tmp_path / "out/stage2/wikipedia", tokenizer)
    assert wikipedia.meta["prefixes"]["document"] == "classification: "
    assert all(len(own) == 1 for _, _, own in stored(tmp_path / "out/stage3/msmarco", tokenizer))
    text = Source(tmp_path / "out/stage1/train", tokenizer)
    assert 380 <= len(text) < 400 and len(Source(tmp_path / "out/stage1/dev", tokenizer)) > 0


def test_limit_takes_a_sample_of_each_source_and_sources_chooses(tmp_path):
    for name in ("squad", "quora"):
        shard(tmp_path / f"local/{name}.jsonl.gz", pairs(100, start=1000 * len(name)))
    common = [f"--local={tmp_path}/local", "--stage=2"]
    prepare(*common, f"--out={tmp_path}/a", "--limit=50")
    assert json.loads((tmp_path / "a/meta.json").read_text())["rows"]["stage2/squad"] == 45
    prepare(*common, f"--out={tmp_path}/b", "--sources=quora")
    assert [p.name for p in (tmp_path / "b/stage2").iterdir()] == ["quora"]


def test_rows_are_streamed_by_the_datasets_library_as_from_the_hub(tmp_path, monkeypatch):
    """The path that the network would take, with its two loads led to local files: lines of JSON
    that hold lists, and a table with columns."""
    datasets = pytest.importorskip("datasets")
    lists = [[sentence(i, 5) + "\u2028", sentence(1000 + i)] for i in range(60)]
    shard(tmp_path / "squad_pairs.jsonl.gz", lists)
    parquet(
        tmp_path / "wiki.parquet",
        [{"title": sentence(i, 3), "text": sentence(5000 + i)} for i in range(60)],
    )
    load_dataset = datasets.load_dataset

    def local(name, config=None, data_files=None, **options):
        if name == "wikimedia/wikipedia":
            return load_dataset("parquet", data_files=str(tmp_path / "wiki.parquet"), **options)
        assert data_files.startswith("hf://datasets/sentence-transformers/embedding-training-data/")
        return load_dataset(
            name, data_files=str(tmp_path / data_files.rpartition("/")[2]), **options
        )

    monkeypatch.setattr(datasets, "load_dataset", local)
    prepare("--stage=2", "--sources=squad,wikipedia", f"--out={tmp_path}/out")
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["rows"]["stage2/squad"] == meta["rows"]["stage2/wikipedia"] == 54


def test_a_hub_out_of_reach_is_one_line_and_what_was_done_is_kept(tmp_path, monkeypatch):
    shard(tmp_path / "local/squad.jsonl.gz", pairs(100))
    reached = True

    def load(*arguments, **options):
        if not reached:
            raise ConnectionError("no route to host")
        return [{"text": json.dumps([sentence(i, 5), sentence(1000 + i)])} for i in range(60)]

    monkeypatch.setattr(hub, "load", load)
    command = ["--stage=2", "--sources=squad,quora", f"--local={tmp_path}/local"]
    command += [f"--out={tmp_path}/out"]
    reached = False
    with pytest.raises(InputError, match="no route to host; nothing was left behind"):
        prepare(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["local"]
    reached, calls = True, []

    def second_time_fails(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise ConnectionError("no route to host")
        return load(*arguments, **options)

    monkeypatch.setattr(hub, "load", second_time_fails)
    with pytest.raises(InputError, match="no route to host; .*out.partial keeps what is done"):
        prepare(*command)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial/begun.json").is_file()
    prepare(*command)
    assert json.loads((tmp_path / "out/meta.json").read_text())["rows"]["stage2/quora"] == 54


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--sources=squat"], "squat is not among reddit, paq"),
        (["--stage=4"], "--stage=4: give 1, 2, 3"),
        (["--local=nowhere"], "nowhere: there is no such folder"),
        (["--sources=s2orc-abstract-body"], "s2orc-abstract-body: no public copy; --local="),
        (["--local={}/empty"], "has none of reddit"),
        (["--local={}/damaged"], "squad.parquet is no whole Parquet file"),
        (["--local={}/cut"], "quora.jsonl.gz cannot be read beyond line"),
        (["--local={}/wrong"], "squad: no row has query, document: its rows have a, b"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, options, reason):
    (tmp_path / "empty").mkdir()
    pytest.importorskip("datasets")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/squad.parquet").write_bytes(b"PAR1 and then nothing")
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in pairs(2000)).encode())
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut/quora.jsonl.gz").write_bytes(whole[:-2000])
    shard(tmp_path / "wrong/squad.jsonl.gz", [{"a": "x", "b": "y"}] * 30)
    before = sorted(path.name for path in tmp_path.iterdir())
    options = [option.format(tmp_path) for option in options]
    stage = [] if "--stage=4" in options else ["--stage=2"]
    with pytest.raises(InputError, match=reason):
        prepare(*stage, *options, f"--out={tmp_path}/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_tables_print(capsys):
    hub.main(["--list"])
    printed = capsys.readouterr().out
    assert "234,553,344 rows" in printed and printed.count("none: only a local copy") == 6
