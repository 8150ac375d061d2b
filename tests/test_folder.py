"""A folder of notes: what a person would read aloud is kept, and files are held out whole."""

import os
import re
import sys

import numpy as np
import pytest
from tiny import cases, read_jsonl, refused

from common.files import fingerprint, load_tokenizer, read_json, write_json
from data import folder, prepare
from data.batches import PairBatches
from data.duplicates import words
from data.markup import read_markup
from data.store import Source, open_sources
from data.tasks import read_task

TASK = "retrieval/heading-section"

MARKDOWN = """---
title: "Growing leeks"
---
<!-- not for readers -->
Leeks like a *deep* bed, see [the **book**](https://example.org/a_(b)) and [this][ref].[^1]

## Sowing `seed` {#sow}

Sow in <b>March</b>. ![a picture](x.png)

| month | depth |
|-------|:-----:|
| March | 1 cm  |

```python
# no heading
sow()
```

### Too early

> Frost takes them. <https://example.org>

License
-------
All rights reserved.

[ref]: https://example.org/ref
[^1]: A note.
"""
MARKDOWN_SECTIONS = [
    ((), "Leeks like a deep bed, see the book and this."),
    (
        ("Sowing seed",),
        "Sow in March. a picture\n\nmonth, depth\nMarch, 1 cm\n\n# no heading\nsow()",
    ),
    (("Sowing seed", "Too early"), "Frost takes them."),
]


@cases(
    "text, suffix, title, sections",
    (MARKDOWN, ".md", "Growing leeks", MARKDOWN_SECTIONS),
    ("On leeks\n\nThey grow.", ".txt", "On leeks", [((), "They grow.")]),
    ("# One\n\n# Two\n\ntext", ".md", "One", [(("Two",), "text")]),
    ("# A\n\na\n\n# B\n\nb", ".md", "", [(("A",), "a"), (("B",), "b")]),
    ("# A\n\n## B\n\n### C\n\nc", ".md", "A", [(("B", "C"), "c")]),
    ("---\ntitle: T\n---\n# T\n\n## S\n\nx", ".md", "T", [(("S",), "x")]),
    ("---\n\na: b\n\n# T\n\n---\n\nc", ".md", "T", [((), "a: b"), ((), "c")]),
)
def test_markup_becomes_a_title_and_sections(text, suffix, title, sections):
    assert read_markup(text, suffix) == (title, sections)


@cases(
    "text, prose",
    ("1. one\n2. two\n\n   ```\n   f()\n   ```", "- one\n- two\nf()"),
    ("- [ ] to do\n- [x] done\n\n> [!tip]- Title\n> body", "- to do\n- done\n\nTitle\nbody"),
    ('!!! note "Heat"\n    *a*\n\n    - b', "Heat\n\na\n\n- b"),
    ("![[x.png]][[page|the *nice* one]], [[p]], [[1], [2]]", "the nice one, p, [[1], [2]]"),
    ("a<br>b &lt;c&gt; ~~d~~ `<!-- e -->`", "a\nb <c> d <!-- e -->"),
    ("<div>\na < b and c > d<p>e</div>", "a < b and c > d\ne"),
    ("<style>\na {}\n\nb {}\n</style>\nx `<script>`<script>y</script>", "x <script>"),
    ("heat.[^1] [^abc]\n\n[^1]: https://example.org", "heat. [^abc]"),
    ("f () (https://example.org), `g ()`", "f (), g ()"),
    ("x:\n$$ Q\n=\n# a\n$$\nb", "x:\n\n$$ Q\n=\n# a\n$$\n\nb"),
    ("$a*b*c$, $5 or *$6*", "$a*b*c$, $5 or $6"),
    ("{{< x >}}a%%b%% {% c %}{{ d }}{: .e } `{{ f }}` 5%% ^g", "a  {{ f }} 5%%"),
    ("```c\nvoid f () {" + "\n\n# x" * 30, "void f () {" + "\n\n# x" * 30),
    *((text, text) for text in ("\\begin{align}\na\n-\nb\n\\end{align}", "\\[\na\n=\n\\]")),
)
def test_a_section_is_what_a_person_would_read_aloud(text, prose):
    assert read_markup(text, ".md") == ("", [((), prose)])


