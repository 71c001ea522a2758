"""A Mistral-style decoder in plain PyTorch: RMSNorm, rotary positions, grouped-query attention with an optional sliding window, SwiGLU.

Mistral, Llama and Qwen differ in facts of their config alone: biases, norms of queries and keys, how positions turn.

Module and config names are Hugging Face's, so that a state dict *is* a checkpoint. Sources: Llama 2 (arXiv 2307.09288),
Mistral 7B (2310.06825), RoFormer (2104.09864), YaRN (2309.00071), GQA (2305.13245), GLU variants (2002.05202).

Letters: B batch, T tokens, S tokens seen (cache included), H query heads, G key/value heads, D head_dim, E hidden_size, V vocabulary.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

IGNORE_INDEX = -100  # the label of a position that is no target, as in F.cross_entropy
GROUPS_WITH_A_MASK = (
    "cpu",
)  # devices whose attention takes both; CUDA's memory-efficient kernel takes a mask but no groups
HEAD_CHUNK = {
    "cpu": (256, 16),
    "gpu": (1024, 1024),
}  # labelled tokens whose logits exist at one time; of these, in float32: 16 fit a cache
AC_MODES = ("none", "selective", "full")
CACHE_NUMBERS = (
    1 << 17
)  # numbers at a time whose intermediates, in fp32, stay in a CPU core's cache
CPU_MULTIPLE = 64  # a CPU's products are of multiples of so many tokens: oneDNN makes code for every new shape, and keeps it
QUERY_BLOCK = 128  # queries at a time on a CPU: short enough to skip most of what causality hides


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """HF's `config.json` keys. `head_dim` is a number of its own (Nemo: 128 with hidden 5120 and 32 heads)."""

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
        assert self.num_attention_heads % self.num_key_value_heads == 0, (
            self.num_attention_heads,
            self.num_key_value_heads,
        )
        assert self.head_dim % 2 == 0, self.head_dim

    @property
    def linears(self):
        """A block's linear layers: {name: (in, out, whether it adds a bias)}."""
        E, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        some = self.attention_bias or self.model_type == "qwen2"
        attention = {
            "q_proj": (E, q, some),
            "k_proj": (E, kv, some),
            "v_proj": (E, kv, some),
            "o_proj": (q, E, self.attention_bias),
        }
        return (
            attention
            | {name: (E, inner, self.mlp_bias) for name in ("gate_proj", "up_proj")}
            | {"down_proj": (inner, E, self.mlp_bias)}
        )

    @property
    def qk_norm(self):
        return self.model_type == "qwen3"

    @property
    def num_parameters(self):
        """All weights, tied ones once: 7,241,732,096 for Mistral 7B v0.1."""
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        block = sum((wide + bias) * out for wide, out, bias in self.linears.values()) + norms
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * block + embeddings + self.hidden_size


