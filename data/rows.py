"""Rows of pairs as files have them, checked one at a time: faults are counted by reason."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from options import InputError


@dataclass
class Pairs:
    """One source, before it is read."""

    name: str
    stage: int  # 2 or 3; 1: documents alone
    prefixes: tuple  # of queries and documents
    read: Callable  # () -> iterator of (where, value): the parsed JSON of a row, None if it is none
    columns: tuple = ("query", "document", "negatives")  # their names in the rows
    files: list = field(default_factory=list)  # what it is read from, if that is files

    def identity(self, options):
        """What decides the rows: an interrupted run is continued only where it is the same."""
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return [self.name, self.prefixes, self.columns, options.limit, options.longest, stats]


def checked_rows(source, options, tally):
    """The rows of a source as data/write.py takes them; the tally has what was wrong with others.

    Raises InputError at the end if not one row was usable."""
    usable, keys = 0, None
    for where, value in itertools.islice(source.read(), options.limit or None):
        if keys is None and isinstance(value, dict):
            keys = list(value)
        row = checked(value, source, options, where, tally)
        if row is not None:
            usable += 1
            yield row
    if usable == 0:
        wanted = ", ".join(source.columns[: 2 if source.stage > 1 else 1])
        found = f"its rows have {', '.join(map(str, keys))}" if keys else "no row is a JSON object"
        hint = "; --columns= names them" if hasattr(options, "columns") else ""
        raise InputError(f"{source.name}: no row has {wanted}: {found}{hint}")


def checked(value, source, options, where, tally):
    """One row, or None. Forms, beside an object of the named columns: [query, document, negative
    ...], and {"set": [...]} of texts that say the same, as public collections have them."""
    if isinstance(value, dict) and isinstance(value.get("set"), list):
        value = value["set"][:2]
    names = ("query", "document") if source.stage > 1 else ("document",)
    if isinstance(value, list):
        texts, negatives = value[: len(names)], value[len(names) :]
    elif isinstance(value, dict):
        texts = [value.get(column) for column in source.columns[: len(names)]]
        texts = [text[0] if isinstance(text, list) and text else text for text in texts]
        given = value.get(source.columns[2]) if len(source.columns) > 2 else None
        negatives = [given] if isinstance(given, str) else given or []
    else:
        return tally.add("not a JSON object", where)
    if len(texts) < len(names) or None in texts:
        missing = source.columns[texts.index(None)] if None in texts else "second text"
        return tally.add("column missing", where, missing)
    if not isinstance(negatives, list) or not all(isinstance(t, str) for t in [*texts, *negatives]):
        return tally.add("not text", where)
    texts, negatives = [t.strip() for t in texts], [t.strip() for t in negatives if t.strip()]
    if "" in texts:
        return tally.add("empty", where, names[texts.index("")])
    if source.stage > 1 and max(map(len, [*texts, *negatives])) > options.longest:
        tally.add("over length, cut", where, f"more than {options.longest:,} characters")
        texts, negatives = ([t[: options.longest] for t in part] for part in (texts, negatives))
    return {**dict(zip(names, texts, strict=True)), "negatives": negatives, "where": where}
