"""Small random models made by transformers' own classes, and small talks; every test runs on the CPU, without a network."""

import functools
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mistral_common
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402
from weights.tokenizer import load_tokenizer  # noqa: E402

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
VOCABULARIES = Path(mistral_common.__file__).parent / "data"
V1 = VOCABULARIES / "tokenizer.model.v1"
VOCAB = 2000  # pieces


@functools.cache
def vocabulary():
    """A tokenizer.model of Mistral's kind and of VOCAB pieces, made of the example's text by sentencepiece itself: small heads train fast."""
    import sentencepiece

    made, text = io.BytesIO(), (ROOT / "examples" / "pellhaven.txt").read_text().splitlines()
    way = dict(
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=made, vocab_size=VOCAB, minloglevel=2, **way
    )
    return made.getvalue()


def save_mistral(folder, **changes):
    """A random Mistral of 2 layers in transformers' own format, with a `vocabulary`; weights large enough for logits to differ."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 head_dim=16, max_position_embeddings=512, sliding_window=None, initializer_range=0.2, rms_norm_eps=1e-5)  # fmt: skip
    settings = transformers.MistralConfig(**{**sizes, **changes})
    model = transformers.MistralForCausalLM(settings)
    model.save_pretrained(folder)
    (Path(folder) / "tokenizer.model").write_bytes(vocabulary())
    return Path(folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return save_mistral(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def tokenizer(base):

    return load_tokenizer(base)


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
        turns = [
            {"author": a, "me": a == "Ann", "at": f"2024-01-01T00:{n:02}:00", "messages": m}
            for a, m in turns
        ]
        lines.append(
            json.dumps(
                {
                    "chat": "Bob",
                    "chat_id": "1",
                    "type": "personal_chat",
                    "start": f"2024-01-01T00:{n:02}:00",
                    "turns": turns,
                }
            )
            + "\n"
        )
    (folder / "train.jsonl").write_text("".join(lines[:48]))
    (folder / "val.jsonl").write_text("".join(lines[48:]))
    (folder / "persona.json").write_text(
        '{"me": "Ann", "contacts": [{"name": "Bob", "messages": 3}]}'
    )
    return folder


# --- CUDA's attention by document, on a CPU


@torch.library.custom_op("standin::varlen_attn", mutates_args=())
def varlen_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain formula, as an op that keeps what torch's varlen_attn keeps: q, k, v, the output and a float32 a query and head."""
    chances, _, values = plain(q, k, v, cu_seqlens, window)
    return torch.einsum("hnm,mhd->nhd", chances, values).contiguous(), chances.new_zeros(
        q.shape[1], len(q), dtype=torch.float32
    )


