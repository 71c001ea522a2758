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
    varlen,
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
    return (
        folder,
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        load_model(str(folder), torch.float32),
    )


def tokens_like(model, *shape):
    return torch.randint(
        0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1)
    )


def test_logits_equal_transformers(pair):
    _, theirs, ours = pair
    tokens = tokens_like(ours, 2, 33)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_gradients_equal_transformers(pair):
    folder, theirs, _ = pair
    ours = load_model(str(folder), torch.float32).requires_grad_(True)
    tokens = tokens_like(ours, 2, 20)
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
    tokens = tokens_like(ours, 2, 30)
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
    tokens = tokens_like(ours, 1, 25)
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
def test_attention_by_document_equals_the_plain_formula_and_so_do_its_gradients(window):
    """Documents shorter and longer than a block of queries, and the reference is torch's own attention under a mask."""
    lengths = [1, 5, 127, 128, 129, 300, 40]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, -1)
    positions = torch.cat([positions[0], torch.arange(positions.shape[1])]).view(
        2, -1
    )  # the second row is one document
    where = attention_layout(positions, window, None, torch.float32)
    T = positions.shape[1]
    document = torch.stack([(positions[0] == 0).cumsum(0), torch.ones(T, dtype=torch.long)])
    query, key = torch.arange(T)[:, None], torch.arange(T)
    sees = (
        (key <= query)
        & (query - key < (window or T))
        & (document[:, None, :, None] == document[:, None, None, :])
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, heads, 16, requires_grad=True) for heads in (6, 2, 2))
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=sees, enable_gqa=True
    ).transpose(1, 2)
    got, direction = attend(q, k, v, where), torch.randn(2, T, 6, 16)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    for one, other in zip(*(torch.autograd.grad(x, (q, k, v), direction) for x in (got, expected))):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_mask_with_repeated_heads_attends_alike(monkeypatch):
    """On a GPU a cache is read with a mask and without groups."""
    mask = attention_layout(torch.arange(20, 25)[None], 7, 20, torch.float32)
    q, k, v = (torch.randn(1, n, heads, 16) for n, heads in ((5, 4), (25, 2), (25, 2)))
    expected = attend(q, k, v, mask)
    monkeypatch.setattr(model, "GROUPS_WITH_A_MASK", ())
    torch.testing.assert_close(attend(q, k, v, mask), expected, atol=1e-5, rtol=1e-4)


def test_saved_folder_loads_in_transformers_with_equal_logits(pair, tmp_path, tokenizer):
    _, _, ours = pair
    save_model(ours, tmp_path, tokenizer, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = tokens_like(ours, 1, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            ours(tokens), load_model(str(tmp_path))(tokens), atol=1e-6, rtol=1e-6
        )


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_recomputed_blocks_give_the_same_gradient(base, adapter):
    grads = []
    for recompute in AC_MODES:
        ours = load_model(str(base), torch.float32).requires_grad_(True)
        if adapter:
            lora.inject(ours)
        for block in ours.model.layers:
            block.recompute = recompute
        tokens = tokens_like(ours, 1, 12)
        ours(tokens, labels=tokens)[0].backward()
        grads.append([p.grad for p in ours.parameters() if p.requires_grad])
    for others in grads[1:]:
        for one, other in zip(others, grads[0]):
            torch.testing.assert_close(one, other)


# --- as on CUDA


def small(recompute, adapter):
    """Three random layers to train in float32, whole or by an adapter; the same whenever it is called."""
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(100, 64, 128, 3, 4, 2, 16, sliding_window=20), recompute=recompute
    )
    if adapter:
        lora.inject(model, 8)
    for parameter in lora.adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def batch_of(seed, documents, rows=2, length=64):
    """Some documents in `rows` rows, their cu_seqlens in a tensor of one size."""
    generator = torch.Generator().manual_seed(seed)
    size = rows * length
    tokens = torch.randint(0, 100, (rows, length), generator=generator)
    labels = tokens.where(torch.rand(rows, length, generator=generator) < 0.4, IGNORE_INDEX)
    cu_seqlens = sorted(
        {
            *range(0, size + 1, length),
            *torch.randint(1, size, (documents,), generator=generator).tolist(),
        }
    )
    positions = torch.cat(
        [torch.arange(end - begin) for begin, end in zip(cu_seqlens, cu_seqlens[1:])]
    ).view(rows, length)
    cu_seqlens = torch.tensor(cu_seqlens + [size] * (65 - len(cu_seqlens)), dtype=torch.int32)
    return step.Batch(
        tokens,
        positions,
        labels,
        cu_seqlens,
        (labels != IGNORE_INDEX).flatten().nonzero().flatten(),
    )


