"""The paper's data: 29 sources of weak pairs, 10 of supervised ones, and text (sec. 4.1 to 4.2).

    python data/hub.py --list                                        # the tables below, to read
    python data/hub.py --local=DIR --tokenizer=FILE                  # local copies of any rows
    python data/hub.py --stage=2 --sources=squad,eli5 --limit=10000  # a sample, over the network
    python data/hub.py --stage=3                                     # adds stage 3 to out/paper

The bucket with the published pairs (filtered, with negatives) refuses access by now. The tables
name public data sets that hold the same pairs before filtering, where there are some; `st:` are
files of sentence-transformers/embedding-training-data, all found in its listing. What is marked ?
is a guess: the name, or the columns. Filtering is data/filter.py, mining negatives is mining.py.

A local copy comes first, in DIR/NAME or DIR/BUCKET: NAME.jsonl.gz, NAME.jsonl or NAME.parquet, or a
folder of such shards, with the columns query, document and negatives or those of the table.

Everything is streamed (the `datasets` library, an extra), held out from, tokenised and checked as
data/jsonl.py does it. bert-base-uncased's tokenizer.json is the paper's; without --tokenizer, one
is trained. This code was never run against the hub itself, only on local files of both forms.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.jsonl import UNIMPORTANT, json_rows
from data.pairs import prepare
from data.prepare import show_pairs
from data.rows import Pairs
from options import InputError, read_options, run

ST = "sentence-transformers/embedding-training-data"
REDDIT = "sentence-transformers/reddit-title-body:reddit_title_text_20*.jsonl.gz"
PT = "namespace-Pt/embedding-data"

# fmt: off
# name, task prefix (of both sides; search: search_query and search_document), pairs in the paper's
# table 7 (rounded down to whole batches there), columns of the public set, bucket, public set
STAGE_2 = [
    ("reddit", "clustering", 64_978_944, "title,body", "reddit_full", REDDIT),
    ("paq", "search", 52_953_088, "0,1", "paq_full", "st:PAQ_pairs.jsonl.gz"),
    ("amazon-reviews", "classification", 38_682_624, "0,1", "amazon_reviews_full",
     "st:amazon_review_2018.jsonl.gz"),
    ("s2orc-title-abstract", "clustering", 35_438_592, "0,1", "s2orc_title_abstract_full",
     "st:S2ORC_title_abstract.jsonl.gz"),
    ("wikianswers", "classification", 9_912_320, "set", "wikianswers_full",
     "st:WikiAnswers.jsonl.gz"),
    ("s2orc-citation-titles", "clustering", 7_585_792, "0,1", "s2orc_citation_title_full",
     "st:S2ORC_citations_titles.jsonl.gz"),
    ("s2orc-abstract-citation", "clustering", 7_503_872, "0,1", "s2orc_abstract_citation_full",
     "st:S2ORC_citations_abstracts.jsonl.gz"),
    ("s2orc-abstract-body", "clustering", 6_389_760, "", "s2orc_abstract_body_index_filtered", ""),
    ("wikipedia", "classification", 6_078_464, "title,text", "wiki_title_body_full",
     "wikimedia/wikipedia 20231101.en"),
    ("gooaq", "search", 1_245_184, "0,1", "gooaq_full", "st:gooaq_pairs.jsonl.gz"),
    ("codesearch", "clustering", 835_584, "0,1", "codesearch_full", "st:codesearchnet.jsonl.gz"),
    ("agnews", "classification", 409_600, "0,1", "agnews_full", "st:agnews.jsonl.gz"),
    ("ccnews", "classification", 344_064, "0,1", "ccnews_full", "st:ccnews_title_text.jsonl.gz"),
    ("npr", "classification", 344_064, "0,1", "npr_full", "st:npr.jsonl.gz"),
    ("cnn", "classification", 278_528, "0,1", "cnn_full", "st:cnn_dailymail.jsonl.gz"),
    ("yahoo-title-answer", "search", 262_144, "0,1", "yahoo_title_answer_full",
     "st:yahoo_answers_title_answer.jsonl.gz"),
    ("amazon-qa", "search", 212_992, "query,pos", "amazon_qa_full", "st:amazon-qa.jsonl.gz"),
    ("yahoo-title-question", "search", 196_608, "0,1", "yahoo_title_question_full",
     "st:yahoo_answers_title_question.jsonl.gz"),
    ("sentence-compression", "classification", 163_840, "0,1", "sentence_compression_full",
     "st:sentence-compression.jsonl.gz"),
    ("yahoo-qa", "search", 131_072, "0,1", "yahoo_qa_full",
     "st:yahoo_answers_question_answer.jsonl.gz"),
    ("eli5", "search", 98_304, "0,1", "eli5_full", "st:eli5_question_answer.jsonl.gz"),
    ("altlex", "classification", 98_304, "0,1", "altlex_full", "st:altlex.jsonl.gz"),
    ("wikihow", "classification", 81_920, "0,1", "wikihow_full", "st:wikihow.jsonl.gz"),
    ("simplewiki", "classification", 81_920, "0,1", "simplewiki_full", "st:SimpleWiki.jsonl.gz"),
    ("stackexchange-question-question", "clustering", 65_536, "0,1",
     "stackexchange_question_question_full",
     "st:stackexchange_duplicate_questions_title_title.jsonl.gz"),
    # a guess: title and body on both sides here, and the paper's name says title -> body
    ("stackexchange-title-body", "clustering", 65_536, "0,1", "stackexchange_title_body_full",
     "st:stackexchange_duplicate_questions_title-body_title-body.jsonl.gz"),
    ("stackexchange-body-body", "clustering", 65_536, "0,1", "stackexchange_body_body_full",
     "st:stackexchange_duplicate_questions_body_body.jsonl.gz"),
    ("quora", "classification", 32_768, "0,1", "quora_full", "st:quora_duplicates.jsonl.gz"),
    ("squad", "search", 16_384, "0,1", "squad_full", "st:squad_pairs.jsonl.gz"),
]
# the same of table 3. Negatives of the public sets are not those of the paper
STAGE_3 = [
    ("msmarco", "search", 484_864, "query,pos,neg",
     "msmarco_distillation_simlm_rescored_reranked_min15", "st:msmarco-triplets.jsonl.gz"),
    ("nli", "classification", 275_200, "0,1,2", "nli_simcse_50negs_fixed", "st:AllNLI.jsonl.gz"),
    ("reddit-triples", "clustering", 199_680, "", "reddit_triples", ""),
    ("medi-supernli", "classification", 177_408, "", "medi_supernli_sampled", ""),
    ("hotpotqa", "search", 169_728, "query,pos,neg", "hotpotqa_hn_mine_shuffled",
     f"?{PT}:hotpotqa/train.jsonl.gz"),  # the file is there; its columns are a guess
    ("fever", "search", 139_776, "query,pos,neg", "fever_hn_mine", f"?{PT}:fever/train.jsonl.gz"),
    ("medi-stackexchange", "classification", 100_352, "", "medi_sts_stackexchange_dupe", ""),
    ("nq", "search", 69_888, "0,1", "nq_cocondensor_hn_mine_reranked_min15",
     "st:NQ-train_pairs.jsonl.gz"),
    ("medi-flickr", "classification", 50_944, "", "medi_sts_flickr_sampled", ""),
    ("medi-wiki", "classification", 24_832, "", "medi_sts_wiki_rephrasal", ""),
]
# text of stage 1 (sec. 4.1.1): a column of documents. No count is in the paper
STAGE_1 = [
    ("wikipedia-text", "", 0, "text", "wikipedia", "wikimedia/wikipedia 20231101.en"),
    ("books", "", 0, "text", "bookscorpus", "?bookcorpus/bookcorpus"),
]
# fmt: on
TABLES = {1: STAGE_1, 2: STAGE_2, 3: STAGE_3}
PUBLISHED = ("query", "document", "negatives")


@dataclass
class Options:
    out: str = "out/paper"  # the data folder to write, or to add sources to
    stage: str = "1,2,3"  # which tables; give less at a time to stop in between
    sources: str = ""  # names out of the tables, with commas; empty: all that can be had
    local: str = ""  # a folder with local copies, of any rows of the tables
    limit: int = 0  # rows of each source, the first ones; 0: all
    tokenizer: str = ""  # a tokenizer.json to use; empty: the one in OUT, or one trained here
    vocab_size: int = 30_522  # of the tokenizer that is trained
    queries: int = 1000  # held-out queries of each source, at most
    pool: int = 10_000  # documents that a retrieval task searches, at most
    held_out: str = ""  # tasks in the BEIR layout that must not be trained on, with commas
    longest: int = 20_000  # characters of a pair's texts; the rest is cut off and counted
    strict: bool = False  # a row that is faulty, a copy or too long is an error
    processes: int = 0  # that tokenise; 0: as many as cores
    list: bool = False  # prints the tables and prepares nothing
    show: int = 0  # prints so many pairs, drawn at random from all sources


def print_tables():
    for stage, table in TABLES.items():
        print(f"\nstage {stage}: {len(table)} sources, {sum(row[2] for row in table):,} rows")
        for name, task, count, columns, bucket, public in table:
            public = public.replace("st:", f"{ST}:") or "none: only a local copy"
            count = f"{count:,}" if count else ""
            print(f"  {name:32}{task:16}{count:>12}  {columns:14}  {bucket}\n      {public}")


def prefixes_of(task):
    query, document = ("search_query", "search_document") if task == "search" else (task, task)
    return tuple(f"{name}: " if name else "" for name in (query, document))


# ------------------------------------------------------------------------------------------------
# Where rows come from


def local_files(folder, name, bucket):
    """The local copy of a row of the tables: a file, or the shards in a folder of its name."""
    for path in (Path(folder, name), Path(folder, bucket)):
        if path.is_dir():
            kinds = ("*.jsonl.gz", "*.jsonl", "*.json.gz", "*.parquet")
            shards = sorted(shard for kind in kinds for shard in path.glob(kind))
            if not shards:
                raise InputError(f"{path} has no *.jsonl.gz, *.jsonl or *.parquet")
            return shards
        for suffix in (".jsonl.gz", ".jsonl", ".json.gz", ".parquet"):
            if path.with_name(path.name + suffix).is_file():
                return [path.with_name(path.name + suffix)]
    return []


def rows_of_files(files):
    """(where, value) of local shards, JSON lines or Parquet."""
    for path in files:
        if path.suffix != ".parquet":
            yield from json_rows([path])
            continue
        try:
            rows = load("parquet", data_files=str(path))
            for number, row in enumerate(rows, start=1):
                yield f"{path}, row {number}", row
        except (OSError, ValueError, RuntimeError) as error:  # pyarrow's errors are ValueErrors
            reason = str(error).split("\n")[0][:200]
            raise InputError(f"{path} is no whole Parquet file: {reason}") from None


def rows_of_hub(public):
    """(where, value) of a public data set: "NAME CONFIG" with columns, or "NAME:FILES", lines of
    JSON. Those are read as text: some hold lists, which the library's JSON reader does not take."""
    name, _, files = public.lstrip("?").replace("st:", f"{ST}:").partition(":")
    try:
        if not files:
            for number, row in enumerate(load(*name.split()), start=1):
                yield f"{name}, row {number}", row
            return
        lines = load("text", data_files=f"hf://datasets/{name}/{files}")
        for number, row in enumerate(lines, start=1):
            try:
                yield f"{name}/{files}, line {number}", json.loads(row["text"])
            except ValueError:
                yield f"{name}/{files}, line {number}", None
    except InputError:
        raise
    except Exception as error:  # the network, the hub and its files fail in many ways
        reason = str(error).split("\n")[0][:200]
        raise OSError(f"{name} cannot be read: {reason}") from None


