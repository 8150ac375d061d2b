"""What does a model lose outside its domain, and what does training on one's own text bring back?

    python bench/domains.py SOURCES                        # after make demo; hours on two cores
    python bench/domains.py SOURCES --domains=medical      # one of them
    python bench/domains.py SOURCES --notes=500 --stages=mlm,contrastive,finetune    # with stage 1

A model that was trained on Python alone searches other text; then `make own` trains one on that
text and the built-in documentation, with the commands of the Makefile. SOURCES has the public data:

    legal       retrieval/policyqa: questions about privacy policies
    science     retrieval/scifact-train: claims, and the abstracts that they come from
    reviews     retrieval/questions-amazon: questions about products, and reviews
    medical     pairs/medquad.jsonl.gz: a note for each disease, with a heading for each question
    technical   folders/*.tar.gz: the proposals for Python and Swift

In the first three, one's own text is what is searched, and no question has been seen. In the other
two the task is headings -> section in files that were held out. Scores are nDCG@10 with standard
errors over queries, of the mean over seeds. Each run leaves its scores in OUT/scores: the same
command continues an interrupted one, and several may run at once.
"""

import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import keep, print_head, print_row
from bench.stages import choose_stages
from common.device import best_device, device_name
from common.files import read_lines
from common.options import InputError, cli, read_options, split_words
from data import folder
from data.prepare import data_folder
from data.tasks import read_task
from evaluate import Retrieval, fuse, last_stage, shown, summary
from model import NomicBert

TASKS = {"legal": "policyqa", "science": "scifact-train", "reviews": "questions-amazon"}
DOMAINS = (*TASKS, "medical", "technical")


@dataclass
class Options:
    model: str = ""  # the demo's checkpoint; empty: the last stage trained in out/
    data: str = "out/pydocs"  # the data folder that it was trained on
    out: str = "out/domains"  # for texts, data, runs and scores
    domains: str = ",".join(DOMAINS)  # which
    notes: int = 0  # files of one's own text, at most; 0: all [0, 1e9]
    stages: str = "contrastive,finetune"  # of training on one's own text
    seeds: str = "0,1"  # of the models that are trained on it, with commas
    options: str = ""  # more options for every stage, such as "--micro-batch-tokens=65536"


def write_notes(name, sources, out):
    """Writes the text of a domain into the folder `out`, as files that a person could have."""
    if name == "technical":
        for path in sorted(sources.glob("folders/*.tar.gz")):
            with tarfile.open(path) as archive:
                archive.extractall(out, filter="data")
        return
    if name == "medical":
        notes = {}
        for _, line in read_lines(sources / "pairs/medquad.jsonl.gz"):
            row = json.loads(line)
            notes.setdefault(row["topic"], {})[row["query"]] = row["document"]
        notes = {
            topic: f"# {topic}\n" + "".join(f"\n## {q}\n\n{text}\n" for q, text in asked.items())
            for topic, asked in notes.items()
        }
    else:
        notes, *_ = read_task(sources / "retrieval" / TASKS[name], "dev")
    for i, text in enumerate(notes.values()):
        Path(out, f"{i}.md").write_text(text, encoding="utf-8")


def prepare(name, sources, options):
    """Makes the data folder of a domain. Returns (data folder, task)."""
    out = Path(options.out, name)
    if not (out / "notes").exists():
        with data_folder(out / "notes") as new:
            write_notes(name, sources, new)
            for path in folder.files_in(new)[options.notes or sys.maxsize :]:
                path.unlink()
    folder.main([str(out / "notes"), f"--add={options.data}", f"--out={out}/data"])
    if name in TASKS:
        return out / "data", Retrieval(sources / "retrieval" / TASKS[name], "dev")
    return out / "data", Retrieval(out / "data/retrieval/heading-section", "test")


def train(name, seed, data, options):
    """`make own`: the stages, one after the other. Returns the last one's directory."""
    init = ""
    for stage, script in choose_stages(options.stages).items():
        out = f"{options.out}/{name}/{seed}/{stage}"
        given = [f"--data={data}", f"--out={out}", f"--seed={seed}", "--eval-every=0"]
        script.main([*given, *([f"--init={init}"] if init else []), *options.options.split()])
        init = out
    return init


def scores_of(task, model):
    """nDCG@10 of each query: by the model, and by the model and BM25 together. None: BM25."""
    matched = task.rank_bm25()
    if model is None:
        return {"BM25": task.scores(matched)["nDCG@10"]}
    ranking = task.rank(model, model.config.trained_length)
    both = fuse([matched, ranking])
    return {"alone": task.scores(ranking)["nDCG@10"], "both": task.scores(both)["nDCG@10"]}


def main(arguments):
    words, arguments = split_words(arguments)
    options, _ = read_options(Options, arguments)
    names = options.domains.split(",")
    if len(words) != 1 or set(names) - set(DOMAINS):
        raise InputError(f"give SOURCES, and in --domains some of {','.join(DOMAINS)}")
    sources, device = Path(words[0]), best_device()
    demo = NomicBert.from_pretrained(options.model or last_stage("out"), device=device)
    torch.manual_seed(0)
    untrained = NomicBert(demo.config).to(device)
    untrained.tokenizer, untrained.dtype = demo.tokenizer, demo.dtype
    rows = []
    for name in names:
        data, task = prepare(name, sources, options)

        def kept(title, work, name=name):
            return keep(Path(options.out, "scores", f"{name}-{title}.json"), work)

        found = kept("BM25", lambda task=task: scores_of(task, None))
        found["random"] = kept("random", lambda task=task: scores_of(task, untrained))["alone"]
        demos, own = kept("demo", lambda task=task: scores_of(task, demo)), []
        for seed in options.seeds.split(","):

            def run(task=task, name=name, seed=seed, data=data):
                directory = train(name, seed, data, options)
                return scores_of(task, NomicBert.from_pretrained(directory, device=device))

            own.append(kept(f"own-{seed}", run))
        own = {key: np.mean([scores[key] for scores in own], axis=0) for key in own[0]}
        found |= {"demo": demos["alone"], "demo, BM25": demos["both"], "own": own["alone"]}
        found |= {"difference": own["alone"] - demos["alone"], "own, BM25": own["both"]}
        rows.append((name, len(task.queries), *(shown(summary(x)) for x in found.values())))
    print(f"\n{device_name(device)}, torch {torch.__version__}\n")
    print_head("domain", "queries", *found)
    for row in rows:
        print_row(*row)


if __name__ == "__main__":
    cli(main)
