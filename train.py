"""Fine-tune a base model on packed rows of my chats, so that it talks like me.

    python train.py --lora                      one GPU (or a CPU, with a small base)
    torchrun --nproc_per_node 8 train.py        full fine-tuning, sharded over eight GPUs
    … the same command with --resume            continue from the last checkpoint

`ckpt/` holds the weights with the lowest validation loss, not the last ones.
"""

import contextlib
import ctypes
import os

# Tensors of many sizes break memory into pieces, unless the pieces can grow. Torch reads this when
# it is imported, and crashes if NVIDIA's management library is missing.
with contextlib.suppress(OSError):
    ctypes.CDLL("libnvidia-ml.so.1")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import dataclasses
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

import cli
import data
import fused
import lora
from cli import UserError, flag
from inference import generate
from model import AC_MODES, Transformer
from training import checkpoint, cost, distributed, metrics, optim, step
from training.checkpoint import CheckpointManager
from training.distributed import Distributed
from training.run import Plan, Run, choose_micro_batch, is_elastic_restart, prepare
from training.run_dir import BestTracker, EvalPoint, RunDir
from training.watchdog import Watchdog
from weights import devices, hf, hub, shards

ALL_LINEAR = ",".join(lora.TARGETS)
MIN_TARGET_TOKENS = 20_000  # with less data, say what to expect
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Options:
    """Fine-tune a base on data/ (made by data.py): all weights, or an adapter with --lora."""

    lora: bool = flag(
        False, "train a low-rank adapter; the base stays as it is", group="what to train"
    )
    qlora: bool = flag(False, "the same over a 4-bit base (NF4): less than half the memory")
    model: str = flag(hub.DEFAULT_BASE, "the base: folder or hub id")
    from_scratch: bool = flag(
        False, "train random weights of --model's config.json, to pretrain a small base"
    )
    init: str | None = flag(
        None, "start from an earlier run's adapter (with its base) or from its model"
    )
    data: str = flag("data", "the folder that data.py wrote")
    loss_on: str = flag("me", "whose turns are targets", choices=("me", "everyone"))
    short_weight: float = flag(1.0, "weight of my turns of one or two words, 0 to 1")
    download_only: bool = flag(
        False, "download --model from the hub and stop (on a machine without a GPU)"
    )

    out: str = flag("ckpt", "the folder to write", group="the run")
    overwrite: bool = flag(False, "replace the contents of --out")
    resume: bool = flag(False, "continue from the last checkpoint in --out, with the same flags")
    keep: int = flag(2, "checkpoints to keep, beside one being written; 0: none")
    save_minutes: float = flag(10.0, "minutes between checkpoints")
    save_every: int | None = flag(None, "steps between checkpoints; overrides --save-minutes")
    max_minutes: float | None = flag(None, "write a checkpoint and stop before X minutes are over")
    timeout: float = flag(600.0, "stop several ranks after X seconds without progress")
    skip_nonfinite: int = flag(0, "steps with a NaN or infinite loss to skip before stopping")
    samples: int = flag(3, "validation prompts to reply to at each evaluation")
    seed: int = flag(0, "seed of the row order, the adapter and the samples")

    epochs: float = flag(
        3.0, "passes over the data, at most (--patience stops sooner)", group="the steps"
    )
    max_steps: int | None = flag(
        None, "train for exactly N steps; overrides --epochs and --patience"
    )
    patience: int = flag(3, "stop after N evaluations without a new best")
    batch: int = flag(8, "rows per step, over all ranks; fewer with little data")
    seq_len: int = flag(1024, "tokens per row")
    lr: float | None = flag(
        None, "peak learning rate", shown="2e-4 with --lora, else 2e-5; x 10 below 1B"
    )
    warmup: float = flag(0.03, "share of the steps with a rising learning rate")
    weight_decay: float = flag(0.0, "AdamW's weight decay")
    clip: float = flag(1.0, "largest gradient norm")

    lora_rank: int = flag(32, "LoRA rank", group="the adapter")
    lora_alpha: float = flag(16.0, "LoRA alpha; the update is scaled by alpha / rank")
    lora_dropout: float = flag(0.0, "dropout of the adapter's inputs")
    lora_targets: str = flag(
        ALL_LINEAR,
        "adapted layers, as q_proj,v_proj",
        shown="all seven linear layers",
    )

    micro_batch: str | int | None = flag(  # parse_options makes it a number, or None for auto
        "auto",
        "rows at a time on one rank",
        shown="auto, the fastest that fits",
        group="speed and memory",
    )
    activation_checkpointing: str = flag(
        "auto",
        "what is recomputed in backward",
        choices=("auto", *AC_MODES),
        shown="auto, the least that fits",
        alias="--recompute",
    )
    pure_bf16: bool = flag(False, "full fine-tuning without fp32 masters: half the memory")
    no_compile: bool = flag(False, "on CUDA, don't compile the blocks: starts at once")
    dtype: str = flag(
        "auto",
        "compute dtype",
        choices=("auto", "bf16", "fp32"),
        shown="auto, bf16 if the CPU has it",
    )
    device: str | None = flag(None, "cuda, mps or cpu", shown="the first that is found")


