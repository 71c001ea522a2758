"""GPUs, and how long a training step takes on one.

train.py uses it to choose a micro-batch, plan.py to estimate a run.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import re
import statistics
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import cli
import data
from model import AC_MODES, ModelConfig, Transformer
from training import distributed, memory, metrics, optim, step
from weights import devices

PRICES = "2026-11"  # when the prices of gpus.toml were right, roughly


@dataclasses.dataclass(frozen=True)
class GPU:
    """What a GPU can do; gpus.toml lists them."""

    name: str
    gib: float  # memory that torch finds
    bandwidth: float  # GB/s
    peak: float  # TFLOP/s of dense bf16 matmuls with fp32 sums
    efficiency: float  # share of the peak that a training step's matmuls reach
    basis: str  # how the efficiency is known
    link: float  # GB/s to the next GPU
    price: Sequence[float] = (0, 0)  # $ an hour, from and to
    attention: float = 0.3  # attention's share of the peak, assumed for all but the CPU
    unpacking: float = 5  # bytes of traffic to unpack a 4-bit weight and read it again
    updating: float = 1  # time of the optimizer's traffic, relative to other traffic


UNKNOWN_GPU = "unknown"  # basis of a GPU that is known only by its memory
TIMED_HERE = "timed here"  # basis of a speed that was measured on this machine
NO_BF16 = "no bf16"  # basis of NVIDIA's GPUs before Ampere


def read_gpus() -> dict[str, GPU]:
    """Read gpus.toml, and add the Macs, whose models can fill three quarters of the memory."""
    table = tomllib.loads(Path(__file__).with_name("gpus.toml").read_text(encoding="utf-8"))
    gpus = {key: GPU(**fields) for key, fields in table.items()}
    for size in (8, 16, 24, 32, 36, 48, 64, 96, 128):
        gpus[f"mac-{size}"] = GPU(f"Mac with {size} GB", 0.75 * size, 0, 0, 0, "chat alone", 0)
    return gpus


GPUS = read_gpus()
KNOWN_GPUS = f"{', '.join(GPUS)}, cpu; or its memory alone: --gpu 16gb"
# A CPU's rates only rank what fits: what a step takes is timed (`time_step`).
CPU = GPU("CPU", 0, 10, 0, 0.9, TIMED_HERE, 1, attention=0.2, unpacking=15, updating=2.7)
# A checkpoint copies Adam's two moments and what is trained while training goes on: bytes of copies
# for each byte of the optimizer's.
CHECKPOINT_COPIES = 1 + 1 / len(optim.ADAM_STATE)
# Bytes of a CPU process beside live tensors: Python, its libraries, the kernels of some shapes.
CPU_RESERVE = 0.65 * devices.GIB
SESSION_TOKENS = 276  # tokens of a session, in our example
MOST_DOCUMENTS = 32  # sessions in a row, assumed
TARGET_SHARE = 0.4  # share of tokens with a target, in our example
FILL_SHARE = 0.985  # share of a row's positions that packing fills
MIN_STEPS = 50  # however little data there is
MEMORY_KINDS = ("weights", "gradients", "optimizer", "activations", "head", "communication")
TIMED_PARAMETERS = 1 << 29  # weights of the blocks of a model that is timed whole
HALF_SPEED_TOKENS = 100  # tokens at a time at which a GPU reaches half its rate, assumed


# --- memory


def peak_memory(config: ModelConfig, *args, **kwargs) -> dict[str, float]:
    """Predict the most bytes that one GPU holds in a step, by kind.

    Takes the arguments of `memory.trace_step_memory`. Every further block adds the same, so models
    of three and four blocks are enough.
    """

    def trace(layers):
        small = dataclasses.replace(config, num_hidden_layers=layers)
        return memory.trace_step_memory(small, *args, **kwargs)

    layers = config.num_hidden_layers
    if layers <= 4:
        phases = list(trace(layers).values())
    else:
        three, four = trace(3), trace(4)
        phases = []
        for phase, held in three.items():
            by_kind = {}
            for kind in {*held, *four[phase]}:
                block = four[phase].get(kind, 0) - held.get(kind, 0)
                by_kind[kind] = held.get(kind, 0) + (layers - 3) * block
            phases.append(by_kind)
    return max(phases, key=lambda by_kind: sum(by_kind.values()))


# --- time


@dataclasses.dataclass(frozen=True)
class StepWorkload:
    """A training step's work for one of `world` GPUs; `spec` as for step.build_model."""

    config: ModelConfig
    spec: step.ModelSpec
    rows: int  # full rows of this GPU
    seq_len: int = 1024
    world: int = 1
    target_share: float = TARGET_SHARE
    doc_length: float = SESSION_TOKENS  # tokens of a document
    most_documents: int = MOST_DOCUMENTS  # in a row
    compiled: bool = True
    cpu: bool = False
    fill_share: float = FILL_SHARE

    @functools.cached_property
    def model(self) -> Transformer:
        ranks = distributed.Distributed(torch.device("cpu"))
        model = step.build_meta_model(self.config, ranks, self.spec)
        model.compiled = self.compiled
        return model

    @functools.cached_property
    def trainable_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @functools.cached_property
    def linear_parameters(self) -> int:
        """Weights of the blocks' matrices."""
        blocks = self.model.model.layers.modules()
        return sum(m.in_features * m.out_features for m in blocks if isinstance(m, torch.nn.Linear))

    @functools.cached_property
    def flops(self) -> metrics.StepFlops:
        return metrics.count_flops(self.model, self.sizes)

    @property
    def sizes(self) -> metrics.StepSizes:
        tokens = self.rows * self.seq_len * self.fill_share
        pairs = tokens * (min(self.doc_length, self.seq_len) + 1) / 2
        return metrics.StepSizes(tokens, tokens * self.target_share, pairs)

    def memory(self, micro_batch: int, ac_mode: str) -> dict[str, float]:
        """Predict what one GPU holds in a step. → {kind: bytes}"""
        return peak_memory(
            self.config,
            dataclasses.replace(self.spec, activation_checkpointing=ac_mode),
            micro_batch,
            self.seq_len,
            min(2, math.ceil(self.rows / micro_batch)),
            self.world,
            target_share=self.target_share,
            doc_length=round(self.doc_length) if self.cpu else None,
            documents=micro_batch * self.most_documents,
            compiled=self.compiled,
        )

    def required_bytes(self, by_kind: dict[str, float]) -> float:
        """Return the free bytes that a run needs, from what its step holds.

        A GPU's free bytes, as in `local_device`, are without CUDA_RESERVE.
        """
        live = sum(by_kind.values())
        if not self.cpu:
            return live
        return live + CPU_RESERVE + CHECKPOINT_COPIES * by_kind.get("optimizer", 0)

    def seconds(self, gpu: GPU, micro_batch: int, ac_mode: str) -> float:
        """Estimate the time of a step.

        Matmuls, attention and memory traffic come one after the other; communication counts where
        it takes longer than all of them.
        """
        full = ac_mode == "full"
        config = self.config
        # 4 FLOPs forward and 8 backward; full checkpointing goes forward twice.
        heads = config.num_attention_heads * config.head_dim * config.num_hidden_layers
        attention = (16 if full else 12) * heads * self.sizes.attention_pairs
        matmuls = self.flops.total + (self.flops.blocks_forward if full else 0) - attention
        rate = 1e12 * gpu.peak / (1 + HALF_SPEED_TOKENS / (micro_batch * self.seq_len))
        compute = matmuls / rate / gpu.efficiency + attention / rate / gpu.attention
        compute += self.traffic(gpu, micro_batch, ac_mode) / gpu.bandwidth / 1e9
        return max(compute, self.sent_bytes(micro_batch) / gpu.link / 1e9)

    def traffic(self, gpu: GPU, micro_batch: int, ac_mode: str) -> float:
        """Estimate the bytes that a step moves through a GPU's memory."""
        config = self.config
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        per_token = 20 * config.hidden_size + 8 * heads * config.head_dim
        per_token += 12 * config.intermediate_size
        activations = 2 * per_token * config.num_hidden_layers * self.sizes.tokens
        activations *= 1 if ac_mode == "none" else 4 / 3
        logits = 16 * config.vocab_size * self.sizes.targets

        pure = self.spec.pure_bf16
        per_weight: float = 2  # bytes, each time that it is used
        if self.spec.nf4:
            per_weight = gpu.unpacking
        elif self.trainable_parameters > self.linear_parameters / 2 and not pure:
            per_weight = 6  # fp32 masters
        uses = math.ceil(self.rows / micro_batch) * (3 if ac_mode == "full" else 2)
        # To clip and update a weight: fused in fp32; BF16AdamW's many steps are compiled into one.
        per_update = 40 if not pure else 20 if self.compiled else 168
        update = per_update * self.trainable_parameters / self.world * gpu.updating
        return activations + logits + uses * self.linear_parameters * per_weight + update

    def sent_bytes(self, micro_batch: int) -> float:
        """Estimate the bytes that FSDP2 gathers and reduces in a step."""
        gathered = 0
        for parameter in self.model.parameters():
            size = 2 if parameter.is_floating_point() else parameter.itemsize
            gathered += parameter.numel() * size
        per_micro_batch = 2 * gathered + 4 * self.trainable_parameters
        times = math.ceil(self.rows / micro_batch)
        return times * per_micro_batch * (self.world - 1) / self.world


