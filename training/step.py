"""Build a model, make batches, take one step, compute the validation loss.

Loss = sum over targets / number of targets, over all micro-batches and ranks: micro-batch size and ranks change the speed only.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import lora
from cli import UserError
from data import IGNORE_INDEX
from model import CPU_MULTIPLE, Transformer
from training import distributed
from weights import quantize, shards
from weights.load import load_weights
from weights.quantize import NF4_BLOCK

LONG_ROW = (
    4 * CPU_MULTIPLE
)  # tokens of a row on a CPU from which on it is filled up to a multiple of ROUND


def build_model(
    shape,
    ranks,
    folder=None,
    adapter=None,
    dtype=torch.bfloat16,
    recompute="none",
    nf4=False,
    pure=False,
    seed=0,
):
    """A model ready to train: sharded over the ranks, each rank reading only its own rows of `folder`'s tensors.

    `adapter`: the arguments of `lora.inject`; the base is then frozen in `dtype` and the adapter fp32. Without it everything is trained,
    as fp32 masters, or in `dtype` itself if `pure`. `nf4`: the blocks' linear layers are quantised as they are read, tensor by tensor.
    `folder=None`: random weights, N(0, 0.02), the same on any number of ranks; with `seed=None` too none at all, for who fills it.
    """
    model = build_meta_model(shape, ranks, adapter, dtype, recompute, nf4, pure)
    shards.materialize(model, ranks.device)
    if folder:
        load_weights(model, folder, ranks)
    elif seed is not None:
        init_weights(model, seed)
    if adapter:
        with torch.no_grad():
            for parameter, value in lora.initial_values(model, seed, shards.gather_rows):
                shards.copy_shard(parameter, value)
    return model.train()


def build_meta_model(shape, ranks, adapter, dtype, recompute, nf4, pure, device="meta"):
    """The model with its adapter, sharded, without memory."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype if adapter or pure else torch.float32)
    try:
        with torch.device(device):
            model = Transformer(shape, dtype, recompute)
    finally:
        torch.set_default_dtype(usual)
    if nf4:
        quantize.pack_linears(model)
    if adapter:
        lora.inject(model, **adapter)
    if ranks.world > 1:
        distributed.shard_model(model, ranks, dtype)
    return model


