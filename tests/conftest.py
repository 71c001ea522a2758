"""Small random models made by transformers' own classes, and small talks; every test runs on the CPU, without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mistral_common
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
VOCABULARIES = Path(mistral_common.__file__).parent / "data"
V1 = VOCABULARIES / "tokenizer.model.v1"


def save_mistral(folder, **changes):
    """A random Mistral of 2 layers in transformers' own format, with Mistral's v1 tokenizer; weights large enough for logits to differ."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=32000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=16, max_position_embeddings=512, sliding_window=None, initializer_range=0.2, rms_norm_eps=1e-5)  # fmt: skip
    settings = transformers.MistralConfig(**{**sizes, **changes})
    model = transformers.MistralForCausalLM(settings)
    model.save_pretrained(folder)
    shutil.copyfile(V1, Path(folder) / "tokenizer.model")
    return Path(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_mistral(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def words(base):
    import tokenizer

    return tokenizer.load(base)


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """A data folder: Ann always answers 'ok then' to whatever Bob asks; 60 sessions, 12 of them held out."""
    folder = tmp_path_factory.mktemp("chats")
    lines = []
    for n in range(60):
        turns = [
            ("Bob", [f"shall we meet on day {n}?", "or not"]),
            ("Ann", ["ok then", f"day {n} it is"]),
            ("Bob", ["good"]),
            ("Ann", ["see you \U0001f986"]),
        ]
        turns = [{"author": a, "me": a == "Ann", "at": f"2024-01-01T00:{n:02}:00", "messages": m} for a, m in turns]
        lines.append(
            json.dumps({"chat": "Bob", "chat_id": "1", "type": "personal_chat", "start": f"2024-01-01T00:{n:02}:00", "turns": turns}) + "\n"
        )
    (folder / "train.jsonl").write_text("".join(lines[:48]))
    (folder / "val.jsonl").write_text("".join(lines[48:]))
    (folder / "persona.json").write_text('{"me": "Ann", "contacts": [{"name": "Bob", "messages": 3}]}')
    return folder


def command(*words, env=None, stdin=None):
    """Run one of the project's programs as a person does. → CompletedProcess with text"""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=env, input=stdin, capture_output=True, text=True, timeout=240)


def refused(done, *expected):
    """The program ended as DESIGN.md says: exit code 2, one or two lines on stderr, no traceback, naming what it should."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert 1 <= len(lines) <= 2 and "Traceback" not in done.stderr, done.stderr
    for text in expected:
        assert text in done.stderr, done.stderr
