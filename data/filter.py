"""Consistency filtering (sec. 4.2.1): does a pair's document answer its query, as pairs go?

Pairs that come for free are often none: a title that says nothing, an answer to something else. The
paper dropped half of its 470 million. How to tell? A real pair's document should stand near the top
for its query, among up to a million documents of the same source. So

1. embed the queries and documents of a block of pairs with a model, the judge
2. search the block's documents with each query, exactly
3. keep a pair if its document is among the first two

    python data/filter.py out/pydocs --judge=out/contrastive                  # all of stage 2
    python data/filter.py out/pydocs --sources=name-code --out=out/cleaner    # one source
    python contrastive.py --data=out/pydocs-filtered --init=out/mlm           # and train on it

The rank is what counts and not the cosine: the paper gave up a threshold. The judge decides what
survives, and cannot know more than it does: the paper's first one, smaller, threw good pairs away
whose two sides share few words. So look at what is thrown away; some of it is printed.

Equal documents count as one. A text that stands in ten rows would push itself out of the first two.

The judge reads the text of pairs.jsonl and not our token ids: its tokenizer may be another, and ids
turned back into text have lost their case and unknown words. The new folder has the same tokens as
the old one, of the rows that stay. Sources that stay whole are hard-linked to it, or copied where
the file system has no links (no script writes into a finished source, so that a link is as safe);
tokenizer and evaluation are copied.

In memory at a time are the embeddings of one block: three arrays of a million by C float32, 9 GB at
C = 768; --block makes it smaller, and the judgement milder. What it computes: `operations`.
"""

import itertools
import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import find
from data.prepare import whole_or_nothing
from data.store import Source, fingerprint, load_tokenizer
from model import NomicBert
from options import InputError, read_options, run
from processes import best_device
from retrieval import distinct, read_lines, top_k


@dataclass
class Options:
    judge: str = "out/contrastive"  # a checkpoint directory, or a name on the hub
    out: str = ""  # the data folder to write; empty: beside the other one, with -filtered behind
    sources: str = ""  # those of stage 2 to filter, with commas between them; empty: all
    top: int = 2  # a pair stays if its document is among so many nearest to its query [code]
    block: int = 1_000_000  # at most so many pairs are compared with one another (sec. 4.2.1)
    max_tokens: int = 0  # texts are cut to this length; 0: the length that the judge was trained at
    show: int = 3  # prints so many pairs of each source that are thrown away, drawn at random


# ------------------------------------------------------------------------------------------------
# The lesson


