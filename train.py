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
import math
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cli
import data
import lora
from cli import UserError, flag
from inference import generate
from model import AC_MODES, ModelConfig, Transformer
from training import checkpoint, cost, distributed, metrics, optim, step
from training.run_dir import RunDir, dtype_name
from training.watchdog import Watchdog
from weights import devices, hf, hub, shards
from weights.load import fingerprint, index_tensors
from weights.tokenizer import Tokenizer, load_tokenizer

EVALUATIONS_PER_EPOCH = 4  # an epoch, at least
MIN_TARGET_TOKENS = 20_000  # trained tokens, below which a word is said on what to expect
ALL_LINEAR = ",".join(lora.TARGETS)
MAX_CPU_PARAMETERS = 1_000_000_000  # parameters: beyond it a CPU would need weeks
RESUMABLE_FLAGS = {  # flags that a resumed run may have changed; data is compared by itself
    "data", "out", "overwrite", "resume", "micro_batch", "recompute", "no_compile", "device", "samples", "patience",
    "keep", "save_every", "save_minutes", "max_minutes", "skip_nonfinite", "timeout",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune a Mistral-style model on data/ (made by data.py): all its weights, or an adapter (--lora)."""

    lora: bool = flag(
        False, "train a low-rank adapter, the base stays as it is", group="what to train"
    )
    qlora: bool = flag(
        False, "the same over a base kept in 4 bits (NF4): less than half the memory"
    )
    model: str = flag(hub.DEFAULT_BASE, "the base: a folder or a hub id")
    from_scratch: bool = flag(
        False, "random weights of --model's config.json, to pretrain a small base"
    )
    init: str | None = flag(
        None, "begin with a former run, an adapter (its base and shape are taken) or a model"
    )
    data: str = flag("data", "the folder that data.py wrote")
    loss_on: str = flag("me", "whose turns are targets", choices=("me", "everyone"))
    short_weight: float = flag(1.0, "how much my turns of one or two words count, 0 to 1")
    download_only: bool = flag(
        False, "fetch --model from the hub and stop (on a machine that has no GPU)"
    )

    out: str = flag("ckpt", "the folder to write", group="the run")
    overwrite: bool = flag(False, "replace what --out holds")
    resume: bool = flag(False, "go on from the last save in --out; the other flags as before")
    keep: int = flag(2, "saves kept for --resume, and one more being written; 0: none")
    save_minutes: float = flag(10.0, "minutes from save to save")
    save_every: int | None = flag(None, "steps from save to save, in place of --save-minutes")
    max_minutes: float | None = flag(None, "save and end before so many minutes are over")
    timeout: float = flag(600.0, "seconds without progress, then a job of several ranks ends")
    skip_nonfinite: int = flag(
        0, "steps of no finite loss or gradient to leave out before it stops"
    )
    samples: int = flag(3, "held-out contexts to answer at each evaluation")
    seed: int = flag(0, "order of the rows, first values of the adapter, samples")

    epochs: float = flag(
        3.0, "times over the data, at most (--patience ends sooner)", group="the steps"
    )
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
    lora_targets: str = flag(
        ALL_LINEAR, "layers that get it, as q_proj,v_proj", shown="all seven linear layers"
    )

    micro_batch: str = flag(
        "auto",
        "rows at a time on one rank",
        shown="auto, the fastest that fits",
        group="speed and memory",
    )
    recompute: str = flag(
        "auto", "redone in backward", choices=("auto", *AC_MODES), shown="auto, what fits"
    )
    pure_bf16: bool = flag(
        False, "no fp32 masters in full fine-tuning: half the memory, rounded at random"
    )
    no_compile: bool = flag(False, "on CUDA, don't compile the blocks: it starts at once")
    dtype: str = flag(
        "auto",
        "what is computed in",
        choices=("auto", "bf16", "fp32"),
        shown="auto, bf16 if the CPU can",
    )
    device: str | None = flag(None, "cuda, mps or cpu", shown="the first there is")


def main():
    began = time.monotonic()
    options = cli.parse(Options)
    options = dataclasses.replace(
        options,
        lora=options.lora or options.qlora,
        micro_batch=parse_micro_batch(options.micro_batch),
    )
    options = resolve_init(options)
    if options.download_only:
        print(f"{options.model} is in {hub.resolve(options.model)}")
        return
    validate(options)
    ranks = distributed.init_distributed(options.device)
    if ranks.broadcast(is_elastic_restart(options.out)):
        options = dataclasses.replace(options, resume=True, overwrite=False)
    job = prepare(options, ranks)
    job.say(describe(job))
    job = choose_micro_batch(job)
    model, optimizer = load_model(job)
    record = RunDir(job, model)  # after the save was read: one that is refused has changed nothing
    limit = began + 60 * options.max_minutes if options.max_minutes is not None else None
    saving = record.done, options.keep, options.save_every, options.save_minutes, limit
    keeper = checkpoint.CheckpointManager(record.out / "resume", model, optimizer, ranks, *saving)
    keeper.check_room(
        sum(p.numel() * 4 for p in lora.adapter_parameters(model).values())
        if options.lora
        else 2 * job.shape.num_parameters
    )
    with keeper, Watchdog(ranks, options.out, options.timeout) as watch:
        ends = train_loop(Trainer(job, model, optimizer, watch), record, keeper)
        keeper.finish()
    if model.compiled:
        job.say(
            f"{metrics.count_compiled_graphs()} graphs were compiled, the last in step {record.compiled_at}"
        )
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

    options: Options
    ranks: distributed.Distributed
    folder: Path
    shape: ModelConfig
    words: Tokenizer
    save: Path | None
    note: dict | None
    rows: list
    val_rows: list
    made_of: dict
    plan: "Plan"
    ways: dict
    prediction: dict = dataclasses.field(default_factory=dict)

    def say(self, text):
        if self.ranks.is_main:
            tqdm.write(text)


def load_model(job):
    """→ (the model, compiled where that pays, its optimizer): as the base, --init or the save has them"""
    options, ranks = job.options, job.ranks
    torch.manual_seed(
        options.seed + ranks.rank % ranks.shards
    )  # dropout; and rounding, which must be the same in all copies of a shard
    filled = job.save and not options.lora  # by the save: every weight is in it
    folder = None if options.from_scratch or filled else job.folder
    model = step.build_model(
        job.shape, ranks, folder, seed=None if filled else options.seed, **job.ways
    )
    if options.init and options.lora and not job.save:
        lora.load(model, options.init, shards.copy_shard)
    if ranks.device.type == "cuda" and not options.no_compile:
        model.compile_blocks()
    optimizer = optim.make_optimizer(model, 0.0, options.weight_decay, options.pure_bf16)
    if job.save:
        checkpoint.restore(model, optimizer, job.save, ranks)
    return model, optimizer


def train_loop(steps, record, keeper):
    """Step after step to the end of the plan, or of what is gained. → None, or why it ended before, as `Keeper.between` says"""
    job, options, plan, begin = steps.job, steps.job.options, steps.job.plan, record.done
    if job.save:
        job.say(f"going on after step {begin}, from {job.save}")
    asked = sample_prompts(options)
    steps.probe()
    keeper.listen()
    if not job.save:
        before = record.evaluation(0, steps.evaluate())
        job.say(
            f"before training: held-out loss {before.loss:.4f} nats a target, {before.bits:.4f} bits per character of mine"
        )
    with tqdm(
        total=plan.steps,
        initial=begin,
        unit="step",
        disable=not job.ranks.is_main,
        dynamic_ncols=True,
    ) as bar:
        for number, rows in enumerate(batches(job.rows, plan, options.seed, begin), begin + 1):
            if ends := keeper.between(record.done, record.state):
                return ends
            try:
                line = steps.take(number, rows)
                bar.set_postfix_str(POSTFIX.format(**line))
            except step.NonFiniteError as error:
                line = {
                    "step": number,
                    "skipped": str(error),
                    "lines": sorted({int(s) + 1 for row in rows for s in row.sessions}),
                }
                if record.skipped >= options.skip_nonfinite:
                    keeper.save(record.done, record.state)
                    raise record.unfit(line) from None
                job.say(
                    "step {step} is left out: {skipped}, on lines {lines} of train.jsonl".format(
                        **line
                    )
                )
            record.write(line)
            bar.update()
            if number in plan.evaluate_at:
                point = record.evaluation(number, steps.evaluate())
                job.say(f"epoch {point.epoch:.2f}: {record.compare(point)}")
                for who, said, wrote, answer in generate_samples(
                    steps.model, job.tokenizer, asked, job.ranks, options.seed
                ):
                    job.say(
                        f"    {who}: {said}\n      you wrote: {wrote}\n      it writes: {answer}"
                    )
                if record.best is point:
                    record.save()
                elif options.max_steps is None and record.since_best >= options.patience:
                    return None
    return None


class Trainer:
    """The steps and evaluations of a job, `size` rows at a time on each rank: of fewer from when there is no room for so many."""

    def __init__(self, job, model, optimizer, watch):
        self.job, self.model, self.optimizer, self.watch, self.size = (
            job,
            model,
            optimizer,
            watch,
            job.options.micro_batch,
        )
        self.peak = job.ranks.world * metrics.measure_peak_flops(
            job.ranks.device, job.ways["dtype"]
        )  # FLOP/s of all ranks together

    def probe(self):
        """Find the `size` that there is room for, on the longest rows."""
        job, ranks, length = self.job, self.job.ranks, self.job.options.seq_len
        if job.options.resume:  # an earlier start may have found out
            known = cli.read_json(Path(job.options.out) / "micro-batch.json", {}).get(
                "micro_batch", self.size
            )
            self.size = min(self.size, ranks.broadcast(known))
        while ranks.device.type == "cuda" or ranks.device.type == "cpu" and ranks.world == 1:
            try:
                if ranks.device.type == "cpu":
                    return self.time_micro_batch()
                return step.probe_micro_batch(
                    self.model,
                    job.rows,
                    self.size,
                    ranks,
                    length,
                    job.plan.batch > self.size * ranks.world,
                )
            except step.OutOfMemory:
                self.fewer()

    def time_micro_batch(self):
        """Predict the run from two micro-batches, of which the second is timed: the first one makes most kernels. NoRoom"""
        job, plan = self.job, self.job.plan
        for rows in itertools.islice(batches(job.rows, plan, job.options.seed), 2):
            rows, began = rows[: self.size], time.perf_counter()
            step.probe_micro_batch(
                self.model, rows, self.size, job.ranks, job.options.seq_len, False
            )
            seconds = time.perf_counter() - began
        speed = sum(len(row.ids) for row in rows) / seconds
        left = plan.steps - (job.note["step"] if job.note else 0)
        hours = left * sum(len(row.ids) for row in job.rows) / plan.epoch / speed / 3600
        gib = metrics.peak_gib(job.ranks.device)
        if job.options.keep:
            states = self.optimizer.state.values()
            gib += (
                cost.CHECKPOINT_COPIES
                * sum(tensor.nbytes for state in states for tensor in state.values())
                / 2**30
            )
        job.prediction.update(tok_per_s=speed, gib=gib)
        long = f"{cli.counted(left, 'steps')} in about {cost.format_hours(hours)}"
        job.say(f"timed: {speed:,.0f} tok/s, {long}; {gib:.2f} GiB, saves included")

    def take(self, number, rows):
        """Step `number`. → its line of metrics.jsonl; NotFinite"""
        job, ranks, options = self.job, self.job.ranks, self.job.options
        self.watch.step, began, lr = (
            number,
            time.perf_counter(),
            optim.lr_at(number, job.plan.steps, job.plan.lr, options.warmup),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        while True:
            try:
                parts = step.micro_batches(rows, self.size, ranks, options.seq_len)
                loss, norm, targets = step.train_step(
                    self.model, self.optimizer, parts, ranks, options.clip
                )
                break
            except step.OutOfMemory:
                self.fewer()
        seconds, tokens, (needed, done) = (
            time.perf_counter() - began,
            sum(len(row.ids) for row in rows),
            metrics.step_flops(self.model, rows),
        )
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
            "peak_gib": metrics.peak_gib(ranks.device),
            "seconds": seconds,
        }

    def evaluate(self):
        return step.evaluate(
            self.model, self.job.val_rows, self.job.ranks, self.size, self.job.options.seq_len
        )

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
        self.job.say(
            f"no room for {self.size} rows at a time: {self.size // 2} from here on, twice as often (the result is the same)"
        )
        self.size //= 2


# --- before the weights load


def parse_micro_batch(text):
    """--micro-batch → an int, or None for auto."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(
            f"--micro-batch {text}: a number of rows, or auto, is needed",
            "Leave --micro-batch out for the default.",
        ) from None


