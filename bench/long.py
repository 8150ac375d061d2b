"""Long texts: a sentence hidden in one, found by a question about it; time and memory by length.

    python bench/long.py                                         # the demo's model: minutes
    python bench/long.py --model=DIR --lengths=4096,8192,16384   # any checkpoint

A needle is the beginning of a held-out document, its query the summary of that document. It is put
into one of several long texts, at ten depths. Score: the reciprocal rank of that text among all of
them, the others without needle, for plain RoPE and Dynamic NTK. By chance it is about
(1 + 1/2 + ... + 1/n) / n of n texts. OUT/needle.png has depth against length.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.memory import peak_memory
from bench.shared import (
    print_head,
    print_machine,
    print_row,
    run_in_process,
    seconds_of,
    whole_numbers,
)
from common.device import best_device
from common.files import write_whole
from common.options import InputError, cli, read_options
from data.store import pack
from evaluate import Retrieval, last_stage, scalings, shown, summary
from model import NomicBert

ROPES = ("plain RoPE", "Dynamic NTK")


@dataclass
class Options:
    model: str = ""  # a checkpoint; empty: the last stage trained in OUT
    data: str = "out/pydocs"  # a data folder with long documents
    out: str = "out"  # for the picture
    lengths: str = "128,256,512,1024,2048"  # of the texts, in tokens
    texts: int = 12  # in which needles are hidden [2, 1000]
    depths: int = 10  # places in a text, from its beginning to its end [2, 100]
    needle: int = 32  # tokens of the hidden sentence [1, 1000]


def texts_and_needles(options, model, longest):
    """(haystacks, needles, queries): token ids without [CLS] and [SEP] for the first two."""
    pages = Retrieval(Path(options.data, "long", "pages"), "test")
    ids = [model.tokenizer.encode(text).ids[1:-1] for text in pages.documents]
    haystacks = [text for text in ids if len(text) >= longest][: options.texts]
    if len(haystacks) < 2:
        raise InputError(f"{options.data} has {len(haystacks)} held-out texts of {longest} tokens")
    task, needles, queries = Retrieval.open_all(options.data, "test")[0], [], []
    for query, relevant in zip(task.queries, task.relevant, strict=True):
        needle = model.tokenizer.encode(task.documents[min(relevant)]).ids[1:-1]
        if len(needle) >= options.needle:
            needles.append(needle[: options.needle])
            queries.append(task.prefixes["query"] + query)
    if not needles:
        raise InputError(f"--needle={options.needle}: no held-out document has so many tokens")
    chosen = np.linspace(0, len(needles) - 1, len(haystacks)).astype(int)
    return haystacks, [needles[i] for i in chosen], [queries[i] for i in chosen]


def embed(model, bodies):
    """Embeddings (n, E) of documents given as token ids, one at a time."""
    start = model.tokenizer.encode("search_document: ").ids
    texts = [np.array([*start[:-1], *body, start[-1]]) for body in bodies]
    with torch.no_grad():
        parts = [model.embed(*pack([text], model.device)) for text in texts]
    return torch.cat(parts).float().cpu().numpy()


def needle_scores(model, haystacks, needles, query, length, depths):
    """Reciprocal ranks (depths, n). haystacks, needles: n lists of ids; query (n, E)."""
    special = len(model.tokenizer.encode("search_document: ").ids)
    whole = [haystack[: length - special] for haystack in haystacks]
    cosines, n = query @ embed(model, whole).T, len(whole)  # (n, n)
    found = np.empty((depths, n))
    for row, depth in enumerate(np.linspace(0, 1, depths)):
        hidden = []
        for haystack, needle in zip(whole, needles, strict=True):
            rest = haystack[: len(haystack) - len(needle)]
            place = round(depth * len(rest))
            hidden.append([*rest[:place], *needle, *rest[place:]])
        own = (query * embed(model, hidden)).sum(1)  # (n,)
        others = np.where(np.eye(n, dtype=bool), -np.inf, cosines)
        found[row] = 1 / (1 + (others > own[:, None]).sum(1))
    return found


def cost(directory, length, tokens):
    """(seconds, MiB) of one text of so many tokens, in a process of its own."""
    model = NomicBert.from_pretrained(directory, device=best_device())
    before = peak_memory()
    embed(model, [tokens[:length]])
    memory = peak_memory() - before
    return min(seconds_of(lambda: embed(model, [tokens[:length]])) for _ in range(3)), memory


def draw(tables, lengths, path):
    from common.plots import plt

    figure, axes = plt.subplots(1, len(tables), figsize=(9, 3), sharey=True)
    for axis, (name, table) in zip(axes, tables.items(), strict=True):
        values = np.stack([table[length].mean(1) for length in lengths], 1)  # (depths, lengths)
        image = axis.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set(title=name, xlabel="length of the text, in tokens")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
    axes[0].set_yticks([0, len(values) - 1], ["beginning", "end"])
    axes[0].set_ylabel("where the sentence is")
    figure.colorbar(image, ax=axes, label="reciprocal rank")
    write_whole(path, lambda p: figure.savefig(p, dpi=130, format="png", bbox_inches="tight"))
    plt.close(figure)


def main(arguments):
    options, _ = read_options(Options, arguments)
    lengths = sorted(whole_numbers(options.lengths, "lengths"))
    if lengths[0] < options.needle + 16:
        raise InputError(f"--lengths: {lengths[0]} leaves no room beside a needle")
    directory = options.model or str(last_stage(options.out))
    model = NomicBert.from_pretrained(directory, device=best_device())
    haystacks, needles, queries = texts_and_needles(options, model, lengths[-1])
    query, tables, trained = model.encode(queries), {}, model.config.trained_length
    print_machine(model.device, f"{len(haystacks)} texts, trained at {trained} tokens")
    print_head("tokens", *ROPES, "difference", "seconds per text", "MiB beside the weights")
    for length in lengths:
        for name in ROPES:
            scaling = scalings(max(1, length / trained))[name]
            model.rope = dataclasses.replace(model.rope, **scaling)
            scores = needle_scores(model, haystacks, needles, query, length, options.depths)
            tables.setdefault(name, {})[length] = scores
        plain, dynamic = (tables[name][length].mean(0) for name in ROPES)  # of each text (n,)
        cells = [shown(summary(x)) for x in (plain, dynamic, dynamic - plain)]
        seconds, memory = run_in_process(cost, directory, length, haystacks[0])
        print_row(f"{length:,}", *cells, f"{seconds:.3f}", f"{memory:,.0f}")
    draw(tables, lengths, Path(options.out, "needle.png"))
    print(f"\nwrote {options.out}/needle.png")


if __name__ == "__main__":
    cli(main)
