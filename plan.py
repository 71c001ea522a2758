"""Before renting: does it fit, how many hours, how much money? `python plan.py --gpu 3090 --lora`

Memory is counted on the very model that trains, by running its step on fake tensors (`step.moments`): on models of three and four blocks,
because every further block adds the same. Time is exact FLOPs and bytes over what a card is said to do, times an efficiency, of which
the answer says whether it was measured by us, derived from a published figure, or assumed. docs/PLAN.md holds both against measurements.
"""

import ctypes
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import torch

import checkpoint
import config
import data
import step
import tokenizer as tokenizers
from config import UserError, flag
from model import RECOMPUTE, ModelConfig
from quantize import BLOCK, GROUP

GIB = 1 << 30
PRICES = "2026-11"  # when the cards' prices were right, roughly: what marketplaces and clouds ask for a GPU-hour


@dataclasses.dataclass(frozen=True)
class Card:
    """`gib`: what torch finds on it. `bandwidth`, `link` (to the next card): GB/s. `peak`: TFLOP/s, dense bf16 with fp32 sums.

    `efficiency`: the share of the peak that a step's matmuls reach, `basis`: how we know. `price`: $ a GPU-hour, from, to.
    """

    name: str
    gib: float
    bandwidth: float
    peak: float
    efficiency: float
    basis: str
    link: float
    price: tuple = (0, 0)
    attention: float = 0.3  # attention's share of the peak, assumed for all but the CPU
    unpacking: float = 5  # bytes of traffic to unpack a weight of 4 bits and read it again
    updating: float = 1  # how much longer the optimizer's traffic takes than other


UNKNOWN = "unknown"  # the basis of a card of which memory alone is known
TIMED_HERE = "timed here"  # ... of a speed that was measured on this machine
NO_BF16 = "no bf16"  # NVIDIA before Ampere
# Memory: as torch's own out-of-memory messages give it. Bandwidth and peak: NVIDIA's data sheets and architecture papers, without
# sparsity; GeForce cards at the rate for fp32 sums. Links: what collectives reach, assumed. Efficiencies: docs/PLAN.md derives them.
CARDS = {
    "3060": Card("RTX 3060 12 GB", 11.76, 360, 25.5, 0.65, "assumed, as the 3090", 6, (0.05, 0.12)),
    "4060ti-16": Card("RTX 4060 Ti 16 GB", 15.55, 288, 44, 0.65, "assumed, as the 3090", 6, (0.08, 0.20)),
    "3090": Card("RTX 3090", 23.69, 936, 71, 0.65, "from fsdp_qlora's published speed", 12, (0.15, 0.35)),
    "3090ti": Card("RTX 3090 Ti", 23.69, 1008, 80, 0.65, "assumed, as the 3090", 12, (0.18, 0.40)),
    "4090": Card("RTX 4090", 23.64, 1008, 165, 0.72, "from torchtune's published speed", 12, (0.30, 0.70)),
    "5090": Card("RTX 5090", 31.36, 1792, 209.5, 0.7, "assumed", 25, (0.50, 1.00)),
    "a10g": Card("A10G", 22.06, 600, 70, 0.6, "assumed", 12, (0.60, 1.30)),
    "l4": Card("L4", 22.03, 300, 121, 0.4, "assumed", 12, (0.35, 0.80)),
    "l40s": Card("L40S", 44.39, 864, 362, 0.45, "assumed", 16, (0.70, 1.90)),
    "a6000": Card("RTX A6000", 47.54, 768, 154.8, 0.6, "assumed", 12, (0.35, 0.80)),
    "6000ada": Card("RTX 6000 Ada", 44.43, 960, 364, 0.45, "assumed, as the L40S", 16, (0.60, 1.20)),
    "a100-40": Card("A100 40 GB", 39.39, 1555, 312, 0.64, "assumed, as the 80 GB card", 200, (0.70, 1.60)),
    "a100-80": Card("A100 80 GB", 79.15, 2039, 312, 0.64, "from llm-foundry's published speed", 200, (0.80, 2.20)),
    "h100": Card("H100 SXM", 79.11, 3350, 989, 0.5, "from NeMo-Automodel's published speed", 350, (1.60, 3.90)),
    "h200": Card("H200", 139.72, 4800, 989, 0.5, "assumed, as the H100", 350, (2.20, 4.50)),
    "b200": Card("B200", 178.35, 8000, 2250, 0.35, "assumed", 700, (3.50, 6.50)),
    "4090-laptop": Card("RTX 4090 Laptop", 15.55, 576, 0, 0, UNKNOWN, 12),
    "t4": Card("T4", 14.56, 320, 0, 0, NO_BF16, 6, (0.15, 0.40)),
    "2080ti": Card("RTX 2080 Ti", 10.75, 616, 0, 0, NO_BF16, 6),
    "v100-16": Card("V100 16 GB", 15.77, 900, 0, 0, NO_BF16, 100),
    "v100-32": Card("V100 32 GB", 31.74, 900, 0, 0, NO_BF16, 100),
    **{f"mac-{n}": Card(f"Mac with {n} GB", 0.75 * n, 0, 0, 0, "chat alone", 0) for n in (8, 16, 24, 32, 36, 48, 64, 96, 128)},
}
KNOWN = f"{', '.join(CARDS)}, cpu; or its memory alone: --gpu 16gb"
# A CPU's rates only rank what fits: what a step takes is timed (`time_step`).
CPU = Card("CPU", 0, 10, 0, 0.9, TIMED_HERE, 1, attention=0.2, unpacking=15, updating=2.7)
SAVED = 1.5  # a checkpoint copies two moments and what is trained: bytes, for each of the optimizer's, while training goes on
CPU_RESERVE = 0.65 * GIB  # a CPU process beside live tensors: Python, its libraries, the kernels of some shapes


