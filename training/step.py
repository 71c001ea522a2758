"""Build a model, make batches, take one step, compute the validation loss.

Loss = sum over targets / number of targets, over all micro-batches and ranks. So the micro-batch
size and the number of ranks change the speed, not the result.
"""

import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

import lora
from cli import UserError
from data import IGNORE_INDEX, Row
from model import CPU_MULTIPLE, ModelConfig, Transformer
from training import distributed, optim
from training.distributed import Distributed
from weights import quantize, shards
from weights.load import load_weights
from weights.quantize import NF4_BLOCK

LONG_ROW = 4 * CPU_MULTIPLE  # on a CPU, longer rows are padded to a multiple of CPU_MULTIPLE
T = TypeVar("T")


# --- the model


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """How a model is built for training, beside its config.

    `adapter`: the arguments of `lora.inject`; None trains all weights.
    `dtype`: what it computes in. A frozen base is also stored in it; what is trained is fp32.
    `activation_checkpointing`: one of AC_MODES.
    `nf4`: the base's linear layers are stored in 4 bits.
    `pure_bf16`: all weights are trained in `dtype`, without fp32 masters.
    """

    adapter: dict | None = None
    dtype: torch.dtype = torch.bfloat16
    activation_checkpointing: str = "none"
    nf4: bool = False
    pure_bf16: bool = False


def build_model(
    config: ModelConfig,
    ranks: Distributed,
    spec: ModelSpec,
    folder: Path | str | None = None,
    seed: int | None = 0,
) -> Transformer:
    """Build a model ready to train, sharded over the ranks. Each rank reads only its own rows.

    `folder`: the weights; None for random ones, N(0, 0.02), the same on any number of ranks.
    `folder` and `seed` None: the weights are left uninitialized, for a caller that fills them.
    """
    model = build_meta_model(config, ranks, spec)
    shards.materialize(model, ranks.device)
    if folder:
        load_weights(model, folder, ranks)
    elif seed is not None:
        init_weights(model, seed)
    if spec.adapter and seed is not None:
        with torch.no_grad():
            for parameter, value in lora.initial_values(model, seed, shards.gather_rows):
                shards.copy_shard(parameter, value)
    if ranks.device.type == "cpu" and spec.activation_checkpointing == "none":
        model.recompute_cheap_parts()
    return model.train()


def build_meta_model(
    config: ModelConfig, ranks: Distributed, spec: ModelSpec, device: str = "meta"
) -> Transformer:
    """Build the model with its adapter, sharded. On the meta device it takes no memory."""
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(spec.dtype if spec.adapter or spec.pure_bf16 else torch.float32)
    try:
        with torch.device(device):
            model = Transformer(config, spec.dtype, spec.activation_checkpointing)
    finally:
        torch.set_default_dtype(default_dtype)
    if spec.nf4:
        quantize.pack_linears(model)
    if spec.adapter:
        lora.inject(model, **spec.adapter)
    if ranks.world > 1:
        distributed.shard_model(model, ranks, spec.dtype)
    return model


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Set all weights: matrices N(0, 0.02), norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, target in shards.named_weights(model).items():
        value = torch.empty(shards.weight_shape(target))
        if value.dim() == 1:
            value.fill_(float(name.endswith("norm.weight")))
        else:
            value.normal_(0, 0.02, generator=generator)
        shards.copy_shard(target, value)


def check_trainable(options, config: ModelConfig) -> None:
    """UserError if the base can't be trained with these flags (of train.py or plan.py)."""
    heads_width = config.num_attention_heads * config.head_dim
    for width in (config.hidden_size, config.intermediate_size, heads_width):
        if options.qlora and width % NF4_BLOCK:
            raise UserError(
                f"--qlora stores weights in blocks of {NF4_BLOCK}; {options.model} has layers "
                f"{width} wide",
                "Use --lora.",
            )
    if options.seq_len > config.max_position_embeddings:
        raise UserError(
            f"--seq-len {options.seq_len} is too long: {options.model} was trained for "
            f"{config.max_position_embeddings} tokens",
            "Use a smaller --seq-len.",
        )


# --- compiling


