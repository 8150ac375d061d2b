"""How good is it? Retrieval, texts beyond the trained length; and a search, to try it by hand.

    python evaluate.py                        # the ladder: BM25, and the model of each stage
    python evaluate.py search "how do I read a csv file"     # the ten best; no query: a prompt
    python evaluate.py long                   # beyond the trained length, four ways to scale RoPE
    python evaluate.py plot                   # learning curves, ladder, length curves as PNG
    python evaluate.py retrieval FOLDER       # a task of your own in the BEIR layout, beside BM25

All but the ladder take any checkpoint: --model=DIR, or a name on the hub. The ladder and the long
texts use modules that were held out from all training. Results go to OUT/results.json.

A model reads the first --max-tokens tokens of a text, in a search, too; BM25 reads all of it.
"""

import collections
import contextlib
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from common.checkpoint import find_checkpoint, weight_files
from common.device import best_device
from common.files import fingerprint, read_json, write_json, write_whole
from common.options import InputError, cli, read_options, split_words
from data.prefixes import PREFIXES
from data.store import Source
from data.tasks import read_rows, splits_of
from metrics import METRICS, Retrieval, bm25, shown, summary, top_k
from mlm import held_out_scores
from model import NomicBert, NomicBertForMaskedLM

# a run's folder in OUT -> its row in the ladder
MODELS = {"words": "word vectors alone", "mlm": "after stage 1"}
MODELS |= {"contrastive": "after stage 2", "finetune": "after stage 3"}


@dataclass
class Options:
    data: str = "out/pydocs"  # ladder, search, long: a data folder
    out: str = "out"  # where the stages' runs are; results.json and pictures go there too
    model: str = ""  # not ladder: a checkpoint or a name on the hub; empty: the last stage trained
    split: str = "test"  # ladder: the held-out texts, test, or dev while tuning
    max_tokens: int = 0  # texts are truncated to this, at least 3; 0: the trained length [0, 1e6]
    dims: int = 0  # retrieval: the first dimensions only (Matryoshka); 0: all [0, 1e6]
    rope_factor: float = 0.0  # search, retrieval: Dynamic NTK's s, from 1; 0: as saved [0, 1000]
    documents: int = 0  # search: only so many documents, drawn at random; 0: all [0, 1e9]
    model_only: bool = False  # search: without BM25


# ------------------------------------------------------------------------------------------------
# Models and results of a folder OUT


def trained_stages(out):
    """The runs of MODELS that OUT has models of. Raises InputError where there are none."""
    trained = [stage for stage in MODELS if Path(out, stage, "model.safetensors").is_file()]
    if not trained:
        raise InputError(f"nothing was trained in {out}: run make demo, or give another --out")
    return trained


def chosen_model(options):
    """(model, its directory, the length that texts are truncated to)."""
    last = options.model or Path(options.out, trained_stages(options.out)[-1])
    directory, factor = find_checkpoint(last), options.rope_factor or None
    model = NomicBert.from_pretrained(directory, rope_factor=factor, device=best_device())
    return model, directory, options.max_tokens or model.config.trained_length


def models_of(options):
    """(name of its row, model) of each run of MODELS that OUT has; of stage 1, which cannot search
    yet, only where it is alone."""
    trained, device = trained_stages(options.out), best_device()
    for stage in [stage for stage in trained if stage != "mlm"] or trained:
        model = NomicBert.from_pretrained(f"{options.out}/{stage}", device=device)
        yield MODELS[stage], model


def save_results(out, key, value):
    """Sets one entry of OUT/results.json and keeps the others."""
    path = Path(out, "results.json")
    results = read_json(path) if path.is_file() else {}
    write_json(path, {**results, key: value})


# ------------------------------------------------------------------------------------------------
# The commands


