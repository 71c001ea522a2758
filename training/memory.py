"""The memory of a training step, found by running it on fake tensors."""

import collections
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training import distributed, optim, step
from weights import shards

CUDA_RESERVE = (
    2 << 30
)  # bytes of a GPU beside live tensors, assumed: CUDA's context 0.5 GiB, workspaces 0.5, what the allocator can't use 1


# --- speed and memory


class MemoryTracker(TorchDispatchMode):
    """Bytes in live storages, `now` and at their `peak`; with fake tensors it needs neither the memory nor a GPU.

    `kind`: what new storages are counted as, in `held` and, at the peak, in `most`.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.kind, self.held, self.most = "weights", collections.Counter(), {}
        self.known = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for tensor in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(shards.local_part(tensor).untyped_storage())
        if self.kind == "communication":
            self.look_again()
        if self.now > self.peak:
            self.peak, self.most = self.now, dict(self.held)
        return out

    def look_again(self):
        """FSDP2 makes storages empty to free what it gathered, and no op tells."""
        for key, (kind, size, known) in [*self.known.items()]:
            if (storage := known()) is not None and storage.nbytes() != size:
                self.known[key] = kind, storage.nbytes(), known
                self.count(kind, storage.nbytes() - size)

    def add(self, storage):
        if storage._cdata not in self.known:
            self.known[storage._cdata] = self.kind, storage.nbytes(), weakref.ref(storage)
            self.count(self.kind, storage.nbytes())
            weakref.finalize(storage, self.drop, storage._cdata)

    def known_before(self, model, optimizer):
        """Count what a model and its optimizer already hold."""
        states = [value for state in optimizer.state.values() for value in state.values()]
        for tensor in (*model.parameters(), *states):
            self.add(tensor.untyped_storage())

    def drop(self, key):
        kind, size, _ = self.known.pop(key)
        self.count(kind, -size)

    def count(self, kind, size):
        self.now += size
        self.held[kind] += size

    def rename(self, tensors, kind):
        """From now on count these tensors as `kind`."""
        for tensor in tensors:
            storage = shards.local_part(tensor).untyped_storage()
            if storage._cdata in self.known:
                old, size, known = self.known[storage._cdata]
                self.known[storage._cdata] = kind, size, known
                self.held[old] -= size
                self.held[kind] += size


class PhasePeaks:
    """The parts of a training step, and the most that was live in each: `found` is {part: {kind: bytes}}.

    A part is a micro-batch's way through a block, forward or backward, or what lies between. Blocks are counted from the first
    (0, 1) and from the last (-1, -2); those between need no more than one of these. So all models of three blocks and more have the same
    parts, and what is live in one is a constant and so much a block.
    """

    def __init__(self, live, model, ranks):
        self.live, self.found, self.parts, self.sharded = live, {}, (), ranks.world > 1
        self.trained = [p for p in model.parameters() if p.requires_grad]
        for index, block in enumerate(layers := model.model.layers):
            names = [n for n in (index, index - len(layers)) if n in (0, 1, -1, -2)]
            self.watch(block, names)
        model.model.norm.register_forward_pre_hook(lambda *_: self.at("head", "head"))

    def watch(self, block, names):
        """Hooks around FSDP2's own: what they allocate is communication's, the rest activations."""

        def enter(*_):
            self.at("forward", "communication", names)

        def compute(module, args):
            self.kind("activations")
            if args[0].requires_grad:
                args[0].register_hook(
                    lambda grad: self.kind("communication")
                )  # FSDP2 reduces the block's gradients next

        def back(module, args, out):
            out.register_hook(lambda grad: self.at("backward", "communication", names))

        def computes_back(module, args, out):
            out.register_hook(lambda grad: self.kind("activations"))

        block.register_forward_pre_hook(enter, prepend=True)
        block.register_forward_pre_hook(compute)
        block.register_forward_hook(back, prepend=True)
        block.register_forward_hook(computes_back)

    def kind(self, kind):
        if self.sharded:
            self.live.look_again()
        self.live.kind = "activations" if kind == "communication" and not self.sharded else kind

    def at(self, part, kind, names=("",)):
        """One part ends and the next begins."""
        live = self.live
        for name in self.parts:
            if sum(self.found.get(name, {}).values()) < live.peak:
                self.found[name] = live.most
        live.rename((p.grad for p in self.trained if p.grad is not None), "gradients")
        self.parts = [f"{part} {name}" for name in names]
        self.kind(kind)
        live.peak, live.most = live.now, dict(live.held)


def trace_step_memory(
    shape,
    micro_batch,
    length,
    micro_batches=1,
    world=1,
    adapter=None,
    dtype=torch.bfloat16,
    recompute="none",
    nf4=False,
    pure=False,
    labelled=0.4,
    document=None,
    compiled=False,
):
    """What one of `world` GPUs holds in each part of a training step, found by running it on fake tensors. → `Moments.found`

    Of several micro-batches the last is run, beside the gradients of those before. `labelled`: the share of tokens with a target.
    `document`: tokens in one, for a step on a CPU, whose attention keeps other things. `compiled`: the order of work of `compile_blocks`,
    not what its compiler saves. The rest as for `build`.
    """
    if world > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        ranks = distributed.Distributed(torch.device("cpu"), 0, world)
        if world > 1:
            assert ranks.mesh  # made before tensors are fake
        with FakeTensorMode(), MemoryTracker() as live:
            model = step.build_meta_model(
                shape, ranks, adapter, dtype, recompute, nf4, pure, "cpu"
            ).train()
            model.compiled = compiled
            live.kind = "optimizer"
            optimizer = optim.make_optimizer(model, 1e-4, 0.0, pure)
            parts = PhasePeaks(live, model, ranks)
            parts.at("start", "activations")
            tokens = torch.zeros(micro_batch, length, dtype=torch.int64)
            cu_seqlens = torch.zeros(65, dtype=torch.int32)  # a tensor: attention as on CUDA
            if document:
                cu_seqlens = [*range(0, micro_batch * length, document), micro_batch * length]
            target_positions = torch.zeros(int(micro_batch * length * labelled), dtype=torch.int64)
            batch = step.Batch(tokens, tokens, tokens, cu_seqlens, target_positions)
            if micro_batches > 1:
                for parameter in parts.trained:
                    parameter.grad = torch.zeros_like(parameter)
            step.accumulate_gradients(model, [batch], ranks, 1)
            parts.at("clip", "activations")
            nn.utils.clip_grad_norm_(parts.trained, 1.0)
            parts.at("update", "activations")
            optimizer.step()
            optimizer.zero_grad()
            parts.at("end", "activations")
        return parts.found
    finally:
        if world > 1:
            dist.destroy_process_group()


def predict_peak_memory(*given, **more):
    """The most bytes that one GPU holds in a training step, given as for `moments`. `plan.memory` says it sooner.

    Real runs need more: CUDA's context and libraries, and what the allocator can't use (RESERVE).
    """
    return max(sum(held.values()) for held in trace_step_memory(*given, **more).values())
