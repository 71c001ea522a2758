"""What a run is made of, and whether it may start: found before any weights load."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

import cli
import data
import lora
from cli import UserError
from model import AC_MODES, ModelConfig, Transformer
from training import checkpoint, cost, metrics
from training.distributed import Distributed
from training.step import ModelSpec, check_trainable
from weights import devices, hf, hub
from weights.load import fingerprint, index_tensors
from weights.tokenizer import Tokenizer, load_tokenizer

EVALUATIONS_PER_EPOCH = 4
MAX_CPU_PARAMETERS = 1_000_000_000  # a larger base would train for weeks on a CPU
SMALL_BASE = 1_000_000_000  # parameters
RESUMABLE_FLAGS = {  # a resumed run may change these; its data is compared by content
    "data", "out", "overwrite", "resume", "micro_batch", "activation_checkpointing", "no_compile",
    "device", "samples", "patience", "keep", "save_every", "save_minutes", "max_minutes",
    "skip_nonfinite", "timeout",
}  # fmt: skip
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Base:
    """The base model without its weights: `config` has room for `tokenizer.added` new rows."""

    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    fingerprint: str | None  # of the weights; None with --from-scratch


@dataclasses.dataclass(frozen=True)
class Plan:
    """`batch`: rows a step. `epoch`: steps in an epoch. `lr`: the peak."""

    batch: int
    epoch: int
    steps: int
    lr: float
    evaluate_at: frozenset[int]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is made of. `options`: the flags of train.py.

    `checkpoint`, `metadata`: where to resume from, and what it says of the run.
    `prediction`: GiB and tok/s, as far as they are predicted.
    """

    options: Any
    base: Base
    spec: ModelSpec
    plan: Plan
    rows: list[data.Row]
    val_rows: list[data.Row]
    checkpoint: Path | None = None
    metadata: dict | None = None
    prediction: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def fingerprints(self) -> dict:
        return {"data": digest_rows(self.rows), "fingerprint": self.base.fingerprint}

    @property
    def steps_done(self) -> int:
        """The steps that the checkpoint holds."""
        return self.metadata["step"] if self.metadata else 0

    def config(self) -> dict:
        """Return the flags, under their names in run.json and checkpoints."""
        config = dataclasses.asdict(self.options)
        config["recompute"] = config.pop("activation_checkpointing")  # the flag's first name
        return config


def prepare(options, ranks: Distributed) -> Run:
    """Read the base's config, the rows, and the checkpoint to resume from. UserError."""
    main_rank_first(ranks, lambda: check_output_dir(options, ranks))
    saved = last_checkpoint(options, ranks)
    base = load_base(options, ranks)
    if options.init and options.lora and not saved:
        check_init(options.init, base)
    rows, val_rows = main_rank_first(
        ranks, lambda: [load_rows(options, part, base.tokenizer) for part in ("train", "val")]
    )
    spec = model_spec(options, base.tokenizer, ranks.device)
    run = Run(
        options,
        base,
        spec,
        plan_run(len(rows), options, base.config.num_parameters),
        rows,
        val_rows,
    )
    if not saved:
        return run
    metadata = validate_metadata(saved, options, ranks, run.fingerprints)
    # The same micro-batch adds in the same order: the resumed run is the same to the last bit.
    if options.micro_batch is None and metadata["world"] == ranks.world:
        micro_batch = metadata["config"]["micro_batch"]
        options = dataclasses.replace(options, micro_batch=micro_batch)
    return dataclasses.replace(run, options=options, checkpoint=saved, metadata=metadata)


def main_rank_first(ranks: Distributed, work: Callable[[], T]) -> T:
    """Call `work` on rank 0 first (it may download, or write a cache), then on the others.

    A UserError on rank 0 ends them all.
    """
    problem = None
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


def load_base(options, ranks: Distributed) -> Base:
    """Find the base, downloading it if need be, and read all but its weights."""
    local = Path(options.model).is_dir()
    if not local:
        hub.check_hub_id(options.model)  # or it is a mistyped folder
    if ranks.device.type == "cpu" and not options.device:
        if not local or hf.read_config(options.model).num_parameters > MAX_CPU_PARAMETERS:
            raise UserError(
                f"No GPU found: on a CPU {options.model} would train for weeks.",
                "Rent one (24 GB is enough for --lora), use a small base with --model FOLDER, or "
                "train on the CPU anyway with --device cpu.",
            )
    folder = main_rank_first(ranks, lambda: hub.resolve(options.model))
    hf.refuse_adapter(folder)
    tokenizer = load_tokenizer(folder)
    config = hf.config_for_tokenizer(folder, tokenizer)
    check_trainable(options, config)
    if options.from_scratch:
        return Base(folder, config, tokenizer, None)
    with torch.device("meta"):
        model = Transformer(config)
    return Base(folder, config, tokenizer, fingerprint(index_tensors(model, folder)))


