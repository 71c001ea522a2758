"""NF4 against bitsandbytes: the same codes for the same weight, and no larger an error."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from weights import quantize

POINTS = torch.tensor(quantize.NF4_POINTS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(kind, rows=96, width=1024):
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(rows, width, generator=generator)
    if kind == "normal":
        return normal * 0.02
    if kind == "uniform":
        return torch.rand(rows, width, generator=generator) * 6 - 3
    if kind == "heavy tails":
        return normal / torch.randn(rows, width, generator=generator).abs().clamp(min=1e-3)
    if kind == "subnormal":
        return normal * 1e-39  # the reciprocal of such an absmax overflows
    assert kind == "zeros"
    normal[:, 100:900] = 0  # whole blocks and parts of blocks
    normal[3] = 0
    return normal


def theirs(weight, double=False):
    """bitsandbytes' bytes in our shape, and the weight that it makes of them."""
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double
    )
    return packed.view(len(weight), -1), bnb.dequantize_4bit(packed, state)


def as_written(codes, scales, ranges):
    """The definition, a step at a time, in float32."""
    smallest, step = ranges.view(torch.float32).split(1, 1)
    nibbles = torch.stack([codes >> 4, codes & 15], -1).flatten(1).long()
    return POINTS[nibbles] * (smallest + scales * step).repeat_interleave(64, 1)


def error(weight, approximation):
    return (weight - approximation).square().mean().sqrt().item()


# --- the bytes


def test_nf4_points_equal_bitsandbytes():
    assert torch.equal(POINTS, bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["normal", "uniform", "heavy tails", "subnormal", "zeros"])
def test_nf4_codes_equal_bitsandbytes(kind, dtype):
    weight = drawn(kind).to(dtype)
    codes, _, _ = quantize.quantize(weight)
    assert torch.equal(codes, theirs(weight)[0])
    assert torch.equal(codes, theirs(weight, double=True)[0])


@pytest.mark.parametrize("absmax", [1.0, 0.25, 3.0, 0.017])
def test_midpoints_round_as_in_bitsandbytes(absmax):
    middle = (POINTS[1:] + POINTS[:-1]) / 2
    above, below = middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0))
    row = torch.cat([torch.ones(1), middle, above, below, POINTS, torch.zeros(2)])
    weight = torch.stack([row, -row]) * absmax  # (2, 64)
    assert torch.equal(quantize.quantize(weight)[0], theirs(weight)[0])


def test_first_weight_is_in_the_high_nibble():
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([1.0, -1.0, 0.0, 0.72])
    assert quantize.quantize(weight)[0][0, :3].tolist() == [0xF0, 0x7E, 0x77]


def test_rows_quantized_apart_give_the_same_bytes(monkeypatch):
    weight = drawn("zeros").bfloat16()
    whole = quantize.quantize(weight)
    shards = [
        quantize.quantize(rows) for rows in (weight[:1], weight[1:40], weight[40:40], weight[40:])
    ]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*shards)))
    monkeypatch.setattr(
        quantize,
        "row_chunks",
        lambda *tensors, width: zip(*(tensor.split(7) for tensor in tensors)),
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, quantize.quantize(weight)))
    assert torch.equal(quantize.dequantize(*whole, torch.float32), as_written(*whole))


def test_transposed_weight_gives_the_same_bytes():
    weight = drawn("normal", 128, 128)
    assert all(
        torch.equal(a, b)
        for a, b in zip(quantize.quantize(weight.T), quantize.quantize(weight.T.contiguous()))
    )


def test_stored_tensors_are_integers_with_one_row_per_row():
    codes, scales, ranges = quantize.quantize(drawn("normal", 96, 1024))
    assert (codes.shape, codes.dtype) == ((96, 512), torch.uint8)
    assert (scales.shape, scales.dtype) == ((96, 16), torch.uint8)
    assert (ranges.shape, ranges.dtype) == ((96, 2), torch.int32)


def test_width_not_divisible_by_64_is_refused():
    with pytest.raises(ValueError, match="96"):
        quantize.quantize(torch.zeros(4, 96))


# --- what comes back


def test_error_is_at_most_bitsandbytes():
    weight = drawn("normal", 512, 1024)
    ours = quantize.dequantize(*quantize.quantize(weight), torch.float32)
    assert 0 < error(weight, ours) <= error(weight, theirs(weight, double=True)[1])


def test_absmax_is_kept_to_half_a_step():
    weight = drawn("heavy tails")
    _, scales, ranges = quantize.quantize(weight)
    exact = weight.unflatten(1, (-1, 64)).abs().amax(-1)
    smallest, step = ranges.view(torch.float32).split(1, 1)
    assert ((smallest + scales * step - exact).abs() <= step / 2 + 1e-6 * exact).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 1024])
def test_dequantized_weight_is_rounded_once(width, dtype):
    stored = quantize.quantize(drawn("normal", width=width))
    weight = quantize.dequantize(*stored, dtype)
    assert weight.dtype == dtype
    assert torch.equal(weight, as_written(*stored).to(dtype))


def test_zeros_stay_zeros():
    weight = drawn("zeros")
    weight[5:7, :64] = 0  # a first block, and so a row whose smallest absmax is 0
    back = quantize.dequantize(*quantize.quantize(weight), torch.bfloat16)
    assert back.isfinite().all()
    assert (back[3] == 0).all() and (back[:, 128:896] == 0).all() and (back[5:7, :64] == 0).all()


def test_empty_shard_stays_empty():
    stored = quantize.quantize(torch.empty(0, 128))
    assert [tuple(t.shape) for t in stored] == [(0, 64), (0, 2), (0, 2)]
    assert quantize.dequantize(*stored, torch.bfloat16).shape == (0, 128)


# --- where it runs


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest float32 tensor that any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_pass_without_a_float32_copy(device):
    with FakeTensorMode(), Largest() as largest:
        stored = quantize.quantize(torch.empty(14336, 4096, dtype=torch.bfloat16, device=device))
        weight = quantize.dequantize(*stored, torch.bfloat16)
    assert (weight.shape, weight.dtype, weight.device.type) == (
        (14336, 4096),
        torch.bfloat16,
        device,
    )
    assert largest.bytes <= 14336 * 4096 * 4 / 8


def test_dequantize_compiles_to_a_full_graph():
    stored = quantize.quantize(drawn("normal"))
    traced = torch.compile(quantize.dequantize, backend="aot_eager", fullgraph=True)
    assert torch.equal(
        traced(*stored, torch.bfloat16), quantize.dequantize(*stored, torch.bfloat16)
    )


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="compares a GPU's bytes with the CPU's: no GPU here"
)
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "zeros"])
def test_gpu_bytes_equal_cpu_bytes(kind):
    weight = drawn(kind)
    here, there = quantize.quantize(weight), quantize.quantize(weight.cuda())
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there))
    assert torch.equal(
        quantize.dequantize(*here, torch.bfloat16),
        quantize.dequantize(*there, torch.bfloat16).cpu(),
    )