def main():
    started = time.monotonic()
    options = resolve_init(parse_options())
    if options.download_only:
        print(f"{options.model} is in {hub.resolve(options.model)}")
        return
    validate(options)
    ranks = distributed.init_distributed(options.device)
    if ranks.broadcast(is_elastic_restart(options.out)):
        options = dataclasses.replace(options, resume=True, overwrite=False)

    # Everything that the user may have to fix is found before the weights load.
    run = check_compiler(prepare(options, ranks), ranks)
    ranks.print(describe(run, ranks))
    run = choose_micro_batch(run, ranks)
    model, optimizer = build(run, ranks)

    # Write only now: a run that was refused above has changed nothing in --out.
    run_dir = RunDir(run, ranks)
    run_dir.create(model.compiled)
    manager = create_manager(run, ranks, model, optimizer, started)
    with manager, Watchdog(ranks, options.out, options.timeout) as watchdog:
        trainer = Trainer(run, ranks, model, optimizer, watchdog)
        stop = train_loop(trainer, run_dir, manager)
        manager.finish()
    if model.compiled:
        ranks.print(f"{metrics.count_compiled_graphs()} graphs were compiled")
    if ranks.world > 1:
        torch.distributed.destroy_process_group()
    if stop is None:
        ranks.print(run_dir.finish(trainer.tracker, trainer.started))
    else:
        report_interrupt(stop, trainer)


def train_loop(trainer: "Trainer", run_dir: RunDir, manager: CheckpointManager) -> int | str | None:
    """Train to the end of the plan, or until --patience is used up.

    Return None, or why it stopped early: a signal's number, or "time".
    """
    run, ranks = trainer.run, trainer.ranks
    options, plan = run.options, run.plan
    model, tokenizer = trainer.model, run.base.tokenizer
    prompts = sample_prompts(options)
    trainer.find_micro_batch()
    manager.install_handlers()
    if run.checkpoint:
        ranks.print(f"resuming after step {trainer.done}, from {run.checkpoint}")
    else:
        point = trainer.evaluate(0, run_dir)
        trainer.tracker.add(point)
        ranks.print(f"before training: {point}")

    rows_of_steps = step_rows(run.rows, plan, options.seed, trainer.done)
    hidden = not ranks.is_main
    with tqdm(
        total=plan.steps, initial=trainer.done, unit="step", disable=hidden, dynamic_ncols=True
    ) as bar:
        for number, rows in enumerate(rows_of_steps, trainer.done + 1):
            # All ranks stop and save alike: the manager asks every rank.
            stop = manager.poll(trainer.done, trainer.state)
            if stop is not None:
                return stop

            # One step. Without a finite loss the weights stay; skip a few such steps if asked to.
            try:
                line = trainer.step(number, rows)
                bar.set_postfix_str(POSTFIX.format(**line))
            except step.NonFiniteError as error:
                line = skipped_line(number, rows, error)
                if trainer.skipped >= options.skip_nonfinite:
                    manager.save(trainer.done, trainer.state)
                    raise nonfinite_error(line, run_dir) from None
                trainer.skipped += 1
                ranks.print("step {step} is skipped: {skipped}, on lines {lines}".format(**line))
            trainer.done = number
            run_dir.append(line)
            bar.update()
            if number not in plan.evaluate_at:
                continue

            # Evaluate, show samples, save the best weights; stop when they get no better.
            point = trainer.evaluate(number, run_dir)
            is_best = trainer.tracker.add(point)
            best = trainer.tracker.best
            known = f" (best: {best.loss:.4f})" if best and not is_best else ""
            ranks.print(f"epoch {point.epoch:.2f}: {point}{known}")
            print_samples(model, tokenizer, prompts, ranks, options.seed)
            if is_best:
                run_dir.save_weights(model)
            elif options.max_steps is None and trainer.tracker.since_best >= options.patience:
                return None
    return None


