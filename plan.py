"""Before renting: does it fit, how many hours, how much money? `python plan.py --gpu 3090 --lora`

Memory is counted on the very model that trains, by running its step on fake tensors (`step.moments`): on models of three and four blocks,
because every further block adds the same. Time is exact FLOPs and bytes over what a card is said to do, times an efficiency, of which
the answer says whether it was measured by us, derived from a published figure, or assumed. docs/PLAN.md holds both against measurements.
"""

import dataclasses
import json
import math
import re
import tomllib
from pathlib import Path

import torch

import cli
import data
from cli import UserError, flag
from model import AC_MODES, ModelConfig
from training import cost, memory, metrics, step
from weights import devices, hf, hub
from weights.load import chat_memory
from weights.tokenizer import load_tokenizer


def read_bases() -> dict[str, dict]:
    """bases.toml → {hub id: what it says, with what it takes from the base that it is `like`}"""
    path = Path(__file__).parent / "weights" / "bases.toml"
    bases = tomllib.loads(path.read_text(encoding="utf-8"))
    for name, said in bases.items():  # the one that it is like stands above it
        bases[name] = {**bases.get(said.pop("like", ""), {}), **said}
    return bases


BASES = read_bases()
CONFIG_FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
BASE_CONFIGS = {  # what needs no look at the hub
    name: ModelConfig(**{key: said[key] for key in CONFIG_FIELDS if key in said})
    for name, said in BASES.items()
}
TALK_SESSIONS = 15_789  # sessions that the first doppelganger was made of
NETWORK_BYTES_PER_S = 50e6  # bytes/s to a rented machine, assumed
INSTALLED = (
    7.0e9,
    3.0e9,
    180,
)  # bytes of the virtual environment with CUDA, bytes to download for it, seconds to unpack
START_SECONDS = 150  # seconds to read a 7B's weights, compile and try the longest rows, assumed
BYTES_PER_TOKEN, PER_MESSAGE, PER_TURN = (
    4,
    4,
    7,
)  # tokens of a text: bytes each holds, and what the marks around add; our example's to 1%


# --- how much there is to train


@dataclasses.dataclass(frozen=True)
class DatasetSize:
    """Of one epoch: full `rows`, the share of tokens with a target, tokens in a document; `known`: from what."""

    rows: int
    labelled: float
    document: float
    known: str


def dataset_size(options, folder):
    """By the model's own tokenizer where its `folder` is at hand, else by the letters; without data, the original's. → Amount"""
    length = options.seq_len
    if options.tokens is not None:
        return DatasetSize(
            math.ceil(options.tokens / length / cost.FILL_SHARE),
            cost.TARGET_SHARE,
            cost.SESSION_TOKENS,
            f"{options.tokens:,} tokens an epoch, as you say",
        )
    if options.data is None:
        known = f"no --data: as many sessions as the original's, {TALK_SESSIONS:,}, of {cost.SESSION_TOKENS} tokens each"
        return DatasetSize(
            math.ceil(TALK_SESSIONS * cost.SESSION_TOKENS / length / cost.FILL_SHARE),
            cost.TARGET_SHARE,
            cost.SESSION_TOKENS,
            known,
        )
    path = Path(options.data) / "train.jsonl"
    if not path.is_file():
        raise UserError(
            f"--data {options.data}: there is no train.jsonl",
            "Make it: python data.py result.json. Or say --tokens N.",
        )
    if folder and any((folder / name).exists() for name in hf.TOKENIZER_FILES):
        rows = data.load_rows(path, load_tokenizer(folder), length)
        tokens, labelled, documents = (
            sum(len(r.ids) for r in rows),
            sum(int((r.labels != data.IGNORE_INDEX).sum()) for r in rows),
            sum(len(r.doc_lengths) for r in rows),
        )
        if not rows:
            raise UserError(f"{path} has no turn of mine in it", "Make it anew with data.py.")
        return DatasetSize(
            len(rows),
            labelled / tokens,
            tokens / documents,
            f"{path}, by the model's own tokenizer",
        )
    talks = list(data.load_sessions(path))
    texts = [
        (turn, sum(len(m.encode()) / BYTES_PER_TOKEN + PER_MESSAGE for m in turn.messages))
        for talk in talks
        for turn in talk.turns
    ]
    tokens, mine = sum(n + PER_TURN for _, n in texts), sum(n for turn, n in texts if turn.me)
    if not mine:
        raise UserError(f"{path} has no turn of mine in it", "Make it anew with data.py.")
    known = f"{path}, guessed by its letters ({BYTES_PER_TOKEN} bytes a token), because the model's tokenizer isn't here"
    return DatasetSize(
        math.ceil(tokens / length / cost.FILL_SHARE), mine / tokens, tokens / len(talks), known
    )


