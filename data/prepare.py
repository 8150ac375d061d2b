"""From texts to a data folder: what the scripts in data/ share once they have read their source.

Held-out splits, and writing the layout of data/store.py. data/tokenizer.py has the tokenizer,
data/duplicates.py how copies and held-out text are found.
"""

import hashlib
import itertools
import json
import shutil
import tempfile
import time
from array import array
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from common.files import fingerprint, read_json, write_json
from common.options import InputError
from data.duplicates import REASONS, HeldOut, contamination, held_out_texts
from data.prefixes import PREFIXES
from data.store import Source
from data.tasks import json_line, write_jsonl, write_task
from data.tokenizer import encode, id_type, save_tokenizer

SEARCH = {side: PREFIXES[side] for side in ("query", "document")}
LONGEST = 1200  # characters of a query or document that are kept for training, some 300 tokens
OWN_SHARE = 0.2  # of the batches that are of one's own pairs, where others are added
LONG = 900  # words: well beyond 8 times the 128 tokens that the laptop preset trains with
BATCH = 1000  # rows that are tokenised together


def split_of(group, dev_percent=4, test_percent=6):
    """'train', 'dev' or 'test', by a hash of a group's name: the same on every machine, and
    independent of all other groups."""
    digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") % 100
    if number < dev_percent:
        return "dev"
    return "test" if number < dev_percent + test_percent else "train"


# ------------------------------------------------------------------------------------------------
# Sources. A row is a list of id arrays for each column, and its line of pairs.jsonl.


def encode_rows(rows, tokenizer):
    """Yields rows of text as ids."""
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH)):
        sides = [name for name in ("query", "document") if name in batch[0]]
        encoded = {name: encode(tokenizer, [row[name] for row in batch]) for name in sides}
        negatives = [row.get("negatives", []) for row in batch]
        negative_ids = iter(encode(tokenizer, itertools.chain.from_iterable(negatives)))
        for i, row in enumerate(batch):
            ids = {name: [encoded[name][i]] for name in sides}
            ids["negative"] = list(itertools.islice(negative_ids, len(negatives[i])))
            yield ids, json_line(row).encode()


def stored_rows(folders, tokenizer):
    """Yields the rows of sources on disk. Raises InputError where one has not a line for each."""
    for folder in map(Path, folders):
        source, path = Source(folder, tokenizer), folder / "pairs.jsonl"
        lines = path.open("rb") if path.is_file() else ()
        if not source.prefixes:  # stage 1 has no text beside the tokens
            lines = itertools.repeat(b"\n", len(source))
        for i, line in enumerate(itertools.chain(lines, [b""])):
            if (i < len(source)) != line.endswith(b"\n"):
                raise InputError(f"{path} is damaged: not {len(source):,} lines; prepare it again")
            if line:
                places = {name: [i] for name in source.columns} | {"negative": source.negatives(i)}
                yield {n: [source.columns[n][j] for j in places[n]] for n in places}, line


def without_repeats(rows, names, held_out, distinct, left_out):
    """Yields the rows that write_source writes, and counts the others by reason."""
    seen = set()
    while batch := list(itertools.islice(rows, BATCH)):
        texts = [[ids for name in names for ids in row[name]] for row, _ in batch]
        repeats = np.zeros(len(batch), int)
        if held_out:
            of_each_text = held_out.find([*itertools.chain.from_iterable(texts)])
            repeats = np.maximum.reduceat(of_each_text, np.cumsum([0, *map(len, texts[:-1])]))
        for (row, line), repeat in zip(batch, repeats, strict=True):
            reason = REASONS[repeat]
            if distinct:
                key = hash(b"".join(row[name][0].tobytes() for name in names if name != "negative"))
                reason = "copy of another row" if key in seen else reason
                seen.add(key)
            if reason:
                left_out[reason] += 1
            else:
                yield row, line