def resolve_init(options):
    """--init → the flags that it stands for: the adapter's base and shape, or the model as the base."""
    folder = options.init
    if not folder:
        return options
    if hf.is_adapter(folder):
        settings, base = lora.read_adapter_config(folder)
        targets = ",".join(target for target in lora.TARGETS if target in settings["targets"])
        shape = {
            "lora_rank": settings["rank"],
            "lora_alpha": settings["alpha"],
            "lora_targets": targets,
        }
        base = base if options.model == hub.DEFAULT_BASE and base else options.model
        return dataclasses.replace(options, lora=True, model=base, **shape)
    if not hf.is_model(folder):
        raise UserError(f"--init {folder} holds no model", "Give the folder that train.py wrote.")
    if options.lora:
        raise UserError(
            f"--init {folder} is a whole model, --lora trains an adapter",
            f"An adapter over it: --lora --model {folder}",
        )
    return dataclasses.replace(options, model=folder)


def validate(options):
    """UserError for what can't be, or not together."""
    for part in ("train", "val"):
        if not (Path(options.data) / f"{part}.jsonl").is_file():
            raise UserError(
                f"{options.data}/{part}.jsonl is missing: there is nothing to train on",
                "Make it from your export: python data.py result.json",
            )
    least = {
        "batch": 1,
        "micro_batch": 1,
        "lora_rank": 1,
        "patience": 1,
        "max_steps": 1,
        "seq_len": 16,
        "samples": 0,
    }
    least |= {"seed": 0, "keep": 0, "save_every": 1, "skip_nonfinite": 0}
    cli.check_ranges(
        options, least, ("lr", "epochs", "clip", "save_minutes", "max_minutes", "timeout")
    )
    if not 0 <= options.lora_dropout < 1:
        raise UserError(
            f"--lora-dropout {options.lora_dropout} is no share",
            "0 drops nothing, 0.1 every tenth input.",
        )
    if not 0 <= options.warmup <= 1:
        raise UserError(
            f"--warmup {options.warmup} is no share",
            "0.03 lets the rate climb for three steps of a hundred.",
        )
    if not 0 <= options.short_weight <= 1:
        raise UserError(
            f"--short-weight {options.short_weight} is no share",
            "1 counts short turns as the others, 0 not at all.",
        )
    if options.short_weight < 1 and options.loss_on == "everyone":
        raise UserError(
            "--short-weight counts my short turns, --loss-on everyone takes all as they are",
            "Leave one of them out.",
        )
    if options.pure_bf16 and options.dtype == "fp32":
        raise UserError(
            "--pure-bf16 computes in bf16, --dtype fp32 does not", "Leave one of them out."
        )
    if options.from_scratch and options.lora:
        raise UserError(
            "--from-scratch trains all weights, --lora none of the base's", "Leave one of them out."
        )
    if options.resume and options.overwrite:
        raise UserError(
            "--resume goes on with what --out holds, --overwrite replaces it",
            "Leave one of them out.",
        )
    cli.refuse_overlap(options.out, options.model, options.data, options.init)