@dataclasses.dataclass(frozen=True)
class Choice:
    """A micro-batch and a mode of activation checkpointing, and what a step then takes."""

    micro_batch: int
    ac_mode: str
    memory: dict[str, float]  # {kind: bytes}
    seconds: float
    fits: bool

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    def min_bytes(self, micro_batch: int) -> float:
        """Return the least bytes that a smaller micro-batch needs.

        What doesn't depend on its size stays, and the rest shrinks no faster than the size.
        """
        kinds = ("weights", "gradients", "optimizer", "communication")
        fixed = sum(self.memory.get(kind, 0) for kind in kinds)
        return fixed + (self.bytes - fixed) * micro_batch / self.micro_batch


def choose_micro_batch(
    work: StepWorkload,
    gpu: GPU,
    free: float,
    sizes: Sequence[int] | None = None,
    ac_modes: Sequence[str] = AC_MODES,
) -> Choice:
    """Choose the fastest micro-batch and checkpointing mode that need at most `free` bytes.

    `sizes` are powers of two by default. Where nothing fits: the leanest, with `fits` False.
    """
    sizes = sizes or [1 << n for n in range(work.rows.bit_length())]
    candidates = []
    for size, mode in itertools.product(sizes, ac_modes):
        candidates.append((work.seconds(gpu, size, mode), size, AC_MODES.index(mode)))
    too_big: list[Choice] = []
    for seconds, size, level in sorted(candidates):
        # Tracing is slow. Skip what can't fit, as another candidate didn't that recomputes as much
        # or more.
        lower_bounds = (
            other.min_bytes(size) for other in too_big if level <= AC_MODES.index(other.ac_mode)
        )
        if any(bound > free for bound in lower_bounds):
            continue
        mode = AC_MODES[level]
        choice = Choice(size, mode, work.memory(size, mode), seconds, True)
        if work.required_bytes(choice.memory) <= free:
            return choice
        too_big.append(choice)
    size, mode = min(sizes), ac_modes[-1]
    return Choice(size, mode, work.memory(size, mode), work.seconds(gpu, size, mode), False)


