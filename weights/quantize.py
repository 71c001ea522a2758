"""Weights in 4 and 8 bits: NF4 for a base that is frozen in training, int8 and int4 for chat.

NF4 keeps a frozen weight as 4-bit codes in blocks of 64, and the blocks' scales in 8 bits (double
quantization). Sources: QLoRA (arXiv 2305.14314); bitsandbytes for its points, ties and nibbles. The
quantization of the scales is ours: linear between a row's smallest and largest, where bitsandbytes
mixes 256 blocks of any rows.

A weight (out, in) becomes three tensors of `out` rows, 4 + 8 / 64 + 64 / in bits a weight: 4.14 at
in = 4096, 4.25 at 512. No two rows share anything, so FSDP2 may shard all three by rows, and a rank
that holds only its own rows quantizes them to the same bytes. Each row's two floats are stored as
integers, because FSDP2's mixed precision would cast a float32 parameter to bf16.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from model import Linear, Transformer

NF4_BLOCK = 64  # weights along the input dimension that share a scale
NF4_POINTS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
              -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
              0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
              0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # fmt: skip
INT4_GROUP = 64  # int4: inputs that share a scale, at most
RANGE_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range that its 16 points may cover
# weights that int8 and int4 quantize at a time: in fp32 fewer bytes than cli.MMAP_BYTES, from which
# on malloc fetches new pages from the system, which took most of the time
CHUNK = 1 << 17
TINY = 1e-38  # the absmax of a block of zeros; bitsandbytes' number


def row_chunks(*tensors: Tensor, width: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors' rows side by side, some at a time, in at most eight chunks.

    A megabyte of floats fits a CPU's cache.
    """
    weights = max(1 << 18, len(tensors[0]) * width // 8)
    return zip(*(tensor.split(max(1, weights // width)) for tensor in tensors))


@torch.no_grad()
def quantize(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight (out, in) of any float dtype to NF4.

    Returns codes uint8 (out, in / 2), scales uint8 (out, in / 64), ranges int32 (out, 2). A byte
    holds two codes, the even weight's in the high nibble, each the point nearest to weight / absmax
    of its block, in float32. That absmax is kept as smallest + scale * step; `ranges` are the bits
    of each row's (smallest, step). ValueError unless 64 divides `in`.
    """
    out, width = weight.shape
    if width % NF4_BLOCK:
        raise ValueError(
            f"a weight of {out} x {width} can't be quantized: {NF4_BLOCK} doesn't divide {width}"
        )
    codes = torch.empty(out, width // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(out, width // NF4_BLOCK, dtype=torch.float32, device=weight.device)
    for rows, packed, largest in row_chunks(weight, codes, absmax, width=width):
        blocks = rows.float().unflatten(1, (width // NF4_BLOCK, NF4_BLOCK))
        torch.amax(blocks.abs(), -1, out=largest)
        # not blocks / largest: bitsandbytes rounds twice
        blocks = blocks * (1 / largest.clamp(min=TINY)).unsqueeze(-1)
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
def dequantize(codes: Tensor, scales: Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) that `quantize` stored: float32 point * absmax, rounded once.

    Beside the result it needs the scales and an eighth of the weights in float32, never a float32
    copy of the whole; compiled, the scales alone.
    """
    out, width = len(codes), 2 * codes.shape[1]
    smallest, step = ranges.view(torch.float32).split(1, 1)
    absmax = smallest + scales * step  # (out, in / 64)
    if torch.compiler.is_compiling():
        code = torch.stack([codes >> 4, codes & 15], -1)  # (out, in / 2, 2)
        blocks = nf4_points(code).view(*scales.shape, NF4_BLOCK) * absmax.unsqueeze(-1)
        return blocks.to(dtype).view(out, width)
    points = torch.tensor(NF4_POINTS, device="cpu")
    # (256,): the two points of each byte as one number, so that one look-up gets both
    pairs = torch.cartesian_prod(points, points).view(torch.int64).flatten()
    pairs = pairs.to(codes.device, non_blocking=True)  # else every call would wait for the GPU
    weight = torch.empty(out, width, dtype=dtype, device=codes.device)
    for packed, scale, rows in row_chunks(codes, absmax, weight, width=width):
        values = pairs.index_select(0, packed.flatten().int()).view(torch.float32)
        blocks = (*scale.shape, NF4_BLOCK)
        torch.mul(values.view(blocks), scale.unsqueeze(-1), out=rows.view(blocks))
    return weight


def nf4_points(codes: Tensor) -> Tensor:
    """Return the codes' points, float32, chosen bit by bit.

    Compiled, this is one kernel. A table would be copied to the GPU at each call.
    """
    points: list = [*NF4_POINTS]
    for bit in range(4):
        is_set = (codes >> bit & 1).bool()
        points = [torch.where(is_set, high, low) for low, high in zip(points[::2], points[1::2])]
    return points[0]


class PackedLinear(Linear):
    """A frozen linear layer whose weight is stored as the tensors `names`.

    `quantize` makes them of a weight (out, in), `unpack` makes the weight of them, and `layout`
    says their shapes and dtypes.
    """

    names: ClassVar[tuple[str, ...]]
    quantize: Any
    unpack: Any
    layout: Any

    def stored(self) -> list[nn.Parameter]:
        return [getattr(self, name) for name in self.names]


class NF4Linear(PackedLinear):
    names = ("codes", "scales", "ranges")
    quantize = staticmethod(quantize)
    unpack = staticmethod(dequantize)

    @staticmethod
    def layout(rows: int, width: int) -> list[tuple]:
        return [
            ((rows, width // 2), torch.uint8),
            ((rows, width // NF4_BLOCK), torch.uint8),
            ((rows, 2), torch.int32),
        ]


# --- for chat, where each token reads all weights once


class Int8Linear(PackedLinear):
    """`weight` (out, in) int8 and `scales` (out,) fp32: 127 * scale is a row's largest weight."""

    names = ("weight", "scales")

    @staticmethod
    def layout(rows: int, width: int) -> list[tuple]:
        return [((rows, width), torch.int8), ((rows,), torch.float32)]

    @staticmethod
    def quantize(weight: Tensor) -> list[Tensor]:
        return by_rows(Int8Linear.quantize_rows, weight)

    @staticmethod
    def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.float()
        scales = weight.abs().amax(1).clamp(min=TINY) / 127
        return (weight / scales[:, None]).round().to(torch.int8), scales

    @staticmethod
    def unpack(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype) * scales[:, None].to(dtype)

    @staticmethod
    def product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return (weight.float() * x).sum(-1) * scales


class Int4Linear(PackedLinear):
    """Four bits a weight: code * scale + least, scale and least (out, groups) in bf16.

    A group is every `groups`-th input, so that a CPU multiplies the same input of sixteen groups at
    once and scales sums, not weights. `codes` (out, n / 2, groups) uint8, n inputs in a group: the
    low nibbles are the first half of the inputs, the high ones the second.
    """

    names = ("codes", "scales", "least")

    @staticmethod
    def layout(rows: int, width: int) -> list[tuple]:
        groups = width // group_size(width)
        scales = ((rows, groups), torch.bfloat16)
        return [((rows, width // groups // 2, groups), torch.uint8), scales, scales]

    @staticmethod
    def quantize(weight: Tensor) -> list[Tensor]:
        """Cover each group's range, or a share of it, whichever has the least squared error."""
        return by_rows(Int4Linear.quantize_rows, weight)

    @staticmethod
    def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = weight.float().unflatten(1, (group_size(weight.shape[1]), -1))  # (out, n, groups)
        low, high = weight.aminmax(dim=1, keepdim=True)
        best, code = torch.full_like(low, torch.inf), torch.zeros_like(weight)
        scale = least = torch.zeros_like(low, dtype=torch.bfloat16)
        for share in RANGE_SHARES:
            step = ((high - low) * (share / 15)).clamp(min=TINY).bfloat16()
            bottom = ((high + low) / 2 - 7.5 * step).bfloat16()
            codes = ((weight - bottom) / step).round().clamp(0, 15)
            approximation = torch.addcmul(bottom.float(), codes, step.float())
            error = approximation.sub_(weight).square_().sum(1, keepdim=True)
            better = error < best
            best, code = torch.minimum(error, best), torch.where(better, codes, code)
            scale, least = torch.where(better, step, scale), torch.where(better, bottom, least)
        first, second = code.to(torch.uint8).chunk(2, 1)
        return first | second << 4, scale.squeeze(1), least.squeeze(1)

    @staticmethod
    def unpack(codes: Tensor, scales: Tensor, least: Tensor, dtype: torch.dtype) -> Tensor:
        code = torch.cat([codes & 15, codes >> 4], 1).to(dtype)
        return torch.addcmul(least[:, None].to(dtype), code, scales[:, None].to(dtype)).flatten(1)

    @staticmethod
    def product(x: Tensor, codes: Tensor, scales: Tensor, least: Tensor) -> Tensor:
        x = x.view(-1, codes.shape[2])  # (n, groups)
        first, second = x.chunk(2)
        codes = codes.to(torch.int32)
        products = (codes & 15).float() * first + (codes >> 4).float() * second
        sums = products.sum(1)  # (out, groups)
        return (sums * scales.float() + x.sum(0) * least.float()).sum(-1)


def by_rows(quantize_rows: Callable[[Tensor], Sequence[Tensor]], weight: Tensor) -> list[Tensor]:
    """Quantize some rows of a weight (out, in) at a time."""
    parts = map(quantize_rows, weight.split(max(1, CHUNK // weight.shape[1])))
    return [torch.cat(tensors) for tensors in zip(*parts)]


def group_size(width: int) -> int:
    """Return the inputs that share a scale: at most INT4_GROUP, in 16 n groups; 0 if none fits."""
    sizes = range(2, INT4_GROUP + 1, 2)
    return max((size for size in sizes if width % (16 * size) == 0), default=0)


PACKED_TYPES: dict[str, type[PackedLinear]] = {
    "nf4": NF4Linear,
    "int8": Int8Linear,
    "int4": Int4Linear,
}


def pack_linears(model: Transformer, kind: str = "nf4") -> None:
    """Give the blocks' linear layers tensors of `kind` for their weights, to be filled later.

    For chat the head too, in int8, unless it is the embeddings. Int8 also for what int4 can't cut
    into groups.
    """
    keep_head = kind == "nf4" or model.config.tie_word_embeddings
    for module in model.modules():
        is_head = module is model.lm_head
        if type(module) is not Linear or is_head and keep_head:
            continue
        rows, width = module.out_features, module.in_features
        no_groups = kind == "int4" and not group_size(width)
        packed = PACKED_TYPES["int8" if is_head or no_groups else kind]
        device = module.weight.device
        del module.weight
        for name, (shape, dtype) in zip(packed.names, packed.layout(rows, width)):
            tensor = torch.empty(shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        module.__class__ = packed
