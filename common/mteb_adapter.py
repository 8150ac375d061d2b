"""MTEB (arXiv 2210.07316): its own library runs its tasks on our model, and writes its results.

What is ours is the prefix that each type of task takes, and no more."""

import hashlib
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

    def similarity(self, x, y):
        return cos_sim(x, y)

    def similarity_pairwise(self, x, y):
        return pairwise_cos_sim(x, y)


def run_mteb(model, name, tasks, out, max_tokens, dims=None):
    """Runs tasks, names or mteb's task objects: name of the task -> mean of its main scores. All
    scores are kept in OUT/mteb/results/, in mteb's layout; what is there is not run again."""
    opened = []
    for task in tasks:
        try:
            opened.append(mteb.get_task(task, languages=["eng"]) if isinstance(task, str) else task)
        except KeyError:
            raise InputError(f"--tasks: {task} is not a task of mteb") from None
    encoder = Encoder(model, name, max_tokens, dims)
    try:
        results = mteb.evaluate(encoder, opened, cache=mteb.ResultCache(Path(out, "mteb")))
    except Exception as error:  # no network, no such data, no access: many types
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--tasks={','.join(map(str, tasks))}: {reason}") from None
    return {
        result.task_name: float(
            np.mean([s["main_score"] for split in result.scores.values() for s in split])
        )
        for result in results.task_results
    }
