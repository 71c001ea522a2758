"""Held-out turns of mine: find them, score my reply among others, write the model's own."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

import data
from inference.generate import PREFILL_MULTIPLE, BatchRow, DecodeBatch, Decoder, truncate_prompt
from inference.style import Reply

PACK_TOKENS = 512  # tokens of replies that are read side by side
LONGEST = 64  # tokens of a reply that is written
BATCH = 32  # replies that are written side by side
BATCH_BYTES = 1 << 30  # limit of their keys and values


@dataclasses.dataclass(frozen=True)
class Example:
    """A turn of mine: its session's number, the turns before, my name.

    `choices`: what I wrote, then other replies to compare with it.
    """

    session: int
    before: list[data.Turn]
    author: str
    choices: list[Reply]

    @property
    def mine(self) -> Reply:
        return self.choices[0]


def find_examples(sessions: Iterable[data.Session], first: int = 0) -> list[Example]:
    """Find my turns that answer somebody; sessions are numbered from `first`."""
    examples = []
    for number, session in enumerate(map(data.without_header, sessions), first):
        for i in data.replies(session):
            turn = session.turns[i]
            mine = data.text_messages(turn)
            examples.append(Example(number, session.turns[:i], turn.author, [mine]))
    return examples


def sample(items: Sequence, count: int, seed: int) -> list:
    """Draw at most `count` items, in their order."""
    drawn = np.random.default_rng(seed).permutation(len(items))[:count]
    return [items[i] for i in sorted(drawn)]


def cache_size(size: int) -> int:
    """Return the tokens that a Decoder's cache needs for contexts of `size` tokens."""
    return size + max(PACK_TOKENS, size) + PREFILL_MULTIPLE