def compile_model(model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Compile a model's blocks, and the update of an optimizer that isn't fused."""
    model.compile_blocks()
    optim.compile_update(optimizer)
    for name in ("torch._dynamo.convert_frame", "torch._higher_order_ops.wrap"):
        logging.getLogger(name).addFilter(shorten_warning)


def shorten_warning(record: logging.LogRecord) -> bool:
    """Say in one line of ours what torch.compile says in five when it gives up on a function.

    Leave out its warning of in-place operators in checkpointed blocks: there are none.
    """
    if "hit config" not in record.msg:
        return "context_fn is passed" not in record.msg
    print(
        "Blocks that torch.compile has seen in too many shapes are not compiled from here on: "
        "slower, with more memory. Please report it, with your flags.",
        file=sys.stderr,
    )
    return False


def compiler_problem(device: torch.device) -> str | None:
    """Try torch.compile on one number. Return why it fails, None if it works."""
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # gcc's, Triton's, Inductor's: they share no class
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"
    finally:
        torch._dynamo.utils.counters.clear()  # it is no graph of a run
    return None


# --- rows → tensors


class Batch(NamedTuple):
    """The arguments of `model.forward`: tokens, positions, labels are (B, T) int64."""

    tokens: torch.Tensor
    positions: torch.Tensor
    labels: torch.Tensor
    cu_seqlens: list[int] | torch.Tensor
    target_positions: torch.Tensor


def collate(
    rows: Sequence[Row], device: torch.device | str, min_shape: tuple[int, int] = (1, 1)
) -> Batch:
    """Make a batch as long as the longest row and at least of `min_shape` (rows, tokens).

    Padding is a document of its own, without targets.
    """
    device = torch.device(device)
    count = max(min_shape[0], len(rows))
    length = max([min_shape[1], *(len(row.ids) for row in rows)])
    if device.type == "cpu" and length > LONG_ROW:
        length += -length % CPU_MULTIPLE
    tokens = np.zeros((count, length), dtype=np.int64)
    labels = np.full((count, length), IGNORE_INDEX, dtype=np.int64)
    positions = np.zeros((count, length), dtype=np.int64)
    starts: list[int] = []  # of each document, in the flattened batch
    for i in range(count):
        lengths = []
        if i < len(rows):
            row = rows[i]
            tokens[i, : len(row.ids)] = row.ids
            labels[i, : len(row.ids)] = row.labels
            lengths = [n for n in row.doc_lengths.tolist() if n]
        if padding := length - sum(lengths):
            lengths.append(padding)
        positions[i] = np.concatenate([np.arange(n) for n in lengths])
        starts.extend(i * length + np.cumsum([0, *lengths[:-1]]))
    cu_seqlens: list[int] | torch.Tensor = [*map(int, starts), count * length]
    if device.type == "cuda":
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    batch = Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        labels=torch.from_numpy(labels),
        cu_seqlens=cu_seqlens,
        target_positions=torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX)),
    )
    return Batch._make(x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in batch)


def batch_shape(size: int, length: int, ranks: Distributed) -> tuple[int, int]:
    """Return the least shape of a batch: on CUDA the full one, so that all batches are alike."""
    return (size, length) if ranks.device.type == "cuda" else (1, 1)


def micro_batches(
    rows: Sequence[Row], size: int, ranks: Distributed, length: int = 1
) -> list[Batch]:
    """Return this rank's share of a step's rows, `size` rows at a time.

    Every rank gets the same number of micro-batches, some of them empty.
    """
    count = math.ceil(math.ceil(len(rows) / ranks.world) / size)
    own_rows = rows[ranks.rank :: ranks.world]
    shape = batch_shape(size, length, ranks)
    parts = [own_rows[i * size : (i + 1) * size] for i in range(count)]
    return [collate(part, ranks.device, shape) for part in parts]


# --- one step


class NonFiniteError(Exception):
    """The loss or the gradient norm is NaN or infinite. The weights are unchanged."""


class OutOfMemory(Exception):
    """The micro-batch doesn't fit in memory. Nothing was changed."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    ranks: Distributed,
    clip: float = 1.0,
) -> tuple[float, float, int]:
    """Take one step over micro-batches. Return (loss per target, gradient norm, targets).

    A step without targets changes nothing. NonFiniteError and OutOfMemory leave the weights as
    they were.
    """
    # Count first, over micro-batches and ranks: then every backward pass knows its divisor.
    own_count = sum(len(batch.target_positions) for batch in batches)
    count = int(ranks.all_reduce(torch.tensor(own_count, device=ranks.device)).item())
    if count == 0:
        return 0.0, 0.0, 0
    loss_sum = accumulate_gradients(model, batches, ranks, count)
    loss = ranks.all_reduce(loss_sum).item() / count
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = shards.full_tensor(nn.utils.clip_grad_norm_(trained, clip)).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        optimizer.zero_grad()
        raise NonFiniteError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad()
    return loss, norm, count


def accumulate_gradients(
    model: nn.Module, batches: Sequence[Batch], ranks: Distributed, count: int
) -> torch.Tensor:
    """Add up the gradients of a step with `count` targets. Return this rank's sum of losses.

    OutOfMemory leaves no gradients, and the random state as it was.
    """

    def accumulate():
        total = torch.zeros((), device=ranks.device)
        for number, batch in enumerate(batches, 1):
            ranks.advance()
            if ranks.replicas > 1:  # hosts exchange their sums once a step
                distributed.fsdp_module(model).set_requires_all_reduce(number == len(batches))
            loss, _ = model(**batch._asdict())
            # FSDP2 averages over ranks: times world makes it the sum.
            (loss * (ranks.world / count)).backward()
            total += loss.detach()
        return total

    return run_within_memory(accumulate, model, ranks.device)


