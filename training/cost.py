"""GPUs, and how long a step takes on one: what train.py uses to choose a micro-batch, and plan.py to estimate a run."""

import dataclasses
import difflib
import functools
import itertools
import math
import re
import statistics
import time

import numpy as np
import torch

import cli
import data
from model import AC_MODES, ModelConfig
from training import distributed, memory, metrics, optim, step
from weights import devices

PRICES = "2026-11"  # when the cards' prices were right, roughly: what marketplaces and clouds ask for a GPU-hour


@dataclasses.dataclass(frozen=True)
class GPU:
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


UNKNOWN_GPU = "unknown"  # the basis of a card of which memory alone is known
TIMED_HERE = "timed here"  # ... of a speed that was measured on this machine
NO_BF16 = "no bf16"  # NVIDIA before Ampere
# Memory: as torch's own out-of-memory messages give it. Bandwidth and peak: NVIDIA's data sheets and architecture papers, without
# sparsity; GeForce cards at the rate for fp32 sums. Links: what collectives reach, assumed. Efficiencies: docs/PLAN.md derives them.
GPUS = {
    "3060": GPU("RTX 3060 12 GB", 11.76, 360, 25.5, 0.65, "assumed, as the 3090", 6, (0.05, 0.12)),
    "4060ti-16": GPU(
        "RTX 4060 Ti 16 GB", 15.55, 288, 44, 0.65, "assumed, as the 3090", 6, (0.08, 0.20)
    ),
    "3090": GPU(
        "RTX 3090", 23.69, 936, 71, 0.65, "from fsdp_qlora's published speed", 12, (0.15, 0.35)
    ),
    "3090ti": GPU("RTX 3090 Ti", 23.69, 1008, 80, 0.65, "assumed, as the 3090", 12, (0.18, 0.40)),
    "4090": GPU(
        "RTX 4090", 23.64, 1008, 165, 0.72, "from torchtune's published speed", 12, (0.30, 0.70)
    ),
    "5090": GPU("RTX 5090", 31.36, 1792, 209.5, 0.7, "assumed", 25, (0.50, 1.00)),
    "a10g": GPU("A10G", 22.06, 600, 70, 0.6, "assumed", 12, (0.60, 1.30)),
    "l4": GPU("L4", 22.03, 300, 121, 0.4, "assumed", 12, (0.35, 0.80)),
    "l40s": GPU("L40S", 44.39, 864, 362, 0.45, "assumed", 16, (0.70, 1.90)),
    "a6000": GPU("RTX A6000", 47.54, 768, 154.8, 0.6, "assumed", 12, (0.35, 0.80)),
    "6000ada": GPU("RTX 6000 Ada", 44.43, 960, 364, 0.45, "assumed, as the L40S", 16, (0.60, 1.20)),
    "a100-40": GPU(
        "A100 40 GB", 39.39, 1555, 312, 0.64, "assumed, as the 80 GB card", 200, (0.70, 1.60)
    ),
    "a100-80": GPU(
        "A100 80 GB",
        79.15,
        2039,
        312,
        0.64,
        "from llm-foundry's published speed",
        200,
        (0.80, 2.20),
    ),
    "h100": GPU(
        "H100 SXM",
        79.11,
        3350,
        989,
        0.5,
        "from NeMo-Automodel's published speed",
        350,
        (1.60, 3.90),
    ),
    "h200": GPU("H200", 139.72, 4800, 989, 0.5, "assumed, as the H100", 350, (2.20, 4.50)),
    "b200": GPU("B200", 178.35, 8000, 2250, 0.35, "assumed", 700, (3.50, 6.50)),
    "4090-laptop": GPU("RTX 4090 Laptop", 15.55, 576, 0, 0, UNKNOWN_GPU, 12),
    "t4": GPU("T4", 14.56, 320, 0, 0, NO_BF16, 6, (0.15, 0.40)),
    "2080ti": GPU("RTX 2080 Ti", 10.75, 616, 0, 0, NO_BF16, 6),
    "v100-16": GPU("V100 16 GB", 15.77, 900, 0, 0, NO_BF16, 100),
    "v100-32": GPU("V100 32 GB", 31.74, 900, 0, 0, NO_BF16, 100),
    **{
        f"mac-{n}": GPU(f"Mac with {n} GB", 0.75 * n, 0, 0, 0, "chat alone", 0)
        for n in (8, 16, 24, 32, 36, 48, 64, 96, 128)
    },
}
CALIBRATED = f"{', '.join(GPUS)}, cpu; or its memory alone: --gpu 16gb"
# A CPU's rates only rank what fits: what a step takes is timed (`time_step`).
CPU = GPU("CPU", 0, 10, 0, 0.9, TIMED_HERE, 1, attention=0.2, unpacking=15, updating=2.7)
CHECKPOINT_COPIES = 1.5  # a checkpoint copies two moments and what is trained: bytes, for each of the optimizer's, while training goes on
CPU_RESERVE = (
    0.65 * devices.GIB
)  # a CPU process beside live tensors: Python, its libraries, the kernels of some shapes
SESSION_TOKENS, TARGET_SHARE = (
    276,
    0.4,
)  # tokens a session, and the share of them with a target: our example's
FILL_SHARE = 0.985  # of a row's positions, after packing
MIN_STEPS = 50  # however little data there is
MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "head", "communication")
TIMED_PARAMETERS = 1 << 29  # weights of the blocks of a model that is timed whole
HALF_SPEED_TOKENS = 100  # tokens at a time at which a card works at half its rate, assumed


