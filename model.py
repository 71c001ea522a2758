"""A Mistral-style decoder in plain PyTorch: RMSNorm, RoPE, grouped-query attention with an optional
sliding window, SwiGLU. Mistral, Llama and Qwen differ only in their `ModelConfig`.

Names of modules and config keys are Hugging Face's, so a state dict *is* a HF checkpoint.
Sources: Llama 2 (arXiv 2307.09288), Mistral 7B (2310.06825), RoFormer (2104.09864),
YaRN (2309.00071), GQA (2305.13245), GLU variants (2002.05202).

Shapes: B batch, T tokens, S tokens with the cached ones, N = B * T, H query heads, G key/value
heads, D head_dim, E hidden_size, V vocab_size.

The file is built bottom-up. To read it from the top, begin with `Transformer.forward`, then
`Block.compute`, `Attention.forward`, `attend`.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fused

# The label of a token that is no target, as in F.cross_entropy.
IGNORE_INDEX = -100

# What the backward pass computes a second time: nothing, all but matmuls and attention, everything.
AC_MODES = ("none", "selective", "full")

# Ops whose outputs selective activation checkpointing keeps; lora.py adds its own.
SAVED_OPS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

# SDPA takes a mask and grouped heads together on these devices. CUDA's kernel takes only the mask.
GQA_MASK_DEVICES = ("cpu",)

# (tokens whose logits exist at a time, of these the tokens in fp32): 16 fit a CPU's cache.
CPU_HEAD_CHUNK = (256, 16)

# Logits at a time on a GPU: 1024 tokens of a vocabulary of 32,000, 256 of one of 128,000.
GPU_HEAD_NUMEL = 1 << 25

# Numbers whose fp32 intermediates fit a CPU core's cache.
CACHE_NUMEL = 1 << 17

# oneDNN compiles for every new shape and keeps the code, so a CPU gets multiples of 64 tokens.
CPU_MULTIPLE = 64

# A CPU's attention keeps code for every number of keys, so cached keys come in multiples of 64.
KEY_MULTIPLE = 64

# Queries at a time on a CPU: few enough to skip most of the keys that causality hides.
QUERY_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """HF's `config.json` keys. `head_dim` need not be hidden_size / num_attention_heads (Nemo)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    model_type: str = "mistral"
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: dict | None = None

    def __post_init__(self):
        assert self.num_attention_heads % self.num_key_value_heads == 0, self
        assert self.head_dim % 2 == 0, self

    @property
    def linears(self) -> dict[str, tuple[int, int, bool]]:
        """A block's linear layers: {name: (in_features, out_features, bias)}."""
        E, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        qkv_bias = self.attention_bias or self.model_type == "qwen2"
        return {
            "q_proj": (E, q, qkv_bias),
            "k_proj": (E, kv, qkv_bias),
            "v_proj": (E, kv, qkv_bias),
            "o_proj": (q, E, self.attention_bias),
            "gate_proj": (E, inner, self.mlp_bias),
            "up_proj": (E, inner, self.mlp_bias),
            "down_proj": (inner, E, self.mlp_bias),
        }

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def num_parameters(self) -> int:
        """All weights, tied ones once: 7,241,732,096 for Mistral 7B v0.1."""
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        block = sum((n_in + bias) * n_out for n_in, n_out, bias in self.linears.values()) + norms
        embeddings = self.vocab_size * self.hidden_size * (2 - self.tie_word_embeddings)
        return self.num_hidden_layers * block + embeddings + self.hidden_size


