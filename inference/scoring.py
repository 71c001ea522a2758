"""Held-out turns of mine: find them, score my reply among others, write the model's own."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

import data
from inference.generate import BatchRow, DecodeBatch, Decoder, truncate_prompt
from inference.style import Reply
from weights.tokenizer import Tokenizer

CHOICES = 10  # the real reply and nine others
PACK_TOKENS = 768  # tokens of replies that are read side by side
PACK_MULTIPLE = 64  # and rounded up to: a CPU is slow at each new shape, and keeps code for it
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


def draw_choices(examples: list[Example], seed: int) -> list[Example]:
    """Add nine replies from other sessions to each of mine; none where there are too few."""
    draw, drawn = np.random.default_rng(seed), []
    for example in examples:
        elsewhere = {tuple(e.mine) for e in examples if e.session != example.session}
        others = sorted(elsewhere - {tuple(example.mine)})
        if len(others) < CHOICES - 1:
            return examples
        nine = [list(others[i]) for i in draw.permutation(len(others))[: CHOICES - 1]]
        drawn.append(dataclasses.replace(example, choices=[example.mine, *nine]))
    return drawn


def cache_size(size: int) -> int:
    """Return the tokens that a Decoder's cache needs for contexts of `size` tokens."""
    return size + max(PACK_TOKENS, size) + PACK_MULTIPLE


@torch.inference_mode()
def reply_nats(decoder: Decoder, example: Example, size: int) -> np.ndarray:
    """Score each choice of an example as my turn: nats of its text, (choices,) float64.

    The marks around messages don't count. Tokens that all documents begin with are read once, and
    the replies side by side behind them. At most the last `size` tokens of a document are read.
    """
    context, branches = split_documents(encode_choices(example, decoder.tokenizer), size)
    ids = context[0].tolist()
    labelled = np.flatnonzero(context[1] != data.IGNORE_INDEX)
    unlabelled = int(labelled[0]) if len(labelled) else len(ids)
    if unlabelled - decoder.num_cached(ids) > PACK_TOKENS // 2:
        decoder.prefill(ids[:unlabelled])

    # The rest of the context is read with the first replies. Labels in it, where all replies begin
    # alike, count for each.
    cached = min(decoder.num_cached(ids), unlabelled)
    decoder.cached_ids = []  # Ctrl-C may leave it half written
    nats = np.zeros(len(branches))
    first, rest = 0, context[:, cached:]
    while first < len(branches):
        decoder.cache.length = len(ids) - rest.shape[1]  # forget the replies before
        pack = slice(first, first + count_fitting(branches[first:], PACK_TOKENS - rest.shape[1]))
        of_rest, nats[pack] = packed_nats(decoder, rest, branches[pack])
        nats += of_rest
        first, rest = pack.stop, rest[:, :0]
    decoder.cached_ids = ids
    return nats