def compare(task, models, options):
    """Prints the metrics of BM25, of each (name, model), and of the last model together with BM25,
    as a search uses it. Returns name -> metric -> mean and standard error."""
    print(f"{task.about}\n{'':28}" + "".join(f"{metric:>17}" for metric in METRICS))

    def print_row(name, scores):
        row = {metric: summary(values) for metric, values in scores.items()}
        print(f"{name[-27:]:28}" + "".join(f"{shown(s):>17}" for s in row.values()), flush=True)
        return row

    rows = {"BM25": print_row("BM25", task.scores(task.rank_bm25()))}
    matched = task.rank_bm25(split_identifiers=True)
    alone, split = task.scores(matched), "BM25, identifiers split"
    rows[split] = print_row(split, alone)
    for name, model in models:
        length = options.max_tokens or model.config.trained_length
        ranking = task.rank(model, length, dims=options.dims or None)
        rows[name] = print_row(name, task.scores(ranking))
    together, name = task.scores(fuse([matched, ranking])), f"{name} + BM25"
    rows[name] = print_row(name, together)
    print_row(
        "  minus BM25 split, paired", {m: np.subtract(together[m], alone[m]) for m in METRICS}
    )
    print()
    return rows


def ladder(options):
    """BM25 and the model after each stage on the same held-out queries."""
    tasks, models = Retrieval.open_all(options.data, options.split), [*models_of(options)]
    rows = {task.name: compare(task, models, options) for task in tasks}
    save_results(options.out, "ladder", rows)


def scalings(times):
    """Ways to read a text of `times` the trained length. Linear and NTK must be told how long it
    is; Dynamic NTK sees it from the text."""
    return {
        "plain RoPE": {"scaling": "none"},
        "linear": {"scaling": "linear", "factor": float(times)},
        "NTK": {"scaling": "ntk", "factor": float(times)},
        "Dynamic NTK": {"scaling": "dynamic", "factor": 2.0},
    }