def fetch_config(model: str) -> Path:
    """`checkpoint.fetch_config`, whose refusal also names what is planned without the hub."""
    try:
        return hub.fetch_config(model)
    except UserError as error:
        problem, way_out = str(error).split("\n", 1)
        known = ", ".join(BASE_CONFIGS)
        raise UserError(problem, f"{way_out} plan.py knows without the hub: {known}") from None


def base_config(model):
    """A folder, a known name or a hub id (its config.json alone is fetched).

    → (ModelConfig with room for our special tokens, the rows that are new, its folder or None)
    """
    folder = Path(model) if Path(model).is_dir() else hub.cached_folder(model)
    if folder:
        hf.refuse_adapter(folder)
        try:
            tokenizer = load_tokenizer(folder)
            return hf.config_for_tokenizer(folder, tokenizer), tokenizer.added, folder
        except UserError:
            shape = hf.read_config(folder)
    elif model in BASE_CONFIGS:
        shape = BASE_CONFIGS[model]
    else:
        shape = hf.read_config(fetch_config(model))
    if BASES.get(model, {}).get("chatml"):
        return shape, (), folder
    return (
        hf.with_vocab_size(shape, shape.vocab_size + 2),
        (shape.vocab_size, shape.vocab_size + 1),
        folder,
    )


# --- the command


@dataclasses.dataclass(frozen=True)
class Options:
    """What a training run needs, before anything is rented: does it fit, how long, how much money?"""

    gpu: str | None = flag(
        None,
        f"{', '.join(cost.GPUS)}, cpu; or its memory: 16gb as on its box, 15.6gib as torch finds",
        shown="this machine's",
        group="the card",
    )
    gpus: int = flag(1, "how many of them, in one machine")
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
    data: str | None = flag(None, "the folder that data.py wrote, to count the rows")
    tokens: int | None = flag(None, "tokens of one epoch, in place of --data")
    epochs: float = flag(3.0, "times over the data")
    batch: int = flag(8, "rows a step, over all GPUs")
    seq_len: int = flag(1024, "tokens a row")

    check: bool = flag(
        False, "ask the hub if this account may fetch the base's files", group="the answer"
    )
    measure: bool = flag(
        False, "time some steps on this machine's GPU, and go by that; a CPU is always timed"
    )
    json: bool = flag(False, "for programs")


def main():
    options = cli.parse(Options)
    options = dataclasses.replace(options, lora=options.lora or options.qlora)
    card = validate(options)
    if options.check:
        reachable = (
            hub.check_access(options.model)
            if not Path(options.model).is_dir()
            else f"{options.model} is here already"
        )
        print(reachable, flush=True)
    shape, added, folder = base_config(options.model)
    step.check_trainable(options, shape)
    some = dataset_size(options, folder)
    batch, _, steps = cost.plan_steps(some.rows, options.batch, options.epochs)
    ways = {
        "adapter": {"rank": options.lora_rank, "alpha": 16, "rows": added} if options.lora else None
    }
    ways |= {"nf4": options.qlora, "pure": options.pure_bf16}
    cpu = card is cost.CPU
    if cpu:
        dtype = devices.default_dtype(torch.device("cpu"))
        ways["dtype"] = dtype
        card = cost.this_cpu(dtype)
    work = cost.StepWorkload(
        shape,
        ways,
        math.ceil(batch / options.gpus),
        options.seq_len,
        options.gpus,
        some.labelled,
        some.document,
        not cpu,
        cpu,
    )
    choice = cost.choose_micro_batch(
        work,
        card,
        card.gib * devices.GIB - (0 if cpu else memory.CUDA_RESERVE),
        *([[1, 2][: work.rows], AC_MODES] if cpu else []),
    )
    factor = 1.0
    if cpu or options.measure:
        alone = dataclasses.replace(work, world=1, filled=1.0)
        seconds = cost.time_step(work, choice, torch.device("cpu") if cpu else None)
        factor = seconds / alone.seconds(card, choice.rows, choice.way)
    found = estimate(options, card, shape, some, work, choice, batch, steps, factor)
    print(
        json.dumps(found)
        if options.json
        else format_report(options, card, shape, some, choice, found)
    )


