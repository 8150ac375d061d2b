"""What several tests use: a tokenizer, and a small data folder made by the real script."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

# One thread: two test processes share two cores, and some tests fork, which may hang after torch
# has used several threads. torch reads this when it is first imported.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = cache = tempfile.mkdtemp(prefix="nanoembed-datasets-")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)

from common.files import load_tokenizer  # noqa: E402
from data import pydocs  # noqa: E402
from data.tokenizer import train_tokenizer  # noqa: E402

SENTENCES = (
    "Reads a file, line by line, and returns a list of its words.",
    "The sum of two numbers is a number; the mean of none is not defined.",
    "A query and a document belong together if the document answers the query.",
    "search_query: search_document: classification: clustering:",
)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(SENTENCES * 20, vocab_size=300)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data folder of some hundred pairs: the documentation of numpy, tqdm and tokenizers."""
    folder = tmp_path_factory.mktemp("data") / "small"
    pydocs.prepare(pydocs.Options(out=str(folder), core="numpy,tqdm,tokenizers", vocab_size=2048))
    return folder


@pytest.fixture(scope="session")
def data_tokenizer(data):
    return load_tokenizer(data)
