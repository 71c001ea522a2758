"""Weights in 4 and 8 bits: NF4 for a base that is frozen in training, int8 and int4 for chat.

NF4 by hand: a frozen weight kept as 4-bit codes in blocks of 64, and the blocks' scales kept in 8 bits (double quantisation).

Sources: QLoRA (arXiv 2305.14314); bitsandbytes for the bytes: its code points, its ties, its nibbles. The scales' own quantisation is
ours: linear between a row's smallest and largest, where bitsandbytes mixes 256 blocks of whatever rows.

A weight (out, in) becomes three tensors of `out` rows, 4 + 8 / 64 + 64 / in bits a weight: 4.14 at in = 4096, 4.25 at 512. No two rows
share anything, so FSDP2 may shard all three by rows, and a rank that holds only its own rows quantises them to the same bytes. Each row's
pair of floats is stored as integers, because FSDP2's mixed precision would cast a float32 parameter to bf16.
"""

from typing import Any

import torch
from torch import nn

from model import Linear

NF4_BLOCK = 64  # weights along the input dimension that share a scale
NF4_POINTS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
          -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
          0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
INT4_GROUP = 64  # inputs to a scale at most, of int4
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range that its 16 points cover
PIECE = 1 << 20  # weights quantised at a time
TINY = 1e-38  # stands in for the absmax of a block of zeros; bitsandbytes' number