def prepare(options, ranks):
    """What else a person may have to mend is found here, before time is spent. → Job"""
    main_rank_first(ranks, lambda: check_run_dir(options, ranks))
    save = last_checkpoint(options, ranks)
    folder, base, shape, tokenizer = load_base(options, ranks)
    if options.init and options.lora and not save:
        known = cli.read_json(Path(options.init) / "run.json", {}).get("fingerprint", base)
        if known != base or lora.read_adapter_config(options.init)[0]["rows"] != tokenizer.added:
            raise UserError(
                f"--init {options.init} was trained over another base than {folder}",
                "Say where its base lies: --model FOLDER",
            )
    rows, val_rows = main_rank_first(
        ranks, lambda: [load_rows(options, part, tokenizer) for part in ("train", "val")]
    )
    made_of = {"data": digest_rows(rows), "fingerprint": base}
    note = validate_metadata(save, options, ranks, made_of) if save else None
    if note and options.micro_batch is None and note["world"] == ranks.world:
        options = dataclasses.replace(
            options, micro_batch=note["config"]["micro_batch"]
        )  # as it was: sums in the same order
    dtypes = {
        "auto": devices.default_dtype(ranks.device),
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
    }
    dtype = dtypes["bf16" if options.pure_bf16 else options.dtype]
    ways = {
        "adapter": adapter_arguments(options, tokenizer),
        "dtype": dtype,
        "nf4": options.qlora,
        "pure": options.pure_bf16,
    }
    return Job(
        options,
        ranks,
        folder,
        shape,
        tokenizer,
        save,
        note,
        rows,
        val_rows,
        made_of,
        plan_run(len(rows), options),
        ways,
    )