def read_bases() -> dict[str, dict]:
    """bases.toml → {hub id: what it says, with what it takes from the base that it is `like`}"""
    path = Path(__file__).with_name("bases.toml")
    bases = tomllib.loads(path.read_text(encoding="utf-8"))
    for name, said in bases.items():  # the one that it is like stands above it
        bases[name] = {**bases.get(said.pop("like", ""), {}), **said}
    return bases


BASES = read_bases()
FIELDS = [field.name for field in dataclasses.fields(ModelConfig)]
SHAPES = {  # what needs no look at the hub
    name: ModelConfig(**{key: said[key] for key in FIELDS if key in said}) for name, said in BASES.items()
}
ORIGINAL = 15_789  # sessions that the first doppelganger was made of
SESSION, LABELLED = 276, 0.4  # tokens a session, and the share of them with a target: our example's
FILLED = 0.985  # of a row's positions, after packing
FEWEST_STEPS = 50  # however little data there is
NETWORK = 50e6  # bytes/s to a rented machine, assumed
INSTALLED = 7.0e9, 3.0e9, 180  # bytes of the virtual environment with CUDA, bytes to download for it, seconds to unpack
START = 150  # seconds to read a 7B's weights, compile and try the longest rows, assumed
KINDS = ("weights", "gradients", "optimizer", "activations", "head", "communication")
BYTES, PER_MESSAGE, PER_TURN = 4, 4, 7  # tokens of a text: bytes each holds, and what the marks around add; our example's to 1%
TIMED = 1 << 29  # weights of the blocks of a model that is timed whole
FEW = 100  # tokens at a time at which a card works at half its rate, assumed


# --- memory


def memory(shape, *given, **more):
    """The most that one GPU holds, as `step.predict`, by kind. → {kind: bytes}"""
    few = [n for n in (3, 4) if n < shape.num_hidden_layers] if shape.num_hidden_layers > 4 else [shape.num_hidden_layers]
    found = [step.moments(dataclasses.replace(shape, num_hidden_layers=n), *given, **more) for n in few]
    further = shape.num_hidden_layers - few[0]
    parts = []
    for part, held in found[0].items():
        more_layers = found[-1][part]
        kinds = {*held, *more_layers}
        parts.append({kind: held.get(kind, 0) + further * (more_layers.get(kind, 0) - held.get(kind, 0)) for kind in kinds})
    return max(parts, key=lambda held: sum(held.values()))


# --- time


