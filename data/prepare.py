"""From texts to a data folder: what the scripts in data/ share once they have read their source.

Held-out splits, near duplicates, the tokenizer, and writing the layout of data/store.py.
"""

import hashlib
import itertools
import json
import re
import shutil
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from common.files import fingerprint, load_tokenizer, read_json, write_json, write_whole
from common.options import InputError
from data.store import Source
from data.tasks import PREFIXES, read_judgements, read_texts, splits_of, write_jsonl, write_task

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SEARCH = PREFIXES["query"], PREFIXES["document"]
LONGEST = 1200  # characters of a query or document that are kept for training, some 300 tokens
LONG = 900  # words: well beyond 8 times the 128 tokens that the laptop preset trains with
REASONS = "", "near held-out text", "equal to held-out text"  # why a training row is left out
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
BATCH = 1000  # rows that are tokenised or copied together


def words(text):
    """The words of a text, in lower case. In Chinese and Japanese, which have no spaces, each
    character counts as a word."""
    return WORD.findall(text.lower())


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

    The library's trainer alone does not promise that: it numbers the continuation pieces ("##a") in
    the order in which its threads find them, and breaks ties between merges by these numbers. So
    the pieces of one character are passed as special tokens, which get their numbers first, and the
    resulting vocabulary is given to a new tokenizer, where they are ordinary pieces again."""
    tokenizer = Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    counts = Counter()
    for text in texts:
        counts.update(text)
    frequent = "".join(c for c, count in counts.items() if count >= 50 or c.isascii())
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
# Near duplicates

HASH_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
BITMAP_BITS = 26  # the bitmap has 2^26 bits, 8 MiB


def span_hashes(numbers, starts, ends):
    """A 64-bit hash of numbers[start:end] for each start and end: the polynomial sum of
    numbers[i] * base^(i - start) modulo 2^64, as a difference of prefix sums."""
    steps = np.full((2, len(numbers) + 1), [[HASH_BASE], [pow(HASH_BASE, -1, 2**64)]], np.uint64)
    steps[:, 0] = 1
    powers, inverse_powers = np.multiply.accumulate(steps, axis=1)
    sums = np.zeros(len(numbers) + 1, np.uint64)
    np.cumsum((numbers.astype(np.uint64) + np.uint64(1)) * powers[:-1], out=sums[1:])
    hashes = (sums[ends] - sums[starts]) * inverse_powers[starts]
    hashes = (hashes ^ hashes >> np.uint64(31)) * np.uint64(0xBF58476D1CE4E5B9)
    return hashes ^ hashes >> np.uint64(29)


def word_hashes(texts):
    """Texts as NearDuplicates takes them: the hashes of all words (N,), and their number in each
    text (B,)."""
    found = [words(text) for text in texts]
    numbers = np.fromiter(map(hash, itertools.chain.from_iterable(found)), np.int64)
    return numbers, np.array([len(text) for text in found], np.int64)


class NearDuplicates:
    """Remembers texts, and finds those that are nearly equal to a remembered one.

    A text is an array of whole numbers: hashes of words, or token ids. Two texts are near
    duplicates if they share at least `share` of the runs (`run` consecutive numbers) of the one
    that has fewer, and at least `least` runs. A text shorter than a run counts as one run."""

    def __init__(self, run=5, share=0.4, least=1, shortest=1):
        """shortest: how many numbers a text must have to be called equal to another."""
        self.run, self.share, self.least, self.shortest = run, share, least, shortest
        self.first = {}  # hash of a run -> number of the first text that has it
        self.sizes = []  # number of a text -> how many different runs it has
        self.texts = set()  # hashes of whole texts
        self.bitmap = np.zeros(1 << BITMAP_BITS - 3, np.uint8)  # for most runs, it says "unknown"

    def hashes(self, numbers, lengths):
        """numbers (N,) of B texts, lengths (B,) -> hashes of all runs, where each text's runs end
        (B + 1,), and hashes of whole texts (B,), 0 where a text is too short."""
        ends = np.cumsum(lengths)
        runs = np.maximum(lengths - self.run + 1, 1)
        run_ends = np.concatenate([[0], np.cumsum(runs)])
        starts = np.repeat(ends - lengths - run_ends[:-1], runs) + np.arange(run_ends[-1])
        stops = np.minimum(starts + self.run, np.repeat(ends, runs))
        whole = np.where(lengths >= self.shortest, span_hashes(numbers, ends - lengths, ends), 0)
        return span_hashes(numbers, starts, stops), run_ends, whole

    def bits(self, hashes):
        """Where each hash stands in the bitmap: the byte, and the bit in it."""
        places = (hashes >> np.uint64(64 - BITMAP_BITS)).astype(np.int64)
        return places >> 3, np.uint8(1) << (places & 7).astype(np.uint8)

    def add(self, numbers, lengths, keep_all=False):
        """Remembers the texts of a batch in order, without near duplicates of earlier ones unless
        keep_all. Returns which were remembered: bool (B,)."""
        hashes, ends, whole = self.hashes(numbers, lengths)
        new = np.zeros(len(lengths), bool)
        for i in range(len(lengths)):
            runs = set(hashes[ends[i] : ends[i + 1]].tolist())
            new[i] = keep_all or not self.has_near(runs)
            if new[i]:
                for run in runs:
                    self.first.setdefault(run, len(self.sizes))
                self.sizes.append(len(runs))
        self.texts.update(whole[new & (whole != 0)].tolist())
        np.bitwise_or.at(self.bitmap, *self.bits(hashes[np.repeat(new, np.diff(ends))]))
        return new

    def has_near(self, runs):
        """Whether a text with this set of runs is a near duplicate of a remembered one."""
        shared = Counter(self.first[run] for run in runs if run in self.first)
        return any(
            count >= max(self.least, self.share * min(len(runs), self.sizes[other]))
            for other, count in shared.items()
        )

    def find(self, numbers, lengths):
        """For each text of a batch: 2 if it is equal to a remembered one, 1 if nearly, else 0."""
        hashes, ends, whole = self.hashes(numbers, lengths)
        places, bits = self.bits(hashes)
        known = np.add.reduceat(self.bitmap[places] & bits > 0, ends[:-1]) if len(lengths) else []
        found = np.zeros(len(lengths), np.int8)
        for i in np.flatnonzero(np.asarray(known) >= self.least):
            found[i] = self.has_near(set(hashes[ends[i] : ends[i + 1]].tolist()))
        found[[text in self.texts for text in whole.tolist()]] = 2
        return found


class HeldOut(NearDuplicates):
    """The texts that must not be trained on, compared by their token ids.

    Half of the runs of 8 tokens, and at least 8: a sentence quoted in a long text does not count,
    and a paragraph does. Special tokens, [UNK] and punctuation are left out, or all texts of a
    script that the tokenizer cannot read would be equal."""

    def __init__(self, texts, tokenizer):
        super().__init__(run=8, share=0.5, least=8, shortest=3)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        self.is_word = np.zeros(max(vocabulary.values()) + 1, bool)
        for token, number in vocabulary.items():
            self.is_word[number] = token not in {"[UNK]", *special} and any(map(str.isalnum, token))
        self.add(*self.words(*encode(tokenizer, texts)), keep_all=True)

    def words(self, ids, lengths):
        kept = self.is_word[ids]
        counts = np.concatenate([[0], np.cumsum(kept)])
        ends = np.cumsum(lengths)
        return ids[kept], counts[ends] - counts[ends - lengths]

    def find_rows(self, columns, negatives=None):
        """For each row the largest `find` of its texts: 0, 1 or 2. As for SourceWriter.append."""
        found = {name: self.find(*self.words(*column)) for name, column in columns.items()}
        rows = np.max([found[name] for name in found if name != "negative"], axis=0)
        if "negative" in found:
            np.maximum.at(rows, np.repeat(np.arange(len(rows)), negatives), found["negative"])
        return rows


def held_out_texts(tasks):
    """The queries of retrieval tasks, and the documents that answer them. Other documents of a task
    may be training text."""
    texts = {}
    for folder in map(Path, tasks):
        documents, queries = (read_texts(folder / f"{n}.jsonl") for n in ("corpus", "queries"))
        for split in splits_of(folder):
            judged = read_judgements(folder / "qrels" / f"{split}.tsv", queries, documents)
            for query, answers in judged.items():
                texts |= dict.fromkeys([queries[query], *(documents[name] for name in answers)])
    return list(texts)


def contamination(held_out, left_out):
    """The entry of meta.json. left_out: source -> Counter of reasons."""
    found = {name: {r: n[r] for r in REASONS[1:] if n[r]} for name, n in left_out.items()}
    found = {name: counts for name, counts in found.items() if counts}
    removed = sum(sum(counts.values()) for counts in found.values())
    return {"held-out texts": len(held_out.sizes), "removed": removed, "sources": found}


# ------------------------------------------------------------------------------------------------
# Writing sources


def id_type(tokenizer):
    return np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32


def encode(tokenizer, texts):
    """The token ids of all texts (N,), and their number in each text (B,)."""
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    flat = np.fromiter(itertools.chain.from_iterable(ids), id_type(tokenizer))
    return flat, np.array([len(text) for text in ids], np.int64)


def json_line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


class SourceWriter:
    """Appends rows to the files of a source (data/store.py); `finish` writes its meta.json."""

    def __init__(self, folder, prefixes, tokenizer, held_out=None):
        """prefixes: of the columns query and document, or {} for documents alone. held_out: a
        HeldOut; `left_out` counts the rows that repeat its text."""
        self.folder, self.tokenizer, self.held_out = Path(folder), tokenizer, held_out
        self.prefixes = {name: prefixes[name] for name in prefixes if name != "negative"}
        self.rows, self.texts, self.tokens, self.left_out = 0, {}, {}, Counter()
        self.folder.mkdir(parents=True)
        for name in self.prefixes or ["document"]:
            self.append_texts(name, np.empty(0), np.empty(0, np.int64))

    def write(self, name, data):
        with open(self.folder / name, "ab") as file:
            file.write(data)

    def append_texts(self, name, ids, lengths):
        if name not in self.tokens:
            self.texts[name] = self.tokens[name] = 0
            self.write(f"{name}.offsets.bin", np.zeros(1, np.int64))
            if name == "negative":
                self.write("negative.rows.bin", np.zeros(self.rows + 1, np.int64))
        self.write(f"{name}.tokens.bin", ids.astype(id_type(self.tokenizer), copy=False))
        self.write(f"{name}.offsets.bin", self.tokens[name] + np.cumsum(lengths))
        self.texts[name] += len(lengths)
        self.tokens[name] += int(lengths.sum())

    def append(self, columns, lines=(), negatives=None, keep=None):
        """Appends n rows. columns: name -> (ids (N,), lengths (n,)); lines: their JSON lines;
        negatives (n,): how many texts of the column "negative" belong to each row; keep (n,): which
        rows to write; all by default. Rows that repeat held-out text are left out."""
        rows = len(columns["document"][1])
        keep = np.ones(rows, bool) if keep is None else keep
        negatives = np.zeros(rows, np.int64) if negatives is None else negatives
        if self.held_out:
            found = self.held_out.find_rows(columns, negatives)
            self.left_out.update(REASONS[i] for i in found[keep & (found > 0)])
            keep = keep & (found == 0)
        before = self.texts.get("negative", 0)
        for name, (ids, lengths) in columns.items():
            kept = np.repeat(keep, negatives) if name == "negative" else keep
            if name in self.tokens or kept.any():  # most sources have no negatives
                self.append_texts(name, ids[np.repeat(kept, lengths)], lengths[kept])
        if "negative" in self.tokens:
            self.write("negative.rows.bin", before + np.cumsum(negatives[keep]))
        if self.prefixes:
            self.write("pairs.jsonl", "".join(itertools.compress(lines, keep)).encode())
        self.rows += int(keep.sum())

    def finish(self):
        """Writes meta.json, last of all. Returns the number of rows and `left_out`."""
        prefixes = dict(self.prefixes)
        if "negative" in self.tokens:
            prefixes["negative"] = prefixes["document"]
        meta = {"rows": self.rows, "tokens": self.tokens, "prefixes": prefixes}
        meta["dtype"] = np.dtype(id_type(self.tokenizer)).name
        meta["tokenizer"] = fingerprint(self.tokenizer)
        write_json(self.folder / "meta.json", meta)
        return self.rows, self.left_out


def write_source(folder, columns, prefixes, tokenizer, held_out=None, stored=()):
    """Writes texts, and after them the rows of stored sources, as a source. columns: name -> texts,
    as many in each; stored: folders of sources. Returns as SourceWriter.finish."""
    writer = SourceWriter(folder, prefixes, tokenizer, held_out)
    for start in range(0, len(columns["document"]), BATCH):
        part = {name: texts[start : start + BATCH] for name, texts in columns.items()}
        rows = (dict(zip(part, row, strict=True)) for row in zip(*part.values(), strict=True))
        encoded = {name: encode(tokenizer, texts) for name, texts in part.items()}
        writer.append(encoded, list(map(json_line, rows)))
    for batch in itertools.chain.from_iterable(stored_rows(path, tokenizer) for path in stored):
        writer.append(*batch)
    return writer.finish()


def stored_rows(folder, tokenizer):
    """The rows of a source on disk in batches, as SourceWriter.append takes them."""
    source, path = Source(folder, tokenizer), Path(folder, "pairs.jsonl")
    lines = open(path, encoding="utf-8") if path.is_file() else iter(())
    for start in range(0, len(source), BATCH):
        end, columns, negatives = min(start + BATCH, len(source)), {}, None
        for name, column in source.columns.items():
            first, last = start, end
            if name == "negative":
                first, last = (int(source.first_negative[row]) for row in (start, end))
                negatives = np.diff(source.first_negative[start : end + 1])
            offsets = column.offsets[first : last + 1]
            columns[name] = column.tokens[offsets[0] : offsets[-1]], np.diff(offsets)
        yield columns, list(itertools.islice(lines, end - start)), negatives


# ------------------------------------------------------------------------------------------------
# Data folders

TOP_NAMES = {"tokenizer.json", "meta.json", "stage1", "stage2", "stage3"}
TOP_NAMES |= {"retrieval", "long", "search"}


@contextmanager
def data_folder(out):
    """A new folder to write into, which becomes `out` if the block ends without an error.

    An old data folder is renamed before it is removed, so that a kill never loses both. Raises
    InputError for an `out` that holds anything else, before the block runs."""
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        meta = read_json(out / "meta.json") if (out / "meta.json").is_file() else {}
        names = {path.name for path in out.iterdir()} if out.is_dir() else set()
        if meta.get("made_by") != "nanoembed" or not names <= TOP_NAMES:
            raise InputError(f"{out} is not a data folder: remove it, or choose another --out")
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        (temporary / "new").mkdir()
        yield temporary / "new"
        if out.exists():
            out.rename(temporary / "old")
        (temporary / "new").rename(out)
    except OSError as error:
        if temporary and (temporary / "old").exists():
            (temporary / "old").rename(out)
        raise InputError(f"cannot write {out}: {error.strerror}; nothing was changed") from None
    finally:
        if temporary and (out.exists() or not (temporary / "old").exists()):
            shutil.rmtree(temporary, ignore_errors=True)


def common_tokenizer(path, folders=()):
    """The tokenizer of a file or of data folders; None where none is given.

    Raises InputError where they have different ones."""
    places = [place for place in (path, *folders) if place]
    found = [load_tokenizer(place) for place in places]
    if len({fingerprint(tokenizer) for tokenizer in found}) > 1:
        names = ", ".join(map(str, places))
        raise InputError(f"{names} have different tokenizers, so their token ids do not fit")
    return found[0] if found else None


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
        name = f"{path.parent.name}/{path.name}"
        name += f"-{path.parents[1].name}" if name in written else ""
        given = Source(path, tokenizer).meta["prefixes"]
        nothing = {"document": []}
        written[name] = write_source(folder / name, nothing, given, tokenizer, held_out, [path])

    leaks = contamination(held_out, {name: reasons for name, (_, reasons) in written.items()})
    for name, (count, _) in written.items():
        print(f"  {name:34} {count:8,} {'texts' if name.startswith('stage1') else 'pairs'}")
    for source, (corpus, queries) in tasks.items():
        counts = ", ".join(f"{len(asked):,} {split} queries" for split, asked in queries.items())
        print(f"  retrieval/{source:24} {len(corpus):8,} documents, {counts}")
    print(f"  {leaks['removed']:,} training rows that repeat held-out text were left out")
    rows = {name: count for name, (count, _) in written.items()}
    meta = {"made_by": "nanoembed", **meta, "rows": rows, "contamination": leaks}
    write_json(folder / "meta.json", meta)


def show_pairs(folder, count):
    """Prints pairs drawn at random from all sources of a data folder, for a person to judge."""
    rng = np.random.default_rng(0)
    paths = [p for p in sorted(Path(folder).glob("stage*/*/pairs.jsonl")) if p.stat().st_size]
    for i in range(count):
        path = paths[i % len(paths)]
        with open(path, "rb") as file:
            file.seek(rng.integers(path.stat().st_size))
            file.readline()  # the rest of a line
            pair = json.loads(file.readline() or path.open("rb").readline())
        print(f"\n--- {path.parent.name}\n{pair['query']}\n  ->")
        print("\n".join(f"  {line}" for line in pair["document"].split("\n")[:8]))