def describe(run: Run, ranks: Distributed) -> str:
    """Say what is trained, on what, and for how long."""
    options, plan = run.options, run.plan
    targets = sum(int((row.labels != data.IGNORE_INDEX).sum()) for row in run.rows)
    kind = "LoRA" if options.lora else "full fine-tuning"
    kind = "QLoRA" if options.qlora else kind
    dtype = str(run.spec.dtype).removeprefix("torch.")
    text = (
        f"{kind} of {options.model} ({run.base.config.num_parameters / 1e6:,.1f}M parameters) "
        f"on {ranks.world} x {ranks.device.type}, {dtype}\n"
        f"{cli.counted(len(run.rows), 'rows')} of {options.seq_len:,} tokens, "
        f"{data.fill_share(run.rows, options.seq_len):.1%} filled, {targets:,} target tokens; "
        f"{cli.counted(len(run.val_rows), 'validation rows')}\n"
        f"{cli.counted(plan.steps, 'steps')} of {cli.counted(plan.batch, 'rows')}, "
        f"{plan.steps / plan.epoch:.1f} epochs"
    )
    if plan.batch < options.batch or targets < MIN_TARGET_TOKENS:
        text += (
            f"\nThis is little data ({targets:,} tokens of mine): expect my tone and favourite "
            "words, not what I know."
        )
    if run.spec.dtype == torch.bfloat16 and devices.lacks_bf16(ranks.device):
        text += "\nThis GPU has no bf16: training is slow and needs more memory."
    return text


# --- flags


def parse_options() -> Options:
    options = cli.parse(Options)
    micro_batch = None
    if isinstance(options.micro_batch, str) and options.micro_batch != "auto":
        try:
            micro_batch = int(options.micro_batch)
        except ValueError:
            raise UserError(
                f"--micro-batch must be auto or a number of rows, got {options.micro_batch}",
                "Leave --micro-batch out for the default.",
            ) from None
    return dataclasses.replace(options, lora=options.lora or options.qlora, micro_batch=micro_batch)


def resolve_init(options: Options) -> Options:
    """Replace --init by the flags it implies: the adapter's base and shape, or --model."""
    folder = options.init
    if not folder:
        return options
    if hf.is_adapter(folder):
        adapter, base = lora.read_adapter_config(folder)
        targets = [target for target in lora.TARGETS if target in adapter["targets"]]
        return dataclasses.replace(
            options,
            lora=True,
            model=base if base and options.model == hub.DEFAULT_BASE else options.model,
            lora_rank=adapter["rank"],
            lora_alpha=adapter["alpha"],
            lora_targets=",".join(targets),
        )
    if not hf.is_model(folder):
        raise UserError(f"--init {folder} holds no model", "Give a folder that train.py wrote.")
    if options.lora:
        raise UserError(
            f"--init {folder} is a whole model, --lora trains an adapter",
            f"To train an adapter over it: --lora --model {folder}",
        )
    return dataclasses.replace(options, model=folder)