@dataclasses.dataclass(frozen=True)
class Work:
    """A step's work for one of `world` GPUs: `rows` full rows of `length` tokens in documents of `document`; `ways` as for step.build."""

    shape: ModelConfig
    ways: dict
    rows: int
    length: int = 1024
    world: int = 1
    labelled: float = LABELLED
    document: float = SESSION
    compiled: bool = True
    cpu: bool = False
    filled: float = FILLED

    @functools.cached_property
    def model(self):
        given = {"adapter": None, "dtype": torch.bfloat16, "recompute": "none", "nf4": False, "pure": False} | self.ways
        model = step.outline(self.shape, step.Ranks(torch.device("cpu")), **given)
        model.compiled = self.compiled
        return model

    @functools.cached_property
    def counts(self):
        tokens, document = self.rows * self.length * self.filled, min(self.document, self.length)
        return tokens, tokens * self.labelled, tokens * (document + 1) / 2

    @functools.cached_property
    def linear(self):
        """Weights of the blocks' matrices."""
        blocks = self.model.model.layers.modules()
        return sum(m.in_features * m.out_features for m in blocks if isinstance(m, torch.nn.Linear))

    def memory(self, rows, way):
        """What a GPU holds with `rows` rows at a time and recomputation `way`. → {kind: bytes}"""
        times = min(2, math.ceil(self.rows / rows))
        how = {"labelled": self.labelled, "document": round(self.document) if self.cpu else None, "compiled": self.compiled}
        return memory(self.shape, rows, self.length, times, self.world, recompute=way, **how, **self.ways)

    def takes(self, needs):
        """Bytes of what is free that a run takes whose step holds {kind: bytes}; of a GPU, RESERVE was left out of that before."""
        return sum(needs.values()) + (CPU_RESERVE + SAVED * needs.get("optimizer", 0) if self.cpu else 0)

    def seconds(self, card, rows, way):
        """A step's: matmuls, attention and memory traffic one after the other, or communication where that takes longer."""
        shape, times, again = self.shape, math.ceil(self.rows / rows), way == "full"
        tokens, labelled, pairs = self.counts
        flops, forward = step.flops_of(self.model, *self.counts)
        flops += forward if again else 0
        attention = (16 if again else 12) * shape.num_attention_heads * shape.head_dim * pairs * shape.num_hidden_layers
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        pure, masters = self.ways.get("pure"), trained > self.linear / 2
        heads = shape.num_attention_heads + 2 * shape.num_key_value_heads
        wide = 2 * (20 * shape.hidden_size + 8 * heads * shape.head_dim + 12 * shape.intermediate_size)  # bytes a token and block
        traffic = tokens * shape.num_hidden_layers * wide * (1 if way == "none" else 4 / 3) + labelled * shape.vocab_size * 16
        weight = card.unpacking if self.ways.get("nf4") else 6 if masters and not pure else 2  # bytes, each time that it is used
        traffic += times * (3 if again else 2) * self.linear * weight + trained / self.world * (60 if pure else 40) * card.updating
        rate = 1e12 * card.peak / (1 + FEW / (rows * self.length))
        compute = (flops - attention) / rate / card.efficiency + attention / rate / card.attention + traffic / card.bandwidth / 1e9
        gathered = sum(p.numel() * (2 if p.is_floating_point() else p.itemsize) for p in self.model.parameters())
        sent = times * (2 * gathered + 4 * trained) * (self.world - 1) / self.world
        return max(compute, sent / card.link / 1e9)


@dataclasses.dataclass(frozen=True)
class Choice:
    """`rows` at a time with recomputation `way`: `needs` {kind: bytes}, `seconds` a step."""

    rows: int
    way: str
    needs: dict
    seconds: float
    fits: bool

    @property
    def bytes(self):
        return sum(self.needs.values())

    def at_least(self, rows):
        """Bytes that so many rows need at least: what lies there anyway doesn't shrink with them, the rest not faster than they do."""
        fixed = sum(self.needs.get(kind, 0) for kind in ("weights", "gradients", "optimizer", "communication"))
        return fixed + (self.bytes - fixed) * rows / self.rows


def choose(work, card, free, sizes=None, ways=RECOMPUTE):
    """The fastest of rows at a time (powers of two, or `sizes`) and recomputations that takes at most `free` bytes.

    Where none does: the leanest, `fits` False.
    """
    sizes = sizes or [1 << n for n in range(work.rows.bit_length())]
    beyond = []  # what had no room; less recomputation needs no less
    for seconds, rows, less in sorted((work.seconds(card, rows, way), rows, RECOMPUTE.index(way)) for rows in sizes for way in ways):
        if any(less <= RECOMPUTE.index(other.way) and other.at_least(rows) > free for other in beyond):
            continue
        choice = Choice(rows, RECOMPUTE[less], work.memory(rows, RECOMPUTE[less]), seconds, True)
        if work.takes(choice.needs) <= free:
            return choice
        beyond.append(choice)
    rows, way = min(sizes), ways[-1]
    return Choice(rows, way, work.memory(rows, way), work.seconds(card, rows, way), False)


def schedule(rows, batch, epochs):
    """(rows a step, steps in an epoch, steps): at least 50 steps, smaller ones and more epochs where the data is too little for them."""
    if math.ceil(rows / batch) * epochs < FEWEST_STEPS:
        batch = max(1, min(batch, int(rows * epochs / FEWEST_STEPS)))
        epochs = max(epochs, FEWEST_STEPS / math.ceil(rows / batch))
    epoch = math.ceil(rows / batch)
    return batch, epoch, math.ceil(epoch * epochs)


# --- how much there is to train


@dataclasses.dataclass(frozen=True)
class Amount:
    """Of one epoch: full `rows`, the share of tokens with a target, tokens in a document; `known`: from what."""

    rows: int
    labelled: float
    document: float
    known: str


