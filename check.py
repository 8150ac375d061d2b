"""The doctor: is everything in order, and what would a run cost?

    python mlm.py --check        # and so for contrastive.py and finetune.py

What it says comes from doing it: it trains for a few steps, in a temporary folder, with the stage's
own main().
"""

import contextlib
import io
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from common import make_default_data
from data import store
from model import fast_dtype
from options import InputError
from processes import best_device


def check_stage(main, arguments, config):
    """Examines one stage and prints what it finds, a line each: [OK] or [FAIL].

    main: the stage's main(arguments). arguments: the command line. config: what it comes to.
    Raises InputError at the end if anything failed, so that the exit code is 2.
    """
    failed = []

    def report(good, finding):
        print(f"[{'OK' if good else 'FAIL'}] {finding}", flush=True)
        failed.extend([] if good else [finding])

    packages = ("torch", "numpy", "tokenizers", "safetensors", "tqdm")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    report(sys.version_info >= (3, 10), f"python {platform.python_version()}, {versions}")
    device = best_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    report(True, f"{device} ({name}), {torch.get_num_threads()} threads, {fast_dtype(device)}")

    make_default_data(config.data)
    tokenizer = store.load_tokenizer(config.data)
    for stage in sorted(path.name for path in Path(config.data).glob("stage*")):
        sources = store.open_sources(Path(config.data, stage), tokenizer)
        columns = [column for source in sources for column in source.columns.values()]
        largest = max(int(column.tokens[:1_000_000].max()) for column in columns)
        tokens = sum(len(column.tokens) for column in columns)
        report(
            largest < tokenizer.get_vocab_size(),
            f"{stage}: {len(sources)} sources, {tokens:,} tokens, ids below {largest + 1:,}",
        )

    with tempfile.TemporaryDirectory() as folder:
        own = [a for a in arguments if a.split("=")[0] not in ("--check", "--out", "--preset")]

        def train(name, *options):
            """A short quiet run: the records of its log, and its weights as bytes."""
            out = Path(folder, name)
            never = ["--log-every=1", "--eval-every=0", "--save-every=1000000"]
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                main([*own, *never, f"--out={out}", *options])
            records = [json.loads(line) for line in open(out / "log.jsonl")]
            return records, (out / "model.safetensors").read_bytes()

        records, _ = train("overfit", "--overfit", "--batch-size=8", "--steps=40", "--lr=2e-3")
        first, last = records[0]["loss"], records[-1]["loss"]
        report(last < first / 2, f"one batch memorised: loss {first:.3f} -> {last:.3f} in 40 steps")

        short = ("--batch-size=8", "--steps=4")
        _, whole = train("whole", *short)
        train("parts", *short, "--stop-after=2")
        _, resumed = train("parts", *short, "--resume")
        report(
            whole == resumed, "saved, loaded and resumed: the weights equal an undisturbed run's"
        )

        own = [a for a in arguments if a.split("=")[0] not in ("--check", "--out")]
        records, _ = train("preset", "--batch-size=32", "--steps=3")
        tokens = records[-1]["tokens"] * config.batch_size / 32
        minutes = config.steps * tokens / records[-1]["tokens_per_second"] / 60
        report(
            True,
            f"{config.preset}: {config.steps:,} steps of about {tokens:,.0f} tokens, "
            f"{records[-1]['tokens_per_second']:,.0f} tokens/s: about {minutes:,.0f} minutes here",
        )
    if failed:
        raise InputError(f"{len(failed)} of these checks failed: {failed[0]}")
