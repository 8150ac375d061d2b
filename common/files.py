"""Files: read with an error that names them, written whole or not at all."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import zlib
from pathlib import Path

from tokenizers import Tokenizer

from common.options import InputError

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def write_whole(path, write):
    """Replaces a file as a whole: write(temporary path), then rename. A kill at any moment leaves
    the old file or the new one. Raises InputError where it cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.nanoembed.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # a kill may have left it
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask says
        write(temporary)
        temporary.chmod(mode)  # safetensors lets only the owner read
        os.replace(temporary, path)
    except Exception as error:  # torch, safetensors and tokenizers each raise errors of their own
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {path}: {reason}; the file before is untouched") from None


def write_text(path, text):
    write_whole(path, lambda temporary: temporary.write_text(text, "utf-8"))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=1))


def read_json(path):
    """The object in a JSON file. Raises InputError for a missing file, or one without an object."""
    return parse_object("\n".join(line for _, line in read_lines(path)), path)


def read_json_lines(path):
    """(number, object) for each line of a JSON lines file; blank lines are skipped. Raises
    InputError naming the line that is no object."""
    for number, line in read_lines(path):
        if line.strip():
            yield number, parse_object(line, f"{path}, line {number}")


def parse_object(text, where):
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} holds a {type(values).__name__}, not an object")
    return values


def read_lines(path):
    """(number, line) for each line of a text file, plain or gzipped; FILE.gz stands for FILE.
    Raises InputError for a file that is missing, damaged or not UTF-8."""
    path, number = Path(path), 0
    if not path.exists() and Path(f"{path}.gz").is_file():
        path = Path(f"{path}.gz")
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig") as file:  # -sig drops a byte order mark
            for number, line in enumerate(file, start=1):
                yield number, line.rstrip("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        reason = "not UTF-8, convert it" if isinstance(error, UnicodeDecodeError) else reason
        where = f" after line {number}" if number else ""
        raise InputError(f"{path} cannot be read{where}: {reason}") from None


def fingerprint(content):
    """16 hexadecimal digits of the SHA-256 of a tokenizer, of bytes, or of the file at a path."""
    if isinstance(content, Tokenizer):
        content = content.to_str().encode()
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


def load_tokenizer(folder):
    """The tokenizer.json of a data folder or a checkpoint directory, or that file itself. It
    neither truncates nor pads, and reads "[MASK]" in a text as the characters that it is.

    Raises InputError where there is none, for one that does not make [CLS] text [SEP], and for one
    whose ids are not below the number of its tokens."""
    path = Path(folder) if Path(folder).suffix == ".json" else Path(folder, "tokenizer.json")
    if not path.is_file():
        raise InputError(
            f"{path} is missing: {folder} is neither a data folder nor a checkpoint directory"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path} is not a tokenizer: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as text; the post-processor still adds [CLS] and [SEP]
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing or tokenizer.encode("").tokens != ["[CLS]", "[SEP]"]:
        raise InputError(
            f"{path} has to have the tokens {' '.join(SPECIAL_TOKENS)}, and to put [CLS] before a "
            "text and [SEP] behind it"
        )
    size, largest = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values())
    if largest >= size:
        raise InputError(f"{path} has an id {largest} and {size} tokens: ids have to be below that")
    return tokenizer
