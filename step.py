"""Build, shard, step, evaluate: what training, planning and measuring share. One process or many, CPU or GPU: the same arithmetic.

Loss = sum over targets / their count over all micro-batches and ranks, so that micro-batches and ranks change nothing but the speed.
"""

import dataclasses
import datetime
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import checkpoint
import lora
from data import IGNORED
from model import Transformer


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Who computes: this process's device and number, and how many there are."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self):
        return self.rank == 0

    def sum(self, tensor):
        """`tensor` summed over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, number):
        """Rank 0's int, on every rank."""
        if self.world == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.broadcast(tensor, 0)
        return int(tensor)

    def barrier(self):
        if self.world > 1:
            self.sum(torch.zeros((), device=self.device)).item()  # dist.barrier() guesses a device; .item() waits for the GPU


def start(device=None):
    """Join the other ranks when torchrun started us: nccl on CUDA, gloo elsewhere. → Ranks"""
    device = checkpoint.pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return Ranks(device)
    cuda = device.type == "cuda"
    patience = datetime.timedelta(hours=1)  # the other ranks wait while rank 0 downloads
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None, timeout=patience)
    return Ranks(device, dist.get_rank(), dist.get_world_size())


def build(shape, ranks, folder=None, adapter=None, dtype=torch.bfloat16, recompute=False, seed=0):
    """A model ready to train: sharded over the ranks, each rank reading only its own rows of `folder`'s tensors.

    `adapter`: the arguments of `lora.inject`; the base is then frozen in `dtype` and the adapter fp32. Without it everything is trained,
    as fp32 masters. `folder=None`: random weights, N(0, 0.02), the same on any number of ranks.
    """
    with torch.device("meta"):
        model = Transformer(shape, dtype, recompute)
    if adapter:
        model.to(dtype)
        lora.inject(model, **adapter)
    if ranks.world > 1:
        shard_model(model, ranks, dtype)
    checkpoint.allocate(model, ranks.device)
    if folder:
        checkpoint.fill(model, folder)
    else:
        randomise(model, seed)
    if adapter:
        with torch.no_grad():
            for parameter, value in lora.initial(model, seed, checkpoint.full):
                checkpoint.write(parameter, value)
    return model.train()


def shard_model(model, ranks, dtype):
    """FSDP2 full shard, a unit per block: parameters gathered in `dtype`, gradients reduced in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)  # cos and sin stay fp32
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))  # the default would take a GPU whatever --device says
    for unit in (*model.model.layers, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)


@torch.no_grad()
def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            checkpoint.write(parameter, torch.ones(parameter.shape))
        else:
            checkpoint.write(parameter, torch.empty(parameter.shape).normal_(0, 0.02, generator=generator))


def make_optimizer(model, lr, weight_decay):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )


# --- rows → tensors


def collate(rows, device):
    """Rows → tokens, positions, labels (B, T) int64, as long as the longest row; the rest of a shorter one is a document of its own."""
    length = max([len(row.ids) for row in rows], default=1)
    tokens, labels, positions = (np.full((max(1, len(rows)), length), fill, dtype=np.int64) for fill in (0, IGNORED, 0))
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)], labels[i, : len(row.ids)] = row.ids, row.labels
        lengths = [*row.doc_lengths, length - len(row.ids)]
        positions[i] = np.concatenate([np.arange(n) for n in lengths])
    if not rows:
        positions[0] = np.arange(length)
    return tuple(torch.from_numpy(x).to(device, non_blocking=True) for x in (tokens, positions, labels))


def micro_batches(rows, size, ranks):
    """This rank's share of a step's rows, `size` rows at a time; every rank gets as many micro-batches, empty ones if need be."""
    count = math.ceil(math.ceil(len(rows) / ranks.world) / size)
    mine = rows[ranks.rank :: ranks.world]
    return [collate(mine[i * size : (i + 1) * size], ranks.device) for i in range(count)]


# --- one step


class NotFinite(Exception):
    """A loss or gradient that is no number: the weights were left as they were."""


def train_step(model, optimizer, batches, ranks, clip=1.0):
    """Forward, backward and update over micro-batches (tokens, positions, labels). → (loss per target, gradient norm, targets)

    A step without targets changes nothing. Raises NotFinite before the weights are touched.
    """
    count = ranks.sum(sum((labels != IGNORED).sum() for *_, labels in batches)).item()
    if count == 0:
        return 0.0, 0.0, 0
    total = torch.zeros((), device=ranks.device)
    for tokens, positions, labels in batches:
        loss, _ = model(tokens, positions, labels)
        (loss * (ranks.world / count)).backward()  # FSDP averages over ranks: times world makes it the sum
        total += loss.detach()
    total = ranks.sum(total).item() / count
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    norm = checkpoint.full(norm).item()
    if not math.isfinite(total) or not math.isfinite(norm):
        optimizer.zero_grad()
        raise NotFinite(f"loss {total}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return total, norm, count


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
def evaluate(model, rows, ranks, micro_batch):
    """The loss of every target of `rows`, summed over the ranks. → Evaluation"""
    model.eval()
    sessions = 1 + max(int(row.sessions.max()) for row in rows)
    sums = torch.zeros(4 + 2 * sessions, dtype=torch.float64)
    bits, chars = sums[4 : 4 + sessions], sums[4 + sessions :]
    mine = rows[ranks.rank :: ranks.world]
    for i in range(0, math.ceil(len(rows) / ranks.world), micro_batch):
        part = mine[i : i + micro_batch]
        losses, _ = model(*collate(part, ranks.device), reduction="none")
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


def flops(model, rows):
    """(model, hardware) FLOPs of a training step over `rows`: exact matmul counts. The hardware also recomputes blocks; the model doesn't.

    A matmul of P weights costs 2 P a token forward, 2 P for the input's gradient and 2 P for the weight's where it is trained.
    Attention over a document of n tokens: 4 H D n (n + 1) / 2 forward, twice that backward (PaLM, appendix B).
    """
    shape = model.config
    tokens, labelled = sum(len(row.ids) for row in rows), sum(int((row.labels != IGNORED).sum()) for row in rows)
    pairs = sum(float((n * (n + 1) / 2).sum()) for n in (row.doc_lengths.astype(np.float64) for row in rows))
    attention = 4 * shape.num_attention_heads * shape.head_dim * pairs * shape.num_hidden_layers
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in n}
    blocks = [p for n, p in matrices.items() if "lm_head" not in n]
    head = 2 * shape.vocab_size * shape.hidden_size * labelled
    trains_head = model.lm_head.weight.requires_grad
    forward = 2 * tokens * sum(p.numel() for p in blocks) + attention
    backward = 2 * tokens * sum(p.numel() * (2 if p.requires_grad else 1) for p in blocks) + 2 * attention
    needed = forward + backward + head * (3 if trains_head else 2)
    return needed, needed + (forward if model.recompute else 0)


def measured_peak(device, dtype):
    """FLOP/s of a large square matmul on this device, the best of three: what "100% MFU" means here."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):
        synchronise(device)
        begin = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best


def synchronise(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_gib(device):
    """The most memory used so far, in GiB: the device's, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
