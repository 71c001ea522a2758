"""What only a GPU can test: CUDA's kernel for documents, compiled steps, measured memory."""

import dataclasses

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
SPECS = {
    "lora": step.ModelSpec(ADAPTER),
    "qlora": step.ModelSpec(ADAPTER, nf4=True),
    "full": step.ModelSpec(),
    "pure": step.ModelSpec(pure_bf16=True),
}


@pytest.fixture(autouse=True)
def fresh():
    """Each test counts its own graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def random_documents(seed, count, rows, length):
    """Return cu_seqlens of at least `count` documents in `rows` rows, and positions (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randint(1, rows * length, (count,), generator=generator).tolist()
    cu_seqlens = sorted({*range(0, rows * length + 1, length), *inner})
    lengths = [end - begin for begin, end in zip(cu_seqlens, cu_seqlens[1:])]
    return cu_seqlens, torch.cat([torch.arange(n) for n in lengths]).view(rows, length)


def random_batch(seed, device, vocabulary, rows=2, length=256):
    """Like `step.collate`'s: cu_seqlens are a tensor of one size on CUDA, a list on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens, positions = random_documents(seed, 3 + 4 * seed, rows, length)
    # Eight ids of the vocabulary: something to learn.
    tokens = torch.randint(vocabulary - 8, vocabulary, (rows, length), generator=generator)
    labels = tokens.where(torch.rand(rows, length, generator=generator) < 0.4, IGNORE_INDEX)
    target_positions = (labels != IGNORE_INDEX).flatten().nonzero().flatten()
    if device.type == "cuda":
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=device)
    tokens, positions, labels = (x.to(device) for x in (tokens, positions, labels))
    return step.Batch(tokens, positions, labels, cu_seqlens, target_positions.to(device))


@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_varlen_attention_and_its_gradients_equal_masked_sdpa(window, groups):
    cu_seqlens, positions = random_documents(0, 9, 2, 300)
    cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    layout = attention_layout(positions.to(DEVICE), window, None, torch.bfloat16, cu_seqlens)
    assert isinstance(layout, Documents)
    T = positions.shape[1]
    document = (positions == 0).cumsum(1)
    ahead = torch.arange(T) - torch.arange(T)[:, None]
    mask = (ahead <= 0) & (ahead > -(window or T))
    mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    torch.manual_seed(0)
    shapes = [(2, T, heads, 64) for heads in (8, groups, groups)]
    inputs = [torch.randn(shape).bfloat16().to(DEVICE).requires_grad_() for shape in shapes]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    q, k, v = (x.transpose(1, 2) for x in exact)
    k, v = (x.repeat_interleave(8 // groups, 1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(DEVICE)).transpose(1, 2)
    actual, grad = attend(*inputs, layout), torch.randn(2, T, 8, 64).bfloat16().to(DEVICE)
    grads = torch.autograd.grad(actual, inputs, grad)
    exact_grads = torch.autograd.grad(expected, exact, grad.float())
    for one, other in zip((actual, *grads), (expected, *exact_grads), strict=True):
        assert (one.float() - other).norm() <= 0.01 * other.norm() + 1e-3  # bf16 holds 1/256
        torch.testing.assert_close(one.float(), other, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_have_one_shape(size, chats, tokenizer):
    rows = data.load_rows(chats / "train.jsonl", tokenizer, 160)
    shapes = {
        tuple(tuple(x.shape) for x in batch[:3])
        for n in (1, 5, 8)
        for batch in step.micro_batches(rows[:n], size, distributed.Distributed(DEVICE), 160)
    }
    assert shapes == {((size, 160),) * 3}


def train(device, compiled, mode, kind):
    """Return losses and numbers of compiled graphs over five steps with different documents."""
    spec = dataclasses.replace(SPECS[kind], activation_checkpointing=mode)
    ranks = distributed.Distributed(device)
    model = step.build_model(SMALL, ranks, spec)
    optimizer = optim.make_optimizer(model, 1e-2, 0.0, spec.pure_bf16)
    if compiled:
        step.compile_model(model, optimizer)
    losses, graphs = [], []
    for seed in range(5):
        batches = [random_batch(2 * seed + n, device, SMALL.vocab_size) for n in range(2)]
        losses.append(step.train_step(model, optimizer, batches, ranks)[0])
        graphs.append(metrics.count_compiled_graphs())
    return losses, graphs


@pytest.mark.parametrize("mode", AC_MODES)
@pytest.mark.parametrize("kind", SPECS)
def test_compiled_training_equals_the_cpu_and_compiles_in_the_first_steps_only(kind, mode):
    expected, _ = train(torch.device("cpu"), False, "none", kind)
    assert expected[-1] != pytest.approx(expected[0], rel=0.01)  # something is learned
    eager, no_graphs = train(DEVICE, False, mode, kind)
    compiled, graphs = train(DEVICE, True, mode, kind)
    # In float32 they are 0.003 apart.
    assert eager == pytest.approx(expected, rel=0.01)
    assert compiled == pytest.approx(expected, rel=0.01)
    assert set(no_graphs) == {0}
    assert 0 < graphs[1] < SMALL.num_hidden_layers and set(graphs[1:]) == {graphs[1]}


@pytest.mark.parametrize("mode", AC_MODES)
@pytest.mark.parametrize("kind", SPECS)
def test_measured_memory_is_as_predicted(kind, mode):
    config, ranks = ModelConfig(32000, 1024, 3072, 4, 16, 4, 64), distributed.Distributed(DEVICE)
    rows, length = 2, 1024
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    positions = torch.arange(length).expand(rows, -1)
    cu_seqlens = torch.tensor([0, length, rows * length], dtype=torch.int32)
    target_positions = torch.arange(int(rows * length * 0.4))
    tensors = tokens, positions, tokens, cu_seqlens, target_positions
    batch = step.Batch(*(x.to(DEVICE) for x in tensors))
    warm_up()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    spec = dataclasses.replace(SPECS[kind], activation_checkpointing=mode)
    model = step.build_model(config, ranks, spec)
    optimizer = optim.make_optimizer(model, 1e-4, 0.0, spec.pure_bf16)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        step.train_step(model, optimizer, [batch] * 2, ranks)
    measured = torch.cuda.max_memory_allocated() - before
    predicted = memory.predict_peak_memory(config, spec, rows, length, 2)
    assert abs(measured - predicted) <= 0.15 * predicted + (64 << 20), (
        f"{(measured - predicted) / 2**20:.0f} MiB beside the prediction"
    )


def warm_up():
    """Allocate cuBLAS's workspace, which is once per process and no part of a step."""
    x = torch.ones(256, 256, dtype=torch.bfloat16, device=DEVICE)
    (x @ x).sum().item()
