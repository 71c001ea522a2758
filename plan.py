"""Before renting: does it fit, how long does it take, what does it cost?

    python plan.py --gpu 3090 --lora

Memory is counted on the model that trains, by running a step on fake tensors: on models of three
and four blocks, because every further block adds the same. Time is exact FLOPs and bytes over what
a GPU is rated for, times an efficiency; the answer says whether that was measured by us, derived
from a published figure, or assumed. docs/PLAN.md compares both with measurements.
"""

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import cli
import data
from cli import UserError, flag
from model import ModelConfig
from training import cost, memory, metrics, step
from weights import devices, hf, hub
from weights.load import chat_memory
from weights.tokenizer import load_tokenizer


def read_bases() -> dict[str, dict]:
    """Read bases.toml: {hub id: its fields, with those of the base that it is `like`}."""
    path = Path(__file__).parent / "weights" / "bases.toml"
    bases = tomllib.loads(path.read_text(encoding="utf-8"))
    for name, fields in bases.items():  # the base that it is like comes before it
        bases[name] = {**bases.get(fields.pop("like", ""), {}), **fields}
    return bases


BASES = read_bases()
CONFIG_FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
BASE_CONFIGS = {  # known without asking the hub
    name: ModelConfig(**{key: fields[key] for key in CONFIG_FIELDS if key in fields})
    for name, fields in BASES.items()
}
ORIGINAL_SESSIONS = 15_789  # sessions that the first doppelganger was trained on
NETWORK_BYTES_PER_S = 50e6  # of a rented machine, assumed
VENV_BYTES = 7.0e9  # the virtual environment with CUDA on disk
VENV_DOWNLOAD_BYTES = 3.0e9
VENV_UNPACK_SECONDS = 180
START_SECONDS = 150  # to read a 7B's weights, compile and try the longest rows, assumed
VAL_SHARE = 0.05  # of the sessions, by data.py's default
EVALUATIONS_PER_EPOCH = 4
# Tokens of a text without a tokenizer: on our example right to 1%.
BYTES_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4  # its marks
TOKENS_PER_TURN = 7  # its header and end


# --- how much there is to train


@dataclasses.dataclass(frozen=True)
class DatasetSize:
    """The training data of one epoch."""

    rows: int  # full ones
    target_share: float  # of the tokens
    doc_length: float  # mean tokens of a document
    source: str  # how this is known


def dataset_size(options: "Options", folder: Path | None) -> DatasetSize:
    """Count the rows of --data with the tokenizer in `folder`, or estimate them without one.

    Without --data: those of --tokens, or of as many sessions as the original's.
    """
    if options.data is None:
        tokens: float = options.tokens or ORIGINAL_SESSIONS * cost.SESSION_TOKENS
        sessions = f"{ORIGINAL_SESSIONS:,} sessions of {cost.SESSION_TOKENS} tokens"
        source = f"no --data: assumes the original's {sessions}"
        if options.tokens:
            source = f"{tokens:,} tokens an epoch"
        count = math.ceil(tokens / options.seq_len / cost.FILL_SHARE)
        return DatasetSize(count, cost.TARGET_SHARE, cost.SESSION_TOKENS, source)
    path = Path(options.data) / "train.jsonl"
    if not path.is_file():
        raise UserError(
            f"--data {options.data}: there is no train.jsonl",
            "Make it: python data.py result.json. Or say --tokens N.",
        )
    if folder and any((folder / name).exists() for name in hf.TOKENIZER_FILES):
        rows = data.load_rows(path, load_tokenizer(folder), options.seq_len)
        sizes = metrics.step_sizes(rows)
        tokens, targets, count = sizes.tokens, sizes.targets, len(rows)
        documents = sum(len(row.doc_lengths) for row in rows)
        source = f"{path}, by the model's own tokenizer"
    else:
        tokens, targets, documents = estimate_tokens(path)
        count = math.ceil(tokens / options.seq_len / cost.FILL_SHARE)
        source = f"{path}, estimated at {BYTES_PER_TOKEN} bytes a token: no tokenizer at hand"
    if not targets:
        raise UserError(f"{path} has no turn of mine in it", "Run data.py again.")
    return DatasetSize(count, targets / tokens, tokens / documents, source)