class StepCounts(NamedTuple):
    batch: int  # rows a step
    per_epoch: int  # steps
    total: int  # steps


def plan_steps(rows: int, batch: int, epochs: float) -> StepCounts:
    """Plan at least MIN_STEPS steps: too little data gets smaller batches and more epochs."""
    if math.ceil(rows / batch) * epochs < MIN_STEPS:
        batch = max(1, min(batch, int(rows * epochs / MIN_STEPS)))
        epochs = max(epochs, MIN_STEPS / math.ceil(rows / batch))
    per_epoch = math.ceil(rows / batch)
    return StepCounts(batch, per_epoch, math.ceil(per_epoch * epochs))


# --- which GPU


def gpu_words(name: str) -> set[str]:
    """Split a GPU's name, however it is spelt: "NVIDIA A100-SXM4-80GB" → {a100, 80}."""
    brands = r"nvidia|geforce|tesla|quadro|[rg]tx|gpu|graphics|generation|sxm\d?|hbm\d?e?|gi?b\b"
    text = re.sub(brands, " ", name.lower())
    text = re.sub("pcie|nvl|laptop", r" \g<0> ", text)
    return set(re.findall(r"[a-z]\d+[a-z]?(?![a-z\d])|[a-z]+|\d+", text))


def find_gpu(name: str) -> str | None:
    """Find a GPU's key in GPUS by its name: the one with most words, which must all be in the name.

    The name may also have its memory ("3060 12GB"), and PCIe where the GPU isn't an SXM one.
    """
    words = gpu_words(name)
    for key in sorted(GPUS, key=lambda key: -len(gpu_words(key))):
        gpu, left = GPUS[key], words - gpu_words(key)
        if "SXM" not in gpu.name:
            left.discard("pcie")
        sizes = {word for word in left if word.isdigit() and int(word)}
        left -= {size for size in sizes if 0.88 <= gpu.gib / int(size) <= 1}
        if gpu_words(key) <= words and not left:
            return key
    return None