def write_source(folder, rows, prefixes, tokenizer, held_out=None, stored=(), distinct=False):
    """Writes a source (data/store.py): rows of text, then those of the sources in the folders
    `stored`.

    rows: {"query": text, "document": text, "negatives": texts}, where negatives may be missing, or
    {"document": text} where prefixes is empty. held_out: a HeldOut, whose texts no row may repeat.
    distinct: without copies of earlier rows, each of which takes some 80 bytes of memory.
    Returns the number of rows written, and a Counter: reason -> how many were left out."""
    folder, left_out, unknown = Path(folder), Counter(), 0
    prefixes = {**prefixes, "negative": prefixes["document"]} if prefixes else {}
    names, unknown_id = list(prefixes) or ["document"], tokenizer.token_to_id("[UNK]")
    offsets, first_negative = {name: array("q", [0]) for name in names}, array("q", [0])
    rows = itertools.chain(encode_rows(rows, tokenizer), stored_rows(stored, tokenizer))
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        paths = {name: folder / f"{name}.tokens.bin" for name in names}
        files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
        pairs = stack.enter_context(open(folder / "pairs.jsonl", "wb")) if prefixes else None
        for row, line in without_repeats(rows, names, held_out, distinct, left_out):
            for name, file in files.items():
                for ids in row[name]:
                    file.write(ids)
                    offsets[name].append(offsets[name][-1] + len(ids))
                    unknown += int((ids == unknown_id).sum())
            if prefixes:
                pairs.write(line)
                first_negative.append(len(offsets["negative"]) - 1)
    if first_negative[-1]:
        (folder / "negative.rows.bin").write_bytes(first_negative)
    elif prefixes:  # most sources have no negatives
        paths["negative"].unlink()
        del offsets["negative"], prefixes["negative"]
    for name in offsets:
        (folder / f"{name}.offsets.bin").write_bytes(offsets[name])
    meta = {"rows": len(offsets["document"]) - 1}
    meta["tokens"] = {name: ends[-1] for name, ends in offsets.items()}
    meta |= {"prefixes": prefixes, "unknown": unknown}  # how many tokens are [UNK]
    meta["dtype"] = np.dtype(id_type(tokenizer)).name
    meta["tokenizer"] = fingerprint(tokenizer)
    write_json(folder / "meta.json", meta)
    return meta["rows"], left_out


# ------------------------------------------------------------------------------------------------
# Data folders


def is_made(out, inputs):
    """Whether `out` is a data folder that was made from these inputs already.

    Raises InputError where it is anything else but a new or empty folder: nothing is replaced."""
    out, inputs = Path(out), json.loads(json.dumps(inputs))
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    meta = read_json(out / "meta.json") if (out / "meta.json").is_file() else {}
    if meta.get("made_by") != "nanoembed":
        raise InputError(f"{out} is there and is no data folder: choose another --out")
    before = meta.get("inputs", {})
    if changed := [key for key in {**before, **inputs} if before.get(key) != inputs.get(key)]:
        raise InputError(
            f"{out} was made from other inputs ({', '.join(changed)}): remove it, or choose "
            "another --out"
        )
    print(f"{out} is there, made from the same inputs: nothing to do")
    return True


@contextmanager
def data_folder(out):
    """A new folder to write into, which becomes `out` if the block ends without an error."""
    began, whole = time.time(), Path(out).resolve()
    try:
        whole.parent.mkdir(parents=True, exist_ok=True)
        place = {"prefix": f".{whole.name}-", "dir": whole.parent, "ignore_cleanup_errors": True}
        with tempfile.TemporaryDirectory(**place) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            yield new
            new.rename(whole)
        print(f"wrote {out} in {time.time() - began:.0f} s")
    except OSError as error:
        reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # the first one
        raise InputError(f"cannot write {out}: {reason}") from None


