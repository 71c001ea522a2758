"""The loop: packed rows of my chats into a model that talks like me.

    python train.py --lora                      one GPU (or a CPU, with a small base)
    torchrun --nproc_per_node 8 train.py        full fine-tuning, sharded over eight
    … the same command and --resume             go on after Ctrl-C, a lost machine, a full disk: what is lost is what no save holds

What the best evaluation saw is what `ckpt/` ends as; whatever came after it was overfitting.
"""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import config
import data
import generate
import lora
import plan as planning
import resume
import step
import tokenizer as tokenizers
from config import UserError, flag
from model import RECOMPUTE, ModelConfig, Transformer

EVALUATIONS = 4  # an epoch, at least
LITTLE = 20_000  # trained tokens, below which a word is said on what to expect
PACKAGES = ("torch", "tokenizers", "sentencepiece", "safetensors", "numpy")
ALL_LINEAR = ",".join(lora.TARGETS)
BIG = 1_000_000_000  # parameters: beyond it a CPU would need weeks
FREE = {  # flags that a resumed run may have changed; data is compared by itself
    "data", "out", "overwrite", "resume", "micro_batch", "recompute", "no_compile", "device", "samples", "patience",
    "keep", "save_every", "save_minutes", "max_minutes", "skip_nonfinite", "timeout",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tune a Mistral-style model on data/ (made by data.py): all its weights, or an adapter (--lora)."""

    lora: bool = flag(False, "train a low-rank adapter, the base stays as it is", group="what to train")
    qlora: bool = flag(False, "the same over a base kept in 4 bits (NF4): less than half the memory")
    model: str = flag(checkpoint.NO_ACCOUNT, "the base: a folder or a hub id")
    from_scratch: bool = flag(False, "random weights of --model's config.json, to pretrain a small base")
    init: str | None = flag(None, "begin with a former run, an adapter (its base and shape are taken) or a model")
    data: str = flag("data", "the folder that data.py wrote")
    loss_on: str = flag("me", "whose turns are targets", choices=("me", "everyone"))
    short_weight: float = flag(1.0, "how much my turns of one or two words count, 0 to 1")
    download_only: bool = flag(False, "fetch --model from the hub and stop (on a machine that has no GPU)")

    out: str = flag("ckpt", "the folder to write", group="the run")
    overwrite: bool = flag(False, "replace what --out holds")
    resume: bool = flag(False, "go on from the last save in --out; the other flags as before")
    keep: int = flag(2, "saves kept for --resume, and one more being written; 0: none")
    save_minutes: float = flag(10.0, "minutes from save to save")
    save_every: int | None = flag(None, "steps from save to save, in place of --save-minutes")
    max_minutes: float | None = flag(None, "save and end before so many minutes are over")
    timeout: float = flag(600.0, "seconds without progress, then a job of several ranks ends")
    skip_nonfinite: int = flag(0, "steps of no finite loss or gradient to leave out before it stops")
    samples: int = flag(3, "held-out contexts to answer at each evaluation")
    seed: int = flag(0, "order of the rows, first values of the adapter, samples")

    epochs: float = flag(3.0, "times over the data, at most (--patience ends sooner)", group="the steps")
    max_steps: int | None = flag(None, "exactly so many steps, in place of --epochs and --patience")
    patience: int = flag(3, "evaluations without a better one, then it stops")
    batch: int = flag(8, "rows a step, over all ranks; fewer where data is little")
    seq_len: int = flag(1024, "tokens a row")
    lr: float | None = flag(None, "peak learning rate", shown="2e-4 with --lora, else 2e-5")
    warmup: float = flag(0.03, "share of the steps in which the rate climbs")
    weight_decay: float = flag(0.0, "AdamW's")
    clip: float = flag(1.0, "largest norm of the gradient")

    lora_rank: int = flag(32, "its rank", group="the adapter")
    lora_alpha: float = flag(16.0, "it counts alpha / rank times")
    lora_dropout: float = flag(0.0, "share of its inputs dropped in training")
    lora_targets: str = flag(ALL_LINEAR, "layers that get it, as q_proj,v_proj", shown="all seven linear layers")

    micro_batch: str = flag("auto", "rows at a time on one rank", shown="auto, the fastest that fits", group="speed and memory")
    recompute: str = flag("auto", "redone in backward", choices=("auto", *RECOMPUTE), shown="auto, what fits")
    pure_bf16: bool = flag(False, "no fp32 masters in full fine-tuning: half the memory, rounded at random")
    no_compile: bool = flag(False, "on CUDA, don't compile the blocks: it starts at once")
    dtype: str = flag("auto", "what is computed in", choices=("auto", "bf16", "fp32"), shown="auto, bf16 if the CPU can")
    device: str | None = flag(None, "cuda, mps or cpu", shown="the first there is")


def main():
    began = time.monotonic()
    options = config.parse(Config)
    options = dataclasses.replace(options, lora=options.lora or options.qlora, micro_batch=rows_at_a_time(options.micro_batch))
    options = following(options)
    if options.download_only:
        print(f"{options.model} is in {checkpoint.resolve(options.model)}")
        return
    look_at_flags(options)
    ranks = step.start(options.device)
    if ranks.share(started_again(options.out)):
        options = dataclasses.replace(options, resume=True, overwrite=False)
    job = prepare(options, ranks)
    job.say(describe(job))
    job = fit(job)
    model, optimizer = load(job)
    record = Record(job, model)  # after the save was read: one that is refused has changed nothing
    limit = began + 60 * options.max_minutes if options.max_minutes is not None else None
    saving = record.done, options.keep, options.save_every, options.save_minutes, limit
    keeper = resume.Keeper(record.out / "resume", model, optimizer, ranks, *saving)
    keeper.check_room(sum(p.numel() * 4 for p in lora.trained(model).values()) if options.lora else 2 * job.shape.num_parameters)
    with keeper, resume.Watch(ranks, options.out, options.timeout) as watch:
        ends = run(Steps(job, model, optimizer, watch), record, keeper)
        keeper.finish()
    if model.compiled:
        job.say(f"{step.compiled_graphs()} graphs were compiled, the last in step {record.compiled_at}")
    if ranks.world > 1:
        torch.distributed.destroy_process_group()
    if not ends:
        job.say(record.finish())
        return
    record.leave(ends)
    if ends != "time":
        sys.exit(128 + ends)


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a run is made of before its weights load.

    `folder`: where the base lies. `save`: the one to go on from, and `note`, what it tells of the run; None. `rows`, `val_rows`: data.Row.
    `made_of`: what tells its data and its base from others. `ways`: how `step.build` makes the model. `prediction`: `fit`'s.
    """

    options: Config
    ranks: step.Ranks
    folder: Path
    shape: ModelConfig
    words: tokenizers.Tokenizer
    save: Path | None
    note: dict | None
    rows: list
    val_rows: list
    made_of: dict
    plan: "Plan"
    ways: dict
    prediction: dict = dataclasses.field(default_factory=dict)

    def say(self, text):
        if self.ranks.first:
            tqdm.write(text)


def load(job):
    """→ (the model, compiled where that pays, its optimizer): as the base, --init or the save has them"""
    options, ranks = job.options, job.ranks
    torch.manual_seed(options.seed + ranks.rank % ranks.shards)  # dropout; and rounding, which must be the same in all copies of a shard
    filled = job.save and not options.lora  # by the save: every weight is in it
    folder = None if options.from_scratch or filled else job.folder
    model = step.build(job.shape, ranks, folder, seed=None if filled else options.seed, **job.ways)
    if options.init and options.lora and not job.save:
        lora.load(model, options.init, checkpoint.write)
    if ranks.device.type == "cuda" and not options.no_compile:
        model.compile_blocks()
    optimizer = step.make_optimizer(model, 0.0, options.weight_decay, options.pure_bf16)
    if job.save:
        resume.restore(model, optimizer, job.save, ranks)
    return model, optimizer


def run(steps, record, keeper):
    """Step after step to the end of the plan, or of what is gained. → None, or why it ended before, as `Keeper.between` says"""
    job, options, plan, begin = steps.job, steps.job.options, steps.job.plan, record.done
    if job.save:
        job.say(f"going on after step {begin}, from {job.save}")
    asked = contexts(options)
    steps.probe()
    keeper.listen()
    if not job.save:
        before = record.evaluation(0, steps.evaluate())
        job.say(f"before training: held-out loss {before.loss:.4f} nats a target, {before.bits:.4f} bits per character of mine")
    with tqdm(total=plan.steps, initial=begin, unit="step", disable=not job.ranks.first, dynamic_ncols=True) as bar:
        for number, rows in enumerate(batches(job.rows, plan, options.seed, begin), begin + 1):
            if ends := keeper.between(record.done, record.state):
                return ends
            try:
                line = steps.take(number, rows)
                bar.set_postfix_str(POSTFIX.format(**line))
            except step.NotFinite as error:
                line = {"step": number, "skipped": str(error), "lines": sorted({int(s) + 1 for row in rows for s in row.sessions})}
                if record.skipped >= options.skip_nonfinite:
                    keeper.save(record.done, record.state)
                    raise record.unfit(line) from None
                job.say("step {step} is left out: {skipped}, on lines {lines} of train.jsonl".format(**line))
            record.write(line)
            bar.update()
            if number in plan.evaluate_at:
                point = record.evaluation(number, steps.evaluate())
                job.say(f"epoch {point.epoch:.2f}: {record.compare(point)}")
                for who, said, wrote, answer in answers(steps.model, job.words, asked, job.ranks, options.seed):
                    job.say(f"    {who}: {said}\n      you wrote: {wrote}\n      it writes: {answer}")
                if record.best is point:
                    record.save()
                elif options.max_steps is None and record.since_best >= options.patience:
                    return None
    return None


class Steps:
    """The steps and evaluations of a job, `size` rows at a time on each rank: of fewer from when there is no room for so many."""

    def __init__(self, job, model, optimizer, watch):
        self.job, self.model, self.optimizer, self.watch, self.size = job, model, optimizer, watch, job.options.micro_batch
        self.peak = job.ranks.world * step.measured_peak(job.ranks.device, job.ways["dtype"])  # FLOP/s of all ranks together

    def probe(self):
        """Find the `size` that there is room for, on the longest rows."""
        job, ranks, length = self.job, self.job.ranks, self.job.options.seq_len
        if job.options.resume:  # an earlier start may have found out
            known = config.read_json(Path(job.options.out) / "micro-batch.json", {}).get("micro_batch", self.size)
            self.size = min(self.size, ranks.share(known))
        while ranks.device.type == "cuda" or ranks.device.type == "cpu" and ranks.world == 1:
            try:
                if ranks.device.type == "cpu":
                    return self.time_micro_batch()
                return step.probe(self.model, job.rows, self.size, ranks, length, job.plan.batch > self.size * ranks.world)
            except step.NoRoom:
                self.fewer()

    def time_micro_batch(self):
        """Predict the run from two micro-batches, of which the second is timed: the first one makes most kernels. NoRoom"""
        job, plan = self.job, self.job.plan
        for rows in itertools.islice(batches(job.rows, plan, job.options.seed), 2):
            rows, began = rows[: self.size], time.perf_counter()
            step.probe(self.model, rows, self.size, job.ranks, job.options.seq_len, False)
            seconds = time.perf_counter() - began
        speed = sum(len(row.ids) for row in rows) / seconds
        left = plan.steps - (job.note["step"] if job.note else 0)
        hours = left * sum(len(row.ids) for row in job.rows) / plan.epoch / speed / 3600
        gib = step.peak_gib(job.ranks.device)
        if job.options.keep:
            states = self.optimizer.state.values()
            gib += planning.SAVED * sum(tensor.nbytes for state in states for tensor in state.values()) / 2**30
        job.prediction.update(tok_per_s=speed, gib=gib)
        long = f"{config.counted(left, 'steps')} in about {planning.clock(hours)}"
        job.say(f"timed: {speed:,.0f} tok/s, {long}; {gib:.2f} GiB, saves included")

    def take(self, number, rows):
        """Step `number`. → its line of metrics.jsonl; NotFinite"""
        job, ranks, options = self.job, self.job.ranks, self.job.options
        self.watch.step, began, lr = number, time.perf_counter(), lr_at(number, job.plan.steps, job.plan.lr, options.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        while True:
            try:
                parts = step.micro_batches(rows, self.size, ranks, options.seq_len)
                loss, norm, targets = step.train_step(self.model, self.optimizer, parts, ranks, options.clip)
                break
            except step.NoRoom:
                self.fewer()
        seconds, tokens, (needed, done) = time.perf_counter() - began, sum(len(row.ids) for row in rows), step.flops(self.model, rows)
        return {
            "step": number,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "trained_tokens": targets,
            "tok_per_s": tokens / seconds,
            "mfu": needed / seconds / self.peak,
            "hfu": done / seconds / self.peak,
            "peak_gib": step.peak_gib(ranks.device),
            "seconds": seconds,
        }

    def evaluate(self):
        return step.evaluate(self.model, self.job.val_rows, self.job.ranks, self.size, self.job.options.seq_len)

    def fewer(self):
        """Half as many rows at a time. Several ranks can't go on once one of them failed: they end, with word of what to try."""
        device, length = self.job.ranks.device.type, self.job.options.seq_len
        if self.job.ranks.world > 1:
            self.watch.no_room(self.size, length)
        if self.size == 1:
            raise UserError(
                f"The {'GPU' if device == 'cuda' else device} has no room for one row of {length} tokens",
                "Take --recompute full, --qlora, or a shorter --seq-len.",
            )
        self.job.say(f"no room for {self.size} rows at a time: {self.size // 2} from here on, twice as often (the result is the same)")
        self.size //= 2


# --- before the weights load


def rows_at_a_time(text):
    """--micro-batch → an int, or None for auto."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--micro-batch {text}: a number of rows, or auto, is needed", "Leave --micro-batch out for the default.") from None


def following(options):
    """--init → the flags that it stands for: the adapter's base and shape, or the model as the base."""
    folder = options.init
    if not folder:
        return options
    if checkpoint.is_adapter(folder):
        settings, base = lora.read_settings(folder)
        targets = ",".join(target for target in lora.TARGETS if target in settings["targets"])
        shape = {"lora_rank": settings["rank"], "lora_alpha": settings["alpha"], "lora_targets": targets}
        base = base if options.model == checkpoint.NO_ACCOUNT and base else options.model
        return dataclasses.replace(options, lora=True, model=base, **shape)
    if not checkpoint.is_model(folder):
        raise UserError(f"--init {folder} holds no model", "Give the folder that train.py wrote.")
    if options.lora:
        raise UserError(f"--init {folder} is a whole model, --lora trains an adapter", f"An adapter over it: --lora --model {folder}")
    return dataclasses.replace(options, model=folder)


def look_at_flags(options):
    """UserError for what can't be, or not together."""
    for part in ("train", "val"):
        if not (Path(options.data) / f"{part}.jsonl").is_file():
            raise UserError(
                f"{options.data}/{part}.jsonl is missing: there is nothing to train on",
                "Make it from your export: python data.py result.json",
            )
    least = {"batch": 1, "micro_batch": 1, "lora_rank": 1, "patience": 1, "max_steps": 1, "seq_len": 16, "samples": 0}
    least |= {"seed": 0, "keep": 0, "save_every": 1, "skip_nonfinite": 0}
    planning.check_flags(options, least, ("lr", "epochs", "clip", "save_minutes", "max_minutes", "timeout"))
    if not 0 <= options.lora_dropout < 1:
        raise UserError(f"--lora-dropout {options.lora_dropout} is no share", "0 drops nothing, 0.1 every tenth input.")
    if not 0 <= options.warmup <= 1:
        raise UserError(f"--warmup {options.warmup} is no share", "0.03 lets the rate climb for three steps of a hundred.")
    if not 0 <= options.short_weight <= 1:
        raise UserError(f"--short-weight {options.short_weight} is no share", "1 counts short turns as the others, 0 not at all.")
    if options.short_weight < 1 and options.loss_on == "everyone":
        raise UserError("--short-weight counts my short turns, --loss-on everyone takes all as they are", "Leave one of them out.")
    if options.pure_bf16 and options.dtype == "fp32":
        raise UserError("--pure-bf16 computes in bf16, --dtype fp32 does not", "Leave one of them out.")
    if options.from_scratch and options.lora:
        raise UserError("--from-scratch trains all weights, --lora none of the base's", "Leave one of them out.")
    if options.resume and options.overwrite:
        raise UserError("--resume goes on with what --out holds, --overwrite replaces it", "Leave one of them out.")
    config.keep_apart(options.out, options.model, options.data, options.init)


def prepare(options, ranks):
    """What else a person may have to mend is found here, before time is spent. → Job"""
    in_turn(ranks, lambda: look_at_out(options, ranks))
    save = last_save(options, ranks)
    folder, base, shape, words = base_of(options, ranks)
    if options.init and options.lora and not save:
        known = config.read_json(Path(options.init) / "run.json", {}).get("fingerprint", base)
        if known != base or lora.read_settings(options.init)[0]["rows"] != words.added:
            raise UserError(f"--init {options.init} was trained over another base than {folder}", "Say where its base lies: --model FOLDER")
    rows, val_rows = in_turn(ranks, lambda: [rows_of(options, part, words) for part in ("train", "val")])
    made_of = {"data": digest(rows), "fingerprint": base}
    note = noted(save, options, ranks, made_of) if save else None
    if note and options.micro_batch is None and note["world"] == ranks.world:
        options = dataclasses.replace(options, micro_batch=note["config"]["micro_batch"])  # as it was: sums in the same order
    dtypes = {"auto": checkpoint.compute_dtype(ranks.device), "bf16": torch.bfloat16, "fp32": torch.float32}
    dtype = dtypes["bf16" if options.pure_bf16 else options.dtype]
    ways = {"adapter": adapter(options, words), "dtype": dtype, "nf4": options.qlora, "pure": options.pure_bf16}
    return Job(options, ranks, folder, shape, words, save, note, rows, val_rows, made_of, schedule(len(rows), options), ways)


def base_of(options, ranks):
    """→ (the base's folder, its weights' fingerprint or None for --from-scratch, ModelConfig with our rows, Tokenizer)"""
    local = Path(options.model).is_dir()
    if not local:
        checkpoint.hub_id(options.model)  # or it is a mistyped folder, and says so
    if ranks.device.type == "cpu" and not options.device and (not local or checkpoint.read_config(options.model).num_parameters > BIG):
        raise UserError(
            f"No GPU here: on a CPU {options.model} would train for weeks.",
            "Rent one with a GPU (24 GB is enough for --lora), take a small base with --model FOLDER, or insist with --device cpu.",
        )
    folder = in_turn(ranks, lambda: checkpoint.resolve(options.model))
    checkpoint.check_base(folder)
    words = tokenizers.load(folder)
    shape = checkpoint.fitted(folder, words)
    planning.check(options, shape)
    with torch.device("meta"):
        outline = Transformer(shape)
    return folder, None if options.from_scratch else checkpoint.fingerprint(checkpoint.find(outline, folder)), shape, words


def started_again(out):
    """Whether this is torchrun's next try of the run in `out`. A start that failed before it had a folder is none of it."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and config.read_json(Path(out) / "run.json", {}).get("launcher") == os.getppid()


def last_save(options, ranks):
    """The save to go on from, None to start at the beginning. A finished run is said to be one, and ends the program."""
    if not options.resume:
        return None
    out = Path(options.out)
    run = config.read_json(out / "run.json", {})
    if ranks.share("result" in run):
        if ranks.first:
            same_flags(options, run["config"])
            print(f"{out} is finished: nothing is left to do. Talk to it: python chat.py {out}")
        sys.exit()
    kept = resume.saves(out / "resume")
    newest = -ranks.most(-resume.step_of(kept[-1]) if kept else 1)  # hosts with disks of their own may differ by one save
    if newest >= 0:
        return out / "resume" / f"step-{newest:08}"
    if ranks.most(len(kept)):
        raise UserError(f"{out}/resume holds saves on some hosts only", "Copy it to the others. Or begin anew, and lose it: --overwrite")
    if ranks.first:
        print(f"--resume: nothing is saved in {out} yet, so this starts at the beginning")
    return None


def look_at_out(options, ranks):
    """UserError when --out holds work of which nothing was said."""
    out = Path(options.out)
    run, kept = config.read_json(out / "run.json", {}), resume.saves(out / "resume")
    if kept and "result" not in run and not (options.resume or options.overwrite):
        raise UserError(
            f"{out} holds a run that was saved at step {resume.step_of(kept[-1])}",
            "Go on with it: the same command and --resume. Or begin anew, and lose it: --overwrite",
        )
    config.check_folder(out, options.overwrite or options.resume and "config" in run or not ranks.first)


def same_flags(options, before):
    """UserError when one is another than it was `before` {name: value}, and makes it another run."""
    for name, value in dataclasses.asdict(options).items():
        if name not in FREE and before.get(name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} is {value} now, and was {before.get(name)} when the run in {options.out} began",
                "Give the same flags as then, or begin anew with --overwrite.",
            )


def noted(save, options, ranks, made_of):
    """What the save tells of the run. UserError when this is another run."""
    note = resume.note_of(save, ranks.rank)
    same_flags(options, note["config"])
    if options.lora and note["fingerprint"] != made_of["fingerprint"]:
        raise UserError(
            f"{options.model} holds other weights than when the run in {options.out} began",
            "Bring the old ones back, or begin anew with --overwrite.",
        )
    if note["data"] != made_of["data"]:
        raise UserError(
            f"{options.data} isn't what the run in {options.out} was trained on",
            "Bring the old files back, or begin anew with --overwrite.",
        )
    return note


def digest(rows):
    """What tells these rows from others."""
    total = hashlib.blake2b(digest_size=16)
    for row in rows:
        total.update(row.ids.tobytes() + row.labels.tobytes() + row.doc_lengths.tobytes())
    return total.hexdigest()


def rows_of(options, part, words):
    """The packed rows of train or val; what is held out is always measured on my turns."""
    taught = (options.loss_on, options.short_weight) if part == "train" else ()
    rows = data.rows(Path(options.data) / f"{part}.jsonl", words, options.seq_len, *taught)
    if not rows:
        raise UserError(
            f"{options.data}/{part}.jsonl has no turn of mine in it",
            "Make it anew with data.py, or move lines between train.jsonl and val.jsonl.",
        )
    return rows


def adapter(options, words):
    """The arguments of `lora.inject`, None for full fine-tuning."""
    if not options.lora:
        return None
    targets = [target.strip() for target in options.lora_targets.split(",") if target.strip()]
    sizes = {"rank": options.lora_rank, "alpha": options.lora_alpha, "dropout": options.lora_dropout}
    return {**sizes, "targets": targets, "rows": words.added}


def fit(job):
    """Rows at a time and what is recomputed: as asked, else what is the fastest of what fits, by prediction. → Job with them"""
    options, ranks, ways, plan = job.options, job.ranks, job.ways, job.plan
    prediction, cuda = {}, ranks.device.type == "cuda"
    least = RECOMPUTE if cuda else ("full",) if job.shape.num_parameters > BIG else ("none",)
    kinds = least if options.recompute == "auto" else (options.recompute,)
    size, way = options.micro_batch or min(2, math.ceil(plan.batch / ranks.world)), RECOMPUTE.index(kinds[-1])
    if ranks.first and (cuda or ranks.world == 1):  # several ranks on a CPU are somebody's test: nothing to predict for
        tokens, labelled, _ = step.sizes(job.rows)
        work = planning.Work(
            job.shape,
            ways,
            math.ceil(plan.batch / ranks.world),
            options.seq_len,
            ranks.shards,
            labelled / tokens,
            tokens / sum(len(row.doc_lengths) for row in job.rows),
            cuda and not options.no_compile,
            ranks.device.type == "cpu",
            data.filled(job.rows, options.seq_len),
        )
        card, free = planning.here(ranks.device, ways["dtype"])
        sizes = [options.micro_batch] if options.micro_batch else None if cuda else [1, 2][: work.rows]
        if ranks.world == 1:
            choice = planning.choose(work, card, free, sizes, kinds)
        else:  # predicting for several ranks takes process groups of its own
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                choice = pool.submit(planning.choose, work, card, free, sizes, kinds).result()
        size, way = choice.rows, RECOMPUTE.index(choice.way)
        needs = work.takes(choice.needs)
        prediction = {"gib": needs / 2**30}
        text = (
            f"{config.counted(size, 'rows at a time')}, recompute {choice.way}: {needs / 2**30:.2f} GiB predicted, "
            f"{'of' if choice.fits else 'MORE than'} {free / 2**30:.1f} to use"
        )
        if not work.cpu:  # a CPU is timed, by Steps.probe
            prediction["tok_per_s"] = plan.batch * options.seq_len * work.filled / choice.seconds
            text += f"; {prediction['tok_per_s']:,.0f} tok/s"
        job.say(text)
    options = dataclasses.replace(options, micro_batch=ranks.share(size))
    return dataclasses.replace(job, options=options, ways={**ways, "recompute": RECOMPUTE[ranks.share(way)]}, prediction=prediction)


def in_turn(ranks, work):
    """`work()` on rank 0 first (it may download, write a cache), then on the others. Rank 0's UserError ends them all."""
    result = problem = None
    if ranks.first:
        try:
            result = work()
        except UserError as error:
            problem = error
    if ranks.share(problem is not None):
        if problem:
            raise problem
        sys.exit(2)
    return result if ranks.first else work()


@dataclasses.dataclass(frozen=True)
class Plan:
    """`epoch`: steps in one. `lr`: its peak."""

    batch: int
    epoch: int
    steps: int
    lr: float
    evaluate_at: frozenset


def schedule(rows, options):
    """How many steps of how many rows: at least 50, with smaller steps and more epochs where the data is too little for them."""
    batch, epoch, steps = planning.schedule(rows, options.batch, options.epochs)
    if options.max_steps is not None:
        batch, epoch, steps = options.batch, math.ceil(rows / options.batch), options.max_steps
    every = max(1, epoch // EVALUATIONS)
    lr = options.lr or (2e-4 if options.lora else 2e-5)
    return Plan(batch, epoch, steps, lr, frozenset({*range(every, steps + 1, every), steps}))


def describe(job):
    options, plan, ranks = job.options, job.plan, job.ranks
    targets = sum(int((row.labels != data.IGNORED).sum()) for row in job.rows)
    kind = "QLoRA" if options.qlora else "LoRA" if options.lora else "full fine-tuning"
    text = (
        f"{kind} of {options.model} ({job.shape.num_parameters / 1e6:,.1f}M parameters) "
        f"on {ranks.world} x {ranks.device.type}, {short(job.ways['dtype'])}\n"
        f"{config.counted(len(job.rows), 'rows')} of {options.seq_len:,} tokens, {data.filled(job.rows, options.seq_len):.1%} filled, "
        f"{targets:,} of the tokens trained; {config.counted(len(job.val_rows), 'rows')} held out\n"
        f"{config.counted(plan.steps, 'steps')} of {config.counted(plan.batch, 'rows')}, {plan.steps / plan.epoch:.1f} epochs"
    )
    if plan.batch < options.batch or targets < LITTLE:
        text += f"\nThis is little data ({targets:,} tokens of mine): expect the tone and the favourite words rather than the knowledge."
    return text


def short(dtype):
    return str(dtype).removeprefix("torch.")


def batches(rows, plan, seed, first=0):
    """Yield `plan.steps` lists of rows but the `first`: every row once an epoch, each epoch in an order of its own."""
    done, epoch = 0, 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        for begin in range(0, len(rows), plan.batch):
            if done == plan.steps:
                return
            if done >= first:
                yield [rows[i] for i in order[begin : begin + plan.batch]]
            done += 1
        epoch += 1


def lr_at(number, steps, peak, warmup):
    """Linear warm-up to `peak`, then half a cosine down to a tenth of it; `number` counts from 1."""
    climb = max(1, round(warmup * steps))
    if number <= climb:
        return peak * number / climb
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (number - climb) / max(1, steps - climb))))