def validate(options: Options) -> None:
    """UserError for flags out of range, and for flags that can't be combined."""
    for part in ("train", "val"):
        if not (Path(options.data) / f"{part}.jsonl").is_file():
            raise UserError(
                f"{options.data}/{part}.jsonl is missing: there is nothing to train on",
                "Make it from your export: python data.py result.json",
            )
    at_least_1 = ("batch", "micro_batch", "lora_rank", "patience", "max_steps", "save_every")
    at_least_0 = ("samples", "seed", "keep", "skip_nonfinite")
    least = {"seq_len": 16, **dict.fromkeys(at_least_1, 1), **dict.fromkeys(at_least_0, 0)}
    positive = ("lr", "epochs", "clip", "save_minutes", "max_minutes", "timeout")
    cli.check_ranges(options, least, positive)
    for name, value, in_range in (
        ("--lora-dropout", options.lora_dropout, 0 <= options.lora_dropout < 1),
        ("--warmup", options.warmup, 0 <= options.warmup <= 1),
        ("--short-weight", options.short_weight, 0 <= options.short_weight <= 1),
    ):
        if not in_range:
            raise UserError(
                f"{name} must be a share from 0 to 1, got {value}",
                f"Leave {name} out for the default.",
            )
    shortened = options.short_weight < 1
    for one, other, conflict in (
        ("--short-weight", "--loss-on everyone", shortened and options.loss_on == "everyone"),
        ("--pure-bf16", "--dtype fp32", options.pure_bf16 and options.dtype == "fp32"),
        ("--from-scratch", "--lora", options.from_scratch and options.lora),
        ("--resume", "--overwrite", options.resume and options.overwrite),
    ):
        if conflict:
            raise UserError(f"{one} and {other} can't be combined", "Leave one of them out.")
    cli.refuse_overlap(options.out, options.model, options.data, options.init)


def create_manager(
    run: Run, ranks: Distributed, model: Transformer, optimizer, started: float
) -> CheckpointManager:
    """Make the checkpoint manager. UserError if the disk is too small for what it will write."""
    options = run.options
    manager = CheckpointManager(
        Path(options.out) / "resume",
        model,
        optimizer,
        ranks,
        step=run.steps_done,
        keep=options.keep,
        save_every=options.save_every,
        save_minutes=options.save_minutes,
        deadline=started + 60 * options.max_minutes if options.max_minutes else None,
    )
    model_bytes = 2 * run.base.config.num_parameters  # saved in bf16
    if options.lora:
        model_bytes = sum(4 * p.numel() for p in lora.adapter_parameters(model).values())
    manager.check_free_space(model_bytes)
    return manager


def check_compiler(run: Run, ranks: Distributed) -> Run:
    """Train uncompiled, and say so, where torch.compile or a CPU's kernels can't be built."""
    if ranks.device.type == "cpu" and fused.library() is None:
        ranks.print("No C++ compiler works here, so steps take a fifth longer: apt install g++")
    if ranks.device.type != "cuda" or run.options.no_compile:
        return run
    problem = step.compiler_problem(ranks.device)
    if not ranks.all_reduce_max(int(problem is not None)):
        return run
    ranks.print(
        f"Training is not compiled, so it is slower and needs more memory "
        f"({problem or 'torch.compile fails on another rank'}). "
        "Compiling needs a C compiler and Python's headers: apt install gcc g++ python3-dev"
    )
    return dataclasses.replace(run, options=dataclasses.replace(run.options, no_compile=True))


# --- the model, its steps and evaluations