def run_within_memory(work: Callable[[], T], model: nn.Module, device: torch.device) -> T:
    """Return work(). OutOfMemory leaves no gradients, and the random state as it was."""
    rng = rng_state(device)
    try:
        return work()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # The error held the frames of `work`, and they the tensors: they are free from here on.
    drop_gradients(model)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    set_rng_state(rng)
    raise OutOfMemory


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a GPU's memory is full: torch's, cuBLAS's, Triton's or NCCL's."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "status_alloc_failed" in text


def probe_micro_batch(
    model: nn.Module,
    rows: Sequence[Row],
    size: int,
    ranks: Distributed,
    length: int,
    accumulates: bool,
) -> None:
    """OutOfMemory if the micro-batches of `size` rows that need most don't fit. Changes nothing.

    Those are the longest rows, and those with the most documents, for which CUDA's attention needs
    more. `accumulates`: also beside the gradients of another micro-batch.
    """
    rng = rng_state(ranks.device)
    needs = [lambda row: -len(row.ids), lambda row: -len(row.doc_lengths)]
    for need in needs[: 1 if ranks.device.type == "cpu" else 2]:
        worst = sorted(rows, key=need)[:size]
        batches = micro_batches(worst * ranks.world, size, ranks, length)
        accumulate_gradients(model, batches * (2 if accumulates else 1), ranks, 1)
        drop_gradients(model)
    set_rng_state(rng)


def drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the random generators that a step uses, by device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type in ("cuda", "mps"):
        states[device.type] = getattr(torch, device.type).get_rng_state()
    return states


def set_rng_state(states: dict[str, torch.Tensor]) -> None:
    for name, state in states.items():
        module = torch if name == "cpu" else getattr(torch, name)
        module.set_rng_state(state)


# --- validation loss


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over the validation targets. `bits`, `chars`: (sessions,), of message text alone."""

    nats: float
    count: int
    content_nats: float
    content_tokens: int
    bits: np.ndarray
    chars: np.ndarray

    @property
    def metrics(self) -> dict[str, float]:
        format_tokens = self.count - self.content_tokens
        return {
            "val_loss": self.nats / max(1, self.count),
            "val_bits_per_char": float(self.bits.sum() / max(1, self.chars.sum())),
            "val_format_loss": (self.nats - self.content_nats) / max(1, format_tokens),
        }


@torch.no_grad()
def evaluate(
    model: nn.Module, rows: Sequence[Row], ranks: Distributed, micro_batch: int, length: int = 1
) -> Evaluation:
    """Compute the loss of every target, summed over the ranks. `length`: as in `micro_batches`.

    OutOfMemory if a micro-batch doesn't fit.
    """
    model.eval()
    shape = batch_shape(micro_batch, length, ranks)
    sessions = 1 + max(int(row.sessions.max()) for row in rows)
    # One tensor, so that one collective adds it up: four totals, then bits and chars by session.
    sums = torch.zeros(4 + 2 * sessions, dtype=torch.float64)
    totals, bits, chars = sums.split([4, sessions, sessions])
    own_rows = rows[ranks.rank :: ranks.world]
    for i in range(0, math.ceil(len(rows) / ranks.world), micro_batch):
        ranks.advance()
        part = own_rows[i : i + micro_batch]
        # Every rank takes part in every forward pass, with an empty batch if need be.
        batch = collate(part, ranks.device, shape)._asdict() | {"reduction": "none"}
        losses, _ = run_within_memory(functools.partial(model, **batch), model, ranks.device)
        if part:
            add_losses(part, losses.cpu().double(), totals, bits, chars)
    model.train()
    if ranks.world > 1:
        sums = ranks.all_reduce(sums.to(ranks.device)).cpu()
        totals, bits, chars = sums.split([4, sessions, sessions])
    nats, count, content_nats, content_tokens = totals.tolist()
    return Evaluation(
        nats=nats,
        count=int(count),
        content_nats=content_nats,
        content_tokens=int(content_tokens),
        bits=bits.numpy(),
        chars=chars.numpy(),
    )


def add_losses(rows, losses, totals, bits, chars) -> None:
    """Add the losses (targets,) of some rows to the sums of `evaluate`, in place."""
    labels = np.concatenate([row.labels for row in rows])
    is_target = torch.from_numpy(labels != IGNORE_INDEX)
    content = torch.from_numpy(np.concatenate([row.content_mask for row in rows]))[is_target]
    session_ids = np.concatenate([np.repeat(row.sessions, row.doc_lengths) for row in rows])
    session = torch.from_numpy(session_ids).long()[is_target]
    totals += torch.stack([losses.sum(), is_target.sum(), losses[content].sum(), content.sum()])
    bits.index_add_(0, session[content], losses[content] / math.log(2))
    for row in rows:
        session = torch.from_numpy(row.sessions).long()
        chars.index_add_(0, session, torch.from_numpy(row.chars).double())
