"""Consistency filtering (sec. 4.2.1): does a pair's document answer its query?

Pairs that come for free often do not fit: a title that says nothing, an answer to something else.
The paper dropped half of its 470 million. The document of a good pair should rank near the top for
its query, among up to a million documents of the same source. So

1. embed the queries and documents of a block of pairs with a model, the judge
2. search the block's documents with each query, exactly
3. keep a pair if its document is among the first two

    python data/filter.py out/pydocs --judge=out/contrastive                  # all of stage 2
    python data/filter.py out/pydocs --sources=name-code --out=out/cleaner    # one source
    torchrun --nproc-per-node=8 data/filter.py DATA --judge=nomic-ai/nomic-embed-text-v1.5
    python contrastive.py --data=out/pydocs-filtered --init=out/mlm           # trains on the result

The rank decides, not the cosine: the paper gave up a threshold. The paper's first judge, smaller,
removed good pairs whose two sides share few words. So some of the removed pairs are printed. Equal
documents count as one: otherwise a document of ten rows would push itself out of the first two.

The judge is any checkpoint that this project opens; the paper's, gte-base, is another kind of BERT.
Processes share the work, and their number does not change the result. Each has one block in memory:
6 GB of embeddings for a million pairs at C = 768. A smaller --block needs less, and removes fewer
pairs.
"""

import itertools
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import distributed
from common.checkpoint import find_checkpoint, weight_files
from common.files import fingerprint, load_tokenizer, read_json, read_json_lines, write_json
from common.options import InputError, cli, read_options, split_words
from data.prepare import data_folder, is_made, write_source
from data.store import distinct
from metrics import top_k
from model import NomicBert


@dataclass
class Options:
    judge: str = "out/contrastive"  # a checkpoint directory, or a name on the hub
    out: str = ""  # the data folder to write; default: the one that is read, with -filtered behind
    sources: str = ""  # sources of stage 2 to filter, separated by commas; default: all
    top: int = 2  # a pair stays if its document is among this many nearest to its query [code]
    block: int = 1_000_000  # pairs that are compared with one another, at most (sec. 4.2.1)
    show: int = 3  # how many removed pairs of each source to print, drawn at random [0, 1000]


def is_consistent(query, document, right, top=2, device="cpu"):
    """Which queries have their document among the `top` nearest of all documents.

    query (n, E), document (m, E), right (n,): the number of each query's document -> bool (n,), and
    the nearest documents (n, top), best first. A document as near as the last of these counts."""
    scores, nearest = top_k(query, document, top, device=device)
    own = np.einsum("ne,ne->n", query, document[right])
    return (nearest == right[:, None]).any(1) | (own >= scores[:, -1]), nearest


def judge_block(encode, pairs, prefixes, options, device):
    """Judges pairs among themselves, in all processes. Returns int64 (n, 2): 1 if a pair stays, and
    the row of the document that is nearest to its query."""
    first, right = distinct(pair["document"].encode() for pair in pairs)
    width = encode([""], "").shape[1]

    def embeddings(side, numbers):  # (n, E)
        def share(rows):
            return encode([pairs[numbers[row]][side] for row in rows], prefixes[side])

        return distributed.compute_in_shares(share, (len(numbers), width), torch.float32).numpy()

    query, document = embeddings("query", range(len(pairs))), embeddings("document", first)

    def verdicts(rows):
        kept, nearest = is_consistent(query[rows], document, right[rows], options.top, device)
        return np.stack((kept, first[nearest[:, 0]]), axis=1)

    return distributed.compute_in_shares(verdicts, (len(pairs), 2), torch.int64).numpy()


def judge_source(encode, folder, options, device):
    """Which pairs of a source stay: bool (rows,). They are judged in blocks of equal size, because
    in a small last block every pair would pass. Removed pairs of the first block are printed."""
    meta, kept = read_json(folder / "meta.json"), [np.empty(0, bool)]
    rows, pairs = meta["rows"], (pair for _, pair in read_json_lines(folder / "pairs.jsonl"))
    blocks = math.ceil(rows / options.block)
    for number in tqdm(range(blocks), folder.name, disable=None):
        size = rows * (number + 1) // blocks - rows * number // blocks
        block = list(itertools.islice(pairs, size))
        texts = [pair.get(side) for pair in block for side in ("query", "document")]
        too_long = number == blocks - 1 and next(pairs, None)
        if len(block) < size or too_long or {*map(type, texts)} != {str}:
            raise InputError(f"{folder}/pairs.jsonl has not {rows:,} pairs: prepare the data again")
        stays, nearest = judge_block(encode, block, meta["prefixes"], options, device).T
        kept.append(stays.astype(bool))
        if number == 0 and distributed.is_first():
            show_removed(block, kept[-1], nearest, options.show)
    return np.concatenate(kept)


