"""MTEB (arXiv 2210.07316): its own library runs its tasks on our model, and writes its own results.

    python evaluate.py mteb --tasks=STSBenchmark,SciFact --model=out/finetune     # from the hub
    python evaluate.py mteb --tasks=my/pairs.csv,my/folder                        # without network

A task is a name in MTEB, a file of scored pairs (similarity.py), or a folder in the BEIR layout
(retrieval.py). What is ours here is the prefix that each kind of task takes, and no more.
"""

import hashlib
from pathlib import Path

import mteb
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_meta import ModelMeta
from mteb.similarity_functions import cos_sim, pairwise_cos_sim
from mteb.types import PromptType

from checkpoint import PREFIXES
from options import InputError
from retrieval import read_judgements, read_texts
from similarity import read_pairs


def prefix(task, prompt_type):
    """The task prefix (sec. 5.2.1): of queries and documents in retrieval; of clustering; and of
    classification for all else: pairs, STS, summaries, and reranking (so the released code, the
    paper is silent). Quora's documents are questions too, and take the prefix of queries [code]."""
    if "Retrieval" in task.type:
        is_query = prompt_type == PromptType.query or task.name.startswith("QuoraRetrieval")
        return PREFIXES["query" if is_query else "document"]
    return PREFIXES["clustering" if "Clustering" in task.type else "classification"]


class Encoder:
    """Our model as mteb wants to see one (its EncoderProtocol)."""

    def __init__(self, model, name, max_tokens, dims=None):
        self.model, self.max_tokens, self.dims = model, max_tokens, dims
        weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
        self.mteb_model_meta = ModelMeta.create_empty(
            {
                "name": name,
                "revision": hashlib.sha256(weights).hexdigest()[:16],  # results are kept by this
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


# ------------------------------------------------------------------------------------------------
# Tasks from files


def describe(path, kind, main_score, splits):
    name = path.name.split(".")[0]
    return TaskMetadata(
        name="".join(word.capitalize() for word in name.replace("_", "-").split("-")),
        description=f"{kind} from a local file or folder, {path.name}",
        type=kind,
        dataset={"path": path.name, "revision": "local"},
        eval_splits=splits,
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


def sts_task(path):
    first, second, scores = read_pairs(path)

    class Task(AbsTaskSTS):
        metadata = describe(path, "STS", "cosine_spearman", ["test"])
        min_score, max_score = min(scores), max(scores)

        def load_data(self, *arguments, **kwargs):
            columns = {"sentence1": first, "sentence2": second, "score": scores}
            self.dataset, self.data_loaded = {"test": Dataset.from_dict(columns)}, True

    return Task()


def retrieval_task(folder):
    splits = sorted(path.name.split(".")[0] for path in (folder / "qrels").glob("*.tsv*"))
    documents, queries = (read_texts(folder / f"{name}.jsonl") for name in ("corpus", "queries"))

    class Task(AbsTaskRetrieval):
        metadata = describe(folder, "Retrieval", "ndcg_at_10", splits)

        def load_data(self, *arguments, **kwargs):
            self.dataset, self.data_loaded = {"default": {}}, True
            for split in splits:
                judged = read_judgements(folder / "qrels" / f"{split}.tsv", queries, documents)
                texts = {
                    "corpus": documents,
                    "queries": {query: queries[query] for query in judged},
                }
                self.dataset["default"][split] = {
                    **{
                        name: Dataset.from_dict({"id": list(rows), "text": list(rows.values())})
                        for name, rows in texts.items()
                    },
                    "relevant_docs": judged,
                    "top_ranked": None,
                }

    return Task()


def open_task(name):
    """The mteb task of a name, a file or a folder, with its data. Raises InputError where there is
    no such task, or its data cannot be had."""
    path = Path(name)
    if path.exists():
        task = retrieval_task(path) if path.is_dir() else sts_task(path)
    else:
        try:
            task = mteb.get_task(name, languages=["eng"])  # the paper's are English
        except KeyError:
            raise InputError(
                f"--tasks: {name} is no file, no folder, and no task of mteb"
            ) from None
    try:
        task.load_data()
    except InputError:
        raise
    except Exception as error:  # no network, no such data, no right to it: all kinds
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"--tasks: the data of {name} cannot be had: {reason}") from None
    return task


def run_mteb(model, name, tasks, out, max_tokens, dims=None):
    """Runs tasks, given by names or paths: {task: {split: a dict of scores for each subset}}. They
    are kept in OUT/mteb/results/, in mteb's layout; what is there already is not run again."""
    cache = mteb.ResultCache(Path(out, "mteb"))
    encoder = Encoder(model, name, max_tokens, dims)
    results = mteb.evaluate(encoder, [open_task(task) for task in tasks], cache=cache)
    return {result.task_name: result.scores for result in results.task_results}
