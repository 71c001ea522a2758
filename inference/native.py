"""Decode on a CPU in C++: build decode_step.cpp at first use, and call it.

A small model's step is bound by Python and by the start of some hundred small products; there it is
one call. The library is kept in ~/.cache/doppelganger. Where no compiler is found, or the model is
of a kind that the C++ doesn't know, torch decodes.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import fused
from model import Block, KVCache, Linear, Transformer, rope
from weights.quantize import Int4Linear, Int8Linear, PackedLinear

SOURCE = Path(__file__).with_name("decode_step.cpp")
KINDS = {torch.float32: 0, torch.bfloat16: 1, Int8Linear: 2, Int4Linear: 3}  # Kind
LANES = 16  # numbers that are read at a time, at most
MAX_HEAD_DIM = 256


def is_supported(model: Transformer) -> bool:
    """Return whether the C++ computes this model: plain weights, no live adapter, on a CPU."""
    config = model.config
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    return (
        type(model.model.embed_tokens) is nn.Embedding
        and all(map(is_supported_linear, linears))
        and config.head_dim % LANES == 0
        and config.head_dim <= MAX_HEAD_DIM
    )


def is_supported_linear(linear: Linear) -> bool:
    weight = linear.stored()[0]
    return (
        type(weight) is nn.Parameter  # not sharded
        and weight.device.type == "cpu"
        and all(tensor.is_contiguous() for tensor in linear.stored())
        and storage(linear) in KINDS
        and linear.in_features % LANES == 0
    )


def storage(linear: Linear) -> object:
    return linear.weight.dtype if type(linear) is Linear else type(linear)


class NativeStep:
    """The forward pass of a token of each of some rows of a cache, in C++, in fp32 between weights.

    Reads the model's weights where they are; norms and biases are copied. Takes over the unpacking
    of quantized weights for prompts too. BuildError for a model that the C++ doesn't know.

    The structures of decode_step.cpp are tensors here: 8 bytes a number or an address.
    """

    def __init__(self, model: Transformer, library: ctypes.CDLL):
        if not is_supported(model):
            raise fused.BuildError("the C++ doesn't know this kind of model")
        self.model = model
        self.library = library
        self.copies: list[Tensor] = []
        self.unpacked = torch.empty(0)
        config = model.config
        numbers = [config.num_hidden_layers, config.hidden_size, config.num_attention_heads]
        numbers += [config.num_key_value_heads, config.head_dim, config.intermediate_size]
        numbers += [config.sliding_window or 1 << 40]
        numbers += [self.floats(model.model.norm.weight), *self.matrix(model.lm_head)]
        for block in model.model.layers:
            assert isinstance(block, Block)
            numbers += self.block(block)
        self.weights = torch.tensor(numbers)

    def floats(self, tensor: Tensor | None) -> int:
        """Return the address of a copy in fp32, 0 of None."""
        if tensor is None:
            return 0
        self.copies.append(tensor.detach().float().contiguous().clone())
        return self.copies[-1].data_ptr()

    def matrix(self, linear: Linear) -> list[int]:
        weight, *scales = linear.stored()
        groups = scales[0].shape[1] if isinstance(linear, Int4Linear) else 0
        numbers = [weight.data_ptr(), linear.out_features, linear.in_features]
        numbers += [KINDS[storage(linear)], groups, self.floats(linear.bias)]
        numbers += [tensor.data_ptr() for tensor in scales]
        numbers += [0] * (8 - len(numbers))
        if isinstance(linear, PackedLinear):
            linear.unpack = functools.partial(self.unpack, torch.tensor(numbers))
        return numbers

    def unpack(self, matrix: Tensor, *stored: Tensor, dtype: torch.dtype) -> Tensor:
        """What a quantized layer's `unpack` does, into memory that the next call overwrites."""
        out, width = matrix[1:3].tolist()
        if self.unpacked.dtype != dtype or len(self.unpacked) < out * width:
            self.unpacked = torch.empty(out * width, dtype=dtype)
        weight = self.unpacked[: out * width].view(out, width)
        self.call("unpack", matrix, weight, KINDS[dtype])
        return weight

    def block(self, block: Block) -> list[int]:
        attention, mlp = block.self_attn, block.mlp
        numbers = [self.floats(block.input_layernorm.weight)]
        numbers += [self.floats(block.post_attention_layernorm.weight)]
        numbers += [self.floats(attention.q_norm.weight)] if attention.qk_norm else [0]
        numbers += [self.floats(attention.k_norm.weight)] if attention.qk_norm else [0]
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            numbers += self.matrix(linear)
        for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            numbers += self.matrix(linear)
        return numbers

    def __call__(self, tokens: Tensor, lengths: Sequence[int], cache: KVCache) -> Tensor:
        """Append a token to each of the first B rows of `cache`, which hold `lengths` tokens.

        tokens (B, 1) → logits (B, V) float32.
        """
        assert max(lengths) < cache.size, f"the cache holds {cache.size} tokens: {lengths}"
        layer, positions = cache.layers[0], torch.tensor(lengths)
        addresses = [layer.data_ptr() for layer in cache.layers]
        layout = torch.tensor([KINDS[layer.dtype], *layer.stride()[:3], *addresses])
        rotation = rope(positions[:, None], self.model.config)
        angles = torch.cat((rotation * 2)[:4], -1)  # (B, 1, 1, 4 D)
        x = self.model.model.embed_tokens(tokens[:, 0]).float()  # (B, E)
        logits = torch.empty(len(lengths), self.model.lm_head.out_features)
        eps = self.model.config.rms_norm_eps
        self.call(
            "decode_step", self.weights, layout, positions, angles, x, logits, len(lengths), eps
        )
        return logits

    def call(self, name: str, *arguments: fused.Argument) -> None:
        threads = torch.get_num_threads()
        getattr(self.library, name)(*map(fused.as_c, (*arguments, threads)))
