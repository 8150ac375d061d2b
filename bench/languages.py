"""Trained on English alone, what does a model find for a question in another language?

    pip install --target=catalogues --no-deps django==5.2.19 sphinx==9.0.4 wagtail==8.0.1 \\
        django-oscar==4.2.1 django-allauth==65.21.1 django-cms==5.1.3 djangorestframework==3.18.3
    python bench/languages.py catalogues                  # the demo's model; ten minutes

The message catalogues (.po) of programs are parallel text: English messages, each translated by
people. A task asks with the translation for the English message, among all of them; half of the
messages, by their own text, are held out. The last columns are after --steps more steps of stage 2
on the other half, in German alone: what do they bring to German, and what to languages that were
never seen? Scores are nDCG@10 with standard errors over queries.
"""

import importlib.util
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import contrastive
from bench.shared import print_head, print_row
from common.device import best_device
from common.files import load_tokenizer
from common.options import InputError, cli, read_options, split_words
from data.filter import copy_data
from data.prepare import data_folder, write_source
from data.tasks import PREFIXES, write_task
from evaluate import Retrieval, last_stage, shown, summary
from model import NomicBert


@dataclass
class Options:
    model: str = ""  # a checkpoint; empty: the last stage trained in OUT
    data: str = "out/pydocs"  # the data folder that it was trained on
    out: str = "out"  # OUT/languages has the tasks, the data and the run
    languages: str = "de,fr,es,ru"  # whose catalogues to read
    taught: str = "de"  # the one that is trained on; empty: none
    steps: int = 100  # of stage 2 with it
    batch_size: int = 256  # pairs in a step


def read_catalogues(folder, language):
    """English message -> translation, of all catalogues of a language below a folder. Left out:
    messages of less than three words, and those that nobody has checked or translated."""
    import polib

    found = {}
    for path in sorted(Path(folder).rglob(f"{language}/LC_MESSAGES/*.po")):
        try:
            entries = polib.pofile(str(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is not a catalogue of messages: {error}") from None
        for entry in entries.translated_entries():
            if len(entry.msgid.split()) >= 3 and entry.msgstr and entry.msgstr != entry.msgid:
                found.setdefault(entry.msgid, entry.msgstr)
    return found


def is_held_out(message):
    return zlib.crc32(message.encode()) % 2 == 0


def write_tasks(catalogues, folder):
    """A task in the BEIR layout for each language, over the same documents: all messages."""
    messages = sorted({message for found in catalogues.values() for message in found})
    documents = {f"m{i}": message for i, message in enumerate(messages)}
    number = {message: name for name, message in documents.items()}
    prefixes = (PREFIXES["query"], PREFIXES["document"])
    for language, found in catalogues.items():
        asked = [(text, [number[m]]) for m, text in sorted(found.items()) if is_held_out(m)]
        write_task(folder / language, documents, {"test": asked}, prefixes)


def teach(options, model, found, out):
    """Stage 2 again, on translations alone: by size they would be one pair in a hundred of all.
    Returns the directory of the run."""
    pairs = [(text, message) for message, text in sorted(found.items()) if not is_held_out(message)]
    data = out / f"data-{options.taught}"
    if not data.exists():
        with data_folder(data) as new:
            copy_data(options.data, new, {str(options.data): ["stage2"]})
            columns = dict(zip(("query", "document"), zip(*pairs, strict=True), strict=True))
            prefixes = {side: PREFIXES[side] for side in columns}
            tokenizer = load_tokenizer(options.data)
            write_source(new / "stage2" / "translations", columns, prefixes, tokenizer)
    given = [f"--data={data}", f"--init={model}", f"--out={out}/taught-{options.taught}"]
    given += [f"--steps={options.steps}", f"--batch-size={options.batch_size}", "--eval-every=0"]
    contrastive.main([*given, f"--warmup={options.steps // 10}"])
    return out / f"taught-{options.taught}"


def scores_of(directory, tasks):
    """language -> nDCG@10 of each query."""
    model = NomicBert.from_pretrained(directory, device=best_device())
    length = model.config.trained_length
    return {t.name: np.array(t.scores(t.rank(model, length))["nDCG@10"]) for t in tasks}


def main(arguments):
    words, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    if len(words) != 1:
        raise InputError("give a folder with catalogues: python bench/languages.py catalogues")
    if not importlib.util.find_spec("polib"):
        raise InputError("polib is not installed: pip install -r requirements-dev.txt")
    directory = options.model or str(last_stage(options.out))
    catalogues = {name: read_catalogues(words[0], name) for name in options.languages.split(",")}
    for language, found in catalogues.items():
        if len(found) < 20:
            raise InputError(f"{words[0]} has {len(found)} messages in {language}/LC_MESSAGES/*.po")
    if options.taught and options.taught not in catalogues:
        raise InputError(f"--taught={options.taught}: give one of {options.languages}")
    out = Path(options.out, "languages")
    write_tasks(catalogues, out / "tasks")
    tasks = [Retrieval(out / "tasks" / name, "test") for name in catalogues]
    matched = {t.name: t.scores(t.rank_bm25())["nDCG@10"] for t in tasks}
    tokenizer = load_tokenizer(directory)
    before, after = scores_of(directory, tasks), {}
    if options.taught:
        run = teach(options, directory, catalogues[options.taught], out)
        after = scores_of(run, tasks)
    taught = f"and {options.steps} steps with {options.taught}" if after else ""
    columns = ("BM25", "the model", *([taught, "difference"] if after else []))
    print(f"\n{len(tasks[0].documents):,} English messages\n")
    print_head("language", "queries", "tokens a word", "[UNK]", *columns)
    for task in tasks:
        ids = [i for text in task.queries for i in tokenizer.encode(text).ids[1:-1]]
        unknown = np.mean(np.array(ids) == tokenizer.token_to_id("[UNK]"))
        words = sum(len(text.split()) for text in task.queries)
        values = [matched[task.name], before[task.name]]
        if after:
            values += [after[task.name], after[task.name] - before[task.name]]
        cells = [shown(summary(value)) for value in values]
        print_row(task.name, len(task.queries), f"{len(ids) / words:.1f}", f"{unknown:.1%}", *cells)


if __name__ == "__main__":
    cli(main)