@cases(
    "fields, title",
    ("---\ndate created: 2024-13-45\ntitle: 007\n---", "007"),
    ('--- \r\n"title": T # comment\r\n...\r', "T"),
    *((f"---\na: b\ntitle: {nothing}\n---", "") for nothing in ("", "null", "[a]")),
    ("+++\ntitle = 'T'\n[params]\ntitle = 'x'\n+++", "T"),
)
def test_front_matter_is_a_mapping_in_yaml_or_toml(fields, title):
    assert read_markup(f"{fields}\nx", ".md") == (title, [((), "x")])


@cases("text", ["a: b: c", "[a", "- a", "a", "a: " + "[" * 3000])
def test_what_yaml_and_toml_refuse_is_text(text):
    for rule in ("---", "+++"):
        assert text[0] in str(read_markup(f"{rule}\n{text}\n{rule}\n\nx", ".md"))


@cases("text", "*a **b " * 400, "> " * 400 + "a", "![" * 400 + "a" + "](x)" * 400, "---")
def test_odd_fragments_are_read(text):
    assert "a" not in text or "a" in read_markup(text, ".md")[1][0][1]
    assert read_markup(text, ".txt") == ("", [((), text.strip())])


COUNTS = {"हिन्दी में": 2, "שָׁלוֹם": 1, "မြန်မာ": 3, "中文": 2}
COUNTS |= {"cafe\u0301s don't": 3, "a_b c1 \u2764\ufe0f": 2}


@cases("text, count", COUNTS.items())
def test_vowel_signs_and_accents_are_part_of_a_word(text, count):
    assert len(words(text)) == count


WORDS = "bed seed frost leek water stone spade rain slug mulch root stem leaf soil sun".split()
WORDS += "wind shade lime peat moss rake hoe fork twine glass pot tray cold heat north".split()


def write_notes(where, files=40, sections=4, heading="## Part {j} of {i}", suffix=".md"):
    """Files of sections, each with its own words: no two are alike."""
    rng = np.random.default_rng(0)
    where.mkdir()
    for i in range(files):
        parts = [f"# Note {i} on {rng.choice(WORDS)}"]
        for j in range(sections):
            opening, rest = (" ".join(rng.choice(WORDS, n)) + "." for n in (20, 40))
            parts += [heading.format(i=i, j=j), opening, rest]
        (where / f"note-{i}{suffix}").write_text("\n\n".join(parts))


def prepare_folder(notes, out, *options):
    folder.main([str(notes), f"--out={out}", "--vocab-size=400", *options])
    return read_json(out / "meta.json")


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    where = tmp_path_factory.mktemp("folder")
    write_notes(where / "notes")
    prepare_folder(where / "notes", where / "out")
    return where


def training_text(out):
    paths = out.glob("stage[23]/*/pairs.jsonl")
    return [text for path in paths for row in read_jsonl(path) for text in row.values()]


def test_files_are_held_out_whole_and_every_stage_has_its_sources(notes):
    out, held = notes / "out", set()
    for split in ("dev", "test"):
        documents, queries, judged, _ = read_task(out / TASK, split)
        assert len(documents) == 160, "sections of all files are the pool"
        held |= {queries[query].split(" > ")[0] for query in judged}
    titles = {text.split(" >")[0].split("\n")[0] for text in training_text(out)}
    assert len(held) >= 2 and not held & titles
    tokenizer = load_tokenizer(out)
    names = [[s.name for s in open_sources(out / f"stage{n}", tokenizer)] for n in (2, 3)]
    assert names == [["heading-section", "opening-rest", "title-document"], ["heading-section"]]
    assert len(Source(out / "stage1/dev", tokenizer)) and (out / "search/corpus.jsonl").is_file()


def test_preparing_again_does_nothing_and_changed_notes_need_another_folder(notes, capsys):
    prepare_folder(notes / "notes", notes / "out", "--show=5")
    printed = capsys.readouterr().out
    assert "nothing to do" in printed and printed.count("\n---") == 5
    prepare_folder(f"{notes}/../{notes.name}/notes//", notes / "out")
    (notes / "notes" / "note-3.md").write_text("# Changed\n\n" + "other words " * 20)
    with refused("out was made from other inputs .texts.: remove it"):
        prepare_folder(notes / "notes", notes / "out")


def test_notes_without_headings_have_a_task_too(tmp_path):
    write_notes(tmp_path / "notes", 30, 1, "", ".txt")
    meta, task = prepare_folder(tmp_path / "notes", tmp_path / "out"), "title-document"
    assert meta["rows"][f"stage3/{task}"] > 0 and meta["rows"]["stage2/opening-rest"] > 0
    assert all(read_task(tmp_path / "out/retrieval" / task, split)[2] for split in ("dev", "test"))


