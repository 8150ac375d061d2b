"""A folder of notes: what is read aloud is kept, what serves the page is not, files are held out
whole."""

import json
import tarfile

import numpy as np
import pytest
from conftest import ROOT

import mlm
from data import folder, prepare, store
from data.markup import read_markup
from data.prepare import NearDuplicates
from options import InputError
from retrieval import Retrieval

FOLDERS = ROOT.parent / "shared" / "data" / "folders"

MARKDOWN = """---
title: "Growing leeks"
tags: [a, b]
---
<!-- not for readers -->
* Author: [Somebody](https://example.org/who)
* Status: **Draft**

Leeks like a *deep* bed, see [the **book**](https://example.org/a_(b)) and [this][ref].[^1]

## Sowing `seed` {#sow}

Sow in <b>March</b>. ![a picture](x.png)

| month | depth |
|-------|:-----:|
| March | 1 cm  |

```python
# not a heading
sow(depth=1)
```

### Too early

> Frost takes them. <https://example.org>

License
-------
All rights reserved.

[ref]: https://example.org/ref
[^1]: A note.
"""

RST = """:orphan:

==============
Growing leeks
==============

.. contents::
   :depth: 2

.. |bed| replace:: garden bed

Leeks like a *deep* |bed|, see `the book <https://example.org>`_ and :pep:`8` [1]_::

    sow(depth=1)

Sowing
======

.. note:: Not before March.
   It is too cold.

.. figure:: x.png
   :width: 100

   A picture.

Use :func:`~leeks.sow` or ``sow()``.

+-------+-------+
| month | depth |
+=======+=======+
| March | 1 cm  |
+-------+-------+

Too early
---------

:param frost: takes them
   all

Copyright
=========

In the public domain.

.. [1] A footnote.
.. _book: https://example.org
"""

HEADER = """Leek: 12
Title: Growing leeks
 in winter
Author: Somebody

Abstract
========

They stand the cold.
"""


def test_markdown_becomes_what_a_person_would_read_aloud():
    title, sections = read_markup(MARKDOWN, ".md")
    assert title == "Growing leeks"
    headings = [path for path, _ in sections]
    assert headings == [(), ("Sowing seed",), ("Sowing seed", "Too early")]
    prose = [text for _, text in sections]
    assert prose[0] == "\nLeeks like a deep bed, see the book and this.".strip()
    assert "Sow in March." in prose[1] and "month, depth\nMarch, 1 cm" in prose[1]
    assert "# not a heading\nsow(depth=1)" in prose[1]
    assert prose[2].strip() == "Frost takes them."
    everything = "\n".join(prose)
    for markup in (
        "https",
        "**",
        "<b>",
        "![",
        "```",
        "tags",
        "Author",
        "Draft",
        "reserved",
        "note",
    ):
        assert markup not in everything, markup


def test_restructured_text_becomes_what_a_person_would_read_aloud():
    title, sections = read_markup(RST, ".rst")
    assert title == "Growing leeks"
    assert [path for path, _ in sections] == [(), ("Sowing",), ("Sowing", "Too early")]
    prose = [text for _, text in sections]
    assert "Leeks like a deep bed, see the book and PEP 8:" in prose[0]
    assert "sow(depth=1)" in prose[0] and "depth: 2" not in prose[0]
    assert "Not before March.\nIt is too cold." in prose[1]
    assert "Use leeks.sow or sow()." in prose[1] and "month, depth" in prose[1]
    assert "param frost: takes them" in prose[2]
    everything = "\n".join(prose)
    for markup in ("https", "``", "::", "picture", "+--", "footnote", "public domain", "[1]", "|"):
        assert markup not in everything, markup


def test_titles_come_from_headers_lone_headings_and_first_lines():
    assert read_markup(HEADER, ".rst") == (
        "Growing leeks in winter",
        [(("Abstract",), "They stand the cold.")],
    )
    assert read_markup("# One\n\n# Two\n\ntext", ".md")[0] == "One"
    assert read_markup("# One\n\ntext\n\n# Two\n\ntext", ".md")[0] == ""
    assert read_markup("On leeks\n\nThey grow.", ".txt") == ("On leeks", [((), "They grow.")])