# --- what one watches

POSTFIX = "loss {loss:.3f}, lr {lr:.1e}, norm {grad_norm:.2f}, {tok_per_s:,.0f} tok/s, mfu {mfu:.0%}, {peak_gib:.1f} GiB"


def contexts(options):
    """A few held-out moments, spread over time: (the turns before, what I wrote then)."""
    found = []
    for talk in data.load_sessions(Path(options.data) / "val.jsonl"):
        for mine in data.replies(talk)[:1]:
            found.append((talk.turns[:mine], talk.turns[mine]))
    return [found[i] for i in np.linspace(0, len(found) - 1, min(options.samples, len(found)), dtype=int)]


def answers(model, words, asked, ranks, seed):
    """Yield (who, what they last wrote, what I wrote, what the model writes) for each context; every rank must ask."""
    model.eval()
    decoder = generate.Decoder(model, words, size=min(512, model.config.max_position_embeddings), share=ranks.share)
    generator = torch.Generator().manual_seed(seed)
    for before, turn in asked:
        ids = generate.fit(before, turn.author, words, decoder.cache.size - 64)
        longest = 64 if ranks.world == 1 else 24  # sharded, every token gathers the whole model
        wrote = data.messages_of(words.decode(list(decoder.generate(ids, longest, generator=generator))))
        yield before[-1].author, before[-1].messages[-1], " / ".join(turn.messages), " / ".join(wrote) or "(nothing)"
    model.train()


