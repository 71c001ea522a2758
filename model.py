"""A Mistral-style decoder in plain PyTorch: RMSNorm, rotary positions, grouped-query attention with an optional sliding window, SwiGLU.

Module and config names are Hugging Face's, so that a state dict *is* a checkpoint. Sources: Llama 2 (arXiv 2307.09288),
Mistral 7B (2310.06825), RoFormer (2104.09864), GQA (2305.13245), GLU variants (2002.05202).

Letters: B batch, T tokens, S tokens seen (cache included), H query heads, G key/value heads, D head_dim, E hidden_size, V vocabulary.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # the label of a position that is no target, as in F.cross_entropy
GROUPS_WITH_A_MASK = ("cpu",)  # devices whose attention takes both; CUDA's memory-efficient kernel takes a mask but no groups
HEAD_CHUNK = 1024  # labelled tokens whose logits exist at one time: 1024 x 32k floats are 131 MB


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

    def __post_init__(self):
        assert self.num_attention_heads % self.num_key_value_heads == 0, (self.num_attention_heads, self.num_key_value_heads)
        assert self.head_dim % 2 == 0, self.head_dim

    @property
    def num_parameters(self):
        """All weights, tied ones once: 7,241,732,096 for Mistral 7B v0.1."""
        heads = self.num_attention_heads + self.num_key_value_heads
        block = 2 * self.hidden_size * self.head_dim * heads + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * block + embeddings + self.hidden_size


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        wide = x.float()  # fp32: squares overflow in bf16
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


class Linear(nn.Linear):
    """Computes in the dtype of its input, so fp32 masters serve bf16; autograd keeps the cast weight unless blocks recompute."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rope(positions, head_dim, theta):
    """cos and sin for HF's half-split rotation, each (B, 1, T, D); fp32, because bf16 cannot tell position 257 from 258."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[:, None, :, None].float() * torch.cat([frequency, frequency])  # (B, 1, T, D)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    left, right = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-right, left], dim=-1) * sin).to(x.dtype)


class KVCache:
    """Keys and values of the first `length` tokens, in buffers allocated once: (B, G, size, D) a layer.

    `model(ids[:, :7], cache=cache)` leaves length 7; `cache.length = 5` forgets the last two; the next call writes from 5 on.
    """

    def __init__(self, config, size, batch=1, dtype=torch.float32, device="cpu"):
        shape = (batch, config.num_key_value_heads, size, config.head_dim)
        self.layers = [torch.zeros(2, *shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.size, self.length = size, 0

    def extend(self, layer, k, v):
        """Write k, v (B, G, T, D) after what is known and return all of it, (B, G, S, D) each."""
        end = self.length + k.shape[2]
        assert end <= self.size, f"the cache holds {self.size} tokens, {end} were asked for"
        self.layers[layer][:, :, :, self.length : end] = torch.stack([k, v])
        return self.layers[layer][0, :, :, :end], self.layers[layer][1, :, :, :end]


def layout(positions, window, cached):
    """Who may attend to whom, worked out once for all layers; None is plain causal attention.

    On CPU: a list of documents (row, begin, end), for one small attention each (a block-diagonal mask takes twice the time).
    Elsewhere, and with a cache of `cached` tokens: a boolean mask (B, 1, T, S), True where query t sees key s.
    A document starts wherever `positions` is 0. A window of W lets a token see itself and the W - 1 before it, as in HF.
    """
    B, T = positions.shape
    starts = positions == 0
    if cached == 0 and positions.device.type == "cpu" and (window is None or window >= T):
        documents = []
        for row in range(B):
            edges = [0, *(i for i in starts[row].nonzero().flatten().tolist() if i > 0), T]
            documents += [(row, begin, end) for begin, end in zip(edges, edges[1:])]
        return None if len(documents) == B else documents
    query = torch.arange(cached, cached + T, device=positions.device)[:, None]
    key = torch.arange(cached + T, device=positions.device)
    mask = (key <= query)[None, None]
    if window is not None:
        mask = mask & (query - key < window)
    if cached == 0:
        document = starts.cumsum(-1)
        mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    return mask  # (B or 1, 1, T, S)


def attend(q, k, v, where):
    """Scaled dot-product attention of q (B, H, T, D) over k, v (B, G, S, D), as `layout` said; the one place that decides how."""
    if where is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if isinstance(where, list):
        outs = [
            F.scaled_dot_product_attention(*(x[row : row + 1, :, begin:end] for x in (q, k, v)), is_causal=True, enable_gqa=True)
            for row, begin, end in where
        ]  # documents, in order, each (1, H, length, D)
        return torch.cat(outs, dim=2).unflatten(2, (len(q), -1)).squeeze(0).transpose(0, 1)  # (B, H, T, D)
    if q.device.type in GROUPS_WITH_A_MASK:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=where, enable_gqa=True)
    groups = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), attn_mask=where)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        self.head_dim = D
        self.q_proj = Linear(E, config.num_attention_heads * D, bias=False)
        self.k_proj = Linear(E, config.num_key_value_heads * D, bias=False)
        self.v_proj = Linear(E, config.num_key_value_heads * D, bias=False)
        self.o_proj = Linear(config.num_attention_heads * D, E, bias=False)

    def forward(self, x, rotation, where, cache, layer):
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, *rotation), rotate(k, *rotation)  # (B, H, T, D), (B, G, T, D)
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, G, S, D)
        return self.o_proj(attend(q, k, v, where).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)

    def forward(self, x, rotation, where, cache=None, layer=0):
        x = x + self.self_attn(self.input_layernorm(x), rotation, where, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Stack(nn.Module):
    """HF's `model.`: embeddings, blocks and the last norm."""

    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """`dtype`: what it computes in (None: what its weights are in). `recompute`: keep only each block's input for the backward pass."""

    def __init__(self, config, dtype=None, recompute=False):
        super().__init__()
        self.config, self.dtype, self.recompute = config, dtype, recompute
        self.model = Stack(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, positions=None, labels=None, cache=None, reduction="sum"):
        """tokens, positions, labels (B, T) int64 → logits (B, T, V); with labels → (loss sum in float32, count).

        Labels are already shifted (labels[t] is the target after tokens[t]); IGNORED ones cost no logits. `reduction="none"` gives the
        losses of the labelled tokens one by one, in order, in place of their sum. With a cache, tokens continue it.
        """
        cached = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(cached, cached + tokens.shape[1], device=tokens.device).expand_as(tokens)
        rotation = rope(positions, self.config.head_dim, self.config.rope_theta)
        where = layout(positions, self.config.sliding_window, cached)
        x = self.model.embed_tokens(tokens)  # (B, T, E)
        x = x.to(self.dtype or x.dtype)
        for index, block in enumerate(self.model.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, where, use_reentrant=False)
            else:
                x = block(x, rotation, where, cache, index)
        if cache is not None:
            cache.length += tokens.shape[1]
        x = self.model.norm(x)
        if labels is None:
            return self.lm_head(x)  # (B, T, V)
        kept = labels != IGNORED
        weights = [p for p in self.lm_head.parameters() if p.requires_grad and torch.is_grad_enabled()]
        losses = HeadLoss.apply(self.lm_head, x[kept], labels[kept], *weights)
        return (losses.sum() if reduction == "sum" else losses), kept.sum()


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of `head(hidden)`, exact in float32, with the logits of HEAD_CHUNK tokens at a time.

    hidden (N, E), labels (N,) → losses (N,) float32. Each chunk's gradient is made beside its loss, so that the head's matmul runs
    once; they are the gradients of the sum, and backward scales them: whoever needs gradients must sum the losses.
    """

    @staticmethod
    def forward(ctx, head, hidden, labels, *weights):
        losses = torch.zeros(len(hidden), device=hidden.device)
        train = any(ctx.needs_input_grad)
        grads = [torch.zeros_like(x) for x in (hidden, *weights)] if train else []
        for begin in range(0, len(hidden), HEAD_CHUNK):
            part = slice(begin, begin + HEAD_CHUNK)
            with torch.set_grad_enabled(train):
                x = hidden[part].detach().requires_grad_(train)
                logits = head(x)  # (n, V)
            probability = logits.detach().float()
            target = labels[part, None]
            chosen = probability.gather(1, target)  # (n, 1), copied before the logits are overwritten
            normaliser = probability.logsumexp(1, keepdim=True)
            losses[part] = (normaliser - chosen).squeeze(1)
            if train:
                probability.sub_(normaliser).exp_()
                probability.scatter_add_(1, target, torch.full_like(chosen, -1.0))  # d loss / d logits
                part_grads = torch.autograd.grad(logits, (x, *weights), probability.to(logits.dtype))
                grads[0][part] = part_grads[0]
                for total, grad in zip(grads[1:], part_grads[1:]):
                    total += grad
        ctx.save_for_backward(*grads)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        scale = grad_losses[0] if len(grad_losses) else grad_losses.new_zeros(())
        return None, *(scale * g for g in ctx.saved_tensors[:1]), None, *(scale * g for g in ctx.saved_tensors[1:])
