import functools

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import save_mistral, varlen_attn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import lora
import model
from model import (
    AC_MODES,
    IGNORE_INDEX,
    SAVED_OPS,
    Documents,
    KVCache,
    LinearCrossEntropy,
    ModelConfig,
    Transformer,
    attend,
    attention_layout,
    varlen_kernel,
)
from training import distributed, memory, metrics, optim, step
from weights.load import load_model
from weights.save import save_model

VARIANTS = {
    "v0.1": dict(sliding_window=5),  # shorter than the texts, so that the window matters
    "v0.2": dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "v0.3": dict(vocab_size=32768, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "own head_dim": dict(head_dim=32),
    "tied": dict(tie_word_embeddings=True),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(folder, transformers' model, ours) of one variant."""
    folder = save_mistral(tmp_path_factory.mktemp("variant"), **VARIANTS[request.param])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, theirs, load_model(str(folder), torch.float32)


def random_tokens(model, *shape):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator)


def test_logits_equal_transformers(pair):
    _, theirs, ours = pair
    tokens = random_tokens(ours, 2, 33)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_gradients_equal_transformers(pair):
    folder, theirs, _ = pair
    ours = load_model(str(folder), torch.float32).requires_grad_(True)
    tokens = random_tokens(ours, 2, 20)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    labels[0, :7] = -100
    loss, count = ours(tokens, labels=labels)
    (loss / count).backward()
    theirs.zero_grad()
    F.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-5, rtol=1e-3)


def test_packed_logits_equal_separate_logits(pair):
    _, _, ours = pair
    lengths = [[9, 4, 17], [30]]
    tokens = random_tokens(ours, 2, 30)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        packed = ours(tokens, positions)
        for row, documents in enumerate(lengths):
            begin = 0
            for n in documents:
                alone = ours(tokens[row : row + 1, begin : begin + n])
                torch.testing.assert_close(
                    packed[row : row + 1, begin : begin + n], alone, atol=1e-4, rtol=1e-4
                )
                begin += n


def test_cached_decoding_equals_the_full_forward(pair):
    _, _, ours = pair
    tokens = random_tokens(ours, 1, 25)
    cache = KVCache(ours.config, 40)
    with torch.no_grad():
        full = ours(tokens)
        parts = [ours(part, cache=cache) for part in tokens.split([11, 1, 1, 6, 1, 5], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-4, rtol=1e-4)
        cache.length = 8  # cut back, as after /undo
        torch.testing.assert_close(
            ours(tokens[:, 8:20], cache=cache), full[:, 8:20], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("window", [None, 1, 7, 150, 900])
def test_document_attention_and_its_gradients_equal_masked_sdpa(window):
    """Documents are shorter and longer than a block of queries."""
    lengths = [1, 5, 127, 128, 129, 300, 40]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, -1)
    T = positions.shape[1]
    positions[1] = torch.arange(T)  # one document
    layout = attention_layout(positions, window, None, torch.float32)
    document = torch.stack([(positions[0] == 0).cumsum(0), torch.ones(T, dtype=torch.long)])
    query, key = torch.arange(T)[:, None], torch.arange(T)
    mask = (key <= query) & (query - key < (window or T))
    mask = mask & (document[:, None, :, None] == document[:, None, None, :])
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, heads, 16, requires_grad=True) for heads in (6, 2, 2))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    actual, grad = attend(q, k, v, layout), torch.randn(2, T, 6, 16)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    assert_grads_close((q, k, v), actual, expected, grad)


