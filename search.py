"""A search by meaning: the embeddings of all documents, kept, and a query's nearest ones.

Embedding documents takes the time, and is done once for each checkpoint. A query then is one text
through the model and one product of a matrix with a vector.
"""

import contextlib
import json
import sys
from pathlib import Path

import numpy as np

import common
from data import store
from model import NomicBert
from options import InputError
from processes import best_device
from retrieval import top_k


class Index:
    """The embeddings of all documents of a data folder, kept beside the checkpoint they are of."""

    def __init__(self, directory, data, max_tokens):
        self.model = NomicBert.from_pretrained(directory, device=best_device())
        max_tokens = max_tokens or self.model.config.trained_length
        self.corpus, cache = Path(data, "search", "corpus.jsonl"), Path(directory, "search.npz")
        if not self.corpus.is_file():
            raise InputError(f"{self.corpus} is missing: python data/pydocs.py makes out/pydocs")
        made_of = (Path(directory, "model.safetensors"), self.corpus)
        key = f"{max_tokens} " + " ".join(map(store.fingerprint, made_of))
        kept = np.load(cache) if cache.is_file() else {"key": ""}
        if str(kept["key"]) != key:
            kept = self.build(key, max_tokens)
            common.replace(cache, lambda path: np.savez(open(path, "wb"), **kept))
        self.embeddings, self.offsets = kept["embeddings"].astype(np.float32), kept["offsets"]

    def build(self, key, max_tokens):
        lines = self.corpus.read_bytes().splitlines(keepends=True)
        print(f"embedding {len(lines):,} documents, once for this checkpoint", file=sys.stderr)
        texts = ["search_document: " + json.loads(line)["text"] for line in lines]
        embeddings = self.model.encode(texts, max_tokens).astype(np.float16)
        offsets = np.cumsum([0, *map(len, lines)])  # of the lines: a search reads only ten of them
        return {"key": key, "embeddings": embeddings, "offsets": offsets}

    def search(self, query, k=10):
        """(cosine, name, text) of the k best documents, best first."""
        if not query.strip():
            raise InputError(
                'the query is empty: python evaluate.py search "how do I read a csv file"'
            )
        query = self.model.encode(["search_query: " + query])
        scores, numbers = top_k(query, self.embeddings, k)
        with open(self.corpus, "rb") as file:
            for score, number in zip(scores[0], numbers[0], strict=True):
                file.seek(self.offsets[number])
                row = json.loads(file.readline())
                yield score, row["_id"], row["text"]


def typed_queries():
    """What a person types, until an empty line or the end of the input."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while query := input("search> ").strip():
            yield query