@pytest.fixture
def paragraphs(tmp_path):
    """Files of one paragraph each, of three sentences, that have no name but a number."""
    rng, where = np.random.default_rng(0), tmp_path / "paragraphs"
    where.mkdir()
    for n in range(20):
        sentences = [" ".join(rng.choice(WORDS, 10)) + "." for _ in range(3)]
        (where / f"{n}.md").write_text(" ".join(sentences))
    return where


def test_each_sentence_of_a_paragraph_alone_finds_it_and_a_number_is_no_title(paragraphs, tmp_path):
    meta = prepare_folder(paragraphs, tmp_path / "out")
    assert [name for name in meta["rows"] if name.startswith("stage2/")] == ["stage2/sentence-text"]
    pairs = read_jsonl(tmp_path / "out/stage2/sentence-text/pairs.jsonl")
    assert all(pair["query"] in pair["document"] for pair in pairs)
    assert len(pairs) == 3 * len({pair["document"] for pair in pairs}), "of three sentences each"
    documents, queries, *_ = read_task(tmp_path / "out/retrieval/sentence-text", "test")
    assert not any(query in text for query in queries.values() for text in documents.values())


def test_one_batch_in_five_is_of_ones_own_pairs_however_few_they_are(paragraphs, notes, tmp_path):
    prepare_folder(paragraphs, out := tmp_path / "out", f"--add={notes}/out")
    tokenizer = load_tokenizer(out)
    for batch_size, error in ((1, 0.01), (64, 0.06)):  # 64 are more than there are of one's own
        pairs = PairBatches(open_sources(out / "stage2", tokenizer), batch_size, seed=0)
        own = [pairs.at(i)[0].name == "sentence-text" for i in range(len(pairs.source_of))]
        weights = {source.name: source.weight for source in pairs.sources}
        assert abs(np.mean(own) - 0.2) < error and weights["sentence-text"] > 1
    weights = {source.weight for source in open_sources(out / "stage3", tokenizer)}
    assert weights == {1}, "there more than a fifth are one's own anyway"


