"""From texts to a data folder: what every script in data/ does once it has read its source.

Held-out splits, near duplicates, the tokenizer, and files in the layout of data/store.py. A folder
takes its name only when it is whole: everything is written to NAME.tmp first.
"""

import hashlib
import json
import re
import shutil
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from data.store import fingerprint, load_tokenizer
from data.write import write_columns
from options import InputError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def words(text):
    return re.findall(r"\w+", text.lower())


def split_of(group, dev_percent=4, test_percent=6):
    """'train', 'dev' or 'test', by a hash of a group's name: the same on every machine, and what is
    added later moves nothing."""
    digest = hashlib.blake2b(group.encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big") % 100
    if number < dev_percent:
        return "dev"
    return "test" if number < dev_percent + test_percent else "train"


class NearDuplicates:
    """Remembers texts, and tells whether another is nearly one of them.

    Two texts are near duplicates if they share `threshold` or more of the shingles (runs of words)
    of the one that has fewer."""

    def __init__(self, threshold=0.4, run=5):
        self.threshold, self.run = threshold, run
        self.first = {}  # shingle -> number of the text in which it first stood
        self.sizes = []  # number of a text -> how many shingles it has

    def shingles(self, text):
        tokens = words(text)
        runs = zip(*(tokens[i:] for i in range(self.run)), strict=False)
        return set(map(hash, runs)) or {hash(tuple(tokens))}  # a short text is a run by itself

    def like(self, text, shingles=None):
        """Whether the text is a near duplicate of one that was added."""
        shingles = shingles or self.shingles(text)
        shared = Counter(self.first[shingle] for shingle in shingles if shingle in self.first)
        return any(
            count >= self.threshold * min(len(shingles), self.sizes[other])
            for other, count in shared.items()
        )

    def add(self, text):
        """Remembers the text and returns True, unless it is a near duplicate: then False."""
        shingles = self.shingles(text)
        if self.like(text, shingles):
            return False
        for shingle in shingles:
            self.first.setdefault(shingle, len(self.sizes))
        self.sizes.append(len(shingles))
        return True


def train_tokenizer(texts, vocab_size):
    """A WordPiece tokenizer as bert-base-uncased's: lower case, no accents, [CLS] text [SEP].

    The library's trainer numbers the pieces of words ("##a") in the order in which it comes upon
    them, which differs from run to run, and breaks ties by these numbers. They are given to it as
    special tokens first, so that two runs are equal."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts = Counter()
    for text in texts:
        counts.update(text)
    frequent = "".join(c for c, count in counts.items() if count >= 50 or c.isascii())
    alphabet = sorted(set(tokenizer.normalizer.normalize_str(frequent)) - {" "})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + [f"##{c}" for c in alphabet],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))

    trained = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    trained.normalizer, trained.pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    trained.decoder = decoders.WordPiece(prefix="##")
    trained.add_special_tokens(SPECIAL_TOKENS)
    ends = [(token, trained.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    trained.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return trained


# ------------------------------------------------------------------------------------------------
# Files


@contextmanager
def whole_or_nothing(folder):
    """A new folder to write into, which takes its name only if the block ends without an error."""
    folder = Path(folder)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except OSError as error:
        raise InputError(
            f"cannot write {folder}: {error.strerror}; nothing was left behind"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def data_folder(out):
    """As whole_or_nothing, in place of an earlier data folder. Raises InputError where OUT holds
    something else, before anything is written."""
    out = Path(out)
    if out.exists() and not (out / "meta.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} holds something else than data: --out= chooses another folder")
    with whole_or_nothing(out) as folder:
        yield folder


def read_tokenizer(path, folders=()):
    """The tokenizer of a file, or else of data folders that have to agree on it; None without.

    Raises InputError where there is none, or two."""
    if path and not Path(path).is_file():
        raise InputError(f"--tokenizer={path}: there is no such file; give a tokenizer.json")
    found = [load_tokenizer(folder) for folder in folders]
    if path:
        found.insert(0, load_tokenizer(Path(path)))
    if len({fingerprint(tokenizer) for tokenizer in found}) > 1:
        names = ", ".join(str(name) for name in (path, *folders) if name)
        raise InputError(f"{names} have different tokenizers: their ids do not mix")
    return found[0] if found else None


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_documents(folder, texts, tokenizer, held_out=None):
    return write_columns(folder, {"document": texts}, {}, tokenizer, held_out)


def write_pairs(folder, pairs, prefixes, tokenizer, held_out=None):
    """pairs: (query, document); prefixes: theirs. The text goes beside the tokens, for people."""
    queries, documents = zip(*pairs, strict=True) if pairs else ((), ())
    columns = {"query": queries, "document": documents}
    prefixes = dict(zip(columns, prefixes, strict=True))
    return write_columns(folder, columns, prefixes, tokenizer, held_out)


def write_retrieval(folder, corpus, queries, prefixes):
    """The BEIR layout. corpus: name -> text; queries: split -> (query, name of its document, or a
    list of names)."""
    write_jsonl(folder / "corpus.jsonl", ({"_id": n, "text": text} for n, text in corpus.items()))
    asked, judged = [], {split: ["query-id\tcorpus-id\tscore"] for split in queries}
    for split, rows in queries.items():
        for i, (query, name) in enumerate(rows):
            asked.append({"_id": f"{split}-{i}", "text": query})
            for right in dict.fromkeys([name] if isinstance(name, str) else name):
                judged[split].append(f"{split}-{i}\t{right}\t1")
    write_jsonl(folder / "queries.jsonl", asked)
    (folder / "qrels").mkdir()
    for split, lines in judged.items():
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    meta = {"prefixes": dict(zip(("query", "document"), prefixes, strict=True))}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))


def show_pairs(folder, count):
    """Prints pairs drawn at random from all sources of a data folder, for a person to judge."""
    rng = np.random.default_rng(0)
    paths = sorted(Path(folder).glob("stage*/*/pairs.jsonl"))
    lines = {path: path.read_text("utf-8").split("\n")[:-1] for path in paths}
    for i in range(count):
        path = paths[i % len(paths)]
        pair = json.loads(lines[path][rng.integers(len(lines[path]))])
        print(f"\n--- {path.parent.name}\n{pair['query']}\n  ->")
        print("\n".join(f"  {line}" for line in pair["document"].split("\n")[:8]))
