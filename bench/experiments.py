"""What does each part of the paper add? Tables of runs with one part left out or changed.

    python bench/experiments.py ladder               # the stages, on the embedded documentation
    python bench/experiments.py planted              # filtering and mining, on data with faults
    python bench/experiments.py miniature SOURCES    # the paper in miniature, on public data

A seed takes about 30, 60 and 90 minutes on two cores. OUT/results.json and OUT/report.md are
written after every row; the same command continues after an interruption, and runs no row twice.
Scores are nDCG@10, Spearman for STS, with standard errors over queries, of the mean over seeds;
differences are those of each query. A seed repeats everything, filters and faults included.

planted: each source of stage 2 gets 30% more pairs, a query with the document of another. How many
does the filter remove? Stage 3 gets 30% near copies, pairs without a tenth of their words: such a
document answers a query for which it is not marked. Does mining avoid it?

miniature: SOURCES has these files. Training rows that repeat a text of the tasks are left out.

    text/wikipedia.jsonl.gz                           {"title", "text"}: stage 1, and openings
    pairs/{arxiv,medquad,stackexchange,tldr}.jsonl.gz {"query", "document"}: stage 2
    folders/{peps,swift-evolution}.tar.gz             reStructuredText, Markdown: stages 1 and 2
    pairs/{questions_wiki,medquad}.jsonl.gz           stage 3; medquad's negatives: same "topic"
    retrieval/{scifact-train,questions-amazon,qmsum-trainval}/    tasks in the BEIR layout, dev
    sts/stsb-en-dev.csv.gz                            a task: sentence, sentence, score
"""

import dataclasses
import itertools
import json
import multiprocessing
import re
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.stages import STAGES
from common.device import best_device, device_name
from common.files import load_tokenizer, read_json, read_lines, write_json, write_text
from common.options import InputError, cli, read_options, split_words
from data import filter as consistency
from data import folder, pairs, pydocs
from data.prepare import data_folder, write_source
from data.tasks import PREFIXES, read_scored_pairs, write_jsonl, write_task
from evaluate import Retrieval, scalings, spearman, summary
from model import NomicBert


@dataclass(frozen=True)
class Row:
    """One line of a table: a run, or another way to evaluate the model of one."""

    name: str
    stage: str = ""  # mlm, contrastive, finetune; or filter, shuffle, copy, which make data
    start: str = ""  # the row whose model it starts from, filters with, or evaluates; empty: BM25
    options: str = ""  # of the stage, beside those of the size
    data: str = ""  # the row whose data it takes; empty: that of the group
    against: str = ""  # the row that it is compared with
    dims: int = 0  # evaluates the first dimensions only; 0: all
    tokens: int = 0  # truncates texts to this length; 0: the trained one, and no more than 512
    scaling: str = "Dynamic NTK"  # of RoPE
    tasks: str = "main"  # to evaluate on: main, QMSum, or none


ONE, TWO, THREE = (f"after stage {i}" for i in (1, 2, 3))
NO_ONE, NO_TWO, EASY = "stage 2 without stage 1", "without stage 2", "without hard negatives"
LADDER = [
    Row(ONE, "mlm"),
    Row(TWO, "contrastive", ONE, against=ONE),
    Row(THREE, "finetune", TWO, against=TWO),
    Row(NO_ONE, "contrastive", against=TWO),
    Row("without stage 1", "finetune", NO_ONE, against=THREE),
    Row(NO_TWO, "finetune", ONE, against=THREE),
    Row(EASY, "finetune", TWO, "--negatives=0", against=THREE),
    Row("stage 2 with all of stage 1 kept", "contrastive", ONE, "--keep=all", against=TWO),
    Row("all of stage 1 kept", "finetune", "stage 2 with all of stage 1 kept", against=THREE),
    Row("margin 0.95", "finetune", TWO, "--margin=0.95", against=THREE),
    Row("margin inf", "finetune", TWO, "--margin=inf", against=THREE),
]
CLEAN, SHUFFLED, BOTH, COPIES = "clean pairs", "shuffled pairs", "clean and shuffled", "near copies"
PLANTED = [
    Row(CLEAN, "contrastive"),
    Row(SHUFFLED, "shuffle", tasks="none"),
    Row(BOTH, "contrastive", data=SHUFFLED, against=CLEAN),
    Row(COPIES, "copy", tasks="none"),
]
for judge, n in ((BOTH, 2), (BOTH, 20), (CLEAN, 2)):
    name = f"top {n} by the model of {judge}"
    how = f"--top={n} --max-tokens=64"  # as much as stage 2 reads
    PLANTED.append(Row(f"filter: {name}", "filter", judge, how, SHUFFLED, tasks="none"))
    PLANTED.append(Row(f"filtered: {name}", "contrastive", data=f"filter: {name}", against=BOTH))