@pytest.mark.parametrize("window", [None, 5])
def test_the_stand_in_for_cudas_kernel_attends_as_the_cpus_kernel_does(window):
    batch = batch_of(0, 7)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 64, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    expected = attend(q, k, v, attention_layout(batch.positions, window, 0, torch.float32))
    got = varlen_attn(*(x.flatten(0, 1) for x in (q, k, v)), batch.cu_seqlens, window or 128)[
        0
    ].view_as(q)
    direction = torch.randn_like(q)
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(x, (q, k, v), direction) for x in (got, expected))):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", AC_MODES)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_compiled_blocks_train_as_others_do_and_are_compiled_once(
    recompute, adapter, edges_in_a_tensor, monkeypatch
):
    """Once for all layers, but for a first one whose input needs no gradient; and never again for other documents."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    curves, graphs = [], []
    for compiled in (False, True):
        model = small(recompute, adapter)
        if compiled:
            model.compile_blocks()
        optimizer, curve = optim.make_optimizer(model, 1e-2, 0.0), []
        for seed in range(4):
            curve.append(
                step.train_step(
                    model,
                    optimizer,
                    [batch_of(seed, 3 + 4 * seed)],
                    distributed.Distributed(torch.device("cpu")),
                )
            )
            graphs.append(metrics.count_compiled_graphs())
        curves.append(torch.tensor(curve))
    torch.testing.assert_close(curves[1], curves[0], atol=1e-5, rtol=1e-5)
    assert graphs == [0] * 4 + [2 if adapter else 1] * 4


def test_sampling_between_steps_compiles_nothing(edges_in_a_tensor, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    model = small("none", True)
    model.compile_blocks()
    cache = KVCache(model.config, 8)
    with torch.inference_mode():
        for _ in range(3):
            model(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    assert metrics.count_compiled_graphs() == 0


class Matmuls(TorchDispatchMode):
    """Counts them: the blocks' and their gradients'."""

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += op in {*SAVED_OPS, torch.ops.aten.addmm_.default}
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_selective_recomputation_keeps_less_and_does_no_matmul_twice(adapter, edges_in_a_tensor):
    kept, matmuls = {}, {}
    for recompute in AC_MODES:
        model, batch = small(recompute, adapter), batch_of(0, 5)
        with Matmuls() as counted:
            with memory.MemoryTracker() as live:
                loss, _ = model(**batch._asdict())
                kept[recompute] = live.now
            loss.backward()
        matmuls[recompute] = counted.count
    assert kept["none"] > 1.15 * kept["selective"] > 1.15**2 * kept["full"] > 0
    assert matmuls["selective"] == matmuls["none"] < matmuls["full"]


def new_kernel(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    """The signature of torch 2.13's."""
    return (
        query,
        key,
        value,
        (cu_seq_q, cu_seq_k, max_q, max_k),
        (return_aux, scale, window_size),
        enable_gqa,
    )


def old_kernel(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    """The signature of torch 2.11's."""
    return (
        query,
        key,
        value,
        (cu_seq_q, cu_seq_k, max_q, max_k),
        (return_aux, scale, window_size),
        False,
    )


@pytest.mark.parametrize(("window", "size"), [(None, (-1, 0)), (1, (0, 0)), (7, (6, 0))])
@pytest.mark.parametrize("kernel", [new_kernel, old_kernel])
def test_cudas_kernel_gets_its_window_and_heads_in_its_own_words(kernel, window, size, monkeypatch):
    """It counts a window without the token itself, and knows groups of heads or not."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    varlen.cache_clear()
    try:
        where = Documents(varlen(), torch.tensor([0, 3, 8, 8]), 8, window)
    finally:
        varlen.cache_clear()
    q, k, v = (torch.randn(8, heads, 16) for heads in (6, 2, 2))
    query, key, value, lengths, options, grouped = where.kernel(q, k, v, where)
    assert (
        query is q
        and lengths == (where.cu_seqlens, where.cu_seqlens, 8, 8)
        and options == (None, None, size)
    )
    if grouped:
        assert key is k and value is v
    else:
        for head in range(6):
            assert torch.equal(key[:, head], k[:, head // 3]) and torch.equal(
                value[:, head], v[:, head // 3]
            )
    assert grouped == (kernel is new_kernel)


# --- the head


@pytest.mark.parametrize("tokens", [0, 1, 7, 2500])  # none, one, several chunks
def test_loss_is_exact_in_float32_whatever_the_head_computes_in(tokens):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 300, bias=False, dtype=torch.bfloat16)
    hidden = (torch.randn(tokens, 16, dtype=torch.bfloat16) * 4).requires_grad_()
    labels = torch.randint(0, 300, (tokens,))
    losses = LinearCrossEntropy.apply(head, hidden, labels, (1000, 16), head.weight)
    expected = F.cross_entropy(head(hidden).float(), labels, reduction="none")
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-6)
    (losses.sum() / 3).backward()
    got = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    (expected.sum() / 3).backward()
    for mine, theirs in zip(got, (hidden.grad, head.weight.grad)):
        assert (mine - theirs).float().norm() <= 0.01 * theirs.float().norm()  # both are bf16


def test_mistral_7b_has_7_241_732_096_parameters():
    shape = ModelConfig(32000, 4096, 14336, 32, 32, 8, 128)
    with torch.device("meta"):
        assert (
            sum(p.numel() for p in Transformer(shape).parameters())
            == shape.num_parameters
            == 7_241_732_096
        )
