"""Build, shard, step, evaluate: what training, planning and measuring share. One process or many, CPU or GPU: the same arithmetic.

Loss = sum over targets / their count over all micro-batches and ranks, so that micro-batches and ranks change nothing but the speed.
"""

import collections
import ctypes
import dataclasses
import datetime
import functools
import math
import os
import re
import sys
import time
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import lora
import quantize
from config import UserError
from data import IGNORED
from model import ROUND, Transformer

LONG = 4 * ROUND  # tokens of a row on a CPU from which on it is filled up to a multiple of ROUND
BETAS = (0.9, 0.95)  # AdamW's
SHARDS_BYTES = tuple(map(int, torch.__version__.split(".")[:2])) > (2, 11)  # 2.11's FSDP2 wants a gradient of every parameter
RESERVE = 2 << 30  # bytes of a GPU beside live tensors, assumed: CUDA's context 0.5 GiB, workspaces 0.5, what the allocator can't use 1


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Who computes: this process's device and number, how many there are, and how many hosts hold the whole model each."""

    device: torch.device
    rank: int = 0
    world: int = 1
    replicas: int = 1
    moves: list = dataclasses.field(default_factory=lambda: [0], compare=False)  # how often this rank got on with its work

    def move(self):
        self.moves[0] += 1

    @property
    def shards(self):
        """How many ranks share one copy of what is trained."""
        return self.world // self.replicas

    @functools.cached_property
    def mesh(self):
        """Sharded in a host, replicated over hosts: between them travels one sum of gradients a step."""
        dims = {"replicate": self.replicas, "shard": self.shards} if self.replicas > 1 else {"shard": self.world}
        device = self.device.type  # the default would take a GPU whatever --device says
        return dist.device_mesh.init_device_mesh(device, tuple(dims.values()), mesh_dim_names=tuple(dims))

    @property
    def first(self):
        return self.rank == 0

    def sum(self, tensor):
        """`tensor` summed over all ranks, in place."""
        self.move()
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, number):
        """Rank 0's int, on every rank."""
        self.move()
        if self.world == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def most(self, number):
        """The largest of all ranks' ints."""
        if self.world == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def barrier(self):
        if self.world > 1:
            self.sum(torch.zeros((), device=self.device)).item()  # dist.barrier() guesses a device; .item() waits for the GPU