# ------------------------------------------------------------------------------------------------
# Reading and writing


def show_removed(pairs, kept, nearest, count):
    """Prints removed pairs, drawn at random, each with the document that was found instead."""
    for i in np.random.default_rng(0).permutation(np.flatnonzero(~kept))[:count]:
        texts = pairs[i]["query"], pairs[i]["document"], pairs[nearest[i]]["document"]
        for title, text in zip(("query", "removed", "found first"), texts, strict=True):
            print(f"  {title + ':':13}{' '.join(text.split())[:80]}")
        print()


def open_judge(options, device):
    """A function: texts, their prefix -> embeddings (n, E) float32 at unit length."""
    model = NomicBert.from_pretrained(options.judge, device=device)
    length = model.config.trained_length
    return lambda texts, prefix: model.encode([prefix + text for text in texts], length)


def write_filtered(data, out, judged, inputs, tokenizer):
    """Writes the data folder `out`: `data` with the pairs of some sources of stage 2 that stay.
    judged: name -> which pairs stay, bool (rows,)."""
    meta = read_json(data / "meta.json")
    meta |= {"made_by": "nanoembed", "script": "data/filter.py", "inputs": inputs, "filtered": {}}
    skipped = {str(data): ["meta.json"], str(data / "stage2"): judged}
    with data_folder(out) as folder:
        shutil.copytree(data, folder, ignore=lambda p, _: skipped.get(p, ()), dirs_exist_ok=True)
        for name, kept in judged.items():
            old, new, count = data / "stage2" / name, folder / "stage2" / name, int(kept.sum())
            meta["filtered"][name] = {"rows": len(kept), "kept": count}
            meta["rows"][f"stage2/{name}"] = count
            if count:
                before = read_json(old / "meta.json")  # with the weight of a source, if it has one
                pairs = (pair for _, pair in read_json_lines(old / "pairs.jsonl"))
                write_source(new, itertools.compress(pairs, kept), before["prefixes"], tokenizer)
                write_json(new / "meta.json", {**before, **read_json(new / "meta.json")})
        if not any(folder.glob("stage2/*/meta.json")):
            raise InputError("--judge: it keeps no pair of stage 2")
        write_json(folder / "meta.json", meta)


def main(arguments):
    folders, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    _, _, device = distributed.start(0)
    if len(folders) != 1:
        raise InputError("give one data folder: python data/filter.py out/pydocs --judge=DIR")
    if options.top >= options.block:
        raise InputError(f"--top={options.top}: in blocks of {options.block} pairs, all would stay")
    data = Path(folders[0])
    out = Path(options.out or f"{data.resolve()}-filtered")
    tokenizer = load_tokenizer(data)
    names = [path.parent.name for path in sorted(data.glob("stage2/*/meta.json"))]
    wanted = [name for name in options.sources.split(",") if name] or names
    if unknown := set(wanted) - set(names):
        raise InputError(f"--sources={min(unknown)}: {data}/stage2 has {', '.join(names)}")
    if data.resolve() in (out.resolve(), *out.resolve().parents):
        raise InputError(f"--out={out} is within {data}, which is read: choose another")
    how = {key: value for key, value in asdict(options).items() if key not in ("out", "show")}
    read = [data / "meta.json", *sorted(data.glob("stage[23]/*/pairs.jsonl"))]
    how["data"] = list(map(fingerprint, read))
    files = weight_files(find_checkpoint(options.judge))
    how["weights"] = " ".join(map(fingerprint, files))
    inputs = {**read_json(data / "meta.json").get("inputs", {}), "filtered": how}
    if distributed.call_everywhere(lambda: is_made(out, inputs)):
        return
    encode, judged = distributed.call_everywhere(lambda: open_judge(options, device)), {}
    for name in wanted:
        judged[name] = judge_source(encode, data / "stage2" / name, options, device)
        kept, rows = judged[name].sum(), len(judged[name])
        distributed.print_once(f"{name}: kept {kept:,} of {rows:,} pairs")
    first = distributed.is_first()
    distributed.call_everywhere(
        lambda: first and write_filtered(data, out, judged, inputs, tokenizer)
    )


if __name__ == "__main__":
    cli(main)