# --- what stays


@dataclasses.dataclass(frozen=True)
class Point:
    """An evaluation: nats a target and bits per character of mine."""

    step: int
    epoch: float
    loss: float
    bits: float


class Record:
    """The run's folder: metrics line by line, the best weights, `run.json`. Rank 0 writes; all know `done`, `before` and `best`."""

    def __init__(self, job, model):
        self.job, self.model, self.out = job, model, Path(job.options.out)
        self.prediction, self.speeds, self.peak = job.prediction, [], 0.0
        self.began, self.before, self.best, self.last = time.time(), None, None, None
        self.done = self.since_best = self.graphs = self.compiled_at = self.skipped = 0
        options, ranks, note = job.options, job.ranks, job.note
        if note:
            points = {name: Point(*note[name]) for name in ("before", "best", "last") if note[name]}
            self.before, self.last = points["before"], points["last"]
            self.best = self.last if note["best"] == note["last"] else points.get("best")
            self.since_best, self.skipped, self.began = note["since_best"], note["skipped"], self.began - note["seconds"]
            self.done = note["step"]
        if not ranks.first:
            return
        config.private_folder(self.out)
        if note:
            self.cut_back()
        else:
            checkpoint.clear(self.out)
        if options.overwrite:  # not when torchrun starts us again, for whom it is
            (self.out / "micro-batch.json").unlink(missing_ok=True)
        for name in ("persona.json", "facts.md"):
            if (Path(options.data) / name).exists():
                (self.out / name).write_bytes((Path(options.data) / name).read_bytes())
        job.words.save(self.out)  # its chat template has the names of persona.json
        self.run = config.read_json(self.out / "run.json", {}) if note else {}
        resumed = self.run.get("resumed", []) + ([self.done] if note else [])
        self.run = {
            "config": dataclasses.asdict(options),
            "plan": {**dataclasses.asdict(job.plan), "evaluate_at": sorted(job.plan.evaluate_at), "recompute": model.recompute},
            "base": str(job.folder),
            "trained_until": max(talk.start for talk in data.load_sessions(Path(options.data) / "train.jsonl")),
            "fingerprint": job.made_of["fingerprint"],
            "commit": commit(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{ranks.device.type} ({platform.machine()})",
            "world": ranks.world,
            "launcher": os.getppid(),
            "compiled": model.compiled,
            "prediction": self.prediction,
            "dtype": short(job.ways["dtype"]),
            **({"resumed": resumed} if resumed else {}),
        }
        config.write_json(self.out / "run.json", self.run)

    def cut_back(self):
        """Forget what metrics.jsonl says of steps after the last that is done, and half a line."""
        lines = [line for line in config.read_metrics(self.out) if line["step"] <= self.done]
        config.write_text(self.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    def state(self):
        """The run so far, for a save."""
        points = {name: point and dataclasses.astuple(point) for name, point in vars(self).items() if name in ("before", "best", "last")}
        counts = {"since_best": self.since_best, "skipped": self.skipped, "seconds": time.time() - self.began}
        return {**points, **counts, "config": dataclasses.asdict(self.job.options), **self.job.made_of}

    def write(self, line):
        """A step is done: its line of metrics.jsonl, and what is counted of it."""
        self.done = line["step"]
        self.skipped += "skipped" in line
        if self.model.compiled and self.graphs != step.compiled_graphs():
            self.graphs, self.compiled_at = step.compiled_graphs(), self.done
        if "tok_per_s" in line:
            self.speeds.append(line["tok_per_s"])
            self.peak = max(self.peak, line["peak_gib"])
        self.append(line)

    def append(self, line):
        if not self.job.ranks.first:
            return
        path = self.out / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise config.unwritten(path, error, f"{self.kept()}. Make room. {resume.AGAIN}") from None

    def evaluation(self, number, found):
        """Note an Evaluation after step `number`; the one at step 0 is what the others are compared with, never the best. → Point"""
        if not math.isfinite(found.nats):
            raise UserError(
                f"after step {number} the held-out loss is {found.nats}; {self.kept()}",
                "Try a smaller --lr." if number else "Is the base whole? Try --dtype fp32.",
            )
        epoch = number / self.job.plan.epoch
        self.append({"step": number, "epoch": epoch, **found.metrics})
        point = Point(number, epoch, found.metrics["val_loss"], found.metrics["val_bits_per_char"])
        if number == 0:
            self.before = point
        elif self.best is None or point.loss < self.best.loss:
            self.best, self.since_best = point, 0
        else:
            self.since_best += 1
        self.last = point
        return point

    def compare(self, point):
        """A Point in words, beside the best if it isn't that."""
        text = f"held-out loss {point.loss:.4f}, {point.bits:.4f} bits per character"
        return text if point is self.best else f"{text} (the best was {self.best.loss:.4f})"

    def save(self):
        """Make the folder what the model is now; every rank must call."""
        job = self.job
        if job.ranks.world > 1:
            self.model.reshard()  # since the last forward pass FSDP2 shows the root's parameters gathered, and cast
        if not job.options.lora:
            checkpoint.save_model(self.model, self.out, job.words)
            return
        tensors = {name: checkpoint.full(p.detach()) for name, p in lora.trained(self.model).items()}
        if job.ranks.first:
            base = job.folder.resolve() if Path(job.options.model).is_dir() else job.options.model
            lora.save(self.model, self.out, base, tensors)

    def kept(self):
        return f"{self.out} holds the model at its best" if self.best else f"{self.out} holds no model yet"

    def unfit(self, line):
        """A step whose numbers are none → UserError"""
        return UserError(
            f"step {line['step']}: {line['skipped']}, on lines {line['lines']} of train.jsonl; {self.kept()}",
            "Try a smaller --lr; or mend those lines; or leave such steps out: --resume --skip-nonfinite 3",
        )

    def leave(self, ends):
        """Say why the run ends before its plan does, and how to go on."""
        options = self.job.options
        if not self.job.ranks.first:
            return
        why = {"time": f"--max-minutes {options.max_minutes:g}" if options.max_minutes else "", signal.SIGINT: "Ctrl-C"}
        saved = f"saved in {self.out}. {resume.AGAIN}" if options.keep else "not saved (--keep 0)."
        stopped = f"stopped after step {self.done}, {saved}" if self.done else f"stopped before the first step. {resume.AGAIN}"
        print(f"{why.get(ends, 'SIGTERM')}: {stopped}", file=sys.stderr)

    def finish(self):
        """Write what came of the run. → the same in words"""
        before, best, last = self.before, self.best, self.last
        if self.job.ranks.first:
            result = {
                "loss_before": before.loss,
                "loss": best.loss,
                "bits_before": before.bits,
                "bits": best.bits,
                "epoch": best.epoch,
                "steps": last.step,
                "seconds": round(time.time() - self.began, 1),
            }
            if self.speeds and self.prediction:
                usual = float(np.median(self.speeds[2:] or self.speeds))  # the first ones compile
                self.prediction |= {"measured_gib": self.peak, "measured_tok_per_s": usual}
            config.write_json(self.out / "run.json", self.run | {"prediction": self.prediction, "result": result})
            draw(self.out)
        text = f"best at epoch {best.epoch:.1f}: {before.loss:.2f} → {best.loss:.2f} nats a target"
        text += f", {before.bits:.3f} → {best.bits:.3f} bits per character"
        if last is not best:
            text += "; later steps overfit and were discarded"
        if "measured_gib" in self.prediction:
            text += compare_prediction(self.prediction)
        if best.loss >= before.loss:
            text += "\nNothing was gained on held-out text: the base knew as much. More data, or a smaller --lr, may help."
        return f"{text}\nTalk to it: python chat.py {self.out}"


def compare_prediction(prediction):
    """What was predicted and measured, and why they may differ where they do by much. → lines"""
    text = "\npredicted {gib:.2f} GiB and {tok_per_s:,.0f} tok/s, measured {measured_gib:.2f} and {measured_tok_per_s:,.0f}"
    text = text.format(**prediction)
    faster = prediction["measured_tok_per_s"] / prediction["tok_per_s"]
    larger = prediction["measured_gib"] / prediction["gib"]
    if not 1 / 1.15 < faster < 1.15:
        text += f"\nSpeed differs by {faster - 1:+.0%}: perhaps other programs ran, or the machine slowed down."
    if not 1 / 1.1 < larger < 1.1:
        less = "room for saving a checkpoint was counted and not needed"
        reason = "libraries kept more than is counted for them" if larger > 1 else less
        text += f"\nMemory differs by {larger - 1:+.0%}: perhaps {reason}."
    return text


def draw(folder):
    """`loss.png`, where matplotlib is installed: the training and held-out loss of `metrics.jsonl`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = config.read_metrics(folder)
    trained, held_out = ([line for line in lines if key in line] for key in ("loss", "val_loss"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([x["step"] for x in trained], [x["loss"] for x in trained], color="0.7", label="training, a step")
    axes.plot([x["step"] for x in held_out], [x["val_loss"] for x in held_out], "o-", color="tab:green", label="held out")
    axes.set(xlabel="step", ylabel="loss, nats a target")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(folder) / "loss.png", dpi=120)


def commit():
    """The code's git commit, None outside a checkout."""
    here = Path(__file__).parent
    try:
        return subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    config.run(main)