SCRIPTS = {
    "Chinese": ("", "韭葱喜欢深厚的土壤和充足阳光水分种子春天播下夏天收获冬季寒冷根茎叶"),
    "Hindi": (" ", "मिट्टी पानी बीज वर्षा सूर्य छाया पत्ती हिन्दी में लिखा हुआ पाठ गहरी क्यारी".split()),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_scripts_are_read_and_unknown_text_is_refused(script, notes, tmp_path, capsys):
    separator, units = SCRIPTS[script]
    rng = np.random.default_rng(0)
    (tmp_path / "notes").mkdir()
    for i in range(30):
        texts = [separator.join(rng.choice(list(units), n)) for n in (6, 40, 6, 40)]
        text = "# {}\n\n{}\n\n## {}\n\n{}\n".format(*texts)
        (tmp_path / "notes" / f"{i}.md").write_text(text, encoding="utf-8")
    meta = prepare_folder(tmp_path / "notes", tmp_path / "own")
    printed = capsys.readouterr().out
    assert meta["rows"]["stage3/heading-section"] > 20 and "warning" not in printed
    assert float(re.search(r"([\d.]+)% of [\d,]+ tokens are \[UNK\]", printed)[1]) < 5
    for option in (f"--tokenizer={notes}/out", f"--add={notes}/out"):
        with refused("the tokenizer does not know .*% of this text: leave out --add"):
            prepare_folder(tmp_path / "notes", tmp_path / "english", option)
    assert not (tmp_path / "english").exists()


@cases("unknown, said", (5, ""), (6, "warning: the tokenizer does not know 6%"), (30, "warning"))
def test_some_unknown_text_is_a_warning(unknown, said, tmp_path, capsys):
    write_json(tmp_path / "x/meta.json", {"tokens": {"document": 100}, "unknown": unknown})
    prepare.check_unknown(tmp_path, ["x"])
    printed = capsys.readouterr().out
    assert said in printed and ("warning" in printed) == bool(said)


def test_what_is_added_is_there_token_for_token_without_what_is_held_out(notes, tmp_path):
    write_notes(tmp_path / "other", files=12, sections=3)
    documents, _, judged, _ = read_task(notes / "out" / TASK, "test")
    leaked = documents[next(iter(next(iter(judged.values()))))]
    (tmp_path / "other" / "leak.md").write_text(f"# Leak\n\n## The very same\n\n{leaked}\n")
    prepare_folder(tmp_path / "other", tmp_path / "added")
    meta = prepare_folder(notes / "notes", tmp_path / "out", f"--add={tmp_path}/added")
    tokenizer = load_tokenizer(tmp_path / "out")
    assert fingerprint(tokenizer) == fingerprint(load_tokenizer(tmp_path / "added"))
    before = Source(tmp_path / "added/stage2/heading-section", tokenizer)
    after = Source(tmp_path / "out/stage2/heading-section-added", tokenizer)
    kept, rows = ({bytes(s.columns["document"][i]) for i in range(len(s))} for s in (after, before))
    assert kept < rows and 0 < len(before) - len(after) <= 8
    assert not any(leaked[:60] in text for text in training_text(tmp_path / "out"))
    assert meta["contamination"]["sources"]["stage2/heading-section-added"]
    with refused("--add brings its tokenizer"):
        folder.main([str(notes), f"--add={tmp_path}/added", f"--tokenizer={tmp_path}/added"])


def test_which_files_are_read(tmp_path, capsys):
    write_notes(tmp_path / "notes", files=5)
    files = {
        "copy.md": (tmp_path / "notes/note-0.md").read_text(),
        ".git/x.md": "never read",
        "._blank.md": "never read",
        "node_modules/x.md": "never read",
        "_building/a kiln.md": "# K\n\n" + "of bricks and clay " * 10,
        "below/plain.TXT": "\ufeffOn leeks\r\n\r\n" + "they grow in any bed " * 10,
        "chinese.md": "# 韭葱\n\n韭葱喜欢深厚的土壤和充足的阳光",
        "blank.md": "\n",
        "picture.png": "no text",
    }
    for name, text in files.items():
        (tmp_path / "notes" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "notes" / name).write_text(text, encoding="utf-8")
    meta = prepare_folder(tmp_path / "notes", tmp_path / "out")
    reasons = ("hidden, or in a built folder", "copy of another file", "fewer than ten words")
    left_out = dict(zip(reasons, (3, 1, 1), strict=True))
    assert meta["files"] == {"read": 8, **left_out}
    printed = capsys.readouterr().out
    assert all(f"{count} {reason}" in printed for reason, count in left_out.items())
    assert '"On leeks\\n\\nthey grow' in (tmp_path / "out/search/corpus.jsonl").read_text("utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_any_name_is_an_id_and_links_to_folders_are_counted(tmp_path):
    write_notes(tmp_path / "notes", files=6)
    for i, name in enumerate([b"a\tb.md", b"c\nd\r.md", b"caf\xe9.md", b"e\\f.md"]):
        (tmp_path / f"notes/note-{i}.md").rename(tmp_path / "notes" / os.fsdecode(name))
    (tmp_path / "notes/loop").symlink_to(tmp_path / "notes")
    meta = prepare_folder(tmp_path / "notes", tmp_path / "out")
    assert meta["files"] == {"read": 6, "link to a folder or to nothing": 1}
    names = {r"a\tb.md", r"c\nd\r.md", r"caf\udce9.md", r"e\\f.md", "note-4.md", "note-5.md"}
    assert {row["_id"] for row in read_jsonl(tmp_path / "out/search/corpus.jsonl")} == names
    assert all(read_task(tmp_path / "out" / TASK, split)[2] for split in ("dev", "test"))


LONG = "one of the words that are enough of them for a text to be a text "


@cases(
    "texts, reason",
    ([], "no file of .md"),
    ([LONG * 2], "3 are needed"),
    ([LONG * 2, "# B\n\ncaf\xe9"], "1.md, line 3: not UTF-8"),
    ([f"# T\n\n## {i}\n\n{LONG * 3}" for i in range(6)], "1 read, 5 copy of another file"),
    ([f"# {i}\n\n## a\n\n{LONG}" for i in "abcdef"], "pairs too short"),
    ([f"# J\n\n## A\n\n{LONG.replace(' ', ' ' + i)}" for i in "abcdef"], "with equal headings"),
)
def test_bad_folders_are_one_line_that_says_why_and_leave_nothing(tmp_path, texts, reason):
    (tmp_path / "notes").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "notes" / f"{i}.md").write_text(text, "latin-1")
    for name, message in (("notes", reason), ("nowhere", "nowhere is not a folder")):
        with refused(message):
            prepare_folder(tmp_path / name, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