def load_base(options, ranks):
    """→ (the base's folder, its weights' fingerprint or None for --from-scratch, ModelConfig with our rows, Tokenizer)"""
    local = Path(options.model).is_dir()
    if not local:
        hub.check_hub_id(options.model)  # or it is a mistyped folder, and says so
    if (
        ranks.device.type == "cpu"
        and not options.device
        and (not local or hf.read_config(options.model).num_parameters > MAX_CPU_PARAMETERS)
    ):
        raise UserError(
            f"No GPU here: on a CPU {options.model} would train for weeks.",
            "Rent one with a GPU (24 GB is enough for --lora), take a small base with --model FOLDER, or insist with --device cpu.",
        )
    folder = main_rank_first(ranks, lambda: hub.resolve(options.model))
    hf.refuse_adapter(folder)
    tokenizer = load_tokenizer(folder)
    shape = hf.config_for_tokenizer(folder, tokenizer)
    step.check_trainable(options, shape)
    with torch.device("meta"):
        outline = Transformer(shape)
    return (
        folder,
        None if options.from_scratch else fingerprint(index_tensors(outline, folder)),
        shape,
        tokenizer,
    )


def is_elastic_restart(out):
    """Whether this is torchrun's next try of the run in `out`. A start that failed before it had a folder is none of it."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return again and cli.read_json(Path(out) / "run.json", {}).get("launcher") == os.getppid()


def last_checkpoint(options, ranks):
    """The save to go on from, None to start at the beginning. A finished run is said to be one, and ends the program."""
    if not options.resume:
        return None
    out = Path(options.out)
    run = cli.read_json(out / "run.json", {})
    if ranks.broadcast("result" in run):
        if ranks.is_main:
            same_flags(options, run["config"])
            print(f"{out} is finished: nothing is left to do. Talk to it: python chat.py {out}")
        sys.exit()
    kept = checkpoint.list_checkpoints(out / "resume")
    newest = -ranks.all_reduce_max(
        -checkpoint.step_of(kept[-1]) if kept else 1
    )  # hosts with disks of their own may differ by one save
    if newest >= 0:
        return out / "resume" / f"step-{newest:08}"
    if ranks.all_reduce_max(len(kept)):
        raise UserError(
            f"{out}/resume holds saves on some hosts only",
            "Copy it to the others. Or begin anew, and lose it: --overwrite",
        )
    if ranks.is_main:
        print(f"--resume: nothing is saved in {out} yet, so this starts at the beginning")
    return None


def check_run_dir(options, ranks):
    """UserError when --out holds work of which nothing was said."""
    out = Path(options.out)
    run, kept = cli.read_json(out / "run.json", {}), checkpoint.list_checkpoints(out / "resume")
    if kept and "result" not in run and not (options.resume or options.overwrite):
        raise UserError(
            f"{out} holds a run that was saved at step {checkpoint.step_of(kept[-1])}",
            "Go on with it: the same command and --resume. Or begin anew, and lose it: --overwrite",
        )
    cli.check_output_dir(
        out, options.overwrite or options.resume and "config" in run or not ranks.is_main
    )


def same_flags(options, before):
    """UserError when one is another than it was `before` {name: value}, and makes it another run."""
    for name, value in dataclasses.asdict(options).items():
        if name not in RESUMABLE_FLAGS and before.get(name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} is {value} now, and was {before.get(name)} when the run in {options.out} began",
                "Give the same flags as then, or begin anew with --overwrite.",
            )


def validate_metadata(save, options, ranks, made_of):
    """What the save tells of the run. UserError when this is another run."""
    note = checkpoint.load_metadata(save, ranks.rank)
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


def digest_rows(rows):
    """What tells these rows from others."""
    total = hashlib.blake2b(digest_size=16)
    for row in rows:
        total.update(row.ids.tobytes() + row.labels.tobytes() + row.doc_lengths.tobytes())
    return total.hexdigest()


def load_rows(options, part, tokenizer):
    """The packed rows of train or val; what is held out is always measured on my turns."""
    taught = (options.loss_on, options.short_weight) if part == "train" else ()
    rows = data.load_rows(Path(options.data) / f"{part}.jsonl", tokenizer, options.seq_len, *taught)
    if not rows:
        raise UserError(
            f"{options.data}/{part}.jsonl has no turn of mine in it",
            "Make it anew with data.py, or move lines between train.jsonl and val.jsonl.",
        )
    return rows


def adapter_arguments(options, tokenizer):
    """The arguments of `lora.inject`, None for full fine-tuning."""
    if not options.lora:
        return None
    targets = [target.strip() for target in options.lora_targets.split(",") if target.strip()]
    sizes = {
        "rank": options.lora_rank,
        "alpha": options.lora_alpha,
        "dropout": options.lora_dropout,
    }
    return {**sizes, "targets": targets, "rows": tokenizer.added}


def choose_micro_batch(job):
    """Rows at a time and what is recomputed: as asked, else what is the fastest of what fits, by prediction. → Job with them"""
    options, ranks, ways, plan = job.options, job.ranks, job.ways, job.plan
    prediction, cuda = {}, ranks.device.type == "cuda"
    least = (
        AC_MODES
        if cuda
        else ("full",)
        if job.shape.num_parameters > MAX_CPU_PARAMETERS
        else ("none",)
    )
    kinds = least if options.recompute == "auto" else (options.recompute,)
    size, way = (
        options.micro_batch or min(2, math.ceil(plan.batch / ranks.world)),
        AC_MODES.index(kinds[-1]),
    )
    if ranks.is_main and (
        cuda or ranks.world == 1
    ):  # several ranks on a CPU are somebody's test: nothing to predict for
        tokens, labelled, _ = metrics.step_sizes(job.rows)
        work = cost.StepWorkload(
            job.shape,
            ways,
            math.ceil(plan.batch / ranks.world),
            options.seq_len,
            ranks.shards,
            labelled / tokens,
            tokens / sum(len(row.doc_lengths) for row in job.rows),
            cuda and not options.no_compile,
            ranks.device.type == "cpu",
            data.fill_share(job.rows, options.seq_len),
        )
        card, free = cost.local_device(ranks.device, ways["dtype"])
        sizes = (
            [options.micro_batch] if options.micro_batch else None if cuda else [1, 2][: work.rows]
        )
        if ranks.world == 1:
            choice = cost.choose_micro_batch(work, card, free, sizes, kinds)
        else:  # predicting for several ranks takes process groups of its own
            with concurrent.futures.ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn")
            ) as pool:
                choice = pool.submit(
                    cost.choose_micro_batch, work, card, free, sizes, kinds
                ).result()
        size, way = choice.rows, AC_MODES.index(choice.way)
        needs = work.takes(choice.needs)
        prediction = {"gib": needs / 2**30}
        text = (
            f"{cli.counted(size, 'rows at a time')}, recompute {choice.way}: {needs / 2**30:.2f} GiB predicted, "
            f"{'of' if choice.fits else 'MORE than'} {free / 2**30:.1f} to use"
        )
        if not work.cpu:  # a CPU is timed, by Steps.probe
            prediction["tok_per_s"] = plan.batch * options.seq_len * work.filled / choice.seconds
            text += f"; {prediction['tok_per_s']:,.0f} tok/s"
        job.say(text)
    options = dataclasses.replace(options, micro_batch=ranks.broadcast(size))
    return dataclasses.replace(
        job,
        options=options,
        ways={**ways, "recompute": AC_MODES[ranks.broadcast(way)]},
        prediction=prediction,
    )


def main_rank_first(ranks, work):
    """`work()` on rank 0 first (it may download, write a cache), then on the others. Rank 0's UserError ends them all."""
    result = problem = None
    if ranks.is_main:
        try:
            result = work()
        except UserError as error:
            problem = error
    if ranks.broadcast(problem is not None):
        if problem:
            raise problem
        sys.exit(2)
    return result if ranks.is_main else work()


