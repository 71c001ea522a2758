"""Decode on a CPU in C++: build decode_step.cpp at first use, and call it.

A small model's step is bound by Python and by the start of some hundred small products; there it is
one call. The library is kept in ~/.cache/doppelganger. Where no compiler is found, or the model is
of a kind that the C++ doesn't know, torch decodes.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fused
from model import Block, KVCache, Linear, Transformer, rope
from weights.quantize import Int4Linear, Int8Linear, PackedLinear

SOURCE = Path(__file__).with_name("decode_step.cpp")
KINDS = {torch.float32: 0, torch.bfloat16: 1, Int8Linear: 2, Int4Linear: 3}  # Kind
LANES = 16  # numbers that are read at a time, at most
MAX_HEAD_DIM = 256


class NativeError(Exception):
    """Why torch must decode."""


def load_library() -> ctypes.CDLL:
    """Load the compiled step, building it first if it isn't cached. NativeError if that fails."""
    try:
        return fused.load_library(SOURCE)
    except fused.BuildError as error:
        raise NativeError(str(error)) from None


# --- the structures of decode_step.cpp


class Matrix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scales", "least", "bias")] + [
        (name, ctypes.c_int64) for name in ("kind", "out", "in", "groups")
    ]


class BlockWeights(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")
    ] + [(name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")]


class ModelWeights(ctypes.Structure):
    _fields_ = [
        ("blocks", ctypes.POINTER(BlockWeights)),
        ("norm", ctypes.c_void_p),
        ("head", Matrix),
        *((name, ctypes.c_int64) for name in ("num_blocks", "E", "H", "G", "D", "inner", "window")),
        ("eps", ctypes.c_float),
    ]


class CacheLayout(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(ctypes.c_void_p)),
        *((name, ctypes.c_int64) for name in ("kind", "values", "row", "group")),
    ]


# --- the step


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
        and linear_kind(linear) is not None
        and linear.in_features % LANES == 0
    )


def linear_kind(linear: Linear) -> int | None:
    return KINDS.get(linear.weight.dtype if type(linear) is Linear else type(linear))


class NativeStep:
    """The forward pass of a token of each of some rows of a cache, in C++, in fp32 between weights.

    Reads the model's weights where they are; norms and biases are copied. Takes over the unpacking
    of quantized weights for prompts too. NativeError for a model that the C++ doesn't know.
    """

    def __init__(self, model: Transformer, library: ctypes.CDLL):
        if not is_supported(model):
            raise NativeError("the C++ doesn't know this kind of model")
        self.model = model
        self.library = library
        self.referenced: list[Tensor] = []  # what the structures point to
        config = model.config
        blocks = [block for block in model.model.layers if isinstance(block, Block)]
        weights = ModelWeights()
        weights.blocks = (BlockWeights * len(blocks))(*map(self.block_weights, blocks))
        weights.norm = self.floats(model.model.norm.weight)
        weights.head = self.matrix(model.lm_head)
        weights.num_blocks = len(blocks)
        weights.E, weights.H = config.hidden_size, config.num_attention_heads
        weights.G, weights.D = config.num_key_value_heads, config.head_dim
        weights.inner, weights.eps = config.intermediate_size, config.rms_norm_eps
        weights.window = config.sliding_window or 1 << 40
        self.weights = weights

    def floats(self, tensor: Tensor) -> int:
        """Return the address of a copy in fp32."""
        self.referenced.append(tensor.detach().float().contiguous().clone())
        return self.referenced[-1].data_ptr()

    def matrix(self, linear: Linear) -> Matrix:
        matrix = Matrix(kind=linear_kind(linear), out=linear.out_features)
        setattr(matrix, "in", linear.in_features)
        for name, tensor in zip(("weight", "scales", "least"), linear.stored()):
            setattr(matrix, name, tensor.data_ptr())
            self.referenced.append(tensor)
        if isinstance(linear, PackedLinear):
            scales: Any = linear.scales  # (out,), or of int4 (out, groups)
            matrix.groups = scales.shape[1] if scales.dim() > 1 else 0
            linear.unpack = self.unpacker(matrix)
        if linear.bias is not None:
            matrix.bias = self.floats(linear.bias)
        return matrix

    def unpacker(self, matrix: Matrix) -> Callable[..., Tensor]:
        """Return what a quantized layer's `unpack` does, in C++."""

        def unpack(*stored: Tensor, dtype: torch.dtype) -> Tensor:
            weight = torch.empty(matrix.out, getattr(matrix, "in"), dtype=dtype)
            address, kind = ctypes.c_void_p(weight.data_ptr()), ctypes.c_int64(KINDS[dtype])
            self.library.unpack(ctypes.byref(matrix), address, kind, torch.get_num_threads())
            return weight

        return unpack

    def block_weights(self, block: Block) -> BlockWeights:
        attention, mlp = block.self_attn, block.mlp
        weights = BlockWeights()
        weights.input_norm = self.floats(block.input_layernorm.weight)
        weights.post_norm = self.floats(block.post_attention_layernorm.weight)
        if attention.qk_norm:
            weights.q_norm = self.floats(attention.q_norm.weight)
            weights.k_norm = self.floats(attention.k_norm.weight)
        for name in ("q", "k", "v", "o"):
            setattr(weights, name, self.matrix(getattr(attention, f"{name}_proj")))
        for name in ("gate", "up", "down"):
            setattr(weights, name, self.matrix(getattr(mlp, f"{name}_proj")))
        return weights

    def __call__(self, tokens: Tensor, lengths: Sequence[int], cache: KVCache) -> Tensor:
        """Append a token to each of the first B rows of `cache`, which hold `lengths` tokens.

        tokens (B, 1) → logits (B, V) float32.
        """
        count, layer = len(lengths), cache.layers[0]
        assert max(lengths) < cache.size, f"the cache holds {cache.size} tokens: {lengths}"
        addresses = [layer.data_ptr() for layer in cache.layers]
        layout = CacheLayout(
            (ctypes.c_void_p * len(addresses))(*addresses), KINDS[layer.dtype], *layer.stride()[:3]
        )
        x = self.model.model.embed_tokens(tokens[:, 0]).float()  # (B, E)
        angles = rope(torch.tensor(lengths)[:, None], self.model.config)  # (B, 1, 1, D) each
        rotations = [angle.data_ptr() for angle in (angles * 2)[:4]]
        logits = torch.empty(count, self.weights.head.out)
        self.library.decode_step(
            ctypes.byref(self.weights),
            ctypes.byref(layout),
            ctypes.c_int64(count),
            (ctypes.c_int64 * count)(*lengths),
            (ctypes.c_void_p * 4)(*rotations),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(logits.data_ptr()),
            torch.get_num_threads(),
        )
        return logits