for what, data in {"stage 3 as it is": "", f"stage 3 with {COPIES}": COPIES}.items():
    for rule in ("margin=inf", "margin=1", "margin=0.95", "negatives=0"):
        against = f"{what}: margin=inf" if rule != "margin=inf" else ""
        PLANTED.append(Row(f"{what}: {rule}", "finetune", CLEAN, f"--{rule}", data, against))
FILTER, ALL, M = "the filter", "stage 2 without the filter", "--matryoshka"
MINIATURE = [
    Row("BM25", against=THREE),
    Row("random weights", "contrastive", options="--steps=1 --lr=0"),
    Row(ONE, "mlm"),
    Row("word embeddings of stage 1", "contrastive", ONE, "--steps=1 --lr=0 --keep=embeddings"),
    Row(ALL, "contrastive", ONE, against=TWO),
    Row(FILTER, "filter", ALL, "--max-tokens=512", tasks="none"),
    Row(TWO, "contrastive", ONE, data=FILTER, against=ONE),
    Row(THREE, "finetune", TWO, M, FILTER, TWO),
    Row(NO_ONE, "contrastive", data=FILTER, against=TWO),
    Row("without stage 1", "finetune", NO_ONE, M, FILTER, THREE),
    Row(NO_TWO, "finetune", ONE, M, FILTER, THREE),
    Row(EASY, "finetune", TWO, f"{M} --negatives=0", FILTER, THREE),
    Row("without the filter", "finetune", ALL, M, "", THREE),
    *(Row(f"{THREE}: {n} dimensions", start=THREE, against=THREE, dims=n) for n in (64, 128, 256)),
    Row("BM25 of whole documents", tasks="QMSum"),
]
for n, rope in itertools.product((512, 2048, 4096, 8192), scalings(1)):
    read = {"tokens": n, "scaling": rope, "tasks": "QMSum"}
    against = f"{rope}: 2048 tokens" if n != 2048 else ""
    MINIATURE.append(Row(f"{rope}: {n} tokens", start=THREE, against=against, **read))
GROUPS = {"ladder": LADDER, "planted": PLANTED, "miniature": MINIATURE}

TINY = "--hidden-size=64 --num-hidden-layers=1 --num-attention-heads=1 --intermediate-size=64"
SIZES = {"laptop": "", "gpu": "--preset=gpu", "tiny": f"{TINY} --batch-size=4 --steps=2"}
LONGER = "--trained-length=512 --document-tokens=512 --tokens-in-memory=131072"
LONG = {  # in miniature, where texts are longer than those of the documentation
    "laptop mlm": "--seq-len=512 --batch-size=16 --steps=700",
    "laptop contrastive": f"{LONGER} --steps=200",
    "laptop finetune": f"{LONGER} --batch-size=256",
    "gpu mlm": "--seq-len=2048 --batch-size=64 --steps=2000",
    **dict.fromkeys(("gpu contrastive", "gpu finetune"), "--trained-length=2048"),
    "tiny mlm": "--seq-len=512",
    **dict.fromkeys(("tiny contrastive", "tiny finetune"), LONGER),
}
ARTICLES = {"laptop": 4000, "gpu": 100_000, "tiny": 100}  # of Wikipedia, at most
TASKS = {"SciFact": "retrieval/scifact-train", "Amazon": "retrieval/questions-amazon"}
TASKS |= {"STS": "sts/stsb-en-dev.csv.gz", "QMSum": "retrieval/qmsum-trainval"}