@dataclasses.dataclass(frozen=True)
class Plan:
    """`epoch`: steps in one. `lr`: its peak."""

    batch: int
    epoch: int
    steps: int
    lr: float
    evaluate_at: frozenset


def plan_run(rows, options):
    """How many steps of how many rows: at least 50, with smaller steps and more epochs where the data is too little for them."""
    batch, epoch, steps = cost.plan_steps(rows, options.batch, options.epochs)
    if options.max_steps is not None:
        batch, epoch, steps = options.batch, math.ceil(rows / options.batch), options.max_steps
    every = max(1, epoch // EVALUATIONS_PER_EPOCH)
    lr = options.lr or (2e-4 if options.lora else 2e-5)
    return Plan(batch, epoch, steps, lr, frozenset({*range(every, steps + 1, every), steps}))


def describe(job):
    options, plan, ranks = job.options, job.plan, job.ranks
    targets = sum(int((row.labels != data.IGNORE_INDEX).sum()) for row in job.rows)
    kind = "QLoRA" if options.qlora else "LoRA" if options.lora else "full fine-tuning"
    text = (
        f"{kind} of {options.model} ({job.shape.num_parameters / 1e6:,.1f}M parameters) "
        f"on {ranks.world} x {ranks.device.type}, {dtype_name(job.ways['dtype'])}\n"
        f"{cli.counted(len(job.rows), 'rows')} of {options.seq_len:,} tokens, {data.fill_share(job.rows, options.seq_len):.1%} filled, "
        f"{targets:,} of the tokens trained; {cli.counted(len(job.val_rows), 'rows')} held out\n"
        f"{cli.counted(plan.steps, 'steps')} of {cli.counted(plan.batch, 'rows')}, {plan.steps / plan.epoch:.1f} epochs"
    )
    if plan.batch < options.batch or targets < MIN_TARGET_TOKENS:
        text += f"\nThis is little data ({targets:,} tokens of mine): expect the tone and the favourite words rather than the knowledge."
    return text


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


# --- what one watches

POSTFIX = "loss {loss:.3f}, lr {lr:.1e}, norm {grad_norm:.2f}, {tok_per_s:,.0f} tok/s, mfu {mfu:.0%}, {peak_gib:.1f} GiB"


def sample_prompts(options):
    """A few held-out moments, spread over time: (the turns before, what I wrote then)."""
    found = []
    for talk in data.load_sessions(Path(options.data) / "val.jsonl"):
        for mine in data.replies(talk)[:1]:
            found.append((talk.turns[:mine], talk.turns[mine]))
    return [
        found[i]
        for i in np.linspace(0, len(found) - 1, min(options.samples, len(found)), dtype=int)
    ]


def generate_samples(model, tokenizer, asked, ranks, seed):
    """Yield (who, what they last wrote, what I wrote, what the model writes) for each context; every rank must ask."""
    model.eval()
    decoder = generate.Decoder(
        model,
        tokenizer,
        size=min(512, model.config.max_position_embeddings),
        broadcast=ranks.broadcast,
    )
    generator = torch.Generator().manual_seed(seed)
    for before, turn in asked:
        ids = generate.truncate_prompt(before, turn.author, tokenizer, decoder.cache.size - 64)
        longest = 64 if ranks.world == 1 else 24  # sharded, every token gathers the whole model
        wrote = data.split_messages(
            tokenizer.decode(list(decoder.generate(ids, longest, generator=generator)))
        )
        yield (
            before[-1].author,
            before[-1].messages[-1],
            " / ".join(turn.messages),
            " / ".join(wrote) or "(nothing)",
        )
    model.train()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(main)
