"""Generate replies: token ids in, token ids out, with a KV cache; turns in, messages out.

`Decoder` continues one prompt, `DecodeBatch` several at once, and `Answer` writes my next turn
of a conversation. Nothing here prints. Letters are model.py's: B batch, S tokens seen, H query
heads, G key/value heads, D head_dim, E hidden_size, V vocabulary.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import fused
from inference import native
from model import Block, KVCache, ModelConfig, Transformer, rope
from weights import quantize
from weights.tokenizer import Tokenizer

PREFILL_CHUNK = 512  # prompt tokens in one forward pass: bounds the memory of activations
PIECE = 128  # of them between two steps of others' replies: as long as two or three steps
PREFILL_MULTIPLE = 16  # on a CPU chunks are padded to a multiple of it, see model.CPU_MULTIPLE
MIN_TEMPERATURE = 0.01  # below it the likeliest id is taken: logits divided by it would overflow
MIN_PROBABILITY = 1e-5  # sampling sorts only ids above it, if they make up top_p
MAX_REPLIES = 1000  # replies whose ids are kept

# (author, *messages) of a turn → its ids as they were generated, from <|im_start|> on
ReplyIds = dict[tuple[str, ...], list[int]]


def sample(
    logits: Tensor,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None = None,
) -> int:
    """Draw an id from logits (V,): nucleus sampling (arXiv 1904.09751), argmax at temperature 0."""
    if temperature < MIN_TEMPERATURE:
        return int(logits.argmax())
    probs = (logits / temperature).softmax(-1)
    # Sorting the whole vocabulary takes far longer than the rest of this function
    ids = (probs > MIN_PROBABILITY).nonzero()[:, 0]
    if probs[ids].sum() <= top_p + 1e-3:
        ids = torch.arange(len(probs))
    sorted_probs, order = probs[ids].sort(descending=True)
    sums = sorted_probs.cumsum(0)
    nucleus = sums[sums - sorted_probs <= top_p]
    # One random number: a seed draws the same id however many were sorted
    drawn = torch.rand((), generator=generator) * nucleus[-1]
    place = int(torch.searchsorted(nucleus, drawn, right=True))
    return int(ids[order[min(place, len(nucleus) - 1)]])


class Decoder:
    """A model and its KV cache: a prompt that begins as the last one costs only its new tokens.

    `size`: tokens of context, prompt and reply together. `broadcast(id)` returns rank 0's choice,
    when several ranks decode together. `compile`: compile single-token steps, on a CPU in C++ (see
    native.py), on a GPU by torch; takes some seconds, and a model without adapters whose weights
    stay as they are. `not_compiled` says why it isn't. `context_builder(turns)` puts facts and past
    exchanges before a conversation, see context.py. `slots`: contexts that are cached, for a
    DecodeBatch; alone the decoder uses the first.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        size: int,
        broadcast: Callable[[int], int] = lambda id: id,
        compile: bool = False,
        context_builder: Callable[..., list[data.Turn]] = lambda turns, *chat: turns,
        slots: int = 1,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.broadcast = broadcast
        self.context_builder = context_builder
        norm = model.model.norm.weight
        dtype = model.dtype or norm.dtype
        self.slots = BatchCache(model.config, size, slots, dtype, norm.device)
        self.cache: KVCache = self.slots.rows[0]
        self.cached_ids: list[int] = []
        # Encoding a reply's text may give other ids than those that were generated
        self.reply_ids: ReplyIds = {}
        self.stop_ids, self.banned_ids = stop_and_banned_ids(model, tokenizer)
        self.native_step: native.NativeStep | None = None
        self.compiled_decoder: CompiledDecoder | None = None
        self.not_compiled = ""
        if compile:
            self.compile(norm.device)

    def compile(self, device: torch.device) -> None:
        """Compile single-token steps, or say in `not_compiled` why not."""
        try:
            if device.type == "cpu":
                self.native_step = native.NativeStep(self.model, fused.load_library(native.SOURCE))
            elif can_compile(device):
                self.compiled_decoder = CompiledDecoder(self.model, self.cache)
                self.cache.length = 0
        except fused.BuildError as error:
            self.not_compiled = str(error)
        except torch._dynamo.exc.BackendCompilerFailed:
            self.not_compiled = "that needs gcc and Python's headers"

    def generate(
        self,
        ids: Sequence[int],
        max_new: int = 256,
        temperature: float = 0.7,
        top_p: float = 0.95,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """Yield the ids that continue `ids`.

        Stop at the end of the turn (that id is not yielded), after `max_new`, or with a full cache.
        """
        ids = list(ids)
        for _ in range(min(max_new, self.cache.size - len(ids))):
            logits = self.next_logits(ids).index_fill(0, self.banned_ids, -torch.inf)
            next_id = self.broadcast(sample(logits, temperature, top_p, generator))
            if next_id in self.stop_ids:
                return
            ids.append(next_id)
            yield next_id

    def next_logits(self, ids: Sequence[int]) -> Tensor:
        """Return the logits (V,) of the token after `ids`, in float32 on the CPU."""
        logits = self.extend(ids, min(self.num_cached(ids), len(ids) - 1))
        return logits.flatten().float().cpu()

    def prefill(self, ids: Sequence[int]) -> None:
        """Make `ids` the content of the cache. What it holds of them already is kept."""
        self.extend(ids, self.num_cached(ids))

    def num_cached(self, ids: Sequence[int]) -> int:
        """Count the first of `ids` that are in the cache."""
        return len(common_prefix(self.cached_ids, list(ids)))

    @torch.inference_mode()
    def extend(self, ids: Sequence[int], start: int) -> Tensor:
        """Write ids[start:] into the cache; return the logits (1, V) after the last, if any."""
        self.cache.length = start
        self.cached_ids = []  # Ctrl-C may leave a chunk half written
        logits, device = torch.empty(0), self.cache.layers[0].device
        for begin in range(start, len(ids), PREFILL_CHUNK):
            chunk = torch.tensor([ids[begin : begin + PREFILL_CHUNK]], device=device)
            logits = self.read_chunk(chunk, self.cache)
        self.cached_ids = list(ids)
        return logits

    def read_chunk(self, chunk: Tensor, cache: KVCache) -> Tensor:
        """Append a chunk (1, n) to a cache of one row; return the logits (1, V) after it."""
        count = chunk.shape[1]
        if self.native_step and count == 1:
            cache.length += 1
            return self.native_step(chunk, [cache.length - 1], cache)
        # The compiler would specialize on the lengths 0 and 1; a CUDA graph holds addresses
        if self.compiled_decoder and count == 1 and cache.length > 1 and cache is self.cache:
            return self.compiled_decoder(chunk)[:, 0]
        padding = -count % PREFILL_MULTIPLE if chunk.device.type == "cpu" and count > 1 else 0
        padding = min(padding, cache.size - cache.length - count)
        last = torch.tensor([count - 1], device=chunk.device)
        logits = self.model(F.pad(chunk, (0, padding)), cache=cache, logit_positions=last)
        cache.length -= padding
        return logits


def stop_and_banned_ids(model: Transformer, tokenizer: Tokenizer) -> tuple[set[int], Tensor]:
    """Return the ids that end a turn, and those that are never generated."""
    stop_ids: set[int] = {tokenizer.im_end}
    for end_of_text in ("</s>", "<|endoftext|>"):
        if (id := tokenizer.engine.token_to_id(end_of_text)) is not None:
            stop_ids.add(id)
    size = model.config.vocab_size
    special = {id for id in tokenizer.special_ids if id < size}
    unused = range(len(tokenizer), size)
    return stop_ids, torch.tensor(sorted(special.union(unused) - stop_ids), dtype=torch.long)


# --- one token at a time on a GPU, compiled


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile has what it needs: a GPU that Triton knows."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)


class CompiledDecoder:
    """The forward pass of one token, in fp32 between the weights.

    Two compiled functions a block, the same ones for all blocks, and one for the head. The whole
    pass is a CUDA graph, one for each power of two of cached tokens.
    """

    def __init__(self, model: Transformer, cache: KVCache):
        self.model = model
        self.cache = cache
        device = cache.layers[0].device
        # What changes from step to step: graphs read it from these tensors
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.cache_positions = torch.arange(cache.size, device=device)
        self.blocks = [block for block in model.model.layers if isinstance(block, Block)]
        self.rotations = rope(self.cache_positions[None], model.config)
        # S → (CUDA graph over the first S positions of the cache, its logits)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.queries_keys_values = torch.compile(queries_keys_values)
        self.rest_of_block = torch.compile(rest_of_block)
        self.final_logits = torch.compile(final_logits)
        with torch.inference_mode():
            cache.length = 2
            self(self.token)
            self.compile_unpack()
            cache.length = 0
            model(self.cache_positions[None, :2], cache=cache)

    def compile_unpack(self) -> None:
        """Compile what prompts need of quantized layers: one function for each type of them."""
        compiled = {
            layer_type: torch.compile(layer_type.unpack, dynamic=False)
            for layer_type in quantize.PACKED_TYPES.values()
        }
        for module in self.model.modules():
            if isinstance(module, quantize.PackedLinear):
                module.unpack = compiled[type(module)]

    def __call__(self, token: Tensor) -> Tensor:
        """Append token (1, 1) to the cache; return the logits (1, 1, V) after it.

        The next call may overwrite them.
        """
        self.token.copy_(token)
        self.position.fill_(self.cache.length)
        self.cache.length += 1
        if token.device.type != "cuda":
            return self.forward(self.cache.length)
        power_of_two = 1 << (self.cache.length - 1).bit_length()
        num_seen = min(self.cache.size, max(512, power_of_two))
        if num_seen not in self.graphs:
            self.graphs[num_seen] = self.capture(num_seen)
        graph, logits = self.graphs[num_seen]
        graph.replay()
        return logits

    def forward(self, num_seen: int) -> Tensor:
        """Run the model over the first `num_seen` positions of the cache; return logits (1, 1, V).

        Reads no tensor's value on the CPU, so that CUDA can record it.
        """
        rotation = [angles.index_select(1, self.position) for angles in self.rotations]
        distance = self.position - self.cache_positions[:num_seen]
        window = self.model.config.sliding_window or self.cache.size
        hidden = (distance < 0) | (distance >= window)  # (S,)
        torch._dynamo.maybe_mark_dynamic(hidden, 0)
        x = self.model.model.embed_tokens(self.token).float()  # (1, 1, E)
        for block, layer in zip(self.blocks, self.cache.layers):
            q, k, v = self.queries_keys_values(block, x, rotation)
            kv = torch.stack([k, v]).transpose(2, 3)  # (2, 1, G, 1, D)
            layer.index_copy_(3, self.position, kv.to(layer.dtype))
            seen = layer[:, 0, :, :num_seen]  # (2, G, S, D)
            torch._dynamo.maybe_mark_dynamic(seen, 2)
            x = self.rest_of_block(block, x, q, seen, hidden)
        return self.final_logits(self.model, x)

    def capture(self, num_seen: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Record `forward` as a CUDA graph; return it and the tensor of its logits."""
        # Compile and warm up first, on another stream: neither can be captured
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.forward(num_seen)
            self.forward(num_seen)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.forward(num_seen)
        return graph, logits


def queries_keys_values(block: Block, x: Tensor, rotation: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return block.self_attn.qkv(block.input_layernorm(x), rotation)


def rest_of_block(block: Block, x: Tensor, q: Tensor, kv: Tensor, hidden: Tensor) -> Tensor:
    """Return a block's output (1, 1, E) from x (1, 1, E), q (1, 1, H, D), keys and values
    (2, G, S, D) and which of them are hidden (S,).

    Attention is written out: for one query Inductor makes it a loop over the cache, and casts
    keys and values to fp32 on the way.
    """
    keys, values = kv.float()
    q = q.view(len(keys), -1, 1, keys.shape[2])  # (G, H / G, 1, D)
    scores = (q * keys[:, None]).sum(-1) * keys.shape[2] ** -0.5  # (G, H / G, S)
    probs = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    attended = (probs[..., None] * values[:, None]).sum(2).view(1, 1, -1)  # (1, 1, H * D)
    x = x + block.self_attn.o_proj(attended)
    return x + block.mlp(block.post_attention_layernorm(x))


def final_logits(model: Transformer, x: Tensor) -> Tensor:
    return model.lm_head(model.model.norm(x))


# --- several replies at a time


class RowCache(KVCache):
    """A row of a BatchCache as a cache of its own, in the same memory."""

    def __init__(self, cache: KVCache, row: int):
        self.layers = [layer[:, row : row + 1] for layer in cache.layers]
        self.size, self.length, self.mask = cache.size, 0, None


class BatchCache(KVCache):
    """A KV cache whose rows have lengths of their own.

    A forward pass reads one token of each of the first rows, after `prepare`. `rows`: each alone.
    """

    def __init__(
        self, config: ModelConfig, size: int, batch: int, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(config, size, batch, dtype, device)
        self.rows = [RowCache(self, row) for row in range(batch)]
        self.window = config.sliding_window or size
        self.positions = torch.empty(0)

    def copy_row(self, row: int, source: KVCache, begin: int, end: int) -> None:
        """Copy tokens begin to end of `source`, a cache of one row, to the same place in `row`."""
        for ours, theirs in zip(self.layers, source.layers):
            ours[:, row, :, begin:end] = theirs[:, 0, :, begin:end]

    def swap_rows(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` tokens of two rows."""
        for layer in self.layers:
            both = layer[:, [second, first], :, :length]  # a copy
            layer[:, [first, second], :, :length] = both

    def prepare(self, lengths: list[int]) -> Tensor:
        """Set `mask` for the next token of the first n rows, which hold so many tokens.

        Returns their positions (n, 1).
        """
        self.length = max(lengths)
        self.positions = torch.tensor(lengths, device=self.layers[0].device)
        key = torch.arange(self.num_keys(1), device=self.positions.device)
        distance = self.positions[:, None] - key  # (n, S)
        self.mask = ((distance >= 0) & (distance < self.window))[:, None, None]
        return self.positions[:, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Write k, v (n, 1, G, D), each row at its length; return all of it (n, S, G, D)."""
        count = len(self.positions)
        rows = torch.arange(count, device=k.device)
        self.layers[layer][:, rows, :, self.positions] = torch.cat([k, v], 1)
        seen = self.num_keys(1)
        return self.layers[layer][:, :count, :, :seen].transpose(2, 3).unbind(0)


@dataclasses.dataclass(eq=False)
class BatchRow:
    """A reply in a batch: `ids` so far; `ended` by the model itself, not for want of `room`.

    `cached`: what its row of the cache holds of prompt and ids.
    """

    prompt: list[int]
    room: int
    temperature: float
    top_p: float
    generator: torch.Generator | None
    ids: list[int] = dataclasses.field(default_factory=list)
    cached: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False

    @property
    def unread(self) -> list[int]:
        """The ids behind the cached ones: the rest of the prompt, or the one that was drawn."""
        beyond = len(self.cached) - len(self.prompt)
        return self.prompt[beyond:] if beyond < 0 else self.ids[beyond:]


class DecodeBatch:
    """Several replies at once, each as `Decoder.generate` writes it.

    A step reads the weights once for all of them. A row joins with `add`, between any two steps,
    and leaves when it is done, or with `remove`. Row i has row i of the cache. Behind them the
    cache keeps what others left there, until it needs the place: the least recently used first.
    What a prompt shares with any row, or with the decoder's last prompt, is copied.

    `max_rows`, `size` (tokens of a row, prompt and reply together): of a cache of its own. Without
    them it has the decoder's slots; then a row alone is as fast as the decoder, and nobody else
    may use that.
    """

    def __init__(self, decoder: Decoder, max_rows: int | None = None, size: int | None = None):
        self.decoder = decoder
        self.cache = decoder.slots
        if max_rows is not None:
            size = size or decoder.cache.size
            layer = decoder.cache.layers[0]
            config = decoder.model.config
            self.cache = BatchCache(config, size, max_rows, layer.dtype, layer.device)
        self.max_rows = len(self.cache.rows)
        self.clear()

    def clear(self) -> None:
        """Forget all rows, and what is cached."""
        self.rows: list[BatchRow] = []
        # By row of the cache: the ids in it, and when it was left
        self.cached: list[list[int]] = [[] for _ in self.cache.rows]
        self.left_at = [0] * self.max_rows
        self.num_left = 0
        if self.cache is self.decoder.slots:
            self.decoder.cached_ids = []

    @property
    def full(self) -> bool:
        return len(self.rows) == self.max_rows

    @torch.inference_mode()
    def add(
        self,
        prompt: Sequence[int],
        max_new: int = 256,
        temperature: float = 0.7,
        top_p: float = 0.95,
        generator: torch.Generator | None = None,
    ) -> BatchRow:
        """Return the row of a prompt; the next steps read it, then its `ids` grow."""
        assert not self.full, f"the batch holds {self.max_rows} rows"
        room = min(max_new, self.cache.size - len(prompt))
        row = BatchRow(list(prompt), room, temperature, top_p, generator)
        if room > 0:
            place, index = self.choose_place(row.prompt), len(self.rows)
            row.cached = self.cached[place] = common_prefix(self.cached[place], row.prompt[:-1])
            self.swap(place, index)
            self.rows.append(row)
            self.copy_prefix(row, index)
        return row

    def choose_place(self, prompt: list[int]) -> int:
        """Return the free row of the cache that a prompt takes.

        It is that of its own talk, which holds the prompt's beginning and little else. The
        beginning alone doesn't make another's talk its own.
        """
        free = range(len(self.rows), self.max_rows)
        shared = {place: len(common_prefix(self.cached[place], prompt)) for place in free}
        best = max(free, key=shared.__getitem__)
        if 2 * shared[best] > len(self.cached[best]):
            return best
        return min(free, key=self.left_at.__getitem__)

    def copy_prefix(self, row: BatchRow, index: int) -> None:
        """Copy what another row of the cache, or the decoder's, holds of a prompt."""
        last = self.decoder.cached_ids, self.decoder.cache
        prompt = row.prompt[:-1]  # the logits after the last token are not in a cache
        for ids, cache in [*zip(self.cached, self.cache.rows), last]:
            begin, end = len(row.cached), len(common_prefix(ids, prompt))
            if end > begin:
                self.cache.copy_row(index, cache, begin, end)
                row.cached += prompt[begin:end]

    @torch.inference_mode()
    def step(self) -> list[BatchRow]:
        """Generate a token of each row whose prompt is read; read a piece of the next prompt.

        Returns the rows that are done, which left the batch.
        """
        ready = [index for index, row in enumerate(self.rows) if len(row.unread) == 1]
        done: list[BatchRow] = []
        if len(ready) == 1:
            done += self.draw([self.rows[ready[0]]], self.read(ready[0], 1))
        elif ready:
            # Rows before the last one read a token of their prompts in passing
            rows = self.rows[: ready[-1] + 1]
            done += self.draw(rows, self.forward(rows))
        for index, row in enumerate(self.rows):
            if len(row.unread) > 1:
                self.copy_prefix(row, index)
                logits = self.read(index, PIECE if ready else PREFILL_CHUNK)
                done += self.draw([row], logits)
                break
        for row in done:
            self.remove(row)
        return done

    def forward(self, rows: list[BatchRow]) -> Tensor:
        """Read a token of each of the first rows; return the logits (n, V) after them."""
        ids = [row.unread[0] for row in rows]
        lengths = [len(row.cached) for row in rows]
        tokens = torch.tensor(ids, device=self.cache.layers[0].device)[:, None]
        if self.decoder.native_step:
            logits = self.decoder.native_step(tokens, lengths, self.cache)
        else:
            positions = self.cache.prepare(lengths)
            logits = self.decoder.model(tokens, positions, cache=self.cache)[:, 0]
        for row, id in zip(rows, ids):
            row.cached.append(id)
        return logits

    def read(self, index: int, count: int) -> Tensor:
        """Read at most `count` tokens of a row; return the logits (1, V) after them."""
        row, cache = self.rows[index], self.cache.rows[index]
        ids = row.unread[:count]
        cache.length = len(row.cached)
        chunk = torch.tensor([ids], device=cache.layers[0].device)
        logits = self.decoder.read_chunk(chunk, cache)
        row.cached += ids
        return logits

    def draw(self, rows: list[BatchRow], logits: Tensor) -> list[BatchRow]:
        """Sample the next id of each row that is read, from logits (n, V); return those done."""
        logits = logits.float().cpu().index_fill(1, self.decoder.banned_ids, -torch.inf)
        done = []
        for row, row_logits in zip(rows, logits):
            if row.unread:
                continue
            next_id = sample(row_logits, row.temperature, row.top_p, row.generator)
            next_id = self.decoder.broadcast(next_id)
            row.ended = next_id in self.decoder.stop_ids
            if not row.ended:
                row.ids.append(next_id)
            if row.ended or len(row.ids) == row.room:
                done.append(row)
        return done

    @torch.inference_mode()
    def remove(self, row: BatchRow) -> None:
        """Free a row's place, which keeps what it holds. The last row takes its number."""
        index, last = self.rows.index(row), len(self.rows) - 1
        self.swap(index, last)
        self.rows[index] = self.rows[last]
        self.rows.pop()
        self.num_left += 1
        self.left_at[last] = self.num_left

    def swap(self, first: int, second: int) -> None:
        """Exchange what two rows of the cache hold."""
        if first != second:
            length = max(len(self.cached[first]), len(self.cached[second]))
            self.cache.swap_rows(first, second, length)
            cached, left_at = self.cached, self.left_at
            cached[first], cached[second] = cached[second], cached[first]
            left_at[first], left_at[second] = left_at[second], left_at[first]


def common_prefix(first: list[int], second: list[int]) -> list[int]:
    return list(os.path.commonprefix([first, second]))


# --- turns and messages


class Answer:
    """My next turn after `turns`: iterate over it for the messages so far, each time they grow.

    `prompt` and `ids`: what was read and what is generated; `messages`: so far; `ended`: by the
    model itself, not by `max_new` or the end of the context. A decoder writes one at a time; an
    answer that is left early (closed, or interrupted) leaves it ready for the next. To write
    several side by side, `join` a batch and `update` after its steps. `chat`: (its name, whether
    it's a group), see context.py.
    """

    def __init__(
        self,
        decoder: Decoder,
        turns: list[data.Turn],
        me: str,
        max_new: int = 256,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int | None = None,
        chat: tuple[str, bool] | tuple[()] = (),
    ):
        self.decoder = decoder
        self.me = me
        self.messages: list[str] = []
        self.ids: list[int] = []
        self.ended = False
        self.max_new = min(max_new, decoder.cache.size // 2)
        prompt_size = decoder.cache.size - self.max_new
        turns = decoder.context_builder(turns, *chat)
        self.prompt = truncate_prompt(turns, me, decoder.tokenizer, prompt_size, decoder.reply_ids)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.sampling = (self.max_new, temperature, top_p, generator)

    def __iter__(self) -> Generator[list[str], None, None]:
        for id in self.decoder.generate(self.prompt, *self.sampling):
            self.ids.append(id)
            if self.update():
                yield self.messages
        if self.update(done=True):
            yield self.messages

    def join(self, batch: DecodeBatch) -> BatchRow:
        """Let a batch write it."""
        row = batch.add(self.prompt, *self.sampling)
        self.ids = row.ids
        return row

    def update(self, done: bool = False) -> bool:
        """Bring `messages` up to date with `ids`; return whether they grew. `done`: ids are."""
        before = self.messages
        self.messages = split_reply(self.ids, self.decoder.tokenizer, done)
        if done:
            self.ended = len(self.ids) < self.max_new
            self.remember()
        return self.messages != before

    def remember(self) -> None:
        """Keep the turn's ids, so that the next prompt begins with exactly what is cached."""
        im_start = self.decoder.tokenizer.im_start
        if im_start not in self.prompt:
            return  # a long name fills a tiny context
        header_length = self.prompt[::-1].index(im_start) + 1
        known = self.decoder.reply_ids
        known[self.me, *self.messages] = self.prompt[-header_length:] + self.ids
        if len(known) > MAX_REPLIES:
            del known[next(iter(known))]


def split_reply(ids: list[int], tokenizer: Tokenizer, done: bool) -> list[str]:
    """Return the messages in a reply, which only grow while it does.

    Until it is done, its end waits while it may become a `>>>` mark or is half a character.
    """
    text = tokenizer.decode(ids) if ids else ""
    if not done:
        text = re.sub("(\n>{0,3}|\ufffd+)$", "", text)
    return data.split_messages(text)


def truncate_prompt(
    turns: list[data.Turn],
    me: str,
    tokenizer: Tokenizer,
    size: int,
    reply_ids: ReplyIds | None = None,
) -> list[int]:
    """Return the ids of the prompt after `turns`, at most `size`: the oldest turns are dropped.

    Turns are dropped half a context at a time, so that most prompts begin as the last one did. A
    single turn that is too long loses its beginning. A header stays, unless it takes half the
    context. `reply_ids`: turns whose ids are known.
    """
    ids, _ = tokenizer.encode(data.prompt(turns, me, tokenizer.specials))
    starts = [index for index, id in enumerate(ids) if id == tokenizer.im_start]
    bounds = zip(starts, [*starts[1:], len(ids)])
    prefix = ids[: starts[0]]  # <s>, if the tokenizer has it
    parts = [ids[begin:end] for begin, end in bounds]  # the turns, then the author line of mine
    for index, turn in enumerate(turns):
        known = (reply_ids or {}).get((turn.author, *turn.messages))
        if known:
            parts[index] = known + parts[index][parts[index].index(tokenizer.im_end) :]
    if len(turns) > 1 and turns[0].author == data.HEADER and len(parts[0]) < size // 2:
        prefix = prefix + parts.pop(0)

    half = max(1, size // 2)
    excess = len(prefix) + sum(map(len, parts)) - size
    to_drop = math.ceil(excess / half) * half
    dropped = 0
    while dropped < to_drop and len(parts) > 2:
        dropped += len(parts.pop(0))
    ids = sum(parts, [])
    return prefix + ids[max(0, len(prefix) + len(ids) - size) :]