@torch.inference_mode()
def reply_nats(decoder: Decoder, example: Example, size: int) -> np.ndarray:
    """Score each choice of an example as my turn: nats of its text, (choices,) float64.

    The marks around messages don't count. Tokens that all documents begin with are read once; the
    replies lie side by side behind them. At most the last `size` tokens of a document are read.
    """
    documents: list[np.ndarray] = []
    before = example.before
    for reply in example.choices:
        turns = [*before, data.Turn(example.author, True, "", list(reply))]
        document = data.render(turns, first=(len(before), 0), specials=decoder.tokenizer.specials)
        sample = data.encode(document, decoder.tokenizer)
        labels = np.where(sample.content_mask, sample.labels, data.IGNORE_INDEX)
        documents.append(np.stack([sample.ids, labels]))  # (2, T)

    # Split them where they begin to differ; each reply keeps at least one token of its own
    shortest = min(document.shape[1] for document in documents) - 1
    beginnings = np.stack([document[:, :shortest] for document in documents])
    equal = (beginnings == beginnings[0]).all((0, 1))
    shared = int(equal.argmin()) if not equal.all() else shortest
    branches = [document[:, shared:][:, : size - 1] for document in documents]
    longest = max(branch.shape[1] for branch in branches)
    context = documents[0][:, :shared][:, longest - size :]

    # Read the context. If all replies begin alike, its end holds labels, which count for each
    labelled = np.flatnonzero(context[1] != data.IGNORE_INDEX)
    unlabelled = int(labelled[0]) if len(labelled) else context.shape[1]
    decoder.prefill(context[0, :unlabelled].tolist())
    nats = np.zeros(len(documents))
    if len(labelled):
        nats += packed_nats(decoder, [context[:, unlabelled:]])
        decoder.cached_ids = context[0].tolist()

    per_pack = max(1, PACK_TOKENS // longest)
    for first in range(0, len(branches), per_pack):
        decoder.cache.length = context.shape[1]  # forget the pack before
        pack = slice(first, first + per_pack)
        nats[pack] += packed_nats(decoder, branches[pack])
    return nats


def packed_nats(decoder: Decoder, branches: Sequence[np.ndarray]) -> np.ndarray:
    """Score `branches` (each (2, n): ids, labels), side by side behind what is in the cache.

    No branch sees another. The cache then holds all of them. Returns (branches,) float64.
    """
    cache, count = decoder.cache, len(branches)
    device, window = cache.layers[0].device, decoder.model.config.sliding_window
    # A last branch without labels rounds the shape up: a CPU is slow at every new shape
    padding = -sum(branch.shape[1] for branch in branches) % PREFILL_MULTIPLE
    branches = [*branches, np.array([[0], [data.IGNORE_INDEX]]).repeat(padding, 1)]
    lengths = [branch.shape[1] for branch in branches]
    packed = torch.from_numpy(np.concatenate(branches, 1)).long()  # (2, N)

    # A token sees the context, and its own branch up to itself
    branch = torch.arange(count + 1).repeat_interleave(torch.tensor(lengths))  # (N,)
    position = cache.length + torch.cat([torch.arange(length) for length in lengths])
    owner = torch.cat([branch.new_full((cache.length,), -1), branch])  # (S,)
    distance = position[:, None] - torch.cat([torch.arange(cache.length), position])  # (N, S)
    visible = (distance >= 0) & (distance < (window or math.inf))
    visible &= (owner == -1) | (owner == branch[:, None])
    bias = torch.zeros(visible.shape, dtype=cache.layers[0].dtype).masked_fill_(~visible, -math.inf)

    cache.mask = bias[None, None].to(device)
    ids, labels = packed[:, None].to(device)  # (1, N) each
    losses, _ = decoder.model(ids, position[None].to(device), labels, cache, "none")
    cache.mask = None
    owners = branch[packed[1] != data.IGNORE_INDEX].numpy()
    return np.bincount(owners, losses.cpu().double().numpy(), minlength=count)[:count]


def score_alone(
    decoder: Decoder, examples: list[Example], size: int, progress: Callable = iter
) -> np.ndarray:
    """Score the choices of each example without the turns before them: nats (M, choices)."""
    replies = sorted({tuple(reply) for example in examples for reply in example.choices})
    nats: dict[tuple, float] = {}
    for begin in progress(range(0, len(replies), BATCH)):
        part = replies[begin : begin + BATCH]
        alone = Example(0, [], examples[0].author, [list(reply) for reply in part])
        nats |= zip(part, reply_nats(decoder, alone, size))
    return np.array([[nats[tuple(reply)] for reply in e.choices] for e in examples])


def answer(
    decoder: Decoder, examples: list[Example], size: int, seed: int, progress: Callable = iter
) -> tuple[np.ndarray, list[Reply], np.ndarray]:
    """Score the choices of each example, and write a reply of the model's own.

    A prompt is read once for both, and what it shares with the one before is not read again.
    Returns nats (M, choices), replies, and the tokens (M,) of prompt and reply.
    """
    room = min(LONGEST, size // 2)
    prompts = [
        truncate_prompt(example.before, example.author, decoder.tokenizer, size - room)
        for example in examples
    ]
    longest = max(map(len, prompts)) + room
    token_bytes = sum(layer[:, :, :, :1].nbytes for layer in decoder.cache.layers)
    batch_size = max(1, min(BATCH, BATCH_BYTES // (longest * token_bytes)))

    batch = DecodeBatch(decoder, batch_size, longest)
    nats: list[np.ndarray] = []
    rows: list[BatchRow] = []
    for i, example in enumerate(progress(examples)):
        nats.append(reply_nats(decoder, example, size))
        generator = torch.Generator().manual_seed(1000 * seed + i)
        rows.append(batch.add(prompts[i], room, generator=generator))
        while batch.full:
            batch.step()
    while batch.rows:
        batch.step()

    replies = []
    for row in rows:
        messages = data.split_messages(decoder.tokenizer.decode(row.ids) if row.ids else "")
        replies.append(data.text_messages(data.Turn("", True, "", messages)))
    return np.array(nats), replies, np.array([len(row.prompt) + len(row.ids) for row in rows])