def build(run: Run, ranks: Distributed) -> tuple[Transformer, torch.optim.Optimizer]:
    """Load the model (compiled on CUDA) and its optimizer, as the base, --init or the checkpoint
    has them."""
    options = run.options
    # The seed is for dropout and stochastic rounding, which must agree in all copies of a shard.
    torch.manual_seed(options.seed + ranks.rank % ranks.shards)
    # A full fine-tune's checkpoint has every weight: nothing else is read.
    restores_all = bool(run.checkpoint and not options.lora)
    folder = None if options.from_scratch or restores_all else run.base.folder
    seed = None if restores_all else options.seed
    model = step.build_model(run.base.config, ranks, run.spec, folder, seed)
    if options.init and options.lora and not run.checkpoint:
        lora.load(model, options.init, shards.copy_shard)
    optimizer = optim.make_optimizer(model, 0.0, options.weight_decay, options.pure_bf16)
    if ranks.device.type == "cuda" and not options.no_compile:
        step.compile_model(model, optimizer)
    if run.checkpoint:
        checkpoint.restore(model, optimizer, run.checkpoint, ranks)
    return model, optimizer


class Trainer:
    """Takes the steps and evaluations of a run, and counts what a checkpoint must know.

    `micro_batch`: rows at a time on each rank; halved when they don't fit. `done`: the last step.
    """

    def __init__(self, run: Run, ranks: Distributed, model: Transformer, optimizer, watchdog):
        self.run, self.ranks = run, ranks
        self.options, self.plan = run.options, run.plan
        self.model, self.optimizer = model, optimizer
        self.watchdog = watchdog
        self.micro_batch = run.options.micro_batch
        self.peak_flops = ranks.world * metrics.measure_peak_flops(ranks.device, run.spec.dtype)
        self.done, self.skipped = run.steps_done, 0
        self.started = time.time()
        self.tracker = BestTracker()
        if run.metadata:
            self.skipped = run.metadata["skipped"]
            self.started -= run.metadata["seconds"]
            self.tracker = BestTracker.from_metadata(run.metadata)

    def state(self) -> dict:
        """Return the run so far, for a checkpoint."""
        return {
            **self.tracker.state(),
            "skipped": self.skipped,
            "seconds": time.time() - self.started,
            "config": self.run.config(),
            **self.run.fingerprints,
        }

    def step(self, number: int, rows: list[data.Row]) -> dict:
        """Take step `number`. Return its line of metrics.jsonl. NonFiniteError."""
        options, plan = self.options, self.plan
        self.watchdog.step = number
        started = time.perf_counter()
        lr = optim.lr_at(number, plan.steps, plan.lr, options.warmup)
        optim.set_lr(self.optimizer, lr)

        def take_step():
            batches = step.micro_batches(rows, self.micro_batch, self.ranks, options.seq_len)
            return step.train_step(self.model, self.optimizer, batches, self.ranks, options.clip)

        loss, norm, targets = self.until_it_fits(take_step)
        seconds = time.perf_counter() - started
        tokens = sum(len(row.ids) for row in rows)
        model_flops, hardware_flops = metrics.step_flops(self.model, rows)
        return {
            "step": number,
            "loss": loss,
            "lr": lr,
            "grad_norm": norm,
            "tokens": tokens,
            "trained_tokens": targets,
            "tok_per_s": tokens / seconds,
            "mfu": model_flops / seconds / self.peak_flops,
            "hfu": hardware_flops / seconds / self.peak_flops,
            "peak_gib": metrics.peak_gib(self.ranks.device),
            "seconds": seconds,
        }

    def evaluate(self, number: int, run_dir: RunDir) -> EvalPoint:
        """Evaluate after step `number`, into metrics.jsonl. UserError if the loss isn't finite."""
        rows, length = self.run.val_rows, self.options.seq_len
        evaluation = self.until_it_fits(
            lambda: step.evaluate(self.model, rows, self.ranks, self.micro_batch, length)
        )
        if not math.isfinite(evaluation.nats):
            raise UserError(
                f"after step {number} the validation loss is {evaluation.nats}; "
                f"{run_dir.contents()}",
                "Try a smaller --lr." if number else "Is the base damaged? Try --dtype fp32.",
            )
        values = evaluation.metrics
        epoch = number / self.plan.epoch
        run_dir.append({"step": number, "epoch": epoch, **values})
        return EvalPoint(number, epoch, values["val_loss"], values["val_bits_per_char"])

    def find_micro_batch(self) -> None:
        """Halve the micro-batch until the longest rows fit. On a CPU, also time it."""
        ranks, device = self.ranks, self.ranks.device.type
        if self.options.resume:  # an earlier start may have found out
            path = Path(self.options.out) / "micro-batch.json"
            known = cli.read_json(path, {}).get("micro_batch", self.micro_batch)
            self.micro_batch = min(self.micro_batch, ranks.broadcast(known))
        if device == "cpu" and ranks.world == 1:
            self.until_it_fits(self.time_micro_batch)
        elif device == "cuda":
            self.until_it_fits(self.probe_worst_rows)

    def probe_worst_rows(self) -> None:
        accumulates = self.plan.batch > self.micro_batch * self.ranks.world
        self.probe(self.run.rows, accumulates)

    def probe(self, rows: list[data.Row], accumulates: bool) -> None:
        step.probe_micro_batch(
            self.model, rows, self.micro_batch, self.ranks, self.options.seq_len, accumulates
        )

    def time_micro_batch(self) -> None:
        """Predict the run's speed from the second of two micro-batches: the first makes kernels."""
        run, plan = self.run, self.plan
        for rows in itertools.islice(step_rows(run.rows, plan, self.options.seed), 2):
            rows = rows[: self.micro_batch]
            started = time.perf_counter()
            self.probe(rows, accumulates=False)
            seconds = time.perf_counter() - started
        speed = sum(len(row.ids) for row in rows) / seconds
        steps = plan.steps - self.done
        tokens_per_step = sum(len(row.ids) for row in run.rows) / plan.epoch
        hours = steps * tokens_per_step / speed / 3600
        gib = metrics.peak_gib(self.ranks.device)
        if self.options.keep:
            gib += cost.CHECKPOINT_COPIES * optim.state_bytes(self.optimizer) / 2**30
        run.prediction.update(tok_per_s=speed, gib=gib)
        self.ranks.print(
            f"timed: {speed:,.0f} tok/s, {cli.counted(steps, 'steps')} in about "
            f"{cost.format_hours(hours)}; {gib:.2f} GiB, checkpoints included"
        )

    def until_it_fits(self, work: Callable[[], T]) -> T:
        """Return work(), called again with a smaller micro-batch as long as it doesn't fit."""
        while True:
            try:
                return work()
            except step.OutOfMemory:
                self.halve_micro_batch()

    def halve_micro_batch(self) -> None:
        """Use half as many rows at a time.

        Several ranks can't go on once one of them failed: they end, and say what to try.
        """
        size, length = self.micro_batch, self.options.seq_len
        if self.ranks.world > 1:
            self.watchdog.out_of_memory(size, length)
        if size == 1:
            device = self.ranks.device.type
            raise UserError(
                f"Out of memory on {device} with one row of {length} tokens",
                "Try --activation-checkpointing full, --qlora, or a shorter --seq-len.",
            )
        self.micro_batch //= 2
        if self.model.compiled:
            torch._dynamo.reset()  # what was compiled for the old size would count as a recompile
        self.ranks.print(
            f"{size} rows at a time don't fit: {self.micro_batch} from here on (the result is the "
            "same)"
        )