@dataclass
class Options:
    size: str = "laptop"  # laptop, gpu, or tiny, which shows in a minute that everything runs
    data: str = "out/pydocs"  # the data folder of ladder and planted
    out: str = ""  # for runs and results; empty: out/ and the name of the group
    seeds: int = 1  # how often each row is run
    rows: str = ""  # only rows whose names begin so, with commas, and those that they start from
    scale: float = 1.0  # of the steps of every stage: 0.1 for a quick look
    jobs: int = 1  # rows that run side by side; if several, each on one thread
    vocab_size: int = 16_384  # of the tokenizer of miniature [300, 1e6]


# ------------------------------------------------------------------------------------------------
# One row


def directory(name, seed, options):
    return Path(options.out, str(seed), re.sub(r"[^\w.]+", "-", name))


def run_row(row, seed, group, options):
    """Trains or makes data if the row says so, and evaluates: what results.json keeps of it."""
    if options.jobs > 1:
        torch.set_num_threads(1)
    base = Path(options.out, "data") if group == "miniature" else Path(options.data)
    data = directory(row.data, seed, options) if row.data else base
    out, start = (directory(name, seed, options) for name in (row.name, row.start))
    own, result = row.options.split(), {}
    if row.stage in STAGES:
        arguments = [*arguments_of(row.stage, group, options), f"--data={data}", f"--out={out}"]
        arguments += [f"--init={start}"] if row.start else []
        STAGES[row.stage].main([*arguments, f"--seed={seed}", *own])
        log = [json.loads(line) for line in open(out / "log.jsonl")]
        seconds = sum(record["tokens"] / record["tokens_per_second"] for record in log)
        result["minutes"] = seconds / 60
    elif row.stage == "filter" and not out.exists():
        consistency.main([str(data), f"--judge={start}", f"--out={out}", *own])
    elif row.stage and not out.exists():
        plant(row.stage, data, out, seed)
    where = out if row.stage else start if row.start else None
    split = "dev" if group == "miniature" else "test"
    tasks = tasks_of(group, options)[row.tasks].items()
    result["scores"] = {name: score(row, where, path, split) for name, path in tasks}
    return {**result, "notes": notes(row, data, out)}


def arguments_of(stage, group, options):
    """The options of a stage that size and scale decide."""
    longer = LONG[f"{options.size} {stage}"] if group == "miniature" else ""
    arguments = f"{SIZES[options.size]} {longer}".split()
    config, _ = read_options(STAGES[stage].Config, arguments, STAGES[stage].PRESETS)
    steps = max(2, round(config.steps * options.scale))
    every = [f"--log-every={max(1, steps // 50)}", f"--save-every={max(1, steps // 4)}"]
    return [*arguments, f"--steps={steps}", "--eval-every=0", *every]


def tasks_of(group, options):
    """Row.tasks -> name -> a folder in the BEIR layout, or a file of scored pairs."""
    main = {path.name: path for path in sorted(Path(options.data, "retrieval").glob("*/"))}
    if group == "miniature":
        main = {name: Path(options.data, path) for name, path in TASKS.items()}
    long = {name: main.pop(name) for name in ("QMSum",) if name in main}
    return {"main": main, "QMSum": long, "none": {}}


def score(row, where, path, split):
    """nDCG@10 of each query; of scored pairs one number, Spearman. where: a checkpoint, or None for
    BM25."""
    task = Retrieval(path, split) if path.is_dir() else None
    if where is None:
        return task.scores(task.rank_bm25())["nDCG@10"] if task else []
    model = NomicBert.from_pretrained(where, device=best_device())
    trained, dims = model.config.trained_length, min(row.dims, model.config.hidden_size) or None
    tokens = row.tokens or min(512, trained)
    if tokens > trained:
        model.rope = dataclasses.replace(model.rope, **scalings(tokens / trained)[row.scaling])
    if task:
        return task.scores(task.rank(model, tokens, dims=dims)[0])["nDCG@10"]
    *sides, scores = read_scored_pairs(path)
    prefixed = ([PREFIXES["classification"] + text for text in side] for side in sides)
    x, y = (model.encode(texts, tokens, dims) for texts in prefixed)
    return [spearman((x * y).sum(1), scores)]


