"""NF4 by hand: a frozen weight kept as 4-bit codes in blocks of 64, and the blocks' scales kept in 8 bits (double quantisation).

Sources: QLoRA (arXiv 2305.14314); bitsandbytes for the bytes: its code points, its ties, its nibbles. The scales' own quantisation is
ours: linear between a row's smallest and largest, where bitsandbytes mixes 256 blocks of whatever rows.

A weight (out, in) becomes three tensors of `out` rows, 4 + 8 / 64 + 64 / in bits a weight: 4.14 at in = 4096, 4.25 at 512. No two rows
share anything, so FSDP2 may shard all three by rows, and a rank that holds only its own rows quantises them to the same bytes. Each row's
pair of floats is stored as integers, because FSDP2's mixed precision would cast a float32 parameter to bf16.
"""

import torch
from torch import nn

from model import Linear

BLOCK = 64  # weights along the input dimension that share a scale
POINTS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
          -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
          0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
TINY = 1e-38  # stands in for the absmax of a block of zeros; bitsandbytes' number


def in_pieces(*tensors, width):
    """The tensors' rows, some at a time, side by side: a megabyte of floats fits a CPU's cache, but nothing is cut into more than eight."""
    weights = max(1 << 18, len(tensors[0]) * width // 8)
    return zip(*(tensor.split(max(1, weights // width)) for tensor in tensors))


@torch.no_grad()
def quantise(weight):
    """weight (out, in), any float dtype → codes uint8 (out, in / 2), scales uint8 (out, in / 64), ranges int32 (out, 2).

    A byte holds two codes, the even weight's in the high nibble, each the point nearest to weight / absmax of its block, in float32. That
    absmax is kept as smallest + scale * step; `ranges` are the bits of each row's (smallest, step). ValueError unless 64 divides `in`.
    """
    out, width = weight.shape
    if width % BLOCK:
        raise ValueError(f"a weight of {out} x {width} can't be quantised: {width} is no multiple of {BLOCK}")
    codes = torch.empty(out, width // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(out, width // BLOCK, dtype=torch.float32, device=weight.device)
    for rows, packed, largest in in_pieces(weight, codes, absmax, width=width):
        blocks = rows.float().unflatten(1, (width // BLOCK, BLOCK))
        torch.amax(blocks.abs(), -1, out=largest)
        blocks = blocks * (1 / largest.clamp(min=TINY)).unsqueeze(-1)  # not blocks / largest: bitsandbytes rounds twice
        code = torch.zeros(rows.shape, dtype=torch.uint8, device=weight.device)
        for low, high in zip(POINTS, POINTS[1:]):  # a third of bucketize's time on a CPU
            code += (blocks > (low + high) / 2).view(rows.shape)
        even, odd = code.unflatten(1, (width // 2, 2)).unbind(-1)
        torch.bitwise_or(even << 4, odd, out=packed)
    smallest, largest = absmax.aminmax(dim=1, keepdim=True)
    step = (largest - smallest) * (1 / 255)  # not / 255, which a GPU rounds differently
    scales = ((absmax - smallest) / step.clamp(min=TINY)).round().to(torch.uint8)
    return codes, scales, torch.cat([smallest, step], 1).view(torch.int32)


@torch.no_grad()
def dequantise(codes, scales, ranges, dtype):
    """What `quantise` returned → the weight (out, in) in `dtype`: exactly what float32 point * float32 absmax rounds to.

    Beside the result it needs the scales and an eighth of the weights in float32, never a float32 copy of the whole.
    """
    out, width = len(codes), 2 * codes.shape[1]
    smallest, step = ranges.view(torch.float32).split(1, 1)
    absmax = smallest + scales * step  # (out, in / 64)
    points = torch.tensor(POINTS, device="cpu")
    pairs = torch.cartesian_prod(points, points).view(torch.int64).flatten()  # (256,): a byte's two points as one number to look up
    pairs = pairs.to(codes.device, non_blocking=True)  # else the host would wait for the GPU at every call
    weight = torch.empty(out, width, dtype=dtype, device=codes.device)
    for packed, scale, rows in in_pieces(codes, absmax, weight, width=width):
        values = pairs.index_select(0, packed.flatten().int()).view(torch.float32)
        torch.mul(values.view(*scale.shape, BLOCK), scale.unsqueeze(-1), out=rows.view(*scale.shape, BLOCK))
    return weight


class NF4Linear(Linear):
    """A frozen linear layer whose weight is kept as `codes`, `scales` and `ranges`, and unpacked whenever it is used."""

    def stored(self):
        return self.codes, self.scales, self.ranges

    unpack = staticmethod(dequantise)


def pack(model):
    """Keep the weights of every linear layer in the blocks as NF4; they are written later, row by row."""
    for module in model.model.layers.modules():
        if type(module) is Linear:
            rows, width, device = module.out_features, module.in_features, module.weight.device
            del module.weight
            kept = {"codes": (width // 2, torch.uint8), "scales": (width // BLOCK, torch.uint8), "ranges": (2, torch.int32)}
            for name, (columns, dtype) in kept.items():
                setattr(module, name, nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device), requires_grad=False))
            module.__class__ = NF4Linear
