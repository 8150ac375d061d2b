"""Are hard negatives better where a stronger model mines them? Stage 3 from the same stage 2.

    python bench/miner.py --miner=st:DIR     # after make demo; half an hour on two cores

The paper mines with gte-base (sec. 4.2.4), the demo with the model itself. Here the miner is any
checkpoint, or any model that sentence-transformers opens (st:NAME). Scores are nDCG@10 on test with
standard errors over queries, of the mean over seeds; differences are query by query. Each run
leaves its scores in OUT/scores: the same command continues an interrupted one.
"""

import itertools
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import finetune
from bench.shared import print_head, print_machine, print_row, train_and_score
from common.device import best_device
from common.files import load_tokenizer
from common.options import cli, read_options
from data import filter as consistency
from data.prepare import BATCH, SourceWriter, data_folder, json_line
from data.store import encode, open_sources
from evaluate import shown, summary, top_k


@dataclass
class Options:
    miner: str = "st:sentence-transformers/all-MiniLM-L6-v2"  # a checkpoint, or st:NAME
    data: str = "out/pydocs"  # a data folder
    init: str = "out/contrastive"  # the checkpoint of stage 2
    out: str = "out/miner"  # for data, runs and scores
    seeds: str = "0,1,2"  # of stage 3, with commas
    options: str = ""  # more options of finetune.py


def mine(source, path, embed, prefixes, config):
    """(query, document, its negatives) of each row, mined as finetune.mine_source does."""
    pairs = list(consistency.read_pairs(path, len(source)))
    first, right, answers = finetune.marked_answers(
        source, config.query_tokens, config.document_tokens
    )
    document = embed([prefixes["document"] + pairs[i]["document"] for i in first])  # (m, E)
    query = embed([prefixes["query"] + pair["query"] for pair in pairs])  # (n, E)
    _, found = top_k(query, document, config.mined + 1, device=best_device())
    known = np.array([[d in own for d in row] for row, own in zip(found, answers, strict=True)])
    mined = finetune.mine_hard_negatives(query, document, right, found, known, config.margin)
    for pair, negatives in zip(pairs, mined[:, : config.mined], strict=True):
        rows = first[negatives[negatives >= 0]]
        yield pair["query"], pair["document"], [pairs[row]["document"] for row in rows]


def write_mined(options, out):
    """Writes the data folder `out`: `data`, with the miner's negatives in its stage 3."""
    tokenizer = load_tokenizer(options.data)
    embed = consistency.open_judge(consistency.Options(judge=options.miner), best_device())
    with data_folder(out) as new:
        consistency.copy_data(options.data, new, {options.data: ["stage3"]})
        for source in open_sources(f"{options.data}/stage3", tokenizer):
            path = Path(options.data, "stage3", source.name, "pairs.jsonl")
            prefixes = source.meta["prefixes"]
            writer = SourceWriter(new / "stage3" / source.name, prefixes, tokenizer)
            if options.miner.startswith("st:"):  # a model with prefixes of its own, or none
                prefixes = dict.fromkeys(prefixes, "")
            rows = mine(source, path, embed, prefixes, finetune.Config())
            while batch := list(itertools.islice(rows, BATCH)):
                query, document, negatives = zip(*batch, strict=True)
                texts = {"query": query, "document": document}
                texts["negative"] = itertools.chain.from_iterable(negatives)
                columns = {name: encode(tokenizer, found) for name, found in texts.items()}
                lines = [json_line(dict(zip(texts, row, strict=True))) for row in batch]
                writer.append(columns, lines, np.array(list(map(len, negatives))))
            writer.finish()


def main(arguments):
    options, _ = read_options(Options, arguments)
    mined, init = Path(options.out, "data"), f"--init={options.init}"
    train = partial(train_and_score, finetune, options)
    if not mined.exists():
        write_mined(options, mined)
    scores = {
        "no hard negatives": train("none", options.data, init, "--negatives=0"),
        "mined by the model itself": train("itself", options.data, init),
        f"mined by {Path(options.miner).name}": train("miner", mined, init),
    }
    none = scores["no hard negatives"]
    print_machine(best_device(), f"seeds {options.seeds}")
    print_head("stage 3", *(title for task in none for title in (task, "difference")))
    for name, found in scores.items():
        cells = [shown(summary(x)) for t in none for x in (found[t], found[t] - none[t])]
        print_row(name, *cells)


if __name__ == "__main__":
    cli(main)
