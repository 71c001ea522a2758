"""Predict the memory of a training step by running it on fake tensors."""

import collections
import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import ModelConfig, Transformer
from training import distributed, optim, step
from weights import shards

# Bytes of a GPU beside live tensors, assumed: CUDA's context 0.5 GiB, workspaces 0.5 GiB, and 1 GiB
# that the allocator can't use.
CUDA_RESERVE = 2 << 30


@dataclasses.dataclass
class LiveStorage:
    """A storage that MemoryTracker counts."""

    kind: str
    size: int  # bytes
    ref: weakref.ref


class MemoryTracker(TorchDispatchMode):
    """Count the bytes of live storages: `now`, and at their `peak`.

    With fake tensors it needs neither the memory nor a GPU. A new storage counts as the tracker's
    current `kind`; `by_kind` splits `now`, and `peak_by_kind` the peak.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.kind = "weights"
        self.by_kind: collections.Counter[str] = collections.Counter()
        self.peak_by_kind: dict[str, int] = {}
        self.storages: dict[int, LiveStorage] = {}  # by address

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        if "varlen_attn_backward" in str(op):
            self.note_scratch(flash_scratch_bytes(*args))
        if self.kind == "communication":
            self.update_sizes()
        if self.now > self.peak:
            self.reset_peak()
        return out

    def note_scratch(self, size: int) -> None:
        """Count bytes that an operator held only while it ran."""
        if self.now + size > self.peak:
            self.count(self.kind, size)
            self.reset_peak()
            self.count(self.kind, -size)

    def reset_peak(self) -> None:
        """Take what is live now as the peak."""
        self.peak = self.now
        self.peak_by_kind = dict(self.by_kind)

    def update_sizes(self) -> None:
        """Count storages again that FSDP2 emptied to free what it gathered: no operator does it."""
        for live in list(self.storages.values()):
            storage = live.ref()
            if storage is not None and storage.nbytes() != live.size:
                self.count(live.kind, storage.nbytes() - live.size)
                live.size = storage.nbytes()

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is freed."""
        storage = shards.local_part(tensor).untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = LiveStorage(self.kind, storage.nbytes(), weakref.ref(storage))
            self.count(self.kind, storage.nbytes())
            weakref.finalize(storage, self.remove, key)

    def add_existing(self, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
        """Count what a model and its optimizer already hold."""
        for tensor in model.parameters():
            self.add(tensor)
        for state in optimizer.state.values():
            for tensor in state.values():
                self.add(tensor)

    def remove(self, key: int) -> None:
        live = self.storages.pop(key)
        self.count(live.kind, -live.size)

    def count(self, kind: str, size: int) -> None:
        self.now += size
        self.by_kind[kind] += size

    def relabel(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Count these tensors as `kind` from now on."""
        for tensor in tensors:
            live = self.storages.get(shards.local_part(tensor).untyped_storage()._cdata)
            if live:
                self.by_kind[live.kind] -= live.size
                self.by_kind[kind] += live.size
                live.kind = kind


def flash_scratch_bytes(grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *args) -> int:
    """Return what FlashAttention 2's backward pass allocates beside its results.

    query (N, H, D), key (N, G, D). Its sums are in fp32, with 128 rows of room for each document;
    with grouped heads, each head first gets its own gradients of keys and values. Source: torch,
    csrc/flash_api.cpp, mha_varlen_bwd.
    """
    (N, H, D), (_, G, _) = query.shape, key.shape
    cu_seqlens = next(x for x in args if torch.is_tensor(x) and x.dtype == torch.int32)
    rows = N + 128 * (len(cu_seqlens) - 1)
    sums = 4 * rows * H * (math.ceil(D / 32) * 32 + 1)
    return sums + (2 * N * H * D * query.itemsize if H != G else 0)


class PhasePeaks:
    """The phases of a training step, and the most that is live in each.

    `peaks` is {phase: {kind: bytes}}. A phase is a micro-batch's pass through a block, forward or
    backward, or what lies between. Blocks are numbered from the first (0, 1) and from the last
    (-1, -2); those between need no more than one of these. So all models of three and more blocks
    have the same phases, and a phase's peak is a constant plus a fixed amount per block.
    """

    def __init__(
        self, tracker: MemoryTracker, model: Transformer, ranks: distributed.Distributed
    ) -> None:
        self.tracker = tracker
        self.sharded = ranks.world > 1
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.peaks: dict[str, dict[str, int]] = {}
        self.phases: list[str] = []  # current ones: a middle block of three is both 1 and -2
        blocks = model.model.layers
        for index, block in enumerate(blocks):
            numbers = [n for n in (index, index - len(blocks)) if n in (0, 1, -1, -2)]
            self.hook_block(block, numbers)
        model.model.norm.register_forward_pre_hook(lambda *_: self.begin("head", "head"))

    def hook_block(self, block: nn.Module, numbers: Sequence[int]) -> None:
        """Count what FSDP2's hooks allocate as communication, and the rest as activations."""

        def enter_forward(*_):
            self.begin("forward", "communication", numbers)

        def run_forward(module, args):
            self.set_kind("activations")
            if args[0].requires_grad:
                # With this gradient the block is done; FSDP2 reduces those of its weights next.
                args[0].register_hook(lambda grad: self.set_kind("communication"))

        def enter_backward(module, args, out):
            out.register_hook(lambda grad: self.begin("backward", "communication", numbers))

        def run_backward(module, args, out):
            out.register_hook(lambda grad: self.set_kind("activations"))

        block.register_forward_pre_hook(enter_forward, prepend=True)
        block.register_forward_pre_hook(run_forward)
        block.register_forward_hook(enter_backward, prepend=True)
        block.register_forward_hook(run_backward)

    def set_kind(self, kind: str) -> None:
        """Count what is allocated from now on as `kind`; a single GPU has no communication."""
        if self.sharded:
            self.tracker.update_sizes()
        elif kind == "communication":
            kind = "activations"
        self.tracker.kind = kind

    def begin(self, phase: str, kind: str, numbers: Sequence[int | str] = ("",)) -> None:
        """End the current phase and begin the next one."""
        for name in self.phases:
            if sum(self.peaks.get(name, {}).values()) < self.tracker.peak:
                self.peaks[name] = self.tracker.peak_by_kind
        gradients = (p.grad for p in self.trained if p.grad is not None)
        self.tracker.relabel(gradients, "gradients")
        self.phases = [f"{phase} {number}" for number in numbers]
        self.set_kind(kind)
        self.tracker.reset_peak()


@contextlib.contextmanager
def fake_distributed(world: int) -> Iterator[distributed.Distributed]:
    """Be the first of `world` ranks whose collectives move nothing."""
    if world == 1:
        yield distributed.Distributed(torch.device("cpu"))
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        ranks = distributed.Distributed(torch.device("cpu"), 0, world)
        assert ranks.mesh  # made before tensors are fake
        yield ranks
    finally:
        dist.destroy_process_group()


def zero_batch(
    micro_batch: int, seq_len: int, target_share: float, doc_length: int | None, documents: int
) -> step.Batch:
    """Make a batch of zeros; with a `doc_length` its attention is that of a CPU, else of CUDA."""
    size = micro_batch * seq_len
    tokens = torch.zeros(micro_batch, seq_len, dtype=torch.int64)
    target_positions = torch.zeros(int(size * target_share), dtype=torch.int64)
    cu_seqlens: list | torch.Tensor = torch.zeros(documents + 1, dtype=torch.int32)
    if doc_length:
        cu_seqlens = [*range(0, size, doc_length), size]
    return step.Batch(tokens, tokens, tokens, cu_seqlens, target_positions)


def trace_step_memory(
    config: ModelConfig,
    spec: step.ModelSpec,
    micro_batch: int,
    seq_len: int,
    micro_batches: int = 1,
    world: int = 1,
    target_share: float = 0.4,
    doc_length: int | None = None,
    documents: int = 64,
    compiled: bool = False,
) -> dict[str, dict[str, int]]:
    """Run a training step on fake tensors, as one of `world` GPUs. → {phase: {kind: bytes}}

    Of several micro-batches only the last is run, beside the gradients of those before.
    `target_share` is the share of tokens with a target, `documents` their number in a micro-batch.
    `doc_length` is for a step on a CPU, whose attention keeps other tensors. `compiled` takes the
    order of work of `compile_blocks`, not what its compiler saves.
    """
    with fake_distributed(world) as ranks, FakeTensorMode(), MemoryTracker() as tracker:
        model = step.build_meta_model(config, ranks, spec, "cpu").train()
        model.compiled = compiled
        if doc_length and spec.activation_checkpointing == "none":
            model.recompute_cheap_parts()  # as step.build_model does
        tracker.kind = "optimizer"
        optimizer = optim.make_optimizer(model, 1e-4, 0.0, spec.pure_bf16)
        phases = PhasePeaks(tracker, model, ranks)
        phases.begin("start", "activations")
        batch = zero_batch(micro_batch, seq_len, target_share, doc_length, documents)
        if micro_batches > 1:
            for parameter in phases.trained:
                parameter.grad = torch.zeros_like(parameter)
        step.accumulate_gradients(model, [batch], ranks, 1)
        phases.begin("clip", "activations")
        nn.utils.clip_grad_norm_(phases.trained, 1.0)
        phases.begin("update", "activations")
        optimizer.step()
        optimizer.zero_grad()
        phases.begin("end", "activations")
    return phases.peaks


def predict_peak_memory(*args, **kwargs) -> int:
    """Predict the most bytes that one GPU holds in a training step.

    Takes the arguments of `trace_step_memory`; `cost.peak_memory` is faster. Real runs need
    CUDA_RESERVE more.
    """
    phases = trace_step_memory(*args, **kwargs)
    return max(sum(by_kind.values()) for by_kind in phases.values())