def check_init(adapter: str, base: Base) -> None:
    """UserError if the adapter of --init was trained over another base."""
    known = cli.read_json(Path(adapter) / "run.json", {}).get("fingerprint", base.fingerprint)
    rows = lora.read_adapter_config(adapter)[0]["rows"]
    if known != base.fingerprint or rows != base.tokenizer.added:
        raise UserError(
            f"--init {adapter} was trained over another base than {base.folder}",
            "Say where its base is: --model FOLDER",
        )


def load_rows(options, part: str, tokenizer: Tokenizer) -> list[data.Row]:
    """Load the packed rows of train or val. The validation loss is always of my turns."""
    targets = (options.loss_on, options.short_weight) if part == "train" else ()
    path = Path(options.data) / f"{part}.jsonl"
    rows = data.load_rows(path, tokenizer, options.seq_len, *targets)
    if not rows:
        raise UserError(
            f"{path} has no turn of mine in it",
            "Run data.py again, or move lines between train.jsonl and val.jsonl.",
        )
    return rows


def digest_rows(rows: list[data.Row]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for row in rows:
        total.update(row.ids.tobytes() + row.labels.tobytes() + row.doc_lengths.tobytes())
    return total.hexdigest()


def model_spec(options, tokenizer: Tokenizer, device: torch.device) -> ModelSpec:
    """Return how the model is built; its activation checkpointing is chosen later."""
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": devices.default_dtype(device)}
    dtype = torch.bfloat16 if options.pure_bf16 else dtypes[options.dtype]
    adapter = None
    if options.lora:
        targets = [target.strip() for target in options.lora_targets.split(",")]
        adapter = {
            "rank": options.lora_rank,
            "alpha": options.lora_alpha,
            "dropout": options.lora_dropout,
            "targets": [target for target in targets if target],
            "rows": tokenizer.added,
        }
    return ModelSpec(adapter, dtype, nf4=options.qlora, pure_bf16=options.pure_bf16)


def plan_run(rows: int, options, num_parameters: int) -> Plan:
    """Plan at least 50 steps: smaller steps and more epochs if there is little data.

    A base of `num_parameters` below SMALL_BASE learns best at ten times the rate: docs/RESULTS.md.
    """
    batch, epoch, steps = cost.plan_steps(rows, options.batch, options.epochs)
    if options.max_steps is not None:
        batch, steps = options.batch, options.max_steps
        epoch = math.ceil(rows / batch)
    every = max(1, epoch // EVALUATIONS_PER_EPOCH)
    default_lr = 2e-4 if options.lora else 2e-5
    if num_parameters < SMALL_BASE:
        default_lr *= 10
    lr = options.lr or default_lr
    return Plan(batch, epoch, steps, lr, frozenset({*range(every, steps + 1, every), steps}))


# --- memory and speed


def choose_micro_batch(run: Run, ranks: Distributed) -> Run:
    """Choose rows at a time and activation checkpointing: the fastest that is predicted to fit.

    What the flags say is taken as it is.
    """
    options, cuda = run.options, ranks.device.type == "cuda"
    if options.activation_checkpointing != "auto":
        modes: Sequence[str] = (options.activation_checkpointing,)
    elif cuda:
        modes = AC_MODES
    else:
        modes = ("full" if run.base.config.num_parameters > MAX_CPU_PARAMETERS else "none",)
    rows = options.micro_batch or min(2, math.ceil(run.plan.batch / ranks.world))
    mode = AC_MODES.index(modes[-1])
    prediction: dict = {}
    # Several ranks on a CPU are a test: nothing is predicted for them.
    if ranks.is_main and (cuda or ranks.world == 1):
        choice, prediction = predict_choice(run, ranks, modes)
        rows, mode = choice.micro_batch, AC_MODES.index(choice.ac_mode)
    rows, mode = ranks.broadcast(rows), ranks.broadcast(mode)
    return dataclasses.replace(
        run,
        options=dataclasses.replace(options, micro_batch=rows),
        spec=dataclasses.replace(run.spec, activation_checkpointing=AC_MODES[mode]),
        prediction=prediction,
    )


def predict_choice(run: Run, ranks: Distributed, modes: Sequence[str]) -> tuple[cost.Choice, dict]:
    """Predict memory and speed of each choice. Return the best, and what is predicted for it."""
    options, plan = run.options, run.plan
    cuda = ranks.device.type == "cuda"
    sizes = metrics.step_sizes(run.rows)
    work = cost.StepWorkload(
        run.base.config,
        run.spec,
        rows=math.ceil(plan.batch / ranks.world),
        seq_len=options.seq_len,
        world=ranks.shards,
        target_share=sizes.targets / sizes.tokens,
        doc_length=sizes.tokens / sum(len(row.doc_lengths) for row in run.rows),
        most_documents=1 + max(len(row.doc_lengths) for row in run.rows),  # padding is one
        compiled=cuda and not options.no_compile,
        cpu=ranks.device.type == "cpu",
        fill_share=data.fill_share(run.rows, options.seq_len),
    )
    gpu, free = cost.local_device(ranks.device, run.spec.dtype)
    micro_batches = None if cuda else [1, 2][: work.rows]
    if options.micro_batch:
        micro_batches = [options.micro_batch]
    arguments = work, gpu, free, micro_batches, modes
    if ranks.world == 1:
        choice = cost.choose_micro_batch(*arguments)
    else:
        # Predicting for several ranks needs process groups of its own, so another process.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
            choice = pool.submit(cost.choose_micro_batch, *arguments).result()
    needed = work.required_bytes(choice.memory) / 2**30
    prediction = {"gib": needed}
    text = (
        f"{cli.counted(choice.micro_batch, 'rows at a time')}, activation checkpointing "
        f"{choice.ac_mode}: {needed:.2f} GiB predicted, {'of' if choice.fits else 'MORE than'} "
        f"{free / 2**30:.1f} to use"
    )
    if not work.cpu:  # a CPU is timed, by Trainer.time_micro_batch
        speed = plan.batch * options.seq_len * work.fill_share / choice.seconds
        prediction["tok_per_s"] = speed
        text += f"; {speed:,.0f} tok/s"
    ranks.print(text)
    return choice, prediction


# --- the output folder: is there a run to resume, and is this the same one?


def is_elastic_restart(out: str) -> bool:
    """Whether torchrun has started the run in `out` again.

    Not if the earlier start failed before it made the folder: then `out` holds another run.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    return restarted and read_record(out).get("launcher") == os.getppid()


def read_record(out: Path | str) -> dict:
    return cli.read_json(Path(out) / "run.json", {})


def check_output_dir(options, ranks: Distributed) -> None:
    """UserError if --out holds other work, without --resume or --overwrite."""
    out, record = Path(options.out), read_record(options.out)
    saved = checkpoint.list_checkpoints(out / "resume")
    if saved and "result" not in record and not (options.resume or options.overwrite):
        raise UserError(
            f"{out} holds an unfinished run with a checkpoint of step "
            f"{checkpoint.step_of(saved[-1])}",
            "Continue it with the same command and --resume, or discard it with --overwrite.",
        )
    resumes = options.resume and "config" in record
    cli.check_output_dir(out, options.overwrite or resumes or not ranks.is_main)


def last_checkpoint(options, ranks: Distributed) -> Path | None:
    """Return the checkpoint to resume from, None for a new run. A finished run ends here."""
    if not options.resume:
        return None
    out, record = Path(options.out), read_record(options.out)
    if ranks.broadcast("result" in record):
        if ranks.is_main:
            check_same_flags(options, record["config"])
            print(f"{out} is finished: nothing is left to do. Talk to it: python chat.py {out}")
        sys.exit()
    # The last one that all hosts have: with disks of their own they may differ by one.
    saved = checkpoint.list_checkpoints(out / "resume")
    newest = -ranks.all_reduce_max(-checkpoint.step_of(saved[-1]) if saved else 1)
    if newest >= 0:
        return out / "resume" / f"step-{newest:08}"
    if ranks.all_reduce_max(len(saved)):
        raise UserError(
            f"{out}/resume holds checkpoints on some hosts only",
            "Copy it to the others, or discard it with --overwrite.",
        )
    ranks.print(f"--resume: {out} has no checkpoint yet, so this starts from the beginning")
    return None


def validate_metadata(saved: Path, options, ranks: Distributed, fingerprints: dict) -> dict:
    """Return the checkpoint's metadata. UserError if it is of another run."""
    metadata = checkpoint.load_metadata(saved, ranks.rank)
    check_same_flags(options, metadata["config"])
    if options.lora and metadata["fingerprint"] != fingerprints["fingerprint"]:
        raise UserError(
            f"{options.model} has other weights than when the run in {options.out} began",
            "Restore the old ones, or start over with --overwrite.",
        )
    if metadata["data"] != fingerprints["data"]:
        raise UserError(
            f"{options.data} isn't what the run in {options.out} was trained on",
            "Restore the old files, or start over with --overwrite.",
        )
    return metadata


def check_same_flags(options, before: dict) -> None:
    """UserError if a flag differs from `before` in a way that makes it another run."""
    for name, value in dataclasses.asdict(options).items():
        if name not in RESUMABLE_FLAGS and before.get(name) != value:
            raise UserError(
                f"--{name.replace('_', '-')} is {value} now, and was {before.get(name)} when the "
                f"run in {options.out} began",
                "Give the same flags as then, or start over with --overwrite.",
            )
