"""GLUE (arXiv 1804.07461), finetuned: what the paper reports of its stage 1 (table 2).

    python bench/glue.py --model=nomic-ai/nomic-bert-2048             # needs a network, and a GPU
    python bench/glue.py --model=out/mlm --tasks=rte,mrpc --seeds=1   # minutes
    python bench/glue.py --data=DIR            # DIR/TASK/SPLIT*.parquet, as the hub has them

A linear layer on the mean of the hidden states, and all weights trained with it, for each task and
seed. The score is that of the dev set after the last epoch, in the median over seeds. As in the
paper, MRPC, RTE and STS-B start from the model finetuned on MNLI, if that is among --tasks. The
paper tries two batch sizes and three rates and takes the best; here one of each is given.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.shared import print_head, print_row
from common.device import best_device
from common.options import InputError, cli, read_options
from common.run import adamw, set_lr
from data.store import pack, split_by_tokens, truncate
from evaluate import pearson
from mlm import learning_rate
from model import Linear, NomicBert, mean_pool


@dataclass
class Options:
    model: str = "out/mlm"  # a checkpoint, or a name on the hub
    data: str = "nyu-mll/glue"  # on the hub, or a folder
    tasks: str = "mnli,cola,sst2,mrpc,stsb,qqp,qnli,rte"  # which
    epochs: int = 10  # of each task
    batch_size: int = 32  # texts in a step
    lr: float = 3e-5  # peak of the learning rate; rises for 6% of the steps, falls to 0 [0, 1]
    max_tokens: int = 128  # texts are truncated to this [8, 1e6]
    seeds: int = 5  # runs of each task


PAIR, QUESTIONS = ("sentence1", "sentence2"), ("question1", "question2")
TASKS = {  # columns, classes (1: a score), the paper's result
    "mnli": (("premise", "hypothesis"), 3, 0.86),
    "cola": (("sentence",), 2, 0.50),
    "sst2": (("sentence",), 2, 0.93),
    "mrpc": (PAIR, 2, 0.88),
    "stsb": (PAIR, 1, 0.90),
    "qqp": (QUESTIONS, 2, 0.92),
    "qnli": (("question", "sentence"), 2, 0.92),
    "rte": (PAIR, 2, 0.82),
}


def read(data, name, split, tokenizer, max_tokens):
    """Texts as token ids, and their labels. A pair is one text, [CLS] a [SEP] b [SEP].

    Raises InputError where the data cannot be read."""
    import datasets

    split = f"{split}_matched" if (name, split) == ("mnli", "validation") else split
    try:
        if Path(data).is_dir():
            files = sorted(str(path) for path in Path(data, name).glob(f"{split}*.parquet"))
            rows = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            rows = datasets.load_dataset(data, name, split=split)
        columns = [list(rows[column]) for column in TASKS[name][0]]
    except Exception as error:  # files, the network and the hub fail in many ways
        raise InputError(f"--data={data}: no {split} of {name}: {str(error)[:200]}") from None
    texts = []
    for parts in zip(*columns, strict=True):
        first, *second = (tokenizer.encode(part).ids for part in parts)
        text = np.array(first + [i for ids in second for i in ids[1:]])
        texts.append(truncate(text, max_tokens))
    return texts, torch.tensor(rows["label"])


def score(task, outputs, labels):
    """Accuracy; Matthews' correlation of CoLA, Pearson's of STS-B. outputs (n, classes)."""
    outputs, labels = outputs.numpy(), labels.numpy()
    if task == "stsb":
        return pearson(outputs[:, 0], labels) or 0.0
    found = outputs.argmax(1)
    if task == "cola":  # Pearson's correlation of zeros and ones is Matthews'
        return pearson(found, labels) or 0.0
    return float(np.mean(found == labels))


def finetune(task, model, train, dev, options, seed):
    """Trains all weights of the model on a task. Returns its score on dev."""
    torch.manual_seed(seed)
    rng, (texts, labels), device = np.random.default_rng(seed), train, model.device
    model.head = Linear(model.config.hidden_size, TASKS[task][1], bias=True).to(device)
    optimizer = adamw(model, options.lr, 1e-6, (0.9, 0.98), 1e-6)
    steps_of_epoch = len(texts) // options.batch_size
    # learning_rate reads these two
    options.steps, options.warmup = options.epochs * steps_of_epoch, 0.06
    if not steps_of_epoch:
        raise InputError(f"--batch-size={options.batch_size}: {task} has {len(texts)} texts")

    def outputs(rows, texts):
        tokens, cu_seqlens = pack([texts[i] for i in rows], device)
        return model.head(mean_pool(model(tokens, cu_seqlens), cu_seqlens))  # (B, classes)

    for step in trange(options.steps, desc=f"{task}, seed {seed}", leave=False, disable=None):
        if step % steps_of_epoch == 0:
            order = rng.permutation(len(texts))
        rows, order = order[: options.batch_size], order[options.batch_size :]
        found, right = outputs(rows, texts), labels[rows].to(device)
        if task == "stsb":
            loss = F.mse_loss(found[:, 0], right.float())
        else:
            loss = F.cross_entropy(found, right)
        optimizer.zero_grad()
        loss.backward()
        set_lr(optimizer, learning_rate(step, options))
        optimizer.step()
    texts, labels = dev
    with torch.no_grad():
        groups = split_by_tokens([len(text) for text in texts], 8192)
        found = torch.cat([outputs(group, texts) for group in groups]).float().cpu()
    return score(task, found[np.argsort(np.concatenate(groups))], labels)


def main(arguments):
    options, _ = read_options(Options, arguments)
    names = options.tasks.split(",")
    if unknown := set(names) - set(TASKS):
        raise InputError(f"--tasks={min(unknown)}: give some of {','.join(TASKS)}")
    names, mnli, medians = [name for name in TASKS if name in names], {}, []
    tokenizer = NomicBert.from_pretrained(options.model).tokenizer
    print_head("task", "score, median", "seeds", "nomic-bert-2048, table 2")
    for name in names:
        scores = []
        train, dev = (
            read(options.data, name, split, tokenizer, options.max_tokens)
            for split in ("train", "validation")
        )
        for seed in range(options.seeds):
            model = NomicBert.from_pretrained(options.model, device=best_device())
            if seed in mnli and name in ("mrpc", "rte", "stsb"):
                model.load_state_dict(mnli[seed])
            scores.append(finetune(name, model, train, dev, options, seed))
            if name == "mnli":
                weights = model.state_dict().items()
                mnli[seed] = {n: w.cpu() for n, w in weights if not n.startswith("head.")}
        medians.append(float(np.median(scores)))
        each = ", ".join(f"{value:.3f}" for value in scores)
        print_row(name, f"{medians[-1]:.3f}", each, f"{TASKS[name][2]:.2f}")
    paper = np.mean([TASKS[name][2] for name in names])
    print_row("mean", f"{np.mean(medians):.3f}", "", f"{paper:.2f}")


if __name__ == "__main__":
    cli(main)
