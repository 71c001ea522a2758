"""Ids in, ids out, with a cache; turns in, messages out, as they come. Prints nothing."""

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

import data
from model import KVCache, ModelConfig, rope
from weights import quantize

SAMPLE_ROUND = (
    16  # on a CPU a part of a prompt is read as a multiple of so many tokens, see model.ROUND
)
PREFILL = 512  # prompt tokens read at a time: bounds the memory of their activations
TOP_K = 1e-5  # a batch sorts less likely ids only where the others don't hold top_p
REMEMBERED = 1000  # answers of which the ids are kept


class Decoder:
    """A model with what it has read: a prompt that begins as the last one did costs only its new tokens."""

    def __init__(self, model, tokenizer, size, broadcast=None, compiled=False):
        """`size`: tokens of context, prompt and answer together. `broadcast(id)`: rank 0's choice, where several ranks decode together.

        `compiled`: compile the step of one token now, which takes some seconds, where that can be done; for a model without adapters.
        """
        norm = model.model.norm.weight
        self.model, self.tokenizer, self.broadcast = model, tokenizer, broadcast or (lambda id: id)
        self.cache = KVCache(
            model.config, size, dtype=model.dtype or norm.dtype, device=norm.device
        )
        self.read = []  # the ids behind the cache
        self.opening = lambda turns: turns  # what is put before a talk, see memory.py
        self.wrote = {}  # (author, *messages) of its latest answers → their ids, because text is not always cut as it was written
        self.ends, self.never = stop_and_banned_ids(model, tokenizer)
        self.step = None
        if compiled and can_compile(norm.device):
            with contextlib.suppress(
                torch._dynamo.exc.BackendCompilerFailed
            ):  # a compiler without Python's headers, for one
                self.step = CompiledDecoder(model, self.cache)
        self.cache.length = 0

    @torch.inference_mode()
    def forward(self, ids):
        """The logits (V,) of what follows `ids`, float32, on the CPU."""
        self.cache.length = min(self.common(ids), len(ids) - 1)
        self.read = []  # until it is done: Ctrl-C may come in between
        new = torch.tensor([ids[self.cache.length :]], device=self.cache.layers[0].device)
        if self.step and new.shape[1] == 1 and self.cache.length > 1:
            logits = self.step(new)
        else:
            for part in new.split(PREFILL, dim=1):
                logits = self.read_part(part)
        self.read = list(ids)
        return logits.flatten().float().cpu()

    def common(self, ids: Sequence[int]) -> int:
        """How many of the first of `ids` are in the cache."""
        pairs = enumerate(zip(self.read, ids))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.read), len(ids)))

    @torch.inference_mode()
    def prefill(self, ids: Sequence[int]) -> None:
        """Have `ids` in the cache and nothing else. What it holds of them already is not read again."""
        self.cache.length = self.common(ids)
        self.read = []
        new = torch.tensor([list(ids[self.cache.length :])], dtype=torch.int64)
        new = new.to(self.cache.layers[0].device)
        for part in new.split(PREFILL, dim=1) if new.numel() else ():
            self.read_part(part)
        self.read = list(ids)

    def read_part(self, part: torch.Tensor) -> torch.Tensor:
        """Have more ids (1, n) in the cache. → the logits (1, V) of what follows them"""
        count = part.shape[1]
        extra = -count % SAMPLE_ROUND if part.device.type == "cpu" and count > 1 else 0
        extra = min(extra, self.cache.size - self.cache.length - count)
        last = torch.tensor([count - 1], device=part.device)
        logits = self.model(F.pad(part, (0, extra)), cache=self.cache, target_positions=last)
        self.cache.length -= extra  # what fills up the shape is forgotten
        return logits

    def generate(self, ids, max_new=256, temperature=0.7, top_p=0.95, generator=None):
        """Yield the ids that continue `ids`, until the model ends its turn (that id is not yielded), `max_new` or the context's end."""
        ids = list(ids)
        for _ in range(min(max_new, self.cache.size - len(ids))):
            logits = self.forward(ids).index_fill(0, self.never, -torch.inf)
            chosen = self.broadcast(sample(logits, temperature, top_p, generator))
            if chosen in self.ends:
                return
            ids.append(chosen)
            yield chosen


def stop_and_banned_ids(model, tokenizer) -> tuple[set[int], torch.Tensor]:
    """The ids that end a turn, and those that are never written."""
    ends = {tokenizer.im_end, *map(tokenizer.engine.token_to_id, ("</s>", "<|endoftext|>"))} - {
        None
    }
    size, special = model.config.vocab_size, tokenizer.special_ids
    never = {i for i in range(size) if i in special or i >= len(tokenizer)} - ends
    return ends, torch.tensor(sorted(never), dtype=torch.long)