def amount(options, folder):
    """By the model's own tokenizer where its `folder` is at hand, else by the letters; without data, the original's. → Amount"""
    length = options.seq_len
    if options.tokens is not None:
        return Amount(math.ceil(options.tokens / length / FILLED), LABELLED, SESSION, f"{options.tokens:,} tokens an epoch, as you say")
    if options.data is None:
        known = f"no --data: as many sessions as the original's, {ORIGINAL:,}, of {SESSION} tokens each"
        return Amount(math.ceil(ORIGINAL * SESSION / length / FILLED), LABELLED, SESSION, known)
    path = Path(options.data) / "train.jsonl"
    if not path.is_file():
        raise UserError(f"--data {options.data}: there is no train.jsonl", "Make it: python data.py result.json. Or say --tokens N.")
    if folder and any((folder / name).exists() for name in checkpoint.TOKENIZER_FILES):
        rows = data.rows(path, tokenizers.load(folder), length)
        tokens, labelled, documents = (
            sum(len(r.ids) for r in rows),
            sum(int((r.labels != data.IGNORED).sum()) for r in rows),
            sum(len(r.doc_lengths) for r in rows),
        )
        if not rows:
            raise UserError(f"{path} has no turn of mine in it", "Make it anew with data.py.")
        return Amount(len(rows), labelled / tokens, tokens / documents, f"{path}, by the model's own tokenizer")
    talks = list(data.load_sessions(path))
    texts = [(turn, sum(len(m.encode()) / BYTES + PER_MESSAGE for m in turn.messages)) for talk in talks for turn in talk.turns]
    tokens, mine = sum(n + PER_TURN for _, n in texts), sum(n for turn, n in texts if turn.me)
    if not mine:
        raise UserError(f"{path} has no turn of mine in it", "Make it anew with data.py.")
    known = f"{path}, guessed by its letters ({BYTES} bytes a token), because the model's tokenizer isn't here"
    return Amount(math.ceil(tokens / length / FILLED), mine / tokens, tokens / len(talks), known)


def fetch_config(model: str) -> Path:
    """`checkpoint.fetch_config`, whose refusal also names what is planned without the hub."""
    try:
        return checkpoint.fetch_config(model)
    except UserError as error:
        problem, way_out = str(error).split("\n", 1)
        known = ", ".join(SHAPES)
        raise UserError(problem, f"{way_out} plan.py knows without the hub: {known}") from None


def shape_of(model):
    """A folder, a known name or a hub id (its config.json alone is fetched).

    → (ModelConfig with room for our special tokens, the rows that are new, its folder or None)
    """
    folder = Path(model) if Path(model).is_dir() else checkpoint.cached(model)
    if folder:
        checkpoint.check_base(folder)
        try:
            words = tokenizers.load(folder)
            return checkpoint.fitted(folder, words), words.added, folder
        except UserError:
            shape = checkpoint.read_config(folder)
    elif model in SHAPES:
        shape = SHAPES[model]
    else:
        shape = checkpoint.read_config(fetch_config(model))
    if BASES.get(model, {}).get("chatml"):
        return shape, (), folder
    return checkpoint.with_vocabulary(shape, shape.vocab_size + 2), (shape.vocab_size, shape.vocab_size + 1), folder


# --- the command


@dataclasses.dataclass(frozen=True)
class Config:
    """What a training run needs, before anything is rented: does it fit, how long, how much money?"""

    gpu: str | None = flag(
        None,
        f"{', '.join(CARDS)}, cpu; or its memory: 16gb as on its box, 15.6gib as torch finds",
        shown="this machine's",
        group="the card",
    )
    gpus: int = flag(1, "how many of them, in one machine")
    price: float | None = flag(None, "$ a GPU-hour", shown=f"a rough range of {PRICES}")

    lora: bool = flag(False, "as in train.py; without any of these three: all weights, with fp32 masters", group="the run")
    qlora: bool = flag(False, "as in train.py")
    pure_bf16: bool = flag(False, "as in train.py")
    model: str = flag(checkpoint.NO_ACCOUNT, "folder or hub id, for its config.json")
    lora_rank: int = flag(32, "rank of the adapter")
    data: str | None = flag(None, "the folder that data.py wrote, to count the rows")
    tokens: int | None = flag(None, "tokens of one epoch, in place of --data")
    epochs: float = flag(3.0, "times over the data")
    batch: int = flag(8, "rows a step, over all GPUs")
    seq_len: int = flag(1024, "tokens a row")

    check: bool = flag(False, "ask the hub if this account may fetch the base's files", group="the answer")
    measure: bool = flag(False, "time some steps on this machine's GPU, and go by that; a CPU is always timed")
    json: bool = flag(False, "for programs")