@pytest.mark.parametrize(
    "text", ["", "\n\n", "===\n===", "```", "---\n---\n", "..", "::", "| a |", "#"]
)
@pytest.mark.parametrize("suffix", [".md", ".rst", ".txt"])
def test_fragments_of_markup_are_no_crash(text, suffix):
    read_markup(text, suffix)


# ------------------------------------------------------------------------------------------------
# The script

WORDS = (
    "bed seed frost leek water stone spade rain slug mulch root stem leaf soil sun wind "
    "shade lime peat moss rake hoe fork twine glass pot tray cold heat north"
).split()


def write_notes(where, files=40, sections=4):
    """Files of sections, each with its own words: no two are alike."""
    rng = np.random.default_rng(0)
    where.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        parts = [f"# Note {i} on {rng.choice(WORDS)}\n"]
        for j in range(sections):
            words = rng.choice(WORDS, 60).tolist()
            opening, rest = " ".join(words[:20]), " ".join(words[20:])
            parts.append(f"## Part {j} {words[0]} of {i}\n\n{opening}.\n\n{rest}.\n")
        (where / f"note-{i}.md").write_text("\n".join(parts))


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    where = tmp_path_factory.mktemp("folder")
    write_notes(where / "notes")
    folder.main([str(where / "notes"), f"--out={where}/out", "--vocab-size=400"])
    return where


def training_text(out):
    paths = out.glob("stage[23]/*/pairs.jsonl")
    return [text for path in paths for line in open(path) for text in json.loads(line).values()]


def test_files_are_held_out_whole(notes):
    out = notes / "out"
    queries = [
        json.loads(line)["text"] for line in open(out / "retrieval/heading-section/queries.jsonl")
    ]
    held = {query.split(" > ")[0] for query in queries}
    assert len(held) >= 2
    for text in training_text(out):
        assert not any(
            text.startswith((title + " >", title + "\n")) or text == title for title in held
        )
    splits = {
        split: Retrieval(out / "retrieval/heading-section", split) for split in ("dev", "test")
    }
    assert all(task.queries for task in splits.values())
    assert len(splits["dev"].documents) == 160, "sections of all files are the pool"


def test_every_stage_opens_what_was_prepared(notes):
    tokenizer = store.load_tokenizer(notes / "out")
    names = {
        s: [x.name for x in store.open_sources(notes / f"out/{s}", tokenizer)]
        for s in ("stage2", "stage3")
    }
    assert names == {
        "stage2": ["heading-section", "opening-rest", "title-document"],
        "stage3": ["heading-section"],
    }
    small = [
        "--hidden-size=32",
        "--num-attention-heads=2",
        "--intermediate-size=32",
        "--seq-len=32",
    ]
    mlm.main([f"--data={notes}/out", f"--out={notes}/mlm", "--steps=1", "--batch-size=4", *small])
    assert (notes / "out/search/corpus.jsonl").is_file()


def test_preparing_again_replaces_and_show_prints_pairs(notes, capsys):
    folder.main([str(notes / "notes"), f"--out={notes}/out", "--vocab-size=400", "--show=5"])
    assert capsys.readouterr().out.count("\n---") == 5