def cache_chunks(*tensors):
    """Split tensors of equal length into chunks of rows that fit a CPU's cache.

    Each chunk goes through all steps of a formula before the next is read. On a GPU, in a compiled
    block, and for fake tensors (they stand for a GPU's) there is one chunk.
    """
    first = tensors[0]
    on_cpu = first.device.type == "cpu" and type(first) is Tensor
    if not on_cpu or torch.compiler.is_compiling():
        return [tensors]
    rows = max(1, CACHE_NUMEL // max(1, first[:1].numel()))
    return zip(*(tensor.split(rows) for tensor in tensors))


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight in fp32, because squares overflow in bf16. Saves x and 1 / rms alone."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.flatten(0, -2)  # (N, E)
        if fused.serves(rows):
            out, inv_rms = fused.rms_norm(rows, weight, eps)
            ctx.save_for_backward(rows, weight, inv_rms)
            return out.view(x.shape)
        out = torch.empty_like(rows)
        inv_rms = rows.new_empty(len(rows), 1, dtype=torch.float32)
        scale = weight.float()
        for out_chunk, chunk, inv_chunk in cache_chunks(out, rows, inv_rms):
            norm = torch.linalg.vector_norm(chunk, dim=-1, keepdim=True, dtype=torch.float32)
            inv_chunk.copy_(torch.rsqrt(norm * norm / x.shape[-1] + eps))
            out_chunk.copy_((chunk.float() * inv_chunk).mul_(scale))
        ctx.save_for_backward(rows, weight, inv_rms)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, inv_rms = ctx.saved_tensors
        if fused.serves(rows):
            flat, train_weight = grad.reshape(rows.shape), ctx.needs_input_grad[1]
            out, grad_weight = fused.rms_norm_backward(flat, rows, weight, inv_rms, train_weight)
            return out.view(grad.shape), grad_weight, None
        out, scale = torch.empty_like(rows), weight.float()
        grad_weight = torch.zeros_like(scale) if ctx.needs_input_grad[1] else None
        for out_chunk, x, g, inv in cache_chunks(out, rows, grad.reshape(rows.shape), inv_rms):
            x, g = x.float(), g.float()
            if grad_weight is not None:
                grad_weight += (g * x).mul_(inv).sum(0)
            g = g * scale
            along_x = (g * x).sum(-1, keepdim=True) * (inv**3 / -rows.shape[-1])
            out_chunk.copy_(g.mul_(inv).addcmul_(x, along_x))
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return out.view(grad.shape), grad_weight, None


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return RMSNormFunction.apply(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input: fp32 masters serve bf16.

    A subclass may store its weight otherwise: `stored()` are its tensors,
    `unpack(*stored(), dtype)` the weight (out, in), `product(x, *stored())` the fp32 product with
    one token x (in,). Compiled on a CPU, `product` reads weights twice as fast as a matmul would.
    """

    # Functions of as many tensors as `stored()` has.
    unpack: Callable[..., Tensor] = staticmethod(lambda weight, dtype: weight.to(dtype))
    product: Callable[..., Tensor] = staticmethod(lambda x, weight: (weight.float() * x).sum(-1))

    def stored(self) -> Sequence[Tensor]:
        return (self.weight,)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        if x.shape[:-1].numel() == 1 and torch.compiler.is_compiling():
            y = self.product(x.flatten().float(), *self.stored()).to(x.dtype)
            y = y.view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        return F.linear(x, self.unpack(*self.stored(), dtype=x.dtype), bias)


# --- rotary positions


def rope(positions: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
    """Compute cos and signed sin for HF's half-split rotation, each (B, T, 1, D).

    In fp32, because bf16 cannot tell position 257 from 258. Two pairs where queries are scaled by
    their position (Ministral 3, as in Llama 4): the queries' (cos, sin), then the keys'.
    """
    inv_freq, scale = rope_inv_freq(config, positions.device)
    positions = positions[:, :, None, None].float()
    angle = positions * inv_freq  # (B, T, 1, D / 2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    scaling = config.rope_scaling or {}
    beta = scaling.get("llama_4_scaling_beta")
    if not beta:
        return cos, sin
    contexts = torch.floor(positions / scaling["original_max_position_embeddings"])
    growth = 1 + beta * torch.log1p(contexts)
    return cos * growth, sin * growth, cos, sin


def rope_inv_freq(config: ModelConfig, device) -> tuple[Tensor, float]:
    """Compute the radians per position (D / 2,) and the factor on cos and sin, as HF does.

    `rope_scaling` keeps a share (0 to 1) of each frequency and divides the rest by `factor`.
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    inv_freq = config.rope_theta ** (-exponent / config.head_dim)
    scaling = config.rope_scaling or {}
    kind, scale = scaling.get("rope_type"), 1.0
    if kind in (None, "default"):
        return inv_freq, scale
    kept: float | Tensor = 0.0  # linear
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        kept, scale = yarn(exponent / 2, config)
    return inv_freq * (kept + (1 - kept) / scaling["factor"]), scale


def yarn(index: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """Compute YaRN's kept share of frequency number `index` (D / 2,) and its attention factor."""
    scaling, D = config.rope_scaling or {}, config.head_dim
    context = scaling["original_max_position_embeddings"]
    # The frequencies that make so many turns within the original context.
    turns = scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1
    low, high = (D * math.log(context / (n * 2 * math.pi)) for n in turns)
    low, high = (x / (2 * math.log(config.rope_theta)) for x in (low, high))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    kept = 1 - ((index - low) / (high - low or 0.001)).clamp(0, 1)
    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if not (mscale and mscale_all):
        mscale, mscale_all = 1, 0
    log = math.log(max(scaling["factor"], 1))
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = (1 + 0.1 * mscale * log) / (1 + 0.1 * mscale_all * log)
    return kept, scale


class ApplyRotary(torch.autograd.Function):
    """Rotate x (B, T, H, D) by `rope`'s angles; the backward pass rotates back and needs no x."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return ApplyRotary.rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return ApplyRotary.rotate(grad, cos, -sin), None, None

    @staticmethod
    def rotate(x, cos, sin):
        if fused.serves(x):
            return fused.rotate(x, cos, sin)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        cos, sin = (angle.expand(*x.shape[:2], 1, -1).flatten(0, 1) for angle in (cos, sin))
        for to, part, c, s in cache_chunks(out.flatten(0, 1), x.flatten(0, 1), cos, sin):
            part = part.float()
            to.copy_((part * c).addcmul_(part.roll(x.shape[-1] // 2, -1), s))
        return out


# --- attention


class KVCache:
    """Keys and values of the first `length` tokens, in buffers allocated once.

    A layer's buffer is (2, B, G, size, D), keys first. `model(ids[:, :7], cache=cache)` leaves
    length 7; `cache.length = 5` forgets the last two; the next call writes from 5 on.
    `mask` (B or 1, 1, T, S): which keys the next T tokens see, or a bias on their scores (None: all
    keys up to their own). S is `num_keys(T)`.
    """

    def __init__(
        self, config: ModelConfig, size: int, batch: int = 1, dtype=torch.float32, device="cpu"
    ):
        shape = (2, batch, config.num_key_value_heads, size, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.size, self.length = size, 0
        self.mask: Tensor | None = None

    def num_keys(self, count: int) -> int:
        """Count the keys that are read with `count` next tokens: some at the end are hidden."""
        end = self.length + count
        return min(self.size, end + -end % KEY_MULTIPLE)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """Write k, v (B, T, G, D) after the cached ones; return (B, S, G, D), S = num_keys(T)."""
        end, seen = self.length + k.shape[1], self.num_keys(k.shape[1])
        assert end <= self.size, f"the cache holds {self.size} tokens, {end} were asked for"
        self.layers[layer][:, :, :, self.length : end] = torch.stack([k, v]).transpose(2, 3)
        return self.layers[layer][:, :, :, :seen].transpose(2, 3).unbind(0)


class QueryBlocks(NamedTuple):
    """Blocks of queries that see equally many keys on a CPU: each product takes all of them.

    A block's queries are the `size` tokens from `first_query` (blocks,) on, its keys the `columns`
    from `first_key` (blocks,) on, of which the last is the last query's own. A query sees the
    columns from `first_seen` (blocks, size) on, up to its own.
    """

    first_query: np.ndarray
    size: int
    first_key: np.ndarray
    columns: int
    first_seen: np.ndarray


class Documents(NamedTuple):
    """The documents among a batch's N tokens; no token attends outside its own.

    `cu_seqlens`: where they begin and the last one ends, [0, 3, 8] for documents of 3 and 5 tokens:
    a list on a CPU, an int32 tensor on CUDA.
    `max_seqlen`: no document is longer. `blocks`: the queries on a CPU.
    `kernel(q, k, v, documents)`: q (N, H, D), k, v (N, G, D) → (N, H, D).
    """

    kernel: Callable
    cu_seqlens: list | Tensor
    max_seqlen: int
    window: int | None
    blocks: list[QueryBlocks] | None = None


def attention_layout(
    positions: Tensor,
    window: int | None,
    cached: int | None,
    dtype: torch.dtype,
    cu_seqlens: list | Tensor | None = None,
    head_dim: int = 128,
    num_keys: int | None = None,
) -> Documents | Tensor:
    """Work out, once for all layers, who attends to whom. Only this function chooses the kernel.

    A document starts wherever `positions` (B, T) is 0, and with each row; `cu_seqlens` says so
    without a wait for the GPU. A window of W is the token itself and the W - 1 before it, as in HF.
    `cached`: tokens in the cache, None without one. `num_keys`: S, if keys follow that are not
    written yet. Returns Documents, or a mask (B or 1, 1, T, S), True where query t sees key s, for
    a filled cache and where there is no kernel for documents.
    """
    B, T = positions.shape
    on_cpu = positions.device.type == "cpu"
    if on_cpu and not cached or cached is None and has_varlen(positions.device, dtype, head_dim):
        if cu_seqlens is None:
            starts = positions == 0
            starts[:, 0] = True
            cu_seqlens = F.pad(starts.flatten().nonzero()[:, 0].int(), (0, 1), value=B * T)
            cu_seqlens = cu_seqlens.tolist() if on_cpu else cu_seqlens
        if isinstance(cu_seqlens, Tensor):
            return Documents(varlen_kernel(), cu_seqlens, T, window)
        blocks = query_blocks(cu_seqlens, window)
        return Documents(document_attention, cu_seqlens, T, window, blocks)
    before = cached or 0
    key = torch.arange(num_keys or before + T, device=positions.device)
    query = key[before : before + T, None]
    mask = (key <= query)[None, None]
    if window is not None:
        mask = mask & (query - key < window)
    if before == 0:
        document = (positions == 0).cumsum(-1)
        document_of_key = F.pad(document, (0, len(key) - T))
        mask = mask & (document[:, None, :, None] == document_of_key[:, None, None])
    return mask  # (B or 1, 1, T, S)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: Documents | Tensor) -> Tensor:
    """Scaled dot-product attention of q (B, T, H, D) over k, v (B, S, G, D) → (B, T, H, D)."""
    if isinstance(layout, Documents):
        flat = (x[:, : q.shape[1]].flatten(0, 1) for x in (q, k, v))
        return layout.kernel(*flat, layout).view(q.shape)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T or S, D)
    gqa = q.device.type in GQA_MASK_DEVICES
    if not gqa:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=layout, enable_gqa=gqa)
    return out.transpose(1, 2)


def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether CUDA's kernel for documents computes this: in 16 bits, from Ampere on.

    Its backward pass takes heads of up to 192 on all of these GPUs.
    """
    if device.type != "cuda" or dtype == torch.float32 or head_dim > 192 or head_dim % 8:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def varlen_kernel() -> Callable:
    """torch's kernel for documents on CUDA. Up to 2.11 it knows no groups: k and v are repeated."""
    from torch.nn.attention.varlen import varlen_attn

    knows_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict = {"enable_gqa": True} if knows_groups else {}

    def kernel(q, k, v, documents):
        window = -1 if documents.window is None else documents.window - 1
        if not knows_groups:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        cu_seqlens, longest = documents.cu_seqlens, documents.max_seqlen
        lengths = cu_seqlens, cu_seqlens, longest, longest  # of queries and of keys
        return varlen_attn(q, k, v, *lengths, window_size=(window, 0), **options)

    return kernel


def query_blocks(cu_seqlens: list, window: int | None) -> list[QueryBlocks]:
    """Cut a CPU's N tokens into blocks of queries, across the borders of documents.

    Keys begin at a multiple of the size too, and blocks are grouped by powers of two: products have
    few shapes, and each new one costs oneDNN time and memory.
    """
    size = min(QUERY_BLOCK, 16 * math.ceil(cu_seqlens[-1] / 16))
    token = np.arange(math.ceil(cu_seqlens[-1] / size) * size)
    # The first key that each token sees; tokens that fill the last block see themselves.
    starts = token.copy()
    for begin, end in zip(cu_seqlens, cu_seqlens[1:]):
        starts[begin:end] = begin
    if window:
        starts = np.maximum(starts, token - window + 1)
    starts = starts.reshape(-1, size)
    first_query = token[::size]
    first_key = starts[:, 0] // size * size
    columns = first_query + size - first_key

    groups = []
    for count in np.unique(columns):
        (same,) = np.nonzero(columns == count)
        while len(same):
            part, same = np.split(same, [1 << (len(same).bit_length() - 1)])
            first_seen = (starts[part] - first_key[part, None]).astype(np.int32)
            blocks = QueryBlocks(first_query[part], size, first_key[part], int(count), first_seen)
            groups.append(blocks)
    return groups


def document_attention(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attention within each document on a CPU: q (N, H, D), k, v (N, G, D) → (N, H, D)."""
    return DocumentAttention.apply(q, k, v, documents.blocks)


class DocumentAttention(torch.autograd.Function):
    """Blocks of queries over the keys that they see. Saves the probabilities."""

    @staticmethod
    def forward(ctx, q, k, v, groups):
        G, scale = k.shape[1], k.shape[2] ** -0.5
        out, saved = q.new_zeros(q.shape), []
        for blocks in groups:
            at_queries = blocks.first_query, blocks.size
            at_keys = blocks.first_key, blocks.columns
            queries = gather_blocks(q, *at_queries, G, scale)
            scores = torch.bmm(queries, gather_blocks(k, *at_keys, G).mT)
            probabilities = masked_softmax_(scores, blocks.first_seen)
            add_blocks_(out, torch.bmm(probabilities, gather_blocks(v, *at_keys, G)), *at_queries)
            if any(ctx.needs_input_grad):
                saved.append(probabilities)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *saved = ctx.saved_tensors
        G, scale = k.shape[1], k.shape[2] ** -0.5
        grad_q = q.new_zeros(q.shape)
        # Sums over blocks, in fp32
        grad_k, grad_v = (k.new_zeros(k.shape, dtype=torch.float32) for _ in range(2))
        for blocks, probabilities in zip(ctx.groups, saved):
            at_queries = blocks.first_query, blocks.size
            at_keys = blocks.first_key, blocks.columns
            grads = gather_blocks(grad, *at_queries, G)
            add_blocks_(grad_v, torch.bmm(probabilities.mT, grads), *at_keys)
            scores = torch.bmm(grads, gather_blocks(v, *at_keys, G).mT)
            softmax_backward_(scores, probabilities, blocks.first_seen)
            add_blocks_(
                grad_q, torch.bmm(scores, gather_blocks(k, *at_keys, G, scale)), *at_queries
            )
            queries = gather_blocks(q, *at_queries, G, scale)
            add_blocks_(grad_k, torch.bmm(scores.mT, queries), *at_keys)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None


def gather_blocks(
    x: Tensor, firsts: np.ndarray, length: int, groups: int, scale: float = 1.0
) -> Tensor:
    """x (N, heads, D) → (blocks * G, length * heads / G, D): the tokens from `firsts` on, scaled.

    A block holds its tokens one after another, each with the heads that share a key. Behind the
    last token are zeros.
    """
    if fused.serves(x):
        return fused.gather_blocks(x, firsts, length, groups, scale)
    tokens = firsts[:, None] + np.arange(length)  # (blocks, length)
    x = F.pad(x, (0, 0, 0, 0, 0, max(0, tokens.max() + 1 - len(x))))
    x = x[torch.from_numpy(tokens)] * scale  # (blocks, length, heads, D)
    return x.unflatten(2, (groups, -1)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def add_blocks_(total: Tensor, x: Tensor, firsts: np.ndarray, length: int) -> None:
    """Add x as `gather_blocks` makes it to total (N, heads, D)."""
    if fused.serves(x):
        fused.add_blocks_(total, x, firsts, length)
        return
    x = x.unflatten(0, (len(firsts), -1)).unflatten(2, (length, -1)).transpose(1, 2)
    tokens = (firsts[:, None] + np.arange(length)).flatten()
    real = np.flatnonzero(tokens < len(total))
    x = x.flatten(2, 3).flatten(0, 1)[torch.from_numpy(real)].to(total.dtype)
    total.index_add_(0, torch.from_numpy(tokens[real]), x)


def masked_softmax_(scores: Tensor, first_seen: np.ndarray) -> Tensor:
    """Scores (blocks * G, size * H / G, columns) → probabilities, in place; see QueryBlocks."""
    if fused.serves(scores):
        return fused.softmax_(scores, first_seen)
    column = np.arange(scores.shape[-1])
    own = column[-first_seen.shape[1] :, None]
    hidden = (column < first_seen[..., None]) | (column > own)  # (blocks, size, columns)
    by_query = scores.unflatten(0, (len(hidden), -1)).unflatten(2, (hidden.shape[1], -1))
    by_query.masked_fill_(torch.from_numpy(hidden)[:, None, :, None], -math.inf)
    return torch.softmax(scores, -1, out=scores)


def softmax_backward_(grad: Tensor, probabilities: Tensor, first_seen: np.ndarray) -> Tensor:
    """The gradient of probabilities → that of scores, in place."""
    if fused.serves(grad):
        return fused.softmax_backward_(grad, probabilities, first_seen)
    return torch._softmax_backward_data(grad, probabilities, -1, grad.dtype, grad_input=grad)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        self.q_proj = Linear(*config.linears["q_proj"])
        self.k_proj = Linear(*config.linears["k_proj"])
        self.v_proj = Linear(*config.linears["v_proj"])
        self.o_proj = Linear(*config.linears["o_proj"])
        if self.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def qkv(self, x: Tensor, rotation: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """x (B, T, E) → q (B, T, H, D), k and v (B, T, G, D), rotated by `rope`'s angles."""
        linears = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in linears)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return ApplyRotary.apply(q, *rotation[:2]), ApplyRotary.apply(k, *rotation[-2:]), v

    def forward(self, x, rotation, layout, target_positions, cache, layer):
        q, k, v = self.qkv(x, rotation)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, S, G, D)
        attended = attend(q, k, v, layout).flatten(2)  # (B, T, H * D)
        return self.o_proj(select_tokens(attended, target_positions))


def select_tokens(x: Tensor, positions: Tensor | None) -> Tensor:
    """x (B, T, E) → (n, E), the tokens at `positions` (n,) among the N; all of x without."""
    return x if positions is None else x.flatten(0, 1).index_select(0, positions)


# --- blocks


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up; saves these two alone."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        if fused.serves(gate):
            return fused.swiglu(gate, up)
        out = torch.empty_like(gate)
        for to, g, u in cache_chunks(*(x.flatten(0, -2) for x in (out, gate, up))):
            torch.mul(F.silu(g), u, out=to)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if fused.serves(gate):
            return fused.swiglu_backward(grad, gate, up)
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        rows = (x.flatten(0, -2) for x in (grad_gate, grad_up, grad, gate, up))
        for to_gate, to_up, grad_out, g, u in cache_chunks(*rows):
            torch.mul(F.silu(g), grad_out, out=to_up)
            torch.ops.aten.silu_backward.grad_input(grad_out * u, g, grad_input=to_gate)
        return grad_gate, grad_up


def recomputed(
    out: Tensor, function: Callable[..., Tensor], *inputs: Tensor
) -> contextlib.AbstractContextManager:
    """Operations inside don't keep `out` for their backward pass, but call function(*inputs) again.

    The inputs are kept: `function` should be cheap, and have kept them anyway.
    """
    # Weak, because torch keeps `pack` as long as the graph.
    storage = weakref.ref(out.untyped_storage())
    inputs = tuple(x.detach() for x in inputs)

    def pack(saved: Tensor) -> Tensor | torch.Size:
        return saved.shape if saved.untyped_storage() is storage() else saved

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else function(*inputs).view(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class FeedForward(nn.Module):
    recompute = False  # see Transformer.recompute_cheap_parts

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(*config.linears["gate_proj"])
        self.up_proj = Linear(*config.linears["up_proj"])
        self.down_proj = Linear(*config.linears["down_proj"])

    def forward(self, x: Tensor) -> Tensor:
        if not self.recompute:
            return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = SwiGLU.apply(gate, up)
        with recomputed(hidden, SwiGLU.apply, gate, up):
            return self.down_proj(hidden)


def selective_ac_policy(context, op, *args, **kwargs) -> CheckpointPolicy:
    saved = op in SAVED_OPS or "varlen_attn" in str(op)
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE_AC = functools.partial(create_selective_checkpoint_contexts, selective_ac_policy)


class Block(nn.Module):
    """Attention and a feed-forward network, each applied to a norm of x and added to x.

    `activation_checkpointing`: one of AC_MODES.
    """

    def __init__(self, config: ModelConfig, activation_checkpointing: str = "none"):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Tensor, rotation, layout, target_positions=None, cache=None, layer: int = 0
    ) -> Tensor:
        """x (B, T, E) → (B, T, E), or (n, E) for the tokens at `target_positions` (n,) alone."""
        # Decoding has a new shape for every token: nothing to compile.
        run = self.run if cache is None else self.compute
        return run(x, rotation, layout, target_positions, cache, layer)

    def run(self, *args):
        """What `compile_blocks` compiles; FSDP2's hooks stay outside, on `forward`."""
        if self.activation_checkpointing == "none" or not torch.is_grad_enabled():
            return self.compute(*args)
        selective = self.activation_checkpointing == "selective"
        options: dict = {"context_fn": SELECTIVE_AC} if selective else {}
        return checkpoint(self.compute, *args, use_reentrant=False, **options)

    def compute(self, x, rotation, layout, target_positions, cache, layer):
        normed = self.input_layernorm(x)
        with self.recomputed(normed, self.input_layernorm, x):
            attended = self.self_attn(normed, rotation, layout, target_positions, cache, layer)
        x = select_tokens(x, target_positions) + attended
        normed = self.post_attention_layernorm(x)
        with self.recomputed(normed, self.post_attention_layernorm, x):
            return x + self.mlp(normed)

    def recomputed(self, *args) -> contextlib.AbstractContextManager:
        return recomputed(*args) if self.mlp.recompute else contextlib.nullcontext()


# --- loss


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `head(hidden)`, exact in fp32, with the logits of few tokens at a time.

    hidden (n or more, E), labels (n,) → losses (n,) float32; `chunk_sizes` as in CPU_HEAD_CHUNK.
    Each chunk's gradient is computed with its loss, so the head's matmul runs once. It is the
    gradient of the sum, which backward scales: sum the losses before calling backward.
    """

    @staticmethod
    def forward(ctx, head, hidden, labels, chunk_sizes, *weights):
        chunk, softmax_rows = chunk_sizes
        losses = torch.zeros(len(labels), device=hidden.device)
        train, grads = any(ctx.needs_input_grad), []
        if train:
            grads = [torch.zeros_like(w, dtype=torch.float32) for w in weights]
            grads.insert(0, torch.zeros_like(hidden))
        for begin in range(0, len(labels), chunk):
            part = slice(begin, begin + chunk)
            count = len(labels[part])
            if not train:
                losses[part] = token_nll(head(hidden[part])[:count], labels[part], softmax_rows)
                continue
            with torch.enable_grad():
                x = hidden[part].detach().requires_grad_()
                logits = head(x)  # (chunk, V)
            # The logits become their own gradient: the backward pass of a linear head needs none.
            grad_logits = logits.detach()
            grad_logits[count:] = 0
            losses[part] = cross_entropy(grad_logits[:count], labels[part], softmax_rows)
            chunk_grads = torch.autograd.grad(logits, (x, *weights), grad_logits)
            for total, grad in zip((grads[0][part], *grads[1:]), chunk_grads):
                total += grad
        ctx.save_for_backward(*grads)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        scale = grad_losses[0] if len(grad_losses) else grad_losses.new_zeros(())
        grad_hidden, *grad_weights = (grad.mul_(scale) for grad in ctx.saved_tensors)
        return None, grad_hidden, None, None, *grad_weights


def token_nll(logits: Tensor, labels: Tensor, rows: int) -> Tensor:
    """logits (n, V), labels (n,) → losses (n,) float32, computed for `rows` tokens at a time."""
    parts = zip(logits.split(rows), labels[:, None].split(rows))
    log_probs = [F.log_softmax(z, 1, dtype=torch.float32).gather(1, label) for z, label in parts]
    return -torch.cat(log_probs)[:, 0]


def cross_entropy(logits: Tensor, labels: Tensor, rows: int) -> Tensor:
    """logits (n, V), labels (n,) → losses (n,) float32, computed for `rows` tokens at a time.

    Overwrites the logits with the gradient of the summed losses.
    """
    losses = torch.empty(len(logits), device=logits.device)
    columns = labels[:, None], losses[:, None]
    for z, target, loss in zip(*(x.split(rows) for x in (logits, *columns))):
        probabilities = torch.softmax(z, 1, dtype=torch.float32)
        # logsumexp = largest logit - log(its probability), which is never small.
        largest = z.amax(1, keepdim=True).float()
        log_probability = probabilities.amax(1, keepdim=True).log()
        loss.copy_(largest - z.gather(1, target) - log_probability)
        z.copy_(probabilities.scatter_add_(1, target, torch.full_like(largest, -1.0)))
    return losses


# --- the model


class Backbone(nn.Module):
    """HF's `model.`: embeddings, blocks and the last norm."""

    def __init__(self, config: ModelConfig, activation_checkpointing: str):
        super().__init__()
        # Not nn.Embedding's own initial values: drawing them on the meta device imports torch's
        # compiler, which takes more than a second.
        values = torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1)
        self.embed_tokens = nn.Embedding.from_pretrained(values, freeze=False)
        blocks = (Block(config, activation_checkpointing) for _ in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The decoder with its head. `dtype`: what it computes in (None: what its weights are in)."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype | None = None,
        activation_checkpointing: str = "none",
    ):
        super().__init__()
        self.config, self.dtype, self.compiled = config, dtype, False
        self.activation_checkpointing = activation_checkpointing
        self.model = Backbone(config, activation_checkpointing)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def recompute_cheap_parts(self, recompute: bool = True) -> None:
        """Keep neither norms nor SwiGLU's output for the backward pass: a seventh less memory.

        For a CPU. Not for blocks that are compiled or checkpointed: those choose what they keep.
        """
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.recompute = recompute

    def compile_blocks(self) -> None:
        """Compile for batches of one shape, with any number of documents.

        Another shape is compiled again.
        """
        self.compiled = True
        self.recompute_cheap_parts(False)
        torch._dynamo.config.recompile_limit = 32  # beyond it blocks would run uncompiled
        for block in self.model.layers:
            block.run = torch.compile(block.run, dynamic=False)  # type: ignore[arg-type, assignment]

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: str = "sum",
        cu_seqlens: list | Tensor | None = None,
        target_positions: Tensor | None = None,
        logit_positions: Tensor | None = None,
    ):
        """tokens, positions, labels (B, T) int64 → logits (B, T, V), or with labels (loss, count).

        The loss is summed in float32 over the labelled tokens (`reduction="none"`: one by one).
        Labels are already shifted: labels[t] is the target after tokens[t]. IGNORE_INDEX costs no
        logits. A GPU waits unless it is given `target_positions` (count,), the labelled tokens
        among the N, and `cu_seqlens` (see Documents). With a cache, tokens continue what it holds.
        `logit_positions` (n,): return the logits (n, V) of these tokens alone.
        """
        if positions is None:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            positions = (places + (cache.length if cache else 0)).expand_as(tokens)
        selected = logit_positions
        if labels is not None:
            if target_positions is None:
                target_positions = (labels != IGNORE_INDEX).flatten().nonzero()[:, 0]
            selected = target_positions
            if tokens.device.type == "cpu":  # the loss drops what lies behind the labels
                selected = F.pad(selected, (0, -len(selected) % CPU_MULTIPLE))

        rotation = rope(positions, self.config)
        x = self.model.embed_tokens(tokens)  # (B, T, E)
        x = x.to(self.dtype or x.dtype)
        layout = self.layout(positions, x.dtype, cache, cu_seqlens)
        edges = getattr(layout, "cu_seqlens", None)
        if self.compiled and type(edges) is Tensor:  # no list, and no fake tensor
            torch._dynamo.mark_dynamic(edges, 0)  # one graph for any number of documents

        # Behind the last attention only the selected tokens matter. Compiled blocks are all alike,
        # so there they are selected behind the last block.
        last = None if self.compiled else self.model.layers[-1]
        for index, block in enumerate(self.model.layers):
            late = selected if block is last else None
            x = block(x, rotation, layout, late, cache, index if cache else 0)
        if cache:
            cache.length += tokens.shape[1]
        x = self.model.norm(select_tokens(x, selected) if self.compiled else x)
        if labels is None:
            return self.lm_head(x)  # (B, T, V) or (n, V)

        targets = labels.flatten()[target_positions]
        losses = self.head_loss(x, targets, layout)
        return losses.sum() if reduction == "sum" else losses, len(targets)

    def layout(
        self,
        positions: Tensor,
        dtype: torch.dtype,
        cache: KVCache | None,
        cu_seqlens: list | Tensor | None,
    ) -> Documents | Tensor:
        """Return who attends to whom: the cache's own mask where it has one."""
        cached = num_keys = None
        if cache:
            if cache.mask is not None:
                return cache.mask
            cached, num_keys = cache.length, cache.num_keys(positions.shape[1])
        window, head_dim = self.config.sliding_window, self.config.head_dim
        return attention_layout(positions, window, cached, dtype, cu_seqlens, head_dim, num_keys)

    def head_loss(self, x, targets, layout):
        train = torch.is_grad_enabled()
        weights = [p for p in self.lm_head.parameters() if train and p.requires_grad]
        # Fake tensors that stand for a GPU's are on the CPU too; then cu_seqlens is a tensor.
        like_gpu = isinstance(getattr(layout, "cu_seqlens", None), Tensor)
        on_cpu = x.device.type == "cpu" and not like_gpu
        tokens = GPU_HEAD_NUMEL // self.config.vocab_size // 64 * 64
        tokens = min(1024, max(256, tokens))
        chunk_sizes = CPU_HEAD_CHUNK if on_cpu else (tokens, tokens)
        return LinearCrossEntropy.apply(self.lm_head, x, targets, chunk_sizes, *weights)