def validate(options):
    """→ the Card. UserError for what can't be, or not together."""
    cli.check_ranges(
        options,
        {"gpus": 1, "batch": 1, "seq_len": 16, "lora_rank": 1, "tokens": 1},
        ("epochs", "price"),
    )
    if options.tokens is not None and options.data is not None:
        raise UserError("--tokens and --data both say how much there is", "Leave one of them out.")
    if not options.gpu:
        if not torch.cuda.is_available():
            raise UserError(
                "there is no GPU here: --gpu says which one to plan for",
                f"Known: {cost.CALIBRATED}.",
            )
        return cost.gpu_from_name(torch.cuda.get_device_name())
    if options.gpu.lower() == "cpu":
        if options.gpus > 1:
            raise UserError(
                f"--gpus {options.gpus}: there is one CPU to plan for", "Leave --gpus out."
            )
        return cost.CPU
    if gib := memory_size(options.gpu):
        return gpu_of_memory(f"card with {gib:.4g} GiB", gib)
    name = cost.find_gpu(options.gpu)
    if not name:
        near = cost.similar_gpus(options.gpu)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"--gpu {options.gpu} is not known", f"{hint}Known: {cost.CALIBRATED}.")
    card = cost.GPUS[name]
    if card.basis == cost.UNKNOWN_GPU:
        return gpu_of_memory(card.name, card.gib)
    if not card.peak:
        shape, *_ = base_config(options.model)
        need = ", ".join(
            f"{n / devices.GIB:.1f} GiB in {how}" for how, n in chat_memory(shape, 2048).items()
        )
        chat = f"To chat, {options.model} needs {need}; it has {card.gib:.1f} GiB."
        if card.basis == cost.NO_BF16:
            # train.py doesn't refuse: torch 2.13 computes bf16 there by way of fp32, torch.compile
            # skips it, and attention has no kernel for it below sm_80, so all its scores are held.
            as_if = f"--gpu {card.gib:g}gib counts as if it had bf16"
            raise UserError(
                f"--gpu {options.gpu}: the {card.name} has no bf16: train.py is slow there and needs more memory, unknown how much",
                f"Take a card from Ampere on, such as a 3060 ({as_if}). {chat}",
            )
        raise UserError(
            f"--gpu {name}: the {card.name} can only chat, nothing is trained there", chat
        )
    return card


def gpu_of_memory(name: str, gib: float) -> cost.GPU:
    """Return a GPU of which memory alone is known. Its speed only ranks what fits."""
    return cost.GPU(name, gib, 800, 100, 0.6, cost.UNKNOWN_GPU, 12)


def memory_size(text: str) -> float | None:
    """Read `16gb`, `16 GB` or `15.6GiB` → GiB that torch finds; None where it isn't a size.

    Of the whole GB on a card's box torch finds 3% less: the driver keeps some.
    """
    found = re.fullmatch(r"\s*(\d{1,5}(?:\.\d+)?)[\s-]*g(i?)b?\s*", text.lower())
    size = float(found[1]) if found else 0
    return size * (0.97 if size.is_integer() and not found[2] else 1) if found and size else None


def estimate(options, card, shape, some, work, choice, batch, steps, factor):
    """What --json prints."""
    seconds = choice.seconds * factor
    trained = sum(p.numel() for p in work.model.parameters() if p.requires_grad)
    forward = metrics.flops_of(work.model, *work.counts)[1]
    evaluations = (
        seconds * forward / metrics.flops_of(work.model, *work.counts)[0] * 0.05 / 0.95 * steps * 4
    )
    hours = (steps * seconds + evaluations + (0 if work.cpu else START_SECONDS)) / 3600
    base = 2 * shape.num_parameters
    install = 0 if work.cpu else INSTALLED[1] / NETWORK_BYTES_PER_S + INSTALLED[2]
    setup = (install + (0 if Path(options.model).is_dir() else base / NETWORK_BYTES_PER_S)) / 3600
    prices = (options.price, options.price) if options.price is not None else card.price
    money = [[round(p * options.gpus * h, 2) for p in prices] for h in (hours, setup)]
    total = [round(a + b, 2) for a, b in zip(*money)]
    timed = card.basis != cost.UNKNOWN_GPU or options.measure
    priced = timed and (any(prices) or work.cpu)
    save = trained * (6 if options.pure_bf16 else 12)
    best = 4 * trained if options.lora else base
    reserve = work.takes(choice.needs) - choice.bytes if work.cpu else memory.CUDA_RESERVE
    parts = {
        kind: round(choice.needs.get(kind, 0) / devices.GIB, 2) for kind in cost.MEMORY_KINDS
    } | {"reserve": round(reserve / devices.GIB, 2)}
    return {
        "fits": choice.fits,
        "gib_per_gpu": parts
        | {"total": round((choice.bytes + reserve) / devices.GIB, 2), "card": round(card.gib, 2)},
        "micro_batch": choice.rows,
        "recompute": choice.way,
        "rows": some.rows,
        "batch": batch,
        "steps": steps,
        "tok_per_s": round(batch * options.seq_len * cost.FILL_SHARE / seconds, 1)
        if timed
        else None,
        "efficiency": None if not timed else card.basis if factor == 1 else cost.TIMED_HERE,
        "hours": round(hours, 3) if timed else None,
        "setup_hours": round(setup, 3),
        "cost": round(sum(total) / 2, 2) if priced else None,
        "cost_range": total if priced else None,
        "cost_of_training": money[0] if priced else None,
        "cost_of_setup": money[1] if priced else None,
        "disk_gb": {
            "base": round(base / 1e9, 1),
            "installed": INSTALLED[0] / 1e9,
            "saves": round(3 * save / 1e9, 1),
            "best": round(2 * best / 1e9, 1),
            "total": round((base + INSTALLED[0] + 3 * save + 2 * best) / 1e9, 1),
        },
    }