def main():
    options = config.parse(Config)
    options = dataclasses.replace(options, lora=options.lora or options.qlora)
    card = look_at_flags(options)
    if options.check:
        reachable = checkpoint.ask_hub(options.model) if not Path(options.model).is_dir() else f"{options.model} is here already"
        print(reachable, flush=True)
    shape, added, folder = shape_of(options.model)
    check(options, shape)
    some = amount(options, folder)
    batch, _, steps = schedule(some.rows, options.batch, options.epochs)
    ways = {"adapter": {"rank": options.lora_rank, "alpha": 16, "rows": added} if options.lora else None}
    ways |= {"nf4": options.qlora, "pure": options.pure_bf16}
    cpu = card is CPU
    if cpu:
        dtype = checkpoint.compute_dtype(torch.device("cpu"))
        ways["dtype"] = dtype
        card = on_this_cpu(dtype)
    work = Work(shape, ways, math.ceil(batch / options.gpus), options.seq_len, options.gpus, some.labelled, some.document, not cpu, cpu)
    choice = choose(work, card, card.gib * GIB - (0 if cpu else step.RESERVE), *([[1, 2][: work.rows], RECOMPUTE] if cpu else []))
    factor = 1.0
    if cpu or options.measure:
        alone = dataclasses.replace(work, world=1, filled=1.0)
        seconds = time_step(work, choice, torch.device("cpu") if cpu else None)
        factor = seconds / alone.seconds(card, choice.rows, choice.way)
    found = figures(options, card, shape, some, work, choice, batch, steps, factor)
    print(json.dumps(found) if options.json else told(options, card, shape, some, choice, found))


def check_flags(options, least, positive):
    """UserError for what train.py's flags and ours can't be. `least`: {flag: its least value}; `positive`: those above 0."""
    for name, limit in {**least, **dict.fromkeys(positive, 0)}.items():
        value, flag_ = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is not None and not (0 < value < math.inf if name in positive else value >= limit):
            bound = f"{'more than' if name in positive else 'at least'} {limit}"
            raise UserError(f"{flag_} {value}: {bound} is needed", f"Leave {flag_} out for the default.")
    if options.lora and options.pure_bf16:
        raise UserError("--pure-bf16 is for full fine-tuning: an adapter's fp32 masters are small", "Leave one of them out.")


def check(options, shape):
    """UserError for what the base, of this `shape`, can't be trained with."""
    uneven = [n for n in (shape.hidden_size, shape.intermediate_size, shape.num_attention_heads * shape.head_dim) if n % BLOCK]
    if options.qlora and uneven:
        raise UserError(f"--qlora keeps weights in blocks of {BLOCK}; {options.model} has layers {uneven[0]} wide", "Take --lora.")
    if options.seq_len > (most := shape.max_position_embeddings):
        raise UserError(f"--seq-len {options.seq_len}: {options.model} was made for {most} tokens", "Take shorter rows.")


def look_at_flags(options):
    """→ the Card. UserError for what can't be, or not together."""
    check_flags(options, {"gpus": 1, "batch": 1, "seq_len": 16, "lora_rank": 1, "tokens": 1}, ("epochs", "price"))
    if options.tokens is not None and options.data is not None:
        raise UserError("--tokens and --data both say how much there is", "Leave one of them out.")
    if not options.gpu:
        if not torch.cuda.is_available():
            raise UserError("there is no GPU here: --gpu says which one to plan for", f"Known: {KNOWN}.")
        return card_of(torch.cuda.get_device_name())
    if options.gpu.lower() == "cpu":
        if options.gpus > 1:
            raise UserError(f"--gpus {options.gpus}: there is one CPU to plan for", "Leave --gpus out.")
        return CPU
    if gib := memory_size(options.gpu):
        return unlisted(f"card with {gib:.4g} GiB", gib)
    name = find_card(options.gpu)
    if not name:
        near = near_cards(options.gpu)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"--gpu {options.gpu} is not known", f"{hint}Known: {KNOWN}.")
    card = CARDS[name]
    if card.basis == UNKNOWN:
        return unlisted(card.name, card.gib)
    if not card.peak:
        shape, *_ = shape_of(options.model)
        need = ", ".join(f"{n / GIB:.1f} GiB in {how}" for how, n in chat_needs(shape, 2048).items())
        chat = f"To chat, {options.model} needs {need}; it has {card.gib:.1f} GiB."
        if card.basis == NO_BF16:
            # train.py doesn't refuse: torch 2.13 computes bf16 there by way of fp32, torch.compile
            # skips it, and attention has no kernel for it below sm_80, so all its scores are held.
            as_if = f"--gpu {card.gib:g}gib counts as if it had bf16"
            raise UserError(
                f"--gpu {options.gpu}: the {card.name} has no bf16: train.py is slow there and needs more memory, unknown how much",
                f"Take a card from Ampere on, such as a 3060 ({as_if}). {chat}",
            )
        raise UserError(f"--gpu {name}: the {card.name} can only chat, nothing is trained there", chat)
    return card


def unlisted(name: str, gib: float) -> Card:
    """Return a GPU of which memory alone is known. Its speed only ranks what fits."""
    return Card(name, gib, 800, 100, 0.6, UNKNOWN, 12)


def memory_size(text: str) -> float | None:
    """Read `16gb`, `16 GB` or `15.6GiB` → GiB that torch finds; None where it isn't a size.

    Of the whole GB on a card's box torch finds 3% less: the driver keeps some.
    """
    found = re.fullmatch(r"\s*(\d{1,5}(?:\.\d+)?)[\s-]*g(i?)b?\s*", text.lower())
    size = float(found[1]) if found else 0
    return size * (0.97 if size.is_integer() and not found[2] else 1) if found and size else None


