"""Every command over every kind of base: with and without ChatML tokens, both kinds of vocabulary,
tied and untied heads. The programs' own `main` runs in this process: a start of each takes longer.
"""

import contextlib
import functools
import io
import itertools
import json
import signal
import sys

import pytest
import tokenizers as hf
import torch
import transformers
from conftest import ROOT, VOCAB, save_mistral

import chat
import evaluate
import train
from inference import scoring
from training import cost, metrics
from training import run_dir as training_run_dir
from weights import devices, merge
from weights.tokenizer import load_tokenizer

for package in ("sklearn", "bm25s"):
    pytest.importorskip(package)
CHOICES = ("chatml", "new rows"), ("sentencepiece", "bpe"), ("untied", "tied")
KINDS = {"-".join(kind): kind for kind in itertools.product(*CHOICES)}
QUICK = ("--seq-len", 160, "--device", "cpu", "--samples", 0, "--micro-batch", 4, "--lr", 1e-2)


@functools.cache
def byte_level(*specials):
    """A tokenizer.json of Qwen's kind, without BOS, made of the example's text."""
    engine = hf.Tokenizer(hf.models.BPE())
    engine.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": [*specials], "initial_alphabet": alphabet}
    trainer = hf.trainers.BpeTrainer(vocab_size=600, **settings)
    engine.train([str(ROOT / "examples" / "pellhaven.txt")], trainer)
    return engine.to_str()


def save_base(folder, tokens, vocabulary, head):
    chatml, tied = tokens == "chatml", head == "tied"
    if vocabulary == "sentencepiece":
        save_mistral(folder, vocab_size=VOCAB + 2 * chatml, tie_word_embeddings=tied)
        if chatml:  # as OpenHermes has them
            ids = {"<|im_end|>": VOCAB, "<|im_start|>": VOCAB + 1}
            (folder / "added_tokens.json").write_text(json.dumps(ids))
        return folder
    specials = ("<|endoftext|>", *("<|im_start|>", "<|im_end|>") * chatml)
    ends = {"bos_token_id": None, "eos_token_id": len(specials) - 1}
    save_mistral(folder, vocab_size=600, tie_word_embeddings=tied, **ends)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(byte_level(*specials))
    return folder


