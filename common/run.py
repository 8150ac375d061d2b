"""A run: its directory, its log, its checkpoints. Run remembers and writes. It never calls back,
has no hooks, and decides nothing about training; the loop stands in each stage.

OUT holds

    config.json, model.safetensors, tokenizer.json, ...   the model (common/checkpoint.py)
    state.pt                                              weights, optimizer, step: to continue from
    run.json                                              options, and what the run prints first
    log.jsonl                                             an object per logged step

Each file is replaced as a whole, and state.pt has all that continuing needs, so that it never has
to match another file. The same command continues an interrupted run. A run with other settings
needs another OUT: no run is ever overwritten.
"""

import json
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.device import device_name, peak_flops
from common.distributed import (
    call_everywhere,
    gather_objects,
    is_first,
    print_once,
    rank_and_world,
    sum_over_processes,
)
from common.files import fingerprint, read_json, write_json, write_whole
from common.options import InputError

try:
    import fcntl
except ImportError:  # Windows: two runs into one OUT are not noticed there
    fcntl = None

# options that may differ when a run is continued: they do not change its result
FREE = ("preset", "out", "resume", "micro_batch_tokens", "tokens_in_memory", "compile")
FREE += ("log_every", "eval_every", "save_every")


class Run:
    """tokens, flops: what this process has trained on since the last line of the log, which the
    loop adds up; they become tokens per second."""

    def __init__(self, stage, config, origin):
        """Claims config.out for a run of this stage ("mlm", ...).

        Raises InputError where it holds something else, or a run with other settings."""
        self.stage, self.config, self.origin = stage, config, origin
        self.out, self.step, self.state = Path(config.out), 0, None
        self.tokens = self.flops = 0
        self.checkpoint_due = self.stopping = False
        self.signals = []  # those that asked the run to stop
        self.settings = {k: v for k, v in asdict(config).items() if k not in FREE}
        call_everywhere(self.claim)
        self.finished = self.step == config.steps
        if self.finished:
            print_once(f"{self.out} is finished: for another run give another --out, or remove it")

    def claim(self):
        # a continued run has to read the same data, and to have begun with the same weights
        self.settings["data"] = fingerprint(Path(self.config.data, "meta.json"))
        if self.settings.get("init") and Path(self.config.init).is_dir():
            self.settings["init"] = fingerprint(Path(self.config.init, "model.safetensors"))
        names = {path.name for path in self.out.glob("*") if path.suffix != ".tmp"}  # of a kill
        begun = "run.json" in names and read_json(self.out / "run.json").get("stage")
        if begun != self.stage and names - {"log.jsonl"}:
            raise InputError(
                f"{self.out} holds something other than a run of {self.stage}.py: choose another "
                "--out"
            )
        path, log = self.out / "state.pt", self.out / "log.jsonl"
        if not path.is_file():
            if self.config.resume:
                raise InputError(f"--resume: there is no {path}; without --resume a new run begins")
            if log.is_file() and log.stat().st_size:
                raise InputError(
                    f"{self.out} has a log and no state.pt to continue from: choose another --out"
                )
            return
        try:
            self.state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            before, self.step = self.state["settings"], self.state["step"]
        except Exception as error:  # a damaged file raises many types
            raise InputError(
                f"{path} is damaged ({type(error).__name__}): remove {self.out} to begin again"
            ) from None
        for key, value in self.settings.items():
            if before.get(key) != value:
                raise InputError(
                    f"{self.out} holds a run with another --{key.replace('_', '-')} "
                    f"({before.get(key)}, not {value}): choose another --out, or remove it"
                )

    def begin(self, model, optimizer, **about):
        """Restores the checkpoint to continue from, or writes the first one: a full disk is noticed
        now and not in an hour. about: what else to print.

        Raises InputError where another run writes into OUT, or processes have other weights."""
        self.model, self.optimizer = model, optimizer
        self.device = next(model.parameters()).device
        if self.state:
            model.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])
            self.state = None
            print_once(f"continuing {self.out} at step {self.step}")
        total = sum(p.detach().double().sum().item() for p in model.parameters())
        if len(set(gather_objects((self.step, total)))) > 1:
            raise InputError("the processes start from different weights: give all the same --init")
        call_everywhere(self.open_log)
        self.describe(about)
        if self.step == 0:
            call_everywhere(lambda: self.write(0))

    def open_log(self):
        """Opens the log, and locks it against another run. Lines after the checkpoint, whose steps
        come again, are cut off."""
        if not is_first():
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.log_file = open(self.out / "log.jsonl", "a+b", buffering=0)
        try:
            if fcntl:
                fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.out}: another run is writing there") from None
        self.log_file.seek(0)
        whole = [line for line in self.log_file if line.endswith(b"\n")]  # a kill may cut the last
        kept = [line for line in whole if json.loads(line)["step"] <= self.step]
        self.log_file.truncate(sum(map(len, kept)))

    def describe(self, about):
        """Prints what differs from the defaults, and writes run.json."""
        options, default = asdict(self.config), type(self.config)()
        shown = [f"{self.stage}: preset {self.config.preset}"]
        for key, value in options.items():
            if value != getattr(default, key) and key != "preset":
                shown.append(f"{key}={value} ({self.origin[key]})")
        print_once(", ".join(shown))
        parameters = sum(p.numel() for p in self.model.parameters())
        about = {"parameters": f"{parameters:,}", "on": device_name(self.device), **about}
        print_once(", ".join(f"{name} {value}" for name, value in about.items()))
        if is_first():
            run = {"stage": self.stage, "options": options, "origin": self.origin}
            write_json(self.out / "run.json", run | about | {"torch": torch.__version__})

    # --------------------------------------------------------------------------------------------
    # In the loop

    def steps(self, batch_of):
        """(step, batch_of(step)) for each step that is still to do. The next batch is made in a
        thread while this one is trained on. SIGTERM, the warning that preemptible machines get,
        and Ctrl-C let the step end, save and leave."""
        handlers = {n: signal.signal(n, self.stop) for n in (signal.SIGTERM, signal.SIGINT)}
        end = self.config.steps
        self.bar = tqdm(total=end, initial=self.step, mininterval=1, disable=not is_first())
        try:
            with ThreadPoolExecutor(1) as thread:
                coming = thread.submit(batch_of, self.step)
                self.began = time.perf_counter()
                for step in range(self.step, end):
                    batch, done = coming.result(), step + 1
                    if done < end:
                        coming = thread.submit(batch_of, done)
                    if not dist.is_initialized() or done % self.config.log_every == 0:
                        self.stopping = sum_over_processes(len(self.signals)) > 0  # all agree
                    regular = done % self.config.save_every == 0 or done == end
                    self.checkpoint_due = regular or self.stopping
                    yield step, batch
                    self.bar.update()
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if is_first():
                self.log_file.close()

    def stop(self, number, frame):
        if number == signal.SIGINT and number in self.signals:
            raise KeyboardInterrupt  # the second Ctrl-C leaves at once
        self.signals.append(number)

    def log_due(self, step):
        """Whether a line of the log is due. To know the loss, a GPU has to be waited for."""
        return (step + 1) % self.config.log_every == 0 or self.checkpoint_due

    def evaluation_due(self, step):
        """Whether this process evaluates now. Only the first one does; the others wait for it in
        their next sum."""
        every, done = self.config.eval_every, step + 1
        return is_first() and every > 0 and (done % every == 0 or done == self.config.steps)

    def log(self, step, sample="", **values):
        """Writes a line of log.jsonl and shows it. sample: text to print above the progress bar.

        With a loss, which all processes must give, come tokens and tokens per second since the line
        before. Raises InputError if the loss is not finite, before a checkpoint is made of it."""
        record = {"step": step + 1}
        if "loss" in values:
            seconds = time.perf_counter() - self.began
            own = torch.tensor([self.tokens, self.flops], dtype=torch.float64)
            tokens, flops = sum_over_processes(own).tolist()
            record |= {"tokens": int(tokens), "tokens_per_second": tokens / seconds}
            if peak := peak_flops(self.device):
                _, world = rank_and_world()
                record["share_of_peak"] = flops / seconds / (world * peak)
            self.tokens = self.flops = 0
        record |= {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        if not math.isfinite(record.get("loss", 0.0)):
            raise InputError(self.diverged(f"the loss is {record['loss']}", step))
        if is_first():
            self.log_file.write(json.dumps(record).encode() + b"\n")
            formats = {"loss": ".3f", "dev_accuracy": ".3f", "dev_ndcg": ".3f", "lr": ".1e"}
            formats |= {"tokens_per_second": ",.0f", "share_of_peak": ".0%"}
            shown = [f"{key} {record[key]:{formats[key]}}" for key in formats if key in record]
            if "loss" in values:
                self.bar.set_postfix_str(" ".join(shown), refresh=False)
            if sample:
                self.bar.write(f"step {step + 1}: {' '.join(shown)}\n    {sample}")
        self.began = time.perf_counter()

    def diverged(self, what, step):
        return (
            f"{what} at step {step + 1}: --lr or the data may be at fault; {self.out} holds the "
            "checkpoint before"
        )

    def save(self, step):
        """Writes a checkpoint if one is due: by its own clock, at the end, and on a signal, after
        which the program leaves. Raises InputError if a weight is not finite: a finite loss may
        still have a gradient that is not."""
        if not self.checkpoint_due:
            return
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise InputError(self.diverged("weights are not finite", step))
        self.write(step + 1)
        if self.stopping and step + 1 < self.config.steps:
            number = signal.Signals(self.signals[0] if self.signals else signal.SIGTERM)
            print_once(
                f"\nstopped by {number.name}: {self.out} is saved at step {step + 1}; the same "
                "command continues"
            )
            sys.exit(128 + number)
        self.began = time.perf_counter()

    def write(self, step):
        if is_first():
            self.model.save_pretrained(self.out)
            state = {"step": step, "settings": self.settings}
            state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            write_whole(self.out / "state.pt", lambda path: torch.save(state, path))


# ------------------------------------------------------------------------------------------------
# The optimizer


def adamw(model, lr, weight_decay, betas, eps):
    """AdamW, with weight decay on matrices and not on norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": norms}]
    return torch.optim.AdamW(groups, lr, betas, eps, weight_decay=0.0, fused=True)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
