"""A run: its directory, its log, its checkpoints. Run remembers and writes; what is trained, and
how, stands in the loop of each stage. The only function of a stage that Run calls is `batch_of`, in
a thread: it makes the next batch while the loop trains on this one.

OUT holds

    config.json, model.safetensors, tokenizer.json, ...   the model (common/checkpoint.py)
    state.pt                                              weights, optimizer, step: to continue from
    run.json                                              options, and what the run prints first
    log.jsonl                                             an object per logged step

Each file is replaced as a whole, and state.pt alone is enough to continue. The same command
continues an interrupted run. Other settings need another OUT: no run is ever overwritten.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from common import distributed
from common.checkpoint import find_checkpoint, weight_files
from common.device import device_name, peak_flops
from common.files import fingerprint, read_json, write_json, write_whole
from common.options import InputError

# options that may differ when a run is continued: they do not change its result
FREE = ("preset", "out", "resume", "micro_batch_tokens", "tokens_in_memory", "compile")
FREE += ("log_every", "eval_every", "save_every")


class Run:
    """tokens, flops: what this process has trained on since the last line of the log, which the
    loop adds up; they become tokens per second."""

    def __init__(self, stage, config, origin):
        """Claims config.out for a run of this stage ("mlm", ...). Raises InputError where it holds
        something else, or a run with other settings, and where processes have other options."""
        self.stage, self.config, self.origin = stage, config, origin
        self.out, self.step, self.state = Path(config.out), 0, None
        self.rank, self.world = distributed.rank_and_world()
        self.tokens = self.flops = 0
        self.checkpoint_due = self.stopping = False
        self.signals = []  # those that asked the run to stop
        self.settings = {k: v for k, v in asdict(config).items() if k not in FREE}
        distributed.call_everywhere(self.claim)
        options, *others = distributed.gather_objects(asdict(config) | self.settings)
        for rank, other in enumerate(others, start=1):
            compare(options, other, f"process {rank} has", "give all the same options")
        self.finished = self.step == config.steps
        if self.finished:
            distributed.print_once(f"{self.out} is finished: give another --out, or remove it")

    def claim(self):
        # a continued run has to read the same data, and to have begun with the same weights
        data, init = Path(self.config.data), self.settings.get("init")
        if not (data / "meta.json").is_file():
            raise InputError(f"{data} is not a data folder: python data/pydocs.py --out={data}")
        self.settings["data"] = fingerprint(data / "meta.json")
        if init:
            files = weight_files(find_checkpoint(init))
            self.settings["init"] = " ".join(map(fingerprint, files))
        state, log, other = self.out / "state.pt", self.out / "log.jsonl", "choose another --out"
        names = {path.name for path in self.out.glob("*") if path.suffix != ".tmp"}  # of a kill
        begun = "run.json" in names and read_json(self.out / "run.json").get("stage")
        if begun != self.stage and names - {log.name}:
            what = f"{self.out} holds something other than a run of {self.stage}.py"
            raise InputError(f"{what}: {other}")
        if state.is_file():
            with own_file(state):
                self.state = torch.load(state, weights_only=True, map_location="cpu")
                before, self.step = dict(self.state["settings"]), self.state["step"]
                if self.step not in range(before["steps"] + 1):
                    raise ValueError(f"step {self.step} of {before['steps']}")
            compare(self.settings, before, f"{self.out} holds a run with", f"{other}, or remove it")
        elif self.config.resume:
            raise InputError(f"--resume: there is no {state}; without --resume a new run begins")
        elif log.is_file() and log.stat().st_size:
            raise InputError(f"{self.out} has a log and no state.pt to continue from: {other}")

    def begin(self, model, optimizer, **about):
        """Restores the checkpoint to continue from, or writes the first one; prints `about`. Raises
        InputError where another run writes into OUT, and where processes have other weights."""
        self.model, self.optimizer = model, optimizer
        self.device = next(model.parameters()).device
        if self.state:
            with own_file(self.out / "state.pt"):
                model.load_state_dict(self.state["model"])
                optimizer.load_state_dict(self.state["optimizer"])
                if any(
                    p.shape != moments["exp_avg"].shape for p, moments in optimizer.state.items()
                ):
                    raise ValueError("the optimizer is of another model")
            self.state = None
            distributed.print_once(f"continuing {self.out} at step {self.step}")
        total = sum(p.detach().double().sum().item() for p in model.parameters())
        if len(set(distributed.gather_objects((self.step, total)))) > 1:
            raise InputError("the processes have different weights: give all one --init and --out")
        distributed.call_everywhere(lambda: self.rank == 0 and self.open(about))

    def open(self, about):
        """Locks OUT against another run, cuts off those lines of the log whose steps come again,
        prints what differs from the defaults, and writes run.json. The first checkpoint shows now
        that a disk is full, and not in an hour."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.log_file = open(self.out / "log.jsonl", "a+b", buffering=0)
        try:
            import fcntl

            fcntl.flock(self.log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.out}: another run is writing there") from None
        except (ImportError, OSError):  # Windows, and file systems without locks
            pass
        self.log_file.seek(0)
        whole = [line for line in self.log_file if line.endswith(b"\n")]  # a kill may cut the last
        with own_file(self.out / "log.jsonl"):
            kept = [line for line in whole if json.loads(line)["step"] <= self.step]
            if kept != whole[: len(kept)]:
                raise ValueError("its steps are not in order")
        self.log_file.truncate(sum(map(len, kept)))

        options, default = asdict(self.config), asdict(type(self.config)())
        shown = [f"{k}={v} ({self.origin[k]})" for k, v in options.items() if v != default[k]]
        print(f"{self.stage}: {', '.join(shown) or 'all options have their defaults'}")
        parameters = sum(p.numel() for p in self.model.parameters())
        about = {"parameters": f"{parameters:,}", "on": device_name(self.device), **about}
        print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
        run = {"stage": self.stage, "options": options, "origin": self.origin}
        write_json(self.out / "run.json", run | about | {"torch": torch.__version__})
        if self.step == 0:
            self.write(0)

    # --------------------------------------------------------------------------------------------
    # In the loop

    def steps(self, batch_of):
        """(step, batch_of(step)) for each step that is still to do. The next batch is made in a
        thread while this one is trained on. SIGTERM, the warning that preemptible machines get,
        Ctrl-C, and a terminal that closes let the step end, save and leave."""
        numbers = {signal.SIGTERM, signal.SIGINT}
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.add(signal.SIGHUP)  # not on Windows, nor under nohup
        handlers = {number: signal.signal(number, self.stop) for number in numbers}
        end = self.config.steps
        self.bar = tqdm(total=end, initial=self.step, mininterval=1, disable=self.rank > 0)
        try:
            with ThreadPoolExecutor(1) as thread:
                coming = thread.submit(batch_of, self.step)
                self.began = time.perf_counter()
                for step in range(self.step, end):
                    batch, done = coming.result(), step + 1
                    if done < end:
                        coming = thread.submit(batch_of, done)
                    if self.world == 1 or done % self.config.log_every == 0:  # all agree
                        self.stopping = distributed.sum_over_processes(len(self.signals)) > 0
                    due = done % self.config.save_every == 0 or done == end
                    self.checkpoint_due = due or self.stopping
                    yield step, batch
                    self.bar.update()
        finally:
            self.bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.rank == 0:
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
        return self.rank == 0 and every > 0 and (done % every == 0 or done == self.config.steps)

    def log(self, step, sample="", **values):
        """Writes a line of log.jsonl and shows it. sample: text to print above the progress bar.

        With a loss, which all processes must give, come tokens and tokens per second since the line
        before. Raises InputError if the loss is not finite, before a checkpoint is made of it."""
        record = {"step": step + 1}
        if "loss" in values:
            seconds = time.perf_counter() - self.began
            own = torch.tensor([self.tokens, self.flops], dtype=torch.float64)
            tokens, flops = distributed.sum_over_processes(own).tolist()
            record |= {"tokens": int(tokens), "tokens_per_second": tokens / seconds}
            if peak := peak_flops(self.device):
                record["share_of_peak"] = flops / seconds / (self.world * peak)
            self.tokens = self.flops = 0
        record |= {k: float(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        if not math.isfinite(record.get("loss", 0.0)):
            raise InputError(self.diverged(f"the loss is {record['loss']}", step))
        if self.rank == 0:
            self.log_file.write(json.dumps(record).encode() + b"\n")
            formats = {"loss": ".3f", "dev_accuracy": ".3f", "dev_ndcg": ".3f", "lr": ".1e"}
            formats |= {"tokens_per_second": ",.0f", "share_of_peak": ".0%"}
            shown = [f"{key} {record[key]:{formats[key]}}" for key in formats if key in record]
            if "loss" in values:
                self.bar.set_postfix_str(" ".join(shown), refresh=False)
            if sample:
                with contextlib.suppress(OSError):  # the terminal may have closed
                    self.bar.write(f"step {step + 1}: {' '.join(shown)}\n    {sample}")
        self.began = time.perf_counter()

    def diverged(self, what, step):
        before = f"{self.out} holds the checkpoint before"
        return f"{what} at step {step + 1}: --lr or the data may be at fault; {before}"

    def save(self, step):
        """Writes a checkpoint if one is due: by its own clock, at the end, and on a signal, after
        which the program leaves. Raises InputError if a weight is not finite: a finite loss may
        still have a gradient that is not."""
        if not self.checkpoint_due:
            return
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise InputError(self.diverged("weights are not finite", step))
        if self.rank == 0:
            self.write(step + 1)
        if self.stopping and step + 1 < self.config.steps:
            number = signal.Signals(self.signals[0] if self.signals else signal.SIGTERM)
            saved = f"{self.out} is saved at step {step + 1}; the same command continues"
            distributed.print_once(f"\nstopped by {number.name}: {saved}")
            sys.exit(128 + number)
        self.began = time.perf_counter()

    def write(self, step):
        log = self.out / "log.jsonl"
        if not (log.is_file() and os.path.samefile(log, self.log_file.fileno())):
            raise InputError(f"{self.out} was removed or replaced while this run was writing there")
        self.model.save_pretrained(self.out)
        state = {"step": step, "settings": self.settings}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        write_whole(self.out / "state.pt", lambda path: torch.save(state, path))


def compare(settings, other, whose, advice):
    """Raises InputError naming the first setting that differs."""
    for key, value in settings.items():
        if other.get(key) != value:
            key, values = key.replace("_", "-"), f"{other.get(key)}, not {value}"
            raise InputError(f"{whose} another --{key} ({values}): {advice}")


@contextlib.contextmanager
def own_file(path):
    """Any error while a file of this run is read, of whatever type, means that it is damaged."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"{path} is damaged ({reason}): remove its folder, or restore") from None


# ------------------------------------------------------------------------------------------------
# The optimizer


def adamw(model, lr, weight_decay, betas, eps):
    """AdamW, with weight decay on matrices and not on norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": norms}]
    return torch.optim.AdamW(groups, lr, betas, eps, weight_decay=0.0, fused=True)


def learning_rate(step, config):
    """Rises linearly for `warmup` steps. Then it falls: linearly, to 0 at the end, or with decay
    "sqrt" with the inverse square root of the step, as the paper's stage 2 (sec. 4.2.3; the later
    code has a cosine)."""
    warmup = max(1, config.warmup)
    if config.decay == "sqrt":
        left = (warmup / (step + 1)) ** 0.5
    else:
        left = (config.steps - step) / max(1, config.steps - warmup)
    return config.lr * min((step + 1) / warmup, left)


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