def similar_gpus(name: str) -> list[str]:
    """Return the keys in GPUS that an unknown name may mean."""
    words = gpu_words(name)
    similar = [key for key in GPUS if gpu_words(key) <= words]
    if words:
        similar += [key for key in GPUS if words < gpu_words(key)]
    return similar or difflib.get_close_matches("".join(sorted(words)), GPUS)


def gpu_from_name(name: str) -> GPU:
    """Return this machine's GPU by its name in torch; an unknown one's peak is measured."""
    gib = torch.cuda.mem_get_info()[1] / devices.GIB
    gpu = GPUS.get(find_gpu(name) or find_gpu(f"{name} {math.ceil(gib)}") or "")
    if gpu and gpu.peak and abs(gpu.gib - gib) < 0.1 * gib:
        return dataclasses.replace(gpu, gib=gib)
    peak = metrics.measure_peak_flops(torch.device("cuda"), torch.bfloat16) / 1e12
    return GPU(name, gib, 800, peak, 0.6, "assumed for an unknown GPU, its peak measured", 12)


def this_cpu(dtype: torch.dtype) -> GPU:
    """Return this machine's CPU, its peak measured."""
    gpu = cpu_at_peak(metrics.measure_peak_flops(torch.device("cpu"), dtype))
    return dataclasses.replace(gpu, gib=devices.free_memory() / devices.GIB)


def cpu_at_peak(flops: float) -> GPU:
    """Return a CPU with this peak (FLOP/s), and a memory bandwidth in proportion to it."""
    return dataclasses.replace(CPU, peak=flops / 1e12, bandwidth=CPU.bandwidth * flops / 400e9)


