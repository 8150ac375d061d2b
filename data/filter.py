"""Consistency filtering (sec. 4.2.1): does a pair's document answer its query?

Pairs that come for free often do not fit: a title that says nothing, an answer to something else.
The paper dropped half of its 470 million. The document of a good pair should rank near the top for
its query, among up to a million documents of the same source. So

1. embed the queries and documents of a block of pairs with a model, the judge
2. search the block's documents with each query, exactly
3. keep a pair if its document is among the first two

    python data/filter.py out/pydocs --judge=out/contrastive                  # all of stage 2
    python data/filter.py out/pydocs --sources=name-code --out=out/cleaner    # one source
    python contrastive.py --data=out/pydocs-filtered --init=out/mlm           # trains on the result

The rank decides, not the cosine: the paper gave up a threshold. The paper's first judge, smaller,
removed good pairs whose two sides share few words. So some of the removed pairs are printed. Equal
documents count as one: otherwise a document of ten rows would push itself out of the first two.

The judge reads the text of pairs.jsonl, because its tokenizer may be another than that of the data.
In memory are the embeddings of one block: three arrays of a million by C float32, 9 GB at C = 768.
A smaller --block needs less, and removes less.
"""

import itertools
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import find_checkpoint
from common.device import best_device
from common.files import (
    fingerprint,
    load_tokenizer,
    read_json,
    read_json_lines,
    write_json,
    write_whole,
)
from common.options import InputError, cli, read_options, split_words
from data.prepare import data_folder, write_source
from data.store import Source
from evaluate import distinct, top_k
from model import NomicBert

BATCH = 10_000  # texts that are embedded at a time


@dataclass
class Options:
    judge: str = "out/contrastive"  # a checkpoint directory, or a name on the hub
    out: str = ""  # the data folder to write; default: the one that is read, with -filtered behind
    sources: str = ""  # sources of stage 2 to filter, separated by commas; default: all
    top: int = 2  # a pair stays if its document is among this many nearest to its query [code]
    block: int = 1_000_000  # pairs that are compared with one another, at most (sec. 4.2.1)
    max_tokens: int = 0  # texts are truncated to this; 0: the judge's trained length [0, 1000000]
    show: int = 3  # how many removed pairs of each source to print, drawn at random [0, 1000]


# ------------------------------------------------------------------------------------------------
# The lesson


def is_consistent(query, document, right, top=2, device="cpu"):
    """Which queries have their document among the `top` nearest of all documents.

    query (n, E), document (m, E), right (n,): the number of each query's document -> bool (n,), and
    the nearest documents (n, top), best first. A document as near as the last of these counts."""
    scores, nearest = top_k(query, document, top, device=device)
    kept = (nearest == right[:, None]).any(1)
    for start in range(0, len(query), BATCH):
        rows = slice(start, start + BATCH)
        own = np.einsum("ne,ne->n", query[rows], document[right[rows]])
        kept[rows] |= own >= scores[rows, -1]
    return kept, nearest


