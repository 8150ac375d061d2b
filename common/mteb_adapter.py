"""MTEB (arXiv 2210.07316): its own library runs its tasks on our model, and writes its results.

What is ours is the prefix that each type of task takes, and no more."""

import hashlib
import re
from pathlib import Path

import mteb
import numpy as np
from mteb.models.model_meta import ModelMeta
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from mteb.types import PromptType

from common.options import InputError


def prefix(task, prompt_type):
    """The task prefix (sec. 5.2.1): of queries and documents in retrieval; of clustering; and of
    classification for all else: pairs, STS, summaries, and reranking (as the released code; the
    paper does not say). Quora's documents are questions too, and take the prefix of queries."""
    if "Retrieval" in task.type:
        is_query = prompt_type == PromptType.query or task.name.startswith("QuoraRetrieval")
        return "search_query: " if is_query else "search_document: "
    return "clustering: " if "Clustering" in task.type else "classification: "


class Encoder:
    """Our model in the form that mteb asks for (its EncoderProtocol)."""

    def __init__(self, model, name, max_tokens, dims=None):
        self.model, self.max_tokens, self.dims = model, max_tokens, dims
        weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
        settings = f"{max_tokens} {dims} {model.rope}".encode()
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                # mteb keeps results by this name: other weights or settings are another model
                "revision": hashlib.sha256(weights + settings).hexdigest()[:16],
                "max_tokens": max_tokens,
                "embed_dim": dims or model.config.hidden_size,
                "n_parameters": sum(p.numel() for p in model.parameters()),
            }
        )

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs):
        """inputs: batches with a list of texts under "text" -> (n, dims)."""
        before = prefix(task_metadata, prompt_type)
        texts = [before + text for batch in inputs for text in batch["text"]]
        return self.model.encode(texts, self.max_tokens, self.dims)

    similarity, similarity_pairwise = staticmethod(cos_sim), staticmethod(pairwise_cos_sim)


# nomic-embed-text-v1 on MTEB(eng, v1), means of the 56 tasks by type and over all (table 4)
PUBLISHED = {
    "Classification": 74.1,
    "Clustering": 43.9,
    "PairClassification": 85.2,
    "Reranking": 55.7,
    "Retrieval": 52.8,
    "STS": 82.1,
    "Summarization": 30.1,
    "all": 62.39,
}


def named_tasks(names, languages=None):
    """mteb's task objects for names of tasks and of whole benchmarks, with commas between them:
    "MTEB(Law, v1),SciFact". languages: of tasks that have several; a benchmark has its own.

    Raises InputError for a name that mteb does not know."""
    tasks = {}
    for name in re.split(r",\s*(?![^()]*\))", names):  # not the commas within brackets
        try:
            found = mteb.get_benchmark(name).tasks
        except KeyError:
            try:
                found = [mteb.get_task(name, languages=languages)]
            except KeyError:
                raise InputError(f"--tasks: {name} is no task or benchmark of mteb") from None
        tasks |= {task.metadata.name: task for task in found}
    return list(tasks.values())


def run_mteb(model, name, tasks, out, max_tokens=0, dims=None):
    """Runs tasks, mteb's task objects, one after the other: yields the name of each, its type, and
    its main score (the mean over splits and languages), or why there is none.

    All scores are kept in OUT/mteb/results/, in mteb's layout; what is there is not run again.
    max_tokens: 0 is 8,192 for the tasks of LongEmbed, and the trained length for all others."""
    encoders, cache = {}, mteb.ResultCache(Path(out, "mteb"))
    for task in tasks:
        about = task.metadata
        longest = 8192 if about.name.startswith("LEMB") else model.config.trained_length
        length = max_tokens or longest
        encoders[length] = encoders.get(length) or Encoder(model, name, length, dims)
        try:
            result = mteb.evaluate(encoders[length], task, cache=cache).task_results[0]
            yield about.name, about.type, float(result.get_score())
        except Exception as error:  # no network, no such data, no access: many types
            yield about.name, about.type, f"{error}".strip().split("\n")[0]


def print_table(rows):
    """Prints the rows of run_mteb as they come, then means by type and over all, with the paper's
    where it has them, then what was skipped. Returns name -> score."""
    scores, skipped, kinds = {}, {}, {}
    for name, kind, score in rows:
        if isinstance(score, str):
            skipped[name] = score
            continue
        scores[name] = score
        kinds.setdefault(kind, []).append(100 * score)
        print(f"{name:44}{kind:24}{100 * score:6.2f}", flush=True)
    whole = {task.metadata.name for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}
    means = [(f"{kind} ({len(found)})", kind, found) for kind, found in sorted(kinds.items())]
    means += [(f"all ({len(scores)})", "all", [100 * score for score in scores.values()])]
    print(f"\n{'mean':68}" + ("  paper, table 4" if set(scores) == whole else ""))
    for title, kind, found in means if scores else ():
        paper = f"{PUBLISHED[kind]:16.2f}" if set(scores) == whole else ""
        print(f"{title:68}{np.mean(found):6.2f}{paper}")
    for name, reason in skipped.items():
        print(f"skipped: {name}: {reason}")
    return scores