# --- memory


def peak_memory(shape, *given, **more):
    """The most that one GPU holds, as `step.predict`, by kind. → {kind: bytes}"""
    few = (
        [n for n in (3, 4) if n < shape.num_hidden_layers]
        if shape.num_hidden_layers > 4
        else [shape.num_hidden_layers]
    )
    found = [
        memory.trace_step_memory(dataclasses.replace(shape, num_hidden_layers=n), *given, **more)
        for n in few
    ]
    further = shape.num_hidden_layers - few[0]
    parts = []
    for part, held in found[0].items():
        more_layers = found[-1][part]
        kinds = {*held, *more_layers}
        parts.append(
            {
                kind: held.get(kind, 0) + further * (more_layers.get(kind, 0) - held.get(kind, 0))
                for kind in kinds
            }
        )
    return max(parts, key=lambda held: sum(held.values()))


# --- time


@dataclasses.dataclass(frozen=True)
class StepWorkload:
    """A step's work for one of `world` GPUs: `rows` full rows of `length` tokens in documents of `document`; `ways` as for step.build."""

    shape: ModelConfig
    ways: dict
    rows: int
    length: int = 1024
    world: int = 1
    labelled: float = TARGET_SHARE
    document: float = SESSION_TOKENS
    compiled: bool = True
    cpu: bool = False
    filled: float = FILL_SHARE

    @functools.cached_property
    def model(self):
        given = {
            "adapter": None,
            "dtype": torch.bfloat16,
            "recompute": "none",
            "nf4": False,
            "pure": False,
        } | self.ways
        model = step.build_meta_model(
            self.shape, distributed.Distributed(torch.device("cpu")), **given
        )
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
        how = {
            "labelled": self.labelled,
            "document": round(self.document) if self.cpu else None,
            "compiled": self.compiled,
        }
        return peak_memory(
            self.shape, rows, self.length, times, self.world, recompute=way, **how, **self.ways
        )

    def takes(self, needs):
        """Bytes of what is free that a run takes whose step holds {kind: bytes}; of a GPU, RESERVE was left out of that before."""
        return sum(needs.values()) + (
            CPU_RESERVE + CHECKPOINT_COPIES * needs.get("optimizer", 0) if self.cpu else 0
        )

    def seconds(self, card, rows, way):
        """A step's: matmuls, attention and memory traffic one after the other, or communication where that takes longer."""
        shape, times, again = self.shape, math.ceil(self.rows / rows), way == "full"
        tokens, labelled, pairs = self.counts
        flops, forward = metrics.flops_of(self.model, *self.counts)
        flops += forward if again else 0
        attention = (
            (16 if again else 12)
            * shape.num_attention_heads
            * shape.head_dim
            * pairs
            * shape.num_hidden_layers
        )
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        pure, masters = self.ways.get("pure"), trained > self.linear / 2
        heads = shape.num_attention_heads + 2 * shape.num_key_value_heads
        wide = 2 * (
            20 * shape.hidden_size + 8 * heads * shape.head_dim + 12 * shape.intermediate_size
        )  # bytes a token and block
        traffic = (
            tokens * shape.num_hidden_layers * wide * (1 if way == "none" else 4 / 3)
            + labelled * shape.vocab_size * 16
        )
        weight = (
            card.unpacking if self.ways.get("nf4") else 6 if masters and not pure else 2
        )  # bytes, each time that it is used
        traffic += (
            times * (3 if again else 2) * self.linear * weight
            + trained / self.world * (60 if pure else 40) * card.updating
        )
        rate = 1e12 * card.peak / (1 + HALF_SPEED_TOKENS / (rows * self.length))
        compute = (
            (flops - attention) / rate / card.efficiency
            + attention / rate / card.attention
            + traffic / card.bandwidth / 1e9
        )
        gathered = sum(
            p.numel() * (2 if p.is_floating_point() else p.itemsize)
            for p in self.model.parameters()
        )
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
        fixed = sum(
            self.needs.get(kind, 0)
            for kind in ("weights", "gradients", "optimizer", "communication")
        )
        return fixed + (self.bytes - fixed) * rows / self.rows