@torch.library.custom_op("standin::varlen_attn_backward", mutates_args=())
def varlen_attn_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chances, keys, values = plain(q, k, v, cu_seqlens, window)
    along = torch.einsum("nhd,mhd->hnm", grad, values)
    scores = chances * (along - (along * chances).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
    grad_k, grad_v = (
        torch.einsum("hnm,nhd->mhd", one, other) for one, other in ((scores, q), (chances, grad))
    )
    grads = (
        torch.einsum("hnm,mhd->nhd", scores, keys),
        *(x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (grad_k, grad_v)),
    )
    return tuple(x.contiguous() for x in grads)


def plain(q, k, v, cu_seqlens, window):
    """→ probabilities (H, N, N), keys and values (N, H, D)"""
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    token = torch.arange(len(q), device=q.device)
    document = torch.searchsorted(cu_seqlens, token, right=True)
    ahead = token - token[:, None]
    sees = (ahead <= 0) & (ahead > -window) & (document == document[:, None])
    scores = torch.einsum("nhd,mhd->hnm", q, keys).float() * q.shape[2] ** -0.5
    return scores.masked_fill(~sees, -torch.inf).softmax(-1).to(q.dtype), keys, values


varlen_attn.register_fake(
    lambda q, k, v, cu_seqlens, window: (
        torch.empty_like(q),
        q.new_empty(q.shape[1], len(q), dtype=torch.float32),
    )
)
varlen_attn_backward.register_fake(
    lambda grad, q, k, v, cu_seqlens, window: tuple(map(torch.empty_like, (q, k, v)))
)


def keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.window = inputs[4]


def back(ctx, grad, _):
    return *varlen_attn_backward(grad.contiguous(), *ctx.saved_tensors[:4], ctx.window), None, None


varlen_attn.register_autograd(back, setup_context=keep)


@pytest.fixture
def edges_in_a_tensor(monkeypatch):
    """A batch whose `cu_seqlens` are a tensor, as on CUDA, gets the stand-in for CUDA's kernel."""

    kernel = lambda q, k, v, where: varlen_attn(q, k, v, where.cu_seqlens, where.window or len(q))[
        0
    ]
    monkeypatch.setattr(model, "varlen", lambda: kernel)


# --- programs


@functools.cache
def warm():
    """The connection to this worker's tests/warm.py, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words = [sys.executable, ROOT / "tests" / "warm.py", str(theirs.fileno())]
    subprocess.Popen(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()])
    theirs.close()
    ours.settimeout(600)
    return ours


class Program:
    """One of the project's programs in a fork of tests/warm.py, or `ranks` of them that find each other as under torchrun; in other
    respects a subprocess.Popen. `streams`: files for what it reads, says and complains of."""

    def __init__(self, words, streams, env=None, ranks=1):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(env or {})}
        self.pids, self.reports, self.codes = [], [], [None] * ranks
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meet = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free.getsockname()[1],
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
            }
        for rank in range(ranks):
            own = (
                {
                    name: str(value)
                    for name, value in {**meet, "RANK": rank, "LOCAL_RANK": rank}.items()
                }
                if ranks > 1
                else {}
            )
            ours, theirs = socket.socketpair()
            message = json.dumps([[*map(str, words)], {**env, **own}, str(ROOT)]).encode()
            socket.send_fds(
                warm(), [message], [*(file.fileno() for file in streams), theirs.fileno()]
            )
            theirs.close()
            self.reports.append(ours.makefile())
            self.pids.append(int(self.reports[rank].readline()))
        self.pid = self.pids[0]

    def poll(self, timeout=0):
        """→ None, or as torchrun ends: 0 if all ranks ended so, 1 if one didn't; of a single one its own exit code"""
        until = time.monotonic() + timeout
        for rank, report in enumerate(self.reports):
            if (
                self.codes[rank] is None
                and select.select([report], [], [], max(0, until - time.monotonic()))[0]
            ):
                self.codes[rank] = int(report.readline())
        if None in self.codes:
            return None
        return self.codes[0] if len(self.codes) == 1 else int(any(self.codes))

    def wait(self, timeout=600):
        code = self.poll(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a program", timeout)
        return code

    def send_signal(self, sign):
        for pid in self.pids:
            os.kill(pid, sign)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def command(*words, env=None, stdin="", ranks=1):
    """Run one of the project's programs as a person does; with an `env` of its own in a Python of its own. → CompletedProcess with text"""
    if env:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
        words = [sys.executable, *map(str, words)]
        return subprocess.run(
            words, cwd=ROOT, env=env, input=stdin, capture_output=True, text=True, timeout=600
        )
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as errors,
    ):
        given.write(stdin)
        given.seek(0)
        code = Program(words, (given, out, errors), ranks=ranks).wait()
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(words, code, out.read(), errors.read())


def refused(done, *expected):
    """The program ended as DESIGN.md says: exit code 2, one or two lines on stderr, no traceback, naming what it should."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert done.returncode == 2, done.stderr
    assert 1 <= len(lines) <= 2 and "Traceback" not in done.stderr, done.stderr
    for text in expected:
        assert text in done.stderr, done.stderr
