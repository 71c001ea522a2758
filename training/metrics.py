"""Speed and memory of a step: FLOPs, the device's peak, GiB in use."""

import ctypes
import math
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import IGNORE_INDEX


def step_flops(model, rows):
    """(model, hardware) FLOPs of a training step over `rows`. The hardware also recomputes blocks; the model doesn't."""
    needed, again = flops_of(model, *step_sizes(rows))
    return needed, needed + (again if model.recompute == "full" else 0)


def step_sizes(rows):
    """What a step over `rows` costs depends on: tokens, those with a target, and pairs of tokens that see each other."""
    pairs = sum(
        float((n * (n + 1) / 2).sum()) for n in (row.doc_lengths.astype(np.float64) for row in rows)
    )
    return (
        sum(len(row.ids) for row in rows),
        sum(int((row.labels != IGNORE_INDEX).sum()) for row in rows),
        pairs,
    )


def flops_of(model, tokens, labelled, pairs):
    """(FLOPs of a training step of such `sizes`, those of the blocks' forward pass): exact matmul counts.

    A matmul of P weights costs 2 P a token forward, 2 P for the input's gradient and 2 P for the weight's where it is trained.
    Attention over a document of n tokens: 4 H D n (n + 1) / 2 forward, twice that backward (PaLM, appendix B).
    """
    shape = model.config
    forward = backward = 0
    for block in model.model.layers:
        late = (
            labelled if block is model.model.layers[-1] and not model.compiled else tokens
        )  # where model.forward drops the others
        attention = 4 * shape.num_attention_heads * shape.head_dim * pairs
        forward, backward = forward + attention, backward + 2 * attention
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                n = tokens if name.endswith(("q_proj", "k_proj", "v_proj")) else late
                trained = sum(p.numel() for p in linear.parameters() if p.requires_grad)
                frozen = (
                    0
                    if linear.stored()[0].requires_grad
                    else linear.in_features * linear.out_features
                )
                forward, backward = (
                    forward + 2 * n * (frozen + trained),
                    backward + 2 * n * (frozen + 2 * trained),
                )
    head = 2 * shape.vocab_size * shape.hidden_size * labelled
    return forward + backward + head * (3 if model.lm_head.weight.requires_grad else 2), forward


def measure_peak_flops(device, dtype):
    """FLOP/s of a large square matmul on this device, the best of three: what "100% MFU" means here."""
    n = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(
        0
    )  # its own: a run that goes on draws what it would have drawn
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = math.inf
    for _ in range(4):
        synchronize(device)
        begin = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def count_compiled_graphs():
    """How many graphs torch.compile has made in this process: it should stop growing after the first steps."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_gib(device):
    """The most memory used so far, in GiB: the device's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak is handed down by whoever started this process
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text(encoding="utf-8"))[1]) / 2**20
    if sys.platform == "win32":
        counters = (ctypes.c_uint64 * 9)(
            72
        )  # a PROCESS_MEMORY_COUNTERS: its size in bytes, then the most held so far
        ctypes.windll.psapi.GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, 72)
        return counters[1] / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS, in bytes
