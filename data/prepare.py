"""From texts to a data folder: what the scripts in data/ share once they have read their source.

Held-out splits, the tokenizer, and writing the layout of data/store.py. data/duplicates.py has how
copies and held-out text are found.
"""

import hashlib
import itertools
import json
import tempfile
from array import array
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from common.files import SPECIAL_TOKENS, fingerprint, read_json, write_json, write_whole
from common.options import InputError
from data.duplicates import REASONS, HeldOut, contamination, held_out_texts
from data.store import Source, encode, id_type
from data.tasks import PREFIXES, write_jsonl, write_task

SEARCH = PREFIXES["query"], PREFIXES["document"]
LONGEST = 1200  # characters of a query or document that are kept for training, some 300 tokens
OWN_SHARE = 0.2  # of the batches that are of one's own pairs, where others are added
LONG = 900  # words: well beyond 8 times the 128 tokens that the laptop preset trains with
BATCH = 1000  # rows that are tokenised or copied together


def split_of(group, dev_percent=4, test_percent=6):
    """'train', 'dev' or 'test', by a hash of a group's name: the same on every machine, and
    independent of all other groups."""
    digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") % 100
    if number < dev_percent:
        return "dev"
    return "test" if number < dev_percent + test_percent else "train"


def train_tokenizer(texts, vocab_size):
    """A WordPiece tokenizer like that of bert-base-uncased: lower case, no accents, [CLS] text
    [SEP]. Equal texts give an equal tokenizer.

    The library's trainer alone does not promise that: it numbers continuation pieces ("##a") in the
    order in which its threads find them, and breaks ties by number. So those of one character are
    passed as special tokens, which are numbered first. A second tokenizer gets the vocabulary."""
    tokenizer = Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    counts = Counter()
    for text in texts:
        counts.update(text)
    # characters that are rare, or beyond a quarter of the vocabulary, become [UNK]
    least = min(50, max(2, counts.total() // 100_000))
    common = [c for c, count in counts.most_common(vocab_size // 4) if count >= least]
    frequent = "".join(dict.fromkeys([*common, *filter(str.isascii, counts)]))
    alphabet = sorted(set(tokenizer.normalizer.normalize_str(frequent)) - {" "})
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + [f"##{c}" for c in alphabet],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))

    trained = Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.decoder = tokenizers.decoders.WordPiece(prefix="##")
    trained.add_special_tokens(SPECIAL_TOKENS)
    ends = [(token, trained.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    trained.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=ends
    )
    return trained


# ------------------------------------------------------------------------------------------------
# Writing sources


def json_line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


class SourceWriter:
    """Appends rows to the files of a source (data/store.py); `finish` writes its meta.json."""

    def __init__(self, folder, prefixes, tokenizer, held_out=None):
        """prefixes: of the columns query and document, or {} for documents alone. held_out: a
        HeldOut; `left_out` counts the rows that repeat its text."""
        self.folder, self.tokenizer, self.held_out = Path(folder), tokenizer, held_out
        self.prefixes = {name: prefixes[name] for name in prefixes if name != "negative"}
        self.rows, self.negatives, self.tokens, self.left_out = 0, 0, {}, Counter()
        self.unknown, self.unknown_id = 0, tokenizer.token_to_id("[UNK]")
        self.folder.mkdir(parents=True)
        for name in self.prefixes or ["document"]:
            self.append_texts(name, np.empty(0), np.empty(0, np.int64))

    def write(self, name, data):
        with open(self.folder / name, "ab") as file:
            file.write(data)

    def append_texts(self, name, ids, lengths):
        if name not in self.tokens:
            self.tokens[name] = 0
            self.write(f"{name}.offsets.bin", np.zeros(1, np.int64))
            if name == "negative":
                self.write("negative.rows.bin", np.zeros(self.rows + 1, np.int64))
        self.write(f"{name}.tokens.bin", ids.astype(id_type(self.tokenizer), copy=False))
        self.write(f"{name}.offsets.bin", self.tokens[name] + np.cumsum(lengths))
        self.tokens[name] += int(lengths.sum())
        self.unknown += int((ids == self.unknown_id).sum())

    def append(self, columns, lines, negatives=None, keep=None):
        """Appends n rows. columns: name -> (ids (N,), lengths (n,)); lines: their JSON lines;
        negatives (n,): how many texts of the column "negative" belong to each row; keep (n,): which
        rows to write; all by default. Rows that repeat held-out text are left out."""
        rows = len(columns["document"][1])
        columns = columns if self.prefixes else {"document": columns["document"]}
        keep = np.ones(rows, bool) if keep is None else keep
        negatives = np.zeros(rows, np.int64) if negatives is None else negatives
        if self.held_out:
            found = self.held_out.find_rows(columns, negatives)
            self.left_out.update(REASONS[i] for i in found[keep & (found > 0)])
            keep = keep & (found == 0)
        for name, (ids, lengths) in columns.items():
            kept = np.repeat(keep, negatives) if name == "negative" else keep
            if name in self.tokens or kept.any():  # most sources have no negatives
                self.append_texts(name, ids[np.repeat(kept, lengths)], lengths[kept])
        if "negative" in self.tokens:
            self.write("negative.rows.bin", self.negatives + np.cumsum(negatives[keep]))
            self.negatives += int(negatives[keep].sum())
        if self.prefixes:
            self.write("pairs.jsonl", "".join(itertools.compress(lines, keep)).encode())
        self.rows += int(keep.sum())

    def finish(self):
        """Writes meta.json, last of all. Returns the number of rows and `left_out`."""
        prefixes = dict(self.prefixes)
        if "negative" in self.tokens:
            prefixes["negative"] = prefixes["document"]
        meta = {"rows": self.rows, "tokens": self.tokens, "prefixes": prefixes}
        meta["unknown"] = self.unknown  # how many of the tokens are [UNK]
        meta["dtype"] = np.dtype(id_type(self.tokenizer)).name
        meta["tokenizer"] = fingerprint(self.tokenizer)
        write_json(self.folder / "meta.json", meta)
        return self.rows, self.left_out


def write_source(folder, columns, prefixes, tokenizer, held_out=None, stored=(), keep=None):
    """Writes a source: the texts in `columns` (name -> texts, as many in each), then the rows of
    the sources in the folders `stored`, of which keep (n,) says which to write; None is all.
    Returns as SourceWriter.finish."""
    writer, start = SourceWriter(folder, prefixes, tokenizer, held_out), 0
    for begin in range(0, len(columns.get("document", ())), BATCH):
        part = {name: texts[begin : begin + BATCH] for name, texts in columns.items()}
        rows = (dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True))
        encoded = {name: encode(tokenizer, texts) for name, texts in part.items()}
        writer.append(encoded, list(map(json_line, rows)))
    for columns, lines, negatives in stored_rows(stored, tokenizer):
        rows = slice(start, start + len(columns["document"][1]))
        writer.append(columns, lines, negatives, None if keep is None else keep[rows])
        start = rows.stop
    return writer.finish()


def row_keys(*columns):
    """A number for each row of columns (ids, lengths): (n,) int64, equal for equal rows."""
    keys, columns = [], [(ids.tobytes(), np.cumsum([0, *n]) * ids.itemsize) for ids, n in columns]
    for i in range(len(columns[0][1]) - 1):
        digest = hashlib.blake2b(digest_size=8)
        for data, ends in columns:
            digest.update(data[ends[i] : ends[i + 1]])  # [CLS] and [SEP] part the texts
        keys.append(digest.digest())
    return np.frombuffer(b"".join(keys), np.int64)


def first_of_each(keys):
    """Which keys equal none before: bool (n,)."""
    first = np.zeros(len(keys), bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return first


def write_documents(folder, stored, tokenizer):
    """Writes the documents of stored sources, each different one once. Returns their number."""
    keys = array("q")  # 8 bytes for each row
    for columns, _, _ in stored_rows(stored, tokenizer):
        keys.frombytes(row_keys(columns["document"]).tobytes())
    rows, _ = write_source(folder, {}, {}, tokenizer, stored=stored, keep=first_of_each(keys))
    return rows


def stored_rows(folders, tokenizer):
    """The rows of sources on disk in batches, as SourceWriter.append takes them."""
    for folder in map(Path, folders):
        source, path = Source(folder, tokenizer), folder / "pairs.jsonl"
        lines = open(path, encoding="utf-8") if path.is_file() else iter(())
        for start in range(0, len(source), BATCH):
            end, columns, negatives = min(start + BATCH, len(source)), {}, None
            for name, column in source.columns.items():
                first, last = start, end
                if name == "negative":
                    first, last = source.first_negative[[start, end]]
                    negatives = np.diff(source.first_negative[start : end + 1])
                offsets = column.offsets[first : last + 1]
                columns[name] = column.tokens[offsets[0] : offsets[-1]], np.diff(offsets)
            yield columns, list(itertools.islice(lines, end - start)), negatives


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
    before = meta.get("inputs")
    if before != inputs:
        before = before if isinstance(before, dict) else {}
        changed = sorted(key for key in inputs if before.get(key) != inputs[key])
        raise InputError(
            f"{out} was made from other inputs ({', '.join(changed) or 'more of them'}): remove "
            "it, or choose another --out"
        )
    print(f"{out} is there, made from the same inputs: nothing to do")
    return True


@contextmanager
def data_folder(out):
    """A new folder to write into, which becomes `out` if the block ends without an error."""
    out = Path(out).resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = {"prefix": f".{out.name}-", "dir": out.parent, "ignore_cleanup_errors": True}
        with tempfile.TemporaryDirectory(**place) as temporary:
            new = Path(temporary, "new")
            new.mkdir()
            yield new
            new.rename(out)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise InputError(f"cannot write {out}: {error.strerror or error}{where}") from None


def save_tokenizer(folder, tokenizer):
    write_whole(folder / "tokenizer.json", lambda path: tokenizer.save(str(path)))


def write_folder(folder, tokenizer, prefixes, texts, pairs, tasks, long, meta, held_out="", add=()):
    """Writes a whole data folder from texts in memory, and prints what is in it.

    prefixes: source -> of its queries and documents; texts: split -> [(name, text)], for stage 1
    and search; pairs: "stage2/SOURCE" -> [(query, document)]; tasks: source -> (documents, queries)
    as in write_task; long: (held-out long texts, documents, queries); held_out: further tasks,
    separated by commas; add: data folders whose sources are copied."""
    save_tokenizer(folder, tokenizer)
    for source, task in tasks.items():
        write_task(folder / "retrieval" / source, *task, prefixes[source])
    long_texts, pool, questions = long
    if questions:
        write_task(folder / "long" / "pages", pool, {"test": questions}, SEARCH)
    rows = [{"_id": name, "text": text} for split in texts.values() for name, text in split]
    write_jsonl(folder / "search" / "corpus.jsonl", rows)

    places = [*(folder / "retrieval").iterdir(), *filter(None, held_out.split(","))]
    held_out, written = HeldOut(held_out_texts(places), tokenizer), {}
    documents = {split: [text for _, text in named] for split, named in texts.items()}
    for split, column in {**documents, "long": long_texts}.items():
        checked, stored, name = None, (), f"stage1/{split}"
        if split == "train":
            checked, stored = held_out, [path / name for path in add]
        column = {"document": column}
        written[name] = write_source(folder / name, column, {}, tokenizer, checked, stored)
    for name, found in pairs.items():
        if found:
            columns = dict(zip(("query", "document"), zip(*found, strict=True), strict=True))
            given = dict(zip(columns, prefixes[Path(name).name], strict=True))
            written[name] = write_source(folder / name, columns, given, tokenizer, held_out)
    for path in itertools.chain.from_iterable(sorted(p.glob("stage[23]/*")) for p in add):
        name = f"{path.parent.name}/{path.name}-{path.parents[1].name}"
        given = Source(path, tokenizer).meta["prefixes"]
        written[name] = write_source(folder / name, {}, given, tokenizer, held_out, [path])

    rows = {name: count for name, (count, _) in written.items()}
    weigh(folder, pairs, rows)
    leaks = contamination(held_out, {name: reasons for name, (_, reasons) in written.items()})
    for name, (count, _) in written.items():
        print(f"  {name:34} {count:8,} {'texts' if name.startswith('stage1') else 'pairs'}")
    for source, (corpus, queries) in tasks.items():
        counts = ", ".join(f"{len(asked):,} {split} queries" for split, asked in queries.items())
        print(f"  retrieval/{source:24} {len(corpus):8,} documents, {counts}")
    print(f"  {leaks['removed']:,} training rows that repeat held-out text were left out")
    print_unknown(folder)
    meta = {"made_by": "nanoembed", **meta, "rows": rows, "contamination": leaks}
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


def print_unknown(folder):
    """Prints the share of [UNK], which a model can learn nothing from, in all training text."""
    metas = [read_json(path) for path in sorted(folder.glob("stage*/*/meta.json"))]
    tokens = sum(sum(meta["tokens"].values()) for meta in metas)
    share = sum(meta["unknown"] for meta in metas) / max(1, tokens)
    print(f"  {share:.1%} of {tokens:,} tokens are [UNK]")
    if share > 0.05:
        print("  warning: the tokenizer does not know this text; give another one by --tokenizer=")


def show_pairs(folder, count, added=()):
    """Prints pairs drawn at random from the sources of a data folder, for a person to judge, but
    not from those of the folders that were added."""
    rng, added = np.random.default_rng(0), tuple(f"-{Path(path).name}" for path in added)
    paths = sorted(Path(folder).glob("stage*/*/pairs.jsonl"))
    paths = [p for p in paths if p.stat().st_size and not p.parent.name.endswith(added)]
    for i in range(count if paths else 0):
        path = paths[i % len(paths)]
        with open(path, "rb") as file:
            file.seek(rng.integers(path.stat().st_size))
            file.readline()  # the rest of a line
            pair = json.loads(file.readline() or path.open("rb").readline())
        print(f"\n--- {path.parent.name}\n{pair['query']}\n  ->")
        print("\n".join(f"  {line}" for line in pair["document"].split("\n")[:8]))
