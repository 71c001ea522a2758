"""What only a GPU can show: CUDA's kernel for documents, compiled steps, measured memory."""

import math

import pytest
import torch
import torch.nn.functional as F

import data
from model import AC_MODES, IGNORE_INDEX, Documents, ModelConfig, attend, attention_layout
from training import distributed, memory, metrics, optim, step

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

SMALL = ModelConfig(1000, 128, 256, 3, 4, 2, 32)
ADAPTER = {"rank": 8, "alpha": 16, "rows": [998, 999]}
WAYS = {
    "lora": {"adapter": ADAPTER},
    "qlora": {"adapter": ADAPTER, "nf4": True},
    "full": {},
    "pure": {"pure": True},
}


@pytest.fixture(autouse=True)
def fresh():
    """Each test counts its own graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def documents(seed, count, rows, length):
    """→ cu_seqlens of `count` or more documents in `rows` rows, positions (rows, length)"""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(1, rows * length, (count,), generator=generator).tolist()
    cu_seqlens = sorted({*range(0, rows * length + 1, length), *inner})
    return cu_seqlens, torch.cat(
        [torch.arange(end - begin) for begin, end in zip(cu_seqlens, cu_seqlens[1:])]
    ).view(rows, length)


def batch_of(seed, device, vocabulary, rows=2, length=256):
    """As `step.collate` makes them: 64 documents at most, their cu_seqlens a tensor of one size on CUDA, a list on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens, positions = documents(seed, 3 + 4 * seed, rows, length)
    tokens = torch.randint(
        vocabulary - 8, vocabulary, (rows, length), generator=generator
    )  # something to learn
    labels = tokens.where(torch.rand(rows, length, generator=generator) < 0.4, IGNORE_INDEX)
    if device.type == "cuda":
        cu_seqlens = torch.tensor(
            cu_seqlens + cu_seqlens[-1:] * (65 - len(cu_seqlens)), dtype=torch.int32
        )
    tensors = (
        tokens,
        positions,
        labels,
        cu_seqlens,
        (labels != IGNORE_INDEX).flatten().nonzero().flatten(),
    )
    return step.Batch(*(x if isinstance(x, list) else x.to(device) for x in tensors))


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_attention_by_document_equals_the_plain_formula_and_so_do_its_gradients(window, groups):
    cu_seqlens, positions = documents(0, 9, 2, 300)
    cu_seqlens = torch.tensor(
        cu_seqlens + cu_seqlens[-1:] * (65 - len(cu_seqlens)), dtype=torch.int32, device=DEVICE
    )
    where = attention_layout(positions.to(DEVICE), window, None, torch.bfloat16, cu_seqlens)
    assert isinstance(where, Documents)
    T = positions.shape[1]
    document = (positions == 0).cumsum(1)
    ahead = torch.arange(T) - torch.arange(T)[:, None]
    sees = (
        (ahead <= 0)
        & (ahead > -(window or T))
        & (document[:, None, :, None] == document[:, None, None, :])
    )
    torch.manual_seed(0)
    drawn = [
        torch.randn(2, T, heads, 64).bfloat16().to(DEVICE).requires_grad_()
        for heads in (8, groups, groups)
    ]
    exact = [x.detach().float().requires_grad_() for x in drawn]
    q, k, v = (x.transpose(1, 2) for x in exact)
    k, v = (x.repeat_interleave(8 // groups, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=sees.to(DEVICE)).transpose(1, 2)
    got, direction = attend(*drawn, where), torch.randn(2, T, 8, 64).bfloat16().to(DEVICE)
    pairs = [(got, expected)]
    pairs += zip(
        torch.autograd.grad(got, drawn, direction),
        torch.autograd.grad(expected, exact, direction.float()),
    )
    for one, other in pairs:
        assert (one.float() - other).norm() <= 0.01 * other.norm() + 1e-3  # bf16 holds 1/256
        torch.testing.assert_close(one.float(), other, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_have_one_shape_and_a_power_of_two_of_documents(size, chats, tokenizer):

    rows = data.load_rows(chats / "train.jsonl", tokenizer, 160)
    shapes = {
        tuple(tuple(x.shape) for x in batch[:4])
        for n in (1, 5, 8)
        for batch in step.micro_batches(rows[:n], size, distributed.Distributed(DEVICE), 160)
    }
    ((tokens, positions, labels, (cu_seqlens,)),) = shapes
    assert tokens == positions == labels == (size, 160)
    assert math.log2(cu_seqlens - 1).is_integer()


def curve(device, compiled, recompute, ways):
    """Losses and numbers of graphs over five steps of other documents."""
    model = step.build_model(SMALL, distributed.Distributed(device), recompute=recompute, **ways)
    if compiled:
        model.compile_blocks()
    optimizer = optim.make_optimizer(model, 1e-2, 0.0, ways.get("pure", False))
    losses, graphs = [], []
    for seed in range(5):
        batches = [batch_of(2 * seed + n, device, SMALL.vocab_size) for n in range(2)]
        losses.append(
            step.train_step(model, optimizer, batches, distributed.Distributed(device))[0]
        )
        graphs.append(metrics.count_compiled_graphs())
    return losses, graphs


@pytest.mark.parametrize("recompute", AC_MODES)
@pytest.mark.parametrize("way", WAYS)
def test_compiled_training_gives_the_cpus_losses_and_compiles_in_the_first_steps_alone(
    way, recompute
):
    expected, _ = curve(torch.device("cpu"), False, "none", WAYS[way])
    assert expected[-1] != pytest.approx(expected[0], rel=0.01)  # something is learned
    eager, none = curve(DEVICE, False, recompute, WAYS[way])
    compiled, graphs = curve(DEVICE, True, recompute, WAYS[way])
    assert eager == pytest.approx(expected, rel=0.01) and compiled == pytest.approx(
        expected, rel=0.01
    )  # in float32 0.003 away
    assert (
        set(none) == {0}
        and 0 < graphs[1] < SMALL.num_hidden_layers
        and set(graphs[1:]) == {graphs[1]}
    )


@pytest.mark.parametrize("recompute", AC_MODES)
@pytest.mark.parametrize("way", WAYS)
def test_measured_memory_is_as_predicted(way, recompute):
    shape = ModelConfig(32000, 1024, 3072, 4, 16, 4, 64)
    rows, length = 2, 1024
    tokens, positions = (
        torch.zeros(rows, length, dtype=torch.int64),
        torch.arange(length).expand(rows, -1),
    )
    cu_seqlens = torch.tensor([0, length] + [rows * length] * 63, dtype=torch.int32)
    target_positions = torch.arange(int(rows * length * 0.4))
    batch = step.Batch(
        *(x.to(DEVICE) for x in (tokens, positions, tokens, cu_seqlens, target_positions))
    )
    warm_up()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = step.build_model(
        shape, distributed.Distributed(DEVICE), recompute=recompute, **WAYS[way]
    )
    optimizer = optim.make_optimizer(model, 1e-4, 0.0, WAYS[way].get("pure", False))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        step.train_step(model, optimizer, [batch] * 2, distributed.Distributed(DEVICE))
    measured = torch.cuda.max_memory_allocated() - before
    predicted = memory.predict_peak_memory(shape, rows, length, 2, recompute=recompute, **WAYS[way])
    assert abs(measured - predicted) <= 0.15 * predicted + (64 << 20), (
        f"{(measured - predicted) / 2**20:.0f} MiB beside the prediction"
    )


def warm_up():
    """cuBLAS's workspace, allocated once a process, is no part of a step."""
    x = torch.ones(256, 256, dtype=torch.bfloat16, device=DEVICE)
    (x @ x).sum().item()