def run(module, *args, stdin=""):
    """Run a program with a command line and return its standard output."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        module.main()
    return out.getvalue()


def lines(folder, *keys):
    """Return the values of `keys` of the lines of metrics.jsonl that have them all."""
    metrics_lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [[line[key] for key in keys] for line in metrics_lines if {*keys} <= line.keys()]


def held_out(folder):
    """Return the bits per character (before training, of the best evaluation)."""
    first, *others = lines(folder, "val_loss", "val_bits_per_char")
    return first[1], min(others)[1]


def bits(folder):
    measured = json.loads((folder / "report.json").read_text())["bits_per_char"]
    return {
        name: measured[name]["value"] for name in ("clone", "other", "base") if name in measured
    }


@pytest.fixture(scope="module", autouse=True)
def quick():
    """fp32, so that what is equal is equal. Short answers; one prediction for all runs."""
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    choose, choices = cost.choose_micro_batch, []

    def choose_once(*args):
        choices.extend([] if choices else [choose(*args)])
        return choices[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "default_dtype", lambda device: torch.float32)
        patch.setattr(evaluate, "CHOICES", 3)
        patch.setattr(scoring, "LONGEST", 4)
        patch.setattr(cost, "choose_micro_batch", choose_once)
        patch.setattr(metrics, "measure_peak_flops", lambda *_: 1e9)
        patch.setattr(training_run_dir, "plot_losses", lambda folder: None)
        yield
    for kind, handler in handlers.items():
        signal.signal(kind, handler)


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), *KINDS[request.param])


@pytest.fixture(scope="module")
def few(chats, tmp_path_factory):
    """A data folder of fewer sessions; my 12 turns in its 6 held-out ones all answer somebody."""
    folder = tmp_path_factory.mktemp("few")
    for name, count in (("train.jsonl", 24), ("val.jsonl", 6), ("persona.json", 1)):
        lines = (chats / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:count]))
    (folder / "facts.md").write_text("lives by the sea\n")
    return folder


@pytest.fixture(scope="module")
def ckpt(base, few):
    """An adapter, trained in one go."""
    out = base.with_name(f"{base.name}-ckpt")
    run(train, "--lora", "--model", base, "--data", few, "--out", out, "--max-steps", 3, *QUICK)
    return out


def test_evaluated_base_equals_transformers_resized(base, ckpt, request):
    model, base_tokenizer, _ = evaluate.load(base, evaluate.Options(device="cpu"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows, (tokens, *_) = theirs.config.vocab_size, KINDS[request.node.callspec.params["base"]]
    assert base_tokenizer.added == ([] if tokens == "chatml" else [rows, rows + 1])
    theirs.resize_token_embeddings(rows + len(base_tokenizer.added), mean_resizing=False)
    text = "<|im_start|>Ann\n>>> see you, \U0001f986<|im_end|>"
    assert base_tokenizer.encode(text) == load_tokenizer(ckpt).encode(text)
    ids = torch.tensor([base_tokenizer.encode(text)[0]])
    with torch.no_grad():
        for weight in {theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight}:
            weight[rows:] = weight[:rows].mean(0)
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_report_equals_the_training_metrics(base, ckpt, few, tmp_path):
    whole = tmp_path / "whole"
    run(train, "--model", base, "--data", few, "--out", whole, "--max-steps", 2, *QUICK)
    measured = ("--data", few, "--replies", 12, "--device", "cpu")
    run(evaluate, ckpt, whole, *measured, "--baselines")
    before, best = held_out(ckpt)
    measured_bits = bits(ckpt)
    assert measured_bits["base"] == pytest.approx(before, rel=1e-4)
    assert measured_bits["clone"] == pytest.approx(best, rel=1e-4)
    assert measured_bits["other"] == pytest.approx(held_out(whole)[1], rel=5e-3)  # saved in bf16
    # the table is of the same moments: text alone there too, not the tokens that end a turn
    table = json.loads((ckpt / "report.json").read_text())["baselines"]
    table = {row["name"]: row["bits_per_char"]["value"] for row in table}
    table_bits = {name: table[name] for name in ("clone", "other", "base")}
    assert table_bits == pytest.approx(measured_bits, rel=1e-4)
    assert {"base + past messages", "clone + similar exchanges", "base + facts"} <= {*table}
    run(evaluate, whole, *measured)
    assert bits(whole) == {"clone": measured_bits["other"], "base": measured_bits["base"]}


def test_qlora_is_compared_with_the_unquantized_base(base, ckpt, few, tmp_path):
    packed = tmp_path / "packed"
    run(train, "--qlora", "--model", base, "--data", few, "--out", packed, "--max-steps", 1, *QUICK)
    run(evaluate, packed, "--data", few, "--replies", 1, "--device", "cpu")
    assert bits(packed)["base"] == pytest.approx(held_out(ckpt)[0], rel=1e-4)  # not in 4 bits
    assert bits(packed)["clone"] == pytest.approx(held_out(packed)[1], rel=0.1)


def test_blind_test_is_written(ckpt, few):
    flags = ("--data", few, "--blind-test", "--with", "Bob", "--replies", 4, "--device", "cpu")
    assert "the clone:" in run(evaluate, ckpt, *flags, stdin="y\n" * 4)
    assert '"real"' in (ckpt / "blind-test.html").read_text()


def test_merged_clone_answers_like_the_adapter(base, ckpt, tmp_path):
    clone = tmp_path / "clone"
    run(merge, "merge", ckpt, clone)
    flags = ("-p", "shall we meet?", "--seed", 0, "--max-tokens", 24, "--weights", "bf16")
    folders = (ckpt, clone, base)
    answer, merged, other = (run(chat, folder, *flags, "--device", "cpu") for folder in folders)
    assert answer == merged != other
    theirs = transformers.AutoModelForCausalLM.from_pretrained(clone)
    assert theirs.config.vocab_size == len(transformers.AutoTokenizer.from_pretrained(clone))


def test_init_continues_from_the_adapter(ckpt, few, tmp_path):
    """The base is the one that the adapter names."""
    run(train, "--init", ckpt, "--data", few, "--out", tmp_path / "more", "--max-steps", 1, *QUICK)
    assert held_out(tmp_path / "more")[0] == pytest.approx(held_out(ckpt)[1], rel=1e-5)


def test_resumed_run_is_bit_equal(base, ckpt, few, tmp_path, monkeypatch):
    out, take = tmp_path / "ckpt", train.Trainer.step
    flags = ("--lora", "--model", base, "--data", few, "--out", out, "--max-steps", 3, *QUICK)

    def stopped(steps, number, rows):
        line = take(steps, number, rows)
        signal.raise_signal(signal.SIGTERM)
        return line

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Trainer, "step", stopped)
        run(train, *flags)
    assert len(lines(out, "loss")) == 1
    run(train, *flags, "--resume")
    assert lines(out, "step", "loss") == lines(ckpt, "step", "loss")
    one, other = ((folder / "adapter_model.safetensors").read_bytes() for folder in (out, ckpt))
    assert one == other