def is_consistent(query, document, right, top=2, device="cpu"):
    """Which queries (n, E) have their document among the `top` nearest of all documents (m, E).

    right (n,): the number of each query's document -> bool (n,), and the nearest documents (n, top)
    best first. As near as the last of these is near enough."""
    scores, nearest = top_k(query, document, top, device=device)
    kept = (nearest == right[:, None]).any(1)
    for rows in np.array_split(np.arange(len(query)), len(query) // 10_000 + 1):
        own = np.einsum("ne,ne->n", query[rows], document[right[rows]])
        kept[rows] |= own >= scores[rows, -1]
    return kept, nearest


def judge_source(model, path, rows, prefixes, options):
    """Judges all pairs of a pairs.jsonl, in blocks of equal size: a small one at the end would let
    everything pass. -> bool (rows,), and for each row the row of the document nearest to it."""
    kept, nearest = np.zeros(rows, bool), np.zeros(rows, np.int64)
    blocks = -(-rows // options.block)
    ends = [rows * (i + 1) // blocks for i in range(blocks)]
    pairs, begin = read_pairs(path, rows), 0
    bar = tqdm(total=rows, desc=path.parent.name, disable=None, leave=False)
    for end in ends:
        shape = end - begin, model.config.hidden_size
        query, document, texts = np.empty(shape, np.float32), np.empty(shape, np.float32), []
        for start in range(0, len(query), 10_000):
            piece = list(itertools.islice(pairs, min(10_000, len(query) - start)))
            for side, out in (("query", query), ("document", document)):
                asked = [prefixes.get(side, "") + pair[side] for pair in piece]
                out[start : start + len(piece)] = model.encode(asked, options.max_tokens)
            texts += [pair["document"].encode() for pair in piece]
            bar.update(len(piece))
        first, right = distinct(texts)
        kept[begin:end], found = is_consistent(
            query, document[first], right, options.top, model.device
        )
        nearest[begin:end] = begin + first[found[:, 0]]
        begin = end
    bar.close()
    return kept, nearest


def operations(config, query_tokens, document_tokens, block):
    """Useful floating-point operations to filter one pair: (to embed it, to compare it).

    A token passes `layers` times four C x C matrices and three C x I ones, and attends to its text;
    a query is compared with all documents of the block, E = C numbers each. A multiplication and
    the addition behind it are two operations."""
    C, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens, squares = query_tokens + document_tokens, query_tokens**2 + document_tokens**2
    embedding = layers * (tokens * (8 * C * C + 6 * C * inner) + squares * 4 * C)
    return embedding, 2 * block * C


# ------------------------------------------------------------------------------------------------
# Reading and writing


def read_pairs(path, rows):
    """The pairs of a pairs.jsonl: dictionaries with a query and a document.

    Raises InputError, with its line, for what is none, and for a file of another length."""
    number = 0
    for number, line in read_lines(path):
        try:
            pair = json.loads(line)
            yield {side: pair[side] + "" for side in ("query", "document")}
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f'{path}, line {number}: not {{"query": ..., "document": ...}}'
            ) from None
    if number != rows:
        raise InputError(f"{path} has {number:,} lines, but its source has {rows:,} rows")


def write_kept(source, path, kept, folder, judgement):
    """The rows of a source that stay, as a source: the same tokens, the same lines of text."""
    folder.mkdir(parents=True)
    rows = np.flatnonzero(kept)
    texts = {name: rows for name in source.columns}
    if "negative" in source.columns:  # those of the rows that stay (data/store.py)
        ranges = [source.negatives(row) for row in rows]
        texts["negative"] = np.array([i for own in ranges for i in own], np.int64)
        np.cumsum([0, *map(len, ranges)], dtype=np.int64).tofile(folder / "negative.rows.bin")
    tokens = {}
    for name, column in source.columns.items():
        with open(folder / f"{name}.tokens.bin", "wb") as file:
            for i in texts[name]:
                file.write(column[i].tobytes())
        lengths = np.diff(column.offsets)[texts[name]]
        offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
        offsets.tofile(folder / f"{name}.offsets.bin")
        tokens[name] = int(offsets[-1])
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for stays, (_, line) in zip(kept, read_lines(path), strict=True):
            if stays:
                file.write(line + "\n")
    meta = source.meta | {"rows": len(rows), "tokens": tokens, "filtered": judgement}
    meta.pop("inputs", None)  # else the script that made the source would take it for its own
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def link(source, target):
    """A hard link, or a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def show_thrown_away(path, kept, nearest, count):
    """Prints pairs that were thrown away, each with the document that was found in its place."""
    thrown = np.flatnonzero(~kept)
    chosen = np.random.default_rng(0).permutation(thrown)[:count]
    wanted = {*chosen.tolist(), *nearest[chosen].tolist()}
    pairs = {i: pair for i, pair in enumerate(read_pairs(path, len(kept))) if i in wanted}
    for row in chosen:
        print(f"  - {one_line(pairs[row]['query'])}")
        print(f"      thrown away: {one_line(pairs[row]['document'])}")
        print(f"      found first: {one_line(pairs[nearest[row]]['document'])}")


def one_line(text):
    return " ".join(text.split())[:80]


# ------------------------------------------------------------------------------------------------


def check_options(options, data, out):
    """Raises InputError for what cannot work. Returns the names of the sources to filter."""
    for name, least in (("top", 1), ("block", 2), ("max_tokens", 0), ("show", 0)):
        if getattr(options, name) < least:
            key, value = name.replace("_", "-"), getattr(options, name)
            raise InputError(f"--{key}={value}: give {least} or more")
    if options.top >= options.block:
        raise InputError(f"--top={options.top}: in blocks of {options.block} pairs, all would stay")
    if not (data / "meta.json").is_file():
        raise InputError(f"no data in {data}: python data/pydocs.py --out={data} makes some")
    names = [path.parent.name for path in sorted(data.glob("stage2/*/meta.json"))]
    for name in filter(None, options.sources.split(",")):
        if name not in names:
            raise InputError(
                f"--sources={name}: the sources of {data}/stage2 are {', '.join(names) or 'none'}"
            )
    if out.exists():
        raise InputError(f"{out} is there already: give another --out, or remove it")
    return [name for name in options.sources.split(",") if name] or names


def main(arguments):
    folders = [argument for argument in arguments if not argument.startswith("--")]
    options, _ = read_options(Options, [a for a in arguments if a.startswith("--")])
    if len(folders) != 1:
        raise InputError("give one data folder: python data/filter.py out/pydocs --judge=DIR")
    data = Path(folders[0])
    out = Path(options.out or f"{data}-filtered")
    names = check_options(options, data, out)
    tokenizer = load_tokenizer(data)
    model = NomicBert.from_pretrained(options.judge, device=best_device())
    options.max_tokens = options.max_tokens or model.config.trained_length
    filter_folder(data, out, names, model, tokenizer, options)
    print(f"wrote {out}")


def filter_folder(data, out, names, model, tokenizer, options):
    """Writes the data folder `out`: `data` with the sources of stage 2 named filtered."""
    filtered = {("stage2", name) for name in names}
    weights = fingerprint(find(options.judge) / "model.safetensors")
    how = {"judge": options.judge, "weights": weights, "top": options.top, "block": options.block}
    meta = json.loads((data / "meta.json").read_text())
    meta["inputs"] = {**meta.get("inputs", {}), "filtered": how}
    meta["filtered"] = {}
    with whole_or_nothing(out) as folder:
        for path in sorted(path for path in data.rglob("*") if path.is_file()):
            place = path.relative_to(data)
            if place.parts[:2] not in filtered and place.parts != ("meta.json",):
                (folder / place).parent.mkdir(parents=True, exist_ok=True)
                is_source = place.parts[0].startswith("stage")
                (link if is_source else shutil.copy2)(path, folder / place)
        for name in names:
            source, began = Source(data / "stage2" / name, tokenizer), time.perf_counter()
            path = data / "stage2" / name / "pairs.jsonl"
            kept, nearest = judge_source(model, path, len(source), source.meta["prefixes"], options)
            count, seconds = int(kept.sum()), time.perf_counter() - began
            print(
                f"{name}: kept {count:,} of {len(kept):,} pairs ({count / len(kept):.1%}), "
                f"{len(kept) / seconds:,.0f} pairs/s"
            )
            show_thrown_away(path, kept, nearest, options.show)
            meta["filtered"][name] = {"rows": len(kept), "kept": count}
            for key in {name, f"stage2/{name}"}.intersection(meta.get("rows", {})):
                meta["rows"][key] = count
            if count:
                judgement = {**how, "rows": len(kept)}
                write_kept(source, path, kept, folder / "stage2" / name, judgement)
        if not any(folder.glob("stage2/*/meta.json")):
            raise InputError(f"the judge {options.judge} keeps no pair of stage 2")
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))


if __name__ == "__main__":
    run(main)