def estimate_tokens(path: Path) -> tuple[float, float, int]:
    """Estimate the tokens and targets of a data/*.jsonl by its bytes, and count its sessions."""
    tokens = targets = 0.0
    sessions = list(data.load_sessions(path))
    for turn in (turn for session in sessions for turn in session.turns):
        size = sum(len(text.encode()) / BYTES_PER_TOKEN for text in turn.messages)
        size += TOKENS_PER_MESSAGE * len(turn.messages)
        tokens += size + TOKENS_PER_TURN
        targets += size if turn.me else 0
    return tokens, targets, len(sessions)


# --- which base


class Base(NamedTuple):
    config: ModelConfig  # with room for our special tokens
    added: Sequence[int]  # their rows in the vocabulary, where they are new
    folder: Path | None


def fetch_config(model: str) -> Path:
    """Fetch config.json as `hub.fetch_config`; a refusal names the bases that need no hub."""
    try:
        return hub.fetch_config(model)
    except UserError as error:
        problem, hint = str(error).split("\n", 1)
        known = ", ".join(BASE_CONFIGS)
        raise UserError(problem, f"{hint} plan.py knows without the hub: {known}") from None


def base_config(model: str) -> Base:
    """Resolve a folder, a known name, or a hub id by its config.json."""
    folder = Path(model) if Path(model).is_dir() else hub.cached_folder(model)
    if folder:
        hf.refuse_adapter(folder)
        try:
            tokenizer = load_tokenizer(folder)
            return Base(hf.config_for_tokenizer(folder, tokenizer), tokenizer.added, folder)
        except UserError:  # no tokenizer in it
            config = hf.read_config(folder)
    elif model in BASE_CONFIGS:
        config = BASE_CONFIGS[model]
    else:
        config = hf.read_config(fetch_config(model))
    if BASES.get(model, {}).get("chatml"):
        return Base(config, (), folder)
    size = config.vocab_size
    return Base(hf.with_vocab_size(config, size + 2), (size, size + 1), folder)


# --- the command