# ------------------------------------------------------------------------------------------------
# Planted faults: the first rows of their source


def lines_of(source):
    path = source / "pairs.jsonl"
    return [line for _, line in read_lines(path)] if path.is_file() else []


def plant(fault, data, out, seed, share=0.3):
    """A copy of a data folder with faults: "shuffle" in stage 2, "copy" in stage 3."""
    rng, tokenizer, planted = np.random.default_rng(seed), load_tokenizer(data), {}

    def shortened(text):
        words = np.array(text.split(), object)
        return " ".join(np.delete(words, rng.permutation(len(words))[: max(1, len(words) // 10)]))

    with data_folder(out) as new:
        shutil.copytree(data, new, dirs_exist_ok=True)
        for meta in data.glob(f"stage{2 if fault == 'shuffle' else 3}/*/meta.json"):
            source, name = meta.parent, "/".join(meta.parts[-3:-1])
            found = [json.loads(line) for line in lines_of(source)]
            drawn = rng.permutation(len(found))[: round(share * len(found))]
            columns = {side: [found[i][side] for i in drawn] for side in ("query", "document")}
            if fault == "shuffle":
                columns["document"] = columns["document"][1:] + columns["document"][:1]
            else:
                columns = {side: list(map(shortened, texts)) for side, texts in columns.items()}
            shutil.rmtree(new / name)
            prefixes = read_json(meta)["prefixes"]
            write_source(new / name, columns, prefixes, tokenizer, stored=[source])
            planted[name] = drawn.tolist()  # the rows that they are made of
        write_json(new / "meta.json", {**read_json(data / "meta.json"), "planted": planted})


def notes(row, data, out):
    """Shares: of pairs, and of planted ones, that a filter keeps; of near copies that are among the
    mined negatives of the query that they answer."""
    planted, found = read_json(data / "meta.json").get("planted", {}) if row.stage else {}, {}
    if row.stage == "filter":
        counts = read_json(out / "meta.json")["filtered"].values()
        found["pairs kept"] = sum(n["kept"] for n in counts) / sum(n["rows"] for n in counts)
        kept = 0
        for name, rows in planted.items():
            lines = Counter(lines_of(data / name)[: len(rows)])
            kept += (lines & Counter(lines_of(out / name))).total()
        if planted:
            found["planted pairs kept"] = kept / sum(map(len, planted.values()))
    if row.stage == "finetune" and planted and (out / "negatives.npz").is_file():
        mined = np.load(out / "negatives.npz")
        among = [
            (mined[name][len(rows) + np.array(rows)] == np.arange(len(rows))[:, None]).any(1)
            for name, rows in ((Path(name).name, rows) for name, rows in planted.items())
            if name in mined
        ]
        found["copies among negatives"] = float(np.concatenate(among).mean())
    return found


# ------------------------------------------------------------------------------------------------
# The data of miniature


def opening_and_rest(article, longest=3000):
    """Title and first sentence -> the text after it, at most so many characters."""
    opening, _, rest = article["text"].partition(". ")
    return {"query": f"{article['title']}: {opening}.", "document": rest[:longest]}


def same_topic(rows, n=7):
    """Rows with up to n negatives: answers to other questions on the same topic. Rows whose topic
    has no other answer are left out."""
    rng, topics = np.random.default_rng(0), {}
    for row in rows:
        topics.setdefault(row["topic"], []).append(row["document"])
    for row in rows:
        others = sorted(set(topics[row["topic"]]) - {row["document"]})
        if others:
            pair = {"query": row["query"], "document": row["document"]}
            yield pair | {"negatives": rng.permutation(others)[:n].tolist()}


def make_data(sources, out, articles, vocab_size):
    """Writes the data folder `out` from SOURCES, unless it is there."""
    given = ("arxiv", "medquad", "stackexchange", "tldr", "questions_wiki")
    files = {name: sources / "pairs" / f"{name}.jsonl.gz" for name in given}
    archives = [sources / "folders" / f"{name}.tar.gz" for name in ("peps", "swift-evolution")]
    tasks, wikipedia = [sources / x for x in TASKS.values()], sources / "text/wikipedia.jsonl.gz"
    for path in (wikipedia, *files.values(), *archives, *tasks):
        if not path.exists():
            raise InputError(f"{path} is missing: bench/experiments.py --help lists the files")
    if out.exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as raw:
        raw = Path(raw)
        chosen = [json.loads(x) for _, x in itertools.islice(read_lines(wikipedia), articles)]
        write_jsonl(raw / "text.jsonl", ({"text": f"{x['title']}\n\n{x['text']}"} for x in chosen))
        write_jsonl(raw / "wikipedia.jsonl", map(opening_and_rest, chosen))
        medquad = [json.loads(line) for _, line in read_lines(files["medquad"])]
        write_jsonl(raw / "medquad-topics.jsonl", same_topic(medquad))
        first, second, _ = read_scored_pairs(sources / TASKS["STS"])
        corpus = {str(i): sentence for i, sentence in enumerate(second)}
        queries = {"dev": [(sentence, [str(i)]) for i, sentence in enumerate(first)]}
        write_task(raw / "sts", corpus, queries, ("", ""))

        held_out = [raw / "sts", *(task for task in tasks if task.is_dir())]
        held_out = f"--held-out={','.join(map(str, held_out))}"
        common = [f"--out={raw}/pairs", held_out, "--queries=100"]
        weak = [str(files[name]) for name in ("medquad", "stackexchange", "tldr")]
        weak += [f"{files['arxiv']}:clustering", f"{raw}/wikipedia.jsonl:classification"]
        text = [f"--text={raw}/text.jsonl", f"--vocab-size={vocab_size}"]
        pairs.main([*weak, *text, *common])
        supervised = [f"{raw}/medquad-topics.jsonl", str(files["questions_wiki"])]
        pairs.main([*supervised, "--stage=3", *common])
        before = raw / "pairs"
        for path in archives:
            name = path.name.removesuffix(".tar.gz")
            with tarfile.open(path) as archive:
                archive.extractall(raw / "text", filter="data")
            how = [f"--out={raw}/with-{name}", f"--add={before}", held_out]
            folder.main([f"{raw}/text/{name}", *how])
            before = raw / f"with-{name}"
        for headings in before.glob("stage3/heading-section*"):
            shutil.rmtree(headings)  # stage 3 is for questions that people asked
        before.rename(out)


# ------------------------------------------------------------------------------------------------
# All rows, and their table


def with_requirements(rows, prefixes):
    """The rows whose names begin so, and those that they depend on, in the order of the table."""
    chosen = {row.name for row in rows if row.name.startswith(tuple(prefixes.split(",")))}
    if not chosen:
        raise InputError(f"--rows={prefixes}: the rows are {', '.join(row.name for row in rows)}")
    for row in reversed(rows):
        chosen |= {row.start, row.data} if row.name in chosen else set()
    return [row for row in rows if row.name in chosen]


def run_all(rows, group, options, results, keep):
    """Runs what is not in results (row -> seed -> result), each after what it depends on."""

    def run_here(*arguments):
        future = futures.Future()
        future.set_result(run_row(*arguments))
        return future

    def done(name, seed):
        return not name or str(seed) in results.get(name, {})

    waiting = [(row, seed) for seed in range(options.seeds) for row in rows]
    waiting = [(row, seed) for row, seed in waiting if not done(row.name, seed)]
    running, context = {}, multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        while waiting or running:
            ready = [x for x in waiting if done(x[0].start, x[1]) and done(x[0].data, x[1])]
            for row, seed in ready[: options.jobs - len(running)]:
                waiting.remove((row, seed))
                print(f"\n{row.name}, seed {seed}", flush=True)
                arguments = (row, seed, group, options)
                run = pool.submit(run_row, *arguments) if options.jobs > 1 else run_here(*arguments)
                running[run] = row.name, seed
            for run in futures.wait(running, return_when=futures.FIRST_COMPLETED).done:
                name, seed = running.pop(run)
                results.setdefault(name, {})[str(seed)] = run.result()
                keep()


def shown(values, sign=""):
    """Mean and standard error over queries; of a single number, itself."""
    error = f" ±{summary(values)['error']:.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.3f}{error}"


def cell(runs, task):
    """The mean over seeds; with several, the mean of each in brackets. runs: seed -> result."""
    values = [run["scores"][task] for run in runs.values() if run["scores"].get(task)]
    each = f" ({', '.join(f'{np.mean(v):.3f}' for v in values)})" if len(values) > 1 else ""
    return shown(np.mean(values, axis=0)) + each if values else ""


def difference(runs, others, task):
    """Query by query, in the mean over the seeds that both rows have."""
    pairs = [(runs[s]["scores"], others[s]["scores"]) for s in runs if s in others]
    found = [np.subtract(x[task], y[task]) for x, y in pairs if x.get(task) and y.get(task)]
    return shown(np.mean(found, axis=0), "+") if found else ""


def report(group, options, results):
    """The tables in Markdown: one for the rows that are evaluated on the same tasks."""
    text = f"# {group}\n\nSize {options.size}, steps x {options.scale:g}; "
    text += f"{device_name(best_device())}, torch {torch.__version__}.\n"
    for kind, tasks in tasks_of(group, options).items():
        rows = [row for row in GROUPS[group] if row.tasks == kind and row.name in results]
        head = ["", *(title for task in tasks for title in (task, "difference"))]
        lines = [[*head, "from", "minutes", "notes"], ["---", *["---:"] * (len(head) + 2)]]
        for row in rows:
            runs, others = results[row.name], results.get(row.against, {})
            line = [row.name]
            for task in tasks:
                line += [cell(runs, task), difference(runs, others, task)]
            minutes = [run["minutes"] for run in runs.values() if "minutes" in run]
            line += [row.against, f"{np.mean(minutes):.1f}" if minutes else ""]
            shares = (
                (key, [run["notes"][key] for run in runs.values()]) for key in runs["0"]["notes"]
            )
            lines.append([*line, ", ".join(f"{key}: {np.mean(x):.1%}" for key, x in shares)])
        text += "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) if rows else ""
    return text


def main(arguments):
    words, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    group = words[0] if words else ""
    if group not in GROUPS or len(words) != 1 + (group == "miniature"):
        raise InputError("give ladder, planted, or miniature SOURCES")
    if options.size not in SIZES:
        raise InputError(f"--size={options.size}: give {', '.join(SIZES)}")
    options.out = options.out or f"out/{group}"
    rows = with_requirements(GROUPS[group], options.rows)
    if group == "miniature":
        options.data, data = words[1], Path(options.out, "data")
        make_data(Path(words[1]), data, ARTICLES[options.size], options.vocab_size)
    else:
        pydocs.make_if_missing(options.data)
    path, settings = Path(options.out, "results.json"), {"group": group}
    settings |= {key: getattr(options, key) for key in ("size", "scale", "data", "vocab_size")}
    results = read_json(path) if path.is_file() else {"settings": settings, "rows": {}}
    if results["settings"] != settings:
        raise InputError(f"{path} has results of {results['settings']}: choose another --out")

    def keep():
        write_json(path, results)
        write_text(Path(options.out, "report.md"), report(group, options, results["rows"]))

    run_all(rows, group, options, results["rows"], keep)
    print("\n" + report(group, options, results["rows"]))


if __name__ == "__main__":
    cli(main)
