"""The model card: README.md of a checkpoint directory, filled from the files of its run.

Nothing is in the card that run.json, log.jsonl and results.json do not say."""

from pathlib import Path

from common.files import read_json, read_json_lines, write_text
from common.options import InputError

TITLES = {
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

A text encoder with the architecture of Nomic Embed (arXiv 2402.01613) and {parameters} parameters,
after {title}. Trained with nanoEmbed.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{directory}")
x = model.encode("what is NTK scaling?", prompt_name="query")
```

Every text begins with the prefix of its task: `search_query: `, `search_document: `,
`classification: ` or `clustering: `. Longer texts than in training are read with Dynamic NTK.

## Training

`{command}`, {step} of {steps} steps, on {data}, with torch {torch}.

{options}

## Results

{results}
"""


def write_card(directory):
    """Writes DIRECTORY/README.md from the files of its run. Raises InputError naming the file that
    cannot be read."""
    directory = Path(directory)
    try:
        write_text(directory / "README.md", card_of(directory))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{directory}: run.json, log.jsonl or results.json is not as a run writes it: {error!r}"
        ) from None


def card_of(directory):
    """The text of the card."""
    run, latest = read_json(directory / "run.json"), {}
    for _, record in read_json_lines(directory / "log.jsonl"):
        latest |= record
    rows = [("held-out text, log.jsonl", k, v) for k, v in latest.items() if k.startswith("dev_")]
    rows += [("training, log.jsonl", "loss", latest["loss"])] if "loss" in latest else []
    if (directory / "results.json").is_file():
        for task, scores in read_json(directory / "results.json").items():
            rows += [(task, metric, value) for metric, value in scores.items()]
    options, origin = run["options"], run["origin"]
    given = [f"--{k.replace('_', '-')}={options[k]}" for k in origin if origin[k] == "option"]
    return TEMPLATE.format(
        name=directory.name,
        directory=directory,
        pipeline="fill-mask" if run["stage"] == "mlm" else "sentence-similarity",
        title=TITLES[run["stage"]],
        parameters=run["about"]["parameters"],
        command=" ".join([f"python {run['stage']}.py", *given]),
        step=latest.get("step", 0),
        steps=options["steps"],
        data=f"`{options['data']}` ({run['data'].get('inputs', {}).get('script', 'own data')})",
        torch=run["about"]["torch"],
        options=table(("option", "value", "from"), [(k, v, origin[k]) for k, v in options.items()]),
        results=table(("on", "metric", "value"), rows) if rows else "None yet.",
    )


def table(head, rows):
    cells = [[f"{c:,.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