def choose_micro_batch(work, card, free, sizes=None, ways=AC_MODES):
    """The fastest of rows at a time (powers of two, or `sizes`) and recomputations that takes at most `free` bytes.

    Where none does: the leanest, `fits` False.
    """
    sizes = sizes or [1 << n for n in range(work.rows.bit_length())]
    beyond = []  # what had no room; less recomputation needs no less
    for seconds, rows, less in sorted(
        (work.seconds(card, rows, way), rows, AC_MODES.index(way)) for rows in sizes for way in ways
    ):
        if any(
            less <= AC_MODES.index(other.way) and other.at_least(rows) > free for other in beyond
        ):
            continue
        choice = Choice(rows, AC_MODES[less], work.memory(rows, AC_MODES[less]), seconds, True)
        if work.takes(choice.needs) <= free:
            return choice
        beyond.append(choice)
    rows, way = min(sizes), ways[-1]
    return Choice(rows, way, work.memory(rows, way), work.seconds(card, rows, way), False)


def plan_steps(rows, batch, epochs):
    """(rows a step, steps in an epoch, steps): at least 50 steps, smaller ones and more epochs where the data is too little for them."""
    if math.ceil(rows / batch) * epochs < MIN_STEPS:
        batch = max(1, min(batch, int(rows * epochs / MIN_STEPS)))
        epochs = max(epochs, MIN_STEPS / math.ceil(rows / batch))
    epoch = math.ceil(rows / batch)
    return batch, epoch, math.ceil(epoch * epochs)


def gpu_words(name: str) -> set[str]:
    """Split a card's name, however it is spelt: "NVIDIA A100-SXM4-80GB" → {a100, 80}."""
    brands = r"nvidia|geforce|tesla|quadro|[rg]tx|gpu|graphics|generation|sxm\d?|hbm\d?e?|gi?b\b"
    text = re.sub(brands, " ", name.lower())
    text = re.sub("pcie|nvl|laptop", r" \g<0> ", text)
    return set(re.findall(r"[a-z]\d+[a-z]?(?![a-z\d])|[a-z]+|\d+", text))


def find_gpu(name: str) -> str | None:
    """Find a card's key in CARDS by its name: the one with most words of it, if no other is left.

    The card's memory may be left, "3060 12GB", and PCIe where it isn't another card.
    """
    words = gpu_words(name)
    for key in sorted(GPUS, key=lambda key: -len(gpu_words(key))):
        card, left = GPUS[key], words - gpu_words(key)
        if "SXM" not in card.name:
            left.discard("pcie")
        sizes = {word for word in left if word.isdigit() and int(word)}
        left -= {size for size in sizes if 0.88 <= card.gib / int(size) <= 1}
        if gpu_words(key) <= words and not left:
            return key
    return None


def similar_gpus(name: str) -> list[str]:
    """Return the keys in CARDS that an unknown name may mean."""
    words = gpu_words(name)
    spelt = re.sub(r"[\W_]|[rg]tx", "", name.lower())
    near = [key for key in GPUS if words and words <= gpu_words(key)]
    near += [key for key in GPUS if spelt and key.startswith(spelt)]
    near += [key for key in GPUS if gpu_words(key) <= words]
    return [*dict.fromkeys(near)] or difflib.get_close_matches(spelt, GPUS, 3)


def gpu_from_name(name):
    """The Card of what torch.cuda.get_device_name() says; of an unknown one the peak is measured."""
    gib = torch.cuda.mem_get_info()[1] / devices.GIB
    card = GPUS.get(find_gpu(name) or find_gpu(f"{name} {math.ceil(gib)}") or "")
    if card and card.peak and abs(card.gib - gib) < 0.1 * gib:
        return dataclasses.replace(card, gib=gib)
    peak = metrics.measure_peak_flops(torch.device("cuda"), torch.bfloat16) / 1e12
    return GPU(name, gib, 800, peak, 0.6, "assumed for an unknown card, its peak measured", 12)


