"""A real base, SmolLM2-135M-Instruct: an export, a LoRA, and the clone in every form it can take.

The other tests use small random models; real weights have outliers, tied embeddings and a
vocabulary of 49,152 tokens.
"""

import fcntl
import json
import shutil
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import ROOT, command
from test_gguf import PEERS, assert_llama_cpp_agrees
from test_gguf_convert import bpe_tokens, write_gguf

sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402

from weights.gguf_convert import convert
from weights.load import load_model
from weights.tokenizer import load_tokenizer

SMALL = "--lora-rank 8 --lr 1e-3 --max-steps 20 --batch 1 --seq-len 128 --samples 0 --keep 0"


@pytest.fixture(scope="session")
def real_base():
    """Return build/smollm2, made by examples/smollm2.py; pytest's workers wait for the first."""
    smollm2.FOLDER.parent.mkdir(exist_ok=True)
    with open(smollm2.FOLDER.parent / "smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = command("examples/smollm2.py")
    if "pip can't download" in done.stderr:
        pytest.skip(done.stderr.replace("\n", " "))
    assert done.returncode == 0, done.stderr
    return smollm2.FOLDER


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest would keep that of three runs, 0.8 GB each


def run(*arguments):
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def answer(folder):
    people = ["--me", "Odile Tarn", "--as", "Runa Vell"]  # a GGUF file doesn't name them
    options = ["--temperature", "0", "--weights", "bf16", "--max-tokens", "24"]
    return run("chat.py", folder, "-p", "Where are you?", *people, *options).strip()


def gguf_of(clone: Path, path: Path) -> Path:
    """A model folder as llama.cpp's converter writes it, in bf16."""
    tokenizer = json.loads((clone / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.get)
    types = [3 if i in special else 1 for i in range(len(tokens))]
    merges = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    model = transformers.AutoModelForCausalLM.from_pretrained(clone, dtype=torch.float32)
    return write_gguf(path, model, "BF16", bpe_tokens("smollm", tokens, types, merges))


@torch.no_grad()
def test_a_clone_of_a_real_base_is_the_same_in_peft_merged_and_as_gguf(real_base, folder):
    data, ckpt, clone, back = (folder / name for name in ("data", "ckpt", "clone", "back"))
    run("data.py", "examples/telegram/result.json", "--out", data, "--tokenizer", real_base)
    # all twenty held-out sessions take a minute
    sessions = (data / "val.jsonl").read_text().splitlines(keepends=True)[:6]
    (data / "val.jsonl").write_text("".join(sessions))
    train = ["--lora", "--model", real_base, "--data", data, "--out", ckpt, "--device", "cpu"]
    run("train.py", *train, *SMALL.split())
    result = json.loads((ckpt / "run.json").read_text())["result"]
    fall = 1 - result["loss"] / result["loss_before"]
    print(f"held-out loss {result['loss_before']:.3f} to {result['loss']:.3f}: {fall:.1%} less")
    assert fall > 0.02

    ours = load_tokenizer(ckpt)
    ids = torch.tensor([ours.encode((data / "val.jsonl").read_text()[:600])[0]])
    adapted = load_model(ckpt, torch.float32)(ids)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(real_base, dtype=torch.float32)
    without = theirs(ids).logits
    theirs = peft.PeftModel.from_pretrained(theirs, ckpt).eval()(ids).logits
    change, gap = (theirs - without).std(), (theirs - adapted).abs().max()
    print(f"the adapter changes logits by {change:.3f}; PEFT differs by {gap:.1e}")
    assert change > 0.1  # so PEFT did read it
    torch.testing.assert_close(adapted, theirs, atol=1e-3, rtol=1e-4)

    run("lora.py", "merge", ckpt, clone)
    merged = load_model(clone, torch.float32)
    gap = (merged(ids) - adapted).std() / adapted.std()
    print(f"merging changes the logits by {gap:.2%} of their standard deviation")
    assert gap < 0.02  # every merged weight is rounded to bf16
    convert(gguf_of(clone, folder / "clone.gguf"), back)
    for name, tensor in load_model(back, torch.float32).state_dict().items():
        assert torch.equal(tensor, merged.state_dict()[name]), name

    greedy = answer(ckpt)
    assert greedy
    assert [answer(other) for other in (clone, back)] == [greedy] * 2
    if (PEERS / "done").exists():
        assert_llama_cpp_agrees(clone, merged, ours, folder / "peer.gguf")


@torch.no_grad()
def test_smollm2_knows_the_capital_of_france(real_base):
    model = load_model(real_base, torch.float32)
    ours = load_tokenizer(real_base)
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    reply = "The capital of France is Paris.<|im_end|>"
    ids, begin = ours.encode(prompt + reply)[0], len(ours.encode(prompt)[0])
    greedy = model(torch.tensor([ids]))[0].argmax(-1).tolist()
    assert greedy[begin - 1 : -1] == ids[begin:]
