"""The model card: README.md of a checkpoint directory, made from what its run left there.

    run.json       options and where each is from, sources of data, versions: written at the start
    log.jsonl      loss, held-out scores
    results.json   what evaluate.py measured later; the card is made anew then

Nothing is in the card that these files do not say.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from checkpoint import PREFIXES
from common import replace

HELD_OUT = ("dev", "test", "long")  # splits of stage 1's text
TITLES = {  # of the stages, in their order
    "mlm": "stage 1, masked language modelling",
    "contrastive": "stage 2, contrastive pretraining on weak pairs",
    "finetune": "stage 3, contrastive finetuning with hard negatives",
}
TEMPLATE = """---
library_name: sentence-transformers
pipeline_tag: {pipeline}
tags: [sentence-transformers, feature-extraction, nomic_bert, nanoembed]
---
# {name}

An encoder of texts with the architecture of Nomic Embed (arXiv 2402.01613) and {parameters:,}
parameters, after {title}. Made by nanoEmbed.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{directory}")
x = model.encode("what is NTK scaling?", prompt_name="query")
```

Every text begins with its task's prefix: {prefixes}.
Trained at up to {length} tokens; longer texts are read with Dynamic NTK. transformers scales by
the longest text of a batch, nanoEmbed each by its own length: one at a time, they agree.

## How it was trained

`{command}`, {done:,} of {steps:,} steps, with torch {torch}.

{options}

## On what

{data}

{sources}

## Results

{results}
"""


def write_run(config, origin, model):
    """Writes OUT/run.json: what this run is made of. Sources are those of its stage in --data."""
    stage = Path(sys.modules[type(config).__module__].__file__).stem
    folder = Path(config.data, f"stage{list(TITLES).index(stage) + 1}")
    metas = [
        path for path in sorted(folder.glob("*/meta.json")) if path.parent.name not in HELD_OUT
    ]
    inputs = json.loads(Path(config.data, "meta.json").read_text()).get("inputs", {})
    versions = ", ".join(f"{name} {v}" for name, v in inputs.get("versions", {}).items())
    run = {
        "stage": stage,
        "options": asdict(config),
        "origin": origin,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_length": model.config.trained_length,
        "torch": torch.__version__,
        "data": " from ".join(filter(None, [inputs.get("script", "your own hand"), versions])),
        "sources": [row_of(path) for path in metas],
    }
    text = json.dumps(run, indent=1)
    replace(Path(config.out, "run.json"), lambda path: path.write_text(text))


def row_of(path):
    """(source, rows, tokens) of a meta.json."""
    meta = json.loads(path.read_text())
    return path.parent.name, meta["rows"], sum(meta["tokens"].values())


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shown(value):
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def write_card(directory):
    """Writes DIRECTORY/README.md from the files of its run."""
    directory = Path(directory)
    run = json.loads((directory / "run.json").read_text())
    log, results = directory / "log.jsonl", directory / "results.json"
    last = {}  # of each logged quantity, the latest value
    for line in log.read_text().splitlines() if log.is_file() else ():
        last |= json.loads(line)
    rows = [
        (f"log.jsonl, step {last['step']:,} (dev_: held out)", key, shown(last[key]))
        for key in last
        if key.startswith(("loss", "dev_"))
    ]
    for task, scores in (json.loads(results.read_text()) if results.is_file() else {}).items():
        rows += [(task, metric, shown(value)) for metric, value in scores.items()]
    options, origin = run["options"], run["origin"]
    given = [
        f"--{key.replace('_', '-')}={options[key]}" for key in origin if origin[key] == "option"
    ]
    card = TEMPLATE.format(
        name=directory.name,
        directory=directory,
        pipeline="fill-mask" if run["stage"] == "mlm" else "sentence-similarity",
        parameters=run["parameters"],
        title=TITLES[run["stage"]],
        prefixes=", ".join(f"`{prefix}`" for prefix in PREFIXES.values()),
        length=run["trained_length"],
        command=" ".join([f"python {run['stage']}.py", *given]),
        done=last.get("step", 0),
        steps=options["steps"],
        torch=run["torch"],
        options=table(("option", "value", "from"), [(k, v, origin[k]) for k, v in options.items()]),
        data=f"`{options['data']}`, made by {run['data']}:",
        sources=table(("source", "texts or pairs", "tokens"), run["sources"]),
        results=table(("on", "metric", "value"), rows) if rows else "None yet.",
    )
    replace(directory / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