@dataclasses.dataclass(frozen=True)
class Options:
    """Estimate a training run before renting: does it fit, how long, how much money?"""

    gpu: str | None = flag(
        None,
        f"{', '.join(cost.GPUS)}, cpu; or its memory: 16gb as advertised, 15.6gib as torch finds",
        shown="this machine's",
        group="the GPU",
    )
    gpus: int = flag(1, "number of GPUs, in one machine")
    price: float | None = flag(None, "$ a GPU-hour", shown=f"a rough range of {cost.PRICES}")

    lora: bool = flag(
        False,
        "as in train.py; without any of these three: all weights, with fp32 masters",
        group="the run",
    )
    qlora: bool = flag(False, "as in train.py")
    pure_bf16: bool = flag(False, "as in train.py")
    model: str = flag(hub.DEFAULT_BASE, "folder or hub id, for its config.json")
    lora_rank: int = flag(32, "rank of the adapter")
    data: str | None = flag(None, "folder that data.py wrote, to count the rows")
    tokens: int | None = flag(None, "tokens of one epoch, instead of --data")
    epochs: float = flag(3.0, "passes over the data")
    batch: int = flag(8, "rows a step, over all GPUs")
    seq_len: int = flag(1024, "tokens a row")

    check: bool = flag(
        False, "ask the hub if this account may download the base", group="the answer"
    )
    measure: bool = flag(
        False, "time some steps on this machine's GPU, and go by that; a CPU is always timed"
    )
    json: bool = flag(False, "print JSON")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A training run, and how it uses its GPUs."""

    options: Options
    gpu: cost.GPU
    dataset: DatasetSize
    steps: cost.StepCounts
    work: cost.StepWorkload
    choice: cost.Choice
    step_seconds: float
    timed: bool  # on this machine, not estimated


def main() -> None:
    options = cli.parse(Options)
    options = dataclasses.replace(options, lora=options.lora or options.qlora)
    gpu = validate(options)
    if options.check and not Path(options.model).is_dir():
        print(hub.check_access(options.model), flush=True)
    plan = make_plan(options, gpu)
    answer = estimate(plan)
    print(json.dumps(answer) if options.json else format_report(plan, answer))


def make_plan(options: Options, gpu: cost.GPU) -> Plan:
    """Choose the fastest micro-batch that fits; time it on a CPU, or with --measure."""
    base = base_config(options.model)
    step.check_trainable(options, base.config)
    dataset = dataset_size(options, base.folder)
    steps = cost.plan_steps(dataset.rows, options.batch, options.epochs)
    added = base.added
    adapter = {"rank": options.lora_rank, "alpha": 16, "rows": added} if options.lora else None
    spec = step.ModelSpec(adapter, nf4=options.qlora, pure_bf16=options.pure_bf16)
    cpu = gpu is cost.CPU
    if cpu:
        dtype = devices.default_dtype(torch.device("cpu"))
        spec = dataclasses.replace(spec, dtype=dtype)
        gpu = cost.this_cpu(dtype)
    work = cost.StepWorkload(
        base.config,
        spec,
        rows=math.ceil(steps.batch / options.gpus),
        seq_len=options.seq_len,
        world=options.gpus,
        target_share=dataset.target_share,
        doc_length=dataset.doc_length,
        compiled=not cpu,
        cpu=cpu,
    )
    free = gpu.gib * devices.GIB - (0 if cpu else memory.CUDA_RESERVE)
    choice = cost.choose_micro_batch(work, gpu, free, [1, 2][: work.rows] if cpu else None)
    seconds, timed = choice.seconds, cpu or options.measure
    if timed:  # one GPU on full rows; the estimates of this and of the real step scale it
        alone = dataclasses.replace(work, world=1, fill_share=1.0)
        seconds /= alone.seconds(gpu, choice.micro_batch, choice.ac_mode)
        seconds *= cost.time_step(work, choice, torch.device("cpu") if cpu else None)
    return Plan(options, gpu, dataset, steps, work, choice, seconds, timed)


def validate(options: Options) -> cost.GPU:
    """Return the GPU of --gpu; UserError for flags that can't be, or not together."""
    cli.check_ranges(
        options,
        {"gpus": 1, "batch": 1, "seq_len": 16, "lora_rank": 1, "tokens": 1},
        ("epochs", "price"),
    )
    if options.tokens is not None and options.data is not None:
        raise UserError("--tokens and --data can't be combined", "Leave one of them out.")
    if not options.gpu:
        if not torch.cuda.is_available():
            raise UserError(
                "this machine has no GPU: --gpu says which one to plan for",
                f"Known: {cost.KNOWN_GPUS}.",
            )
        return cost.gpu_from_name(torch.cuda.get_device_name())
    if options.gpu.lower() == "cpu":
        if options.gpus > 1:
            raise UserError(f"--gpus {options.gpus}: --gpu cpu plans for one", "Leave --gpus out.")
        return cost.CPU
    if gib := memory_size(options.gpu):
        return gpu_of_memory(f"GPU with {gib:.4g} GiB", gib)
    name = cost.find_gpu(options.gpu)
    if not name:
        similar = cost.similar_gpus(options.gpu)
        hint = f"Did you mean {' or '.join(similar)}? " if similar else ""
        raise UserError(f"--gpu {options.gpu} is not known", f"{hint}Known: {cost.KNOWN_GPUS}.")
    gpu = cost.GPUS[name]
    if gpu.basis == cost.UNKNOWN_GPU:
        return gpu_of_memory(gpu.name, gpu.gib)
    if not gpu.peak:
        refuse_training(options, gpu)
    return gpu


def refuse_training(options: Options, gpu: cost.GPU) -> None:
    """Raise UserError for a GPU that doesn't train, saying what it needs to chat."""
    needs = []
    for name, size in chat_memory(base_config(options.model).config, 2048).items():
        needs.append(f"{size / devices.GIB:.1f} GiB in {name}")
    chat = f"To chat, {options.model} needs {', '.join(needs)}; it has {gpu.gib:.1f} GiB."
    if gpu.basis != cost.NO_BF16:
        raise UserError(f"--gpu {options.gpu}: the {gpu.name} can only chat, not train", chat)
    # train.py doesn't refuse: torch 2.13 computes bf16 there by way of fp32, torch.compile skips
    # it, and attention has no kernel for it below sm_80, so all its scores are held.
    raise UserError(
        f"--gpu {options.gpu}: the {gpu.name} has no bf16: "
        "train.py is slow on it and needs more memory, unknown how much",
        f"Take a GPU from Ampere on, such as a 3060 (--gpu {gpu.gib:g}gib counts as if it had "
        f"bf16). {chat}",
    )


def gpu_of_memory(name: str, gib: float) -> cost.GPU:
    """Return a GPU that is known only by its memory; its speed only ranks what fits."""
    return cost.GPU(name, gib, 800, 100, 0.6, cost.UNKNOWN_GPU, 12)


