"""Consistency filtering: shuffled pairs go, real ones stay, and nothing else changes."""

import numpy as np
import pytest
from tiny import cases, read_jsonl, refused, start_group, tiny_model, unit_rows, write_pairs

from common.files import fingerprint, load_tokenizer, read_json, write_json
from data import filter as filtering
from data import prepare
from data.store import Source
from data.tokenizer import save_tokenizer, train_tokenizer

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
    """A data folder of 100 real pairs and 40 shuffled ones in a source, and 15 of each in another,
    which has negatives and a weight."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    texts = [sentence(rng) for _ in range(140)]
    documents = [" ".join(reversed(text.split())) for text in texts]  # the same words
    documents[100:] = np.roll(documents[100:], 1).tolist()
    tokenizer = train_tokenizer(texts, vocab_size=200)
    write_pairs(data / "stage2/mixed", zip(texts, documents, strict=True), tokenizer, PREFIXES)
    documents[15:30] = [sentence(rng) for _ in range(15)]
    rows = [{"query": texts[i], "document": documents[i]} for i in range(30)]
    rows = [{**row, "negatives": WORDS[: i % 3]} for i, row in enumerate(rows)]
    prepare.write_source(data / "stage2/other", rows, PREFIXES, tokenizer)
    weighted = data / "stage2/other/meta.json"
    write_json(weighted, {**read_json(weighted), "weight": 3})
    save_tokenizer(data, tokenizer)
    rows = {"stage2/mixed": 140, "stage2/other": 30}
    write_json(data / "meta.json", {"made_by": "nanoembed", "rows": rows})
    return data


PREFIXES = {"query": "a: ", "document": "b: "}


def lines(path):
    return path.read_text("utf-8").splitlines()


def run(folder, judge, *options):
    filtering.main([str(folder), f"--judge={judge}", *options])
    return folder.with_name(folder.name + "-filtered")


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
    kept = lines(out / "stage2/mixed/pairs.jsonl")
    before = lines(folder / "stage2/mixed/pairs.jsonl")
    real = sum(line in before[:100] for line in kept)
    assert real >= 95 and len(kept) - real <= 4
    shown = capsys.readouterr().out
    assert f"mixed: kept {len(kept)} of 140 pairs" in shown and shown.count("removed: ") == 4


def test_a_document_in_many_rows_does_not_push_itself_out(folder, judge):
    """Ten different queries share a document; all of them stay, though two are the limit."""
    text = " ".join(WORDS[:6])
    pairs = [(f"{text} {word}", text) for word in WORDS[6:16]]
    pairs += [(word * 3, word * 2) for word in WORDS[20:40]]
    write_pairs(folder / "stage2/shared", pairs, load_tokenizer(folder), PREFIXES)
    out = run(folder, judge, "--sources=shared")
    kept = lines(out / "stage2/shared/pairs.jsonl")
    assert kept[:10] == lines(folder / "stage2/shared/pairs.jsonl")[:10]


def test_pairs_are_compared_within_blocks_of_equal_size(folder, judge):
    """30 pairs in blocks of at most 12: three of 10. What is judged in one is judged as if the
    source had no other rows."""
    source, options = folder / "stage2/other", filtering.Options(str(judge), block=12)
    encode = filtering.open_judge(options, "cpu")
    pairs = read_jsonl(source / "pairs.jsonl")
    kept = filtering.judge_source(encode, source, options, "cpu")
    blocks = [pairs[begin : begin + 10] for begin in (0, 10, 20)]
    alone = [filtering.judge_block(encode, b, PREFIXES, options, "cpu")[:, 0] for b in blocks]
    assert kept.tolist() == np.concatenate(alone).tolist()
    whole = filtering.judge_block(encode, pairs, PREFIXES, options, "cpu")[:, 0]
    assert kept.sum() > whole.sum(), "in a larger block fewer stay"


def test_rows_that_stay_keep_their_tokens_and_all_else_is_copied(folder, judge):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    out = run(folder, judge)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert (folder / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
    tokenizer, meta = load_tokenizer(out), read_json(out / "meta.json")
    for name, weight in (("mixed", 1), ("other", 3)):
        old, new = (Source(d / "stage2" / name, tokenizer) for d in (folder, out))
        rows = {line: i for i, line in enumerate(lines(folder / f"stage2/{name}/pairs.jsonl"))}
        kept = [rows[line] for line in lines(out / f"stage2/{name}/pairs.jsonl")]
        assert len(new) == len(kept) < len(old) and new.weight == weight
        for i, row in enumerate(kept):
            places = [("query", [i], [row]), ("document", [i], [row])]
            places += [("negative", new.negatives(i), old.negatives(row))] * (name == "other")
            for side, now, then in places:
                texts = [s.texts(side, rows, 99) for s, rows in ((new, now), (old, then))]
                assert len(texts[0]) == len(texts[1]) and all(map(np.array_equal, *texts))
        assert meta["filtered"][name] == {"rows": len(old), "kept": len(kept)}
        assert meta["rows"][f"stage2/{name}"] == len(kept)
    how = meta["inputs"]["filtered"]
    assert (how["judge"], how["top"], how["block"]) == (str(judge), 2, 1_000_000)
    assert how["weights"] == fingerprint(judge / "model.safetensors")


@cases(
    "options, message",
    (["--sources=mixed,nothing"], "--sources=nothing: .*has mixed, other"),
    (["--judge=nowhere"], "there is no checkpoint directory nowhere"),
    (["more"], "give one data folder"),
    (["--top=3", "--block=3"], "--top=3: in blocks of 3 pairs, all would stay"),
    (["--out=./data/more"], "--out=data/more is within .*data, which is read"),
)
def test_bad_input_is_one_line_and_leaves_nothing(options, message, folder, judge, monkeypatch):
    monkeypatch.chdir(folder.parent)
    with refused(message):
        run(folder, judge, *options)
    assert [path.name for path in folder.parent.iterdir()] == ["data"]


def test_a_folder_that_is_there_is_not_overwritten(folder, judge, capsys, monkeypatch):
    run(folder, judge)
    monkeypatch.chdir(folder)
    filtering.main([".", f"--judge={judge}"])
    assert "made from the same inputs: nothing to do" in capsys.readouterr().out
    path = folder / "stage2/other/pairs.jsonl"
    path.write_text(path.read_text()[::-1])
    with refused("was made from other inputs .filtered."):
        run(folder, judge)


@cases("end", [], ["{}"] * 2, ['{"query": "a", "document": 3}'])
def test_text_that_does_not_fit_the_tokens_is_named(end, folder, judge):
    path = folder / "stage2/mixed/pairs.jsonl"
    path.write_text("\n".join([*lines(path)[:139], *end]))
    with refused("mixed/pairs.jsonl has not 140 pairs: prepare"):
        run(folder, judge)


def test_several_processes_keep_the_same_pairs(folder, judge):
    alone, out = run(folder, judge), folder.parent / "two"
    start_group(2, lambda *_: run(folder, judge, f"--out={out}"))
    kept, expected = (
        {path.parent.name: lines(path) for path in data.glob("stage2/*/pairs.jsonl")}
        for data in (out, alone)
    )
    assert kept == expected and len(kept["mixed"]) >= 95