def step_rows(
    rows: list[data.Row], plan: Plan, seed: int, first: int = 0
) -> Iterator[list[data.Row]]:
    """Yield the rows of each step from `first` on: every row once an epoch, in a new order."""
    done = 0
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        for begin in range(0, len(rows), plan.batch):
            if done == plan.steps:
                return
            if done >= first:
                yield [rows[i] for i in order[begin : begin + plan.batch]]
            done += 1


# --- what is shown and saved

POSTFIX = (
    "loss {loss:.3f}, lr {lr:.1e}, norm {grad_norm:.2f}, {tok_per_s:,.0f} tok/s, mfu {mfu:.0%}, "
    "{peak_gib:.1f} GiB"
)


def sample_prompts(options: Options) -> list[tuple[list[data.Turn], data.Turn]]:
    """Return a few validation prompts, spread over time: (turns before, my real reply)."""
    prompts = []
    for session in data.load_sessions(Path(options.data) / "val.jsonl"):
        for index in data.replies(session)[:1]:
            prompts.append((session.turns[:index], session.turns[index]))
    count = min(options.samples, len(prompts))
    return [prompts[i] for i in np.linspace(0, len(prompts) - 1, count, dtype=int)]


def print_samples(model, tokenizer, prompts, ranks: Distributed, seed: int) -> None:
    """Print the samples. On one GPU without room for them, training goes on."""

    def show():
        for sample in generate_samples(model, tokenizer, prompts, ranks, seed):
            ranks.print(sample)

    try:
        step.run_within_memory(show, model, ranks.device)
    except step.OutOfMemory:
        if ranks.world > 1:
            raise
        model.train()
        ranks.print("    (no samples: they don't fit beside the training)")