def write_folder(folder, tokenizer, prefixes, texts, pairs, tasks, long, meta, add=None):
    """Writes a whole data folder from texts in memory, and prints what is in it.

    prefixes: source -> of its queries and documents; texts: split -> [(name, text)], for stage 1
    and search; pairs: "stage2/SOURCE" -> [(query, document)], one list for sources that are equal;
    tasks: source -> (documents, queries) as in write_task; long: held-out long texts, for stage 1;
    add: a data folder whose sources are copied, or None."""
    save_tokenizer(folder, tokenizer)
    for source, task in tasks.items():
        write_task(folder / "retrieval" / source, *task, prefixes[source])
    rows = [{"_id": name, "text": text} for split in texts.values() for name, text in split]
    write_jsonl(folder / "search" / "corpus.jsonl", rows)

    tasks_written = (folder / "retrieval").iterdir()
    held_out, counts, left_out = HeldOut(held_out_texts(tasks_written), tokenizer), {}, {}

    def write(name, *source):
        counts[name], left_out[name] = write_source(folder / name, *source)

    for split, named in {**texts, "long": [("", text) for text in long]}.items():
        name, rows = f"stage1/{split}", ({"document": text} for _, text in named)
        stored = [add / name] if add and split == "train" else []
        write(name, rows, {}, tokenizer, held_out if split == "train" else None, stored)
    for name, own in pairs.items():
        if equal := next((other for other in counts if pairs.get(other) is own), None):
            shutil.copytree(folder / equal, folder / name)  # tokenising takes longer
            counts[name], left_out[name] = counts[equal], left_out[equal]
        elif own:
            rows = ({"query": query, "document": document} for query, document in own)
            write(name, rows, prefixes[Path(name).name], tokenizer, held_out)
    for path in sorted(add.glob("stage[23]/*")) if add else ():
        name = f"{path.parent.name}/{path.name}-{add.name}"
        write(name, (), read_json(path / "meta.json")["prefixes"], tokenizer, held_out, [path])

    weigh(folder, pairs, counts)
    for name, count in counts.items():
        print(f"  {name:34} {count:8,} {'texts' if name.startswith('stage1') else 'pairs'}")
    for source, (corpus, queries) in tasks.items():
        sizes = ", ".join(f"{len(rows):,} {split} queries" for split, rows in queries.items())
        print(f"  retrieval/{source:24} {len(corpus):8,} documents, {sizes}")
    leaks = contamination(held_out, left_out)
    print(f"  {leaks['removed']:,} training rows that repeat held-out text were left out")
    check_unknown(folder, [name for name in counts if not add or name in pairs])
    meta = {"made_by": "nanoembed", **meta, "rows": counts, "contamination": leaks}
    write_json(folder / "meta.json", meta)


def weigh(folder, own, rows):
    """Gives the sources `own` a weight (PairBatches) with which OWN_SHARE of each stage is of them,
    if they have fewer pairs than that: a few hundred would be lost among a hundred thousand."""
    for stage in ("stage2", "stage3"):
        names = [name for name in rows if name.startswith(stage)]
        count = sum(rows[name] for name in names if name in own)
        others = sum(rows[name] for name in names) - count
        if count and others * OWN_SHARE > count * (1 - OWN_SHARE):
            weight = round(others / count * OWN_SHARE / (1 - OWN_SHARE), 2)
            for path in (folder / name / "meta.json" for name in names if name in own):
                write_json(path, {**read_json(path), "weight": weight})


def check_unknown(folder, sources):
    """Prints the share of [UNK], which a model can learn nothing from, in sources of a data folder.
    Raises InputError where it is above 30%."""
    metas = [read_json(folder / name / "meta.json") for name in sources]
    tokens = sum(sum(meta["tokens"].values()) for meta in metas)
    share = sum(meta["unknown"] for meta in metas) / max(1, tokens)
    print(f"  {share:.1%} of {tokens:,} tokens are [UNK]")
    if share > 0.05:
        reason = f"the tokenizer does not know {share:.0%} of this text"
        advice = "leave out --add (make own: ADD=) and --tokenizer, or give another one"
        if share > 0.3:
            raise InputError(f"{reason}: {advice}")
        print(f"  warning: {reason}: {advice}")


def show_pairs(folder, count, added=None):
    """Prints pairs drawn at random from the sources of a data folder, for a person to judge, but
    not from those of the data folder `added`."""
    rng, paths = np.random.default_rng(0), sorted(Path(folder).glob("stage*/*/pairs.jsonl"))
    ending = f"-{added.name}" if added else "\0"
    paths = [p for p in paths if p.stat().st_size and not p.parent.name.endswith(ending)]
    for path in itertools.islice(itertools.cycle(paths), count):
        with open(path, "rb") as file:
            file.seek(rng.integers(path.stat().st_size))
            file.readline()  # the rest of a line
            line = file.readline() or path.open("rb").readline()
        try:
            pair = json.loads(line)
            query, document = pair["query"], pair["document"].split("\n")[:8]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path} is damaged: not a pair: {line[:60]}") from None
        print("", f"--- {path.parent.name}", query, "  ->", *(f"  {x}" for x in document), sep="\n")
