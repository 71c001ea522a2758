"""The loop: packed rows of my chats into a model that talks like me.

    python train.py --lora                      one GPU (or a CPU, with a small base)
    torchrun --nproc_per_node 8 train.py        full fine-tuning, sharded over eight

What the best evaluation saw is what `ckpt/` ends as; whatever came after it was overfitting.
"""

import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import platform
import subprocess
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
import quantize
import step
import tokenizer as tokenizers
from config import UserError, flag
from model import RECOMPUTE

FEWEST_STEPS = 50  # however little data there is
EVALUATIONS = 4  # an epoch, at least
LITTLE = 20_000  # trained tokens, below which a word is said on what to expect
PACKAGES = ("torch", "tokenizers", "sentencepiece", "safetensors", "numpy")
ALL_LINEAR = ",".join(lora.TARGETS)
BIG = 1_000_000_000  # parameters: beyond it a CPU would need weeks
RESERVE = 2 << 30  # bytes of a GPU that predictions don't know of: kernels' workspaces, and what the allocator can't use


@dataclasses.dataclass(frozen=True)
class Config:
    """Fine-tune a Mistral-style model on data/ (made by data.py): all of its weights, or a LoRA adapter with --lora."""

    lora: bool = flag(False, "train a low-rank adapter, the base stays as it is")
    qlora: bool = flag(False, "the same over a base kept in 4 bits (NF4): less than half the memory")
    model: str = flag(checkpoint.NO_ACCOUNT, "the base: a folder or a hub id")
    from_scratch: bool = flag(False, "random weights of --model's config.json, to pretrain a small base")
    data: str = flag("data", "the folder that data.py wrote")
    out: str = flag("ckpt", "the folder to write")
    overwrite: bool = flag(False, "replace what --out holds")
    epochs: float = flag(3.0, "times over the data, at most (--patience ends sooner)")
    max_steps: int | None = flag(None, "exactly so many steps, in place of --epochs and --patience")
    patience: int = flag(3, "stop after so many evaluations without a better one")
    batch: int = flag(8, "rows a step, over all ranks")
    micro_batch: int = flag(2, "rows at a time on one rank: less memory, the same result")
    seq_len: int = flag(1024, "tokens a row")
    lr: float | None = flag(None, "peak learning rate (default: 2e-4 with --lora, else 2e-5)")
    warmup: float = flag(0.03, "share of the steps in which the rate climbs")
    weight_decay: float = flag(0.0, "AdamW's")
    clip: float = flag(1.0, "largest norm of the gradient")
    lora_rank: int = flag(32, "rank of the adapter")
    lora_alpha: float = flag(16.0, "the adapter counts alpha / rank times")
    lora_dropout: float = flag(0.0, "share of the adapter's inputs dropped in training")
    lora_targets: str = flag(ALL_LINEAR, "linear layers that get an adapter")
    loss_on: str = flag("me", "whose turns are targets", choices=("me", "everyone"))
    pure_bf16: bool = flag(False, "full fine-tuning without fp32 masters: half the memory; updates are rounded at random")
    recompute: str = flag(
        "auto",
        "what the backward pass makes anew, for memory: selective keeps matmuls and attention (auto: what fits)",
        choices=("auto", *RECOMPUTE),
    )
    no_compile: bool = flag(False, "on CUDA, don't compile the blocks: it starts at once")
    dtype: str = flag("auto", "what is computed in (auto: bf16; fp32 on CPUs without bf16 instructions)", choices=("auto", "bf16", "fp32"))
    device: str | None = flag(None, "cuda, mps or cpu (default: the first there is)")
    seed: int = flag(0, "order of the rows, first values of the adapter, samples")
    samples: int = flag(3, "held-out contexts to answer at each evaluation")
    download_only: bool = flag(False, "fetch --model from the hub and stop (for machines with a network and no GPU)")