def generate_samples(model, tokenizer, prompts, ranks: Distributed, seed: int) -> Iterator[str]:
    """Yield what the model replies to each prompt, beside what I wrote. Every rank must call it."""
    model.eval()
    size = min(512, model.config.max_position_embeddings)
    decoder = generate.Decoder(model, tokenizer, size=size, broadcast=ranks.broadcast)
    batch, rows = generate.DecodeBatch(decoder, len(prompts)), []
    max_tokens = 64 if ranks.world == 1 else 24  # sharded, every step gathers the whole model
    for index, (before, reply) in enumerate(prompts):
        ids = generate.truncate_prompt(before, reply.author, tokenizer, decoder.cache.size - 64)
        generator = torch.Generator().manual_seed(seed + index)
        rows.append(batch.add(ids, max_tokens, generator=generator))
    while batch.rows:
        batch.step()
    for (before, reply), row in zip(prompts, rows):
        messages = data.split_messages(tokenizer.decode(row.ids))
        yield (
            f"    {before[-1].author}: {before[-1].messages[-1]}\n"
            f"      you wrote: {' / '.join(reply.messages)}\n"
            f"      it writes: {' / '.join(messages) or '(nothing)'}"
        )
    model.train()


def skipped_line(number: int, rows: list[data.Row], error: step.NonFiniteError) -> dict:
    """Return the line of metrics.jsonl for a step whose loss or gradient isn't finite."""
    lines = sorted({int(session) + 1 for row in rows for session in row.sessions})
    return {"step": number, "skipped": str(error), "lines": lines}


def nonfinite_error(line: dict, run_dir: RunDir) -> UserError:
    return UserError(
        f"step {line['step']}: {line['skipped']}, on lines {line['lines']} of train.jsonl; "
        f"{run_dir.contents()}",
        "Try a smaller --lr, correct those lines, or skip such steps: --resume --skip-nonfinite 3",
    )


def report_interrupt(stop: int | str, trainer: Trainer) -> None:
    """Say why the run stopped early and how to continue. Exit as the signal says."""
    options = trainer.run.options
    if trainer.ranks.is_main:
        reason = f"--max-minutes {options.max_minutes:g}" if stop == "time" else "SIGTERM"
        reason = "Ctrl-C" if stop == signal.SIGINT else reason
        if not trainer.done:
            text = f"stopped before the first step. {checkpoint.RESUME_HINT}"
        elif options.keep:
            text = f"stopped after step {trainer.done}, saved in {options.out}. "
            text += checkpoint.RESUME_HINT
        else:
            text = f"stopped after step {trainer.done}, not saved (--keep 0)."
        print(f"{reason}: {text}", file=sys.stderr)
    if stop != "time":
        sys.exit(128 + int(stop))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cli.run(main, cli.TRAINING_MMAP_BYTES)