def test_what_is_added_is_there_token_for_token_without_what_is_held_out(notes, tmp_path):
    write_notes(tmp_path / "other", files=12, sections=3)
    leak = next(iter(Retrieval(notes / "out/retrieval/heading-section", "test").relevant[0]))
    leaked = Retrieval(notes / "out/retrieval/heading-section", "test").documents[leak]
    (tmp_path / "other" / "leak.md").write_text(f"# Leak\n\n## The very same\n\n{leaked}\n")
    folder.main([str(tmp_path / "other"), f"--out={tmp_path}/added", "--vocab-size=400"])
    folder.main([str(notes / "notes"), f"--out={tmp_path}/out", f"--add={tmp_path}/added"])
    tokenizer = store.load_tokenizer(tmp_path / "out")
    assert store.fingerprint(tokenizer) == store.fingerprint(
        store.load_tokenizer(tmp_path / "added")
    )
    before = store.Source(tmp_path / "added/stage2/heading-section", tokenizer)
    after = store.Source(tmp_path / "out/stage2/heading-section-added", tokenizer)
    assert 0 < len(before) - len(after) <= 8
    kept = {bytes(after.columns["document"][i]) for i in range(len(after))}
    assert kept <= {bytes(before.columns["document"][i]) for i in range(len(before))}
    assert not any(leaked[:60] in text for text in training_text(tmp_path / "out"))
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["contamination"]["sources"]["stage2/heading-section-added"]


def test_plain_text_copies_and_hidden_files(tmp_path):
    write_notes(tmp_path / "notes", files=5)
    (tmp_path / "notes/copy.md").write_text((tmp_path / "notes/note-0.md").read_text())
    (tmp_path / "notes/.git").mkdir()
    (tmp_path / "notes/.git/x.md").write_text("# Never\n\n" + "never read " * 20)
    (tmp_path / "notes/plain.txt").write_text("On leeks\n\n" + "they grow in any bed " * 10)
    (tmp_path / "notes/blank.rst").write_text("\n")
    folder.main([str(tmp_path / "notes"), f"--out={tmp_path}/out", "--vocab-size=400"])
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["files"] == {"read": 6, "copy of another file": 1, "no text": 1}


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda p: None, "is not a folder"),
        (lambda p: p.mkdir(), "has no text"),
        (lambda p: (p.mkdir(), (p / "a.md").write_text("# A\n\n" + "word " * 30)), "3 are needed"),
        (
            lambda p: (write_notes(p, 4), (p / "b.md").write_bytes(b"# B\n\ncaf\xe9")),
            "b.md, line 3: not UTF-8",
        ),
    ],
)
def test_bad_folders_are_one_line_and_leave_nothing(tmp_path, make, reason):
    make(tmp_path / "notes")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(InputError, match=reason):
        folder.main([str(tmp_path / "notes"), f"--out={tmp_path}/out", "--vocab-size=400"])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_output_folder_of_something_else_and_two_tokenizers_are_errors(notes, tmp_path):
    write_notes(tmp_path / "notes", files=6)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/letter.txt").write_text("dear")
    with pytest.raises(InputError, match="holds something else than data"):
        folder.main([str(tmp_path / "notes"), f"--out={tmp_path}/out"])
    assert (tmp_path / "out/letter.txt").read_text() == "dear"
    other = prepare.train_tokenizer(["some words"] * 9, 300)
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="have different tokenizers"):
        folder.main(
            [
                str(tmp_path / "notes"),
                f"--out={tmp_path}/new",
                f"--tokenizer={tmp_path}/tokenizer.json",
                f"--add={notes}/out",
            ]
        )


# ------------------------------------------------------------------------------------------------
# Text that nobody here wrote


@pytest.mark.parametrize("name, suffix", [("peps", ".rst"), ("swift-evolution", ".md")])
def test_real_proposals_have_titles_and_sections_without_markup(name, suffix, tmp_path):
    archive = FOLDERS / f"{name}.tar.gz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not here")
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(suffix)][::12]
        texts = [tar.extractfile(member).read().decode() for member in members]
    read = [read_markup(text, suffix) for text in texts]
    assert sum(bool(title) for title, _ in read) >= 0.97 * len(read)
    assert np.median([len(sections) for _, sections in read]) >= 8
    prose = "\n".join(text for _, sections in read for _, text in sections)
    lines = prose.count("\n")
    for markup in ("https://", "`_", ".. [", ":pep:", "](", "Post-History", "Review Manager:"):
        assert prose.count(markup) < lines / 500, markup
    seen = NearDuplicates(threshold=0.9)
    documents = [" ".join(text for _, text in sections) for _, sections in read if sections]
    assert all(map(seen.add, documents)), "no text is lost in favour of boilerplate"