def card_words(name: str) -> set[str]:
    """Split a card's name, however it is spelt: "NVIDIA A100-SXM4-80GB" → {a100, 80}."""
    brands = r"nvidia|geforce|tesla|quadro|[rg]tx|gpu|graphics|generation|sxm\d?|hbm\d?e?|gi?b\b"
    text = re.sub(brands, " ", name.lower())
    text = re.sub("pcie|nvl|laptop", r" \g<0> ", text)
    return set(re.findall(r"[a-z]\d+[a-z]?(?![a-z\d])|[a-z]+|\d+", text))


def find_card(name: str) -> str | None:
    """Find a card's key in CARDS by its name: the one with most words of it, if no other is left.

    The card's memory may be left, "3060 12GB", and PCIe where it isn't another card.
    """
    words = card_words(name)
    for key in sorted(CARDS, key=lambda key: -len(card_words(key))):
        card, left = CARDS[key], words - card_words(key)
        if "SXM" not in card.name:
            left.discard("pcie")
        sizes = {word for word in left if word.isdigit() and int(word)}
        left -= {size for size in sizes if 0.88 <= card.gib / int(size) <= 1}
        if card_words(key) <= words and not left:
            return key
    return None


def near_cards(name: str) -> list[str]:
    """Return the keys in CARDS that an unknown name may mean."""
    words = card_words(name)
    spelt = re.sub(r"[\W_]|[rg]tx", "", name.lower())
    near = [key for key in CARDS if words and words <= card_words(key)]
    near += [key for key in CARDS if spelt and key.startswith(spelt)]
    near += [key for key in CARDS if card_words(key) <= words]
    return [*dict.fromkeys(near)] or difflib.get_close_matches(spelt, CARDS, 3)


def card_of(name):
    """The Card of what torch.cuda.get_device_name() says; of an unknown one the peak is measured."""
    gib = torch.cuda.mem_get_info()[1] / GIB
    card = CARDS.get(find_card(name) or find_card(f"{name} {math.ceil(gib)}") or "")
    if card and card.peak and abs(card.gib - gib) < 0.1 * gib:
        return dataclasses.replace(card, gib=gib)
    peak = step.measured_peak(torch.device("cuda"), torch.bfloat16) / 1e12
    return Card(name, gib, 800, peak, 0.6, "assumed for an unknown card, its peak measured", 12)


def on_this_cpu(dtype):
    return dataclasses.replace(at_peak(step.measured_peak(torch.device("cpu"), dtype)), gib=available() / GIB)


def at_peak(flops):
    """A CPU that does so many FLOP/s in a large matmul; its memory is as much slower or faster as that."""
    return dataclasses.replace(CPU, peak=flops / 1e12, bandwidth=CPU.bandwidth * flops / 400e9)


def here(device, dtype):
    """→ (this machine's device as a Card, bytes of it that a model may fill)"""
    if device.type == "cuda":
        return card_of(torch.cuda.get_device_name(device)), torch.cuda.mem_get_info(device)[0] - step.RESERVE
    card = on_this_cpu(dtype)
    if device.type == "mps":
        return dataclasses.replace(card, name="MPS", basis="assumed"), torch.mps.recommended_max_memory() - step.RESERVE
    return card, available()


