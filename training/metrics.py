"""Speed and memory of a step: FLOPs, the device's peak, GiB in use."""

import ctypes
import math
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import IGNORE_INDEX, Row
from model import Linear, Transformer


class StepSizes(NamedTuple):
    """What the FLOPs of a step depend on."""

    tokens: float
    targets: float
    attention_pairs: float  # pairs of tokens that see each other


class StepFlops(NamedTuple):
    """FLOPs of a training step, and the part of them that recomputing the blocks repeats."""

    total: float
    blocks_forward: float


def step_flops(model: Transformer, rows: Sequence[Row]) -> tuple[float, float]:
    """Return the (model, hardware) FLOPs of a training step over `rows`.

    Only the hardware's count what activation checkpointing recomputes.
    """
    flops = count_flops(model, step_sizes(rows))
    recomputed = flops.blocks_forward if model.activation_checkpointing == "full" else 0
    return flops.total, flops.total + recomputed


def step_sizes(rows: Sequence[Row]) -> StepSizes:
    """Count tokens, targets and attention pairs of `rows`."""
    tokens = targets = 0
    pairs = 0.0
    for row in rows:
        tokens += len(row.ids)
        targets += int((row.labels != IGNORE_INDEX).sum())
        lengths = row.doc_lengths.astype(np.float64)
        pairs += float((lengths * (lengths + 1) / 2).sum())
    return StepSizes(tokens, targets, pairs)


def count_flops(model: Transformer, sizes: StepSizes) -> StepFlops:
    """Count the FLOPs of a training step's matmuls, exactly.

    A matmul of P weights costs 2 P a token forward, 2 P for the gradient of its input, and 2 P for
    that of its weights where they are trained. Attention over a document of n tokens costs
    4 H D n (n + 1) / 2 forward and twice that backward (PaLM, appendix B).
    """
    config = model.config
    attention = 4 * config.num_attention_heads * config.head_dim * sizes.attention_pairs
    forward = backward = 0.0
    for block in model.model.layers:
        forward += attention
        backward += 2 * attention
        # Behind the last block's attention, model.forward drops tokens without a target.
        drops = block is model.model.layers[-1] and not model.compiled
        for name, linear in block.named_modules():
            if isinstance(linear, Linear):
                before = name.endswith(("q_proj", "k_proj", "v_proj"))
                n = sizes.targets if drops and not before else sizes.tokens
                trained = sum(p.numel() for p in linear.parameters() if p.requires_grad)
                frozen = linear.in_features * linear.out_features
                if linear.stored()[0].requires_grad:
                    frozen = 0
                forward += 2 * n * (frozen + trained)
                backward += 2 * n * (frozen + 2 * trained)
    head = 2 * config.vocab_size * config.hidden_size * sizes.targets
    head *= 3 if model.lm_head.weight.requires_grad else 2
    return StepFlops(forward + backward + head, forward)


def measure_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure FLOP/s of a large square matmul, the best of four: what "100% MFU" means here."""
    n = 1024 if device.type == "cpu" else 8192
    # A generator of its own, so that a resumed run draws the same numbers as one that went on.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = math.inf
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def count_compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process.

    The number should stop growing after the first steps.
    """
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish its queued work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_gib(device: torch.device) -> float:
    """Return the most memory used so far, in GiB: the device's, or on a CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    return cpu_peak_rss() / 2**30


def cpu_peak_rss() -> int:
    """Return the peak resident set size of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where getrusage's peak includes the parent process's
        peak = re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8"))
        if peak:
            return int(peak[1]) << 10
    if sys.platform == "win32":
        # A PROCESS_MEMORY_COUNTERS: its own size, then (after page faults) the peak.
        counters = (ctypes.c_uint64 * 9)(72)
        ctypes.windll.psapi.GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, 72)
        return counters[1]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