def encode_choices(example: Example, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Encode the turns before with each choice: ids and labels (2, T), up to its last label."""
    documents = []
    for reply in example.choices:
        turns = [*example.before, data.Turn(example.author, True, "", list(reply))]
        first = len(example.before), 0
        document = data.render(turns, first=first, specials=tokenizer.specials)
        sample = data.encode(document, tokenizer)
        labels = np.where(sample.content_mask, sample.labels, data.IGNORE_INDEX)
        labelled = np.flatnonzero(sample.content_mask)
        end = int(labelled[-1]) + 1 if len(labelled) else len(labels)
        documents.append(np.stack([sample.ids, labels])[:, :end])
    return documents


def split_documents(documents: list[np.ndarray], size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Split documents (2, T) where they begin to differ: what they share, and what follows in each.

    Each keeps at least one token of its own; with what they share none is longer than `size`.
    """
    shortest = min(document.shape[1] for document in documents) - 1
    beginnings = np.stack([document[:, :shortest] for document in documents])
    equal = (beginnings == beginnings[0]).all((0, 1))
    shared = int(equal.argmin()) if not equal.all() else shortest
    branches = [document[:, shared:][:, : size - 1] for document in documents]
    longest = max(branch.shape[1] for branch in branches)
    return documents[0][:, :shared][:, longest - size :], branches


def count_fitting(branches: Sequence[np.ndarray], room: int) -> int:
    """Count the first branches that fit `room` tokens together, at least one."""
    ends = np.cumsum([branch.shape[1] for branch in branches])
    return max(1, int((ends <= room).sum()))


def packed_nats(
    decoder: Decoder, shared: np.ndarray, branches: Sequence[np.ndarray]
) -> tuple[float, np.ndarray]:
    """Score `shared`, then `branches` side by side behind it, all behind what is in the cache.

    Each is (2, n): ids, labels. No branch sees another. The cache then holds all of them. Returns
    nats of `shared`, and (branches,) float64.
    """
    cache, device = decoder.cache, decoder.cache.layers[0].device
    window = decoder.model.config.sliding_window or math.inf
    # A last part without labels rounds the shape up
    parts = [shared, *branches]
    padding = -sum(part.shape[1] for part in parts) % PACK_MULTIPLE
    parts.append(np.array([[0], [data.IGNORE_INDEX]]).repeat(padding, 1))
    lengths = [part.shape[1] for part in parts]
    packed = torch.from_numpy(np.concatenate(parts, 1)).long()  # (2, N)

    # A token sees what is cached, `shared` (part 0) and its own part, up to itself
    part = torch.arange(len(parts)).repeat_interleave(torch.tensor(lengths))  # (N,)
    starts = [cache.length, *[cache.length + lengths[0]] * (len(parts) - 1)]
    position = torch.cat([start + torch.arange(n) for start, n in zip(starts, lengths)])
    unwritten = cache.num_keys(len(part)) - cache.length - len(part)
    key_position = torch.cat([torch.arange(cache.length), position])
    key_part = F.pad(F.pad(part, (cache.length, 0)), (0, unwritten), value=-1)  # (S,)
    distance = position[:, None] - F.pad(key_position, (0, unwritten))  # (N, S)
    visible = (distance >= 0) & (distance < window)
    visible &= (key_part == 0) | (key_part == part[:, None])
    bias = torch.zeros(visible.shape, dtype=cache.layers[0].dtype).masked_fill_(~visible, -math.inf)

    cache.mask = bias[None, None].to(device)
    ids, labels = packed[:, None].to(device)  # (1, N) each
    losses, _ = decoder.model(ids, position[None].to(device), labels, cache, "none")
    cache.mask = None
    owners = part[packed[1] != data.IGNORE_INDEX].numpy()
    nats = np.bincount(owners, losses.cpu().double().numpy(), minlength=len(parts))
    return nats[0], nats[1:-1]


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
    nats: dict[int, np.ndarray] = {}
    rows: dict[int, BatchRow] = {}
    for i in progress(by_length(examples, prompts)):
        nats[i] = reply_nats(decoder, examples[i], size)
        generator = torch.Generator().manual_seed(1000 * seed + i)
        rows[i] = batch.add(prompts[i], room, generator=generator)
        while batch.full:
            batch.step()
    while batch.rows:
        batch.step()

    replies, tokens = [], []
    for i in range(len(examples)):
        ids = rows[i].ids
        messages = data.split_messages(decoder.tokenizer.decode(ids) if ids else "")
        replies.append(data.text_messages(data.Turn("", True, "", messages)))
        tokens.append(len(prompts[i]) + len(ids))
    return np.array([nats[i] for i in range(len(examples))]), replies, np.array(tokens)


def by_length(examples: list[Example], prompts: list[list[int]]) -> list[int]:
    """Order the numbers of examples: a session's one after another, short sessions first.

    Rows of a batch are as slow as the longest one, so those of one length should meet.
    """
    longest: dict[int, int] = {}
    for example, prompt in zip(examples, prompts):
        longest[example.session] = max(len(prompt), longest.get(example.session, 0))
    sessions = [example.session for example in examples]
    return sorted(range(len(examples)), key=lambda i: (longest[sessions[i]], sessions[i], i))