def assert_grads_close(inputs, actual, expected, grad):
    ours, theirs = (torch.autograd.grad(x, inputs, grad) for x in (actual, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_masked_attention_with_repeated_heads_equals_grouped(monkeypatch):
    """A GPU reads its cache with a mask and without groups."""
    mask = attention_layout(torch.arange(20, 25)[None], 7, 20, torch.float32)
    q, k, v = (torch.randn(1, n, heads, 16) for n, heads in ((5, 4), (25, 2), (25, 2)))
    expected = attend(q, k, v, mask)
    monkeypatch.setattr(model, "GQA_MASK_DEVICES", ())
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-5, rtol=1e-4)


def test_saved_folder_loads_in_transformers_with_equal_logits(pair, tmp_path, tokenizer):
    _, _, ours = pair
    save_model(ours, tmp_path, tokenizer, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = random_tokens(ours, 1, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            ours(tokens), load_model(str(tmp_path))(tokens), atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_activation_checkpointing_gives_the_same_gradients(base, adapter):
    grads = []
    for mode in AC_MODES:
        ours = load_model(str(base), torch.float32).requires_grad_(True)
        if adapter:
            lora.inject(ours)
        for block in ours.model.layers:
            block.activation_checkpointing = mode
        tokens = random_tokens(ours, 1, 12)
        ours(tokens, labels=tokens)[0].backward()
        grads.append([p.grad for p in ours.parameters() if p.requires_grad])
    for others in grads[1:]:
        for one, other in zip(others, grads[0]):
            torch.testing.assert_close(one, other)


# --- as on CUDA


def small_model(activation_checkpointing, adapter):
    """Three random layers to train in float32, whole or with an adapter; the same at every call."""
    torch.manual_seed(0)
    config = ModelConfig(100, 64, 128, 3, 4, 2, 16, sliding_window=20)
    model = Transformer(config, activation_checkpointing=activation_checkpointing)
    if adapter:
        lora.inject(model, 8)
    for parameter in lora.adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def random_batch(seed, documents, rows=2, length=64):
    """At least so many documents in `rows` rows, their cu_seqlens in a tensor of one size."""
    generator = torch.Generator().manual_seed(seed)
    size = rows * length
    tokens = torch.randint(0, 100, (rows, length), generator=generator)
    labels = tokens.where(torch.rand(rows, length, generator=generator) < 0.4, IGNORE_INDEX)
    borders = torch.randint(1, size, (documents,), generator=generator).tolist()
    borders = sorted({*range(0, size + 1, length), *borders})
    lengths = [end - begin for begin, end in zip(borders, borders[1:])]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(rows, length)
    cu_seqlens = torch.tensor(borders + [size] * (65 - len(borders)), dtype=torch.int32)
    target_positions = (labels != IGNORE_INDEX).flatten().nonzero().flatten()
    return step.Batch(tokens, positions, labels, cu_seqlens, target_positions)


@pytest.mark.parametrize("window", [None, 5])
def test_varlen_stand_in_equals_document_attention(window):
    batch = random_batch(0, 7)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 64, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    expected = attend(q, k, v, attention_layout(batch.positions, window, 0, torch.float32))
    flat = (x.flatten(0, 1) for x in (q, k, v))
    actual = varlen_attn(*flat, batch.cu_seqlens, window or 128)[0].view_as(q)
    torch.testing.assert_close(actual, expected)
    assert_grads_close((q, k, v), actual, expected, torch.randn_like(q))


@pytest.mark.parametrize("mode", AC_MODES)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_compiled_blocks_train_the_same_and_compile_once(mode, adapter, varlen_on_cpu, monkeypatch):
    """Once for all layers and documents; a first block whose input needs no gradient is another."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    curves, graphs = [], []
    for compiled in (False, True):
        model = small_model(mode, adapter)
        if compiled:
            model.compile_blocks()
        optimizer, curve = optim.make_optimizer(model, 1e-2, 0.0), []
        ranks = distributed.Distributed(torch.device("cpu"))
        for seed in range(4):
            batches = [random_batch(seed, 3 + 4 * seed)]
            curve.append(step.train_step(model, optimizer, batches, ranks))
            graphs.append(metrics.count_compiled_graphs())
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(curves[1], curves[0], atol=1e-5, rtol=1e-5)
    assert graphs == [0] * 4 + [2 if adapter else 1] * 4


def test_decoding_between_steps_compiles_nothing(varlen_on_cpu, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    model = small_model("none", True)
    model.compile_blocks()
    cache = KVCache(model.config, 8)
    with torch.inference_mode():
        for _ in range(3):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    assert metrics.count_compiled_graphs() == 0


class MatmulCounter(TorchDispatchMode):
    """Counts the matmuls of blocks and of their gradients."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in {*SAVED_OPS, torch.ops.aten.addmm_.default}
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_selective_checkpointing_saves_memory_and_repeats_no_matmul(adapter, varlen_on_cpu):
    saved, matmuls = {}, {}
    for mode in AC_MODES:
        model, batch = small_model(mode, adapter), random_batch(0, 5)
        with MatmulCounter() as counter:
            with memory.MemoryTracker() as tracker:
                loss, _ = model(**batch._asdict())
                saved[mode] = tracker.now
            loss.backward()
        matmuls[mode] = counter.count
    assert saved["none"] > 1.15 * saved["selective"] > 1.15**2 * saved["full"] > 0
    assert matmuls["selective"] == matmuls["none"] < matmuls["full"]


def grouped_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False
):
    """The arguments of torch 2.13's kernel that we use."""
    return query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), window_size, enable_gqa


def ungrouped_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
    """Those of torch 2.11's."""
    return query, key, value, (cu_seq_q, cu_seq_k, max_q, max_k), window_size, False


@pytest.mark.parametrize(("window", "expected"), [(None, (-1, 0)), (1, (0, 0)), (7, (6, 0))])
@pytest.mark.parametrize("kernel", [grouped_kernel, ungrouped_kernel])
def test_varlen_kernel_gets_its_window_and_heads(kernel, window, expected, monkeypatch):
    """Its window doesn't count the token itself; it knows groups of heads or not."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    varlen_kernel.cache_clear()
    try:
        documents = Documents(varlen_kernel(), torch.tensor([0, 3, 8, 8]), 8, window)
    finally:
        varlen_kernel.cache_clear()
    q, k, v = (torch.randn(8, heads, 16) for heads in (6, 2, 2))
    query, key, value, lengths, window_size, grouped = documents.kernel(q, k, v, documents)
    assert query is q and window_size == expected
    assert lengths == (documents.cu_seqlens, documents.cu_seqlens, 8, 8)
    assert grouped == (kernel is grouped_kernel)
    if grouped:
        assert key is k and value is v
    else:
        for head in range(6):
            assert torch.equal(key[:, head], k[:, head // 3])
            assert torch.equal(value[:, head], v[:, head // 3])


# --- the head


@pytest.mark.parametrize("tokens", [0, 1, 7, 2500])  # none, one, several chunks
def test_linear_cross_entropy_is_exact_in_float32_with_a_bf16_head(tokens):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 300, bias=False, dtype=torch.bfloat16)
    hidden = (torch.randn(tokens, 16, dtype=torch.bfloat16) * 4).requires_grad_()
    labels = torch.randint(0, 300, (tokens,))
    losses = LinearCrossEntropy.apply(head, hidden, labels, (1000, 16), head.weight)
    expected = F.cross_entropy(head(hidden).float(), labels, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6)
    (losses.sum() / 3).backward()
    grads = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    (expected.sum() / 3).backward()
    for mine, theirs in zip(grads, (hidden.grad, head.weight.grad)):
        assert (mine - theirs).float().norm() <= 0.01 * theirs.float().norm()  # both are bf16


def test_mistral_7b_has_7_241_732_096_parameters():
    config = ModelConfig(32000, 4096, 14336, 32, 32, 8, 128)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(config).parameters())
    assert parameters == config.num_parameters == 7_241_732_096