@torch.no_grad()
def init_weights(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, target in shards.named_weights(model).items():
        shape = shards.weight_shape(target)
        vector = (
            torch.full(shape, float(name.endswith("norm.weight"))) if len(shape) == 1 else None
        )  # a norm, or a bias
        shards.copy_shard(
            target,
            torch.empty(shape).normal_(0, 0.02, generator=generator) if vector is None else vector,
        )


# --- rows → tensors


class Batch(NamedTuple):
    """What `model.forward` takes, under its names: tokens, positions, labels (B, T) int64; cu_seqlens and target_positions as there."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: list | torch.Tensor
    target_positions: torch.Tensor


def collate(rows, device, shape=(1, 1)):
    """Rows → Batch, as long as the longest row and at least of `shape`; what a row lacks is a document of its own, without targets.

    On CUDA the number of cu_seqlens is a power of two, so that compiled blocks see few sizes; on a CPU long rows are multiples of ROUND.
    """
    device = torch.device(device)
    count, length = max(shape[0], len(rows)), max([shape[1], *(len(row.ids) for row in rows)])
    if device.type == "cpu" and length > LONG_ROW:
        length += -length % CPU_MULTIPLE
    tokens, labels, positions = (
        np.full((count, length), fill, dtype=np.int64) for fill in (0, IGNORE_INDEX, 0)
    )
    cu_seqlens = []
    for i, row in enumerate([*rows, *[None] * (count - len(rows))]):
        lengths = [length]
        if row is not None:
            tokens[i, : len(row.ids)], labels[i, : len(row.ids)] = row.ids, row.labels
            lengths = [n for n in (*row.doc_lengths.tolist(), length - len(row.ids)) if n]
        positions[i] = np.concatenate([np.arange(n) for n in lengths])
        cu_seqlens.extend(i * length + np.cumsum([0, *lengths[:-1]]))
    cu_seqlens = [*map(int, cu_seqlens), count * length]
    target_positions = torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX))
    if device.type == "cuda":
        cu_seqlens += cu_seqlens[-1:] * (
            (1 << max(6, (len(cu_seqlens) - 1).bit_length())) + 1 - len(cu_seqlens)
        )
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    batch = *map(torch.from_numpy, (tokens, positions, labels)), cu_seqlens, target_positions
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


class NonFiniteError(Exception):
    """A loss or gradient that is no number: the weights were left as they were."""


class OutOfMemory(Exception):
    """The GPU has no room for the micro-batch: nothing was changed."""


def train_step(model, optimizer, batches, ranks, clip=1.0):
    """Forward, backward and update over micro-batches. → (loss per target, gradient norm, targets)

    A step without targets changes nothing. Raises NotFinite and NoRoom before the weights are touched.
    """
    count = ranks.all_reduce(
        torch.tensor(sum(len(batch.target_positions) for batch in batches), device=ranks.device)
    ).item()
    if count == 0:
        return 0.0, 0.0, 0
    total = ranks.all_reduce(accumulate_gradients(model, batches, ranks, count)).item() / count
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    norm = shards.full_tensor(norm).item()
    if not math.isfinite(total) or not math.isfinite(norm):
        optimizer.zero_grad()
        raise NonFiniteError(f"loss {total}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return total, norm, count


def accumulate_gradients(model, batches, ranks, count):
    """Add the gradients of a step with `count` targets; → this rank's sum of losses. NoRoom: they are as if it had never begun."""
    total = torch.zeros((), device=ranks.device)
    random = random_state(ranks.device)
    try:
        for left, batch in zip(range(len(batches) - 1, -1, -1), batches):
            ranks.advance()
            if ranks.replicas > 1:
                model.set_requires_all_reduce(left == 0)  # hosts exchange their sums once
            loss, _ = model(**batch._asdict())
            (
                loss * (ranks.world / count)
            ).backward()  # FSDP averages over ranks: times world makes it the sum
            total += loss.detach()
        return total
    except torch.OutOfMemoryError:
        pass  # the error holds the frames, and they the tensors: leave it first
    for parameter in model.parameters():
        parameter.grad = None
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    set_random_state(random)
    raise OutOfMemory


def probe_micro_batch(model, rows, size, ranks, length, accumulates):
    """NoRoom when a micro-batch of the `size` longest rows doesn't fit; `accumulates`: beside the gradients of another one."""
    longest = sorted(rows, key=lambda row: -len(row.ids))[:size]
    random = random_state(ranks.device)
    accumulate_gradients(
        model,
        micro_batches(longest * ranks.world, size, ranks, length) * (2 if accumulates else 1),
        ranks,
        1,
    )
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
    """Sums over held-out targets. `bits`, `chars`: (sessions,), on the text of messages alone."""

    nats: float
    count: int
    content_nats: float
    content_tokens: int
    bits: np.ndarray
    chars: np.ndarray

    @property
    def metrics(self):
        return {
            "val_loss": self.nats / max(1, self.count),
            "val_bits_per_char": float(self.bits.sum() / max(1, self.chars.sum())),
            "val_format_loss": (self.nats - self.content_nats)
            / max(1, self.count - self.content_tokens),
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
        ranks.advance()
        part = mine[i : i + micro_batch]
        losses, _ = model(**collate(part, ranks.device, shape)._asdict(), reduction="none")
        if not part:
            continue
        losses = losses.cpu().double()
        kept = torch.from_numpy(np.concatenate([row.labels for row in part]) != IGNORE_INDEX)
        content = torch.from_numpy(np.concatenate([row.content_mask for row in part]))[kept]
        session = torch.from_numpy(
            np.concatenate([np.repeat(row.sessions, row.doc_lengths) for row in part])
        ).long()[kept]
        sums[:4] += torch.stack([losses.sum(), kept.sum(), losses[content].sum(), content.sum()])
        bits.index_add_(0, session[content], losses[content] / math.log(2))
        for row in part:
            chars.index_add_(
                0, torch.from_numpy(row.sessions).long(), torch.from_numpy(row.chars).double()
            )
    model.train()
    if ranks.world > 1:
        sums = ranks.all_reduce(sums.to(ranks.device)).cpu()
    nats, count, content_nats, content_tokens = sums[:4].tolist()
    return Evaluation(
        nats,
        int(count),
        content_nats,
        int(content_tokens),
        sums[4 : 4 + sessions].numpy(),
        sums[4 + sessions :].numpy(),
    )


def check_trainable(options, shape):
    """UserError for what the base, of this `shape`, can't be trained with."""
    uneven = [
        n
        for n in (
            shape.hidden_size,
            shape.intermediate_size,
            shape.num_attention_heads * shape.head_dim,
        )
        if n % NF4_BLOCK
    ]
    if options.qlora and uneven:
        raise UserError(
            f"--qlora keeps weights in blocks of {NF4_BLOCK}; {options.model} has layers {uneven[0]} wide",
            "Take --lora.",
        )
    if options.seq_len > (most := shape.max_position_embeddings):
        raise UserError(
            f"--seq-len {options.seq_len}: {options.model} was made for {most} tokens",
            "Take shorter rows.",
        )