def this_cpu(dtype):
    return dataclasses.replace(
        cpu_at_peak(metrics.measure_peak_flops(torch.device("cpu"), dtype)),
        gib=devices.free_memory() / devices.GIB,
    )


def cpu_at_peak(flops):
    """A CPU that does so many FLOP/s in a large matmul; its memory is as much slower or faster as that."""
    return dataclasses.replace(CPU, peak=flops / 1e12, bandwidth=CPU.bandwidth * flops / 400e9)


def local_device(device, dtype):
    """→ (this machine's device as a Card, bytes of it that a model may fill)"""
    if device.type == "cuda":
        return gpu_from_name(torch.cuda.get_device_name(device)), torch.cuda.mem_get_info(device)[
            0
        ] - memory.CUDA_RESERVE
    card = this_cpu(dtype)
    if device.type == "mps":
        return dataclasses.replace(
            card, name="MPS", basis="assumed"
        ), torch.mps.recommended_max_memory() - memory.CUDA_RESERVE
    return card, devices.free_memory()


def format_hours(hours):
    return cli.counted(round(60 * hours), "minutes") if hours < 2 else f"{hours:.1f} hours"


# --- this machine


def time_step(work, choice, device=None):
    """Seconds of a step on this device (None: its GPU), timed with random weights.

    Of a model of more than TIMED weights fewer blocks are timed, twice; each further block takes as long.
    """
    device = device or devices.pick_device()
    layers = work.shape.num_hidden_layers
    block = sum(wide * out for wide, out, _ in work.shape.linears.values())
    most = min(layers, max(2, TIMED_PARAMETERS // block))
    counts = [most] if most == layers else [most // 2, most]
    took = []
    for count in counts:
        shape = dataclasses.replace(work.shape, num_hidden_layers=count)
        small = dataclasses.replace(work, shape=shape, rows=choice.rows, world=1)
        took.append(
            benchmark_step(small, choice, device, seconds=0 if device.type == "cpu" else 30)
        )
    further = (took[-1] - took[0]) / max(1, counts[-1] - counts[0])
    return math.ceil(work.rows / choice.rows) * (took[-1] + (layers - most) * further)


def benchmark_step(work, choice, device, seconds=60, rows=None, steps=5, watch=None):
    """Train on random weights for so long, and `steps` at least. → median seconds a step but the first two

    `rows`: every step's, else made up, others for each step. `watch`, a step.Live: counts storages in one step more, which is not timed.
    """
    ranks = distributed.Distributed(device)
    given = {"adapter": None, "nf4": False, "pure": False} | work.ways
    model = step.build_model(work.shape, ranks, recompute=choice.way, **given)
    if device.type == "cuda" and work.compiled:
        model.compile_blocks()
    optimizer = optim.make_optimizer(model, 1e-4, 0.0, given["pure"])
    seeds = itertools.count()

    def take():
        some = rows or [synthetic_row(work, next(seeds)) for _ in range(work.rows)]
        metrics.synchronize(device)
        before = time.perf_counter()
        step.train_step(
            model, optimizer, step.micro_batches(some, choice.rows, ranks, work.length), ranks
        )
        metrics.synchronize(device)
        return time.perf_counter() - before

    began, took = time.perf_counter(), [take(), take()]  # which also compile
    if watch is not None:
        with watch:
            watch.known_before(model, optimizer)
            take()
    while len(took) < steps or time.perf_counter() - began < seconds:
        took.append(take())
    return statistics.median(took[2:])


def synthetic_row(work, seed):
    """A Row of random tokens, in documents of random lengths."""
    n, drawn, lengths = work.length, np.random.default_rng(seed), []
    ids = drawn.integers(0, work.shape.vocab_size, n)
    labels = np.where(np.arange(n) % 100 < 100 * work.labelled, ids, data.IGNORE_INDEX)
    while (left := n - sum(lengths)) > 0:
        lengths.append(min(left, 1 + round(drawn.exponential(work.document - 1))))
    lengths = np.array(lengths)
    zeros = np.zeros(len(lengths), dtype=np.int64)
    return data.Row(ids, labels, labels != data.IGNORE_INDEX, lengths, zeros, zeros)