def available():
    """Bytes of memory that this machine can give now."""
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # a MEMORYSTATUSEX: its size in bytes, then the memory in all and what is free of it
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[2]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def figures(options, card, shape, some, work, choice, batch, steps, factor):
    """What --json prints."""
    seconds = choice.seconds * factor
    trained = sum(p.numel() for p in work.model.parameters() if p.requires_grad)
    forward = step.flops_of(work.model, *work.counts)[1]
    evaluations = seconds * forward / step.flops_of(work.model, *work.counts)[0] * 0.05 / 0.95 * steps * 4
    hours = (steps * seconds + evaluations + (0 if work.cpu else START)) / 3600
    base = 2 * shape.num_parameters
    install = 0 if work.cpu else INSTALLED[1] / NETWORK + INSTALLED[2]
    setup = (install + (0 if Path(options.model).is_dir() else base / NETWORK)) / 3600
    prices = (options.price, options.price) if options.price is not None else card.price
    money = [[round(p * options.gpus * h, 2) for p in prices] for h in (hours, setup)]
    total = [round(a + b, 2) for a, b in zip(*money)]
    timed = card.basis != UNKNOWN or options.measure
    priced = timed and (any(prices) or work.cpu)
    save = trained * (6 if options.pure_bf16 else 12)
    best = 4 * trained if options.lora else base
    reserve = work.takes(choice.needs) - choice.bytes if work.cpu else step.RESERVE
    parts = {kind: round(choice.needs.get(kind, 0) / GIB, 2) for kind in KINDS} | {"reserve": round(reserve / GIB, 2)}
    return {
        "fits": choice.fits,
        "gib_per_gpu": parts | {"total": round((choice.bytes + reserve) / GIB, 2), "card": round(card.gib, 2)},
        "micro_batch": choice.rows,
        "recompute": choice.way,
        "rows": some.rows,
        "batch": batch,
        "steps": steps,
        "tok_per_s": round(batch * options.seq_len * FILLED / seconds, 1) if timed else None,
        "efficiency": None if not timed else card.basis if factor == 1 else TIMED_HERE,
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


def told(options, card, shape, some, choice, found):
    """What a person reads."""
    gib, disk = found["gib_per_gpu"], found["disk_gb"]
    kind = "QLoRA" if options.qlora else "LoRA" if options.lora else "full fine-tuning" + " in pure bf16" * options.pure_bf16
    verdict = "fits" if choice.fits else f"does NOT fit: {gib['total']:.1f} GiB are needed at least, there are {gib['card']:.1f}"
    parts = " + ".join(f"{name} {gib[name]:.1f}" for name in (*KINDS, "reserve") if gib[name] >= 0.05)
    each = "" if options.gpus == 1 else " on each"
    low, high = found["cost_range"] or (0, 0)
    money = "no price known" if not high else " + ".join(f"{dollars(*found[f'cost_of_{what}'])} {what}" for what in ("training", "setup"))
    where = f"at ${options.price:.2f}" if options.price is not None else f"at ${card.price[0]:.2f} to {card.price[1]:.2f} ({PRICES}, rough)"
    gpu, epochs = card.name != CPU.name, found["steps"] / math.ceil(found["rows"] / found["batch"])
    step_ = f"{config.counted(found['batch'], 'rows')} of {options.seq_len:,} tokens, {choice.rows} at a time{' on a GPU' * gpu}"
    much = f"{config.counted(found['rows'], 'rows')}, {config.counted(found['steps'], 'steps')}, {epochs:.3g} epochs"
    setup = f"before it {clock(found['setup_hours'])} to install and download (at {8 * NETWORK / 1e6:.0f} Mbit/s, assumed)"
    known, size = found["efficiency"], f"{shape.num_parameters / 1e9:.2f}B parameters"
    timed = found["hours"] is not None
    time_ = "unknown; "
    speed = "unknown: only this card's memory is known; one without bf16 needs more"
    if timed:
        share = f", {card.efficiency:.0%} of {card.peak:,.3g} TFLOP/s in matmuls"
        speed = f"{found['tok_per_s']:,.0f} tok/s{'' if card.basis == UNKNOWN or known == TIMED_HERE else share} ({known})"
        time_ = f"{clock(found['hours'])} of training{'; ' if found['setup_hours'] else ''}"
    else:
        money = "unknown, as the time is"
    lines = [
        f"{kind} of {options.model} ({size}) on {options.gpus} x {card.name}: {verdict}",
        f"  memory{each:<10}{parts} = {gib['total']:.1f} of {gib['card']:.1f} GiB",
        f"  a step          {step_}, recompute {choice.way}",
        f"  data            {much} ({some.known})",
        f"  speed           {speed}",
        f"  time            {time_}{setup if found['setup_hours'] else ''}",
        f"  money           {money} = {dollars(low, high)}, {where} a GPU-hour" if high else f"  money           {money}",
        f"  disk            base {disk['base']} + Python {disk['installed']} + saves {disk['saves']} + the best model twice {disk['best']} "
        f"= {disk['total']} GB",
    ]
    if not choice.fits:
        others = ", ".join(name for name, other in CARDS.items() if other.peak and other.gib >= gib["total"])
        ways = {f"a card of more memory ({others})": others, "--lora": not options.lora, "--qlora": not options.qlora, "more --gpus": gpu}
        lines.append(f"  to make it fit  {'; '.join(way for way, helps in ways.items() if helps)}")
    return "\n".join(lines)


def clock(hours):
    return config.counted(round(60 * hours), "minutes") if hours < 2 else f"{hours:.1f} hours"


def dollars(low, high):
    return f"${low:.2f}" if low == high else f"${low:.2f} to {high:.2f}"


# --- this machine


def time_step(work, choice, device=None):
    """Seconds of a step on this device (None: its GPU), timed with random weights.

    Of a model of more than TIMED weights fewer blocks are timed, twice; each further block takes as long.
    """
    device = device or checkpoint.pick_device()
    layers = work.shape.num_hidden_layers
    block = sum(wide * out for wide, out, _ in work.shape.linears.values())
    most = min(layers, max(2, TIMED // block))
    counts = [most] if most == layers else [most // 2, most]
    took = []
    for count in counts:
        shape = dataclasses.replace(work.shape, num_hidden_layers=count)
        small = dataclasses.replace(work, shape=shape, rows=choice.rows, world=1)
        took.append(try_out(small, choice, device, seconds=0 if device.type == "cpu" else 30))
    further = (took[-1] - took[0]) / max(1, counts[-1] - counts[0])
    return math.ceil(work.rows / choice.rows) * (took[-1] + (layers - most) * further)


def try_out(work, choice, device, seconds=60, rows=None, steps=5, watch=None):
    """Train on random weights for so long, and `steps` at least. → median seconds a step but the first two

    `rows`: every step's, else made up, others for each step. `watch`, a step.Live: counts storages in one step more, which is not timed.
    """
    ranks = step.Ranks(device)
    given = {"adapter": None, "nf4": False, "pure": False} | work.ways
    model = step.build(work.shape, ranks, recompute=choice.way, **given)
    if device.type == "cuda" and work.compiled:
        model.compile_blocks()
    optimizer = step.make_optimizer(model, 1e-4, 0.0, given["pure"])
    seeds = itertools.count()

    def take():
        some = rows or [made_up(work, next(seeds)) for _ in range(work.rows)]
        step.synchronise(device)
        before = time.perf_counter()
        step.train_step(model, optimizer, step.micro_batches(some, choice.rows, ranks, work.length), ranks)
        step.synchronise(device)
        return time.perf_counter() - before

    began, took = time.perf_counter(), [take(), take()]  # which also compile
    if watch is not None:
        with watch:
            watch.known_before(model, optimizer)
            take()
    while len(took) < steps or time.perf_counter() - began < seconds:
        took.append(take())
    return statistics.median(took[2:])


def made_up(work, seed):
    """A Row of random tokens, in documents of random lengths."""
    n, drawn, lengths = work.length, np.random.default_rng(seed), []
    ids = drawn.integers(0, work.shape.vocab_size, n)
    labels = np.where(np.arange(n) % 100 < 100 * work.labelled, ids, data.IGNORED)
    while (left := n - sum(lengths)) > 0:
        lengths.append(min(left, 1 + round(drawn.exponential(work.document - 1))))
    lengths = np.array(lengths)
    zeros = np.zeros(len(lengths), dtype=np.int64)
    return data.Row(ids, labels, labels != data.IGNORED, lengths, zeros, zeros)


def chat_needs(shape, size):
    """What talking to a model takes, with a memory of `size` tokens. → {what its weights are held in: bytes}, the widest first"""
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * size
    blocks = shape.num_hidden_layers * sum(wide * out for wide, out, _ in shape.linears.values())
    head = shape.vocab_size * shape.hidden_size * (not shape.tie_word_embeddings)
    rest = 2 * (shape.num_parameters - blocks - head + cache)
    widths = {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 1), "int4": (0.5 + 4 / GROUP, 1)}
    return {name: int(rest * (2 if name == "fp32" else 1) + a * blocks + b * head) for name, (a, b) in widths.items()}


def chat_weights(folder, base, size, device, asked=None):
    """What to hold a chat model's weights in: as `asked` or as they are stored, else what is usual on `device`, else the widest that fits.

    UserError where none does. A folder that can't be read is left to whoever loads it.
    """
    usual = asked or ("bf16" if checkpoint.compute_dtype(device) == torch.bfloat16 else "fp32")
    try:
        if checkpoint.is_adapter(folder):
            base = base or checkpoint.base_of(folder) or ""
            folder = Path(base) if Path(base).is_dir() else checkpoint.cached(base)
        shape = folder and checkpoint.read_config(folder)
        stored = shape and checkpoint.packed_kind(folder)
    except UserError:
        shape = None
    if not shape:
        return usual
    free = {"cuda": lambda: torch.cuda.mem_get_info(device)[0], "mps": lambda: torch.mps.recommended_max_memory()}
    free = free.get(device.type, available)()
    needs = chat_needs(shape, min(size, shape.max_position_embeddings))
    fitting = [name for name, need in needs.items() if need <= free]
    wanted = stored or usual
    if wanted in fitting:
        return asked or wanted
    if fitting and not asked and not stored:
        return fitting[0]
    said = ", ".join(f"{need / GIB:.1f} GiB in {name}" for name, need in needs.items())
    way_out = (
        f"Say --weights {fitting[0]}." if fitting and not stored else "Close what uses it, say --context less, or take a smaller base."
    )
    raise UserError(f"the model needs {said}; {device.type} has {free / GIB:.1f} GiB free", way_out)


def load_for_chat(folder, base, size, device, words, asked=None):
    """The model of a `ckpt/` in what `chat_weights` says, an adapter merged → Transformer"""
    kind = chat_weights(folder, base, size, device, asked)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(kind) or checkpoint.compute_dtype(device)
    return checkpoint.load_model(str(folder), dtype, device, base, words, "plain" if kind in ("bf16", "fp32") else kind)


if __name__ == "__main__":
    config.run(main)