def memory_size(text: str) -> float | None:
    """Read `16gb`, `16 GB` or `15.6GiB` as the GiB that torch finds; None if it isn't a size.

    Of a whole number of GB, as advertised, torch finds 3% less: the driver keeps some.
    """
    match = re.fullmatch(r"\s*(\d{1,5}(?:\.\d+)?)[\s-]*g(i?)b?\s*", text.lower())
    if not match or not float(match[1]):
        return None
    size = float(match[1])
    return 0.97 * size if size.is_integer() and not match[2] else size


# --- the answer


def estimate(plan: Plan) -> dict:
    """Estimate memory, time, money and disk: the object that --json prints."""
    options, gpu, steps = plan.options, plan.gpu, plan.steps
    hours, setup = training_hours(plan), setup_hours(plan)
    prices = gpu.price if options.price is None else (options.price, options.price)
    training_cost = [round(price * options.gpus * hours, 2) for price in prices]
    setup_cost = [round(price * options.gpus * setup, 2) for price in prices]
    total_cost = [round(sum(pair), 2) for pair in zip(training_cost, setup_cost)]
    tokens = steps.batch * options.seq_len * cost.FILL_SHARE
    answer = {
        "fits": plan.choice.fits,
        "gib_per_gpu": gib_per_gpu(plan),
        "micro_batch": plan.choice.micro_batch,
        "recompute": plan.choice.ac_mode,
        "rows": plan.dataset.rows,
        "batch": steps.batch,
        "steps": steps.total,
        "tok_per_s": round(tokens / plan.step_seconds, 1),
        "efficiency": cost.TIMED_HERE if plan.timed else gpu.basis,
        "hours": round(hours, 3),
        "setup_hours": round(setup, 3),
        "cost": round(sum(total_cost) / 2, 2),
        "cost_range": total_cost,
        "cost_of_training": training_cost,
        "cost_of_setup": setup_cost,
        "disk_gb": disk_gb(plan),
    }
    unknown_time = gpu.basis == cost.UNKNOWN_GPU and not options.measure
    if unknown_time:
        answer |= dict.fromkeys(("tok_per_s", "efficiency", "hours"))
    if unknown_time or not (any(prices) or plan.work.cpu):
        answer |= dict.fromkeys(("cost", "cost_range", "cost_of_training", "cost_of_setup"))
    return answer


def gib_per_gpu(plan: Plan) -> dict[str, float]:
    """List what one GPU holds, the reserve, their total, and what the GPU has."""
    work, choice = plan.work, plan.choice
    reserve = work.required_bytes(choice.memory) - choice.bytes
    reserve += 0 if work.cpu else memory.CUDA_RESERVE
    sizes = {kind: choice.memory.get(kind, 0) for kind in cost.MEMORY_KINDS}
    sizes |= {"reserve": reserve, "total": choice.bytes + reserve}
    gib = {name: round(size / devices.GIB, 2) for name, size in sizes.items()}
    return gib | {"card": round(plan.gpu.gib, 2)}


def training_hours(plan: Plan) -> float:
    """Estimate the hours of training: the start, the steps, and evaluations (forward only)."""
    flops = plan.work.flops
    val_rows = VAL_SHARE / (1 - VAL_SHARE)  # for each training row
    evaluations = EVALUATIONS_PER_EPOCH * val_rows * flops.blocks_forward / flops.total
    seconds = plan.steps.total * plan.step_seconds * (1 + evaluations)
    return (seconds + (0 if plan.work.cpu else START_SECONDS)) / 3600


def setup_hours(plan: Plan) -> float:
    """Estimate the hours to install on a rented machine and to download the base."""
    seconds = 0.0
    if not plan.work.cpu:
        seconds += VENV_DOWNLOAD_BYTES / NETWORK_BYTES_PER_S + VENV_UNPACK_SECONDS
    if not Path(plan.options.model).is_dir():
        seconds += 2 * plan.work.config.num_parameters / NETWORK_BYTES_PER_S
    return seconds / 3600


def disk_gb(plan: Plan) -> dict[str, float]:
    """Estimate the disk: three checkpoints at most, and the best model while it is replaced."""
    options, trained = plan.options, plan.work.trainable_parameters
    base = 2 * plan.work.config.num_parameters
    best = 4 * trained if options.lora else base
    checkpoint = trained * (6 if options.pure_bf16 else 12)
    sizes = {"base": base, "installed": VENV_BYTES, "saves": 3 * checkpoint, "best": 2 * best}
    sizes["total"] = sum(sizes.values())
    return {name: round(size / 1e9, 1) for name, size in sizes.items()}