def format_report(options, card, shape, some, choice, found):
    """What a person reads."""
    gib, disk = found["gib_per_gpu"], found["disk_gb"]
    kind = (
        "QLoRA"
        if options.qlora
        else "LoRA"
        if options.lora
        else "full fine-tuning" + " in pure bf16" * options.pure_bf16
    )
    verdict = (
        "fits"
        if choice.fits
        else f"does NOT fit: {gib['total']:.1f} GiB are needed at least, there are {gib['card']:.1f}"
    )
    parts = " + ".join(
        f"{name} {gib[name]:.1f}" for name in (*cost.MEMORY_KINDS, "reserve") if gib[name] >= 0.05
    )
    each = "" if options.gpus == 1 else " on each"
    low, high = found["cost_range"] or (0, 0)
    money = (
        "no price known"
        if not high
        else " + ".join(
            f"{format_dollars(*found[f'cost_of_{what}'])} {what}" for what in ("training", "setup")
        )
    )
    where = (
        f"at ${options.price:.2f}"
        if options.price is not None
        else f"at ${card.price[0]:.2f} to {card.price[1]:.2f} ({cost.PRICES}, rough)"
    )
    gpu, epochs = (
        card.name != cost.CPU.name,
        found["steps"] / math.ceil(found["rows"] / found["batch"]),
    )
    step_ = f"{cli.counted(found['batch'], 'rows')} of {options.seq_len:,} tokens, {choice.rows} at a time{' on a GPU' * gpu}"
    much = f"{cli.counted(found['rows'], 'rows')}, {cli.counted(found['steps'], 'steps')}, {epochs:.3g} epochs"
    setup = f"before it {cost.format_hours(found['setup_hours'])} to install and download (at {8 * NETWORK_BYTES_PER_S / 1e6:.0f} Mbit/s, assumed)"
    known, size = found["efficiency"], f"{shape.num_parameters / 1e9:.2f}B parameters"
    timed = found["hours"] is not None
    time_ = "unknown; "
    speed = "unknown: only this card's memory is known; one without bf16 needs more"
    if timed:
        share = f", {card.efficiency:.0%} of {card.peak:,.3g} TFLOP/s in matmuls"
        speed = f"{found['tok_per_s']:,.0f} tok/s{'' if card.basis == cost.UNKNOWN_GPU or known == cost.TIMED_HERE else share} ({known})"
        time_ = (
            f"{cost.format_hours(found['hours'])} of training{'; ' if found['setup_hours'] else ''}"
        )
    else:
        money = "unknown, as the time is"
    lines = [
        f"{kind} of {options.model} ({size}) on {options.gpus} x {card.name}: {verdict}",
        f"  memory{each:<10}{parts} = {gib['total']:.1f} of {gib['card']:.1f} GiB",
        f"  a step          {step_}, recompute {choice.way}",
        f"  data            {much} ({some.known})",
        f"  speed           {speed}",
        f"  time            {time_}{setup if found['setup_hours'] else ''}",
        f"  money           {money} = {format_dollars(low, high)}, {where} a GPU-hour"
        if high
        else f"  money           {money}",
        f"  disk            base {disk['base']} + Python {disk['installed']} + saves {disk['saves']} + the best model twice {disk['best']} "
        f"= {disk['total']} GB",
    ]
    if not choice.fits:
        others = ", ".join(
            name for name, other in cost.GPUS.items() if other.peak and other.gib >= gib["total"]
        )
        ways = {
            f"a card of more memory ({others})": others,
            "--lora": not options.lora,
            "--qlora": not options.qlora,
            "more --gpus": gpu,
        }
        lines.append(f"  to make it fit  {'; '.join(way for way, helps in ways.items() if helps)}")
    return "\n".join(lines)


def format_dollars(low, high):
    return f"${low:.2f}" if low == high else f"${low:.2f} to {high:.2f}"


if __name__ == "__main__":
    cli.run(main)