# --- many at a time


class BatchCache(KVCache):
    """Keys and values of rows with lengths of their own: a token's place in its row is its position.

    One token a row is read at a time, by the first `rows` rows.
    """

    def __init__(self, config: ModelConfig, size: int, batch: int, dtype, device):
        super().__init__(config, size, batch, dtype, device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.window = config.sliding_window
        self.rows = 0

    def load(self, row: int, source: KVCache, length: int) -> None:
        """Fill a row with the first `length` tokens of the only row of `source`."""
        for mine, other in zip(self.layers, source.layers):
            mine[:, row, :, :length] = other[:, 0, :, :length]
        self.lengths[row] = length

    def move(self, source: int, target: int) -> None:
        length = int(self.lengths[source])
        for layer in self.layers:
            layer[:, target, :, :length] = layer[:, source, :, :length]
        self.lengths[target] = length

    def positions(self) -> torch.Tensor:
        """Where the next token of each row goes, (rows, 1); and `mask` for it."""
        positions = self.lengths[: self.rows, None]
        self.length = int(positions.max())
        ago = positions - torch.arange(self.length + 1, device=positions.device)  # (rows, S)
        self.mask = ((ago >= 0) & (ago < (self.window or self.size)))[:, None, None]
        return positions

    def extend(self, layer, k, v):
        """Write k, v (rows, 1, G, D), each row at its length, and return the rows (rows, S, G, D)."""
        rows = torch.arange(self.rows, device=k.device)
        self.layers[layer][:, rows, :, self.lengths[: self.rows]] = torch.cat([k, v], 1)
        known = self.layers[layer][:, : self.rows, :, : self.length + 1].transpose(2, 3)
        return known[0], known[1]


@dataclasses.dataclass(eq=False)
class BatchRow:
    """An answer that is written in a batch. `ids`: so far; `ended`: by itself, not for want of room."""

    prompt: list[int]
    room: int
    temperature: float
    top_p: float
    generator: torch.Generator | None
    ids: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False


class DecodeBatch:
    """Several answers at once, each as it would be written alone: a step reads the weights once for all.

    A row joins with `add`, between any two steps, and leaves when it is done. Its draws are its own
    generator's.
    Prompts are read by `decoder`, one by one: what a prompt shares with the one before is read once.
    """

    def __init__(self, decoder: Decoder, rows: int, size: int | None = None):
        """`rows`: at most so many at a time; `size`: tokens of a row, prompt and answer together."""
        self.decoder, self.rows, self.most = decoder, [], rows
        layer = decoder.cache.layers[0]
        size = size or decoder.cache.size
        self.cache = BatchCache(decoder.model.config, size, rows, layer.dtype, layer.device)

    @property
    def full(self) -> bool:
        return len(self.rows) == self.most

    @torch.inference_mode()
    def add(self, prompt, max_new=256, temperature=0.7, top_p=0.95, generator=None) -> BatchRow:
        """Read a prompt; `ids` of the row that is returned grow with each step."""
        assert not self.full, f"the batch holds {self.most} rows"
        room = min(max_new, self.cache.size - len(prompt))
        row = BatchRow(list(prompt), room, temperature, top_p, generator)
        if room > 0:
            self.decoder.prefill(row.prompt[:-1])
            self.cache.load(len(self.rows), self.decoder.cache, len(prompt) - 1)
            self.rows.append(row)
        return row

    @torch.inference_mode()
    def step(self) -> list[BatchRow]:
        """Write one token of each row → the rows that are done, which left the batch."""
        cache, done = self.cache, []
        cache.rows = len(self.rows)
        last = [[row.ids[-1] if row.ids else row.prompt[-1]] for row in self.rows]
        tokens = torch.tensor(last, device=cache.lengths.device)
        logits = self.decoder.model(tokens, cache.positions(), cache=cache)[:, 0].float().cpu()
        logits = logits.index_fill(1, self.decoder.never, -torch.inf)
        cache.lengths[: cache.rows] += 1
        for row, scores in zip(self.rows, logits):
            id = self.decoder.broadcast(
                sample(scores, row.temperature, row.top_p, row.generator, TOP_K)
            )
            row.ended = id in self.decoder.ends
            if not row.ended:
                row.ids.append(id)
            if row.ended or len(row.ids) == row.room:
                done.append(row)
        for row in done:  # the last row takes its place
            place, last_row = self.rows.index(row), self.rows.pop()
            if last_row is not row:
                self.cache.move(len(self.rows), place)
                self.rows[place] = last_row
        return done


def generate_batch(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seeds: Sequence[int] | None = None,
    rows: int = 32,
) -> Iterator[tuple[int, list[int]]]:
    """Continue each prompt as `Decoder.generate` does: yield (its number, its ids) as they are done."""
    size = min(decoder.cache.size, max(map(len, prompts), default=0) + max_new)
    batch, numbers = DecodeBatch(decoder, min(rows, len(prompts)), size), {}
    waiting = list(enumerate(prompts))[::-1]
    while waiting or batch.rows:
        if waiting and not batch.full:
            number, prompt = waiting.pop()
            generator = torch.Generator().manual_seed(seeds[number]) if seeds else None
            row = batch.add(prompt, max_new, temperature, top_p, generator)
            numbers[row] = number
            if row.room <= 0:
                yield number, []
            continue
        for row in batch.step():
            yield numbers.pop(row), row.ids


# --- one token at a time


def can_compile(device):
    """Whether torch.compile finds what it needs: Triton for a GPU, a C++ compiler for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 0)
    return device.type == "cpu" and any(map(shutil.which, ("g++", "clang++")))


class CompiledDecoder:
    """A token's way through the model, in fp32 between the weights: two compiled functions a block, the same for all blocks.

    What a compiled function returns it also stores. So each returns the vectors that its matmuls read: else they would be worked out anew
    for every row of the weights. On CUDA the whole step is a graph, one for each power of two of tokens that it looks back on.
    """

    def __init__(self, model, cache):
        self.model, self.cache, self.graphs, device = model, cache, {}, cache.layers[0].device
        self.token, self.position = (
            torch.zeros(1, 1, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
        )
        self.places = torch.arange(cache.size, device=device)
        self.rotation = rope(self.places[None], model.config)
        self.before, self.after, self.last = map(
            torch.compile, (before_attention, after_attention, last_logits)
        )
        unpack = {
            kind: torch.compile(kind.unpack, dynamic=False)
            for kind in quantize.PACKED_TYPES.values()
        }
        with torch.inference_mode():
            cache.length = 2
            self(self.token)
            for module in model.modules():
                if isinstance(module, quantize.PackedLinear):
                    module.unpack = unpack[type(module)]  # for prompts
            cache.length = 0
            model(self.places[None, :2], cache=cache)

    def __call__(self, token):
        """token (1, 1) int64, read after what is in the cache → logits (1, 1, V), which the next call may overwrite."""
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        self.cache.length += 1
        if token.device.type != "cuda":
            return self.run(self.cache.length)
        seen = min(self.cache.size, max(512, 1 << (self.cache.length - 1).bit_length()))
        if seen not in self.graphs:
            self.graphs[seen] = self.capture(seen)
        graph, logits = self.graphs[seen]
        graph.replay()
        return logits

    def run(self, seen):
        """The step itself, without a look at any value: `token` at `position`, over the first `seen` places of the cache."""
        rotation = [part.index_select(1, self.position) for part in self.rotation]
        ago = self.position - self.places[:seen]
        hidden = (ago < 0) | (ago >= (self.model.config.sliding_window or self.cache.size))
        x = self.model.model.embed_tokens(self.token).float()
        for block, known in zip(self.model.model.layers, self.cache.layers):
            q, k, v, _ = self.before(block, x, rotation)
            known.index_copy_(3, self.position, torch.stack([k, v]).transpose(2, 3).to(known.dtype))
            known = known[:, 0, :, :seen]
            torch._dynamo.maybe_mark_dynamic(known, 2)
            torch._dynamo.maybe_mark_dynamic(hidden, 0)
            x, *_ = self.after(block, x, q, known, hidden)
        return self.last(self.model, x)[0]

    def capture(self, seen):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # compiled first, and warm: neither can be captured
            self.run(seen)
            self.run(seen)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.run(seen)
        return graph, logits


def before_attention(block, x, rotation):
    x = block.input_layernorm(x)
    return *block.self_attn(x, rotation), x


def after_attention(block, x, q, known, hidden):
    """x (1, 1, E), q (1, 1, H, D), keys and values (2, G, S, D), `hidden` (S,): those that q may not see → x (1, 1, E), and more."""
    keys, values = known.float()
    q = q.view(len(keys), -1, 1, keys.shape[2])  # (G, H / G, 1, D)
    scores = (q * keys[:, None]).sum(-1) * keys.shape[2] ** -0.5  # (G, H / G, S)
    shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    found = (shares[..., None] * values[:, None]).sum(2).view(1, 1, -1)
    x = x + block.self_attn.o_proj(found)
    normed = block.post_attention_layernorm(x)
    inner = F.silu(block.mlp.gate_proj(normed)) * block.mlp.up_proj(normed)
    return x + block.mlp.down_proj(inner), found, x, normed, inner


def last_logits(model, x):
    x = model.model.norm(x)
    return model.lm_head(x), x


# --- turns and messages


class Answer:
    """My next turn after `turns`, as it is written: iterate over it for the messages so far, each time they grew.

    `prompt`, `ids`: what was read and what is written; `messages`: so far; `ended`: by itself, not by `max_new` or the context's end.
    One at a time; an answer that is left early (closed, or interrupted) leaves the decoder ready for the next.
    """

    def __init__(self, decoder, turns, me, max_new=256, temperature=0.7, top_p=0.95, seed=None):
        room = min(max_new, decoder.cache.size // 2)
        self.decoder, self.me, self.messages, self.ids, self.ended = decoder, me, [], [], False
        self.prompt = truncate_prompt(
            decoder.opening(turns), me, decoder.tokenizer, decoder.cache.size - room, decoder.wrote
        )
        generator = torch.Generator().manual_seed(seed) if seed is not None else None
        self.new = decoder.generate(self.prompt, room, temperature, top_p, generator)
        self.room = room

    def __iter__(self):
        for found in messages(self.written(), self.decoder.tokenizer):
            self.messages = found
            yield found
        self.ended = len(self.ids) < self.room
        wrote, header = (
            self.decoder.wrote,
            self.prompt[-1 - self.prompt[::-1].index(self.decoder.tokenizer.im_start) :],
        )
        wrote[self.me, *self.messages] = header + self.ids
        if len(wrote) > REMEMBERED:
            del wrote[next(iter(wrote))]

    def written(self):
        for id in self.new:
            self.ids.append(id)
            yield id


def sample(logits, temperature, top_p, generator=None, likely=0.0):
    """One id from logits (V,): the best at temperature 0, else drawn from the smallest set of ids that holds `top_p` of the probability.

    `likely`: only ids above it are sorted, where they hold `top_p`. The draw is the same but for ties.
    """
    if temperature == 0:
        return int(logits.argmax())
    chances = (logits / temperature).softmax(0)
    ids = (chances > likely).nonzero()[:, 0] if likely else torch.empty(0)
    if likely and chances[ids].sum() > top_p + 1e-3:
        known, order = chances[ids].sort(descending=True)
        probabilities, order = F.pad(known, (0, len(logits) - len(known))), ids[order]
    else:
        probabilities, order = chances.sort(descending=True)
    probabilities[probabilities.cumsum(0) - probabilities > top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def messages(ids, tokenizer):
    """Ids as they come → the list of messages so far, each time it grew. What may still turn out to be a mark or half a letter waits."""
    seen, known = [], []
    for id in ids:
        seen.append(id)
        text = tokenizer.decode(seen)
        found = data.split_messages(re.sub("(\n>{0,3}|\ufffd+)$", "", text))
        if found != known:
            known = found
            yield found
    found = data.split_messages(tokenizer.decode(seen)) if seen else []
    if found != known:
        yield found


def truncate_prompt(turns, me, tokenizer, size, wrote=None):
    """The ids of the prompt after `turns`, at most `size`, without its oldest turns where there are more.

    They go half a context at a time, so that most prompts begin as the last one did. A single turn that is too long loses its beginning.
    A header stays, unless it takes half the context.
    `wrote` {(author, *messages): ids}: turns whose ids are known, up to their end.
    """
    ids, _ = tokenizer.encode(data.prompt(turns, me, tokenizer.specials))
    starts = [i for i, id in enumerate(ids) if id == tokenizer.im_start]
    opening, parts = ids[: starts[0]], [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)])]
    for number, turn in enumerate(turns):
        known = (wrote or {}).get((turn.author, *turn.messages))
        if known:
            parts[number] = known + parts[number][parts[number].index(tokenizer.im_end) :]
    if len(turns) > 1 and turns[0].author == data.HEADER and len(parts[0]) < size // 2:
        opening, parts, turns = opening + parts[0], parts[1:], turns[1:]
    total, half = sum(map(len, parts)) + len(opening), max(1, size // 2)
    surplus = -(-(total - size) // half) * half if total > size else 0
    oldest = dropped = 0
    while dropped < surplus and oldest < len(turns) - 1:
        dropped += len(parts[oldest])
        oldest += 1
    ids = opening + sum(parts[oldest:], [])
    return ids if len(ids) <= size else opening + ids[len(ids) - size + len(opening) :]