def start(device=None):
    """Join the other ranks when torchrun started us: nccl on CUDA, gloo elsewhere. UserError for hosts of unlike size. → Ranks"""
    device = checkpoint.pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Ranks(device)
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if world % local or int(os.environ.get("GROUP_WORLD_SIZE", world // local)) != world // local:
        raise UserError(f"this host has {local} of {world} ranks", "Start as many on each host: GPUS=… ./fsdp_launch.sh")
    cuda = device.type == "cuda"
    patience = datetime.timedelta(hours=1)  # the other ranks wait while rank 0 downloads
    given = {}
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        given = {"store": open_store("group"), "rank": int(os.environ["RANK"]), "world_size": world}
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, timeout=patience, **given)
    replicas = world // local if local > 1 else 1  # with one GPU a host the model is sharded over all
    return Ranks(device, dist.get_rank(), world, replicas)


def open_store(name):
    """A connection of its own to the ranks' store, under a prefix of its own in each start of the job.

    torchrun --max-restarts hands the same store to every start: without the prefix ranks find the addresses of those before them.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    return dist.PrefixStore(f"{name}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def build(shape, ranks, folder=None, adapter=None, dtype=torch.bfloat16, recompute="none", nf4=False, pure=False, seed=0):
    """A model ready to train: sharded over the ranks, each rank reading only its own rows of `folder`'s tensors.

    `adapter`: the arguments of `lora.inject`; the base is then frozen in `dtype` and the adapter fp32. Without it everything is trained,
    as fp32 masters, or in `dtype` itself if `pure`. `nf4`: the blocks' linear layers are quantised as they are read, tensor by tensor.
    `folder=None`: random weights, N(0, 0.02), the same on any number of ranks; with `seed=None` too none at all, for who fills it.
    """
    model = outline(shape, ranks, adapter, dtype, recompute, nf4, pure)
    checkpoint.allocate(model, ranks.device)
    if folder:
        checkpoint.fill(model, folder, ranks)
    elif seed is not None:
        randomise(model, seed)
    if adapter:
        with torch.no_grad():
            for parameter, value in lora.initial(model, seed, checkpoint.rows_of):
                checkpoint.write(parameter, value)
    return model.train()


def outline(shape, ranks, adapter, dtype, recompute, nf4, pure, device="meta"):
    """The model with its adapter, sharded, without memory."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype if adapter or pure else torch.float32)
    try:
        with torch.device(device):
            model = Transformer(shape, dtype, recompute)
    finally:
        torch.set_default_dtype(usual)
    if nf4:
        quantize.pack(model)
    if adapter:
        lora.inject(model, **adapter)
    if ranks.world > 1:
        shard_model(model, ranks, dtype)
    return model


def shard_model(model, ranks, dtype):
    """FSDP2, a unit per block, as `Ranks.mesh` says: parameters gathered in `dtype`, gradients reduced in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # half a second, for several ranks alone

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)  # cos and sin stay fp32
    blocks, whole = list(model.model.layers), set()
    if not SHARDS_BYTES:  # then each rank holds the 4-bit base whole
        whole = {part for module in model.modules() if isinstance(module, quantize.Packed) for part in module.stored()}
    for unit in (*blocks, model):
        fully_shard(unit, mesh=ranks.mesh, mp_policy=policy, ignored_params=whole)
    for one, following in zip(blocks, blocks[1:]):  # the next block is gathered while this one computes
        one.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([one])


@torch.no_grad()
def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, target in checkpoint.weights(model).items():
        shape = checkpoint.shape_of(target)
        vector = torch.full(shape, float(name.endswith("norm.weight"))) if len(shape) == 1 else None  # a norm, or a bias
        checkpoint.write(target, torch.empty(shape).normal_(0, 0.02, generator=generator) if vector is None else vector)


def make_optimizer(model, lr, weight_decay, pure=False):
    """AdamW over what is trained, its moments there from the start; `pure`: for bf16 weights without fp32 masters."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if pure:
        optimizer = PureAdamW(weights, lr=lr, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.AdamW(weights, lr=lr, betas=BETAS, weight_decay=weight_decay, fused=True)
    for p in weights:
        optimizer.state[p] = no_moments(p)
    return optimizer


def no_moments(parameter):
    """AdamW's state of a parameter before its first update, by torch's names."""
    moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return {"step": torch.zeros((), dtype=torch.float32, device=parameter.device), **moments}


class PureAdamW(torch.optim.Optimizer):
    """AdamW whose weights and moments are all bf16: 8 bytes a parameter, gradient included, where fp32 masters take 16.

    Updates far below a weight's last bit would be lost in rounding to nearest; rounded at random, up or down in proportion to the
    distance, they arrive on average (arXiv 1502.02551). Computed in fp32, some million weights at a time.
    """

    PIECE = 1 << 24

    def __init__(self, weights, lr, weight_decay, betas=BETAS, eps=1e-8):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= no_moments(parameter)
                state["step"] += 1
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                for part in zip(*(checkpoint.shard(tensor)[0].flatten().split(self.PIECE) for tensor in tensors)):
                    self.update(*part, state["step"], **group)

    @staticmethod
    def update(weight, grad, mean, square, step, *, lr, weight_decay, betas, eps, **_):
        grad = grad.float()
        new_mean, new_square = mean.float().lerp(grad, 1 - betas[0]), square.float().lerp(grad * grad, 1 - betas[1])
        mean.copy_(new_mean)
        square.copy_(new_square)
        new_mean.div_(new_square.div_(1 - betas[1] ** step).sqrt_().add_(eps)).div_(1 - betas[0] ** step)
        weight.copy_(round_at_random((weight.float() * (1 - lr * weight_decay)).sub_(new_mean, alpha=lr)))


def round_at_random(x):
    """fp32 → the bf16 just below or above in size, as fp32, in proportion to how near they are: a bf16 is an fp32's first 16 bits."""
    bits = x.view(torch.int32)
    return torch.randint_like(bits, 1 << 16).add_(bits).bitwise_and_(-1 << 16).view(torch.float32)


# --- rows → tensors


class Batch(NamedTuple):
    """What `model.forward` takes, under its names: tokens, positions, labels (B, T) int64; edges and kept as there."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    edges: list | torch.Tensor
    kept: torch.Tensor


def collate(rows, device, shape=(1, 1)):
    """Rows → Batch, as long as the longest row and at least of `shape`; what a row lacks is a document of its own, without targets.

    On CUDA the number of edges is a power of two, so that compiled blocks see few sizes; on a CPU long rows are multiples of ROUND.
    """
    device = torch.device(device)
    count, length = max(shape[0], len(rows)), max([shape[1], *(len(row.ids) for row in rows)])
    if device.type == "cpu" and length > LONG:
        length += -length % ROUND
    tokens, labels, positions = (np.full((count, length), fill, dtype=np.int64) for fill in (0, IGNORED, 0))
    edges = []
    for i, row in enumerate([*rows, *[None] * (count - len(rows))]):
        lengths = [length]
        if row is not None:
            tokens[i, : len(row.ids)], labels[i, : len(row.ids)] = row.ids, row.labels
            lengths = [n for n in (*row.doc_lengths.tolist(), length - len(row.ids)) if n]
        positions[i] = np.concatenate([np.arange(n) for n in lengths])
        edges.extend(i * length + np.cumsum([0, *lengths[:-1]]))
    edges = [*map(int, edges), count * length]
    kept = torch.from_numpy(np.flatnonzero(labels != IGNORED))
    if device.type == "cuda":
        edges += edges[-1:] * ((1 << max(6, (len(edges) - 1).bit_length())) + 1 - len(edges))
        edges = torch.tensor(edges, dtype=torch.int32)
    batch = *map(torch.from_numpy, (tokens, positions, labels)), edges, kept
    return Batch(*(x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in batch))


def micro_batches(rows, size, ranks, length=1):
    """This rank's share of a step's rows, `size` rows at a time; every rank gets as many micro-batches, empty ones if need be.

    On CUDA all are of one shape, (size, length) at least.
    """
    count = math.ceil(math.ceil(len(rows) / ranks.world) / size)
    mine = rows[ranks.rank :: ranks.world]
    shape = (size, length) if ranks.device.type == "cuda" else (1, 1)
    return [collate(mine[i * size : (i + 1) * size], ranks.device, shape) for i in range(count)]


# --- one step


class NotFinite(Exception):
    """A loss or gradient that is no number: the weights were left as they were."""


class NoRoom(Exception):
    """The GPU has no room for the micro-batch: nothing was changed."""


def train_step(model, optimizer, batches, ranks, clip=1.0):
    """Forward, backward and update over micro-batches. → (loss per target, gradient norm, targets)

    A step without targets changes nothing. Raises NotFinite and NoRoom before the weights are touched.
    """
    count = ranks.sum(torch.tensor(sum(len(batch.kept) for batch in batches), device=ranks.device)).item()
    if count == 0:
        return 0.0, 0.0, 0
    total = ranks.sum(gradients(model, batches, ranks, count)).item() / count
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    norm = checkpoint.full(norm).item()
    if not math.isfinite(total) or not math.isfinite(norm):
        optimizer.zero_grad()
        raise NotFinite(f"loss {total}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return total, norm, count


def gradients(model, batches, ranks, count):
    """Add the gradients of a step with `count` targets; → this rank's sum of losses. NoRoom: they are as if it had never begun."""
    total = torch.zeros((), device=ranks.device)
    random = random_state(ranks.device)
    try:
        for left, batch in zip(range(len(batches) - 1, -1, -1), batches):
            ranks.move()
            if ranks.replicas > 1:
                model.set_requires_all_reduce(left == 0)  # hosts exchange their sums once
            loss, _ = model(**batch._asdict())
            (loss * (ranks.world / count)).backward()  # FSDP averages over ranks: times world makes it the sum
            total += loss.detach()
        return total
    except torch.OutOfMemoryError:
        pass  # the error holds the frames, and they the tensors: leave it first
    for parameter in model.parameters():
        parameter.grad = None
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    set_random_state(random)
    raise NoRoom


def probe(model, rows, size, ranks, length, accumulates):
    """NoRoom when a micro-batch of the `size` longest rows doesn't fit; `accumulates`: beside the gradients of another one."""
    longest = sorted(rows, key=lambda row: -len(row.ids))[:size]
    random = random_state(ranks.device)
    gradients(model, micro_batches(longest * ranks.world, size, ranks, length) * (2 if accumulates else 1), ranks, 1)
    for parameter in model.parameters():
        parameter.grad = None
    set_random_state(random)


def random_state(device):
    """What the generators draw next in a step, by device; → {"cpu": bytes as a tensor, …}"""
    states = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_random_state(states):
    for name, state in states.items():
        (torch if name == "cpu" else getattr(torch, name)).set_rng_state(state)


# --- held-out loss


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over held-out targets. `bits`, `chars`: (sessions,), on the words of messages alone."""

    nats: float
    count: int
    word_nats: float
    words: int
    bits: np.ndarray
    chars: np.ndarray

    @property
    def metrics(self):
        return {
            "val_loss": self.nats / max(1, self.count),
            "val_bits_per_char": float(self.bits.sum() / max(1, self.chars.sum())),
            "val_format_loss": (self.nats - self.word_nats) / max(1, self.count - self.words),
        }


@torch.no_grad()
def evaluate(model, rows, ranks, micro_batch, length=1):
    """The loss of every target of `rows`, summed over the ranks. `length` as in `micro_batches`. → Evaluation"""
    shape = (micro_batch, length) if ranks.device.type == "cuda" else (1, 1)
    model.eval()
    sessions = 1 + max(int(row.sessions.max()) for row in rows)
    sums = torch.zeros(4 + 2 * sessions, dtype=torch.float64)
    bits, chars = sums[4 : 4 + sessions], sums[4 + sessions :]
    mine = rows[ranks.rank :: ranks.world]
    for i in range(0, math.ceil(len(rows) / ranks.world), micro_batch):
        ranks.move()
        part = mine[i : i + micro_batch]
        losses, _ = model(**collate(part, ranks.device, shape)._asdict(), reduction="none")
        if not part:
            continue
        losses = losses.cpu().double()
        kept = torch.from_numpy(np.concatenate([row.labels for row in part]) != IGNORED)
        words = torch.from_numpy(np.concatenate([row.words for row in part]))[kept]
        session = torch.from_numpy(np.concatenate([np.repeat(row.sessions, row.doc_lengths) for row in part])).long()[kept]
        sums[:4] += torch.stack([losses.sum(), kept.sum(), losses[words].sum(), words.sum()])
        bits.index_add_(0, session[words], losses[words] / math.log(2))
        for row in part:
            chars.index_add_(0, torch.from_numpy(row.sessions).long(), torch.from_numpy(row.chars).double())
    model.train()
    if ranks.world > 1:
        sums = ranks.sum(sums.to(ranks.device)).cpu()
    nats, count, word_nats, words = sums[:4].tolist()
    return Evaluation(nats, int(count), word_nats, int(words), sums[4 : 4 + sessions].numpy(), sums[4 + sessions :].numpy())


# --- speed and memory


class Live(TorchDispatchMode):
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
                self.add(checkpoint.local_part(tensor).untyped_storage())
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
            storage = checkpoint.local_part(tensor).untyped_storage()
            if storage._cdata in self.known:
                old, size, known = self.known[storage._cdata]
                self.known[storage._cdata] = kind, size, known
                self.held[old] -= size
                self.held[kind] += size


class Moments:
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
                args[0].register_hook(lambda grad: self.kind("communication"))  # FSDP2 reduces the block's gradients next

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


def moments(
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
        ranks = Ranks(torch.device("cpu"), 0, world)
        if world > 1:
            assert ranks.mesh  # made before tensors are fake
        with FakeTensorMode(), Live() as live:
            model = outline(shape, ranks, adapter, dtype, recompute, nf4, pure, "cpu").train()
            model.compiled = compiled
            live.kind = "optimizer"
            optimizer = make_optimizer(model, 1e-4, 0.0, pure)
            parts = Moments(live, model, ranks)
            parts.at("start", "activations")
            tokens = torch.zeros(micro_batch, length, dtype=torch.int64)
            edges = torch.zeros(65, dtype=torch.int32)  # a tensor: attention as on CUDA
            if document:
                edges = [*range(0, micro_batch * length, document), micro_batch * length]
            kept = torch.zeros(int(micro_batch * length * labelled), dtype=torch.int64)
            batch = Batch(tokens, tokens, tokens, edges, kept)
            if micro_batches > 1:
                for parameter in parts.trained:
                    parameter.grad = torch.zeros_like(parameter)
            gradients(model, [batch], ranks, 1)
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


def predict(*given, **more):
    """The most bytes that one GPU holds in a training step, given as for `moments`. `plan.memory` says it sooner.

    Real runs need more: CUDA's context and libraries, and what the allocator can't use (RESERVE).
    """
    return max(sum(held.values()) for held in moments(*given, **more).values())


def flops(model, rows):
    """(model, hardware) FLOPs of a training step over `rows`. The hardware also recomputes blocks; the model doesn't."""
    needed, again = flops_of(model, *sizes(rows))
    return needed, needed + (again if model.recompute == "full" else 0)


def sizes(rows):
    """What a step over `rows` costs depends on: tokens, those with a target, and pairs of tokens that see each other."""
    pairs = sum(float((n * (n + 1) / 2).sum()) for n in (row.doc_lengths.astype(np.float64) for row in rows))
    return sum(len(row.ids) for row in rows), sum(int((row.labels != IGNORED).sum()) for row in rows), pairs


def flops_of(model, tokens, labelled, pairs):
    """(FLOPs of a training step of such `sizes`, those of the blocks' forward pass): exact matmul counts.

    A matmul of P weights costs 2 P a token forward, 2 P for the input's gradient and 2 P for the weight's where it is trained.
    Attention over a document of n tokens: 4 H D n (n + 1) / 2 forward, twice that backward (PaLM, appendix B).
    """
    shape = model.config
    forward = backward = 0
    for block in model.model.layers:
        late = labelled if block is model.model.layers[-1] and not model.compiled else tokens  # where model.forward drops the others
        attention = 4 * shape.num_attention_heads * shape.head_dim * pairs
        forward, backward = forward + attention, backward + 2 * attention
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear):
                n = tokens if name.endswith(("q_proj", "k_proj", "v_proj")) else late
                trained = sum(p.numel() for p in linear.parameters() if p.requires_grad)
                frozen = 0 if linear.stored()[0].requires_grad else linear.in_features * linear.out_features
                forward, backward = forward + 2 * n * (frozen + trained), backward + 2 * n * (frozen + 2 * trained)
    head = 2 * shape.vocab_size * shape.hidden_size * labelled
    return forward + backward + head * (3 if model.lm_head.weight.requires_grad else 2), forward


def measured_peak(device, dtype):
    """FLOP/s of a large square matmul on this device, the best of three: what "100% MFU" means here."""
    n = 1024 if device.type == "cpu" else 8192
    generator = torch.Generator(device).manual_seed(0)  # its own: a run that goes on draws what it would have drawn
    a, b = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = math.inf
    for _ in range(4):
        synchronise(device)
        begin = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def compiled_graphs():
    """How many graphs torch.compile has made in this process: it should stop growing after the first steps."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def synchronise(device):
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
        counters = (ctypes.c_uint64 * 9)(72)  # a PROCESS_MEMORY_COUNTERS: its size in bytes, then the most held so far
        ctypes.windll.psapi.GetProcessMemoryInfo(ctypes.c_void_p(-1), counters, 72)
        return counters[1] / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS, in bytes