def cast(x, dtype):
    """x.to(dtype), for what an autograd.Function returns: where that does nothing, torch 2.11's compiler loses the gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def cache_chunks(x, *others):
    """Rows of tensors of equal length together, on a CPU as many as its cache holds: each piece goes through all steps of a formula."""
    real = type(x) is torch.Tensor  # a plan's fake tensors stand for any device's
    if x.device.type != "cpu" or not real or torch.compiler.is_compiling():
        return [(x, *others)]
    rows = max(1, CACHE_NUMBERS // max(1, x[:1].numel()))
    return zip(*(tensor.split(rows) for tensor in (x, *others)))


class RMSNormFunction(torch.autograd.Function):
    """x / rms(x) * weight, computed in fp32 because squares overflow in bf16; keeps x and one number a token for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.flatten(0, -2)  # (N, E)
        out, inverse, scale = (
            torch.empty_like(rows),
            rows.new_empty(len(rows), 1, dtype=torch.float32),
            weight.float(),
        )
        for to, part, factor in cache_chunks(out, rows, inverse):
            norm = torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=torch.float32)
            factor.copy_(torch.rsqrt(norm * norm / x.shape[-1] + eps))
            to.copy_((part.float() * factor).mul_(scale))
        ctx.save_for_backward(rows, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, inverse = ctx.saved_tensors
        out, scale = torch.empty_like(rows), weight.float()
        grad_weight = torch.zeros_like(scale) if ctx.needs_input_grad[1] else None
        for to, part, above, factor in cache_chunks(out, rows, grad.reshape(rows.shape), inverse):
            part, above = part.float(), above.float()
            if grad_weight is not None:
                grad_weight += (above * part).mul_(factor).sum(0)
            scaled = above * scale
            along = (scaled * part).sum(-1, keepdim=True) * (factor**3 / -rows.shape[-1])
            to.copy_(scaled.mul_(factor).addcmul_(part, along))
        return (
            out.view(grad.shape),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
        )


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        return RMSNormFunction.apply(x, self.weight, self.eps)


class Linear(nn.Linear):
    """Computes in the dtype of its input, so fp32 masters serve bf16; autograd keeps the cast weight unless blocks recompute.

    `unpack(*stored(), dtype)` is its weight (out, in), in whatever way a subclass keeps it, `product(x, *stored())` what it makes of one
    token x (in,), fp32. Compiled on a CPU that reads weights at twice the speed of a matmul with one row.
    """

    def stored(self):
        return (self.weight,)

    @staticmethod
    def unpack(weight, dtype):
        return weight.to(dtype)

    @staticmethod
    def product(x, weight):
        return (weight.float() * x).sum(-1)

    def forward(self, x):
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        if x.shape[:-1].numel() == 1 and torch.compiler.is_compiling():
            y = (
                self.product(x.flatten().float(), *self.stored())
                .to(x.dtype)
                .view(*x.shape[:-1], -1)
            )
            return y if bias is None else y + bias
        return F.linear(x, self.unpack(*self.stored(), dtype=x.dtype), bias)


def rope(positions, config):
    """cos and signed sin for HF's half-split rotation, each (B, T, 1, D); fp32, because bf16 cannot tell position 257 from 258.

    Four of them where queries are scaled by their position (Ministral 3, as Llama 4): the queries' pair first.
    """
    frequency, scale = rope_inv_freq(config, positions.device)
    position = positions[:, :, None, None].float()
    angle = position * frequency  # (B, T, 1, D / 2)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    beta = (config.rope_scaling or {}).get("llama_4_scaling_beta")
    if not beta:
        return cos, sin
    grown = 1 + beta * torch.log1p(
        torch.floor(position / config.rope_scaling["original_max_position_embeddings"])
    )
    return cos * grown, sin * grown, cos, sin


def rope_inv_freq(config, device):
    """Radians a position (D / 2,), and a factor on cos and sin, by HF's `rope_scaling`: default, linear, llama3 or yarn."""
    D, theta, said = config.head_dim, config.rope_theta, config.rope_scaling or {}
    step = torch.arange(0, D, 2, device=device, dtype=torch.float32)
    frequency, scale = theta ** (-step / D), 1.0
    kind, factor, known = (
        said.get(key) for key in ("rope_type", "factor", "original_max_position_embeddings")
    )
    if kind in (None, "default"):
        return frequency, scale
    if kind == "linear":
        kept = 0.0
    elif kind == "llama3":
        low, high = said["low_freq_factor"], said["high_freq_factor"]
        kept = ((known * frequency / (2 * math.pi) - low) / (high - low)).clamp(
            0, 1
        )  # by turns within the original context
    else:
        turns = said.get("beta_fast") or 32, said.get("beta_slow") or 1
        low, high = (D * math.log(known / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns)
        if said.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        kept = 1 - ((step / 2 - low) / (high - low or 0.001)).clamp(0, 1)
        over, under = said.get("mscale"), said.get("mscale_all_dim")
        over, under = (over, under) if over and under else (1, 0)
        scale = said.get("attention_factor")
        if scale is None:
            scale = (1 + 0.1 * over * math.log(max(factor, 1))) / (
                1 + 0.1 * under * math.log(max(factor, 1))
            )
    return frequency * (kept + (1 - kept) / factor), scale  # the rest is slower by `factor`


class ApplyRotary(torch.autograd.Function):
    """x (B, T, H, D) turned by `rope`'s angles; the gradient is turned back, so nothing is kept of x."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return ApplyRotary.turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return ApplyRotary.turn(grad, cos, -sin), None, None

    @staticmethod
    def turn(x, cos, sin):
        x, out = x.flatten(0, 1), torch.empty_like(x, memory_format=torch.contiguous_format)
        cos, sin = (angle.expand(*out.shape[:2], 1, -1).flatten(0, 1) for angle in (cos, sin))
        for to, part, turned, across in cache_chunks(out.flatten(0, 1), x, cos, sin):
            wide = part.float()
            to.copy_((wide * turned).addcmul_(wide.roll(x.shape[-1] // 2, -1), across))
        return out


class KVCache:
    """Keys and values of the first `length` tokens, in buffers allocated once: (B, G, size, D) a layer.

    `model(ids[:, :7], cache=cache)` leaves length 7; `cache.length = 5` forgets the last two; the next call writes from 5 on.
    `mask` (B or 1, 1, T, S): which keys the next tokens see, in place of all before them,
    or what is added to their scores.
    """

    def __init__(self, config, size, batch=1, dtype=torch.float32, device="cpu"):
        shape = (batch, config.num_key_value_heads, size, config.head_dim)
        self.layers = [
            torch.zeros(2, *shape, dtype=dtype, device=device)
            for _ in range(config.num_hidden_layers)
        ]
        self.size, self.length = size, 0
        self.mask: torch.Tensor | None = None

    def extend(self, layer, k, v):
        """Write k, v (B, T, G, D) after what is known and return all of it, (B, S, G, D) each."""
        end = self.length + k.shape[1]
        assert end <= self.size, f"the cache holds {self.size} tokens, {end} were asked for"
        self.layers[layer][:, :, :, self.length : end] = torch.stack([k, v]).transpose(2, 3)
        return self.layers[layer][0, :, :, :end].transpose(1, 2), self.layers[layer][
            1, :, :, :end
        ].transpose(1, 2)


class QueryBlock(NamedTuple):
    """What a block of queries sees on a CPU: keys from `first_key` to the block's end, and what is added to scores to hide the rest.

    `biases`: [(columns of the scores, (block, 1, columns))], 0 where a query sees a key and -inf where not.
    """

    first_key: int
    biases: list


class Documents(NamedTuple):
    """Where the documents of a batch lie among its B * T tokens: `cu_seqlens` are their borders, a list on a CPU, an int32 tensor on CUDA.

    Two documents of 3 and 5 tokens: [0, 3, 8]. A tensor may repeat its last border, to be of one size for every batch. `max_seqlen`: no
    document is longer. `blocks` (CPU): a QueryBlock for each `size` queries.
    `kernel(q, k, v, documents)`: q (N, H, D), k, v (N, G, D) → (N, H, D).
    """

    kernel: Callable
    cu_seqlens: list | torch.Tensor
    max_seqlen: int
    window: int | None
    blocks: list | None = None
    size: int = QUERY_BLOCK


def attention_layout(positions, window, cached, dtype, cu_seqlens=None):
    """Who may attend to whom, worked out once for all layers; the one place that decides by which kernel.

    A document starts wherever `positions` (B, T) is 0, and with each row; `cu_seqlens` says so without a look at the GPU. A window of W lets a
    token see itself and the W - 1 before it, as in HF. → Documents; for a cache of `cached` tokens (None: no cache), and for devices and
    dtypes without a kernel for documents, a mask (B or 1, 1, T, S), True where query t sees key s.
    """
    B, T = positions.shape
    if (
        positions.device.type == "cpu"
        and not cached
        or cached is None
        and has_varlen(positions.device, dtype)
    ):
        if cu_seqlens is None:
            starts = positions == 0
            starts[:, 0] = True
            cu_seqlens = F.pad(starts.flatten().nonzero().flatten().int(), (0, 1), value=B * T)
            cu_seqlens = cu_seqlens.tolist() if positions.device.type == "cpu" else cu_seqlens
        if not isinstance(cu_seqlens, list):
            return Documents(varlen(), cu_seqlens, T, window)
        size = min(QUERY_BLOCK, 16 * math.ceil(B * T / 16))
        return Documents(
            document_attention,
            cu_seqlens,
            T,
            window,
            query_blocks(cu_seqlens, size, window, dtype),
            size,
        )
    before = cached or 0
    query = torch.arange(before, before + T, device=positions.device)[:, None]
    key = torch.arange(before + T, device=positions.device)
    mask = (key <= query)[None, None]
    if window is not None:
        mask = mask & (query - key < window)
    if before == 0:
        document = (positions == 0).cumsum(-1)
        mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    return mask  # (B or 1, 1, T, S)


def attend(q, k, v, where):
    """Scaled dot-product attention of q (B, T, H, D) over k, v (B, S, G, D), as `layout` said."""
    if isinstance(where, Documents):
        return where.kernel(*(x.flatten(0, 1) for x in (q, k, v)), where).view(q.shape)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T or S, D)
    grouped = q.device.type in GROUPS_WITH_A_MASK
    if not grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=where, enable_gqa=grouped).transpose(
        1, 2
    )


def has_varlen(device, dtype):
    """Whether `varlen` computes there: on NVIDIA cards from Ampere on, in 16 bits."""
    return (
        device.type == "cuda"
        and dtype != torch.float32
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


@functools.cache
def varlen():
    """torch's kernel for documents on CUDA. Up to 2.11 it has no word for groups: keys and values are repeated."""
    from torch.nn.attention.varlen import varlen_attn

    groups = (
        {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    )

    def kernel(q, k, v, where):
        size = (-1 if where.window is None else where.window - 1, 0)
        if not groups:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return varlen_attn(
            q,
            k,
            v,
            where.cu_seqlens,
            where.cu_seqlens,
            where.max_seqlen,
            where.max_seqlen,
            window_size=size,
            **groups,
        )

    return kernel


def query_blocks(
    cu_seqlens: list, size: int, window: int | None, dtype: torch.dtype
) -> list[QueryBlock]:
    """Cut the tokens into blocks of `size` queries, whatever documents they are of.

    Keys begin at a multiple of `size` too: products have few shapes, each of which costs oneDNN time and memory when it is new.
    """
    count = math.ceil(cu_seqlens[-1] / size)
    token = np.arange(count * size)
    starts = (
        token.copy()
    )  # where each token's document begins; what fills the last block is a document a token
    for begin, end in zip(cu_seqlens, cu_seqlens[1:]):
        starts[begin:end] = begin
    if window:
        starts = np.maximum(starts, token - window + 1)
    blocks = []
    for first in range(0, count * size, size):
        queries = slice(first, first + size)
        begins, first_key = starts[queries, None], int(starts[first]) // size * size
        keys = token[first_key : first + size]
        hidden = (keys > token[queries, None]) | (keys < begins)
        columns = [slice(0, len(keys))]
        if (
            len(keys) > 2 * size and (begins < first_key + size).all()
        ):  # nothing is hidden in the middle
            columns = [slice(0, size), slice(len(keys) - size, len(keys))]
        biases = [
            (part, torch.from_numpy(hidden[:, None, part]))
            for part in columns
            if hidden[:, part].any()
        ]
        biases = [
            (part, torch.zeros(mask.shape, dtype=dtype).masked_fill_(mask, -math.inf))
            for part, mask in biases
        ]
        blocks.append(QueryBlock(first_key, biases))
    return blocks


def document_attention(q, k, v, where):
    return DocumentAttention.apply(q, k, v, where.blocks, where.size)


class DocumentAttention(torch.autograd.Function):
    """Attention within each document, a block of queries at a time over the keys that they see: some half the time of SDPA on a CPU.

    q (N, H, D), k, v (N, G, D) → (N, H, D). Products are written where they are wanted (`out=`) and read keys that lie transposed: with
    fresh memory and transposition at each, they take three times as long. Probabilities are kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, q, k, v, blocks, size):
        (N, H, D), G = q.shape, k.shape[1]
        queries = to_blocks(q, G, size, D**-0.5)  # (blocks, G, size * H / G, D)
        keys, values = (group_heads(x, len(blocks) * size) for x in (k, v))  # (G, S, D)
        keys_transposed = keys.mT.contiguous()
        out, train, saved = torch.empty_like(queries), any(ctx.needs_input_grad), []
        for index, block in enumerate(blocks):
            seen = slice(block.first_key, (index + 1) * size)
            scores = q.new_empty(G, queries.shape[2], seen.stop - seen.start)
            torch.bmm(queries[index], keys_transposed[:, :, seen], out=scores)
            by_query = scores.unflatten(1, (size, H // G))
            for columns, bias in block.biases:
                by_query[..., columns] += bias
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, values[:, seen], out=out[index])
            saved += [scores] if train else []
        ctx.save_for_backward(queries, keys, values, *saved)
        ctx.blocks, ctx.size, ctx.tokens = blocks, size, N
        return from_blocks(out, N, size)

    @staticmethod
    def backward(ctx, grad):
        queries, keys, values, *saved = ctx.saved_tensors
        G, size, D = len(keys), ctx.size, keys.shape[-1]
        grads = to_blocks(grad, G, size)
        values_transposed = values.mT.contiguous()
        grad_q = torch.empty_like(queries)
        grad_k, grad_v = (torch.zeros(keys.shape) for _ in range(2))  # sums over blocks, in fp32
        for index, (block, shares) in enumerate(zip(ctx.blocks, saved)):
            seen = slice(block.first_key, (index + 1) * size)
            scores = torch.empty_like(shares)
            torch.bmm(grads[index], values_transposed[:, :, seen], out=scores)
            torch._softmax_backward_data(scores, shares, -1, scores.dtype, grad_input=scores)
            torch.bmm(scores, keys[:, seen], out=grad_q[index])
            grad_k[:, seen] += scores.mT @ queries[index]
            grad_v[:, seen] += shares.mT @ grads[index]
        grad_k, grad_v = (
            x[:, : ctx.tokens].transpose(0, 1).to(grad.dtype) for x in (grad_k, grad_v)
        )
        return from_blocks(grad_q, ctx.tokens, size, D**-0.5), grad_k, grad_v, None, None


def group_heads(x, length):
    """(N, G, D) → (G, length, D), filled up with zeros."""
    out = x.new_empty(x.shape[1], length, x.shape[2])
    out[:, : len(x)] = x.transpose(0, 1)
    out[:, len(x) :] = 0
    return out


def to_blocks(x, groups, size, scale=1.0):
    """(N, H, D) → (blocks, G, size * H / G, D): in a block token after token, the heads that share a key; scaled, filled with zeros."""
    N, H, D = x.shape
    out = x.new_empty(math.ceil(N / size), groups, size, H // groups, D)
    whole = N // size
    parts = x[: whole * size].view(whole, size, groups, H // groups, D)
    torch.mul(parts.transpose(1, 2), scale, out=out[:whole])
    if whole < len(out):
        out[whole, :, : N - whole * size] = (
            x[whole * size :].unflatten(1, (groups, -1)).transpose(0, 1) * scale
        )
        out[whole, :, N - whole * size :] = 0
    return out.flatten(2, 3)


def from_blocks(x, length, size, scale=1.0):
    """The way back: (blocks, G, size * H / G, D) → (length, H, D)."""
    parts = x.unflatten(2, (size, -1)).transpose(1, 2)  # (blocks, size, G, H / G, D)
    parts = parts * scale if scale != 1 else parts
    return parts.reshape(-1, parts.shape[2] * parts.shape[3], x.shape[-1])[:length]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            Linear(*config.linears[name]) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = (
                RMSNorm(self.head_dim, config.rms_norm_eps) for _ in range(2)
            )

    def forward(self, x, rotation):
        """x (B, T, E) → what is asked, q (B, T, H, D), and what is known, k and v (B, T, G, D)."""
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return ApplyRotary.apply(q, *rotation[:2]), ApplyRotary.apply(k, *rotation[-2:]), v


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping these two alone for the backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        for to, one, other in cache_chunks(*(x.flatten(0, -2) for x in (out, gate, up))):
            torch.mul(F.silu(one), other, out=to)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        for to_gate, to_up, above, one, other in cache_chunks(
            *(x.flatten(0, -2) for x in (grad_gate, grad_up, grad, gate, up))
        ):
            torch.mul(F.silu(one), above, out=to_up)
            torch.ops.aten.silu_backward.grad_input(above * other, one, grad_input=to_gate)
        return grad_gate, grad_up


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            Linear(*config.linears[name]) for name in ("gate_proj", "up_proj", "down_proj")
        )

    def forward(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def selective_ac_policy(context, op, *args, **kwargs):
    return (
        CheckpointPolicy.MUST_SAVE
        if op in SAVED_OPS or "varlen_attn" in str(op)
        else CheckpointPolicy.PREFER_RECOMPUTE
    )


SELECTIVE = functools.partial(create_selective_checkpoint_contexts, selective_ac_policy)
SAVED_OPS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
}  # matmuls, whoever brings one of its own adds it


class Block(nn.Module):
    """`recompute`: what the backward pass makes anew: nothing, all but the outputs of matmuls and attention, or everything."""

    def __init__(self, config, recompute="none"):
        super().__init__()
        self.recompute = recompute
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x, rotation, where, target_positions=None, cache=None, layer=0):
        """x (B, T, E) → (B, T, E); with `target_positions`, positions among the B * T, theirs alone (N, E)."""
        run = (
            self.run if cache is None else self.compute
        )  # decoding has a new shape at every token: nothing to compile
        return run(x, rotation, where, target_positions, cache, layer)

    def run(
        self, *given
    ):  # apart from forward, so that it can be compiled while FSDP2's hooks stay outside
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self.compute(*given)
        options = {"context_fn": SELECTIVE} if self.recompute == "selective" else {}
        return checkpoint(self.compute, *given, use_reentrant=False, **options)

    def compute(self, x, rotation, where, target_positions, cache, layer):
        q, k, v = self.before(x, rotation)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, S, G, D)
        return self.after(
            choose_ac(x, target_positions),
            choose_ac(attend(q, k, v, where).flatten(2), target_positions),
        )

    def before(self, x, rotation):
        """x (B, T, E) → q, k, v, as Attention's."""
        return self.self_attn(self.input_layernorm(x), rotation)

    def after(self, x, attended):
        """x and what attention found (B, T, H * D) → (B, T, E)."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


def choose_ac(x, target_positions):
    return x if target_positions is None else x.flatten(0, 1).index_select(0, target_positions)


class Decoder(nn.Module):
    """HF's `model.`: embeddings, blocks and the last norm."""

    def __init__(self, config, recompute):
        super().__init__()
        # not nn.Embedding's own first values: drawing them on the meta device imports torch's compiler, more than a second
        values = torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1)
        self.embed_tokens = nn.Embedding.from_pretrained(values, freeze=False)
        self.layers = nn.ModuleList(
            Block(config, recompute) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """`dtype`: what it computes in (None: what its weights are in). `recompute`: what the backward pass makes anew (RECOMPUTE)."""

    def __init__(self, config, dtype=None, recompute="none"):
        super().__init__()
        self.config, self.dtype, self.recompute, self.compiled = config, dtype, recompute, False
        self.model = Decoder(config, recompute)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def compile_blocks(self):
        """For batches of one shape; another shape compiles anew."""
        self.compiled = True
        for block in self.model.layers:
            block.run = torch.compile(block.run, dynamic=False)

    def forward(
        self,
        tokens,
        positions=None,
        labels=None,
        cache=None,
        reduction="sum",
        cu_seqlens=None,
        target_positions=None,
    ):
        """tokens, positions, labels (B, T) int64 → logits (B, T, V); with labels → (loss sum in float32, count).

        Labels are already shifted (labels[t] is the target after tokens[t]); IGNORED ones cost no logits. `reduction="none"` gives the
        losses of the labelled tokens one by one, in order, in place of their sum. With a cache, tokens continue it. `cu_seqlens` (as in
        Documents) and `target_positions`, the labelled positions (N,) among the B * T, are worked out where they aren't given; a GPU waits for that.
        """
        cached = cache.length if cache is not None else None
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens) + (
                cached or 0
            )
        if labels is not None and target_positions is None:
            target_positions = (labels != IGNORE_INDEX).flatten().nonzero().flatten()
        rotation = rope(positions, self.config)
        x = self.model.embed_tokens(tokens)  # (B, T, E)
        x = x.to(self.dtype or x.dtype)
        where = cache.mask if cache is not None else None
        if where is None:
            where = attention_layout(
                positions, self.config.sliding_window, cached, x.dtype, cu_seqlens
            )
        last, targets = self.model.layers[-1], target_positions
        if labels is not None and target_positions.device.type == "cpu":
            targets = F.pad(
                target_positions, (0, -len(target_positions) % CPU_MULTIPLE)
            )  # HeadLoss leaves off what is behind the labels
        for index, block in enumerate(self.model.layers):
            late = (
                targets if block is last and not self.compiled else None
            )  # behind the last attention only labelled tokens matter
            x = block(x, rotation, where, late, cache, 0 if cache is None else index)
        if cache is not None:
            cache.length += tokens.shape[1]
        if self.compiled:
            x = choose_ac(x, targets)
        x = self.model.norm(x)
        if labels is None:
            return self.lm_head(x)  # (B, T, V)
        weights = [
            p for p in self.lm_head.parameters() if p.requires_grad and torch.is_grad_enabled()
        ]
        on_cpu = isinstance(where, Documents) and where.kernel is document_attention
        on_cpu = on_cpu or cache is not None and x.device.type == "cpu"
        sizes = HEAD_CHUNK["cpu" if on_cpu else "gpu"]
        losses = LinearCrossEntropy.apply(
            self.lm_head, x, labels.flatten()[target_positions], sizes, *weights
        )
        return (losses.sum() if reduction == "sum" else losses), len(target_positions)


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of `head(hidden)`, exact in float32, with the logits of so many tokens at a time; `sizes` as in HEAD_CHUNK.

    hidden (N or more, E), labels (N,) → losses (N,) float32. Each chunk's gradient is made beside its loss, so that the head's matmul runs
    once; they are the gradients of the sum, and backward scales them: whoever needs gradients must sum the losses.
    """

    @staticmethod
    def forward(ctx, head, hidden, labels, sizes, *weights):
        chunk, piece = sizes
        losses = torch.zeros(len(labels), device=hidden.device)
        train = any(ctx.needs_input_grad)
        grads = (
            [torch.zeros_like(hidden), *(torch.zeros_like(w, dtype=torch.float32) for w in weights)]
            if train
            else []
        )
        for begin in range(0, len(labels), chunk):
            part, count = slice(begin, begin + chunk), min(chunk, len(labels) - begin)
            with torch.set_grad_enabled(train):
                x = hidden[part].detach().requires_grad_(train)
                logits = head(x)  # (n, V)
            logits.detach()[count:] = 0
            losses[part] = cross_entropy(logits.detach()[:count], labels[part], piece)
            if train:  # the logits are their gradient now; no head's backward pass asks for them
                part_grads = torch.autograd.grad(logits, (x, *weights), logits.detach())
                grads[0][part] = part_grads[0]
                for total, grad in zip(grads[1:], part_grads[1:]):
                    total += grad
        ctx.save_for_backward(*grads)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        scale = grad_losses[0] if len(grad_losses) else grad_losses.new_zeros(())
        hidden, *weights = (grad.mul_(scale) for grad in ctx.saved_tensors)
        return None, hidden, None, None, *weights


def cross_entropy(logits, labels, piece):
    """logits (n, V), which become the gradient of their losses, in place; labels (n,) → losses (n,) float32, `piece` rows at a time."""
    losses = torch.empty(len(logits), device=logits.device)
    for known, target, loss in zip(
        logits.split(piece), labels[:, None].split(piece), losses[:, None].split(piece)
    ):
        probability = torch.softmax(known, 1, dtype=torch.float32)
        top = known.amax(
            1, keepdim=True
        ).float()  # log of the normaliser = top - log(its probability), which is never small
        loss.copy_(top - known.gather(1, target) - probability.amax(1, keepdim=True).log())
        known.copy_(probability.scatter_add_(1, target, torch.full_like(top, -1.0)))
    return losses
