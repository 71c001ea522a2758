import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import checkpoint
import data
import lora
import model
import step
from data import IGNORED

ALONE = step.Ranks(torch.device("cpu"))


@pytest.fixture
def rows(chats, words):
    return data.rows(chats / "train.jsonl", words, 160)


def build(base, **adapter):
    return step.build(checkpoint.with_vocabulary(checkpoint.read_config(base), 32002), ALONE, base, adapter or None, torch.float32)


def test_collated_rows_keep_their_documents_apart_and_pad_with_a_document_without_targets(rows):
    some = rows[:3]
    tokens, positions, labels, *_ = step.collate(some, "cpu")
    for i, row in enumerate(some):
        n = len(row.ids)
        assert tokens[i, :n].tolist() == row.ids.tolist() and labels[i, :n].tolist() == row.labels.tolist()
        starts = (positions[i, :n] == 0).nonzero().flatten().tolist()
        assert starts == [0, *np.cumsum(row.doc_lengths)[:-1]]
        assert (labels[i, n:] == IGNORED).all() and (n == tokens.shape[1] or positions[i, n] == 0)


def test_data_and_model_mark_what_is_no_target_alike():
    """Two files know the number, for data.py does without torch."""
    assert data.IGNORED == model.IGNORED


def test_every_rank_gets_as_many_micro_batches_and_each_row_once(rows):
    for world in (1, 2, 3, 8):
        shares = [step.micro_batches(rows[:7], 2, step.Ranks(torch.device("cpu"), rank, world)) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        trained = sum(int((labels != IGNORED).sum()) for share in shares for _, _, labels, *_ in share)
        assert trained == sum(int((row.labels != IGNORED).sum()) for row in rows[:7])


@pytest.mark.parametrize("adapter", [{}, {"rows": [32000, 32001]}], ids=["full", "lora"])
def test_micro_batches_change_nothing(base, rows, adapter):
    """1 x 8 and 8 x 1, although the rows have different numbers of targets."""
    found = []
    for size in (8, 3, 1):
        model = build(base, **adapter)
        optimizer = step.make_optimizer(model, 1e-3, 0.0)
        results = [step.train_step(model, optimizer, step.micro_batches(rows[:8], size, ALONE), ALONE) for _ in range(3)]
        found.append((results, [p.detach() for p in model.parameters() if p.requires_grad]))
    for results, weights in found[1:]:
        torch.testing.assert_close(torch.tensor(results), torch.tensor(found[0][0]), atol=1e-5, rtol=1e-5)
        for one, other in zip(weights, found[0][1]):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_loss_is_the_mean_over_targets_of_transformers_too(base, rows, tmp_path):
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs.resize_token_embeddings(32002, mean_resizing=False)
    model = build(base)
    with torch.no_grad():
        theirs.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
        theirs.lm_head.weight.copy_(model.lm_head.weight)
        total = count = 0
        for row in rows[:4]:
            for end, n in zip(np.cumsum(row.doc_lengths), row.doc_lengths):
                logits = theirs(torch.from_numpy(row.ids[end - n : end]).long()[None]).logits[0]
                labels = torch.from_numpy(row.labels[end - n : end]).long()
                total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                count += int((labels != IGNORED).sum())
    loss, norm, targets = step.train_step(model, step.make_optimizer(model, 0.0, 0.0), step.micro_batches(rows[:4], 2, ALONE), ALONE)
    assert (loss, targets) == (pytest.approx(total / count, abs=1e-4), count)


def test_a_step_without_targets_changes_nothing(base, rows):
    model = build(base)
    optimizer = step.make_optimizer(model, 0.1, 0.1)
    before = copy.deepcopy(model.state_dict())
    batch = step.collate([dataclasses.replace(row, labels=np.full_like(row.labels, IGNORED)) for row in rows[:2]], "cpu")
    assert step.train_step(model, optimizer, [batch], ALONE) == (0.0, 0.0, 0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_numbers_that_are_none_stop_before_the_weights_are_touched(base, rows):
    model = build(base)
    with torch.no_grad():
        model.model.norm.weight[3] = math.inf
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(step.NotFinite):
        step.train_step(model, step.make_optimizer(model, 0.1, 0.0), step.micro_batches(rows[:2], 2, ALONE), ALONE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_evaluation_counts_bits_on_the_words_of_my_messages_alone(base, chats, words):
    rows = data.rows(chats / "val.jsonl", words, 160)
    model = build(base)
    found = step.evaluate(model, rows, ALONE, 3)
    talks = data.load_sessions(chats / "val.jsonl")
    assert found.chars.tolist() == [sum(len(m) for t in talk.turns if t.me for m in t.messages) for talk in talks]
    loss = sum(model(**step.collate([row], "cpu")._asdict())[0].item() for row in rows)
    assert found.nats == pytest.approx(loss, rel=1e-5) and found.count == sum(int((r.labels != IGNORED).sum()) for r in rows)
    words_only = [dataclasses.replace(r, labels=np.where(r.words, r.labels, IGNORED)) for r in rows]
    bits = sum(model(**step.collate([row], "cpu")._asdict())[0].item() for row in words_only) / math.log(2)
    assert found.metrics["val_bits_per_char"] == pytest.approx(bits / found.chars.sum(), rel=1e-5)
    assert found.metrics["val_format_loss"] == pytest.approx((loss - bits * math.log(2)) / (found.count - found.words), rel=1e-4)


def test_frozen_weights_stay_and_new_rows_begin_as_the_mean(base, rows):
    model = build(base, rows=[32000, 32001])
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    old = frozen["lm_head.weight"][:32000].mean(0)
    torch.testing.assert_close(model.lm_head.row_values.detach(), old.expand(2, -1))
    optimizer = step.make_optimizer(model, 1e-2, 0.0)
    step.train_step(model, optimizer, step.micro_batches(rows[:2], 2, ALONE), ALONE)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if not p.requires_grad)
    assert all(p.dtype == torch.float32 for p in lora.trained(model).values())


def test_flops_are_those_that_torch_counts(base, rows):
    from torch.utils.flop_counter import FlopCounterMode

    for adapter in ({}, {"rank": 8}):
        model = build(base, **adapter)
        row = dataclasses.replace(rows[0], labels=rows[0].ids)  # all labelled: torch's counter can't look into HeadLoss
        with FlopCounterMode(display=False) as counter:
            model(*step.collate([row], "cpu")[:2]).sum().backward()
        needed, done = step.flops(model, [row])
        model.recompute = "full"
        assert step.flops(model, [row])[1] > needed == done
        counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op) and "bmm" not in str(op))
        H, D, layers = 4, 16, 2
        attention = layers * 12 * H * D * float((row.doc_lengths * (row.doc_lengths + 1) / 2).sum())
        # the first block's input needs no gradient in LoRA, and we count it: within a twentieth
        assert needed - attention == pytest.approx(counted, rel=0.05 if adapter else 1e-6)
