import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import save_mistral

import checkpoint
import lora
import model as model_
from model import HeadLoss, KVCache

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
        checkpoint.load_model(str(folder), torch.float32),
    )


def tokens_like(model, *shape):
    return torch.randint(0, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def test_logits_equal_transformers(pair):
    _, theirs, ours = pair
    tokens = tokens_like(ours, 2, 33)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_gradients_equal_transformers(pair):
    folder, theirs, _ = pair
    ours = checkpoint.load_model(str(folder), torch.float32).requires_grad_(True)
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
                torch.testing.assert_close(packed[row : row + 1, begin : begin + n], alone, atol=1e-4, rtol=1e-4)
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
        torch.testing.assert_close(ours(tokens[:, 8:20], cache=cache), full[:, 8:20], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 7, 150, 900])
def test_attention_by_document_equals_the_plain_formula_and_so_do_its_gradients(window):
    """Documents shorter and longer than a block of queries, and the reference is torch's own attention under a mask."""
    lengths = [1, 5, 127, 128, 129, 300, 40]
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, -1)
    positions = torch.cat([positions[0], torch.arange(positions.shape[1])]).view(2, -1)  # the second row is one document
    where = model_.layout(positions, window, 0, torch.float32)
    T = positions.shape[1]
    document = torch.stack([(positions[0] == 0).cumsum(0), torch.ones(T, dtype=torch.long)])
    query, key = torch.arange(T)[:, None], torch.arange(T)
    sees = (key <= query) & (query - key < (window or T)) & (document[:, None, :, None] == document[:, None, None, :])
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, T, heads, 16, requires_grad=True) for heads in (6, 2, 2))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=sees, enable_gqa=True).transpose(1, 2)
    got, direction = model_.attend(q, k, v, where), torch.randn(2, T, 6, 16)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    for one, other in zip(*(torch.autograd.grad(x, (q, k, v), direction) for x in (got, expected))):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_mask_with_repeated_heads_attends_alike(monkeypatch):
    """On a GPU a cache is read with a mask and without groups."""
    mask = model_.layout(torch.arange(20, 25)[None], 7, 20, torch.float32)
    q, k, v = (torch.randn(1, n, heads, 16) for n, heads in ((5, 4), (25, 2), (25, 2)))
    expected = model_.attend(q, k, v, mask)
    monkeypatch.setattr(model_, "GROUPS_WITH_A_MASK", ())
    torch.testing.assert_close(model_.attend(q, k, v, mask), expected, atol=1e-5, rtol=1e-4)


def test_saved_folder_loads_in_transformers_with_equal_logits(pair, tmp_path, words):
    _, _, ours = pair
    checkpoint.save_model(ours, tmp_path, words, dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = tokens_like(ours, 1, 20)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours(tokens), checkpoint.load_model(str(tmp_path))(tokens), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_recomputed_blocks_give_the_same_gradient(base, adapter):
    grads = []
    for recompute in model_.RECOMPUTE:
        ours = checkpoint.load_model(str(base), torch.float32).requires_grad_(True)
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


@pytest.mark.parametrize("tokens", [0, 1, 7, 2500])  # none, one, several chunks
def test_loss_is_exact_in_float32_whatever_the_head_computes_in(tokens, monkeypatch):
    monkeypatch.setitem(model_.HEAD_CHUNK, "cpu", 1000)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 300, bias=False, dtype=torch.bfloat16)
    hidden = (torch.randn(tokens, 16, dtype=torch.bfloat16) * 4).requires_grad_()
    labels = torch.randint(0, 300, (tokens,))
    losses = HeadLoss.apply(head, hidden, labels, head.weight)
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
    shape = model_.ModelConfig(32000, 4096, 14336, 32, 32, 8, 128)
    with torch.device("meta"):
        assert sum(p.numel() for p in model_.Transformer(shape).parameters()) == shape.num_parameters == 7_241_732_096