def format_report(plan: Plan, answer: dict) -> str:
    """Format the answer for a person."""
    options, choice = plan.options, plan.choice
    gib, disk = answer["gib_per_gpu"], answer["disk_gb"]
    method = "full fine-tuning in pure bf16" if options.pure_bf16 else "full fine-tuning"
    if options.lora:
        method = "QLoRA" if options.qlora else "LoRA"
    size = f"{plan.work.config.num_parameters / 1e9:.2f}B parameters"
    verdict = "fits"
    if not choice.fits:
        verdict = f"does NOT fit: needs at least {gib['total']:.1f} GiB, has {gib['card']:.1f}"
    kinds = [kind for kind in (*cost.MEMORY_KINDS, "reserve") if gib[kind] >= 0.05]
    parts = " + ".join(f"{kind} {gib[kind]:.1f}" for kind in kinds)
    batch = f"{cli.counted(answer['batch'], 'rows')} of {options.seq_len:,} tokens"
    at_a_time = f"{choice.micro_batch} at a time" + ("" if plan.work.cpu else " on a GPU")
    epochs = f"{plan.steps.total / plan.steps.per_epoch:.3g} epochs"
    counts = f"{cli.counted(answer['rows'], 'rows')}, {cli.counted(answer['steps'], 'steps')}"
    sections = {
        "memory" if options.gpus == 1 else "memory on each": (
            f"{parts} = {gib['total']:.1f} of {gib['card']:.1f} GiB"
        ),
        "a step": f"{batch}, {at_a_time}, activation checkpointing {choice.ac_mode}",
        "data": f"{counts}, {epochs} ({plan.dataset.source})",
        "speed": format_speed(plan, answer),
        "time": format_time(answer),
        "money": format_money(plan, answer),
        "disk": f"base {disk['base']} + Python {disk['installed']} + saves {disk['saves']} "
        f"+ the best model twice {disk['best']} = {disk['total']} GB",
    }
    if not choice.fits:
        sections["to make it fit"] = "; ".join(suggestions(plan, gib["total"]))
    title = f"{method} of {options.model} ({size}) on {options.gpus} x {plan.gpu.name}: {verdict}"
    return "\n".join([title, *(f"  {name:<16}{text}" for name, text in sections.items())])


def format_speed(plan: Plan, answer: dict) -> str:
    gpu, basis = plan.gpu, answer["efficiency"]
    if basis is None:
        return "unknown: only this GPU's memory is known; one without bf16 needs more"
    share = f", {gpu.efficiency:.0%} of {gpu.peak:,.3g} TFLOP/s in matmuls"
    if basis == cost.TIMED_HERE:
        share = ""
    return f"{answer['tok_per_s']:,.0f} tok/s{share} ({basis})"


def format_time(answer: dict) -> str:
    text = "unknown"
    if answer["hours"] is not None:
        text = f"{cost.format_hours(answer['hours'])} of training"
    if answer["setup_hours"]:
        setup = f"before it {cost.format_hours(answer['setup_hours'])} to install and download"
        text += f"; {setup} (at {8 * NETWORK_BYTES_PER_S / 1e6:.0f} Mbit/s, assumed)"
    return text


def format_money(plan: Plan, answer: dict) -> str:
    if answer["hours"] is None:
        return "unknown, as the time is"
    if not any(answer["cost_range"] or ()):
        return "no price known"
    training, setup = map(format_dollars, (answer["cost_of_training"], answer["cost_of_setup"]))
    price = f"{format_dollars(plan.gpu.price)} ({cost.PRICES}, rough)"
    if plan.options.price is not None:
        price = f"${plan.options.price:.2f}"
    total = format_dollars(answer["cost_range"])
    return f"{training} training + {setup} setup = {total}, at {price} a GPU-hour"


def format_dollars(prices) -> str:
    low, high = prices
    return f"${low:.2f}" if low == high else f"${low:.2f} to {high:.2f}"


def suggestions(plan: Plan, gib: float) -> list[str]:
    """List what would make the run fit, which needs `gib` now."""
    larger = ", ".join(name for name, gpu in cost.GPUS.items() if gpu.peak and gpu.gib >= gib)
    candidates = {
        f"a GPU with more memory ({larger})": larger,
        "--lora": not plan.options.lora,
        "--qlora": not plan.options.qlora,
        "more --gpus": not plan.work.cpu,
    }
    return [text for text, helps in candidates.items() if helps]


if __name__ == "__main__":
    cli.run(main, cli.TRAINING_MMAP_BYTES)