def in_pieces(*tensors, width):
    """The tensors' rows, some at a time, side by side: a megabyte of floats fits a CPU's cache, but nothing is cut into more than eight."""
    weights = max(1 << 18, len(tensors[0]) * width // 8)
    return zip(*(tensor.split(max(1, weights // width)) for tensor in tensors))


@torch.no_grad()
def quantize(weight):
    """weight (out, in), any float dtype → codes uint8 (out, in / 2), scales uint8 (out, in / 64), ranges int32 (out, 2).

    A byte holds two codes, the even weight's in the high nibble, each the point nearest to weight / absmax of its block, in float32. That
    absmax is kept as smallest + scale * step; `ranges` are the bits of each row's (smallest, step). ValueError unless 64 divides `in`.
    """
    out, width = weight.shape
    if width % NF4_BLOCK:
        raise ValueError(
            f"a weight of {out} x {width} can't be quantised: {width} is no multiple of {NF4_BLOCK}"
        )
    codes = torch.empty(out, width // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(out, width // NF4_BLOCK, dtype=torch.float32, device=weight.device)
    for rows, packed, largest in in_pieces(weight, codes, absmax, width=width):
        blocks = rows.float().unflatten(1, (width // NF4_BLOCK, NF4_BLOCK))
        torch.amax(blocks.abs(), -1, out=largest)
        blocks = blocks * (1 / largest.clamp(min=TINY)).unsqueeze(
            -1
        )  # not blocks / largest: bitsandbytes rounds twice
        code = torch.zeros(rows.shape, dtype=torch.uint8, device=weight.device)
        for low, high in zip(NF4_POINTS, NF4_POINTS[1:]):  # a third of bucketize's time on a CPU
            code += (blocks > (low + high) / 2).view(rows.shape)
        even, odd = code.unflatten(1, (width // 2, 2)).unbind(-1)
        torch.bitwise_or(even << 4, odd, out=packed)
    smallest, largest = absmax.aminmax(dim=1, keepdim=True)
    step = (largest - smallest) * (1 / 255)  # not / 255, which a GPU rounds differently
    scales = ((absmax - smallest) / step.clamp(min=TINY)).round().to(torch.uint8)
    return codes, scales, torch.cat([smallest, step], 1).view(torch.int32)


@torch.no_grad()
def dequantize(codes, scales, ranges, dtype):
    """What `quantise` returned → the weight (out, in) in `dtype`: exactly what float32 point * float32 absmax rounds to.

    Beside the result it needs the scales and an eighth of the weights in float32, never a float32 copy of the whole.
    """
    out, width = len(codes), 2 * codes.shape[1]
    smallest, step = ranges.view(torch.float32).split(1, 1)
    absmax = smallest + scales * step  # (out, in / 64)
    points = torch.tensor(NF4_POINTS, device="cpu")
    pairs = (
        torch.cartesian_prod(points, points).view(torch.int64).flatten()
    )  # (256,): a byte's two points as one number to look up
    pairs = pairs.to(
        codes.device, non_blocking=True
    )  # else the host would wait for the GPU at every call
    weight = torch.empty(out, width, dtype=dtype, device=codes.device)
    for packed, scale, rows in in_pieces(codes, absmax, weight, width=width):
        values = pairs.index_select(0, packed.flatten().int()).view(torch.float32)
        torch.mul(
            values.view(*scale.shape, NF4_BLOCK),
            scale.unsqueeze(-1),
            out=rows.view(*scale.shape, NF4_BLOCK),
        )
    return weight


class PackedLinear(Linear):
    """A frozen linear layer: `quantise` makes the tensors `names` of its weight, `plan` says their shapes and dtypes."""

    def stored(self):
        return [getattr(self, name) for name in self.names]


class NF4Linear(PackedLinear):
    names = ("codes", "scales", "ranges")
    unpack, quantise = staticmethod(dequantize), staticmethod(quantize)

    @staticmethod
    def plan(rows, width):
        return (
            ((rows, width // 2), torch.uint8),
            ((rows, width // NF4_BLOCK), torch.uint8),
            ((rows, 2), torch.int32),
        )


# --- for chat, where each token reads all weights once


class Int8Linear(PackedLinear):
    """`weight` (out, in) int8 and `scales` (out,) fp32: a row's largest weight is 127 times its scale."""

    names = ("weight", "scales")

    @staticmethod
    def plan(rows, width):
        return ((rows, width), torch.int8), ((rows,), torch.float32)

    @staticmethod
    def quantise(weight):
        weight = weight.float()
        scales = weight.abs().amax(1).clamp(min=TINY) / 127
        return (weight / scales[:, None]).round().to(torch.int8), scales

    @staticmethod
    def unpack(weight, scales, dtype):
        return weight.to(dtype) * scales[:, None].to(dtype)

    @staticmethod
    def product(x, weight, scales):
        return (weight.float() * x).sum(-1) * scales


class Int4Linear(PackedLinear):
    """Four bits a weight: code * scale + least, scale and least (out, groups) in bf16.

    A group is every `groups`-th input, so that a CPU multiplies the same input of sixteen groups at once and scales sums, not weights.
    `codes` (out, n / 2, groups) uint8, n inputs to a group: the low nibbles are the first half of the inputs, the high ones the second.
    """

    names = ("codes", "scales", "least")

    @staticmethod
    def plan(rows, width):
        groups = width // group(width)
        scales = (rows, groups), torch.bfloat16
        return ((rows, width // groups // 2, groups), torch.uint8), scales, scales

    @staticmethod
    def quantise(weight):
        """Of some ways to cut a group's range short, the one with the least squared error."""
        pieces = [
            Int4Linear.quantise_rows(rows)
            for rows in weight.split(max(1, PIECE // weight.shape[1]))
        ]
        return [torch.cat(parts) for parts in zip(*pieces)]

    @staticmethod
    def quantise_rows(weight):
        weight = weight.float().unflatten(1, (group(weight.shape[1]), -1))  # (out, n, groups)
        low, high = weight.aminmax(dim=1, keepdim=True)
        best, code = torch.full_like(low, torch.inf), torch.zeros_like(weight)
        scale = least = torch.zeros_like(low, dtype=torch.bfloat16)
        for share in SHARES:
            step = ((high - low) * (share / 15)).clamp(min=TINY).bfloat16()
            bottom = ((high + low) / 2 - 7.5 * step).bfloat16()
            codes = ((weight - bottom) / step).round().clamp(0, 15)
            error = (
                torch.addcmul(bottom.float(), codes, step.float())
                .sub_(weight)
                .square_()
                .sum(1, keepdim=True)
            )
            better = error < best
            best, code = torch.minimum(error, best), torch.where(better, codes, code)
            scale, least = torch.where(better, step, scale), torch.where(better, bottom, least)
        first, second = code.to(torch.uint8).chunk(2, 1)
        return first | second << 4, scale.squeeze(1), least.squeeze(1)

    @staticmethod
    def unpack(codes, scales, least, dtype):
        code = torch.cat([codes & 15, codes >> 4], 1).to(dtype)
        return torch.addcmul(least[:, None].to(dtype), code, scales[:, None].to(dtype)).flatten(1)

    @staticmethod
    def product(x, codes, scales, least):
        x = x.view(-1, codes.shape[2])  # (n, groups)
        first, second = x.chunk(2)
        codes = codes.to(torch.int32)
        sums = ((codes & 15).float() * first + (codes >> 4).float() * second).sum(
            1
        )  # (out, groups)
        return (sums * scales.float() + x.sum(0) * least.float()).sum(-1)


def group(width):
    """Inputs that share a scale: at most GROUP, and sixteen groups or a multiple of that. 0 where `width` has no such part."""
    return max((n for n in range(2, INT4_GROUP + 1, 2) if width % (16 * n) == 0), default=0)


PACKED_TYPES: dict[str, Any] = {"nf4": NF4Linear, "int8": Int8Linear, "int4": Int4Linear}


def pack_linears(model, kind="nf4"):
    """Keep the weights of every linear layer in the blocks as `kind`; they are written later, row by row.

    For chat the head too, in 8 bits, unless it is the embeddings; and what int4 can't cut into groups.
    """
    for module in model.modules():
        if (
            type(module) is not Linear
            or module is model.lm_head
            and (kind == "nf4" or model.config.tie_word_embeddings)
        ):
            continue
        coarse = module is model.lm_head or kind == "int4" and not group(module.in_features)
        packed = PACKED_TYPES["int8" if coarse else kind]
        device = module.weight.device
        del module.weight
        for name, (shape, dtype) in zip(
            packed.names, packed.plan(module.out_features, module.in_features)
        ):
            setattr(
                module,
                name,
                nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False),
            )
        module.__class__ = packed