def judge_source(model, path, rows, prefixes, options):
    """Judges the pairs of a pairs.jsonl in blocks of equal size: in a small last one, all would
    pass. Returns bool (rows,), and for each row the row of the document nearest to its query."""
    kept, nearest = np.zeros(rows, bool), np.zeros(rows, np.int64)
    blocks = -(-rows // options.block)
    ends = [rows * i // blocks for i in range(blocks + 1)]
    pairs = read_pairs(path, rows)
    with tqdm(total=rows, desc=path.parent.name, disable=None, leave=False) as bar:
        for begin, end in itertools.pairwise(ends):
            embeddings = {side: [] for side in ("query", "document")}
            texts = []
            for start in range(begin, end, BATCH):
                part = list(itertools.islice(pairs, min(BATCH, end - start)))
                for side, found in embeddings.items():
                    prefixed = [prefixes[side] + pair[side] for pair in part]
                    found.append(model.encode(prefixed, options.max_tokens))
                texts += [pair["document"].encode() for pair in part]
                bar.update(len(part))
            query, document = map(np.concatenate, embeddings.values())
            first, right = distinct(texts)
            kept[begin:end], found = is_consistent(
                query, document[first], right, options.top, model.device
            )
            nearest[begin:end] = begin + first[found[:, 0]]
    return kept, nearest


# ------------------------------------------------------------------------------------------------
# Reading and writing


def read_pairs(path, rows):
    """The pairs of a pairs.jsonl. Raises InputError naming the line that is none, and for a file of
    another length than its source."""
    count = 0
    for number, pair in read_json_lines(path):
        if not all(isinstance(pair.get(side), str) for side in ("query", "document")):
            raise InputError(f'{path}, line {number}: not {{"query": ..., "document": ...}}')
        count += 1
        yield pair
    if count != rows:
        raise InputError(f"{path} has {count:,} lines, but its source has {rows:,} rows")


def link_or_copy(source, target):
    """Links the large files, which are never changed in place. Not all file systems have links."""
    try:
        if source.endswith((".bin", "pairs.jsonl")):
            return os.link(source, target)
    except OSError:
        pass
    write_whole(target, lambda temporary: shutil.copy2(source, temporary))


def copy_data(data, folder, skipped):
    """Copies a data folder into a new one, without some names. skipped: path of a folder -> names
    in it that stay out."""
    shutil.copytree(
        data,
        folder,
        ignore=lambda path, _: skipped.get(path, ()),
        copy_function=link_or_copy,
        dirs_exist_ok=True,
    )


def show_removed(path, kept, nearest, count):
    """Prints removed pairs, each with the document that was found in its place."""
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(~kept))[:count]
    wanted = {*chosen.tolist(), *nearest[chosen].tolist()}
    pairs = {i: pair for i, pair in enumerate(read_pairs(path, len(kept))) if i in wanted}
    for row in chosen:
        print(f"  - {' '.join(pairs[row]['query'].split())[:80]}")
        print(f"      removed:     {' '.join(pairs[row]['document'].split())[:80]}")
        print(f"      found first: {' '.join(pairs[nearest[row]]['document'].split())[:80]}")


def filter_folder(data, out, names, model, options):
    """Writes the data folder `out`: `data` with some sources of stage 2 filtered."""
    tokenizer, meta = load_tokenizer(data), read_json(data / "meta.json")
    weights = fingerprint(find_checkpoint(options.judge) / "model.safetensors")
    how = {**asdict(options), "weights": weights}
    meta |= {"made_by": "nanoembed", "script": "data/filter.py", "filtered": {}}
    meta["inputs"] = {**meta.get("inputs", {}), "filtered": how}
    with data_folder(out) as folder:
        copy_data(data, folder, {str(data): ["meta.json"], str(data / "stage2"): names})
        for name in names:
            old, began = data / "stage2" / name, time.perf_counter()
            source = Source(old, tokenizer)
            path, prefixes = old / "pairs.jsonl", source.meta["prefixes"]
            kept, nearest = judge_source(model, path, len(source), prefixes, options)
            count, rate = int(kept.sum()), len(kept) / (time.perf_counter() - began)
            share = f"{count:,} of {len(kept):,} pairs ({count / len(kept):.1%})"
            print(f"{name}: kept {share}, {rate:,.0f} pairs/s")
            show_removed(path, kept, nearest, options.show)
            meta["filtered"][name] = {"rows": len(kept), "kept": count}
            meta.setdefault("rows", {})[f"stage2/{name}"] = count
            if count:
                new = folder / "stage2" / name
                write_source(new, {}, prefixes, tokenizer, stored=[old], keep=kept)
        if not any(folder.glob("stage2/*/meta.json")):
            raise InputError(f"the judge {options.judge} keeps no pair of stage 2")
        write_json(folder / "meta.json", meta)
    print(f"wrote {out}")


def main(arguments):
    folders, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    if len(folders) != 1:
        raise InputError("give one data folder: python data/filter.py out/pydocs --judge=DIR")
    data, wanted = Path(folders[0]), [name for name in options.sources.split(",") if name]
    out = Path(options.out or f"{data}-filtered")
    if options.top >= options.block:
        raise InputError(f"--top={options.top}: in blocks of {options.block} pairs, all would stay")
    load_tokenizer(data)
    names = [path.parent.name for path in sorted(data.glob("stage2/*/meta.json"))]
    if unknown := set(wanted) - set(names):
        known = ", ".join(names) or "none"
        raise InputError(f"--sources={min(unknown)}: {data}/stage2 has the sources {known}")
    if out.exists():
        raise InputError(f"{out} is there already: choose another --out, or remove it")
    model = NomicBert.from_pretrained(options.judge, device=best_device())
    options.max_tokens = options.max_tokens or model.config.trained_length
    filter_folder(data, out, wanted or names, model, options)


if __name__ == "__main__":
    cli(main)