def local_device(device: torch.device, dtype: torch.dtype) -> tuple[GPU, int]:
    """Return this machine's device, and the bytes of its memory that a model may fill."""
    if device.type == "cuda":
        gpu = gpu_from_name(torch.cuda.get_device_name(device))
        return gpu, torch.cuda.mem_get_info(device)[0] - memory.CUDA_RESERVE
    cpu = this_cpu(dtype)
    if device.type == "mps":
        mps = dataclasses.replace(cpu, name="MPS", basis="assumed")
        return mps, torch.mps.recommended_max_memory() - memory.CUDA_RESERVE
    return cpu, devices.free_memory()


def format_hours(hours: float) -> str:
    return cli.counted(round(60 * hours), "minutes") if hours < 2 else f"{hours:.1f} hours"


# --- this machine


def time_step(work: StepWorkload, choice: Choice, device: torch.device | None = None) -> float:
    """Time a step with random weights on `device` (default: this machine's), in seconds.

    A model of more than TIMED_PARAMETERS is timed with fewer blocks, twice: every further block
    takes as long as these.
    """
    device = device or devices.pick_device()
    layers = work.config.num_hidden_layers
    block = sum(wide * out for wide, out, _ in work.config.linears.values())
    most = min(layers, max(2, TIMED_PARAMETERS // block))
    seconds = []
    for count in [most] if most == layers else [most // 2, most]:
        config = dataclasses.replace(work.config, num_hidden_layers=count)
        part = dataclasses.replace(work, config=config, rows=choice.micro_batch, world=1)
        least = 0 if device.type == "cpu" else 30
        seconds.append(benchmark_step(part, choice, device, seconds=least))
    per_block = (seconds[-1] - seconds[0]) / max(1, most - most // 2)
    micro_batches = math.ceil(work.rows / choice.micro_batch)
    return micro_batches * (seconds[-1] + (layers - most) * per_block)


def benchmark_step(
    work: StepWorkload,
    choice: Choice,
    device: torch.device,
    seconds: float = 60,
    tracker: memory.MemoryTracker | None = None,
) -> float:
    """Train on random weights for `seconds`, at least five steps; return the median step's seconds.

    Every step takes other synthetic rows. The first two steps, which also compile, are left out. A
    `tracker` counts the storages of one more step, which isn't timed.
    """
    ranks = distributed.Distributed(device)
    spec = dataclasses.replace(work.spec, activation_checkpointing=choice.ac_mode)
    model = step.build_model(work.config, ranks, spec)
    optimizer = optim.make_optimizer(model, 1e-4, 0.0, spec.pure_bf16)
    if device.type == "cuda" and work.compiled:
        step.compile_model(model, optimizer)
    seeds = itertools.count()

    def timed_step():
        rows = [synthetic_row(work, next(seeds)) for _ in range(work.rows)]
        metrics.synchronize(device)
        start = time.perf_counter()
        batches = step.micro_batches(rows, choice.micro_batch, ranks, work.seq_len)
        step.train_step(model, optimizer, batches, ranks)
        metrics.synchronize(device)
        return time.perf_counter() - start

    start = time.perf_counter()
    times = [timed_step(), timed_step()]
    if tracker is not None:
        with tracker:
            tracker.add_existing(model, optimizer)
            timed_step()
    while len(times) < 5 or time.perf_counter() - start < seconds:
        times.append(timed_step())
    return statistics.median(times[2:])


def synthetic_row(work: StepWorkload, seed: int) -> data.Row:
    """Make a row of random tokens, in documents of random lengths."""
    size, rng = work.seq_len, np.random.default_rng(seed)
    ids = rng.integers(0, work.config.vocab_size, size)
    labels = np.where(np.arange(size) % 100 < 100 * work.target_share, ids, data.IGNORE_INDEX)
    lengths: list[int] = []
    while left := size - sum(lengths):
        lengths.append(min(left, 1 + round(rng.exponential(work.doc_length - 1))))
    zeros = np.zeros(len(lengths), dtype=np.int64)
    return data.Row(ids, labels, labels != data.IGNORE_INDEX, np.array(lengths), zeros, zeros)