def long(options, times=(1, 2, 4, 8), windows=40):
    """Masked accuracy after stage 1 (or of --model, with an MLM head) at 1, 2, 4 and 8 times the
    trained length, or as far as --max-tokens: the same masks in the same text, which is read in
    pieces of each length."""
    where = options.model or f"{options.out}/mlm"
    model = NomicBertForMaskedLM.from_pretrained(where, device=best_device())
    length, texts, table = model.config.trained_length, [], {}
    times = [n for n in times if n * length <= (options.max_tokens or math.inf)]
    if not times:
        raise InputError(f"--max-tokens={options.max_tokens}: give {length}, as trained, or more")
    longest = length * times[-1]
    column = Source(f"{options.data}/stage1/long", model.bert.tokenizer).columns["document"]
    for ids in (column[row].astype(np.int64) for row in range(len(column))):
        texts += list(ids[: len(ids) // longest * longest].reshape(-1, longest))
    if not texts:
        raise InputError(f"{options.data} has no long text of {longest} tokens: lower --max-tokens")
    print(f"{len(texts[:windows])} windows of {longest} held-out tokens")
    print(f"\n{'':14}{'tokens':>8}{'masked accuracy':>20}")
    for name in scalings(1):
        for n in times:
            model.bert.rope = replace(model.bert.rope, **scalings(n)[name])
            _, hit, window = held_out_scores(model, texts[:windows], piece=n * length)
            accuracy = summary(hit, window)
            table.setdefault(name, {})[n * length] = accuracy
            print(f"{name:14}{n * length:8}{shown(accuracy):>20}", flush=True)
    if not options.model or options.out != Options.out:  # out/ has the lengths of its own model
        save_results(options.out, "long", {"trained length": length, "table": table})


def retrieval(options, folder):
    """The metrics on each split of a task in the BEIR layout, beside BM25."""
    if not splits_of(folder):
        raise InputError(f"{folder} has no qrels/*.tsv: the layout of a task is in data/tasks.py")
    model, directory, length = chosen_model(options)
    name = options.model or str(directory)
    settings = f"--max-tokens={length} --dims={options.dims} --rope-factor={options.rope_factor:g}"
    for split in splits_of(folder):
        rows = compare(Retrieval(folder, split), [(name, model)], options)
        save_results(options.out, f"retrieval {folder} {split} {name} {settings}", rows)


def fuse(rankings, k=100):
    """Reciprocal rank fusion (Cormack et al., 2009): a document scores 1 / (60 + rank) in each
    ranking that has it. rankings: several (n, k) -> one (n, k), best first, -1 where there are no
    more. Ranks need no common scale, and cosines and BM25's scores have none."""
    fused = np.full((len(rankings[0]), k), -1)
    for i, lists in enumerate(zip(*rankings, strict=True)):
        scores = collections.Counter()
        for ranking in lists:
            scores.update({int(d): 1 / (61 + rank) for rank, d in enumerate(ranking) if d >= 0})
        best = [document for document, _ in scores.most_common(k)]
        fused[i, : len(best)] = best
    return fused


def document_embeddings(model, directory, corpus, texts, max_tokens):
    """Embeddings (n, E) of texts of the file `corpus`, kept beside the checkpoint, because to embed
    them takes minutes. A query then is one text through the model and one matrix product."""
    files = (*weight_files(directory), corpus)
    key = " ".join([str(max_tokens), str(model.rope), str(len(texts)), *map(fingerprint, files)])
    cache = directory / "nanoembed-search.safetensors"
    # a missing or damaged cache is made again
    with contextlib.suppress(Exception), safe_open(cache, "np") as kept:
        if kept.metadata()["key"] == key:
            return kept.get_tensor("embeddings").astype(np.float32)
    of_each = f"the first {max_tokens:,} tokens of each"
    print(f"embedding {len(texts):,} documents ({of_each}), once for this model", file=sys.stderr)
    embeddings = model.encode([PREFIXES["document"] + text for text in texts], max_tokens)
    stored = {"embeddings": embeddings.astype(np.float16)}
    with contextlib.suppress(InputError):  # a read-only checkpoint is searched without a cache
        write_whole(cache, lambda path: save_file(stored, path, {"key": key}))
    return stored["embeddings"].astype(np.float32)  # as from the cache


def search(options, *words):
    """Prints the ten best documents, and for each where the model and BM25 rank it among their
    first hundred; without a query, asks for queries until an empty line."""
    if words and not " ".join(words).strip():
        raise InputError('the query is empty: python evaluate.py search "how do I read a csv file"')
    model, directory, length = chosen_model(options)
    corpus = Path(options.data, "search", "corpus.jsonl")
    documents = [(name, text) for _, name, text in read_rows(corpus)]
    drawn = np.random.default_rng(0).permutation(len(documents))[: options.documents or None]
    names, texts = zip(*(documents[i] for i in drawn), strict=True)
    embeddings = document_embeddings(model, directory, corpus, texts, length)
    match = None if options.model_only else bm25(texts, split_identifiers=True)
    typed = iter(lambda: input("search> ").strip(), "")
    with contextlib.suppress(EOFError):
        for query in [" ".join(words)] if words else typed:
            embedding = model.encode([PREFIXES["query"] + query])  # (1, E)
            rankings = {"model": top_k(embedding, embeddings, k=100)[1]}
            rankings |= {"BM25": match([query])} if match else {}
            ranks = [{number: i for i, number in enumerate(x[0], 1)} for x in rankings.values()]
            print("".join(f"{name:>6}" for name in rankings), " cosine")
            best = fuse([*rankings.values()])[0]
            for number in best[best >= 0][:10]:  # -1: no more were found
                places = "".join(f"{rank.get(number, '-'):>6}" for rank in ranks)
                text = " ".join(texts[number].removeprefix(names[number]).split())
                cosine = embeddings[number] @ embedding[0]
                print(f"{places}  {cosine:6.3f}  {names[number]}\n{'':8}{text[:90]}")


def plot(options):
    """Pictures of what is in OUT, as PNG."""
    from common.plots import plot_all

    print("\n".join(f"wrote {path}" for path in plot_all(options.out)))


COMMANDS = {  # name -> function, and the options that it uses
    "ladder": (ladder, "data out split max_tokens"),
    "search": (search, "data out model max_tokens rope_factor documents model_only"),
    "long": (long, "data out model max_tokens"),
    "plot": (plot, "out"),
    "retrieval": (retrieval, "out model max_tokens dims rope_factor"),
}


def main(arguments):
    words, arguments = split_words(arguments)
    options, origin = read_options(Options, arguments)
    name, *words = words or ["ladder"]
    complete = {"search": True, "retrieval": len(words) == 1}.get(name, not words)
    if name not in COMMANDS or not complete:
        raise InputError(f"{name}: give search, long, plot, retrieval FOLDER, or nothing")
    command, uses = COMMANDS[name]
    for key, where in origin.items():
        if where == "option" and key not in uses.split():
            listed = ", ".join(f"--{option.replace('_', '-')}" for option in uses.split())
            raise InputError(f"--{key}: {name} does not use it; its options are {listed}")
    command(options, *words)


if __name__ == "__main__":
    cli(main)