def main():
    options = config.parse(Config)
    options = dataclasses.replace(options, lora=options.lora or options.qlora)
    if options.download_only:
        print(f"{options.model} is in {checkpoint.resolve(options.model)}")
        return
    folder, shape, ranks, words = prepare(options)
    train_rows, val_rows = in_turn(ranks, lambda: [rows_of(options, part, words) for part in ("train", "val")])
    plan = schedule(len(train_rows), options)
    dtype = {"auto": checkpoint.compute_dtype(ranks.device), "bf16": torch.bfloat16, "fp32": torch.float32}[
        "bf16" if options.pure_bf16 else options.dtype
    ]
    say = tqdm.write if ranks.first else lambda text: None
    say(describe(options, shape, ranks, dtype, train_rows, val_rows, plan))

    torch.manual_seed(options.seed + ranks.rank)  # dropout
    ways = {"adapter": adapter(options, words), "dtype": dtype, "nf4": options.qlora, "pure": options.pure_bf16}
    ways["recompute"] = recompute(options, shape, ranks, plan, ways)
    model = step.build(shape, ranks, None if options.from_scratch else folder, seed=options.seed, **ways)
    if ranks.device.type == "cuda" and not options.no_compile:
        model.compile_blocks()
    optimizer = step.make_optimizer(model, 0.0, options.weight_decay, options.pure_bf16)
    record = Record(options, plan, folder, words, model, ranks, dtype)
    peak = ranks.world * step.measured_peak(ranks.device, dtype)
    asked = contexts(options)

    record.evaluation(0, 0.0, step.evaluate(model, val_rows, ranks, options.micro_batch, options.seq_len))
    say(f"before training: held-out loss {record.before.loss:.4f} nats a target, {record.before.bits:.4f} bits per character of mine")
    bar = tqdm(total=plan.steps, unit="step", disable=not ranks.first, dynamic_ncols=True)
    for number, rows in enumerate(batches(train_rows, plan, options.seed), 1):
        began = time.perf_counter()
        lr = lr_at(number, plan.steps, plan.lr, options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        try:
            micro = step.micro_batches(rows, options.micro_batch, ranks, options.seq_len)
            loss, norm, targets = step.train_step(model, optimizer, micro, ranks, options.clip)
        except step.NotFinite as error:
            if record.best is None:
                record.save()  # the weights are those of the step before
            raise UserError(
                f"step {number}: {error}; {options.out} holds the model as it was {'at its best' if record.best else 'before'}",
                f"Try a smaller --lr, or look at train.jsonl, lines {sorted({int(s) + 1 for row in rows for s in row.sessions})}.",
            ) from None
        except torch.OutOfMemoryError:
            raise UserError(
                f"step {number}: the GPU has no room for {options.micro_batch} rows of {options.seq_len} tokens",
                "Take fewer at a time: --micro-batch 1 (the result is the same), --recompute full, --qlora, or a shorter --seq-len.",
            ) from None
        line = measure(number, loss, lr, norm, targets, rows, model, time.perf_counter() - began, peak, ranks.device)
        record.write(line)
        if model.compiled:
            record.count_graphs(number)
        bar.set_postfix_str(POSTFIX.format(**line))
        bar.update()
        if number in plan.evaluate_at:
            point = record.evaluation(
                number, number / plan.epoch, step.evaluate(model, val_rows, ranks, options.micro_batch, options.seq_len)
            )
            say(f"epoch {point.epoch:.2f}: held-out loss {point.loss:.4f}, {point.bits:.4f} bits per character{record.compare(point)}")
            for who, said, wrote, answer in answers(model, words, asked, ranks, options.seed):
                say(f"    {who}: {said}\n      you wrote: {wrote}\n      it writes: {answer}")
            if record.best is point:
                record.save()
            elif options.max_steps is None and record.since_best >= options.patience:
                break
    bar.close()
    if model.compiled:
        say(f"{step.compiled_graphs()} graphs were compiled, the last in step {record.compiled_at}")
    say(record.finish())
    if ranks.world > 1:
        torch.distributed.destroy_process_group()


# --- before the weights load


def prepare(options):
    """Everything a person may have to mend, checked before time is spent. → (base folder, ModelConfig, Ranks, Tokenizer)"""
    for part in ("train", "val"):
        if not (Path(options.data) / f"{part}.jsonl").is_file():
            raise UserError(
                f"{options.data}/{part}.jsonl is missing: there is nothing to train on",
                "Make it from your export: python data.py result.json",
            )
    least = {"batch": 1, "micro_batch": 1, "lora_rank": 1, "patience": 1, "max_steps": 1, "seq_len": 16, "samples": 0}
    above = {"lr": 0, "epochs": 0, "clip": 0}
    for name, limit in {**least, **above}.items():
        value, flag_ = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is not None and not (value > limit if name in above else value >= limit):
            bound = f"{'more than' if name in above else 'at least'} {limit}"
            raise UserError(f"{flag_} {value}: {bound} is needed", f"Leave {flag_} out for the default.")
    if not 0 <= options.lora_dropout < 1:
        raise UserError(f"--lora-dropout {options.lora_dropout} is no share", "0 drops nothing, 0.1 every tenth input.")
    if options.lora and options.pure_bf16:
        raise UserError("--pure-bf16 is for full fine-tuning: an adapter's fp32 masters are small", "Leave one of them out.")
    if options.pure_bf16 and options.dtype == "fp32":
        raise UserError("--pure-bf16 computes in bf16, --dtype fp32 does not", "Leave one of them out.")
    if options.from_scratch and options.lora:
        raise UserError("--from-scratch trains all weights, --lora none of the base's", "Leave one of them out.")
    config.keep_apart(options.out, options.model, options.data)
    ranks = step.start(options.device)
    config.check_folder(options.out, options.overwrite or not ranks.first)
    local = Path(options.model).is_dir()
    if ranks.device.type == "cpu" and not options.device and (not local or checkpoint.read_config(options.model).num_parameters > BIG):
        raise UserError(
            f"No GPU here: on a CPU {options.model} would train for weeks.",
            "Rent one with a GPU (24 GB is enough for --lora), take a small base with --model FOLDER, or insist with --device cpu.",
        )
    folder = in_turn(ranks, lambda: checkpoint.resolve(options.model))
    if checkpoint.is_adapter(folder):
        raise UserError(
            f"{folder} is an adapter, not a base",
            f"Merge it first: python lora.py merge {folder} clone/",
        )
    shape, words = checkpoint.read_config(folder), tokenizers.load(folder)
    if not options.from_scratch:
        checkpoint.open_files(folder)
    uneven = [n for n in (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * shape.head_dim) if n % quantize.BLOCK]
    if options.qlora and uneven:
        raise UserError(f"--qlora keeps weights in blocks of {quantize.BLOCK}; {folder} has layers {uneven[0]} wide", "Take --lora.")
    if options.seq_len > shape.max_position_embeddings:
        raise UserError(f"--seq-len {options.seq_len}: {folder} was made for {shape.max_position_embeddings} tokens", "Take shorter rows.")
    return folder, checkpoint.with_vocabulary(shape, words.rows_needed), ranks, words


def rows_of(options, part, words):
    """The packed rows of train or val; what is held out is always measured on my turns."""
    rows = data.rows(Path(options.data) / f"{part}.jsonl", words, options.seq_len, options.loss_on if part == "train" else "me")
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


def recompute(options, shape, ranks, plan, ways):
    """What the backward pass makes anew: as asked, or as little as the GPU's free memory allows, by prediction."""
    if options.recompute != "auto":
        return options.recompute
    if ranks.device.type != "cuda":
        return "full" if shape.num_parameters > BIG else "none"
    best = "full"
    if ranks.first:
        free = torch.cuda.mem_get_info(ranks.device)[0] - RESERVE
        times = min(2, math.ceil(plan.batch / ranks.world / options.micro_batch))
        ask = functools.partial(step.predict, shape, options.micro_batch, options.seq_len, times, ranks.world, **ways)
        with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:  # own process groups
            needs = {kind: pool.submit(ask, recompute=kind) for kind in RECOMPUTE}
            best = next((kind for kind, need in needs.items() if need.result() < free), best)
    return RECOMPUTE[ranks.share(RECOMPUTE.index(best))]


def in_turn(ranks, work):
    """`work()` on rank 0 first (it may download, write a cache), then on the others."""
    result = work() if ranks.first else None
    ranks.barrier()
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
    batch, epochs = options.batch, options.epochs
    if options.max_steps is None and math.ceil(rows / batch) * epochs < FEWEST_STEPS:
        batch = max(1, min(batch, int(rows * epochs / FEWEST_STEPS)))
        epochs = max(epochs, FEWEST_STEPS / math.ceil(rows / batch))
    epoch = math.ceil(rows / batch)
    steps = options.max_steps if options.max_steps is not None else math.ceil(epoch * epochs)
    every = max(1, epoch // EVALUATIONS)
    lr = options.lr or (2e-4 if options.lora else 2e-5)
    return Plan(batch, epoch, steps, lr, frozenset({*range(every, steps + 1, every), steps}))


def describe(options, shape, ranks, dtype, train_rows, val_rows, plan):
    targets = sum(int((row.labels != data.IGNORED).sum()) for row in train_rows)
    kind = "QLoRA" if options.qlora else "LoRA" if options.lora else "full fine-tuning"
    what = f"{kind} of {options.model} ({shape.num_parameters / 1e6:,.1f}M parameters)"
    full = data.filled(train_rows, options.seq_len)
    text = (
        f"{what} on {ranks.world} x {ranks.device.type}, {short(dtype)}\n"
        f"{len(train_rows):,} rows of {options.seq_len:,} tokens, {full:.1%} filled, {targets:,} of the tokens trained; "
        f"{len(val_rows):,} rows held out\n"
        f"{plan.steps:,} steps of {plan.batch} rows, {plan.steps / plan.epoch:.1f} epochs"
    )
    if plan.batch < options.batch or targets < LITTLE:
        text += f"\nThis is little data ({targets:,} tokens of mine): expect the tone and the favourite words rather than the knowledge."
    return text


def short(dtype):
    return str(dtype).removeprefix("torch.")


def batches(rows, plan, seed):
    """Yield `plan.steps` lists of rows: every row once an epoch, each epoch in an order of its own."""
    done, epoch = 0, 0
    while True:
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        for begin in range(0, len(rows), plan.batch):
            if done == plan.steps:
                return
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


def measure(number, loss, lr, norm, targets, rows, model, seconds, peak, device):
    """A step's line of metrics.jsonl. `peak`: FLOP/s of all ranks together."""
    tokens, (needed, done) = sum(len(row.ids) for row in rows), step.flops(model, rows)
    return {
        "step": number,
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens": tokens,
        "trained_tokens": targets,
        "tok_per_s": tokens / seconds,
        "mfu": needed / seconds / peak,
        "hfu": done / seconds / peak,
        "peak_gib": step.peak_gib(device),
        "seconds": seconds,
    }


def contexts(options):
    """A few held-out moments, spread over time: (the turns before, what I wrote then)."""
    found = []
    for talk in data.load_sessions(Path(options.data) / "val.jsonl"):
        mine = next((i for i, turn in enumerate(talk.turns) if turn.me and i > 0), None)
        if mine:
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
    """The run's folder: metrics line by line, the best weights, `run.json`. Rank 0 writes; all know `before` and `best`."""

    def __init__(self, options, plan, folder, words, model, ranks, dtype):
        self.options, self.folder, self.words, self.model, self.ranks = options, folder, words, model, ranks
        self.out, self.began, self.before, self.best, self.last = Path(options.out), time.time(), None, None, None
        self.since_best = self.graphs = self.compiled_at = 0
        if not ranks.first:
            return
        config.private_folder(self.out)
        checkpoint.clear(self.out)
        self.metrics = open(self.out / "metrics.jsonl", "w", encoding="utf-8")
        words.save(self.out)
        persona = Path(options.data) / "persona.json"
        if persona.exists():
            (self.out / "persona.json").write_bytes(persona.read_bytes())
        self.run = {
            "config": dataclasses.asdict(options),
            "plan": {**dataclasses.asdict(plan), "evaluate_at": sorted(plan.evaluate_at), "recompute": model.recompute},
            "base": str(folder),
            "commit": commit(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "device": torch.cuda.get_device_name() if ranks.device.type == "cuda" else f"{ranks.device.type} ({platform.machine()})",
            "world": ranks.world,
            "compiled": model.compiled,
            "dtype": short(dtype),
        }
        config.write_json(self.out / "run.json", self.run)

    def write(self, line):
        if self.ranks.first:
            self.metrics.write(json.dumps(line) + "\n")
            self.metrics.flush()

    def count_graphs(self, number):
        if self.graphs != step.compiled_graphs():
            self.graphs, self.compiled_at = step.compiled_graphs(), number

    def evaluation(self, number, epoch, found):
        """Note an Evaluation after step `number`; the one at step 0 is what the others are compared with, never the best. → Point"""
        self.write({"step": number, "epoch": epoch, **found.metrics})
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
        return "" if point is self.best else f" (the best was {self.best.loss:.4f})"

    def save(self):
        """Make the folder what the model is now; every rank must call."""
        if not self.options.lora:
            checkpoint.save_model(self.model, self.out, self.words)
            return
        tensors = {name: checkpoint.full(p.detach()) for name, p in lora.trained(self.model).items()}
        if self.ranks.first:
            base = self.folder.resolve() if Path(self.options.model).is_dir() else self.options.model
            lora.save(self.model, self.out, base, tensors)

    def finish(self):
        """Close the folder. → what came of it, in words"""
        before, best, last = self.before, self.best, self.last
        if self.ranks.first:
            self.metrics.close()
            result = {
                "loss_before": before.loss,
                "loss": best.loss,
                "bits_before": before.bits,
                "bits": best.bits,
                "epoch": best.epoch,
                "steps": last.step,
                "seconds": round(time.time() - self.began, 1),
            }
            config.write_json(self.out / "run.json", self.run | {"result": result})
            draw(self.out)
        text = f"best at epoch {best.epoch:.1f}: {before.loss:.2f} → {best.loss:.2f} nats a target"
        text += f", {before.bits:.3f} → {best.bits:.3f} bits per character"
        if last is not best:
            text += "; later steps overfit and were discarded"
        if best.loss >= before.loss:
            text += "\nNothing was gained on held-out text: the base knew as much. More data, or a smaller --lr, may help."
        return f"{text}\nTalk to it: python chat.py {self.options.out}"


def draw(folder):
    """`loss.png`, where matplotlib is installed: the training and held-out loss of `metrics.jsonl`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
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
