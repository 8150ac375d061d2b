"""Sources of pairs -> a data folder, in a stream: what data/jsonl.py and data/hub.py share.

Each source is read twice. The first pass looks at its beginning only: it sets queries aside to tune
and test on, with a pool of documents to find theirs in, and trains the tokenizer. The second reads
everything, and writes what is neither held out nor faulty (data/write.py).

All is written to OUT.partial, which takes its name when it is whole. After a kill, the same command
goes on where it stopped.
"""

import hashlib
import itertools
import json
import shutil
import time
from pathlib import Path

from data.contamination import HeldOut, contamination
from data.parallel import tokenizing
from data.prepare import (
    read_tokenizer,
    split_of,
    train_tokenizer,
    write_documents,
    write_jsonl,
    write_retrieval,
)
from data.rows import checked_rows
from data.store import Source, load_tokenizer
from data.write import Tally, add_stored, stored_rows, write_json, write_source
from options import InputError

SAMPLE_ROWS, SAMPLE_CHARACTERS = 100_000, 50_000_000  # of a source: what the first pass looks at

# ------------------------------------------------------------------------------------------------
# The first pass


def first_pass(source, options):
    """Sets queries aside. -> corpus: name -> document; queries: split -> (query, names of its
    documents); the training text of the sample.

    A tenth of the sample's queries at most, those whose documents have the smallest hashes, so that
    the queries of one document stay together; 2 in 5 are dev."""
    answers, characters = {}, 0  # query -> its documents
    quiet = Tally(shown=0)
    for row in itertools.islice(checked_rows(source, options, quiet), SAMPLE_ROWS):
        answers.setdefault(row["query"], []).append(row["document"])
        characters += len(row["query"]) + len(row["document"])
        if characters > SAMPLE_CHARACTERS:
            break

    def order(query):
        return hashlib.blake2b(answers[query][0].encode(), digest_size=8).digest()

    count = min(options.queries, len(answers) // 10)
    chosen = sorted(answers, key=order)[:count] if count >= 2 else []
    dev = max(1, 2 * count // 5)
    numbers, queries = {}, {"dev": [], "test": []}  # document -> its number in the pool
    for i, query in enumerate(chosen):
        names = [f"d{numbers.setdefault(text, len(numbers))}" for text in answers[query]]
        queries["dev" if i < dev else "test"].append((query, names))
    kept = [query for query in answers if query not in set(chosen)]
    for text in itertools.chain.from_iterable(answers[query] for query in kept):
        if len(numbers) >= options.pool:
            break  # one pool of 10,000 is hard enough, and is embedded in a minute
        numbers.setdefault(text, len(numbers))
    corpus = {f"d{number}": text for text, number in numbers.items()}
    text = itertools.chain.from_iterable((query, *answers[query]) for query in kept)
    return corpus, queries, text


def hold_out(sources, options, folder, given):
    """The first pass over all sources: writes retrieval/ and tokenizer.json."""
    training = []
    for source in sources:
        if source.stage == 1:
            training += hold_out_text(source, options, folder)
            continue
        corpus, queries, text = first_pass(source, options)
        training += [] if given else text
        if queries["dev"]:
            where = folder / "retrieval" / source.name
            write_retrieval(where, corpus, queries, source.prefixes)
        else:
            print(f"{source.name}: too few queries to hold some out, 20 are needed")
    tokenizer = given or train_tokenizer(training, options.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))


def text_split(document):
    """Of stage 1's text one document in a hundred is dev and one is test, by a hash of its
    beginning."""
    return split_of(document[:1000], 1, 1)


def hold_out_text(source, options, folder):
    """Writes a text's first held-out documents to aside.jsonl; returns a sample of the others."""
    splits, characters = {"train": [], "dev": [], "test": []}, 0
    for row in itertools.islice(checked_rows(source, options, Tally(shown=0)), SAMPLE_ROWS):
        splits[text_split(row["document"])].append(row["document"])
        characters += len(row["document"])
        if characters > SAMPLE_CHARACTERS:
            break
    aside = [{"split": s, "text": t} for s in ("dev", "test") for t in splits[s][: options.queries]]
    write_jsonl(folder / "aside.jsonl", aside)
    return splits["train"]


def held_out_queries(folder, name):
    path = folder / "retrieval" / name / "queries.jsonl"
    if not path.is_file():
        return set()
    with open(path, encoding="utf-8") as lines:
        return {json.loads(line)["text"] for line in lines}


# ------------------------------------------------------------------------------------------------
# The second pass


def write_sources(sources, options, folder, tokenizer, held_out):
    """Writes each source. -> name -> its meta, with the reasons of what was left out."""
    metas = {}
    with tokenizing(tokenizer, held_out, options.processes) as tokenize:
        for source in sources:
            began, tally = time.time(), Tally(options.strict)
            name = f"stage{source.stage}/{source.name}" if source.stage > 1 else "stage1/train"
            aside = held_out_queries(folder, source.name)
            rows = checked_rows(source, options, tally)
            if source.stage == 1:
                rows = (row for row in rows if text_split(row["document"]) == "train")
            rows = (row for row in rows if row.get("query") not in aside)
            prefixes = dict(zip(("query", "document"), source.prefixes, strict=True))
            prefixes = prefixes if source.stage > 1 else {}
            identity = source.identity(options)
            metas[name] = write_source(folder / name, rows, prefixes, tokenize, tally, identity)
            tokens, seconds = sum(metas[name]["tokens"].values()), max(0.01, time.time() - began)
            rate = f"{tokens:,} tokens, {tokens / seconds:,.0f} a second"
            print(f"  {name:32} {metas[name]['rows']:10,} rows, {rate}; left out: {tally}")
            if metas[name]["rows"] == 0:
                raise InputError(f"{source.name}: no row is left: {tally}")
    return metas


def write_text(folder, metas, tokenizer, held_out):
    """Stage 1's splits: the documents of the pairs, unless there is text of its own; dev and test
    from the documents that are held out."""
    path, aside = folder / "aside.jsonl", []
    if path.is_file():
        with open(path, encoding="utf-8") as lines:
            aside = [json.loads(line) for line in lines]
        path.unlink()
    for split in ("dev", "test"):
        texts = dict.fromkeys(row["text"] for row in aside if row["split"] == split)
        for task in sorted((folder / "retrieval").glob("*")):
            with open(task / "corpus.jsonl", encoding="utf-8") as lines:
                corpus = {row["_id"]: row["text"] for row in map(json.loads, lines)}
            lines = (task / "qrels" / f"{split}.tsv").read_text().split("\n")[1:-1]
            texts |= dict.fromkeys(corpus[line.split("\t")[1]] for line in lines)
        write_documents(folder / "stage1" / split, list(texts), tokenizer)
    if "stage1/train" not in metas:
        found = [(Source(folder / name, tokenizer), folder / name) for name in metas]
        rows = ({"document": row["document"]} for pair in found for row in stored_rows(*pair))
        with tokenizing(tokenizer, held_out, processes=1) as tokenize:  # ids, nothing to tokenise
            meta = write_source(folder / "stage1" / "train", rows, {}, tokenize, Tally(shown=0))
        metas["stage1/train"] = meta


def prepare(sources, options, command):
    """Writes the data folder options.out, or adds sources to it. command: all that was asked for.

    Raises InputError for names that clash and an OUT that holds something else."""
    began, out = time.time(), Path(options.out)
    partial = out.with_name(out.name + ".partial")
    before = check_names(sources, out, command)
    if command in before.get("commands", []):
        print(f"{out} is there, made by the same command: nothing to do")
        return out
    folders = [out] if before else []
    given = read_tokenizer(options.tokenizer, folders)
    begun = partial / "begun.json"
    try:
        if begun.is_file() and json.loads(begun.read_text()) == command:
            print(f"going on with {partial}, which the same command left behind")
        else:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            hold_out(sources, options, partial, given)
            write_json(begun, command)
        tokenizer = load_tokenizer(partial)
        tasks = [*(partial / "retrieval").glob("*"), *(out / "retrieval").glob("*")]
        tasks += [Path(name) for name in options.held_out.split(",") if name]
        held_out = HeldOut.of_tasks(tasks, tokenizer)
        metas = write_sources(sources, options, partial, tokenizer, held_out)
        if not before:
            write_text(partial, metas, tokenizer, held_out)
        publish(partial, out, before, metas, held_out, command)
    except InputError:
        if not list(partial.glob("stage*/*/meta.json")):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as error:  # a full disk, a network that went away
        kept = f"{partial} keeps what is done, and the same command goes on"
        if not begun.is_file():
            shutil.rmtree(partial, ignore_errors=True)
            kept = "nothing was left behind"
        raise InputError(f"{error.strerror or error}; {kept}") from None
    print(f"wrote {out} in {time.time() - began:.0f} s")
    return out


def check_names(sources, out, command):
    """The meta.json of OUT, {} if it is new. Raises InputError for two sources of one name, and an
    OUT that holds something else."""
    names = [(source.stage, source.name) for source in sources]
    for stage, name in names:
        if names.count((stage, name)) > 1:
            raise InputError(f"two sources have the name {name}: rename one of the files")
    if not (out / "meta.json").is_file():
        if out.is_file() or (out.is_dir() and any(out.iterdir())):
            raise InputError(f"{out} holds something else than data: --out= chooses another folder")
        return {}
    meta = json.loads((out / "meta.json").read_text())
    if "commands" not in meta:
        raise InputError(f"{out} is a data folder of another script: --out= chooses another folder")
    if command in meta["commands"]:
        return meta
    if any(source.stage == 1 for source in sources):
        raise InputError(f"{out} has stage 1's text already: --out= begins another folder")
    for stage, name in names:
        if (out / f"stage{stage}" / name).exists():
            raise InputError(
                f"{out}/stage{stage} has a source {name}: rename the file or remove it"
            )
    return meta


def clean_earlier(out, partial, tokenizer):
    """Takes what new tasks hold out from earlier sources. -> name -> reason -> rows."""
    held_out, removed = HeldOut.of_tasks((partial / "retrieval").glob("*"), tokenizer), {}
    for folder in [out / "stage1" / "train", *out.glob("stage[23]/*")]:
        if held_out.leaks_of(Source(folder, tokenizer)) == 0:
            continue
        name, clean = folder.relative_to(out).as_posix(), partial / "clean"
        _, removed[name] = add_stored(clean, [folder], tokenizer, held_out)
        shutil.rmtree(folder)
        clean.rename(folder)
        print(f"  {name}: {sum(removed[name].values()):,} rows repeat text that is held out now")
    return removed


def publish(partial, out, before, metas, held_out, command):
    """Gives OUT what is new, its meta.json last."""
    removed = {name: meta.get("counts", {}) for name, meta in metas.items()}
    tokenizer = load_tokenizer(partial)
    removed |= clean_earlier(out, partial, tokenizer) if before else {}
    found = contamination(held_out, removed)
    meta = {**before, "commands": [*before.get("commands", []), command]}
    meta["rows"] = before.get("rows", {}) | {name: m["rows"] for name, m in metas.items()}
    meta["rows"] |= {n: len(Source(out / n, tokenizer)) for n in removed if n not in metas}
    meta["left out"] = before.get("left out", {}) | removed
    earlier = before.get("contamination", {"removed": 0, "sources": {}})
    meta["contamination"] = {
        "held-out texts": found["held-out texts"],
        "removed": earlier["removed"] + found["removed"],
        "sources": earlier["sources"] | found["sources"],
    }
    (partial / "begun.json").unlink()
    if before:
        for path in [*partial.glob("stage*/*"), *partial.glob("retrieval/*")]:
            place = out / path.relative_to(partial)
            place.parent.mkdir(exist_ok=True)
            path.rename(place)
        shutil.rmtree(partial)
        partial = out
    rows = [
        json.loads(line)
        for path in sorted(partial.glob("retrieval/*/corpus.jsonl"))
        for line in open(path, encoding="utf-8")
    ]
    for i, row in enumerate(rows):
        row["_id"] = f"{i}"
    write_jsonl(partial / "search" / "corpus.jsonl", rows)
    write_json(partial / "meta.json", meta)
    if not before:
        if out.is_dir():
            out.rmdir()  # empty
        partial.rename(out)
    print(f"  {found['removed']:,} training rows that repeat held-out text were left out")