def load(*arguments, **options):
    try:
        import datasets
    except ImportError:
        raise InputError(
            "this needs the datasets library: pip install -r requirements-hub.txt"
        ) from None
    datasets.disable_progress_bars()
    return datasets.load_dataset(*arguments, split="train", streaming=True, **options)


def columns_of(files, columns):
    """The published names where a local copy has them, else those of the table."""
    _, first = next(rows_of_files(files), (None, None))
    return PUBLISHED if isinstance(first, dict) and "document" in first else columns


def source_of(stage, row, options):
    """A row of the tables as a source; None where there is nothing to read it from."""
    name, task, _, columns, bucket, public = row
    files = local_files(options.local, name, bucket) if options.local else []
    named = columns not in ("", "set", "0,1", "0,1,2")  # else rows are lists, or as published
    columns = tuple(columns.split(",")) if named else PUBLISHED
    if files:
        columns = columns_of(files, columns) if stage > 1 else columns
        return Pairs(name, stage, prefixes_of(task), lambda: rows_of_files(files), columns, files)
    if not public or (options.local and not options.sources):
        return None
    return Pairs(name, stage, prefixes_of(task), lambda: rows_of_hub(public), columns)


def chosen_sources(options):
    """Raises InputError for a name or stage that is not in the tables, or cannot be had."""
    stages = options.stage.split(",")
    if not set(stages) <= {"1", "2", "3"}:
        raise InputError(f"--stage={options.stage}: give 1, 2, 3, or several with commas")
    rows = [(int(stage), row) for stage in stages for row in TABLES[int(stage)]]
    wanted = [name for name in options.sources.split(",") if name]
    known = [row[0] for _, row in rows]
    for name in wanted:
        if name not in known:
            raise InputError(f"--sources: {name} is not among {', '.join(known)}")
    if options.local and not Path(options.local).is_dir():
        raise InputError(f"--local={options.local}: there is no such folder")
    sources, missing = [], []
    for stage, row in rows:
        if not wanted or row[0] in wanted:
            source = source_of(stage, row, options)
            sources += [source] if source else []
            missing += [] if source else [row[0]]
    if missing and wanted:
        raise InputError(f"{', '.join(missing)}: no public copy; --local=DIR takes one of yours")
    if missing:
        print(f"left out, as there is no copy to read: {', '.join(missing)}")
    if not sources:
        raise InputError(f"{options.local} has none of {', '.join(known[:3])}, ...: see --list")
    return sources


def merged_text(sources):
    """Stage 1 is one column: its sources are read one after the other."""
    texts = [source for source in sources if source.stage == 1]
    if not texts:
        return sources

    def read():
        for source in texts:
            yield from source.read()

    files = [file for source in texts for file in source.files]
    text = Pairs("text", 1, ("", ""), read, texts[0].columns, files)
    return [*(source for source in sources if source.stage > 1), text]


def main(arguments):
    options, _ = read_options(Options, arguments)
    if options.list:
        return print_tables()
    sources = merged_text(chosen_sources(options))
    command = {"script": "data/hub.py", **asdict(options)}
    out = prepare(sources, options, {k: v for k, v in command.items() if k not in UNIMPORTANT})
    if options.show:
        show_pairs(out, options.show)


if __name__ == "__main__":
    run(main)
